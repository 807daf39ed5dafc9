//! PURE: whose turn it is to switch, under the disruption budgets of a fleet.
//!
//! A device under a budget stages a release without asking, and asks before it switches: a [`LeaseRequest`]. The hub
//! lets so many devices of a group go at once as the budget says, over all apps and rollouts, and grants a [`Lease`]. The
//! slot is the device's until it says how it ended; nothing else frees it, neither time nor a lost connection.
//!
//! What makes this safe without clocks that agree: a lease ends so long after the device *sent* its request, on the
//! device's own clock, and a request voids every one before it. So a device that asks anew says that it has not begun,
//! and only such a word of its own, or how it ended, gives its slot to another.
//!
//! [`Entry`] is what is known of one app on one device; [`choose`] says who is next. The choices behind it are in
//! `docs/decisions/0042-turns-under-a-disruption-budget.md`.

use std::collections::{BTreeMap, BTreeSet};

use foreshore_protocol::id::BudgetName;
use foreshore_protocol::message::{AppStatus, Lease, LeaseRequest, Phase};
use foreshore_protocol::{AppName, DeviceId, Digest, Version};

use crate::rollout::UnixMs;

#[cfg(test)]
mod tests;

/// A request that is older than this is not granted: the device repeats it every 15 to 60 s while it wants its turn, so it
/// is away, or wants it no more. Also what bounds how much of a lease's time is over when it is granted.
pub const FRESH_MS: u64 = 150_000;

/// Which request of a device: its boot, then its nonce. Each is made once, and they grow.
pub type Turn = (u64, u64);

/// All that is known of one app on one device.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Entry {
    /// It waits for its turn.
    pub queued: Option<Queued>,
    /// It has its turn.
    pub held: Option<Held>,
}

/// A request that was not granted yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Queued {
    /// For which assignment.
    pub since: Version,
    /// Of which release.
    pub release: Digest,
    /// Which request.
    pub turn: Turn,
    /// When the device first asked for this assignment: its place in the queue.
    pub first: UnixMs,
    /// When it asked last.
    pub asked: UnixMs,
}

/// A lease that was granted and whose slot is not free.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    /// For which assignment.
    pub since: Version,
    /// Of which release.
    pub release: Digest,
    /// Which request it answers.
    pub turn: Turn,
    /// When the device first asked for this assignment.
    pub first: UnixMs,
    /// When it was granted.
    pub granted: UnixMs,
    /// How long from sending the request the device may begin, in milliseconds.
    pub ttl_ms: u64,
    /// By when the device should have said how it ended. Then it is overdue, and keeps its slot.
    pub expires: UnixMs,
    /// An operator gave up on it: it holds no slot until it is heard of again.
    pub written_off: bool,
}

/// What a request asks of the hub.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reply {
    /// Nothing: it is old, a repetition, or gives something back.
    Nothing,
    /// To find out whether it is its turn.
    Decide,
    /// To send again the lease that answers it.
    Repeat,
}

impl Entry {
    /// Takes in a request. `wanted` is whether the hub still wants this release there.
    ///
    /// The same request again changes nothing and gets the same answer. An older one is ignored.
    pub fn ask(&mut self, request: &LeaseRequest, wanted: bool, now: UnixMs) -> Reply {
        let turn = (request.boot, request.nonce);
        if let Some(held) = &self.held
            && held.turn == turn
            && !held.written_off
        {
            return Reply::Repeat;
        }
        let newest = self.newest();
        if newest.is_some_and(|newest| turn <= newest) {
            return Reply::Nothing;
        }
        // One that was granted for this assignment was not used: the device says that it has not begun. One for an
        // assignment before may have been; its slot stays the device's.
        let unused = self
            .held
            .take_if(|held| held.since == request.since || held.written_off);
        let place = |since, first| (since == request.since).then_some(first);
        let queued = self.queued.take();
        if !(wanted && request.wanted) {
            return Reply::Nothing;
        }
        let first = queued
            .and_then(|queued| place(queued.since, queued.first))
            .or_else(|| unused.and_then(|held| place(held.since, held.first)))
            .unwrap_or(now);
        self.queued = Some(Queued {
            since: request.since,
            release: request.release,
            turn,
            first,
            asked: now,
        });
        Reply::Decide
    }

