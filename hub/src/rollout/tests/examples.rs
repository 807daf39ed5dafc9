//! One story per rule, as a reader would tell it.

use super::*;

#[test]
fn a_good_release_goes_wave_by_wave_and_bakes_between() {
    let mut world = World::new(5, 7, policy(vec![WaveTarget::Count(1)], 5));
    world.step();
    assert_eq!(world.wave_states(), [WaveState::Open, WaveState::Pending]);
    let canary: Vec<_> = world.offered().into_iter().collect();
    assert_eq!(canary, world.in_wave(1));
    world.say(&canary[0], Phase::Soaking);
    world.step();
    world.pass(1_000);
    world.say(&canary[0], Phase::Succeeded);
    let step = world.step();
    assert_eq!(world.wave_states(), [WaveState::Baking, WaveState::Pending]);
    assert_eq!(step.wake_at, Some(world.now.plus(2_000)));
    world.pass(1_999);
    assert_eq!(world.step().actions, []);
    world.pass(1);
    world.step();
    assert_eq!(world.wave_states(), [WaveState::Passed, WaveState::Open]);
    assert_eq!(world.offered().len(), 4);
    for device in world.offered() {
        world.say(&device, Phase::Succeeded);
    }
    world.step();
    world.pass(2_000);
    world.step();
    assert_eq!(world.rollout.state, RolloutState::Completed);
    assert_eq!(
        joiner_release([&world.rollout]),
        Some(world.rollout.placement())
    );
}

#[test]
fn a_failed_canary_stops_the_rollout_and_everyone_has_the_old_release_again() {
    let mut world = World::new(5, 7, policy(vec![WaveTarget::Count(1)], 5));
    world.step();
    let canary = world.in_wave(1).remove(0);
    world.say(&canary, Phase::RolledBack);
    world.step();
    assert_eq!(world.rollout.state, RolloutState::RollingBack);
    assert_eq!(world.rollout.cause, Some(Cause::WaveFailed));
    assert_eq!(
        world.devices[&canary].desired.unwrap().1,
        Some(placement(1))
    );
    world.say(&canary, Phase::Succeeded);
    world.step();
    assert_eq!(world.rollout.state, RolloutState::RolledBack);
    assert_eq!(world.offers.len(), 1, "nobody else was offered the release");
    assert_eq!(joiner_release([&world.rollout]), None);
}

#[test]
fn a_rollback_goes_newest_wave_first_and_within_the_slots() {
    let mut policy = policy(vec![WaveTarget::Count(1), WaveTarget::Count(3)], 6);
    policy.max_unavailable = 1;
    policy.budget.count = 1;
    let mut world = World::new(6, 3, policy);
    let mut updated = Vec::new();
    for _ in 0..3 {
        world.step();
        let device = world.offered().pop_first().unwrap();
        world.say(&device, Phase::Succeeded);
        updated.push(device);
        world.step();
        world.pass(2_000);
    }
    world.step();
    let bad = world.offered().pop_first().unwrap();
    world.say(&bad, Phase::Failed);
    world.step();
    let mut order = Vec::new();
    while world.rollout.state == RolloutState::RollingBack {
        let back: Vec<_> = world
            .rollout
            .assignments
            .iter()
            .filter(|(_, assignment)| {
                matches!(
                    assignment.revert,
                    Some(Revert::Switching | Revert::Settling)
                )
            })
            .map(|(device, _)| device.clone())
            .collect();
        assert!(
            back.iter().filter(|device| **device != bad).count() <= 1,
            "one slot"
        );
        for device in back {
            world.say(&device, Phase::Succeeded);
            order.push(device);
        }
        world.step();
    }
    assert_eq!(world.rollout.state, RolloutState::RolledBack);
    order.retain(|device| *device != bad);
    updated.reverse();
    assert_eq!(order, updated);
}

