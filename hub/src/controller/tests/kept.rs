//! Rollouts that are kept in memory: whatever becomes of a change, they are what is stored. [`Hub::change`] compares
//! them after every change of every test here and beside it.

use super::*;

/// A hub with a rollout under way on `a` and `b`, and its id.
fn under_way() -> (Hub, u64) {
    let mut hub = Hub::new();
    for name in ["a", "b"] {
        hub.join(name);
    }
    let rollout = hub.apply(&resolved("1", AT_ONCE)).rollout.unwrap();
    assert!(hub.lives.has(rollout));
    (hub, rollout)
}

#[test]
fn a_change_that_fails_leaves_nothing_in_memory() {
    let (mut hub, rollout) = under_way();
    let failed = hub.change(|change| {
        rollouts::command(change, rollout, rollouts::Command::Pause)?;
        apps::hold(change, &device("a"), Some("no"))?;
        change.lives.sync(change.connection)?;
        Err::<(), _>(ControlError::UnknownRollout(9))
    });
    assert!(matches!(failed, Err(ControlError::UnknownRollout(9))));
    assert!(!hub.lives.has(rollout), "what was changed is dropped");
    assert_eq!(hub.state(), RolloutState::Running);
    for name in ["a", "b"] {
        hub.obey(name, Phase::Succeeded);
    }
    assert_eq!(hub.state(), RolloutState::Completed);
}

#[test]
fn a_refused_command_drops_nothing_else() {
    let (mut hub, rollout) = under_way();
    let refused = hub.change(|change| rollouts::command(change, 99, rollouts::Command::Pause));
    assert!(refused.is_err());
    assert!(hub.lives.has(rollout));
}

#[test]
fn what_was_not_committed_is_dropped() {
    let (mut hub, rollout) = under_way();
    hub.lives.begin(0);
    assert!(hub.lives.has(rollout));
    hub.lives.begin(1);
    assert!(!hub.lives.has(rollout));
}

#[test]
fn rollouts_that_were_given_up_or_replaced_are_not_kept() {
    let (mut hub, first) = under_way();
    let second = hub.apply(&resolved("2", AT_ONCE)).rollout.unwrap();
    assert!(!hub.lives.has(first) && hub.lives.has(second));
    hub.change(|change| rollouts::command(change, second, rollouts::Command::Abort))
        .unwrap();
    assert!(!hub.lives.has(second));
}

#[test]
fn whatever_changes_a_device_reaches_the_rollouts_in_memory() {
    let (mut hub, _) = under_way();
    // Each is compared with what is stored; here it is only made to happen.
    hub.obey("a", Phase::Staging);
    hub.change(|change| apps::hold(change, &device("b"), Some("")))
        .unwrap();
    hub.change(|change| apps::hold(change, &device("b"), None))
        .unwrap();
    hub.hear("b", false, Message::Presence(presence(1, 1, false)));
    hub.change(|change| apps::forget(change, &device("b")))
        .unwrap();
    hub.join("b");
    hub.change(|change| {
        store::device::all_offline(change.connection)?;
        change.touch_live()?;
        Ok(())
    })
    .unwrap();
    for name in ["a", "b"] {
        hub.birth(name, 2, 2);
    }
    hub.change(|change| apps::delete(change, &shop())).unwrap();
    assert_eq!(hub.lives.devices(), 0, "nothing is left of it");
}
