//! Looking through a whole store: what is damaged, and making it right again.
//!
//! Looking takes no lock, so that nobody waits while a large layer is read: what was found of a layer counts only if that still
//! stood in its place at the end. Repairing marks what is damaged (`damaged/HEX`) and stages its images again; until
//! the new tree is whole and takes the place of the old one in one step, containers start from what is there.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;

use serde::Serialize;

use super::origin::Origin;
use super::record::{ImageRecord, LayerRecord};
use super::select::{Selected, select};
use super::staging::Staging;
use super::survey::Extent;
use super::{Progress, StageError, Store, digests_in, io_error, is_directory};
use crate::ledger::{self, Compared, Flaw, LedgerError, Wrong};
use crate::manifest::{CONFIG_BYTES_MAX, ConfigDocument, Document, MANIFEST_BYTES_MAX};
use crate::registry::{Client, RawManifest};
use crate::{Digest, Platform, Reference};

/// How often a layer is looked at again because it was replaced meanwhile.
const LOOKS_MAX: u32 = 3;

/// What [`Store::examine`] found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Findings {
    /// Whether the content of every file was read.
    pub deep: bool,
    /// Every layer, by the name of its directory.
    pub layers: Vec<LayerFinding>,
    /// Every image.
    pub images: Vec<ImageFinding>,
}

/// How one layer is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct LayerFinding {
    /// What its directory is called.
    pub layer: Digest,
    /// The images that have it; none when it waits to be collected.
    pub images: Vec<Digest>,
    /// In a word.
    pub state: LayerState,
    /// Why it could not be looked at.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    /// Names that were looked at.
    pub names: u64,
    /// Bytes of content that were read.
    pub bytes: u64,
    /// What is wrong with it.
    pub flaws: Vec<Flaw>,
    /// How many more flaws there are.
    pub flaws_left_out: u64,
    /// Which directory it was.
    #[serde(skip)]
    place: Option<(u64, u64)>,
}

/// How a layer is, in a word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum LayerState {
    /// As it was unpacked, as far as was looked.
    Sound,
    /// Not as it was unpacked.
    Damaged,
    /// What its files hold cannot be checked: an older agent unpacked it, which wrote no list of them, or it is too large for one.
    NoLedger,
    /// It could not be looked at.
    Unknown,
}

/// How the documents of an image are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ImageFinding {
    /// What releases name it by.
    pub image: Digest,
    /// As it was asked for; empty when that was lost.
    pub reference: String,
    /// Which of `record`, `index`, `manifest` and `config` are lost or damaged.
    pub damaged: Vec<String>,
}

/// Who is asked for what is damaged.
#[derive(Debug)]
pub struct Sources<'a> {
    /// The registries.
    pub client: &'a Client,
    /// How images are called, for those whose own name leads to no registry.
    pub references: &'a BTreeMap<Digest, Reference>,
    /// What an image is chosen for when its manifest is lost.
    pub platform: &'a Platform,
}

/// What became of something damaged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Repair {
    /// The layer, or the image when only its documents are damaged.
    pub what: Digest,
    /// It is right again.
    pub repaired: bool,
    /// Why not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

impl Findings {
    /// Whether anything is damaged.
    #[must_use]
    pub fn is_damaged(&self) -> bool {
        self.layers
            .iter()
            .any(|layer| layer.state == LayerState::Damaged)
            || self.images.iter().any(|image| !image.damaged.is_empty())
    }
}

impl Store {
    /// Looks through the store: records, documents, and of each layer whether as many names and bytes are there as there were;
    /// with `deep` every file of every layer is read from the medium and compared with what it was. Changes nothing, needs no
    /// network, and holds nobody up. `watch` is told of each layer.
    ///
    /// # Errors
    /// [`StageError::Io`] when the store's own directories cannot be read; what is wrong inside is a finding.
    pub fn examine(
        &self,
        deep: bool,
        watch: &mut dyn FnMut(&LayerFinding),
    ) -> Result<Findings, StageError> {
        let mut findings = Findings {
            deep,
            ..Findings::default()
        };
        let mut users: BTreeMap<Digest, Vec<Digest>> = BTreeMap::new();
        for image in digests_in(&self.root.join("images"))? {
            let record = self.record(&image);
            for layer in record.iter().flat_map(|record| &record.layers) {
                let users = users.entry(layer.key).or_default();
                if users.last() != Some(&image) {
                    users.push(image);
                }
            }
            findings.images.push(self.look_at_image(&image, record));
        }
        let mut keys = digests_in(&self.root.join("layers"))?;
        keys.extend(users.keys());
        for key in keys {
            let mut found = None;
            for _ in 0..LOOKS_MAX {
                found = self.look_at_layer(&key, deep);
                if found.is_some() || !is_directory(&self.layer_path(&key)) {
                    break;
                }
            }
            let images = users.remove(&key).unwrap_or_default();
            // Gone meanwhile, or never whole.
            let Some(mut finding) = found.or_else(|| self.lost(&key, &images)) else {
                continue;
            };
            finding.images = images;
            watch(&finding);
            findings.layers.push(finding);
        }
        Ok(findings)
    }

