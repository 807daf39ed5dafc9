//! `/secrets`: set, list, remove. No answer holds a value.

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::http::StatusCode;
use foreshore_protocol::api::{List, SecretView};
use foreshore_protocol::id::SecretName;
use foreshore_protocol::secret::{MAX_SECRET_BYTES, SecretValue};
use rusqlite::Connection;

use super::{Failure, Hub, Segment};
use crate::controller::{ControlError, secrets};

fn secret_name(text: &str) -> Result<SecretName, Failure> {
    text.parse()
        .map_err(|error| Failure::bad_request(format!("secret {text:?}: {error}")))
}

/// `GET /secrets`.
///
/// # Errors
///
/// When the store fails.
pub async fn list(State(api): Hub) -> Result<Json<List<SecretView>>, Failure> {
    let read = |connection: &Connection| secrets::views(connection);
    Ok(Json(List {
        items: api.controller.store().read(read).await?,
    }))
}

/// `GET /secrets/{secret}`.
///
/// # Errors
///
/// When there is none, or the store fails.
pub async fn get(State(api): Hub, Segment(secret): Segment) -> Result<Json<SecretView>, Failure> {
    let name = secret_name(&secret)?;
    let read = move |connection: &Connection| {
        secrets::view(connection, &name)?.ok_or(ControlError::UnknownSecret(name))
    };
    Ok(Json(api.controller.store().read(read).await?))
}

/// `PUT /secrets/{secret}`.
///
/// # Errors
///
/// When the value is too large, empty, or no text where it must be, or the store fails.
pub async fn set(
    State(api): Hub,
    Segment(secret): Segment,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<SecretView>, Failure> {
    let name = secret_name(&secret)?;
    let too_large = || {
        Failure::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            "secret-too-large",
            "the value is too large",
            format!("a secret has at most {MAX_SECRET_BYTES} bytes"),
        )
    };
    let body = body.map_err(|rejection| match rejection.status() {
        StatusCode::PAYLOAD_TOO_LARGE => too_large(),
        _ => rejection.into(),
    })?;
    if body.is_empty() {
        return Err(Failure::new(
            StatusCode::BAD_REQUEST,
            "empty-secret",
            "the value is empty",
            format!("secret {name} would be empty; send its value as the body"),
        ));
    }
    if body.len() > MAX_SECRET_BYTES {
        return Err(too_large());
    }
    let value = SecretValue::new(body.to_vec());
    let set = move |change: &mut crate::controller::Change<'_>| secrets::set(change, &name, &value);
    let view = api.controller.change(set).await?;
    tracing::info!(secret = %view.name, revision = view.revision, "a secret was set");
    Ok(Json(view))
}

/// `DELETE /secrets/{secret}`.
///
/// # Errors
///
/// When there is none, an app uses it, or the store fails.
pub async fn remove(State(api): Hub, Segment(secret): Segment) -> Result<StatusCode, Failure> {
    let name = secret_name(&secret)?;
    api.controller
        .change(move |change| secrets::remove(change, &name))
        .await?;
    Ok(StatusCode::NO_CONTENT)
}
