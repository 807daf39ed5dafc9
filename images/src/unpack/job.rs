//! One layer to unpack as a piece of work that other processes can do: [`Job`], [`perform`], and how the processes speak
//! ([`serve`], [`Answer`], [`inflate`]).
//!
//! What asks writes the job and then the uncompressed layer into the other's standard input, and reads one [`Answer`] from its
//! standard output. The other process may be confined so far that it sees nothing but the store and may write nothing but the
//! target; see `foreshore-agent unpack`. A second one inflates the blob. What asks stands between the two, and takes the diff id
//! of what it hands on: neither of them can lie about it.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use rustix::fs::{Mode, OFlags, ResolveFlags, XattrFlags};
use serde::{Deserialize, Serialize};

use super::lower::{Below, OPAQUE};
use super::stream::{self, Bomb};
use super::{Budget, UnpackError, Unpacked, Unpacking, io_error};
use crate::compression::decompress;
use crate::delta::Rebuilt;
use crate::room::Shortage;
use crate::{Digest, Room};

/// The longest job: as many paths as an image may have.
const JOB_BYTES_MAX: u64 = 256 << 20;
/// The longest answer that is read: what [`super::PATH_BYTES_TOTAL_MAX`] is in hexadecimal digits, and the rest.
pub(crate) const ANSWER_BYTES_MAX: u64 = 160 << 20;

/// The longest list of old layers: 127 paths of 77 bytes and a few.
const TREES_BYTES_MAX: u64 = 64 << 10;
/// What goes through a pipe at once.
pub(crate) const PIECE: usize = 64 << 10;

/// Paths inside a layer; they need not be UTF-8. In JSON each is a string of hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Paths(pub BTreeSet<Vec<u8>>);

/// A layer below.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LowerLayer {
    /// Its tree.
    pub path: PathBuf,
    /// Its opaque directories; `None` when only their attribute says so.
    pub opaque: Option<Paths>,
}

/// A layer to unpack.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Job {
    /// The empty directory to fill.
    pub target: PathBuf,
    /// The layers below, topmost first.
    pub lowers: Vec<LowerLayer>,
    /// What it may take.
    pub budget: Budget,
    /// The longest uncompressed stream, in bytes.
    pub stream_bytes_max: u64,
    /// Bytes of the file system to leave free; see [`Room::of`].
    pub reserve_bytes: Option<u64>,
    /// Keep setuid and setgid bits of files, and file capabilities.
    pub keep_privileges: bool,
    /// Only say which directories are opaque: whoever does this may not set the attribute. [`set_opaque`] does it then.
    pub opaque_later: bool,
}

/// Something failed and no system call said how.
const EIO: i32 = rustix::io::Errno::IO.raw_os_error();

/// What comes of a [`Job`].
pub type Outcome = Result<(Unpacked, Digest), UnpackError>;

/// Unpacks `blob`, compressed or not, in this process, and returns what came of it and its diff id. On an error the target
/// holds garbage.
///
/// # Errors
/// [`UnpackError`].
pub fn perform(job: &Job, blob: impl Read) -> Outcome {
    let unpacking = open(job)?;
    let shortage = || job.shortage();
    let unpacked = stream::with_layer(
        blob,
        job.stream_bytes_max,
        &shortage,
        |stream| unpacking.run(stream),
        read_error,
    );
    unpacked.map_err(|error| match error {
        UnpackError::Archive(source) => match stream::bomb(source.as_ref()) {
            Some(bomb) => UnpackError::Bomb(*bomb),
            None => UnpackError::Archive(source),
        },
        error => error,
    })
}

/// Unpacks what comes uncompressed and guarded.
fn perform_plain(job: &Job, mut layer: impl Read) -> Result<Unpacked, UnpackError> {
    let unpacked = open(job)?.run(&mut layer)?;
    // The diff id covers what stands behind the archive's end, usually zeros.
    io::copy(&mut layer, &mut io::sink()).map_err(read_error)?;
    Ok(unpacked)
}

