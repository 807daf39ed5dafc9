//! What an operator, or a newer rollout, may ask of a rollout. Each command says what to do or why not;
//! the caller applies and commits the actions just like those of [`super::advance`].

use foreshore_protocol::api::{AssignmentState, RolloutState, WaveState};
use foreshore_protocol::message::Phase;
use foreshore_protocol::{DeviceId, Digest};

use super::rollback::restore;
use super::state::{Action, Assignment, Cause, Refused, Revert, Rollout, StateName};

/// Stops offering, or stops going back, until [`resume`]. Devices that were offered the release go on with it,
/// and what they report is taken in. Does nothing if it is paused already.
///
/// # Errors
///
/// [`Refused::Final`].
pub fn pause(rollout: &Rollout) -> Result<Vec<Action>, Refused> {
    let enter = |state| Action::Enter {
        state,
        cause: Some(Cause::Operator),
        message: Some("paused by an operator".to_owned()),
    };
    match rollout.state {
        RolloutState::Running | RolloutState::Scheduled => Ok(vec![enter(RolloutState::Paused)]),
        RolloutState::RollingBack => Ok(vec![enter(RolloutState::RollbackPaused)]),
        RolloutState::Paused | RolloutState::RollbackPaused => Ok(Vec::new()),
        RolloutState::Completed
        | RolloutState::Aborted
        | RolloutState::RolledBack
        | RolloutState::Superseded => Err(is_final(rollout)),
    }
}

/// Goes on; a rollout that is scheduled begins now. If failures had stopped it, the failed devices are tried again, in their own waves and against a
/// budget that counts anew; so the brakes hold for the second try as for the first. If its way back had
/// failed, the devices that could not go back are told again. If failures stopped those that come after the last wave
/// of a completed rollout, the failed among them are tried again. What analysis said of a wave before it stopped the
/// rollout is forgotten, and it is asked anew. Does nothing if it is not stopped.
///
/// # Errors
///
/// [`Refused::Final`].
pub fn resume(rollout: &Rollout) -> Result<Vec<Action>, Refused> {
    let enter = |state, cause, message| Action::Enter {
        state,
        cause,
        message,
    };
    match rollout.state {
        RolloutState::Paused => {
            let mut actions = match rollout.cause {
                Some(Cause::Budget | Cause::WaveFailed | Cause::Analysis) => retries(rollout),
                Some(Cause::Inconclusive) => ask_anew(rollout),
                Some(Cause::Operator | Cause::RollbackFailed | Cause::Superseded) | None => {
                    Vec::new()
                }
            };
            actions.push(enter(RolloutState::Running, None, None));
            Ok(actions)
        }
        RolloutState::RollbackPaused => {
            let mut actions: Vec<_> = rollout
                .assignments
                .iter()
                .filter(|(_, assignment)| assignment.revert == Some(Revert::Failed))
                .map(|(device, assignment)| restore(device, assignment, Revert::Settling))
                .collect();
            actions.push(enter(
                RolloutState::RollingBack,
                Some(Cause::Budget),
                Some("an operator told it to go on going back".to_owned()),
            ));
            Ok(actions)
        }
        RolloutState::Scheduled => Ok(vec![enter(RolloutState::Running, None, None)]),
        RolloutState::Completed if rollout.tail_stopped.is_some() => {
            let tail = |(_, assignment): &(&DeviceId, &Assignment)| assignment.tail;
            let mut actions: Vec<_> = failed(rollout)
                .filter(tail)
                .map(|(device, _)| start_over(device))
                .collect();
            actions.push(Action::StopTail { message: None });
            Ok(actions)
        }
        RolloutState::Running | RolloutState::RollingBack => Ok(Vec::new()),
        RolloutState::Completed
        | RolloutState::Aborted
        | RolloutState::RolledBack
        | RolloutState::Superseded => Err(is_final(rollout)),
    }
}

/// Lets the wave that has passed its gates go by.
///
/// # Errors
///
/// [`Refused::Final`], or [`Refused::Nothing`] if no wave waits for it.
pub fn approve(rollout: &Rollout) -> Result<Vec<Action>, Refused> {
    if rollout.state.is_final() {
        return Err(is_final(rollout));
    }
    match rollout.awaits_approval() {
        Some(ordinal) => Ok(vec![Action::Approve { ordinal }]),
        None => Err(nothing(rollout, "no wave of it waits for an approval")),
    }
}

