//! `device`: what is done to a device besides labels.

use std::io::Write;

use foreshore_protocol::api::DeviceView;

use crate::arguments::{Device, Format};
use crate::client::Hub;
use crate::failure::{Outcome, code};
use crate::output;

pub(super) fn run(hub: &Hub, verb: &Device, format: Format, out: &mut dyn Write) -> Outcome {
    let Device::TrustKey { name } = verb;
    let path = format!("/devices/{name}/trust-key");
    let view: DeviceView = hub.call("POST", &path, "", b"")?;
    match format {
        Format::Json => output::json(out, &view)?,
        Format::Name => writeln!(out, "device/{name}")?,
        Format::Table => writeln!(
            out,
            "device/{name} key trusted: {}",
            output::printable(&view.secrets_key.unwrap_or_default())
        )?,
    }
    Ok(code::OK)
}
