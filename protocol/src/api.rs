//! The JSON of the hub's REST API under `/api/v1`, shared by hub and command line.
//!
//! | method and path | body → answer |
//! |---|---|
//! | `PUT /apps/{app}` | manifest (YAML or JSON) → [`ApplyAnswer`] |
//! | `POST /apps/{app}/plan` | manifest → [`PlanAnswer`]; changes nothing |
//! | `GET /apps`, `GET /apps/{app}` | → [`AppView`]s |
//! | `DELETE /apps/{app}` | → 202 |
//! | `POST /apps/{app}/undo` | → [`ApplyAnswer`]: a rollout to the release before |
//! | `GET /devices`, `GET /devices/{device}` | → [`DeviceView`]s |
//! | `PATCH /devices/{device}/labels` | [`LabelPatch`] → [`DeviceView`] |
//! | `POST /devices/{device}/trust-key` | → [`DeviceView`]: secrets are sealed to the key that it shows now |
//! | `DELETE /devices/{device}` | → 204: forget a device that is offline |
//! | `GET /secrets`, `GET /secrets/{secret}` | → [`SecretView`]s; never a value |
//! | `PUT /secrets/{secret}` | the value, 1 to 4096 bytes as they are → [`SecretView`] |
//! | `DELETE /secrets/{secret}` | → 204; 409 `secret-in-use` while an app needs it |
//! | `GET /disruption-budgets`, `GET /disruption-budgets/{budget}` | → [`BudgetView`]s; groups only in the second |
//! | `PUT /disruption-budgets/{budget}` | manifest → [`BudgetAnswer`] |
//! | `DELETE /disruption-budgets/{budget}` | → 204 |
//! | `GET /leases` | → [`LeaseView`]s: who may switch and who waits, in the order of their turns |
//! | `DELETE /leases/{device}` | → 204: the device is written off; 404 `no-lease` if it holds none |
//! | `GET /rollouts?app=`, `GET /rollouts/{id}` | → [`RolloutView`]s, newest first |
//! | `POST /rollouts/{id}/pause`, `/resume`, `/abort` | → [`RolloutView`] |
//! | `GET /events?after=&limit=` | → [`EventView`]s |
//! | `GET /events/stream?after=` | server-sent events: `id:` is the event id, `data:` an [`EventView`] |
//! | `GET /images` | → [`ImageView`]s |
//! | `POST /images?name=NAME:TAG` | tar of an OCI layout or docker-archive → [`ImageView`] |
//! | `DELETE /images/NAME:TAG` | → 204; 409 `image-in-use` while an app needs it |
//! | `GET /info` | → [`HubView`] |
//!
//! Lists are `{"items": […]}`. Errors are `application/problem+json` ([`Problem`], RFC 9457). Every call
//! but `/healthz`, `/readyz` needs `Authorization: Bearer TOKEN`.

use serde::{Deserialize, Serialize};

mod preview;

pub use preview::{
    DownloadGroup, Downloads, Effect, MAX_DOWNLOAD_GROUPS, MAX_NAMED_DEVICES, NamedDevice,
    Obstacle, ObstacleCode, Preview,
};

use crate::Digest;
use crate::id::{
    AppName, BudgetName, DeviceId, Epoch, LabelKey, LabelValue, Labels, SecretName, ServiceName,
    Version,
};
use crate::manifest::{App, DisruptionBudget, WaveTarget};
use crate::message::{AppStatus, BudgetGroup, Inventory, Phase, PullProgress, PullState};

/// A list, so that fields can be added beside it later.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct List<T> {
    /// The members.
    pub items: Vec<T>,
}

/// An error (RFC 9457). `code` is stable; `title` and `detail` are for people.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// `https://foreshore.dev/problems/{code}`; a name, not a page that must exist.
    #[serde(rename = "type")]
    pub kind: String,
    /// The short form, the same for every error of this code.
    pub title: String,
    /// The HTTP status.
    pub status: u16,
    /// What happened here, naming the thing and the way out.
    pub detail: String,
    /// Stable, kebab-case, for example `unknown-image`.
    pub code: String,
    /// Where in the manifest, from 1, if that is where the error is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub line: Option<u64>,
    /// Where in the manifest, from 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub column: Option<u64>,
}

