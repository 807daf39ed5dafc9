//! Whose turn it is to switch: requests of devices, what their reports free, and granting.
//!
//! [`crate::lease`] decides; here it is told what is in the store, and what it says is written.

use std::collections::{BTreeMap, BTreeSet};

use foreshore_protocol::api::{AssignmentState, LeaseState, LeaseView, RolloutState};
use foreshore_protocol::id::BudgetName;
use foreshore_protocol::message::{LeaseRequest, Phase, Reported};
use foreshore_protocol::{AppName, DeviceId};
use rusqlite::Connection;

use super::{Change, ControlError};
use crate::lease::{Asking, Bound, Entry, FRESH_MS, Held, Limit, Queued, Reply, choose};
use crate::rollout::{Placement, Policy, Pulse, Rollout, UnixMs};
use crate::store;

/// A request that was not repeated for so long lost its place in the queue: 15 minutes.
const FORGET_MS: u64 = 15 * 60_000;

/// Takes in a request of a device.
///
/// # Errors
///
/// When the store fails.
pub fn ask(
    change: &mut Change<'_>,
    device: &DeviceId,
    request: &LeaseRequest,
) -> rusqlite::Result<()> {
    let app = &request.app;
    let placed = store::desired::placement(change.connection, device, app)?;
    let wanted = placed.is_some_and(|(placement, since)| {
        (placement.release, since) == (request.release, request.since)
    });
    let before = store::lease::get(change.connection, device, app)?;
    let mut entry = before.clone();
    if entry.ask(request, wanted, change.now) == Reply::Repeat {
        let lease = entry.lease(app).map(|lease| (device.clone(), lease));
        change.effects.leases.extend(lease);
    }
    put(change, device, app, &before, &entry)
}

/// Takes in a report that is newer than all before: who says how it ended frees its slot.
///
/// # Errors
///
/// When the store fails.
pub fn hear(
    change: &mut Change<'_>,
    device: &DeviceId,
    reported: &Reported,
) -> rusqlite::Result<()> {
    for (app, before) in store::lease::of_device(change.connection, device)? {
        let status = reported.apps.iter().find(|status| status.app == app);
        let mut entry = before.clone();
        entry.hear(status, reported.version, change.now);
        put(change, device, &app, &before, &entry)?;
    }
    look_again(change)
}

/// Something that others may wait for changed.
///
/// # Errors
///
/// When the store fails.
pub fn look_again(change: &mut Change<'_>) -> rusqlite::Result<()> {
    change.effects.turns |= store::lease::any_queued(change.connection)?;
    Ok(())
}

fn put(
    change: &mut Change<'_>,
    device: &DeviceId,
    app: &AppName,
    before: &Entry,
    after: &Entry,
) -> rusqlite::Result<()> {
    if before == after {
        return Ok(());
    }
    store::lease::put(change.connection, device, app, after)?;
    change.effects.turns = true;
    if before.holds_slot() != after.holds_slot() {
        change.effects.dirty.insert(app.clone());
    }
    if before.holds_slot() && !after.holds_slot() {
        let event = change.event("lease-ended").device(device).app(app);
        event.record("its place in its disruption budgets is free")?;
    }
    Ok(())
}

/// Writes a device off: it holds no slot any more, until it is heard of again.
///
/// # Errors
///
/// When there is no such device, it holds none, or the store fails.
pub fn release(change: &mut Change<'_>, device: &DeviceId) -> Result<(), ControlError> {
    if store::device::link(change.connection, device)?.is_none() {
        return Err(ControlError::UnknownDevice(device.clone()));
    }
    let mut entries = store::lease::of_device(change.connection, device)?;
    for status in store::lease::switching_unasked(change.connection, device)? {
        // It said that it switches, under a head from before the budget: that counts as much as a lease.
        let entry = entries.entry(status.app).or_default();
        entry.held.get_or_insert(Held {
            since: status.since,
            release: status.release,
            turn: (0, 0),
            first: change.now,
            granted: change.now,
            ttl_ms: 0,
            expires: change.now,
            written_off: false,
        });
    }
    let mut released = 0;
    for (app, mut entry) in entries {
        let Some(held) = entry.held.as_mut().filter(|held| !held.written_off) else {
            continue;
        };
        held.written_off = true;
        released += 1;
        store::lease::put(change.connection, device, &app, &entry)?;
        change.effects.dirty.insert(app.clone());
        change
            .event("lease-written-off")
            .device(device)
            .app(&app)
            .record("by an operator; it counts as available until it is heard of again")?;
    }
    if released == 0 {
        return Err(ControlError::NoLease(device.clone()));
    }
    change.effects.turns = true;
    Ok(())
}

