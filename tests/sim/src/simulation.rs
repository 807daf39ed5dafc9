//! The run of a seed: a queue of events on virtual time, and everything that happens to hub and devices. After each event
//! the rules are asked; at the end, whether everything came to rest.
//!
//! | file | what it owns |
//! |---|---|
//! | `process` | the hub's process: transactions, what it hears and publishes |
//! | `broker` | the broker and the network |
//! | `wire` | messages as bytes, as the real encoders write and the real decoders read them |
//! | `devices` | what happens on devices, and what they send |
//! | `fate` | what goes wrong |
//! | `backups` | copies of the hub's store, and what must hold when one is put back |
//! | `rest` | whether everything came to rest |

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::sync::Arc;

use foreshore_hub::rollout::analysis::Question;
use foreshore_protocol::message::{Beacon, Head, HeadApp, Lease, LeaseRequest, Presence, Reported};
use foreshore_protocol::release::Release;
use foreshore_protocol::{AppName, Digest, Version};

mod backups;
mod broker;
mod devices;
mod fate;
mod process;
mod rest;
mod wire;

use crate::device::Device;
use crate::hub::{BEACON_INTERVAL, Hub, Store};
use crate::mutation::Mutation;
use crate::random::{Random, hash};
use crate::scenario::{Command, Fault, MINUTE, Ms, Scenario};
use broker::Broker;
use wire::Sent;

/// A run with more events than this goes in circles.
const MAX_EVENTS: u64 = 5_000_000;

/// What came of a run.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// Rules that were broken; empty for a good run.
    pub violations: Vec<String>,
    /// How many events happened.
    pub events: u64,
    /// How long the run took in virtual time, in milliseconds.
    pub virtual_ms: Ms,
    /// How many rollouts there were.
    pub rollouts: usize,
    /// The events, if they were asked for.
    pub log: Vec<String>,
}

/// Device to hub.
#[derive(Debug, Clone, PartialEq)]
enum Up {
    Presence(Presence),
    Beacon(Beacon),
    Reported(Box<Reported>),
    LeaseRequest(LeaseRequest),
}

/// A head, and which life of the hub's store it comes from: how many backups were restored before.
#[derive(Debug, Clone, PartialEq)]
struct Told {
    life: u64,
    head: Head,
}

/// Hub or broker to device.
#[derive(Debug, Clone, PartialEq)]
enum Down {
    Head(Told),
    Ack(u64),
    Resync,
    Release(Box<Release>),
    Lease(Lease),
}

#[derive(Debug, Clone)]
enum Event {
    Up {
        device: usize,
        message: Sent<Up>,
        retained: bool,
    },
    Down {
        device: usize,
        session: u64,
        message: Sent<Down>,
    },
    Connect {
        device: usize,
        life: u64,
    },
    Will {
        device: usize,
        session: u64,
    },
    Poll {
        device: usize,
        life: u64,
    },
    StepEnds {
        device: usize,
        life: u64,
        token: u64,
    },
    Beacon {
        device: usize,
    },
    Resend {
        device: usize,
        life: u64,
        seq: u64,
    },
    PowerOn {
        device: usize,
    },
    LinkUp {
        device: usize,
    },
    AgentStarts {
        device: usize,
        life: u64,
    },
    Publish {
        life: u64,
    },
    HubWakes {
        life: u64,
    },
    Answer {
        life: u64,
        question: Question,
    },
    HubStarts,
    BrokerBack,
    RegistryBack,
    Operator {
        app: usize,
        command: Command,
    },
    Goes(Fault),
    Heals,
    Looks,
}

struct Simulation {
    scenario: Arc<Scenario>,
    random: Random,
    /// What the wire draws from.
    noise: Random,
    mutation: Option<Mutation>,
    now: Ms,
    queue: BinaryHeap<Reverse<(Ms, u64, usize)>>,
    events: Vec<Option<Event>>,
    free: Vec<usize>,
    next: u64,
    hub: Hub,
    devices: Vec<Device>,
    broker: Broker,
    releases: BTreeMap<Digest, Release>,
    registry: bool,
    healed: bool,
    /// Copies of the hub's store, oldest first.
    backups: Vec<Store>,
    /// For the rules: devices that had more than the backup when it was restored, and were not released since.
    beyond: BTreeSet<usize>,
    /// For the rules: turns that devices began with and that a restored hub does not know of.
    old_turns: BTreeSet<(usize, AppName, Version)>,
    /// For the rules: devices that an operator gave up, so that nothing is counted of them any more.
    forgotten: BTreeSet<usize>,
    /// For the rules: what was published under which version.
    issued: BTreeMap<(usize, Version), Vec<HeadApp>>,
    /// The next transaction of the hub is lost with the process, which stays away for that long.
    tear: Option<Ms>,
    publishing: bool,
    violations: Vec<String>,
    verbose: bool,
    log: Vec<String>,
}

/// Runs a seed.
#[must_use]
pub fn run(
    seed: u64,
    devices: Option<usize>,
    mutation: Option<Mutation>,
    verbose: bool,
) -> Outcome {
    play(Scenario::of(seed, devices), mutation, verbose).0
}

