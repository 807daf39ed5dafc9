//! `plan`: what `apply` would change, on which devices, wave by wave.

use std::io::{self, Write};

use foreshore_protocol::api::{ApplyOutcome, Change, List, PlanAnswer, PlanWave};
use foreshore_protocol::manifest::WaveTarget;

use super::{counted, manifest};
use crate::arguments::{Files, Format};
use crate::client::Hub;
use crate::failure::{Outcome, code};
use crate::output::{self, printable};

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
    for manifest in manifests {
        let path = format!("/apps/{}/plan", manifest.app.metadata.name);
        let answer: PlanAnswer = hub.call("POST", &path, "application/yaml", &manifest.bytes)?;
        match format {
            Format::Table => print(&answer, out)?,
            Format::Name => writeln!(out, "app/{}", answer.app)?,
            Format::Json => {}
        }
        answers.push(answer);
    }
    let changes = answers
        .iter()
        .any(|answer| answer.outcome != ApplyOutcome::Unchanged);
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
            target(wave.target),
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
    Ok(())
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

/// `1 in all`, `60%`.
pub(super) fn target(target: WaveTarget) -> String {
    match target {
        WaveTarget::Count(count) => format!("{count} in all"),
        WaveTarget::Percent(percent) => format!("{percent}%"),
    }
}

#[cfg(test)]
mod tests {
    use foreshore_protocol::Digest;
    use foreshore_protocol::api::ServiceChange;

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
            warnings: vec!["device gw-7 is offline".to_owned()],
        };
        let mut out = Vec::new();
        print(&answer, &mut out).unwrap();
        insta::assert_snapshot!(String::from_utf8(out).unwrap());
    }
}
