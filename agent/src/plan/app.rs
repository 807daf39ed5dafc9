//! How an app gets from one release to the next on this device, and back.
//!
//! Two things go side by side. The *assignment* is what the hub wants: it is staged while the old release
//! keeps running, and then switched to. The *trial* is the judgement of what was switched to, until it is the
//! last-known-good or is given up. An assignment that is replaced while it is on trial leaves the trial going:
//! so a device whose next release cannot be fetched still goes back by itself from a bad one.

use foreshore_protocol::message::{HeadApp, Phase, Reason, ReasonCode};
use foreshore_protocol::{AppName, Digest};

use super::ends;
use super::history::reason;
use super::kept;
use super::secret;
use super::service::{self, Target};
use super::trial;
use super::turn;
use super::window;
use super::{
    AppHistory, Assignment, Draft, HubProof, LastKnownGood, ObservedContainer, PolicyVerdict, Trial,
};

/// Decides on one app that the hub wants here, or that is kept because we do not know what the hub wants.
pub(super) fn advance(
    draft: &mut Draft<'_>,
    app: &AppName,
    history: &mut AppHistory,
    containers: &[&ObservedContainer],
    desired: Option<&HeadApp>,
    instance_floor: u64,
) {
    if history.current.is_none() && history.assignment.is_none() {
        adopt(draft, history, containers, desired);
    }
    let before = target(draft, history.current);
    ends::observe(
        draft,
        app,
        history,
        containers,
        before.as_ref(),
        instance_floor,
    );
    watch_again(draft, history);
    if let Some(desired) = desired {
        assign(draft, history, desired);
        if is_open(draft, history) {
            stage_and_switch(draft, app, history, desired);
        }
    }
    if let Some(target) = target(draft, history.current) {
        kept::take_back(draft, app, history, containers, &target);
    }
    trial::judge(draft, app, history, containers);
    let Some(current) = history.current else {
        return;
    };
    let Some(target) = target(draft, Some(current)) else {
        // Nothing is touched before the manifest is there again.
        draft.fetch(current);
        return;
    };
    if history.trial.is_some()
        && draft.observed.update_locks.held.contains(app)
        && service::is_before_start(containers, &target, &history.kept)
    {
        draft.update_locks.insert(app.clone());
    }
    let sound = draft.observed.sound_images();
    draft.stage(app, current, target.missing_images(&sound));
    service::advance(
        draft,
        app,
        history,
        containers,
        Some(&target),
        instance_floor,
    );
}

/// Stops and removes everything of an app that the hub does not want here. True when nothing is left.
pub(super) fn remove(
    draft: &mut Draft<'_>,
    app: &AppName,
    history: &mut AppHistory,
    containers: &[&ObservedContainer],
    instance_floor: u64,
) -> bool {
    ends::observe(draft, app, history, containers, None, instance_floor);
    history.trial = None;
    history.current = None;
    history.kept.clear();
    if let Some(assignment) = &mut history.assignment {
        assignment.phase = Phase::Removing;
        assignment.reason = None;
    }
    service::advance(draft, app, history, containers, None, instance_floor);
    containers.is_empty()
        && !history
            .services
            .keys()
            .any(|service| draft.is_busy(app, service))
}

pub(super) fn target<'a>(draft: &Draft<'a>, release: Option<Digest>) -> Option<Target<'a>> {
    let digest = release?;
    Some(Target::new(digest, draft.observed.releases.get(&digest)?))
}

/// Containers of an app that nothing is remembered of: the history was damaged. What runs is taken for what
/// should run; if the hub wants something else, it is also taken for good.
fn adopt(
    draft: &Draft<'_>,
    history: &mut AppHistory,
    containers: &[&ObservedContainer],
    desired: Option<&HeadApp>,
) {
    let Some(newest) = containers
        .iter()
        .max_by_key(|seen| (seen.container.id.instance, seen.container.release))
    else {
        return;
    };
    // Services that did not change keep the name of an older release, so the name alone does not tell.
    let covers = |release: &Digest| {
        target(draft, Some(*release))
            .is_some_and(|target| !service::has_stale(containers, &target, &history.kept))
    };
    let on_disk = draft.observed.releases.iter();
    let running = desired
        .map(|desired| desired.release)
        .into_iter()
        .chain([newest.container.release])
        .chain(
            on_disk
                .filter(|(_, release)| release.app == newest.container.id.app)
                .map(|(digest, _)| *digest),
        )
        .find(covers)
        .unwrap_or(newest.container.release);
    history.current = Some(running);
    if let Some(desired) = desired.filter(|desired| desired.release != running) {
        history.last_known_good = Some(LastKnownGood {
            release: running,
            since: desired.since,
        });
    }
}

