//! The way back: which devices are given their release of before, in which order, and when that is over.
//!
//! A rollback never causes a rollback. If it does not work it pauses and waits for an operator.

use std::cmp::Reverse;

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
        AssignmentState::Device(Phase::Waiting) if assignment.has_lease() => Some(Way::Underway),
        AssignmentState::Device(phase) => Some(match phase {
            Phase::Accepted
            | Phase::Staging
            | Phase::Blocked
            | Phase::Rejected
            | Phase::RolledBack
            | Phase::Failed
            | Phase::Removing
            | Phase::Waiting => Way::Free,
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

/// Whom to tell at once: those who do not have to switch back, who switch already, or who are away. Newest wave
/// first, within a wave the last first.
///
/// While most of the fleet is dark nobody who runs the new release well is touched: all would be written as
/// "away", and switch at once when the network is back.
pub(super) fn restores_at_once(rollout: &Rollout, fleet: &Fleet) -> Vec<Action> {
    candidates(rollout, fleet)
        .into_iter()
        .filter_map(|(device, assignment, way)| {
            let revert = match way {
                Way::Free => Revert::Settling,
                Way::Underway => Revert::Switching,
                Way::Away if !rollout.frozen => Revert::Settling,
                Way::Away | Way::Switch => return None,
            };
            Some(restore(device, assignment, revert))
        })
        .collect()
}

/// Whom to tell next of those who run the new release well and are there: as many as `maxUnavailable` allows, in the
/// same order.
pub(super) fn restores_in_turn(rollout: &Rollout, fleet: &Fleet) -> Vec<Action> {
    if rollout.frozen {
        return Vec::new();
    }
    let free = rollout
        .policy
        .max_unavailable
        .saturating_sub(Tally::of(rollout).slots);
    candidates(rollout, fleet)
        .into_iter()
        .filter(|(_, _, way)| *way == Way::Switch)
        .take(usize::try_from(free).unwrap_or(usize::MAX))
        .map(|(device, assignment, _)| restore(device, assignment, Revert::Switching))
        .collect()
}

fn candidates<'a>(rollout: &'a Rollout, fleet: &Fleet) -> Vec<(&'a DeviceId, &'a Assignment, Way)> {
    let mut candidates: Vec<_> = rollout
        .assignments
        .iter()
        .filter_map(|(device, assignment)| {
            let online = fleet.devices.get(device).is_some_and(|facts| facts.online);
            Some((device, assignment, way(assignment, online)?))
        })
        .collect();
    candidates
        .sort_unstable_by_key(|(_, assignment, _)| Reverse((assignment.wave, assignment.rank)));
    candidates
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
