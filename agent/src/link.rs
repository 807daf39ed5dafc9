//! The MQTT session with the hub's broker. No other module names the MQTT client.
//!
//! A task owns the connection ([`run`]); the rest of the agent holds a [`Link`] to send through and a
//! receiver of [`Incoming`]. The link carries messages and keeps none: what must not be lost is kept by
//! the sender until the hub acknowledges it ([`foreshore_protocol::message::Command::Ack`]).
//!
//! Durable acceptance: a head, or secrets, is handed over with a [`Receipt`]; the MQTT acknowledgement goes out only
//! when the receipt is given back, which the agent does after the head is on disk.
//!
//! ```text
//!  reconcile ──Outgoing──> run ──PUBLISH──> broker
//!      ▲                    │
//!      └──── Incoming ──────┘<── PUBLISH ──
//! ```

use std::sync::Arc;
use std::time::Duration;

use foreshore_protocol::message::{
    Beacon, Command, Events, Head, HubInfo, Lease, LeaseRequest, Presence, PullProgress, Reported,
};
use foreshore_protocol::secret::{PublicKey, SealedSecrets};
use foreshore_protocol::topic::{self, Leaf, Topic};
use foreshore_protocol::{DeviceId, Digest, Version, frame};
use rumqttc::mqttbytes::v5::{ConnectReturnCode, LastWill, LastWillProperties, Publish};
use rumqttc::{
    AckMode, AsyncClient, ConnectionError, Event as Polled, Incoming as Packet, ManualAck,
    MqttOptions, PublishOptions, PublishProperties, QoS, TlsConfiguration, Transport,
};
use tokio::sync::mpsc::{self, error::TrySendError};
use tokio::time::Instant;

use crate::config::HubConfig;

mod memory;
mod pause;
#[cfg(test)]
mod tests;
mod tls;

pub use pause::Pause;
pub use tls::TlsError;
pub(crate) use tls::client as tls_client;

/// MQTT packets larger than this are refused by both sides: 64 KiB.
const MAX_PACKET_BYTES: u32 = 64 * 1024;

/// The broker forgets the session after this long without a connection, in seconds. A returning device is
/// given its retained head anyway.
const SESSION_EXPIRY_SECS: u32 = 3600;

/// How many unacknowledged messages the broker may have on their way to us.
const RECEIVE_MAXIMUM: u16 = 8;

/// Messages that may wait for the broker's acknowledgement: more than the uplink's window. The client keeps
/// a table of this size from the start; without a limit it has 65,536 places and costs 16 MiB (measured).
const OUTGOING_MAXIMUM: u16 = 64;

/// How many messages wait in either channel before the sender must.
const QUEUE: usize = 32;

/// How many packets wait in the MQTT client: more than one event brings about, so that it is never full
/// while the connection makes progress.
const PACKETS: usize = 4 * QUEUE;

/// What a device is told, besides what all are told ([`topic::HUB`]).
const DOWN: [Leaf; 4] = [Leaf::Secrets, Leaf::Head, Leaf::Command, Leaf::Lease];

/// A request for a turn that no hub took for so long is worth nothing any more.
const REQUEST_EXPIRY_SECS: u32 = 60;

/// After the broker has refused our name or token, the first pause is this long: trying every second would
/// only be noise, and a fleet of them a storm.
const REFUSED_PAUSE: Duration = Duration::from_secs(30);

/// A device that was told to wait longer than this before it reconnects would seem lost.
const SPREAD_MAX: Duration = Duration::from_mins(10);

/// What the agent sends.
#[derive(Debug)]
pub enum Outgoing {
    /// The full status.
    Reported(Reported),
    /// A sign of life.
    Beacon(Beacon),
    /// How far a pull is.
    Pull(PullProgress),
    /// What happened, oldest first.
    Events(Events),
    /// Ask for a turn to switch, or give it back.
    LeaseRequest(LeaseRequest),
    /// Ask for the manifest of a release; it arrives as [`Incoming::Release`].
    Fetch(Digest),
    /// The manifest is here (or not wanted any more): stop asking.
    Fetched(Digest),
    /// A head, or secrets, is on disk.
    Accepted(Receipt),
    /// Say goodbye and end the session: `presence` goes to offline at once.
    Close,
}

