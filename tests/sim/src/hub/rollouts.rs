//! Rollouts in the simulated hub: the real engine is asked, and what it decides is written. What the controller does around
//! it (`hub/src/controller/rollouts.rs`, `membership.rs`) is said once more here.

use std::collections::BTreeSet;

use foreshore_hub::rollout::check::{Rule, check, check_action};
use foreshore_hub::rollout::{
    Action, Facts, Fleet, News, Placement, Pulse, Report, Revert, Rollout, Terms, UnixMs,
    advance_by,
};
use foreshore_protocol::api::{AssignmentState, RolloutState};
use foreshore_protocol::message::AppStatus;
use foreshore_protocol::{AppName, DeviceId, Version};

use super::membership::is_online;
use super::{BEACON_INTERVAL, Hub, Row, START, unix, version};
use crate::mutation::Mutation;
use crate::scenario::{MINUTE, Ms, SECOND};

/// After that long even a hub that heard no Will knows that a device is dark: two beacon intervals, and what
/// messages may be late.
const DARK_FOR: Ms = 2 * BEACON_INTERVAL + 3 * MINUTE;

/// Few, so that even small fleets take more than one look.
const OFFERS_AT_ONCE: u32 = 3;

impl Hub {
    pub(super) fn advance_rollouts(&mut self, now: Ms) {
        self.wake_at = None;
        for index in 0..self.store.rollouts.len() {
            if !self.is_newest(index) {
                continue;
            }
            let fleet = self.fleet(&self.store.rollouts[index], now);
            let ended = self.store.rollouts[index].state.is_final();
            let news = self.news(index, &fleet);
            let quiet = matches!(&news, News::Devices(devices) if devices.is_empty());
            let step = advance_by(&mut self.store.rollouts[index], &fleet, &news, unix(now));
            let actions = self.mutate(&step.actions, index, &fleet, now);
            for action in &actions {
                self.act(index, action, Some(&fleet), now);
            }
            if self.store.rollouts[index].state.is_final() && !ended {
                self.settle(index, now);
                // Those that it took in just now.
                self.wake_at = Some(now + 1);
            }
            // Records change by actions alone, and what is derived from them by news as well.
            if !quiet || !actions.is_empty() {
                self.check_rollout(index);
            }
            let wake = step
                .wake_at
                .map(|at| at.0.saturating_sub(START).max(now + 1));
            self.wake_at = [self.wake_at, wake].into_iter().flatten().min();
        }
    }

    /// What is new of the devices of a rollout since the engine last looked at it.
    fn news(&mut self, index: usize, fleet: &Fleet) -> News {
        let id = self.store.rollouts[index].id;
        let Some(before) = self.known.insert(id, fleet.devices.clone()) else {
            return News::All;
        };
        if self.mutation == Some(Mutation::MissNews) {
            return News::Devices(BTreeSet::new());
        }
        let devices = before.keys().chain(fleet.devices.keys());
        let differs = |device: &&DeviceId| before.get(*device) != fleet.devices.get(*device);
        News::Devices(devices.filter(differs).cloned().collect())
    }

    /// Only the newest rollout of an app decides anything.
    pub(super) fn is_newest(&self, index: usize) -> bool {
        let rollouts = &self.store.rollouts;
        rollouts
            .get(index + 1..)
            .is_none_or(|newer| newer.iter().all(|newer| newer.app != rollouts[index].app))
    }

    /// What the controller does for members outside a rollout that has ended (`controller::membership`).
    pub(super) fn settle(&mut self, index: usize, now: Ms) {
        let rollout = &self.store.rollouts[index];
        let (app, state) = (rollout.app.clone(), rollout.state);
        let Some(completed) = self.completed(&app) else {
            return;
        };
        let (placement, terms) = (completed.placement(), completed.policy.terms.clone());
        for device in self.store.members[&app].clone() {
            let placed = self.store.devices[&device].desired.get(&app);
            let placed = placed.map(|(placement, _)| *placement);
            if state == RolloutState::Completed {
                let part = self.store.rollouts[index].assignments.get(&device);
                let outside = part.is_none_or(|part| part.revert == Some(Revert::Gone));
                if outside && placed.is_none_or(|placed| placed.release != placement.release) {
                    let join = Action::Tail {
                        device,
                        anew: Some(placed),
                    };
                    self.act(index, &join, None, now);
                }
            } else if placed.is_none() {
                self.write(&device, &app, Some(placement), terms.clone(), now);
            }
        }
    }

