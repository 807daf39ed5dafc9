//! Who may switch, and who waits for it: [`Entry`] in two tables, and what turns are decided on.

use std::collections::BTreeMap;

use foreshore_protocol::{AppName, DeviceId, Version};
use rusqlite::{Connection, OptionalExtension as _, Row, params};

use super::column;
use crate::lease::{Entry, Held, Queued};
use crate::rollout::UnixMs;

const QUEUED: &str = "since_epoch, since_generation, release, boot, nonce, first_ms, asked_ms";
const HELD: &str = "since_epoch, since_generation, release, boot, nonce, first_ms, granted_ms, ttl_ms, expires_ms, \
                    written_off";

fn read_queued(row: &Row<'_>, at: usize) -> rusqlite::Result<Queued> {
    Ok(Queued {
        since: column::version(row, at)?,
        release: column::parsed(row, at + 2)?,
        turn: (row.get(at + 3)?, row.get(at + 4)?),
        first: UnixMs(row.get(at + 5)?),
        asked: UnixMs(row.get(at + 6)?),
    })
}

fn read_held(row: &Row<'_>, at: usize) -> rusqlite::Result<Held> {
    Ok(Held {
        since: column::version(row, at)?,
        release: column::parsed(row, at + 2)?,
        turn: (row.get(at + 3)?, row.get(at + 4)?),
        first: UnixMs(row.get(at + 5)?),
        granted: UnixMs(row.get(at + 6)?),
        ttl_ms: row.get(at + 7)?,
        expires: UnixMs(row.get(at + 8)?),
        written_off: row.get(at + 9)?,
    })
}

/// What is known of one app on one device; empty when nothing is.
///
/// # Errors
///
/// When SQLite fails.
pub fn get(connection: &Connection, device: &DeviceId, app: &AppName) -> rusqlite::Result<Entry> {
    let queued = connection
        .prepare_cached(&format!(
            "SELECT {QUEUED} FROM lease_request WHERE device = ?1 AND app = ?2"
        ))?
        .query_row([device.as_str(), app.as_str()], |row| read_queued(row, 0))
        .optional()?;
    let held = connection
        .prepare_cached(&format!(
            "SELECT {HELD} FROM lease WHERE device = ?1 AND app = ?2"
        ))?
        .query_row([device.as_str(), app.as_str()], |row| read_held(row, 0))
        .optional()?;
    Ok(Entry { queued, held })
}

/// Writes what [`get`] read and the caller changed.
///
/// # Errors
///
/// When SQLite fails.
pub fn put(
    connection: &Connection,
    device: &DeviceId,
    app: &AppName,
    entry: &Entry,
) -> rusqlite::Result<()> {
    let key = [device.as_str(), app.as_str()];
    match &entry.queued {
        None => {
            connection
                .prepare_cached("DELETE FROM lease_request WHERE device = ?1 AND app = ?2")?
                .execute(key)?;
        }
        Some(queued) => {
            connection
                .prepare_cached(&format!(
                    "INSERT OR REPLACE INTO lease_request (device, app, {QUEUED})
                     VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)"
                ))?
                .execute(params![
                    device.as_str(),
                    app.as_str(),
                    queued.since.epoch.get(),
                    queued.since.generation.get(),
                    queued.release.to_string(),
                    queued.turn.0,
                    queued.turn.1,
                    queued.first.0,
                    queued.asked.0,
                ])?;
        }
    }
    match &entry.held {
        None => {
            connection
                .prepare_cached("DELETE FROM lease WHERE device = ?1 AND app = ?2")?
                .execute(key)?;
        }
        Some(held) => {
            connection
                .prepare_cached(&format!(
                    "INSERT OR REPLACE INTO lease (device, app, {HELD})
                     VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12)"
                ))?
                .execute(params![
                    device.as_str(),
                    app.as_str(),
                    held.since.epoch.get(),
                    held.since.generation.get(),
                    held.release.to_string(),
                    held.turn.0,
                    held.turn.1,
                    held.first.0,
                    held.granted.0,
                    held.ttl_ms,
                    held.expires.0,
                    held.written_off,
                ])?;
        }
    }
    Ok(())
}

/// Everything that is known of a device, by app.
///
/// # Errors
///
/// When SQLite fails.
pub fn of_device(
    connection: &Connection,
    device: &DeviceId,
) -> rusqlite::Result<BTreeMap<AppName, Entry>> {
    let apps: Vec<AppName> = connection
        .prepare_cached(
            "SELECT app FROM lease_request WHERE device = ?1 UNION SELECT app FROM lease WHERE device = ?1",
        )?
        .query_map([device.as_str()], |row| column::parsed(row, 0))?
        .collect::<rusqlite::Result<_>>()?;
    apps.into_iter()
        .map(|app| Ok((app.clone(), get(connection, device, &app)?)))
        .collect()
}

/// Every request, who asked first first. Two of the same millisecond come by name, the same in every call.
///
/// # Errors
///
/// When SQLite fails.
pub fn queue(connection: &Connection) -> rusqlite::Result<Vec<(DeviceId, AppName, Queued)>> {
    connection
        .prepare_cached(&format!(
            "SELECT device, app, {QUEUED} FROM lease_request ORDER BY first_ms, device, app"
        ))?
        .query_map([], |row| {
            Ok((
                column::parsed(row, 0)?,
                column::parsed(row, 1)?,
                read_queued(row, 2)?,
            ))
        })?
        .collect()
}

