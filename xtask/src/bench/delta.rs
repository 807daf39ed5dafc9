//! Deltas between images made of two versions of Debian packages: bytes beside a gzip pull, beside `rdiff`, and beside sending
//! changed files whole; time and memory of applying.
//!
//! Each image is one layer with nothing but the packages of its pair, so nearly every program in it was built again. Layers
//! with other packages beside them gain more. The packages come from the archive that this machine's apt is configured for.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use serde_json::Value;

use crate::step;

/// Name and packages of each pair; all of one source, so of one version.
const PAIRS: &[(&str, &[&str])] = &[
    (
        "python3.11",
        &[
            "python3.11",
            "python3.11-minimal",
            "libpython3.11-minimal",
            "libpython3.11-stdlib",
        ],
    ),
    ("nginx", &["nginx", "nginx-common"]),
    ("openssl", &["openssl", "libssl3"]),
    ("glibc", &["libc6", "libc-bin"]),
    ("curl", &["curl", "libcurl4"]),
];

/// One pair's figures, in bytes.
struct Figures {
    versions: [String; 2],
    pull: u64,
    delta: u64,
    rdiff: Option<u64>,
    changed_files: u64,
    making: Duration,
    applying: Duration,
    stream: u64,
    /// The most memory of the process that applied it.
    peak: String,
}

/// Runs the part.
///
/// # Errors
///
/// When the programs cannot be built, or a delta does not make its layer.
pub(super) fn run(programs: Option<&Path>) -> anyhow::Result<()> {
    let build = [
        "build",
        "--release",
        "-p",
        "foreshore-images",
        "--example",
        "rebuild",
    ];
    step::run("build what applies deltas", &mut step::cargo(&build))?;
    let target = super::footprint::target_dir()?;
    let cli = match programs {
        Some(dir) => dir.join("foreshore"),
        None => {
            let build = ["build", "--release", "-p", "foreshore"];
            step::run("build the command line", &mut step::cargo(&build))?;
            target.join("release/foreshore")
        }
    };
    let rebuild = target.join("release/examples/rebuild");
    println!("\ndeltas between two versions of Debian packages (bytes)");
    println!(
        "{:<11} {:<42} {:>9} {:>9} {:>6} {:>9} {:>9} {:>8} {:>8} {:>10}",
        "pair", "versions", "pull", "delta", "ratio", "rdiff", "files", "made s", "MB/s", "peak"
    );
    let mut ratios = Vec::new();
    for (name, packages) in PAIRS {
        match pair(packages, &cli, &rebuild) {
            Ok(figures) => {
                ratios.push(print(name, &figures));
            }
            Err(error) => println!("{name:<11} left out: {error:#}"),
        }
    }
    ensure!(!ratios.is_empty(), "no pair could be had");
    ratios.sort_by(f64::total_cmp);
    println!(
        "median of {} pairs: 1/{:.1} of a pull (goal: 1/6)",
        ratios.len(),
        ratios[ratios.len() / 2]
    );
    Ok(())
}

#[expect(clippy::cast_precision_loss, reason = "figures for people")]
fn print(name: &str, figures: &Figures) -> f64 {
    let ratio = figures.pull as f64 / figures.delta as f64;
    let rate = figures.stream as f64 / 1e6 / figures.applying.as_secs_f64();
    println!(
        "{name:<11} {:<42} {:>9} {:>9} {ratio:>6.1} {:>9} {:>9} {:>8.1} {rate:>8.0} {:>10}",
        figures.versions.join(" → "),
        figures.pull,
        figures.delta,
        figures
            .rdiff
            .map_or_else(|| "-".to_owned(), |bytes| bytes.to_string()),
        figures.changed_files,
        figures.making.as_secs_f64(),
        figures.peak,
    );
    ratio
}

fn pair(packages: &[&str], cli: &Path, rebuild: &Path) -> anyhow::Result<Figures> {
    let dir = tempfile::tempdir()?;
    let dir = dir.path();
    let versions = versions(packages[0])?;
    for (which, version) in ["old", "new"].iter().zip(&versions) {
        image(&dir.join(which), packages, version)?;
    }
    let layout = |which: &str| format!("{}:v1", dir.join(which).join("image").display());
    let begin = Instant::now();
    let report = output(
        Command::new(cli)
            .args(["-o", "json", "image", "delta"])
            .args(["--from", &layout("old"), "--to", &layout("new"), "--into"])
            .arg(dir.join("deltas")),
    )?;
    let making = begin.elapsed();
    let report: Value = serde_json::from_slice(&report)?;
    let layer = &report["deltas"][0]["layers"][0];
    let (pull, delta) = (layer["blobBytes"].as_u64(), layer["deltaBytes"].as_u64());
    let (pull, delta) = (pull.context("no layer")?, delta.context("no gain")?);
    let blob = largest(&dir.join("deltas/blobs/sha256"))?;
    ensure!(
        fs::metadata(&blob)?.len() == delta,
        "the delta is not where it should be"
    );
    let begin = Instant::now();
    let applied = Command::new(rebuild)
        .arg(&blob)
        .arg(dir.join("old/tree"))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .output()?;
    let applying = begin.elapsed();
    let said = String::from_utf8_lossy(&applied.stderr).into_owned();
    ensure!(applied.status.success(), "not applied: {said}");
    let (diff_id, peak) = said.trim().split_once(' ').context("no diff id")?;
    ensure!(
        layer["diffId"] == diff_id,
        "the delta makes {diff_id}, not the layer"
    );
    Ok(Figures {
        versions,
        pull,
        delta,
        rdiff: rdiff(dir).ok(),
        changed_files: changed_files(dir)?,
        making,
        applying,
        stream: fs::metadata(dir.join("new/layer.tar"))?.len(),
        peak: peak.to_owned(),
    })
}

