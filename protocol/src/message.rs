//! What travels over MQTT between hub and agent. Each is wrapped in a [`crate::frame`].
//!
//! These are the current shapes. Their byte form is postcard, which is not self-describing: fields may
//! only be appended to the end of a top-level struct, and then under a new schema id. `frame` keeps every
//! released shape readable, and `tests/data` keeps its bytes.

use serde::{Deserialize, Serialize};

use crate::Digest;
use crate::cron::Cron;
use crate::id::{AppName, BudgetName, Epoch, Generation, Labels, ServiceName, Version};
use crate::secret::PublicKey;

mod bounds;
mod nodes;

pub use bounds::{
    MAX_APPS, MAX_BUDGETS, MAX_DEV_NODES, MAX_EVENTS, MAX_FACT_BYTES, MAX_GROUP_LABELS, MAX_LABELS,
    MAX_SERVICE_STATES, MAX_TEXT_BYTES, MAX_WINDOW_MS, MAX_ZONE_BYTES, fit,
};
pub use nodes::{DEV_NODE_DEPTH, tells_of};

/// Down, retained: what the device should run, in brief.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    /// Grows with every change.
    pub version: Version,
    /// Every app that selects this device, sorted by name.
    pub apps: Vec<HeadApp>,
    /// The disruption budgets that the device is under, at most [`MAX_BUDGETS`] of them. If there is one, the device
    /// switches to another release of an app only with a [`Lease`].
    pub budgets: Vec<BudgetGroup>,
}

/// A disruption budget that a device is under, and the group of devices that it shares it with.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct BudgetGroup {
    /// Which budget.
    pub budget: BudgetName,
    /// The labels that the group has in common: those of `groupBy`, empty where the device lacks one.
    pub group: Labels,
}

impl std::fmt::Display for BudgetGroup {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "disruption budget {}", self.budget)?;
        for (index, (key, value)) in self.group.iter().enumerate() {
            let before = if index == 0 { ", group " } else { "," };
            write!(f, "{before}{key}={value}")?;
        }
        Ok(())
    }
}

/// Up: the device asks for the right to switch an app to another release, or gives it back.
///
/// With it the device says that it has not begun to switch in this assignment, and that every earlier request of it for
/// the app is void.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseRequest {
    /// As in [`Reported::boot`].
    pub boot: u64,
    /// Grows with every request of this boot.
    pub nonce: u64,
    /// Which app.
    pub app: AppName,
    /// [`HeadApp::since`] of the assignment.
    pub since: Version,
    /// [`HeadApp::release`] of it.
    pub release: Digest,
    /// False: the device does not want to switch any more, or not now.
    pub wanted: bool,
}

/// Down: the right to begin to switch, once.
///
/// It ends `ttl_ms` after the device *sent* the request that it answers, on the device's own clock, and with the agent
/// that sent it. As that was before the hub granted it, the right never outlasts what the hub reckons with, and no two
/// clocks need to agree.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// [`LeaseRequest::boot`] of the request that it answers.
    pub boot: u64,
    /// [`LeaseRequest::nonce`] of it.
    pub nonce: u64,
    /// Which app.
    pub app: AppName,
    /// In which assignment.
    pub since: Version,
    /// To which release.
    pub release: Digest,
    /// How long from sending the request, in milliseconds.
    pub ttl_ms: u64,
}

/// One app in a [`Head`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeadApp {
    /// Which app.
    pub app: AppName,
    /// What to run of it.
    pub release: Digest,
    /// The version in which this app's release was last assigned to this device. A failed
    /// `(since, release)` is poisoned; another app's change does not clear it, as that leaves `since`.
    pub since: Version,
    /// How long all must stay well, in milliseconds.
    pub soak_ms: u64,
    /// How long from switching until every service is ready, in milliseconds.
    pub progress_deadline_ms: u64,
    /// Whether to switch although the app holds its update lock
    /// ([`crate::manifest::Service::update_lock`]): an operator said so.
    pub override_lock: bool,
    /// When the device may begin to switch and to fetch.
    pub windows: Windows,
    /// So many unexpected ends of services during the soak do not fail the release; the soak begins anew after each.
    pub max_restarts: u32,
    /// If the hub is connected when the device switches, it must be reached again within so many milliseconds, or the
    /// release has failed. `None`: it need not.
    pub require_hub_ms: Option<u64>,
}

