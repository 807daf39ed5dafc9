//! [`MaintenanceWindow`]: when devices may begin something. Whether one is open is the devices' business.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::cron::Cron;
use crate::quantity::Span;

/// The longest name of a time zone, in bytes; the tz database's own limit for its parts is 14.
pub const MAX_ZONE_NAME_BYTES: usize = 64;

/// Opens at certain times and stays open for a while, as the clock on the device's wall has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct MaintenanceWindow {
    /// When it opens: minute, hour, day of the month, month, day of the week (crontab(5)).
    pub cron: Cron,
    /// For how long: 1m to 7d.
    #[serde(rename = "for")]
    pub open_for: Span,
    /// Whose local time that is. Default: `device`.
    #[serde(default)]
    pub timezone: TimeZone,
}

/// Whose local time: `device`, `UTC`, or a zone of the tz database such as `Europe/Berlin`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum TimeZone {
    /// The device's own, as it is set there.
    #[default]
    Device,
    /// Coordinated universal time.
    Utc,
    /// That of a zone of the tz database. Whether there is one of that name is not known here.
    Named(String),
}

/// Why a text cannot be a [`TimeZone`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a time zone; write device, UTC, or a name such as Europe/Berlin")]
pub struct ParseTimeZoneError(String);

impl FromStr for TimeZone {
    type Err = ParseTimeZoneError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'+');
        let is_part = |part: &str| !part.is_empty() && part.bytes().all(plain);
        match text {
            "device" => Ok(Self::Device),
            "UTC" => Ok(Self::Utc),
            name if name.len() <= MAX_ZONE_NAME_BYTES && name.split('/').all(is_part) => {
                Ok(Self::Named(name.to_owned()))
            }
            _ => {
                let cut = text.floor_char_boundary(MAX_ZONE_NAME_BYTES);
                Err(ParseTimeZoneError(text[..cut].to_owned()))
            }
        }
    }
}

impl fmt::Display for TimeZone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Device => "device",
            Self::Utc => "UTC",
            Self::Named(name) => name,
        })
    }
}

impl Serialize for TimeZone {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for TimeZone {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}
