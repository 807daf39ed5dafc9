//! Power cuts: a device in the guest works on a disk image while its machine is killed, boots again, and must be
//! whole.
//!
//! The hub is on this machine and loses nothing: what it was told is what the device must still know. After each cut:
//! the version on the disk is one that was assigned and no older than the newest that the hub had been told of; no
//! state file was damaged or is left half written; the device settles on the newest release by itself; then each
//! container is in the agent's words, in its cgroup, in the run directory and a process of the right release, and
//! nothing else is.
//!
//! In the end the agent is made to write its state without fsync(2), and the same checks must notice that.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use serde_json::Value;

use super::Place;
use super::contents::{add_program, base};
use super::kernel::Kernel;
use super::machine::{Boot, Machine, fresh_disk};
use crate::demo::image::{self, Version as Image};
use crate::demo::interrupt::{self, wait_for};
use crate::demo::stage::{Programs, Stage};
use facts::{Facts, Version, disk_faults, version};
use moment::{Moment, fraction, moments};

mod facts;
mod moment;

/// The device's name, its app's, and its services'.
const DEVICE: &str = "cut";
const SERVICES: [&str; 2] = ["front", "store"];

/// Two releases that share nothing, so that each update downloads, unpacks and throws away.
const IMAGES: [Image; 2] = [
    Image {
        name: "v1",
        ready: true,
    },
    Image {
        name: "v2",
        ready: true,
    },
];
/// Files of 64 KiB in each image.
const FILES: usize = 24;

/// The device's disk.
const DISK_BYTES: u64 = 256 << 20;

/// How long a device may take to settle, however slow the machine; far more than it ever takes.
const PATIENCE: Duration = Duration::from_secs(90);
/// The longest that one boot may last.
const BOOT_LIMIT: Duration = Duration::from_secs(240);
/// What the guest is told to do; the kernel gives `KEY=value` to its first process, and so to the agent.
const TASK: &str = "power";
const FAULTY_TASK: &str = "power FORESHORE_FAULT=unsynced:state";
/// How often the faulty agent is cut. One cut in ten falls right behind a commit of the journal, every 5 s (ext4(5)),
/// and loses nothing.
const FAULTY_CUTS: u32 = 6;
/// The pause between two questions to the guest.
const PAUSE: Duration = Duration::from_millis(250);

/// What a run saw.
#[derive(Debug)]
pub(super) struct Survived {
    /// Cuts.
    pub(super) cuts: u32,
    /// How many of them hit a device with an update neither unheard of nor done.
    pub(super) in_update: u32,
    /// An update that nobody disturbed.
    pub(super) update: Duration,
    /// From the power's return to a device that has settled.
    pub(super) recoveries: Vec<Duration>,
    /// The cut of a device without fsync(2) that was noticed.
    pub(super) noticed: u32,
}

impl fmt::Display for Survived {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let longest = self.recoveries.iter().max().copied().unwrap_or_default();
        write!(
            f,
            "==> {} power cuts survived, {} of them in the middle of an update; an update takes {:.1} s, \
             from power to settled at most {:.1} s; without fsync, cut {} was noticed",
            self.cuts,
            self.in_update,
            self.update.as_secs_f64(),
            longest.as_secs_f64(),
            self.noticed
        )
    }
}

/// Cuts the power as often as asked.
///
/// # Errors
///
/// With the first cut that the device did not survive whole.
pub(super) fn run(
    place: &Place,
    kernel: &Kernel,
    seed: u64,
    cuts: u32,
) -> anyhow::Result<Survived> {
    interrupt::listen();
    let dir = place.file("power");
    let mut stage = Stage::new(Programs::build()?, Some(&dir))?;
    stage.start_hub()?;
    let done = Run::new(place, kernel, &stage).and_then(|mut run| run.all(seed, cuts));
    stage.stop();
    done
}

/// A device in a machine, or between two.
struct Run<'a> {
    place: &'a Place,
    kernel: &'a Kernel,
    stage: &'a Stage,
    initrd: PathBuf,
    devices: Vec<String>,
    task: &'static str,
    machine: Option<Machine>,
    /// Every version that the hub has assigned.
    assigned: BTreeSet<Version>,
    /// What the newest apply wanted.
    release: &'static str,
    applied: u32,
}

