//! PURE: how one app gets from one release to the next over many devices, in waves.
//!
//! [`advance_by`] looks at a rollout, at what is new of the fleet and at the time, and says what to do. It
//! reads no clock, draws no randomness and touches no store: the controller commits its [`Action`]s, with the
//! desired states and outbox rows they ask for, in one transaction, and [`Rollout::apply`] says what the
//! records look like afterwards. A crash between two transactions therefore changes nothing.
//!
//! What the controller calls:
//!
//! ```text
//! Rollout::open(Opening) -> Rollout                                  state Running; waves cut; nothing offered yet
//! advance_by(&mut Rollout, &Fleet, &News, now) -> Step { actions, wake_at }
//!                                                                    on news of its devices, and at wake_at
//! advance(&Rollout, &Fleet, now) -> Step                             the same, looking at everything
//! command::pause | resume | approve | retry | abort | supersede (&Rollout) -> Result<Vec<Action>, Refused>
//! command::undo_target(&Rollout) -> Result<Digest, Refused>          the release a new rollout goes back to
//! Rollout::apply(&mut self, &Action, written: Option<Version>, now) -> Touched
//!     for each action in order; `written` is the version under which an Offer or Restore was
//!     written to the device's desired state (None for the other actions)
//! budget::Tally::of(&Rollout) / of_wave(&Rollout, ordinal)           counters
//! joiner_release(rollouts newest first) -> Option<Placement>         for a device that the app selects later
//! ```
//!
//! | file | what it decides |
//! |---|---|
//! | [`state`] | the records and the facts |
//! | [`assignments`] | the records of the devices, and what is derived from them |
//! | [`waves`] | who comes first, and how a set is cut |
//! | `observe` | what a report or silence means |
//! | [`gates`] | when a wave passed |
//! | [`analysis`] | what else is asked of a wave, and what follows |
//! | [`budget`] | what failed so far, and when that is too much |
//! | [`steps`] | which release comes first, where one can only be reached from some others |
//! | `rollback` | who goes back, in which order |
//! | [`command`] | what an operator may ask |
//! | [`explain`] | why a device is where it is, for people |
//! | `apply` | what the records look like after an action |
//! | `trial` | applying actions and taking them back |
//! | [`check`] | what must always hold, for tests and the simulator |
//!
//! The choices behind it are in `docs/decisions/0010-rollout-gates.md`; why a look costs what is new and not what there
//! is, in `docs/decisions/0044-a-look-costs-what-is-new.md`.

pub mod analysis;
mod apply;
pub mod assignments;
pub mod budget;
pub mod check;
pub mod command;
pub mod explain;
pub mod gates;
mod observe;
mod rollback;
pub mod state;
pub mod steps;
#[cfg(test)]
mod tests;
mod trial;
pub mod waves;

use std::collections::BTreeSet;
use std::iter;

use foreshore_protocol::DeviceId;
use foreshore_protocol::api::{AssignmentState, RolloutState, WaveState};
use foreshore_protocol::manifest::{OnFailure, Pace, WaveTarget};

pub use assignments::Assignments;
use assignments::{Group, Looked, Queue};
use budget::Part;
use gates::Gate;
use observe::Patience;
pub use state::{
    Action, Approval, Assignment, Cause, Clock, Deferral, Facts, Fleet, Member, News, Opening,
    Placement, Policy, Pulse, Refused, Report, Revert, Rollout, StateName, Step, Terms, Tick,
    Touched, UnixMs, Wave,
};
use trial::Trial;
pub use waves::joiner_release;

/// What to do now, and when to look again.
///
/// Goes on until nothing more follows from these facts, or so many devices were offered something as may be at once
/// ([`Fleet::offers_at_once`]): unless `wake_at` is `now`, applying the actions and calling it again with the same facts and
/// time yields none. Looks at every device and copies the records; [`advance_by`] does not.
#[must_use]
pub fn advance(rollout: &Rollout, fleet: &Fleet, now: UnixMs) -> Step {
    advance_by(&mut rollout.clone(), fleet, &News::All, now)
}

