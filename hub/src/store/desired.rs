//! What devices should run, and what must be published about it.
//!
//! Every change of a placement gives its device a new generation and an outbox row in the same transaction.
//! The outbox holds one row a device: what is sent is always the newest head, read when it is sent.

use std::collections::BTreeSet;

use foreshore_protocol::message::{Head, HeadApp};
use foreshore_protocol::{AppName, DeviceId, Digest, Epoch, Version, topic};
use rusqlite::{Connection, OptionalExtension as _, Row, params};

use super::{column, disruption_budget, secret};
use crate::rollout::{Placement, Terms, UnixMs};

/// The hub's epoch.
///
/// # Errors
///
/// When SQLite fails or the row is damaged.
pub fn epoch(connection: &Connection) -> rusqlite::Result<Epoch> {
    let number: u64 = connection
        .prepare_cached("SELECT value FROM meta WHERE key = 'epoch'")?
        .query_row([], |row| row.get(0))?;
    Epoch::new(number).map_err(|error| rusqlite::Error::ToSqlConversionFailure(Box::new(error)))
}

/// Gives a device its next version and an outbox row.
///
/// # Errors
///
/// When SQLite fails, or the generations are used up.
pub fn bump(connection: &Connection, device: &DeviceId) -> rusqlite::Result<Version> {
    let epoch = epoch(connection)?;
    let generation: u64 = connection
        .prepare_cached(
            "UPDATE device SET desired_epoch = ?2, desired_generation = 1 + coalesce(desired_generation,
                        (SELECT value FROM meta WHERE key = 'forgotten_generation'), 0),
                    repair_at_ms = 0, repair_tries = 0
             WHERE id = ?1 RETURNING desired_generation",
        )?
        .query_row(params![device.as_str(), epoch.get()], |row| row.get(0))?;
    let version = Version::from_numbers(epoch.get(), generation)
        .map_err(|error| rusqlite::Error::ToSqlConversionFailure(Box::new(error)))?;
    enqueue(connection, device, version)?;
    Ok(version)
}

/// Writes the outbox row of a device that shall be told `version`.
///
/// # Errors
///
/// When SQLite fails.
pub fn enqueue(
    connection: &Connection,
    device: &DeviceId,
    version: Version,
) -> rusqlite::Result<()> {
    connection
        .prepare_cached(
            "INSERT OR REPLACE INTO outbox (device, epoch, generation) VALUES (?1, ?2, ?3)",
        )?
        .execute(params![
            device.as_str(),
            version.epoch.get(),
            version.generation.get()
        ])?;
    Ok(())
}

/// Places a release of an app on a device: the version it is placed under.
///
/// # Errors
///
/// When SQLite fails.
pub fn place(
    connection: &Connection,
    device: &DeviceId,
    app: &AppName,
    placement: &Placement,
) -> rusqlite::Result<Version> {
    let version = bump(connection, device)?;
    connection
        .prepare_cached(
            "INSERT OR REPLACE INTO placement
             (device, app, release, soak_ms, deadline_ms, since_epoch, since_generation)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
        )?
        .execute(params![
            device.as_str(),
            app.as_str(),
            placement.release.to_string(),
            placement.soak_ms,
            placement.progress_deadline_ms,
            version.epoch.get(),
            version.generation.get(),
        ])?;
    connection
        .prepare_cached("DELETE FROM removal WHERE device = ?1 AND app = ?2")?
        .execute([device.as_str(), app.as_str()])?;
    secret::refresh(connection, device)?;
    Ok(version)
}

/// Says what else a device is told with what was just placed on it. [`place`] alone means nothing.
///
/// # Errors
///
/// When SQLite fails.
pub fn set_terms(
    connection: &Connection,
    device: &DeviceId,
    app: &AppName,
    terms: &Terms,
) -> rusqlite::Result<()> {
    if *terms == Terms::default() {
        return Ok(());
    }
    connection
        .prepare_cached("UPDATE placement SET terms = ?3 WHERE device = ?1 AND app = ?2")?
        .execute(params![
            device.as_str(),
            app.as_str(),
            column::to_json(terms)?
        ])?;
    Ok(())
}

/// What else a device is told with what is placed on it.
///
/// # Errors
///
/// When SQLite fails.
pub fn terms(connection: &Connection, device: &DeviceId, app: &AppName) -> rusqlite::Result<Terms> {
    let found = connection
        .prepare_cached("SELECT terms FROM placement WHERE device = ?1 AND app = ?2")?
        .query_row([device.as_str(), app.as_str()], |row| {
            column::json_option(row, 0)
        })
        .optional()?;
    Ok(found.flatten().unwrap_or_default())
}

