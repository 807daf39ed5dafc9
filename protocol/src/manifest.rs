//! The App manifest: what users write, strict and complete for what it claims.
//!
//! Compose spellings inside a service, Kubernetes spellings around it. YAML and JSON go through one
//! parser (JSON is read as the YAML subset it is), so both get errors with line and column. Keys that
//! exist in Compose or in a later Foreshore but are not built yet are refused like any unknown key:
//! nothing a user writes is ever silently ignored.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::id::{AppName, ConfigName, SecretName, ServiceName, VolumeName};
use crate::quantity::{Bytes, Cpus, Span};

mod analysis;
mod blkio;
pub(crate) mod check;
mod config;
mod device;
mod disruption_budget;
mod explain;
mod lifecycle;
mod parse;
pub(crate) mod pull_secret;
mod rollout;
mod secret;
mod selector;
mod window;

pub use analysis::{Analysis, Control, ControlMetric, Endpoint, PassIf, PromQl, Webhook};
pub use blkio::{BlkioConfig, BytesRate, DeviceWeight, DiskPath, OperationsRate};
pub use check::{MAX_SERVICES, MAX_WAVES, Violation};
pub use config::{ConfigFile, ConfigMount, FileMode, FileOwner};
pub use device::{DeviceAccess, DeviceMapping};
pub use disruption_budget::{BudgetMetadata, BudgetSpec, DisruptionBudget};
pub use lifecycle::{Condition, Dependencies, Dependency, Deploy, Hook, UpdateConfig, UpdateOrder};
pub use parse::{
    MAX_DEPTH, MAX_MANIFEST_BYTES, Manifest, ManifestError, parse, parse_any, parse_budget,
};
pub use pull_secret::MAX_PULL_SECRETS;
pub use rollout::{
    Amount, Canary, FailureBudget, OnFailure, Pace, RolloutPolicy, Tail, Timestamp, WaveSpec,
    WaveTarget,
};
pub use secret::{OnRotate, SECRETS_DIR, SecretMount, SecretSource};
pub use selector::{Expression, Operator, Selector};
pub use window::{MAX_ZONE_NAME_BYTES, MaintenanceWindow, ParseTimeZoneError, TimeZone};

/// An App: *which devices* (selector), *what runs there* (services), *how changes arrive* (rollout).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct App {
    /// Always `foreshore/v1`.
    pub api_version: ApiVersion,
    /// Always `App`.
    pub kind: Kind,
    /// The app's name.
    pub metadata: Metadata,
    /// Everything else.
    pub spec: AppSpec,
}

/// The manifest schema this program reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ApiVersion {
    /// The only one so far.
    #[serde(rename = "foreshore/v1")]
    V1,
}

/// The kind of object a manifest describes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// An [`App`].
    App,
    /// A [`DisruptionBudget`].
    DisruptionBudget,
}

/// The envelope's `metadata`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Metadata {
    /// Unique in the fleet.
    pub name: AppName,
}

/// The envelope's `spec`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AppSpec {
    /// Which devices. Missing or empty: every device.
    #[serde(default)]
    pub selector: Selector,
    /// What runs there: 1 to 32 services.
    pub services: BTreeMap<ServiceName, Service>,
    /// Small files for services, by name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub configs: BTreeMap<ConfigName, ConfigFile>,
    /// Values that the hub keeps, by name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub secrets: BTreeMap<SecretName, SecretSource>,
    /// Secrets that hold logins for the registries of the images, as docker's `config.json`; at most 8. Of two that have
    /// one for the same registry the first counts. A list of names, or of `{name: NAME}` as in Kubernetes.
    #[serde(
        default,
        skip_serializing_if = "Vec::is_empty",
        deserialize_with = "parse::pull_secrets"
    )]
    pub image_pull_secrets: Vec<SecretName>,
    /// How changes arrive.
    #[serde(default)]
    pub rollout: RolloutPolicy,
}

