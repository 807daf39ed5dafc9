//! Releases go out in waves, bad ones go back, and a hub that dies in between goes on.

use foreshore_protocol::message::Phase;
use serde_json::{Value, json};

use crate::bed::{Bed, Kind, manifest, wait_for, wait_until};
use crate::device::Device;

fn states(rollout: &Value) -> Vec<&str> {
    rollout["waves"]
        .as_array()
        .unwrap()
        .iter()
        .map(|wave| wave["state"].as_str().unwrap())
        .collect()
}

/// The image digest that a release of `app` pins, as devices see it.
fn image_digest(bed: &Bed, tag: &str) -> String {
    let images = bed.get("/images");
    let found = images["items"].as_array().unwrap().iter().find(|image| {
        image["reference"]
            .as_str()
            .unwrap()
            .ends_with(&format!(":{tag}"))
    });
    found.unwrap()["digest"].as_str().unwrap().to_owned()
}

#[test]
fn a_list_of_rollouts_has_the_devices_of_the_first_only() {
    let bed = Bed::start(Kind::Embedded);
    let _devices = Device::fleet(&bed, 3);
    for tag in ["v1", "v2", "v3"] {
        let image = bed.import(tag);
        bed.apply("shop", &manifest("shop", &image, "[{count: 1}]"));
        bed.await_rollout("shop", "completed");
    }
    let list = bed.get("/rollouts?limit=100");
    let items = list["items"].as_array().unwrap();
    let listed: Vec<usize> = items
        .iter()
        .map(|rollout| rollout["assignments"].as_array().unwrap().len())
        .collect();
    assert_eq!(listed, [3, 0, 0], "{list}");
    for rollout in items {
        let whole = bed.get(&format!("/rollouts/{}", rollout["id"]));
        assert_eq!(whole["assignments"].as_array().unwrap().len(), 3);
        assert_eq!(rollout["waves"], whole["waves"], "the numbers are the same");
        let devices = rollout["waves"].as_array().unwrap().iter();
        let succeeded: u64 = devices
            .map(|wave| wave["succeeded"].as_u64().unwrap())
            .sum();
        assert_eq!(succeeded, 3);
    }
}

fn goes_out_in_waves_and_a_broken_one_goes_back(kind: Kind) {
    let bed = Bed::start(kind);
    let devices = Device::fleet(&bed, 5);
    let [v1, v2, v3] = ["v1", "v2", "v3"].map(|tag| bed.import(tag));
    let waves = "[{count: 1}, {percent: 60}]";

    let (status, plan) = bed.call(
        "POST",
        "/apps/shop/plan",
        manifest("shop", &v1, waves).as_bytes(),
    );
    assert_eq!(status, 200, "{plan}");
    assert_eq!(plan["outcome"], "created");
    let sizes: Vec<_> = plan["waves"]
        .as_array()
        .unwrap()
        .iter()
        .map(|wave| wave["devices"].as_array().unwrap().len())
        .collect();
    assert_eq!(sizes, [1, 2, 2]);
    assert_eq!(
        bed.get("/apps")["items"],
        json!([]),
        "a plan changes nothing"
    );

    let applied = bed.apply("shop", &manifest("shop", &v1, waves));
    assert_eq!(
        (&applied["outcome"], &applied["devices"]),
        (&json!("created"), &json!(5))
    );
    assert_eq!(applied["release"], plan["release"]);
    let rollout = bed.await_rollout("shop", "completed");
    assert_eq!(states(&rollout), ["passed"; 3]);
    for device in &devices {
        assert_eq!(
            device.running("shop").unwrap().to_string(),
            applied["release"].as_str().unwrap()
        );
    }
    let app = bed.get("/apps/shop");
    assert_eq!(
        (&app["upToDate"], &app["release"]),
        (&json!(5), &applied["release"])
    );

    // An equal release is a no-op: no rollout, no new generation.
    let before: Vec<_> = devices
        .iter()
        .map(|device| device.state().heads.len())
        .collect();
    let again = bed.apply("shop", &manifest("shop", &v1, waves));
    assert_eq!(
        (&again["outcome"], &again["rollout"]),
        (&json!("unchanged"), &Value::Null)
    );
    let after: Vec<_> = devices
        .iter()
        .map(|device| device.state().heads.len())
        .collect();
    assert_eq!(before, after);

    let second = bed.apply("shop", &manifest("shop", &v2, waves));
    bed.await_rollout("shop", "completed");

    // The third is broken: only the first device ever sees it.
    let broken = image_digest(&bed, "v3");
    for device in &devices {
        device.state().broken.insert(broken.clone());
    }
    let third = bed.apply("shop", &manifest("shop", &v3, waves));
    let rollout = bed.await_rollout("shop", "rolled-back");
    assert_eq!(rollout["to"], third["release"]);
    assert_eq!(states(&rollout), ["failed", "pending", "pending"]);
    let third_release = third["release"].as_str().unwrap();
    let tried = devices.iter().filter(|device| {
        device
            .state()
            .activated
            .iter()
            .any(|release| release.to_string() == third_release)
    });
    assert_eq!(tried.count(), 1, "only the first wave was ever offered it");
    for device in &devices {
        wait_for("every device to run the second release", || {
            let running = device.running("shop").unwrap().to_string();
            if running == second["release"].as_str().unwrap() {
                Ok(())
            } else {
                Err(running)
            }
        });
    }
    assert_eq!(bed.get("/apps/shop")["release"], second["release"]);

    // And back by hand.
    let (status, undone) = bed.call("POST", "/apps/shop/undo", b"");
    assert_eq!(
        (status, &undone["release"]),
        (200, &applied["release"]),
        "{undone}"
    );
    bed.await_rollout("shop", "completed");
    let kinds = bed.event_kinds();
    for kind in [
        "device-joined",
        "device-online",
        "rollout-opened",
        "wave-open",
        "wave-passed",
        "rollout-completed",
        "wave-failed",
        "rollout-rolled-back",
    ] {
        assert!(
            kinds.iter().any(|found| found == kind),
            "{kind} in {kinds:?}"
        );
    }
}

