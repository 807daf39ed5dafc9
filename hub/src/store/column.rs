//! Between SQL columns and Rust types. Whatever is not what it should be is an error, never a panic.

use std::str::FromStr;

use foreshore_protocol::Version;
use rusqlite::types::{FromSqlError, Type};
use rusqlite::{Row, ToSql};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Why a column does not hold what it should.
fn wrong(index: usize, error: impl std::error::Error + Send + Sync + 'static) -> rusqlite::Error {
    rusqlite::Error::FromSqlConversionFailure(index, Type::Text, Box::new(error))
}

/// Text that parses into `T`.
///
/// # Errors
///
/// When it does not.
pub fn parsed<T>(row: &Row<'_>, index: usize) -> rusqlite::Result<T>
where
    T: FromStr<Err: std::error::Error + Send + Sync + 'static>,
{
    let text = row
        .get_ref(index)?
        .as_str()
        .map_err(|error| wrong(index, error))?;
    text.parse().map_err(|error| wrong(index, error))
}

/// Text that parses into `T`, or NULL.
///
/// # Errors
///
/// When it does not.
pub fn parsed_option<T>(row: &Row<'_>, index: usize) -> rusqlite::Result<Option<T>>
where
    T: FromStr<Err: std::error::Error + Send + Sync + 'static>,
{
    let text = row
        .get_ref(index)?
        .as_str_or_null()
        .map_err(|error: FromSqlError| wrong(index, error))?;
    text.map(|text| text.parse().map_err(|error| wrong(index, error)))
        .transpose()
}

/// JSON text.
///
/// # Errors
///
/// When it is not JSON of a `T`.
pub fn json<T: DeserializeOwned>(row: &Row<'_>, index: usize) -> rusqlite::Result<T> {
    let text = row
        .get_ref(index)?
        .as_str()
        .map_err(|error| wrong(index, error))?;
    serde_json::from_str(text).map_err(|error| wrong(index, error))
}

/// JSON text, or NULL.
///
/// # Errors
///
/// When it is not JSON of a `T`.
pub fn json_option<T: DeserializeOwned>(
    row: &Row<'_>,
    index: usize,
) -> rusqlite::Result<Option<T>> {
    let text = row
        .get_ref(index)?
        .as_str_or_null()
        .map_err(|error| wrong(index, error))?;
    text.map(|text| serde_json::from_str(text).map_err(|error| wrong(index, error)))
        .transpose()
}

/// A version in two columns, `index` and the next; `None` when they are NULL.
///
/// # Errors
///
/// When they are not numbers that a version can have.
pub fn version_option(row: &Row<'_>, index: usize) -> rusqlite::Result<Option<Version>> {
    let (epoch, generation): (Option<u64>, Option<u64>) = (row.get(index)?, row.get(index + 1)?);
    match (epoch, generation) {
        (Some(epoch), Some(generation)) => Version::from_numbers(epoch, generation)
            .map(Some)
            .map_err(|error| wrong(index, error)),
        _ => Ok(None),
    }
}

/// A version in two columns that are not NULL.
///
/// # Errors
///
/// When they are, or are not numbers that a version can have.
pub fn version(row: &Row<'_>, index: usize) -> rusqlite::Result<Version> {
    Version::from_numbers(row.get(index)?, row.get(index + 1)?).map_err(|error| wrong(index, error))
}

/// A value from JSON text that was read before.
///
/// # Errors
///
/// When it is not JSON of a `T`.
pub fn from_json<T: DeserializeOwned>(text: &str) -> rusqlite::Result<T> {
    serde_json::from_str(text).map_err(|error| wrong(0, error))
}

/// JSON text to be written.
///
/// # Errors
///
/// Never for the types of this crate; maps have string keys.
pub fn to_json<T: Serialize>(value: &T) -> rusqlite::Result<impl ToSql + use<T>> {
    serde_json::to_string(value)
        .map_err(|error| rusqlite::Error::ToSqlConversionFailure(Box::new(error)))
}

/// The text of an enum that serializes as a string, such as a state or a phase.
///
/// # Errors
///
/// When it does not.
pub fn to_word<T: Serialize>(value: &T) -> rusqlite::Result<String> {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(word)) => Ok(word),
        Ok(other) => Ok(other.to_string()),
        Err(error) => Err(rusqlite::Error::ToSqlConversionFailure(Box::new(error))),
    }
}
