//! Sizes, CPU shares and durations as users write them.
//!
//! The helpers here are shared by manifest fields; each refuses what it does not know with a message
//! that shows a right example.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Why a text is not a quantity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseQuantityError {
    /// Not a size.
    #[error(
        "{0:?} is not a size; write a whole number with an optional unit b, k, m or g (powers of 1024), for example 32m"
    )]
    Size(String),
    /// Not a CPU share.
    #[error(
        "{0:?} is not a CPU share; write cores with at most three decimals, for example \"0.5\""
    )]
    Cpus(String),
    /// Not a duration.
    #[error(
        "{0:?} is not a duration; write whole numbers with units ms, s, m, h or d, for example 90s or 1h30m"
    )]
    Duration(String),
    /// More than the field can hold.
    #[error("{0:?} is too large")]
    Overflow(String),
}

/// A number of bytes. Written `64m`; units `b`, `k`, `m`, `g` and their `kb`, `mb`, `gb` and
/// `KiB`-style spellings, all powers of 1024, as Compose has it ("Specifying byte values").
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bytes(pub u64);

/// CPU time in thousandths of one core. Written `"0.5"` (Compose `cpus`).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Cpus(pub u32);

/// A span of time in whole milliseconds. Written `90s`, `1h30m`, `250ms`
/// (Compose "Specifying durations", plus `d`). At most 10 years.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Span(pub u64);

impl Span {
    /// A whole number of seconds.
    #[must_use]
    pub const fn from_secs(secs: u64) -> Self {
        Self(secs * 1000)
    }

    /// As the standard library's type.
    #[must_use]
    pub const fn duration(self) -> Duration {
        Duration::from_millis(self.0)
    }

    /// The number of milliseconds.
    #[must_use]
    pub const fn millis(self) -> u64 {
        self.0
    }
}

const MAX_SPAN_MS: u64 = 10 * 366 * 24 * 3_600_000;

impl FromStr for Bytes {
    type Err = ParseQuantityError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || ParseQuantityError::Size(excerpt(text));
        let (number, unit) = split_unit(text);
        let count: u64 = parse_digits(number).ok_or_else(wrong)?;
        let shift = match unit.to_ascii_lowercase().as_str() {
            "" | "b" => 0,
            "k" | "kb" | "ki" | "kib" => 10,
            "m" | "mb" | "mi" | "mib" => 20,
            "g" | "gb" | "gi" | "gib" => 30,
            _ => return Err(wrong()),
        };
        count
            .checked_mul(1 << shift)
            .filter(|bytes| i64::try_from(*bytes).is_ok())
            .map(Self)
            .ok_or_else(|| ParseQuantityError::Overflow(excerpt(text)))
    }
}

impl FromStr for Cpus {
    type Err = ParseQuantityError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || ParseQuantityError::Cpus(excerpt(text));
        let (whole, fraction) = text.split_once('.').unwrap_or((text, "0"));
        if fraction.is_empty() || fraction.len() > 3 || whole.len() > 4 {
            return Err(wrong());
        }
        let cores: u32 = parse_digits(whole)
            .and_then(|n| n.try_into().ok())
            .ok_or_else(wrong)?;
        let scale = 10_u32.pow(3 - u32::try_from(fraction.len()).map_err(|_| wrong())?);
        let part: u32 = parse_digits(fraction)
            .and_then(|n| n.try_into().ok())
            .ok_or_else(wrong)?;
        Ok(Self(cores * 1000 + part * scale))
    }
}

impl FromStr for Span {
    type Err = ParseQuantityError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || ParseQuantityError::Duration(excerpt(text));
        if text == "0" {
            return Ok(Self(0));
        }
        let mut rest = text;
        let mut total: u64 = 0;
        let mut largest_allowed = u64::MAX;
        while !rest.is_empty() {
            let (number, tail) = split_unit(rest);
            let unit_len = tail
                .find(|c: char| c.is_ascii_digit())
                .unwrap_or(tail.len());
            let (unit, next) = tail.split_at(unit_len);
            let factor: u64 = match unit {
                "ms" => 1,
                "s" => 1000,
                "m" => 60_000,
                "h" => 3_600_000,
                "d" => 86_400_000,
                _ => return Err(wrong()),
            };
            // Units go from large to small, each at most once: "30m1h" is more likely a slip than a wish.
            if factor >= largest_allowed {
                return Err(wrong());
            }
            largest_allowed = factor;
            total = parse_digits(number)
                .ok_or_else(wrong)?
                .checked_mul(factor)
                .and_then(|ms| total.checked_add(ms))
                .filter(|ms| *ms <= MAX_SPAN_MS)
                .ok_or_else(|| ParseQuantityError::Overflow(excerpt(text)))?;
            rest = next;
        }
        if text.is_empty() {
            Err(wrong())
        } else {
            Ok(Self(total))
        }
    }
}

