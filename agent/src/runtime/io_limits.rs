//! How fast a container may read and write disks: `blkio_config` as the kernel's cgroup files have it, v1 and v2.
//!
//! Written by the starting process between making and letting run the container. The library is told nothing of it: it
//! drops weights of single disks on v1, overflows when it converts weights for `io.weight`, and writes files without
//! looking whether the kernel has them.
//!
//! Limits hold or the container does not start. Weights are best effort, as in Compose: a share of a disk exists only
//! while its scheduler knows shares, which is for the device's owner to choose and may change at any time. Whether they
//! have an effect is told by `foreshore-agent status` and `doctor`.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use foreshore_protocol::manifest::{BlkioConfig, DiskPath};

use crate::disk::block::{self, Disk, DiskError};

/// The file of cgroup v2 for all limits (kernel documentation, "Control Group v2", IO Interface Files).
const UNIFIED: &str = "io.max";

/// The files of cgroup v1 (kernel documentation, "Block IO Controller"), beside what `io.max` calls the same.
const SPLIT: [(&str, &str); 4] = [
    ("rbps", "blkio.throttle.read_bps_device"),
    ("wbps", "blkio.throttle.write_bps_device"),
    ("riops", "blkio.throttle.read_iops_device"),
    ("wiops", "blkio.throttle.write_iops_device"),
];

/// Files that take the weight of a cgroup, from 1, 100 unless set: BFQ's on v1 and v2, and io.cost's.
const WEIGHTS: [&str; 3] = ["blkio.bfq.weight", "io.bfq.weight", "io.weight"];

/// Files that take `MAJOR:MINOR WEIGHT`.
const DISK_WEIGHTS: [&str; 3] = ["blkio.bfq.weight_device", "io.bfq.weight", "io.weight"];

/// Why a container cannot be held to its limits.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LimitError {
    /// The kernel, or how cgroups are set up, does not offer it.
    #[error(
        "this device cannot limit reading and writing: no cgroup of the container has {0}; see cgroup.io of foreshore-agent doctor, or remove the limits under blkio_config"
    )]
    Unsupported(&'static str),
    /// The kernel has the file and does not take the limit.
    #[error("the kernel does not limit disk {disk} to {limit}: {why}")]
    NotTaken {
        /// Its name.
        disk: String,
        /// As in `io.max`.
        limit: String,
        /// The error, or what the file says instead.
        why: String,
    },
}

/// What one container may do, by whole disks.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct IoLimits {
    weight: Option<u16>,
    weights: BTreeMap<Disk, u64>,
    /// By the words of `io.max`.
    rates: BTreeMap<Disk, BTreeMap<&'static str, u64>>,
}

impl IoLimits {
    /// Looks up the disks that `config` names; `state` are the directories of the agent's state. Where two entries mean
    /// one disk, the lower value counts.
    pub(crate) fn find(config: &BlkioConfig, state: &[PathBuf]) -> Result<Self, DiskError> {
        Self::with(config, |path| block::find(path, state))
    }

    fn with(
        config: &BlkioConfig,
        find: impl Fn(&DiskPath) -> Result<BTreeSet<Disk>, DiskError>,
    ) -> Result<Self, DiskError> {
        let mut limits = Self {
            weight: config.weight,
            ..Self::default()
        };
        for entry in &config.weight_device {
            for disk in find(&entry.path)? {
                let weight = u64::from(entry.weight);
                let least = limits.weights.entry(disk).or_insert(weight);
                *least = weight.min(*least);
            }
        }
        let bytes = [
            ("rbps", &config.device_read_bps),
            ("wbps", &config.device_write_bps),
        ];
        let bytes = bytes.into_iter().flat_map(|(word, entries)| {
            let rates = entries.iter().map(|entry| (&entry.path, entry.rate.0));
            rates.map(move |(path, rate)| (word, path, rate))
        });
        let operations = [
            ("riops", &config.device_read_iops),
            ("wiops", &config.device_write_iops),
        ];
        let operations = operations.into_iter().flat_map(|(word, entries)| {
            let rates = entries.iter();
            rates.map(move |entry| (word, &entry.path, u64::from(entry.rate)))
        });
        for (word, path, rate) in bytes.chain(operations) {
            for disk in find(path)? {
                let least = limits
                    .rates
                    .entry(disk)
                    .or_default()
                    .entry(word)
                    .or_insert(rate);
                *least = rate.min(*least);
            }
        }
        Ok(limits)
    }

