//! What the doctor says: one [`Check`] for each [`CheckId`], in lines for people and in JSON for programs.

use std::fmt::Write as _;

use serde::Serialize;

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// As it should be.
    Ok,
    /// Worth knowing; nothing has to be done.
    Info,
    /// Containers run, but not as well or as safely as they should.
    Warning,
    /// The agent or some containers cannot work.
    Error,
}

/// What is checked. The texts of [`CheckId::as_str`] are stable: programs rely on them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[expect(missing_docs, reason = "docs/guide/doctor.md says what each one means")]
pub enum CheckId {
    ConfigFile,
    ConfigSecrets,
    HostKernel,
    HostPrivileges,
    HostSeccomp,
    HostShim,
    CgroupVersion,
    CgroupMemory,
    CgroupCpu,
    CgroupPids,
    CgroupDevices,
    CgroupIo,
    CgroupDelegation,
    NamespaceMount,
    NamespacePid,
    NamespaceNetwork,
    NamespaceIpc,
    NamespaceUts,
    NamespaceCgroup,
    NamespaceUser,
    StateFilesystem,
    StateSpace,
    StateInodes,
    StateSync,
    StateOverlay,
    StateIdmap,
    StateLock,
    RunFilesystem,
    MemorySwap,
    ClockWall,
    ClockBoottime,
    HubResolve,
    HubConnect,
    HubTls,
    RegistryReachable,
    InitUnit,
    InitNotify,
    InitWatchdog,
}

impl CheckId {
    /// Every check, in the order of the report.
    pub const ALL: [Self; 38] = [
        Self::ConfigFile,
        Self::ConfigSecrets,
        Self::HostKernel,
        Self::HostPrivileges,
        Self::HostSeccomp,
        Self::HostShim,
        Self::CgroupVersion,
        Self::CgroupMemory,
        Self::CgroupCpu,
        Self::CgroupPids,
        Self::CgroupDevices,
        Self::CgroupIo,
        Self::CgroupDelegation,
        Self::NamespaceMount,
        Self::NamespacePid,
        Self::NamespaceNetwork,
        Self::NamespaceIpc,
        Self::NamespaceUts,
        Self::NamespaceCgroup,
        Self::NamespaceUser,
        Self::StateFilesystem,
        Self::StateSpace,
        Self::StateInodes,
        Self::StateSync,
        Self::StateOverlay,
        Self::StateIdmap,
        Self::StateLock,
        Self::RunFilesystem,
        Self::MemorySwap,
        Self::ClockWall,
        Self::ClockBoottime,
        Self::HubResolve,
        Self::HubConnect,
        Self::HubTls,
        Self::RegistryReachable,
        Self::InitUnit,
        Self::InitNotify,
        Self::InitWatchdog,
    ];

    /// Its stable name.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::ConfigFile => "config.file",
            Self::ConfigSecrets => "config.secrets",
            Self::HostKernel => "host.kernel",
            Self::HostPrivileges => "host.privileges",
            Self::HostSeccomp => "host.seccomp",
            Self::HostShim => "host.shim",
            Self::CgroupVersion => "cgroup.version",
            Self::CgroupMemory => "cgroup.memory",
            Self::CgroupCpu => "cgroup.cpu",
            Self::CgroupPids => "cgroup.pids",
            Self::CgroupDevices => "cgroup.devices",
            Self::CgroupIo => "cgroup.io",
            Self::CgroupDelegation => "cgroup.delegation",
            Self::NamespaceMount => "namespace.mount",
            Self::NamespacePid => "namespace.pid",
            Self::NamespaceNetwork => "namespace.network",
            Self::NamespaceIpc => "namespace.ipc",
            Self::NamespaceUts => "namespace.uts",
            Self::NamespaceCgroup => "namespace.cgroup",
            Self::NamespaceUser => "namespace.user",
            Self::StateFilesystem => "state.filesystem",
            Self::StateSpace => "state.space",
            Self::StateInodes => "state.inodes",
            Self::StateSync => "state.sync",
            Self::StateOverlay => "state.overlay",
            Self::StateIdmap => "state.idmap",
            Self::StateLock => "state.lock",
            Self::RunFilesystem => "run.filesystem",
            Self::MemorySwap => "memory.swap",
            Self::ClockWall => "clock.wall",
            Self::ClockBoottime => "clock.boottime",
            Self::HubResolve => "hub.resolve",
            Self::HubConnect => "hub.connect",
            Self::HubTls => "hub.tls",
            Self::RegistryReachable => "registry.reachable",
            Self::InitUnit => "init.unit",
            Self::InitNotify => "init.notify",
            Self::InitWatchdog => "init.watchdog",
        }
    }
}

impl Serialize for CheckId {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

/// One thing that was looked at, and what was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What was looked at.
    pub id: CheckId,
    /// How bad it is.
    pub level: Level,
    /// What was found, in one line without control characters.
    pub found: String,
    /// The command to run, or the line and the file it goes into. Always there from [`Level::Warning`] on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fix: Option<String>,
}

