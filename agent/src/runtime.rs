//! Containers behind a trait of a few verbs: [`Runtime`]. The real one is libcontainer (`oci`), the fake
//! one (`fake`) is for tests.
//!
//! A runtime keeps no policy: it starts, stops, lists and removes what it is told to. Containers outlive
//! the agent; [`Runtime::list`] finds them again.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use foreshore_protocol::id::SecretName;
use foreshore_protocol::manifest::Service;
use foreshore_protocol::{AppName, Digest, ServiceName};
use serde::{Deserialize, Serialize};

pub(crate) mod backstage;
pub(crate) mod cgroup;
pub(crate) mod device_filter;
pub(crate) mod devices;
pub(crate) mod entry;
pub mod fake;
mod ids;
pub(crate) mod io_limits;
pub(crate) mod mount_table;
pub(crate) mod mounts;
pub mod oci;
pub(crate) mod process;
pub(crate) mod request;
pub(crate) mod rootfs;
pub(crate) mod seal;
pub(crate) mod seccomp;
pub mod secrets;
pub mod spec;
pub mod user;
pub(crate) mod userns;
pub(crate) mod workload;

/// One container instance: `{app}.{service}.{instance}`. Names hold no dots, so it parses back. Instances
/// count up per service and are never used twice, so an id never means two containers.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ContainerId {
    /// The app.
    pub app: AppName,
    /// The service.
    pub service: ServiceName,
    /// Which start of it, from 1.
    pub instance: u64,
}

impl fmt::Display for ContainerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.app, self.service, self.instance)
    }
}

/// A text that is not `{app}.{service}.{instance}`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a container id: expected APP.SERVICE.INSTANCE")]
pub struct ParseIdError;

impl FromStr for ContainerId {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut parts = text.split('.');
        let (Some(app), Some(service), Some(instance), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(ParseIdError);
        };
        let id = Self {
            app: app.parse().map_err(|_| ParseIdError)?,
            service: service.parse().map_err(|_| ParseIdError)?,
            instance: instance.parse().map_err(|_| ParseIdError)?,
        };
        // "+1" and "01" are numbers too, but not what Display writes.
        if id.to_string() == text {
            Ok(id)
        } else {
            Err(ParseIdError)
        }
    }
}

/// What an image says about how to run it: the part of the OCI image configuration that Foreshore uses.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageConfig {
    /// `Entrypoint`.
    pub entrypoint: Vec<String>,
    /// `Cmd`.
    pub cmd: Vec<String>,
    /// `Env`, as `KEY=value`.
    pub env: Vec<String>,
    /// `User`; empty means root.
    pub user: String,
    /// `WorkingDir`; empty means `/`.
    pub working_dir: String,
}

/// All that is needed to start one container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerSpec {
    /// Its id.
    pub id: ContainerId,
    /// The release it belongs to; for people and for the adopting agent.
    pub release: Digest,
    /// [`foreshore_protocol::release::service_digest`] of `service`.
    pub service_digest: Digest,
    /// What the user asked for.
    pub service: Service,
    /// What the image says.
    pub image: ImageConfig,
    /// Unpacked layer directories, lowest first; at least one.
    pub layers: Vec<PathBuf>,
    /// The values of the secrets that `service` names.
    pub secrets: secrets::Values,
}

/// How a container ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// Exit code; 128 + signal number if a signal ended it.
    pub code: i32,
    /// Whether the kernel killed it for memory.
    pub oom: bool,
    /// The signal that ended it, if one did (signal(7)).
    pub signal: Option<u8>,
}

impl Exit {
    /// It ended by itself with this code.
    #[must_use]
    pub const fn with_code(code: i32) -> Self {
        Self {
            code,
            oom: false,
            signal: None,
        }
    }
}

/// What a container does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ContainerState {
    /// Runs.
    Running {
        /// Of the container's first process, in the agent's PID namespace.
        pid: i32,
        /// When it started, milliseconds of `CLOCK_BOOTTIME`.
        started_ms: u64,
    },
    /// Ended; its record and logs are still there.
    Exited(Exit),
    /// Left over from an interrupted start or remove, or its supervisor is gone: only good for `remove`.
    Broken,
}

/// A container that exists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Container {
    /// Its id.
    pub id: ContainerId,
    /// As given to `start`.
    pub release: Digest,
    /// As given to `start`.
    pub service_digest: Digest,
    /// What it does.
    pub state: ContainerState,
    /// The revisions of the secrets that it has.
    pub secrets: BTreeMap<SecretName, u64>,
}