#[test]
fn a_rollback_that_fails_pauses_and_resuming_tries_it_again() {
    let mut world = World::new(1, 1, policy(vec![], 1));
    world.step();
    world.say(&device(0), Phase::Failed);
    world.step();
    world.say(&device(0), Phase::RolledBack);
    world.step();
    assert_eq!(world.rollout.state, RolloutState::RollbackPaused);
    assert_eq!(world.rollout.cause, Some(Cause::RollbackFailed));
    world.command(command::resume(&world.rollout));
    assert_eq!(world.rollout.state, RolloutState::RollingBack);
    world.say(&device(0), Phase::Succeeded);
    world.step();
    assert_eq!(world.rollout.state, RolloutState::RolledBack);
}

#[test]
fn the_first_release_of_an_app_is_rolled_back_by_removing_it() {
    let mut world = World::with_previous(1, 1, policy(vec![], 1), None);
    world.step();
    world.say(&device(0), Phase::Failed);
    world.step();
    assert_eq!(world.devices[&device(0)].desired.unwrap().1, None);
    assert_eq!(
        world.rollout.state,
        RolloutState::RollingBack,
        "it still reports the app"
    );
    world.say(&device(0), Phase::Succeeded);
    assert!(world.devices[&device(0)].report.is_none());
    world.step();
    assert_eq!(world.rollout.state, RolloutState::RolledBack);
}

#[test]
fn an_offline_canary_is_replaced_and_an_offline_set_waits() {
    let mut world = World::new(4, 9, policy(vec![WaveTarget::Count(1)], 4));
    let canary = world.in_wave(1).remove(0);
    world.devices.get_mut(&canary).unwrap().offline = true;
    world.step();
    assert_eq!(world.offered().len(), 1);
    assert!(!world.offered().contains(&canary));

    let mut dark = World::new(4, 9, policy(vec![WaveTarget::Count(1)], 4));
    for one in dark.devices.values_mut() {
        one.offline = true;
        one.last_seen = UnixMs(0);
    }
    dark.step();
    dark.pass(1_000_000_000);
    dark.step();
    assert_eq!(dark.rollout.state, RolloutState::Running);
    assert_eq!(dark.wave_states(), [WaveState::Open, WaveState::Pending]);
    assert!(dark.offers.is_empty());
}

#[test]
fn offline_devices_cost_nothing_and_get_the_release_when_they_return() {
    let mut world = World::new(10, 4, policy(percent(&[50]), 10));
    for number in 0..4 {
        let one = world.devices.get_mut(&device(number)).unwrap();
        one.offline = true;
    }
    for _ in 0..3 {
        world.step();
        for device in world.offered() {
            world.say(&device, Phase::Succeeded);
        }
        world.step();
        world.pass(2_000);
    }
    world.step();
    assert_eq!(world.rollout.state, RolloutState::Completed);
    let tally = budget::Tally::of(&world.rollout);
    assert_eq!((tally.succeeded, tally.failed, tally.deferred), (6, 0, 4));
    for number in 0..4 {
        assert_eq!(
            world.devices[&device(number)].desired.unwrap().1,
            Some(world.rollout.placement())
        );
        world.say(&device(number), Phase::Succeeded);
    }
    world.step();
    assert_eq!(
        budget::Tally::of(&world.rollout).succeeded,
        10,
        "recorded after the end"
    );
}

