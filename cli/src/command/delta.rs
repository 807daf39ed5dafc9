//! `image delta`: makes deltas between images, in files or in the hub. Between files and into one it asks no hub.

mod registry;

use std::error::Error;
use std::io::Write;
use std::path::PathBuf;

use foreshore_delta::image::{DeltaMakeError, Image, Report, make, tag};
use foreshore_images::{Platform, Reference};

use self::registry::Registry;
use crate::arguments::{Delta, Format};
use crate::client::{HUB_HOST, Hub};
use crate::failure::{Failure, Outcome, code};
use crate::output::{self, Table, bytes};

pub(super) fn run(
    hub: &dyn Fn() -> Result<Hub, Failure>,
    verb: &Delta,
    format: Format,
    out: &mut dyn Write,
) -> Outcome {
    let platform = verb.platform.clone().unwrap_or_else(Platform::host);
    let into = into(verb)?;
    let in_hub = verb
        .from
        .iter()
        .chain([&verb.to])
        .any(|spec| is_in_hub(spec));
    let registry = if in_hub || matches!(into, Into::Hub(_)) {
        Some(Registry::new(hub()?)?)
    } else {
        None
    };
    let open = |spec: &String| match registry.as_ref().filter(|_| is_in_hub(spec)) {
        Some(registry) => registry.image(spec, &platform),
        None => Image::open(spec, &platform).map_err(|error| failure(&error)),
    };
    let to = open(&verb.to)?;
    if let (Into::Hub(repository), Some(registry)) = (&into, &registry) {
        registry.expect(repository, &to.manifest.digest)?;
    }
    let from = verb.from.iter().map(open).collect::<Result<Vec<_>, _>>()?;
    let place = tempfile::tempdir()
        .map_err(|error| Failure::failed(format_args!("cannot make a directory: {error}")))?;
    let layout = match &into {
        Into::Directory(path) => path.clone(),
        Into::Hub(_) => place.path().join("deltas"),
    };
    let reports = make(&from, &to, verb.level, &layout).map_err(|error| failure(&error))?;
    let artifacts: Vec<_> = reports
        .iter()
        .filter_map(|report| report.artifact)
        .collect();
    if let (Into::Hub(repository), Some(registry)) = (&into, &registry) {
        for artifact in &artifacts {
            registry.push(repository, &layout, artifact)?;
        }
    }
    let tag = tag(&to.manifest.digest);
    match format {
        Format::Json => output::json(out, &view(&reports, &to, &tag))?,
        Format::Name => {
            for artifact in &artifacts {
                writeln!(out, "delta/{artifact}")?;
            }
        }
        Format::Table => table(&reports, out)?,
    }
    match (&into, format) {
        _ if artifacts.is_empty() => eprintln!("no layer gains: there is nothing to push"),
        (Into::Hub(repository), Format::Table) => {
            eprintln!(
                "they are in the hub, beside {HUB_HOST}/{repository}@{}",
                to.manifest.digest
            );
        }
        (Into::Directory(path), Format::Table) => eprintln!(
            "push them beside the image: skopeo copy --all oci:{}:{tag} docker://REPOSITORY:{tag}",
            path.display()
        ),
        (_, Format::Json | Format::Name) => {}
    }
    Ok(code::OK)
}

/// Where deltas go.
enum Into {
    /// A layout that is made.
    Directory(PathBuf),
    /// A repository of the hub's registry.
    Hub(String),
}

fn is_in_hub(spec: &str) -> bool {
    spec.split('/').next() == Some(HUB_HOST)
}

fn into(verb: &Delta) -> Result<Into, Failure> {
    let repository = |text: &str| match Reference::parse(text) {
        Ok(reference) => Ok(reference.repository().to_owned()),
        Err(error) => Err(Failure::input(format_args!("{text}: {error}"))),
    };
    match &verb.into {
        Some(text) if is_in_hub(text) => {
            let name = repository(text)?;
            // A tag or digest would mean nothing.
            if *text == format!("{HUB_HOST}/{name}") {
                Ok(Into::Hub(name))
            } else {
                Err(Failure::input(format_args!(
                    "--into {text} is not a repository; write {HUB_HOST}/{name}"
                )))
            }
        }
        Some(path) => Ok(Into::Directory(PathBuf::from(path))),
        None if is_in_hub(&verb.to) => repository(&verb.to).map(Into::Hub),
        None => Err(Failure::input(
            "--into says where the deltas of an image in a file go; it is missing",
        )
        .hint("name a directory to make, or hub.internal/NAME")),
    }
}

fn failure(error: &DeltaMakeError) -> Failure {
    Failure::input(chain(error))
}

/// An error with what caused it.
fn chain(error: &dyn Error) -> String {
    let mut message = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        message.push_str(": ");
        message.push_str(&cause.to_string());
        next = cause.source();
    }
    message
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
