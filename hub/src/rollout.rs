//! PURE: how one app gets from one release to the next over many devices, in waves.
//!
//! [`advance`] looks at a rollout, at what is known of the fleet and at the time, and says what to do. It
//! reads no clock, draws no randomness and touches no store: the controller commits its [`Action`]s, with the
//! desired states and outbox rows they ask for, in one transaction, and [`Rollout::apply`] says what the
//! records look like afterwards. A crash between two transactions therefore changes nothing.
//!
//! What the controller calls:
//!
//! ```text
//! Rollout::open(Opening) -> Rollout                                  state Running; waves cut; nothing offered yet
//! advance(&Rollout, &Fleet, now) -> Step { actions, wake_at }        on news of its devices, and at wake_at
//! command::pause | resume | abort | supersede (&Rollout) -> Result<Vec<Action>, Refused>
//! command::undo_target(&Rollout) -> Result<Digest, Refused>          the release a new rollout goes back to
//! Rollout::apply(&mut self, &Action, written: Option<Version>, now) -> Touched
//!     for each action in order; `written` is the version under which an Offer, OfferLater or Restore was
//!     written to the device's desired state (None for the other actions)
//! budget::Tally::of(&Rollout) / of_wave(&Rollout, ordinal)           counters, recounted
//! joiner_release(rollouts newest first) -> Option<Placement>         for a device that the app selects later
//! ```
//!
//! | file | what it decides |
//! |---|---|
//! | [`state`] | the records and the facts |

pub mod state;

pub use state::{
    Action, Assignment, Cause, Clock, Deferral, Facts, Fleet, Member, Opening, Placement, Policy,
    Pulse, Refused, Report, Revert, Rollout, StateName, Step, Tick, Touched, UnixMs, Wave,
};
