//! What the records look like after an [`Action`]: one flat match that decides nothing.

use foreshore_protocol::api::{AssignmentState, RolloutState, WaveState};
use foreshore_protocol::manifest::Analysis;
use foreshore_protocol::{DeviceId, Version};

use super::analysis;
use super::state::{
    Action, Approval, Assignment, Deferral, Placement, Revert, Rollout, Tick, Touched, UnixMs,
    Wave, is_failure,
};

impl Rollout {
    /// Records an action. The caller commits the records it names in the same transaction as the writes that the
    /// action asks for. An action about a device or wave that the rollout does not have changes nothing.
    ///
    /// `written` is the version under which an `Offer` or `Restore` was written to the device's desired state; it is not looked at for the other actions.
    pub fn apply(&mut self, action: &Action, written: Option<Version>, now: UnixMs) -> Touched {
        let tick = self.clock.tick(now);
        match action {
            Action::Offer {
                device,
                placement,
                next,
            } => {
                let deadline = tick.plus(self.policy.begin_within_ms);
                let via = Some(placement.release).filter(|release| *release != self.to);
                let touched = self.change(device, tick, |assignment| {
                    assignment.via = via;
                    assignment.since = written;
                    assignment.deadline = Some(deadline);
                    assignment.enter(AssignmentState::Offered, None);
                    assignment.message = None;
                });
                match next {
                    Some(next) => {
                        self.next_offer = *next;
                        Touched::HeaderAndAssignment(device.clone())
                    }
                    None => touched,
                }
            }
            Action::Tail { device, anew } => {
                if let Some(previous) = anew {
                    self.join(device, *previous);
                }
                self.change(device, tick, |assignment| assignment.tail = true)
            }
            Action::StopTail { message } => {
                self.tail_stopped.clone_from(message);
                Touched::Header
            }
            Action::Approve { ordinal } => self.change_wave(*ordinal, |wave| {
                wave.approval = Approval::Given;
            }),
            Action::Restore { device, revert, .. } => {
                let patience = self
                    .policy
                    .begin_within_ms
                    .saturating_add(self.policy.silent_after_ms());
                self.change(device, tick, |assignment| {
                    assignment.since = written;
                    assignment.deadline = Some(tick.plus(patience));
                    assignment.revert = Some(*revert);
                    assignment.enter(AssignmentState::Reverted, None);
                })
            }
            Action::Stepped { device } => {
                let step = self
                    .assignments
                    .get(device)
                    .map(|assignment| self.offered(assignment));
                // Its part in the waves is over, and they are not waited for any more.
                let late = self.state == RolloutState::Completed;
                self.change(device, tick, |assignment| {
                    assignment.tail |= late;
                    assignment.previous = step;
                    assignment.via = None;
                    assignment.stepped = true;
                    assignment.since = None;
                    assignment.deadline = None;
                    assignment.message = None;
                    assignment.enter(AssignmentState::Planned, None);
                })
            }
            Action::Assign {
                device,
                state,
                deferral,
                deadline,
                message,
            } => {
                self.change(device, tick, |assignment| {
                    if *state == AssignmentState::Planned {
                        // It starts over; what it says of an earlier offer is not about the next one.
                        assignment.since = None;
                        assignment.via = None;
                    }
                    assignment.deadline = *deadline;
                    assignment.enter(*state, *deferral);
                    assignment.message.clone_from(message);
                })
            }
            Action::Reverted {
                device,
                revert,
                message,
            } => self.change(device, tick, |assignment| {
                assignment.deadline = None;
                assignment.revert = Some(*revert);
                // One that left is not part of the rollout any more, and neither is its failure.
                assignment.failed &= *revert != Revert::Gone;
                assignment.enter(AssignmentState::Reverted, None);
                if message.is_some() {
                    assignment.message.clone_from(message);
                }
            }),
            Action::Replace { out, into } => {
                self.replace(out, into);
                Touched::Assignments(out.clone(), into.clone())
            }
            Action::Wave {
                ordinal,
                state,
                bake_until,
            } => {
                let fresh = analysis::fresh(&self.policy.analysis, tick);
                self.change_wave(*ordinal, |wave| {
                    if *state == WaveState::Baking {
                        wave.analysis = fresh;
                    }
                    wave.state = *state;
                    wave.bake_until = *bake_until;
                })
            }
            Action::Measured {
                ordinal,
                gate,
                verdict,
                message,
            } => {
                let interval_ms = self
                    .policy
                    .analysis
                    .get(*gate)
                    .map_or(0, Analysis::interval_ms);
                self.change_wave(*ordinal, |wave| {
                    if let Some(record) = wave.analysis.get_mut(*gate) {
                        record.take(*verdict, tick.plus(interval_ms), message.clone());
                    }
                })
            }
            Action::MeasureAnew { ordinal } => {
                let fresh = analysis::fresh(&self.policy.analysis, tick);
                self.change_wave(*ordinal, |wave| wave.analysis = fresh)
            }
            Action::Enter {
                state,
                cause,
                message,
            } => {
                self.state = *state;
                self.cause = *cause;
                self.message.clone_from(message);
                self.finished = state.is_final().then_some(now);
                self.set_clock(now);
                Touched::Header
            }
            Action::Freeze => {
                self.frozen = true;
                self.set_clock(now);
                Touched::Header
            }
            Action::Thaw => {
                self.frozen = false;
                self.set_clock(now);
                Touched::Header
            }
        }
    }