/// The two newest versions of a package, the older first.
fn versions(package: &str) -> anyhow::Result<[String; 2]> {
    let listed = output(Command::new("apt-cache").args(["madison", package]))?;
    let listed = String::from_utf8(listed)?;
    let mut versions = Vec::new();
    for line in listed.lines() {
        let version = line.split('|').nth(1).unwrap_or_default().trim();
        if !version.is_empty() && !versions.iter().any(|known| known == version) {
            versions.push(version.to_owned());
        }
    }
    match &versions[..] {
        [new, old, ..] => Ok([old.clone(), new.clone()]),
        _ => anyhow::bail!("apt knows no two versions of {package}; run apt-get update"),
    }
}

/// Unpacks the packages into `tree`, and makes `layer.tar` and an image of it.
fn image(dir: &Path, packages: &[&str], version: &str) -> anyhow::Result<()> {
    let (debs, tree) = (dir.join("debs"), dir.join("tree"));
    fs::create_dir_all(&debs)?;
    fs::create_dir(&tree)?;
    let mut download = Command::new("apt-get");
    download
        .args(["-q", "-o", "APT::Sandbox::User=root", "download"])
        .current_dir(&debs);
    for package in packages {
        download.arg(format!("{package}={version}"));
    }
    output(&mut download)?;
    let mut found: Vec<PathBuf> = fs::read_dir(&debs)?
        .map(|entry| Ok(entry?.path()))
        .collect::<std::io::Result<_>>()?;
    found.sort();
    for deb in found {
        output(Command::new("dpkg-deb").arg("-x").arg(deb).arg(&tree))?;
    }
    let tar = dir.join("layer.tar");
    output(
        Command::new("tar")
            .args(["--sort=name", "--numeric-owner", "--owner=0", "--group=0"])
            .arg("-C")
            .arg(&tree)
            .arg("-cf")
            .arg(&tar)
            .arg("."),
    )?;
    let layout = dir.join("image");
    let image = format!("{}:v1", layout.display());
    output(
        Command::new("umoci")
            .args(["init", "--layout"])
            .arg(&layout),
    )?;
    output(Command::new("umoci").args(["new", "--image", &image]))?;
    let add = ["raw", "add-layer", "--image", &image];
    output(Command::new("umoci").args(add).arg(&tar))?;
    Ok(())
}

fn largest(dir: &Path) -> anyhow::Result<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        found.push((entry.metadata()?.len(), entry.path()));
    }
    found.sort();
    Ok(found.pop().context("no blob")?.1)
}

/// What librsync makes of the two streams, after gzip.
fn rdiff(dir: &Path) -> anyhow::Result<u64> {
    let (signature, delta) = (dir.join("signature"), dir.join("rdiff"));
    let rdiff = |arguments: &[&Path]| {
        let mut command = Command::new("rdiff");
        output(command.args(arguments)).map(drop)
    };
    let (old, new) = (dir.join("old/layer.tar"), dir.join("new/layer.tar"));
    rdiff(&[Path::new("signature"), &old, &signature])?;
    rdiff(&[Path::new("delta"), &signature, &new, &delta])?;
    gzip(&[delta])
}

/// The files that are not in the old tree, after gzip.
fn changed_files(dir: &Path) -> anyhow::Result<u64> {
    let mut old = BTreeSet::new();
    for file in files(&dir.join("old/tree"))? {
        old.insert(fs::read(file)?);
    }
    let mut changed = files(&dir.join("new/tree"))?;
    changed.retain(|file| fs::read(file).is_ok_and(|content| !old.contains(&content)));
    gzip(&changed)
}

fn files(tree: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let (mut ahead, mut found) = (vec![tree.to_owned()], Vec::new());
    while let Some(next) = ahead.pop() {
        let meta = fs::symlink_metadata(&next)?;
        if meta.is_dir() {
            for entry in fs::read_dir(&next)? {
                ahead.push(entry?.path());
            }
        } else if meta.is_file() {
            found.push(next);
        }
    }
    found.sort();
    Ok(found)
}

/// Bytes of all these files in one gzip stream, at the level that registries see most.
fn gzip(files: &[PathBuf]) -> anyhow::Result<u64> {
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(6));
    for file in files {
        let mut content = Vec::new();
        fs::File::open(file)?.read_to_end(&mut content)?;
        gzip.write_all(&content)?;
    }
    Ok(gzip.finish()?.len() as u64)
}

fn output(command: &mut Command) -> anyhow::Result<Vec<u8>> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command
        .output()
        .with_context(|| format!("{name} is not there"))?;
    ensure!(
        output.status.success(),
        "{name} ended with {}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(output.stdout)
}
