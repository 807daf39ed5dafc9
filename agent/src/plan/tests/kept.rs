//! Old containers that run on beside those that took their place.

use foreshore_protocol::manifest::Service;
use foreshore_protocol::message::{EventKind, KeptOld};
use foreshore_protocol::quantity::Span;
use proptest::prelude::*;

use super::*;
use crate::plan::{Disk, Notice};
use crate::runtime::{ContainerState, Exit};

/// How long old ones are kept here.
const KEEP_MS: u64 = 600_000;

fn keeping(mut service: Service, keep_ms: u64) -> Service {
    service.deploy.update_config.order = UpdateOrder::StartFirst;
    service.deploy.update_config.keep_old = Some(Span(keep_ms));
    service
}

fn shop(behaviour: &str, seed: u32) -> Release {
    release(
        "shop",
        &[("web", keeping(always(behaviour, seed), KEEP_MS))],
    )
}

/// The running containers, `SERVICE.INSTANCE`.
fn live(world: &World) -> Vec<String> {
    let mut live: Vec<_> = world
        .containers
        .iter()
        .filter(|(container, ..)| matches!(container.state, ContainerState::Running { .. }))
        .map(|(container, ..)| format!("{}.{}", container.id.service, container.id.instance))
        .collect();
    live.sort();
    live
}

fn kept(world: &mut World) -> Option<KeptOld> {
    world.status("shop").services[0].kept
}

/// Everything that is told until `ms` are over.
fn told(world: &mut World, ms: u64) -> Vec<Notice> {
    let end = world.now.ms.plus(ms);
    let mut notices = Vec::new();
    while world.now.ms < end {
        let plan = world.turn(usize::MAX);
        notices.extend(plan.notices);
        if plan.steps.is_empty() {
            world.now.ms = world.now.ms.plus(50);
        }
    }
    notices
}

fn why(notices: &[Notice], kind: EventKind) -> &str {
    let found = notices.iter().find(|notice| notice.kind == kind);
    found.map_or("", |notice| &notice.message)
}

#[test]
fn the_old_container_runs_on_through_the_trial_and_for_its_time_and_then_goes() {
    let v1 = shop("good", 1);
    let mut world = settled(&v1);
    let v2 = world.assign(&shop("good", 2));
    let notices = told(&mut world, SOAK_MS + 1_000);
    assert!(
        why(&notices, EventKind::Kept).contains("shop.web.1 runs on for 10m"),
        "{notices:?}"
    );
    let status = world.status("shop");
    assert_eq!(
        (status.phase, status.running),
        (Phase::Succeeded, Some(v2)),
        "the old one is not in the way of success"
    );
    let expected = KeptOld {
        instance: 1,
        release: v1.digest(),
        keep_ms: KEEP_MS,
    };
    assert_eq!(status.services[0].kept, Some(expected));
    assert_eq!(live(&world), ["web.1", "web.2"]);
    // Its image and manifest are in use.
    assert!(world.releases.contains_key(&v1.digest()) && world.images.len() == 2);
    // The agent's end changes nothing.
    world.crash();
    world.run(KEEP_MS - SOAK_MS - 2_000);
    assert_eq!(live(&world), ["web.1", "web.2"]);
    assert!(world.stopped.is_empty());
    let notices = told(&mut world, 2_000);
    assert!(
        why(&notices, EventKind::LetGo).contains("its time is over"),
        "{notices:?}"
    );
    assert_eq!(live(&world), ["web.2"]);
    assert_eq!(kept(&mut world), None);
    assert_eq!(world.status("shop").running, Some(v2));
    world.run(HOUR);
    assert_eq!((world.started.len(), world.stopped.len()), (2, 1));
    assert_eq!(world.images.len(), 1, "garbage by now");
}

