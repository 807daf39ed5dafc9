//! The whole table of who may do what, and properties that hold for every text.

use foreshore_protocol::Digest;
use proptest::prelude::*;

use super::*;

fn device(name: &str) -> Identity {
    Identity::Device(name.parse().unwrap())
}

fn own(name: &str, leaf: Leaf) -> String {
    topic::device(&name.parse().unwrap(), leaf)
}

const ACTIONS: [Action; 5] = [
    Action::Publish { retain: false },
    Action::Publish { retain: true },
    Action::PublishWill { retain: false },
    Action::PublishWill { retain: true },
    Action::Subscribe,
];

/// Topics and filters that no device may use in any way, `dev1` included.
fn never() -> Vec<String> {
    let mut all: Vec<String> = [
        "",
        "/",
        "#",
        "+",
        "+/#",
        "+/+/+",
        "+/v1/hub",
        "fs",
        "fs/",
        "fs/#",
        "fs/v1",
        "fs/v1/",
        "fs/v1/#",
        "fs/v1/+",
        "fs/v1/+/+",
        "fs/v1/+/+/+",
        "fs/v1/+/dev1/#",
        "fs/v1/rel",
        "fs/v1/rel/",
        "fs/v1/rel/+",
        "fs/v1/rel/#",
        "fs/v1/rel/xyz",
        "fs/v1/hub/",
        "fs/v1/hub/#",
        "fs/v1/hub/x",
        "fs/v1/HUB",
        "FS/v1/hub",
        "fs/v2/hub",
        "/fs/v1/hub",
        "fs//v1/hub",
        "$SYS",
        "$SYS/#",
        "$SYS/broker/uptime",
        "$CONTROL/dynamic-security/v1",
        "$share/g/fs/v1/hub",
        "$share/g/#",
        "$queue/fs/v1/hub",
        "$exclusive/fs/v1/hub",
        "$limit/5/fs/v1/hub",
        "$delayed/1/fs/v1/hub",
        "fs/v1/hub\0",
        "fs/v1/00/dev1/head",
        "\u{0}",
        "fs/v1/../hub",
        "fs/v1/%2b/hub",
    ]
    .map(str::to_owned)
    .into();
    // All of another device, and of names that begin or end like ours.
    for other in ["dev2", "dev1x", "dev", "xdev1", "dev1-", "foreshore-hub"] {
        for leaf in Leaf::ALL {
            let topic = other.parse().map_or_else(
                |_| own("dev1", leaf).replace("dev1", other),
                |id: DeviceId| topic::device(&id, leaf),
            );
            all.push(format!("$share/g/{topic}"));
            all.push(topic);
        }
    }
    // Our own, but not exactly.
    for leaf in Leaf::ALL {
        let topic = own("dev1", leaf);
        all.push(format!("{topic}/"));
        all.push(format!("{topic}/x"));
        all.push(format!("{topic}/#"));
        all.push(format!("/{topic}"));
        all.push(format!("$share/g/{topic}"));
        all.push(topic.replace("dev1", "+"));
        all.push(topic.replace(&topic::shard(&"dev1".parse().unwrap()), "+"));
        all.push(topic.replace(leaf.as_str(), "+"));
        all.push(topic.to_uppercase());
    }
    all
}

#[test]
fn devices_may_do_exactly_this() {
    let dev1 = device("dev1");
    let mut asked = 0;
    let mut check = |action, subject: &str, expected: Result<(), Denied>| {
        asked += 1;
        assert_eq!(
            authorize(&dev1, action, subject),
            expected,
            "{action:?} {subject:?}"
        );
    };
    for leaf in Leaf::ALL {
        let topic = own("dev1", leaf);
        for action in ACTIONS {
            let expected = match (action, leaf) {
                (Action::Subscribe, Leaf::Head | Leaf::Command | Leaf::Secrets | Leaf::Lease) => {
                    Ok(())
                }
                (Action::Subscribe, _) => Err(Denied::Topic),
                (_, Leaf::Head | Leaf::Command | Leaf::Secrets | Leaf::Lease) => Err(Denied::Topic),
                (_, Leaf::Reported | Leaf::Presence) => Ok(()),
                (
                    Action::Publish { retain } | Action::PublishWill { retain },
                    Leaf::Beacon | Leaf::Pull | Leaf::Event | Leaf::LeaseRequest,
                ) => {
                    if retain {
                        Err(Denied::Retain)
                    } else {
                        Ok(())
                    }
                }
                (Action::Connect, _) => unreachable!("not among the actions"),
            };
            check(action, &topic, expected);
        }
    }
    for shared in [
        topic::HUB.to_owned(),
        topic::release(&Digest::of(b"a release")),
    ] {
        for action in ACTIONS {
            let expected = if action == Action::Subscribe {
                Ok(())
            } else {
                Err(Denied::Topic)
            };
            check(action, &shared, expected);
        }
    }
    for subject in never() {
        for action in ACTIONS {
            check(action, &subject, Err(Denied::Topic));
        }
    }
    assert!(asked >= 600, "only {asked} combinations");
}

