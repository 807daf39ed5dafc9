//! What `explain` says at each turn of a rollout.

use super::*;

fn last(world: &World, number: usize) -> (String, String) {
    let steps = explain::explain(&world.rollout, &device(number), &world.fleet(), world.now);
    assert!(
        steps
            .iter()
            .rev()
            .skip(1)
            .all(|step| step.waits_for.is_none()),
        "only the last link waits: {steps:#?}"
    );
    let last = steps.last().unwrap().clone();
    (last.what, last.waits_for.unwrap_or_default())
}

fn waits(world: &World, number: usize) -> String {
    last(world, number).1
}

#[test]
fn what_a_device_waits_for_is_named() {
    let mut policy = policy(vec![WaveTarget::Count(1), WaveTarget::Percent(100)], 6);
    policy.waves[0].approval = true;
    policy.max_unavailable = 2;
    policy.start_at = Some(NOW.plus(1_000));
    let mut world = World::new(6, 7, policy);
    let canary = world.in_wave(1).remove(0);
    let first: usize = canary.as_str()["device-".len()..].parse().unwrap();
    let others: Vec<usize> = (0..6).filter(|number| *number != first).collect();
    world.step();
    assert_eq!(waits(&world, first), "the time at which the rollout begins");
    world.pass(1_000);
    world.step();
    assert_eq!(waits(&world, first), "the device");
    assert!(waits(&world, others[0]).starts_with("wave 1 to pass: 0 of 1"));
    world.say(&canary, Phase::Blocked);
    world.step();
    assert_eq!(waits(&world, first), "that to pass; it tries again");
    world.say(&canary, Phase::Soaking);
    world.step();
    assert_eq!(waits(&world, first), "the soak: they must stay so");
    world.say(&canary, Phase::Succeeded);
    world.step();
    assert_eq!(
        last(&world, first),
        ("it runs the release, and well".to_owned(), String::new())
    );
    assert_eq!(waits(&world, others[0]), "its bake to be over");
    world.pass(2_000);
    world.step();
    assert_eq!(
        waits(&world, others[0]),
        "its approval: `foreshore rollout approve`"
    );
    world.command(command::approve(&world.rollout));
    world.devices.get_mut(&device(others[0])).unwrap().held = true;
    world.devices.get_mut(&device(others[1])).unwrap().busy = true;
    world.devices.get_mut(&device(others[2])).unwrap().offline = true;
    world.step();
    assert_eq!(waits(&world, others[0]), "`foreshore device release`");
    assert_eq!(waits(&world, others[2]), "the device to connect");
    assert_eq!(
        waits(&world, others[1]),
        "that change to end: one at a time"
    );
    world.devices.get_mut(&device(others[1])).unwrap().busy = false;
    assert_eq!(waits(&world, others[1]), "one of them to end");
    world.command(command::pause(&world.rollout));
    assert_eq!(waits(&world, others[1]), "`foreshore rollout resume`");
}

#[test]
fn after_a_failure_the_way_on_is_named() {
    let mut world = World::new(3, 7, policy(percent(&[100]), 3));
    world.step();
    world.say(&device(0), Phase::RolledBack);
    world.step();
    assert!(waits(&world, 0).starts_with("`foreshore rollout retry`"));
    let (what, waits_for) = last(&world, 9);
    assert!(
        what.starts_with("it is not among the devices"),
        "{what}: {waits_for}"
    );
}
