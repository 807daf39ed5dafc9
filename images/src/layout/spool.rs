//! [`Spool`]: an archive's files on disk, by name and by digest.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufReader, Read, Write};

use tempfile::TempDir;

use super::{ImportError, ImportLimits};
use crate::blobs::{BlobDir, BlobWriter, sync_dir};
use crate::compression::decompress;
use crate::tar_stream::{Entry, Kind, TarError, TarStream};
use crate::{Digest, Room};

/// Links followed from one name to a file.
const LINKS_MAX: usize = 8;
/// The longest name that is kept, in bytes.
const NAME_BYTES_MAX: usize = 4096;
/// How much is written between two looks at the disk.
const LOOK_BYTES: u64 = 1 << 20;

/// The files of one archive. They vanish with this value, but for those that were adopted.
pub(super) struct Spool {
    blobs: BlobDir,
    files: BTreeMap<String, Digest>,
    links: BTreeMap<String, String>,
    _dir: TempDir,
}

impl Spool {
    /// Reads the whole archive.
    pub(super) fn fill(
        archive: &mut dyn Read,
        blobs: &BlobDir,
        limits: &ImportLimits,
    ) -> Result<Self, ImportError> {
        let io = |source| ImportError::io("spool the archive in", blobs.tmp(), source);
        let dir = tempfile::Builder::new()
            .prefix("import-")
            .tempdir_in(blobs.tmp())
            .map_err(io)?;
        let mut spool = Self {
            blobs: BlobDir::open(dir.path()).map_err(io)?,
            files: BTreeMap::new(),
            links: BTreeMap::new(),
            _dir: dir,
        };
        let inflated = decompress(BufReader::with_capacity(64 << 10, archive))
            .map_err(|source| ImportError::Archive(Box::new(source)))?;
        // One byte more than allowed tells an archive that is too long from one that ends.
        let mut bounded = inflated.take(limits.bytes_max.saturating_add(1));
        let read = spool.read(&mut bounded, limits);
        if bounded.limit() == 0 {
            return Err(ImportError::TooLarge {
                max: limits.bytes_max,
            });
        }
        read.map(|()| spool)
    }

