//! From bytes to a checked [`App`]: size and depth first, then shape, then meaning.

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;
use std::str::FromStr;

use serde::Deserialize;
use serde::de::{self, Deserializer, MapAccess, SeqAccess, Visitor};

use super::check::{self, Violation};
use super::config::{self, ConfigMount};
use super::explain::syntax;
use super::pull_secret;
use super::secret::{self, SecretMount};
use super::{
    Amount, App, Condition, Dependencies, Dependency, DisruptionBudget, Tmpfs, VolumeMount,
    VolumeSource,
};
use crate::id::{ConfigName, SecretName, ServiceName};
use crate::quantity::Bytes;

/// The largest manifest that is looked at: 256 KiB.
pub const MAX_MANIFEST_BYTES: usize = 256 * 1024;

/// The deepest nesting that is looked at. A real manifest needs 9.
pub const MAX_DEPTH: usize = 32;

/// Why a manifest was refused. Messages name the place and the way out.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// Larger than [`MAX_MANIFEST_BYTES`].
    #[error("manifest has {size} bytes; at most {MAX_MANIFEST_BYTES} are read")]
    TooLarge {
        /// Its size in bytes.
        size: usize,
    },
    /// Not UTF-8.
    #[error("manifest is not UTF-8 (first bad byte at offset {offset})")]
    Encoding {
        /// Where the first bad byte is.
        offset: usize,
    },
    /// Broken YAML or JSON, an unknown or duplicate key, a wrong type or a value out of range.
    #[error("line {line}, column {column}: {message}")]
    Syntax {
        /// From 1.
        line: u64,
        /// From 1.
        column: u64,
        /// What is wrong.
        message: String,
    },
    /// Well-formed, but it cannot mean anything.
    #[error("{path}: {message}")]
    Meaning {
        /// Where, for example `spec.rollout.waves[1]`.
        path: String,
        /// What is wrong, and what would be right.
        message: String,
    },
}

impl From<Violation> for ManifestError {
    fn from(Violation { path, message }: Violation) -> Self {
        Self::Meaning { path, message }
    }
}

/// Why one string of a manifest was refused; wrapped into [`ManifestError::Syntax`] with its place.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FieldError {
    /// Not a restart policy.
    #[error(
        "{0:?} is not a restart policy; use always, unless-stopped, on-failure, on-failure:N or \"no\""
    )]
    Restart(String),
    /// Not a tmpfs.
    #[error("{0:?} is not a tmpfs; write /path or /path:size=16m")]
    Tmpfs(String),
    /// Not a volume.
    #[error(
        "{0:?} is not a volume; write name:/path or /host/path:/path, with :ro at the end for read-only"
    )]
    Volume(String),
    /// Not a device.
    #[error(
        "{0:?} is not a device; write /dev/NODE, /dev/NODE:/dev/NAME or /dev/NODE:/dev/NAME:rw"
    )]
    Device(String),
    /// Not a disk.
    #[error(
        "{0:?} is not a disk; write a device such as /dev/mmcblk0, or state for the disk with the agent's images and volumes"
    )]
    Disk(String),
    /// Not a file mode.
    #[error("{0:?} is not a file mode; write an octal number of at most 0777, for example 0440")]
    Mode(String),
    /// Not a user or group number.
    #[error("{0:?} is not a user or group number; write one from 0 to 65535")]
    Owner(String),
    /// Not a URL that is asked.
    #[error(
        "{0:?} is not a URL; write http://HOST:PORT/PATH or https://…, without login, query and fragment"
    )]
    Url(String),
    /// Not a condition.
    #[error("{0:?} is not a condition; write a comparison and a number, for example \"< 0.01\"")]
    PassIf(String),
    /// Not what can become of a container.
    #[error(
        "{0:?} is nothing that is done when a secret changes; use restart, keep, or a signal such as SIGHUP"
    )]
    OnRotate(String),
}

