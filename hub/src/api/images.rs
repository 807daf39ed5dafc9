//! `/images`: list, import and remove.

use std::path::PathBuf;
use std::time::Duration;

use axum::Json;
use axum::body::Body;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use foreshore_protocol::api::{ImageView, List};
use futures_util::StreamExt as _;
use rusqlite::Connection;
use serde::Deserialize;
use tempfile::TempPath;
use tokio::io::AsyncWriteExt as _;

use super::{Api, Failure, Hub, Segment};
use crate::controller;
use crate::images::hub_reference;
use crate::store::{self, StoreError};

/// An upload of which nothing came for so long is given up.
const IDLE: Duration = Duration::from_secs(30);

/// `GET /images`.
///
/// # Errors
///
/// When the store fails.
pub async fn list(State(api): Hub) -> Result<Json<List<ImageView>>, Failure> {
    let read = |connection: &Connection| {
        let images = store::image::list(connection)?;
        Ok::<_, StoreError>(images.into_iter().map(|image| image.view).collect())
    };
    Ok(Json(List {
        items: api.controller.store().read(read).await?,
    }))
}

/// The query of [`import`].
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Name {
    /// `NAME:TAG`; without it, the name that the archive gives its image.
    name: Option<String>,
}

/// `POST /images?name=NAME:TAG`.
///
/// # Errors
///
/// When the archive is too large, comes too slowly, is no image, or the disk is full; then nothing was imported.
pub async fn import(
    State(api): Hub,
    name: Result<Query<Name>, QueryRejection>,
    body: Body,
) -> Result<(StatusCode, Json<ImageView>), Failure> {
    let Query(Name { name }) = name?;
    let upload = spool(&api, body).await?;
    let path: PathBuf = upload.to_path_buf();
    let view = api.images.import(path, name, api.controller.now()).await?;
    tracing::info!(image = %view.reference, digest = %view.digest.short(), bytes = view.size_bytes, "imported an image");
    let event = view.clone();
    api.controller
        .change(move |change| {
            Ok(change
                .event("image-imported")
                .record(event.reference.clone())?)
        })
        .await?;
    Ok((StatusCode::CREATED, Json(view)))
}

/// `DELETE /images/NAME:TAG`; the name may hold slashes.
///
/// # Errors
///
/// When there is no such image, an app needs it, or the store fails.
pub async fn remove(State(api): Hub, Segment(image): Segment) -> Result<StatusCode, Failure> {
    let reference = hub_reference(&image)?;
    api.controller
        .change(move |change| controller::images::remove(change, &reference))
        .await?;
    api.images.want_sweep();
    Ok(StatusCode::NO_CONTENT)
}

/// The body as a file, which goes when it is dropped.
async fn spool(api: &Api, body: Body) -> Result<TempPath, Failure> {
    let directory = api.images.uploads().to_owned();
    let file = tokio::task::spawn_blocking(move || tempfile::NamedTempFile::new_in(directory))
        .await
        .map_err(|_| StoreError::Stopped)?
        .map_err(|error| disk(&error))?;
    let (file, path) = file.into_parts();
    let mut file = tokio::io::BufWriter::with_capacity(1 << 20, tokio::fs::File::from_std(file));
    let mut stream = body.into_data_stream();
    let mut size = 0_u64;
    loop {
        let chunk = tokio::time::timeout(IDLE, stream.next())
            .await
            .map_err(|_| {
                Failure::new(
                    StatusCode::REQUEST_TIMEOUT,
                    "upload-stalled",
                    "the upload stalled",
                    format!(
                        "nothing came for {} s after {size} bytes; send it again",
                        IDLE.as_secs()
                    ),
                )
            })?;
        let Some(chunk) = chunk else { break };
        let chunk = chunk.map_err(|error| {
            Failure::bad_request(format!("the upload broke off after {size} bytes: {error}"))
        })?;
        size += chunk.len() as u64;
        if size > api.max_image_bytes {
            return Err(Failure::new(
                StatusCode::PAYLOAD_TOO_LARGE,
                "image-too-large",
                "the archive is too large",
                format!(
                    "at most {} bytes are taken; raise [api] max_image_bytes in hub.toml",
                    api.max_image_bytes
                ),
            ));
        }
        file.write_all(&chunk).await.map_err(|error| disk(&error))?;
    }
    file.flush().await.map_err(|error| disk(&error))?;
    Ok(path)
}

fn disk(error: &std::io::Error) -> Failure {
    if matches!(
        error.kind(),
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded
    ) {
        return StoreError::Full.into();
    }
    Failure::new(
        StatusCode::INTERNAL_SERVER_ERROR,
        "storage-failed",
        "the hub's disk failed",
        format!("failed to spool the upload: {error}"),
    )
}
