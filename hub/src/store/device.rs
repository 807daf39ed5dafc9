//! Devices: who they are, whether they are there, and what they say.

use std::collections::BTreeSet;

use foreshore_protocol::api::DeviceView;
use foreshore_protocol::id::{LabelKey, LabelValue, Labels, Version};
use foreshore_protocol::message::{AppStatus, Inventory};
use foreshore_protocol::{AppName, DeviceId};
use rusqlite::{Connection, OptionalExtension as _, Row, params};

use super::column;
use crate::rollout::UnixMs;

/// What the hub keeps of a device's link, to tell new from old and lost from late.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkState {
    /// The newest connection that it announced.
    pub session: u64,
    /// Whether that one stands.
    pub online: bool,
    /// When it was last heard of.
    pub last_seen: Option<UnixMs>,
    /// The newest boot it spoke of.
    pub boot: u64,
    /// The newest report of that boot.
    pub reported_seq: u64,
    /// The newest event below which none is missing.
    pub event_seq: u64,
    /// When all of its events that were taken in would have come, had they come evenly.
    pub events_paid: UnixMs,
    /// Some were not taken in since it was last quiet for long.
    pub events_throttled: bool,
    /// The newest desired state it stored.
    pub accepted: Option<Version>,
    /// The newest desired state it should have.
    pub desired: Option<Version>,
    /// No repair before then.
    pub repair_at: UnixMs,
    /// Repairs in a row that did not help.
    pub repair_tries: u32,
    /// The database is a restored backup, and this device is told nothing of it.
    pub restored: Option<Restored>,
}

/// Why a restored backup tells a device nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Restored {
    /// It has not said yet what it has. The newest desired state that it was given until the backup.
    Unheard(Option<Version>),
    /// It went on without the backup, and keeps what it has until an operator says otherwise.
    Beyond,
}

/// How `restored_epoch` says [`Restored::Beyond`].
const BEYOND: i64 = -1;

/// Makes a device; it was just heard of for the first time.
///
/// # Errors
///
/// When SQLite fails.
pub fn insert(connection: &Connection, device: &DeviceId, now: UnixMs) -> rusqlite::Result<()> {
    connection
        .prepare_cached(
            "INSERT OR IGNORE INTO device (id, created_ms, last_seen_ms) VALUES (?1, ?2, ?2)",
        )?
        .execute(params![device.as_str(), now.0])?;
    Ok(())
}

/// The link of a device; `None` when it is unknown.
///
/// # Errors
///
/// When SQLite fails.
pub fn link(connection: &Connection, device: &DeviceId) -> rusqlite::Result<Option<LinkState>> {
    connection
        .prepare_cached(
            "SELECT session, online, last_seen_ms, boot, reported_seq, event_seq, events_paid_ms,
                    accepted_epoch, accepted_generation, desired_epoch, desired_generation,
                    repair_at_ms, repair_tries, restored_epoch, restored_generation, events_throttled
             FROM device WHERE id = ?1",
        )?
        .query_row([device.as_str()], |row| {
            Ok(LinkState {
                session: row.get(0)?,
                online: row.get(1)?,
                last_seen: row.get::<_, Option<u64>>(2)?.map(UnixMs),
                boot: row.get(3)?,
                reported_seq: row.get(4)?,
                event_seq: row.get(5)?,
                events_paid: UnixMs(row.get(6)?),
                events_throttled: row.get(15)?,
                accepted: column::version_option(row, 7)?,
                desired: column::version_option(row, 9)?,
                repair_at: UnixMs(row.get(11)?),
                repair_tries: row.get(12)?,
                restored: restored(row)?,
            })
        })
        .optional()
}

/// Writes what [`link`] read and the caller changed; `desired` and `restored` are not written here.
///
/// # Errors
///
/// When SQLite fails.
pub fn put_link(
    connection: &Connection,
    device: &DeviceId,
    link: &LinkState,
) -> rusqlite::Result<()> {
    connection
        .prepare_cached(
            "UPDATE device SET session = ?2, online = ?3, last_seen_ms = ?4, boot = ?5, reported_seq = ?6,
                    event_seq = ?7, events_paid_ms = ?8, accepted_epoch = ?9, accepted_generation = ?10,
                    repair_at_ms = ?11, repair_tries = ?12, events_throttled = ?13
             WHERE id = ?1",
        )?
        .execute(params![
            device.as_str(),
            link.session,
            link.online,
            link.last_seen.map(|seen| seen.0),
            link.boot,
            link.reported_seq,
            link.event_seq,
            link.events_paid.0,
            link.accepted.map(|version| version.epoch.get()),
            link.accepted.map(|version| version.generation.get()),
            link.repair_at.0,
            link.repair_tries,
            link.events_throttled,
        ])?;
    Ok(())
}

