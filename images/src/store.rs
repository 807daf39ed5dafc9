//! The images on a device.
//!
//! skeleton

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::manifest::ImageConfig;
use crate::registry::Client;
use crate::{Digest, Fault, Platform, Reference};

/// Limits of a [`Store`]. `Default` suits a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoreConfig {
    /// The most bytes one image may unpack to. Default 16 GiB; besides, never more than half of the free disk.
    pub unpacked_bytes_max: u64,
    /// How long [`Store::stage`] waits for another process that holds the store. Default 10 minutes.
    pub lock_wait: Duration,
}

/// Images under one directory. Cheap to open; several processes may have it open.
#[derive(Debug)]
pub struct Store {
    root: PathBuf,
    config: StoreConfig,
}

/// An image that is wholly on this disk and ready to be mounted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StagedImage {
    /// The digest that was asked for, of an index or a manifest: what [`Store::staged`] and
    /// [`Store::remove_unused`] know it by.
    pub digest: Digest,
    /// The manifest chosen for this platform; equal to `digest` when that is not an index.
    pub manifest: Digest,
    /// How to start it.
    pub config: ImageConfig,
    /// Directories for overlayfs's `lowerdir`, **lowest first** (overlayfs wants them in reverse).
    pub layers: Vec<PathBuf>,
    /// What it takes on disk, unpacked.
    pub size_bytes: u64,
    /// What was left out while unpacking, for people, for example device nodes.
    pub notes: Vec<String>,
}

/// How far [`Store::stage`] is. Byte counts are of compressed layers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Progress {
    /// Manifest and config are here; this many bytes in so many layers are still to be fetched.
    Planned {
        /// Compressed bytes still to be fetched.
        bytes: u64,
        /// Layers still to be fetched or unpacked.
        layers: usize,
    },
    /// So many more bytes have been fetched.
    Fetched {
        /// Compressed bytes since the last call.
        bytes: u64,
    },
    /// One more layer has been unpacked.
    Unpacked {
        /// Its uncompressed digest.
        diff_id: Digest,
    },
}

/// Why an image could not be staged.
#[derive(Debug, thiserror::Error)]
pub enum StageError {
    /// skeleton
    #[error("skeleton")]
    Io(#[source] io::Error),
}

/// What [`Store::remove_unused`] did.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Removed {
    /// Images that are gone.
    pub images: Vec<Digest>,
    /// How many layer directories are gone.
    pub layers: usize,
    /// Bytes of unpacked layers and blobs.
    pub bytes: u64,
}

impl Store {
    /// Opens the store with the default limits; creates the directory (mode 0700) if needed and sweeps what an
    /// interrupted [`stage`](Self::stage) left.
    ///
    /// # Errors
    /// [`StageError`] when the directory cannot be made.
    pub fn open(root: &Path) -> Result<Self, StageError> {
        Self::open_with(root, StoreConfig::default())
    }

    /// As [`open`](Self::open), with limits.
    ///
    /// # Errors
    /// [`StageError`] when the directory cannot be made.
    pub fn open_with(root: &Path, config: StoreConfig) -> Result<Self, StageError> {
        Ok(Self {
            root: root.to_owned(),
            config,
        })
    }

    /// Makes the image that `reference` pins (it must carry a digest) ready to be mounted: fetches what is
    /// missing, checks every byte, unpacks. Nothing to do, and no network, when it is already there. May be
    /// killed at any point and called again: whole layers are kept.
    ///
    /// # Errors
    /// [`StageError`]; nothing of other images is touched.
    pub fn stage(
        &self,
        client: &Client,
        reference: &Reference,
        platform: &Platform,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<StagedImage, StageError> {
        todo!(
            "{client:?} {reference} {platform} {:?} {:?}",
            self.config,
            {
                progress(Progress::Fetched { bytes: 1 });
                1
            }
        )
    }

    /// The image, if it is wholly here: its record, config and every layer directory. Uses no network and waits
    /// for nobody. A damaged record counts as absent; staging again repairs it.
    #[must_use]
    pub fn staged(&self, digest: &Digest) -> Option<StagedImage> {
        todo!("{digest} {:?}", self.root)
    }

    /// Every image that is wholly here, by the digest it was asked for.
    ///
    /// # Errors
    /// [`StageError`] when the directory cannot be read.
    pub fn list(&self) -> Result<Vec<StagedImage>, StageError> {
        todo!()
    }

    /// Removes every image whose asked-for digest is not in `keep`, and the layers and blobs that then nobody
    /// needs. Never touches a kept image.
    ///
    /// # Errors
    /// [`StageError`] of [`Fault::Busy`] when another process is staging; nothing was removed then.
    pub fn remove_unused(&self, keep: &BTreeSet<Digest>) -> Result<Removed, StageError> {
        todo!("{keep:?}")
    }
}

impl Default for StoreConfig {
    fn default() -> Self {
        Self {
            unpacked_bytes_max: 16 << 30,
            lock_wait: Duration::from_mins(10),
        }
    }
}

impl StageError {
    /// Which class it falls into: what the agent reports.
    #[must_use]
    pub const fn fault(&self) -> Fault {
        Fault::Internal
    }

    /// Whether trying again later, with nothing changed, may help.
    #[must_use]
    pub const fn is_transient(&self) -> bool {
        false
    }
}
