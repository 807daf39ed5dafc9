//! A device that behaves like an agent towards the hub, without containers.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use foreshore_protocol::frame;
use foreshore_protocol::id::{Labels, Version};
use foreshore_protocol::message::{
    AppStatus, Beacon, Command, Event, EventKind, Events, Head, HeadApp, Inventory, Lease,
    LeaseRequest, Phase, Presence, Reason, ReasonCode, Reported,
};
use foreshore_protocol::release::Release;
use foreshore_protocol::topic::{self, Leaf, Topic};
use foreshore_protocol::{AppName, DeviceId, Digest};
use rumqttc::{
    AsyncClient, Event as MqttEvent, LastWill, MqttOptions, Packet, PublishOptions, QoS,
    SessionMode,
};

use crate::bed::Bed;

/// What a device remembers; survives its reconnects like an agent's disk.
#[derive(Debug, Default)]
pub(crate) struct State {
    pub(crate) session: u64,
    pub(crate) boot: u64,
    pub(crate) seq: u64,
    pub(crate) accepted: Option<Version>,
    head: Option<Head>,
    releases: BTreeMap<Digest, Release>,
    pub(crate) apps: BTreeMap<AppName, AppStatus>,
    pub(crate) labels: Labels,
    /// Stop at `Activating` until this is false.
    pub(crate) hold: bool,
    /// Releases of which a service's image has this digest fail here.
    pub(crate) broken: BTreeSet<String>,
    /// The newest acknowledgement.
    pub(crate) acked: Option<(u64, u64)>,
    pub(crate) resyncs: u32,
    pub(crate) event_seq: u64,
    /// Every version of a head that came, in order.
    pub(crate) heads: Vec<Version>,
    /// Releases that this device ever activated.
    pub(crate) activated: Vec<Digest>,
    pub(crate) connected: bool,
    /// Whether switching needs a lease.
    pub(crate) budgeted: bool,
    nonce: u64,
    /// What was asked last, and when.
    asked: BTreeMap<AppName, (u64, Instant)>,
    until: BTreeMap<AppName, Instant>,
    /// Every switch, with its end.
    pub(crate) switches: Vec<(AppName, Instant, Option<Instant>)>,
    kicks: Vec<Kick>,
}

impl State {
    /// As an agent that is started again: what was granted and not used is void.
    pub(crate) fn restart(&mut self) {
        self.boot += 1;
        (self.seq, self.nonce) = (0, 0);
        self.asked.clear();
        self.until.clear();
    }
}

/// How often a turn is asked for; an agent is slower.
const ASK_EVERY: Duration = Duration::from_millis(300);

/// What a test makes a device do.
#[derive(Debug)]
pub(crate) enum Kick {
    Beacon,
    /// A beacon with so many MiB.
    Gauges(u32),
    /// An event, of which the device keeps those from a number on.
    Event {
        kept_from: u64,
        seq: u64,
    },
    Raw(Leaf, Vec<u8>),
}

/// A device. Dropping it cuts its connection.
#[derive(Debug)]
pub(crate) struct Device {
    pub(crate) id: DeviceId,
    state: Arc<Mutex<State>>,
    runtime: Option<tokio::runtime::Runtime>,
}

impl Device {
    pub(crate) fn start(bed: &Bed, name: &str) -> Self {
        let mut device = Self {
            id: name.parse().unwrap(),
            state: Arc::new(Mutex::new(State {
                boot: 1,
                ..State::default()
            })),
            runtime: None,
        };
        device.connect(bed);
        device
    }

