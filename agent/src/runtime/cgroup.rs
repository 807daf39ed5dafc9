//! The cgroups of containers: `{hierarchy}/{parent}/{id}` in every hierarchy, on cgroup v1, hybrid and v2.
//!
//! libcontainer makes and fills them; this file finds, reads, empties and removes them, so that what a
//! killed process left half-made goes away too.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::io_limits;
use super::process::PidFd;

/// Where cgroups are mounted (systemd's file-hierarchy(7); libcontainer knows no other place either).
const MOUNT: &str = "/sys/fs/cgroup";

/// Where agents and shims live on cgroup v2, beside the containers: a cgroup with children may hold no
/// processes itself there.
const AGENT: &str = "agent";
const SHIMS: &str = "shims";

/// What agent and shims get beside the containers when all want more CPU time than there is.
const OWN_CPU_WEIGHT: &str = "1000";

/// Controllers that limits need.
const CONTROLLERS: [&str; 4] = ["cpu", "memory", "pids", "io"];

/// The cgroup hierarchies and this agent's place in them.
#[derive(Debug, Clone)]
pub(crate) struct Cgroups {
    unified: bool,
    mounts: Vec<PathBuf>,
    /// Without a slash at either end.
    parent: String,
}

impl Cgroups {
    /// Finds the hierarchies. `parent` is checked to be a plain relative path.
    pub(crate) fn find(parent: &str) -> io::Result<Self> {
        let parent = parent.trim_matches('/');
        let plain = |part: &str| !matches!(part, "" | "." | "..") && !part.contains(['\0', '\n']);
        if !parent.split('/').all(plain) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!(
                    "cgroup parent {parent:?} is not a path below {MOUNT}, for example \"foreshore\""
                ),
            ));
        }
        let (unified, mounts) = hierarchies(&fs::read_to_string("/proc/self/mountinfo")?);
        if mounts.is_empty() {
            return Err(io::Error::new(
                io::ErrorKind::NotFound,
                format!("no cgroups are mounted at {MOUNT}; mount cgroup2 there"),
            ));
        }
        Ok(Self {
            unified,
            mounts,
            parent: parent.to_owned(),
        })
    }

    /// The path of a container's cgroup below each hierarchy, as the OCI configuration has it.
    pub(crate) fn path(&self, id: &str) -> String {
        format!("/{}/{id}", self.parent)
    }

    /// Puts this process into a container's cgroups, where limits hold for it.
    pub(crate) fn join(&self, id: &str) -> io::Result<()> {
        self.dirs(id)
            .try_for_each(|dir| fs::write(dir.join("cgroup.procs"), "0"))
    }

    /// Makes the parent able to hold limited containers. On cgroup v2 that means controllers enabled on the
    /// way down, and no process in the parent itself.
    pub(crate) fn prepare(&self) -> io::Result<()> {
        let (true, Some(root)) = (self.unified, self.mounts.first()) else {
            return Ok(());
        };
        let mut at = root.clone();
        for part in self.parent.split('/') {
            enable_controllers(&at);
            at.push(part);
            create_dir(&at)?;
        }
        // Before the first controller is enabled here: afterwards nothing can be moved out any more.
        let inside = pids(&at)?;
        if !inside.is_empty() {
            let leaf = at.join(AGENT);
            create_dir(&leaf)?;
            for pid in inside {
                // One that has ended meanwhile is fine; any other failure shows when limits are set.
                let _ = fs::write(leaf.join("cgroup.procs"), pid.to_string());
            }
        }
        enable_controllers(&at);
        create_dir(&at.join(SHIMS))?;
        for own in [AGENT, SHIMS] {
            // Containers get at most 1024 of `cpu.shares` for each CPU, which is 39 here. An agent that systemd put
            // elsewhere has no leaf.
            let _best_effort = fs::write(at.join(own).join("cpu.weight"), OWN_CPU_WEIGHT);
        }
        Ok(())
    }

    /// On cgroup v2, the leaf for shims.
    pub(crate) fn shims(&self) -> Option<PathBuf> {
        let root = self.mounts.first().filter(|_| self.unified)?;
        Some(root.join(&self.parent).join(SHIMS))
    }

    /// Whether the kernel can limit swap. On cgroup v2 only a cgroup below the root tells.
    pub(crate) fn limits_swap(&self) -> bool {
        if self.unified {
            return self
                .parents()
                .iter()
                .any(|parent| parent.join("memory.swap.max").exists());
        }
        self.mounts
            .iter()
            .any(|mount| mount.join("memory.memsw.limit_in_bytes").exists())
    }

    /// The file that must say 0 on cgroup v2, where libcontainer takes a swap limit equal to the memory limit for no
    /// limit at all.
    pub(crate) fn swap_file(&self, id: &str) -> Option<PathBuf> {
        Some(self.device_cgroup(id)?.join("memory.swap.max"))
    }

    /// The container's cgroup on cgroup v2, where there is no `devices` hierarchy: it needs a device filter.
    pub(crate) fn device_cgroup(&self, id: &str) -> Option<PathBuf> {
        let root = self.mounts.first().filter(|_| self.unified)?;
        Some(root.join(&self.parent).join(id))
    }

    /// The container's cgroup in every hierarchy, whether it exists or not.
    pub(crate) fn all(&self, id: &str) -> Vec<PathBuf> {
        let parents = self.parents().into_iter();
        parents.map(|parent| parent.join(id)).collect()
    }

    /// Lets what is in it read and write without limit, so that it can end; see [`io_limits::lift`].
    pub(crate) fn lift_io(&self, id: &str) {
        self.dirs(id).for_each(|dir| io_limits::lift(&dir));
    }

    fn parents(&self) -> Vec<PathBuf> {
        self.mounts
            .iter()
            .map(|mount| mount.join(&self.parent))
            .collect()
    }

    fn dirs(&self, id: &str) -> impl Iterator<Item = PathBuf> {
        self.parents()
            .into_iter()
            .map(move |parent| parent.join(id))
            .filter(|dir| dir.is_dir())
    }

    /// The names below the parent in any hierarchy, without the agent's own.
    pub(crate) fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self
            .parents()
            .into_iter()
            .filter_map(|parent| fs::read_dir(parent).ok())
            .flatten()
            .flatten()
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
            .filter_map(|entry| entry.file_name().into_string().ok())
            .filter(|name| !matches!(name.as_str(), AGENT | SHIMS))
            .collect();
        names.sort();
        names.dedup();
        names
    }

    /// How often the kernel killed a process of this container for memory; 0 when that cannot be told any more.
    pub(crate) fn oom_kills(&self, id: &str) -> u64 {
        self.dirs(id)
            .flat_map(|dir| [dir.join("memory.events"), dir.join("memory.oom_control")])
            .filter_map(|file| fs::read_to_string(file).ok())
            .filter_map(|text| flat_value(&text, "oom_kill"))
            .max()
            .unwrap_or(0)
    }

    /// Whether any process is in it.
    ///
    /// # Errors
    ///
    /// When that cannot be read.
    pub(crate) fn populated(&self, id: &str) -> io::Result<bool> {
        for dir in self.dirs(id) {
            match pids(&dir) {
                Ok(pids) if pids.is_empty() => {}
                Ok(_) => return Ok(true),
                // Removed meanwhile.
                Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV)) => {
                }
                Err(error) => return Err(error),
            }
        }
        Ok(false)
    }

    /// Sends SIGKILL to every process in it, once. New ones may appear meanwhile on cgroup v1; call it again
    /// while it is [`populated`](Self::populated).
    pub(crate) fn kill(&self, id: &str) {
        for dir in self.dirs(id) {
            // Since Linux 5.14, and all at once.
            if fs::write(dir.join("cgroup.kill"), "1").is_ok() {
                continue;
            }
            for pid in pids(&dir).unwrap_or_default() {
                // Between reading and opening the pid may have become another process's; still being in the cgroup
                // after opening settles it.
                if let Ok(fd) = PidFd::open(pid)
                    && pids(&dir).is_ok_and(|pids| pids.contains(&pid))
                {
                    let _ = fd.signal(libc::SIGKILL);
                }
            }
        }
    }

    /// Removes its directories.
    ///
    /// # Errors
    ///
    /// EBUSY while processes are in it or only just gone.
    pub(crate) fn remove(&self, id: &str) -> io::Result<()> {
        for dir in self.dirs(id) {
            remove_tree(&dir)?;
        }
        Ok(())
    }

    /// Removes the parent if nothing is in it.
    pub(crate) fn remove_parent(&self) {
        for parent in self.parents() {
            let _ = fs::remove_dir(parent.join(SHIMS));
            let _ = fs::remove_dir(parent);
        }
    }

    /// Removes the parent and what is above it up to the hierarchy's root, as far as it is empty. What is above may be
    /// shared with others who are just about to use it.
    pub(crate) fn remove_ancestors(&self) {
        self.remove_parent();
        for mount in &self.mounts {
            let mut dir = mount.join(&self.parent);
            while dir.pop() && dir != *mount && fs::remove_dir(&dir).is_ok() {}
        }
    }
}

