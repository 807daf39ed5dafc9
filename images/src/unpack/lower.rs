//! The layers below the one that is unpacked: read, never written.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::tar_stream::Mtime;

/// The extended attribute that tells overlayfs to show nothing of the layers below in a directory.
pub(super) const OPAQUE: &str = "trusted.overlay.opaque";
/// Directories that a layer may pass through and still be shared between images.
const PASSED_THROUGH_MAX: usize = 1024;

/// Owner and mode of a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attributes {
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

impl Default for Attributes {
    /// What a directory gets that no layer describes.
    fn default() -> Self {
        Self {
            mode: 0o755,
            uid: 0,
            gid: 0,
        }
    }
}

/// How what was unpacked depends on the layers below.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Leaning {
    /// Directories that the layer passes through without describing them (lossy UTF-8, `""` is the root), and
    /// the owner and mode they got from below.
    pub directories: BTreeMap<String, Attributes>,
    /// It leans in a way that cannot be compared: a link below was followed, a file copied up.
    pub wholly: bool,
}

impl Leaning {
    /// Whether the same layer unpacked above `lowers` (topmost first) would be the same.
    ///
    /// # Errors
    /// Any error of opening the directories.
    pub fn holds_above(&self, lowers: &[std::path::PathBuf]) -> std::io::Result<bool> {
        if self.wholly {
            return Ok(false);
        }
        let lowers = lowers
            .iter()
            .map(|path| {
                rustix::fs::open(
                    path,
                    OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
                    Mode::empty(),
                )
                .map(|root| Below { root, opaque: None })
                .map_err(std::io::Error::from)
            })
            .collect::<Result<_, _>>()?;
        let lowers = Lowers::new(lowers);
        Ok(self.directories.iter().all(|(path, attributes)| {
            let components: Vec<&[u8]> = path
                .split('/')
                .filter(|part| !part.is_empty())
                .map(str::as_bytes)
                .collect();
            match lowers.find(&components) {
                Found::Directory(found, _) => found == *attributes,
                Found::Nothing | Found::Other => *attributes == Attributes::default(),
                Found::Symlink(_) => false,
            }
        }))
    }

    pub(super) fn add(&mut self, path: &[u8], attributes: Attributes) {
        match std::str::from_utf8(path) {
            Ok(path) if self.directories.len() < PASSED_THROUGH_MAX => {
                self.directories.insert(path.to_owned(), attributes);
            }
            _ => self.wholly = true,
        }
    }
}

/// A layer below.
pub(super) struct Below {
    pub(super) root: OwnedFd,
    /// Its opaque directories, if they are known; else their attribute is read, which takes `CAP_SYS_ADMIN`.
    pub(super) opaque: Option<BTreeSet<Vec<u8>>>,
}

impl Below {
    /// Whether the directory at a path shows nothing of the layers further below.
    fn is_opaque(&self, dir: &OwnedFd, path: &[&[u8]]) -> bool {
        match &self.opaque {
            Some(known) => !known.is_empty() && known.contains(&path.join(&b'/')),
            None => is_opaque(dir),
        }
    }
}

/// The layers below, topmost first.
pub(super) struct Lowers(Vec<Below>);

/// What the layers below show at a path.
pub(super) enum Found {
    Nothing,
    Directory(Attributes, Mtime),
    Symlink(Vec<u8>),
    Other,
}

impl Lowers {
    pub(super) const fn new(topmost_first: Vec<Below>) -> Self {
        Self(topmost_first)
    }

    /// What is at the path, each of whose parents is a directory, not a link.
    pub(super) fn find(&self, path: &[&[u8]]) -> Found {
        let Some((parent, name, stat)) = self.locate(path) else {
            return Found::Nothing;
        };
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => Found::Directory(attributes(&stat), mtime(&stat)),
            FileType::Symlink => rustix::fs::readlinkat(&parent, name, Vec::new())
                .map_or(Found::Other, |target| Found::Symlink(target.into_bytes())),
            _ => Found::Other,
        }
    }

    /// Opens the regular file at the path.
    pub(super) fn open_file(&self, path: &[&[u8]]) -> Option<(OwnedFd, Stat)> {
        let (parent, name, stat) = self.locate(path)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return None;
        }
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let file = rustix::fs::openat(&parent, name, flags, Mode::empty()).ok()?;
        Some((file, stat))
    }

    /// The topmost entry at a path, unless a layer hides it: the directory it is in, its name and attributes.
    fn locate<'p>(&self, path: &[&'p [u8]]) -> Option<(OwnedFd, &'p [u8], Stat)> {
        for below in &self.0 {
            match locate_in(below, path) {
                Located::Here(parent, name, stat) => return Some((parent, name, stat)),
                Located::Hidden => return None,
                Located::NotHere => {}
            }
        }
        None
    }
}

enum Located<'p> {
    Here(OwnedFd, &'p [u8], Stat),
    /// A whiteout, an opaque directory or something that is no directory is in the way.
    Hidden,
    NotHere,
}

fn locate_in<'p>(below: &Below, path: &[&'p [u8]]) -> Located<'p> {
    let Ok(mut dir) = below.root.try_clone() else {
        return Located::Hidden;
    };
    let Some((last, parents)) = path.split_last() else {
        return match rustix::fs::fstat(&dir) {
            Ok(stat) => Located::Here(dir, b".", stat),
            Err(_) => Located::Hidden,
        };
    };
    let mut opaque = below.is_opaque(&dir, &[]);
    let absent = |opaque: bool| {
        if opaque {
            Located::Hidden
        } else {
            Located::NotHere
        }
    };
    for (depth, parent) in (1..).zip(parents) {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match rustix::fs::openat(&dir, *parent, flags, Mode::empty()) {
            Ok(next) => {
                opaque |= below.is_opaque(&next, &path[..depth]);
                dir = next;
            }
            Err(Errno::NOENT) => return absent(opaque),
            Err(_) => return Located::Hidden,
        }
    }
    match rustix::fs::statat(&dir, *last, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice => {
            Located::Hidden
        }
        Ok(stat) => Located::Here(dir, last, stat),
        Err(Errno::NOENT) => absent(opaque),
        Err(_) => Located::Hidden,
    }
}

fn is_opaque(dir: &OwnedFd) -> bool {
    let mut value = [0; 1];
    rustix::fs::fgetxattr(dir.as_fd(), OPAQUE, &mut value[..]).is_ok() && value == *b"y"
}

pub(super) fn attributes(stat: &Stat) -> Attributes {
    Attributes {
        mode: stat.st_mode & 0o7777,
        uid: stat.st_uid,
        gid: stat.st_gid,
    }
}

pub(super) fn mtime(stat: &Stat) -> Mtime {
    Mtime {
        seconds: stat.st_mtime,
        nanos: u32::try_from(stat.st_mtime_nsec).unwrap_or(0),
    }
}
