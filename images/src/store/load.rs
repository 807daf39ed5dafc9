//! Side-loading: images out of a file, for devices that reach no registry.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;

use super::origin::Origin;
use super::select::select;
use super::staging::Staging;
use super::{Progress, StageError, StagedImage, Store, io_error};
use crate::blobs::{BlobDir, remove_tree};
use crate::layout::{ImportError, ImportLimits, import_archive, import_path};
use crate::{Digest, Fault, Platform, Reference};

/// The most entries an archive may have.
const ENTRIES_MAX: usize = 10_000;

/// What [`Store::load`] reads.
#[expect(missing_debug_implementations, reason = "a stream has none")]
pub enum Archive<'a> {
    /// An OCI layout directory, an OCI archive or a docker-archive.
    Path(&'a Path),
    /// The bytes of an archive.
    Stream(&'a mut dyn Read),
}

/// One image that was loaded. It is pinned: only [`Store::unpin`] makes it one that is collected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoadedImage {
    /// What the archive calls it; with several names it comes several times.
    pub name: Option<String>,
    /// Ready to be started.
    pub image: StagedImage,
    /// How many signatures of it are kept, right or wrong: the policy is asked when a release names the image.
    pub signatures: usize,
}

/// Why an archive was not loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// It cannot be used.
    #[error("the archive cannot be used")]
    Import(#[from] ImportError),
    /// It cannot be unpacked on this device.
    #[error("an image of the archive cannot be used on this device")]
    Stage(#[from] StageError),
}

impl LoadError {
    /// Which class it falls into.
    #[must_use]
    pub fn fault(&self) -> Fault {
        match self {
            Self::Import(error) => error.fault(),
            Self::Stage(error) => error.fault(),
        }
    }
}

/// A directory of its own for an archive that is read in. Its lock says that somebody does; it goes when this is dropped, and is
/// swept when nobody holds that.
struct Loading {
    dir: tempfile::TempDir,
    _lock: File,
}

impl Loading {
    fn new(parent: &Path) -> io::Result<Self> {
        loop {
            let dir = tempfile::Builder::new()
                .prefix("load-")
                .tempdir_in(parent)?;
            let lock = match File::open(dir.path()) {
                Ok(file) if is_locked_by(&file)? && is_at(&file, dir.path()) => file,
                // Swept between being made and being locked.
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => continue,
            };
            return Ok(Self { dir, _lock: lock });
        }
    }
}

/// Takes the lock; false when somebody else has it.
fn is_locked_by(dir: &File) -> io::Result<bool> {
    match rustix::fs::flock(dir, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(true),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

/// Whether it still has its name.
fn is_at(dir: &File, path: &Path) -> bool {
    let own = dir.metadata().map(|meta| (meta.dev(), meta.ino()));
    let named = fs::metadata(path).map(|meta| (meta.dev(), meta.ino()));
    matches!((own, named), (Ok(own), Ok(named)) if own == named)
}

impl Store {
    fn loading_path(&self) -> PathBuf {
        self.root.join("loading")
    }

    /// Removes what is left of archives that nobody reads any more.
    pub(super) fn sweep_loading(&self) -> Result<(), StageError> {
        let parent = self.loading_path();
        let sweep = || -> io::Result<()> {
            for entry in fs::read_dir(&parent)? {
                let path = entry?.path();
                let dir = match File::open(&path) {
                    Ok(dir) => dir,
                    Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                    Err(error) => return Err(error),
                };
                if is_locked_by(&dir)? {
                    remove_tree(&path)?;
                }
            }
            Ok(())
        };
        sweep().map_err(|source| io_error("sweep", &parent, source))
    }

    /// Makes every image of an archive that runs on `platform` ready to be mounted, and pins it. A release that names an
    /// image by the same digest then needs no registry. Needs room for the archive and what it unpacks to; may be killed at
    /// any point and called again. The store is locked only when all of the archive is there: reading a stream may take as long
    /// as it likes, and what it brings is given up when it would touch the reserve.
    ///
    /// # Errors
    /// [`LoadError`]. Images of the archive that were ready before the error stay, pinned.
    pub fn load(
        &self,
        archive: Archive<'_>,
        platform: &Platform,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Vec<LoadedImage>, LoadError> {
        let parent = self.loading_path();
        let loading = Loading::new(&parent)
            .map_err(|source| io_error("create a directory in", &parent, source))?;
        let blobs = BlobDir::open(loading.dir.path())
            .map_err(|source| io_error("create a directory in", loading.dir.path(), source))?;
        let room = self.room()?;
        let limits = ImportLimits {
            bytes_max: room.spare_bytes(),
            entries_max: ENTRIES_MAX,
            reserve_bytes: room.reserve_bytes,
        };
        let imported = match archive {
            Archive::Path(path) => import_path(path, &blobs, &limits)?,
            Archive::Stream(stream) => import_archive(stream, &blobs, &limits)?,
        };
        let _lock = self.lock()?;
        self.sweep()?;
        let mut done = BTreeSet::new();
        let mut loaded = Vec::new();
        for found in imported {
            let reference = reference(found.name.as_deref(), found.digest);
            if done.insert(found.digest) {
                self.load_one(&blobs, &reference, platform, progress)?;
                self.keep_attached(&found.digest, &blobs, &found.signatures)?;
                self.pin(&found.digest)?;
            }
            let image = self.staged(&found.digest).ok_or_else(|| {
                let gone = io::Error::other("the image is not there after it was loaded");
                io_error("read back", &self.image_path(&found.digest), gone)
            })?;
            loaded.push(LoadedImage {
                name: found.name,
                image,
                signatures: self.kept_signatures(&found.digest).len(),
            });
        }
        Ok(loaded)
    }

    fn load_one(
        &self,
        blobs: &BlobDir,
        reference: &Reference,
        platform: &Platform,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<(), StageError> {
        let digest = reference.digest().expect("it was made with one");
        if self.staged_sound(&digest).is_some() {
            return Ok(());
        }
        self.quarantine_image(&digest)?;
        let origin = Origin::Files(blobs);
        let selected = select(origin, reference, platform)?;
        Staging::new(self, origin, reference, &selected)?.run(progress)
    }
}

/// What errors call an image of an archive: by the name it has there, if that is one.
fn reference(name: Option<&str>, digest: Digest) -> Reference {
    let named = name.and_then(|name| Reference::parse(name).ok());
    let unnamed = || Reference::parse("archive").expect("it is a name");
    named.unwrap_or_else(unnamed).with_digest(digest)
}
