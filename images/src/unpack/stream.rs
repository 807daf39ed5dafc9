//! The way of a layer from its blob to the unpacker: counted, inflated, hashed, and stopped when it is a bomb.

use std::io::{self, BufReader, Read};
use std::sync::atomic::{AtomicU64, Ordering};

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
    let consumed = AtomicU64::new(0);
    let counted = Counted::new(blob, &consumed);
    let inflated = decompress(BufReader::with_capacity(64 << 10, counted)).map_err(&bad)?;
    let mut guarded = Guarded::new(inflated, &consumed, stream_bytes_max, shortage);
    let done = unpack(&mut guarded)?;
    // The diff id covers what stands behind the archive's end, usually zeros.
    io::copy(&mut guarded, &mut io::sink()).map_err(&bad)?;
    Ok((done, guarded.digest()))
}

/// Counts what is taken from the blob.
pub(crate) struct Counted<'c, R> {
    inner: R,
    consumed: &'c AtomicU64,
}

impl<'c, R> Counted<'c, R> {
    pub(crate) const fn new(inner: R, consumed: &'c AtomicU64) -> Self {
        Self { inner, consumed }
    }
}

impl<R: Read> Read for Counted<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.consumed.fetch_add(count as u64, Ordering::Relaxed);
        Ok(count)
    }
}

/// Hashes and bounds what comes out.
pub(crate) struct Guarded<'c, R> {
    inner: R,
    /// Of the blob, by now.
    consumed: &'c AtomicU64,
    produced: u64,
    max: u64,
    shortage: &'c dyn Fn() -> Option<Shortage>,
    /// What was produced when the disk was last looked at.
    looked: u64,
    hasher: Sha256,
}

impl<'c, R> Guarded<'c, R> {
    /// Nothing has been read of either.
    pub(crate) fn new(
        inner: R,
        consumed: &'c AtomicU64,
        max: u64,
        shortage: &'c dyn Fn() -> Option<Shortage>,
    ) -> Self {
        Self {
            inner,
            consumed,
            produced: 0,
            max,
            shortage,
            looked: 0,
            hasher: Sha256::new(),
        }
    }

    /// Of all that came out.
    pub(crate) fn digest(self) -> Digest {
        Digest::from_bytes(self.hasher.finalize().into())
    }
}

impl<R: Read> Read for Guarded<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.produced += count as u64;
        if self.produced > self.max {
            return Err(io::Error::other(Bomb::Length(self.max)));
        }
        if self.produced > FREE_BYTES
            && self.produced / RATIO_MAX > self.consumed.load(Ordering::Relaxed)
        {
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
pub(crate) fn bomb<'e>(error: &'e (dyn std::error::Error + 'static)) -> Option<&'e Bomb> {
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
