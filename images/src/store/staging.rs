//! One image on its way into the store: layer by layer, fetched, unpacked, recorded.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, BufReader};
use std::path::{Path, PathBuf};

use foreshore_killpoint as killpoint;

use super::deltas::Leanings;
use super::fetching::{AT_ONCE, Fetching};
use super::origin::Origin;
use super::record::{ImageRecord, LayerRecord, PlacedLayer};
use super::select::Selected;
use super::survey::Extent;
use super::{Progress, StageError, Store, chain_id, io_error};
use crate::delta::Rebuilt;
use crate::ledger::{self, LedgerError, Seal};
use crate::manifest::Descriptor;
use crate::room::Shortage;
use crate::unpack::job::{Job, LowerLayer, opaque_in, perform};
use crate::unpack::{Bomb, Budget, UnpackError, Unpacked};
use crate::{Digest, Reference};

/// The most entries one image may have: ten times what a full distribution with a desktop has.
const ENTRIES_MAX: u64 = 500_000;

/// A file of an image has this many bytes at least, on average: half of what a Debian system has.
const INODE_BYTES: u64 = 16 << 10;
/// Directories and links of a layer that is small.
const INODES_MIN: u64 = 64;
/// The name of what is unpacked, in a directory of its own.
const TREE: &str = "tree";
/// The name of the list of its files, beside it.
const LEDGER: &str = "ledger";

/// What a layer unpacks to at most, usually: as long as its blob where it is not compressed, 4 times that with gzip
/// (a Debian system has 2.8) and 5 times with anything else (zstd at its best has 3.7).
pub(super) fn unpacked_estimate(layer: &Descriptor) -> u64 {
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

/// One call of [`Store::stage`] that has work to do; the lock is held.
pub(super) struct Staging<'a> {
    store: &'a Store,
    origin: Origin<'a>,
    reference: &'a Reference,
    selected: &'a Selected,
    budget: Budget,
    /// The budget's bytes come from the free disk, not from the configured limit.
    bound_by_disk: bool,
    placed: Vec<PlacedLayer>,
    /// What is fetched, for each layer of the image.
    blobs: Vec<Descriptor>,
    /// For layers of which that is a delta, the old layers' directories.
    trees: BTreeMap<usize, Vec<PathBuf>>,
}

/// Stops the threads that fetch, so that nobody waits for them for ever.
struct StopsAtEnd<'f>(&'f Fetching<'f>);

impl Drop for StopsAtEnd<'_> {
    fn drop(&mut self) {
        self.0.stop();
    }
}

