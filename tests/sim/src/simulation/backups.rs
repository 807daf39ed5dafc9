//! Copies of the hub's store, and what must hold when one is put back: no version is given out twice, and no device goes
//! back to what a backup says before somebody said so.

use foreshore_protocol::message::Head;
use foreshore_protocol::{AppName, Version};

use super::Simulation;
use crate::scenario::Ms;

impl Simulation {
    pub(super) fn back_up(&mut self) {
        self.backups.push(self.hub.store.clone());
    }

    /// The hub's disk is lost; after `away` it runs on a backup.
    pub(super) fn restore(&mut self, which: usize, away: Ms) {
        let last = self.backups.len().saturating_sub(1);
        let Some(backup) = self.backups.get(which.min(last)).cloned() else {
            return;
        };
        if !self.hub.up {
            return;
        }
        self.hub_dies(away);
        self.note(|| format!("its disk is lost; it will run on backup {which}"));
        let now = self.now;
        self.hub.restore(&backup, now);
        self.old_turns.extend(self.unknown_turns());
        self.beyond = (0..self.devices.len())
            .filter(|number| {
                let one = &self.devices[*number];
                let known = backup.devices.get(&one.id).and_then(|row| row.version);
                one.version() > known
            })
            .collect();
    }

    /// The turns that devices switch in and that the hub knows nothing of.
    fn unknown_turns(&self) -> Vec<(usize, AppName, Version)> {
        let of = |device: usize| {
            let switching = self.devices[device].switching().into_iter();
            switching.map(move |(app, since)| (device, app.clone(), since))
        };
        (0..self.devices.len())
            .flat_map(of)
            .filter(|(device, app, since)| self.has_old_turn(*device, app, *since))
            .collect()
    }

    /// A version names one desired state, whatever life of the hub's store it comes from.
    pub(super) fn check_issue(&mut self, device: usize, head: &Head) {
        let known = self.issued.entry((device, head.version));
        let known = known.or_insert_with(|| head.apps.clone());
        if *known != head.apps {
            let version = head.version;
            self.violations.push(format!(
                "version {version} of device-{device} was given out twice, with different content"
            ));
        }
    }

    /// A device took a head of that life of the hub's store.
    pub(super) fn check_restored(&mut self, device: usize, life: u64, now: Option<Version>) {
        if life == self.hub.restored && self.beyond.contains(&device) {
            self.violations.push(format!(
                "device-{device} went on without the backup, and its hub overruled it with {now:?} before anybody said so"
            ));
        }
    }
}
