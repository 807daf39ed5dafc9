//! What is known of the device: plain values that [`gather`](super::gather) fills in and
//! [`judge`](super::judge) looks at.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// Everything.
#[derive(Debug, Clone)]
pub(crate) struct Facts {
    pub(crate) config: ConfigFile,
    pub(crate) secrets: Vec<SecretFile>,
    pub(crate) host: Host,
    pub(crate) cgroups: Cgroups,
    pub(crate) namespaces: BTreeMap<Namespace, Tried>,
    /// `/proc/sys/user/max_*_namespaces`.
    pub(crate) namespaces_max: BTreeMap<Namespace, u64>,
    /// Debian's `kernel.unprivileged_userns_clone`.
    pub(crate) unprivileged_userns: Option<bool>,
    pub(crate) seccomp: Tried,
    /// Giving the kernel a program that limits devices (cgroup v2).
    pub(crate) device_filter: Tried,
    /// Running the program that watches over each container.
    pub(crate) shim: Tried,
    pub(crate) state: StateDir,
    /// Or why there is none.
    pub(crate) disks: Result<Vec<StateDisk>, String>,
    pub(crate) run: RunDir,
    pub(crate) swap: Swap,
    pub(crate) clock: Clock,
    pub(crate) hub: Hub,
    pub(crate) registries: Registries,
    pub(crate) init: Init,
}

/// A disk that holds the agent's state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct StateDisk {
    /// The kernel's name.
    pub(crate) name: String,
    /// Whether it is shared by weight, else why not.
    pub(crate) weights: Result<(), String>,
}

/// How a real try ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Tried {
    Works,
    /// With the reason.
    Fails(String),
    /// It did not end in this many seconds.
    TimedOut(u64),
    /// Not tried, with the reason.
    Skipped(String),
}

/// The configuration file.
#[derive(Debug, Clone)]
pub(crate) struct ConfigFile {
    pub(crate) path: PathBuf,
    pub(crate) read: Result<(), ConfigProblem>,
    /// Permission bits; others may write it when it has any of 0o022.
    pub(crate) mode: Option<u32>,
}

/// Why the configuration is of no use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ConfigProblem {
    Missing,
    Wrong(String),
}

/// A file with a token or a password.
#[derive(Debug, Clone)]
pub(crate) struct SecretFile {
    /// The key in the configuration that names it.
    pub(crate) key: String,
    pub(crate) path: PathBuf,
    /// Permission bits and owner; `None` when there is no such file.
    pub(crate) owner: Option<(u32, u32)>,
    /// Why what is in it cannot be used.
    pub(crate) problem: Option<String>,
}

/// The machine and its kernel.
#[derive(Debug, Clone, Default)]
pub(crate) struct Host {
    /// As in uname(2).
    pub(crate) kernel: String,
    /// `/proc/cmdline`.
    pub(crate) command_line: String,
    /// `/proc/device-tree/model`.
    pub(crate) model: Option<String>,
    /// What kind of container the doctor itself runs in.
    pub(crate) container: Option<String>,
    /// Files that the boot loader takes the kernel's command line from, with what is in them.
    pub(crate) boot_files: BTreeMap<String, String>,
    /// Whether its users are not the machine's (user_namespaces(7)).
    pub(crate) own_users: bool,
    pub(crate) euid: u32,
    /// `CapEff` of `/proc/self/status`.
    pub(crate) capabilities: u64,
}

impl Host {
    /// Whether its firmware reads `cmdline.txt`.
    pub(crate) fn is_raspberry_pi(&self) -> bool {
        self.model
            .as_ref()
            .is_some_and(|model| model.contains("Raspberry Pi"))
    }

    /// Whether a word stands on the kernel's command line.
    pub(crate) fn booted_with(&self, word: &str) -> bool {
        self.command_line
            .split_whitespace()
            .any(|found| found == word)
    }
}

/// One line of mountinfo (proc_pid_mountinfo(5)).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mount {
    pub(crate) point: PathBuf,
    pub(crate) kind: String,
    pub(crate) source: String,
    /// Of the mount and of its file system.
    pub(crate) options: BTreeSet<String>,
}

impl Mount {
    pub(crate) fn has(&self, option: &str) -> bool {
        self.options.contains(option)
    }
}

/// Reads mountinfo; lines that are not understood are left out.
pub(crate) fn parse_mounts(mountinfo: &str) -> Vec<Mount> {
    mountinfo.lines().filter_map(parse_mount).collect()
}

fn parse_mount(line: &str) -> Option<Mount> {
    let (front, back) = line.split_once(" - ")?;
    let mut front = front.split(' ').skip(4);
    let (point, options) = (front.next()?, front.next()?);
    let mut back = back.split(' ');
    let (kind, source) = (back.next()?, back.next()?);
    let options = options
        .split(',')
        .chain(back.next().unwrap_or("").split(','));
    Some(Mount {
        point: PathBuf::from(unescape(point)),
        kind: kind.to_owned(),
        source: unescape(source),
        options: options
            .filter(|option| !option.is_empty())
            .map(str::to_owned)
            .collect(),
    })
}

