//! The JSON of image indexes, manifests and configs, in OCI and Docker spelling.
//!
//! Only what Foreshore acts on is read; unknown fields are ignored, as the OCI image specification asks
//! ("Considerations, Extensibility").

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::de::{IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use crate::{Digest, Platform};

/// The largest index or manifest that is read, in bytes (distribution specification, "Pushing Manifests":
/// registries should take at least 4 MiB).
pub const MANIFEST_BYTES_MAX: u64 = 4 << 20;
/// The largest image config that is read, in bytes.
pub const CONFIG_BYTES_MAX: u64 = 4 << 20;
/// The most layers an image may have: overlayfs takes that many lower directories with short paths, and
/// Docker has the same limit.
pub const LAYERS_MAX: usize = 127;

/// Media type of an OCI index.
pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// Media type of an OCI manifest.
pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// Media type of an OCI image config.
pub const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
/// Media type of a gzip-compressed OCI layer.
pub const OCI_LAYER_GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
/// Media type of a Docker manifest list.
pub const DOCKER_INDEX: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
/// Media type of a Docker manifest, schema 2.
pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";

/// What a registry is asked for when a manifest or index is fetched.
pub(crate) const ACCEPT: &str = "application/vnd.oci.image.index.v1+json, \
    application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, \
    application/vnd.docker.distribution.manifest.v2+json";

/// A named blob: OCI image specification, "Descriptor".
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// What the blob is.
    pub media_type: String,
    /// Its SHA-256.
    pub digest: Digest,
    /// Its size in bytes.
    pub size: u64,
    /// For an entry of an index: what it runs on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<Platform>,
    /// Free-form; `org.opencontainers.image.ref.name` names an image of a layout.
    #[serde(
        default,
        deserialize_with = "null_is_default",
        skip_serializing_if = "BTreeMap::is_empty"
    )]
    pub annotations: BTreeMap<String, String>,
}

/// An image index or Docker manifest list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Index {
    /// Always 2.
    pub schema_version: u32,
    /// Its own media type; may be absent in OCI documents.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub media_type: Option<String>,
    /// Its entries.
    pub manifests: Vec<Descriptor>,
}

/// An image manifest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    /// Always 2.
    pub schema_version: u32,
    /// Its own media type; may be absent in OCI documents.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub media_type: Option<String>,
    /// The image config.
    pub config: Descriptor,
    /// The layers, lowest first.
    pub layers: Vec<Descriptor>,
}

/// What an index or manifest turned out to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Document {
    /// A list of variants.
    Index(Index),
    /// One image.
    Manifest(Manifest),
}

/// Why bytes are not an index, manifest or config that can be used.
#[derive(Debug, thiserror::Error)]
pub enum DocumentError {
    /// Not JSON of the expected shape.
    #[error("it is not JSON of the expected shape")]
    Json(#[source] serde_json::Error),
    /// Old Docker schema 1, or something from the future.
    #[error(
        "its schemaVersion is {0}, only 2 is supported; rebuild or re-push the image with a current tool"
    )]
    SchemaVersion(u32),
    /// The media type is none of the four this crate reads.
    #[error("its media type is \"{0}\", which is neither an OCI nor a Docker (schema 2) image")]
    MediaType(String),
    /// It says one media type inside and another outside, or is both an index and a manifest.
    #[error(
        "it is ambiguous: both an index and a manifest, or declared as one and written as the other"
    )]
    Ambiguous,
    /// More layers than overlayfs mounts.
    #[error("it has {0} layers, at most {LAYERS_MAX} are supported; squash the image")]
    Layers(usize),
    /// The config does not list one diff id for each layer.
    #[error("its config lists {diff_ids} diff ids for {layers} layers")]
    DiffIds {
        /// How many the config lists.
        diff_ids: usize,
        /// How many layers the manifest lists.
        layers: usize,
    },
}

/// The part of the image config that a container starts from.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct ImageConfig {
    /// The program and its first arguments. Empty when not set.
    #[serde(deserialize_with = "null_is_default")]
    pub entrypoint: Vec<String>,
    /// Arguments after the entrypoint, or the whole command when there is none.
    #[serde(deserialize_with = "null_is_default")]
    pub cmd: Vec<String>,
    /// `KEY=value`.
    #[serde(deserialize_with = "null_is_default")]
    pub env: Vec<String>,
    /// `user`, `uid`, `user:group`, `uid:gid` or empty (root).
    #[serde(deserialize_with = "null_is_default")]
    pub user: String,
    /// Absolute, or empty (`/`).
    #[serde(deserialize_with = "null_is_default")]
    pub working_dir: String,
    /// For example `SIGQUIT` or `3`; `None` is SIGTERM.
    #[serde(deserialize_with = "null_is_default")]
    pub stop_signal: Option<String>,
    /// `80/tcp` and the like.
    #[serde(deserialize_with = "keys")]
    pub exposed_ports: Vec<String>,
    /// Directories that want a volume.
    #[serde(deserialize_with = "keys")]
    pub volumes: Vec<String>,
    /// Free-form.
    #[serde(deserialize_with = "null_is_default")]
    pub labels: BTreeMap<String, String>,
}

/// The image config as a whole: OCI image specification, "Image Configuration".
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigDocument {
    /// What it was built for. Empty when not set.
    #[serde(default, deserialize_with = "null_is_default")]
    pub os: String,
    /// What it was built for. Empty when not set.
    #[serde(default, deserialize_with = "null_is_default")]
    pub architecture: String,
    /// What it was built for. Empty when not set.
    #[serde(default, deserialize_with = "null_is_default")]
    pub variant: String,
    /// How to start it.
    #[serde(default, deserialize_with = "null_is_default")]
    pub config: ImageConfig,
    /// The uncompressed layers.
    pub rootfs: RootFs,
}

