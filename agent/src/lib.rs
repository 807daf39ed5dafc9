//! The Foreshore agent: runs containers on one device as the hub wants them, and heals them by itself.
//!
//! ```text
//!          hub's broker                        containers
//!               │                                  │
//!   link ── one MQTT session            runtime ── start, stop, list, remove
//!               │                                  │
//!               └───────> reconcile <──────────────┘
//!                          │  ▲   │
//!         state (files) <──┘  │   └──> execute ──> stage (a child process that pulls and unpacks)
//!                            plan
//! ```
//!
//! | module | what it owns |
//! |---|---|
//! | [`plan`] | **pure**: what to do next |
//! | [`reconcile`] | the one loop: event, plan, execute |
//! | [`execute`] | doing one step |
//! | [`probe`] | asking containers whether they are ready |
//! | [`link`] | the MQTT session |
//! | [`state`] | files that survive a power cut |
//! | [`vault`] | the device's secrets, opened |
//! | [`policy`] | what the device's owner lets apps ask for |
//! | [`stage`] | pulling and unpacking images in a child process |
//! | [`runtime`] | containers, behind a trait; libcontainer and a fake |
//! | [`shim`], [`exec`] | the programs that start a container, and a command in one |
//! | [`status`], [`removal`], [`volumes`], [`doctor`], [`fsck`] | what an operator on the device asks for |
//! | [`watchdog`] | signs of life for the supervisor and the hardware |
//! | [`config`], [`inventory`], [`clock`] | the configuration, the device, its clocks |

pub(crate) mod causes;
pub mod clock;
pub mod config;
pub mod disk;
pub mod doctor;
pub mod exec;
pub mod execute;
pub mod fsck;
pub mod images;
pub mod inventory;
pub mod link;
#[deny(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    clippy::disallowed_macros,
    clippy::wildcard_enum_match_arm
)]
pub mod plan;
pub mod policy;
pub mod probe;
pub mod pull;
pub mod pulling;
pub mod reconcile;
pub mod removal;
pub mod runtime;
pub mod shim;
pub mod stage;
pub mod state;
pub mod status;
pub mod unpack;
pub mod update_lock;
pub mod vault;
pub mod volumes;
pub mod wall;
pub mod watchdog;
pub mod zone;
