//! What each test of the runtime gets: its own directories, cgroup parent and image layer, gone at the end.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use foreshore_agent::policy::Source;
use foreshore_agent::runtime::oci::{OciConfig, OciRuntime, UserNamespaces};
use foreshore_agent::runtime::{
    Container, ContainerId, ContainerSpec, ContainerState, Exit, ImageConfig, Runtime, StartError,
};
use foreshore_protocol::Digest;
use foreshore_protocol::manifest::Service;
use serde_json::{Value, json};

/// How long a condition may take to come true on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// Long enough for anything, never waited for.
pub(crate) const LONG: Duration = Duration::from_secs(60);

/// One agent's place on this machine.
#[derive(Debug)]
pub(crate) struct Bed {
    /// Everything is below here.
    pub(crate) dir: tempfile::TempDir,
    /// The cgroup parent, relative to each hierarchy.
    pub(crate) cgroup: String,
    /// The image: busybox.
    pub(crate) layer: PathBuf,
    next: AtomicU64,
}

impl Bed {
    /// Needs root and busybox.
    pub(crate) fn new() -> Self {
        assert!(
            nix::unistd::geteuid().is_root(),
            "these tests start containers: run them as root"
        );
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let dir = tempfile::Builder::new()
            .prefix("foreshore-runtime-")
            .tempdir()
            .unwrap();
        let layer = dir.path().join("layer");
        build_layer(&layer);
        let cgroup = format!("fs-test-{}-{count}", std::process::id());
        let bed = Self {
            dir,
            cgroup,
            layer,
            next: AtomicU64::new(1),
        };
        let binds = bed.dir.path().display();
        bed.policy(&format!(
            "host_network = true\nbinds = [{{path = \"{binds}\", read_only = false}}, {{path = \"/no\", read_only = false}}]\n"
        ));
        bed
    }

    /// With a run directory in memory, as devices have it.
    pub(crate) fn in_memory() -> Self {
        use nix::mount::{MsFlags, mount};
        let bed = Self::new();
        std::fs::create_dir(bed.run_dir()).unwrap();
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        let options = Some("mode=0755");
        mount(Some("tmpfs"), &bed.run_dir(), Some("tmpfs"), flags, options).unwrap();
        bed
    }

    /// What the owner of the device lets apps do, from now on.
    pub(crate) fn policy(&self, text: &str) {
        std::fs::write(self.policy_source().path, text).unwrap();
    }

    pub(crate) fn policy_source(&self) -> Source {
        Source {
            path: self.dir.path().join("policy.toml"),
            required: true,
            own: vec![self.state_dir(), self.run_dir()],
        }
    }

    /// The runtime of this place; call it again for what a restarted agent sees.
    pub(crate) fn runtime(&self) -> OciRuntime {
        self.runtime_with(Path::new(env!("CARGO_BIN_EXE_foreshore-agent")))
    }

    /// The same with user namespaces or without.
    pub(crate) fn runtime_in(&self, user_namespaces: UserNamespaces) -> OciRuntime {
        self.runtime_of(
            Path::new(env!("CARGO_BIN_EXE_foreshore-agent")),
            user_namespaces,
        )
    }

    /// The same with another program in the agent's place.
    pub(crate) fn runtime_with(&self, agent_exe: &Path) -> OciRuntime {
        self.runtime_of(agent_exe, UserNamespaces::Auto)
    }

    /// With both.
    pub(crate) fn runtime_of(
        &self,
        agent_exe: &Path,
        user_namespaces: UserNamespaces,
    ) -> OciRuntime {
        OciRuntime::new(OciConfig {
            run_dir: self.run_dir(),
            state_dir: self.state_dir(),
            cgroup_parent: self.cgroup.clone(),
            agent_exe: agent_exe.to_owned(),
            user_namespaces,
            policy: self.policy_source(),
        })
        .unwrap()
    }

    pub(crate) fn run_dir(&self) -> PathBuf {
        self.dir.path().join("run")
    }

