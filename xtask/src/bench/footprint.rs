//! Sizes, memory and wake-ups of the programs on a device, built with the `device` profile.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};

use crate::step;

/// Builds agent and hub, runs one of each with a container, and reports.
///
/// # Errors
///
/// When they cannot be built or do not connect.
pub(super) fn run(idle_secs: u64) -> anyhow::Result<()> {
    step::run(
        "build the agent for devices",
        &mut step::cargo(&[
            "build",
            "--quiet",
            "--profile",
            "device",
            "-p",
            "foreshore-agent",
        ]),
    )?;
    step::run(
        "build the hub",
        &mut step::cargo(&["build", "--quiet", "--release", "-p", "foreshore-hub"]),
    )?;
    let target = target_dir()?;
    let (agent, hub) = (
        target.join("device/foreshore-agent"),
        target.join("release/foreshore-hub"),
    );
    println!("\nfootprint");
    for (name, path) in [("agent, shim embedded", &agent), ("hub", &hub)] {
        println!(
            "{name:<34} {:>9.2} MiB on disk",
            megabytes(std::fs::metadata(path)?.len())
        );
    }

    let dir = tempdir()?;
    let result = measure(&dir, &agent, &hub, idle_secs);
    let _best_effort = Command::new(&agent)
        .args(["remove-all", "--config"])
        .arg(dir.join("agent.toml"))
        .output();
    std::fs::remove_dir_all(&dir).with_context(|| format!("failed to remove {}", dir.display()))?;
    result
}

fn measure(dir: &Path, agent: &Path, hub: &Path, idle_secs: u64) -> anyhow::Result<()> {
    let config = dir.join("hub.toml");
    std::fs::write(
        &config,
        format!(
            "data = \"{}\"\n[api]\nlisten = \"127.0.0.1:0\"\n[broker]\nkind = \"embedded\"\nlisten = \"127.0.0.1:0\"\n",
            dir.join("hub").display()
        ),
    )?;
    let hub = Killed(start(hub, &config, &dir.join("hub.log"))?);
    let endpoints = wait_for("the hub", || {
        let text = std::fs::read_to_string(dir.join("hub/endpoints.json")).ok()?;
        serde_json::from_str::<serde_json::Value>(&text).ok()
    })?;
    let config = dir.join("agent.toml");
    let parent = format!("foreshore-bench-{}", std::process::id());
    std::fs::write(
        &config,
        format!(
            "device = \"bench\"\n[hub]\nbroker = {}\nregistry = {}\njoin_token_file = \"{}\"\n[paths]\nstate = \"{}\"\nrun = \"{}\"\n[cgroup]\nparent = \"{parent}\"\n",
            endpoints["broker"],
            endpoints["api"],
            dir.join("hub/join-token").display(),
            dir.join("state").display(),
            dir.join("run").display(),
        ),
    )?;
    let agent = Killed(start(agent, &config, &dir.join("agent.log"))?);
    let log = dir.join("agent.log");
    wait_for("the agent to connect", || {
        std::fs::read_to_string(&log)
            .ok()?
            .contains("connected")
            .then_some(())
    })?;

    let before = switches(agent.pid())?;
    let begin = Instant::now();
    eprintln!("    watching the idle agent for {idle_secs} s");
    // The one thing here that is a wait: an idle window has to pass.
    std::thread::sleep(Duration::from_secs(idle_secs));
    let seconds = begin.elapsed().as_secs_f64();
    for (name, pid) in [
        ("agent, idle, connected, plain MQTT", agent.pid()),
        ("hub, idle, one device", hub.pid()),
    ] {
        let (pss, private) = memory(pid)?;
        println!("{name:<34} {pss:>9} KiB Pss {private:>8} KiB private dirty");
    }
    for daemon in ["dockerd", "containerd"] {
        if let Some(pid) = find(daemon) {
            let (pss, private) = memory(pid)?;
            println!("{daemon:<34} {pss:>9} KiB Pss {private:>8} KiB private dirty");
        }
    }
    let wakes = (switches(agent.pid())?.saturating_sub(before)) as f64 / seconds;
    println!(
        "{:<34} {wakes:>9.3} wake-ups a second over {seconds:.0} s",
        "agent, idle"
    );
    Ok(())
}

/// A child that does not outlive this.
struct Killed(Child);

impl Killed {
    fn pid(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Killed {
    fn drop(&mut self) {
        let _gone_already = self.0.kill();
        let _reaped = self.0.wait();
    }
}

fn start(program: &Path, config: &Path, log: &Path) -> anyhow::Result<Child> {
    let file = std::fs::File::create(log)?;
    Command::new(program)
        .args(["run", "--config"])
        .arg(config)
        .stdin(Stdio::null())
        .stdout(file.try_clone()?)
        .stderr(file)
        .spawn()
        .with_context(|| format!("failed to start {}", program.display()))
}

fn wait_for<T>(what: &str, mut probe: impl FnMut() -> Option<T>) -> anyhow::Result<T> {
    let begin = Instant::now();
    loop {
        if let Some(found) = probe() {
            return Ok(found);
        }
        if begin.elapsed() > Duration::from_secs(30) {
            bail!("waited 30 s for {what}");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn tempdir() -> anyhow::Result<PathBuf> {
    let dir = std::env::temp_dir().join(format!("foreshore-bench-{}", std::process::id()));
    std::fs::create_dir(&dir).with_context(|| format!("failed to create {}", dir.display()))?;
    Ok(dir)
}

fn target_dir() -> anyhow::Result<PathBuf> {
    let output = step::cargo(&["metadata", "--format-version", "1", "--no-deps"]).output()?;
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    metadata["target_directory"]
        .as_str()
        .map(PathBuf::from)
        .context("cargo names its target directory")
}

fn megabytes(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// Pss and private dirty memory in KiB (proc_pid_smaps(5)).
fn memory(pid: u32) -> anyhow::Result<(u64, u64)> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().strip_suffix(" kB")?.trim().parse().ok()
    };
    Ok((
        field("Pss:").context("no Pss")?,
        field("Private_Dirty:").context("no Private_Dirty")?,
    ))
}

/// Voluntary context switches of all threads: how often it woke up.
fn switches(pid: u32) -> anyhow::Result<u64> {
    let mut total = 0;
    for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let status = std::fs::read_to_string(task?.path().join("status"))?;
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        total += line
            .and_then(|count| count.trim().parse::<u64>().ok())
            .unwrap_or(0);
    }
    Ok(total)
}

fn find(name: &str) -> Option<u32> {
    std::fs::read_dir("/proc")
        .ok()?
        .flatten()
        .find_map(|entry| {
            let pid = entry.file_name().to_str()?.parse().ok()?;
            let comm = std::fs::read_to_string(entry.path().join("comm")).ok()?;
            (comm.trim() == name).then_some(pid)
        })
}
