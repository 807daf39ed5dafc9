//! Whole disks: which one a device node, a partition or a directory is on, and whether the kernel shares it by weight.
//!
//! The kernel limits input and output on whole disks only (kernel documentation, "Control Group v2", IO Interface Files).

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use foreshore_protocol::manifest::DiskPath;

use crate::doctor::{mount_of, parse_mounts};

/// Where the kernel shows its devices.
const SYS: &str = "/sys";

/// Places in `/dev` that others than root can write to.
const SHARED: [&str; 3] = ["/dev/shm", "/dev/mqueue", "/dev/pts"];

/// A disk as a whole, never a partition.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Disk {
    /// The kernel's name, for example `mmcblk0`.
    pub(crate) name: String,
    /// With `minor`, the number of the disk itself.
    pub(crate) major: u64,
    /// See `major`.
    pub(crate) minor: u64,
}

impl Disk {
    /// As cgroup files have it: `179:0`.
    pub(crate) fn number(&self) -> String {
        format!("{}:{}", self.major, self.minor)
    }
}

impl fmt::Display for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

/// Why a path means no disk here.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DiskError {
    /// Not plugged in, or its driver is not there.
    #[error(
        "disk {0} is not there; plug it in or load its driver, the service is started when it is"
    )]
    Missing(String),
    /// Something else is there. Says no more than that, since it may be anywhere.
    #[error(
        "{0} is no disk on this device; name a block device below /dev, or state for the disk with images and volumes"
    )]
    NotADisk(String),
    /// A file system without a disk.
    #[error("{dir} is on {kind}, which is on no disk that the kernel could limit")]
    NoDisk {
        /// One of the state directories.
        dir: String,
        /// The type of the file system.
        kind: String,
    },
    /// The operating system refused something.
    #[error("failed to look at {path}")]
    Io {
        /// What.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The disks that `path` means. `state` are the directories of the agent's state; those that do not exist do not count.
pub(crate) fn find(path: &DiskPath, state: &[PathBuf]) -> Result<BTreeSet<Disk>, DiskError> {
    match path {
        DiskPath::Node(node) => Ok(BTreeSet::from([named(Path::new(SYS), node)?])),
        DiskPath::State => holding(state),
    }
}

/// The disks that directories are on; those that do not exist, or are in memory while others are not, do not count.
pub(crate) fn holding(dirs: &[PathBuf]) -> Result<BTreeSet<Disk>, DiskError> {
    let mounts = "/proc/self/mountinfo";
    let mounts = fs::read_to_string(mounts).map_err(|source| DiskError::Io {
        path: mounts.to_owned(),
        source,
    })?;
    let (mut disks, mut without) = (BTreeSet::new(), None);
    for dir in dirs {
        match below(Path::new(SYS), dir, &mounts) {
            Ok(found) => disks.extend(found),
            Err(error @ DiskError::NoDisk { .. }) => without = without.or(Some(error)),
            Err(error) => return Err(error),
        }
    }
    match without {
        Some(error) if disks.is_empty() => Err(error),
        _ => Ok(disks),
    }
}

fn named(sys: &Path, node: &str) -> Result<Disk, DiskError> {
    let not_a_disk = || DiskError::NotADisk(node.to_owned());
    let failed = |error: io::Error| match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENXIO | libc::ENODEV) => DiskError::Missing(node.to_owned()),
        _ => not_a_disk(),
    };
    let real = fs::canonicalize(node).map_err(failed)?;
    if !real.starts_with("/dev") || SHARED.iter().any(|place| real.starts_with(place)) {
        return Err(not_a_disk());
    }
    let metadata = fs::metadata(&real).map_err(failed)?;
    if !metadata.file_type().is_block_device() {
        return Err(not_a_disk());
    }
    // A node without a driver is no disk yet.
    whole(sys, metadata.rdev()).map_err(failed)
}

/// The disk that a block device is, or is a partition of.
fn whole(sys: &Path, number: u64) -> io::Result<Disk> {
    let (major, minor) = (nix::sys::stat::major(number), nix::sys::stat::minor(number));
    let mut dir = fs::canonicalize(sys.join(format!("dev/block/{major}:{minor}")))?;
    if dir.join("partition").exists() {
        dir.pop();
    }
    let number = fs::read_to_string(dir.join("dev"))?;
    let numbers = number.trim().split_once(':');
    let numbers =
        numbers.and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
    let name = dir.file_name().and_then(|name| name.to_str());
    let (Some((major, minor)), Some(name)) = (numbers, name) else {
        let error = format!("{} is not what a disk has", dir.display());
        return Err(io::Error::new(io::ErrorKind::InvalidData, error));
    };
    Ok(Disk {
        name: name.to_owned(),
        major,
        minor,
    })
}

