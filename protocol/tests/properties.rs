//! What holds for every value and every input: round trips, canonical forms, and no panics.

#[path = "properties/strategy.rs"]
mod strategy;

use foreshore_protocol::api::PullView;
use foreshore_protocol::digest::Digest;
use foreshore_protocol::frame::{self, FrameError, HEADER_LEN, Message};
use foreshore_protocol::id::{LabelKey, LabelValue};
use foreshore_protocol::manifest;
use foreshore_protocol::message::{
    Beacon, Command, Event, EventKind, Events, Head, HubInfo, Lease, LeaseRequest, MAX_TEXT_BYTES,
    Presence, PullProgress, Reason, ReasonCode, Reported,
};
use foreshore_protocol::quantity::{Bytes, Cpus, Span};
use foreshore_protocol::release::Release;
use foreshore_protocol::secret::SealedSecrets;
use foreshore_protocol::topic::Topic;
use foreshore_protocol::{AppName, DeviceId};
use proptest::prelude::*;
use proptest::sample::Index;

fn round_trip<M: Message + Clone + PartialEq + std::fmt::Debug>(
    message: &M,
) -> Result<(), TestCaseError> {
    let bytes = frame::encode(message);
    prop_assert_eq!(&frame::decode::<M>(&bytes), &Ok(message.clone()));
    // A newer sender may append to the body.
    let mut longer = bytes[HEADER_LEN..].to_vec();
    longer.extend_from_slice(b"more");
    prop_assert_eq!(
        &frame::decode::<M>(&framed(M::SCHEMA, &longer)),
        &Ok(message.clone())
    );
    // No prefix is a message.
    for end in 0..bytes.len() {
        prop_assert!(frame::decode::<M>(&bytes[..end]).is_err());
    }
    Ok(())
}

/// A frame with a right checksum around any body.
fn framed(schema: u16, body: &[u8]) -> Vec<u8> {
    let mut frame = frame::MAGIC.to_vec();
    frame.extend_from_slice(&schema.to_le_bytes());
    frame.push(0);
    frame.extend_from_slice(&crc32fast::hash(body).to_le_bytes());
    frame.extend_from_slice(body);
    frame
}

fn decode_all(bytes: &[u8]) {
    let _ = frame::decode::<Head>(bytes);
    let _ = frame::decode::<Command>(bytes);
    let _ = frame::decode::<Reported>(bytes);
    let _ = frame::decode::<Beacon>(bytes);
    let _ = frame::decode::<PullProgress>(bytes).map(|pull| PullView::from(&pull));
    let _ = frame::decode::<Presence>(bytes);
    let _ = frame::decode::<Event>(bytes);
    let _ = frame::decode::<Events>(bytes);
    let _ = frame::decode::<HubInfo>(bytes);
    let _ = frame::decode::<SealedSecrets>(bytes);
    let _ = frame::decode::<LeaseRequest>(bytes);
    let _ = frame::decode::<Lease>(bytes);
}

