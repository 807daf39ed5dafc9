//! What a device's report, silence or absence means for its assignment.
//!
//! Two kinds of facts are told apart. What a device *says* is taken in at any time, also while paused or just after
//! a restart of the hub. What follows from *time passing* (put off, silent, gone for good) is only concluded
//! while [`Patience`] runs.

use foreshore_protocol::DeviceId;
use foreshore_protocol::api::AssignmentState;
use foreshore_protocol::message::Phase;

use super::state::{Action, Assignment, Deferral, Facts, Placement, Report, Revert, Rollout, Tick};

/// Which conclusions from time passing may be drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Patience {
    /// The rollout's clock runs and the hub has listened long enough to know who is online.
    pub(super) runs: bool,
    /// The hub has listened for so long without a break that a device would have been heard.
    pub(super) silence_counts: bool,
}

/// What to record about one device; `None`: nothing new.
pub(super) fn observe(
    rollout: &Rollout,
    device: &DeviceId,
    assignment: &Assignment,
    facts: Option<&Facts>,
    tick: Tick,
    patience: Patience,
) -> Option<Action> {
    let Some(facts) = facts else {
        return (assignment.revert != Some(Revert::Gone)).then(|| Action::Reverted {
            device: device.clone(),
            revert: Revert::Gone,
            message: Some("it left the fleet or the app no longer selects it".to_owned()),
        });
    };
    let look = Look {
        rollout,
        device,
        assignment,
        facts,
        tick,
        patience,
    };
    match assignment.state {
        AssignmentState::Planned => None,
        AssignmentState::Reverted => look.reverted(),
        AssignmentState::Device(phase) if phase.is_final() => None,
        AssignmentState::Offered | AssignmentState::Device(_) => look.in_progress(),
        AssignmentState::Silent => look
            .ended()
            .map(|(phase, why)| look.record(phase, None, why)),
        AssignmentState::Deferred => look.deferred(),
    }
}

struct Look<'a> {
    rollout: &'a Rollout,
    device: &'a DeviceId,
    assignment: &'a Assignment,
    facts: &'a Facts,
    tick: Tick,
    patience: Patience,
}

