//! Reading tar archives as a stream, with every header bounded in memory.
//!
//! The `tar` crate decodes the fields of a header block. Its `Archive` is not used because it reads extended
//! headers whole, however long, and does not know PAX sparse files. Formats: ustar, GNU (long names, sparse),
//! PAX (as in pax(1), "pax Extended Header"), and the `SCHILY.xattr` records that Go writes.

use std::io::{self, Read};

use tar::{EntryType, GnuExtSparseHeader, GnuSparseHeader, Header};

const BLOCK: usize = 512;
/// Where a header has the entry's type.
const TYPE_AT: usize = 156;
/// What the extended headers (PAX records, long names) in front of one entry may have together, in bytes: extended
/// attributes are at most 64 KiB each on Linux, and a file rarely has more than two.
const EXTENDED_BYTES_MAX: u64 = 1 << 20;
/// The most pieces a sparse file may have.
const EXTENTS_MAX: usize = 1 << 16;

/// A stream of entries. Reading from it yields the stored bytes of the entry that [`next`](Self::next)
/// returned last.
#[derive(Debug)]
pub(crate) struct TarStream<R> {
    reader: R,
    /// Stored bytes of the current entry that have not been read.
    left: u64,
    /// Zeros after them, up to the next block.
    padding: u64,
}

/// One entry, its extended headers merged in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    /// As written; not clean, not safe.
    pub(crate) path: Vec<u8>,
    /// As written; not clean, not safe.
    pub(crate) link: Vec<u8>,
    pub(crate) kind: Kind,
    /// Bytes of the file, holes included.
    pub(crate) size: u64,
    /// Permission bits with setuid, setgid and sticky.
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: Mtime,
    pub(crate) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Where the stored bytes belong; `None` is one piece at the start.
    pub(crate) extents: Option<Vec<Extent>>,
}

/// Seconds and nanoseconds since 1970; seconds may be negative, nanoseconds are 0 to 999,999,999.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Mtime {
    pub(crate) seconds: i64,
    pub(crate) nanos: u32,
}

/// A piece of a sparse file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Extent {
    pub(crate) offset: u64,
    pub(crate) length: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    File,
    HardLink,
    Symlink,
    CharDevice,
    BlockDevice,
    Directory,
    Fifo,
    /// A type this reader does not know, by its letter.
    Other(u8),
}

