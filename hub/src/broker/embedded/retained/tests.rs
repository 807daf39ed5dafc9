//! The store against its bounds, and wildcards against the rules of MQTT.

use proptest::prelude::*;
use rmqtt::codec::types::QoS;
use rmqtt::codec::v5::PublishProperties;
use rmqtt::types::{CodecPublish, From, Id};

use super::*;

fn retain(topic: &str, payload: &[u8], expiry: Option<u32>) -> Retain {
    let id = Id::new(1, 1, None, None, "dev1".into(), None);
    let properties = PublishProperties {
        message_expiry_interval: expiry.and_then(NonZeroU32::new),
        ..Default::default()
    };
    let publish = CodecPublish {
        dup: false,
        retain: true,
        qos: QoS::AtLeastOnce,
        topic: topic.into(),
        packet_id: None,
        payload: Bytes::copy_from_slice(payload),
        properties: Some(properties),
    };
    Retain {
        msg_id: None,
        from: From::from_custom(id),
        publish: Box::new(publish).into(),
    }
}

fn store(messages: usize, bytes: usize) -> Retained {
    Retained::new(&Limits {
        retained_messages: messages,
        retained_bytes: bytes,
        ..Limits::default()
    })
}

fn topics(store: &Retained, filter: &str, now: Instant) -> Vec<String> {
    store
        .matching(filter, now)
        .into_iter()
        .map(|(topic, _)| topic.to_string())
        .collect()
}

#[test]
fn a_message_replaces_the_last_and_an_empty_one_clears_it() {
    let (store, now) = (store(10, 1 << 20), Instant::now());
    store.put("a/b", retain("a/b", b"one", None), now);
    store.put("a/b", retain("a/b", b"two", None), now);
    let found = store.matching("a/b", now);
    assert_eq!(found.len(), 1);
    assert_eq!(&found[0].1.publish.payload[..], b"two");
    store.put("a/b", retain("a/b", b"", None), now);
    assert!(store.matching("#", now).is_empty());
    assert_eq!(store.kept().bytes, 0);
}

#[test]
fn neither_number_nor_bytes_grow_beyond_their_bounds() {
    let now = Instant::now();
    let few = store(3, 1 << 20);
    for topic in ["a", "b", "c", "d"] {
        few.put(topic, retain(topic, b"x", None), now);
    }
    assert_eq!(topics(&few, "#", now), ["a", "b", "c"]);
    // A full store still takes news of what it has.
    few.put("b", retain("b", b"new", None), now);
    assert_eq!(&few.matching("b", now)[0].1.publish.payload[..], b"new");

    let small = store(100, 2 * (OVERHEAD_BYTES + 101));
    for topic in ["a", "b", "c"] {
        small.put(topic, retain(topic, &[0; 100], None), now);
    }
    assert_eq!(topics(&small, "#", now), ["a", "b"]);
    // What became too large is gone rather than old.
    small.put("b", retain("b", &[0; 200], None), now);
    assert_eq!(topics(&small, "#", now), ["a"]);
    small.put("c", retain("c", &[0; 100], None), now);
    assert_eq!(topics(&small, "#", now), ["a", "c"]);
}

#[test]
fn only_the_senders_own_expiry_counts_and_it_runs_down() {
    let (store, now) = (store(10, 1 << 20), Instant::now());
    store.put("forever", retain("forever", b"x", None), now);
    store.put("short", retain("short", b"x", Some(60)), now);
    let later = now + Duration::from_secs(45);
    let left = &store.matching("short", later)[0].1.publish;
    assert_eq!(
        left.properties.as_ref().unwrap().message_expiry_interval,
        NonZeroU32::new(15)
    );
    assert!(
        store
            .matching("short", now + Duration::from_secs(61))
            .is_empty()
    );
    assert_eq!(
        topics(&store, "#", now + Duration::from_secs(1 << 30)),
        ["forever"]
    );
}

#[test]
fn filters_match_as_mqtt_says() {
    for (filter, topic, expected) in [
        ("a/b", "a/b", true),
        ("a/b", "a", false),
        ("a/b", "a/b/c", false),
        ("a/+", "a/b", true),
        ("a/+", "a/", true),
        ("a/+", "a", false),
        ("a/+", "a/b/c", false),
        ("+/b", "a/b", true),
        ("+", "a", true),
        ("+", "/a", false),
        ("/+", "/a", true),
        ("#", "a", true),
        ("#", "a/b/c", true),
        ("a/#", "a", true),
        ("a/#", "a/b/c", true),
        ("a/#", "ab", false),
        ("a/+/#", "a", false),
        ("a/+/#", "a/b", true),
        ("+/+", "/x", true),
        ("#", "$SYS/x", false),
        ("+/x", "$SYS/x", false),
        ("$SYS/#", "$SYS/x", true),
    ] {
        assert_eq!(matches(filter, topic), expected, "{filter} {topic}");
    }
}

proptest! {
    /// Looking only at a range of the map finds what looking at everything finds.
    #[test]
    fn the_range_misses_nothing(
        kept in prop::collection::btree_set("[ab$/!0-]{1,6}", 0..30),
        filter in prop::collection::vec("[ab$!0-]{0,2}|\\+|#", 1..5).prop_map(|levels| levels.join("/")),
    ) {
        let (store, now) = (store(100, 1 << 20), Instant::now());
        for topic in &kept {
            store.put(topic, retain(topic, b"x", None), now);
        }
        let expected: Vec<_> = kept.iter().filter(|topic| matches(&filter, topic)).cloned().collect();
        prop_assert_eq!(topics(&store, &filter, now), expected);
    }
}