    fn change(
        &mut self,
        device: &DeviceId,
        tick: Tick,
        change: impl FnOnce(&mut Assignment),
    ) -> Touched {
        self.assignments.change(device, |assignment| {
            let before = (assignment.state, assignment.revert);
            change(assignment);
            if before != (assignment.state, assignment.revert) {
                assignment.changed = tick;
            }
        });
        Touched::Assignment(device.clone())
    }

    fn change_wave(&mut self, ordinal: u32, change: impl FnOnce(&mut Wave)) -> Touched {
        let index = usize::try_from(ordinal)
            .ok()
            .and_then(|ordinal| ordinal.checked_sub(1));
        if let Some(wave) = index.and_then(|index| self.waves.get_mut(index)) {
            change(wave);
        }
        Touched::Wave(ordinal)
    }

    /// A device starts over: one that the rollout has keeps its place, a new one gets one behind all others.
    fn join(&mut self, device: &DeviceId, previous: Option<Placement>) {
        let (wave, rank, stratum) = match self.assignments.get(device) {
            Some(known) => (known.wave, known.rank, known.stratum),
            None => (0, self.assignments.next_rank(), 0),
        };
        let assignment = Assignment::planned(wave, rank, stratum, previous);
        self.assignments.insert(device, assignment);
    }

    /// Rank goes along with the wave, so that a wave stays a run of ranks.
    fn replace(&mut self, out: &DeviceId, into: &DeviceId) {
        let place = |rollout: &Self, device| {
            rollout
                .assignments
                .get(device)
                .map(|assignment| (assignment.wave, assignment.rank))
        };
        let (Some(first), Some(second)) = (place(self, out), place(self, into)) else {
            return;
        };
        for (device, (wave, rank)) in [(out, second), (into, first)] {
            self.assignments.change(device, |assignment| {
                assignment.wave = wave;
                assignment.rank = rank;
            });
        }
        // Its new wave may not be open, and offline is nothing to note before it is.
        self.assignments.change(out, |assignment| {
            assignment.enter(AssignmentState::Planned, None);
            assignment.message = None;
        });
    }

    /// It stands still while paused or frozen, and only then. Once the rollout is final it goes on, for those that
    /// come after the last wave.
    fn set_clock(&mut self, now: UnixMs) {
        let paused = matches!(
            self.state,
            RolloutState::Paused | RolloutState::RollbackPaused
        );
        if paused || (self.frozen && !self.state.is_final()) {
            self.clock.stop(now);
        } else {
            self.clock.go(now);
        }
    }
}

impl Assignment {
    fn enter(&mut self, state: AssignmentState, deferral: Option<Deferral>) {
        self.state = state;
        self.deferral = deferral;
        match state {
            // What it did before it was sent back stays on record.
            AssignmentState::Reverted => {}
            AssignmentState::Planned
            | AssignmentState::Offered
            | AssignmentState::Device(_)
            | AssignmentState::Silent
            | AssignmentState::Deferred => {
                self.failed = is_failure(state);
                self.revert = None::<Revert>;
            }
        }
    }
}
