//! Each rule of [`check`] speaks up when it is broken; else the properties would prove nothing.

use super::*;

/// Three of six devices succeeded in wave 1, one of wave 2 is switching, two are planned.
fn running() -> World {
    let mut policy = policy(vec![WaveTarget::Count(3)], 6);
    policy.max_unavailable = 1;
    policy.bake_ms = 0;
    let mut world = World::new(6, 1, policy);
    for _ in 0..3 {
        world.step();
        let device = world.offered().pop_first().unwrap();
        world.say(&device, Phase::Succeeded);
    }
    world.step();
    let device = world.offered().pop_first().unwrap();
    world.say(&device, Phase::Soaking);
    world.step();
    world
}

fn rules(world: &World, action: &Action) -> BTreeSet<Rule> {
    check_action(&world.rollout, action, &world.fleet(), world.now)
        .into_iter()
        .map(|wrong| wrong.rule)
        .collect()
}

fn planned(world: &World) -> DeviceId {
    world
        .in_state(|state| state == AssignmentState::Planned)
        .pop_first()
        .unwrap()
}

fn switching(world: &World) -> DeviceId {
    world
        .in_state(|state| state == AssignmentState::Device(Phase::Soaking))
        .pop_first()
        .unwrap()
}

fn offer(device: DeviceId) -> Action {
    Action::Offer {
        device,
        placement: placement(2),
        next: None,
    }
}

fn assign(device: DeviceId, state: AssignmentState) -> Action {
    Action::Assign {
        device,
        state,
        deferral: None,
        deadline: None,
        message: None,
    }
}

fn enter(state: RolloutState) -> Action {
    Action::Enter {
        state,
        cause: None,
        message: None,
    }
}

fn wave(ordinal: u32, state: WaveState) -> Action {
    Action::Wave {
        ordinal,
        state,
        bake_until: None,
    }
}

#[test]
fn offers_beyond_the_slots_or_twice_or_out_of_turn() {
    let mut world = running();
    assert!(rules(&world, &offer(planned(&world))).contains(&Rule::MaxUnavailable));
    assert!(rules(&world, &offer(switching(&world))).contains(&Rule::OfferOnce));
    world.rollout.policy.max_unavailable = 2;
    assert_eq!(rules(&world, &offer(planned(&world))), BTreeSet::new());
    let device = planned(&world);
    world.devices.get_mut(&device).unwrap().offline = true;
    assert_eq!(
        rules(&world, &offer(device.clone())),
        BTreeSet::from([Rule::OfferOnce])
    );
    world.devices.get_mut(&device).unwrap().offline = false;
    world.rollout.waves[1].state = WaveState::Pending;
    assert_eq!(
        rules(&world, &offer(device)),
        BTreeSet::from([Rule::NotBeforeItsTurn])
    );
}

#[test]
fn offers_after_the_brakes_or_while_stopped() {
    let mut world = running();
    world.rollout.policy.max_unavailable = 6;
    let device = planned(&world);
    let mut broken = world.clone();
    broken.rollout.policy.budget.count = 1;
    broken.commit(&assign(
        switching(&world),
        AssignmentState::Device(Phase::Failed),
    ));
    assert_eq!(
        rules(&broken, &offer(device.clone())),
        BTreeSet::from([Rule::NoOfferAfterBreak])
    );
    let mut failed = world.clone();
    failed.rollout.waves[1].state = WaveState::Failed;
    assert_eq!(
        rules(&failed, &offer(device.clone())),
        BTreeSet::from([Rule::NoOfferAfterBreak])
    );
    world.command(command::pause(&world.rollout));
    assert_eq!(
        rules(&world, &offer(device)),
        BTreeSet::from([Rule::NothingWhileStopped])
    );
}

#[test]
fn waves_out_of_order_or_past_their_gates() {
    let mut world = World::new(4, 1, policy(vec![WaveTarget::Count(2)], 4));
    assert_eq!(
        rules(&world, &wave(2, WaveState::Open)),
        BTreeSet::from([Rule::WaveOrder])
    );
    assert_eq!(
        rules(&world, &wave(1, WaveState::Skipped)),
        BTreeSet::from([Rule::Gates])
    );
    world.step();
    assert_eq!(
        rules(&world, &wave(1, WaveState::Passed)),
        BTreeSet::from([Rule::Gates])
    );
    for device in world.offered() {
        world.commit(&assign(device, AssignmentState::Device(Phase::RolledBack)));
    }
    assert_eq!(
        rules(&world, &wave(1, WaveState::Passed)),
        BTreeSet::from([Rule::Gates]),
        "all failed"
    );
    for device in world.in_wave(1) {
        world.commit(&assign(device, AssignmentState::Device(Phase::Succeeded)));
    }
    assert_eq!(
        rules(&world, &wave(1, WaveState::Passed)),
        BTreeSet::from([Rule::Gates]),
        "not baked"
    );
    world.pass(2_000);
    assert_eq!(rules(&world, &wave(1, WaveState::Passed)), BTreeSet::new());
}

