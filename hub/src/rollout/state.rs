//! What a rollout is: the records that the store keeps, and the facts about devices that decisions rest on.
//!
//! This file owns the types and their small questions. How waves are cut is in [`super::waves`], when they
//! pass in [`super::gates`], what breaks the budget in [`super::budget`], what happens next in
//! [`super::advance`].

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use foreshore_protocol::api::{AssignmentState, RolloutState, WaveState};
use foreshore_protocol::id::Labels;
use foreshore_protocol::manifest::{
    Analysis, FailureBudget, OnFailure, Pace, RolloutPolicy, Tail, WaveSpec, WaveTarget,
};
use foreshore_protocol::message::{Phase, Windows};
use foreshore_protocol::quantity::Span;
use foreshore_protocol::{AppName, DeviceId, Digest, Version};
use serde::{Deserialize, Serialize};

use super::analysis::{Measured, Verdict};
use super::assignments::Assignments;
use super::steps::Requirements;
use crate::zone;

/// A point in time on the hub: milliseconds since 1970.
///
/// It must not jump while the hub runs: take the wall clock once at start (no earlier than the latest time
/// in the store) and add a monotonic clock's progress. A wall clock set right by NTP an hour after boot
/// would otherwise end every deadline at once.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct UnixMs(pub u64);

impl UnixMs {
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

/// A point in time on one rollout's own clock, which stands still while the rollout is paused or frozen
/// (see [`Clock`]); milliseconds. Every stored deadline of a rollout is one of these, so a pause
/// changes one record and not a hundred thousand.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Tick(pub u64);

impl Tick {
    /// This many milliseconds later; the end of time rather than an overflow.
    #[must_use]
    pub const fn plus(self, ms: u64) -> Self {
        Self(self.0.saturating_add(ms))
    }
}

/// The clock of a rollout: the hub's, less the time it stood still.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Clock {
    /// Since when it stands still; `None` while it runs.
    pub stopped_at: Option<UnixMs>,
    /// How long it stood still before that, in milliseconds.
    pub stopped_total_ms: u64,
}

impl Clock {
    /// What it shows at `now`.
    #[must_use]
    pub fn tick(&self, now: UnixMs) -> Tick {
        let now = self.stopped_at.map_or(now, |stopped| stopped.min(now));
        Tick(now.0.saturating_sub(self.stopped_total_ms))
    }

    /// When it will show `tick`, if it does not stand still before.
    #[must_use]
    pub const fn unix(&self, tick: Tick) -> UnixMs {
        UnixMs(tick.0.saturating_add(self.stopped_total_ms))
    }

    pub(super) fn stop(&mut self, now: UnixMs) {
        self.stopped_at.get_or_insert(now);
    }

    pub(super) fn go(&mut self, now: UnixMs) {
        if let Some(stopped) = self.stopped_at.take() {
            self.stopped_total_ms = self.stopped_total_ms.saturating_add(now.since(stopped));
        }
    }
}

/// What a device is given for one app: the parts of a `HeadApp` that a rollout decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Placement {
    /// What to run.
    pub release: Digest,
    /// How long all must stay well, in milliseconds.
    pub soak_ms: u64,
    /// How long from switching until every service is ready, in milliseconds.
    pub progress_deadline_ms: u64,
}

