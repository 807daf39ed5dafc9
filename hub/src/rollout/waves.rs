//! Who comes first: the order of a frozen set, its cut into waves, and how a rollout is opened over it.
//!
//! Devices are ranked by the first 8 bytes of SHA-256(seed ‖ id), and waves are cut by *rank*, so their sizes are
//! exact. Comparing each hash with a threshold would not be: 5 % of 20 devices picks nobody 36 % of the
//! time. SHA-256 and not a standard library hasher, whose algorithm may change: same seed and same set, same
//! plan on any machine.

use std::collections::{BTreeMap, BTreeSet};

use foreshore_protocol::api::{AssignmentState, RolloutState, WaveState};
use foreshore_protocol::manifest::WaveTarget;
use foreshore_protocol::message::Phase;
use foreshore_protocol::{DeviceId, Digest};

use super::state::{
    Action, Assignment, Clock, Fleet, Member, Opening, Placement, Rollout, Tick, Wave,
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

/// The waves of a set of `total` devices: each target with the number of devices that it adds.
///
/// Targets are cumulative. A missing last 100 % is added. A target that does not reach beyond the one before it
/// over this set (`{count: 5}`, `{percent: 10}` over ten devices) makes a wave of no devices, which is
/// skipped when its turn comes.
#[must_use]
pub fn cut(targets: &[WaveTarget], total: usize) -> Vec<(WaveTarget, usize)> {
    let implied =
        (targets.last() != Some(&WaveTarget::Percent(100))).then_some(WaveTarget::Percent(100));
    let mut reached = 0;
    targets
        .iter()
        .copied()
        .chain(implied)
        .map(|target| {
            let size = target.of(total).saturating_sub(reached);
            reached += size;
            (target, size)
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
        let mut previous: BTreeMap<DeviceId, Option<Placement>> = members
            .into_iter()
            .map(|member| {
                let previous = previous_of(&member, before);
                (member.device, previous)
            })
            .collect();
        let ranked = rank(seed, previous.keys().cloned());
        let mut waves = Vec::new();
        let mut assignments = BTreeMap::new();
        let mut devices = ranked.into_iter().zip(0_u32..);
        for ((target, size), ordinal) in cut(&policy.waves, previous.len()).into_iter().zip(1_u32..)
        {
            for (device, rank) in devices.by_ref().take(size) {
                let previous = previous.remove(&device).flatten();
                assignments.insert(device, Assignment::planned(ordinal, rank, previous));
            }
            let size = u32::try_from(size).unwrap_or(u32::MAX);
            waves.push(Wave {
                target,
                size,
                state: WaveState::Pending,
                bake_until: None,
            });
        }
        Self {
            id,
            app,
            from,
            to,
            seed,
            policy,
            state: RolloutState::Running,
            cause: None,
            message: None,
            frozen: false,
            clock: Clock::default(),
            waves,
            assignments,
            created: now,
            finished: None,
        }
    }
}

impl Assignment {
    const fn planned(wave: u32, rank: u32, previous: Option<Placement>) -> Self {
        Self {
            wave,
            rank,
            previous,
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
    if before.to != placement.release || assignment.state == AssignmentState::Reverted {
        return Some(placement);
    }
    let condemned = before
        .waves
        .iter()
        .any(|wave| wave.state == WaveState::Failed);
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

/// In the first wave, online devices take the place of those that are offline and were offered nothing, lowest
/// rank first. A canary that cannot sing delays everyone; any other device of the set is as good.
pub(super) fn replacements(rollout: &Rollout, ordinal: u32, fleet: &Fleet) -> Vec<Action> {
    let online = |device: &DeviceId| fleet.devices.get(device).is_some_and(|facts| facts.online);
    let mut out: Vec<(u32, &DeviceId)> = Vec::new();
    let mut into: Vec<(u32, &DeviceId)> = Vec::new();
    for (device, assignment) in &rollout.assignments {
        let idle = assignment.since.is_none();
        if assignment.wave == ordinal {
            if idle && assignment.state == AssignmentState::Deferred {
                out.push((assignment.rank, device));
            }
        } else if idle && assignment.state == AssignmentState::Planned && online(device) {
            into.push((assignment.rank, device));
        }
    }
    if out.is_empty() {
        return Vec::new();
    }
    out.sort_unstable();
    into.sort_unstable();
    out.into_iter()
        .zip(into)
        .map(|((_, out), (_, into))| Action::Replace {
            out: out.clone(),
            into: into.clone(),
        })
        .collect()
}