fn restored(row: &Row<'_>) -> rusqlite::Result<Option<Restored>> {
    match row.get::<_, Option<i64>>(13)? {
        None => Ok(None),
        Some(BEYOND) => Ok(Some(Restored::Beyond)),
        Some(0) => Ok(Some(Restored::Unheard(None))),
        Some(_) => column::version(row, 13).map(|version| Some(Restored::Unheard(Some(version)))),
    }
}

/// From now on a device is told nothing before it has said what it has: it may come from a life of this database that
/// came after the backup. For one that was just made.
///
/// # Errors
///
/// When SQLite fails.
pub fn await_word(connection: &Connection, device: &DeviceId) -> rusqlite::Result<()> {
    connection
        .prepare_cached(
            "UPDATE device SET restored_epoch = 0, restored_generation = 0 WHERE id = ?1",
        )?
        .execute([device.as_str()])?;
    Ok(())
}

/// From now on a device is told nothing, whatever it says, until [`confirm`].
///
/// # Errors
///
/// When SQLite fails.
pub fn await_release(connection: &Connection, device: &DeviceId) -> rusqlite::Result<()> {
    connection
        .prepare_cached(
            "UPDATE device SET restored_epoch = ?2, restored_generation = ?2 WHERE id = ?1",
        )?
        .execute(params![device.as_str(), BEYOND])?;
    Ok(())
}

/// From now on a device is told what this database says, although it is a restored backup; whether it was not before.
///
/// # Errors
///
/// When SQLite fails.
pub fn confirm(connection: &Connection, device: &DeviceId) -> rusqlite::Result<bool> {
    let changed = connection
        .prepare_cached(
            "UPDATE device SET restored_epoch = NULL, restored_generation = NULL
             WHERE id = ?1 AND restored_epoch IS NOT NULL",
        )?
        .execute([device.as_str()])?;
    Ok(changed > 0)
}

/// Keeps the gauges of a beacon that just came.
///
/// # Errors
///
/// When SQLite fails.
pub fn put_gauges(
    connection: &Connection,
    device: &DeviceId,
    gauges: Gauges,
) -> rusqlite::Result<()> {
    connection
        .prepare_cached(
            "UPDATE device SET memory_mib = ?2, load_centi = ?3, gauges_ms = ?4 WHERE id = ?1",
        )?
        .execute(params![
            device.as_str(),
            gauges.memory_mib,
            gauges.load_centi,
            gauges.at.0
        ])?;
    Ok(())
}

/// What a device said last of how loaded it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gauges {
    /// Memory that its containers use, MiB.
    pub memory_mib: u32,
    /// One-minute load average in hundredths.
    pub load_centi: u32,
    /// When the hub heard of it.
    pub at: UnixMs,
}

/// The gauges of every connected device that were heard of since then.
///
/// # Errors
///
/// When SQLite fails.
pub fn gauges_since(
    connection: &Connection,
    since: UnixMs,
) -> rusqlite::Result<std::collections::BTreeMap<DeviceId, Gauges>> {
    connection
        .prepare_cached(
            "SELECT id, memory_mib, load_centi, gauges_ms FROM device WHERE online AND gauges_ms >= ?1",
        )?
        .query_map([since.0], |row| {
            let gauges = Gauges {
                memory_mib: row.get(1)?,
                load_centi: row.get(2)?,
                at: UnixMs(row.get(3)?),
            };
            Ok((column::parsed(row, 0)?, gauges))
        })?
        .collect()
}

/// Keeps a device's inventory; whether its own labels changed.
///
/// # Errors
///
/// When SQLite fails.
pub fn put_inventory(
    connection: &Connection,
    device: &DeviceId,
    inventory: &Inventory,
) -> rusqlite::Result<bool> {
    let before: Labels = connection
        .prepare_cached("SELECT own_labels FROM device WHERE id = ?1")?
        .query_row([device.as_str()], |row| column::json(row, 0))?;
    connection
        .prepare_cached(
            "UPDATE device SET inventory = ?2, own_labels = ?3
             WHERE id = ?1 AND (inventory IS NOT ?2 OR own_labels != ?3)",
        )?
        .execute(params![
            device.as_str(),
            column::to_json(inventory)?,
            column::to_json(&inventory.labels)?
        ])?;
    Ok(before != inventory.labels)
}

