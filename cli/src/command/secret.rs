//! `secret`: sets secrets in the hub, lists and removes them. Values go in and never come out.

use std::fs::File;
use std::io::{self, IsTerminal as _, Read, Write};
use std::path::Path;

use foreshore_protocol::api::{List, SecretView};
use foreshore_protocol::secret::MAX_SECRET_BYTES;

use super::{counted, get};
use crate::arguments::{Format, Secret};
use crate::client::Hub;
use crate::failure::{Failure, Outcome, code};
use crate::output::{self, Table, age};

pub(super) fn run(hub: &Hub, verb: &Secret, format: Format, out: &mut dyn Write) -> Outcome {
    match verb {
        Secret::List => {
            let list: List<SecretView> = hub.get("/secrets")?;
            if format == Format::Json {
                output::json(out, &list)?;
            } else {
                get::print(&list.items, format, output::now_ms(), out)?;
            }
        }
        Secret::Set { name, from_file } => {
            let value = value(from_file.as_deref())?;
            let path = format!("/secrets/{name}");
            let view: SecretView = hub.call("PUT", &path, "application/octet-stream", &value)?;
            match format {
                Format::Json => output::json(out, &view)?,
                Format::Name => writeln!(out, "secret/{name}")?,
                Format::Table => writeln!(
                    out,
                    "secret/{name} set: {}, revision {}",
                    counted(view.size, "byte"),
                    view.revision
                )?,
            }
        }
        Secret::Remove { name } => {
            hub.order("DELETE", &format!("/secrets/{name}"))?;
            match format {
                Format::Json => output::json(out, &serde_json::json!({ "removed": name }))?,
                Format::Name => writeln!(out, "secret/{name}")?,
                Format::Table => writeln!(out, "secret/{name} removed")?,
            }
        }
    }
    Ok(code::OK)
}

impl get::Listed for SecretView {
    const HEADINGS: &'static [&'static str] = &["NAME", "REVISION", "SIZE", "APPS", "CHANGED"];

    fn name(&self) -> String {
        format!("secret/{}", self.name)
    }

    fn add(&self, table: &mut Table, now_ms: u64) {
        let apps: Vec<&str> = self.apps.iter().map(AsRef::as_ref).collect();
        table.row([
            self.name.to_string(),
            self.revision.to_string(),
            self.size.to_string(),
            apps.join(" "),
            age(now_ms, self.changed_ms),
        ]);
    }
}

/// The value as it is, from a file or from standard input.
fn value(file: Option<&Path>) -> Result<Vec<u8>, Failure> {
    let source = file.filter(|file| *file != Path::new("-"));
    let shown = source.map_or_else(|| "standard input".into(), Path::to_string_lossy);
    let unreadable =
        |error: io::Error| Failure::input(format_args!("cannot read {shown}: {error}"));
    let mut value = Vec::new();
    // One byte more than is allowed, to see that it is too large.
    let bytes = MAX_SECRET_BYTES as u64 + 1;
    match source {
        Some(path) => File::open(path)
            .and_then(|file| file.take(bytes).read_to_end(&mut value))
            .map_err(unreadable)?,
        None if io::stdin().is_terminal() => {
            // Typed, it would be on the screen.
            return Err(Failure::input(
                "standard input is a terminal, where a value would be seen",
            )
            .hint("printf %s VALUE | foreshore secret set NAME, or --from-file FILE"));
        }
        None => io::stdin()
            .take(bytes)
            .read_to_end(&mut value)
            .map_err(unreadable)?,
    };
    match value.len() {
        0 => Err(Failure::input(format_args!("{shown} is empty"))),
        size if size > MAX_SECRET_BYTES => Err(Failure::input(format_args!(
            "{shown} has more than {MAX_SECRET_BYTES} bytes, the most that a secret has"
        ))),
        _ => Ok(value),
    }
}
