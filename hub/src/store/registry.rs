//! The registry's own rows: manifests by repository, blobs that pushes count on, and uploads under way.
//!
//! Tags are rows of [`super::image`]. Blobs themselves are files of the image directory, shared by all repositories.

use std::collections::{BTreeMap, BTreeSet};

use foreshore_protocol::Digest;
use rusqlite::{Connection, OptionalExtension as _, Row, params};

use super::column;

/// A manifest or index that can be pulled from a repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// In which.
    pub repository: String,
    /// Of its bytes.
    pub digest: Digest,
    /// What it is served as.
    pub media_type: String,
    /// Of its bytes.
    pub size_bytes: u64,
    /// The manifest that it is about (OCI image specification, "subject").
    pub subject: Option<Digest>,
    /// What it says it is, or its config's media type.
    pub artifact_type: Option<String>,
    /// As it has them.
    pub annotations: BTreeMap<String, String>,
    /// Until then it stays although nothing reaches it, in milliseconds since 1970.
    pub keep_until_ms: u64,
}

const COLUMNS: &str = "repository, digest, media_type, size_bytes, subject, artifact_type, annotations, keep_until_ms";

/// Writes a manifest; of one that is there only the time until which it stays changes, and only to later.
///
/// # Errors
///
/// When SQLite fails.
pub fn put_manifest(connection: &Connection, manifest: &Manifest) -> rusqlite::Result<()> {
    connection
        .prepare_cached(&format!(
            "INSERT INTO manifest ({COLUMNS}) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)
             ON CONFLICT DO UPDATE SET keep_until_ms = max(keep_until_ms, excluded.keep_until_ms)"
        ))?
        .execute(params![
            manifest.repository,
            manifest.digest.to_string(),
            manifest.media_type,
            manifest.size_bytes,
            manifest.subject.map(|digest| digest.to_string()),
            manifest.artifact_type,
            column::to_json(&manifest.annotations)?,
            manifest.keep_until_ms,
        ])?;
    Ok(())
}

/// From now on the manifest stays only as long as something reaches it.
///
/// # Errors
///
/// When SQLite fails.
pub fn settle(connection: &Connection, repository: &str, digest: &Digest) -> rusqlite::Result<()> {
    connection
        .prepare_cached(
            "UPDATE manifest SET keep_until_ms = 0 WHERE repository = ?1 AND digest = ?2",
        )?
        .execute(params![repository, digest.to_string()])?;
    Ok(())
}

/// The manifest of that digest in a repository.
///
/// # Errors
///
/// When SQLite fails.
pub fn manifest(
    connection: &Connection,
    repository: &str,
    digest: &Digest,
) -> rusqlite::Result<Option<Manifest>> {
    connection
        .prepare_cached(&format!(
            "SELECT {COLUMNS} FROM manifest WHERE repository = ?1 AND digest = ?2"
        ))?
        .query_row(params![repository, digest.to_string()], read)
        .optional()
}

/// Every manifest of every repository, or of one.
///
/// # Errors
///
/// When SQLite fails.
pub fn manifests(
    connection: &Connection,
    repository: Option<&str>,
) -> rusqlite::Result<Vec<Manifest>> {
    connection
        .prepare_cached(&format!(
            "SELECT {COLUMNS} FROM manifest WHERE ?1 IS NULL OR repository = ?1"
        ))?
        .query_map([repository], read)?
        .collect()
}

/// Forgets a manifest of a repository; whether there was one.
///
/// # Errors
///
/// When SQLite fails.
pub fn delete_manifest(
    connection: &Connection,
    repository: &str,
    digest: &Digest,
) -> rusqlite::Result<bool> {
    let gone = connection
        .prepare_cached("DELETE FROM manifest WHERE repository = ?1 AND digest = ?2")?
        .execute(params![repository, digest.to_string()])?;
    Ok(gone > 0)
}

