//! What an operator can do to a rollout besides watching it, through the command line and with real devices.

use std::process::{Command, Output};

use e2e::fleet::{Fleet, LONG, app_status, import, web_manifest};
use e2e::image::Builder;
use e2e::process::programs;
use e2e::{Bed, Device, Hub, wait_for};
use serde_json::Value;

fn foreshore(hub: &Hub, arguments: &[&str]) -> Output {
    Command::new(programs().join("foreshore"))
        .args(arguments)
        .env("FORESHORE_HUB", hub.url())
        .env("FORESHORE_TOKEN_FILE", hub.data().join("api-token"))
        .output()
        .expect("it runs")
}

/// What it says when it ends well.
fn told(hub: &Hub, arguments: &[&str]) -> String {
    let output = foreshore(hub, arguments);
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn part(rollout: &Value, device: &str) -> Value {
    let parts = rollout["assignments"].as_array().into_iter().flatten();
    parts
        .into_iter()
        .find(|part| part["device"] == device)
        .cloned()
        .unwrap_or_default()
}

fn await_release(fleet: &Fleet, device: &str, release: &Value) {
    wait_for(&format!("{device} to run {release}"), LONG, || {
        let view = fleet.api().device(device);
        let well = app_status(&view, "shop")["lastKnownGood"] == *release;
        if well { Ok(()) } else { Err(view) }
    });
}

#[test]
fn waves_wait_for_approval_held_devices_stay_out_and_latecomers_come_last() {
    let bed = Bed::new("steering");
    let builder = Builder::new(&bed);
    builder.web("v1", "one", true);
    let mut fleet = Fleet::start(&bed, Hub::start(&bed), 4);
    let image = import(&fleet.api(), &builder, "v1");
    let hub = &fleet.hub;
    assert_eq!(
        told(
            hub,
            &["device", "hold", "device-3", "--reason", "a demonstration"]
        ),
        "device/device-3 held\n"
    );
    let waves = "[{count: 1, approval: true}, {percent: 100}]";
    let applied = fleet
        .api()
        .apply("shop", &web_manifest("shop", &image, waves))
        .ok();
    let release = &applied["release"];

    let rollout = wait_for("the first wave to wait", LONG, || {
        let rollout = fleet.api().rollout("shop");
        if rollout["waves"][0]["state"] == "awaiting-approval" {
            Ok(rollout)
        } else {
            Err(rollout)
        }
    });
    let status = foreshore(hub, &["rollout", "status", "-w", "shop"]);
    assert_eq!(status.status.code(), Some(4), "{status:?}");
    let said = String::from_utf8_lossy(&status.stdout).into_owned();
    assert!(
        said.contains("wave 1: awaiting-approval, 1/1 succeeded"),
        "{said}"
    );
    let status = foreshore(hub, &["rollout", "status", "shop"]);
    let said = String::from_utf8_lossy(&status.stdout).into_owned();
    assert!(said.contains("`foreshore rollout approve shop`"), "{said}");
    let waiting = ["device-1", "device-2", "device-4"]
        .into_iter()
        .find(|device| part(&rollout, device)["state"] == "planned")
        .expect("two devices are in the second wave");
    let why = told(hub, &["explain", "device", waiting]);
    assert!(why.contains("waits for: its approval"), "{why}");
    let why = told(hub, &["explain", "device", "device-3"]);
    assert!(
        why.contains("an operator holds it: a demonstration"),
        "{why}"
    );

    told(hub, &["rollout", "approve", "shop"]);
    let again = foreshore(hub, &["rollout", "approve", "shop"]);
    assert!(!again.status.success(), "{again:?}");
    let said = String::from_utf8_lossy(&again.stderr).into_owned();
    assert!(
        said.contains("no wave of it waits for an approval") || said.contains("completed"),
        "{said}"
    );

    // Nobody waits for the one that is held.
    let rollout = fleet.await_rollout("shop", "completed");
    for device in ["device-1", "device-2", "device-4"] {
        await_release(&fleet, device, release);
    }
    assert_eq!(part(&rollout, "device-3")["state"], "deferred", "{rollout}");
    assert_eq!(rollout["tail"]["devices"], 1, "{rollout}");
    assert_eq!(
        app_status(&fleet.api().device("device-3"), "shop"),
        Value::Null
    );
    told(hub, &["device", "release", "device-3"]);
    await_release(&fleet, "device-3", release);

    let late = Device::start(&bed, &fleet.hub, "device-5", "role = \"web\"");
    fleet.devices.push(late);
    await_release(&fleet, "device-5", release);
    let rollout = fleet.api().rollout("shop");
    assert_eq!(rollout["tail"]["devices"], 2, "{rollout}");
    assert_eq!(part(&rollout, "device-5")["tail"], true, "{rollout}");
    assert!(told(&fleet.hub, &["rollout", "status", "shop"]).contains("after the last wave"));
}
