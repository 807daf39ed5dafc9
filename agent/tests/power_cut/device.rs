//! A device whose power is cut: a real agent with real containers, and what must be true of it after each cut.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use foreshore_agent::state::State;
use foreshore_images::store::Store;
use foreshore_protocol::message::{Event, EventKind, Head, HeadApp, Phase, Windows};
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
    /// How the newest release is assigned.
    release: Option<Digest>,
    since: Option<Version>,
    read_only: bool,
    /// Whether new containers are started beside the old ones, which are kept for a moment.
    pub beside: bool,
    /// Where the agent's standard error goes from its next start on.
    pub log: PathBuf,
    /// What the agent does wrong from its next start on, as `FORESHORE_FAULT` has it.
    pub fault: Option<&'static str>,
    /// Dropped after everything else, the newest first.
    kept: Vec<Box<dyn std::any::Any + Send>>,
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
            log: dir.path().join("agent.log"),
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
            release: None,
            since: None,
            read_only: false,
            beside: false,
            fault: None,
            kept: Vec::new(),
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
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
        let update_config = if self.beside {
            serde_json::json!({"order": "start-first", "keep_old": "300ms"})
        } else {
            serde_json::json!({})
        };
        let service = serde_json::json!({
            "image": format!("hub.internal/app@{image}"),
            "read_only": self.read_only,
            "stop_grace_period": "5s",
            "deploy": {"update_config": update_config},
        });
        let release = Release {
            schema: 1,
            app: self.app(),
            services: [(
                "web".parse().unwrap(),
                serde_json::from_value(service).unwrap(),
            )]
            .into(),
            image_pull_secrets: Vec::new(),
        };
        let (digest, version) = (release.digest(), self.version());
        self.hub
            .publish_release(&digest, release.to_canonical_json());
        (self.release, self.since) = (Some(digest), Some(version));
        self.publish_head();
    }

    /// Assigns the same release in a newer version: there is nothing to do.
    pub fn assign_again(&mut self) {
        self.generation += 1;
        self.publish_head();
    }

    fn publish_head(&self) {
        self.hub.publish_head(&Head {
            version: self.version(),
            apps: vec![HeadApp {
                app: self.app(),
                release: self.release.unwrap(),
                since: self.since.unwrap(),
                soak_ms: 100,
                progress_deadline_ms: 80_000,
                override_lock: false,
                windows: Windows::default(),
                max_restarts: 0,
                require_hub_ms: None,
            }],
            budgets: vec![],
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
            "layer.set-aside" | "layer.beside" => {
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
            .open(&self.log)
            .unwrap();
        let _none_yet = fs::remove_file(self.path("points"));
        let mut command = Command::new(env!("CARGO_BIN_EXE_foreshore-agent"));
        command
            .args(["run", "--config"])
            .arg(self.path("agent.toml"))
            .env("FORESHORE_KILL_LOG", self.path("points"))
            .env("FORESHORE_WALL_CLOCK", self.path("clock"))
            .env("FORESHORE_WRITE_ERROR", self.path("errno"))
            .env("RUST_LOG", "info")
            .stdin(Stdio::null())
            .stderr(log);
        if let Some(order) = order {
            command.env("FORESHORE_KILL_AT", order);
        }
        if let Some(fault) = self.fault {
            command.env("FORESHORE_FAULT", fault);
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
            self.check_at_most_one_more();
            if self.is_settled() {
                let since = *settled.get_or_insert_with(Instant::now);
                // A slow machine takes its time to collect what is not needed any more.
                let aftermath = match points.lines().any(|line| line == "collect.done") {
                    true => AFTERMATH,
                    false => LONG / 2,
                };
                if since.elapsed() > aftermath {
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
        // What was kept is gone in the end.
        let alone = !self.beside || self.containers().len() == 1;
        alone
            && self.hub.reported().is_some_and(|report| {
                report.version == Some(version)
                    && report.apps.iter().any(|app| {
                        Some(app.since) == self.since
                            && app.phase == Phase::Succeeded
                            && app.running == Some(app.release)
                    })
            })
    }

    /// Waits until the newest release runs and is told to.
    pub fn await_settled(&mut self) {
        let begin = Instant::now();
        while !self.is_settled() {
            self.check_at_most_one_more();
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

    /// At no time do two containers of the service run, or three where one is started beside another.
    fn check_at_most_one_more(&self) {
        let populated = self.populated();
        assert!(
            populated.len() <= 1 + usize::from(self.beside),
            "too many containers at once: {populated:?}"
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
        // A container is told to be running a moment before its first process has become its program.
        let begin = Instant::now();
        loop {
            let (shims, others) = self.processes();
            if shims == only && others.is_empty() {
                break;
            }
            assert!(
                begin.elapsed() < LONG,
                "shims {shims:?} of {only:?}, and processes that were left: {others:?}"
            );
            std::thread::sleep(Duration::from_millis(5));
        }
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        // The state directory itself may be one of the test's.
        let below = ["run", "state/"].map(|name| self.path(name).display().to_string());
        assert!(
            !below.iter().any(|path| mounts.contains(path.as_str())),
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

    /// The containers that shims of this device are for, and commands of its other processes but the agent.
    fn processes(&self) -> (Vec<String>, Vec<Vec<String>>) {
        let dir = self.path("").to_string_lossy().into_owned();
        let (mut shims, mut others) = (Vec::new(), Vec::new());
        for (pid, command) in processes() {
            let is = |at: usize, begin: &str| {
                command.get(at).is_some_and(|word| word.starts_with(begin))
            };
            if is(0, "foreshore-shim") {
                if is(1, &format!("{}.", self.name)) {
                    shims.push(command[1].clone());
                }
            } else if Some(pid) != self.agent.as_ref().map(Child::id)
                && (0..command.len()).any(|at| is(at, dir.trim_end_matches('/')))
            {
                others.push(command);
            }
        }
        (shims, others)
    }

    fn tail(&self) -> String {
        let log = fs::read_to_string(self.path("agent.log")).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(40)..].join("\n")
    }

    /// Containers have a read-only root, which needs no room on the disk.
    pub fn read_only_root(&mut self) {
        self.read_only = true;
    }

    /// Adds to the agent's configuration.
    pub fn configure(&self, more: &str) {
        let path = self.path("agent.toml");
        let text = fs::read_to_string(&path).unwrap() + more;
        fs::write(path, text).unwrap();
    }

    /// Keeps a thing until the device is gone.
    pub fn keep(&mut self, thing: impl Send + 'static) {
        self.kept.push(Box::new(thing));
    }

    /// What the agent takes for the wall clock, milliseconds since 1970.
    pub fn set_clock(&self, unix_ms: u64) {
        let new = self.path("clock.new");
        fs::write(&new, unix_ms.to_string()).unwrap();
        fs::rename(new, self.path("clock")).unwrap();
    }

    pub fn agent_pid(&mut self) -> u32 {
        let agent = self.agent.as_mut().unwrap();
        assert_eq!(agent.try_wait().unwrap(), None, "the agent ended");
        agent.id()
    }

    /// Counts the agent's starts, as the hub was told.
    pub fn boot(&self) -> u64 {
        self.hub.reported().unwrap().boot
    }

    pub fn is_acknowledged(&self) -> bool {
        self.hub.acknowledged() == Some(self.version())
    }

    /// The one container, and its first process.
    pub fn container(&self) -> (String, i32) {
        let containers = self.containers();
        let [(id, _)] = &containers[..] else {
            panic!("not one container: {containers:?}\n{}", self.tail());
        };
        (id.clone(), self.first_process(id).unwrap())
    }

    fn first_process(&self, id: &str) -> Option<i32> {
        let record = fs::read(self.path(&format!("run/containers/{id}/record.json"))).ok()?;
        let record: serde_json::Value = serde_json::from_slice(&record).ok()?;
        record["container"]["pid"].as_i64()?.try_into().ok()
    }

    pub fn kill_container(&self) {
        let process = nix::unistd::Pid::from_raw(self.container().1);
        nix::sys::signal::kill(process, nix::sys::signal::Signal::SIGKILL).unwrap();
    }

    /// Waits until another container than this one runs, alone.
    pub fn await_other_container(&self, before: &(String, i32)) {
        let begin = Instant::now();
        loop {
            let containers = self.containers();
            if let [(id, _)] = &containers[..]
                && *id != before.0
                && self.first_process(id).is_some()
                && self.populated() == [id.clone()]
            {
                return;
            }
            assert!(
                begin.elapsed() < LONG,
                "no other container: {containers:?}\n{}",
                self.tail()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Gives the agent things to write until the hub is told of such an event.
    pub fn provoke(&mut self, kind: EventKind, before: impl Fn()) -> Event {
        let begin = Instant::now();
        loop {
            before();
            self.assign_again();
            let asked = Instant::now();
            while asked.elapsed() < Duration::from_secs(1) {
                if let Some(event) = self.hub.events_of(kind).pop() {
                    return event;
                }
                std::thread::sleep(Duration::from_millis(5));
            }
            assert!(begin.elapsed() < LONG, "no {kind:?}\n{}", self.tail());
        }
    }

    /// What was acknowledged is on disk, whatever that is like.
    pub fn check_acknowledged(&self) {
        let acknowledged = self.hub.acknowledged();
        let copy = tempfile::tempdir().unwrap();
        fs::copy(self.path("state/head"), copy.path().join("head")).unwrap();
        let stored = State::open(copy.path(), 1).unwrap().1.head;
        assert!(stored.map(|head| head.version) >= acknowledged);
    }

    /// Waits until the hub is told of such an event.
    pub fn await_event(&self, kind: EventKind, right: impl Fn(&Event) -> bool) -> Event {
        let begin = Instant::now();
        loop {
            let newest = self.hub.events_of(kind).into_iter().rfind(&right);
            if let Some(event) = newest {
                return event;
            }
            assert!(begin.elapsed() < LONG, "no {kind:?}\n{}", self.tail());
            std::thread::sleep(Duration::from_millis(5));
        }
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
        while let Some(thing) = self.kept.pop() {
            drop(thing);
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
