//! Runs for invariants that random ones seldom put to the test. Each passes, and fails when the fault that it is about is
//! built in.

use foreshore_hub::rollout::Rollout;
use foreshore_protocol::Digest;
use foreshore_protocol::api::RolloutState;
use foreshore_protocol::manifest::{Amount, RolloutPolicy, WaveSpec, WaveTarget};
use foreshore_protocol::quantity::Span;
use foreshore_sim::hub::{BEACON_INTERVAL, Hub};
use foreshore_sim::mutation::Mutation;
use foreshore_sim::scenario::{Budget, Command, Fate, Fault, HOUR, MINUTE, Ms, SECOND, Scenario};
use foreshore_sim::simulation::play;

/// When the second release is applied; the first is everywhere by then.
const APPLIED: Ms = 4 * HOUR;

/// Two good releases, one after the other.
fn update(devices: usize) -> Scenario {
    let policy = RolloutPolicy {
        waves: vec![WaveSpec::from(WaveTarget::Percent(100))],
        soak: Span::from_secs(5),
        bake: Span::from_secs(0),
        progress_deadline: Span::from_secs(60),
        max_unavailable: Amount::Percent(100),
        ..RolloutPolicy::default()
    };
    let fates = [Fate::Good, Fate::Good, Fate::Good];
    let mut scenario = Scenario::calm(devices, usize::MAX, &fates, policy);
    scenario.commands = vec![
        (10 * MINUTE, 0, Command::Apply(0)),
        (APPLIED, 0, Command::Apply(1)),
    ];
    scenario
}

fn release(scenario: &Scenario, number: usize) -> Digest {
    scenario.apps[0].releases[number].digest()
}

/// The rule that a run breaks first, and the hub as it is in the end.
fn judge(scenario: &Scenario, mutation: Option<Mutation>) -> (Option<String>, Hub) {
    let (outcome, hub) = play(scenario.clone(), mutation, false);
    (outcome.violations.into_iter().next(), hub)
}

/// Invariant 15: a broker that was emptied right after it took what was new, while everybody is away, is made good by the
/// births and beacons of one interval.
#[test]
fn an_emptied_broker_is_made_good_within_a_beacon_interval() {
    let mut scenario = update(6);
    let back = APPLIED + 10 * MINUTE;
    scenario.faults = vec![
        // Offered, and not published yet.
        (APPLIED + 1, Fault::BrokerOutage(10 * MINUTE)),
        (APPLIED + 2, Fault::HubCrash(MINUTE)),
        (APPLIED + 5 * MINUTE, Fault::HubCrash(MINUTE)),
        // Published, and nobody is back yet.
        (back + SECOND, Fault::WipeRetained),
    ];
    let in_time = |hub: &Hub| {
        let mut history = hub.history.iter();
        let done = history.find(|(_, id, state)| *id == 2 && *state == RolloutState::Completed);
        done.is_some_and(|(at, ..)| *at < back + BEACON_INTERVAL + 5 * MINUTE)
    };
    let (broken, hub) = judge(&scenario, None);
    assert_eq!(broken, None);
    assert!(in_time(&hub), "{:?}", hub.history);
    let (broken, hub) = judge(&scenario, Some(Mutation::ForgetOutbox));
    assert!(broken.is_some() || !in_time(&hub), "it was not noticed");
}

/// Invariant 2: a turn that comes later than it lasts, or answers an older request, is none: after an abort nobody under a
/// budget begins later than the turn lasts.
#[test]
fn a_turn_that_comes_too_late_is_none() {
    let mut scenario = update(6);
    scenario.budget = Some(Budget { groups: 1, max: 1 });
    scenario.delay = 3 * MINUTE;
    let mut noticed = 0;
    for step in 1..40 {
        let mut aborted = scenario.clone();
        aborted.seed = step;
        let at = APPLIED + 3 * MINUTE + step * 20 * SECOND;
        aborted.commands.push((at, 0, Command::Abort));
        let (broken, _) = judge(&aborted, None);
        assert_eq!(broken, None, "aborted at {at}");
        let (broken, _) = judge(&aborted, Some(Mutation::LateTurns));
        noticed += usize::from(broken.is_some_and(|rule| {
            rule.contains("long after it was taken back") || rule.contains("of a group switch")
        }));
    }
    assert!(noticed > 0, "nobody noticed");
}

