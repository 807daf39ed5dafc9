//! The hub's process: transactions that happen wholly or not at all, what it hears and what it publishes.

use std::sync::Arc;

use foreshore_hub::rollout::analysis::Question;
use foreshore_protocol::DeviceId;

use super::wire::Sent;
use super::{Down, Event, Simulation, Told, Up};
use crate::hub::{Hub, Store};
use crate::mutation::Mutation;
use crate::scenario::{Command, Ms, SECOND};

impl Simulation {
    /// One transaction: done wholly or, with the process, not at all.
    pub(super) fn transaction<T>(&mut self, act: impl FnOnce(&mut Hub) -> T) -> Option<T> {
        let before: Option<Store> = self.tear.is_some().then(|| self.hub.store.clone());
        let done = act(&mut self.hub);
        if let (Some(before), Some(away)) = (before, self.tear.take()) {
            self.note(|| "the hub dies in the middle of a transaction".to_owned());
            self.hub.store = before;
            self.hub.log.clear();
            self.hub.violations.clear();
            self.hub.leases.clear();
            self.hub_dies(away);
            return None;
        }
        if let Some(at) = self.hub.wake_at {
            let life = self.hub.life;
            self.schedule(at.saturating_sub(self.now), Event::HubWakes { life });
        }
        self.publish_soon();
        for question in std::mem::take(&mut self.hub.questions) {
            let life = self.hub.life;
            let delay = self.random.between(100, 60 * SECOND);
            self.schedule(delay, Event::Answer { life, question });
        }
        for (id, lease) in std::mem::take(&mut self.hub.leases) {
            if let Some(device) = self.devices.iter().position(|one| one.id == id) {
                self.send_down(device, Down::Lease(lease));
            }
        }
        Some(done)
    }

    /// Somebody who was asked answers, unless it is another process by now.
    pub(super) fn answer(&mut self, life: u64, question: &Question) {
        if !self.hub.up || self.hub.life != life {
            return;
        }
        let verdict = self.scenario.verdict(question);
        self.note(|| format!("{question:?} is answered: {verdict:?}"));
        let now = self.now;
        self.transaction(|hub| hub.answer(question, verdict, now));
    }

    fn publish_soon(&mut self) {
        if !self.publishing && !self.hub.waiting().is_empty() {
            self.publishing = true;
            let life = self.hub.life;
            let delay = self.random.between(10, 500);
            self.schedule(delay, Event::Publish { life });
        }
    }

    pub(super) fn publish(&mut self, life: u64) {
        if self.hub.life != life {
            return;
        }
        self.publishing = false;
        if !self.hub.up || !self.broker.up {
            return;
        }
        for device in self.hub.waiting() {
            // Without the broker's receipt it stays in the outbox.
            if !self.random.chance(self.scenario.loss) {
                self.hub.store.outbox.remove(&device);
                self.publish_head(&device);
            }
        }
        if !self.hub.waiting().is_empty() {
            self.publishing = true;
            self.schedule(5 * SECOND, Event::Publish { life });
        }
    }

    fn publish_head(&mut self, id: &DeviceId) {
        let (Some(head), Some(device)) = (
            self.hub.head_to_publish(id),
            self.devices.iter().position(|one| one.id == *id),
        ) else {
            return;
        };
        self.check_issue(device, &head);
        let head = self.written_by_hub(Down::Head(Told {
            life: self.hub.restored,
            head,
        }));
        self.broker.heads.insert(device, head.clone());
        self.deliver(device, &head);
    }