/// What arrives.
#[derive(Debug)]
pub enum Incoming {
    /// Connected, subscribed, birth sent.
    Connected,
    /// Not connected any more, or not at all.
    Disconnected {
        /// For people.
        why: String,
        /// Whether the broker refused our name or token.
        refused: bool,
        /// Whether somebody answered where the broker should be, if only to refuse: then the way there is open.
        answered: bool,
    },
    /// A head; give the receipt back with [`Outgoing::Accepted`] once it is on disk.
    Head(Head, Receipt),
    /// The device's secrets; give the receipt back once they are on disk.
    Secrets(SealedSecrets, Receipt),
    /// A command.
    Command(Command),
    /// A turn to switch.
    Lease(Lease),
    /// What the hub tells everybody.
    Hub(HubInfo),
    /// Bytes that claim to be the manifest of this release; nothing was checked but the size.
    Release(Digest, Vec<u8>),
    /// A message that could not be read.
    Unreadable {
        /// On which topic.
        topic: String,
        /// Why.
        why: String,
    },
    /// The session was closed on [`Outgoing::Close`].
    Closed,
}

/// The right to acknowledge one message.
#[derive(Debug)]
pub struct Receipt(Option<ManualAck>);

impl Receipt {
    /// A receipt of no message, for tests without a broker.
    #[must_use]
    pub const fn none() -> Self {
        Self(None)
    }
}

/// The sending end.
#[derive(Debug, Clone)]
pub struct Link(mpsc::Sender<Outgoing>);

impl Link {
    /// Hands a message over. False when the link is busy or gone: the message is not sent, and the sender
    /// does as it does when a connection is lost.
    #[must_use]
    pub fn send(&self, message: Outgoing) -> bool {
        self.0.try_send(message).is_ok()
    }

    /// Asks for an orderly end, when there is room for that. False when the link is gone. Cancel safe: it is asked wholly or
    /// not at all.
    pub async fn close(&self) -> bool {
        self.0.send(Outgoing::Close).await.is_ok()
    }

    /// Hands a receipt over.
    ///
    /// # Errors
    ///
    /// With the receipt, when the link is busy or gone.
    pub fn acknowledge(&self, receipt: Receipt) -> Result<(), Receipt> {
        match self.0.try_send(Outgoing::Accepted(receipt)) {
            Err(TrySendError::Full(Outgoing::Accepted(receipt))) => Err(receipt),
            // A link that is gone never comes back.
            _ => Ok(()),
        }
    }
}

/// What the session says of this device at birth; asked anew for every connection.
#[derive(Debug, Clone, Copy)]
pub struct Birth {
    /// As in [`Presence::session`]; a new one for each connection, stored before use.
    pub session: u64,
    /// As in [`Presence::boot`].
    pub boot: u64,
    /// As in [`Presence::version`].
    pub version: Option<Version>,
    /// As in [`Presence::reported_seq`].
    pub reported_seq: u64,
    /// As in [`Presence::secrets_key`].
    pub secrets_key: Option<PublicKey>,
    /// As in [`Presence::secrets`].
    pub secrets: Option<Version>,
}

/// What the link needs to know.
#[derive(Debug)]
pub struct Settings {
    /// Who we are.
    pub device: DeviceId,
    /// What we show for it.
    pub token: String,
    /// How to reach the hub.
    pub hub: HubConfig,
    /// Seed for the pauses between attempts; any number that differs between devices.
    pub seed: u64,
}

/// Two channel ends for the agent, and the two for [`run`].
#[must_use]
pub fn channels() -> ((Link, mpsc::Receiver<Incoming>), Ends) {
    let (to_link, from_agent) = mpsc::channel(QUEUE);
    let (to_agent, from_link) = mpsc::channel(QUEUE);
    (
        (Link(to_link), from_link),
        Ends {
            from_agent,
            to_agent,
        },
    )
}

