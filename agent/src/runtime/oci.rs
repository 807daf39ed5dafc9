//! The real runtime: libcontainer in short-lived processes of their own, foreshore-shim as each container's parent.
//!
//! What is on disk, below the run directory (nothing of it means anything after a reboot):
//!
//! ```text
//! containers/{id}/       one directory per container; see `request` for its files
//! containers/{id}.new/   being written by `start`; not a container yet
//! containers/{id}.gone/  being deleted by `remove`; no container any more
//! ```
//!
//! and below the state directory:
//!
//! ```text
//! volumes/{app}/{volume}/          named volumes; never deleted here
//! logs/{app}/{service}.log[.N]     output of every instance of the service, oldest in the highest N
//! containers/{id}/                 the writable layer of a container whose root is not read-only
//! bin/foreshore-shim-{digest}      the shim program, one file for all so that its pages are shared
//! ```
//!
//! Cgroups are `{parent}/{id}` in every hierarchy. Nothing is ever mounted in the device's own mount namespace.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use foreshore_killpoint as killpoint;
use foreshore_protocol::manifest::{NetworkMode, Service};
use foreshore_protocol::{AppName, Digest, ServiceName};

use super::cgroup::Cgroups;
use super::ids::Ids;
use super::process::{Identity, PidFd, boot_id};
use super::request::{REQUEST, Request, read_json};
use super::seal::Program;
use super::{
    Container, ContainerId, ContainerSpec, ExecError, ListError, RemoveError, Runtime, StartError,
    StopError, io_limits, secrets,
};
pub use holders::holders;
use watch::Watch;

use crate::policy;

mod children;
mod connection;
mod creation;
mod end;
mod holders;
mod logs;
mod observation;
mod watch;

/// How long a start may take. Far more than any start needs; a device under full load must not fail for it.
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// The shim program for this architecture.
#[cfg(foreshore_shim)]
static SHIM: &[u8] = include_bytes!(env!("FORESHORE_SHIM"));
#[cfg(not(foreshore_shim))]
static SHIM: &[u8] = b"";

/// Where an [`OciRuntime`] keeps its things.
#[derive(Debug, Clone)]
pub struct OciConfig {
    /// What is void after a reboot; best on a tmpfs. Made if missing.
    pub run_dir: PathBuf,
    /// Volumes, logs, writable layers. Made if missing.
    pub state_dir: PathBuf,
    /// Below each cgroup hierarchy, for example `foreshore`; of this agent alone.
    pub cgroup_parent: String,
    /// The agent's own program, whose `shim` and `exec` subcommands are run.
    pub agent_exe: PathBuf,
    /// Whether containers get user namespaces.
    pub user_namespaces: UserNamespaces,
    /// What apps may ask for; read at every start.
    pub policy: policy::Source,
}

/// Whether containers get user namespaces of their own. Only the device's owner decides that, no manifest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum UserNamespaces {
    /// Where kernel and file systems can; elsewhere containers run without, and the log says why.
    #[default]
    Auto,
    /// Never.
    Off,
}

/// Why an [`OciRuntime`] cannot work on this device.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// The operating system refused something.
    #[error("failed to {act}")]
    Io {
        /// What was tried, naming the path.
        act: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// There is no foreshore-shim for this architecture.
    #[error(
        "this build cannot run containers: there is no foreshore-shim for {0}; use an agent for x86_64 or aarch64"
    )]
    NoShim(&'static str),
}

/// Names what was tried.
trait Act<T> {
    fn act(self, act: impl FnOnce() -> String) -> Result<T, SetupError>;
}

impl<T> Act<T> for io::Result<T> {
    fn act(self, act: impl FnOnce() -> String) -> Result<T, SetupError> {
        self.map_err(|source| SetupError::Io { act: act(), source })
    }
}