    fn look_at_image(&self, image: &Digest, record: Option<ImageRecord>) -> ImageFinding {
        let mut damaged = Vec::new();
        if ImageRecord::read(&self.image_path(image), image).is_none() {
            damaged.push("record".to_owned());
        }
        let whole = |digest: &Digest, max| matches!(self.blobs.read(digest, max), Ok(Some(_)));
        if let Some(record) = &record {
            if *image != record.manifest && !whole(image, MANIFEST_BYTES_MAX) {
                damaged.push("index".to_owned());
            }
            if !whole(&record.manifest, MANIFEST_BYTES_MAX) {
                damaged.push("manifest".to_owned());
            }
            if !whole(&record.config, CONFIG_BYTES_MAX) {
                damaged.push("config".to_owned());
            }
        }
        ImageFinding {
            image: *image,
            reference: record.map(|record| record.reference).unwrap_or_default(),
            damaged,
        }
    }

    /// A layer that images have and that is not there.
    fn lost(&self, key: &Digest, images: &[Digest]) -> Option<LayerFinding> {
        // Whoever removed it removed the images first.
        let still = |image: &Digest| self.record(image).is_some_and(|record| has(&record, key));
        images.iter().any(still).then(|| {
            let flaw = Flaw::of_layer(Wrong::Missing);
            finding(key, None, LayerState::Damaged, vec![flaw])
        })
    }

    /// How a layer is; `None` when it did not stay in its place.
    fn look_at_layer(&self, key: &Digest, deep: bool) -> Option<LayerFinding> {
        let place = self.place(key)?;
        let tree = self.layer_path(key);
        let damaged = |flaws: Vec<Flaw>| finding(key, Some(place), LayerState::Damaged, flaws);
        let found = match LayerRecord::read(&self.layer_record_path(key), key) {
            None => damaged(vec![Flaw::of_layer(Wrong::Record)]),
            Some(record) => match (record.ledger, deep) {
                (Some(seal), true) => {
                    let opened = ledger::open(&self.ledger_path(key), &seal);
                    match opened.map_err(LedgerError::Io) {
                        Ok(None) => damaged(vec![Flaw::of_layer(Wrong::Ledger)]),
                        Ok(Some(mut reader)) => {
                            compared(key, place, ledger::compare(&tree, &mut reader))
                        }
                        Err(error) => compared(key, place, Err(error)),
                    }
                }
                (seal, deep) => {
                    let extent = record.extent;
                    let state = match seal {
                        None if deep => LayerState::NoLedger,
                        _ => LayerState::Sound,
                    };
                    match (extent, Extent::of(&tree)) {
                        (Some(expected), Ok(found)) if expected != found => {
                            let flaw = Flaw::of_layer(Wrong::Extent);
                            let flaw = flaw.differing(expected.to_string(), found.to_string());
                            damaged(vec![flaw])
                        }
                        (_, Ok(found)) => LayerFinding {
                            names: found.names(),
                            ..finding(key, Some(place), state, Vec::new())
                        },
                        (_, Err(error)) => compared(key, place, Err(error.into())),
                    }
                }
            },
        };
        (self.place(key) == Some(place)).then_some(found)
    }

    /// Which directory a layer is.
    fn place(&self, key: &Digest) -> Option<(u64, u64)> {
        let meta = fs::symlink_metadata(self.layer_path(key)).ok()?;
        meta.is_dir().then(|| (meta.dev(), meta.ino()))
    }

