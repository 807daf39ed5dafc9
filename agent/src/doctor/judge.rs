//! **Pure**: from what is known of the device to what is wrong with it and what to do about it.
//!
//! A fix is a command that can be pasted into a root shell, or the line and the file it goes into.

mod boot;
mod cgroup;
mod config;
mod host;
mod init;
mod network;
mod state;

use std::path::Path;

use super::facts::{Facts, Namespace, Tried};
use super::finding::{Check, CheckId, Report};

pub(crate) use self::boot::files as boot_files;

/// Looks at everything; one check for each [`CheckId`], in their order.
pub(crate) fn judge(facts: &Facts) -> Report {
    let checks = CheckId::ALL
        .into_iter()
        .map(|id| check(id, facts))
        .collect();
    Report { checks }
}

fn check(id: CheckId, facts: &Facts) -> Check {
    match id {
        CheckId::ConfigFile => config::file(facts),
        CheckId::ConfigSecrets => config::secrets(facts),
        CheckId::HostKernel => host::kernel(facts),
        CheckId::HostPrivileges => host::privileges(facts),
        CheckId::HostSeccomp => host::seccomp(facts),
        CheckId::HostShim => host::shim(facts),
        CheckId::CgroupVersion => cgroup::version(facts),
        CheckId::CgroupMemory => cgroup::controller(id, "memory", facts),
        CheckId::CgroupCpu => cgroup::controller(id, "cpu", facts),
        CheckId::CgroupPids => cgroup::controller(id, "pids", facts),
        CheckId::CgroupDevices => cgroup::devices(facts),
        CheckId::CgroupIo => cgroup::controller(id, "io", facts),
        CheckId::CgroupDelegation => cgroup::delegation(facts),
        CheckId::NamespaceMount => host::namespace(id, Namespace::Mount, facts),
        CheckId::NamespacePid => host::namespace(id, Namespace::Pid, facts),
        CheckId::NamespaceNetwork => host::namespace(id, Namespace::Network, facts),
        CheckId::NamespaceIpc => host::namespace(id, Namespace::Ipc, facts),
        CheckId::NamespaceUts => host::namespace(id, Namespace::Uts, facts),
        CheckId::NamespaceCgroup => host::namespace(id, Namespace::Cgroup, facts),
        CheckId::NamespaceUser => host::namespace(id, Namespace::User, facts),
        CheckId::StateFilesystem => state::filesystem(facts),
        CheckId::StateSpace => state::space(facts),
        CheckId::StateInodes => state::inodes(facts),
        CheckId::StateSync => state::sync(facts),
        CheckId::StateOverlay => state::overlay(facts),
        CheckId::StateIdmap => state::idmap(facts),
        CheckId::StateLock => state::lock(facts),
        CheckId::RunFilesystem => state::run(facts),
        CheckId::MemorySwap => host::swap(facts),
        CheckId::ClockWall => host::wall_clock(facts),
        CheckId::ClockBoottime => host::boot_clock(facts),
        CheckId::HubResolve => network::resolve(facts),
        CheckId::HubConnect => network::connect(facts),
        CheckId::HubTls => network::tls(facts),
        CheckId::RegistryReachable => network::registries(facts),
        CheckId::InitUnit => init::unit(facts),
        CheckId::InitNotify => init::notify(facts),
        CheckId::InitWatchdog => init::watchdog(facts),
    }
}

/// What is said of a try; `None` when it failed, which is for the caller to explain.
fn unless_failed(id: CheckId, tried: &Tried, works: &str, slow: &str) -> Result<Check, String> {
    match tried {
        Tried::Works => Ok(Check::ok(id, works)),
        Tried::Skipped(why) => Ok(Check::info(id, format!("not tried: {why}"))),
        Tried::TimedOut(seconds) => Ok(Check::error(
            id,
            format!("a try did not end within {seconds} s"),
            slow,
        )),
        Tried::Fails(why) => Err(why.clone()),
    }
}

/// What helps when the doctor is in a container that may too little.
fn privileged(kind: &str) -> String {
    match kind {
        "docker" | "podman" => format!(
            "run the agent on the device itself, or start this {kind} container with --privileged"
        ),
        _ => format!(
            "run the agent on the device itself, or make this {kind} container a privileged one"
        ),
    }
}

/// A path as a shell takes it.
fn quoted(path: &Path) -> String {
    let text = path.display().to_string();
    let plain = |at: char| {
        at.is_ascii_alphanumeric() || matches!(at, '/' | '.' | '-' | '_' | ':' | '+' | ',')
    };
    if !text.is_empty() && text.chars().all(plain) {
        return text;
    }
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// A size as people read it, rounded down.
fn size(bytes: u64) -> String {
    match bytes {
        0..0x10_0000 => format!("{} KiB", bytes >> 10),
        0x10_0000..0x2_8000_0000 => format!("{} MiB", bytes >> 20),
        _ => format!("{} GiB", bytes >> 30),
    }
}

#[cfg(test)]
pub(super) mod tests;
