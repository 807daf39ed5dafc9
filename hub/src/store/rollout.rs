//! Rollouts, and the facts that they are decided on.
//!
//! A rollout is kept as its header, one row a wave and one row a device, so that a report changes one row and
//! not a hundred thousand. There is at most one live rollout an app, its newest.

use std::cmp::Reverse;

use foreshore_protocol::api::{AssignmentState, RolloutState};
use foreshore_protocol::id::Labels;
use foreshore_protocol::message::AppStatus;
use foreshore_protocol::{AppName, DeviceId, Version};
use rusqlite::{Connection, OptionalExtension as _, Row, params};

use super::column;
use crate::rollout::{
    Assignment, Assignments, Facts, Member, Pulse, Report, Rollout, Touched, UnixMs, Wave,
};

/// The id of the next rollout.
///
/// # Errors
///
/// When SQLite fails.
pub fn next_id(connection: &Connection) -> rusqlite::Result<u64> {
    let newest: Option<u64> = connection
        .query_row(
            "SELECT seq FROM sqlite_sequence WHERE name = 'rollout'",
            [],
            |row| row.get(0),
        )
        .optional()?;
    Ok(newest.unwrap_or(0) + 1)
}

/// Writes a rollout that was just opened.
///
/// # Errors
///
/// When SQLite fails.
pub fn insert(connection: &Connection, rollout: &Rollout) -> rusqlite::Result<()> {
    connection.execute(
        "INSERT INTO rollout (id, app, state, final, wake_at_ms, created_ms, header)
         VALUES (?1, ?2, '', 0, 0, ?3, '')",
        params![rollout.id, rollout.app.as_str(), rollout.created.0],
    )?;
    put_header(connection, rollout)?;
    for ordinal in (1_u32..).take(rollout.waves.len()) {
        put_wave(connection, rollout, ordinal)?;
    }
    for (device, assignment) in rollout.assignments.iter() {
        put_assignment(connection, rollout.id, device, assignment)?;
    }
    Ok(())
}

/// Writes what an action changed, and nothing else.
///
/// # Errors
///
/// When SQLite fails.
pub fn put(connection: &Connection, rollout: &Rollout, touched: &Touched) -> rusqlite::Result<()> {
    let assignment = |device: &DeviceId| match rollout.assignments.get(device) {
        Some(assignment) => put_assignment(connection, rollout.id, device, assignment),
        None => Ok(()),
    };
    match touched {
        Touched::Header => put_header(connection, rollout),
        Touched::HeaderAndAssignment(device) => {
            put_header(connection, rollout)?;
            assignment(device)
        }
        Touched::Wave(ordinal) => put_wave(connection, rollout, *ordinal),
        Touched::Assignment(device) => assignment(device),
        Touched::Assignments(first, second) => {
            assignment(first)?;
            assignment(second)
        }
    }
}

fn put_header(connection: &Connection, rollout: &Rollout) -> rusqlite::Result<()> {
    connection
        .prepare_cached("UPDATE rollout SET state = ?2, final = ?3, header = ?4 WHERE id = ?1")?
        .execute(params![
            rollout.id,
            column::to_word(&rollout.state)?,
            rollout.state.is_final(),
            column::to_json(&header_of(rollout))?,
        ])?;
    Ok(())
}

/// The rollout without its waves and devices.
fn header_of(rollout: &Rollout) -> Rollout {
    Rollout {
        id: rollout.id,
        app: rollout.app.clone(),
        from: rollout.from,
        to: rollout.to,
        seed: rollout.seed,
        policy: rollout.policy.clone(),
        state: rollout.state,
        cause: rollout.cause,
        message: rollout.message.clone(),
        frozen: rollout.frozen,
        clock: rollout.clock,
        next_offer: rollout.next_offer,
        tail_stopped: rollout.tail_stopped.clone(),
        waves: Vec::new(),
        assignments: Assignments::default(),
        created: rollout.created,
        finished: rollout.finished,
    }
}