/// One container of an app, in Compose spellings.
///
/// Also the form that a [`crate::release::Release`] holds, with `image` pinned by digest. The fields up to
/// `logging` are always written out in canonical JSON, so a default that changes in a later version of
/// Foreshore changes no release that exists. Fields that came later are left out when they hold their
/// default, which therefore never changes: a service that does not use them keeps its digest, and its
/// containers run on when an agent is updated.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Service {
    /// The image reference, for example `ghcr.io/acme/modbus:1.4`. `hub.internal/NAME:TAG` means an
    /// image imported into the hub.
    pub image: String,
    /// Replaces the image's `Entrypoint` (and then its `Cmd` is dropped, as Compose does).
    #[serde(default)]
    pub entrypoint: Option<Vec<String>>,
    /// Replaces the image's `Cmd`.
    #[serde(default)]
    pub command: Option<Vec<String>>,
    /// Added to the image's environment; same keys win. A map, or a list of `KEY=value`. Here and in
    /// `entrypoint` and `command`, `${` is refused (substitution is not built yet) and `$${` means `${`.
    #[serde(default, deserialize_with = "parse::environment")]
    pub environment: BTreeMap<String, String>,
    /// `user`, `uid`, `user:group` or `uid:gid`; names are looked up in the image. Default: the image's.
    #[serde(default)]
    pub user: Option<String>,
    /// Absolute. Default: the image's.
    #[serde(default)]
    pub working_dir: Option<String>,
    /// Whether the root file system is read-only. Default: true.
    #[serde(default = "defaults::yes")]
    pub read_only: bool,
    /// In-memory file systems: `/path` or `/path:size=16m`. Counted against `mem_limit`.
    #[serde(default, deserialize_with = "parse::one_or_many")]
    pub tmpfs: Vec<Tmpfs>,
    /// `name:/path[:ro]` (a named volume of the app) or `/host/path:/path[:ro]` (a bind mount).
    #[serde(default)]
    pub volumes: Vec<VolumeMount>,
    /// The network the container sees. Default: `none`, an own namespace with only loopback.
    #[serde(default)]
    pub network_mode: NetworkMode,
    /// Memory limit, swap included. At least 4m. Default: 128m.
    #[serde(default = "defaults::mem_limit")]
    pub mem_limit: Bytes,
    /// CPU limit, at least 0.01. Default: 1.
    #[serde(default = "defaults::cpus")]
    pub cpus: Cpus,
    /// Limit on processes and threads, 1 to 32768. Default: 256.
    #[serde(default = "defaults::pids_limit")]
    pub pids_limit: u32,
    /// When to start the container again after it ended. Default: `always`.
    #[serde(default)]
    pub restart: RestartPolicy,
    /// Sent first when the container must stop. Default: `SIGTERM`.
    #[serde(default)]
    pub stop_signal: StopSignal,
    /// How long after `stop_signal` until SIGKILL; at most 1h. Default: 10s.
    #[serde(default = "defaults::stop_grace_period")]
    pub stop_grace_period: Span,
    /// How the agent asks the service whether it is well.
    #[serde(default)]
    pub probes: Probes,
    /// Rotation of what the container writes to stdout and stderr.
    #[serde(default)]
    pub logging: Logging,
    /// What must hold of other services before this one is first started in a boot or for a release. They are
    /// stopped in the opposite order. A map of conditions, or a list of names.
    #[serde(
        default,
        skip_serializing_if = "BTreeMap::is_empty",
        deserialize_with = "parse::dependencies"
    )]
    pub depends_on: Dependencies,
    /// Commands run in the container, one after the other, before it is asked to stop; their time counts
    /// against `stop_grace_period`. Not run when the container ends by itself.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pre_stop: Vec<Hook>,
    /// How the service is replaced.
    #[serde(default, skip_serializing_if = "Deploy::is_default")]
    pub deploy: Deploy,
    /// Whether the service may hold back updates of its app: it gets a directory `/run/foreshore`, and while
    /// one of its processes has an exclusive flock(2) on `update.lock` there, no update begins.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub update_lock: bool,
    /// How much CPU time the service gets beside others when all want more than there is; 2 to 262144
    /// (Compose). Default: 1024 for each CPU of `cpus`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_shares: Option<u32>,
    /// How much a container whose root is not read-only may write to it. Default: 256m.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub storage_opt: Option<StorageOpt>,
    /// Who goes first when the device runs out of disk space: the lowest; 0 to 100. Default: 50.
    #[serde(
        default = "defaults::priority",
        skip_serializing_if = "defaults::is_priority"
    )]
    pub priority: u8,
    /// Device nodes: `/dev/ttyUSB0`, `/dev/ttyUSB0:/dev/modem` or `/dev/i2c-1:/dev/i2c-1:r`. The device's policy must
    /// allow them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<DeviceMapping>,
    /// Files of the app's `configs` that the service sees, read-only. A list of names, or of `{source, target, mode, uid, gid}`.
    #[serde(
        default,
        skip_serializing_if = "Vec::is_empty",
        deserialize_with = "parse::configs"
    )]
    pub configs: Vec<ConfigMount>,
    /// Secrets of the app that the service gets, as files in `/run/secrets` or in its environment. A list of names, or of
    /// `{source, target, uid, gid, mode, environment, on_rotate}`.
    #[serde(
        default,
        skip_serializing_if = "Vec::is_empty",
        deserialize_with = "parse::secrets"
    )]
    pub secrets: Vec<SecretMount>,
    /// How fast the service may read and write disks, and its share of them beside others. A path is a device below
    /// `/dev`, or `state` for the disk that holds the agent's state. Default: no limits.
    #[serde(default, skip_serializing_if = "BlkioConfig::is_empty")]
    pub blkio_config: BlkioConfig,
}