    pub(crate) fn state_dir(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    pub(crate) fn container_dir(&self, id: &ContainerId) -> PathBuf {
        self.run_dir().join("containers").join(id.to_string())
    }

    /// A container of service `web` that runs a shell line; `more` is merged into the service.
    pub(crate) fn shell(&self, line: &str, more: Value) -> ContainerSpec {
        self.spec("web", &json!(["sh", "-c", line]), more)
    }

    /// A container with a command; `more` is merged into the service.
    pub(crate) fn spec(&self, service: &str, command: &Value, more: Value) -> ContainerSpec {
        let mut value = json!({"image": "test", "command": command, "mem_limit": "64m"});
        let (Value::Object(into), Value::Object(from)) = (&mut value, more) else {
            panic!("objects")
        };
        into.extend(from);
        let service_spec: Service = serde_json::from_value(value).unwrap();
        ContainerSpec {
            id: ContainerId {
                app: "shop".parse().unwrap(),
                service: service.parse().unwrap(),
                instance: self.next.fetch_add(1, Ordering::Relaxed),
            },
            release: Digest::of(b"release"),
            service_digest: foreshore_protocol::release::service_digest(&service_spec),
            service: service_spec,
            image: ImageConfig {
                env: vec!["FROM_IMAGE=yes".to_owned()],
                ..ImageConfig::default()
            },
            layers: vec![self.layer.clone()],
            secrets: std::collections::BTreeMap::new(),
        }
    }

    /// Everything a service has logged: time and stream cut off, pieces of a line put together.
    pub(crate) fn log(&self, service: &str) -> String {
        let text = std::fs::read_to_string(self.log_file(service)).unwrap_or_default();
        let mut out = String::new();
        for line in text.lines() {
            let mut parts = line.splitn(4, ' ');
            let (time, stream) = (parts.next().unwrap(), parts.next().unwrap_or_default());
            assert!(
                time.len() == 30 && time.ends_with('Z'),
                "not a log line: {line:?}"
            );
            assert!(
                matches!(stream, "stdout" | "stderr"),
                "not a log line: {line:?}"
            );
            let full = parts.next() == Some("F");
            out.push_str(parts.next().unwrap_or_default());
            if full {
                out.push('\n');
            }
        }
        out
    }

    pub(crate) fn log_file(&self, service: &str) -> PathBuf {
        self.state_dir().join(format!("logs/shop/{service}.log"))
    }

    /// The directories of a container's cgroups that exist.
    pub(crate) fn cgroups(&self, id: &str) -> Vec<PathBuf> {
        hierarchies()
            .into_iter()
            .map(|mount| mount.join(&self.cgroup).join(id))
            .filter(|dir| dir.exists())
            .collect()
    }

    /// The contents of a file of a container's cgroup, from whichever hierarchy has it.
    pub(crate) fn cgroup_file(&self, id: &ContainerId, name: &str) -> String {
        self.cgroups(&id.to_string())
            .into_iter()
            .find_map(|dir| std::fs::read_to_string(dir.join(name)).ok())
            .unwrap_or_else(|| panic!("no cgroup of {id} has {name}"))
    }

    /// Fails unless nothing is left of any container.
    pub(crate) fn assert_clean(&self) {
        let left: Vec<_> = std::fs::read_dir(self.run_dir().join("containers"))
            .unwrap()
            .flatten()
            .collect();
        assert!(left.is_empty(), "left in the run directory: {left:?}");
        let left: Vec<_> = std::fs::read_dir(self.state_dir().join("containers"))
            .unwrap()
            .flatten()
            .collect();
        assert!(left.is_empty(), "left in the state directory: {left:?}");
        assert_eq!(self.cgroups(""), Vec::<PathBuf>::new(), "cgroups are left");
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        let own = self.dir.path().to_str().unwrap();
        let run = self.run_dir();
        let run = format!(" {} ", run.display());
        let left: Vec<_> = mounts
            .lines()
            .filter(|line| line.contains(own) && !line.contains(&run))
            .collect();
        assert!(left.is_empty(), "mounts are left: {left:?}");
        // A program that this one is about to run still has its descriptors for a moment, other tests' too.
        let deadline = Instant::now() + PATIENCE;
        while !processes_naming(own).is_empty() {
            assert!(
                Instant::now() < deadline,
                "processes are left: {:?}",
                processes_naming(own)
            );
            std::thread::yield_now();
        }
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        // Not on this thread: a test's own tokio runtime may be on it.
        let runtime = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.runtime()));
        if let Ok(runtime) = runtime {
            std::thread::scope(|scope| {
                let cleaning = scope.spawn(|| {
                    let tokio = tokio::runtime::Builder::new_current_thread()
                        .enable_all()
                        .build()
                        .unwrap();
                    tokio.block_on(async {
                        for container in runtime.list().await.unwrap_or_default() {
                            let _ = runtime.remove(&container.id).await;
                        }
                    });
                    runtime.remove_empty_cgroups();
                });
                let _ = cleaning.join();
            });
        }
        // Nothing is mounted there unless the run directory is in memory.
        let _ = nix::mount::umount2(&self.run_dir(), nix::mount::MntFlags::MNT_DETACH);
    }
}

/// The mount points of the cgroup hierarchies.
pub(crate) fn hierarchies() -> Vec<PathBuf> {
    let mountinfo = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let points = mountinfo
        .lines()
        .filter(|line| line.contains(" - cgroup"))
        .filter_map(|line| line.split(' ').nth(4));
    points.map(PathBuf::from).collect()
}

/// Processes that name `text` in their command line or have a descriptor open below it; not this one.
pub(crate) fn processes_naming(text: &str) -> Vec<i32> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse::<i32>().ok())
        else {
            continue;
        };
        if pid.unsigned_abs() == std::process::id() {
            continue;
        }
        let command = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let fds = std::fs::read_dir(entry.path().join("fd"))
            .into_iter()
            .flatten()
            .flatten();
        let holds = fds
            .filter_map(|fd| std::fs::read_link(fd.path()).ok())
            .any(|target| target.to_string_lossy().contains(text));
        if holds || String::from_utf8_lossy(&command).contains(text) {
            found.push(pid);
        }
    }
    found
}

