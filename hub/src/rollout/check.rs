//! What must always hold of a rollout, said once more and in another way than the code that decides.
//!
//! Property tests and the simulator call [`check`] after every change and [`check_action`] before every action
//! that [`super::advance`] wants; a rule that is broken is named. Nothing here decides anything.

use std::collections::BTreeMap;
use std::fmt;

use foreshore_protocol::DeviceId;
use foreshore_protocol::api::{AssignmentState, RolloutState, WaveState};
use foreshore_protocol::manifest::{FailureBudget, OnFailure, WaveTarget};
use foreshore_protocol::message::Phase;

use super::state::{
    Action, Approval, Assignment, Fleet, Placement, Revert, Rollout, Tick, UnixMs, Wave, is_failure,
};

/// The rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Rule {
    /// Each device is in one wave; waves have their exact sizes and are runs of ranks.
    WaveSizes,
    /// A wave opens only after every wave before it passed or was skipped.
    WaveOrder,
    /// Devices of a wave that is not open were offered nothing.
    NotBeforeItsTurn,
    /// A wave passes only through its gates.
    Gates,
    /// After a broken budget nothing is offered.
    NoOfferAfterBreak,
    /// Nothing is offered, opened or timed out while paused or frozen.
    NothingWhileStopped,
    /// At most `maxUnavailable` slots are held when another is given.
    MaxUnavailable,
    /// A device is offered the release once, while it is online.
    OfferOnce,
    /// Only a device that was seen switching can be silent, and only after its deadline.
    SilentOnlyAfterSwitching,
    /// A device that was seen switching, or that ended, is never put off.
    DeferredOnlyBeforeBegin,
    /// Only broken brakes cause a rollback, never a rollback and never darkness.
    RollbackCause,
    /// A final state leaves nothing open.
    FinalIsFinal,
    /// The records of one assignment fit together.
    Coherent,
    /// The clock stands still while paused or frozen, and only then.
    ClockStops,
    /// Nothing happens before the time that the policy names.
    NotBeforeStart,
    /// A wave that needs an approval passes only with it.
    Approval,
    /// Offers keep to the pace.
    Pace,
    /// Nobody is offered anything who is held by an operator or in another rollout's hands.
    HeldOrBusy,
    /// Where canaries are chosen by kind, they are replaced only by their own.
    Strata,
    /// Those that come after the last wave have a budget and brakes of their own.
    TailBrakes,
    /// A release is only given to a device that has one from which it can be reached.
    Steps,
    /// What is derived from the records equals a recount.
    Counters,
}

/// A broken rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// Which.
    pub rule: Rule,
    /// How.
    pub detail: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.rule, self.detail)
    }
}

#[derive(Default)]
struct Findings(Vec<Violation>);

impl Findings {
    fn require(&mut self, holds: bool, rule: Rule, detail: impl FnOnce() -> String) {
        if !holds {
            self.0.push(Violation {
                rule,
                detail: detail(),
            });
        }
    }
}

/// What is wrong with these records; empty if nothing is.
#[must_use]
pub fn check(rollout: &Rollout) -> Vec<Violation> {
    let mut findings = Findings::default();
    check_sizes(rollout, &mut findings);
    check_order(rollout, &mut findings);
    for (device, assignment) in rollout.assignments.iter() {
        check_assignment(rollout, device, assignment, &mut findings);
    }
    let discrepancy = rollout.assignments.discrepancy();
    findings.require(discrepancy.is_none(), Rule::Counters, || {
        discrepancy.unwrap_or_default()
    });
    let all = super::budget::Tally::recount(rollout.assignments.values());
    let counted = super::budget::Tally::of(rollout);
    findings.require(all == counted, Rule::Counters, || {
        format!("{counted:?}, recounted {all:?}")
    });
    let stopped = rollout.clock.stopped_at.is_some();
    let should = !rollout.state.is_final()
        && (rollout.frozen
            || matches!(
                rollout.state,
                RolloutState::Paused | RolloutState::RollbackPaused
            ));
    findings.require(stopped == should, Rule::ClockStops, || {
        format!(
            "{:?}, frozen: {}, clock stopped: {stopped}",
            rollout.state, rollout.frozen
        )
    });
    findings.require(
        rollout.finished.is_some() == rollout.state.is_final(),
        Rule::FinalIsFinal,
        || format!("{:?} with finished {:?}", rollout.state, rollout.finished),
    );
    findings.0
}