fn open(job: &Job) -> Result<Unpacking, UnpackError> {
    let open = |path: &PathBuf| {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::open(path, flags, Mode::empty())
            .map_err(|errno| io_error("open", path.as_os_str().as_encoded_bytes(), errno.into()))
    };
    let target = open(&job.target)?;
    let lowers = job
        .lowers
        .iter()
        .map(|lower| {
            Ok(Below {
                root: open(&lower.path)?,
                opaque: lower.opaque.clone().map(|paths| paths.0),
            })
        })
        .collect::<Result<_, UnpackError>>()?;
    Ok(Unpacking::new(target, lowers, job))
}

fn read_error(source: io::Error) -> UnpackError {
    match source.raw_os_error() {
        Some(_) => io_error("read", b"the layer's blob", source),
        None => UnpackError::Archive(Box::new(source)),
    }
}

impl Job {
    /// Whether the disk has room for more of it.
    pub(crate) fn shortage(&self) -> Option<Shortage> {
        let room = Room::of(&self.target, self.reserve_bytes).ok()?;
        room.shortage(0, 0)
    }
}

/// The exit code of a process that [`inflate`]d something that is damaged.
pub const INFLATE_DAMAGED: u8 = 3;
/// The exit code of one whose output nobody took.
pub const INFLATE_NOT_TAKEN: u8 = 4;

/// Inflates gzip or zstd; the exit code for a process that does nothing else: 0, [`INFLATE_DAMAGED`] or
/// [`INFLATE_NOT_TAKEN`].
pub fn inflate(input: impl Read, output: &mut dyn Write) -> u8 {
    match decompress(BufReader::with_capacity(64 << 10, input)) {
        Ok(inflated) => hand_out(inflated, output),
        Err(_) => INFLATE_DAMAGED,
    }
}

fn hand_out(mut inflated: impl Read, output: &mut dyn Write) -> u8 {
    let mut buffer = vec![0; PIECE];
    loop {
        match inflated.read(&mut buffer) {
            Ok(0) => return 0,
            Ok(count) if output.write_all(&buffer[..count]).is_err() => return INFLATE_NOT_TAKEN,
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => {
                eprintln!("{}", chain(&error));
                return INFLATE_DAMAGED;
            }
        }
    }
}

/// Makes a layer of a delta and the old layers' directories below `root`, which [`write_trees`] wrote in front of it; the exit
/// code for a process that does nothing else, as of [`inflate`].
pub fn rebuild(root: &std::path::Path, mut input: impl Read, output: &mut dyn Write) -> u8 {
    let rebuilt = read_trees(&mut input).and_then(|mut trees| {
        for tree in &mut trees {
            *tree = root.join(&tree);
        }
        Rebuilt::new(BufReader::with_capacity(PIECE, input), &trees)
    });
    match rebuilt {
        Ok(rebuilt) => hand_out(rebuilt, output),
        Err(error) => {
            eprintln!("the delta's old layers cannot be opened: {error}");
            INFLATE_DAMAGED
        }
    }
}

/// Names the directories that a delta leans on, all below `root`; the delta comes behind.
pub(crate) fn write_trees(
    root: &std::path::Path,
    trees: &[PathBuf],
    out: &mut dyn Write,
) -> io::Result<()> {
    let below = |tree: &PathBuf| tree.strip_prefix(root).map(PathBuf::from);
    let below: Vec<PathBuf> = trees
        .iter()
        .map(below)
        .collect::<Result<_, _>>()
        .map_err(io::Error::other)?;
    let text = serde_json::to_vec(&below)?;
    out.write_all(&(text.len() as u64).to_le_bytes())?;
    out.write_all(&text)
}

