//! The verbs. Each takes what it needs from the command line, asks the hub, prints, and returns an exit
//! code.

mod apply;
mod budget;
mod delete;
mod delta;
mod describe;
mod device;
mod events;
mod explain;
mod get;
mod image;
mod label;
mod lease;
mod manifest;
mod plan;
mod rollout;
mod secret;
mod validate;
mod version;

use std::io::{self, Write as _};

use clap::CommandFactory as _;

use crate::arguments::{Arguments, Command};
use crate::client::Hub;
use crate::failure::{Outcome, code};

/// Does what the command line says; the exit code.
pub(crate) fn run(arguments: &Arguments) -> Outcome {
    let (format, mut stdout) = (arguments.output, io::stdout().lock());
    let out = &mut stdout;
    let hub = || Hub::new(&arguments.hub);
    let outcome = match &arguments.command {
        Command::Validate(files) => validate::run(files, format, out),
        Command::Plan { files, exit_code } => plan::run(&hub()?, files, *exit_code, format, out),
        Command::Apply(files) => apply::run(&hub()?, files, format, out),
        Command::Get(get) => get::run(&hub()?, get, format, out),
        Command::Describe { kind, name } => describe::run(&hub()?, *kind, name, format, out),
        Command::Explain { kind: _, name } => explain::run(&hub()?, name, format, out),
        Command::Delete { kind, name, yes } => delete::run(&hub()?, *kind, name, *yes, out),
        Command::Label {
            kind: _,
            name,
            changes,
        } => label::run(&hub()?, name, changes, format, out),
        Command::Rollout(verb) => rollout::run(&hub()?, verb, format, out),
        Command::Events(events) => events::run(&hub()?, events, format, out),
        Command::Secret(verb) => secret::run(&hub()?, verb, format, out),
        Command::Lease(verb) => lease::run(&hub()?, verb, format, out),
        Command::Device(verb) => device::run(&hub()?, verb, format, out),
        Command::Image(verb) => image::run(&hub, verb, format, out),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut Arguments::command(), "foreshore", &mut script);
            out.write_all(&script)?;
            Ok(code::OK)
        }
        Command::Version => version::run(&arguments.hub, format, out),
    }?;
    out.flush()?;
    Ok(outcome)
}

/// `text` as a query value (RFC 3986, 2.3: everything but the unreserved characters is escaped).
fn query_value(text: &str) -> String {
    text.bytes()
        .fold(String::with_capacity(text.len()), |mut out, byte| {
            if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
                out.push(char::from(byte));
            } else {
                out.push_str(&format!("%{byte:02X}"));
            }
            out
        })
}

/// `1 device`, `5 devices`.
fn counted(count: u64, noun: &str) -> String {
    format!("{count} {noun}{}", if count == 1 { "" } else { "s" })
}
