//! [`Release`]: an immutable, content-addressed snapshot of an app's services.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::Digest;
use crate::id::{AppName, SecretName, ServiceName};
use crate::manifest::{App, Service, Violation, check, pull_secret};

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
    /// Secrets with which its images are pulled: the first that has a login for a registry counts. Another list is another
    /// release, in which no service differs.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub image_pull_secrets: Vec<SecretName>,
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
    /// A value that no manifest could have: the hub that made this release is broken or hostile.
    #[error("release manifest cannot be run")]
    Meaning(#[source] Violation),
}

/// What every release is, whatever its schema.
#[derive(Deserialize)]
struct Envelope {
    schema: u32,
}

impl Release {
    /// The release of `app`, with each service's image replaced by the one in `pinned`
    /// (`HOST/REPOSITORY@sha256:…`), and with `$${` in commands and environment turned into `${`.
    ///
    /// # Errors
    ///
    /// [`ReleaseError::Meaning`] when an image is missing in `pinned` or not pinned by digest there, or when
    /// `app` did not come out of [`crate::manifest::parse`] and breaks a rule; [`ReleaseError::TooLarge`].
    pub fn from_app(
        app: &App,
        pinned: &BTreeMap<ServiceName, String>,
    ) -> Result<Self, ReleaseError> {
        let mut services = app.spec.resolved();
        for (name, service) in &mut services {
            if let Some(image) = pinned.get(name) {
                service.image.clone_from(image);
            }
            unescape(service);
        }
        let release = Self {
            schema: 1,
            app: app.metadata.name.clone(),
            services,
            image_pull_secrets: app.spec.image_pull_secrets.clone(),
        };
        release.check()?;
        let size = release.to_canonical_json().len();
        if size > MAX_RELEASE_BYTES {
            return Err(ReleaseError::TooLarge { size });
        }
        Ok(release)
    }

    /// Whether a device can rely on it: every rule that a manifest's services follow, and images pinned.
    ///
    /// # Errors
    ///
    /// [`ReleaseError::Schema`] or [`ReleaseError::Meaning`].
    pub fn check(&self) -> Result<(), ReleaseError> {
        if self.schema != 1 {
            return Err(ReleaseError::Schema(self.schema));
        }
        check::services("services", self.services.len()).map_err(ReleaseError::Meaning)?;
        for (name, service) in &self.services {
            let path = format!("services.{name}");
            check::service(&path, service).map_err(ReleaseError::Meaning)?;
            if let Some(mount) = service.configs.iter().find(|mount| mount.content.is_none()) {
                return Err(ReleaseError::Meaning(Violation {
                    path: format!("{path}.configs"),
                    message: format!("config {} has no content", mount.source),
                }));
            }
            if check::pinned(&service.image).is_none() {
                return Err(ReleaseError::Meaning(Violation {
                    path: format!("{path}.image"),
                    message: format!("{:?} is not pinned by digest", service.image),
                }));
            }
        }
        pull_secret::check("image_pull_secrets", &self.image_pull_secrets)
            .map_err(ReleaseError::Meaning)?;
        check::dependencies("services", &self.services).map_err(ReleaseError::Meaning)
    }

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

    /// Reads a release that was named by `expected`, checking size, digest, schema and every rule that a device
    /// relies on ([`Release::check`]).
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
            return Err(ReleaseError::Mismatch {
                expected: *expected,
                actual,
            });
        }
        // The schema first: a newer one may have keys that this program does not know.
        let Envelope { schema } = serde_json::from_slice(bytes).map_err(ReleaseError::Decode)?;
        if schema != 1 {
            return Err(ReleaseError::Schema(schema));
        }
        let release: Self = serde_json::from_slice(bytes).map_err(ReleaseError::Decode)?;
        release.check()?;
        Ok(release)
    }
}

/// The digest of one service's canonical JSON. Equal digests mean that a running container of the one
/// is a running container of the other.
#[must_use]
pub fn service_digest(service: &Service) -> Digest {
    Digest::of(&canonical_json(service))
}

/// Sorts the keys of maps and structs itself: `serde_json::Value` keeps the order of insertion when any
/// program of the build switches on `serde_json`'s `preserve_order`.
fn canonical_json<T: Serialize>(value: &T) -> Vec<u8> {
    let value = serde_json::to_value(value).expect("string keys and plain values always serialize");
    let mut out = Vec::new();
    write_sorted(&value, &mut out);
    out
}

