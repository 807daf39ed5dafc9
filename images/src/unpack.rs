//! One layer's tar stream into one directory that it can never leave, in the form that overlayfs mounts.
//!
//! Paths are never joined as strings: `tree` walks them component by component over directory descriptors,
//! without ever letting the kernel follow a symbolic link. Whiteouts (OCI image specification, "Layers,
//! Whiteouts") become what overlayfs understands (kernel documentation, "Overlay Filesystem, whiteouts and
//! opaque directories"): character device 0:0, and the attribute `trusted.overlay.opaque`.
//!
//! A layer may lean on the ones below it: a directory that it only passes through keeps the owner
//! and mode it has there, a symbolic link on the way is followed, a hard link's target is copied up. Then what
//! is unpacked depends on the layers below, and [`Unpacked::leans`] says how.

pub mod job;
mod lower;
pub(crate) mod stream;
mod tree;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, XattrFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use job::{Job, Paths};
use lower::Below;
use lower::Lowers;
pub use lower::{Attributes, Leaning};
pub use stream::Bomb;
use tree::{Place, Tree};

use crate::tar_stream::{Entry, Kind, Mtime, TarError, TarStream};

/// The longest path of an entry, in bytes (`PATH_MAX`).
pub const PATH_BYTES_MAX: usize = 4096;
/// The deepest path of an entry, in components. Walking down a removed tree holds a descriptor for each, and
/// 1024 is what a process usually may have.
pub const DEPTH_MAX: usize = 512;
/// Bytes of paths, of directories and whiteouts, remembered until the end.
const PATH_BYTES_TOTAL_MAX: usize = 64 << 20;
/// Bytes of paths of opaque directories: a hundred times what images have.
const OPAQUE_BYTES_MAX: usize = 1 << 20;
/// Notes kept for people; more are only counted.
const NOTES_MAX: usize = 16;

/// What one layer may take at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Budget {
    /// Bytes of file content, holes included.
    pub bytes: u64,
    /// Entries of the archive.
    pub entries: u64,
}

/// What came of a layer.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Unpacked {
    /// Bytes of file content, holes included.
    pub bytes: u64,
    /// Entries of the archive.
    pub entries: u64,
    /// What it took from the layers below.
    pub leans: Leaning,
    /// What was left out, for people.
    pub notes: Vec<String>,
    /// Directories that show nothing of the layers below; `None` when that was not noted down.
    #[serde(default)]
    pub opaque: Option<Paths>,
}

