//! Twenty real agents and everything a fleet meets: approval, turns under a disruption budget, a device that misses two
//! releases, a release that fails, and a hub that is killed in each state. With the hub goes its broker and all that is
//! retained there.

use std::collections::{BTreeMap, BTreeSet};

use e2e::api::Api;
use e2e::fleet::{
    Fleet, LONG, app_status, await_container, await_rollout, http_get, import, web_manifest,
};
use e2e::image::Builder;
use e2e::{Bed, Device, Hub, wait_for};
use serde_json::Value;

const DEVICES: usize = 20;
const SITES: [&str; 5] = ["a", "b", "c", "d", "e"];
const BUDGET: &str = "\
apiVersion: foreshore/v1
kind: DisruptionBudget
metadata: {name: sites}
spec: {groupBy: [site], maxUnavailable: 1}
";

fn fleet(bed: &Bed) -> Fleet {
    let hub = Hub::start(bed);
    let device = |number: usize| {
        let labels = format!("role = \"web\"\nsite = \"{}\"", SITES[number % SITES.len()]);
        Device::start(bed, &hub, &format!("device-{number}"), &labels)
    };
    let devices = (1..=DEVICES).map(device).collect();
    let fleet = Fleet { devices, hub };
    fleet.await_online(DEVICES);
    fleet
}

/// Waits for `seen`, kills the hub at that moment and starts it again.
fn kill_hub_once(fleet: &mut Fleet, what: &str, seen: impl Fn(&Value) -> bool) -> Value {
    let api = fleet.api();
    let rollout = wait_for(what, LONG, || {
        let rollout = api.rollout("shop");
        if seen(&rollout) {
            Ok(rollout)
        } else {
            Err(rollout)
        }
    });
    fleet.hub.kill9();
    fleet.hub.restart();
    rollout
}

fn wave_is(rollout: &Value, ordinal: usize, state: &str) -> bool {
    rollout["waves"][ordinal - 1]["state"] == state
}

fn parts<'r>(rollout: &'r Value, state: &str) -> Vec<&'r str> {
    let parts = rollout["assignments"].as_array().into_iter().flatten();
    // A device's own words stand one deeper.
    parts
        .filter(|part| part["state"] == state || part["state"]["device"] == state)
        .filter_map(|part| part["device"].as_str())
        .collect()
}

fn any_part(rollout: &Value, states: &[&str]) -> bool {
    states.iter().any(|state| !parts(rollout, state).is_empty())
}

/// What the hub was told by and about devices, oldest first.
fn events(api: &Api) -> Vec<Value> {
    let mut all: Vec<Value> = Vec::new();
    loop {
        let after = all
            .last()
            .map_or_else(|| Value::from(0), |event| event["id"].clone());
        let page = api.get(&format!("/events?after={after}&limit=1000")).ok();
        match page["items"].as_array() {
            Some(items) if !items.is_empty() => all.extend(items.iter().cloned()),
            _ => return all,
        }
    }
}

/// The most devices of one site that held a lease at one moment.
fn most_leased(events: &[Value]) -> usize {
    let mut held: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    let mut most = 0;
    for event in events {
        let Some(device) = event["device"].as_str() else {
            continue;
        };
        let number: usize = device
            .trim_start_matches("device-")
            .parse()
            .expect("as named");
        let holds = held.entry(SITES[number % SITES.len()]).or_default();
        match event["kind"].as_str() {
            Some("lease-granted") => _ = holds.insert(device),
            Some("lease-ended" | "lease-written-off") => _ = holds.remove(device),
            _ => {}
        }
        most = most.max(holds.len());
    }
    most
}

fn await_release(fleet: &Fleet, devices: &[usize], release: &Value) {
    let api = fleet.api();
    for number in devices {
        let id = format!("device-{number}");
        wait_for(&format!("{id} to run {release}"), LONG, || {
            let status = app_status(&api.device(&id), "shop");
            let well = status["running"] == *release && status["lastKnownGood"] == *release;
            if well { Ok(()) } else { Err(status) }
        });
    }
}