/// The manifests about `subject` with a digest after `after`, at most `limit`, by digest.
///
/// # Errors
///
/// When SQLite fails.
pub fn referrers(
    connection: &Connection,
    repository: &str,
    subject: &Digest,
    artifact_type: Option<&str>,
    after: &str,
    limit: u64,
) -> rusqlite::Result<Vec<Manifest>> {
    connection
        .prepare_cached(&format!(
            "SELECT {COLUMNS} FROM manifest
             WHERE repository = ?1 AND subject = ?2 AND (?3 IS NULL OR artifact_type = ?3) AND digest > ?4
             ORDER BY digest LIMIT ?5"
        ))?
        .query_map(
            params![repository, subject.to_string(), artifact_type, after, limit],
            read,
        )?
        .collect()
}

/// The repositories after `after` in byte order, at most `limit`.
///
/// # Errors
///
/// When SQLite fails.
pub fn repositories(
    connection: &Connection,
    after: &str,
    limit: u64,
) -> rusqlite::Result<Vec<String>> {
    connection
        .prepare_cached(
            "SELECT DISTINCT repository FROM manifest WHERE repository > ?1 ORDER BY repository LIMIT ?2",
        )?
        .query_map(params![after, limit], |row| row.get(0))?
        .collect()
}

/// Whether a repository has any manifest.
///
/// # Errors
///
/// When SQLite fails.
pub fn is_repository(connection: &Connection, repository: &str) -> rusqlite::Result<bool> {
    connection
        .prepare_cached("SELECT 1 FROM manifest WHERE repository = ?1 LIMIT 1")?
        .exists([repository])
}

/// Somebody counts on a blob for a repository, now.
///
/// # Errors
///
/// When SQLite fails.
pub fn lease(
    connection: &Connection,
    repository: &str,
    digest: &Digest,
    now_ms: u64,
) -> rusqlite::Result<()> {
    connection
        .prepare_cached(
            "INSERT INTO blob_lease (repository, digest, used_ms) VALUES (?1, ?2, ?3)
             ON CONFLICT DO UPDATE SET used_ms = max(used_ms, excluded.used_ms)",
        )?
        .execute(params![repository, digest.to_string(), now_ms])?;
    Ok(())
}

/// When somebody last counted on a blob for a repository; 0 when it was withdrawn from it.
///
/// # Errors
///
/// When SQLite fails.
pub fn leased_ms(
    connection: &Connection,
    repository: &str,
    digest: &Digest,
) -> rusqlite::Result<Option<u64>> {
    connection
        .prepare_cached("SELECT used_ms FROM blob_lease WHERE repository = ?1 AND digest = ?2")?
        .query_row(params![repository, digest.to_string()], |row| row.get(0))
        .optional()
}

/// All that a repository counts on, it does from now: a push into it goes on.
///
/// # Errors
///
/// When SQLite fails.
pub fn renew_leases(
    connection: &Connection,
    repository: &str,
    now_ms: u64,
) -> rusqlite::Result<()> {
    connection
        .prepare_cached("UPDATE blob_lease SET used_ms = max(used_ms, ?2) WHERE repository = ?1 AND used_ms > 0")?
        .execute(params![repository, now_ms])?;
    Ok(())
}

/// The blob was removed from this repository, and is not there for it until it is pushed or mounted again; whether
/// somebody counts on it for another. Written as a lease from the year 1970.
///
/// # Errors
///
/// When SQLite fails.
pub fn withdraw(
    connection: &Connection,
    repository: &str,
    digest: &Digest,
) -> rusqlite::Result<bool> {
    let digest = digest.to_string();
    connection.execute(
        "INSERT OR REPLACE INTO blob_lease (repository, digest, used_ms) VALUES (?1, ?2, 0)",
        params![repository, digest],
    )?;
    connection
        .prepare_cached("SELECT 1 FROM blob_lease WHERE digest = ?1 AND used_ms > 0 LIMIT 1")?
        .exists([digest])
}

