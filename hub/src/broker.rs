//! The MQTT broker: inside the hub's own process by default, or one that runs elsewhere.
//!
//! A broker is a lossy pipe here. It keeps nothing that the hub could not publish again from SQLite, and no
//! PUBACK counts as a receipt. The hub always speaks to it as a client, so that one kind can replace the other.
//! Why it is built so: `docs/decisions/0020-embedded-broker.md`.
//!
//! | module | what it owns |
//! |---|---|
//! | [`authorize`](mod@authorize) | PURE: who may do what |
//! | [`authenticate`] | PURE: who a client is |
//! | [`embedded`] | rmqtt on its own threads, behind a gate |
//! | [`mosquitto`] | the same rules as files for mosquitto |

use std::net::SocketAddr;
use std::time::Duration;

use crate::secrets::Secret;

#[deny(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    clippy::disallowed_macros,
    clippy::wildcard_enum_match_arm
)]
pub mod authenticate;
#[deny(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    clippy::disallowed_macros,
    clippy::wildcard_enum_match_arm
)]
pub mod authorize;
#[cfg(feature = "embedded-broker")]
pub mod embedded;
#[cfg(not(feature = "embedded-broker"))]
#[path = "broker/absent.rs"]
pub mod embedded;
pub mod mosquitto;

pub use authorize::{Action, Denied, HUB_NAME, Identity, authorize};
pub use embedded::Embedded;

/// What the embedded broker is started with.
#[derive(Debug, Clone)]
pub struct EmbeddedConfig {
    /// Where devices connect; port 0 takes a free one, see [`Embedded::device_address`].
    pub listen: SocketAddr,
    /// What devices log in with.
    pub join_token: Secret,
    /// What the hub logs in with. Good only at [`Embedded::hub_address`].
    pub hub_secret: Secret,
    /// How much is taken in.
    pub limits: Limits,
}

impl EmbeddedConfig {
    /// With the default [`Limits`].
    #[must_use]
    pub fn new(listen: SocketAddr, join_token: Secret, hub_secret: Secret) -> Self {
        Self {
            listen,
            join_token,
            hub_secret,
            limits: Limits::default(),
        }
    }
}

/// How much the embedded broker takes in. Every bound here is one that a client could otherwise cross at the
/// expense of the others.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Devices that are connected at once; twice as many sessions are kept. Each takes five file descriptors, so the
    /// limit of the process may lower it. Default: 10,000; a fleet beyond that wants an external broker.
    pub connections: usize,
    /// Connections that have not shown a whole CONNECT yet. Beyond it new ones wait in the kernel's queue.
    /// Default: 2,048, of at most 16 KiB each.
    pub handshakes: usize,
    /// The same for one address that is not loopback; beyond it connections are closed. Default: 512, because
    /// a whole site may hide behind one address.
    pub handshakes_per_address: usize,
    /// How long a client may take for its CONNECT. Default: 10 s.
    pub handshake_timeout: Duration,
    /// The largest packet, in bytes: a frame of 64 KiB with its topic and properties. Default: 72 KiB.
    pub packet_bytes: u32,
    /// Messages a second from one device; beyond it that device is read more slowly. Default: 200.
    pub device_messages_per_second: u32,
    /// Bytes a second from one device; beyond it that device is read more slowly. Default: 512 KiB.
    pub device_bytes_per_second: u32,
    /// Retained messages. Default: 100,000.
    pub retained_messages: usize,
    /// Bytes in retained messages with their topics. Default: 256 MiB.
    pub retained_bytes: usize,
    /// How long the session of a lost device is kept at most. Default: 2 h; agents ask for 1 h.
    pub session_expiry: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 10_000,
            handshakes: 2048,
            handshakes_per_address: 512,
            handshake_timeout: Duration::from_secs(10),
            packet_bytes: 72 * 1024,
            device_messages_per_second: 200,
            device_bytes_per_second: 512 * 1024,
            retained_messages: 100_000,
            retained_bytes: 256 << 20,
            session_expiry: Duration::from_secs(2 * 60 * 60),
        }
    }
}

/// Why the embedded broker does not run.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The program was built without it.
    #[error(
        "this foreshore-hub was built without the embedded broker; set [broker] kind = \"external\" and url, \
         or build it with the feature embedded-broker"
    )]
    NotBuilt,
    /// The address cannot be listened on.
    #[error("failed to listen for MQTT on {address}; [broker] listen chooses another address")]
    Listen {
        /// Which.
        address: SocketAddr,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The broker's own listeners on loopback could not be made.
    #[error("failed to open the broker's inner listener on loopback: {0}")]
    Inner(String),
    /// No thread or runtime.
    #[error("failed to start the broker's threads")]
    Threads(#[source] std::io::Error),
}