/// Tries failed devices again, one or all: in their own waves, or after the last one if the rollout has completed. They
/// no longer count as failed until they fail again.
///
/// # Errors
///
/// [`Refused::Final`] and [`Refused::State`]; [`Refused::Nothing`] if no such device failed.
pub fn retry(rollout: &Rollout, only: Option<&DeviceId>) -> Result<Vec<Action>, Refused> {
    let again = match rollout.state {
        RolloutState::Running | RolloutState::Paused | RolloutState::Scheduled => start_over,
        RolloutState::Completed => |device: &DeviceId| Action::Tail {
            device: device.clone(),
            anew: None,
        },
        RolloutState::RollingBack | RolloutState::RollbackPaused => {
            return Err(Refused::State {
                id: rollout.id,
                state: StateName(rollout.state),
                command: "retry",
                needs: "running, paused or completed",
            });
        }
        RolloutState::Aborted | RolloutState::RolledBack | RolloutState::Superseded => {
            return Err(is_final(rollout));
        }
    };
    let late = rollout.state == RolloutState::Completed;
    let actions: Vec<_> = failed(rollout)
        .filter(|(device, _)| only.is_none_or(|only| only == *device))
        .flat_map(|(device, _)| {
            let first = again(device);
            [Some(first), late.then(|| start_over(device))]
        })
        .flatten()
        .collect();
    if actions.is_empty() {
        return Err(nothing(rollout, "no such device of it failed"));
    }
    Ok(actions)
}

/// Gives up: nothing more is offered, devices that have not begun to switch and those that failed are given their
/// release of before, and those that have or are switching to the new one keep it.
///
/// # Errors
///
/// [`Refused::Final`].
pub fn abort(rollout: &Rollout) -> Result<Vec<Action>, Refused> {
    give_up(
        rollout,
        RolloutState::Aborted,
        Cause::Operator,
        "aborted by an operator".to_owned(),
    )
}

/// Makes room for rollout `by` of the same app, opened in the same transaction: like [`abort`], so that no
/// device that was offline comes back to a release that nobody watches any more.
///
/// # Errors
///
/// [`Refused::Final`].
pub fn supersede(rollout: &Rollout, by: u64) -> Result<Vec<Action>, Refused> {
    give_up(
        rollout,
        RolloutState::Superseded,
        Cause::Superseded,
        format!("rollout {by} took its place"),
    )
}

/// The release that undoing this rollout goes to, as a rollout of its own with waves and gates.
///
/// # Errors
///
/// [`Refused::NothingBefore`] if it brought the app's first release.
pub fn undo_target(rollout: &Rollout) -> Result<Digest, Refused> {
    rollout
        .from
        .ok_or(Refused::NothingBefore { id: rollout.id })
}

fn is_final(rollout: &Rollout) -> Refused {
    Refused::Final {
        id: rollout.id,
        state: StateName(rollout.state),
    }
}

const fn nothing(rollout: &Rollout, what: &'static str) -> Refused {
    Refused::Nothing {
        id: rollout.id,
        state: StateName(rollout.state),
        what,
    }
}

/// The devices that failed and were not sent back.
fn failed(rollout: &Rollout) -> impl Iterator<Item = (&DeviceId, &Assignment)> {
    rollout.assignments.iter().filter(|(_, assignment)| {
        assignment.failed && assignment.state != AssignmentState::Reverted
    })
}

fn start_over(device: &DeviceId) -> Action {
    Action::Assign {
        device: device.clone(),
        state: AssignmentState::Planned,
        deferral: None,
        deadline: None,
        message: None,
    }
}

fn retries(rollout: &Rollout) -> Vec<Action> {
    let waves = rollout
        .waves
        .iter()
        .zip(1_u32..)
        .filter(|(wave, _)| wave.state == WaveState::Failed)
        .map(|(_, ordinal)| Action::Wave {
            ordinal,
            state: WaveState::Open,
            bake_until: None,
        });
    waves
        .chain(failed(rollout).map(|(device, _)| start_over(device)))
        .collect()
}

/// Every gate that was asked about a wave that bakes is asked anew: what they said before the pause may be as doubtful.
fn ask_anew(rollout: &Rollout) -> Vec<Action> {
    let waves = rollout.waves.iter().zip(1_u32..);
    waves
        .filter(|(wave, _)| wave.state == WaveState::Baking)
        .map(|(_, ordinal)| Action::MeasureAnew { ordinal })
        .collect()
}

fn give_up(
    rollout: &Rollout,
    state: RolloutState,
    cause: Cause,
    message: String,
) -> Result<Vec<Action>, Refused> {
    if rollout.state.is_final() {
        return Err(is_final(rollout));
    }
    let mut actions: Vec<_> = rollout
        .assignments
        .iter()
        .filter(|(_, assignment)| assignment.has_intent() && !is_updated(assignment))
        .map(|(device, assignment)| restore(device, assignment, Revert::Settling))
        .collect();
    actions.push(Action::Enter {
        state,
        cause: Some(cause),
        message: Some(message),
    });
    Ok(actions)
}

/// Whether the device has the new release, or may have: what an abort leaves alone.
const fn is_updated(assignment: &Assignment) -> bool {
    match assignment.state {
        AssignmentState::Device(phase) => match phase {
            Phase::Activating | Phase::Soaking | Phase::Succeeded => true,
            Phase::Accepted
            | Phase::Rejected
            | Phase::Staging
            | Phase::Blocked
            | Phase::RolledBack
            | Phase::Failed
            | Phase::Removing
            | Phase::Waiting => false,
        },
        AssignmentState::Silent => true,
        AssignmentState::Planned
        | AssignmentState::Offered
        | AssignmentState::Deferred
        | AssignmentState::Reverted => false,
    }
}
