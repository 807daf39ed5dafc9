//! A release that can only be reached from some others (`requiresFrom`), with real devices.

use e2e::api::Api;
use e2e::fleet::{Fleet, LONG, app_status, import, web_manifest};
use e2e::image::Builder;
use e2e::{Bed, Device, Hub, wait_for};
use serde_json::Value;

/// The 12 digits by which people name a release.
fn short(release: &Value) -> String {
    let release = release.as_str().unwrap_or_default();
    let hex = release.trim_start_matches("sha256:");
    hex.get(..12).unwrap_or_default().to_owned()
}

fn manifest(image: &str, from: &[&str]) -> String {
    let mut manifest = web_manifest("shop", image, "[{percent: 100}]");
    if !from.is_empty() {
        let quoted: Vec<String> = from.iter().map(|from| format!("\"{from}\"")).collect();
        manifest.push_str(&format!("    requiresFrom: [{}]\n", quoted.join(", ")));
    }
    manifest
}

/// The releases that a device took on its way, as the hub tells of them.
fn steps(api: &Api, device: &str) -> Vec<String> {
    let events = api.get("/events?limit=1000").ok();
    let events = events["items"].as_array().expect("a list of events");
    events
        .iter()
        .filter(|event| event["kind"] == "device-stepped" && event["device"] == device)
        .map(|event| event["message"].as_str().unwrap_or_default().to_owned())
        .collect()
}

fn await_release(api: &Api, device: &str, release: &Value) {
    wait_for(&format!("{device} to run {release}"), LONG, || {
        let view = api.device(device);
        let well = app_status(&view, "shop")["lastKnownGood"] == *release;
        if well { Ok(()) } else { Err(view) }
    });
}

#[test]
fn a_device_that_missed_a_release_takes_it_first_and_others_go_straight() {
    let bed = Bed::new("steps");
    let builder = Builder::new(&bed);
    for (tag, text) in [
        ("v1", "one"),
        ("v2", "two"),
        ("v3", "three"),
        ("v4", "four"),
    ] {
        builder.web(tag, text, true);
    }
    let mut fleet = Fleet::start(&bed, Hub::start(&bed), 3);
    let api = fleet.api();
    let images = ["v1", "v2", "v3", "v4"].map(|tag| import(&api, &builder, tag));

    let refused = api.apply("shop", &manifest(&images[0], &["0123456789ab"]));
    assert_eq!((refused.status, refused.code()), (422, "unknown-release"));
    assert_eq!(api.get("/apps/shop").status, 404, "nothing came of it");

    let first = api.apply("shop", &manifest(&images[0], &[])).ok()["release"].clone();
    fleet.await_rollout("shop", "completed");
    fleet.devices[2].terminate();
    wait_for("the hub to miss a device", LONG, || {
        let view = api.device("device-3");
        if view["online"] == false {
            Ok(())
        } else {
            Err(view)
        }
    });
    let second = api.apply("shop", &manifest(&images[1], &[])).ok()["release"].clone();
    fleet.await_rollout("shop", "completed");

    // Two releases at once that build on each other.
    let third = manifest(&images[2], &[&short(&second)]);
    let third = api.apply("shop", &third).ok()["release"].clone();
    fleet.await_rollout("shop", "completed");
    let fourth = manifest(&images[3], &[&short(&third)]);
    let plan = api.send("POST", "/apps/shop/plan", fourth.as_bytes()).ok();
    let said = format!(
        "1 devices cannot go there from what they have and take release {} first",
        short(&second)
    );
    assert!(plan["warnings"].to_string().contains(&said), "{plan}");
    let fourth = api.apply("shop", &fourth).ok()["release"].clone();
    fleet.await_rollout("shop", "completed");

    fleet.devices[2].restart();
    await_release(&api, "device-3", &fourth);
    let on_its_way = steps(&api, "device-3");
    assert_eq!(on_its_way.len(), 2, "{on_its_way:?}");
    for (said, step) in on_its_way.iter().zip([&second, &third]) {
        assert!(said.contains(&short(step)), "{on_its_way:?}, {step}");
    }
    for device in ["device-1", "device-2"] {
        await_release(&api, device, &fourth);
        assert_eq!(steps(&api, device), Vec::<String>::new());
    }

    // One that has nothing of the app has nothing to build on, and one that goes back needs no way.
    let _new = Device::start(&bed, &fleet.hub, "device-4", "role = \"web\"");
    await_release(&api, "device-4", &fourth);
    api.send("POST", "/apps/shop/undo", b"").ok();
    fleet.await_rollout("shop", "completed");
    for device in ["device-1", "device-2", "device-3", "device-4"] {
        await_release(&api, device, &third);
        assert!(
            !steps(&api, device)
                .iter()
                .any(|said| said.contains(&short(&first)))
        );
    }
    assert_eq!(steps(&api, "device-4"), Vec::<String>::new());
}
