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
//! | `plan/app.rs` | how an assignment goes: staging, switching, trial, return to the last-known-good |
//! | `plan/service.rs` | which containers are stopped, removed, started |
//! | `plan/backoff.rs` | how long to wait before trying again |
//! | `plan/collect.rs` | which images and releases are no longer needed |
//! | `plan/status.rs` | what is reported |
//! | `plan/history.rs` | what is remembered, and how a step's outcome changes it |
//! | `plan/check.rs` | whether a plan keeps the rules; for tests and debug builds |

use std::collections::{BTreeMap, BTreeSet};

use foreshore_protocol::message::{AppStatus, EventKind, Head, HeadApp};
use foreshore_protocol::release::Release;
use foreshore_protocol::{AppName, Digest, ServiceName, Version};
use serde::{Deserialize, Serialize};

use crate::runtime::Container;

mod history;
mod step;

pub use history::{
    AppHistory, Assignment, History, LastKnownGood, Poison, Resume, ServiceHistory, Trial,
};
pub use step::{Outcome, Step};

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
    /// What is being done at this moment; no second step is planned on it.
    pub busy: Busy,
}

/// One container and its probe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObservedContainer {
    /// As the runtime lists it.
    pub container: Container,
    /// What its readiness probe says. Not looked at for a service that has none.
    pub probe: ProbeState,
}

/// What a readiness probe says, thresholds applied.
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
    /// Services with a [`Step::Stop`], [`Step::Remove`] or [`Step::Start`] under way.
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
#[must_use]
pub fn plan(_desired: &Desired, _observed: &Observed, _history: &History, _now: Now) -> Plan {
    todo!("follows in the next commit")
}