/// Replaces what a device says of its apps.
///
/// # Errors
///
/// When SQLite fails.
pub fn put_reports(
    connection: &Connection,
    device: &DeviceId,
    apps: &[AppStatus],
) -> rusqlite::Result<()> {
    let mut gone: BTreeSet<AppName> = connection
        .prepare_cached("SELECT app FROM report WHERE device = ?1")?
        .query_map([device.as_str()], |row| column::parsed(row, 0))?
        .collect::<rusqlite::Result<_>>()?;
    for status in apps {
        gone.remove(&status.app);
        // In its place: a row that is removed and inserted again is taken out of every index too, and most of what a device
        // says was so before.
        connection
            .prepare_cached(
                "INSERT INTO report (device, app, since_epoch, since_generation, release, phase, body)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)
                 ON CONFLICT (device, app) DO UPDATE SET since_epoch = excluded.since_epoch,
                     since_generation = excluded.since_generation, release = excluded.release,
                     phase = excluded.phase, body = excluded.body
                 WHERE body != excluded.body",
            )?
            .execute(params![
                device.as_str(),
                status.app.as_str(),
                status.since.epoch.get(),
                status.since.generation.get(),
                status.release.to_string(),
                column::to_word(&status.phase)?,
                column::to_json(status)?,
            ])?;
    }
    for app in gone {
        connection
            .prepare_cached("DELETE FROM report WHERE device = ?1 AND app = ?2")?
            .execute([device.as_str(), app.as_str()])?;
    }
    Ok(())
}

/// The labels that operator and device gave, in this order.
///
/// # Errors
///
/// When SQLite fails.
pub fn labels(
    connection: &Connection,
    device: &DeviceId,
) -> rusqlite::Result<Option<(Labels, Labels)>> {
    connection
        .prepare_cached("SELECT operator_labels, own_labels FROM device WHERE id = ?1")?
        .query_row([device.as_str()], |row| {
            Ok((column::json(row, 0)?, column::json(row, 1)?))
        })
        .optional()
}

/// A device's labels, the operator's over its own.
#[must_use]
pub fn merged(operator: Labels, mut own: Labels) -> Labels {
    own.extend(operator);
    own
}

/// Writes the operator's labels.
///
/// # Errors
///
/// When SQLite fails.
pub fn put_operator_labels(
    connection: &Connection,
    device: &DeviceId,
    labels: &Labels,
) -> rusqlite::Result<()> {
    connection
        .prepare_cached("UPDATE device SET operator_labels = ?2 WHERE id = ?1")?
        .execute(params![device.as_str(), column::to_json(labels)?])?;
    Ok(())
}

/// Every device with its merged labels, by id.
///
/// # Errors
///
/// When SQLite fails.
pub fn all_labels(connection: &Connection) -> rusqlite::Result<Vec<(DeviceId, Labels)>> {
    connection
        .prepare_cached("SELECT id, operator_labels, own_labels FROM device ORDER BY id")?
        .query_map([], |row| {
            let (operator, own): (Labels, Labels) = (column::json(row, 1)?, column::json(row, 2)?);
            Ok((column::parsed(row, 0)?, merged(operator, own)))
        })?
        .collect()
}

/// Removes a device and all that is known of it.
///
/// # Errors
///
/// When SQLite fails.
pub fn delete(connection: &Connection, device: &DeviceId) -> rusqlite::Result<bool> {
    // A device that comes back goes on above every version it may have stored, or it would take what it is
    // told for old news. One number for all forgotten devices: generations need only grow.
    connection.execute(
        "INSERT INTO meta (key, value)
         SELECT 'forgotten_generation', max(coalesce(desired_generation, 0),
                CASE WHEN accepted_epoch = (SELECT value FROM meta WHERE key = 'epoch')
                     THEN coalesce(accepted_generation, 0) ELSE 0 END)
         FROM device WHERE id = ?1
         ON CONFLICT (key) DO UPDATE SET value = max(value, excluded.value)",
        [device.as_str()],
    )?;
    connection.execute(
        "DELETE FROM assignment WHERE device = ?1",
        [device.as_str()],
    )?;
    Ok(connection.execute("DELETE FROM device WHERE id = ?1", [device.as_str()])? > 0)
}

/// Marks every device as not connected: the broker that they were connected to is gone.
///
/// # Errors
///
/// When SQLite fails.
pub fn all_offline(connection: &Connection) -> rusqlite::Result<()> {
    connection.execute("UPDATE device SET online = 0 WHERE online", [])?;
    Ok(())
}

/// Marks devices as not connected that were last heard of before `before`; which.
///
/// # Errors
///
/// When SQLite fails.
pub fn mark_stale(connection: &Connection, before: UnixMs) -> rusqlite::Result<Vec<DeviceId>> {
    connection
        .prepare_cached(
            "UPDATE device SET online = 0 WHERE online AND last_seen_ms < ?1 RETURNING id",
        )?
        .query_map([before.0], |row| column::parsed(row, 0))?
        .collect()
}

/// How many devices are known, and how many of them are connected.
///
/// # Errors
///
/// When SQLite fails.
pub fn count(connection: &Connection) -> rusqlite::Result<(u64, u64)> {
    connection.query_row(
        "SELECT count(*), coalesce(sum(online), 0) FROM device",
        [],
        |row| Ok((row.get(0)?, row.get(1)?)),
    )
}

