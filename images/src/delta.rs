//! Deltas: the tar stream of a new layer, made of files that were unpacked from old ones and of little besides.
//!
//! A delta is a [sequence of operations](mod@format) that produce the uncompressed stream of a layer byte for byte: bytes
//! that stand in the delta, zeros, parts of old files, and parts that zstd packed with an old file in front of them. What
//! comes out is hashed and compared with the layer's diff id as in any pull, and unpacked by the same unpacker; a delta
//! is believed no more than a blob. Memory is bounded by [`format::PATCH_MAX`] and [`format::PLAN_MAX`] whatever the
//! size of files: larger ones are patched piece by piece.
//!
//! In a registry a delta is an [artifact](artifact) that refers to the new image.

pub mod artifact;
mod blocks;
pub mod contents;
pub mod format;
mod sources;

use std::io::{self, Read};
use std::path::PathBuf;

use blocks::Blocks;
use format::{Effort, MAGIC, Operation, PACKED_EXTRA, PLAN_MAX};
use sources::{At, Sources};

/// Beyond this many bytes what a delta makes without old files is bounded by its own length.
const FREE_BYTES: u64 = 256 << 20;
/// Beyond [`FREE_BYTES`] at most this many times as much as has been read of the delta.
const RATIO_MAX: u64 = 200;