#[test]
fn releases_go_out_in_waves_and_a_broken_one_goes_back() {
    goes_out_in_waves_and_a_broken_one_goes_back(Kind::Embedded);
}

#[test]
fn the_same_with_mosquitto() {
    goes_out_in_waves_and_a_broken_one_goes_back(Kind::Mosquitto);
}

#[test]
fn a_hub_that_is_killed_in_mid_rollout_goes_on_where_it_was() {
    let mut bed = Bed::start(Kind::Embedded);
    let devices = Device::fleet(&bed, 4);
    let [v1, v2] = ["v1", "v2"].map(|tag| bed.import(tag));
    bed.apply("shop", &manifest("shop", &v1, "[{percent: 100}]"));
    bed.await_rollout("shop", "completed");
    for device in &devices {
        device.state().hold = true;
    }
    let applied = bed.apply(
        "shop",
        &manifest("shop", &v2, "[{count: 2}, {percent: 100}]"),
    );
    let switching = || {
        devices
            .iter()
            .filter(|device| device.phase("shop") == Some(Phase::Activating))
            .count()
    };
    wait_until("the first wave to switch", || switching() == 2);
    let running = bed.rollout("shop");
    bed.kill_hub();
    // They end while the hub is away: it learns of that from what they say when it is back.
    for device in &devices {
        device.state().hold = false;
    }
    bed.start_hub();
    let rollout = bed.await_rollout("shop", "completed");
    assert_eq!(
        rollout["id"], running["id"],
        "the same rollout, not a new one"
    );
    assert_eq!(rollout["to"], applied["release"]);
    let wave = |rollout: &Value| {
        let assignments = rollout["assignments"].as_array().unwrap().iter();
        assignments
            .map(|a| (a["device"].clone(), a["wave"].clone()))
            .collect::<Vec<_>>()
    };
    assert_eq!(
        wave(&rollout),
        wave(&running),
        "the waves are as they were cut"
    );
    for device in &devices {
        let twice = device
            .state()
            .activated
            .iter()
            .filter(|r| r.to_string() == applied["release"].as_str().unwrap())
            .count();
        assert_eq!(twice, 1, "no device was made to switch twice");
    }
    assert!(bed.stop_hub().as_secs() < 5, "it stops in time");
}

#[test]
fn pause_resume_and_abort_do_what_they_say() {
    let bed = Bed::start(Kind::Embedded);
    let devices = Device::fleet(&bed, 3);
    let [v1, v2] = ["v1", "v2"].map(|tag| bed.import(tag));
    bed.apply("shop", &manifest("shop", &v1, "[{percent: 100}]"));
    bed.await_rollout("shop", "completed");
    for device in &devices {
        device.state().hold = true;
    }
    let applied = bed.apply(
        "shop",
        &manifest("shop", &v2, "[{count: 1}, {percent: 100}]"),
    );
    let id = applied["rollout"].clone();
    let switching = || {
        devices
            .iter()
            .filter(|device| device.phase("shop") == Some(Phase::Activating))
            .count()
    };
    wait_until("the first device to switch", || switching() == 1);
    let command = |name: &str| bed.call("POST", &format!("/rollouts/{id}/{name}"), b"");
    assert_eq!(command("pause").1["state"], "paused");
    for device in &devices {
        device.state().hold = false;
    }
    wait_for("the hub to see it succeed", || {
        let rollout = bed.rollout("shop");
        if rollout["waves"][0]["succeeded"] == 1 {
            Ok(())
        } else {
            Err(rollout.to_string())
        }
    });
    assert_eq!(bed.rollout("shop")["state"], "paused");
    assert_eq!(bed.rollout("shop")["waves"][1]["state"], "pending");
    assert_eq!(command("resume").1["state"], "running");
    bed.await_rollout("shop", "completed");
    let (status, body) = command("abort");
    assert_eq!(
        (status, &body["code"]),
        (409, &json!("rollout-is-final")),
        "{body}"
    );
}

