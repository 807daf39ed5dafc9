//! What goes wrong, and how everything becomes whole again.

use std::sync::Arc;

use super::{Event, Simulation};
use crate::scenario::{Fault, MINUTE, SECOND};

impl Simulation {
    pub(super) fn go_wrong(&mut self, fault: Fault) {
        self.note(|| format!("fault: {fault:?}"));
        match fault {
            Fault::HubCrash(away) if self.hub.up => {
                if self.random.chance(50) {
                    self.tear = Some(away);
                } else {
                    self.hub_dies(away);
                }
            }
            Fault::HubCrash(_) => {}
            Fault::Backup => self.back_up(),
            Fault::Restore(which, away) => self.restore(which, away),
            Fault::BrokerOutage(span) => {
                self.broker.up = false;
                self.hub.listening_since = None;
                for device in 0..self.devices.len() {
                    self.disconnect(device, false);
                }
                if self.random.chance(50) {
                    self.wipe();
                }
                self.schedule(span, Event::BrokerBack);
            }
            Fault::WipeRetained => self.wipe(),
            Fault::RegistryOutage(span) => {
                self.registry = false;
                self.schedule(span, Event::RegistryBack);
            }
            Fault::LinkLoss(device, span) => {
                self.devices[device].link = false;
                self.disconnect(device, true);
                self.schedule(span, Event::LinkUp { device });
            }
            Fault::PowerCut(device, span) => {
                if self.devices[device].powered {
                    self.disconnect(device, true);
                    let (now, registry) = (self.now, self.registry);
                    self.devices[device].cut_power(now, &self.scenario, registry, &mut self.random);
                    self.schedule(span, Event::PowerOn { device });
                }
            }
            Fault::AgentCrash(device) => {
                if self.devices[device].powered {
                    self.disconnect(device, true);
                    let (now, registry) = (self.now, self.registry);
                    self.devices[device].end_agent(now, &self.scenario, registry, &mut self.random);
                    // Polls and steps of the life that ended are void from here.
                    self.devices[device].life += 1;
                    let life = self.devices[device].life;
                    let delay = self.random.between(100, 10 * SECOND);
                    self.schedule(delay, Event::AgentStarts { device, life });
                }
            }
            Fault::ContainerDies(device) => {
                let now = self.now;
                self.devices[device].kill_a_container(now, &mut self.random);
                let life = self.devices[device].life;
                self.schedule(0, Event::Poll { device, life });
            }
        }
    }

    pub(super) fn heal(&mut self) {
        self.note(|| "everything is whole again".to_owned());
        self.healed = true;
        let scenario = Arc::make_mut(&mut self.scenario);
        scenario.loss = 0;
        scenario.duplication = 0;
        self.tear = None;
        self.registry = true;
        self.hub_starts();
        self.broker_back();
        for device in 0..self.devices.len() {
            self.devices[device].link = true;
            self.power_on(device);
            self.reconnect(device);
        }
        self.schedule(10 * MINUTE, Event::Looks);
    }
}
