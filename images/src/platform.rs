//! [`Platform`]: what a device can run, and how an entry of an image index is chosen for it.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Operating system, architecture and variant in the words of the OCI image specification ("Platform"):
/// `linux/amd64`, `linux/arm64`, `linux/arm/v7`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Platform {
    /// `linux` for everything that runs here.
    #[serde(default)]
    pub os: String,
    /// Go's `GOARCH`: `amd64`, `arm64`, `arm`, …
    #[serde(default)]
    pub architecture: String,
    /// `v7` of `arm/v7`. Empty when there is none.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub variant: String,
}

/// Why a text is not a [`Platform`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("\"{0}\" is not a platform; write it as linux/amd64, linux/arm64 or linux/arm/v7")]
pub struct ParsePlatformError(String);

impl Platform {
    /// The platform `linux/ARCHITECTURE[/VARIANT]`.
    #[must_use]
    pub fn linux(architecture: &str, variant: &str) -> Self {
        Self {
            os: "linux".to_owned(),
            architecture: architecture.to_owned(),
            variant: variant.to_owned(),
        }
    }

    /// The platform that this program was built for.
    #[must_use]
    pub fn host() -> Self {
        match std::env::consts::ARCH {
            "x86_64" => Self::linux("amd64", ""),
            "aarch64" => Self::linux("arm64", "v8"),
            "arm" => Self::linux("arm", "v7"),
            "x86" => Self::linux("386", ""),
            other => Self::linux(other, ""),
        }
    }

    /// How well something built for `offered` runs here: smaller is better, `None` is not at all.
    ///
    /// arm64 and arm64/v8 are the same; arm/v7 also runs v6 and v5, in that order; `arm` without a variant
    /// is v7 (as containerd normalizes it). amd64/v2 and up ask for more than every amd64 has: only a
    /// device that says so itself runs them.
    #[must_use]
    pub fn rank(&self, offered: &Self) -> Option<u32> {
        if self.os != offered.os || self.architecture != offered.architecture {
            return None;
        }
        let have = level(&self.architecture, &self.variant);
        let want = level(&offered.architecture, &offered.variant);
        match (have, want) {
            (Some(have), Some(want)) => have.checked_sub(want),
            _ => (self.variant == offered.variant).then_some(0),
        }
    }
}

/// The number in a variant, with the default that an absent variant means.
fn level(architecture: &str, variant: &str) -> Option<u32> {
    let default = match architecture {
        "amd64" => 1,
        "arm" => 7,
        "arm64" => 8,
        _ => return None,
    };
    if variant.is_empty() {
        return Some(default);
    }
    // "8" without the v is in use, too.
    let number: u32 = variant.strip_prefix('v').unwrap_or(variant).parse().ok()?;
    (number <= 64).then_some(number)
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        if self.variant.is_empty() {
            Ok(())
        } else {
            write!(f, "/{}", self.variant)
        }
    }
}

impl FromStr for Platform {
    type Err = ParsePlatformError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let word = |part: &str| {
            (1..=32).contains(&part.len())
                && part
                    .bytes()
                    .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_' || b == b'.')
        };
        let parts: Vec<&str> = text.split('/').collect();
        let (os, architecture, variant) = match parts[..] {
            [os, architecture] => (os, architecture, ""),
            [os, architecture, variant] if word(variant) => (os, architecture, variant),
            _ => return Err(ParsePlatformError(text.chars().take(64).collect())),
        };
        if !word(os) || !word(architecture) {
            return Err(ParsePlatformError(text.chars().take(64).collect()));
        }
        Ok(Self {
            os: os.to_owned(),
            architecture: architecture.to_owned(),
            variant: variant.to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn platform(text: &str) -> Platform {
        text.parse().unwrap()
    }

    #[test]
    fn ranks() {
        for (device, offered, rank) in [
            ("linux/amd64", "linux/amd64", Some(0)),
            ("linux/amd64", "linux/amd64/v2", None),
            ("linux/amd64", "linux/386", None),
            ("linux/amd64", "windows/amd64", None),
            ("linux/arm64/v8", "linux/arm64", Some(0)),
            ("linux/arm64", "linux/arm64/v8", Some(0)),
            ("linux/arm/v7", "linux/arm/v7", Some(0)),
            ("linux/arm/v7", "linux/arm", Some(0)),
            ("linux/arm/v7", "linux/arm/v6", Some(1)),
            ("linux/arm/v7", "linux/arm/v5", Some(2)),
            ("linux/arm/v6", "linux/arm/v7", None),
            ("linux/arm/v7", "linux/arm64", None),
            ("linux/riscv64", "linux/riscv64", Some(0)),
        ] {
            assert_eq!(
                platform(device).rank(&platform(offered)),
                rank,
                "{device} runs {offered}"
            );
        }
    }

    #[test]
    fn texts() {
        assert_eq!(platform("linux/arm/v7").to_string(), "linux/arm/v7");
        for bad in [
            "",
            "linux",
            "linux/",
            "/amd64",
            "linux/arm/v7/x",
            "Linux/amd64",
            "linux/arm/",
        ] {
            assert!(bad.parse::<Platform>().is_err(), "{bad}");
        }
    }
}
