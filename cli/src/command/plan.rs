//! `plan`: what `apply` would change, on which devices, wave by wave.

use std::io::{self, Write};

use foreshore_protocol::api::{ApplyOutcome, BudgetView, Change, List, PlanAnswer, PlanWave};
use foreshore_protocol::id::BudgetName;
use foreshore_protocol::manifest::{DisruptionBudget, Manifest as Kind};

use super::{counted, manifest};
use crate::arguments::{Files, Format};
use crate::client::Hub;
use crate::failure::{Failure, Outcome, code};
use crate::output::{self, printable};

mod preview;

/// How many devices of a wave are named; `-o json` has them all.
const NAMED: usize = 12;

pub(super) fn run(
    hub: &Hub,
    files: &Files,
    exit_code: bool,
    format: Format,
    out: &mut dyn Write,
) -> Outcome {
    let manifests = manifest::read_all(files)?;
    let mut answers = Vec::new();
    let mut changes = false;
    for manifest in manifests {
        let app = match &manifest.kind {
            Kind::App(app) => app,
            Kind::DisruptionBudget(budget) => {
                let outcome = budget_outcome(hub, budget)?;
                changes |= outcome != ApplyOutcome::Unchanged;
                let name = &budget.metadata.name;
                match format {
                    Format::Table => writeln!(out, "{}", budget_sentence(name, outcome))?,
                    Format::Name => writeln!(out, "budget/{name}")?,
                    Format::Json => {}
                }
                answers.push(serde_json::json!({ "budget": name, "outcome": outcome }));
                continue;
            }
        };
        let path = format!("/apps/{}/plan", app.metadata.name);
        let answer: PlanAnswer = hub.call("POST", &path, "application/yaml", &manifest.bytes)?;
        match format {
            Format::Table => print(&answer, out)?,
            Format::Name => writeln!(out, "app/{}", answer.app)?,
            Format::Json => {}
        }
        changes |= answer.outcome != ApplyOutcome::Unchanged;
        answers.push(serde_json::to_value(answer)?);
    }
    if format == Format::Json {
        match answers.as_slice() {
            [answer] => output::json(out, answer)?,
            _ => output::json(out, &List { items: answers })?,
        }
    }
    Ok(if exit_code && changes {
        code::NEGATIVE
    } else {
        code::OK
    })
}

/// What applying a budget would do; the hub is asked for the one that it has.
fn budget_outcome(hub: &Hub, budget: &DisruptionBudget) -> Result<ApplyOutcome, Failure> {
    let list: List<BudgetView> = hub.get("/disruption-budgets")?;
    let name = &budget.metadata.name;
    let existing = list.items.into_iter().find(|view| view.name == *name);
    Ok(match existing {
        None => ApplyOutcome::Created,
        Some(view) if view.manifest == *budget => ApplyOutcome::Unchanged,
        Some(_) => ApplyOutcome::Updated,
    })
}

fn budget_sentence(name: &BudgetName, outcome: ApplyOutcome) -> String {
    match outcome {
        ApplyOutcome::Unchanged => format!("disruption budget {name} would not change"),
        outcome => format!(
            "disruption budget {name} would be {}",
            output::word(&outcome)
        ),
    }
}

fn print(answer: &PlanAnswer, out: &mut dyn Write) -> io::Result<()> {
    let (app, release) = (&answer.app, answer.release.short());
    let current = answer
        .current
        .map_or_else(|| "nothing".to_owned(), |digest| digest.short());
    match answer.outcome {
        ApplyOutcome::Created => writeln!(out, "app {app} would be created at release {release}")?,
        ApplyOutcome::Updated => writeln!(
            out,
            "app {app} would be updated from release {current} to {release}"
        )?,
        ApplyOutcome::Reconfigured => writeln!(
            out,
            "app {app} would be reconfigured; release {release} stays"
        )?,
        ApplyOutcome::Unchanged => {
            writeln!(out, "app {app} would not change; release {release} stays")?
        }
    }
    for change in &answer.services {
        let (sign, text) = match change.change {
            Change::Added => ('+', "added".to_owned()),
            Change::Removed => ('-', "removed".to_owned()),
            Change::Changed => ('~', format!("replaced: {}", change.fields.join(", "))),
            Change::Unchanged => ('=', "keeps running".to_owned()),
        };
        writeln!(
            out,
            "  {sign} service {}: {}",
            change.service,
            printable(&text)
        )?;
    }
    for wave in &answer.waves {
        let devices = u64::try_from(wave.devices.len()).unwrap_or(u64::MAX);
        writeln!(
            out,
            "  wave {} ({}), {}: {}",
            wave.ordinal,
            wave.target,
            counted(devices, "device"),
            named(wave)
        )?;
    }
    if answer.waves.iter().any(|wave| !wave.devices.is_empty()) {
        writeln!(
            out,
            "  (one possible draw: which device comes first is drawn when the rollout begins)"
        )?;
    }
    for warning in &answer.warnings {
        writeln!(out, "  warning: {}", printable(warning))?;
    }
    match &answer.preview {
        Some(preview) => preview::print(preview, out),
        None => Ok(()),
    }
}

fn named(wave: &PlanWave) -> String {
    let mut names: Vec<&str> = wave.devices.iter().take(NAMED).map(AsRef::as_ref).collect();
    let more = format!("and {} more", wave.devices.len().saturating_sub(NAMED));
    if wave.devices.len() > NAMED {
        names.push(&more);
    }
    if names.is_empty() {
        "none".to_owned()
    } else {
        names.join(" ")
    }
}

#[cfg(test)]
mod tests {
    use foreshore_protocol::Digest;
    use foreshore_protocol::api::ServiceChange;
    use foreshore_protocol::manifest::WaveTarget;

    use super::*;

    #[test]
    fn a_plan_names_services_waves_and_warnings() {
        let change = |service: &str, change, fields: &[&str]| ServiceChange {
            service: service.parse().unwrap(),
            change,
            fields: fields.iter().map(|field| (*field).to_owned()).collect(),
        };
        let devices = |range: std::ops::Range<usize>| {
            range.map(|n| format!("gw-{n}").parse().unwrap()).collect()
        };
        let answer = PlanAnswer {
            app: "gateway".parse().unwrap(),
            current: Some(Digest::of(b"old")),
            release: Digest::of(b"new"),
            outcome: ApplyOutcome::Updated,
            services: vec![
                change("cache", Change::Added, &[]),
                change("logger", Change::Unchanged, &[]),
                change("old", Change::Removed, &[]),
                change("web", Change::Changed, &["image", "mem_limit"]),
            ],
            waves: vec![
                PlanWave {
                    ordinal: 1,
                    target: WaveTarget::Count(1),
                    devices: devices(0..1),
                },
                PlanWave {
                    ordinal: 2,
                    target: WaveTarget::Percent(100),
                    devices: devices(1..20),
                },
            ],
            warnings: vec!["rollout 3 is under way; a new release takes its place".to_owned()],
            preview: None,
        };
        let mut out = Vec::new();
        print(&answer, &mut out).unwrap();
        insta::assert_snapshot!(String::from_utf8(out).unwrap());
    }
}