/// The mount points of all hierarchies below [`MOUNT`], and whether there is only the unified one.
fn hierarchies(mountinfo: &str) -> (bool, Vec<PathBuf>) {
    let mut split = Vec::new();
    for line in mountinfo.lines() {
        // proc_pid_mountinfo(5): ID parent major:minor root mountpoint options … - type source options
        let Some((front, back)) = line.split_once(" - ") else {
            continue;
        };
        let (Some(point), Some(kind)) = (front.split(' ').nth(4), back.split(' ').next()) else {
            continue;
        };
        let point = Path::new(point);
        if kind == "cgroup2" && point == Path::new(MOUNT) {
            return (true, vec![point.to_owned()]);
        }
        // The unified mount of a hybrid set-up holds no controllers that libcontainer would use.
        if kind == "cgroup" && point.starts_with(MOUNT) {
            split.push(point.to_owned());
        }
    }
    split.sort();
    split.dedup();
    (false, split)
}

fn create_dir(path: &Path) -> io::Result<()> {
    match fs::create_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    }
}

/// Best effort: a controller that cannot be enabled shows when its limit is set.
fn enable_controllers(dir: &Path) {
    for controller in CONTROLLERS {
        let _ = fs::write(dir.join("cgroup.subtree_control"), format!("+{controller}"));
    }
}

