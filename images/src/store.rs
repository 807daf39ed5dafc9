//! The images on a device: fetched, checked, unpacked, ready to be mounted by overlayfs.
//!
//! ```text
//! ROOT/                     mode 0700: setuid programs of images are nobody's to run
//!   lock                    flock(2): one process at a time stages or removes
//!   blobs/sha256/HEX        manifests and configs
//!   partial/HEX             what has come of a layer's blob; gone when it is unpacked
//!   loading/NAME/           an archive that is read in; whoever does that holds a lock on it
//!   pulling/HEX             the layers of an image that was begun: their blobs are kept
//!   layers/HEX/             one unpacked layer, by diff id or chain id (see below)
//!   layers/HEX.json         what came of unpacking it
//!   layers/HEX.ledger       what each of its files is, to find rot
//!   layers/HEX.surveyed     it has outlived a power cycle whole
//!   images/HEX.json         an image by the digest it was asked for: manifest and layers
//!   pins/HEX                an image that stays although no release names it
//!   refused/HEX             a delta that made nothing of use; until an image is there
//!   damaged/HEX             a layer that rot was found in; until its new tree is there
//!   quarantine/             what was damaged: trees until nobody runs from them, records for people to look at
//!   tmp/                    what is on its way; swept when nobody holds the lock
//! ```
//!
//! What stands under its name is whole: everything is made in `tmp/`, flushed and renamed. A layer is unpacked
//! once for all images that have it, under its diff id, unless it leans on other layers below it than it does
//! there (see [`crate::unpack`]); then it is unpacked again under its chain id (OCI image specification,
//! "Layer ChainID").

mod aside;
mod deltas;
mod error;
mod fetching;
mod fsck;
mod load;
mod look;
mod origin;
mod pull;
mod record;
mod select;
mod signed;
mod staging;
mod survey;
mod unpacker;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use foreshore_killpoint as killpoint;
use rustix::fs::FlockOperation;

pub use self::aside::Holders;
pub use self::deltas::{DELTAS_LOOKED_AT, DELTAS_WORTH_ASKING};
pub use self::error::StageError;
pub use self::fsck::{Findings, ImageFinding, LayerFinding, LayerState, Repair, Sources};
pub use self::load::{Archive, LoadError, LoadedImage};
pub use self::look::{FETCHED_AT_ONCE, LayerAhead, Look, look};
use self::origin::Origin;
use self::record::{ImageRecord, LayerRecord, PlacedLayer};
use self::select::select;
use self::staging::Staging;
pub use self::unpacker::Unpacker;
use crate::blobs::{BlobDir, remove_tree, sync_dir};
use crate::manifest::{
    CONFIG_BYTES_MAX, ConfigDocument, Document, ImageConfig, MANIFEST_BYTES_MAX, Manifest,
};
use crate::partial::PartialDir;
use crate::registry::Client;
use crate::{Digest, Platform, Reference, Room};

/// Limits of a [`Store`]. `Default` suits a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoreConfig {
    /// The most bytes one image may unpack to. Default 16 GiB; besides, never more than is free beside the reserve.
    pub unpacked_bytes_max: u64,
    /// Bytes of the file system that staging leaves free. Default: 5 % of it, at most 256 MiB.
    pub reserve_bytes: Option<u64>,
    /// How long [`Store::stage`] waits for another process that holds the store. Default 10 minutes.
    pub lock_wait: Duration,
    /// Keep setuid and setgid bits of files, and file capabilities. Default: no.
    pub keep_privileges: bool,
    /// A program that unpacks layers in this one's stead; `None` is this process itself.
    pub unpacker: Option<Unpacker>,
    /// Make layers of what is here, where the registry has a delta for that. Default: yes.
    pub deltas: bool,
}

/// Images under one directory. Cheap to open; several processes may have it open.
#[derive(Debug)]
pub struct Store {
    root: PathBuf,
    blobs: BlobDir,
    partials: PartialDir,
    config: StoreConfig,
}

