//! Who comes first: the order of a frozen set, its cut into waves, and how a rollout is opened over it.
//!
//! Devices are ranked by the first 8 bytes of SHA-256(seed ‖ id), and waves are cut by *rank*, so their sizes are
//! exact. Comparing each hash with a threshold would not be: 5 % of 20 devices picks nobody 36 % of the
//! time. SHA-256 and not a standard library hasher, whose algorithm may change: same seed and same set, same
//! plan on any machine.

use std::collections::{BTreeMap, BTreeSet};

use foreshore_protocol::api::{AssignmentState, RolloutState, WaveState};
use foreshore_protocol::id::{LabelValue, Labels};
use foreshore_protocol::manifest::{Canary, WaveSpec, WaveTarget};
use foreshore_protocol::message::Phase;
use foreshore_protocol::quantity::Span;
use foreshore_protocol::{DeviceId, Digest};

use super::assignments::{Assignments, Queue};
use super::state::{
    Action, Approval, Assignment, Clock, Member, Opening, Placement, Rollout, Tick, Wave,
};

/// Where a device stands in the order of a rollout with this seed; lower comes first.
#[must_use]
pub fn key(seed: u64, device: &DeviceId) -> u64 {
    let mut bytes = Vec::with_capacity(8 + 63);
    bytes.extend_from_slice(&seed.to_be_bytes());
    bytes.extend_from_slice(device.as_str().as_bytes());
    let digest = Digest::of(&bytes);
    let (first, _) = digest
        .as_bytes()
        .split_first_chunk::<8>()
        .expect("a SHA-256 has 32 bytes");
    u64::from_be_bytes(*first)
}

/// The devices in the order of a rollout with this seed, each once.
#[must_use]
pub fn rank(seed: u64, devices: impl IntoIterator<Item = DeviceId>) -> Vec<DeviceId> {
    let keyed: BTreeSet<(u64, DeviceId)> = devices
        .into_iter()
        .map(|device| (key(seed, &device), device))
        .collect();
    keyed.into_iter().map(|(_, device)| device).collect()
}

/// One wave as it is cut: how it was written, and its devices in their order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slice {
    /// As written, or the implied 100 %.
    pub spec: WaveSpec,
    /// Those that it adds to the waves before it.
    pub devices: Vec<DeviceId>,
}

/// Cuts a set of devices into waves. Each device is in exactly one.
///
/// Counts and percentages are cumulative over the set, whoever the devices of earlier waves are. A missing last 100 % is
/// added. A target that adds no device (`{count: 5}`, `{percent: 10}` over ten devices) makes a wave of none, which is
/// skipped when its turn comes.
#[must_use]
pub fn cut(specs: &[WaveSpec], seed: u64, members: &BTreeMap<DeviceId, Labels>) -> Vec<Slice> {
    let last = WaveTarget::Percent(100);
    let implied = (specs.last().map(|spec| &spec.target) != Some(&last)).then(|| last.into());
    let mut left = rank(seed, members.keys().cloned());
    let total = left.len();
    let none = Labels::new();
    let labels = |device: &DeviceId| members.get(device).unwrap_or(&none);
    let mut slices = Vec::new();
    for spec in specs.iter().cloned().chain(implied) {
        let reached = total - left.len();
        let devices: Vec<DeviceId> = match &spec.target {
            WaveTarget::Count(_) | WaveTarget::Percent(_) => {
                let wanted = reach(&spec.target, total).saturating_sub(reached);
                left.drain(..wanted.min(left.len())).collect()
            }
            WaveTarget::Selector(selector) => left
                .extract_if(.., |device| selector.matches(labels(device)))
                .collect(),
            WaveTarget::Canary(canary) => {
                let mut found: BTreeMap<Vec<Option<&LabelValue>>, u32> = BTreeMap::new();
                left.extract_if(.., |device| {
                    let count = found.entry(stratum(canary, labels(device))).or_default();
                    *count += 1;
                    *count <= canary.per_stratum
                })
                .collect()
            }
        };
        slices.push(Slice { spec, devices });
    }
    slices
}

