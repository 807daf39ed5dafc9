//! `cargo xtask test`: everything that CI runs.

use std::num::NonZero;
use std::time::Instant;

use anyhow::ensure;
use clap::Args;

use crate::{guest, packages, step};

/// Options of `test`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Do not install packages; fail if one is missing
    #[arg(long)]
    no_install: bool,
}

/// Runs every check and test; goes on after a failure so that one run shows all.
///
/// # Errors
///
/// With the names of the steps that failed.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    ensure!(
        crate::is_root(),
        "the tests start real containers: run as root (sudo -E env \"PATH=$PATH\" cargo xtask test)"
    );
    let begin = Instant::now();
    if !options.no_install {
        packages::install(packages::FOR_TESTS)?;
    }
    let mut failed = Vec::new();
    let mut step = |name: &str, command: &mut std::process::Command| {
        if let Err(error) = step::run(name, command) {
            eprintln!("    FAILED: {error:#}");
            failed.push(name.to_owned());
        }
    };
    if component("fmt") {
        step("formatting", &mut step::cargo(&["fmt", "--all", "--check"]));
    }
    if component("clippy") {
        let lints = [
            "clippy",
            "--quiet",
            "--workspace",
            "--all-targets",
            "--",
            "-D",
            "warnings",
        ];
        step(
            "lints, the purity guard among them",
            &mut step::cargo(&lints),
        );
    }
    // Every step below takes the whole workspace and then what it wants of it: with other packages cargo would join
    // other features, and build most dependencies again.
    step(
        "build",
        &mut step::cargo(&["test", "--workspace", "--no-run"]),
    );
    let quick = ["test", "--workspace", "--exclude", "e2e", "--no-fail-fast"];
    // Most tests wait for something most of the time.
    let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
    step(
        "unit, property, contract and simulator tests",
        step::cargo(&quick).env("RUST_TEST_THREADS", (2 * cores).to_string()),
    );
    // Their corpora were replayed above; this finds what is not in them yet.
    let fuzz = [
        "run",
        "--quiet",
        "--package",
        "xtask",
        "--",
        "fuzz",
        "--seconds",
        "3",
    ];
    step("every fuzz target for 3 s", &mut step::cargo(&fuzz));
    // Each starts a hub, brokers and several agents: a few at a time keep a small machine honest about time.
    let fleet = ["test", "--workspace", "--no-fail-fast", "--test", "fleet"];
    step(
        "end-to-end tests with real parts",
        step::cargo(&fleet).env("RUST_TEST_THREADS", (1 + cores).to_string()),
    );
    let bombs = [
        "test",
        "--workspace",
        "--no-fail-fast",
        "--test",
        "io",
        "--test",
        "limits",
    ];
    step(
        "what measures beside bombs, one at a time",
        step::cargo(&bombs).env("RUST_TEST_THREADS", "1"),
    );
    // The demo checks what it shows, so it is a test too: command line, hub and devices together.
    let demo = ["run", "--quiet", "--package", "xtask", "--", "demo"];
    step("the demo", &mut step::cargo(&demo));
    // Another kernel's cgroups than this machine has; and the only one whose power can be cut.
    let skipped = guest::missing(!options.no_install);
    if skipped.is_none() {
        let guest = [
            "run",
            "--quiet",
            "--package",
            "xtask",
            "--",
            "guest",
            "--no-install",
        ];
        step("the guest with cgroup v2", &mut step::cargo(&guest));
    }
    eprintln!("==> {} s in all", begin.elapsed().as_secs());
    if let Some(reason) = skipped {
        eprintln!("==> SKIPPED: the guest with cgroup v2 and its power cuts: {reason}");
    }
    ensure!(failed.is_empty(), "failed: {}", failed.join("; "));
    eprintln!("==> all passed");
    Ok(())
}

/// Whether a cargo component is installed; a toolchain without it still runs the tests.
fn component(name: &str) -> bool {
    let found = step::cargo(&[name, "--version"])
        .output()
        .is_ok_and(|output| output.status.success());
    if !found {
        eprintln!(
            "==> cargo {name} is not installed: skipped (rustup component add {})",
            if name == "fmt" { "rustfmt" } else { name }
        );
    }
    found
}