    /// Sets them for the container whose cgroups these are, one in each hierarchy; some may not exist.
    pub(crate) fn set(&self, cgroups: &[PathBuf]) -> Result<(), LimitError> {
        for (disk, rates) in &self.rates {
            let file = |name: &str| {
                cgroups
                    .iter()
                    .map(|dir| dir.join(name))
                    .find(|file| file.exists())
            };
            if let Some(file) = file(UNIFIED) {
                let mut line = disk.number();
                for (word, rate) in rates {
                    let _infallible = write!(line, " {word}={rate}");
                }
                take(disk, &file, &line)?;
                continue;
            }
            for (word, rate) in rates {
                let name = SPLIT.iter().find(|(known, _)| known == word);
                let (_, name) = name.expect("every word is one of these");
                let file = file(name).ok_or(LimitError::Unsupported(UNIFIED_OR_SPLIT))?;
                take(disk, &file, &format!("{} {rate}", disk.number()))?;
            }
        }
        self.set_weights(cgroups);
        Ok(())
    }

    fn set_weights(&self, cgroups: &[PathBuf]) {
        let write = |names: [&str; 3], text: &str| {
            for file in cgroups
                .iter()
                .flat_map(|dir| names.map(|name| dir.join(name)))
            {
                if file.exists() {
                    // Refused for a disk whose scheduler knows no weights.
                    let _best_effort = fs::write(file, text);
                }
            }
        };
        if let Some(weight) = self.weight {
            write(WEIGHTS, &weight.to_string());
        }
        for (disk, weight) in &self.weights {
            write(DISK_WEIGHTS, &format!("{} {weight}", disk.number()));
        }
    }
}

/// For people.
const UNIFIED_OR_SPLIT: &str = "io.max (cgroup v2) or blkio.throttle (v1)";

/// Writes a limit and looks whether the kernel has it.
fn take(disk: &Disk, file: &Path, line: &str) -> Result<(), LimitError> {
    let refused = |why: String| LimitError::NotTaken {
        disk: disk.to_string(),
        limit: line.to_owned(),
        why,
    };
    let text = fs::write(file, line)
        .and_then(|()| fs::read_to_string(file))
        .map_err(|error| refused(error.to_string()))?;
    if has(&text, line) {
        return Ok(());
    }
    let name = file.file_name().unwrap_or_default().display();
    Err(refused(format!("{name} says {:?}", text.trim())))
}

/// Whether one of the lines says all of what `line` does.
fn has(text: &str, line: &str) -> bool {
    let mut wanted = line.split_whitespace();
    let number = wanted.next();
    let wanted: Vec<&str> = wanted.collect();
    text.lines().any(|found| {
        let mut found = found.split_whitespace();
        let same = found.next() == number;
        let found: Vec<&str> = found.collect();
        same && wanted.iter().all(|word| found.contains(word))
    })
}

/// Lets what is in a cgroup read and write as fast as it can, so that it can end: a process that waits for its turn at a
/// disk does not take SIGKILL before it had it, which at a low rate is minutes later.
pub(crate) fn lift(cgroup: &Path) {
    let lift = |name: &str, without: &str| {
        let file = cgroup.join(name);
        let text = fs::read_to_string(&file).unwrap_or_default();
        for number in text.lines().filter_map(|line| line.split(' ').next()) {
            if let Err(error) = fs::write(&file, format!("{number} {without}"))
                && error.kind() != io::ErrorKind::NotFound
            {
                tracing::warn!(file = %file.display(), %error, "failed to lift an I/O limit");
            }
        }
    };
    lift(UNIFIED, "rbps=max wbps=max riops=max wiops=max");
    for (_, name) in SPLIT {
        // 0 is no limit there.
        lift(name, "0");
    }
}

