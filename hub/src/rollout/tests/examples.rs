//! One story per rule, as a reader would tell it.

use foreshore_protocol::manifest::{Canary, RolloutPolicy};

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
        assert_eq!(world.devices[&device(number)].desired, None);
        world.devices.get_mut(&device(number)).unwrap().offline = false;
    }
    run_dry(&mut world);
    let tally = budget::Tally::of(&world.rollout);
    assert_eq!(tally.succeeded, 10, "after the end");
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
        labels: Labels::new(),
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

/// Everyone who was offered the release succeeds, until nobody is offered it any more.
fn run_dry(world: &mut World) {
    loop {
        world.step();
        let offered = world.offered();
        if offered.is_empty() {
            return;
        }
        for device in offered {
            world.say(&device, Phase::Succeeded);
        }
    }
}

#[test]
fn a_wave_waits_for_its_approval_and_passes_with_it() {
    let mut policy = policy(vec![WaveTarget::Count(2)], 6);
    policy.waves[0].approval = true;
    let mut world = World::new(6, 3, policy);
    assert!(
        command::approve(&world.rollout).is_err(),
        "nothing waits yet"
    );
    run_dry(&mut world);
    world.pass(2_000);
    world.step();
    assert_eq!(
        world.wave_states(),
        [WaveState::AwaitingApproval, WaveState::Pending]
    );
    world.pass(100_000_000);
    assert_eq!(
        world.step(),
        Step::default(),
        "it waits as long as it takes"
    );
    world.command(command::approve(&world.rollout));
    world.step();
    assert_eq!(world.wave_states(), [WaveState::Passed, WaveState::Open]);
    assert!(
        command::approve(&world.rollout).is_err(),
        "one approval, one wave"
    );
}

#[test]
fn a_wave_that_waits_for_approval_still_fails_by_the_budget() {
    let mut policy = policy(vec![WaveTarget::Count(3)], 6);
    policy.budget.count = 1;
    policy.waves[0].approval = true;
    policy.bake_ms = 0;
    let mut world = World::new(6, 3, policy);
    world.step();
    let late = world.in_wave(1).remove(2);
    world.devices.get_mut(&late).unwrap().offline = true;
    world.step();
    run_dry(&mut world);
    assert_eq!(world.wave_states()[0], WaveState::AwaitingApproval);
    world.devices.get_mut(&late).unwrap().offline = false;
    world.step();
    world.say(&late, Phase::RolledBack);
    world.step();
    assert_eq!(world.rollout.state, RolloutState::RollingBack);
}

#[test]
fn offers_keep_to_a_pace_that_doubles_with_successes() {
    let mut policy = policy(vec![WaveTarget::Percent(100)], 12);
    policy.pace = Some(Pace {
        per_minute: 6,
        double_every: Some(2),
        max_per_minute: None,
    });
    let mut world = World::new(12, 3, policy);
    let mut offers = Vec::new();
    for _ in 0..6 {
        let step = world.step();
        for device in world.offered() {
            offers.push(world.now.since(NOW));
            world.say(&device, Phase::Succeeded);
        }
        let at = world.step().wake_at.or(step.wake_at).unwrap();
        world.pass(at.since(world.now));
    }
    // Ten seconds apart until two have succeeded, then five, then two and a half.
    assert_eq!(offers, [0, 10_000, 20_000, 25_000, 30_000, 32_500]);
}

#[test]
fn a_pace_does_not_make_up_for_hours_at_once() {
    let mut policy = policy(vec![WaveTarget::Percent(100)], 12);
    policy.pace = Some(pace(60));
    let mut world = World::new(12, 3, policy);
    world.command(command::pause(&world.rollout));
    world.pass(3_600_000);
    world.command(command::resume(&world.rollout));
    world.devices.values_mut().for_each(|one| one.busy = true);
    world.step();
    world.pass(3_600_000);
    world.devices.values_mut().for_each(|one| one.busy = false);
    world.step();
    assert!(world.offered().len() <= 2, "{:?}", world.offered());
}

