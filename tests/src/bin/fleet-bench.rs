//! Simulated devices converged per second on one hub, over real MQTT sessions.
//!
//! Each device is one MQTT connection that speaks the real protocol (birth, head, reported) and says at
//! once that every release succeeded: no containers, no images. Hub and devices share the machine. Only
//! reports; `cargo xtask bench --only fleet` runs it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use e2e::fleet::{import, web_manifest};
use e2e::image::Builder;
use e2e::{Bed, Hub};
use foreshore_protocol::message::{AppStatus, Command, Head, Inventory, Phase, Presence, Reported};
use foreshore_protocol::topic::{self, Leaf};
use foreshore_protocol::{DeviceId, Version, frame};
use rumqttc::{AsyncClient, Event, EventLoop, Incoming, MqttOptions, PublishOptions, QoS};

fn main() -> anyhow::Result<()> {
    let counts: Vec<usize> = match std::env::args().nth(1) {
        Some(text) => vec![text.parse().context("usage: fleet-bench [DEVICES]")?],
        None => vec![100, 1000],
    };
    for count in counts {
        bench(count)?;
    }
    Ok(())
}

fn bench(count: usize) -> anyhow::Result<()> {
    let bed = Bed::new("fleet");
    let builder = Builder::new(&bed);
    builder.web("v1", "one", true);
    let mut hub = Hub::start(&bed);
    let api = hub.api();
    let image = import(&api, &builder, "v1");
    let token = std::fs::read_to_string(hub.join_token_file())?
        .trim()
        .to_owned();
    let address = hub.broker().trim_start_matches("mqtt://").to_owned();
    let reported = Arc::new(AtomicU64::new(0));

    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let counter = Arc::clone(&reported);
    // The devices live on a thread of their own; it ends with the process.
    std::thread::spawn(move || {
        runtime.block_on(async {
            let mut devices = tokio::task::JoinSet::new();
            for number in 0..count {
                devices.spawn(device(
                    number,
                    address.clone(),
                    token.clone(),
                    Arc::clone(&counter),
                ));
            }
            while let Some(ended) = devices.join_next().await {
                eprintln!("a device ended: {ended:?}");
            }
        });
    });

    let begin = Instant::now();
    wait("every device online", || {
        let info = api.get("/info").ok();
        (info["devicesOnline"].as_u64() == u64::try_from(count).ok()).then_some(())
    })?;
    let joined = begin.elapsed();

    let cpu_before = cpu_seconds(hub.program().pid());
    let begin = Instant::now();
    let manifest = web_manifest("fleet", &image, "[{percent: 100}]")
        .replace("{matchLabels: {role: web}}", "{}");
    api.apply(
        "fleet",
        &manifest
            .replace("soak: 1s", "soak: 0s")
            .replace("bake: 500ms", "bake: 0s"),
    )
    .ok();
    wait("every device converged", || {
        let rollout = api.rollout("fleet");
        let succeeded: u64 = rollout["waves"]
            .as_array()?
            .iter()
            .filter_map(|wave| wave["succeeded"].as_u64())
            .sum();
        (rollout["state"] == "completed" && usize::try_from(succeeded) == Ok(count)).then_some(())
    })?;
    let converged = begin.elapsed();
    let cpu = cpu_seconds(hub.program().pid()) - cpu_before;
    let rss = resident_kib(hub.program().pid());
    println!(
        "{count:>6} devices: joined in {:.2} s; apply → all reported in {:.2} s = {:.0} devices/s; hub CPU {cpu:.2} s, {} MiB resident; {} reports",
        joined.as_secs_f64(),
        converged.as_secs_f64(),
        count as f64 / converged.as_secs_f64(),
        rss / 1024,
        reported.load(Ordering::Relaxed),
    );
    Ok(())
}

/// One device: says what the hub wants to hear, through the wire as it is.
async fn device(
    number: usize,
    address: String,
    token: String,
    counter: Arc<AtomicU64>,
) -> anyhow::Result<()> {
    let id: DeviceId = format!("sim-{number}").parse()?;
    let (host, port) = address.rsplit_once(':').context("the broker has a port")?;
    loop {
        let mut options = MqttOptions::new(id.as_str(), (host, port.parse::<u16>()?));
        options.set_credentials(id.as_str().to_owned(), token.clone().into_bytes());
        options.set_keep_alive(300);
        let (client, mut events) = AsyncClient::builder(options).capacity(16).build();
        let lost = session(&id, &client, &mut events, &counter).await;
        eprintln!("{id}: {lost:?}; connecting again");
        tokio::time::sleep(Duration::from_millis(500 + u64::try_from(number % 500)?)).await;
    }
}

