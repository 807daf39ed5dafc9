//! One image on its way into the store: layer by layer, fetched, unpacked, recorded.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use foreshore_killpoint as killpoint;

use super::record::{ImageRecord, LayerRecord, PlacedLayer};
use super::select::Selected;
use super::survey::Extent;
use super::{Progress, StageError, Store, chain_id, io_error, stream};
use crate::manifest::Descriptor;
use crate::registry::Client;
use crate::room::Shortage;
use crate::unpack::{Budget, UnpackError, unpack_layer};
use crate::{Digest, Reference};

/// The most entries one image may have: ten times what a full distribution with a desktop has.
const ENTRIES_MAX: u64 = 500_000;

/// A file of an image has this many bytes at least, on average: half of what a Debian system has.
const INODE_BYTES: u64 = 16 << 10;
/// Directories and links of a layer that is small.
const INODES_MIN: u64 = 64;
/// How much of a blob is written between two looks at the disk.
const LOOK_BYTES: u64 = 1 << 20;

/// What a layer unpacks to at most, usually: as long as its blob where it is not compressed, 4 times that with gzip
/// (a Debian system has 2.8) and 5 times with anything else (zstd at its best has 3.7).
fn unpacked_estimate(layer: &Descriptor) -> u64 {
    let media_type = layer.media_type.as_str();
    let times = if media_type.ends_with("gzip") {
        4
    } else if media_type.ends_with(".tar") {
        1
    } else {
        5
    };
    layer.size.saturating_mul(times)
}

/// Leaves the reserve alone: fails like a full disk once it would be touched.
struct Sparing<'a, W> {
    inner: &'a mut W,
    store: &'a Store,
    written: u64,
}

impl<W: Write> Write for Sparing<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let looked = self.written / LOOK_BYTES;
        self.written += bytes.len() as u64;
        if self.written / LOOK_BYTES > looked
            && let Ok(room) = self.store.room()
            && !room.is_enough()
        {
            return Err(rustix::io::Errno::NOSPC.into());
        }
        self.inner.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// One call of [`Store::stage`] that has work to do; the lock is held.
pub(super) struct Staging<'a> {
    store: &'a Store,
    client: &'a Client,
    reference: &'a Reference,
    selected: &'a Selected,
    budget: Budget,
    /// The budget's bytes come from the free disk, not from the configured limit.
    bound_by_disk: bool,
    placed: Vec<PlacedLayer>,
}

impl<'a> Staging<'a> {
    pub(super) fn new(
        store: &'a Store,
        client: &'a Client,
        reference: &'a Reference,
        selected: &'a Selected,
    ) -> Result<Self, StageError> {
        let spare = store.room()?.spare_bytes();
        let max = store.config.unpacked_bytes_max;
        let budget = Budget {
            bytes: max.min(spare),
            entries: ENTRIES_MAX,
        };
        Ok(Self {
            store,
            client,
            reference,
            selected,
            budget,
            bound_by_disk: spare < max,
            placed: Vec::new(),
        })
    }

    pub(super) fn run(mut self, progress: &mut dyn FnMut(Progress)) -> Result<(), StageError> {
        let layers = &self.selected.manifest.layers;
        let diff_ids = &self.selected.config.rootfs.diff_ids;
        self.plan(progress)?;
        for (layer, diff_id) in layers.iter().zip(diff_ids) {
            let chain_id = chain_id(self.placed.last().map(|placed| placed.chain_id), diff_id);
            if self.reuse(diff_id, &chain_id)? {
                continue;
            }
            self.fetch(layer, progress)?;
            killpoint::reached("layer", "fetched");
            let key = self.unpack(layer, diff_id, &chain_id)?;
            self.placed.push(PlacedLayer {
                diff_id: *diff_id,
                chain_id,
                key,
            });
            progress(Progress::Unpacked { diff_id: *diff_id });
        }
        self.record()
    }