#[test]
fn a_scheduled_rollout_waits_for_its_time_or_for_an_operator() {
    let mut policy = policy(vec![WaveTarget::Count(1)], 3);
    policy.start_at = Some(NOW.plus(50_000));
    let mut world = World::new(3, 3, policy.clone());
    assert_eq!(world.step().wake_at, Some(NOW.plus(50_000)));
    assert_eq!(world.rollout.state, RolloutState::Scheduled);
    world.pass(49_999);
    assert_eq!(world.step().actions, []);
    world.pass(1);
    world.step();
    assert_eq!(world.offered().len(), 1);
    let mut now = World::new(3, 3, policy);
    now.step();
    now.command(command::resume(&now.rollout));
    now.step();
    assert_eq!(now.offered().len(), 1);
}

#[test]
fn a_wave_has_a_budget_of_its_own() {
    let mut policy = policy(vec![WaveTarget::Count(4)], 8);
    policy.budget.count = 8;
    policy.waves[0].failure_budget = Some(FailureBudget {
        count: 1,
        percent: 100,
        min_sample: 1,
    });
    let mut world = World::new(8, 3, policy);
    world.step();
    let first = world.in_wave(1).remove(0);
    world.say(&first, Phase::RolledBack);
    world.step();
    assert_eq!(world.rollout.state, RolloutState::RollingBack);
    let why = world.rollout.message.unwrap();
    assert!(
        why.starts_with("1 of 1 devices of wave 1 failed and the budget stops at 1"),
        "{why}"
    );
}

#[test]
fn a_canary_that_is_away_or_held_is_replaced_by_one_of_its_kind() {
    let by = vec!["model".parse().unwrap()];
    let canary = WaveTarget::Canary(Canary { per_stratum: 1, by });
    let mut world = World::new(9, 3, policy(vec![canary], 9));
    let canaries = world.in_wave(1);
    assert_eq!(canaries.len(), 3);
    world.devices.get_mut(&canaries[0]).unwrap().offline = true;
    world.devices.get_mut(&canaries[1]).unwrap().held = true;
    world.step();
    let offered = world.offered();
    assert_eq!(offered.len(), 3);
    assert!(!offered.contains(&canaries[0]) && !offered.contains(&canaries[1]));
    let kinds: BTreeSet<_> = offered
        .iter()
        .map(|device| world.rollout.assignments[device].stratum)
        .collect();
    assert_eq!(kinds.len(), 3);
}

#[test]
fn a_held_device_is_left_out_and_comes_when_it_is_released() {
    let mut world = World::new(4, 3, policy(vec![WaveTarget::Percent(100)], 4));
    let held = device(2);
    world.devices.get_mut(&held).unwrap().held = true;
    run_dry(&mut world);
    world.pass(2_000);
    world.step();
    assert_eq!(world.rollout.state, RolloutState::Completed);
    assert_eq!(
        world.rollout.assignments[&held].deferral,
        Some(Deferral::Held)
    );
    assert_eq!(world.offers.get(&held), None);
    world.devices.get_mut(&held).unwrap().held = false;
    run_dry(&mut world);
    assert_eq!(world.offers.get(&held), Some(&1));
}

#[test]
fn a_device_in_other_hands_is_waited_for() {
    let mut world = World::new(2, 3, policy(vec![WaveTarget::Percent(100)], 2));
    world.devices.get_mut(&device(0)).unwrap().busy = true;
    run_dry(&mut world);
    assert_eq!(world.rollout.state, RolloutState::Running);
    assert_eq!(
        world.rollout.assignments[&device(0)].state,
        AssignmentState::Planned
    );
    world.devices.get_mut(&device(0)).unwrap().busy = false;
    world.step();
    assert_eq!(world.offered(), BTreeSet::from([device(0)]));
}

