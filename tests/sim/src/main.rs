//! `foreshore-sim`: runs the simulator over many seeds.

use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use clap::Parser;
use foreshore_sim::{Failure, try_seed};

/// Runs hub and devices on virtual time, one run for each seed
#[derive(Debug, Parser)]
#[command(name = "foreshore-sim")]
struct Arguments {
    /// How many seeds to run
    #[arg(long, default_value_t = 1000)]
    seeds: u64,
    /// The first seed
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Devices in every run, instead of what the seed says
    #[arg(long)]
    devices: Option<usize>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let began = Instant::now();
    let next = AtomicU64::new(0);
    let (mut events, mut hours, mut rollouts, mut failures) = (0, 0, 0, Vec::new());
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|_| scope.spawn(|| work(&arguments, &next)))
            .collect();
        for worker in workers {
            let done = worker.join().expect("a panic in a run is printed above");
            events += done.events;
            hours += done.virtual_ms / 3_600_000;
            rollouts += done.rollouts;
            failures.extend(done.failures);
        }
    });
    failures.sort_by_key(|failure: &Failure| failure.seed);
    for failure in &failures {
        println!("{failure}\n");
    }
    eprintln!(
        "{} seeds, {rollouts} rollouts, {hours} virtual hours, {events} events in {:.1} s; {} failed",
        arguments.seeds,
        began.elapsed().as_secs_f64(),
        failures.len()
    );
    if failures.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

#[derive(Default)]
struct Done {
    events: u64,
    virtual_ms: u64,
    rollouts: u64,
    failures: Vec<Failure>,
}

fn work(arguments: &Arguments, next: &AtomicU64) -> Done {
    let mut done = Done::default();
    loop {
        let offset = next.fetch_add(1, Ordering::Relaxed);
        if offset >= arguments.seeds || done.failures.len() >= 5 {
            return done;
        }
        match try_seed(arguments.seed + offset, arguments.devices, None) {
            Ok(outcome) => {
                done.events += outcome.events;
                done.virtual_ms += outcome.virtual_ms;
                done.rollouts += outcome.rollouts as u64;
            }
            Err(failure) => done.failures.push(failure),
        }
    }
}
