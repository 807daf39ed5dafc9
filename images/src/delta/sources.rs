//! The old trees a delta leans on: regular files in them, and nothing else anywhere.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags};

use super::DeltaError;
use super::format::Old;

/// Directories of unpacked layers, opened.
pub(super) struct Sources {
    trees: Vec<OwnedFd>,
}

impl Sources {
    pub(super) fn open(trees: &[PathBuf]) -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let trees = trees
            .iter()
            .map(|tree| Ok(rustix::fs::open(tree, flags, Mode::empty())?))
            .collect::<io::Result<_>>()?;
        Ok(Self { trees })
    }

    /// An old file of which the bytes exist; over no link, in no other tree.
    pub(super) fn file(&self, old: &Old<'_>) -> Result<File, DeltaError> {
        let failed = |source: io::Error| {
            let path = String::from_utf8_lossy(old.path);
            DeltaError::File {
                path: path.chars().take(256).collect(),
                source,
            }
        };
        let tree = self
            .trees
            .get(old.tree)
            .ok_or(DeltaError::Malformed("an old layer that it does not name"))?;
        let inside = ResolveFlags::IN_ROOT
            | ResolveFlags::NO_SYMLINKS
            | ResolveFlags::NO_MAGICLINKS
            | ResolveFlags::NO_XDEV;
        // Opening a pipe must not wait for who writes.
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let file = rustix::fs::openat2(tree, old.path, flags, Mode::empty(), inside)
            .map_err(|errno| failed(errno.into()))?;
        let stat = rustix::fs::fstat(&file).map_err(|errno| failed(errno.into()))?;
        let end = old.offset.checked_add(old.length);
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile
            || end.is_none_or(|end| end > size)
        {
            return Err(failed(io::Error::other(
                "it is no file, or one that is too short",
            )));
        }
        Ok(file.into())
    }
}

/// Bytes of a file from a position on, which no other reader of it moves.
pub(super) struct At {
    pub(super) file: File,
    pub(super) offset: u64,
}

impl io::Read for At {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        use std::os::unix::fs::FileExt as _;
        let count = self.file.read_at(buffer, self.offset)?;
        self.offset += count as u64;
        Ok(count)
    }
}
