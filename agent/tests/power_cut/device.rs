//! A device whose power is cut: a real agent with real containers, and what must be true of it after each cut.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use foreshore_agent::state::State;
use foreshore_images::store::Store;
use foreshore_protocol::message::{EventKind, Head, HeadApp, Phase};
use foreshore_protocol::release::Release;
use foreshore_protocol::{AppName, Digest, Version};

use crate::hub::Hub;
use crate::registry::Registry;

/// Far more than anything here takes.
const LONG: Duration = Duration::from_secs(90);

/// How long after everything is settled a kill point may still be reached: garbage is collected then.
const AFTERMATH: Duration = Duration::from_secs(2);

pub struct Device {
    dir: Option<tempfile::TempDir>,
    name: String,
    hub: Hub,
    registry: Registry,
    agent: Option<Child>,
    generation: u64,
    image: Option<Digest>,
    /// The highest instance number seen.
    instance: u64,
    /// How many times each point was passed in a life without a cut.
    pub passes: BTreeMap<String, u32>,
    /// Damage that this test did itself and the agent told.
    damaged: usize,
}

/// What came of a life with an order to die.
#[derive(Debug, PartialEq, Eq)]
pub enum Life {
    /// The kill point was reached.
    Cut,
    /// Everything settled and it was not.
    Whole,
}