/// How a rollout goes about it: the manifest's policy, resolved over the frozen set and frozen with it, and the
/// hub's own patience.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Policy {
    /// The waves as written, the canaries' first; the implied last 100 % is not among them.
    pub waves: Vec<WaveSpec>,
    /// How long a device must stay well, in milliseconds.
    pub soak_ms: u64,
    /// How long a wave waits after its last success, in milliseconds.
    pub bake_ms: u64,
    /// How long a device may take from switching until every service is ready, in milliseconds.
    pub progress_deadline_ms: u64,
    /// At most so many devices hold a slot at once (see [`Assignment::holds_slot`]); at least 1.
    pub max_unavailable: u32,
    /// How fast devices are offered the release.
    #[serde(default)]
    pub pace: Option<Pace>,
    /// What stops the rollout.
    pub budget: FailureBudget,
    /// What happens then.
    pub on_failure: OnFailure,
    /// How long a reachable device may take from the offer until it begins to switch, in milliseconds, before
    /// it is put off and its slot given to another. Not a failure: a slow link or a registry that is
    /// down says nothing about the release. [`Policy::BEGIN_WITHIN_MS`].
    pub begin_within_ms: u64,
    /// How long beyond its own deadlines a switching device may stay without a final report, in milliseconds,
    /// before it counts as silent. [`Policy::SILENT_MARGIN_MS`].
    pub silent_margin_ms: u64,
    /// No wave opens before.
    #[serde(default)]
    pub start_at: Option<UnixMs>,
    /// Rollouts of a higher one go first where they meet on a device; then the older.
    #[serde(default = "Policy::default_priority")]
    pub priority: u8,
    /// How the release reaches those that come after the last wave.
    #[serde(default)]
    pub tail: Tail,
    /// What else is asked of each wave while it bakes.
    #[serde(default)]
    pub analysis: Vec<Analysis>,
    /// What else devices are told with an offer.
    #[serde(default)]
    pub terms: Terms,
    /// What its release and those on the way there can be reached from. Not part of a manifest's policy alone: whoever
    /// opens the rollout knows what was said of the other releases.
    #[serde(default, skip_serializing_if = "Requirements::is_empty")]
    pub requirements: Requirements,
}

/// What devices are told with an offer besides the [`Placement`], and not when they are given their release of before.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Terms {
    /// When they may begin. They alone know whether that is now.
    #[serde(default)]
    pub windows: Windows,
    /// How many unexpected ends of services during the soak are forgiven.
    #[serde(default)]
    pub max_restarts: u32,
    /// Within how many milliseconds they must reach the hub again.
    #[serde(default)]
    pub require_hub_ms: Option<u64>,
}

impl Terms {
    /// How much longer than without them a device may take until it says how it ended, in milliseconds: each end that is
    /// forgiven is followed by a deadline and a soak of its own.
    #[must_use]
    pub fn more_ms(&self, progress_deadline_ms: u64, soak_ms: u64) -> u64 {
        progress_deadline_ms
            .saturating_add(soak_ms)
            .saturating_mul(self.max_restarts.into())
            .saturating_add(self.require_hub_ms.unwrap_or(0))
    }
}

impl Policy {
    /// Half an hour: a guess; a 200 MB image over 1 Mbit/s takes 27 minutes.
    pub const BEGIN_WITHIN_MS: u64 = 30 * 60_000;
    /// 25 minutes: 15 and twice the default keepalive of 5 (a device is told dark after one and a half).
    pub const SILENT_MARGIN_MS: u64 = 25 * 60_000;

    /// Above whatever a manifest may write.
    pub const EMERGENCY_PRIORITY: u8 = u8::MAX;

    const fn default_priority() -> u8 {
        50
    }

    /// Freezes a manifest's policy over a set of `devices` devices.
    #[must_use]
    pub fn freeze(policy: &RolloutPolicy, devices: usize) -> Self {
        let canary = policy.canary.clone().map(WaveTarget::Canary);
        let mut frozen = Self {
            waves: canary
                .map(WaveSpec::from)
                .into_iter()
                .chain(policy.waves.iter().cloned())
                .collect(),
            soak_ms: policy.soak.millis(),
            bake_ms: policy.bake.millis(),
            progress_deadline_ms: policy.progress_deadline.millis(),
            max_unavailable: u32::try_from(policy.max_unavailable.of(devices)).unwrap_or(u32::MAX),
            pace: policy.pace,
            budget: policy.failure_budget,
            on_failure: policy.on_failure,
            begin_within_ms: Self::BEGIN_WITHIN_MS,
            silent_margin_ms: Self::SILENT_MARGIN_MS,
            start_at: policy.start_at.map(|at| UnixMs(at.unix_ms())),
            priority: policy.priority,
            tail: policy.tail,
            analysis: policy.analysis.clone(),
            // Applying refuses unknown zones; only an older hub can meet one, and a window of some kind is better than none.
            terms: Terms {
                windows: zone::windows(policy).unwrap_or_else(|_| zone::in_utc(policy)),
                max_restarts: policy.max_restarts,
                require_hub_ms: policy.require_hub.map(Span::millis),
            },
            requirements: Requirements::default(),
        };
        if policy.emergency {
            frozen.hurry();
        }
        frozen
    }

