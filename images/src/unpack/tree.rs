//! The directory that is being filled, and the only way to a place in it.
//!
//! Every step goes from a directory descriptor to a name in it with `O_NOFOLLOW`; symbolic links on the way are
//! read and resolved here, within the root, as a process in the container would see them. So nothing outside
//! can be reached, whatever the archive says, also on kernels without openat2(2).

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, XattrFlags};
use rustix::io::Errno;

use super::lower::{self, Attributes, Found, Leaning, Lowers, OPAQUE};
use super::{DEPTH_MAX, UnpackError, disk_error, entry_error};
use crate::tar_stream::Mtime;

/// Symbolic links followed for one path, as in the kernel.
const LINKS_MAX: usize = 40;
const DIRECTORY: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);

/// The directory being filled.
pub(super) struct Tree {
    root: OwnedFd,
    lowers: Lowers,
    leaning: Leaning,
    inherited_times: BTreeMap<Vec<u8>, Mtime>,
    root_is_explicit: bool,
    /// Paths of directories below which the layers below do not show.
    opaque: BTreeSet<Vec<u8>>,
    /// The directory of the last place: archives list a directory's entries one after the other. Forgotten
    /// whenever something is removed.
    last: Option<(Vec<u8>, Rc<OwnedFd>, Vec<Vec<u8>>)>,
}

/// A name in a directory, both known to be inside.
pub(super) struct Place {
    dir: Rc<OwnedFd>,
    parents: Vec<Vec<u8>>,
    name: Vec<u8>,
}

/// Why there is no such place.
pub(super) enum PlaceFault {
    Errno(Errno),
    Problem(&'static str),
}

impl From<Errno> for PlaceFault {
    fn from(errno: Errno) -> Self {
        Self::Errno(errno)
    }
}

impl PlaceFault {
    pub(super) fn at(self, path: &[u8]) -> UnpackError {
        match self {
            Self::Errno(errno) => disk_error("reach", path, errno),
            Self::Problem(problem) => entry_error(path, problem),
        }
    }
}

impl Place {
    pub(super) fn dir(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }

    pub(super) fn name(&self) -> &[u8] {
        &self.name
    }

    /// The real path below the root.
    pub(super) fn path(&self) -> Vec<u8> {
        joined(&self.parents, Some(&self.name))
    }

    fn components(&self) -> Vec<&[u8]> {
        self.parents
            .iter()
            .chain([&self.name])
            .map(Vec::as_slice)
            .collect()
    }
}

impl Tree {
    pub(super) const fn new(root: OwnedFd, lowers: Lowers) -> Self {
        Self {
            root,
            lowers,
            leaning: Leaning {
                directories: BTreeMap::new(),
                wholly: false,
            },
            inherited_times: BTreeMap::new(),
            root_is_explicit: false,
            opaque: BTreeSet::new(),
            last: None,
        }
    }

    /// The place `name` in the directory that `parents` leads to; missing directories are made as the layers
    /// below have them.
    pub(super) fn place(&mut self, parents: &[&[u8]], name: &[u8]) -> Result<Place, PlaceFault> {
        let key = parents.join(&b'/');
        if let Some((last, dir, resolved)) = &self.last
            && *last == key
        {
            return Ok(Place {
                dir: Rc::clone(dir),
                parents: resolved.clone(),
                name: name.to_vec(),
            });
        }
        let (dir, resolved) = self.walk(parents)?;
        let dir = Rc::new(dir);
        self.last = Some((key, Rc::clone(&dir), resolved.clone()));
        Ok(Place {
            dir,
            parents: resolved,
            name: name.to_vec(),
        })
    }

