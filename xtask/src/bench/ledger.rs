//! What the list of a layer's files (`image fsck --deep`) costs when a layer is unpacked: time and bytes.
//!
//! The layer is made of this machine's own programs, libraries and documentation.

use std::process::Command;

use anyhow::ensure;

use crate::step;

/// What the layer is made of, as far as it is there.
const PARTS: &[&str] = &[
    "usr/sbin",
    "usr/share/doc",
    "usr/lib/python3",
    "usr/share/perl",
];

/// Runs the part.
///
/// # Errors
///
/// When the layer cannot be made or unpacked.
pub(super) fn run(rounds: u32) -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let layer = dir.path().join("layer.tar");
    let there = PARTS
        .iter()
        .filter(|part| std::path::Path::new("/").join(part).exists());
    let mut tar = Command::new("tar");
    tar.args(["-C", "/", "-cf"]).arg(&layer).args(there);
    step::run("make a layer", &mut tar)?;
    println!("\nthe list of a layer's files; {rounds} rounds, medians");
    let mut bench = step::cargo(&[
        "run",
        "--quiet",
        "--release",
        "-p",
        "foreshore-images",
        "--example",
        "ledger",
        "--",
    ]);
    let status = bench
        .arg(&layer)
        .arg(rounds.to_string())
        .arg(dir.path())
        .status()?;
    ensure!(status.success(), "the bench ended with {status}");
    Ok(())
}
