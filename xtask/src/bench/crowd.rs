//! What a device with 1, 10 and 50 containers costs while nothing happens, while one thing changes, when its agent
//! comes back, and with a probe that runs a command.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use serde_json::Value;

use super::footprint::{self, switches};
use crate::demo::image::{self, Version};
use crate::demo::interrupt::{self, wait_for};
use crate::demo::process::Process;
use crate::demo::stage::Stage;
use crate::demo::sweep::{Keep, sweep};

const PATIENCE: Duration = Duration::from_secs(180);
const DEVICE: &str = "bench";
/// An app has at most 32 services.
const PER_APP: usize = 25;
/// Between two runs of the command that is measured.
const PROBE_PERIOD: Duration = Duration::from_secs(1);

/// Builds agent and hub, runs one of each, and reports.
///
/// # Errors
///
/// When they cannot be built or containers do not come up.
pub(super) fn run(programs: Option<&Path>, idle_secs: u64) -> anyhow::Result<()> {
    let programs = footprint::programs(programs)?;
    println!("\na crowd of containers on one device");
    interrupt::listen();
    let mut stage = Stage::new(programs, None)?;
    let measured = measure(&mut stage, Duration::from_secs(idle_secs));
    stage.stop();
    let swept = sweep(&stage.dir, Keep::Nothing);
    measured.and(swept)
}

fn measure(stage: &mut Stage, window: Duration) -> anyhow::Result<()> {
    stage.start_hub()?;
    stage.start_device_with(DEVICE, "")?;
    let versions = ["v1", "v2"].map(|name| Version { name, ready: true });
    for (archive, version) in image::build(&stage.dir, &versions)?.iter().zip(versions) {
        let name = format!("web:{}", version.name);
        let archive = archive.display().to_string();
        let import = ["image", "import", &archive, "--name", &name];
        ensure!(
            stage.show(&import)?.success(),
            "the image could not be imported"
        );
    }
    for count in [1, 10, 50] {
        for (index, services) in split(count).into_iter().enumerate() {
            apply(stage, &format!("crowd{index}"), "v1", services, "")?;
        }
        await_containers(stage, count, None)?;
        idle(stage, count, window)?;
    }
    update(stage)?;
    readopt(stage)?;
    probe(stage, window)
}

/// How many services each app has.
fn split(count: usize) -> Vec<usize> {
    (0..count.div_ceil(PER_APP))
        .map(|index| (count - index * PER_APP).min(PER_APP))
        .collect()
}

fn apply(
    stage: &Stage,
    app: &str,
    version: &str,
    services: usize,
    more: &str,
) -> anyhow::Result<()> {
    let mut text = format!(
        "apiVersion: foreshore/v1\nkind: App\nmetadata: {{name: {app}}}\nspec:\n  services:\n"
    );
    for number in 0..services {
        writeln!(
            text,
            "    s{number:02}: {{image: 'hub.internal/web:{version}', mem_limit: 16m, stop_grace_period: 1s{more}}}"
        )?;
    }
    text.push_str(
        "  rollout: {waves: [{percent: 100}], soak: 1s, bake: 1s, maxUnavailable: 100%}\n",
    );
    let manifest = stage.dir.join(format!("{app}.yaml"));
    fs::write(&manifest, text)?;
    stage.json(&["apply", "-f", &manifest.display().to_string()])?;
    wait_for("the rollout to complete", PATIENCE, || {
        let rollout = stage.json(&["rollout", "status", app])?;
        Ok((rollout["state"] == "completed").then_some(()))
    })
}

fn status_file(stage: &Stage) -> PathBuf {
    stage.dir.join(DEVICE).join("run/status.json")
}

/// Waits until the agent says that `count` containers run, having said so after `after`; when it did.
fn await_containers(
    stage: &Stage,
    count: usize,
    after: Option<std::time::SystemTime>,
) -> anyhow::Result<std::time::SystemTime> {
    let path = status_file(stage);
    wait_for("the containers to run", PATIENCE, || {
        let Ok(bytes) = fs::read(&path) else {
            return Ok(None);
        };
        let written = fs::metadata(&path)?.modified()?;
        let status: Value = serde_json::from_slice(&bytes).unwrap_or_default();
        let containers = status["containers"].as_array().into_iter().flatten();
        let running = containers.filter(|container| container["state"] == "running");
        let is_new = after.is_none_or(|after| written > after);
        Ok((is_new && running.count() == count).then_some(written))
    })
}

fn agent(stage: &Stage) -> anyhow::Result<Process> {
    let device = stage.device(DEVICE)?;
    device.agent.process().context("the agent does not run")
}

fn pass(window: Duration) -> anyhow::Result<()> {
    let begin = Instant::now();
    while begin.elapsed() < window {
        interrupt::check()?;
        // The one thing here that is a wait: a window has to pass.
        std::thread::sleep(Duration::from_millis(100).min(window));
    }
    Ok(())
}

