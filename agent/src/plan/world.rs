//! A model of a device: does the steps of plans on virtual time. For tests.
//!
//! How a container behaves is written in its service's command: `good`, `never-ready`, `refuse`,
//! `needs-device`, `exit CODE AFTER_MS`, `unready AFTER_MS`, `hang AFTER_MS` (its liveness probe fails then), `slow MS` (its startup
//! probe succeeds then), `never-up MS` (fails then). `good` with a probe is ready 100 ms after its start.

use std::collections::{BTreeMap, BTreeSet};

use foreshore_protocol::manifest::{OnRotate, RestartPolicy, Service};
use foreshore_protocol::message::{AppStatus, HeadApp, Phase, ReasonCode, Windows, Zone};
use foreshore_protocol::release::{Release, service_digest};
use foreshore_protocol::{AppName, Digest, Version};

use super::history::reason;
use super::*;
use crate::runtime::{Container, ContainerId, ContainerState, Exit};

pub(super) const SOAK_MS: u64 = 5_000;
pub(super) const DEADLINE_MS: u64 = 30_000;

/// A service with a behaviour; `seed` makes specs differ.
pub(super) fn service(behaviour: &str, seed: u32, restart: RestartPolicy) -> Service {
    let probe = if behaviour.starts_with("exit") || behaviour == "refuse" {
        ""
    } else {
        match behaviour.split(' ').next() {
            Some("hang") => {
                ", \"probes\": {\"liveness\": {\"tcp\": {\"port\": 80}}, \"readiness\": {\"tcp\": {\"port\": 80}}}"
            }
            Some("slow" | "never-up") => ", \"probes\": {\"startup\": {\"tcp\": {\"port\": 80}}}",
            _ => ", \"probes\": {\"readiness\": {\"tcp\": {\"port\": 80}}}",
        }
    };
    let image = Digest::of(&[u8::try_from(seed % 5).unwrap()]);
    let text = format!(
        "{{\"image\": \"hub.internal/x@{image}\", \"environment\": {{\"SEED\": \"{seed}\"}}, \"command\": [\"{behaviour}\"]{probe}}}"
    );
    let mut service: Service = serde_json::from_str(&text).unwrap();
    service.restart = restart;
    service
}

pub(super) fn release(app: &str, services: &[(&str, Service)]) -> Release {
    Release {
        schema: 1,
        app: app.parse().unwrap(),
        services: services
            .iter()
            .map(|(name, service)| (name.parse().unwrap(), service.clone()))
            .collect(),
        image_pull_secrets: Vec::new(),
    }
}

#[derive(Debug, Clone)]
pub(super) struct World {
    pub(super) now: Now,
    watching_since: BootMs,
    pub(super) history: History,
    pub(super) desired: Desired,
    pub(super) hub: BTreeMap<Digest, Release>,
    pub(super) releases: BTreeMap<Digest, Release>,
    pub(super) images: BTreeSet<Digest>,
    pub(super) damaged: BTreeSet<Digest>,
    pub(super) containers: Vec<(Container, BootMs, Service)>,
    /// While set, staging fails with this.
    pub(super) registry: Option<ReasonCode>,
    pub(super) hub_reachable: bool,
    /// The agent's and the apps' update locks.
    pub(super) update_locks: UpdateLocks,
    pub(super) pinned: BTreeSet<Digest>,
    pub(super) disk: Disk,
    pub(super) usage: BTreeMap<ContainerId, DiskUsage>,
    /// Whether the last plan's wishes changed them.
    locks_changed: bool,
    /// What the device's policy says of releases.
    pub(super) verdicts: BTreeMap<Digest, PolicyVerdict>,
    pub(super) unsigned: BTreeMap<Digest, BTreeSet<Digest>>,
    /// The revisions of the secrets that the hub sent.
    pub(super) secrets: BTreeMap<SecretName, u64>,
    /// The turns that the hub has granted.
    pub(super) turns: BTreeMap<AppName, Turn>,
    /// Those of the next assignment.
    pub(super) windows: Windows,
    pub(super) max_restarts: u32,
    pub(super) require_hub_ms: Option<u64>,
    pub(super) contact: HubContact,
    /// The wall clock when the boot clock showed nothing; `None` while nobody knows.
    pub(super) wall_at_boot: Option<u64>,
    /// The device's time zone.
    pub(super) zone: DeviceZone,
    /// How often a secret got another value.
    pub(super) rotations: u64,
    /// Every container whose secrets were renewed, with the signals it got.
    pub(super) renewed: Vec<(ContainerId, BTreeSet<i32>)>,
    /// Whether the device node that `needs-device` needs is missing.
    pub(super) unplugged: bool,
    /// Apps that hold their lock.
    pub(super) busy_apps: BTreeSet<AppName>,
    /// Every container that was ever started, in order.
    pub(super) started: Vec<(ContainerId, Digest)>,
    /// Every container that was ever told to stop.
    pub(super) stopped: Vec<ContainerId>,
    /// Services that a step is under way on.
    pub(super) busy: Busy,
    generation: u64,
}

