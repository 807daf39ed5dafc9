//! `apply`: creates or changes apps and disruption budgets.

use std::io::{self, Write};

use foreshore_protocol::api::{ApplyAnswer, ApplyOutcome, BudgetAnswer, List};
use foreshore_protocol::manifest::Manifest as Kind;

use super::{counted, manifest};
use crate::arguments::{Files, Format};
use crate::client::Hub;
use crate::failure::{Outcome, code};
use crate::output;

pub(super) fn run(hub: &Hub, files: &Files, format: Format, out: &mut dyn Write) -> Outcome {
    let mut manifests = manifest::read_all(files)?;
    // Budgets first: what is rolled out by the same command is under them.
    manifests.sort_by_key(|manifest| matches!(manifest.kind, Kind::App(_)));
    let mut answers = Vec::new();
    for manifest in manifests {
        answers.push(match &manifest.kind {
            Kind::App(app) => {
                let path = format!("/apps/{}", app.metadata.name);
                let answer = hub.call("PUT", &path, "application/yaml", &manifest.bytes)?;
                tell_app(&answer, format, out)?;
                serde_json::to_value(answer)?
            }
            Kind::DisruptionBudget(budget) => {
                let path = format!("/disruption-budgets/{}", budget.metadata.name);
                let answer = hub.call("PUT", &path, "application/yaml", &manifest.bytes)?;
                tell_budget(&answer, format, out)?;
                serde_json::to_value(answer)?
            }
        });
    }
    if format == Format::Json {
        match answers.as_slice() {
            [answer] => output::json(out, answer)?,
            _ => output::json(out, &List { items: answers })?,
        }
    }
    Ok(code::OK)
}

fn tell_app(answer: &ApplyAnswer, format: Format, out: &mut dyn Write) -> io::Result<()> {
    match format {
        Format::Table => writeln!(out, "{}", sentence(answer))?,
        Format::Name => writeln!(out, "app/{}", answer.app)?,
        Format::Json => {}
    }
    if answer.devices == 0 {
        eprintln!(
            "  no device matches the selector of app {} yet; see `foreshore get devices`",
            answer.app
        );
    } else if answer.rollout.is_some() && format == Format::Table {
        eprintln!("  watch it: foreshore rollout status -w {}", answer.app);
    }
    Ok(())
}

fn tell_budget(answer: &BudgetAnswer, format: Format, out: &mut dyn Write) -> io::Result<()> {
    let name = &answer.budget;
    match format {
        Format::Table => writeln!(
            out,
            "budget/{name} {}; holds for {} in {}",
            output::word(&answer.outcome),
            counted(answer.devices, "device"),
            counted(answer.groups, "group")
        ),
        Format::Name => writeln!(out, "budget/{name}"),
        Format::Json => Ok(()),
    }
}

/// What apply, or undo, did.
pub(super) fn sentence(answer: &ApplyAnswer) -> String {
    let (app, release) = (&answer.app, answer.release.short());
    let over = |rollout: Option<u64>| match rollout {
        Some(id) => format!("; rollout {id} over {}", counted(answer.devices, "device")),
        None => format!("; {} selected", counted(answer.devices, "device")),
    };
    match answer.outcome {
        ApplyOutcome::Created => format!(
            "app/{app} created at release {release}{}",
            over(answer.rollout)
        ),
        ApplyOutcome::Updated => format!(
            "app/{app} updated to release {release}{}",
            over(answer.rollout)
        ),
        ApplyOutcome::Reconfigured => format!(
            "app/{app} reconfigured, release {release} stays{}",
            over(answer.rollout)
        ),
        ApplyOutcome::Unchanged => format!(
            "app/{app} unchanged at release {release}{}",
            over(answer.rollout)
        ),
    }
}