fn read_trees(input: &mut dyn Read) -> io::Result<Vec<PathBuf>> {
    let mut length = [0; 8];
    input.read_exact(&mut length)?;
    let length = u64::from_le_bytes(length);
    if length > TREES_BYTES_MAX {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut text = Vec::new();
    input.take(length).read_to_end(&mut text)?;
    Ok(serde_json::from_slice(&text)?)
}

/// Makes directories of an unpacked layer opaque for overlayfs. The paths come from a process that is not trusted: they
/// lead nowhere but into `target`, over no link.
///
/// # Errors
/// Any error of finding or marking one.
pub fn set_opaque(target: &std::path::Path, paths: &Paths) -> io::Result<()> {
    let root: OwnedFd = File::open(target)?.into();
    let inside = ResolveFlags::IN_ROOT
        | ResolveFlags::NO_SYMLINKS
        | ResolveFlags::NO_MAGICLINKS
        | ResolveFlags::NO_XDEV;
    for path in &paths.0 {
        let path: &[u8] = if path.is_empty() { b"." } else { path };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::openat2(&root, path, flags, Mode::empty(), inside)?;
        rustix::fs::fsetxattr(&directory, OPAQUE, b"y", XattrFlags::empty())?;
    }
    Ok(())
}

/// The opaque directories of a tree whose record does not name them. Takes `CAP_SYS_ADMIN`.
///
/// # Errors
/// Any error of reading the tree.
pub(crate) fn opaque_in(tree: &std::path::Path) -> io::Result<Paths> {
    let mut found = Paths::default();
    let mut ahead = vec![(tree.to_owned(), Vec::new())];
    while let Some((dir, path)) = ahead.pop() {
        let mut value = [0; 1];
        if rustix::fs::lgetxattr(&dir, OPAQUE, &mut value[..]).is_ok() && value == *b"y" {
            found.0.insert(path.clone());
        }
        for entry in std::fs::read_dir(&dir)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                let name = entry.file_name();
                let mut below = path.clone();
                if !below.is_empty() {
                    below.push(b'/');
                }
                below.extend(name.as_encoded_bytes());
                ahead.push((entry.path(), below));
            }
        }
    }
    Ok(found)
}

/// What [`serve`] writes.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Answer {
    Done(Box<Unpacked>),
    Failed(Failure),
}

/// An [`UnpackError`] on its way.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Failure {
    Archive(String),
    Bomb(Bomb),
    Entry {
        path: String,
        problem: String,
    },
    TooLarge(u64),
    TooManyEntries(u64),
    DiskFull {
        path: String,
    },
    Io {
        act: String,
        path: String,
        errno: i32,
    },
}

/// Writes a job; the uncompressed layer comes behind it.
pub(crate) fn write_job(job: &Job, out: &mut dyn Write) -> io::Result<()> {
    let text = serde_json::to_vec(job)?;
    out.write_all(&(text.len() as u64).to_le_bytes())?;
    out.write_all(&text)
}

/// Reads a job as a parent writes it. The uncompressed layer comes behind it.
///
/// # Errors
/// When that is not what comes.
pub fn read_job(input: &mut dyn Read) -> io::Result<Job> {
    let mut length = [0; 8];
    input.read_exact(&mut length)?;
    let length = u64::from_le_bytes(length);
    if length > JOB_BYTES_MAX {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut text = Vec::new();
    input.take(length).read_to_end(&mut text)?;
    Ok(serde_json::from_slice(&text)?)
}

/// Does a job with the uncompressed layer that follows it in `input`, and answers on `output`. Nobody believes it about the
/// diff id.
///
/// # Errors
/// When the answer cannot be written; nobody needs it then.
pub fn serve(job: &Job, input: impl Read, output: &mut dyn Write) -> io::Result<()> {
    let answer = match perform_plain(job, input) {
        Ok(unpacked) => Answer::Done(Box::new(unpacked)),
        Err(error) => Answer::Failed(error.into()),
    };
    serde_json::to_writer(&mut *output, &answer)?;
    output.flush()
}

impl From<UnpackError> for Failure {
    fn from(error: UnpackError) -> Self {
        match error {
            UnpackError::Archive(source) => Self::Archive(chain(source.as_ref())),
            UnpackError::Crashed(how) | UnpackError::Ended(how) => Self::Archive(how),
            UnpackError::Bomb(bomb) => Self::Bomb(bomb),
            UnpackError::Entry { path, problem } => Self::Entry {
                path,
                problem: problem.into_owned(),
            },
            UnpackError::TooLarge(max) => Self::TooLarge(max),
            UnpackError::TooManyEntries(max) => Self::TooManyEntries(max),
            UnpackError::DiskFull { path } => Self::DiskFull { path },
            UnpackError::Io { act, path, source } => Self::Io {
                act: act.into_owned(),
                path,
                errno: source.raw_os_error().unwrap_or(EIO),
            },
        }
    }
}

impl From<Failure> for UnpackError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Archive(message) => Self::Archive(message.into()),
            Failure::Bomb(bomb) => Self::Bomb(bomb),
            Failure::Entry { path, problem } => Self::Entry {
                path,
                problem: Cow::Owned(problem),
            },
            Failure::TooLarge(max) => Self::TooLarge(max),
            Failure::TooManyEntries(max) => Self::TooManyEntries(max),
            Failure::DiskFull { path } => Self::DiskFull { path },
            Failure::Io { act, path, errno } => Self::Io {
                act: Cow::Owned(act),
                path,
                source: io::Error::from_raw_os_error(errno),
            },
        }
    }
}