    pub(super) fn hub_receives(&mut self, device: usize, sent: &Sent<Up>, retained: bool) {
        if !self.hub.up || !self.broker.up {
            return;
        }
        let Some(message) = self.take_from_wire(sent) else {
            return;
        };
        let id = self.devices[device].id.clone();
        self.note(|| format!("hub hears {id}: {}", describe(&message)));
        let now = self.now;
        let answer = match &message {
            Up::Presence(presence) => {
                self.transaction(|hub| hub.receive_presence(&id, presence, retained, now))
            }
            Up::Beacon(beacon) => self.transaction(|hub| hub.receive_beacon(&id, beacon, now)),
            Up::Reported(reported) => {
                self.transaction(|hub| (false, hub.receive_reported(&id, reported, retained, now)))
            }
            Up::LeaseRequest(request) => self.transaction(|hub| {
                hub.receive_request(&id, request, now);
                (false, false)
            }),
        };
        let Some((behind, missed)) = answer else {
            return;
        };
        let repairs = self.mutation != Some(Mutation::ForgetOutbox);
        if behind && repairs {
            self.publish_head(&id);
        }
        if missed {
            self.send_down(device, Down::Resync);
        }
        if let Up::Reported(reported) = message
            && self.devices[device].disk.starts == reported.boot
        {
            self.send_down(device, Down::Ack(reported.seq));
        }
    }

    pub(super) fn hub_dies(&mut self, away: Ms) {
        self.note(|| "the hub dies".to_owned());
        self.hub.crash();
        self.publishing = false;
        self.schedule(away, Event::HubStarts);
    }

    pub(super) fn hub_starts(&mut self) {
        if self.hub.up {
            return;
        }
        self.note(|| "the hub starts".to_owned());
        let (now, broker) = (self.now, self.broker.up);
        self.transaction(|hub| hub.start(now, broker));
        self.hear_retained();
    }

    pub(super) fn hear_retained(&mut self) {
        if !self.broker.up {
            return;
        }
        let kept = self.broker.presence.iter().chain(&self.broker.reported);
        let kept: Vec<_> = kept.map(|(device, sent)| (*device, sent.clone())).collect();
        for (device, message) in kept {
            let delay = self.random.between(10, 5 * SECOND);
            self.schedule(
                delay,
                Event::Up {
                    device,
                    message,
                    retained: true,
                },
            );
        }
    }

    /// The hub takes away what the broker keeps of a device that was given up.
    fn forget(&mut self, device: usize) {
        if !self
            .hub
            .store
            .devices
            .contains_key(&self.devices[device].id)
        {
            self.broker.forget(device);
            self.beyond.remove(&device);
            self.forgotten.insert(device);
        }
    }

    /// Whether a command releases a device that a restored hub tells nothing.
    fn awaits_release(&self, command: Command) -> bool {
        let Command::Hold(device, false) = command else {
            return false;
        };
        let row = self.hub.store.devices.get(&self.devices[device].id);
        row.is_some_and(|row| row.restored.is_some())
    }

    pub(super) fn operate(&mut self, app: usize, command: Command) {
        if !self.hub.up {
            // They try again later.
            return self.schedule(30 * SECOND, Event::Operator { app, command });
        }
        self.note(|| format!("operator: {command:?} on app {app}"));
        let (now, scenario) = (self.now, Arc::clone(&self.scenario));
        let restored = self.awaits_release(command);
        let done = self.transaction(|hub| hub.command(&scenario, app, command, now));
        if done.is_none() {
            return self.schedule(30 * SECOND, Event::Operator { app, command });
        }
        match command {
            Command::Hold(device, false) => {
                self.beyond.remove(&device);
                if restored {
                    self.devices[device].may_try_again();
                }
            }
            Command::Forget(device) => self.forget(device),
            _ => {}
        }
    }
}

fn describe(message: &Up) -> String {
    match message {
        Up::Presence(presence) => format!(
            "presence online={} session={}",
            presence.online, presence.session
        ),
        Up::LeaseRequest(request) => format!("{request:?}"),
        Up::Beacon(beacon) => format!("beacon version={:?}", beacon.version),
        Up::Reported(reported) => {
            let apps: Vec<_> = reported
                .apps
                .iter()
                .map(|status| {
                    format!(
                        "{} {} since {} {:?}",
                        status.app,
                        status.release.short(),
                        status.since,
                        status.phase
                    )
                })
                .collect();
            format!(
                "report {}.{} of {:?}: {}",
                reported.boot,
                reported.seq,
                reported.version,
                apps.join(", ")
            )
        }
    }
}