/// The link's channel ends.
#[derive(Debug)]
pub struct Ends {
    from_agent: mpsc::Receiver<Outgoing>,
    to_agent: mpsc::Sender<Incoming>,
}

/// Keeps a session with the broker until it is told to close or the agent drops its ends.
///
/// `birth` is asked before each attempt to connect.
///
/// # Errors
///
/// When TLS is asked for and cannot be set up. A broker that cannot be reached is no error: it is told and
/// tried again, for ever.
pub async fn run(
    settings: Settings,
    mut ends: Ends,
    mut birth: impl FnMut() -> Birth,
) -> Result<(), TlsError> {
    let transport = match settings.hub.broker.tls {
        true => Transport::Tls(TlsConfiguration::Rustls(Arc::new(tls::client(
            settings.hub.ca_file.as_deref(),
        )?))),
        false => Transport::Tcp,
    };
    let mut pause = Pause::new(settings.hub.reconnect_max.duration(), settings.seed);
    let mut spread = Duration::ZERO;
    loop {
        let options = options(&settings, transport.clone(), birth());
        let end = session(&settings, options, &mut ends, &mut pause, &mut spread).await;
        let (why, refused, answered) = match end {
            End::Lost {
                why,
                refused,
                answered,
            } => (why, refused, answered),
            End::Closed => {
                let _nobody_waits = ends.to_agent.send(Incoming::Closed).await;
                return Ok(());
            }
            End::AgentGone => return Ok(()),
        };
        if ends
            .to_agent
            .send(Incoming::Disconnected {
                why,
                refused,
                answered,
            })
            .await
            .is_err()
        {
            return Ok(());
        }
        let wait = pause.next(
            if refused {
                REFUSED_PAUSE
            } else {
                Duration::ZERO
            },
            std::mem::take(&mut spread),
        );
        if !idle(&mut ends, wait).await {
            return Ok(());
        }
    }
}

/// How a session ended.
enum End {
    Lost {
        why: String,
        refused: bool,
        /// Somebody said no where the broker should be.
        answered: bool,
    },
    Closed,
    AgentGone,
}

impl End {
    /// Not by the broker's word.
    const fn lost(why: String) -> Self {
        Self::Lost {
            why,
            refused: false,
            answered: false,
        }
    }
}

/// Waits, throwing away what the agent wants to send meanwhile; false when it wants to end.
async fn idle(ends: &mut Ends, wait: Duration) -> bool {
    let until = Instant::now() + wait;
    loop {
        // Cancel safe: `recv` loses nothing when the timer wins.
        match tokio::time::timeout_at(until, ends.from_agent.recv()).await {
            Err(_) => return true,
            Ok(Some(Outgoing::Close)) => {
                let _nobody_waits = ends.to_agent.send(Incoming::Closed).await;
                return false;
            }
            Ok(None) => return false,
            Ok(Some(_)) => {}
        }
    }
}

