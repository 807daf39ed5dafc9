//! `blkio_config:` of a service: how fast it may read and write disks, and its share beside others (Compose).

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::parse::FieldError;
use crate::quantity::Bytes;

/// How [`DiskPath::State`] is written.
const STATE: &str = "state";

/// Limits on the input and output of one service, each on a whole disk.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlkioConfig {
    /// Share of a busy disk beside others, 10 to 1000. Best effort: only some I/O schedulers of the kernel know shares.
    /// Default: the kernel's, 100.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight: Option<u16>,
    /// The same for single disks.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub weight_device: Vec<DeviceWeight>,
    /// At most so many bytes a second are read.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub device_read_bps: Vec<BytesRate>,
    /// At most so many bytes a second are written.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub device_write_bps: Vec<BytesRate>,
    /// At most so many reads a second.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub device_read_iops: Vec<OperationsRate>,
    /// At most so many writes a second.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub device_write_iops: Vec<OperationsRate>,
}

impl BlkioConfig {
    /// Whether it asks for nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Whether it asks for a share of any disk.
    #[must_use]
    pub const fn has_weights(&self) -> bool {
        self.weight.is_some() || !self.weight_device.is_empty()
    }
}

/// One of `weight_device`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceWeight {
    /// Which disk.
    pub path: DiskPath,
    /// 10 to 1000.
    pub weight: u16,
}

/// One of `device_read_bps` and `device_write_bps`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BytesRate {
    /// Which disk.
    pub path: DiskPath,
    /// Bytes a second, at least 4k.
    pub rate: Bytes,
}

/// One of `device_read_iops` and `device_write_iops`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OperationsRate {
    /// Which disk.
    pub path: DiskPath,
    /// Operations a second, at least 1.
    pub rate: u32,
}

/// A disk of a device.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DiskPath {
    /// `state`: whatever disk holds the agent's state on this device, with images, volumes and writable layers.
    State,
    /// A block device below `/dev`, or a link to one; a partition means its whole disk.
    Node(String),
}

impl FromStr for DiskPath {
    type Err = FieldError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            STATE => Ok(Self::State),
            _ if text.starts_with("/dev/") => Ok(Self::Node(text.to_owned())),
            _ => Err(FieldError::Disk(text.chars().take(120).collect())),
        }
    }
}

impl fmt::Display for DiskPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::State => STATE,
            Self::Node(path) => path,
        })
    }
}
