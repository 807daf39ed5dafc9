//! [`Release`]: an immutable, content-addressed snapshot of an app's services.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::Digest;
use crate::id::{AppName, ServiceName};
use crate::manifest::Service;

/// The largest release manifest that travels over MQTT and is kept on disk: 16 KiB.
pub const MAX_RELEASE_BYTES: usize = 16 * 1024;

/// What runs on a device for one app. Its identity is the digest of its canonical JSON.
///
/// `Service::image` is `HOST/REPOSITORY@sha256:…`, naming an image index or manifest by digest; the tag
/// that the user wrote is not part of it, so two tags of one image are one release.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Release {
    /// The schema of this document; 1.
    pub schema: u32,
    /// The app it belongs to.
    pub app: AppName,
    /// Its services, images pinned.
    pub services: BTreeMap<ServiceName, Service>,
}

/// Why bytes are not a release.
#[derive(Debug, thiserror::Error)]
pub enum ReleaseError {
    /// Larger than [`MAX_RELEASE_BYTES`].
    #[error("release manifest has {size} bytes; at most {MAX_RELEASE_BYTES} are allowed")]
    TooLarge {
        /// Its size in bytes.
        size: usize,
    },
    /// The bytes do not have the digest they were named by.
    #[error("release manifest has digest {actual}, not {expected}")]
    Mismatch {
        /// The digest that was asked for.
        expected: Digest,
        /// The digest of the bytes.
        actual: Digest,
    },
    /// Not a release of a schema this program knows.
    #[error("failed to decode release manifest")]
    Decode(#[source] serde_json::Error),
    /// A schema from a newer hub.
    #[error("release manifest has schema {0}; this program knows schema 1; update it")]
    Schema(u32),
}

impl Release {
    /// The canonical JSON: keys sorted by code point, no white space, every field present, integers only
    /// (a subset of RFC 8785, which release documents never leave: they hold no floats).
    ///
    /// # Panics
    ///
    /// Never: maps have string keys and the values serialize without failing.
    #[must_use]
    pub fn to_canonical_json(&self) -> Vec<u8> {
        canonical_json(self)
    }

    /// The digest of the canonical JSON: the release's identity.
    #[must_use]
    pub fn digest(&self) -> Digest {
        Digest::of(&self.to_canonical_json())
    }

    /// Reads a release that was named by `expected`, checking size, digest and schema.
    ///
    /// # Errors
    ///
    /// See [`ReleaseError`].
    pub fn from_bytes(bytes: &[u8], expected: &Digest) -> Result<Self, ReleaseError> {
        if bytes.len() > MAX_RELEASE_BYTES {
            return Err(ReleaseError::TooLarge { size: bytes.len() });
        }
        let actual = Digest::of(bytes);
        if actual != *expected {
            return Err(ReleaseError::Mismatch { expected: *expected, actual });
        }
        let release: Self = serde_json::from_slice(bytes).map_err(ReleaseError::Decode)?;
        if release.schema != 1 {
            return Err(ReleaseError::Schema(release.schema));
        }
        Ok(release)
    }
}

/// The digest of one service's canonical JSON. Equal digests mean that a running container of the one
/// is a running container of the other.
#[must_use]
pub fn service_digest(service: &Service) -> Digest {
    Digest::of(&canonical_json(service))
}

/// `serde_json` keeps maps in a `BTreeMap` (the `preserve_order` feature is off), so going through a
/// `Value` sorts the keys of structs too.
fn canonical_json<T: Serialize>(value: &T) -> Vec<u8> {
    let value = serde_json::to_value(value).expect("string keys and plain values always serialize");
    serde_json::to_vec(&value).expect("a JSON value always serializes")
}
