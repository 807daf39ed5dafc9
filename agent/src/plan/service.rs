//! The containers of one app: the next step on each.
//!
//! A service has at most one container, or two while a new one is started beside the one before, or the one before is kept
//! (`kept.rs`). The next step follows from what is there alone: a container that should not be is stopped if it runs and
//! removed if it does not; when none is left, one is started.

use std::collections::{BTreeMap, BTreeSet};

use foreshore_protocol::manifest::{Service, UpdateOrder};
use foreshore_protocol::release::{Release, service_digest};
use foreshore_protocol::{AppName, Digest, ServiceName};

use super::health::{Health, health, waits_for};
use super::kept;
use super::next::{Next, Wish, next_step};
use super::secret;
use super::{AppHistory, Draft, Kept, Observed, ObservedContainer, Resume, ServiceHistory, Step};
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

/// Whether a container is there that belongs to no service of `target`, or to another spec of one, and is not kept.
pub(super) fn has_stale(
    containers: &[&ObservedContainer],
    target: &Target<'_>,
    kept: &BTreeMap<ServiceName, Kept>,
) -> bool {
    containers
        .iter()
        .any(|seen| !target.matches(seen) && !kept::is_kept(kept, &seen.container))
}

/// Whether something of the release before still runs that is to be stopped, and nothing of `target` yet that may wait for
/// its update lock.
pub(super) fn is_before_start(
    containers: &[&ObservedContainer],
    target: &Target<'_>,
    kept: &BTreeMap<ServiceName, Kept>,
) -> bool {
    let (new, before): (Vec<&ObservedContainer>, Vec<_>) = containers
        .iter()
        .copied()
        .filter(|seen| matches!(seen.container.state, ContainerState::Running { .. }))
        .filter(|seen| !kept::is_kept(kept, &seen.container))
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
    if let Some(target) = target {
        // Judging the trial may have made another release current.
        kept::take_back(draft, app, history, containers, target);
    }
    let healths = target.map_or_else(BTreeMap::new, |target| {
        health(draft.observed, history, containers, target)
    });
    if let Some(target) = target {
        kept::settle(draft, app, history, containers, target, &healths);
    }
    let observed = draft.observed;
    let good = history.last_known_good.as_ref();
    let good = good.and_then(|good| observed.releases.get(&good.release));
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
                good: good.and_then(|good| good.services.get(&name).map(service_digest)),
            })
        });
        let kept = history.kept.get(&name);
        let service = history
            .services
            .entry(name.clone())
            .or_insert_with(|| ServiceHistory {
                last_instance: instance_floor,
                ..ServiceHistory::default()
            });
        let step = next_step(draft, service, &of_service, wish.as_ref(), kept);
        steps.extend(step.map(|step| (name, step)));
    }
    let needed = needed(draft, app, containers, target.is_none(), &steps);
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
    all_end: bool,
    steps: &[(ServiceName, Next<'_>)],
) -> Needed {
    let stops = || {
        steps.iter().filter_map(|(name, next)| match next {
            Next::Stop(seen) => Some((name, &seen.container.id)),
            Next::Remove(_) | Next::Start(..) | Next::Renew(..) => None,
        })
    };
    let runs =
        |seen: &ObservedContainer| matches!(seen.container.state, ContainerState::Running { .. });
    let is_stopping =
        |seen: &ObservedContainer| runs(seen) && draft.is_busy(app, &seen.container.id.service);
    // Of two containers of a service the second is not stopped before the first is removed.
    let ending = containers.iter().filter(|seen| {
        is_stopping(seen)
            || (all_end && runs(seen))
            || stops().any(|(_, id)| *id == seen.container.id)
    });
    let names: BTreeSet<ServiceName> = ending
        .filter_map(|seen| service_of(draft.observed, &seen.container, &BTreeSet::new()))
        .flat_map(|(_, service)| service.depends_on.keys().cloned())
        .collect();
    let by_all = stops().all(|(name, _)| names.contains(name))
        && !containers.iter().any(|seen| is_stopping(seen))
        && !steps
            .iter()
            .any(|(_, next)| matches!(next, Next::Remove(_)));
    Needed { names, by_all }
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
