//! The run of a seed: a queue of events on virtual time, a broker that loses things, and everything that happens to
//! hub and devices. After each event the rules are asked; at the end, whether everything came to rest.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};

use foreshore_protocol::message::{Beacon, Head, Lease, LeaseRequest, Phase, Presence, Reported};
use foreshore_protocol::release::Release;
use foreshore_protocol::{AppName, Digest, Version};

use crate::device::Device;
use crate::hub::{BEACON_INTERVAL, Hub, Store, TTL};
use crate::mutation::Mutation;
use crate::random::{Random, hash};
use crate::scenario::{Command, Fault, HOUR, MINUTE, Ms, SECOND, Scenario};

/// When a broker publishes the Will of a device that is gone (DESIGN.md §5).
const WILL_DELAY: Ms = 90 * SECOND;
/// How long after everything is whole again all must have come to rest.
const PATIENCE: Ms = 24 * HOUR;
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
#[derive(Debug, Clone)]
enum Up {
    Presence(Presence),
    Beacon(Beacon),
    Reported(Box<Reported>),
    LeaseRequest(LeaseRequest),
}

/// Hub or broker to device.
#[derive(Debug, Clone)]
enum Down {
    Head(Head),
    Ack(u64),
    Resync,
    Release(Digest),
    Lease(Lease),
}

