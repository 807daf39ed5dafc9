//! From a plan to steps under way, and back from a step that ended.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use foreshore_images::Reference;
use foreshore_killpoint as killpoint;
use foreshore_protocol::manifest::Service;
use foreshore_protocol::message::{AppStatus, EventKind, ReasonCode, ServiceState};
use foreshore_protocol::release::Release;
use foreshore_protocol::{AppName, Digest, ServiceName};
use tokio::time::Instant;

use super::{Agent, Ended, RETRY, Work};
use crate::causes::chain;
use crate::clock;
use crate::execute::{Task, execute};
use crate::link::Outgoing;
use crate::plan::{
    self, BootMs, Desired, History, Notice, Observed, ObservedContainer, Outcome, Plan, Step,
    TurnWish,
};
use crate::policy::{self, PolicyVerdict};
use crate::runtime::{Container, ContainerId, Runtime};
use crate::status::{self, ContainerLine, Published};

/// Which steps may begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum May {
    All,
    Heal,
}

/// How often an app is asked again whether it may be updated.
const LOCK_RETRY: Duration = Duration::from_secs(2);

/// How often the policy file is looked at while it keeps a release from being run, or is of no use.
const POLICY_RETRY: Duration = Duration::from_secs(10);

/// When the link is busy, what was not asked for is asked for after this.
const FETCH_RETRY: Duration = Duration::from_secs(1);

