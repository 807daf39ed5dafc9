//! [`RolloutPolicy`]: how a new release reaches the devices. How it is carried out is the hub's business.

use std::fmt;
use std::str::FromStr;

use chrono::{DateTime, Datelike as _, SecondsFormat, Utc};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::analysis::Analysis;
use super::selector::Selector;
use super::window::MaintenanceWindow;
use crate::digest::DigestPrefix;
use crate::id::LabelKey;
use crate::quantity::Span;

/// How a new release reaches the devices.
///
/// Keys that came after the first version are left out when they hold their default.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RolloutPolicy {
    /// A wave before all others: some devices of every kind there is. Default: none; the first of `waves` is first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub canary: Option<Canary>,
    /// Cumulative targets over the frozen set; they must grow. A missing last 100 % is implied.
    /// Default: one device, then 10 %, then 50 %, then all.
    #[serde(default = "defaults::waves")]
    pub waves: Vec<WaveSpec>,
    /// How long all probes must stay green on the device. Default: 60s.
    #[serde(default = "defaults::soak")]
    pub soak: Span,
    /// How long a wave waits after its last success before the next opens. Default: 5m.
    #[serde(default = "defaults::bake")]
    pub bake: Span,
    /// How long a device may take from switching to the release until every service is ready.
    /// Default: 5m. Must be above 0.
    #[serde(default = "defaults::progress_deadline")]
    pub progress_deadline: Span,
    /// At most so many devices of the rollout may be switching at once: a count or `"20%"` of the
    /// frozen set, rounded up. Default: 20%.
    #[serde(default = "defaults::max_unavailable")]
    pub max_unavailable: Amount,
    /// How fast devices are offered the release. Default: as fast as `maxUnavailable` lets them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pace: Option<Pace>,
    /// How many failed devices stop the rollout.
    #[serde(default)]
    pub failure_budget: FailureBudget,
    /// What happens then. Default: `rollback`.
    #[serde(default)]
    pub on_failure: OnFailure,
    /// No wave opens before this time. Default: at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_at: Option<Timestamp>,
    /// When rollouts of several apps want one device, the highest goes first, then the oldest; 0 to 100. Default: 50.
    #[serde(
        default = "defaults::priority",
        skip_serializing_if = "defaults::is_priority"
    )]
    pub priority: u8,
    /// A change that cannot wait: it goes before every other rollout, and once its first wave has passed the rest
    /// follows at once, without bake, analysis, pace, approval and `maxUnavailable`. `startAt`, `window` and `downloadWindow`
    /// are not waited for. The first wave, the soak and the failure budget stay. Default: false.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub emergency: bool,
    /// How the release reaches devices that come only after the last wave: those that were offline, and those that
    /// join later.
    #[serde(default, skip_serializing_if = "Tail::is_default")]
    pub tail: Tail,
    /// What else is asked while a wave bakes: the wave passes only when all of these do. At most 8. Default: nothing.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub analysis: Vec<Analysis>,
    /// When a device may begin to switch to the release: to stop and start containers for it. What has begun is finished.
    /// Default: at any time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub window: Option<MaintenanceWindow>,
    /// When a device may begin to fetch the release's images. Default: at any time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub download_window: Option<MaintenanceWindow>,
    /// So many unexpected ends of services during the soak do not fail the release on a device; the soak begins anew after
    /// each. 0 to 10. Default: 0.
    #[serde(default, skip_serializing_if = "defaults::is_none")]
    pub max_restarts: u32,
    /// A device that is connected to the hub when it switches must reach it again within this time, or it goes back: the
    /// release has cut it off. 1m to 1d. Default: it need not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub require_hub: Option<Span>,
    /// Only a device that has one of these releases of the app, or none, is given this one; any other is first given one of
    /// them, by the shortest way there is. As `foreshore rollout history` shows them; at most 16. Default: any will do.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub requires_from: Vec<DigestPrefix>,
}