/// The disks of the file system that `dir` is on; none when there is no such directory.
fn below(sys: &Path, dir: &Path, mountinfo: &str) -> Result<BTreeSet<Disk>, DiskError> {
    let failed = |source| DiskError::Io {
        path: dir.display().to_string(),
        source,
    };
    let real = match fs::canonicalize(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeSet::new()),
        other => other.map_err(failed)?,
    };
    let device = fs::metadata(&real).map_err(failed)?.dev();
    if nix::sys::stat::major(device) != 0 {
        return Ok(BTreeSet::from([whole(sys, device).map_err(failed)?]));
    }
    // Such as btrfs: its numbers are made up, the device is in the table of mounts.
    let mounts = parse_mounts(mountinfo);
    let mount = mount_of(&mounts, &real);
    let source = mount
        .map(|mount| mount.source.as_str())
        .filter(|source| source.starts_with("/dev/"));
    let block = source.and_then(|source| {
        let metadata = fs::metadata(source).ok()?;
        let is_block = metadata.file_type().is_block_device();
        is_block.then(|| (source, metadata.rdev()))
    });
    let Some((source, number)) = block else {
        return Err(DiskError::NoDisk {
            dir: dir.display().to_string(),
            kind: mount.map_or_else(|| "nothing".to_owned(), |mount| mount.kind.clone()),
        });
    };
    let mut disks = BTreeSet::from([whole(sys, number).map_err(failed)?]);
    let real = fs::canonicalize(source).map_err(failed)?;
    if let Some(name) = real.file_name() {
        disks.extend(siblings(sys, Path::new(name)).map_err(failed)?);
    }
    Ok(disks)
}

/// All disks of the btrfs that has the device `name`; none when it is no part of one.
fn siblings(sys: &Path, name: &Path) -> io::Result<Vec<Disk>> {
    let systems = fs::read_dir(sys.join("fs/btrfs")).into_iter().flatten();
    let devices = systems
        .flatten()
        .map(|system| system.path().join("devices"))
        .find(|devices| devices.join(name).exists());
    let Some(devices) = devices else {
        return Ok(Vec::new());
    };
    fs::read_dir(devices)?
        .map(|entry| {
            // Each is a link to what is in `/sys/dev/block` too.
            let number = fs::read_to_string(entry?.path().join("dev"))?;
            let (major, minor) = number.trim().split_once(':').unwrap_or_default();
            let part = |text: &str| text.parse().map_err(io::Error::other);
            whole(sys, nix::sys::stat::makedev(part(major)?, part(minor)?))
        })
        .collect()
}

/// Whether the kernel shares this disk by weight now.
///
/// # Errors
///
/// Why not, and what would make it.
pub(crate) fn shared_by_weight(disk: &Disk) -> Result<(), String> {
    shares(Path::new(SYS), disk)
}

