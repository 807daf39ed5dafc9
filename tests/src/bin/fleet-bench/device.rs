//! PURE: a simulated device. It says to its hub what an agent with one app of one service says, in the same packets and
//! at the same pace (`agent/src/link.rs`, `agent/src/reconcile/uplink.rs`), and does what it is told in no time worth
//! speaking of.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use foreshore_protocol::message::{
    AppStatus, Beacon, Command, Event, EventKind, Events, Head, HeadApp, Inventory, Lease,
    LeaseRequest, MAX_EVENTS, Phase, Presence, Reason, ReasonCode, Reported, ServiceState,
    ServiceStatus,
};
use foreshore_protocol::release::Release;
use foreshore_protocol::secret::PublicKey;
use foreshore_protocol::topic::{self, Leaf, Topic};
use foreshore_protocol::{DeviceId, Digest, Version, frame};
use rumqttc::{
    Connect, ConnectAuth, ConnectProperties, LastWill, LastWillProperties, Packet, PubAck, Publish,
    PublishProperties, QoS, Subscribe, SubscribeFilter, Unsubscribe,
};

/// From the manifest of a release to "all images are here": they are small, or here.
const STAGE: Duration = Duration::from_millis(50);

/// From there to the container's start.
const START: Duration = Duration::from_millis(20);

/// From there to the first probe that passes.
const READY: Duration = Duration::from_millis(50);

/// What all of it takes; the soak comes on top.
pub(crate) const WORK: Duration = Duration::from_millis(120);

/// Reports are so far apart; the end of an update does not wait.
pub(crate) const REPORT_INTERVAL: Duration = Duration::from_secs(5);

/// The default of `hub.keepalive`.
pub(crate) const KEEPALIVE: Duration = Duration::from_secs(300);

/// What the hub did not acknowledge is sent again after so long, and then after twice as long each time.
const RESEND_FIRST: Duration = Duration::from_secs(30);
const RESEND_LAST: Duration = Duration::from_mins(15);

/// An event waits so long for others to travel with.
const EVENT_LINGER: Duration = Duration::from_secs(1);

/// Pauses between requests for a turn.
const TURN_FIRST: Duration = Duration::from_secs(15);
const TURN_LAST: Duration = Duration::from_secs(45);

/// News of a device.
#[derive(Debug, Clone, Copy)]
pub(crate) enum News {
    /// The hub has stored its first report.
    Joined,
    /// The hub has acknowledged the report that says that this release has succeeded.
    Succeeded {
        /// Which.
        release: Digest,
        /// When the head that assigned it came.
        head_at: Instant,
        /// When the acknowledgement came.
        acknowledged_at: Instant,
    },
}

/// What comes next, without anybody's doing.
#[derive(Debug, Clone, Copy)]
enum Step {
    Staged,
    Started,
    Ready,
    Soaked,
}

#[derive(Debug)]
struct App {
    desired: HeadApp,
    status: AppStatus,
    head_at: Instant,
    /// The report that says that it has succeeded.
    ends_with: Option<u64>,
    acknowledged: bool,
}

#[derive(Debug, Clone, PartialEq)]
struct Said {
    version: Option<Version>,
    apps: Vec<AppStatus>,
}

#[derive(Debug)]
struct Wait {
    nonce: u64,
    next: Instant,
    pause: Duration,
}

/// One device, while it is connected.
#[derive(Debug)]
pub(crate) struct Device {
    id: DeviceId,
    packet: u16,
    head: Option<Head>,
    known: Vec<Digest>,
    fetching: Option<Digest>,
    app: Option<App>,
    containers: u32,
    step: Option<(Instant, Step)>,
    nonce: u64,
    waits: Option<Wait>,
    events: VecDeque<Event>,
    event_seq: u64,
    sent_event: u64,
    events_at: Option<Instant>,
    seq: u64,
    said: Option<Said>,
    said_at: Option<Instant>,
    unsent: bool,
    urgent: bool,
    acknowledged: u64,
    resend_at: Option<Instant>,
    resend_pause: Duration,
    beacons: u64,
    connected: bool,
    wrote_at: Option<Instant>,
    /// What happened since this was looked at last.
    pub(crate) news: Vec<News>,
}