/// Lets devices begin at any time with this release of an app that they have assigned, and tells them. How many.
///
/// # Errors
///
/// When SQLite fails.
pub fn clear_windows(
    connection: &Connection,
    app: &AppName,
    releases: &BTreeSet<Digest>,
) -> rusqlite::Result<usize> {
    let devices: Vec<DeviceId> = connection
        .prepare_cached(
            "UPDATE placement SET terms = json_remove(terms, '$.windows')
             WHERE app = ?1 AND instr(?2, release) > 0 AND terms IS NOT NULL RETURNING device",
        )?
        .query_map([app.as_str(), &listed(releases)], |row| {
            column::parsed(row, 0)
        })?
        .collect::<rusqlite::Result<_>>()?;
    for device in &devices {
        bump(connection, device)?;
    }
    Ok(devices.len())
}

/// Lets devices switch to these releases of an app although the app holds its update lock: those that have it assigned
/// are told, and those that will be. How many were told.
///
/// # Errors
///
/// When SQLite fails.
pub fn override_locks(
    connection: &Connection,
    app: &AppName,
    releases: &BTreeSet<Digest>,
) -> rusqlite::Result<usize> {
    let releases = listed(releases);
    let changed = connection
        .prepare_cached(
            "UPDATE app SET unlocked_release = ?2 WHERE name = ?1 AND unlocked_release IS NOT ?2",
        )?
        .execute(params![app.as_str(), releases])?;
    if changed == 0 {
        return Ok(0);
    }
    let devices: Vec<DeviceId> = connection
        .prepare_cached("SELECT device FROM placement WHERE app = ?1 AND instr(?2, release) > 0")?
        .query_map(params![app.as_str(), releases], |row| {
            column::parsed(row, 0)
        })?
        .collect::<rusqlite::Result<_>>()?;
    for device in &devices {
        bump(connection, device)?;
    }
    Ok(devices.len())
}

/// Digests in one column: all have the same length and a prefix of their own, so one is found as a text within.
fn listed(releases: &BTreeSet<Digest>) -> String {
    let texts: Vec<String> = releases.iter().map(Digest::to_string).collect();
    texts.join(",")
}

/// Takes an app from a device, and remembers that the device must say so; the version, or `None` when
/// there was nothing to take.
///
/// # Errors
///
/// When SQLite fails.
pub fn remove(
    connection: &Connection,
    device: &DeviceId,
    app: &AppName,
) -> rusqlite::Result<Option<Version>> {
    let taken = connection
        .prepare_cached("DELETE FROM placement WHERE device = ?1 AND app = ?2")?
        .execute([device.as_str(), app.as_str()])?;
    if taken == 0 {
        return Ok(None);
    }
    let version = bump(connection, device)?;
    connection
        .prepare_cached("INSERT OR REPLACE INTO removal (device, app, epoch, generation) VALUES (?1, ?2, ?3, ?4)")?
        .execute(params![device.as_str(), app.as_str(), version.epoch.get(), version.generation.get()])?;
    secret::refresh(connection, device)?;
    Ok(Some(version))
}

/// What is placed on a device for an app, and since which version.
///
/// # Errors
///
/// When SQLite fails.
pub fn placement(
    connection: &Connection,
    device: &DeviceId,
    app: &AppName,
) -> rusqlite::Result<Option<(Placement, Version)>> {
    connection
        .prepare_cached(
            "SELECT release, soak_ms, deadline_ms, since_epoch, since_generation
             FROM placement WHERE device = ?1 AND app = ?2",
        )?
        .query_row([device.as_str(), app.as_str()], |row| {
            let placement = Placement {
                release: column::parsed(row, 0)?,
                soak_ms: row.get(1)?,
                progress_deadline_ms: row.get(2)?,
            };
            Ok((placement, column::version(row, 3)?))
        })
        .optional()
}

