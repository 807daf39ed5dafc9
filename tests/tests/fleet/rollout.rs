//! The main job: a release goes out in waves, an update replaces containers, a broken one goes back.

use e2e::fleet::{Fleet, LONG, await_container, container, http_get, import, web_manifest};
use e2e::image::Builder;
use e2e::{Bed, Hub, wait_for, wait_until};
use serde_json::Value;

const WAVES: &str = "[{count: 1}, {percent: 60}]";

fn versions(bed: &Bed, fleet: &Fleet) -> Vec<String> {
    let version = |id: &str| {
        let identity = container(bed, id, "shop", "server")?;
        Some(http_get(identity, "/version").unwrap_or_else(|error| error))
    };
    fleet
        .devices
        .iter()
        .map(|device| version(&device.id).unwrap_or_default())
        .collect()
}

fn wave_states(rollout: &Value) -> Vec<&str> {
    rollout["waves"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|wave| wave["state"].as_str())
        .collect()
}

#[test]
fn a_good_release_replaces_every_container_and_a_broken_one_goes_back() {
    let bed = Bed::new("rollout");
    let builder = Builder::new(&bed);
    builder.web("v1", "one", true);
    builder.web("v2", "two", true);
    builder.web("v3", "three", false);
    let fleet = Fleet::start(&bed, Hub::start(&bed), 5);
    let api = fleet.api();
    let [v1, v2, v3] = ["v1", "v2", "v3"].map(|tag| import(&api, &builder, tag));

    let applied = api.apply("shop", &web_manifest("shop", &v1, WAVES)).ok();
    assert_eq!(applied["outcome"], "created");
    let rollout = fleet.await_rollout("shop", "completed");
    assert_eq!(wave_states(&rollout), ["passed"; 3]);
    fleet.await_release("shop", &applied["release"]);
    assert_eq!(versions(&bed, &fleet), ["one"; 5]);
    let before: Vec<_> = fleet
        .devices
        .iter()
        .map(|d| await_container(&bed, &d.id, "shop", "server"))
        .collect();

    // An equal release is a no-op.
    let again = api.apply("shop", &web_manifest("shop", &v1, WAVES)).ok();
    assert_eq!(again["outcome"], "unchanged");
    assert_eq!(again["rollout"], Value::Null);

    let applied = api.apply("shop", &web_manifest("shop", &v2, WAVES)).ok();
    assert_eq!(applied["outcome"], "updated");
    fleet.await_rollout("shop", "completed");
    fleet.await_release("shop", &applied["release"]);
    assert_eq!(versions(&bed, &fleet), ["two"; 5]);
    let after: Vec<_> = fleet
        .devices
        .iter()
        .map(|d| await_container(&bed, &d.id, "shop", "server"))
        .collect();
    assert!(
        before.iter().zip(&after).all(|(old, new)| old != new),
        "{before:?} {after:?}"
    );
    let good = applied["release"].clone();

    let applied = api.apply("shop", &web_manifest("shop", &v3, WAVES)).ok();
    let rollout = fleet.await_rollout("shop", "rolled-back");
    assert_eq!(rollout["to"], applied["release"]);
    assert_eq!(wave_states(&rollout), ["failed", "pending", "pending"]);
    wait_for("every device to run v2 again", LONG, || {
        let now = versions(&bed, &fleet);
        if now == ["two"; 5] { Ok(()) } else { Err(now) }
    });
    fleet.await_release("shop", &good);
    // Four devices were never offered the broken release: their containers are the very same.
    let last: Vec<_> = fleet
        .devices
        .iter()
        .map(|d| await_container(&bed, &d.id, "shop", "server"))
        .collect();
    let same = after
        .iter()
        .zip(&last)
        .filter(|(old, new)| old == new)
        .count();
    assert_eq!(same, 4, "{after:?} {last:?}");
    // The app's release for newcomers is the good one.
    assert_eq!(api.get("/apps/shop").ok()["release"], good);
}

#[test]
fn pause_stops_offers_resume_goes_on_and_undo_goes_back() {
    let bed = Bed::new("pause");
    let builder = Builder::new(&bed);
    builder.web("v1", "one", true);
    builder.web("v2", "two", true);
    let fleet = Fleet::start(&bed, Hub::start(&bed), 3);
    let api = fleet.api();
    let [v1, v2] = ["v1", "v2"].map(|tag| import(&api, &builder, tag));
    let first = api
        .apply("shop", &web_manifest("shop", &v1, "[{percent: 100}]"))
        .ok();
    fleet.await_rollout("shop", "completed");

    // A long bake keeps the second wave closed while we pause.
    let manifest = web_manifest("shop", &v2, "[{count: 1}, {percent: 100}]")
        .replace("bake: 500ms", "bake: 10s");
    api.apply("shop", &manifest).ok();
    let id = api.rollout("shop")["id"].clone();
    wait_until("the first wave to pass its devices", LONG, || {
        api.rollout("shop")["waves"][0]["succeeded"] == 1
    });
    api.send("POST", &format!("/rollouts/{id}/pause"), b"").ok();
    assert_eq!(api.rollout("shop")["state"], "paused");
    assert_eq!(
        versions(&bed, &fleet)
            .iter()
            .filter(|version| *version == "two")
            .count(),
        1
    );
    api.send("POST", &format!("/rollouts/{id}/resume"), b"")
        .ok();
    fleet.await_rollout("shop", "completed");
    assert_eq!(versions(&bed, &fleet), ["two"; 3]);

    let undone = api.send("POST", "/apps/shop/undo", b"").ok();
    assert_eq!(undone["release"], first["release"]);
    fleet.await_rollout("shop", "completed");
    fleet.await_release("shop", &first["release"]);
    assert_eq!(versions(&bed, &fleet), ["one"; 3]);
}

#[test]
fn a_deleted_app_and_a_changed_label_take_containers_away() {
    let bed = Bed::new("delete");
    let builder = Builder::new(&bed);
    builder.web("v1", "one", true);
    let fleet = Fleet::start(&bed, Hub::start(&bed), 2);
    let api = fleet.api();
    let v1 = import(&api, &builder, "v1");
    api.apply("shop", &web_manifest("shop", &v1, "[{percent: 100}]"))
        .ok();
    fleet.await_rollout("shop", "completed");

    api.send(
        "PATCH",
        "/devices/device-1/labels",
        br#"{"labels": {"role": "other"}}"#,
    )
    .ok();
    wait_until("the unselected device to be empty", LONG, || {
        container(&bed, "device-1", "shop", "server").is_none()
    });
    assert!(container(&bed, "device-2", "shop", "server").is_some());

    // Selected again: a late joiner gets the app's release without a rollout.
    api.send(
        "PATCH",
        "/devices/device-1/labels",
        br#"{"labels": {"role": "web"}}"#,
    )
    .ok();
    let _back = await_container(&bed, "device-1", "shop", "server");

    let answer = api.send("DELETE", "/apps/shop", b"");
    assert!(answer.status < 300, "{answer:?}");
    for id in ["device-1", "device-2"] {
        wait_until(&format!("{id} to be empty"), LONG, || {
            container(&bed, id, "shop", "server").is_none()
        });
    }
    wait_until("the app to be gone", LONG, || {
        api.get("/apps/shop").status == 404
    });
}