fn put_wave(connection: &Connection, rollout: &Rollout, ordinal: u32) -> rusqlite::Result<()> {
    let Some(wave) = rollout.wave(ordinal) else {
        return Ok(());
    };
    connection
        .prepare_cached("INSERT OR REPLACE INTO wave (rollout, ordinal, body) VALUES (?1, ?2, ?3)")?
        .execute(params![rollout.id, ordinal, column::to_json(wave)?])?;
    Ok(())
}

fn put_assignment(
    connection: &Connection,
    rollout: u64,
    device: &DeviceId,
    assignment: &Assignment,
) -> rusqlite::Result<()> {
    connection
        .prepare_cached(
            "INSERT INTO assignment (rollout, device, body, busy) VALUES (?1, ?2, ?3, ?4)
             ON CONFLICT (rollout, device) DO UPDATE SET body = ?3, busy = ?4",
        )?
        .execute(params![
            rollout,
            device.as_str(),
            column::to_json(assignment)?,
            assignment.holds_slot()
        ])?;
    Ok(())
}

/// Writes when to look at a rollout again.
///
/// # Errors
///
/// When SQLite fails.
pub fn put_wake(
    connection: &Connection,
    rollout: u64,
    wake_at: Option<UnixMs>,
) -> rusqlite::Result<()> {
    connection
        .prepare_cached("UPDATE rollout SET wake_at_ms = ?2 WHERE id = ?1")?
        .execute(params![rollout, wake_at.map(|at| at.0)])?;
    Ok(())
}

/// A rollout without its waves and devices.
///
/// # Errors
///
/// When SQLite fails.
pub fn header(connection: &Connection, id: u64) -> rusqlite::Result<Option<Rollout>> {
    connection
        .prepare_cached("SELECT header FROM rollout WHERE id = ?1")?
        .query_row([id], |row| column::json(row, 0))
        .optional()
}

/// The waves of a rollout, in order.
///
/// # Errors
///
/// When SQLite fails.
pub fn waves(connection: &Connection, id: u64) -> rusqlite::Result<Vec<Wave>> {
    connection
        .prepare_cached("SELECT body FROM wave WHERE rollout = ?1 ORDER BY ordinal")?
        .query_map([id], |row| column::json(row, 0))?
        .collect()
}

/// A whole rollout.
///
/// # Errors
///
/// When SQLite fails.
pub fn get(connection: &Connection, id: u64) -> rusqlite::Result<Option<Rollout>> {
    let Some(mut rollout) = header(connection, id)? else {
        return Ok(None);
    };
    rollout.waves = waves(connection, id)?;
    rollout.assignments = connection
        .prepare_cached("SELECT device, body FROM assignment WHERE rollout = ?1")?
        .query_map([id], |row| {
            Ok((column::parsed(row, 0)?, column::json(row, 1)?))
        })?
        .collect::<rusqlite::Result<_>>()?;
    Ok(Some(rollout))
}

/// One device's part in a rollout.
///
/// # Errors
///
/// When SQLite fails.
pub fn assignment(
    connection: &Connection,
    rollout: u64,
    device: &DeviceId,
) -> rusqlite::Result<Option<Assignment>> {
    connection
        .prepare_cached("SELECT body FROM assignment WHERE rollout = ?1 AND device = ?2")?
        .query_row(params![rollout, device.as_str()], |row| {
            column::json(row, 0)
        })
        .optional()
}

/// The id of an app's newest rollout, and whether that is final.
///
/// # Errors
///
/// When SQLite fails.
pub fn newest_id(connection: &Connection, app: &AppName) -> rusqlite::Result<Option<(u64, bool)>> {
    connection
        .prepare_cached("SELECT id, final FROM rollout WHERE app = ?1 ORDER BY id DESC LIMIT 1")?
        .query_row([app.as_str()], |row| Ok((row.get(0)?, row.get(1)?)))
        .optional()
}

