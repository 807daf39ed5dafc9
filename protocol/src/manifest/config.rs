//! `configs:` of an app: small files whose text is in the manifest, and where services see them.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::parse::FieldError;
use super::{AppSpec, Service};
use crate::id::{ConfigName, ServiceName};

/// One of an app's `configs:` (Compose). Its text is part of the release.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConfigFile {
    /// The file's text. As in commands, `${` is refused and `$${` means `${`.
    pub content: String,
}

/// One of a service's `configs:`: a read-only file in the container. Short form: the name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ConfigMount {
    /// Which of the app's `configs`.
    pub source: ConfigName,
    /// Absolute path in the container. Default: `/NAME`.
    pub target: String,
    /// Permissions. Default: `0444`.
    pub mode: FileMode,
    /// Owner in the container. Default: 0.
    pub uid: FileOwner,
    /// Group in the container. Default: 0.
    pub gid: FileOwner,
    /// The text; in a release only, so that a service's digest changes with it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
}

/// What users write for a [`ConfigMount`].
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Long {
    source: ConfigName,
    target: Option<String>,
    mode: Option<FileMode>,
    uid: Option<FileOwner>,
    gid: Option<FileOwner>,
    content: Option<String>,
}

impl From<Long> for ConfigMount {
    fn from(long: Long) -> Self {
        Self {
            target: long.target.unwrap_or_else(|| format!("/{}", long.source)),
            mode: long.mode.unwrap_or(FileMode(0o444)),
            uid: long.uid.unwrap_or(FileOwner(0)),
            gid: long.gid.unwrap_or(FileOwner(0)),
            content: long.content,
            source: long.source,
        }
    }
}

impl From<ConfigName> for ConfigMount {
    fn from(source: ConfigName) -> Self {
        Long {
            source,
            target: None,
            mode: None,
            uid: None,
            gid: None,
            content: None,
        }
        .into()
    }
}

/// Permissions of a file, at most `0777`; written in octal, as chmod(1) has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileMode(pub u32);

impl FromStr for FileMode {
    type Err = FieldError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let digits = text.strip_prefix("0o").unwrap_or(text);
        let octal =
            (1..=4).contains(&digits.len()) && digits.bytes().all(|byte| byte.is_ascii_digit());
        u32::from_str_radix(digits, 8)
            .ok()
            .filter(|mode| octal && *mode <= 0o777)
            .map(Self)
            .ok_or_else(|| FieldError::Mode(text.chars().take(40).collect()))
    }
}

impl fmt::Display for FileMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04o}", self.0)
    }
}

/// A user or group number, at most 65535.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileOwner(pub u32);

impl FromStr for FileOwner {
    type Err = FieldError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.parse::<u16>()
            .ok()
            .filter(|_| text.bytes().all(|byte| byte.is_ascii_digit()))
            .map(|id| Self(u32::from(id)))
            .ok_or_else(|| FieldError::Owner(text.chars().take(40).collect()))
    }
}

impl fmt::Display for FileOwner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl AppSpec {
    /// The services as a release has them, with the text of their configs. A config that does not exist stays without.
    pub(crate) fn resolved(&self) -> BTreeMap<ServiceName, Service> {
        let mut services = self.services.clone();
        let mounts = services
            .values_mut()
            .flat_map(|service| &mut service.configs);
        for mount in mounts {
            let file = self.configs.get(&mount.source);
            mount.content = file.map(|file| file.content.clone());
        }
        services
    }
}