/// The newest desired state of a device; `None` when it was never given one.
///
/// # Errors
///
/// When SQLite fails.
pub fn head(connection: &Connection, device: &DeviceId) -> rusqlite::Result<Option<Head>> {
    let version = connection
        .prepare_cached("SELECT desired_epoch, desired_generation FROM device WHERE id = ?1")?
        .query_row([device.as_str()], |row| column::version_option(row, 0))
        .optional()?
        .flatten();
    let Some(version) = version else {
        return Ok(None);
    };
    let apps = connection
        .prepare_cached(
            "SELECT p.app, p.release, p.since_epoch, p.since_generation, p.soak_ms, p.deadline_ms,
                    coalesce(instr(a.unlocked_release, p.release) > 0, 0), p.terms
             FROM placement p LEFT JOIN app a ON a.name = p.app WHERE p.device = ?1 ORDER BY p.app",
        )?
        .query_map([device.as_str()], |row| {
            let terms: Terms = column::json_option(row, 7)?.unwrap_or_default();
            Ok(HeadApp {
                app: column::parsed(row, 0)?,
                release: column::parsed(row, 1)?,
                since: column::version(row, 2)?,
                soak_ms: row.get(4)?,
                progress_deadline_ms: row.get(5)?,
                override_lock: row.get(6)?,
                windows: terms.windows,
                max_restarts: terms.max_restarts,
                require_hub_ms: terms.require_hub_ms,
            })
        })?
        .collect::<rusqlite::Result<_>>()?;
    let budgets = disruption_budget::of_device(connection, device)?;
    Ok(Some(Head {
        version,
        apps,
        budgets,
    }))
}

/// Heads that wait to be published, in the order of their devices, but those that `rests` says yes to; at most
/// `limit`.
///
/// # Errors
///
/// When SQLite fails.
pub fn waiting_heads(
    connection: &Connection,
    limit: usize,
    rests: impl Fn(&DeviceId, Version) -> bool,
) -> rusqlite::Result<Vec<(DeviceId, Head)>> {
    let mut devices: Vec<DeviceId> = Vec::new();
    // CROSS JOIN makes SQLite begin with what waits, not with every device.
    let mut waiting = connection.prepare_cached(
        "SELECT device, epoch, generation FROM outbox CROSS JOIN device ON device.id = outbox.device
             WHERE restored_epoch IS NULL ORDER BY device",
    )?;
    let mut rows = waiting.query([])?;
    while devices.len() < limit
        && let Some(row) = rows.next()?
    {
        let device = column::parsed(row, 0)?;
        if !rests(&device, column::version(row, 1)?) {
            devices.push(device);
        }
    }
    let mut heads = Vec::with_capacity(devices.len());
    for device in devices {
        if let Some(head) = head(connection, &device)? {
            heads.push((device, head));
        }
    }
    Ok(heads)
}

/// Clears the outbox row of a device whose head of `version` the broker took, unless a newer one waits.
///
/// # Errors
///
/// When SQLite fails.
pub fn published(
    connection: &Connection,
    device: &DeviceId,
    version: Version,
) -> rusqlite::Result<()> {
    connection
        .prepare_cached("DELETE FROM outbox WHERE device = ?1 AND epoch = ?2 AND generation <= ?3")?
        .execute(params![
            device.as_str(),
            version.epoch.get(),
            version.generation.get()
        ])?;
    Ok(())
}

/// Queues a release for publication. It may have been forgotten before: then it is not to be cleared any more.
///
/// # Errors
///
/// When SQLite fails.
pub fn enqueue_release(connection: &Connection, digest: &Digest) -> rusqlite::Result<()> {
    connection
        .prepare_cached("INSERT OR IGNORE INTO outbox_release (digest) VALUES (?1)")?
        .execute([digest.to_string()])?;
    cleared(connection, &topic::release(digest))
}

/// Releases that wait to be published, but those that `rests` says yes to; at most `limit`.
///
/// # Errors
///
/// When SQLite fails.
pub fn waiting_releases(
    connection: &Connection,
    limit: usize,
    rests: impl Fn(&Digest) -> bool,
) -> rusqlite::Result<Vec<(Digest, Vec<u8>)>> {
    let mut waiting = connection.prepare_cached(
        "SELECT release.digest, release.bytes FROM outbox_release CROSS JOIN release USING (digest)",
    )?;
    let mut rows = waiting.query([])?;
    let mut releases = Vec::new();
    while releases.len() < limit
        && let Some(row) = rows.next()?
    {
        let digest = column::parsed(row, 0)?;
        if !rests(&digest) {
            releases.push((digest, row.get(1)?));
        }
    }
    Ok(releases)
}

/// Clears the outbox row of a release that the broker took.
///
/// # Errors
///
/// When SQLite fails.
pub fn release_published(connection: &Connection, digest: &Digest) -> rusqlite::Result<()> {
    connection
        .prepare_cached("DELETE FROM outbox_release WHERE digest = ?1")?
        .execute([digest.to_string()])?;
    Ok(())
}

