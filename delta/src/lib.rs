//! Makes [deltas](foreshore_images::delta) between two images.
//!
//! This takes time and memory, and zstd's own compressor; it runs where images are built. What devices run is
//! [`foreshore_images::delta::Rebuilt`].
//!
//! | module | what it owns |
//! |---|---|
//! | [`image`] | two images in archives or layouts, and the artifact made of them |
//! | [`layer`] | the delta of one layer |
//! | [`old`] | the files of the old image: by path, by content, by likeness |
//! | `sample` | places in files that are found again wherever they move |
//! | `pack` | zstd blocks with old bytes in front |

pub mod image;
pub mod layer;
pub mod old;
mod pack;
mod sample;
