//! Gates that ask: a wave passes by their answers and by nothing else, and no answer is never a good one.

use foreshore_protocol::manifest::{Analysis, RolloutPolicy};
use proptest::sample::select;
use serde_json::json;

use super::*;
use crate::rollout::analysis::{Question, Verdict, awaits, due};

fn gate(name: &str, [count, failures, doubts]: [u32; 3]) -> Analysis {
    serde_json::from_value(json!({
        "name": name, "webhook": {"url": "http://judge"}, "interval": "1s",
        "count": count, "failureLimit": failures, "inconclusiveLimit": doubts,
    }))
    .unwrap()
}

/// Five devices in two waves, the first of which bakes for two seconds.
fn baking(gates: Vec<Analysis>, on_failure: OnFailure) -> World {
    let policy = Policy {
        analysis: gates,
        on_failure,
        ..policy(vec![WaveTarget::Count(1)], 5)
    };
    let mut world = World::new(5, 7, policy);
    world.step();
    for device in world.offered() {
        world.say(&device, Phase::Succeeded);
    }
    world.step();
    assert_eq!(world.wave_states(), [WaveState::Baking, WaveState::Pending]);
    world
}

fn questions(world: &World) -> Vec<Question> {
    due(&world.rollout, world.rollout.clock.tick(world.now)).0
}

/// What the controller does with an answer.
fn answer(world: &mut World, question: &Question, verdict: Verdict) -> bool {
    let counts = awaits(&world.rollout, question);
    if counts {
        world.commit(&Action::Measured {
            ordinal: question.ordinal,
            gate: question.gate,
            verdict,
            message: format!("it is {verdict:?}"),
        });
        world.step();
    }
    counts
}

fn answer_all(world: &mut World, verdict: Verdict) {
    for question in questions(world) {
        answer(world, &question, verdict);
    }
}

#[test]
fn a_wave_waits_for_every_gate_however_long_its_bake_is_over() {
    let gates = vec![gate("errors", [2, 0, 3]), gate("latency", [1, 0, 3])];
    let mut world = baking(gates, OnFailure::Rollback);
    assert_eq!(questions(&world), [], "not before the first interval");
    world.pass(1_000);
    answer_all(&mut world, Verdict::Pass);
    world.pass(3_600_000);
    world.step();
    assert_eq!(
        world.wave_states()[0],
        WaveState::Baking,
        "one must pass twice"
    );
    // A restart loses nothing: this is all there is.
    let stored = serde_json::to_vec(&world.rollout).unwrap();
    world.rollout = serde_json::from_slice(&stored).unwrap();
    answer_all(&mut world, Verdict::Pass);
    assert_eq!(world.wave_states(), [WaveState::Passed, WaveState::Open]);
    assert_eq!(
        questions(&world),
        [],
        "only waves that bake are asked about"
    );
}

#[test]
fn passing_early_shortens_no_bake() {
    let mut world = baking(vec![gate("errors", [1, 0, 3])], OnFailure::Rollback);
    world.pass(1_000);
    answer_all(&mut world, Verdict::Pass);
    assert_eq!(world.wave_states()[0], WaveState::Baking);
    // It is asked on, and what it says later counts.
    world.pass(999);
    assert_eq!(questions(&world), []);
    world.pass(1);
    let asked = questions(&world);
    assert_eq!(asked.len(), 1);
    answer(&mut world, &asked[0], Verdict::Fail);
    assert_eq!(world.rollout.state, RolloutState::RollingBack);
}

#[test]
fn a_gate_that_fails_fails_the_wave_at_once() {
    let mut world = baking(vec![gate("errors", [1, 1, 0])], OnFailure::Rollback);
    world.pass(1_000);
    answer_all(&mut world, Verdict::Fail);
    assert_eq!(world.wave_states()[0], WaveState::Baking, "one is allowed");
    world.pass(1_000);
    answer_all(&mut world, Verdict::Fail);
    assert_eq!(world.wave_states(), [WaveState::Failed, WaveState::Pending]);
    let rollout = &world.rollout;
    assert_eq!(
        (rollout.state, rollout.cause),
        (RolloutState::RollingBack, Some(Cause::Analysis))
    );
    let message = rollout.message.as_deref();
    assert_eq!(
        message,
        Some("analysis errors of wave 1 failed: it is Fail")
    );
}

#[test]
fn a_failed_wave_that_is_resumed_is_asked_about_anew() {
    let mut world = baking(vec![gate("errors", [1, 0, 0])], OnFailure::Pause);
    world.pass(1_000);
    answer_all(&mut world, Verdict::Fail);
    assert_eq!(world.rollout.state, RolloutState::Paused);
    assert_eq!(questions(&world), []);
    world.pass(60_000);
    world.command(command::resume(&world.rollout));
    world.step();
    assert_eq!(
        world.wave_states()[0],
        WaveState::Baking,
        "not passed by the time alone"
    );
    assert_eq!(questions(&world), []);
    world.pass(1_000);
    answer_all(&mut world, Verdict::Pass);
    assert_eq!(world.wave_states()[0], WaveState::Passed);
}