async fn session(
    id: &DeviceId,
    client: &AsyncClient,
    events: &mut EventLoop,
    counter: &AtomicU64,
) -> anyhow::Result<()> {
    let mut version: Option<Version> = None;
    let mut seq = 0;
    loop {
        match events.poll().await? {
            Event::Incoming(Incoming::ConnAck(_)) => {
                let leaves = [Leaf::Head, Leaf::Command].map(|leaf| topic::device(id, leaf));
                for leaf in leaves {
                    client.subscribe(leaf, QoS::AtLeastOnce).await?;
                }
                let birth = Presence {
                    session: 1,
                    online: true,
                    boot: 1,
                    version,
                    reported_seq: seq,
                    max_schema: frame::MAX_SCHEMA,
                    agent_version: "0.1.0".to_owned(),
                    secrets_key: None,
                    secrets: None,
                };
                publish(client, id, Leaf::Presence, &birth).await?;
                seq += 1;
                publish(client, id, Leaf::Reported, &report(seq, version, &[])).await?;
            }
            Event::Incoming(Incoming::Publish(message)) => {
                if let Ok(head) = frame::decode::<Head>(&message.payload) {
                    if version.is_none_or(|seen| head.version > seen) {
                        version = Some(head.version);
                        seq += 1;
                        counter.fetch_add(1, Ordering::Relaxed);
                        publish(
                            client,
                            id,
                            Leaf::Reported,
                            &report(seq, version, &head.apps),
                        )
                        .await?;
                    }
                } else if frame::decode::<Command>(&message.payload).is_err() {
                    bail!("neither head nor command on {:?}", message.topic);
                }
            }
            _ => {}
        }
    }
}

async fn publish<M: frame::Message>(
    client: &AsyncClient,
    id: &DeviceId,
    leaf: Leaf,
    message: &M,
) -> anyhow::Result<()> {
    let options = PublishOptions::new(QoS::AtLeastOnce).retain(true);
    client
        .publish(topic::device(id, leaf), frame::encode(message), options)
        .await?;
    Ok(())
}

fn report(
    seq: u64,
    version: Option<Version>,
    apps: &[foreshore_protocol::message::HeadApp],
) -> Reported {
    let status = |app: &foreshore_protocol::message::HeadApp| AppStatus {
        app: app.app.clone(),
        since: app.since,
        release: app.release,
        phase: Phase::Succeeded,
        reason: None,
        running: Some(app.release),
        last_known_good: Some(app.release),
        services: Vec::new(),
    };
    Reported {
        boot: 1,
        seq,
        version,
        inventory: Inventory {
            agent_version: "0.1.0".to_owned(),
            arch: "amd64".to_owned(),
            kernel: "simulated".to_owned(),
            memory_bytes: 1 << 30,
            disk_bytes: 8 << 30,
            disk_free_bytes: 4 << 30,
            disk_reserve_bytes: None,
            metered: None,
            dev_nodes: None,
            labels: BTreeMap::new(),
        },
        apps: apps.iter().map(status).collect(),
    }
}

fn wait(what: &str, mut probe: impl FnMut() -> Option<()>) -> anyhow::Result<()> {
    let begin = Instant::now();
    while probe().is_none() {
        if begin.elapsed() > Duration::from_secs(300) {
            bail!("waited 300 s for {what}");
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// User and system time of a process so far, in seconds (proc_pid_stat(5), fields 14 and 15).
fn cpu_seconds(pid: i32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let fields = stat.rsplit_once(") ").map_or("", |(_, rest)| rest);
    let ticks: u32 = fields
        .split(' ')
        .skip(11)
        .take(2)
        .filter_map(|field| field.parse::<u32>().ok())
        .sum();
    f64::from(ticks) / 100.0
}

fn resident_kib(pid: i32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|line| line.trim().strip_suffix(" kB")?.trim().parse().ok())
        .unwrap_or(0)
}
