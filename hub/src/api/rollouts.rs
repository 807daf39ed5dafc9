//! `/rollouts`: list, watch, pause, resume, approve, retry, abort.

use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use foreshore_protocol::api::{
    AnalysisView, AssignmentView, List, RolloutView, TailView, WaveView,
};
use rusqlite::Connection;
use serde::Deserialize;
use tokio::time::Instant;

use super::apps::app_name;
use super::devices::device_id;
use super::{Api, Failure, Hub, Segment};
use crate::controller::ControlError;
use crate::controller::rollouts::{self, Command};
use crate::rollout::budget::Tally;
use crate::rollout::{Approval, Rollout, Wave};
use crate::store;

/// Rollouts in one answer unless asked otherwise, and at most.
const LIMIT_DEFAULT: u64 = 20;
const LIMIT_MAX: u64 = 100;

/// The query of [`list`].
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Filter {
    /// Only this app's.
    app: Option<String>,
    /// At most so many.
    limit: Option<u64>,
}

/// `GET /rollouts?app=&limit=`, newest first. Only the first has its devices: a hundred rollouts of a large fleet
/// would not fit into a small hub's memory, so each of the others is loaded, counted and dropped before the next.
///
/// # Errors
///
/// When the query is not understood, or the store fails.
pub async fn list(
    State(api): Hub,
    filter: Result<Query<Filter>, QueryRejection>,
) -> Result<Json<List<RolloutView>>, Failure> {
    let Query(filter) = filter?;
    let app = filter.app.as_deref().map(app_name).transpose()?;
    let limit = filter.limit.unwrap_or(LIMIT_DEFAULT).min(LIMIT_MAX);
    let read = move |connection: &Connection| {
        let mut views = Vec::new();
        for id in store::rollout::newest_ids(connection, app.as_ref(), limit)? {
            if let Some(rollout) = store::rollout::get(connection, id)? {
                let devices = if views.is_empty() {
                    Devices::Listed
                } else {
                    Devices::Counted
                };
                views.push(render(&rollout, devices));
            }
        }
        Ok::<_, store::StoreError>(views)
    };
    let mut items = api.controller.store().read(read).await?;
    for view in &mut items {
        show_pulls(&api, view);
    }
    Ok(Json(List { items }))
}

fn rollout_id(text: &str) -> Result<u64, Failure> {
    let id = text
        .parse::<u64>()
        .ok()
        .filter(|id| i64::try_from(*id).is_ok());
    id.ok_or_else(|| Failure::bad_request(format!("{text:?} is not a rollout's number")))
}

/// `GET /rollouts/{id}`.
///
/// # Errors
///
/// When there is none, or the store fails.
pub async fn get(State(api): Hub, Segment(id): Segment) -> Result<Json<RolloutView>, Failure> {
    view(&api, rollout_id(&id)?).await
}

async fn view(api: &Api, id: u64) -> Result<Json<RolloutView>, Failure> {
    let read = move |connection: &Connection| {
        let rollout =
            store::rollout::get(connection, id)?.ok_or(ControlError::UnknownRollout(id))?;
        Ok::<_, ControlError>(render(&rollout, Devices::Listed))
    };
    let mut view = api.controller.store().read(read).await?;
    show_pulls(api, &mut view);
    Ok(Json(view))
}

fn show_pulls(api: &Api, view: &mut RolloutView) {
    let now = Instant::now();
    for part in &mut view.assignments {
        part.pull = api.pulls.of_release(&part.device, view.to, now);
    }
}

async fn command(api: &Api, id: &str, command: Command) -> Result<Json<RolloutView>, Failure> {
    let id = rollout_id(id)?;
    api.controller
        .change(move |change| rollouts::command(change, id, command))
        .await?;
    view(api, id).await
}

/// `POST /rollouts/{id}/pause`.
///
/// # Errors
///
/// When there is none, its state does not allow it, or the store fails.
pub async fn pause(State(api): Hub, Segment(id): Segment) -> Result<Json<RolloutView>, Failure> {
    command(&api, &id, Command::Pause).await
}

/// `POST /rollouts/{id}/resume`.
///
/// # Errors
///
/// When there is none, its state does not allow it, or the store fails.
pub async fn resume(State(api): Hub, Segment(id): Segment) -> Result<Json<RolloutView>, Failure> {
    command(&api, &id, Command::Resume).await
}

/// `POST /rollouts/{id}/abort`.
///
/// # Errors
///
/// When there is none, its state does not allow it, or the store fails.
pub async fn abort(State(api): Hub, Segment(id): Segment) -> Result<Json<RolloutView>, Failure> {
    command(&api, &id, Command::Abort).await
}