impl Default for RolloutPolicy {
    fn default() -> Self {
        Self {
            canary: None,
            waves: defaults::waves(),
            soak: defaults::soak(),
            bake: defaults::bake(),
            progress_deadline: defaults::progress_deadline(),
            max_unavailable: defaults::max_unavailable(),
            pace: None,
            failure_budget: FailureBudget::default(),
            on_failure: OnFailure::default(),
            start_at: None,
            priority: defaults::priority(),
            emergency: false,
            tail: Tail::default(),
            analysis: Vec::new(),
            window: None,
            download_window: None,
            max_restarts: 0,
            require_hub: None,
            requires_from: Vec::new(),
        }
    }
}

/// A first wave with devices of every kind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Canary {
    /// So many devices of each kind; at least 1. Default: 1.
    #[serde(default = "defaults::one")]
    pub per_stratum: u32,
    /// The labels that make a kind: devices with equal values of all of them, a missing label being a value too. At
    /// least one label.
    pub by: Vec<LabelKey>,
}

/// One of a rollout's waves: which devices, and what must happen before the next one opens.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", try_from = "WrittenWave")]
pub struct WaveSpec {
    /// Which devices, written `count: 1`, `percent: 10` or `selector: {…}` in the same map.
    #[serde(flatten)]
    pub target: WaveTarget,
    /// Once its gates are passed, the wave also waits for an operator's approval. Default: false.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub approval: bool,
    /// Instead of the rollout's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bake: Option<Span>,
    /// How many failed devices of this wave stop the rollout, beside the rollout's own budget.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failure_budget: Option<FailureBudget>,
}

impl From<WaveTarget> for WaveSpec {
    fn from(target: WaveTarget) -> Self {
        Self {
            target,
            approval: false,
            bake: None,
            failure_budget: None,
        }
    }
}

/// A [`WaveSpec`] with all keys that there are.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct WrittenWave {
    count: Option<u32>,
    percent: Option<u8>,
    selector: Option<Selector>,
    /// Only in what the hub stores; a manifest has it beside `waves`.
    canary: Option<Canary>,
    #[serde(default)]
    approval: bool,
    bake: Option<Span>,
    failure_budget: Option<FailureBudget>,
}

impl TryFrom<WrittenWave> for WaveSpec {
    type Error = &'static str;

    fn try_from(wave: WrittenWave) -> Result<Self, Self::Error> {
        let target = match (wave.count, wave.percent, wave.selector, wave.canary) {
            (Some(count), None, None, None) => WaveTarget::Count(count),
            (None, Some(percent), None, None) => WaveTarget::Percent(percent),
            (None, None, Some(selector), None) => WaveTarget::Selector(selector),
            (None, None, None, Some(canary)) => WaveTarget::Canary(canary),
            _ => {
                return Err(
                    "a wave has exactly one of `count`, `percent` and `selector`, for example {percent: 10}",
                );
            }
        };
        Ok(Self {
            target,
            approval: wave.approval,
            bake: wave.bake,
            failure_budget: wave.failure_budget,
        })
    }
}

/// The devices of a wave: `{count: 1}`, `{percent: 10}`, `{selector: {matchLabels: {ring: early}}}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum WaveTarget {
    /// So many devices in all, those of the waves before included; at least 1.
    Count(u32),
    /// This part of the frozen set in all, rounded up; 1 to 100.
    Percent(u8),
    /// All that have these labels and are in no wave before.
    Selector(Selector),
    /// Some of each kind. Not written as a wave, but as [`RolloutPolicy::canary`].
    Canary(Canary),
}

/// `1 in all`, `60%`, `ring=early`, `1 of each model, site`.
impl fmt::Display for WaveTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Count(count) => write!(f, "{count} in all"),
            Self::Percent(percent) => write!(f, "{percent}%"),
            Self::Selector(selector) => selector.fmt(f),
            Self::Canary(canary) => {
                let by: Vec<&str> = canary.by.iter().map(AsRef::as_ref).collect();
                write!(f, "{} of each {}", canary.per_stratum, by.join(", "))
            }
        }
    }
}

