//! What became of containers since the last plan: who is new, who ended and how, and what that makes of its service.

use foreshore_protocol::AppName;
use foreshore_protocol::manifest::{RestartPolicy, Service};
use foreshore_protocol::message::EventKind;
use foreshore_protocol::quantity::Bytes;

use super::health::signal_name;
use super::secret;
use super::service::Target;
use super::{
    AppHistory, Cause, Condemned, Draft, Notice, ObservedContainer, ProbeState, Resume,
    ServiceHistory, backoff,
};
use crate::runtime::{ContainerId, ContainerState, Exit};

/// signal(7).
const SIGKILL: u8 = 9;

/// Takes note of containers that are new, ended or vanished since the last plan.
pub(super) fn observe(
    draft: &mut Draft<'_>,
    app: &AppName,
    history: &mut AppHistory,
    containers: &[&ObservedContainer],
    target: Option<&Target<'_>>,
    instance_floor: u64,
) {
    let watching_since = draft.observed.watching_since;
    let mut setbacks = 0;
    for seen in containers {
        let id = &seen.container.id;
        let busy = draft.is_busy(app, &id.service);
        let service = history
            .services
            .entry(id.service.clone())
            .or_insert_with(|| ServiceHistory {
                last_instance: instance_floor,
                ..ServiceHistory::default()
            });
        if id.instance > service.last_instance || service.spec.is_none() {
            service.last_instance = service.last_instance.max(id.instance);
            service.instance = id.instance;
            service.ended = false;
            service.spec = Some(seen.container.service_digest);
            service.release = Some(seen.container.release);
        }
        let spec = target.and_then(|target| {
            let spec = target.services.get(&id.service)?;
            (spec.digest == seen.container.service_digest).then_some(spec)
        });
        let runs = matches!(seen.container.state, ContainerState::Running { .. });
        if runs && !busy && spec.is_some_and(|spec| service.spec != Some(spec.digest)) {
            // An update that was begun beside it was given up.
            *service = ServiceHistory {
                last_instance: service.last_instance,
                instance: id.instance,
                spec: Some(seen.container.service_digest),
                release: Some(seen.container.release),
                began: true,
                ..ServiceHistory::default()
            };
        }
        if id.instance != service.instance {
            // It says nothing about the one that counts.
            continue;
        }
        let runs = matches!(seen.container.state, ContainerState::Running { .. });
        if service.stopping == id.instance {
            if !runs {
                service.was_stopped(id.instance);
            } else if !busy {
                // Given up, or cut off; if it is still unwanted, that is decided anew.
                service.stopping = 0;
            }
        }
        match seen.container.state {
            ContainerState::Running { .. } if service.ended => {}
            ContainerState::Running { started_ms, .. } => {
                service.present = id.instance;
                service.started = super::BootMs(started_ms);
                service.condemned = None;
                if seen.probes.startup == ProbeState::Ready {
                    service.came_up = id.instance;
                }
                if let Some(spec) = spec
                    && let Some(why) = condemnation(draft, seen, spec.service)
                {
                    service.ended = true;
                    service.present = 0;
                    service.last_exit = None;
                    note_end(
                        draft,
                        app,
                        id,
                        service,
                        spec.service.restart,
                        End::Condemned(why),
                    );
                }
            }
            ContainerState::Exited(exit) if !service.ended => {
                // Who kills a container in the middle of its start is the agent, clearing up.
                let killed = exit.signal == Some(SIGKILL) && !exit.oom;
                let end = if killed && service.was_cut_off(watching_since) {
                    End::Gone
                } else {
                    End::Exited(exit)
                };
                service.ended = true;
                service.present = 0;
                service.last_exit = (end != End::Gone).then_some(exit);
                if let Some(spec) = spec {
                    setbacks += u32::from(end == End::Gone);
                    note_end(draft, app, id, service, spec.service.restart, end);
                }
            }
            ContainerState::Exited(exit) if service.condemned.is_some() => {
                service.last_exit = Some(exit);
            }
            ContainerState::Broken if service.present == id.instance && !busy => {
                service.ended = true;
                service.present = 0;
                service.last_exit = None;
                if let Some(spec) = spec {
                    setbacks += 1;
                    note_end(draft, app, id, service, spec.service.restart, End::Lost);
                }
            }
            ContainerState::Exited(_) | ContainerState::Broken => {}
        }
    }
    setbacks += note_lost(draft, app, history, containers, target);
    if let Some(trial) = &mut history.trial {
        trial.setbacks = trial.setbacks.saturating_add(setbacks);
    }
}

/// Takes note of containers that are not there any more, and of starts that were cut off with the agent that was at
/// them; how many of those were of `target`.
fn note_lost(
    draft: &mut Draft<'_>,
    app: &AppName,
    history: &mut AppHistory,
    containers: &[&ObservedContainer],
    target: Option<&Target<'_>>,
) -> u32 {
    let mut lost = 0;
    for (name, service) in &mut history.services {
        let there = containers.iter().any(|seen| {
            seen.container.id.service == *name && seen.container.id.instance == service.present
        });
        if draft.is_busy(app, name) {
            continue;
        }
        let spec = target.and_then(|target| target.services.get(name));
        let of_target = spec.is_some_and(|spec| service.spec == Some(spec.digest));
        let lives = containers.iter().any(|seen| {
            seen.container.id.service == *name
                && seen.container.id.instance == service.instance
                && seen.container.state != ContainerState::Broken
        });
        if service.was_cut_off(draft.observed.watching_since) && !lives {
            service.ended = true;
            service.last_exit = None;
            lost += u32::from(of_target);
        }
        if service.present == 0 || there {
            continue;
        }
        let id = ContainerId {
            app: app.clone(),
            service: name.clone(),
            instance: service.present,
        };
        service.present = 0;
        if service.stopping == id.instance {
            service.was_stopped(id.instance);
        } else if !service.ended {
            service.ended = true;
            service.last_exit = None;
            lost += u32::from(of_target);
            let policy = spec.map_or(RestartPolicy::Always, |spec| spec.service.restart);
            note_end(draft, app, &id, service, policy, End::Gone);
        }
    }
    lost
}