/// One connection, from its first attempt to its end.
async fn session(
    settings: &Settings,
    (options, greetings): (MqttOptions, Greetings),
    ends: &mut Ends,
    pause: &mut Pause,
    spread: &mut Duration,
) -> End {
    let device = &settings.device;
    let (client, mut events) = AsyncClient::builder(options).capacity(PACKETS).build();
    let mut connected: Option<Instant> = None;
    let mut unanswered = Unanswered::new(settings.hub.answer_within());
    let mut closing = false;
    let end = 'connection: loop {
        // `EventLoop::poll` that is dropped begins to connect anew, and on a connection loses the packet for which there was no
        // room yet: one call of it stays, however often the agent has something to send.
        let polled = {
            let mut polled = std::pin::pin!(events.poll());
            loop {
                // Cancel safe: the one is kept, and `recv` loses nothing. An answer that is here counts before the time.
                tokio::select! {
                    biased;
                    polled = &mut polled => break polled,
                    message = ends.from_agent.recv(), if !closing => match message {
                        None => return End::AgentGone,
                        Some(Outgoing::Close) if connected.is_none() => return End::Closed,
                        Some(Outgoing::Close) => {
                            closing = true;
                            // A disconnect on purpose discards the Will, so we say it ourselves.
                            let said = say(&client, device, greetings.goodbye.clone());
                            if said.is_err() || client.try_disconnect().is_err() {
                                return End::Closed;
                            }
                        }
                        // It is sent again when `Connected` is told.
                        Some(_) if connected.is_none() => {}
                        Some(message) => {
                            unanswered.sent(&message);
                            if let Err(why) = send(&client, device, message) {
                                break 'connection End::lost(why);
                            }
                        }
                    },
                    () = unanswered.overdue() => {
                        break 'connection End::lost("the broker does not answer".to_owned());
                    }
                }
            }
        };
        let told = match polled {
            Ok(Polled::Incoming(Packet::ConnAck(_))) => {
                connected = Some(Instant::now());
                unanswered.greeted();
                match greet(&client, device, greetings.birth.clone()) {
                    Ok(()) => Some(Incoming::Connected),
                    Err(why) => break End::lost(why),
                }
            }
            Ok(Polled::Incoming(Packet::Publish(message))) => {
                Some(arrived(&client, &message, spread))
            }
            Ok(Polled::Incoming(Packet::Disconnect(reason))) => {
                break End::Lost {
                    why: format!("the broker closed the session: {:?}", reason.reason_code),
                    refused: false,
                    answered: true,
                };
            }
            Ok(Polled::Incoming(packet)) => {
                unanswered.heard(&packet);
                None
            }
            Ok(Polled::Outgoing(_) | Polled::Auth(_)) => None,
            Err(error) => break lost(&error),
        };
        if let Some(told) = told
            && ends.to_agent.send(told).await.is_err()
        {
            return End::AgentGone;
        }
    };
    if closing {
        return End::Closed;
    }
    if let Some(since) = connected {
        pause.held(since.elapsed());
    }
    end
}

/// What the broker was asked and has not answered. Where packets are swallowed on the way nothing else shows that: the
/// client puts its ping off whenever it writes, and TCP gives up after a quarter of an hour (tcp(7), `tcp_retries2`).
#[derive(Debug)]
struct Unanswered {
    count: usize,
    /// When the broker last answered while there were any, or was asked the first.
    since: Instant,
    within: Duration,
}

impl Unanswered {
    fn new(within: Duration) -> Self {
        Self {
            count: 0,
            since: Instant::now(),
            within,
        }
    }

    fn asked(&mut self, times: usize) {
        if self.count == 0 {
            self.since = Instant::now();
        }
        self.count += times;
    }

    /// The subscriptions and the birth of [`greet`].
    fn greeted(&mut self) {
        self.asked(DOWN.len() + 2);
    }

    fn sent(&mut self, message: &Outgoing) {
        match message {
            Outgoing::Reported(_)
            | Outgoing::Events(_)
            | Outgoing::LeaseRequest(_)
            | Outgoing::Fetch(_)
            | Outgoing::Fetched(_) => self.asked(1),
            // QoS 0, or an answer itself; nothing is sent after a goodbye.
            Outgoing::Beacon(_) | Outgoing::Pull(_) | Outgoing::Accepted(_) | Outgoing::Close => {}
        }
    }

    fn heard(&mut self, packet: &Packet) {
        match packet {
            Packet::PubAck(_) | Packet::SubAck(_) | Packet::UnsubAck(_) => {
                self.count = self.count.saturating_sub(1);
            }
            // The ping came after all the rest (MQTT 5.0, section 4.6), so that has arrived.
            Packet::PingResp => self.count = 0,
            _ => return,
        }
        self.since = Instant::now();
    }