#[test]
fn newcomers_get_the_completed_release_and_leavers_lose_the_app() {
    let bed = Bed::start(Kind::Embedded);
    let mut devices = Device::fleet(&bed, 2);
    let v1 = bed.import("v1");
    let selected = manifest("shop", &v1, "[{percent: 100}]")
        .replace("spec:\n", "spec:\n  selector: {matchLabels: {role: web}}\n");
    for device in &devices {
        let path = format!("/devices/{}/labels", device.id);
        assert_eq!(
            bed.call("PATCH", &path, br#"{"labels": {"role": "web"}}"#)
                .0,
            200
        );
    }
    let applied = bed.apply("shop", &selected);
    assert_eq!(applied["devices"], 2);
    bed.await_rollout("shop", "completed");
    let release = applied["release"].as_str().unwrap();
    let runs = |device: &Device| {
        device
            .running("shop")
            .is_some_and(|running| running.to_string() == release)
    };

    // A new device, with a label of its own.
    let mut third = Device::start(&bed, "device-2");
    third
        .state()
        .labels
        .insert("role".parse().unwrap(), "web".parse().unwrap());
    third.cut();
    third.connect(&bed);
    wait_until("the newcomer to run it", || runs(&third));
    devices.push(third);
    assert_eq!(
        bed.rollout("shop")["id"],
        applied["rollout"],
        "without a rollout"
    );
    assert_eq!(bed.get("/apps/shop")["devices"], 3);

    // The operator's label wins over the device's own.
    bed.call(
        "PATCH",
        "/devices/device-2/labels",
        br#"{"labels": {"role": "other"}}"#,
    );
    wait_until("the app to leave the device", || {
        devices[2].state().apps.is_empty()
    });
    bed.call(
        "PATCH",
        "/devices/device-2/labels",
        br#"{"labels": {"role": null}}"#,
    );
    wait_until("the app to come back", || runs(&devices[2]));

    // Deleting waits for a device that is away, and ends when it is forgotten.
    devices[1].cut();
    bed.await_online(2);
    let (status, _) = bed.call("DELETE", "/apps/shop", b"");
    assert_eq!(status, 202);
    wait_until("the app to leave the others", || {
        devices[0].state().apps.is_empty() && devices[2].state().apps.is_empty()
    });
    assert_eq!(bed.get("/apps/shop")["deleting"], true);
    let (status, body) = bed.call("DELETE", "/devices/device-0", b"");
    assert_eq!((status, &body["code"]), (409, &json!("device-connected")));
    assert_eq!(bed.call("DELETE", "/devices/device-1", b"").0, 204);
    wait_until("the app to be gone", || {
        bed.call("GET", "/apps/shop", b"").0 == 404
    });
    assert_eq!(bed.call("GET", "/devices/device-1", b"").0, 404);
}

#[test]
fn a_newer_release_takes_the_place_of_a_rollout_under_way() {
    let bed = Bed::start(Kind::Embedded);
    let devices = Device::fleet(&bed, 3);
    let [v1, v2, v3] = ["v1", "v2", "v3"].map(|tag| bed.import(tag));
    bed.apply("shop", &manifest("shop", &v1, "[{percent: 100}]"));
    bed.await_rollout("shop", "completed");
    for device in &devices {
        device.state().hold = true;
    }
    let second = bed.apply(
        "shop",
        &manifest("shop", &v2, "[{count: 1}, {percent: 100}]"),
    );
    wait_until("one device to switch", || {
        devices
            .iter()
            .any(|device| device.phase("shop") == Some(Phase::Activating))
    });
    let third = bed.apply(
        "shop",
        &manifest("shop", &v3, "[{count: 1}, {percent: 100}]"),
    );
    assert_eq!(
        bed.get(&format!("/rollouts/{}", second["rollout"]))["state"],
        "superseded"
    );
    for device in &devices {
        device.state().hold = false;
    }
    bed.await_rollout("shop", "completed");
    for device in &devices {
        assert_eq!(
            device.running("shop").unwrap().to_string(),
            third["release"].as_str().unwrap()
        );
    }
}
