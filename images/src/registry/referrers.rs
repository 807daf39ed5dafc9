//! What refers to a manifest (OCI distribution specification, "Listing Referrers").

use std::collections::BTreeMap;

use serde::Deserialize;

use super::{Client, FetchError, RawManifest};
use crate::manifest::{OCI_INDEX, OCI_MANIFEST};
use crate::{Digest, Reference};

/// The most referrers of one kind that are looked at.
const REFERRERS_MAX: usize = 64;

/// A manifest that refers to another.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Referrer {
    media_type: String,
    /// Of the manifest.
    pub digest: Digest,
    #[serde(default)]
    artifact_type: Option<String>,
    /// Free-form; some registries leave them out.
    #[serde(default)]
    pub annotations: Option<BTreeMap<String, String>>,
}

#[derive(Deserialize)]
struct Index {
    manifests: Vec<Referrer>,
}

impl Client {
    /// The manifests of the kind `artifact_type` that refer to `subject` in the repository of `reference`, at most 64. The
    /// first of mirrors and registry that knows any decides; a registry without the referrers API is asked for the tag that stands in
    /// for it. Asks once: nothing depends on it.
    ///
    /// # Errors
    /// [`FetchError`] when nobody answers, or not with an index.
    pub fn referrers(
        &self,
        reference: &Reference,
        subject: &Digest,
        artifact_type: &str,
    ) -> Result<Vec<Referrer>, FetchError> {
        let what = format!("referrers of {}@{subject}", reference.repository());
        let found = self.ask_any(reference, |endpoint| {
            let ask = self.ask(endpoint, reference, &what, 0);
            let api = format!("referrers/{subject}?artifactType={artifact_type}");
            let tag = format!("manifests/sha256-{}", subject.hex());
            let response = match self.get(&ask, endpoint, &api, OCI_INDEX, 0) {
                Err(error) if has_no_api(&error) => self.get(&ask, endpoint, &tag, OCI_INDEX, 0),
                other => other,
            };
            let bytes = self.read_document(&ask, response?)?;
            let index: Index = serde_json::from_slice(&bytes)
                .map_err(|source| ask.document(crate::manifest::DocumentError::Json(source)))?;
            // Registries need not filter.
            let is_one = |referrer: &Referrer| {
                let kind = referrer.artifact_type.as_deref();
                referrer.media_type == OCI_MANIFEST && kind.is_none_or(|kind| kind == artifact_type)
            };
            let found = index.manifests.into_iter().filter(is_one);
            let found: Vec<Referrer> = found.take(REFERRERS_MAX).collect();
            if found.is_empty() {
                // As when there is no such list, so that the next is asked.
                return Err(ask.not_found());
            }
            Ok(found)
        });
        match found.map_err(super::source::Refused::into_error) {
            Err(FetchError::NotFound { .. }) => Ok(Vec::new()),
            found => found,
        }
    }

    /// A manifest by its digest, asked for once.
    pub(crate) fn manifest_once(&self, reference: &Reference) -> Result<RawManifest, FetchError> {
        self.ask_any(reference, |endpoint| self.manifest_at(endpoint, reference))
            .map_err(super::source::Refused::into_error)
    }
}

/// Registries answer 404 to what they do not know, some 400 or 405.
fn has_no_api(error: &FetchError) -> bool {
    match error {
        FetchError::NotFound { .. } => true,
        FetchError::Status { status, .. } => (400..500).contains(status) && *status != 429,
        _ => false,
    }
}
