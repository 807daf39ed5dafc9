//! `/apps`: apply, plan, list, undo, delete.

use std::sync::Arc;

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::http::StatusCode;
use foreshore_protocol::AppName;
use foreshore_protocol::api::{AppView, ApplyAnswer, List, PlanAnswer, RolloutSummary};
use foreshore_protocol::manifest;
use rusqlite::Connection;

use super::{Failure, Hub, Segment};
use crate::controller::apps::{self, Resolved};
use crate::controller::lives::Lives;
use crate::controller::{Change, ControlError, Effects, analysis, preview, secrets};
use crate::store::{self, app::AppRow};

pub(super) fn app_name(text: &str) -> Result<AppName, Failure> {
    text.parse()
        .map_err(|error| Failure::bad_request(format!("app {text:?}: {error}")))
}

/// `GET /apps`.
///
/// # Errors
///
/// When the store fails.
pub async fn list(State(api): Hub) -> Result<Json<List<AppView>>, Failure> {
    let read = |connection: &Connection| {
        let rows = store::app::list(connection)?;
        rows.into_iter()
            .map(|row| view(connection, row))
            .collect::<Result<_, Failure>>()
    };
    Ok(Json(List {
        items: api.controller.store().read(read).await?,
    }))
}

/// `GET /apps/{app}`.
///
/// # Errors
///
/// When there is none, or the store fails.
pub async fn get(State(api): Hub, Segment(app): Segment) -> Result<Json<AppView>, Failure> {
    let name = app_name(&app)?;
    let read = move |connection: &Connection| {
        let row = store::app::get(connection, &name)?.ok_or(ControlError::UnknownApp(name))?;
        view(connection, row)
    };
    Ok(Json(api.controller.store().read(read).await?))
}

fn view(connection: &Connection, row: AppRow) -> Result<AppView, Failure> {
    let name = row.name().clone();
    let (release, newest) = apps::current_release(connection, &name)?.ok_or_else(|| {
        Failure::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "storage-failed",
            "the hub's database failed",
            format!("app {name} has no rollout"),
        )
    })?;
    Ok(AppView {
        release,
        devices: store::app::member_count(connection, &name)?,
        up_to_date: store::app::up_to_date(connection, &name, &release)?,
        rollout: Some(RolloutSummary {
            id: newest.id,
            state: newest.state,
            message: newest.message,
        }),
        created_ms: row.created.0,
        updated_ms: row.updated.0,
        deleting: row.deleting,
        manifest: row.manifest,
        name,
    })
}

/// From a body to a release. Parsing may take a while on a small machine, so it has a thread of its own.
async fn resolve(
    api: &super::Api,
    path: &str,
    body: Result<Bytes, BytesRejection>,
) -> Result<Resolved, Failure> {
    let (path, body) = (app_name(path)?, body?);
    let app = tokio::task::spawn_blocking(move || manifest::parse(&body))
        .await
        .map_err(|_| store::StoreError::Stopped)??;
    if app.metadata.name != path {
        return Err(ControlError::OtherApp {
            path,
            manifest: app.metadata.name,
        }
        .into());
    }
    let (asking, hosts) = (app.clone(), api.analysis_hosts.clone());
    let read = move |connection: &Connection| {
        analysis::check(connection, &asking, &hosts)?;
        secrets::logins(connection, &path, &asking.spec.image_pull_secrets)
    };
    let logins = api.controller.store().read(read).await?;
    Ok(api
        .images
        .resolve(app, logins, api.controller.now())
        .await?)
}

fn draw_seed() -> Result<u64, Failure> {
    getrandom::u64().map_err(|error| {
        Failure::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "internal",
            "the hub failed",
            format!("failed to draw random bytes: {error}"),
        )
    })
}

/// `PUT /apps/{app}`.
///
/// # Errors
///
/// When the manifest is refused, an image cannot be resolved, or the store fails; then nothing changed.
pub async fn apply(
    State(api): Hub,
    Segment(app): Segment,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<ApplyAnswer>, Failure> {
    // What is resolved stays until the release that names it is queued.
    let _hold = api.images.hold().await;
    let resolved = resolve(&api, &app, body).await?;
    let seed = draw_seed()?;
    let answer = api
        .controller
        .change(move |change| apps::apply(change, &resolved, seed))
        .await?;
    tracing::info!(app = %answer.app, release = %answer.release.short(), outcome = ?answer.outcome, rollout = answer.rollout, "applied");
    Ok(Json(answer))
}

/// `POST /apps/{app}/plan`.
///
/// # Errors
///
/// As for [`apply`].
pub async fn plan(
    State(api): Hub,
    Segment(app): Segment,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<PlanAnswer>, Failure> {
    let resolved = Arc::new(resolve(&api, &app, body).await?);
    let seed = draw_seed()?;
    let (now, listening) = (api.controller.now(), api.controller.listening());
    let asking = Arc::clone(&resolved);
    let read = move |connection: &Connection| {
        let change = Change {
            connection,
            now,
            listening,
            lives: &mut Lives::default(),
            effects: Effects::default(),
        };
        let answer = apps::plan(&change, &asking, seed)?;
        let names = &asking.app.spec.image_pull_secrets;
        let logins = secrets::logins(connection, &answer.app, names)?;
        Ok::<_, ControlError>((answer, preview::ahead(connection, &asking)?, logins))
    };
    let (mut answer, ahead, logins) = api.controller.store().read(read).await?;
    let images = api.images.look(ahead.asked.clone(), logins).await?;
    let read =
        move |connection: &Connection| preview::preview(connection, &resolved, ahead, images);
    answer.preview = Some(api.controller.store().read(read).await?);
    Ok(Json(answer))
}

/// `POST /apps/{app}/undo`.
///
/// # Errors
///
/// When there is no such app, nothing to go back to, or the store fails.
pub async fn undo(State(api): Hub, Segment(app): Segment) -> Result<Json<ApplyAnswer>, Failure> {
    let (name, seed) = (app_name(&app)?, draw_seed()?);
    Ok(Json(
        api.controller
            .change(move |change| apps::undo(change, &name, seed))
            .await?,
    ))
}

/// `DELETE /apps/{app}`.
///
/// # Errors
///
/// When there is no such app, or the store fails.
pub async fn delete(State(api): Hub, Segment(app): Segment) -> Result<StatusCode, Failure> {
    let name = app_name(&app)?;
    api.controller
        .change(move |change| apps::delete(change, &name))
        .await?;
    Ok(StatusCode::ACCEPTED)
}