fn check_sizes(rollout: &Rollout, findings: &mut Findings) {
    let mut by_rank: BTreeMap<u32, u32> = BTreeMap::new();
    let joined = |assignment: &&Assignment| assignment.wave == 0;
    let frozen = rollout.assignments.values().filter(|a| !joined(a));
    let size = frozen.clone().count();
    for assignment in frozen {
        by_rank.insert(assignment.rank, assignment.wave);
    }
    let expected: Vec<(u32, u32)> = rollout
        .waves
        .iter()
        .zip(1_u32..)
        .flat_map(|(wave, ordinal)| (0..wave.size).map(move |_| ordinal))
        .zip(0_u32..)
        .map(|(ordinal, rank)| (rank, ordinal))
        .collect();
    let found: Vec<(u32, u32)> = by_rank.into_iter().collect();
    findings.require(
        found.len() == size && found == expected,
        Rule::WaveSizes,
        || format!("ranks and waves are {found:?}, not {expected:?}"),
    );
}

fn check_order(rollout: &Rollout, findings: &mut Findings) {
    let mut before_over = true;
    for (wave, ordinal) in rollout.waves.iter().zip(1_u32..) {
        let in_order = match wave.state {
            WaveState::Pending => true,
            // It was skipped when all before it had passed. One of these may have failed since, by a device that was
            // offline then, and be open again; where nobody is, nobody is too early.
            WaveState::Skipped => {
                before_over || super::budget::Tally::of_wave(rollout, ordinal).devices == 0
            }
            WaveState::Open
            | WaveState::Baking
            | WaveState::AwaitingApproval
            | WaveState::Passed
            | WaveState::Failed => before_over,
        };
        findings.require(in_order, Rule::WaveOrder, || {
            format!(
                "wave {ordinal} is {:?} before all waves before it passed",
                wave.state
            )
        });
        before_over &= matches!(wave.state, WaveState::Passed | WaveState::Skipped);
    }
    if rollout.state == RolloutState::Completed {
        findings.require(before_over, Rule::FinalIsFinal, || {
            "completed before its last wave passed".to_owned()
        });
    }
}

fn check_assignment(
    rollout: &Rollout,
    device: &DeviceId,
    assignment: &Assignment,
    findings: &mut Findings,
) {
    let Assignment {
        state,
        since,
        deferral,
        revert,
        failed,
        deadline,
        ..
    } = assignment;
    let shown = || format!("{device}: {assignment:?}");
    let pending = !rollout.opened(assignment);
    let untouched = *state == AssignmentState::Planned || *revert == Some(Revert::Gone);
    findings.require(!pending || untouched, Rule::NotBeforeItsTurn, shown);
    findings.require(
        deferral.is_some() == (*state == AssignmentState::Deferred),
        Rule::Coherent,
        shown,
    );
    findings.require(
        revert.is_some() == (*state == AssignmentState::Reverted),
        Rule::Coherent,
        shown,
    );
    findings.require(
        *state == AssignmentState::Reverted || *failed == is_failure(*state),
        Rule::Coherent,
        shown,
    );
    let open = match state {
        AssignmentState::Offered => true,
        AssignmentState::Device(phase) => !phase.is_final(),
        AssignmentState::Planned
        | AssignmentState::Silent
        | AssignmentState::Deferred
        | AssignmentState::Reverted => false,
    };
    // Whoever waits for others has no deadline of its own.
    let timed = open && *state != AssignmentState::Device(Phase::Waiting);
    findings.require(!timed || deadline.is_some(), Rule::Coherent, || {
        format!("{device} is {state:?} without a deadline: nothing would ever end it")
    });
    let open = open || *state == AssignmentState::Planned;
    let at_rest = match rollout.state {
        RolloutState::Completed => {
            assignment.tail || (!open && *state != AssignmentState::Deferred)
        }
        RolloutState::RolledBack => !assignment.has_intent(),
        RolloutState::Aborted | RolloutState::Superseded => {
            // Nothing that was offered and not begun, or that failed, keeps the release as its intent.
            match state {
                AssignmentState::Planned | AssignmentState::Silent | AssignmentState::Reverted => {
                    true
                }
                AssignmentState::Deferred => since.is_none(),
                AssignmentState::Offered => false,
                AssignmentState::Device(phase) => {
                    phase.is_switching() || *phase == Phase::Succeeded
                }
            }
        }
        RolloutState::Scheduled => *state == AssignmentState::Planned || revert.is_some(),
        RolloutState::Running
        | RolloutState::Paused
        | RolloutState::RollingBack
        | RolloutState::RollbackPaused => true,
    };
    let early = assignment.tail && rollout.state != RolloutState::Completed;
    findings.require(!early, Rule::FinalIsFinal, || {
        format!("{device} comes after the last wave of a rollout that has not completed")
    });
    findings.require(at_rest, Rule::FinalIsFinal, || {
        format!("{:?} with {device}: {assignment:?}", rollout.state)
    });
}