    fn fleet(&self, rollout: &Rollout, now: Ms) -> Fleet {
        let online = |row: &Row| is_online(row, now);
        let members = self.store.members.get(&rollout.app);
        let devices = rollout.assignments.keys().filter_map(|device| {
            // One that the app does not select any more is not there.
            members.filter(|members| members.contains(device))?;
            let row = self.store.devices.get(device)?;
            let status = row.reported.as_ref().and_then(|reported| {
                reported
                    .apps
                    .iter()
                    .find(|status| status.app == rollout.app)
            });
            let facts = Facts {
                online: online(row),
                last_seen: row.last_seen,
                version: row.reported.as_ref().and_then(|reported| reported.version),
                report: status.map(report),
                leased: self
                    .store
                    .leases
                    .get(&(device.clone(), rollout.app.clone()))
                    .and_then(|entry| entry.held.as_ref())
                    .map(|held| held.since),
                held: row.held,
                busy: self.is_busy(device, rollout),
            };
            Some((device.clone(), facts))
        });
        let blind = self.mutation == Some(Mutation::BlameDarkness);
        let pulse = Pulse::count(
            self.store
                .devices
                .values()
                .map(|row| (online(row) || blind, row.last_seen)),
            rollout.pulse_since(),
        );
        Fleet {
            devices: devices.collect(),
            pulse,
            listening_since: if blind {
                Some(UnixMs(0))
            } else {
                self.listening_since
            },
            settle_ms: 10 * SECOND,
            offers_at_once: OFFERS_AT_ONCE,
        }
    }

    /// Whether the newest rollout of another app has the device in hand.
    fn is_busy(&self, device: &DeviceId, rollout: &Rollout) -> bool {
        let others = self.store.rollouts.iter().enumerate();
        others
            .filter(|(index, other)| {
                let looked_at = !other.state.is_final() || other.state == RolloutState::Completed;
                other.app != rollout.app && looked_at && self.is_newest(*index)
            })
            .filter_map(|(_, other)| other.assignments.get(device))
            .any(foreshore_hub::rollout::Assignment::holds_slot)
    }

    pub(super) fn act(&mut self, index: usize, action: &Action, fleet: Option<&Fleet>, now: Ms) {
        let rollout = &self.store.rollouts[index];
        if self.verbose {
            self.log.push(format!(
                "hub: rollout {} of {}: {action:?}",
                rollout.id, rollout.app
            ));
        }
        if let Some(fleet) = fleet {
            let wrong = check_action(rollout, action, fleet, unix(now));
            self.violations.extend(
                wrong
                    .iter()
                    .map(|wrong| format!("rollout {}: {action:?} breaks {wrong}", rollout.id)),
            );
        }
        let silent = matches!(
            action,
            Action::Assign {
                state: AssignmentState::Silent,
                ..
            }
        );
        if silent && self.is_truly_dark(rollout, now) {
            self.violations.push(format!(
                "rollout {}: {action:?} while most of the fleet is dark",
                rollout.id
            ));
        }
        self.check_said(index, action);
        let rollout = &self.store.rollouts[index];
        let app = rollout.app.clone();
        let terms = match action {
            Action::Offer { .. } => rollout.policy.terms.clone(),
            _ => Terms::default(),
        };
        let written = action
            .writes()
            .map(|(device, placement)| self.write(device, &app, placement, terms, now));
        let rollout = &mut self.store.rollouts[index];
        rollout.apply(action, written, unix(now));
        if let Action::Enter { state, .. } = action {
            self.history.push((now, rollout.id, *state));
        }
    }

