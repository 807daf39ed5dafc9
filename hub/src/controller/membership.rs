//! Which devices an app selects, and what a device gets that comes in or goes outside a rollout.
//!
//! A device that an app selects only now joins the app's newest rollout after its last wave if that has completed, and is
//! offered its release at the pace of those. While a rollout runs it waits for its end: newcomers never skip the brakes.
//! If the newest did not complete, it gets the release of the newest that did. A device that is no longer selected has
//! the app removed.
//!
//! A device takes only [`MAX_APPS`] apps. What would select it for more is refused, if an operator asks for it.

use foreshore_protocol::api::RolloutState;
use foreshore_protocol::id::Labels;
use foreshore_protocol::message::MAX_APPS;
use foreshore_protocol::{AppName, DeviceId};

use super::{Change, ControlError, disruption_budgets, rollouts};
use crate::rollout::{Action, Placement, Revert, Terms, joiner_release};
use crate::store::{self, app::AppRow};

/// What becomes of an app that a device has no room for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Beyond {
    /// The change is refused.
    Refused,
    /// The device goes without it, and an event says so: nobody is there who could be refused anything.
    Skipped,
}

/// Whether a device has room for an app, beside the others that select it.
///
/// # Errors
///
/// [`ControlError::TooManyApps`] if not; or when the store fails.
pub fn check_room(
    connection: &rusqlite::Connection,
    app: &AppName,
    device: &DeviceId,
) -> Result<(), ControlError> {
    if store::app::others_selecting(connection, app, device)? < MAX_APPS {
        Ok(())
    } else {
        Err(ControlError::TooManyApps(device.clone()))
    }
}

/// Brings the members of an app in step with its selector.
///
/// # Errors
///
/// When a device has no room for the app, or the store fails.
pub fn refresh_app(change: &mut Change<'_>, app: &AppRow) -> Result<(), ControlError> {
    for (device, labels) in store::device::all_labels(change.connection)? {
        set(change, app, &device, &labels, Beyond::Refused)?;
    }
    Ok(())
}

/// Brings a device's memberships in step with its labels.
///
/// # Errors
///
/// When the device has no room for an app and `beyond` refuses that, or the store fails.
pub fn refresh_device(
    change: &mut Change<'_>,
    device: &DeviceId,
    beyond: Beyond,
) -> Result<(), ControlError> {
    let Some((operator, own)) = store::device::labels(change.connection, device)? else {
        return Ok(());
    };
    let labels = store::device::merged(operator, own);
    // First those that let it go, then those that take it in: room is counted when all room there is was made.
    let (come, go): (Vec<AppRow>, Vec<AppRow>) = store::app::list(change.connection)?
        .into_iter()
        .partition(|app| selects(app, &labels));
    for app in go.iter().chain(&come) {
        set(change, app, device, &labels, beyond)?;
    }
    Ok(disruption_budgets::refresh_device(change, device, &labels)?)
}

fn selects(app: &AppRow, labels: &Labels) -> bool {
    !app.deleting && app.manifest.spec.selector.matches(labels)
}

fn set(
    change: &mut Change<'_>,
    app: &AppRow,
    device: &DeviceId,
    labels: &Labels,
    beyond: Beyond,
) -> Result<(), ControlError> {
    let selected = selects(app, labels);
    let name = app.name();
    if !store::app::set_member(change.connection, name, device, selected)? {
        return Ok(());
    }
    if selected && let Err(error) = check_room(change.connection, name, device) {
        return match (error, beyond) {
            (error @ ControlError::TooManyApps(_), Beyond::Skipped) => {
                store::app::set_member(change.connection, name, device, false)?;
                let event = change.event("too-many-apps").device(device).app(name);
                Ok(event.record(error.to_string())?)
            }
            (error, _) => Err(error),
        };
    }
    change.effects.dirty.insert(name.clone());
    if selected {
        place_newcomer(change, name, device)
    } else {
        if store::desired::remove(change.connection, device, name)?.is_some() {
            change.effects.publish = true;
        }
        leave_rollout(change, name, device)
    }
}

