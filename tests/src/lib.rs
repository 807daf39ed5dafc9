//! The harness of the end-to-end tests: real programs as separate processes, real containers, a real
//! registry and broker.
//!
//! A [`Bed`] owns one temporary directory and everything started in it, and takes all of it down again,
//! also when a test panics. Nothing here sleeps for a fixed time to let something happen: [`wait_for`]
//! asks until a condition holds or a generous deadline passes, and then says what it last saw.
//!
//! The tests need root (containers), Debian's `umoci`, `skopeo`, `docker-registry`, `mosquitto` and
//! `busybox-static`. A missing one fails the test and names the package; `cargo xtask test` installs them.

pub mod api;
pub mod bed;
pub mod device;
pub mod fleet;
pub mod hub;
pub mod image;
pub mod meter;
pub mod mosquitto;
pub mod noise;
pub mod process;
pub mod registry;
pub mod traces;

pub use bed::Bed;
pub use device::Device;
pub use fleet::Fleet;
pub use hub::Hub;
pub use process::{Program, wait_for, wait_until};
