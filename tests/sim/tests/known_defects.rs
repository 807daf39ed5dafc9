//! What well-known systems get wrong, played here: each scenario passes, and fails when that defect is built in.
//!
//! Which system, and where that is seen, is told at each; the claims are about what devices were really given.

use foreshore_hub::rollout::Rollout;
use foreshore_protocol::api::{AssignmentState, RolloutState};
use foreshore_protocol::manifest::{
    Amount, FailureBudget, Pace, RolloutPolicy, Tail, WaveSpec, WaveTarget,
};
use foreshore_protocol::quantity::Span;
use foreshore_protocol::{DeviceId, Digest};
use foreshore_sim::hub::Hub;
use foreshore_sim::mutation::Mutation;
use foreshore_sim::scenario::{Budget, Command, Fate, Fault, HOUR, MINUTE, Ms, SECOND, Scenario};
use foreshore_sim::simulation::play;

/// When the release of that the scenario is about is applied; the one before it is everywhere by then.
const APPLIED: Ms = 4 * HOUR;

fn policy() -> RolloutPolicy {
    RolloutPolicy {
        waves: vec![WaveSpec::from(WaveTarget::Percent(100))],
        soak: Span::from_secs(5),
        bake: Span::from_secs(0),
        progress_deadline: Span::from_secs(60),
        max_unavailable: Amount::Percent(100),
        ..RolloutPolicy::default()
    }
}

fn one_by_one() -> RolloutPolicy {
    RolloutPolicy {
        max_unavailable: Amount::Count(1),
        ..policy()
    }
}

/// A good release everywhere, and one with this fate.
fn update(devices: usize, fate: Fate, policy: RolloutPolicy) -> Scenario {
    let mut scenario = Scenario::calm(devices, usize::MAX, &[Fate::Good, fate], policy);
    scenario.commands = vec![
        (10 * MINUTE, 0, Command::Apply(0)),
        (APPLIED, 0, Command::Apply(1)),
    ];
    scenario
}

fn release(scenario: &Scenario, number: usize) -> Digest {
    scenario.apps[0].releases[number].digest()
}

/// Who was given the release of that number, and when.
fn given<'h>(hub: &'h Hub, scenario: &Scenario, number: usize) -> Vec<(Ms, &'h DeviceId)> {
    let release = release(scenario, number);
    let writes = hub.writes.iter();
    writes
        .filter(|(_, _, written)| *written == Some(release))
        .map(|(at, device, _)| (*at, device))
        .collect()
}

/// Who is given the second release at which place, while nothing goes wrong: for faults that are to meet them.
fn nth(scenario: &Scenario, place: usize) -> (Ms, usize) {
    let (_, hub) = play(scenario.clone(), None, false);
    let (at, device) = given(&hub, scenario, 1)[place];
    let number = scenario.devices.iter().position(|id| id == device);
    (at, number.expect("it is one of them"))
}

fn rollout(hub: &Hub, number: usize) -> &Rollout {
    &hub.store.rollouts[number]
}

/// The claim holds of the code that ships, and no rule is broken; with the defect built in one of both fails.
fn hold(scenario: &Scenario, defect: Mutation, claim: impl Fn(&Hub) -> Result<(), String>) {
    let judge = |mutation| {
        let (outcome, hub) = play(scenario.clone(), mutation, false);
        match outcome.violations.first() {
            Some(violation) => Err(violation.clone()),
            None => claim(&hub),
        }
    };
    if let Err(problem) = judge(None) {
        let (outcome, _) = play(scenario.clone(), None, true);
        panic!("{problem}\n{}", outcome.log.join("\n"));
    }
    assert!(
        judge(Some(defect)).is_err(),
        "{defect:?} does what the claim forbids and was not noticed"
    );
}

fn require(holds: bool, problem: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(problem()) }
}

/// Bottlerocket computes the time of a device within a wave from its absolute seed, so that whole parts of the fleet are
/// due at the very moment at which a wave ends.
#[test]
fn jitter_from_an_absolute_seed() {
    let paced = RolloutPolicy {
        pace: Some(Pace {
            per_minute: 6,
            double_every: None,
            max_per_minute: None,
        }),
        ..policy()
    };
    let scenario = update(30, Fate::Good, paced);
    hold(&scenario, Mutation::IgnorePace, |hub| {
        let given = given(hub, &scenario, 1);
        require(given.len() == 30, || {
            format!("{} were given it", given.len())
        })?;
        let crowded = given.iter().find(|(at, _)| {
            given
                .iter()
                .filter(|(other, _)| (*at..*at + 10 * SECOND).contains(other))
                .count()
                > 2
        });
        require(crowded.is_none(), || {
            format!("more than two within 10 s at {crowded:?}")
        })?;
        let last = given.last().map_or(0, |(at, _)| *at);
        require(last < APPLIED + 6 * MINUTE, || {
            format!("the last at {last}")
        })
    });
}