/// Connected devices after `after`, by id, at most `limit`.
///
/// # Errors
///
/// When SQLite fails.
pub fn online_after(
    connection: &Connection,
    after: &str,
    limit: usize,
) -> rusqlite::Result<Vec<DeviceId>> {
    connection
        .prepare_cached("SELECT id FROM device WHERE online AND id > ?1 ORDER BY id LIMIT ?2")?
        .query_map(params![after, limit], |row| column::parsed(row, 0))?
        .collect()
}

const VIEW: &str = "SELECT id, online, last_seen_ms, operator_labels, own_labels, desired_epoch, desired_generation,
    accepted_epoch, accepted_generation, inventory, held FROM device";

/// A device as the API shows it.
///
/// # Errors
///
/// When SQLite fails.
pub fn view(connection: &Connection, device: &DeviceId) -> rusqlite::Result<Option<DeviceView>> {
    let found = connection
        .prepare_cached(&format!("{VIEW} WHERE id = ?1"))?
        .query_row([device.as_str()], read_view)
        .optional()?;
    found.map(|view| with_apps(connection, view)).transpose()
}

/// Every device as the API shows it, by id.
///
/// # Errors
///
/// When SQLite fails.
pub fn views(connection: &Connection) -> rusqlite::Result<Vec<DeviceView>> {
    let views: Vec<_> = connection
        .prepare_cached(&format!("{VIEW} ORDER BY id"))?
        .query_map([], read_view)?
        .collect::<rusqlite::Result<_>>()?;
    views
        .into_iter()
        .map(|view| with_apps(connection, view))
        .collect()
}

fn read_view(row: &Row<'_>) -> rusqlite::Result<DeviceView> {
    let (operator, own): (Labels, Labels) = (column::json(row, 3)?, column::json(row, 4)?);
    Ok(DeviceView {
        pull: None,
        id: column::parsed(row, 0)?,
        online: row.get(1)?,
        last_seen_ms: row.get(2)?,
        labels: merged(operator, own),
        desired: column::version_option(row, 5)?,
        reported: column::version_option(row, 7)?,
        inventory: column::json_option(row, 9)?,
        apps: Vec::new(),
        held: row.get(10)?,
        secrets_key: None,
        untrusted_key: None,
    })
}

fn with_apps(connection: &Connection, mut view: DeviceView) -> rusqlite::Result<DeviceView> {
    if let Some(keys) = super::secret::keys(connection, &view.id)? {
        view.secrets_key = Some(keys.trusted.fingerprint());
        view.untrusted_key = keys.untrusted.map(|key| key.fingerprint());
    }
    view.apps = connection
        .prepare_cached("SELECT body FROM report WHERE device = ?1 ORDER BY app")?
        .query_map([view.id.as_str()], |row| column::json(row, 0))?
        .collect::<rusqlite::Result<_>>()?;
    Ok(view)
}

/// Holds a device for that reason, or (`None`) lets it go; whether there is such a device and that changed anything.
///
/// # Errors
///
/// When SQLite fails.
pub fn put_held(
    connection: &Connection,
    device: &DeviceId,
    held: Option<&str>,
) -> rusqlite::Result<Option<bool>> {
    let before: Option<Option<String>> = connection
        .prepare_cached("SELECT held FROM device WHERE id = ?1")?
        .query_row([device.as_str()], |row| row.get(0))
        .optional()?;
    connection
        .prepare_cached("UPDATE device SET held = ?2 WHERE id = ?1")?
        .execute(params![device.as_str(), held])?;
    Ok(before.map(|before| before.as_deref() != held))
}

/// Why a device is held; `None` when it is not.
///
/// # Errors
///
/// When SQLite fails.
pub fn held(connection: &Connection, device: &DeviceId) -> rusqlite::Result<Option<String>> {
    connection
        .prepare_cached("SELECT held FROM device WHERE id = ?1")?
        .query_row([device.as_str()], |row| row.get(0))
}

/// Applies a label patch to the operator's labels: how many there were and are; `None` when the device is unknown.
///
/// # Errors
///
/// When SQLite fails.
pub fn patch_labels<'a>(
    connection: &Connection,
    device: &DeviceId,
    patch: impl IntoIterator<Item = (&'a LabelKey, &'a Option<LabelValue>)>,
) -> rusqlite::Result<Option<(usize, usize)>> {
    let Some((mut operator, _)) = labels(connection, device)? else {
        return Ok(None);
    };
    let before = operator.len();
    for (key, value) in patch {
        match value {
            Some(value) => operator.insert(key.clone(), value.clone()),
            None => operator.remove(key),
        };
    }
    put_operator_labels(connection, device, &operator)?;
    Ok(Some((before, operator.len())))
}