#[test]
fn a_trial_that_fails_takes_the_old_container_back_and_nothing_is_started() {
    for behaviour in [
        "never-ready",
        "unready 2500",
        "exit 1 2500",
        "hang 2500",
        "refuse",
    ] {
        let v1 = shop("good", 1);
        let mut world = settled(&v1);
        world.assign(&shop(behaviour, 2));
        let notices = told(&mut world, 60_000);
        let status = world.status("shop");
        assert_eq!(status.phase, Phase::RolledBack, "{behaviour}");
        assert_eq!(status.running, Some(v1.digest()), "{behaviour}");
        assert_eq!(status.services[0].kept, None);
        assert_eq!(status.services[0].restarts, 0);
        assert!(status.services[0].ready);
        assert_eq!(live(&world), ["web.1"], "{behaviour}");
        let first: ContainerId = "shop.web.1".parse().unwrap();
        assert!(!world.stopped.contains(&first), "{behaviour}");
        let of_v1 = world
            .started
            .iter()
            .filter(|(_, release)| *release == v1.digest());
        assert_eq!(of_v1.count(), 1, "{behaviour}");
        assert!(why(&notices, EventKind::TakenBack).contains("never stopped"));
        // And it is its service's own in every way: it heals.
        world.containers.clear();
        world.run(HOUR);
        assert_eq!(
            (live(&world).len(), world.running("shop")["web"]),
            (1, v1.digest())
        );
        assert_eq!(world.status("shop").services[0].restarts, 1);
    }
}

#[test]
fn what_the_hub_takes_back_within_that_time_is_still_there() {
    for after_ms in [1_000, SOAK_MS + 1_000, KEEP_MS - 1_000] {
        let v1 = shop("good", 1);
        let mut world = settled(&v1);
        world.assign(&shop("good", 2));
        world.run(after_ms);
        assert_eq!(live(&world), ["web.1", "web.2"]);
        world.assign(&v1);
        world.run(0);
        assert_eq!(live(&world), ["web.1"], "after {after_ms} ms");
        world.run(HOUR);
        let status = world.status("shop");
        assert_eq!(
            (status.phase, status.running),
            (Phase::Succeeded, Some(v1.digest()))
        );
        assert_eq!((world.started.len(), world.stopped.len()), (2, 1));
        // Forward again: a new container, and the old one is kept again.
        world.assign(&shop("good", 2));
        world.run(1_000);
        assert_eq!(live(&world), ["web.1", "web.3"]);
    }
    // Too late: it is started like any other.
    let v1 = shop("good", 1);
    let mut world = settled(&v1);
    world.assign(&shop("good", 2));
    world.run(HOUR);
    world.assign(&v1);
    world.run(1_000);
    assert_eq!(live(&world), ["web.2", "web.3"], "now the other is kept");
}

#[test]
fn one_that_ends_while_it_is_kept_is_not_started_again_and_is_held_against_nobody() {
    for end in [
        ContainerState::Broken,
        ContainerState::Exited(Exit::with_code(0)),
    ] {
        let v1 = shop("good", 1);
        let mut world = settled(&v1);
        let v2 = world.assign(&shop("good", 2));
        world.run(1_000);
        world.containers[0].0.state = end;
        let notices = told(&mut world, SOAK_MS);
        assert!(
            why(&notices, EventKind::LetGo).contains("is not started again"),
            "{notices:?}"
        );
        let status = world.status("shop");
        assert_eq!((status.phase, status.running), (Phase::Succeeded, Some(v2)));
        assert_eq!(live(&world), ["web.2"]);
        // Going back starts it.
        world.assign(&v1);
        world.run(HOUR);
        assert_eq!(world.running("shop")["web"], v1.digest());
        assert_eq!(world.started.len(), 3);
    }
}

#[test]
fn of_a_service_one_is_kept_at_most_and_that_is_the_last_known_good_s() {
    // A release that replaces one on trial: what is good stays, what was tried goes at once.
    let v1 = shop("good", 1);
    let mut world = settled(&v1);
    world.assign(&shop("good", 2));
    world.run(1_000);
    assert_eq!(world.phase("shop"), Phase::Soaking);
    world.assign(&shop("good", 3));
    world.run(0);
    assert_eq!(live(&world), ["web.1", "web.3"]);
    world.run(SOAK_MS + 1_000);
    assert_eq!(kept(&mut world).unwrap().instance, 1);
    // The third is good now, so the first is an older one; `check` counts to two.
    world.assign(&shop("good", 4));
    world.run(1_000);
    assert_eq!(live(&world), ["web.3", "web.4"]);
    assert_eq!(kept(&mut world).unwrap().instance, 3);
    assert_eq!(kept(&mut world).unwrap().release, shop("good", 3).digest());
    world.run(HOUR);
    assert_eq!(live(&world), ["web.4"]);
    assert_eq!(world.status("shop").phase, Phase::Succeeded);
}

