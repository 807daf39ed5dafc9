//! Rollouts that the writer keeps in memory from one transaction to the next, with what is known of their devices, so
//! that a report costs what it changes and not what there is.
//!
//! SQLite is the truth, and nothing rests on this: what is not here is loaded, what a transaction that failed had
//! touched is dropped, and after a batch that was not committed all is. Changes of facts come from
//! [`store::news`], which no code can forget to tell; changes of records are made here and written in the same
//! transaction ([`super::rollouts`]).
//!
//! A device of a rollout takes about a kilobyte ([`MAX_DEVICES`]).

use std::collections::{BTreeMap, BTreeSet};

use foreshore_protocol::DeviceId;
use foreshore_protocol::api::RolloutState;
use rusqlite::Connection;

use super::rollouts::OFFERS_AT_ONCE;
use crate::rollout::{Facts, Fleet, News, Rollout, UnixMs};
use crate::store;

/// Devices of all rollouts that are kept, together; the rollout that was used last is kept however large it is.
pub const MAX_DEVICES: usize = 250_000;

/// A completed rollout that nobody looked at for so many changes is dropped by [`Lives::tidy`].
const KEEP_CHANGES: u64 = 10_000;

/// The rollouts that are kept.
#[derive(Debug, Default)]
pub struct Lives {
    kept: BTreeMap<u64, Live>,
    /// Changed by the transaction at hand.
    touched: BTreeSet<u64>,
    /// How many changes there were.
    changes: u64,
    /// [`store::Store::undone`] when a change last began.
    undone: u64,
}

/// A rollout with what is known of its devices.
#[derive(Debug)]
pub struct Live {
    /// It.
    pub rollout: Rollout,
    /// Its devices; the rest of it is filled in for each look.
    pub fleet: Fleet,
    /// What changed since the last look.
    pub news: News,
    /// When it is to be looked at again, as it is written; `None`: not known.
    pub wake_at: Option<Option<UnixMs>>,
    used: u64,
}

impl Live {
    /// A rollout as it is in the store.
    ///
    /// # Errors
    ///
    /// When SQLite fails.
    pub fn of(connection: &Connection, rollout: Rollout) -> rusqlite::Result<Self> {
        let devices = store::rollout::facts(connection, &rollout)?;
        Ok(Self {
            rollout,
            fleet: Fleet {
                devices,
                offers_at_once: OFFERS_AT_ONCE,
                ..Fleet::default()
            },
            news: News::All,
            wake_at: None,
            used: 0,
        })
    }

    /// Reads what is known of devices that take part from now on.
    ///
    /// # Errors
    ///
    /// When SQLite fails.
    pub fn read_missing(
        &mut self,
        connection: &Connection,
        devices: &[DeviceId],
    ) -> rusqlite::Result<()> {
        for device in devices {
            self.refresh(connection, device)?;
        }
        Ok(())
    }

    /// Reads anew what is known of a device; whether it takes part.
    fn refresh(&mut self, connection: &Connection, device: &DeviceId) -> rusqlite::Result<bool> {
        if !self.rollout.assignments.contains_key(device) {
            return Ok(false);
        }
        let known = self.fleet.devices.get(device);
        let facts = match store::rollout::facts_of(connection, &self.rollout, device)? {
            Some(facts) => facts,
            None => {
                self.rollout.assignments.remove(device);
                None
            }
        };
        if facts.as_ref().map(deciding) == known.map(deciding) {
            return Ok(true);
        }
        match facts {
            Some(facts) => self.fleet.devices.insert(device.clone(), facts),
            None => self.fleet.devices.remove(device),
        };
        if let News::Devices(devices) = &mut self.news {
            devices.insert(device.clone());
        }
        Ok(true)
    }
}

/// Facts without what nothing is decided by.
fn deciding(facts: &Facts) -> Facts {
    Facts {
        last_seen: None,
        ..facts.clone()
    }
}

impl Lives {
    /// A change begins. `undone` is what [`store::Store::undone`] says now.
    pub fn begin(&mut self, undone: u64) {
        if self.undone != undone {
            self.kept.clear();
            self.undone = undone;
        }
        self.touched.clear();
        self.changes += 1;
    }

    /// The change failed: what it had touched is not as it is in the store.
    pub fn fail(&mut self) {
        for id in std::mem::take(&mut self.touched) {
            self.kept.remove(&id);
        }
    }

