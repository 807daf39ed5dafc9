//! `delete`: removes an app from the fleet, deletes a disruption budget, or forgets a device.

use std::io::{self, BufRead as _, IsTerminal as _, Write};

use foreshore_protocol::id::BudgetName;
use foreshore_protocol::{AppName, DeviceId};

use crate::arguments::DeleteKind;
use crate::client::Hub;
use crate::failure::{Failure, Outcome, code};

pub(super) fn run(
    hub: &Hub,
    kind: DeleteKind,
    name: &str,
    yes: bool,
    out: &mut dyn Write,
) -> Outcome {
    let (path, question) = match kind {
        DeleteKind::App => {
            let app: AppName = name.parse().map_err(Failure::input)?;
            (
                format!("/apps/{app}"),
                format!("Stop and remove app {app} on all its devices?"),
            )
        }
        DeleteKind::Budget => {
            let budget: BudgetName = name.parse().map_err(Failure::input)?;
            (
                format!("/disruption-budgets/{budget}"),
                format!("Delete disruption budget {budget}?"),
            )
        }
        DeleteKind::Device => {
            let device: DeviceId = name.parse().map_err(Failure::input)?;
            (
                format!("/devices/{device}"),
                format!("Forget device {device}?"),
            )
        }
    };
    if !yes && !confirmed(&question)? {
        eprintln!("nothing was deleted");
        return Ok(code::FAILED);
    }
    hub.order("DELETE", &path)?;
    match kind {
        DeleteKind::App => writeln!(out, "app/{name} is being removed from its devices")?,
        DeleteKind::Budget => writeln!(out, "budget/{name} deleted")?,
        DeleteKind::Device => writeln!(out, "device/{name} forgotten")?,
    }
    Ok(code::OK)
}

fn confirmed(question: &str) -> Result<bool, Failure> {
    if !io::stdin().is_terminal() || !io::stderr().is_terminal() {
        return Err(
            Failure::input("deleting needs a yes, and there is no terminal to ask on")
                .hint("pass --yes"),
        );
    }
    eprint!("{question} [y/N] ");
    let mut answer = String::new();
    io::stdin()
        .lock()
        .read_line(&mut answer)
        .map_err(|error| Failure::failed(format_args!("cannot read the answer: {error}")))?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}