    /// When it is out of reach if it does not answer until then.
    fn late_at(&self) -> Option<Instant> {
        (self.count > 0).then(|| self.since + self.within)
    }

    /// Returns when it is late, and never when nothing was asked. Cancel safe.
    async fn overdue(&self) {
        match self.late_at() {
            None => std::future::pending().await,
            Some(at) => tokio::time::sleep_until(at).await,
        }
    }
}

/// What is said of our presence, framed.
struct Greetings {
    birth: Vec<u8>,
    goodbye: Vec<u8>,
}

fn options(settings: &Settings, transport: Transport, birth: Birth) -> (MqttOptions, Greetings) {
    let broker = &settings.hub.broker;
    let presence = |online| {
        frame::encode(&Presence {
            session: birth.session,
            online,
            boot: birth.boot,
            version: birth.version,
            reported_seq: birth.reported_seq,
            max_schema: frame::MAX_SCHEMA,
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            secrets_key: birth.secrets_key,
            secrets: birth.secrets,
        })
    };
    let delay = u32::try_from(settings.hub.will_delay.millis() / 1000).unwrap_or(0);
    let properties = LastWillProperties {
        delay_interval: Some(delay),
        payload_format_indicator: None,
        message_expiry_interval: None,
        content_type: None,
        response_topic: None,
        correlation_data: None,
        user_properties: Vec::new(),
    };
    let topic = topic::device(&settings.device, Leaf::Presence);
    let will = LastWill::new(
        topic,
        presence(false),
        QoS::AtLeastOnce,
        true,
        Some(properties),
    );
    let mut options = MqttOptions::new(
        settings.device.as_str(),
        (broker.host.as_str(), broker.port),
    );
    options
        .set_transport(transport)
        .set_credentials(
            settings.device.as_str().to_owned(),
            settings.token.clone().into_bytes(),
        )
        .set_keep_alive(settings.hub.keepalive_secs())
        .set_connect_timeout(Duration::from_secs(20))
        .set_clean_start(false)
        .set_session_expiry_interval(Some(SESSION_EXPIRY_SECS))
        .set_session_store(memory::NoMemory)
        .set_receive_maximum(Some(RECEIVE_MAXIMUM))
        .set_outgoing_inflight_upper_limit(OUTGOING_MAXIMUM)
        .set_max_packet_size(Some(MAX_PACKET_BYTES))
        .set_ack_mode(AckMode::Manual)
        .set_last_will(will);
    let greetings = Greetings {
        birth: presence(true),
        goodbye: presence(false),
    };
    (options, greetings)
}

/// Subscribes and says that we are here. The session may have been resumed; subscribing again is harmless
/// and brings the retained head.
fn greet(client: &AsyncClient, device: &DeviceId, birth: Vec<u8>) -> Result<(), String> {
    let down = DOWN.map(|leaf| topic::device(device, leaf));
    for topic in down.into_iter().chain([topic::HUB.to_owned()]) {
        client
            .try_subscribe(topic, QoS::AtLeastOnce)
            .map_err(|error| error.to_string())?;
    }
    say(client, device, birth)
}

fn say(client: &AsyncClient, device: &DeviceId, presence: Vec<u8>) -> Result<(), String> {
    let retained = PublishOptions::new(QoS::AtLeastOnce).retain(true);
    client
        .try_publish(topic::device(device, Leaf::Presence), presence, retained)
        .map_err(|error| error.to_string())
}

