//! Which releases somebody may still ask for.

use std::collections::BTreeMap;

use foreshore_protocol::id::SecretName;
use foreshore_protocol::manifest::Service;
use foreshore_protocol::release::Release;
use foreshore_protocol::{AppName, Digest, ServiceName};
use rusqlite::{Connection, params};

use super::column;

/// The releases that are placed on a device, that a device says it has, runs or goes back to, that a live or newest
/// rollout gives devices back, that the newest completed rollout of an app goes from or to, or one of its newest
/// `?1` rollouts.
const NAMED: &str = "
    WITH kept AS (
        SELECT id, final, age, header FROM (
            SELECT id, final, header, state, row_number() OVER (PARTITION BY app ORDER BY id DESC) AS age,
                   max(id) FILTER (WHERE state = 'completed') OVER (PARTITION BY app) AS completed
            FROM rollout)
        WHERE age <= ?1 OR final = 0 OR id = completed)
    SELECT release AS named FROM placement
    UNION SELECT release FROM report
    UNION SELECT json_extract(body, '$.running') FROM report
    UNION SELECT json_extract(body, '$.last_known_good') FROM report
    UNION SELECT json_extract(header, '$.to') FROM kept
    UNION SELECT json_extract(header, '$.from') FROM kept
    UNION SELECT json_extract(assignment.body, '$.previous.release')
          FROM assignment JOIN kept ON kept.id = assignment.rollout WHERE kept.final = 0 OR kept.age = 1";

/// A release that is kept, with what it is made of.
#[derive(Debug)]
pub struct Kept {
    /// Whose.
    pub app: AppName,
    /// Its services, images pinned by digest.
    pub services: BTreeMap<ServiceName, Service>,
    /// The secrets that its images are pulled with.
    pub image_pull_secrets: Vec<SecretName>,
}

impl Kept {
    /// The images of its services.
    pub fn images(&self) -> impl Iterator<Item = &String> {
        self.services.values().map(|service| &service.image)
    }

    /// The secrets of its services, and those that its images are pulled with.
    pub fn secrets(&self) -> impl Iterator<Item = &SecretName> {
        let mounts = self.services.values().flat_map(|service| &service.secrets);
        let names = mounts.map(|mount| &mount.source);
        names.chain(&self.image_pull_secrets)
    }
}

/// The releases that a device may yet be given, or says it has: what an app is at, goes back to, or is undone to.
/// Reads every report.
///
/// # Errors
///
/// When SQLite fails.
pub fn needed(connection: &Connection) -> rusqlite::Result<Vec<Kept>> {
    connection
        .prepare_cached(&format!(
            "SELECT digest, app, bytes FROM release WHERE digest IN ({NAMED})"
        ))?
        .query_map([1], |row| {
            let (digest, bytes): (Digest, Vec<u8>) = (column::parsed(row, 0)?, row.get(2)?);
            let app = column::parsed(row, 1)?;
            let Ok(release) = Release::from_bytes(&bytes, &digest) else {
                return Ok(Kept {
                    app,
                    services: BTreeMap::new(),
                    image_pull_secrets: Vec::new(),
                });
            };
            Ok(Kept {
                app,
                services: release.services,
                image_pull_secrets: release.image_pull_secrets,
            })
        })?
        .collect()
}

/// The releases that nobody asks for any more and none of the newest `newest` rollouts of an app names, at most
/// `limit`. Reads every report.
///
/// # Errors
///
/// When SQLite fails.
pub fn expired(connection: &Connection, newest: u64, limit: u64) -> rusqlite::Result<Vec<Digest>> {
    connection
        .prepare_cached(&format!(
            "SELECT digest FROM release WHERE digest NOT IN
                (SELECT named FROM ({NAMED}) WHERE named IS NOT NULL) LIMIT ?2"
        ))?
        .query_map(params![newest, limit], |row| column::parsed(row, 0))?
        .collect()
}

/// Forgets a release that had [`expired`] when `newest` was the newest rollout, unless a rollout was opened since
/// that names it, or it is placed; whether it went.
///
/// # Errors
///
/// When SQLite fails.
pub fn delete(connection: &Connection, digest: &Digest, newest: u64) -> rusqlite::Result<bool> {
    let digest = digest.to_string();
    let gone = connection
        .prepare_cached(
            "DELETE FROM release WHERE digest = ?1
                AND NOT EXISTS (SELECT 1 FROM placement WHERE release = ?1)
                AND NOT EXISTS (SELECT 1 FROM rollout WHERE id > ?2
                    AND ?1 IN (json_extract(header, '$.to'), json_extract(header, '$.from')))",
        )?
        .execute(params![digest, newest])?;
    if gone > 0 {
        connection
            .prepare_cached("DELETE FROM outbox_release WHERE digest = ?1")?
            .execute([digest])?;
    }
    Ok(gone > 0)
}
