//! What is bounded: rollouts, releases, apps and labels of a device, and who is one.

use super::*;

#[test]
fn rollouts_and_releases_are_bounded_however_often_an_app_fails() {
    let mut hub = Hub::new();
    hub.join("a");
    let first = hub.apply(&resolved("0", AT_ONCE)).release;
    hub.obey("a", Phase::Succeeded);
    // None of the others ever completes.
    let releases: Vec<Digest> = (1..=130)
        .map(|tag| hub.apply(&resolved(&tag.to_string(), AT_ONCE)).release)
        .collect();
    store::rollout::prune(&hub.connection, &shop(), KEEP_ROLLOUTS).unwrap();
    let kept = store::rollout::newest_ids(&hub.connection, None, 1000).unwrap();
    assert_eq!(kept.len(), 101, "and the newest completed one");

    let known = |hub: &Hub, digest| {
        store::app::release_bytes(&hub.connection, digest)
            .unwrap()
            .is_some()
    };
    let topics = |hub: &Hub| store::desired::waiting_clears(&hub.connection, 1000).unwrap();
    let expired = releases::Expired::find(&hub.connection).unwrap();
    // Opened between the look and the deed.
    let again = hub.apply(&resolved("50", AT_ONCE)).release;
    let gone = hub
        .change(|change| releases::forget(change, &expired))
        .unwrap();
    assert_eq!(
        gone, 119,
        "130 but the newest ten and the one applied meanwhile"
    );
    assert!(
        known(&hub, &first),
        "what the device says it runs, and goes back to"
    );
    assert!(known(&hub, &again) && releases[120..].iter().all(|release| known(&hub, release)));
    assert_eq!(topics(&hub).len(), 119);

    // Applied again before the broker was told: it is published and not cleared.
    let topic = foreshore_protocol::topic::release(&releases[0]);
    assert!(topics(&hub).contains(&topic) && !known(&hub, &releases[0]));
    hub.apply(&resolved("1", AT_ONCE));
    assert!(!topics(&hub).contains(&topic) && known(&hub, &releases[0]));
    hub.obey("a", Phase::Succeeded);
    assert_eq!(hub.state(), RolloutState::Completed);
}

/// Apps that select every device whose label `crowd` is `yes`.
fn crowd(hub: &Hub, count: usize) {
    for number in 0..count {
        let mut app = resolved("1", AT_ONCE).app;
        app.metadata.name = format!("crowd-{number}").parse().unwrap();
        app.spec.selector.match_labels =
            Labels::from([("crowd".parse().unwrap(), "yes".parse().unwrap())]);
        let row = store::app::AppRow {
            manifest: app,
            created: hub.now,
            updated: hub.now,
            deleting: false,
        };
        store::app::put(&hub.connection, &row).unwrap();
    }
}

fn patch(labels: &[(&str, Option<&str>)]) -> foreshore_protocol::api::LabelPatch {
    let labels = labels.iter().map(|(key, value)| {
        let value = value.map(|value| value.parse().unwrap());
        (key.parse().unwrap(), value)
    });
    foreshore_protocol::api::LabelPatch {
        labels: labels.collect(),
    }
}

#[test]
fn more_apps_than_a_device_takes_are_refused_with_its_name() {
    let mut hub = Hub::new();
    crowd(&hub, MAX_APPS);
    hub.join("a");
    let everyone = resolved("1", AT_ONCE);
    hub.apply(&everyone);
    let too_many = |error: ControlError| {
        assert!(matches!(&error, ControlError::TooManyApps(_)), "{error:?}");
        assert!(error.to_string().contains("device a "), "{error}");
    };
    // With the app that it has, the crowd is one too many.
    let label = |hub: &mut Hub, value| {
        hub.change(|change| apps::patch_labels(change, &device("a"), &patch(&[("crowd", value)])))
    };
    too_many(label(&mut hub, Some("yes")).unwrap_err());

    // The harness has no transaction to roll back.
    let clear = "DELETE FROM member; UPDATE device SET operator_labels = '{}'";
    hub.connection.execute_batch(clear).unwrap();
    // One label lets an app go and another takes the crowd in: that fits.
    let swap = patch(&[("crowd", Some("yes")), ("role", Some("other"))]);
    hub.change(|change| apps::patch_labels(change, &device("a"), &swap))
        .unwrap();
    assert_eq!(
        store::app::member_count(&hub.connection, &shop()).unwrap(),
        0
    );
    let mut wider = resolved("2", AT_ONCE);
    wider.app.spec.selector.match_labels.clear();
    too_many(
        hub.change(|change| apps::plan(change, &wider, 7))
            .unwrap_err(),
    );
    too_many(
        hub.change(|change| apps::apply(change, &wider, 7))
            .unwrap_err(),
    );
}

#[test]
fn a_device_that_says_it_is_in_too_many_apps_goes_without_the_last_and_is_heard() {
    let mut hub = Hub::new();
    crowd(&hub, MAX_APPS);
    hub.apply(&resolved("1", AT_ONCE));
    hub.birth("a", 1, 1);
    let labels = [("crowd", "yes"), ("role", "web")];
    let labels = labels.map(|(key, value)| (key.parse().unwrap(), value.parse().unwrap()));
    let receipt = hub.report_with("a", 1, Labels::from(labels), Vec::new());
    assert!(receipt.stored.is_some());
    assert_eq!(
        store::app::member_count(&hub.connection, &shop()).unwrap(),
        0
    );
    assert_eq!(
        hub.kinds()
            .iter()
            .filter(|kind| *kind == "too-many-apps")
            .count(),
        1
    );
}

#[test]
fn operators_give_a_device_only_so_many_labels() {
    let mut hub = Hub::new();
    hub.join("a");
    let names: Vec<String> = (0..=MAX_LABELS)
        .map(|number| format!("l{number}"))
        .collect();
    let all: Vec<_> = names
        .iter()
        .map(|name| (name.as_str(), Some("x")))
        .collect();
    let mut label = |labels: &[(&str, Option<&str>)]| {
        hub.change(|change| apps::patch_labels(change, &device("a"), &patch(labels)))
    };
    label(&all[1..]).unwrap();
    label(&[("l1", Some("y"))]).unwrap();
    assert!(matches!(
        label(&all[..1]),
        Err(ControlError::TooManyLabels(_))
    ));
    // The harness has no transaction to roll back: it has one too many now, and may have fewer.
    label(&[("l1", None), ("l2", None)]).unwrap();
    label(&all[1..2]).unwrap();
}

#[test]
fn nobody_who_takes_the_hubs_name_becomes_a_device() {
    let mut hub = Hub::new();
    hub.birth(crate::broker::HUB_NAME, 1, 1);
    assert_eq!(store::device::count(&hub.connection).unwrap(), (0, 0));
}
