//! Every way across, tried with data that would be seen on the other side.

use std::collections::BTreeSet;
use std::time::Duration;

use foreshore_hub::broker::{Action, HUB_NAME, Identity, authorize};
use foreshore_protocol::Digest;
use foreshore_protocol::topic::{self, Leaf};

use crate::bed::{Bed, JOIN, Kind, own};
use crate::wire::{Client, Connect, Message, Outgoing, Refused, SOON, VERSIONS, Version};

/// What an attacker publishes everywhere.
const POISON: &[u8] = b"poison";

/// Topics that dev1 must not write.
fn foreign_topics() -> Vec<String> {
    let mut topics: Vec<String> = [
        "fs/v1/hub",
        "fs/v1",
        "fs/v1/",
        "fs/v1/rel",
        "fs/v1/x",
        "fs/v1/hub/x",
        "fs/v2/hub",
        "fs",
        "a",
        "/",
        "$SYS/broker/uptime",
        "$SYS/x",
        "$CONTROL/dynamic-security/v1",
        "$share/g/fs/v1/hub",
        "$queue/fs/v1/hub",
        "$delayed/0/fs/v1/hub",
        "$p2p/dev2/fs/v1/hub",
        "fs/v1/+/dev2/head",
        "fs/v1/#",
        "#",
        "+",
        "",
    ]
    .map(str::to_owned)
    .into();
    topics.push(topic::release(&Digest::of(b"a release")));
    for leaf in Leaf::ALL {
        topics.push(own("dev2", leaf));
        topics.push(own("dev1x", leaf));
        topics.push(own("dev", leaf));
        topics.push(format!("{}/", own("dev1", leaf)));
        topics.push(format!("{}/x", own("dev1", leaf)));
        topics.push(format!("$share/g/{}", own("dev2", leaf)));
    }
    topics.push(own("dev1", Leaf::Head));
    topics.push(own("dev1", Leaf::Command));
    topics
}

/// Filters with which dev1 must not get at anything of others. Some match its own topics too.
fn foreign_filters() -> Vec<String> {
    let mut filters: Vec<String> = [
        "#",
        "+/#",
        "+/+/+/+/+",
        "fs/#",
        "fs/v1/#",
        "fs/v1/+/+/head",
        "fs/v1/+/+/+",
        "fs/v1/+/dev2/#",
        "fs/+/+/dev2/+",
        "fs/v1/rel/#/",
        "/#",
        "$SYS/#",
        "$SYS/broker/clients/total",
        "$share/g/#",
        "$share/g/fs/v1/#",
        "$queue/#",
        "$share/g/+/+/+/+/+",
        "$exclusive/fs/v1/#",
        "$limit/9/fs/v1/#",
        "$share//fs/v1/#",
        "$share/g",
        "fs/v1/+/de+/head",
        "fs/v1/#/head",
        "",
        "fs/v1/hub/#",
    ]
    .map(str::to_owned)
    .into();
    for leaf in Leaf::ALL {
        let topic = own("dev2", leaf);
        filters.push(format!("$share/g/{topic}"));
        filters.push(topic.replace("dev2", "+"));
        filters.push(topic.replace(leaf.as_str(), "#"));
        filters.push(topic.replace(leaf.as_str(), "+"));
        filters.push(format!("$limit/9/{topic}"));
        filters.push(format!("$exclusive/{topic}"));
        filters.push(topic);
    }
    filters
}

fn event(name: &str) -> String {
    own(name, Leaf::Event)
}

/// The hub hears this last message of a device after everything that came before it.
fn fence(device: &mut Client, hub: &mut Client, name: &str) -> Vec<Message> {
    let topic = event(name);
    device
        .publish(&Outgoing {
            topic: &topic,
            payload: b"fence",
            qos: 1,
            ..Outgoing::default()
        })
        .expect("a device may send events");
    hub.messages_until(|message| message.topic == topic && message.payload == b"fence")
}