impl World {
    pub(super) fn new() -> Self {
        Self {
            now: Now {
                boot: BootId([1; 16]),
                ms: BootMs(10_000),
            },
            watching_since: BootMs(9_000),
            history: History::default(),
            desired: Desired::default(),
            hub: BTreeMap::new(),
            releases: BTreeMap::new(),
            images: BTreeSet::new(),
            damaged: BTreeSet::new(),
            containers: Vec::new(),
            registry: None,
            hub_reachable: true,
            update_locks: UpdateLocks::default(),
            pinned: BTreeSet::new(),
            disk: Disk::default(),
            usage: BTreeMap::new(),
            locks_changed: false,
            verdicts: BTreeMap::new(),
            unsigned: BTreeMap::new(),
            secrets: BTreeMap::new(),
            turns: BTreeMap::new(),
            windows: Windows::default(),
            max_restarts: 0,
            require_hub_ms: None,
            contact: HubContact::default(),
            wall_at_boot: None,
            zone: DeviceZone::default(),
            rotations: 0,
            renewed: Vec::new(),
            unplugged: false,
            busy_apps: BTreeSet::new(),
            started: Vec::new(),
            stopped: Vec::new(),
            busy: Busy::default(),
            generation: 0,
        }
    }

    pub(super) fn version(&self) -> Version {
        Version::from_numbers(1, self.generation).unwrap()
    }

    /// The hub assigns a release to this device.
    pub(super) fn assign(&mut self, release: &Release) -> Digest {
        let digest = release.digest();
        self.hub.insert(digest, release.clone());
        self.generation += 1;
        self.desired.version = Some(self.version());
        self.desired.apps.insert(
            release.app.clone(),
            HeadApp {
                app: release.app.clone(),
                release: digest,
                since: self.version(),
                soak_ms: SOAK_MS,
                progress_deadline_ms: DEADLINE_MS,
                override_lock: false,
                windows: self.windows.clone(),
                max_restarts: self.max_restarts,
                require_hub_ms: self.require_hub_ms,
            },
        );
        digest
    }

    pub(super) fn unassign(&mut self, app: &AppName) {
        self.generation += 1;
        self.desired.version = Some(self.version());
        self.desired.apps.remove(app);
    }

    /// The agent is killed and started again.
    pub(super) fn crash(&mut self) {
        self.contact = HubContact::default();
        self.turns.clear();
        self.update_locks = UpdateLocks::default();
        self.watching_since = self.now.ms;
    }

    /// The history on disk is damaged and the agent starts with none.
    pub(super) fn lose_history(&mut self) {
        let used = self.started.iter().map(|(id, _)| id.instance).max();
        self.history = History::rebuilt(used.unwrap_or(0) + 1000);
        self.crash();
    }

    /// The device loses power.
    pub(super) fn reboot(&mut self) {
        self.now.boot.0[0] = self.now.boot.0[0].wrapping_add(1);
        self.now.ms = BootMs(1_000);
        self.watching_since = self.now.ms;
        self.contact = HubContact::default();
        self.turns.clear();
        self.containers.clear();
    }

