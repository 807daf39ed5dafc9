//! Which releases somebody may still ask for, and which of them can be reached from which.

use std::collections::BTreeMap;

use foreshore_protocol::digest::DigestPrefix;
use foreshore_protocol::id::SecretName;
use foreshore_protocol::manifest::Service;
use foreshore_protocol::release::Release;
use foreshore_protocol::{AppName, DeviceId, Digest, ServiceName};
use rusqlite::{Connection, params};

use super::column;

/// The releases that are placed on a device, that a device says it has, runs or goes back to, that a live or newest
/// rollout gives devices back, that the newest completed rollout of an app goes from or to, or one of its newest
/// `?1` rollouts; and those that these can only be reached from.
const NAMED: &str = "
    WITH RECURSIVE kept AS (
        SELECT id, final, age, header FROM (
            SELECT id, final, header, state, row_number() OVER (PARTITION BY app ORDER BY id DESC) AS age,
                   max(id) FILTER (WHERE state = 'completed') OVER (PARTITION BY app) AS completed
            FROM rollout)
        WHERE age <= ?1 OR final = 0 OR id = completed),
    reached (named) AS (
    SELECT release FROM placement
    UNION SELECT release FROM report
    UNION SELECT json_extract(body, '$.running') FROM report
    UNION SELECT json_extract(body, '$.last_known_good') FROM report
    UNION SELECT json_extract(header, '$.to') FROM kept
    UNION SELECT json_extract(header, '$.from') FROM kept
    UNION SELECT json_extract(assignment.body, '$.previous.release')
          FROM assignment JOIN kept ON kept.id = assignment.rollout WHERE kept.final = 0 OR kept.age = 1
    UNION SELECT required FROM reached JOIN requirement ON requirement.release = reached.named)
    SELECT named FROM reached";

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

/// The releases of an app whose digests begin with these hexadecimal digits, at most two.
///
/// # Errors
///
/// When SQLite fails.
pub fn beginning_with(
    connection: &Connection,
    app: &AppName,
    prefix: &DigestPrefix,
) -> rusqlite::Result<Vec<Digest>> {
    connection
        .prepare_cached(
            "SELECT digest FROM release
             WHERE digest BETWEEN 'sha256:' || ?2 AND 'sha256:' || ?2 || 'g' AND app = ?1 LIMIT 2",
        )?
        .query_map([app.as_str(), prefix.hex()], |row| column::parsed(row, 0))?
        .collect()
}

/// The release of an app that each device says was well there last, or runs there.
///
/// # Errors
///
/// When SQLite fails.
pub fn on_devices(
    connection: &Connection,
    app: &AppName,
) -> rusqlite::Result<Vec<(DeviceId, Digest)>> {
    connection
        .prepare_cached(
            "SELECT device, coalesce(json_extract(body, '$.last_known_good'), json_extract(body, '$.running')) AS has
             FROM report WHERE app = ?1 AND has IS NOT NULL",
        )?
        .query_map([app.as_str()], |row| {
            Ok((column::parsed(row, 0)?, column::parsed(row, 1)?))
        })?
        .collect()
}

/// From which releases this one can be reached; from any if there are none.
///
/// # Errors
///
/// When SQLite fails.
pub fn requirements(connection: &Connection, release: &Digest) -> rusqlite::Result<Vec<Digest>> {
    connection
        .prepare_cached("SELECT required FROM requirement WHERE release = ?1 ORDER BY place")?
        .query_map([release.to_string()], |row| column::parsed(row, 0))?
        .collect()
}

/// Writes that down anew for a release that is there.
///
/// # Errors
///
/// When SQLite fails.
pub fn put_requirements(
    connection: &Connection,
    release: &Digest,
    required: &[Digest],
) -> rusqlite::Result<()> {
    connection
        .prepare_cached("DELETE FROM requirement WHERE release = ?1")?
        .execute([release.to_string()])?;
    for (place, required) in required.iter().enumerate() {
        connection
            .prepare_cached(
                "INSERT INTO requirement (release, place, required) VALUES (?1, ?2, ?3)",
            )?
            .execute(params![release.to_string(), place, required.to_string()])?;
    }
    Ok(())
}

/// Forgets a release that had [`expired`] when `newest` was the newest rollout, unless a rollout was opened since
/// that names it, it is placed, or the release of a rollout can only be reached from it; whether it went.
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
                    AND (?1 IN (json_extract(header, '$.to'), json_extract(header, '$.from'))
                        OR EXISTS (SELECT 1 FROM json_tree(header, '$.policy.requirements') WHERE value = ?1)))
                AND NOT EXISTS (SELECT 1 FROM requirement
                    JOIN rollout ON json_extract(header, '$.to') = requirement.release
                    WHERE required = ?1)",
        )?
        .execute(params![digest, newest])?;
    if gone > 0 {
        connection
            .prepare_cached("DELETE FROM outbox_release WHERE digest = ?1")?
            .execute([digest])?;
    }
    Ok(gone > 0)
}
