//! Device nodes and bind mounts of a container, as they are at the moment it starts.
//!
//! Names are looked up anew at every start: a serial adapter that was plugged in again has another number, and a link
//! such as `/dev/serial/by-id/…` leads elsewhere. What a name leads to is held against the policy once more.

use std::fs::{self, File};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use foreshore_protocol::manifest::{DeviceAccess, Service, VolumeSource};
use serde_json::{Value, json};

use super::spec::Refusal;
use crate::policy::{Denied, Grant};

/// Places in `/dev` that others than root can write to, or that are not devices of the machine.
const NO_DEVICES: [&str; 3] = ["/dev/shm", "/dev/mqueue", "/dev/pts"];

/// Whoever in the container; what may be done is for the device cgroup to say.
const MODE: u32 = 0o666;

/// Why a container cannot have what it asks for now.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AccessError {
    /// The policy does not allow it.
    #[error(transparent)]
    Denied(#[from] Denied),
    /// A device is not plugged in, or its driver is not there.
    #[error(
        "device {0} is not there; plug it in or load its driver, the service is started when it is"
    )]
    Missing(String),
    /// Something else is there.
    #[error("{0} is not a device node")]
    NotADevice(String),
    /// It cannot be given.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The operating system refused something.
    #[error("failed to open {path}")]
    Io {
        /// What.
        path: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// A device node that was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Node {
    target: String,
    block: bool,
    major: u64,
    minor: u64,
    access: DeviceAccess,
}

/// Looks up the device nodes of a service.
pub(crate) fn find(grant: &Grant, name: &str, service: &Service) -> Result<Vec<Node>, AccessError> {
    let look_up = |device: &foreshore_protocol::manifest::DeviceMapping| {
        let source = &device.source;
        let real = fs::canonicalize(source).map_err(|error| look_up_error(source, error))?;
        if !real.starts_with("/dev") || NO_DEVICES.iter().any(|place| real.starts_with(place)) {
            return Err(grant.denied_device(name, source, &real).into());
        }
        let metadata = fs::metadata(&real).map_err(|error| look_up_error(source, error))?;
        let block = metadata.file_type().is_block_device();
        if !block && !metadata.file_type().is_char_device() {
            return Err(AccessError::NotADevice(source.clone()));
        }
        Ok(Node {
            target: device.target.clone(),
            block,
            major: nix::sys::stat::major(metadata.rdev()),
            minor: nix::sys::stat::minor(metadata.rdev()),
            access: device.access,
        })
    };
    service.devices.iter().map(look_up).collect()
}

fn look_up_error(source: &str, error: std::io::Error) -> AccessError {
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENOTDIR | libc::ENXIO | libc::ENODEV) => {
            AccessError::Missing(source.to_owned())
        }
        _ => AccessError::Io {
            path: source.to_owned(),
            source: error,
        },
    }
}

/// Puts the nodes into an OCI configuration, with the rules that let the container use them.
pub(crate) fn add(nodes: &[Node], configuration: &mut Value) {
    if nodes.is_empty() {
        return;
    }
    let kind = |node: &Node| if node.block { "b" } else { "c" };
    let made = nodes.iter().map(|node| {
        json!({"path": node.target, "type": kind(node), "major": node.major, "minor": node.minor,
               "fileMode": MODE, "uid": 0, "gid": 0})
    });
    configuration["linux"]["devices"] = made.collect();
    let rules = configuration["linux"]["resources"]["devices"].as_array_mut();
    let rules = rules.expect("every configuration has device rules");
    for node in nodes {
        // Without CAP_MKNOD nobody makes nodes in there, so `m` is not passed on.
        let access = DeviceAccess {
            make: false,
            ..node.access
        };
        rules.push(
            json!({"allow": true, "type": kind(node), "major": node.major, "minor": node.minor,
                          "access": access.to_string()}),
        );
    }
}

/// The source of a bind mount, held open so that it stays what was checked.
#[derive(Debug)]
pub(crate) struct BindSource {
    /// As the manifest names it.
    pub(crate) named: PathBuf,
    held: OwnedFd,
}

impl BindSource {
    /// A path to what is held.
    pub(crate) fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.held.as_raw_fd()))
    }
}

/// Opens what a service mounts of the device, and holds it against the policy as it really is.
pub(crate) fn bind_sources(
    grant: &Grant,
    name: &str,
    service: &Service,
) -> Result<Vec<BindSource>, AccessError> {
    let mut sources: Vec<BindSource> = Vec::new();
    for volume in &service.volumes {
        let VolumeSource::Bind(source) = &volume.source else {
            continue;
        };
        let failed = |error| AccessError::Io {
            path: source.clone(),
            source: error,
        };
        // The same name means the same thing twice.
        let known = sources
            .iter()
            .find(|known| known.named == Path::new(source));
        let held: OwnedFd = match known {
            Some(known) => known.held.try_clone().map_err(failed)?,
            None => open_path(source)?.into(),
        };
        let real = fs::read_link(format!("/proc/self/fd/{}", held.as_raw_fd())).map_err(failed)?;
        grant.allows_bind(name, source, &real, volume.read_only)?;
        sources.push(BindSource {
            named: Path::new(source).to_owned(),
            held,
        });
    }
    Ok(sources)
}

fn open_path(source: &str) -> Result<File, AccessError> {
    let opened = File::options()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_CLOEXEC)
        .open(source);
    opened.map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory => {
            Refusal::MissingSource(source.chars().take(200).collect()).into()
        }
        _ => AccessError::Io {
            path: source.to_owned(),
            source: error,
        },
    })
}