    /// Several of them: `device-0` and so on.
    pub(crate) fn fleet(bed: &Bed, count: usize) -> Vec<Self> {
        let devices: Vec<_> = (0..count)
            .map(|number| Self::start(bed, &format!("device-{number}")))
            .collect();
        bed.await_online(count);
        devices
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Connects with what it remembers, and keeps doing so.
    pub(crate) fn connect(&mut self, bed: &Bed) {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let (host, port) = bed.broker.rsplit_once(':').unwrap();
        let login = Login {
            host: host.to_owned(),
            port: port.parse().unwrap(),
            token: bed.join_token(),
            id: self.id.clone(),
        };
        let state = Arc::clone(&self.state);
        runtime.spawn(async move {
            loop {
                session(&login, &state).await;
                state.lock().unwrap().connected = false;
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        });
        self.runtime = Some(runtime);
    }

    /// Cuts the connection without a word; the broker publishes the Will.
    pub(crate) fn cut(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
        self.state().connected = false;
    }

    pub(crate) fn kick(&self, kick: Kick) {
        self.state().kicks.push(kick);
    }

    /// The phase that it says of an app.
    pub(crate) fn phase(&self, app: &str) -> Option<Phase> {
        self.state().apps.get(app).map(|status| status.phase)
    }

    pub(crate) fn running(&self, app: &str) -> Option<Digest> {
        self.state().apps.get(app).and_then(|status| status.running)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        self.cut();
    }
}

struct Login {
    host: String,
    port: u16,
    token: String,
    id: DeviceId,
}

fn presence(state: &State, online: bool) -> Vec<u8> {
    frame::encode(&Presence {
        session: state.session,
        online,
        boot: state.boot,
        version: state.accepted,
        reported_seq: state.seq,
        max_schema: frame::MAX_SCHEMA,
        agent_version: "test".to_owned(),
        secrets_key: None,
        secrets: None,
    })
}

async fn session(login: &Login, shared: &Mutex<State>) {
    let up = |leaf| topic::device(&login.id, leaf);
    let mut options = MqttOptions::new(login.id.as_str(), (login.host.clone(), login.port));
    {
        let mut state = shared.lock().unwrap();
        state.session += 1;
        options
            .set_credentials(login.id.as_str(), login.token.clone())
            .set_keep_alive(5)
            .set_session_mode(SessionMode::Clean)
            .set_last_will(LastWill::new(
                up(Leaf::Presence),
                presence(&state, false),
                QoS::AtLeastOnce,
                true,
                None,
            ));
    }
    let (client, mut eventloop) = AsyncClient::builder(options).capacity(1000).build();
    let mut tick = tokio::time::interval(Duration::from_millis(10));
    // Not whether somebody is: a connection before this may have been a moment late to say so.
    let mut connected = false;
    loop {
        // Whoever stops to poll before there is a connection begins to connect anew.
        tokio::select! {
            event = eventloop.poll() => match event {
                Ok(MqttEvent::Incoming(packet)) => {
                    connected |= matches!(packet, Packet::ConnAck(_));
                    let mut state = shared.lock().unwrap();
                    incoming(&client, &login.id, &mut state, packet);
                }
                Ok(_) => {}
                Err(_) => return,
            },
            _ = tick.tick(), if connected => {
                let mut state = shared.lock().unwrap();
                if state.connected {
                    work(&client, &login.id, &mut state);
                }
            }
        }
    }
}

fn incoming(client: &AsyncClient, id: &DeviceId, state: &mut State, packet: Packet) {
    let retained = || PublishOptions::at_least_once().retained();
    match packet {
        Packet::ConnAck(_) => {
            for leaf in [Leaf::Head, Leaf::Command, Leaf::Lease] {
                client
                    .try_subscribe(topic::device(id, leaf), QoS::AtLeastOnce)
                    .unwrap();
            }
            client
                .try_publish(
                    topic::device(id, Leaf::Presence),
                    presence(state, true),
                    retained(),
                )
                .unwrap();
            state.connected = true;
            report(client, id, state);
        }
        Packet::Publish(publish) => {
            let name = String::from_utf8(publish.topic.to_vec()).unwrap();
            match Topic::parse(&name).unwrap() {
                Topic::Device(_, Leaf::Head) => {
                    let head: Head = frame::decode(&publish.payload).unwrap();
                    state.heads.push(head.version);
                    if Some(head.version) > state.accepted {
                        for app in &head.apps {
                            if !state.releases.contains_key(&app.release) {
                                client
                                    .try_subscribe(topic::release(&app.release), QoS::AtLeastOnce)
                                    .unwrap();
                            }
                        }
                        state.head = Some(head);
                    }
                }
                Topic::Release(digest) => {
                    let release = Release::from_bytes(&publish.payload, &digest).unwrap();
                    state.releases.insert(digest, release);
                    client.try_unsubscribe(name).unwrap();
                }
                Topic::Device(_, Leaf::Command) => match frame::decode(&publish.payload).unwrap() {
                    Command::Ack {
                        event, reported, ..
                    } => state.acked = Some((event, reported)),
                    Command::Resync => {
                        state.resyncs += 1;
                        report(client, id, state);
                    }
                },
                Topic::Device(_, Leaf::Lease) => {
                    let lease: Lease = frame::decode(&publish.payload).unwrap();
                    if let Some((nonce, at)) = state.asked.get(&lease.app)
                        && (lease.boot, lease.nonce) == (state.boot, *nonce)
                    {
                        let until = *at + Duration::from_millis(lease.ttl_ms);
                        state.until.insert(lease.app, until);
                    }
                }
                other => panic!("{other:?} is not for devices"),
            }
        }
        _ => {}
    }
}

/// One step of everything that can go on.
fn work(client: &AsyncClient, id: &DeviceId, state: &mut State) {
    for kick in std::mem::take(&mut state.kicks) {
        kicked(client, id, state, kick);
    }
    let complete = |head: &Head| {
        head.apps
            .iter()
            .all(|app| state.releases.contains_key(&app.release))
    };
    if let Some(head) = state.head.take_if(|head| complete(head)) {
        accept(state, &head);
        report(client, id, state);
        return;
    }
    let names: Vec<_> = state.apps.keys().cloned().collect();
    let mut changed = false;
    for name in names {
        changed |= step(state, &name);
    }
    ask(client, id, state);
    if changed {
        report(client, id, state);
    }
}

fn ask(client: &AsyncClient, id: &DeviceId, state: &mut State) {
    let now = Instant::now();
    let lately = |at: &Instant| now.duration_since(*at) < ASK_EVERY;
    let waiting: Vec<_> = state
        .apps
        .values()
        .filter(|status| status.phase == Phase::Waiting)
        .filter(|status| {
            !state
                .asked
                .get(&status.app)
                .is_some_and(|(_, at)| lately(at))
        })
        .map(|status| (status.app.clone(), status.since, status.release))
        .collect();
    for (app, since, release) in waiting {
        state.nonce += 1;
        state.asked.insert(app.clone(), (state.nonce, now));
        state.until.remove(&app);
        let request = LeaseRequest {
            boot: state.boot,
            nonce: state.nonce,
            app,
            since,
            release,
            wanted: true,
        };
        let topic = topic::device(id, Leaf::LeaseRequest);
        let options = PublishOptions::at_least_once();
        _ = client.try_publish(topic, frame::encode(&request), options);
    }
}

fn accept(state: &mut State, head: &Head) {
    state.accepted = Some(head.version);
    state.budgeted = !head.budgets.is_empty();
    let wanted: BTreeMap<_, _> = head.apps.iter().map(|app| (app.app.clone(), app)).collect();
    state.apps.retain(|name, _| wanted.contains_key(name));
    for (name, app) in wanted {
        let HeadApp { since, release, .. } = *app;
        let status = state.apps.entry(name.clone()).or_insert_with(|| AppStatus {
            app: name,
            since,
            release,
            phase: Phase::Accepted,
            reason: None,
            running: None,
            last_known_good: None,
            services: Vec::new(),
        });
        if (status.since, status.release) != (since, release) {
            status.since = since;
            status.release = release;
            status.reason = None;
            state.asked.remove(&status.app);
            state.until.remove(&status.app);
            // What already runs and is good needs nothing.
            let good = status.running == Some(release) && status.last_known_good == Some(release);
            status.phase = if good {
                Phase::Succeeded
            } else {
                Phase::Accepted
            };
        }
    }
}

fn step(state: &mut State, name: &AppName) -> bool {
    let (hold, budgeted) = (state.hold, state.budgeted);
    let now = Instant::now();
    let may = state.until.get(name).is_some_and(|until| now < *until);
    let Some(status) = state.apps.get_mut(name) else {
        return false;
    };
    let broken = state.releases.get(&status.release).is_some_and(|release| {
        release
            .services
            .values()
            .any(|service| state.broken.iter().any(|part| service.image.contains(part)))
    });
    let next = match status.phase {
        Phase::Accepted => Phase::Staging,
        Phase::Staging if budgeted => Phase::Waiting,
        Phase::Waiting if budgeted && !may => return false,
        Phase::Staging | Phase::Waiting => Phase::Activating,
        Phase::Activating if hold => return false,
        Phase::Activating if broken && status.last_known_good.is_some() => Phase::RolledBack,
        Phase::Activating if broken => Phase::Failed,
        Phase::Activating => Phase::Soaking,
        Phase::Soaking => Phase::Succeeded,
        _ => return false,
    };
    status.phase = next;
    match next {
        Phase::Activating => {
            status.running = Some(status.release);
            state.activated.push(status.release);
            state.switches.push((name.clone(), now, None));
        }
        Phase::Succeeded => status.last_known_good = Some(status.release),
        Phase::RolledBack => status.running = status.last_known_good,
        _ => {}
    }
    if next.is_final() {
        let mut open = state.switches.iter_mut().rev();
        if let Some((_, _, end)) = open.find(|(app, _, _)| app == name) {
            *end = Some(now);
        }
    }
    if matches!(next, Phase::RolledBack | Phase::Failed) {
        status.reason = Some(Reason {
            code: ReasonCode::NotReady,
            service: None,
            message: "it is broken".to_owned(),
        });
    }
    true
}

fn report(client: &AsyncClient, id: &DeviceId, state: &mut State) {
    state.seq += 1;
    let reported = Reported {
        boot: state.boot,
        seq: state.seq,
        version: state.accepted,
        inventory: Inventory {
            agent_version: "test".to_owned(),
            arch: "amd64".to_owned(),
            kernel: "6".to_owned(),
            memory_bytes: 1 << 30,
            disk_bytes: 1 << 34,
            disk_free_bytes: 1 << 33,
            disk_reserve_bytes: Some(1 << 28),
            metered: Some(false),
            dev_nodes: Some(Vec::new()),
            labels: state.labels.clone(),
        },
        apps: state.apps.values().cloned().collect(),
    };
    let options = PublishOptions::at_least_once().retained();
    client
        .try_publish(
            topic::device(id, Leaf::Reported),
            frame::encode(&reported),
            options,
        )
        .unwrap();
}

fn kicked(client: &AsyncClient, id: &DeviceId, state: &mut State, kick: Kick) {
    let (leaf, bytes) = match kick {
        Kick::Beacon | Kick::Gauges(_) => {
            let memory_mib = match kick {
                Kick::Gauges(mib) => mib,
                _ => 1,
            };
            let beacon = Beacon {
                boot: state.boot,
                seq: 1,
                version: state.accepted,
                reported_seq: state.seq,
                event_seq: state.event_seq,
                memory_mib,
                load_centi: 1,
                secrets: None,
            };
            (Leaf::Beacon, frame::encode(&beacon))
        }
        Kick::Event { kept_from, seq } => {
            state.event_seq = state.event_seq.max(seq);
            let event = Event {
                seq,
                boot: state.boot,
                unix_ms: 1,
                app: None,
                service: None,
                kind: EventKind::AgentStarted,
                message: format!("event {seq}"),
            };
            let events = Events {
                kept_from,
                events: vec![event],
            };
            (Leaf::Event, frame::encode(&events))
        }
        Kick::Raw(leaf, bytes) => (leaf, bytes),
    };
    client
        .try_publish(
            topic::device(id, leaf),
            bytes,
            PublishOptions::at_least_once(),
        )
        .unwrap();
}