/// Containers through libcontainer. Holds no state that matters: everything is found again from disk and kernel.
#[derive(Debug)]
pub struct OciRuntime {
    config: OciConfig,
    cgroups: Cgroups,
    shim: PathBuf,
    /// The agent's own program, as its children execute it.
    program: Program,
    boot_id: String,
    /// The agent's own network namespace, to come back to.
    network: File,
    /// Containers whose `start` is under way here: neither broken nor running yet.
    starting: Mutex<BTreeSet<ContainerId>>,
    ids: Mutex<Ids>,
    /// Services that cannot have a user namespace on this device, and why, by their digests.
    unmappable: Mutex<BTreeMap<Digest, String>>,
    watch: Watch,
}

impl OciRuntime {
    /// Prepares directories and the shim program, and sweeps what earlier runs left unfinished. Running containers are
    /// left alone. The caller holds the lock of the state directory ([`crate::state::lock`]): a start that is under way
    /// elsewhere would lose its directory.
    ///
    /// # Errors
    ///
    /// See [`SetupError`].
    pub fn new(config: OciConfig) -> Result<Self, SetupError> {
        if SHIM.is_empty() {
            return Err(SetupError::NoShim(std::env::consts::ARCH));
        }
        for (dir, mode) in [
            (config.run_dir.join("containers"), 0o700),
            (config.state_dir.join("containers"), 0o700),
            (config.state_dir.join("volumes"), 0o711),
            (config.state_dir.join("logs"), 0o750),
        ] {
            make_dir(&dir, mode).act(|| format!("create {}", dir.display()))?;
        }
        let cgroups = Cgroups::find(&config.cgroup_parent)
            .act(|| "find the cgroup hierarchies".to_owned())?;
        let runtime = Self {
            shim: install_shim(&config.state_dir).act(|| {
                format!(
                    "install foreshore-shim below {}",
                    config.state_dir.join("bin").display()
                )
            })?,
            program: Program::seal(&config.agent_exe)
                .act(|| format!("make a read-only copy of {}", config.agent_exe.display()))?,
            boot_id: boot_id().act(|| "read the boot id".to_owned())?,
            network: File::open("/proc/thread-self/ns/net")
                .act(|| "open the network namespace".to_owned())?,
            starting: Mutex::default(),
            ids: Mutex::new(Ids::load(&config.state_dir, ranges(&config.run_dir))),
            unmappable: Mutex::default(),
            watch: Watch::new().act(|| "make an epoll instance".to_owned())?,
            cgroups,
            config,
        };
        runtime.sweep();
        Ok(runtime)
    }

    /// Removes this agent's cgroup parents if nothing is in them. For a clean end of the last agent on a device; they
    /// are made again when needed.
    pub fn remove_empty_cgroups(&self) {
        self.cgroups.remove_ancestors();
    }

    /// The first of the ids that a container's user namespace maps to, or why it has none; `None` for a container that does
    /// not exist or cannot be read.
    #[must_use]
    pub fn user_namespace(&self, id: &ContainerId) -> Option<Result<u32, String>> {
        user_namespace(&self.config.run_dir, &id.to_string())
    }

    fn containers(&self) -> PathBuf {
        self.config.run_dir.join("containers")
    }

    fn dir(&self, id: &ContainerId) -> PathBuf {
        self.containers().join(id.to_string())
    }

    fn writable(&self, id: &str) -> PathBuf {
        self.config.state_dir.join("containers").join(id)
    }

    /// Deletes unfinished directories, writable layers without a container, and empty cgroups without a container.
    fn sweep(&self) {
        for name in names(&self.containers()) {
            let path = self.containers().join(&name);
            // Nobody else is at work here: whoever makes a runtime holds the lock of the state directory.
            if name.ends_with(".gone") || name.ends_with(".new") {
                let _ = fs::remove_dir_all(path);
            }
        }
        let known = |name: &str| self.containers().join(name).exists();
        for name in names(&self.config.state_dir.join("containers")) {
            if !known(&name) {
                let _ = fs::remove_dir_all(self.writable(&name));
            }
        }
        for name in self.cgroups.names() {
            if name.parse::<ContainerId>().is_err() || known(&name) {
                continue;
            }
            // Processes there were started by somebody else with the same parent, or their records were deleted by
            // hand. Killing them unasked could hit a healthy container of another agent.
            if self.cgroups.populated(&name).unwrap_or(true) {
                tracing::warn!(cgroup = %self.cgroups.path(&name), "a cgroup holds processes but no container of this agent");
            } else {
                let _ = self.cgroups.remove(&name);
            }
        }
    }

