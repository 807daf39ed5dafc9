//! Applying actions to a rollout and taking them back, so that one look can decide step by step on what the records
//! will look like, without a copy of all of them.

use std::ops::Deref;

use foreshore_protocol::DeviceId;
use foreshore_protocol::api::RolloutState;

use super::assignments::Assignments;
use super::state::{Action, Assignment, Cause, Clock, Rollout, Tick, UnixMs, Wave};

/// A rollout with actions applied that are taken back when this is dropped.
pub(super) struct Trial<'a> {
    rollout: &'a mut Rollout,
    before: Vec<Before>,
}

/// A record as it was.
enum Before {
    Header(Box<Header>),
    Wave(usize, Wave),
    Assignment(DeviceId, Option<Assignment>),
}

/// The fields of a rollout that actions change.
struct Header {
    state: RolloutState,
    cause: Option<Cause>,
    message: Option<String>,
    frozen: bool,
    clock: Clock,
    next_offer: Tick,
    tail_stopped: Option<String>,
    finished: Option<UnixMs>,
}

impl<'a> Trial<'a> {
    pub(super) const fn of(rollout: &'a mut Rollout) -> Self {
        Self {
            rollout,
            before: Vec::new(),
        }
    }

    /// Applies an action; nothing is written for it yet.
    pub(super) fn apply(&mut self, action: &Action, now: UnixMs) {
        self.note(action);
        self.rollout.apply(action, None, now);
    }

    /// What is derived from the assignments and remembered with them; that is not taken back.
    pub(super) const fn assignments(&mut self) -> &mut Assignments {
        &mut self.rollout.assignments
    }

    fn note(&mut self, action: &Action) {
        match action {
            Action::Offer { device, next, .. } => {
                if next.is_some() {
                    self.note_header();
                }
                self.note_assignment(device);
            }
            Action::Restore { device, .. }
            | Action::Assign { device, .. }
            | Action::Stepped { device }
            | Action::Reverted { device, .. }
            | Action::Tail { device, .. } => self.note_assignment(device),
            Action::Replace { out, into } => {
                self.note_assignment(out);
                self.note_assignment(into);
            }
            Action::Wave { ordinal, .. }
            | Action::Approve { ordinal }
            | Action::Measured { ordinal, .. }
            | Action::MeasureAnew { ordinal } => {
                let index = usize::try_from(*ordinal)
                    .ok()
                    .and_then(|o| o.checked_sub(1));
                let wave = index.and_then(|at| Some((at, self.rollout.waves.get(at)?.clone())));
                self.before
                    .extend(wave.map(|(at, wave)| Before::Wave(at, wave)));
            }
            Action::StopTail { .. } | Action::Enter { .. } | Action::Freeze | Action::Thaw => {
                self.note_header();
            }
        }
    }

    fn note_assignment(&mut self, device: &DeviceId) {
        let known = self.rollout.assignments.get(device).cloned();
        self.before.push(Before::Assignment(device.clone(), known));
    }

    fn note_header(&mut self) {
        let Rollout {
            state,
            cause,
            ref message,
            frozen,
            clock,
            next_offer,
            ref tail_stopped,
            finished,
            ..
        } = *self.rollout;
        self.before.push(Before::Header(Box::new(Header {
            state,
            cause,
            message: message.clone(),
            frozen,
            clock,
            next_offer,
            tail_stopped: tail_stopped.clone(),
            finished,
        })));
    }
}

impl Deref for Trial<'_> {
    type Target = Rollout;

    fn deref(&self) -> &Rollout {
        self.rollout
    }
}

impl Drop for Trial<'_> {
    fn drop(&mut self) {
        while let Some(before) = self.before.pop() {
            match before {
                Before::Header(header) => {
                    let rollout = &mut *self.rollout;
                    rollout.state = header.state;
                    rollout.cause = header.cause;
                    rollout.message = header.message;
                    rollout.frozen = header.frozen;
                    rollout.clock = header.clock;
                    rollout.next_offer = header.next_offer;
                    rollout.tail_stopped = header.tail_stopped;
                    rollout.finished = header.finished;
                }
                Before::Wave(at, wave) => {
                    if let Some(known) = self.rollout.waves.get_mut(at) {
                        *known = wave;
                    }
                }
                Before::Assignment(device, Some(assignment)) => {
                    self.rollout.assignments.insert(&device, assignment);
                }
                Before::Assignment(device, None) => self.rollout.assignments.remove(&device),
            }
        }
    }
}