/// Tells of leases that became overdue, and forgets requests that nobody repeats.
///
/// # Errors
///
/// When the store fails.
pub fn keep_house(change: &mut Change<'_>) -> rusqlite::Result<()> {
    for (device, app) in store::lease::tell_overdue(change.connection, change.now)? {
        change
            .event("lease-overdue")
            .device(&device)
            .app(&app)
            .record(format!(
                "it did not say in time how it ended, and keeps its place in its disruption budgets until it does; if it \
                 is gone for good, run `foreshore lease release {device}`"
            ))?;
    }
    let before = UnixMs(change.now.0.saturating_sub(FORGET_MS));
    store::lease::forget_requests(change.connection, before)?;
    Ok(())
}

/// Grants what may be granted now. Grants nothing while the hub does not hear the fleet well enough to know who is
/// unavailable.
///
/// # Errors
///
/// When the store fails.
pub fn decide(change: &mut Change<'_>, ttl_ms: u64) -> rusqlite::Result<()> {
    let queue = store::lease::queue(change.connection)?;
    if queue.is_empty() || !hears_the_fleet(change)? {
        return Ok(());
    }
    let mut rooms = BTreeMap::new();
    let mut waiting = Vec::new();
    for (device, app, queued) in queue {
        let Some(placement) = eligible(change, &device, &app, &queued)? else {
            continue;
        };
        if !rooms.contains_key(&app) {
            rooms.insert(app.clone(), Room::of(change.connection, &app)?);
        }
        if let Some(bounds) = bounds(change.connection, &device, &app, &rooms[&app])? {
            let asking = Asking {
                device,
                app,
                first: queued.first,
                bounds,
            };
            waiting.push((asking, placement));
        }
    }
    let mut limits = budget_limits(change, waiting.iter().map(|(asking, _)| asking))?;
    for (app, room) in rooms {
        if let Room::Limited(limit, _) = room {
            limits.insert(Bound::Rollout(app), limit);
        }
    }
    let asking: Vec<Asking> = waiting.iter().map(|(asking, _)| asking.clone()).collect();
    for place in choose(&asking, &limits) {
        let (asking, placement) = &waiting[place];
        grant(change, &asking.device, &asking.app, placement, ttl_ms)?;
    }
    Ok(())
}

fn hears_the_fleet(change: &Change<'_>) -> rusqlite::Result<bool> {
    let listening = change.listening;
    let settled = |since: UnixMs| change.now >= since.plus(listening.settle_ms);
    if !listening.since.is_some_and(settled) {
        return Ok(false);
    }
    let since = Pulse::since(change.now);
    Ok(!store::rollout::pulse(change.connection, since)?.mostly_dark())
}

/// What the hub still wants there, if that is what the request is for, and if the device is there to be told.
fn eligible(
    change: &Change<'_>,
    device: &DeviceId,
    app: &AppName,
    queued: &Queued,
) -> rusqlite::Result<Option<Placement>> {
    if change.now.since(queued.asked) >= FRESH_MS {
        return Ok(None);
    }
    let online = store::device::link(change.connection, device)?.is_some_and(|link| link.online);
    if !online {
        return Ok(None);
    }
    let placed = store::desired::placement(change.connection, device, app)?;
    Ok(placed
        .filter(|(placement, since)| (placement.release, *since) == (queued.release, queued.since))
        .map(|(placement, _)| placement))
}

/// What an app's newest rollout has to say.
enum Room {
    /// It stands still: nobody switches.
    Closed,
    /// It is over, or there is none: nothing.
    Open,
    /// So many of the devices of this rollout at once.
    Limited(Limit, u64),
}

