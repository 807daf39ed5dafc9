//! What the agent and the processes it starts for containers tell each other, and the files of a container
//! in the run directory:
//!
//! | file | written by | content |
//! |---|---|---|
//! | `request.json` | agent | [`Request`] |
//! | `record.json` | agent, then the starting process | [`Record`] |
//! | `config.json` | the starting process | the OCI runtime configuration |
//! | `secrets/`, `secrets.json` | agent | see [`super::secrets`] |
//! | `exit` | foreshore-shim | the exit code |
//!
//! None of them is synced to disk: all are void after a reboot, and the record says which boot it is of.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use foreshore_protocol::Digest;
use foreshore_protocol::manifest::Service;
use foreshore_protocol::secret::SecretValue;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::process::Identity;
use super::{ContainerId, ImageConfig};
use crate::policy::Grant;

/// The name of the [`Request`] file.
pub(crate) const REQUEST: &str = "request.json";
/// The name of the [`Record`] file.
pub(crate) const RECORD: &str = "record.json";
/// The name of the OCI runtime configuration.
pub(crate) const CONFIG: &str = "config.json";
/// The name of the exit file.
pub(crate) const EXIT: &str = "exit";
/// Where libcontainer keeps its own state.
pub(crate) const LIBRARY: &str = "lib";

/// The largest of these files that is read: a service has at most a 16 KiB manifest, an image configuration at
/// most 4 MiB.
const MAX_FILE: u64 = 8 << 20;

/// All that the starting process needs.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Request {
    pub(crate) id: ContainerId,
    pub(crate) service: Service,
    pub(crate) image: ImageConfig,
    /// What the device's policy allows to the app.
    #[serde(default)]
    pub(crate) grant: Grant,
    /// Lowest first.
    pub(crate) layers: Vec<PathBuf>,
    /// Below each hierarchy, beginning with `/`.
    pub(crate) cgroup: String,
    /// What the container's id 0 is outside; without it the container has no user namespace.
    pub(crate) base: Option<u32>,
    /// Why it has none.
    pub(crate) unmapped: Option<String>,
    /// Where the writable layer goes; missing for a read-only root.
    pub(crate) writable: Option<PathBuf>,
    /// Of this app.
    pub(crate) volumes: PathBuf,
    /// Of this app.
    pub(crate) logs: PathBuf,
    /// The directory of the app's update lock, for a service that may have it.
    pub(crate) update_lock: Option<PathBuf>,
    /// Variables that hold secrets.
    #[serde(default)]
    pub(crate) secret_environment: BTreeMap<String, SecretValue>,
    /// The foreshore-shim program.
    pub(crate) shim: PathBuf,
    /// Whether the kernel can limit swap.
    pub(crate) swap_limit: bool,
    /// On cgroup v2: the file that must say 0 before the container runs, if it exists.
    pub(crate) swap_file: Option<PathBuf>,
    /// On cgroup v2: the container's cgroup, which needs a device filter before the container runs.
    pub(crate) device_cgroup: Option<PathBuf>,
    /// On cgroup v2: the leaf that shims live in.
    pub(crate) shim_cgroup: Option<PathBuf>,
    /// The container's cgroup in every hierarchy.
    #[serde(default)]
    pub(crate) cgroups: Vec<PathBuf>,
    /// The directories of the agent's state, for limits on the disk that they are on.
    #[serde(default)]
    pub(crate) state: Vec<PathBuf>,
}

/// What is known about a container besides what the kernel says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) release: Digest,
    pub(crate) service_digest: Digest,
    pub(crate) boot_id: String,
    /// The starting process, which becomes foreshore-shim.
    pub(crate) shim: Option<Identity>,
    /// The container's first process; set before it is let run.
    pub(crate) container: Option<Identity>,
}

/// What the starting process says on its standard output: one line of JSON; the last one counts.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum StartReport {
    /// The container's process runs. End of file after this means that foreshore-shim runs too.
    Started,
    /// Trying again will not help.
    Refused(String),
    /// It would run without a user namespace.
    Unmappable(String),
    /// The device's policy does not allow it.
    Denied(String),
    /// A device node is not there.
    Missing(String),
    /// Its input and output cannot be limited as asked.
    IoLimit(String),
    /// Something else went wrong.
    Failed(String),
}

/// What `foreshore-agent exec` says on its standard output: one line of JSON.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum ExecReport {
    /// It ended with this code, or 128 + signal.
    Exited(i32),
    /// It was killed after the timeout.
    Timeout,
    /// It never ran.
    Failed(String),
}

/// Reads a JSON file of at most [`MAX_FILE`] bytes.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> io::Result<T> {
    let mut bytes = Vec::new();
    File::open(path)?.take(MAX_FILE).read_to_end(&mut bytes)?;
    serde_json::from_slice(&bytes)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

/// Writes a JSON file so that a reader sees all of the old or all of the new one. Only root can read it: requests and
/// configurations may hold secrets.
pub(crate) fn write_json<T: Serialize>(dir: &Path, name: &str, value: &T) -> io::Result<()> {
    let bytes = serde_json::to_vec(value).map_err(io::Error::other)?;
    let temporary = dir.join(format!("{name}.new"));
    let mut file = File::options()
        .create(true)
        .truncate(true)
        .write(true)
        .mode(0o600)
        .open(&temporary)?;
    file.write_all(&bytes)?;
    fs::rename(temporary, dir.join(name))
}
