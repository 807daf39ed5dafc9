//! A tree beside the ledger that was written when it was made.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use rustix::fs::FileType;
use rustix::io::Errno;
use serde::Serialize;

use super::format::Reader;
use super::walk::Walk;
use super::{Entry, LedgerError, Node, PIECE, Xattr, drop_cached, file_type, is_rot, node, sum_of};

/// Flaws of one layer that are named; more are counted.
const FLAWS_MAX: usize = 1000;
/// Characters of a path or a link's target that are shown.
const SHOWN_MAX: usize = 512;

/// Something in a tree that is not as it was made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Flaw {
    /// Below the layer's root, with escapes for what is no text; empty for the root, or the layer as a whole.
    pub path: String,
    /// What about it.
    pub wrong: Wrong,
    /// As it was made, for people.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expected: Option<String>,
    /// As it is, for people.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub found: Option<String>,
}

/// What is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Wrong {
    /// It is not there, with all that was in it.
    Missing,
    /// It does not belong there, with all that is in it.
    Extra,
    /// It is a file where there was a directory, or the like.
    Type,
    /// Its permission bits.
    Mode,
    /// Its user or group.
    Owner,
    /// How long the file is.
    Size,
    /// The bytes of the file.
    Content,
    /// Where the symbolic link leads.
    Target,
    /// It is not the same file as another name any more.
    HardLink,
    /// The number of the device, such as that of a whiteout.
    Device,
    /// An extended attribute.
    Xattr,
    /// The medium does not give it back.
    Unreadable,
    /// The list of what the layer's files should be is itself lost.
    Ledger,
    /// The note of what the layer is, is lost.
    Record,
    /// Not as many names, or bytes, as there were.
    Extent,
}

impl Flaw {
    pub(crate) fn of_layer(wrong: Wrong) -> Self {
        Self {
            path: String::new(),
            wrong,
            expected: None,
            found: None,
        }
    }

    pub(crate) fn differing(mut self, expected: String, found: String) -> Self {
        (self.expected, self.found) = (Some(expected), Some(found));
        self
    }
}

/// What came of comparing a tree.
#[derive(Debug, Default)]
pub(crate) struct Compared {
    pub(crate) flaws: Vec<Flaw>,
    /// Flaws that are not among them.
    pub(crate) left_out: u64,
    /// Names that were looked at, without the root.
    pub(crate) names: u64,
    /// Bytes of content that were read.
    pub(crate) bytes: u64,
}

impl Compared {
    fn add(&mut self, path: &[u8], wrong: Wrong, differ: Option<(String, String)>) {
        if self.flaws.len() >= FLAWS_MAX {
            self.left_out += 1;
            return;
        }
        let (expected, found) = differ.unzip();
        self.flaws.push(Flaw {
            path: shown(path),
            wrong,
            expected,
            found,
        });
    }
}

/// Walks a tree beside its ledger; reads every file from the medium.
///
/// # Errors
/// What says nothing about the tree: a descriptor or memory that cannot be had, a ledger that is none.
pub(crate) fn compare<R: Read>(
    tree: &Path,
    ledger: &mut Reader<R>,
) -> Result<Compared, LedgerError> {
    let mut walk = Walk::new(tree)?;
    let mut done = Compared::default();
    let mut files = Files::default();
    let mut there = walk.advance()?;
    let mut due = ledger.next()?;
    loop {
        let order = match (&due, there) {
            (None, false) => return Ok(done),
            (Some(_), false) => Ordering::Less,
            (None, true) => Ordering::Greater,
            (Some((_, entry)), true) => in_order(&entry.path, walk.path()),
        };
        match (order, due) {
            (Ordering::Less, Some((_, entry))) => {
                done.add(&entry.path, Wrong::Missing, None);
                due = after(ledger, &entry.path)?;
            }
            (Ordering::Equal, Some((number, entry))) => {
                done.names += u64::from(number > 0);
                let goes_on = files.compare(&mut walk, number, &entry, &mut done)?;
                due = if goes_on {
                    ledger.next()?
                } else {
                    walk.pass_over();
                    after(ledger, &entry.path)?
                };
                there = walk.advance()?;
            }
            (_, other) => {
                done.add(walk.path(), Wrong::Extra, None);
                walk.pass_over();
                there = walk.advance()?;
                due = other;
            }
        }
    }
}