/// A soak counts only what this agent watched without a break, and a deadline only from when it could act.
fn watch_again(draft: &Draft<'_>, history: &mut AppHistory) {
    let watching_since = draft.observed.watching_since;
    if let Some(trial) = &mut history.trial {
        if trial.started < watching_since {
            trial.setbacks = trial.setbacks.saturating_add(1);
        }
        trial.soaking_since = trial.soaking_since.filter(|since| *since >= watching_since);
        trial.started = trial.started.max(watching_since);
    }
}

/// Takes a new assignment up, or new terms of the one we have.
fn assign(draft: &mut Draft<'_>, history: &mut AppHistory, desired: &HeadApp) {
    let known = history.assignment.as_ref().is_some_and(|assignment| {
        assignment.since == desired.since
            && assignment.release == desired.release
            && assignment.phase != Phase::Removing
    });
    if !known {
        // What came to be good in a later assignment is good, also when a hub that was restored goes back to an earlier one.
        let good = history.last_known_good.as_ref();
        let poison = history
            .poison(desired.since, &desired.release)
            .filter(|_| good.is_none_or(|good| good.release != desired.release))
            .cloned();
        history.assignment = Some(Assignment {
            since: desired.since,
            release: desired.release,
            phase: match (&poison, &history.last_known_good) {
                (None, _) => Phase::Accepted,
                (Some(_), Some(_)) => Phase::RolledBack,
                (Some(_), None) => Phase::Failed,
            },
            reason: poison.map(|poison| poison.reason),
        });
        draft.forget_staging.insert(desired.release);
        if let Some(trial) = &mut history.trial
            && trial.release == desired.release
        {
            trial.since = desired.since;
            trial.started = draft.now.ms;
            trial.boots = 0;
            trial.setbacks = 0;
        }
    }
    if let Some(trial) = &mut history.trial
        && (trial.since, trial.release) == (desired.since, desired.release)
        && trial.soak_ms != 0
    {
        trial.soak_ms = desired.soak_ms;
        trial.progress_deadline_ms = desired.progress_deadline_ms;
        trial.max_restarts = desired.max_restarts;
        if let HubProof::Awaited { within_ms, .. } = &mut trial.hub {
            match desired.require_hub_ms {
                Some(within) => *within_ms = within,
                None => trial.hub = HubProof::NotAsked,
            }
        }
    }
}

/// Whether the assignment is still to be switched to. One that the device's policy denied is again when its owner allows
/// it: nothing of it was ever tried.
fn is_open(draft: &Draft<'_>, history: &AppHistory) -> bool {
    let allowed_now = |assignment: &Assignment| {
        let reason = assignment.reason.as_ref();
        assignment.phase == Phase::Rejected
            && reason.is_some_and(|reason| reason.code == ReasonCode::PolicyDenied)
            && draft.observed.releases.contains_key(&assignment.release)
            && !draft.observed.verdicts.contains_key(&assignment.release)
    };
    history
        .assignment
        .as_ref()
        .is_some_and(|assignment| !assignment.phase.is_final() || allowed_now(assignment))
        && history
            .trial
            .as_ref()
            .map(|trial| (trial.since, trial.release))
            != history
                .assignment
                .as_ref()
                .map(|assignment| (assignment.since, assignment.release))
}

/// Gets everything of the assigned release onto the disk, then switches to it.
fn stage_and_switch(
    draft: &mut Draft<'_>,
    app: &AppName,
    history: &mut AppHistory,
    desired: &HeadApp,
) {
    let gate = match gate(draft, app, desired) {
        // A turn that nobody may use is one that others lack, so it is asked for only while the window is open.
        Gate::Open => match window::keeps_from_switching(draft, history, desired)
            .or_else(|| turn::waits(draft, app, history, desired))
        {
            // Last, so that nothing is locked while others go first.
            None => update_lock(draft, app, history, desired),
            Some(why) => Gate::Closed(Phase::Waiting, Some(why)),
        },
        closed @ Gate::Closed(..) => closed,
    };
    let (phase, reason) = match gate {
        Gate::Open => {
            switch(draft, history, desired);
            (Phase::Activating, None)
        }
        Gate::Closed(phase, reason) => (phase, reason),
    };
    if let Some(assignment) = &mut history.assignment {
        assignment.phase = phase;
        assignment.reason = reason;
    }
}

/// Whether a release can be switched to.
enum Gate {
    Open,
    Closed(Phase, Option<Reason>),
}

