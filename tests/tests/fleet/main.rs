//! A hub and its devices as users meet them: real programs, containers, registries and brokers.
//!
//! One program, so that it is linked once and its tests share the machine. What measures beside bombs is in programs
//! of their own, which run when this one has ended.

mod bad_input;
mod configs;
mod deltas;
mod disruption;
mod healing;
mod lifecycle;
mod logins;
mod policy;
mod preview;
mod pull;
mod registry;
mod rollout;
mod rot;
mod secrets;
mod signatures;
mod steering;
mod steps;
mod twenty;
mod windows;
