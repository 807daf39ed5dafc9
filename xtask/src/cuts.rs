//! `cargo xtask cuts`: the power-cut test, many times at every kill point.

use clap::Args;

use crate::{packages, step};

/// Options of `cuts`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Cuts at each kill point
    #[arg(long, default_value_t = 20)]
    runs: u64,
    /// Decides order and moments
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Only this kill point, for example head.renamed
    #[arg(long)]
    point: Option<String>,
}

/// Runs the test; it prints how many cuts there were.
///
/// # Errors
///
/// When it fails, or this is not root.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    anyhow::ensure!(
        crate::is_root(),
        "the test starts real containers: run as root"
    );
    packages::install(packages::FOR_TESTS)?;
    let test = [
        "test",
        "-p",
        "foreshore-agent",
        "--test",
        "power_cut",
        "the_power_may_be_cut",
        "--",
        "--nocapture",
    ];
    let mut command = step::cargo(&test);
    command
        .env("FORESHORE_CUTS", options.runs.to_string())
        .env("FORESHORE_CUT_SEED", options.seed.to_string());
    if let Some(point) = &options.point {
        command.env("FORESHORE_CUT_POINT", point);
    }
    step::run("power cuts", &mut command)
}
