//! PURE: what a release would ask of each device, before anything moves.
//!
//! Facts come in one device after the other and only counts, groups and a bounded number of names are kept, so the memory
//! that it takes does not grow with the fleet but with how different its devices are. What a device fetches is worked out
//! once for each group of devices of one platform that have the same releases. A fact that is not known is said to be
//! unknown and never guessed.

use std::collections::{BTreeMap, BTreeSet};

use foreshore_images::store::{DELTAS_LOOKED_AT, DELTAS_WORTH_ASKING, FETCHED_AT_ONCE, LayerAhead};
use foreshore_protocol::api::{
    DownloadGroup, MAX_DOWNLOAD_GROUPS, MAX_NAMED_DEVICES, NamedDevice, Obstacle, ObstacleCode,
    Preview,
};
use foreshore_protocol::message::{Inventory, tells_of};
use foreshore_protocol::release::Release;
use foreshore_protocol::{DeviceId, Digest};

#[cfg(test)]
mod tests;

/// Groups whose download is remembered; more are worked out again for each device.
const GROUPS_KEPT: usize = 4096;

/// What the release asks of every device.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wants {
    /// The images as the release names them, in the order in which devices fetch them.
    pub images: BTreeSet<String>,
    /// The sum of its services' `mem_limit`.
    pub memory_bytes: u64,
    /// What old containers may use that run on beside the new ones (`keep_old`): as much as the new ones of their services,
    /// since nobody knows better here.
    pub kept_bytes: u64,
    /// The device nodes of its services.
    pub nodes: BTreeSet<String>,
    /// Whether devices need a key for it.
    pub secrets: bool,
    /// Whether the hub has any disruption budget.
    pub budgets: bool,
}

impl Wants {
    /// Of a release whose images are pinned.
    #[must_use]
    pub fn of(release: &Release, budgets: bool) -> Self {
        let services = || release.services.values();
        let nodes = services().flat_map(|service| &service.devices);
        Self {
            images: services().map(|service| service.image.clone()).collect(),
            memory_bytes: memory_of(release),
            kept_bytes: services()
                .filter(|service| service.deploy.update_config.keep_old_ms().is_some())
                .fold(0, |sum, service| sum.saturating_add(service.mem_limit.0)),
            nodes: nodes.map(|device| device.source.clone()).collect(),
            secrets: !release.image_pull_secrets.is_empty()
                || services().any(|service| !service.secrets.is_empty()),
            budgets,
        }
    }
}

/// The sum of the `mem_limit` of a release's services.
#[must_use]
pub fn memory_of(release: &Release) -> u64 {
    let limits = release.services.values();
    limits.fold(0_u64, |sum, service| {
        sum.saturating_add(service.mem_limit.0)
    })
}

/// What one image is for one platform.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Image {
    /// This.
    Known {
        /// Lowest first.
        layers: Vec<LayerAhead>,
        /// The deltas that the hub holds for it.
        deltas: Vec<Vec<DeltaLayer>>,
    },
    /// Nothing of it runs there.
    NoPlatform,
    /// It could not be looked at.
    Unknown,
}

/// One layer of a delta.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeltaLayer {
    /// Which layer it makes.
    pub diff_id: Digest,
    /// Which layers must be there.
    pub leans_on: Vec<Digest>,
    /// Of its blob.
    pub bytes: u64,
}

/// What is known of images.
#[derive(Debug, Clone, Default)]
pub struct Known {
    /// By image and platform. What is not here is unknown.
    pub images: BTreeMap<(String, String), Image>,
    /// The images of releases that devices have. What is not here is unknown.
    pub releases: BTreeMap<Digest, BTreeSet<String>>,
}

/// What is known of one device.
#[derive(Debug, Clone)]
pub struct Device {
    /// Which.
    pub id: DeviceId,
    /// Whether it is connected.
    pub online: bool,
    /// Why an operator holds it.
    pub held: Option<String>,
    /// What it said it is.
    pub inventory: Option<Inventory>,
    /// The releases of any app that it says it runs or goes back to: their images are never collected.
    pub on_disk: BTreeSet<Digest>,
    /// The release of this app that it runs.
    pub running: Option<Digest>,
    /// It has the release, and it passed there.
    pub at_release: bool,
    /// What its other apps may use; `None` when that is not known.
    pub others_memory_bytes: Option<u64>,
    /// Whether secrets can be sealed to it.
    pub has_key: bool,
    /// Whether any disruption budget holds for it.
    pub has_budget: bool,
}

/// The platform of a device, as images have it; `None` when it did not say.
#[must_use]
pub fn platform(inventory: Option<&Inventory>) -> Option<String> {
    let arch = &inventory?.arch;
    (!arch.is_empty()).then(|| format!("linux/{arch}"))
}