/// When a device may begin something for a new release of an app. What it has begun is finished; what runs is healed and
/// the way back to the last-known-good is taken at any time.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Windows {
    /// When it may begin to switch. `None`: at any time. With one, the device also needs a [`Lease`], as under a
    /// disruption budget: or all whose window opens at the same time would switch at once.
    pub switch: Option<Window>,
    /// When it may begin to fetch images. `None`: at any time.
    pub fetch: Option<Window>,
}

impl Windows {
    /// Whether anything waits for anything.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.switch.is_none() && self.fetch.is_none()
    }
}

/// Opens at certain minutes of the device's local time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Window {
    /// When it opens.
    pub cron: Cron,
    /// For how long, in milliseconds; at most [`MAX_WINDOW_MS`].
    pub open_ms: u64,
    /// Whose local time.
    pub zone: Zone,
}

/// Whose local time a [`Window`] is in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Zone {
    /// The device's own.
    Device,
    /// That of a POSIX `TZ` string (POSIX.1-2024, "Environment Variables"), for example `CET-1CEST,M3.5.0,M10.5.0/3`: so that
    /// devices need no database of zones. At most [`MAX_ZONE_BYTES`].
    Posix(String),
}

/// Down: something to do or to know once. Not retained.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Command {
    /// The hub has stored these: the device may drop events up to and including `event`, and need not
    /// send a report of sequence `reported` or lower again.
    Ack {
        /// Highest event sequence number below which none is missing.
        event: u64,
        /// Highest report sequence number.
        reported: u64,
        /// The hub's wall clock when this was sent, milliseconds since 1970: for devices whose own is not set.
        unix_ms: u64,
    },
    /// Send a report and all events kept, now.
    Resync,
}

/// Up, retained: what the device says it runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reported {
    /// Counts the agent's starts on this device, across reboots; from 1.
    pub boot: u64,
    /// Grows with every report of this boot.
    pub seq: u64,
    /// The newest desired state that the device has stored; `None` before the first.
    pub version: Option<Version>,
    /// What the device is.
    pub inventory: Inventory,
    /// Every app it runs or should run, sorted by name.
    pub apps: Vec<AppStatus>,
}

/// What a device is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inventory {
    /// Of the agent, for example `0.1.0`.
    pub agent_version: String,
    /// OCI architecture: `amd64`, `arm64` or `arm/v7`.
    pub arch: String,
    /// `uname -r`.
    pub kernel: String,
    /// Total memory in bytes.
    pub memory_bytes: u64,
    /// Size of the file system that holds the state directory, in bytes.
    pub disk_bytes: u64,
    /// Free bytes on it, rounded down to 16 MiB so that it does not change all the time.
    pub disk_free_bytes: u64,
    /// Labels from the device's own configuration. Labels that the operator set on the hub win.
    pub labels: Labels,
    /// Of the free bytes, those that images leave free; `None`: it did not say.
    #[serde(default)]
    pub disk_reserve_bytes: Option<u64>,
    /// Whether its way out is one that costs money, so that it fetches no images now; `None`: it did not say.
    #[serde(default)]
    pub metered: Option<bool>,
    /// The nodes below `/dev` that an app may ask for, sorted, those that [`tells_of`] means; at most [`MAX_DEV_NODES`] of
    /// them. `None`: it did not say, or there are more.
    #[serde(default)]
    pub dev_nodes: Option<Vec<String>>,
}

/// One app in a [`Reported`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AppStatus {
    /// Which app.
    pub app: AppName,
    /// [`HeadApp::since`] of the assignment that `phase` speaks of.
    pub since: Version,
    /// [`HeadApp::release`] of that assignment.
    pub release: Digest,
    /// How far it is.
    pub phase: Phase,
    /// Why, for phases that need a reason.
    pub reason: Option<Reason>,
    /// What actually runs (after a rollback, not `release`).
    pub running: Option<Digest>,
    /// The last release that passed its soak here.
    pub last_known_good: Option<Digest>,
    /// Its services, sorted by name.
    pub services: Vec<ServiceStatus>,
}

