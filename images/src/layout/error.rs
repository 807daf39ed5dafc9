//! [`ImportError`]: why nothing was imported.

use std::io;
use std::path::Path;

use crate::manifest::DocumentError;
use crate::registry::is_disk_full;
use crate::{Digest, Fault};

/// Why nothing was imported.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// Neither of the two forms.
    #[error(
        "this is neither an OCI layout (no index.json) nor a docker-archive (no manifest.json); \
         write one with \"skopeo copy … oci-archive:FILE\" or \"docker save\""
    )]
    NotAnImage,
    /// Not a tar archive, or a damaged one.
    #[error("the archive cannot be read")]
    Archive(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// Beyond [`super::ImportLimits::bytes_max`], or a document beyond its own limit.
    #[error("the archive, or a document in it, holds more than {max} bytes")]
    TooLarge {
        /// The limit.
        max: u64,
    },
    /// Beyond [`super::ImportLimits::entries_max`].
    #[error(
        "the archive holds more than {max} entries, so it is not an image archive; is it an unpacked root file system?"
    )]
    TooManyEntries {
        /// The limit.
        max: usize,
    },
    /// `index.json` or `manifest.json` is not as specified.
    #[error("the archive's index is not JSON of the expected shape")]
    Index {
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
    /// It holds no image.
    #[error("the archive holds no image")]
    Empty,
    /// An index without any of its variants.
    #[error(
        "the archive holds index {digest}, but none of its variants; save the image for at least one platform"
    )]
    NoVariant {
        /// Of the index.
        digest: Digest,
    },
    /// Something that is referred to is not there.
    #[error("blob {digest} is missing; write the archive again")]
    MissingBlob {
        /// Of the blob.
        digest: Digest,
    },
    /// A docker-archive names a file that is not there.
    #[error("file \"{path}\", which manifest.json names, is missing; write the archive again")]
    MissingFile {
        /// As in `manifest.json`.
        path: String,
    },
    /// Not the bytes that the digest names.
    #[error("blob {digest} is damaged: its digest is {found}; write the archive again")]
    DigestMismatch {
        /// As it is called.
        digest: Digest,
        /// As it is.
        found: Digest,
    },
    /// Not as long as declared.
    #[error(
        "blob {digest} has {found} bytes where {declared} are declared; write the archive again"
    )]
    SizeMismatch {
        /// Of the blob.
        digest: Digest,
        /// As declared.
        declared: u64,
        /// As it is.
        found: u64,
    },
    /// A docker-archive's layer is not what its config says.
    #[error(
        "layer \"{path}\" is {found} where the config says {expected}; write the archive again"
    )]
    DiffId {
        /// As in `manifest.json`.
        path: String,
        /// The diff id in the config.
        expected: Digest,
        /// Of the layer.
        found: Digest,
    },
    /// A manifest or config cannot be used.
    #[error("document {digest} cannot be used")]
    Document {
        /// Of the document.
        digest: Digest,
        /// What is wrong with it.
        #[source]
        source: DocumentError,
    },
    /// Indexes in indexes in indexes.
    #[error("index {digest} nests too deep, or lists too much")]
    TooDeep {
        /// Where it was given up.
        digest: Digest,
    },
    /// The local disk failed.
    #[error("cannot {act} {path}")]
    Io {
        /// What was tried.
        act: &'static str,
        /// On what.
        path: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

impl ImportError {
    pub(super) fn io(act: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io {
            act,
            path: path.display().to_string(),
            source,
        }
    }

    /// Which class it falls into.
    #[must_use]
    pub fn fault(&self) -> Fault {
        match self {
            Self::Io { source, .. } if is_disk_full(source) => Fault::DiskFull,
            Self::Io { .. } => Fault::Internal,
            Self::DigestMismatch { .. } | Self::SizeMismatch { .. } | Self::DiffId { .. } => {
                Fault::DigestMismatch
            }
            _ => Fault::BadImage,
        }
    }
}
