//! Of which devices something changed that rollouts are decided on: noted by SQLite itself, whatever code changed it.
//!
//! Triggers on the writer's own connection write into a temporary table, so a note is made in the transaction of the
//! change and is gone with it. [`crate::controller::lives`] reads and empties it.

use foreshore_protocol::DeviceId;
use rusqlite::Connection;

use super::column;

/// What [`crate::rollout::Facts`] are made of, `last_seen` aside: nothing is decided by that. A device is busy for one
/// app while a rollout of another, its newest and not given up, counts it against its slots.
///
/// Not `INSERT OR IGNORE`: a statement with a conflict clause of its own, `ON CONFLICT DO UPDATE` included, decides for the
/// triggers that it fires ("The ON CONFLICT Clause", sqlite.org), and a second note of a device would fail.
const WATCH: &str = "
CREATE TEMP TABLE news (device TEXT PRIMARY KEY) STRICT, WITHOUT ROWID;
CREATE TEMP TABLE news_gone (rollout INTEGER PRIMARY KEY) STRICT;

CREATE TEMP TRIGGER news_device_comes AFTER INSERT ON main.device
BEGIN INSERT INTO news SELECT NEW.id WHERE NEW.id NOT IN news; END;
CREATE TEMP TRIGGER news_device_goes AFTER DELETE ON main.device
BEGIN INSERT INTO news SELECT OLD.id WHERE OLD.id NOT IN news; END;
CREATE TEMP TRIGGER news_device AFTER UPDATE OF online, accepted_epoch, accepted_generation, held ON main.device
WHEN OLD.online IS NOT NEW.online OR OLD.accepted_epoch IS NOT NEW.accepted_epoch
    OR OLD.accepted_generation IS NOT NEW.accepted_generation OR OLD.held IS NOT NEW.held
BEGIN INSERT INTO news SELECT NEW.id WHERE NEW.id NOT IN news; END;

CREATE TEMP TRIGGER news_report_comes AFTER INSERT ON main.report
BEGIN INSERT INTO news SELECT NEW.device WHERE NEW.device NOT IN news; END;
CREATE TEMP TRIGGER news_report AFTER UPDATE ON main.report
BEGIN INSERT INTO news SELECT NEW.device WHERE NEW.device NOT IN news; END;
CREATE TEMP TRIGGER news_report_goes AFTER DELETE ON main.report
BEGIN INSERT INTO news SELECT OLD.device WHERE OLD.device NOT IN news; END;

CREATE TEMP TRIGGER news_lease_comes AFTER INSERT ON main.lease
BEGIN INSERT INTO news SELECT NEW.device WHERE NEW.device NOT IN news; END;
CREATE TEMP TRIGGER news_lease AFTER UPDATE ON main.lease
BEGIN INSERT INTO news SELECT NEW.device WHERE NEW.device NOT IN news; END;
CREATE TEMP TRIGGER news_lease_goes AFTER DELETE ON main.lease
BEGIN INSERT INTO news SELECT OLD.device WHERE OLD.device NOT IN news; END;

CREATE TEMP TRIGGER news_member_comes AFTER INSERT ON main.member
BEGIN INSERT INTO news SELECT NEW.device WHERE NEW.device NOT IN news; END;
CREATE TEMP TRIGGER news_member_goes AFTER DELETE ON main.member
BEGIN INSERT INTO news SELECT OLD.device WHERE OLD.device NOT IN news; END;

CREATE TEMP TRIGGER news_busy_comes AFTER INSERT ON main.assignment WHEN NEW.busy
BEGIN INSERT INTO news SELECT NEW.device WHERE NEW.device NOT IN news; END;
CREATE TEMP TRIGGER news_busy AFTER UPDATE OF busy ON main.assignment WHEN OLD.busy IS NOT NEW.busy
BEGIN INSERT INTO news SELECT NEW.device WHERE NEW.device NOT IN news; END;
CREATE TEMP TRIGGER news_assignment_goes AFTER DELETE ON main.assignment
BEGIN INSERT INTO news SELECT OLD.device WHERE OLD.device NOT IN news; END;

