//! `device`: what is done to a device besides labels.

use std::io::Write;

use foreshore_protocol::api::{DeviceView, HoldRequest};

use crate::arguments::{Device, Format};
use crate::client::Hub;
use crate::failure::{Outcome, code};
use crate::output;

pub(super) fn run(hub: &Hub, verb: &Device, format: Format, out: &mut dyn Write) -> Outcome {
    let (name, verb, body) = match verb {
        Device::TrustKey { name } => (name, "trust-key", Vec::new()),
        Device::Hold { name, reason } => {
            let request = HoldRequest {
                reason: reason.clone(),
            };
            let body = serde_json::to_vec(&request).expect("text is written to memory");
            (name, "hold", body)
        }
        Device::Release { name } => (name, "release", Vec::new()),
    };
    let path = format!("/devices/{name}/{verb}");
    let view: DeviceView = hub.call("POST", &path, "application/json", &body)?;
    match (format, verb) {
        (Format::Json, _) => output::json(out, &view)?,
        (Format::Name, _) => writeln!(out, "device/{name}")?,
        (Format::Table, "trust-key") => writeln!(
            out,
            "device/{name} key trusted: {}",
            output::printable(&view.secrets_key.unwrap_or_default())
        )?,
        (Format::Table, "hold") => writeln!(out, "device/{name} held")?,
        (Format::Table, _) => writeln!(out, "device/{name} released")?,
    }
    Ok(code::OK)
}