/// The hub itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HubView {
    /// Of the hub's program.
    pub version: String,
    /// Of its database.
    pub epoch: Epoch,
    /// `embedded` or `external`.
    pub broker: String,
    /// Known devices.
    pub devices: u64,
    /// Connected devices.
    pub devices_online: u64,
}

/// What `apply` did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ApplyAnswer {
    /// Which app.
    pub app: AppName,
    /// The release it is at or moving to.
    pub release: Digest,
    /// The rollout that was opened; `None` when nothing changed.
    pub rollout: Option<u64>,
    /// What happened.
    pub outcome: ApplyOutcome,
    /// How many devices the app selects now.
    pub devices: u64,
}

/// What `apply` did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ApplyOutcome {
    /// The app is new.
    Created,
    /// A rollout to a new release was opened.
    Updated,
    /// Same release, but the selector or the rollout policy changed.
    Reconfigured,
    /// Nothing changed.
    Unchanged,
}

/// What `apply` would do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PlanAnswer {
    /// Which app.
    pub app: AppName,
    /// The release of today; `None` for a new app.
    pub current: Option<Digest>,
    /// The release it would get.
    pub release: Digest,
    /// What `apply` would answer.
    pub outcome: ApplyOutcome,
    /// What would change per service.
    pub services: Vec<ServiceChange>,
    /// Each wave with its devices, in order.
    pub waves: Vec<PlanWave>,
    /// Things worth knowing before, for example that a rollout is under way.
    pub warnings: Vec<String>,
    /// What it would ask of each device. Missing from an older hub.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub preview: Option<Preview>,
}

/// A wave in a [`PlanAnswer`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PlanWave {
    /// From 1.
    pub ordinal: u32,
    /// As written, or the implied 100 %.
    pub target: WaveTarget,
    /// Its devices. The order of a real rollout depends on a seed drawn then; this is one possible draw.
    pub devices: Vec<DeviceId>,
}

/// What would change for one service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceChange {
    /// Which service.
    pub service: ServiceName,
    /// How.
    pub change: Change,
    /// The keys that differ, for `Changed`.
    pub fields: Vec<String>,
}

/// How a service differs between two releases.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Change {
    /// Only in the new one.
    Added,
    /// Only in the old one.
    Removed,
    /// In both, different: its container is replaced.
    Changed,
    /// In both, the same: its container keeps running.
    Unchanged,
}

/// An app.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AppView {
    /// Its name.
    pub name: AppName,
    /// The release that new devices get: the target of the newest rollout that was not given up.
    pub release: Digest,
    /// The manifest as applied last.
    pub manifest: App,
    /// Devices selected.
    pub devices: u64,
    /// Devices that report `release` as succeeded.
    pub up_to_date: u64,
    /// The newest rollout.
    pub rollout: Option<RolloutSummary>,
    /// Milliseconds since 1970.
    pub created_ms: u64,
    /// Milliseconds since 1970.
    pub updated_ms: u64,
    /// Being removed from its devices; gone when the last has said so.
    pub deleting: bool,
}

/// A rollout in brief.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RolloutSummary {
    /// Its id.
    pub id: u64,
    /// Its state.
    pub state: RolloutState,
    /// Why it is paused or stopped, for people.
    pub message: Option<String>,
}

/// A device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DeviceView {
    /// Its id.
    pub id: DeviceId,
    /// Whether it is connected.
    pub online: bool,
    /// When it was last heard of, milliseconds since 1970.
    pub last_seen_ms: Option<u64>,
    /// Its labels, the operator's over its own.
    pub labels: Labels,
    /// What it should run.
    pub desired: Option<Version>,
    /// What it has stored.
    pub reported: Option<Version>,
    /// What it is.
    pub inventory: Option<Inventory>,
    /// What it says of its apps.
    pub apps: Vec<AppStatus>,
    /// The key that its secrets are sealed to: a fingerprint. Missing before it showed one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secrets_key: Option<String>,
    /// What it fetches right now. Known for a few seconds after it last said so, and not kept by the hub.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pull: Option<PullView>,
    /// An operator holds it, so no rollout offers it anything; why, which may be empty.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held: Option<String>,
    /// Another key that it shows now. It gets no secrets until an operator trusts that one, or it shows the old one again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub untrusted_key: Option<String>,
}

