//! Containers, agents, hubs and brokers that die, and what must survive that.

use e2e::fleet::{
    Fleet, Identity, LONG, await_container, await_rollout, container, http_get, import,
    web_manifest,
};
use e2e::hub::HubOptions;
use e2e::image::Builder;
use e2e::mosquitto::Mosquitto;
use e2e::process::signal;
use e2e::{Bed, Device, Hub, wait_for, wait_until};

#[test]
fn a_killed_container_comes_back_and_a_killed_agent_leaves_its_containers_alone() {
    let bed = Bed::new("healing");
    let builder = Builder::new(&bed);
    builder.web("v1", "one", true);
    let mut fleet = Fleet::start(&bed, Hub::start(&bed), 1);
    let v1 = import(&fleet.api(), &builder, "v1");
    fleet
        .api()
        .apply("shop", &web_manifest("shop", &v1, "[{percent: 100}]"))
        .ok();
    fleet.await_rollout("shop", "completed");

    let first = await_container(&bed, "device-1", "shop", "server");
    signal(first.pid, libc::SIGKILL);
    let second = await_serving(&bed, "one");
    assert_ne!(second, first);

    fleet.devices[0].kill9();
    assert_eq!(container(&bed, "device-1", "shop", "server"), Some(second));
    fleet.devices[0].restart();
    fleet.await_online(1);
    // The report of the new agent: it runs, restarted once (by our kill above), and is the same process.
    let api = fleet.api();
    wait_for("the agent to report its adopted container", LONG, || {
        let view = api.device("device-1");
        let status = e2e::fleet::app_status(&view, "shop");
        if status["services"][0]["ready"] == true && view["online"] == true {
            Ok(())
        } else {
            Err(view)
        }
    });
    assert_eq!(container(&bed, "device-1", "shop", "server"), Some(second));

    // A container that dies while no agent is there is found dead and started again.
    fleet.devices[0].kill9();
    signal(second.pid, libc::SIGKILL);
    wait_until("it to be gone", LONG, || {
        container(&bed, "device-1", "shop", "server").is_none()
    });
    fleet.devices[0].restart();
    let third = await_container(&bed, "device-1", "shop", "server");
    assert_ne!(third, second);

    // A clean end of the agent leaves them alone too.
    fleet.devices[0].terminate();
    assert_eq!(container(&bed, "device-1", "shop", "server"), Some(third));
}

#[test]
fn hub_and_agents_killed_in_mid_rollout_go_on_where_they_were() {
    let bed = Bed::new("hubkill");
    let builder = Builder::new(&bed);
    builder.web("v1", "one", true);
    let mut fleet = Fleet::start(&bed, Hub::start(&bed), 4);
    let v1 = import(&fleet.api(), &builder, "v1");
    fleet
        .api()
        .apply(
            "shop",
            &web_manifest("shop", &v1, "[{count: 1}, {count: 2}, {count: 3}]"),
        )
        .ok();
    for wave in 0..3 {
        let api = fleet.api();
        wait_for(&format!("wave {wave} to open"), LONG, || {
            let rollout = api.rollout("shop");
            let state = rollout["waves"][wave]["state"].clone();
            if state != "pending" {
                Ok(())
            } else {
                Err(rollout)
            }
        });
        fleet.hub.kill9();
        for device in &mut fleet.devices {
            device.kill9();
            device.restart();
        }
        fleet.hub.restart();
    }
    let rollout = fleet.await_rollout("shop", "completed");
    assert_eq!(rollout["assignments"].as_array().map(Vec::len), Some(4));
    let release = rollout["to"].clone();
    fleet.await_release("shop", &release);
}

#[test]
fn a_device_starts_its_containers_with_no_hub_and_no_network() {
    let bed = Bed::new("offline");
    let builder = Builder::new(&bed);
    builder.web("v1", "one", true);
    let mut fleet = Fleet::start(&bed, Hub::start(&bed), 1);
    let v1 = import(&fleet.api(), &builder, "v1");
    fleet
        .api()
        .apply("shop", &web_manifest("shop", &v1, "[{percent: 100}]"))
        .ok();
    let rollout = fleet.await_rollout("shop", "completed");
    fleet.await_release("shop", &rollout["to"]);
    let before = await_container(&bed, "device-1", "shop", "server");

    // As after a power cut: agent and containers are gone, /run is empty, the hub is unreachable.
    fleet.hub.kill9();
    fleet.devices[0].kill9();
    for process in e2e::fleet::containers(&bed, "device-1", "") {
        signal(process.pid, libc::SIGKILL);
    }
    wait_until("the containers to be gone", LONG, || {
        container(&bed, "device-1", "shop", "server").is_none()
    });
    fleet.devices[0].restart();
    let after = await_serving(&bed, "one");
    assert_ne!(before, after);

    // The hub comes back: nothing is restarted.
    fleet.hub.restart();
    fleet.await_online(1);
    fleet.await_release("shop", &rollout["to"]);
    assert_eq!(container(&bed, "device-1", "shop", "server"), Some(after));
}