/// What would be wrong with an action that [`super::advance`] wants to do to `rollout` at `now`; empty if nothing is.
#[must_use]
pub fn check_action(
    rollout: &Rollout,
    action: &Action,
    fleet: &Fleet,
    now: UnixMs,
) -> Vec<Violation> {
    let mut findings = Findings::default();
    let stopped = rollout.clock.stopped_at.is_some();
    match action {
        Action::Offer {
            device,
            placement,
            next,
        } => {
            check_offer(rollout, device, fleet, &mut findings);
            check_pace(rollout, *next, now, &mut findings);
            check_step(rollout, device, placement, fleet, &mut findings);
        }
        Action::Tail { device, anew } => {
            let over = rollout
                .waves
                .iter()
                .all(|w| matches!(w.state, WaveState::Passed | WaveState::Skipped));
            findings.require(over && anew.is_none(), Rule::WaveOrder, || {
                format!("{device} is left to the end before it")
            });
        }
        Action::StopTail { message } => {
            let stops = message.is_some() && rollout.state == RolloutState::Completed;
            findings.require(stops && tail_is_broken(rollout), Rule::TailBrakes, || {
                "stopped without a cause".to_owned()
            });
        }
        Action::Measured { ordinal, .. } | Action::MeasureAnew { ordinal } => {
            findings.require(false, Rule::Gates, || {
                format!("wave {ordinal} is asked about by nobody")
            })
        }
        Action::Approve { ordinal } => findings.require(false, Rule::Approval, || {
            format!("wave {ordinal} is approved by nobody")
        }),
        Action::Restore { device, revert, .. } => {
            check_restore(rollout, device, *revert, &mut findings)
        }
        Action::Assign { device, state, .. } => {
            check_assign(rollout, device, *state, now, &mut findings)
        }
        Action::Stepped { device } => {
            let via = rollout.assignments.get(device).and_then(|a| a.via);
            findings.require(via.is_some(), Rule::Steps, || {
                format!("{device} has taken a step that it was not offered")
            });
        }
        Action::Reverted { .. } => {}
        Action::Replace { out, into } => {
            let idle = |device| {
                rollout
                    .assignments
                    .get(device)
                    .is_some_and(|a| a.since.is_none())
            };
            findings.require(idle(out) && idle(into), Rule::OfferOnce, || {
                format!("{out} and {into} change places after an offer")
            });
            let kind = |device| rollout.assignments.get(device).map(|a| a.stratum);
            findings.require(kind(out) == kind(into), Rule::Strata, || {
                format!("{out} is replaced by {into}, which is of another kind")
            });
            let by_kind = rollout
                .wave(1)
                .is_some_and(|wave| matches!(wave.target, WaveTarget::Canary(_)));
            findings.require(
                by_kind || succeeded(rollout, None) == 0,
                Rule::Gates,
                || "a canary replaced for none".to_owned(),
            );
        }
        Action::Wave { ordinal, state, .. } => {
            check_wave(rollout, *ordinal, *state, now, &mut findings)
        }
        Action::Enter { state, .. } => check_enter(rollout, *state, now, &mut findings),
        Action::Freeze => {
            findings.require(fleet.pulse.mostly_dark(), Rule::NothingWhileStopped, || {
                format!("frozen with {:?}", fleet.pulse)
            })
        }
        Action::Thaw => findings.require(stopped, Rule::ClockStops, || {
            "thawed while its clock ran".to_owned()
        }),
    }
    findings.0
}

