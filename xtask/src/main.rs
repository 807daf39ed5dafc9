//! Development tasks. `cargo xtask` lists them.
//!
//! Everything here is set-up and long recipes: the programs' own logic lives in their crates.

use std::process::ExitCode;

use clap::{Parser, Subcommand};

mod bench;
mod cross;
mod cuts;
mod demo;
mod fuzz;
mod guest;
mod packages;
mod sim;
mod soak;
mod step;
mod test;

/// Foreshore's development tasks
#[derive(Debug, Parser)]
#[command(
    name = "cargo xtask",
    bin_name = "cargo xtask",
    arg_required_else_help = true
)]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Show the main job on this machine: one hub, five devices, three versions (needs root)
    Demo(demo::Options),
    /// Install what the tests need from Debian's packages where possible, then run every test (needs root)
    Test(test::Options),
    /// Run the device's tests in a virtual machine with nothing but cgroup v2
    Guest(guest::Options),
    /// Fuzz everything that reads what comes from outside, with coverage guidance (needs root)
    Fuzz(fuzz::Options),
    /// Run the seeded simulator: hub and devices on virtual time
    Sim(sim::Options),
    /// Let fork, memory, log, disk and inode bombs go off beside a well-behaved app (needs root)
    Soak(soak::Options),
    /// Measure Foreshore beside its peers in one run; reports only (needs root)
    Bench(bench::Options),
    /// Kill the agent many times at every kill point and check what comes after (needs root)
    Cuts(cuts::Options),
    /// Build the agent as one static program for x86_64, aarch64 and armv7, or say what that needs
    Cross(cross::Options),
}

fn main() -> ExitCode {
    let done = match Arguments::parse().task {
        Task::Demo(options) => demo::run(&options),
        Task::Test(options) => test::run(&options),
        Task::Guest(options) => guest::run(&options),
        Task::Fuzz(options) => fuzz::run(&options),
        Task::Sim(options) => sim::run(&options),
        Task::Soak(options) => soak::run(&options),
        Task::Bench(options) => bench::run(&options),
        Task::Cuts(options) => cuts::run(&options),
        Task::Cross(options) => cross::run(&options),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether this process may start containers.
fn is_root() -> bool {
    #[expect(
        unsafe_code,
        reason = "geteuid(2) has no safe wrapper in the standard library"
    )]
    // SAFETY: geteuid takes nothing and cannot fail.
    let user = unsafe { libc::geteuid() };
    user == 0
}
