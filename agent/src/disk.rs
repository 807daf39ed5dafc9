//! The disk as containers and state share it: who uses how much, and what is held back for the state.
//!
//! | file | owns |
//! |---|---|
//! | `disk/usage.rs` | counting what a container wrote |
//! | `disk/ballast.rs` | the file that is given up when the disk is full |
//! | `disk/block.rs` | which whole disk a name or a directory is on |
//!
//! What follows from it is decided in [`crate::plan`].

mod ballast;
pub(crate) mod block;
mod usage;

pub use ballast::{Ballast, make_way};
pub use usage::{Measured, Usage, measure};