    fn starting(&self) -> std::sync::MutexGuard<'_, BTreeSet<ContainerId>> {
        lock(&self.starting)
    }
}

/// Takes a container off the list of those being started, however the start ends.
struct Starting<'a>(&'a OciRuntime, &'a ContainerId);

impl Drop for Starting<'_> {
    fn drop(&mut self) {
        self.0.starting().remove(self.1);
    }
}

impl Runtime for OciRuntime {
    async fn start(&self, spec: &ContainerSpec) -> Result<(), StartError> {
        let id = spec.id.to_string();
        let failed = |message: String| StartError::Failed {
            id: id.clone(),
            message,
        };
        if spec.layers.is_empty() {
            return Err(StartError::Refused("the image has no layers".to_owned()));
        }
        let grant = self.grant(spec)?;
        if self.dir(&spec.id).exists() || !self.starting().insert(spec.id.clone()) {
            return Err(failed("it exists already; remove it first".to_owned()));
        }
        let starting = Starting(self, &spec.id);
        self.cgroups.prepare().map_err(|source| StartError::Io {
            act: format!("prepare cgroup parent {}", self.config.cgroup_parent),
            source,
        })?;
        let environment = self.check_secrets(spec)?;
        let create = || {
            self.create_dir(spec, &grant, environment.clone())
                .map_err(|source| StartError::Io {
                    act: format!("create {}", self.dir(&spec.id).display()),
                    source,
                })
        };
        let mut outcome = children::start(&self.program, &create()?, START_TIMEOUT).await;
        if let children::Outcome::Unmappable(reason) = &outcome {
            tracing::warn!(container = %spec.id, %reason, "starts without a user namespace");
            lock(&self.unmappable).insert(spec.service_digest, reason.clone());
            let removed = self.remove(&spec.id).await;
            removed.map_err(|error| failed(error.to_string()))?;
            outcome = children::start(&self.program, &create()?, START_TIMEOUT).await;
        }
        killpoint::reached("container", "reported");
        drop(starting);
        let error = match outcome {
            children::Outcome::Started => {
                if let Ok(Some(record)) = self.record(&spec.id)
                    && let Some(shim) = record.shim
                {
                    self.watch.add(shim);
                }
                return Ok(());
            }
            children::Outcome::Refused(refusal) => StartError::Refused(refusal),
            children::Outcome::Denied(message) => StartError::Denied(message),
            children::Outcome::Missing(message) => StartError::DeviceMissing(message),
            children::Outcome::IoLimit(message) => StartError::IoLimit(message),
            children::Outcome::Unmappable(message) => failed(message),
            children::Outcome::Failed(message) => failed(message),
        };
        if let Err(left) = self.remove(&spec.id).await {
            tracing::warn!(container = %spec.id, error = %left, "failed to clean up after a failed start");
        }
        Err(error)
    }

    async fn stop(&self, id: &ContainerId, signal: i32, grace: Duration) -> Result<(), StopError> {
        let name = id.to_string();
        let looked = |source| io_stop("look at", &name, source);
        let Some(record) = self.current_record(id).map_err(looked)? else {
            return Ok(());
        };
        if self.exit(id).map_err(looked)?.is_none()
            && let Some(shim) = open(record.shim).map_err(looked)?
            && let Some(init) = open(record.container).map_err(looked)?
        {
            init.signal(signal)
                .map_err(|source| io_stop("signal", &name, source))?;
            killpoint::reached("container", "signalled");
            if watch::ended(shim.fd(), grace)
                .await
                .map_err(|source| io_stop("wait for", &name, source))?
            {
                if let Some(shim) = record.shim {
                    shim.reap();
                }
                return Ok(());
            }
        }
        self.kill(id).await
    }