#[test]
fn a_client_id_is_the_clients_own_name() {
    for (identity, client_id, expected) in [
        (device("dev1"), "dev1", Ok(())),
        (device("dev1"), "dev2", Err(Denied::ClientId)),
        (device("dev1"), "dev1x", Err(Denied::ClientId)),
        (device("dev1"), "Dev1", Err(Denied::ClientId)),
        (device("dev1"), "", Err(Denied::ClientId)),
        (device("dev1"), HUB_NAME, Err(Denied::ClientId)),
        (Identity::Hub, HUB_NAME, Ok(())),
        (Identity::Hub, "dev1", Err(Denied::ClientId)),
        (Identity::Hub, "", Err(Denied::ClientId)),
        (device(HUB_NAME), HUB_NAME, Err(Denied::Reserved)),
    ] {
        assert_eq!(
            authorize(&identity, Action::Connect, client_id),
            expected,
            "{identity} {client_id:?}"
        );
    }
}

#[test]
fn no_device_called_like_the_hub_may_do_anything() {
    let impostor = device(HUB_NAME);
    for subject in never()
        .into_iter()
        .chain(Leaf::ALL.map(|leaf| own(HUB_NAME, leaf)))
    {
        for action in ACTIONS {
            assert_eq!(
                authorize(&impostor, action, &subject),
                Err(Denied::Reserved)
            );
        }
    }
}

#[test]
fn the_hub_does_everything_below_its_prefix_and_nothing_outside() {
    for topic in Leaf::ALL
        .map(|leaf| own("dev1", leaf))
        .into_iter()
        .chain([topic::HUB.to_owned()])
    {
        for action in ACTIONS {
            assert_eq!(
                authorize(&Identity::Hub, action, &topic),
                Ok(()),
                "{action:?} {topic}"
            );
        }
    }
    for filter in [
        "fs/v1/#",
        "fs/v1/00/+/reported",
        &topic::shard_filter(7, Leaf::Event),
    ] {
        assert_eq!(authorize(&Identity::Hub, Action::Subscribe, filter), Ok(()));
        for action in ACTIONS
            .into_iter()
            .filter(|action| *action != Action::Subscribe)
        {
            assert_eq!(
                authorize(&Identity::Hub, action, filter),
                Err(Denied::Topic),
                "{action:?} {filter}"
            );
        }
    }
    for outside in [
        "#",
        "+/#",
        "fs/#",
        "fs/v1",
        "fs/v10/x",
        "fs/v2/x",
        "$SYS/#",
        "$share/g/fs/v1/#",
        "",
    ] {
        for action in ACTIONS {
            assert_eq!(
                authorize(&Identity::Hub, action, outside),
                Err(Denied::Topic),
                "{action:?} {outside}"
            );
        }
    }
}

fn name() -> impl Strategy<Value = String> {
    "[a-z0-9]([a-z0-9-]{0,12}[a-z0-9])?"
}

/// Texts that are near to topics: pieces of topics in any order.
fn nearly_a_topic() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        Just("fs".to_owned()),
        Just("v1".to_owned()),
        Just("hub".to_owned()),
        Just("rel".to_owned()),
        Just("+".to_owned()),
        Just("#".to_owned()),
        Just("$share".to_owned()),
        Just("$SYS".to_owned()),
        Just("head".to_owned()),
        Just("reported".to_owned()),
        Just("presence".to_owned()),
        Just("dev1".to_owned()),
        Just(topic::shard(&"dev1".parse().unwrap())),
        "[0-9a-f]{2}",
        "[0-9a-f]{64}",
        name(),
        ".{0,4}",
    ];
    prop::collection::vec(piece, 0..7).prop_map(|pieces| pieces.join("/"))
}

fn action() -> impl Strategy<Value = Action> {
    prop::sample::select(ACTIONS.to_vec())
}

proptest! {
    /// Two devices never share a topic that one of them writes.
    #[test]
    fn what_one_device_writes_no_other_reads_or_writes(a in name(), b in name(), leaf in 0..6_usize, action in action()) {
        prop_assume!(a != b && a != HUB_NAME && b != HUB_NAME);
        let topic = own(&a, Leaf::ALL[leaf]);
        prop_assert!(authorize(&device(&b), action, &topic).is_err());
    }

    #[test]
    fn a_device_is_allowed_only_exact_topics(text in nearly_a_topic(), action in action()) {
        if authorize(&device("dev1"), action, &text).is_ok() {
            prop_assert!(!text.contains(['+', '#', '$', '\0']));
            prop_assert!(text.starts_with("fs/v1/"));
            let shared = text == topic::HUB || (text.starts_with("fs/v1/rel/") && text.len() == 11 + 64);
            prop_assert!(text.contains("/dev1/") || (shared && action == Action::Subscribe));
        }
    }

    #[test]
    fn the_hub_never_leaves_its_prefix(text in prop_oneof![nearly_a_topic(), any::<String>()], action in action()) {
        if authorize(&Identity::Hub, action, &text).is_ok() {
            prop_assert!(text.starts_with("fs/v1/"));
        }
    }

    /// Adding the retain flag never allows more.
    #[test]
    fn retaining_is_never_more_than_publishing(text in nearly_a_topic()) {
        let ask = |action| authorize(&device("dev1"), action, &text).is_ok();
        let (kept, passed) = (Action::Publish { retain: true }, Action::Publish { retain: false });
        prop_assert!(!ask(kept) || ask(passed));
        prop_assert_eq!(ask(kept), ask(Action::PublishWill { retain: true }));
    }
}
