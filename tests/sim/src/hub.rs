//! A simulated hub: the real `rollout::advance` over a store that is a plain value.
//!
//! Each `&mut self` method of [`Hub`] is one transaction: the simulation keeps a copy from before it where it wants a
//! crash to undo it. What is not in [`Store`] is lost with the process.
//!
//! | file | what it owns |
//! |---|---|
//! | `rollouts` | the engine is asked, and what it decides is written |
//! | `commands` | what operators ask |
//! | `leases` | turns under a disruption budget |
//! | `analysis` | gates that are asked while a wave bakes |
//! | `membership` | which devices an app selects |
//! | `backups` | a store that is put back, and devices that went on without it |
//! | `faults` | what is wrong on purpose |

use std::collections::{BTreeMap, BTreeSet};

use foreshore_hub::lease::Entry;
use foreshore_hub::rollout::analysis::Question;
use foreshore_hub::rollout::{Facts, Placement, Rollout, Terms, UnixMs};
use foreshore_protocol::api::RolloutState;
use foreshore_protocol::message::{Beacon, Head, HeadApp, Lease, Presence, Reported};
use foreshore_protocol::{AppName, DeviceId, Digest, Version};

use crate::mutation::Mutation;
use crate::scenario::{Budget, MINUTE, Ms, Scenario};

mod analysis;
mod backups;
mod commands;
mod faults;
mod leases;
mod membership;
mod rollouts;

pub use analysis::Said;
pub use backups::Restored;
pub use leases::TTL;
pub use membership::Selector;

/// 2026-01-01, so that times look like times.
const START: u64 = 1_767_225_600_000;

/// How often devices send a beacon.
pub const BEACON_INTERVAL: Ms = 10 * MINUTE;

/// A point of the run on the hub's clock.
#[must_use]
pub const fn unix(now: Ms) -> UnixMs {
    UnixMs(START + now)
}

/// One device in the store.
#[derive(Debug, Clone, Default)]
pub struct Row {
    /// The version of its newest desired state; `None`: it was never given one.
    pub version: Option<Version>,
    /// What that is.
    pub desired: BTreeMap<AppName, (Placement, Version)>,
    /// What it is told with that of each app.
    pub terms: BTreeMap<AppName, Terms>,
    /// Whether it said that it is connected.
    pub online: bool,
    /// In which session.
    pub session: u64,
    /// When it was last heard of.
    pub last_seen: Option<UnixMs>,
    /// Its newest report.
    pub reported: Option<Reported>,
    /// It is held: by an operator, or as it went on without a backup that was restored.
    pub held: bool,
    /// The store is a restored backup, and this device has not been compared with it or is beyond it.
    pub restored: Option<Restored>,
    /// Its number.
    pub number: usize,
    /// The labels that operators gave it, or took, by the app that selects by them.
    pub labelled: BTreeMap<AppName, bool>,
}

/// What the hub's database holds.
#[derive(Debug, Clone, Default)]
pub struct Store {
    /// What versions begin with.
    pub epoch: u64,
    /// The highest generation of any device that was forgotten.
    pub forgotten: u64,
    /// For the rules only: what the gates of waves really answered.
    pub said: BTreeMap<(u64, u32, usize), Said>,
    /// For the rules only: rollouts of which devices were forgotten.
    pub incomplete: BTreeSet<u64>,
    /// Every device.
    pub devices: BTreeMap<DeviceId, Row>,
    /// Devices whose head is to be published.
    pub outbox: BTreeSet<DeviceId>,
    /// Every rollout, oldest first.
    pub rollouts: Vec<Rollout>,
    /// The devices that each app selects.
    pub members: BTreeMap<AppName, BTreeSet<DeviceId>>,
    /// Turns, and who waits for one.
    pub leases: BTreeMap<(DeviceId, AppName), Entry>,
}