    /// What [`RolloutPolicy::emergency`] changes: the first wave stays the first wave, and all else is let go.
    fn hurry(&mut self) {
        self.waves.truncate(1);
        for wave in &mut self.waves {
            wave.approval = false;
            wave.bake = None;
        }
        self.bake_ms = 0;
        self.analysis.clear();
        self.max_unavailable = u32::MAX;
        self.pace = None;
        self.start_at = None;
        self.priority = Self::EMERGENCY_PRIORITY;
    }

    /// From the report of a switching phase until the device counts as silent, in milliseconds.
    #[must_use]
    pub fn silent_after_ms(&self) -> u64 {
        self.progress_deadline_ms
            .saturating_add(self.soak_ms)
            .saturating_add(self.terms.more_ms(self.progress_deadline_ms, self.soak_ms))
            .saturating_add(self.silent_margin_ms)
    }
}

/// Why a rollout is paused, stopped or goes back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cause {
    /// An operator said so. Resuming goes on where it stood.
    Operator,
    /// The failure budget broke. Resuming tries the failed devices again.
    Budget,
    /// Every attempted device of a wave failed. Resuming tries the failed devices again.
    WaveFailed,
    /// A gate of [`Policy::analysis`] failed. Resuming asks it anew.
    Analysis,
    /// A gate of [`Policy::analysis`] cannot tell. Resuming asks it anew.
    Inconclusive,
    /// Giving a device its release of before did not work. Resuming tries that again.
    RollbackFailed,
    /// A newer rollout of the app took over.
    Superseded,
}

/// One app's way from one release to the next over a frozen set of devices.
///
/// The whole record is what the store keeps; nothing here can be recomputed from elsewhere, and every
/// counter ([`super::budget::Tally`]) is derived from it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Rollout {
    /// Grows.
    pub id: u64,
    /// Whose.
    pub app: AppName,
    /// The release before; `None` for the app's first.
    pub from: Option<Digest>,
    /// The release it brings.
    pub to: Digest,
    /// Decides which devices come first; drawn anew for each rollout, so that it is not always the same box.
    pub seed: u64,
    /// How it goes about it.
    pub policy: Policy,
    /// How far it is.
    pub state: RolloutState,
    /// Why, unless it runs or completed.
    pub cause: Option<Cause>,
    /// The same for people.
    pub message: Option<String>,
    /// Most of the fleet is dark: its clock stands still and nothing is offered, until that passes.
    pub frozen: bool,
    /// Its clock.
    pub clock: Clock,
    /// When the next device is due by [`Policy::pace`] or, once completed, by the tail's (the theoretical arrival
    /// time of the generic cell rate algorithm, ITU-T I.371).
    #[serde(default)]
    pub next_offer: Tick,
    /// Why nothing is offered any more to those that come after the last wave; `None`: it is.
    #[serde(default)]
    pub tail_stopped: Option<String>,
    /// Its waves in order; the ordinal of the first is 1.
    pub waves: Vec<Wave>,
    /// Its devices.
    pub assignments: Assignments,
    /// When it was opened.
    pub created: UnixMs,
    /// When it became final.
    pub finished: Option<UnixMs>,
}

