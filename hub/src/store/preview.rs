//! What the hub knows of the devices that a selector means, one after the other, for a preview.

use std::collections::{BTreeMap, BTreeSet};

use foreshore_protocol::api::Preview;
use foreshore_protocol::id::Labels;
use foreshore_protocol::manifest::Selector;
use foreshore_protocol::release::Release;
use foreshore_protocol::{AppName, DeviceId, Digest};
use rusqlite::{CachedStatement, Connection, Row, params};
use serde::Deserialize;

use super::{app, column, device};
use crate::preview::{Device, Draft, Known, Wants, memory_of};

/// Releases whose memory is remembered.
const RELEASES_KEPT: usize = 4096;

/// The parts of an `AppStatus` that matter here.
#[derive(Debug, Deserialize)]
struct Said {
    running: Option<Digest>,
    last_known_good: Option<Digest>,
}

/// What is said of one app on a device.
#[derive(Debug)]
struct Report {
    app: String,
    release: Digest,
    succeeded: bool,
    said: Said,
}

/// The statements that are asked once for each device.
struct Questions<'c> {
    connection: &'c Connection,
    reports: CachedStatement<'c>,
    placements: CachedStatement<'c>,
    key: CachedStatement<'c>,
    budget: CachedStatement<'c>,
    /// What the services of a release may use; `None` when it cannot be read.
    memory: BTreeMap<Digest, Option<u64>>,
}

/// Every device that `selector` means, by id, with what is known of it for `release` of `app`. Takes memory for one device.
///
/// # Errors
///
/// When SQLite fails.
pub fn each(
    connection: &Connection,
    app: &AppName,
    release: &Digest,
    selector: &Selector,
    mut take: impl FnMut(Device),
) -> rusqlite::Result<()> {
    let mut questions = Questions::new(connection)?;
    let mut devices = connection.prepare_cached(
        "SELECT id, online, held, inventory, operator_labels, own_labels FROM device ORDER BY id",
    )?;
    let mut rows = devices.query([])?;
    while let Some(row) = rows.next()? {
        let (operator, own): (Labels, Labels) = (column::json(row, 4)?, column::json(row, 5)?);
        if selector.matches(&device::merged(operator, own)) {
            take(questions.device(row, app, release)?);
        }
    }
    Ok(())
}

/// A preview of `release` over these devices. `unset` are its secrets that the hub does not have.
///
/// # Errors
///
/// When SQLite fails.
pub fn preview(
    connection: &Connection,
    app: &AppName,
    release: &Digest,
    selector: &Selector,
    (wants, known, unset): (&Wants, &Known, &[String]),
) -> rusqlite::Result<Preview> {
    let mut draft = Draft::new(wants, known);
    each(connection, app, release, selector, |device| {
        draft.add(&device);
    })?;
    Ok(draft.finish(unset))
}

/// The bytes of a release as a release; `None` when it is not there, or does not read.
///
/// # Errors
///
/// When SQLite fails.
pub fn release(connection: &Connection, digest: &Digest) -> rusqlite::Result<Option<Release>> {
    let bytes = app::release_bytes(connection, digest)?;
    Ok(bytes.and_then(|bytes| Release::from_bytes(&bytes, digest).ok()))
}

impl<'c> Questions<'c> {
    fn new(connection: &'c Connection) -> rusqlite::Result<Self> {
        Ok(Self {
            connection,
            reports: connection
                .prepare_cached("SELECT app, release, phase, body FROM report WHERE device = ?1")?,
            placements: connection
                .prepare_cached("SELECT release FROM placement WHERE device = ?1 AND app != ?2")?,
            key: connection.prepare_cached(
                "SELECT 1 FROM device_secrets WHERE device = ?1 AND untrusted IS NULL",
            )?,
            budget: connection
                .prepare_cached("SELECT 1 FROM budget_member WHERE device = ?1 LIMIT 1")?,
            memory: BTreeMap::new(),
        })
    }

    fn device(
        &mut self,
        row: &Row<'_>,
        app: &AppName,
        release: &Digest,
    ) -> rusqlite::Result<Device> {
        let id: DeviceId = column::parsed(row, 0)?;
        let reports = self.reports(&id)?;
        let own = reports.iter().find(|report| report.app == app.as_str());
        let running = own.and_then(|report| report.said.running);
        let at_release = own.is_some_and(|report| {
            report.succeeded && report.release == *release && running == Some(*release)
        });
        let named = reports
            .iter()
            .flat_map(|report| [report.said.running, report.said.last_known_good]);
        let on_disk: BTreeSet<Digest> = named.flatten().collect();
        Ok(Device {
            online: row.get(1)?,
            held: row.get(2)?,
            inventory: column::json_option(row, 3)?,
            on_disk,
            running,
            at_release,
            others_memory_bytes: self.others(&id, app)?,
            has_key: self.key.exists([id.as_str()])?,
            has_budget: self.budget.exists([id.as_str()])?,
            id,
        })
    }

    fn reports(&mut self, id: &DeviceId) -> rusqlite::Result<Vec<Report>> {
        self.reports
            .query_map([id.as_str()], |row| {
                Ok(Report {
                    app: row.get(0)?,
                    release: column::parsed(row, 1)?,
                    succeeded: row.get_ref(2)?.as_str()? == "succeeded",
                    said: column::json(row, 3)?,
                })
            })?
            .collect()
    }

    fn others(&mut self, id: &DeviceId, app: &AppName) -> rusqlite::Result<Option<u64>> {
        let others: Vec<Digest> = self
            .placements
            .query_map(params![id.as_str(), app.as_str()], |row| {
                column::parsed(row, 0)
            })?
            .collect::<rusqlite::Result<_>>()?;
        let mut sum = Some(0_u64);
        for other in others {
            let bytes = self.memory_of(&other)?;
            sum = sum.zip(bytes).map(|(sum, bytes)| sum.saturating_add(bytes));
        }
        Ok(sum)
    }

    fn memory_of(&mut self, digest: &Digest) -> rusqlite::Result<Option<u64>> {
        if let Some(known) = self.memory.get(digest) {
            return Ok(*known);
        }
        let bytes = release(self.connection, digest)?.map(|release| memory_of(&release));
        if self.memory.len() < RELEASES_KEPT {
            self.memory.insert(*digest, bytes);
        }
        Ok(bytes)
    }
}
