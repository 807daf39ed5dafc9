//! The Foreshore hub: desired state, rollouts, API and broker in one program.
//!
//! ```text
//!            HTTP                                        MQTT
//!   api  registry (/v2)                               link ── broker
//!     \     |                                          /  \
//!      \    |            change / read                /    \ outbox
//!       controller ── rollout (pure) ──────── ingest ─      publisher
//!            \                                        /
//!             store: one SQLite writer, readers beside it
//! ```
//!
//! | module | what it owns |
//! |---|---|
//! | [`process`] | a whole hub, started and stopped in order |
//! | [`config`] | `hub.toml` |
//! | [`secrets`] | the tokens in the data directory |
//! | [`clock`] | time that does not jump |
//! | [`store`] | the SQLite database |
//! | [`rollout`] | PURE: how a release spreads |
//! | [`preview`] | PURE: what a release would ask of each device |
//! | [`lease`] | PURE: whose turn it is under a disruption budget |
//! | [`controller`] | every change, each in one transaction |
//! | [`broker`] | the embedded broker, and files for an external one |
//! | [`link`] | the hub as an MQTT client |
//! | [`images`] | tags to digests, archives to blobs |
//! | [`analysis`] | asking others whether a release is well |
//! | [`api`] | REST, health, metrics |
//! | [`registry`] | `/v2/`: imported images for devices and others |
//! | [`http`] | connections |

pub mod analysis;
pub mod api;
pub mod backup;
pub mod broker;
pub mod clock;
pub mod config;
pub mod controller;
pub mod http;
pub mod images;
#[deny(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    clippy::disallowed_macros,
    clippy::wildcard_enum_match_arm
)]
pub mod lease;
pub mod link;
#[deny(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    clippy::disallowed_macros,
    clippy::wildcard_enum_match_arm
)]
pub mod preview;
pub mod process;
pub mod pulls;
pub mod registry;
#[deny(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    clippy::disallowed_macros,
    clippy::wildcard_enum_match_arm
)]
pub mod rollout;
pub mod secrets;
pub mod store;
pub mod zone;
