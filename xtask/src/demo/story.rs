//! The chapters of the demo: what is done, and what must be true afterwards.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use serde_json::Value;

use super::image::{self, Version};
use super::interrupt::wait_for;
use super::process::Process;
use super::record::Record;
use super::stage::{Stage, go_on};
use super::witness;

const DEVICES: [&str; 5] = ["device-1", "device-2", "device-3", "device-4", "device-5"];
const VERSIONS: [Version; 3] = [
    Version {
        name: "v1",
        ready: true,
    },
    Version {
        name: "v2",
        ready: true,
    },
    Version {
        name: "v3",
        ready: false,
    },
];
/// Long enough for a slow machine, short enough to give up while someone watches.
const PATIENCE: Duration = Duration::from_secs(60);

/// A chapter: does its part and says what it saw.
type Chapter = fn(&mut Story) -> anyhow::Result<String>;

/// In order; each relies on those before.
pub(super) const CHAPTERS: &[(&str, Chapter)] = &[
    (
        "a hub and five devices start, nothing else is needed",
        start,
    ),
    (
        "three versions of an image are imported into the hub",
        import,
    ),
    ("v1 reaches the devices wave by wave", roll_out_v1),
    (
        "every container answers v1, asked inside its own network",
        containers_are_v1,
    ),
    ("v2 reaches the devices wave by wave", roll_out_v2),
    (
        "every container was replaced and answers v2",
        containers_are_v2,
    ),
    (
        "v3 fails in the first wave, and the rollout stops and rolls back",
        roll_out_v3,
    ),
    (
        "its device is back at v2, the others never changed",
        containers_are_still_v2,
    ),
    ("a killed container is started again", kill_container),
    (
        "a killed agent leaves its container running, untouched",
        kill_agent,
    ),
    (
        "the new agent takes that container over, and heals it too",
        agent_is_back,
    ),
];

/// What the chapters pass on to each other.
#[derive(Debug)]
pub(super) struct Story {
    pub(super) stage: Stage,
    images: Vec<PathBuf>,
    /// Each device's container as of the last look.
    containers: BTreeMap<&'static str, Process>,
    /// The devices that v3 was tried on.
    tried_v3: Vec<String>,
    /// The newest event before the agent was killed.
    last_event: u64,
}

impl Story {
    pub(super) const fn new(stage: Stage) -> Self {
        Self {
            stage,
            images: Vec::new(),
            containers: BTreeMap::new(),
            tried_v3: Vec::new(),
            last_event: 0,
        }
    }

    /// Applies a version and follows its rollout on this terminal, recording it beside. The exit code of
    /// `foreshore rollout status -w`, and the record.
    fn roll_out(&self, version: Version) -> anyhow::Result<(Option<i32>, Record)> {
        let template = fs::read_to_string(crate::step::root().join("configs/demo/web.yaml"))?;
        let manifest = self.stage.dir.join(format!("web-{}.yaml", version.name));
        fs::write(
            &manifest,
            template.replace("web:v1", &format!("web:{}", version.name)),
        )?;
        let manifest = manifest.display().to_string();
        self.stage.show(&["plan", "-f", &manifest])?;
        let answer = self.stage.json(&["apply", "-f", &manifest])?;
        let id = answer["rollout"]
            .as_u64()
            .context("apply opened no rollout")?
            .to_string();

        let watch = [
            "rollout",
            "status",
            "web",
            "--id",
            &id,
            "--watch",
            "--timeout",
            "120s",
        ];
        let path = self
            .stage
            .dir
            .join(format!("logs/rollout-{}.ndjson", version.name));
        let mut recorder = self.stage.foreshore(&watch);
        recorder
            .args(["-o", "json"])
            .stdin(Stdio::null())
            .stderr(Stdio::null());
        let mut recorder = recorder.stdout(fs::File::create(&path)?).spawn()?;
        let shown = self.stage.show(&watch);
        let recorded = wait_for("the recording to end", Duration::from_secs(10), || {
            Ok(recorder.try_wait()?)
        });
        if recorded.is_err() {
            let _ended_meanwhile = recorder.kill();
            let _reaped = recorder.wait();
        }
        Ok((shown?.code(), Record::read(&path)?))
    }