    pub(super) fn observed(&mut self) -> Observed {
        let now = self.now.ms;
        for (container, started, service) in &mut self.containers {
            if let (ContainerState::Running { .. }, Some(["exit", code, after])) = (
                container.state,
                words(service).get(..3).map(|w| [w[0], w[1], w[2]]),
            ) && now.since(*started) >= after.parse().unwrap()
            {
                container.state = ContainerState::Exited(Exit {
                    code: code.parse().unwrap(),
                    oom: false,
                    signal: None,
                });
            }
        }
        let containers = self
            .containers
            .iter()
            .map(|(container, started, service)| ObservedContainer {
                container: container.clone(),
                probes: probes(
                    service,
                    now.since((*started).max(self.watching_since)),
                    now.since(*started),
                ),
            })
            .collect();
        Observed {
            watching_since: self.watching_since,
            containers,
            releases: self.releases.clone(),
            images: self.images.clone(),
            damaged: self.damaged.clone(),
            update_locks: self.update_locks.clone(),
            pinned: self.pinned.clone(),
            disk: self.disk,
            usage: self.usage.clone(),
            verdicts: self.verdicts.clone(),
            unsigned: self.unsigned.clone(),
            secrets: self.secrets.clone(),
            turns: self.turns.clone(),
            wall: self.wall(),
            zone: self.zone.clone(),
            hub: self.contact,
            busy: self.busy.clone(),
        }
    }

    pub(super) fn wall(&self) -> WallClock {
        self.wall_at_boot.map_or_else(WallClock::default, |at| {
            WallClock::Trusted(at + self.now.ms.0)
        })
    }

    /// Whether the device is under a disruption budget.
    pub(super) fn set_budget(&mut self, holds: bool) {
        let budget = BudgetGroup {
            budget: "sites".parse().unwrap(),
            group: [("site".parse().unwrap(), "hull".parse().unwrap())].into(),
        };
        self.desired.budgets = holds.then_some(budget).into_iter().collect();
    }

    /// The hub lets an app switch to what is assigned, from now for so long.
    pub(super) fn grant(&mut self, app: &AppName, ttl_ms: u64) {
        if let Some(assigned) = self.desired.apps.get(app) {
            let turn = Turn {
                since: assigned.since,
                release: assigned.release,
                until: self.now.ms.plus(ttl_ms),
            };
            self.turns.insert(app.clone(), turn);
        }
    }

    /// Nothing is switched to while its window is closed, or while nobody knows the time.
    fn check_windows(&self, plan: &Plan) {
        for (app, after) in &plan.history.apps {
            let before = self.history.apps.get(app).and_then(|before| before.current);
            let trial = after
                .trial
                .as_ref()
                .map(|trial| (trial.since, trial.release));
            let Some(assigned) = self.desired.apps.get(app) else {
                continue;
            };
            let switched =
                after.current != before && trial == Some((assigned.since, assigned.release));
            let Some(window) = assigned.windows.switch.as_ref().filter(|_| switched) else {
                continue;
            };
            let zone = match &window.zone {
                Zone::Device => self.zone.0.clone().unwrap(),
                Zone::Posix(text) => jiff::tz::TimeZone::posix(text).unwrap(),
            };
            let open = match self.wall() {
                WallClock::Untrusted(_) => false,
                WallClock::Trusted(now) => {
                    let look = look(&window.cron, window.open_ms, &zone, now);
                    matches!(look, Look::Open { .. })
                }
            };
            assert!(open, "{app} switched while its window was closed");
        }
    }

