//! A simulated device: the agent's real `plan` and `History` over a disk, a kernel and containers that are made up.
//!
//! What is on `Disk` survives everything; containers survive the agent, not the power; the rest is the memory of
//! one life of the agent.

use std::collections::{BTreeMap, BTreeSet};

use foreshore_agent::plan::{
    self, BootId, BootMs, Busy, Desired, History, Now, Observed, ObservedContainer, Outcome,
    ProbeState, ProbeStates, Step, UpdateLocks, WallClock,
};
use foreshore_agent::runtime::{Container, ContainerId, ContainerState, Exit};
use foreshore_protocol::message::{AppStatus, Head, LeaseRequest, Phase, Reported, Windows};
use foreshore_protocol::release::Release;
use foreshore_protocol::{AppName, DeviceId, Digest, Version};

mod faults;
mod rules;
mod steps;
mod turns;

use crate::hub::unix;
use crate::mutation::Mutation;
use crate::random::Random;
use crate::scenario::{Ms, SECOND, Scenario};

/// What survives a power cut.
#[derive(Debug, Clone, Default)]
pub struct Disk {
    /// The newest head that was accepted.
    pub head: Option<Head>,
    /// What the planner remembers.
    pub history: History,
    /// Release manifests.
    pub releases: BTreeMap<Digest, Release>,
    /// Images.
    pub images: BTreeSet<Digest>,
    /// How often the agent started.
    pub starts: u64,
    /// How often it connected.
    pub sessions: u64,
}

/// A container of the made-up runtime.
#[derive(Debug, Clone)]
struct Live {
    container: Container,
    /// From when its probe succeeds, if ever.
    ready_at: Option<Ms>,
    /// When it ends by itself, if ever.
    ends_at: Option<Ms>,
    /// With which code.
    ends_with: i32,
    /// From when its liveness probe fails, if ever.
    hangs_at: Option<Ms>,
}

/// A step on its way.
#[derive(Debug, Clone)]
struct Running {
    token: u64,
    step: Step,
}

/// One edge box.
#[derive(Debug, Clone)]
pub struct Device {
    /// Its id.
    pub id: DeviceId,
    /// Its place in the scenario.
    pub number: usize,
    /// What survives a power cut.
    pub disk: Disk,
    /// Whether it has power.
    pub powered: bool,
    /// Whether it is connected to the broker, and by which session.
    pub session: Option<u64>,
    /// Whether its link could carry a connection.
    pub link: bool,
    /// Which life of the agent this is; events of another are void.
    pub life: u64,
    containers: BTreeMap<ContainerId, Live>,
    boot: u64,
    booted_at: Ms,
    watching_since: Ms,
    running: Vec<Running>,
    outcomes: Vec<Outcome>,
    next_token: u64,
    seq: u64,
    /// The newest report made.
    pub reported: Option<Reported>,
    /// The newest report that the hub acknowledged in this life.
    pub acknowledged: u64,
    planned: Option<Ms>,
    asked: BTreeMap<AppName, turns::Asked>,
    nonce: u64,
    /// Whether to write the event log.
    pub verbose: bool,
    /// For the rules only: what it said that it rolled back from.
    gave_up: BTreeSet<(AppName, Version, Digest)>,
    /// The head before the newest, for a fault.
    head_before: Option<Head>,
    /// For the rules only: the jobs that ended well, by their spec.
    jobs_done: BTreeSet<(AppName, Digest)>,
}

/// What a poll of a device asks of the world.
#[derive(Debug, Default)]
pub struct Asks {
    /// Steps that were begun: how long each takes and its token.
    pub begun: Vec<(Ms, u64)>,
    /// Release manifests to fetch.
    pub fetch: BTreeSet<Digest>,
    /// When to poll again.
    pub wake_at: Option<Ms>,
    /// Whether there is a new report to send.
    pub report: bool,
    /// Turns to ask for, or to give back.
    pub requests: Vec<LeaseRequest>,
    /// Assignments that it began to switch in.
    pub began: Vec<(AppName, Version)>,
    /// Rules that the plan breaks.
    pub violations: Vec<String>,
    /// For the event log.
    pub log: Vec<String>,
}

