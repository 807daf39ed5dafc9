//! The way back: which devices are given their release of before, in which order, and when that is over.
//!
//! A rollback never causes a rollback. If it does not work it pauses and waits for an operator.

use foreshore_protocol::DeviceId;
use foreshore_protocol::api::{AssignmentState, RolloutState};
use foreshore_protocol::message::Phase;

use super::budget::{self, Tally};
use super::state::{Action, Assignment, Cause, Fleet, Revert, Rollout};

/// How urgently, and at what price, a device goes back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// It does not run the new release for good: changing its mind costs nothing. At once.
    Free,
    /// It is switching now, so it holds a slot already. At once.
    Underway,
    /// It runs the new release and has to switch again. Waits for a slot.
    Switch,
    /// It runs the new release and is offline. Its intent is written and nobody waits for it.
    Away,
}

fn way(assignment: &Assignment, online: bool) -> Option<Way> {
    if !assignment.has_intent() {
        return None;
    }
    match assignment.state {
        AssignmentState::Planned | AssignmentState::Reverted => None,
        AssignmentState::Offered | AssignmentState::Deferred => Some(Way::Free),
        AssignmentState::Silent => Some(Way::Away),
        AssignmentState::Device(phase) => Some(match phase {
            Phase::Accepted
            | Phase::Staging
            | Phase::Blocked
            | Phase::Rejected
            | Phase::RolledBack
            | Phase::Failed
            | Phase::Removing => Way::Free,
            Phase::Activating | Phase::Soaking => Way::Underway,
            Phase::Succeeded if online => Way::Switch,
            Phase::Succeeded => Way::Away,
        }),
    }
}

pub(super) fn restore(device: &DeviceId, assignment: &Assignment, revert: Revert) -> Action {
    Action::Restore {
        device: device.clone(),
        placement: assignment.previous,
        revert,
    }
}

/// Who is given back what now: newest wave first, within a wave the last first, and of those that run the new
/// release well only as many at once as `maxUnavailable` allows.
///
/// While most of the fleet is dark nobody who runs the new release is touched: all would be written at
/// once as "away", and switch at once when the network is back.
pub(super) fn restores(rollout: &Rollout, fleet: &Fleet) -> Vec<Action> {
    let mut candidates: Vec<_> = rollout
        .assignments
        .iter()
        .filter_map(|(device, assignment)| {
            let online = fleet.devices.get(device).is_some_and(|facts| facts.online);
            Some((assignment, device, way(assignment, online)?))
        })
        .collect();
    candidates.sort_unstable_by_key(|(assignment, _, _)| {
        std::cmp::Reverse((assignment.wave, assignment.rank))
    });
    let mut free = rollout
        .policy
        .max_unavailable
        .saturating_sub(Tally::of(rollout).slots);
    let mut actions = Vec::new();
    for (assignment, device, way) in candidates {
        let revert = match way {
            Way::Free => Revert::Settling,
            Way::Underway => Revert::Switching,
            Way::Switch | Way::Away if rollout.frozen => continue,
            Way::Switch if free == 0 => continue,
            Way::Switch => {
                free -= 1;
                Revert::Switching
            }
            Way::Away => Revert::Settling,
        };
        actions.push(restore(device, assignment, revert));
    }
    actions
}

/// What becomes of the rollback now; `None`: it goes on.
pub(super) fn end(rollout: &Rollout, fleet: &Fleet) -> Option<Action> {
    let mut done = 0;
    let mut failed = 0;
    let mut waiting = false;
    for (device, assignment) in &rollout.assignments {
        let online = fleet.devices.get(device).is_some_and(|facts| facts.online);
        waiting |= assignment.has_intent();
        match assignment.revert {
            Some(Revert::Done) => done += 1,
            Some(Revert::Failed) => failed += 1,
            // Offline devices find their release of before when they return.
            Some(Revert::Switching | Revert::Settling) => waiting |= online || rollout.frozen,
            Some(Revert::Gone) | None => {}
        }
    }
    let given_up =
        failed > 0 && (!waiting || budget::broken(&rollout.policy.budget, done, failed).is_some());
    if given_up {
        let reason = rollout
            .assignments
            .iter()
            .find(|(_, assignment)| assignment.revert == Some(Revert::Failed))
            .and_then(|(device, assignment)| {
                Some(format!("; {device}: {}", assignment.message.as_ref()?))
            })
            .unwrap_or_default();
        return Some(Action::Enter {
            state: RolloutState::RollbackPaused,
            cause: Some(Cause::RollbackFailed),
            message: Some(format!(
                "{failed} devices could not go back to their release of before{reason}"
            )),
        });
    }
    (!waiting).then(|| Action::Enter {
        state: RolloutState::RolledBack,
        cause: rollout.cause,
        message: rollout.message.clone(),
    })
}
