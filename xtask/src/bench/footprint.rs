//! Sizes, memory and wake-ups of the programs on a device, built with the `device` profile, beside those
//! of peers that are there.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use serde_json::Value;

use super::conmon::Conmon;
use super::docker::Docker;
use super::mounts;
use super::pull::children;
use crate::demo::image::{self, Version};
use crate::demo::interrupt::{self, wait_for};
use crate::demo::process::Process;
use crate::demo::stage::{Programs, Stage};
use crate::demo::sweep::{Keep, sweep};
use crate::demo::witness;
use crate::step;

/// Without a probe, so that an idle window shows the agent and not what it was told to ask.
const MANIFEST: &str = "\
apiVersion: foreshore/v1
kind: App
metadata: {name: web}
spec:
  services:
    web: {image: 'hub.internal/web:v1', mem_limit: 16m}
  rollout: {waves: [{percent: 100}], soak: 1s, bake: 1s, maxUnavailable: 100%}
";
const PATIENCE: Duration = Duration::from_secs(60);

/// Builds the programs as they are shipped, unless they are in `dir`.
///
/// # Errors
///
/// When they cannot be built.
pub(super) fn programs(dir: Option<&Path>) -> anyhow::Result<Programs> {
    if let Some(dir) = dir {
        return Programs::find(dir);
    }
    let device = ["build", "--profile", "device", "-p", "foreshore-agent"];
    step::run("build the agent for devices", &mut step::cargo(&device))?;
    let release = [
        "build",
        "--release",
        "-p",
        "foreshore-hub",
        "-p",
        "foreshore",
    ];
    step::run("build hub and command line", &mut step::cargo(&release))?;
    let target = target_dir()?;
    Ok(Programs {
        hub: target.join("release/foreshore-hub"),
        agent: target.join("device/foreshore-agent"),
        cli: target.join("release/foreshore"),
    })
}

/// Builds agent and hub, runs one of each with a container, and reports.
///
/// # Errors
///
/// When they cannot be built or the container does not come up.
pub(super) fn run(dir: Option<&Path>, idle_secs: u64) -> anyhow::Result<()> {
    let programs = programs(dir)?;
    println!("\nfootprint");
    for (name, path) in [
        ("agent, shim inside", &programs.agent),
        ("hub", &programs.hub),
        ("foreshore", &programs.cli),
    ] {
        let bytes = fs::metadata(path)?.len();
        println!("{name:<38} {:>9.2} MiB on disk", mebibytes(bytes));
    }
    interrupt::listen();
    let mut stage = Stage::new(programs, None)?;
    let measured = measure(&mut stage, idle_secs);
    stage.stop();
    let swept = sweep(&stage.dir, Keep::Nothing);
    measured.and(swept)
}

fn measure(stage: &mut Stage, idle_secs: u64) -> anyhow::Result<()> {
    stage.start_hub()?;
    // No hurry: the pace of a device as it is by default.
    stage.start_device_with("bench", "")?;
    wait_for("the device to join", PATIENCE, || {
        let devices = stage.json(&["get", "devices"])?;
        let device = &devices["items"][0];
        Ok((device["online"] == true && !device["inventory"].is_null()).then_some(()))
    })?;
    let device = stage.device("bench")?;
    let agent = device.agent.process().context("the agent does not run")?;
    report("agent, connected, nothing to run yet", agent)?;
    let container = start_container(stage)?;
    let shim = parent(container).context("the container has no shim")?;
    let conmon = Conmon::start(&stage.dir.join("conmon"));

    let before = switches(agent)?;
    let begin = Instant::now();
    eprintln!("    watching the idle agent for {idle_secs} s");
    let window = Duration::from_secs(idle_secs);
    while begin.elapsed() < window {
        interrupt::check()?;
        // The one thing here that is a wait: an idle window has to pass.
        std::thread::sleep(Duration::from_millis(100).min(window));
    }
    let wakes = switches(agent)?.saturating_sub(before);
    report("agent, connected, one container", agent)?;
    report("foreshore-shim, per container", shim)?;
    match &conmon {
        Ok(conmon) => report("conmon, per container", conmon.process)?,
        Err(why) => println!("{:<38} left out: {why:#}", "conmon, per container"),
    }
    docker(&stage.dir.join("dockerd"))?;
    let seconds = begin.elapsed().as_secs_f64();
    let rate = f64::from(u32::try_from(wakes).unwrap_or(u32::MAX)) / seconds;
    println!(
        "{:<38} {rate:>9.3} wake-ups a second over {seconds:.0} s",
        "agent, idle"
    );
    Ok(())
}

