//! An update of many simulated devices on one hub: how long it takes, what it costs the hub, and what each device sends
//! and receives for it.
//!
//! Devices ([`device`]) speak the real protocol at the agent's pace, without containers and images. They reach the hub in
//! one of three ways: through its embedded broker ([`sessions`]), as long as it has file descriptors for them; through
//! mosquitto, as long as mosquitto and this process have; and beyond that through a broker without sockets ([`stand_in`]).
//! With `--agent` one real agent ([`agent`]) shows whether it is so. Hub, broker and devices share the machine. Progress goes to stderr, figures to stdout; `cargo xtask bench --only fleet`
//! runs it.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use e2e::api::Api;
use e2e::fleet::{import, web_manifest};
use e2e::hub::HubOptions;
use e2e::image::Builder;
use e2e::mosquitto::Mosquitto;
use e2e::{Bed, Hub};
use serde_json::Value;
use tokio::sync::watch;

use self::device::{News, REPORT_INTERVAL};
use self::figures::{Figures, Spread, Update};
use self::gauges::Wire;
use self::sessions::{Order, Sessions};
use self::stand_in::StandIn;
use self::tally::{Count, Tally};

mod agent;
mod device;
mod figures;
mod gauges;
mod sessions;
mod stand_in;
mod tally;

/// Without news for so long something is wrong.
const STALLED: Duration = Duration::from_secs(240);

/// How often progress is told.
const TELL_EVERY: Duration = Duration::from_secs(5);

/// File descriptors of the hub for other things than devices, and for each of these (`hub/src/broker/embedded`).
const HUB_KEEPS: usize = 512;
const HUB_EACH: usize = 5;

/// File descriptors of mosquitto and of this process for other things than devices.
const OTHERS_KEEP: usize = 300;

const BUDGET: &str = "apiVersion: foreshore/v1\n\
                      kind: DisruptionBudget\n\
                      metadata: {name: all}\n\
                      spec: {maxUnavailable: 100%}\n";

const AT_ONCE: &str = "[{percent: 100}]";
const IN_WAVES: &str = "[{count: 1}, {percent: 10}, {percent: 50}, {percent: 100}]";

/// An app that is another release for each number.
fn manifest(image: &str, number: usize, waves: &str) -> String {
    web_manifest("fleet", image, waves)
        .replace("soak: 1s", "soak: 0s")
        .replace("bake: 500ms", "bake: 0s")
        .replace("progressDeadline: 15s", "progressDeadline: 10m")
        .replace(
            "mem_limit: 32m",
            &format!("mem_limit: 32m\n      environment: {{RELEASE: \"{number}\"}}"),
        )
}

/// How devices reach the hub.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Carrier {
    Embedded,
    Mosquitto,
    StandIn,
}

impl Carrier {
    /// The most real one that has room.
    fn with_room(devices: usize, open_files: usize) -> Self {
        if devices <= open_files.saturating_sub(HUB_KEEPS) / HUB_EACH {
            Self::Embedded
        } else if devices <= open_files.saturating_sub(OTHERS_KEEP) {
            Self::Mosquitto
        } else {
            Self::StandIn
        }
    }

    const fn as_str(self) -> &'static str {
        match self {
            Self::Embedded => "embedded broker",
            Self::Mosquitto => "mosquitto",
            Self::StandIn => "no sockets",
        }
    }
}

fn main() -> anyhow::Result<()> {
    let options = Options::read(std::env::args().skip(1))?;
    let open_files = gauges::raise_open_files();
    eprintln!("open files (ulimit -n): {open_files}");
    let mut all = Vec::new();
    if options.agent {
        let counts = agent::measure()?;
        if options.json {
            all.push(agent::json(&counts));
        } else {
            print!("{}", agent::told(&counts));
        }
    }
    for devices in options.devices.iter().copied() {
        let carrier = options
            .carrier
            .unwrap_or_else(|| Carrier::with_room(devices, open_files));
        let figures = bench(devices, carrier, &options.changes)?;
        if options.json {
            all.push(figures.json());
        } else {
            print!("{figures}");
        }
    }
    if options.json {
        println!("{:#}", Value::from(all));
    }
    Ok(())
}

