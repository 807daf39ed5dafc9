//! What a seed makes of a run: how many devices and apps, which releases and how they behave, how bad the network
//! is, and what operators and fate do when.

use std::collections::BTreeMap;

use foreshore_hub::rollout::analysis::{Question, Verdict};
use foreshore_hub::rollout::steps::Requirements;
use foreshore_hub::rollout::{Policy, UnixMs};
use foreshore_protocol::id::Labels;
use foreshore_protocol::manifest::{
    Canary, FailureBudget, OnFailure, Pace, Tail, WaveSpec, WaveTarget,
};
use foreshore_protocol::release::Release;
use foreshore_protocol::{AppName, DeviceId, Digest, manifest};

mod draws;

use crate::random::{Random, hash};

/// Milliseconds of virtual time since the start of the run.
pub type Ms = u64;

/// A second.
pub const SECOND: Ms = 1_000;
/// A minute.
pub const MINUTE: Ms = 60 * SECOND;
/// An hour.
pub const HOUR: Ms = 60 * MINUTE;

/// How a container of an image behaves on a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// Becomes ready soon and stays so.
    Good,
    /// Runs, but its probe never succeeds.
    NeverReady,
    /// Ends by itself soon after every start.
    Exits,
    /// Becomes ready, and soon its liveness probe fails.
    Hangs,
    /// Cannot be started with this image, ever.
    Refused,
    /// Its image has no variant for the device.
    NoPlatform,
}

/// What an operator does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Applies the release of that number.
    Apply(usize),
    /// Pauses the newest rollout.
    Pause,
    /// Resumes it.
    Resume,
    /// Aborts it.
    Abort,
    /// Goes back to the release before it.
    Undo,
    /// Lets the wave go by that waits for it.
    Approve,
    /// Tries what failed again.
    Retry,
    /// Gives a device the label that the app selects by.
    Join(usize),
    /// Takes it.
    Leave(usize),
    /// Gives up a device that is not connected.
    Forget(usize),
    /// Holds a device, or lets it go.
    Hold(usize, bool),
}

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The hub's process dies for that long.
    HubCrash(Ms),
    /// The broker is gone for that long: nobody reaches anybody.
    BrokerOutage(Ms),
    /// The broker loses what it retained.
    WipeRetained,
    /// The image registry is gone for that long.
    RegistryOutage(Ms),
    /// A device loses its link for that long.
    LinkLoss(usize, Ms),
    /// A device loses its power for that long.
    PowerCut(usize, Ms),
    /// A device's agent dies and is started again.
    AgentCrash(usize),
    /// A container of a device ends by itself.
    ContainerDies(usize),
    /// None, but a backup of the hub's store is made.
    Backup,
    /// The hub's disk is lost. That long later it runs on the backup of that number, or on the last one.
    Restore(usize, Ms),
}

/// What operators do when, to which app.
pub type Commands = Vec<(Ms, usize, Command)>;

/// What goes wrong when.
pub type Faults = Vec<(Ms, Fault)>;

/// An app and its releases.
#[derive(Debug, Clone)]
pub struct App {
    /// Its name.
    pub name: AppName,
    /// Selects the devices whose number is this modulo `groups`; `None`: all.
    pub group: Option<u64>,
    /// Of these, the devices from this number on only once they join.
    pub joiners_from: usize,
    /// In the order of their numbers.
    pub releases: Vec<Release>,
    /// How often which image misbehaves, and how.
    pub fates: BTreeMap<Digest, (Fate, u64)>,
}

/// A whole run, before it begins.
#[derive(Debug, Clone)]
pub struct Scenario {
    /// Where it all comes from.
    pub seed: u64,
    /// Its devices.
    pub devices: Vec<DeviceId>,
    /// Its apps.
    pub apps: Vec<App>,
    /// How often a message is lost, in percent.
    pub loss: u64,
    /// How often a message comes twice, in percent.
    pub duplication: u64,
    /// How long a message may take; longer than the next one's, it overtakes.
    pub delay: Ms,
    /// What operators do when, to which app.
    pub commands: Commands,
    /// What goes wrong when.
    pub faults: Faults,
    /// When everything is whole again.
    pub heals_at: Ms,
    /// The disruption budget that its devices are under.
    pub budget: Option<Budget>,
    /// How every rollout goes about it; `None`: each has a policy of its own from the seed.
    pub policy: Option<manifest::RolloutPolicy>,
}

/// A disruption budget over all devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    /// In how many groups they are.
    pub groups: usize,
    /// How many of each may be switching at once.
    pub max: usize,
}

impl Budget {
    /// In every other run.
    fn of(seed: u64) -> Option<Self> {
        let mut random = Random::new(hash(&[seed, 42]));
        let small = |number: u64| usize::try_from(number).unwrap_or(1);
        random.chance(50).then(|| Self {
            groups: small(random.between(1, 4)),
            max: small(random.between(1, 2)),
        })
    }