/// Why a device runs what it runs: what `GET /devices/{device}/explain` answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ExplainView {
    /// Which device.
    pub device: DeviceId,
    /// What is true of it as a whole: connection, hold, desired state.
    pub steps: Vec<ExplainStep>,
    /// Each app that selects it or is on it, by name.
    pub apps: Vec<ExplainApp>,
}

/// One app in an [`ExplainView`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ExplainApp {
    /// Which app.
    pub app: AppName,
    /// The chain from what was applied to what runs, in order. The first link that waits for something is the last.
    pub steps: Vec<ExplainStep>,
}

/// One link of a chain of causes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ExplainStep {
    /// What is so, for people.
    pub what: String,
    /// What must happen before it goes on; missing when nothing must.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waits_for: Option<String>,
}

/// What `POST /devices/{device}/hold` takes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct HoldRequest {
    /// For people; what exceeds 512 bytes is cut off.
    #[serde(default)]
    pub reason: String,
}

/// The images of a release that a device is fetching.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PullView {
    /// What needs them.
    pub release: Digest,
    /// Bytes a second, over the last ten seconds.
    pub rate_bytes: u64,
    /// In the order in which they are fetched.
    pub images: Vec<ImagePullView>,
}

/// How far one image of a [`PullView`] is. Bytes are of compressed layers, and only of those that the device did not
/// have when it began.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ImagePullView {
    /// As the release names it.
    pub image: String,
    /// How far it is.
    pub state: ImagePullState,
    /// Bytes that came; missing before it is known what must come, and once all is there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fetched_bytes: Option<u64>,
    /// Bytes that must come; missing as above.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total_bytes: Option<u64>,
    /// Seconds until they are here at the rate of now; missing as above, and while nothing comes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remaining_s: Option<u64>,
}

/// What a device does with one image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ImagePullState {
    /// Nothing yet: others come first, or its manifest is being fetched.
    Waiting,
    /// Its layers are fetched and unpacked.
    Fetching,
    /// It is on disk.
    Staged,
}

impl From<&PullProgress> for PullView {
    fn from(progress: &PullProgress) -> Self {
        let rate_bytes = progress.rate_bytes;
        let image = |pull: &crate::message::ImagePull| {
            let (state, bytes) = match pull.state {
                PullState::Waiting => (ImagePullState::Waiting, None),
                // What came wrong came twice.
                PullState::Fetching {
                    fetched_bytes,
                    total_bytes,
                } => (
                    ImagePullState::Fetching,
                    Some((fetched_bytes.min(total_bytes), total_bytes)),
                ),
                PullState::Staged => (ImagePullState::Staged, None),
            };
            ImagePullView {
                image: pull.image.clone(),
                state,
                fetched_bytes: bytes.map(|(fetched, _)| fetched),
                total_bytes: bytes.map(|(_, total)| total),
                remaining_s: bytes
                    .filter(|_| rate_bytes > 0)
                    .map(|(fetched, total)| (total - fetched).div_ceil(rate_bytes)),
            }
        };
        Self {
            release: progress.release,
            rate_bytes,
            images: progress.images.iter().map(image).collect(),
        }
    }
}

/// A secret, without its value: that is told to nobody but the devices that need it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SecretView {
    /// Its name.
    pub name: SecretName,
    /// Grows with every change of any secret.
    pub revision: u64,
    /// Bytes of its value.
    pub size: u64,
    /// The apps that use it: those that name it, or have a release that does and is still needed.
    pub apps: Vec<AppName>,
    /// When it was first set, milliseconds since 1970.
    pub created_ms: u64,
    /// When its value last changed, milliseconds since 1970.
    pub changed_ms: u64,
}

/// What `apply` did to a disruption budget.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BudgetAnswer {
    /// Which budget.
    pub budget: BudgetName,
    /// `created`, `updated` or `unchanged`.
    pub outcome: ApplyOutcome,
    /// How many devices it holds for now.
    pub devices: u64,
    /// In how many groups.
    pub groups: u64,
}