/// Blanks and backslashes are written as `\040` and so on.
fn unescape(text: &str) -> String {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let octal = tail
            .get(..3)
            .filter(|_| *first == b'\\')
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match octal {
            Some(byte) => {
                out.push(byte);
                rest = rest.get(4..).unwrap_or_default();
            }
            None => {
                out.push(*first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// The mount that a path without symbolic links is on.
pub(crate) fn mount_of<'a>(mounts: &'a [Mount], path: &Path) -> Option<&'a Mount> {
    // Of two on the same place, the later one hides the other; `max_by_key` gives the last of equals.
    mounts
        .iter()
        .filter(|mount| path.starts_with(&mount.point))
        .max_by_key(|mount| mount.point.components().count())
}

/// Cgroups as they are mounted and delegated.
#[derive(Debug, Clone)]
pub(crate) struct Cgroups {
    /// `[cgroup] parent`.
    pub(crate) parent: String,
    pub(crate) layout: Layout,
    /// `/proc/cgroups`.
    pub(crate) listed: BTreeMap<String, Listed>,
    /// `cgroup.controllers` of the unified hierarchy's root, wherever that is mounted.
    pub(crate) unified_controllers: BTreeSet<String>,
    /// On v2, from the hierarchy's root down to the parent, as far as it exists.
    pub(crate) chain: Vec<Place>,
    /// Whether CPU time can be limited; `None` when that shows only once a limit is set.
    pub(crate) cpu_quota: Option<bool>,
    /// Whether swap can be limited; `None` when that shows only once a limit is set.
    pub(crate) swap_limit: Option<bool>,
    /// Whether reading and writing can be limited; `None` when that shows only once a limit is set.
    pub(crate) io_limit: Option<bool>,
}

/// What is mounted at `/sys/fs/cgroup`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Layout {
    /// Nothing that could be used; cgroup v2 may be mounted elsewhere.
    Missing { elsewhere: Option<PathBuf> },
    /// cgroup v2.
    Unified { read_only: bool },
    /// cgroup v1, by controller; `hybrid` when v2 is mounted too.
    Split {
        controllers: BTreeMap<String, V1Mount>,
        hybrid: bool,
    },
}

/// Where a v1 controller is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct V1Mount {
    pub(crate) point: PathBuf,
    pub(crate) read_only: bool,
}

/// A line of `/proc/cgroups`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Listed {
    /// 0 for v2 and for none.
    pub(crate) hierarchy: u32,
    pub(crate) enabled: bool,
}

/// One cgroup of v2.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Place {
    /// Below the hierarchy's root; empty for the root.
    pub(crate) path: String,
    /// `cgroup.controllers`.
    pub(crate) controllers: BTreeSet<String>,
    /// `cgroup.subtree_control`.
    pub(crate) enabled: BTreeSet<String>,
    /// Whether processes are in it.
    pub(crate) processes: bool,
    /// The root of the machine, not that of a cgroup namespace.
    pub(crate) machine_root: bool,
}

/// A kind of namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Namespace {
    Mount,
    Pid,
    Network,
    Ipc,
    Uts,
    Cgroup,
    User,
}

impl Namespace {
    pub(crate) const ALL: [Self; 7] = [
        Self::Mount,
        Self::Pid,
        Self::Network,
        Self::Ipc,
        Self::Uts,
        Self::Cgroup,
        Self::User,
    ];

    /// As in the arguments of a try, and for people.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Mount => "mount",
            Self::Pid => "pid",
            Self::Network => "network",
            Self::Ipc => "ipc",
            Self::Uts => "uts",
            Self::Cgroup => "cgroup",
            Self::User => "user",
        }
    }

    /// Its file in `/proc/sys/user` (namespaces(7)).
    pub(crate) const fn limit_file(self) -> &'static str {
        match self {
            Self::Mount => "max_mnt_namespaces",
            Self::Pid => "max_pid_namespaces",
            Self::Network => "max_net_namespaces",
            Self::Ipc => "max_ipc_namespaces",
            Self::Uts => "max_uts_namespaces",
            Self::Cgroup => "max_cgroup_namespaces",
            Self::User => "max_user_namespaces",
        }
    }

    /// The kernel's build option for it.
    pub(crate) const fn build_option(self) -> &'static str {
        match self {
            Self::Mount => "CONFIG_NAMESPACES",
            Self::Pid => "CONFIG_PID_NS",
            Self::Network => "CONFIG_NET_NS",
            Self::Ipc => "CONFIG_IPC_NS",
            Self::Uts => "CONFIG_UTS_NS",
            Self::Cgroup => "CONFIG_CGROUPS",
            Self::User => "CONFIG_USER_NS",
        }
    }
}