fn idle(stage: &Stage, count: usize, window: Duration) -> anyhow::Result<()> {
    let agent = agent(stage)?;
    // What was just started is still being told to the hub.
    pass(Duration::from_secs(10))?;
    let (woken, wrote) = (switches(agent)?, written(agent)?);
    eprintln!(
        "    watching the idle agent of {count} containers for {} s",
        window.as_secs()
    );
    pass(window)?;
    let (woken, wrote) = (switches(agent)? - woken, written(agent)? - wrote);
    let seconds = window.as_secs_f64();
    println!(
        "{:<38} {:>9.3} wake-ups a second, {:.0} KiB written to disk an hour (from {seconds:.0} s)",
        format!("agent, idle, {count} containers"),
        number(woken) / seconds,
        number(wrote) / 1024.0 * 3600.0 / seconds
    );
    Ok(())
}

/// Replaces the containers of one app of 25 by those of another version whose layer is there already.
fn update(stage: &Stage) -> anyhow::Result<()> {
    let agent = agent(stage)?;
    let before = written(agent)?;
    apply(stage, "crowd1", "v2", PER_APP, "")?;
    await_containers(stage, 2 * PER_APP, None)?;
    println!(
        "{:<38} {:>9.0} KiB written to disk by the agent, its helpers included, layers left out",
        format!("update of {PER_APP} services"),
        number(written(agent)? - before) / 1024.0
    );
    Ok(())
}

fn readopt(stage: &Stage) -> anyhow::Result<()> {
    let before = agent(stage)?;
    let killed = std::time::SystemTime::now();
    before.signal(libc::SIGKILL);
    let said = await_containers(stage, 2 * PER_APP, Some(killed))?;
    let begun = started(agent(stage)?)?;
    let took = said.duration_since(begun).unwrap_or_default();
    println!(
        "{:<38} {:>9.0} ms from its start until it has told all of them (to 10 ms)",
        format!("agent takes {} containers over", 2 * PER_APP),
        took.as_secs_f64() * 1000.0
    );
    Ok(())
}

/// What a probe that runs a command costs in CPU time, agent and helpers together; the command itself does nothing.
fn probe(stage: &Stage, window: Duration) -> anyhow::Result<()> {
    let more = format!(
        ", probes: {{liveness: {{exec: {{command: [/web, check]}}, period: {}s, timeout: 30s}}}}",
        PROBE_PERIOD.as_secs()
    );
    apply(stage, "crowd0", "v1", 1, &more)?;
    apply(stage, "crowd1", "v1", 1, "")?;
    await_containers(stage, 2, None)?;
    let agent = agent(stage)?;
    pass(Duration::from_secs(5))?;
    let before = cpu_ticks(agent)?;
    pass(window)?;
    let ticks = cpu_ticks(agent)? - before;
    let runs = window.as_secs_f64() / PROBE_PERIOD.as_secs_f64();
    println!(
        "{:<38} {:>9.1} ms of CPU time each ({runs:.0} runs)",
        "probe that runs a command",
        number(ticks) * 1000.0 / ticks_a_second() / runs
    );
    Ok(())
}

/// Bytes that a process and the children it waited for caused to be written to a disk (proc_pid_io(5)).
fn written(process: Process) -> anyhow::Result<u64> {
    let text = fs::read_to_string(format!("/proc/{}/io", process.pid))?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("write_bytes: "));
    Ok(line.context("no write_bytes in io")?.trim().parse()?)
}

/// CPU time of a process and the children it waited for (proc_pid_stat(5), fields 14 to 17).
fn cpu_ticks(process: Process) -> anyhow::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{}/stat", process.pid))?;
    let (_, fields) = stat.rsplit_once(") ").context("not a stat file")?;
    let times = fields.split(' ').skip(11).take(4);
    Ok(times.filter_map(|ticks| ticks.parse::<u64>().ok()).sum())
}

/// When a process was started, by the wall clock.
fn started(process: Process) -> anyhow::Result<std::time::SystemTime> {
    let up: f64 = fs::read_to_string("/proc/uptime")?
        .split(' ')
        .next()
        .context("no uptime")?
        .parse()?;
    let age = up - number(process.start) / ticks_a_second();
    Ok(std::time::SystemTime::now() - Duration::from_secs_f64(age.max(0.0)))
}

fn ticks_a_second() -> f64 {
    #[expect(
        unsafe_code,
        reason = "sysconf(3) has no safe wrapper in the standard library"
    )]
    // SAFETY: sysconf takes a plain number.
    let ticks = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    number(u64::try_from(ticks).unwrap_or(100))
}

fn number(count: u64) -> f64 {
    f64::from(u32::try_from(count).unwrap_or(u32::MAX))
}
