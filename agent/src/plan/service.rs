//! The containers of one app: what became of them, whether they are well, and the next step on each.
//!
//! A service has at most one container. The next step follows from what is there alone: a container that
//! should not be is stopped if it runs and removed if it does not; when none is left, one is started.

use std::collections::{BTreeMap, BTreeSet};

use foreshore_protocol::manifest::{RestartPolicy, Service};
use foreshore_protocol::message::{EventKind, Reason, ReasonCode};
use foreshore_protocol::release::{Release, service_digest};
use foreshore_protocol::{AppName, Digest, ServiceName};

use super::history::reason;
use super::{
    AppHistory, Draft, Notice, Observed, ObservedContainer, ProbeState, Resume, ServiceHistory,
    Step, backoff,
};
use crate::runtime::{Container, ContainerId, ContainerState, Exit};

/// How a container is stopped when the release that it was started from is not known any more.
const UNKNOWN_STOP: (i32, u64) = (15, 10_000);

/// What an app's containers should be.
#[derive(Debug)]
pub(super) struct Target<'a> {
    pub(super) release: Digest,
    pub(super) services: BTreeMap<&'a ServiceName, Spec<'a>>,
}

/// One service of a [`Target`].
#[derive(Debug)]
pub(super) struct Spec<'a> {
    pub(super) digest: Digest,
    pub(super) image: Option<Digest>,
    pub(super) service: &'a Service,
}

impl<'a> Target<'a> {
    pub(super) fn new(digest: Digest, release: &'a Release) -> Self {
        let spec = |service: &'a Service| Spec {
            digest: service_digest(service),
            image: image_digest(service),
            service,
        };
        Self {
            release: digest,
            services: release
                .services
                .iter()
                .map(|(name, service)| (name, spec(service)))
                .collect(),
        }
    }

    fn matches(&self, container: &ObservedContainer) -> bool {
        self.services
            .get(&container.container.id.service)
            .is_some_and(|spec| spec.digest == container.container.service_digest)
    }

    /// The images of it that are not among `images`, as the release names them.
    pub(super) fn missing_images(&self, images: &BTreeSet<Digest>) -> Vec<String> {
        let missing: BTreeSet<&String> = self
            .services
            .values()
            .filter(|spec| spec.image.is_none_or(|digest| !images.contains(&digest)))
            .map(|spec| &spec.service.image)
            .collect();
        missing.into_iter().cloned().collect()
    }
}

/// The digest that a release pins a service's image by; `None` when it does not.
pub(super) fn image_digest(service: &Service) -> Option<Digest> {
    service.image.rsplit_once('@')?.1.parse().ok()
}

/// Whether a service does its job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Health {
    /// It does, or has done what it had to.
    Ready,
    /// Not known yet, or on its way.
    NotYet(Reason),
    /// It does not; that may pass.
    Unwell(Reason),
    /// It does not and will not.
    Hopeless(Reason),
}