/// How many of `total` devices are in the wave of this count or percentage and all before it.
fn reach(target: &WaveTarget, total: usize) -> usize {
    match target {
        WaveTarget::Count(count) => usize::try_from(*count).map_or(total, |count| count.min(total)),
        WaveTarget::Percent(percent) => (total * usize::from(*percent)).div_ceil(100).min(total),
        WaveTarget::Selector(_) | WaveTarget::Canary(_) => 0,
    }
}

fn stratum<'a>(canary: &Canary, labels: &'a Labels) -> Vec<Option<&'a LabelValue>> {
    canary.by.iter().map(|key| labels.get(key)).collect()
}

/// The kind of each device, numbered in the order of their labels' values; all 0 where there are no canaries.
fn strata(specs: &[WaveSpec], members: &BTreeMap<DeviceId, Labels>) -> BTreeMap<DeviceId, u32> {
    let canary = specs.iter().find_map(|spec| match &spec.target {
        WaveTarget::Canary(canary) => Some(canary),
        WaveTarget::Count(_) | WaveTarget::Percent(_) | WaveTarget::Selector(_) => None,
    });
    let Some(canary) = canary else {
        return BTreeMap::new();
    };
    let kinds: BTreeSet<_> = members
        .values()
        .map(|labels| stratum(canary, labels))
        .collect();
    let numbered: BTreeMap<_, u32> = kinds.into_iter().zip(0..).collect();
    members
        .iter()
        .filter_map(|(device, labels)| {
            Some((device.clone(), *numbered.get(&stratum(canary, labels))?))
        })
        .collect()
}

impl Rollout {
    /// A rollout over `opening.members`, ranked and cut into waves; nothing is offered yet. A device that is
    /// listed twice takes part once.
    #[must_use]
    pub fn open(opening: Opening<'_>) -> Self {
        let Opening {
            id,
            app,
            from,
            to,
            seed,
            policy,
            members,
            before,
            now,
        } = opening;
        let mut previous: BTreeMap<DeviceId, Option<Placement>> = BTreeMap::new();
        let mut labels: BTreeMap<DeviceId, Labels> = BTreeMap::new();
        for member in members {
            previous.insert(member.device.clone(), previous_of(&member, before));
            labels.insert(member.device, member.labels);
        }
        let strata = strata(&policy.waves, &labels);
        let mut waves = Vec::new();
        let mut assignments = Vec::new();
        let mut ranks = 0_u32..;
        for (slice, ordinal) in cut(&policy.waves, seed, &labels).into_iter().zip(1_u32..) {
            waves.push(Wave::pending(&slice));
            for (device, rank) in slice.devices.into_iter().zip(ranks.by_ref()) {
                let previous = previous.remove(&device).flatten();
                let stratum = strata.get(&device).copied().unwrap_or(0);
                let assignment = Assignment::planned(ordinal, rank, stratum, previous);
                assignments.push((device, assignment));
            }
        }
        let state = match policy.start_at {
            Some(at) if at > now => RolloutState::Scheduled,
            Some(_) | None => RolloutState::Running,
        };
        Self {
            id,
            app,
            from,
            to,
            seed,
            policy,
            state,
            cause: None,
            message: None,
            frozen: false,
            clock: Clock::default(),
            next_offer: Tick(0),
            tail_stopped: None,
            waves,
            assignments: assignments.into_iter().collect::<Assignments>(),
            created: now,
            finished: None,
        }
    }
}

impl Wave {
    fn pending(slice: &Slice) -> Self {
        Self {
            target: slice.spec.target.clone(),
            size: u32::try_from(slice.devices.len()).unwrap_or(u32::MAX),
            state: WaveState::Pending,
            bake_until: None,
            bake_ms: slice.spec.bake.map(Span::millis),
            approval: if slice.spec.approval {
                Approval::Needed
            } else {
                Approval::NotNeeded
            },
            budget: slice.spec.failure_budget,
            analysis: Vec::new(),
        }
    }
}