    fn newest(&self) -> Option<Turn> {
        let held = self.held.as_ref().map(|held| held.turn);
        held.max(self.queued.as_ref().map(|queued| queued.turn))
    }

    /// Grants what it waits for: it may begin within `ttl_ms` of asking, and should have ended `end_within_ms` after that.
    /// `None` if it waits for nothing.
    pub fn grant(
        &mut self,
        app: &AppName,
        ttl_ms: u64,
        end_within_ms: u64,
        now: UnixMs,
    ) -> Option<Lease> {
        let queued = self.queued.take()?;
        self.held = Some(Held {
            since: queued.since,
            release: queued.release,
            turn: queued.turn,
            first: queued.first,
            granted: now,
            ttl_ms,
            expires: now.plus(ttl_ms).plus(end_within_ms),
            written_off: false,
        });
        self.lease(app)
    }

    /// The lease as it is sent; the same as often as it is.
    #[must_use]
    pub fn lease(&self, app: &AppName) -> Option<Lease> {
        let held = self.held.as_ref().filter(|held| !held.written_off)?;
        Some(Lease {
            boot: held.turn.0,
            nonce: held.turn.1,
            app: app.clone(),
            since: held.since,
            release: held.release,
            ttl_ms: held.ttl_ms,
        })
    }

    /// Takes in a report that is newer than all before: of the app, or that a device which has stored `version` does not
    /// have it (any more). Whether anything changed.
    pub fn hear(
        &mut self,
        status: Option<&AppStatus>,
        version: Option<Version>,
        now: UnixMs,
    ) -> bool {
        let past = |since: Version| match status {
            Some(status) => status.since > since,
            None => version >= Some(since),
        };
        // It began without having to wait, say because its last budget is gone.
        let begun = |since| status.is_some_and(|status| status.since == since && has_begun(status));
        let queued = self
            .queued
            .take_if(|queued| past(queued.since) || begun(queued.since))
            .is_some();
        let held = self
            .held
            .take_if(|held| is_over(held, status, version, now))
            .is_some();
        queued || held
    }

    /// Whether the device holds a slot.
    #[must_use]
    pub fn holds_slot(&self) -> bool {
        self.held.as_ref().is_some_and(|held| !held.written_off)
    }

    /// Whether nothing is known.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.queued.is_none() && self.held.is_none()
    }
}

const fn has_begun(status: &AppStatus) -> bool {
    match status.phase {
        Phase::Activating
        | Phase::Soaking
        | Phase::Succeeded
        | Phase::RolledBack
        | Phase::Failed => true,
        Phase::Accepted
        | Phase::Rejected
        | Phase::Staging
        | Phase::Blocked
        | Phase::Removing
        | Phase::Waiting => false,
    }
}

/// Whether a report frees the slot.
fn is_over(held: &Held, status: Option<&AppStatus>, version: Option<Version>, now: UnixMs) -> bool {
    let Some(status) = status else {
        return version >= Some(held.since);
    };
    if held.written_off {
        // What it says itself counts again.
        return true;
    }
    if status.since < held.since {
        return false;
    }
    let runs_well = status.running.is_some() && status.running == status.last_known_good;
    match status.phase {
        Phase::Succeeded | Phase::Failed => true,
        // Until its containers of before are started it is as unavailable as ever.
        Phase::RolledBack => runs_well,
        Phase::Activating | Phase::Soaking => false,
        Phase::Accepted
        | Phase::Rejected
        | Phase::Staging
        | Phase::Blocked
        | Phase::Removing
        | Phase::Waiting => {
            if status.since == held.since {
                // Sent before it began, perhaps. So late, it was not, and the lease was never used.
                now >= held.expires
            } else {
                // It was told something else meanwhile, and does not begin with that. What it began with before is over
                // when it runs what it goes back to.
                runs_well
            }
        }
    }
}

/// What bounds how many may switch at once.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Bound {
    /// A group of a budget, by its labels as the store writes them.
    Group(BudgetName, String),
    /// The `maxUnavailable` of an app's live rollout.
    Rollout(AppName),
}