/// How fast devices are offered a release: a rate that doubles as devices succeed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Pace {
    /// So many devices a minute at first; 1 to 1,000,000.
    pub per_minute: u32,
    /// The rate doubles each time that so many more devices have succeeded; at least 1. Default: it stays.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub double_every: Option<u32>,
    /// It grows no further than this; at least `perMinute`. Default: without end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_per_minute: Option<u32>,
}

impl Pace {
    /// Milliseconds between two devices once `successes` devices have succeeded; 0 when more than a thousand a
    /// second are due.
    #[must_use]
    pub fn interval_ms(&self, successes: u32) -> u64 {
        let doublings = self
            .double_every
            .map_or(0, |every| successes / every.max(1));
        let rate = u64::from(self.per_minute.max(1))
            .checked_shl(doublings)
            .filter(|rate| rate >> doublings.min(63) == u64::from(self.per_minute.max(1)))
            .unwrap_or(u64::MAX);
        let most = self
            .max_per_minute
            .map_or(u64::MAX, |most| u64::from(most.max(1)));
        60_000 / rate.min(most)
    }
}

/// How a completed rollout's release reaches those that come after.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Tail {
    /// How fast they are offered it; it grows with their own successes. Default: 30 a minute, doubled every 10.
    #[serde(default = "defaults::tail_pace")]
    pub pace: Pace,
    /// How many failures of these devices stop it, counted by themselves. An operator resumes it.
    #[serde(default)]
    pub failure_budget: FailureBudget,
}

impl Default for Tail {
    fn default() -> Self {
        Self {
            pace: defaults::tail_pace(),
            failure_budget: FailureBudget::default(),
        }
    }
}

impl Tail {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// A count, or a part of the whole written `"20%"` (Kubernetes int-or-string).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Amount {
    /// At least 1.
    Count(u32),
    /// 1 to 100.
    Percent(u8),
}

impl Amount {
    /// How many of `total` that is: rounded up, at least 1.
    #[must_use]
    pub fn of(self, total: usize) -> usize {
        match self {
            Self::Count(count) => usize::try_from(count).unwrap_or(usize::MAX).max(1),
            Self::Percent(percent) => (total * usize::from(percent)).div_ceil(100).max(1),
        }
    }
}

/// The rollout stops when `failures >= count`, or when at least `min_sample` devices were attempted and
/// more than `percent` of them failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct FailureBudget {
    /// At least 1. Default: 3. A rollout over fewer devices than this stops when all of a wave failed.
    #[serde(default = "defaults::three")]
    pub count: u32,
    /// 0 to 100. Default: 5.
    #[serde(default = "defaults::budget_percent")]
    pub percent: u8,
    /// At least 1. Default: 10.
    #[serde(default = "defaults::min_sample")]
    pub min_sample: u32,
}

impl Default for FailureBudget {
    fn default() -> Self {
        Self {
            count: defaults::three(),
            percent: defaults::budget_percent(),
            min_sample: defaults::min_sample(),
        }
    }
}

/// What a rollout does when its failure budget breaks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnFailure {
    /// Give every device its release of before, newest wave first.
    #[default]
    Rollback,
    /// Stop and wait for an operator.
    Pause,
}

/// A point in time between 1970 and 9999, written as RFC 3339 has it with its offset: `2026-12-01T02:00:00+01:00`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(DateTime<Utc>);

impl Timestamp {
    /// Milliseconds since 1970.
    #[must_use]
    pub fn unix_ms(self) -> u64 {
        u64::try_from(self.0.timestamp_millis()).unwrap_or(0)
    }
}

/// Why a text is not a [`Timestamp`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not a time; write date, time and offset, for example 2026-12-01T02:00:00+01:00 or 2026-12-01T01:00:00Z"
)]
pub struct ParseTimestampError(String);

impl FromStr for Timestamp {
    type Err = ParseTimestampError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        DateTime::parse_from_rfc3339(text)
            .map(|time| time.to_utc())
            .ok()
            // RFC 3339 writes no others.
            .filter(|time| (1970..=9999).contains(&time.year()))
            .map(Self)
            .ok_or_else(|| ParseTimestampError(text.to_owned()))
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.to_rfc3339_opts(SecondsFormat::AutoSi, true))
    }
}

