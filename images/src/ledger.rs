//! [`Ledger`]s: what every file of an unpacked layer was, so that rot on the medium can be told from what should be there.
//!
//! Whoever stages writes one, from what stands in the new tree before that gets its name; who unpacked has no say in it.
//! It is read back only when its SHA-256 is the one in the layer's record. Checksums are CRC-32: they find accidents, not
//! attacks. Times are left out: file systems of small boards round them, and a wrong one harms nobody.

mod compare;
mod format;
mod walk;

use std::fs::File;
use std::io::{self, Read, Seek as _, SeekFrom};
use std::path::Path;

use rustix::fs::{Advice, FileType, Stat};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

pub(crate) use self::compare::{Compared, compare};
pub use self::compare::{Flaw, Wrong};
use self::format::{Reader, Writer};
use self::walk::Walk;
use crate::Digest;
use crate::blobs::digest_of;

/// The longest ledger, in bytes. Half a million files take some 20 MB.
pub(crate) const LEDGER_BYTES_MAX: u64 = 64 << 20;
/// The most names of one tree: four times what an image may have of entries, since these make their parents.
const NAMES_MAX: u64 = 2_000_000;
/// How much of a file is read at once.
const PIECE: usize = 128 << 10;

/// Says which ledger belongs to a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Seal {
    pub(crate) sha256: Digest,
    pub(crate) size: u64,
}

/// What was written down of a tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Written {
    pub(crate) seal: Seal,
    /// Without the tree's root.
    pub(crate) names: u64,
    /// Of regular files, each name counted.
    pub(crate) bytes: u64,
}

/// Why there is no ledger of a tree.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LedgerError {
    /// More content than whoever made the tree said.
    #[error("more is there than was said")]
    TooMuch,
    /// Longer than one may be, or a directory is too large or too deep to be put in order.
    #[error("the tree is too large for a list of its files")]
    TooLong,
    /// The disk failed.
    #[error("the tree cannot be read, or the list of its files not written")]
    Io(#[from] io::Error),
}

impl From<Errno> for LedgerError {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::MFILE => Self::TooLong,
            errno => Self::Io(errno.into()),
        }
    }
}

/// One name in a tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Below the root; empty for the root itself.
    pub(crate) path: Vec<u8>,
    /// Permission bits.
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) node: Node,
    /// By name.
    pub(crate) xattrs: Vec<Xattr>,
}

/// What stands at a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Node {
    Directory,
    File {
        size: u64,
        sum: u32,
        /// The entry, counted from 0, that is the same file.
        same_as: Option<u64>,
    },
    Symlink {
        target: Vec<u8>,
    },
    /// Whiteouts are character devices.
    CharDevice {
        number: u64,
    },
    BlockDevice {
        number: u64,
    },
    Fifo,
    Socket,
}

/// An extended attribute.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Xattr {
    pub(crate) name: Vec<u8>,
    pub(crate) length: u64,
    pub(crate) sum: u32,
}

/// Writes down what stands in a tree. `bytes_max` is the most content that it may have, each file counted once.
///
/// # Errors
/// [`LedgerError`].
pub(crate) fn write(tree: &Path, bytes_max: u64, path: &Path) -> Result<Written, LedgerError> {
    let mut walk = Walk::new(tree)?;
    let mut writer = Writer::new(File::create_new(path)?)?;
    let mut written = Written {
        seal: Seal {
            sha256: Digest::of(b""),
            size: 0,
        },
        names: 0,
        bytes: 0,
    };
    let mut once = 0_u64;
    let mut known = Known::default();
    let mut buffer = vec![0; PIECE];
    while walk.advance()? {
        if let Some(errno) = walk.fault() {
            return Err(errno.into());
        }
        let number = writer.count();
        if number > NAMES_MAX {
            return Err(LedgerError::TooMuch);
        }
        let stat = *walk.stat();
        written.names += u64::from(number > 0);
        let file = match file_type(&stat) {
            FileType::RegularFile => Some(walk.open()?),
            _ => None,
        };
        let node = if let Some(file) = &file {
            let size = u64::try_from(stat.st_size).unwrap_or(0);
            written.bytes = written.bytes.saturating_add(size);
            match known.same(&stat) {
                Some((first, sum)) => Node::File {
                    size,
                    sum,
                    same_as: Some(first),
                },
                None => {
                    once = once.saturating_add(size);
                    if once > bytes_max {
                        return Err(LedgerError::TooMuch);
                    }
                    let sum = sum_of(file, size, &mut buffer)?;
                    known.note(&stat, number, sum);
                    Node::File {
                        size,
                        sum,
                        same_as: None,
                    }
                }
            }
        } else {
            node(&walk)?
        };
        let entry = Entry {
            path: walk.path().to_vec(),
            mode: stat.st_mode & 0o7777,
            uid: stat.st_uid,
            gid: stat.st_gid,
            node,
            xattrs: walk.xattrs(file.as_ref())?,
        };
        writer.entry(&entry)?;
    }
    written.seal = writer.finish()?;
    Ok(written)
}