/// A disruption budget.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BudgetView {
    /// Its name.
    pub name: BudgetName,
    /// The manifest as applied last.
    pub manifest: DisruptionBudget,
    /// Devices that it holds for.
    pub devices: u64,
    /// Of them, unavailable now.
    pub unavailable: u64,
    /// Of them, waiting for their turn.
    pub waiting: u64,
    /// Milliseconds since 1970.
    pub created_ms: u64,
    /// Milliseconds since 1970.
    pub updated_ms: u64,
    /// Its groups, by their labels. Left out in a list.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub groups: Vec<GroupView>,
}

/// A group of devices that share a disruption budget.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GroupView {
    /// The labels that they have in common.
    pub group: Labels,
    /// How many they are.
    pub devices: u64,
    /// How many of them may be unavailable at once.
    pub max_unavailable: u64,
    /// Who is unavailable now.
    pub unavailable: Vec<DeviceId>,
    /// How many wait for their turn.
    pub waiting: u64,
}

/// The right of a device to switch an app, or its wait for it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LeaseView {
    /// Which device.
    pub device: DeviceId,
    /// Which app.
    pub app: AppName,
    /// To which release.
    pub release: Digest,
    /// What becomes of it.
    pub state: LeaseState,
    /// The budgets that the device is under.
    pub budgets: Vec<BudgetGroup>,
    /// Since when it has waited for its turn, milliseconds since 1970.
    pub requested_ms: u64,
    /// When it was granted, milliseconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub granted_ms: Option<u64>,
    /// By when the device should have said how it ended, milliseconds since 1970. It is not taken back then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_ms: Option<u64>,
}

/// What becomes of a lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LeaseState {
    /// Asked for.
    Waiting,
    /// The device may begin to switch, or has.
    Granted,
    /// Granted, and the device did not say in time how it ended. It keeps its slot until it does, or is written off.
    Overdue,
    /// An operator wrote the device off: it holds no slot any more.
    WrittenOff,
}

/// `PATCH /devices/{device}/labels`: `null` removes a label.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LabelPatch {
    /// What to set or remove.
    pub labels: std::collections::BTreeMap<LabelKey, Option<LabelValue>>,
}

/// The state of a rollout.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RolloutState {
    /// Waits for the time that its policy names.
    Scheduled,
    /// Waves open one after the other.
    Running,
    /// Nothing new is offered until an operator resumes it.
    Paused,
    /// Every wave passed. Final unless undone.
    Completed,
    /// An operator stopped it; devices that had it keep it. Final.
    Aborted,
    /// Devices are given their release of before, newest wave first.
    RollingBack,
    /// They all have it again. Final.
    RolledBack,
    /// Rolling back failed somewhere and waits for an operator.
    RollbackPaused,
    /// A newer rollout of the same app took its place. Final.
    Superseded,
}

impl RolloutState {
    /// Whether nothing will happen to it any more.
    #[must_use]
    pub const fn is_final(self) -> bool {
        matches!(
            self,
            Self::Completed | Self::Aborted | Self::RolledBack | Self::Superseded
        )
    }
}

/// A rollout.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RolloutView {
    /// Its id; grows.
    pub id: u64,
    /// Whose.
    pub app: AppName,
    /// The release before; `None` for the app's first.
    pub from: Option<Digest>,
    /// The release it brings.
    pub to: Digest,
    /// Its state.
    pub state: RolloutState,
    /// Why, for people; set when paused, stopped or rolled back.
    pub message: Option<String>,
    /// Before which no wave opens, milliseconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_at_ms: Option<u64>,
    /// Devices that come after the last wave, once it completed; missing when there are none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tail: Option<TailView>,
    /// Its waves in order.
    pub waves: Vec<WaveView>,
    /// Its devices, by wave and rank. In a list (`GET /rollouts`) only the first item has them, so that an answer
    /// stays small however many devices and rollouts there are; `GET /rollouts/{id}` always does.
    pub assignments: Vec<AssignmentView>,
    /// Milliseconds since 1970.
    pub created_ms: u64,
    /// Milliseconds since 1970, once final.
    pub finished_ms: Option<u64>,
}