/// The next entry that is not in the directory `path`.
fn after<R: Read>(ledger: &mut Reader<R>, path: &[u8]) -> io::Result<Option<(u64, Entry)>> {
    loop {
        let next = ledger.next()?;
        let is_below = next.as_ref().is_some_and(|(_, entry)| {
            path.is_empty()
                || entry
                    .path
                    .strip_prefix(path)
                    .is_some_and(|rest| rest.starts_with(b"/"))
        });
        if !is_below {
            return Ok(next);
        }
    }
}

/// The order of a walk.
fn in_order(one: &[u8], other: &[u8]) -> Ordering {
    fn parts(path: &[u8]) -> impl Iterator<Item = &[u8]> {
        path.split(|byte| *byte == b'/')
            .filter(|part| !part.is_empty())
    }
    parts(one).cmp(parts(other))
}

/// The files that were met, for names of one file, and room to read.
#[derive(Default)]
struct Files {
    /// By their entries: the inode.
    inodes: BTreeMap<u64, u64>,
    /// By their inodes: the checksum.
    sums: BTreeMap<u64, u32>,
    buffer: Vec<u8>,
}

impl Files {
    /// Compares an entry with what is at its place; false when what is in it cannot be compared.
    fn compare(
        &mut self,
        walk: &mut Walk,
        number: u64,
        entry: &Entry,
        done: &mut Compared,
    ) -> Result<bool, LedgerError> {
        let path = &entry.path;
        if let Some(errno) = walk.fault() {
            done.add(path, Wrong::Unreadable, unreadable(errno));
            return Ok(false);
        }
        let stat = *walk.stat();
        let kind = file_type(&stat);
        if kind != kind_of(&entry.node) {
            let differ = (name(kind_of(&entry.node)).to_owned(), name(kind).to_owned());
            done.add(path, Wrong::Type, Some(differ));
            return Ok(false);
        }
        let mode = stat.st_mode & 0o7777;
        // A link has none of its own.
        if kind != FileType::Symlink && mode != entry.mode {
            let differ = (format!("{:04o}", entry.mode), format!("{mode:04o}"));
            done.add(path, Wrong::Mode, Some(differ));
        }
        if (stat.st_uid, stat.st_gid) != (entry.uid, entry.gid) {
            let differ = (
                format!("{}:{}", entry.uid, entry.gid),
                format!("{}:{}", stat.st_uid, stat.st_gid),
            );
            done.add(path, Wrong::Owner, Some(differ));
        }
        match self.content(walk, number, entry, done) {
            Ok(()) => {}
            Err(LedgerError::Io(error)) => match Errno::from_io_error(&error) {
                Some(errno) if is_rot(errno) => {
                    done.add(path, Wrong::Unreadable, unreadable(errno));
                }
                _ => return Err(error.into()),
            },
            Err(other) => return Err(other),
        }
        Ok(true)
    }

    fn content(
        &mut self,
        walk: &Walk,
        number: u64,
        entry: &Entry,
        done: &mut Compared,
    ) -> Result<(), LedgerError> {
        let file = match entry.node {
            Node::File { .. } => Some(walk.open()?),
            _ => None,
        };
        compare_xattrs(
            &entry.path,
            &entry.xattrs,
            &walk.xattrs(file.as_ref())?,
            done,
        );
        match (&entry.node, &file) {
            (Node::File { size, sum, same_as }, Some(file)) => {
                let expected = (*size, *sum, *same_as);
                self.file((walk, file), number, &entry.path, expected, done)
            }
            _ => Self::node(walk, entry, done),
        }
    }