fn succeeded(rollout: &Rollout, ordinal: Option<u32>) -> usize {
    let done = AssignmentState::Device(Phase::Succeeded);
    members(rollout, ordinal)
        .filter(|assignment| assignment.state == done)
        .count()
}

fn failed(rollout: &Rollout, ordinal: Option<u32>) -> usize {
    members(rollout, ordinal)
        .filter(|assignment| assignment.failed)
        .count()
}

fn members(rollout: &Rollout, ordinal: Option<u32>) -> impl Iterator<Item = &Assignment> {
    rollout
        .assignments
        .values()
        .filter(move |assignment| ordinal.is_none_or(|ordinal| assignment.wave == ordinal))
}

/// Whether the brakes must be on: counted from the assignments, in integers.
#[must_use]
pub fn budget_is_broken(rollout: &Rollout) -> bool {
    let whole = exceeds(
        &rollout.policy.budget,
        failed(rollout, None),
        succeeded(rollout, None),
    );
    let wave = |(wave, ordinal): (&Wave, u32)| {
        let here = Some(ordinal);
        let budget = wave.budget.as_ref();
        budget
            .is_some_and(|budget| exceeds(budget, failed(rollout, here), succeeded(rollout, here)))
    };
    whole || rollout.waves.iter().zip(1_u32..).any(wave)
}

/// The same for those that come after the last wave.
#[must_use]
pub fn tail_is_broken(rollout: &Rollout) -> bool {
    let tail = || rollout.assignments.values().filter(|a| a.tail);
    let bad = tail().filter(|a| a.failed).count();
    let done = AssignmentState::Device(Phase::Succeeded);
    let good = tail().filter(|a| a.state == done).count();
    exceeds(&rollout.policy.tail.failure_budget, bad, good)
}

fn exceeds(budget: &FailureBudget, bad: usize, good: usize) -> bool {
    let (bad, good) = (bad as u64, good as u64);
    bad >= u64::from(budget.count)
        || (bad > 0
            && bad + good >= u64::from(budget.min_sample)
            && bad * 100 > u64::from(budget.percent) * (bad + good))
}

fn check_brakes(rollout: &Rollout, findings: &mut Findings) {
    findings.require(!budget_is_broken(rollout), Rule::NoOfferAfterBreak, || {
        format!(
            "an offer with {} failed and {} succeeded",
            failed(rollout, None),
            succeeded(rollout, None)
        )
    });
    let broke = rollout
        .waves
        .iter()
        .any(|wave| wave.state == WaveState::Failed);
    findings.require(!broke, Rule::NoOfferAfterBreak, || {
        "an offer after a wave failed".to_owned()
    });
    let runs = rollout.state == RolloutState::Running && rollout.clock.stopped_at.is_none();
    findings.require(runs, Rule::NothingWhileStopped, || {
        format!(
            "an offer while {:?}, frozen: {}",
            rollout.state, rollout.frozen
        )
    });
}

