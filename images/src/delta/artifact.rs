//! A delta in a registry: an OCI artifact that refers to the new image (OCI image specification 1.1, "Guidelines for
//! Artifact Usage").
//!
//! Its `subject` is the manifest of the new image, one blob stands for each layer that gains from it, and annotations name
//! the image and the layers that it was made from. A registry lists it among the referrers of the new image.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::Digest;
use crate::manifest::{Descriptor, LAYERS_MAX, OCI_MANIFEST};

/// Type of the artifact.
pub const ARTIFACT_TYPE: &str = "application/vnd.foreshore.delta.v1";
/// Media type of the delta of one layer.
pub const LAYER_TYPE: &str = "application/vnd.foreshore.delta.layer.v1";
/// Annotation of the artifact: the manifest's digest of the image it was made from.
pub const FROM: &str = "vnd.foreshore.delta.from";
/// Annotation of a blob: the diff id of the layer that it makes.
pub const LAYER: &str = "vnd.foreshore.delta.layer";
/// Annotation of a blob: the diff ids of the layers it leans on, separated by commas, in the order it numbers them.
pub const TREES: &str = "vnd.foreshore.delta.trees";
/// What an artifact without a config names (OCI image specification, "Guidance for an Empty Descriptor").
pub const EMPTY_TYPE: &str = "application/vnd.oci.empty.v1+json";
/// Its content.
pub const EMPTY: &[u8] = b"{}";

/// The delta between two images.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Artifact {
    /// The manifest of the image it makes.
    pub subject: Descriptor,
    /// The digest of the manifest of the image it was made from.
    pub from: Digest,
    /// In the order of the new image's layers; those that gain nothing are not among them.
    pub layers: Vec<LayerDelta>,
}

/// The delta of one layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerDelta {
    /// The layer it makes.
    pub diff_id: Digest,
    /// The layers it leans on, in the order it numbers them.
    pub trees: Vec<Digest>,
    /// Digest of the delta.
    pub digest: Digest,
    /// Bytes of the delta.
    pub size: u64,
}

/// Why a document is not a delta.
#[derive(Debug, thiserror::Error)]
pub enum ArtifactError {
    /// Not JSON of the expected shape.
    #[error("it is not JSON of the expected shape")]
    Json(#[source] serde_json::Error),
    /// Another kind of artifact.
    #[error("it is no artifact of the type {ARTIFACT_TYPE}")]
    Type,
    /// An annotation that a delta must have is missing or cannot be right.
    #[error("its annotation {0} is missing or wrong")]
    Annotation(&'static str),
    /// More than any image has.
    #[error("it names more than {LAYERS_MAX} layers")]
    Layers,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Written {
    schema_version: u32,
    #[serde(default)]
    media_type: Option<String>,
    #[serde(default)]
    artifact_type: Option<String>,
    config: Descriptor,
    layers: Vec<Descriptor>,
    subject: Descriptor,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
}

impl Artifact {
    /// Reads the manifest of a delta.
    ///
    /// # Errors
    /// [`ArtifactError`].
    pub fn parse(bytes: &[u8]) -> Result<Self, ArtifactError> {
        let written: Written = serde_json::from_slice(bytes).map_err(ArtifactError::Json)?;
        if written.artifact_type.as_deref() != Some(ARTIFACT_TYPE) {
            return Err(ArtifactError::Type);
        }
        if written.layers.len() > LAYERS_MAX {
            return Err(ArtifactError::Layers);
        }
        let from = digest(&written.annotations, FROM)?;
        let layers = written
            .layers
            .into_iter()
            .filter(|layer| layer.media_type == LAYER_TYPE)
            .map(|layer| {
                let trees = trees(&layer.annotations)?;
                Ok(LayerDelta {
                    diff_id: digest(&layer.annotations, LAYER)?,
                    trees,
                    digest: layer.digest,
                    size: layer.size,
                })
            })
            .collect::<Result<_, ArtifactError>>()?;
        Ok(Self {
            subject: written.subject,
            from,
            layers,
        })
    }

    /// The manifest as it stands in a registry.
    #[must_use]
    pub fn to_json(&self) -> Vec<u8> {
        let layers = self.layers.iter().map(|layer| {
            let trees: Vec<String> = layer.trees.iter().map(ToString::to_string).collect();
            Descriptor {
                media_type: LAYER_TYPE.to_owned(),
                digest: layer.digest,
                size: layer.size,
                platform: None,
                annotations: [
                    (LAYER.to_owned(), layer.diff_id.to_string()),
                    (TREES.to_owned(), trees.join(",")),
                ]
                .into(),
            }
        });
        let written = Written {
            schema_version: 2,
            media_type: Some(OCI_MANIFEST.to_owned()),
            artifact_type: Some(ARTIFACT_TYPE.to_owned()),
            config: Descriptor {
                media_type: EMPTY_TYPE.to_owned(),
                digest: Digest::of(EMPTY),
                size: EMPTY.len() as u64,
                platform: None,
                annotations: BTreeMap::new(),
            },
            layers: layers.collect(),
            subject: self.subject.clone(),
            annotations: [(FROM.to_owned(), self.from.to_string())].into(),
        };
        serde_json::to_vec(&written).expect("strings and numbers can be written")
    }
}

fn digest(
    annotations: &BTreeMap<String, String>,
    name: &'static str,
) -> Result<Digest, ArtifactError> {
    annotations
        .get(name)
        .and_then(|text| text.parse().ok())
        .ok_or(ArtifactError::Annotation(name))
}

fn trees(annotations: &BTreeMap<String, String>) -> Result<Vec<Digest>, ArtifactError> {
    let text = annotations
        .get(TREES)
        .ok_or(ArtifactError::Annotation(TREES))?;
    if text.is_empty() {
        return Ok(Vec::new());
    }
    let trees = text
        .split(',')
        .map(str::parse)
        .collect::<Result<Vec<Digest>, _>>()
        .map_err(|_| ArtifactError::Annotation(TREES))?;
    if trees.len() > LAYERS_MAX {
        return Err(ArtifactError::Layers);
    }
    Ok(trees)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn artifact() -> Artifact {
        Artifact {
            subject: Descriptor {
                media_type: OCI_MANIFEST.to_owned(),
                digest: Digest::of(b"new"),
                size: 3,
                platform: None,
                annotations: BTreeMap::new(),
            },
            from: Digest::of(b"old"),
            layers: vec![LayerDelta {
                diff_id: Digest::of(b"layer"),
                trees: vec![Digest::of(b"one"), Digest::of(b"two")],
                digest: Digest::of(b"delta"),
                size: 5,
            }],
        }
    }

    #[test]
    fn a_manifest_comes_back() {
        let artifact = artifact();
        assert_eq!(Artifact::parse(&artifact.to_json()).unwrap(), artifact);
    }

    #[test]
    fn what_is_no_delta_is_refused() {
        let text = String::from_utf8(artifact().to_json()).unwrap();
        for (from, to) in [
            (ARTIFACT_TYPE, "application/vnd.other"),
            (FROM, "other"),
            (LAYER, "other"),
            (TREES, "other"),
            ("sha256:", "md5:"),
        ] {
            let other = text.replace(&format!("\"{from}"), &format!("\"{to}"));
            assert_ne!(other, text, "{from}");
            assert!(Artifact::parse(other.as_bytes()).is_err(), "{from}");
        }
        let comma = text.replace(
            "\"vnd.foreshore.delta.trees\":\"",
            "\"vnd.foreshore.delta.trees\":\",",
        );
        assert!(Artifact::parse(comma.as_bytes()).is_err());
    }
}