    /// Under a budget nothing is switched to without a turn that still counts.
    fn check_turns(&self, plan: &Plan) {
        for (app, after) in &plan.history.apps {
            let before = self.history.apps.get(app).and_then(|before| before.current);
            let assigned = self
                .desired
                .apps
                .get(app)
                .map(|assigned| (assigned.since, assigned.release));
            let trial = after
                .trial
                .as_ref()
                .map(|trial| (trial.since, trial.release));
            let switched = after.current != before && trial.is_some() && trial == assigned;
            let windowed = self.desired.apps.get(app);
            let windowed = windowed.is_some_and(|assigned| assigned.windows.switch.is_some());
            if switched && (windowed || !self.desired.budgets.is_empty()) {
                let counts = |turn: &Turn| {
                    Some((turn.since, turn.release)) == trial && self.now.ms < turn.until
                };
                assert!(
                    self.turns.get(app).is_some_and(counts),
                    "{app} switched without a turn"
                );
            }
        }
    }

    /// As [`turn`](Self::turn) that does nothing, while a step is under way on a service.
    pub(super) fn busy_turn(&mut self, app: &str, service: &str) -> Plan {
        let mut observed = self.observed();
        let busy = (app.parse().unwrap(), service.parse().unwrap());
        observed.busy.services.insert(busy);
        self.turn_on(&observed, 0)
    }

    /// Plans, checks the plan, stores its history and does its first `cut` steps.
    pub(super) fn turn(&mut self, cut: usize) -> Plan {
        let observed = self.observed();
        self.turn_on(&observed, cut)
    }

    fn turn_on(&mut self, observed: &Observed, cut: usize) -> Plan {
        let plan = plan(&self.desired, observed, &self.history, self.now);
        let violations = check::check(observed, &self.history, &plan);
        assert!(violations.is_empty(), "{violations:?}\n{plan:#?}");
        self.check_turns(&plan);
        self.check_windows(&plan);
        self.history = plan.history.clone();
        let (refused, held) =
            plan.update_locks.iter().cloned().partition(|app| {
                self.busy_apps.contains(app) && !self.update_locks.held.contains(app)
            });
        let update_locks = UpdateLocks { held, refused };
        self.locks_changed = self.update_locks != update_locks;
        self.update_locks = update_locks;
        if cut > 0 && self.hub_reachable {
            for digest in &plan.fetch {
                if let Some(release) = self.hub.get(digest) {
                    self.releases.insert(*digest, release.clone());
                }
            }
        }
        for step in plan.steps.iter().take(cut) {
            if let Some(outcome) = self.execute(step) {
                self.history.record(&outcome, self.now);
            }
        }
        plan
    }

    /// Plans, and does the first step on a service half: what it is to end runs or is broken until somebody looked,
    /// and is then ended by SIGKILL; what it is to start is half made. Then the agent ends, or with `lives` looks
    /// once more and the step comes to its end. Whether there was such a step, and whether it was a start.
    pub(super) fn cut_inside(&mut self, lives: bool) -> Option<bool> {
        let plan = self.turn(0);
        let (step, id) = plan.steps.iter().find_map(|step| match step {
            Step::Stop { id, .. } | Step::Remove { id } | Step::Start { id, .. } => {
                Some((step.clone(), id.clone()))
            }
            Step::Stage { .. }
            | Step::AbandonStaging { .. }
            | Step::RenewSecrets { .. }
            | Step::Collect { .. } => None,
        })?;
        let is_start = matches!(step, Step::Start { .. });
        if lives {
            self.busy
                .services
                .insert((id.app.clone(), id.service.clone()));
        }
        let outcome = if is_start {
            let outcome = self.execute(&step);
            self.set_state(&id, ContainerState::Broken);
            outcome
        } else {
            // It has come up since it was taken for broken.
            let up = ContainerState::Running {
                pid: 1,
                started_ms: self.now.ms.0,
            };
            self.set_state(&id, up);
            if lives {
                self.turn(0);
            }
            let killed = Exit {
                code: 137,
                oom: false,
                signal: Some(9),
            };
            self.set_state(&id, ContainerState::Exited(killed));
            None
        };
        if !lives {
            self.now.ms = self.now.ms.plus(1);
            self.crash();
            return Some(is_start);
        }
        self.turn(0);
        self.busy = Busy::default();
        let outcome = match (is_start, self.containers.iter().any(|seen| seen.0.id == id)) {
            (true, true) => {
                let up = ContainerState::Running {
                    pid: 1,
                    started_ms: self.now.ms.0,
                };
                self.set_state(&id, up);
                outcome
            }
            _ => self.execute(&step),
        };
        self.history.record(&outcome?, self.now);
        Some(is_start)
    }

