//! Where the files of a layer stand in its tar stream, as the unpacker would read it.

use std::cell::Cell;
use std::io::{self, Read};

use crate::tar_stream::{Kind, TarStream};
use crate::unpack::clean;

/// An entry of a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Clean, without a slash in front.
    pub path: Vec<u8>,
    /// What it is.
    pub what: What,
}

/// What an entry is, as far as deltas care.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum What {
    /// A regular file whose bytes stand in one piece.
    File {
        /// The first of them in the stream.
        offset: u64,
        /// How many.
        size: u64,
    },
    /// Another name of an earlier file of the layer.
    HardLink {
        /// Clean.
        to: Vec<u8>,
    },
    /// A symbolic link.
    Symlink,
    /// A directory.
    Directory,
    /// Nothing of which a file's bytes could be taken.
    Other,
}

/// The entries of an uncompressed layer in order. What stands behind a fault of the archive is not among them, nor are
/// whiteouts and entries that no unpacker would take.
///
/// # Errors
/// Those of reading the stream.
pub fn contents(layer: impl Read) -> io::Result<Vec<Found>> {
    let passed = Cell::new(0);
    let failed = Cell::new(None);
    let mut stream = TarStream::new(Watched {
        inner: layer,
        passed: &passed,
        failed: &failed,
    });
    let mut found = Vec::new();
    while let Ok(Some(entry)) = stream.next() {
        let Some(path) = path(&entry.path) else {
            continue;
        };
        let what = match entry.kind {
            Kind::File if entry.extents.is_none() => What::File {
                offset: passed.get(),
                size: entry.size,
            },
            Kind::HardLink => match self::path(&entry.link) {
                Some(to) => What::HardLink { to },
                None => What::Other,
            },
            Kind::Symlink => What::Symlink,
            Kind::Directory => What::Directory,
            _ => What::Other,
        };
        found.push(Found { path, what });
    }
    match failed.take() {
        Some(error) => Err(error),
        None => Ok(found),
    }
}

fn path(written: &[u8]) -> Option<Vec<u8>> {
    let components = clean(written).ok()?;
    let name = components.last()?;
    (!name.starts_with(b".wh.")).then(|| components.join(&b'/'))
}

/// Counts what passes and keeps what failed.
struct Watched<'w, R> {
    inner: R,
    passed: &'w Cell<u64>,
    failed: &'w Cell<Option<io::Error>>,
}

impl<R: Read> Read for Watched<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.inner.read(buffer) {
            Ok(count) => {
                self.passed.set(self.passed.get() + count as u64);
                Ok(count)
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Err(error),
            Err(error) => {
                let other = io::Error::from(error.kind());
                self.failed.set(Some(error));
                Err(other)
            }
        }
    }
}
