//! [`History`]: what must be remembered to plan well, across crashes and reboots, and nothing else.

use std::collections::BTreeMap;

use foreshore_protocol::message::{Phase, Reason};
use foreshore_protocol::{AppName, Digest, ServiceName, Version};
use serde::{Deserialize, Serialize};

use super::{BootId, BootMs, Now, Outcome};
use crate::runtime::Exit;

/// All that is remembered. All times in it are of the boot it names; another boot makes them void.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct History {
    /// The life of the kernel that all times here belong to.
    pub boot: BootId,
    /// Every app that runs or should run here, or is being removed.
    pub apps: BTreeMap<AppName, AppHistory>,
    /// No garbage collection before this.
    pub collect_after: BootMs,
    /// Staging ran out of disk space: collect garbage before it is tried again.
    pub disk_full: bool,
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
    /// How often in a row staging failed.
    pub staging_failures: u32,
    /// No staging before this.
    pub stage_after: BootMs,
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
    /// A failure that needs no deadline: set when a start was refused.
    pub failed: Option<Reason>,
}

/// What is remembered of one service.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceHistory {
    /// The highest instance number ever used.
    pub last_instance: u64,
    /// The spec of that instance ([`foreshore_protocol::release::service_digest`]).
    pub spec: Option<Digest>,
    /// When that instance was started.
    pub started: BootMs,
    /// The highest instance number whose end was taken note of.
    pub ended_instance: u64,
    /// How it ended.
    pub last_exit: Option<Exit>,
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
    /// Takes what came of a step into account. Call it once for every step that ended, before the next plan,
    /// and store the result together with that plan's history.
    pub fn record(&mut self, _outcome: &Outcome, _now: Now) {
        todo!("follows in the next commit")
    }
}