    fn set_state(&mut self, id: &ContainerId, state: ContainerState) {
        for (container, ..) in &mut self.containers {
            if container.id == *id {
                container.state = state;
            }
        }
    }

    /// What the images of a release are pulled with.
    fn logins(&self, release: &Digest) -> BTreeMap<SecretName, u64> {
        let names = self.releases[release].image_pull_secrets.iter();
        names
            .map(|name| (name.clone(), self.secrets[name]))
            .collect()
    }

    fn execute(&mut self, step: &Step) -> Option<Outcome> {
        Some(match step {
            Step::Stage {
                release, images, ..
            } => match self.registry {
                Some(code) => Outcome::StagingFailed {
                    release: *release,
                    reason: reason(code, None, "the registry says no"),
                    logins: self.logins(release),
                },
                None => {
                    let digest = |image: &String| {
                        image.rsplit_once('@').unwrap().1.parse::<Digest>().unwrap()
                    };
                    self.images.extend(images.iter().map(digest));
                    for image in images {
                        self.damaged.remove(&digest(image));
                    }
                    self.unsigned.remove(release);
                    Outcome::Staged { release: *release }
                }
            },
            Step::AbandonStaging { .. } => return None,
            Step::Stop { id, .. } => {
                self.stopped.push(id.clone());
                for (container, ..) in &mut self.containers {
                    if container.id == *id {
                        container.state = ContainerState::Exited(Exit {
                            code: 143,
                            oom: false,
                            signal: Some(15),
                        });
                    }
                }
                Outcome::Stopped { id: id.clone() }
            }
            Step::Remove { id } => {
                self.containers
                    .retain(|(container, ..)| container.id != *id);
                Outcome::Removed { id: id.clone() }
            }
            Step::Start { id, release } => {
                let service = self.releases[release].services[&id.service].clone();
                assert!(
                    !self.started.iter().any(|(other, _)| other == id),
                    "{id} twice"
                );
                if self.unplugged && words(&service) == ["needs-device"] {
                    return Some(Outcome::StartFailed {
                        id: id.clone(),
                        code: ReasonCode::DeviceMissing,
                        message: "device /dev/ttyUSB0 is not there".to_owned(),
                        refused: false,
                    });
                }
                if words(&service) == ["refuse"] {
                    return Some(Outcome::StartFailed {
                        id: id.clone(),
                        code: ReasonCode::StartFailed,
                        message: "no such command".to_owned(),
                        refused: true,
                    });
                }
                self.started.push((id.clone(), *release));
                let container = Container {
                    id: id.clone(),
                    release: *release,
                    service_digest: service_digest(&service),
                    secrets: self.secrets.clone(),
                    state: ContainerState::Running {
                        pid: 1,
                        started_ms: self.now.ms.0,
                    },
                };
                self.containers.push((container, self.now.ms, service));
                Outcome::Started { id: id.clone() }
            }
            Step::RenewSecrets { id, signals, .. } => {
                self.renewed.push((id.clone(), signals.clone()));
                for (container, _, service) in &mut self.containers {
                    for mount in &service.secrets {
                        if container.id == *id && mount.on_rotate != OnRotate::Restart {
                            let newest = self.secrets[&mount.source];
                            container.secrets.insert(mount.source.clone(), newest);
                        }
                    }
                }
                Outcome::SecretsRenewed { id: id.clone() }
            }
            Step::Collect {
                keep_images,
                keep_releases,
                keep_logs: _,
            } => {
                self.images.retain(|image| keep_images.contains(image));
                self.releases
                    .retain(|release, _| keep_releases.contains(release));
                Outcome::Collected
            }
        })
    }