    fn walk(&mut self, parents: &[&[u8]]) -> Result<(OwnedFd, Vec<Vec<u8>>), PlaceFault> {
        let mut ahead: VecDeque<Vec<u8>> = parents.iter().map(|part| part.to_vec()).collect();
        let mut dir = self.reopen_root()?;
        let mut resolved: Vec<Vec<u8>> = Vec::new();
        let mut links = 0;
        while let Some(part) = ahead.pop_front() {
            match part.as_slice() {
                b"" | b"." => continue,
                b".." => {
                    resolved.pop();
                    dir = self.open_components(&resolved)?;
                    continue;
                }
                _ => {}
            }
            let target = match rustix::fs::openat(&dir, part.as_slice(), DIRECTORY, Mode::empty()) {
                Ok(next) => {
                    dir = next;
                    resolved.push(part);
                    None
                }
                Err(Errno::NOENT) => self.enter_missing(&mut dir, &mut resolved, part)?,
                Err(Errno::NOTDIR | Errno::LOOP) => {
                    self.enter_other(&mut dir, &mut resolved, part)?
                }
                Err(errno) => return Err(errno.into()),
            };
            if let Some(target) = target {
                links += 1;
                if links > LINKS_MAX {
                    return Err(PlaceFault::Errno(Errno::LOOP));
                }
                if target.starts_with(b"/") {
                    resolved.clear();
                    dir = self.reopen_root()?;
                }
                for part in target.split(|byte| *byte == b'/').rev() {
                    ahead.push_front(part.to_vec());
                }
            }
            if resolved.len() + ahead.len() > 2 * DEPTH_MAX {
                return Err(PlaceFault::Problem("is too deep"));
            }
        }
        Ok((dir, resolved))
    }

    /// A parent that this layer does not have: made, or a link from below to follow.
    fn enter_missing(
        &mut self,
        dir: &mut OwnedFd,
        resolved: &mut Vec<Vec<u8>>,
        part: Vec<u8>,
    ) -> Result<Option<Vec<u8>>, PlaceFault> {
        let mut path: Vec<&[u8]> = resolved.iter().map(Vec::as_slice).collect();
        path.push(&part);
        let found = if self.is_cut_off(&path) {
            Found::Nothing
        } else {
            self.lowers.find(&path)
        };
        let full = path.join(&b'/');
        let attributes = match found {
            Found::Symlink(target) => {
                self.leaning.wholly = true;
                return Ok(Some(target));
            }
            Found::Directory(attributes, mtime) => {
                self.inherited_times.insert(full.clone(), mtime);
                attributes
            }
            Found::Nothing | Found::Other => Attributes::default(),
        };
        rustix::fs::mkdirat(&*dir, part.as_slice(), Mode::from_raw_mode(0o700))?;
        let next = rustix::fs::openat(&*dir, part.as_slice(), DIRECTORY, Mode::empty())?;
        set(&next, attributes)?;
        if !self.is_cut_off(&path) {
            self.leaning.add(&full, attributes);
        }
        *dir = next;
        resolved.push(part);
        Ok(None)
    }

    /// A parent that is a link (returned), a whiteout (becomes an opaque directory), or no directory at all.
    fn enter_other(
        &mut self,
        dir: &mut OwnedFd,
        resolved: &mut Vec<Vec<u8>>,
        part: Vec<u8>,
    ) -> Result<Option<Vec<u8>>, PlaceFault> {
        let stat = rustix::fs::statat(&*dir, part.as_slice(), AtFlags::SYMLINK_NOFOLLOW)?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Symlink => Ok(Some(
                rustix::fs::readlinkat(&*dir, part.as_slice(), Vec::new())?.into_bytes(),
            )),
            FileType::CharacterDevice => {
                let place = Place {
                    dir: Rc::new(dir.try_clone().map_err(errno)?),
                    parents: resolved.clone(),
                    name: part,
                };
                let next = self.directory(&place)?;
                set(&next, Attributes::default())?;
                *dir = next;
                resolved.push(place.name);
                Ok(None)
            }
            _ => Err(PlaceFault::Problem(
                "lies below something that is not a directory",
            )),
        }
    }

    /// Whether the layers below do not show at the path: below an opaque directory of this layer.
    fn is_cut_off(&self, path: &[&[u8]]) -> bool {
        (0..path.len()).any(|end| self.opaque.contains(&path[..end].join(&b'/')))
    }

    pub(super) const fn root_is_explicit(&mut self) {
        self.root_is_explicit = true;
    }

    /// A second descriptor of the root directory.
    pub(super) fn reopen_root(&self) -> Result<OwnedFd, Errno> {
        rustix::fs::openat(&self.root, ".", DIRECTORY, Mode::empty())
    }

