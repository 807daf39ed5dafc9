//! Which devices an app selects, and what becomes of those that come in, leave or are forgotten: what
//! `hub/src/controller/membership.rs` does, said once more here.

use std::collections::BTreeMap;

use foreshore_hub::rollout::{Action, Revert, Rollout, Terms};
use foreshore_protocol::api::RolloutState;
use foreshore_protocol::{AppName, DeviceId, Version};

use super::{BEACON_INTERVAL, Hub, Restored, Row, unix};
use crate::mutation::Mutation;
use crate::scenario::{App, GROUPS, MINUTE, Ms};

/// What an app selects by: a label that devices have or not, and one that operators give and take.
#[derive(Debug, Clone, Copy)]
pub struct Selector {
    group: Option<u64>,
    joiners_from: usize,
}

impl Selector {
    /// The selector of an app.
    #[must_use]
    pub const fn of(app: &App) -> Self {
        Self {
            group: app.group,
            joiners_from: app.joiners_from,
        }
    }

    fn matches(self, number: usize, labelled: Option<bool>) -> bool {
        let group = self
            .group
            .is_none_or(|group| number as u64 % GROUPS == group);
        group && labelled.unwrap_or(number < self.joiners_from)
    }
}

/// Whether a device was heard of lately, as far as a row tells.
pub(super) fn is_online(row: &Row, now: Ms) -> bool {
    let fresh = |seen| unix(now).since(seen) < 2 * BEACON_INTERVAL + MINUTE;
    row.online && row.last_seen.is_some_and(fresh)
}

impl Hub {
    /// The devices that each app selects.
    #[must_use]
    pub(super) fn all_members(&self) -> BTreeMap<AppName, std::collections::BTreeSet<DeviceId>> {
        let members = |app: &AppName| {
            let devices = self.store.devices.keys();
            devices
                .filter(|device| self.selects(app, device))
                .cloned()
                .collect()
        };
        let apps = self.selectors.keys();
        apps.map(|app| (app.clone(), members(app))).collect()
    }

    fn selects(&self, app: &AppName, device: &DeviceId) -> bool {
        let row = self.store.devices.get(device);
        let selector = self.selectors.get(app);
        selector.zip(row).is_some_and(|(selector, row)| {
            selector.matches(row.number, row.labelled.get(app).copied())
        })
    }

    /// An operator gives a device the label that an app selects by, or takes it.
    pub(super) fn label(&mut self, app: &AppName, device: &DeviceId, has: bool, now: Ms) {
        if let Some(row) = self.store.devices.get_mut(device) {
            row.labelled.insert(app.clone(), has);
            self.refresh(app, device, now);
        }
    }

    /// Brings a device's membership in step with its labels.
    fn refresh(&mut self, app: &AppName, device: &DeviceId, now: Ms) {
        let selected = self.selects(app, device);
        let members = self.store.members.entry(app.clone()).or_default();
        let changed = if selected {
            members.insert(device.clone())
        } else {
            members.remove(device)
        };
        match (changed, selected) {
            (false, _) => {}
            (true, true) => self.place_newcomer(app, device, now),
            (true, false) => {
                let keeps = self.mutation == Some(Mutation::LeaversKeepApps);
                if self.placed(app, device) && !keeps {
                    self.write(device, app, None, Terms::default(), now);
                }
                self.leave_rollout(app, device, now);
            }
        }
    }

    fn placed(&self, app: &AppName, device: &DeviceId) -> bool {
        let row = self.store.devices.get(device);
        row.is_some_and(|row| row.desired.contains_key(app))
    }

    pub(super) fn newest(&self, app: &AppName) -> Option<usize> {
        let rollouts = &self.store.rollouts;
        rollouts.iter().rposition(|rollout| rollout.app == *app)
    }

    pub(super) fn completed(&self, app: &AppName) -> Option<&Rollout> {
        let done =
            |rollout: &&Rollout| rollout.app == *app && rollout.state == RolloutState::Completed;
        self.store.rollouts.iter().rfind(done)
    }

    /// In the same transaction: a device that comes back before the rollout is looked at would keep its part in it.
    fn leave_rollout(&mut self, app: &AppName, device: &DeviceId, now: Ms) {
        let Some(index) = self.newest(app) else {
            return;
        };
        let rollout = &self.store.rollouts[index];
        let part = rollout.assignments.get(device);
        let takes_part = part.is_some_and(|part| part.revert != Some(Revert::Gone));
        if takes_part && !rollout.state.is_final() {
            let gone = Action::Reverted {
                device: device.clone(),
                revert: Revert::Gone,
                message: Some("the app no longer selects it".to_owned()),
            };
            self.act(index, &gone, None, now);
        }
    }

    fn place_newcomer(&mut self, app: &AppName, device: &DeviceId, now: Ms) {
        let Some(index) = self.newest(app) else {
            return;
        };
        let state = self.store.rollouts[index].state;
        if !state.is_final() || self.placed(app, device) {
            return;
        }
        if state == RolloutState::Completed {
            let join = Action::Tail {
                device: device.clone(),
                anew: Some(None),
            };
            self.act(index, &join, None, now);
        } else if let Some(completed) = self.completed(app) {
            let (placement, terms) = (completed.placement(), completed.policy.terms.clone());
            self.write(device, app, Some(placement), terms, now);
        }
    }

    /// Somebody speaks. One that nobody knows is a new device, unless nothing shows that it is there; whether it is known
    /// now. `has` is what it says that it has stored.
    pub(super) fn meet(
        &mut self,
        device: &DeviceId,
        is_there: bool,
        has: Option<Version>,
        retained: bool,
        now: Ms,
    ) -> bool {
        if self.store.devices.contains_key(device) {
            return true;
        }
        let Some(number) = self.numbers.get(device).copied().filter(|_| is_there) else {
            return false;
        };
        // It comes from an earlier life of this store, which the backup knows nothing of.
        let earlier = has.is_some_and(|has| has.epoch.get() < self.store.epoch)
            || (retained && self.store.epoch > 1);
        let row = Row {
            number,
            last_seen: Some(unix(now)),
            restored: earlier.then_some(Restored::Unheard(None)),
            ..Row::default()
        };
        self.store.devices.insert(device.clone(), row);
        let apps: Vec<AppName> = self.selectors.keys().cloned().collect();
        for app in apps {
            self.refresh(&app, device, now);
        }
        true
    }

    /// An operator gives a device up that is not connected.
    pub(super) fn forget(&mut self, device: &DeviceId, now: Ms) {
        let Some(row) = self.store.devices.get(device) else {
            return;
        };
        if is_online(row, now) {
            return;
        }
        let accepted = row.reported.as_ref().and_then(|said| said.version);
        let accepted = accepted.filter(|version| version.epoch.get() == self.store.epoch);
        let highest = [row.version, accepted].into_iter().flatten();
        let highest = highest.map(|version| version.generation.get()).max();
        self.store.forgotten = self.store.forgotten.max(highest.unwrap_or(0));
        self.store.devices.remove(device);
        self.store.outbox.remove(device);
        self.store.leases.retain(|(holder, _), _| holder != device);
        for members in self.store.members.values_mut() {
            members.remove(device);
        }
        for rollout in &mut self.store.rollouts {
            if rollout.assignments.get(device).is_some() {
                rollout.assignments.remove(device);
                self.store.incomplete.insert(rollout.id);
            }
        }
        self.contacts.remove(device);
        for ((of, _), at) in &mut self.changed {
            if of == device {
                *at = now;
            }
        }
    }
}