struct Options {
    devices: Vec<usize>,
    carrier: Option<Carrier>,
    /// The only changes that are measured; empty: all.
    changes: Vec<String>,
    agent: bool,
    json: bool,
}

impl Options {
    fn read(mut words: impl Iterator<Item = String>) -> anyhow::Result<Self> {
        const USAGE: &str = "usage: fleet-bench [--devices N,…] [--broker embedded|mosquitto|none] [--agent] \
             [--changes install,update,in-waves,by-lease] [-o json]";
        let mut options = Self {
            devices: vec![1_000],
            carrier: None,
            changes: Vec::new(),
            agent: false,
            json: false,
        };
        while let Some(word) = words.next() {
            if word == "--agent" {
                options.agent = true;
                continue;
            }
            let value = words.next().context(USAGE)?;
            match (word.as_str(), value.as_str()) {
                ("--devices", list) => {
                    let counts = list.split(',').map(|count| count.trim().parse());
                    options.devices = counts.collect::<Result<_, _>>().context(USAGE)?;
                }
                ("--broker", "embedded") => options.carrier = Some(Carrier::Embedded),
                ("--broker", "mosquitto") => options.carrier = Some(Carrier::Mosquitto),
                ("--broker", "none") => options.carrier = Some(Carrier::StandIn),
                ("--changes", list) => {
                    options.changes = list.split(',').map(str::to_owned).collect();
                }
                ("-o", "json") => options.json = true,
                _ => bail!(USAGE),
            }
        }
        ensure!(options.devices.iter().all(|count| *count > 0), USAGE);
        Ok(options)
    }
}

/// Simulated devices on a thread of their own.
struct Fleet {
    devices: usize,
    tally: Arc<Tally>,
    orders: watch::Sender<Order>,
    news: Receiver<(usize, News)>,
    sessions: Option<Arc<Sessions>>,
    thread: Option<std::thread::JoinHandle<anyhow::Result<()>>>,
}

impl Fleet {
    fn connect(devices: usize, broker: &str, token: String) -> anyhow::Result<Self> {
        let broker: SocketAddr = broker.trim_start_matches("mqtt://").parse()?;
        let (tally, (send, news)) = (Arc::new(Tally::default()), channel());
        let sessions = Arc::new(Sessions {
            broker,
            token,
            tally: Arc::clone(&tally),
            news: send,
            sample: Mutex::default(),
            lost: Mutex::default(),
        });
        let orders = watch::Sender::new(Order::Nothing);
        let (ours, told) = (Arc::clone(&sessions), orders.subscribe());
        let thread = on_a_thread(async move {
            ours.run(devices, told).await;
            Ok(())
        });
        Ok(Self {
            devices,
            tally,
            orders,
            news,
            sessions: Some(sessions),
            thread: Some(thread),
        })
    }

    fn stand_in(devices: usize, listener: std::net::TcpListener) -> anyhow::Result<Self> {
        let (tally, (send, news)) = (Arc::new(Tally::default()), channel());
        let orders = watch::Sender::new(Order::Nothing);
        let (counted, told) = (Arc::clone(&tally), orders.subscribe());
        listener.set_nonblocking(true)?;
        let thread = on_a_thread(async move {
            let listener = tokio::net::TcpListener::from_std(listener)?;
            StandIn::new(devices, counted, send)
                .run(listener, told)
                .await
        });
        Ok(Self {
            devices,
            tally,
            orders,
            news,
            sessions: None,
            thread: Some(thread),
        })
    }

    /// Waits for news of every device; `take` says whether it is the one.
    fn await_each(&self, what: &str, mut take: impl FnMut(News) -> bool) -> anyhow::Result<()> {
        let mut done = BTreeSet::new();
        let mut told = Instant::now();
        while done.len() < self.devices {
            match self.news.recv_timeout(STALLED) {
                Ok((number, news)) => {
                    if take(news) {
                        done.insert(number);
                    }
                }
                Err(RecvTimeoutError::Timeout) => bail!(
                    "{} of {} devices {what}, and none for {STALLED:?}; lost connections: {:?}",
                    done.len(),
                    self.devices,
                    self.lost().iter().rev().take(5).collect::<Vec<_>>()
                ),
                Err(RecvTimeoutError::Disconnected) => {
                    bail!("the devices ended; see what the hub's log says")
                }
            }
            if told.elapsed() >= TELL_EVERY {
                told = Instant::now();
                eprintln!("  {} of {} {what}", done.len(), self.devices);
            }
        }
        Ok(())
    }