#[test]
fn one_that_goes_dark_while_switching_is_a_failure_unless_the_fleet_is_dark() {
    let mut policy = policy(vec![WaveTarget::Count(1)], 5);
    policy.budget.count = 1;
    let mut world = World::new(5, 2, policy);
    world.step();
    let canary = world.in_wave(1).remove(0);
    world.say(&canary, Phase::Activating);
    world.step();
    let mut dark = world.clone();

    world.devices.get_mut(&canary).unwrap().offline = true;
    world.step();
    world.pass(world.rollout.policy.silent_after_ms() - 1);
    assert_eq!(world.step().actions, []);
    world.pass(1);
    world.step();
    assert_eq!(world.rollout.state, RolloutState::RolledBack);

    for one in dark.devices.values_mut() {
        one.offline = true;
    }
    dark.step();
    assert!(dark.rollout.frozen);
    dark.pass(1_000 * 24 * 3_600_000);
    dark.step();
    assert_eq!(dark.rollout.state, RolloutState::Running);
    for one in dark.devices.values_mut() {
        one.offline = false;
    }
    dark.pass(1);
    dark.step();
    assert!(!dark.rollout.frozen);
    assert_eq!(
        dark.rollout.state,
        RolloutState::Running,
        "its clock stood still meanwhile"
    );
    dark.say(&canary, Phase::Succeeded);
    dark.step();
    assert_eq!(dark.wave_states()[0], WaveState::Baking);
}

#[test]
fn after_a_restart_the_hub_listens_before_it_judges() {
    let mut world = World::new(5, 2, policy(vec![WaveTarget::Count(1)], 5));
    world.step();
    let canary = world.in_wave(1).remove(0);
    world.say(&canary, Phase::Soaking);
    world.step();
    world.pass(3_600_000);
    // Everything is unknown to a new hub.
    world.listening_since = None;
    for one in world.devices.values_mut() {
        one.offline = true;
    }
    assert_eq!(world.step().actions, []);
    world.listening_since = Some(world.now);
    let step = world.step();
    assert_eq!(step.actions, []);
    assert_eq!(step.wake_at, Some(world.now.plus(5_000)));
    for (device, one) in &mut world.devices {
        one.offline = *device == canary;
    }
    world.pass(5_000);
    assert_eq!(
        world.step().actions,
        [],
        "its deadline is over, but it may still be on its way back"
    );
    world.pass(25_000);
    assert_eq!(
        world.step().actions.len(),
        5,
        "silent, wave failed, rolling back, restored as it is away, rolled back"
    );
}

#[test]
fn blocked_devices_are_put_off_without_a_failure_and_hold_no_slot_for_ever() {
    let mut policy = policy(vec![], 3);
    policy.max_unavailable = 1;
    let mut world = World::new(3, 2, policy);
    world.step();
    let first = world.offered().pop_first().unwrap();
    world.say(&first, Phase::Blocked);
    world.step();
    world.pass(60_000);
    world.step();
    assert_eq!(
        world.rollout.assignments[&first].deferral,
        Some(Deferral::NotBegun)
    );
    assert_eq!(world.offered().len(), 1);
    assert_eq!(budget::Tally::of(&world.rollout).failed, 0);
    world.say(&first, Phase::Activating);
    world.step();
    world.say(&first, Phase::Succeeded);
    world.step();
    assert_eq!(budget::Tally::of(&world.rollout).succeeded, 1);
}

#[test]
fn resuming_after_a_broken_budget_tries_the_failed_again_under_full_brakes() {
    let mut policy = policy(vec![], 3);
    policy.on_failure = OnFailure::Pause;
    let mut world = World::new(3, 2, policy);
    world.step();
    for device in world.offered() {
        world.say(&device, Phase::RolledBack);
    }
    world.step();
    assert_eq!(
        (world.rollout.state, world.rollout.cause),
        (RolloutState::Paused, Some(Cause::Budget))
    );
    world.command(command::resume(&world.rollout));
    world.step();
    assert_eq!(world.offered().len(), 3);
    assert!(world.offers.values().all(|offers| *offers == 2));
    for device in world.offered() {
        world.say(&device, Phase::RolledBack);
    }
    world.step();
    assert_eq!(world.rollout.state, RolloutState::Paused);
}

#[test]
fn a_pause_stops_the_clock_of_the_bake() {
    let mut world = World::new(2, 2, policy(vec![WaveTarget::Count(1)], 2));
    world.step();
    let canary = world.in_wave(1).remove(0);
    world.say(&canary, Phase::Succeeded);
    world.step();
    world.pass(500);
    world.command(command::pause(&world.rollout));
    assert_eq!(world.rollout.bake_until(&world.rollout.waves[0]), None);
    world.pass(1_000_000);
    assert_eq!(world.step(), Step::default());
    world.command(command::resume(&world.rollout));
    assert_eq!(world.step().wake_at, Some(world.now.plus(1_500)));
}