/// Takes note of containers that are new, ended or vanished since the last plan.
pub(super) fn observe(
    draft: &mut Draft<'_>,
    app: &AppName,
    history: &mut AppHistory,
    containers: &[&ObservedContainer],
    target: Option<&Target<'_>>,
    instance_floor: u64,
) {
    for seen in containers {
        let id = &seen.container.id;
        let service = history
            .services
            .entry(id.service.clone())
            .or_insert_with(|| ServiceHistory {
                last_instance: instance_floor,
                ..ServiceHistory::default()
            });
        if id.instance > service.last_instance || service.spec.is_none() {
            service.last_instance = service.last_instance.max(id.instance);
            service.spec = Some(seen.container.service_digest);
            service.release = Some(seen.container.release);
        }
        let spec = target.and_then(|target| {
            let spec = target.services.get(&id.service)?;
            (spec.digest == seen.container.service_digest).then_some(spec)
        });
        match seen.container.state {
            ContainerState::Running { started_ms, .. } => {
                let newest = containers
                    .iter()
                    .map(|other| &other.container.id)
                    .filter(|other| other.service == id.service)
                    .all(|other| other.instance <= id.instance);
                if newest {
                    service.present = id.instance;
                    service.started = super::BootMs(started_ms);
                }
            }
            ContainerState::Exited(exit) if id.instance > service.ended_instance => {
                service.ended_instance = id.instance;
                service.present = 0;
                service.last_exit = Some(exit);
                if let Some(spec) = spec {
                    note_end(draft, app, id, service, spec.service.restart, Some(exit));
                }
            }
            ContainerState::Exited(_) | ContainerState::Broken => {}
        }
    }
    for (name, service) in &mut history.services {
        let there = containers.iter().any(|seen| {
            seen.container.id.service == *name && seen.container.id.instance == service.present
        });
        let busy = draft.is_busy(app, name);
        if service.present == 0 || there || busy {
            continue;
        }
        let id = ContainerId {
            app: app.clone(),
            service: name.clone(),
            instance: service.present,
        };
        service.present = 0;
        if id.instance > service.ended_instance {
            service.ended_instance = id.instance;
            service.last_exit = None;
            let policy = target
                .and_then(|target| target.services.get(name))
                .map_or(RestartPolicy::Always, |spec| spec.service.restart);
            note_end(draft, app, &id, service, policy, None);
        }
    }
}

/// A container of the current spec ended by itself (`exit`) or is not there any more: decides whether and
/// when it is started again.
fn note_end(
    draft: &mut Draft<'_>,
    app: &AppName,
    id: &ContainerId,
    service: &mut ServiceHistory,
    policy: RestartPolicy,
    exit: Option<Exit>,
) {
    let now = draft.now;
    if now.ms.since(service.started) >= backoff::STABLE_MS {
        service.failures = 0;
    }
    service.failures = service.failures.saturating_add(1);
    let again = match (policy, exit) {
        // It did not end as far as anyone knows; a job that was lost half-way is done again.
        (_, None) | (RestartPolicy::Always, Some(_)) => true,
        (RestartPolicy::OnFailure { max_retries }, Some(exit)) => {
            exit.code != 0 && max_retries.is_none_or(|max| service.failures <= max)
        }
        (RestartPolicy::No, Some(_)) => false,
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
    let (kind, message) = match exit {
        Some(Exit { oom: true, .. }) => (
            EventKind::OomKilled,
            format!("container {id} was killed for using more memory than its limit"),
        ),
        Some(Exit { code, .. }) => (
            EventKind::Exited,
            format!("container {id} ended with exit code {code}"),
        ),
        None => (EventKind::Exited, format!("container {id} is gone")),
    };
    draft.notices.push(Notice {
        kind,
        app: Some(app.clone()),
        service: Some(id.service.clone()),
        message,
    });
}

/// How well every service of `target` is. Containers that should not be there count against their service.
pub(super) fn health<'a>(
    history: &AppHistory,
    containers: &[&ObservedContainer],
    target: &Target<'a>,
) -> BTreeMap<&'a ServiceName, Health> {
    target
        .services
        .iter()
        .map(|(name, spec)| {
            let of_service: Vec<_> = containers
                .iter()
                .copied()
                .filter(|seen| seen.container.id.service == **name)
                .collect();
            (
                *name,
                service_health(name, history.services.get(*name), &of_service, spec),
            )
        })
        .collect()
}

/// Whether a container is there that belongs to no service of `target`, or to another spec of one.
pub(super) fn has_stale(containers: &[&ObservedContainer], target: &Target<'_>) -> bool {
    containers.iter().any(|seen| !target.matches(seen))
}