/// Why a layer could not be unpacked. `path` is as the archive writes it.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// The archive cannot be read: damaged, or not an archive.
    #[error("the layer cannot be read as a tar archive")]
    Archive(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// More than anything but a bomb has, or than the disk has room for.
    #[error(transparent)]
    Bomb(Bomb),
    /// A path that leaves the directory, or cannot be a path.
    #[error("entry \"{path}\" {problem}")]
    Entry {
        /// As written, cut to 256 characters.
        path: String,
        /// What is wrong with it; ends the sentence.
        problem: Cow<'static, str>,
    },
    /// More content than the budget has.
    #[error("the layer unpacks to more than the {0} bytes that are left for this image")]
    TooLarge(u64),
    /// More entries than the budget has.
    #[error("the layer has more than the {0} entries that are left for this image")]
    TooManyEntries(u64),
    /// The disk has no space or inodes left.
    #[error("no space left on the disk for \"{path}\"")]
    DiskFull {
        /// As written, cut to 256 characters.
        path: String,
    },
    /// The process that was to unpack it could not cope with it, or talks nonsense: the layer is to blame.
    #[error("the process that unpacks it {0}")]
    Crashed(String),
    /// The process that was to unpack it was ended for another reason than the layer, as far as is known; it may work the next
    /// time.
    #[error("the process that unpacks it {0}")]
    Ended(String),
    /// The local disk failed, or this process may not do it.
    #[error("cannot {act} \"{path}\"")]
    Io {
        /// What was tried.
        act: Cow<'static, str>,
        /// As written, cut to 256 characters.
        path: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// Unpacks the uncompressed tar stream `layer` into the empty directory `target`.
///
/// `lowers` are the directories of the layers below, topmost first. Needs root, to set owners. Device nodes and
/// unknown entry types are left out with a note. On an error `target` holds garbage for the caller to remove.
/// `layer` is read up to its archive's end, not further.
///
/// # Errors
/// [`UnpackError`].
pub fn unpack_layer(
    layer: &mut dyn Read,
    target: &Path,
    lowers: &[PathBuf],
    budget: Budget,
) -> Result<Unpacked, UnpackError> {
    let open = |path: &Path| {
        rustix::fs::open(
            path,
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .map_err(|errno| io_error("open", path.as_os_str().as_encoded_bytes(), errno.into()))
    };
    let root = open(target)?;
    let lowers = lowers
        .iter()
        .map(|path| {
            let root = open(path)?;
            Ok(Below { root, opaque: None })
        })
        .collect::<Result<_, UnpackError>>()?;
    let job = Job {
        target: target.to_owned(),
        lowers: Vec::new(),
        budget,
        stream_bytes_max: u64::MAX,
        reserve_bytes: None,
        keep_privileges: true,
        opaque_later: false,
    };
    Unpacking::new(root, lowers, &job).run(layer)
}

struct Unpacking {
    tree: Tree,
    budget: Budget,
    done: Unpacked,
    /// Set at the end, since making an entry in a directory changes its time.
    directory_times: BTreeMap<Vec<u8>, Mtime>,
    path_bytes: usize,
    notes_left_out: usize,
    keep_privileges: bool,
}

impl Unpacking {
    fn new(target: OwnedFd, lowers: Vec<Below>, job: &Job) -> Self {
        Self {
            tree: Tree::new(target, Lowers::new(lowers), job.opaque_later),
            budget: job.budget,
            done: Unpacked::default(),
            directory_times: BTreeMap::new(),
            path_bytes: 0,
            notes_left_out: 0,
            keep_privileges: job.keep_privileges,
        }
    }

    fn run(mut self, layer: &mut dyn Read) -> Result<Unpacked, UnpackError> {
        let mut stream = TarStream::new(layer);
        while let Some(entry) = stream.next().map_err(archive_error)? {
            self.entry(&entry, &mut stream)?;
        }
        self.finish()
    }

    fn entry(
        &mut self,
        entry: &Entry,
        data: &mut TarStream<&mut dyn Read>,
    ) -> Result<(), UnpackError> {
        self.done.entries += 1;
        if self.done.entries > self.budget.entries {
            return Err(UnpackError::TooManyEntries(self.budget.entries));
        }
        let path = clean(&entry.path).map_err(|problem| entry_error(&entry.path, problem))?;
        let Some((name, parents)) = path.split_last() else {
            return self.root(entry);
        };
        if let Some(hidden) = name.strip_prefix(b".wh.") {
            return self.whiteout(entry, parents, hidden);
        }
        let place = self
            .tree
            .place(parents, name)
            .map_err(|fault| fault.at(&entry.path))?;
        match entry.kind {
            Kind::Directory => self.directory(entry, &place),
            Kind::File => self.file(entry, &place, data),
            Kind::HardLink => self.hard_link(entry, &place),
            Kind::Symlink => self.symlink(entry, &place),
            Kind::Fifo => self.fifo(entry, &place),
            Kind::CharDevice | Kind::BlockDevice => {
                self.note(format!(
                    "device node \"{}\" was left out",
                    shown(&entry.path)
                ));
                Ok(())
            }
            Kind::Other(letter) => {
                self.note(format!(
                    "entry \"{}\" of unknown type \"{}\" was left out",
                    shown(&entry.path),
                    letter.escape_ascii()
                ));
                Ok(())
            }
        }
    }

    /// `./`: the directory itself.
    fn root(&mut self, entry: &Entry) -> Result<(), UnpackError> {
        if entry.kind != Kind::Directory {
            return Err(entry_error(
                &entry.path,
                "stands for the root directory but is not a directory",
            ));
        }
        self.tree.root_is_explicit();
        let root = self
            .tree
            .reopen_root()
            .map_err(|errno| io_error("open", b"/", errno.into()))?;
        self.attributes(entry, &root)?;
        self.remember_time(Vec::new(), entry)
    }

    /// Remembers what is hidden; [`Tree::apply_whiteouts`] writes it down at the end.
    fn whiteout(
        &mut self,
        entry: &Entry,
        parents: &[&[u8]],
        hidden: &[u8],
    ) -> Result<(), UnpackError> {
        let result = match hidden {
            b".wh..opq" => self.tree.hide(parents, None),
            // AUFS's own files, such as `.wh..wh.plnk`; nobody acts on them.
            _ if hidden.starts_with(b".wh.") => return Ok(()),
            b"" | b"." | b".." => {
                return Err(entry_error(
                    &entry.path,
                    "is a whiteout of nothing, \".\" or \"..\"",
                ));
            }
            name => self.tree.hide(parents, Some(name)),
        };
        result.map_err(|fault| fault.at(&entry.path))?;
        self.count_path(entry)
    }

    fn directory(&mut self, entry: &Entry, place: &Place) -> Result<(), UnpackError> {
        let directory = self
            .tree
            .directory(place)
            .map_err(|errno| disk_error("make the directory", &entry.path, errno))?;
        self.attributes(entry, &directory)?;
        self.remember_time(place.path(), entry)
    }

    fn file(
        &mut self,
        entry: &Entry,
        place: &Place,
        data: &mut TarStream<&mut dyn Read>,
    ) -> Result<(), UnpackError> {
        let left = self.budget.bytes.saturating_sub(self.done.bytes);
        if entry.size > left {
            return Err(UnpackError::TooLarge(self.budget.bytes));
        }
        self.done.bytes += entry.size;
        self.tree
            .clear(place)
            .map_err(|errno| disk_error("replace", &entry.path, errno))?;
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(place.dir(), place.name(), flags, Mode::from_raw_mode(0o600))
            .map_err(|errno| disk_error("make the file", &entry.path, errno))?;
        let mut file = File::from(file);
        write_content(entry, data, &mut file)?;
        let file = OwnedFd::from(file);
        self.attributes(entry, &file)?;
        rustix::fs::futimens(&file, &times(entry.mtime))
            .map_err(|errno| disk_error("set the time of", &entry.path, errno))
    }

    fn hard_link(&mut self, entry: &Entry, place: &Place) -> Result<(), UnpackError> {
        let target = clean(&entry.link).map_err(|_| {
            entry_error(
                &entry.path,
                "is a hard link to a path that leaves the image",
            )
        })?;
        let Some((name, parents)) = target.split_last() else {
            return Err(entry_error(
                &entry.path,
                "is a hard link to the root directory",
            ));
        };
        let missing = || {
            entry_error(
                &entry.path,
                "is a hard link to a file that is not in the image",
            )
        };
        let target = self
            .tree
            .place(parents, name)
            .map_err(|fault| fault.at(&entry.path))?;
        if target.path() == place.path() {
            return Ok(());
        }
        match self.tree.file_type(&target) {
            Ok(FileType::Directory) => {
                return Err(entry_error(&entry.path, "is a hard link to a directory"));
            }
            Ok(_) => {}
            Err(Errno::NOENT) => {
                let left = self.budget.bytes.saturating_sub(self.done.bytes);
                let copied = self
                    .tree
                    .copy_up(&target, left)
                    .map_err(|errno| disk_error("copy up the target of", &entry.path, errno))?;
                self.done.bytes += copied.ok_or_else(missing)?;
            }
            Err(errno) => return Err(disk_error("look for the target of", &entry.path, errno)),
        }
        self.tree
            .clear(place)
            .map_err(|errno| disk_error("replace", &entry.path, errno))?;
        rustix::fs::linkat(
            target.dir(),
            target.name(),
            place.dir(),
            place.name(),
            AtFlags::empty(),
        )
        .map_err(|errno| disk_error("link", &entry.path, errno))
    }

    fn symlink(&mut self, entry: &Entry, place: &Place) -> Result<(), UnpackError> {
        if entry.link.is_empty() || entry.link.len() >= PATH_BYTES_MAX || entry.link.contains(&0) {
            return Err(entry_error(
                &entry.path,
                "is a symbolic link without a target that can be used",
            ));
        }
        self.tree
            .clear(place)
            .map_err(|errno| disk_error("replace", &entry.path, errno))?;
        rustix::fs::symlinkat(entry.link.as_slice(), place.dir(), place.name())
            .map_err(|errno| disk_error("make the symbolic link", &entry.path, errno))?;
        self.owner_and_time(entry, place)
    }

    fn fifo(&mut self, entry: &Entry, place: &Place) -> Result<(), UnpackError> {
        self.tree
            .clear(place)
            .map_err(|errno| disk_error("replace", &entry.path, errno))?;
        rustix::fs::mknodat(
            place.dir(),
            place.name(),
            FileType::Fifo,
            Mode::from_raw_mode(0o600),
            0,
        )
        .map_err(|errno| disk_error("make the fifo", &entry.path, errno))?;
        self.owner_and_time(entry, place)?;
        // Just made above in a directory nobody else writes to, so it cannot be a link.
        rustix::fs::chmodat(
            place.dir(),
            place.name(),
            Mode::from_raw_mode(entry.mode),
            AtFlags::empty(),
        )
        .map_err(|errno| disk_error("set the mode of", &entry.path, errno))
    }

    fn owner_and_time(&self, entry: &Entry, place: &Place) -> Result<(), UnpackError> {
        let (uid, gid) = owner(entry.uid, entry.gid);
        rustix::fs::chownat(
            place.dir(),
            place.name(),
            Some(uid),
            Some(gid),
            AtFlags::SYMLINK_NOFOLLOW,
        )
        .map_err(|errno| disk_error("set the owner of", &entry.path, errno))?;
        rustix::fs::utimensat(
            place.dir(),
            place.name(),
            &times(entry.mtime),
            AtFlags::SYMLINK_NOFOLLOW,
        )
        .map_err(|errno| disk_error("set the time of", &entry.path, errno))
    }

    /// Owner, mode and extended attributes, in the order in which the kernel does not undo them: a new owner
    /// clears setuid and file capabilities.
    fn attributes(&mut self, entry: &Entry, file: &OwnedFd) -> Result<(), UnpackError> {
        let (uid, gid) = owner(entry.uid, entry.gid);
        rustix::fs::fchown(file, Some(uid), Some(gid))
            .map_err(|errno| disk_error("set the owner of", &entry.path, errno))?;
        let mode = self.mode(entry);
        rustix::fs::fchmod(file, Mode::from_raw_mode(mode))
            .map_err(|errno| disk_error("set the mode of", &entry.path, errno))?;
        for (name, value) in &entry.xattrs {
            self.xattr(entry, file, name, value)?;
        }
        Ok(())
    }

    /// Without the bits that lend a program somebody else's rights, unless they are wanted. On a directory, setgid says
    /// whose group new files get, and nothing more.
    fn mode(&mut self, entry: &Entry) -> u32 {
        const LENDING: u32 = 0o6000;
        if self.keep_privileges || entry.kind == Kind::Directory || entry.mode & LENDING == 0 {
            return entry.mode;
        }
        self.note(format!(
            "the setuid or setgid bit of \"{}\" was left out",
            shown(&entry.path)
        ));
        entry.mode & !LENDING
    }

    /// `trusted.*` would let a layer speak to overlayfs, `security.*` but for capabilities to the host's
    /// security module.
    fn xattr(
        &mut self,
        entry: &Entry,
        file: &OwnedFd,
        name: &[u8],
        value: &[u8],
    ) -> Result<(), UnpackError> {
        let capability = name == b"security.capability";
        let of_user = name.starts_with(b"user.") && !name.starts_with(b"user.overlay.");
        if !capability && !of_user {
            return Ok(());
        }
        if capability && !self.keep_privileges {
            self.note(format!(
                "the capabilities of \"{}\" were left out",
                shown(&entry.path)
            ));
            return Ok(());
        }
        match rustix::fs::fsetxattr(file, name, value, XattrFlags::empty()) {
            Ok(()) => Ok(()),
            Err(errno) if capability && errno != Errno::NOTSUP => {
                Err(disk_error("set the capabilities of", &entry.path, errno))
            }
            Err(_) => {
                self.note(format!(
                    "extended attribute {} of \"{}\" was left out: the file system does not take it",
                    shown(name),
                    shown(&entry.path)
                ));
                Ok(())
            }
        }
    }

    fn remember_time(&mut self, path: Vec<u8>, entry: &Entry) -> Result<(), UnpackError> {
        self.directory_times.insert(path, entry.mtime);
        self.count_path(entry)
    }

    /// Bounds the memory for paths that are remembered until the end.
    fn count_path(&mut self, entry: &Entry) -> Result<(), UnpackError> {
        self.path_bytes += entry.path.len();
        if self.path_bytes > PATH_BYTES_TOTAL_MAX {
            return Err(entry_error(
                &entry.path,
                "is one too many: directories and whiteouts are together too long",
            ));
        }
        Ok(())
    }

    fn note(&mut self, note: String) {
        if self.done.notes.len() < NOTES_MAX {
            self.done.notes.push(note)
        } else {
            self.notes_left_out += 1
        }
    }

    fn finish(mut self) -> Result<Unpacked, UnpackError> {
        self.tree
            .apply_whiteouts()
            .map_err(|fault| fault.at(b"a whiteout"))?;
        self.tree
            .inherit_root()
            .map_err(|errno| disk_error("set the owner of", b"/", errno))?;
        let inherited = self.tree.take_inherited_times();
        for (path, mtime) in inherited
            .into_iter()
            .chain(std::mem::take(&mut self.directory_times))
        {
            // It may have been replaced by something else since.
            if let Ok(directory) = self.tree.open_directory(&path) {
                rustix::fs::futimens(&directory, &times(mtime))
                    .map_err(|errno| disk_error("set the time of", &path, errno))?;
            }
        }
        if self.notes_left_out > 0 {
            self.done
                .notes
                .push(format!("{} more were left out", self.notes_left_out));
        }
        let (leans, opaque) = self.tree.into_parts();
        self.done.leans = leans;
        // They are kept in the layer's record, which is bounded.
        if opaque.iter().map(Vec::len).sum::<usize>() > OPAQUE_BYTES_MAX {
            return Err(entry_error(
                b".wh..wh..opq",
                "stands in too many directories",
            ));
        }
        self.done.opaque = Some(Paths(opaque));
        Ok(self.done)
    }
}

/// Writes the entry's content; holes, and blocks of nothing but zeros, take no space on disk.
fn write_content(
    entry: &Entry,
    data: &mut TarStream<&mut dyn Read>,
    file: &mut File,
) -> Result<(), UnpackError> {
    let write_error = |error: io::Error| disk_io_error("write", &entry.path, error);
    let mut buffer = vec![0; 128 << 10];
    let whole = [crate::tar_stream::Extent {
        offset: 0,
        length: entry.size,
    }];
    for extent in entry.extents.as_deref().unwrap_or(&whole) {
        file.seek(io::SeekFrom::Start(extent.offset))
            .map_err(write_error)?;
        let mut left = extent.length;
        while left > 0 {
            let most = usize::try_from(left).map_or(buffer.len(), |left| left.min(buffer.len()));
            let mut filled = 0;
            // Full pieces, so that zeros are found in blocks however the stream arrives.
            while filled < most {
                match data.read(&mut buffer[filled..most]) {
                    Ok(0) => return Err(archive_error(TarError::Truncated)),
                    Ok(count) => filled += count,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(archive_error(TarError::Read(error))),
                }
            }
            let piece = &buffer[..filled];
            if filled == buffer.len() && piece.iter().all(|byte| *byte == 0) {
                file.seek_relative(i64::try_from(filled).expect("a buffer's length fits"))
                    .map_err(write_error)?;
            } else {
                file.write_all(piece).map_err(write_error)?;
            }
            left -= filled as u64;
        }
    }
    file.set_len(entry.size).map_err(write_error)
}

/// The components of a path as in Go's `path.Clean`: an absolute path is meant from the image's root, and `..`
/// takes back a component; more of them than components is an attack.
pub(crate) fn clean(path: &[u8]) -> Result<Vec<&[u8]>, &'static str> {
    if path.len() > PATH_BYTES_MAX {
        return Err("has a path that is too long");
    }
    let mut components: Vec<&[u8]> = Vec::new();
    for component in path.split(|byte| *byte == b'/') {
        match component {
            b"" | b"." => {}
            b".." if components.pop().is_none() => return Err("leaves the image's root directory"),
            b".." => {}
            name if name.len() > 255 => return Err("has a name that is longer than 255 bytes"),
            name if name.contains(&0) => return Err("has a name with a NUL in it"),
            name => components.push(name),
        }
    }
    if components.len() > DEPTH_MAX {
        return Err("is too deep");
    }
    Ok(components)
}

fn times(mtime: Mtime) -> rustix::fs::Timestamps {
    let time = rustix::fs::Timespec {
        tv_sec: mtime.seconds,
        tv_nsec: mtime.nanos.into(),
    };
    rustix::fs::Timestamps {
        last_access: time,
        last_modification: time,
    }
}

fn owner(uid: u32, gid: u32) -> (rustix::fs::Uid, rustix::fs::Gid) {
    (
        rustix::fs::Uid::from_raw(uid),
        rustix::fs::Gid::from_raw(gid),
    )
}

fn shown(path: &[u8]) -> String {
    String::from_utf8_lossy(path)
        .chars()
        .take(256)
        .flat_map(char::escape_debug)
        .collect()
}

fn entry_error(path: &[u8], problem: &'static str) -> UnpackError {
    UnpackError::Entry {
        path: shown(path),
        problem: Cow::Borrowed(problem),
    }
}

fn io_error(act: &'static str, path: &[u8], source: io::Error) -> UnpackError {
    UnpackError::Io {
        act: Cow::Borrowed(act),
        path: shown(path),
        source,
    }
}

fn disk_io_error(act: &'static str, path: &[u8], source: io::Error) -> UnpackError {
    match Errno::from_io_error(&source) {
        Some(errno) => disk_error(act, path, errno),
        None => io_error(act, path, source),
    }
}

fn disk_error(act: &'static str, path: &[u8], errno: Errno) -> UnpackError {
    match errno {
        Errno::NOSPC | Errno::DQUOT => UnpackError::DiskFull { path: shown(path) },
        Errno::MLINK => entry_error(path, "is one hard link too many"),
        Errno::LOOP => entry_error(path, "goes through too many symbolic links"),
        Errno::FBIG => entry_error(path, "is larger than the file system's files can be"),
        errno => io_error(act, path, errno.into()),
    }
}

fn archive_error(error: TarError) -> UnpackError {
    // A failing disk is not a bad layer; bad data comes without an OS error code.
    if let TarError::Read(source) = error {
        return match source.raw_os_error() {
            Some(_) => io_error("read", b"layer", source),
            None => UnpackError::Archive(Box::new(source)),
        };
    }
    UnpackError::Archive(Box::new(error))
}

#[cfg(test)]
mod tests;
