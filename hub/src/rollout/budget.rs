//! What a rollout has cost so far, recounted from its assignments, and when that is too much.
//!
//! Nothing here is kept: a counter that is stored beside what it counts is wrong after the first crash.

use foreshore_protocol::api::AssignmentState;
use foreshore_protocol::manifest::FailureBudget;
use foreshore_protocol::message::Phase;

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
    /// Counts a whole rollout.
    #[must_use]
    pub fn of(rollout: &Rollout) -> Self {
        Self::count(rollout.assignments.values())
    }

    /// Counts one wave, by its ordinal from 1.
    #[must_use]
    pub fn of_wave(rollout: &Rollout, ordinal: u32) -> Self {
        Self::count(
            rollout
                .assignments
                .values()
                .filter(|assignment| assignment.wave == ordinal),
        )
    }

    /// Counts those that come after the last wave.
    #[must_use]
    pub fn of_tail(rollout: &Rollout) -> Self {
        Self::count(
            rollout
                .assignments
                .values()
                .filter(|assignment| assignment.tail),
        )
    }

    fn count<'a>(assignments: impl Iterator<Item = &'a Assignment>) -> Self {
        let mut tally = Self::default();
        for assignment in assignments {
            tally.add(assignment);
        }
        tally
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
    rollout
        .assignments
        .iter()
        .filter(|(_, assignment)| assignment.failed && part.has(assignment))
        .min_by_key(|(_, assignment)| (assignment.wave, assignment.rank))
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
