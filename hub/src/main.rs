//! foreshore-hub: desired state, rollouts, API and broker.
fn main() {}