/// The state directory.
#[derive(Debug, Clone)]
pub(crate) struct StateDir {
    /// As configured.
    pub(crate) path: PathBuf,
    /// The directory that was looked at: `path`, or the nearest one above it that exists. `None` when it
    /// could not be found in time.
    pub(crate) looked_at: Option<PathBuf>,
    pub(crate) mount: Option<Mount>,
    pub(crate) space: Option<Space>,
    /// Writing a file and waiting until it is on the medium.
    pub(crate) sync: Tried,
    /// How long that took.
    pub(crate) sync_ms: u64,
    pub(crate) overlay: Tried,
    /// Mounting with the ids of a user namespace.
    pub(crate) idmap: Tried,
    pub(crate) lock: StateLock,
}

/// statvfs(3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Space {
    pub(crate) total_bytes: u64,
    pub(crate) free_bytes: u64,
    /// 0 on file systems that make inodes as they need them.
    pub(crate) total_inodes: u64,
    pub(crate) free_inodes: u64,
    pub(crate) read_only: bool,
}

/// Who has the state directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum StateLock {
    Free,
    /// With the agent's pid where it can be told.
    Held(Option<u32>),
    Unknown(String),
}

/// The run directory.
#[derive(Debug, Clone)]
pub(crate) struct RunDir {
    pub(crate) path: PathBuf,
    pub(crate) mount: Option<Mount>,
}

/// `/proc/swaps`.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Swap {
    pub(crate) total_bytes: u64,
}

/// The device's clocks.
#[derive(Debug, Clone)]
pub(crate) struct Clock {
    /// The wall clock, seconds since 1970; negative before.
    pub(crate) unix_s: i64,
    /// No right clock shows less than this.
    pub(crate) earliest_s: i64,
    /// `CLOCK_BOOTTIME` in milliseconds.
    pub(crate) boot_ms: Result<u64, String>,
    /// Whether the device has a clock that runs without power.
    pub(crate) rtc: bool,
    /// Whether systemd-timesyncd is installed.
    pub(crate) timesyncd: bool,
}

/// The hub's broker.
#[derive(Debug, Clone)]
pub(crate) struct Hub {
    /// `None` without a configuration.
    pub(crate) broker: Option<Broker>,
    /// The nameservers in `/etc/resolv.conf`.
    pub(crate) nameservers: usize,
    /// Its addresses.
    pub(crate) resolve: Tried,
    pub(crate) addresses: Vec<String>,
    pub(crate) connect: Connect,
    pub(crate) tls: Handshake,
}

/// Where the broker is, as configured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Broker {
    pub(crate) host: String,
    pub(crate) port: u16,
    pub(crate) tls: bool,
}

/// How the TCP connection went.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Connect {
    NotTried,
    Connected {
        address: String,
        ms: u64,
    },
    /// Nobody listens.
    Refused,
    /// No answer in time.
    Silent,
    /// No way to it.
    NoRoute,
    Failed(String),
}

/// How the TLS handshake went.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Handshake {
    NotTried,
    /// The certificate is good. With the protocol version.
    Verified(String),
    /// The certificates to trust cannot be read.
    NoRoots(String),
    UnknownIssuer,
    Expired,
    NotYetValid,
    /// The certificate is for another name.
    OtherName,
    /// What answers does not speak TLS.
    NotTls,
    Silent,
    Failed(String),
}

/// The registries of the configuration.
pub(crate) type Registries = BTreeMap<String, RegistryAnswer>;

/// What a registry said.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum RegistryAnswer {
    /// It answers as a registry does.
    Answers,
    /// It does not take the configured user name and password or token.
    Denied(String),
    Failed(String),
    /// No answer in time.
    Silent,
}

/// What starts the agent and watches over it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Init {
    pub(crate) kind: InitKind,
    /// systemd's notify socket is there.
    pub(crate) notify_socket: bool,
    pub(crate) unit: Option<Unit>,
    /// Such as `/dev/watchdog0`.
    pub(crate) watchdogs: Vec<String>,
    /// `RuntimeWatchdogSec` in systemd's configuration.
    pub(crate) runtime_watchdog: Option<String>,
}

/// What runs as process 1.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum InitKind {
    Systemd,
    OpenRc,
    #[default]
    Other,
}

/// The agent's systemd unit, with its drop-ins.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Unit {
    pub(crate) path: String,
    /// The last value of each key of `[Service]`.
    pub(crate) service: BTreeMap<String, String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_found_by_the_longest_and_latest_match() {
        let mounts = parse_mounts(
            "1 0 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n\
             2 1 8:2 / /data rw,noexec - vfat /dev/sda2 rw\n\
             3 1 8:3 / /data rw - ext4 /dev/sda3 ro\n\
             4 1 8:4 / /a\\040b rw - xfs /dev/sda4 rw\n\
             nonsense\n",
        );
        assert_eq!(mounts.len(), 4);
        let kind = |path: &str| mount_of(&mounts, Path::new(path)).unwrap().source.clone();
        assert_eq!(kind("/data/state"), "/dev/sda3");
        assert_eq!(kind("/database"), "/dev/sda1");
        assert_eq!(kind("/a b/c"), "/dev/sda4");
        assert!(mounts[2].has("ro") && mounts[1].has("noexec"));
        assert_eq!(unescape("a\\04"), "a\\04");
        assert_eq!(unescape("\\"), "\\");
    }
}