/// The devices that hold slots of a rollout. Costs O(slots).
///
/// # Errors
///
/// When SQLite fails.
pub fn holding_slots(
    connection: &Connection,
    rollout: u64,
) -> rusqlite::Result<Vec<(DeviceId, Assignment)>> {
    connection
        .prepare_cached(
            "SELECT device, body FROM assignment INDEXED BY assignment_busy
             WHERE rollout = ?1 AND busy ORDER BY device",
        )?
        .query_map([rollout], |row| {
            Ok((column::parsed(row, 0)?, column::json(row, 1)?))
        })?
        .collect()
}

/// The newest rollout of an app, whatever became of it.
///
/// # Errors
///
/// When SQLite fails.
pub fn newest(connection: &Connection, app: &AppName) -> rusqlite::Result<Option<Rollout>> {
    let id: Option<u64> = connection
        .prepare_cached("SELECT max(id) FROM rollout WHERE app = ?1")?
        .query_row([app.as_str()], |row| row.get(0))?;
    id.map_or(Ok(None), |id| get(connection, id))
}

/// The newest rollout of an app without its waves and devices.
///
/// # Errors
///
/// When SQLite fails.
pub fn newest_header(connection: &Connection, app: &AppName) -> rusqlite::Result<Option<Rollout>> {
    connection
        .prepare_cached("SELECT header FROM rollout WHERE app = ?1 ORDER BY id DESC LIMIT 1")?
        .query_row([app.as_str()], |row| column::json(row, 0))
        .optional()
}

/// The ids of an app's rollouts, newest first, at most `limit`; of every app when `app` is `None`.
///
/// # Errors
///
/// When SQLite fails.
pub fn newest_ids(
    connection: &Connection,
    app: Option<&AppName>,
    limit: u64,
) -> rusqlite::Result<Vec<u64>> {
    connection
        .prepare_cached(
            "SELECT id FROM rollout WHERE ?1 IS NULL OR app = ?1 ORDER BY id DESC LIMIT ?2",
        )?
        .query_map(params![app.map(AppName::as_str), limit], |row| row.get(0))?
        .collect()
}

/// The newest completed rollout of an app, without its waves and devices.
///
/// # Errors
///
/// When SQLite fails.
pub fn newest_completed(
    connection: &Connection,
    app: &AppName,
) -> rusqlite::Result<Option<Rollout>> {
    connection
        .prepare_cached(
            "SELECT header FROM rollout WHERE app = ?1 AND state = 'completed' ORDER BY id DESC LIMIT 1",
        )?
        .query_row([app.as_str()], |row| column::json(row, 0))
        .optional()
}

/// The apps with a rollout that is due at `now`, and when the next one is.
///
/// # Errors
///
/// When SQLite fails.
pub fn due(
    connection: &Connection,
    now: UnixMs,
) -> rusqlite::Result<(Vec<AppName>, Option<UnixMs>)> {
    let due = connection
        .prepare_cached("SELECT app FROM rollout WHERE wake_at_ms <= ?1")?
        .query_map([now.0], |row| column::parsed(row, 0))?
        .collect::<rusqlite::Result<_>>()?;
    let next: Option<u64> = connection
        .prepare_cached("SELECT min(wake_at_ms) FROM rollout WHERE wake_at_ms > ?1")?
        .query_row([now.0], |row| row.get(0))?;
    Ok((due, next.map(UnixMs)))
}

/// The apps in the order in which their newest rollouts go where they meet on a device: the highest priority first, then
/// the oldest.
///
/// # Errors
///
/// When SQLite fails.
pub fn by_precedence(
    connection: &Connection,
    apps: impl IntoIterator<Item = AppName>,
) -> rusqlite::Result<Vec<AppName>> {
    let mut ranked = Vec::new();
    for app in apps {
        let header = newest_header(connection, &app)?;
        let rank = header.map(|rollout| (Reverse(rollout.policy.priority), rollout.id));
        ranked.push((rank, app));
    }
    ranked.sort_unstable();
    Ok(ranked.into_iter().map(|(_, app)| app).collect())
}