fn build_layer(layer: &Path) {
    const APPLETS: &[&str] = &[
        "sh", "cat", "cp", "chmod", "chown", "date", "dd", "echo", "env", "false", "grep", "head",
        "httpd", "hostname", "id", "ip", "kill", "ln", "ls", "mkdir", "mknod", "mount", "mv", "nc",
        "printf", "ps", "pwd", "rm", "seq", "setsid", "sleep", "stat", "tail", "test", "timeout",
        "touch", "true", "umount", "unshare", "usleep", "wc", "yes",
    ];
    for dir in ["bin", "etc", "tmp", "srv/data", "var"] {
        std::fs::create_dir_all(layer.join(dir)).unwrap();
    }
    let busybox = ["/bin/busybox", "/usr/bin/busybox"]
        .into_iter()
        .find(|path| Path::new(path).exists());
    let busybox = busybox.expect("install busybox-static, or run cargo xtask test");
    std::fs::copy(busybox, layer.join("bin/busybox")).unwrap();
    for applet in APPLETS {
        std::os::unix::fs::symlink("busybox", layer.join("bin").join(applet)).unwrap();
    }
    std::fs::write(
        layer.join("etc/passwd"),
        "root:x:0:0::/root:/bin/sh\napp:x:1000:1001::/srv:/bin/sh\n",
    )
    .unwrap();
    std::fs::write(
        layer.join("etc/group"),
        "root:x:0:\napp:x:1001:\ndialout:x:20:app\n",
    )
    .unwrap();
    std::os::unix::fs::chown(layer.join("srv/data"), Some(1000), Some(1001)).unwrap();
}

/// Waits for a condition; fails with `what` when it does not come true.
pub(crate) async fn wait_for<F: Future<Output = bool>>(
    what: &str,
    mut condition: impl FnMut() -> F,
) {
    let deadline = Instant::now() + PATIENCE;
    while !condition().await {
        assert!(
            Instant::now() < deadline,
            "did not happen within {PATIENCE:?}: {what}"
        );
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// The container as `list` shows it.
pub(crate) async fn find(runtime: &OciRuntime, id: &ContainerId) -> Option<Container> {
    runtime
        .list()
        .await
        .unwrap()
        .into_iter()
        .find(|container| container.id == *id)
}

/// Waits for a container's end, woken by the runtime and not by a timer.
pub(crate) async fn exit_of(runtime: &OciRuntime, id: &ContainerId) -> Exit {
    let wait = async {
        loop {
            match find(runtime, id).await.map(|container| container.state) {
                Some(ContainerState::Exited(exit)) => return exit,
                Some(ContainerState::Running { .. }) => runtime.changed().await,
                other => panic!("{id} is {other:?}"),
            }
        }
    };
    tokio::time::timeout(PATIENCE, wait)
        .await
        .unwrap_or_else(|_| panic!("{id} did not end"))
}

/// Starts, waits for the end, and gives the exit and the log; then removes.
pub(crate) async fn run(bed: &Bed, spec: &ContainerSpec) -> (Exit, String) {
    let runtime = bed.runtime();
    let _ = std::fs::remove_file(bed.log_file(spec.id.service.as_str()));
    runtime
        .start(spec)
        .await
        .unwrap_or_else(|error| panic!("{}: {error:?}", spec.id));
    let exit = exit_of(&runtime, &spec.id).await;
    let log = bed.log(spec.id.service.as_str());
    runtime.remove(&spec.id).await.unwrap();
    (exit, log)
}

/// Starts a container that must be refused; the refusal.
pub(crate) async fn refusal(bed: &Bed, spec: &ContainerSpec) -> String {
    match bed.runtime().start(spec).await {
        Err(StartError::Refused(refusal)) => refusal,
        other => panic!("{}: {other:?}", spec.id),
    }
}

/// The first process of a running container.
pub(crate) async fn pid_of(runtime: &OciRuntime, id: &ContainerId) -> i32 {
    match find(runtime, id).await.map(|container| container.state) {
        Some(ContainerState::Running { pid, .. }) => pid,
        other => panic!("{id} is {other:?}"),
    }
}

/// The pid of a container's shim, from its record.
pub(crate) fn shim_of(bed: &Bed, id: &ContainerId) -> i32 {
    let record = std::fs::read(bed.container_dir(id).join("record.json")).unwrap();
    let record: Value = serde_json::from_slice(&record).unwrap();
    i32::try_from(record["shim"]["pid"].as_i64().unwrap()).unwrap()
}

pub(crate) fn kill9(pid: i32) {
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(pid),
        nix::sys::signal::Signal::SIGKILL,
    )
    .unwrap();
}
