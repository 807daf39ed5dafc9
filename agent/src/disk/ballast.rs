//! [`Ballast`]: a file that only takes space, so that there is some to give when the disk is full.
//!
//! Containers may fill the file system that the agent's state is on. What the agent must store then (history, head,
//! events) is small; removing the ballast makes room for it at once, without touching anybody's data.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use foreshore_images::Room;
use nix::fcntl::{FallocateFlags, fallocate};

const NAME: &str = "ballast";

/// With less than this the state of an agent that starts may not fit.
const STATE_BYTES: u64 = 256 << 10;

/// The ballast of a state directory.
#[derive(Debug)]
pub struct Ballast {
    path: PathBuf,
    size: u64,
    held: bool,
}

impl Ballast {
    /// That of `state`, `size` bytes; nothing is made yet. One of another size is removed.
    #[must_use]
    pub fn new(state: &Path, size: u64) -> Self {
        let path = state.join(NAME);
        let held = size > 0 && allocated(&path) >= size && len(&path) == size;
        if !held {
            remove(&path);
        }
        Self { path, size, held }
    }

    /// Whether it is to be made and is not there.
    #[must_use]
    pub const fn is_missing(&self) -> bool {
        self.size > 0 && !self.held
    }

    /// Makes it when there is room for it and as much again beside the reserve.
    ///
    /// # Errors
    ///
    /// When the file system refuses; nothing is left of it then.
    pub fn settle(&mut self, room: &Room) -> io::Result<()> {
        if !self.is_missing() || room.spare_bytes() < self.size.saturating_mul(2) {
            return Ok(());
        }
        let made = self.make();
        if made.is_err() {
            remove(&self.path);
        }
        self.held = made.is_ok();
        made
    }

    fn make(&self) -> io::Result<()> {
        use std::os::fd::AsRawFd as _;
        let mut file = File::options()
            .create(true)
            .truncate(true)
            .write(true)
            .mode(0o600)
            .open(&self.path)?;
        let size = i64::try_from(self.size).map_err(io::Error::other)?;
        match fallocate(file.as_raw_fd(), FallocateFlags::empty(), 0, size) {
            Ok(()) => Ok(()),
            Err(nix::Error::EOPNOTSUPP | nix::Error::ENOSYS) => {
                // A file system that does not allocate ahead; some of these do not store zeros either.
                let mut block = [0_u8; 4096];
                for number in 0..self.size.div_ceil(block.len() as u64) {
                    for (index, byte) in block.iter_mut().enumerate() {
                        *byte = (number.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> (index % 57))
                            .to_le_bytes()[0];
                    }
                    file.write_all(&block)?;
                }
                file.set_len(self.size)?;
                file.sync_all()
            }
            Err(errno) => Err(errno.into()),
        }
    }

    /// Gives it up. True when there was some, so that writing again may work.
    pub fn release(&mut self) -> bool {
        let held = std::mem::take(&mut self.held);
        if held {
            remove(&self.path);
        }
        held
    }

    /// How many bytes it has when it is there.
    #[must_use]
    pub const fn size(&self) -> u64 {
        self.size
    }
}

/// Removes the ballast of `state` when there is next to no space left: for an agent that starts and cannot store
/// that it did. True when it did.
#[must_use]
pub fn make_way(state: &Path) -> bool {
    let full = Room::of(state, Some(STATE_BYTES)).is_ok_and(|room| !room.is_enough());
    full && fs::remove_file(state.join(NAME)).is_ok()
}

fn allocated(path: &Path) -> u64 {
    fs::symlink_metadata(path).map_or(0, |found| found.blocks().saturating_mul(512))
}

fn len(path: &Path) -> u64 {
    fs::symlink_metadata(path).map_or(0, |found| found.len())
}

fn remove(path: &Path) {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(%error, path = %path.display(), "the ballast cannot be removed");
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn room(free_bytes: u64) -> Room {
        Room {
            free_bytes,
            reserve_bytes: 1 << 20,
            ..Room::default()
        }
    }

    #[test]
    fn it_is_really_allocated_and_given_up_once() {
        let dir = tempfile::tempdir().unwrap();
        let mut ballast = Ballast::new(dir.path(), 1 << 20);
        ballast.settle(&room(2 << 20)).unwrap();
        assert!(ballast.is_missing(), "made without room for it");
        ballast.settle(&room(3 << 20)).unwrap();
        let path = dir.path().join("ballast");
        assert!(allocated(&path) >= 1 << 20);
        assert!(!ballast.is_missing());
        assert!(
            !Ballast::new(dir.path(), 1 << 20).is_missing(),
            "taken over"
        );
        assert!(ballast.release() && !path.exists());
        assert!(!ballast.release() && ballast.is_missing());
        ballast.settle(&room(3 << 20)).unwrap();
        assert!(
            Ballast::new(dir.path(), 2 << 20).is_missing(),
            "of another size"
        );
        assert!(!path.exists());
    }

    #[test]
    fn none_is_none() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("ballast"), b"left of another configuration").unwrap();
        let mut ballast = Ballast::new(dir.path(), 0);
        ballast.settle(&room(u64::MAX)).unwrap();
        assert!(!ballast.is_missing() && !ballast.release());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_disk_with_room_keeps_its_ballast_at_a_start() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("ballast"), b"x").unwrap();
        assert!(!make_way(dir.path()));
        assert!(dir.path().join("ballast").exists());
    }
}
