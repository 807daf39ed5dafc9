//! PURE: how one app gets from one release to the next over many devices, in waves.
//!
//! [`advance`] looks at a rollout, at what is known of the fleet and at the time, and says what to do. It
//! reads no clock, draws no randomness and touches no store: the controller commits its [`Action`]s, with the
//! desired states and outbox rows they ask for, in one transaction, and [`Rollout::apply`] says what the
//! records look like afterwards. A crash between two transactions therefore changes nothing.
//!
//! What the controller calls:
//!
//! ```text
//! Rollout::open(Opening) -> Rollout                                  state Running; waves cut; nothing offered yet
//! advance(&Rollout, &Fleet, now) -> Step { actions, wake_at }        on news of its devices, and at wake_at
//! command::pause | resume | approve | retry | abort | supersede (&Rollout) -> Result<Vec<Action>, Refused>
//! command::undo_target(&Rollout) -> Result<Digest, Refused>          the release a new rollout goes back to
//! Rollout::apply(&mut self, &Action, written: Option<Version>, now) -> Touched
//!     for each action in order; `written` is the version under which an Offer or Restore was
//!     written to the device's desired state (None for the other actions)
//! budget::Tally::of(&Rollout) / of_wave(&Rollout, ordinal)           counters, recounted
//! joiner_release(rollouts newest first) -> Option<Placement>         for a device that the app selects later
//! ```
//!
//! | file | what it decides |
//! |---|---|
//! | [`state`] | the records and the facts |
//! | [`waves`] | who comes first, and how a set is cut |
//! | `observe` | what a report or silence means |
//! | [`gates`] | when a wave passed |
//! | [`budget`] | what failed so far, and when that is too much |
//! | `rollback` | who goes back, in which order |
//! | [`command`] | what an operator may ask |
//! | [`explain`] | why a device is where it is, for people |
//! | `apply` | what the records look like after an action |
//! | [`check`] | what must always hold, for tests and the simulator |
//!
//! The choices behind it are in `docs/decisions/0010-rollout-gates.md`.

mod apply;
pub mod budget;
pub mod check;
pub mod command;
pub mod explain;
pub mod gates;
mod observe;
mod rollback;
pub mod state;
#[cfg(test)]
mod tests;
pub mod waves;

use std::collections::BTreeSet;
use std::iter;

use foreshore_protocol::DeviceId;
use foreshore_protocol::api::{AssignmentState, RolloutState, WaveState};
use foreshore_protocol::manifest::{OnFailure, Pace, WaveTarget};

use budget::Part;
use gates::Gate;
use observe::Patience;
pub use state::{
    Action, Approval, Assignment, Cause, Clock, Deferral, Facts, Fleet, Member, Opening, Placement,
    Policy, Pulse, Refused, Report, Revert, Rollout, StateName, Step, Tick, Touched, UnixMs, Wave,
};
pub use waves::joiner_release;

/// What to do now, and when to look again.
///
/// Goes on until nothing more follows from these facts: applying the actions and calling it again with the same
/// facts and time yields none. Each call costs O(devices × waves that change state in it), and copies the
/// records once.
#[must_use]
pub fn advance(rollout: &Rollout, fleet: &Fleet, now: UnixMs) -> Step {
    let mut work = Work {
        rollout: rollout.clone(),
        fleet,
        now,
        actions: Vec::new(),
    };
    work.run();
    let wake_at = work.wake_at();
    Step {
        actions: work.actions,
        wake_at,
    }
}

/// A rollout on its way through one [`advance`]: each action is applied to the copy as it is decided, so that the
/// next one is decided on what the records will look like.
struct Work<'a> {
    rollout: Rollout,
    fleet: &'a Fleet,
    now: UnixMs,
    actions: Vec<Action>,
}

/// Devices that a fast pace has due within so long may be offered at once, in milliseconds; no more than that is made
/// up for of a pace that was not used up.
const PACE_BURST_MS: u64 = 1_000;

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
            WaveState::Pending if budget::Tally::of_wave(&self.rollout, ordinal).devices == 0 => {
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
                    Gate::Bake(_) if wave.state == WaveState::Baking => return false,
                    Gate::Bake(until) => (WaveState::Baking, Some(until), false),
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
        let replacements = waves::replacements(&self.rollout, ordinal, self.fleet);
        let any = !replacements.is_empty();
        for action in replacements {
            self.act(action);
        }
        any
    }

    fn fail_wave(&mut self, ordinal: u32) {
        let tally = budget::Tally::of_wave(&self.rollout, ordinal);
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
        let tally = budget::Tally::of(&self.rollout);
        let successes = if self.rollout.state == RolloutState::Completed {
            budget::Tally::of_tail(&self.rollout).succeeded
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
        let placement = self.rollout.placement();
        for (_, device) in candidates
            .into_iter()
            .take(usize::try_from(free).unwrap_or(usize::MAX))
        {
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
        let tally = budget::Tally::of(&self.rollout);
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
        for action in rollback::restores_at_once(&self.rollout, self.fleet) {
            self.act(action);
        }
        for action in rollback::restores_in_turn(&self.rollout, self.fleet) {
            self.act(action);
        }
        if let Some(end) = rollback::end(&self.rollout, self.fleet) {
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
        let slots = budget::Tally::of(rollout).slots;
        let waits =
            paced && slots < rollout.policy.max_unavailable && self.candidates().next().is_some();
        waits.then(|| rollout.clock.unix(rollout.next_offer))
    }
}
