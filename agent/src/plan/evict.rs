//! Eviction: which container is stopped when the device runs out of disk space.
//!
//! Old containers that are kept go first (`kept.rs`), then garbage. Then, one at a time, the service of the lowest priority that has something to give: the
//! largest of them. What has nothing to give is never touched, and nobody starts again before there is room.

use super::{Draft, History, ObservedContainer, kept};
use crate::plan::service::service_of;
use crate::runtime::{ContainerId, ContainerState};

/// How long an eviction or a collection has until the next: removing a large layer takes seconds.
const PAUSE_MS: u64 = 10_000;

/// Who takes less has nothing to give: an empty writable layer has a few entries.
const BYTES_MIN: u64 = 1 << 20;

/// Who takes less than this part of what is missing would not help.
const PART: u64 = 16;

/// Who has to go, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Victim {
    pub(super) id: ContainerId,
    pub(super) why: String,
}

/// Decides while the disk is short. Sets [`History::disk_full`] when garbage may help.
pub(super) fn choose<'a>(draft: &mut Draft<'a>, history: &mut History) -> Option<Victim> {
    let disk = draft.observed.disk;
    if !disk.low {
        history.swept = false;
        return None;
    }
    let observed = draft.observed;
    let removing = |id: &ContainerId| draft.is_busy(&id.app, &id.service);
    let under_way = draft.observed.busy.collecting
        || observed
            .containers
            .iter()
            .any(|seen| removing(&seen.container.id));
    // What old containers leave behind is garbage too.
    let under_way = under_way || kept::are_leaving(observed, history);
    if under_way || draft.is_later(history.evict_after) {
        return None;
    }
    let next = draft.now.ms.plus(PAUSE_MS);
    if !std::mem::replace(&mut history.swept, true) {
        history.disk_full = true;
        history.evict_after = next;
        draft.is_later(next);
        return None;
    }
    let apps = &history.apps;
    let candidate = |seen: &'a ObservedContainer| {
        let id = &seen.container.id;
        let ended = apps
            .get(&id.app)
            .and_then(|app| app.services.get(&id.service))
            .is_some_and(|service| service.has_ended(id.instance));
        let runs = matches!(seen.container.state, ContainerState::Running { .. });
        let usage = observed.usage.get(id)?;
        let bytes = usage.layer.saturating_add(usage.grown);
        let helps = bytes >= BYTES_MIN && bytes >= disk.missing / PART;
        if !runs || ended || !helps {
            return None;
        }
        let none = std::collections::BTreeSet::new();
        let (_, service) = service_of(observed, &seen.container, &none)?;
        Some((service.priority, std::cmp::Reverse(bytes), id))
    };
    let (priority, std::cmp::Reverse(bytes), id) =
        observed.containers.iter().filter_map(candidate).min()?;
    // Only now: with nobody to evict nothing changes, and nothing is written.
    history.evict_after = next;
    draft.is_later(next);
    Some(Victim {
        id: id.clone(),
        why: format!(
            "the device is short of disk space ({} MiB free, {} MiB in reserve), and of the services with the \
             lowest priority ({priority}) it takes most ({} MiB)",
            disk.free >> 20,
            disk.reserve >> 20,
            bytes >> 20
        ),
    })
}
