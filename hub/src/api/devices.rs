//! `/devices`: list, label, trust a key, hold, release, forget.

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::http::StatusCode;
use foreshore_protocol::DeviceId;
use foreshore_protocol::api::{DeviceView, ExplainView, HoldRequest, LabelPatch, List};
use rusqlite::Connection;
use tokio::time::Instant;

use super::{Api, Failure, Hub, Segment};
use crate::controller::{ControlError, apps, explain, secrets};
use crate::store::{self, StoreError};

pub(super) fn device_id(text: &str) -> Result<DeviceId, Failure> {
    text.parse()
        .map_err(|error| Failure::bad_request(format!("device {text:?}: {error}")))
}

/// `GET /devices`.
///
/// # Errors
///
/// When the store fails.
pub async fn list(State(api): Hub) -> Result<Json<List<DeviceView>>, Failure> {
    let read = |connection: &Connection| Ok::<_, StoreError>(store::device::views(connection)?);
    let mut items = api.controller.store().read(read).await?;
    let now = Instant::now();
    for device in &mut items {
        device.pull = api.pulls.of(&device.id, now);
    }
    Ok(Json(List { items }))
}

async fn view(api: &Api, device: DeviceId) -> Result<Json<DeviceView>, Failure> {
    let read = move |connection: &Connection| {
        store::device::view(connection, &device)?.ok_or(ControlError::UnknownDevice(device))
    };
    let mut view = api.controller.store().read(read).await?;
    view.pull = api.pulls.of(&view.id, Instant::now());
    Ok(Json(view))
}

/// `GET /devices/{device}`.
///
/// # Errors
///
/// When there is none, or the store fails.
pub async fn get(State(api): Hub, Segment(device): Segment) -> Result<Json<DeviceView>, Failure> {
    view(&api, device_id(&device)?).await
}

/// `GET /devices/{device}/explain`: why it runs what it runs.
///
/// # Errors
///
/// When there is none, or the store fails.
pub async fn explain(
    State(api): Hub,
    Segment(device): Segment,
) -> Result<Json<ExplainView>, Failure> {
    let id = device_id(&device)?;
    let (now, listening) = (api.controller.now(), api.controller.listening());
    let read = move |connection: &Connection| explain::device(connection, &id, listening, now);
    Ok(Json(api.controller.store().read(read).await?))
}

/// `PATCH /devices/{device}/labels`.
///
/// # Errors
///
/// When the patch is refused, there is no such device, or the store fails.
pub async fn label(
    State(api): Hub,
    Segment(device): Segment,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<DeviceView>, Failure> {
    let id = device_id(&device)?;
    let patch: LabelPatch = serde_json::from_slice(&body?).map_err(|error| {
        Failure::new(
            StatusCode::BAD_REQUEST,
            "bad-label-patch",
            "the label patch was refused",
            format!("{error}; write {{\"labels\": {{\"key\": \"value\", \"other\": null}}}}"),
        )
    })?;
    let device = id.clone();
    api.controller
        .change(move |change| apps::patch_labels(change, &device, &patch))
        .await?;
    view(&api, id).await
}

/// `POST /devices/{device}/trust-key`.
///
/// # Errors
///
/// When there is no such device, it has shown no key, or the store fails.
pub async fn trust_key(
    State(api): Hub,
    Segment(device): Segment,
) -> Result<Json<DeviceView>, Failure> {
    let id = device_id(&device)?;
    let device = id.clone();
    api.controller
        .change(move |change| secrets::trust_key(change, &device))
        .await?;
    view(&api, id).await
}

/// `POST /devices/{device}/hold`: no rollout offers it anything until it is released. The body, if there is one, is a
/// [`HoldRequest`].
///
/// # Errors
///
/// When the body is refused, there is no such device, or the store fails.
pub async fn hold(
    State(api): Hub,
    Segment(device): Segment,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<DeviceView>, Failure> {
    let id = device_id(&device)?;
    let body = body?;
    let request: HoldRequest = if body.is_empty() {
        HoldRequest::default()
    } else {
        serde_json::from_slice(&body).map_err(|error| {
            Failure::bad_request(format!("{error}; write {{\"reason\": \"why\"}}"))
        })?
    };
    let device = id.clone();
    api.controller
        .change(move |change| apps::hold(change, &device, Some(&request.reason)))
        .await?;
    view(&api, id).await
}

/// `POST /devices/{device}/release`: rollouts offer it their releases again.
///
/// # Errors
///
/// When there is no such device, or the store fails.
pub async fn release(
    State(api): Hub,
    Segment(device): Segment,
) -> Result<Json<DeviceView>, Failure> {
    let id = device_id(&device)?;
    let device = id.clone();
    api.controller
        .change(move |change| apps::hold(change, &device, None))
        .await?;
    view(&api, id).await
}

/// `DELETE /devices/{device}`.
///
/// # Errors
///
/// When there is no such device, it is connected, or the store fails.
pub async fn forget(State(api): Hub, Segment(device): Segment) -> Result<StatusCode, Failure> {
    let id = device_id(&device)?;
    api.controller
        .change(move |change| apps::forget(change, &id))
        .await?;
    Ok(StatusCode::NO_CONTENT)
}
