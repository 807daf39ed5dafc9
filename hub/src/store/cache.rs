//! What the hub fetched from other registries: tags as they were, and blobs with the time of their last use.
//!
//! A row of a blob says what it is and how large; whether it is there is for the image directory to say.

use foreshore_protocol::Digest;
use rusqlite::{Connection, OptionalExtension as _, Row, params};

use super::column;

/// What a tag named.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tag {
    /// An index or manifest.
    pub digest: Digest,
    /// When its registry last said so, in milliseconds since 1970.
    pub checked_ms: u64,
}

/// A blob that a cached manifest is, or names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blob {
    /// Which.
    pub digest: Digest,
    /// As its descriptor or registry has it.
    pub media_type: String,
    /// As its descriptor has it.
    pub size_bytes: u64,
    /// When somebody last asked for it, or it was first named, in milliseconds since 1970.
    pub used_ms: u64,
}

/// What a tag of `HOST/REPOSITORY` named.
///
/// # Errors
///
/// When SQLite fails.
pub fn tag(connection: &Connection, name: &str, tag: &str) -> rusqlite::Result<Option<Tag>> {
    connection
        .prepare_cached("SELECT digest, checked_ms FROM cached_tag WHERE name = ?1 AND tag = ?2")?
        .query_row([name, tag], |row| {
            Ok(Tag {
                digest: column::parsed(row, 0)?,
                checked_ms: row.get(1)?,
            })
        })
        .optional()
}

/// Notes what a tag names.
///
/// # Errors
///
/// When SQLite fails.
pub fn put_tag(connection: &Connection, name: &str, tag: &str, value: Tag) -> rusqlite::Result<()> {
    connection
        .prepare_cached(
            "INSERT OR REPLACE INTO cached_tag (name, tag, digest, checked_ms) VALUES (?1, ?2, ?3, ?4)",
        )?
        .execute(params![name, tag, value.digest.to_string(), value.checked_ms])?;
    Ok(())
}

/// Forgets a tag.
///
/// # Errors
///
/// When SQLite fails.
pub fn delete_tag(connection: &Connection, name: &str, tag: &str) -> rusqlite::Result<()> {
    connection.execute(
        "DELETE FROM cached_tag WHERE name = ?1 AND tag = ?2",
        [name, tag],
    )?;
    Ok(())
}

/// Notes a blob; of one that is known, nothing changes.
///
/// # Errors
///
/// When SQLite fails.
pub fn note_blob(connection: &Connection, blob: &Blob) -> rusqlite::Result<()> {
    connection
        .prepare_cached(
            "INSERT OR IGNORE INTO cached_blob (digest, media_type, size_bytes, used_ms)
             VALUES (?1, ?2, ?3, ?4)",
        )?
        .execute(params![
            blob.digest.to_string(),
            blob.media_type,
            blob.size_bytes,
            blob.used_ms
        ])?;
    Ok(())
}

/// Somebody uses a blob, now.
///
/// # Errors
///
/// When SQLite fails.
pub fn use_blob(connection: &Connection, digest: &Digest, now_ms: u64) -> rusqlite::Result<()> {
    connection
        .prepare_cached("UPDATE cached_blob SET used_ms = max(used_ms, ?2) WHERE digest = ?1")?
        .execute(params![digest.to_string(), now_ms])?;
    Ok(())
}

/// One blob.
///
/// # Errors
///
/// When SQLite fails.
pub fn blob(connection: &Connection, digest: &Digest) -> rusqlite::Result<Option<Blob>> {
    connection
        .prepare_cached(
            "SELECT digest, media_type, size_bytes, used_ms FROM cached_blob WHERE digest = ?1",
        )?
        .query_row([digest.to_string()], read)
        .optional()
}

/// Every blob, the one first whose use is longest ago.
///
/// # Errors
///
/// When SQLite fails.
pub fn blobs(connection: &Connection) -> rusqlite::Result<Vec<Blob>> {
    connection
        .prepare_cached(
            "SELECT digest, media_type, size_bytes, used_ms FROM cached_blob ORDER BY used_ms, digest",
        )?
        .query_map([], read)?
        .collect()
}

/// Forgets a blob.
///
/// # Errors
///
/// When SQLite fails.
pub fn forget_blob(connection: &Connection, digest: &Digest) -> rusqlite::Result<()> {
    connection
        .prepare_cached("DELETE FROM cached_blob WHERE digest = ?1")?
        .execute([digest.to_string()])?;
    Ok(())
}

fn read(row: &Row<'_>) -> rusqlite::Result<Blob> {
    Ok(Blob {
        digest: column::parsed(row, 0)?,
        media_type: row.get(1)?,
        size_bytes: row.get(2)?,
        used_ms: row.get(3)?,
    })
}