fn send(client: &AsyncClient, device: &DeviceId, message: Outgoing) -> Result<(), String> {
    let publish = |leaf, bytes: Vec<u8>, qos, retain| {
        let options = PublishOptions::new(qos).retain(retain);
        client
            .try_publish(topic::device(device, leaf), bytes, options)
            .map_err(|error| error.to_string())
    };
    match message {
        Outgoing::Reported(reported) => publish(
            Leaf::Reported,
            frame::encode(&reported),
            QoS::AtLeastOnce,
            true,
        ),
        Outgoing::Beacon(beacon) => {
            publish(Leaf::Beacon, frame::encode(&beacon), QoS::AtMostOnce, false)
        }
        Outgoing::Pull(progress) => {
            publish(Leaf::Pull, frame::encode(&progress), QoS::AtMostOnce, false)
        }
        Outgoing::Events(events) => {
            publish(Leaf::Event, frame::encode(&events), QoS::AtLeastOnce, false)
        }
        Outgoing::LeaseRequest(request) => {
            // It is repeated before that.
            let properties = PublishProperties {
                message_expiry_interval: Some(REQUEST_EXPIRY_SECS),
                ..PublishProperties::default()
            };
            let options = PublishOptions::at_least_once().properties(properties);
            let topic = topic::device(device, Leaf::LeaseRequest);
            client
                .try_publish(topic, frame::encode(&request), options)
                .map_err(|error| error.to_string())
        }
        Outgoing::Fetch(digest) => client
            .try_subscribe(topic::release(&digest), QoS::AtLeastOnce)
            .map_err(|error| error.to_string()),
        Outgoing::Fetched(digest) => client
            .try_unsubscribe(topic::release(&digest))
            .map_err(|error| error.to_string()),
        Outgoing::Accepted(Receipt(Some(ack))) => client
            .try_manual_ack(ack)
            .map_err(|error| error.to_string()),
        // `Close` never gets here.
        Outgoing::Accepted(Receipt(None)) | Outgoing::Close => Ok(()),
    }
}

/// Reads one message. Everything but a head and secrets is acknowledged at once.
fn arrived(client: &AsyncClient, message: &Publish, spread: &mut Duration) -> Incoming {
    let topic = String::from_utf8_lossy(&message.topic).into_owned();
    let ack = client.prepare_ack(message);
    let read = match Topic::parse(&topic) {
        Some(Topic::Device(_, Leaf::Head)) => match frame::decode(&message.payload) {
            Ok(head) => return Incoming::Head(head, Receipt(ack)),
            Err(error) => Err(error.to_string()),
        },
        Some(Topic::Device(_, Leaf::Secrets)) => match frame::decode(&message.payload) {
            Ok(sealed) => return Incoming::Secrets(sealed, Receipt(ack)),
            Err(error) => Err(error.to_string()),
        },
        Some(Topic::Device(_, Leaf::Command)) => frame::decode(&message.payload)
            .map(Incoming::Command)
            .map_err(|error| error.to_string()),
        Some(Topic::Device(_, Leaf::Lease)) => frame::decode(&message.payload)
            .map(Incoming::Lease)
            .map_err(|error| error.to_string()),
        Some(Topic::Hub) => frame::decode(&message.payload)
            .map(|info: HubInfo| {
                *spread = Duration::from_millis(info.reconnect_spread_ms.into()).min(SPREAD_MAX);
                Incoming::Hub(info)
            })
            .map_err(|error| error.to_string()),
        Some(Topic::Release(digest)) => Ok(Incoming::Release(digest, message.payload.to_vec())),
        Some(Topic::Device(..)) | None => Err("not a topic that we read".to_owned()),
    };
    if let Some(ack) = ack {
        // A full queue here means that the connection is going down; the broker sends it again.
        let _sent_again = client.try_manual_ack(ack);
    }
    read.unwrap_or_else(|why| Incoming::Unreadable { topic, why })
}

fn lost(error: &ConnectionError) -> End {
    let refused = matches!(
        error,
        ConnectionError::ConnectionRefused(
            ConnectReturnCode::BadUserNamePassword
                | ConnectReturnCode::NotAuthorized
                | ConnectReturnCode::ClientIdentifierNotValid
                | ConnectReturnCode::Banned
        )
    );
    let answered = match error {
        ConnectionError::ConnectionRefused(_) => true,
        ConnectionError::Io(error) => error.kind() == std::io::ErrorKind::ConnectionRefused,
        _ => false,
    };
    End::Lost {
        why: error.to_string(),
        refused,
        answered,
    }
}
