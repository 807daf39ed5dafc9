//! [`History`]: what must be remembered to plan well, across crashes and reboots, and nothing else.

use std::collections::BTreeMap;

use foreshore_protocol::id::SecretName;
use foreshore_protocol::message::{Phase, Reason, ReasonCode};
use foreshore_protocol::{AppName, Digest, ServiceName, Version};
use serde::{Deserialize, Serialize};

use super::{BootId, BootMs, Now, Outcome, backoff};
use crate::runtime::{ContainerId, Exit};

/// All that is remembered. All times in it are of the boot it names; another boot makes them void.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct History {
    /// The life of the kernel that all times here belong to.
    pub boot: BootId,
    /// Every app that runs or should run here, or is being removed.
    pub apps: BTreeMap<AppName, AppHistory>,
    /// Releases whose staging or fetching failed and that are still wanted.
    pub staging: BTreeMap<Digest, StagingHistory>,
    /// No container has a higher instance number than this, of all apps that were removed.
    pub instance_floor: u64,
    /// No garbage collection before this.
    pub collect_after: BootMs,
    /// Staging ran out of disk space: collect garbage before it is tried again.
    pub disk_full: bool,
    /// The disk is short and garbage was collected for it.
    pub swept: bool,
    /// While the disk is short, nobody is evicted before this.
    pub evict_after: BootMs,
}

/// What is remembered of one app.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AppHistory {
    /// The release whose services are kept running now.
    pub current: Option<Digest>,
    /// While `current` has to prove itself.
    pub trial: Option<Trial>,
    /// Where to go back to.
    pub last_known_good: Option<LastKnownGood>,
    /// How far the newest assignment is.
    pub assignment: Option<Assignment>,
    /// What failed here and is not tried again; the newest 8.
    pub poisoned: Vec<Poison>,
    /// Every service that had a container since the app came here.
    pub services: BTreeMap<ServiceName, ServiceHistory>,
    /// Old containers that run on beside those that took their place.
    pub kept: BTreeMap<ServiceName, Kept>,
}

/// An old container that runs on beside the one that took its place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// What was remembered of it when the new one was started; `instance` says which it is, and `spec` what.
    pub service: ServiceHistory,
    /// The last-known-good that it is of.
    pub release: Digest,
    /// How long it is kept from when the new one is ready, in milliseconds.
    pub keep_ms: u64,
    /// The spec of the new one.
    pub beside: Digest,
    /// Until when, besides the trial.
    pub until: KeptUntil,
}

/// Until when a [`Kept`] one is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum KeptUntil {
    /// Its time begins when the new one is ready.
    Ready,
    /// Until this.
    At(BootMs),
    /// It is let go: to be stopped, and not to be taken back.
    Over,
}

/// The release that last passed its soak here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastKnownGood {
    /// Which.
    pub release: Digest,
    /// In which assignment.
    pub since: Version,
}

/// A release that failed in an assignment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Poison {
    /// In which assignment.
    pub since: Version,
    /// Which.
    pub release: Digest,
    /// Why.
    pub reason: Reason,
}

/// How far an assignment is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Assignment {
    /// As in the head.
    pub since: Version,
    /// As in the head.
    pub release: Digest,
    /// How far.
    pub phase: Phase,
    /// Why, for phases that need a reason.
    pub reason: Option<Reason>,
}

/// What is remembered of a release that could not be fetched or staged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StagingHistory {
    /// How often in a row.
    pub failures: u32,
    /// Not tried again before this.
    pub after: BootMs,
    /// Why, the last time.
    pub reason: Reason,
    /// Whether trying again is of no use.
    pub permanent: bool,
    /// The revisions of the secrets that its images were pulled with, the last time.
    pub logins: BTreeMap<SecretName, u64>,
}