/// One wave of a rollout.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct WaveView {
    /// From 1.
    pub ordinal: u32,
    /// As written, or the implied 100 %.
    pub target: WaveTarget,
    /// Its state.
    pub state: WaveState,
    /// Its devices.
    pub devices: u64,
    /// Of them, ended well.
    pub succeeded: u64,
    /// Of them, ended badly or silent.
    pub failed: u64,
    /// Of them, offline and put off.
    pub deferred: u64,
    /// When its bake ends, milliseconds since 1970, while baking.
    pub bake_until_ms: Option<u64>,
    /// Whether an operator must approve it, and has not yet.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub needs_approval: bool,
    /// What its analysis has said since it began to bake; missing before, and where there is none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub analysis: Vec<AnalysisView>,
}

/// What one gate of a rollout's `analysis` has said of a wave.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AnalysisView {
    /// Its name.
    pub name: String,
    /// How often it passed.
    pub passed: u32,
    /// How often it failed.
    pub failed: u32,
    /// How often it could not tell.
    pub inconclusive: u32,
    /// What it said last, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

/// The devices of a completed rollout that were offline until then or joined later.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TailView {
    /// All.
    pub devices: u64,
    /// Of them, ended well.
    pub succeeded: u64,
    /// Of them, ended badly or silent.
    pub failed: u64,
    /// Of them, offline or held.
    pub deferred: u64,
    /// Failures stopped it; `resume` goes on.
    pub stopped: bool,
}

/// The state of a wave.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WaveState {
    /// Not open yet.
    Pending,
    /// Its devices are offered the release.
    Open,
    /// All its devices ended; it waits.
    Baking,
    /// Its gates are passed; an operator must approve it.
    AwaitingApproval,
    /// Every gate passed.
    Passed,
    /// It broke the budget.
    Failed,
    /// It has no device.
    Skipped,
}

/// One device's part in a rollout.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AssignmentView {
    /// Which device.
    pub device: DeviceId,
    /// In which wave, from 1.
    pub wave: u32,
    /// Whether it comes after the last wave.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub tail: bool,
    /// How far it is.
    pub state: AssignmentState,
    /// The release that it was offered, if that is a step on its way and not yet the rollout's own (`requiresFrom`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub via: Option<Digest>,
    /// Why, if not well.
    pub message: Option<String>,
    /// What the device fetches of the release right now, as in [`DeviceView::pull`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pull: Option<PullView>,
}

/// How far one device's part in a rollout is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AssignmentState {
    /// Its wave is not open, or it waits for room under `maxUnavailable`.
    Planned,
    /// Its desired state names the release; the device has not answered.
    Offered,
    /// The device answered with this phase.
    Device(Phase),
    /// Switching, then dark past its deadline: a failure.
    Silent,
    /// Offline before it began: not a failure; it gets the release when it returns.
    Deferred,
    /// Given its release of before by a rollback or abort.
    Reverted,
}

/// Something that happened, from a device or in the hub.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EventView {
    /// Grows.
    pub id: u64,
    /// When the hub learnt of it, milliseconds since 1970.
    pub received_ms: u64,
    /// From which device; `None`: from the hub.
    pub device: Option<DeviceId>,
    /// Which app.
    pub app: Option<AppName>,
    /// Which service.
    pub service: Option<ServiceName>,
    /// Which rollout.
    pub rollout: Option<u64>,
    /// Stable, kebab-case: a device's [`crate::message::EventKind`], or `rollout-…`, `wave-…`, `device-…`.
    pub kind: String,
    /// For people.
    pub message: String,
}

/// An image imported into the hub.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ImageView {
    /// `hub.internal/NAME:TAG`.
    pub reference: String,
    /// Of its index or manifest.
    pub digest: Digest,
    /// Bytes of its manifests and blobs.
    pub size_bytes: u64,
    /// `linux/amd64` and the like.
    pub platforms: Vec<String>,
    /// Milliseconds since 1970.
    pub imported_ms: u64,
}
