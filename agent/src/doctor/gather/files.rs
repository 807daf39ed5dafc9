//! Small files of the kernel and the system, below a root that a test may choose.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;

use crate::doctor::facts::Namespace;

/// No file that is read here is larger, mountinfo of a device with a thousand containers included.
const FILE_MAX: u64 = 1 << 20;

/// The machine's own namespaces have fixed numbers (include/linux/proc_ns.h, `PROC_PID_INIT_INO` and
/// `PROC_CGROUP_INIT_INO`).
const MACHINE_PID: &str = "pid:[4026531836]";
const MACHINE_CGROUP: &str = "cgroup:[4026531835]";

/// Names that are taken from one directory.
const NAMES_MAX: usize = 4096;

/// Where `/proc`, `/sys`, `/etc` and the others are.
#[derive(Debug, Clone)]
pub(super) struct Tree {
    root: PathBuf,
}

impl Tree {
    pub(super) fn new(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
        }
    }

    /// What is in a file; `None` when there is none, or nothing that can be read.
    pub(super) fn text(&self, path: impl AsRef<Path>) -> Option<String> {
        // Non-blocking, so that a pipe in its place ends the read instead of holding it.
        let file = File::options()
            .read(true)
            .custom_flags(OFlag::O_NONBLOCK.bits())
            .open(self.root.join(path))
            .ok()?;
        let mut bytes = Vec::new();
        file.take(FILE_MAX).read_to_end(&mut bytes).ok()?;
        Some(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// The same without white space around it.
    pub(super) fn line(&self, path: impl AsRef<Path>) -> Option<String> {
        self.text(path).map(|text| text.trim().to_owned())
    }

    /// Where a symbolic link points.
    pub(super) fn link(&self, path: impl AsRef<Path>) -> Option<String> {
        let target = fs::read_link(self.root.join(path)).ok()?;
        target.into_os_string().into_string().ok()
    }

    pub(super) fn exists(&self, path: impl AsRef<Path>) -> bool {
        self.root.join(path).exists()
    }

    /// The names in a directory, sorted; none when there is none.
    pub(super) fn names(&self, path: impl AsRef<Path>) -> Vec<String> {
        let entries = fs::read_dir(self.root.join(path)).into_iter().flatten();
        let mut names: Vec<String> = entries
            .take(NAMES_MAX)
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect();
        names.sort();
        names
    }

    pub(super) fn mounts(&self) -> String {
        self.text("proc/self/mountinfo").unwrap_or_default()
    }
}

/// `/proc/sys/user/max_*_namespaces` (namespaces(7)).
pub(super) fn namespaces_max(tree: &Tree) -> BTreeMap<Namespace, u64> {
    Namespace::ALL
        .into_iter()
        .filter_map(|kind| {
            let text = tree.line(format!("proc/sys/user/{}", kind.limit_file()))?;
            Some((kind, text.parse().ok()?))
        })
        .collect()
}

/// What kind of container this is, if any: as its engine says (systemd.io, "The Container Interface").
pub(super) fn container(tree: &Tree) -> Option<String> {
    let said = tree.text("proc/1/environ").and_then(|environ| {
        let value = environ
            .split('\0')
            .find_map(|variable| variable.strip_prefix("container="))?;
        (!value.is_empty()).then(|| value.to_owned())
    });
    let marked = || {
        tree.line("run/systemd/container")
            .filter(|kind| !kind.is_empty())
    };
    // Virtual machines are made from container images too, with these files still in them.
    let docker = || tree.exists(".dockerenv").then(|| "docker".to_owned());
    let podman = || {
        tree.exists("run/.containerenv")
            .then(|| "podman".to_owned())
    };
    let image = || {
        let machine = |kind: &str, number: &str| {
            tree.link(format!("proc/self/ns/{kind}")).as_deref() == Some(number)
        };
        if machine("pid", MACHINE_PID) && machine("cgroup", MACHINE_CGROUP) {
            return None;
        }
        docker().or_else(podman)
    };
    said.or_else(marked).or_else(image)
}

/// Whether root here is another user on the machine: the machine's own map is the identity.
pub(super) fn own_users(tree: &Tree) -> bool {
    tree.text("proc/self/uid_map").is_some_and(|map| {
        let first: Vec<&str> = map.split_whitespace().take(3).collect();
        !matches!(first.as_slice(), [] | ["0", "0", "4294967295"])
    })
}

/// Every swap area of `/proc/swaps` (proc_swaps(5)).
pub(super) fn swap_bytes(tree: &Tree) -> u64 {
    let text = tree.text("proc/swaps").unwrap_or_default();
    text.lines()
        .skip(1)
        .filter_map(|line| line.split_whitespace().nth(2)?.parse::<u64>().ok())
        .fold(0, |sum, kib| sum.saturating_add(kib.saturating_mul(1024)))
}

/// The process that holds a lock on the file with this inode number (proc_locks(5)). Inode numbers of several file
/// systems may be alike, hence for people only.
pub(super) fn lock_holder(tree: &Tree, inode: u64) -> Option<u32> {
    let text = tree.text("proc/locks")?;
    text.lines().find_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [_, "FLOCK", _, "WRITE", pid, file, ..] = fields.as_slice() else {
            return None;
        };
        let found: u64 = file.rsplit(':').next()?.parse().ok()?;
        pid.parse().ok().filter(|_| found == inode)
    })
}

/// How many nameservers `/etc/resolv.conf` has (resolv.conf(5)).
pub(super) fn nameservers(tree: &Tree) -> usize {
    let text = tree.text("etc/resolv.conf").unwrap_or_default();
    text.lines()
        .filter(|line| line.split_whitespace().next() == Some("nameserver"))
        .count()
}