/// A slice of the frozen set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Wave {
    /// As written, or the implied 100 %.
    pub target: WaveTarget,
    /// How many devices it has.
    pub size: u32,
    /// How far it is.
    pub state: WaveState,
    /// When its bake ends; set while `Baking`.
    pub bake_until: Option<Tick>,
    /// How long it waits after its last success, in milliseconds; `None`: [`Policy::bake_ms`].
    #[serde(default)]
    pub bake_ms: Option<u64>,
    /// Whether an operator must approve it, or has.
    #[serde(default)]
    pub approval: Approval,
    /// What stops the rollout, counted over this wave alone; `None`: only [`Policy::budget`] does.
    #[serde(default)]
    pub budget: Option<FailureBudget>,
    /// What the gates of [`Policy::analysis`] have said since it began to bake; empty before.
    #[serde(default)]
    pub analysis: Vec<Measured>,
}

/// Whether a wave that has passed its gates waits for an operator.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub enum Approval {
    /// It does not.
    #[default]
    NotNeeded,
    /// It does.
    Needed,
    /// It did.
    Given,
}

/// One device's part in a rollout.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Assignment {
    /// In which wave, from 1; 0 if it joined after the last.
    pub wave: u32,
    /// Its place in the order of the whole frozen set, from 0; those that joined later come after it.
    pub rank: u32,
    /// Of which kind it is among those that the canaries are chosen by; 0 where there are none.
    #[serde(default)]
    pub stratum: u32,
    /// It comes after the last wave: it was offline until then, or joined later.
    #[serde(default)]
    pub tail: bool,
    /// What it goes back to; `None`: the app is removed from it. Once it has taken a step, what that gave it.
    pub previous: Option<Placement>,
    /// The release that it was offered last, if that is only a step on its way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub via: Option<Digest>,
    /// Whether it has taken a step on its way.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub stepped: bool,
    /// How far it is.
    pub state: AssignmentState,
    /// The version under which this rollout last wrote the device's desired state (an offer or, once
    /// `Reverted`, the release of before). Reports of another are not about this assignment.
    pub since: Option<Version>,
    /// Whether its last attempt failed; stays when it is given its release of before, not when it leaves.
    pub failed: bool,
    /// Why it is `Deferred`.
    pub deferral: Option<Deferral>,
    /// How far its way back is, once `Reverted`.
    pub revert: Option<Revert>,
    /// When `state` (or `revert`) last changed.
    pub changed: Tick,
    /// When patience ends: to begin, while `Offered` or staging; to end, while switching or going back. None while it
    /// waits for its turn under a disruption budget; to end, once it has its turn.
    pub deadline: Option<Tick>,
    /// Why, if not well; for people.
    pub message: Option<String>,
}

/// Why a device is put off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Deferral {
    /// It is offline. It is offered the release when it returns, or goes on if it was already.
    Offline,
    /// It was offered the release and has not begun to switch in time. The offer stands; it goes on when it
    /// begins.
    NotBegun,
    /// An operator holds the device. It is offered the release when they let it go.
    Held,
}

/// How far a device's way back is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Revert {
    /// Its release of before is written; it runs the new one and has to switch. Holds a slot while online.
    Switching,
    /// Its release of before is written; it never left it, or is there again already.
    Settling,
    /// It says that it has its release of before. Final.
    Done,
    /// It could not go back. Waits for an operator.
    Failed,
    /// It left the fleet or the app's selector; nothing is asked of it any more. Final.
    Gone,
}

/// What the hub knows at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Fleet {
    /// The devices that the app selects now. A device of the rollout that is missing here has left it.
    pub devices: BTreeMap<DeviceId, Facts>,
    /// How alive the whole fleet is, also outside the rollout.
    pub pulse: Pulse,
    /// Since when the hub has heard the broker without a break; `None`: it does not hear it now.
    pub listening_since: Option<UnixMs>,
    /// How long after `listening_since` devices may need to be heard again, in milliseconds (the reconnect
    /// spread). Until then a rollout older than that only takes in reports.
    pub settle_ms: u64,
    /// How many devices are offered something in one look at most; those left over follow in the next, which is due at
    /// once. It bounds how long one transaction holds everybody else up.
    pub offers_at_once: u32,
}

