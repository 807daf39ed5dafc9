//! What the broker keeps while somebody is away, and what it forgets.

use std::collections::BTreeSet;
use std::time::Duration;

use foreshore_protocol::topic::{self, Leaf};

use crate::bed::{Bed, JOIN, own, wait_for};
use crate::wire::{Connect, Outgoing, SOON, VERSIONS, Version};

fn head() -> String {
    own("dev1", Leaf::Head)
}

fn outgoing<'a>(topic: &'a str, payload: &'a [u8], retain: bool) -> Outgoing<'a> {
    Outgoing {
        topic,
        payload,
        qos: 1,
        retain,
        alias: None,
    }
}

pub(crate) fn kept_messages_come_on_every_subscription(bed: &Bed) {
    let head = head();
    let mut hub = bed.hub();
    for version in VERSIONS {
        for payload in [&b"one"[..], b"two"] {
            assert_eq!(
                hub.publish(&outgoing(&head, payload, true))
                    .expect("the hub may"),
                0
            );
            // Twice on one connection, and again on the next.
            for _ in 0..2 {
                let mut device = bed.device(version, "dev1");
                for _ in 0..2 {
                    assert_eq!(device.subscribe(&head).expect("an answer"), 1);
                    let message = device.message(SOON).expect("what is kept");
                    assert_eq!(
                        (message.payload.as_slice(), message.retain),
                        (payload, true),
                        "{version:?}"
                    );
                }
                device.disconnect();
            }
        }
        // An empty message clears it.
        assert_eq!(
            hub.publish(&outgoing(&head, b"", true))
                .expect("the hub may"),
            0
        );
        let mut device = bed.device(version, "dev1");
        assert_eq!(device.subscribe(&head).expect("an answer"), 1);
        assert_eq!(device.subscribe(topic::HUB).expect("an answer"), 1);
        hub.publish(&outgoing(topic::HUB, b"fence", false))
            .expect("the hub may");
        assert!(
            device
                .messages_until(|message| message.payload == b"fence")
                .is_empty()
        );
        device.disconnect();
    }
    // The hub reads a whole shard at once.
    for number in 0..20 {
        let topic = own(&format!("dev{number}"), Leaf::Reported);
        hub.publish(&outgoing(&topic, b"state", true))
            .expect("the hub may");
    }
    let mut found = 0;
    for shard in 0..=255 {
        hub.subscribe(&topic::shard_filter(shard, Leaf::Reported))
            .expect("an answer");
    }
    while found < 20 {
        assert!(hub.message(SOON).expect("all of them").retain);
        found += 1;
    }
}

pub(crate) fn messages_wait_for_a_session_that_is_away(bed: &Bed) {
    let cmd = own("dev1", Leaf::Command);
    let mut hub = bed.hub();
    for version in VERSIONS {
        let connect = Connect::new(version, "dev1", JOIN).lasting(3600);
        let mut device = bed.connect(&connect).expect("allowed");
        assert!(!device.session_present);
        assert_eq!(device.subscribe(&cmd).expect("an answer"), 1);
        drop(device);
        for number in 0..50_u8 {
            assert_eq!(
                hub.publish(&outgoing(&cmd, &[number], false))
                    .expect("the hub may"),
                0
            );
        }
        let mut device = bed.connect(&connect).expect("allowed");
        assert!(device.session_present, "{version:?}");
        // In any order, and some perhaps twice: rmqtt sends again from the back what was on its way when the
        // connection broke. Nothing here relies on the order: generations and counters do that work.
        let mut waited = BTreeSet::new();
        while waited.len() < 50 {
            waited.insert(device.message(SOON).expect("what waited").payload[0]);
        }
        // The subscription is still there.
        hub.publish(&outgoing(&cmd, b"new", false))
            .expect("the hub may");
        device.messages_until(|message| message.payload == b"new");
        device.disconnect();
        bed.device(version, "dev1").disconnect();
    }
}

pub(crate) fn a_session_expires(bed: &Bed) {
    let cmd = own("dev1", Leaf::Command);
    let connect = Connect::new(Version::V5, "dev1", JOIN).lasting(1);
    let mut device = bed.connect(&connect).expect("allowed");
    assert_eq!(device.subscribe(&cmd).expect("an answer"), 1);
    drop(device);
    bed.hub()
        .publish(&outgoing(&cmd, b"too late", false))
        .expect("the hub may");
    // Nothing tells the end of a session but time.
    std::thread::sleep(Duration::from_secs(4));
    let mut device = bed.connect(&connect).expect("allowed");
    assert!(!device.session_present);
    assert_eq!(device.subscribe(&cmd).expect("an answer"), 1);
    bed.hub()
        .publish(&outgoing(&cmd, b"fence", false))
        .expect("the hub may");
    assert!(
        device
            .messages_until(|message| message.payload == b"fence")
            .is_empty()
    );
}

pub(crate) fn a_clean_start_forgets(bed: &Bed) {
    let cmd = own("dev1", Leaf::Command);
    let mut hub = bed.hub();
    for version in VERSIONS {
        let lasting = Connect::new(version, "dev1", JOIN).lasting(3600);
        let mut device = bed.connect(&lasting).expect("allowed");
        assert_eq!(device.subscribe(&cmd).expect("an answer"), 1);
        drop(device);
        hub.publish(&outgoing(&cmd, b"forgotten", false))
            .expect("the hub may");
        let mut device = bed.device(version, "dev1");
        assert!(!device.session_present, "{version:?}");
        assert_eq!(device.subscribe(&cmd).expect("an answer"), 1);
        hub.publish(&outgoing(&cmd, b"fence", false))
            .expect("the hub may");
        assert!(
            device
                .messages_until(|message| message.payload == b"fence")
                .is_empty(),
            "{version:?}"
        );
        device.disconnect();
    }
}

/// Neither broker keeps anything on disk: the hub publishes its part again, devices theirs.
pub(crate) fn a_restarted_broker_takes_clients_back(bed: &mut Bed) {
    let head = head();
    let mut hub = bed.hub();
    hub.publish(&outgoing(&head, b"kept", true))
        .expect("the hub may");
    let connect = Connect::new(Version::V5, "dev1", JOIN).lasting(3600);
    let mut device = bed.connect(&connect).expect("allowed");
    assert_eq!(device.subscribe(&head).expect("an answer"), 1);
    assert_eq!(device.message(SOON).expect("what is kept").payload, b"kept");
    for _ in 0..3 {
        bed.restart();
        assert!(hub.is_closed_within(SOON) && device.is_closed_within(SOON));
        wait_for("the broker to take clients again", || {
            bed.connect(&connect).is_ok_and(|client| {
                client.disconnect();
                true
            })
        });
        hub = bed.hub();
        device = bed.device(Version::V5, "dev1");
        assert_eq!(device.subscribe(&head).expect("an answer"), 1);
        hub.publish(&outgoing(&head, b"again", true))
            .expect("the hub may");
        let message = device.message(SOON).expect("what was published again");
        assert_eq!(message.payload, b"again", "nothing old comes back");
    }
}