impl Serialize for Timestamp {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Timestamp {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

mod defaults {
    //! What a missing key means. Changing one changes what new manifests mean; say so in the change log.

    use super::{Amount, Pace, WaveSpec, WaveTarget};
    use crate::quantity::Span;

    pub(super) fn waves() -> Vec<WaveSpec> {
        [
            WaveTarget::Count(1),
            WaveTarget::Percent(10),
            WaveTarget::Percent(50),
            WaveTarget::Percent(100),
        ]
        .map(WaveSpec::from)
        .into()
    }
    pub(super) const fn one() -> u32 {
        1
    }
    pub(super) const fn three() -> u32 {
        3
    }
    pub(super) const fn priority() -> u8 {
        50
    }
    #[expect(
        clippy::trivially_copy_pass_by_ref,
        reason = "serde asks with a reference"
    )]
    pub(super) const fn is_priority(priority: &u8) -> bool {
        *priority == self::priority()
    }
    #[expect(
        clippy::trivially_copy_pass_by_ref,
        reason = "serde asks with a reference"
    )]
    pub(super) const fn is_none(count: &u32) -> bool {
        *count == 0
    }
    pub(super) const fn soak() -> Span {
        Span::from_secs(60)
    }
    pub(super) const fn bake() -> Span {
        Span::from_secs(300)
    }
    pub(super) const fn progress_deadline() -> Span {
        Span::from_secs(300)
    }
    pub(super) const fn max_unavailable() -> Amount {
        Amount::Percent(20)
    }
    pub(super) const fn budget_percent() -> u8 {
        5
    }
    pub(super) const fn min_sample() -> u32 {
        10
    }
    pub(super) const fn tail_pace() -> Pace {
        Pace {
            per_minute: 30,
            double_every: Some(10),
            max_per_minute: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pace_doubles_with_successes_up_to_its_most() {
        let pace = Pace {
            per_minute: 10,
            double_every: Some(20),
            max_per_minute: Some(60),
        };
        let intervals = [0, 19, 20, 40, 60, u32::MAX].map(|successes| pace.interval_ms(successes));
        assert_eq!(intervals, [6_000, 6_000, 3_000, 1_500, 1_000, 1_000]);
        let endless = Pace {
            max_per_minute: None,
            ..pace
        };
        assert_eq!(endless.interval_ms(20 * 63), 0);
        assert_eq!(endless.interval_ms(u32::MAX), 0);
        let still = Pace {
            double_every: None,
            ..pace
        };
        assert_eq!(still.interval_ms(u32::MAX), 6_000);
    }

    #[test]
    fn times_are_read_with_their_offset_and_written_in_utc() {
        let time: Timestamp = "2026-12-01T02:00:00+01:00".parse().unwrap();
        assert_eq!(time.to_string(), "2026-12-01T01:00:00Z");
        assert_eq!(time.unix_ms(), 1_796_086_800_000);
        for wrong in [
            "",
            "2026-12-01",
            "2026-12-01T02:00:00",
            "tomorrow",
            "2026-13-01T02:00:00Z",
            "1960-01-01T00:00:00Z",
            "9999-12-31T23:59:59-01:00",
        ] {
            wrong.parse::<Timestamp>().unwrap_err();
        }
    }

    #[test]
    fn a_wave_is_written_as_it_is_read() {
        for text in [
            r#"{"count":1}"#,
            r#"{"percent":10,"approval":true,"bake":"10m"}"#,
            r#"{"selector":{"matchLabels":{"ring":"early"}}}"#,
            r#"{"canary":{"perStratum":1,"by":["model"]}}"#,
        ] {
            let wave: WaveSpec = serde_json::from_str(text).unwrap();
            assert_eq!(serde_json::to_string(&wave).unwrap(), text);
        }
        for wrong in ["{}", r#"{"count":1,"percent":2}"#, r#"{"counts":1}"#] {
            serde_json::from_str::<WaveSpec>(wrong).unwrap_err();
        }
    }
}
