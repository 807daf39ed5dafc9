//! What is lost on the way comes again: heads, releases, reports, events.

use foreshore_protocol::topic::Leaf;
use serde_json::json;

use crate::bed::{Bed, Kind, manifest, wait_for, wait_until};
use crate::device::{Device, Kick};

#[test]
fn a_broker_that_lost_everything_is_filled_again() {
    let mut bed = Bed::start(Kind::Mosquitto);
    let devices = Device::fleet(&bed, 2);
    let v1 = bed.import("v1");
    let applied = bed.apply("shop", &manifest("shop", &v1, "[{percent: 100}]"));
    bed.await_rollout("shop", "completed");
    let heads_before = devices[0].state().heads.len();
    bed.kill_mosquitto();
    wait_until("the hub to notice", || {
        bed.request("GET", "/readyz", None, b"").0 == 503
    });
    assert_eq!(
        bed.get("/apps/shop")["upToDate"],
        2,
        "it serves all the same"
    );
    bed.start_mosquitto();
    wait_until("the hub to be back", || {
        bed.request("GET", "/readyz", None, b"").0 == 200
    });
    bed.await_online(2);

    // A device that comes with an empty disk finds its head and its release on the new broker.
    wait_until("the heads to be there again", || {
        devices[0].state().heads.len() > heads_before
    });
    drop(devices);
    let fresh = Device::start(&bed, "device-0");
    wait_for("the device to run it", || {
        fresh
            .running("shop")
            .filter(|running| running.to_string() == applied["release"].as_str().unwrap())
            .ok_or("nothing")
    });
    wait_until("the hub to notice the loss", || {
        bed.event_kinds().iter().any(|kind| kind == "device-reset")
    });
}

#[test]
fn events_are_stored_once_and_acknowledged_after_that() {
    let bed = Bed::start(Kind::Embedded);
    let device = Device::start(&bed, "device-0");
    bed.await_online(1);
    for seq in [1, 2, 2, 1, 3] {
        device.kick(Kick::Event { kept_from: 1, seq });
    }
    let stored = || {
        let events = bed.get("/events?after=0&limit=1000");
        let items = events["items"].as_array().unwrap().iter();
        items
            .filter(|event| event["kind"] == "agent-started")
            .map(|event| event["message"].as_str().unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    wait_until("the third event to be acknowledged", || {
        device.state().acked.is_some_and(|(event, _)| event == 3)
    });
    assert_eq!(stored(), ["event 1", "event 2", "event 3"]);

    // A gap is asked about, unless the device says that it is one.
    let asked = device.state().resyncs;
    device.kick(Kick::Event {
        kept_from: 4,
        seq: 6,
    });
    wait_until("the hub to ask", || device.state().resyncs > asked);
    assert_eq!(
        device.state().acked.unwrap().0,
        3,
        "what lies beyond a gap is not acknowledged"
    );
    device.kick(Kick::Event {
        kept_from: 6,
        seq: 6,
    });
    wait_until("the gap to be believed", || {
        device.state().acked.is_some_and(|(event, _)| event == 6)
    });
    assert_eq!(stored().last().unwrap(), "event 6");
}

#[test]
fn a_beacon_from_a_device_that_is_behind_brings_the_head_again() {
    let mut bed = Bed::start(Kind::Embedded);
    let device = Device::start(&bed, "device-0");
    bed.await_online(1);
    let v1 = bed.import("v1");
    bed.apply("shop", &manifest("shop", &v1, "[{percent: 100}]"));
    bed.await_rollout("shop", "completed");
    // The device forgets that it stored it.
    let heads = device.state().heads.len();
    device.state().accepted = None;
    device.kick(Kick::Beacon);
    wait_until("the head to come again", || {
        device.state().heads.len() > heads
    });

    // And one that is ahead of a hub whose database is gone is named, not overwritten.
    let token = bed.join_token();
    bed.kill_hub();
    for file in ["hub.db", "hub.db-wal", "hub.db-shm"] {
        _ = std::fs::remove_file(bed.data().join(file));
    }
    bed.start_hub();
    assert_eq!(bed.join_token(), token);
    wait_until("the hub to notice", || {
        bed.event_kinds().iter().any(|kind| kind == "device-ahead")
    });
    assert!(device.running("shop").is_some(), "what it runs stays");
}

#[test]
fn what_cannot_be_understood_is_counted_and_named_and_harms_nobody() {
    let bed = Bed::start(Kind::Embedded);
    let device = Device::start(&bed, "device-0");
    bed.await_online(1);
    for leaf in [Leaf::Beacon, Leaf::Event, Leaf::Reported] {
        device.kick(Kick::Raw(leaf, b"nonsense".to_vec()));
        device.kick(Kick::Raw(leaf, vec![0xff; 60_000]));
    }
    wait_until("it to be counted", || {
        let (_, text) = bed.request(
            "GET",
            "/metrics",
            Some(&format!("Bearer {}", bed.token())),
            b"",
        );
        text.as_str()
            .unwrap()
            .contains("foreshore_mqtt_refused_total 6")
    });
    let refused = bed
        .event_kinds()
        .into_iter()
        .filter(|kind| kind == "message-refused")
        .count();
    assert_eq!(refused, 1, "one event, not a flood");
    device.kick(Kick::Event {
        kept_from: 1,
        seq: 1,
    });
    wait_until("the next good one to be taken", || {
        device.state().acked.is_some_and(|(event, _)| event == 1)
    });
}

#[test]
fn a_device_that_is_cut_off_is_seen_offline_and_an_old_will_never_wins() {
    let bed = Bed::start(Kind::Embedded);
    let mut device = Device::start(&bed, "device-0");
    bed.await_online(1);
    device.cut();
    bed.await_online(0);
    device.connect(&bed);
    bed.await_online(1);
    // The Will of the first connection, late.
    let stale = foreshore_protocol::message::Presence {
        session: 1,
        online: false,
        boot: 1,
        version: None,
        reported_seq: 0,
        max_schema: 1,
        agent_version: "test".to_owned(),
        secrets_key: None,
        secrets: None,
    };
    device.kick(Kick::Raw(
        Leaf::Presence,
        foreshore_protocol::frame::encode(&stale),
    ));
    device.kick(Kick::Event {
        kept_from: 1,
        seq: 1,
    });
    wait_until("the event behind it to be taken", || {
        device.state().acked.is_some_and(|(event, _)| event == 1)
    });
    assert_eq!(bed.get("/devices/device-0")["online"], json!(true));
}
