//! `cargo xtask soak`: bombs beside a well-behaved app, for minutes.

use anyhow::ensure;
use clap::Args;

use crate::{packages, step};

/// Options of `soak`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// How long it takes in all: an eighth for each of five bombs, for all at once, and for the quiet before and after
    #[arg(long, default_value_t = 16.0)]
    minutes: f64,
}

/// Builds with optimization and runs it.
///
/// # Errors
///
/// When the device or the neighbour suffers, the neighbour's 99th percentile grows by more than 20 % beside one bomb, or
/// exceeds 10 ms beside all at once.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    ensure!(
        crate::is_root(),
        "the soak starts containers and mounts a file system: run as root"
    );
    packages::install(packages::FOR_TESTS)?;
    let minutes = options.minutes.to_string();
    step::run(
        "soak",
        &mut step::cargo(&[
            "run",
            "--quiet",
            "--release",
            "-p",
            "e2e",
            "--bin",
            "soak",
            "--",
            &minutes,
        ]),
    )
}
