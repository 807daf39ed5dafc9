//! Lints a plan: the rules that hold for every plan, whatever it was made from.
//!
//! Run by the tests, by the simulator, and by every debug build on each plan.

use std::collections::BTreeSet;
use std::fmt;

use foreshore_protocol::manifest::UpdateOrder;
use foreshore_protocol::message::Phase;
use foreshore_protocol::release::service_digest;
use foreshore_protocol::{AppName, Digest, ServiceName};

use super::service::{image_digest, service_of};
use super::{AppHistory, History, Kept, KeptUntil, Observed, ObservedContainer, Plan, Step};
use crate::runtime::{ContainerId, ContainerState};

/// A broken rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Violation {
    /// A start of something whose manifest, service or image is not there.
    UnknownService(ContainerId),
    /// Two steps on one service, or a step on one that is busy.
    TwoSteps(AppName, ServiceName),
    /// A start while another container of the service is there, unless it takes the place of one of another spec
    /// that serves until then.
    SecondInstance(ContainerId),
    /// An instance number that was used before.
    UsedInstance(ContainerId),
    /// A start of a release that failed in its assignment and was given up for another.
    Poisoned(ContainerId),
    /// A start of a service without one of its secrets.
    WithoutSecret(ContainerId),
    /// A start of a release that is not the app's current one.
    NotCurrent(ContainerId),
    /// A start of a third container of a service.
    ThirdInstance(ContainerId),
    /// A stop of a running container that is what should run.
    NeedlessStop(ContainerId),
    /// A stop of a running old container that is to be kept.
    KeptStopped(ContainerId),
    /// A start of what runs already, as an old container that is kept.
    KeptStartedAgain(ContainerId),
    /// A step on a container that does not exist.
    UnknownContainer(ContainerId),
    /// A collection that does not spare an image or release in use.
    LiveCollected(Digest),
    /// A second staging or collection at the same time.
    TwoStagings,
    /// A last-known-good was lost or exchanged without a success.
    LostLastKnownGood(AppName),
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

/// Every rule that `plan`, made from `observed` and `before`, breaks; empty for a good plan.
#[must_use]
pub fn check(observed: &Observed, before: &History, plan: &Plan) -> Vec<Violation> {
    let mut found = Vec::new();
    let mut touched: BTreeSet<_> = observed.busy.services.clone();
    let mut heavy = usize::from(observed.busy.staging.is_some() || observed.busy.collecting);
    for step in &plan.steps {
        match step {
            Step::Start { id, release } => {
                touch(&mut touched, id, &mut found);
                check_start(observed, before, plan, id, release, &mut found);
            }
            Step::Stop { id, .. } | Step::Remove { id } => {
                touch(&mut touched, id, &mut found);
                check_end(observed, plan, id, &mut found);
            }
            Step::RenewSecrets { id, .. } => {
                touch(&mut touched, id, &mut found);
                let runs = observed.containers.iter().any(|seen| {
                    seen.container.id == *id
                        && matches!(seen.container.state, ContainerState::Running { .. })
                });
                if !runs {
                    found.push(Violation::UnknownContainer(id.clone()));
                }
            }
            Step::Stage { .. } => heavy += 1,
            Step::Collect {
                keep_images,
                keep_releases,
                keep_logs: _,
            } => {
                heavy += 1;
                check_collect(observed, plan, keep_images, keep_releases, &mut found);
            }
            Step::AbandonStaging { .. } => {}
        }
    }
    if heavy > 1 {
        found.push(Violation::TwoStagings);
    }
    for (app, history) in &plan.history.apps {
        let good = |history: &AppHistory| history.last_known_good.as_ref().map(|good| good.release);
        let was = before.apps.get(app).and_then(good);
        let succeeded = before
            .apps
            .get(app)
            .and_then(|before| before.trial.as_ref())
            .map(|trial| trial.release);
        let is = good(history);
        if was.is_some() && is != was && is != succeeded && is != history.current {
            found.push(Violation::LostLastKnownGood(app.clone()));
        }
    }
    found
}

fn touch(
    touched: &mut BTreeSet<(AppName, ServiceName)>,
    id: &ContainerId,
    found: &mut Vec<Violation>,
) {
    if !touched.insert((id.app.clone(), id.service.clone())) {
        found.push(Violation::TwoSteps(id.app.clone(), id.service.clone()));
    }
}

