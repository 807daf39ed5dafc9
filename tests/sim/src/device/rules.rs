//! What must hold of a device's plans, told from outside of the planner.

use std::collections::BTreeSet;

use foreshore_agent::plan::{History, Observed, Plan, ProbeState, Step, WallClock};
use foreshore_agent::runtime::{ContainerId, ContainerState};
use foreshore_protocol::manifest::Condition;
use foreshore_protocol::message::Window;
use foreshore_protocol::release::service_digest;
use foreshore_protocol::{AppName, Version};

use super::Device;

impl Device {
    /// "Unchanged services untouched": a container of a service that is the same in the release that ran and in the
    /// one that runs from now on is not stopped.
    pub(super) fn needless_stops(
        &self,
        observed: &Observed,
        before: &History,
        plan: &Plan,
    ) -> Vec<String> {
        let spec = |history: &History, id: &ContainerId| {
            let release = history.apps.get(&id.app)?.current?;
            let service = observed.releases.get(&release)?.services.get(&id.service)?;
            Some(service_digest(service))
        };
        let mut found = Vec::new();
        for step in &plan.steps {
            let Step::Stop { id, .. } = step else {
                continue;
            };
            let Some(live) = self.containers.get(id) else {
                continue;
            };
            let runs = matches!(live.container.state, ContainerState::Running { .. })
                && observed.containers.iter().any(|seen| {
                    seen.container.id == *id
                        && !matches!(seen.probes.liveness, ProbeState::NotReady(_))
                });
            let digest = Some(live.container.service_digest);
            // An old one that was let go, and wanted again after that: its end may have begun.
            let kept = plan
                .history
                .apps
                .get(&id.app)
                .and_then(|app| app.kept.get(&id.service));
            if kept.is_some_and(|kept| kept.service.instance == id.instance) {
                continue;
            }
            if runs && spec(before, id) == digest && spec(&plan.history, id) == digest {
                found.push(format!("{}: unchanged container {id} is stopped", self.id));
            }
        }
        found
    }

    /// "Poisoned never retried", from the device's own reports: after it said that it rolled back from `(since,
    /// release)`, nothing of that release is started while that is what is desired.
    pub(super) fn poisoned_starts(&self, before: &History, plan: &Plan) -> Vec<String> {
        let mut found = Vec::new();
        for step in &plan.steps {
            let Step::Start { id, release } = step else {
                continue;
            };
            let desired = self
                .disk
                .head
                .as_ref()
                .and_then(|head| head.apps.iter().find(|app| app.app == id.app));
            let good = before
                .apps
                .get(&id.app)
                .and_then(|app| app.last_known_good.as_ref());
            let told = desired.is_some_and(|app| {
                app.release == *release
                    && self
                        .gave_up
                        .contains(&(id.app.clone(), app.since, *release))
            });
            if told && good.is_none_or(|good| good.release != *release) {
                found.push(format!(
                    "{}: {id} starts a release that was given up",
                    self.id
                ));
            }
        }
        found
    }

    /// "Closed windows": nothing is switched to, and no fetching begins, while the window for it is closed or the device does
    /// not know the time.
    pub(super) fn closed_windows(
        &self,
        observed: &Observed,
        before: &History,
        plan: &Plan,
    ) -> Vec<String> {
        let is_open = |window: &Window| match &observed.wall {
            WallClock::Untrusted(_) => false,
            // Every window here is in UTC, opens at the same minutes of each hour, and is open for less than half an hour:
            // so it is open when one of these minutes is not longer ago than that.
            WallClock::Trusted(now) => {
                let minute = now / 60_000;
                let back = window.open_ms / 60_000 + 1;
                let mut ago = (0..=back.min(minute)).map(|back| minute - back);
                ago.any(|at| {
                    let meant = window
                        .cron
                        .matches_time(0, u32::try_from(at % 60).unwrap_or(60));
                    meant && *now < at * 60_000 + window.open_ms
                })
            }
        };
        let heads = self.disk.head.iter().flat_map(|head| &head.apps);
        let mut found = Vec::new();
        for head in heads {
            let assigned = (head.since, head.release);
            let trial = |history: &History| {
                let app = history.apps.get(&head.app)?;
                let trial = app.trial.as_ref()?;
                Some((trial.since, trial.release))
            };
            let current = |history: &History| history.apps.get(&head.app)?.current;
            let switched = trial(&plan.history) == Some(assigned)
                && current(before) != Some(head.release)
                && trial(before) != Some(assigned);
            if switched && !head.windows.switch.as_ref().is_none_or(is_open) {
                found.push(format!(
                    "{}: {} is switched while its window is closed",
                    self.id, head.app
                ));
            }
            let fetched = current(&plan.history) != Some(head.release)
                && plan.steps.iter().any(|step| {
                    matches!(step, Step::Stage { app, release, .. } if (app, release) == (&head.app, &head.release))
                });
            if fetched && !head.windows.fetch.as_ref().is_none_or(is_open) {
                found.push(format!(
                    "{}: {} is fetched while its download window is closed",
                    self.id, head.app
                ));
            }
        }
        found
    }

    /// An operator sent it back to what a restored backup says, under the numbers of before: what failed under these may
    /// be tried once more.
    pub fn may_try_again(&mut self) {
        self.gave_up.clear();
    }

    /// "The newest word counts": nothing begins that the newest head does not say.
    pub(super) fn untold(&self, app: &AppName, since: Version) -> Option<String> {
        let heads = self.disk.head.iter().flat_map(|head| &head.apps);
        let told = heads
            .filter(|told| told.app == *app)
            .all(|told| told.since == since);
        (!told).then(|| {
            format!(
                "{}: {app} begins in {since}, and its newest head says otherwise",
                self.id
            )
        })
    }

    /// "Jobs first": nothing that waits for a job starts before that job ended well.
    pub(super) fn early_starts(&self, observed: &Observed, plan: &Plan) -> Vec<String> {
        let mut found = Vec::new();
        for step in &plan.steps {
            let Step::Start { id, release } = step else {
                continue;
            };
            let Some(manifest) = observed.releases.get(release) else {
                continue;
            };
            let waits = manifest.services[&id.service].depends_on.iter();
            for (job, _) in waits.filter(|(_, other)| other.condition == Condition::Completed) {
                let spec = service_digest(&manifest.services[job]);
                if !self.jobs_done.contains(&(id.app.clone(), spec)) {
                    found.push(format!(
                        "{}: {id} starts before its job {job} is done",
                        self.id
                    ));
                }
            }
        }
        found
    }

    /// "LKG never collected": its manifest and images are on disk.
    pub(super) fn missing_last_known_good(&self) -> Vec<String> {
        let mut found = Vec::new();
        for (app, history) in &self.disk.history.apps {
            let Some(good) = &history.last_known_good else {
                continue;
            };
            let missing = match self.disk.releases.get(&good.release) {
                None => true,
                Some(_) => !self
                    .images_of(&BTreeSet::from([good.release]))
                    .iter()
                    .all(|image| self.disk.images.contains(image)),
            };
            if missing {
                found.push(format!(
                    "{}: the last-known-good of {app} was collected",
                    self.id
                ));
            }
        }
        found
    }
}
