//! What a device would fetch of an image, found out without fetching it: manifests and a config are read, layers are not.

use super::StageError;
use super::fetching::AT_ONCE;
use super::origin::Origin;
use super::select::{Selected, select};
use super::staging::unpacked_estimate;
use crate::blobs::BlobDir;
use crate::registry::Client;
use crate::{Digest, Platform, Reference};

/// So many layers are on their way at once, and take room beside what they unpack to.
pub const FETCHED_AT_ONCE: usize = AT_ONCE;

/// What an image is for one platform.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Look {
    /// The manifest chosen for the platform.
    pub manifest: Digest,
    /// Lowest first.
    pub layers: Vec<LayerAhead>,
}

/// One layer of a [`Look`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerAhead {
    /// Of its blob.
    pub digest: Digest,
    /// Of what it unpacks to: a device that has a layer of this has it, however it is packed.
    pub diff_id: Digest,
    /// Of its blob, compressed.
    pub bytes: u64,
    /// What a device reckons with when it unpacks it: more than it takes, usually.
    pub unpacked_bytes: u64,
}

/// Chooses the manifest that a device of this platform would, with the same code. `reference` names its digest. What is
/// in `blobs` is not asked for; the rest is, from the registry where there is a `client`. Blocks.
///
/// # Errors
/// As [`Store::stage`](super::Store::stage) before it fetches a layer; [`StageError::NoPlatform`] when nothing of the image runs there.
pub fn look(
    client: Option<&Client>,
    blobs: &BlobDir,
    reference: &Reference,
    platform: &Platform,
) -> Result<Look, StageError> {
    let here = select(Origin::Files(blobs), reference, platform);
    let selected = match (here, client) {
        // Of an index that came through here, not every variant need have.
        (Err(_), Some(client)) => select(Origin::Registry(client), reference, platform)?,
        (found, _) => found?,
    };
    Ok(ahead(&selected))
}

fn ahead(selected: &Selected) -> Look {
    let layers = selected.manifest.layers.iter();
    Look {
        manifest: selected.raw.digest,
        layers: layers
            .zip(&selected.config.rootfs.diff_ids)
            .map(|(layer, diff_id)| LayerAhead {
                digest: layer.digest,
                diff_id: *diff_id,
                bytes: layer.size,
                unpacked_bytes: unpacked_estimate(layer),
            })
            .collect(),
    }
}
