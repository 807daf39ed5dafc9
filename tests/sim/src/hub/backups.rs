//! Backups of the hub's store, and what a restored one does with devices that have gone on without it: what
//! `hub/src/backup.rs`, `store::desired::begin_epoch` and `controller::ingest` do, said once more here.

use foreshore_protocol::{DeviceId, Version};

use super::{Hub, Store, unix};
use crate::mutation::Mutation;
use crate::scenario::Ms;

/// What a restored backup says of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Restored {
    /// The newest desired state that it was given until then; it has not said yet what it has.
    Unheard(Option<Version>),
    /// It has more, and keeps that until an operator says otherwise.
    Beyond,
}

impl Hub {
    /// Makes the store of a backup this hub's own. Its process is down.
    pub fn restore(&mut self, backup: &Store, now: Ms) {
        self.store = backup.clone();
        self.restored += 1;
        let at = unix(now).0 / 1_000;
        match self.mutation {
            Some(Mutation::KeepEpoch) => {}
            Some(Mutation::CountEpochs) => self.store.epoch += 1,
            _ => self.store.epoch = at.max(self.store.epoch + 1),
        }
        for row in self.store.devices.values_mut() {
            row.online = false;
            row.restored.get_or_insert(Restored::Unheard(row.version));
        }
        let told = self.store.devices.iter();
        let told = told.filter(|(_, row)| row.version.is_some());
        self.store.outbox = told.map(|(device, _)| device.clone()).collect();
        if self.mutation == Some(Mutation::TellAtOnce) {
            let devices: Vec<_> = self.store.outbox.iter().cloned().collect();
            for device in devices {
                self.bump(&device);
            }
            for row in self.store.devices.values_mut() {
                row.restored = None;
            }
        }
        // What anybody wants of them changed.
        for at in self.changed.values_mut() {
            *at = now;
        }
    }

    /// The devices whose heads are to be published, and may be.
    #[must_use]
    pub fn waiting(&self) -> Vec<DeviceId> {
        let told = |device: &&DeviceId| {
            let row = self.store.devices.get(*device);
            row.is_some_and(|row| row.restored.is_none())
        };
        self.store.outbox.iter().filter(told).cloned().collect()
    }

    /// A device said what it has, or (`None`) nothing of that. A restored hub lets those go on that have no more than the
    /// backup knows, and holds the others. Whether the device is to speak again.
    pub(super) fn compare(
        &mut self,
        device: &DeviceId,
        has: Option<Option<Version>>,
        retained: bool,
    ) -> bool {
        let epoch = self.store.epoch;
        let Some(row) = self.store.devices.get_mut(device) else {
            return false;
        };
        let (known, heard) = match row.restored {
            Some(Restored::Beyond) => return false,
            Some(Restored::Unheard(known)) => (known, false),
            None if self.mutation == Some(Mutation::CompareOnce) => return false,
            None => (row.version, true),
        };
        // What the broker retained may be older than what the device has stored since.
        let Some(has) = has.filter(|_| !retained || heard) else {
            return retained;
        };
        let beyond = has > known;
        let earlier = has.is_some_and(|has| has.epoch.get() < epoch);
        if beyond && (!heard || earlier) {
            row.restored = Some(Restored::Beyond);
            row.held = true;
            if self.verbose {
                self.log.push(format!(
                    "hub: {device} has {has:?}, beyond {known:?}: it is held"
                ));
            }
        } else if !heard {
            row.restored = None;
            if row.version > has {
                self.store.outbox.insert(device.clone());
            }
        }
        false
    }

    /// An operator holds a device, or lets it go. One that went on without a restored backup gives up by that what it has
    /// beyond it.
    pub(super) fn hold(&mut self, device: &DeviceId, held: bool) {
        let Some(row) = self.store.devices.get_mut(device) else {
            return;
        };
        row.held = held;
        if !held && row.restored.take().is_some() {
            self.bump(device);
        }
    }
}
