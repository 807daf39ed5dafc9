//! The hub as an MQTT client: its one connection to the broker, embedded or not.
//!
//! The broker is a lossy pipe and its retained messages a cache that may vanish. So every connection begins
//! with a clean session; the hub reads the retained states of all devices anew, shard by shard (brokers lose part of
//! a large retained snapshot behind one wildcard), and looks whether the retained [`HubInfo`] is the one that it
//! published last. If it is not, the cache is not ours any more, and everything is published again from
//! SQLite. If it is, the hub asks the devices for what they could not deliver meanwhile.
//!
//! No other module names the MQTT library.
//!
//! | file | what it owns |
//! |---|---|
//! | [`inbound`] | from packets to committed changes |
//! | [`outbox`] | heads, releases and the hub's own topic, at a set rate |
//! | [`commands`] | acknowledgements and requests to devices |
//! | [`leases`] | whose turn it is to switch |

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use foreshore_protocol::message::HubInfo;
use foreshore_protocol::topic::{self, Leaf};
use rumqttc::{
    AsyncClient, Event, EventLoop, IncomingPacketSizeLimit, MqttOptions, Packet, Publish, QoS,
    SessionMode, SubscribeFilterInput, SubscribeReasonCode,
};
use tokio::sync::{mpsc, watch};

use crate::controller::{Controller, Listening};
use crate::pulls::Pulls;
use crate::secrets::Secret;

pub mod commands;
pub mod inbound;
pub mod leases;
pub mod outbox;

/// The hub's client id and user name.
pub const CLIENT_ID: &str = "foreshore-hub";

/// Packets that wait to be taken in. Beyond it the connection is not read, and the broker holds them.
const INBOUND_MAX: usize = 8192;

/// The largest packet that is taken from the broker: a frame of 64 KiB with its topic and properties.
const PACKET_MAX: u32 = 80 * 1024;

/// How long to wait for the broker to answer anything at all.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// How fast devices may come back after a lost connection, for the whole fleet; devices spread over that time.
const RECONNECTS_PER_SECOND: u64 = 500;

/// Where the broker is, and how the hub logs in.
#[derive(Debug, Clone)]
pub struct LinkConfig {
    /// Host name or address.
    pub host: String,
    /// TCP port.
    pub port: u16,
    /// The password of the user [`CLIENT_ID`].
    pub secret: Secret,
}

