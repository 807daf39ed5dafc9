//! What happens on devices and what they send, as far as it takes the rest of the world.

use foreshore_protocol::message::{Beacon, Reported};
use foreshore_protocol::{AppName, Version};

use super::wire::Sent;
use super::{Down, Event, Simulation, Told, Up};
use crate::hub::{BEACON_INTERVAL, TTL};
use crate::scenario::{Ms, SECOND};

impl Simulation {
    pub(super) fn poll(&mut self, device: usize) {
        let (now, mutation) = (self.now, self.mutation);
        let asks = self.devices[device].poll(now, &mut self.random, mutation);
        let life = self.devices[device].life;
        self.violations.extend(asks.violations);
        for line in asks.log {
            self.note(|| line);
        }
        for (takes, token) in asks.begun {
            self.schedule(
                takes,
                Event::StepEnds {
                    device,
                    life,
                    token,
                },
            );
        }
        for release in asks.fetch {
            if self.devices[device].session.is_some() {
                if let Some(release) = self.releases.get(&release).cloned() {
                    self.send_down(device, Down::Release(Box::new(release)));
                }
                // Asked again until it comes.
                self.poll_at(device, now + 20 * SECOND);
            }
        }
        if let Some(at) = asks.wake_at {
            self.poll_at(device, at);
        }
        for request in asks.requests {
            self.send_up(device, Up::LeaseRequest(request));
        }
        for (app, since) in asks.began {
            self.check_turn(device, &app, since);
        }
        if asks.report
            && let Some(reported) = self.devices[device].reported.clone()
        {
            self.report(device, reported);
        }
    }

    /// A device began to switch: not while as many of its group do as the budget says, and not long after the hub
    /// changed its mind.
    fn check_turn(&mut self, device: usize, app: &AppName, since: Version) {
        let Some(budget) = self.scenario.budget else {
            return;
        };
        if self.has_old_turn(device, app, since) {
            self.old_turns.insert((device, app.clone(), since));
        }
        let group = budget.group_of(device);
        let switching: Vec<usize> = (0..self.devices.len())
            .filter(|number| budget.group_of(*number) == group)
            .filter(|number| self.switches(*number))
            .collect();
        let counts = switching.contains(&device);
        if counts && switching.len() > budget.max {
            let max = budget.max;
            self.violations.push(format!(
                "devices {switching:?} of a group switch at once, and {max} may"
            ));
        }
        let key = (self.devices[device].id.clone(), app.clone());
        let row = self.hub.store.devices.get(&key.0);
        let wanted = row.and_then(|row| Some(row.desired.get(app)?.1));
        let changed = self.hub.changed.get(&key).copied().unwrap_or(0);
        if wanted != Some(since) && self.now > changed + TTL {
            self.violations.push(format!(
                "device-{device} switches {app} in {since:?}, long after it was taken back at {changed}"
            ));
        }
    }

    /// Whether a device switches in a turn that the hub must know of.
    fn switches(&self, device: usize) -> bool {
        let one = &self.devices[device];
        let known = |(app, since): (&AppName, Version)| {
            let turn = (device, app.clone(), since);
            !self.old_turns.contains(&turn)
        };
        !self.forgotten.contains(&device) && one.switching().into_iter().any(known)
    }

    /// Whether it began with a turn of a life of the store that is gone: a restored hub cannot know who has one.
    pub(super) fn has_old_turn(&self, device: usize, app: &AppName, since: Version) -> bool {
        let key = (self.devices[device].id.clone(), app.clone());
        let held = self.hub.store.leases.get(&key);
        let held = held.and_then(|entry| entry.held.as_ref());
        self.hub.restored > 0 && held.is_none_or(|held| held.since != since)
    }

    fn poll_at(&mut self, device: usize, at: Ms) {
        let now = self.now;
        if !self.devices[device].is_planned(at, now) {
            let life = self.devices[device].life;
            self.schedule(at.saturating_sub(now), Event::Poll { device, life });
        }
    }

    pub(super) fn report(&mut self, device: usize, reported: Reported) {
        let (life, seq) = (self.devices[device].life, reported.seq);
        self.send_up(device, Up::Reported(Box::new(reported)));
        self.schedule(30 * SECOND, Event::Resend { device, life, seq });
    }

    /// A report that the hub has not acknowledged is sent again; one that was replaced is not.
    pub(super) fn resend(&mut self, device: usize, life: u64, seq: u64) {
        let one = &self.devices[device];
        let wanted = one.life == life && one.acknowledged < seq && one.session.is_some();
        let reported = one.reported.clone().filter(|reported| reported.seq == seq);
        if wanted && let Some(reported) = reported {
            self.report(device, reported);
        }
    }

    pub(super) fn beacon(&mut self, device: usize) {
        self.schedule(BEACON_INTERVAL, Event::Beacon { device });
        let one = &self.devices[device];
        if one.session.is_none() {
            return;
        }
        let beacon = Beacon {
            boot: one.disk.starts,
            seq: self.now,
            version: one.version(),
            reported_seq: one.reported.as_ref().map_or(0, |reported| reported.seq),
            event_seq: 0,
            memory_mib: 0,
            load_centi: 0,
            secrets: None,
        };
        self.send_up(device, Up::Beacon(beacon));
    }

    pub(super) fn device_receives(&mut self, device: usize, session: u64, sent: &Sent<Down>) {
        if self.devices[device].session != Some(session) {
            return;
        }
        let Some(message) = self.take_from_wire(sent) else {
            return;
        };
        self.note(|| format!("device-{device} hears {message:?}"));
        match message {
            Down::Head(Told { life, head }) => {
                let before = self.devices[device].version();
                let taken = self.devices[device].receive_head(&head, self.mutation);
                let after = self.devices[device].version();
                if before > after {
                    self.violations.push(format!(
                        "device-{device} went from version {before:?} back to {after:?}"
                    ));
                }
                if taken {
                    self.check_restored(device, life, after);
                    self.poll(device);
                }
            }
            Down::Lease(lease) => {
                if self.devices[device].receive_lease(&lease, self.mutation) {
                    self.poll(device);
                }
            }
            Down::Ack(seq) => {
                let one = &mut self.devices[device];
                one.acknowledged = one.acknowledged.max(seq);
            }
            Down::Resync => {
                if let Some(reported) = self.devices[device].reported.clone() {
                    self.report(device, reported);
                }
            }
            Down::Release(release) => {
                self.devices[device].receive_release(release.digest(), &release);
                self.poll(device);
            }
        }
    }

    pub(super) fn step_ends(&mut self, device: usize, life: u64, token: u64) {
        if self.devices[device].life != life {
            return;
        }
        let (now, registry, mutation) = (self.now, self.registry, self.mutation);
        let (wanted, violations) = self.devices[device].finish(
            token,
            now,
            &self.scenario,
            registry,
            &mut self.random,
            mutation,
        );
        self.violations.extend(violations);
        if wanted {
            self.poll(device);
        }
    }

    pub(super) fn power_on(&mut self, device: usize) {
        if self.devices[device].powered {
            return;
        }
        self.note(|| format!("device-{device} boots"));
        let (now, mutation) = (self.now, self.mutation);
        self.devices[device].boot(now, &mut self.random, mutation);
        self.poll(device);
        self.reconnect(device);
    }
}