fn gate(draft: &mut Draft<'_>, app: &AppName, desired: &HeadApp) -> Gate {
    let release = desired.release;
    let trouble = draft.staging_trouble(&release);
    if let Some((reason, true)) = &trouble {
        return Gate::Closed(Phase::Rejected, Some(reason.clone()));
    }
    let waiting = |phase| match &trouble {
        Some((reason, _)) => Gate::Closed(Phase::Blocked, Some(reason.clone())),
        None => Gate::Closed(phase, None),
    };
    let Some(manifest) = draft.observed.releases.get(&release) else {
        draft.fetch(release);
        return waiting(Phase::Accepted);
    };
    if let Some(why) = unusable(app, manifest) {
        return Gate::Closed(
            Phase::Rejected,
            Some(reason(ReasonCode::BadRelease, None, &why)),
        );
    }
    match draft.observed.verdicts.get(&release) {
        Some(PolicyVerdict::Denied(why)) => {
            return Gate::Closed(
                Phase::Rejected,
                Some(reason(ReasonCode::PolicyDenied, None, why)),
            );
        }
        Some(PolicyVerdict::Unknown(why)) => {
            return Gate::Closed(
                Phase::Blocked,
                Some(reason(ReasonCode::PolicyDenied, None, why)),
            );
        }
        None => {}
    }
    let here = draft.observed.images_for(&release);
    let missing = Target::new(release, manifest).missing_images(&here);
    if missing.is_empty() {
        // What runs is not stopped for something that could not be started.
        let mut services = manifest.services.iter();
        let lacking =
            services.find_map(|(name, service)| secret::missing(draft.observed, name, service));
        return lacking.map_or(Gate::Open, |why| Gate::Closed(Phase::Blocked, Some(why)));
    }
    if let Some(why) = secret::missing_login(draft.observed, &release) {
        return Gate::Closed(Phase::Blocked, Some(why));
    }
    if let Some(why) = window::keeps_from_fetching(draft, desired) {
        return Gate::Closed(Phase::Waiting, Some(why));
    }
    draft.stage(app, release, missing);
    waiting(Phase::Staging)
}

/// Whether the app lets itself be updated. What runs of it decides: only that can have the lock.
fn update_lock(
    draft: &mut Draft<'_>,
    app: &AppName,
    history: &AppHistory,
    desired: &HeadApp,
) -> Gate {
    let running = history
        .current
        .filter(|current| *current != desired.release)
        .and_then(|current| draft.observed.releases.get(&current));
    let locks =
        running.is_some_and(|release| release.services.values().any(|service| service.update_lock));
    if !locks || desired.override_lock {
        return Gate::Open;
    }
    draft.update_locks.insert(app.clone());
    if draft.observed.update_locks.held.contains(app) {
        Gate::Open
    } else if draft.observed.update_locks.refused.contains(app) {
        // Others need not wait for that.
        draft.turns.remove(app);
        let message = "the app holds its update lock; it is updated when it lets go of it";
        Gate::Closed(
            Phase::Blocked,
            Some(reason(ReasonCode::UpdateLocked, None, message)),
        )
    } else {
        Gate::Closed(Phase::Staging, None)
    }
}

/// Why a release whose digest is right can still not be run as `app`.
fn unusable(app: &AppName, manifest: &foreshore_protocol::release::Release) -> Option<String> {
    if manifest.app != *app {
        return Some(format!(
            "the release is of app {}, but was assigned to app {app}",
            manifest.app
        ));
    }
    manifest.services.iter().find_map(|(name, service)| {
        service::image_digest(service).is_none().then(|| {
            format!(
                "service {name}: image {:?} is not pinned by digest",
                service.image
            )
        })
    })
}

fn switch(draft: &Draft<'_>, history: &mut AppHistory, desired: &HeadApp) {
    let release = desired.release;
    let proven = history.current == Some(release)
        && history
            .last_known_good
            .as_ref()
            .is_some_and(|good| good.release == release);
    service::forgive(history, release);
    history.current = Some(release);
    history.trial = Some(Trial {
        since: desired.since,
        release,
        // What runs and is the last-known-good only has to be confirmed.
        soak_ms: if proven { 0 } else { desired.soak_ms },
        progress_deadline_ms: desired.progress_deadline_ms,
        started: draft.now.ms,
        soaking_since: None,
        boots: 0,
        setbacks: 0,
        failed: None,
        max_restarts: desired.max_restarts,
        restarts: 0,
        hub: match desired.require_hub_ms {
            Some(within_ms) if !proven && draft.observed.hub.connected_since.is_some() => {
                HubProof::Awaited {
                    since: draft.now.ms,
                    within_ms,
                }
            }
            _ => HubProof::NotAsked,
        },
    });
}

pub(super) fn is_runnable(draft: &Draft<'_>, release: &Digest) -> bool {
    target(draft, Some(*release))
        .is_some_and(|target| target.missing_images(&draft.observed.images).is_empty())
}

/// Tells the assignment how its trial goes; a newer assignment has its own phase.
pub(super) fn set_phase(
    history: &mut AppHistory,
    trial: &Trial,
    phase: Phase,
    why: Option<Reason>,
) {
    if let Some(assignment) = &mut history.assignment
        && (assignment.since, assignment.release) == (trial.since, trial.release)
    {
        assignment.phase = phase;
        assignment.reason = why;
    }
}