impl<'a> Staging<'a> {
    pub(super) fn new(
        store: &'a Store,
        origin: Origin<'a>,
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
            origin,
            reference,
            selected,
            budget,
            bound_by_disk: spare < max,
            placed: Vec::new(),
            blobs: selected.manifest.layers.clone(),
            trees: BTreeMap::new(),
        })
    }

    /// Fetches these instead of layers.
    pub(super) fn leaning_on(mut self, deltas: &Leanings) -> Self {
        for (index, leaning) in deltas {
            self.blobs[*index] = leaning.blob.clone();
            self.trees.insert(*index, leaning.trees.clone());
        }
        self
    }

    pub(super) fn run(mut self, progress: &mut dyn FnMut(Progress)) -> Result<(), StageError> {
        let wanted = self.plan(progress)?;
        // What was begun of other images may have made room since.
        let again = Self::new(self.store, self.origin, self.reference, self.selected)?;
        (self.budget, self.bound_by_disk) = (again.budget, again.bound_by_disk);
        let layers = self.blobs.clone();
        let fetching = Fetching::new(self.store, self.origin, self.reference, &layers, &wanted);
        std::thread::scope(|scope| {
            for _ in 0..AT_ONCE.min(layers.len()) {
                scope.spawn(|| fetching.work());
            }
            let _stop_in_any_case = StopsAtEnd(&fetching);
            self.layers(&fetching, progress)
        })?;
        self.record()?;
        self.store.forget_pull(&self.selected.root.digest);
        Ok(())
    }

    /// Unpacks one layer after the other.
    fn layers(
        &mut self,
        fetching: &Fetching<'_>,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<(), StageError> {
        let selected = self.selected;
        let blobs = self.blobs.clone();
        let pairs = blobs.iter().zip(&selected.config.rootfs.diff_ids);
        for (index, (layer, diff_id)) in pairs.enumerate() {
            fetching.unpacking(index);
            let chain_id = chain_id(self.placed.last().map(|placed| placed.chain_id), diff_id);
            if self.reuse(diff_id, &chain_id)? {
                continue;
            }
            let key = self.unpack(fetching, index, layer, diff_id, &chain_id, progress)?;
            self.placed.push(PlacedLayer {
                diff_id: *diff_id,
                chain_id,
                key,
            });
            progress(Progress::Unpacked { diff_id: *diff_id });
        }
        fetching.unpacking(selected.manifest.layers.len());
        Ok(())
    }

    /// Says what is ahead and refuses what does not fit beside the reserve before a layer is fetched. Returns which layers
    /// are missing.
    ///
    /// Manifests tell compressed sizes only, so what layers unpack to is estimated to be on the safe side: see
    /// [`unpacked_estimate`]. Blobs go as soon as they are unpacked, so only those that are fetched at once count besides.
    fn plan(&self, progress: &mut dyn FnMut(Progress)) -> Result<Vec<bool>, StageError> {
        let layers = &self.selected.manifest.layers;
        let mut seen = BTreeSet::new();
        let wanted: Vec<bool> = layers
            .iter()
            .zip(&self.selected.config.rootfs.diff_ids)
            // The second of two equal layers is there when its turn comes.
            .map(|(layer, diff_id)| {
                self.store.layer(diff_id).is_none() && seen.insert(layer.digest)
            })
            .collect();
        let those_wanted = |all: &'_ [Descriptor]| -> Vec<Descriptor> {
            let pairs = all.iter().zip(&wanted);
            let wanted = pairs.filter(|(_, wanted)| **wanted);
            wanted.map(|(layer, _)| layer.clone()).collect()
        };
        // What is fetched may be little; what it unpacks to is not.
        let (ahead, unpacked) = (those_wanted(&self.blobs), those_wanted(layers));
        let mut missing: Vec<u64> = ahead
            .iter()
            .map(|layer| match self.origin {
                Origin::Registry(_) => layer
                    .size
                    .saturating_sub(self.store.partials.size(&layer.digest)),
                Origin::Files(_) => 0,
            })
            .collect();
        let sum = |sizes: &[u64]| {
            sizes
                .iter()
                .fold(0_u64, |sum, size| sum.saturating_add(*size))
        };
        let bytes = sum(&missing);
        missing.sort_unstable_by_key(|size| std::cmp::Reverse(*size));
        missing.truncate(AT_ONCE);
        let unpacked = unpacked.iter().fold(0_u64, |sum, layer| {
            sum.saturating_add(unpacked_estimate(layer))
        });
        let inodes = unpacked / INODE_BYTES + INODES_MIN * ahead.len() as u64;
        let needed = unpacked.saturating_add(sum(&missing));
        if !ahead.is_empty() {
            let layers: BTreeSet<Digest> = ahead.iter().map(|layer| layer.digest).collect();
            if self.store.room()?.shortage(needed, inodes).is_some() {
                // What was begun of other images makes room first: it can be had again.
                self.store.drop_partials(|digest| layers.contains(digest))?;
            }
            if let Some(shortage) = self.store.room()?.shortage(needed, inodes) {
                return Err(self.disk_full(shortage));
            }
            self.store.note_pull(&self.selected.root.digest, &layers);
        }
        progress(Progress::Planned {
            bytes,
            layers: ahead.len(),
        });
        Ok(wanted)
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

    /// Unpacks a layer as it comes and returns the key it stands under. On any error nothing of it is left but its blob.
    fn unpack(
        &mut self,
        fetching: &Fetching<'_>,
        index: usize,
        layer: &Descriptor,
        diff_id: &Digest,
        chain_id: &Digest,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Digest, StageError> {
        let store = self.store;
        let mut tell = |bytes| progress(Progress::Fetched { bytes });
        let remove_blob = || {
            store
                .partials
                .remove(&layer.digest)
                .map_err(|source| io_error("remove", &store.partials.path(&layer.digest), source))
        };
        let (staging, unpacked, found) = loop {
            let restarts = fetching.restarts(index);
            let staging = tempfile::Builder::new()
                .prefix("layer-")
                .tempdir_in(store.blobs.tmp())
                .map_err(|source| io_error("create a directory in", store.blobs.tmp(), source))?;
            let source = match self.unpack_into(fetching, index, staging.path(), &mut tell)? {
                Ok((unpacked, found)) => {
                    // Who unpacked it may have stopped reading early; what is right is known when all has come.
                    fetching.finished(index, &mut tell)?;
                    if fetching.restarts(index) == restarts {
                        break (staging, unpacked, found);
                    }
                    continue;
                }
                Err(source) => source,
            };
            // This disk is not well: whatever else is to come does not matter.
            if matches!(
                source,
                UnpackError::Io { .. }
                    | UnpackError::DiskFull { .. }
                    | UnpackError::Bomb(Bomb::Room(_))
            ) {
                return Err(self.layer_error(layer, source));
            }
            // Whether it is the image that is bad, or what came of it, is known when all has come.
            fetching.finished(index, &mut tell)?;
            if fetching.restarts(index) != restarts {
                continue;
            }
            let error = self.layer_error(layer, source);
            // What is whole and right is not fetched again for what may pass here.
            if !error.is_transient() {
                remove_blob()?;
            }
            return Err(error);
        };
        let tree = staging.path().join(TREE);
        if found != *diff_id {
            remove_blob()?;
            return Err(StageError::DiffId {
                image: self.reference.to_string(),
                layer: layer.digest,
                expected: *diff_id,
            });
        }
        killpoint::reached("layer", "unpacked");
        let list = staging.path().join(LEDGER);
        let (ledger, extent) = match self.write_ledger(&tree, &list, &unpacked) {
            Ok(written) => written,
            Err(source) => {
                let error = self.layer_error(layer, source);
                if !error.is_transient() {
                    remove_blob()?;
                }
                return Err(error);
            }
        };
        let record = LayerRecord {
            diff_id: *diff_id,
            chain_id: *chain_id,
            unpacked,
            extent,
            ledger,
        };
        self.budget.entries = self.budget.entries.saturating_sub(record.unpacked.entries);
        self.budget.bytes = self.budget.bytes.saturating_sub(record.unpacked.bytes);
        let key = self.key_for(diff_id, chain_id)?;
        self.publish(&tree, &list, &key, &record)?;
        // Only now: after a power loss before this it need not be fetched again.
        remove_blob()?;
        Ok(key)
    }

    /// What a new layer is to be called: as the damaged one that it replaces, else by the diff id, where every image finds it,
    /// unless another variant of it stands there.
    fn key_for(&self, diff_id: &Digest, chain_id: &Digest) -> Result<Digest, StageError> {
        let store = self.store;
        let mut taken = store.layer(diff_id).is_some();
        for key in [chain_id, diff_id] {
            let path = store.layer_record_path(key);
            let Some(record) = LayerRecord::read(&path, key).filter(|_| store.is_damaged(key))
            else {
                continue;
            };
            let fits = record.chain_id == *chain_id
                || record
                    .unpacked
                    .leans
                    .holds_above(&self.lowers())
                    .map_err(|source| io_error("look at the layers below", &path, source))?;
            if fits && record.diff_id == *diff_id {
                return Ok(*key);
            }
            // Another image's.
            taken |= key == diff_id;
        }
        Ok(if taken { *chain_id } else { *diff_id })
    }

    /// Writes down what each file of a new tree is. Done here and not by who unpacked it, which is believed nothing.
    fn write_ledger(
        &self,
        tree: &Path,
        list: &Path,
        unpacked: &Unpacked,
    ) -> Result<(Option<Seal>, Option<Extent>), UnpackError> {
        match ledger::write(tree, unpacked.bytes, list) {
            Ok(written) => {
                let extent = Extent::new(written.names, written.bytes);
                Ok((Some(written.seal), Some(extent)))
            }
            Err(LedgerError::TooLong) => {
                tracing::warn!(image = %self.reference, "a layer is too large for a list of its files; rot in it will not be found");
                Ok((None, Extent::of(tree).ok()))
            }
            Err(LedgerError::TooMuch) => Err(UnpackError::Crashed(
                "left more behind than it said that it unpacked".to_owned(),
            )),
            Err(LedgerError::Io(source)) if crate::registry::is_disk_full(&source) => {
                Err(UnpackError::DiskFull {
                    path: "the list of the layer's files".to_owned(),
                })
            }
            Err(LedgerError::Io(source)) => Err(UnpackError::Io {
                act: "write a list of".into(),
                path: "the layer's files".to_owned(),
                source,
            }),
        }
    }

    /// Unpacks what comes of a layer into `TREE` of a directory; returns what came of that and its diff id.
    ///
    /// # Errors
    /// The outer ones are not about the layer.
    fn unpack_into(
        &self,
        fetching: &Fetching<'_>,
        index: usize,
        dir: &Path,
        tell: &mut dyn FnMut(u64),
    ) -> Result<Result<(Unpacked, Digest), UnpackError>, StageError> {
        let store = self.store;
        let tree = dir.join(TREE);
        fs::create_dir(&tree).map_err(|source| io_error("create", &tree, source))?;
        let job = Job {
            target: tree,
            lowers: self.lower_layers()?,
            budget: self.budget,
            // Headers and padding come on top of the content: two blocks an entry, and a few for long names.
            stream_bytes_max: self.budget.bytes.saturating_add(self.budget.entries * 4096),
            reserve_bytes: store.config.reserve_bytes,
            keep_privileges: store.config.keep_privileges,
            opaque_later: false,
        };
        let blob = fetching.reader(index, tell)?;
        let trees = self.trees.get(&index);
        Ok(match (&store.config.unpacker, trees) {
            (Some(unpacker), None) => unpacker.perform(&store.root, job, blob),
            (Some(unpacker), Some(trees)) => unpacker.rebuild(&store.root, job, blob, trees),
            (None, None) => perform(&job, blob),
            (None, Some(trees)) => match Rebuilt::new(BufReader::new(blob), trees) {
                Ok(layer) => perform(&job, layer),
                Err(source) => Err(UnpackError::Archive(Box::new(source))),
            },
        })
    }

    /// The layers below the next one with what a process without privileges cannot see, topmost first.
    fn lower_layers(&self) -> Result<Vec<LowerLayer>, StageError> {
        let lower = |placed: &PlacedLayer| {
            let path = self.store.layer_path(&placed.key);
            let record = self.store.layer(&placed.key);
            let opaque = match record.and_then(|record| record.unpacked.opaque) {
                Some(noted) => noted,
                None => opaque_in(&path).map_err(|source| io_error("look at", &path, source))?,
            };
            Ok(LowerLayer {
                path,
                opaque: Some(opaque),
            })
        };
        self.placed.iter().rev().map(lower).collect()
    }

    /// Flushes the tree and gives it its name, ledger and record first: these alone are swept, and beside an old tree that is
    /// damaged they say so.
    fn publish(
        &self,
        tree: &Path,
        list: &Path,
        key: &Digest,
        record: &LayerRecord,
    ) -> Result<(), StageError> {
        let store = self.store;
        File::open(tree)
            .and_then(|dir| rustix::fs::syncfs(&dir).map_err(io::Error::from))
            .map_err(|source| io_error("flush", tree, source))?;
        killpoint::reached("layer", "flushed");
        let (record_path, ledger) = (store.layer_record_path(key), store.ledger_path(key));
        if record.ledger.is_some() {
            fs::rename(list, &ledger)
                .map_err(|source| io_error("move into place", &ledger, source))?;
            killpoint::reached("ledger", "renamed");
        }
        record
            .write(&record_path, store.blobs.tmp())
            .map_err(|source| io_error("write", &record_path, source))?;
        store.put_in_place(tree, key)?;
        store.sync("layers")?;
        killpoint::reached("layer", "durable");
        let mark = store.damage_mark(key);
        match fs::remove_file(&mark) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(io_error("remove", &mark, source))
            }
            _ => Ok(()),
        }
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
        let over_budget = matches!(
            source,
            UnpackError::Bomb(Bomb::Length(_)) | UnpackError::TooLarge(_)
        );
        let budget = self.budget.bytes;
        match (&source, self.store.room()) {
            (UnpackError::Bomb(Bomb::Room(shortage)), _) => return self.disk_full(*shortage),
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