/// Runs a scenario; with the hub as it is in the end.
#[must_use]
pub fn play(scenario: Scenario, mutation: Option<Mutation>, verbose: bool) -> (Outcome, Hub) {
    let mut simulation = Simulation::new(scenario, mutation, verbose);
    let mut count = 0;
    while simulation.violations.is_empty() && simulation.step() {
        count += 1;
        if count > MAX_EVENTS {
            simulation
                .violations
                .push("it goes in circles: too many events".to_owned());
        }
    }
    let outcome = Outcome {
        violations: simulation.violations,
        events: count,
        virtual_ms: simulation.now,
        rollouts: simulation.hub.store.rollouts.len(),
        log: simulation.log,
    };
    (outcome, simulation.hub)
}

impl Simulation {
    fn new(scenario: Scenario, mutation: Option<Mutation>, verbose: bool) -> Self {
        let mut hub = Hub::new(&scenario, mutation);
        hub.verbose = verbose;
        let devices = scenario
            .devices
            .iter()
            .enumerate()
            .map(|(number, id)| Device::new(id.clone(), number))
            .collect();
        let releases = scenario
            .apps
            .iter()
            .flat_map(|app| &app.releases)
            .map(|release| (release.digest(), release.clone()))
            .collect();
        let mut simulation = Self {
            random: Random::new(hash(&[scenario.seed, 1])),
            noise: Random::new(hash(&[scenario.seed, 46])),
            mutation,
            now: 0,
            queue: BinaryHeap::new(),
            events: Vec::new(),
            free: Vec::new(),
            next: 0,
            hub,
            devices,
            broker: Broker {
                up: true,
                ..Broker::default()
            },
            releases,
            registry: true,
            healed: false,
            backups: Vec::new(),
            beyond: BTreeSet::new(),
            old_turns: BTreeSet::new(),
            forgotten: BTreeSet::new(),
            issued: BTreeMap::new(),
            tear: None,
            publishing: false,
            violations: Vec::new(),
            verbose,
            log: Vec::new(),
            scenario: Arc::new(scenario),
        };
        for device in &mut simulation.devices {
            device.verbose = verbose;
        }
        simulation.begin();
        simulation
    }

    fn begin(&mut self) {
        self.schedule(0, Event::HubStarts);
        for device in 0..self.devices.len() {
            let at = self.random.below(5 * MINUTE);
            self.schedule(at, Event::PowerOn { device });
            let at = self.random.below(BEACON_INTERVAL);
            self.schedule(at, Event::Beacon { device });
        }
        for (at, app, command) in self.scenario.commands.clone() {
            self.schedule(at, Event::Operator { app, command });
        }
        for (at, fault) in self.scenario.faults.clone() {
            self.schedule(at, Event::Goes(fault));
        }
        self.schedule(self.scenario.heals_at, Event::Heals);
    }

    fn schedule(&mut self, delay: Ms, event: Event) {
        let slot = match self.free.pop() {
            Some(slot) => {
                self.events[slot] = Some(event);
                slot
            }
            None => {
                self.events.push(Some(event));
                self.events.len() - 1
            }
        };
        self.next += 1;
        self.queue
            .push(Reverse((self.now + delay, self.next, slot)));
    }

    fn note(&mut self, line: impl FnOnce() -> String) {
        if self.verbose {
            let line = line();
            self.log
                .push(format!("{:>12.3} {line}", self.now as f64 / 1_000.0));
        }
    }

    /// One event; false when all is at rest.
    fn step(&mut self) -> bool {
        let Some(Reverse((at, _, slot))) = self.queue.pop() else {
            return false;
        };
        let event = self.events[slot]
            .take()
            .expect("an event is in the queue once");
        self.free.push(slot);
        self.now = at;
        if matches!(event, Event::Looks) {
            return !self.is_at_rest();
        }
        self.happen(event);
        for line in std::mem::take(&mut self.hub.log) {
            self.note(|| line);
        }
        self.violations.append(&mut self.hub.violations);
        true
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Up {
                device,
                message,
                retained,
            } => self.hub_receives(device, &message, retained),
            Event::Down {
                device,
                session,
                message,
            } => self.device_receives(device, session, &message),
            Event::Connect { device, life } => self.connect(device, life),
            Event::Will { device, session } => self.will(device, session),
            Event::Poll { device, life } => {
                if self.devices[device].life == life {
                    self.poll(device);
                }
            }
            Event::StepEnds {
                device,
                life,
                token,
            } => self.step_ends(device, life, token),
            Event::Beacon { device } => self.beacon(device),
            Event::Resend { device, life, seq } => self.resend(device, life, seq),
            Event::PowerOn { device } => self.power_on(device),
            Event::LinkUp { device } => {
                self.devices[device].link = true;
                self.reconnect(device);
            }
            Event::AgentStarts { device, life } => {
                if self.devices[device].powered && self.devices[device].life == life {
                    self.devices[device].start_agent(self.now);
                    self.poll(device);
                    self.reconnect(device);
                }
            }
            Event::Publish { life } => self.publish(life),
            Event::HubWakes { life } => {
                if self.hub.up && self.hub.life == life {
                    let now = self.now;
                    self.transaction(|hub| hub.advance(now));
                }
            }
            Event::Answer { life, question } => self.answer(life, &question),
            Event::HubStarts => self.hub_starts(),
            Event::BrokerBack => self.broker_back(),
            Event::RegistryBack => self.registry = true,
            Event::Operator { app, command } => self.operate(app, command),
            Event::Goes(fault) => self.go_wrong(fault),
            Event::Heals => self.heal(),
            Event::Looks => {}
        }
    }
}
