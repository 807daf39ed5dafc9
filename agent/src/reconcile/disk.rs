//! Watching the disk: how much is free, what containers take of it, and the ballast.
//!
//! Looking at the file system costs a system call; counting what containers wrote costs reading directories. So the
//! first is done often while a container can write to the disk, and the second when the first has changed, and once
//! a minute. With no such container nothing is looked at and nobody is woken.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use foreshore_images::Room;
use foreshore_protocol::Digest;
use foreshore_protocol::manifest::VolumeSource;
use foreshore_protocol::release::{Release, service_digest};
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::causes::chain;
use crate::config::Config;
use crate::disk::{Ballast, Measured, Usage, measure};
use crate::plan::{Disk, DiskUsage};
use crate::runtime::{Container, ContainerId, ContainerState};

/// Between two looks at the file system while a container has a writable layer, or space is short.
const LOOK: Duration = Duration::from_secs(2);

/// While containers have volumes only.
const LOOK_AT_VOLUMES: Duration = Duration::from_secs(10);

/// While somebody fills the disk.
const LOOK_WHILE_FILLED: Duration = Duration::from_millis(250);

/// So many bytes or inodes less since the last look are somebody who fills the disk.
const FILLED: (u64, u64) = (1 << 20, 256);

/// At least so often containers are counted.
const COUNT: Duration = Duration::from_secs(60);

/// Counting takes at most this part of the time of one CPU.
const COUNT_PART: u32 = 8;

/// Between two attempts to make the ballast.
const BALLAST_RETRY: Duration = Duration::from_secs(60);

/// What a look at the disk found out that people should know.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Told {
    Nothing,
    /// The disk became short, or is not any more.
    Changed(String),
}

#[derive(Debug, Default)]
struct Counted {
    usage: BTreeMap<ContainerId, Usage>,
    under_way: bool,
    took: Duration,
}

#[derive(Debug)]
pub(super) struct DiskWatch {
    state: PathBuf,
    reserve: Option<u64>,
    ballast: Ballast,
    ballast_due: Option<Instant>,
    room: Room,
    low: bool,
    measured: Vec<Measured>,
    counted: Rc<RefCell<Counted>>,
    counted_at: Option<Instant>,
    /// What was free when containers were last counted.
    counted_room: Room,
    /// What volumes took when this agent first looked.
    volumes_before: BTreeMap<ContainerId, u64>,
    changed: Rc<Notify>,
    due: Option<Instant>,
}

impl DiskWatch {
    pub(super) fn new(config: &Config) -> Self {
        let state = config.paths.state.clone();
        Self {
            ballast: Ballast::new(&state, config.disk.ballast.0),
            ballast_due: None,
            reserve: config.disk.reserve.map(|reserve| reserve.0),
            state,
            room: Room::default(),
            low: false,
            measured: Vec::new(),
            counted: Rc::default(),
            counted_at: None,
            counted_room: Room::default(),
            volumes_before: BTreeMap::new(),
            changed: Rc::default(),
            due: None,
        }
    }

    /// Waits until containers were counted. Cancel safe: a change between two calls is kept.
    pub(super) async fn changed(&self) {
        self.changed.notified().await;
    }

    /// When [`Self::look`] is due next; `None` is never.
    pub(super) fn wake_at(&self) -> Option<Instant> {
        [self.due, self.ballast_due].into_iter().flatten().min()
    }

    pub(super) fn is_due(&self, now: Instant) -> bool {
        self.wake_at().is_some_and(|at| now >= at)
    }

    /// How the disk is, for the planner.
    pub(super) fn observed(&self) -> Disk {
        Disk {
            low: self.low,
            free: self.room.free_bytes,
            reserve: self.room.reserve_bytes,
            missing: if self.low { missing(&self.room) } else { 0 },
        }
    }