/// `POST /rollouts/{id}/approve`: the wave that waits for it goes by.
///
/// # Errors
///
/// When there is none, no wave of it waits, or the store fails.
pub async fn approve(State(api): Hub, Segment(id): Segment) -> Result<Json<RolloutView>, Failure> {
    command(&api, &id, Command::Approve).await
}

/// The query of [`retry`].
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Which {
    /// Only this device.
    device: Option<String>,
}

/// `POST /rollouts/{id}/retry?device=`: failed devices are tried again.
///
/// # Errors
///
/// When there is none, its state does not allow it, no such device failed, or the store fails.
pub async fn retry(
    State(api): Hub,
    Segment(id): Segment,
    which: Result<Query<Which>, QueryRejection>,
) -> Result<Json<RolloutView>, Failure> {
    let Query(which) = which?;
    let device = which.device.as_deref().map(device_id).transpose()?;
    command(&api, &id, Command::Retry(device)).await
}

/// `POST /rollouts/{id}/override-locks`: devices switch although the app holds its update lock there.
///
/// # Errors
///
/// When there is none, it has ended, or the store fails.
pub async fn override_locks(
    State(api): Hub,
    Segment(id): Segment,
) -> Result<Json<RolloutView>, Failure> {
    let id = rollout_id(&id)?;
    api.controller
        .change(move |change| rollouts::override_locks(change, id))
        .await?;
    view(&api, id).await
}

/// `POST /rollouts/{id}/override-windows`: devices begin at any time although the rollout has windows.
///
/// # Errors
///
/// When there is none, it has ended, it has no windows, or the store fails.
pub async fn override_windows(
    State(api): Hub,
    Segment(id): Segment,
) -> Result<Json<RolloutView>, Failure> {
    let id = rollout_id(&id)?;
    api.controller
        .change(move |change| rollouts::override_windows(change, id))
        .await?;
    view(&api, id).await
}

/// How much of a rollout's devices is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Devices {
    /// Each of them.
    Listed,
    /// Only their numbers, wave by wave.
    Counted,
}

/// Those that come after the last wave; `None`: there are none.
fn tail(rollout: &Rollout) -> Option<TailView> {
    let tally = Tally::of_tail(rollout);
    (tally.devices > 0).then(|| TailView {
        devices: u64::from(tally.devices),
        succeeded: u64::from(tally.succeeded),
        failed: u64::from(tally.failed),
        deferred: u64::from(tally.deferred),
        stopped: rollout.tail_stopped.is_some(),
    })
}

fn analysis(rollout: &Rollout, wave: &Wave) -> Vec<AnalysisView> {
    let gates = rollout.policy.analysis.iter().zip(&wave.analysis);
    gates
        .map(|(gate, said)| AnalysisView {
            name: gate.name.clone(),
            passed: said.passed,
            failed: said.failed,
            inconclusive: said.inconclusive,
            message: said.message.clone(),
        })
        .collect()
}

fn render(rollout: &Rollout, devices: Devices) -> RolloutView {
    let waves = rollout.waves.iter().zip(1_u32..).map(|(wave, ordinal)| {
        let tally = Tally::of_wave(rollout, ordinal);
        WaveView {
            ordinal,
            target: wave.target.clone(),
            state: wave.state,
            devices: u64::from(wave.size),
            succeeded: u64::from(tally.succeeded),
            failed: u64::from(tally.failed),
            deferred: u64::from(tally.deferred),
            bake_until_ms: rollout.bake_until(wave).map(|at| at.0),
            needs_approval: wave.approval == Approval::Needed,
            analysis: analysis(rollout, wave),
        }
    });
    let mut assignments: Vec<_> = match devices {
        Devices::Listed => rollout.assignments.iter().collect(),
        Devices::Counted => Vec::new(),
    };
    assignments.sort_by_key(|(_, assignment)| (assignment.wave, assignment.rank));
    RolloutView {
        id: rollout.id,
        app: rollout.app.clone(),
        from: rollout.from,
        to: rollout.to,
        state: rollout.state,
        message: rollout
            .message
            .clone()
            .or_else(|| rollout.tail_stopped.clone()),
        start_at_ms: rollout.policy.start_at.map(|at| at.0),
        tail: tail(rollout),
        waves: waves.collect(),
        assignments: assignments
            .into_iter()
            .map(|(device, assignment)| AssignmentView {
                device: device.clone(),
                wave: assignment.wave,
                tail: assignment.tail,
                state: assignment.state,
                via: assignment.via,
                message: assignment.message.clone(),
                pull: None,
            })
            .collect(),
        created_ms: rollout.created.0,
        finished_ms: rollout.finished.map(|at| at.0),
    }
}