impl Device {
    /// A box that was never switched on.
    #[must_use]
    pub fn new(id: DeviceId, number: usize) -> Self {
        Self {
            id,
            number,
            disk: Disk::default(),
            powered: false,
            session: None,
            link: true,
            life: 0,
            containers: BTreeMap::new(),
            boot: 0,
            booted_at: 0,
            watching_since: 0,
            running: Vec::new(),
            outcomes: Vec::new(),
            next_token: 0,
            seq: 0,
            reported: None,
            acknowledged: 0,
            planned: None,
            asked: BTreeMap::new(),
            nonce: 0,
            verbose: false,
            gave_up: BTreeSet::new(),
            head_before: None,
            jobs_done: BTreeSet::new(),
        }
    }

    /// Whether an agent runs.
    #[must_use]
    pub const fn is_up(&self) -> bool {
        self.powered
    }

    /// The newest version that it accepted.
    #[must_use]
    pub fn version(&self) -> Option<Version> {
        self.disk.head.as_ref().map(|head| head.version)
    }

    /// Switches it on.
    pub fn boot(&mut self, now: Ms, random: &mut Random, mutation: Option<Mutation>) {
        self.powered = true;
        self.boot += 1;
        // The kernel and the agent take a while; the clock began before.
        self.booted_at = now.saturating_sub(random.between(2 * SECOND, 30 * SECOND));
        if mutation == Some(Mutation::ForgetPoison) {
            for app in self.disk.history.apps.values_mut() {
                app.poisoned.clear();
                app.assignment = None;
            }
        }
        // Containers are gone with the power; their records may be left over.
        let leftover = random.chance(50);
        self.containers.retain(|_, live| {
            live.container.state = ContainerState::Broken;
            leftover
        });
        self.start_agent(now);
    }

    /// Begins a life of the agent.
    pub fn start_agent(&mut self, now: Ms) {
        self.life += 1;
        self.disk.starts += 1;
        self.watching_since = now;
        self.seq = 0;
        self.acknowledged = 0;
        self.reported = None;
        self.planned = None;
        self.forget_turns();
    }

    /// Ends a life of the agent in the middle of whatever it does: each step on its way may or may not have
    /// happened, and nobody was told.
    pub fn end_agent(&mut self, now: Ms, scenario: &Scenario, registry: bool, random: &mut Random) {
        self.session = None;
        self.outcomes.clear();
        for running in std::mem::take(&mut self.running) {
            if random.chance(50) {
                let mut log = Vec::new();
                self.perform(
                    &running.step,
                    now,
                    scenario,
                    registry,
                    random,
                    None,
                    &mut log,
                );
            }
        }
    }

    /// Cuts its power.
    pub fn cut_power(&mut self, now: Ms, scenario: &Scenario, registry: bool, random: &mut Random) {
        self.end_agent(now, scenario, registry, random);
        self.powered = false;
        self.life += 1;
    }

    /// One of its containers ends by itself.
    pub fn kill_a_container(&mut self, now: Ms, random: &mut Random) {
        let running: Vec<_> = self
            .containers
            .iter()
            .filter(|(_, live)| matches!(live.container.state, ContainerState::Running { .. }))
            .map(|(id, _)| id.clone())
            .collect();
        if !running.is_empty()
            && let Some(live) = self.containers.get_mut(random.pick(&running))
        {
            live.ends_at = Some(now);
            live.ends_with = 1;
        }
    }

