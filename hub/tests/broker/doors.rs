//! Who is let in, and that waiting at the door blocks nobody.

use std::io::Write as _;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use foreshore_hub::broker::{Embedded, EmbeddedConfig, HUB_NAME, Limits, StartError};
use foreshore_hub::secrets::Secret;
use foreshore_protocol::topic::Leaf;

use crate::bed::{self, Bed, HUB, JOIN, Kind, own, wait_for};
use crate::wire::{Client, Connect, Outgoing, Refused, SOON, VERSIONS, Version};

pub(crate) fn whoever_proves_nothing_is_refused(bed: &Bed) {
    for version in VERSIONS {
        let good = Connect::new(version, "dev1", JOIN);
        let with = |change: &dyn Fn(&mut Connect)| {
            let mut connect = good.clone();
            change(&mut connect);
            connect
        };
        for (what, connect) in [
            (
                "wrong password",
                with(&|connect| connect.password = Some("wrong".to_owned())),
            ),
            (
                "empty password",
                with(&|connect| connect.password = Some(String::new())),
            ),
            (
                "almost the password",
                with(&|connect| connect.password = Some(JOIN[1..].to_owned())),
            ),
            ("no password", with(&|connect| connect.password = None)),
            (
                "the hub's password",
                with(&|connect| connect.password = Some(HUB.to_owned())),
            ),
            ("no user", with(&|connect| connect.user = None)),
            (
                "neither user nor password",
                with(&|connect| (connect.user, connect.password) = (None, None)),
            ),
            (
                "nobody's name",
                Connect::new(version, "No Such Device", JOIN),
            ),
            ("a wildcard as a name", Connect::new(version, "+", JOIN)),
            ("an empty name", Connect::new(version, "", JOIN)),
            ("a long name", Connect::new(version, &"a".repeat(64), JOIN)),
            (
                "the hub with the wrong password",
                Connect::new(version, HUB_NAME, "wrong"),
            ),
        ] {
            match bed.connect(&connect) {
                Err(Refused::Code(code)) => assert_ne!(code, 0, "{what}"),
                Err(Refused::Closed) => {}
                Err(Refused::Unavailable) => panic!("{what}: the broker did not decide"),
                Ok(_) => panic!("{version:?}: {what}: was let in"),
            }
        }
        bed.connect(&good)
            .expect("the right one is let in")
            .disconnect();
    }
}

pub(crate) fn a_device_cannot_come_as_the_hub(bed: &Bed) {
    let mut hub = bed.listening_hub();
    for version in VERSIONS {
        for (client_id, user) in [(HUB_NAME, HUB_NAME), (HUB_NAME, "dev1"), ("dev1", HUB_NAME)] {
            let mut connect = Connect::new(version, user, JOIN);
            connect.client_id = client_id.to_owned();
            // At the devices' door.
            if let Ok(mut impostor) = Client::open(bed.devices, &connect) {
                assert_eq!(user, "dev1", "{client_id} {user} was let in");
                assert_ne!(bed.kind, Kind::Embedded);
                let head = own("dev2", Leaf::Head);
                let _ = impostor.publish(&Outgoing {
                    topic: &head,
                    payload: b"x",
                    qos: 1,
                    ..Outgoing::default()
                });
            }
        }
    }
    let mut device = bed.device(Version::V5, "dev1");
    let event = own("dev1", Leaf::Event);
    device
        .publish(&Outgoing {
            topic: &event,
            payload: b"fence",
            qos: 1,
            ..Outgoing::default()
        })
        .expect("allowed");
    // The hub was not thrown out meanwhile, and heard nothing.
    assert!(
        hub.messages_until(|message| message.topic == event)
            .is_empty()
    );
}

pub(crate) fn many_silent_connections_do_not_keep_others_out(bed: &Bed) {
    let connect = Connect::new(Version::V5, "dev1", JOIN).encode();
    let beginnings: [&[u8]; 5] = [
        b"",
        b"\x10",
        &connect[..2],
        &connect[..connect.len() / 2],
        b"\x10\xff\xff\xff\x7f",
    ];
    let silent: Vec<TcpStream> = (0..200)
        .map(|number| {
            let mut stream =
                TcpStream::connect(bed.devices).expect("the broker accepts connections");
            stream
                .write_all(beginnings[number % beginnings.len()])
                .expect("a fresh socket");
            stream
        })
        .collect();
    for version in VERSIONS {
        let begun = Instant::now();
        let mut device = bed.device(version, "dev2");
        device.ping().expect("an answer");
        assert!(
            begun.elapsed() < Duration::from_secs(8),
            "it took {:?}",
            begun.elapsed()
        );
        device.disconnect();
    }
    drop(silent);
}

fn embedded(limits: Limits) -> Bed {
    Bed::with(Kind::Embedded, limits)
}

