//! `/leases`: who may switch and who waits for it; write devices off.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use foreshore_protocol::api::{LeaseView, List};
use rusqlite::Connection;

use super::devices::device_id;
use super::{Failure, Hub, Segment};
use crate::controller::leases;
use crate::store::StoreError;

/// `GET /leases`.
///
/// # Errors
///
/// When the store fails.
pub async fn list(State(api): Hub) -> Result<Json<List<LeaseView>>, Failure> {
    let now = api.controller.now();
    let read = move |connection: &Connection| Ok::<_, StoreError>(leases::views(connection, now)?);
    Ok(Json(List {
        items: api.controller.store().read(read).await?,
    }))
}

/// `DELETE /leases/{device}`.
///
/// # Errors
///
/// When there is no such device, it holds no slot, or the store fails.
pub async fn release(State(api): Hub, Segment(device): Segment) -> Result<StatusCode, Failure> {
    let device = device_id(&device)?;
    api.controller
        .change(move |change| leases::release(change, &device))
        .await?;
    Ok(StatusCode::NO_CONTENT)
}
