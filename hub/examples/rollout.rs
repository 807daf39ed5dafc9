//! What a device's report costs in a rollout of so many devices: `rollout DEVICES REPORTS DIRECTORY` measures the engine
//! alone and the transactions around it, over a database in that directory, and prints one line. For
//! `cargo xtask bench --only rollout`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use foreshore_hub::clock::HubClock;
use foreshore_hub::controller::apps::{self, Resolved};
use foreshore_hub::controller::ingest::{self, Inbound, Message};
use foreshore_hub::controller::{ControlError, Controller, Listening};
use foreshore_hub::rollout::{
    Facts, Fleet, Member, News, Opening, Policy, Pulse, Report, Rollout, UnixMs, advance,
    advance_by,
};
use foreshore_hub::store::{self, Store, StoreError};
use foreshore_protocol::id::Labels;
use foreshore_protocol::manifest::{Amount, WaveTarget};
use foreshore_protocol::message::{AppStatus, Inventory, Phase, Presence, Reported};
use foreshore_protocol::release::Release;
use foreshore_protocol::{DeviceId, Digest, Version, manifest};

/// A tenth of the devices switch at once; who succeeds makes room for the next.
const MANIFEST: &str = "apiVersion: foreshore/v1
kind: App
metadata: {name: shop}
spec:
  selector: {matchLabels: {role: web}}
  services: {web: {image: 'a:1'}}
  rollout: {waves: [{percent: 90}], soak: 0s, bake: 0s, maxUnavailable: 10%}
";

/// Messages that share a transaction while the devices join, as the link takes them in.
const BATCH: usize = 512;

/// Reports that share a transaction: as many as hold slots in the smallest rollout.
const REPORTS: usize = 100;

/// How many such transactions are measured.
const ROUNDS: usize = 5;

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [devices, reports, directory] = arguments.as_slice() else {
        anyhow::bail!("usage: rollout DEVICES REPORTS DIRECTORY");
    };
    let devices: usize = devices.parse()?;
    // Every device succeeds once at most.
    let reports = reports.parse::<usize>()?.min(devices / 2);
    let alone = alone(devices, reports)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()?;
    let whole = runtime.block_on(transactions(devices, reports, Path::new(directory)))?;
    let everybody = runtime.block_on(everybody(devices, Path::new(directory)))?;
    println!(
        "{devices:>8} {:>9.1} {:>9.1} {:>9.0} {:>11.1} {:>9.0} {:>9.0} {:>9.0} {:>9.0} {:>9.2} {:>9.2} {:>7.0} {:>9.2} \
         {:>9.2} {:>9.2}",
        alone.each.median,
        alone.each.p99,
        alone.each.max,
        alone.everything_ms,
        whole.bare.median,
        whole.single.median,
        whole.single.p99,
        whole.batched_us,
        whole.open_s,
        whole.cold_s,
        alone.bytes_per_device,
        everybody.apply_s,
        everybody.worst_s,
        everybody.all_s,
    );
    Ok(())
}

/// Microseconds.
struct Times {
    median: f64,
    p99: f64,
    max: f64,
}

impl Times {
    fn of(mut each: Vec<Duration>) -> Self {
        each.sort_unstable();
        let us = |time: Duration| time.as_secs_f64() * 1e6;
        let at = |index: usize| each.get(index).copied().map_or(0.0, us);
        Self {
            median: at(each.len() / 2),
            p99: at(each.len() * 99 / 100),
            max: at(each.len().saturating_sub(1)),
        }
    }
}

fn name(number: usize) -> anyhow::Result<DeviceId> {
    Ok(format!("device-{number:06}").parse()?)
}

fn resolved() -> anyhow::Result<Resolved> {
    let app = manifest::parse(MANIFEST.as_bytes())?;
    let mut services = app.spec.services.clone();
    for service in services.values_mut() {
        service.image = format!("docker.io/library/a@{}", Digest::of(b"1"));
    }
    let release = Release {
        schema: 1,
        app: app.metadata.name.clone(),
        services,
        image_pull_secrets: app.spec.image_pull_secrets.clone(),
    };
    let bytes = release.to_canonical_json();
    Ok(Resolved {
        digest: Digest::of(&bytes),
        app,
        bytes,
        release,
    })
}

/// Resident bytes of this process.
fn resident() -> anyhow::Result<u64> {
    let statm = std::fs::read_to_string("/proc/self/statm")?;
    let pages: u64 = statm
        .split_whitespace()
        .nth(1)
        .context("no resident pages")?
        .parse()?;
    Ok(pages * 4096)
}

struct Alone {
    each: Times,
    everything_ms: f64,
    bytes_per_device: f64,
}