    /// When a container changes by itself next.
    fn next_change(&self) -> Option<BootMs> {
        self.containers
            .iter()
            .filter(|(container, ..)| matches!(container.state, ContainerState::Running { .. }))
            .filter_map(|(_, started, service)| {
                let watched = (*started).max(self.watching_since);
                match words(service)[..] {
                    ["exit", _, after] => Some(started.plus(after.parse().unwrap())),
                    ["unready", after] => {
                        let (ready, unready) =
                            (watched.plus(100), started.plus(after.parse().unwrap()));
                        Some(if ready > self.now.ms { ready } else { unready })
                    }
                    ["hang" | "slow" | "never-up", after] => {
                        let (ready, later) =
                            (watched.plus(100), started.plus(after.parse().unwrap()));
                        Some(if ready > self.now.ms { ready } else { later })
                    }
                    ["good" | "needs-device"] => Some(watched.plus(100)),
                    _ => None,
                }
            })
            .filter(|at| *at > self.now.ms)
            .min()
    }

    /// Lets everything happen for `ms`; the last plan.
    pub(super) fn run(&mut self, ms: u64) -> Plan {
        let end = self.now.ms.plus(ms);
        let mut turns = 0;
        loop {
            let plan = self.turn(usize::MAX);
            turns += 1;
            assert!(turns < 20_000, "does not settle: {plan:#?}");
            let fetched = plan
                .fetch
                .iter()
                .any(|digest| self.hub.contains_key(digest));
            if !plan.steps.is_empty() || self.locks_changed || (fetched && self.hub_reachable) {
                continue;
            }
            let next = [plan.wake_at, self.next_change()]
                .into_iter()
                .flatten()
                .min();
            match next {
                Some(at) if at <= end => self.now.ms = at,
                _ => {
                    self.now.ms = end;
                    return plan;
                }
            }
        }
    }

    pub(super) fn status(&mut self, app: &str) -> AppStatus {
        let observed = self.observed();
        plan(&self.desired, &observed, &self.history, self.now)
            .status
            .into_iter()
            .find(|status| status.app.as_str() == app)
            .unwrap()
    }

    pub(super) fn phase(&mut self, app: &str) -> Phase {
        self.status(app).phase
    }

    /// The running containers of an app, `service: release it was started for`.
    pub(super) fn running(&self, app: &str) -> BTreeMap<String, Digest> {
        self.containers
            .iter()
            .filter(|(container, ..)| {
                container.id.app.as_str() == app
                    && matches!(container.state, ContainerState::Running { .. })
            })
            .map(|(container, ..)| (container.id.service.to_string(), container.release))
            .collect()
    }
}

fn words(service: &Service) -> Vec<&str> {
    service
        .command
        .as_ref()
        .map_or_else(Vec::new, |command| command[0].split(' ').collect())
}

fn probes(service: &Service, watched_ms: u64, age_ms: u64) -> ProbeStates {
    let words = words(service);
    if watched_ms < 100 {
        return ProbeStates::default();
    }
    let is_over = |after: &str, ms: u64| ms >= after.parse().unwrap();
    let refused = || ProbeState::NotReady("connection refused".to_owned());
    let startup = match words[..] {
        ["slow", ms] if !is_over(ms, age_ms) => ProbeState::Unknown,
        ["never-up", ms] if !is_over(ms, age_ms) => ProbeState::Unknown,
        ["never-up", _] => refused(),
        _ => ProbeState::Ready,
    };
    if startup != ProbeState::Ready {
        return ProbeStates {
            startup,
            ..ProbeStates::default()
        };
    }
    ProbeStates {
        startup,
        readiness: match words[..] {
            ["never-ready"] => refused(),
            ["unready", after] if is_over(after, watched_ms) => {
                ProbeState::NotReady("status 500".to_owned())
            }
            _ => ProbeState::Ready,
        },
        liveness: match words[..] {
            ["hang", after] if is_over(after, age_ms) => refused(),
            _ => ProbeState::Ready,
        },
    }
}
