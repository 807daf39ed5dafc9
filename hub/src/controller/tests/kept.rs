//! Rollouts that are kept in memory: whatever becomes of a change, they are what is stored. [`Hub::change`] compares
//! them after every change of every test here and beside it.

use std::sync::atomic::{AtomicU64, Ordering};

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

/// How many instructions SQLite executes for the success of a device and what is decided on it (another is offered the
/// release), and for the loss of a connection, in a rollout of so many devices.
fn instructions(devices: usize) -> [u64; 2] {
    let mut hub = Hub::new();
    let names: Vec<String> = (0..devices).map(|number| format!("d-{number}")).collect();
    for name in &names {
        hub.join(name);
    }
    let policy = "waves: [{percent: 100}], soak: 0s, bake: 0s, maxUnavailable: 4";
    hub.apply(&resolved("1", policy));
    let offered = |hub: &Hub| -> Vec<String> {
        let told = names.iter().filter(|name| hub.release_of(name).is_some());
        told.cloned().collect()
    };
    let told = offered(&hub);
    let [first, second, third, _] = &told[..] else {
        panic!("{told:?} were offered the release");
    };
    hub.compare = false;
    hub.obey(first, Phase::Succeeded);
    let executed = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&executed);
    let count = move || {
        counter.fetch_add(1, Ordering::Relaxed);
        false
    };
    hub.connection.progress_handler(1, Some(count)).unwrap();
    hub.obey(second, Phase::Succeeded);
    let success = executed.swap(0, Ordering::Relaxed);
    hub.hear(third, false, Message::Presence(presence(1, 1, false)));
    let loss = executed.swap(0, Ordering::Relaxed);
    hub.connection
        .progress_handler(0, None::<fn() -> bool>)
        .unwrap();
    assert_eq!(
        offered(&hub).len(),
        7,
        "each of the three made room for another"
    );
    assert!(hub.lives.discrepancy(&hub.connection).unwrap().is_none());
    [success, loss]
}

#[test]
fn a_report_costs_the_store_the_same_in_a_large_rollout_as_in_a_small_one() {
    let (small, large) = (instructions(20), instructions(400));
    for (small, large) in small.into_iter().zip(large) {
        assert!(small > 0);
        assert!(large <= small + small / 20, "{small} grew to {large}");
    }
}
