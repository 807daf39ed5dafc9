//! Running one command as a named step, with its time.

use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context as _, bail};

/// The root of the checkout.
pub(crate) fn root() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

/// A cargo command in the root of the checkout.
pub(crate) fn cargo(arguments: &[&str]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(arguments).current_dir(root());
    // What the outer cargo says about this package would make build scripts that look at it run again and again.
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy();
        if name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_") {
            command.env_remove(&*name);
        }
    }
    command
}

/// Runs `command` as the step `name`, its output on ours.
///
/// # Errors
///
/// When it cannot be started or ends with another status than 0.
pub(crate) fn run(name: &str, command: &mut Command) -> anyhow::Result<()> {
    eprintln!("==> {name}");
    let begin = Instant::now();
    let status = command
        .status()
        .with_context(|| format!("failed to start {:?}", command.get_program()))?;
    let seconds = begin.elapsed().as_secs();
    if !status.success() {
        bail!("{name} ended with {status} after {seconds} s");
    }
    eprintln!("    {name}: {seconds} s");
    Ok(())
}
