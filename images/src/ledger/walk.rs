//! [`Walk`]: a tree from top to bottom in the order of a ledger, over directory descriptors and no link.

use std::fs::File;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;

use super::{LedgerError, Xattr, file_type, is_rot};

/// Bytes of names that are in order at once: a directory of a hundred thousand long names.
const NAMES_BYTES_MAX: usize = 32 << 20;
/// The longest value of an extended attribute (`XATTR_SIZE_MAX`), and the longest list of their names.
const XATTR_BYTES_MAX: usize = 64 << 10;

const DIRECTORY: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);

/// A walk under way. It stands at an entry after [`advance`](Self::advance) said so.
pub(super) struct Walk {
    /// From the root down to the directory that is walked.
    levels: Vec<Level>,
    /// Of the entry that the walk stands at.
    path: Vec<u8>,
    at: Option<At>,
    /// What the levels hold.
    names_bytes: usize,
    root: Option<OwnedFd>,
}

struct Level {
    dir: OwnedFd,
    names: std::vec::IntoIter<Vec<u8>>,
    /// Of the names when it was opened.
    names_bytes: usize,
    /// How long the path of the directory is.
    path: usize,
}

/// The entry that a walk stands at.
struct At {
    stat: Stat,
    name: Vec<u8>,
    /// It is a directory, whose entries come next.
    entered: bool,
    /// Something of it cannot be read.
    fault: Option<Errno>,
}

impl Walk {
    pub(super) fn new(tree: &Path) -> Result<Self, LedgerError> {
        let root = rustix::fs::open(tree, DIRECTORY, Mode::empty())?;
        Ok(Self {
            levels: Vec::new(),
            path: Vec::new(),
            at: None,
            names_bytes: 0,
            root: Some(root),
        })
    }

    /// Goes on to the next entry; false at the end. The root is the first.
    ///
    /// # Errors
    /// Those that are not the entry's own.
    pub(super) fn advance(&mut self) -> Result<bool, LedgerError> {
        if let Some(root) = self.root.take() {
            let stat = rustix::fs::fstat(&root)?;
            self.at = Some(At {
                stat,
                name: b".".to_vec(),
                entered: false,
                fault: None,
            });
            self.enter(root)?;
            return Ok(true);
        }
        self.at = None;
        loop {
            let Some(level) = self.levels.last_mut() else {
                return Ok(false);
            };
            self.path.truncate(level.path);
            let Some(name) = level.names.next() else {
                self.names_bytes -= level.names_bytes;
                self.levels.pop();
                continue;
            };
            if !self.path.is_empty() {
                self.path.push(b'/');
            }
            self.path.extend(&name);
            let dir = level.dir.as_fd();
            let stat = rustix::fs::statat(dir, name.as_slice(), AtFlags::SYMLINK_NOFOLLOW);
            let (stat, fault) = match stat {
                Ok(stat) => (stat, None),
                Err(errno) if is_rot(errno) => (rustix::fs::fstat(dir)?, Some(errno)),
                // It went since the directory was read.
                Err(Errno::NOENT) => continue,
                Err(errno) => return Err(errno.into()),
            };
            let mut child = None;
            let mut at = At {
                stat,
                name,
                entered: false,
                fault,
            };
            if fault.is_none() && file_type(&stat) == FileType::Directory {
                match rustix::fs::openat(dir, at.name.as_slice(), DIRECTORY, Mode::empty()) {
                    Ok(dir) => child = Some(dir),
                    Err(errno) if is_rot(errno) => at.fault = Some(errno),
                    Err(errno) => return Err(errno.into()),
                }
            }
            self.at = Some(at);
            if let Some(child) = child {
                self.enter(child)?;
            }
            return Ok(true);
        }
    }