    /// Waits until nothing passes any more.
    fn await_quiet(&self) -> anyhow::Result<Count> {
        let begin = Instant::now();
        let mut before = self.tally.count();
        loop {
            std::thread::sleep(Duration::from_millis(700));
            let now = self.tally.count();
            if now == before {
                return Ok(now);
            }
            ensure!(begin.elapsed() < STALLED, "the devices do not become quiet");
            before = now;
        }
    }

    /// Tells every device something and waits until it is done.
    fn order(&self, order: Order) -> anyhow::Result<()> {
        let before = self.tally.count().up.packets;
        self.orders.send_replace(order);
        let begin = Instant::now();
        while self.tally.count().up.packets < before + self.devices as u64 {
            ensure!(begin.elapsed() < STALLED, "the devices do not do as told");
            std::thread::sleep(Duration::from_millis(50));
        }
        self.await_quiet()?;
        Ok(())
    }

    fn lost(&self) -> Vec<String> {
        let lost = self.sessions.as_ref().map(|sessions| {
            let lost = sessions.lost.lock().expect("no panic");
            lost.clone()
        });
        lost.unwrap_or_default()
    }

    /// Of the sessions of the sample, together; and how many these are.
    fn wire(&self) -> (Wire, u64) {
        let Some(sessions) = &self.sessions else {
            return (Wire::default(), 0);
        };
        let sample = sessions.sample.lock().expect("no panic");
        let mut sum = Wire::default();
        for wire in sample
            .iter()
            .map(|socket: &OwnedFd| Wire::of(socket.as_fd()))
        {
            sum.segments += wire.segments;
            sum.bytes += wire.bytes;
        }
        (sum, sample.len() as u64)
    }

    fn end(mut self) -> anyhow::Result<()> {
        self.orders.send_replace(Order::End);
        match self.thread.take().map(std::thread::JoinHandle::join) {
            Some(Ok(ended)) => ended,
            _ => bail!("the devices' thread panicked"),
        }
    }
}

fn on_a_thread(
    work: impl Future<Output = anyhow::Result<()>> + Send + 'static,
) -> std::thread::JoinHandle<anyhow::Result<()>> {
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        tokio::task::LocalSet::new().block_on(&runtime, work)
    })
}

fn bench(devices: usize, carrier: Carrier, changes: &[String]) -> anyhow::Result<Figures> {
    eprintln!("{devices} devices, {}", carrier.as_str());
    let bed = Bed::new("fleet");
    let builder = Builder::new(&bed);
    builder.web("v1", "one", true);
    let mosquitto = (carrier == Carrier::Mosquitto).then(|| {
        let names: Vec<String> = (0..devices).map(device::name).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        Mosquitto::start(&bed, &names)
    });
    let mut stand_in = None;
    let mut options = HubOptions {
        broker: mosquitto.as_ref(),
        ..HubOptions::default()
    };
    if carrier == Carrier::StandIn {
        let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
        options.url = Some(format!("mqtt://{}", listener.local_addr()?));
        stand_in = Some(Fleet::stand_in(devices, listener)?);
    }
    let begin = Instant::now();
    let mut hub = Hub::start_with(&bed, &options);
    let (api, pid) = (hub.api(), hub.program().pid());
    let bare_kib = gauges::memory_kib(pid, "VmRSS");
    let fleet = match stand_in {
        Some(fleet) => fleet,
        None => {
            let token = std::fs::read_to_string(hub.join_token_file())?;
            Fleet::connect(devices, hub.broker(), token.trim().to_owned())?
        }
    };
    let begin = if carrier == Carrier::StandIn {
        begin
    } else {
        Instant::now()
    };
    fleet.await_each("joined", |news| matches!(news, News::Joined))?;
    let joined = begin.elapsed();
    fleet.await_quiet()?;
    let joined_kib = gauges::memory_kib(pid, "VmRSS");
    let join_cpu = gauges::cpu_seconds(pid);
    eprintln!("  all joined in {:.1} s", joined.as_secs_f64());

    let image = import(&api, &builder, "v1");
    let mut updates = Vec::new();
    for (number, (name, waves, budget)) in [
        ("install", AT_ONCE, false),
        ("update", AT_ONCE, false),
        ("in-waves", IN_WAVES, false),
        ("by-lease", AT_ONCE, true),
    ]
    .into_iter()
    .enumerate()
    {
        if !changes.is_empty() && !changes.iter().any(|change| change == name) {
            continue;
        }
        if budget {
            api.send("PUT", "/disruption-budgets/all", BUDGET.as_bytes())
                .ok();
            fleet.await_quiet()?;
        }
        let manifest = manifest(&image, number, waves);
        updates.push(update(name, &fleet, &api, pid, &manifest)?);
    }
    let idle = |order| -> anyhow::Result<f64> {
        let before = fleet.wire();
        fleet.order(order)?;
        let (after, sessions) = fleet.wire();
        let bytes = after.ip_bytes() - before.0.ip_bytes();
        Ok(bytes as f64 / sessions.max(1) as f64)
    };
    let figures = Figures {
        devices,
        carrier: carrier.as_str(),
        joined,
        join_cpu,
        beacon_bytes: idle(Order::Beacon)?,
        ping_bytes: idle(Order::Ping)?,
        updates,
        bare_kib,
        joined_kib,
        end_kib: gauges::memory_kib(pid, "VmRSS"),
        peak_kib: gauges::memory_kib(pid, "VmHWM"),
        database_mib: gauges::database_mib(hub.data()),
        descriptors: gauges::descriptors(pid),
        lost: fleet.lost(),
    };
    fleet.end()?;
    drop((hub, mosquitto));
    Ok(figures)
}