/// Reads one App manifest from YAML or JSON.
///
/// # Errors
///
/// See [`ManifestError`]. No input panics, and none is read beyond [`MAX_MANIFEST_BYTES`] and
/// [`MAX_DEPTH`].
pub fn parse(bytes: &[u8]) -> Result<App, ManifestError> {
    let app: App = read(text(bytes)?)?;
    check::app(&app)?;
    Ok(app)
}

/// Reads one DisruptionBudget manifest from YAML or JSON.
///
/// # Errors
///
/// As for [`parse`].
pub fn parse_budget(bytes: &[u8]) -> Result<DisruptionBudget, ManifestError> {
    let budget: DisruptionBudget = read(text(bytes)?)?;
    budget.check()?;
    Ok(budget)
}

/// A manifest of any kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Manifest {
    /// An app.
    App(Box<App>),
    /// A disruption budget.
    DisruptionBudget(DisruptionBudget),
}

/// Reads one manifest of the kind that it says it is. One that says none is read as an App, whose errors then tell.
///
/// # Errors
///
/// As for [`parse`].
pub fn parse_any(bytes: &[u8]) -> Result<Manifest, ManifestError> {
    if says_budget(text(bytes)?) {
        parse_budget(bytes).map(Manifest::DisruptionBudget)
    } else {
        parse(bytes).map(|app| Manifest::App(Box::new(app)))
    }
}

/// Whether the top level of a manifest has the kind of a disruption budget. Of one that cannot be read, a line that looks
/// like it tells, so that its errors are about the keys that were meant.
fn says_budget(text: &str) -> bool {
    #[derive(Deserialize)]
    struct Envelope {
        kind: Option<String>,
    }
    const KIND: &str = "DisruptionBudget";
    let envelope: Result<Envelope, _> = serde_saphyr::from_str_with_options(text, options());
    match envelope {
        Ok(envelope) => envelope.kind.as_deref() == Some(KIND),
        Err(_) => text.lines().any(|line| {
            let Some((key, value)) = line.split_once(':') else {
                return false;
            };
            let key = key.trim_start_matches('{').trim_matches(['"', '\'']);
            let value = value.split('#').next().unwrap_or_default();
            key == "kind" && value.trim_matches([' ', '"', '\'', ',', '\r', '}']) == KIND
        }),
    }
}

fn text(bytes: &[u8]) -> Result<&str, ManifestError> {
    if bytes.len() > MAX_MANIFEST_BYTES {
        return Err(ManifestError::TooLarge { size: bytes.len() });
    }
    std::str::from_utf8(bytes).map_err(|error| ManifestError::Encoding {
        offset: error.valid_up_to(),
    })
}

fn read<T: de::DeserializeOwned>(text: &str) -> Result<T, ManifestError> {
    serde_saphyr::from_str_with_options(text, options()).map_err(|error| syntax(&error))
}

fn options() -> serde_saphyr::Options {
    serde_saphyr::options! {
        duplicate_keys: serde_saphyr::DuplicateKeyPolicy::Error,
        strict_booleans: true,
        merge_keys: serde_saphyr::MergeKeyPolicy::Error,
        reject_unsupported_tags: true,
        with_snippet: false,
        budget: serde_saphyr::budget! {
            max_depth: MAX_DEPTH,
            flow_nesting_limit: MAX_DEPTH,
            max_documents: 1,
            // Anchors and aliases are how small YAML becomes large; manifests have no use for them.
            max_anchors: 0,
            max_aliases: 0,
        },
    }
}

/// `environment:` as a map of strings, numbers and booleans, or as a list of `KEY=value`.
pub(super) fn environment<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<BTreeMap<String, String>, D::Error> {
    struct Environment;

    impl<'de> Visitor<'de> for Environment {
        type Value = BTreeMap<String, String>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a map of variables, or a list of KEY=value")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut variables = BTreeMap::new();
            // Asked for a string, the YAML parser gives a number or boolean as it is written: `1.0` stays.
            while let Some((key, value)) = map.next_entry::<String, String>()? {
                variables.insert(key, value);
            }
            Ok(variables)
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
            let mut variables = BTreeMap::new();
            while let Some(entry) = seq.next_element::<String>()? {
                let (key, value) = entry
                    .split_once('=')
                    .ok_or_else(|| de::Error::custom(format_args!("{entry:?} is not KEY=value")))?;
                if variables.insert(key.to_owned(), value.to_owned()).is_some() {
                    return Err(de::Error::custom(format_args!(
                        "variable {key:?} is given twice"
                    )));
                }
            }
            Ok(variables)
        }
    }

    deserializer.deserialize_any(Environment)
}