/// What the link counts, for `/metrics`.
#[derive(Debug, Default)]
pub struct LinkCounters {
    /// Whether the hub is connected and has subscribed.
    pub connected: AtomicBool,
    /// Packets taken in.
    pub received: AtomicU64,
    /// Of them, not understood.
    pub refused: AtomicU64,
    /// Messages that the broker took.
    pub published: AtomicU64,
    /// Connections made.
    pub connections: AtomicU64,
}

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
enum LinkError {
    #[error("{0}")]
    Connection(Box<rumqttc::ConnectionError>),
    #[error("the broker did not answer within {} s", ANSWER_WITHIN.as_secs())]
    NoAnswer,
    #[error("the broker refused the subscription to {0}: {1:?}")]
    Subscription(String, SubscribeReasonCode),
    #[error("{0}")]
    Client(#[from] rumqttc::ClientError),
    #[error("a subscription was not answered: {0}")]
    Notice(#[from] rumqttc::SubscribeNoticeError),
    #[error("the store failed")]
    Control(#[from] crate::controller::ControlError),
    #[error("the broker closed the connection")]
    Closed,
}

/// Keeps the hub connected until the future is dropped.
pub async fn run(
    config: LinkConfig,
    controller: Controller,
    counters: Arc<LinkCounters>,
    pulls: Pulls,
) {
    let mut pause = Pause::default();
    loop {
        let begun = Instant::now();
        let result = session(&config, &controller, &counters, &pulls).await;
        counters.connected.store(false, Ordering::Relaxed);
        controller.set_listening(Listening::default());
        let error = result.err().unwrap_or(LinkError::Closed);
        let wait = pause.next(begun.elapsed());
        // Losing the broker for a moment is normal; not getting it back is not.
        if pause.tries > 3 {
            tracing::warn!(broker = %config.host, port = config.port, %error, "no connection to the broker");
        } else {
            tracing::info!(broker = %config.host, port = config.port, %error, "the connection to the broker ended");
        }
        tokio::time::sleep(wait).await;
    }
}

/// 100 ms, doubled up to 5 s; anew after a connection that held for a while.
#[derive(Debug, Default)]
struct Pause {
    tries: u32,
}

impl Pause {
    fn next(&mut self, held: Duration) -> Duration {
        if held > Duration::from_secs(30) {
            self.tries = 0;
        }
        let wait = Duration::from_millis(100 << self.tries.min(6)).min(Duration::from_secs(5));
        self.tries = self.tries.saturating_add(1);
        wait
    }
}

fn options(config: &LinkConfig) -> MqttOptions {
    let mut options = MqttOptions::new(CLIENT_ID, (config.host.clone(), config.port));
    options
        .set_credentials(CLIENT_ID, config.secret.expose().to_owned())
        .set_keep_alive(30)
        .set_session_mode(SessionMode::Clean)
        .set_receive_maximum(Some(1000))
        .set_connect_timeout(ANSWER_WITHIN)
        .set_incoming_packet_size_limit(IncomingPacketSizeLimit::Bytes(PACKET_MAX))
        .set_outgoing_inflight_upper_limit(500);
    options
}

async fn session(
    config: &LinkConfig,
    controller: &Controller,
    counters: &Arc<LinkCounters>,
    pulls: &Pulls,
) -> Result<(), LinkError> {
    let (client, eventloop) = AsyncClient::builder(options(config)).capacity(256).build();
    let (packets, inbound) = mpsc::channel(INBOUND_MAX);
    let (canary, canary_seen) = watch::channel(None);
    let (connected, is_connected) = watch::channel(false);
    let commands = commands::Commands::default();
    let drive = drive(eventloop, packets, canary, connected);
    let receive = inbound::run(inbound, controller, &commands, counters, pulls);
    let serve = async {
        subscribe(&client, is_connected).await?;
        counters.connections.fetch_add(1, Ordering::Relaxed);
        let kept = begin(controller, &canary_seen).await?;
        counters.connected.store(true, Ordering::Relaxed);
        tracing::info!(broker = %config.host, port = config.port, retained = kept, "connected to the broker");
        let catch_up = async {
            if kept {
                commands::ask_all(controller, &commands).await;
            }
            std::future::pending::<()>().await;
        };
        tokio::select! {
            result = outbox::run(&client, controller, counters) => result.map_err(LinkError::from),
            result = commands::run(&client, &commands) => result.map_err(LinkError::from),
            result = leases::run(&client, controller) => result.map_err(LinkError::from),
            () = catch_up => Ok(()),
        }
    };
    tokio::select! {
        result = drive => result,
        result = serve => result,
        () = receive => Ok(()),
    }
}

/// Moves packets until the connection ends. Nothing here waits for the client, so the two cannot wait for each
/// other.
async fn drive(
    mut eventloop: EventLoop,
    packets: mpsc::Sender<Publish>,
    canary: watch::Sender<Option<u64>>,
    connected: watch::Sender<bool>,
) -> Result<(), LinkError> {
    loop {
        match eventloop
            .poll()
            .await
            .map_err(|error| LinkError::Connection(Box::new(error)))?
        {
            Event::Incoming(Packet::ConnAck(_)) => {
                connected.send_replace(true);
            }
            Event::Incoming(Packet::Publish(publish)) if publish.topic == topic::HUB.as_bytes() => {
                let info = foreshore_protocol::frame::decode::<HubInfo>(&publish.payload).ok();
                canary.send_replace(info.map(|info| info.unix_ms));
            }
            Event::Incoming(Packet::Publish(publish)) => {
                packets.send(publish).await.map_err(|_| LinkError::Closed)?;
            }
            Event::Incoming(Packet::Disconnect(_)) => return Err(LinkError::Closed),
            _ => {}
        }
    }
}

/// Subscribes to what devices say: one shard after the other for what is retained.
async fn subscribe(
    client: &AsyncClient,
    mut connected: watch::Receiver<bool>,
) -> Result<(), LinkError> {
    tokio::time::timeout(ANSWER_WITHIN, connected.wait_for(|connected| *connected))
        .await
        .map_err(|_| LinkError::NoAnswer)?
        .map_err(|_| LinkError::Closed)?;
    let live = [Leaf::Beacon, Leaf::Pull, Leaf::Event, Leaf::LeaseRequest]
        .map(|leaf| format!("{}/+/+/{}", topic::PREFIX, leaf.as_str()));
    let mut rounds = vec![vec![topic::HUB.to_owned()], live.to_vec()];
    for shard in 0..=255 {
        rounds.push(
            [Leaf::Presence, Leaf::Reported]
                .map(|leaf| topic::shard_filter(shard, leaf))
                .to_vec(),
        );
    }
    for filters in rounds {
        let inputs = filters
            .iter()
            .map(|filter| SubscribeFilterInput::new(filter.clone(), QoS::AtLeastOnce));
        let notice = client.subscribe_many_tracked(inputs).await?;
        let answer = tokio::time::timeout(ANSWER_WITHIN, notice.wait_async())
            .await
            .map_err(|_| LinkError::NoAnswer)??;
        for (filter, code) in filters.iter().zip(answer.return_codes) {
            if !matches!(code, SubscribeReasonCode::Success(_)) {
                return Err(LinkError::Subscription(filter.clone(), code));
            }
        }
    }
    Ok(())
}

/// Looks whether the broker still keeps what the hub published; queues everything if not. True if it does.
async fn begin(
    controller: &Controller,
    canary: &watch::Receiver<Option<u64>>,
) -> Result<bool, LinkError> {
    let found = *canary.borrow();
    let listening_from = controller.now();
    let (kept, devices) = controller
        .change(move |change| {
            let kept =
                found.is_some() && found == crate::store::desired::canary(change.connection)?;
            if !kept {
                crate::store::desired::enqueue_all(change.connection)?;
            }
            Ok((kept, crate::store::device::count(change.connection)?.0))
        })
        .await?;
    controller.set_listening(Listening {
        since: Some(listening_from),
        settle_ms: reconnect_spread_ms(devices).saturating_add(3_000),
    });
    Ok(kept)
}

/// Over which time devices spread their first attempt to reconnect, in milliseconds.
pub(crate) fn reconnect_spread_ms(devices: u64) -> u64 {
    (devices * 1000 / RECONNECTS_PER_SECOND).clamp(1_000, 600_000)
}