/// The same, looking only at devices of which something is new: what is known of them, their assignments, or that a
/// deadline of theirs has passed. Costs O((news + actions) × log devices + waves), however many devices there are; the
/// first look after a rollout was loaded, and one after it may conclude more from silence than before, is at all.
///
/// `news` must name every device whose facts differ from those of the last call with this `rollout`. The records of
/// `rollout` are as before when it returns; what it remembers of this look is not.
pub fn advance_by(rollout: &mut Rollout, fleet: &Fleet, news: &News, now: UnixMs) -> Step {
    let mut work = Work {
        trial: Trial::of(rollout),
        fleet,
        now,
        actions: Vec::new(),
        look_at: BTreeSet::new(),
        all: false,
        more: false,
    };
    work.see(news);
    work.run();
    let wake_at = if work.more { Some(now) } else { work.wake_at() };
    Step {
        actions: work.actions,
        wake_at,
    }
}

/// A rollout on its way through one [`advance_by`]: each action is applied as it is decided, so that the next one is
/// decided on what the records will look like; and taken back at the end.
struct Work<'a> {
    trial: Trial<'a>,
    fleet: &'a Fleet,
    now: UnixMs,
    actions: Vec<Action>,
    /// The devices to look at.
    look_at: BTreeSet<DeviceId>,
    /// Whether to look at all.
    all: bool,
    /// Whether there is more to offer than may be at once.
    more: bool,
}

/// Devices that a fast pace has due within so long may be offered at once, in milliseconds; no more than that is made
/// up for of a pace that was not used up.
const PACE_BURST_MS: u64 = 1_000;

