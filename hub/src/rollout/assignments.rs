//! The devices of a rollout, and what is derived from their records: counts, queues and deadlines.
//!
//! An assignment changes only through [`Assignments::change`] and its few neighbours here, which keep the indices in
//! step; so a decision costs what changed and not what there is. Nothing derived is stored: the indices are made anew
//! when a rollout is loaded, and [`Assignments::discrepancy`] compares them with a recount.
//!
//! Also here is what the engine remembers from one look to the next ([`Looked`]): which devices changed since, and up
//! to when deadlines were looked at. That too is derived; a rollout that was just loaded is looked at whole.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Index as Lookup;

use foreshore_protocol::DeviceId;
use foreshore_protocol::api::AssignmentState;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::budget::Tally;
use super::observe::Patience;
use super::rollback::{Way, way};
use super::state::{Assignment, Facts, Revert, Tick};

/// The assignments of a rollout by device, in the order of their ids.
///
/// Two are equal if their records are, whatever was derived from them.
#[derive(Debug, Clone, Default)]
pub struct Assignments {
    rows: BTreeMap<DeviceId, Row>,
    /// By number; a device that was removed leaves its number unused.
    names: Vec<DeviceId>,
    index: Index,
    next_rank: u32,
    looked: Option<Looked>,
    /// Changed since the last look.
    changed: BTreeSet<DeviceId>,
}

#[derive(Debug, Clone)]
struct Row {
    assignment: Assignment,
    number: u32,
    sight: Sight,
}

/// What the queues need to know of a device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Sight {
    online: bool,
    held: bool,
    busy: bool,
}

impl Sight {
    fn of(facts: Option<&Facts>) -> Self {
        facts.map_or_else(Self::default, |facts| Self {
            online: facts.online,
            held: facts.held,
            busy: facts.busy,
        })
    }
}

/// How far the last look went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Looked {
    /// Deadlines up to here were looked at.
    pub(super) tick: Tick,
    /// Which conclusions could be drawn.
    pub(super) patience: Patience,
}

/// Those who wait for their turn together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Group {
    /// The wave of that ordinal.
    Wave(u32),
    /// Those that come after the last.
    Tail,
}

impl Group {
    const fn of(assignment: &Assignment) -> Self {
        if assignment.tail {
            Self::Tail
        } else {
            Self::Wave(assignment.wave)
        }
    }
}

/// Devices that something may be decided about, in the order in which it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Queue {
    /// Planned, and offline or held. By rank.
    Absent(Group),
    /// Planned, there, not held and not busy: can be offered the release. By rank.
    Ready(Group),
    /// Planned, never offered anything, there and not held, of this kind and this wave. By rank.
    Spare(u32, u32),
    /// Put off before anything was offered, of this wave and this kind. By rank.
    Unoffered(u32, u32),
    /// Failed, also if it was sent back since. By wave, then rank.
    Failed,
    /// What a rollback must undo, and how. By wave, then rank.
    Back(Way),
}

/// A place in a queue: the order, then the device's number.
type Place = (u32, u32, u32);

/// Everything that is derived from the records.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Index {
    waves: BTreeMap<u32, Count>,
    tail: Count,
    queues: BTreeMap<Queue, BTreeSet<Place>>,
    deadlines: BTreeSet<(Tick, u32)>,
    ways_back: WaysBack,
}

/// Devices counted, with the times of their successes, as the newest of these may be taken back.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Count {
    all: u32,
    tally: Tally,
    successes: BTreeMap<Tick, u32>,
}

/// Devices that were given their release of before, by how far their way back is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct WaysBack {
    /// Have it.
    pub(super) done: u32,
    /// Could not go back.
    pub(super) failed: u32,
    /// On their way.
    pub(super) open: u32,
    /// Of these, online.
    pub(super) open_online: u32,
}

impl Count {
    fn set(&mut self, assignment: &Assignment, there: bool) {
        let one = Tally::one(assignment);
        self.tally.shift(&one, there);
        shift(&mut self.all, 1, there);
        if let Some(at) = one.last_success {
            let known = self.successes.entry(at).or_default();
            shift(known, 1, there);
            if *known == 0 {
                self.successes.remove(&at);
            }
        }
    }

