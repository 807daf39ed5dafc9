//! Disruption budgets, and which devices they hold for in which groups.

use foreshore_protocol::DeviceId;
use foreshore_protocol::id::{BudgetName, Labels};
use foreshore_protocol::manifest::DisruptionBudget;
use foreshore_protocol::message::{BudgetGroup, MAX_BUDGETS};
use rusqlite::{Connection, OptionalExtension as _, Row, params};

use super::column;
use crate::rollout::UnixMs;

/// A budget.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BudgetRow {
    /// The manifest as applied last.
    pub manifest: DisruptionBudget,
    /// When it was made.
    pub created: UnixMs,
    /// When it was last changed.
    pub updated: UnixMs,
}

impl BudgetRow {
    /// Its name.
    #[must_use]
    pub const fn name(&self) -> &BudgetName {
        &self.manifest.metadata.name
    }
}

fn read(row: &Row<'_>) -> rusqlite::Result<BudgetRow> {
    Ok(BudgetRow {
        manifest: column::json(row, 0)?,
        created: UnixMs(row.get(1)?),
        updated: UnixMs(row.get(2)?),
    })
}

/// The budget of that name.
///
/// # Errors
///
/// When SQLite fails.
pub fn get(connection: &Connection, name: &BudgetName) -> rusqlite::Result<Option<BudgetRow>> {
    connection
        .prepare_cached(
            "SELECT manifest, created_ms, updated_ms FROM disruption_budget WHERE name = ?1",
        )?
        .query_row([name.as_str()], read)
        .optional()
}

/// Every budget, by name.
///
/// # Errors
///
/// When SQLite fails.
pub fn list(connection: &Connection) -> rusqlite::Result<Vec<BudgetRow>> {
    connection
        .prepare_cached(
            "SELECT manifest, created_ms, updated_ms FROM disruption_budget ORDER BY name",
        )?
        .query_map([], read)?
        .collect()
}

/// Writes a budget.
///
/// # Errors
///
/// When SQLite fails.
pub fn put(connection: &Connection, budget: &BudgetRow) -> rusqlite::Result<()> {
    connection
        .prepare_cached(
            "INSERT INTO disruption_budget (name, manifest, created_ms, updated_ms) VALUES (?1, ?2, ?3, ?4)
             ON CONFLICT (name) DO UPDATE SET manifest = ?2, updated_ms = ?4",
        )?
        .execute(params![
            budget.name().as_str(),
            column::to_json(&budget.manifest)?,
            budget.created.0,
            budget.updated.0,
        ])?;
    Ok(())
}

/// Removes a budget; it holds for nobody any more.
///
/// # Errors
///
/// When SQLite fails.
pub fn delete(connection: &Connection, name: &BudgetName) -> rusqlite::Result<()> {
    connection.execute(
        "DELETE FROM disruption_budget WHERE name = ?1",
        [name.as_str()],
    )?;
    Ok(())
}

/// Lets a budget hold for a device in a group, or not any more (`None`); whether that changed anything.
///
/// # Errors
///
/// When SQLite fails.
pub fn set_member(
    connection: &Connection,
    budget: &BudgetName,
    device: &DeviceId,
    group: Option<&Labels>,
) -> rusqlite::Result<bool> {
    let changed = match group {
        Some(group) => connection
            .prepare_cached(
                "INSERT INTO budget_member (budget, device, labels) VALUES (?1, ?2, ?3)
                 ON CONFLICT (budget, device) DO UPDATE SET labels = ?3 WHERE labels != ?3",
            )?
            .execute(params![
                budget.as_str(),
                device.as_str(),
                column::to_json(group)?
            ])?,
        None => connection
            .prepare_cached("DELETE FROM budget_member WHERE budget = ?1 AND device = ?2")?
            .execute([budget.as_str(), device.as_str()])?,
    };
    Ok(changed > 0)
}

/// The budgets that hold for a device, with its groups, by name; at most as many as a head has room for.
///
/// # Errors
///
/// When SQLite fails.
pub fn of_device(connection: &Connection, device: &DeviceId) -> rusqlite::Result<Vec<BudgetGroup>> {
    connection
        .prepare_cached(
            "SELECT budget, labels FROM budget_member WHERE device = ?1 ORDER BY budget LIMIT ?2",
        )?
        .query_map(params![device.as_str(), MAX_BUDGETS], |row| {
            Ok(BudgetGroup {
                budget: column::parsed(row, 0)?,
                group: column::json(row, 1)?,
            })
        })?
        .collect()
}

/// The devices that a budget holds for, by id.
///
/// # Errors
///
/// When SQLite fails.
pub fn members(connection: &Connection, name: &BudgetName) -> rusqlite::Result<Vec<DeviceId>> {
    connection
        .prepare_cached("SELECT device FROM budget_member WHERE budget = ?1 ORDER BY device")?
        .query_map([name.as_str()], |row| column::parsed(row, 0))?
        .collect()
}

/// The groups of a budget as they are written, with how many devices each has.
///
/// # Errors
///
/// When SQLite fails.
pub fn groups(
    connection: &Connection,
    name: &BudgetName,
) -> rusqlite::Result<Vec<(String, usize)>> {
    connection
        .prepare_cached(
            "SELECT labels, count(*) FROM budget_member WHERE budget = ?1 GROUP BY labels ORDER BY labels",
        )?
        .query_map([name.as_str()], |row| Ok((row.get(0)?, row.get(1)?)))?
        .collect()
}

/// The devices of a budget that are not connected, with their groups as they are written.
///
/// # Errors
///
/// When SQLite fails.
pub fn offline(
    connection: &Connection,
    name: &BudgetName,
) -> rusqlite::Result<Vec<(String, DeviceId)>> {
    connection
        .prepare_cached(
            "SELECT labels, device FROM budget_member JOIN device ON device.id = device
             WHERE budget = ?1 AND NOT online",
        )?
        .query_map([name.as_str()], |row| {
            Ok((row.get(0)?, column::parsed(row, 1)?))
        })?
        .collect()
}

/// The budgets and groups, as they are written, of a device.
///
/// # Errors
///
/// When SQLite fails.
pub fn bounds_of(
    connection: &Connection,
    device: &DeviceId,
) -> rusqlite::Result<Vec<(BudgetName, String)>> {
    connection
        .prepare_cached("SELECT budget, labels FROM budget_member WHERE device = ?1")?
        .query_map([device.as_str()], |row| {
            Ok((column::parsed(row, 0)?, row.get(1)?))
        })?
        .collect()
}