/// A release under judgement: it was switched to and is not the last-known-good yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trial {
    /// In which assignment.
    pub since: Version,
    /// Which; equal to [`AppHistory::current`].
    pub release: Digest,
    /// How long all must stay well, in milliseconds.
    pub soak_ms: u64,
    /// How long from `started` until all must be ready, in milliseconds.
    pub progress_deadline_ms: u64,
    /// When it was switched to, or when this boot or agent took it up again.
    pub started: BootMs,
    /// Since when all have been ready without a break; `None` while not all are.
    pub soaking_since: Option<BootMs>,
    /// How often the device booted during it. A release that takes the device down fails by this.
    pub boots: u32,
    /// How often something else broke into it: an agent that ended, a container that was lost without an end of its
    /// own making. One says nothing about the release; a release that brings them about again and again fails by this.
    pub setbacks: u32,
    /// A failure that needs no deadline: set when a start was refused.
    pub failed: Option<Reason>,
    /// How many ends of services during the soak are forgiven.
    pub max_restarts: u32,
    /// How many there were.
    pub restarts: u32,
    /// Whether the hub must be reached again.
    pub hub: HubProof,
}

/// Whether a release proved that it leaves the way to the hub open.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum HubProof {
    /// Nobody asked, or there was no way before.
    #[default]
    NotAsked,
    /// The hub must be reached within so many milliseconds of `since`.
    Awaited {
        /// When it was switched to, or when this boot began.
        since: BootMs,
        /// For how long.
        within_ms: u64,
    },
    /// It was reached.
    Given,
}

/// What is remembered of one service.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceHistory {
    /// The highest instance number ever used.
    pub last_instance: u64,
    /// The instance that all below speaks of; the newest, unless an update that began beside it was given up.
    pub instance: u64,
    /// The spec of that instance ([`foreshore_protocol::release::service_digest`]).
    pub spec: Option<Digest>,
    /// The release that instance was started for.
    pub release: Option<Digest>,
    /// When that instance was started.
    pub started: BootMs,
    /// The instance that was last seen or known to be there; 0 when there is none that we know of.
    pub present: u64,
    /// Whether the end of that instance was taken note of: it does not run, or must not.
    pub ended: bool,
    /// The instance that the agent is stopping so that another takes its place; 0 when there is none.
    pub stopping: u64,
    /// How it ended by itself; `None` when it was lost, or is to be stopped.
    pub last_exit: Option<Exit>,
    /// Why it was stopped, when that was not for another to take its place.
    pub condemned: Option<Condemned>,
    /// Whether it was started in this boot for this spec: from then on it does not wait for what it depends on.
    pub began: bool,
    /// The instance whose startup probe succeeded; it is not asked again.
    pub came_up: u64,
    /// How often a container of this spec was started again.
    pub restarts: u32,
    /// How often in a row it ended or did not start, without a stable time between.
    pub failures: u32,
    /// Whether and when it may be started.
    pub resume: Resume,
    /// Why it is not well, if a start, stop or remove failed.
    pub trouble: Option<Reason>,
    /// Stopping or removing failed: not tried again before this.
    pub stuck_until: BootMs,
}

/// Why a container was stopped that was not to be replaced.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Condemned {
    /// What kind of reason.
    pub cause: Cause,
    /// For people; completes "it is stopped because".
    pub why: String,
}

/// The kinds of [`Condemned`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Cause {
    /// Its liveness or startup probe failed.
    Probe,
    /// It wrote more to its root file system than it may.
    DiskLimit,
    /// The device is short of disk space.
    Evicted,
    /// A secret of it has a new value.
    Secret,
}

/// Whether and when a service without a running container may be started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Resume {
    /// At once.
    #[default]
    Now,
    /// Not before this.
    At(BootMs),
    /// Never: it ended, and its restart policy says that this was all.
    Never,
}

impl History {
    /// A history for a device whose own was lost. `instance_floor` must be above every instance number that
    /// was ever used, as far as that can be known: seconds since 1970 are.
    #[must_use]
    pub fn rebuilt(instance_floor: u64) -> Self {
        Self {
            instance_floor,
            ..Self::default()
        }
    }

