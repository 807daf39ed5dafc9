//! `foreshore`, the operator's command: parse, call the hub, print.
//!
//! | module | what it holds |
//! |---|---|
//! | `arguments` | the command line and its help |
//! | `client` | the hub's REST API over HTTP, with time limits and token |
//! | `command` | one module per verb |
//! | `failure` | what went wrong, for people, and the exit code for scripts |
//! | `live` | following a rollout: what changed, and progress bars |
//! | `output` | tables, JSON, times; data goes to stdout, everything else to stderr |

#![forbid(unsafe_code)]

mod arguments;
mod client;
mod command;
mod failure;
mod live;
mod output;
mod pulling;

use std::process::ExitCode;

use clap::Parser as _;

use crate::arguments::Arguments;

fn main() -> ExitCode {
    match command::run(&Arguments::parse()) {
        Ok(code) => ExitCode::from(code),
        Err(failure) => failure.report(),
    }
}
