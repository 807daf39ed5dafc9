//! [`StageError`]: why an image could not be staged, listed or removed.

use std::io;
use std::path::PathBuf;

use crate::manifest::DocumentError;
use crate::registry::{FetchError, is_disk_full};
use crate::room::Shortage;
use crate::unpack::UnpackError;
use crate::{Digest, Fault, Platform};

/// Why an image could not be staged, listed or removed. `image` is the whole reference.
#[derive(Debug, thiserror::Error)]
pub enum StageError {
    /// The reference carries no digest.
    #[error("image {image} is not pinned by a digest; resolve its tag first")]
    NotPinned {
        /// The reference.
        image: String,
    },
    /// An archive that does not hold the image that it names.
    #[error("the archive does not hold {image}")]
    Missing {
        /// The image, as the archive names it.
        image: String,
    },
    /// It came from an archive, or its name was lost, and no release says where it is.
    #[error(
        "image {image} came from an archive, or its name was lost, and no release here says where to fetch it; load it again with \"foreshore-agent image load\""
    )]
    NoSource {
        /// Its digest.
        image: String,
    },
    /// Something did not come from the registry.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// There is no variant for this device.
    #[error("image {image} has no variant for {platform}, only for {offered}; build and push one")]
    NoPlatform {
        /// The reference.
        image: String,
        /// What was asked for.
        platform: Box<Platform>,
        /// What there is.
        offered: String,
    },
    /// A manifest or config cannot be used.
    #[error("image {image}: document {digest} cannot be used")]
    Document {
        /// The reference.
        image: String,
        /// Of the document.
        digest: Digest,
        /// What is wrong with it.
        #[source]
        source: DocumentError,
    },
    /// Indexes in indexes in indexes.
    #[error("image {image}: index {digest} nests too deep or lists too many candidates")]
    IndexTooDeep {
        /// The reference.
        image: String,
        /// Where it was given up.
        digest: Digest,
    },
    /// A document does not have the size that the index declares.
    #[error(
        "image {image}: manifest {digest} does not have the {declared} bytes that its index declares"
    )]
    SizeLie {
        /// The reference.
        image: String,
        /// Of the manifest.
        digest: Digest,
        /// As the index says.
        declared: u64,
    },
    /// A config beyond its limit.
    #[error("image {image}: the config of manifest {digest} is larger than {max} bytes")]
    ConfigTooLarge {
        /// The reference.
        image: String,
        /// Of the manifest.
        digest: Digest,
        /// The limit in bytes.
        max: u64,
    },
    /// A layer is damaged, hostile or beyond a limit.
    #[error("image {image}: layer {layer} cannot be unpacked")]
    Layer {
        /// The reference.
        image: String,
        /// Of the blob.
        layer: Digest,
        /// What is wrong with it.
        #[source]
        source: Box<UnpackError>,
    },
    /// A layer is not what the config says.
    #[error(
        "image {image}: layer {layer} does not unpack to {expected}, as the config says; build the image again"
    )]
    DiffId {
        /// The reference.
        image: String,
        /// Of the blob.
        layer: Digest,
        /// The diff id in the config.
        expected: Digest,
    },
    /// There is not enough room, seen beforehand or while writing.
    #[error("image {image} does not fit on the disk of {}: {shortage}; free some, or remove unused images", path.display())]
    DiskFull {
        /// The reference.
        image: String,
        /// The store.
        path: PathBuf,
        /// How much is needed and how much is free.
        shortage: Shortage,
    },
    /// Another process holds the store for too long.
    #[error("another process is working in {}; try again when it is done", path.display())]
    Busy {
        /// The store.
        path: PathBuf,
    },
    /// The local disk failed, or this process may not do it.
    #[error("cannot {act} {}", path.display())]
    Io {
        /// What was tried.
        act: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

impl StageError {
    /// Which class it falls into: what the agent reports.
    #[must_use]
    pub fn fault(&self) -> Fault {
        match self {
            Self::NotPinned { .. } => Fault::Config,
            Self::Missing { .. } | Self::NoSource { .. } => Fault::NotFound,
            Self::Fetch(error) => error.fault(),
            Self::NoPlatform { .. } => Fault::NoMatchingPlatform,
            Self::SizeLie { .. } | Self::DiffId { .. } => Fault::DigestMismatch,
            Self::Document { .. } | Self::IndexTooDeep { .. } | Self::ConfigTooLarge { .. } => {
                Fault::BadImage
            }
            Self::Layer { source, .. } => match **source {
                UnpackError::DiskFull { .. } => Fault::DiskFull,
                UnpackError::Io { .. } | UnpackError::Ended(_) => Fault::Internal,
                _ => Fault::BadImage,
            },
            Self::DiskFull { .. } => Fault::DiskFull,
            Self::Busy { .. } => Fault::Busy,
            Self::Io { source, .. } if is_disk_full(source) => Fault::DiskFull,
            Self::Io { .. } => Fault::Internal,
        }
    }

    /// Whether trying again later, with nothing changed in the release, may help.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Fetch(error) => error.is_transient(),
            _ => matches!(
                self.fault(),
                Fault::DiskFull | Fault::Busy | Fault::Internal
            ),
        }
    }
}
