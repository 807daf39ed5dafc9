//! `get`: lists, and single lines of them.

use std::io::{self, Write};

use foreshore_protocol::api::{
    AppView, BudgetView, DeviceView, EventView, ImageView, List, RolloutView,
};
use foreshore_protocol::{AppName, DeviceId};
use serde::Serialize;

use super::{budget, events, image};
use crate::arguments::{Events, Format, Get, GetKind};
use crate::client::Hub;
use crate::failure::{Failure, Outcome, code};
use crate::output::{self, Table, age, bytes, elapsed, now_ms, word};

pub(super) fn run(hub: &Hub, get: &Get, format: Format, out: &mut dyn Write) -> Outcome {
    match (get.kind, get.name.as_deref()) {
        (GetKind::Apps, None) => list(&hub.get::<List<AppView>>("/apps")?, format, out),
        (GetKind::Apps, Some(name)) => {
            let name: AppName = name.parse().map_err(Failure::input)?;
            one(&hub.get::<AppView>(&format!("/apps/{name}"))?, format, out)
        }
        (GetKind::Devices, None) => list(&hub.get::<List<DeviceView>>("/devices")?, format, out),
        (GetKind::Devices, Some(name)) => {
            let name: DeviceId = name.parse().map_err(Failure::input)?;
            one(
                &hub.get::<DeviceView>(&format!("/devices/{name}"))?,
                format,
                out,
            )
        }
        (GetKind::Rollouts, None) => {
            let path = get.app.as_ref().map_or_else(
                || "/rollouts?limit=100".to_owned(),
                |app| format!("/rollouts?limit=100&app={app}"),
            );
            list(&hub.get::<List<RolloutView>>(&path)?, format, out)
        }
        (GetKind::Rollouts, Some(name)) => one(&rollout(hub, name)?, format, out),
        (GetKind::Budgets, None) => {
            let budgets = hub.get::<List<BudgetView>>("/disruption-budgets")?;
            list(&budgets, format, out)
        }
        (GetKind::Budgets, Some(name)) => one(&budget::find(hub, name)?, format, out),
        (GetKind::Images, None) => list(&hub.get::<List<ImageView>>("/images")?, format, out),
        (GetKind::Images, Some(name)) => one(&image::find(hub, name)?, format, out),
        (GetKind::Events, None) => {
            let events = Events {
                watch: false,
                app: get.app.clone(),
                device: get.device.clone(),
                after: None,
                limit: 50,
            };
            events::run(hub, &events, format, out)
        }
        (GetKind::Events, Some(_)) => {
            Err(Failure::input("events have no names").hint("choose them with --app and --device"))
        }
    }
}

/// A rollout by its id, or the newest one of an app.
pub(super) fn rollout(hub: &Hub, name: &str) -> Result<RolloutView, Failure> {
    if !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_digit()) {
        return hub.get(&format!("/rollouts/{name}"));
    }
    newest(hub, &name.parse().map_err(Failure::input)?)
}

/// The newest rollout of an app.
pub(super) fn newest(hub: &Hub, app: &AppName) -> Result<RolloutView, Failure> {
    let rollouts: List<RolloutView> = hub.get(&format!("/rollouts?app={app}&limit=1"))?;
    rollouts
        .items
        .into_iter()
        .max_by_key(|rollout| rollout.id)
        .ok_or_else(|| {
            Failure::failed(format_args!("app {app} has no rollout"))
                .hint("see `foreshore get apps` for the apps there are")
        })
}

/// Something with a line in a table.
pub(super) trait Listed: Serialize {
    /// Of its table.
    const HEADINGS: &'static [&'static str];
    /// `kind/name`.
    fn name(&self) -> String;
    /// Adds its line.
    fn add(&self, table: &mut Table, now_ms: u64);
}

fn list<T: Listed>(list: &List<T>, format: Format, out: &mut dyn Write) -> Outcome {
    if format == Format::Json {
        output::json(out, list)?;
    } else {
        print(&list.items, format, now_ms(), out)?;
    }
    Ok(code::OK)
}

fn one<T: Listed>(item: &T, format: Format, out: &mut dyn Write) -> Outcome {
    if format == Format::Json {
        output::json(out, item)?;
    } else {
        print(std::slice::from_ref(item), format, now_ms(), out)?;
    }
    Ok(code::OK)
}

/// Prints names or a table.
pub(super) fn print<T: Listed>(
    items: &[T],
    format: Format,
    now_ms: u64,
    out: &mut dyn Write,
) -> io::Result<()> {
    if format == Format::Name {
        return items
            .iter()
            .try_for_each(|item| writeln!(out, "{}", item.name()));
    }
    let mut table = Table::new(T::HEADINGS);
    for item in items {
        item.add(&mut table, now_ms);
    }
    table.print(out)
}

