//! Deltas for the layers of an image that is to be fetched: which the registry has, and which are of use here.
//!
//! Nothing depends on them. What cannot be had, used or believed costs at most its size, and the layer is fetched whole.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::PathBuf;

use super::select::Selected;
use super::{StageError, Store};
use crate::delta::artifact::{ARTIFACT_TYPE, Artifact, FROM, LAYER_TYPE, LayerDelta};
use crate::manifest::Descriptor;
use crate::registry::{Client, FetchError, Referrer};
use crate::{Digest, Fault, Reference};

/// Layers that are smaller together are not worth two questions.
pub const DELTAS_WORTH_ASKING: u64 = 64 << 10;
/// How many deltas are looked at.
pub const DELTAS_LOOKED_AT: usize = 4;

/// How a layer is made of what is here.
#[derive(Debug, Clone)]
pub(super) struct Leaning {
    /// The delta's blob.
    pub(super) blob: Descriptor,
    /// The old layers' directories, in the order that the delta numbers them.
    pub(super) trees: Vec<PathBuf>,
}

/// By the layer's place in the image.
pub(super) type Leanings = BTreeMap<usize, Leaning>;

impl Store {
    /// The deltas that make the fetch of an image smaller. Asks the registry a few times at most, and only when there are
    /// layers here.
    pub(super) fn deltas(
        &self,
        client: &Client,
        reference: &Reference,
        selected: &Selected,
    ) -> Leanings {
        if !self.config.deltas {
            return Leanings::new();
        }
        let missing = self.missing(selected);
        let bytes = missing
            .values()
            .fold(0_u64, |sum, size| sum.saturating_add(*size));
        let has_layers = fs::read_dir(self.root.join("layers"))
            .is_ok_and(|mut entries| entries.next().is_some());
        if !has_layers || bytes < DELTAS_WORTH_ASKING {
            return Leanings::new();
        }
        self.best(client, reference, selected, &missing)
            .unwrap_or_else(|error| {
                tracing::debug!(%reference, %error, "no deltas can be had");
                Leanings::new()
            })
    }

    /// The layers that are to be fetched, with how many bytes that would take.
    fn missing(&self, selected: &Selected) -> BTreeMap<usize, u64> {
        let layers = selected.manifest.layers.iter();
        layers
            .zip(&selected.config.rootfs.diff_ids)
            .enumerate()
            .filter(|(_, (_, diff_id))| self.layer(diff_id).is_none())
            .map(|(index, (layer, _))| {
                let came = self.partials.size(&layer.digest);
                (index, layer.size.saturating_sub(came))
            })
            .collect()
    }

    fn best(
        &self,
        client: &Client,
        reference: &Reference,
        selected: &Selected,
        missing: &BTreeMap<usize, u64>,
    ) -> Result<Leanings, FetchError> {
        let subject = selected.raw.digest;
        let mut offered = client.referrers(reference, &subject, ARTIFACT_TYPE)?;
        // From images that are here first; where the registry does not say, perhaps.
        offered.sort_by_key(|referrer| !self.may_have(referrer));
        let mut best = (0, Leanings::new());
        for referrer in offered.iter().take(DELTAS_LOOKED_AT) {
            let raw = client.manifest_once(&reference.with_digest(referrer.digest))?;
            let artifact = match Artifact::parse(&raw.bytes) {
                Ok(artifact) if artifact.subject.digest == subject => artifact,
                Ok(_) => continue,
                Err(error) => {
                    tracing::debug!(delta = %referrer.digest, %error, "not a delta");
                    continue;
                }
            };
            let usable = self.usable(&artifact, selected, missing);
            let saved = usable
                .iter()
                .map(|(index, leaning)| missing[index] - leaning.blob.size)
                .sum();
            if saved > best.0 {
                best = (saved, usable);
            }
        }
        Ok(best.1)
    }

    fn may_have(&self, referrer: &Referrer) -> bool {
        let from = referrer
            .annotations
            .as_ref()
            .and_then(|annotations| annotations.get(FROM)?.parse().ok());
        from.is_none_or(|from: Digest| self.blobs.size(&from).is_some())
    }

    /// Those layers of a delta that are missing, smaller so, and made of what is here.
    fn usable(
        &self,
        artifact: &Artifact,
        selected: &Selected,
        missing: &BTreeMap<usize, u64>,
    ) -> Leanings {
        let diff_ids = &selected.config.rootfs.diff_ids;
        let mut usable = Leanings::new();
        for layer in &artifact.layers {
            let found = missing
                .iter()
                .find(|(index, bytes)| diff_ids[**index] == layer.diff_id && layer.size < **bytes);
            if let Some((index, _)) = found
                && !self.refused_path(&layer.digest).exists()
                && let Some(trees) = self.trees(layer)
            {
                let blob = Descriptor {
                    media_type: LAYER_TYPE.to_owned(),
                    digest: layer.digest,
                    size: layer.size,
                    platform: None,
                    annotations: BTreeMap::new(),
                };
                usable.insert(*index, Leaning { blob, trees });
            }
        }
        usable
    }

    fn trees(&self, layer: &LayerDelta) -> Option<Vec<PathBuf>> {
        let tree = |diff_id: &Digest| {
            self.layer(diff_id)
                .filter(|record| record.diff_id == *diff_id)
                .map(|_| self.layer_path(diff_id))
        };
        layer.trees.iter().map(tree).collect()
    }

    fn refused_path(&self, delta: &Digest) -> PathBuf {
        self.root.join("refused").join(delta.hex())
    }

    /// Whether an image is to be fetched whole after its deltas came to nothing, which is said once; what was bad about
    /// them is remembered until the image is there.
    pub(super) fn gives_up_deltas(
        &self,
        reference: &Reference,
        deltas: &Leanings,
        error: &StageError,
    ) -> bool {
        let fault = error.fault();
        if matches!(fault, Fault::Deferred | Fault::Busy | Fault::DiskFull) {
            return false;
        }
        tracing::warn!(
            %reference,
            error = error as &dyn std::error::Error,
            "the image cannot be made of old ones; fetching it whole"
        );
        if fault != Fault::Unreachable {
            for leaning in deltas.values() {
                let path = self.refused_path(&leaning.blob.digest);
                if let Err(error) = File::create(&path) {
                    tracing::debug!(%error, "a useless delta may be fetched again");
                }
            }
        }
        true
    }

    /// Forgets which deltas were bad.
    pub(super) fn forget_refused(&self) {
        for entry in fs::read_dir(self.root.join("refused"))
            .into_iter()
            .flatten()
            .flatten()
        {
            let _harmless = fs::remove_file(entry.path());
        }
    }
}