impl Device {
    /// Device `number`, with a name of its own.
    pub(crate) fn new(number: usize) -> Self {
        let id = name(number)
            .parse()
            .expect("letters and digits are a device's id");
        let mut device = Self {
            id,
            packet: 0,
            head: None,
            known: Vec::new(),
            fetching: None,
            app: None,
            containers: 0,
            step: None,
            nonce: 0,
            waits: None,
            events: VecDeque::new(),
            event_seq: 0,
            sent_event: 0,
            events_at: None,
            seq: 0,
            said: None,
            said_at: None,
            unsent: false,
            urgent: false,
            acknowledged: 0,
            resend_at: None,
            resend_pause: RESEND_FIRST,
            beacons: 0,
            connected: false,
            wrote_at: None,
            news: Vec::new(),
        };
        device.event(
            EventKind::AgentStarted,
            false,
            "the agent started: version 0.1.0",
        );
        device
    }

    /// Its name.
    pub(crate) const fn id(&self) -> &DeviceId {
        &self.id
    }

    /// The first packet of a connection. What an earlier connection did not bring to an end begins anew.
    pub(crate) fn connect(&mut self, token: &str) -> Packet {
        self.connected = false;
        self.sent_event = 0;
        self.fetching = None;
        let properties = ConnectProperties {
            session_expiry_interval: Some(3600),
            receive_maximum: Some(8),
            max_packet_size: Some(64 * 1024),
            ..ConnectProperties::new()
        };
        let connect = Connect {
            keep_alive: u16::try_from(KEEPALIVE.as_secs()).unwrap_or(u16::MAX),
            client_id: self.id.as_str().to_owned(),
            clean_start: false,
            properties: Some(properties),
        };
        let delay = LastWillProperties {
            delay_interval: Some(90),
            payload_format_indicator: None,
            message_expiry_interval: None,
            content_type: None,
            response_topic: None,
            correlation_data: None,
            user_properties: Vec::new(),
        };
        let will = LastWill::new(
            topic::device(&self.id, Leaf::Presence),
            frame::encode(&self.presence(false)),
            QoS::AtLeastOnce,
            true,
            Some(delay),
        );
        let login = ConnectAuth::UsernamePassword {
            username: self.id.as_str().to_owned(),
            password: token.to_owned().into(),
        };
        Packet::Connect(connect, Some(will), login)
    }

    /// Takes a packet from the broker; what is sent then goes to the end of `out`.
    pub(crate) fn handle(&mut self, packet: Packet, now: Instant, out: &mut Vec<Packet>) {
        match packet {
            Packet::ConnAck(_) => self.greet(out),
            Packet::Publish(publish) => self.arrived(&publish, now, out),
            _ => {}
        }
        self.go_on(now, out);
    }

    /// Does what is due.
    pub(crate) fn go_on(&mut self, now: Instant, out: &mut Vec<Packet>) {
        while let Some((_, step)) = self.step.take_if(|(at, _)| now >= *at) {
            self.take(step, now);
        }
        if self.connected {
            self.flush(now, out);
            if out.is_empty() && self.wrote_at.is_some_and(|at| now >= at + KEEPALIVE) {
                out.push(Packet::PingReq);
            }
        }
        if !out.is_empty() {
            self.wrote_at = Some(now);
        }
    }

    /// When [`Self::go_on`] has something to do.
    pub(crate) fn wake_at(&self) -> Option<Instant> {
        let step = self.step.map(|(at, _)| at);
        if !self.connected {
            return step;
        }
        let report = self
            .is_changed()
            .then_some(self.said_at)
            .flatten()
            .map(|at| at + REPORT_INTERVAL);
        let turn = self.waits.as_ref().map(|wait| wait.next);
        let keepalive = self.wrote_at.map(|at| at + KEEPALIVE);
        [
            step,
            report,
            turn,
            keepalive,
            self.resend_at,
            self.events_at,
        ]
        .into_iter()
        .flatten()
        .min()
    }

    /// A beacon, which comes every 15 minutes, and within one after an update.
    pub(crate) fn beacon(&mut self) -> Packet {
        self.beacons += 1;
        let beacon = Beacon {
            boot: 1,
            seq: self.beacons,
            version: self.version(),
            reported_seq: self.seq,
            event_seq: self.event_seq,
            memory_mib: 25,
            load_centi: 12,
            secrets: None,
        };
        self.publish(
            Leaf::Beacon,
            frame::encode(&beacon),
            QoS::AtMostOnce,
            false,
            None,
        )
    }

    fn greet(&mut self, out: &mut Vec<Packet>) {
        let down = [
            topic::device(&self.id, Leaf::Secrets),
            topic::device(&self.id, Leaf::Head),
            topic::device(&self.id, Leaf::Command),
            topic::device(&self.id, Leaf::Lease),
            topic::HUB.to_owned(),
        ];
        for topic in down {
            out.push(self.subscribe(topic));
        }
        let birth = frame::encode(&self.presence(true));
        out.push(self.publish(Leaf::Presence, birth, QoS::AtLeastOnce, true, None));
        self.connected = true;
        self.unsent = self.said.is_some();
        self.urgent = true;
    }

