//! [`BlobDir`]: a directory of blobs named by their digest, `blobs/sha256/HEX`.
//!
//! A blob appears under its name only after its size and SHA-256 were checked and it was flushed to disk,
//! by rename; so what is there is whole. Shared by the device's store and the hub's registry endpoint.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use foreshore_killpoint as killpoint;
use sha2::{Digest as _, Sha256};
use tempfile::NamedTempFile;

use crate::Digest;

/// How long a process that was killed may take to end, when its disk is slow.
const DYING: Duration = Duration::from_secs(10);

/// Blobs under `ROOT/blobs/sha256/`, with `ROOT/tmp/` for what is on its way in.
///
/// Any number of readers and writers, in any number of processes, may use one directory at once.
#[derive(Debug, Clone)]
pub struct BlobDir {
    blobs: PathBuf,
    tmp: PathBuf,
}

/// A blob on its way in: bytes are hashed and counted as they are written.
///
/// Dropped without [`commit`](Self::commit), it leaves nothing behind; after a power loss its file is under
/// `tmp/` until the owner of the directory sweeps that.
#[derive(Debug)]
pub struct BlobWriter {
    file: BufWriter<NamedTempFile>,
    hasher: Sha256,
    size: u64,
    blobs: PathBuf,
}

impl BlobDir {
    /// Opens the directory, creating it if needed.
    ///
    /// # Errors
    /// Any error of creating the directories.
    pub fn open(root: &Path) -> io::Result<Self> {
        let dir = Self {
            blobs: root.join("blobs/sha256"),
            tmp: root.join("tmp"),
        };
        fs::create_dir_all(&dir.blobs)?;
        fs::create_dir_all(&dir.tmp)?;
        Ok(dir)
    }

    /// Where a blob is, or would be.
    #[must_use]
    pub fn path(&self, digest: &Digest) -> PathBuf {
        self.blobs.join(digest.hex())
    }

    /// The size of a blob in bytes; `None` if it is not here.
    #[must_use]
    pub fn size(&self, digest: &Digest) -> Option<u64> {
        fs::symlink_metadata(self.path(digest))
            .ok()
            .filter(fs::Metadata::is_file)
            .map(|meta| meta.len())
    }

