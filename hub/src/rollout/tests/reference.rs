//! The engine as it was before it had indices: every decision is found by going through every device. What
//! [`advance_by`] decides must be the same, in the same order.

use std::cmp::Reverse;

use foreshore_protocol::manifest::OnFailure;

use super::super::PACE_BURST_MS;
use super::super::analysis::message;
use super::super::budget::{Part, Tally};
use super::super::gates::{self, Gate};
use super::super::observe::{self, Patience};
use super::super::rollback::{Way, restore, way};
use super::*;

/// What to do now, and when to look again.
pub(super) fn advance_over_all(rollout: &Rollout, fleet: &Fleet, now: UnixMs) -> Step {
    let mut work = Work {
        rollout: rollout.clone(),
        fleet,
        now,
        actions: Vec::new(),
        more: false,
    };
    work.run();
    let wake_at = if work.more { Some(now) } else { work.wake_at() };
    Step {
        actions: work.actions,
        wake_at,
    }
}

fn all(rollout: &Rollout) -> Tally {
    Tally::recount(rollout.assignments.values())
}

fn of_wave(rollout: &Rollout, ordinal: u32) -> Tally {
    let wave = |one: &&Assignment| one.wave == ordinal;
    Tally::recount(rollout.assignments.values().filter(wave))
}

/// A rollout on its way through one [`advance`]: each action is applied to the copy as it is decided, so that the
/// next one is decided on what the records will look like.
struct Work<'a> {
    rollout: Rollout,
    fleet: &'a Fleet,
    now: UnixMs,
    actions: Vec<Action>,
    more: bool,
}

