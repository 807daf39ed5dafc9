//! What a device's report costs the hub, by the number of devices in the rollout.

use anyhow::ensure;

use crate::step;

/// The numbers of devices.
const FLEETS: [u32; 3] = [1_000, 10_000, 100_000];

/// Runs the part: each number of devices in a process of its own.
///
/// # Errors
///
/// When the hub's part cannot be built or ends with an error.
pub(super) fn run(reports: u32) -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    println!(
        "\na device's report, by the number of devices in the rollout, at most {reports} reports each"
    );
    println!(
        "{:>8} {:>9} {:>9} {:>9} {:>11} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9} {:>7} {:>9} {:>9} {:>9}",
        "devices",
        "engine µs",
        "p99",
        "max",
        "all at once",
        "commit µs",
        "report µs",
        "p99",
        "batch µs",
        "open s",
        "cold s",
        "bytes",
        "apply s",
        "worst s",
        "told s"
    );
    for devices in FLEETS {
        let mut bench = step::cargo(&[
            "run",
            "--quiet",
            "--release",
            "-p",
            "foreshore-hub",
            // No broker takes part.
            "--no-default-features",
            "--example",
            "rollout",
            "--",
        ]);
        bench.arg(devices.to_string()).arg(reports.to_string());
        let status = bench.arg(dir.path()).status()?;
        ensure!(status.success(), "the bench ended with {status}");
    }
    println!(
        "engine: advance and apply, in memory; all at once: the same looking at every device, ms; commit: a change of one \
         row; report: taken in and decided on, each in transactions of its own; batch: each of 100 together; cold: the \
         first after a start; bytes: memory for each device; apply: a release for everybody at once; worst: the longest look \
         after it; told: until everybody is to be told. Medians where nothing else is said"
    );
    Ok(())
}