/// How far a device is with an assignment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Phase {
    /// Stored. Leaves to `Staging`.
    Accepted,
    /// Will not be tried here (wrong architecture, unknown schema). Final, but for [`ReasonCode::PolicyDenied`]: when the
    /// device's owner allows it after all, it leaves to `Staging`.
    Rejected,
    /// Images are being fetched and unpacked. Leaves to `Activating`, `Blocked` or `Rejected`.
    Staging,
    /// Staging failed for a reason that may pass (registry down, disk full); it is tried again.
    Blocked,
    /// The containers are being replaced. Leaves to `Soaking` when all are ready.
    Activating,
    /// All are ready; they must stay so. Leaves to `Succeeded` or `RolledBack`.
    Soaking,
    /// Passed its soak; it is the last-known-good now. Final.
    Succeeded,
    /// Was not well and the device went back to its last-known-good by itself. Final.
    RolledBack,
    /// Was not well and there was no last-known-good to go back to. Final; restarts go on.
    Failed,
    /// The app no longer selects this device and is being removed.
    Removing,
    /// Nothing is wrong, and the device waits: all is staged and it needs a [`Lease`], or one of its [`Windows`] is closed;
    /// the reason says which. Leaves to `Activating`, or to `Staging` when it waited to fetch.
    Waiting,
}

impl Phase {
    /// Whether this assignment will not change its phase again.
    #[must_use]
    pub const fn is_final(self) -> bool {
        matches!(
            self,
            Self::Rejected | Self::Succeeded | Self::RolledBack | Self::Failed
        )
    }

    /// Whether the device is in the middle of replacing containers.
    #[must_use]
    pub const fn is_switching(self) -> bool {
        matches!(self, Self::Activating | Self::Soaking)
    }
}

/// Why something is not well: a code for programs and a text for people.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reason {
    /// Stable.
    pub code: ReasonCode,
    /// The service concerned.
    pub service: Option<ServiceName>,
    /// For people; names the thing and, where there is one, the way out. At most 512 bytes.
    pub message: String,
}

impl Reason {
    /// A reason whose text is cut to [`MAX_TEXT_BYTES`] between characters.
    #[must_use]
    pub fn new(code: ReasonCode, service: Option<ServiceName>, message: impl Into<String>) -> Self {
        Self {
            code,
            service,
            message: bounds::text(message),
        }
    }
}

/// The stable codes of a [`Reason`]. Append only; never reorder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ReasonCode {
    /// The image is not in the registry, or we may not read it.
    ImageNotFound,
    /// A blob or manifest did not have its digest or size.
    DigestMismatch,
    /// The registry did not answer, or not in time.
    RegistryUnreachable,
    /// The image has no variant for this device's architecture.
    NoMatchingPlatform,
    /// The image is broken or hostile.
    BadImage,
    /// Not enough disk space.
    DiskFull,
    /// The release manifest could not be fetched or decoded.
    BadRelease,
    /// The container could not be created or started.
    StartFailed,
    /// The container ended by itself.
    Exited,
    /// The container was killed for using more memory than its limit.
    OomKilled,
    /// The readiness probe failed.
    NotReady,
    /// Not every service was ready within the progress deadline.
    DeadlineExceeded,
    /// This release already failed on this device in this assignment.
    Poisoned,
    /// State on disk was damaged and has been set aside.
    StateCorrupt,
    /// Anything else; the message says what.
    Internal,
    /// A signal from outside the agent ended the container.
    Signaled,
    /// The liveness or startup probe failed.
    ProbeFailed,
    /// The app holds its update lock.
    UpdateLocked,
    /// The container wrote more to its root file system than it may.
    DiskLimit,
    /// The container was stopped because the device runs out of disk space.
    Evicted,
    /// The device's policy file does not allow what the release asks for.
    PolicyDenied,
    /// A device node that a service needs is not there.
    DeviceMissing,
    /// The device fetches nothing now: its link costs money.
    PullDeferred,
    /// The hub has not sent a secret that a service needs.
    SecretMissing,
    /// The device cannot limit a service's reading and writing as asked: no such disk, or not with its kernel.
    IoLimit,
    /// The device's policy wants a signature that the image does not have.
    ImageUnsigned,
    /// A disruption budget lets others of the device's group go first.
    WaitsForTurn,
    /// The app's window is closed, or the device does not know what time it is.
    WaitsForWindow,
    /// The hub was not reached again since the device switched, and the release must show that it leaves the way open.
    HubUnreachable,
}