impl Work<'_> {
    fn run(&mut self) {
        if self.rollout.state == RolloutState::Completed {
            self.tail();
            return;
        }
        if self.rollout.state.is_final() {
            return;
        }
        self.freeze_or_thaw();
        self.begin();
        self.observe();
        if self.rollout.state == RolloutState::Running {
            self.forward();
        }
        if self.rollout.state == RolloutState::RollingBack {
            self.back();
        }
    }

    fn act(&mut self, action: Action) {
        self.rollout.apply(&action, None, self.now);
        self.actions.push(action);
    }

    fn tick(&self) -> Tick {
        self.rollout.clock.tick(self.now)
    }

    /// Whether the hub has listened long enough, since it was last deaf, to know who is online. A rollout that
    /// was opened while it listened has nothing to learn anew.
    fn settled(&self) -> bool {
        self.listened_for(self.fleet.settle_ms)
    }

    fn listened_for(&self, ms: u64) -> bool {
        self.fleet
            .listening_since
            .is_some_and(|since| since <= self.rollout.created || self.now >= since.plus(ms))
    }

    fn freeze_or_thaw(&mut self) {
        let dark = self.fleet.pulse.mostly_dark();
        if self.settled() && dark != self.rollout.frozen {
            self.act(if dark { Action::Freeze } else { Action::Thaw });
        }
    }

    fn patience(&self) -> Patience {
        let stands = if self.rollout.state == RolloutState::Completed {
            self.dark()
        } else {
            self.rollout.clock.stopped_at.is_some()
        };
        Patience {
            runs: self.settled() && !stands,
            silence_counts: self.listened_for(self.rollout.policy.silent_margin_ms),
        }
    }

    fn observe(&mut self) {
        let (tick, patience) = (self.tick(), self.patience());
        let news: Vec<_> = self
            .rollout
            .assignments
            .iter()
            .filter_map(|(device, assignment)| {
                let facts = self.fleet.devices.get(device);
                observe::observe(&self.rollout, device, assignment, facts, tick, patience)
            })
            .collect();
        for action in news {
            self.act(action);
        }
    }

    /// A completed rollout still brings its release to those that come after its last wave, at their own pace and
    /// against a budget of their own. What became of a device after another end is for the next rollout to see.
    fn tail(&mut self) {
        self.observe();
        if self.rollout.tail_stopped.is_some() || !self.settled() || self.dark() {
            return;
        }
        let budget = self.rollout.policy.tail.failure_budget;
        if let Some(message) = budget::complaint(&self.rollout, &budget, Part::Tail) {
            self.act(Action::StopTail {
                message: Some(message),
            });
            return;
        }
        self.put_off_the_absent();
        self.offer(Some(self.rollout.policy.tail.pace));
    }

    /// A completed rollout has no clock that could stand still while most of the fleet is dark.
    const fn dark(&self) -> bool {
        self.fleet.pulse.mostly_dark()
    }

    /// A scheduled rollout begins when its time has come.
    fn begin(&mut self) {
        let due = self.rollout.policy.start_at <= Some(self.now);
        if self.rollout.state == RolloutState::Scheduled && due {
            self.act(Action::Enter {
                state: RolloutState::Running,
                cause: None,
                message: None,
            });
        }
    }

    fn forward(&mut self) {
        if self.budget_broke() || !self.settled() || self.rollout.frozen {
            return;
        }
        loop {
            self.put_off_the_absent();
            let moved = self
                .current_wave()
                .is_some_and(|ordinal| self.move_wave(ordinal));
            if !moved {
                break;
            }
        }
        if self.rollout.state != RolloutState::Running {
            return;
        }
        self.offer(self.rollout.policy.pace);
        self.complete();
    }

    fn budget_broke(&mut self) -> bool {
        let waves = self.rollout.waves.iter().zip(1_u32..);
        let own = waves.filter_map(|(wave, ordinal)| Some((wave.budget?, Part::Wave(ordinal))));
        let complaint = iter::once((self.rollout.policy.budget, Part::Whole))
            .chain(own)
            .find_map(|(budget, part)| budget::complaint(&self.rollout, &budget, part));
        let Some(message) = complaint else {
            return false;
        };
        self.fail(Cause::Budget, message);
        true
    }

    /// The first wave that has neither passed nor been skipped.
    fn current_wave(&self) -> Option<u32> {
        let over = |wave: &Wave| matches!(wave.state, WaveState::Passed | WaveState::Skipped);
        self.rollout
            .waves
            .iter()
            .zip(1_u32..)
            .find(|(wave, _)| !over(wave))
            .map(|(_, ordinal)| ordinal)
    }

    /// Moves a wave on by one state; false if it waits or the rollout stopped.
    fn move_wave(&mut self, ordinal: u32) -> bool {
        if self.replace_canaries_of_kinds(ordinal) {
            return true;
        }
        let Some(wave) = self.rollout.wave(ordinal) else {
            return false;
        };
        let (state, bake_until, moved) = match wave.state {
            WaveState::Pending if of_wave(&self.rollout, ordinal).devices == 0 => {
                (WaveState::Skipped, None, true)
            }
            WaveState::Pending => (WaveState::Open, None, true),
            WaveState::Open | WaveState::Baking | WaveState::AwaitingApproval => {
                match gates::look(&self.rollout, ordinal, wave, self.tick()) {
                    Gate::InProgress => return false,
                    Gate::NoCanary => return self.replace_canaries(ordinal),
                    Gate::AllFailed => {
                        self.fail_wave(ordinal);
                        return false;
                    }
                    Gate::Unwell(gate) => {
                        let message = message(&self.rollout, ordinal, gate, "failed");
                        self.fail(Cause::Analysis, message);
                        return false;
                    }
                    Gate::Inconclusive(gate) => {
                        let message = message(&self.rollout, ordinal, gate, "cannot tell");
                        self.act(Action::Enter {
                            state: RolloutState::Paused,
                            cause: Some(Cause::Inconclusive),
                            message: Some(message),
                        });
                        return false;
                    }
                    Gate::Bake(_) | Gate::Analysis(_) if wave.state == WaveState::Baking => {
                        return false;
                    }
                    Gate::Bake(until) | Gate::Analysis(until) => {
                        (WaveState::Baking, Some(until), false)
                    }
                    Gate::Approval if wave.state == WaveState::AwaitingApproval => return false,
                    Gate::Approval => (WaveState::AwaitingApproval, None, false),
                    Gate::Pass => (WaveState::Passed, None, true),
                }
            }
            WaveState::Passed | WaveState::Skipped | WaveState::Failed => return false,
        };
        self.act(Action::Wave {
            ordinal,
            state,
            bake_until,
        });
        moved
    }

    /// Devices of opened waves that are offline or held and were offered nothing are put off, so that nothing
    /// waits for them. They hold no slot and are offered the release when they return.
    fn put_off_the_absent(&mut self) {
        let absent: Vec<_> = self
            .planned()
            .filter_map(|(device, _)| {
                let facts = self.fleet.devices.get(device);
                let deferral = match facts {
                    Some(facts) if facts.held => Deferral::Held,
                    Some(facts) if facts.online => return None,
                    Some(_) | None => Deferral::Offline,
                };
                Some((device.clone(), deferral))
            })
            .collect();
        for (device, deferral) in absent {
            let why = match deferral {
                Deferral::Held => "an operator holds it",
                Deferral::Offline | Deferral::NotBegun => "it is offline",
            };
            self.act(Action::Assign {
                device,
                state: AssignmentState::Deferred,
                deferral: Some(deferral),
                deadline: None,
                message: Some(why.to_owned()),
            });
        }
    }

    /// Those of opened waves, and after the last, that were offered nothing yet.
    fn planned(&self) -> impl Iterator<Item = (&DeviceId, &Assignment)> {
        self.rollout.assignments.iter().filter(|(_, assignment)| {
            assignment.state == AssignmentState::Planned && self.rollout.opened(assignment)
        })
    }

    /// Where canaries are chosen by kind, each kind waits for one of its own.
    fn replace_canaries_of_kinds(&mut self, ordinal: u32) -> bool {
        let by_kind = self.rollout.wave(ordinal).is_some_and(|wave| {
            wave.state == WaveState::Open && matches!(wave.target, WaveTarget::Canary(_))
        });
        by_kind && self.replace_canaries(ordinal)
    }

    fn replace_canaries(&mut self, ordinal: u32) -> bool {
        let replacements = replacements(&self.rollout, ordinal, self.fleet);
        let any = !replacements.is_empty();
        for action in replacements {
            self.act(action);
        }
        any
    }

    fn fail_wave(&mut self, ordinal: u32) {
        let tally = of_wave(&self.rollout, ordinal);
        let first = budget::first_failure(&self.rollout, Part::Wave(ordinal));
        let message = format!(
            "every device of wave {ordinal} that tried failed ({}){first}",
            tally.failed
        );
        self.fail(Cause::WaveFailed, message);
    }

    /// The brakes: the newest wave that was opened failed, and nothing is offered from here on.
    fn fail(&mut self, cause: Cause, message: String) {
        let open = |wave: &Wave| !matches!(wave.state, WaveState::Pending | WaveState::Skipped);
        let newest = self
            .rollout
            .waves
            .iter()
            .zip(1_u32..)
            .filter(|(wave, _)| open(wave))
            .last();
        if let Some((_, ordinal)) = newest {
            self.act(Action::Wave {
                ordinal,
                state: WaveState::Failed,
                bake_until: None,
            });
        }
        let state = match self.rollout.policy.on_failure {
            OnFailure::Rollback => RolloutState::RollingBack,
            OnFailure::Pause => RolloutState::Paused,
        };
        self.act(Action::Enter {
            state,
            cause: Some(cause),
            message: Some(message),
        });
    }

    /// Offers the release to as many as `maxUnavailable` and the pace allow, lowest rank first; so one that was put
    /// off in an earlier wave and is back comes before those of the current one.
    fn offer(&mut self, pace: Option<Pace>) {
        let tally = all(&self.rollout);
        let successes = if self.rollout.state == RolloutState::Completed {
            Tally::recount(self.rollout.assignments.values().filter(|one| one.tail)).succeeded
        } else {
            tally.succeeded
        };
        let free = self
            .rollout
            .policy
            .max_unavailable
            .saturating_sub(tally.slots);
        let candidates: BTreeSet<_> = self
            .candidates()
            .map(|(device, assignment)| (assignment.rank, device.clone()))
            .collect();
        let candidates = candidates
            .into_iter()
            .take(usize::try_from(free).unwrap_or(usize::MAX));
        for ((_, device), offered) in candidates.zip(0..) {
            let next = match pace {
                None => None,
                Some(_) if self.tick() < self.rollout.next_offer => return,
                Some(pace) => {
                    let interval = pace.interval_ms(successes);
                    let late = PACE_BURST_MS.saturating_sub(interval);
                    let late = Tick(self.tick().0.saturating_sub(late));
                    Some(self.rollout.next_offer.max(late).plus(interval))
                }
            };
            let facts = self.fleet.devices.get(&device);
            let placement = self
                .rollout
                .next_placement(&self.rollout.assignments[&device], facts);
            if offered == self.fleet.offers_at_once {
                self.more = true;
                return;
            }
            self.act(Action::Offer {
                device,
                placement,
                next,
            });
        }
    }

    /// Those that can be offered the release.
    fn candidates(&self) -> impl Iterator<Item = (&DeviceId, &Assignment)> {
        self.planned().filter(|(device, _)| {
            let facts = self.fleet.devices.get(*device);
            facts.is_some_and(|facts| facts.online && !facts.held && !facts.busy)
        })
    }

    /// Ends a rollout whose every wave passed and whose last straggler ended. Those that are still put off come
    /// after the last wave, whenever they return.
    fn complete(&mut self) {
        let tally = all(&self.rollout);
        if self.current_wave().is_some() || tally.in_progress > 0 || tally.planned > 0 {
            return;
        }
        let later: Vec<_> = self
            .rollout
            .assignments
            .iter()
            .filter(|(_, assignment)| assignment.state == AssignmentState::Deferred)
            .map(|(device, _)| device.clone())
            .collect();
        for device in later {
            self.act(Action::Tail { device, anew: None });
        }
        self.act(Action::Enter {
            state: RolloutState::Completed,
            cause: None,
            message: None,
        });
    }

    fn back(&mut self) {
        if !self.settled() {
            return;
        }
        for action in restores_at_once(&self.rollout, self.fleet) {
            self.act(action);
        }
        for action in restores_in_turn(&self.rollout, self.fleet) {
            self.act(action);
        }
        if let Some(end) = end(&self.rollout, self.fleet) {
            self.act(end);
        }
    }

    /// The next moment after now at which time alone changes something.
    fn wake_at(&self) -> Option<UnixMs> {
        let rollout = &self.rollout;
        match rollout.state {
            RolloutState::Completed => {}
            RolloutState::Aborted | RolloutState::RolledBack | RolloutState::Superseded => {
                return None;
            }
            RolloutState::Scheduled => return rollout.policy.start_at,
            RolloutState::Running
            | RolloutState::Paused
            | RolloutState::RollingBack
            | RolloutState::RollbackPaused => {}
        }
        let since = self.fleet.listening_since?;
        if !self.settled() {
            return Some(since.plus(self.fleet.settle_ms));
        }
        if !self.patience().runs {
            return None;
        }
        let heard = since.plus(rollout.policy.silent_margin_ms);
        let patient = !self.patience().silence_counts;
        let bakes = rollout
            .waves
            .iter()
            .filter_map(|wave| wave.bake_until)
            .map(|tick| rollout.clock.unix(tick));
        let deadlines = rollout.assignments.values().filter_map(|assignment| {
            let deadline = rollout.clock.unix(assignment.deadline?);
            Some(if patient {
                [deadline, deadline.max(heard)]
            } else {
                [deadline, deadline]
            })
        });
        bakes
            .chain(deadlines.flatten())
            .chain(self.next_offer())
            .filter(|at| *at > self.now)
            .min()
    }

    /// When a device is due by the pace, if one waits for that alone.
    fn next_offer(&self) -> Option<UnixMs> {
        let rollout = &self.rollout;
        let running = rollout.state == RolloutState::Running;
        let tail = rollout.state == RolloutState::Completed;
        let paced =
            (running && rollout.policy.pace.is_some()) || (tail && rollout.tail_stopped.is_none());
        let slots = all(rollout).slots;
        let waits =
            paced && slots < rollout.policy.max_unavailable && self.candidates().next().is_some();
        waits.then(|| rollout.clock.unix(rollout.next_offer))
    }
}

