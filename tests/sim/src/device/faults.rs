//! The faults that [`Mutation`] builds into what a device believes and plans.

use std::collections::BTreeSet;

use foreshore_agent::plan::{History, Observed, Plan, Resume, Step};
use foreshore_agent::runtime::{Container, ContainerState, Exit};
use foreshore_protocol::release::{Release, service_digest};

use crate::mutation::Mutation;
use crate::scenario::JOB;

pub(super) fn believe_jobs_done(history: &mut History, observed: &Observed) {
    for app in history.apps.values_mut() {
        let manifest = app
            .current
            .and_then(|release| observed.releases.get(&release));
        for (name, job) in manifest.iter().flat_map(|manifest| &manifest.services) {
            let there = observed
                .containers
                .iter()
                .any(|seen| seen.container.id.service == *name);
            if name.as_str() != JOB || there {
                continue;
            }
            let known = app.services.entry(name.clone()).or_default();
            known.spec = Some(service_digest(job));
            known.release = app.current;
            known.resume = Resume::Never;
            known.last_exit = Some(Exit::with_code(0));
            known.ended = true;
        }
    }
}

pub(super) fn mutate(
    plan: &mut Plan,
    observed: &Observed,
    before: &History,
    mutation: Option<Mutation>,
) {
    if mutation == Some(Mutation::StopBeforeStaged) {
        stop_what_is_replaced(plan, observed);
    }
    if mutation == Some(Mutation::StartAnother) {
        start_another(plan, observed);
    }
    if mutation != Some(Mutation::RestartUnchanged) {
        return;
    }
    for (app, history) in &plan.history.apps {
        let was = before.apps.get(app).and_then(|app| app.current);
        if was.is_none() || was == history.current {
            continue;
        }
        let touched: BTreeSet<_> = plan
            .steps
            .iter()
            .filter_map(|step| match step {
                Step::Stop { id, .. }
                | Step::Remove { id }
                | Step::Start { id, .. }
                | Step::RenewSecrets { id, .. } => Some(id.service.clone()),
                Step::Stage { .. } | Step::AbandonStaging { .. } | Step::Collect { .. } => None,
            })
            .collect();
        let others = observed
            .containers
            .iter()
            .map(|seen| &seen.container)
            .filter(|container| {
                container.id.app == *app && !touched.contains(&container.id.service)
            })
            .filter(|container| matches!(container.state, ContainerState::Running { .. }));
        plan.steps.extend(others.map(stop));
    }
}

fn start_another(plan: &mut Plan, observed: &Observed) {
    for step in &mut plan.steps {
        if let Step::Start { id, release } = step {
            let has = |manifest: &Release| {
                manifest.app == id.app && manifest.services.contains_key(&id.service)
            };
            let mut others = observed.releases.iter();
            let other = others.find(|(other, manifest)| *other != release && has(manifest));
            *release = other.map_or(*release, |(other, _)| *other);
        }
    }
}

fn stop_what_is_replaced(plan: &mut Plan, observed: &Observed) {
    let staged = plan.steps.iter().find_map(|step| match step {
        Step::Stage { app, .. } => Some(app.clone()),
        Step::Stop { .. }
        | Step::Remove { .. }
        | Step::Start { .. }
        | Step::RenewSecrets { .. }
        | Step::AbandonStaging { .. }
        | Step::Collect { .. } => None,
    });
    let runs = |container: &&Container| matches!(container.state, ContainerState::Running { .. });
    let containers = observed.containers.iter().map(|seen| &seen.container);
    let containers = containers.filter(|one| Some(&one.id.app) == staged.as_ref());
    plan.steps.extend(containers.filter(runs).map(stop));
}

fn stop(container: &Container) -> Step {
    Step::Stop {
        id: container.id.clone(),
        signal: 15,
        grace_ms: 10,
        pre_stop: Vec::new(),
    }
}