/// What the broker has kept, as a new hub sees it.
fn kept(bed: &Bed) -> Vec<Message> {
    let mut hub = bed.hub();
    // Something that is certainly there, and sorts nowhere in particular.
    let mark = Outgoing {
        topic: "fs/v1/zz/mark",
        payload: b"mark",
        qos: 1,
        retain: true,
        alias: None,
    };
    hub.publish(&mark).expect("the hub may");
    assert_eq!(hub.subscribe("fs/v1/#").expect("an answer"), 1);
    let mut kept = hub.messages_until(|message| message.topic == mark.topic);
    // What stood behind the mark.
    hub.ping().expect("an answer");
    while let Ok(message) = hub.message(Duration::from_millis(100)) {
        kept.push(message);
    }
    hub.disconnect();
    kept
}

pub(crate) fn no_device_publishes_for_another(bed: &Bed) {
    let mut victim = bed.device(Version::V5, "dev2");
    for topic in [
        own("dev2", Leaf::Head),
        own("dev2", Leaf::Command),
        topic::HUB.to_owned(),
    ] {
        assert_eq!(victim.subscribe(&topic).expect("an answer"), 1);
    }
    let mut hub = bed.listening_hub();
    let mut tried = 0;
    for version in VERSIONS {
        for topic in foreign_topics() {
            let mut attacker = bed.device(version, "dev1");
            for (qos, retain) in [(0, false), (0, true), (1, false), (1, true), (2, true)] {
                tried += 1;
                let outgoing = Outgoing {
                    topic: &topic,
                    payload: POISON,
                    qos,
                    retain,
                    alias: None,
                };
                // The broker may hang up, for the topic or for QoS 2.
                if attacker.post(&outgoing).is_err() || attacker.ping().is_err() {
                    attacker = bed.device(version, "dev1");
                }
            }
            let crossed = fence(&mut attacker, &mut hub, "dev1");
            assert!(crossed.is_empty(), "{version:?} {topic:?}: {crossed:?}");
            attacker.disconnect();
        }
    }
    assert!(tried >= 500, "only {tried}");
    let cmd = own("dev2", Leaf::Command);
    hub.publish(&Outgoing {
        topic: &cmd,
        payload: b"fence",
        qos: 1,
        ..Outgoing::default()
    })
    .expect("the hub may");
    let crossed = victim.messages_until(|message| message.payload == b"fence");
    assert!(crossed.is_empty(), "{crossed:?}");
    let kept = kept(bed);
    assert!(
        kept.iter().all(|message| message.payload != POISON),
        "{kept:?}"
    );
}

pub(crate) fn no_device_leaves_a_will_for_another(bed: &Bed) {
    let mut hub = bed.listening_hub();
    let mut tried = 0;
    for version in VERSIONS {
        for topic in foreign_topics() {
            for retain in [false, true] {
                tried += 1;
                let connect = Connect::new(version, "dev1", JOIN).will(&topic, "poison", retain);
                // Dropped without a goodbye, if it was let in at all.
                drop(bed.connect(&connect));
            }
        }
        // A Will that is allowed comes after all of them.
        let presence = own("dev1", Leaf::Presence);
        let connect = Connect::new(version, "dev1", JOIN).will(&presence, "allowed", true);
        drop(bed.connect(&connect).expect("its own Will is allowed"));
        let crossed = hub
            .messages_until(|message| message.topic == presence && message.payload == b"allowed");
        assert!(crossed.is_empty(), "{version:?}: {crossed:?}");
    }
    assert!(tried >= 200, "only {tried}");
    let kept = kept(bed);
    assert!(
        kept.iter().all(|message| message.payload != POISON),
        "{kept:?}"
    );
}

