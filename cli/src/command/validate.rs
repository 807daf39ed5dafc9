//! `validate`: checks manifests without a hub.

use std::io::Write;

use foreshore_protocol::manifest::Manifest as Kind;
use serde_json::json;

use super::manifest;
use crate::arguments::{Files, Format};
use crate::failure::{Outcome, code};
use crate::output;

pub(super) fn run(files: &Files, format: Format, out: &mut dyn Write) -> Outcome {
    let mut outcome = code::OK;
    let mut results = Vec::new();
    for file in &files.files {
        match manifest::read(file) {
            Ok(manifest) => {
                let (mut result, name, what) = describe(&manifest.kind);
                result["file"] = json!(file);
                result["valid"] = true.into();
                results.push(result);
                match format {
                    Format::Table => writeln!(
                        out,
                        "{}: {what}: valid",
                        output::printable(&file.display().to_string())
                    )?,
                    Format::Name => writeln!(out, "{name}")?,
                    Format::Json => {}
                }
            }
            Err(complaint) => {
                outcome = code::INPUT;
                if format != Format::Json {
                    eprintln!("{complaint}");
                }
                let mut result = serde_json::to_value(complaint)?;
                result["valid"] = false.into();
                results.push(result);
            }
        }
    }
    if format == Format::Json {
        output::json(out, &json!({ "items": results }))?;
    }
    Ok(outcome)
}

/// A manifest for programs, its name, and for people.
fn describe(kind: &Kind) -> (serde_json::Value, String, String) {
    match kind {
        Kind::App(app) => {
            let name = &app.metadata.name;
            let services = u64::try_from(app.spec.services.len()).unwrap_or(u64::MAX);
            let services = super::counted(services, "service");
            (
                json!({ "app": name }),
                format!("app/{name}"),
                format!("app {name}, {services}"),
            )
        }
        Kind::DisruptionBudget(budget) => {
            let name = &budget.metadata.name;
            (
                json!({ "budget": name }),
                format!("budget/{name}"),
                format!("disruption budget {name}"),
            )
        }
    }
}