impl Device {
    pub fn new(number: usize) -> Self {
        let dir = tempfile::Builder::new()
            .prefix("foreshore-cut-")
            .tempdir()
            .unwrap();
        let name = format!("cut-{}-{number}", std::process::id());
        let (hub, registry) = (Hub::start(&name.parse().unwrap()), Registry::start());
        fs::write(dir.path().join("token"), "join-token\n").unwrap();
        let text = format!(
            "device = \"{name}\"\n[hub]\nbroker = \"mqtt://127.0.0.1:{}\"\nregistry = \"{}\"\n\
             join_token_file = \"{dir}/token\"\nreport_interval = \"100ms\"\nreconnect_max = \"1s\"\n\
             [paths]\nstate = \"{dir}/state\"\nrun = \"{dir}/run\"\n[cgroup]\nparent = \"{name}\"\n",
            hub.port,
            registry.url,
            dir = dir.path().display(),
        );
        fs::write(dir.path().join("agent.toml"), text).unwrap();
        Self {
            dir: Some(dir),
            name,
            hub,
            registry,
            agent: None,
            generation: 0,
            image: None,
            instance: 0,
            passes: BTreeMap::new(),
            damaged: 0,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.as_ref().unwrap().path().join(name)
    }

    fn app(&self) -> AppName {
        self.name.parse().unwrap()
    }

    /// Assigns a release with an image that this device has never had.
    pub fn assign(&mut self) {
        self.generation += 1;
        let image = self.registry.image(&format!("{}", self.generation));
        self.image = Some(image);
        let service = serde_json::json!({
            "image": format!("hub.internal/app@{image}"),
            "read_only": false,
            "stop_grace_period": "5s",
        });
        let release = Release {
            schema: 1,
            app: self.app(),
            services: [(
                "web".parse().unwrap(),
                serde_json::from_value(service).unwrap(),
            )]
            .into(),
        };
        let (digest, version) = (release.digest(), self.version());
        self.hub
            .publish_release(&digest, release.to_canonical_json());
        self.hub.publish_head(&Head {
            version,
            apps: vec![HeadApp {
                app: self.app(),
                release: digest,
                since: version,
                soak_ms: 100,
                progress_deadline_ms: 80_000,
                override_lock: false,
            }],
        });
    }

    fn version(&self) -> Version {
        Version::from_numbers(1, self.generation).unwrap()
    }

    /// Makes it so that `point` will be reached.
    pub fn prepare(&mut self, point: &str) {
        let state = self.path("state");
        match point {
            "damaged.set-aside" | "damaged.durable" => {
                fs::write(state.join("counters"), b"FS garbage").unwrap();
                self.damaged += 1;
            }
            "unfinished.removed" => fs::write(state.join("head.new"), b"half").unwrap(),
            "layer.set-aside" => {
                // The record of a layer that the next image has, too: the one of busybox, which comes first in time.
                let layers = fs::read_dir(state.join("images/layers")).unwrap().flatten();
                for entry in layers.filter(|entry| entry.path().join("bin/busybox").exists()) {
                    fs::write(entry.path().with_extension("json"), b"{}").unwrap();
                }
            }
            "image.set-aside" => {
                let hex = self.image.unwrap().hex();
                let path = state.join(format!("images/images/{hex}.json"));
                fs::write(path, b"{}").unwrap();
            }
            point if point.starts_with("shim-program.") => {
                for entry in fs::read_dir(state.join("bin")).unwrap().flatten() {
                    fs::remove_file(entry.path()).unwrap();
                }
            }
            _ => {}
        }
    }

    pub fn start(&mut self, order: Option<&str>) {
        let log = fs::File::options()
            .create(true)
            .append(true)
            .open(self.path("agent.log"))
            .unwrap();
        let _none_yet = fs::remove_file(self.path("points"));
        let mut command = Command::new(env!("CARGO_BIN_EXE_foreshore-agent"));
        command
            .args(["run", "--config"])
            .arg(self.path("agent.toml"))
            .env("FORESHORE_KILL_LOG", self.path("points"))
            .env("RUST_LOG", "info")
            .stdin(Stdio::null())
            .stderr(log);
        if let Some(order) = order {
            command.env("FORESHORE_KILL_AT", order);
        }
        self.agent = Some(command.spawn().unwrap());
    }

    pub fn kill(&mut self) {
        if let Some(mut agent) = self.agent.take() {
            agent.kill().unwrap();
            agent.wait().unwrap();
        }
    }

    /// Waits until the order to die was carried out. True when it was the agent that died.
    pub fn await_cut(&mut self) -> (Life, bool) {
        let begin = Instant::now();
        let mut settled = None;
        loop {
            let agent = self.agent.as_mut().unwrap();
            let ended = agent.try_wait().unwrap();
            let points = fs::read_to_string(self.path("points")).unwrap_or_default();
            let cut = points.lines().any(|line| line.starts_with('!'));
            if let Some(status) = ended {
                assert!(cut, "the agent ended by itself: {status}\n{}", self.tail());
                self.agent = None;
                return (Life::Cut, true);
            }
            if cut && !self.agent_dies(&points) {
                return (Life::Cut, false);
            }
            self.check_at_most_one();
            if self.is_settled() {
                let since = *settled.get_or_insert_with(Instant::now);
                if since.elapsed() > AFTERMATH {
                    return (Life::Whole, false);
                }
            }
            assert!(
                begin.elapsed() < LONG,
                "neither cut nor settled:\n{}",
                self.tail()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Whether the process that was killed is the agent, or takes it along.
    fn agent_dies(&self, points: &str) -> bool {
        let cut = points.lines().find_map(|line| line.strip_prefix('!'));
        let agent = self.agent.as_ref().map(|agent| agent.id().to_string());
        cut.and_then(|line| line.rsplit_once(' '))
            .is_some_and(|(_, died)| died.split('+').any(|pid| Some(pid) == agent.as_deref()))
    }

    fn is_settled(&self) -> bool {
        let version = self.version();
        self.hub.reported().is_some_and(|report| {
            report.version == Some(version)
                && report.apps.iter().any(|app| {
                    app.since == version
                        && app.phase == Phase::Succeeded
                        && app.running == Some(app.release)
                })
        })
    }

    /// Waits until the newest release runs and is told to.
    pub fn await_settled(&mut self) {
        let begin = Instant::now();
        while !self.is_settled() {
            self.check_at_most_one();
            if let Some(status) = self.agent.as_mut().unwrap().try_wait().unwrap() {
                panic!("the agent ended by itself: {status}\n{}", self.tail());
            }
            assert!(
                begin.elapsed() < LONG,
                "not settled: {:?}\n{}",
                self.hub.reported(),
                self.tail()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Takes note of how often each point was passed, once collecting is through.
    pub fn count_passes(&mut self) {
        let begin = Instant::now();
        loop {
            let points = fs::read_to_string(self.path("points")).unwrap_or_default();
            if points.lines().any(|line| line == "collect.done") || begin.elapsed() > LONG {
                self.passes.clear();
                for line in points.lines() {
                    *self.passes.entry(line.to_owned()).or_default() += 1;
                }
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// With no agent: what is on disk is old or new, and holds all that was acknowledged.
    pub fn check_disk(&self, prepared: bool) {
        let copy = tempfile::tempdir().unwrap();
        let (from, to) = (self.path("state"), copy.path());
        fs::create_dir(to.join("releases")).unwrap();
        for dir in ["", "releases"] {
            for entry in fs::read_dir(from.join(dir)).into_iter().flatten().flatten() {
                if entry.file_type().unwrap().is_file() {
                    fs::copy(entry.path(), to.join(dir).join(entry.file_name())).unwrap();
                }
            }
        }
        let (state, loaded) = State::open(to, 1).unwrap();
        if !prepared {
            assert_eq!(loaded.damage, [""; 0], "a file is neither old nor new");
        }
        let version = loaded.head.as_ref().map(|head| head.version);
        let (old, new) = (
            Version::from_numbers(1, self.generation - 1),
            self.version(),
        );
        assert!(
            version.is_none() && self.generation == 1
                || version == old.ok()
                || version == Some(new),
            "the head is {version:?}, neither the old nor the new"
        );
        let acknowledged = self.hub.acknowledged();
        assert!(
            version >= acknowledged,
            "{acknowledged:?} was acknowledged, {version:?} is stored"
        );
        assert!(state.floor() >= version.filter(|_| !prepared).min(state.floor()));
        let (heard, kept) = (self.hub.newest_event(), loaded.outbox.newest());
        assert!(
            kept >= heard,
            "event {heard} was told, {kept} is the newest kept"
        );
        let remembered = loaded
            .history
            .apps
            .get(&self.app())
            .and_then(|app| app.services.values().next())
            .map_or(0, |service| service.last_instance);
        for (id, instance) in self.containers() {
            assert!(
                instance <= remembered,
                "{id} is there and its number is not remembered ({remembered})"
            );
        }
    }

    /// The containers' directories, finished or not, and their numbers.
    fn containers(&self) -> Vec<(String, u64)> {
        let entries = fs::read_dir(self.path("run/containers"));
        let names = entries
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok());
        names
            .map(|name| {
                let instance = name.split('.').nth(2).and_then(|text| text.parse().ok());
                (name.clone(), instance.unwrap_or(0))
            })
            .collect()
    }

    /// The cgroups of containers that hold processes.
    fn populated(&self) -> Vec<String> {
        let parent = cgroups(&self.name).into_iter().next();
        let mut names: Vec<String> = parent
            .map(|parent| fs::read_dir(parent).into_iter().flatten().flatten())
            .into_iter()
            .flatten()
            .filter(|entry| {
                let name = entry.file_name().to_string_lossy().into_owned();
                let procs = fs::read_to_string(entry.path().join("cgroup.procs"));
                name.matches('.').count() == 2 && procs.is_ok_and(|text| !text.is_empty())
            })
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect();
        names.sort();
        names
    }

    /// At no time do two containers of the service run.
    fn check_at_most_one(&self) {
        let populated = self.populated();
        assert!(
            populated.len() <= 1,
            "two containers at once: {populated:?}"
        );
    }

    /// With everything settled: one container and what belongs to it, nothing else.
    pub fn check_accounts(&mut self) {
        let containers = self.containers();
        let [(id, instance)] = &containers[..] else {
            panic!("not one container: {containers:?}\n{}", self.tail());
        };
        let only = std::slice::from_ref(id);
        assert!(
            *instance > self.instance,
            "instance {instance} comes after {}: a number was used again",
            self.instance
        );
        assert_eq!(self.populated(), only, "cgroups with processes");
        for parent in cgroups(&self.name) {
            let names = fs::read_dir(&parent).into_iter().flatten().flatten();
            let mut names: Vec<String> = names
                .filter(|entry| entry.path().is_dir())
                .filter_map(|entry| entry.file_name().into_string().ok())
                .filter(|name| name.matches('.').count() == 2)
                .collect();
            names.sort();
            assert_eq!(names, only, "cgroups in {}", parent.display());
        }
        self.instance = *instance;
        let dir = self.path("").to_string_lossy().into_owned();
        let own = self.agent.as_ref().map(Child::id);
        let mut shims = Vec::new();
        for (pid, command) in processes() {
            if command.first().is_some_and(|name| name == "foreshore-shim") {
                if command
                    .get(1)
                    .is_some_and(|other| other.starts_with(&format!("{}.", self.name)))
                {
                    shims.push(command[1].clone());
                }
            } else if command
                .iter()
                .any(|word| word.starts_with(dir.trim_end_matches('/')))
            {
                assert_eq!(Some(pid), own, "a process was left: {command:?}");
            }
        }
        assert_eq!(shims, only, "shims");
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        assert!(
            !mounts.contains(dir.trim_end_matches('/')),
            "a mount was left:\n{mounts}"
        );
        for name in fs::read_dir(self.path("state/bin")).unwrap().flatten() {
            let name = name.file_name().to_string_lossy().into_owned();
            assert!(
                name.starts_with("foreshore-shim-"),
                "{name} was left in bin"
            );
        }
        let store = Store::open(&self.path("state/images")).unwrap();
        let image = store
            .staged(&self.image.unwrap())
            .expect("what runs is staged");
        assert!(image.layers.iter().all(|layer| layer.is_dir()));
        let corrupt = self.hub.events_of(EventKind::StateCorrupt);
        assert!(corrupt.len() <= self.damaged, "{corrupt:?}");
        let (gaps, reused) = self.hub.event_faults();
        assert_eq!(gaps, [0; 0], "events were lost");
        assert!(
            reused.is_empty(),
            "an event's number was used again: {reused:?}"
        );
    }

    fn tail(&self) -> String {
        let log = fs::read_to_string(self.path("agent.log")).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(40)..].join("\n")
    }

    /// Takes everything down and looks that nothing is left.
    pub fn finish(mut self) {
        self.kill();
        self.remove_all();
        for parent in cgroups(&self.name) {
            let left: Vec<String> = fs::read_dir(&parent)
                .into_iter()
                .flatten()
                .flatten()
                .filter(|entry| entry.path().is_dir())
                .filter_map(|entry| entry.file_name().into_string().ok())
                .collect();
            assert!(left.is_empty(), "left in {}: {left:?}", parent.display());
        }
    }

    fn remove_all(&self) {
        let removed = Command::new(env!("CARGO_BIN_EXE_foreshore-agent"))
            .args(["remove-all", "--config"])
            .arg(self.path("agent.toml"))
            .output()
            .unwrap();
        if !removed.status.success() {
            eprintln!("{}", String::from_utf8_lossy(&removed.stderr));
        }
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        self.kill();
        self.remove_all();
        if std::thread::panicking()
            && let Some(dir) = self.dir.take()
        {
            eprintln!("--- the failed device is kept in {}", dir.keep().display());
        }
    }
}

/// The device's parent cgroup in every hierarchy that has it; where processes are looked for comes first.
fn cgroups(parent: &str) -> Vec<PathBuf> {
    let root = Path::new("/sys/fs/cgroup");
    let mut found: Vec<PathBuf> = ["pids", "", "memory", "cpu", "devices", "freezer"]
        .into_iter()
        .map(|hierarchy| root.join(hierarchy).join(parent))
        .filter(|dir| dir.is_dir())
        .collect();
    found.dedup();
    found
}

/// Every process with the words of its command.
fn processes() -> Vec<(u32, Vec<String>)> {
    let entries = fs::read_dir("/proc").unwrap().flatten();
    entries
        .filter_map(|entry| {
            let pid = entry.file_name().to_str()?.parse().ok()?;
            let command = fs::read(entry.path().join("cmdline")).ok()?;
            let words = command
                .split(|byte| *byte == 0)
                .filter(|word| !word.is_empty());
            Some((
                pid,
                words
                    .map(|word| String::from_utf8_lossy(word).into_owned())
                    .collect(),
            ))
        })
        .collect()
}
