//! The demo's images: one static program compiled with plain `rustc`, packed into OCI archives.
//!
//! The three versions share their layer and differ in the environment that their configuration sets, so
//! only the first one costs a device a download.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, bail, ensure};
use flate2::{Compression, GzBuilder};
use foreshore_protocol::Digest;
use serde_json::{Value, json};

/// A version of the demo image.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Version {
    /// What `/version` answers, and the image's tag.
    pub(crate) name: &'static str,
    /// Whether `/ready` answers 200.
    pub(crate) ready: bool,
}

/// Compiles the service and writes one OCI archive per version into `dir`; their paths in order.
pub(crate) fn build(dir: &Path, versions: &[Version]) -> anyhow::Result<Vec<PathBuf>> {
    let program = compile(dir)?;
    let layer = Layer::of(&program, &[])?;
    versions
        .iter()
        .map(|version| write(dir, *version, &layer))
        .collect()
}

/// The same, but the versions share nothing: each layer has `files` more of 64 KiB, of hexadecimal digits.
pub(crate) fn build_apart(
    dir: &Path,
    versions: &[Version],
    files: usize,
) -> anyhow::Result<Vec<PathBuf>> {
    let program = compile(dir)?;
    versions
        .iter()
        .map(|version| {
            let more: Vec<Vec<u8>> = (0..files)
                .map(|number| noise(&format!("{} {number}", version.name), 64 << 10))
                .collect();
            write(dir, *version, &Layer::of(&program, &more)?)
        })
        .collect()
}

/// Bytes that look random and depend on nothing but `seed`.
fn noise(seed: &str, count: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(count);
    for block in 0.. {
        if bytes.len() >= count {
            break;
        }
        bytes.extend_from_slice(
            Digest::of(format!("{seed} {block}").as_bytes())
                .hex()
                .as_bytes(),
        );
    }
    bytes.truncate(count);
    bytes
}

fn write(dir: &Path, version: Version, layer: &Layer) -> anyhow::Result<PathBuf> {
    let path = dir.join(format!("web-{}.tar", version.name));
    write_archive(&path, version, layer)
        .with_context(|| format!("failed to write {}", path.display()))?;
    Ok(path)
}