    /// The group of the device of that number.
    #[must_use]
    pub const fn group_of(self, number: usize) -> usize {
        number % self.groups
    }
}

/// Apps that do not select all devices select one of so many parts of them.
pub const GROUPS: u64 = 2;

/// Larger fleets live shorter, for the sake of time.
const LARGE: usize = 40;

impl Scenario {
    /// The run of a seed, with so many devices if that is given.
    #[must_use]
    pub fn of(seed: u64, devices: Option<usize>) -> Self {
        let mut random = Random::new(hash(&[seed]));
        let count = devices.unwrap_or_else(|| draw_size(&mut random));
        let large = count > LARGE;
        let heals_at = random.between(2, if large { 3 } else { 6 }) * HOUR;
        let apps: Vec<_> = (0..if large { 1 } else { random.between(1, 3) })
            .map(|number| draw_app(&mut random, number))
            .collect();
        let mut commands = draws::commands(&mut random, &apps, heals_at, count);
        let mut faults = draws::faults(&mut random, count, heals_at);
        faults.extend(draws::restores(seed, heals_at));
        commands.extend(draws::resumes(seed, apps.len(), heals_at));
        let (moves, cuts) = draws::moves(seed, apps.len(), heals_at, count);
        commands.extend(moves);
        faults.extend(cuts);
        Self {
            seed,
            budget: Budget::of(seed),
            policy: None,
            devices: (0..count).map(device_id).collect(),
            apps,
            loss: random.below(15),
            duplication: random.below(10),
            delay: *random.pick(&[50, 500, 3 * SECOND, 20 * SECOND]),
            commands,
            faults,
            heals_at,
        }
    }

    /// One app on so many devices, of which those from `joiners_from` on join later, with one service and a release for
    /// each fate; every rollout has this policy. Nothing is lost, nobody does anything and nothing goes wrong, for a day.
    #[must_use]
    pub fn calm(
        devices: usize,
        joiners_from: usize,
        fates: &[Fate],
        policy: manifest::RolloutPolicy,
    ) -> Self {
        let name: AppName = "app".parse().expect("a plain name");
        let plain = Shape {
            job: false,
            chain: false,
            beside: false,
        };
        let releases = (0_u64..).take(fates.len());
        let image = |release| image_digest(&name, "alpha", release);
        let app = App {
            releases: releases
                .clone()
                .map(|release| compose(&name, &[("alpha", release)].into(), plain))
                .collect(),
            fates: releases
                .zip(fates)
                .map(|(release, fate)| (image(release), (*fate, 100)))
                .collect(),
            group: None,
            joiners_from,
            name,
        };
        Self {
            seed: 1,
            devices: (0..devices).map(device_id).collect(),
            apps: vec![app],
            loss: 0,
            duplication: 0,
            delay: 50,
            commands: Vec::new(),
            faults: Vec::new(),
            heals_at: 24 * HOUR,
            budget: None,
            policy: Some(policy),
        }
    }

    /// The labels of the device of that number: three models at two sites.
    #[must_use]
    pub fn labels(device: usize) -> Labels {
        [("model", device % 3), ("site", device % 2)]
            .map(|(key, value)| {
                let value = format!("{key}-{value}").parse().expect("a plain value");
                (key.parse().expect("a plain key"), value)
            })
            .into()
    }

    /// How a container of an image behaves on a device: the same every time.
    #[must_use]
    pub fn fate(&self, image: &Digest, device: usize) -> Fate {
        let Some((fate, percent)) = self.apps.iter().find_map(|app| app.fates.get(image)) else {
            return Fate::Good;
        };
        let (first, _) = image
            .as_bytes()
            .split_first_chunk::<8>()
            .expect("a digest has 32 bytes");
        let luck = hash(&[self.seed, u64::from_be_bytes(*first), device as u64]) % 100;
        if luck < *percent { *fate } else { Fate::Good }
    }

    /// From which releases that of a rollout can be reached: now and then from one other alone, which may be a bad one.
    #[must_use]
    pub fn requirements(&self, app: usize, to: Digest, rollout: u64) -> Requirements {
        let mut random = Random::new(hash(&[self.seed, rollout, 50]));
        if self.policy.is_some() || !random.chance(25) {
            return Requirements::default();
        }
        let releases = self.apps[app].releases.iter().map(Release::digest);
        let others: Vec<Digest> = releases.filter(|other| *other != to).collect();
        let step = *random.pick(&others);
        let requires = |release: &Digest| {
            let required = (*release == to).then_some(step);
            Ok::<_, std::convert::Infallible>(required.into_iter().collect())
        };
        let Ok(found) = Requirements::collect(to, requires);
        found
    }