/// `storage_opt:` of a [`Service`] (Compose).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StorageOpt {
    /// At least 1m. Each file and directory counts as 4k at least. Logs, volumes and tmpfs do not count.
    pub size: Bytes,
}

impl Service {
    /// How much its container may write to its root file system, in bytes; `None` when it cannot write there.
    #[must_use]
    pub fn layer_limit(&self) -> Option<u64> {
        let asked = self
            .storage_opt
            .map_or(defaults::layer_size(), |option| option.size);
        (!self.read_only).then_some(asked.0)
    }
}

/// An in-memory file system, written `/path` or `/path:size=16m`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tmpfs {
    /// Absolute path in the container.
    pub target: String,
    /// Size limit, at least 4k; default 16m.
    pub size: Bytes,
}

/// A volume or bind mount, written `source:/target[:ro]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeMount {
    /// What is mounted.
    pub source: VolumeSource,
    /// Absolute path in the container.
    pub target: String,
    /// Whether the container may only read.
    pub read_only: bool,
}

/// The left side of a [`VolumeMount`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VolumeSource {
    /// A named volume of the app; it outlives releases.
    Named(VolumeName),
    /// An absolute path on the device.
    Bind(String),
}

/// The network a container sees (Compose `network_mode`). Bridge networks and `ports` are not built yet.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NetworkMode {
    /// An own network namespace with only loopback.
    #[default]
    None,
    /// The device's network.
    Host,
}

/// When to start a container again (Compose `restart`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum RestartPolicy {
    /// However it ended. `unless-stopped` reads as this: there is no local stop.
    #[default]
    Always,
    /// When it ended with a status other than 0; at most `max_retries` times in a row if given.
    OnFailure {
        /// `on-failure:N`.
        max_retries: Option<u32>,
    },
    /// Never. Ending with status 0 counts as done and well, anything else as failed.
    No,
}

/// A signal name such as `SIGTERM`; one of the signals of signal(7) that stop a process on request.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum StopSignal {
    /// 15.
    #[default]
    #[serde(rename = "SIGTERM")]
    Term,
    /// 2.
    #[serde(rename = "SIGINT")]
    Int,
    /// 3.
    #[serde(rename = "SIGQUIT")]
    Quit,
    /// 1.
    #[serde(rename = "SIGHUP")]
    Hup,
    /// 10.
    #[serde(rename = "SIGUSR1")]
    Usr1,
    /// 12.
    #[serde(rename = "SIGUSR2")]
    Usr2,
    /// 9.
    #[serde(rename = "SIGKILL")]
    Kill,
}