/// Why a delta cannot be used. Never a reason to give up a layer: it can be had whole.
#[derive(Debug, thiserror::Error)]
pub enum DeltaError {
    /// It does not begin as one of this version.
    #[error("it is not a delta of this version")]
    Magic,
    /// It cannot be right.
    #[error("the delta has {0}")]
    Malformed(&'static str),
    /// It asks for more work than its output is worth.
    #[error("the delta asks for too much reading, or makes too much out of nothing")]
    Effort,
    /// Its zstd blocks are damaged.
    #[error("the delta cannot be unpacked")]
    Unpack(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The old file could not be read while it was leaned on.
    #[error("an old file cannot be read")]
    Old(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// An old file is not there, or not as it was when the delta was made.
    #[error("cannot use the old file \"{path}\"")]
    File {
        /// As the delta writes it, cut to 256 characters.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl From<DeltaError> for io::Error {
    /// Without an OS error code, as bad data is told from a bad disk.
    fn from(error: DeltaError) -> Self {
        Self::new(io::ErrorKind::InvalidData, error)
    }
}

/// Reads the new stream that a delta makes of old trees.
///
/// Nothing of it is known to be right before its digest is.
pub struct Rebuilt<R> {
    delta: Counted<R>,
    sources: Sources,
    blocks: Blocks,
    effort: Effort,
    plan: Vec<u8>,
    /// Where the next operation stands in the plan.
    at: usize,
    current: Current,
    /// Bytes that came of no old file.
    from_nothing: u64,
    begun: bool,
    failed: bool,
}

/// What the next bytes come from.
enum Current {
    Nothing,
    /// From here to there in the plan.
    Literal(usize, usize),
    Zeros(u64),
    Old(At, u64),
    Blocks,
}

impl<R> std::fmt::Debug for Rebuilt<R> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Rebuilt").finish_non_exhaustive()
    }
}

impl<R: Read> Rebuilt<R> {
    /// The stream that `delta` makes of the files in `trees`, directories of unpacked layers in the order that the
    /// delta numbers them.
    ///
    /// # Errors
    /// When a tree cannot be opened.
    pub fn new(delta: R, trees: &[PathBuf]) -> io::Result<Self> {
        Ok(Self {
            delta: Counted {
                inner: delta,
                count: 0,
            },
            sources: Sources::open(trees)?,
            blocks: Blocks::new(),
            effort: Effort::default(),
            plan: Vec::new(),
            at: 0,
            current: Current::Nothing,
            from_nothing: 0,
            begun: false,
            failed: false,
        })
    }

    /// Goes to the next group; false at the end of the delta.
    fn group(&mut self) -> io::Result<bool> {
        if !self.begun {
            let mut magic = [0; MAGIC.len()];
            exact(&mut self.delta, &mut magic)?;
            if magic != MAGIC {
                return Err(DeltaError::Magic.into());
            }
            self.begun = true;
        }
        let mut head = [0; 8];
        let first = loop {
            match self.delta.read(&mut head[..1]) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => break other?,
            }
        };
        if first == 0 {
            return Ok(false);
        }
        exact(&mut self.delta, &mut head[1..])?;
        let [a, b, c, d, e, f, g, h] = head;
        let length = usize::try_from(u32::from_le_bytes([a, b, c, d])).unwrap_or(usize::MAX);
        let packed = usize::try_from(u32::from_le_bytes([e, f, g, h])).unwrap_or(usize::MAX);
        if length == 0 || length > PLAN_MAX || packed > length + PACKED_EXTRA {
            return Err(DeltaError::Malformed("a plan over its limit").into());
        }
        self.blocks
            .unpack(io::empty(), 0, &mut self.delta, packed, length)?;
        self.plan.clear();
        self.plan.resize(length, 0);
        let mut read = 0;
        while read < length {
            match self.blocks.read(&mut self.plan[read..])? {
                0 => return Err(DeltaError::Malformed("a plan that is cut off").into()),
                count => read += count,
            }
        }
        self.at = 0;
        Ok(true)
    }

    /// Begins the next operation; false at the end of the delta.
    fn next(&mut self) -> io::Result<bool> {
        let before = self.at;
        let Some(operation) = format::read(&self.plan, &mut self.at)? else {
            return self.group();
        };
        debug_assert!(self.at > before, "an operation takes bytes");
        // What it makes of no old file, in bytes.
        let made = match operation {
            Operation::Literal(bytes) => {
                self.current = Current::Literal(self.at - bytes.len(), self.at);
                Some(bytes.len() as u64)
            }
            Operation::Zeros(length) => {
                self.current = Current::Zeros(length);
                Some(length)
            }
            Operation::Copy(old) => {
                if !self.effort.spend(0, old.length) {
                    return Err(DeltaError::Effort.into());
                }
                let file = self.sources.file(&old)?;
                let at = At {
                    file,
                    offset: old.offset,
                };
                self.current = Current::Old(at, old.length);
                None
            }
            Operation::Patch {
                old,
                length,
                packed,
            } => {
                if !self.effort.spend(old.length, length as u64) {
                    return Err(DeltaError::Effort.into());
                }
                let at = At {
                    file: self.sources.file(&old)?,
                    offset: old.offset,
                };
                let old_length = usize::try_from(old.length).unwrap_or(usize::MAX);
                let delta = &mut self.delta;
                self.blocks.unpack(at, old_length, delta, packed, length)?;
                self.current = Current::Blocks;
                None
            }
            Operation::Packed { length, packed } => {
                let delta = &mut self.delta;
                self.blocks.unpack(io::empty(), 0, delta, packed, length)?;
                self.current = Current::Blocks;
                Some(length as u64)
            }
        };
        if let Some(made) = made {
            self.effort.made(made);
            self.from_nothing = self.from_nothing.saturating_add(made);
            let earned = self.delta.count.saturating_mul(RATIO_MAX);
            if self.from_nothing > FREE_BYTES.saturating_add(earned) {
                return Err(DeltaError::Effort.into());
            }
        }
        Ok(true)
    }

    fn some(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let count = match &mut self.current {
                Current::Nothing => 0,
                Current::Literal(from, to) => {
                    let count = buffer.len().min(*to - *from);
                    buffer[..count].copy_from_slice(&self.plan[*from..*from + count]);
                    *from += count;
                    count
                }
                Current::Zeros(left) => {
                    let count = short(buffer.len(), *left);
                    buffer[..count].fill(0);
                    *left -= count as u64;
                    count
                }
                Current::Old(at, left) => {
                    let count = short(buffer.len(), *left);
                    let count = at
                        .read(&mut buffer[..count])
                        .map_err(|error| DeltaError::Old(error.into()))?;
                    if count == 0 && *left > 0 {
                        return Err(DeltaError::Old("it became shorter".into()).into());
                    }
                    *left -= count as u64;
                    count
                }
                Current::Blocks => self.blocks.read(buffer)?,
            };
            if count > 0 {
                return Ok(count);
            }
            self.current = Current::Nothing;
            if !self.next()? {
                return Ok(0);
            }
        }
    }
}

impl<R: Read> Read for Rebuilt<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        if self.failed {
            return Err(DeltaError::Malformed("an error before this").into());
        }
        let result = self.some(buffer);
        self.failed = result
            .as_ref()
            .is_err_and(|error| error.kind() != io::ErrorKind::Interrupted);
        result
    }
}

fn short(length: usize, left: u64) -> usize {
    usize::try_from(left).map_or(length, |left| left.min(length))
}

/// Fills `buffer`; an early end is the delta's fault.
fn exact(reader: &mut impl Read, buffer: &mut [u8]) -> io::Result<()> {
    reader.read_exact(buffer).map_err(|error| {
        if error.kind() == io::ErrorKind::UnexpectedEof {
            DeltaError::Malformed("an early end").into()
        } else {
            error
        }
    })
}

/// Counts what is read of the delta.
struct Counted<R> {
    inner: R,
    count: u64,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.count += count as u64;
        Ok(count)
    }
}
