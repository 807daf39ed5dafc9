//! Disruption budgets over a real broker: never more of a group at once, over all apps, whatever breaks.

use std::time::Instant;

use foreshore_protocol::message::Phase;
use serde_json::Value;

use crate::bed::{Bed, Kind, manifest, wait_for, wait_until};
use crate::device::Device;

fn budget(name: &str, spec: &str) -> String {
    format!(
        "apiVersion: foreshore/v1\nkind: DisruptionBudget\nmetadata: {{name: {name}}}\nspec: {{{spec}}}\n"
    )
}

fn put(bed: &Bed, name: &str, spec: &str) -> Value {
    let path = format!("/disruption-budgets/{name}");
    let (status, body) = bed.call("PUT", &path, budget(name, spec).as_bytes());
    assert_eq!(status, 200, "{body}");
    body
}

/// Devices of two sites, in turn.
fn sites(bed: &Bed, count: usize) -> Vec<Device> {
    let devices = Device::fleet(bed, count);
    for (number, device) in devices.iter().enumerate() {
        let patch = format!("{{\"labels\": {{\"site\": \"s{}\"}}}}", number % 2);
        let path = format!("/devices/{}/labels", device.id);
        assert_eq!(bed.call("PATCH", &path, patch.as_bytes()).0, 200);
    }
    devices
}

/// The most devices of one site that were switching at one moment.
fn most_at_once(devices: &[Device], site: usize) -> usize {
    let mut edges = Vec::new();
    for device in devices.iter().skip(site).step_by(2) {
        let mut switches: Vec<(Instant, Option<Instant>)> = device
            .state()
            .switches
            .iter()
            .map(|(_, begin, end)| (*begin, *end))
            .collect();
        switches.sort();
        // Two apps of one device at once are one device.
        let mut merged: Vec<(Instant, Option<Instant>)> = Vec::new();
        for (begin, end) in switches {
            match merged.last_mut() {
                Some((_, last)) if last.is_none_or(|last| begin <= last) => {
                    *last = last.zip(end).map(|(last, end)| last.max(end));
                }
                _ => merged.push((begin, end)),
            }
        }
        for (begin, end) in merged {
            edges.push((begin, true));
            edges.extend(end.map(|end| (end, false)));
        }
    }
    // An end and a beginning of the same moment: the end first.
    edges.sort();
    let (mut open, mut most) = (0_usize, 0);
    for (_, begins) in edges {
        open = if begins { open + 1 } else { open - 1 };
        most = most.max(open);
    }
    most
}

fn leases(bed: &Bed, state: &str) -> Vec<String> {
    let leases = bed.get("/leases");
    let items = leases["items"].as_array().unwrap().iter();
    items
        .filter(|lease| lease["state"] == state)
        .map(|lease| lease["device"].as_str().unwrap().to_owned())
        .collect()
}

fn all(devices: &[Device], app: &str, phase: Phase) -> bool {
    devices
        .iter()
        .all(|device| device.phase(app) == Some(phase))
}

fn two_apps_at_once(kind: Kind) {
    let bed = Bed::start(kind);
    let devices = sites(&bed, 8);
    let [v1, v2] = ["v1", "v2"].map(|tag| bed.import(tag));
    let answer = put(&bed, "sites", "groupBy: [site], maxUnavailable: 1");
    assert_eq!(
        (&answer["devices"], &answer["groups"]),
        (&8.into(), &2.into())
    );
    for image in [&v1, &v2] {
        for app in ["shop", "till"] {
            bed.apply(app, &manifest(app, image, "[{percent: 100}]"));
        }
        for app in ["shop", "till"] {
            bed.await_rollout(app, "completed");
        }
    }
    for site in 0..2 {
        assert_eq!(most_at_once(&devices, site), 1, "of site {site}");
    }
    assert!(
        devices
            .iter()
            .all(|device| device.state().switches.len() == 4)
    );
    wait_until("all leases to end", || {
        bed.get("/leases")["items"] == Value::Array(vec![])
    });
}

#[test]
fn two_apps_over_two_groups_take_turns() {
    two_apps_at_once(Kind::Embedded);
}

#[test]
fn two_apps_over_two_groups_take_turns_over_mosquitto() {
    two_apps_at_once(Kind::Mosquitto);
}

