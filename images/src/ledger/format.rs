//! A ledger's bytes.
//!
//! [`MAGIC`], then deflated: for each entry a kind, how many bytes of its path are those of the entry before, the rest of the
//! path with its length, mode, user, group, what the kind has besides, and the number of extended attributes with name,
//! length and checksum of each; at the end [`END`]. Numbers are little-endian base 128, checksums four bytes, little
//! endian. Entries stand in the order of a walk: a directory before what is in it, names by their bytes.

use std::fs::File;
use std::io::{self, BufRead as _, BufReader, BufWriter, Read, Write};

use flate2::read::DeflateDecoder;
use flate2::write::DeflateEncoder;
use sha2::{Digest as _, Sha256};

use super::{Entry, LEDGER_BYTES_MAX, LedgerError, Node, Seal, Xattr};
use crate::Digest;

/// What every ledger of this form begins with.
const MAGIC: &[u8; 8] = b"fsledg1\n";
/// Longer than any path in a tree: 1024 names of 255 bytes.
const PATH_BYTES_MAX: usize = 512 << 10;
/// The longest target of a link (`PATH_MAX`).
const TARGET_BYTES_MAX: usize = 4096;
/// The longest name of an extended attribute (`XATTR_NAME_MAX`).
const XATTR_NAME_MAX: usize = 255;
/// The most extended attributes of a file: what listxattr(2) has room for.
const XATTRS_MAX: u64 = 1 << 15;

const END: u8 = 0;
const DIRECTORY: u8 = 1;
const FILE: u8 = 2;
const LINKED_FILE: u8 = 3;
const SYMLINK: u8 = 4;
const CHAR_DEVICE: u8 = 5;
const BLOCK_DEVICE: u8 = 6;
const FIFO: u8 = 7;
const SOCKET: u8 = 8;

/// Writes a ledger.
pub(super) struct Writer {
    out: DeflateEncoder<Sealing>,
    /// The last path.
    last: Vec<u8>,
    count: u64,
    scratch: Vec<u8>,
}

/// Counts and hashes what is written.
struct Sealing {
    file: BufWriter<File>,
    hasher: Sha256,
    size: u64,
}

impl Write for Sealing {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.file.write(bytes)?;
        self.hasher.update(&bytes[..count]);
        self.size += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Writer {
    pub(super) fn new(file: File) -> io::Result<Self> {
        let mut sealing = Sealing {
            file: BufWriter::new(file),
            hasher: Sha256::new(),
            size: 0,
        };
        sealing.write_all(MAGIC)?;
        Ok(Self {
            out: DeflateEncoder::new(sealing, flate2::Compression::new(4)),
            last: Vec::new(),
            count: 0,
            scratch: Vec::new(),
        })
    }

    /// How many entries there are.
    pub(super) const fn count(&self) -> u64 {
        self.count
    }

    pub(super) fn entry(&mut self, entry: &Entry) -> Result<(), LedgerError> {
        let out = &mut self.scratch;
        out.clear();
        out.push(kind(&entry.node));
        let pairs = self.last.iter().zip(&entry.path);
        let same = pairs.take_while(|(last, now)| last == now).count();
        number(out, same as u64);
        bytes(out, &entry.path[same..]);
        for id in [entry.mode, entry.uid, entry.gid] {
            number(out, id.into());
        }
        match &entry.node {
            Node::Directory | Node::Fifo | Node::Socket => {}
            Node::File { size, sum, same_as } => {
                number(out, *size);
                out.extend(sum.to_le_bytes());
                if let Some(first) = same_as {
                    number(out, *first);
                }
            }
            Node::Symlink { target } => bytes(out, target),
            Node::CharDevice { number: device } | Node::BlockDevice { number: device } => {
                number(out, *device);
            }
        }
        number(out, entry.xattrs.len() as u64);
        for xattr in &entry.xattrs {
            bytes(out, &xattr.name);
            number(out, xattr.length);
            out.extend(xattr.sum.to_le_bytes());
        }
        self.out.write_all(out)?;
        if self.out.get_ref().size > LEDGER_BYTES_MAX {
            return Err(LedgerError::TooLong);
        }
        self.last.clone_from(&entry.path);
        self.count += 1;
        Ok(())
    }

    /// Writes the end; what belongs into the layer's record. Flushes nothing to the disk.
    pub(super) fn finish(mut self) -> Result<Seal, LedgerError> {
        self.out.write_all(&[END])?;
        let mut sealing = self.out.finish()?;
        sealing.flush()?;
        if sealing.size > LEDGER_BYTES_MAX {
            return Err(LedgerError::TooLong);
        }
        Ok(Seal {
            sha256: Digest::from_bytes(sealing.hasher.finalize().into()),
            size: sealing.size,
        })
    }
}

const fn kind(node: &Node) -> u8 {
    match node {
        Node::Directory => DIRECTORY,
        Node::File { same_as: None, .. } => FILE,
        Node::File {
            same_as: Some(_), ..
        } => LINKED_FILE,
        Node::Symlink { .. } => SYMLINK,
        Node::CharDevice { .. } => CHAR_DEVICE,
        Node::BlockDevice { .. } => BLOCK_DEVICE,
        Node::Fifo => FIFO,
        Node::Socket => SOCKET,
    }
}

fn number(out: &mut Vec<u8>, mut number: u64) {
    loop {
        let low = number.to_le_bytes()[0] & 0x7f;
        number >>= 7;
        if number == 0 {
            return out.push(low);
        }
        out.push(low | 0x80);
    }
}

fn bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    number(out, bytes.len() as u64);
    out.extend(bytes);
}

