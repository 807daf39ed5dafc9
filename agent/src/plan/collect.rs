//! Garbage collection: which images and release manifests nobody needs any more.

use std::collections::BTreeSet;

use foreshore_protocol::{AppName, Digest, ServiceName, Version};

use super::service::{image_digest, service_of};
use super::{Draft, History, Step};

/// How long after a collection the next may come, unless a release succeeded meanwhile.
const PAUSE_MS: u64 = 600_000;

/// What must stay.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Live {
    pub(super) images: BTreeSet<Digest>,
    pub(super) releases: BTreeSet<Digest>,
    pub(super) services: BTreeSet<(AppName, ServiceName)>,
}

/// Plans a collection when there is garbage and nothing else to do, or when the disk is full.
pub(super) fn advance(draft: &mut Draft<'_>, history: &mut History, desired: Option<Version>) {
    if draft.collect_soon {
        history.collect_after = draft.now.ms;
    }
    let busy = &draft.observed.busy;
    if busy.collecting || busy.staging.is_some() {
        return;
    }
    let live = live(draft, history);
    if history.disk_full {
        // What an abandoned staging left is garbage too, and is not listed.
        match live {
            Some(live) => collect(draft, history, live),
            None => history.disk_full = false,
        }
        return;
    }
    let Some(live) = live
        .filter(|live| desired.is_some() && is_idle(draft, history) && has_garbage(draft, live))
    else {
        return;
    };
    if !draft.is_later(history.collect_after) {
        collect(draft, history, live);
    }
}

fn collect(draft: &mut Draft<'_>, history: &mut History, live: Live) {
    history.collect_after = draft.now.ms.plus(PAUSE_MS);
    draft.steps.push(Step::Collect {
        keep_images: live.images,
        keep_releases: live.releases,
        keep_logs: live.services,
    });
}

fn is_idle(draft: &Draft<'_>, history: &History) -> bool {
    let settled = |app: &super::AppHistory| {
        app.trial.is_none()
            && app
                .assignment
                .as_ref()
                .is_none_or(|assignment| assignment.phase.is_final())
    };
    draft.steps.is_empty()
        && draft.fetch.is_empty()
        && draft.candidates.is_empty()
        && draft.observed.busy.services.is_empty()
        && history.apps.values().all(settled)
}

fn has_garbage(draft: &Draft<'_>, live: &Live) -> bool {
    let observed = draft.observed;
    !observed.images.is_subset(&live.images)
        || observed
            .releases
            .keys()
            .any(|release| !live.releases.contains(release))
}

/// What must stay: all that is current, last-known-good, assigned or in use by a container. `None` when a
/// container's image is not known.
pub(super) fn live(draft: &Draft<'_>, history: &History) -> Option<Live> {
    let observed = draft.observed;
    let mut live = Live::default();
    live.images.extend(&observed.pinned);
    for app in history.apps.values() {
        let assigned = app.assignment.as_ref().map(|assignment| assignment.release);
        let good = app.last_known_good.as_ref().map(|good| good.release);
        live.releases
            .extend([app.current, good, assigned].into_iter().flatten());
    }
    for release in &live.releases {
        if let Some(manifest) = observed.releases.get(release) {
            live.images
                .extend(manifest.services.values().filter_map(image_digest));
            let names = manifest.services.keys();
            live.services
                .extend(names.map(|service| (manifest.app.clone(), service.clone())));
        } else {
            // Its images cannot be told from garbage.
            return None;
        }
    }
    for seen in &observed.containers {
        let id = &seen.container.id;
        live.services.insert((id.app.clone(), id.service.clone()));
        // Mostly found in a release that is live anyway, as unchanged services outlive their release.
        let (release, service) = service_of(observed, &seen.container, &live.releases)?;
        live.images.insert(image_digest(service)?);
        live.releases.insert(release);
    }
    Some(live)
}
