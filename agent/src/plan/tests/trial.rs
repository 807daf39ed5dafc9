//! What a release on trial must show besides being ready: that it stays up, and that it leaves the way to the hub open.

use super::*;
use crate::runtime::{ContainerState, Exit};

const MINUTE: u64 = 60_000;

/// A world in which the second release is soaking, with so many restarts forgiven.
fn soaking(max_restarts: u32) -> (World, Release) {
    let next = web("good", 2);
    let mut world = settled(&web("good", 1));
    world.max_restarts = max_restarts;
    world.assign(&next);
    world.run(SOAK_MS / 2);
    assert_eq!(world.phase("shop"), Phase::Soaking);
    (world, next)
}

/// Its process ends.
fn end(world: &mut World) {
    for (container, ..) in &mut world.containers {
        container.state = ContainerState::Exited(Exit {
            code: 3,
            oom: false,
            signal: None,
        });
    }
}

#[test]
fn an_end_in_the_soak_fails_a_release_unless_it_is_forgiven() {
    for (max_restarts, ends, phase) in [
        (0, 1, Phase::RolledBack),
        (1, 1, Phase::Succeeded),
        (1, 2, Phase::RolledBack),
        (3, 3, Phase::Succeeded),
        (3, 4, Phase::RolledBack),
    ] {
        let (mut world, next) = soaking(max_restarts);
        for number in 1..=ends {
            end(&mut world);
            world.turn(usize::MAX);
            if number <= max_restarts {
                assert_eq!(world.phase("shop"), Phase::Activating);
                // Back up, and half through its soak.
                while world.phase("shop") != Phase::Soaking {
                    world.run(100);
                }
                world.run(SOAK_MS / 2);
                assert_eq!(world.phase("shop"), Phase::Soaking, "the soak begins anew");
            }
        }
        world.run(HOUR);
        assert_eq!(world.phase("shop"), phase, "{ends} of {max_restarts}");
        let status = world.status("shop");
        assert_eq!(
            status.running == Some(next.digest()),
            phase == Phase::Succeeded
        );
        if phase == Phase::RolledBack && max_restarts > 0 {
            let message = status.reason.unwrap().message;
            let expected = format!("{ends} unexpected ends during the soak");
            assert!(message.starts_with(&expected), "{message}");
        }
    }
}

#[test]
fn what_runs_and_is_not_ready_is_not_forgiven() {
    let mut world = settled(&web("good", 1));
    world.max_restarts = 10;
    world.assign(&web("unready 2500", 2));
    world.run(HOUR);
    assert_eq!(world.phase("shop"), Phase::RolledBack);
    assert_eq!(
        world.status("shop").reason.unwrap().code,
        ReasonCode::NotReady
    );
}

#[test]
fn a_release_that_ends_again_and_again_is_given_up_whatever_is_forgiven() {
    let mut world = settled(&web("good", 1));
    world.max_restarts = 10;
    world.assign(&web("exit 1 700", 2));
    world.run(HOUR);
    assert_eq!(world.phase("shop"), Phase::RolledBack);
}

/// A world in which the second release is on trial and must reach the hub within five minutes.
fn asked(connected: bool) -> World {
    let mut world = settled(&web("good", 1));
    world.contact.noticed_after_ms = 2 * MINUTE;
    world.contact.connected_since = connected.then_some(world.now.ms);
    world.run(1_000);
    world.require_hub_ms = Some(5 * MINUTE);
    world.assign(&web("good", 2));
    world.run(1_000);
    world
}

#[test]
fn a_release_that_cuts_its_device_off_is_given_up_if_it_was_asked_for() {
    let mut world = asked(true);
    // What the release broke is noticed later.
    world.run(20_000);
    world.contact.connected_since = None;
    world.run(MINUTE);
    let status = world.status("shop");
    assert_eq!(status.phase, Phase::Soaking, "{status:?}");
    let reason = status.reason.unwrap();
    assert_eq!(reason.code, ReasonCode::HubUnreachable);
    assert_eq!(
        reason.message,
        "waits until the hub is reached again, for 5m from switching"
    );
    world.run(5 * MINUTE);
    let status = world.status("shop");
    assert_eq!(status.phase, Phase::RolledBack);
    assert_eq!(status.reason.unwrap().code, ReasonCode::HubUnreachable);
    assert_eq!(world.running("shop")["web"], web("good", 1).digest());
}

#[test]
fn any_sign_that_the_way_is_open_is_enough() {
    type Sign = fn(&mut World);
    let signs: [(&str, Sign); 4] = [
        ("a new session", |world| {
            world.contact.connected_since = Some(world.now.ms)
        }),
        ("an answer", |world| {
            world.contact.answered = Some(world.now.ms)
        }),
        ("a refusal: the broker is away", |world| {
            world.contact.connected_since = None;
            world.contact.refused = Some(world.now.ms);
        }),
        ("a session that would be dead by now", |_| {}),
    ];
    for (what, sign) in signs {
        let mut world = asked(true);
        world.run(10_000);
        assert_eq!(world.phase("shop"), Phase::Soaking, "{what}");
        sign(&mut world);
        world.run(4 * MINUTE);
        assert_eq!(world.phase("shop"), Phase::Succeeded, "{what}");
    }
    // What was answered before proves nothing.
    let mut world = asked(true);
    world.contact.answered = Some(BootMs(world.now.ms.0 - 1_000));
    world.contact.connected_since = None;
    world.run(6 * MINUTE);
    assert_eq!(world.phase("shop"), Phase::RolledBack);
}

#[test]
fn a_device_that_was_cut_off_before_has_nothing_to_prove() {
    let mut world = asked(false);
    world.run(HOUR);
    assert_eq!(world.phase("shop"), Phase::Succeeded);
    // Nor one whose app does not ask.
    let mut world = settled(&web("good", 1));
    world.contact.connected_since = Some(world.now.ms);
    world.assign(&web("good", 2));
    world.run(1_000);
    world.contact.connected_since = None;
    world.run(HOUR);
    assert_eq!(world.phase("shop"), Phase::Succeeded);
}

#[test]
fn an_agent_or_device_that_starts_anew_goes_on_waiting_for_the_hub() {
    for reboot in [false, true] {
        for reached in [false, true] {
            let mut world = asked(true);
            if reboot {
                world.reboot();
            } else {
                world.crash();
            }
            world.run(MINUTE);
            assert_eq!(world.phase("shop"), Phase::Soaking);
            if reached {
                world.contact.connected_since = Some(world.now.ms);
            }
            world.run(6 * MINUTE);
            let phase = if reached {
                Phase::Succeeded
            } else {
                Phase::RolledBack
            };
            assert_eq!(world.phase("shop"), phase);
        }
    }
}
