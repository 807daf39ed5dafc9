//! The real runtime on the real kernel: needs root and busybox.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "runtime/adoption.rs"]
mod adoption;
#[path = "runtime/bed.rs"]
mod bed;
#[path = "runtime/confinement.rs"]
mod confinement;
#[path = "runtime/defaults.rs"]
mod defaults;
#[path = "runtime/devices.rs"]
mod devices;
#[path = "runtime/escapes.rs"]
mod escapes;
#[path = "runtime/files.rs"]
mod files;
#[path = "runtime/io.rs"]
mod io;
#[path = "runtime/life.rs"]
mod life;
#[path = "runtime/limits.rs"]
mod limits;
#[path = "runtime/logs.rs"]
mod logs;
#[path = "runtime/network.rs"]
mod network;
#[path = "runtime/passthrough.rs"]
mod passthrough;
#[path = "runtime/process.rs"]
mod process;
#[path = "runtime/secrets.rs"]
mod secrets;
#[path = "runtime/userns.rs"]
mod userns;
