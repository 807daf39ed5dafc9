//! Trials that are broken into by something that the release did not do: a release is judged by ends of its own making,
//! and one that brings such things about again and again is given up all the same.

use proptest::prelude::*;

use super::*;
use crate::runtime::{ContainerState, Exit};

/// The shop with a good release, and another that is just about to be started: its container is decided on, and nothing
/// was done about it.
fn about_to_start(restart: RestartPolicy) -> (World, Digest) {
    let shop = |seed| release("shop", &[("web", service("good", seed, restart))]);
    let mut world = settled(&shop(1));
    let digest = world.assign(&shop(2));
    let starts = |plan: &Plan| {
        let mut steps = plan.steps.iter();
        steps.any(|step| matches!(step, Step::Start { .. }))
    };
    while !starts(&world.clone().turn(0)) {
        world.turn(usize::MAX);
    }
    world.turn(0);
    (world, digest)
}

/// The container whose start was decided on last, in this state, although the agent that started it is gone.
fn left_behind(world: &mut World, state: ContainerState) {
    let before = world.history.clone();
    let app = &before.apps["shop"];
    let service = &app.services["web"];
    let manifest = &world.releases[&service.release.unwrap()];
    let spec = manifest.services["web"].clone();
    let container = Container {
        id: ContainerId {
            app: "shop".parse().unwrap(),
            service: "web".parse().unwrap(),
            instance: service.instance,
        },
        release: service.release.unwrap(),
        service_digest: service.spec.unwrap(),
        secrets: BTreeMap::new(),
        state,
    };
    world.containers.push((container, world.now.ms, spec));
}

fn killed() -> ContainerState {
    ContainerState::Exited(Exit {
        code: 137,
        oom: false,
        signal: Some(9),
    })
}

fn setbacks(world: &World) -> u32 {
    let app = &world.history.apps["shop"];
    app.trial.as_ref().map_or(0, |trial| trial.setbacks)
}

#[test]
fn a_container_that_the_agent_kills_because_its_start_was_cut_off_does_not_fail_the_release() {
    let (mut world, digest) = about_to_start(RestartPolicy::Always);
    world.crash();
    // The starting process goes on without its agent: unfinished when the next one looks, and being removed by it when
    // it turns out to run, and then to have been killed.
    left_behind(&mut world, ContainerState::Broken);
    world.now.ms = world.now.ms.plus(10);
    let plan = world.turn(0);
    assert!(matches!(&plan.steps[..], [Step::Remove { .. }]), "{plan:?}");
    let running = ContainerState::Running {
        pid: 1,
        started_ms: world.now.ms.0,
    };
    for state in [running, killed()] {
        world.containers[0].0.state = state;
        world.now.ms = world.now.ms.plus(10);
        let plan = world.busy_turn("shop", "web");
        assert_eq!(plan.notices, vec![]);
        assert_eq!(world.phase("shop"), Phase::Activating);
    }
    world.run(HOUR);
    let status = world.status("shop");
    assert_eq!(status.phase, Phase::Succeeded, "{status:?}");
    assert_eq!(status.running, Some(digest));
}

#[test]
fn a_container_that_was_killed_by_the_agent_that_gave_its_start_up_does_not_fail_the_release() {
    let (mut world, digest) = about_to_start(RestartPolicy::Always);
    world.crash();
    left_behind(&mut world, killed());
    world.run(HOUR);
    let status = world.status("shop");
    assert_eq!(status.phase, Phase::Succeeded, "{status:?}");
    assert_eq!(status.running, Some(digest));
}

#[test]
fn an_end_of_its_own_making_counts_although_the_agent_did_not_see_the_start() {
    for exit in [
        Exit::with_code(3),
        Exit {
            code: 139,
            oom: false,
            signal: Some(11),
        },
        Exit {
            code: 137,
            oom: true,
            signal: Some(9),
        },
    ] {
        let (mut world, _) = about_to_start(RestartPolicy::No);
        world.crash();
        left_behind(&mut world, ContainerState::Exited(exit));
        world.now.ms = world.now.ms.plus(10);
        world.turn(0);
        assert_eq!(world.phase("shop"), Phase::RolledBack, "{exit:?}");
    }
}

#[test]
fn a_supervisor_that_was_killed_during_the_soak_fails_nothing_and_its_service_comes_back() {
    let (mut world, digest) = about_to_start(RestartPolicy::Always);
    world.run(1_000);
    assert_eq!(world.phase("shop"), Phase::Soaking);
    world.containers[0].0.state = ContainerState::Broken;
    let plan = world.turn(usize::MAX);
    assert!(
        plan.notices
            .iter()
            .any(|notice| notice.message.contains("supervisor")),
        "{plan:?}"
    );
    assert_eq!(world.phase("shop"), Phase::Activating);
    world.run(HOUR);
    assert_eq!(world.phase("shop"), Phase::Succeeded);
    assert_eq!(world.running("shop")["web"], digest);
}

