//! `explain`: why a device runs what it runs.

use std::io::{self, Write};

use foreshore_protocol::DeviceId;
use foreshore_protocol::api::{ExplainStep, ExplainView};

use crate::arguments::Format;
use crate::client::Hub;
use crate::failure::{Outcome, code};
use crate::output::{self, printable};

pub(super) fn run(hub: &Hub, device: &DeviceId, format: Format, out: &mut dyn Write) -> Outcome {
    let view: ExplainView = hub.get(&format!("/devices/{device}/explain"))?;
    match format {
        Format::Json => output::json(out, &view)?,
        Format::Name => writeln!(out, "device/{device}")?,
        Format::Table => print(&view, out)?,
    }
    Ok(code::OK)
}

fn print(view: &ExplainView, out: &mut dyn Write) -> io::Result<()> {
    writeln!(out, "device {}", view.device)?;
    chain(&view.steps, out)?;
    for app in &view.apps {
        writeln!(out, "\napp {}", app.app)?;
        chain(&app.steps, out)?;
    }
    if view.apps.is_empty() {
        writeln!(out, "\nno app selects it, and it says that it has none")?;
    }
    Ok(())
}

fn chain(steps: &[ExplainStep], out: &mut dyn Write) -> io::Result<()> {
    for step in steps {
        writeln!(out, "  {}", printable(&step.what))?;
        if let Some(waits_for) = &step.waits_for {
            writeln!(out, "    waits for: {}", printable(waits_for))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use foreshore_protocol::api::ExplainApp;

    use super::*;

    #[test]
    fn each_link_is_a_line_and_what_it_waits_for_stands_below() {
        let step = |what: &str, waits_for: Option<&str>| ExplainStep {
            what: what.to_owned(),
            waits_for: waits_for.map(str::to_owned),
        };
        let view = ExplainView {
            device: "gw-3".parse().unwrap(),
            steps: vec![step("it is connected", None)],
            apps: vec![ExplainApp {
                app: "gateway".parse().unwrap(),
                steps: vec![
                    step("it comes in wave 2 of 3, as number 4", None),
                    step("wave 1 bakes", Some("its bake to be over")),
                ],
            }],
        };
        let mut out = Vec::new();
        print(&view, &mut out).unwrap();
        assert_eq!(
            String::from_utf8(out).unwrap(),
            "device gw-3\n  it is connected\n\napp gateway\n  it comes in wave 2 of 3, as number 4\n  \
             wave 1 bakes\n    waits for: its bake to be over\n"
        );
    }
}