    /// Whether most of those devices that were there around the rollout are cut off from the hub, whatever the hub
    /// believes.
    fn is_truly_dark(&self, rollout: &Rollout, now: Ms) -> bool {
        let around =
            |(connected, at): &&(bool, Ms)| *connected || unix(*at) >= rollout.pulse_since();
        let (recent, dark) = self.contacts.values().filter(around).fold(
            (0, 0),
            |(recent, dark), (connected, at)| {
                (
                    recent + 1,
                    dark + u64::from(!connected && at + DARK_FOR < now),
                )
            },
        );
        dark * 2 > recent
    }

    pub(super) fn write(
        &mut self,
        device: &DeviceId,
        app: &AppName,
        placement: Option<Placement>,
        terms: Terms,
        now: Ms,
    ) -> Version {
        self.changed.insert((device.clone(), app.clone()), now);
        let release = placement.map(|placement| placement.release);
        self.writes.push((now, device.clone(), release));
        let since = self.bump(device);
        let row = self.store.devices.entry(device.clone()).or_default();
        match placement {
            Some(placement) => {
                row.desired.insert(app.clone(), (placement, since));
                row.terms.insert(app.clone(), terms);
            }
            None => {
                row.desired.remove(app);
                row.terms.remove(app);
            }
        }
        since
    }

    /// Gives a device its next version, and lets it be told.
    pub(super) fn bump(&mut self, device: &DeviceId) -> Version {
        let forgotten = self.store.forgotten;
        let row = self.store.devices.entry(device.clone()).or_default();
        let before = row
            .version
            .map_or(forgotten, |known| known.generation.get());
        let next = version(self.store.epoch, before + 1);
        row.version = Some(next);
        self.store.outbox.insert(device.clone());
        next
    }

    pub(super) fn check_rollout(&mut self, index: usize) {
        let rollout = &self.store.rollouts[index];
        // Who was forgotten left a gap in its wave.
        let gaps = self.store.incomplete.contains(&rollout.id);
        let broken = check(rollout).into_iter();
        for wrong in broken.filter(|wrong| !gaps || wrong.rule != Rule::WaveSizes) {
            self.violations
                .push(format!("rollout {}: {wrong}", rollout.id));
        }
    }

    /// What is still unfinished although the network is whole: rollouts that neither ended nor say what they wait
    /// for. The rules of [`Rule::FinalIsFinal`] hold for those that ended.
    #[must_use]
    pub fn unfinished(&self) -> Vec<String> {
        let waits = |rollout: &&Rollout| match rollout.state {
            RolloutState::Paused | RolloutState::RollbackPaused => {
                rollout.message.is_none() || rollout.frozen
            }
            RolloutState::Scheduled | RolloutState::Running | RolloutState::RollingBack => true,
            RolloutState::Completed if self.has_stragglers(rollout) => true,
            RolloutState::Completed
            | RolloutState::Aborted
            | RolloutState::RolledBack
            | RolloutState::Superseded => check(rollout)
                .iter()
                .any(|wrong| wrong.rule == Rule::FinalIsFinal),
        };
        let of = |rollout: &Rollout| {
            format!(
                "rollout {} of {} is {:?}",
                rollout.id, rollout.app, rollout.state
            )
        };
        let rollouts = self.store.rollouts.iter().enumerate();
        rollouts
            .filter(|(index, rollout)| {
                waits(rollout) && (self.is_newest(*index) || !rollout.state.is_final())
            })
            .map(|(_, rollout)| of(rollout))
            .collect()
    }

    /// Whether devices that come after the last wave have yet to end, and nothing says that they shall not.
    fn has_stragglers(&self, rollout: &Rollout) -> bool {
        let open = |assignment: &foreshore_hub::rollout::Assignment| {
            assignment.tail && !assignment.has_ended() && assignment.revert.is_none()
        };
        rollout.tail_stopped.is_none() && rollout.assignments.values().any(open)
    }
}

fn report(status: &AppStatus) -> Report {
    Report {
        since: status.since,
        release: status.release,
        phase: status.phase,
        reason: status.reason.as_ref().map(|reason| reason.message.clone()),
        has: status.last_known_good.or(status.running),
    }
}