fn check_offer(rollout: &Rollout, device: &DeviceId, fleet: &Fleet, findings: &mut Findings) {
    let Some(assignment) = rollout.assignments.get(device) else {
        findings.require(false, Rule::OfferOnce, || {
            format!("{device} is not in the frozen set")
        });
        return;
    };
    if assignment.tail {
        let open = rollout.state == RolloutState::Completed && rollout.tail_stopped.is_none();
        findings.require(open && !tail_is_broken(rollout), Rule::TailBrakes, || {
            format!("{device} is offered the release after failures at the end")
        });
    } else {
        check_brakes(rollout, findings);
    }
    findings.require(
        assignment.state == AssignmentState::Planned,
        Rule::OfferOnce,
        || format!("{device} is offered while {:?}", assignment.state),
    );
    let online = fleet.devices.get(device).is_some_and(|facts| facts.online);
    findings.require(online, Rule::OfferOnce, || {
        format!("{device} is offered while offline")
    });
    let free = fleet
        .devices
        .get(device)
        .is_some_and(|facts| !facts.held && !facts.busy);
    findings.require(free, Rule::HeldOrBusy, || {
        format!("{device} is offered while held or busy")
    });
    findings.require(rollout.opened(assignment), Rule::NotBeforeItsTurn, || {
        format!("{device} is offered before its wave")
    });
    check_slots(rollout, device, findings);
}

/// It is offered the rollout's release, or one on the way there, and only what can be reached from what it has.
fn check_step(
    rollout: &Rollout,
    device: &DeviceId,
    placement: &Placement,
    fleet: &Fleet,
    findings: &mut Findings,
) {
    let shown = || format!("{device} is offered {placement:?}");
    let Placement {
        release,
        soak_ms,
        progress_deadline_ms,
    } = *placement;
    let own = rollout.placement();
    let terms = (soak_ms, progress_deadline_ms) == (own.soak_ms, own.progress_deadline_ms);
    let requirements = &rollout.policy.requirements;
    let on_the_way = release == rollout.to || requirements.releases().any(|step| step == release);
    findings.require(terms && on_the_way, Rule::OfferOnce, shown);
    let facts = fleet.devices.get(device);
    let from = rollout.assignments.get(device).and_then(|assignment| {
        let said = facts.and_then(|facts| facts.report.as_ref()?.has);
        let given = assignment.previous.map(|previous| previous.release);
        if assignment.stepped {
            given
        } else {
            said.or(given)
        }
    });
    let reached = from.is_none_or(|from| requirements.allow(&from, &release));
    findings.require(reached, Rule::Steps, shown);
    // Nobody goes a longer way than there is.
    let straight = from.is_none_or(|from| requirements.allow(&from, &rollout.to));
    findings.require(!straight || release == rollout.to, Rule::Steps, shown);
}

fn check_pace(rollout: &Rollout, next: Option<Tick>, now: UnixMs, findings: &mut Findings) {
    let pace = if rollout.state == RolloutState::Completed {
        Some(rollout.policy.tail.pace)
    } else {
        rollout.policy.pace
    };
    let Some(pace) = pace else {
        return;
    };
    let tick = rollout.clock.tick(now);
    let tail = rollout.state == RolloutState::Completed;
    let well = AssignmentState::Device(Phase::Succeeded);
    let done = rollout
        .assignments
        .values()
        .filter(|a| a.state == well && (a.tail || !tail));
    let done = u32::try_from(done.count()).unwrap_or(u32::MAX);
    let kept = rollout.next_offer <= tick
        && next.is_some_and(|next| next >= rollout.next_offer.plus(pace.interval_ms(done)));
    findings.require(kept, Rule::Pace, || {
        format!("at {tick:?} with {:?}, then {next:?}", rollout.next_offer)
    });
}

fn check_slots(rollout: &Rollout, device: &DeviceId, findings: &mut Findings) {
    let held = rollout
        .assignments
        .values()
        .filter(|assignment| assignment.holds_slot())
        .count();
    let max = rollout.policy.max_unavailable;
    findings.require(held < max as usize, Rule::MaxUnavailable, || {
        format!("{device} is to switch while {held} of {max} do")
    });
}