#[test]
fn those_that_come_after_the_last_wave_have_a_pace_and_a_budget_of_their_own() {
    let mut policy = policy(vec![WaveTarget::Count(1)], 9);
    policy.tail.pace = pace(6);
    policy.tail.failure_budget.count = 2;
    let mut world = World::new(9, 3, policy);
    for number in 1..9 {
        world.devices.get_mut(&device(number)).unwrap().offline = true;
        world.devices.get_mut(&device(number)).unwrap().last_seen = UnixMs(0);
    }
    run_dry(&mut world);
    for _ in 0..4 {
        world.pass(2_000);
        run_dry(&mut world);
    }
    assert_eq!(world.rollout.state, RolloutState::Completed);
    assert_eq!(world.offers.len(), 1);
    world.join(20);
    for one in world.devices.values_mut() {
        one.offline = false;
    }
    for offered in 1..=2 {
        world.step();
        assert_eq!(world.offered().len(), 1, "one at a time");
        let device = world.offered().pop_first().unwrap();
        world.say(&device, Phase::RolledBack);
        world.pass(10_000);
        assert_eq!(world.offers.len(), 1 + offered);
    }
    world.step();
    world.pass(1_000_000);
    world.step();
    assert_eq!(world.offers.len(), 3, "two failures stop it");
    assert!(world.rollout.tail_stopped.is_some());
    assert_eq!(world.rollout.state, RolloutState::Completed);
    world.command(command::resume(&world.rollout));
    assert_eq!(world.rollout.tail_stopped, None);
    for _ in 0..20 {
        world.step();
        for device in world.offered() {
            world.say(&device, Phase::Succeeded);
        }
        world.pass(10_000);
    }
    assert_eq!(
        budget::Tally::of(&world.rollout).succeeded,
        10,
        "all and the one that joined"
    );
}

#[test]
fn failed_devices_are_tried_again_when_an_operator_says_so() {
    let mut policy = policy(vec![WaveTarget::Percent(100)], 4);
    policy.bake_ms = 0;
    let mut world = World::new(4, 3, policy);
    world.step();
    let (bad, other) = (device(0), device(1));
    world.say(&bad, Phase::RolledBack);
    world.step();
    assert!(command::retry(&world.rollout, Some(&other)).is_err());
    world.command(command::retry(&world.rollout, Some(&bad)));
    assert_eq!(budget::Tally::of(&world.rollout).failed, 0);
    world.step();
    assert_eq!(world.offers[&bad], 2);
    world.say(&bad, Phase::RolledBack);
    run_dry(&mut world);
    assert_eq!(world.rollout.state, RolloutState::Completed);
    world.command(command::retry(&world.rollout, None));
    run_dry(&mut world);
    assert_eq!(budget::Tally::of(&world.rollout).succeeded, 4);
}

#[test]
fn an_emergency_keeps_its_first_wave_and_lets_all_else_go() {
    let written: RolloutPolicy = serde_json::from_str(
        r#"{"waves": [{"count": 1, "approval": true}, {"percent": 10}, {"percent": 50}], "maxUnavailable": 1,
            "emergency": true, "startAt": "2030-01-01T00:00:00Z", "pace": {"perMinute": 1}}"#,
    )
    .unwrap();
    let mut world = World::new(20, 3, Policy::freeze(&written, 20));
    world.step();
    assert_eq!(world.rollout.waves.len(), 2);
    assert_eq!(world.offered().len(), 1, "the canary");
    assert_eq!(world.rollout.policy.priority, Policy::EMERGENCY_PRIORITY);
    let canary = world.offered().pop_first().unwrap();
    world.say(&canary, Phase::Succeeded);
    world.step();
    assert_eq!(world.offered().len(), 19);
}

fn stepping(way: &[(u8, &[u8])]) -> Policy {
    Policy {
        requirements: requirements(way),
        ..policy(vec![], 3)
    }
}

fn desired(world: &World, device: &DeviceId) -> Digest {
    world.devices[device].desired.unwrap().1.unwrap().release
}

#[test]
fn a_device_takes_every_step_on_its_way_and_counts_once_it_is_there() {
    let mut world = World::new(1, 7, stepping(&[(2, &[4]), (4, &[3])]));
    let only = device(0);
    for (step, last) in [(3, false), (4, false), (2, true)] {
        world.step();
        assert_eq!(desired(&world, &only), release(step));
        world.say(&only, Phase::Soaking);
        world.step();
        let view = &world.rollout.assignments[&only];
        assert_eq!(view.via, (!last).then_some(release(step)));
        world.say(&only, Phase::Succeeded);
        assert_eq!(budget::Tally::of(&world.rollout).succeeded, 0);
    }
    world.step();
    assert_eq!(budget::Tally::of(&world.rollout).succeeded, 1);
    assert_eq!(world.offers[&only], 3);
}

