//! [`Room`]: what a file system has left, and how much of it stays free for everything else.
//!
//! Whatever fetches and unpacks leaves a reserve, so that an image never takes the last block from the state,
//! logs and volumes of what runs.

use std::fmt;
use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// The reserve is this part of the file system, unless told otherwise.
const RESERVE_PART: u64 = 20;
/// And at most this many bytes: 256 MiB.
const RESERVE_BYTES_MAX: u64 = 256 << 20;
/// And at most this many inodes.
const RESERVE_INODES_MAX: u64 = 4096;

/// What a file system has left.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Room {
    /// Bytes that an unprivileged process could still write; root's own are not counted.
    pub free_bytes: u64,
    /// Inodes left; `None` where they are made as needed.
    pub free_inodes: Option<u64>,
    /// Bytes that are to stay free.
    pub reserve_bytes: u64,
    /// Inodes that are to stay free.
    pub reserve_inodes: u64,
}

/// Something does not fit; says so.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shortage {
    inodes: bool,
    /// At least so many, more than there are.
    needed: u64,
    room: Room,
}

impl Room {
    /// Looks at the file system of `path` (statvfs(3)). `reserve` in bytes; `None` is 5 % of the file system and at
    /// most 256 MiB. Of the inodes 5 % and at most 4096 are reserved.
    ///
    /// # Errors
    /// When the file system cannot be asked.
    pub fn of(path: &Path, reserve: Option<u64>) -> io::Result<Self> {
        let stat = rustix::fs::statvfs(path)?;
        let total = stat.f_blocks.saturating_mul(stat.f_frsize);
        Ok(Self {
            free_bytes: stat.f_bavail.saturating_mul(stat.f_frsize),
            free_inodes: (stat.f_files > 0).then_some(stat.f_favail),
            reserve_bytes: reserve.unwrap_or_else(|| (total / RESERVE_PART).min(RESERVE_BYTES_MAX)),
            reserve_inodes: (stat.f_files / RESERVE_PART).min(RESERVE_INODES_MAX),
        })
    }

    /// Bytes that may be written before the reserve begins.
    #[must_use]
    pub const fn spare_bytes(&self) -> u64 {
        self.free_bytes.saturating_sub(self.reserve_bytes)
    }

    /// Whether the reserve is whole.
    #[must_use]
    pub fn is_enough(&self) -> bool {
        self.shortage(0, 0).is_none()
    }

    /// What keeps `bytes` and `inodes` more from fitting beside the reserve.
    #[must_use]
    pub fn shortage(&self, bytes: u64, inodes: u64) -> Option<Shortage> {
        let lacks = |inodes, needed| Shortage {
            inodes,
            needed,
            room: *self,
        };
        if self.free_bytes < self.reserve_bytes.saturating_add(bytes) {
            return Some(lacks(false, bytes));
        }
        let free = self.free_inodes?;
        (free < self.reserve_inodes.saturating_add(inodes)).then_some(lacks(true, inodes))
    }

    /// More than `bytes` turned out to be needed.
    #[must_use]
    pub(crate) const fn exceeded(&self, bytes: u64) -> Shortage {
        Shortage {
            inodes: false,
            needed: bytes,
            room: *self,
        }
    }
}

impl fmt::Display for Shortage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Room {
            free_bytes,
            free_inodes,
            reserve_bytes,
            reserve_inodes,
        } = self.room;
        let (free, reserve, unit) = if self.inodes {
            (free_inodes.unwrap_or(0), reserve_inodes, "inodes")
        } else {
            (free_bytes, reserve_bytes, "bytes")
        };
        if self.needed > 0 {
            write!(f, "about {} {unit} are needed, ", self.needed)?;
        }
        write!(
            f,
            "{free} {unit} are free and {reserve} of them are kept in reserve"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_short_is_named_with_its_numbers() {
        let room = Room {
            free_bytes: 1000,
            free_inodes: Some(10),
            reserve_bytes: 200,
            reserve_inodes: 4,
        };
        assert_eq!(room.spare_bytes(), 800);
        assert_eq!(room.shortage(800, 6), None);
        let text = |bytes, inodes| room.shortage(bytes, inodes).unwrap().to_string();
        assert_eq!(
            text(801, 0),
            "about 801 bytes are needed, 1000 bytes are free and 200 of them are kept in reserve"
        );
        assert_eq!(
            text(0, 7),
            "about 7 inodes are needed, 10 inodes are free and 4 of them are kept in reserve"
        );
        let endless = Room {
            free_inodes: None,
            ..room
        };
        assert_eq!(endless.shortage(0, u64::MAX), None);
        assert!(endless.shortage(u64::MAX, 0).is_some());
    }

    #[test]
    fn the_reserve_of_this_machine_is_a_twentieth_or_what_is_asked_for() {
        let room = Room::of(Path::new("/"), None).unwrap();
        assert!(room.reserve_bytes > 0 && room.reserve_bytes <= RESERVE_BYTES_MAX);
        assert_eq!(Room::of(Path::new("/"), Some(7)).unwrap().reserve_bytes, 7);
    }
}
