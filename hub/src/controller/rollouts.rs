//! Opening, advancing and commanding rollouts: the engine's decisions, carried out in the transaction at hand.

use std::collections::BTreeSet;

use foreshore_protocol::api::{AssignmentState, RolloutState, WaveState};
use foreshore_protocol::manifest::RolloutPolicy;
use foreshore_protocol::message::Windows;
use foreshore_protocol::{AppName, DeviceId, Digest, Version};

use super::lives::Live;
use super::{Change, ControlError, membership};
use crate::rollout::analysis::Verdict;
use crate::rollout::steps::Requirements;
use crate::rollout::{
    self, Action, News, Opening, Policy, Refused, Rollout, StateName, Touched, advance_by, command,
};
use crate::store;

/// Devices that one transaction offers something at most. Each takes some 0.1 ms, while which nobody else can write.
pub(super) const OFFERS_AT_ONCE: u32 = 1_000;

/// Opens a rollout of `app` to the release `to` over the devices that the app selects now, and takes its first
/// step. A live rollout of the app makes room. `requirements` are what `to` can be reached from.
///
/// # Errors
///
/// When the store fails.
pub fn open(
    change: &mut Change<'_>,
    app: &AppName,
    to: Digest,
    policy: &RolloutPolicy,
    requirements: Requirements,
    seed: u64,
) -> Result<u64, ControlError> {
    let id = store::rollout::next_id(change.connection)?;
    // Whatever it is, it is over now, and is not kept.
    let mut before = match store::rollout::newest_id(change.connection, app)? {
        Some((newest, _)) => change.lives.take(change.connection, newest)?,
        None => None,
    };
    if let Some(before) = &before {
        store::rollout::put_wake(change.connection, before.rollout.id, None)?;
    }
    if let Some(live) = before.as_mut().map(|live| &mut live.rollout)
        && !live.state.is_final()
    {
        let actions = command::supersede(live, id)?;
        act(change, live, &actions)?;
    }
    let from = store::rollout::newest_completed(change.connection, app)?.map(|rollout| rollout.to);
    let members = store::rollout::opening_members(change.connection, app)?;
    let rollout = Rollout::open(Opening {
        id,
        app: app.clone(),
        from,
        to,
        seed,
        policy: Policy {
            requirements,
            ..Policy::freeze(policy, members.len())
        },
        members,
        before: before.as_ref().map(|live| &live.rollout),
        now: change.now,
    });
    store::rollout::insert(change.connection, &rollout)?;
    let message = format!("to {} on {} devices", to.short(), rollout.assignments.len());
    change
        .event("rollout-opened")
        .app(app)
        .rollout(id)
        .record(message)?;
    store::desired::enqueue_release(change.connection, &to)?;
    change.effects.publish = true;
    change.lives.sync(change.connection)?;
    let live = Live::of(change.connection, rollout)?;
    change.lives.put(live);
    advance_newest(change, app)?;
    Ok(id)
}

/// Lets the engine look at what is new of the newest rollout of an app, and does what it says.
///
/// # Errors
///
/// When the store fails.
pub fn advance_newest(change: &mut Change<'_>, app: &AppName) -> Result<(), ControlError> {
    let Some((id, ended)) = store::rollout::newest_id(change.connection, app)? else {
        return Ok(());
    };
    if ended && !change.lives.has(id) && is_given_up(change, app)? {
        // Nothing is decided any more, so it need not be loaded.
        store::rollout::put_wake(change.connection, id, None)?;
        return Ok(());
    }
    with(change, id, |change, live| {
        let rollout = &mut live.rollout;
        live.fleet.pulse = store::rollout::pulse(change.connection, rollout.pulse_since())?;
        live.fleet.listening_since = change.listening.since;
        live.fleet.settle_ms = change.listening.settle_ms;
        let news = std::mem::replace(&mut live.news, News::Devices(BTreeSet::new()));
        let step = advance_by(rollout, &live.fleet, &news, change.now);
        act(change, rollout, &step.actions)?;
        if live.wake_at != Some(step.wake_at) {
            store::rollout::put_wake(change.connection, id, step.wake_at)?;
            live.wake_at = Some(step.wake_at);
        }
        Ok(())
    })?;
    Ok(())
}