/// What a device of some group fetches, and what it needs for that.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Cost {
    /// `None`: not known.
    fetched: Option<Fetched>,
    incomplete: bool,
    /// Images of which nothing runs there.
    unfit: Vec<String>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Fetched {
    bytes: u64,
    /// With deltas.
    delta_bytes: u64,
    /// What must be free.
    disk_bytes: u64,
}

#[derive(Debug, Default)]
struct Concerned {
    devices: u64,
    named: Vec<NamedDevice>,
}

type GroupKey = (Option<String>, Option<Digest>, BTreeSet<Digest>);

/// A preview in the making.
#[derive(Debug)]
pub struct Draft<'a> {
    wants: &'a Wants,
    known: &'a Known,
    groups: BTreeMap<GroupKey, (Cost, u64)>,
    /// Devices of groups beyond those that are kept.
    beyond: u64,
    obstacles: BTreeMap<ObstacleCode, Concerned>,
    preview: Preview,
}

impl<'a> Draft<'a> {
    /// With no device yet.
    #[must_use]
    pub fn new(wants: &'a Wants, known: &'a Known) -> Self {
        Self {
            wants,
            known,
            groups: BTreeMap::new(),
            beyond: 0,
            obstacles: BTreeMap::new(),
            preview: Preview::default(),
        }
    }

    /// Takes in a device that the app selects. Each once, by id.
    pub fn add(&mut self, device: &Device) {
        self.preview.devices += 1;
        if device.at_release {
            self.preview.at_release += 1;
            return;
        }
        let cost = self.download(device);
        self.whereabouts(device);
        self.room(device, &cost);
        self.equipment(device, &cost);
    }

    /// Ends it. `unset` are the secrets of the release that the hub does not have.
    #[must_use]
    pub fn finish(mut self, unset: &[String]) -> Preview {
        if !unset.is_empty() {
            let needy = self.preview.devices;
            let concerned = self
                .obstacles
                .entry(ObstacleCode::SecretNotSet)
                .or_default();
            concerned.devices = needy;
        }
        let groups = std::mem::take(&mut self.groups);
        let left_out = groups.len().saturating_sub(MAX_DOWNLOAD_GROUPS);
        self.preview.download.more_groups =
            u64::try_from(left_out).unwrap_or(u64::MAX) + u64::from(self.beyond > 0);
        let mut groups: Vec<_> = groups.into_iter().map(group).collect();
        // Stable: equally large ones stay in the order of their keys.
        groups.sort_by_key(|group| std::cmp::Reverse(group.devices));
        groups.truncate(MAX_DOWNLOAD_GROUPS);
        self.preview.download.groups = groups;
        let obstacles = std::mem::take(&mut self.obstacles).into_iter();
        let mut obstacles: Vec<_> = obstacles
            .map(|(code, concerned)| obstacle(code, concerned, unset))
            .collect();
        obstacles.sort_by_key(|obstacle| (obstacle.effect, obstacle.code));
        self.preview.obstacles = obstacles;
        self.preview
    }

    fn note(&mut self, code: ObstacleCode, device: &Device, detail: Option<String>) {
        let concerned = self.obstacles.entry(code).or_default();
        concerned.devices += 1;
        if concerned.named.len() < MAX_NAMED_DEVICES {
            concerned.named.push(NamedDevice {
                device: device.id.clone(),
                detail,
            });
        }
    }

    fn download(&mut self, device: &Device) -> Cost {
        let platform = platform(device.inventory.as_ref());
        let key = (platform, device.running, device.on_disk.clone());
        let cost = if let Some((cost, devices)) = self.groups.get_mut(&key) {
            *devices += 1;
            cost.clone()
        } else {
            let cost = cost(self.wants, self.known, key.0.as_deref(), &device.on_disk);
            if self.groups.len() < GROUPS_KEPT {
                self.groups.insert(key, (cost.clone(), 1));
            } else {
                self.beyond += 1;
            }
            cost
        };
        let download = &mut self.preview.download;
        match cost.fetched {
            Some(fetched) => {
                download.known_devices += 1;
                download.total_bytes = download.total_bytes.saturating_add(fetched.bytes);
                download.total_delta_bytes = download
                    .total_delta_bytes
                    .saturating_add(fetched.delta_bytes);
                download.most_bytes = download.most_bytes.max(fetched.bytes);
            }
            None if cost.unfit.is_empty() => {
                download.unknown_devices += 1;
                self.note(ObstacleCode::DownloadUnknown, device, None);
            }
            // It would fetch nothing.
            None => {}
        }
        cost
    }