impl Assignment {
    pub(super) const fn planned(
        wave: u32,
        rank: u32,
        stratum: u32,
        previous: Option<Placement>,
    ) -> Self {
        Self {
            wave,
            rank,
            stratum,
            tail: false,
            previous,
            via: None,
            stepped: false,
            state: AssignmentState::Planned,
            since: None,
            failed: false,
            deferral: None,
            revert: None,
            changed: Tick(0),
            deadline: None,
            message: None,
        }
    }
}

/// What a device goes back to if this rollout fails: what it has now if that is known to be good there, else what
/// it would have gone back to in the rollout that gave it that.
///
/// A release whose rollout broke its budget is not good even where it succeeded.
fn previous_of(member: &Member, before: Option<&Rollout>) -> Option<Placement> {
    let placement = member.placement?;
    let Some((before, assignment)) =
        before.and_then(|before| Some((before, before.assignments.get(&member.device)?)))
    else {
        return Some(placement);
    };
    let offered = before.offered(assignment).release;
    if offered != placement.release || assignment.state == AssignmentState::Reverted {
        return Some(placement);
    }
    let broke = |wave: &Wave| wave.state == WaveState::Failed;
    let condemned = offered == before.to && before.waves.iter().any(broke);
    let succeeded = match member.phase {
        Some(phase) => phase == Phase::Succeeded,
        None => assignment.state == AssignmentState::Device(Phase::Succeeded),
    };
    if succeeded && !condemned {
        Some(placement)
    } else {
        assignment.previous
    }
}

/// What a device gets that the app selects only now, outside every rollout: the release of the newest rollout
/// that completed. `rollouts` are those of the app, newest first; `None`: nothing yet.
///
/// A joiner never skips the brakes: while a rollout runs, it gets the release before, and the new one when
/// that has completed.
pub fn joiner_release<'a>(rollouts: impl IntoIterator<Item = &'a Rollout>) -> Option<Placement> {
    rollouts
        .into_iter()
        .find(|rollout| rollout.state == RolloutState::Completed)
        .map(Rollout::placement)
}

/// In the first wave, devices that can begin take the place of those that cannot (offline, held) and were offered
/// nothing, lowest rank first and, where canaries are chosen by kind, of the same kind. A canary that cannot sing delays
/// everyone; any other device of its kind is as good.
///
/// Costs what it yields, and the number of kinds that wait.
pub(super) fn replacements(rollout: &Rollout, ordinal: u32) -> Vec<Action> {
    let assignments = &rollout.assignments;
    let waiting = assignments.queues(
        Queue::Unoffered(ordinal, 0),
        Queue::Unoffered(ordinal, u32::MAX),
    );
    let mut pairs = Vec::new();
    for queue in waiting {
        let Queue::Unoffered(_, stratum) = queue else {
            continue;
        };
        // Waves are runs of ranks, and those that joined come behind all of them.
        let others = |wave: &u32| *wave != ordinal;
        let waves = assignments
            .queues(Queue::Spare(stratum, 0), Queue::Spare(stratum, u32::MAX))
            .filter_map(|queue| match queue {
                Queue::Spare(_, wave) => Some(wave),
                Queue::Absent(_)
                | Queue::Ready(_)
                | Queue::Unoffered(..)
                | Queue::Failed
                | Queue::Back(_) => None,
            })
            .filter(others);
        let mut waves: Vec<u32> = waves.collect();
        waves.sort_unstable_by_key(|wave| (*wave == 0, *wave));
        let into = waves
            .into_iter()
            .flat_map(|wave| assignments.queue(Queue::Spare(stratum, wave)));
        pairs.extend(assignments.queue(queue).zip(into));
    }
    pairs.sort_by_key(|(out, _)| assignments.get(out).map(|assignment| assignment.rank));
    pairs
        .into_iter()
        .map(|(out, into)| Action::Replace {
            out: out.clone(),
            into: into.clone(),
        })
        .collect()
}