/// Whether the newest rollout of an app ended otherwise than by completing.
fn is_given_up(change: &Change<'_>, app: &AppName) -> rusqlite::Result<bool> {
    let header = store::rollout::newest_header(change.connection, app)?;
    Ok(header.is_some_and(|rollout| match rollout.state {
        RolloutState::Aborted | RolloutState::RolledBack | RolloutState::Superseded => true,
        RolloutState::Completed
        | RolloutState::Scheduled
        | RolloutState::Running
        | RolloutState::Paused
        | RolloutState::RollingBack
        | RolloutState::RollbackPaused => false,
    }))
}

/// Changes a rollout, and lets in those that waited for its end if that ends it; `None`: there is none of that id.
///
/// # Errors
///
/// What `work` returns, or when the store fails.
pub(super) fn with<T>(
    change: &mut Change<'_>,
    id: u64,
    work: impl FnOnce(&mut Change<'_>, &mut Live) -> Result<T, ControlError>,
) -> Result<Option<T>, ControlError> {
    let Some(mut live) = change.lives.take(change.connection, id)? else {
        return Ok(None);
    };
    let ended_before = live.rollout.state.is_final();
    // One that fails is not put back, and the whole change is undone.
    let done = work(change, &mut live)?;
    let app = live.rollout.app.clone();
    let ended = live.rollout.state.is_final() && !ended_before;
    change.lives.put(live);
    if ended {
        membership::settle(change, &app)?;
    }
    Ok(Some(done))
}

/// A command of an operator.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Offer nothing more until `Resume`.
    Pause,
    /// Go on.
    Resume,
    /// Let the wave go by that waits for it.
    Approve,
    /// Try failed devices again: one, or all.
    Retry(Option<DeviceId>),
    /// Give up; devices that have the release keep it.
    Abort,
}

/// Does what an operator asks of a rollout.
///
/// # Errors
///
/// When there is no such rollout, its state does not allow it, or the store fails.
pub fn command(change: &mut Change<'_>, id: u64, command: Command) -> Result<(), ControlError> {
    let app = with(change, id, |change, live| {
        let rollout = &mut live.rollout;
        let actions = match command {
            Command::Pause => command::pause(rollout),
            Command::Resume => command::resume(rollout),
            Command::Approve => command::approve(rollout),
            Command::Retry(device) => command::retry(rollout, device.as_ref()),
            Command::Abort => command::abort(rollout),
        }?;
        act(change, rollout, &actions)?;
        Ok(rollout.app.clone())
    })?;
    let app = app.ok_or(ControlError::UnknownRollout(id))?;
    advance_newest(change, &app)
}

/// Lets the devices of a rollout switch to its release although the app there holds its update lock.
///
/// # Errors
///
/// When there is no such rollout, it has ended, or the store fails.
pub fn override_locks(change: &mut Change<'_>, id: u64) -> Result<(), ControlError> {
    let rollout =
        store::rollout::header(change.connection, id)?.ok_or(ControlError::UnknownRollout(id))?;
    if rollout.state.is_final() {
        let state = StateName(rollout.state);
        return Err(Refused::Final { id, state }.into());
    }
    let releases = on_the_way(&rollout);
    let told = store::desired::override_locks(change.connection, &rollout.app, &releases)?;
    change
        .event("update-locks-overridden")
        .app(&rollout.app)
        .rollout(id)
        .record(format!(
            "for {}; {told} devices are told now",
            rollout.to.short()
        ))?;
    change.effects.publish = true;
    Ok(())
}

/// Lets the devices of a rollout begin at any time, those that come after its last wave included, although it has windows.
///
/// # Errors
///
/// When there is no such rollout, it has ended and nobody comes after, it has no windows, or the store fails.
pub fn override_windows(change: &mut Change<'_>, id: u64) -> Result<(), ControlError> {
    let found = with(change, id, |change, live| {
        let rollout = &mut live.rollout;
        if rollout.state.is_final() && rollout.state != RolloutState::Completed {
            let state = StateName(rollout.state);
            return Err(Refused::Final { id, state }.into());
        }
        if rollout.policy.terms.windows.is_empty() {
            return Err(ControlError::NoWindows(id));
        }
        rollout.policy.terms.windows = Windows::default();
        store::rollout::put(change.connection, rollout, &Touched::Header)?;
        let releases = on_the_way(rollout);
        let told = store::desired::clear_windows(change.connection, &rollout.app, &releases)?;
        change
            .event("windows-overridden")
            .app(&rollout.app)
            .rollout(id)
            .record(format!(
                "for {}; {told} devices are told now",
                rollout.to.short()
            ))?;
        change.effects.dirty.insert(rollout.app.clone());
        change.effects.publish = true;
        Ok(())
    })?;
    found.ok_or(ControlError::UnknownRollout(id))
}