/// Every lease, who was granted it first first.
///
/// # Errors
///
/// When SQLite fails.
pub fn held(connection: &Connection) -> rusqlite::Result<Vec<(DeviceId, AppName, Held)>> {
    connection
        .prepare_cached(&format!(
            "SELECT device, app, {HELD} FROM lease ORDER BY granted_ms, device, app"
        ))?
        .query_map([], |row| {
            Ok((
                column::parsed(row, 0)?,
                column::parsed(row, 1)?,
                read_held(row, 2)?,
            ))
        })?
        .collect()
}

/// The device's counters began anew: no request of it that may still come is older than what is known.
///
/// # Errors
///
/// When SQLite fails.
pub fn forget_turns(connection: &Connection, device: &DeviceId) -> rusqlite::Result<()> {
    connection
        .prepare_cached("UPDATE lease SET boot = 0, nonce = 0 WHERE device = ?1")?
        .execute([device.as_str()])?;
    connection
        .prepare_cached("DELETE FROM lease_request WHERE device = ?1")?
        .execute([device.as_str()])?;
    Ok(())
}

/// Whether anybody waits.
///
/// # Errors
///
/// When SQLite fails.
pub fn any_queued(connection: &Connection) -> rusqlite::Result<bool> {
    connection
        .prepare_cached("SELECT EXISTS (SELECT 1 FROM lease_request)")?
        .query_row([], |row| row.get(0))
}

/// The devices that an app has leases on, with the assignments they are for; not those written off.
///
/// # Errors
///
/// When SQLite fails.
pub fn leased(
    connection: &Connection,
    app: &AppName,
) -> rusqlite::Result<BTreeMap<DeviceId, Version>> {
    connection
        .prepare_cached(
            "SELECT device, since_epoch, since_generation FROM lease WHERE app = ?1 AND NOT written_off",
        )?
        .query_map([app.as_str()], |row| {
            Ok((column::parsed(row, 0)?, column::version(row, 1)?))
        })?
        .collect()
}

/// The assignment that a device has a lease of an app for; `None` too if it was written off.
///
/// # Errors
///
/// When SQLite fails.
pub fn held_by(
    connection: &Connection,
    device: &DeviceId,
    app: &AppName,
) -> rusqlite::Result<Option<Version>> {
    connection
        .prepare_cached(
            "SELECT since_epoch, since_generation FROM lease WHERE device = ?1 AND app = ?2 AND NOT written_off",
        )?
        .query_row([device.as_str(), app.as_str()], |row| column::version(row, 0))
        .optional()
}

/// A device that is unavailable, in one of the groups that it is in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unavailable {
    /// Under which budget.
    pub budget: foreshore_protocol::id::BudgetName,
    /// In which group, as it is written.
    pub group: String,
    /// Which device.
    pub device: DeviceId,
    /// Nobody knows when that ends: it is overdue, or switches without a lease and is dark.
    pub lost: bool,
}

/// Every device that holds a slot, or that says it is switching, in every group that it is in.
///
/// # Errors
///
/// When SQLite fails.
pub fn unavailable(connection: &Connection, now: UnixMs) -> rusqlite::Result<Vec<Unavailable>> {
    connection
        .prepare_cached(
            "SELECT member.budget, member.labels, member.device, max(busy.lost)
             FROM (SELECT device, expires_ms <= ?1 AS lost FROM lease WHERE NOT written_off
                   UNION ALL
                   SELECT report.device, NOT online FROM report JOIN device ON device.id = report.device
                   WHERE phase IN ('activating', 'soaking')
                     AND NOT EXISTS (SELECT 1 FROM lease WHERE lease.device = report.device AND lease.app = report.app)
                  ) AS busy
             JOIN budget_member AS member ON member.device = busy.device
             GROUP BY member.budget, member.labels, member.device",
        )?
        .query_map([now.0], |row| {
            Ok(Unavailable {
                budget: column::parsed(row, 0)?,
                group: row.get(1)?,
                device: column::parsed(row, 2)?,
                lost: row.get(3)?,
            })
        })?
        .collect()
}

/// The leases that became overdue and that nobody was told of yet; from now on they were.
///
/// # Errors
///
/// When SQLite fails.
pub fn tell_overdue(
    connection: &Connection,
    now: UnixMs,
) -> rusqlite::Result<Vec<(DeviceId, AppName)>> {
    connection
        .prepare_cached(
            "UPDATE lease SET told_overdue = 1 WHERE expires_ms <= ?1 AND NOT written_off AND NOT told_overdue
             RETURNING device, app",
        )?
        .query_map([now.0], |row| {
            Ok((column::parsed(row, 0)?, column::parsed(row, 1)?))
        })?
        .collect()
}

/// Removes requests that were last repeated before `before`: their devices do not want their turn any more.
///
/// # Errors
///
/// When SQLite fails.
pub fn forget_requests(connection: &Connection, before: UnixMs) -> rusqlite::Result<usize> {
    connection
        .prepare_cached("DELETE FROM lease_request WHERE asked_ms < ?1")?
        .execute([before.0])
}

/// The apps that a device says it switches without a lease.
///
/// # Errors
///
/// When SQLite fails.
pub fn switching_unasked(
    connection: &Connection,
    device: &DeviceId,
) -> rusqlite::Result<Vec<foreshore_protocol::message::AppStatus>> {
    connection
        .prepare_cached(
            "SELECT body FROM report WHERE device = ?1 AND phase IN ('activating', 'soaking')
             AND NOT EXISTS (SELECT 1 FROM lease WHERE lease.device = report.device AND lease.app = report.app)",
        )?
        .query_map([device.as_str()], |row| column::json(row, 0))?
        .collect()
}
