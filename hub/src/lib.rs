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
//! | [`config`] | `hub.toml` |
//! | [`secrets`] | the tokens in the data directory |
//! | [`clock`] | time that does not jump |
//! | [`store`] | the SQLite database |
//! | [`rollout`] | PURE: how a release spreads |
//! | [`controller`] | every change, each in one transaction |
//! | [`link`] | the hub as an MQTT client |

pub mod clock;
pub mod config;
pub mod controller;
pub mod link;
#[deny(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    clippy::disallowed_macros,
    clippy::wildcard_enum_match_arm
)]
pub mod rollout;
pub mod secrets;
pub mod store;