/// Reads a ledger, entry by entry. Whatever the bytes are, it takes little memory and comes to an end.
pub(crate) struct Reader<R> {
    input: BufReader<DeflateDecoder<R>>,
    /// The bytes before the entries were looked at.
    begun: bool,
    ended: bool,
    last: Vec<u8>,
    count: u64,
}

impl<R: Read> Reader<R> {
    pub(super) fn new(input: R) -> Self {
        Self {
            input: BufReader::new(DeflateDecoder::new(input)),
            begun: false,
            ended: false,
            last: Vec::new(),
            count: 0,
        }
    }

    /// The next entry and its number, from 0; `None` at the end.
    ///
    /// # Errors
    /// Of reading, and `InvalidData` when this is no ledger.
    pub(super) fn next(&mut self) -> io::Result<Option<(u64, Entry)>> {
        if !std::mem::replace(&mut self.begun, true) {
            let mut magic = [0; MAGIC.len()];
            // Not deflated, so from below the decoder, which has not begun.
            self.input.get_mut().get_mut().read_exact(&mut magic)?;
            if magic != *MAGIC {
                return Err(malformed());
            }
        }
        if self.ended {
            return Ok(None);
        }
        let kind = self.byte()?;
        if kind == END {
            self.ended = true;
            // Nothing comes behind.
            return if self.input.fill_buf()?.is_empty() {
                Ok(None)
            } else {
                Err(malformed())
            };
        }
        let same = usize::try_from(self.number()?).map_err(|_| malformed())?;
        if same > self.last.len() {
            return Err(malformed());
        }
        let rest = self.bytes(PATH_BYTES_MAX - same.min(PATH_BYTES_MAX))?;
        self.last.truncate(same);
        self.last.extend(rest);
        let (mode, uid, gid) = (self.id()?, self.id()?, self.id()?);
        let node = self.node(kind)?;
        let xattrs = self.number()?;
        if xattrs > XATTRS_MAX {
            return Err(malformed());
        }
        let entry = Entry {
            path: self.last.clone(),
            mode,
            uid,
            gid,
            node,
            xattrs: (0..xattrs)
                .map(|_| {
                    Ok(Xattr {
                        name: self.bytes(XATTR_NAME_MAX)?,
                        length: self.number()?,
                        sum: self.sum()?,
                    })
                })
                .collect::<io::Result<_>>()?,
        };
        let at = self.count;
        self.count += 1;
        Ok(Some((at, entry)))
    }

    fn node(&mut self, kind: u8) -> io::Result<Node> {
        Ok(match kind {
            DIRECTORY => Node::Directory,
            FILE | LINKED_FILE => Node::File {
                size: self.number()?,
                sum: self.sum()?,
                same_as: (kind == LINKED_FILE).then(|| self.number()).transpose()?,
            },
            SYMLINK => Node::Symlink {
                target: self.bytes(TARGET_BYTES_MAX)?,
            },
            CHAR_DEVICE => Node::CharDevice {
                number: self.number()?,
            },
            BLOCK_DEVICE => Node::BlockDevice {
                number: self.number()?,
            },
            FIFO => Node::Fifo,
            SOCKET => Node::Socket,
            _ => return Err(malformed()),
        })
    }

    fn byte(&mut self) -> io::Result<u8> {
        let mut byte = [0];
        self.input.read_exact(&mut byte)?;
        Ok(byte[0])
    }

    fn sum(&mut self) -> io::Result<u32> {
        let mut sum = [0; 4];
        self.input.read_exact(&mut sum)?;
        Ok(u32::from_le_bytes(sum))
    }

    fn number(&mut self) -> io::Result<u64> {
        let mut number = 0_u64;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            let low = u64::from(byte & 0x7f);
            if low << shift >> shift != low {
                return Err(malformed());
            }
            number |= low << shift;
            if byte & 0x80 == 0 {
                return Ok(number);
            }
        }
        Err(malformed())
    }

    fn id(&mut self) -> io::Result<u32> {
        u32::try_from(self.number()?).map_err(|_| malformed())
    }

    fn bytes(&mut self, max: usize) -> io::Result<Vec<u8>> {
        let length = usize::try_from(self.number()?).map_err(|_| malformed())?;
        if length > max {
            return Err(malformed());
        }
        let mut bytes = Vec::new();
        // What is not there takes no memory.
        let mut piece = Read::by_ref(&mut self.input).take(length as u64);
        piece.read_to_end(&mut bytes)?;
        if bytes.len() == length {
            Ok(bytes)
        } else {
            Err(malformed())
        }
    }
}

fn malformed() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "it is not a list of files")
}