fn write_sorted(value: &Value, out: &mut Vec<u8>) {
    match value {
        Value::Object(map) => {
            let sorted: BTreeMap<&str, &Value> = map
                .iter()
                .map(|(key, value)| (key.as_str(), value))
                .collect();
            out.push(b'{');
            for (index, (key, value)) in sorted.into_iter().enumerate() {
                if index > 0 {
                    out.push(b',');
                }
                write_scalar(key, out);
                out.push(b':');
                write_sorted(value, out);
            }
            out.push(b'}');
        }
        Value::Array(items) => {
            out.push(b'[');
            for (index, item) in items.iter().enumerate() {
                if index > 0 {
                    out.push(b',');
                }
                write_sorted(item, out);
            }
            out.push(b']');
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {
            write_scalar(value, out)
        }
    }
}

fn write_scalar<T: Serialize + ?Sized>(value: &T, out: &mut Vec<u8>) {
    serde_json::to_writer(out, value).expect("a scalar serializes into a growing buffer");
}

/// `$${` in a manifest stands for `${`; what stands in a release is what the process sees.
fn unescape(service: &mut Service) {
    let lists = [&mut service.entrypoint, &mut service.command]
        .into_iter()
        .flatten();
    let probes = &mut service.probes;
    let exec = [
        &mut probes.startup,
        &mut probes.readiness,
        &mut probes.liveness,
    ]
    .into_iter()
    .flatten()
    .flat_map(|probe| probe.exec.iter_mut());
    let texts = lists
        .chain(exec.map(|exec| &mut exec.command))
        .chain(service.pre_stop.iter_mut().map(|hook| &mut hook.command))
        .flatten()
        .chain(service.environment.values_mut())
        .chain(
            service
                .configs
                .iter_mut()
                .filter_map(|mount| mount.content.as_mut()),
        );
    for text in texts {
        if text.contains("$${") {
            *text = text.replace("$${", "${");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest;

    const PIN: &str = "@sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    fn app(service: &str) -> App {
        let text = format!(
            "apiVersion: foreshore/v1\nkind: App\nmetadata: {{name: a}}\nspec: {{services: {{web: {{{service}}}}}}}\n"
        );
        manifest::parse(text.as_bytes()).unwrap()
    }

    fn pinned() -> BTreeMap<ServiceName, String> {
        [("web".parse().unwrap(), format!("hub.internal/web{PIN}"))].into()
    }

    fn read(text: &str) -> Result<Release, ReleaseError> {
        Release::from_bytes(text.as_bytes(), &Digest::of(text.as_bytes()))
    }

    #[test]
    fn a_release_reads_back_and_is_named_by_its_bytes() {
        let release = Release::from_app(&app("image: web:1"), &pinned()).unwrap();
        let bytes = release.to_canonical_json();
        assert_eq!(
            Release::from_bytes(&bytes, &release.digest()).unwrap(),
            release
        );
        let other = Digest::of(b"other");
        assert!(matches!(
            Release::from_bytes(&bytes, &other),
            Err(ReleaseError::Mismatch { .. })
        ));
    }

    #[test]
    fn escaped_substitutions_become_what_the_process_sees() {
        let text = "image: a, command: [\"$${A} $B $$\"], environment: {K: \"$$${X}\"}, \
                    probes: {readiness: {exec: {command: [\"$${C}\"]}}}";
        let release = Release::from_app(&app(text), &pinned()).unwrap();
        let service = &release.services["web"];
        assert_eq!(
            service.command.as_deref(),
            Some(&["${A} $B $$".to_owned()][..])
        );
        assert_eq!(service.environment["K"], "$${X}");
        let probe = service.probes.readiness.as_ref().unwrap();
        assert_eq!(probe.exec.as_ref().unwrap().command, ["${C}"]);
    }

    #[test]
    fn images_must_be_pinned() {
        let error = Release::from_app(&app("image: web:1"), &BTreeMap::new()).unwrap_err();
        let ReleaseError::Meaning(violation) = error else {
            panic!("{error}")
        };
        assert_eq!(
            violation.to_string(),
            "services.web.image: \"web:1\" is not pinned by digest"
        );
    }

    #[test]
    fn what_no_manifest_could_say_is_refused_from_a_hub_too() {
        let release = Release::from_app(&app("image: web:1"), &pinned()).unwrap();
        let text = String::from_utf8(release.to_canonical_json()).unwrap();
        for (from, to) in [
            (PIN, ":1"),
            ("\"volumes\":[]", "\"volumes\":[\"/:/proc/self\"]"),
            ("\"tmpfs\":[]", "\"tmpfs\":[\"/../x\"]"),
            ("\"mem_limit\":\"128m\"", "\"mem_limit\":\"0\""),
            ("\"command\":null", "\"command\":[]"),
            ("\"pids_limit\":256", "\"pids_limit\":0"),
            ("\"user\":null", "\"user\":\"0:0:0\""),
            ("\"environment\":{}", "\"environment\":{\"A\\u0000\":\"\"}"),
        ] {
            let changed = text.replace(from, to);
            assert_ne!(changed, text, "{from}");
            assert!(
                matches!(read(&changed), Err(ReleaseError::Meaning(_))),
                "{to}"
            );
        }
        assert!(matches!(
            read(&text.replace("\"web\":{", "\"WEB\":{")),
            Err(ReleaseError::Decode(_))
        ));
        let empty = "{\"schema\":1,\"app\":\"a\",\"services\":{}}";
        assert!(matches!(read(empty), Err(ReleaseError::Meaning(_))));
    }

    #[test]
    fn a_newer_schema_is_named_whatever_else_it_holds() {
        let error = read("{\"schema\":2,\"app\":\"a\",\"parts\":[]}").unwrap_err();
        assert!(matches!(error, ReleaseError::Schema(2)), "{error}");
        assert!(matches!(
            read("{\"schema\":1,\"app\":\"a\",\"parts\":[]}"),
            Err(ReleaseError::Decode(_))
        ));
        assert!(matches!(
            read(&" ".repeat(MAX_RELEASE_BYTES + 1)),
            Err(ReleaseError::TooLarge { .. })
        ));
    }

    #[test]
    fn keys_are_sorted_whatever_order_they_come_in() {
        let value =
            serde_json::json!({"b": [{"z": 1, "a": null}], "a\n": "x\"", "B": true, "a": {}});
        let mut out = Vec::new();
        write_sorted(&value, &mut out);
        let text = String::from_utf8(out).unwrap();
        assert_eq!(
            text,
            "{\"B\":true,\"a\":{},\"a\\n\":\"x\\\"\",\"b\":[{\"a\":null,\"z\":1}]}"
        );
    }
}