impl<R: Runtime + 'static> Agent<R> {
    /// Looks, plans, stores and begins the steps.
    pub(super) async fn turn(&mut self) {
        self.accept_secrets();
        let containers = match self.tools.runtime.list().await {
            Ok(containers) => {
                self.list_trouble = false;
                containers
            }
            Err(error) => {
                if !std::mem::replace(&mut self.list_trouble, true) {
                    tracing::error!(error = chain(&error), "containers cannot be listed");
                }
                self.wake_at = Some(Instant::now() + RETRY);
                return;
            }
        };
        self.probes.follow(
            &self.tools.runtime,
            &containers,
            &self.releases,
            &self.history,
        );
        self.disk.follow(&containers, &self.releases);
        self.look_at_disk();
        let lines = containers.iter().map(ContainerLine::from).collect();
        let observed = self.observe(containers);
        let desired = self.head.as_ref().map(Desired::from).unwrap_or_default();
        let now = clock::now(self.boot);
        let plan = plan::plan(&desired, &observed, &self.history, now);
        debug_assert_eq!(plan::check::check(&observed, &self.history, &plan), vec![]);
        self.carry_out(plan, lines, now.ms);
    }

    fn observe(&mut self, containers: Vec<Container>) -> Observed {
        Observed {
            watching_since: self.watching_since,
            containers: containers
                .into_iter()
                .map(|container| ObservedContainer {
                    probes: self.probes.states(&container.id),
                    container,
                })
                .collect(),
            releases: self.releases.clone(),
            images: self.images.clone(),
            damaged: self.tools.images.damaged(),
            update_locks: self.update_locks.observed(),
            pinned: self.pinned.clone(),
            disk: self.disk.observed(),
            usage: self.disk.usage(),
            verdicts: self.verdicts(),
            unsigned: self.unsigned(),
            secrets: self.vault.revisions(),
            turns: self.turns.granted(),
            wall: self.wall.read(clock::boot_ms()),
            zone: self.zone.read(),
            hub: self.contact,
            busy: self.busy.clone(),
        }
    }

    /// What the device's policy says of the releases on disk, with the file read again if it changed.
    fn verdicts(&mut self) -> BTreeMap<Digest, PolicyVerdict> {
        if self.policy.refresh()
            && let Err(error) = self.policy.policy()
        {
            tracing::error!(error, "the policy cannot be used; what runs keeps running");
        }
        let verdict = |release: &Release| match self.policy.policy() {
            Err(error) => Some(PolicyVerdict::Unknown(error.clone())),
            Ok(policy) => policy::allows(policy, &release.app, release)
                .err()
                .map(|denied| PolicyVerdict::Denied(denied.to_string())),
        };
        self.releases
            .iter()
            .filter_map(|(digest, release)| Some((*digest, verdict(release)?)))
            .collect()
    }

    /// Looked at anew each time: policy, releases, images and signatures all change, and it is only a matter of a
    /// few files where a policy asks for it.
    fn unsigned(&self) -> BTreeMap<Digest, BTreeSet<Digest>> {
        // While it cannot be used no release is tried.
        let Ok(policy) = self.policy.policy() else {
            return BTreeMap::new();
        };
        let is_unsigned = |app: &AppName, image: &str| {
            let reference = Reference::parse(image).ok()?;
            let digest = reference.digest()?;
            let demands = policy.demands(Some(app), &reference.name());
            let lacks = !demands.is_empty() && !self.tools.images.is_signed(&digest, &demands);
            lacks.then_some(digest)
        };
        let of = |(digest, release): (&Digest, &Release)| {
            let images = release.services.values().map(|service| &service.image);
            let unsigned: BTreeSet<Digest> = images
                .filter_map(|image| is_unsigned(&release.app, image))
                .collect();
            (!unsigned.is_empty()).then_some((*digest, unsigned))
        };
        self.releases.iter().filter_map(of).collect()
    }

    fn settle_update_locks(&mut self, wanted: &BTreeSet<AppName>) {
        if self.update_locks.settle(wanted) {
            self.wake_at = Some(Instant::now());
        } else if self.update_locks.is_refused() {
            self.wake_by(Instant::now() + LOCK_RETRY);
        }
    }

    pub(super) fn wake_by(&mut self, at: Instant) {
        self.wake_at = Some(self.wake_at.map_or(at, |earlier| earlier.min(at)));
    }

    fn carry_out(&mut self, plan: Plan, containers: Vec<ContainerLine>, now: BootMs) {
        self.wake_at = plan
            .wake_at
            .map(|at| Instant::now() + Duration::from_millis(at.since(now)));
        self.history = plan.history;
        let mut stored = self.memory.state.borrow_mut().remember(&self.history);
        if self.make_room(&stored) {
            stored = self.memory.state.borrow_mut().remember(&self.history);
        }
        killpoint::reached("plan", "stored");
        let may = if self.note_disk(stored) {
            self.stored.clone_from(&self.history);
            May::All
        } else {
            self.wake_by(Instant::now() + RETRY);
            self.undecide_turns(&plan.turns);
            May::Heal
        };
        self.turns
            .follow(&plan.turns, &self.history, Instant::now());
        if self.disk_trouble.is_some() {
            // Also when nobody has anything to write: that it is well again is noticed by trying.
            self.wake_by(Instant::now() + RETRY);
        }
        for Notice {
            kind,
            app,
            service,
            message,
        } in plan.notices
        {
            self.event(kind, app, service, message);
        }
        self.fetch(plan.fetch);
        let is_denied = |status: &AppStatus| {
            let reason = status.reason.as_ref();
            reason.is_some_and(|reason| reason.code == ReasonCode::PolicyDenied)
        };
        if plan.status.iter().any(is_denied) {
            self.wake_by(Instant::now() + POLICY_RETRY);
        }
        self.settle_update_locks(&plan.update_locks);
        self.tell_status(plan.status, containers);
        for step in plan.steps {
            if may == May::All || self.is_healing(&step) {
                self.begin(step);
            }
        }
    }

    /// What was decided and is not on disk has not begun, and a turn may be over before it is: so it is decided again.
    fn undecide_turns(&mut self, turns: &BTreeMap<AppName, TurnWish>) {
        for app in turns.keys() {
            let Some(history) = self.history.apps.get_mut(app) else {
                continue;
            };
            let stored = self.stored.apps.get(app).cloned().unwrap_or_default();
            if history.current == stored.current {
                continue;
            }
            history.current = stored.current;
            history.trial = stored.trial;
            history.assignment = stored.assignment;
        }
    }

    /// Whether a step rests on no decision that is not on disk yet: a full disk must not keep a service down.
    fn is_healing(&self, step: &Step) -> bool {
        let app = match step {
            Step::Stage { .. } => return false,
            Step::AbandonStaging { .. } | Step::Collect { .. } => return true,
            Step::Stop { id, .. }
            | Step::Remove { id }
            | Step::Start { id, .. }
            | Step::RenewSecrets { id, .. } => &id.app,
        };
        let decided = |history: &History| {
            history.apps.get(app).map(|app| {
                (
                    app.current,
                    app.trial.as_ref().map(|trial| (trial.since, trial.release)),
                    app.poisoned.clone(),
                )
            })
        };
        decided(&self.stored) == decided(&self.history)
    }

    fn begin(&mut self, step: Step) {
        tracing::debug!(?step, "begin");
        let service = |id: &ContainerId| Work::Service(id.app.clone(), id.service.clone());
        let (work, task) = match step {
            Step::Stage {
                app,
                release,
                images,
            } => {
                let manifest = self.releases.get(&release);
                let task = Task::Stage {
                    app,
                    release,
                    images,
                    logins: manifest.map_or_else(Vec::new, |manifest| self.vault.logins(manifest)),
                };
                (Work::Staging(release), task)
            }
            Step::AbandonStaging { release } => return self.abandon_staging(release),
            Step::Stop {
                id,
                signal,
                grace_ms,
                pre_stop,
            } => {
                let task = Task::Stop {
                    id: id.clone(),
                    signal,
                    grace: Duration::from_millis(grace_ms),
                    pre_stop,
                };
                (service(&id), task)
            }
            Step::Remove { id } => (service(&id), Task::Remove { id }),
            Step::Start { id, release } => {
                let wanted = self.service_in(&release, &id.service);
                let task = Task::Start {
                    release,
                    secrets: self.vault.values(&wanted),
                    service: Box::new(wanted),
                    id: id.clone(),
                };
                (service(&id), task)
            }
            Step::RenewSecrets {
                id,
                release,
                signals,
            } => {
                let wanted = self.service_in(&release, &id.service);
                let task = Task::RenewSecrets {
                    secrets: self.vault.values(&wanted),
                    service: Box::new(wanted),
                    signals,
                    id: id.clone(),
                };
                (service(&id), task)
            }
            Step::Collect {
                keep_images,
                keep_releases,
                keep_logs,
            } => {
                self.collect_releases(&keep_releases);
                let task = Task::Collect {
                    keep_images,
                    keep_logs,
                };
                (Work::Collecting, task)
            }
        };
        match &work {
            Work::Service(app, service) => {
                self.busy.services.insert((app.clone(), service.clone()));
            }
            Work::Staging(release) => self.busy.staging = Some(*release),
            Work::Collecting => self.busy.collecting = true,
        }
        let tools = self.tools.clone();
        let handle = self.tasks.spawn_local({
            let work = work.clone();
            async move {
                let outcome = execute(&tools, task).await;
                Ended { work, outcome }
            }
        });
        if let Work::Staging(release) = work {
            self.staging = Some((release, handle));
        }
    }

    fn service_in(&self, release: &Digest, name: &ServiceName) -> Service {
        let service = self
            .releases
            .get(release)
            .and_then(|release| release.services.get(name));
        service
            .cloned()
            .expect("a plan names services of releases on disk only")
    }

    /// The child is killed when its task is dropped.
    fn abandon_staging(&mut self, release: Digest) {
        if let Some((_, handle)) = self.staging.take_if(|(staging, _)| *staging == release) {
            handle.abort();
        }
        self.busy.staging = None;
        self.wake_at = Some(Instant::now());
    }

    fn collect_releases(&mut self, keep: &BTreeSet<Digest>) {
        let removed = self
            .memory
            .state
            .borrow()
            .remove_releases(self.releases.keys(), keep);
        if self.note_disk(removed) {
            self.releases.retain(|release, _| keep.contains(release));
        }
    }

    fn fetch(&mut self, wanted: BTreeSet<Digest>) {
        for release in self.fetching.difference(&wanted) {
            let _harmless_if_lost = self.uplink.send(Outgoing::Fetched(*release));
        }
        self.fetching.retain(|release| wanted.contains(release));
        for release in wanted {
            if self.fetching.contains(&release) {
                continue;
            }
            if !self.uplink.send(Outgoing::Fetch(release)) {
                // The link is busy, or there is none: asked again soon, or when there is one.
                if self.connected_at.is_some() {
                    self.wake_by(Instant::now() + FETCH_RETRY);
                }
                break;
            }
            self.fetching.insert(release);
        }
    }

    fn tell_status(&mut self, status: Vec<AppStatus>, containers: Vec<ContainerLine>) {
        let version = self.head.as_ref().map(|head| head.version);
        let before = self.said.as_ref().map_or(&[][..], |said| &said.apps);
        for (app, service, ready) in readiness_changes(before, &status) {
            let (kind, word) = if ready {
                (EventKind::Ready, "is ready")
            } else {
                (EventKind::NotReady, "is not ready any more")
            };
            let message = format!("service {service} of app {app} {word}");
            self.event(kind, Some(app), Some(service), message);
        }
        let said = Published {
            version,
            apps: status.clone(),
            containers,
        };
        if self.said.as_ref() != Some(&said) {
            status::publish(&self.config.paths.run, &said);
            self.said = Some(said);
        }
        self.uplink.set_status(version, status);
    }

    pub(super) fn handle_end(&mut self, ended: &Ended) {
        match &ended.work {
            Work::Service(app, service) => {
                self.busy.services.remove(&(app.clone(), service.clone()));
            }
            Work::Staging(release) => {
                if self.busy.staging == Some(*release) {
                    self.busy.staging = None;
                    self.staging = None;
                }
                self.look_at_images();
            }
            Work::Collecting => {
                self.busy.collecting = false;
                self.look_at_images();
            }
        }
        self.tell(&ended.outcome);
        self.record(&ended.outcome);
        killpoint::reached("outcome", "recorded");
    }

    pub(super) fn record(&mut self, outcome: &Outcome) {
        self.history.record(outcome, clock::now(self.boot));
    }

    /// Logs an outcome and makes it an event.
    fn tell(&mut self, outcome: &Outcome) {
        let of = |id: &ContainerId| (Some(id.app.clone()), Some(id.service.clone()));
        match outcome {
            Outcome::Staged { release } => {
                let message = format!("all images of release {} are here", release.short());
                self.event(EventKind::ImageStaged, None, None, message);
            }
            Outcome::StagingFailed {
                release, reason, ..
            } => {
                let message = format!("release {}: {}", release.short(), reason.message);
                self.event(EventKind::StagingFailed, None, None, message);
            }
            Outcome::Started { id } => {
                let (app, service) = of(id);
                self.event(
                    EventKind::Started,
                    app,
                    service,
                    format!("container {id} started"),
                );
            }
            Outcome::StartFailed { id, message, .. } => {
                let (app, service) = of(id);
                let message = format!("container {id} did not start: {message}");
                self.event(EventKind::Exited, app, service, message);
            }
            Outcome::Removed { id } => {
                let (app, service) = of(id);
                self.event(
                    EventKind::Removed,
                    app,
                    service,
                    format!("container {id} removed"),
                );
            }
            Outcome::Stuck { id, message } => {
                tracing::error!(container = %id, message, "a container could not be stopped, removed or given its secrets");
            }
            Outcome::SecretsRenewed { id } => {
                let (app, service) = of(id);
                let message = format!("container {id} has the newest values of its secrets");
                self.event(EventKind::SecretRotated, app, service, message);
            }
            Outcome::Stopped { .. } | Outcome::Collected | Outcome::BadRelease { .. } => {}
        }
    }

    pub(super) fn look_at_images(&mut self) {
        match self.tools.images.list() {
            Ok(images) => self.images = images.into_iter().map(|image| image.digest).collect(),
            Err(error) => tracing::error!(error = chain(&error), "images cannot be listed"),
        }
        match self.tools.images.pinned() {
            Ok(pinned) => self.pinned = pinned,
            Err(error) => tracing::error!(error = chain(&error), "pins cannot be listed"),
        }
    }
}

/// Services that became ready or ceased to be.
fn readiness_changes(
    before: &[AppStatus],
    after: &[AppStatus],
) -> Vec<(AppName, ServiceName, bool)> {
    let ready: BTreeMap<(&AppName, &ServiceName), bool> = before
        .iter()
        .flat_map(|app| {
            app.services
                .iter()
                .map(|service| ((&app.app, &service.service), service.ready))
        })
        .collect();
    after
        .iter()
        .flat_map(|app| app.services.iter().map(move |service| (&app.app, service)))
        .filter(|(app, service)| {
            let was = ready.get(&(*app, &service.service)).copied();
            // A service that waits for its first start was not ready before either: its spec is a new one.
            was.unwrap_or(false) != service.ready
                && (service.ready || service.state != ServiceState::Waiting)
        })
        .map(|(app, service)| (app.clone(), service.service.clone(), service.ready))
        .collect()
}