    /// Makes right what was found to be damaged: marks it and stages its images again, from what is on this disk as far as that
    /// goes. What cannot be had now stays marked, and is fetched when an image that has it is staged next; until then containers start
    /// from what there is. May be killed at any point and called again.
    ///
    /// # Errors
    /// [`StageError::Busy`] when another process stages for too long. [`StageError::Io`] when the store itself cannot be written.
    pub fn repair(
        &self,
        findings: &Findings,
        sources: &Sources<'_>,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Vec<Repair>, StageError> {
        let damaged = self.mark(findings)?;
        let mut images: BTreeSet<Digest> = findings
            .images
            .iter()
            .filter(|image| !image.damaged.is_empty())
            .map(|image| image.image)
            .collect();
        images.extend(damaged.values().flatten());
        let mut failed: BTreeMap<Digest, String> = BTreeMap::new();
        for image in &images {
            if let Err(error) = self.stage_again(image, sources, progress) {
                failed.insert(*image, chain(&error));
            }
        }
        let mut repairs = Vec::new();
        for (layer, images) in &damaged {
            let why = images.iter().find_map(|image| failed.get(image)).cloned();
            if why.is_none() && self.is_damaged(layer) {
                // What its images have now is called otherwise, or there are none.
                self.discard(layer)?;
            }
            let repaired = !self.is_damaged(layer);
            repairs.push(Repair {
                what: *layer,
                repaired,
                why: why.filter(|_| !repaired),
            });
        }
        for image in findings
            .images
            .iter()
            .filter(|image| !image.damaged.is_empty())
        {
            let why = failed.get(&image.image).cloned();
            repairs.push(Repair {
                what: image.image,
                repaired: why.is_none(),
                why,
            });
        }
        Ok(repairs)
    }

    /// Notes which layers are damaged, so that nothing new leans on them and their images are staged again, if they still are
    /// what was looked at; these layers, with their images.
    fn mark(&self, findings: &Findings) -> Result<BTreeMap<Digest, Vec<Digest>>, StageError> {
        let _lock = self.lock()?;
        self.sweep()?;
        let mut damaged = BTreeMap::new();
        for finding in &findings.layers {
            let path = self.damage_mark(&finding.layer);
            if self.place(&finding.layer) != finding.place {
                continue;
            }
            if finding.state == LayerState::Sound && findings.deep && path.exists() {
                // Its new tree came, and then the power was cut.
                fs::remove_file(&path).map_err(|source| io_error("remove", &path, source))?;
            }
            if finding.state != LayerState::Damaged {
                continue;
            }
            // Empty, so it cannot be half written.
            File::create(&path).map_err(|source| io_error("write", &path, source))?;
            damaged.insert(finding.layer, finding.images.clone());
        }
        self.sync("damaged")?;
        Ok(damaged)
    }

    /// Stages an image that has damaged parts.
    fn stage_again(
        &self,
        image: &Digest,
        sources: &Sources<'_>,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<(), StageError> {
        let _lock = self.lock()?;
        self.sweep()?;
        let record = self.record(image);
        let local = record
            .as_ref()
            .and_then(|record| self.selected_here(image, record));
        // Only its own file was lost, or somebody was faster.
        if let Some(record) = &record
            && local.is_some()
            && self.stands(record)?
        {
            let path = self.image_path(image);
            return record
                .write(&path, self.blobs.tmp())
                .map_err(|source| io_error("write", &path, source));
        }
        let name = self.name_of(image, record.as_ref(), sources)?;
        let origin = Origin::Registry(sources.client);
        let selected = match (local, &name) {
            (Some(selected), _) => selected,
            (None, Some(name)) => select(origin, name, sources.platform)?,
            (None, None) => return Err(self.nobody_to_ask(image)),
        };
        let name = match name {
            Some(name) => name,
            None if self.has_blobs(&selected) => {
                let any = Reference::parse("archive").expect("it is a name");
                any.with_digest(*image)
            }
            None => return Err(self.nobody_to_ask(image)),
        };
        Staging::new(self, origin, &name, &selected)?.run(progress)
    }

    /// Whether all layers of an image are here, sound, and what they are above each other.
    fn stands(&self, record: &ImageRecord) -> Result<bool, StageError> {
        let mut lowers: Vec<PathBuf> = Vec::new();
        for placed in &record.layers {
            let Some(found) = self.layer(&placed.key) else {
                return Ok(false);
            };
            let topmost_first: Vec<PathBuf> = lowers.iter().rev().cloned().collect();
            let path = self.layer_path(&placed.key);
            let fits = found.chain_id == placed.chain_id
                || found
                    .unpacked
                    .leans
                    .holds_above(&topmost_first)
                    .map_err(|source| io_error("look at", &path, source))?;
            if found.diff_id != placed.diff_id || !fits {
                return Ok(false);
            }
            lowers.push(path);
        }
        Ok(true)
    }

    /// What an image is asked for by; `None` when it came from an archive and no release names it.
    fn name_of(
        &self,
        image: &Digest,
        record: Option<&ImageRecord>,
        sources: &Sources<'_>,
    ) -> Result<Option<Reference>, StageError> {
        if let Some(name) = sources.references.get(image) {
            return Ok(Some(name.clone()));
        }
        if self.pinned()?.contains(image) {
            return Ok(None);
        }
        let name = record.and_then(|record| Reference::parse(&record.reference).ok());
        Ok(name.map(|name| name.with_digest(*image)))
    }

