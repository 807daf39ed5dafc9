//! Maintenance windows with real agents: closed, opened by the clock, and overridden.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use e2e::api::Api;
use e2e::fleet::{Fleet, LONG, app_status, await_container, container, import, web_manifest};
use e2e::image::Builder;
use e2e::{Bed, Hub, wait_for};
use serde_json::Value;

const HOUR_MS: u64 = 3_600_000;

fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    u64::try_from(now.expect("it is after 1970").as_millis()).expect("for a long time")
}

fn status(api: &Api, device: &str) -> Value {
    app_status(&api.device(device), "shop")
}

fn await_reason(api: &Api, device: &str, words: &str) {
    wait_for(&format!("{device} to wait for {words}"), LONG, || {
        let status = status(api, device);
        let message = status["reason"]["message"].as_str().unwrap_or_default();
        let waits = status["phase"] == "waiting"
            && status["reason"]["code"] == "waits-for-window"
            && message.contains(words);
        if waits { Ok(()) } else { Err(status) }
    });
}

#[test]
fn devices_wait_for_their_window_until_it_opens_or_an_operator_says_so() {
    let bed = Bed::new("windows");
    let builder = Builder::new(&bed);
    for (tag, version) in [("v1", "one"), ("v2", "two"), ("v3", "three")] {
        builder.web(tag, version, true);
    }
    let fleet = Fleet::start(&bed, Hub::start(&bed), 2);
    let api = fleet.api();
    let [v1, v2, v3] = ["v1", "v2", "v3"].map(|tag| import(&api, &builder, tag));
    let applied = api
        .apply("shop", &web_manifest("shop", &v1, "[{percent: 100}]"))
        .ok();
    fleet.await_rollout("shop", "completed");
    let containers = ["device-1", "device-2"].map(|id| await_container(&bed, id, "shop", "server"));

    // The hour that begins half a day from now, in a zone by name that has no summer time.
    let opens_ms = (now_ms() / HOUR_MS + 12) * HOUR_MS;
    let hour = opens_ms / HOUR_MS % 24;
    let windowed = |image: &str, key: &str| {
        web_manifest("shop", image, "[{percent: 100}]")
            + &format!(
                "\x20   {key}: {{cron: \"0 {hour} * * *\", for: 1h, timezone: Atlantic/Reykjavik}}\n"
            )
    };
    let unknown = windowed(&v2, "window").replace("Atlantic/Reykjavik", "Atlantic/Atlantis");
    let refused = api.apply("shop", &unknown);
    assert_eq!(refused.code(), "unknown-time-zone", "{refused:?}");
    let second = api.apply("shop", &windowed(&v2, "window")).ok();
    for id in ["device-1", "device-2"] {
        await_reason(&api, id, "opens at");
        let local = fleet.devices.iter().find(|device| device.id == id);
        let local = local
            .expect("a device of the fleet")
            .status()
            .expect("it has a state");
        assert!(local.to_string().contains("opens at"), "{local}");
        assert_eq!(status(&api, id)["running"], applied["release"]);
        let explained = api.get(&format!("/devices/{id}/explain")).ok().to_string();
        assert!(explained.contains("its window to open"), "{explained}");
    }
    let rollout = api.get(&format!("/rollouts/{}", second["rollout"])).ok();
    assert_eq!(rollout["state"], "running", "{rollout}");
    assert!(rollout.to_string().contains("opens at"), "{rollout}");

    // By the clock of one it opens; the other waits on.
    fleet.devices[0].set_clock(opens_ms + HOUR_MS / 2);
    wait_for("device-1 to be done", LONG, || {
        let status = status(&api, "device-1");
        let done = status["phase"] == "succeeded" && status["running"] == second["release"];
        if done { Ok(()) } else { Err(status) }
    });
    await_reason(&api, "device-2", "opens at");
    assert_eq!(
        container(&bed, "device-2", "shop", "server"),
        Some(containers[1]),
        "what runs runs on"
    );

    // An operator does not want to wait.
    let path = format!("/rollouts/{}/override-windows", second["rollout"]);
    api.send("POST", &path, b"").ok();
    fleet.await_rollout("shop", "completed");
    fleet.await_release("shop", &second["release"]);
    assert_eq!(api.send("POST", &path, b"").code(), "no-windows");

    // Going back waits for nothing: a release with a window that is not well is left at once, by the device itself.
    fleet.devices[1].set_clock(opens_ms + HOUR_MS / 2);
    builder.web("bad", "four", false);
    let bad = import(&api, &builder, "bad");
    api.apply("shop", &windowed(&bad, "window")).ok();
    fleet.await_rollout("shop", "rolled-back");
    fleet.await_release("shop", &second["release"]);

    // Nothing is fetched while the download window is closed.
    fleet.devices[0].set_clock(opens_ms - HOUR_MS / 2);
    fleet.devices[1].set_clock(opens_ms - HOUR_MS / 2);
    let third = api.apply("shop", &windowed(&v3, "downloadWindow")).ok();
    await_reason(&api, "device-1", "download window");
    await_reason(&api, "device-2", "download window");
    for device in &fleet.devices {
        device.set_clock(opens_ms + 1);
    }
    let rollout = wait_for("the rollout to complete", Duration::from_secs(120), || {
        let rollout = api.rollout("shop");
        if rollout["state"] == "completed" {
            Ok(rollout)
        } else {
            Err(rollout)
        }
    });
    assert_eq!(rollout["to"], third["release"], "{rollout}");
}
