//! Bombs beside a well-behaved app, for minutes. `cargo xtask soak` runs it.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use e2e::{Bed, noise};

/// The neighbour's 99th percentile may grow by this part beside one bomb.
const GROWTH_MAX: f64 = 0.2;

/// And be so long, in milliseconds, while all go off at once: then more want to run than there are cores, and the kernel
/// lets whoever was woken wait for the slices of others.
const TOGETHER_MAX_MS: f64 = 10.0;

fn main() -> anyhow::Result<()> {
    let minutes: f64 = std::env::args()
        .nth(1)
        .and_then(|text| text.parse().ok())
        .filter(|minutes| *minutes > 0.0 && *minutes <= 100_000.0)
        .context("usage: soak MINUTES")?;
    // Two quiet phases, one for each bomb, and all at once.
    let time = Duration::from_secs_f64(minutes * 60.0 / 8.0);
    println!("each phase takes {:.0} s", time.as_secs_f64());
    let bed = Bed::new("soak");
    let phases = noise::run(&bed, time, &mut |phase| println!("{phase}"));
    let quiet = noise::quiet_p99(&phases);
    let worst = phases
        .iter()
        .filter(|phase| phase.name != noise::ALL)
        .max_by(|a, b| a.p99.total_cmp(&b.p99))
        .context("nothing was measured")?;
    let growth = worst.p99 / quiet - 1.0;
    let failed: usize = phases.iter().map(|phase| phase.failed).sum();
    println!(
        "worst p99 beside one bomb {:.2} ms ({}), {:+.0} % of the quiet {quiet:.2} ms; {failed} requests failed",
        worst.p99,
        worst.name,
        growth * 100.0
    );
    ensure!(failed == 0, "{failed} requests to the neighbour failed");
    ensure!(
        growth <= GROWTH_MAX,
        "the neighbour's p99 grew by {:.0} %, more than {:.0} %",
        growth * 100.0,
        GROWTH_MAX * 100.0
    );
    let together = phases.iter().filter(|phase| phase.name == noise::ALL);
    let together = together.map(|phase| phase.p99).fold(0.0, f64::max);
    ensure!(
        together <= TOGETHER_MAX_MS,
        "the neighbour's p99 was {together:.2} ms beside all bombs at once, more than {TOGETHER_MAX_MS} ms"
    );
    Ok(())
}