/// `depends_on:` as a map of conditions, or as a list of names.
pub(super) fn dependencies<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Dependencies, D::Error> {
    struct Visit;

    impl<'de> Visitor<'de> for Visit {
        type Value = Dependencies;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a list of services, or a map of services and conditions")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut dependencies = Dependencies::new();
            while let Some((service, dependency)) = map.next_entry()? {
                dependencies.insert(service, dependency);
            }
            Ok(dependencies)
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
            let condition = Condition::Started;
            let mut dependencies = Dependencies::new();
            while let Some(service) = seq.next_element::<ServiceName>()? {
                let twice = format!("service {service} is named twice");
                if dependencies
                    .insert(service, Dependency { condition })
                    .is_some()
                {
                    return Err(de::Error::custom(twice));
                }
            }
            Ok(dependencies)
        }
    }

    deserializer.deserialize_any(Visit)
}

/// `configs:` of a service: a list of names, or of maps.
pub(super) fn configs<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Vec<ConfigMount>, D::Error> {
    let expected = "the name of a config, or a map such as {source: NAME, target: /path}";
    names_or_maps::<D, ConfigName, config::Long, _>(deserializer, expected)
}

/// `secrets:` of a service: a list of names, or of maps.
pub(super) fn secrets<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Vec<SecretMount>, D::Error> {
    let expected = "the name of a secret, or a map such as {source: NAME, target: FILE}";
    names_or_maps::<D, SecretName, secret::Long, _>(deserializer, expected)
}

/// `imagePullSecrets:` of an app: a list of names, or of maps.
pub(super) fn pull_secrets<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Vec<SecretName>, D::Error> {
    let expected = "the name of a secret, or a map {name: NAME}";
    names_or_maps::<D, SecretName, pull_secret::Long, _>(deserializer, expected)
}

fn names_or_maps<'de, D, Short, Long, T>(
    deserializer: D,
    expected: &'static str,
) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    Short: FromStr<Err: fmt::Display> + Into<T>,
    Long: Deserialize<'de> + Into<T>,
{
    struct List<Short, Long>(&'static str, PhantomData<(Short, Long)>);
    struct Entry<Short, Long>(&'static str, PhantomData<(Short, Long)>);

    impl<'de, Short, Long> Visitor<'de> for Entry<Short, Long>
    where
        Short: FromStr<Err: fmt::Display>,
        Long: Deserialize<'de>,
    {
        type Value = Either<Short, Long>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str(self.0)
        }

        fn visit_str<E: de::Error>(self, text: &str) -> Result<Self::Value, E> {
            text.parse().map(Either::Short).map_err(de::Error::custom)
        }

        fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
            Long::deserialize(de::value::MapAccessDeserializer::new(map)).map(Either::Long)
        }
    }

    impl<'de, Short, Long> de::DeserializeSeed<'de> for Entry<Short, Long>
    where
        Short: FromStr<Err: fmt::Display>,
        Long: Deserialize<'de>,
    {
        type Value = Either<Short, Long>;

        fn deserialize<D: Deserializer<'de>>(
            self,
            deserializer: D,
        ) -> Result<Self::Value, D::Error> {
            deserializer.deserialize_any(self)
        }
    }

    impl<'de, Short, Long> Visitor<'de> for List<Short, Long>
    where
        Short: FromStr<Err: fmt::Display>,
        Long: Deserialize<'de>,
    {
        type Value = Vec<Either<Short, Long>>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "a list; each entry is {}", self.0)
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
            let mut entries = Vec::new();
            while let Some(entry) = seq.next_element_seed(Entry(self.0, PhantomData))? {
                entries.push(entry);
            }
            Ok(entries)
        }
    }

    let entries = deserializer.deserialize_seq(List::<Short, Long>(expected, PhantomData))?;
    let entries = entries.into_iter().map(|entry| match entry {
        Either::Short(name) => name.into(),
        Either::Long(long) => long.into(),
    });
    Ok(entries.collect())
}

