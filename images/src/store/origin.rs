//! [`Origin`]: where an image on its way into the store comes from.

use super::{StageError, io_error};
use crate::Reference;
use crate::blobs::BlobDir;
use crate::manifest::{CONFIG_BYTES_MAX, Descriptor, Document, MANIFEST_BYTES_MAX};
use crate::registry::{Client, RawManifest};

/// A registry, or blobs that are on this disk and were verified as they came.
#[derive(Clone, Copy)]
pub(super) enum Origin<'a> {
    Registry(&'a Client),
    Files(&'a BlobDir),
}

impl Origin<'_> {
    /// The index or manifest that `reference` names by its digest; `None` where an archive has only some variants of an
    /// index, and not this.
    pub(super) fn manifest(
        &self,
        reference: &Reference,
    ) -> Result<Option<RawManifest>, StageError> {
        let blobs = match self {
            Self::Registry(client) => return Ok(Some(client.manifest(reference)?)),
            Self::Files(blobs) => blobs,
        };
        let digest = reference.digest().ok_or_else(|| StageError::NotPinned {
            image: reference.to_string(),
        })?;
        let path = blobs.path(&digest);
        let read = blobs
            .read(&digest, MANIFEST_BYTES_MAX)
            .map_err(|source| io_error("read", &path, source))?;
        let Some(bytes) = read else {
            return Ok(None);
        };
        let document = Document::parse(&bytes, None).map_err(|source| StageError::Document {
            image: reference.to_string(),
            digest,
            source,
        })?;
        Ok(Some(RawManifest {
            digest,
            media_type: document.media_type().to_owned(),
            bytes,
        }))
    }

    /// A config; its size was compared with the limit.
    pub(super) fn config(
        &self,
        reference: &Reference,
        config: &Descriptor,
    ) -> Result<Vec<u8>, StageError> {
        let blobs = match self {
            Self::Registry(client) => return Ok(client.small_blob(reference, config)?),
            Self::Files(blobs) => blobs,
        };
        let path = blobs.path(&config.digest);
        let missing = || std::io::ErrorKind::NotFound.into();
        blobs
            .read(&config.digest, CONFIG_BYTES_MAX)
            .and_then(|found| found.ok_or_else(missing))
            .map_err(|source| io_error("read", &path, source))
    }
}