    fn open_components(&self, components: &[Vec<u8>]) -> Result<OwnedFd, Errno> {
        components
            .iter()
            .try_fold(self.reopen_root()?, |dir, part| {
                rustix::fs::openat(&dir, part.as_slice(), DIRECTORY, Mode::empty())
            })
    }

    /// Opens a directory by the path that [`Place::path`] gave.
    pub(super) fn open_directory(&self, path: &[u8]) -> Result<OwnedFd, Errno> {
        let parts: Vec<Vec<u8>> = path
            .split(|byte| *byte == b'/')
            .filter(|part| !part.is_empty())
            .map(<[u8]>::to_vec)
            .collect();
        self.open_components(&parts)
    }

    pub(super) fn file_type(&self, place: &Place) -> Result<FileType, Errno> {
        let stat = rustix::fs::statat(place.dir(), place.name(), AtFlags::SYMLINK_NOFOLLOW)?;
        Ok(FileType::from_raw_mode(stat.st_mode))
    }

    /// The directory at the place: the one that is there, or a new one instead of whatever is there.
    pub(super) fn directory(&mut self, place: &Place) -> Result<OwnedFd, Errno> {
        let there = self.file_type(place);
        if there != Ok(FileType::Directory) {
            self.clear(place)?;
            rustix::fs::mkdirat(place.dir(), place.name(), Mode::from_raw_mode(0o700))?;
        }
        let directory = rustix::fs::openat(place.dir(), place.name(), DIRECTORY, Mode::empty())?;
        // A whiteout and a directory of one name: what is below is hidden, what is in this layer is not.
        if there == Ok(FileType::CharacterDevice) {
            self.set_opaque(&directory, place.path())?;
        }
        Ok(directory)
    }

    /// Removes whatever is at the place, a whole directory, too.
    pub(super) fn clear(&mut self, place: &Place) -> Result<(), Errno> {
        let removed = remove(place.dir(), place.name(), DEPTH_MAX)?;
        if removed {
            self.last = None;
        }
        Ok(())
    }

    /// Hides `name`, next to the whiteout's own place, in the layers below. Entries of this layer stay.
    pub(super) fn white_out(&mut self, place: &Place, name: &[u8]) -> Result<(), Errno> {
        let hidden = Place {
            dir: Rc::clone(&place.dir),
            parents: place.parents.clone(),
            name: name.to_vec(),
        };
        match self.file_type(&hidden) {
            Err(Errno::NOENT) => rustix::fs::mknodat(
                hidden.dir(),
                name,
                FileType::CharacterDevice,
                Mode::empty(),
                0,
            ),
            Ok(FileType::Directory) => {
                let directory = rustix::fs::openat(hidden.dir(), name, DIRECTORY, Mode::empty())?;
                self.set_opaque(&directory, hidden.path())
            }
            Ok(_) => Ok(()),
            Err(errno) => Err(errno),
        }
    }

    /// Hides everything that the layers below have in the directory of the place.
    pub(super) fn make_opaque(&mut self, place: &Place) -> Result<(), Errno> {
        let directory = rustix::fs::openat(place.dir(), ".", DIRECTORY, Mode::empty())?;
        self.set_opaque(&directory, joined(&place.parents, None))
    }

    fn set_opaque(&mut self, directory: &OwnedFd, path: Vec<u8>) -> Result<(), Errno> {
        rustix::fs::fsetxattr(directory, OPAQUE, b"y", XattrFlags::empty())?;
        self.opaque.insert(path);
        Ok(())
    }

    /// Copies the regular file at the place up from the layers below, as overlayfs does before it links one, and
    /// returns its size; `None` if there is none. At most `max` bytes.
    pub(super) fn copy_up(&mut self, place: &Place, max: u64) -> Result<Option<u64>, Errno> {
        let components = place.components();
        if self.is_cut_off(&components) {
            return Ok(None);
        }
        let Some((source, stat)) = self.lowers.open_file(&components) else {
            return Ok(None);
        };
        let size = u64::try_from(stat.st_size).unwrap_or(u64::MAX);
        if size > max {
            return Err(Errno::NOSPC);
        }
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let target =
            rustix::fs::openat(place.dir(), place.name(), flags, Mode::from_raw_mode(0o600))?;
        let mut source = File::from(source);
        let mut target = File::from(target);
        io::copy(&mut Read::by_ref(&mut source).take(size), &mut target).map_err(errno)?;
        let (source, target) = (OwnedFd::from(source), OwnedFd::from(target));
        set(&target, lower::attributes(&stat))?;
        copy_xattrs(&source, &target)?;
        rustix::fs::futimens(&target, &super::times(lower::mtime(&stat)))?;
        self.leaning.wholly = true;
        Ok(Some(size))
    }

