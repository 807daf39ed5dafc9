//! Disruption budgets with real agents: two apps at once, a device that dies while it switches, an abort.

use std::collections::{BTreeMap, BTreeSet};

use e2e::api::Api;
use e2e::fleet::{Fleet, LONG, app_status, import, web_manifest};
use e2e::image::Builder;
use e2e::{Bed, Device, Hub, wait_for, wait_until};
use serde_json::Value;

const BUDGET: &str = "\
apiVersion: foreshore/v1
kind: DisruptionBudget
metadata: {name: sites}
spec: {groupBy: [site], maxUnavailable: 1}
";

const SITES: [(&str, &str); 4] = [
    ("device-1", "a"),
    ("device-2", "b"),
    ("device-3", "a"),
    ("device-4", "b"),
];

fn fleet(bed: &Bed) -> Fleet {
    let hub = Hub::start(bed);
    let device = |(id, site): (&str, &str)| {
        let labels = format!("role = \"web\"\nsite = \"{site}\"");
        Device::start(bed, &hub, id, &labels)
    };
    let devices = SITES.into_iter().map(device).collect();
    let fleet = Fleet { devices, hub };
    fleet.await_online(SITES.len());
    fleet
}

fn site(device: &str) -> &'static str {
    let found = SITES.into_iter().find(|(id, _)| *id == device);
    found.expect("a device of the fleet").1
}

/// Looks again and again, on a thread of its own, until it is dropped: how many devices of a site said at one moment
/// that they were switching.
struct Watch {
    stop: std::sync::mpsc::Sender<()>,
    most: std::thread::JoinHandle<usize>,
}

impl Watch {
    fn begin(api: Api) -> Self {
        let (stop, stopped) = std::sync::mpsc::channel();
        let most = std::thread::spawn(move || {
            let mut most = 0;
            let pause = std::time::Duration::from_millis(50);
            while let Err(std::sync::mpsc::RecvTimeoutError::Timeout) = stopped.recv_timeout(pause)
            {
                let devices = api.get("/devices").ok();
                let mut switching: BTreeMap<&str, usize> = BTreeMap::new();
                for device in devices["items"].as_array().into_iter().flatten() {
                    let apps = device["apps"].as_array().into_iter().flatten();
                    let mut phases = apps.map(|app| app["phase"].as_str().unwrap_or_default());
                    if phases.any(|phase| ["activating", "soaking"].contains(&phase)) {
                        *switching
                            .entry(site(device["id"].as_str().unwrap_or_default()))
                            .or_default() += 1;
                    }
                }
                most = most.max(switching.into_values().max().unwrap_or(0));
            }
            most
        });
        Self { stop, most }
    }

    fn end(self) -> usize {
        drop(self.stop);
        self.most.join().expect("watching does not panic")
    }
}

/// The most devices of one site that held a lease at one moment, by the hub's events; and how many leases there were.
fn most_leased(api: &Api) -> (usize, usize) {
    let events = api.get("/events?after=0&limit=1000").ok();
    let mut held: BTreeMap<&str, BTreeSet<(String, String)>> = BTreeMap::new();
    let (mut most, mut granted) = (0, 0);
    for event in events["items"].as_array().into_iter().flatten() {
        let (Some(device), Some(app)) = (event["device"].as_str(), event["app"].as_str()) else {
            continue;
        };
        let holds = held.entry(site(device)).or_default();
        let key = (device.to_owned(), app.to_owned());
        match event["kind"].as_str() {
            Some("lease-granted") => {
                granted += 1;
                holds.insert(key);
            }
            Some("lease-ended" | "lease-written-off") => _ = holds.remove(&key),
            _ => {}
        }
        let devices: BTreeSet<&str> = holds.iter().map(|(device, _)| device.as_str()).collect();
        most = most.max(devices.len());
    }
    (most, granted)
}

fn phase(api: &Api, device: &str, app: &str) -> String {
    let status = app_status(&api.device(device), app);
    status["phase"].as_str().unwrap_or_default().to_owned()
}

fn apply_budget(api: &Api) {
    let answer = api
        .send("PUT", "/disruption-budgets/sites", BUDGET.as_bytes())
        .ok();
    assert_eq!(
        (&answer["devices"], &answer["groups"]),
        (&4.into(), &2.into())
    );
}

