//! Gates that are asked while a wave bakes: what `hub/src/controller/analysis.rs` does, with answers that are made up.

use foreshore_hub::rollout::analysis::{Question, Verdict, awaits, due};
use foreshore_hub::rollout::{Action, Rollout};
use foreshore_protocol::api::WaveState;

use super::{Hub, START, unix};
use crate::mutation::Mutation;
use crate::scenario::Ms;

/// For the rules only: how often a gate really answered what of a wave, since it began to bake or was asked anew.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Said {
    passed: u32,
    failed: u32,
    inconclusive: u32,
}

impl Hub {
    /// Asks what is due.
    pub(super) fn ask_gates(&mut self, now: Ms) {
        for index in 0..self.store.rollouts.len() {
            let rollout = &self.store.rollouts[index];
            if rollout.policy.analysis.is_empty() || !self.is_newest(index) {
                continue;
            }
            let (questions, next) = due(rollout, rollout.clock.tick(unix(now)));
            let next = next.map(|tick| rollout.clock.unix(tick));
            let next = next.map(|at| at.0.saturating_sub(START).max(now + 1));
            self.wake_at = [self.wake_at, next].into_iter().flatten().min();
            for question in questions {
                if self.under_way.insert(question.clone()) {
                    self.questions.push(question);
                }
            }
        }
    }

    /// A gate answers.
    pub fn answer(&mut self, question: &Question, verdict: Verdict, now: Ms) {
        self.under_way.remove(question);
        let mut rollouts = self.store.rollouts.iter();
        let index = rollouts.position(|rollout| awaits(rollout, question));
        if let Some(index) = index {
            let key = (question.rollout, question.ordinal, question.gate);
            let said = self.store.said.entry(key).or_default();
            match verdict {
                Verdict::Pass => said.passed += 1,
                Verdict::Fail => said.failed += 1,
                Verdict::Inconclusive => said.inconclusive += 1,
            }
            let doubt_passes = self.mutation == Some(Mutation::DoubtIsPass);
            let verdict = match verdict {
                Verdict::Inconclusive if doubt_passes => Verdict::Pass,
                said => said,
            };
            let measured = Action::Measured {
                ordinal: question.ordinal,
                gate: question.gate,
                verdict,
                message: format!("{verdict:?}"),
            };
            self.act(index, &measured, None, now);
            self.check_rollout(index);
        }
        self.advance(now);
    }

    /// A wave that baked passes only when each gate has really said so, and not doubted or failed too often.
    pub(super) fn check_said(&mut self, index: usize, action: &Action) {
        let rollout = &self.store.rollouts[index];
        let id = rollout.id;
        match action {
            Action::MeasureAnew { ordinal }
            | Action::Wave {
                ordinal,
                state: WaveState::Baking,
                ..
            } => self
                .store
                .said
                .retain(|(rollout, wave, _), _| (*rollout, wave) != (id, ordinal)),
            Action::Wave {
                ordinal,
                state: WaveState::Passed | WaveState::AwaitingApproval,
                ..
            } if bakes(rollout, *ordinal) => {
                let said = |gate| self.store.said.get(&(id, *ordinal, gate));
                let gates = rollout.policy.analysis.iter().enumerate();
                let mut answers = gates.map(|(number, gate)| (gate, said(number).copied()));
                let missing = answers.find(|(gate, said)| {
                    let said = said.unwrap_or_default();
                    said.passed < gate.count
                        || said.failed > gate.failure_limit
                        || said.inconclusive > gate.inconclusive_limit
                });
                let wrong = missing.map(|(gate, said)| {
                    let name = &gate.name;
                    format!(
                        "rollout {id}: wave {ordinal} passed although analysis {name} said {said:?}"
                    )
                });
                self.violations.extend(wrong);
            }
            _ => {}
        }
    }
}

fn bakes(rollout: &Rollout, ordinal: u32) -> bool {
    let wave = rollout.wave(ordinal);
    wave.is_some_and(|wave| wave.state == WaveState::Baking)
}