/// The hub.
#[derive(Debug, Clone, Default)]
pub struct Hub {
    /// Its database.
    pub store: Store,
    /// Whether its process runs.
    pub up: bool,
    /// Which life of the process this is.
    pub life: u64,
    /// Since when it hears the broker.
    pub listening_since: Option<UnixMs>,
    /// Rules that were broken; the simulation stops at the first.
    pub violations: Vec<String>,
    /// For the event log.
    pub log: Vec<String>,
    /// When time alone changes something.
    pub wake_at: Option<Ms>,
    /// The fault that is built in.
    pub mutation: Option<Mutation>,
    /// Whether to write the event log.
    pub verbose: bool,
    /// What the engine was last told of the devices of each rollout; memory of the process, which looks at all when it
    /// has none.
    pub known: BTreeMap<u64, BTreeMap<DeviceId, Facts>>,
    /// The place of each device in the scenario.
    pub numbers: BTreeMap<DeviceId, usize>,
    /// Gates that are to be asked.
    pub questions: Vec<Question>,
    /// Gates that were asked; memory of the process.
    pub under_way: BTreeSet<Question>,
    /// What each app selects by.
    pub selectors: BTreeMap<AppName, Selector>,
    /// The disruption budget.
    pub budget: Option<Budget>,
    /// Leases that devices are to be sent.
    pub leases: Vec<(DeviceId, Lease)>,
    /// For the rules only: when what a device should run of an app was last changed.
    pub changed: BTreeMap<(DeviceId, AppName), Ms>,
    /// For tests only: every state that a rollout came to, and when.
    pub history: Vec<(Ms, u64, RolloutState)>,
    /// For tests only: when which device was given another release of an app, or none.
    pub writes: Vec<(Ms, DeviceId, Option<Digest>)>,
    /// Since when this process runs.
    pub started: Ms,
    /// How many backups were restored.
    pub restored: u64,
    /// For the rules only: whether each device is truly connected, and since when it is or is not.
    pub contacts: BTreeMap<DeviceId, (bool, Ms)>,
}

impl Hub {
    /// A hub with an empty database but for the names of its devices.
    #[must_use]
    pub fn new(scenario: &Scenario, mutation: Option<Mutation>) -> Self {
        let devices = scenario.devices.iter().enumerate().map(|(number, device)| {
            let row = Row {
                number,
                ..Row::default()
            };
            (device.clone(), row)
        });
        let selectors = scenario.apps.iter();
        let selectors = selectors.map(|app| (app.name.clone(), Selector::of(app)));
        let mut hub = Self {
            store: Store {
                epoch: 1,
                devices: devices.collect(),
                ..Store::default()
            },
            mutation,
            budget: scenario.budget,
            numbers: scenario.devices.iter().cloned().zip(0..).collect(),
            selectors: selectors.collect(),
            ..Self::default()
        };
        hub.store.members = hub.all_members();
        hub
    }

    /// The newest desired state of a device; `None` before the first.
    #[must_use]
    pub fn head(&self, device: &DeviceId) -> Option<Head> {
        let row = self.store.devices.get(device)?;
        let version = row.version?;
        let apps = row.desired.iter().map(|(app, (placement, since))| {
            let terms = row.terms.get(app).cloned().unwrap_or_default();
            HeadApp {
                app: app.clone(),
                release: placement.release,
                since: *since,
                soak_ms: placement.soak_ms,
                progress_deadline_ms: placement.progress_deadline_ms,
                override_lock: false,
                windows: terms.windows,
                max_restarts: terms.max_restarts,
                require_hub_ms: terms.require_hub_ms,
            }
        });
        Some(Head {
            version,
            apps: apps.collect(),
            budgets: self.budgets(device),
        })
    }

    /// What is published: [`Self::head`], unless the device is to say first what it has.
    #[must_use]
    pub fn head_to_publish(&self, device: &DeviceId) -> Option<Head> {
        let waits = |row: &Row| row.restored.is_some();
        if self.store.devices.get(device).is_some_and(waits) {
            return None;
        }
        self.head(device)
    }

