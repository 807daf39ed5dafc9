//! OCI images for Foreshore: from a reference in a manifest to directories that overlayfs can mount.
//!
//! This crate knows neither agent nor hub. Everything in it blocks: the device runs it in a short-lived
//! child process, the hub on a thread of its own. Whatever comes from outside (registry, archive, layer)
//! is bounded in size and time and checked before it is used.
//!
//! | module | what it owns |
//! |---|---|
//! | [`mod@reference`] | image references: `HOST/REPOSITORY[:TAG][@DIGEST]` |
//! | [`platform`] | what a device can run, and the choice from an image index |
//! | [`manifest`] | the JSON of indexes, manifests and image configs |
//! | [`registry`] | the client of the OCI distribution API |
//! | [`room`] | what a file system has left, and the reserve that stays free |
//! | [`store`] | the images on a device: blobs, unpacked layers, records, garbage collection |
//! | [`signature`] | who vouches for an image |
//! | [`unpack`] | one layer's tar stream into one directory that it can never leave |
//! | [`delta`] | a layer made of files of an old image and of little besides |
//! | [`ledger`] | what every file of an unpacked layer was, to find rot |
//! | [`compression`] | gzip and zstd, told apart by their first bytes |
//! | [`layout`] | import of OCI layouts and docker-archives into a blob directory |
//! | [`blobs`] | a directory of blobs named by their digest |
//! | [`partial`] | blobs on their way in, which go on where they stopped |
//! | [`fault`] | [`Fault`], the few classes that every error here falls into |
//!
//! ```no_run
//! use std::path::Path;
//! use foreshore_images::{platform::Platform, reference::Reference, registry::{Client, ClientConfig}, store::Store};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let client = Client::new(ClientConfig::default())?;
//! let tagged: Reference = "ghcr.io/acme/modbus:1.4".parse()?;
//! let pinned = tagged.with_digest(client.resolve(&tagged)?);
//! let store = Store::open(Path::new("/var/lib/foreshore/images"))?;
//! let image = store.stage(&client, &pinned, &Platform::host(), &mut |_| {})?;
//! println!("{:?} over {:?}", image.config.entrypoint, image.layers);
//! # Ok(())
//! # }
//! ```

pub mod blobs;
pub mod compression;
pub mod delta;
pub mod fault;
#[doc(hidden)]
pub mod fuzz;
pub mod layout;
pub mod ledger;
pub mod manifest;
pub mod partial;
pub mod platform;
pub mod reference;
pub mod registry;
pub mod room;
pub mod signature;
pub mod store;
mod tar_stream;
pub mod unpack;

pub use fault::Fault;
pub use foreshore_protocol::Digest;
pub use platform::Platform;
pub use reference::Reference;
pub use room::Room;
