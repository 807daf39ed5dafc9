//! `foreshore-agent image fsck`: looks through the images of this device, says what is damaged, and makes it right again.
//!
//! It works beside a running agent: looking takes no lock, and what is damaged is replaced in one step while containers run on
//! from the old files.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use foreshore_images::registry::{self, Client};
use foreshore_images::store::{
    Findings, LayerFinding, LayerState, Progress, Repair, Sources, StageError, Store,
};
use foreshore_images::{Digest, Platform, Reference};
use serde::Serialize;

use crate::config::{Config, ConfigError};
use crate::runtime::oci::holders;
use crate::state;

/// How much less than others this is worth to the processor: containers come first.
const NICE: i32 = 10;

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Read every file of every layer.
    pub deep: bool,
    /// Repair what is damaged.
    pub repair: bool,
}

/// What came of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// In a word.
    pub verdict: Verdict,
    /// What was found.
    #[serde(flatten)]
    pub findings: Findings,
    /// What became of what is damaged; empty when nothing was to be repaired.
    pub repairs: Vec<Repair>,
    /// Containers that go on with the old files of a layer until they are started again.
    pub to_restart: BTreeSet<String>,
}

/// How the images are in the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// All that was looked at is as it was unpacked.
    Sound,
    /// Something was damaged and is right again.
    Repaired,
    /// Nothing is known to be damaged, and not everything could be checked.
    NotAllChecked,
    /// Something is damaged.
    Damaged,
}

