//! The signatures that were verified of images, kept so that no network is needed to look again. They prove themselves:
//! a file that was changed proves nothing, and is fetched again.

use std::fs::File;
use std::io::Read as _;

use super::{Store, io_error};
use crate::blobs::write_atomic;
use crate::registry::Client;
use crate::signature::{
    Demand, Signature, SignatureError, fetch_attached, fetch_bundles, first_unmet,
};
use crate::{Digest, Reference};

/// The largest file of kept signatures.
const KEPT_BYTES_MAX: u64 = 2 << 20;

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
        let mut signatures = fetch_attached(client, reference, &digest)?;
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
        let path = self.signatures_path(&digest);
        let text = serde_json::to_vec(&signatures).expect("texts serialize");
        write_atomic(&path, self.blobs.tmp(), "signatures", &text)
            .map_err(|source| io_error("write", &path, source))?;
        Ok(())
    }

    fn kept_signatures(&self, digest: &Digest) -> Vec<Signature> {
        let mut text = Vec::new();
        let read = File::open(self.signatures_path(digest))
            .and_then(|file| file.take(KEPT_BYTES_MAX).read_to_end(&mut text));
        match read {
            Ok(_) => serde_json::from_slice(&text).unwrap_or_default(),
            Err(_) => Vec::new(),
        }
    }
}
