//! [`Change`]: one transaction at hand, its time, and what follows from it once it is committed.

use std::collections::BTreeSet;

use foreshore_protocol::message::Lease;
use foreshore_protocol::{AppName, DeviceId, ServiceName};
use rusqlite::Connection;

use super::Listening;
use super::lives::Lives;
use crate::rollout::UnixMs;
use crate::store::{self, event::NewEvent};

/// A transaction, and what its author must know.
#[derive(Debug)]
pub struct Change<'a> {
    /// The transaction.
    pub connection: &'a Connection,
    /// Now, the same for the whole change.
    pub now: UnixMs,
    /// What the hub hears.
    pub listening: Listening,
    /// The rollouts that are kept in memory.
    pub lives: &'a mut Lives,
    /// What follows.
    pub effects: Effects,
}

/// What follows from a change once it is committed. Losing it to a crash is harmless: the loop starts by
/// looking at every live rollout, the publisher by looking into the outbox.
#[derive(Debug, Default)]
pub struct Effects {
    /// Apps whose rollout has news.
    pub dirty: BTreeSet<AppName>,
    /// Something waits in the outbox.
    pub publish: bool,
    /// An event was recorded.
    pub events: bool,
    /// It may be somebody's turn to switch.
    pub turns: bool,
    /// A rollout with analysis has changed.
    pub analysis: bool,
    /// What devices are to be sent.
    pub leases: Vec<(DeviceId, Lease)>,
}

impl Change<'_> {
    /// Begins an event; [`EventDraft::record`] ends it.
    pub fn event(&mut self, kind: &str) -> EventDraft<'_> {
        EventDraft {
            connection: self.connection,
            now: self.now,
            recorded: &mut self.effects.events,
            event: NewEvent {
                kind: kind.to_owned(),
                ..NewEvent::default()
            },
        }
    }

    /// Every live rollout has news.
    ///
    /// # Errors
    ///
    /// When SQLite fails.
    pub fn touch_live(&mut self) -> rusqlite::Result<()> {
        self.effects
            .dirty
            .extend(store::rollout::live_apps(self.connection)?);
        Ok(())
    }
}

/// An event that is being put together.
#[derive(Debug)]
pub struct EventDraft<'a> {
    connection: &'a Connection,
    now: UnixMs,
    recorded: &'a mut bool,
    event: NewEvent,
}

impl EventDraft<'_> {
    /// From or about which device.
    #[must_use]
    pub fn device(mut self, device: &DeviceId) -> Self {
        self.event.device = Some(device.clone());
        self
    }

    /// About which app.
    #[must_use]
    pub fn app(mut self, app: &AppName) -> Self {
        self.event.app = Some(app.clone());
        self
    }

    /// About which service.
    #[must_use]
    pub fn service(mut self, service: Option<&ServiceName>) -> Self {
        self.event.service = service.cloned();
        self
    }

    /// About which rollout.
    #[must_use]
    pub const fn rollout(mut self, id: u64) -> Self {
        self.event.rollout = Some(id);
        self
    }

    /// Records it.
    ///
    /// # Errors
    ///
    /// When SQLite fails.
    pub fn record(mut self, message: impl Into<String>) -> rusqlite::Result<()> {
        self.event.message = message.into();
        store::event::insert(self.connection, &self.event, self.now)?;
        *self.recorded = true;
        Ok(())
    }
}
