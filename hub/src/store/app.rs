//! Apps, their releases, and which devices they select.

use foreshore_protocol::manifest::App;
use foreshore_protocol::{AppName, DeviceId, Digest, Version};
use rusqlite::{Connection, OptionalExtension as _, Row, params};

use super::column;
use crate::rollout::UnixMs;

/// An app.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AppRow {
    /// The manifest as applied last.
    pub manifest: App,
    /// When it was made.
    pub created: UnixMs,
    /// When it was last applied.
    pub updated: UnixMs,
    /// It is being removed from its devices.
    pub deleting: bool,
}

impl AppRow {
    /// Its name.
    #[must_use]
    pub const fn name(&self) -> &AppName {
        &self.manifest.metadata.name
    }
}

const COLUMNS: &str = "manifest, created_ms, updated_ms, deleting";

fn read(row: &Row<'_>) -> rusqlite::Result<AppRow> {
    Ok(AppRow {
        manifest: column::json(row, 0)?,
        created: UnixMs(row.get(1)?),
        updated: UnixMs(row.get(2)?),
        deleting: row.get(3)?,
    })
}

/// The app of that name.
///
/// # Errors
///
/// When SQLite fails.
pub fn get(connection: &Connection, name: &AppName) -> rusqlite::Result<Option<AppRow>> {
    connection
        .prepare_cached(&format!("SELECT {COLUMNS} FROM app WHERE name = ?1"))?
        .query_row([name.as_str()], read)
        .optional()
}

/// Every app, by name.
///
/// # Errors
///
/// When SQLite fails.
pub fn list(connection: &Connection) -> rusqlite::Result<Vec<AppRow>> {
    connection
        .prepare_cached(&format!("SELECT {COLUMNS} FROM app ORDER BY name"))?
        .query_map([], read)?
        .collect()
}

/// Writes an app.
///
/// # Errors
///
/// When SQLite fails.
pub fn put(connection: &Connection, app: &AppRow) -> rusqlite::Result<()> {
    connection
        .prepare_cached(
            "INSERT INTO app (name, manifest, created_ms, updated_ms, deleting)
             VALUES (?1, ?2, ?3, ?4, ?5)
             ON CONFLICT (name) DO UPDATE SET manifest = ?2, created_ms = ?3, updated_ms = ?4, deleting = ?5",
        )?
        .execute(params![
            app.name().as_str(),
            column::to_json(&app.manifest)?,
            app.created.0,
            app.updated.0,
            app.deleting,
        ])?;
    Ok(())
}

/// Removes an app and its rollouts.
///
/// # Errors
///
/// When SQLite fails.
pub fn delete(connection: &Connection, name: &AppName) -> rusqlite::Result<()> {
    connection.execute("DELETE FROM rollout WHERE app = ?1", [name.as_str()])?;
    connection.execute("DELETE FROM app WHERE name = ?1", [name.as_str()])?;
    Ok(())
}

/// Keeps the bytes of a release, unless they are there.
///
/// # Errors
///
/// When SQLite fails.
pub fn put_release(
    connection: &Connection,
    digest: &Digest,
    app: &AppName,
    bytes: &[u8],
    now: UnixMs,
) -> rusqlite::Result<()> {
    connection
        .prepare_cached("INSERT OR IGNORE INTO release (digest, app, bytes, created_ms) VALUES (?1, ?2, ?3, ?4)")?
        .execute(params![digest.to_string(), app.as_str(), bytes, now.0])?;
    Ok(())
}

/// The bytes of a release.
///
/// # Errors
///
/// When SQLite fails.
pub fn release_bytes(
    connection: &Connection,
    digest: &Digest,
) -> rusqlite::Result<Option<Vec<u8>>> {
    connection
        .prepare_cached("SELECT bytes FROM release WHERE digest = ?1")?
        .query_row([digest.to_string()], |row| row.get(0))
        .optional()
}

/// The devices that an app selects, by id.
///
/// # Errors
///
/// When SQLite fails.
pub fn members(connection: &Connection, app: &AppName) -> rusqlite::Result<Vec<DeviceId>> {
    connection
        .prepare_cached("SELECT device FROM member WHERE app = ?1 ORDER BY device")?
        .query_map([app.as_str()], |row| column::parsed(row, 0))?
        .collect()
}