/// Why an archive cannot be read on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TarError {
    #[error("the stream cannot be read")]
    Read(#[source] io::Error),
    #[error("the archive ends in the middle of an entry")]
    Truncated,
    #[error("it is not a tar archive, or a damaged one: {0}")]
    Malformed(&'static str),
    #[error("the extended headers of an entry are longer than {EXTENDED_BYTES_MAX} bytes")]
    ExtendedTooLong,
}

/// What the extended headers before an entry said.
#[derive(Default)]
struct Extended {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u64>,
    gid: Option<u64>,
    mtime: Option<Mtime>,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    sparse: PaxSparse,
}

/// GNU's three ways to put a sparse file into PAX records (GNU tar manual, "Storing Sparse Files").
#[derive(Default)]
struct PaxSparse {
    present: bool,
    /// Version 1.0: the map stands before the data.
    map_in_data: bool,
    name: Option<Vec<u8>>,
    real_size: Option<u64>,
    numbers: Vec<u64>,
}

impl<R: Read> TarStream<R> {
    pub(crate) const fn new(reader: R) -> Self {
        Self {
            reader,
            left: 0,
            padding: 0,
        }
    }

    /// Skips what is left of the current entry and reads the next one's headers; `None` at the end.
    pub(crate) fn next(&mut self) -> Result<Option<Entry>, TarError> {
        let mut extended = Extended::default();
        let mut extended_bytes = 0_u64;
        loop {
            self.skip_rest()?;
            let Some(block) = self.block_or_end()? else {
                return Ok(None);
            };
            if block.iter().all(|byte| *byte == 0) {
                return Ok(None);
            }
            let header = Header::from_byte_slice(&block);
            check_sum(header)?;
            let size = header
                .entry_size()
                .map_err(|_| TarError::Malformed("a size is not a number"))?;
            if is_extended(header.entry_type()) {
                // One after the other they could otherwise take any amount of memory.
                extended_bytes = extended_bytes.saturating_add(size);
                if extended_bytes > EXTENDED_BYTES_MAX {
                    return Err(TarError::ExtendedTooLong);
                }
            }
            match header.entry_type() {
                EntryType::XHeader => parse_pax(&self.extended_body(size)?, &mut extended)?,
                // Records that hold for all entries after it: Git writes its commit there. Nobody in the
                // container world acts on them.
                EntryType::XGlobalHeader => drop(self.extended_body(size)?),
                EntryType::GNULongName => {
                    extended.path = Some(until_nul(self.extended_body(size)?))
                }
                EntryType::GNULongLink => {
                    extended.link = Some(until_nul(self.extended_body(size)?))
                }
                _ => return self.entry(header, size, extended).map(Some),
            }
        }
    }

    fn entry(&mut self, header: &Header, size: u64, extended: Extended) -> Result<Entry, TarError> {
        let path = extended
            .sparse
            .name
            .clone()
            .or(extended.path)
            .unwrap_or_else(|| header.path_bytes().into_owned());
        let link = extended
            .link
            .or_else(|| header.link_name_bytes().map(std::borrow::Cow::into_owned))
            .unwrap_or_default();
        // Before ustar a directory was a file whose name ended in a slash.
        let ancient_directory = header.as_bytes()[TYPE_AT] == 0 && path.ends_with(b"/");
        let kind = if ancient_directory {
            Kind::Directory
        } else {
            kind(header.entry_type())
        };
        let stored = match kind {
            Kind::File | Kind::Other(_) => extended.size.unwrap_or(size),
            _ if ancient_directory => size,
            // Some old archives repeat the target's size in a link's header, without data; Go reads none.
            _ => 0,
        };
        self.set_body(stored)?;
        let mut real = stored;
        let mut extents = None;
        if kind == Kind::File && header.entry_type() == EntryType::GNUSparse {
            let gnu = header
                .as_gnu()
                .ok_or(TarError::Malformed("a sparse file without a GNU header"))?;
            real = gnu
                .real_size()
                .map_err(|_| TarError::Malformed("a sparse file's size is not a number"))?;
            extents = Some(self.gnu_sparse_map(gnu)?);
        } else if kind == Kind::File && extended.sparse.present {
            real = extended.sparse.real_size.unwrap_or(stored);
            let numbers = if extended.sparse.map_in_data {
                self.sparse_map_in_data()?
            } else {
                extended.sparse.numbers
            };
            extents = Some(extents_of(&numbers)?);
        }
        if let Some(extents) = &extents {
            check_extents(extents, self.left, real)?;
        }
        Ok(Entry {
            path,
            link,
            kind,
            size: real,
            mode: field(header, 100..108, header.mode(), "a mode is not a number")? & 0o7777,
            uid: id(extended.uid, || {
                field(header, 108..116, header.uid(), "an owner is not a number")
            })?,
            gid: id(extended.gid, || {
                field(header, 116..124, header.gid(), "a group is not a number")
            })?,
            mtime: extended.mtime.unwrap_or_else(|| Mtime {
                seconds: header
                    .mtime()
                    .ok()
                    .and_then(|seconds| seconds.try_into().ok())
                    .unwrap_or(0),
                nanos: 0,
            }),
            xattrs: extended.xattrs,
            extents,
        })
    }

    fn set_body(&mut self, stored: u64) -> Result<(), TarError> {
        self.left = stored;
        let padded = stored
            .checked_next_multiple_of(BLOCK as u64)
            .ok_or(TarError::Malformed("a size is too large"))?;
        self.padding = padded - stored;
        Ok(())
    }

    fn skip_rest(&mut self) -> Result<(), TarError> {
        let rest = self
            .left
            .checked_add(self.padding)
            .ok_or(TarError::Malformed("a size is too large"))?;
        let skipped = io::copy(&mut (&mut self.reader).take(rest), &mut io::sink())
            .map_err(TarError::Read)?;
        (self.left, self.padding) = (0, 0);
        if skipped == rest {
            Ok(())
        } else {
            Err(TarError::Truncated)
        }
    }

    /// The next block; `None` when the stream ends before it, which many writers do instead of writing zeros.
    fn block_or_end(&mut self) -> Result<Option<[u8; BLOCK]>, TarError> {
        let mut block = [0; BLOCK];
        let mut filled = 0;
        while filled < BLOCK {
            match self.reader.read(&mut block[filled..]) {
                Ok(0) if filled == 0 => return Ok(None),
                Ok(0) => return Err(TarError::Truncated),
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(TarError::Read(error)),
            }
        }
        Ok(Some(block))
    }

    /// The content of an extended header, at most [`EXTENDED_BYTES_MAX`].
    fn extended_body(&mut self, size: u64) -> Result<Vec<u8>, TarError> {
        self.set_body(size)?;
        let mut body = Vec::new();
        self.read_to_end(&mut body).map_err(TarError::Read)?;
        if body.len() as u64 == size {
            Ok(body)
        } else {
            Err(TarError::Truncated)
        }
    }

    /// The map of an old GNU sparse file: four pieces in the header, then blocks of 21.
    fn gnu_sparse_map(&mut self, gnu: &tar::GnuHeader) -> Result<Vec<Extent>, TarError> {
        let mut extents = Vec::new();
        gnu_extents(&gnu.sparse, &mut extents)?;
        let mut more = gnu.is_extended();
        while more {
            let block = self.block_or_end()?.ok_or(TarError::Truncated)?;
            let mut extension = GnuExtSparseHeader::new();
            extension.as_mut_bytes().copy_from_slice(&block);
            gnu_extents(extension.sparse(), &mut extents)?;
            more = extension.is_extended();
        }
        Ok(extents)
    }

    /// Version 1.0: decimal numbers, one a line, before the data, padded to a block. The first is the count.
    fn sparse_map_in_data(&mut self) -> Result<Vec<u64>, TarError> {
        let bad = TarError::Malformed("a sparse file's map is not made of numbers");
        let mut numbers: Vec<u64> = Vec::new();
        let mut wanted = 1;
        let mut digits = String::new();
        while numbers.len() < wanted {
            let mut block = [0; BLOCK];
            self.read_exact(&mut block)
                .map_err(|_| TarError::Truncated)?;
            for byte in block {
                match byte {
                    b'0'..=b'9' if digits.len() < 20 => digits.push(char::from(byte)),
                    b'\n' if numbers.len() < wanted => {
                        let Ok(number) = digits.parse() else {
                            return Err(bad);
                        };
                        digits.clear();
                        if numbers.is_empty() {
                            wanted = usize::try_from(number)
                                .ok()
                                .filter(|count| *count <= EXTENTS_MAX)
                                .map(|count| 2 * count + 1)
                                .ok_or(TarError::Malformed("a sparse file has too many pieces"))?;
                        }
                        numbers.push(number);
                    }
                    0 if numbers.len() == wanted => {}
                    _ => return Err(bad),
                }
            }
        }
        numbers.remove(0);
        Ok(numbers)
    }
}

impl<R: Read> Read for TarStream<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.left).map_or(buffer.len(), |left| left.min(buffer.len()));
        if most == 0 {
            return Ok(0);
        }
        let count = self.reader.read(&mut buffer[..most])?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.left -= count as u64;
        Ok(count)
    }
}