/// The engine without a store.
#[expect(clippy::cast_precision_loss, reason = "figures for people")]
fn alone(devices: usize, reports: usize) -> anyhow::Result<Alone> {
    let resolved = resolved()?;
    let now = UnixMs(1_800_000_000_000);
    let before = resident()?;
    let mut members = Vec::new();
    for number in 0..devices {
        members.push(Member {
            device: name(number)?,
            placement: None,
            phase: None,
            labels: Labels::new(),
        });
    }
    let online = || Facts {
        online: true,
        ..Facts::default()
    };
    let facts: BTreeMap<_, _> = members
        .iter()
        .map(|member| (member.device.clone(), online()))
        .collect();
    let mut rollout = Rollout::open(Opening {
        id: 1,
        app: resolved.app.metadata.name.clone(),
        from: None,
        to: resolved.digest,
        seed: 7,
        policy: Policy::freeze(&resolved.app.spec.rollout, devices),
        members,
        before: None,
        now,
    });
    let mut fleet = Fleet {
        devices: facts,
        pulse: Pulse {
            recent: devices as u64,
            dark: 0,
        },
        listening_since: Some(UnixMs(0)),
        settle_ms: 0,
        offers_at_once: u32::MAX,
    };
    let mut written = 0;
    let mut offered = std::collections::VecDeque::new();
    let mut apply = |rollout: &mut Rollout, step: foreshore_hub::rollout::Step| {
        for action in &step.actions {
            let version = action.writes().map(|(device, _)| {
                written += 1;
                offered.push_back((device.clone(), written));
                Version::from_numbers(1, written)
            });
            rollout.apply(action, version.transpose()?, now);
        }
        let turn = offered.pop_front();
        anyhow::Ok(turn)
    };
    let step = advance_by(&mut rollout, &fleet, &News::All, now);
    let mut turn = apply(&mut rollout, step)?;
    let bytes_per_device = resident()?.saturating_sub(before) as f64 / devices as f64;
    let mut each = Vec::new();
    for _ in 0..reports {
        let Some((device, since)) = turn else { break };
        let report = Report {
            since: Version::from_numbers(1, since)?,
            release: rollout.to,
            phase: Phase::Succeeded,
            reason: None,
            has: None,
        };
        let facts = fleet.devices.entry(device.clone()).or_default();
        facts.report = Some(report);
        let news = News::Devices(BTreeSet::from([device]));
        let begun = Instant::now();
        let step = advance_by(&mut rollout, &fleet, &news, now);
        turn = apply(&mut rollout, step)?;
        each.push(begun.elapsed());
    }
    ensure!(!each.is_empty(), "nothing was offered");
    let begun = Instant::now();
    let step = advance(&rollout, &fleet, now);
    let everything_ms = begun.elapsed().as_secs_f64() * 1e3;
    ensure!(
        step.actions.is_empty(),
        "something was overlooked: {step:?}"
    );
    Ok(Alone {
        each: Times::of(each),
        everything_ms,
        bytes_per_device,
    })
}

struct Whole {
    bare: Times,
    single: Times,
    batched_us: f64,
    open_s: f64,
    cold_s: f64,
}

/// The engine with its store, as the hub runs it.
#[expect(clippy::cast_precision_loss, reason = "figures for people")]
async fn transactions(devices: usize, reports: usize, directory: &Path) -> anyhow::Result<Whole> {
    let path = directory.join(format!("{devices}.db"));
    let (store, writer) = Store::open(&path)?;
    let controller = start(store.clone());
    join(&controller, devices).await?;
    let resolved = resolved()?;
    let begun = Instant::now();
    let answer = controller
        .change(move |change| apps::apply(change, &resolved, 7))
        .await?;
    let open_s = begun.elapsed().as_secs_f64();
    let rollout = answer.rollout.context("no rollout was opened")?;

    let mut bare = Vec::new();
    for number in 0..reports.min(500) {
        let begun = Instant::now();
        let write = move |connection: &rusqlite::Connection| {
            let sql = "UPDATE meta SET value = max(value, ?1) WHERE key = 'latest_ms'";
            connection.execute(sql, [1_u64 << 40 | number as u64])?;
            Ok::<_, StoreError>(())
        };
        store.write(write).await?;
        bare.push(begun.elapsed());
    }
    let mut single = Vec::new();
    while single.len() < reports / 2 {
        let room = reports / 2 - single.len();
        let batch = successes(&store, rollout, room.min(REPORTS)).await?;
        ensure!(!batch.is_empty(), "nothing is offered any more");
        for report in batch {
            let begun = Instant::now();
            hear(&controller, vec![report]).await?;
            controller.round().await?;
            single.push(begun.elapsed());
        }
    }
    let mut batched = Vec::new();
    for _ in 0..ROUNDS {
        let batch = successes(&store, rollout, REPORTS).await?;
        ensure!(!batch.is_empty(), "nothing is offered any more");
        let size = batch.len() as f64;
        let begun = Instant::now();
        hear(&controller, batch).await?;
        controller.round().await?;
        batched.push(begun.elapsed().as_secs_f64() * 1e6 / size);
    }
    batched.sort_by(f64::total_cmp);
    let batched_us = batched[ROUNDS / 2];
    drop(controller);

    // A hub that was just started has nothing in memory.
    let cold = start(store.clone());
    let report = successes(&store, rollout, 1).await?;
    let begun = Instant::now();
    hear(&cold, report).await?;
    cold.round().await?;
    let cold_s = begun.elapsed().as_secs_f64();
    drop((cold, store));
    tokio::task::spawn_blocking(|| writer.join()).await?;
    Ok(Whole {
        bare: Times::of(bare),
        single: Times::of(single),
        batched_us,
        open_s,
        cold_s,
    })
}