/// flightctl counts only connected devices as unavailable: one that drops while it switches gives its slot away.
#[test]
fn a_disconnect_frees_a_budget_slot() {
    let slow = RolloutPolicy {
        soak: Span::from_secs(3600),
        ..policy()
    };
    let mut scenario = update(6, Fate::Good, slow);
    scenario.budget = Some(Budget { groups: 1, max: 1 });
    let (at, device) = nth(&scenario, 0);
    scenario.faults = (0..6)
        .filter(|number| *number == device || *number % 3 == 0)
        .map(|number| (at + 30 * MINUTE, Fault::LinkLoss(number, 4 * HOUR)))
        .collect();
    hold(&scenario, Mutation::FreeWhenDark, |hub| {
        let state = rollout(hub, 1).state;
        require(state == RolloutState::Completed, || format!("{state:?}"))
    });
}

/// Swarm keeps the number of failed tasks in a variable of the running update: a change of managers forgets it.
#[test]
fn counters_lost_on_a_restart() {
    let strict = RolloutPolicy {
        failure_budget: FailureBudget {
            count: 2,
            percent: 100,
            min_sample: 100,
        },
        ..one_by_one()
    };
    let mut scenario = update(8, Fate::NeverReady, strict);
    // The second is given it when the first has failed.
    let (at, _) = nth(&scenario, 1);
    scenario.faults = vec![(at + 5 * SECOND, Fault::HubCrash(10 * SECOND))];
    hold(&scenario, Mutation::ForgetFailures, |hub| {
        let given = given(hub, &scenario, 1).len();
        require(given == 2, || format!("{given} were given it"))?;
        let state = rollout(hub, 1).state;
        require(state == RolloutState::RolledBack, || format!("{state:?}"))
    });
}

/// hawkBit opens the next group when the one before is completed, also when all of it failed; flightctl approves a batch
/// without a single report.
#[test]
fn finished_is_read_as_good() {
    let waves = RolloutPolicy {
        waves: [WaveTarget::Count(2), WaveTarget::Percent(100)]
            .into_iter()
            .map(WaveSpec::from)
            .collect(),
        failure_budget: FailureBudget {
            count: 5,
            percent: 100,
            min_sample: 100,
        },
        ..policy()
    };
    let scenario = update(8, Fate::NeverReady, waves);
    hold(&scenario, Mutation::FinishedIsGood, |hub| {
        let given = given(hub, &scenario, 1).len();
        require(given == 2, || format!("{given} were given it"))
    });
}

/// hawkBit waits for ever for a device that was bricked by the update (its issue 693).
#[test]
fn silence_is_not_failure() {
    let slow = RolloutPolicy {
        waves: [WaveTarget::Count(1), WaveTarget::Percent(100)]
            .into_iter()
            .map(WaveSpec::from)
            .collect(),
        soak: Span::from_secs(3600),
        ..policy()
    };
    let mut scenario = update(6, Fate::Good, slow);
    let (at, device) = nth(&scenario, 0);
    scenario.faults = vec![(at + 30 * MINUTE, Fault::PowerCut(device, 15 * HOUR))];
    hold(&scenario, Mutation::SilenceIsFine, |hub| {
        let stopped = hub
            .history
            .iter()
            .find(|(_, id, state)| *id == 2 && *state == RolloutState::RollingBack);
        let (when, ..) = stopped.ok_or("nothing came of a device that never spoke again")?;
        require(*when < at + 4 * HOUR, || format!("only at {when}"))?;
        let given = given(hub, &scenario, 1).len();
        require(given == 1, || format!("{given} were given it"))
    });
}

/// Nomad reads a registry outage as a bad release, whose revert then fails for the same reason (its issue 12940).
#[test]
fn a_registry_outage_is_read_as_a_bad_release() {
    let mut scenario = update(6, Fate::Good, policy());
    scenario.faults = vec![(APPLIED - MINUTE, Fault::RegistryOutage(3 * HOUR))];
    hold(&scenario, Mutation::OfflineIsFailure, |hub| {
        let rollout = rollout(hub, 1);
        require(rollout.state == RolloutState::Completed, || {
            format!("{:?}: {:?}", rollout.state, rollout.message)
        })?;
        let failed = rollout
            .assignments
            .values()
            .filter(|one| one.failed)
            .count();
        require(failed == 0, || format!("{failed} failed"))?;
        let given = given(hub, &scenario, 0).len();
        require(given == 6, || {
            format!("the old release was given {given} times")
        })
    });
}