    /// What containers take, for the planner.
    pub(super) fn usage(&mut self) -> BTreeMap<ContainerId, DiskUsage> {
        let counted = self.counted.borrow();
        let found = self.measured.iter().filter_map(|measured| {
            let usage = counted.usage.get(&measured.id)?;
            let before = self
                .volumes_before
                .entry(measured.id.clone())
                .or_insert(usage.volumes);
            let observed = DiskUsage {
                layer: usage.layer,
                grown: usage.volumes.saturating_sub(*before),
            };
            Some((measured.id.clone(), observed))
        });
        found.collect()
    }

    /// Takes note of the containers that there are.
    pub(super) fn follow(
        &mut self,
        containers: &[Container],
        releases: &BTreeMap<Digest, Release>,
    ) {
        let measured: Vec<Measured> = containers
            .iter()
            .filter_map(|container| measured(container, releases))
            .collect();
        if measured == self.measured {
            return;
        }
        self.counted
            .borrow_mut()
            .usage
            .retain(|id, _| measured.iter().any(|measured| measured.id == *id));
        self.volumes_before
            .retain(|id, _| measured.iter().any(|measured| measured.id == *id));
        self.measured = measured;
        // Also the newcomers.
        self.counted_at = None;
    }

    /// Looks at the file system, and begins to count when that is due. Cheap: called before every plan too.
    pub(super) fn look(&mut self) -> Told {
        let now = Instant::now();
        let room = match Room::of(&self.state, self.reserve) {
            Ok(room) => room,
            Err(error) => {
                tracing::debug!(error = chain(&error), "the file system cannot be looked at");
                self.due = (!self.measured.is_empty()).then_some(now + LOOK);
                return Told::Nothing;
            }
        };
        let before = std::mem::replace(&mut self.room, room);
        let told = self.judge();
        self.settle_ballast(now);
        let filled = is_filled(&before, &room);
        self.count(now);
        self.due = self.pause(filled).map(|pause| now + pause);
        told
    }

    fn judge(&mut self) -> Told {
        let was = self.low;
        self.low = if was {
            missing(&self.room) > 0
        } else {
            !self.room.is_enough()
        };
        let free = self.room.free_bytes >> 20;
        match (was, self.low) {
            (false, true) => Told::Changed(format!(
                "the disk is short of space: {}",
                self.room
                    .shortage(0, 0)
                    .map_or_else(String::new, |shortage| shortage.to_string())
            )),
            (true, false) => {
                Told::Changed(format!("the disk has space again: {free} MiB are free"))
            }
            _ => Told::Nothing,
        }
    }

    fn pause(&self, filled: bool) -> Option<Duration> {
        let writable = self
            .measured
            .iter()
            .any(|measured| measured.layer_limit.is_some());
        if self.low {
            return Some(LOOK);
        }
        if self.measured.is_empty() {
            return None;
        }
        Some(match (filled, writable) {
            (true, _) => LOOK_WHILE_FILLED,
            (false, true) => LOOK,
            (false, false) => LOOK_AT_VOLUMES,
        })
    }

    fn count(&mut self, now: Instant) {
        let counted = self.counted.borrow();
        let rest = counted.took * COUNT_PART;
        let since = self.counted_at.map(|at| now.duration_since(at));
        let due = match since {
            None => true,
            Some(since) => {
                since >= COUNT
                    || (since >= rest && (self.low || is_filled(&self.counted_room, &self.room)))
            }
        };
        if counted.under_way || self.measured.is_empty() || !due {
            return;
        }
        drop(counted);
        self.counted_at = Some(now);
        self.counted_room = self.room;
        self.counted.borrow_mut().under_way = true;
        let (state, measured) = (self.state.clone(), self.measured.clone());
        let (counted, changed) = (Rc::clone(&self.counted), Rc::clone(&self.changed));
        tokio::task::spawn_local(async move {
            let all = tokio::task::spawn_blocking(move || {
                let each = measured
                    .iter()
                    .map(|container| (container.id.clone(), measure(&state, container)));
                each.collect::<BTreeMap<_, _>>()
            });
            let usage = all.await;
            let mut counted = counted.borrow_mut();
            counted.under_way = false;
            counted.took = now.elapsed();
            match usage {
                Ok(usage) if usage != counted.usage => {
                    counted.usage = usage;
                    changed.notify_one();
                }
                Ok(_) => {}
                Err(error) => tracing::error!(%error, "counting what containers take broke off"),
            }
        });
    }

