//! What the agent does next, from what it should run, what it sees, what it remembers and the time.
//!
//! Pure: no clock, no file, no task, no randomness. [`plan`] is asked again after every event and every
//! finished step; it keeps nothing between calls but the [`History`] it returns. So a step that was cut by a
//! crash or a power loss needs no undoing: what is left of it is seen and planned from.
//!
//! ```text
//! Desired ──┐
//! Observed ─┤                 ┌─> history   stored before the first step is done
//! History ──┼─> plan() ─> Plan┼─> steps     done by `execute`; independent of each other
//! Now ──────┘                 ├─> fetch     release manifests to ask the hub for
//!    ▲                        ├─> wake_at   when to ask again if nothing happens
//!    └── History::record <────┴─> status    what is reported of each app
//!         (Outcome of a step)
//! ```
//!
//! | file | decides |
//! |---|---|
//! | `plan/app.rs` | how an assignment goes: staging and switching |
//! | `plan/ends.rs` | what became of containers, and when they may be started again |
//! | `plan/service.rs` | which containers are stopped, removed, started |
//! | `plan/next.rs` | the next step on one of them |
//! | `plan/kept.rs` | which old containers run on beside the new ones |
//! | `plan/secret.rs` | whose secrets are missing, and who must get new ones |
//! | `plan/health.rs` | how well services are, and what they wait for |
//! | `plan/backoff.rs` | how long to wait before trying again |
//! | `plan/collect.rs` | which images and releases are no longer needed |
//! | `plan/evict.rs` | who is stopped when the device runs out of disk space |
//! | `plan/trial.rs` | how a release on trial is judged |
//! | `plan/turn.rs` | whether a disruption budget lets others go first |
//! | `plan/window.rs` | whether an app's windows are open |
//! | `plan/status.rs` | what is reported |
//! | `plan/history.rs` | what is remembered, and how a step's outcome changes it |
//! | `plan/check.rs` | whether a plan keeps the rules; for tests and debug builds |

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

use foreshore_protocol::id::SecretName;
use foreshore_protocol::message::{AppStatus, BudgetGroup, EventKind, Head, HeadApp, Reason};
use foreshore_protocol::release::Release;
use foreshore_protocol::{AppName, Digest, ServiceName, Version};
use serde::{Deserialize, Serialize};

use crate::policy::PolicyVerdict;
use crate::runtime::{Container, ContainerId};

mod app;
mod backoff;
pub mod check;
mod collect;
mod ends;
mod evict;
mod health;
mod history;
mod kept;
mod next;
mod secret;
mod service;
mod status;
mod step;
#[cfg(test)]
mod tests;
mod trial;
mod turn;
mod window;
#[cfg(test)]
mod world;

pub use history::{
    AppHistory, Assignment, Cause, Condemned, History, HubProof, Kept, KeptUntil, LastKnownGood,
    Poison, Resume, ServiceHistory, StagingHistory, Trial,
};
pub use step::{Outcome, Step};
pub use turn::{Turn, TurnWish};
pub use window::{DeviceZone, Look, WallClock, look};

/// One life of the kernel: `/proc/sys/kernel/random/boot_id`. Times of different lives do not compare.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct BootId(pub [u8; 16]);

/// Milliseconds of `CLOCK_BOOTTIME`: never jumps, and counts while suspended (clock_gettime(2)).
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct BootMs(pub u64);

impl BootMs {
    /// This many milliseconds later; the end of time rather than an overflow.
    #[must_use]
    pub const fn plus(self, ms: u64) -> Self {
        Self(self.0.saturating_add(ms))
    }

    /// Milliseconds from `earlier` to this; 0 if it is not earlier.
    #[must_use]
    pub const fn since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

/// The time, as far as a plan needs it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Now {
    /// Which life of the kernel.
    pub boot: BootId,
    /// How far into it.
    pub ms: BootMs,
}

/// What the device should run: the newest [`Head`] that it has stored.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Desired {
    /// `None` before the first head, or when the stored one was damaged: what runs keeps running, and
    /// nothing is removed.
    pub version: Option<Version>,
    /// Every app that selects this device.
    pub apps: BTreeMap<AppName, HeadApp>,
    /// The disruption budgets that the device is under: if there is one, switching needs a [`Turn`].
    pub budgets: Vec<BudgetGroup>,
}

impl From<&Head> for Desired {
    fn from(head: &Head) -> Self {
        Self {
            version: Some(head.version),
            apps: head
                .apps
                .iter()
                .map(|app| (app.app.clone(), app.clone()))
                .collect(),
            budgets: head.budgets.clone(),
        }
    }
}

