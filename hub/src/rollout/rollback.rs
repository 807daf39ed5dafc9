//! The way back: which devices are given their release of before, in which order, and when that is over.
//!
//! A rollback never causes a rollback. If it does not work it pauses and waits for an operator.

use std::cmp::Reverse;

use foreshore_protocol::DeviceId;
use foreshore_protocol::api::{AssignmentState, RolloutState};
use foreshore_protocol::message::Phase;

use super::assignments::{Queue, WaysBack};
use super::budget::{self, Tally};
use super::state::{Action, Assignment, Cause, Revert, Rollout};

/// How urgently, and at what price, a device goes back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Way {
    /// It does not run the new release for good: changing its mind costs nothing. At once.
    Free,
    /// It is switching now, so it holds a slot already. At once.
    Underway,
    /// It runs the new release and has to switch again. Waits for a slot.
    Switch,
    /// It runs the new release and is offline. Its intent is written and nobody waits for it.
    Away,
}

pub(super) const fn way(assignment: &Assignment, online: bool) -> Option<Way> {
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
pub(super) fn restores_at_once(rollout: &Rollout) -> Vec<Action> {
    let assignments = &rollout.assignments;
    let away = (!rollout.frozen).then_some((Way::Away, Revert::Settling));
    let ways = [
        (Way::Free, Revert::Settling),
        (Way::Underway, Revert::Switching),
    ];
    let mut found: Vec<_> = ways
        .into_iter()
        .chain(away)
        .flat_map(|(way, revert)| {
            let devices = assignments.queue(Queue::Back(way));
            devices.filter_map(move |device| Some((device, assignments.get(device)?, revert)))
        })
        .collect();
    found.sort_unstable_by_key(|(_, assignment, _)| Reverse((assignment.wave, assignment.rank)));
    found
        .into_iter()
        .map(|(device, assignment, revert)| restore(device, assignment, revert))
        .collect()
}

/// Whom to tell next of those who run the new release well and are there: as many as `maxUnavailable` allows, in the
/// same order.
pub(super) fn restores_in_turn(rollout: &Rollout) -> Vec<Action> {
    if rollout.frozen {
        return Vec::new();
    }
    let free = rollout
        .policy
        .max_unavailable
        .saturating_sub(Tally::of(rollout).slots);
    let assignments = &rollout.assignments;
    assignments
        .queue(Queue::Back(Way::Switch))
        .rev()
        .filter_map(|device| Some((device, assignments.get(device)?)))
        .take(usize::try_from(free).unwrap_or(usize::MAX))
        .map(|(device, assignment)| restore(device, assignment, Revert::Switching))
        .collect()
}

/// What becomes of the rollback now; `None`: it goes on.
pub(super) fn end(rollout: &Rollout) -> Option<Action> {
    let assignments = &rollout.assignments;
    let WaysBack {
        done,
        failed,
        open,
        open_online,
    } = assignments.ways_back();
    let to_undo = [Way::Free, Way::Underway, Way::Switch, Way::Away]
        .into_iter()
        .any(|way| !assignments.is_empty_queue(Queue::Back(way)));
    // Offline devices find their release of before when they return.
    let awaited = if rollout.frozen { open } else { open_online };
    let waiting = to_undo || awaited > 0;
    let given_up =
        failed > 0 && (!waiting || budget::broken(&rollout.policy.budget, done, failed).is_some());
    if given_up {
        let reason = assignments
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
