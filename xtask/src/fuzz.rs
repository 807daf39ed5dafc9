//! `cargo xtask fuzz`: libFuzzer over the targets in `fuzz/`, with the stable toolchain.
//!
//! What cargo-fuzz does with a nightly compiler and a sanitizer is done here with coverage alone, for which LLVM's pass can be
//! named on any compiler: the code is almost all safe Rust, and a broken promise is an assertion that fails.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::time::Instant;

use anyhow::{Context as _, bail, ensure};
use clap::Args;

use crate::{packages, step};

/// How LLVM marks edges and comparisons, as cargo-fuzz asks for it. For the target only, so not for build scripts.
const COVERAGE: &[&str] = &[
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
];

/// An input that takes longer than so many seconds is a failure.
const SLOW_SECONDS: u32 = 10;
/// A target that has more resident than this, in MiB, is a failure: twice what any needs.
const MEMORY_MIB: u32 = 1024;

/// Options of `fuzz`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// How long each target runs
    #[arg(long, default_value_t = 60)]
    seconds: u32,
    /// Only this target; may be given several times
    #[arg(long)]
    target: Vec<String>,
    /// How many targets run at once
    #[arg(long, default_value_t = 2)]
    jobs: usize,
    /// Add to the committed corpora what was found to reach more, as few and short inputs as do
    #[arg(long)]
    keep: bool,
}

/// Builds the programs and runs each; says what each did.
///
/// # Errors
///
/// When one does not build or finds a failure; the input that does it is kept and named.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    ensure!(
        crate::is_root(),
        "unpacking sets owners: run as root (sudo -E env \"PATH=$PATH\" cargo xtask fuzz)"
    );
    packages::install(packages::FOR_FUZZ)?;
    let fuzz = step::root().canonicalize()?.join("fuzz");
    let targets = targets(&fuzz, &options.target)?;
    let begin = Instant::now();
    let built = build(&fuzz, &targets)?;
    eprintln!("==> built in {} s", begin.elapsed().as_secs());
    let scratch = scratch()?;
    let run = Run {
        fuzz: &fuzz,
        built: &built,
        scratch: scratch.path(),
        options,
    };
    eprintln!(
        "    {:<18}{:>12}{:>10}{:>10}{:>10}",
        "target", "executions", "edges", "features", "inputs"
    );
    let (ahead, failed) = (Mutex::new(targets.iter()), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..options.jobs.max(1) {
            scope.spawn(|| {
                loop {
                    let next = ahead.lock().expect("no holder panics").next();
                    let Some(target) = next else { break };
                    if let Err(error) = run.target(target) {
                        eprintln!("    {target}: {error:#}");
                        failed
                            .lock()
                            .expect("no holder panics")
                            .push(target.clone());
                    }
                }
            });
        }
    });
    let failed = failed.into_inner().expect("no holder panics");
    ensure!(failed.is_empty(), "fuzzing failed: {}", failed.join(", "));
    Ok(())
}

/// The names of all programs, or those that were asked for.
fn targets(fuzz: &Path, asked: &[String]) -> anyhow::Result<Vec<String>> {
    let mut all = Vec::new();
    for entry in fs::read_dir(fuzz.join("fuzz_targets")).context("fuzz/fuzz_targets")? {
        let path = entry?.path();
        all.extend(
            path.file_stem()
                .map(|name| name.to_string_lossy().into_owned()),
        );
    }
    all.sort();
    if let Some(unknown) = asked.iter().find(|name| !all.contains(name)) {
        bail!("there is no target {unknown}; there are {}", all.join(", "));
    }
    Ok(if asked.is_empty() {
        all
    } else {
        asked.to_vec()
    })
}

/// Builds with coverage, in a target directory of its own since all flags differ; returns where the programs are.
fn build(fuzz: &Path, targets: &[String]) -> anyhow::Result<PathBuf> {
    let host = host()?;
    let out = target_directory().join("fuzz");
    let mut command = step::cargo(&["build", "--release", "--quiet", "--target", &host]);
    command
        .args([
            "--manifest-path".as_ref(),
            fuzz.join("Cargo.toml").as_os_str(),
        ])
        .args(targets.iter().flat_map(|target| ["--bin", target]))
        .env("CARGO_TARGET_DIR", &out)
        .env_remove("RUSTFLAGS")
        .env("CARGO_ENCODED_RUSTFLAGS", COVERAGE.join("\u{1f}"));
    step::run("building the fuzz targets with coverage", &mut command)?;
    Ok(out.join(host).join("release"))
}