    /// The policy that an app's rollout of that number, opened now, has over so many devices.
    #[must_use]
    pub fn policy(&self, rollout: u64, devices: usize, now: UnixMs) -> Policy {
        if let Some(policy) = &self.policy {
            return Policy::freeze(policy, devices);
        }
        let mut random = Random::new(hash(&[self.seed, rollout, 7]));
        let targets = random
            .pick(&[
                vec![
                    WaveTarget::Count(1),
                    WaveTarget::Percent(10),
                    WaveTarget::Percent(50),
                ],
                vec![WaveTarget::Count(1)],
                vec![WaveTarget::Percent(30), WaveTarget::Percent(60)],
                vec![],
            ])
            .clone();
        let mut waves: Vec<_> = targets.into_iter().map(WaveSpec::from).collect();
        for wave in &mut waves {
            wave.approval = random.chance(10);
            wave.failure_budget = random.chance(10).then_some(FailureBudget {
                count: 2,
                percent: 100,
                min_sample: 1,
            });
        }
        let written = manifest::RolloutPolicy {
            canary: random.chance(20).then(|| Canary {
                per_stratum: 1,
                by: vec!["model".parse().expect("a plain key")],
            }),
            waves,
            pace: random.chance(30).then(|| pace(&mut random)),
            start_at: None,
            tail: Tail {
                pace: pace(&mut random),
                failure_budget: FailureBudget {
                    count: u32::try_from(random.between(1, 4)).unwrap_or(1),
                    percent: 100,
                    min_sample: 10,
                },
            },
            priority: 50,
            emergency: random.chance(5),
            analysis: self.gates(rollout),
            soak: manifest_span(random.between(5, 120)),
            bake: manifest_span(random.between(0, 300)),
            progress_deadline: manifest_span(random.between(60, 300)),
            max_unavailable: *random.pick(&[
                manifest::Amount::Percent(20),
                manifest::Amount::Percent(100),
                manifest::Amount::Count(1),
                manifest::Amount::Count(3),
            ]),
            failure_budget: FailureBudget {
                count: u32::try_from(random.between(1, 5)).unwrap_or(1),
                percent: u8::try_from(random.between(0, 50)).unwrap_or(0),
                min_sample: 10,
            },
            on_failure: if random.chance(70) {
                OnFailure::Rollback
            } else {
                OnFailure::Pause
            },
            window: self.window(rollout, 8),
            download_window: self.window(rollout, 9),
            max_restarts: u32::try_from(hash(&[self.seed, rollout, 10]) % 3).unwrap_or(0),
            require_hub: None,
            requires_from: Vec::new(),
        };
        let mut policy = Policy::freeze(&written, devices);
        policy.start_at = random
            .chance(10)
            .then(|| now.plus(random.below(30 * MINUTE)));
        policy
    }
}

impl Scenario {
    /// One in four rollouts has gates that are asked while its waves bake.
    fn gates(&self, rollout: u64) -> Vec<manifest::Analysis> {
        let mut random = Random::new(hash(&[self.seed, rollout, 12]));
        if !random.chance(25) {
            return Vec::new();
        }
        let small = |number: u64| u32::try_from(number).unwrap_or(1);
        (0..random.between(1, 2))
            .map(|number| manifest::Analysis {
                name: format!("gate-{number}"),
                promql: None,
                webhook: None,
                control: None,
                interval: Some(manifest_span(random.between(5, 120))),
                count: small(random.between(1, 3)),
                failure_limit: small(random.below(2)),
                inconclusive_limit: small(random.below(3)),
            })
            .collect()
    }

    /// What a gate answers when it is asked: mostly that all is well.
    #[must_use]
    pub fn verdict(&self, question: &Question) -> Verdict {
        let gate = question.gate as u64;
        let (ordinal, asked) = (u64::from(question.ordinal), question.asked.0);
        match hash(&[self.seed, question.rollout, ordinal, gate, asked, 13]) % 100 {
            0..10 => Verdict::Fail,
            10..25 => Verdict::Inconclusive,
            _ => Verdict::Pass,
        }
    }

    /// One in six rollouts has a window: for some minutes of each half hour, so that nobody waits for long.
    fn window(&self, rollout: u64, which: u64) -> Option<manifest::MaintenanceWindow> {
        let mut random = Random::new(hash(&[self.seed, rollout, which]));
        let minute = random.below(30);
        random.chance(16).then(|| manifest::MaintenanceWindow {
            cron: format!("{minute},{} * * * *", minute + 30)
                .parse()
                .expect("a plain expression"),
            open_for: manifest_span(random.between(120, 900)),
            timezone: manifest::TimeZone::Utc,
        })
    }
}

fn pace(random: &mut Random) -> Pace {
    let number = |number: u64| u32::try_from(number).unwrap_or(1);
    Pace {
        per_minute: number(*random.pick(&[1, 6, 60, 6_000])),
        double_every: random.chance(30).then(|| number(random.between(1, 5))),
        max_per_minute: None,
    }
}