    fn tally(&self) -> Tally {
        Tally {
            last_success: self.successes.last_key_value().map(|(at, _)| *at),
            ..self.tally
        }
    }
}

/// Adds or takes away; never below nothing.
pub(super) const fn shift(count: &mut u32, by: u32, there: bool) {
    *count = if there {
        count.saturating_add(by)
    } else {
        count.saturating_sub(by)
    };
}

impl Index {
    fn of<'a>(rows: impl IntoIterator<Item = &'a Row>) -> Self {
        let mut index = Self::default();
        for row in rows {
            index.set(row, true);
        }
        index
    }

    /// Takes a row in, or (`there` is false) out: the same steps for both, so that they cannot differ.
    fn set(&mut self, row: &Row, there: bool) {
        let Row {
            assignment,
            number,
            sight,
        } = row;
        let wave = self.waves.entry(assignment.wave).or_default();
        wave.set(assignment, there);
        if wave.all == 0 {
            self.waves.remove(&assignment.wave);
        }
        if assignment.tail {
            self.tail.set(assignment, there);
        }
        if let Some(deadline) = assignment.deadline {
            put(&mut self.deadlines, (deadline, *number), there);
        }
        let by_rank = (assignment.rank, 0, *number);
        let by_wave = (assignment.wave, assignment.rank, *number);
        let idle = assignment.since.is_none();
        match assignment.state {
            AssignmentState::Planned => {
                let group = Group::of(assignment);
                if sight.held || !sight.online {
                    self.queue(Queue::Absent(group), by_rank, there);
                } else {
                    if !sight.busy {
                        self.queue(Queue::Ready(group), by_rank, there);
                    }
                    if idle {
                        let spare = Queue::Spare(assignment.stratum, assignment.wave);
                        self.queue(spare, by_rank, there);
                    }
                }
            }
            AssignmentState::Deferred if idle => {
                let unoffered = Queue::Unoffered(assignment.wave, assignment.stratum);
                self.queue(unoffered, by_rank, there);
            }
            AssignmentState::Deferred
            | AssignmentState::Offered
            | AssignmentState::Device(_)
            | AssignmentState::Silent
            | AssignmentState::Reverted => {}
        }
        if assignment.failed {
            self.queue(Queue::Failed, by_wave, there);
        }
        if let Some(way) = way(assignment, sight.online) {
            self.queue(Queue::Back(way), by_wave, there);
        }
        let ways = &mut self.ways_back;
        match assignment.revert {
            Some(Revert::Done) => shift(&mut ways.done, 1, there),
            Some(Revert::Failed) => shift(&mut ways.failed, 1, there),
            Some(Revert::Switching | Revert::Settling) => {
                shift(&mut ways.open, 1, there);
                shift(&mut ways.open_online, u32::from(sight.online), there);
            }
            Some(Revert::Gone) | None => {}
        }
    }

    fn queue(&mut self, queue: Queue, place: Place, there: bool) {
        let places = self.queues.entry(queue).or_default();
        put(places, place, there);
        if places.is_empty() {
            self.queues.remove(&queue);
        }
    }
}

fn put<T: Ord>(set: &mut BTreeSet<T>, item: T, there: bool) {
    if there {
        set.insert(item);
    } else {
        set.remove(&item);
    }
}

impl Assignments {
    /// The assignment of a device.
    #[must_use]
    pub fn get(&self, device: &DeviceId) -> Option<&Assignment> {
        self.rows.get(device).map(|row| &row.assignment)
    }

    /// Whether the device takes part, or did.
    #[must_use]
    pub fn contains_key(&self, device: &DeviceId) -> bool {
        self.rows.contains_key(device)
    }

