//! Images imported into the hub: names for blobs in the image directory.
//!
//! A tag that is imported again moves. What it named before stays in the image directory as long as a release that
//! devices run or go back to names it, by digest.

use foreshore_protocol::api::ImageView;
use rusqlite::{Connection, OptionalExtension as _, Row, params};

use super::column;
use crate::images::HUB_HOST;

/// An imported image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// What the API shows.
    pub view: ImageView,
    /// Of its index or manifest.
    pub media_type: String,
}

const COLUMNS: &str = "reference, digest, media_type, size_bytes, platforms, imported_ms";

/// Writes an image; a tag that exists is moved.
///
/// # Errors
///
/// When SQLite fails.
pub fn put(connection: &Connection, image: &Image) -> rusqlite::Result<()> {
    connection.execute(
        "INSERT OR REPLACE INTO image (reference, digest, media_type, size_bytes, platforms, imported_ms)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
        params![
            image.view.reference,
            image.view.digest.to_string(),
            image.media_type,
            image.view.size_bytes,
            column::to_json(&image.view.platforms)?,
            image.view.imported_ms,
        ],
    )?;
    Ok(())
}

/// Every image, by name.
///
/// # Errors
///
/// When SQLite fails.
pub fn list(connection: &Connection) -> rusqlite::Result<Vec<Image>> {
    connection
        .prepare_cached(&format!("SELECT {COLUMNS} FROM image ORDER BY reference"))?
        .query_map([], read)?
        .collect()
}

/// The image of that name, `hub.internal/NAME:TAG`.
///
/// # Errors
///
/// When SQLite fails.
pub fn by_reference(connection: &Connection, reference: &str) -> rusqlite::Result<Option<Image>> {
    connection
        .prepare_cached(&format!("SELECT {COLUMNS} FROM image WHERE reference = ?1"))?
        .query_row([reference], read)
        .optional()
}

/// The tags of a repository after `after` in byte order, at most `limit`.
///
/// # Errors
///
/// When SQLite fails.
pub fn tags(
    connection: &Connection,
    repository: &str,
    after: &str,
    limit: u64,
) -> rusqlite::Result<Vec<String>> {
    let prefix = format!("{HUB_HOST}/{repository}:");
    // The character after the colon: a tag holds none, so this is behind all of them.
    let end = format!("{HUB_HOST}/{repository};");
    connection
        .prepare_cached(
            "SELECT substr(reference, ?1) FROM image WHERE reference > ?2 AND reference < ?3
             ORDER BY reference LIMIT ?4",
        )?
        .query_map(
            params![prefix.len() + 1, format!("{prefix}{after}"), end, limit],
            |row| row.get(0),
        )?
        .collect()
}

/// Forgets an image; false when there is none of that name.
///
/// # Errors
///
/// When SQLite fails.
pub fn delete(connection: &Connection, reference: &str) -> rusqlite::Result<bool> {
    let gone = connection.execute("DELETE FROM image WHERE reference = ?1", [reference])?;
    Ok(gone > 0)
}

fn read(row: &Row<'_>) -> rusqlite::Result<Image> {
    Ok(Image {
        view: ImageView {
            reference: row.get(0)?,
            digest: column::parsed(row, 1)?,
            size_bytes: row.get(3)?,
            platforms: column::json(row, 4)?,
            imported_ms: row.get(5)?,
        },
        media_type: row.get(2)?,
    })
}