    /// Says what is ahead and refuses what does not fit beside the reserve before a layer is fetched.
    ///
    /// Manifests tell compressed sizes only, so what layers unpack to is estimated to be on the safe side: see
    /// [`unpacked_estimate`]. Blobs go as soon as they are unpacked, so only the largest counts besides.
    fn plan(&self, progress: &mut dyn FnMut(Progress)) -> Result<(), StageError> {
        let missing = |digest: &Digest| self.store.layer(digest).is_none();
        let layers = self
            .selected
            .manifest
            .layers
            .iter()
            .zip(&self.selected.config.rootfs.diff_ids);
        let ahead: Vec<&Descriptor> = layers
            .filter(|(_, diff_id)| missing(diff_id))
            .map(|(layer, _)| layer)
            .collect();
        let bytes = ahead
            .iter()
            .fold(0_u64, |sum, layer| sum.saturating_add(layer.size));
        let largest = ahead.iter().map(|layer| layer.size).max().unwrap_or(0);
        let unpacked = ahead.iter().fold(0_u64, |sum, layer| {
            sum.saturating_add(unpacked_estimate(layer))
        });
        let inodes = unpacked / INODE_BYTES + INODES_MIN * ahead.len() as u64;
        let needed = unpacked.saturating_add(largest);
        if !ahead.is_empty()
            && let Some(shortage) = self.store.room()?.shortage(needed, inodes)
        {
            return Err(self.disk_full(shortage));
        }
        progress(Progress::Planned {
            bytes,
            layers: ahead.len(),
        });
        Ok(())
    }

    /// Takes a layer that is already unpacked, if it would come out the same above these layers.
    fn reuse(&mut self, diff_id: &Digest, chain_id: &Digest) -> Result<bool, StageError> {
        let Some((key, record)) = self
            .store
            .fitting_layer(diff_id, chain_id, &self.lowers())?
        else {
            return Ok(false);
        };
        self.budget.entries = self.budget.entries.saturating_sub(record.unpacked.entries);
        // What is on disk already takes no more of it.
        if !self.bound_by_disk {
            self.budget.bytes = self.budget.bytes.saturating_sub(record.unpacked.bytes);
        }
        self.placed.push(PlacedLayer {
            diff_id: *diff_id,
            chain_id: *chain_id,
            key,
        });
        Ok(true)
    }

    /// The layers below the next one, topmost first.
    fn lowers(&self) -> Vec<PathBuf> {
        self.placed
            .iter()
            .rev()
            .map(|placed| self.store.layer_path(&placed.key))
            .collect()
    }