impl Work<'_> {
    fn run(&mut self) {
        if self.trial.state == RolloutState::Completed {
            self.tail();
            return;
        }
        if self.trial.state.is_final() {
            return;
        }
        self.freeze_or_thaw();
        self.begin();
        self.observe();
        if self.trial.state == RolloutState::Running {
            self.forward();
        }
        if self.trial.state == RolloutState::RollingBack {
            self.back();
        }
    }

    /// Takes note of what is new.
    fn see(&mut self, news: &News) {
        let assignments = self.trial.assignments();
        let mut changed = assignments.take_changed();
        match news {
            News::Devices(devices) if assignments.looked().is_some() => {
                for device in devices {
                    assignments.see(device, self.fleet.devices.get(device));
                }
                for device in &changed {
                    assignments.see(device, self.fleet.devices.get(device));
                }
                changed.extend(devices.iter().cloned());
                self.look_at = changed;
            }
            News::Devices(_) | News::All => {
                assignments.see_all(&self.fleet.devices);
                self.all = true;
            }
        }
    }

    fn act(&mut self, action: Action) {
        self.trial.apply(&action, self.now);
        self.actions.push(action);
    }

    fn tick(&self) -> Tick {
        self.trial.clock.tick(self.now)
    }

    /// Whether the hub has listened long enough, since it was last deaf, to know who is online. A rollout that
    /// was opened while it listened has nothing to learn anew.
    fn settled(&self) -> bool {
        self.listened_for(self.fleet.settle_ms)
    }

    fn listened_for(&self, ms: u64) -> bool {
        self.fleet
            .listening_since
            .is_some_and(|since| since <= self.trial.created || self.now >= since.plus(ms))
    }

    fn freeze_or_thaw(&mut self) {
        let dark = self.fleet.pulse.mostly_dark();
        if self.settled() && dark != self.trial.frozen {
            self.act(if dark { Action::Freeze } else { Action::Thaw });
        }
    }

    fn patience(&self) -> Patience {
        let stands = if self.trial.state == RolloutState::Completed {
            self.dark()
        } else {
            self.trial.clock.stopped_at.is_some()
        };
        Patience {
            runs: self.settled() && !stands,
            silence_counts: self.listened_for(self.trial.policy.silent_margin_ms),
        }
    }

    fn observe(&mut self) {
        let (tick, patience) = (self.tick(), self.patience());
        let looked = self.trial.assignments.looked();
        let before = looked.filter(|looked| !self.all && looked.patience == patience);
        let news: Vec<_> = match before {
            None => {
                let devices = self.trial.assignments.keys();
                self.conclude(devices, tick, patience)
            }
            Some(before) => {
                let mut devices = std::mem::take(&mut self.look_at);
                // What follows from an earlier deadline was concluded, or waits for something else to change.
                let due = self.trial.assignments.due(before.tick, tick);
                devices.extend(due.cloned());
                self.conclude(devices.iter(), tick, patience)
            }
        };
        let tick = looked.map_or(tick, |looked| looked.tick.max(tick));
        let looked = Looked { tick, patience };
        self.trial.assignments().set_looked(looked);
        for action in news {
            self.act(action);
        }
    }

    fn conclude<'d>(
        &self,
        devices: impl Iterator<Item = &'d DeviceId>,
        tick: Tick,
        patience: Patience,
    ) -> Vec<Action> {
        let rollout: &Rollout = &self.trial;
        let observe = |device| {
            let assignment = rollout.assignments.get(device)?;
            let facts = self.fleet.devices.get(device);
            observe::observe(rollout, device, assignment, facts, tick, patience)
        };
        devices.filter_map(observe).collect()
    }

    /// A completed rollout still brings its release to those that come after its last wave, at their own pace and
    /// against a budget of their own. What became of a device after another end is for the next rollout to see.
    fn tail(&mut self) {
        self.observe();
        if self.trial.tail_stopped.is_some() || !self.settled() || self.dark() {
            return;
        }
        let budget = self.trial.policy.tail.failure_budget;
        if let Some(message) = budget::complaint(&self.trial, &budget, Part::Tail) {
            self.act(Action::StopTail {
                message: Some(message),
            });
            return;
        }
        self.put_off_the_absent();
        self.offer(Some(self.trial.policy.tail.pace));
    }

    /// A completed rollout has no clock that could stand still while most of the fleet is dark.
    const fn dark(&self) -> bool {
        self.fleet.pulse.mostly_dark()
    }

    /// A scheduled rollout begins when its time has come.
    fn begin(&mut self) {
        let due = self.trial.policy.start_at <= Some(self.now);
        if self.trial.state == RolloutState::Scheduled && due {
            self.act(Action::Enter {
                state: RolloutState::Running,
                cause: None,
                message: None,
            });
        }
    }

    fn forward(&mut self) {
        if self.budget_broke() || !self.settled() || self.trial.frozen {
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
        if self.trial.state != RolloutState::Running {
            return;
        }
        self.offer(self.trial.policy.pace);
        self.complete();
    }

    fn budget_broke(&mut self) -> bool {
        let waves = self.trial.waves.iter().zip(1_u32..);
        let own = waves.filter_map(|(wave, ordinal)| Some((wave.budget?, Part::Wave(ordinal))));
        let complaint = iter::once((self.trial.policy.budget, Part::Whole))
            .chain(own)
            .find_map(|(budget, part)| budget::complaint(&self.trial, &budget, part));
        let Some(message) = complaint else {
            return false;
        };
        self.fail(Cause::Budget, message);
        true
    }

    /// The first wave that has neither passed nor been skipped.
    fn current_wave(&self) -> Option<u32> {
        let over = |wave: &Wave| matches!(wave.state, WaveState::Passed | WaveState::Skipped);
        self.trial
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
        let Some(wave) = self.trial.wave(ordinal) else {
            return false;
        };
        let (state, bake_until, moved) = match wave.state {
            WaveState::Pending if budget::Tally::of_wave(&self.trial, ordinal).devices == 0 => {
                (WaveState::Skipped, None, true)
            }
            WaveState::Pending => (WaveState::Open, None, true),
            WaveState::Open | WaveState::Baking | WaveState::AwaitingApproval => {
                match gates::look(&self.trial, ordinal, wave, self.tick()) {
                    Gate::InProgress => return false,
                    Gate::NoCanary => return self.replace_canaries(ordinal),
                    Gate::AllFailed => {
                        self.fail_wave(ordinal);
                        return false;
                    }
                    Gate::Unwell(gate) => {
                        let message = analysis::message(&self.trial, ordinal, gate, "failed");
                        self.fail(Cause::Analysis, message);
                        return false;
                    }
                    Gate::Inconclusive(gate) => {
                        let message = analysis::message(&self.trial, ordinal, gate, "cannot tell");
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
        let assignments = &self.trial.assignments;
        let absent: BTreeSet<DeviceId> = self
            .opened()
            .flat_map(|group| assignments.queue(Queue::Absent(group)))
            .cloned()
            .collect();
        for device in absent {
            let facts = self.fleet.devices.get(&device);
            let deferral = match facts {
                Some(facts) if facts.held => Deferral::Held,
                Some(_) | None => Deferral::Offline,
            };
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

    /// Those whose devices may be offered the release, as far as waves decide (see [`Rollout::opened`]).
    fn opened(&self) -> impl Iterator<Item = Group> + use<> {
        let waves = self.trial.waves.iter().zip(1_u32..);
        let opened: Vec<Group> = waves
            .filter(|(wave, _)| wave.state != WaveState::Pending)
            .map(|(_, ordinal)| Group::Wave(ordinal))
            .chain([Group::Tail])
            .collect();
        opened.into_iter()
    }

    /// Where canaries are chosen by kind, each kind waits for one of its own.
    fn replace_canaries_of_kinds(&mut self, ordinal: u32) -> bool {
        let by_kind = self.trial.wave(ordinal).is_some_and(|wave| {
            wave.state == WaveState::Open && matches!(wave.target, WaveTarget::Canary(_))
        });
        by_kind && self.replace_canaries(ordinal)
    }

    fn replace_canaries(&mut self, ordinal: u32) -> bool {
        let replacements = waves::replacements(&self.trial, ordinal);
        let any = !replacements.is_empty();
        for action in replacements {
            self.act(action);
        }
        any
    }

    fn fail_wave(&mut self, ordinal: u32) {
        let tally = budget::Tally::of_wave(&self.trial, ordinal);
        let first = budget::first_failure(&self.trial, Part::Wave(ordinal));
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
            .trial
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
        let state = match self.trial.policy.on_failure {
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
        let tally = budget::Tally::of(&self.trial);
        let successes = if self.trial.state == RolloutState::Completed {
            budget::Tally::of_tail(&self.trial).succeeded
        } else {
            tally.succeeded
        };
        let free = self
            .trial
            .policy
            .max_unavailable
            .saturating_sub(tally.slots);
        for offered in 0..free {
            let Some(device) = self.next_candidate().cloned() else {
                return;
            };
            let facts = self.fleet.devices.get(&device);
            let placement = self.trial.assignments.get(&device).map_or_else(
                || self.trial.placement(),
                |assignment| self.trial.next_placement(assignment, facts),
            );
            let next = match pace {
                None => None,
                Some(_) if self.tick() < self.trial.next_offer => return,
                Some(pace) => {
                    let interval = pace.interval_ms(successes);
                    let late = PACE_BURST_MS.saturating_sub(interval);
                    let late = Tick(self.tick().0.saturating_sub(late));
                    Some(self.trial.next_offer.max(late).plus(interval))
                }
            };
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

    /// Who is offered the release next: of those that can be, the one of the lowest rank.
    fn next_candidate(&self) -> Option<&DeviceId> {
        let assignments = &self.trial.assignments;
        let first = |group| assignments.first(Queue::Ready(group));
        let (_, device) = self.opened().filter_map(first).min()?;
        Some(device)
    }

    /// Ends a rollout whose every wave passed and whose last straggler ended. Those that are still put off come
    /// after the last wave, whenever they return.
    fn complete(&mut self) {
        let tally = budget::Tally::of(&self.trial);
        if self.current_wave().is_some() || tally.in_progress > 0 || tally.planned > 0 {
            return;
        }
        let later: Vec<_> = self
            .trial
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
        for action in rollback::restores_at_once(&self.trial) {
            self.act(action);
        }
        for action in rollback::restores_in_turn(&self.trial) {
            self.act(action);
        }
        if let Some(end) = rollback::end(&self.trial) {
            self.act(end);
        }
    }

    /// The next moment after now at which time alone changes something.
    fn wake_at(&self) -> Option<UnixMs> {
        let rollout: &Rollout = &self.trial;
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
        let deadlines = &rollout.assignments;
        // What became due before the hub has listened for long enough counts when it has.
        let patient = patient
            && deadlines
                .first_deadline()
                .is_some_and(|first| rollout.clock.unix(first) <= heard);
        let later = rollout.clock.tick(self.now).plus(1);
        bakes
            .chain(
                deadlines
                    .deadline_from(later)
                    .map(|at| rollout.clock.unix(at)),
            )
            .chain(patient.then_some(heard))
            .chain(self.next_offer())
            .filter(|at| *at > self.now)
            .min()
    }

    /// When a device is due by the pace, if one waits for that alone.
    fn next_offer(&self) -> Option<UnixMs> {
        let rollout: &Rollout = &self.trial;
        let running = rollout.state == RolloutState::Running;
        let tail = rollout.state == RolloutState::Completed;
        let paced =
            (running && rollout.policy.pace.is_some()) || (tail && rollout.tail_stopped.is_none());
        let slots = budget::Tally::of(rollout).slots;
        let waits =
            paced && slots < rollout.policy.max_unavailable && self.next_candidate().is_some();
        waits.then(|| rollout.clock.unix(rollout.next_offer))
    }
}
