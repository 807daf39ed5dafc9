//! How well the services of a release are, and what they wait for.

use std::collections::BTreeMap;

use foreshore_protocol::ServiceName;
use foreshore_protocol::manifest::Condition;
use foreshore_protocol::message::{Reason, ReasonCode};

use super::history::reason;
use super::secret;
use super::service::{Spec, Target};
use super::{
    AppHistory, Cause, Condemned, Observed, ObservedContainer, ProbeState, Resume, ServiceHistory,
};
use crate::runtime::{ContainerState, Exit};

/// Whether a service does its job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Health {
    /// It does, or has done what it had to.
    Ready,
    /// Not known yet, or on its way.
    NotYet(Reason),
    /// It does not; that may pass.
    Unwell(Reason),
    /// It does not, by no fault of its own; it is started again.
    Lost(Reason),
    /// It does not and will not.
    Hopeless(Reason),
}

/// How well every service of `target` is. Containers that should not be there count against their service.
pub(super) fn health<'a>(
    observed: &Observed,
    history: &AppHistory,
    containers: &[&ObservedContainer],
    target: &Target<'a>,
) -> BTreeMap<&'a ServiceName, Health> {
    let mut healths: BTreeMap<_, _> = target
        .services
        .iter()
        .map(|(name, spec)| {
            let history = history.services.get(*name);
            let health = service_health(name, history, containers, spec);
            let missing = || secret::missing(observed, name, spec.service);
            let health = match health {
                // It cannot come up, and that is not its own fault.
                Health::NotYet(_) | Health::Unwell(_) | Health::Lost(_)
                    if !runs(name, containers, spec) =>
                {
                    missing().map_or(health, Health::Unwell)
                }
                Health::NotYet(_)
                | Health::Unwell(_)
                | Health::Lost(_)
                | Health::Ready
                | Health::Hopeless(_) => health,
            };
            (*name, health)
        })
        .collect();
    let waits: Vec<_> = target
        .services
        .keys()
        .filter_map(|name| Some((*name, waits_for(history, &healths, target, name)?)))
        .collect();
    for (name, why) in waits {
        healths.insert(name, Health::NotYet(why));
    }
    healths
}

fn runs(name: &ServiceName, containers: &[&ObservedContainer], spec: &Spec<'_>) -> bool {
    containers.iter().any(|seen| {
        seen.container.id.service == *name
            && seen.container.service_digest == spec.digest
            && matches!(seen.container.state, ContainerState::Running { .. })
    })
}

/// What a service that was not started yet waits for, if its dependencies are what keeps it.
pub(super) fn waits_for(
    history: &AppHistory,
    healths: &BTreeMap<&ServiceName, Health>,
    target: &Target<'_>,
    name: &ServiceName,
) -> Option<Reason> {
    let spec = target.services.get(name)?;
    let own = history.services.get(name);
    let begun = |own: &ServiceHistory| own.began || own.present != 0;
    if own.is_some_and(|own| own.spec == Some(spec.digest) && begun(own)) {
        return None;
    }
    let holds = |other: &ServiceName, condition| {
        let of_spec = history.services.get(other).filter(|service| {
            Some(service.spec) == target.services.get(other).map(|spec| Some(spec.digest))
        });
        let done = of_spec.is_some_and(|service| service.is_done());
        match condition {
            Condition::Completed => done,
            Condition::Started => done || of_spec.is_some_and(|service| service.present != 0),
            Condition::Healthy => healths.get(other) == Some(&Health::Ready),
        }
    };
    let (other, dependency) = spec
        .service
        .depends_on
        .iter()
        .find(|(other, dependency)| !holds(other, dependency.condition))?;
    let message = format!("waits for {other} ({})", dependency.condition.as_str());
    Some(reason(ReasonCode::NotReady, Some(name.clone()), &message))
}

fn service_health(
    name: &ServiceName,
    history: Option<&ServiceHistory>,
    containers: &[&ObservedContainer],
    spec: &Spec<'_>,
) -> Health {
    let why = |code, message: &str| reason(code, Some(name.clone()), message);
    let not_yet = |message: &str| Health::NotYet(why(ReasonCode::NotReady, message));
    let history = history.filter(|history| history.spec == Some(spec.digest));
    let running = containers.iter().find(|seen| {
        seen.container.id.service == *name
            && seen.container.service_digest == spec.digest
            && matches!(seen.container.state, ContainerState::Running { .. })
            && history.is_none_or(|history| !history.has_ended(seen.container.id.instance))
    });
    if let Some(seen) = running {
        let probes = &spec.service.probes;
        return match (&seen.probes.startup, &seen.probes.readiness) {
            (ProbeState::Unknown, _) if probes.startup.is_some() => {
                not_yet("the startup probe has not succeeded yet")
            }
            (_, ProbeState::Unknown) if probes.readiness.is_some() => {
                not_yet("the readiness probe has not answered yet")
            }
            (_, ProbeState::NotReady(message)) if probes.readiness.is_some() => {
                Health::Unwell(why(
                    ReasonCode::NotReady,
                    &format!("the readiness probe fails: {message}"),
                ))
            }
            _ => Health::Ready,
        };
    }
    let Some(history) = history else {
        return not_yet("not started yet");
    };
    match (&history.trouble, history.resume) {
        (_, Resume::Never) if history.is_done() => Health::Ready,
        (_, Resume::Never) => Health::Hopeless(end_reason(name, history)),
        (Some(trouble), _) => Health::Unwell(trouble.clone()),
        (None, Resume::At(_)) if history.was_lost() => Health::Lost(end_reason(name, history)),
        (None, Resume::At(_)) => Health::Unwell(end_reason(name, history)),
        (None, Resume::Now) => not_yet("not started yet"),
    }
}

fn end_reason(name: &ServiceName, history: &ServiceHistory) -> Reason {
    let (code, message) = match (&history.condemned, history.last_exit) {
        (Some(Condemned { cause, why }), _) => {
            let code = match cause {
                Cause::Probe => ReasonCode::ProbeFailed,
                Cause::DiskLimit => ReasonCode::DiskLimit,
                Cause::Evicted => ReasonCode::Evicted,
                Cause::Secret => ReasonCode::NotReady,
            };
            (code, format!("stopped because {why}"))
        }
        (None, Some(Exit { oom: true, .. })) => (
            ReasonCode::OomKilled,
            "killed for using more memory than its limit (mem_limit)".to_owned(),
        ),
        (
            None,
            Some(Exit {
                signal: Some(signal),
                ..
            }),
        ) => (
            ReasonCode::Signaled,
            format!("ended by {}", signal_name(signal)),
        ),
        (None, Some(Exit { code, .. })) => {
            (ReasonCode::Exited, format!("ended with exit code {code}"))
        }
        (None, None) => (
            ReasonCode::Exited,
            "its container was lost without an end of its own".to_owned(),
        ),
    };
    reason(code, Some(name.clone()), &message)
}

/// `SIGSEGV`, or `signal 35`.
pub(super) fn signal_name(signal: u8) -> String {
    nix::sys::signal::Signal::try_from(i32::from(signal))
        .map_or_else(|_| format!("signal {signal}"), |known| known.to_string())
}