/// AWS IoT's continuous jobs reach devices that join later at once, outside of the rate and the abort criteria.
#[test]
fn late_joiners_skip_the_brakes() {
    let tail = Tail {
        pace: Pace {
            per_minute: 60,
            double_every: None,
            max_per_minute: None,
        },
        failure_budget: FailureBudget {
            count: 2,
            percent: 100,
            min_sample: 100,
        },
    };
    let policy = RolloutPolicy {
        tail,
        ..one_by_one()
    };
    let fates = [Fate::NeverReady];
    let mut scenario = Scenario::calm(10, 2, &fates, policy);
    // Well on the first two, and on none of the others.
    for (fate, percent) in scenario.apps[0].fates.values_mut() {
        (*fate, *percent) = (Fate::NeverReady, 80);
    }
    let image = *scenario.apps[0].fates.keys().next().expect("one image");
    let fits = |scenario: &Scenario| {
        (0..10).all(|device| (scenario.fate(&image, device) == Fate::Good) == (device < 2))
    };
    while !fits(&scenario) {
        scenario.seed += 1;
    }
    scenario.commands = vec![(10 * MINUTE, 0, Command::Apply(0))];
    let joins = (2..10).map(|device| (APPLIED, 0, Command::Join(device)));
    scenario.commands.extend(joins);
    hold(&scenario, Mutation::IgnoreTailBudget, |hub| {
        let given = given(hub, &scenario, 0).len();
        require(given == 2 + 2, || format!("{given} were given it"))?;
        let stopped = rollout(hub, 0).tail_stopped.is_some();
        require(stopped, || "nothing stopped it".to_owned())
    });
}

/// After an abort Argo Rollouts leaves the new version in the specification: whatever wakes it goes there again.
#[test]
fn an_abort_leaves_intent() {
    let mut scenario = update(6, Fate::Good, policy());
    // Offered to all, and nobody can begin.
    scenario.faults = vec![(APPLIED - MINUTE, Fault::RegistryOutage(3 * HOUR))];
    scenario
        .commands
        .push((APPLIED + 5 * MINUTE, 0, Command::Abort));
    scenario.commands.push((APPLIED + HOUR, 0, Command::Resume));
    scenario.commands.push((APPLIED + HOUR, 0, Command::Retry));
    hold(&scenario, Mutation::AbortKeepsIntent, |hub| {
        let before = release(&scenario, 0);
        let elsewhere = hub.store.devices.iter().find(|(_, row)| {
            let mut placed = row.desired.values().map(|(placement, _)| placement.release);
            placed.any(|release| release != before)
        });
        require(elsewhere.is_none(), || format!("{elsewhere:?}"))?;
        let state = rollout(hub, 1).state;
        require(state == RolloutState::Aborted, || format!("{state:?}"))?;
        let kept = rollout(hub, 1)
            .assignments
            .values()
            .all(|one| one.state != AssignmentState::Offered);
        require(kept, || "an offer stands".to_owned())
    });
}

/// A broker loses a part of what it retains (mosquitto gave a subscriber 28,000 of 100,000 messages), and acknowledges what
/// nobody receives.
#[test]
fn a_broker_s_snapshot_is_taken_for_the_truth() {
    let mut scenario = update(6, Fate::Good, policy());
    scenario.faults = vec![
        (APPLIED + 1, Fault::BrokerOutage(10 * MINUTE)),
        (APPLIED + 2, Fault::HubCrash(MINUTE)),
        (APPLIED + 5 * MINUTE, Fault::HubCrash(MINUTE)),
        (APPLIED + 10 * MINUTE + SECOND, Fault::WipeRetained),
    ];
    hold(&scenario, Mutation::ForgetOutbox, |hub| {
        let after = release(&scenario, 1);
        let reached = hub.store.devices.values().filter(|row| {
            let reports = row.reported.iter().flat_map(|reported| &reported.apps);
            reports
                .filter(|status| status.running == Some(after))
                .count()
                == 1
        });
        let reached = reached.count();
        require(reached == 6, || format!("{reached} of 6 run it"))
    });
}
