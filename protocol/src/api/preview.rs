//! What a release would ask of each device, before anything moves: the `preview` of a [`super::PlanAnswer`].

use serde::{Deserialize, Serialize};

use crate::Digest;
use crate::id::DeviceId;

/// Groups that a [`Downloads`] names.
pub const MAX_DOWNLOAD_GROUPS: usize = 64;

/// Devices that an [`Obstacle`] names.
pub const MAX_NAMED_DEVICES: usize = 100;

/// What a release would ask of the devices that its app selects.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Preview {
    /// How many they are.
    pub devices: u64,
    /// Of them, those that have the release already.
    pub at_release: u64,
    /// What the others would fetch.
    pub download: Downloads,
    /// What stands in the way: first what keeps devices from getting the release, then what delays it, then the rest.
    pub obstacles: Vec<Obstacle>,
}

/// What devices would fetch of images: bytes of compressed layers that are on none of the releases that they have.
///
/// It is an upper bound. A device may have more than the hub can know: layers of older images, parts of a pull that was
/// cut off.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Downloads {
    /// Devices of which it is known what they fetch; it may be nothing.
    pub known_devices: u64,
    /// Devices of which it is not: the image's registry does not answer, or they did not say what they are.
    pub unknown_devices: u64,
    /// All of the known ones together.
    pub total_bytes: u64,
    /// All of them together when they use the deltas that the hub holds.
    pub total_delta_bytes: u64,
    /// The largest share of one device.
    pub most_bytes: u64,
    /// Devices that fetch the same, the largest group first; at most [`MAX_DOWNLOAD_GROUPS`].
    pub groups: Vec<DownloadGroup>,
    /// Groups that are left out.
    pub more_groups: u64,
}

/// Devices of one platform that have the same releases.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DownloadGroup {
    /// As an image has it: `linux/arm64`; missing when they did not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<String>,
    /// The release of the app that they run; missing when they run none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub running: Option<Digest>,
    /// How many they are.
    pub devices: u64,
    /// What each of them fetches at most; missing when it is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
    /// The same when it uses the deltas that the hub holds; missing when those save nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub delta_bytes: Option<u64>,
    /// What each of them must have free, as it reckons itself before it fetches; missing when it is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_bytes: Option<u64>,
    /// Whether the images of some release that they have could not be looked at, so that nothing of it counts as being there.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub incomplete: bool,
}

/// One thing that stands in the way of some devices, or of all.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Obstacle {
    /// Stable.
    pub code: ObstacleCode,
    /// What follows from it.
    pub effect: Effect,
    /// How many devices it concerns.
    pub devices: u64,
    /// What it is and what can be done, for people.
    pub message: String,
    /// Some of the devices, by id; at most [`MAX_NAMED_DEVICES`].
    pub named: Vec<NamedDevice>,
    /// How many are not named.
    pub more: u64,
}

/// A device in an [`Obstacle`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NamedDevice {
    /// Which.
    pub device: DeviceId,
    /// What it lacks, for people; missing when there is nothing to say besides the obstacle's message.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
}

/// What follows from an [`Obstacle`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Effect {
    /// `apply` would be refused.
    Refuses,
    /// The devices would not get the release, or reject it.
    Blocks,
    /// They get it later.
    Delays,
    /// They get it, and it may not do well.
    Risks,
    /// It is worth knowing.
    Informs,
}

/// The stable codes of an [`Obstacle`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ObstacleCode {
    /// The hub does not have a secret that the release names.
    SecretNotSet,
    /// An image has no variant for their processor.
    NoMatchingPlatform,
    /// Less disk is free than staging wants.
    DiskShort,
    /// A device node that a service needs is not there.
    DeviceMissing,
    /// They have shown no key that secrets could be sealed to, or another than the trusted one.
    SecretsKeyMissing,
    /// They are not connected.
    Offline,
    /// An operator holds them.
    Held,
    /// Their link costs money, so they fetch no images now.
    Metered,
    /// Their apps may together use more memory than they have.
    MemoryShort,
    /// They are under none of the hub's disruption budgets.
    NoDisruptionBudget,
    /// They did not say something that would have to be known.
    FactsUnknown,
    /// It is not known what they would fetch.
    DownloadUnknown,
}

impl ObstacleCode {
    /// What follows from it.
    #[must_use]
    pub const fn effect(self) -> Effect {
        match self {
            Self::SecretNotSet => Effect::Refuses,
            Self::NoMatchingPlatform
            | Self::DiskShort
            | Self::DeviceMissing
            | Self::SecretsKeyMissing => Effect::Blocks,
            Self::Offline | Self::Held | Self::Metered => Effect::Delays,
            Self::MemoryShort => Effect::Risks,
            Self::NoDisruptionBudget | Self::FactsUnknown | Self::DownloadUnknown => {
                Effect::Informs
            }
        }
    }

    /// What it is and what can be done, for people.
    #[must_use]
    pub const fn message(self) -> &'static str {
        match self {
            Self::SecretNotSet => {
                "the hub does not have a secret of the release, so `apply` would be refused; set it first: `foreshore secret set`"
            }
            Self::NoMatchingPlatform => {
                "no variant of an image runs on their processor, so they would reject the release; push one for it, or narrow the selector"
            }
            Self::DiskShort => {
                "less disk is free than staging wants, so they would stay blocked until there is room; garbage that they could collect first is not known here"
            }
            Self::DeviceMissing => {
                "a device node that a service needs is not there; plug it in or load its driver, else the release is not well and goes back"
            }
            Self::SecretsKeyMissing => {
                "they have no key that secrets are sealed to, or show another than the trusted one; see `foreshore describe device` and `foreshore device trust-key`"
            }
            Self::Offline => "they are not connected and get the release when they return",
            Self::Held => {
                "an operator holds them; they get the release after `foreshore device release`"
            }
            Self::Metered => {
                "their link costs money, so they fetch nothing until that changes, but from registries that they call unmetered"
            }
            Self::MemoryShort => {
                "their apps may together use more memory than they have (the sum of mem_limit); the kernel then ends one of them"
            }
            Self::NoDisruptionBudget => {
                "none of the hub's disruption budgets holds for them, so only maxUnavailable bounds how many switch at once"
            }
            Self::FactsUnknown => {
                "they did not say something that would have to be known; their agents are older, or they never reported"
            }
            Self::DownloadUnknown => {
                "it is not known what they would fetch: an image could not be looked at, or they did not say what they are"
            }
        }
    }
}