    /// Gives the root directory the owner and mode that it has below, if the layer does not describe it.
    pub(super) fn inherit_root(&mut self) -> Result<(), Errno> {
        if self.root_is_explicit {
            return Ok(());
        }
        let attributes = match self.lowers.find(&[]) {
            Found::Directory(attributes, mtime) => {
                self.inherited_times.insert(Vec::new(), mtime);
                attributes
            }
            Found::Nothing | Found::Symlink(_) | Found::Other => Attributes::default(),
        };
        set(&self.root, attributes)?;
        self.leaning.add(b"", attributes);
        Ok(())
    }

    pub(super) fn take_inherited_times(&mut self) -> BTreeMap<Vec<u8>, Mtime> {
        std::mem::take(&mut self.inherited_times)
    }

    pub(super) fn into_leaning(self) -> Leaning {
        self.leaning
    }
}

fn joined(parents: &[Vec<u8>], name: Option<&Vec<u8>>) -> Vec<u8> {
    parents
        .iter()
        .chain(name)
        .map(Vec::as_slice)
        .collect::<Vec<_>>()
        .join(&b'/')
}

fn set(file: &OwnedFd, attributes: Attributes) -> Result<(), Errno> {
    let (uid, gid) = super::owner(attributes.uid, attributes.gid);
    rustix::fs::fchown(file, Some(uid), Some(gid))?;
    rustix::fs::fchmod(file, Mode::from_raw_mode(attributes.mode))
}

/// The attributes that unpacking lets through; what a layer below has was let through before.
fn copy_xattrs(source: &OwnedFd, target: &OwnedFd) -> Result<(), Errno> {
    let mut names = vec![0; 64 << 10];
    let length = match rustix::fs::flistxattr(source, &mut names[..]) {
        Ok(length) => length,
        Err(Errno::NOTSUP) => return Ok(()),
        Err(errno) => return Err(errno),
    };
    let mut value = vec![0; 64 << 10];
    for name in names[..length].split(|byte| *byte == 0) {
        if name.starts_with(b"user.") || name == b"security.capability" {
            let length = rustix::fs::fgetxattr(source, name, &mut value[..])?;
            rustix::fs::fsetxattr(target, name, &value[..length], XattrFlags::empty())?;
        }
    }
    Ok(())
}

/// Removes `name` and everything below it, following no link; false if it was not there.
fn remove(dir: BorrowedFd<'_>, name: &[u8], depth: usize) -> Result<bool, Errno> {
    match rustix::fs::unlinkat(dir, name, AtFlags::empty()) {
        Ok(()) => return Ok(true),
        Err(Errno::NOENT) => return Ok(false),
        // Linux says EISDIR, POSIX EPERM.
        Err(Errno::ISDIR | Errno::PERM) if depth > 0 => {}
        Err(errno) => return Err(errno),
    }
    let directory = rustix::fs::openat(dir, name, DIRECTORY, Mode::empty())?;
    let names = Dir::read_from(&directory)?
        .map(|entry| entry.map(|entry| entry.file_name().to_bytes().to_vec()))
        .collect::<Result<Vec<_>, _>>()?;
    for child in names
        .iter()
        .filter(|child| !matches!(child.as_slice(), b"." | b".."))
    {
        remove(directory.as_fd(), child, depth - 1)?;
    }
    rustix::fs::unlinkat(dir, name, AtFlags::REMOVEDIR)?;
    Ok(true)
}

fn errno(error: io::Error) -> Errno {
    Errno::from_io_error(&error).unwrap_or(Errno::IO)
}