/// An image that is wholly on this disk and ready to be mounted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StagedImage {
    /// The digest that was asked for, of an index or a manifest: what [`Store::staged`] and
    /// [`Store::remove_unused`] know it by.
    pub digest: Digest,
    /// The manifest chosen for this platform; equal to `digest` when that is not an index.
    pub manifest: Digest,
    /// How to start it.
    pub config: ImageConfig,
    /// Directories for overlayfs's `lowerdir`, **lowest first** (overlayfs wants them in reverse).
    pub layers: Vec<PathBuf>,
    /// What it takes on disk, unpacked.
    pub size_bytes: u64,
    /// What was left out while unpacking, for people, for example device nodes.
    pub notes: Vec<String>,
}

/// How far [`Store::stage`] is. Byte counts are of compressed layers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Progress {
    /// Manifest and config are here; this many bytes in so many layers are still to be fetched.
    Planned {
        /// Compressed bytes still to be fetched.
        bytes: u64,
        /// Layers still to be fetched or unpacked.
        layers: usize,
    },
    /// So many more bytes have been fetched.
    Fetched {
        /// Compressed bytes since the last call.
        bytes: u64,
    },
    /// One more layer has been unpacked.
    Unpacked {
        /// Its uncompressed digest.
        diff_id: Digest,
    },
}

/// What [`Store::remove_unused`] did.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Removed {
    /// Images that are gone.
    pub images: Vec<Digest>,
    /// How many layer directories are gone.
    pub layers: usize,
    /// Bytes of unpacked layers and blobs.
    pub bytes: u64,
}

impl Store {
    /// Opens the store with the default limits; creates the directory (mode 0700) if needed and sweeps what an
    /// interrupted [`stage`](Self::stage) left.
    ///
    /// # Errors
    /// [`StageError::Io`] when the directory cannot be made or swept.
    pub fn open(root: &Path) -> Result<Self, StageError> {
        Self::open_with(root, StoreConfig::default())
    }

    /// As [`open`](Self::open), with limits.
    ///
    /// # Errors
    /// [`StageError::Io`] when the directory cannot be made or swept.
    pub fn open_with(root: &Path, config: StoreConfig) -> Result<Self, StageError> {
        use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
        let make = |path: &Path| {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(path)
                .map_err(|source| io_error("create", path, source))
        };
        make(root)?;
        fs::set_permissions(root, fs::Permissions::from_mode(0o700))
            .map_err(|source| io_error("set the mode of", root, source))?;
        for name in [
            "layers",
            "images",
            "pins",
            "pulling",
            "refused",
            "loading",
            "damaged",
            "quarantine",
            "signatures",
        ] {
            make(&root.join(name))?;
        }
        let blobs =
            BlobDir::open(root).map_err(|source| io_error("open the store", root, source))?;
        let partials =
            PartialDir::open(root).map_err(|source| io_error("open the store", root, source))?;
        let store = Self {
            root: root.to_owned(),
            blobs,
            partials,
            config,
        };
        // Whoever holds the lock is at work there, and what lies in tmp/ is theirs.
        if let Some(_lock) = store.try_lock()? {
            store.sweep()?;
        }
        Ok(store)
    }