    /// Brings what is kept in step with what changed in the store.
    ///
    /// # Errors
    ///
    /// When SQLite fails; then [`Self::fail`] must be called.
    pub fn sync(&mut self, connection: &Connection) -> rusqlite::Result<()> {
        let noted = store::news::take(connection)?;
        for id in &noted.gone {
            self.kept.remove(id);
        }
        for device in noted.devices {
            for (id, live) in &mut self.kept {
                if live.refresh(connection, &device)? {
                    self.touched.insert(*id);
                }
            }
        }
        Ok(())
    }

    /// Whether a rollout is kept.
    #[must_use]
    pub fn has(&self, id: u64) -> bool {
        self.kept.contains_key(&id)
    }

    /// Takes a rollout out, loading it if it is not kept; `None`: there is none. [`Self::put`] it back if all went
    /// well: while it is out, nobody else must change it.
    ///
    /// # Errors
    ///
    /// When SQLite fails.
    pub fn take(&mut self, connection: &Connection, id: u64) -> rusqlite::Result<Option<Live>> {
        self.sync(connection)?;
        if let Some(live) = self.kept.remove(&id) {
            return Ok(Some(live));
        }
        let Some(rollout) = store::rollout::get(connection, id)? else {
            return Ok(None);
        };
        Live::of(connection, rollout).map(Some)
    }

    /// Keeps a rollout, unless it is over.
    pub fn put(&mut self, mut live: Live) {
        let over = match live.rollout.state {
            RolloutState::Aborted | RolloutState::RolledBack | RolloutState::Superseded => true,
            // Its last devices may still come.
            RolloutState::Completed
            | RolloutState::Scheduled
            | RolloutState::Running
            | RolloutState::Paused
            | RolloutState::RollingBack
            | RolloutState::RollbackPaused => false,
        };
        if over {
            return;
        }
        let id = live.rollout.id;
        live.used = self.changes;
        self.touched.insert(id);
        self.kept.insert(id, live);
        self.bound(id);
    }

    /// Drops those that were not used for longest until the rest has at most [`MAX_DEVICES`].
    fn bound(&mut self, except: u64) {
        let devices = |live: &Live| live.rollout.assignments.len();
        let mut all: usize = self.kept.values().map(devices).sum();
        while all > MAX_DEVICES {
            let others = self.kept.iter().filter(|(id, _)| **id != except);
            let Some((id, _)) = others.min_by_key(|(_, live)| live.used) else {
                return;
            };
            let id = *id;
            if let Some(live) = self.kept.remove(&id) {
                all -= devices(&live);
            }
        }
    }

    /// Drops rollouts that completed a while ago.
    pub fn tidy(&mut self) {
        let oldest = self.changes.saturating_sub(KEEP_CHANGES);
        self.kept
            .retain(|_, live| !live.rollout.state.is_final() || live.used >= oldest);
    }

    /// How many devices the kept rollouts have together.
    #[must_use]
    pub fn devices(&self) -> usize {
        let each = self
            .kept
            .values()
            .map(|live| live.rollout.assignments.len());
        each.sum()
    }

    /// What of the kept rollouts is not as it is in the store; `None`: nothing, as it must be.
    ///
    /// # Errors
    ///
    /// When SQLite fails.
    pub fn discrepancy(&mut self, connection: &Connection) -> rusqlite::Result<Option<String>> {
        self.sync(connection)?;
        for (id, live) in &self.kept {
            let Some(stored) = store::rollout::get(connection, *id)? else {
                return Ok(Some(format!("there is no rollout {id}")));
            };
            if stored != live.rollout {
                return Ok(Some(format!("{:#?}, stored {stored:#?}", live.rollout)));
            }
            let facts = store::rollout::facts(connection, &stored)?;
            let kept = live.fleet.devices.iter();
            let kept = kept.map(|(device, facts)| (device, deciding(facts)));
            if !kept.eq(facts
                .iter()
                .map(|(device, facts)| (device, deciding(facts))))
            {
                return Ok(Some(format!(
                    "facts of rollout {id}: {:#?}, stored {facts:#?}",
                    live.fleet.devices
                )));
            }
            if let Some(wrong) = live.rollout.assignments.discrepancy() {
                return Ok(Some(wrong));
            }
        }
        Ok(None)
    }
}