/// What is there: found from disk, the kernel and the probes, not remembered.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Observed {
    /// When this agent began to watch. A soak counts only what was watched without a break.
    pub watching_since: BootMs,
    /// Every container, in any order.
    pub containers: Vec<ObservedContainer>,
    /// The release manifests on disk whose digest was checked.
    pub releases: BTreeMap<Digest, Release>,
    /// The images that are wholly on disk, by the digest that releases name them by.
    pub images: BTreeSet<Digest>,
    /// Those of them in which rot was found: they can be started, and are to be staged again.
    pub damaged: BTreeSet<Digest>,
    /// Which update locks are had, and which are not to be had.
    pub update_locks: UpdateLocks,
    /// The images that stay whether a release names them or not.
    pub pinned: BTreeSet<Digest>,
    /// How the file system of the state directory is.
    pub disk: Disk,
    /// What running containers take of it, as far as that was counted.
    pub usage: BTreeMap<ContainerId, DiskUsage>,
    /// The releases in `releases` that the device's policy does not allow, or not now.
    pub verdicts: BTreeMap<Digest, PolicyVerdict>,
    /// Images on disk that a release must not be tried with yet, by release: the policy wants a signature of them that
    /// is not here. What runs already, or is gone back to, is not asked for one.
    pub unsigned: BTreeMap<Digest, BTreeSet<Digest>>,
    /// The secrets that are there, with their revisions.
    pub secrets: BTreeMap<SecretName, u64>,
    /// The turns that the hub has granted, and until when they count.
    pub turns: BTreeMap<AppName, Turn>,
    /// What time it is, if that is known. For windows only: everything else goes by [`Now`].
    pub wall: WallClock,
    /// Whose local time windows are in that name no other.
    pub zone: DeviceZone,
    /// What is known of the way to the hub.
    pub hub: HubContact,
    /// What is being done at this moment; no second step is planned on it.
    pub busy: Busy,
}

/// What is known of the way to the hub. Only a trial that must prove that it is open asks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct HubContact {
    /// Since when there is a session with the broker; `None` while there is none.
    pub connected_since: Option<BootMs>,
    /// A session whose broker is out of reach is noticed after this long, in milliseconds.
    pub noticed_after_ms: u64,
    /// When the newest report was sent that the hub acknowledged.
    pub answered: Option<BootMs>,
    /// When the broker, or the machine where it should be, last refused a connection: it is away, but the way to it is
    /// open.
    pub refused: Option<BootMs>,
}

impl HubContact {
    /// Whether the way to the hub is known to have been open after `since`; else when it may be, if nothing changes.
    fn was_reached_after(&self, since: BootMs, now: BootMs) -> Result<(), Option<BootMs>> {
        let heard = [self.connected_since, self.answered, self.refused];
        if heard.into_iter().flatten().any(|at| at > since) {
            return Ok(());
        }
        // A session from before is proof only once it would have been noticed that it is dead.
        match self
            .connected_since
            .map(|_| since.plus(self.noticed_after_ms))
        {
            Some(at) if at <= now => Ok(()),
            later => Err(later),
        }
    }
}

impl Observed {
    /// The images that are here for a trial of `release`.
    fn images_for(&self, release: &Digest) -> Cow<'_, BTreeSet<Digest>> {
        match self.unsigned.get(release) {
            None => self.sound_images(),
            Some(unsigned) => {
                Cow::Owned(self.sound_images().difference(unsigned).copied().collect())
            }
        }
    }

    /// The images that are here and need not be staged again.
    fn sound_images(&self) -> Cow<'_, BTreeSet<Digest>> {
        if self.damaged.is_empty() {
            Cow::Borrowed(&self.images)
        } else {
            Cow::Owned(self.images.difference(&self.damaged).copied().collect())
        }
    }
}

/// How the file system of the state directory is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Disk {
    /// Whether less is free than is to stay free; from then on until a quarter of that more is free.
    pub low: bool,
    /// Bytes that are free.
    pub free: u64,
    /// Bytes that are to stay free.
    pub reserve: u64,
    /// Bytes that would have to become free so that it is not low any more; 0 when it is not.
    pub missing: u64,
}

/// What a container takes of the disk, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DiskUsage {
    /// Its writable layer, which goes with it; `u64::MAX` is too large to be counted.
    pub layer: u64,
    /// How much the volumes that it can write to have grown since this agent watches it. They stay when it goes.
    pub grown: u64,
}

/// Update locks ([`foreshore_protocol::manifest::Service::update_lock`]) as last tried.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct UpdateLocks {
    /// The agent has them: these apps may be updated.
    pub held: BTreeSet<AppName>,
    /// The apps have them.
    pub refused: BTreeSet<AppName>,
}

