//! `version`: of this program, and of the hub if it answers.

use std::io::Write;
use std::time::Duration;

use foreshore_protocol::api::HubView;
use serde_json::json;

use super::counted;
use crate::arguments::{Format, HubArguments};
use crate::client::Hub;
use crate::failure::{Outcome, code};
use crate::output;

pub(super) fn run(arguments: &HubArguments, format: Format, out: &mut dyn Write) -> Outcome {
    let version = env!("CARGO_PKG_VERSION");
    // Nobody wants to wait long for half of the answer.
    let arguments = HubArguments {
        request_timeout: arguments.request_timeout.min(Duration::from_secs(3)),
        ..arguments.clone()
    };
    let hub = Hub::new(&arguments).and_then(|hub| hub.get::<HubView>("/info"));
    match format {
        Format::Json => {
            let (hub, error) = (
                hub.as_ref().ok(),
                hub.as_ref().err().map(ToString::to_string),
            );
            output::json(
                out,
                &json!({"foreshore": version, "hub": hub, "hubError": error}),
            )?;
        }
        Format::Name => writeln!(out, "{version}")?,
        Format::Table => {
            writeln!(out, "foreshore {version}")?;
            match hub {
                Ok(hub) => writeln!(
                    out,
                    "hub {} at {} ({} broker, {}, {} online)",
                    output::printable(&hub.version),
                    arguments.hub,
                    output::printable(&hub.broker),
                    counted(hub.devices, "device"),
                    hub.devices_online
                )?,
                Err(failure) => eprintln!("the hub did not say its version\n{failure}"),
            }
        }
    }
    Ok(code::OK)
}
