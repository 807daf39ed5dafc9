//! What a rollout has cost so far, counted from its assignments, and when that is too much.
//!
//! Nothing of this is stored: a counter that is stored beside what it counts is wrong after the first crash.
//! [`super::assignments`] keeps the counts while a rollout is in memory.

use foreshore_protocol::api::AssignmentState;
use foreshore_protocol::manifest::FailureBudget;
use foreshore_protocol::message::Phase;

use super::assignments::{Queue, shift};
use super::state::{Assignment, Revert, Rollout, Tick};

/// Devices of a rollout or of one of its waves, counted by how far they are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    /// All, less those that left.
    pub devices: u32,
    /// Not offered anything yet, and not put off.
    pub planned: u32,
    /// Between the offer and their end.
    pub in_progress: u32,
    /// Ended well and still have the release.
    pub succeeded: u32,
    /// Ended badly or silent, also if they were given their release of before since.
    pub failed: u32,
    /// Put off.
    pub deferred: u32,
    /// Given their release of before.
    pub reverted: u32,
    /// Slots held, see [`Assignment::holds_slot`].
    pub slots: u32,
    /// When the last one ended well.
    pub last_success: Option<Tick>,
}

impl Tally {
    /// A whole rollout counted. Costs O(waves).
    #[must_use]
    pub fn of(rollout: &Rollout) -> Self {
        rollout.assignments.tally()
    }

    /// One wave counted, by its ordinal from 1.
    #[must_use]
    pub fn of_wave(rollout: &Rollout, ordinal: u32) -> Self {
        rollout.assignments.tally_of_wave(ordinal)
    }

    /// Those that come after the last wave counted.
    #[must_use]
    pub fn of_tail(rollout: &Rollout) -> Self {
        rollout.assignments.tally_of_tail()
    }

    /// Counts one by one: what all others must equal.
    #[must_use]
    pub fn recount<'a>(assignments: impl IntoIterator<Item = &'a Assignment>) -> Self {
        let mut tally = Self::default();
        for assignment in assignments {
            tally.add(assignment);
        }
        tally
    }

    pub(super) fn one(assignment: &Assignment) -> Self {
        Self::recount([assignment])
    }

    /// Adds or takes away, all but the last success.
    pub(super) const fn shift(&mut self, by: &Self, there: bool) {
        shift(&mut self.devices, by.devices, there);
        shift(&mut self.planned, by.planned, there);
        shift(&mut self.in_progress, by.in_progress, there);
        shift(&mut self.succeeded, by.succeeded, there);
        shift(&mut self.failed, by.failed, there);
        shift(&mut self.deferred, by.deferred, there);
        shift(&mut self.reverted, by.reverted, there);
        shift(&mut self.slots, by.slots, there);
    }

    fn add(&mut self, assignment: &Assignment) {
        self.devices += u32::from(assignment.revert != Some(Revert::Gone));
        self.failed += u32::from(assignment.failed);
        self.slots += u32::from(assignment.holds_slot());
        match assignment.state {
            AssignmentState::Planned => self.planned += 1,
            AssignmentState::Device(Phase::Succeeded) => {
                self.succeeded += 1;
                self.last_success = self.last_success.max(Some(assignment.changed));
            }
            AssignmentState::Offered | AssignmentState::Device(_) => {
                self.in_progress += u32::from(!assignment.has_ended());
            }
            AssignmentState::Deferred => self.deferred += 1,
            AssignmentState::Reverted => {
                self.reverted += u32::from(assignment.revert != Some(Revert::Gone));
            }
            AssignmentState::Silent => {}
        }
    }
}

/// How a budget was broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Broken {
    /// So many failures as the budget does not allow.
    Count,
    /// Too large a part of those that ended.
    Percent,
}