fn service_health(
    name: &ServiceName,
    history: Option<&ServiceHistory>,
    containers: &[&ObservedContainer],
    spec: &Spec<'_>,
) -> Health {
    let not_yet =
        |message: &str| Health::NotYet(reason(ReasonCode::NotReady, Some(name.clone()), message));
    let running = containers.iter().find(|seen| {
        seen.container.service_digest == spec.digest
            && matches!(seen.container.state, ContainerState::Running { .. })
    });
    if let Some(seen) = running {
        return match (&seen.probe, spec.service.probes.readiness.is_some()) {
            (_, false) | (ProbeState::Ready, true) => Health::Ready,
            (ProbeState::Unknown, true) => not_yet("the readiness probe has not answered yet"),
            (ProbeState::NotReady(message), true) => Health::Unwell(reason(
                ReasonCode::NotReady,
                Some(name.clone()),
                &format!("the readiness probe fails: {message}"),
            )),
        };
    }
    let Some(history) = history.filter(|history| history.spec == Some(spec.digest)) else {
        return not_yet("not started yet");
    };
    match (&history.trouble, history.last_exit, history.resume) {
        (_, Some(Exit { code: 0, .. }), Resume::Never) => Health::Ready,
        (_, exit, Resume::Never) => Health::Hopeless(exit_reason(name, exit)),
        (Some(trouble), _, _) => Health::Unwell(trouble.clone()),
        (None, exit, Resume::At(_)) => Health::Unwell(exit_reason(name, exit)),
        (None, _, Resume::Now) => not_yet("not started yet"),
    }
}

fn exit_reason(name: &ServiceName, exit: Option<Exit>) -> Reason {
    let (code, message) = match exit {
        Some(Exit { oom: true, .. }) => (
            ReasonCode::OomKilled,
            "killed for using more memory than its limit (mem_limit)".to_owned(),
        ),
        Some(Exit { code, .. }) => (ReasonCode::Exited, format!("ended with exit code {code}")),
        None => (ReasonCode::Exited, "its container is gone".to_owned()),
    };
    reason(code, Some(name.clone()), &message)
}

/// What a new trial forgives: services that had given up are started again.
pub(super) fn forgive(history: &mut AppHistory) {
    for service in history.services.values_mut() {
        let failed = service.last_exit.is_none_or(|exit| exit.code != 0);
        if service.resume == Resume::Never && failed {
            service.resume = Resume::Now;
            service.failures = 0;
        }
    }
}

/// Forgets services that no release which may still run has; the highest instance number they used.
pub(super) fn forget(
    draft: &Draft<'_>,
    app: &AppName,
    history: &mut AppHistory,
    containers: &[&ObservedContainer],
) -> u64 {
    let assigned = history.assignment.as_ref();
    let releases = [
        history.current,
        history.last_known_good.as_ref().map(|good| good.release),
        assigned.map(|assigned| assigned.release),
    ];
    let mut kept = BTreeSet::new();
    for release in releases.into_iter().flatten() {
        match draft.observed.releases.get(&release) {
            Some(release) => kept.extend(release.services.keys()),
            // Which services it has cannot be told.
            None => return 0,
        }
    }
    let there = |name: &ServiceName| {
        containers
            .iter()
            .any(|seen| seen.container.id.service == *name)
    };
    let gone = history
        .services
        .extract_if(.., |name, _| {
            !kept.contains(name) && !there(name) && !draft.is_busy(app, name)
        })
        .map(|(_, service)| service.last_instance);
    gone.max().unwrap_or(0)
}

/// The next step on every service, so that in the end only the containers of `target` are there; with
/// `None`, no container at all.
pub(super) fn advance(
    draft: &mut Draft<'_>,
    app: &AppName,
    history: &mut AppHistory,
    containers: &[&ObservedContainer],
    target: Option<&Target<'_>>,
    instance_floor: u64,
) {
    let wanted = target.into_iter().flat_map(|target| target.services.keys());
    let names: BTreeSet<ServiceName> = containers
        .iter()
        .map(|seen| seen.container.id.service.clone())
        .chain(wanted.map(|name| (*name).clone()))
        .collect();
    for name in names {
        if draft.is_busy(app, &name) {
            continue;
        }
        let of_service: Vec<_> = containers
            .iter()
            .copied()
            .filter(|seen| seen.container.id.service == name)
            .collect();
        let spec = target.and_then(|target| Some((target.release, target.services.get(&name)?)));
        let service = history
            .services
            .entry(name.clone())
            .or_insert_with(|| ServiceHistory {
                last_instance: instance_floor,
                ..ServiceHistory::default()
            });
        if let Some(step) = next_step(draft, app, &name, service, &of_service, spec) {
            draft.steps.push(step);
        }
    }
}