fn kind(entry_type: EntryType) -> Kind {
    match entry_type {
        EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => Kind::File,
        EntryType::Link => Kind::HardLink,
        EntryType::Symlink => Kind::Symlink,
        EntryType::Char => Kind::CharDevice,
        EntryType::Block => Kind::BlockDevice,
        EntryType::Directory => Kind::Directory,
        EntryType::Fifo => Kind::Fifo,
        other => Kind::Other(other.as_byte()),
    }
}

/// Whether a header says something about the entry that follows, or about all that do.
fn is_extended(entry_type: EntryType) -> bool {
    matches!(
        entry_type,
        EntryType::XHeader
            | EntryType::XGlobalHeader
            | EntryType::GNULongName
            | EntryType::GNULongLink
    )
}

/// POSIX sums unsigned bytes; some old programs summed signed ones.
fn check_sum(header: &Header) -> Result<(), TarError> {
    let bad = TarError::Malformed("a header's checksum is wrong");
    let Ok(stated) = header.cksum() else {
        return Err(bad);
    };
    let bytes = header.as_bytes();
    let sum = |byte: fn(u8) -> i64| -> i64 {
        bytes
            .iter()
            .enumerate()
            .map(|(at, b)| byte(if (148..156).contains(&at) { b' ' } else { *b }))
            .sum()
    };
    let stated = i64::from(stated);
    let good = stated == sum(i64::from) || stated == sum(|b| i64::from(b.cast_signed()));
    if good { Ok(()) } else { Err(bad) }
}