proptest! {
    #[test]
    fn heads_round_trip(message in strategy::head()) {
        round_trip(&message)?;
    }

    #[test]
    fn requests_for_leases_round_trip(message in strategy::lease_request()) {
        round_trip(&message)?;
    }

    #[test]
    fn leases_round_trip(message in strategy::lease()) {
        round_trip(&message)?;
    }

    #[test]
    fn commands_round_trip(message in strategy::command()) {
        round_trip(&message)?;
    }

    #[test]
    fn reports_round_trip(message in strategy::reported()) {
        round_trip(&message)?;
    }

    #[test]
    fn beacons_round_trip(message in strategy::beacon()) {
        round_trip(&message)?;
    }

    #[test]
    fn pull_progress_round_trips(message in strategy::pull_progress()) {
        round_trip(&message)?;
        // Any numbers can be shown.
        let view = PullView::from(&message);
        for image in view.images {
            prop_assert!(image.fetched_bytes <= image.total_bytes);
        }
    }

    #[test]
    fn presences_round_trip(message in strategy::presence()) {
        round_trip(&message)?;
    }

    #[test]
    fn events_round_trip(message in strategy::event()) {
        round_trip(&message)?;
    }

    #[test]
    fn hub_infos_round_trip(message in strategy::hub_info()) {
        round_trip(&message)?;
    }

    #[test]
    fn sealed_secrets_round_trip(message in strategy::sealed_secrets()) {
        round_trip(&message)?;
    }

    #[test]
    fn a_changed_bit_never_yields_another_message(message in strategy::reported(), at in any::<Index>(), bit in 0_u8..8) {
        let mut bytes = frame::encode(&message);
        let at = at.index(bytes.len());
        bytes[at] ^= 1 << bit;
        // The header's own bits change what the frame claims to be; the body's break the checksum.
        prop_assert!(frame::decode::<Reported>(&bytes).is_err());
    }

    #[test]
    fn any_bytes_decode_to_an_answer(bytes in prop::collection::vec(any::<u8>(), 0..2048)) {
        decode_all(&bytes);
        let _ = manifest::parse(&bytes);
        let _ = Release::from_bytes(&bytes, &Digest::of(&bytes));
    }

    #[test]
    fn any_body_in_a_good_frame_decodes_to_an_answer(
        schema in 0_u16..16,
        body in prop::collection::vec(any::<u8>(), 0..512),
    ) {
        decode_all(&framed(schema, &body));
    }

    #[test]
    fn a_mutated_body_in_a_good_frame_decodes_to_an_answer(
        message in strategy::reported(),
        changes in prop::collection::vec((any::<Index>(), any::<u8>()), 1..8),
    ) {
        let mut body = frame::encode(&message)[HEADER_LEN..].to_vec();
        for (at, byte) in changes {
            let at = at.index(body.len());
            body[at] = byte;
        }
        if let Ok(decoded) = frame::decode::<Reported>(&framed(Reported::SCHEMA, &body)) {
            round_trip(&decoded)?;
        }
    }

    #[test]
    fn mutated_manifests_parse_to_an_answer_that_is_a_fixed_point(
        text in prop_oneof![Just(strategy::YAML), Just(strategy::JSON)],
        changes in prop::collection::vec((any::<Index>(), strategy::splice()), 1..6),
    ) {
        let mut bytes = text.as_bytes().to_vec();
        for (at, splice) in changes {
            splice.apply(&mut bytes, at);
        }
        match manifest::parse(&bytes) {
            Ok(app) => {
                let json = serde_json::to_vec(&app).expect("a manifest serializes");
                prop_assert_eq!(manifest::parse(&json).expect("a checked manifest is valid"), app);
            }
            Err(error) => {
                let text = error.to_string();
                prop_assert!(text.len() < 4096 && !text.contains(['\n', '\0', '\u{1b}']), "{}", text);
            }
        }
    }

    #[test]
    fn mutated_releases_are_refused_or_canonical(
        changes in prop::collection::vec((any::<Index>(), strategy::splice()), 1..6),
    ) {
        let mut bytes = strategy::release().to_canonical_json();
        for (at, splice) in changes {
            splice.apply(&mut bytes, at);
        }
        if let Ok(release) = Release::from_bytes(&bytes, &Digest::of(&bytes)) {
            let again = release.to_canonical_json();
            prop_assert_eq!(Release::from_bytes(&again, &release.digest()).expect("still a release"), release);
        }
    }

    #[test]
    fn names_are_exactly_rfc_1123_labels(text in "[a-zA-Z0-9._-]{0,66}") {
        let valid = !text.is_empty()
            && text.len() <= 63
            && text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
            && !text.starts_with('-')
            && !text.ends_with('-');
        prop_assert_eq!(text.parse::<AppName>().is_ok(), valid);
    }

    #[test]
    fn what_parses_displays_as_it_was_written(text in "\\PC{0,70}") {
        for parsed in [
            text.parse::<AppName>().ok().map(|name| name.to_string()),
            text.parse::<LabelKey>().ok().map(|key| key.to_string()),
            text.parse::<LabelValue>().ok().map(|value| value.to_string()),
            text.parse::<Digest>().ok().map(|digest| digest.to_string()),
            Topic::parse(&text).map(|topic| topic.to_string()),
        ].into_iter().flatten() {
            prop_assert_eq!(parsed, text.as_str());
        }
        let _ = (text.parse::<Bytes>(), text.parse::<Cpus>(), text.parse::<Span>());
    }

    #[test]
    fn digests_and_quantities_round_trip(
        bytes in any::<[u8; 32]>(),
        size in 0..=u64::try_from(i64::MAX).expect("positive"),
        cpus in 0..=9_999_999_u32,
        span in 0_u64..=10 * 366 * 24 * 3_600_000,
    ) {
        let digest = Digest::from_bytes(bytes);
        prop_assert_eq!(digest.to_string().parse::<Digest>(), Ok(digest));
        prop_assert_eq!(Bytes(size).to_string().parse::<Bytes>(), Ok(Bytes(size)));
        prop_assert_eq!(Cpus(cpus).to_string().parse::<Cpus>(), Ok(Cpus(cpus)));
        prop_assert_eq!(Span(span).to_string().parse::<Span>(), Ok(Span(span)));
    }

    #[test]
    fn topics_round_trip_and_no_device_has_anothers(one in strategy::name::<DeviceId>(), other in strategy::name::<DeviceId>()) {
        for leaf in foreshore_protocol::topic::Leaf::ALL {
            let topic = Topic::Device(one.clone(), leaf);
            prop_assert_eq!(Topic::parse(&topic.to_string()), Some(topic.clone()));
            prop_assert_eq!(topic.to_string() == Topic::Device(other.clone(), leaf).to_string(), one == other);
        }
    }

    #[test]
    fn texts_fit_however_long_they_are(text in "\\PC{0,600}") {
        let reason = Reason::new(ReasonCode::Internal, None, text.clone());
        prop_assert!(reason.message.len() <= MAX_TEXT_BYTES && text.starts_with(&reason.message));
        prop_assert!(text.len() - reason.message.len() < 4 || reason.message.len() > MAX_TEXT_BYTES - 4);
        let event = Event::new(1, 1, 0, EventKind::Exited, text);
        prop_assert_eq!(&event.message, &reason.message);
        prop_assert!(frame::decode::<Event>(&frame::encode(&event)).is_ok());
    }
}