    fn arrived(&mut self, message: &Publish, now: Instant, out: &mut Vec<Packet>) {
        if message.qos == QoS::AtLeastOnce {
            out.push(Packet::PubAck(PubAck::new(message.pkid, None)));
        }
        let topic = String::from_utf8_lossy(&message.topic);
        match Topic::parse(&topic) {
            Some(Topic::Device(_, Leaf::Head)) => {
                let head = frame::decode(&message.payload).expect("the hub sends heads");
                self.accept(head, now, out);
            }
            Some(Topic::Device(_, Leaf::Command)) => {
                match frame::decode(&message.payload).expect("the hub sends commands") {
                    Command::Ack {
                        event, reported, ..
                    } => self.acknowledge(event, reported, now),
                    Command::Resync => {
                        self.unsent = self.said.is_some();
                        self.urgent = true;
                        self.sent_event = 0;
                        self.resend_pause = RESEND_FIRST;
                    }
                }
            }
            Some(Topic::Device(_, Leaf::Lease)) => {
                let lease: Lease = frame::decode(&message.payload).expect("the hub sends leases");
                if self
                    .waits
                    .take_if(|wait| wait.nonce == lease.nonce)
                    .is_some()
                {
                    self.switch(now);
                }
            }
            Some(Topic::Release(digest)) if self.fetching == Some(digest) => {
                self.fetching = None;
                out.push(self.unsubscribe(topic.into_owned()));
                Release::from_bytes(&message.payload, &digest).expect("the digest is right");
                self.known.push(digest);
                self.stage(now);
            }
            _ => {}
        }
    }

    fn accept(&mut self, head: Head, now: Instant, out: &mut Vec<Packet>) {
        if self
            .version()
            .is_some_and(|version| head.version <= version)
        {
            return;
        }
        let version = head.version;
        self.event(EventKind::Accepted, false, format!("accepted {version}"));
        let desired = head.apps.first().cloned();
        self.head = Some(head);
        let Some(desired) = desired else {
            self.app = None;
            return;
        };
        let (since, release) = (desired.since, desired.release);
        if (self.app.as_ref()).is_some_and(|app| app.status.since == since) {
            return;
        }
        let before = self.app.take().map(|app| app.status);
        let status = AppStatus {
            app: desired.app.clone(),
            since,
            release,
            phase: Phase::Accepted,
            reason: None,
            running: before.as_ref().and_then(|before| before.running),
            last_known_good: before.as_ref().and_then(|before| before.last_known_good),
            services: before.map_or_else(Vec::new, |before| before.services),
        };
        self.app = Some(App {
            desired,
            status,
            head_at: now,
            ends_with: None,
            acknowledged: false,
        });
        (self.step, self.waits) = (None, None);
        if self.known.contains(&release) {
            self.stage(now);
        } else {
            self.fetching = Some(release);
            out.push(self.subscribe(topic::release(&release)));
        }
    }

    fn acknowledge(&mut self, event: u64, reported: u64, now: Instant) {
        while (self.events.front()).is_some_and(|first| first.seq <= event) {
            self.events.pop_front();
        }
        if self.acknowledged == 0 && reported > 0 {
            self.news.push(News::Joined);
        }
        self.acknowledged = self.acknowledged.max(reported.min(self.seq));
        self.resend_pause = RESEND_FIRST;
        self.resend_at = None;
        if let Some(app) = &mut self.app
            && !app.acknowledged
            && app.ends_with.is_some_and(|seq| self.acknowledged >= seq)
        {
            app.acknowledged = true;
            self.news.push(News::Succeeded {
                release: app.status.release,
                head_at: app.head_at,
                acknowledged_at: now,
            });
        }
    }

    fn stage(&mut self, now: Instant) {
        self.phase(Phase::Staging, None);
        self.step = Some((now + STAGE, Step::Staged));
    }

    fn switch(&mut self, now: Instant) {
        self.phase(Phase::Activating, None);
        let running = (self.app.as_ref()).is_some_and(|app| app.status.running.is_some());
        if running {
            let message = format!("container fleet.server.{} removed", self.containers);
            self.event(EventKind::Removed, true, message);
        }
        self.step = Some((now + START, Step::Started));
    }

