//! The seeded simulator: one hub and many devices on virtual time.
//!
//! Hub and devices decide with the very code that ships: [`foreshore_hub::rollout`] and
//! [`foreshore_agent::plan`]. Everything around them is made up from a seed: the network loses, repeats and
//! reorders messages, the broker forgets, processes and power die between any two steps, releases misbehave,
//! operators change their minds. After every event the rules of both crates and those of this one are asked; in
//! the end the network is whole and everything must come to rest.
//!
//! | file | what it owns |
//! |---|---|
//! | [`scenario`] | what a seed makes of a run |
//! | [`simulation`] | the event queue, the network, what happens |
//! | [`hub`] | the hub's store around the real `advance` |
//! | [`device`] | disk, kernel and containers around the real `plan` |
//! | [`mutation`] | faults built in on purpose, to show that they are noticed |
//! | [`random`] | numbers from a seed |

pub mod device;
pub mod hub;
pub mod mutation;
pub mod random;
pub mod scenario;
pub mod simulation;

use std::fs;
use std::path::PathBuf;

use mutation::Mutation;
use simulation::{Outcome, run};

/// A run that broke a rule.
#[derive(Debug, Clone)]
pub struct Failure {
    /// Its seed.
    pub seed: u64,
    /// What was broken.
    pub violations: Vec<String>,
    /// Where the event log is, if it could be written.
    pub log: Option<PathBuf>,
    /// With so many devices, if that was asked for.
    pub devices: Option<usize>,
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "seed {} breaks a rule:", self.seed)?;
        for violation in self.violations.iter().take(10) {
            writeln!(f, "  {violation}")?;
        }
        if let Some(log) = &self.log {
            writeln!(f, "event log: {}", log.display())?;
        }
        match self.devices {
            None => write!(f, "replay: cargo xtask sim --seed {}", self.seed),
            Some(devices) => {
                write!(
                    f,
                    "replay: cargo run -p foreshore-sim -- --seeds 1 --seed {} --devices {devices}",
                    self.seed
                )
            }
        }
    }
}

/// Runs one seed. If it breaks a rule, runs it once more to write down its events.
///
/// # Errors
///
/// [`Failure`] if it broke a rule.
pub fn try_seed(
    seed: u64,
    devices: Option<usize>,
    mutation: Option<Mutation>,
) -> Result<Outcome, Failure> {
    let outcome = run(seed, devices, mutation, false);
    if outcome.violations.is_empty() {
        return Ok(outcome);
    }
    let replayed = run(seed, devices, mutation, true);
    let mut text = replayed.log.join("\n");
    text.push('\n');
    for violation in &replayed.violations {
        text.push_str(violation);
        text.push('\n');
    }
    let path = std::env::temp_dir().join(format!("foreshore-sim-{seed}.log"));
    let log = fs::write(&path, text).is_ok().then_some(path);
    Err(Failure {
        seed,
        violations: outcome.violations,
        log,
        devices,
    })
}