#[test]
fn no_step_is_taken_while_the_rollout_is_paused() {
    let mut world = World::new(1, 7, stepping(&[(2, &[3])]));
    let only = device(0);
    world.step();
    world.say(&only, Phase::Activating);
    world.step();
    world.command(command::pause(&world.rollout));
    world.say(&only, Phase::Succeeded);
    world.step();
    assert_eq!(desired(&world, &only), release(3));
    world.command(command::resume(&world.rollout));
    world.step();
    assert_eq!(desired(&world, &only), release(2));
}

#[test]
fn what_fails_after_a_step_goes_back_to_the_step_and_what_fails_on_it_to_what_was_before() {
    let way: &[(u8, &[u8])] = &[(2, &[3])];
    let mut world = World::new(1, 7, stepping(way));
    let only = device(0);
    world.step();
    world.say(&only, Phase::Succeeded);
    world.step();
    assert_eq!(desired(&world, &only), release(2));
    world.say(&only, Phase::RolledBack);
    world.step();
    assert_eq!(world.rollout.state, RolloutState::RollingBack);
    assert_eq!(desired(&world, &only), release(3));

    let mut world = World::new(1, 7, stepping(way));
    world.step();
    world.say(&only, Phase::RolledBack);
    world.step();
    assert_eq!(world.rollout.state, RolloutState::RollingBack);
    assert_eq!(desired(&world, &only), release(1));
}

#[test]
fn what_a_device_says_that_it_has_counts_and_not_what_it_was_given() {
    let mut world = World::new(2, 7, stepping(&[(2, &[3])]));
    // It was given release 1, and went back to release 3 by itself.
    let (one, other) = (device(0), device(1));
    let mark = world.devices.get_mut(&one).unwrap();
    mark.report = Some(Report {
        since: Version::from_numbers(1, 1).unwrap(),
        release: release(1),
        phase: Phase::RolledBack,
        reason: None,
        has: Some(release(3)),
    });
    for _ in 0..2 {
        world.step();
        for device in world.offered() {
            world.say(&device, Phase::Accepted);
        }
    }
    let there: Vec<Digest> = [&one, &other].map(|device| desired(&world, device)).into();
    assert_eq!(there, [release(2), release(3)]);
}

#[test]
fn one_that_was_silent_on_a_step_after_the_end_goes_on_at_the_pace_of_latecomers() {
    let mut policy = stepping(&[(2, &[3])]);
    policy.budget.count = 9;
    policy.budget.percent = 100;
    let mut world = World::new(3, 7, policy);
    world.step();
    let late = world.in_wave(1).remove(0);
    world.say(&late, Phase::Activating);
    world.step();
    for _ in 0..3 {
        for device in world.offered() {
            world.say(&device, Phase::Succeeded);
        }
        world.step();
    }
    world.devices.get_mut(&late).unwrap().offline = true;
    world.pass(world.rollout.policy.silent_after_ms());
    world.step();
    assert_eq!(
        world.rollout.assignments[&late].state,
        AssignmentState::Silent
    );
    world.pass(100_000);
    world.step();
    assert_eq!(world.rollout.state, RolloutState::Completed);
    world.devices.get_mut(&late).unwrap().offline = false;
    world.say(&late, Phase::Succeeded);
    world.step();
    assert!(world.rollout.assignments[&late].tail);
    assert_eq!(desired(&world, &late), release(2));
}

#[test]
fn a_rollout_that_takes_over_knows_what_a_step_was_good_for() {
    let mut world = World::new(2, 7, stepping(&[(2, &[3])]));
    world.step();
    let (one, other) = (device(0), device(1));
    world.say(&one, Phase::Succeeded);
    world.say(&other, Phase::Activating);
    world.step();
    world.command(command::supersede(&world.rollout, 2));
    let members = [&one, &other].map(|device| Member {
        labels: Labels::new(),
        device: device.clone(),
        placement: world.devices[device].desired.unwrap().1,
        phase: None,
    });
    let next = Rollout::open(Opening {
        id: 2,
        app: "app".parse().unwrap(),
        from: Some(release(2)),
        to: release(5),
        seed: 5,
        policy: policy(vec![], 2),
        members: members.into(),
        before: Some(&world.rollout),
        now: world.now,
    });
    let back = [&one, &other].map(|device| next.assignments[device].previous.unwrap().release);
    assert_eq!(back, [release(3), release(1)]);
}