/// A number of a header. Some writers leave those blank that they do not know, which means zero.
fn field<T: Default>(
    header: &Header,
    at: std::ops::Range<usize>,
    parsed: io::Result<T>,
    problem: &'static str,
) -> Result<T, TarError> {
    parsed.or_else(|_| {
        let blank = header.as_bytes()[at]
            .iter()
            .all(|byte| matches!(byte, 0 | b' '));
        if blank {
            Ok(T::default())
        } else {
            Err(TarError::Malformed(problem))
        }
    })
}

fn id(
    extended: Option<u64>,
    header: impl FnOnce() -> Result<u64, TarError>,
) -> Result<u32, TarError> {
    // 2^32 - 1 means "leave it" to chown(2).
    u32::try_from(extended.map_or_else(header, Ok)?)
        .ok()
        .filter(|id| *id != u32::MAX)
        .ok_or(TarError::Malformed("an owner is beyond 32 bits"))
}

fn until_nul(mut bytes: Vec<u8>) -> Vec<u8> {
    if let Some(end) = bytes.iter().position(|byte| *byte == 0) {
        bytes.truncate(end);
    }
    bytes
}

/// Reads `LENGTH KEY=VALUE\n` records; the length counts the whole record, so values may hold anything.
fn parse_pax(mut body: &[u8], extended: &mut Extended) -> Result<(), TarError> {
    let bad = || TarError::Malformed("a PAX record is not LENGTH KEY=VALUE");
    while !body.is_empty() {
        let space = body
            .iter()
            .take(20)
            .position(|byte| *byte == b' ')
            .ok_or_else(bad)?;
        let length = number(&body[..space])
            .and_then(|n| usize::try_from(n).ok())
            .ok_or_else(bad)?;
        if length <= space + 1 || length > body.len() || body[length - 1] != b'\n' {
            return Err(bad());
        }
        let record = &body[space + 1..length - 1];
        let equals = record
            .iter()
            .position(|byte| *byte == b'=')
            .ok_or_else(bad)?;
        pax_record(&record[..equals], &record[equals + 1..], extended)?;
        body = &body[length..];
    }
    Ok(())
}