impl Listed for AppView {
    const HEADINGS: &'static [&'static str] = &[
        "NAME",
        "RELEASE",
        "UP TO DATE",
        "ROLLOUT",
        "STATE",
        "UPDATED",
    ];

    fn name(&self) -> String {
        format!("app/{}", self.name)
    }

    fn add(&self, table: &mut Table, now_ms: u64) {
        let state = if self.deleting {
            "deleting".to_owned()
        } else {
            self.rollout
                .as_ref()
                .map_or_else(String::new, |rollout| word(&rollout.state))
        };
        table.row([
            self.name.to_string(),
            self.release.short(),
            format!("{}/{}", self.up_to_date, self.devices),
            self.rollout
                .as_ref()
                .map_or_else(String::new, |rollout| rollout.id.to_string()),
            state,
            age(now_ms, self.updated_ms),
        ]);
    }
}

impl Listed for DeviceView {
    const HEADINGS: &'static [&'static str] =
        &["NAME", "STATUS", "SEEN", "ARCH", "AGENT", "APPS", "LABELS"];

    fn name(&self) -> String {
        format!("device/{}", self.id)
    }

    fn add(&self, table: &mut Table, now_ms: u64) {
        let inventory = self.inventory.as_ref();
        let apps: Vec<String> = self
            .apps
            .iter()
            .map(|app| format!("{}:{}", app.app, word(&app.phase)))
            .collect();
        table.row([
            self.id.to_string(),
            if self.online { "online" } else { "offline" }.to_owned(),
            self.last_seen_ms
                .map_or_else(|| "never".to_owned(), |seen| age(now_ms, seen)),
            inventory.map_or_else(String::new, |inventory| inventory.arch.clone()),
            inventory.map_or_else(String::new, |inventory| inventory.agent_version.clone()),
            apps.join(" "),
            super::describe::labels(&self.labels),
        ]);
    }
}

impl Listed for RolloutView {
    const HEADINGS: &'static [&'static str] = &[
        "ID",
        "APP",
        "STATE",
        "RELEASE",
        "WAVE",
        "SUCCEEDED",
        "FAILED",
        "AGE",
        "TOOK",
        "MESSAGE",
    ];

    fn name(&self) -> String {
        format!("rollout/{}", self.id)
    }

    fn add(&self, table: &mut Table, now_ms: u64) {
        let wave = crate::live::current_wave(self).map_or(0, |wave| wave.ordinal);
        let sum = |count: fn(&foreshore_protocol::api::WaveView) -> u64| {
            self.waves.iter().map(count).sum::<u64>()
        };
        table.row([
            self.id.to_string(),
            self.app.to_string(),
            word(&self.state),
            self.to.short(),
            format!("{wave}/{}", self.waves.len()),
            format!(
                "{}/{}",
                sum(|wave| wave.succeeded),
                sum(|wave| wave.devices)
            ),
            sum(|wave| wave.failed).to_string(),
            age(now_ms, self.created_ms),
            self.finished_ms.map_or_else(String::new, |end| {
                elapsed(end.saturating_sub(self.created_ms))
            }),
            self.message.clone().unwrap_or_default(),
        ]);
    }
}

impl Listed for ImageView {
    const HEADINGS: &'static [&'static str] =
        &["REFERENCE", "DIGEST", "SIZE", "PLATFORMS", "IMPORTED"];

    fn name(&self) -> String {
        format!("image/{}", self.reference)
    }

    fn add(&self, table: &mut Table, now_ms: u64) {
        table.row([
            self.reference.clone(),
            self.digest.short(),
            bytes(self.size_bytes),
            self.platforms.join(","),
            age(now_ms, self.imported_ms),
        ]);
    }
}

impl Listed for EventView {
    const HEADINGS: &'static [&'static str] = &["ID", "TIME", "DEVICE", "APP", "KIND", "MESSAGE"];

    fn name(&self) -> String {
        format!("event/{}", self.id)
    }

    fn add(&self, table: &mut Table, _now_ms: u64) {
        table.row([
            self.id.to_string(),
            output::timestamp(self.received_ms),
            self.device
                .as_ref()
                .map_or_else(|| "hub".to_owned(), ToString::to_string),
            events::subject(self),
            self.kind.clone(),
            self.message.clone(),
        ]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::live::samples;

    fn table<T: Listed>(item: T) -> String {
        let mut out = Vec::new();
        print(&[item], Format::Table, samples::NOW_MS, &mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn tables() {
        insta::assert_snapshot!(table(samples::rollout()));
        insta::assert_snapshot!(table(samples::device()));
        insta::assert_snapshot!(table(samples::event()));
        insta::assert_snapshot!(table(samples::image()));
        insta::assert_snapshot!(table(samples::app()));
    }

    #[test]
    fn names() {
        let mut out = Vec::new();
        print(&[samples::rollout()], Format::Name, 0, &mut out).unwrap();
        print(&[samples::device()], Format::Name, 0, &mut out).unwrap();
        print(&[samples::image()], Format::Name, 0, &mut out).unwrap();
        assert_eq!(
            String::from_utf8(out).unwrap(),
            "rollout/7\ndevice/gw-3\nimage/hub.internal/demo:v2\n"
        );
    }
}