    fn settle_ballast(&mut self, now: Instant) {
        if !self.ballast.is_missing() || self.ballast_due.is_some_and(|due| now < due) {
            return;
        }
        self.ballast_due = None;
        if let Err(error) = self.ballast.settle(&self.room) {
            tracing::warn!(error = chain(&error), "the ballast cannot be made");
        }
        if self.ballast.is_missing() {
            self.ballast_due = Some(now + BALLAST_RETRY);
        }
    }

    /// Gives the ballast up; its size, when there was one.
    pub(super) fn release_ballast(&mut self) -> Option<u64> {
        let released = self.ballast.release().then(|| self.ballast.size());
        if released.is_some() {
            self.ballast_due = Some(Instant::now() + BALLAST_RETRY);
        }
        released
    }
}

/// What is missing until a quarter more than the reserve is free; inodes count as what an empty file takes.
fn missing(room: &Room) -> u64 {
    let goal = |reserve: u64| reserve.saturating_add(reserve / 4);
    let bytes = goal(room.reserve_bytes).saturating_sub(room.free_bytes);
    let inodes = room
        .free_inodes
        .map_or(0, |free| goal(room.reserve_inodes).saturating_sub(free));
    bytes.max(inodes.saturating_mul(4096))
}

/// Whether so much was written between two looks that somebody fills the disk.
fn is_filled(before: &Room, after: &Room) -> bool {
    let inodes = |room: &Room| room.free_inodes.unwrap_or(0);
    before.free_bytes.saturating_sub(after.free_bytes) >= FILLED.0
        || inodes(before).saturating_sub(inodes(after)) >= FILLED.1
}

/// What to count of a container, if it runs and can write to the disk.
fn measured(container: &Container, releases: &BTreeMap<Digest, Release>) -> Option<Measured> {
    let ContainerState::Running { pid, .. } = container.state else {
        return None;
    };
    let service = releases
        .values()
        .filter(|release| release.app == container.id.app)
        .filter_map(|release| release.services.get(&container.id.service))
        .find(|service| service_digest(service) == container.service_digest)?;
    let volumes: Vec<String> = service
        .volumes
        .iter()
        .filter(|volume| !volume.read_only)
        .filter_map(|volume| match &volume.source {
            VolumeSource::Named(name) => Some(name.to_string()),
            VolumeSource::Bind(_) => None,
        })
        .collect();
    let layer_limit = service.layer_limit();
    (layer_limit.is_some() || !volumes.is_empty()).then(|| Measured {
        id: container.id.clone(),
        pid,
        layer_limit,
        volumes,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn room(free_bytes: u64, free_inodes: u64) -> Room {
        Room {
            free_bytes,
            free_inodes: Some(free_inodes),
            reserve_bytes: 100 << 20,
            reserve_inodes: 1000,
        }
    }

    #[test]
    fn what_is_missing_is_a_quarter_more_than_the_reserve() {
        assert_eq!(missing(&room(125 << 20, 1250)), 0);
        assert_eq!(missing(&room(100 << 20, 1250)), 25 << 20);
        assert_eq!(missing(&room(u64::MAX, 250)), 1000 * 4096);
    }

    #[test]
    fn filling_is_told_by_bytes_or_by_inodes() {
        let before = room(1 << 30, 5000);
        assert!(!is_filled(&before, &room((1 << 30) - 4096, 4990)));
        assert!(is_filled(&before, &room((1 << 30) - (1 << 20), 5000)));
        assert!(is_filled(&before, &room(1 << 30, 4000)));
        assert!(!is_filled(&before, &room(2 << 30, 6000)));
    }
}
