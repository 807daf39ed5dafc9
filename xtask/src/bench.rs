//! `cargo xtask bench`: figures, side by side in one run. Nothing fails on time.

use std::process::Command;

use anyhow::{Context as _, ensure};
use clap::Args;

use self::docker::Docker;
use crate::{packages, step};

mod conmon;
mod crowd;
mod delta;
mod docker;
mod footprint;
mod ledger;
mod mounts;
mod pull;
mod rollout;
mod wire;

/// Options of `bench`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Rounds of the container lifecycle; peers are interleaved within each
    #[arg(long, default_value_t = 50)]
    count: u32,
    /// How long to watch an idle agent for wake-ups, in seconds
    #[arg(long, default_value_t = 60)]
    idle_secs: u64,
    /// Rounds of pulling an image; peers are interleaved within each
    #[arg(long, default_value_t = 5)]
    pulls: u32,
    /// Reports of devices in a rollout, for each number of devices
    #[arg(long, default_value_t = 2_000)]
    reports: u32,
    /// Numbers of simulated devices; as many as there are file descriptors for have real sessions
    #[arg(long, value_delimiter = ',', default_values_t = [1_000, 3_800, 10_000])]
    devices: Vec<usize>,
    /// Figures of simulated devices for programs
    #[arg(short, long)]
    output: Option<Output>,
    /// Take agent, hub and command line from this directory instead of building them
    #[arg(long)]
    programs: Option<std::path::PathBuf>,
    /// Only these parts
    #[arg(long, value_enum)]
    only: Vec<Part>,
}

/// The parts of the bench.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    /// Container lifecycle beside crun, runc and docker
    Lifecycle,
    /// Binary sizes, memory and wake-ups of agent and shim
    Footprint,
    /// Idle wake-ups and bytes written with 1, 10 and 50 containers, an update, re-adoption, a probe's command
    Crowd,
    /// Pulling and unpacking an image beside docker, podman, skopeo and umoci
    Pull,
    /// Bytes of deltas between rebuilt images, and applying them
    Delta,
    /// The list of a layer's files: time and bytes
    Ledger,
    /// A device's report in rollouts of 1,000, 10,000 and 100,000 devices
    Rollout,
    /// An update of many simulated devices on one hub: times, messages and bytes, what it costs the hub
    Fleet,
}

/// How figures are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Output {
    /// For programs.
    Json,
}

/// Runs the parts asked for.
///
/// # Errors
///
/// When a part cannot run at all.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    ensure!(crate::is_root(), "the bench starts containers: run as root");
    if let Err(error) = packages::install(packages::FOR_BENCH) {
        eprintln!("{error:#}: peers that are missing are left out");
    }
    let wanted = |part| options.only.is_empty() || options.only.contains(&part);
    machine();
    if wanted(Part::Lifecycle) {
        lifecycle(options.count)?;
    }
    if wanted(Part::Footprint) {
        footprint::run(options.programs.as_deref(), options.idle_secs)?;
    }
    if wanted(Part::Crowd) {
        crowd::run(options.programs.as_deref(), options.idle_secs)?;
    }
    if wanted(Part::Pull) {
        pull::run(options.programs.as_deref(), options.pulls)?;
    }
    if wanted(Part::Delta) {
        delta::run(options.programs.as_deref())?;
    }
    if wanted(Part::Ledger) {
        ledger::run(options.pulls)?;
    }
    if wanted(Part::Rollout) {
        rollout::run(options.reports)?;
    }
    if wanted(Part::Fleet) {
        fleet(&options.devices, options.output)?;
    }
    Ok(())
}

/// Says what the figures were taken on.
fn machine() {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let cpus = std::thread::available_parallelism().map_or(0, usize::from);
    let model = read("/proc/cpuinfo")
        .lines()
        .find_map(|line| line.strip_prefix("model name\t: ").map(str::to_owned));
    println!(
        "machine: {cpus} cores, {}, Linux {}",
        model.unwrap_or_default(),
        read("/proc/sys/kernel/osrelease").trim()
    );
    println!("load before: {}", read("/proc/loadavg").trim());
}

fn lifecycle(count: u32) -> anyhow::Result<()> {
    step::run(
        "build the lifecycle bench",
        &mut step::cargo(&[
            "bench",
            "-p",
            "foreshore-agent",
            "--bench",
            "lifecycle",
            "--no-run",
        ]),
    )?;
    println!("\ncontainer lifecycle (milliseconds; interleaved rounds)");
    // crun 1.8 refuses a hybrid cgroup hierarchy, so the unified mount is taken away in a namespace of
    // our own; every runtime runs in the same one.
    let script =
        "mountpoint -q /sys/fs/cgroup/unified && umount /sys/fs/cgroup/unified; exec \"$@\"";
    let dir = tempfile::tempdir()?;
    let docker = Docker::start(&dir.path().join("docker"))
        .inspect_err(|error| eprintln!("docker: left out: {error:#}"))
        .ok();
    let mut command = Command::new("unshare");
    if let Some(docker) = &docker {
        command.env("DOCKER_HOST", docker.address());
    }
    command
        .args([
            "--mount",
            "--propagation",
            "private",
            "sh",
            "-c",
            script,
            "sh",
        ])
        .arg(std::env::var_os("CARGO").context("cargo sets CARGO for its tasks")?)
        .args([
            "bench",
            "--quiet",
            "-p",
            "foreshore-agent",
            "--bench",
            "lifecycle",
        ])
        .env("FORESHORE_BENCH_COUNT", count.to_string())
        .current_dir(step::root());
    step::run("container lifecycle", &mut command)?;
    drop(docker);
    mounts::clean(dir.path())
}

fn fleet(devices: &[usize], output: Option<Output>) -> anyhow::Result<()> {
    eprintln!("\nsimulated devices on one hub (no containers)");
    let counts: Vec<String> = devices.iter().map(usize::to_string).collect();
    let mut bench = step::cargo(&[
        "run",
        "--quiet",
        "--release",
        "-p",
        "e2e",
        "--bin",
        "fleet-bench",
        "--",
        "--devices",
    ]);
    bench.arg(counts.join(","));
    if output == Some(Output::Json) {
        bench.args(["-o", "json"]);
    }
    step::run("fleet", &mut bench)
}
