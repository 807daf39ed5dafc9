//! `devices:` of a service: device nodes of the device, in Compose's spelling `HOST[:CONTAINER[:rwm]]`.

use std::fmt;
use std::str::FromStr;

use super::parse::FieldError;

/// A device node that a container gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceMapping {
    /// The node on the device, or a link to one: absolute, below `/dev`.
    pub source: String,
    /// The node in the container: absolute, below `/dev`. Default: as on the device.
    pub target: String,
    /// What the container may do with it.
    pub access: DeviceAccess,
}

/// What a container may do with a device node: read it, write it, and (Compose's `m`, which means nothing without
/// CAP_MKNOD) make it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceAccess {
    /// `r`.
    pub read: bool,
    /// `w`.
    pub write: bool,
    /// `m`.
    pub make: bool,
}

impl DeviceAccess {
    /// `rwm`, Compose's default.
    pub const ALL: Self = Self {
        read: true,
        write: true,
        make: true,
    };
}

impl FromStr for DeviceAccess {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let mut access = Self {
            read: false,
            write: false,
            make: false,
        };
        for letter in text.chars() {
            let flag = match letter {
                'r' => &mut access.read,
                'w' => &mut access.write,
                'm' => &mut access.make,
                _ => return Err(()),
            };
            if std::mem::replace(flag, true) {
                return Err(());
            }
        }
        // To make a node is no use of a device.
        if access.read || access.write {
            Ok(access)
        } else {
            Err(())
        }
    }
}

impl fmt::Display for DeviceAccess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (has, letter) in [(self.read, "r"), (self.write, "w"), (self.make, "m")] {
            f.write_str(if has { letter } else { "" })?;
        }
        Ok(())
    }
}

impl FromStr for DeviceMapping {
    type Err = FieldError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || FieldError::Device(text.chars().take(120).collect());
        let mut parts = text.split(':');
        let source = parts.next().unwrap_or_default();
        let second = parts.next();
        let third = parts.next();
        let (target, access) = match (second, third, parts.next()) {
            (None, ..) => (source, DeviceAccess::ALL),
            (Some(target), None, _) if target.starts_with('/') => (target, DeviceAccess::ALL),
            (Some(access), None, _) => (source, access.parse().map_err(|()| wrong())?),
            (Some(target), Some(access), None) => (target, access.parse().map_err(|()| wrong())?),
            _ => return Err(wrong()),
        };
        if !source.starts_with('/') || !target.starts_with('/') {
            return Err(wrong());
        }
        Ok(Self {
            source: source.to_owned(),
            target: target.to_owned(),
            access,
        })
    }
}

impl fmt::Display for DeviceMapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.source, self.target, self.access)
    }
}
