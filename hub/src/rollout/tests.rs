//! Property tests over a small world: devices that say anything at any time, operators that command anything at any
//! time, networks and hubs that come and go. [`super::check`] is asked after every change.

use std::collections::{BTreeMap, BTreeSet};

use foreshore_protocol::id::Labels;
use foreshore_protocol::manifest::{FailureBudget, OnFailure, Pace, Tail, WaveSpec, WaveTarget};
use foreshore_protocol::message::Phase;
use foreshore_protocol::{DeviceId, Digest, Version};
use proptest::prelude::*;

use super::check::{Rule, check, check_action};
use super::steps::Requirements;
use super::*;

mod analysis;
mod cuts;
mod examples;
mod explained;
mod noticed;
mod properties;
mod reference;

use reference::advance_over_all;

fn device(number: usize) -> DeviceId {
    format!("device-{number}").parse().unwrap()
}

/// Three models at two sites.
fn labels(number: usize) -> Labels {
    [("model", number % 3), ("site", number % 2)]
        .map(|(key, value)| {
            (
                key.parse().unwrap(),
                format!("{key}-{value}").parse().unwrap(),
            )
        })
        .into()
}

fn release(number: u8) -> Digest {
    Digest::from_bytes([number; 32])
}

fn placement(number: u8) -> Placement {
    Placement {
        release: release(number),
        soak_ms: 1_000,
        progress_deadline_ms: 5_000,
    }
}

/// From which others releases can be reached on the way to release 2, by number.
fn requirements(way: &[(u8, &[u8])]) -> Requirements {
    let requires = |of: &Digest| {
        let found = way.iter().find(|(to, _)| release(*to) == *of);
        let from = found.map_or(&[][..], |(_, from)| *from);
        Ok::<_, std::convert::Infallible>(from.iter().copied().map(release).collect())
    };
    let Ok(found) = Requirements::collect(release(2), requires);
    found
}

fn pace(per_minute: u32) -> Pace {
    Pace {
        per_minute,
        double_every: None,
        max_per_minute: None,
    }
}

fn policy(waves: Vec<WaveTarget>, devices: usize) -> Policy {
    Policy {
        waves: waves.into_iter().map(WaveSpec::from).collect(),
        pace: None,
        start_at: None,
        priority: 50,
        tail: Tail {
            pace: pace(1_000_000),
            failure_budget: FailureBudget {
                count: 3,
                percent: 100,
                min_sample: 10,
            },
        },
        soak_ms: 1_000,
        bake_ms: 2_000,
        progress_deadline_ms: 5_000,
        max_unavailable: u32::try_from(devices.max(1)).unwrap(),
        budget: FailureBudget {
            count: 3,
            percent: 100,
            min_sample: 10,
        },
        on_failure: OnFailure::Rollback,
        begin_within_ms: 60_000,
        silent_margin_ms: 30_000,
        analysis: Vec::new(),
        terms: Terms::default(),
        requirements: Requirements::default(),
    }
}

/// When every rollout here is opened.
const NOW: UnixMs = UnixMs(1_000_000_000);

/// Few, so that many steps take more than one look.
const OFFERS_AT_ONCE: u32 = 2;

/// A hub's store and the devices' side of it, as small as can be.
#[derive(Clone)]
struct World {
    rollout: Rollout,
    devices: BTreeMap<DeviceId, Known>,
    now: UnixMs,
    listening_since: Option<UnixMs>,
    next: u64,
    /// What the engine was last told of.
    known: BTreeMap<DeviceId, Facts>,
    offers: BTreeMap<DeviceId, u32>,
}

#[derive(Clone, Default)]
struct Known {
    offline: bool,
    gone: bool,
    held: bool,
    busy: bool,
    last_seen: UnixMs,
    desired: Option<(Version, Option<Placement>)>,
    report: Option<Report>,
    has: Option<Digest>,
    leased: Option<Version>,
}

impl World {
    fn new(devices: usize, seed: u64, policy: Policy) -> Self {
        Self::with_previous(devices, seed, policy, Some(placement(1)))
    }