pub(crate) fn no_device_reads_what_is_not_its_own(bed: &Bed) {
    let secret = b"for dev2 only";
    let mut hub = bed.hub();
    // There already, and kept.
    for topic in [
        own("dev2", Leaf::Head),
        own("dev2", Leaf::Reported),
        own("dev3", Leaf::Presence),
    ] {
        let outgoing = Outgoing {
            topic: &topic,
            payload: secret,
            qos: 1,
            retain: true,
            alias: None,
        };
        assert_eq!(hub.publish(&outgoing).expect("the hub may"), 0);
    }
    let filters = foreign_filters();
    for version in VERSIONS {
        // Each filter by an attacker of its own: the broker may hang up on some.
        let mut attackers = Vec::new();
        for (filter, number) in filters.iter().zip(10..) {
            let name = format!("dev{number}");
            let mut attacker = bed.device(version, &name);
            if attacker.subscribe(filter).is_err() {
                attacker = bed.device(version, &name);
            }
            let cmd = own(&name, Leaf::Command);
            assert_eq!(attacker.subscribe(&cmd).expect("its own is allowed"), 1);
            attackers.push((attacker, filter, cmd));
        }
        let mut neighbour = bed.device(version, "dev2");
        for leaf in Leaf::ALL {
            let topic = own("dev2", leaf);
            let client = if leaf.is_down() {
                &mut hub
            } else {
                &mut neighbour
            };
            let outgoing = Outgoing {
                topic: &topic,
                payload: secret,
                qos: 1,
                ..Outgoing::default()
            };
            assert_eq!(client.publish(&outgoing).expect("allowed"), 0);
        }
        for (attacker, filter, cmd) in &mut attackers {
            let last = Outgoing {
                topic: cmd,
                payload: b"fence",
                qos: 1,
                ..Outgoing::default()
            };
            hub.publish(&last).expect("the hub may");
            // Its own commands may come more than once, for each filter that matches.
            let crossed = attacker.messages_until(|message| message.payload == b"fence");
            assert!(crossed.is_empty(), "{version:?} {filter:?}: {crossed:?}");
        }
        for (mut attacker, filter, cmd) in attackers {
            while let Ok(late) = attacker.message(Duration::from_millis(10)) {
                assert_eq!(late.topic, cmd, "{version:?} {filter:?}");
            }
            attacker.disconnect();
        }
        neighbour.disconnect();
    }
    assert!(
        filters.len() * VERSIONS.len() >= 100,
        "only {}",
        filters.len()
    );
}

pub(crate) fn no_device_takes_over_the_session_of_another(bed: &Bed) {
    let cmd = own("dev2", Leaf::Command);
    for version in VERSIONS {
        let mut hub = bed.hub();
        let lasting = Connect::new(version, "dev2", JOIN).lasting(3600);
        let mut victim = bed.connect(&lasting).expect("dev2 is known");
        assert_eq!(victim.subscribe(&cmd).expect("an answer"), 1);
        let impostors = [
            ("dev1", "dev2"),
            ("dev1", HUB_NAME),
            ("dev1", ""),
            ("dev1", "DEV2"),
            ("dev1", "dev2 "),
            ("dev1", "dev1/dev2"),
        ];
        // While the victim is there: it stays.
        for (user, client_id) in impostors {
            let mut connect = Connect::new(version, user, JOIN).lasting(3600);
            connect.client_id = client_id.to_owned();
            drop(bed.connect(&connect));
        }
        victim.ping().expect("the victim is still connected");
        drop(victim);
        // While it is away: what waits for it waits on.
        hub.publish(&Outgoing {
            topic: &cmd,
            payload: b"waits",
            qos: 1,
            ..Outgoing::default()
        })
        .expect("the hub may");
        for (user, client_id) in impostors {
            for lasting in [true, false] {
                let mut connect = Connect::new(version, user, JOIN);
                if lasting {
                    connect = connect.lasting(3600);
                }
                connect.client_id = client_id.to_owned();
                if let Ok(mut impostor) = bed.connect(&connect) {
                    assert_ne!(bed.kind, Kind::Embedded, "{connect:?} was let in");
                    assert!(
                        impostor.message(Duration::from_millis(100)).is_err(),
                        "{connect:?}"
                    );
                }
            }
        }
        let mut victim = bed.connect(&lasting).expect("dev2 is known");
        assert!(victim.session_present, "{version:?}");
        assert_eq!(victim.message(SOON).expect("what waited").payload, b"waits");
        victim.disconnect();
        hub.disconnect();
        // For the next version, a session from the start.
        bed.device(version, "dev2").disconnect();
    }
}