/// Why the weights of a service have no effect now, if they have none; disk by disk.
pub(crate) fn without_weights(config: &BlkioConfig, state: &[PathBuf]) -> Option<String> {
    if !config.has_weights() {
        return None;
    }
    let named = config.weight_device.iter().map(|entry| &entry.path);
    let paths = named.chain(config.weight.is_some().then_some(&DiskPath::State));
    let disks: BTreeSet<Disk> = paths
        .filter_map(|path| block::find(path, state).ok())
        .flatten()
        .collect();
    let without: Vec<String> = disks
        .iter()
        .filter_map(|disk| block::shared_by_weight(disk).err())
        .collect();
    (!without.is_empty()).then(|| without.join("; "))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn disk(name: &str, major: u64, minor: u64) -> Disk {
        Disk {
            name: name.to_owned(),
            major,
            minor,
        }
    }

    /// Two disks: the state is on both, `/dev/a` and `/dev/a1` are the first.
    fn find(config: Value) -> Result<IoLimits, DiskError> {
        let config: BlkioConfig = serde_json::from_value(config).unwrap();
        IoLimits::with(&config, |path| {
            let (a, b) = (disk("a", 8, 0), disk("b", 8, 16));
            Ok(match path {
                DiskPath::State => BTreeSet::from([a, b]),
                DiskPath::Node(node) if node.starts_with("/dev/a") => BTreeSet::from([a]),
                DiskPath::Node(node) => return Err(DiskError::Missing(node.clone())),
            })
        })
    }

    /// A cgroup with these files.
    fn cgroup(files: &[&str]) -> (tempfile::TempDir, Vec<PathBuf>) {
        let dir = tempfile::tempdir().unwrap();
        for file in files {
            fs::write(dir.path().join(file), "").unwrap();
        }
        let dirs = vec![PathBuf::from("/no/such/cgroup"), dir.path().to_owned()];
        (dir, dirs)
    }

    fn all() -> Value {
        json!({
            "weight": 300,
            "weight_device": [{"path": "/dev/a", "weight": 700}, {"path": "/dev/a1", "weight": 50}],
            "device_read_bps": [{"path": "state", "rate": "2m"}, {"path": "/dev/a1", "rate": "1m"}],
            "device_write_bps": [{"path": "/dev/a", "rate": "4k"}],
            "device_read_iops": [{"path": "/dev/a", "rate": 7}],
            "device_write_iops": [{"path": "/dev/a", "rate": 9}, {"path": "/dev/a1", "rate": 10}],
        })
    }

    #[test]
    fn of_two_entries_for_one_disk_the_lower_counts() {
        let limits = find(all()).unwrap();
        let rates = |disk: &Disk| limits.rates[disk].clone();
        assert_eq!(
            rates(&disk("a", 8, 0)),
            BTreeMap::from([
                ("rbps", 1 << 20),
                ("wbps", 4096),
                ("riops", 7),
                ("wiops", 9)
            ])
        );
        assert_eq!(
            rates(&disk("b", 8, 16)),
            BTreeMap::from([("rbps", 2 << 20)])
        );
        assert_eq!(limits.weights, BTreeMap::from([(disk("a", 8, 0), 50)]));
        let missing = find(json!({"device_read_iops": [{"path": "/dev/c", "rate": 1}]}));
        assert!(matches!(missing, Err(DiskError::Missing(_))));
        assert_eq!(find(json!({})).unwrap(), IoLimits::default());
    }

    #[test]
    fn on_v2_one_line_a_disk_says_it_all() {
        // A file of ours keeps only the last line.
        let (dir, dirs) = cgroup(&[UNIFIED, "io.weight", "io.bfq.weight"]);
        let mut limits = find(all()).unwrap();
        limits.rates.remove(&disk("b", 8, 16));
        limits.set(&dirs).unwrap();
        let read = |name: &str| fs::read_to_string(dir.path().join(name)).unwrap();
        assert_eq!(read(UNIFIED), "8:0 rbps=1048576 riops=7 wbps=4096 wiops=9");
        for name in ["io.weight", "io.bfq.weight"] {
            assert_eq!(read(name), "8:0 50", "{name}");
        }
        lift(dir.path());
        assert_eq!(read(UNIFIED), "8:0 rbps=max wbps=max riops=max wiops=max");
    }

    #[test]
    fn on_v1_each_kind_has_its_file() {
        let mut files = SPLIT.map(|(_, name)| name).to_vec();
        files.extend(["blkio.bfq.weight", "blkio.bfq.weight_device"]);
        let (dir, dirs) = cgroup(&files);
        let mut limits = find(all()).unwrap();
        limits.rates.remove(&disk("b", 8, 16));
        limits.set(&dirs).unwrap();
        let read = |name: &str| fs::read_to_string(dir.path().join(name)).unwrap();
        for (name, text) in [
            ("blkio.throttle.read_bps_device", "8:0 1048576"),
            ("blkio.throttle.write_bps_device", "8:0 4096"),
            ("blkio.throttle.read_iops_device", "8:0 7"),
            ("blkio.throttle.write_iops_device", "8:0 9"),
            ("blkio.bfq.weight", "300"),
            ("blkio.bfq.weight_device", "8:0 50"),
        ] {
            assert_eq!(read(name), text, "{name}");
        }
        lift(dir.path());
        assert_eq!(read("blkio.throttle.write_bps_device"), "8:0 0");
    }

    #[test]
    fn a_kernel_without_limits_refuses_them_and_one_without_weights_does_not() {
        let (dir, dirs) = cgroup(&["memory.max"]);
        let refused = find(all()).unwrap().set(&dirs).unwrap_err();
        assert!(matches!(refused, LimitError::Unsupported(_)), "{refused}");
        let weights = json!({"weight": 10, "weight_device": [{"path": "/dev/a", "weight": 10}]});
        find(weights).unwrap().set(&dirs).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_the_kernel_says_is_compared_word_by_word() {
        let says =
            "8:16 rbps=1 wbps=max riops=max wiops=max\n8:0 rbps=10 wbps=2 riops=max wiops=max\n";
        assert!(has(says, "8:0 rbps=10 wbps=2") && has("8:0 4096\n", "8:0 4096"));
        for line in [
            "8:0 rbps=1",
            "8:0 rbps=10 wbps=3",
            "8:1 rbps=10",
            "8:16 rbps=10",
        ] {
            assert!(!has(says, line), "{line}");
        }
        assert!(!has("", "8:0 4096") && !has("8:0 40960\n", "8:0 4096"));
    }
}