/// The apps that have a live rollout.
///
/// # Errors
///
/// When SQLite fails.
pub fn live_apps(connection: &Connection) -> rusqlite::Result<Vec<AppName>> {
    connection
        .prepare_cached("SELECT app FROM rollout WHERE final = 0")?
        .query_map([], |row| column::parsed(row, 0))?
        .collect()
}

/// The apps whose newest rollout may have something to learn from this device: it is live, or it completed and the
/// device comes after its last wave.
///
/// # Errors
///
/// When SQLite fails.
pub fn interested(connection: &Connection, device: &DeviceId) -> rusqlite::Result<Vec<AppName>> {
    let rows = connection
        .prepare_cached(
            "SELECT rollout.app, rollout.final, assignment.body
             FROM assignment JOIN rollout ON rollout.id = assignment.rollout
             WHERE assignment.device = ?1 AND (rollout.final = 0 OR (rollout.state = 'completed'
                AND rollout.id = (SELECT max(id) FROM rollout AS newer WHERE newer.app = rollout.app)))",
        )?
        .query_map([device.as_str()], |row| {
            Ok((column::parsed(row, 0)?, row.get(1)?, column::json(row, 2)?))
        })?
        .collect::<rusqlite::Result<Vec<(AppName, bool, Assignment)>>>()?;
    let put_off = |assignment: &Assignment| match assignment.state {
        AssignmentState::Device(phase) => !phase.is_final(),
        state => state != AssignmentState::Reverted,
    };
    Ok(rows
        .into_iter()
        .filter(|(_, is_final, body)| !is_final || put_off(body))
        .map(|(app, ..)| app)
        .collect())
}

/// What is known of a device of rollout `?1` of app `?2`: whether the app still selects it, then the facts.
const FACTS: &str = "SELECT member.device IS NOT NULL AND device.id IS NOT NULL, assignment.device,
        online, last_seen_ms, accepted_epoch, accepted_generation, report.body, held IS NOT NULL, EXISTS (
            SELECT 1 FROM assignment AS other JOIN rollout ON rollout.id = other.rollout
            WHERE other.device = assignment.device AND other.busy AND rollout.app != ?2
                AND (rollout.final = 0 OR (rollout.state = 'completed' AND rollout.id = (
                    SELECT max(id) FROM rollout AS newer WHERE newer.app = rollout.app)))
        )
     FROM assignment
     LEFT JOIN member ON member.app = ?2 AND member.device = assignment.device
     LEFT JOIN device ON device.id = assignment.device
     LEFT JOIN report ON report.device = assignment.device AND report.app = ?2
     WHERE assignment.rollout = ?1";

/// What is known of the rollout's devices that the app still selects.
///
/// # Errors
///
/// When SQLite fails.
pub fn facts(
    connection: &Connection,
    rollout: &Rollout,
) -> rusqlite::Result<std::collections::BTreeMap<DeviceId, Facts>> {
    let mut leased = super::lease::leased(connection, &rollout.app)?;
    connection
        .prepare_cached(FACTS)?
        .query_map(params![rollout.id, rollout.app.as_str()], |row| {
            let device: DeviceId = column::parsed(row, 1)?;
            let leased = leased.remove(&device);
            Ok(read_facts(row, leased)?.map(|facts| (device, facts)))
        })?
        .filter_map(Result::transpose)
        .collect()
}

/// The same of one device: `None` if it has no part in the rollout, `Some(None)` if the app no longer selects it.
///
/// # Errors
///
/// When SQLite fails.
pub fn facts_of(
    connection: &Connection,
    rollout: &Rollout,
    device: &DeviceId,
) -> rusqlite::Result<Option<Option<Facts>>> {
    let lease = super::lease::held_by(connection, device, &rollout.app)?;
    connection
        .prepare_cached(&format!("{FACTS} AND assignment.device = ?3"))?
        .query_row(
            params![rollout.id, rollout.app.as_str(), device.as_str()],
            |row| read_facts(row, lease),
        )
        .optional()
}

