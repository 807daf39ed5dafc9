//! A hub that was restored from a backup, and devices whose word comes late, twice or from nowhere.

use super::*;

/// A hub with a release on `a`, and one that is restored from its backup.
fn restored() -> (Hub, Version) {
    let mut hub = Hub::new();
    hub.join("a");
    hub.apply(&resolved("1", AT_ONCE));
    hub.obey("a", Phase::Succeeded);
    let known = hub.head("a").unwrap().version;
    store::desired::begin_epoch(&hub.connection, UnixMs(1_700_000_000_000)).unwrap();
    (hub, known)
}

fn says(hub: &mut Hub, name: &str, seq: u64, version: Version) {
    let labels = Labels::from([("role".parse().unwrap(), "web".parse().unwrap())]);
    let report = reported(1, seq, Some(version), labels, Vec::new());
    hub.hear(name, false, Message::Reported(report));
}

fn ahead(known: Version, by: u64) -> Version {
    Version::from_numbers(known.epoch.get(), known.generation.get() + by).unwrap()
}

/// What may be published to a device.
fn told(hub: &Hub, name: &str) -> Option<Version> {
    store::desired::waiting_heads(&hub.connection, 10, |_, _| false)
        .unwrap()
        .into_iter()
        .find(|(id, _)| *id == device(name))
        .map(|(_, head)| head.version)
}

fn is_held(hub: &Hub, name: &str) -> bool {
    let held = store::device::held(&hub.connection, &device(name)).unwrap();
    held.is_some()
}

fn release(hub: &mut Hub, name: &str) {
    hub.change(|change| apps::hold(change, &device(name), None))
        .unwrap();
}

#[test]
fn a_device_that_is_beyond_the_backup_stays_held_whatever_it_says_later() {
    let (mut hub, known) = restored();
    says(&mut hub, "a", 50, ahead(known, 3));
    assert!(is_held(&hub, "a"));
    // A report from before, which was on its way for long, and one that an operator makes of it.
    says(&mut hub, "a", 49, known);
    says(&mut hub, "a", 51, known);
    hub.apply(&resolved("2", AT_ONCE));
    assert_eq!(told(&hub, "a"), None, "it is told nothing");
    assert!(is_held(&hub, "a"));
    release(&mut hub, "a");
    assert!(told(&hub, "a").unwrap() > ahead(known, 3));
}

#[test]
fn a_device_that_takes_what_the_broker_had_kept_is_held_when_it_says_so() {
    let (mut hub, known) = restored();
    // It was away, and has no more than the backup.
    says(&mut hub, "a", 50, known);
    assert!(!is_held(&hub, "a"));
    // What was published before the disk was lost reaches it from the broker.
    says(&mut hub, "a", 51, ahead(known, 1));
    assert!(is_held(&hub, "a"));
    hub.apply(&resolved("2", AT_ONCE));
    assert_eq!(told(&hub, "a"), None);
    let named = hub.kinds();
    let named = named.iter().filter(|kind| *kind == "device-ahead");
    assert_eq!(named.count(), 1);
    release(&mut hub, "a");
    assert!(told(&hub, "a").unwrap() > ahead(known, 1));
}

#[test]
fn a_device_that_joined_after_the_backup_is_held_when_it_comes() {
    let (mut hub, known) = restored();
    says(&mut hub, "b", 7, known);
    assert!(is_held(&hub, "b"), "the backup knows nothing of it");
    assert_eq!(told(&hub, "b"), None);
    // Nor did the broker's copy of its first birth, from before it was given anything, say that it is new.
    hub.hear("d", true, Message::Presence(presence(1, 1, true)));
    says(&mut hub, "d", 7, known);
    assert!(is_held(&hub, "d"));
    assert_eq!(told(&hub, "d"), None);
    // One that is really new is not.
    hub.join("c");
    assert!(!is_held(&hub, "c"));
    hub.tick();
    assert!(told(&hub, "c").is_some());
    release(&mut hub, "b");
    hub.tick();
    assert!(told(&hub, "b").unwrap() > known);
}
