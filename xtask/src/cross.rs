//! `cargo xtask cross`: the agent as one static program for each kind of device, and how large it is.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, ensure};
use clap::Args;

use crate::step;

/// Options of `cross`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Only these targets [default: all of them]
    #[arg(long, value_name = "TRIPLE")]
    target: Vec<String>,
    /// Fail when a target cannot be built because a tool is missing
    #[arg(long)]
    strict: bool,
}

/// A kind of device.
struct Target {
    triple: &'static str,
    /// What compiles the C and assembly parts of the TLS library. They use headers of a C library but no
    /// function of one, so any compiler for the architecture does.
    compiler: &'static str,
    /// The Debian packages that bring it.
    package: &'static str,
}

const TARGETS: [Target; 3] = [
    Target {
        triple: "x86_64-unknown-linux-musl",
        compiler: "gcc",
        package: "gcc libc6-dev",
    },
    Target {
        triple: "aarch64-unknown-linux-musl",
        compiler: "aarch64-linux-gnu-gcc",
        package: "gcc-aarch64-linux-gnu libc6-dev-arm64-cross",
    },
    Target {
        triple: "armv7-unknown-linux-musleabihf",
        compiler: "arm-linux-gnueabihf-gcc",
        package: "gcc-arm-linux-gnueabihf libc6-dev-armhf-cross",
    },
];

/// Builds what can be built here and says what the rest would need.
///
/// # Errors
///
/// When a build fails, when a target is unknown, or with `--strict` when a tool is missing.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    for name in &options.target {
        let known = TARGETS.map(|target| target.triple).join(", ");
        ensure!(
            TARGETS.iter().any(|target| target.triple == name),
            "{name} is not one of {known}"
        );
    }
    let wanted = |target: &&Target| {
        options.target.is_empty() || options.target.iter().any(|name| name == target.triple)
    };
    let (mut built, mut skipped) = (Vec::new(), Vec::new());
    for target in TARGETS.iter().filter(wanted) {
        let missing = target.missing();
        if missing.is_empty() {
            built.push(target.build()?);
        } else {
            println!("==> {}: not built here; first run", target.triple);
            missing
                .iter()
                .for_each(|command| println!("      {command}"));
            skipped.push(target.triple);
        }
    }
    for path in &built {
        let bytes = std::fs::metadata(path)?.len();
        println!("{:>9} bytes  {}", bytes, path.display());
    }
    ensure!(
        skipped.is_empty() || !options.strict,
        "not built: {}",
        skipped.join(", ")
    );
    Ok(())
}

impl Target {
    /// The commands that would bring what is not there.
    fn missing(&self) -> Vec<String> {
        let mut commands = Vec::new();
        if !self.has_standard_library() {
            commands.push(format!("rustup target add {}", self.triple));
        }
        let compiles = Command::new(self.compiler)
            .args(["-E", "-x", "c", "-include", "stdint.h", "/dev/null"])
            .output()
            .is_ok_and(|output| output.status.success());
        if !compiles {
            commands.push(format!("apt-get install {}", self.package));
        }
        commands
    }

    fn has_standard_library(&self) -> bool {
        let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
        let output = Command::new(rustc)
            .args(["--print", "target-libdir", "--target", self.triple])
            .output();
        let Ok(output) = output else { return false };
        let dir = String::from_utf8_lossy(&output.stdout);
        output.status.success() && Path::new(dir.trim()).is_dir()
    }

    fn build(&self) -> anyhow::Result<PathBuf> {
        let variable = self.triple.replace('-', "_");
        let mut command = step::cargo(&["build", "--profile", "device", "-p", "foreshore-agent"]);
        command
            .args(["--bin", "foreshore-agent", "--target", self.triple])
            .env(format!("CC_{variable}"), self.compiler)
            // The toolchain's own linker and start files, so that no C library for the target is needed.
            .env(
                format!("CARGO_TARGET_{}_LINKER", variable.to_uppercase()),
                "rust-lld",
            )
            .env(
                format!("CARGO_TARGET_{}_RUSTFLAGS", variable.to_uppercase()),
                "-C link-self-contained=yes -C relocation-model=static",
            );
        step::run(
            &format!("foreshore-agent for {}", self.triple),
            &mut command,
        )?;
        let target_dir = std::env::var_os("CARGO_TARGET_DIR")
            .map_or_else(|| step::root().join("target"), PathBuf::from);
        let program = target_dir.join(self.triple).join("device/foreshore-agent");
        program
            .canonicalize()
            .with_context(|| format!("cargo left no {}", program.display()))
    }
}
