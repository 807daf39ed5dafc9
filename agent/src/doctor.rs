//! `foreshore-agent doctor`: looks at the device and names the fix for whatever keeps containers from running well.
//!
//! ```text
//! gather ── files of the kernel, with bounds ──┐
//!    └── attempt ── real tries, each a child ──┴─> Facts ──> judge (pure) ──> Report ──> text or JSON
//! ```
//!
//! It leaves nothing behind: mounts are in a private namespace of a child, scratch files are removed, and no session
//! is opened with the hub.

pub mod attempt;
mod facts;
mod finding;
mod gather;
#[deny(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    clippy::disallowed_macros,
    clippy::wildcard_enum_match_arm
)]
mod judge;

use std::path::Path;

pub(crate) use facts::{mount_of, parse_mounts};
pub use finding::{Check, CheckId, Level, Report};

/// Looks at this device. `program` is the agent's own program, which is started for the tries; `config` its
/// configuration, whose absence is a finding. Blocks for at most some 25 s; starts no thread.
#[must_use]
pub fn examine(program: &Path, config: &Path) -> Report {
    judge::judge(&gather::gather(program, config))
}