#[test]
fn a_fleet_of_twenty_comes_through_whatever_the_hub_meets() {
    let bed = Bed::new("twenty");
    let builder = Builder::new(&bed);
    for (tag, version, ready) in [
        ("v1", "one", true),
        ("v2", "two", true),
        ("v3", "three", true),
        ("v4", "four", false),
    ] {
        builder.web(tag, version, ready);
    }
    let mut fleet = fleet(&bed);
    let api = fleet.api();
    let [v1, v2, v3, v4] = ["v1", "v2", "v3", "v4"].map(|tag| import(&api, &builder, tag));
    let answer = api.send("PUT", "/disruption-budgets/sites", BUDGET.as_bytes());
    assert_eq!(answer.ok()["groups"], SITES.len());
    let apply = |fleet: &Fleet, image: &str, waves: &str| {
        let manifest = web_manifest("shop", image, waves).replace("bake: 500ms", "bake: 8s");
        fleet.api().apply("shop", &manifest).ok()["release"].clone()
    };
    let everyone: Vec<usize> = (1..=DEVICES).collect();

    // Installed everywhere, while the hub dies with devices on their way.
    let first = apply(&fleet, &v1, "[{percent: 100}]");
    kill_hub_once(&mut fleet, "devices to be on their way", |rollout| {
        any_part(rollout, &["staging", "waiting", "activating", "soaking"])
    });
    fleet.await_rollout("shop", "completed");
    await_release(&fleet, &everyone, &first);

    // The last device misses two releases. The second one waits for an approval, over a hub's death.
    fleet.devices[DEVICES - 1].terminate();
    fleet.await_online(DEVICES - 1);
    let absent = fleet.devices[DEVICES - 1].id.clone();
    let waves = "[{count: 2, approval: true}, {percent: 50}, {percent: 100}]";
    let second = apply(&fleet, &v2, waves);
    kill_hub_once(&mut fleet, "the first wave to bake", |rollout| {
        wave_is(rollout, 1, "baking")
    });
    let before = kill_hub_once(&mut fleet, "the first wave to wait", |rollout| {
        wave_is(rollout, 1, "awaiting-approval")
    });
    let api = fleet.api();
    fleet.await_online(DEVICES - 1);
    let after = api.rollout("shop");
    assert_eq!(before["assignments"], after["assignments"]);
    // Of the two one may be the one that is away.
    let first_wave = 2 - parts(&after, "deferred").len();
    assert_eq!(parts(&after, "succeeded").len(), first_wave, "{after}");
    assert!(wave_is(&after, 1, "awaiting-approval") && wave_is(&after, 2, "pending"));
    let id = &after["id"];
    api.send("POST", &format!("/rollouts/{id}/approve"), b"")
        .ok();
    kill_hub_once(&mut fleet, "the second wave to switch", |rollout| {
        wave_is(rollout, 2, "open") && any_part(rollout, &["activating", "soaking"])
    });
    // Paused, killed, still paused, and nobody new was offered anything meanwhile.
    let api = fleet.api();
    api.send("POST", &format!("/rollouts/{id}/pause"), b"").ok();
    kill_hub_once(&mut fleet, "the rollout to be paused", |rollout| {
        rollout["state"] == "paused"
    });
    fleet.await_online(DEVICES - 1);
    let api = fleet.api();
    let paused = api.rollout("shop");
    assert_eq!(paused["state"], "paused");
    assert!(wave_is(&paused, 3, "pending"), "{paused}");
    api.send("POST", &format!("/rollouts/{id}/resume"), b"")
        .ok();
    let completed = fleet.await_rollout("shop", "completed");
    assert_eq!(parts(&completed, "deferred"), [absent.as_str()]);
    let others: Vec<usize> = (1..DEVICES).collect();
    await_release(&fleet, &others, &second);

    let third = apply(&fleet, &v3, "[{count: 2}, {percent: 100}]");
    await_rollout(&fleet.api(), "shop", "completed");
    await_release(&fleet, &others, &third);

    // It is back, and goes to the newest release without the one between.
    fleet.devices[DEVICES - 1].restart();
    await_release(&fleet, &[DEVICES], &third);
    let all = events(&fleet.api());
    let accepted: Vec<&Value> = all
        .iter()
        .filter(|event| event["device"] == absent.as_str())
        .collect();
    let names = |release: &Value| {
        let short = release.as_str().unwrap_or_default();
        let short = short.trim_start_matches("sha256:")[..8].to_owned();
        accepted
            .iter()
            .filter(|event| event.to_string().contains(&short))
            .count()
    };
    assert!(names(&first) > 0 && names(&third) > 0, "{accepted:#?}");
    assert_eq!(names(&second), 0, "it never heard of it: {accepted:#?}");

    // One that fails: everybody is back, whenever the hub dies meanwhile.
    let fourth = apply(&fleet, &v4, "[{count: 3}, {percent: 100}]");
    kill_hub_once(&mut fleet, "the rollout to go back", |rollout| {
        ["rolling-back", "rolled-back"].contains(&rollout["state"].as_str().unwrap_or_default())
    });
    let back = fleet.await_rollout("shop", "rolled-back");
    assert!(wave_is(&back, 2, "pending"), "{back}");
    await_release(&fleet, &everyone, &third);
    for device in &fleet.devices {
        let status = app_status(&fleet.api().device(&device.id), "shop");
        assert_ne!(status["running"], fourth, "{status}");
        let container = await_container(&bed, &device.id, "shop", "server");
        assert_eq!(http_get(container, "/version").as_deref(), Ok("three"));
    }
    assert_eq!(most_leased(&events(&fleet.api())), 1, "devices of one site");
}
