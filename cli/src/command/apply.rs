//! `apply`: creates or changes apps.

use std::io::Write;

use foreshore_protocol::api::{ApplyAnswer, ApplyOutcome, List};

use super::{counted, manifest};
use crate::arguments::{Files, Format};
use crate::client::Hub;
use crate::failure::{Outcome, code};
use crate::output;

pub(super) fn run(hub: &Hub, files: &Files, format: Format, out: &mut dyn Write) -> Outcome {
    let manifests = manifest::read_all(files)?;
    let mut answers = Vec::new();
    for manifest in manifests {
        let path = format!("/apps/{}", manifest.app.metadata.name);
        let answer: ApplyAnswer = hub.call("PUT", &path, "application/yaml", &manifest.bytes)?;
        match format {
            Format::Table => writeln!(out, "{}", sentence(&answer))?,
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
        answers.push(answer);
    }
    if format == Format::Json {
        match answers.as_slice() {
            [answer] => output::json(out, answer)?,
            _ => output::json(out, &List { items: answers })?,
        }
    }
    Ok(code::OK)
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
