//! The containers of one app: the next step on each.
//!
//! A service has at most one container, or two while a new one is started beside the one before. The next step
//! follows from what is there alone: a container that should not be is stopped if it runs and removed if it does
//! not; when none is left, one is started.

use std::collections::{BTreeMap, BTreeSet};

use foreshore_protocol::manifest::{Service, UpdateOrder};
use foreshore_protocol::release::{Release, service_digest};
use foreshore_protocol::{AppName, Digest, ServiceName};

use super::health::{Health, health, waits_for};
use super::secret;
use super::{AppHistory, Cause, Draft, Observed, ObservedContainer, Resume, ServiceHistory, Step};
use crate::runtime::{Container, ContainerId, ContainerState};

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

/// Whether a container is there that belongs to no service of `target`, or to another spec of one.
pub(super) fn has_stale(containers: &[&ObservedContainer], target: &Target<'_>) -> bool {
    containers.iter().any(|seen| !target.matches(seen))
}

/// Whether something of the release before still runs, and nothing of `target` yet that may wait for its update lock.
pub(super) fn is_before_start(containers: &[&ObservedContainer], target: &Target<'_>) -> bool {
    let (new, before): (Vec<&ObservedContainer>, Vec<_>) = containers
        .iter()
        .copied()
        .filter(|seen| matches!(seen.container.state, ContainerState::Running { .. }))
        .partition(|seen| target.matches(seen));
    let locks = |seen: &&ObservedContainer| {
        let spec = target.services.get(&seen.container.id.service);
        spec.is_some_and(|spec| spec.service.update_lock)
    };
    !before.is_empty() && !new.iter().any(locks)
}

