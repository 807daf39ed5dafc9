//! What happened: a bounded log, numbered for ever.

use foreshore_protocol::api::EventView;
use foreshore_protocol::{AppName, DeviceId};
use rusqlite::{Connection, OptionalExtension as _, Row, params};

use super::column;
use crate::rollout::UnixMs;

/// How many events are kept: at 200 bytes each about 20 MB.
pub const KEEP: u64 = 100_000;

/// How long events are kept, in milliseconds: 30 days.
pub const KEEP_MS: u64 = 30 * 24 * 3_600_000;

/// The longest message that is kept, in bytes.
const MESSAGE_MAX: usize = 1024;

/// Something to be recorded.
#[derive(Debug, Clone, Default)]
pub struct NewEvent {
    /// From which device; `None`: from the hub.
    pub device: Option<DeviceId>,
    /// Which app.
    pub app: Option<AppName>,
    /// Which service.
    pub service: Option<foreshore_protocol::ServiceName>,
    /// Which rollout.
    pub rollout: Option<u64>,
    /// Stable, kebab-case.
    pub kind: String,
    /// For people.
    pub message: String,
}

/// Records an event.
///
/// # Errors
///
/// When SQLite fails.
pub fn insert(connection: &Connection, event: &NewEvent, now: UnixMs) -> rusqlite::Result<()> {
    let mut end = event.message.len().min(MESSAGE_MAX);
    while !event.message.is_char_boundary(end) {
        end -= 1;
    }
    connection
        .prepare_cached(
            "INSERT INTO event (received_ms, device, app, service, rollout, kind, message)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
        )?
        .execute(params![
            now.0,
            event.device.as_ref().map(DeviceId::as_str),
            event.app.as_ref().map(AppName::as_str),
            event
                .service
                .as_ref()
                .map(foreshore_protocol::ServiceName::as_str),
            event.rollout,
            event.kind,
            &event.message[..end],
        ])?;
    Ok(())
}

/// The events after `after`, oldest first, at most `limit`.
///
/// # Errors
///
/// When SQLite fails.
pub fn after(connection: &Connection, after: u64, limit: u64) -> rusqlite::Result<Vec<EventView>> {
    connection
        .prepare_cached(
            "SELECT id, received_ms, device, app, service, rollout, kind, message
             FROM event WHERE id > ?1 ORDER BY id LIMIT ?2",
        )?
        .query_map(params![after, limit], view)?
        .collect()
}

/// The newest event's id; 0 before the first.
///
/// # Errors
///
/// When SQLite fails.
pub fn newest(connection: &Connection) -> rusqlite::Result<u64> {
    connection.query_row("SELECT coalesce(max(id), 0) FROM event", [], |row| {
        row.get(0)
    })
}

/// Drops what is beyond `keep` events, and what came before the first event since `since`.
///
/// # Errors
///
/// When SQLite fails.
pub fn prune(connection: &Connection, keep: u64, since: UnixMs) -> rusqlite::Result<usize> {
    let newest = newest(connection)?;
    // Events come in the order of their time. So this looks at those that go and at one more, without an index.
    let first: Option<u64> = connection
        .prepare_cached("SELECT id FROM event WHERE received_ms >= ?1 ORDER BY id LIMIT 1")?
        .query_row([since.0], |row| row.get(0))
        .optional()?;
    let too_old = first.map_or(newest, |first| first - 1);
    connection
        .prepare_cached("DELETE FROM event WHERE id <= ?1")?
        .execute([newest.saturating_sub(keep).max(too_old)])
}

fn view(row: &Row<'_>) -> rusqlite::Result<EventView> {
    Ok(EventView {
        id: row.get(0)?,
        received_ms: row.get(1)?,
        device: column::parsed_option(row, 2)?,
        app: column::parsed_option(row, 3)?,
        service: column::parsed_option(row, 4)?,
        rollout: row.get(5)?,
        kind: row.get(6)?,
        message: row.get(7)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::tests::memory;

    #[test]
    fn ids_grow_for_ever_and_the_log_is_bounded() {
        let connection = memory();
        let event = |message: &str| NewEvent {
            kind: "test".to_owned(),
            message: message.to_owned(),
            ..NewEvent::default()
        };
        for number in 0..10 {
            insert(&connection, &event(&number.to_string()), UnixMs(number)).unwrap();
        }
        assert_eq!(prune(&connection, 3, UnixMs(0)).unwrap(), 7);
        let ids: Vec<_> = after(&connection, 0, 100)
            .unwrap()
            .iter()
            .map(|event| event.id)
            .collect();
        assert_eq!(ids, [8, 9, 10]);
        assert_eq!(prune(&connection, 3, UnixMs(8)).unwrap(), 1, "by age");
        assert_eq!(prune(&connection, 3, UnixMs(8)).unwrap(), 0);
        assert_eq!(
            prune(&connection, 3, UnixMs(100)).unwrap(),
            2,
            "all are old"
        );
        insert(&connection, &event("x"), UnixMs(0)).unwrap();
        assert_eq!(
            newest(&connection).unwrap(),
            11,
            "an id is never given twice"
        );
        insert(&connection, &event(&"ä".repeat(2000)), UnixMs(0)).unwrap();
        let last = after(&connection, 11, 1).unwrap().remove(0);
        assert_eq!(last.message.len(), 1024);
    }
}