/// Topics whose retained message must be cleared, at most `limit`.
///
/// # Errors
///
/// When SQLite fails.
pub fn waiting_clears(connection: &Connection, limit: usize) -> rusqlite::Result<Vec<String>> {
    connection
        .prepare_cached("SELECT topic FROM outbox_clear LIMIT ?1")?
        .query_map([limit], |row| row.get(0))?
        .collect()
}

/// Queues a topic whose retained message must be cleared.
///
/// # Errors
///
/// When SQLite fails.
pub fn enqueue_clear(connection: &Connection, topic: &str) -> rusqlite::Result<()> {
    connection
        .prepare_cached("INSERT OR IGNORE INTO outbox_clear (topic) VALUES (?1)")?
        .execute([topic])?;
    Ok(())
}

/// Forgets a topic that was cleared.
///
/// # Errors
///
/// When SQLite fails.
pub fn cleared(connection: &Connection, topic: &str) -> rusqlite::Result<()> {
    connection
        .prepare_cached("DELETE FROM outbox_clear WHERE topic = ?1")?
        .execute([topic])?;
    Ok(())
}

/// How many messages wait to be published.
///
/// # Errors
///
/// When SQLite fails.
pub fn outbox_depth(connection: &Connection) -> rusqlite::Result<u64> {
    connection.query_row(
        "SELECT (SELECT count(*) FROM outbox) + (SELECT count(*) FROM outbox_release)
              + (SELECT count(*) FROM outbox_clear) + (SELECT count(*) FROM outbox_secrets)",
        [],
        |row| row.get(0),
    )
}

/// Queues everything that should be retained on the broker: the head and the secrets of every device that has some, and
/// every release that is placed somewhere.
///
/// # Errors
///
/// When SQLite fails.
pub fn enqueue_all(connection: &Connection) -> rusqlite::Result<()> {
    connection.execute_batch(
        "INSERT OR IGNORE INTO outbox (device, epoch, generation)
             SELECT id, desired_epoch, desired_generation FROM device WHERE desired_generation IS NOT NULL;
         INSERT OR IGNORE INTO outbox_release (digest) SELECT DISTINCT release FROM placement;
         INSERT OR IGNORE INTO outbox_secrets (device, epoch, generation)
             SELECT device, epoch, generation FROM device_secrets WHERE generation IS NOT NULL AND untrusted IS NULL;",
    )
}

/// Every release that is placed on a device, for the repair of that device.
///
/// # Errors
///
/// When SQLite fails.
pub fn releases_of(
    connection: &Connection,
    device: &DeviceId,
) -> rusqlite::Result<BTreeSet<Digest>> {
    connection
        .prepare_cached("SELECT release FROM placement WHERE device = ?1")?
        .query_map([device.as_str()], |row: &Row<'_>| column::parsed(row, 0))?
        .collect()
}

/// The mark that the hub left on the broker last.
///
/// # Errors
///
/// When SQLite fails.
pub fn canary(connection: &Connection) -> rusqlite::Result<Option<u64>> {
    connection
        .prepare_cached("SELECT value FROM meta WHERE key = 'canary_ms'")?
        .query_row([], |row| row.get(0))
        .optional()
}

/// Remembers the mark that the hub leaves on the broker.
///
/// # Errors
///
/// When SQLite fails.
pub fn put_canary(connection: &Connection, unix_ms: u64) -> rusqlite::Result<()> {
    connection
        .prepare_cached("INSERT OR REPLACE INTO meta (key, value) VALUES ('canary_ms', ?1)")?
        .execute([unix_ms])?;
    Ok(())
}

/// The latest time that the store knows of: no event of the future is older.
///
/// # Errors
///
/// When SQLite fails.
pub fn latest(connection: &Connection) -> rusqlite::Result<UnixMs> {
    connection
        .query_row(
            "SELECT max((SELECT value FROM meta WHERE key = 'latest_ms'),
                        coalesce((SELECT max(received_ms) FROM event), 0))",
            [],
            |row| row.get(0),
        )
        .map(UnixMs)
}

