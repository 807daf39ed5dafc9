//! A simulated hub: the real `rollout::advance` over a store that is a plain value.
//!
//! Each `&mut self` method of [`Hub`] is one transaction: the simulation keeps a copy from before it where it wants a
//! crash to undo it. What is not in [`Store`] is lost with the process.

use std::collections::{BTreeMap, BTreeSet};

use foreshore_hub::rollout::check::{Rule, check, check_action};
use foreshore_hub::rollout::command;
use foreshore_hub::rollout::{
    Action, Cause, Deferral, Facts, Fleet, Member, News, Opening, Placement, Pulse, Refused,
    Report, Rollout, Terms, UnixMs, advance_by,
};
use foreshore_protocol::api::{AssignmentState, RolloutState, WaveState};
use foreshore_protocol::message::{AppStatus, Beacon, Head, HeadApp, Presence, Reported};
use foreshore_protocol::{AppName, DeviceId, Digest, Version};

use foreshore_hub::lease::Entry;
use foreshore_protocol::message::Lease;

use crate::mutation::Mutation;
use crate::random::hash;
use crate::scenario::{self, Budget, MINUTE, Ms, SECOND, Scenario};

mod leases;

pub use leases::TTL;

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
    /// The number of its newest desired state.
    pub generation: u64,
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
    /// An operator holds it.
    pub held: bool,
    /// Its number.
    pub number: usize,
}

/// What the hub's database holds.
#[derive(Debug, Clone, Default)]
pub struct Store {
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
    /// For the rules only: whether each device is truly connected, and since when it is or is not.
    pub contacts: BTreeMap<DeviceId, (bool, Ms)>,
}

