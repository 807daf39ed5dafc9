//! `describe`: everything about one app, device, rollout or disruption budget.

use std::io::{self, Write};

use foreshore_protocol::api::{AppView, DeviceView, RolloutView};
use foreshore_protocol::id::Labels;
use foreshore_protocol::message::{AppStatus, ServiceState};
use foreshore_protocol::quantity::Span;
use foreshore_protocol::{AppName, DeviceId, Digest};

use super::{budget, get};
use crate::arguments::{DescribeKind, Format};
use crate::client::Hub;
use crate::failure::{Failure, Outcome, code};
use crate::live;
use crate::output::{self, Table, age, bytes, elapsed, now_ms, printable, timestamp, word};
use crate::pulling;

pub(super) fn run(
    hub: &Hub,
    kind: DescribeKind,
    name: &str,
    format: Format,
    out: &mut dyn Write,
) -> Outcome {
    match kind {
        DescribeKind::App => {
            let name: AppName = name.parse().map_err(Failure::input)?;
            let view: AppView = hub.get(&format!("/apps/{name}"))?;
            show(&view, app, format, out)
        }
        DescribeKind::Device => {
            let name: DeviceId = name.parse().map_err(Failure::input)?;
            let view: DeviceView = hub.get(&format!("/devices/{name}"))?;
            show(&view, device, format, out)
        }
        DescribeKind::Budget => show(&budget::find(hub, name)?, budget::describe, format, out),
        DescribeKind::Rollout => show(&get::rollout(hub, name)?, rollout, format, out),
    }
}

fn show<T: get::Listed>(
    view: &T,
    text: fn(&T, u64, &mut dyn Write) -> io::Result<()>,
    format: Format,
    out: &mut dyn Write,
) -> Outcome {
    match format {
        Format::Json => output::json(out, view)?,
        Format::Name => writeln!(out, "{}", view.name())?,
        Format::Table => text(view, now_ms(), out)?,
    }
    Ok(code::OK)
}

/// `role=gateway site=hull`.
pub(super) fn labels(labels: &Labels) -> String {
    let pairs: Vec<String> = labels
        .iter()
        .map(|(key, value)| format!("{key}={value}"))
        .collect();
    pairs.join(" ")
}

pub(super) fn line(out: &mut dyn Write, key: &str, value: &str) -> io::Result<()> {
    writeln!(
        out,
        "{:<16}{}",
        format!("{key}:"),
        if value.is_empty() {
            "-".into()
        } else {
            printable(value)
        }
    )
}

fn digest(digest: Option<Digest>) -> String {
    digest.map_or_else(String::new, |digest| digest.short())
}

pub(super) fn when(now_ms: u64, then_ms: u64) -> String {
    match age(now_ms, then_ms).as_str() {
        "now" => format!("{} (just now)", timestamp(then_ms)),
        age => format!("{} ({age} ago)", timestamp(then_ms)),
    }
}

fn app(view: &AppView, now_ms: u64, out: &mut dyn Write) -> io::Result<()> {
    let spec = &view.manifest.spec;
    let selector = spec.selector.to_string();
    line(out, "App", view.name.as_ref())?;
    line(out, "Release", &view.release.to_string())?;
    line(
        out,
        "Selects",
        if selector.is_empty() {
            "every device"
        } else {
            &selector
        },
    )?;
    line(
        out,
        "Up to date",
        &format!("{} of {} devices", view.up_to_date, view.devices),
    )?;
    if view.deleting {
        line(out, "State", "being removed from its devices")?;
    }
    if let Some(rollout) = &view.rollout {
        let message = rollout
            .message
            .as_ref()
            .map_or_else(String::new, |message| format!(": {message}"));
        line(
            out,
            "Rollout",
            &format!("{} {}{message}", rollout.id, word(&rollout.state)),
        )?;
    }
    line(out, "Created", &when(now_ms, view.created_ms))?;
    line(out, "Updated", &when(now_ms, view.updated_ms))?;
    let waves: Vec<String> = spec
        .rollout
        .waves
        .iter()
        .map(|wave| {
            let approval = if wave.approval { ", then approval" } else { "" };
            format!("{}{approval}", wave.target)
        })
        .collect();
    line(out, "Waves", &waves.join(", "))?;
    line(
        out,
        "Soak, bake",
        &format!("{}, {}", spec.rollout.soak, spec.rollout.bake),
    )?;
    writeln!(out)?;
    let mut table = Table::new(&["SERVICE", "IMAGE", "MEMORY", "CPUS", "PIDS", "RESTART"]);
    for (name, service) in &spec.services {
        table.row([
            name.to_string(),
            service.image.clone(),
            service.mem_limit.to_string(),
            service.cpus.to_string(),
            service.pids_limit.to_string(),
            service.restart.to_string(),
        ]);
    }
    table.print(out)
}

