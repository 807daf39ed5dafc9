//! The signatures that were verified of images, kept so that no network is needed to look again. They prove themselves:
//! a file that was changed proves nothing, and is fetched again.

use std::fs::File;
use std::io::Read as _;

use super::{StageError, Store, io_error};
use crate::blobs::{BlobDir, write_atomic};
use crate::layout::ImportedSignature;
use crate::layout::attached::manifest_of;
use crate::manifest::{Descriptor, MANIFEST_BYTES_MAX};
use crate::registry::Client;
use crate::signature::{
    Demand, PART_BYTES_MAX, Signature, SignatureError, fetch_attached, fetch_bundles, first_unmet,
    in_manifest,
};
use crate::{Digest, Reference};

/// The largest file of kept signatures.
const KEPT_BYTES_MAX: u64 = 2 << 20;
/// The most signatures of one image that are kept.
const KEPT_MAX: usize = 64;

impl Store {
    /// Whether every demand on the image of this digest is met by signatures that were kept. Uses no network.
    #[must_use]
    pub fn is_signed(&self, digest: &Digest, demands: &[Demand<'_>]) -> bool {
        first_unmet(digest, demands, &self.kept_signatures(digest)).is_none()
    }

    /// Makes sure that every demand on the image that `reference` pins is met, by what was kept or by what the registry
    /// has; keeps that. Fetches no layer.
    ///
    /// # Errors
    /// [`SignatureError`]; what was kept before stays.
    pub fn prove(
        &self,
        client: &Client,
        reference: &Reference,
        demands: &[Demand<'_>],
    ) -> Result<(), SignatureError> {
        let image = || reference.to_string();
        let Some(digest) = reference.digest() else {
            return Err(SignatureError::NotPinned { image: image() });
        };
        if self.is_signed(&digest, demands) {
            return Ok(());
        }
        let kept = self.kept_signatures(&digest);
        let mut signatures = kept.clone();
        signatures.extend(fetch_attached(client, reference, &digest)?);
        if first_unmet(&digest, demands, &signatures).is_some() {
            signatures.extend(fetch_bundles(client, reference, &digest)?);
        }
        if let Some(unmet) = first_unmet(&digest, demands, &signatures) {
            let by = unmet.by.to_owned();
            return Err(match signatures.len() {
                0 => SignatureError::Unsigned { image: image(), by },
                found => SignatureError::Untrusted {
                    image: image(),
                    found,
                    by,
                },
            });
        }
        // Only what proves something takes room.
        signatures.retain(|signature| {
            demands
                .iter()
                .any(|demand| signature.vouches(&digest, demand.keys))
        });
        // What was there may prove something to others.
        signatures.extend(kept);
        Ok(self.keep_signatures(&digest, signatures)?)
    }

    /// Keeps the signatures of an image that an archive brought, beside those that were kept. Nobody looks yet whether they
    /// are right: what a policy wants is not known here, and each look verifies them anew.
    pub(super) fn keep_attached(
        &self,
        image: &Digest,
        archive: &BlobDir,
        attached: &[ImportedSignature],
    ) -> Result<(), StageError> {
        let kept = self.kept_signatures(image);
        let mut signatures = kept.clone();
        for found in attached.iter().filter(|found| found.subject == *image) {
            let read = |digest: &Digest, max| {
                let path = archive.path(digest);
                let bytes = archive.read(digest, max);
                bytes.map_err(|source| io_error("read", &path, source))
            };
            let bytes = read(&found.digest, MANIFEST_BYTES_MAX)?.unwrap_or_default();
            let Some(manifest) = manifest_of(&bytes, &found.media_type) else {
                continue;
            };
            let blob = |part: &Descriptor| read(&part.digest, PART_BYTES_MAX);
            signatures.extend(in_manifest(&manifest, blob)?);
        }
        if signatures.len() > kept.len() {
            self.keep_signatures(image, signatures)?;
        }
        Ok(())
    }

    /// Writes each once; the first ones when they are too many.
    fn keep_signatures(&self, image: &Digest, all: Vec<Signature>) -> Result<(), StageError> {
        let mut signatures: Vec<Signature> = Vec::new();
        for signature in all {
            if signatures.len() < KEPT_MAX && !signatures.contains(&signature) {
                signatures.push(signature);
            }
        }
        let text = loop {
            let text = serde_json::to_vec(&signatures).expect("texts serialize");
            if text.len() as u64 <= KEPT_BYTES_MAX {
                break text;
            }
            signatures.pop();
        };
        let path = self.signatures_path(image);
        write_atomic(&path, self.blobs.tmp(), "signatures", &text)
            .map_err(|source| io_error("write", &path, source))
    }

    pub(super) fn kept_signatures(&self, digest: &Digest) -> Vec<Signature> {
        let mut text = Vec::new();
        let read = File::open(self.signatures_path(digest))
            .and_then(|file| file.take(KEPT_BYTES_MAX).read_to_end(&mut text));
        match read {
            Ok(_) => serde_json::from_slice(&text).unwrap_or_default(),
            Err(_) => Vec::new(),
        }
    }
}
