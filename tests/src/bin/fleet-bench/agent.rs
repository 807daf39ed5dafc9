//! One real agent with real containers behind a wire that counts, to compare simulated devices with.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use bytes::BytesMut;
use e2e::fleet::import;
use e2e::image::Builder;
use e2e::{Bed, Device, Fleet, Hub};
use serde_json::{Value, json};

use crate::sessions::next;
use crate::tally::{Count, Tally, Way};
use crate::{AT_ONCE, BUDGET, manifest};

/// A beacon comes within a minute after an update; with time for what else is on its way.
const QUIET_WITHIN: Duration = Duration::from_secs(120);

/// What one agent sends and receives for changes of its one app, each with another image: the name and the count of each.
///
/// # Errors
///
/// When the agent does not get through them.
pub(crate) fn measure() -> anyhow::Result<Vec<(&'static str, Count)>> {
    eprintln!("one real agent");
    let bed = Bed::new("fleet-agent");
    let builder = Builder::new(&bed);
    let hub = Hub::start(&bed);
    let tally = Arc::new(Tally::default());
    let wire = listen(hub.broker(), &tally)?;
    let mut device = Device::configure(
        &bed,
        &format!("mqtt://{wire}"),
        hub.url(),
        &hub.join_token_file(),
        &crate::device::name(0),
        "role = \"web\"",
        "",
    );
    at_its_own_pace(device.config())?;
    device.restart();
    let fleet = Fleet {
        devices: vec![device],
        hub,
    };
    fleet.await_online(1);
    let api = fleet.api();
    let mut counts = Vec::new();
    for (number, name) in ["install", "update", "by-lease"].into_iter().enumerate() {
        if name == "by-lease" {
            api.send("PUT", "/disruption-budgets/all", BUDGET.as_bytes())
                .ok();
            await_quiet(&tally)?;
        }
        let tag = format!("v{number}");
        builder.web(&tag, &tag, true);
        let image = import(&api, &builder, &tag);
        let before = tally.count();
        api.apply("fleet", &manifest(&image, number, AT_ONCE)).ok();
        fleet.await_rollout("fleet", "completed");
        let beacons = |count: &Count| count.publishes.get("beacon").copied();
        let begin = Instant::now();
        while beacons(&tally.count()) == beacons(&before) {
            ensure!(begin.elapsed() < QUIET_WITHIN, "the agent sends no beacon");
            std::thread::sleep(Duration::from_millis(100));
        }
        await_quiet(&tally)?;
        counts.push((name, tally.count() - before));
    }
    Ok(counts)
}

/// For people.
pub(crate) fn told(counts: &[(&'static str, Count)]) -> String {
    let line = |(name, count): &(&str, Count)| {
        let way = |way: Way| {
            format!(
                "{} packets, {} PUBLISH, {} bytes",
                way.packets, way.publishes, way.bytes
            )
        };
        format!(
            "  {name}: up {}; down {}; PUBLISH by topic: {:?}\n",
            way(count.up),
            way(count.down),
            count.publishes
        )
    };
    let lines: String = counts.iter().map(line).collect();
    format!("one real agent\n{lines}")
}

/// For programs.
pub(crate) fn json(counts: &[(&'static str, Count)]) -> Value {
    let way =
        |way: Way| json!({"packets": way.packets, "publishes": way.publishes, "bytes": way.bytes});
    let one = |(name, count): &(&str, Count)| json!({"name": name, "up": way(count.up), "down": way(count.down), "publishes": count.publishes});
    json!({"agent": counts.iter().map(one).collect::<Vec<_>>()})
}

/// Tests make their agents hasty; this one is as it comes.
fn at_its_own_pace(config: &std::path::Path) -> anyhow::Result<()> {
    let text = std::fs::read_to_string(config)?;
    let hasty = ["report_interval", "reconnect_max", "keepalive"];
    let lines = text
        .lines()
        .filter(|line| !hasty.iter().any(|key| line.starts_with(key)));
    let text = lines.collect::<Vec<_>>().join("\n");
    std::fs::write(config, text)?;
    Ok(())
}

fn await_quiet(tally: &Tally) -> anyhow::Result<()> {
    let (begin, mut before) = (Instant::now(), tally.count());
    loop {
        std::thread::sleep(Duration::from_secs(6));
        let now = tally.count();
        if now == before {
            return Ok(());
        }
        ensure!(
            begin.elapsed() < QUIET_WITHIN,
            "the agent does not become quiet"
        );
        before = now;
    }
}

/// Passes connections on to the broker and counts their packets. It ends with the process.
fn listen(broker: &str, tally: &Arc<Tally>) -> anyhow::Result<SocketAddr> {
    let broker: SocketAddr =
        (broker.trim_start_matches("mqtt://").parse()).context("the broker is at an address")?;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let here = listener.local_addr()?;
    let tally = Arc::clone(tally);
    std::thread::spawn(move || {
        for device in listener.incoming().flatten() {
            let Ok(broker) = TcpStream::connect(broker) else {
                continue;
            };
            let ends = || Some((device.try_clone().ok()?, broker.try_clone().ok()?));
            let Some((from, to)) = ends() else { continue };
            let (up, down) = (Arc::clone(&tally), Arc::clone(&tally));
            std::thread::spawn(move || pass(from, to, |packet, bytes| up.up(packet, bytes)));
            std::thread::spawn(move || {
                pass(broker, device, |packet, bytes| down.down(packet, bytes));
            });
        }
    });
    Ok(here)
}

fn pass(mut from: TcpStream, mut to: TcpStream, count: impl Fn(&rumqttc::Packet, usize)) {
    let (mut buffer, mut packets) = (vec![0; 64 << 10], BytesMut::new());
    while let Ok(read @ 1..) = from.read(&mut buffer) {
        if to.write_all(&buffer[..read]).is_err() {
            break;
        }
        packets.extend_from_slice(&buffer[..read]);
        while let Ok(Some((packet, bytes))) = next(&mut packets) {
            count(&packet, bytes);
        }
    }
    // Either end may be gone already.
    _ = to.shutdown(Shutdown::Write);
    _ = from.shutdown(Shutdown::Read);
}