fn device(view: &DeviceView, now_ms: u64, out: &mut dyn Write) -> io::Result<()> {
    line(out, "Device", view.id.as_ref())?;
    line(
        out,
        "Status",
        if view.online { "online" } else { "offline" },
    )?;
    line(
        out,
        "Last seen",
        &view
            .last_seen_ms
            .map_or_else(|| "never".to_owned(), |seen| when(now_ms, seen)),
    )?;
    if let Some(reason) = &view.held {
        let reason = if reason.is_empty() {
            "by an operator"
        } else {
            reason
        };
        line(out, "Held", reason)?;
    }
    line(out, "Labels", &labels(&view.labels))?;
    let version = |version: Option<foreshore_protocol::Version>| {
        version.map_or_else(String::new, |version| version.to_string())
    };
    line(out, "Should run", &version(view.desired))?;
    line(out, "Has stored", &version(view.reported))?;
    if let Some(key) = &view.secrets_key {
        let other = view.untrusted_key.as_ref().map(|other| {
            format!("; it shows {other} now and gets no secrets: see `foreshore device trust-key`")
        });
        line(out, "Key", &format!("{key}{}", other.unwrap_or_default()))?;
    }
    if let Some(inventory) = &view.inventory {
        line(out, "Agent", &inventory.agent_version)?;
        line(
            out,
            "Machine",
            &format!("{}, Linux {}", inventory.arch, inventory.kernel),
        )?;
        line(out, "Memory", &bytes(inventory.memory_bytes))?;
        line(
            out,
            "Disk",
            &format!(
                "{} free of {}",
                bytes(inventory.disk_free_bytes),
                bytes(inventory.disk_bytes)
            ),
        )?;
    }
    if let Some(pull) = &view.pull {
        line(out, "Fetches", &pulling::whole(pull))?;
    }
    for app in &view.apps {
        writeln!(out)?;
        app_on_device(app, out)?;
    }
    Ok(())
}

fn app_on_device(app: &AppStatus, out: &mut dyn Write) -> io::Result<()> {
    line(out, "App", app.app.as_ref())?;
    line(out, "Phase", &word(&app.phase))?;
    if let Some(reason) = &app.reason {
        let service = reason
            .service
            .as_ref()
            .map_or_else(String::new, |service| format!("{service}: "));
        line(
            out,
            "Why",
            &format!("{service}{} ({})", reason.message, word(&reason.code)),
        )?;
    }
    line(out, "Asked to run", &app.release.short())?;
    line(out, "Runs", &digest(app.running))?;
    line(out, "Known good", &digest(app.last_known_good))?;
    let mut table = Table::new(&["SERVICE", "STATE", "READY", "RESTARTS"]);
    for service in &app.services {
        let state = match &service.state {
            ServiceState::Waiting => "waiting".to_owned(),
            ServiceState::Running => "running".to_owned(),
            ServiceState::BackOff { exit_code } => format!("back-off (ended with {exit_code})"),
            ServiceState::Exited { exit_code } => format!("ended with {exit_code}"),
        };
        table.row([
            service.service.to_string(),
            state,
            if service.ready { "yes" } else { "no" }.to_owned(),
            service.restarts.to_string(),
        ]);
    }
    table.print(out)?;
    for service in &app.services {
        if let Some(kept) = &service.kept {
            line(
                out,
                "Kept",
                &format!(
                    "{}: container {} of release {}, through the trial and for {} from the switch",
                    service.service,
                    kept.instance,
                    kept.release.short(),
                    Span(kept.keep_ms)
                ),
            )?;
        }
    }
    Ok(())
}

fn rollout(view: &RolloutView, now_ms: u64, out: &mut dyn Write) -> io::Result<()> {
    line(out, "Rollout", &view.id.to_string())?;
    line(out, "App", view.app.as_ref())?;
    line(out, "State", &word(&view.state))?;
    line(out, "Message", view.message.as_deref().unwrap_or_default())?;
    line(out, "From release", &digest(view.from))?;
    line(out, "To release", &view.to.short())?;
    line(out, "Began", &when(now_ms, view.created_ms))?;
    if let Some(end) = view.finished_ms {
        line(out, "Took", &elapsed(end.saturating_sub(view.created_ms)))?;
    }
    writeln!(out)?;
    let mut table = Table::new(&[
        "WAVE",
        "TARGET",
        "STATE",
        "DEVICES",
        "SUCCEEDED",
        "FAILED",
        "DEFERRED",
    ]);
    for wave in &view.waves {
        table.row([
            wave.ordinal.to_string(),
            wave.target.to_string(),
            word(&wave.state),
            wave.devices.to_string(),
            wave.succeeded.to_string(),
            wave.failed.to_string(),
            wave.deferred.to_string(),
        ]);
    }
    table.print(out)?;
    analysis(view, out)?;
    writeln!(out)?;
    let mut table = Table::new(&["DEVICE", "WAVE", "STATE", "MESSAGE"]);
    for assignment in &view.assignments {
        table.row([
            assignment.device.to_string(),
            assignment.wave.to_string(),
            live::stage(assignment),
            match (&assignment.message, &assignment.pull) {
                (Some(message), _) => message.clone(),
                (None, Some(pull)) => pulling::whole(pull),
                (None, None) => String::new(),
            },
        ]);
    }
    table.print(out)
}

/// What was asked besides devices; nothing where nobody was.
fn analysis(view: &RolloutView, out: &mut dyn Write) -> io::Result<()> {
    if view.waves.iter().all(|wave| wave.analysis.is_empty()) {
        return Ok(());
    }
    writeln!(out)?;
    let mut table = Table::new(&[
        "ANALYSIS",
        "WAVE",
        "PASSED",
        "FAILED",
        "INCONCLUSIVE",
        "LAST",
    ]);
    for wave in &view.waves {
        for gate in &wave.analysis {
            table.row([
                gate.name.clone(),
                wave.ordinal.to_string(),
                gate.passed.to_string(),
                gate.failed.to_string(),
                gate.inconclusive.to_string(),
                gate.message.clone().unwrap_or_default(),
            ]);
        }
    }
    table.print(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::live::samples;

    fn text<T>(view: &T, print: fn(&T, u64, &mut dyn Write) -> io::Result<()>) -> String {
        let mut out = Vec::new();
        print(view, samples::NOW_MS, &mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn descriptions() {
        insta::assert_snapshot!(text(&samples::app(), app));
        insta::assert_snapshot!(text(&samples::device(), device));
        insta::assert_snapshot!(text(&samples::rollout(), rollout));
    }
}
