//! What operators do to disruption budgets, and which devices they hold for.
//!
//! A device learns from its head whether it is under a budget. So a budget holds for whatever begins after the device
//! has read that; what it began before counts as unavailable by its report.

use foreshore_protocol::DeviceId;
use foreshore_protocol::api::{ApplyOutcome, BudgetAnswer, BudgetView, GroupView};
use foreshore_protocol::id::{BudgetName, Labels};
use foreshore_protocol::manifest::DisruptionBudget;
use rusqlite::Connection;

use super::{Change, ControlError, leases};
use crate::rollout::UnixMs;
use crate::store::{self, disruption_budget::BudgetRow};

/// Budgets of one hub. Each is looked at whenever a device or its labels change.
pub const MAX_BUDGETS: usize = 64;

/// Makes `manifest` the budget of its name. The same again changes nothing.
///
/// # Errors
///
/// When there are too many budgets, or the store fails.
pub fn apply(
    change: &mut Change<'_>,
    manifest: &DisruptionBudget,
) -> Result<BudgetAnswer, ControlError> {
    let name = &manifest.metadata.name;
    let existing = store::disruption_budget::get(change.connection, name)?;
    let outcome = match &existing {
        None => ApplyOutcome::Created,
        Some(row) if row.manifest == *manifest => ApplyOutcome::Unchanged,
        Some(_) => ApplyOutcome::Updated,
    };
    if existing.is_none() && store::disruption_budget::list(change.connection)?.len() >= MAX_BUDGETS
    {
        return Err(ControlError::TooManyBudgets);
    }
    if outcome != ApplyOutcome::Unchanged {
        let row = BudgetRow {
            manifest: manifest.clone(),
            created: existing.map_or(change.now, |row| row.created),
            updated: change.now,
        };
        store::disruption_budget::put(change.connection, &row)?;
        for (device, labels) in store::device::all_labels(change.connection)? {
            set(change, &row, &device, &labels)?;
        }
        let kind = match outcome {
            ApplyOutcome::Created => "budget-created",
            _ => "budget-updated",
        };
        change.event(kind).record(name.as_str())?;
        leases::look_again(change)?;
    }
    let groups = store::disruption_budget::groups(change.connection, name)?;
    Ok(BudgetAnswer {
        budget: name.clone(),
        outcome,
        devices: groups.iter().map(|(_, devices)| count(*devices)).sum(),
        groups: count(groups.len()),
    })
}

/// Removes a budget.
///
/// # Errors
///
/// When there is none, or the store fails.
pub fn delete(change: &mut Change<'_>, name: &BudgetName) -> Result<(), ControlError> {
    if store::disruption_budget::get(change.connection, name)?.is_none() {
        return Err(ControlError::UnknownBudget(name.clone()));
    }
    let members = store::disruption_budget::members(change.connection, name)?;
    store::disruption_budget::delete(change.connection, name)?;
    for device in members {
        tell(change, &device)?;
    }
    change.event("budget-deleted").record(name.as_str())?;
    Ok(leases::look_again(change)?)
}

/// Brings the budgets of a device in step with its labels.
///
/// # Errors
///
/// When the store fails.
pub fn refresh_device(
    change: &mut Change<'_>,
    device: &DeviceId,
    labels: &Labels,
) -> rusqlite::Result<()> {
    for budget in store::disruption_budget::list(change.connection)? {
        set(change, &budget, device, labels)?;
    }
    Ok(())
}

fn set(
    change: &mut Change<'_>,
    budget: &BudgetRow,
    device: &DeviceId,
    labels: &Labels,
) -> rusqlite::Result<()> {
    let group = budget.manifest.group_of(labels);
    let changed = store::disruption_budget::set_member(
        change.connection,
        budget.name(),
        device,
        group.as_ref(),
    )?;
    if changed {
        tell(change, device)?;
        leases::look_again(change)?;
    }
    Ok(())
}

/// Sends a device its head anew, if it has one.
fn tell(change: &mut Change<'_>, device: &DeviceId) -> rusqlite::Result<()> {
    let link = store::device::link(change.connection, device)?;
    if link.is_some_and(|link| link.desired.is_some()) {
        store::desired::bump(change.connection, device)?;
        change.effects.publish = true;
    }
    Ok(())
}

/// Every budget as the API shows it, by name, without its groups.
///
/// # Errors
///
/// When the store fails.
pub fn views(connection: &Connection, now: UnixMs) -> Result<Vec<BudgetView>, ControlError> {
    let rows = store::disruption_budget::list(connection)?.into_iter();
    rows.map(|row| {
        let view = render(connection, row, now)?;
        Ok(BudgetView {
            groups: Vec::new(),
            ..view
        })
    })
    .collect()
}

/// One of them, with its groups.
///
/// # Errors
///
/// When there is none, or the store fails.
pub fn view(
    connection: &Connection,
    name: BudgetName,
    now: UnixMs,
) -> Result<BudgetView, ControlError> {
    let row = store::disruption_budget::get(connection, &name)?
        .ok_or(ControlError::UnknownBudget(name))?;
    Ok(render(connection, row, now)?)
}

fn render(connection: &Connection, row: BudgetRow, now: UnixMs) -> rusqlite::Result<BudgetView> {
    let mut groups = Vec::new();
    for standing in leases::standing(connection, row.name(), now)? {
        groups.push(GroupView {
            group: store::column::from_json(&standing.group)?,
            devices: count(standing.devices),
            max_unavailable: count(standing.limit.max),
            unavailable: standing.limit.unavailable.into_iter().collect(),
            waiting: standing.waiting,
        });
    }
    Ok(BudgetView {
        name: row.name().clone(),
        devices: groups.iter().map(|group| group.devices).sum(),
        unavailable: groups
            .iter()
            .map(|group| count(group.unavailable.len()))
            .sum(),
        waiting: groups.iter().map(|group| group.waiting).sum(),
        created_ms: row.created.0,
        updated_ms: row.updated.0,
        manifest: row.manifest,
        groups,
    })
}

fn count(number: usize) -> u64 {
    u64::try_from(number).unwrap_or(u64::MAX)
}
