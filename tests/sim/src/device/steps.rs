//! What the steps of a plan do to a simulated device, and what comes of them.

use std::collections::{BTreeMap, BTreeSet};

use foreshore_agent::plan::{Outcome, Step};
use foreshore_agent::runtime::{Container, ContainerId, ContainerState, Exit};
use foreshore_protocol::Digest;
use foreshore_protocol::message::{Reason, ReasonCode};
use foreshore_protocol::release::service_digest;

use super::{Asks, Device, Live, Running};
use crate::mutation::Mutation;
use crate::random::Random;
use crate::scenario::{Fate, JOB, MINUTE, Ms, SECOND, Scenario};

impl Device {
    pub(super) fn begin(&mut self, step: Step, random: &mut Random, asks: &mut Asks) {
        let takes = match &step {
            Step::AbandonStaging { .. } => {
                self.running
                    .retain(|running| !matches!(running.step, Step::Stage { .. }));
                return;
            }
            Step::Stage { .. } => random.between(SECOND, 5 * MINUTE),
            Step::Stop { .. } => random.between(50, 10 * SECOND),
            Step::Start { .. } => random.between(20, 2 * SECOND),
            Step::Remove { .. } | Step::RenewSecrets { .. } | Step::Collect { .. } => {
                random.between(10, SECOND)
            }
        };
        self.next_token += 1;
        self.running.push(Running {
            token: self.next_token,
            step,
        });
        asks.begun.push((takes, self.next_token));
    }

    /// A step has had its time: it happens. True if it was still wanted.
    pub fn finish(
        &mut self,
        token: u64,
        now: Ms,
        scenario: &Scenario,
        registry: bool,
        random: &mut Random,
        mutation: Option<Mutation>,
    ) -> (bool, Vec<String>) {
        let Some(index) = self
            .running
            .iter()
            .position(|running| running.token == token)
        else {
            return (false, Vec::new());
        };
        let step = self.running.remove(index).step;
        let mut violations = Vec::new();
        if let Some(outcome) = self.perform(
            &step,
            now,
            scenario,
            registry,
            random,
            mutation,
            &mut violations,
        ) {
            self.outcomes.push(outcome);
        }
        (true, violations)
    }

    #[expect(clippy::too_many_arguments, reason = "the whole world acts here")]
    pub(super) fn perform(
        &mut self,
        step: &Step,
        now: Ms,
        scenario: &Scenario,
        registry: bool,
        random: &mut Random,
        mutation: Option<Mutation>,
        violations: &mut Vec<String>,
    ) -> Option<Outcome> {
        match step {
            Step::AbandonStaging { .. } => None,
            Step::Stage {
                release, images, ..
            } => Some(self.stage(*release, images, scenario, registry, random)),
            Step::RenewSecrets { id, .. } => Some(Outcome::SecretsRenewed { id: id.clone() }),
            Step::Stop { id, .. } => {
                if let Some(live) = self.containers.get_mut(id)
                    && matches!(live.container.state, ContainerState::Running { .. })
                {
                    live.container.state = ContainerState::Exited(Exit {
                        code: 143,
                        oom: false,
                        signal: Some(15),
                    });
                }
                Some(Outcome::Stopped { id: id.clone() })
            }
            Step::Remove { id } => {
                self.containers.remove(id);
                Some(Outcome::Removed { id: id.clone() })
            }
            Step::Start { id, release } => Some(self.start(id, release, now, scenario, random)),
            Step::Collect {
                keep_images,
                keep_releases,
                keep_logs: _,
            } => {
                let (mut images, mut releases) = (keep_images.clone(), keep_releases.clone());
                if mutation == Some(Mutation::CollectLastKnownGood) {
                    let current: BTreeSet<_> = self
                        .disk
                        .history
                        .apps
                        .values()
                        .filter_map(|app| app.current)
                        .collect();
                    releases.retain(|release| current.contains(release));
                    images.clear();
                    images.extend(self.images_of(&releases));
                }
                self.disk.images.retain(|image| images.contains(image));
                self.disk
                    .releases
                    .retain(|release, _| releases.contains(release));
                violations.extend(self.missing_last_known_good());
                Some(Outcome::Collected)
            }
        }
    }

    pub(super) fn images_of(&self, releases: &BTreeSet<Digest>) -> Vec<Digest> {
        let manifests = releases
            .iter()
            .filter_map(|release| self.disk.releases.get(release));
        manifests
            .flat_map(|manifest| manifest.services.values())
            .filter_map(|one| image_digest(&one.image))
            .collect()
    }

    fn stage(
        &mut self,
        release: Digest,
        images: &[String],
        scenario: &Scenario,
        registry: bool,
        random: &mut Random,
    ) -> Outcome {
        let failed = |code, message: &str| Outcome::StagingFailed {
            release,
            reason: Reason {
                code,
                service: None,
                message: message.to_owned(),
            },
            logins: BTreeMap::new(),
        };
        if !registry {
            return failed(
                ReasonCode::RegistryUnreachable,
                "the registry does not answer",
            );
        }
        if random.chance(3) {
            return failed(ReasonCode::DiskFull, "no space left on the device");
        }
        for image in images.iter().filter_map(|image| image_digest(image)) {
            if scenario.fate(&image, self.number) == Fate::NoPlatform {
                return failed(
                    ReasonCode::NoMatchingPlatform,
                    "the image has no variant for this device",
                );
            }
            self.disk.images.insert(image);
        }
        Outcome::Staged { release }
    }

    fn start(
        &mut self,
        id: &ContainerId,
        release: &Digest,
        now: Ms,
        scenario: &Scenario,
        random: &mut Random,
    ) -> Outcome {
        let failed = |message: &str, refused| Outcome::StartFailed {
            id: id.clone(),
            code: ReasonCode::StartFailed,
            message: message.to_owned(),
            refused,
        };
        let service = self
            .disk
            .releases
            .get(release)
            .and_then(|manifest| manifest.services.get(&id.service));
        let Some(service) = service else {
            return failed("no such service", false);
        };
        let Some(image) =
            image_digest(&service.image).filter(|image| self.disk.images.contains(image))
        else {
            return failed("the image is not there", false);
        };
        if random.chance(1) {
            return failed("the machine was too busy", false);
        }
        let ready = now + random.between(100, 10 * SECOND);
        let soon = now + random.between(10, 20 * SECOND);
        let is_job = id.service.as_str() == JOB;
        let (ready_at, ends_at, hangs_at) = match scenario.fate(&image, self.number) {
            Fate::Refused => return failed("there is no such command in the image", true),
            _ if is_job => (None, Some(soon), None),
            Fate::Good | Fate::NoPlatform => (Some(ready), None, None),
            Fate::NeverReady => (None, None, None),
            Fate::Exits => (Some(ready), Some(soon), None),
            Fate::Hangs => (Some(ready), None, Some(ready + soon - now)),
        };
        let container = Container {
            id: id.clone(),
            release: *release,
            service_digest: service_digest(service),
            secrets: BTreeMap::new(),
            state: ContainerState::Running {
                pid: 1,
                started_ms: self.now(now).ms.0,
            },
        };
        self.containers.insert(
            id.clone(),
            Live {
                container,
                ready_at,
                ends_at,
                ends_with: i32::from(!is_job),
                hangs_at,
            },
        );
        Outcome::Started { id: id.clone() }
    }
}

fn image_digest(image: &str) -> Option<Digest> {
    image.rsplit_once('@')?.1.parse().ok()
}