    /// A head arrives. True if it is new here.
    pub fn receive_head(&mut self, head: &Head, mutation: Option<Mutation>) -> bool {
        let newer = self.version().is_none_or(|known| head.version > known);
        let takes = newer
            || (mutation == Some(Mutation::AcceptOldHeads) && self.version() != Some(head.version));
        if takes {
            self.head_before = self.disk.head.replace(head.clone());
        }
        takes
    }

    fn now(&self, now: Ms) -> Now {
        let mut boot = [0; 16];
        boot[..8].copy_from_slice(&self.boot.to_be_bytes());
        Now {
            boot: BootId(boot),
            ms: BootMs(now.saturating_sub(self.booted_at)),
        }
    }

    fn observe(&mut self, now: Ms) -> Observed {
        for live in self.containers.values_mut() {
            let runs = matches!(live.container.state, ContainerState::Running { .. });
            if runs && live.ends_at.is_some_and(|at| at <= now) {
                live.container.state = ContainerState::Exited(Exit::with_code(live.ends_with));
                if live.ends_with == 0 {
                    let app = live.container.id.app.clone();
                    self.jobs_done.insert((app, live.container.service_digest));
                }
            }
        }
        let mut busy = Busy::default();
        for running in &self.running {
            match &running.step {
                Step::Stage { release, .. } => busy.staging = Some(*release),
                Step::Stop { id, .. }
                | Step::Remove { id }
                | Step::Start { id, .. }
                | Step::RenewSecrets { id, .. } => {
                    busy.services.insert((id.app.clone(), id.service.clone()));
                }
                Step::Collect { .. } => busy.collecting = true,
                Step::AbandonStaging { .. } => {}
            }
        }
        Observed {
            watching_since: self.now(self.watching_since).ms,
            containers: self
                .containers
                .values()
                .map(|live| ObservedContainer {
                    container: live.container.clone(),
                    probes: ProbeStates {
                        readiness: match live.ready_at {
                            Some(at) if at <= now => ProbeState::Ready,
                            Some(_) => ProbeState::Unknown,
                            None => ProbeState::NotReady("connection refused".to_owned()),
                        },
                        liveness: match live.hangs_at {
                            Some(at) if at <= now => ProbeState::NotReady("no answer".to_owned()),
                            _ => ProbeState::Ready,
                        },
                        ..ProbeStates::default()
                    },
                })
                .collect(),
            // Lent until the plan is made: copying them was much of what a run took.
            releases: std::mem::take(&mut self.disk.releases),
            images: std::mem::take(&mut self.disk.images),
            update_locks: UpdateLocks::default(),
            busy,
            turns: self.granted(),
            wall: self.wall(now),
            ..Observed::default()
        }
    }

    /// Some devices have no clock of their own and know the time from the hub only.
    fn wall(&self, now: Ms) -> WallClock {
        if self.number % 4 == 3 && self.session.is_none() {
            WallClock::default()
        } else {
            WallClock::Trusted(unix(now).0)
        }
    }

