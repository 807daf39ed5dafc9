//! A whole hub as a process, with a real broker and devices that behave like agents.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod analysis;
mod api;
mod backup;
mod bed;
mod device;
mod images;
mod leases;
mod logins;
mod peers;
mod preview;
mod push;
mod remove;
mod repair;
mod rollout;
mod upstream;