/// One container and its probes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObservedContainer {
    /// As the runtime lists it.
    pub container: Container,
    /// What its probes say. Those that its service does not have are not looked at.
    pub probes: ProbeStates,
}

/// What the probes of one container say.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ProbeStates {
    /// Once ready, it stays so.
    pub startup: ProbeState,
    /// Unknown before the startup probe succeeded.
    pub readiness: ProbeState,
    /// Unknown before the startup probe succeeded.
    pub liveness: ProbeState,
}

/// What a probe says, thresholds applied.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum ProbeState {
    /// Too few answers yet.
    #[default]
    Unknown,
    /// Ready.
    Ready,
    /// Not ready; the last answer, for people.
    NotReady(String),
}

/// Steps that have begun and not ended.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Busy {
    /// Services with a [`Step::Stop`], [`Step::Remove`], [`Step::Start`] or [`Step::RenewSecrets`] under way.
    pub services: BTreeSet<(AppName, ServiceName)>,
    /// The release whose images are being staged.
    pub staging: Option<Digest>,
    /// A [`Step::Collect`] is under way.
    pub collecting: bool,
}

/// What to do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Replaces the history. Must be stored before the first step is done: it holds the number of a
    /// container before that container exists, and a decision before it is acted on.
    pub history: History,
    /// What can be done now, each on another service or resource; in the order to begin them.
    pub steps: Vec<Step>,
    /// Release manifests that are needed and not there: to be had from the hub.
    pub fetch: BTreeSet<Digest>,
    /// Apps whose update lock is wanted; all others are given back.
    pub update_locks: BTreeSet<AppName>,
    /// What turns are wanted for; all others are given back, unless they were used.
    pub turns: BTreeMap<AppName, TurnWish>,
    /// When to plan again if nothing happens before; `None` is never.
    pub wake_at: Option<BootMs>,
    /// What is reported, sorted by app.
    pub status: Vec<AppStatus>,
    /// What was decided or noticed by this plan, for the event log.
    pub notices: Vec<Notice>,
}

/// Something that was decided or noticed: becomes a [`foreshore_protocol::message::Event`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Notice {
    /// What kind.
    pub kind: EventKind,
    /// Which app.
    pub app: Option<AppName>,
    /// Which service.
    pub service: Option<ServiceName>,
    /// For people.
    pub message: String,
}

/// What to do next, so that in the end what runs is what is desired, or the last-known-good.
///
/// Equal inputs give equal plans. A plan with nothing to do has no steps and equals its own next plan.
#[must_use]
pub fn plan(desired: &Desired, observed: &Observed, history: &History, now: Now) -> Plan {
    let mut history = history.clone();
    history.rebase(now);
    let mut draft = Draft::new(observed, &desired.budgets, now, &history);
    draft.victim = evict::choose(&mut draft, &mut history);
    draft.disk_full = history.disk_full;
    let mut status = Vec::new();
    let mut apps = std::mem::take(&mut history.apps);
    let names: BTreeSet<AppName> = apps
        .keys()
        .chain(desired.apps.keys())
        .chain(
            observed
                .containers
                .iter()
                .map(|seen| &seen.container.id.app),
        )
        .cloned()
        .collect();
    for name in names {
        let mut app = apps.remove(&name).unwrap_or_default();
        let containers: Vec<_> = observed
            .containers
            .iter()
            .filter(|seen| seen.container.id.app == name)
            .collect();
        let floor = history.instance_floor;
        let wanted = desired.apps.get(&name);
        if desired.version.is_some() && wanted.is_none() {
            if app::remove(&mut draft, &name, &mut app, &containers, floor) {
                let used = app.services.values().map(|service| service.last_instance);
                history.instance_floor = used.fold(floor, u64::max);
                continue;
            }
        } else {
            app::advance(&mut draft, &name, &mut app, &containers, wanted, floor);
            let forgotten = service::forget(&draft, &name, &mut app, &containers);
            history.instance_floor = floor.max(forgotten);
        }
        status.extend(status::status(&name, &app, observed, &containers));
        history.apps.insert(name, app);
    }
    draft.finish_staging(&mut history);
    collect::advance(&mut draft, &mut history, desired.version);
    Plan {
        steps: draft.steps,
        fetch: draft.fetch,
        update_locks: draft.update_locks,
        turns: draft.turns,
        wake_at: draft.wake_at,
        notices: draft.notices,
        status,
        history,
    }
}