impl<'a> Run<'a> {
    fn new(place: &'a Place, kernel: &'a Kernel, stage: &'a Stage) -> anyhow::Result<Self> {
        for (image, path) in IMAGES
            .iter()
            .zip(image::build_apart(&stage.dir, &IMAGES, FILES)?)
        {
            let (path, name) = (path.display().to_string(), format!("web:{}", image.name));
            stage.json(&["image", "import", &path, "--name", &name])?;
        }
        let initrd = place.file("power.cpio");
        fs::write(&initrd, file_system(kernel, stage)?)
            .with_context(|| format!("failed to write {}", initrd.display()))?;
        let mut devices = fresh_disk(&place.file("disk"), DISK_BYTES, true)?.to_vec();
        let network = [
            "-netdev",
            "user,id=net",
            "-device",
            "virtio-net-pci,netdev=net,romfile=",
        ];
        devices.extend(network.map(str::to_owned));
        Ok(Self {
            place,
            kernel,
            stage,
            initrd,
            devices,
            task: TASK,
            machine: None,
            assigned: BTreeSet::new(),
            release: "",
            applied: 0,
        })
    }

    fn all(&mut self, seed: u64, cuts: u32) -> anyhow::Result<Survived> {
        self.apply()?;
        self.boot()?;
        self.settle().context("before the first cut")?;
        let begin = Instant::now();
        self.apply()?;
        self.settle().context("before the first cut")?;
        let mut survived = Survived {
            cuts,
            in_update: 0,
            update: begin.elapsed(),
            recoveries: Vec::new(),
            noticed: 0,
        };
        for (number, moment) in (1..).zip(moments(seed, cuts)) {
            let what = format!("cut {number} of {cuts} (seed {seed}, {moment:?})");
            eprintln!("    {what}");
            let in_update = self
                .survive(moment, &mut survived)
                .with_context(|| format!("{what}\n{}", self.console()))?;
            survived.in_update += u32::from(in_update);
        }
        survived.noticed = self.prove()?;
        Ok(survived)
    }

    /// The checks are only worth what they notice: cut when the hub was told of a version, a device has it, and one that
    /// writes its state without fsync(2) does not. Which cut showed that.
    fn prove(&mut self) -> anyhow::Result<u32> {
        eprintln!("    without fsync");
        self.cut_when_told()?;
        let kept = self.boot().and_then(|()| self.settle());
        kept.with_context(|| format!("cut when the hub was told\n{}", self.console()))?;
        self.cut();
        self.task = FAULTY_TASK;
        self.boot()?;
        for cut in 1..=FAULTY_CUTS {
            self.settle()?;
            self.cut_when_told()?;
            match self.boot() {
                Ok(()) => {}
                Err(error) if error.is::<DiskFaults>() => {
                    eprintln!("    noticed at cut {cut}: {error}");
                    self.cut();
                    return Ok(cut);
                }
                Err(error) => return Err(error),
            }
        }
        bail!("{FAULTY_CUTS} cuts of a device that writes its state without fsync were not noticed")
    }

    /// Changes the newest release in a way for which nothing has to be fetched, and cuts as soon as the hub knows that the
    /// device has stored that.
    fn cut_when_told(&mut self) -> anyhow::Result<()> {
        self.applied += 2;
        let desired = self.apply_release()?;
        wait_for("the device to tell of the release", PATIENCE, || {
            let told = version(&self.device()?["reported"]);
            Ok((told >= Some(desired)).then_some(()))
        })?;
        self.cut();
        Ok(())
    }

    /// Applies the other release, cuts, boots, waits for the device to settle and looks at it. Whether the cut hit
    /// the update under way.
    fn survive(&mut self, moment: Moment, survived: &mut Survived) -> anyhow::Result<bool> {
        let (Moment::Update(at) | Moment::UpdateAndRecovery(at, _)) = moment;
        let begin = Instant::now();
        let desired = self.apply()?;
        self.listen_until(begin + fraction(survived.update, at))?;
        self.cut();
        let device = self.device()?;
        let settled = device["apps"][0]["phase"] == "succeeded"
            && version(&device["reported"]) == Some(desired);
        if let Moment::UpdateAndRecovery(_, again) = moment {
            let usual = survived.recoveries.last().copied();
            let begin = Instant::now();
            self.start()?;
            self.listen_until(begin + fraction(usual.unwrap_or(survived.update), again))?;
            self.cut();
        }
        let begin = Instant::now();
        self.boot()?;
        self.settle()?;
        survived.recoveries.push(begin.elapsed());
        Ok(!settled)
    }