    fn take(&mut self, step: Step, now: Instant) {
        let Some(app) = &self.app else { return };
        let (release, soak) = (
            app.desired.release,
            Duration::from_millis(app.desired.soak_ms),
        );
        let in_turns = (self.head.as_ref()).is_some_and(|head| !head.budgets.is_empty())
            || app.desired.windows.switch.is_some();
        match step {
            Step::Staged => {
                let message = format!("all images of release {} are here", release.short());
                self.event(EventKind::ImageStaged, false, message);
                if in_turns {
                    let reason = Reason::new(
                        ReasonCode::WaitsForTurn,
                        None,
                        "a disruption budget lets others of the device's group go first",
                    );
                    self.phase(Phase::Waiting, Some(reason));
                    self.waits = Some(Wait {
                        nonce: 0,
                        next: now,
                        pause: TURN_FIRST,
                    });
                } else {
                    self.switch(now);
                }
            }
            Step::Started => {
                self.containers += 1;
                let message = format!("container fleet.server.{} started", self.containers);
                self.event(EventKind::Started, true, message);
                self.change(|status| {
                    status.running = Some(release);
                    status.services = services(false);
                });
                self.step = Some((now + READY, Step::Ready));
            }
            Step::Ready => {
                self.event(
                    EventKind::Ready,
                    true,
                    "service server of app fleet is ready",
                );
                self.change(|status| status.services = services(true));
                self.phase(Phase::Soaking, None);
                self.step = Some((now + soak, Step::Soaked));
            }
            Step::Soaked => {
                let message = format!("release {} is the last-known-good now", release.short());
                self.event(EventKind::Succeeded, true, message);
                self.change(|status| status.last_known_good = Some(release));
                self.phase(Phase::Succeeded, None);
                self.known.retain(|known| *known == release);
                self.urgent = true;
            }
        }
    }

    fn phase(&mut self, phase: Phase, reason: Option<Reason>) {
        self.change(|status| (status.phase, status.reason) = (phase, reason));
    }

    fn change(&mut self, how: impl FnOnce(&mut AppStatus)) {
        if let Some(app) = &mut self.app {
            how(&mut app.status);
        }
    }

    fn flush(&mut self, now: Instant, out: &mut Vec<Packet>) {
        if self.resend_at.is_some_and(|at| now >= at) {
            self.unsent |= self.acknowledged < self.seq;
            self.sent_event = 0;
            self.resend_pause = (self.resend_pause * 2).min(RESEND_LAST);
            self.resend_at = None;
        }
        self.flush_report(now, out);
        self.flush_events(now, out);
        self.flush_request(now, out);
        let waits = self.acknowledged < self.seq || !self.events.is_empty();
        if !waits {
            self.resend_at = None;
        } else if self.resend_at.is_none() {
            self.resend_at = Some(now + self.resend_pause);
        }
    }

    fn flush_events(&mut self, now: Instant, out: &mut Vec<Packet>) {
        let events: Vec<Event> = (self.events.iter().take(MAX_EVENTS))
            .filter(|event| event.seq > self.sent_event)
            .cloned()
            .collect();
        let Some(newest) = events.last().map(|event| event.seq) else {
            self.events_at = None;
            return;
        };
        let due = *self.events_at.get_or_insert(now + EVENT_LINGER);
        if now >= due || events.len() == MAX_EVENTS {
            (self.sent_event, self.events_at) = (newest, None);
            let kept_from = self.events.front().map_or(0, |event| event.seq);
            let frame = frame::encode(&Events { kept_from, events });
            out.push(self.publish(Leaf::Event, frame, QoS::AtLeastOnce, false, None));
        }
    }

    fn flush_report(&mut self, now: Instant, out: &mut Vec<Packet>) {
        let due = self.urgent || self.said_at.is_none_or(|at| now >= at + REPORT_INTERVAL);
        if self.is_changed() && due {
            self.seq += 1;
            self.said = Some(self.status());
            self.said_at = Some(now);
            (self.unsent, self.urgent) = (true, false);
            if let Some(app) = &mut self.app
                && app.status.phase == Phase::Succeeded
            {
                app.ends_with.get_or_insert(self.seq);
            }
        }
        if self.unsent
            && let Some(said) = self.said.clone()
        {
            let report = Reported {
                boot: 1,
                seq: self.seq,
                version: said.version,
                inventory: inventory(),
                apps: said.apps,
            };
            out.push(self.publish(
                Leaf::Reported,
                frame::encode(&report),
                QoS::AtLeastOnce,
                true,
                None,
            ));
            self.unsent = false;
        }
    }

