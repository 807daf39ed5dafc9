//! What is reported of an app.

use foreshore_protocol::message::{AppStatus, KeptOld, Phase, Reason, ServiceState, ServiceStatus};
use foreshore_protocol::{AppName, ServiceName};

use super::health::{Health, health};
use super::kept;
use super::service::{self, Target};
use super::{AppHistory, KeptUntil, Observed, ObservedContainer, Resume, ServiceHistory};
use crate::runtime::ContainerState;

/// The status of one app; `None` when no assignment is known, as then there is nothing to speak of.
pub(super) fn status(
    app: &AppName,
    history: &AppHistory,
    observed: &Observed,
    containers: &[&ObservedContainer],
) -> Option<AppStatus> {
    let assignment = history.assignment.as_ref()?;
    let shown = history.current.unwrap_or(assignment.release);
    let target = observed
        .releases
        .get(&shown)
        .map(|release| Target::new(shown, release));
    let (services, trouble) = target.as_ref().map_or_else(
        || (Vec::new(), None),
        |target| services(observed, history, containers, target),
    );
    let running = history.current.filter(|_| {
        target
            .as_ref()
            .is_some_and(|target| is_switched(history, containers, target))
    });
    // A last-known-good that is not well has a final phase and still a reason.
    let degraded = trouble.filter(|_| assignment.phase == Phase::Succeeded);
    Some(AppStatus {
        app: app.clone(),
        since: assignment.since,
        release: assignment.release,
        phase: assignment.phase,
        reason: assignment.reason.clone().or(degraded),
        running,
        last_known_good: history.last_known_good.as_ref().map(|good| good.release),
        services,
    })
}

/// Whether every service was started with the spec of `target` and none of another spec is left.
fn is_switched(
    history: &AppHistory,
    containers: &[&ObservedContainer],
    target: &Target<'_>,
) -> bool {
    !service::has_stale(containers, target, &history.kept)
        && target.services.iter().all(|(name, spec)| {
            history.services.get(*name).is_some_and(|service| {
                service.spec == Some(spec.digest) && service.release.is_some()
            })
        })
}

fn services(
    observed: &Observed,
    history: &AppHistory,
    containers: &[&ObservedContainer],
    target: &Target<'_>,
) -> (Vec<ServiceStatus>, Option<Reason>) {
    let mut trouble = None;
    let services = health(observed, history, containers, target)
        .into_iter()
        .map(|(name, health)| {
            let spec = target.services.get(name).map(|spec| spec.digest);
            let known = history
                .services
                .get(name)
                .filter(|service| service.spec == spec);
            let runs = containers.iter().any(|seen| {
                seen.container.id.service == *name
                    && Some(seen.container.service_digest) == spec
                    && matches!(seen.container.state, ContainerState::Running { .. })
            });
            let ready = health == Health::Ready;
            if let Health::Unwell(why) | Health::Lost(why) | Health::Hopeless(why) = health {
                trouble.get_or_insert(why);
            }
            ServiceStatus {
                service: name.clone(),
                state: state(known, runs),
                ready,
                restarts: known.map_or(0, |service| service.restarts),
                kept: kept(history, containers, name),
            }
        })
        .collect();
    (services, trouble)
}

/// The old container that runs on beside a service's own.
fn kept(
    history: &AppHistory,
    containers: &[&ObservedContainer],
    name: &ServiceName,
) -> Option<KeptOld> {
    let kept = history.kept.get(name)?;
    let runs = containers.iter().any(|seen| {
        kept::is_kept(&history.kept, &seen.container)
            && seen.container.id.service == *name
            && matches!(seen.container.state, ContainerState::Running { .. })
    });
    (runs && kept.until != KeptUntil::Over).then_some(KeptOld {
        instance: kept.service.instance,
        release: kept.release,
        keep_ms: kept.keep_ms,
    })
}

fn state(history: Option<&ServiceHistory>, runs: bool) -> ServiceState {
    let exit_code = history.and_then(|service| Some(service.last_exit?.code));
    match (runs, history.map(|service| service.resume), exit_code) {
        (true, _, _) => ServiceState::Running,
        (false, Some(Resume::Never), Some(exit_code)) => ServiceState::Exited { exit_code },
        (false, Some(Resume::At(_)), Some(exit_code)) => ServiceState::BackOff { exit_code },
        (false, _, _) => ServiceState::Waiting,
    }
}