impl Room {
    fn of(connection: &Connection, app: &AppName) -> rusqlite::Result<Self> {
        let Some(header) = store::rollout::newest_header(connection, app)? else {
            return Ok(Self::Open);
        };
        if header.state.is_final() {
            return Ok(Self::Open);
        }
        let runs = matches!(
            header.state,
            RolloutState::Running | RolloutState::RollingBack
        );
        if !runs || header.frozen {
            return Ok(Self::Closed);
        }
        let limit = Limit {
            max: usize::try_from(header.policy.max_unavailable).unwrap_or(usize::MAX),
            unavailable: busy(connection, &header)?,
            lost: BTreeSet::new(),
        };
        Ok(Self::Limited(limit, header.id))
    }
}

/// The devices of a rollout that may be switching. One that was only offered the release and is under a budget may
/// not: it asks first.
fn busy(connection: &Connection, header: &Rollout) -> rusqlite::Result<BTreeSet<DeviceId>> {
    let mut busy = BTreeSet::new();
    // Where there is a window, devices ask first whether they are under a budget or not.
    let all_ask = header.policy.terms.windows.switch.is_some();
    for (device, assignment) in store::rollout::holding_slots(connection, header.id)? {
        let asks_first = match assignment.state {
            AssignmentState::Offered => true,
            AssignmentState::Device(phase) => matches!(
                phase,
                Phase::Accepted | Phase::Staging | Phase::Blocked | Phase::Waiting
            ),
            AssignmentState::Planned
            | AssignmentState::Silent
            | AssignmentState::Deferred
            | AssignmentState::Reverted => false,
        };
        let asks = asks_first
            && (all_ask || !store::disruption_budget::bounds_of(connection, &device)?.is_empty());
        if !asks {
            busy.insert(device);
        }
    }
    for device in store::lease::leased(connection, &header.app)?.into_keys() {
        let part = store::rollout::assignment(connection, header.id, &device)?;
        if part.is_some_and(|assignment| !assignment.has_ended()) {
            busy.insert(device);
        }
    }
    Ok(busy)
}

/// What a request is bound by; `None` when its rollout stands still.
fn bounds(
    connection: &Connection,
    device: &DeviceId,
    app: &AppName,
    room: &Room,
) -> rusqlite::Result<Option<Vec<Bound>>> {
    let mut bounds: Vec<Bound> = store::disruption_budget::bounds_of(connection, device)?
        .into_iter()
        .map(|(budget, group)| Bound::Group(budget, group))
        .collect();
    match room {
        Room::Closed => return Ok(None),
        Room::Limited(_, rollout) => {
            if store::rollout::assignment(connection, *rollout, device)?.is_some() {
                bounds.push(Bound::Rollout(app.clone()));
            }
        }
        Room::Open => {}
    }
    Ok(Some(bounds))
}

/// The limits of every group of the budgets that these devices are under.
fn budget_limits<'a>(
    change: &Change<'_>,
    asking: impl Iterator<Item = &'a Asking>,
) -> rusqlite::Result<BTreeMap<Bound, Limit>> {
    let budgets: BTreeSet<&BudgetName> = asking
        .flat_map(|asking| &asking.bounds)
        .filter_map(|bound| match bound {
            Bound::Group(budget, _) => Some(budget),
            Bound::Rollout(_) => None,
        })
        .collect();
    let mut limits = BTreeMap::new();
    for budget in budgets {
        limits.extend(limits_of(change.connection, budget)?);
    }
    let bound = |budget: &BudgetName, group: &str| Bound::Group(budget.clone(), group.to_owned());
    for busy in store::lease::unavailable(change.connection, change.now)? {
        if let Some(limit) = limits.get_mut(&bound(&busy.budget, &busy.group)) {
            if busy.lost {
                limit.lost.insert(busy.device.clone());
            }
            limit.unavailable.insert(busy.device);
        }
    }
    Ok(limits)
}

/// The groups of one budget, with how many may be unavailable, and who is because it is not connected.
fn limits_of(
    connection: &Connection,
    budget: &BudgetName,
) -> rusqlite::Result<BTreeMap<Bound, Limit>> {
    let Some(row) = store::disruption_budget::get(connection, budget)? else {
        return Ok(BTreeMap::new());
    };
    let spec = &row.manifest.spec;
    let mut limits: BTreeMap<Bound, Limit> = store::disruption_budget::groups(connection, budget)?
        .into_iter()
        .map(|(group, devices)| {
            let limit = Limit {
                max: spec.max_unavailable.of(devices),
                ..Limit::default()
            };
            (Bound::Group(budget.clone(), group), limit)
        })
        .collect();
    if spec.offline_counts {
        for (group, device) in store::disruption_budget::offline(connection, budget)? {
            if let Some(limit) = limits.get_mut(&Bound::Group(budget.clone(), group)) {
                limit.lost.insert(device.clone());
                limit.unavailable.insert(device);
            }
        }
    }
    Ok(limits)
}

