//! What Foreshore's agent, hub and command line say to each other and keep on disk.
//!
//! This crate owns words and bytes; it does no I/O, reads no clock and draws no randomness.
//!
//! | module | what it holds |
//! |---|---|
//! | [`id`] | names, labels, [`Epoch`], [`Generation`], [`Version`] |
//! | [`digest`] | [`Digest`], the SHA-256 that names releases, blobs and layers |
//! | [`cron`] | cron expressions: minutes of days, in local time |
//! | [`quantity`] | sizes, CPU shares and durations as users write them |
//! | [`manifest`] | the App manifest: strict YAML and JSON |
//! | [`release`] | the immutable snapshot of an app's services, and its canonical JSON |
//! | [`message`] | head, command, reported, beacon, presence, event, hub |
//! | [`frame`] | the versioned frame around each message on the wire and on disk |
//! | [`topic`] | the MQTT topic names |
//! | [`api`] | the JSON of the hub's REST API |

#![forbid(unsafe_code)]

pub mod api;
pub mod cron;
pub mod digest;
pub mod frame;
pub mod id;
pub mod manifest;
pub mod message;
pub mod quantity;
pub mod release;
pub mod secret;
pub mod topic;

pub use digest::Digest;
pub use id::{AppName, DeviceId, Epoch, Generation, ServiceName, Version};