    /// Applies the release that is not the newest one; the version that the device shall have.
    fn apply(&mut self) -> anyhow::Result<Version> {
        self.release = IMAGES[usize::from(self.applied % 2 == 1)].name;
        self.applied += 1;
        self.apply_release()
    }

    /// Applies `release`, for the `applied`th time; the version that the device shall have.
    fn apply_release(&mut self) -> anyhow::Result<Version> {
        let path = self.stage.dir.join("cut.yaml");
        fs::write(&path, manifest(self.release, self.applied))?;
        self.stage
            .json(&["apply", "-f", &path.display().to_string()])?;
        // The first one is applied before the device exists.
        if self.machine.is_none() {
            return Ok((0, 0));
        }
        let before = self.assigned.last().copied();
        let desired = wait_for("the hub to assign the release", PATIENCE, || {
            let desired = version(&self.device()?["desired"]);
            Ok(desired.filter(|desired| Some(*desired) > before))
        })?;
        self.assigned.insert(desired);
        Ok(desired)
    }

    /// What the hub knows of the device; `null` before it has joined.
    fn device(&self) -> anyhow::Result<Value> {
        let devices = self.stage.json(&["get", "devices"])?;
        let items = devices["items"].as_array().cloned().unwrap_or_default();
        Ok(items
            .into_iter()
            .find(|device| device["id"] == DEVICE)
            .unwrap_or_default())
    }

    fn start(&mut self) -> anyhow::Result<()> {
        interrupt::check()?;
        self.machine = Some(Machine::start(&Boot {
            kernel: &self.kernel.image,
            initrd: &self.initrd,
            devices: &self.devices,
            task: self.task,
            console: &self.console_file(),
            limit: BOOT_LIMIT,
        })?);
        Ok(())
    }

    fn console_file(&self) -> PathBuf {
        self.place.cache.join("power-console.log")
    }

    /// Starts the machine and judges what is on its disk before the agent runs.
    fn boot(&mut self) -> anyhow::Result<()> {
        let acknowledged = version(&self.device()?["reported"]);
        self.start()?;
        loop {
            let Some(line) = self.machine()?.next()? else {
                bail!("the guest ended by itself");
            };
            ensure!(line != "unmountable", "the disk cannot be mounted any more");
            if let Some(disk) = line.strip_prefix("disk ") {
                let disk: Value = serde_json::from_str(disk)
                    .with_context(|| format!("foreshore-agent status said {disk:?}"))?;
                let faults = disk_faults(&disk, acknowledged, &self.assigned);
                ensure!(faults.is_empty(), DiskFaults(faults.join("; ")));
            }
            if line == "started" {
                return Ok(());
            }
        }
    }

    fn machine(&mut self) -> anyhow::Result<&mut Machine> {
        self.machine.as_mut().context("the machine is off")
    }

    fn cut(&mut self) {
        self.machine = None;
    }

    fn console(&self) -> String {
        let bytes = fs::read(self.console_file()).unwrap_or_default();
        super::machine::last_lines(&String::from_utf8_lossy(&bytes), 60)
    }

    /// Lets the machine run until then.
    fn listen_until(&mut self, then: Instant) -> anyhow::Result<()> {
        while Instant::now() < then {
            let left = then.saturating_duration_since(Instant::now());
            self.machine()?.next_within(left)?;
        }
        Ok(())
    }

    fn facts(&mut self) -> anyhow::Result<Facts> {
        let machine = self.machine()?;
        machine.order("facts")?;
        let mut lines = Vec::new();
        while let Some(line) = machine.next_within(PATIENCE)? {
            if line == "told" {
                return Ok(Facts::read(&lines));
            }
            lines.push(line);
        }
        bail!("the guest does not answer; it said {lines:?}")
    }