/// What a switch to `release` makes of services that had ended for good: those that failed get another chance, and
/// those that had done their job do it again, once for each release. What runs runs on.
pub(super) fn forgive(history: &mut AppHistory, release: Digest) {
    for service in history.services.values_mut() {
        if service.resume == Resume::Never
            && (!service.is_done() || service.release != Some(release))
        {
            service.resume = Resume::Now;
            service.failures = 0;
            service.began = false;
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
/// `None`, no container at all. Services start after those they depend on, and stop before them.
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
    let healths = target.map_or_else(BTreeMap::new, |target| {
        health(draft.observed, history, containers, target)
    });
    let on_trial = history.trial.is_some();
    let mut steps = Vec::new();
    for name in names {
        if draft.is_busy(app, &name) {
            continue;
        }
        let of_service: Vec<_> = containers
            .iter()
            .copied()
            .filter(|seen| seen.container.id.service == name)
            .collect();
        let wish = target.and_then(|target| {
            let spec = target.services.get(&name)?;
            Some(Wish {
                release: target.release,
                spec,
                ready: healths.get(&name) == Some(&Health::Ready),
                waits: waits_for(history, &healths, target, &name).is_some()
                    || secret::missing(draft.observed, &name, spec.service).is_some(),
                beside: on_trial
                    && spec.service.deploy.update_config.order == UpdateOrder::StartFirst,
            })
        });
        let service = history
            .services
            .entry(name.clone())
            .or_insert_with(|| ServiceHistory {
                last_instance: instance_floor,
                ..ServiceHistory::default()
            });
        let step = next_step(draft, service, &of_service, wish.as_ref());
        steps.extend(step.map(|step| (name, step)));
    }
    let needed = needed(draft, app, containers, &steps);
    let may_stop = |name: &ServiceName| !needed.names.contains(name) || needed.by_all;
    for (name, next) in steps {
        match next {
            Next::Remove(id) => {
                // A broken one may come to life, and to its end, before it is gone.
                let service = history.services.entry(name).or_default();
                service.was_stopped(id.instance);
                draft.steps.push(Step::Remove { id });
            }
            Next::Renew(id, release, signals) => draft.steps.push(Step::RenewSecrets {
                id,
                release,
                signals,
            }),
            Next::Stop(seen) if may_stop(&name) => {
                let service = history.services.entry(name).or_default();
                service.stopping = seen.container.id.instance;
                draft.steps.push(stop(draft, seen));
            }
            Next::Start(release, spec) if !needed.names.contains(&name) => {
                let service = history.services.entry(name.clone()).or_default();
                let step = start(draft, app, &name, service, release, spec);
                draft.steps.push(step);
            }
            Next::Stop(_) | Next::Start(..) => {}
        }
    }
}

/// What comes next for one service.
#[derive(Debug)]
enum Next<'a> {
    Remove(ContainerId),
    Stop(&'a ObservedContainer),
    /// Of this release and spec.
    Start(Digest, Digest),
    /// With a service of this release, and these signals.
    Renew(ContainerId, Digest, BTreeSet<i32>),
}

/// Services that containers depend on which are on their way out.
#[derive(Debug)]
struct Needed {
    names: BTreeSet<ServiceName>,
    /// Containers of different releases may depend on each other in a circle: nobody can go first.
    by_all: bool,
}

/// What must wait with a stop or start until containers that depend on it have ended: so a migration never runs
/// beside the release before of what waits for it.
fn needed(
    draft: &Draft<'_>,
    app: &AppName,
    containers: &[&ObservedContainer],
    steps: &[(ServiceName, Next<'_>)],
) -> Needed {
    let stops = || {
        steps.iter().filter_map(|(name, next)| match next {
            Next::Stop(seen) => Some((name, &seen.container.id)),
            Next::Remove(_) | Next::Start(..) | Next::Renew(..) => None,
        })
    };
    let is_stopping = |seen: &ObservedContainer| {
        matches!(seen.container.state, ContainerState::Running { .. })
            && draft.is_busy(app, &seen.container.id.service)
    };
    let ending = containers
        .iter()
        .filter(|seen| is_stopping(seen) || stops().any(|(_, id)| *id == seen.container.id));
    let names: BTreeSet<ServiceName> = ending
        .filter_map(|seen| service_of(draft.observed, &seen.container, &BTreeSet::new()))
        .flat_map(|(_, service)| service.depends_on.keys().cloned())
        .collect();
    let by_all = stops().all(|(name, _)| names.contains(name))
        && !containers.iter().any(|seen| is_stopping(seen));
    Needed { names, by_all }
}

/// What a service should be.
#[derive(Debug)]
struct Wish<'a> {
    release: Digest,
    spec: &'a Spec<'a>,
    ready: bool,
    /// For what it depends on, or for a secret.
    waits: bool,
    /// Whether its new container is started beside the one before.
    beside: bool,
}

fn next_step<'a>(
    draft: &mut Draft<'_>,
    history: &ServiceHistory,
    containers: &[&'a ObservedContainer],
    wish: Option<&Wish<'_>>,
) -> Option<Next<'a>> {
    if draft.is_later(history.stuck_until) {
        return None;
    }
    let keep = containers
        .iter()
        .filter(|seen| {
            wish.is_some_and(|wish| {
                wish.spec.digest == seen.container.service_digest
                    && stays(draft, history, seen, wish.spec.service)
            })
        })
        .map(|seen| seen.container.id.instance)
        .max();
    let unwanted = containers
        .iter()
        .copied()
        .filter(|seen| Some(seen.container.id.instance) != keep);
    let (running, ended): (Vec<&'a ObservedContainer>, Vec<_>) =
        unwanted.partition(|seen| matches!(seen.container.state, ContainerState::Running { .. }));
    if let Some(seen) = ended.first() {
        return Some(Next::Remove(seen.container.id.clone()));
    }
    // The one before serves until the new one is ready.
    let is_before = |wish: &Wish<'_>, seen: &ObservedContainer| {
        wish.spec.digest != seen.container.service_digest
    };
    let stays_beside = wish.is_some_and(|wish| {
        wish.beside && !wish.ready && running.iter().all(|seen| is_before(wish, seen))
    });
    if let Some(seen) = running.first().filter(|_| !stays_beside) {
        return Some(Next::Stop(seen));
    }
    let wish = wish?;
    let kept = containers.iter().find(|seen| {
        Some(seen.container.id.instance) == keep
            && matches!(seen.container.state, ContainerState::Running { .. })
    });
    if let Some(seen) = kept
        && let Some(signals) = secret::renewal(draft.observed, seen, wish.spec.service)
    {
        let id = seen.container.id.clone();
        return Some(Next::Renew(id, wish.release, signals));
    }
    let here = |image| draft.observed.images.contains(&image);
    if keep.is_some() || wish.waits || !wish.spec.image.is_some_and(here) {
        return None;
    }
    may_start(draft, history, wish.spec).then_some(Next::Start(wish.release, wish.spec.digest))
}

/// Whether a container of the right spec stays: it runs and is well, or it ended and is not to be replaced now.
fn stays(
    draft: &mut Draft<'_>,
    history: &ServiceHistory,
    seen: &ObservedContainer,
    service: &Service,
) -> bool {
    // What has ended may give its writable layer back.
    let gives = draft.observed.disk.low || is_too_large(history);
    if gives
        && !service.read_only
        && !matches!(seen.container.state, ContainerState::Running { .. })
    {
        return false;
    }
    let instance = seen.container.id.instance;
    match seen.container.state {
        ContainerState::Running { .. } => !history.has_ended(instance),
        ContainerState::Broken => false,
        ContainerState::Exited(_) => match history.resume {
            Resume::Never => instance == history.instance,
            Resume::At(at) => draft.is_later(at),
            Resume::Now => false,
        },
    }
}

fn is_too_large(history: &ServiceHistory) -> bool {
    let cause = history.condemned.as_ref().map(|condemned| condemned.cause);
    matches!(cause, Some(Cause::DiskLimit | Cause::Evicted))
}

fn is_evicted(history: &ServiceHistory) -> bool {
    let cause = history.condemned.as_ref().map(|condemned| condemned.cause);
    cause == Some(Cause::Evicted)
}

fn may_start(draft: &mut Draft<'_>, history: &ServiceHistory, spec: &Spec<'_>) -> bool {
    if history.spec != Some(spec.digest) {
        return true;
    }
    if is_evicted(history) && draft.observed.disk.low {
        // Planned again when that changes.
        return false;
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
        history.restarts = history
            .restarts
            .saturating_add(u32::from(history.release == Some(release)));
    } else {
        *history = ServiceHistory {
            spec: Some(spec),
            ..ServiceHistory::default()
        };
    }
    history.last_instance = instance;
    history.instance = instance;
    history.ended = false;
    history.release = Some(release);
    history.started = draft.now.ms;
    history.began = true;
    Step::Start {
        id: ContainerId {
            app: app.clone(),
            service: name.clone(),
            instance,
        },
        release,
    }
}

fn stop(draft: &Draft<'_>, seen: &ObservedContainer) -> Step {
    let id = seen.container.id.clone();
    match service_of(draft.observed, &seen.container, &BTreeSet::new()) {
        Some((_, service)) => Step::Stop {
            id,
            signal: service.stop_signal.number(),
            grace_ms: service.stop_grace_period.millis(),
            pre_stop: service
                .pre_stop
                .iter()
                .map(|hook| hook.command.clone())
                .collect(),
        },
        None => Step::Stop {
            id,
            signal: UNKNOWN_STOP.0,
            grace_ms: UNKNOWN_STOP.1,
            pre_stop: Vec::new(),
        },
    }
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