/// The blob is there for this repository again, if it was withdrawn: a manifest names it.
///
/// # Errors
///
/// When SQLite fails.
pub fn restore(connection: &Connection, repository: &str, digest: &Digest) -> rusqlite::Result<()> {
    connection
        .prepare_cached(
            "DELETE FROM blob_lease WHERE repository = ?1 AND digest = ?2 AND used_ms = 0",
        )?
        .execute(params![repository, digest.to_string()])?;
    Ok(())
}

/// The blobs that were withdrawn from repositories.
///
/// # Errors
///
/// When SQLite fails.
pub fn withdrawn(connection: &Connection) -> rusqlite::Result<Vec<(String, Digest)>> {
    connection
        .prepare_cached("SELECT repository, digest FROM blob_lease WHERE used_ms = 0")?
        .query_map([], |row| Ok((row.get(0)?, column::parsed(row, 1)?)))?
        .collect()
}

/// Forgets leases from before `before_ms`, but not of repositories with an upload under way; how many.
///
/// # Errors
///
/// When SQLite fails.
pub fn expire_leases(connection: &Connection, before_ms: u64) -> rusqlite::Result<usize> {
    connection.execute(
        "DELETE FROM blob_lease WHERE used_ms < ?1 AND used_ms > 0 AND repository NOT IN (SELECT repository FROM upload)",
        [before_ms],
    )
}

/// Every blob that somebody counts on.
///
/// # Errors
///
/// When SQLite fails.
pub fn leased(connection: &Connection) -> rusqlite::Result<BTreeSet<Digest>> {
    connection
        .prepare_cached("SELECT DISTINCT digest FROM blob_lease WHERE used_ms > 0")?
        .query_map([], |row| column::parsed(row, 0))?
        .collect()
}

/// Begins an upload, unless there are `max` already; whether it did.
///
/// # Errors
///
/// When SQLite fails.
pub fn begin_upload(
    connection: &Connection,
    id: &str,
    repository: &str,
    now_ms: u64,
    max: u64,
) -> rusqlite::Result<bool> {
    let begun = connection
        .prepare_cached(
            "INSERT INTO upload (id, repository, touched_ms)
             SELECT ?1, ?2, ?3 WHERE (SELECT count(*) FROM upload) < ?4",
        )?
        .execute(params![id, repository, now_ms, max])?;
    Ok(begun > 0)
}

/// The repository of an upload.
///
/// # Errors
///
/// When SQLite fails.
pub fn upload(connection: &Connection, id: &str) -> rusqlite::Result<Option<String>> {
    connection
        .prepare_cached("SELECT repository FROM upload WHERE id = ?1")?
        .query_row([id], |row| row.get(0))
        .optional()
}

/// Something came for an upload.
///
/// # Errors
///
/// When SQLite fails.
pub fn touch_upload(connection: &Connection, id: &str, now_ms: u64) -> rusqlite::Result<()> {
    connection
        .prepare_cached("UPDATE upload SET touched_ms = max(touched_ms, ?2) WHERE id = ?1")?
        .execute(params![id, now_ms])?;
    Ok(())
}

/// Ends an upload; whether there was one.
///
/// # Errors
///
/// When SQLite fails.
pub fn end_upload(connection: &Connection, id: &str) -> rusqlite::Result<bool> {
    let gone = connection
        .prepare_cached("DELETE FROM upload WHERE id = ?1")?
        .execute([id])?;
    Ok(gone > 0)
}

/// The uploads for which nothing came since `before_ms`.
///
/// # Errors
///
/// When SQLite fails.
pub fn expired_uploads(connection: &Connection, before_ms: u64) -> rusqlite::Result<Vec<String>> {
    connection
        .prepare_cached("SELECT id FROM upload WHERE touched_ms < ?1")?
        .query_map([before_ms], |row| row.get(0))?
        .collect()
}