    fn whereabouts(&mut self, device: &Device) {
        if !device.online {
            self.note(ObstacleCode::Offline, device, None);
        }
        if let Some(why) = &device.held {
            let detail = (!why.is_empty()).then(|| why.clone());
            self.note(ObstacleCode::Held, device, detail);
        }
        if self.wants.secrets && !device.has_key {
            self.note(ObstacleCode::SecretsKeyMissing, device, None);
        }
        if self.wants.budgets && !device.has_budget {
            self.note(ObstacleCode::NoDisruptionBudget, device, None);
        }
    }

    fn room(&mut self, device: &Device, cost: &Cost) {
        let Some(inventory) = &device.inventory else {
            let detail = "it has never reported what it is".to_owned();
            self.note(ObstacleCode::FactsUnknown, device, Some(detail));
            return;
        };
        let needed = cost.fetched.map_or(0, |fetched| fetched.disk_bytes);
        let free = (inventory.disk_bytes > 0).then_some(inventory.disk_free_bytes);
        if let (Some(free), Some(reserve)) = (free, inventory.disk_reserve_bytes)
            && needed > 0
            && free < reserve.saturating_add(needed)
        {
            let detail = format!(
                "about {needed} bytes are needed, {free} are free and {reserve} of them are kept in reserve"
            );
            self.note(ObstacleCode::DiskShort, device, Some(detail));
        }
        let memory = (inventory.memory_bytes > 0).then_some(inventory.memory_bytes);
        if let (Some(has), Some(others)) = (memory, device.others_memory_bytes) {
            // Where nothing of the app runs, nothing is kept.
            let kept = device.running.map_or(0, |_| self.wants.kept_bytes);
            let all = others
                .saturating_add(self.wants.memory_bytes)
                .saturating_add(kept);
            if all > has {
                let kept = match kept {
                    0 => String::new(),
                    kept => format!(", {kept} of them for old containers (keep_old)"),
                };
                let detail = format!("{all} bytes of {has}{kept}");
                self.note(ObstacleCode::MemoryShort, device, Some(detail));
            }
        }
        let fetches = cost.fetched.is_none_or(|fetched| fetched.bytes > 0);
        if inventory.metered == Some(true) && fetches && cost.unfit.is_empty() {
            self.note(ObstacleCode::Metered, device, None);
        }
        let unknown: Vec<&str> = [
            (platform(Some(inventory)).is_none(), "processor"),
            (
                needed > 0 && (free.is_none() || inventory.disk_reserve_bytes.is_none()),
                "free disk",
            ),
            (
                memory.is_none() || device.others_memory_bytes.is_none(),
                "memory",
            ),
            (inventory.metered.is_none(), "whether its link is metered"),
            (self.untold_nodes(inventory), "device nodes"),
        ]
        .into_iter()
        .filter_map(|(is_unknown, what)| is_unknown.then_some(what))
        .collect();
        if !unknown.is_empty() {
            let detail = Some(unknown.join(", "));
            self.note(ObstacleCode::FactsUnknown, device, detail);
        }
    }

    /// Whether a node that the release needs is one that the device does not tell of.
    fn untold_nodes(&self, inventory: &Inventory) -> bool {
        let mut nodes = self.wants.nodes.iter();
        nodes.any(|node| inventory.dev_nodes.is_none() || !tells_of(node))
    }

    fn equipment(&mut self, device: &Device, cost: &Cost) {
        if !cost.unfit.is_empty() {
            let arch = platform(device.inventory.as_ref()).unwrap_or_default();
            let detail = format!("{} for {arch}", cost.unfit.join(", "));
            self.note(ObstacleCode::NoMatchingPlatform, device, Some(detail));
        }
        let there = device
            .inventory
            .as_ref()
            .and_then(|inventory| inventory.dev_nodes.as_ref());
        if let Some(there) = there {
            let wants = self.wants;
            let missing: Vec<&str> = wants
                .nodes
                .iter()
                .filter(|node| tells_of(node) && !there.contains(node))
                .map(String::as_str)
                .collect();
            if !missing.is_empty() {
                self.note(
                    ObstacleCode::DeviceMissing,
                    device,
                    Some(missing.join(", ")),
                );
            }
        }
    }
}

fn group(((platform, running, _), (cost, devices)): (GroupKey, (Cost, u64))) -> DownloadGroup {
    let fetched = cost.fetched;
    DownloadGroup {
        platform,
        running,
        devices,
        bytes: fetched.map(|fetched| fetched.bytes),
        delta_bytes: fetched
            .filter(|fetched| fetched.delta_bytes < fetched.bytes)
            .map(|fetched| fetched.delta_bytes),
        disk_bytes: fetched.map(|fetched| fetched.disk_bytes),
        incomplete: cost.incomplete,
    }
}

