//! The next step on one service, from its containers alone.

use std::collections::BTreeSet;

use foreshore_protocol::Digest;
use foreshore_protocol::manifest::Service;

use super::secret;
use super::service::{Spec, service_of};
use super::{Cause, Draft, Kept, KeptUntil, ObservedContainer, Resume, ServiceHistory};
use crate::runtime::{ContainerId, ContainerState};

/// What comes next for one service.
#[derive(Debug)]
pub(super) enum Next<'a> {
    Remove(ContainerId),
    Stop(&'a ObservedContainer),
    /// Of this release and spec.
    Start(Digest, Digest),
    /// With a service of this release, and these signals.
    Renew(ContainerId, Digest, BTreeSet<i32>),
}

/// What a service should be.
#[derive(Debug)]
pub(super) struct Wish<'a> {
    pub(super) release: Digest,
    pub(super) spec: &'a Spec<'a>,
    pub(super) ready: bool,
    /// For what it depends on, or for a secret.
    pub(super) waits: bool,
    /// Whether its new container is started beside the one before.
    pub(super) beside: bool,
    /// Its spec in the last-known-good.
    pub(super) good: Option<Digest>,
}

impl Wish<'_> {
    /// Who of those that run and are not wanted serves until the new one is ready: one alone, as they share memory.
    fn serves_meanwhile(&self, running: &[&ObservedContainer]) -> Option<u64> {
        if !self.beside || self.ready {
            return None;
        }
        let before = running
            .iter()
            .filter(|seen| seen.container.service_digest != self.spec.digest);
        before
            .max_by_key(|seen| {
                let is_good = Some(seen.container.service_digest) == self.good;
                (is_good, seen.container.id.instance)
            })
            .map(|seen| seen.container.id.instance)
    }
}

/// What comes next for a service whose containers are these, of which `old` is kept.
pub(super) fn next_step<'a>(
    draft: &mut Draft<'_>,
    history: &ServiceHistory,
    containers: &[&'a ObservedContainer],
    wish: Option<&Wish<'_>>,
    old: Option<&Kept>,
) -> Option<Next<'a>> {
    if draft.is_later(history.stuck_until) {
        return None;
    }
    let let_go = old
        .filter(|old| old.until == KeptUntil::Over)
        .map(|old| old.service.instance);
    let keep = containers
        .iter()
        .filter(|seen| Some(seen.container.id.instance) != let_go)
        .filter(|seen| {
            wish.is_some_and(|wish| {
                wish.spec.digest == seen.container.service_digest
                    && stays(draft, history, seen, wish.spec.service)
            })
        })
        .map(|seen| seen.container.id.instance)
        .max();
    let unwanted = containers
        .iter()
        .copied()
        .filter(|seen| Some(seen.container.id.instance) != keep);
    let (running, ended): (Vec<&'a ObservedContainer>, Vec<_>) =
        unwanted.partition(|seen| matches!(seen.container.state, ContainerState::Running { .. }));
    if let Some(seen) = ended.first() {
        return Some(Next::Remove(seen.container.id.clone()));
    }
    let is = |instance: Option<u64>| {
        move |seen: &&&ObservedContainer| Some(seen.container.id.instance) == instance
    };
    if let Some(seen) = running.iter().find(is(let_go)) {
        return Some(Next::Stop(seen));
    }
    // The one before serves until the new one is ready, or is kept for longer.
    let beside = old
        .map(|old| old.service.instance)
        .or_else(|| wish?.serves_meanwhile(&running));
    let mut surplus = running.iter().filter(|seen| !is(beside)(seen));
    if let Some(seen) = surplus.next() {
        return Some(Next::Stop(seen));
    }
    let wish = wish?;
    let kept = containers.iter().find(|seen| {
        Some(seen.container.id.instance) == keep
            && matches!(seen.container.state, ContainerState::Running { .. })
    });
    if let Some(seen) = kept
        && let Some(signals) = secret::renewal(draft.observed, seen, wish.spec.service)
    {
        let id = seen.container.id.clone();
        return Some(Next::Renew(id, wish.release, signals));
    }
    let here = |image| draft.observed.images.contains(&image);
    let may_start = keep.is_none()
        && !wish.waits
        && wish.spec.image.is_some_and(here)
        && may_start(draft, history, wish.spec);
    if may_start {
        return Some(Next::Start(wish.release, wish.spec.digest));
    }
    renew_old(draft, &running, old)
}

/// Who is kept gets new values of its secrets like everybody.
fn renew_old<'a>(
    draft: &Draft<'_>,
    running: &[&'a ObservedContainer],
    old: Option<&Kept>,
) -> Option<Next<'a>> {
    let seen = running
        .iter()
        .find(|seen| old.is_some_and(|old| old.service.instance == seen.container.id.instance))?;
    let (release, service) = service_of(draft.observed, &seen.container, &BTreeSet::new())?;
    let signals = secret::renewal(draft.observed, seen, service)?;
    Some(Next::Renew(seen.container.id.clone(), release, signals))
}

/// Whether a container of the right spec stays: it runs and is well, or it ended and is not to be replaced now.
fn stays(
    draft: &mut Draft<'_>,
    history: &ServiceHistory,
    seen: &ObservedContainer,
    service: &Service,
) -> bool {
    // What has ended may give its writable layer back.
    let gives = draft.observed.disk.low || is_too_large(history);
    if gives
        && !service.read_only
        && !matches!(seen.container.state, ContainerState::Running { .. })
    {
        return false;
    }
    let instance = seen.container.id.instance;
    match seen.container.state {
        ContainerState::Running { .. } => !history.has_ended(instance),
        ContainerState::Broken => false,
        ContainerState::Exited(_) => match history.resume {
            Resume::Never => instance == history.instance,
            Resume::At(at) => draft.is_later(at),
            Resume::Now => false,
        },
    }
}

fn is_too_large(history: &ServiceHistory) -> bool {
    let cause = history.condemned.as_ref().map(|condemned| condemned.cause);
    matches!(cause, Some(Cause::DiskLimit | Cause::Evicted))
}

fn is_evicted(history: &ServiceHistory) -> bool {
    let cause = history.condemned.as_ref().map(|condemned| condemned.cause);
    cause == Some(Cause::Evicted)
}

fn may_start(draft: &mut Draft<'_>, history: &ServiceHistory, spec: &Spec<'_>) -> bool {
    if history.spec != Some(spec.digest) {
        return true;
    }
    if is_evicted(history) && draft.observed.disk.low {
        // Planned again when that changes.
        return false;
    }
    match history.resume {
        Resume::Never => false,
        Resume::At(at) => !draft.is_later(at),
        Resume::Now => true,
    }
}