enum Either<Short, Long> {
    Short(Short),
    Long(Long),
}

/// One string or a list of them, as Compose allows for `tmpfs`.
pub(super) fn one_or_many<'de, D, T>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    T: FromStr<Err = FieldError>,
{
    struct OneOrMany<T>(PhantomData<T>);

    impl<'de, T: FromStr<Err = FieldError>> Visitor<'de> for OneOrMany<T> {
        type Value = Vec<T>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a string or a list of strings")
        }

        fn visit_str<E: de::Error>(self, text: &str) -> Result<Vec<T>, E> {
            text.parse()
                .map(|item| vec![item])
                .map_err(de::Error::custom)
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<T>, A::Error> {
            let mut items = Vec::new();
            while let Some(text) = seq.next_element::<String>()? {
                items.push(text.parse().map_err(de::Error::custom)?);
            }
            Ok(items)
        }
    }

    deserializer.deserialize_any(OneOrMany(PhantomData))
}

impl FromStr for Tmpfs {
    type Err = FieldError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || FieldError::Tmpfs(text.chars().take(120).collect());
        let (target, size) = match text.split_once(':') {
            None => (text, Bytes(16 << 20)),
            Some((target, option)) => {
                let size = option.strip_prefix("size=").ok_or_else(wrong)?;
                (target, size.parse().map_err(|_| wrong())?)
            }
        };
        if !target.starts_with('/') {
            return Err(wrong());
        }
        Ok(Self {
            target: target.to_owned(),
            size,
        })
    }
}

impl FromStr for VolumeMount {
    type Err = FieldError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || FieldError::Volume(text.chars().take(120).collect());
        let mut parts = text.split(':');
        let (Some(source), Some(target)) = (parts.next(), parts.next()) else {
            return Err(wrong());
        };
        let read_only = match (parts.next(), parts.next()) {
            (None, _) | (Some("rw"), None) => false,
            (Some("ro"), None) => true,
            _ => return Err(wrong()),
        };
        let source = if source.starts_with('/') {
            VolumeSource::Bind(source.to_owned())
        } else {
            VolumeSource::Named(source.parse().map_err(|_| wrong())?)
        };
        if !target.starts_with('/') {
            return Err(wrong());
        }
        Ok(Self {
            source,
            target: target.to_owned(),
            read_only,
        })
    }
}

impl<'de> Deserialize<'de> for Amount {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct CountOrPercent;

        impl Visitor<'_> for CountOrPercent {
            type Value = Amount;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a count from 1, or a percentage such as \"20%\"")
            }

            fn visit_u64<E: de::Error>(self, count: u64) -> Result<Amount, E> {
                match u32::try_from(count) {
                    Ok(count) if count > 0 => Ok(Amount::Count(count)),
                    _ => Err(E::invalid_value(de::Unexpected::Unsigned(count), &self)),
                }
            }

            fn visit_i64<E: de::Error>(self, count: i64) -> Result<Amount, E> {
                match u64::try_from(count) {
                    Ok(count) => self.visit_u64(count),
                    Err(_) => Err(E::invalid_value(de::Unexpected::Signed(count), &self)),
                }
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Amount, E> {
                match text.strip_suffix('%').map(str::parse) {
                    Some(Ok(percent @ 1..=100)) => Ok(Amount::Percent(percent)),
                    _ => Err(E::invalid_value(de::Unexpected::Str(text), &self)),
                }
            }
        }

        deserializer.deserialize_any(CountOrPercent)
    }
}
