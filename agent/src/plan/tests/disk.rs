//! Writable layers that are too large, and a device that runs out of disk space.

use foreshore_protocol::message::EventKind;

use super::*;
use crate::plan::{Disk, DiskUsage, Notice};

/// A service that may write to its root file system.
fn writable(seed: u32, priority: u8) -> foreshore_protocol::manifest::Service {
    let mut service = always("good", seed);
    service.read_only = false;
    service.priority = priority;
    service
}

fn takes(world: &mut World, id: &str, layer_mib: u64, grown_mib: u64) {
    let usage = DiskUsage {
        layer: layer_mib << 20,
        grown: grown_mib << 20,
    };
    world.usage.insert(id.parse().unwrap(), usage);
}

fn short() -> Disk {
    Disk {
        low: true,
        free: 10 << 20,
        reserve: 100 << 20,
        missing: 115 << 20,
    }
}

fn told(notices: &[Notice], kind: EventKind) -> Option<&str> {
    let found = notices.iter().find(|notice| notice.kind == kind)?;
    Some(&found.message)
}

#[test]
fn a_container_that_writes_too_much_is_replaced_after_a_pause_and_its_layer_goes_at_once() {
    let mut world = settled(&release("shop", &[("web", writable(1, 50))]));
    takes(&mut world, "shop.web.1", 256, 0);
    let plan = world.turn(usize::MAX);
    assert_eq!(plan.steps, vec![], "the limit itself is allowed");
    takes(&mut world, "shop.web.1", 257, 0);
    let plan = world.turn(usize::MAX);
    assert!(
        matches!(&plan.steps[..], [Step::Stop { id, .. }] if id.instance == 1),
        "{plan:?}"
    );
    let message = told(&plan.notices, EventKind::DiskLimit).unwrap();
    assert!(
        message.contains("storage_opt.size") && message.contains("256m"),
        "{message}"
    );
    let reason = world.status("shop").reason.unwrap();
    assert_eq!(reason.code, ReasonCode::DiskLimit, "{reason:?}");
    let plan = world.turn(usize::MAX);
    assert!(
        matches!(&plan.steps[..], [Step::Remove { id }] if id.instance == 1),
        "{plan:?}"
    );
    let plan = world.turn(usize::MAX);
    assert_eq!(plan.steps, vec![], "it waits");
    assert!(plan.wake_at.is_some());
    world.run(60_000);
    assert_eq!(world.started.last().unwrap().0.instance, 2);
    let status = world.status("shop");
    assert_eq!((status.reason, status.services[0].restarts), (None, 1));
}

#[test]
fn a_layer_that_cannot_be_counted_is_too_large() {
    let mut world = settled(&release("shop", &[("web", writable(1, 50))]));
    let usage = DiskUsage {
        layer: u64::MAX,
        grown: 0,
    };
    world.usage.insert("shop.web.1".parse().unwrap(), usage);
    let plan = world.turn(usize::MAX);
    assert!(
        told(&plan.notices, EventKind::DiskLimit)
            .unwrap()
            .contains("counted")
    );
}

#[test]
fn a_short_disk_is_swept_and_then_the_least_important_and_largest_goes_first() {
    let services = [
        ("large", writable(1, 50)),
        ("small", writable(2, 50)),
        ("least", writable(3, 10)),
        ("plain", always("good", 4)),
    ];
    let mut world = settled(&release("shop", &services));
    takes(&mut world, "shop.large.1", 200, 0);
    takes(&mut world, "shop.small.1", 40, 0);
    takes(&mut world, "shop.least.1", 20, 0);
    let pinned = Digest::of(b"side-loaded");
    world.images.extend([pinned, Digest::of(b"garbage")]);
    world.pinned.insert(pinned);
    world.disk = short();
    let swept = world.turn(usize::MAX);
    assert!(
        matches!(swept.steps[..], [Step::Collect { .. }]),
        "{swept:?}"
    );
    assert!(world.images.contains(&pinned) && !world.images.contains(&Digest::of(b"garbage")));
    let waits = world.turn(usize::MAX);
    assert_eq!(waits.steps, vec![], "the sweep has to show first");

    for (victim, left) in [("least", 3), ("large", 2), ("small", 1)] {
        world.now.ms = world.now.ms.plus(10_000);
        let plan = world.turn(usize::MAX);
        let stopped: Vec<_> = world.stopped.iter().map(|id| id.service.as_str()).collect();
        assert_eq!(stopped.last(), Some(&victim), "{plan:?}");
        assert_eq!(plan.steps.len(), 1);
        let message = told(&plan.notices, EventKind::Evicted).unwrap();
        assert!(
            message.contains("short of disk space") && message.contains("10 MiB free"),
            "{message}"
        );
        world.turn(usize::MAX);
        assert_eq!(world.running("shop").len(), left);
    }
    let reason = world.status("shop").reason.unwrap();
    assert_eq!(reason.code, ReasonCode::Evicted, "{reason:?}");
    world.run(600_000);
    assert_eq!(
        world.running("shop").into_keys().collect::<Vec<_>>(),
        ["plain"]
    );

    world.disk = Disk::default();
    world.run(600_000);
    assert_eq!(world.running("shop").len(), 4);
    assert_eq!(world.status("shop").reason, None);
    assert!(!world.history.swept);
}

#[test]
fn who_has_nothing_to_give_or_would_not_help_stays() {
    let services = [("plain", always("good", 1)), ("little", writable(2, 0))];
    let mut world = settled(&release("shop", &services));
    takes(&mut world, "shop.little.1", 7, 0);
    world.disk = short();
    world.run(600_000);
    assert_eq!(world.stopped, vec![]);
    let (before, plan) = (world.history.clone(), world.turn(usize::MAX));
    assert_eq!(
        (plan.steps, plan.wake_at),
        (vec![], None),
        "and it is quiet"
    );
    assert_eq!(plan.history, before);
    // A volume that grew is a reason, although it stays.
    takes(&mut world, "shop.plain.1", 0, 8);
    world.run(60_000);
    let stopped: Vec<_> = world.stopped.iter().map(ToString::to_string).collect();
    assert_eq!(stopped, ["shop.plain.1"]);
}