impl StopSignal {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Term,
        Self::Int,
        Self::Quit,
        Self::Hup,
        Self::Usr1,
        Self::Usr2,
        Self::Kill,
    ];

    /// As in a manifest.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Term => "SIGTERM",
            Self::Int => "SIGINT",
            Self::Quit => "SIGQUIT",
            Self::Hup => "SIGHUP",
            Self::Usr1 => "SIGUSR1",
            Self::Usr2 => "SIGUSR2",
            Self::Kill => "SIGKILL",
        }
    }

    /// The signal number on Linux (signal(7); the same on x86_64 and ARM).
    #[must_use]
    pub const fn number(self) -> i32 {
        match self {
            Self::Term => 15,
            Self::Int => 2,
            Self::Quit => 3,
            Self::Hup => 1,
            Self::Usr1 => 10,
            Self::Usr2 => 12,
            Self::Kill => 9,
        }
    }
}

/// The probes of a service (Kubernetes names and semantics).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Probes {
    /// Whether the service does its job. Without one, a running container is a ready one.
    #[serde(default)]
    pub readiness: Option<Probe>,
    /// Whether it still works at all. When this fails, the container is stopped and its restart policy
    /// decides.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub liveness: Option<Probe>,
    /// Whether it has come up. Until then the other probes wait and the service is not ready. When this
    /// fails, the container is stopped and its restart policy decides.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub startup: Option<Probe>,
}

impl Probes {
    /// Those that there are, with their names.
    pub fn each(&self) -> impl Iterator<Item = (&'static str, &Probe)> {
        let all = [
            ("startup", &self.startup),
            ("readiness", &self.readiness),
            ("liveness", &self.liveness),
        ];
        all.into_iter()
            .filter_map(|(name, probe)| Some((name, probe.as_ref()?)))
    }
}

/// One probe (Kubernetes semantics). Exactly one of `http`, `tcp`, `exec` must be given.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Probe {
    /// Ready when a GET answers 200 to 399.
    #[serde(default)]
    pub http: Option<HttpProbe>,
    /// Ready when a connection opens.
    #[serde(default)]
    pub tcp: Option<TcpProbe>,
    /// Ready when the command ends with status 0 inside the container.
    #[serde(default)]
    pub exec: Option<ExecProbe>,
    /// Time between probes, at least 100ms. Default: 10s.
    #[serde(default = "defaults::probe_period")]
    pub period: Span,
    /// How long one probe may take, above 0 and at most 5m. Default: 1s.
    #[serde(default = "defaults::probe_timeout")]
    pub timeout: Span,
    /// Wait after the container's start before the first probe. Default: 0.
    #[serde(default = "defaults::zero")]
    pub initial_delay: Span,
    /// Successes in a row that make the service ready, 1 to 1000. Default: 1.
    #[serde(default = "defaults::one")]
    pub success_threshold: u32,
    /// Failures in a row that make the service not ready, 1 to 1000. Default: 3.
    #[serde(default = "defaults::three")]
    pub failure_threshold: u32,
}

/// `http:` of a [`Probe`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HttpProbe {
    /// On the container's loopback; 1 to 65535.
    pub port: u16,
    /// Begins with `/`. Default: `/`.
    #[serde(default = "defaults::root")]
    pub path: String,
}

/// `tcp:` of a [`Probe`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TcpProbe {
    /// On the container's loopback; 1 to 65535.
    pub port: u16,
}

/// `exec:` of a [`Probe`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExecProbe {
    /// The program and its arguments; not a shell line.
    pub command: Vec<String>,
}

