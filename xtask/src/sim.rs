//! `cargo xtask sim`: the simulator with any number of seeds.

use clap::Args;

use crate::step;

/// Options of `sim`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// How many seeds to run
    #[arg(long, default_value_t = 1000)]
    seeds: u64,
    /// The first seed; with --seeds 1, replays exactly that one
    #[arg(long)]
    seed: Option<u64>,
}

/// Builds the simulator with optimization and runs it.
///
/// # Errors
///
/// When a seed fails; the simulator has printed it.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let mut command = step::cargo(&["run", "--quiet", "--release", "-p", "foreshore-sim", "--"]);
    // A seed alone means "that one".
    let seeds = if options.seed.is_some() && options.seeds == 1000 {
        1
    } else {
        options.seeds
    };
    command.args(["--seeds", &seeds.to_string()]);
    if let Some(seed) = options.seed {
        command.args(["--seed", &seed.to_string()]);
    }
    step::run("simulator", &mut command)
}
