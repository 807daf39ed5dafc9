//! How a release that was switched to is judged, until it is the last-known-good or is given up.

use foreshore_protocol::AppName;
use foreshore_protocol::message::{EventKind, Phase, Reason, ReasonCode};
use foreshore_protocol::quantity::Span;

use super::app::{is_runnable, set_phase, target};
use super::health::{Health, health};
use super::history::reason;
use super::service::{self, Target};
use super::{AppHistory, Draft, HubProof, LastKnownGood, ObservedContainer, Poison, Trial};

/// A release during whose trial the device booted so often takes the device down.
const MAX_TRIAL_BOOTS: u32 = 3;

/// A release whose trial was broken into so often, by agents that ended and containers that were lost, brings that about.
/// More than any operator or update of the agent does to one trial.
const MAX_TRIAL_SETBACKS: u32 = 10;

/// How many failed assignments are remembered of one app; only the newest can come again.
const MAX_POISONED: usize = 8;

/// Judges the release that is on trial.
pub(super) fn judge(
    draft: &mut Draft<'_>,
    app: &AppName,
    history: &mut AppHistory,
    containers: &[&ObservedContainer],
) {
    prove_hub(draft, history);
    let Some(trial) = history.trial.clone() else {
        return;
    };
    let verdict = match target(draft, Some(trial.release)) {
        Some(target) => verdict(draft, history, containers, &target, &trial),
        None => blind_verdict(draft, history, &trial),
    };
    let (phase, why) = match verdict {
        Verdict::Fail(why) => return fail(draft, app, history, &trial, why),
        Verdict::Pass => return succeed(draft, app, history, &trial),
        Verdict::Wait => (Phase::Activating, None),
        Verdict::Forgive(ended, why) => {
            if let Some(trial) = &mut history.trial {
                trial.restarts = trial.restarts.saturating_add(ended);
            }
            draft.notice(
                EventKind::NotReady,
                app,
                why.service.clone(),
                format!(
                    "forgiven by maxRestarts, and the soak begins anew: {}",
                    why.message
                ),
            );
            (Phase::Activating, None)
        }
        Verdict::Soak => (Phase::Soaking, None),
        Verdict::AwaitHub(why) => (Phase::Soaking, Some(why)),
    };
    if let Some(trial) = &mut history.trial {
        if phase == Phase::Soaking {
            trial.soaking_since.get_or_insert(draft.now.ms);
        } else if trial.soaking_since.take().is_some() {
            // Not known any more, rather than unwell: it gets the whole deadline again.
            trial.started = draft.now.ms;
        }
    }
    set_phase(history, &trial, phase, why);
}

/// Takes note that the way to the hub is open with what is on trial.
fn prove_hub(draft: &mut Draft<'_>, history: &mut AppHistory) {
    let Some(trial) = &mut history.trial else {
        return;
    };
    if let HubProof::Awaited { since, .. } = trial.hub {
        match draft.observed.hub.was_reached_after(since, draft.now.ms) {
            Ok(()) => trial.hub = HubProof::Given,
            Err(later) => _ = later.is_some_and(|at| draft.is_later(at)),
        }
    }
}

#[derive(Debug)]
enum Verdict {
    /// Not all are ready.
    Wait,
    /// So many services ended during the soak, which is allowed; they are started again.
    Forgive(u32, Reason),
    /// All are ready.
    Soak,
    /// All were for long enough, and the hub was not reached since.
    AwaitHub(Reason),
    Pass,
    Fail(Reason),
}

/// The manifest of what is on trial was damaged or lost, so nothing of it can be started or told: it is asked
/// for again, and given up when its time is over and there is something to go back to.
fn blind_verdict(draft: &mut Draft<'_>, history: &AppHistory, trial: &Trial) -> Verdict {
    let can_go_back = history
        .last_known_good
        .as_ref()
        .is_some_and(|good| good.release != trial.release && is_runnable(draft, &good.release));
    let deadline = trial.started.plus(trial.progress_deadline_ms);
    let shaken = trial.boots >= MAX_TRIAL_BOOTS || trial.setbacks >= MAX_TRIAL_SETBACKS;
    if !can_go_back || (!shaken && draft.is_later(deadline)) {
        return Verdict::Wait;
    }
    let message = "its manifest was lost on this device and could not be fetched again in time";
    Verdict::Fail(reason(ReasonCode::DeadlineExceeded, None, message))
}