/// How many devices an app selects.
///
/// # Errors
///
/// When SQLite fails.
pub fn member_count(connection: &Connection, app: &AppName) -> rusqlite::Result<u64> {
    connection
        .prepare_cached("SELECT count(*) FROM member WHERE app = ?1")?
        .query_row([app.as_str()], |row| row.get(0))
}

/// How many apps other than `app` select a device.
///
/// # Errors
///
/// When SQLite fails.
pub fn others_selecting(
    connection: &Connection,
    app: &AppName,
    device: &DeviceId,
) -> rusqlite::Result<usize> {
    connection
        .prepare_cached("SELECT count(*) FROM member WHERE device = ?1 AND app != ?2")?
        .query_row([device.as_str(), app.as_str()], |row| row.get(0))
}

/// How many of the devices that an app selects say that `release` succeeded there.
///
/// # Errors
///
/// When SQLite fails.
pub fn up_to_date(
    connection: &Connection,
    app: &AppName,
    release: &Digest,
) -> rusqlite::Result<u64> {
    connection
        .prepare_cached(
            "SELECT count(*) FROM member JOIN report USING (device, app)
             WHERE app = ?1 AND release = ?2 AND phase = 'succeeded'",
        )?
        .query_row([app.as_str(), &release.to_string()], |row| row.get(0))
}

/// Makes a device a member of an app, or no longer; whether that changed anything.
///
/// # Errors
///
/// When SQLite fails.
pub fn set_member(
    connection: &Connection,
    app: &AppName,
    device: &DeviceId,
    selected: bool,
) -> rusqlite::Result<bool> {
    let sql = if selected {
        "INSERT OR IGNORE INTO member (app, device) VALUES (?1, ?2)"
    } else {
        "DELETE FROM member WHERE app = ?1 AND device = ?2"
    };
    let changed = connection
        .prepare_cached(sql)?
        .execute([app.as_str(), device.as_str()])?;
    Ok(changed > 0)
}

/// Devices that must still say that they removed an app.
///
/// # Errors
///
/// When SQLite fails.
pub fn removals_left(connection: &Connection, app: &AppName) -> rusqlite::Result<u64> {
    connection
        .prepare_cached("SELECT count(*) FROM removal WHERE app = ?1")?
        .query_row([app.as_str()], |row| row.get(0))
}

/// The devices that an app is placed on, by id.
///
/// # Errors
///
/// When SQLite fails.
pub fn placed_on(connection: &Connection, app: &AppName) -> rusqlite::Result<Vec<DeviceId>> {
    connection
        .prepare_cached("SELECT device FROM placement WHERE app = ?1 ORDER BY device")?
        .query_map([app.as_str()], |row| column::parsed(row, 0))?
        .collect()
}

/// The apps that a device must still say it removed.
///
/// # Errors
///
/// When SQLite fails.
pub fn removals_of(connection: &Connection, device: &DeviceId) -> rusqlite::Result<Vec<AppName>> {
    connection
        .prepare_cached("SELECT app FROM removal WHERE device = ?1")?
        .query_map([device.as_str()], |row| column::parsed(row, 0))?
        .collect()
}

/// Takes note that a device which stored `version` runs only `apps`: the removals that this ends.
///
/// # Errors
///
/// When SQLite fails.
pub fn end_removals<'a>(
    connection: &Connection,
    device: &DeviceId,
    version: Version,
    apps: impl IntoIterator<Item = &'a AppName>,
) -> rusqlite::Result<Vec<AppName>> {
    let waiting: Vec<AppName> = connection
        .prepare_cached(
            "SELECT app FROM removal WHERE device = ?1 AND (epoch, generation) <= (?2, ?3)",
        )?
        .query_map(
            params![
                device.as_str(),
                version.epoch.get(),
                version.generation.get()
            ],
            |row| column::parsed(row, 0),
        )?
        .collect::<rusqlite::Result<_>>()?;
    if waiting.is_empty() {
        return Ok(waiting);
    }
    let still: std::collections::BTreeSet<&AppName> = apps.into_iter().collect();
    let ended: Vec<AppName> = waiting
        .into_iter()
        .filter(|app| !still.contains(app))
        .collect();
    for app in &ended {
        connection
            .prepare_cached("DELETE FROM removal WHERE device = ?1 AND app = ?2")?
            .execute([device.as_str(), app.as_str()])?;
    }
    Ok(ended)
}
