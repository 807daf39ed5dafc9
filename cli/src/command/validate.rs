//! `validate`: checks manifests without a hub.

use std::io::Write;

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
                let (name, services) = (
                    &manifest.app.metadata.name,
                    manifest.app.spec.services.len(),
                );
                results.push(json!({"file": file, "valid": true, "app": name}));
                match format {
                    Format::Table => {
                        let services =
                            super::counted(u64::try_from(services).unwrap_or(u64::MAX), "service");
                        writeln!(
                            out,
                            "{}: app {name}, {services}: valid",
                            output::printable(&file.display().to_string())
                        )?;
                    }
                    Format::Name => writeln!(out, "app/{name}")?,
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
