//! rmqtt in library mode, on its own threads.
//!
//! ```text
//!   devices ── gate ── listener "devices" ─┐
//!                                          rmqtt ── hooks ── authenticate, authorize
//!   hub's link ─────── listener "hub" ─────┘   └─── retained
//! ```
//!
//! The hub has a listener of its own on loopback: its queue is long, and its handshake does not wait behind
//! those of a whole fleet. The settings below each answer a trap that was measured or read in rmqtt 0.24;
//! rerun `tests/broker.rs` on every change of its version.

use std::net::{Ipv4Addr, SocketAddr};
use std::num::NonZeroU16;
use std::sync::Arc;
use std::time::Duration;

use rmqtt::context::ServerContext;
use rmqtt::hook::Type;
use rmqtt::net::{Builder, Listener};
use rmqtt::server::MqttServer;
use rmqtt::types::ListenerId;
use tokio::sync::{oneshot, watch};

use super::authenticate::SharedToken;
use super::{EmbeddedConfig, Limits, StartError};

mod descriptors;
mod gate;
mod hooks;
mod pace;
mod retained;
mod seldom;

use gate::Gate;
use hooks::Hooks;
use retained::Retained;

/// rmqtt's number for the listener behind the gate.
const DEVICES: ListenerId = 1;

/// rmqtt's number for the hub's own listener.
const HUB: ListenerId = 2;

/// Messages that wait for the hub before the oldest are dropped. Measured with rmqtt's default of 1,000: of
/// 10,000 messages that were acknowledged to devices at once, 1,400 reached the hub.
const HUB_QUEUE: usize = 100_000;

/// Messages to the hub that it has not acknowledged.
const HUB_INFLIGHT: NonZeroU16 = NonZeroU16::new(1000).expect("not zero");

/// Messages that wait for a device that is away: heads and commands, which only the hub sends.
const DEVICE_QUEUE: usize = 256;

/// Messages to a device that it has not acknowledged; its own Receive Maximum may be lower.
const DEVICE_INFLIGHT: NonZeroU16 = NonZeroU16::new(32).expect("not zero");

/// Two leaves, the hub's topic, and the releases that it is fetching.
const DEVICE_SUBSCRIPTIONS: usize = 256;

/// How long the broker's tasks may take to end.
const SHUTDOWN_WITHIN: Duration = Duration::from_secs(2);

/// The embedded broker, running. Dropping it stops it.
#[derive(Debug)]
pub struct Embedded {
    device_address: SocketAddr,
    hub_address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    ended: watch::Receiver<bool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

/// Where the parts listen.
#[derive(Debug, Clone, Copy)]
struct Addresses {
    devices: SocketAddr,
    hub: SocketAddr,
}

impl Embedded {
    /// Starts the broker on threads of its own, and returns when it listens. Blocks for some milliseconds.
    ///
    /// Raises the process's soft limit of open files to its hard limit.
    ///
    /// # Errors
    ///
    /// See [`StartError`].
    pub fn start(config: EmbeddedConfig) -> Result<Self, StartError> {
        let (ready, is_ready) = std::sync::mpsc::sync_channel(1);
        let (stop, stopped) = oneshot::channel();
        let (has_ended, ended) = watch::channel(false);
        let thread = std::thread::Builder::new()
            .name("broker".to_owned())
            .spawn(move || {
                run(config, &ready, stopped);
                has_ended.send_replace(true);
            })
            .map_err(StartError::Threads)?;
        let Addresses { devices, hub } = is_ready
            .recv()
            .unwrap_or_else(|_| Err(StartError::Inner("the broker's thread ended".to_owned())))?;
        Ok(Self {
            device_address: devices,
            hub_address: hub,
            stop: Some(stop),
            ended,
            thread: Some(thread),
        })
    }

    /// Where devices connect: the configured address with the real port.
    #[must_use]
    pub fn device_address(&self) -> SocketAddr {
        self.device_address
    }

    /// Where the hub's own client connects: a port on loopback, a new one on each start. The hub's secret is
    /// good only here, and devices are refused here.
    #[must_use]
    pub fn hub_address(&self) -> SocketAddr {
        self.hub_address
    }

    /// Waits until the broker has ended by itself, which it should not. Cancel safe.
    pub async fn ended(&mut self) {
        // An error means that the thread is gone.
        let _ = self.ended.wait_for(|ended| *ended).await;
    }

    /// Closes every connection and ends the broker's threads; blocks for at most about 2 s. Clients see a closed
    /// connection and come back when there is a broker again; retained messages and sessions are gone.
    pub fn shutdown(mut self) {
        self.stop();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the broker's thread panicked");
        }
    }

    fn stop(&mut self) {
        if let Some(stop) = self.stop.take() {
            // The other end is gone if the broker has ended already.
            let _ = stop.send(());
        }
    }
}

impl Drop for Embedded {
    fn drop(&mut self) {
        self.stop();
    }
}

type Ready = std::sync::mpsc::SyncSender<Result<Addresses, StartError>>;

/// The broker's thread: makes the runtime, and ends it.
fn run(config: EmbeddedConfig, ready: &Ready, stopped: oneshot::Receiver<()>) {
    let workers = std::thread::available_parallelism().map_or(2, |cores| cores.get().clamp(2, 4));
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(workers)
        .thread_name("broker-worker")
        .enable_all()
        .build();
    match runtime {
        Ok(runtime) => {
            runtime.block_on(serve(config, ready, stopped));
            runtime.shutdown_timeout(SHUTDOWN_WITHIN);
        }
        Err(error) => {
            // Whoever started this thread waits for an answer.
            let _ = ready.send(Err(StartError::Threads(error)));
        }
    }
}