    /// A birth or Will arrives. Whether the device's head must be published again, and whether the device shall send its
    /// report again.
    pub fn receive_presence(
        &mut self,
        device: &DeviceId,
        presence: &Presence,
        retained: bool,
        now: Ms,
    ) -> (bool, bool) {
        self.meet(device, presence.online, presence.version, retained, now);
        let Some(row) = self.store.devices.get_mut(device) else {
            return (false, false);
        };
        // A Will of an earlier session is stale, and so is a birth.
        let believes = self.mutation == Some(Mutation::BelieveOldWills);
        if presence.session < row.session && !believes {
            return (false, false);
        }
        if presence.session < row.session && row.online && !presence.online {
            let (will, birth) = (presence.session, row.session);
            self.violations.push(format!(
                "{device}: the Will of session {will} overrides the birth of session {birth}"
            ));
        }
        row.session = presence.session;
        row.online = presence.online;
        if presence.online && !retained {
            row.last_seen = Some(unix(now));
        }
        let behind = presence.online && presence.version < row.version;
        let has = presence.online.then_some(presence.version);
        let unheard = self.compare(device, has, retained);
        self.advance(now);
        (behind, unheard)
    }

    /// A beacon arrives: whether the head must be published again, and whether a report was missed.
    pub fn receive_beacon(&mut self, device: &DeviceId, beacon: &Beacon, now: Ms) -> (bool, bool) {
        self.meet(device, true, beacon.version, false, now);
        let Some(row) = self.store.devices.get_mut(device) else {
            return (false, false);
        };
        row.online = true;
        row.last_seen = Some(unix(now));
        let behind = beacon.version < row.version;
        let known = row
            .reported
            .as_ref()
            .map_or((0, 0), |reported| (reported.boot, reported.seq));
        let missed = (beacon.boot, beacon.reported_seq) > known;
        self.compare(device, Some(beacon.version), false);
        self.advance(now);
        (behind, missed)
    }

    /// A report arrives; what is acknowledged is stored. Whether the device shall send it again.
    pub fn receive_reported(
        &mut self,
        device: &DeviceId,
        reported: &Reported,
        retained: bool,
        now: Ms,
    ) -> bool {
        self.meet(device, !retained, reported.version, retained, now);
        let Some(row) = self.store.devices.get_mut(device) else {
            return false;
        };
        if !retained {
            row.last_seen = Some(unix(now));
        }
        let newer = row
            .reported
            .as_ref()
            .is_none_or(|known| (reported.boot, reported.seq) > (known.boot, known.seq));
        if newer {
            row.reported = Some(reported.clone());
            self.hear_leases(device, reported, now);
        }
        let unheard = self.compare(device, Some(reported.version), retained);
        if newer || !retained {
            self.advance(now);
        }
        unheard
    }

    /// Time passes.
    pub fn advance(&mut self, now: Ms) {
        self.advance_rollouts(now);
        let granted = self.leases.len();
        self.decide(now);
        if self.leases.len() > granted {
            self.advance_rollouts(now);
        }
        self.ask_gates(now);
    }

    /// The process dies; what was in memory is gone.
    pub fn crash(&mut self) {
        self.up = false;
        self.life += 1;
        self.known.clear();
        self.under_way.clear();
        self.questions.clear();
        self.listening_since = None;
        self.wake_at = None;
        if self.mutation == Some(Mutation::ForgetOutbox) {
            self.store.outbox.clear();
        }
    }

    /// The process starts. Who is online is not known before the broker has told it.
    pub fn start(&mut self, now: Ms, broker: bool) {
        self.up = true;
        self.started = now;
        self.listening_since = broker.then(|| unix(now));
        for row in self.store.devices.values_mut() {
            row.online = false;
        }
        self.advance(now);
    }
}

fn version(epoch: u64, generation: u64) -> Version {
    Version::from_numbers(epoch, generation).expect("a run has few generations")
}