    /// Takes what came of a step into account. Call it once for every step that ended, before the next plan,
    /// and store the result together with that plan's history.
    pub fn record(&mut self, outcome: &Outcome, now: Now) {
        self.rebase(now);
        match outcome {
            Outcome::Staged { release } => {
                self.staging.remove(release);
            }
            Outcome::StagingFailed {
                release,
                reason,
                logins,
            } => {
                self.disk_full |= reason.code == ReasonCode::DiskFull;
                let permanent = matches!(
                    reason.code,
                    ReasonCode::NoMatchingPlatform | ReasonCode::BadImage | ReasonCode::BadRelease
                );
                let logins = logins.clone();
                self.record_staging_failure(*release, reason.clone(), permanent, logins, now);
            }
            Outcome::BadRelease {
                release,
                message,
                schema_unknown,
            } => {
                let reason = reason(ReasonCode::BadRelease, None, message);
                let logins = BTreeMap::new();
                self.record_staging_failure(*release, reason, *schema_unknown, logins, now);
            }
            Outcome::Started { id } => {
                let service = self.service_of(id);
                if let Some(service) = service.filter(|service| service.instance == id.instance) {
                    service.present = id.instance;
                    service.started = now.ms;
                    service.condemned = None;
                    service.resume = Resume::Now;
                    service.trouble = None;
                }
            }
            Outcome::StartFailed {
                id,
                code,
                message,
                refused,
            } => {
                let why = reason(*code, Some(id.service.clone()), message);
                self.record_start_failure(id, why, *refused, now);
            }
            Outcome::Stopped { id } => {
                if let Some(service) = self.service_of(id) {
                    // Stopped to be replaced: what comes in its place waits for its dependencies again.
                    service.began &= service.instance != id.instance || service.condemned.is_some();
                    service.is_gone(id.instance);
                    service.trouble = None;
                }
            }
            Outcome::SecretsRenewed { id } => {
                if let Some(service) = self.service_of(id) {
                    service.trouble = None;
                }
            }
            Outcome::Removed { id } => {
                if let Some(service) = self.service_of(id) {
                    service.is_gone(id.instance);
                }
            }
            Outcome::Stuck { id, message } => {
                if let Some(service) = self.service_of(id) {
                    service.stuck_until = now.ms.plus(backoff::STUCK_MS);
                    service.trouble = Some(reason(
                        ReasonCode::Internal,
                        Some(id.service.clone()),
                        message,
                    ));
                }
            }
            Outcome::Collected => {
                // The first failure for want of space is answered by this collection: it is tried again at once.
                for staging in self.staging.values_mut() {
                    if self.disk_full
                        && staging.reason.code == ReasonCode::DiskFull
                        && staging.failures == 1
                    {
                        staging.after = now.ms;
                    }
                }
                self.disk_full = false;
            }
        }
    }

    fn service_of(&mut self, id: &ContainerId) -> Option<&mut ServiceHistory> {
        self.apps
            .get_mut(&id.app)
            .map(|app| app.services.entry(id.service.clone()).or_default())
    }

    fn record_staging_failure(
        &mut self,
        release: Digest,
        reason: Reason,
        permanent: bool,
        logins: BTreeMap<SecretName, u64>,
        now: Now,
    ) {
        let failures = self
            .staging
            .get(&release)
            .map_or(0, |staging| staging.failures)
            .saturating_add(1);
        let delay = backoff::staging_delay_ms(now.boot, &release, failures);
        self.staging.insert(
            release,
            StagingHistory {
                failures,
                after: now.ms.plus(delay),
                reason,
                permanent,
                logins,
            },
        );
    }

