//! The Foreshore hub: desired state, rollouts, API and broker in one program.

#[deny(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    clippy::disallowed_macros,
    clippy::wildcard_enum_match_arm
)]
pub mod rollout;