    /// Looks at every device's container; fails unless each answers `version`.
    fn look(&self, version: &str) -> anyhow::Result<BTreeMap<&'static str, Process>> {
        DEVICES
            .into_iter()
            .map(|name| {
                let service = witness::service_in(&self.stage.device(name)?.cgroup)?;
                let (status, body) = witness::ask(service, "/version")?;
                ensure!(
                    status == 200 && body == version,
                    "{name} answers {status} {body:?}, not {version}"
                );
                Ok((name, service))
            })
            .collect()
    }
}

fn start(story: &mut Story) -> anyhow::Result<String> {
    story.stage.start_hub()?;
    for name in DEVICES {
        go_on()?;
        story.stage.start_device(name)?;
    }
    wait_for("five devices to be online", PATIENCE, || {
        for device in &story.stage.devices {
            ensure!(
                device.agent.process().is_some(),
                "the agent of {} ended; see its log",
                device.name
            );
        }
        let devices = story.stage.json(&["get", "devices"])?;
        let online = items(&devices)
            // Its labels come a moment after it, and an app selects by them.
            .filter(|device| device["online"] == true && !device["inventory"].is_null())
            .count();
        Ok((online == DEVICES.len()).then_some(()))
    })?;
    story.stage.show(&["get", "devices"])?;
    Ok("five devices online at one hub with its own broker and database".to_owned())
}

fn import(story: &mut Story) -> anyhow::Result<String> {
    println!("    compiling the demo's service with rustc");
    story.images = image::build(&story.stage.dir, &VERSIONS)?;
    for (version, path) in VERSIONS.iter().zip(&story.images) {
        go_on()?;
        let (path, name) = (path.display().to_string(), format!("web:{}", version.name));
        let end = story
            .stage
            .show(&["image", "import", &path, "--name", &name])?;
        ensure!(end.success(), "importing {name} ended with {end}");
    }
    let images = story.stage.json(&["image", "list"])?;
    let there: Vec<&str> = items(&images)
        .filter_map(|image| image["reference"].as_str())
        .collect();
    for version in VERSIONS {
        let reference = format!("hub.internal/web:{}", version.name);
        ensure!(
            there.contains(&reference.as_str()),
            "the hub does not list {reference}"
        );
    }
    Ok(there.join(", "))
}

fn roll_out_v1(story: &mut Story) -> anyhow::Result<String> {
    roll_out_well(story, VERSIONS[0])
}

fn roll_out_v2(story: &mut Story) -> anyhow::Result<String> {
    roll_out_well(story, VERSIONS[1])
}

fn roll_out_well(story: &Story, version: Version) -> anyhow::Result<String> {
    let (code, record) = story.roll_out(version)?;
    ensure!(
        code == Some(0),
        "foreshore rollout status -w ended with {code:?}"
    );
    let sizes: Vec<String> = record
        .check_waves()?
        .iter()
        .map(ToString::to_string)
        .collect();
    Ok(format!(
        "waves of {} devices, each opened after the one before had passed",
        sizes.join(", ")
    ))
}

fn containers_are_v1(story: &mut Story) -> anyhow::Result<String> {
    story.containers = story.look("v1")?;
    Ok("GET /version in five network namespaces: v1".to_owned())
}

fn containers_are_v2(story: &mut Story) -> anyhow::Result<String> {
    let now = story.look("v2")?;
    for (name, process) in &now {
        let before = story.containers.get(name).context("seen in v1")?;
        ensure!(
            process != before && !before.runs(),
            "the container of {name} was not replaced"
        );
    }
    story.containers = now;
    Ok("five new processes, the old ones gone".to_owned())
}

fn roll_out_v3(story: &mut Story) -> anyhow::Result<String> {
    let before = newest_event(story)?;
    let (code, record) = story.roll_out(VERSIONS[2])?;
    ensure!(
        code == Some(3),
        "foreshore rollout status -w ended with {code:?}, not 3"
    );
    story.tried_v3 = record.check_failure()?;
    for device in &story.tried_v3 {
        // The device's own word, sent when its last-known-good was back; the hub had no part in it.
        wait_for_event(story, device, before, "rolled-back")?;
    }
    Ok(format!(
        "tried on {} only, which went back by itself",
        story.tried_v3.join(", ")
    ))
}

/// The id of the newest event that the hub has.
fn newest_event(story: &Story) -> anyhow::Result<u64> {
    let events = story.stage.json(&["events", "--limit", "1"])?;
    let ids = items(&events).filter_map(|event| event["id"].as_u64());
    Ok(ids.max().unwrap_or(0))
}