    fn fetch(
        &self,
        layer: &Descriptor,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<(), StageError> {
        let blobs = &self.store.blobs;
        let path = blobs.path(&layer.digest);
        // Left by a stage that was interrupted between fetching and unpacking.
        if blobs
            .verify(&layer.digest, layer.size)
            .map_err(|source| io_error("read", &path, source))?
        {
            progress(Progress::Fetched { bytes: layer.size });
            return Ok(());
        }
        let mut writer = blobs
            .writer()
            .map_err(|source| io_error("create", &path, source))?;
        let mut fetched = |bytes| progress(Progress::Fetched { bytes });
        let mut sparing = Sparing {
            inner: &mut writer,
            store: self.store,
            written: 0,
        };
        self.client
            .blob(self.reference, layer, &mut sparing, &mut fetched)?;
        writer
            .flush()
            .and_then(|()| writer.commit())
            .map_err(|source| io_error("write", &path, source))?;
        Ok(())
    }

    /// Unpacks a fetched layer and returns the key it stands under. On any error nothing of it is left.
    fn unpack(
        &mut self,
        layer: &Descriptor,
        diff_id: &Digest,
        chain_id: &Digest,
    ) -> Result<Digest, StageError> {
        let store = self.store;
        let blob_path = store.blobs.path(&layer.digest);
        let open = || File::open(&blob_path).map_err(|source| io_error("open", &blob_path, source));
        let staging = tempfile::Builder::new()
            .prefix("layer-")
            .tempdir_in(store.blobs.tmp())
            .map_err(|source| io_error("create a directory in", store.blobs.tmp(), source))?;
        let tree = staging.path().join("tree");
        fs::create_dir(&tree).map_err(|source| io_error("create", &tree, source))?;
        let lowers = self.lowers();
        let budget = self.budget;
        // Headers and padding come on top of the content: two blocks an entry, and a few for long names.
        let stream_bytes_max = budget.bytes.saturating_add(budget.entries * 4096);
        let unpacked = stream::with_layer(
            open()?,
            stream_bytes_max,
            &|| store.room().ok()?.shortage(0, 0),
            |stream| unpack_layer(stream, &tree, &lowers, budget),
            |source| match source.raw_os_error() {
                Some(_) => UnpackError::Io {
                    act: "read",
                    path: blob_path.display().to_string(),
                    source,
                },
                None => UnpackError::Archive(Box::new(source)),
            },
        );
        let remove_blob = || {
            store
                .blobs
                .remove(&layer.digest)
                .map_err(|source| io_error("remove", &blob_path, source))
        };
        let (unpacked, found) = match unpacked {
            Ok(unpacked) => unpacked,
            // The blob is right, this disk is not well: it need not be fetched again.
            Err(source @ UnpackError::Io { .. }) => return Err(self.layer_error(layer, source)),
            Err(source) => {
                let error = self.layer_error(layer, source);
                if !matches!(error, StageError::DiskFull { .. }) {
                    remove_blob()?;
                }
                return Err(error);
            }
        };
        if found != *diff_id {
            remove_blob()?;
            return Err(StageError::DiffId {
                image: self.reference.to_string(),
                layer: layer.digest,
                expected: *diff_id,
            });
        }
        killpoint::reached("layer", "unpacked");
        let record = LayerRecord {
            diff_id: *diff_id,
            chain_id: *chain_id,
            unpacked,
            extent: Extent::of(&tree).ok(),
        };
        self.budget.entries = self.budget.entries.saturating_sub(record.unpacked.entries);
        self.budget.bytes = self.budget.bytes.saturating_sub(record.unpacked.bytes);
        // Under the diff id, where every image finds it, unless another variant of it stands there.
        let key = if store.layer(diff_id).is_none() {
            *diff_id
        } else {
            *chain_id
        };
        self.publish(&tree, &key, &record)?;
        // Only now: after a power loss before this it need not be fetched again.
        remove_blob()?;
        Ok(key)
    }

    /// Flushes the tree and gives it its name, the record first: a record alone is swept.
    fn publish(&self, tree: &Path, key: &Digest, record: &LayerRecord) -> Result<(), StageError> {
        let store = self.store;
        store.quarantine_layer(key)?;
        File::open(tree)
            .and_then(|dir| rustix::fs::syncfs(&dir).map_err(io::Error::from))
            .map_err(|source| io_error("flush", tree, source))?;
        killpoint::reached("layer", "flushed");
        let (record_path, path) = (store.layer_record_path(key), store.layer_path(key));
        record
            .write(&record_path, store.blobs.tmp())
            .map_err(|source| io_error("write", &record_path, source))?;
        fs::rename(tree, &path).map_err(|source| io_error("move into place", &path, source))?;
        killpoint::reached("layer", "renamed");
        store.sync("layers")?;
        killpoint::reached("layer", "durable");
        Ok(())
    }

    /// Writes manifest, config and record: from here on the image is there.
    fn record(&self) -> Result<(), StageError> {
        let (store, selected) = (self.store, self.selected);
        for bytes in [
            &selected.root.bytes,
            &selected.raw.bytes,
            &selected.config_bytes,
        ] {
            store
                .blobs
                .put(bytes)
                .map_err(|source| io_error("write a blob in", &store.root, source))?;
        }
        let record = ImageRecord {
            digest: selected.root.digest,
            manifest: selected.raw.digest,
            config: selected.manifest.config.digest,
            reference: self.reference.to_string(),
            layers: self.placed.clone(),
        };
        let path = store.image_path(&selected.root.digest);
        record
            .write(&path, store.blobs.tmp())
            .map_err(|source| io_error("write", &path, source))
    }

    fn layer_error(&self, layer: &Descriptor, source: UnpackError) -> StageError {
        let bomb = match &source {
            UnpackError::Archive(source) => bomb(source.as_ref()),
            _ => None,
        };
        let over_budget = matches!(bomb, Some(stream::Bomb::Length(_)))
            || matches!(source, UnpackError::TooLarge(_));
        let budget = self.budget.bytes;
        match (bomb, self.store.room()) {
            (Some(stream::Bomb::Room(shortage)), _) => return self.disk_full(*shortage),
            (_, Ok(room)) if over_budget && self.bound_by_disk => {
                return self.disk_full(room.exceeded(budget.saturating_add(1)));
            }
            _ => {}
        }
        StageError::Layer {
            image: self.reference.to_string(),
            layer: layer.digest,
            source: Box::new(source),
        }
    }

    fn disk_full(&self, shortage: Shortage) -> StageError {
        StageError::DiskFull {
            image: self.reference.to_string(),
            path: self.store.root.clone(),
            shortage,
        }
    }
}

/// Finds what stopped a stream, however it was wrapped on its way up.
fn bomb<'e>(error: &'e (dyn std::error::Error + 'static)) -> Option<&'e stream::Bomb> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(bomb) = error.downcast_ref::<stream::Bomb>() {
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