fn check_restore(rollout: &Rollout, device: &DeviceId, revert: Revert, findings: &mut Findings) {
    findings.require(
        rollout.state == RolloutState::RollingBack,
        Rule::RollbackCause,
        || format!("{device} is sent back while {:?}", rollout.state),
    );
    let Some(assignment) = rollout.assignments.get(device) else {
        return;
    };
    findings.require(assignment.has_intent(), Rule::RollbackCause, || {
        format!("{device} has nothing to undo")
    });
    if revert == Revert::Switching && !assignment.holds_slot() {
        check_slots(rollout, device, findings);
    }
}

fn check_assign(
    rollout: &Rollout,
    device: &DeviceId,
    state: AssignmentState,
    now: UnixMs,
    findings: &mut Findings,
) {
    let Some(assignment) = rollout.assignments.get(device) else {
        return;
    };
    let switching = matches!(assignment.state, AssignmentState::Device(phase) if phase.is_switching())
        || assignment.has_lease();
    if state == AssignmentState::Silent {
        let late = assignment
            .deadline
            .is_some_and(|deadline| rollout.clock.tick(now) >= deadline);
        findings.require(switching && late, Rule::SilentOnlyAfterSwitching, || {
            format!("{device}: {assignment:?}")
        });
        let runs = rollout.clock.stopped_at.is_none();
        findings.require(runs, Rule::NothingWhileStopped, || {
            format!("{device} timed out while the clock stood")
        });
    }
    if state == AssignmentState::Deferred {
        let seen =
            matches!(assignment.state, AssignmentState::Device(phase) if phase.is_switching());
        let begun = seen || assignment.has_ended();
        findings.require(!begun, Rule::DeferredOnlyBeforeBegin, || {
            format!("{device}: {assignment:?}")
        });
    }
}

fn check_wave(
    rollout: &Rollout,
    ordinal: u32,
    state: WaveState,
    now: UnixMs,
    findings: &mut Findings,
) {
    let Some(wave) = rollout.wave(ordinal) else {
        return;
    };
    let here = Some(ordinal);
    let bake_ms = wave.bake_ms.unwrap_or(rollout.policy.bake_ms);
    let shown = || {
        format!(
            "wave {ordinal} from {:?} to {state:?} in {:?}",
            wave.state, rollout.state
        )
    };
    findings.require(
        rollout.state == RolloutState::Running,
        Rule::WaveOrder,
        shown,
    );
    let live = members(rollout, here)
        .filter(|assignment| assignment.revert != Some(Revert::Gone))
        .count();
    match state {
        WaveState::Open => {
            let over = rollout
                .waves
                .iter()
                .zip(1..ordinal)
                .all(|(wave, _)| matches!(wave.state, WaveState::Passed | WaveState::Skipped));
            findings.require(over, Rule::WaveOrder, shown);
            findings.require(!rollout.frozen, Rule::NothingWhileStopped, shown);
        }
        WaveState::Skipped => findings.require(live == 0, Rule::Gates, shown),
        WaveState::Baking => {
            findings.require(succeeded(rollout, here) > 0, Rule::Gates, shown);
            check_all_ended(rollout, ordinal, findings);
        }
        WaveState::Passed | WaveState::AwaitingApproval => {
            let tick = rollout.clock.tick(now);
            let own = succeeded(rollout, here) > 0;
            let asked =
                wave.state == WaveState::AwaitingApproval || !own || all_answered(rollout, wave);
            findings.require(asked, Rule::Gates, shown);
            let approved = wave.approval != Approval::Needed;
            let right = approved == (state == WaveState::Passed) || live == 0;
            findings.require(right, Rule::Approval, shown);
            if wave.state == WaveState::AwaitingApproval {
                // Its other gates were passed when it came there.
            } else if wave.state == WaveState::Baking {
                findings.require(
                    wave.bake_until.is_some_and(|until| until <= tick),
                    Rule::Gates,
                    shown,
                );
            } else {
                check_all_ended(rollout, ordinal, findings);
                let fresh = members(rollout, here)
                    .filter(|assignment| {
                        assignment.state == AssignmentState::Device(Phase::Succeeded)
                    })
                    .any(|assignment| assignment.changed.plus(bake_ms) > tick);
                findings.require(!fresh, Rule::Gates, shown);
                let proven = succeeded(rollout, None) > 0 && failed(rollout, here) == 0;
                findings.require(
                    live == 0 || succeeded(rollout, here) > 0 || proven,
                    Rule::Gates,
                    shown,
                );
            }
        }
        WaveState::Failed | WaveState::Pending => {}
    }
}