    fn with_previous(
        devices: usize,
        seed: u64,
        policy: Policy,
        previous: Option<Placement>,
    ) -> Self {
        let now = NOW;
        let rollout = Rollout::open(Opening {
            id: 1,
            app: "app".parse().unwrap(),
            from: previous.map(|previous| previous.release),
            to: release(2),
            seed,
            policy,
            members: (0..devices)
                .map(|number| Member {
                    device: device(number),
                    placement: previous,
                    phase: Some(Phase::Succeeded),
                    labels: labels(number),
                })
                .collect(),
            before: None,
            now,
        });
        let devices = (0..devices).map(|number| {
            (
                device(number),
                Known {
                    last_seen: now,
                    ..Known::default()
                },
            )
        });
        Self {
            rollout,
            devices: devices.collect(),
            now,
            listening_since: Some(UnixMs(1)),
            next: 1,
            known: BTreeMap::new(),
            offers: BTreeMap::new(),
        }
    }

    fn fleet(&self) -> Fleet {
        Fleet {
            devices: self
                .devices
                .iter()
                .filter(|(_, one)| !one.gone)
                .map(|(device, one)| {
                    let facts = Facts {
                        online: !one.offline,
                        last_seen: Some(one.last_seen),
                        version: one.desired.map(|(version, _)| version),
                        report: one.report.clone(),
                        leased: one.leased,
                        held: one.held,
                        busy: one.busy,
                    };
                    (device.clone(), facts)
                })
                .collect(),
            pulse: Pulse::count(
                self.devices
                    .values()
                    .map(|one| (!one.offline, Some(one.last_seen))),
                self.rollout.pulse_since(),
            ),
            listening_since: self.listening_since,
            settle_ms: 5_000,
            offers_at_once: OFFERS_AT_ONCE,
        }
    }

    /// The transactions of the controller that follow from one another at once, with every check there is.
    fn step(&mut self) -> Step {
        let mut step = self.transaction();
        while step.wake_at == Some(self.now) {
            let mut next = self.transaction();
            step.wake_at = next.wake_at;
            step.actions.append(&mut next.actions);
        }
        step
    }

    fn transaction(&mut self) -> Step {
        let fleet = self.fleet();
        let step = self.look(&fleet);
        for action in &step.actions {
            let wrong = check_action(&self.rollout, action, &fleet, self.now);
            assert!(
                wrong.is_empty(),
                "{action:?} at {:?}: {wrong:#?}\n{:#?}",
                self.now,
                self.rollout
            );
            self.commit(action);
        }
        if step.wake_at == Some(self.now) {
            let offers = |action: &&Action| matches!(action, Action::Offer { .. });
            let offered = step.actions.iter().filter(offers).count();
            assert_eq!(
                u32::try_from(offered).ok(),
                Some(OFFERS_AT_ONCE),
                "{step:?}"
            );
            return step;
        }
        let again = self.look(&fleet);
        assert_eq!(
            again.actions,
            [],
            "applied once, nothing follows from the same facts"
        );
        assert_eq!(again.wake_at, step.wake_at);
        assert!(
            step.wake_at.is_none_or(|at| at > self.now),
            "{:?} is not after {:?}",
            step.wake_at,
            self.now
        );
        step
    }

    /// Looks at what is new, and asks whether looking at everything decides the same.
    fn look(&mut self, fleet: &Fleet) -> Step {
        let before = self.rollout.clone();
        let news = News::Devices(differing(&self.known, &fleet.devices));
        self.known.clone_from(&fleet.devices);
        let step = advance_by(&mut self.rollout, fleet, &news, self.now);
        assert_eq!(self.rollout, before, "a look changes no record");
        assert_eq!(self.rollout.assignments.discrepancy(), None);
        assert_eq!(
            step,
            advance_over_all(&before, fleet, self.now),
            "a look at the news at {:?} and one at everything: {news:?}\n{before:#?}",
            self.now
        );
        assert_eq!(step, advance(&before, fleet, self.now), "with all as news");
        step
    }