/// The ids of all uploads.
///
/// # Errors
///
/// When SQLite fails.
pub fn uploads(connection: &Connection) -> rusqlite::Result<BTreeSet<String>> {
    connection
        .prepare_cached("SELECT id FROM upload")?
        .query_map([], |row| row.get(0))?
        .collect()
}

fn read(row: &Row<'_>) -> rusqlite::Result<Manifest> {
    Ok(Manifest {
        repository: row.get(0)?,
        digest: column::parsed(row, 1)?,
        media_type: row.get(2)?,
        size_bytes: row.get(3)?,
        subject: column::parsed_option(row, 4)?,
        artifact_type: row.get(5)?,
        annotations: column::json(row, 6)?,
        keep_until_ms: row.get(7)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::tests::memory;

    #[test]
    fn leases_of_a_repository_last_while_an_upload_into_it_is_under_way() {
        let connection = memory();
        let (first, second) = (Digest::of(b"1"), Digest::of(b"2"));
        assert!(begin_upload(&connection, "u", "a", 10, 1).unwrap());
        assert!(
            !begin_upload(&connection, "v", "a", 10, 1).unwrap(),
            "one at most"
        );
        lease(&connection, "a", &first, 10).unwrap();
        lease(&connection, "b", &second, 10).unwrap();
        assert_eq!(expire_leases(&connection, 11).unwrap(), 1);
        assert_eq!(leased(&connection).unwrap(), BTreeSet::from([first]));
        assert_eq!(expired_uploads(&connection, 11).unwrap(), ["u"]);
        assert!(end_upload(&connection, "u").unwrap());
        assert_eq!(expire_leases(&connection, 11).unwrap(), 1);
    }

    #[test]
    fn what_is_withdrawn_stays_so_until_it_is_asked_for_again() {
        let connection = memory();
        let digest = Digest::of(b"1");
        let leased = || leased_ms(&connection, "a", &digest).unwrap();
        lease(&connection, "a", &digest, 10).unwrap();
        lease(&connection, "b", &digest, 10).unwrap();
        assert!(
            withdraw(&connection, "a", &digest).unwrap(),
            "b counts on it"
        );
        renew_leases(&connection, "a", 20).unwrap();
        expire_leases(&connection, 5).unwrap();
        assert_eq!(leased(), Some(0));
        assert_eq!(withdrawn(&connection).unwrap(), [("a".to_owned(), digest)]);
        assert!(!withdraw(&connection, "b", &digest).unwrap());
        assert!(super::leased(&connection).unwrap().is_empty());
        lease(&connection, "a", &digest, 30).unwrap();
        assert_eq!(leased(), Some(30));
        restore(&connection, "b", &digest).unwrap();
        assert!(withdrawn(&connection).unwrap().is_empty());
    }

    #[test]
    fn a_manifest_that_comes_again_stays_no_shorter() {
        let connection = memory();
        let mut row = Manifest {
            repository: "a".to_owned(),
            digest: Digest::of(b"1"),
            media_type: "m".to_owned(),
            size_bytes: 1,
            subject: Some(Digest::of(b"2")),
            artifact_type: Some("t".to_owned()),
            annotations: BTreeMap::new(),
            keep_until_ms: 5,
        };
        put_manifest(&connection, &row).unwrap();
        row.keep_until_ms = 3;
        put_manifest(&connection, &row).unwrap();
        let kept = manifest(&connection, "a", &row.digest).unwrap().unwrap();
        assert_eq!(kept.keep_until_ms, 5);
        settle(&connection, "a", &row.digest).unwrap();
        let subject = Digest::of(b"2");
        let about = |kind| referrers(&connection, "a", &subject, kind, "", 10).unwrap();
        assert_eq!(about(None).len(), 1);
        assert_eq!(about(Some("t"))[0].keep_until_ms, 0);
        assert!(about(Some("other")).is_empty());
    }
}