/// Takes a device that is no longer selected out of the app's live rollout, in the same transaction: were
/// that left to the next look at the fleet, a device that is selected again before it would keep its part
/// in the rollout without having the release, and one that stays away could be given an old release back.
fn leave_rollout(
    change: &mut Change<'_>,
    app: &AppName,
    device: &DeviceId,
) -> Result<(), ControlError> {
    let Some((id, false)) = store::rollout::newest_id(change.connection, app)? else {
        return Ok(());
    };
    rollouts::with(change, id, |change, live| {
        let rollout = &mut live.rollout;
        let takes_part = rollout
            .assignments
            .get(device)
            .is_some_and(|assignment| assignment.revert != Some(Revert::Gone));
        if !takes_part {
            return Ok(());
        }
        let gone = Action::Reverted {
            device: device.clone(),
            revert: Revert::Gone,
            message: Some("the app no longer selects it".to_owned()),
        };
        rollouts::act(change, rollout, &[gone])
    })?;
    Ok(())
}

fn place_newcomer(
    change: &mut Change<'_>,
    app: &AppName,
    device: &DeviceId,
) -> Result<(), ControlError> {
    let Some(newest) = store::rollout::newest_header(change.connection, app)? else {
        return Ok(());
    };
    if !newest.state.is_final() {
        return Ok(());
    }
    if store::desired::placement(change.connection, device, app)?.is_some() {
        return Ok(());
    }
    if newest.state == RolloutState::Completed {
        return join(change, newest.id, [(device.clone(), None)]);
    }
    let completed = store::rollout::newest_completed(change.connection, app)?;
    if let (Some(placement), Some(completed)) = (joiner_release(completed.as_ref()), &completed) {
        place(change, app, device, &placement, &completed.policy.terms)?;
    }
    Ok(())
}

/// Lets devices come after the last wave of a completed rollout, each with what it goes back to.
fn join(
    change: &mut Change<'_>,
    rollout: u64,
    devices: impl IntoIterator<Item = (DeviceId, Option<Placement>)>,
) -> Result<(), ControlError> {
    let devices: Vec<_> = devices.into_iter().collect();
    let joined: Vec<DeviceId> = devices.iter().map(|(device, _)| device.clone()).collect();
    let actions: Vec<_> = devices
        .into_iter()
        .map(|(device, previous)| Action::Tail {
            device,
            anew: Some(previous),
        })
        .collect();
    rollouts::with(change, rollout, |change, live| {
        change.effects.dirty.insert(live.rollout.app.clone());
        rollouts::act(change, &mut live.rollout, &actions)?;
        // Nothing was noted of those that had no part in it.
        Ok(live.read_missing(change.connection, &joined)?)
    })?;
    Ok(())
}

fn place(
    change: &mut Change<'_>,
    app: &AppName,
    device: &DeviceId,
    placement: &Placement,
    terms: &Terms,
) -> Result<(), ControlError> {
    store::desired::place(change.connection, device, app, placement)?;
    store::desired::set_terms(change.connection, device, app, terms)?;
    store::desired::enqueue_release(change.connection, &placement.release)?;
    change.effects.publish = true;
    Ok(())
}

/// After the end of a rollout: members that came in meanwhile get what newcomers get. After a completed one, so do
/// those outside it that have another release, for example one that was aborted earlier.
///
/// # Errors
///
/// When the store fails.
pub fn settle(change: &mut Change<'_>, app: &AppName) -> Result<(), ControlError> {
    let Some(newest) = store::rollout::newest_header(change.connection, app)? else {
        return Ok(());
    };
    // One that was superseded is followed by another in the same transaction.
    if !newest.state.is_final() || newest.state == RolloutState::Superseded {
        return Ok(());
    }
    let completed = store::rollout::newest_completed(change.connection, app)?;
    let (Some(placement), Some(completed)) = (joiner_release(completed.as_ref()), &completed)
    else {
        return Ok(());
    };
    let mut joining = Vec::new();
    for device in store::app::members(change.connection, app)? {
        let placed = store::desired::placement(change.connection, &device, app)?;
        let placed = placed.map(|(placement, _)| placement);
        if newest.state == RolloutState::Completed {
            let takes_part = store::rollout::assignment(change.connection, newest.id, &device)?
                .is_some_and(|assignment| assignment.revert != Some(Revert::Gone));
            let other = placed.is_none_or(|placed| placed.release != placement.release);
            if other && !takes_part {
                joining.push((device, placed));
            }
        } else if placed.is_none() {
            place(change, app, &device, &placement, &completed.policy.terms)?;
        }
    }
    if joining.is_empty() {
        return Ok(());
    }
    join(change, newest.id, joining)
}