    fn nobody_to_ask(&self, image: &Digest) -> StageError {
        StageError::NoSource {
            image: image.to_string(),
        }
    }

    /// Whether all layers that have to be unpacked again are still here as they were fetched.
    fn has_blobs(&self, selected: &Selected) -> bool {
        let layers = selected.manifest.layers.iter();
        let mut pairs = layers.zip(&selected.config.rootfs.diff_ids);
        pairs.all(|(layer, diff_id)| {
            self.layer(diff_id).is_some() || self.partials.size(&layer.digest) == layer.size
        })
    }

    /// An image's documents, from this disk.
    fn selected_here(&self, image: &Digest, record: &ImageRecord) -> Option<Selected> {
        let raw = |digest: &Digest| {
            let bytes = self.blobs.read(digest, MANIFEST_BYTES_MAX).ok()??;
            let document = Document::parse(&bytes, None).ok()?;
            let media_type = document.media_type().to_owned();
            let raw = RawManifest {
                digest: *digest,
                media_type,
                bytes,
            };
            Some((raw, document))
        };
        let (root, _) = raw(image)?;
        let (raw, Document::Manifest(manifest)) = raw(&record.manifest)? else {
            return None;
        };
        let config_bytes = self.blobs.read(&record.config, CONFIG_BYTES_MAX).ok()??;
        let config = ConfigDocument::parse(&config_bytes, manifest.layers.len()).ok()?;
        Some(Selected {
            root,
            raw,
            manifest,
            config,
            config_bytes,
        })
    }

    /// Removes a damaged layer that no image has.
    fn discard(&self, layer: &Digest) -> Result<(), StageError> {
        let _lock = self.lock()?;
        for image in digests_in(&self.root.join("images"))? {
            if self
                .record(&image)
                .is_some_and(|record| has(&record, layer))
            {
                return Ok(());
            }
        }
        self.quarantine_layer(layer)?;
        self.remove_layer(layer).map(drop)
    }

    pub(super) fn ledger_path(&self, key: &Digest) -> PathBuf {
        self.root
            .join("layers")
            .join(format!("{}.ledger", key.hex()))
    }

    pub(super) fn damage_mark(&self, key: &Digest) -> PathBuf {
        self.root.join("damaged").join(key.hex())
    }

    /// Whether a layer was found to be damaged and not yet replaced.
    pub(super) fn is_damaged(&self, key: &Digest) -> bool {
        self.damage_mark(key).exists()
    }

    /// Whether an image has such a layer.
    pub(super) fn has_damage(&self, image: &Digest) -> bool {
        let layers = self.record(image).map(|record| record.layers);
        let mut layers = layers.iter().flatten();
        layers.any(|layer| self.is_damaged(&layer.key))
    }

    /// The images that have layers which were found to be damaged and are not yet replaced: they can be started, and should be
    /// staged again.
    #[must_use]
    pub fn damaged(&self) -> BTreeSet<Digest> {
        let none = fs::read_dir(self.root.join("damaged"))
            .map_or(true, |mut entries| entries.next().is_none());
        if none {
            return BTreeSet::new();
        }
        let images = digests_in(&self.root.join("images")).unwrap_or_default();
        let is_damaged = |image: &Digest| self.has_damage(image);
        images.into_iter().filter(is_damaged).collect()
    }
}

fn has(record: &ImageRecord, key: &Digest) -> bool {
    record.layers.iter().any(|layer| layer.key == *key)
}

fn finding(
    key: &Digest,
    place: Option<(u64, u64)>,
    state: LayerState,
    flaws: Vec<Flaw>,
) -> LayerFinding {
    LayerFinding {
        layer: *key,
        images: Vec::new(),
        state,
        why: None,
        names: 0,
        bytes: 0,
        flaws,
        flaws_left_out: 0,
        place,
    }
}

fn compared(
    key: &Digest,
    place: (u64, u64),
    compared: Result<Compared, LedgerError>,
) -> LayerFinding {
    match compared {
        Ok(compared) => {
            let state = if compared.flaws.is_empty() {
                LayerState::Sound
            } else {
                LayerState::Damaged
            };
            LayerFinding {
                names: compared.names,
                bytes: compared.bytes,
                flaws_left_out: compared.left_out,
                ..finding(key, Some(place), state, compared.flaws)
            }
        }
        Err(error) => LayerFinding {
            why: Some(chain(&error)),
            ..finding(key, Some(place), LayerState::Unknown, Vec::new())
        },
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(error) = next {
        text.push_str(": ");
        text.push_str(&error.to_string());
        next = error.source();
    }
    text
}