#[test]
fn a_device_that_goes_dark_while_switching_keeps_its_slot_until_it_is_written_off() {
    let mut bed = Bed::start(Kind::Embedded);
    let mut devices = sites(&bed, 6);
    let image = bed.import("v1");
    put(&bed, "sites", "groupBy: [site], maxUnavailable: 1");
    for device in &devices {
        device.state().hold = true;
    }
    bed.apply("shop", &manifest("shop", &image, "[{percent: 100}]"));
    wait_until("one of each site to switch", || {
        leases(&bed, "granted").len() == 2
    });
    let dark = wait_for("one of site 0 to switch", || {
        let switching = |device: &Device| device.phase("shop") == Some(Phase::Activating);
        devices
            .iter()
            .step_by(2)
            .position(switching)
            .ok_or("nobody")
    }) * 2;
    devices[dark].cut();
    let name = devices[dark].id.to_string();
    for device in &devices {
        device.state().hold = false;
    }
    // The other site is not held up.
    wait_until("the other site to be done", || {
        let mut others = devices.iter().skip(1).step_by(2);
        others.all(|device| device.phase("shop") == Some(Phase::Succeeded))
    });
    let waits =
        |bed: &Bed| leases(bed, "waiting").len() == 2 && leases(bed, "granted") == [name.as_str()];
    wait_until("the others of its site to wait", || waits(&bed));
    // Nor does a hub that dies forget it.
    bed.kill_hub();
    bed.start_hub();
    bed.await_online(5);
    wait_until("they wait on", || waits(&bed));
    // They are told who they are, and why they wait.
    let view = bed.get("/disruption-budgets/sites");
    let group = view["groups"].as_array().unwrap().iter();
    let group = group
        .clone()
        .find(|group| group["group"]["site"] == "s0")
        .unwrap();
    assert_eq!(group["unavailable"], serde_json::json!([name]));
    assert_eq!(
        (&group["waiting"], &group["maxUnavailable"]),
        (&2.into(), &1.into())
    );

    let path = format!("/leases/{name}");
    assert_eq!(bed.call("DELETE", &path, b"").0, 204);
    let (status, problem) = bed.call("DELETE", &path, b"");
    assert_eq!((status, &problem["code"]), (404, &"no-lease".into()));
    wait_until("the others of its site to be done", || {
        let mut others = devices
            .iter()
            .step_by(2)
            .filter(|device| device.id.as_str() != name);
        others.all(|device| device.phase("shop") == Some(Phase::Succeeded))
    });
    let kinds = bed.event_kinds();
    assert!(kinds.contains(&"lease-written-off".to_owned()), "{kinds:?}");
    // It was alive all the time: it ends, and all is as if nothing had been.
    devices[dark].connect(&bed);
    bed.await_rollout("shop", "completed");
    wait_until("all leases to end", || {
        bed.get("/leases")["items"] == Value::Array(vec![])
    });
}

#[test]
fn who_waits_stops_with_a_pause_and_for_good_with_an_abort() {
    let bed = Bed::start_with(Kind::Embedded, "[leases]\nttl_s = 10");
    let devices = sites(&bed, 4);
    let [v1, v2] = ["v1", "v2"].map(|tag| bed.import(tag));
    bed.apply("shop", &manifest("shop", &v1, "[{percent: 100}]"));
    bed.await_rollout("shop", "completed");
    put(&bed, "all", "maxUnavailable: 1");
    wait_until("everybody to know of the budget", || {
        devices.iter().all(|device| device.state().budgeted)
    });
    for device in &devices {
        device.state().hold = true;
    }
    let id = bed.apply("shop", &manifest("shop", &v2, "[{percent: 100}]"))["rollout"].clone();
    wait_until("one to switch and three to wait", || {
        leases(&bed, "granted").len() == 1 && leases(&bed, "waiting").len() == 3
    });
    wait_for("the rollout to show who waits", || {
        let rollout = bed.rollout("shop");
        let states = rollout["assignments"].as_array().unwrap().iter();
        let phase = |phase: &str| serde_json::json!({ "device": phase });
        let waits = |state: &Value| *state == phase("waiting");
        let waiting = states.clone().filter(|part| waits(&part["state"])).count();
        let switching = states.filter(|part| part["state"] == phase("activating"));
        if (waiting, switching.count()) == (3, 1) {
            Ok(())
        } else {
            Err(rollout.to_string())
        }
    });
    assert_eq!(
        bed.call("POST", &format!("/rollouts/{id}/pause"), b"").0,
        200
    );
    for device in &devices {
        device.state().hold = false;
    }
    wait_until("the one to end", || leases(&bed, "granted").is_empty());
    let switched = || {
        devices
            .iter()
            .filter(|device| device.state().switches.len() == 2)
            .count()
    };
    let rounds = || devices.iter().map(|device| device.state().seq).sum::<u64>();
    assert_eq!(
        (switched(), leases(&bed, "waiting").len()),
        (1, 3),
        "paused, nobody follows"
    );
    assert_eq!(
        bed.call("POST", &format!("/rollouts/{id}/abort"), b"").0,
        200
    );
    let before = rounds();
    wait_until("the others to be at the release of before again", || {
        all(&devices, "shop", Phase::Succeeded) && rounds() > before
    });
    assert_eq!(switched(), 1, "nobody switched after the pause");
    wait_until("nobody to wait", || {
        bed.get("/leases")["items"] == Value::Array(vec![])
    });
}