#[test]
fn doubts_pause_whatever_a_failure_would_do_and_resuming_asks_again() {
    for on_failure in [OnFailure::Rollback, OnFailure::Pause] {
        let mut world = baking(vec![gate("errors", [1, 0, 1])], on_failure);
        world.pass(1_000);
        answer_all(&mut world, Verdict::Inconclusive);
        assert_eq!(world.rollout.state, RolloutState::Running);
        world.pass(1_000);
        let late = questions(&world).remove(0);
        answer(&mut world, &late, Verdict::Inconclusive);
        let rollout = &world.rollout;
        assert_eq!(
            (rollout.state, rollout.cause),
            (RolloutState::Paused, Some(Cause::Inconclusive))
        );
        assert_eq!(world.wave_states()[0], WaveState::Baking);
        assert!(!answer(&mut world, &late, Verdict::Pass), "nobody waits");
        world.pass(3_600_000);
        world.command(command::resume(&world.rollout));
        world.step();
        assert_eq!(world.rollout.state, RolloutState::Running);
        assert!(
            !answer(&mut world, &late, Verdict::Pass),
            "what was asked before the pause is not an answer"
        );
        world.pass(1_000);
        answer_all(&mut world, Verdict::Pass);
        assert_eq!(world.wave_states()[0], WaveState::Passed);
    }
}

#[test]
fn nobody_is_asked_while_the_clock_stands() {
    let mut world = baking(vec![gate("errors", [1, 0, 0])], OnFailure::Rollback);
    world.command(command::pause(&world.rollout));
    world.pass(3_600_000);
    assert_eq!(questions(&world), []);
    world.command(command::resume(&world.rollout));
    assert_eq!(questions(&world), [], "the interval goes on where it stood");
    world.pass(1_000);
    let asked = questions(&world).remove(0);
    for one in world.devices.values_mut() {
        one.offline = true;
    }
    world.step();
    assert!(world.rollout.frozen);
    assert_eq!(questions(&world), []);
    assert!(
        !answer(&mut world, &asked, Verdict::Fail),
        "the network may be why"
    );
}

#[test]
fn an_approval_comes_after_the_gates_and_an_emergency_has_none() {
    let spec = json!({"waves": [{"count": 1, "approval": true}], "bake": "0s", "analysis": [gate("errors", [1, 0, 0])]});
    let mut manifest: RolloutPolicy = serde_json::from_value(spec).unwrap();
    let mut world = World::new(3, 7, Policy::freeze(&manifest, 3));
    world.step();
    for device in world.offered() {
        world.say(&device, Phase::Succeeded);
    }
    world.step();
    assert_eq!(world.wave_states()[0], WaveState::Baking);
    world.pass(1_000);
    answer_all(&mut world, Verdict::Pass);
    assert_eq!(world.wave_states()[0], WaveState::AwaitingApproval);
    manifest.emergency = true;
    assert_eq!(Policy::freeze(&manifest, 3).analysis, []);
}

#[test]
fn a_wave_that_is_all_put_off_is_asked_nothing() {
    let policy = Policy {
        analysis: vec![gate("errors", [1, 0, 0])],
        ..policy(vec![WaveTarget::Count(1), WaveTarget::Count(2)], 3)
    };
    let mut world = World::new(3, 7, policy);
    world.step();
    for device in world.in_wave(1) {
        world.say(&device, Phase::Succeeded);
    }
    world.step();
    let second = world.in_wave(2).remove(0);
    world.devices.get_mut(&second).unwrap().offline = true;
    world.pass(2_000);
    answer_all(&mut world, Verdict::Pass);
    assert_eq!(
        world.wave_states()[..2],
        [WaveState::Passed, WaveState::Passed]
    );
}

proptest! {
    /// The checks of every step say that a wave passes only through its gates and that nothing else stops the rollout.
    #[test]
    fn whatever_is_answered_the_rules_hold(
        limits in prop::collection::vec([1_u32..3, 0_u32..3, 0_u32..3], 1..4),
        answers in prop::collection::vec(
            (any::<usize>(), select(vec![Verdict::Pass, Verdict::Pass, Verdict::Fail, Verdict::Inconclusive]), 0_u64..3_000, any::<bool>()),
            0..60,
        ),
        roll_back in any::<bool>(),
    ) {
        let gates: Vec<Analysis> = limits
            .into_iter()
            .enumerate()
            .map(|(number, limits)| gate(&format!("gate-{number}"), limits))
            .collect();
        let on_failure = if roll_back { OnFailure::Rollback } else { OnFailure::Pause };
        let mut world = baking(gates.clone(), on_failure);
        for (which, verdict, ms, resumes) in answers {
            world.pass(ms);
            for device in world.offered() {
                world.say(&device, Phase::Succeeded);
            }
            world.step();
            let asked = questions(&world);
            if !asked.is_empty() {
                answer(&mut world, &asked[which % asked.len()], verdict);
            }
            if world.rollout.state == RolloutState::Paused && resumes {
                world.command(command::resume(&world.rollout));
                world.step();
            }
            for wave in &world.rollout.waves {
                if wave.state == WaveState::Passed {
                    for (gate, said) in gates.iter().zip(&wave.analysis) {
                        prop_assert!(said.passed >= gate.count && said.failed <= gate.failure_limit);
                        prop_assert!(said.inconclusive <= gate.inconclusive_limit);
                    }
                    prop_assert_eq!(wave.analysis.len(), gates.len());
                }
            }
        }
        // With good answers only it comes to an end; also on the way back, for which devices may have been silent for too long.
        for _ in 0..200 {
            if matches!(world.rollout.state, RolloutState::Paused | RolloutState::RollbackPaused) {
                world.command(command::resume(&world.rollout));
            }
            for device in world.offered() {
                world.say(&device, Phase::Succeeded);
            }
            for device in world.in_state(|state| state == AssignmentState::Reverted) {
                world.say(&device, Phase::Succeeded);
            }
            world.step();
            answer_all(&mut world, Verdict::Pass);
            world.pass(1_000);
        }
        prop_assert!(world.rollout.state.is_final(), "{:?}", world.rollout.state);
    }
}
