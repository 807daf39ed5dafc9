//! What a container takes of the disk: a bounded count, as du(1) does it.
//!
//! The containers' trees are hostile: they change while they are counted, links in them lead anywhere, and they may
//! be deeper than there are descriptors. So nothing is followed, directories are entered from their parent's
//! descriptor, and a tree that is too deep or has too many entries counts as too large. Files that were deleted but
//! are still open are found through the container's processes.

use std::collections::BTreeSet;
use std::fs::{self, DirEntry, Metadata};
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;

use crate::runtime::ContainerId;

/// What an entry counts at least: an empty file takes an inode, and part of a directory's block.
const ENTRY_BYTES: u64 = 4096;

/// Deeper trees count as too large. Each level takes a descriptor, of 1024 that a process usually may have.
const DEPTH_MAX: usize = 128;

/// So do trees with more entries: counting them would take seconds.
const ENTRIES_MAX: u64 = 1_000_000;

/// Descriptors of a container that are looked at, at most.
const DESCRIPTORS_MAX: usize = 20_000;

/// `OVERLAYFS_SUPER_MAGIC` (statfs(2)): where a container's root file system is.
const OVERLAYFS: i64 = 0x794c_7630;

/// A running container whose use of the disk matters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Measured {
    /// Which.
    pub id: ContainerId,
    /// Its first process.
    pub pid: i32,
    /// What may be in its writable layer, if it has one.
    pub layer_limit: Option<u64>,
    /// The named volumes that it can write to.
    pub volumes: Vec<String>,
}

/// What a container takes of the disk, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Its writable layer, which goes with it; `u64::MAX` when it is too large to be counted. Beyond its limit it
    /// is not counted further.
    pub layer: u64,
    /// The volumes that it can write to, which stay.
    pub volumes: u64,
}

/// Counts what one container takes below the state directory `state`. Blocks; takes milliseconds for thousands of
/// files. What cannot be read counts as nothing.
#[must_use]
pub fn measure(state: &Path, container: &Measured) -> Usage {
    let mut usage = Usage::default();
    if let Some(limit) = container.layer_limit {
        let layer = state.join("containers").join(container.id.to_string());
        let stored = count(&layer, limit).unwrap_or(0);
        let held = if stored > limit {
            0
        } else {
            held_open(container.pid)
        };
        usage.layer = stored.saturating_add(held);
    }
    for volume in &container.volumes {
        let path = state
            .join("volumes")
            .join(container.id.app.as_str())
            .join(volume);
        let taken = count(&path, u64::MAX).unwrap_or(0);
        usage.volumes = usage.volumes.saturating_add(taken);
    }
    usage
}

/// The bytes of a tree; more than `limit` are not counted further. `u64::MAX` for a tree that is too deep or has too
/// many entries.
fn count(root: &Path, limit: u64) -> io::Result<u64> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let enter = |parent: Option<&OwnedFd>, path: &Path| -> io::Result<OwnedFd> {
        let fd = openat(parent.map(|fd| fd.as_raw_fd()), path, flags, Mode::empty())?;
        #[expect(unsafe_code, reason = "openat(2) gives a plain number")]
        // SAFETY: it was just opened and belongs to nobody else.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    };
    let mut bytes = 0_u64;
    let mut entries = 0;
    let mut linked = BTreeSet::new();
    let mut open: Vec<(Option<Rc<OwnedFd>>, PathBuf, usize)> = vec![(None, root.to_owned(), 0)];
    let mut device = None;
    while let Some((parent, name, depth)) = open.pop() {
        // It may be gone already.
        let Ok(dir) = enter(parent.as_deref(), &name) else {
            continue;
        };
        drop(parent);
        let dir = Rc::new(dir);
        let Ok(children) = fs::read_dir(format!("/proc/self/fd/{}", dir.as_raw_fd())) else {
            continue;
        };
        for (child, found) in children.flatten().filter_map(with_metadata) {
            let device = *device.get_or_insert_with(|| found.dev());
            entries += 1;
            if found.dev() != device
                || (found.nlink() > 1 && !found.is_dir() && !linked.insert(found.ino()))
            {
                continue;
            }
            bytes = bytes.saturating_add(found.blocks().saturating_mul(512).max(ENTRY_BYTES));
            if bytes > limit {
                return Ok(bytes);
            }
            if entries > ENTRIES_MAX || depth > DEPTH_MAX {
                return Ok(u64::MAX);
            }
            if found.is_dir() {
                open.push((Some(Rc::clone(&dir)), child.file_name().into(), depth + 1));
            }
        }
    }
    Ok(bytes)
}