    /// Opens a blob for reading, with its size in bytes; `None` if it is not here.
    ///
    /// The content is what was checked when it came in; it is not hashed again.
    ///
    /// # Errors
    /// Any error of opening the file other than that it is not there.
    pub fn open_blob(&self, digest: &Digest) -> io::Result<Option<(File, u64)>> {
        match File::open(self.path(digest)) {
            Ok(file) => {
                let size = file.metadata()?.len();
                Ok(Some((file, size)))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Reads a whole blob of at most `max` bytes and checks its digest again; `None` if it is not here,
    /// longer, or no longer what its name says.
    ///
    /// # Errors
    /// Any error of reading the file.
    pub fn read(&self, digest: &Digest, max: u64) -> io::Result<Option<Vec<u8>>> {
        let Some((file, size)) = self.open_blob(digest)? else {
            return Ok(None);
        };
        if size > max {
            return Ok(None);
        }
        let mut bytes = Vec::new();
        file.take(max).read_to_end(&mut bytes)?;
        Ok((Digest::of(&bytes) == *digest).then_some(bytes))
    }

    /// Whether a blob is here, has `size` bytes and still hashes to its name. Reads the whole file.
    ///
    /// # Errors
    /// Any error of reading the file.
    pub fn verify(&self, digest: &Digest, size: u64) -> io::Result<bool> {
        match self.open_blob(digest)? {
            Some((mut file, found)) if found == size => Ok(digest_of(&mut file)? == *digest),
            _ => Ok(false),
        }
    }

    /// Starts a new blob.
    ///
    /// # Errors
    /// Any error of creating the temporary file.
    pub fn writer(&self) -> io::Result<BlobWriter> {
        Ok(BlobWriter {
            file: BufWriter::with_capacity(64 << 10, NamedTempFile::new_in(&self.tmp)?),
            hasher: Sha256::new(),
            size: 0,
            blobs: self.blobs.clone(),
        })
    }

    /// Stores `bytes` under their digest.
    ///
    /// # Errors
    /// Any error of writing, flushing or renaming the file.
    pub fn put(&self, bytes: &[u8]) -> io::Result<Digest> {
        let mut writer = self.writer()?;
        writer.write_all(bytes)?;
        writer.commit()
    }

    /// Removes a blob; nothing happens if it is not here.
    ///
    /// # Errors
    /// Any other error of removing the file.
    pub fn remove(&self, digest: &Digest) -> io::Result<()> {
        match fs::remove_file(self.path(digest)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => {
                killpoint::reached("blob", "removed");
                Ok(())
            }
        }
    }

    /// Every blob that is here.
    ///
    /// # Errors
    /// Any error of reading the directory.
    pub fn list(&self) -> io::Result<BTreeSet<Digest>> {
        let mut found = BTreeSet::new();
        for entry in fs::read_dir(&self.blobs)? {
            if let Some(name) = entry?.file_name().to_str()
                && let Ok(digest) = format!("sha256:{name}").parse()
            {
                found.insert(digest);
            }
        }
        Ok(found)
    }

    /// Removes every blob that is not in `keep` and returns how many bytes that freed.
    ///
    /// The caller must know that nothing is being imported meanwhile: a blob whose image is not yet complete
    /// is in nobody's `keep`.
    ///
    /// # Errors
    /// Any error of reading the directory or removing a file.
    pub fn retain(&self, keep: &BTreeSet<Digest>) -> io::Result<u64> {
        let mut freed = 0;
        for digest in self.list()?.difference(keep) {
            freed += self.size(digest).unwrap_or(0);
            self.remove(digest)?;
        }
        Ok(freed)
    }

    /// Removes what interrupted writers left under `tmp/`. The caller must know that there is no live one.
    ///
    /// # Errors
    /// Any error of reading the directory or removing a file.
    pub fn sweep(&self) -> io::Result<()> {
        for entry in fs::read_dir(&self.tmp)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                remove_tree(&entry.path())?;
            } else {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }

    /// The directory for what is on its way in.
    pub(crate) fn tmp(&self) -> &Path {
        &self.tmp
    }
}

impl BlobWriter {
    /// Bytes written so far.
    #[must_use]
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// The digest of the bytes written so far.
    #[must_use]
    pub fn digest(&self) -> Digest {
        Digest::from_bytes(self.hasher.clone().finalize().into())
    }

    /// Flushes the bytes to disk and gives them their name, the digest that is returned. The caller compares
    /// it, or [`digest`](Self::digest) before, with what it expects.
    ///
    /// # Errors
    /// Any error of writing, flushing or renaming; the blob is not there then.
    pub fn commit(self) -> io::Result<Digest> {
        let digest = self.digest();
        let file = self
            .file
            .into_inner()
            .map_err(io::IntoInnerError::into_error)?;
        killpoint::reached("blob", "written");
        file.as_file().sync_all()?;
        killpoint::reached("blob", "synced");
        let path = self.blobs.join(digest.hex());
        file.persist(&path).map_err(|error| error.error)?;
        killpoint::reached("blob", "renamed");
        sync_dir(&self.blobs)?;
        killpoint::reached("blob", "durable");
        Ok(digest)
    }
}

impl Write for BlobWriter {
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

/// The digest of everything that `reader` still holds.
pub(crate) fn digest_of(reader: &mut dyn Read) -> io::Result<Digest> {
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 64 << 10];
    loop {
        match reader.read(&mut buffer) {
            Ok(0) => return Ok(Digest::from_bytes(hasher.finalize().into())),
            Ok(count) => hasher.update(&buffer[..count]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Removes a directory and all in it. Something may still be written there for a moment, by a process that is being killed: then
/// once more, for a while.
pub(crate) fn remove_tree(path: &Path) -> io::Result<()> {
    let until = Instant::now() + DYING;
    loop {
        match fs::remove_dir_all(path) {
            Err(error)
                if error.kind() == io::ErrorKind::DirectoryNotEmpty && Instant::now() < until =>
            {
                std::thread::sleep(Duration::from_millis(10));
            }
            done => return done,
        }
    }
}

/// Makes renames in a directory durable.
pub(crate) fn sync_dir(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// Writes a small file so that after a power loss there is the old content or the new, never a mixture. Kill points
/// call it `object`.
pub(crate) fn write_atomic(path: &Path, tmp: &Path, object: &str, bytes: &[u8]) -> io::Result<()> {
    let mut file = NamedTempFile::new_in(tmp)?;
    killpoint::torn(object, "torn", bytes, |half| file.write_all(half));
    file.write_all(bytes)?;
    killpoint::reached(object, "written");
    file.as_file().sync_all()?;
    killpoint::reached(object, "synced");
    file.persist(path).map_err(|error| error.error)?;
    killpoint::reached(object, "renamed");
    path.parent().map_or(Ok(()), sync_dir)?;
    killpoint::reached(object, "durable");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_blob_appears_whole_or_not_at_all() {
        let root = tempfile::tempdir().unwrap();
        let dir = BlobDir::open(root.path()).unwrap();
        let mut dropped = dir.writer().unwrap();
        dropped.write_all(b"half").unwrap();
        drop(dropped);
        assert_eq!(dir.list().unwrap(), BTreeSet::new());
        assert_eq!(
            fs::read_dir(dir.tmp()).unwrap().count(),
            0,
            "a dropped writer leaves nothing"
        );

        let digest = dir.put(b"whole").unwrap();
        assert_eq!(digest, Digest::of(b"whole"));
        assert_eq!(dir.size(&digest), Some(5));
        assert_eq!(
            dir.read(&digest, 5).unwrap().as_deref(),
            Some(&b"whole"[..])
        );
        assert_eq!(dir.read(&digest, 4).unwrap(), None, "longer than asked for");
        assert!(dir.verify(&digest, 5).unwrap());
        assert!(!dir.verify(&digest, 6).unwrap());

        fs::write(dir.path(&digest), b"rotte").unwrap();
        assert_eq!(
            dir.read(&digest, 5).unwrap(),
            None,
            "no longer what its name says"
        );
        assert!(!dir.verify(&digest, 5).unwrap());
    }

    #[test]
    fn what_is_still_written_to_is_swept_when_that_ends() {
        let root = tempfile::tempdir().unwrap();
        let dir = BlobDir::open(root.path()).unwrap();
        let busy = dir.tmp().join("layer/tree");
        fs::create_dir_all(&busy).unwrap();
        std::thread::scope(|scope| {
            let (first, written) = std::sync::mpsc::channel();
            let busy = &busy;
            scope.spawn(move || {
                let mut until = None;
                // Until the time is over or the directory gone.
                for n in 0.. {
                    if until.is_some_and(|until| Instant::now() > until)
                        || File::create(busy.join(n.to_string())).is_err()
                    {
                        break;
                    }
                    if n == 100 {
                        until = Some(Instant::now() + Duration::from_millis(300));
                        first.send(()).unwrap();
                    }
                }
            });
            written.recv().unwrap();
            dir.sweep().unwrap();
        });
        assert_eq!(fs::read_dir(dir.tmp()).unwrap().count(), 0);
    }

    #[test]
    fn retain_removes_the_rest() {
        let root = tempfile::tempdir().unwrap();
        let dir = BlobDir::open(root.path()).unwrap();
        let keep = BTreeSet::from([dir.put(b"a").unwrap()]);
        dir.put(b"bb").unwrap();
        assert_eq!(dir.retain(&keep).unwrap(), 2);
        assert_eq!(dir.list().unwrap(), keep);
    }
}