#[test]
fn an_agent_that_is_started_again_asks_again_and_gets_its_turn() {
    let mut bed = Bed::start(Kind::Embedded);
    let mut devices = sites(&bed, 2);
    let image = bed.import("v1");
    put(&bed, "all", "maxUnavailable: 1");
    devices[0].state().hold = true;
    bed.apply("shop", &manifest("shop", &image, "[{percent: 100}]"));
    wait_until("somebody to have a turn", || {
        !leases(&bed, "granted").is_empty()
    });
    // While the hub is away the one that waits is started again, and its counters of requests begin anew.
    bed.kill_hub();
    for device in &mut devices {
        device.cut();
        device.state().restart();
        device.state().hold = false;
    }
    bed.start_hub();
    for device in &mut devices {
        device.connect(&bed);
    }
    bed.await_rollout("shop", "completed");
}

#[test]
fn devices_that_are_offline_count_where_the_budget_says_so() {
    let bed = Bed::start(Kind::Embedded);
    let mut devices = sites(&bed, 3);
    let image = bed.import("v1");
    put(&bed, "all", "maxUnavailable: 1, offlineCounts: true");
    devices[2].cut();
    bed.await_online(2);
    bed.apply("shop", &manifest("shop", &image, "[{percent: 100}]"));
    wait_until("two to wait", || leases(&bed, "waiting").len() == 2);
    assert_eq!(bed.get("/disruption-budgets/all")["unavailable"], 1);
    assert!(
        devices[..2]
            .iter()
            .all(|device| device.state().switches.is_empty())
    );
    devices[2].connect(&bed);
    bed.await_rollout("shop", "completed");
    assert_eq!(most_at_once(&devices, 0).max(most_at_once(&devices, 1)), 1);
}

#[test]
fn a_deleted_budget_holds_nobody_up() {
    let bed = Bed::start(Kind::Embedded);
    let devices = sites(&bed, 3);
    let image = bed.import("v1");
    put(&bed, "all", "maxUnavailable: 1");
    for device in &devices {
        device.state().hold = true;
    }
    bed.apply("shop", &manifest("shop", &image, "[{percent: 100}]"));
    wait_until("two to wait", || leases(&bed, "waiting").len() == 2);
    assert_eq!(bed.call("DELETE", "/disruption-budgets/all", b"").0, 204);
    wait_until("all to switch", || all(&devices, "shop", Phase::Activating));
    for device in &devices {
        device.state().hold = false;
    }
    bed.await_rollout("shop", "completed");
}

#[test]
fn every_wrong_call_about_budgets_has_its_own_code() {
    let bed = Bed::start(Kind::Embedded);
    let good = budget("one", "maxUnavailable: 1");
    let call = |method: &str, path: &str, body: &str| {
        let (status, problem) = bed.call(method, path, body.as_bytes());
        (
            status,
            problem["code"].as_str().unwrap_or_default().to_owned(),
        )
    };
    let cases = [
        ("GET", "/disruption-budgets/one", "", 404, "unknown-budget"),
        (
            "DELETE",
            "/disruption-budgets/one",
            "",
            404,
            "unknown-budget",
        ),
        ("PUT", "/disruption-budgets/two", &good, 400, "other-budget"),
        ("PUT", "/disruption-budgets/One", &good, 400, "bad-request"),
        (
            "PUT",
            "/disruption-budgets/one",
            &budget("one", "maxUnavailable: 0"),
            400,
            "bad-manifest",
        ),
        (
            "PUT",
            "/disruption-budgets/one",
            "kind: App",
            400,
            "bad-manifest",
        ),
        ("PUT", "/apps/one", &good, 400, "bad-manifest"),
        ("DELETE", "/leases/nobody", "", 404, "unknown-device"),
        ("DELETE", "/leases/No", "", 400, "bad-request"),
        ("POST", "/leases", "", 405, "method-not-allowed"),
    ];
    for (method, path, body, status, code) in cases {
        assert_eq!(
            call(method, path, body),
            (status, code.to_owned()),
            "{method} {path} {body}"
        );
    }
    assert_eq!(put(&bed, "one", "maxUnavailable: 1")["outcome"], "created");
    assert_eq!(
        put(&bed, "one", "maxUnavailable: 1")["outcome"],
        "unchanged"
    );
    assert_eq!(
        put(&bed, "one", "maxUnavailable: 50%")["outcome"],
        "updated"
    );
    for number in 1..64 {
        put(&bed, &format!("b{number}"), "maxUnavailable: 1");
    }
    let refused = call(
        "PUT",
        "/disruption-budgets/last",
        &budget("last", "maxUnavailable: 1"),
    );
    assert_eq!(refused, (422, "too-many-budgets".to_owned()));
    assert_eq!(
        bed.get("/disruption-budgets")["items"]
            .as_array()
            .unwrap()
            .len(),
        64
    );
    assert_eq!(
        call("DELETE", "/disruption-budgets/one", ""),
        (204, String::new())
    );
}