impl Check {
    /// All is well.
    pub(crate) fn ok(id: CheckId, found: impl Into<String>) -> Self {
        Self::new(id, Level::Ok, &found.into(), None)
    }

    /// Worth knowing.
    pub(crate) fn info(id: CheckId, found: impl Into<String>) -> Self {
        Self::new(id, Level::Info, &found.into(), None)
    }

    /// Worth knowing, and how to have it better.
    pub(crate) fn hint(id: CheckId, found: impl Into<String>, fix: impl Into<String>) -> Self {
        Self::new(id, Level::Info, &found.into(), Some(&fix.into()))
    }

    /// It works, but not well.
    pub(crate) fn warning(id: CheckId, found: impl Into<String>, fix: impl Into<String>) -> Self {
        Self::new(id, Level::Warning, &found.into(), Some(&fix.into()))
    }

    /// It does not work.
    pub(crate) fn error(id: CheckId, found: impl Into<String>, fix: impl Into<String>) -> Self {
        Self::new(id, Level::Error, &found.into(), Some(&fix.into()))
    }

    fn new(id: CheckId, level: Level, found: &str, fix: Option<&str>) -> Self {
        Self {
            id,
            level,
            found: one_line(found),
            fix: fix.map(one_line),
        }
    }
}

/// Every check, in the order of [`CheckId::ALL`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// The checks.
    pub checks: Vec<Check>,
}

impl Report {
    /// The worst level in it.
    #[must_use]
    pub fn worst(&self) -> Level {
        let levels = self.checks.iter().map(|check| check.level);
        levels.max().unwrap_or(Level::Ok)
    }

    /// One aligned line a check, the fix below it, and a summary.
    #[must_use]
    pub fn text(&self) -> String {
        let mut text = String::new();
        for check in &self.checks {
            let level = match check.level {
                Level::Ok => "ok",
                Level::Info => "info",
                Level::Warning => "warning",
                Level::Error => "error",
            };
            let _infallible =
                writeln!(text, "{level:<8} {:<20} {}", check.id.as_str(), check.found);
            if let Some(fix) = &check.fix {
                let _infallible = writeln!(text, "         fix: {fix}");
            }
        }
        let count = |level| {
            self.checks
                .iter()
                .filter(|check| check.level == level)
                .count()
        };
        let (errors, warnings) = (count(Level::Error), count(Level::Warning));
        let summary = match (errors, warnings) {
            (0, 0) => "This device is fine.".to_owned(),
            _ => format!(
                "{}, {}.",
                plural(errors, "error"),
                plural(warnings, "warning")
            ),
        };
        let _infallible = writeln!(text, "\n{summary}");
        text
    }
}

fn plural(count: usize, what: &str) -> String {
    let s = if count == 1 { "" } else { "s" };
    format!("{count} {what}{s}")
}

/// The longest text of a finding or a fix, in bytes.
const TEXT_MAX: usize = 1000;

/// Texts come from files and from the network: nothing in them may move a terminal's cursor, and line breaks
/// would break the alignment.
fn one_line(text: &str) -> String {
    let mut line = String::with_capacity(text.len().min(TEXT_MAX));
    for word in text.split(|at: char| at.is_whitespace() || at.is_control()) {
        if word.is_empty() {
            continue;
        }
        if !line.is_empty() {
            line.push(' ');
        }
        line.push_str(word);
    }
    if line.len() > TEXT_MAX {
        line.truncate(line.floor_char_boundary(TEXT_MAX));
        line.push('…');
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_from_outside_stay_one_line_and_short() {
        let check = Check::error(
            CheckId::HubConnect,
            "a\u{1b}[2Jb\r\n  c\0d",
            "x".repeat(5000),
        );
        assert_eq!(check.found, "a [2Jb c d");
        assert!(check.fix.is_some_and(|fix| fix.len() < TEXT_MAX + 4));
    }

    #[test]
    fn lines_are_aligned_and_fixes_are_below() {
        let report = Report {
            checks: vec![
                Check::ok(CheckId::HostKernel, "Linux 6.1"),
                Check::error(CheckId::CgroupMemory, "disabled", "reboot"),
            ],
        };
        assert_eq!(
            report.text(),
            "ok       host.kernel          Linux 6.1\n\
             error    cgroup.memory        disabled\n         fix: reboot\n\n\
             1 error, 0 warnings.\n"
        );
        assert_eq!(report.worst(), Level::Error);
        assert_eq!(
            serde_json::to_string(&report).unwrap(),
            r#"{"checks":[{"id":"host.kernel","level":"ok","found":"Linux 6.1"},{"id":"cgroup.memory","level":"error","found":"disabled","fix":"reboot"}]}"#
        );
    }

    #[test]
    fn ids_are_unique() {
        let ids: std::collections::BTreeSet<_> =
            CheckId::ALL.iter().map(|id| id.as_str()).collect();
        assert_eq!(ids.len(), CheckId::ALL.len());
    }
}
