//! What the gates of [`Policy::analysis`](super::Policy::analysis) have said of a wave, and what follows from it.
//!
//! Who asks them is the controller's business. Each answer becomes a record of the wave, in a transaction like any other; so a crash
//! loses at most an answer that was on its way, and it is asked for again.

use foreshore_protocol::api::{RolloutState, WaveState};
use foreshore_protocol::manifest::Analysis;
use serde::{Deserialize, Serialize};

use super::state::{Rollout, Tick, Wave};

/// What a gate answers when it is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// The release is well.
    Pass,
    /// It is not.
    Fail,
    /// That cannot be told. What cannot be asked is this, never one of the others.
    Inconclusive,
}

/// What one gate has said of a wave so far.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Measured {
    /// How often it passed.
    pub passed: u32,
    /// How often it failed.
    pub failed: u32,
    /// How often it was neither.
    pub inconclusive: u32,
    /// When it is asked again. It also tells one question from the next.
    pub next: Tick,
    /// What it said last, for people.
    pub message: Option<String>,
}

/// Where a gate stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// It must be asked more often.
    Pending,
    /// It lets the wave go by.
    Passed,
    /// It has failed more often than it may.
    Failed,
    /// It has said nothing more often than it may.
    Inconclusive,
}

impl Measured {
    /// Not asked yet, and first asked one interval after `tick`.
    #[must_use]
    pub const fn fresh(interval_ms: u64, tick: Tick) -> Self {
        Self {
            passed: 0,
            failed: 0,
            inconclusive: 0,
            next: tick.plus(interval_ms),
            message: None,
        }
    }

    /// Where the gate stands. What failed is not outweighed by what could not be told.
    #[must_use]
    pub const fn standing(&self, gate: &Analysis) -> Standing {
        if self.failed > gate.failure_limit {
            Standing::Failed
        } else if self.inconclusive > gate.inconclusive_limit {
            Standing::Inconclusive
        } else if self.passed >= gate.count {
            Standing::Passed
        } else {
            Standing::Pending
        }
    }

    pub(super) fn take(&mut self, verdict: Verdict, next: Tick, message: String) {
        let count = match verdict {
            Verdict::Pass => &mut self.passed,
            Verdict::Fail => &mut self.failed,
            Verdict::Inconclusive => &mut self.inconclusive,
        };
        *count = count.saturating_add(1);
        self.next = next;
        self.message = Some(message);
    }
}

/// Records for all gates, none asked yet.
#[must_use]
pub fn fresh(gates: &[Analysis], tick: Tick) -> Vec<Measured> {
    let first = |gate: &Analysis| Measured::fresh(gate.interval_ms(), tick);
    gates.iter().map(first).collect()
}

/// Where a wave stands with all of its gates, and by which of them: failed before inconclusive before pending.
#[must_use]
pub fn stands(gates: &[Analysis], wave: &Wave) -> (Standing, usize) {
    let each = || {
        gates.iter().enumerate().map(|(index, gate)| {
            let record = wave.analysis.get(index);
            let standing = record.map_or(Standing::Pending, |record| record.standing(gate));
            (standing, index)
        })
    };
    [Standing::Failed, Standing::Inconclusive, Standing::Pending]
        .into_iter()
        .find_map(|wanted| each().find(|(standing, _)| *standing == wanted))
        .unwrap_or((Standing::Passed, 0))
}

/// A gate that is to be asked about a wave.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Question {
    /// Of which rollout.
    pub rollout: u64,
    /// About which wave, from 1.
    pub ordinal: u32,
    /// Which of the policy's gates, from 0.
    pub gate: usize,
    /// [`Measured::next`] when it was asked.
    pub asked: Tick,
}

/// The gates that are due at `tick`, and when the next is; only of waves that bake, while the rollout runs.
#[must_use]
pub fn due(rollout: &Rollout, tick: Tick) -> (Vec<Question>, Option<Tick>) {
    let (mut due, mut next) = (Vec::new(), None);
    if !is_asked(rollout) {
        return (due, next);
    }
    for (wave, ordinal) in rollout.waves.iter().zip(1_u32..) {
        if wave.state != WaveState::Baking {
            continue;
        }
        for (gate, record) in wave.analysis.iter().enumerate() {
            if record.next <= tick {
                due.push(Question {
                    rollout: rollout.id,
                    ordinal,
                    gate,
                    asked: record.next,
                });
            } else {
                next = Some(next.map_or(record.next, |next: Tick| next.min(record.next)));
            }
        }
    }
    (due, next)
}

/// Whether an answer to this question still counts.
#[must_use]
pub fn awaits(rollout: &Rollout, question: &Question) -> bool {
    let record = rollout
        .wave(question.ordinal)
        .filter(|wave| wave.state == WaveState::Baking)
        .and_then(|wave| wave.analysis.get(question.gate));
    rollout.id == question.rollout
        && is_asked(rollout)
        && record.is_some_and(|record| record.next == question.asked)
}

fn is_asked(rollout: &Rollout) -> bool {
    rollout.state == RolloutState::Running && !rollout.frozen
}

/// What a gate said, with its name: why the wave failed or the rollout pauses.
#[must_use]
pub fn message(rollout: &Rollout, ordinal: u32, gate: usize, what: &str) -> String {
    let name = rollout
        .policy
        .analysis
        .get(gate)
        .map_or("?", |gate| &gate.name);
    let record = rollout
        .wave(ordinal)
        .and_then(|wave| wave.analysis.get(gate));
    let said = record
        .and_then(|record| record.message.as_deref())
        .unwrap_or("nothing");
    format!("analysis {name} of wave {ordinal} {what}: {said}")
}