fn read_facts(row: &Row<'_>, leased: Option<Version>) -> rusqlite::Result<Option<Facts>> {
    if !row.get::<_, bool>(0)? {
        return Ok(None);
    }
    Ok(Some(Facts {
        online: row.get(2)?,
        last_seen: row.get::<_, Option<u64>>(3)?.map(UnixMs),
        version: column::version_option(row, 4)?,
        report: column::json_option::<AppStatus>(row, 6)?.map(|status| Report {
            since: status.since,
            release: status.release,
            phase: status.phase,
            has: status.last_known_good.or(status.running),
            reason: status.reason.map(|reason| reason.message),
        }),
        leased,
        held: row.get(7)?,
        busy: row.get(8)?,
    }))
}

/// How alive the fleet is: who is connected, and who was heard of since `since`, rounded down to a full hour
/// ([`Pulse::since`] is one). Costs O(hours since then); triggers keep the counts.
///
/// # Errors
///
/// When SQLite fails.
pub fn pulse(connection: &Connection, since: UnixMs) -> rusqlite::Result<Pulse> {
    connection
        .prepare_cached(
            "SELECT (SELECT coalesce(sum(devices), 0) FROM pulse WHERE online = 1),
                    (SELECT coalesce(sum(devices), 0) FROM pulse WHERE online = 0 AND hour >= ?1)",
        )?
        .query_row([since.0 / Pulse::HOUR_MS], |row| {
            let (online, dark): (u64, u64) = (row.get(0)?, row.get(1)?);
            Ok(Pulse {
                recent: online + dark,
                dark,
            })
        })
}

/// The devices that an app selects, as a rollout is opened over them.
///
/// # Errors
///
/// When SQLite fails.
pub fn opening_members(connection: &Connection, app: &AppName) -> rusqlite::Result<Vec<Member>> {
    let devices = super::app::members(connection, app)?;
    let mut members = Vec::with_capacity(devices.len());
    for device in devices {
        let placed = super::desired::placement(connection, &device, app)?;
        let status: Option<AppStatus> = connection
            .prepare_cached("SELECT body FROM report WHERE device = ?1 AND app = ?2")?
            .query_row([device.as_str(), app.as_str()], |row| column::json(row, 0))
            .optional()?;
        let phase = status
            .filter(|status| placed.is_some_and(|(_, since)| status.since == since))
            .map(|status| status.phase);
        let labels = super::device::labels(connection, &device)?;
        members.push(Member {
            labels: labels.map_or_else(Labels::new, |(operator, own)| {
                super::device::merged(operator, own)
            }),
            device,
            placement: placed.map(|(placement, _)| placement),
            phase,
        });
    }
    Ok(members)
}

/// How many rollouts are in each state.
///
/// # Errors
///
/// When SQLite fails.
pub fn count_by_state(connection: &Connection) -> rusqlite::Result<Vec<(String, u64)>> {
    connection
        .prepare_cached("SELECT state, count(*) FROM rollout GROUP BY state ORDER BY state")?
        .query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?
        .collect()
}

/// Whether a rollout of that state was not given up: its release is what the app is at or moving to.
#[must_use]
pub const fn stands(state: RolloutState) -> bool {
    matches!(
        state,
        RolloutState::Running | RolloutState::Paused | RolloutState::Completed
    )
}

/// Removes the final rollouts of an app but its newest `keep`, and never its newest completed one.
///
/// # Errors
///
/// When SQLite fails.
pub fn prune(connection: &Connection, app: &AppName, keep: u64) -> rusqlite::Result<usize> {
    connection
        .prepare_cached(
            "DELETE FROM rollout WHERE app = ?1 AND final = 1
                AND id != coalesce((SELECT max(id) FROM rollout WHERE app = ?1 AND state = 'completed'), 0)
                AND id NOT IN (SELECT id FROM rollout WHERE app = ?1 ORDER BY id DESC LIMIT ?2)",
        )?
        .execute(params![app.as_str(), keep])
}
