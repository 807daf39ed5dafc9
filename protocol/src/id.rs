//! Identifiers: parsed once at the edge, and right ever after.

use std::borrow::Borrow;
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Why a text is not a name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseNameError {
    /// The text is empty.
    #[error("name is empty; a name is 1 to 63 of a-z, 0-9 and '-'")]
    Empty,
    /// More than 63 bytes.
    #[error("name has {0} bytes; at most 63 are allowed")]
    TooLong(usize),
    /// A character that names do not have, or a hyphen at an end.
    #[error("name {0:?} does not match [a-z0-9]([a-z0-9-]{{0,61}}[a-z0-9])?")]
    Pattern(String),
}

fn check_name(text: &str) -> Result<(), ParseNameError> {
    let bytes = text.as_bytes();
    let alphanumeric = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    match (bytes.first(), bytes.last()) {
        (None, _) | (_, None) => Err(ParseNameError::Empty),
        _ if bytes.len() > 63 => Err(ParseNameError::TooLong(bytes.len())),
        (Some(first), Some(last))
            if alphanumeric(first)
                && alphanumeric(last)
                && bytes.iter().all(|byte| alphanumeric(byte) || *byte == b'-') =>
        {
            Ok(())
        }
        _ => Err(ParseNameError::Pattern(text.to_owned())),
    }
}

/// Gives a checked string newtype its constructors and its serde form (the plain string).
macro_rules! text_newtype {
    ($name:ident, $error:ty, $check:path) => {
        impl $name {
            /// The text itself.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = $error;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                $check(text)?;
                Ok(Self(text.into()))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&self.0, f)
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }

        impl Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                self.0.serialize(serializer)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

/// The name of an app: `[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?` (an RFC 1123 label).
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AppName(Box<str>);
text_newtype!(AppName, ParseNameError, check_name);

/// The name of a service within its app; same shape as [`AppName`].
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServiceName(Box<str>);
text_newtype!(ServiceName, ParseNameError, check_name);

/// The id of a device, unique in the fleet; same shape as [`AppName`]. It is also the device's MQTT
/// client id and user name.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceId(Box<str>);
text_newtype!(DeviceId, ParseNameError, check_name);

/// The name of a volume within its app; same shape as [`AppName`].
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VolumeName(Box<str>);
text_newtype!(VolumeName, ParseNameError, check_name);

/// The name of a config within its app; same shape as [`AppName`].
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConfigName(Box<str>);
text_newtype!(ConfigName, ParseNameError, check_name);

/// The name of a secret within its hub; same shape as [`AppName`].
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SecretName(Box<str>);
text_newtype!(SecretName, ParseNameError, check_name);

/// The name of a disruption budget within its hub; same shape as [`AppName`].
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BudgetName(Box<str>);
text_newtype!(BudgetName, ParseNameError, check_name);

/// Why a text is not a label key or value.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseLabelError {
    /// A key must have at least one character.
    #[error("label key is empty")]
    EmptyKey,
    /// Keys and values have at most 63 bytes.
    #[error("label {0:?} is longer than 63 bytes")]
    TooLong(String),
    /// Letters, digits, '-', '_' and '.', beginning and ending with a letter or digit.
    #[error(
        "label {0:?} may hold letters, digits, '-', '_' and '.', and must begin and end with a letter or digit"
    )]
    Pattern(String),
}

fn check_label_value(text: &str) -> Result<(), ParseLabelError> {
    let bytes = text.as_bytes();
    if bytes.len() > 63 {
        return Err(ParseLabelError::TooLong(text.chars().take(80).collect()));
    }
    let (Some(first), Some(last)) = (bytes.first(), bytes.last()) else {
        return Ok(());
    };
    let inner = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    if first.is_ascii_alphanumeric() && last.is_ascii_alphanumeric() && bytes.iter().all(inner) {
        Ok(())
    } else {
        Err(ParseLabelError::Pattern(text.to_owned()))
    }
}

fn check_label_key(text: &str) -> Result<(), ParseLabelError> {
    if text.is_empty() {
        return Err(ParseLabelError::EmptyKey);
    }
    check_label_value(text)
}

/// The key of a device label: 1 to 63 letters, digits, `-`, `_` and `.`, beginning and ending with a
/// letter or digit (Kubernetes label names without the prefix part).
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LabelKey(Box<str>);
text_newtype!(LabelKey, ParseLabelError, check_label_key);

/// The value of a device label: like a [`LabelKey`], but may be empty.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LabelValue(Box<str>);
text_newtype!(LabelValue, ParseLabelError, check_label_value);

/// A device's labels.
pub type Labels = BTreeMap<LabelKey, LabelValue>;

/// A number outside the range of an [`Epoch`] or [`Generation`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0} is not between 1 and {max}", max = MAX_ORDINAL)]
pub struct OrdinalError(u64);

/// What SQLite's INTEGER and every JSON reader's 64-bit integer can hold.
const MAX_ORDINAL: u64 = i64::MAX as u64;

macro_rules! ordinal_newtype {
    ($name:ident) => {
        impl $name {
            /// The first one.
            pub const FIRST: Self = Self(1);

            /// Checks that `number` is from 1 to `i64::MAX`.
            ///
            /// # Errors
            ///
            /// When it is not.
            pub const fn new(number: u64) -> Result<Self, OrdinalError> {
                if number == 0 || number > MAX_ORDINAL {
                    return Err(OrdinalError(number));
                }
                Ok(Self(number))
            }

            /// The number itself.
            #[must_use]
            pub const fn get(self) -> u64 {
                self.0
            }

            /// The one after this.
            ///
            /// # Errors
            ///
            /// When this is the last one.
            pub const fn next(self) -> Result<Self, OrdinalError> {
                Self::new(self.0 + 1)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                Self::new(u64::deserialize(deserializer)?).map_err(serde::de::Error::custom)
            }
        }
    };
}

/// Which life of the hub's database a [`Generation`] belongs to; it grows when a backup is restored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct Epoch(u64);
ordinal_newtype!(Epoch);

/// The number of one device's desired state within an [`Epoch`]; it grows with every change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct Generation(u64);
ordinal_newtype!(Generation);

/// `(epoch, generation)`: which desired state of a device is meant. Ordered; a device never goes back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Version {
    /// The life of the hub's database.
    pub epoch: Epoch,
    /// The number within it.
    pub generation: Generation,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.epoch, self.generation)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_rfc_1123_labels() {
        for good in ["a", "0", "a-b", "a--b", &"a".repeat(63)] {
            assert_eq!(good.parse::<AppName>().unwrap().as_str(), good);
        }
        for bad in [
            "",
            "-a",
            "a-",
            "A",
            "a.b",
            "a_b",
            "ä",
            "a/b",
            "a\0",
            &"a".repeat(64),
        ] {
            assert!(bad.parse::<AppName>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn zero_and_what_sqlite_cannot_hold_are_no_generations() {
        assert!(Generation::new(0).is_err());
        assert!(Generation::new(1 << 63).is_err());
        let last = Generation::new(i64::MAX as u64).unwrap();
        assert!(last.next().is_err());
    }

    #[test]
    fn versions_order_by_epoch_first() {
        let version = |epoch, generation| Version {
            epoch: Epoch::new(epoch).unwrap(),
            generation: Generation::new(generation).unwrap(),
        };
        assert!(version(2, 1) > version(1, 900));
        assert!(version(1, 2) > version(1, 1));
    }
}