const fn manifest_span(seconds: u64) -> foreshore_protocol::quantity::Span {
    foreshore_protocol::quantity::Span::from_secs(seconds)
}

/// Most runs are small: what breaks with 200 devices mostly breaks with five, in less time.
fn draw_size(random: &mut Random) -> usize {
    let size = match random.below(100) {
        0 => random.between(60, 200),
        1..8 => random.between(8, 20),
        _ => random.between(1, 6),
    };
    usize::try_from(size).unwrap_or(1)
}

fn device_id(number: usize) -> DeviceId {
    format!("device-{number}").parse().expect("a plain name")
}

fn draw_app(random: &mut Random, number: u64) -> App {
    let name: AppName = format!("app-{number}").parse().expect("a plain name");
    let services: Vec<&str> = ["alpha", "beta", "gamma"]
        .into_iter()
        .take(usize::try_from(random.between(1, 3)).unwrap_or(1))
        .collect();
    let shape = Shape {
        job: random.chance(40),
        chain: random.chance(40),
        beside: random.chance(30),
    };
    let mut fates = BTreeMap::new();
    let mut images: BTreeMap<&str, u64> = services.iter().map(|service| (*service, 0)).collect();
    let releases = (0..5_u64)
        .map(|release| {
            // One service changes, the others keep their image: they must not be touched.
            let changed = *random.pick(&services);
            images.insert(changed, release);
            let image = image_digest(&name, changed, release);
            // The first release is mostly good, so that there is something to go back to.
            if random.chance(if release == 0 { 10 } else { 45 }) {
                let fate = *random.pick(&[
                    Fate::NeverReady,
                    Fate::Exits,
                    Fate::Hangs,
                    Fate::Refused,
                    Fate::NoPlatform,
                ]);
                fates.insert(image, (fate, *random.pick(&[100, 100, 50, 20])));
            }
            compose(&name, &images, shape)
        })
        .collect();
    let group = random.chance(30).then(|| random.below(GROUPS));
    App {
        name,
        group,
        joiners_from: if random.chance(40) {
            usize::try_from(random.between(1, 6)).unwrap_or(1)
        } else {
            usize::MAX
        },
        releases,
        fates,
    }
}

fn image_digest(app: &AppName, service: &str, release: u64) -> Digest {
    Digest::of(format!("{app} {service} {release}").as_bytes())
}

/// The job of an app that has one; `alpha` waits for it.
pub const JOB: &str = "prepare";

/// What an app's services have to do with each other.
#[derive(Debug, Clone, Copy)]
struct Shape {
    /// There is a job that runs once a release.
    job: bool,
    /// `beta` waits for `alpha`, and `gamma` for `beta`.
    chain: bool,
    /// New containers are started beside the old ones.
    beside: bool,
}

/// A release as the hub makes it from a manifest: parsed by the same parser, images pinned.
fn compose(app: &AppName, images: &BTreeMap<&str, u64>, shape: Shape) -> Release {
    let mut text = format!(
        "apiVersion: foreshore/v1\nkind: App\nmetadata: {{name: {app}}}\nspec:\n  services:\n"
    );
    for (service, release) in images {
        let image = image_digest(app, service, *release);
        text.push_str(&format!(
            "    {service}:\n      image: hub.internal/{service}@{image}\n      probes: {{readiness: {{tcp: {{port: 80}}}}, liveness: {{tcp: {{port: 80}}}}}}\n"
        ));
        let waits_for = match *service {
            "alpha" if shape.job => format!("{JOB}: {{condition: service_completed_successfully}}"),
            "beta" if shape.chain => "alpha: {condition: service_healthy}".to_owned(),
            "gamma" if shape.chain => "beta: {condition: service_started}".to_owned(),
            _ => String::new(),
        };
        text.push_str(&format!("      depends_on: {{{waits_for}}}\n"));
        // Not drawn: so that a seed draws what it did without.
        let keep = match (release + images.len() as u64) % 3 {
            0 => "",
            1 => ", keep_old: 10m",
            _ => ", keep_old: 2h",
        };
        if shape.beside {
            text.push_str(&format!(
                "      deploy: {{update_config: {{order: start-first{keep}}}}}\n"
            ));
        }
    }
    if shape.job {
        let image = image_digest(app, JOB, images.get("alpha").copied().unwrap_or(0));
        text.push_str(&format!(
            "    {JOB}:\n      image: hub.internal/{JOB}@{image}\n      restart: on-failure\n"
        ));
    }
    let app_manifest = manifest::parse(text.as_bytes()).expect("the manifest above is well-formed");
    Release {
        schema: 1,
        app: app.clone(),
        services: app_manifest.spec.services,
        image_pull_secrets: Vec::new(),
    }
}