/// Why nothing was found out.
#[derive(Debug, thiserror::Error)]
pub enum FsckError {
    /// The store itself cannot be used.
    #[error("the images of this device cannot be looked through")]
    Store(#[from] StageError),
    /// The configuration of registries cannot be used.
    #[error("nothing can be fetched with this configuration")]
    Config(#[from] ConfigError),
    /// There is no client with it.
    #[error("nothing can be fetched with this configuration")]
    Client(#[from] registry::ConfigError),
}

/// Looks through the store of a device and repairs it; `watch` is told of each layer that was looked at, `progress` of what is
/// fetched.
///
/// # Errors
///
/// [`FsckError`]. What is damaged and could not be repaired is no error but part of the report.
pub fn run(
    config: &Config,
    store: &Store,
    options: Options,
    watch: &mut dyn FnMut(&LayerFinding),
    progress: &mut dyn FnMut(Progress),
) -> Result<Report, FsckError> {
    let _harmless_if_refused = rustix::process::nice(NICE);
    let findings = store.examine(options.deep, watch)?;
    let repairs = if options.repair && findings.is_damaged() {
        let client = Client::new(config.registry_client()?)?;
        let sources = Sources {
            client: &client,
            references: &references(config),
            platform: &Platform::host(),
        };
        store.repair(&findings, &sources, progress)?
    } else {
        Vec::new()
    };
    let to_restart = if options.repair {
        left(config, store)
    } else {
        BTreeSet::new()
    };
    Ok(Report {
        verdict: verdict(&findings, &repairs),
        findings,
        repairs,
        to_restart,
    })
}

/// Removes old trees that nobody has any more; who has one.
fn left(config: &Config, store: &Store) -> BTreeSet<String> {
    match store.clear_aside(&holders(&config.paths.run)) {
        Ok(left) => left.into_values().flatten().collect(),
        Err(error) => {
            tracing::warn!(
                error = crate::causes::chain(&error),
                "what was set aside stays for now"
            );
            BTreeSet::new()
        }
    }
}

/// How the releases on this device call their images. Without any, images are asked for as they were before.
fn references(config: &Config) -> BTreeMap<Digest, Reference> {
    let peeked = state::peek(&config.paths.state).unwrap_or_default();
    let releases = peeked.releases;
    let services = releases
        .values()
        .flat_map(|release| release.services.values());
    services
        .filter_map(|service| Reference::parse(&service.image).ok())
        .filter_map(|image| Some((image.digest()?, image)))
        .collect()
}

fn verdict(findings: &Findings, repairs: &[Repair]) -> Verdict {
    let is_whole =
        |layer: &LayerFinding| matches!(layer.state, LayerState::Sound | LayerState::Damaged);
    match (findings.is_damaged(), repairs) {
        (true, []) => Verdict::Damaged,
        (true, repairs) if !repairs.iter().all(|repair| repair.repaired) => Verdict::Damaged,
        (true, _) if findings.layers.iter().all(is_whole) => Verdict::Repaired,
        (false, _) if findings.layers.iter().all(is_whole) => Verdict::Sound,
        _ => Verdict::NotAllChecked,
    }
}

impl Verdict {
    /// 0 when all is well, 1 when something is damaged, 3 when not everything could be checked.
    #[must_use]
    pub const fn exit_code(self) -> u8 {
        match self {
            Self::Sound | Self::Repaired => 0,
            Self::Damaged => 1,
            Self::NotAllChecked => 3,
        }
    }
}

impl Report {
    /// For people.
    #[must_use]
    pub fn text(&self) -> String {
        let mut text = String::new();
        for layer in &self.findings.layers {
            self.layer(&mut text, layer);
        }
        for image in &self.findings.images {
            if !image.damaged.is_empty() {
                let what = image.damaged.join(", ");
                let _infallible =
                    writeln!(text, "damaged: {what} of image {}", self.name(&image.image));
                self.became(&mut text, &image.image);
            }
        }
        if !self.to_restart.is_empty() {
            let names: Vec<&str> = self.to_restart.iter().map(String::as_str).collect();
            let _infallible = writeln!(
                text,
                "these containers run on from the old files until they are started again: {}",
                names.join(", ")
            );
        }
        let count = |state| {
            let layers = self.findings.layers.iter();
            layers.filter(|layer| layer.state == state).count()
        };
        let bytes: u64 = self.findings.layers.iter().map(|layer| layer.bytes).sum();
        let names: u64 = self.findings.layers.iter().map(|layer| layer.names).sum();
        let _infallible = writeln!(
            text,
            "{} images, {} layers, {names} names, {} MiB of content read: {} layers damaged, {} not checked",
            self.findings.images.len(),
            self.findings.layers.len(),
            bytes >> 20,
            count(LayerState::Damaged),
            count(LayerState::NoLedger) + count(LayerState::Unknown),
        );
        if !self.findings.deep {
            text.push_str("the content of files was not read; --deep does\n");
        }
        text
    }

    fn layer(&self, text: &mut String, layer: &LayerFinding) {
        let images: Vec<String> = layer.images.iter().map(|image| self.name(image)).collect();
        let of = if images.is_empty() {
            "no image".to_owned()
        } else {
            images.join(", ")
        };
        let mut line = |line: String| {
            let _infallible = writeln!(text, "{line}");
        };
        match layer.state {
            LayerState::Sound => return,
            LayerState::NoLedger => {
                return line(format!(
                    "cannot be checked: layer {} of {of}: there is no list of what its files were; an older agent unpacked it, or it is too large for one",
                    layer.layer
                ));
            }
            LayerState::Unknown => {
                return line(format!(
                    "cannot be checked: layer {} of {of}: {}",
                    layer.layer,
                    layer.why.as_deref().unwrap_or("it could not be read")
                ));
            }
            LayerState::Damaged => line(format!("damaged: layer {} of {of}", layer.layer)),
        }
        for flaw in &layer.flaws {
            let path = match &*flaw.path {
                "" => "the layer itself",
                path => path,
            };
            let wrong = serde_json::to_value(flaw.wrong).unwrap_or_default();
            let mut said = format!("  {path}: {}", wrong.as_str().unwrap_or_default());
            if let (Some(expected), Some(found)) = (&flaw.expected, &flaw.found) {
                said.push_str(&format!(": {found} instead of {expected}"));
            }
            line(said);
        }
        if layer.flaws_left_out > 0 {
            line(format!("  and {} more", layer.flaws_left_out));
        }
        self.became(text, &layer.layer);
    }

    fn became(&self, text: &mut String, what: &Digest) {
        let repair = self.repairs.iter().find(|repair| repair.what == *what);
        let said = match repair {
            Some(repair) if repair.repaired => "repaired".to_owned(),
            Some(repair) => format!(
                "not repaired: {}; containers start from what there is, and it is tried again when the image is staged next",
                repair.why.as_deref().unwrap_or("its images are damaged")
            ),
            None => "not repaired".to_owned(),
        };
        let _infallible = writeln!(text, "  {said}");
    }

    fn name(&self, image: &Digest) -> String {
        let mut images = self.findings.images.iter();
        match images.find(|found| found.image == *image) {
            Some(found) if !found.reference.is_empty() => found.reference.clone(),
            _ => image.to_string(),
        }
    }
}