#[test]
fn messages_that_hold_too_much_are_refused_with_what() {
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let mut draw = |strategy: BoxedStrategy<Reported>| {
        strategy
            .new_tree(&mut runner)
            .expect("a value can be drawn")
            .current()
    };
    let full = loop {
        let report = draw(strategy::reported().boxed());
        if report
            .apps
            .first()
            .is_some_and(|app| !app.services.is_empty())
        {
            break report;
        }
    };
    let refused = |change: &dyn Fn(&mut Reported)| {
        let mut report = full.clone();
        change(&mut report);
        match frame::decode::<Reported>(&frame::encode(&report)) {
            Err(FrameError::Bounds {
                schema: Reported::SCHEMA,
                what,
            }) => what,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(
        refused(&|report| {
            let app = &report.apps[0];
            report.apps = (0..257)
                .map(|i| {
                    let mut app = app.clone();
                    app.app = format!("a{i}").parse().unwrap();
                    app.services.clear();
                    app.reason = None;
                    app
                })
                .collect();
        }),
        "more than 256 apps"
    );
    assert_eq!(
        refused(&|report| report.apps.push(report.apps[0].clone())),
        "an app twice"
    );
    assert_eq!(
        refused(&|report| {
            let service = report.apps[0].services[0].clone();
            report.apps[0].services = vec![service; 65];
        }),
        "more than 64 services of an app"
    );
    assert_eq!(
        refused(&|report| {
            report.apps[0].reason = Some(Reason {
                code: ReasonCode::Internal,
                service: None,
                message: "x".repeat(513),
            });
        }),
        "a reason of more than 512 bytes"
    );
    assert_eq!(
        refused(&|report| report.inventory.kernel = "x".repeat(257)),
        "a fact about the device of more than 256 bytes"
    );
    assert_eq!(
        refused(&|report| {
            report.inventory.labels = (0..65)
                .map(|i| (format!("k{i}").parse().unwrap(), "v".parse().unwrap()))
                .collect();
        }),
        "more than 64 labels"
    );
    assert!(matches!(
        frame::decode::<Head>(&vec![0; frame::MAX_FRAME_BYTES + 1]),
        Err(FrameError::TooLarge(_))
    ));
    let mut flagged = frame::encode(&full);
    flagged[4] = 1;
    assert_eq!(
        frame::decode::<Reported>(&flagged),
        Err(FrameError::Flags(1))
    );
    assert_eq!(
        frame::decode::<Head>(&frame::encode(&full)),
        Err(FrameError::Schema {
            found: Reported::SCHEMA,
            expected: Head::SCHEMA
        })
    );
}