/// Waits until the hub has an event of this kind from a device, later than `after`.
fn wait_for_event(story: &Story, device: &str, after: u64, kind: &str) -> anyhow::Result<()> {
    let after = after.to_string();
    wait_for(&format!("the event {kind} of {device}"), PATIENCE, || {
        let events = story
            .stage
            .json(&["events", "--device", device, "--after", &after])?;
        let came = items(&events).any(|event| event["kind"] == kind);
        Ok(came.then_some(()))
    })
}

fn containers_are_still_v2(story: &mut Story) -> anyhow::Result<String> {
    let now = story.look("v2")?;
    for (name, process) in &now {
        let same = story.containers.get(name) == Some(process);
        let tried = story.tried_v3.iter().any(|device| device == name);
        ensure!(
            same || tried,
            "the container of {name} changed, and it was not in the first wave"
        );
    }
    let untouched = DEVICES.len() - story.tried_v3.len();
    story.containers = now;
    Ok(format!(
        "all answer v2; {untouched} containers have the same pid and start time as before v3"
    ))
}

fn kill_container(story: &mut Story) -> anyhow::Result<String> {
    let name = DEVICES[0];
    let healed = kill_and_wait(story, name)?;
    story.containers.insert(name, healed);
    Ok(format!("{name}: a new process {} answers v2", healed.pid))
}

/// Kills a device's container and waits until a new one answers v2.
fn kill_and_wait(story: &Story, name: &str) -> anyhow::Result<Process> {
    let cgroup = &story.stage.device(name)?.cgroup;
    let victim = witness::service_in(cgroup)?;
    println!("    kill -9 {} (the container on {name})", victim.pid);
    victim.signal(libc::SIGKILL);
    wait_for("a new container", PATIENCE, || {
        let Ok(service) = witness::service_in(cgroup) else {
            return Ok(None);
        };
        let answer = witness::ask(service, "/version").ok();
        let well = service != victim && answer == Some((200, "v2".to_owned()));
        Ok(well.then_some(service))
    })
}

fn kill_agent(story: &mut Story) -> anyhow::Result<String> {
    story.last_event = newest_event(story)?;
    let device = story.stage.device(DEVICES[1])?;
    let container = witness::service_in(&device.cgroup)?;
    let agent = device.agent.process().context("the agent does not run")?;
    println!(
        "    kill -9 {} (the agent of {}); it stays away for 2 s",
        agent.pid, device.name
    );
    agent.signal(libc::SIGKILL);
    ensure!(agent.gone_within(PATIENCE), "the agent survived SIGKILL");
    ensure!(
        device.agent.process().is_none(),
        "the agent was back before anyone could look"
    );
    ensure!(container.runs(), "the container went down with its agent");
    let answer = witness::ask(container, "/version")?;
    ensure!(
        answer == (200, "v2".to_owned()),
        "the container answers {answer:?}"
    );
    Ok(format!(
        "with no agent, process {} goes on answering v2",
        container.pid
    ))
}

fn agent_is_back(story: &mut Story) -> anyhow::Result<String> {
    let name = DEVICES[1];
    let device = story.stage.device(name)?;
    let before = *story.containers.get(name).context("seen in v2")?;
    wait_for_event(story, name, story.last_event, "adopted")?;
    let agent = device.agent.process().context("the agent does not run")?;
    ensure!(
        witness::service_in(&device.cgroup)? == before,
        "the container of {name} was replaced when its agent came back"
    );
    let healed = kill_and_wait(story, name)?;
    story.containers.insert(name, healed);
    wait_until_settled(story)?;
    Ok(format!(
        "agent {} adopted process {}, then replaced it when it was killed",
        agent.pid, before.pid
    ))
}

/// All devices online and at the app's release, as the hub sees it.
fn wait_until_settled(story: &Story) -> anyhow::Result<()> {
    wait_for("the hub to see all devices well", PATIENCE, || {
        let app = story.stage.json(&["get", "app", "web"])?;
        if app["devices"].is_null() {
            bail!("the hub's answer has no devices");
        }
        Ok((app["upToDate"] == app["devices"]).then_some(()))
    })
}

fn items(list: &Value) -> impl Iterator<Item = &Value> {
    list["items"].as_array().into_iter().flatten()
}