fn pax_record(key: &[u8], value: &[u8], extended: &mut Extended) -> Result<(), TarError> {
    let numeric = || {
        number(value).ok_or(TarError::Malformed(
            "a PAX record holds no number where one belongs",
        ))
    };
    let sparse = &mut extended.sparse;
    match key {
        b"path" => extended.path = Some(value.to_vec()),
        b"linkpath" => extended.link = Some(value.to_vec()),
        b"size" => extended.size = Some(numeric()?),
        b"uid" => extended.uid = Some(numeric()?),
        b"gid" => extended.gid = Some(numeric()?),
        b"mtime" => {
            extended.mtime =
                Some(pax_time(value).ok_or(TarError::Malformed("a PAX mtime is no time"))?)
        }
        b"GNU.sparse.major" => {
            sparse.present = true;
            sparse.map_in_data = value == b"1";
        }
        b"GNU.sparse.name" => sparse.name = Some(value.to_vec()),
        b"GNU.sparse.size" | b"GNU.sparse.realsize" => sparse.real_size = Some(numeric()?),
        b"GNU.sparse.numblocks" => sparse.present = true,
        b"GNU.sparse.offset" | b"GNU.sparse.numbytes" => {
            sparse.present = true;
            sparse.numbers.push(numeric()?);
        }
        b"GNU.sparse.map" => {
            sparse.present = true;
            for piece in value
                .split(|byte| *byte == b',')
                .filter(|piece| !piece.is_empty())
            {
                sparse.numbers.push(
                    number(piece)
                        .ok_or(TarError::Malformed("a PAX sparse map holds no numbers"))?,
                );
            }
        }
        _ => {
            if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                extended.xattrs.push((name.to_vec(), value.to_vec()));
            }
        }
    }
    if sparse.numbers.len() > 2 * EXTENTS_MAX {
        return Err(TarError::Malformed("a sparse file has too many pieces"));
    }
    Ok(())
}

fn number(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(digits).ok()?.parse().ok()
}

/// `[-]SECONDS[.FRACTION]`; the fraction of a negative time counts downwards.
fn pax_time(text: &[u8]) -> Option<Mtime> {
    let text = std::str::from_utf8(text).ok()?;
    let (negative, text) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let (seconds, fraction) = text.split_once('.').unwrap_or((text, ""));
    let seconds = i64::try_from(number(seconds.as_bytes())?).ok()?;
    if !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let nanos: u32 = format!("{fraction:0<9.9}").parse().ok()?;
    Some(match (negative, nanos) {
        (false, nanos) => Mtime { seconds, nanos },
        (true, 0) => Mtime {
            seconds: -seconds,
            nanos: 0,
        },
        (true, nanos) => Mtime {
            seconds: -seconds - 1,
            nanos: 1_000_000_000 - nanos,
        },
    })
}

fn gnu_extents(headers: &[GnuSparseHeader], extents: &mut Vec<Extent>) -> Result<(), TarError> {
    for header in headers.iter().filter(|header| !header.is_empty()) {
        let bad = |_| TarError::Malformed("a sparse file's map is not made of numbers");
        extents.push(Extent {
            offset: header.offset().map_err(bad)?,
            length: header.length().map_err(bad)?,
        });
    }
    if extents.len() > EXTENTS_MAX {
        return Err(TarError::Malformed("a sparse file has too many pieces"));
    }
    Ok(())
}

fn extents_of(numbers: &[u64]) -> Result<Vec<Extent>, TarError> {
    let (pairs, rest) = numbers.as_chunks::<2>();
    if !rest.is_empty() {
        return Err(TarError::Malformed(
            "a sparse file's map has an odd number of numbers",
        ));
    }
    Ok(pairs
        .iter()
        .map(|[offset, length]| Extent {
            offset: *offset,
            length: *length,
        })
        .collect())
}

/// Pieces are in order, apart, inside the file, and together as long as what is stored.
fn check_extents(extents: &[Extent], stored: u64, real: u64) -> Result<(), TarError> {
    let mut end = 0;
    let mut total = 0_u64;
    for extent in extents {
        let next = extent
            .offset
            .checked_add(extent.length)
            .filter(|next| *next <= real);
        let Some(next) = next.filter(|_| extent.offset >= end) else {
            return Err(TarError::Malformed(
                "a sparse file's pieces overlap or lie outside of it",
            ));
        };
        end = next;
        total += extent.length;
    }
    if total == stored {
        Ok(())
    } else {
        Err(TarError::Malformed(
            "a sparse file's map does not fit its data",
        ))
    }
}

#[cfg(test)]
#[path = "tar_stream/tests.rs"]
mod tests;