/// The one way a [`Probe`] asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProbeAction<'a> {
    /// HTTP GET.
    Http(&'a HttpProbe),
    /// TCP connect.
    Tcp(&'a TcpProbe),
    /// A command in the container.
    Exec(&'a ExecProbe),
}

impl Probe {
    /// The one action of a probe that [`parse`] accepted; `None` when the probe names none or several.
    #[must_use]
    pub const fn action(&self) -> Option<ProbeAction<'_>> {
        match (&self.http, &self.tcp, &self.exec) {
            (Some(http), None, None) => Some(ProbeAction::Http(http)),
            (None, Some(tcp), None) => Some(ProbeAction::Tcp(tcp)),
            (None, None, Some(exec)) => Some(ProbeAction::Exec(exec)),
            _ => None,
        }
    }
}

/// Rotation of a container's output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Logging {
    /// A file that reaches this size is rotated; 4k to 1g. Default: 10m.
    #[serde(default = "defaults::log_size")]
    pub max_size: Bytes,
    /// How many files are kept, the current one included; 1 to 100. Default: 3.
    #[serde(default = "defaults::three")]
    pub max_file: u32,
}

impl Default for Logging {
    fn default() -> Self {
        Self {
            max_size: defaults::log_size(),
            max_file: defaults::three(),
        }
    }
}

mod defaults {
    //! What a missing key means. Changing one changes what new manifests mean, never a release that
    //! exists; say so in the change log.

    use crate::quantity::{Bytes, Cpus, Span};

    pub(super) const fn yes() -> bool {
        true
    }
    pub(super) const fn zero() -> Span {
        Span(0)
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
    pub(super) const fn layer_size() -> Bytes {
        Bytes(256 << 20)
    }
    pub(super) const fn mem_limit() -> Bytes {
        Bytes(128 << 20)
    }
    pub(super) const fn cpus() -> Cpus {
        Cpus(1000)
    }
    pub(super) const fn pids_limit() -> u32 {
        256
    }
    pub(super) const fn stop_grace_period() -> Span {
        Span::from_secs(10)
    }
    pub(super) const fn probe_period() -> Span {
        Span::from_secs(10)
    }
    pub(super) const fn probe_timeout() -> Span {
        Span::from_secs(1)
    }
    pub(super) fn root() -> String {
        "/".to_owned()
    }
    pub(super) const fn log_size() -> Bytes {
        Bytes(10 << 20)
    }
}

/// Serde through `Display` and `FromStr`, for values that users write as one string.
macro_rules! string_serde {
    ($name:ident) => {
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?
                    .parse()
                    .map_err(serde::de::Error::custom)
            }
        }
    };
}
string_serde!(Tmpfs);
string_serde!(VolumeMount);
string_serde!(DeviceMapping);
string_serde!(DiskPath);
string_serde!(Endpoint);
string_serde!(FileMode);
string_serde!(FileOwner);
string_serde!(OnRotate);
string_serde!(PassIf);
string_serde!(RestartPolicy);

impl fmt::Display for Tmpfs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:size={}", self.target, self.size)
    }
}

impl fmt::Display for VolumeMount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.source {
            VolumeSource::Named(name) => write!(f, "{name}:{}", self.target)?,
            VolumeSource::Bind(path) => write!(f, "{path}:{}", self.target)?,
        }
        f.write_str(if self.read_only { ":ro" } else { "" })
    }
}

impl fmt::Display for RestartPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Always => f.write_str("always"),
            Self::OnFailure { max_retries: None } => f.write_str("on-failure"),
            Self::OnFailure {
                max_retries: Some(max),
            } => write!(f, "on-failure:{max}"),
            Self::No => f.write_str("no"),
        }
    }
}

impl FromStr for RestartPolicy {
    type Err = parse::FieldError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "always" | "unless-stopped" => Ok(Self::Always),
            "on-failure" => Ok(Self::OnFailure { max_retries: None }),
            "no" => Ok(Self::No),
            _ => text
                .strip_prefix("on-failure:")
                .and_then(|max| max.parse().ok())
                .map(|max| Self::OnFailure {
                    max_retries: Some(max),
                })
                .ok_or_else(|| parse::FieldError::Restart(text.chars().take(40).collect())),
        }
    }
}

impl Serialize for Amount {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Count(count) => serializer.serialize_u32(*count),
            Self::Percent(percent) => serializer.collect_str(&format_args!("{percent}%")),
        }
    }
}