/// One service in an [`AppStatus`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceStatus {
    /// Which service.
    pub service: ServiceName,
    /// What its container does.
    pub state: ServiceState,
    /// Whether it is ready.
    pub ready: bool,
    /// How often it was started again since its container's spec last changed.
    pub restarts: u32,
    /// The old container that runs on beside it, if there is one.
    #[serde(default)]
    pub kept: Option<KeptOld>,
}

/// An old container that is kept beside the one that took its place
/// ([`crate::manifest::UpdateConfig::keep_old`]): going back to its release starts nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptOld {
    /// The number of the container.
    pub instance: u64,
    /// The last-known-good release that it is of.
    pub release: Digest,
    /// How long it is kept from when the new one is ready, in milliseconds, and in any case through the trial.
    pub keep_ms: u64,
}

/// What a service's container does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum ServiceState {
    /// Not started yet.
    Waiting,
    /// Runs.
    Running,
    /// Ended; will be started again after a pause.
    BackOff {
        /// Exit code; 128 + signal number if a signal ended it.
        exit_code: i32,
    },
    /// Ended for good, as its restart policy says.
    Exited {
        /// Exit code; 128 + signal number if a signal ended it.
        exit_code: i32,
    },
}

/// Up, QoS 0: a sign of life in about 16 bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Beacon {
    /// As in [`Reported::boot`].
    pub boot: u64,
    /// Grows with every beacon of this boot.
    pub seq: u64,
    /// The newest desired state seen.
    pub version: Option<Version>,
    /// The newest [`Reported::seq`] sent; ahead of the hub's: the hub asks for it.
    pub reported_seq: u64,
    /// The newest [`Event::seq`] made.
    pub event_seq: u64,
    /// Memory in use by containers, MiB.
    pub memory_mib: u32,
    /// One-minute load average in hundredths.
    pub load_centi: u32,
    /// As in [`Presence::secrets`].
    pub secrets: Option<Version>,
}

/// Up, QoS 0, while images are fetched, at most once in two seconds: how far the device is. What is not heard of again
/// within a few of these is over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PullProgress {
    /// As in [`Reported::boot`].
    pub boot: u64,
    /// What needs the images.
    pub release: Digest,
    /// All images of the release, in the order in which they are fetched.
    pub images: Vec<ImagePull>,
    /// Bytes a second, over the last ten seconds.
    pub rate_bytes: u64,
}

/// How far one image of a [`PullProgress`] is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImagePull {
    /// As the release names it; at most 512 bytes of it.
    pub image: String,
    /// How far it is.
    pub state: PullState,
}

/// What a device does with one image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum PullState {
    /// Nothing yet: others come first, or its manifest is being fetched.
    Waiting,
    /// Its layers are fetched and unpacked.
    Fetching {
        /// Compressed bytes that came.
        fetched_bytes: u64,
        /// Compressed bytes that were missing when it began.
        total_bytes: u64,
    },
    /// It is on disk.
    Staged,
}

/// Up, retained, birth and Will: whether the device is connected.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Presence {
    /// Grows with every connection of this device, across reboots. A Will with a lower session than the
    /// birth is stale and ignored.
    pub session: u64,
    /// True in the birth, false in the Will.
    pub online: bool,
    /// As in [`Reported::boot`].
    pub boot: u64,
    /// The newest desired state stored; the hub sends the head again if it has a newer one.
    pub version: Option<Version>,
    /// The newest [`Reported::seq`] made in this boot.
    pub reported_seq: u64,
    /// Highest schema id this agent reads, so that the hub does not speak past it.
    pub max_schema: u16,
    /// Of the agent.
    pub agent_version: String,
    /// What the hub seals this device's secrets to; `None` from a device that could not make or keep a key.
    pub secrets_key: Option<PublicKey>,
    /// The newest bundle of secrets stored ([`crate::secret::Bundle::version`]).
    pub secrets: Option<Version>,
}

/// Up: something that happened. Kept on the device until the hub acknowledges it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Grows by one with every event of this device, across reboots; a gap means that the bounded outbox
    /// dropped events.
    pub seq: u64,
    /// As in [`Reported::boot`].
    pub boot: u64,
    /// The device's wall clock, milliseconds since 1970; may be wrong. The hub stamps receipt.
    pub unix_ms: u64,
    /// Which app, if one.
    pub app: Option<AppName>,
    /// Which service, if one.
    pub service: Option<ServiceName>,
    /// What kind.
    pub kind: EventKind,
    /// For people. At most 512 bytes.
    pub message: String,
}