/// What the compiler calls this machine.
fn host() -> anyhow::Result<String> {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let output = Command::new(rustc)
        .arg("-vV")
        .output()
        .context("rustc -vV")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let host = text.lines().find_map(|line| line.strip_prefix("host: "));
    host.map(str::to_owned).context("rustc -vV names no host")
}

/// Absolute: the programs do not run in this directory.
fn target_directory() -> PathBuf {
    let named = std::env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into());
    step::root().join(named)
}

/// A directory for targets that write, in memory where that is possible: libFuzzer ends its process without tidying up.
fn scratch() -> anyhow::Result<tempfile::TempDir> {
    let memory = Path::new("/dev/shm");
    let made = if memory.is_dir() {
        tempfile::tempdir_in(memory)
    } else {
        tempfile::tempdir()
    };
    made.context("a temporary directory")
}

struct Run<'r> {
    fuzz: &'r Path,
    built: &'r Path,
    scratch: &'r Path,
    options: &'r Options,
}

impl Run<'_> {
    /// Runs one program over its corpus and what earlier runs on this machine found.
    fn target(&self, target: &str) -> anyhow::Result<()> {
        let corpus = self.fuzz.join("corpus").join(target);
        let artifacts = self.fuzz.join("artifacts").join(target);
        let state = target_directory().join("fuzz/state").join(target);
        let found = state.join("corpus");
        for dir in [&corpus, &artifacts, &found] {
            fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
        }
        let log = state.join("log");
        let mut command = self.program(target, &artifacts);
        command
            .arg(format!("-max_total_time={}", self.options.seconds))
            .arg("-print_final_stats=1")
            .args([&found, &corpus]);
        let status = quietly(&mut command, &log)?;
        let text = String::from_utf8_lossy(&fs::read(&log)?).into_owned();
        if !status.success() {
            let lines: Vec<&str> = text.lines().collect();
            let end = lines[lines.len().saturating_sub(40)..].join("\n");
            bail!("{status}; the input is in {}\n{end}", artifacts.display());
        }
        eprintln!("    {target:<18}{}", summary(&text));
        if self.options.keep {
            self.keep(target, &found, &corpus, &artifacts, &log)?;
        }
        Ok(())
    }

    fn program(&self, target: &str, artifacts: &Path) -> Command {
        let mut command = Command::new(self.built.join(target));
        command
            .arg(format!("-timeout={SLOW_SECONDS}"))
            .arg(format!("-rss_limit_mb={MEMORY_MIB}"))
            .arg(format!("-artifact_prefix={}/", artifacts.display()))
            .env("FORESHORE_FUZZ_SCRATCH", self.scratch)
            .env("RUST_BACKTRACE", "1")
            .current_dir(self.scratch);
        let words = self.fuzz.join("dict").join(format!("{target}.dict"));
        if words.exists() {
            command.arg(format!("-dict={}", words.display()));
        }
        command
    }

    /// Adds inputs to the committed corpus that reach what it does not.
    fn keep(
        &self,
        target: &str,
        found: &Path,
        corpus: &Path,
        artifacts: &Path,
        log: &Path,
    ) -> anyhow::Result<()> {
        let mut command = self.program(target, artifacts);
        command.arg("-merge=1").args([corpus, found]);
        let status = quietly(&mut command, log)?;
        ensure!(
            status.success(),
            "merging ended with {status}: {}",
            log.display()
        );
        Ok(())
    }
}

/// Runs `command` with its output in `log`.
fn quietly(command: &mut Command, log: &Path) -> anyhow::Result<std::process::ExitStatus> {
    let out = File::create(log).with_context(|| log.display().to_string())?;
    command
        .stdout(out.try_clone()?)
        .stderr(out)
        .status()
        .with_context(|| format!("failed to start {}", command.get_program().display()))
}

/// What libFuzzer says at its end: executions, edges, features, inputs.
fn summary(log: &str) -> String {
    let executions = log
        .lines()
        .find_map(|line| line.strip_prefix("stat::number_of_executed_units:"))
        .unwrap_or("?");
    let last = log
        .lines()
        .rfind(|line| line.contains(" ft: "))
        .unwrap_or_default();
    let after = |name: &str| {
        let mut words = last.split_whitespace().skip_while(|word| *word != name);
        words.nth(1).unwrap_or("?").to_owned()
    };
    format!(
        "{:>12}{:>10}{:>10}{:>10}",
        executions.trim(),
        after("cov:"),
        after("ft:"),
        after("corp:").split('/').next().unwrap_or("?")
    )
}
