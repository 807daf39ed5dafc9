//! `image`: sends images to the hub, lists those it has and removes them.

use std::fs::File;
use std::io::{self, IsTerminal as _, Read, Write};
use std::path::Path;
use std::thread;

use foreshore_protocol::api::{ImageView, List};
use indicatif::{ProgressBar, ProgressStyle};

use super::delta;
use super::{get, query_value};
use crate::arguments::{Format, Get, GetKind, Image};
use crate::client::Hub;
use crate::failure::{Failure, Outcome, code};
use crate::output::{self, bytes};

/// `hub` makes it when it is needed: deltas between files need none.
pub(super) fn run(
    hub: &dyn Fn() -> Result<Hub, Failure>,
    verb: &Image,
    format: Format,
    out: &mut dyn Write,
) -> Outcome {
    match verb {
        Image::List => get::run(
            &hub()?,
            &Get {
                kind: GetKind::Images,
                name: None,
                app: None,
                device: None,
            },
            format,
            out,
        ),
        Image::Delta(verb) => delta::run(hub, verb, format, out),
        Image::Import { source, name } => {
            let view = import(&hub()?, source, name.as_deref())?;
            match format {
                Format::Json => output::json(out, &view)?,
                Format::Name => writeln!(out, "image/{}", output::printable(&view.reference))?,
                Format::Table => writeln!(
                    out,
                    "{} imported: {}, {}, {}",
                    output::printable(&view.reference),
                    view.digest,
                    output::printable(&view.platforms.join(" ")),
                    bytes(view.size_bytes)
                )?,
            }
            Ok(code::OK)
        }
        Image::Remove { name } => {
            hub()?.order("DELETE", &format!("/images/{}", query_value(name)))?;
            let name = name.strip_prefix("hub.internal/").unwrap_or(name);
            match format {
                Format::Json => {
                    output::json(
                        out,
                        &serde_json::json!({ "removed": format!("hub.internal/{name}") }),
                    )?;
                }
                Format::Name => writeln!(out, "image/hub.internal/{}", output::printable(name))?,
                Format::Table => writeln!(out, "hub.internal/{} removed", output::printable(name))?,
            }
            Ok(code::OK)
        }
    }
}

/// The image with this reference, with or without `hub.internal/`.
pub(super) fn find(hub: &Hub, name: &str) -> Result<ImageView, Failure> {
    let list: List<ImageView> = hub.get("/images")?;
    let is_it = |image: &ImageView| {
        image.reference == name || image.reference.strip_prefix("hub.internal/") == Some(name)
    };
    list.items.into_iter().find(is_it).ok_or_else(|| {
        Failure::failed(format_args!("the hub has no image {name:?}"))
            .hint("see `foreshore image list`")
    })
}

fn import(hub: &Hub, source: &Path, name: Option<&str>) -> Result<ImageView, Failure> {
    let path = name.map_or_else(
        || "/images".to_owned(),
        |name| format!("/images?name={}", query_value(name)),
    );
    let unreadable = |error: io::Error| {
        Failure::input(format_args!("cannot read {}: {error}", source.display()))
    };
    if source == Path::new("-") {
        if io::stdin().is_terminal() {
            return Err(Failure::input("standard input is a terminal, not an image")
                .hint("docker save IMAGE | foreshore image import - --name NAME:TAG"));
        }
        return send(hub, &path, None, &mut io::stdin().lock());
    }
    let mut file = File::open(source).map_err(unreadable)?;
    let metadata = file.metadata().map_err(unreadable)?;
    if metadata.is_dir() {
        import_layout(hub, &path, source)
    } else {
        send(hub, &path, Some(metadata.len()), &mut file)
    }
}

/// Sends a tar of an OCI layout directory that is written while it is sent.
fn import_layout(hub: &Hub, path: &str, directory: &Path) -> Result<ImageView, Failure> {
    if !directory.join("oci-layout").is_file() || !directory.join("index.json").is_file() {
        return Err(Failure::input(format_args!(
            "{} is not an OCI layout: it lacks oci-layout or index.json",
            directory.display()
        ))
        .hint("make one with `skopeo copy SOURCE oci:DIR:TAG` or `umoci`"));
    }
    let (mut reader, writer) =
        io::pipe().map_err(|error| Failure::failed(format_args!("cannot make a pipe: {error}")))?;
    let from = directory.to_owned();
    let packer = thread::spawn(move || -> io::Result<()> {
        let mut archive = tar::Builder::new(writer);
        archive.follow_symlinks(false);
        archive.mode(tar::HeaderMode::Deterministic);
        for part in ["oci-layout", "index.json"] {
            archive.append_path_with_name(from.join(part), part)?;
        }
        archive.append_dir_all("blobs", from.join("blobs"))?;
        archive.into_inner()?.flush()
    });
    let sent = send(hub, path, None, &mut reader);
    // Without a reader the packer's next write fails, so it ends.
    drop(reader);
    match (sent, packer.join()) {
        (Ok(view), _) => Ok(view),
        (Err(_), Ok(Err(error))) if error.kind() != io::ErrorKind::BrokenPipe => Err(
            Failure::input(format_args!("cannot read {}: {error}", directory.display())),
        ),
        (Err(failure), _) => Err(failure),
    }
}

fn send(
    hub: &Hub,
    path: &str,
    length: Option<u64>,
    body: &mut dyn Read,
) -> Result<ImageView, Failure> {
    let bar = length.map_or_else(ProgressBar::new_spinner, ProgressBar::new);
    let template = match length {
        Some(_) => "{bar:30} {bytes}/{total_bytes} {bytes_per_sec} {msg}",
        None => "{spinner} {bytes} {bytes_per_sec} {msg}",
    };
    bar.set_style(ProgressStyle::with_template(template).expect("the template is well-formed"));
    let mut body = Watched { bar: &bar, body };
    let sent = hub.upload(path, length, &mut body);
    bar.finish_and_clear();
    sent
}

/// Counts what passes, and says when the hub's part begins.
struct Watched<'a> {
    bar: &'a ProgressBar,
    body: &'a mut dyn Read,
}

impl Read for Watched<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.body.read(buffer)?;
        self.bar.inc(u64::try_from(count).unwrap_or(0));
        if count == 0 && !buffer.is_empty() {
            self.bar.set_message("sent; the hub verifies it");
        }
        Ok(count)
    }
}