    /// Waits until the device and the hub agree that the newest release runs, and looks at every container.
    fn settle(&mut self) -> anyhow::Result<()> {
        let begin = Instant::now();
        let mut seen;
        loop {
            interrupt::check()?;
            let device = self.device()?;
            self.assigned.extend(version(&device["desired"]));
            seen = self.facts()?;
            let settled = version(&device["desired"]).is_some_and(|desired| {
                version(&device["reported"]) == Some(desired)
                    && seen.has_settled(desired, SERVICES.len())
            });
            // The agent tidies up after it has said that it is done.
            let faults = seen.faults(self.release, &SERVICES);
            if settled && faults.is_empty() {
                break;
            }
            ensure!(
                begin.elapsed() < PATIENCE,
                "after {} s the device has {}: {}\nthe hub: {device}\n{seen:?}",
                PATIENCE.as_secs(),
                if settled { "settled" } else { "not settled" },
                faults.join("; ")
            );
            let pause = Instant::now() + PAUSE;
            self.listen_until(pause)?;
        }
        let events = self.stage.json(&["events", "--device", DEVICE])?;
        let corrupt = events["items"]
            .as_array()
            .into_iter()
            .flatten()
            .find(|event| event["kind"] == "state-corrupt");
        match corrupt {
            Some(event) => bail!("the device told of damage: {event}"),
            None => Ok(()),
        }
    }
}

/// The state on the disk is not what it must be.
#[derive(Debug)]
struct DiskFaults(String);

impl fmt::Display for DiskFaults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for DiskFaults {}

fn manifest(release: &str, number: u32) -> String {
    let service = |name: &str, more: &str| {
        format!(
            "    {name}: {{image: 'hub.internal/web:{release}', mem_limit: 16m, stop_grace_period: 1s, \
             environment: {{NUMBER: '{number}'}}{more}}}\n"
        )
    };
    format!(
        "apiVersion: foreshore/v1\nkind: App\nmetadata: {{name: cut}}\nspec:\n  \
         selector: {{matchLabels: {{role: cut}}}}\n  services:\n{}{}  rollout:\n    \
         waves: [{{percent: 100}}]\n    soak: 1s\n    bake: 0s\n    progressDeadline: 5m\n    \
         maxUnavailable: 100%\n    failureBudget: {{percent: 100}}\n    onFailure: pause\n",
        service(SERVICES[0], ""),
        service(SERVICES[1], ", read_only: false, volumes: ['data:/kept']"),
    )
}

/// The agent, and how it reaches the hub: qemu's own network shows this machine's loopback as 10.0.2.2.
fn file_system(kernel: &Kernel, stage: &Stage) -> anyhow::Result<Vec<u8>> {
    let endpoints: Value =
        serde_json::from_slice(&fs::read(stage.dir.join("hub/endpoints.json"))?)?;
    let reach = |key: &str| {
        let url = endpoints[key].as_str().unwrap_or_default();
        let port = url
            .rsplit(':')
            .next()
            .map(|port| port.trim_end_matches('/'));
        let port: u16 = port
            .and_then(|port| port.parse().ok())
            .with_context(|| format!("the hub's {key} address has no port: {url:?}"))?;
        anyhow::Ok(format!("10.0.2.2:{port}"))
    };
    let config = format!(
        "device = \"{DEVICE}\"\n\n[hub]\nbroker = \"mqtt://{}\"\nregistry = \"http://{}\"\n\
         join_token_file = \"/etc/foreshore/join-token\"\nreport_interval = \"200ms\"\n\
         reconnect_max = \"2s\"\nkeepalive = \"10s\"\nwill_delay = \"0s\"\n\n\
         [labels]\nrole = \"cut\"\n\n[paths]\nstate = \"/data/state\"\n",
        reach("broker")?,
        reach("api")?,
    );
    let mut archive = base(kernel)?;
    archive.file("/etc/foreshore/agent.toml", 0o644, config.as_bytes());
    let token = fs::read(stage.dir.join("hub/join-token"))?;
    archive.file("/etc/foreshore/join-token", 0o600, &token);
    add_program(
        &mut archive,
        &stage.programs.agent,
        "/guest/foreshore-agent",
    )?;
    archive.file("/guest/power.sh", 0o644, include_bytes!("power.sh"));
    Ok(archive.finish())
}