fn check_start(
    observed: &Observed,
    before: &History,
    plan: &Plan,
    id: &ContainerId,
    release: &Digest,
    found: &mut Vec<Violation>,
) {
    let image = observed
        .releases
        .get(release)
        .filter(|manifest| manifest.app == id.app)
        .and_then(|manifest| image_digest(manifest.services.get(&id.service)?));
    if image.is_none_or(|image| !observed.images.contains(&image)) {
        found.push(Violation::UnknownService(id.clone()));
    }
    let mut siblings = observed
        .containers
        .iter()
        .map(|seen| &seen.container.id)
        .filter(|other| (&other.app, &other.service) == (&id.app, &id.service));
    let service = observed
        .releases
        .get(release)
        .and_then(|manifest| manifest.services.get(&id.service));
    let lacks = service.is_some_and(|service| {
        let mut mounts = service.secrets.iter();
        mounts.any(|mount| !observed.secrets.contains_key(&mount.source))
    });
    if lacks {
        found.push(Violation::WithoutSecret(id.clone()));
    }
    let beside = service.is_some_and(|service| {
        let digest = service_digest(service);
        service.deploy.update_config.order == UpdateOrder::StartFirst
            && of_service(observed, id).all(|seen| seen.container.service_digest != digest)
    });
    if siblings.clone().next().is_some() && !beside {
        found.push(Violation::SecondInstance(id.clone()));
    }
    if siblings.clone().count() > 1 {
        found.push(Violation::ThirdInstance(id.clone()));
    }
    let known = before.apps.get(&id.app);
    let kept = known
        .and_then(|app| app.kept.get(&id.service))
        .filter(|kept| kept.until != KeptUntil::Over);
    let same = kept.filter(|kept| kept.service.spec == service.map(service_digest));
    let still_runs = |kept: &Kept| {
        of_service(observed, id).any(|seen| {
            seen.container.id.instance == kept.service.instance
                && matches!(seen.container.state, ContainerState::Running { .. })
        })
    };
    if same.is_some_and(still_runs) {
        found.push(Violation::KeptStartedAgain(id.clone()));
    }
    let used = known
        .and_then(|app| app.services.get(&id.service))
        .map_or(0, |service| service.last_instance);
    if used >= id.instance || siblings.any(|other| other.instance >= id.instance) {
        found.push(Violation::UsedInstance(id.clone()));
    }
    let app = plan.history.apps.get(&id.app);
    if app.and_then(|app| app.current) != Some(*release) {
        found.push(Violation::NotCurrent(id.clone()));
    }
    let given_up = app
        .and_then(|app| app.assignment.as_ref())
        .is_some_and(|assignment| {
            assignment.phase == Phase::RolledBack && assignment.release == *release
        });
    if given_up {
        found.push(Violation::Poisoned(id.clone()));
    }
}

fn of_service<'a>(
    observed: &'a Observed,
    id: &'a ContainerId,
) -> impl Iterator<Item = &'a ObservedContainer> {
    observed.containers.iter().filter(|seen| {
        (&seen.container.id.app, &seen.container.id.service) == (&id.app, &id.service)
    })
}

fn check_end(observed: &Observed, plan: &Plan, id: &ContainerId, found: &mut Vec<Violation>) {
    let Some(seen) = observed
        .containers
        .iter()
        .find(|seen| seen.container.id == *id)
    else {
        return found.push(Violation::UnknownContainer(id.clone()));
    };
    let wanted = plan
        .history
        .apps
        .get(&id.app)
        .and_then(|app| {
            observed
                .releases
                .get(&app.current?)?
                .services
                .get(&id.service)
        })
        .map(service_digest);
    let twins = of_service(observed, id)
        .filter(|other| {
            Some(other.container.service_digest) == wanted
                && matches!(other.container.state, ContainerState::Running { .. })
        })
        .count();
    let condemned = plan
        .history
        .apps
        .get(&id.app)
        .and_then(|app| app.services.get(&id.service))
        .is_some_and(|service| service.has_ended(id.instance));
    let runs = matches!(seen.container.state, ContainerState::Running { .. }) && !condemned;
    let kept = plan
        .history
        .apps
        .get(&id.app)
        .and_then(|app| app.kept.get(&id.service))
        .filter(|kept| kept.service.instance == id.instance);
    match kept.map(|kept| kept.until) {
        // Its end may have begun.
        Some(KeptUntil::Over) => {}
        Some(KeptUntil::Ready | KeptUntil::At(_)) if runs => {
            found.push(Violation::KeptStopped(id.clone()));
        }
        _ if runs && wanted == Some(seen.container.service_digest) && twins == 1 => {
            found.push(Violation::NeedlessStop(id.clone()));
        }
        _ => {}
    }
}

fn check_collect(
    observed: &Observed,
    plan: &Plan,
    keep_images: &BTreeSet<Digest>,
    keep_releases: &BTreeSet<Digest>,
    found: &mut Vec<Violation>,
) {
    let mut live = BTreeSet::new();
    for app in plan.history.apps.values() {
        let good = app.last_known_good.as_ref().map(|good| good.release);
        live.extend([app.current, good].into_iter().flatten());
    }
    for seen in &observed.containers {
        let image = service_of(observed, &seen.container, &live)
            .and_then(|(_, service)| image_digest(service));
        if image.is_none_or(|image| !keep_images.contains(&image)) {
            found.push(Violation::LiveCollected(seen.container.release));
        }
    }
    for release in live {
        if !keep_releases.contains(&release) {
            found.push(Violation::LiveCollected(release));
        }
        let manifest = observed.releases.get(&release);
        let images = manifest
            .into_iter()
            .flat_map(|manifest| manifest.services.values())
            .filter_map(image_digest);
        found.extend(
            images
                .filter(|image| !keep_images.contains(image))
                .map(Violation::LiveCollected),
        );
    }
}