#[test]
fn rollbacks_without_a_cause_or_beyond_the_slots() {
    let mut world = running();
    assert_eq!(
        rules(&world, &enter(RolloutState::RollingBack)),
        BTreeSet::from([Rule::RollbackCause])
    );
    assert_eq!(
        rules(&world, &enter(RolloutState::RolledBack)),
        BTreeSet::from([Rule::RollbackCause])
    );
    let good = world
        .in_state(|state| state == AssignmentState::Device(Phase::Succeeded))
        .pop_first()
        .unwrap();
    let back = Action::Restore {
        device: good,
        placement: None,
        revert: Revert::Switching,
    };
    assert!(rules(&world, &back).contains(&Rule::RollbackCause));
    world.rollout.state = RolloutState::RollingBack;
    assert_eq!(rules(&world, &back), BTreeSet::from([Rule::MaxUnavailable]));
    assert_eq!(
        rules(&world, &enter(RolloutState::RollingBack)),
        BTreeSet::from([Rule::RollbackCause])
    );
}

#[test]
fn verdicts_before_their_time() {
    let mut world = running();
    let silent = AssignmentState::Silent;
    assert_eq!(
        rules(&world, &assign(switching(&world), silent)),
        BTreeSet::from([Rule::SilentOnlyAfterSwitching])
    );
    let deferred = assign(switching(&world), AssignmentState::Deferred);
    assert_eq!(
        rules(&world, &deferred),
        BTreeSet::from([Rule::DeferredOnlyBeforeBegin])
    );
    world.pass(world.rollout.policy.silent_after_ms());
    assert_eq!(
        rules(&world, &assign(switching(&world), silent)),
        BTreeSet::new()
    );
    assert!(
        rules(&world, &assign(planned(&world), silent)).contains(&Rule::SilentOnlyAfterSwitching)
    );
    world.commit(&Action::Freeze);
    assert!(rules(&world, &assign(switching(&world), silent)).contains(&Rule::NothingWhileStopped));
    assert!(
        rules(&world, &Action::Freeze).contains(&Rule::NothingWhileStopped),
        "the fleet is well"
    );
}

#[test]
fn a_release_that_cannot_be_reached_and_a_way_that_is_longer_than_it_must_be() {
    let mut world = running();
    let device = planned(&world);
    world.rollout.policy.requirements = requirements(&[(2, &[3])]);
    assert!(rules(&world, &offer(device.clone())).contains(&Rule::Steps));
    let via = |release| Action::Offer {
        device: device.clone(),
        placement: Placement {
            release,
            ..placement(2)
        },
        next: None,
    };
    assert!(!rules(&world, &via(release(3))).contains(&Rule::Steps));
    let step = |assignment: &mut Assignment| assignment.previous = Some(placement(3));
    world.rollout.assignments.change(&device, step);
    assert!(rules(&world, &via(release(3))).contains(&Rule::Steps));
    assert!(!rules(&world, &offer(device.clone())).contains(&Rule::Steps));
    let stepped = Action::Stepped { device };
    assert!(rules(&world, &stepped).contains(&Rule::Steps));
}

#[test]
fn records_that_do_not_fit_together() {
    let broken = |change: &dyn Fn(&mut Rollout)| {
        let mut rollout = running().rollout;
        assert_eq!(check(&rollout), []);
        change(&mut rollout);
        check(&rollout)
            .into_iter()
            .map(|wrong| wrong.rule)
            .collect::<BTreeSet<_>>()
    };
    let first = |rollout: &mut Rollout, change: &dyn Fn(&mut Assignment)| {
        let device = rollout.assignments.keys().next().unwrap().clone();
        rollout.assignments.change(&device, change);
    };
    let of = |rule| BTreeSet::from([rule]);
    assert!(broken(&|rollout| rollout.waves[0].size += 1).contains(&Rule::WaveSizes));
    assert!(
        broken(&|rollout| first(rollout, &|one| one.wave = 3 - one.wave))
            .contains(&Rule::WaveSizes)
    );
    assert!(broken(&|rollout| first(rollout, &|one| one.rank += 1)).contains(&Rule::WaveSizes));
    assert!(broken(&|rollout| rollout.waves[0].state = WaveState::Open).contains(&Rule::WaveOrder));
    assert!(
        broken(&|rollout| rollout.waves[1].state = WaveState::Pending)
            .contains(&Rule::NotBeforeItsTurn)
    );
    assert_eq!(
        broken(&|rollout| first(rollout, &|one| one.failed = !one.failed)),
        of(Rule::Coherent)
    );
    assert_eq!(
        broken(&|rollout| first(rollout, &|one| one.revert = Some(Revert::Done))),
        of(Rule::Coherent)
    );
    let spoilt = |rollout: &mut Rollout| {
        let device = rollout.assignments.keys().next().unwrap().clone();
        rollout
            .assignments
            .spoil(&device, |one| one.deadline = Some(Tick(1)));
    };
    assert_eq!(broken(&spoilt), of(Rule::Counters));
    assert_eq!(
        broken(&|rollout| rollout.frozen = true),
        of(Rule::ClockStops)
    );
    assert_eq!(
        broken(&|rollout| rollout.clock.stopped_at = Some(UnixMs(1))),
        of(Rule::ClockStops)
    );
    for state in [RolloutState::Completed, RolloutState::RolledBack] {
        let ended = broken(&|rollout| {
            rollout.state = state;
            rollout.finished = Some(UnixMs(1));
        });
        assert_eq!(ended, of(Rule::FinalIsFinal), "{state:?}");
    }
}