#[test]
fn an_abort_leaves_the_updated_and_withdraws_from_the_others() {
    let mut world = World::new(4, 2, policy(vec![], 4));
    world.step();
    let devices: Vec<_> = world.offered().into_iter().collect();
    let phases = [
        Phase::Succeeded,
        Phase::Soaking,
        Phase::Staging,
        Phase::RolledBack,
    ];
    for (device, phase) in devices.iter().zip(phases) {
        world.say(device, phase);
    }
    world.step();
    world.command(command::abort(&world.rollout));
    assert_eq!(world.rollout.state, RolloutState::Aborted);
    let desired: Vec<_> = devices
        .iter()
        .map(|device| world.devices[device].desired.unwrap().1.unwrap().release)
        .collect();
    assert_eq!(desired, [release(2), release(2), release(1), release(1)]);
    assert_eq!(
        command::abort(&world.rollout).unwrap_err().to_string(),
        "rollout 1 is aborted already; nothing can be done to it"
    );
    assert_eq!(command::undo_target(&world.rollout), Ok(release(1)));
}

#[test]
fn what_a_device_goes_back_to_was_good_there() {
    let mut world = World::new(3, 2, policy(vec![], 3));
    world.step();
    let devices: Vec<_> = world.offered().into_iter().collect();
    world.say(&devices[0], Phase::Succeeded);
    world.say(&devices[1], Phase::Activating);
    world.step();
    world.command(command::supersede(&world.rollout, 2));
    let members = devices.iter().map(|device| Member {
        device: device.clone(),
        placement: world.devices[device].desired.unwrap().1,
        phase: world.devices[device]
            .report
            .as_ref()
            .map(|report| report.phase),
    });
    let next = Rollout::open(Opening {
        id: 2,
        app: "app".parse().unwrap(),
        from: Some(release(2)),
        to: release(3),
        seed: 5,
        policy: policy(vec![], 3),
        members: members.collect(),
        before: Some(&world.rollout),
        now: world.now,
    });
    let back: Vec<_> = devices
        .iter()
        .map(|device| next.assignments[device].previous.unwrap().release)
        .collect();
    assert_eq!(back, [release(2), release(1), release(1)]);
}

#[test]
fn a_device_that_leaves_holds_nothing_up() {
    let mut world = World::new(2, 2, policy(vec![WaveTarget::Count(1)], 2));
    world.step();
    let canary = world.in_wave(1).remove(0);
    world.devices.get_mut(&canary).unwrap().gone = true;
    world.step();
    assert_eq!(world.wave_states(), [WaveState::Passed, WaveState::Open]);
    let other = world.in_wave(2).remove(0);
    world.say(&other, Phase::Succeeded);
    world.step();
    world.pass(2_000);
    world.step();
    assert_eq!(world.rollout.state, RolloutState::Completed);
}

#[test]
fn a_rollout_over_nobody_completes_at_once() {
    let mut world = World::new(0, 1, policy(percent(&[10, 50]), 0));
    world.step();
    assert_eq!(world.rollout.state, RolloutState::Completed);
    assert!(
        world
            .wave_states()
            .iter()
            .all(|state| *state == WaveState::Skipped)
    );
}

#[test]
fn the_order_of_devices_never_changes() {
    let order: Vec<_> = waves::rank(42, (0..6).map(device))
        .iter()
        .map(ToString::to_string)
        .collect();
    // Golden: another order in another version would move a running rollout's devices between waves.
    assert_eq!(order, GOLDEN_ORDER);
}

const GOLDEN_ORDER: [&str; 6] = [
    "device-5", "device-4", "device-2", "device-0", "device-3", "device-1",
];