    /// Takes the names of a directory that the walk stands at.
    fn enter(&mut self, dir: OwnedFd) -> Result<(), LedgerError> {
        let at = self.at.as_mut().expect("it stands at a directory");
        let mut names: Vec<Vec<u8>> = Vec::new();
        let mut names_bytes = 0;
        for entry in Dir::read_from(&dir)? {
            let entry = match entry {
                Ok(entry) => entry,
                Err(errno) if is_rot(errno) => {
                    at.fault = Some(errno);
                    return Ok(());
                }
                Err(errno) => return Err(errno.into()),
            };
            let name = entry.file_name().to_bytes();
            if matches!(name, b"." | b"..") {
                continue;
            }
            names_bytes += name.len() + size_of::<Vec<u8>>();
            if self.names_bytes + names_bytes > NAMES_BYTES_MAX {
                return Err(LedgerError::TooLong);
            }
            names.push(name.to_vec());
        }
        names.sort_unstable();
        self.names_bytes += names_bytes;
        self.levels.push(Level {
            dir,
            names: names.into_iter(),
            names_bytes,
            path: self.path.len(),
        });
        at.entered = true;
        Ok(())
    }

    /// Passes over what is in the directory that the walk stands at.
    pub(super) fn pass_over(&mut self) {
        if let Some(at) = &mut self.at
            && std::mem::replace(&mut at.entered, false)
            && let Some(level) = self.levels.pop()
        {
            self.names_bytes -= level.names_bytes;
        }
    }

    /// Below the root; empty for the root itself.
    pub(super) fn path(&self) -> &[u8] {
        &self.path
    }

    /// Of the entry; of the directory that it is in when the entry's own cannot be had.
    pub(super) fn stat(&self) -> &Stat {
        &self.at().stat
    }

    /// Why something of the entry, or what is in it, cannot be read, if that is so.
    pub(super) fn fault(&self) -> Option<Errno> {
        self.at().fault
    }

    /// Opens the regular file that the walk stands at; nothing notes that it is read.
    pub(super) fn open(&self) -> Result<File, Errno> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let open = |flags| {
            let name = self.at().name.as_slice();
            rustix::fs::openat(self.parent(), name, flags, Mode::empty()).map(File::from)
        };
        match open(flags | OFlags::NOATIME) {
            // Somebody else's file, and this process is not root.
            Err(Errno::PERM) => open(flags),
            opened => opened,
        }
    }

    /// Where the link leads that the walk stands at.
    pub(super) fn link_target(&self) -> Result<Vec<u8>, Errno> {
        let name = self.at().name.as_slice();
        rustix::fs::readlinkat(self.parent(), name, Vec::new()).map(std::ffi::CString::into_bytes)
    }

    /// The attributes that images and overlayfs have; those of a security module are the device's own. `file` is the
    /// regular file that the walk stands at, opened.
    pub(super) fn xattrs(&self, file: Option<&File>) -> Result<Vec<Xattr>, Errno> {
        // Only files and directories are given any.
        match (file, self.levels.last()) {
            (Some(file), _) => xattrs(file.as_fd()),
            (None, Some(level)) if self.at().entered => xattrs(level.dir.as_fd()),
            _ => Ok(Vec::new()),
        }
    }

    fn at(&self) -> &At {
        self.at.as_ref().expect("it stands at an entry")
    }

    fn parent(&self) -> BorrowedFd<'_> {
        // An entered directory is itself the last.
        let above = self.levels.len() - usize::from(self.at().entered);
        let level = above
            .checked_sub(1)
            .and_then(|above| self.levels.get(above));
        level.expect("only the root has none").dir.as_fd()
    }
}

fn xattrs(file: BorrowedFd<'_>) -> Result<Vec<Xattr>, Errno> {
    let length = match rustix::fs::flistxattr_query(file) {
        Ok(0) | Err(Errno::NOTSUP) => return Ok(Vec::new()),
        Ok(length) => length.min(XATTR_BYTES_MAX),
        Err(errno) => return Err(errno),
    };
    let mut names = vec![0; length];
    let length = rustix::fs::flistxattr(file, &mut names[..])?;
    let mut value = Vec::new();
    let mut found = Vec::new();
    for name in names[..length].split(|byte| *byte == 0) {
        if !(name.starts_with(b"user.")
            || name.starts_with(b"trusted.")
            || name == b"security.capability")
        {
            continue;
        }
        value.resize(XATTR_BYTES_MAX, 0);
        let length = match rustix::fs::fgetxattr(file, name, &mut value[..]) {
            Ok(length) => length,
            Err(Errno::NODATA) => continue,
            Err(errno) => return Err(errno),
        };
        found.push(Xattr {
            name: name.to_vec(),
            length: length as u64,
            sum: crc32fast::hash(&value[..length]),
        });
    }
    found.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(found)
}
