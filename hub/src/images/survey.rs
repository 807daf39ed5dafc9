//! What an index or manifest in the image directory is made of, and whether all of it is there.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use foreshore_images::blobs::BlobDir;
use foreshore_images::manifest::{
    CONFIG_BYTES_MAX, ConfigDocument, Descriptor, Document, DocumentError, MANIFEST_BYTES_MAX,
    Manifest,
};
use foreshore_images::{Digest, Platform};
use serde::Deserialize;

use crate::store::registry;

/// How deep indexes may nest.
const DEPTH_MAX: usize = 4;

/// The most manifests and indexes that one index may reach.
const DOCUMENTS_MAX: usize = 1000;

/// How much of an index must be there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Demand {
    /// Everything, with the sizes that are declared.
    Whole,
    /// Whatever is there: archives hold one variant and the index of all of them.
    Found,
}

/// What there is.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Survey {
    /// A row for each index and manifest, the one that was asked about first.
    pub manifests: Vec<registry::Manifest>,
    /// Every blob that is there, documents included.
    pub blobs: BTreeSet<Digest>,
    /// Bytes of all blobs together, documents included; each once.
    pub size_bytes: u64,
    /// What its manifests run on.
    pub platforms: Vec<String>,
}

impl Survey {
    /// Writes its rows: from now on its manifests and their blobs are there for their repository.
    ///
    /// # Errors
    ///
    /// When SQLite fails.
    pub fn record(&self, connection: &rusqlite::Connection) -> rusqlite::Result<()> {
        for manifest in &self.manifests {
            registry::put_manifest(connection, manifest)?;
        }
        if let Some(top) = self.manifests.first() {
            for digest in &self.blobs {
                registry::restore(connection, &top.repository, digest)?;
            }
        }
        Ok(())
    }
}

/// Why there is no survey.
#[derive(Debug, thiserror::Error)]
pub enum SurveyError {
    /// Something it names is not there.
    #[error("blob {digest} is not in the hub; push it before what names it")]
    Missing {
        /// Which.
        digest: Digest,
    },
    /// Something it names has another size.
    #[error("blob {digest} has {found} bytes, not {declared} as declared")]
    Size {
        /// Which.
        digest: Digest,
        /// As declared.
        declared: u64,
        /// As it is.
        found: u64,
    },
    /// Not an index or manifest.
    #[error("manifest {digest} cannot be used: {source}")]
    Document {
        /// Which.
        digest: Digest,
        /// Why.
        source: DocumentError,
    },
    /// Its subject, artifact type or annotations are not of the right shape.
    #[error("manifest {digest} cannot be used: {source}")]
    Extras {
        /// Which.
        digest: Digest,
        /// Why.
        source: serde_json::Error,
    },
    /// It nests too deep or names too much.
    #[error(
        "index {digest} nests deeper than {DEPTH_MAX} or reaches more than {DOCUMENTS_MAX} manifests"
    )]
    TooDeep {
        /// Which.
        digest: Digest,
    },
    /// The disk failed.
    #[error("failed to read blob {digest}")]
    Io {
        /// Which.
        digest: Digest,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Surveys `bytes`, an index or manifest that would be in `repository` and stay until `keep_until_ms`. Reads
/// documents and configs, so it blocks.
///
/// # Errors
///
/// See [`SurveyError`].
pub fn survey(
    blobs: &BlobDir,
    repository: &str,
    bytes: &[u8],
    media_type: Option<&str>,
    keep_until_ms: u64,
    demand: Demand,
) -> Result<Survey, SurveyError> {
    let mut walk = Walk {
        blobs,
        repository,
        keep_until_ms,
        demand,
        sizes: BTreeMap::new(),
        seen: BTreeSet::new(),
        survey: Survey::default(),
    };
    walk.document(bytes, media_type, None, DEPTH_MAX)?;
    let Walk {
        sizes, mut survey, ..
    } = walk;
    survey.size_bytes = sizes.values().sum();
    survey.blobs = sizes.into_keys().collect();
    Ok(survey)
}

/// What matters to a registry and not to a device.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Extras {
    #[serde(default)]
    subject: Option<Descriptor>,
    #[serde(default)]
    artifact_type: Option<String>,
    #[serde(default)]
    annotations: Option<BTreeMap<String, String>>,
}

