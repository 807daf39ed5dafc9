//! Notes of the images that were begun and are not yet whole: what keeps the blobs of their layers.
//!
//! They may be lost: then what was begun is fetched from the start.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use super::{StageError, Store, digests_in, io_error};
use crate::Digest;

/// The longest note that is read: as many layers as a manifest of 4 MiB can have.
const NOTE_BYTES_MAX: u64 = 4 << 20;

impl Store {
    fn pull_path(&self, image: &Digest) -> PathBuf {
        self.root.join("pulling").join(image.hex())
    }

    /// Notes that an image is begun that needs these layers.
    pub(super) fn note_pull(&self, image: &Digest, layers: &BTreeSet<Digest>) {
        let text: String = layers.iter().map(|layer| format!("{layer}\n")).collect();
        if let Err(error) = fs::write(self.pull_path(image), text) {
            tracing::debug!(%error, "what is fetched now may have to be fetched again");
        }
    }

    /// Forgets it: the image is there.
    pub(super) fn forget_pull(&self, image: &Digest) {
        let _harmless = fs::remove_file(self.pull_path(image));
    }

    /// Removes what was begun of images that are not in `keep`; returns how many bytes that freed.
    pub(super) fn collect_pulls(&self, keep: &BTreeSet<&Digest>) -> Result<u64, StageError> {
        let mut layers = BTreeSet::new();
        for image in digests_in(&self.root.join("pulling"))? {
            if keep.contains(&image) {
                layers.extend(self.noted(&image));
            } else {
                self.forget_pull(&image);
            }
        }
        self.drop_partials(|layer| layers.contains(layer))
    }

    fn noted(&self, image: &Digest) -> Vec<Digest> {
        let path = self.pull_path(image);
        let text = match fs::metadata(&path) {
            Ok(meta) if meta.len() <= NOTE_BYTES_MAX => fs::read_to_string(&path),
            Ok(_) => return Vec::new(),
            Err(error) => Err(error),
        };
        let text = text.unwrap_or_default();
        text.lines().filter_map(|line| line.parse().ok()).collect()
    }

    /// Removes what came of blobs for which `keep` is false; returns how many bytes that freed.
    pub(super) fn drop_partials(&self, keep: impl Fn(&Digest) -> bool) -> Result<u64, StageError> {
        self.partials
            .retain(keep)
            .map_err(|source| io_error("remove partial blobs of", &self.root, source))
    }
}
