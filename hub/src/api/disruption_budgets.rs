//! `/disruption-budgets`: apply, list, delete.

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::http::StatusCode;
use foreshore_protocol::api::{BudgetAnswer, BudgetView, List};
use foreshore_protocol::id::BudgetName;
use foreshore_protocol::manifest;
use rusqlite::Connection;

use super::{Failure, Hub, Segment};
use crate::controller::{ControlError, disruption_budgets};

fn budget_name(text: &str) -> Result<BudgetName, Failure> {
    text.parse()
        .map_err(|error| Failure::bad_request(format!("disruption budget {text:?}: {error}")))
}

/// `GET /disruption-budgets`.
///
/// # Errors
///
/// When the store fails.
pub async fn list(State(api): Hub) -> Result<Json<List<BudgetView>>, Failure> {
    let now = api.controller.now();
    let read = move |connection: &Connection| disruption_budgets::views(connection, now);
    Ok(Json(List {
        items: api.controller.store().read(read).await?,
    }))
}

/// `GET /disruption-budgets/{budget}`.
///
/// # Errors
///
/// When there is none, or the store fails.
pub async fn get(State(api): Hub, Segment(budget): Segment) -> Result<Json<BudgetView>, Failure> {
    let (name, now) = (budget_name(&budget)?, api.controller.now());
    let read = move |connection: &Connection| disruption_budgets::view(connection, name, now);
    Ok(Json(api.controller.store().read(read).await?))
}

/// `PUT /disruption-budgets/{budget}`.
///
/// # Errors
///
/// When the manifest is refused, there are too many budgets, or the store fails; then nothing changed.
pub async fn apply(
    State(api): Hub,
    Segment(budget): Segment,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<BudgetAnswer>, Failure> {
    let (path, body) = (budget_name(&budget)?, body?);
    let budget = manifest::parse_budget(&body)?;
    if budget.metadata.name != path {
        return Err(ControlError::OtherBudget {
            path,
            manifest: budget.metadata.name,
        }
        .into());
    }
    let answer = api
        .controller
        .change(move |change| disruption_budgets::apply(change, &budget))
        .await?;
    tracing::info!(budget = %answer.budget, outcome = ?answer.outcome, devices = answer.devices, "applied");
    Ok(Json(answer))
}

/// `DELETE /disruption-budgets/{budget}`.
///
/// # Errors
///
/// When there is none, or the store fails.
pub async fn delete(State(api): Hub, Segment(budget): Segment) -> Result<StatusCode, Failure> {
    let name = budget_name(&budget)?;
    api.controller
        .change(move |change| disruption_budgets::delete(change, &name))
        .await?;
    Ok(StatusCode::NO_CONTENT)
}
