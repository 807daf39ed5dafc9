//! The Foreshore agent.

pub mod runtime;
