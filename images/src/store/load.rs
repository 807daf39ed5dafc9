//! Side-loading: images out of a file, for devices that reach no registry.

use std::collections::BTreeSet;
use std::io::Read;
use std::path::Path;

use super::origin::Origin;
use super::select::select;
use super::staging::Staging;
use super::{Progress, StageError, StagedImage, Store, io_error};
use crate::blobs::BlobDir;
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

impl Store {
    /// Makes every image of an archive that runs on `platform` ready to be mounted, and pins it. A release that names an
    /// image by the same digest then needs no registry. Needs room for the archive and what it unpacks to; may be killed at
    /// any point and called again.
    ///
    /// # Errors
    /// [`LoadError`]. Images of the archive that were ready before the error stay, pinned.
    pub fn load(
        &self,
        archive: Archive<'_>,
        platform: &Platform,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Vec<LoadedImage>, LoadError> {
        let _lock = self.lock()?;
        self.sweep()?;
        let tmp = self.blobs.tmp();
        let dir = tempfile::Builder::new()
            .prefix("load-")
            .tempdir_in(tmp)
            .map_err(|source| io_error("create a directory in", tmp, source))?;
        let blobs = BlobDir::open(dir.path())
            .map_err(|source| io_error("create a directory in", dir.path(), source))?;
        let limits = ImportLimits {
            bytes_max: self.room()?.spare_bytes(),
            entries_max: ENTRIES_MAX,
        };
        let imported = match archive {
            Archive::Path(path) => import_path(path, &blobs, &limits)?,
            Archive::Stream(stream) => import_archive(stream, &blobs, &limits)?,
        };
        let mut done = BTreeSet::new();
        let mut loaded = Vec::new();
        for found in imported {
            let reference = reference(found.name.as_deref(), found.digest);
            if done.insert(found.digest) {
                self.load_one(&blobs, &reference, platform, progress)?;
                self.pin(&found.digest)?;
            }
            let image = self.staged(&found.digest).ok_or_else(|| {
                let gone = std::io::Error::other("the image is not there after it was loaded");
                io_error("read back", &self.image_path(&found.digest), gone)
            })?;
            loaded.push(LoadedImage {
                name: found.name,
                image,
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
        if self.staged(&digest).is_some() {
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