/// After that long even a hub that heard no Will knows that a device is dark: two beacon intervals, and what
/// messages may be late.
const DARK_FOR: Ms = 2 * BEACON_INTERVAL + 3 * MINUTE;

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
        let members = scenario.apps.iter().map(|app| {
            let first = scenario.devices.iter().enumerate().take(app.joiners_from);
            let selected = first.filter(|(number, _)| Scenario::selects(app, *number));
            let selected = selected.map(|(_, device)| device.clone()).collect();
            (app.name.clone(), selected)
        });
        Self {
            store: Store {
                devices: devices.collect(),
                members: members.collect(),
                ..Store::default()
            },
            mutation,
            budget: scenario.budget,
            numbers: scenario.devices.iter().cloned().zip(0..).collect(),
            ..Self::default()
        }
    }

    /// The newest desired state of a device; `None` before the first.
    #[must_use]
    pub fn head(&self, device: &DeviceId) -> Option<Head> {
        let row = self
            .store
            .devices
            .get(device)
            .filter(|row| row.generation > 0)?;
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
            version: version(row.generation),
            apps: apps.collect(),
            budgets: self.budgets(device),
        })
    }

    /// A birth or Will arrives. True if the device's head must be published again.
    pub fn receive_presence(
        &mut self,
        device: &DeviceId,
        presence: &Presence,
        retained: bool,
        now: Ms,
    ) -> bool {
        let Some(row) = self.store.devices.get_mut(device) else {
            return false;
        };
        // A Will of an earlier session is stale, and so is a birth.
        if presence.session < row.session {
            return false;
        }
        row.session = presence.session;
        row.online = presence.online;
        if presence.online && !retained {
            row.last_seen = Some(unix(now));
        }
        let behind = presence.online
            && presence
                .version
                .map_or(0, |version| version.generation.get())
                < row.generation;
        self.advance(now);
        behind
    }

    /// A beacon arrives: whether the head must be published again, and whether a report was missed.
    pub fn receive_beacon(&mut self, device: &DeviceId, beacon: &Beacon, now: Ms) -> (bool, bool) {
        let Some(row) = self.store.devices.get_mut(device) else {
            return (false, false);
        };
        row.online = true;
        row.last_seen = Some(unix(now));
        let behind = beacon.version.map_or(0, |version| version.generation.get()) < row.generation;
        let known = row
            .reported
            .as_ref()
            .map_or((0, 0), |reported| (reported.boot, reported.seq));
        let missed = (beacon.boot, beacon.reported_seq) > known;
        self.advance(now);
        (behind, missed)
    }

    /// A report arrives; what is acknowledged is stored.
    pub fn receive_reported(
        &mut self,
        device: &DeviceId,
        reported: &Reported,
        retained: bool,
        now: Ms,
    ) {
        let Some(row) = self.store.devices.get_mut(device) else {
            return;
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
            self.advance(now);
        }
    }

    /// Time passes.
    pub fn advance(&mut self, now: Ms) {
        self.advance_rollouts(now);
        let granted = self.leases.len();
        self.decide(now);
        if self.leases.len() > granted {
            self.advance_rollouts(now);
        }
    }

    fn advance_rollouts(&mut self, now: Ms) {
        self.wake_at = None;
        for index in 0..self.store.rollouts.len() {
            if !self.is_newest(index) {
                continue;
            }
            let fleet = self.fleet(&self.store.rollouts[index], now);
            let ended = self.store.rollouts[index].state.is_final();
            let news = self.news(index, &fleet);
            let step = advance_by(&mut self.store.rollouts[index], &fleet, &news, unix(now));
            for action in self.mutate(&step.actions, index, &fleet, now) {
                self.act(index, &action, Some(&fleet), now);
            }
            if self.store.rollouts[index].state.is_final() && !ended {
                self.settle(index, now);
                // Those that it took in just now.
                self.wake_at = Some(now + 1);
            }
            self.check_rollout(index);
            let wake = step
                .wake_at
                .map(|at| at.0.saturating_sub(START).max(now + 1));
            self.wake_at = [self.wake_at, wake].into_iter().flatten().min();
        }
    }

    /// What is new of the devices of a rollout since the engine last looked at it.
    fn news(&mut self, index: usize, fleet: &Fleet) -> News {
        let id = self.store.rollouts[index].id;
        let Some(before) = self.known.insert(id, fleet.devices.clone()) else {
            return News::All;
        };
        if self.mutation == Some(Mutation::MissNews) {
            return News::Devices(BTreeSet::new());
        }
        let devices = before.keys().chain(fleet.devices.keys());
        let differs = |device: &&DeviceId| before.get(*device) != fleet.devices.get(*device);
        News::Devices(devices.filter(differs).cloned().collect())
    }

    /// Only the newest rollout of an app decides anything.
    fn is_newest(&self, index: usize) -> bool {
        let rollouts = &self.store.rollouts;
        rollouts
            .get(index + 1..)
            .is_none_or(|newer| newer.iter().all(|newer| newer.app != rollouts[index].app))
    }

    /// What the controller does for members outside a rollout that has ended (`controller::membership`).
    fn settle(&mut self, index: usize, now: Ms) {
        let rollout = &self.store.rollouts[index];
        let (app, state) = (rollout.app.clone(), rollout.state);
        let completed = self
            .store
            .rollouts
            .iter()
            .rfind(|rollout| rollout.app == app && rollout.state == RolloutState::Completed);
        let Some(placement) = completed.map(Rollout::placement) else {
            return;
        };
        for device in self.store.members[&app].clone() {
            let placed = self.store.devices[&device].desired.get(&app);
            let placed = placed.map(|(placement, _)| *placement);
            if state == RolloutState::Completed {
                let outside = !self.store.rollouts[index].assignments.contains_key(&device);
                if outside && placed.is_none_or(|placed| placed.release != placement.release) {
                    let join = Action::Tail {
                        device,
                        anew: Some(placed),
                    };
                    self.act(index, &join, None, now);
                }
            } else if placed.is_none() {
                self.write(&device, &app, Some(placement), Terms::default());
            }
        }
    }

    fn fleet(&self, rollout: &Rollout, now: Ms) -> Fleet {
        let fresh = |row: &Row| {
            row.last_seen
                .is_some_and(|seen| unix(now).since(seen) < 2 * BEACON_INTERVAL + MINUTE)
        };
        let online = |row: &Row| row.online && fresh(row);
        let devices = rollout.assignments.keys().filter_map(|device| {
            let row = self.store.devices.get(device)?;
            let status = row.reported.as_ref().and_then(|reported| {
                reported
                    .apps
                    .iter()
                    .find(|status| status.app == rollout.app)
            });
            let facts = Facts {
                online: online(row),
                last_seen: row.last_seen,
                version: row.reported.as_ref().and_then(|reported| reported.version),
                report: status.map(report),
                leased: self
                    .store
                    .leases
                    .get(&(device.clone(), rollout.app.clone()))
                    .and_then(|entry| entry.held.as_ref())
                    .map(|held| held.since),
                held: row.held,
                busy: self.is_busy(device, rollout),
            };
            Some((device.clone(), facts))
        });
        let blind = self.mutation == Some(Mutation::BlameDarkness);
        let pulse = Pulse::count(
            self.store
                .devices
                .values()
                .map(|row| (online(row) || blind, row.last_seen)),
            rollout.pulse_since(),
        );
        Fleet {
            devices: devices.collect(),
            pulse,
            listening_since: if blind {
                Some(UnixMs(0))
            } else {
                self.listening_since
            },
            settle_ms: 10 * SECOND,
        }
    }

    /// Whether the newest rollout of another app has the device in hand.
    fn is_busy(&self, device: &DeviceId, rollout: &Rollout) -> bool {
        let others = self.store.rollouts.iter().enumerate();
        others
            .filter(|(index, other)| {
                let looked_at = !other.state.is_final() || other.state == RolloutState::Completed;
                other.app != rollout.app && looked_at && self.is_newest(*index)
            })
            .filter_map(|(_, other)| other.assignments.get(device))
            .any(foreshore_hub::rollout::Assignment::holds_slot)
    }

    fn act(&mut self, index: usize, action: &Action, fleet: Option<&Fleet>, now: Ms) {
        let rollout = &self.store.rollouts[index];
        if self.verbose {
            self.log.push(format!(
                "hub: rollout {} of {}: {action:?}",
                rollout.id, rollout.app
            ));
        }
        if let Some(fleet) = fleet {
            let wrong = check_action(rollout, action, fleet, unix(now));
            self.violations.extend(
                wrong
                    .iter()
                    .map(|wrong| format!("rollout {}: {action:?} breaks {wrong}", rollout.id)),
            );
        }
        let silent = matches!(
            action,
            Action::Assign {
                state: AssignmentState::Silent,
                ..
            }
        );
        if silent && self.is_truly_dark(rollout, now) {
            self.violations.push(format!(
                "rollout {}: {action:?} while most of the fleet is dark",
                rollout.id
            ));
        }
        let app = rollout.app.clone();
        let terms = match action {
            Action::Offer { .. } => rollout.policy.terms.clone(),
            _ => Terms::default(),
        };
        let written = action.writes().map(|(device, placement)| {
            self.changed.insert((device.clone(), app.clone()), now);
            let release = placement.map(|placement| placement.release);
            self.writes.push((now, device.clone(), release));
            self.write(device, &app, placement, terms)
        });
        let rollout = &mut self.store.rollouts[index];
        rollout.apply(action, written, unix(now));
        if let Action::Enter { state, .. } = action {
            self.history.push((now, rollout.id, *state));
        }
    }

    /// Whether most of those devices that were there around the rollout are cut off from the hub, whatever the hub
    /// believes.
    fn is_truly_dark(&self, rollout: &Rollout, now: Ms) -> bool {
        let around =
            |(connected, at): &&(bool, Ms)| *connected || unix(*at) >= rollout.pulse_since();
        let (recent, dark) = self.contacts.values().filter(around).fold(
            (0, 0),
            |(recent, dark), (connected, at)| {
                (
                    recent + 1,
                    dark + u64::from(!connected && at + DARK_FOR < now),
                )
            },
        );
        dark * 2 > recent
    }

    fn write(
        &mut self,
        device: &DeviceId,
        app: &AppName,
        placement: Option<Placement>,
        terms: Terms,
    ) -> Version {
        let row = self.store.devices.entry(device.clone()).or_default();
        row.generation += 1;
        let since = version(row.generation);
        match placement {
            Some(placement) => {
                row.desired.insert(app.clone(), (placement, since));
                row.terms.insert(app.clone(), terms);
            }
            None => {
                row.desired.remove(app);
                row.terms.remove(app);
            }
        }
        self.store.outbox.insert(device.clone());
        since
    }

    fn check_rollout(&mut self, index: usize) {
        let rollout = &self.store.rollouts[index];
        for wrong in check(rollout) {
            self.violations
                .push(format!("rollout {}: {wrong}", rollout.id));
        }
    }

    /// An operator gives a command. What the hub refuses is no fault.
    pub fn command(&mut self, scenario: &Scenario, app: usize, given: scenario::Command, now: Ms) {
        let name = &scenario.apps[app].name;
        let newest = self
            .store
            .rollouts
            .iter()
            .rposition(|rollout| rollout.app == *name);
        let asked = |decide: fn(&Rollout) -> Result<Vec<Action>, Refused>, hub: &Self| {
            newest.and_then(|index| decide(&hub.store.rollouts[index]).ok())
        };
        let actions = match given {
            scenario::Command::Apply(release) => {
                let digest = scenario.apps[app].releases[release].digest();
                self.open(scenario, app, digest, now);
                None
            }
            scenario::Command::Undo => {
                let target =
                    newest.and_then(|index| command::undo_target(&self.store.rollouts[index]).ok());
                if let Some(target) = target {
                    self.open(scenario, app, target, now);
                }
                None
            }
            scenario::Command::Join(number) => {
                let (described, device) = (&scenario.apps[app], &scenario.devices[number]);
                let selected = Scenario::selects(described, number);
                let members = self.store.members.get_mut(&described.name);
                if selected && members.is_some_and(|members| members.insert(device.clone())) {
                    let ended = newest.filter(|index| self.store.rollouts[*index].state.is_final());
                    if let Some(index) = ended {
                        self.settle(index, now);
                    }
                }
                None
            }
            scenario::Command::Hold(number, held) => {
                if let Some(row) = self.store.devices.get_mut(&scenario.devices[number]) {
                    row.held = held;
                }
                None
            }
            scenario::Command::Approve => asked(command::approve, self),
            scenario::Command::Retry => asked(|rollout| command::retry(rollout, None), self),
            scenario::Command::Pause => asked(command::pause, self),
            scenario::Command::Resume => asked(command::resume, self),
            scenario::Command::Abort => asked(command::abort, self),
        };
        let forgets = self.mutation == Some(Mutation::AbortKeepsIntent);
        let actions = actions.map(|mut actions: Vec<Action>| {
            actions.retain(|action| !forgets || !matches!(action, Action::Restore { .. }));
            actions
        });
        if let (Some(index), Some(actions)) = (newest, actions) {
            let ended = self.store.rollouts[index].state.is_final();
            for action in actions {
                self.act(index, &action, None, now);
            }
            if self.store.rollouts[index].state.is_final() && !ended {
                self.settle(index, now);
            }
            self.check_rollout(index);
        }
        self.advance(now);
    }

    fn open(&mut self, scenario: &Scenario, app: usize, to: Digest, now: Ms) {
        let described = &scenario.apps[app];
        let newest = self
            .store
            .rollouts
            .iter()
            .rposition(|rollout| rollout.app == described.name);
        let stands = newest.is_some_and(|index| {
            let rollout = &self.store.rollouts[index];
            rollout.to == to
                && matches!(
                    rollout.state,
                    RolloutState::Running | RolloutState::Completed
                )
        });
        if stands {
            return;
        }
        let id = self.store.rollouts.len() as u64 + 1;
        if let Some(index) = newest
            && let Ok(actions) = command::supersede(&self.store.rollouts[index], id)
        {
            for action in actions {
                self.act(index, &action, None, now);
            }
            self.check_rollout(index);
        }
        let members: Vec<_> = self.store.members[&described.name]
            .iter()
            .map(|device| self.member(device, &described.name))
            .collect();
        let completed = |rollout: &&Rollout| {
            rollout.app == described.name && rollout.state == RolloutState::Completed
        };
        let rollout = Rollout::open(Opening {
            id,
            app: described.name.clone(),
            from: self
                .store
                .rollouts
                .iter()
                .rfind(completed)
                .map(|rollout| rollout.to),
            to,
            seed: hash(&[scenario.seed, id]),
            policy: scenario.policy(id, members.len(), unix(now)),
            members,
            before: newest.map(|index| &self.store.rollouts[index]),
            now: unix(now),
        });
        if self.verbose {
            self.log.push(format!(
                "hub: rollout {id} of {} opens to {to}",
                rollout.app
            ));
        }
        self.store.rollouts.push(rollout);
    }

    fn member(&self, device: &DeviceId, app: &AppName) -> Member {
        let row = &self.store.devices[device];
        let placed = row.desired.get(app);
        let status = row
            .reported
            .as_ref()
            .and_then(|reported| reported.apps.iter().find(|status| status.app == *app));
        Member {
            device: device.clone(),
            placement: placed.map(|(placement, _)| *placement),
            phase: placed
                .zip(status)
                .filter(|((_, since), status)| status.since == *since)
                .map(|(_, status)| status.phase),
            labels: Scenario::labels(row.number),
        }
    }

    /// The process dies; what was in memory is gone.
    pub fn crash(&mut self) {
        self.up = false;
        self.life += 1;
        self.known.clear();
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

    fn mutate(&self, actions: &[Action], index: usize, fleet: &Fleet, now: Ms) -> Vec<Action> {
        let rollout = &self.store.rollouts[index];
        if self.mutation == Some(Mutation::ForgetFailures) && self.forgot_failures(rollout, now) {
            let brakes = |action: &Action| {
                matches!(
                    action,
                    Action::Wave {
                        state: WaveState::Failed,
                        ..
                    } | Action::Enter {
                        cause: Some(Cause::Budget),
                        ..
                    }
                )
            };
            let before = actions.iter().take_while(|action| !brakes(action));
            let on = actions.iter().any(brakes).then(|| {
                let next = rollout.assignments.iter().find(|(_, assignment)| {
                    assignment.state == AssignmentState::Planned && rollout.opened(assignment)
                });
                next.map(|(device, _)| Action::Offer {
                    device: device.clone(),
                    placement: rollout.placement(),
                    next: None,
                })
            });
            return before.cloned().chain(on.flatten()).collect();
        }
        let planned = |extra: usize| {
            let offers = rollout
                .assignments
                .iter()
                .filter(|(_, assignment)| assignment.state == AssignmentState::Planned)
                .map(|(device, _)| Action::Offer {
                    device: device.clone(),
                    placement: rollout.placement(),
                    next: None,
                });
            offers.take(extra).collect::<Vec<_>>()
        };
        let mut actions: Vec<_> = actions
            .iter()
            .cloned()
            .map(|action| match (self.mutation, action) {
                (
                    Some(Mutation::SkipBake),
                    Action::Wave {
                        ordinal,
                        state: WaveState::Baking,
                        ..
                    },
                ) => Action::Wave {
                    ordinal,
                    state: WaveState::Passed,
                    bake_until: None,
                },
                (
                    Some(Mutation::OfflineIsFailure),
                    Action::Assign {
                        device,
                        state: AssignmentState::Deferred,
                        message,
                        ..
                    },
                ) => Action::Assign {
                    device,
                    state: AssignmentState::Silent,
                    deferral: None,
                    deadline: None,
                    message,
                },
                (
                    Some(Mutation::IgnoreApproval),
                    Action::Wave {
                        ordinal,
                        state: WaveState::AwaitingApproval,
                        ..
                    },
                ) => Action::Wave {
                    ordinal,
                    state: WaveState::Passed,
                    bake_until: None,
                },
                (
                    Some(Mutation::IgnorePace),
                    Action::Offer {
                        device, placement, ..
                    },
                ) => Action::Offer {
                    device,
                    placement,
                    next: Some(rollout.next_offer),
                },
                (
                    Some(Mutation::IgnoreHolds),
                    Action::Assign {
                        device,
                        deferral: Some(Deferral::Held),
                        ..
                    },
                ) => Action::Offer {
                    device,
                    placement: rollout.placement(),
                    next: None,
                },
                (
                    Some(Mutation::FinishedIsGood),
                    Action::Wave {
                        ordinal,
                        state: WaveState::Failed,
                        ..
                    },
                ) => Action::Wave {
                    ordinal,
                    state: WaveState::Passed,
                    bake_until: None,
                },
                (Some(Mutation::AnyCanary), Action::Replace { out, into }) => Action::Replace {
                    into: self.of_another_kind(rollout, &out).unwrap_or(into),
                    out,
                },
                (_, action) => action,
            })
            .collect();
        if self.mutation == Some(Mutation::FinishedIsGood) {
            actions.retain(|action| {
                !matches!(
                    action,
                    Action::Enter {
                        cause: Some(Cause::WaveFailed),
                        ..
                    }
                )
            });
        }
        if self.mutation == Some(Mutation::SilenceIsFine) {
            actions.retain(|action| {
                !matches!(
                    action,
                    Action::Assign {
                        state: AssignmentState::Silent,
                        ..
                    }
                )
            });
        }
        if self.mutation == Some(Mutation::IgnoreTailBudget) {
            let stops = |action: &Action| matches!(action, Action::StopTail { .. });
            if actions.iter().any(stops) {
                actions.retain(|action| !stops(action));
                let ready =
                    |device: &DeviceId| fleet.devices.get(device).is_some_and(|facts| facts.online);
                let idle = rollout.assignments.iter().find(|(device, assignment)| {
                    assignment.tail && assignment.state == AssignmentState::Planned && ready(device)
                });
                actions.extend(idle.map(|(device, _)| Action::Offer {
                    device: device.clone(),
                    placement: rollout.placement(),
                    next: Some(rollout.next_offer),
                }));
            }
        }
        if self.mutation == Some(Mutation::StartEarly) && rollout.state == RolloutState::Scheduled {
            actions.push(Action::Enter {
                state: RolloutState::Running,
                cause: None,
                message: None,
            });
        }
        let stops = |action: &Action| {
            matches!(
                action,
                Action::Enter {
                    cause: Some(Cause::Budget | Cause::WaveFailed),
                    ..
                }
            )
        };
        if self.mutation == Some(Mutation::OfferAfterBreak) && actions.iter().any(stops) {
            actions.extend(planned(1));
        }
        if self.mutation == Some(Mutation::IgnoreSlots)
            && actions
                .iter()
                .any(|action| matches!(action, Action::Offer { .. }))
        {
            actions.retain(|action| !matches!(action, Action::Offer { .. }));
            actions.extend(planned(usize::MAX));
        }
        actions
    }

    /// Whether a hub that counts in memory would see no broken budget: too few failed since it was started.
    fn forgot_failures(&self, rollout: &Rollout, now: Ms) -> bool {
        let since = rollout.clock.tick(unix(self.started.min(now)));
        let seen = rollout
            .assignments
            .values()
            .filter(|assignment| assignment.failed && assignment.changed >= since)
            .count();
        seen < usize::try_from(rollout.policy.budget.count).unwrap_or(usize::MAX)
    }

    /// What is still unfinished although the network is whole: rollouts that neither ended nor say what they wait
    /// for. The rules of [`Rule::FinalIsFinal`] hold for those that ended.
    #[must_use]
    pub fn unfinished(&self) -> Vec<String> {
        let waits = |rollout: &&Rollout| match rollout.state {
            RolloutState::Paused | RolloutState::RollbackPaused => {
                rollout.message.is_none() || rollout.frozen
            }
            RolloutState::Scheduled | RolloutState::Running | RolloutState::RollingBack => true,
            RolloutState::Completed if self.has_stragglers(rollout) => true,
            RolloutState::Completed
            | RolloutState::Aborted
            | RolloutState::RolledBack
            | RolloutState::Superseded => check(rollout)
                .iter()
                .any(|wrong| wrong.rule == Rule::FinalIsFinal),
        };
        let of = |rollout: &Rollout| {
            format!(
                "rollout {} of {} is {:?}",
                rollout.id, rollout.app, rollout.state
            )
        };
        let rollouts = self.store.rollouts.iter().enumerate();
        rollouts
            .filter(|(index, rollout)| {
                waits(rollout) && (self.is_newest(*index) || !rollout.state.is_final())
            })
            .map(|(_, rollout)| of(rollout))
            .collect()
    }

    /// Whether devices that come after the last wave have yet to end, and nothing says that they shall not.
    fn has_stragglers(&self, rollout: &Rollout) -> bool {
        let open = |assignment: &foreshore_hub::rollout::Assignment| {
            assignment.tail && !assignment.has_ended() && assignment.revert.is_none()
        };
        rollout.tail_stopped.is_none() && rollout.assignments.values().any(open)
    }

    fn of_another_kind(&self, rollout: &Rollout, device: &DeviceId) -> Option<DeviceId> {
        let stratum = rollout.assignments.get(device)?.stratum;
        rollout
            .assignments
            .iter()
            .find(|(_, other)| other.stratum != stratum && other.state == AssignmentState::Planned)
            .map(|(device, _)| device.clone())
    }
}

fn report(status: &AppStatus) -> Report {
    Report {
        since: status.since,
        release: status.release,
        phase: status.phase,
        reason: status.reason.as_ref().map(|reason| reason.message.clone()),
    }
}

fn version(generation: u64) -> Version {
    Version::from_numbers(1, generation.max(1)).expect("a run has few generations")
}