#[test]
fn the_new_release_says_whether_the_old_container_is_kept() {
    // Nobody said so when the first was released.
    let mut world = settled(&web("good", 1));
    world.assign(&shop("good", 2));
    world.run(SOAK_MS + 1_000);
    assert_eq!(live(&world), ["web.1", "web.2"]);
    // And the third, started beside, does not: then nothing is kept once it is ready.
    world.assign(&release("shop", &[("web", beside(always("good", 3)))]));
    world.run(0);
    assert_eq!(live(&world), ["web.2", "web.3"]);
    world.run(1_000);
    assert_eq!(live(&world), ["web.3"]);
    // One that stops first stops all first.
    let mut world = settled(&shop("good", 1));
    world.assign(&shop("good", 2));
    world.run(1_000);
    world.assign(&web("good", 3));
    let notices = told(&mut world, 1_000);
    assert!(
        why(&notices, EventKind::LetGo).contains("keeps none"),
        "{notices:?}"
    );
    assert_eq!(live(&world), ["web.3"]);
}

#[test]
fn confirming_what_runs_lets_nobody_go() {
    let mut world = settled(&shop("good", 1));
    let v2 = shop("good", 2);
    world.assign(&v2);
    world.run(SOAK_MS + 1_000);
    world.assign(&v2);
    world.run(1_000);
    assert_eq!(world.phase("shop"), Phase::Succeeded);
    assert_eq!(live(&world), ["web.1", "web.2"]);
}

#[test]
fn services_that_the_new_release_does_not_have_are_not_kept_and_jobs_have_nothing_to_keep() {
    let first = release(
        "shop",
        &[
            ("job", keeping(job("exit 0 300", 1), KEEP_MS)),
            ("old", keeping(always("good", 2), KEEP_MS)),
            ("same", keeping(always("good", 3), KEEP_MS)),
            ("web", keeping(always("good", 4), KEEP_MS)),
        ],
    );
    let second = release(
        "shop",
        &[
            ("job", keeping(job("exit 0 300", 11), KEEP_MS)),
            ("same", keeping(always("good", 3), KEEP_MS)),
            ("web", keeping(always("good", 14), KEEP_MS)),
        ],
    );
    let mut world = settled(&first);
    world.assign(&second);
    world.run(SOAK_MS + 2_000);
    assert_eq!(world.phase("shop"), Phase::Succeeded);
    assert_eq!(live(&world), ["same.1", "web.1", "web.2"]);
    world.assign(&first);
    world.run(HOUR);
    assert_eq!(world.phase("shop"), Phase::Succeeded);
    assert_eq!(live(&world), ["old.2", "same.1", "web.1"]);
}

#[test]
fn what_is_kept_at_its_end_stops_from_the_outside_in() {
    let shop = |seed| {
        let web = after(always("good", seed), &[("db", Condition::Healthy)]);
        release(
            "shop",
            &[
                ("db", keeping(always("good", 100 + seed), KEEP_MS)),
                ("web", keeping(web, KEEP_MS)),
            ],
        )
    };
    let mut world = settled(&shop(1));
    world.assign(&shop(2));
    world.run(HOUR);
    let stopped: Vec<_> = world
        .stopped
        .iter()
        .map(|id| format!("{}.{}", id.service, id.instance))
        .collect();
    // `db` is ready first, so its time is over first, but `web` is let go only a moment later.
    assert_eq!(stopped.len(), 2, "{stopped:?}");
    assert_eq!(live(&world), ["db.2", "web.2"]);
    // All at once: the app is removed.
    world.assign(&shop(3));
    world.run(SOAK_MS + 1_000);
    assert_eq!(live(&world).len(), 4);
    world.stopped.clear();
    world.unassign(&"shop".parse().unwrap());
    world.run(HOUR);
    let stopped: Vec<_> = world.stopped.iter().map(|id| id.service.as_str()).collect();
    assert_eq!(stopped, ["web", "web", "db", "db"]);
    assert!(world.containers.is_empty());
}

