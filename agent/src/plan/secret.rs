//! Secrets: which service lacks one, and what a changed one means for a container; and those that images are pulled with.

use std::collections::{BTreeMap, BTreeSet};

use foreshore_protocol::id::SecretName;
use foreshore_protocol::manifest::{OnRotate, RestartPolicy, SecretMount, Service};
use foreshore_protocol::message::{Reason, ReasonCode};
use foreshore_protocol::{Digest, ServiceName};

use super::history::reason;
use super::{Cause, Condemned, Observed, ObservedContainer, StagingHistory};

/// Why a service cannot be started: a secret of it is not there.
pub(super) fn missing(
    observed: &Observed,
    name: &ServiceName,
    service: &Service,
) -> Option<Reason> {
    let mut mounts = service.secrets.iter();
    let mount = mounts.find(|mount| !observed.secrets.contains_key(&mount.source))?;
    let message = format!(
        "waits for secret {}, which the hub has not sent to this device",
        mount.source
    );
    Some(reason(
        ReasonCode::SecretMissing,
        Some(name.clone()),
        &message,
    ))
}

/// Why the images of a release cannot be pulled yet: a secret that holds their logins is not there.
pub(super) fn missing_login(observed: &Observed, release: &Digest) -> Option<Reason> {
    let mut names = observed.releases.get(release)?.image_pull_secrets.iter();
    let name = names.find(|name| !observed.secrets.contains_key(*name))?;
    let message = format!(
        "waits for secret {name}, which its images are pulled with and the hub has not sent to this device"
    );
    Some(reason(ReasonCode::SecretMissing, None, &message))
}

/// Whether a secret that the images of a release are pulled with has another value than when that failed.
pub(super) fn has_other_logins(
    observed: &Observed,
    release: &Digest,
    failed: &StagingHistory,
) -> bool {
    let names = observed.releases.get(release).into_iter();
    let newest: BTreeMap<&SecretName, &u64> = names
        .flat_map(|release| &release.image_pull_secrets)
        .filter_map(|name| observed.secrets.get_key_value(name))
        .collect();
    newest != failed.logins.iter().collect()
}

/// Why a running container has to be started again: a secret of it has a new value that it can get in no other way. A job
/// runs on with what it has: it is not to be done twice.
pub(super) fn outdated(
    observed: &Observed,
    seen: &ObservedContainer,
    service: &Service,
) -> Option<Condemned> {
    if service.restart == RestartPolicy::No {
        return None;
    }
    let mut changed = changed(observed, seen, service);
    let mount = changed.find(|mount| mount.on_rotate == OnRotate::Restart)?;
    Some(Condemned {
        cause: Cause::Secret,
        why: format!("secret {} has a new value", mount.source),
    })
}

/// The signals that a running container gets after its files were replaced; `None` when none has to be.
pub(super) fn renewal(
    observed: &Observed,
    seen: &ObservedContainer,
    service: &Service,
) -> Option<BTreeSet<i32>> {
    let mut signals = None;
    for mount in changed(observed, seen, service) {
        match mount.on_rotate {
            OnRotate::Restart => {}
            OnRotate::Keep => _ = signals.get_or_insert_default(),
            OnRotate::Signal(signal) => {
                signals
                    .get_or_insert_with(BTreeSet::new)
                    .insert(signal.number());
            }
        }
    }
    signals
}

/// The secrets of a container that have another revision than it was given. One that is not there any more has not
/// changed: the container keeps what it has.
fn changed<'a>(
    observed: &'a Observed,
    seen: &'a ObservedContainer,
    service: &'a Service,
) -> impl Iterator<Item = &'a SecretMount> {
    service.secrets.iter().filter(|mount| {
        let has = seen.container.secrets.get(&mount.source);
        let newest = observed.secrets.get(&mount.source);
        newest.is_some_and(|newest| has != Some(newest))
    })
}
