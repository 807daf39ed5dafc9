//! The broker and the network: what is retained, lost, doubled and late, and who is connected.

use std::collections::BTreeMap;

use foreshore_protocol::message::Presence;

use super::wire::Sent;
use super::{Down, Event, Simulation, Up};
use crate::scenario::{MINUTE, Ms, SECOND};

/// When a broker publishes the Will of a device that is gone, as the agent asks it to.
const WILL_DELAY: Ms = 90 * SECOND;

/// What the broker keeps.
#[derive(Debug, Clone, Default)]
pub(super) struct Broker {
    pub(super) up: bool,
    pub(super) heads: BTreeMap<usize, Sent<Down>>,
    pub(super) presence: BTreeMap<usize, Sent<Up>>,
    pub(super) reported: BTreeMap<usize, Sent<Up>>,
}

impl Broker {
    pub(super) fn forget(&mut self, device: usize) {
        self.heads.remove(&device);
        self.presence.remove(&device);
        self.reported.remove(&device);
    }
}

impl Simulation {
    fn lost(&mut self) -> bool {
        let loss = self.scenario.loss;
        self.random.chance(loss)
    }

    fn copies(&mut self) -> usize {
        let duplication = self.scenario.duplication;
        1 + usize::from(self.random.chance(duplication))
    }

    pub(super) fn send_up(&mut self, device: usize, message: Up) {
        if self.devices[device].session.is_none() || !self.broker.up || self.lost() {
            return;
        }
        let message = self.retain(device, message);
        for _ in 0..self.copies() {
            let delay = self.random.between(5, self.scenario.delay);
            self.schedule(
                delay,
                Event::Up {
                    device,
                    message: message.clone(),
                    retained: false,
                },
            );
        }
    }

    /// Puts it on the wire; the broker keeps it, if it is of a kind that is kept.
    fn retain(&mut self, device: usize, message: Up) -> Sent<Up> {
        let message = self.written_by_device(device, message);
        let kept = match message.meant() {
            Up::Presence(_) => &mut self.broker.presence,
            Up::Reported(_) => &mut self.broker.reported,
            Up::Beacon(_) | Up::LeaseRequest(_) => return message,
        };
        kept.insert(device, message.clone());
        message
    }

    pub(super) fn send_down(&mut self, device: usize, message: Down) {
        let message = self.written_by_hub(message);
        self.deliver(device, &message);
    }

    pub(super) fn deliver(&mut self, device: usize, message: &Sent<Down>) {
        let Some(session) = self.devices[device].session else {
            return;
        };
        if !self.broker.up || self.lost() {
            return;
        }
        for _ in 0..self.copies() {
            let delay = self.random.between(5, self.scenario.delay);
            self.schedule(
                delay,
                Event::Down {
                    device,
                    session,
                    message: message.clone(),
                },
            );
        }
    }

    pub(super) fn reconnect(&mut self, device: usize) {
        let one = &self.devices[device];
        if one.powered && one.link && self.broker.up && one.session.is_none() {
            let life = one.life;
            let delay = self.random.between(100, MINUTE);
            self.schedule(delay, Event::Connect { device, life });
        }
    }

    pub(super) fn connect(&mut self, device: usize, life: u64) {
        let now = self.now;
        let broker_up = self.broker.up;
        let one = &mut self.devices[device];
        if one.life != life || !one.powered || !one.link || !broker_up || one.session.is_some() {
            return;
        }
        one.disk.sessions += 1;
        one.session = Some(one.disk.sessions);
        let presence = Presence {
            session: one.disk.sessions,
            online: true,
            boot: one.disk.starts,
            version: one.version(),
            reported_seq: one.reported.as_ref().map_or(0, |reported| reported.seq),
            max_schema: 1,
            agent_version: "0.1.0".to_owned(),
            secrets_key: None,
            secrets: None,
        };
        let reported = one
            .reported
            .clone()
            .filter(|reported| reported.seq > one.acknowledged);
        self.hub.contacts.insert(one.id.clone(), (true, now));
        self.note(|| format!("device-{device} connects"));
        self.send_up(device, Up::Presence(presence));
        if let Some(reported) = reported {
            self.report(device, reported);
        }
        if let Some(head) = self.broker.heads.get(&device).cloned() {
            self.deliver(device, &head);
        }
        self.schedule(0, Event::Poll { device, life });
    }

    pub(super) fn disconnect(&mut self, device: usize, will: bool) {
        let now = self.now;
        let one = &mut self.devices[device];
        if let Some(session) = one.session.take() {
            self.hub.contacts.insert(one.id.clone(), (false, now));
            self.note(|| format!("device-{device} loses its connection"));
            if will {
                self.schedule(WILL_DELAY, Event::Will { device, session });
            }
        }
    }

    pub(super) fn will(&mut self, device: usize, session: u64) {
        if !self.broker.up {
            return;
        }
        let back = self.devices[device].session.is_some();
        // Some brokers publish a Will although the device is back.
        if back && !self.random.chance(20) {
            return;
        }
        let presence = Presence {
            session,
            online: false,
            boot: 0,
            version: None,
            reported_seq: 0,
            max_schema: 1,
            agent_version: "0.1.0".to_owned(),
            secrets_key: None,
            secrets: None,
        };
        let message = self.retain(device, Up::Presence(presence));
        let delay = self.random.between(5, self.scenario.delay);
        self.schedule(
            delay,
            Event::Up {
                device,
                message,
                retained: false,
            },
        );
    }

    pub(super) fn broker_back(&mut self) {
        if self.broker.up {
            return;
        }
        self.note(|| "the broker is back".to_owned());
        self.broker.up = true;
        if self.hub.up {
            self.hub.listening_since = Some(crate::hub::unix(self.now));
            let now = self.now;
            self.transaction(|hub| hub.advance(now));
            self.hear_retained();
        }
        for device in 0..self.devices.len() {
            self.reconnect(device);
        }
    }

    pub(super) fn wipe(&mut self) {
        self.note(|| "the broker forgets what it retained".to_owned());
        self.broker.heads.clear();
        self.broker.presence.clear();
        self.broker.reported.clear();
    }
}
