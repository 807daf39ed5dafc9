//! Why a device runs what it runs: from what was applied, through its rollouts, to what it says itself.

use std::collections::BTreeMap;

use foreshore_protocol::api::{DeviceView, ExplainApp, ExplainStep, ExplainView};
use foreshore_protocol::id::Labels;
use foreshore_protocol::message::AppStatus;
use foreshore_protocol::{AppName, DeviceId};
use rusqlite::Connection;

use super::rollouts::OFFERS_AT_ONCE;
use super::{ControlError, Listening};
use crate::rollout::{Fleet, UnixMs, explain};
use crate::store::{self, app::AppRow};

/// Every link from what was applied to what the device does.
///
/// # Errors
///
/// When there is no such device, or the store fails.
pub fn device(
    connection: &Connection,
    device: &DeviceId,
    listening: Listening,
    now: UnixMs,
) -> Result<ExplainView, ControlError> {
    let view = store::device::view(connection, device)?
        .ok_or_else(|| ControlError::UnknownDevice(device.clone()))?;
    let statuses: BTreeMap<&AppName, &AppStatus> = view
        .apps
        .iter()
        .map(|status| (&status.app, status))
        .collect();
    let mut apps = Vec::new();
    for row in store::app::list(connection)? {
        let status = statuses.get(row.name()).copied();
        let selected = !row.deleting && row.manifest.spec.selector.matches(&view.labels);
        if !selected && status.is_none() {
            continue;
        }
        let mut steps = vec![selection(&row, &view.labels, selected)];
        if selected {
            steps.extend(of_rollout(connection, device, row.name(), listening, now)?);
        }
        steps.extend(status.map(runs));
        apps.push(ExplainApp {
            app: row.name().clone(),
            steps,
        });
    }
    Ok(ExplainView {
        device: device.clone(),
        steps: whole(&view),
        apps,
    })
}

fn link(what: impl Into<String>, waits_for: Option<&str>) -> ExplainStep {
    ExplainStep {
        what: what.into(),
        waits_for: waits_for.map(str::to_owned),
    }
}

/// What is true of the device whatever its apps are.
fn whole(view: &DeviceView) -> Vec<ExplainStep> {
    let mut steps = vec![match (view.online, view.last_seen_ms) {
        (true, _) => link("it is connected", None),
        (false, Some(_)) => link("it is not connected", Some("the device to connect")),
        (false, None) => link("it was never connected", Some("the device to connect")),
    }];
    if let Some(reason) = &view.held {
        let why = if reason.is_empty() {
            String::new()
        } else {
            format!(": {reason}")
        };
        let way_out = Some("`foreshore device release`");
        steps.push(link(format!("an operator holds it{why}"), way_out));
    }
    steps.push(match (view.desired, view.reported) {
        (None, _) => link("nothing was ever placed on it", None),
        (Some(desired), Some(stored)) if stored >= desired => link(
            format!("it has stored its newest desired state, {desired}"),
            None,
        ),
        (Some(desired), stored) => {
            let stored = stored.map_or_else(|| "none".to_owned(), |stored| stored.to_string());
            let what = format!("its newest desired state is {desired}, and it has stored {stored}");
            link(what, Some("the device to store it"))
        }
    });
    steps
}

fn selection(app: &AppRow, labels: &Labels, selected: bool) -> ExplainStep {
    let selector = &app.manifest.spec.selector;
    if app.deleting {
        return link(
            "the app is being deleted",
            Some("the device to say that it removed it"),
        );
    }
    let asked = match selector.to_string() {
        all if all.is_empty() => "every device".to_owned(),
        some => some,
    };
    if selected {
        return link(format!("the app selects it: {asked}"), None);
    }
    let labels: Vec<String> = labels
        .iter()
        .map(|(key, value)| format!("{key}={value}"))
        .collect();
    link(
        format!(
            "the app does not select it: it asks for {asked}, and the device has {}",
            labels.join(",")
        ),
        Some("the device to say that it removed it"),
    )
}

fn of_rollout(
    connection: &Connection,
    device: &DeviceId,
    app: &AppName,
    listening: Listening,
    now: UnixMs,
) -> Result<Vec<ExplainStep>, ControlError> {
    let Some(rollout) = store::rollout::newest(connection, app)? else {
        return Ok(Vec::new());
    };
    let fleet = Fleet {
        devices: store::rollout::facts(connection, &rollout)?,
        pulse: store::rollout::pulse(connection, rollout.pulse_since())?,
        listening_since: listening.since,
        settle_ms: listening.settle_ms,
        offers_at_once: OFFERS_AT_ONCE,
    };
    Ok(explain::explain(&rollout, device, &fleet, now))
}

/// What the device itself says last.
fn runs(status: &AppStatus) -> ExplainStep {
    let running = status
        .running
        .map_or_else(|| "nothing".to_owned(), |release| release.short());
    let reason = status
        .reason
        .as_ref()
        .map_or_else(String::new, |reason| format!("; {}", reason.message));
    let kept: Vec<String> = status
        .services
        .iter()
        .filter_map(|service| {
            let kept = service.kept?;
            Some(format!(
                "container {} of {}, of release {}",
                kept.instance,
                service.service,
                kept.release.short()
            ))
        })
        .collect();
    let kept = match &kept[..] {
        [] => String::new(),
        kept => format!("; kept beside it: {}", kept.join(", ")),
    };
    link(
        format!("it says that it runs release {running} of it{reason}{kept}"),
        None,
    )
}