struct Everybody {
    apply_s: f64,
    worst_s: f64,
    all_s: f64,
}

/// A release for everybody at once, while nothing else happens: how long the command takes, the longest look after it, and
/// all of them.
async fn everybody(devices: usize, directory: &Path) -> anyhow::Result<Everybody> {
    let path = directory.join(format!("{devices}-everybody.db"));
    let (store, writer) = Store::open(&path)?;
    let controller = start(store.clone());
    join(&controller, devices).await?;
    let mut resolved = resolved()?;
    let policy = &mut resolved.app.spec.rollout;
    policy.waves = vec![WaveTarget::Percent(100).into()];
    policy.max_unavailable = Amount::Percent(100);
    let begun = Instant::now();
    let answer = controller
        .change(move |change| apps::apply(change, &resolved, 7))
        .await?;
    let apply_s = begun.elapsed().as_secs_f64();
    let rollout = answer.rollout.context("no rollout was opened")?;
    let mut worst_s = 0.0_f64;
    loop {
        let holding = move |connection: &rusqlite::Connection| {
            Ok::<_, StoreError>(store::rollout::holding_slots(connection, rollout)?.len())
        };
        let look = Instant::now();
        controller.round().await?;
        worst_s = worst_s.max(look.elapsed().as_secs_f64());
        if store.read(holding).await? == devices {
            break;
        }
    }
    let all_s = begun.elapsed().as_secs_f64();
    drop((controller, store));
    tokio::task::spawn_blocking(|| writer.join()).await?;
    Ok(Everybody {
        apply_s,
        worst_s,
        all_s,
    })
}

fn start(store: Store) -> Controller {
    let controller = Controller::new(store, HubClock::start(UnixMs(0)));
    controller.set_listening(Listening {
        since: Some(UnixMs(0)),
        settle_ms: 0,
    });
    controller
}

async fn hear(controller: &Controller, batch: Vec<Inbound>) -> Result<(), ControlError> {
    let heard = controller.change(move |change| ingest::ingest(change, &batch));
    heard.await.map(drop)
}

/// Every device connects and says what it is.
async fn join(controller: &Controller, devices: usize) -> anyhow::Result<()> {
    let mut batch = Vec::new();
    for number in 0..devices {
        let device = name(number)?;
        let birth = Message::Presence(Presence {
            session: 1,
            online: true,
            boot: 1,
            version: None,
            reported_seq: 0,
            max_schema: 1,
            agent_version: "bench".to_owned(),
            secrets_key: None,
            secrets: None,
        });
        let report = Message::Reported(reported(1, None, Vec::new())?);
        batch.extend([birth, report].map(|message| Inbound {
            device: device.clone(),
            retained: false,
            message,
        }));
        if batch.len() >= BATCH {
            hear(controller, std::mem::take(&mut batch)).await?;
        }
    }
    Ok(hear(controller, batch).await?)
}

fn reported(seq: u64, version: Option<Version>, apps: Vec<AppStatus>) -> anyhow::Result<Reported> {
    let inventory = Inventory {
        agent_version: "bench".to_owned(),
        arch: "amd64".to_owned(),
        kernel: "6".to_owned(),
        memory_bytes: 1 << 30,
        disk_bytes: 1 << 34,
        disk_free_bytes: 1 << 33,
        labels: Labels::from([("role".parse()?, "web".parse()?)]),
        disk_reserve_bytes: None,
        metered: None,
        dev_nodes: None,
    };
    Ok(Reported {
        boot: 1,
        seq,
        version,
        inventory,
        apps,
    })
}

/// What so many of the devices that were offered the release say when they are done with it.
async fn successes(store: &Store, rollout: u64, count: usize) -> anyhow::Result<Vec<Inbound>> {
    let find = move |connection: &rusqlite::Connection| {
        let holding = store::rollout::holding_slots(connection, rollout)?;
        let mut heads = Vec::new();
        for (device, _) in holding.into_iter().take(count) {
            let head = store::desired::head(connection, &device)?;
            heads.extend(head.map(|head| (device, head)));
        }
        Ok::<_, StoreError>(heads)
    };
    let mut inbound = Vec::new();
    for (device, head) in store.read(find).await? {
        let apps = head.apps.into_iter().map(|app| AppStatus {
            app: app.app,
            since: app.since,
            release: app.release,
            phase: Phase::Succeeded,
            reason: None,
            running: Some(app.release),
            last_known_good: Some(app.release),
            services: Vec::new(),
        });
        let message = Message::Reported(reported(2, Some(head.version), apps.collect())?);
        inbound.push(Inbound {
            device,
            retained: false,
            message,
        });
    }
    Ok(inbound)
}