fn grant(
    change: &mut Change<'_>,
    device: &DeviceId,
    app: &AppName,
    placement: &Placement,
    ttl_ms: u64,
) -> rusqlite::Result<()> {
    let mut entry = store::lease::get(change.connection, device, app)?;
    let terms = store::desired::terms(change.connection, device, app)?;
    let end_within = placement
        .progress_deadline_ms
        .saturating_add(placement.soak_ms)
        .saturating_add(terms.more_ms(placement.progress_deadline_ms, placement.soak_ms))
        .saturating_add(Policy::SILENT_MARGIN_MS);
    let Some(lease) = entry.grant(app, ttl_ms, end_within, change.now) else {
        return Ok(());
    };
    store::lease::put(change.connection, device, app, &entry)?;
    change.effects.dirty.insert(app.clone());
    change.effects.leases.push((device.clone(), lease));
    let event = change.event("lease-granted").device(device).app(app);
    event.record(format!("it may switch to {}", placement.release.short()))
}

/// Every lease and every request: leases first, then requests in the order of their turns.
///
/// # Errors
///
/// When the store fails.
pub fn views(connection: &Connection, now: UnixMs) -> rusqlite::Result<Vec<LeaseView>> {
    let mut views = Vec::new();
    for (device, app, held) in store::lease::held(connection)? {
        let state = if held.written_off {
            LeaseState::WrittenOff
        } else if held.expires <= now {
            LeaseState::Overdue
        } else {
            LeaseState::Granted
        };
        views.push(LeaseView {
            budgets: store::disruption_budget::of_device(connection, &device)?,
            device,
            app,
            release: held.release,
            state,
            requested_ms: held.first.0,
            granted_ms: Some(held.granted.0),
            expires_ms: Some(held.expires.0),
        });
    }
    for (device, app, queued) in store::lease::queue(connection)? {
        views.push(LeaseView {
            budgets: store::disruption_budget::of_device(connection, &device)?,
            device,
            app,
            release: queued.release,
            state: LeaseState::Waiting,
            requested_ms: queued.first.0,
            granted_ms: None,
            expires_ms: None,
        });
    }
    Ok(views)
}

/// Who is unavailable and how many wait, in every group of a budget.
pub(super) struct Standing {
    pub(super) group: String,
    pub(super) devices: usize,
    pub(super) limit: Limit,
    pub(super) waiting: u64,
}

/// How every group of a budget stands.
pub(super) fn standing(
    connection: &Connection,
    budget: &BudgetName,
    now: UnixMs,
) -> rusqlite::Result<Vec<Standing>> {
    let mut limits = limits_of(connection, budget)?;
    let bound = |group: &str| Bound::Group(budget.clone(), group.to_owned());
    for busy in store::lease::unavailable(connection, now)? {
        if busy.budget == *budget
            && let Some(limit) = limits.get_mut(&bound(&busy.group))
        {
            limit.unavailable.insert(busy.device);
        }
    }
    let mut waiting: BTreeMap<Bound, BTreeSet<DeviceId>> = BTreeMap::new();
    for (device, _, _) in store::lease::queue(connection)? {
        for (name, group) in store::disruption_budget::bounds_of(connection, &device)? {
            let waits = waiting.entry(Bound::Group(name, group)).or_default();
            waits.insert(device.clone());
        }
    }
    let groups = store::disruption_budget::groups(connection, budget)?;
    Ok(groups
        .into_iter()
        .map(|(group, devices)| {
            let bound = bound(&group);
            let waiting = waiting.get(&bound).map_or(0, BTreeSet::len);
            Standing {
                group,
                devices,
                limit: limits.remove(&bound).unwrap_or_default(),
                waiting: u64::try_from(waiting).unwrap_or(u64::MAX),
            }
        })
        .collect())
}