    /// Makes the image that `reference` pins (it must carry a digest) ready to be mounted: fetches what is
    /// missing, checks every byte, unpacks. Nothing to do, and no network, when it is already there and nothing of it was
    /// found to be [damaged](Self::repair). May be killed at any point and called again: what came is kept.
    ///
    /// # Errors
    /// [`StageError`]; nothing of other images is touched.
    pub fn stage(
        &self,
        client: &Client,
        reference: &Reference,
        platform: &Platform,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<StagedImage, StageError> {
        let Some(digest) = reference.digest() else {
            return Err(StageError::NotPinned {
                image: reference.to_string(),
            });
        };
        if let Some(staged) = self.staged_sound(&digest) {
            return Ok(staged);
        }
        let _lock = self.lock()?;
        // Another process may have staged it while this one waited.
        if let Some(staged) = self.staged_sound(&digest) {
            return Ok(staged);
        }
        self.sweep()?;
        self.quarantine_image(&digest)?;
        let origin = Origin::Registry(client);
        let selected = select(origin, reference, platform)?;
        let deltas = self.deltas(client, reference, &selected);
        let staging = Staging::new(self, origin, reference, &selected)?;
        if deltas.is_empty() {
            staging.run(progress)?;
        } else if let Err(error) = staging.leaning_on(&deltas).run(progress) {
            if !self.gives_up_deltas(reference, &deltas, &error) {
                return Err(error);
            }
            Staging::new(self, origin, reference, &selected)?.run(progress)?;
        }
        self.forget_refused();
        let missing = || io::Error::other("the image is not there after it was staged");
        self.staged(&digest)
            .ok_or_else(|| io_error("read back", &self.image_path(&digest), missing()))
    }

    /// The image, if it is wholly here: its record, config and every layer directory. Uses no network and waits
    /// for nobody. A damaged record counts as absent; staging again repairs it.
    #[must_use]
    pub fn staged(&self, digest: &Digest) -> Option<StagedImage> {
        let record = self.record(digest)?;
        let config = self.config(&record.config, record.layers.len())?;
        let mut staged = StagedImage {
            digest: *digest,
            manifest: record.manifest,
            config: config.config,
            layers: Vec::with_capacity(record.layers.len()),
            size_bytes: 0,
            notes: Vec::new(),
        };
        let mut seen = BTreeSet::new();
        // From the top: of a layer that an image has twice only the upper one can be seen, and overlayfs refuses
        // one directory twice.
        for (layer, diff_id) in record.layers.iter().zip(&config.rootfs.diff_ids).rev() {
            let path = self.layer_path(&layer.key);
            if layer.diff_id != *diff_id || !is_directory(&path) {
                return None;
            }
            if !seen.insert(layer.key) {
                continue;
            }
            if let Some(known) = self.any_layer(&layer.key) {
                staged.size_bytes += known.unpacked.bytes;
                staged.notes.extend(known.unpacked.notes);
            }
            staged.layers.push(path);
        }
        staged.layers.reverse();
        Some(staged)
    }

    /// As [`staged`](Self::staged); `None` also when a layer was found to be damaged, which staging again repairs.
    fn staged_sound(&self, digest: &Digest) -> Option<StagedImage> {
        self.staged(digest)
            .filter(|staged| !self.has_damage(&staged.digest))
    }

    /// Every image that is wholly here, in the order of the digests they were asked for by.
    ///
    /// # Errors
    /// [`StageError::Io`] when the directory cannot be read.
    pub fn list(&self) -> Result<Vec<StagedImage>, StageError> {
        let digests = digests_in(&self.root.join("images"))?;
        Ok(digests
            .iter()
            .filter_map(|digest| self.staged(digest))
            .collect())
    }

    /// Keeps an image from [`remove_unused`](Self::remove_unused), whether it is here already or not.
    ///
    /// # Errors
    /// [`StageError::Io`] when that cannot be recorded.
    pub fn pin(&self, digest: &Digest) -> Result<(), StageError> {
        let path = self.root.join("pins").join(digest.hex());
        // Empty, so it cannot be half written.
        File::create(&path).map_err(|source| io_error("write", &path, source))?;
        self.sync("pins")
    }

    /// Ends what [`pin`](Self::pin) began; true when it was pinned. The image itself stays until it is collected.
    ///
    /// # Errors
    /// [`StageError::Io`] when that cannot be recorded.
    pub fn unpin(&self, digest: &Digest) -> Result<bool, StageError> {
        let path = self.root.join("pins").join(digest.hex());
        match fs::remove_file(&path) {
            Ok(()) => self.sync("pins").map(|()| true),
            Err(source) if source.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(source) => Err(io_error("remove", &path, source)),
        }
    }

    /// The images that are pinned.
    ///
    /// # Errors
    /// [`StageError::Io`] when the directory cannot be read.
    pub fn pinned(&self) -> Result<BTreeSet<Digest>, StageError> {
        digests_in(&self.root.join("pins"))
    }

    /// Removes every image that is not pinned and whose asked-for digest is not in `keep`, and the layers and blobs
    /// that then nobody needs. Never touches a kept image.
    ///
    /// # Errors
    /// [`StageError::Busy`] when another process is staging; nothing was removed then. [`StageError::Io`] when
    /// something cannot be removed; calling again goes on.
    pub fn remove_unused(&self, keep: &BTreeSet<Digest>) -> Result<Removed, StageError> {
        let _lock = self.try_lock()?.ok_or_else(|| StageError::Busy {
            path: self.root.clone(),
        })?;
        self.sweep()?;
        let pinned = self.pinned()?;
        let keep: BTreeSet<&Digest> = keep.union(&pinned).collect();
        let mut removed = Removed::default();
        let mut layers = BTreeSet::new();
        let mut blobs = BTreeSet::new();
        for digest in digests_in(&self.root.join("images"))? {
            match self.record(&digest) {
                Some(record) if keep.contains(&digest) => {
                    layers.extend(record.layers.iter().map(|layer| layer.key));
                    blobs.extend([digest, record.manifest, record.config]);
                }
                // Nobody knows which layers it needs, so nothing of a kept image may go until it is staged again.
                None if keep.contains(&digest) => {
                    tracing::warn!(%digest, "a kept image is damaged; nothing is collected until it is staged again");
                    return Ok(removed);
                }
                _ => {
                    let path = self.image_path(&digest);
                    fs::remove_file(&path).map_err(|source| io_error("remove", &path, source))?;
                    killpoint::reached("image", "removed");
                    removed.images.push(digest);
                }
            }
        }
        // The records are gone for good before what they name goes.
        self.sync("images")?;
        for key in digests_in(&self.root.join("layers"))?.difference(&layers) {
            removed.bytes += self
                .any_layer(key)
                .map_or(0, |record| record.unpacked.bytes);
            removed.layers += usize::from(self.remove_layer(key)?);
        }
        removed.bytes += self
            .blobs
            .retain(&blobs)
            .map_err(|source| io_error("remove blobs of", &self.root, source))?;
        removed.bytes += self.collect_pulls(&keep)?;
        for digest in digests_in(&self.root.join("signatures"))? {
            if !keep.contains(&digest) {
                let path = self.signatures_path(&digest);
                fs::remove_file(&path).map_err(|source| io_error("remove", &path, source))?;
            }
        }
        Ok(removed)
    }

    fn image_path(&self, digest: &Digest) -> PathBuf {
        self.root
            .join("images")
            .join(format!("{}.json", digest.hex()))
    }

    fn signatures_path(&self, digest: &Digest) -> PathBuf {
        self.root
            .join("signatures")
            .join(format!("{}.json", digest.hex()))
    }

    fn layer_path(&self, key: &Digest) -> PathBuf {
        self.root.join("layers").join(key.hex())
    }

    fn layer_record_path(&self, key: &Digest) -> PathBuf {
        self.root.join("layers").join(format!("{}.json", key.hex()))
    }

    /// The record of an image. One that is damaged is made again from manifest, config and layers, without network:
    /// a flipped bit must not keep a device from starting what it has.
    fn record(&self, digest: &Digest) -> Option<ImageRecord> {
        let path = self.image_path(digest);
        ImageRecord::read(&path, digest)
            .or_else(|| path.exists().then(|| self.rebuild(digest)).flatten())
    }

    fn rebuild(&self, digest: &Digest) -> Option<ImageRecord> {
        let (raw, manifest) = self.local_manifest(digest, 4)?;
        let config = self.config(&manifest.config.digest, manifest.layers.len())?;
        let mut layers: Vec<PlacedLayer> = Vec::new();
        for diff_id in &config.rootfs.diff_ids {
            let chain_id = chain_id(layers.last().map(|layer| layer.chain_id), diff_id);
            let lowers: Vec<PathBuf> = layers
                .iter()
                .rev()
                .map(|layer| self.layer_path(&layer.key))
                .collect();
            let key = self.fitting_layer(diff_id, &chain_id, &lowers).ok()??.0;
            layers.push(PlacedLayer {
                diff_id: *diff_id,
                chain_id,
                key,
            });
        }
        let config = manifest.config.digest;
        Some(ImageRecord {
            digest: *digest,
            manifest: raw,
            config,
            reference: String::new(),
            layers,
        })
    }

    /// The manifest that `digest` names, or the one of its variants that is here.
    fn local_manifest(&self, digest: &Digest, depth: usize) -> Option<(Digest, Manifest)> {
        let bytes = self.blobs.read(digest, MANIFEST_BYTES_MAX).ok()??;
        match Document::parse(&bytes, None).ok()? {
            Document::Manifest(manifest) => Some((*digest, manifest)),
            Document::Index(_) if depth == 0 => None,
            Document::Index(index) => index
                .manifests
                .iter()
                .find_map(|entry| self.local_manifest(&entry.digest, depth - 1)),
        }
    }

    fn config(&self, digest: &Digest, layers: usize) -> Option<ConfigDocument> {
        let bytes = self.blobs.read(digest, CONFIG_BYTES_MAX).ok()??;
        ConfigDocument::parse(&bytes, layers).ok()
    }

    /// The key of a layer that is here and would come out the same above `lowers` (topmost first).
    fn fitting_layer(
        &self,
        diff_id: &Digest,
        chain_id: &Digest,
        lowers: &[PathBuf],
    ) -> Result<Option<(Digest, LayerRecord)>, StageError> {
        for key in [chain_id, diff_id] {
            let Some(record) = self.layer(key).filter(|record| record.diff_id == *diff_id) else {
                continue;
            };
            let leans = &record.unpacked.leans;
            let fits = record.chain_id == *chain_id
                || leans
                    .holds_above(lowers)
                    .map_err(|source| io_error("look at", &self.layer_path(key), source))?;
            if fits {
                return Ok(Some((*key, record)));
            }
        }
        Ok(None)
    }

    /// The record of a layer that is wholly here, and sound as far as is known.
    fn layer(&self, key: &Digest) -> Option<LayerRecord> {
        self.any_layer(key).filter(|_| !self.is_damaged(key))
    }

    /// The record of a layer whose directory is here.
    fn any_layer(&self, key: &Digest) -> Option<LayerRecord> {
        let record = LayerRecord::read(&self.layer_record_path(key), key)?;
        fs::symlink_metadata(self.layer_path(key))
            .is_ok_and(|meta| meta.is_dir())
            .then_some(record)
    }

    /// Moves the tree away before it is removed, so that half a tree never stands under its name.
    fn remove_layer(&self, key: &Digest) -> Result<bool, StageError> {
        let (record, tree) = (self.layer_record_path(key), self.layer_path(key));
        let away = self.blobs.tmp().join(format!("gone-{}", key.hex()));
        let there = match fs::rename(&tree, &away) {
            Ok(()) => {
                killpoint::reached("layer", "moved-away");
                let removed = if is_directory(&away) {
                    remove_tree(&away)
                } else {
                    // A file system that was repaired may have made a file of it.
                    fs::remove_file(&away)
                };
                removed.map_err(|source| io_error("remove", &away, source))?;
                killpoint::reached("layer", "deleted");
                true
            }
            Err(source) if source.kind() == io::ErrorKind::NotFound => false,
            Err(source) => return Err(io_error("move away", &tree, source)),
        };
        // The mark first: one without a layer would speak for the next that gets its name.
        let mark = self.survey_mark(key);
        let gone = |path: &Path| match fs::remove_file(path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(io_error("remove", path, source))
            }
            _ => Ok(()),
        };
        let others = [mark, self.ledger_path(key), record, self.damage_mark(key)];
        match others.iter().try_for_each(|path| gone(path)) {
            Err(error) => Err(error),
            Ok(()) => {
                killpoint::reached("layer", "record-gone");
                Ok(there)
            }
        }
    }

