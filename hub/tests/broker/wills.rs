//! What the others hear when a client is gone.

use std::time::{Duration, Instant};

use foreshore_protocol::topic::Leaf;

use crate::bed::{Bed, JOIN, Kind, own};
use crate::wire::{Client, Connect, Message, Outgoing, SOON, VERSIONS, Version};

fn presence() -> String {
    own("dev1", Leaf::Presence)
}

fn with_will(version: Version) -> Connect {
    Connect::new(version, "dev1", JOIN).will(&presence(), "gone", true)
}

fn give_birth(device: &mut Client, payload: &str) {
    let topic = presence();
    let birth = Outgoing {
        topic: &topic,
        payload: payload.as_bytes(),
        qos: 1,
        retain: true,
        alias: None,
    };
    assert_eq!(device.publish(&birth).expect("allowed"), 0);
}

/// What a hub that comes now finds.
fn kept_presence(bed: &Bed) -> Message {
    let mut hub = bed.hub();
    assert_eq!(hub.subscribe(&presence()).expect("an answer"), 1);
    let message = hub.message(SOON).expect("presence is kept");
    hub.disconnect();
    message
}

pub(crate) fn a_lost_connection_fires_the_will_and_a_goodbye_does_not(bed: &Bed) {
    for version in VERSIONS {
        let mut hub = bed.hub();
        let mut device = bed.connect(&with_will(version)).expect("allowed");
        give_birth(&mut device, "here");
        assert_eq!(hub.subscribe(&presence()).expect("an answer"), 1);
        assert_eq!(hub.message(SOON).expect("the birth").payload, b"here");
        drop(device);
        assert_eq!(
            hub.message(SOON).expect("the Will").payload,
            b"gone",
            "{version:?}"
        );
        hub.disconnect();
        let kept = kept_presence(bed);
        assert_eq!((kept.payload.as_slice(), kept.retain), (&b"gone"[..], true));

        let mut hub = bed.hub();
        let mut device = bed.connect(&with_will(version)).expect("allowed");
        give_birth(&mut device, "here again");
        device.disconnect();
        // Its successor speaks after whatever the goodbye has brought.
        give_birth(
            &mut bed
                .connect(&Connect::new(version, "dev1", JOIN))
                .expect("allowed"),
            "and again",
        );
        assert_eq!(hub.subscribe(&presence()).expect("an answer"), 1);
        assert_eq!(hub.message(SOON).expect("the birth").payload, b"and again");
        hub.disconnect();
    }
}

pub(crate) fn a_silent_connection_is_found_out(bed: &Bed) {
    let mut hub = bed.hub();
    assert_eq!(hub.subscribe(&presence()).expect("an answer"), 1);
    let mut connect = with_will(Version::V5);
    connect.keep_alive_s = 5;
    let begun = Instant::now();
    let mut silent = bed.connect(&connect).expect("allowed");
    let late = Duration::from_secs(40);
    assert_eq!(hub.message(late).expect("the Will").payload, b"gone");
    assert!(
        (5..20).contains(&begun.elapsed().as_secs()),
        "after {:?}",
        begun.elapsed()
    );
    assert!(silent.is_closed_within(SOON));
}

pub(crate) fn a_delayed_will_waits_and_a_return_cancels_it(bed: &Bed) {
    let mut connect = with_will(Version::V5).lasting(3600);
    connect.will.as_mut().expect("it has one").delay_s = 5;
    let mut hub = bed.hub();
    assert_eq!(hub.subscribe(&presence()).expect("an answer"), 1);
    drop(bed.connect(&connect).expect("allowed"));
    let lost = Instant::now();
    // Back in time.
    let device = bed.connect(&connect).expect("allowed");
    assert!(device.session_present);
    assert!(
        hub.message(Duration::from_secs(7)).is_err(),
        "a return cancels the Will"
    );
    assert!(lost.elapsed() > Duration::from_secs(6));
    drop(device);
    let lost = Instant::now();
    assert_eq!(hub.message(SOON).expect("the Will").payload, b"gone");
    assert!(
        (4..15).contains(&lost.elapsed().as_secs()),
        "after {:?}",
        lost.elapsed()
    );
}

pub(crate) fn after_a_takeover_the_last_birth_is_what_is_kept(bed: &Bed) {
    for version in VERSIONS {
        for (round, lasting) in (0..16).zip([true, false].into_iter().cycle()) {
            let connect = if lasting {
                with_will(version).lasting(3600)
            } else {
                with_will(version)
            };
            let mut first = bed.connect(&connect).expect("allowed");
            give_birth(&mut first, "first");
            let mut second = bed.connect(&connect).expect("the newer connection wins");
            give_birth(&mut second, "second");
            assert!(
                first.is_closed_within(SOON),
                "two connections of one client"
            );
            second.ping().expect("the newer connection stays");
            // Whatever the first one's Will did, it has been done by the time its successor is answered twice.
            second.ping().expect("the newer connection stays");
            if bed.kind == Kind::Embedded {
                // rmqtt closes a connection before it sees to its Will.
                bed.device(version, "dev2").disconnect();
            }
            let kept = kept_presence(bed);
            assert_eq!(kept.payload, b"second", "{version:?}, round {round}");
            second.disconnect();
        }
    }
}