/// Whom to tell at once: those who do not have to switch back, who switch already, or who are away. Newest wave
/// first, within a wave the last first.
///
/// While most of the fleet is dark nobody who runs the new release well is touched: all would be written as
/// "away", and switch at once when the network is back.
fn restores_at_once(rollout: &Rollout, fleet: &Fleet) -> Vec<Action> {
    candidates(rollout, fleet)
        .into_iter()
        .filter_map(|(device, assignment, way)| {
            let revert = match way {
                Way::Free => Revert::Settling,
                Way::Underway => Revert::Switching,
                Way::Away if !rollout.frozen => Revert::Settling,
                Way::Away | Way::Switch => return None,
            };
            Some(restore(device, assignment, revert))
        })
        .collect()
}

/// Whom to tell next of those who run the new release well and are there: as many as `maxUnavailable` allows, in the
/// same order.
fn restores_in_turn(rollout: &Rollout, fleet: &Fleet) -> Vec<Action> {
    if rollout.frozen {
        return Vec::new();
    }
    let free = rollout
        .policy
        .max_unavailable
        .saturating_sub(all(rollout).slots);
    candidates(rollout, fleet)
        .into_iter()
        .filter(|(_, _, way)| *way == Way::Switch)
        .take(usize::try_from(free).unwrap_or(usize::MAX))
        .map(|(device, assignment, _)| restore(device, assignment, Revert::Switching))
        .collect()
}