fn obstacle(code: ObstacleCode, concerned: Concerned, unset: &[String]) -> Obstacle {
    let message = if code == ObstacleCode::SecretNotSet {
        format!("{}: {}", code.message(), unset.join(", "))
    } else {
        code.message().to_owned()
    };
    let named = u64::try_from(concerned.named.len()).unwrap_or(u64::MAX);
    Obstacle {
        code,
        effect: code.effect(),
        devices: concerned.devices,
        message,
        more: concerned.devices.saturating_sub(named),
        named: concerned.named,
    }
}

/// What a device of this platform fetches that has these releases, as its agent would: image by image, layer by layer.
fn cost(wants: &Wants, known: &Known, platform: Option<&str>, on_disk: &BTreeSet<Digest>) -> Cost {
    let Some(platform) = platform else {
        return Cost::default();
    };
    let image = |name: &String| {
        let found = known.images.get(&(name.clone(), platform.to_owned()));
        found.unwrap_or(&Image::Unknown)
    };
    let mut here: BTreeSet<Digest> = BTreeSet::new();
    let mut incomplete = false;
    for release in on_disk {
        let Some(images) = known.releases.get(release) else {
            incomplete = true;
            continue;
        };
        for name in images {
            match image(name) {
                Image::Known { layers, .. } => here.extend(layers.iter().map(|l| l.diff_id)),
                // It runs there, so something of it fits; perhaps its index has changed hands.
                Image::NoPlatform | Image::Unknown => incomplete = true,
            }
        }
    }
    let is_unfit = |name: &&String| *image(name) == Image::NoPlatform;
    let unfit: Vec<String> = wants.images.iter().filter(is_unfit).cloned().collect();
    let mut fetched = Some(Fetched::default());
    if !unfit.is_empty() {
        fetched = None;
    }
    let mut unpacked_before = 0_u64;
    for name in &wants.images {
        let Image::Known { layers, deltas } = image(name) else {
            fetched = None;
            continue;
        };
        let ahead = missing(layers, &here);
        if let Some(sum) = &mut fetched {
            let share = share(&ahead, deltas, &here);
            sum.bytes = sum.bytes.saturating_add(share.bytes);
            sum.delta_bytes = sum.delta_bytes.saturating_add(share.delta_bytes);
            let needed = unpacked_before.saturating_add(share.disk_bytes);
            sum.disk_bytes = sum.disk_bytes.max(needed);
            unpacked_before = unpacked_before.saturating_add(unpacked(&ahead));
        }
        here.extend(layers.iter().map(|layer| layer.diff_id));
    }
    Cost {
        fetched,
        incomplete,
        unfit,
    }
}

/// The layers that are not here, each blob once.
fn missing<'l>(layers: &'l [LayerAhead], here: &BTreeSet<Digest>) -> Vec<&'l LayerAhead> {
    let mut seen = BTreeSet::new();
    layers
        .iter()
        .filter(|layer| !here.contains(&layer.diff_id) && seen.insert(layer.digest))
        .collect()
}

fn unpacked(ahead: &[&LayerAhead]) -> u64 {
    ahead.iter().fold(0, |sum: u64, layer| {
        sum.saturating_add(layer.unpacked_bytes)
    })
}

/// What one image takes.
fn share(ahead: &[&LayerAhead], deltas: &[Vec<DeltaLayer>], here: &BTreeSet<Digest>) -> Fetched {
    let bytes = ahead
        .iter()
        .fold(0_u64, |sum, layer| sum.saturating_add(layer.bytes));
    let mut largest: Vec<u64> = ahead.iter().map(|layer| layer.bytes).collect();
    largest.sort_unstable_by_key(|bytes| std::cmp::Reverse(*bytes));
    let on_the_way = largest
        .iter()
        .take(FETCHED_AT_ONCE)
        .fold(0_u64, |sum, bytes| sum.saturating_add(*bytes));
    let saved = if here.is_empty() || bytes < DELTAS_WORTH_ASKING {
        0
    } else {
        let all = deltas.iter().take(DELTAS_LOOKED_AT);
        all.map(|delta| saving(ahead, delta, here))
            .max()
            .unwrap_or(0)
    };
    Fetched {
        bytes,
        delta_bytes: bytes.saturating_sub(saved),
        disk_bytes: unpacked(ahead).saturating_add(on_the_way),
    }
}

/// How many bytes less come with this delta.
fn saving(ahead: &[&LayerAhead], delta: &[DeltaLayer], here: &BTreeSet<Digest>) -> u64 {
    let mut made = BTreeSet::new();
    delta.iter().fold(0, |sum: u64, layer| {
        let whole = ahead
            .iter()
            .find(|whole| whole.diff_id == layer.diff_id && layer.bytes < whole.bytes);
        let usable = layer.leans_on.iter().all(|tree| here.contains(tree));
        match whole {
            Some(whole) if usable && made.insert(whole.diff_id) => {
                sum.saturating_add(whole.bytes - layer.bytes)
            }
            Some(_) | None => sum,
        }
    })
}