/// A plan in the making.
#[derive(Debug)]
struct Draft<'a> {
    observed: &'a Observed,
    budgets: &'a [BudgetGroup],
    now: Now,
    staging: BTreeMap<Digest, StagingHistory>,
    disk_full: bool,
    victim: Option<evict::Victim>,
    steps: Vec<Step>,
    fetch: BTreeSet<Digest>,
    update_locks: BTreeSet<AppName>,
    turns: BTreeMap<AppName, TurnWish>,
    /// Releases with images that are not there, in the order they came up.
    candidates: Vec<(AppName, Digest, Vec<String>)>,
    forget_staging: BTreeSet<Digest>,
    collect_soon: bool,
    wake_at: Option<BootMs>,
    notices: Vec<Notice>,
}

impl<'a> Draft<'a> {
    fn new(
        observed: &'a Observed,
        budgets: &'a [BudgetGroup],
        now: Now,
        history: &History,
    ) -> Self {
        Self {
            observed,
            budgets,
            now,
            staging: history.staging.clone(),
            disk_full: history.disk_full,
            victim: None,
            steps: Vec::new(),
            fetch: BTreeSet::new(),
            update_locks: BTreeSet::new(),
            turns: BTreeMap::new(),
            candidates: Vec::new(),
            forget_staging: BTreeSet::new(),
            collect_soon: false,
            wake_at: None,
            notices: Vec::new(),
        }
    }

    /// Whether `at` is still to come; if so, planning happens again then.
    fn is_later(&mut self, at: BootMs) -> bool {
        if at <= self.now.ms {
            return false;
        }
        self.wake_at = Some(self.wake_at.map_or(at, |earlier| earlier.min(at)));
        true
    }

    fn is_busy(&self, app: &AppName, service: &ServiceName) -> bool {
        // The set's key is owned; devices have few services.
        let mut busy = self.observed.busy.services.iter();
        busy.any(|(busy_app, busy_service)| busy_app == app && busy_service == service)
    }

    fn notice(
        &mut self,
        kind: EventKind,
        app: &AppName,
        service: Option<ServiceName>,
        message: String,
    ) {
        self.notices.push(Notice {
            kind,
            app: Some(app.clone()),
            service,
            message,
        });
    }

    /// Why a release could not be fetched or staged the last time, and whether that is for good.
    fn staging_trouble(&self, release: &Digest) -> Option<(Reason, bool)> {
        if self.forget_staging.contains(release) {
            return None;
        }
        let staging = self.staging.get(release)?;
        Some((staging.reason.clone(), staging.permanent))
    }

    /// Whether a release that failed to come is to be left alone for now. Not once a secret that its images are pulled with
    /// has another value than it had then.
    fn is_held_off(&mut self, release: &Digest) -> bool {
        if self.forget_staging.contains(release) {
            return false;
        }
        match self.staging.get(release) {
            None => false,
            Some(staging) if staging.permanent => true,
            Some(staging) if secret::has_other_logins(self.observed, release, staging) => false,
            Some(staging) => {
                let after = staging.after;
                self.is_later(after)
            }
        }
    }

    /// Asks for a release manifest.
    fn fetch(&mut self, release: Digest) {
        if !self.is_held_off(&release) {
            self.fetch.insert(release);
        }
    }

    /// Asks for images of a release; with none missing, for nothing. It waits for the secrets that they are pulled with.
    fn stage(&mut self, app: &AppName, release: Digest, images: Vec<String>) {
        let known = self
            .candidates
            .iter()
            .any(|(_, other, _)| *other == release);
        let waits = secret::missing_login(self.observed, &release).is_some();
        if !images.is_empty() && !known && !waits {
            self.candidates.push((app.clone(), release, images));
        }
    }

    /// Picks at most one release to stage, gives up one that nobody wants any more, and forgets troubles of
    /// releases that are not wanted.
    fn finish_staging(&mut self, history: &mut History) {
        let wanted: BTreeSet<Digest> = history
            .apps
            .values()
            .flat_map(|app| {
                let assigned = app.assignment.as_ref().map(|assignment| assignment.release);
                [app.current, assigned].into_iter().flatten()
            })
            .collect();
        history.staging.retain(|release, _| {
            wanted.contains(release) && !self.forget_staging.contains(release)
        });
        if let Some(release) = self.observed.busy.staging {
            if !self
                .candidates
                .iter()
                .any(|(_, other, _)| *other == release)
            {
                self.steps.push(Step::AbandonStaging { release });
            }
            return;
        }
        if self.disk_full || self.observed.busy.collecting {
            return;
        }
        for (app, release, images) in self.candidates.clone() {
            if !self.is_held_off(&release) {
                self.steps.push(Step::Stage {
                    app,
                    release,
                    images,
                });
                return;
            }
        }
    }
}