    async fn renew_secrets(
        &self,
        id: &ContainerId,
        service: &Service,
        values: &secrets::Values,
        signals: &BTreeSet<i32>,
    ) -> Result<(), StopError> {
        let name = id.to_string();
        let record = self
            .current_record(id)
            .map_err(|source| io_stop("look at", &name, source))?;
        let Some(init) = open(record.and_then(|record| record.container))
            .map_err(|source| io_stop("look at", &name, source))?
        else {
            return Ok(());
        };
        // Signals first would be answered by reading the old files; after a crash in between both are done again.
        secrets::renew(&self.dir(id), service, values, || {
            signals.iter().try_for_each(|signal| init.signal(*signal))
        })
        .map_err(|source| io_stop("renew the secrets of", &name, source))
    }

    async fn remove(&self, id: &ContainerId) -> Result<(), RemoveError> {
        let (name, dir) = (id.to_string(), self.dir(id));
        let io_error = |path: &Path| {
            let act = format!("remove {}", path.display());
            move |source| RemoveError::Io { act, source }
        };
        self.kill(id).await?;
        killpoint::reached("container", "killed");
        self.remove_cgroup(&name)
            .await
            .map_err(io_error(Path::new(&self.cgroups.path(&name))))?;
        killpoint::reached("container", "cgroup-gone");
        let writable = self.writable(&name);
        if writable.exists() {
            // As large as the container made it; everything else must not wait for it.
            let path = writable.clone();
            tokio::task::spawn_blocking(move || remove_dir(&path))
                .await
                .unwrap_or_else(|error| Err(io::Error::other(error)))
                .map_err(io_error(&writable))?;
            killpoint::reached("container", "layer-gone");
        }
        // In one step: a directory is a container, or it is not.
        let gone = self.containers().join(format!("{name}.gone"));
        remove_dir(&gone).map_err(io_error(&gone))?;
        match fs::rename(&dir, &gone) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(io_error(&dir)(error)),
            Ok(()) => {
                killpoint::reached("container", "moved-away");
                remove_dir(&gone).map_err(io_error(&gone))?;
                killpoint::reached("container", "gone");
            }
        }
        if self.starting().is_empty() && names(&self.containers()).is_empty() {
            self.cgroups.remove_parent();
        }
        Ok(())
    }

    async fn list(&self) -> Result<Vec<Container>, ListError> {
        let path = self.containers();
        let entries = fs::read_dir(&path).map_err(|source| ListError {
            path: path.clone(),
            source,
        })?;
        let mut ids: Vec<ContainerId> = entries
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .filter(|id| !self.starting().contains(id))
            .collect();
        ids.sort();
        ids.into_iter()
            .filter_map(|id| {
                let path = self.dir(&id);
                let observed = self.observe(id);
                observed
                    .map_err(|source| ListError { path, source })
                    .transpose()
            })
            .collect()
    }

    async fn remove_logs(&self, keep: &BTreeSet<(AppName, ServiceName)>) {
        logs::remove_others(&self.config.state_dir.join("logs"), keep);
    }

    async fn exec(
        &self,
        id: &ContainerId,
        command: &[String],
        timeout: Duration,
    ) -> Result<i32, ExecError> {
        let runs = self.runs(id).map_err(|error| {
            ExecError::Failed(format!("failed to look at container {id}: {error}"))
        })?;
        if !runs {
            return Err(ExecError::NotRunning(id.to_string()));
        }
        children::exec(&self.program, &self.dir(id), command, timeout).await
    }

    async fn connect(
        &self,
        id: &ContainerId,
        port: u16,
        timeout: Duration,
    ) -> io::Result<tokio::net::TcpStream> {
        let init = self.current_record(id)?.and_then(|record| record.container);
        let init = match open(init)? {
            Some(fd) if self.runs(id)? => fd,
            _ => {
                let message = format!("container {id} does not run");
                return Err(io::Error::new(io::ErrorKind::NotFound, message));
            }
        };
        let request: Request = read_json(&self.dir(id).join(REQUEST))?;
        // With the device's network there is nowhere to go.
        let network = (request.service.network_mode == NetworkMode::None).then_some(&init);
        connection::connect(network, &self.network, port, timeout).await
    }

    async fn changed(&self) {
        self.watch.changed().await;
    }
}