/// What is new in a [`Fleet`] since the last look at a rollout.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum News {
    /// Nobody knows: everything may be.
    All,
    /// What is known of these devices; of all others it is the same, [`Facts::last_seen`] aside.
    Devices(BTreeSet<DeviceId>),
}

/// What is known of one device for one app.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Facts {
    /// Connected, and heard of within two beacon intervals.
    pub online: bool,
    /// When it was last heard of; `None`: never.
    pub last_seen: Option<UnixMs>,
    /// The newest desired state that it has stored.
    pub version: Option<Version>,
    /// What it says of the app; `None`: nothing, it does not have it.
    pub report: Option<Report>,
    /// The assignment that it has a lease for ([`crate::lease`]).
    pub leased: Option<Version>,
    /// An operator holds it: no rollout offers it anything.
    pub held: bool,
    /// Another app's rollout has it in hand: one change at a time.
    pub busy: bool,
}

/// What a device says of one app: the part of an `AppStatus` that decides.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// Of which assignment it speaks.
    pub since: Version,
    /// Of which release.
    pub release: Digest,
    /// How far it is.
    pub phase: Phase,
    /// Why, for people.
    pub reason: Option<String>,
    /// The release that was well there last, or runs there.
    pub has: Option<Digest>,
}

/// How alive the whole fleet is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Pulse {
    /// Devices that are online or were heard of since [`Rollout::pulse_since`].
    pub recent: u64,
    /// Of them, not online.
    pub dark: u64,
}

impl Pulse {
    /// Whole hours: the store counts devices by the hour in which they were last heard of, so that nobody has to look
    /// at each of them.
    pub const HOUR_MS: u64 = 3_600_000;

    /// Who was heard of since then counts at `now`: the full hour that is at least an hour ago.
    #[must_use]
    pub const fn since(now: UnixMs) -> UnixMs {
        let hours = (now.0 / Self::HOUR_MS).saturating_sub(1);
        UnixMs(hours * Self::HOUR_MS)
    }

    /// Counts `(online, last_seen)` of every device of the fleet. As SQL:
    /// `SELECT count(*), sum(NOT online) FROM device WHERE online OR last_seen >= :since`.
    pub fn count(fleet: impl IntoIterator<Item = (bool, Option<UnixMs>)>, since: UnixMs) -> Self {
        fleet
            .into_iter()
            .filter(|(online, seen)| *online || seen.is_some_and(|seen| seen >= since))
            .fold(Self::default(), |pulse, (online, _)| Self {
                recent: pulse.recent + 1,
                dark: pulse.dark + u64::from(!online),
            })
    }

    /// Whether most of the fleet is dark. Then the network or the broker is the likely cause, not a release.
    #[must_use]
    pub const fn mostly_dark(self) -> bool {
        self.dark.saturating_mul(2) > self.recent
    }
}