/// Imports the demo's image, applies an app and waits for its container.
fn start_container(stage: &Stage) -> anyhow::Result<Process> {
    let version = Version {
        name: "v1",
        ready: true,
    };
    let archives = image::build(&stage.dir, &[version])?;
    let archive = archives[0].display().to_string();
    let import = ["image", "import", &archive, "--name", "web:v1"];
    ensure!(
        stage.show(&import)?.success(),
        "the image could not be imported"
    );
    let manifest = stage.dir.join("web.yaml");
    fs::write(&manifest, MANIFEST)?;
    stage.json(&["apply", "-f", &manifest.display().to_string()])?;
    wait_for("the rollout to complete", PATIENCE, || {
        let rollout = stage.json(&["rollout", "status", "web"])?;
        Ok((rollout["state"] == "completed").then_some(()))
    })?;
    witness::service_in(&stage.device("bench")?.cgroup)
}

fn report(name: &str, process: Process) -> anyhow::Result<()> {
    let text = fs::read_to_string(format!("/proc/{}/smaps_rollup", process.pid))
        .with_context(|| format!("failed to read the memory of {name}"))?;
    let field = |key: &str| -> Option<u64> {
        let line = text.lines().find_map(|line| line.strip_prefix(key))?;
        line.trim().strip_suffix(" kB")?.trim().parse().ok()
    };
    let sum = |keys: &[&str]| keys.iter().filter_map(|key| field(key)).sum::<u64>();
    let pss = field("Pss:").context("no Pss in smaps_rollup")?;
    let private = sum(&["Private_Dirty:", "Private_Clean:"]);
    let dirty = sum(&["Private_Dirty:"]);
    println!("{name:<38} {pss:>9} KiB Pss {private:>8} KiB private, {dirty} of it dirty");
    Ok(())
}

/// The parent of a process (proc_pid_stat(5), field 4).
fn parent(process: Process) -> Option<Process> {
    let stat = fs::read_to_string(format!("/proc/{}/stat", process.pid)).ok()?;
    let pid = stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse().ok()?;
    Process::of(pid)
}

/// Voluntary context switches of all threads: how often it woke up.
pub(super) fn switches(process: Process) -> anyhow::Result<u64> {
    let mut total = 0;
    for task in fs::read_dir(format!("/proc/{}/task", process.pid))? {
        let status = fs::read_to_string(task?.path().join("status"))?;
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        total += line
            .and_then(|count| count.trim().parse::<u64>().ok())
            .unwrap_or(0);
    }
    Ok(total)
}

fn running(pid: u32) -> Option<Process> {
    Process::of(pid.try_into().ok()?)
}

/// Docker's daemon, and the one below it, with nothing to run.
fn docker(dir: &Path) -> anyhow::Result<()> {
    let docker = match Docker::start(dir) {
        Ok(docker) => docker,
        Err(why) => {
            println!("{:<38} left out: {why:#}", "dockerd and containerd");
            return Ok(());
        }
    };
    let daemon = running(docker.pid()).context("dockerd does not run")?;
    report("dockerd, idle", daemon)?;
    for child in children(docker.pid()) {
        let containerd = running(child).context("containerd does not run")?;
        report("containerd, idle", containerd)?;
    }
    drop(docker);
    mounts::clean(dir)
}

pub(super) fn target_dir() -> anyhow::Result<PathBuf> {
    let metadata: Value = json_of(&mut step::cargo(&[
        "metadata",
        "--format-version",
        "1",
        "--no-deps",
    ]))?;
    let dir = metadata["target_directory"].as_str();
    Ok(Path::new(dir.context("cargo names its target directory")?).to_owned())
}

fn json_of(command: &mut Command) -> anyhow::Result<Value> {
    Ok(serde_json::from_slice(&command.output()?.stdout)?)
}

fn mebibytes(bytes: u64) -> f64 {
    f64::from(u32::try_from(bytes >> 10).unwrap_or(u32::MAX)) / 1024.0
}