#[test]
fn the_embedded_broker_hangs_up_on_whoever_does_not_introduce_himself() {
    let bed = embedded(Limits {
        handshake_timeout: Duration::from_millis(300),
        handshakes: 8,
        ..Limits::default()
    });
    let connect = Connect::new(Version::V5, "dev1", JOIN).encode();
    // More than there are places: the last ones are accepted when the first ones have been thrown out.
    let mut silent: Vec<TcpStream> = (0..24)
        .map(|number| {
            let mut stream = TcpStream::connect(bed.devices).expect("the kernel's queue has room");
            stream
                .write_all(&connect[..number % 5])
                .expect("a fresh socket");
            stream
        })
        .collect();
    bed.device(Version::V5, "dev2").disconnect();
    for stream in &mut silent {
        stream.set_read_timeout(Some(SOON)).expect("a socket");
        let read = std::io::Read::read(stream, &mut [0; 16]);
        assert!(matches!(read, Ok(0)) || read.is_err_and(|error| !crate::wire::timed_out(&error)));
    }
}

#[test]
fn the_embedded_broker_takes_only_so_many_connections() {
    let bed = embedded(Limits {
        connections: 3,
        ..Limits::default()
    });
    let mut inside: Vec<_> = (0..3)
        .map(|number| bed.device(Version::V5, &format!("dev{number}")))
        .collect();
    assert_eq!(
        bed.connect(&Connect::new(Version::V5, "dev9", JOIN)).err(),
        Some(Refused::Closed)
    );
    // The hub is not counted, and nobody was thrown out.
    bed.hub().disconnect();
    for device in &mut inside {
        device.ping().expect("still connected");
    }
    inside.pop().expect("three").disconnect();
    wait_for("a place to come free", || {
        bed.connect(&Connect::new(Version::V5, "dev9", JOIN))
            .is_ok()
    });
}

#[test]
fn the_embedded_broker_keeps_only_so_many_sessions() {
    let bed = embedded(Limits {
        connections: 3,
        ..Limits::default()
    });
    let lasting =
        |number: usize| Connect::new(Version::V5, &format!("dev{number}"), JOIN).lasting(3600);
    for number in 0..6 {
        bed.connect(&lasting(number))
            .expect("there is room")
            .disconnect();
    }
    for refused in [lasting(6), Connect::new(Version::V3, "dev6", JOIN)] {
        assert!(matches!(bed.connect(&refused), Err(Refused::Code(_))));
    }
    // Whoever has a session may use it, and give it up; the hub is not counted.
    bed.hub().disconnect();
    assert!(
        bed.connect(&lasting(0))
            .expect("it has one")
            .session_present
    );
    bed.device(Version::V5, "dev0").disconnect();
    wait_for("a session to end", || bed.connect(&lasting(6)).is_ok());
}

#[test]
fn the_embedded_brokers_two_doors_are_for_two_kinds_of_client() {
    let bed = embedded(Limits::default());
    assert!(bed.hub.ip().is_loopback());
    for version in VERSIONS {
        let hub = Connect {
            version,
            ..bed::hub()
        };
        assert!(
            Client::open(bed.devices, &hub).is_err(),
            "the hub's secret is no good from outside"
        );
        assert!(Client::open(bed.hub, &Connect::new(version, "dev1", JOIN)).is_err());
        Client::open(bed.hub, &hub)
            .expect("this is its door")
            .disconnect();
    }
}

#[test]
fn a_port_that_is_taken_is_named() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = taken.local_addr().expect("a bound socket");
    let config = EmbeddedConfig::new(
        address,
        Secret::new(JOIN.to_owned()),
        Secret::new(HUB.to_owned()),
    );
    let error = Embedded::start(config).expect_err("it is taken");
    assert!(matches!(error, StartError::Listen { .. }), "{error:?}");
    assert!(error.to_string().contains(&address.to_string()), "{error}");
}

#[test]
fn a_device_that_sends_too_fast_is_slowed_down_and_loses_nothing() {
    let bed = embedded(Limits {
        device_messages_per_second: 20,
        ..Limits::default()
    });
    let mut hub = bed.listening_hub();
    let (loud, quiet) = (own("dev1", Leaf::Event), own("dev2", Leaf::Event));
    let mut device = bed.device(Version::V5, "dev1");
    let mut neighbour = bed.device(Version::V5, "dev2");
    let begun = Instant::now();
    // Ten seconds' worth may come at once; the rest is two seconds' and a half.
    let ids: Vec<u16> = (0..250_u8)
        .map(|number| {
            let payload = [number];
            device
                .post(&Outgoing {
                    topic: &loud,
                    payload: &payload,
                    qos: 1,
                    ..Outgoing::default()
                })
                .expect("not hung up on")
        })
        .collect();
    let asked = Instant::now();
    neighbour
        .publish(&Outgoing {
            topic: &quiet,
            payload: b"x",
            qos: 1,
            ..Outgoing::default()
        })
        .expect("allowed");
    assert!(
        asked.elapsed() < Duration::from_secs(2),
        "a neighbour waited {:?}",
        asked.elapsed()
    );
    for id in ids {
        assert_eq!(device.await_ack(id).expect("an answer"), 0);
    }
    assert!(
        begun.elapsed() > Duration::from_millis(2300),
        "it took only {:?}",
        begun.elapsed()
    );
    let mut heard = Vec::new();
    while heard.len() < 250 {
        let message = hub.message(SOON).expect("every message");
        if message.topic == loud {
            heard.push(message.payload[0]);
        }
    }
    assert_eq!(
        heard,
        (0..250_u8).collect::<Vec<_>>(),
        "in order, and each once"
    );
}