fn compile(dir: &Path) -> anyhow::Result<PathBuf> {
    let (source, program) = (
        crate::step::root().join("configs/demo/web.rs"),
        dir.join("web"),
    );
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let output = Command::new(&rustc)
        .args(["--edition", "2024", "-O"])
        .args([
            "-C",
            "target-feature=+crt-static",
            "-C",
            "panic=abort",
            "-C",
            "strip=symbols",
        ])
        .arg("-o")
        .arg(&program)
        .arg(&source)
        .output()
        .with_context(|| format!("failed to start {}", rustc.display()))?;
    if !output.status.success() {
        bail!(
            "failed to compile {}: {}",
            source.display(),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(program)
}

/// The image's only layer.
struct Layer {
    compressed: Vec<u8>,
    /// Of the tar inside.
    diff_id: Digest,
}

impl Layer {
    /// The program, and further files beside it.
    fn of(program: &Path, more: &[Vec<u8>]) -> anyhow::Result<Self> {
        let bytes = fs::read(program)?;
        let mut tar = tar::Builder::new(Vec::new());
        append(&mut tar, "web", 0o755, &bytes)?;
        for (number, bytes) in more.iter().enumerate() {
            append(&mut tar, &format!("data/{number}"), 0o644, bytes)?;
        }
        let tar = tar.into_inner()?;
        // No time and no file name in the header: the same program gives the same digest.
        let mut gzip = GzBuilder::new()
            .mtime(0)
            .write(Vec::new(), Compression::default());
        gzip.write_all(&tar)?;
        Ok(Self {
            compressed: gzip.finish()?,
            diff_id: Digest::of(&tar),
        })
    }
}

/// Writes an OCI image layout as a tar (OCI image specification, "Image Layout Specification").
fn write_archive(path: &Path, version: Version, layer: &Layer) -> anyhow::Result<()> {
    let config = serde_json::to_vec(&json!({
        "architecture": architecture()?,
        "os": "linux",
        "config": {
            "Entrypoint": ["/web"],
            "Env": [
                format!("VERSION={}", version.name),
                format!("READY={}", if version.ready { "yes" } else { "no" }),
            ],
            "ExposedPorts": {"8080/tcp": {}},
            "Labels": {"org.opencontainers.image.version": version.name},
        },
        "rootfs": {"type": "layers", "diff_ids": [layer.diff_id]},
    }))?;
    let image = "application/vnd.oci.image";
    let manifest = serde_json::to_vec(&json!({
        "schemaVersion": 2,
        "mediaType": format!("{image}.manifest.v1+json"),
        "config": descriptor(&format!("{image}.config.v1+json"), &config),
        "layers": [descriptor(&format!("{image}.layer.v1.tar+gzip"), &layer.compressed)],
    }))?;
    let mut entry = descriptor(&format!("{image}.manifest.v1+json"), &manifest);
    entry["annotations"] = json!({"org.opencontainers.image.ref.name": version.name});
    let index = serde_json::to_vec(&json!({
        "schemaVersion": 2,
        "mediaType": format!("{image}.index.v1+json"),
        "manifests": [entry],
    }))?;

    let mut archive = tar::Builder::new(fs::File::create(path)?);
    append(
        &mut archive,
        "oci-layout",
        0o644,
        br#"{"imageLayoutVersion":"1.0.0"}"#,
    )?;
    append(&mut archive, "index.json", 0o644, &index)?;
    for blob in [config.as_slice(), &manifest, &layer.compressed] {
        let name = format!("blobs/sha256/{}", Digest::of(blob).hex());
        append(&mut archive, &name, 0o644, blob)?;
    }
    archive.into_inner()?.sync_all()?;
    Ok(())
}

fn descriptor(media_type: &str, blob: &[u8]) -> Value {
    json!({"mediaType": media_type, "digest": Digest::of(blob), "size": blob.len()})
}

fn append<W: std::io::Write>(
    archive: &mut tar::Builder<W>,
    name: &str,
    mode: u32,
    bytes: &[u8],
) -> std::io::Result<()> {
    let mut header = tar::Header::new_ustar();
    header.set_mode(mode);
    header.set_size(u64::try_from(bytes.len()).expect("a file that is in memory"));
    archive.append_data(&mut header, name, bytes)
}

/// The OCI name of the machine that this runs on.
fn architecture() -> anyhow::Result<&'static str> {
    let arch = std::env::consts::ARCH;
    let name = match arch {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "arm" => "arm",
        _ => "",
    };
    ensure!(
        !name.is_empty(),
        "the agent knows x86_64, aarch64 and arm, not {arch}"
    );
    Ok(name)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::io::Read as _;

    use super::*;

    fn files(archive: &Path) -> BTreeMap<String, Vec<u8>> {
        let mut archive = tar::Archive::new(fs::File::open(archive).unwrap());
        archive
            .entries()
            .unwrap()
            .map(|entry| {
                let mut entry = entry.unwrap();
                let (name, mut bytes) = (entry.path().unwrap().display().to_string(), Vec::new());
                entry.read_to_end(&mut bytes).unwrap();
                (name, bytes)
            })
            .collect()
    }

    #[test]
    fn every_blob_has_its_digest_and_versions_share_their_layer() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("web");
        fs::write(&program, b"a program").unwrap();
        let layer = Layer::of(&program, &[]).unwrap();
        let mut blobs = Vec::new();
        for name in ["v1", "v2"] {
            let path = dir.path().join(name);
            write_archive(&path, Version { name, ready: true }, &layer).unwrap();
            let files = files(&path);
            let names: Vec<String> = files
                .iter()
                .filter_map(|(path, bytes)| {
                    let hex = path.strip_prefix("blobs/sha256/")?;
                    assert_eq!(hex, Digest::of(bytes).hex());
                    Some(hex.to_owned())
                })
                .collect();
            assert_eq!(names.len(), 3);
            let index: Value = serde_json::from_slice(&files["index.json"]).unwrap();
            let manifest = index["manifests"][0]["digest"].as_str().unwrap();
            assert!(
                names
                    .iter()
                    .any(|name| manifest == format!("sha256:{name}"))
            );
            blobs.push(names);
        }
        let shared = blobs[0]
            .iter()
            .filter(|name| blobs[1].contains(name))
            .count();
        assert_eq!(shared, 1, "the layer, and nothing else");
    }
}