#[test]
fn two_apps_take_turns_and_a_device_that_dies_while_switching_keeps_its_place() {
    let bed = Bed::new("disruption");
    let builder = Builder::new(&bed);
    for (tag, version) in [("v1", "one"), ("v2", "two"), ("v3", "three")] {
        builder.web(tag, version, true);
    }
    let mut fleet = fleet(&bed);
    let api = fleet.api();
    let [v1, v2, v3] = ["v1", "v2", "v3"].map(|tag| import(&api, &builder, tag));
    apply_budget(&api);

    // Two apps at once, installed and then updated.
    let watch = Watch::begin(fleet.api());
    let mut releases = Vec::new();
    for image in [&v1, &v2] {
        releases.clear();
        for app in ["shop", "till"] {
            let applied = api
                .apply(app, &web_manifest(app, image, "[{percent: 100}]"))
                .ok();
            releases.push(applied["release"].clone());
        }
        for (app, release) in ["shop", "till"].into_iter().zip(&releases) {
            fleet.await_rollout(app, "completed");
            fleet.await_release(app, release);
        }
    }
    assert_eq!(
        watch.end(),
        1,
        "devices of a site that said they were switching"
    );
    let (most, granted) = most_leased(&api);
    assert_eq!(most, 1, "devices of a site with a lease");
    assert!(granted >= 16, "{granted}");
    wait_until("all leases to end", LONG, || {
        api.get("/leases").ok()["items"] == Value::Array(Vec::new())
    });

    // One dies while it switches. Its containers run on, and nobody knows.
    let watch = Watch::begin(fleet.api());
    let slow = web_manifest("shop", &v3, "[{percent: 100}]").replace("soak: 1s", "soak: 8s");
    let applied = api.apply("shop", &slow).ok();
    let dying = wait_for("a device of site a to switch", LONG, || {
        let phases = ["device-1", "device-3"].map(|id| (id, phase(&api, id, "shop")));
        let found = phases.iter().find(|(_, phase)| phase == "soaking");
        found.map(|(id, _)| *id).ok_or_else(|| phases.clone())
    });
    let at = |id: &str| {
        SITES
            .iter()
            .position(|(device, _)| *device == id)
            .expect("known")
    };
    fleet.devices[at(dying)].kill9();
    let other = if dying == "device-1" {
        "device-3"
    } else {
        "device-1"
    };
    for id in ["device-2", "device-4"] {
        wait_for(
            &format!("{id}, of the other site, to be done"),
            LONG,
            || {
                let status = app_status(&api.device(id), "shop");
                let done =
                    status["running"] == applied["release"] && status["phase"] == "succeeded";
                if done { Ok(()) } else { Err(status) }
            },
        );
    }
    let status = app_status(&api.device(other), "shop");
    assert_eq!(status["phase"], "waiting", "{status}");
    assert_eq!(
        status["running"], releases[0],
        "the release of before runs meanwhile"
    );
    assert_eq!(status["reason"]["code"], "waits-for-turn", "{status}");
    let message = status["reason"]["message"].as_str().unwrap_or_default();
    assert!(
        message.contains("disruption budget sites, group site=a"),
        "{message}"
    );

    // An abort stops who waits; the one that had begun goes on when its agent is back.
    let id = applied["rollout"].clone();
    api.send("POST", &format!("/rollouts/{id}/abort"), b"").ok();
    wait_for(&format!("{other} to be told"), LONG, || {
        let status = app_status(&api.device(other), "shop");
        let back = status["release"] == releases[0] && status["phase"] == "succeeded";
        if back { Ok(()) } else { Err(status) }
    });
    assert_eq!(most_leased(&api).0, 1);
    fleet.devices[at(dying)].restart();
    wait_until("its lease to end", LONG, || {
        api.get("/leases").ok()["items"] == Value::Array(Vec::new())
    });
    let again = api.apply("shop", &slow).ok();
    fleet.await_rollout("shop", "completed");
    fleet.await_release("shop", &again["release"]);
    assert_eq!(watch.end(), 1);
    assert_eq!(most_leased(&api).0, 1);
}

#[test]
fn a_device_that_is_written_off_lets_others_go() {
    let bed = Bed::new("written-off");
    let builder = Builder::new(&bed);
    builder.web("v1", "one", true);
    let mut fleet = fleet(&bed);
    let api = fleet.api();
    let v1 = import(&api, &builder, "v1");
    apply_budget(&api);
    let slow = web_manifest("shop", &v1, "[{percent: 100}]").replace("soak: 1s", "soak: 5s");
    api.apply("shop", &slow).ok();
    let dying = wait_for("a device to switch", LONG, || {
        let switching = |id: &&str| phase(&api, id, "shop") == "soaking";
        let found = SITES.into_iter().map(|(id, _)| id).find(switching);
        found.ok_or("nobody")
    });
    let at = SITES
        .iter()
        .position(|(id, _)| *id == dying)
        .expect("known");
    fleet.devices[at].kill9();
    let other = SITES.into_iter().map(|(id, _)| id);
    let other = other
        .filter(|id| site(id) == site(dying))
        .find(|id| *id != dying)
        .expect("two each");
    wait_until("the other of its site to wait", LONG, || {
        phase(&api, other, "shop") == "waiting"
    });
    let answer = api.send("DELETE", &format!("/leases/{dying}"), b"");
    assert_eq!(answer.status, 204, "{answer:?}");
    wait_until("the other of its site to be done", LONG, || {
        phase(&api, other, "shop") == "succeeded"
    });
    fleet.devices[at].restart();
    fleet.await_rollout("shop", "completed");
}