    fn record_start_failure(&mut self, id: &ContainerId, why: Reason, refused: bool, now: Now) {
        let Some(app) = self.apps.get_mut(&id.app) else {
            return;
        };
        let service = app.services.entry(id.service.clone()).or_default();
        if service.instance != id.instance {
            return;
        }
        let for_release = service.release;
        service.is_gone(id.instance);
        service.failures = service.failures.saturating_add(1);
        let name = format!("{}.{}", id.app, id.service);
        let delay = backoff::restart_delay_ms(now.boot, &name, service.failures);
        service.resume = Resume::At(now.ms.plus(delay));
        service.trouble = Some(why.clone());
        // A start that was begun for an older release says nothing about the one on trial now.
        if refused
            && let Some(trial) = &mut app.trial
            && for_release == Some(trial.release)
        {
            trial.failed.get_or_insert(why);
        }
    }

    /// Makes all times belong to `now.boot`. After a reboot no container is there, no back-off holds, and a
    /// trial begins again.
    pub(super) fn rebase(&mut self, now: Now) {
        if self.boot == now.boot {
            return;
        }
        self.boot = now.boot;
        self.collect_after = BootMs::default();
        self.evict_after = BootMs::default();
        self.swept = false;
        for staging in self.staging.values_mut() {
            staging.after = BootMs::default();
        }
        for app in self.apps.values_mut() {
            if let Some(trial) = &mut app.trial {
                trial.started = now.ms;
                trial.soaking_since = None;
                if let HubProof::Awaited { since, .. } = &mut trial.hub {
                    *since = now.ms;
                }
                trial.boots = trial.boots.saturating_add(1);
            }
            // They went with the boot before.
            app.kept.clear();
            for service in app.services.values_mut() {
                service.present = 0;
                service.ended = true;
                service.began = false;
                service.started = BootMs::default();
                service.failures = 0;
                service.stuck_until = BootMs::default();
                service.trouble = None;
                if let Resume::At(_) = service.resume {
                    service.resume = Resume::Now;
                }
            }
        }
    }
}

impl ServiceHistory {
    /// Whether it ended for good, having done what it had to.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.resume == Resume::Never
            && self.condemned.is_none()
            && self.last_exit.is_some_and(|exit| exit.code == 0)
    }

    /// Whether it is not known to have ended by itself nor stopped for a reason of its own.
    #[must_use]
    pub const fn was_lost(&self) -> bool {
        self.ended && self.condemned.is_none() && self.last_exit.is_none()
    }

    /// An instance is not there any more, or does not run.
    fn is_gone(&mut self, instance: u64) {
        if self.instance == instance {
            self.ended = true;
            self.present = 0;
        }
    }

    /// An instance ended because the agent ended it: that says nothing about what ran in it.
    pub(super) fn was_stopped(&mut self, instance: u64) {
        if self.instance == instance && !self.ended {
            self.ended = true;
            self.present = 0;
            self.last_exit = None;
        }
    }

    /// Whether an agent that is not there any more began to start its instance and nobody knows what came of it.
    pub(super) fn was_cut_off(&self, watching_since: BootMs) -> bool {
        !self.ended
            && self.instance != 0
            && self.present != self.instance
            && self.started < watching_since
    }

    /// Whether the end of this instance was taken note of.
    pub(super) const fn has_ended(&self, instance: u64) -> bool {
        self.instance == instance && self.ended
    }
}

impl AppHistory {
    /// Why this release failed in this assignment, if it did.
    #[must_use]
    pub fn poison(&self, since: Version, release: &Digest) -> Option<&Poison> {
        self.poisoned
            .iter()
            .find(|poison| poison.since == since && poison.release == *release)
    }
}

/// A reason whose text is cut to what a report may hold.
pub(super) fn reason(code: ReasonCode, service: Option<ServiceName>, message: &str) -> Reason {
    Reason {
        code,
        service,
        message: cut(message, MAX_MESSAGE_BYTES),
    }
}

/// [`Reason::message`] and the message of an event have at most this many bytes.
const MAX_MESSAGE_BYTES: usize = 512;

fn cut(text: &str, max: usize) -> String {
    text[..text.floor_char_boundary(max)].to_owned()
}