#[test]
fn after_a_reboot_old_containers_are_not_there_and_are_not_started() {
    for trial in [true, false] {
        let mut world = settled(&shop("good", 1));
        world.assign(&shop("good", 2));
        world.run(if trial { 1_000 } else { SOAK_MS + 1_000 });
        world.reboot();
        world.run(HOUR);
        assert_eq!(world.phase("shop"), Phase::Succeeded);
        assert_eq!(live(&world), ["web.3"], "trial: {trial}");
    }
}

#[test]
fn a_short_disk_takes_what_is_kept_before_anybody_is_evicted() {
    let v1 = shop("good", 1);
    let mut world = settled(&v1);
    let mut large = always("good", 2);
    large.read_only = false;
    world.assign(&release("shop", &[("web", keeping(large, KEEP_MS))]));
    world.run(SOAK_MS + 1_000);
    assert_eq!(live(&world), ["web.1", "web.2"]);
    let usage = DiskUsage {
        layer: 200 << 20,
        grown: 0,
    };
    world.usage.insert("shop.web.2".parse().unwrap(), usage);
    world.disk = Disk {
        low: true,
        free: 10 << 20,
        reserve: 100 << 20,
        missing: 115 << 20,
    };
    let plan = world.turn(usize::MAX);
    assert!(
        why(&plan.notices, EventKind::Evicted).contains("short of disk space"),
        "{plan:?}"
    );
    let is_first = |step: &Step| matches!(step, Step::Stop { id, .. } if id.instance == 1);
    assert!(
        plan.steps.len() == 1 && is_first(&plan.steps[0]),
        "{plan:?}"
    );
    assert_eq!(kept(&mut world), None);
    let plan = world.turn(usize::MAX);
    assert!(matches!(plan.steps[..], [Step::Remove { .. }]), "{plan:?}");
    // Then its image, and nobody else if that was enough.
    let plan = world.turn(usize::MAX);
    assert!(matches!(plan.steps[..], [Step::Collect { .. }]), "{plan:?}");
    assert_eq!(world.images.len(), 1);
    world.disk = Disk::default();
    world.run(HOUR);
    assert_eq!(live(&world), ["web.2"]);
    // While it is short nothing is kept in the first place.
    world.disk = Disk {
        low: true,
        ..Disk::default()
    };
    world.assign(&shop("good", 3));
    world.run(1_000);
    assert_eq!(live(&world), ["web.3"]);
}

#[test]
fn one_that_would_have_to_be_stopped_is_not_kept() {
    let mut world = World::new();
    world.assign(&shop("hang 20000", 1));
    world.run(SOAK_MS + 1_000);
    assert_eq!(world.phase("shop"), Phase::Succeeded);
    world.assign(&shop("good", 2));
    world.run(1_000);
    assert_eq!(live(&world), ["web.1", "web.2"]);
    let notices = told(&mut world, 30_000);
    assert!(
        why(&notices, EventKind::ProbeFailed).contains("is not kept any more"),
        "{notices:?}"
    );
    assert_eq!(world.status("shop").phase, Phase::Succeeded);
    assert_eq!(live(&world), ["web.2"]);
    // It writes more than it may.
    let mut large = always("good", 1);
    large.read_only = false;
    let mut world = settled(&release("shop", &[("web", keeping(large, KEEP_MS))]));
    world.assign(&shop("good", 2));
    world.run(1_000);
    assert_eq!(live(&world), ["web.1", "web.2"]);
    let usage = DiskUsage {
        layer: 257 << 20,
        grown: 0,
    };
    world.usage.insert("shop.web.1".parse().unwrap(), usage);
    let notices = told(&mut world, 1_000);
    assert!(
        why(&notices, EventKind::DiskLimit).contains("storage_opt.size"),
        "{notices:?}"
    );
    assert_eq!(live(&world), ["web.2"]);
}