impl Look<'_> {
    /// The device's report, if it is about what this rollout wrote last.
    fn report_on(&self, placement: &Placement) -> Option<&Report> {
        self.facts.report.as_ref().filter(|report| {
            Some(report.since) == self.assignment.since && report.release == placement.release
        })
    }

    fn offered(&self) -> Placement {
        self.rollout.offered(self.assignment)
    }

    /// How the device says it ended.
    fn ended(&self) -> Option<(Phase, Option<String>)> {
        self.report_on(&self.offered())
            .filter(|report| report.phase.is_final())
            .map(|report| (report.phase, report.reason.clone()))
    }

    fn overdue(&self) -> bool {
        self.assignment
            .deadline
            .is_some_and(|deadline| self.tick >= deadline)
    }

    fn in_progress(&self) -> Option<Action> {
        if let Some((phase, why)) = self.ended() {
            return Some(self.record(phase, None, why));
        }
        let report = self.report_on(&self.offered());
        let was_switching = match self.assignment.state {
            AssignmentState::Device(phase) => phase.is_switching(),
            AssignmentState::Planned
            | AssignmentState::Offered
            | AssignmentState::Silent
            | AssignmentState::Deferred
            | AssignmentState::Reverted => false,
        };
        let now_switching = report.is_some_and(|report| report.phase.is_switching());
        if was_switching {
            return self.switching(report.filter(|_| now_switching));
        }
        if let Some(report) = report.filter(|_| now_switching) {
            return Some(self.record(report.phase, Some(self.silent_at()), report.reason.clone()));
        }
        if self.has_lease() {
            return self.leased(report);
        }
        if !self.facts.online && self.patience.runs {
            return Some(self.put_off(Deferral::Offline, "it went offline before it began"));
        }
        if let Some(report) = report.filter(|report| report.phase == Phase::Waiting) {
            let news = self.assignment.state != AssignmentState::Device(Phase::Waiting)
                || self.assignment.deadline.is_some()
                || self.assignment.message != report.reason;
            return news.then(|| self.record(report.phase, None, report.reason.clone()));
        }
        if self.overdue() && self.patience.runs {
            let said = report.and_then(|report| report.reason.clone());
            let why = said.unwrap_or_else(|| "it has not begun in time".to_owned());
            return Some(self.put_off(Deferral::NotBegun, &why));
        }
        let report = report.filter(|report| is_preparing(report.phase))?;
        let news = self.assignment.state != AssignmentState::Device(report.phase)
            || (report.phase == Phase::Blocked && self.assignment.message != report.reason);
        news.then(|| {
            let waited = self.assignment.state == AssignmentState::Device(Phase::Waiting);
            let again = || self.tick.plus(self.rollout.policy.begin_within_ms);
            let deadline = self.assignment.deadline.filter(|_| !waited);
            let deadline = deadline.or_else(|| waited.then(again));
            self.record(report.phase, deadline, report.reason.clone())
        })
    }

    /// Whether it was given its turn in this assignment and has not given it back.
    fn has_lease(&self) -> bool {
        self.facts.leased.is_some() && self.facts.leased == self.assignment.since
    }

    /// It may begin to switch at any moment, or has: if it goes dark now, that is as if it did while switching.
    fn leased(&self, report: Option<&Report>) -> Option<Action> {
        if !self.assignment.has_lease() {
            let why = report.and_then(|report| report.reason.clone());
            return Some(self.record(Phase::Waiting, Some(self.silent_at()), why));
        }
        let dark = !self.facts.online && self.patience.runs && self.patience.silence_counts;
        (dark && self.overdue()).then(|| {
            let why = "it was given its turn to switch, and went dark";
            self.assign(AssignmentState::Silent, None, None, Some(why.to_owned()))
        })
    }

    /// It was seen switching. Only its end, or its silence beyond the deadline, changes more than the phase
    /// shown: a device that restarts and reports an earlier phase is still one that touched its containers,
    /// and neither that nor going from one switching phase to the next buys it more time.
    fn switching(&self, report: Option<&Report>) -> Option<Action> {
        if self.overdue() && self.patience.runs && self.patience.silence_counts {
            let why = if self.facts.online {
                "it did not end in time"
            } else {
                "it went dark while switching"
            };
            return Some(self.assign(AssignmentState::Silent, None, None, Some(why.to_owned())));
        }
        let report = report?;
        (self.assignment.state != AssignmentState::Device(report.phase)).then(|| {
            self.record(
                report.phase,
                self.assignment.deadline,
                report.reason.clone(),
            )
        })
    }

    fn deferred(&self) -> Option<Action> {
        if let Some((phase, why)) = self.ended() {
            return Some(self.record(phase, None, why));
        }
        if let Some(report) = self.report_on(&self.offered())
            && report.phase.is_switching()
        {
            return Some(self.record(report.phase, Some(self.silent_at()), report.reason.clone()));
        }
        if self.has_lease() {
            return self.leased(self.report_on(&self.offered()));
        }
        if let Some(report) = self.report_on(&self.offered())
            && report.phase == Phase::Waiting
            && self.facts.online
            && self.patience.runs
        {
            return Some(self.record(report.phase, None, report.reason.clone()));
        }
        let back = match self.assignment.deferral {
            Some(Deferral::Offline) | None => self.facts.online,
            Some(Deferral::Held) => !self.facts.held,
            Some(Deferral::NotBegun) => false,
        };
        if !back || !self.patience.runs {
            return None;
        }
        if self.assignment.since.is_none() {
            return Some(self.assign(AssignmentState::Planned, None, None, None));
        }
        let deadline = Some(self.tick.plus(self.rollout.policy.begin_within_ms));
        let report = self
            .report_on(&self.offered())
            .filter(|report| is_preparing(report.phase));
        Some(match report {
            Some(report) => self.record(report.phase, deadline, report.reason.clone()),
            None => self.assign(AssignmentState::Offered, None, deadline, None),
        })
    }

    fn reverted(&self) -> Option<Action> {
        let open = match self.assignment.revert {
            Some(Revert::Switching | Revert::Settling | Revert::Failed) => true,
            Some(Revert::Done | Revert::Gone) | None => false,
        };
        if !open {
            return None;
        }
        let end = self.revert_end()?;
        (self.assignment.revert != Some(end.0)).then(|| Action::Reverted {
            device: self.device.clone(),
            revert: end.0,
            message: end.1,
        })
    }

    fn revert_end(&self) -> Option<(Revert, Option<String>)> {
        let phase = match &self.assignment.previous {
            Some(previous) => self
                .report_on(previous)
                .map(|report| (report.phase, report.reason.clone())),
            None => {
                let stored =
                    self.assignment.since.is_some() && self.facts.version >= self.assignment.since;
                (stored && self.facts.report.is_none()).then_some((Phase::Succeeded, None))
            }
        };
        match phase {
            Some((Phase::Succeeded, _)) => Some((Revert::Done, None)),
            Some((Phase::Rejected | Phase::RolledBack | Phase::Failed, why)) => {
                Some((
                    Revert::Failed,
                    Some(why.unwrap_or_else(|| {
                        "it could not go back to its release of before".to_owned()
                    })),
                ))
            }
            // Others go first; that is no fault of its own, however long it takes.
            Some((Phase::Waiting, _)) => None,
            Some((
                Phase::Accepted
                | Phase::Staging
                | Phase::Blocked
                | Phase::Activating
                | Phase::Soaking
                | Phase::Removing,
                _,
            ))
            | None => (self.overdue()
                && self.facts.online
                && self.patience.runs
                && self.patience.silence_counts)
                .then(|| {
                    (
                        Revert::Failed,
                        Some("it did not go back in time".to_owned()),
                    )
                }),
        }
    }

    fn silent_at(&self) -> Tick {
        self.tick.plus(self.rollout.policy.silent_after_ms())
    }

    fn record(&self, phase: Phase, deadline: Option<Tick>, message: Option<String>) -> Action {
        if phase == Phase::Succeeded && self.assignment.via.is_some() {
            return Action::Stepped {
                device: self.device.clone(),
            };
        }
        self.assign(AssignmentState::Device(phase), None, deadline, message)
    }

    fn put_off(&self, deferral: Deferral, why: &str) -> Action {
        self.assign(
            AssignmentState::Deferred,
            Some(deferral),
            None,
            Some(why.to_owned()),
        )
    }

    fn assign(
        &self,
        state: AssignmentState,
        deferral: Option<Deferral>,
        deadline: Option<Tick>,
        message: Option<String>,
    ) -> Action {
        Action::Assign {
            device: self.device.clone(),
            state,
            deferral,
            deadline,
            message,
        }
    }
}

/// Whether a device in this phase has not touched its containers.
const fn is_preparing(phase: Phase) -> bool {
    match phase {
        Phase::Accepted | Phase::Staging | Phase::Blocked | Phase::Waiting => true,
        Phase::Rejected
        | Phase::Activating
        | Phase::Soaking
        | Phase::Succeeded
        | Phase::RolledBack
        | Phase::Failed
        | Phase::Removing => false,
    }
}