#[test]
fn the_main_job_works_over_mosquitto_and_survives_its_death() {
    let bed = Bed::new("mosquitto");
    let builder = Builder::new(&bed);
    builder.web("v1", "one", true);
    builder.web("v2", "two", true);
    let mut broker = Mosquitto::start(&bed, &["device-1", "device-2", "device-3"]);
    let hub = Hub::start_with(
        &bed,
        &HubOptions {
            broker: Some(&broker),
            ..HubOptions::default()
        },
    );
    let fleet = Fleet::start(&bed, hub, 3);
    let api = fleet.api();
    let [v1, v2] = ["v1", "v2"].map(|tag| import(&api, &builder, tag));
    api.apply(
        "shop",
        &web_manifest("shop", &v1, "[{count: 1}, {percent: 100}]"),
    )
    .ok();
    fleet.await_rollout("shop", "completed");
    let applied = api
        .apply(
            "shop",
            &web_manifest("shop", &v2, "[{count: 1}, {count: 2}]"),
        )
        .ok();
    wait_until("the first device to be switching or done", LONG, || {
        api.rollout("shop")["assignments"]
            .as_array()
            .is_some_and(|all| all.iter().any(|one| one["state"] != "planned"))
    });
    broker.program().kill9();
    broker.restart();
    fleet.await_rollout("shop", "completed");
    fleet.await_release("shop", &applied["release"]);
}

#[test]
fn an_offline_device_gets_the_newest_release_when_it_returns() {
    let bed = Bed::new("deferred");
    let builder = Builder::new(&bed);
    builder.web("v1", "one", true);
    builder.web("v2", "two", true);
    let mut fleet = Fleet::start(&bed, Hub::start(&bed), 3);
    let api = fleet.api();
    let [v1, v2] = ["v1", "v2"].map(|tag| import(&api, &builder, tag));
    api.apply("shop", &web_manifest("shop", &v1, "[{percent: 100}]"))
        .ok();
    fleet.await_rollout("shop", "completed");

    fleet.devices[2].terminate();
    fleet.await_online(2);
    let applied = api
        .apply("shop", &web_manifest("shop", &v2, "[{percent: 100}]"))
        .ok();
    let rollout = await_rollout(&api, "shop", "completed");
    let deferred: u64 = rollout["waves"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|w| w["deferred"].as_u64())
        .sum();
    assert_eq!(deferred, 1, "{rollout}");

    fleet.devices[2].restart();
    fleet.await_release("shop", &applied["release"]);
}

#[test]
fn corrupt_state_is_set_aside_and_what_runs_keeps_running() {
    let bed = Bed::new("corrupt");
    let builder = Builder::new(&bed);
    builder.web("v1", "one", true);
    let mut fleet = Fleet::start(&bed, Hub::start(&bed), 1);
    let v1 = import(&fleet.api(), &builder, "v1");
    fleet
        .api()
        .apply("shop", &web_manifest("shop", &v1, "[{percent: 100}]"))
        .ok();
    let rollout = fleet.await_rollout("shop", "completed");
    fleet.await_release("shop", &rollout["to"]);
    let before = await_container(&bed, "device-1", "shop", "server");

    for damage in [
        &b""[..],
        &[0_u8; 4096][..],
        &b"garbage that is no frame at all"[..],
    ] {
        fleet.devices[0].kill9();
        for entry in std::fs::read_dir(fleet.devices[0].state())
            .expect("state directory")
            .flatten()
        {
            let name = entry.file_name().to_string_lossy().into_owned();
            let state_file =
                entry.file_type().is_ok_and(|kind| kind.is_file()) && !name.contains("lock");
            if state_file && !name.contains("corrupt") {
                std::fs::write(entry.path(), damage).expect("state file is writable");
            }
        }
        fleet.devices[0].restart();
        fleet.await_online(1);
        fleet.await_release("shop", &rollout["to"]);
        assert_eq!(
            container(&bed, "device-1", "shop", "server"),
            Some(before),
            "damage {:?}",
            damage.first()
        );
    }
}

#[test]
fn a_device_with_a_wrong_token_is_refused_and_says_so() {
    let bed = Bed::new("token");
    let hub = Hub::start(&bed);
    let token = bed.path("wrong-token");
    std::fs::write(&token, "not-the-token\n").expect("the bed is writable");
    let mut device = Device::configure(&bed, hub.broker(), hub.url(), &token, "intruder", "", "");
    device.restart();
    wait_until("the agent to name the token file", LONG, || {
        device.log().contains("wrong-token")
    });
    let devices = hub.api().get("/devices").ok();
    assert_eq!(
        devices["items"].as_array().map(Vec::len),
        Some(0),
        "{devices}"
    );
    assert!(device.program().runs(), "a refused agent keeps trying");
}

/// The container of shop/server on device-1 once it answers with `version`. Looked up anew each time: the
/// process that builds a container is in its cgroup for a moment, too.
fn await_serving(bed: &Bed, version: &str) -> Identity {
    wait_for("the container to serve", LONG, || {
        let found = container(bed, "device-1", "shop", "server").ok_or("none")?;
        let answer = http_get(found, "/version").map_err(|_| "no answer")?;
        if answer == version {
            Ok(found)
        } else {
            Err("another version")
        }
    })
}