fn pids(dir: &Path) -> io::Result<Vec<i32>> {
    let text = fs::read_to_string(dir.join("cgroup.procs"))?;
    // A process of another PID namespace reads as 0.
    Ok(text
        .lines()
        .filter_map(|line| line.parse().ok())
        .filter(|pid| *pid > 0)
        .collect())
}

/// The number after `key` in lines of `key value`.
fn flat_value(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        line.strip_prefix(key)?
            .strip_prefix(' ')?
            .trim()
            .parse()
            .ok()
    })
}

/// A container may have made cgroups below its own (it can, on cgroup v2 with a mounted hierarchy).
fn remove_tree(dir: &Path) -> io::Result<()> {
    match fs::remove_dir(dir) {
        Ok(()) => return Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(_) => {}
    }
    for entry in fs::read_dir(dir)?.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_tree(&entry.path())?;
        }
    }
    match fs::remove_dir(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hybrid_and_unified_set_ups_are_told_apart() {
        let hybrid = "1 0 0:1 / / rw - ext4 /dev/vda rw\n\
                      2 1 0:2 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
                      3 2 0:3 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
                      4 2 0:4 / /sys/fs/cgroup/cpu,cpuacct rw shared:3 - cgroup cgroup rw,cpu\n\
                      5 2 0:5 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
        let expected = ["/sys/fs/cgroup/cpu,cpuacct", "/sys/fs/cgroup/memory"].map(PathBuf::from);
        assert_eq!(hierarchies(hybrid), (false, expected.to_vec()));
        let unified =
            "2 1 0:2 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";
        assert_eq!(
            hierarchies(unified),
            (true, vec![PathBuf::from("/sys/fs/cgroup")])
        );
        assert_eq!(hierarchies("").1.len(), 0);
    }

    #[test]
    fn parents_that_climb_out_are_refused() {
        for bad in ["", "/", "..", "a/../b", "a//b", "./a"] {
            assert_eq!(
                Cgroups::find(bad).unwrap_err().kind(),
                io::ErrorKind::InvalidInput,
                "{bad:?}"
            );
        }
    }

    #[test]
    fn counters_are_found_by_whole_key() {
        let text = "low 0\noom 3\noom_kill 2\noom_group_kill 9\n";
        assert_eq!(flat_value(text, "oom_kill"), Some(2));
        assert_eq!(flat_value(text, "absent"), None);
    }
}