fn check_all_ended(rollout: &Rollout, ordinal: u32, findings: &mut Findings) {
    for (device, assignment) in rollout
        .assignments
        .iter()
        .filter(|(_, assignment)| assignment.wave == ordinal)
    {
        let over = match assignment.state {
            AssignmentState::Planned | AssignmentState::Offered => false,
            AssignmentState::Device(phase) => phase.is_final(),
            AssignmentState::Silent | AssignmentState::Deferred | AssignmentState::Reverted => true,
        };
        findings.require(over, Rule::Gates, || {
            format!(
                "wave {ordinal} goes on while {device} is {:?}",
                assignment.state
            )
        });
    }
}

/// Whether every gate of the policy has passed often enough, and failed or said nothing no more often than it may.
fn all_answered(rollout: &Rollout, wave: &Wave) -> bool {
    let gates = &rollout.policy.analysis;
    wave.analysis.len() == gates.len()
        && gates.iter().zip(&wave.analysis).all(|(gate, said)| {
            said.passed >= gate.count
                && said.failed <= gate.failure_limit
                && said.inconclusive <= gate.inconclusive_limit
        })
}

/// Whether a gate of the policy stops the rollout so: too many failures in any way, too many doubts only by a pause.
fn analysis_broke(rollout: &Rollout, state: RolloutState) -> bool {
    let gates = &rollout.policy.analysis;
    let mut said = rollout
        .waves
        .iter()
        .flat_map(|wave| gates.iter().zip(&wave.analysis));
    said.any(|(gate, said)| {
        said.failed > gate.failure_limit
            || (state == RolloutState::Paused && said.inconclusive > gate.inconclusive_limit)
    })
}

fn check_enter(rollout: &Rollout, state: RolloutState, now: UnixMs, findings: &mut Findings) {
    let shown = || format!("from {:?} to {state:?}", rollout.state);
    let all_failed = || {
        rollout.waves.iter().zip(1_u32..).any(|(wave, ordinal)| {
            wave.state == WaveState::Failed
                && failed(rollout, Some(ordinal)) > 0
                && succeeded(rollout, Some(ordinal)) == 0
        })
    };
    let allowed = match state {
        RolloutState::RollingBack | RolloutState::Paused => {
            let policy = match rollout.policy.on_failure {
                OnFailure::Rollback => RolloutState::RollingBack,
                OnFailure::Pause => RolloutState::Paused,
            };
            let doubt = analysis_broke(rollout, RolloutState::Paused)
                && !analysis_broke(rollout, RolloutState::RollingBack);
            rollout.state == RolloutState::Running
                && (state == policy || (doubt && state == RolloutState::Paused))
                && (budget_is_broken(rollout) || all_failed() || analysis_broke(rollout, state))
        }
        RolloutState::RolledBack | RolloutState::RollbackPaused => {
            rollout.state == RolloutState::RollingBack
        }
        RolloutState::Completed => {
            check_brakes(rollout, findings);
            true
        }
        RolloutState::Running => {
            let due = rollout.policy.start_at <= Some(now);
            findings.require(due, Rule::NotBeforeStart, shown);
            rollout.state == RolloutState::Scheduled
        }
        RolloutState::Scheduled | RolloutState::Aborted | RolloutState::Superseded => false,
    };
    findings.require(allowed, Rule::RollbackCause, shown);
}