pub(crate) fn a_topic_alias_is_no_way_around(bed: &Bed) {
    let mut hub = bed.listening_hub();
    let (foreign, own) = (own("dev2", Leaf::Reported), own("dev1", Leaf::Reported));
    let attempts: [&[(&str, Option<u16>)]; 7] = [
        &[(&foreign, Some(1)), ("", Some(1))],
        &[(&own, Some(1)), (&foreign, Some(1)), ("", Some(1))],
        &[("", Some(1))],
        &[("", None)],
        &[("", Some(0))],
        &[(&foreign, Some(65535)), ("", Some(65535))],
        &[(&own, Some(2)), ("", Some(1))],
    ];
    for attempt in attempts {
        let mut attacker = bed.device(Version::V5, "dev1");
        for (topic, alias) in attempt {
            let outgoing = Outgoing {
                topic,
                payload: POISON,
                qos: 1,
                retain: false,
                alias: *alias,
            };
            if attacker.post(&outgoing).is_err() || attacker.ping().is_err() {
                break;
            }
        }
        let mut attacker = bed.device(Version::V5, "dev1");
        let crossed = fence(&mut attacker, &mut hub, "dev1");
        assert!(
            crossed.iter().all(|message| message.topic == own),
            "{attempt:?}: {crossed:?}"
        );
        attacker.disconnect();
    }
}

/// The other side: the rules leave open what the system needs.
pub(crate) fn everybody_may_do_what_they_must(bed: &Bed) {
    let mut hub = bed.listening_hub();
    let release = topic::release(&Digest::of(b"a release"));
    for version in VERSIONS {
        let mut device = bed.device(version, "dev1");
        let dev1 = Identity::Device("dev1".parse().expect("a name"));
        for leaf in Leaf::ALL {
            let topic = own("dev1", leaf);
            for retain in [false, true] {
                if authorize(&dev1, Action::Publish { retain }, &topic).is_err() {
                    continue;
                }
                for qos in [0, 1] {
                    let outgoing = Outgoing {
                        topic: &topic,
                        payload: b"up",
                        qos,
                        retain,
                        alias: None,
                    };
                    assert_eq!(device.publish(&outgoing).expect("allowed"), 0, "{topic}");
                    let message = hub
                        .message(SOON)
                        .expect("what a device says reaches the hub");
                    assert_eq!(
                        (message.topic.as_str(), message.payload.as_slice()),
                        (topic.as_str(), &b"up"[..])
                    );
                }
            }
        }
        let mut expected = BTreeSet::new();
        for topic in [
            own("dev1", Leaf::Head),
            own("dev1", Leaf::Command),
            topic::HUB.to_owned(),
            release.clone(),
        ] {
            assert_eq!(device.subscribe(&topic).expect("an answer"), 1, "{topic}");
            let outgoing = Outgoing {
                topic: &topic,
                payload: b"down",
                qos: 1,
                ..Outgoing::default()
            };
            assert_eq!(hub.publish(&outgoing).expect("the hub may"), 0, "{topic}");
            expected.insert(topic);
        }
        while !expected.is_empty() {
            let message = device
                .message(SOON)
                .unwrap_or_else(|error| panic!("{error}: {expected:?} did not come"));
            assert!(expected.remove(&message.topic), "{message:?}");
        }
        device.disconnect();
        // The hub read its own words too.
        while hub.message(Duration::from_millis(200)).is_ok() {}
    }
    let refused = bed
        .connect(&Connect::new(Version::V5, "no-such-device", "wrong"))
        .err();
    assert!(matches!(refused, Some(Refused::Code(_) | Refused::Closed)));
}