    /// How many devices there are, with those that left.
    #[must_use]
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Every device with its assignment, by id.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&DeviceId, &Assignment)> + Clone {
        self.rows
            .iter()
            .map(|(device, row)| (device, &row.assignment))
    }

    /// Every device, by id.
    pub fn keys(&self) -> impl ExactSizeIterator<Item = &DeviceId> + Clone {
        self.rows.keys()
    }

    /// Every assignment, by the id of its device.
    pub fn values(&self) -> impl ExactSizeIterator<Item = &Assignment> + Clone {
        self.rows.values().map(|row| &row.assignment)
    }

    /// All counted. Costs O(waves).
    #[must_use]
    pub fn tally(&self) -> Tally {
        let mut tally = Tally::default();
        for count in self.index.waves.values() {
            let wave = count.tally();
            tally.shift(&wave, true);
            tally.last_success = tally.last_success.max(wave.last_success);
        }
        tally
    }

    /// Those of one wave counted; 0: those that joined after the last.
    #[must_use]
    pub fn tally_of_wave(&self, ordinal: u32) -> Tally {
        let count = self.index.waves.get(&ordinal);
        count.map_or_else(Tally::default, Count::tally)
    }

    /// Those that come after the last wave counted.
    #[must_use]
    pub fn tally_of_tail(&self) -> Tally {
        self.index.tail.tally()
    }

    /// What differs between the indices and a recount of the records; `None`: nothing, as it must be.
    #[must_use]
    pub fn discrepancy(&self) -> Option<String> {
        let recount = Index::of(self.rows.values());
        let numbered = |(device, row): (&DeviceId, &Row)| self.name(row.number) == Some(device);
        if !self.rows.iter().all(numbered) {
            return Some("a device does not have its number".to_owned());
        }
        let highest = self.rows.values().map(|row| row.assignment.rank).max();
        if highest.is_some_and(|rank| rank >= self.next_rank) {
            return Some(format!("rank {} is taken", self.next_rank));
        }
        (recount != self.index).then(|| format!("{:?}, recounted {recount:?}", self.index))
    }

    /// Takes a device out that is forgotten: nothing of it is left.
    pub fn remove(&mut self, device: &DeviceId) {
        if let Some(row) = self.rows.remove(device) {
            self.index.set(&row, false);
            self.changed.remove(device);
        }
    }

    /// Changes an assignment; false if there is none.
    pub(super) fn change(
        &mut self,
        device: &DeviceId,
        change: impl FnOnce(&mut Assignment),
    ) -> bool {
        let Some(row) = self.rows.get_mut(device) else {
            return false;
        };
        self.index.set(row, false);
        change(&mut row.assignment);
        self.index.set(row, true);
        self.next_rank = self.next_rank.max(row.assignment.rank.saturating_add(1));
        if !self.changed.contains(device) {
            self.changed.insert(device.clone());
        }
        true
    }

    /// Puts an assignment in place of the device's, or makes the device take part.
    pub(super) fn insert(&mut self, device: &DeviceId, assignment: Assignment) {
        if self.rows.contains_key(device) {
            self.change(device, |known| *known = assignment);
            return;
        }
        let row = Row {
            number: u32::try_from(self.names.len()).unwrap_or(u32::MAX),
            sight: Sight::default(),
            assignment,
        };
        self.names.push(device.clone());
        self.next_rank = self.next_rank.max(row.assignment.rank.saturating_add(1));
        self.index.set(&row, true);
        self.rows.insert(device.clone(), row);
        self.changed.insert(device.clone());
    }

    /// The rank behind all others.
    pub(super) const fn next_rank(&self) -> u32 {
        self.next_rank
    }

    /// Takes note of what is known of a device now.
    pub(super) fn see(&mut self, device: &DeviceId, facts: Option<&Facts>) {
        let Some(row) = self.rows.get_mut(device) else {
            return;
        };
        let sight = Sight::of(facts);
        if row.sight != sight {
            self.index.set(row, false);
            row.sight = sight;
            self.index.set(row, true);
        }
    }

    /// Takes note of what is known of every device now.
    pub(super) fn see_all(&mut self, facts: &BTreeMap<DeviceId, Facts>) {
        for (device, row) in &mut self.rows {
            row.sight = Sight::of(facts.get(device));
        }
        self.index = Index::of(self.rows.values());
    }

    /// The devices that changed since the last call.
    pub(super) fn take_changed(&mut self) -> BTreeSet<DeviceId> {
        std::mem::take(&mut self.changed)
    }

    /// How far the last look went; `None`: there was none since it was loaded.
    pub(super) const fn looked(&self) -> Option<Looked> {
        self.looked
    }

    pub(super) const fn set_looked(&mut self, looked: Looked) {
        self.looked = Some(looked);
    }

    /// The devices of a queue, in its order.
    pub(super) fn queue(&self, queue: Queue) -> impl DoubleEndedIterator<Item = &DeviceId> {
        let places = self.index.queues.get(&queue).into_iter().flatten();
        places.filter_map(|(_, _, number)| self.name(*number))
    }

    /// The first of a queue, with what it is ordered by.
    pub(super) fn first(&self, queue: Queue) -> Option<(u32, &DeviceId)> {
        let (order, _, number) = self.index.queues.get(&queue)?.first()?;
        Some((*order, self.name(*number)?))
    }

    /// Whether nobody is in a queue.
    pub(super) fn is_empty_queue(&self, queue: Queue) -> bool {
        !self.index.queues.contains_key(&queue)
    }

    /// The queues from `first` to `last` that have somebody in them.
    pub(super) fn queues(&self, first: Queue, last: Queue) -> impl Iterator<Item = Queue> {
        self.index
            .queues
            .range(first..=last)
            .map(|(queue, _)| *queue)
    }

    /// The devices whose deadline is after `after` and not after `until`.
    pub(super) fn due(&self, after: Tick, until: Tick) -> impl Iterator<Item = &DeviceId> {
        let range = (after < until).then(|| {
            let first = (Tick(after.0.saturating_add(1)), 0);
            self.index.deadlines.range(first..=(until, u32::MAX))
        });
        let due = range.into_iter().flatten();
        due.filter_map(|(_, number)| self.name(*number))
    }

    /// The first deadline of all.
    pub(super) fn first_deadline(&self) -> Option<Tick> {
        self.index.deadlines.first().map(|(at, _)| *at)
    }

    /// The first deadline from `from` on.
    pub(super) fn deadline_from(&self, from: Tick) -> Option<Tick> {
        let mut later = self.index.deadlines.range((from, 0)..);
        later.next().map(|(at, _)| *at)
    }

    /// How many were given their release of before, by how far they are.
    pub(super) const fn ways_back(&self) -> WaysBack {
        self.index.ways_back
    }

    fn name(&self, number: u32) -> Option<&DeviceId> {
        self.names.get(usize::try_from(number).ok()?)
    }

    /// Changes a record behind the indices' back, so that a test sees that this is noticed.
    #[cfg(test)]
    pub(super) fn spoil(&mut self, device: &DeviceId, spoil: impl FnOnce(&mut Assignment)) {
        if let Some(row) = self.rows.get_mut(device) {
            spoil(&mut row.assignment);
        }
    }
}

impl PartialEq for Assignments {
    fn eq(&self, other: &Self) -> bool {
        self.iter().eq(other.iter())
    }
}

impl Eq for Assignments {}

impl Lookup<&DeviceId> for Assignments {
    type Output = Assignment;

    /// # Panics
    ///
    /// When the device has no part in the rollout.
    fn index(&self, device: &DeviceId) -> &Assignment {
        self.get(device).expect("the device takes part")
    }
}

impl FromIterator<(DeviceId, Assignment)> for Assignments {
    fn from_iter<T: IntoIterator<Item = (DeviceId, Assignment)>>(records: T) -> Self {
        let mut assignments = Self::default();
        for (device, assignment) in records {
            assignments.insert(&device, assignment);
        }
        // They are as they were stored; the first look is at all of them.
        assignments.changed = BTreeSet::new();
        assignments
    }
}

impl Serialize for Assignments {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.iter())
    }
}

impl<'de> Deserialize<'de> for Assignments {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(BTreeMap::deserialize(deserializer)?.into_iter().collect())
    }
}