    /// Removes what an interrupted stage left: everything in `tmp/`, and records whose layer never got its name.
    /// A tree without a good record stays: an image may be running from it. The caller holds the lock.
    fn sweep(&self) -> Result<(), StageError> {
        self.blobs
            .sweep()
            .map_err(|source| io_error("sweep", self.blobs.tmp(), source))?;
        self.sweep_loading()?;
        for key in digests_in(&self.root.join("layers"))? {
            if !is_directory(&self.layer_path(&key)) {
                self.remove_layer(&key)?;
            }
        }
        Ok(())
    }

    /// What the file system has left.
    fn room(&self) -> Result<Room, StageError> {
        Room::of(&self.root, self.config.reserve_bytes)
            .map_err(|source| io_error("look at the disk of", &self.root, source))
    }

    fn sync(&self, name: &str) -> Result<(), StageError> {
        let path = self.root.join(name);
        sync_dir(&path).map_err(|source| io_error("flush", &path, source))
    }

    fn lock_file(&self) -> Result<File, StageError> {
        let path = self.root.join("lock");
        File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(|source| io_error("open", &path, source))
    }

    /// The lock, or `None` if somebody else has it. Freed when the file is dropped or the process dies.
    fn try_lock(&self) -> Result<Option<File>, StageError> {
        let file = self.lock_file()?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(file)),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(errno) => Err(io_error("lock", &self.root.join("lock"), errno.into())),
        }
    }

    /// The lock, waited for: polled, since a wait in flock(2) cannot be bounded without signals.
    fn lock(&self) -> Result<File, StageError> {
        let until = Instant::now() + self.config.lock_wait;
        loop {
            if let Some(file) = self.try_lock()? {
                return Ok(file);
            }
            if Instant::now() >= until {
                return Err(StageError::Busy {
                    path: self.root.clone(),
                });
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// OCI image specification, "Layer ChainID".
fn chain_id(below: Option<Digest>, diff_id: &Digest) -> Digest {
    below.map_or(*diff_id, |below| {
        Digest::of(format!("{below} {diff_id}").as_bytes())
    })
}

/// The digests that files `HEX`, `HEX.json`, `HEX.ledger` in a directory are named by.
fn digests_in(path: &Path) -> Result<BTreeSet<Digest>, StageError> {
    let entries = fs::read_dir(path).map_err(|source| io_error("list", path, source))?;
    let mut found = BTreeSet::new();
    for entry in entries {
        let name = entry
            .map_err(|source| io_error("list", path, source))?
            .file_name();
        let Some(name) = name.to_str() else { continue };
        let hex = [".json", ".ledger"]
            .iter()
            .find_map(|suffix| name.strip_suffix(suffix))
            .unwrap_or(name);
        if let Ok(digest) = format!("sha256:{hex}").parse() {
            found.insert(digest);
        }
    }
    Ok(found)
}

fn is_directory(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|meta| meta.is_dir())
}

fn io_error(act: &'static str, path: &Path, source: io::Error) -> StageError {
    StageError::Io {
        act,
        path: path.to_owned(),
        source,
    }
}

impl Default for StoreConfig {
    fn default() -> Self {
        Self {
            unpacked_bytes_max: 16 << 30,
            reserve_bytes: None,
            lock_wait: Duration::from_mins(10),
            keep_privileges: false,
            unpacker: None,
            deltas: true,
        }
    }
}