fn split_unit(text: &str) -> (&str, &str) {
    text.split_at(
        text.find(|c: char| !c.is_ascii_digit())
            .unwrap_or(text.len()),
    )
}

fn parse_digits(text: &str) -> Option<u64> {
    (!text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()))
        .then(|| text.parse().ok())
        .flatten()
}

fn excerpt(text: &str) -> String {
    text.chars().take(40).collect()
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (unit, shift) in [("g", 30), ("m", 20), ("k", 10)] {
            if self.0 != 0 && self.0.trailing_zeros() >= shift {
                return write!(f, "{}{unit}", self.0 >> shift);
            }
        }
        write!(f, "{}", self.0)
    }
}

impl fmt::Display for Cpus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = format!("{}.{:03}", self.0 / 1000, self.0 % 1000);
        f.write_str(text.trim_end_matches('0').trim_end_matches('.'))
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 == 0 {
            return f.write_str("0s");
        }
        let mut rest = self.0;
        for (unit, factor) in [
            ("d", 86_400_000),
            ("h", 3_600_000),
            ("m", 60_000),
            ("s", 1000),
            ("ms", 1),
        ] {
            if rest >= factor {
                write!(f, "{}{unit}", rest / factor)?;
                rest %= factor;
            }
        }
        Ok(())
    }
}

macro_rules! quantity_serde {
    ($name:ident, $expecting:literal) => {
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                if serializer.is_human_readable() {
                    serializer.collect_str(self)
                } else {
                    self.0.serialize(serializer)
                }
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                if deserializer.is_human_readable() {
                    deserializer.deserialize_any(QuantityVisitor(
                        |text: &str| text.parse::<Self>(),
                        $expecting,
                    ))
                } else {
                    Deserialize::deserialize(deserializer).map(Self)
                }
            }
        }
    };
}

/// Takes a quantity from a string or from a bare YAML number (`mem_limit: 1048576`, `cpus: 0.5`).
struct QuantityVisitor<F>(F, &'static str);

impl<T, F> serde::de::Visitor<'_> for QuantityVisitor<F>
where
    F: FnOnce(&str) -> Result<T, ParseQuantityError>,
{
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.1)
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<T, E> {
        self.0(text).map_err(E::custom)
    }

    fn visit_u64<E: serde::de::Error>(self, number: u64) -> Result<T, E> {
        self.visit_str(&number.to_string())
    }

    fn visit_i64<E: serde::de::Error>(self, number: i64) -> Result<T, E> {
        self.visit_str(&number.to_string())
    }

    fn visit_f64<E: serde::de::Error>(self, number: f64) -> Result<T, E> {
        self.visit_str(&number.to_string())
    }
}

quantity_serde!(Bytes, "a size such as 32m");
quantity_serde!(Cpus, "a CPU share such as \"0.5\"");
quantity_serde!(Span, "a duration such as 60s");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("1k", 1024),
            ("32m", 32 << 20),
            ("2GB", 2 << 30),
            ("3Mi", 3 << 20),
        ] {
            assert_eq!(text.parse::<Bytes>(), Ok(Bytes(bytes)), "{text}");
        }
        for text in ["", "m", "1.5m", "-1", "1 m", "1t", "99999999999g", "1²"] {
            assert!(text.parse::<Bytes>().is_err(), "{text}");
        }
    }

    #[test]
    fn cpu_shares() {
        for (text, millis) in [
            ("1", 1000),
            ("0.5", 500),
            ("0.25", 250),
            ("0.125", 125),
            ("16", 16_000),
        ] {
            assert_eq!(text.parse::<Cpus>(), Ok(Cpus(millis)), "{text}");
        }
        for text in ["", ".5", "1.", "0.1234", "1e3", "-1", "99999"] {
            assert!(text.parse::<Cpus>().is_err(), "{text}");
        }
    }

    #[test]
    fn durations() {
        for (text, ms) in [
            ("0", 0),
            ("250ms", 250),
            ("60s", 60_000),
            ("1h30m", 5_400_000),
            ("2d", 172_800_000),
        ] {
            assert_eq!(text.parse::<Span>(), Ok(Span(ms)), "{text}");
        }
        for text in [
            "",
            "60",
            "s",
            "1m1h",
            "1s1s",
            "-5s",
            "1.5s",
            "999999999d",
            "5 s",
        ] {
            assert!(text.parse::<Span>().is_err(), "{text}");
        }
    }

    #[test]
    fn display_parses_back() {
        for span in [0, 1, 1000, 61_000, 86_400_001] {
            assert_eq!(Span(span).to_string().parse(), Ok(Span(span)));
        }
        for bytes in [0, 1, 1024, 1 << 20, (1 << 30) + 1] {
            assert_eq!(Bytes(bytes).to_string().parse(), Ok(Bytes(bytes)));
        }
        for cpus in [0, 1, 500, 1000, 1250] {
            assert_eq!(Cpus(cpus).to_string().parse(), Ok(Cpus(cpus)));
        }
    }
}