/// Invariant 2 without a budget: nobody begins a release after it received a newer word.
#[test]
fn who_has_a_newer_word_begins_nothing_older() {
    let mut scenario = update(3);
    // Nobody can begin with the second release before there is a third.
    scenario.faults = vec![(APPLIED - MINUTE, Fault::RegistryOutage(20 * MINUTE))];
    scenario
        .commands
        .push((APPLIED + 10 * MINUTE, 0, Command::Apply(2)));
    let (broken, hub) = judge(&scenario, None);
    assert_eq!(broken, None);
    let second = release(&scenario, 1);
    let mut said = hub.store.devices.values().flat_map(|row| &row.reported);
    assert!(said.all(|said| {
        said.apps
            .iter()
            .all(|status| status.running != Some(second))
    }));
    let (broken, _) = judge(&scenario, Some(Mutation::PlanOldHeads));
    assert!(
        broken
            .as_ref()
            .is_some_and(|rule| rule.contains("its newest head says otherwise")),
        "noticed as {broken:?}"
    );
}

/// The same backup is restored twice, and the hub changes something in both lives: no version means two things, and once
/// they are released all devices obey.
#[test]
fn a_backup_that_is_restored_twice_gives_out_no_version_twice() {
    let mut scenario = update(4);
    let release_all = |at: Ms| (0..4).map(move |device| (at, 0, Command::Hold(device, false)));
    scenario.faults = vec![
        (2 * HOUR, Fault::Backup),
        (6 * HOUR, Fault::Restore(0, 2 * MINUTE)),
        (10 * HOUR, Fault::Restore(0, 2 * MINUTE)),
    ];
    scenario.commands.extend(release_all(7 * HOUR));
    scenario.commands.push((8 * HOUR, 0, Command::Apply(2)));
    scenario.commands.extend(release_all(11 * HOUR));
    scenario.commands.push((12 * HOUR, 0, Command::Apply(1)));
    let (broken, hub) = judge(&scenario, None);
    assert_eq!(broken, None);
    let newest: &Rollout = hub.store.rollouts.last().expect("there were some");
    assert_eq!(newest.state, RolloutState::Completed);
    let wanted = release(&scenario, 1);
    for row in hub.store.devices.values() {
        let said = row.reported.iter().flat_map(|reported| &reported.apps);
        let running: Vec<_> = said.map(|status| status.running).collect();
        assert_eq!(running, [Some(wanted)]);
    }
    let (broken, _) = judge(&scenario, Some(Mutation::CountEpochs));
    assert!(broken.is_some(), "it was not noticed");
    let (broken, _) = judge(&scenario, Some(Mutation::KeepEpoch));
    assert!(broken.is_some(), "it was not noticed");
}

/// A device is away while its hub takes an app from it, which the broker keeps for it. The hub is restored from a backup of
/// before, and the device has no more than that when it comes back; then it takes what the broker kept.
#[test]
fn who_takes_what_the_broker_had_kept_is_held_too() {
    let mut scenario = update(4);
    scenario.commands = vec![
        (10 * MINUTE, 0, Command::Apply(0)),
        (4 * HOUR, 0, Command::Leave(0)),
    ];
    scenario.faults = vec![
        (2 * HOUR, Fault::Backup),
        (3 * HOUR, Fault::LinkLoss(0, 5 * HOUR)),
        (6 * HOUR, Fault::Restore(0, 2 * MINUTE)),
    ];
    let (broken, hub) = judge(&scenario, None);
    assert_eq!(broken, None);
    // It was released in the end, and has what the backup says.
    let first = release(&scenario, 0);
    for row in hub.store.devices.values() {
        let said = row.reported.iter().flat_map(|reported| &reported.apps);
        let running: Vec<_> = said.map(|status| status.running).collect();
        assert_eq!(running, [Some(first)]);
    }
    let (broken, _) = judge(&scenario, Some(Mutation::CompareOnce));
    assert!(
        broken
            .as_ref()
            .is_some_and(|rule| rule.contains("has accepted")),
        "noticed as {broken:?}"
    );
}
