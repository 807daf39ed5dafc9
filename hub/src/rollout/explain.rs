//! Why a device is where it is in a rollout, and what it waits for: the questions that [`super::advance`] decides by,
//! answered for people.
//!
//! Each answer is one link of the chain from the rollout to what the device does, in order; the first link that does not
//! hold says what it waits for, and nothing is said of those behind it.

use foreshore_protocol::DeviceId;
use foreshore_protocol::api::{AssignmentState, ExplainStep, RolloutState, WaveState};
use foreshore_protocol::message::Phase;

use super::budget::Tally;
use super::state::{Assignment, Deferral, Facts, Fleet, Revert, Rollout, StateName, UnixMs, Wave};

/// The chain of a device in a rollout.
#[must_use]
pub fn explain(
    rollout: &Rollout,
    device: &DeviceId,
    fleet: &Fleet,
    now: UnixMs,
) -> Vec<ExplainStep> {
    let mut chain = Chain(Vec::new());
    let Some(assignment) = rollout.assignments.get(device) else {
        chain.stop(
            format!("it is not among the devices of rollout {}", rollout.id),
            "the end of the rollout: devices that join come after the last wave",
        );
        return chain.0;
    };
    let look = Look {
        rollout,
        assignment,
        facts: fleet.devices.get(device),
        fleet,
        now,
    };
    look.chain(&mut chain);
    chain.0
}

struct Chain(Vec<ExplainStep>);

impl Chain {
    fn hold(&mut self, what: impl Into<String>) {
        self.0.push(ExplainStep {
            what: what.into(),
            waits_for: None,
        });
    }

    fn stop(&mut self, what: impl Into<String>, waits_for: impl Into<String>) {
        self.0.push(ExplainStep {
            what: what.into(),
            waits_for: Some(waits_for.into()),
        });
    }
}

struct Look<'a> {
    rollout: &'a Rollout,
    assignment: &'a Assignment,
    facts: Option<&'a Facts>,
    fleet: &'a Fleet,
    now: UnixMs,
}