CREATE TEMP TRIGGER news_rollout AFTER UPDATE OF state, final ON main.rollout
WHEN OLD.state IS NOT NEW.state OR OLD.final IS NOT NEW.final
BEGIN INSERT INTO news SELECT device FROM assignment WHERE rollout = NEW.id AND busy AND device NOT IN news; END;
CREATE TEMP TRIGGER news_rollout_comes AFTER INSERT ON main.rollout
BEGIN
    INSERT INTO news SELECT device FROM assignment
    WHERE rollout = (SELECT max(id) FROM rollout WHERE app = NEW.app AND id < NEW.id) AND busy AND device NOT IN news;
END;
CREATE TEMP TRIGGER news_rollout_goes AFTER DELETE ON main.rollout
BEGIN INSERT INTO news_gone SELECT OLD.id WHERE OLD.id NOT IN news_gone; END;
";

/// From here on notes are made. Once for a connection.
///
/// # Errors
///
/// When SQLite fails.
pub fn watch(connection: &Connection) -> rusqlite::Result<()> {
    // `temp_store` stays as it is: with MEMORY, opening a rollout over 100,000 devices took 117 s instead of 7
    // (measured), most likely as what a savepoint needs for going back is a list then that every statement walks.
    connection.execute_batch(WATCH)
}

/// What was noted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Noted {
    /// Of these devices something changed.
    pub devices: Vec<DeviceId>,
    /// These rollouts were removed.
    pub gone: Vec<u64>,
}

/// What was noted since the last call; nothing is any more.
///
/// # Errors
///
/// When SQLite fails, or [`watch`] was not called.
pub fn take(connection: &Connection) -> rusqlite::Result<Noted> {
    let devices: Vec<DeviceId> = connection
        .prepare_cached("SELECT device FROM temp.news ORDER BY device")?
        .query_map([], |row| column::parsed(row, 0))?
        .collect::<rusqlite::Result<_>>()?;
    if !devices.is_empty() {
        connection
            .prepare_cached("DELETE FROM temp.news")?
            .execute([])?;
    }
    let gone: Vec<u64> = connection
        .prepare_cached("SELECT rollout FROM temp.news_gone")?
        .query_map([], |row| row.get(0))?
        .collect::<rusqlite::Result<_>>()?;
    if !gone.is_empty() {
        connection
            .prepare_cached("DELETE FROM temp.news_gone")?
            .execute([])?;
    }
    Ok(Noted { devices, gone })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_changes_twice_is_noted_once_however_it_is_written() {
        let mut connection = Connection::open_in_memory().unwrap();
        crate::store::schema::migrate(&mut connection).unwrap();
        watch(&connection).unwrap();
        connection
            .execute_batch(
                "INSERT INTO rollout (id, app, state, final, wake_at_ms, created_ms, header)
                 VALUES (1, 'web', 'running', 0, 0, 0, '{}')",
            )
            .unwrap();
        for busy in [true, false, true] {
            connection
                .execute(
                    "INSERT INTO assignment (rollout, device, body, busy) VALUES (1, 'one', '{}', ?1)
                     ON CONFLICT (rollout, device) DO UPDATE SET busy = ?1",
                    [busy],
                )
                .unwrap();
        }
        connection
            .execute_batch(
                "UPDATE OR ABORT rollout SET final = 1;
                 INSERT OR ABORT INTO rollout (id, app, state, final, wake_at_ms, created_ms, header)
                 VALUES (2, 'web', 'running', 0, 0, 0, '{}');
                 DELETE FROM rollout WHERE id = 1;",
            )
            .unwrap();
        let noted = take(&connection).unwrap();
        assert_eq!(noted.devices, ["one".parse().unwrap()]);
        assert_eq!(noted.gone, [1]);
        assert_eq!(take(&connection).unwrap(), Noted::default());
    }
}