fn candidates<'a>(rollout: &'a Rollout, fleet: &Fleet) -> Vec<(&'a DeviceId, &'a Assignment, Way)> {
    let mut candidates: Vec<_> = rollout
        .assignments
        .iter()
        .filter_map(|(device, assignment)| {
            let online = fleet.devices.get(device).is_some_and(|facts| facts.online);
            Some((device, assignment, way(assignment, online)?))
        })
        .collect();
    candidates
        .sort_unstable_by_key(|(_, assignment, _)| Reverse((assignment.wave, assignment.rank)));
    candidates
}

/// What becomes of the rollback now; `None`: it goes on.
fn end(rollout: &Rollout, fleet: &Fleet) -> Option<Action> {
    let mut done = 0;
    let mut failed = 0;
    let mut waiting = false;
    for (device, assignment) in rollout.assignments.iter() {
        let online = fleet.devices.get(device).is_some_and(|facts| facts.online);
        waiting |= assignment.has_intent();
        match assignment.revert {
            Some(Revert::Done) => done += 1,
            Some(Revert::Failed) => failed += 1,
            // Offline devices find their release of before when they return.
            Some(Revert::Switching | Revert::Settling) => waiting |= online || rollout.frozen,
            Some(Revert::Gone) | None => {}
        }
    }
    let given_up =
        failed > 0 && (!waiting || budget::broken(&rollout.policy.budget, done, failed).is_some());
    if given_up {
        let reason = rollout
            .assignments
            .iter()
            .find(|(_, assignment)| assignment.revert == Some(Revert::Failed))
            .and_then(|(device, assignment)| {
                Some(format!("; {device}: {}", assignment.message.as_ref()?))
            })
            .unwrap_or_default();
        return Some(Action::Enter {
            state: RolloutState::RollbackPaused,
            cause: Some(Cause::RollbackFailed),
            message: Some(format!(
                "{failed} devices could not go back to their release of before{reason}"
            )),
        });
    }
    (!waiting).then(|| Action::Enter {
        state: RolloutState::RolledBack,
        cause: rollout.cause,
        message: rollout.message.clone(),
    })
}

