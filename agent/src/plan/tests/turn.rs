//! Turns under disruption budgets.

use super::*;

fn shop() -> AppName {
    "shop".parse().unwrap()
}

/// A world at `before` under a budget, with `after` assigned and staged.
fn waiting(before: &Release, after: &Release) -> World {
    let mut world = settled(before);
    world.set_budget(true);
    world.assign(after);
    world.run(HOUR);
    world
}

#[test]
fn a_device_under_a_budget_stages_and_then_waits_for_its_turn() {
    let (v1, v2) = (web("good", 1), web("good", 2));
    let mut world = waiting(&v1, &v2);
    let status = world.status("shop");
    assert_eq!(status.phase, Phase::Waiting);
    let reason = status.reason.unwrap();
    assert_eq!(reason.code, ReasonCode::WaitsForTurn);
    assert_eq!(
        reason.message,
        "waits for its turn (disruption budget sites, group site=hull)"
    );
    assert_eq!(world.running("shop")["web"], v1.digest());
    let plan = world.turn(usize::MAX);
    let wish = TurnWish {
        since: world.version(),
        release: v2.digest(),
    };
    assert_eq!(plan.turns, [(shop(), wish)].into());
    assert!(plan.steps.is_empty() && plan.wake_at.is_none(), "{plan:?}");
    // What runs is healed meanwhile, without a turn.
    world.containers.clear();
    world.run(HOUR);
    assert_eq!(world.running("shop")["web"], v1.digest());
    assert_eq!(world.phase("shop"), Phase::Waiting);

    world.grant(&shop(), 60_000);
    world.turn(usize::MAX);
    assert_eq!(world.phase("shop"), Phase::Activating);
    // Once begun, it goes on when the turn is over, and needs none any more.
    world.turns.clear();
    world.run(HOUR);
    assert_eq!(world.phase("shop"), Phase::Succeeded);
    assert_eq!(world.running("shop")["web"], v2.digest());
    assert!(world.turn(usize::MAX).turns.is_empty());
}

#[test]
fn a_turn_that_is_over_or_for_something_else_is_none() {
    let (v1, v2) = (web("good", 1), web("good", 2));
    let mut world = waiting(&v1, &v2);
    world.grant(&shop(), 0);
    world.turn(usize::MAX);
    assert_eq!(world.phase("shop"), Phase::Waiting);
    world.grant(&shop(), 60_000);
    // Another assignment of the same release, and another release.
    world.assign(&v2);
    world.run(HOUR);
    assert_eq!(world.phase("shop"), Phase::Waiting);
    world.grant(&shop(), u64::MAX);
    world.turns.get_mut(&shop()).unwrap().release = v1.digest();
    world.run(HOUR);
    assert_eq!(world.phase("shop"), Phase::Waiting);
}

#[test]
fn the_way_back_to_the_last_known_good_needs_no_turn() {
    let (good, bad) = (web("good", 1), web("never-ready", 2));
    let mut world = waiting(&good, &bad);
    world.grant(&shop(), 60_000);
    world.turn(usize::MAX);
    world.turns.clear();
    world.run(HOUR);
    assert_eq!(world.phase("shop"), Phase::RolledBack);
    assert_eq!(world.running("shop")["web"], good.digest());
}

#[test]
fn an_agent_or_device_that_starts_anew_has_no_turn_and_goes_on_with_what_it_began() {
    for reboot in [false, true] {
        let again = |world: &mut World| {
            if reboot {
                world.reboot()
            } else {
                world.crash()
            }
        };
        let (v1, v2) = (web("good", 1), web("good", 2));
        let mut world = waiting(&v1, &v2);
        world.grant(&shop(), u64::MAX);
        again(&mut world);
        world.run(HOUR);
        assert_eq!(world.phase("shop"), Phase::Waiting);
        assert_eq!(world.running("shop")["web"], v1.digest());
        world.grant(&shop(), u64::MAX);
        world.turn(0);
        again(&mut world);
        world.run(HOUR);
        assert_eq!(world.phase("shop"), Phase::Succeeded);
    }
}

#[test]
fn going_back_by_order_needs_a_turn_and_what_runs_already_needs_none() {
    let (v1, v2) = (web("good", 1), web("good", 2));
    let mut world = settled(&v1);
    world.assign(&v2);
    world.run(HOUR);
    world.set_budget(true);
    world.assign(&v2);
    world.run(HOUR);
    assert_eq!(world.phase("shop"), Phase::Succeeded, "nothing changes");
    world.assign(&v1);
    world.run(HOUR);
    assert_eq!(world.phase("shop"), Phase::Waiting);
    world.grant(&shop(), 1_000);
    world.run(HOUR);
    assert_eq!(world.running("shop")["web"], v1.digest());
}

#[test]
fn a_first_installation_takes_a_turn_too_and_a_removal_does_not() {
    let v1 = web("good", 1);
    let mut world = World::new();
    world.set_budget(true);
    world.assign(&v1);
    world.run(HOUR);
    assert_eq!(world.phase("shop"), Phase::Waiting);
    assert!(world.started.is_empty());
    world.grant(&shop(), 1_000);
    world.run(HOUR);
    assert_eq!(world.phase("shop"), Phase::Succeeded);
    world.unassign(&shop());
    world.run(HOUR);
    assert!(world.containers.is_empty());
}

#[test]
fn a_release_that_failed_takes_a_turn_to_be_tried_again() {
    let bad = web("never-ready", 1);
    let mut world = World::new();
    world.set_budget(true);
    world.assign(&bad);
    world.grant(&shop(), HOUR);
    world.run(HOUR);
    assert_eq!(world.phase("shop"), Phase::Failed);
    world.assign(&bad);
    world.run(1_000);
    assert_eq!(world.phase("shop"), Phase::Waiting);
}

#[test]
fn an_app_that_holds_its_update_lock_lets_others_have_its_turn() {
    let mut locking = always("good", 1);
    locking.update_lock = true;
    let before = release("shop", &[("web", locking)]);
    let mut world = waiting(&before, &web("good", 2));
    assert!(
        world.update_locks.held.is_empty(),
        "nothing is locked while others go first"
    );
    world.busy_apps.insert(shop());
    world.grant(&shop(), 60_000);
    world.turn(usize::MAX);
    let refused = world.turn(usize::MAX);
    assert_eq!(refused.status[0].phase, Phase::Blocked);
    assert!(refused.turns.is_empty(), "given back");
    world.turns.clear();
    world.busy_apps.clear();
    world.run(HOUR);
    assert_eq!(world.phase("shop"), Phase::Waiting);
    world.grant(&shop(), 60_000);
    world.run(HOUR);
    assert_eq!(world.phase("shop"), Phase::Succeeded);
}