#[derive(Debug, Clone)]
enum Event {
    Up {
        device: usize,
        message: Up,
        retained: bool,
    },
    Down {
        device: usize,
        session: u64,
        message: Down,
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

/// What the broker keeps.
#[derive(Debug, Clone, Default)]
struct Broker {
    up: bool,
    heads: BTreeMap<usize, Head>,
    presence: BTreeMap<usize, Presence>,
    reported: BTreeMap<usize, Reported>,
}

struct Simulation {
    scenario: Scenario,
    random: Random,
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
            tear: None,
            publishing: false,
            violations: Vec::new(),
            verbose,
            log: Vec::new(),
            scenario,
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
            } => self.hub_receives(device, message, retained),
            Event::Down {
                device,
                session,
                message,
            } => self.device_receives(device, session, message),
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
            Event::HubStarts => self.hub_starts(),
            Event::BrokerBack => self.broker_back(),
            Event::RegistryBack => self.registry = true,
            Event::Operator { app, command } => self.operate(app, command),
            Event::Goes(fault) => self.go_wrong(fault),
            Event::Heals => self.heal(),
            Event::Looks => {}
        }
    }

    // The hub.

    /// One transaction: done wholly or, with the process, not at all.
    fn transaction<T>(&mut self, act: impl FnOnce(&mut Hub) -> T) -> Option<T> {
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
        for (id, lease) in std::mem::take(&mut self.hub.leases) {
            if let Some(device) = self.devices.iter().position(|one| one.id == id) {
                self.send_down(device, &Down::Lease(lease));
            }
        }
        Some(done)
    }

    fn publish_soon(&mut self) {
        if !self.publishing && !self.hub.store.outbox.is_empty() {
            self.publishing = true;
            let life = self.hub.life;
            let delay = self.random.between(10, 500);
            self.schedule(delay, Event::Publish { life });
        }
    }

    fn publish(&mut self, life: u64) {
        if self.hub.life != life {
            return;
        }
        self.publishing = false;
        if !self.hub.up || !self.broker.up {
            return;
        }
        for device in self.hub.store.outbox.clone() {
            // Without the broker's receipt it stays in the outbox.
            if !self.random.chance(self.scenario.loss) {
                self.hub.store.outbox.remove(&device);
                self.publish_head(&device);
            }
        }
        if !self.hub.store.outbox.is_empty() {
            self.publishing = true;
            self.schedule(5 * SECOND, Event::Publish { life });
        }
    }

    fn publish_head(&mut self, id: &foreshore_protocol::DeviceId) {
        let (Some(head), Some(device)) = (
            self.hub.head(id),
            self.devices.iter().position(|one| one.id == *id),
        ) else {
            return;
        };
        self.broker.heads.insert(device, head.clone());
        self.send_down(device, &Down::Head(head));
    }

    fn hub_receives(&mut self, device: usize, message: Up, retained: bool) {
        if !self.hub.up || !self.broker.up {
            return;
        }
        let id = self.devices[device].id.clone();
        self.note(|| format!("hub hears {id}: {}", describe(&message)));
        let now = self.now;
        let answer = match &message {
            Up::Presence(presence) => {
                self.transaction(|hub| (hub.receive_presence(&id, presence, retained, now), false))
            }
            Up::Beacon(beacon) => self.transaction(|hub| hub.receive_beacon(&id, beacon, now)),
            Up::Reported(reported) => self.transaction(|hub| {
                hub.receive_reported(&id, reported, retained, now);
                (false, false)
            }),
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
            self.send_down(device, &Down::Resync);
        }
        if let Up::Reported(reported) = message
            && self.devices[device].disk.starts == reported.boot
        {
            self.send_down(device, &Down::Ack(reported.seq));
        }
    }

    fn hub_dies(&mut self, away: Ms) {
        self.note(|| "the hub dies".to_owned());
        self.hub.crash();
        self.publishing = false;
        self.schedule(away, Event::HubStarts);
    }

    fn hub_starts(&mut self) {
        if self.hub.up {
            return;
        }
        self.note(|| "the hub starts".to_owned());
        let (now, broker) = (self.now, self.broker.up);
        self.transaction(|hub| hub.start(now, broker));
        self.hear_retained();
    }

    fn hear_retained(&mut self) {
        if !self.broker.up {
            return;
        }
        let presence: Vec<_> = self.broker.presence.clone().into_iter().collect();
        for (device, presence) in presence {
            let delay = self.random.between(10, 5 * SECOND);
            self.schedule(
                delay,
                Event::Up {
                    device,
                    message: Up::Presence(presence),
                    retained: true,
                },
            );
        }
        let reported: Vec<_> = self.broker.reported.clone().into_iter().collect();
        for (device, reported) in reported {
            let delay = self.random.between(10, 5 * SECOND);
            self.schedule(
                delay,
                Event::Up {
                    device,
                    message: Up::Reported(Box::new(reported)),
                    retained: true,
                },
            );
        }
    }

    fn operate(&mut self, app: usize, command: Command) {
        if !self.hub.up {
            // They try again later.
            return self.schedule(30 * SECOND, Event::Operator { app, command });
        }
        self.note(|| format!("operator: {command:?} on app {app}"));
        let (now, scenario) = (self.now, self.scenario.clone());
        if self
            .transaction(|hub| hub.command(&scenario, app, command, now))
            .is_none()
        {
            self.schedule(30 * SECOND, Event::Operator { app, command });
        }
    }

    // Between.

    fn lost(&mut self) -> bool {
        let loss = self.scenario.loss;
        self.random.chance(loss)
    }

    fn copies(&mut self) -> usize {
        let duplication = self.scenario.duplication;
        1 + usize::from(self.random.chance(duplication))
    }

    fn send_up(&mut self, device: usize, message: &Up) {
        if self.devices[device].session.is_none() || !self.broker.up || self.lost() {
            return;
        }
        self.retain(device, message);
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

    fn retain(&mut self, device: usize, message: &Up) {
        match message {
            Up::Presence(presence) => {
                self.broker.presence.insert(device, presence.clone());
            }
            Up::Reported(reported) => {
                self.broker.reported.insert(device, (**reported).clone());
            }
            Up::Beacon(_) | Up::LeaseRequest(_) => {}
        }
    }

    fn send_down(&mut self, device: usize, message: &Down) {
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

    fn reconnect(&mut self, device: usize) {
        let one = &self.devices[device];
        if one.powered && one.link && self.broker.up && one.session.is_none() {
            let life = one.life;
            let delay = self.random.between(100, MINUTE);
            self.schedule(delay, Event::Connect { device, life });
        }
    }

    fn connect(&mut self, device: usize, life: u64) {
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
        self.send_up(device, &Up::Presence(presence));
        if let Some(reported) = reported {
            self.report(device, reported);
        }
        if let Some(head) = self.broker.heads.get(&device).cloned() {
            self.send_down(device, &Down::Head(head));
        }
        self.schedule(0, Event::Poll { device, life });
    }

    fn disconnect(&mut self, device: usize, will: bool) {
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

    fn will(&mut self, device: usize, session: u64) {
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
        self.retain(device, &Up::Presence(presence.clone()));
        let delay = self.random.between(5, self.scenario.delay);
        self.schedule(
            delay,
            Event::Up {
                device,
                message: Up::Presence(presence),
                retained: false,
            },
        );
    }

    fn broker_back(&mut self) {
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

    // Devices.

    fn poll(&mut self, device: usize) {
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
                self.send_down(device, &Down::Release(release));
                // Asked again until it comes.
                self.poll_at(device, now + 20 * SECOND);
            }
        }
        if let Some(at) = asks.wake_at {
            self.poll_at(device, at);
        }
        for request in asks.requests {
            self.send_up(device, &Up::LeaseRequest(request));
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
        let group = budget.group_of(device);
        let switching: Vec<usize> = (0..self.devices.len())
            .filter(|number| budget.group_of(*number) == group)
            .filter(|number| !self.devices[*number].switching().is_empty())
            .collect();
        if switching.len() > budget.max {
            let max = budget.max;
            self.violations.push(format!(
                "devices {switching:?} of a group switch at once, and {max} may"
            ));
        }
        let key = (self.devices[device].id.clone(), app.clone());
        let wanted = self.hub.store.devices[&key.0]
            .desired
            .get(app)
            .map(|(_, since)| *since);
        let changed = self.hub.changed.get(&key).copied().unwrap_or(0);
        if wanted != Some(since) && self.now > changed + TTL {
            self.violations.push(format!(
                "device-{device} switches {app} in {since:?}, long after it was taken back at {changed}"
            ));
        }
    }

    fn poll_at(&mut self, device: usize, at: Ms) {
        let now = self.now;
        if !self.devices[device].is_planned(at, now) {
            let life = self.devices[device].life;
            self.schedule(at.saturating_sub(now), Event::Poll { device, life });
        }
    }

    fn report(&mut self, device: usize, reported: Reported) {
        let (life, seq) = (self.devices[device].life, reported.seq);
        self.send_up(device, &Up::Reported(Box::new(reported)));
        self.schedule(30 * SECOND, Event::Resend { device, life, seq });
    }

    /// A report that the hub has not acknowledged is sent again; one that was replaced is not.
    fn resend(&mut self, device: usize, life: u64, seq: u64) {
        let one = &self.devices[device];
        let wanted = one.life == life && one.acknowledged < seq && one.session.is_some();
        let reported = one.reported.clone().filter(|reported| reported.seq == seq);
        if wanted && let Some(reported) = reported {
            self.report(device, reported);
        }
    }

    fn beacon(&mut self, device: usize) {
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
        self.send_up(device, &Up::Beacon(beacon));
    }

    fn device_receives(&mut self, device: usize, session: u64, message: Down) {
        if self.devices[device].session != Some(session) {
            return;
        }
        self.note(|| format!("device-{device} hears {message:?}"));
        match message {
            Down::Head(head) => {
                let before = self.devices[device].version();
                let taken = self.devices[device].receive_head(&head, self.mutation);
                let after = self.devices[device].version();
                if before > after {
                    self.violations.push(format!(
                        "device-{device} went from version {before:?} back to {after:?}"
                    ));
                }
                if taken {
                    self.poll(device);
                }
            }
            Down::Lease(lease) => {
                if self.devices[device].receive_lease(&lease) {
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
            Down::Release(digest) => {
                if let Some(release) = self.releases.get(&digest) {
                    self.devices[device].receive_release(digest, release);
                    self.poll(device);
                }
            }
        }
    }

    fn step_ends(&mut self, device: usize, life: u64, token: u64) {
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

    fn power_on(&mut self, device: usize) {
        if self.devices[device].powered {
            return;
        }
        self.note(|| format!("device-{device} boots"));
        let (now, mutation) = (self.now, self.mutation);
        self.devices[device].boot(now, &mut self.random, mutation);
        self.poll(device);
        self.reconnect(device);
    }

    // Fate.

    fn go_wrong(&mut self, fault: Fault) {
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

    fn wipe(&mut self) {
        self.note(|| "the broker forgets what it retained".to_owned());
        self.broker.heads.clear();
        self.broker.presence.clear();
        self.broker.reported.clear();
    }

    fn heal(&mut self) {
        self.note(|| "everything is whole again".to_owned());
        self.healed = true;
        self.scenario.loss = 0;
        self.scenario.duplication = 0;
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

    /// Whether all is at rest. If it never is, that is a violation.
    fn is_at_rest(&mut self) -> bool {
        // What waits for an operator is not at rest, and they are there now.
        for app in 0..self.scenario.apps.len() {
            self.operate(app, Command::Approve);
        }
        for device in 0..self.devices.len() {
            self.operate(0, Command::Hold(device, false));
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