    fn flush_request(&mut self, now: Instant, out: &mut Vec<Packet>) {
        let Some(app) = &self.app else { return };
        let Some(wait) = self.waits.as_mut().filter(|wait| now >= wait.next) else {
            return;
        };
        self.nonce += 1;
        wait.nonce = self.nonce;
        wait.next = now + wait.pause;
        wait.pause = (wait.pause * 2).min(TURN_LAST);
        let request = LeaseRequest {
            boot: 1,
            nonce: self.nonce,
            app: app.desired.app.clone(),
            since: app.desired.since,
            release: app.desired.release,
            wanted: true,
        };
        let frame = frame::encode(&request);
        out.push(self.publish(Leaf::LeaseRequest, frame, QoS::AtLeastOnce, false, Some(60)));
    }

    fn status(&self) -> Said {
        Said {
            version: self.version(),
            apps: (self.app.iter().map(|app| app.status.clone())).collect(),
        }
    }

    fn is_changed(&self) -> bool {
        let Some(said) = &self.said else { return true };
        said.version != self.version()
            || said.apps.first() != self.app.as_ref().map(|app| &app.status)
    }

    fn version(&self) -> Option<Version> {
        self.head.as_ref().map(|head| head.version)
    }

    fn presence(&self, online: bool) -> Presence {
        Presence {
            session: 1,
            online,
            boot: 1,
            version: self.version(),
            reported_seq: self.seq,
            max_schema: frame::MAX_SCHEMA,
            agent_version: "0.1.0".to_owned(),
            secrets_key: Some(PublicKey::from_bytes(
                *Digest::of(self.id.as_str().as_bytes()).as_bytes(),
            )),
            secrets: None,
        }
    }

    fn event(&mut self, kind: EventKind, of_service: bool, message: impl Into<String>) {
        self.event_seq += 1;
        let unix_ms = 1_790_000_000_000 + self.event_seq;
        let mut event = Event::new(self.event_seq, 1, unix_ms, kind, message);
        if of_service && let Some(app) = &self.app {
            let service = services(true).pop().map(|status| status.service);
            event = event.about(app.desired.app.clone(), service);
        }
        self.events.push_back(event);
    }

    fn packet(&mut self) -> u16 {
        self.packet = self.packet.checked_add(1).unwrap_or(1);
        self.packet
    }

    fn subscribe(&mut self, topic: String) -> Packet {
        let mut subscribe = Subscribe::new(SubscribeFilter::new(topic, QoS::AtLeastOnce), None);
        subscribe.pkid = self.packet();
        Packet::Subscribe(subscribe)
    }

    fn unsubscribe(&mut self, topic: String) -> Packet {
        let mut unsubscribe = Unsubscribe::new(topic, None);
        unsubscribe.pkid = self.packet();
        Packet::Unsubscribe(unsubscribe)
    }

    fn publish(
        &mut self,
        leaf: Leaf,
        frame: Vec<u8>,
        qos: QoS,
        retain: bool,
        expiry_secs: Option<u32>,
    ) -> Packet {
        let properties = expiry_secs.map(|seconds| PublishProperties {
            message_expiry_interval: Some(seconds),
            ..PublishProperties::default()
        });
        let mut publish = Publish::new(topic::device(&self.id, leaf), qos, frame, properties);
        publish.retain = retain;
        if qos == QoS::AtLeastOnce {
            publish.pkid = self.packet();
        }
        Packet::Publish(publish)
    }
}

/// The name of a device.
pub(crate) fn name(number: usize) -> String {
    format!("sim-{number:06}")
}

fn services(ready: bool) -> Vec<ServiceStatus> {
    vec![ServiceStatus {
        service: "server".parse().expect("a service's name"),
        state: ServiceState::Running,
        ready,
        restarts: 0,
        kept: None,
    }]
}

/// Of a small gateway.
fn inventory() -> Inventory {
    let nodes = [
        "/dev/gpiochip0",
        "/dev/i2c-1",
        "/dev/spidev0.0",
        "/dev/ttyUSB0",
    ];
    Inventory {
        agent_version: "0.1.0".to_owned(),
        arch: "arm64".to_owned(),
        kernel: "6.12.48+deb13-arm64".to_owned(),
        memory_bytes: 1 << 30,
        disk_bytes: 8 << 30,
        disk_free_bytes: 4 << 30,
        disk_reserve_bytes: Some(512 << 20),
        metered: Some(false),
        dev_nodes: Some(nodes.map(str::to_owned).to_vec()),
        labels: [(
            "role".parse().expect("a label's key"),
            "web".parse().expect("a label's value"),
        )]
        .into(),
    }
}
