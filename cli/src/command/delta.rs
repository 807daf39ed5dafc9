//! `image delta`: makes deltas between images in files. Asks no hub.

use std::error::Error;
use std::io::Write;

use foreshore_delta::image::{DeltaMakeError, Image, Report, make, tag};
use foreshore_images::Platform;

use crate::arguments::{Delta, Format};
use crate::failure::{Failure, Outcome, code};
use crate::output::{self, Table, bytes};

pub(super) fn run(verb: &Delta, format: Format, out: &mut dyn Write) -> Outcome {
    let platform = verb.platform.clone().unwrap_or_else(Platform::host);
    let open = |spec: &String| Image::open(spec, &platform).map_err(|error| failure(&error));
    let to = open(&verb.to)?;
    let from = verb.from.iter().map(open).collect::<Result<Vec<_>, _>>()?;
    let reports = make(&from, &to, verb.level, &verb.into).map_err(|error| failure(&error))?;
    let tag = tag(&to.manifest.digest);
    match format {
        Format::Json => output::json(out, &view(&reports, &to, &tag))?,
        Format::Name => {
            for artifact in reports.iter().filter_map(|report| report.artifact) {
                writeln!(out, "delta/{artifact}")?;
            }
        }
        Format::Table => table(&reports, out)?,
    }
    if reports.iter().all(|report| report.artifact.is_none()) {
        eprintln!("no layer gains: there is nothing to push");
    } else if matches!(format, Format::Table) {
        eprintln!(
            "push them beside the image: skopeo copy --all oci:{}:{tag} docker://REPOSITORY:{tag}",
            verb.into.display()
        );
    }
    Ok(code::OK)
}

fn failure(error: &DeltaMakeError) -> Failure {
    let mut message = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        message.push_str(": ");
        message.push_str(&cause.to_string());
        next = cause.source();
    }
    Failure::input(message)
}

fn view(reports: &[Report], to: &Image, tag: &str) -> serde_json::Value {
    let layers = |report: &Report| {
        let layer = |layer: &foreshore_delta::image::LayerReport| {
            serde_json::json!({
                "diffId": layer.diff_id.to_string(),
                "blobBytes": layer.blob,
                "deltaBytes": layer.delta,
            })
        };
        report.layers.iter().map(layer).collect::<Vec<_>>()
    };
    let delta = |report: &Report| {
        serde_json::json!({
            "from": report.from.to_string(),
            "artifact": report.artifact.map(|digest| digest.to_string()),
            "layers": layers(report),
        })
    };
    serde_json::json!({
        "to": to.manifest.digest.to_string(),
        "tag": tag,
        "deltas": reports.iter().map(delta).collect::<Vec<_>>(),
    })
}

fn table(reports: &[Report], out: &mut dyn Write) -> std::io::Result<()> {
    let mut table = Table::new(&["FROM", "LAYER", "PULL", "DELTA"]);
    let short = |digest: &foreshore_images::Digest| digest.hex().chars().take(12).collect();
    for report in reports {
        for layer in &report.layers {
            table.row([
                short(&report.from),
                short(&layer.diff_id),
                bytes(layer.blob),
                layer.delta.map_or_else(|| "no gain".to_owned(), bytes),
            ]);
        }
    }
    table.print(out)
}
