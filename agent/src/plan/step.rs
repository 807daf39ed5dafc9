//! [`Step`], what a plan asks for, and [`Outcome`], what came of it.

use std::collections::{BTreeMap, BTreeSet};

use foreshore_protocol::id::SecretName;
use foreshore_protocol::message::{Reason, ReasonCode};
use foreshore_protocol::{AppName, Digest, ServiceName};

use crate::runtime::ContainerId;

/// One thing to do. Idempotent: doing it twice, or doing it after a crash in the middle, is fine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Fetch, check and unpack these images of a release, given as `HOST/REPOSITORY@sha256:…`. Takes long;
    /// at most one at a time. Nothing that runs is touched.
    Stage {
        /// For which app.
        app: AppName,
        /// For which release.
        release: Digest,
        /// What is not there yet; sorted, without duplicates.
        images: Vec<String>,
    },
    /// Give up the staging that is under way: its release is no longer wanted.
    AbandonStaging {
        /// Which release.
        release: Digest,
    },
    /// Ask the container to end, and after the grace period make it.
    Stop {
        /// Which container.
        id: ContainerId,
        /// The signal to begin with (signal(7)).
        signal: i32,
        /// How long until SIGKILL, in milliseconds, the commands before included.
        grace_ms: u64,
        /// Commands to run in it before.
        pre_stop: Vec<Vec<String>>,
    },
    /// Remove a container that has ended, and what is left of it. Its volumes and logs stay.
    Remove {
        /// Which container.
        id: ContainerId,
    },
    /// Start a container of a service of a release whose manifest and image are on disk.
    Start {
        /// The new container; its instance number was never used before.
        id: ContainerId,
        /// The release to take the service from.
        release: Digest,
    },
    /// Replace the files of a running container's secrets, then send it these signals.
    RenewSecrets {
        /// Which container.
        id: ContainerId,
        /// The release to take the service from.
        release: Digest,
        /// Signals (signal(7)) for its first process.
        signals: BTreeSet<i32>,
    },
    /// Remove the images, release manifests and logs that are not named here.
    Collect {
        /// Digests of images, as releases name them.
        keep_images: BTreeSet<Digest>,
        /// Digests of releases.
        keep_releases: BTreeSet<Digest>,
        /// The services whose logs stay. Volumes always do.
        keep_logs: BTreeSet<(AppName, ServiceName)>,
    },
}

/// What came of a [`Step`], or of fetching a release manifest. Recorded with
/// [`super::History::record`] before the next plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// All images of the release are there.
    Staged {
        /// Which release.
        release: Digest,
    },
    /// Some image could not be staged.
    StagingFailed {
        /// Which release.
        release: Digest,
        /// Why; its code decides whether it is tried again.
        reason: Reason,
        /// The revisions of the secrets that it was tried with: with others it is tried again at once.
        logins: BTreeMap<SecretName, u64>,
    },
    /// The manifest that came from the hub is not the one that was asked for; it is asked for again.
    /// `schema_unknown` means that it is, but this agent is too old to read it.
    BadRelease {
        /// Which release.
        release: Digest,
        /// What is wrong with it, for people.
        message: String,
        /// Whether asking again is of no use.
        schema_unknown: bool,
    },
    /// The container was started.
    Started {
        /// Which.
        id: ContainerId,
    },
    /// The container was not started, and nothing of it is left.
    StartFailed {
        /// Which.
        id: ContainerId,
        /// Why.
        code: ReasonCode,
        /// Why, for people.
        message: String,
        /// Whether trying again is of no use: image and service do not fit together.
        refused: bool,
    },
    /// The container has ended.
    Stopped {
        /// Which.
        id: ContainerId,
    },
    /// Nothing is left of the container.
    Removed {
        /// Which.
        id: ContainerId,
    },
    /// The files of the container's secrets are the newest.
    SecretsRenewed {
        /// Which.
        id: ContainerId,
    },
    /// The container could not be stopped, removed or given its secrets; it is tried again.
    Stuck {
        /// Which.
        id: ContainerId,
        /// Why, for people.
        message: String,
    },
    /// [`Step::Collect`] has ended, with or without success.
    Collected,
}