/// One change to a rollout, decided by [`super::advance`] or a command. The store commits it together with what
/// it asks for: for [`Action::Offer`] and [`Action::Restore`] the device's new desired state and its outbox row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Write the device's desired state: it gets the release.
    Offer {
        /// Which device.
        device: DeviceId,
        /// What to write.
        placement: Placement,
        /// [`Rollout::next_offer`] from now on, where there is a pace.
        next: Option<Tick>,
    },
    /// Write the device's desired state: it gets its release of before.
    Restore {
        /// Which device.
        device: DeviceId,
        /// What to write; `None`: remove the app from it.
        placement: Option<Placement>,
        /// `Switching` or `Settling`.
        revert: Revert,
    },
    /// Record how far a device is.
    Assign {
        /// Which device.
        device: DeviceId,
        /// How far.
        state: AssignmentState,
        /// Why, if `state` is `Deferred`.
        deferral: Option<Deferral>,
        /// When patience ends.
        deadline: Option<Tick>,
        /// Why, for people.
        message: Option<String>,
    },
    /// A device has what it was offered, and that was only a step on its way: it waits for the next one, and would go
    /// back to this one.
    Stepped {
        /// Which device.
        device: DeviceId,
    },
    /// Record how far a device's way back is; it becomes `Reverted` if it was not.
    Reverted {
        /// Which device.
        device: DeviceId,
        /// `Settling`, `Done`, `Failed` or `Gone`.
        revert: Revert,
        /// Why, for people.
        message: Option<String>,
    },
    /// A device comes after the last wave from here on. One that the rollout does not have joins it; one that left
    /// or failed starts over.
    Tail {
        /// Which device.
        device: DeviceId,
        /// Whether it is offered the release anew, although it was before or is new here; what it goes back to.
        anew: Option<Option<Placement>>,
    },
    /// Nothing more is offered to those that come after the last wave, or (`None`) it is again.
    StopTail {
        /// Why, for people.
        message: Option<String>,
    },
    /// An operator approved a wave.
    Approve {
        /// From 1.
        ordinal: u32,
    },
    /// Two devices that were not offered anything change places, because the first is offline and its wave is
    /// the first.
    Replace {
        /// Leaves the first wave.
        out: DeviceId,
        /// Comes into it.
        into: DeviceId,
    },
    /// A wave changes its state.
    Wave {
        /// From 1.
        ordinal: u32,
        /// Its new state.
        state: WaveState,
        /// For `Baking`: when it ends.
        bake_until: Option<Tick>,
    },
    /// A gate of [`Policy::analysis`] answered; it is asked again an interval later.
    Measured {
        /// About which wave, from 1.
        ordinal: u32,
        /// Which gate, from 0.
        gate: usize,
        /// What.
        verdict: Verdict,
        /// Why, for people.
        message: String,
    },
    /// What all gates of [`Policy::analysis`] have said of a wave is forgotten, and they are asked anew.
    MeasureAnew {
        /// From 1.
        ordinal: u32,
    },
    /// The rollout changes its state. `Paused` and `RollbackPaused` stop its clock.
    Enter {
        /// Its new state.
        state: RolloutState,
        /// Why.
        cause: Option<Cause>,
        /// Why, for people.
        message: Option<String>,
    },
    /// Most of the fleet went dark: the rollout's clock stops.
    Freeze,
    /// The fleet is back: its clock goes on.
    Thaw,
}

impl Action {
    /// The one device that this is about.
    #[must_use]
    pub const fn device(&self) -> Option<&DeviceId> {
        match self {
            Self::Offer { device, .. }
            | Self::Restore { device, .. }
            | Self::Assign { device, .. }
            | Self::Stepped { device }
            | Self::Reverted { device, .. }
            | Self::Tail { device, .. } => Some(device),
            Self::StopTail { .. }
            | Self::Approve { .. }
            | Self::Replace { .. }
            | Self::Wave { .. }
            | Self::Measured { .. }
            | Self::MeasureAnew { .. }
            | Self::Enter { .. }
            | Self::Freeze
            | Self::Thaw => None,
        }
    }

    /// The device whose desired state this action writes, and what it then holds of the app (`None`: nothing);
    /// `None` if it writes no desired state.
    #[must_use]
    pub const fn writes(&self) -> Option<(&DeviceId, Option<Placement>)> {
        match self {
            Self::Offer {
                device, placement, ..
            } => Some((device, Some(*placement))),
            Self::Restore {
                device, placement, ..
            } => Some((device, *placement)),
            Self::Assign { .. }
            | Self::Stepped { .. }
            | Self::Reverted { .. }
            | Self::Tail { .. }
            | Self::StopTail { .. }
            | Self::Approve { .. }
            | Self::Replace { .. }
            | Self::Wave { .. }
            | Self::Measured { .. }
            | Self::MeasureAnew { .. }
            | Self::Enter { .. }
            | Self::Freeze
            | Self::Thaw => None,
        }
    }
}

