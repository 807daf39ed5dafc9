//! [`Digest`]: the SHA-256 that names releases, image blobs and layers; and [`DigestPrefix`], as people write it.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::{Digest as _, Sha256};

/// A SHA-256 digest, written `sha256:` and 64 lower-case hexadecimal digits
/// (OCI image specification, "Digests").
///
/// In JSON it is that string; in postcard frames it is the 32 bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest([u8; 32]);

/// Why a text is not a [`Digest`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseDigestError {
    /// The algorithm is not `sha256`, the only one Foreshore accepts.
    #[error("digest does not start with \"sha256:\"")]
    Algorithm,
    /// What follows the colon is not 64 lower-case hexadecimal digits.
    #[error("digest is not \"sha256:\" and 64 lower-case hexadecimal digits")]
    Hex,
}

impl Digest {
    /// The digest of `bytes`.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }

    /// The digest whose 32 raw bytes are known already, for example from a running hasher.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The 32 raw bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The 64 hexadecimal digits, without the algorithm.
    #[must_use]
    pub fn hex(&self) -> String {
        use fmt::Write as _;
        self.0
            .iter()
            .fold(String::with_capacity(64), |mut out, byte| {
                write!(out, "{byte:02x}").expect("writing to a String cannot fail");
                out
            })
    }

    /// The first 12 hexadecimal digits: what people read in tables.
    #[must_use]
    pub fn short(&self) -> String {
        let mut hex = self.hex();
        hex.truncate(12);
        hex
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({})", self.short())
    }
}

impl FromStr for Digest {
    type Err = ParseDigestError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let hex = text
            .strip_prefix("sha256:")
            .ok_or(ParseDigestError::Algorithm)?
            .as_bytes();
        if hex.len() != 64 {
            return Err(ParseDigestError::Hex);
        }
        let mut bytes = [0; 32];
        for (byte, pair) in bytes.iter_mut().zip(hex.chunks_exact(2)) {
            *byte = nibble(pair[0])? << 4 | nibble(pair[1])?;
        }
        Ok(Self(bytes))
    }
}

fn nibble(digit: u8) -> Result<u8, ParseDigestError> {
    match digit {
        b'0'..=b'9' => Ok(digit - b'0'),
        b'a'..=b'f' => Ok(digit - b'a' + 10),
        _ => Err(ParseDigestError::Hex),
    }
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() {
            serializer.collect_str(self)
        } else {
            self.0.serialize(serializer)
        }
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if deserializer.is_human_readable() {
            let text = String::deserialize(deserializer)?;
            text.parse().map_err(serde::de::Error::custom)
        } else {
            <[u8; 32]>::deserialize(deserializer).map(Self)
        }
    }
}

/// The beginning of a [`Digest`], as people copy it from a table: 12 to 64 lower-case hexadecimal digits, with or without
/// `sha256:` before them. Kept as it was written.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DigestPrefix(String);

/// Why a text is not a [`DigestPrefix`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "a release is written as 12 to 64 lower-case hexadecimal digits, with or without \"sha256:\" before them"
)]
pub struct ParsePrefixError;

impl DigestPrefix {
    /// The digits, without the algorithm.
    #[must_use]
    pub fn hex(&self) -> &str {
        self.0.strip_prefix("sha256:").unwrap_or(&self.0)
    }
}

impl fmt::Display for DigestPrefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl TryFrom<String> for DigestPrefix {
    type Error = ParsePrefixError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let prefix = Self(text);
        let hex = prefix.hex().as_bytes();
        if (12..=64).contains(&hex.len()) && hex.iter().all(|digit| nibble(*digit).is_ok()) {
            Ok(prefix)
        } else {
            Err(ParsePrefixError)
        }
    }
}

impl From<DigestPrefix> for String {
    fn from(prefix: DigestPrefix) -> Self {
        prefix.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_is_what_people_copy_from_a_table_or_all_of_it() {
        let digest = Digest::of(b"");
        for text in [digest.short(), digest.hex(), digest.to_string()] {
            let prefix = DigestPrefix::try_from(text.clone()).unwrap();
            assert!(digest.hex().starts_with(prefix.hex()));
            assert_eq!(prefix.to_string(), text);
        }
        let long = format!("{}0", digest.hex());
        for wrong in [
            "",
            "e3b0c44298f",
            "E3B0C44298FC",
            "sha512:e3b0c44298fc",
            "e3b0c44298fg",
            &long,
        ] {
            assert_eq!(
                DigestPrefix::try_from(wrong.to_owned()),
                Err(ParsePrefixError)
            );
        }
    }

    #[test]
    fn the_empty_digest_is_the_known_one() {
        let empty = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(Digest::of(b"").to_string(), empty);
        assert_eq!(empty.parse::<Digest>().unwrap(), Digest::of(b""));
    }

    #[test]
    fn upper_case_other_algorithms_and_wrong_lengths_are_refused() {
        let upper = Digest::of(b"").to_string().to_uppercase();
        assert_eq!(upper.parse::<Digest>(), Err(ParseDigestError::Algorithm));
        assert_eq!(
            "sha512:00".parse::<Digest>(),
            Err(ParseDigestError::Algorithm)
        );
        assert_eq!("sha256:00".parse::<Digest>(), Err(ParseDigestError::Hex));
        let wide = format!("sha256:{}", "é".repeat(32));
        assert_eq!(wide.parse::<Digest>(), Err(ParseDigestError::Hex));
    }
}