/// Begins a new epoch: what is written from now on is newer than anything that devices may have seen from a later life
/// of this database. No device is told anything before it has said which version it has ([`device::Restored`]), so that
/// none goes back to what this database says without anybody's noticing.
///
/// The epoch is the time in seconds since 1970, or one more than the last where a clock stands wrong: a backup may be
/// restored twice, and both lives must not give out the same versions.
///
/// [`device::Restored`]: super::device::Restored
///
/// # Errors
///
/// When SQLite fails, or the epochs are used up.
pub fn begin_epoch(connection: &Connection, now: UnixMs) -> rusqlite::Result<Epoch> {
    connection.execute(
        "UPDATE meta SET value = max(value + 1, ?1) WHERE key = 'epoch'",
        [now.0 / 1000],
    )?;
    let epoch = epoch(connection)?;
    connection.execute(
        "UPDATE device SET online = 0, restored_epoch = coalesce(restored_epoch, desired_epoch, 0),
             restored_generation = coalesce(restored_generation, desired_generation, 0)",
        [],
    )?;
    connection.execute(
        "UPDATE device_secrets SET epoch = ?1 WHERE generation IS NOT NULL",
        [epoch.get()],
    )?;
    connection.execute_batch("DELETE FROM outbox; DELETE FROM outbox_secrets;")?;
    enqueue_all(connection)?;
    Ok(epoch)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::tests::memory;
    use crate::store::{app, device};

    fn names(text: &str) -> (DeviceId, AppName) {
        (text.parse().unwrap(), "shop".parse().unwrap())
    }

    fn placed(connection: &Connection, content: &[u8]) -> Placement {
        let (_, app) = names("d");
        let release = Digest::of(content);
        app::put_release(connection, &release, &app, content, UnixMs(1)).unwrap();
        Placement {
            release,
            soak_ms: 1,
            progress_deadline_ms: 2,
        }
    }

    #[test]
    fn a_publication_of_an_old_head_does_not_clear_a_newer_one() {
        let connection = memory();
        let (id, app) = names("d");
        device::insert(&connection, &id, UnixMs(1)).unwrap();
        let first = place(&connection, &id, &app, &placed(&connection, b"1")).unwrap();
        let second = place(&connection, &id, &app, &placed(&connection, b"2")).unwrap();
        assert!(second > first);
        published(&connection, &id, first).unwrap();
        let waiting = waiting_heads(&connection, 10, |_, _| false).unwrap();
        assert_eq!(waiting.len(), 1);
        assert_eq!(waiting[0].1.version, second);
        assert_eq!(waiting[0].1.apps[0].since, second);
        published(&connection, &id, second).unwrap();
        assert!(
            waiting_heads(&connection, 10, |_, _| false)
                .unwrap()
                .is_empty()
        );
    }

    #[test]
    fn another_apps_change_leaves_since_and_a_removal_waits_for_the_device() {
        let connection = memory();
        let (id, app) = names("d");
        let other: AppName = "other".parse().unwrap();
        device::insert(&connection, &id, UnixMs(1)).unwrap();
        let since = place(&connection, &id, &app, &placed(&connection, b"1")).unwrap();
        place(&connection, &id, &other, &placed(&connection, b"2")).unwrap();
        assert_eq!(placement(&connection, &id, &app).unwrap().unwrap().1, since);
        assert!(remove(&connection, &id, &other).unwrap().is_some());
        assert_eq!(
            remove(&connection, &id, &other).unwrap(),
            None,
            "nothing to take, no new generation"
        );
        let head = head(&connection, &id).unwrap().unwrap();
        assert_eq!((head.version.generation.get(), head.apps.len()), (3, 1));
    }

    #[test]
    fn in_a_new_epoch_nothing_is_published_before_a_device_has_spoken() {
        let connection = memory();
        let (id, app) = names("d");
        device::insert(&connection, &id, UnixMs(1)).unwrap();
        let before = place(&connection, &id, &app, &placed(&connection, b"1")).unwrap();
        published(&connection, &id, before).unwrap();
        let restored = |connection: &Connection| device::link(connection, &id).unwrap().unwrap();
        assert_eq!(restored(&connection).restored, None);
        begin_epoch(&connection, UnixMs(7_999)).unwrap();
        let known = Some(device::Restored::Unheard(Some(before)));
        assert_eq!(restored(&connection).restored, known);
        assert_eq!(
            waiting_releases(&connection, 10, |_| false).unwrap().len(),
            1
        );
        // What is written meanwhile is above every version before, waits, and changes nothing of what is compared with.
        let after = place(&connection, &id, &app, &placed(&connection, b"2")).unwrap();
        assert_eq!(after.epoch.get(), 7, "the time");
        // A clock that went back.
        let epoch = begin_epoch(&connection, UnixMs(2_000)).unwrap();
        assert_eq!(epoch.get(), 8);
        assert_eq!(restored(&connection).restored, known);
        let waiting = || waiting_heads(&connection, 10, |_, _| false).unwrap();
        assert_eq!(waiting(), []);
        assert!(device::confirm(&connection, &id).unwrap());
        assert!(!device::confirm(&connection, &id).unwrap());
        assert_eq!(waiting()[0].1.version, after);
    }
}