/// Starts, watches and removes containers.
///
/// All verbs are idempotent where that makes sense, and each may be cut short by a crash at any point:
/// the next `list` tells what is there.
pub trait Runtime {
    /// Creates and starts a container. When this returns `Ok`, its process runs (or has ended already).
    /// On error nothing of it is left.
    fn start(&self, spec: &ContainerSpec) -> impl Future<Output = Result<(), StartError>>;

    /// Sends `signal`, waits up to `grace`, then kills every process of it. Returns when it has ended.
    /// A container that has ended or is unknown is fine.
    fn stop(
        &self,
        id: &ContainerId,
        signal: i32,
        grace: Duration,
    ) -> impl Future<Output = Result<(), StopError>>;

    /// Kills whatever is left of it and removes its processes, mounts, cgroups and records. Logs stay.
    /// An unknown container is fine.
    fn remove(&self, id: &ContainerId) -> impl Future<Output = Result<(), RemoveError>>;

    /// Replaces the files of those secrets of a running container for which it needs not be started again
    /// ([`foreshore_protocol::manifest::OnRotate`]), then sends `signals` to its first process. One that does not run is fine.
    fn renew_secrets(
        &self,
        id: &ContainerId,
        service: &Service,
        values: &secrets::Values,
        signals: &BTreeSet<i32>,
    ) -> impl Future<Output = Result<(), StopError>>;

    /// Every container of this agent, found from disk and the kernel, not from memory.
    fn list(&self) -> impl Future<Output = Result<Vec<Container>, ListError>>;

    /// Removes the logs of all services but these. What cannot be removed is logged and stays.
    fn remove_logs(&self, keep: &BTreeSet<(AppName, ServiceName)>) -> impl Future<Output = ()>;

    /// Runs a command inside the container, with its limits, user and environment; its exit code.
    fn exec(
        &self,
        id: &ContainerId,
        command: &[String],
        timeout: Duration,
    ) -> impl Future<Output = Result<i32, ExecError>>;

    /// Opens a TCP connection to a port on the container's own loopback, from inside its network
    /// namespace.
    fn connect(
        &self,
        id: &ContainerId,
        port: u16,
        timeout: Duration,
    ) -> impl Future<Output = std::io::Result<tokio::net::TcpStream>>;

    /// Waits until some container changes by itself (ends). Cancel safe; may report spuriously; the
    /// caller lists again.
    fn changed(&self) -> impl Future<Output = ()>;
}

/// Why a container did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The image or manifest asks for something that this image or device cannot give (unknown user, no
    /// such command, missing bind source). Trying again will not help.
    #[error("{0}")]
    Refused(String),
    /// The device's policy does not allow it, or cannot be read. That may change.
    #[error("{0}")]
    Denied(String),
    /// A device node that it needs is not there. That may change.
    #[error("{0}")]
    DeviceMissing(String),
    /// Its reading and writing of disks cannot be limited as asked: no such disk, or not with this kernel. Trying again
    /// will not help.
    #[error("{0}")]
    IoLimit(String),
    /// The helper that starts containers failed.
    #[error("failed to start container {id}: {message}")]
    Failed {
        /// Which container.
        id: String,
        /// What the helper said.
        message: String,
    },
    /// The operating system refused something.
    #[error("failed to {act}")]
    Io {
        /// What was tried, naming the path.
        act: String,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
}

/// Why a container did not stop.
#[derive(Debug, thiserror::Error)]
pub enum StopError {
    /// It would not die.
    #[error("container {0} survived SIGKILL")]
    Survived(String),
    /// The operating system refused something.
    #[error("failed to {act}")]
    Io {
        /// What was tried.
        act: String,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
}

/// Why a container was not removed.
#[derive(Debug, thiserror::Error)]
pub enum RemoveError {
    /// It would not die.
    #[error(transparent)]
    Stop(#[from] StopError),
    /// The operating system refused something.
    #[error("failed to {act}")]
    Io {
        /// What was tried, naming the path.
        act: String,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
}

/// Why containers could not be listed.
#[derive(Debug, thiserror::Error)]
#[error("failed to read {path}")]
pub struct ListError {
    /// Where.
    pub path: PathBuf,
    /// Why not.
    #[source]
    pub source: std::io::Error,
}

/// Why a command could not be run in a container.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    /// There is no such running container.
    #[error("container {0} does not run")]
    NotRunning(String),
    /// It took too long and was killed.
    #[error("command did not end within {0:?}")]
    Timeout(Duration),
    /// It could not be started.
    #[error("failed to run the command: {0}")]
    Failed(String),
}
