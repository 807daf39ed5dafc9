//! The way of a layer from its blob to the unpacker: counted, inflated, hashed, and stopped when it is a bomb.

use std::cell::Cell;
use std::io::{self, BufReader, Read};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::Digest;
use crate::compression::decompress;
use crate::room::Shortage;

/// A layer may inflate freely up to this many bytes; files of zeros do so 1000-fold.
const FREE_BYTES: u64 = 256 << 20;
/// Beyond [`FREE_BYTES`] a layer may be at most this many times as long as its blob.
const RATIO_MAX: u64 = 200;

/// Why a stream was stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Bomb {
    /// Its compression is too good to be true.
    #[error(
        "it inflates more than {RATIO_MAX}-fold beyond {FREE_BYTES} bytes, as only a decompression bomb does"
    )]
    Ratio,
    /// More bytes than these were left for it.
    #[error("its uncompressed stream is longer than the {0} bytes that are left for this image")]
    Length(u64),
    /// The disk has no room for more.
    #[error("the disk has no room for more of it: {0}")]
    Room(Shortage),
}

/// How much of a stream passes between two looks at the disk: so many bytes, or 128 empty files.
const LOOK_BYTES: u64 = 64 << 10;

/// Inflates the blob and hands the stream to `unpack`, then reads what is left of it; returns what `unpack` made
/// and the digest of the whole stream.
///
/// # Errors
/// `unpack`'s own, or through `bad` an I/O error: with an OS error code if the disk failed, without if the
/// stream is bad.
pub(super) fn with_layer<T, E>(
    blob: impl Read,
    stream_bytes_max: u64,
    shortage: &dyn Fn() -> Option<Shortage>,
    unpack: impl FnOnce(&mut dyn Read) -> Result<T, E>,
    bad: impl Fn(io::Error) -> E,
) -> Result<(T, Digest), E> {
    let consumed = Cell::new(0);
    let counted = Counted {
        inner: blob,
        consumed: &consumed,
    };
    let inflated = decompress(BufReader::with_capacity(64 << 10, counted)).map_err(&bad)?;
    let mut guarded = Guarded {
        inner: inflated,
        consumed: &consumed,
        produced: 0,
        max: stream_bytes_max,
        shortage,
        looked: 0,
        hasher: Sha256::new(),
    };
    let done = unpack(&mut guarded)?;
    // The diff id covers what stands behind the archive's end, usually zeros.
    io::copy(&mut guarded, &mut io::sink()).map_err(&bad)?;
    Ok((done, Digest::from_bytes(guarded.hasher.finalize().into())))
}

/// Counts what is taken from the blob.
struct Counted<'c, R> {
    inner: R,
    consumed: &'c Cell<u64>,
}

impl<R: Read> Read for Counted<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.consumed.set(self.consumed.get() + count as u64);
        Ok(count)
    }
}

/// Hashes and bounds what comes out.
struct Guarded<'c, R> {
    inner: R,
    consumed: &'c Cell<u64>,
    produced: u64,
    max: u64,
    shortage: &'c dyn Fn() -> Option<Shortage>,
    /// What was produced when the disk was last looked at.
    looked: u64,
    hasher: Sha256,
}

impl<R: Read> Read for Guarded<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.produced += count as u64;
        if self.produced > self.max {
            return Err(io::Error::other(Bomb::Length(self.max)));
        }
        if self.produced > FREE_BYTES && self.produced / RATIO_MAX > self.consumed.get() {
            return Err(io::Error::other(Bomb::Ratio));
        }
        if self.produced - self.looked >= LOOK_BYTES {
            self.looked = self.produced;
            if let Some(shortage) = (self.shortage)() {
                return Err(io::Error::other(Bomb::Room(shortage)));
            }
        }
        self.hasher.update(&buffer[..count]);
        Ok(count)
    }
}

/// Finds what stopped a stream, however it was wrapped on its way up.
pub(super) fn bomb<'e>(error: &'e (dyn std::error::Error + 'static)) -> Option<&'e Bomb> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(bomb) = error.downcast_ref::<Bomb>() {
            return Some(bomb);
        }
        let inside = error
            .downcast_ref::<io::Error>()
            .and_then(io::Error::get_ref);
        next = match inside {
            Some(inside) => Some(inside as &(dyn std::error::Error + 'static)),
            None => error.source(),
        };
    }
    None
}