    /// Plans, stores what is to be remembered, and begins the steps.
    pub fn poll(&mut self, now: Ms, random: &mut Random, mutation: Option<Mutation>) -> Asks {
        let mut asks = Asks::default();
        if !self.powered {
            return asks;
        }
        let at = self.now(now);
        let mut history = self.disk.history.clone();
        for outcome in self.outcomes.drain(..) {
            history.record(&outcome, at);
        }
        let old = self.head_before.as_ref();
        let old = old.filter(|_| mutation == Some(Mutation::PlanOldHeads));
        let head = old.or(self.disk.head.as_ref());
        let mut desired = head.map(Desired::from).unwrap_or_default();
        if mutation == Some(Mutation::IgnoreWindows) {
            for app in desired.apps.values_mut() {
                app.windows = Windows::default();
            }
        }
        let observed = self.observe(now);
        if mutation == Some(Mutation::IgnoreJobs) {
            faults::believe_jobs_done(&mut history, &observed);
        }
        let mut plan = plan::plan(&desired, &observed, &history, at);
        faults::mutate(&mut plan, &observed, &history, mutation);
        asks.violations.extend(
            plan::check::check(&observed, &history, &plan)
                .into_iter()
                .map(|wrong| format!("{}: plan breaks {wrong}", self.id)),
        );
        asks.violations
            .extend(self.needless_stops(&observed, &history, &plan));
        asks.violations
            .extend(self.poisoned_starts(&history, &plan));
        asks.violations.extend(self.early_starts(&observed, &plan));
        asks.violations
            .extend(self.closed_windows(&observed, &history, &plan));
        self.disk.releases = observed.releases;
        self.disk.images = observed.images;
        let before: BTreeMap<AppName, Version> = self
            .switching()
            .into_iter()
            .map(|(app, since)| (app.clone(), since))
            .collect();
        let current = |history: &History, app: &AppName| history.apps.get(app)?.current;
        let was: BTreeMap<_, _> = before
            .keys()
            .map(|app| (app.clone(), current(&self.disk.history, app)))
            .collect();
        self.disk.history = plan.history;
        for (app, since) in self.switching() {
            // The same trial under a newer number is no new one.
            let goes_on = was
                .get(app)
                .is_some_and(|was| *was == current(&self.disk.history, app));
            if !goes_on {
                asks.violations.extend(self.untold(app, since));
                asks.began.push((app.clone(), since));
            }
        }
        let (requests, next_request) = self.follow(&plan.turns, now, random);
        asks.requests = requests;
        asks.fetch = plan.fetch;
        // A staging that was given up has ended: that is news, so it is planned again at once.
        let abandoned = plan
            .steps
            .iter()
            .any(|step| matches!(step, Step::AbandonStaging { .. }));
        for step in plan.steps {
            if self.verbose {
                asks.log.push(format!("{} begins {step:?}", self.id));
            }
            self.begin(step, random, &mut asks);
        }
        let natural = self
            .containers
            .values()
            .flat_map(|live| [live.ready_at, live.ends_at, live.hangs_at])
            .flatten();
        let wake = plan.wake_at.map(|ms| self.booted_at + ms.0);
        asks.wake_at = natural
            .chain(wake)
            .chain(abandoned.then_some(now + 10))
            .chain(next_request)
            .filter(|at| *at > now)
            .min();
        asks.report = self.note_status(plan.status);
        asks
    }

    fn note_status(&mut self, apps: Vec<AppStatus>) -> bool {
        let back = apps
            .iter()
            .filter(|status| status.phase == Phase::RolledBack);
        self.gave_up
            .extend(back.map(|status| (status.app.clone(), status.since, status.release)));
        let version = self.version();
        let same = self
            .reported
            .as_ref()
            .is_some_and(|known| known.apps == apps && known.version == version);
        if same {
            return false;
        }
        self.seq += 1;
        self.reported = Some(Reported {
            boot: self.disk.starts,
            seq: self.seq,
            version,
            inventory: foreshore_protocol::message::Inventory {
                agent_version: "0.1.0".to_owned(),
                arch: "amd64".to_owned(),
                kernel: "6.1".to_owned(),
                memory_bytes: 1 << 30,
                disk_bytes: 1 << 34,
                disk_free_bytes: 1 << 33,
                disk_reserve_bytes: None,
                metered: None,
                dev_nodes: None,
                labels: BTreeMap::new(),
            },
            apps,
        });
        true
    }

    /// Whether an earlier poll is planned for no later than `at`; else notes that one is now.
    pub fn is_planned(&mut self, at: Ms, now: Ms) -> bool {
        if self
            .planned
            .is_some_and(|planned| planned > now && planned <= at)
        {
            return true;
        }
        self.planned = Some(at);
        false
    }

    /// A manifest arrives.
    pub fn receive_release(&mut self, digest: Digest, release: &Release) {
        self.disk.releases.insert(digest, release.clone());
    }
}