/// Of the entry itself: asked with the directory's descriptor, links not followed.
fn with_metadata(entry: DirEntry) -> Option<(DirEntry, Metadata)> {
    let found = entry.metadata().ok()?;
    Some((entry, found))
}

/// The bytes of files in a container's root file system that were deleted and are still open.
fn held_open(init: i32) -> u64 {
    let numbers = |path: &Path| {
        let entries = fs::read_dir(path).into_iter().flatten().flatten();
        entries.filter(|entry| {
            let name = entry.file_name();
            name.as_encoded_bytes().iter().all(u8::is_ascii_digit)
        })
    };
    // The container's own process table: it has nobody else's processes.
    let table = PathBuf::from(format!("/proc/{init}/root/proc"));
    let mut seen = BTreeSet::new();
    let descriptors = numbers(&table).flat_map(|process| {
        let descriptors: Vec<PathBuf> = numbers(&process.path().join("fd"))
            .map(|fd| fd.path())
            .collect();
        descriptors
    });
    descriptors
        .take(DESCRIPTORS_MAX)
        .filter_map(|path| {
            let found = fs::metadata(&path).ok()?;
            let deleted = found.is_file() && found.nlink() == 0;
            let on_layer = || {
                nix::sys::statfs::statfs(&path)
                    .is_ok_and(|stat| i128::from(stat.filesystem_type().0) == i128::from(OVERLAYFS))
            };
            (deleted && seen.insert((found.dev(), found.ino())) && on_layer())
                .then(|| found.blocks().saturating_mul(512))
        })
        .fold(0, u64::saturating_add)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn container(volumes: &[&str]) -> Measured {
        Measured {
            id: "shop.web.7".parse().unwrap(),
            pid: i32::MAX,
            layer_limit: Some(1 << 20),
            volumes: volumes.iter().map(|name| (*name).to_owned()).collect(),
        }
    }

    #[test]
    fn layers_and_volumes_are_counted_and_links_lead_nowhere() {
        let dir = tempfile::tempdir().unwrap();
        let upper = dir.path().join("containers/shop.web.7/upper/a/b");
        let volume = dir.path().join("volumes/shop/data");
        for path in [&upper, &volume] {
            fs::create_dir_all(path).unwrap();
        }
        assert!(measure(dir.path(), &container(&["data", "none"])).layer <= 64 << 10);
        fs::write(upper.join("file"), vec![1; 100 << 10]).unwrap();
        fs::hard_link(upper.join("file"), upper.join("again")).unwrap();
        std::os::unix::fs::symlink("/", upper.join("root")).unwrap();
        fs::write(volume.join("file"), vec![1; 500 << 10]).unwrap();
        let usage = measure(dir.path(), &container(&["data", "none"]));
        assert!((100 << 10..200 << 10).contains(&usage.layer), "{usage:?}");
        assert!((500 << 10..600 << 10).contains(&usage.volumes), "{usage:?}");
    }

    #[test]
    fn empty_files_count_and_what_is_too_deep_is_too_large() {
        let dir = tempfile::tempdir().unwrap();
        let upper = dir.path().join("containers/shop.web.7/upper");
        fs::create_dir_all(&upper).unwrap();
        for number in 0..300 {
            fs::write(upper.join(number.to_string()), b"").unwrap();
        }
        let usage = measure(dir.path(), &container(&[]));
        assert!(usage.layer > 1 << 20, "{usage:?}");
        fs::remove_dir_all(&upper).unwrap();
        let mut deep = upper.clone();
        for _ in 0..DEPTH_MAX + 10 {
            deep.push("d");
        }
        fs::create_dir_all(&deep).unwrap();
        assert_eq!(measure(dir.path(), &container(&[])).layer, u64::MAX);
    }
}