/// The digests of an image's uncompressed layers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RootFs {
    /// One for each layer, lowest first.
    #[serde(default, deserialize_with = "null_is_default")]
    pub diff_ids: Vec<Digest>,
}

impl Document {
    /// Reads an index or manifest. `media_type` is what the descriptor or the HTTP header said, if either did.
    ///
    /// # Errors
    /// A [`DocumentError`] for anything that is not exactly one of the two; see there.
    pub fn parse(bytes: &[u8], media_type: Option<&str>) -> Result<Self, DocumentError> {
        /// Enough of either to tell them apart.
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Probe {
            #[serde(default)]
            schema_version: Option<u32>,
            #[serde(default)]
            media_type: Option<String>,
            #[serde(default)]
            manifests: Option<IgnoredAny>,
            #[serde(default)]
            config: Option<IgnoredAny>,
            #[serde(default)]
            layers: Option<IgnoredAny>,
        }
        let probe: Probe = serde_json::from_slice(bytes).map_err(DocumentError::Json)?;
        if probe.schema_version.is_some_and(|version| version != 2) {
            return Err(DocumentError::SchemaVersion(
                probe.schema_version.unwrap_or_default(),
            ));
        }
        let looks_like_index = probe.manifests.is_some();
        // CVE-2021-41190: a document that is both could be read differently by different programs.
        if looks_like_index && (probe.config.is_some() || probe.layers.is_some()) {
            return Err(DocumentError::Ambiguous);
        }
        for said in [probe.media_type.as_deref(), media_type]
            .into_iter()
            .flatten()
        {
            let said_index = match said {
                OCI_INDEX | DOCKER_INDEX => true,
                OCI_MANIFEST | DOCKER_MANIFEST => false,
                other => return Err(DocumentError::MediaType(other.chars().take(128).collect())),
            };
            if said_index != looks_like_index {
                return Err(DocumentError::Ambiguous);
            }
        }
        if looks_like_index {
            return serde_json::from_slice(bytes)
                .map(Self::Index)
                .map_err(DocumentError::Json);
        }
        let manifest: Manifest = serde_json::from_slice(bytes).map_err(DocumentError::Json)?;
        if manifest.layers.len() > LAYERS_MAX {
            return Err(DocumentError::Layers(manifest.layers.len()));
        }
        Ok(Self::Manifest(manifest))
    }
}

impl Document {
    /// The media type that it says, or that goes with its shape.
    #[must_use]
    pub fn media_type(&self) -> &str {
        match self {
            Self::Index(index) => index.media_type.as_deref().unwrap_or(OCI_INDEX),
            Self::Manifest(manifest) => manifest.media_type.as_deref().unwrap_or(OCI_MANIFEST),
        }
    }
}

impl ConfigDocument {
    /// Reads the config of an image that has `layers` layers.
    ///
    /// # Errors
    /// [`DocumentError::Json`], or [`DocumentError::DiffIds`] when layers and diff ids do not pair up.
    pub fn parse(bytes: &[u8], layers: usize) -> Result<Self, DocumentError> {
        let document: Self = serde_json::from_slice(bytes).map_err(DocumentError::Json)?;
        let diff_ids = document.rootfs.diff_ids.len();
        if diff_ids == layers {
            Ok(document)
        } else {
            Err(DocumentError::DiffIds { diff_ids, layers })
        }
    }

    /// What the image was built for, if it says so.
    #[must_use]
    pub fn platform(&self) -> Option<Platform> {
        let said = !self.os.is_empty() && !self.architecture.is_empty();
        said.then(|| Platform {
            os: self.os.clone(),
            architecture: self.architecture.clone(),
            variant: self.variant.clone(),
        })
    }
}

impl Descriptor {
    /// Whether the blob is an index or a manifest rather than a config or a layer.
    #[must_use]
    pub fn is_document(&self) -> bool {
        matches!(
            self.media_type.as_str(),
            OCI_INDEX | OCI_MANIFEST | DOCKER_INDEX | DOCKER_MANIFEST
        )
    }

    /// Whether the blob is an index.
    #[must_use]
    pub fn is_index(&self) -> bool {
        matches!(self.media_type.as_str(), OCI_INDEX | DOCKER_INDEX)
    }
}

/// Go writes `null` where it means "empty".
fn null_is_default<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(
    deserializer: D,
) -> Result<T, D::Error> {
    Option::<T>::deserialize(deserializer).map(Option::unwrap_or_default)
}

/// A Go set: a map whose values say nothing. A list of the keys is read, too.
fn keys<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    /// Serde's untagged enums would keep whatever comes in memory first, at some twenty times its length.
    struct Set;

    impl<'de> Visitor<'de> for Set {
        type Value = Vec<String>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a map, a list of strings or null")
        }

        fn visit_unit<E>(self) -> Result<Self::Value, E> {
            Ok(Vec::new())
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut keys = BTreeSet::new();
            while let Some((key, IgnoredAny)) = map.next_entry()? {
                keys.insert(key);
            }
            Ok(keys.into_iter().collect())
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
            let mut keys = Vec::new();
            while let Some(key) = seq.next_element()? {
                keys.push(key);
            }
            Ok(keys)
        }
    }

    deserializer.deserialize_any(Set)
}