/// Which record an [`Action`] changed, so that the store writes that one and no other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Touched {
    /// The rollout's own fields, all but waves and assignments.
    Header,
    /// These and one device's assignment.
    HeaderAndAssignment(DeviceId),
    /// One wave, by its ordinal from 1.
    Wave(u32),
    /// One device's assignment.
    Assignment(DeviceId),
    /// Two devices' assignments.
    Assignments(DeviceId, DeviceId),
}

/// What [`super::advance`] decided.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Step {
    /// What to do, in this order, in one transaction.
    pub actions: Vec<Action>,
    /// When to look again even if nothing is heard before; `None`: only news can change anything. The moment of the look
    /// itself: there was more to offer than [`Fleet::offers_at_once`].
    pub wake_at: Option<UnixMs>,
}

/// Why a command is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// The rollout will not change any more.
    #[error("rollout {id} is {state} already; nothing can be done to it")]
    Final {
        /// Which.
        id: u64,
        /// Its state.
        state: StateName,
    },
    /// It is in another state than the command needs.
    #[error("rollout {id} is {state}; {command} needs it to be {needs}")]
    State {
        /// Which.
        id: u64,
        /// Its state.
        state: StateName,
        /// The command.
        command: &'static str,
        /// What it needs.
        needs: &'static str,
    },
    /// There is nothing of that kind to act on.
    #[error("rollout {id} is {state}, and {what}")]
    Nothing {
        /// Which.
        id: u64,
        /// Its state.
        state: StateName,
        /// What there is not.
        what: &'static str,
    },
    /// There is no release to go back to.
    #[error(
        "rollout {id} brought the app's first release; there is none before it: delete the app instead"
    )]
    NothingBefore {
        /// Which.
        id: u64,
    },
}

/// A [`RolloutState`] as the API spells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StateName(pub RolloutState);

impl fmt::Display for StateName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self.0 {
            RolloutState::Scheduled => "scheduled",
            RolloutState::Running => "running",
            RolloutState::Paused => "paused",
            RolloutState::Completed => "completed",
            RolloutState::Aborted => "aborted",
            RolloutState::RollingBack => "rolling-back",
            RolloutState::RolledBack => "rolled-back",
            RolloutState::RollbackPaused => "rollback-paused",
            RolloutState::Superseded => "superseded",
        })
    }
}

/// A device of the frozen set, as it is when the rollout opens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Which.
    pub device: DeviceId,
    /// What the hub has written for this app; `None`: nothing.
    pub placement: Option<Placement>,
    /// What the device says of exactly that placement (same `since`); `None`: nothing yet.
    pub phase: Option<Phase>,
    /// Its labels; canaries and waves by selector are chosen by them.
    pub labels: Labels,
}

/// What a rollout is opened with.
#[derive(Debug, Clone)]
pub struct Opening<'a> {
    /// Larger than every id before.
    pub id: u64,
    /// Whose.
    pub app: AppName,
    /// The release before; `None` for the app's first.
    pub from: Option<Digest>,
    /// The release it brings.
    pub to: Digest,
    /// Drawn at random by the caller.
    pub seed: u64,
    /// How to go about it.
    pub policy: Policy,
    /// The frozen set; each device once.
    pub members: Vec<Member>,
    /// The newest rollout of this app before, whatever became of it.
    pub before: Option<&'a Rollout>,
    /// Now.
    pub now: UnixMs,
}