    fn node(walk: &Walk, entry: &Entry, done: &mut Compared) -> Result<(), LedgerError> {
        let path = &entry.path;
        match (&entry.node, node(walk)?) {
            (Node::Symlink { target }, Node::Symlink { target: found }) if *target != found => {
                done.add(path, Wrong::Target, Some((shown(target), shown(&found))));
            }
            (
                Node::CharDevice { number } | Node::BlockDevice { number },
                Node::CharDevice { number: found } | Node::BlockDevice { number: found },
            ) if *number != found => {
                let differ = (format!("{number:#x}"), format!("{found:#x}"));
                done.add(path, Wrong::Device, Some(differ));
            }
            _ => {}
        }
        Ok(())
    }

    fn file(
        &mut self,
        (walk, opened): (&Walk, &File),
        number: u64,
        path: &[u8],
        (size, sum, same_as): (u64, u32, Option<u64>),
        done: &mut Compared,
    ) -> Result<(), LedgerError> {
        let stat = walk.stat();
        let found = u64::try_from(stat.st_size).unwrap_or(0);
        self.inodes.insert(number, stat.st_ino);
        // One that is gone was named already.
        let first = same_as.and_then(|first| self.inodes.get(&first));
        if first.is_some_and(|first| *first != stat.st_ino) {
            done.add(path, Wrong::HardLink, None);
        }
        if found != size {
            let differ = (format!("{size} bytes"), format!("{found} bytes"));
            done.add(path, Wrong::Size, Some(differ));
            return Ok(());
        }
        let read = match self.sums.get(&stat.st_ino) {
            Some(sum) => *sum,
            None => {
                self.buffer.resize(PIECE, 0);
                drop_cached(opened);
                let read = sum_of(opened, size, &mut self.buffer)?;
                // It was not in memory before, or is mapped.
                drop_cached(opened);
                done.bytes += size;
                read
            }
        };
        if stat.st_nlink > 1 {
            self.sums.insert(stat.st_ino, read);
        }
        if read != sum {
            let differ = (format!("CRC-32 {sum:08x}"), format!("CRC-32 {read:08x}"));
            done.add(path, Wrong::Content, Some(differ));
        }
        Ok(())
    }
}

fn compare_xattrs(path: &[u8], expected: &[Xattr], found: &[Xattr], done: &mut Compared) {
    let names = expected.iter().chain(found).map(|xattr| &xattr.name);
    let names: std::collections::BTreeSet<&Vec<u8>> = names.collect();
    for name in names {
        let of = |all: &[Xattr]| all.iter().find(|xattr| xattr.name == *name).cloned();
        let (expected, found) = (of(expected), of(found));
        if expected == found {
            continue;
        }
        let say = |xattr: Option<Xattr>| match xattr {
            Some(xattr) => format!(
                "{}: {} bytes, CRC-32 {:08x}",
                shown(name),
                xattr.length,
                xattr.sum
            ),
            None => format!("no {}", shown(name)),
        };
        done.add(path, Wrong::Xattr, Some((say(expected), say(found))));
    }
}

fn unreadable(errno: Errno) -> Option<(String, String)> {
    Some((
        "something to read".to_owned(),
        io::Error::from(errno).to_string(),
    ))
}

const fn kind_of(node: &Node) -> FileType {
    match node {
        Node::Directory => FileType::Directory,
        Node::File { .. } => FileType::RegularFile,
        Node::Symlink { .. } => FileType::Symlink,
        Node::CharDevice { .. } => FileType::CharacterDevice,
        Node::BlockDevice { .. } => FileType::BlockDevice,
        Node::Fifo => FileType::Fifo,
        Node::Socket => FileType::Socket,
    }
}

const fn name(kind: FileType) -> &'static str {
    match kind {
        FileType::Directory => "a directory",
        FileType::RegularFile => "a file",
        FileType::Symlink => "a symbolic link",
        FileType::CharacterDevice => "a character device",
        FileType::BlockDevice => "a block device",
        FileType::Fifo => "a fifo",
        FileType::Socket => "a socket",
        FileType::Unknown => "something unknown",
    }
}

fn shown(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes)
        .chars()
        .take(SHOWN_MAX)
        .flat_map(char::escape_debug)
        .collect()
}