impl Look<'_> {
    fn chain(&self, chain: &mut Chain) {
        let Rollout { id, state, to, .. } = self.rollout;
        chain.hold(format!(
            "rollout {id} brings release {} and is {}",
            to.short(),
            StateName(*state)
        ));
        let place = match (self.assignment.tail, self.assignment.wave) {
            (true, _) => "after the last wave".to_owned(),
            (false, wave) => format!("in wave {wave} of {}", self.rollout.waves.len()),
        };
        chain.hold(format!(
            "it comes {place}, as number {}",
            self.assignment.rank + 1
        ));
        match self.assignment.state {
            AssignmentState::Planned => self.planned(chain),
            AssignmentState::Deferred => self.deferred(chain),
            AssignmentState::Offered => {
                chain.hold(self.offered());
                self.under_way(chain, None);
            }
            AssignmentState::Device(phase) => {
                chain.hold(self.offered());
                self.under_way(chain, Some(phase));
            }
            AssignmentState::Silent => chain.stop(
                format!("it went dark while switching{}", self.why()),
                "its report, or `foreshore rollout retry`",
            ),
            AssignmentState::Reverted => self.reverted(chain),
        }
    }

    /// `: why`, as it was recorded.
    fn why(&self) -> String {
        let message = self.assignment.message.as_ref();
        message.map_or_else(String::new, |message| format!(": {message}"))
    }

    /// What it was offered: the release itself, or one on its way there.
    fn offered(&self) -> String {
        match self.assignment.via {
            None => "the release was offered to it".to_owned(),
            Some(via) => format!(
                "it cannot go there from what it has, so release {} was offered to it first (requiresFrom)",
                via.short()
            ),
        }
    }

    fn planned(&self, chain: &mut Chain) {
        let what = if self.assignment.stepped {
            "it has taken a step on its way, and the next was not offered to it yet"
        } else {
            "nothing was offered to it yet"
        };
        match self.rollout.state {
            RolloutState::Scheduled => {
                return chain.stop(what, "the time at which the rollout begins");
            }
            RolloutState::Paused => {
                let why = self.rollout.message.clone().unwrap_or_default();
                let resume = "`foreshore rollout resume`";
                return chain.stop(format!("the rollout is paused: {why}"), resume);
            }
            RolloutState::RollingBack
            | RolloutState::RolledBack
            | RolloutState::RollbackPaused
            | RolloutState::Aborted
            | RolloutState::Superseded => {
                return chain.hold("it is offered nothing any more");
            }
            RolloutState::Running | RolloutState::Completed => {}
        }
        if let Some(message) = self.rollout.tail_stopped.as_ref() {
            return chain.stop(message.clone(), "`foreshore rollout resume`");
        }
        if self.fleet.listening_since.is_none() {
            return chain.stop("the hub does not hear the broker", "the broker");
        }
        if self.rollout.frozen || self.fleet.pulse.mostly_dark() {
            return chain.stop("most of the fleet is dark", "the fleet to be back");
        }
        if !self.rollout.opened(self.assignment) {
            return self.earlier_wave(chain);
        }
        let Some(facts) = self.facts else {
            return chain.hold("the app no longer selects it");
        };
        if facts.held {
            return chain.stop("an operator holds it", "`foreshore device release`");
        }
        if !facts.online {
            return chain.stop("it is offline", "the device to connect");
        }
        if facts.busy {
            return chain.stop(
                "another app's rollout changes it now",
                "that change to end: one at a time",
            );
        }
        let (slots, most) = (
            Tally::of(self.rollout).slots,
            self.rollout.policy.max_unavailable,
        );
        if slots >= most {
            return chain.stop(
                format!("{slots} devices are switching, and maxUnavailable is {most}"),
                "one of them to end",
            );
        }
        if self.rollout.clock.tick(self.now) < self.rollout.next_offer {
            return chain.stop(what, "its turn by the pace of the rollout");
        }
        chain.stop(what, "the hub's next look at it");
    }

    /// Which wave it waits for, and what that waits for.
    fn earlier_wave(&self, chain: &mut Chain) {
        let over = |wave: &Wave| matches!(wave.state, WaveState::Passed | WaveState::Skipped);
        let mut waves = self.rollout.waves.iter().zip(1_u32..);
        let Some((wave, ordinal)) = waves.find(|(wave, _)| !over(wave)) else {
            return;
        };
        let tally = Tally::of_wave(self.rollout, ordinal);
        let (what, waits_for) = match wave.state {
            WaveState::AwaitingApproval => (
                format!("wave {ordinal} has passed its gates"),
                "its approval: `foreshore rollout approve`".to_owned(),
            ),
            WaveState::Baking => (
                format!("wave {ordinal} bakes"),
                if wave.analysis.is_empty() {
                    "its bake to be over".to_owned()
                } else {
                    "its bake to be over, and its analysis to pass".to_owned()
                },
            ),
            WaveState::Failed => (
                format!("wave {ordinal} failed"),
                "`foreshore rollout resume`".to_owned(),
            ),
            WaveState::Open | WaveState::Pending | WaveState::Passed | WaveState::Skipped => (
                format!("wave {ordinal} is under way"),
                format!(
                    "wave {ordinal} to pass: {} of {} devices succeeded, {} failed, {} are in the middle of it",
                    tally.succeeded, tally.devices, tally.failed, tally.in_progress
                ),
            ),
        };
        chain.stop(what, waits_for);
    }

    fn deferred(&self, chain: &mut Chain) {
        let offered = self.assignment.since.is_some();
        if offered {
            chain.hold(self.offered());
        }
        let waits_for = match self.assignment.deferral {
            Some(Deferral::Offline) | None => "the device to connect",
            Some(Deferral::NotBegun) => "the device to begin; the offer stands",
            Some(Deferral::Held) => "`foreshore device release`",
        };
        chain.stop(format!("it is put off{}", self.why()), waits_for);
    }

    fn under_way(&self, chain: &mut Chain, phase: Option<Phase>) {
        let Some(facts) = self.facts else {
            return chain.hold("the app no longer selects it");
        };
        if facts.version < self.assignment.since {
            let waits_for = if facts.online {
                "the device to store it"
            } else {
                "the device to connect"
            };
            return chain.stop("it has not stored the offer yet", waits_for);
        }
        chain.hold("it has stored the offer");
        let why = self.why();
        match phase {
            None | Some(Phase::Accepted) => chain.stop("it has begun nothing yet", "the device"),
            Some(Phase::Staging) => chain.stop("it fetches the images", "the images to be there"),
            Some(Phase::Blocked) => chain.stop(
                format!("it cannot prepare the release{why}"),
                "that to pass; it tries again",
            ),
            Some(Phase::Waiting) => chain.stop(
                format!("nothing is wrong, and it waits{why}"),
                "its window to open, or its turn: only so many switch at once",
            ),
            Some(Phase::Activating) => chain.stop(
                "it replaces its containers",
                "every service to be ready, or the progress deadline",
            ),
            Some(Phase::Soaking) => {
                chain.stop("every service is ready", "the soak: they must stay so")
            }
            Some(Phase::Succeeded) => chain.hold("it runs the release, and well"),
            Some(Phase::Rejected) => chain.stop(format!("it refused the release{why}"), RETRY),
            Some(Phase::RolledBack) => chain.stop(
                format!("the release was not well there, and it went back by itself{why}"),
                RETRY,
            ),
            Some(Phase::Failed) => {
                chain.stop(format!("the release was not well there{why}"), RETRY)
            }
            Some(Phase::Removing) => chain.stop("it removes the app", "the device"),
        }
    }

    fn reverted(&self, chain: &mut Chain) {
        let why = self.why();
        match self.assignment.revert {
            Some(Revert::Gone) => chain.hold(format!("it takes no part any more{why}")),
            Some(Revert::Done) | None => {
                chain.hold(format!("it has its release of before again{why}"));
            }
            Some(Revert::Failed) => chain.stop(
                format!("it could not go back to its release of before{why}"),
                "`foreshore rollout resume`",
            ),
            Some(Revert::Switching | Revert::Settling) => chain.stop(
                format!("it was given its release of before{why}"),
                "the device to say that it has it",
            ),
        }
    }
}

const RETRY: &str = "`foreshore rollout retry`, or another release";