/// What its devices may be on their way to: its release, and the steps there.
fn on_the_way(rollout: &Rollout) -> BTreeSet<Digest> {
    let steps = rollout.policy.requirements.releases();
    steps.chain([rollout.to]).collect()
}

/// Ends a live rollout where it stands, without giving devices anything; its app is being removed from them.
///
/// # Errors
///
/// When the store fails.
pub fn stop(change: &mut Change<'_>, app: &AppName, why: &str) -> Result<(), ControlError> {
    let Some((id, false)) = store::rollout::newest_id(change.connection, app)? else {
        return Ok(());
    };
    let end = Action::Enter {
        state: RolloutState::Aborted,
        cause: Some(rollout::Cause::Operator),
        message: Some(why.to_owned()),
    };
    with(change, id, |change, live| {
        act(change, &mut live.rollout, &[end])
    })?;
    Ok(())
}

/// Carries out actions: desired states and their outbox rows first, then the records that changed, then events. What
/// follows from the end of a rollout is for the caller ([`with`]).
///
/// # Errors
///
/// When the store fails.
pub fn act(
    change: &mut Change<'_>,
    rollout: &mut Rollout,
    actions: &[Action],
) -> Result<(), ControlError> {
    change.effects.analysis |= !rollout.policy.analysis.is_empty() && !actions.is_empty();
    for action in actions {
        let written = write_desired(change, rollout, action)?;
        let held = |rollout: &Rollout| {
            let assignment = action
                .device()
                .and_then(|device| rollout.assignments.get(device));
            assignment.is_some_and(rollout::Assignment::holds_slot)
        };
        let before = held(rollout);
        let touched = rollout.apply(action, written, change.now);
        store::rollout::put(change.connection, rollout, &touched)?;
        if let Some(device) = action.device().filter(|_| before && !held(rollout)) {
            // Others may wait for it.
            let mut waiting = store::rollout::interested(change.connection, device)?;
            waiting.retain(|app| *app != rollout.app);
            change.effects.dirty.extend(waiting);
        }
        announce(change, rollout, action)?;
    }
    Ok(())
}

fn write_desired(
    change: &mut Change<'_>,
    rollout: &Rollout,
    action: &Action,
) -> Result<Option<Version>, ControlError> {
    let app = &rollout.app;
    let (device, placement) = match action {
        Action::Offer {
            device, placement, ..
        } => (device, Some(placement)),
        Action::Restore {
            device, placement, ..
        } => (device, placement.as_ref()),
        Action::Assign { .. }
        | Action::Stepped { .. }
        | Action::Reverted { .. }
        | Action::Tail { .. }
        | Action::StopTail { .. }
        | Action::Approve { .. }
        | Action::Replace { .. }
        | Action::Wave { .. }
        | Action::Measured { .. }
        | Action::MeasureAnew { .. }
        | Action::Enter { .. }
        | Action::Freeze
        | Action::Thaw => return Ok(None),
    };
    change.effects.publish = true;
    let version = match placement {
        Some(placement) => {
            // A broker that was emptied meanwhile was given only what was placed then.
            store::desired::enqueue_release(change.connection, &placement.release)?;
            let version = store::desired::place(change.connection, device, app, placement)?;
            // The way back waits for no window and has nothing to prove.
            if let Action::Offer { .. } = action {
                let terms = &rollout.policy.terms;
                store::desired::set_terms(change.connection, device, app, terms)?;
            }
            version
        }
        None => match store::desired::remove(change.connection, device, app)? {
            Some(version) => version,
            // Nothing was placed; the device must still answer to a version of its own.
            None => store::desired::bump(change.connection, device)?,
        },
    };
    Ok(Some(version))
}