/// How many may, and who does.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Limit {
    /// How many devices may be unavailable at once.
    pub max: usize,
    /// Who is.
    pub unavailable: BTreeSet<DeviceId>,
    /// Of them, those that nobody knows the end of: dark, or overdue.
    pub lost: BTreeSet<DeviceId>,
}

/// Someone who waits for a turn.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asking {
    /// Which device.
    pub device: DeviceId,
    /// For which app.
    pub app: AppName,
    /// Since when.
    pub first: UnixMs,
    /// What it is bound by; a bound that is not among the limits binds nobody.
    pub bounds: Vec<Bound>,
}

/// Whose turn it is now: places in `queue`, which must be ordered by `first`.
///
/// Who waits longest goes first. Whoever cannot go yet has a place kept in all its bounds, so that nobody who came later
/// takes one after the other from it; only if one of its bounds is full of devices that are lost does it let others
/// pass, as nobody knows how long that takes. A device that is unavailable already costs nothing more.
///
/// Who fills a bound that another waits for has the place of that one, if it is before its own: it makes room only when
/// it has had its turn, and would otherwise wait behind the place that is kept for whoever waits for it.
#[must_use]
pub fn choose(queue: &[Asking], limits: &BTreeMap<Bound, Limit>) -> Vec<usize> {
    let mut taken: BTreeMap<&Bound, Taken<'_>> = BTreeMap::new();
    let mut chosen = Vec::new();
    for place in order(queue, limits) {
        let asking = &queue[place];
        let device = &asking.device;
        let costs: Vec<(&Bound, &Limit)> = asking
            .bounds
            .iter()
            .filter_map(|bound| limits.get_key_value(bound))
            .filter(|(bound, limit)| {
                let went = taken
                    .get(bound)
                    .is_some_and(|taken| taken.went.contains(device));
                !went && !limit.unavailable.contains(device)
            })
            .collect();
        if costs.iter().any(|(_, limit)| limit.lost.len() >= limit.max) {
            continue;
        }
        let room = |(bound, limit): &(&Bound, &Limit)| {
            let others = taken.get(bound).map_or(0, |taken| taken.others(device));
            limit.unavailable.len() + others < limit.max
        };
        let goes = costs.iter().all(room);
        if goes {
            chosen.push(place);
        }
        for (bound, _) in costs {
            let taken = taken.entry(bound).or_default();
            if goes {
                taken.kept.remove(device);
                taken.went.insert(device);
            } else {
                taken.kept.insert(device);
            }
        }
    }
    chosen
}

/// The places in `queue` in the order in which they are looked at.
fn order(queue: &[Asking], limits: &BTreeMap<Bound, Limit>) -> Vec<usize> {
    let full = |bound: &Bound| {
        let limit = limits.get(bound);
        limit.filter(|limit| limit.unavailable.len() >= limit.max)
    };
    let fills = |asking: &Asking, bound: &Bound| {
        full(bound).is_some_and(|limit| limit.unavailable.contains(&asking.device))
    };
    let mut awaited: BTreeMap<&Bound, usize> = BTreeMap::new();
    for (place, asking) in queue.iter().enumerate() {
        let bounds = asking.bounds.iter();
        for bound in bounds.filter(|bound| full(bound).is_some() && !fills(asking, bound)) {
            awaited.entry(bound).or_insert(place);
        }
    }
    let key = |place: &usize| {
        let filled = queue[*place]
            .bounds
            .iter()
            .filter(|bound| fills(&queue[*place], bound));
        let inherited = filled.filter_map(|bound| awaited.get(bound)).min();
        match inherited {
            Some(first) if first < place => (*first, false, *place),
            Some(_) | None => (*place, true, *place),
        }
    };
    let mut places: Vec<usize> = (0..queue.len()).collect();
    places.sort_by_cached_key(key);
    places
}

/// What was taken of a bound by those before in the queue.
#[derive(Debug, Default)]
struct Taken<'a> {
    went: BTreeSet<&'a DeviceId>,
    kept: BTreeSet<&'a DeviceId>,
}

impl Taken<'_> {
    fn others(&self, device: &DeviceId) -> usize {
        self.went.len() + self.kept.len() - usize::from(self.kept.contains(device))
    }
}
