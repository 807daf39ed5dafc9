//! Import of images from files: OCI layouts (directory or tar) and docker-archives.
//!
//! skeleton

use std::collections::BTreeSet;
use std::io::{self, Read};
use std::path::Path;

use crate::blobs::BlobDir;
use crate::{Digest, Fault, Platform};

/// Limits of an import. `Default` suits a hub.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImportLimits {
    /// The most bytes an archive may hold, after gunzip. Default 16 GiB.
    pub bytes_max: u64,
    /// The most entries an archive may hold. Default 10,000.
    pub entries_max: usize,
}

/// One image that was imported; every blob in `blobs` is in the blob directory and verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImportedImage {
    /// The name the archive gives it, as written there: a `RepoTags` entry (`demo:v1`), or the annotation
    /// `io.containerd.image.name` or `org.opencontainers.image.ref.name` (often only a tag).
    pub name: Option<String>,
    /// Of its index or manifest.
    pub digest: Digest,
    /// Of its index or manifest.
    pub media_type: String,
    /// What it runs on; complete variants only.
    pub platforms: Vec<Platform>,
    /// Bytes of all `blobs` together.
    pub size_bytes: u64,
    /// The index or manifest, everything it refers to, down to the layers.
    pub blobs: BTreeSet<Digest>,
}

/// Why nothing was imported.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// skeleton
    #[error("skeleton")]
    Io(#[source] io::Error),
}

/// Imports every image of an archive: a tar, plain or gzip-compressed, of an OCI layout or a docker-archive.
///
/// # Errors
/// [`ImportError`]; blobs that had already come in stay (see [`BlobDir::retain`]).
pub fn import_archive(
    archive: &mut dyn Read,
    blobs: &BlobDir,
    limits: &ImportLimits,
) -> Result<Vec<ImportedImage>, ImportError> {
    let _ = (archive, blobs, limits);
    todo!()
}

/// Imports every image of an OCI layout directory, or of an archive file.
///
/// # Errors
/// [`ImportError`]; blobs that had already come in stay (see [`BlobDir::retain`]).
pub fn import_path(
    path: &Path,
    blobs: &BlobDir,
    limits: &ImportLimits,
) -> Result<Vec<ImportedImage>, ImportError> {
    let _ = (path, blobs, limits);
    todo!()
}

impl Default for ImportLimits {
    fn default() -> Self {
        Self {
            bytes_max: 16 << 30,
            entries_max: 10_000,
        }
    }
}

impl ImportError {
    /// Which class it falls into.
    #[must_use]
    pub const fn fault(&self) -> Fault {
        Fault::Internal
    }
}