#[test]
fn a_release_whose_supervisor_dies_at_each_start_is_given_up() {
    let (mut world, _) = about_to_start(RestartPolicy::Always);
    let mut losses = 0;
    while world.phase("shop") != Phase::RolledBack {
        world.run(1_000);
        for (container, ..) in &mut world.containers {
            if container.release != web("good", 1).digest() {
                container.state = ContainerState::Broken;
                losses += 1;
            }
        }
        assert!(losses < 100, "it goes on for ever");
        world.turn(usize::MAX);
    }
    assert!(losses >= 5, "given up after {losses}");
    world.run(HOUR);
    assert_eq!(world.running("shop")["web"], web("good", 1).digest());
}

#[test]
fn a_release_that_takes_the_agent_down_at_each_start_is_given_up() {
    let (mut world, bad) = about_to_start(RestartPolicy::Always);
    let mut lives = 0;
    while world.phase("shop") != Phase::RolledBack {
        // The agent ends in the middle of the start, whatever it starts.
        world.now.ms = world.now.ms.plus(100);
        world.crash();
        world.now.ms = world.now.ms.plus(100);
        world.turn(0);
        lives += 1;
        assert!(lives < 100, "it goes on for ever");
    }
    assert!(lives >= 5, "given up after {lives}");
    world.run(HOUR);
    assert_eq!(world.running("shop")["web"], web("good", 1).digest());
    assert!(world.started.iter().all(|(_, release)| *release != bad));
}

#[test]
fn a_step_that_waits_for_the_disk_is_no_setback() {
    let (mut world, _) = about_to_start(RestartPolicy::Always);
    // What the disk does not take is decided anew in each turn, and not begun.
    for _ in 0..50 {
        world.now.ms = world.now.ms.plus(1_000);
        world.turn(0);
    }
    assert_eq!(setbacks(&world), 0);
}

#[test]
fn a_container_that_is_stopped_for_an_update_and_then_wanted_again_ended_by_no_fault_of_its_own() {
    let old = release("shop", &[("web", service("good", 1, RestartPolicy::No))]);
    let mut world = settled(&old);
    world.assign(&release(
        "shop",
        &[("web", service("good", 2, RestartPolicy::No))],
    ));
    while !world
        .turn(0)
        .steps
        .iter()
        .any(|step| matches!(step, Step::Stop { .. }))
    {
        world.turn(1);
    }
    // The stop is under way when the hub takes its word back; the container ends by the signal.
    world.assign(&old);
    world.busy_turn("shop", "web");
    world.containers[0].0.state = ContainerState::Exited(Exit {
        code: 143,
        oom: false,
        signal: Some(15),
    });
    world.busy_turn("shop", "web");
    world.run(HOUR);
    let status = world.status("shop");
    assert_eq!(status.phase, Phase::Succeeded, "{status:?}");
    assert_eq!(world.running("shop")["web"], old.digest());
}

#[derive(Debug, Clone, Copy)]
enum Setback {
    Crash,
    /// The agent, after it has decided and before it has done anything.
    CrashInStart,
    SupervisorKilled,
    ContainerGone,
}

fn setback() -> impl Strategy<Value = Setback> {
    prop_oneof![
        Just(Setback::Crash),
        Just(Setback::CrashInStart),
        Just(Setback::SupervisorKilled),
        Just(Setback::ContainerGone),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    /// A good release survives a few setbacks of any kind at any moment of its trial, and is never given up by them.
    #[test]
    fn a_few_setbacks_never_fail_a_good_release(events in prop::collection::vec((0..4_000_u64, setback()), 0..5)) {
        let (mut world, digest) = about_to_start(RestartPolicy::Always);
        for (after, event) in events {
            world.run(after);
            world.now.ms = world.now.ms.plus(1);
            match event {
                Setback::Crash => world.crash(),
                Setback::CrashInStart => {
                    world.turn(0);
                    world.now.ms = world.now.ms.plus(1);
                    world.crash();
                }
                Setback::SupervisorKilled => {
                    for (container, ..) in &mut world.containers {
                        container.state = ContainerState::Broken;
                    }
                }
                Setback::ContainerGone => world.containers.clear(),
            }
            prop_assert!(world.phase("shop") != Phase::RolledBack);
        }
        world.run(HOUR);
        prop_assert_eq!(world.phase("shop"), Phase::Succeeded);
        prop_assert_eq!(world.running("shop")["web"], digest);
    }

    /// However a trial is broken into, it ends if that goes on.
    #[test]
    fn a_trial_ends_whatever_breaks_into_it(events in prop::collection::vec((500..4_000_u64, setback()), 1..4)) {
        let (mut world, _) = about_to_start(RestartPolicy::Always);
        let mut rounds = 0;
        for (after, event) in events.iter().cycle() {
            world.run((*after).min(SOAK_MS - 200));
            world.now.ms = world.now.ms.plus(1);
            match event {
                Setback::Crash => world.crash(),
                Setback::CrashInStart => {
                    world.turn(0);
                    world.now.ms = world.now.ms.plus(1);
                    world.crash();
                }
                Setback::SupervisorKilled => {
                    for (container, ..) in &mut world.containers {
                        container.state = ContainerState::Broken;
                    }
                }
                Setback::ContainerGone => world.containers.clear(),
            }
            if world.phase("shop").is_final() {
                break;
            }
            rounds += 1;
            prop_assert!(rounds < 200, "it goes on for ever");
        }
    }
}