/// Listens, reports where, and serves until told to stop.
async fn serve(config: EmbeddedConfig, ready: &Ready, stopped: oneshot::Receiver<()>) {
    let (server, gate, addresses) = match listen(config).await {
        Ok(parts) => parts,
        Err(error) => {
            let _ = ready.send(Err(error));
            return;
        }
    };
    if ready.send(Ok(addresses)).is_err() {
        return;
    }
    tracing::info!(address = %addresses.devices, "the embedded broker listens");
    // `run`, not `start`: the latter exits the process when something is wrong.
    tokio::select! {
        result = server.run() => tracing::error!(?result, "the embedded broker ended by itself"),
        () = gate.run() => tracing::error!("the gate of the embedded broker ended by itself"),
        _ = stopped => tracing::info!("the embedded broker stops"),
    }
}

async fn listen(config: EmbeddedConfig) -> Result<(MqttServer, Gate, Addresses), StartError> {
    let EmbeddedConfig {
        listen,
        join_token,
        hub_secret,
        mut limits,
    } = config;
    limits.connections = descriptors::connections(limits.connections);
    let inner = |error: rmqtt::Error| StartError::Inner(format!("{error:#}"));
    let devices = bind(device_settings(&limits)).map_err(inner)?;
    let hub = bind(hub_settings(&limits)).map_err(inner)?;
    let behind = devices.local_addr().map_err(inner)?;
    let hub_address = hub.local_addr().map_err(inner)?;
    let gate = Gate::bind(listen, behind, &limits).map_err(|source| StartError::Listen {
        address: listen,
        source,
    })?;
    let addresses = Addresses {
        devices: gate.address(),
        hub: hub_address,
    };
    let context = context(
        &limits,
        SharedToken {
            join_token,
            hub_secret,
        },
    )
    .await;
    let server = MqttServer::new(context)
        .listener_by_id(devices, DEVICES)
        .listener_by_id(hub, HUB)
        .build();
    Ok((server, gate, addresses))
}

/// rmqtt with our hooks and our store of retained messages. All hooks are in place before anything listens:
/// a missing answer of the publish hook means "allowed".
async fn context(limits: &Limits, tokens: SharedToken) -> ServerContext {
    let context = ServerContext::new()
        // Refuses connections when the *host* is busy, also with other things.
        .busy_check_enable(false)
        .build()
        .await;
    *context.extends.retain_mut().await = Box::new(Retained::new(limits));
    let hooks = Hooks::new(Arc::new(tokens), limits);
    let register = context.extends.hook_mgr().register();
    for hook in [
        Type::ClientAuthenticate,
        Type::ClientConnected,
        Type::SessionTerminated,
        Type::ClientSubscribeCheckAcl,
        Type::MessagePublish,
        Type::MessagePublishCheckAcl,
    ] {
        register.add(hook, Box::new(hooks.clone())).await;
    }
    register.start().await;
    hooks.attach(&context);
    context
}

/// Binds, and tells rmqtt the real port: it keeps one queue of handshakes per *configured* port, so two
/// listeners on port 0 would share it.
fn bind(settings: Builder) -> rmqtt::Result<Listener> {
    let mut listener = settings.bind()?.tcp()?;
    let address = listener.local_addr()?;
    Arc::make_mut(&mut listener.cfg).laddr = address;
    Ok(listener)
}

/// What both listeners have in common.
fn settings(name: &str, limits: &Limits) -> Builder {
    Builder::new()
        .name(name)
        .laddr(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))
        .reuseaddr(Some(true))
        .backlog(1024)
        .nodelay(true)
        // With `true`, which is the default, a client without a user name never meets the authentication hook.
        .allow_anonymous(false)
        .handshake_timeout(limits.handshake_timeout)
        .max_packet_size(limits.packet_bytes)
        // A name has at most 63 bytes.
        .max_clientid_len(64)
        .max_topic_levels(8)
        // Nothing here needs QoS 2; it is taken down to 1.
        .max_qos_allowed(rmqtt::codec::types::QoS::AtLeastOnce)
        // No aliases: one way less to name a topic.
        .max_topic_aliases(0)
        // Zero: queued messages do not expire unless their sender said so. The default drops what waited for a
        // device for 5 minutes. It reaches the store of retained messages as "0 s", which ours knows.
        .message_expiry_interval(Duration::ZERO)
        .max_session_expiry_interval(limits.session_expiry)
}

fn device_settings(limits: &Limits) -> Builder {
    settings("devices", limits)
        .max_connections(limits.connections)
        .max_handshaking_limit(256)
        .max_mqueue_len(DEVICE_QUEUE)
        .max_inflight(DEVICE_INFLIGHT)
        .max_subscriptions(DEVICE_SUBSCRIPTIONS)
        // For MQTT 3.1.1, which cannot ask.
        .session_expiry_interval(Duration::from_secs(60 * 60).min(limits.session_expiry))
        // A device that never speaks must be found out. Agents use 30 s to 1,200 s.
        .allow_zero_keepalive(false)
        .min_keepalive(5)
        .max_keepalive(1800)
        // A device that does not read for so long is gone.
        .send_timeout(Duration::from_secs(10))
}

fn hub_settings(limits: &Limits) -> Builder {
    settings("hub", limits)
        .max_connections(16)
        .max_handshaking_limit(16)
        .max_mqueue_len(HUB_QUEUE)
        .max_inflight(HUB_INFLIGHT)
        // The hub reads 256 shards of several leaves.
        .max_subscriptions(0)
        .session_expiry_interval(Duration::from_secs(60))
        .min_keepalive(5)
        .max_keepalive(300)
        // The hub reads as fast as SQLite commits, and a slow disk is no reason to cut it off. But what waits for
        // it meanwhile is bounded in number only.
        .send_timeout(Duration::from_secs(30))
}
