//! What a seed makes of a run: how many devices and apps, which releases and how they behave, how bad the network
//! is, and what operators and fate do when.

use std::collections::BTreeMap;

use foreshore_hub::rollout::{Policy, UnixMs};
use foreshore_protocol::id::Labels;
use foreshore_protocol::manifest::{
    Canary, FailureBudget, OnFailure, Pace, Tail, WaveSpec, WaveTarget,
};
use foreshore_protocol::release::Release;
use foreshore_protocol::{AppName, DeviceId, Digest, manifest};

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
    /// Gives a device the labels that the app selects by.
    Join(usize),
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
}

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
    pub commands: Vec<(Ms, usize, Command)>,
    /// What goes wrong when.
    pub faults: Vec<(Ms, Fault)>,
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

const GROUPS: u64 = 2;

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
        let commands = draw_commands(&mut random, &apps, heals_at, count);
        let faults = draw_faults(&mut random, count, heals_at);
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

    /// Whether an app selects the device of that number, if it has joined.
    #[must_use]
    pub fn selects(app: &App, device: usize) -> bool {
        app.group
            .is_none_or(|group| device as u64 % GROUPS == group)
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
            analysis: Vec::new(),
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
        };
        let mut policy = Policy::freeze(&written, devices);
        policy.start_at = random
            .chance(10)
            .then(|| now.plus(random.below(30 * MINUTE)));
        policy
    }
}

impl Scenario {
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
        if shape.beside {
            text.push_str("      deploy: {update_config: {order: start-first}}\n");
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

fn draw_commands(
    random: &mut Random,
    apps: &[App],
    heals_at: Ms,
    devices: usize,
) -> Vec<(Ms, usize, Command)> {
    let mut commands = Vec::new();
    for (app, one) in apps.iter().enumerate() {
        commands.push((random.below(10 * MINUTE), app, Command::Apply(0)));
        let applies = if devices > LARGE {
            2
        } else {
            random.between(1, 4)
        };
        for _ in 0..applies {
            let release = usize::try_from(random.below(one.releases.len() as u64)).unwrap_or(0);
            commands.push((
                random.between(10 * MINUTE, heals_at),
                app,
                Command::Apply(release),
            ));
        }
        for _ in 0..random.below(5) {
            let command = *random.pick(&[
                Command::Pause,
                Command::Resume,
                Command::Resume,
                Command::Abort,
                Command::Undo,
                Command::Approve,
                Command::Retry,
            ]);
            commands.push((random.between(5 * MINUTE, heals_at), app, command));
        }
        if one.joiners_from < devices {
            for device in one.joiners_from..devices.min(one.joiners_from + 8) {
                commands.push((random.below(heals_at), app, Command::Join(device)));
            }
        }
        for _ in 0..random.below(3) {
            let device = usize::try_from(random.below(devices as u64)).unwrap_or(0);
            let (from, span) = (random.below(heals_at), random.between(MINUTE, HOUR));
            commands.push((from, app, Command::Hold(device, true)));
            commands.push((from + span, app, Command::Hold(device, false)));
        }
    }
    commands
}

fn draw_faults(random: &mut Random, devices: usize, heals_at: Ms) -> Vec<(Ms, Fault)> {
    let calm = random.chance(15);
    let count = if calm {
        0
    } else {
        random.below(12) + random.below(1 + 2 * devices.min(30) as u64)
    };
    let mut faults: Vec<_> = (0..count)
        .map(|_| {
            let device = usize::try_from(random.below(devices as u64)).unwrap_or(0);
            let span = *random.pick(&[5 * SECOND, MINUTE, 5 * MINUTE, 40 * MINUTE, 2 * HOUR]);
            let fault = match random.below(20) {
                0..3 => Fault::HubCrash(span.min(40 * MINUTE)),
                3 => Fault::BrokerOutage(span),
                4 => Fault::WipeRetained,
                5..7 => Fault::RegistryOutage(span),
                7..11 => Fault::LinkLoss(device, span),
                11..15 => Fault::PowerCut(device, span),
                15..18 => Fault::AgentCrash(device),
                _ => Fault::ContainerDies(device),
            };
            (random.below(heals_at), fault)
        })
        .collect();
    if random.chance(10) {
        // A device that dies in the middle of switching and stays dead until the end.
        let device = usize::try_from(random.below(devices as u64)).unwrap_or(0);
        faults.push((random.below(heals_at), Fault::PowerCut(device, 24 * HOUR)));
    }
    faults
}