fn verdict(
    draft: &mut Draft<'_>,
    history: &AppHistory,
    containers: &[&ObservedContainer],
    target: &Target<'_>,
    trial: &Trial,
) -> Verdict {
    if let Some(why) = &trial.failed {
        return Verdict::Fail(why.clone());
    }
    if trial.boots >= MAX_TRIAL_BOOTS {
        let message = format!("the device booted {} times during the trial", trial.boots);
        return Verdict::Fail(reason(ReasonCode::DeadlineExceeded, None, &message));
    }
    if trial.setbacks >= MAX_TRIAL_SETBACKS {
        let message = format!(
            "{} times during the trial the agent ended or a container was lost",
            trial.setbacks
        );
        return Verdict::Fail(reason(ReasonCode::DeadlineExceeded, None, &message));
    }
    let health = health(draft.observed, history, containers, target);
    let mut waiting = None;
    let mut ended: Vec<Reason> = Vec::new();
    for (name, health) in health {
        match health {
            Health::Ready => {}
            Health::Hopeless(why) => return Verdict::Fail(why),
            Health::Unwell(why) if trial.soaking_since.is_some() => {
                // One that runs and is not ready did not end.
                let has_ended = history.services.get(name).is_some_and(|own| own.ended);
                if trial.max_restarts == 0 || !has_ended {
                    return Verdict::Fail(why);
                }
                ended.push(why);
            }
            Health::Unwell(why) | Health::Lost(why) | Health::NotYet(why) => {
                waiting.get_or_insert(why);
            }
        }
    }
    let count = u32::try_from(ended.len()).unwrap_or(u32::MAX);
    if let Some(why) = ended.into_iter().next() {
        let restarts = trial.restarts.saturating_add(count);
        if restarts <= trial.max_restarts {
            return Verdict::Forgive(count, why);
        }
        let message = format!(
            "{restarts} unexpected ends during the soak, and maxRestarts is {}: {}",
            trial.max_restarts, why.message
        );
        return Verdict::Fail(reason(why.code, why.service, &message));
    }
    if waiting.is_none() && service::has_stale(containers, target, &history.kept) {
        let message = "containers of the release before are still there";
        waiting = Some(reason(ReasonCode::NotReady, None, message));
    }
    if let Some(why) = waiting {
        let deadline = trial.started.plus(trial.progress_deadline_ms);
        if draft.is_later(deadline) {
            return Verdict::Wait;
        }
        let message = format!(
            "not all services were ready within {}: {}",
            Span(trial.progress_deadline_ms),
            why.message
        );
        return Verdict::Fail(reason(ReasonCode::DeadlineExceeded, why.service, &message));
    }
    let soaking_since = trial.soaking_since.unwrap_or(draft.now.ms);
    if draft.is_later(soaking_since.plus(trial.soak_ms)) {
        return Verdict::Soak;
    }
    let HubProof::Awaited { since, within_ms } = trial.hub else {
        return Verdict::Pass;
    };
    let deadline = since.plus(within_ms);
    let within = Span(within_ms);
    if draft.is_later(deadline) {
        let message = format!("waits until the hub is reached again, for {within} from switching");
        return Verdict::AwaitHub(reason(ReasonCode::HubUnreachable, None, &message));
    }
    let message =
        format!("the hub was reached before and not within {within} of switching (requireHub)");
    Verdict::Fail(reason(ReasonCode::HubUnreachable, None, &message))
}

fn succeed(draft: &mut Draft<'_>, app: &AppName, history: &mut AppHistory, trial: &Trial) {
    history.last_known_good = Some(LastKnownGood {
        release: trial.release,
        since: trial.since,
    });
    history.trial = None;
    set_phase(history, trial, Phase::Succeeded, None);
    draft.collect_soon = true;
    draft.notice(
        EventKind::Succeeded,
        app,
        None,
        format!(
            "release {} is the last-known-good now",
            trial.release.short()
        ),
    );
}

fn fail(
    draft: &mut Draft<'_>,
    app: &AppName,
    history: &mut AppHistory,
    trial: &Trial,
    why: Reason,
) {
    let failed = trial.release.short();
    let service = why.service.clone();
    history.poisoned.push(Poison {
        since: trial.since,
        release: trial.release,
        reason: why.clone(),
    });
    if history.poisoned.len() > MAX_POISONED {
        history.poisoned.remove(0);
    }
    history.trial = None;
    let good = history
        .last_known_good
        .as_ref()
        .map(|good| good.release)
        .filter(|good| *good != trial.release && is_runnable(draft, good));
    let (phase, kind, message) = match good {
        Some(good) => {
            history.current = Some(good);
            // What is there was looked at as the other release's so far: whether its secrets are new enough, say.
            draft.wake_at = Some(draft.now.ms);
            (
                Phase::RolledBack,
                EventKind::RolledBack,
                format!(
                    "release {failed} was given up for {}: {}",
                    good.short(),
                    why.message
                ),
            )
        }
        None => (
            Phase::Failed,
            EventKind::Failed,
            format!(
                "release {failed} failed and there is none to go back to: {}",
                why.message
            ),
        ),
    };
    draft.notice(kind, app, service, message);
    set_phase(history, trial, phase, Some(why));
}