/// Whether `failed` out of `succeeded + failed` ended attempts break the budget.
///
/// Devices that were put off are in neither number: they spend no budget, and they must not dilute it.
#[must_use]
pub fn broken(budget: &FailureBudget, succeeded: u32, failed: u32) -> Option<Broken> {
    let (failed, ended) = (u64::from(failed), u64::from(succeeded) + u64::from(failed));
    if failed >= u64::from(budget.count.max(1)) {
        Some(Broken::Count)
    } else if failed > 0
        && ended >= u64::from(budget.min_sample)
        && failed * 100 > u64::from(budget.percent) * ended
    {
        Some(Broken::Percent)
    } else {
        None
    }
}

/// Some of a rollout's devices, over which a budget is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// All.
    Whole,
    /// Those of one wave, by its ordinal from 1.
    Wave(u32),
    /// Those that come after the last wave.
    Tail,
}

impl Part {
    const fn has(self, assignment: &Assignment) -> bool {
        match self {
            Self::Whole => true,
            Self::Wave(ordinal) => assignment.wave == ordinal,
            Self::Tail => assignment.tail,
        }
    }

    fn tally(self, rollout: &Rollout) -> Tally {
        match self {
            Self::Whole => Tally::of(rollout),
            Self::Wave(ordinal) => Tally::of_wave(rollout, ordinal),
            Self::Tail => Tally::of_tail(rollout),
        }
    }
}

/// One sentence on the budget of a part if it is broken, for people; `None`: it is not.
#[must_use]
pub fn complaint(rollout: &Rollout, budget: &FailureBudget, part: Part) -> Option<String> {
    let tally = part.tally(rollout);
    let limit = match broken(budget, tally.succeeded, tally.failed)? {
        Broken::Count => format!("the budget stops at {}", budget.count),
        Broken::Percent => format!("the budget allows {} %", budget.percent),
    };
    let whose = match part {
        Part::Whole => String::new(),
        Part::Wave(ordinal) => format!(" of wave {ordinal}"),
        Part::Tail => " after the last wave".to_owned(),
    };
    Some(format!(
        "{} of {} devices{whose} failed and {limit}{}",
        tally.failed,
        tally.succeeded + tally.failed,
        first_failure(rollout, part)
    ))
}

/// `; DEVICE: why` of the failed device that comes first, to begin looking at.
pub(super) fn first_failure(rollout: &Rollout, part: Part) -> String {
    let assignments = &rollout.assignments;
    assignments
        .queue(Queue::Failed)
        .filter_map(|device| Some((device, assignments.get(device)?)))
        .find(|(_, assignment)| part.has(assignment))
        .map(|(device, assignment)| match &assignment.message {
            Some(message) => format!("; {device}: {message}"),
            None => format!("; first: {device}"),
        })
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    const BUDGET: FailureBudget = FailureBudget {
        count: 3,
        percent: 5,
        min_sample: 10,
    };

    #[test]
    fn a_count_of_failures_breaks_the_budget_whatever_the_sample() {
        assert_eq!(broken(&BUDGET, 0, 2), None);
        assert_eq!(broken(&BUDGET, 0, 3), Some(Broken::Count));
        assert_eq!(broken(&BUDGET, 1_000_000, 3), Some(Broken::Count));
    }

    #[test]
    fn a_percentage_needs_a_sample_and_must_be_exceeded() {
        assert_eq!(broken(&BUDGET, 8, 1), None, "a sample of 9");
        assert_eq!(broken(&BUDGET, 9, 1), Some(Broken::Percent), "10 % of 10");
        assert_eq!(broken(&BUDGET, 19, 1), None, "5 % of 20 is allowed");
        let none = FailureBudget {
            percent: 0,
            ..BUDGET
        };
        assert_eq!(broken(&none, 99, 0), None, "no failure never breaks it");
        assert_eq!(broken(&none, 99, 1), Some(Broken::Percent));
    }

    #[test]
    fn the_largest_numbers_do_not_overflow() {
        assert_eq!(
            broken(
                &FailureBudget {
                    count: u32::MAX,
                    ..BUDGET
                },
                u32::MAX,
                u32::MAX - 1
            ),
            Some(Broken::Percent)
        );
    }
}
