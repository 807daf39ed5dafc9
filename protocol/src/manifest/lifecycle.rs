//! What a service says about the order of starts and stops, and how it is replaced.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::id::ServiceName;
use crate::quantity::Span;

/// What a service waits for before its first start (Compose `depends_on`), by the service it depends on.
pub type Dependencies = BTreeMap<ServiceName, Dependency>;

/// One entry of [`Dependencies`]. The short form, a list of names, means [`Condition::Started`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Dependency {
    /// What must hold of the other service.
    pub condition: Condition,
}

/// What must hold of a service that another one depends on (Compose spellings).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Condition {
    /// Its container was started.
    #[serde(rename = "service_started")]
    Started,
    /// It is ready: it has a readiness probe, and that says so.
    #[serde(rename = "service_healthy")]
    Healthy,
    /// It ran for this release and ended with status 0.
    #[serde(rename = "service_completed_successfully")]
    Completed,
}

impl Condition {
    /// As written in a manifest.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Started => "service_started",
            Self::Healthy => "service_healthy",
            Self::Completed => "service_completed_successfully",
        }
    }
}

/// A command that is run inside the container (Compose lifecycle hooks).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hook {
    /// The program and its arguments; not a shell line.
    pub command: Vec<String>,
}

/// How a service is replaced; the part of Compose's `deploy` that means something on one device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Deploy {
    /// How one container takes the place of another.
    #[serde(default)]
    pub update_config: UpdateConfig,
}

impl Deploy {
    pub(super) fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// `update_config:` of a [`Deploy`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UpdateConfig {
    /// Which comes first.
    #[serde(default)]
    pub order: UpdateOrder,
    /// With [`UpdateOrder::StartFirst`]: how long the old container runs on from when the new one is ready, and in any case
    /// until the new release is the last-known-good; above 0 and at most 1d. Going back within that time starts nothing.
    /// Of a container that is replaced, what the *new* release says counts. Default: it is stopped when the new one is ready.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep_old: Option<Span>,
}

impl UpdateConfig {
    /// How long an old container is kept, in milliseconds; `None` when it is not.
    #[must_use]
    pub const fn keep_old_ms(&self) -> Option<u64> {
        match (self.order, self.keep_old) {
            (UpdateOrder::StartFirst, Some(span)) => Some(span.millis()),
            (UpdateOrder::StartFirst, None) | (UpdateOrder::StopFirst, _) => None,
        }
    }
}

/// Whether a new container waits for the old one to end, or the old one for the new one to be ready.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum UpdateOrder {
    /// The old container is stopped and removed, then the new one is started.
    #[default]
    StopFirst,
    /// The new container is started beside the old one, which is stopped once the new one is ready. Both
    /// share the service's volumes, and with `network_mode: host` its ports.
    StartFirst,
}
