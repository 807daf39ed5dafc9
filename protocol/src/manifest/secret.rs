//! `secrets:` of an app: names of values that the hub keeps, and how services get them. No value is ever here.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::parse::FieldError;
use super::{FileMode, FileOwner, StopSignal};
use crate::id::SecretName;

/// The directory in the container that holds the files of its secrets.
pub const SECRETS_DIR: &str = "/run/secrets";

/// One of an app's `secrets:` (Compose).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SecretSource {
    /// Always true: the value is set in the hub, with `foreshore secret set NAME`.
    pub external: bool,
}

/// One of a service's `secrets:`. Short form: the name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SecretMount {
    /// Which of the app's `secrets`.
    pub source: SecretName,
    /// The file's name in [`SECRETS_DIR`]. Default: the secret's name; no file if only `environment` is given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// Permissions of the file. Default: `0400`.
    pub mode: FileMode,
    /// Owner of the file in the container. Default: the user that the container runs as.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uid: Option<FileOwner>,
    /// Group of the file in the container. Default: that of the container's user.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gid: Option<FileOwner>,
    /// A variable that holds the value, which must be text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub environment: Option<String>,
    /// What becomes of a running container when the value changes. Default: `restart`.
    pub on_rotate: OnRotate,
}

/// What users write for a [`SecretMount`].
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Long {
    source: SecretName,
    target: Option<String>,
    uid: Option<FileOwner>,
    gid: Option<FileOwner>,
    mode: Option<FileMode>,
    environment: Option<String>,
    on_rotate: Option<OnRotate>,
}

impl From<Long> for SecretMount {
    fn from(long: Long) -> Self {
        let below = |path: &String| {
            let rest = path.strip_prefix(SECRETS_DIR)?.strip_prefix('/')?;
            Some(rest.to_owned())
        };
        let target = long.target.map(|text| below(&text).unwrap_or(text));
        let file = target.is_some() || long.environment.is_none();
        Self {
            target: file.then(|| target.unwrap_or_else(|| long.source.to_string())),
            mode: long.mode.unwrap_or(FileMode(0o400)),
            uid: long.uid,
            gid: long.gid,
            environment: long.environment,
            on_rotate: long.on_rotate.unwrap_or_default(),
            source: long.source,
        }
    }
}

impl From<SecretName> for SecretMount {
    fn from(source: SecretName) -> Self {
        Long {
            source,
            target: None,
            uid: None,
            gid: None,
            mode: None,
            environment: None,
            on_rotate: None,
        }
        .into()
    }
}

/// What becomes of a running container when the value of one of its secrets changes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum OnRotate {
    /// It is stopped and started again with the new value.
    #[default]
    Restart,
    /// Its file is replaced and it runs on.
    Keep,
    /// Its file is replaced, then its first process gets this signal.
    Signal(StopSignal),
}

impl FromStr for OnRotate {
    type Err = FieldError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "restart" => Ok(Self::Restart),
            "keep" => Ok(Self::Keep),
            _ => StopSignal::ALL
                .into_iter()
                .find(|signal| *signal != StopSignal::Kill && signal.name() == text)
                .map(Self::Signal)
                .ok_or_else(|| FieldError::OnRotate(text.chars().take(40).collect())),
        }
    }
}

impl fmt::Display for OnRotate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Restart => "restart",
            Self::Keep => "keep",
            Self::Signal(signal) => signal.name(),
        })
    }
}
