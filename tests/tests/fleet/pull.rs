//! What an operator sees of a slow pull while it goes on.

use std::process::Command;
use std::time::{Duration, Instant};

use e2e::fleet::{Fleet, LONG, import, web_manifest};
use e2e::image::Builder;
use e2e::process::programs;
use e2e::{Bed, Device, Hub, wait_for};
use serde_json::Value;

/// The command line's answer.
fn told(hub: &Hub, arguments: &[&str]) -> String {
    let output = Command::new(programs().join("foreshore"))
        .args(arguments)
        .env("FORESHORE_HUB", hub.url())
        .env("FORESHORE_TOKEN_FILE", hub.data().join("api-token"))
        .output()
        .expect("it runs");
    assert!(output.status.success(), "{output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn a_slow_pull_says_how_far_it_is_and_how_long_it_takes() {
    let bed = Bed::new("slowpull");
    let builder = Builder::new(&bed);
    builder.web("v1", "one", true);
    let hub = Hub::start(&bed);
    let image = import(&hub.api(), &builder, "v1");
    let size = hub.api().get("/images").ok()["items"][0]["sizeBytes"]
        .as_u64()
        .expect("it has a size");
    // Twelve seconds or so, whatever busybox measures here.
    let slow = format!("[pull]\nrate_limit = \"{}k\"\n", size / 12 / 1024);
    let token = hub.join_token_file();
    let labels = "role = \"web\"";
    let mut device = Device::configure(
        &bed,
        hub.broker(),
        hub.url(),
        &token,
        "device-1",
        labels,
        &slow,
    );
    device.restart();
    let fleet = Fleet {
        devices: vec![device],
        hub,
    };
    fleet.await_online(1);
    let manifest = web_manifest("shop", &image, "[{percent: 100}]");
    let applied = fleet.api().apply("shop", &manifest).ok();

    let seen = |view: &Value| view["pull"]["images"][0].clone();
    let first = wait_for("the device to tell of its pull", LONG, || {
        let view = fleet.api().device("device-1");
        if seen(&view)["fetchedBytes"].as_u64() > Some(0) {
            Ok((Instant::now(), view["pull"].clone()))
        } else {
            Err(view)
        }
    });
    assert_eq!(first.1["release"], applied["release"]);
    // The device itself says it too, also to who has no hub at hand.
    let here = wait_for("the device to tell on the spot", LONG, || {
        let status = fleet.devices[0].status()?;
        match status["pull"]["images"][0]["fetchedBytes"].as_u64() {
            Some(1..) => Ok(status["pull"].clone()),
            _ => Err(status.to_string()),
        }
    });
    assert_eq!(here["release"], applied["release"]);
    let fetches = &here["images"][0];
    assert!(here["rateBytes"].as_u64() > Some(0), "{here}");
    assert!(
        fetches["totalBytes"].as_u64() > fetches["fetchedBytes"].as_u64(),
        "{here}"
    );
    assert!(fetches["remainingS"].as_u64() > Some(0), "{here}");
    let words = Command::new(programs().join("foreshore-agent"))
        .args(["status", "--config"])
        .arg(fleet.devices[0].config())
        .output()
        .expect("it runs");
    let words = String::from_utf8_lossy(&words.stdout).into_owned();
    assert!(
        words.contains("fetches images") && words.contains("/s, "),
        "{words}"
    );
    let part = fleet.api().rollout("shop")["assignments"][0].clone();
    assert_eq!(part["pull"]["release"], applied["release"], "{part}");
    let described = told(&fleet.hub, &["describe", "device", "device-1"]);
    assert!(described.contains("Fetches:"), "{described}");
    assert!(
        told(&fleet.hub, &["describe", "rollout", "shop"]).contains("image 1 of 1"),
        "{part}"
    );

    // Each thing that is told, and when it was first seen.
    let mut told: Vec<(Instant, Value)> = vec![first];
    wait_for("the pull to end", LONG, || {
        let view = fleet.api().device("device-1");
        let pull = &view["pull"];
        if !pull.is_null() && told.last().is_some_and(|(_, last)| last != pull) {
            told.push((Instant::now(), pull.clone()));
        }
        if pull.is_null() { Ok(()) } else { Err(view) }
    });
    assert!(told.len() >= 3, "{told:?}");
    // One in two seconds; the network may hold one back for a moment.
    let took = told[told.len() - 1].0 - told[0].0;
    let least = Duration::from_secs(2) * u32::try_from(told.len() - 1).expect("few");
    assert!(took + Duration::from_secs(1) >= least, "{told:?}");
    let mut before = 0;
    for (_, pull) in &told {
        let image = &pull["images"][0];
        if image["state"] != "fetching" {
            continue;
        }
        let number = |name: &str| image[name].as_u64().unwrap_or_else(|| panic!("{pull}"));
        let (fetched, total) = (number("fetchedBytes"), number("totalBytes"));
        assert!(before <= fetched && fetched <= total, "{told:?}");
        assert!(total <= size, "{told:?}");
        before = fetched;
        let rate = pull["rateBytes"].as_u64().expect("a number");
        // A bucket lets a little more through at first.
        assert!(rate > 0 && rate < size / 3, "{told:?}");
        assert_eq!(number("remainingS"), (total - fetched).div_ceil(rate));
    }
    fleet.await_rollout("shop", "completed");
    let status = fleet.devices[0].status().expect("the agent runs");
    assert!(status["pull"].is_null(), "{status}");
}
