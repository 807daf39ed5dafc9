//! Packets that nobody should send.

use std::time::Duration;

use foreshore_protocol::topic::Leaf;

use crate::bed::{Bed, JOIN, own};
use crate::wire::{Client, Connect, Outgoing, SOON, VERSIONS, Version};

pub(crate) fn large_packets_pass_and_too_large_ones_do_not(bed: &Bed) {
    let mut hub = bed.listening_hub();
    let reported = own("dev1", Leaf::Reported);
    for version in VERSIONS {
        // The largest frame there is.
        let mut device = bed.device(version, "dev1");
        let largest = vec![7; 64 * 1024];
        let outgoing = Outgoing {
            topic: &reported,
            payload: &largest,
            qos: 1,
            retain: true,
            alias: None,
        };
        assert_eq!(
            device.publish(&outgoing).expect("allowed"),
            0,
            "{version:?}"
        );
        assert_eq!(
            hub.message(SOON).expect("the largest frame").payload.len(),
            64 * 1024
        );
        for size in [80 * 1024, 1 << 20, 8 << 20] {
            let too_large = vec![8; size];
            let outgoing = Outgoing {
                payload: &too_large,
                ..outgoing.clone()
            };
            let sent = device.publish(&outgoing);
            assert!(
                !matches!(sent, Ok(0)),
                "{version:?}: {size} bytes were taken"
            );
            device = bed.device(version, "dev1");
        }
        device
            .publish(&Outgoing {
                payload: b"fence",
                ..outgoing.clone()
            })
            .expect("allowed");
        let crossed = hub.messages_until(|message| message.payload == b"fence");
        assert!(crossed.is_empty(), "{} messages crossed", crossed.len());
        device.disconnect();
    }
}

/// A generator that is the same everywhere (SplitMix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    fn bytes(&mut self, most: u64) -> Vec<u8> {
        (0..self.next() % most)
            .map(|_| self.next().to_le_bytes()[0])
            .collect()
    }
}

pub(crate) fn garbage_harms_nobody_else(bed: &Bed) {
    let seed = 0x00f0_7e50_07e5_0000;
    let mut random = Random(seed);
    let mut hub = bed.listening_hub();
    let mut witness = bed.device(Version::V5, "dev2");
    let event = own("dev2", Leaf::Event);
    for round in 0..150 {
        let version = VERSIONS[round % 2];
        // After a good CONNECT, instead of one, and a CONNECT with some bytes changed.
        let mut bytes = random.bytes(200);
        match round % 3 {
            0 => {
                let mut attacker = bed.device(version, "dev1");
                // A real kind of packet, with garbage in it.
                if let Some(first) = bytes.first_mut() {
                    *first = [0x10, 0x30, 0x32, 0x3a, 0x40, 0x62, 0x82, 0xa2, 0xe0, 0xf0]
                        [round / 3 % 10];
                }
                let _ = attacker.send(&bytes);
                let _ = attacker.ping_within(Duration::from_millis(20));
            }
            1 => Client::scream(bed.devices, &bytes),
            _ => {
                let mut connect = Connect::new(version, "dev1", JOIN)
                    .will(&own("dev1", Leaf::Presence), "x", true)
                    .encode();
                for _ in 0..=random.next() % 4 {
                    let at = usize::try_from(random.next()).expect("64 bits") % connect.len();
                    connect[at] = random.next().to_le_bytes()[0];
                }
                Client::scream(bed.devices, &connect);
            }
        }
    }
    witness
        .publish(&Outgoing {
            topic: &event,
            payload: b"alive",
            qos: 1,
            ..Outgoing::default()
        })
        .expect("allowed");
    let crossed = hub.messages_until(|message| message.topic == event);
    // A changed CONNECT may still be good, with another text in its Will.
    let presence = own("dev1", Leaf::Presence);
    assert!(
        crossed.iter().all(|message| message.topic == presence),
        "seed {seed:#x}: {crossed:?}"
    );
}
