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
    /// Real paths of directories whose content in the layers below is hidden.
    opaque: BTreeSet<Vec<Vec<u8>>>,
    /// Paths of the directories that are opaque.
    made_opaque: BTreeSet<Vec<u8>>,
    /// Their attribute is set by somebody else.
    opaque_later: bool,
    /// Real paths that are hidden in the layers below.
    hidden: BTreeSet<Vec<Vec<u8>>>,
    /// The directory of the last place: archives list a directory's entries one after the other. Forgotten
    /// whenever something is removed.
    last: Option<Last>,
}

/// Where the last entry went.
struct Last {
    /// The parents as the archive writes them.
    parents: Vec<u8>,
    dir: Rc<OwnedFd>,
    /// The parents as they are.
    resolved: Vec<Vec<u8>>,
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
    /// On the way stands something that is neither a directory nor a link.
    NotADirectory,
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
            Self::NotADirectory => {
                entry_error(path, "lies below something that is not a directory")
            }
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
    pub(super) const fn new(root: OwnedFd, lowers: Lowers, opaque_later: bool) -> Self {
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
            made_opaque: BTreeSet::new(),
            opaque_later,
            hidden: BTreeSet::new(),
            last: None,
        }
    }

    /// The place `name` in the directory that `parents` leads to; missing directories are made as the layers
    /// below have them.
    pub(super) fn place(&mut self, parents: &[&[u8]], name: &[u8]) -> Result<Place, PlaceFault> {
        let key = parents.join(&b'/');
        if let Some(last) = &self.last
            && last.parents == key
        {
            return Ok(Place {
                dir: Rc::clone(&last.dir),
                parents: last.resolved.clone(),
                name: name.to_vec(),
            });
        }
        let (dir, resolved) = self.walk(parents)?;
        let dir = Rc::new(dir);
        self.last = Some(Last {
            parents: key,
            dir: Rc::clone(&dir),
            resolved: resolved.clone(),
        });
        Ok(Place {
            dir,
            parents: resolved,
            name: name.to_vec(),
        })
    }

    fn walk(&mut self, parents: &[&[u8]]) -> Result<(OwnedFd, Vec<Vec<u8>>), PlaceFault> {
        let mut way = Way::new(parents);
        let mut dir = self.reopen_root()?;
        while let Some(part) = way.next()? {
            if part == b".." {
                way.resolved.pop();
                dir = self.open_components(&way.resolved)?;
                continue;
            }
            match rustix::fs::openat(&dir, part.as_slice(), DIRECTORY, Mode::empty()) {
                Ok(next) => {
                    dir = next;
                    way.resolved.push(part);
                }
                Err(Errno::NOENT) => match self.below(&way.resolved, &part) {
                    Found::Symlink(target) => {
                        self.leaning.wholly = true;
                        if way.follow(&target)? {
                            dir = self.reopen_root()?;
                        }
                    }
                    found => {
                        dir = self.make_parent(&dir, &way.resolved, &part, &found)?;
                        way.resolved.push(part);
                    }
                },
                Err(Errno::NOTDIR | Errno::LOOP) => {
                    let target = link_target(&dir, &part)?.ok_or(PlaceFault::NotADirectory)?;
                    if way.follow(&target)? {
                        dir = self.reopen_root()?;
                    }
                }
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok((dir, way.resolved))
    }

    /// Where `parents` really leads, without making anything: what is not there yet counts as directories.
    fn real_path(&mut self, parents: &[&[u8]]) -> Result<Vec<Vec<u8>>, PlaceFault> {
        let mut way = Way::new(parents);
        while let Some(part) = way.next()? {
            if part == b".." {
                way.resolved.pop();
                continue;
            }
            let here = match self.open_components(&way.resolved) {
                Ok(dir) => {
                    match rustix::fs::statat(&dir, part.as_slice(), AtFlags::SYMLINK_NOFOLLOW) {
                        Ok(_) => Some(link_target(&dir, &part)?),
                        Err(Errno::NOENT) => None,
                        Err(errno) => return Err(errno.into()),
                    }
                }
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => None,
                Err(errno) => return Err(errno.into()),
            };
            let target = match here {
                Some(target) => target,
                None => match self.below(&way.resolved, &part) {
                    Found::Symlink(target) => {
                        self.leaning.wholly = true;
                        Some(target)
                    }
                    Found::Nothing | Found::Directory(..) | Found::Other => None,
                },
            };
            match target {
                Some(target) => {
                    way.follow(&target)?;
                }
                None => way.resolved.push(part),
            }
        }
        Ok(way.resolved)
    }

    /// What the layers below show at `part` in the directory `resolved`.
    fn below(&self, resolved: &[Vec<u8>], part: &[u8]) -> Found {
        let path: Vec<&[u8]> = resolved.iter().map(Vec::as_slice).chain([part]).collect();
        if self.is_cut_off(&path) {
            Found::Nothing
        } else {
            self.lowers.find(&path)
        }
    }

    /// Makes a directory that the layer passes through without describing it.
    fn make_parent(
        &mut self,
        dir: &OwnedFd,
        resolved: &[Vec<u8>],
        part: &Vec<u8>,
        found: &Found,
    ) -> Result<OwnedFd, Errno> {
        let full = joined(resolved, Some(part));
        let attributes = match found {
            Found::Directory(attributes, mtime) => {
                self.inherited_times.insert(full.clone(), *mtime);
                *attributes
            }
            Found::Nothing | Found::Other | Found::Symlink(_) => Attributes::default(),
        };
        rustix::fs::mkdirat(dir, part.as_slice(), Mode::from_raw_mode(0o700))?;
        let made = rustix::fs::openat(dir, part.as_slice(), DIRECTORY, Mode::empty())?;
        set(&made, attributes)?;
        let path: Vec<&[u8]> = resolved.iter().chain([part]).map(Vec::as_slice).collect();
        if !self.is_cut_off(&path) {
            self.leaning.add(&full, attributes);
        }
        Ok(made)
    }

    /// Whether the layers below do not show at the path: it is hidden, or in something that is.
    fn is_cut_off(&self, path: &[&[u8]]) -> bool {
        if self.opaque.is_empty() && self.hidden.is_empty() {
            return false;
        }
        let owned: Vec<Vec<u8>> = path.iter().map(|part| part.to_vec()).collect();
        (0..owned.len()).any(|end| self.opaque.contains(&owned[..end]))
            || (1..=owned.len()).any(|end| self.hidden.contains(&owned[..end]))
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
        if self.file_type(place) != Ok(FileType::Directory) {
            self.clear(place)?;
            rustix::fs::mkdirat(place.dir(), place.name(), Mode::from_raw_mode(0o700))?;
        }
        rustix::fs::openat(place.dir(), place.name(), DIRECTORY, Mode::empty())
    }

    /// Removes whatever is at the place, a whole directory, too.
    pub(super) fn clear(&mut self, place: &Place) -> Result<(), Errno> {
        let removed = remove(place.dir(), place.name(), DEPTH_MAX)?;
        if removed {
            self.last = None;
        }
        Ok(())
    }

    /// Remembers that in the directory `parents` the layers below do not show: `name`, or nothing at all.
    pub(super) fn hide(
        &mut self,
        parents: &[&[u8]],
        name: Option<&[u8]>,
    ) -> Result<(), PlaceFault> {
        let mut path = self.real_path(parents)?;
        match name {
            Some(name) => {
                path.push(name.to_vec());
                self.hidden.insert(path);
            }
            None => {
                self.opaque.insert(path);
            }
        }
        Ok(())
    }

    /// Writes down what is hidden, for overlayfs. At the end, since a whiteout hides nothing of its own layer,
    /// wherever it stands in the archive; the shallow ones first, since some tools also write one for each file of
    /// a directory that is gone as a whole.
    pub(super) fn apply_whiteouts(&mut self) -> Result<(), PlaceFault> {
        let by_depth = |set: &BTreeSet<Vec<Vec<u8>>>| {
            let mut paths: Vec<Vec<Vec<u8>>> = set.iter().cloned().collect();
            paths.sort_by_key(Vec::len);
            paths
        };
        for path in by_depth(&self.hidden) {
            let Some((name, parents)) = path.split_last() else {
                continue;
            };
            let parents: Vec<&[u8]> = parents.iter().map(Vec::as_slice).collect();
            match self.place(&parents, name) {
                Ok(place) => self.white_out(&place)?,
                // Something that is no directory hides all that was there.
                Err(PlaceFault::NotADirectory) => {}
                Err(fault) => return Err(fault),
            }
        }
        for path in by_depth(&self.opaque) {
            let path: Vec<&[u8]> = path.iter().map(Vec::as_slice).collect();
            match self.walk(&path) {
                Ok((directory, resolved)) => {
                    self.set_opaque(&directory, joined(&resolved, None))?;
                }
                Err(PlaceFault::NotADirectory) => {}
                Err(fault) => return Err(fault),
            }
        }
        Ok(())
    }

    /// Makes it so, or leaves it to whoever may, and remembers which it was.
    fn set_opaque(&mut self, directory: &OwnedFd, path: Vec<u8>) -> Result<(), Errno> {
        if !self.opaque_later {
            rustix::fs::fsetxattr(directory, OPAQUE, b"y", XattrFlags::empty())?;
        }
        self.made_opaque.insert(path);
        Ok(())
    }

    fn white_out(&mut self, place: &Place) -> Result<(), Errno> {
        match self.file_type(place) {
            Err(Errno::NOENT) => rustix::fs::mknodat(
                place.dir(),
                place.name(),
                FileType::CharacterDevice,
                Mode::empty(),
                0,
            ),
            // A directory of this layer is merged with those below, unless it says otherwise.
            Ok(FileType::Directory) => {
                let directory =
                    rustix::fs::openat(place.dir(), place.name(), DIRECTORY, Mode::empty())?;
                self.set_opaque(&directory, place.path())
            }
            Ok(_) => Ok(()),
            Err(errno) => Err(errno),
        }
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
        io::copy(&mut Read::by_ref(&mut source).take(size), &mut target)
            .map_err(|error| errno(&error))?;
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

    pub(super) fn into_parts(self) -> (Leaning, BTreeSet<Vec<u8>>) {
        (self.leaning, self.made_opaque)
    }
}

/// A path that is being resolved.
struct Way {
    ahead: VecDeque<Vec<u8>>,
    resolved: Vec<Vec<u8>>,
    links: usize,
}

impl Way {
    fn new(parents: &[&[u8]]) -> Self {
        Self {
            ahead: parents.iter().map(|part| part.to_vec()).collect(),
            resolved: Vec::new(),
            links: 0,
        }
    }

    /// The next component: a name, or `..`.
    fn next(&mut self) -> Result<Option<Vec<u8>>, PlaceFault> {
        if self.resolved.len() + self.ahead.len() > 2 * DEPTH_MAX {
            return Err(PlaceFault::Problem("is too deep"));
        }
        while let Some(part) = self.ahead.pop_front() {
            if !matches!(part.as_slice(), b"" | b".") {
                return Ok(Some(part));
            }
        }
        Ok(None)
    }

    /// Goes on where a link leads; true if that starts at the root.
    fn follow(&mut self, target: &[u8]) -> Result<bool, PlaceFault> {
        self.links += 1;
        if self.links > LINKS_MAX {
            return Err(PlaceFault::Errno(Errno::LOOP));
        }
        for part in target.split(|byte| *byte == b'/').rev() {
            self.ahead.push_front(part.to_vec());
        }
        let absolute = target.starts_with(b"/");
        if absolute {
            self.resolved.clear();
        }
        Ok(absolute)
    }
}

/// Where the link `name` leads; `None` if it is no link.
fn link_target(dir: &OwnedFd, name: &[u8]) -> Result<Option<Vec<u8>>, Errno> {
    match rustix::fs::readlinkat(dir, name, Vec::new()) {
        Ok(target) => Ok(Some(target.into_bytes())),
        Err(Errno::INVAL) => Ok(None),
        Err(errno) => Err(errno),
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

fn errno(error: &io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}