fn shares(sys: &Path, disk: &Disk) -> Result<(), String> {
    let scheduler = format!("block/{}/queue/scheduler", disk.name);
    let schedulers = fs::read_to_string(sys.join(&scheduler)).unwrap_or_default();
    if schedulers.contains("[bfq]") {
        return Ok(());
    }
    // The other one that knows weights; on cgroup v2 only, and off unless somebody turned it on.
    let costs = fs::read_to_string(sys.join("fs/cgroup/io.cost.qos")).unwrap_or_default();
    let number = disk.number();
    let turned_on = costs.lines().any(|line| {
        let mut words = line.split_whitespace();
        words.next() == Some(&number) && words.any(|word| word == "enable=1")
    });
    if turned_on {
        return Ok(());
    }
    let current = schedulers
        .split(['[', ']'])
        .nth(1)
        .unwrap_or("nothing that is known");
    let way_out = if schedulers.split_whitespace().any(|name| name == "bfq") {
        format!("echo bfq > /sys/{scheduler}")
    } else {
        format!("modprobe bfq && echo bfq > /sys/{scheduler}")
    };
    Err(format!(
        "{disk} is scheduled by {current}, which knows no weights; {way_out}"
    ))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// A `/sys` with a disk `sda` (8:0), its second partition (8:2), and a `dm-0` (253:0) of its own.
    fn sys() -> tempfile::TempDir {
        let sys = tempfile::tempdir().unwrap();
        let root = sys.path();
        let disk = root.join("devices/pci/block/sda");
        let part = disk.join("sda2");
        let mapped = root.join("devices/virtual/block/dm-0");
        for (dir, number) in [(&disk, "8:0\n"), (&part, "8:2\n"), (&mapped, "253:0\n")] {
            fs::create_dir_all(dir.join("queue")).unwrap();
            fs::write(dir.join("dev"), number).unwrap();
        }
        fs::write(part.join("partition"), "2\n").unwrap();
        fs::create_dir_all(root.join("dev/block")).unwrap();
        fs::create_dir_all(root.join("block")).unwrap();
        for (number, dir) in [("8:0", &disk), ("8:2", &part), ("253:0", &mapped)] {
            symlink(dir, root.join("dev/block").join(number)).unwrap();
        }
        symlink(&disk, root.join("block/sda")).unwrap();
        sys
    }

    fn number(major: u64, minor: u64) -> u64 {
        nix::sys::stat::makedev(major, minor)
    }

    #[test]
    fn a_partition_means_its_whole_disk() {
        let sys = sys();
        let disk = whole(sys.path(), number(8, 0)).unwrap();
        assert_eq!((disk.name.as_str(), disk.number().as_str()), ("sda", "8:0"));
        assert_eq!(whole(sys.path(), number(8, 2)).unwrap(), disk);
        let mapped = whole(sys.path(), number(253, 0)).unwrap();
        assert_eq!(mapped.number(), "253:0");
        assert!(whole(sys.path(), number(8, 9)).is_err());
    }

    #[test]
    fn every_disk_of_a_btrfs_counts() {
        let sys = sys();
        let devices = sys.path().join("fs/btrfs/uuid/devices");
        fs::create_dir_all(&devices).unwrap();
        for name in ["sda2", "dm-0"] {
            let at = if name == "sda2" { "8:2" } else { "253:0" };
            symlink(sys.path().join("dev/block").join(at), devices.join(name)).unwrap();
        }
        let names = |name: &str| -> BTreeSet<String> {
            let found = siblings(sys.path(), Path::new(name)).unwrap();
            found.into_iter().map(|disk| disk.name).collect()
        };
        assert_eq!(names("sda2"), ["dm-0", "sda"].map(str::to_owned).into());
        assert_eq!(names("sdb1"), BTreeSet::new());
    }

    #[test]
    fn what_is_no_disk_is_told_apart_from_what_is_not_there_and_nothing_else_is() {
        let sys = Path::new(SYS);
        let error = |node: &str| named(sys, node).unwrap_err();
        let missing = error("/dev/no-such-disk");
        assert!(matches!(missing, DiskError::Missing(_)), "{missing:?}");
        // What a link leads to outside of /dev is not told, not even whether it is a disk.
        for node in ["/dev/null", "/dev/shm", "/dev/null/x", "/dev/stdin"] {
            let error = error(node);
            assert!(matches!(error, DiskError::NotADisk(_)), "{node}: {error:?}");
        }
    }

    #[test]
    fn a_file_system_in_memory_is_on_no_disk() {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let error = below(Path::new(SYS), Path::new("/proc"), &mounts).unwrap_err();
        assert!(error.to_string().contains("/proc is on proc"), "{error}");
        let none = below(Path::new(SYS), Path::new("/no/such/dir"), &mounts).unwrap();
        assert_eq!(none, BTreeSet::new());
    }

    #[test]
    fn weights_take_a_scheduler_that_knows_them() {
        let sys = sys();
        let disk = whole(sys.path(), number(8, 0)).unwrap();
        let scheduler = sys.path().join("block/sda/queue/scheduler");
        fs::write(&scheduler, "none [mq-deadline] bfq\n").unwrap();
        let why = shares(sys.path(), &disk).unwrap_err();
        let way_out = "echo bfq > /sys/block/sda/queue/scheduler";
        assert!(
            why.contains("mq-deadline") && why.contains(way_out),
            "{why}"
        );
        assert!(!why.contains("modprobe"), "{why}");
        fs::write(&scheduler, "none mq-deadline [bfq]\n").unwrap();
        assert_eq!(shares(sys.path(), &disk), Ok(()));
        fs::write(&scheduler, "[none] mq-deadline\n").unwrap();
        assert!(shares(sys.path(), &disk).unwrap_err().contains("modprobe"));
        let costs = sys.path().join("fs/cgroup/io.cost.qos");
        fs::create_dir_all(costs.parent().unwrap()).unwrap();
        fs::write(&costs, "8:16 enable=1 ctrl=auto\n8:0 enable=0 ctrl=auto\n").unwrap();
        assert!(shares(sys.path(), &disk).is_err());
        fs::write(&costs, "8:0 enable=1 ctrl=auto rpct=0.00\n").unwrap();
        assert_eq!(shares(sys.path(), &disk), Ok(()));
    }
}