#[test]
fn secrets_that_change_reach_what_is_kept_or_let_it_go() {
    let with = |seed, on_rotate: &str| {
        let mut web = keeping(always("good", seed), KEEP_MS);
        let text = format!(
            "{{\"image\": \"x\", \"secrets\": [{{\"source\": \"pin\", \"on_rotate\": \"{on_rotate}\"}}]}}"
        );
        web.secrets = serde_json::from_str::<Service>(&text).unwrap().secrets;
        release("shop", &[("web", web)])
    };
    for (on_rotate, left) in [("SIGHUP", 2), ("restart", 1)] {
        let mut world = World::new();
        world.secrets.insert("pin".parse().unwrap(), 1);
        world.assign(&with(1, on_rotate));
        world.run(HOUR);
        world.assign(&with(2, on_rotate));
        world.run(SOAK_MS + 1_000);
        assert_eq!(live(&world), ["web.1", "web.2"]);
        world.secrets.insert("pin".parse().unwrap(), 2);
        let notices = told(&mut world, 20_000);
        assert_eq!(live(&world).len(), left, "{on_rotate}: {notices:?}");
        let mut renewed: Vec<_> = world.renewed.iter().map(|(id, _)| id.instance).collect();
        renewed.sort_unstable();
        assert_eq!(renewed, if left == 2 { vec![1, 2] } else { vec![] });
        assert_eq!(world.status("shop").phase, Phase::Succeeded);
    }
}

#[test]
fn what_was_let_go_is_not_taken_back_half_way() {
    let v1 = shop("good", 1);
    let mut world = settled(&v1);
    world.assign(&shop("good", 2));
    world.run(SOAK_MS + 1_000);
    world.now.ms = world.now.ms.plus(KEEP_MS);
    // Its stop is decided, and the agent ends before it is done.
    let plan = world.turn(0);
    assert!(matches!(plan.steps[..], [Step::Stop { .. }]), "{plan:?}");
    world.crash();
    world.assign(&v1);
    world.run(HOUR);
    assert_eq!(world.phase("shop"), Phase::Succeeded);
    assert_eq!(live(&world), ["web.3"]);
    let status = world.status("shop");
    assert_eq!(status.services[0].restarts, 0);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    /// However often the agent ends, whatever the new release does and however it comes to an end: an old container that is
    /// kept and does not end by itself is never stopped within its time, and going back starts nothing of its release.
    #[test]
    fn going_back_within_the_time_starts_nothing(
        cuts in prop::collection::vec((0..3_usize, any::<bool>(), 0..3_000_u64), 0..12),
        behaviour in 0..8_usize,
        again in prop::option::of(0..8_usize),
    ) {
        let behaviours = ["good", "good", "never-ready", "exit 1 700", "unready 2500", "refuse", "hang 2500", "never-up 1500"];
        let v1 = shop("good", 1);
        let mut world = settled(&v1);
        world.assign(&shop(behaviours[behaviour], 2));
        let mut crashes = 0;
        for (cut, crash, ms) in cuts {
            world.turn(cut);
            if crash && crashes < 4 {
                crashes += 1;
                world.crash();
            }
            world.run(ms);
        }
        if let Some(again) = again {
            // It replaces the second, or comes after it; only then another is the last-known-good.
            if world.status("shop").last_known_good == Some(v1.digest()) {
                world.assign(&shop(behaviours[again], 3));
                world.run(2_000);
            }
        }
        world.assign(&v1);
        world.run(HOUR);
        let status = world.status("shop");
        prop_assert_eq!((status.phase, status.running), (Phase::Succeeded, Some(v1.digest())));
        prop_assert_eq!(live(&world), ["web.1"]);
        prop_assert_eq!(world.started.iter().filter(|(_, release)| *release == v1.digest()).count(), 1);
    }
}