    fn commit(&mut self, action: &Action) {
        if let Action::Offer { device, .. } = action {
            *self.offers.entry(device.clone()).or_default() += 1;
        }
        let written = action.writes().map(|(device, placement)| {
            let version = Version::from_numbers(1, self.next).unwrap();
            self.next += 1;
            self.devices.get_mut(device).unwrap().desired = Some((version, placement));
            version
        });
        self.rollout.apply(action, written, self.now);
        let wrong = check(&self.rollout);
        // Half of what one transaction does need not fit together; the end must.
        let wrong: Vec<_> = wrong
            .into_iter()
            .filter(|wrong| wrong.rule != Rule::FinalIsFinal)
            .collect();
        assert!(wrong.is_empty(), "after {action:?}: {wrong:#?}");
    }

    fn command(&mut self, actions: Result<Vec<Action>, Refused>) {
        for action in actions.unwrap_or_default() {
            self.commit(&action);
        }
        self.consistent();
    }

    /// A device comes that the app selects only now, as the controller lets it in.
    fn join(&mut self, number: usize) {
        let known = self.devices.entry(device(number)).or_default();
        known.last_seen = self.now;
        let takes_part = self
            .rollout
            .assignments
            .get(&device(number))
            .is_some_and(|assignment| assignment.revert != Some(Revert::Gone));
        if self.rollout.state == RolloutState::Completed && !takes_part {
            known.gone = false;
            self.commit(&Action::Tail {
                device: device(number),
                anew: Some(None),
            });
        }
    }

    fn consistent(&self) {
        let wrong = check(&self.rollout);
        assert!(wrong.is_empty(), "{wrong:#?}\n{:#?}", self.rollout);
    }

    /// The device speaks of what it was last told.
    fn say(&mut self, device: &DeviceId, phase: Phase) {
        let now = self.now;
        let one = self.devices.get_mut(device).unwrap();
        one.last_seen = now;
        let Some((since, placement)) = one.desired else {
            return;
        };
        if phase == Phase::Succeeded {
            one.has = placement.map(|placement| placement.release);
        }
        one.report = placement.map(|placement| Report {
            since,
            release: placement.release,
            phase,
            reason: None,
            has: one.has,
        });
    }

    /// A device that waits for its turn gets it.
    fn lease(&mut self, device: &DeviceId) {
        let one = self.devices.get_mut(device).unwrap();
        let waits = |report: &&Report| report.phase == Phase::Waiting;
        one.leased = one.report.as_ref().filter(waits).map(|report| report.since);
    }

    fn pass(&mut self, ms: u64) {
        self.now = self.now.plus(ms);
        for one in self.devices.values_mut().filter(|one| !one.offline) {
            one.last_seen = self.now;
        }
    }

    fn in_state(&self, wanted: impl Fn(AssignmentState) -> bool) -> BTreeSet<DeviceId> {
        self.rollout
            .assignments
            .iter()
            .filter(|(_, assignment)| wanted(assignment.state))
            .map(|(device, _)| device.clone())
            .collect()
    }

    fn offered(&self) -> BTreeSet<DeviceId> {
        self.in_state(|state| state == AssignmentState::Offered)
    }

    fn wave_states(&self) -> Vec<WaveState> {
        self.rollout.waves.iter().map(|wave| wave.state).collect()
    }

    fn in_wave(&self, ordinal: u32) -> Vec<DeviceId> {
        let mut devices: Vec<_> = self
            .rollout
            .assignments
            .iter()
            .filter(|(_, assignment)| assignment.wave == ordinal)
            .collect();
        devices.sort_by_key(|(_, assignment)| assignment.rank);
        devices
            .into_iter()
            .map(|(device, _)| device.clone())
            .collect()
    }
}

/// The devices of which something is known now that was not, or the other way round.
fn differing(
    before: &BTreeMap<DeviceId, Facts>,
    after: &BTreeMap<DeviceId, Facts>,
) -> BTreeSet<DeviceId> {
    let decides = |facts: &Facts| Facts {
        last_seen: None,
        ..facts.clone()
    };
    let of = |facts: &BTreeMap<DeviceId, Facts>, device: &DeviceId| facts.get(device).map(decides);
    let devices = before.keys().chain(after.keys());
    devices
        .filter(|device| of(before, device) != of(after, device))
        .cloned()
        .collect()
}

fn percent(percents: &[u8]) -> Vec<WaveTarget> {
    percents.iter().copied().map(WaveTarget::Percent).collect()
}
