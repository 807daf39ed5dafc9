//! Patterns of device nodes: `*` and `?` within one part of a path, as in glob(7); nothing else is special.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A pattern such as `/dev/ttyUSB*`. Absolute, below `/dev`, normal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DevicePattern(String);

impl DevicePattern {
    /// Whether it means this path.
    #[must_use]
    pub fn matches(&self, path: &str) -> bool {
        let (mut pattern, mut parts) = (self.0.split('/'), path.split('/'));
        loop {
            match (pattern.next(), parts.next()) {
                (None, None) => return true,
                (Some(pattern), Some(part))
                    if part_matches(pattern.as_bytes(), part.as_bytes()) => {}
                _ => return false,
            }
        }
    }
}

/// In time proportional to the product of the lengths: on a mismatch, only the last `*` takes one more.
pub(super) fn part_matches(pattern: &[u8], part: &[u8]) -> bool {
    let (mut at, mut index) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while index < part.len() {
        match pattern.get(at) {
            Some(b'*') => {
                star = Some((at, index));
                at += 1;
            }
            Some(byte) if *byte == b'?' || *byte == part[index] => {
                at += 1;
                index += 1;
            }
            _ => match &mut star {
                Some((after, taken)) => {
                    *taken += 1;
                    at = *after + 1;
                    index = *taken;
                }
                None => return false,
            },
        }
    }
    pattern[at..].iter().all(|byte| *byte == b'*')
}

impl TryFrom<String> for DevicePattern {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let normal =
            |part: &str| !matches!(part, "" | "." | "..") && !part.contains(char::is_control);
        let named = text
            .strip_prefix("/dev/")
            .filter(|rest| rest.split('/').all(normal));
        if named.is_none() || text.len() > 255 {
            return Err(format!(
                "{text:?} is not a pattern of device nodes; write a path below /dev, in which * and ? stand for letters, \
                 for example \"/dev/ttyUSB*\""
            ));
        }
        if text.contains(['[', ']', '{', '}', '\\']) {
            return Err(format!(
                "{text:?}: only * and ? have a meaning in a pattern; write two patterns"
            ));
        }
        Ok(Self(text))
    }
}

impl From<DevicePattern> for String {
    fn from(pattern: DevicePattern) -> Self {
        pattern.0
    }
}

impl fmt::Display for DevicePattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