/// In the first wave, devices that can begin take the place of those that cannot (offline, held) and were offered
/// nothing, lowest rank first and, where canaries are chosen by kind, of the same kind. A canary that cannot sing delays
/// everyone; any other device of its kind is as good.
fn replacements(rollout: &Rollout, ordinal: u32, fleet: &Fleet) -> Vec<Action> {
    let ready = |device: &DeviceId| {
        let facts = fleet.devices.get(device);
        facts.is_some_and(|facts| facts.online && !facts.held)
    };
    let mut out: Vec<(u32, u32, &DeviceId)> = Vec::new();
    let mut into: BTreeMap<u32, BTreeSet<(u32, &DeviceId)>> = BTreeMap::new();
    for (device, assignment) in rollout.assignments.iter() {
        let idle = assignment.since.is_none();
        if assignment.wave == ordinal {
            if idle && assignment.state == AssignmentState::Deferred {
                out.push((assignment.rank, assignment.stratum, device));
            }
        } else if idle && assignment.state == AssignmentState::Planned && ready(device) {
            let kind = into.entry(assignment.stratum).or_default();
            kind.insert((assignment.rank, device));
        }
    }
    out.sort_unstable();
    out.into_iter()
        .filter_map(|(_, stratum, out)| {
            let (_, into) = into.get_mut(&stratum)?.pop_first()?;
            Some(Action::Replace {
                out: out.clone(),
                into: into.clone(),
            })
        })
        .collect()
}