/// Why a running container has to end, if it has to.
pub(super) fn condemnation(
    draft: &Draft<'_>,
    seen: &ObservedContainer,
    service: &Service,
) -> Option<Condemned> {
    let id = &seen.container.id;
    if let (Some(limit), Some(usage)) = (service.layer_limit(), draft.observed.usage.get(id))
        && usage.layer > limit
    {
        let amount = match usage.layer {
            u64::MAX => "more than can be counted".to_owned(),
            bytes => format!("{} KiB", bytes >> 10),
        };
        return Some(Condemned {
            cause: Cause::DiskLimit,
            why: format!(
                "it has {amount} in its root file system, which may hold {} (storage_opt.size)",
                Bytes(limit)
            ),
        });
    }
    if let Some(victim) = draft.victim.as_ref().filter(|victim| victim.id == *id) {
        return Some(Condemned {
            cause: Cause::Evicted,
            why: victim.why.clone(),
        });
    }
    failing_probe(seen, service)
        .map(|why| Condemned {
            cause: Cause::Probe,
            why,
        })
        .or_else(|| secret::outdated(draft.observed, seen, service))
}

fn failing_probe(seen: &ObservedContainer, service: &Service) -> Option<String> {
    let probes = &service.probes;
    let says = |name: &str, probe: bool, state: &ProbeState| match state {
        ProbeState::NotReady(message) if probe => {
            Some(format!("the {name} probe fails: {message}"))
        }
        ProbeState::Unknown | ProbeState::Ready | ProbeState::NotReady(_) => None,
    };
    says("startup", probes.startup.is_some(), &seen.probes.startup)
        .or_else(|| says("liveness", probes.liveness.is_some(), &seen.probes.liveness))
}

/// How a container came to its end, or comes to it.
#[derive(Debug, Clone, PartialEq, Eq)]
enum End {
    /// By itself, or by somebody other than the agent.
    Exited(Exit),
    /// It is not there any more, or was killed with the agent that started it.
    Gone,
    /// The process that looked after it was killed, and it with it.
    Lost,
    /// It is to be stopped.
    Condemned(Condemned),
}

/// A container of the current spec came to its end: decides whether and when it is started again.
fn note_end(
    draft: &mut Draft<'_>,
    app: &AppName,
    id: &ContainerId,
    service: &mut ServiceHistory,
    policy: RestartPolicy,
    end: End,
) {
    let now = draft.now;
    if let End::Condemned(condemned) = &end
        && condemned.cause == Cause::Secret
    {
        // Not its fault, and nothing to wait for.
        service.resume = Resume::Now;
        service.condemned = Some(condemned.clone());
        let message = format!("container {id} is stopped because {}", condemned.why);
        let name = Some(id.service.clone());
        return draft.notice(EventKind::SecretRotated, app, name, message);
    }
    if now.ms.since(service.started) >= backoff::STABLE_MS {
        service.failures = 0;
    }
    service.failures = service.failures.saturating_add(1);
    let failed = match &end {
        // It did not end as far as anyone knows; a job that was lost half-way is done again.
        End::Gone | End::Lost => None,
        End::Condemned(Condemned {
            cause: Cause::Evicted,
            ..
        }) => None,
        End::Exited(exit) => Some(exit.code != 0),
        End::Condemned(_) => Some(true),
    };
    let again = match (policy, failed) {
        (_, None) | (RestartPolicy::Always, _) => true,
        (RestartPolicy::OnFailure { max_retries }, Some(failed)) => {
            failed && max_retries.is_none_or(|max| service.failures <= max)
        }
        (RestartPolicy::No, _) => false,
    };
    service.resume = if again {
        let name = format!("{app}.{}", id.service);
        Resume::At(
            now.ms
                .plus(backoff::restart_delay_ms(now.boot, &name, service.failures)),
        )
    } else {
        Resume::Never
    };
    let (kind, message) = match &end {
        End::Exited(Exit { oom: true, .. }) => (
            EventKind::OomKilled,
            format!("container {id} was killed for using more memory than its limit"),
        ),
        End::Exited(Exit {
            signal: Some(signal),
            ..
        }) => (
            EventKind::Signaled,
            format!("container {id} was ended by {}", signal_name(*signal)),
        ),
        End::Exited(Exit { code, .. }) => (
            EventKind::Exited,
            format!("container {id} ended with exit code {code}"),
        ),
        End::Gone => (EventKind::Exited, format!("container {id} is gone")),
        End::Lost => (
            EventKind::Exited,
            format!("container {id} is stopped because its supervisor was killed"),
        ),
        End::Condemned(Condemned { cause, why }) => (
            match cause {
                Cause::Probe => EventKind::ProbeFailed,
                Cause::DiskLimit => EventKind::DiskLimit,
                Cause::Evicted => EventKind::Evicted,
                Cause::Secret => EventKind::SecretRotated,
            },
            format!("container {id} is stopped because {why}"),
        ),
    };
    service.condemned = match end {
        End::Condemned(why) => Some(why),
        End::Exited(_) | End::Gone | End::Lost => None,
    };
    draft.notices.push(Notice {
        kind,
        app: Some(app.clone()),
        service: Some(id.service.clone()),
        message,
    });
}
