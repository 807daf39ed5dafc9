//! Liveness: once everything is whole again, all must come to rest.

use foreshore_protocol::message::Phase;

use super::{Event, Simulation};
use crate::scenario::{Command, HOUR, MINUTE, Ms};

/// How long after everything is whole again all must have come to rest.
const PATIENCE: Ms = 24 * HOUR;

impl Simulation {
    /// Whether all is at rest. If it never is, that is a violation.
    pub(super) fn is_at_rest(&mut self) -> bool {
        // What waits for an operator is not at rest, and they are there now.
        for app in 0..self.scenario.apps.len() {
            self.operate(app, Command::Approve);
        }
        for device in 0..self.devices.len() {
            let row = self.hub.store.devices.get(&self.devices[device].id);
            if row.is_some_and(|row| row.held || row.restored.is_some()) {
                self.operate(0, Command::Hold(device, false));
            }
        }
        let mut open = self.hub.unfinished();
        open.extend((0..self.devices.len()).filter_map(|device| self.restless(device)));
        if open.is_empty() {
            return true;
        }
        if self.now > self.scenario.heals_at + PATIENCE {
            self.violations.extend(
                open.into_iter()
                    .map(|what| format!("never came to rest: {what}")),
            );
            return true;
        }
        self.schedule(10 * MINUTE, Event::Looks);
        false
    }

    /// Liveness of a device: it has accepted the newest desired state, says so, and for each app either runs what is
    /// desired or says for good why not, and then runs its last-known-good.
    fn restless(&self, device: usize) -> Option<String> {
        let one = &self.devices[device];
        let head = self.hub.head(&one.id);
        if head.is_none() && self.forgotten.contains(&device) {
            // It came back, and nobody wants anything of it.
            return None;
        }
        let strange = head.iter().flat_map(|head| &head.apps).find(|wanted| {
            let members = self.hub.store.members.get(&wanted.app);
            !members.is_some_and(|members| members.contains(&one.id))
        });
        if let Some(strange) = strange {
            return Some(format!(
                "{} has {}, which does not select it",
                one.id, strange.app
            ));
        }
        let version = head.as_ref().map(|head| head.version);
        if one.version() != version {
            return Some(format!(
                "{} has accepted {:?}, not {version:?}",
                one.id,
                one.version()
            ));
        }
        let known = self
            .hub
            .store
            .devices
            .get(&one.id)
            .and_then(|row| row.reported.as_ref());
        if known != one.reported.as_ref() {
            return Some(format!(
                "the hub does not know the last report of {}",
                one.id
            ));
        }
        let statuses = one
            .reported
            .as_ref()
            .map_or(&[][..], |reported| &reported.apps);
        let wanted = head.map_or_else(Vec::new, |head| head.apps);
        if statuses.len() != wanted.len() {
            return Some(format!(
                "{} reports {} apps, not {}",
                one.id,
                statuses.len(),
                wanted.len()
            ));
        }
        wanted.iter().zip(statuses).find_map(|(wanted, status)| {
            let about = (&status.app, status.since, status.release)
                == (&wanted.app, wanted.since, wanted.release);
            let well = match status.phase {
                Phase::Succeeded => status.running == Some(wanted.release),
                Phase::RolledBack => {
                    status.running.is_some() && status.running == status.last_known_good
                }
                Phase::Failed | Phase::Rejected => true,
                Phase::Accepted
                | Phase::Staging
                | Phase::Blocked
                | Phase::Activating
                | Phase::Soaking
                | Phase::Removing => false,
                // Nobody gets a turn while an operator is to look.
                Phase::Waiting => self.hub.is_paused(&status.app),
            };
            (!about || !well).then(|| format!("{}: {wanted:?} but {status:?}", one.id))
        })
    }
}