/// An error and its causes, as text.
fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(error) = next {
        text.push_str(": ");
        text.push_str(&error.to_string());
        next = error.source();
    }
    text
}

impl Serialize for Paths {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let hex = |path: &Vec<u8>| {
            path.iter()
                .flat_map(|byte| [byte >> 4, byte & 15])
                .map(|digit| char::from_digit(digit.into(), 16).unwrap_or('0'))
                .collect::<String>()
        };
        serializer.collect_seq(self.0.iter().map(hex))
    }
}

impl<'de> Deserialize<'de> for Paths {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let texts = Vec::<Cow<'_, str>>::deserialize(deserializer)?;
        let bytes = |text: &str| -> Option<Vec<u8>> {
            let digits: Vec<u8> = text
                .chars()
                .map(|digit| digit.to_digit(16).and_then(|digit| digit.try_into().ok()))
                .collect::<Option<_>>()?;
            let pairs = digits.chunks_exact(2);
            pairs.remainder().is_empty().then(|| {
                digits
                    .chunks_exact(2)
                    .map(|pair| pair[0] << 4 | pair[1])
                    .collect()
            })
        };
        texts
            .iter()
            .map(|text| bytes(text))
            .collect::<Option<_>>()
            .map(Self)
            .ok_or_else(|| serde::de::Error::custom("a path is not in hexadecimal digits"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_any_bytes_survive_json() {
        let paths = Paths([vec![], b"etc".to_vec(), vec![0xff, 0, b'/']].into());
        let text = serde_json::to_string(&paths).unwrap();
        assert_eq!(text, r#"["","657463","ff002f"]"#);
        assert_eq!(serde_json::from_str::<Paths>(&text).unwrap(), paths);
        for bad in [r#"["6"]"#, r#"["zz"]"#, r#"[1]"#] {
            assert!(serde_json::from_str::<Paths>(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn opaque_paths_lead_nowhere_else() {
        let dir = tempfile::tempdir().unwrap();
        let (inside, outside) = (dir.path().join("in"), dir.path().join("out"));
        std::fs::create_dir_all(inside.join("a/b")).unwrap();
        std::fs::create_dir(&outside).unwrap();
        std::os::unix::fs::symlink(&outside, inside.join("link")).unwrap();
        let one = |path: &[u8]| Paths([path.to_vec()].into());
        for good in [&b"a/b"[..], b"", b"/a"] {
            set_opaque(&inside, &one(good)).unwrap();
        }
        assert_eq!(
            opaque_in(&inside).unwrap(),
            Paths([vec![], b"a".to_vec(), b"a/b".to_vec()].into())
        );
        for bad in [&b"link"[..], b"../out/x", b"nothing"] {
            assert!(set_opaque(&inside, &one(bad)).is_err(), "{bad:?}");
        }
        // ".." from the root is the root, as in a chroot.
        set_opaque(&inside, &one(b"..")).unwrap();
        let mut value = [0; 1];
        let found = rustix::fs::getxattr(&outside, OPAQUE, &mut value[..]);
        assert!(found.is_err(), "outside was touched");
    }
}