fn next_step(
    draft: &mut Draft<'_>,
    app: &AppName,
    name: &ServiceName,
    history: &mut ServiceHistory,
    containers: &[&ObservedContainer],
    spec: Option<(Digest, &Spec<'_>)>,
) -> Option<Step> {
    if draft.is_later(history.stuck_until) {
        return None;
    }
    let keep = containers
        .iter()
        .filter(|seen| {
            spec.is_some_and(|(_, spec)| spec.digest == seen.container.service_digest)
                && stays(draft, history, seen)
        })
        .map(|seen| seen.container.id.instance)
        .max();
    let unwanted = containers
        .iter()
        .find(|seen| Some(seen.container.id.instance) != keep);
    if let Some(seen) = unwanted {
        let id = seen.container.id.clone();
        return Some(match seen.container.state {
            ContainerState::Running { .. } => {
                let (signal, grace_ms) = stop_of(draft, seen);
                Step::Stop {
                    id,
                    signal,
                    grace_ms,
                }
            }
            ContainerState::Exited(_) | ContainerState::Broken => Step::Remove { id },
        });
    }
    let (release, spec) = spec?;
    if keep.is_some() || !may_start(draft, history, spec) {
        return None;
    }
    if spec
        .image
        .is_none_or(|image| !draft.observed.images.contains(&image))
    {
        return None;
    }
    Some(start(draft, app, name, history, release, spec.digest))
}

/// Whether a container of the right spec stays: it runs, or it ended and is not to be replaced now.
fn stays(draft: &mut Draft<'_>, history: &ServiceHistory, seen: &ObservedContainer) -> bool {
    match seen.container.state {
        ContainerState::Running { .. } => true,
        ContainerState::Broken => false,
        ContainerState::Exited(_) => match history.resume {
            Resume::Never => seen.container.id.instance == history.ended_instance,
            Resume::At(at) => draft.is_later(at),
            Resume::Now => false,
        },
    }
}

fn may_start(draft: &mut Draft<'_>, history: &ServiceHistory, spec: &Spec<'_>) -> bool {
    if history.spec != Some(spec.digest) {
        return true;
    }
    match history.resume {
        Resume::Never => false,
        Resume::At(at) => !draft.is_later(at),
        Resume::Now => true,
    }
}

fn start(
    draft: &Draft<'_>,
    app: &AppName,
    name: &ServiceName,
    history: &mut ServiceHistory,
    release: Digest,
    spec: Digest,
) -> Step {
    let instance = history.last_instance.saturating_add(1);
    if history.spec == Some(spec) {
        history.restarts = history.restarts.saturating_add(1);
        history.last_instance = instance;
    } else {
        *history = ServiceHistory {
            last_instance: instance,
            spec: Some(spec),
            ended_instance: history.ended_instance,
            ..ServiceHistory::default()
        };
    }
    history.release = Some(release);
    history.started = draft.now.ms;
    Step::Start {
        id: ContainerId {
            app: app.clone(),
            service: name.clone(),
            instance,
        },
        release,
    }
}

fn stop_of(draft: &Draft<'_>, seen: &ObservedContainer) -> (i32, u64) {
    service_of(draft.observed, &seen.container, &BTreeSet::new()).map_or(
        UNKNOWN_STOP,
        |(_, service)| {
            (
                service.stop_signal.number(),
                service.stop_grace_period.millis(),
            )
        },
    )
}

/// What a container was started as, from a release on disk that has a service of its spec; one of `first`
/// if there is one.
pub(super) fn service_of<'a>(
    observed: &'a Observed,
    container: &Container,
    first: &BTreeSet<Digest>,
) -> Option<(Digest, &'a Service)> {
    first
        .iter()
        .chain(observed.releases.keys())
        .find_map(|digest| {
            let release = observed.releases.get(digest)?;
            let service = release.services.get(&container.id.service)?;
            let same = release.app == container.id.app
                && service_digest(service) == container.service_digest;
            same.then_some((*digest, service))
        })
}