impl Assignment {
    /// Whether the device may be replacing its containers at this moment as far as the hub can know, so that
    /// it counts against `maxUnavailable`: from the offer to its end, and on the way back.
    ///
    /// A device that is put off holds none: one that is offline would hold it for as long as it likes.
    #[must_use]
    pub const fn holds_slot(&self) -> bool {
        match self.state {
            AssignmentState::Offered => true,
            // While others of its disruption budget are at it, more may be offered the release and stage it; its
            // turn comes only when there is a slot.
            AssignmentState::Device(Phase::Waiting) => self.has_lease(),
            AssignmentState::Device(phase) => !phase.is_final(),
            AssignmentState::Reverted => matches!(self.revert, Some(Revert::Switching)),
            AssignmentState::Planned | AssignmentState::Silent | AssignmentState::Deferred => false,
        }
    }

    /// Whether it has its turn under its disruption budgets and was not heard of since: it may have begun to switch.
    #[must_use]
    pub const fn has_lease(&self) -> bool {
        matches!(self.state, AssignmentState::Device(Phase::Waiting)) && self.deadline.is_some()
    }

    /// Whether its attempt ended, well or badly.
    #[must_use]
    pub const fn has_ended(&self) -> bool {
        match self.state {
            AssignmentState::Device(phase) => phase.is_final(),
            AssignmentState::Silent => true,
            AssignmentState::Planned
            | AssignmentState::Offered
            | AssignmentState::Deferred
            | AssignmentState::Reverted => false,
        }
    }

    /// Whether it began to switch to the release, was given it, or may have: what a rollback must undo.
    #[must_use]
    pub const fn has_intent(&self) -> bool {
        self.since.is_some()
            && !matches!(
                self.state,
                AssignmentState::Planned | AssignmentState::Reverted
            )
    }
}

/// Whether a device's attempt ended badly in this state.
#[must_use]
pub const fn is_failure(state: AssignmentState) -> bool {
    match state {
        AssignmentState::Silent => true,
        AssignmentState::Device(phase) => match phase {
            Phase::Rejected | Phase::RolledBack | Phase::Failed => true,
            Phase::Accepted
            | Phase::Staging
            | Phase::Blocked
            | Phase::Activating
            | Phase::Soaking
            | Phase::Succeeded
            | Phase::Removing
            | Phase::Waiting => false,
        },
        AssignmentState::Planned
        | AssignmentState::Offered
        | AssignmentState::Deferred
        | AssignmentState::Reverted => false,
    }
}

impl Rollout {
    /// Devices heard of since then count as recent in [`Pulse`]: an hour before the rollout was opened, or a little
    /// more ([`Pulse::since`]). A device that has been gone for longer says nothing about the network of today.
    #[must_use]
    pub const fn pulse_since(&self) -> UnixMs {
        Pulse::since(self.created)
    }

    /// What its devices are given.
    #[must_use]
    pub const fn placement(&self) -> Placement {
        Placement {
            release: self.to,
            soak_ms: self.policy.soak_ms,
            progress_deadline_ms: self.policy.progress_deadline_ms,
        }
    }

    /// The wave of that ordinal, from 1.
    #[must_use]
    pub fn wave(&self, ordinal: u32) -> Option<&Wave> {
        self.waves
            .get(usize::try_from(ordinal).ok()?.checked_sub(1)?)
    }

    /// Whether devices of this assignment may be offered the release now, as far as waves decide.
    #[must_use]
    pub fn opened(&self, assignment: &Assignment) -> bool {
        assignment.tail
            || self
                .wave(assignment.wave)
                .is_some_and(|wave| wave.state != WaveState::Pending)
    }

    /// The wave that waits for an operator's approval, if one does.
    #[must_use]
    pub fn awaits_approval(&self) -> Option<u32> {
        self.waves
            .iter()
            .zip(1_u32..)
            .find(|(wave, _)| wave.state == WaveState::AwaitingApproval)
            .map(|(_, ordinal)| ordinal)
    }

    /// When a wave's bake ends, for people; `None` unless it bakes and the clock runs.
    #[must_use]
    pub fn bake_until(&self, wave: &Wave) -> Option<UnixMs> {
        if self.clock.stopped_at.is_some() {
            return None;
        }
        wave.bake_until.map(|tick| self.clock.unix(tick))
    }
}