/// What [`list`] wrote.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Listed {
    /// Names, without the tree's root.
    pub names: u64,
    /// Bytes of regular files, each name counted.
    pub bytes: u64,
    /// Bytes of the ledger.
    pub ledger_bytes: u64,
}

/// Writes the ledger of a tree into a new file, as staging does; for measurements.
///
/// # Errors
/// When the tree cannot be read or is too large for a ledger, or the file cannot be made.
pub fn list(tree: &Path, into: &Path) -> io::Result<Listed> {
    match write(tree, u64::MAX, into) {
        Ok(written) => Ok(Listed {
            names: written.names,
            bytes: written.bytes,
            ledger_bytes: written.seal.size,
        }),
        Err(LedgerError::Io(error)) => Err(error),
        Err(other) => Err(io::Error::other(other)),
    }
}

/// Opens the ledger that a seal speaks of; `None` when it is not there or is not that one.
pub(crate) fn open(path: &Path, seal: &Seal) -> io::Result<Option<Reader<File>>> {
    let mut file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened?,
    };
    if file.metadata()?.len() != seal.size || seal.size > LEDGER_BYTES_MAX {
        return Ok(None);
    }
    drop_cached(&file);
    match digest_of(&mut Read::by_ref(&mut file).take(seal.size)) {
        Ok(found) if found == seal.sha256 => {}
        Err(error) if !Errno::from_io_error(&error).is_some_and(is_rot) => return Err(error),
        _ => return Ok(None),
    }
    file.seek(SeekFrom::Start(0))?;
    Ok(Some(Reader::new(file)))
}

/// What is at the walk's place, if that is no regular file.
fn node(walk: &Walk) -> Result<Node, Errno> {
    let stat = walk.stat();
    Ok(match file_type(stat) {
        FileType::Directory => Node::Directory,
        FileType::Symlink => Node::Symlink {
            target: walk.link_target()?,
        },
        FileType::CharacterDevice => Node::CharDevice {
            number: stat.st_rdev,
        },
        FileType::BlockDevice => Node::BlockDevice {
            number: stat.st_rdev,
        },
        FileType::Fifo => Node::Fifo,
        _ => Node::Socket,
    })
}

/// Files that have several names, by their inode: the first entry and its checksum.
#[derive(Default)]
struct Known(std::collections::BTreeMap<u64, (u64, u32)>);

impl Known {
    /// The entry that is the same file, with its checksum.
    fn same(&self, stat: &Stat) -> Option<(u64, u32)> {
        self.0.get(&stat.st_ino).copied()
    }

    fn note(&mut self, stat: &Stat, number: u64, sum: u32) {
        if stat.st_nlink > 1 {
            self.0.insert(stat.st_ino, (number, sum));
        }
    }
}

/// The checksum of a file's content, which has `size` bytes; less if it turns out shorter.
fn sum_of(mut file: &File, size: u64, buffer: &mut [u8]) -> io::Result<u32> {
    let mut hasher = crc32fast::Hasher::new();
    let mut left = size;
    while left > 0 {
        let most = usize::try_from(left).map_or(buffer.len(), |left| left.min(buffer.len()));
        match file.read(&mut buffer[..most]) {
            Ok(0) => break,
            Ok(count) => {
                hasher.update(&buffer[..count]);
                left -= count as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(hasher.finalize())
}

/// Forgets what memory holds of a file, so that the medium is read. What programs have mapped stays.
fn drop_cached(file: &File) {
    let _only_advice = rustix::fs::fadvise(file, 0, None, Advice::DontNeed);
}

fn file_type(stat: &Stat) -> FileType {
    FileType::from_raw_mode(stat.st_mode)
}

/// Whether an error says that the medium, or the file system on it, is damaged.
fn is_rot(errno: Errno) -> bool {
    matches!(
        errno,
        Errno::IO | Errno::UCLEAN | Errno::BADMSG | Errno::ILSEQ | Errno::NODATA
    )
}

#[cfg(test)]
mod tests;