/// The events that people follow a rollout by.
fn announce(change: &mut Change<'_>, rollout: &Rollout, action: &Action) -> rusqlite::Result<()> {
    let (app, id) = (&rollout.app, rollout.id);
    match action {
        Action::Enter { state, message, .. } => {
            let kind = format!("rollout-{}", StateName(*state));
            let message = message.clone().unwrap_or_else(|| format!("to {}", rollout.to.short()));
            change.event(&kind).app(app).rollout(id).record(message)
        }
        Action::Wave { ordinal, state, .. } => {
            let kind = match state {
                WaveState::Pending => "wave-pending",
                WaveState::Open => "wave-open",
                WaveState::Baking => "wave-baking",
                WaveState::AwaitingApproval => "wave-awaiting-approval",
                WaveState::Passed => "wave-passed",
                WaveState::Failed => "wave-failed",
                WaveState::Skipped => "wave-skipped",
            };
            let devices = rollout.wave(*ordinal).map_or(0, |wave| wave.size);
            let message = format!("wave {ordinal} of {}, {devices} devices", rollout.waves.len());
            change.event(kind).app(app).rollout(id).record(message)
        }
        Action::Approve { ordinal } => {
            let message = format!("wave {ordinal} by an operator");
            change.event("wave-approved").app(app).rollout(id).record(message)
        }
        Action::StopTail { message } => {
            let kind = if message.is_some() { "tail-stopped" } else { "tail-resumed" };
            let message = message.clone().unwrap_or_else(|| "devices that come later are offered the release again".to_owned());
            change.event(kind).app(app).rollout(id).record(message)
        }
        Action::Freeze => change
            .event("rollout-frozen")
            .app(app)
            .rollout(id)
            .record("most of the fleet is dark; nothing is offered and no device counts as failed until it is back"),
        Action::Thaw => change.event("rollout-thawed").app(app).rollout(id).record("the fleet is back"),
        Action::Assign { device, state: AssignmentState::Silent, message, .. } => {
            let message = message.clone().unwrap_or_else(|| "it went silent while switching".to_owned());
            change.event("device-silent").device(device).app(app).rollout(id).record(message)
        }
        Action::Assign { device, state: AssignmentState::Deferred, message, .. } => {
            let message = message.clone().unwrap_or_else(|| "it is put off".to_owned());
            change.event("device-deferred").device(device).app(app).rollout(id).record(message)
        }
        Action::Stepped { device } => {
            let step = rollout.assignments.get(device).and_then(|assignment| assignment.previous);
            let step = step.map_or_else(String::new, |step| format!("it has release {} now, on its way to {}", step.release.short(), rollout.to.short()));
            change.event("device-stepped").device(device).app(app).rollout(id).record(step)
        }
        Action::Measured { gate, verdict, message, ordinal } => {
            let kind = match verdict {
                // Only what is not well is news.
                Verdict::Pass => return Ok(()),
                Verdict::Fail => "analysis-failed",
                Verdict::Inconclusive => "analysis-inconclusive",
            };
            let name = rollout.policy.analysis.get(*gate).map_or("?", |gate| &gate.name);
            let message = format!("{name}, wave {ordinal}: {message}");
            change.event(kind).app(app).rollout(id).record(message)
        }
        Action::Offer { .. }
        | Action::Tail { .. }
        | Action::Restore { .. }
        | Action::Assign { .. }
        | Action::Reverted { .. }
        | Action::MeasureAnew { .. }
        | Action::Replace { .. } => Ok(()),
    }
}

/// The release that undoing the app's newest change goes back to.
///
/// # Errors
///
/// When there is none, or it goes back already.
pub fn undo_target(change: &Change<'_>, app: &AppName) -> Result<Digest, ControlError> {
    let nothing = || ControlError::NothingToUndo(app.clone());
    let newest = store::rollout::newest_header(change.connection, app)?.ok_or_else(nothing)?;
    match newest.state {
        RolloutState::Scheduled
        | RolloutState::Running
        | RolloutState::Paused
        | RolloutState::Completed
        | RolloutState::Aborted => Ok(command::undo_target(&newest)?),
        RolloutState::RollingBack | RolloutState::RollbackPaused => Err(Refused::State {
            id: newest.id,
            state: StateName(newest.state),
            command: "undo",
            needs: "running, paused, completed or aborted; it goes back already",
        }
        .into()),
        RolloutState::RolledBack | RolloutState::Superseded => {
            let completed =
                store::rollout::newest_completed(change.connection, app)?.ok_or_else(nothing)?;
            Ok(command::undo_target(&completed)?)
        }
    }
}
