//! `/healthz`, `/readyz`, `/metrics`, `/info`: how the hub itself is.

use std::fmt::Write as _;
use std::sync::atomic::Ordering;

use axum::Json;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use foreshore_protocol::api::HubView;
use rusqlite::Connection;

use super::{Api, Failure, Hub};
use crate::config::BrokerKind;
use crate::store::{self, StoreError};

/// `GET /healthz`: the process answers.
pub async fn alive() -> &'static str {
    "ok\n"
}

/// `GET /readyz`: the store answers and the hub hears the broker.
///
/// # Errors
///
/// When one of them does not.
pub async fn ready(State(api): Hub) -> Result<&'static str, Failure> {
    api.controller
        .store()
        .read(|connection| Ok::<_, StoreError>(store::device::count(connection)?))
        .await?;
    if api.controller.listening().since.is_none() {
        return Err(Failure::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "no-broker",
            "the hub is not connected to its broker",
            "it keeps trying; check that the broker runs, and the hub's log",
        ));
    }
    Ok("ok\n")
}

/// `GET /info`.
///
/// # Errors
///
/// When the store fails.
pub async fn info(State(api): Hub) -> Result<Json<HubView>, Failure> {
    let read = |connection: &Connection| {
        let count = store::device::count(connection)?;
        Ok::<_, StoreError>((store::desired::epoch(connection)?, count))
    };
    let (epoch, (devices, devices_online)) = api.controller.store().read(read).await?;
    Ok(Json(HubView {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        epoch,
        broker: broker(&api).to_owned(),
        devices,
        devices_online,
    }))
}

const fn broker(api: &Api) -> &'static str {
    match api.broker {
        BrokerKind::Embedded => "embedded",
        BrokerKind::External => "external",
    }
}

/// What `/metrics` reads from the store.
struct Counts {
    devices: u64,
    online: u64,
    apps: usize,
    rollouts: Vec<(String, u64)>,
    outbox: u64,
    events: u64,
}

/// `GET /metrics` (Prometheus text exposition format 0.0.4).
///
/// # Errors
///
/// When the store fails.
pub async fn metrics(State(api): Hub) -> Result<impl IntoResponse, Failure> {
    let read = |connection: &Connection| {
        let (devices, online) = store::device::count(connection)?;
        Ok::<_, StoreError>(Counts {
            devices,
            online,
            apps: store::app::list(connection)?.len(),
            rollouts: store::rollout::count_by_state(connection)?,
            outbox: store::desired::outbox_depth(connection)?,
            events: store::event::newest(connection)?,
        })
    };
    let counts = api.controller.store().read(read).await?;
    let content_type = [(
        header::CONTENT_TYPE,
        "text/plain; version=0.0.4; charset=utf-8",
    )];
    Ok((content_type, render(&api, &counts)))
}

fn render(api: &Api, counts: &Counts) -> String {
    let mut text = String::new();
    let mut metric = |name: &str, kind: &str, help: &str, samples: &[(String, u64)]| {
        // Writing to a String cannot fail.
        _ = writeln!(
            text,
            "# HELP foreshore_{name} {help}\n# TYPE foreshore_{name} {kind}"
        );
        for (labels, value) in samples {
            _ = writeln!(text, "foreshore_{name}{labels} {value}");
        }
    };
    let plain = |value| vec![(String::new(), value)];
    let link = |counter: &std::sync::atomic::AtomicU64| plain(counter.load(Ordering::Relaxed));
    let build = format!(
        "{{version=\"{}\",broker=\"{}\"}}",
        env!("CARGO_PKG_VERSION"),
        broker(api)
    );
    metric("build_info", "gauge", "The hub's version.", &[(build, 1)]);
    metric("devices", "gauge", "Known devices.", &plain(counts.devices));
    metric(
        "devices_online",
        "gauge",
        "Connected devices.",
        &plain(counts.online),
    );
    metric("apps", "gauge", "Apps.", &plain(counts.apps as u64));
    let rollouts: Vec<_> = counts
        .rollouts
        .iter()
        .map(|(state, count)| (format!("{{state=\"{state}\"}}"), *count))
        .collect();
    metric(
        "rollouts",
        "gauge",
        "Rollouts that are kept, by state.",
        &rollouts,
    );
    metric(
        "outbox_depth",
        "gauge",
        "Messages that wait to be published.",
        &plain(counts.outbox),
    );
    metric(
        "events_total",
        "counter",
        "Events recorded.",
        &plain(counts.events),
    );
    metric(
        "store_commits_total",
        "counter",
        "Transactions of the database that were committed.",
        &plain(api.controller.store().commits()),
    );
    let connected = u64::from(api.counters.connected.load(Ordering::Relaxed));
    metric(
        "mqtt_connected",
        "gauge",
        "Whether the hub hears the broker.",
        &plain(connected),
    );
    metric(
        "mqtt_connections_total",
        "counter",
        "Connections to the broker.",
        &link(&api.counters.connections),
    );
    metric(
        "mqtt_received_total",
        "counter",
        "Messages from devices.",
        &link(&api.counters.received),
    );
    metric(
        "mqtt_refused_total",
        "counter",
        "Messages not understood.",
        &link(&api.counters.refused),
    );
    metric(
        "mqtt_published_total",
        "counter",
        "Messages that the broker took.",
        &link(&api.counters.published),
    );
    text
}