fn update(
    name: &'static str,
    fleet: &Fleet,
    api: &Api,
    pid: i32,
    manifest: &str,
) -> anyhow::Result<Update> {
    eprintln!("  {name}");
    // In the field the last report is long ago, and the next one goes out at once.
    std::thread::sleep(REPORT_INTERVAL);
    let (count, wire) = (fleet.tally.count(), fleet.wire().0);
    let (cpu, commits) = (gauges::cpu_seconds(pid), commits(api)?);
    let begin = Instant::now();
    api.apply("fleet", manifest).ok();
    let applied = begin.elapsed();
    let (mut heads, mut acknowledged, mut own) = (Vec::new(), Vec::new(), Vec::new());
    let mut releases = BTreeSet::new();
    fleet.await_each("acknowledged", |news| {
        let News::Succeeded {
            release,
            head_at,
            acknowledged_at,
        } = news
        else {
            return false;
        };
        releases.insert(release);
        heads.push(head_at - begin);
        acknowledged.push(acknowledged_at - begin);
        own.push(acknowledged_at - head_at);
        true
    })?;
    ensure!(releases.len() == 1, "devices ended at {releases:?}");
    let completed = loop {
        let rollout = api.rollout("fleet");
        let succeeded: u64 = rollout["waves"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|wave| wave["succeeded"].as_u64())
            .sum();
        if rollout["state"] == "completed" && succeeded == fleet.devices as u64 {
            break begin.elapsed();
        }
        ensure!(begin.elapsed() < 4 * STALLED, "not completed: {rollout}");
        std::thread::sleep(Duration::from_millis(20));
    };
    let hub_cpu = gauges::cpu_seconds(pid) - cpu;
    fleet.await_quiet()?;
    // It would come within a minute.
    fleet.order(Order::Beacon)?;
    let (after, sessions) = fleet.wire();
    Ok(Update {
        name,
        devices: fleet.devices,
        applied,
        head: Spread::of(heads),
        acknowledged: Spread::of(acknowledged),
        own: Spread::of(own),
        completed,
        count: fleet.tally.count() - count,
        ip_bytes: (sessions > 0)
            .then(|| (after.ip_bytes() - wire.ip_bytes()) as f64 / sessions as f64),
        segments: (sessions > 0).then(|| (after.segments - wire.segments) as f64 / sessions as f64),
        hub_cpu,
        commits: self::commits(api)? - commits,
    })
}

/// Transactions that the hub committed so far.
fn commits(api: &Api) -> anyhow::Result<u64> {
    let text = api.metrics();
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("foreshore_store_commits_total "));
    Ok(line.context("the hub counts its commits")?.trim().parse()?)
}