struct Walk<'a> {
    blobs: &'a BlobDir,
    repository: &'a str,
    keep_until_ms: u64,
    demand: Demand,
    sizes: BTreeMap<Digest, u64>,
    seen: BTreeSet<Digest>,
    survey: Survey,
}

impl Walk<'_> {
    fn document(
        &mut self,
        bytes: &[u8],
        media_type: Option<&str>,
        platform: Option<&Platform>,
        depth: usize,
    ) -> Result<(), SurveyError> {
        let digest = Digest::of(bytes);
        if !self.seen.insert(digest) {
            return Ok(());
        }
        if depth == 0 || self.seen.len() > DOCUMENTS_MAX {
            return Err(SurveyError::TooDeep { digest });
        }
        let document = Document::parse(bytes, media_type)
            .map_err(|source| SurveyError::Document { digest, source })?;
        let extras: Extras = serde_json::from_slice(bytes)
            .map_err(|source| SurveyError::Extras { digest, source })?;
        let config_type = match &document {
            Document::Manifest(manifest) => Some(manifest.config.media_type.clone()),
            Document::Index(_) => None,
        };
        self.sizes.insert(digest, bytes.len() as u64);
        self.survey.manifests.push(registry::Manifest {
            repository: self.repository.to_owned(),
            digest,
            media_type: document.media_type().to_owned(),
            size_bytes: bytes.len() as u64,
            subject: extras.subject.map(|subject| subject.digest),
            artifact_type: extras
                .artifact_type
                .filter(|kind| !kind.is_empty())
                .or(config_type),
            annotations: extras.annotations.unwrap_or_default(),
            keep_until_ms: self.keep_until_ms,
        });
        match &document {
            Document::Manifest(manifest) => self.manifest(manifest, platform),
            Document::Index(index) => {
                for child in &index.manifests {
                    self.child(child, depth - 1)?;
                }
                Ok(())
            }
        }
    }

    fn child(&mut self, child: &Descriptor, depth: usize) -> Result<(), SurveyError> {
        if !self.blob(child)? || !child.is_document() {
            return Ok(());
        }
        let digest = child.digest;
        let bytes = self
            .blobs
            .read(&digest, MANIFEST_BYTES_MAX)
            .map_err(|source| SurveyError::Io { digest, source })?
            .ok_or(SurveyError::Missing { digest })?;
        self.document(
            &bytes,
            Some(&child.media_type),
            child.platform.as_ref(),
            depth,
        )
    }

    fn manifest(
        &mut self,
        manifest: &Manifest,
        platform: Option<&Platform>,
    ) -> Result<(), SurveyError> {
        for blob in manifest.layers.iter().chain([&manifest.config]) {
            self.blob(blob)?;
        }
        // Artifacts and attestations run on nothing.
        let said = platform.cloned().or_else(|| {
            let bytes = self.blobs.read(&manifest.config.digest, CONFIG_BYTES_MAX);
            let config = ConfigDocument::parse(&bytes.ok()??, manifest.layers.len()).ok()?;
            config.platform()
        });
        let runs = said.filter(|said| said.os != "unknown" && said.architecture != "unknown");
        if let Some(text) = runs.map(|platform| platform.to_string())
            && !self.survey.platforms.contains(&text)
        {
            self.survey.platforms.push(text);
        }
        Ok(())
    }

    /// Whether a blob is there. An error when it must be and is not, or is another.
    fn blob(&mut self, blob: &Descriptor) -> Result<bool, SurveyError> {
        let digest = blob.digest;
        match self.blobs.size(&digest) {
            Some(found) if found == blob.size => {
                self.sizes.insert(digest, found);
                Ok(true)
            }
            _ if self.demand == Demand::Found => Ok(false),
            None => Err(SurveyError::Missing { digest }),
            Some(found) => Err(SurveyError::Size {
                digest,
                declared: blob.size,
                found,
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    struct Place {
        _dir: tempfile::TempDir,
        blobs: BlobDir,
    }

    fn place() -> Place {
        let dir = tempfile::tempdir().unwrap();
        let blobs = BlobDir::open(dir.path()).unwrap();
        Place { _dir: dir, blobs }
    }

    impl Place {
        fn put(&self, kind: &str, content: &[u8]) -> Value {
            let digest = self.blobs.put(content).unwrap();
            json!({"mediaType": format!("application/vnd.oci.image.{kind}"), "digest": digest, "size": content.len()})
        }

        fn image(&self, architecture: &str) -> Vec<u8> {
            let config =
                json!({"os": "linux", "architecture": architecture, "rootfs": {"diff_ids": []}});
            let config = self.put("config.v1+json", config.to_string().as_bytes());
            json!({"schemaVersion": 2, "config": config, "layers": []})
                .to_string()
                .into_bytes()
        }

        fn survey(&self, bytes: &[u8], demand: Demand) -> Result<Survey, SurveyError> {
            survey(&self.blobs, "demo", bytes, None, 0, demand)
        }
    }

    #[test]
    fn an_index_is_whole_or_what_lacks_is_named() {
        let place = place();
        let here = place.image("arm64");
        let here = place.put("manifest.v1+json", &here);
        let lacks = Digest::of(b"elsewhere");
        let away = json!({"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": lacks, "size": 9});
        let index = json!({"schemaVersion": 2, "manifests": [here, away]}).to_string();
        let found = place.survey(index.as_bytes(), Demand::Found).unwrap();
        assert_eq!(found.platforms, ["linux/arm64"]);
        assert_eq!(found.manifests.len(), 2);
        match place.survey(index.as_bytes(), Demand::Whole) {
            Err(SurveyError::Missing { digest }) => assert_eq!(digest, lacks),
            other => panic!("{other:?}"),
        }
        let mut wrong = here.clone();
        wrong["size"] = json!(1);
        let index = json!({"schemaVersion": 2, "manifests": [wrong]}).to_string();
        let refused = place.survey(index.as_bytes(), Demand::Whole).unwrap_err();
        assert!(
            matches!(refused, SurveyError::Size { declared: 1, .. }),
            "{refused}"
        );
    }

    #[test]
    fn nesting_is_bounded_and_an_artifact_says_what_it_is() {
        let place = place();
        let mut bytes = place.image("amd64");
        for depth in 0..6 {
            let kind = if depth == 0 {
                "manifest.v1+json"
            } else {
                "index.v1+json"
            };
            let child = place.put(kind, &bytes);
            bytes = json!({"schemaVersion": 2, "manifests": [child]})
                .to_string()
                .into_bytes();
        }
        let refused = place.survey(&bytes, Demand::Whole).unwrap_err();
        assert!(matches!(refused, SurveyError::TooDeep { .. }), "{refused}");

        let empty = place.put("empty", b"{}");
        let subject = place.put("manifest.v1+json", b"need not be there");
        let mut signature = json!({
            "schemaVersion": 2, "config": empty, "layers": [empty], "subject": subject,
            "annotations": {"k": "v"},
        });
        let found = place
            .survey(signature.to_string().as_bytes(), Demand::Whole)
            .unwrap();
        let row = &found.manifests[0];
        assert_eq!(
            row.artifact_type.as_deref(),
            Some("application/vnd.oci.image.empty")
        );
        assert_eq!(
            (row.subject, &*row.annotations["k"]),
            (Some(Digest::of(b"need not be there")), "v")
        );
        assert!(found.platforms.is_empty());
        signature["artifactType"] = json!("application/x-signature");
        let found = place
            .survey(signature.to_string().as_bytes(), Demand::Whole)
            .unwrap();
        assert_eq!(
            found.manifests[0].artifact_type.as_deref(),
            Some("application/x-signature")
        );
        signature["subject"] = json!({"digest": "no"});
        let refused = place
            .survey(signature.to_string().as_bytes(), Demand::Whole)
            .unwrap_err();
        assert!(matches!(refused, SurveyError::Extras { .. }), "{refused}");
    }
}
