//! When a wave is over, and whether it passed.

use foreshore_protocol::api::WaveState;

use super::analysis::{self, Standing};
use super::budget::Tally;
use super::state::{Approval, Rollout, Tick, Wave};

/// What a wave that was opened waits for, or what becomes of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gate {
    /// Devices are still to be offered the release, or have not ended.
    InProgress,
    /// Nobody in the rollout has succeeded yet, and all devices of this wave are put off: finishing
    /// nothing is not passing.
    NoCanary,
    /// Every device that tried failed. An all-failed wave never passes, however large the budget is.
    AllFailed,
    /// It waits until its last success is this old.
    Bake(Tick),
    /// Its bake was over then, but a gate of [`Policy::analysis`](super::Policy::analysis) has not passed often enough.
    Analysis(Tick),
    /// That gate failed.
    Unwell(usize),
    /// That gate cannot tell.
    Inconclusive(usize),
    /// It waits for an operator.
    Approval,
    /// Every gate is passed.
    Pass,
}

/// Looks at the gates of a wave that is open or bakes, at a time when no device of it is `Planned` because it
/// is offline (those were put off before).
#[must_use]
pub fn look(rollout: &Rollout, ordinal: u32, wave: &Wave, tick: Tick) -> Gate {
    // A device that was put off and returns during the bake joins the rollout's count, not the wave's: a
    // link that flaps must not hold the wave for ever.
    if wave.state == WaveState::AwaitingApproval {
        return baked(wave);
    }
    if wave.state == WaveState::Baking {
        return match (
            analysis::stands(&rollout.policy.analysis, wave),
            wave.bake_until,
        ) {
            ((Standing::Failed, gate), _) => Gate::Unwell(gate),
            ((Standing::Inconclusive, gate), _) => Gate::Inconclusive(gate),
            (_, Some(until)) if tick < until => Gate::Bake(until),
            ((Standing::Pending, _), until) => Gate::Analysis(until.unwrap_or(tick)),
            ((Standing::Passed, _), _) => baked(wave),
        };
    }
    let tally = Tally::of_wave(rollout, ordinal);
    if tally.planned > 0 || tally.in_progress > 0 {
        return Gate::InProgress;
    }
    match tally.last_success {
        Some(success) => {
            let bake_ms = wave.bake_ms.unwrap_or(rollout.policy.bake_ms);
            let until = success.plus(bake_ms);
            if tick < until {
                Gate::Bake(until)
            } else if !rollout.policy.analysis.is_empty() {
                Gate::Analysis(until)
            } else {
                baked(wave)
            }
        }
        None if tally.failed > 0 => Gate::AllFailed,
        None if tally.devices == 0 => Gate::Pass,
        // Every device is put off. Some earlier wave has shown that the release works.
        None if Tally::of(rollout).succeeded > 0 => baked(wave),
        None => Gate::NoCanary,
    }
}

/// What a wave waits for whose devices are done and whose bake is over.
const fn baked(wave: &Wave) -> Gate {
    match wave.approval {
        Approval::Needed => Gate::Approval,
        Approval::NotNeeded | Approval::Given => Gate::Pass,
    }
}