impl Event {
    /// An event about the device as a whole; its text is cut to [`MAX_TEXT_BYTES`] between characters.
    #[must_use]
    pub fn new(
        seq: u64,
        boot: u64,
        unix_ms: u64,
        kind: EventKind,
        message: impl Into<String>,
    ) -> Self {
        Self {
            seq,
            boot,
            unix_ms,
            app: None,
            service: None,
            kind,
            message: bounds::text(message),
        }
    }

    /// The same event, about an app, or about one service of it.
    #[must_use]
    pub fn about(mut self, app: AppName, service: Option<ServiceName>) -> Self {
        (self.app, self.service) = (Some(app), service);
        self
    }
}

/// Up: events that wait for the hub's acknowledgement, oldest first, at most [`MAX_EVENTS`] of them. They travel together,
/// as each message costs more than an event has to say.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Events {
    /// [`Event::seq`] of the oldest event that the device still keeps: what is missing before it will not come.
    pub kept_from: u64,
    /// By [`Event::seq`].
    pub events: Vec<Event>,
}

/// The kinds of [`Event`]. Append only; never reorder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EventKind {
    /// The agent started.
    AgentStarted,
    /// A desired state was stored.
    Accepted,
    /// An image was fetched and unpacked.
    ImageStaged,
    /// Staging failed and will be tried again.
    StagingFailed,
    /// A container started.
    Started,
    /// A container ended by itself.
    Exited,
    /// A container was killed by the kernel for memory.
    OomKilled,
    /// A service became ready.
    Ready,
    /// A service is no longer ready.
    NotReady,
    /// A release passed its soak.
    Succeeded,
    /// A release was given up and the last-known-good is back.
    RolledBack,
    /// A release was given up and there was nothing to go back to.
    Failed,
    /// A container was stopped and removed on purpose.
    Removed,
    /// Damaged state was set aside.
    StateCorrupt,
    /// The bounded outbox dropped events.
    EventsDropped,
    /// A container that was running when the agent started was taken over again.
    Adopted,
    /// A container was ended by a signal that the agent did not send.
    Signaled,
    /// A container is stopped because its liveness or startup probe failed.
    ProbeFailed,
    /// A container is stopped because it wrote more to its root file system than it may.
    DiskLimit,
    /// A container is stopped because the device runs out of disk space.
    Evicted,
    /// The device is short of disk space, or is not any more.
    DiskPressure,
    /// The state directory takes no writes: the disk is full, read-only or failing. What runs keeps running.
    StateUnwritable,
    /// The state directory takes writes again.
    StateWritable,
    /// A container is stopped, or its files were replaced, because a secret of it has a new value.
    SecretRotated,
    /// An old container runs on beside the one that took its place.
    Kept,
    /// An old container is not kept any more: its time is over, it ended, or it cannot be kept.
    LetGo,
    /// An old container that was kept is its service's own again; it never stopped.
    TakenBack,
}

/// Down, retained: what the hub tells every device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HubInfo {
    /// The hub's epoch.
    pub epoch: Epoch,
    /// The hub's wall clock when this was published, milliseconds since 1970.
    pub unix_ms: u64,
    /// How often to send a beacon, in milliseconds.
    pub beacon_interval_ms: u32,
    /// After a lost connection, wait a random part of this before the first attempt, in milliseconds.
    pub reconnect_spread_ms: u32,
    /// Lowest and highest schema id the hub reads.
    pub schema_range: (u16, u16),
}

impl Version {
    /// A version from plain numbers, for tests and for reading a database.
    ///
    /// # Errors
    ///
    /// When one of them is out of range.
    pub const fn from_numbers(
        epoch: u64,
        generation: u64,
    ) -> Result<Self, crate::id::OrdinalError> {
        match (Epoch::new(epoch), Generation::new(generation)) {
            (Ok(epoch), Ok(generation)) => Ok(Self { epoch, generation }),
            (Err(error), _) | (_, Err(error)) => Err(error),
        }
    }
}