/// What is inside is right whatever a panicking holder did: each change is one call.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The same as [`OciRuntime::user_namespace`], from outside of the agent: reads only.
#[must_use]
pub fn user_namespace(run_dir: &Path, id: &str) -> Option<Result<u32, String>> {
    let request = run_dir.join("containers").join(id).join(REQUEST);
    let request = read_json::<Request>(&request).ok()?;
    Some(
        request
            .base
            .ok_or_else(|| request.unmapped.unwrap_or_default()),
    )
}

/// Why the weights under `blkio_config` of a container have no effect now, if they have none; reads only.
#[must_use]
pub fn without_io_weights(run_dir: &Path, id: &str) -> Option<String> {
    let request = run_dir.join("containers").join(id).join(REQUEST);
    let request = read_json::<Request>(&request).ok()?;
    io_limits::without_weights(&request.service.blkio_config, &request.state)
}

/// The ranges of ids that containers of this agent have.
fn ranges(run_dir: &Path) -> BTreeMap<AppName, u32> {
    let containers = run_dir.join("containers");
    let requests = names(&containers)
        .into_iter()
        .filter_map(|name| read_json::<Request>(&containers.join(name).join(REQUEST)).ok());
    requests
        .filter_map(|request| Some((request.id.app, request.base?)))
        .collect()
}

fn open(process: Option<Identity>) -> io::Result<Option<PidFd>> {
    process.map_or(Ok(None), |process| process.open())
}

fn io_stop(verb: &str, name: &str, source: io::Error) -> StopError {
    StopError::Io {
        act: format!("{verb} container {name}"),
        source,
    }
}

fn make_dir(path: &Path, mode: u32) -> io::Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(mode)
        .create(path)
}

fn remove_dir(path: &Path) -> io::Result<()> {
    // A shim that is about to be gone may write its last file in between.
    let mut tries = 0..10;
    loop {
        match fs::remove_dir_all(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error)
                if error.kind() == io::ErrorKind::DirectoryNotEmpty && tries.next().is_some() => {}
            other => return other,
        }
    }
}

/// The names in a directory; none when it cannot be read.
fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect()
}

/// Puts the shim program into `bin`, named by its content; a file that is there and right is kept.
///
/// In the state directory because systems mount the run directory's file system `noexec`.
fn install_shim(state_dir: &Path) -> io::Result<PathBuf> {
    let bin = state_dir.join("bin");
    let hex = Digest::of(SHIM).hex();
    let path = bin.join(format!("foreshore-shim-{}", hex.get(..16).unwrap_or(&hex)));
    if fs::read(&path).is_ok_and(|present| present == SHIM) {
        return Ok(path);
    }
    make_dir(&bin, 0o755)?;
    // What an agent that was cut here before has left.
    for name in names(&bin) {
        if name.starts_with("new.") {
            fs::remove_file(bin.join(name))?;
        }
    }
    let temporary = bin.join(format!("new.{}", std::process::id()));
    let mut file = File::create(&temporary)?;
    killpoint::reached("shim-program", "created");
    file.write_all(SHIM)?;
    file.set_permissions(fs::Permissions::from_mode(0o555))?;
    file.sync_all()?;
    drop(file);
    killpoint::reached("shim-program", "synced");
    fs::rename(&temporary, &path)?;
    killpoint::reached("shim-program", "renamed");
    Ok(path)
}