    fn read(&mut self, archive: &mut dyn Read, limits: &ImportLimits) -> Result<(), ImportError> {
        let mut stream = TarStream::new(archive);
        let mut entries = 0;
        while let Some(entry) = stream
            .next()
            .map_err(|error| ImportError::Archive(Box::new(error)))?
        {
            entries += 1;
            if entries > limits.entries_max {
                return Err(ImportError::TooManyEntries {
                    max: limits.entries_max,
                });
            }
            let Some(name) = clean(&entry.path) else {
                continue;
            };
            match entry.kind {
                Kind::File => self.file(name, &entry, &mut stream, limits)?,
                Kind::HardLink => self.link(name, clean(&entry.link)),
                Kind::Symlink => {
                    let target = beside(&name, &entry.link);
                    self.link(name, target);
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn file(
        &mut self,
        name: String,
        entry: &Entry,
        data: &mut dyn Read,
        limits: &ImportLimits,
    ) -> Result<(), ImportError> {
        if entry.extents.is_some() {
            return Err(ImportError::Archive(Box::new(TarError::Malformed(
                "an image archive has no sparse files",
            ))));
        }
        let mut writer = self.writer()?;
        let mut buffer = vec![0; 64 << 10];
        let mut looked = 0;
        self.look(limits)?;
        loop {
            if writer.size() - looked >= LOOK_BYTES {
                looked = writer.size();
                self.look(limits)?;
            }
            match data.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => writer
                    .write_all(&buffer[..count])
                    .map_err(|source| self.write_error(source))?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(ImportError::Archive(Box::new(error))),
            }
        }
        let digest = self.commit(writer)?;
        if let Some(named) = name
            .strip_prefix("blobs/sha256/")
            .and_then(|hex| format!("sha256:{hex}").parse().ok())
            && named != digest
        {
            return Err(ImportError::DigestMismatch {
                digest: named,
                found: digest,
            });
        }
        self.links.remove(&name);
        self.files.insert(name, digest);
        Ok(())
    }

    /// Fails like a full disk when the reserve would be touched.
    fn look(&self, limits: &ImportLimits) -> Result<(), ImportError> {
        if limits.reserve_bytes == 0 {
            return Ok(());
        }
        match Room::of(self.blobs.tmp(), Some(limits.reserve_bytes)) {
            Ok(room) if !room.is_enough() => Err(self.write_error(rustix::io::Errno::NOSPC.into())),
            _ => Ok(()),
        }
    }

    fn link(&mut self, name: String, target: Option<String>) {
        if let Some(target) = target {
            self.files.remove(&name);
            self.links.insert(name, target);
        }
    }

    /// The digest of a file, links followed.
    pub(super) fn digest_of(&self, name: &str) -> Option<Digest> {
        let mut name = clean(name.as_bytes())?;
        for _ in 0..=LINKS_MAX {
            if let Some(digest) = self.files.get(&name) {
                return Some(*digest);
            }
            name = self.links.get(&name)?.clone();
        }
        None
    }

    /// The content of a file of at most `max` bytes; `None` if it is not there.
    pub(super) fn small(&self, name: &str, max: u64) -> Result<Option<Vec<u8>>, ImportError> {
        let Some(digest) = self.digest_of(name) else {
            return Ok(None);
        };
        match self.open(&digest)? {
            Some((_, size)) if size > max => Err(ImportError::TooLarge { max }),
            _ => self
                .blobs
                .read(&digest, max)
                .map_err(|source| ImportError::io("read", &self.blobs.path(&digest), source)),
        }
    }

    pub(super) fn open(&self, digest: &Digest) -> Result<Option<(File, u64)>, ImportError> {
        self.blobs
            .open_blob(digest)
            .map_err(|source| ImportError::io("open", &self.blobs.path(digest), source))
    }

    pub(super) fn writer(&self) -> Result<BlobWriter, ImportError> {
        self.blobs
            .writer()
            .map_err(|source| self.write_error(source))
    }

    pub(super) fn commit(&self, writer: BlobWriter) -> Result<Digest, ImportError> {
        writer.commit().map_err(|source| self.write_error(source))
    }

    pub(super) fn put(&self, bytes: &[u8]) -> Result<Digest, ImportError> {
        self.blobs
            .put(bytes)
            .map_err(|source| self.write_error(source))
    }

    pub(super) fn write_error(&self, source: io::Error) -> ImportError {
        ImportError::io("spool the archive in", self.blobs.tmp(), source)
    }

    /// Moves a blob, hashed and flushed before, to where it stays; one that was moved already stays there.
    pub(super) fn adopt(&self, digest: &Digest, blobs: &BlobDir) -> io::Result<()> {
        let target = blobs.path(digest);
        fs::rename(self.blobs.path(digest), &target)?;
        target.parent().map_or(Ok(()), sync_dir)
    }
}

/// `./a//b` as `a/b`; `None` for what leaves the archive, is too long or not UTF-8: no image archive has such.
fn clean(path: &[u8]) -> Option<String> {
    if path.len() > NAME_BYTES_MAX {
        return None;
    }
    let mut parts: Vec<&str> = Vec::new();
    for part in std::str::from_utf8(path).ok()?.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()?),
            part => parts.push(part),
        }
    }
    (!parts.is_empty()).then(|| parts.join("/"))
}

/// A symbolic link's target, seen from where the link stands.
fn beside(name: &str, target: &[u8]) -> Option<String> {
    let directory = name.rsplit_once('/').map_or("", |(directory, _)| directory);
    clean(&[directory.as_bytes(), b"/", target].concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        assert_eq!(
            clean(b"./blobs//sha256/x").as_deref(),
            Some("blobs/sha256/x")
        );
        assert_eq!(clean(b"a/../b").as_deref(), Some("b"));
        for none in [&b"../x"[..], b"", b".", b"/", b"\xff"] {
            assert_eq!(clean(none), None);
        }
        assert_eq!(
            beside("id/layer.tar", b"../other/layer.tar").as_deref(),
            Some("other/layer.tar")
        );
        assert_eq!(beside("layer.tar", b"../../etc/passwd"), None);
    }
}
