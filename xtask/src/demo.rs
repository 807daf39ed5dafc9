//! `cargo xtask demo`: one hub and five devices on this machine, three versions of a service, and what
//! goes wrong on the way. Every claim is checked on the containers themselves.
//!
//! | module | what it holds |
//! |---|---|
//! | `image` | the demo's service, compiled and packed into OCI archives |
//! | `stage` | directory, hub, devices, and `foreshore` pointed at them |
//! | `process` | processes by pid and start time, and their supervision |
//! | `witness` | what is true on this machine, whatever Foreshore says |
//! | `record` | what the hub said while a rollout went |
//! | `story` | the chapters: what is done, and what must be true then |
//! | `interrupt` | Ctrl-C |
//! | `sweep` | leaving nothing behind |

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use clap::Args;

pub(crate) mod image;
pub(crate) mod interrupt;
pub(crate) mod process;
mod record;
pub(crate) mod stage;
mod story;
pub(crate) mod sweep;
pub(crate) mod witness;

use stage::{Programs, Stage};
use story::Story;
use sweep::{Keep, sweep};

/// Options of `demo`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Leave everything running at the end, and say how to look around
    #[arg(long)]
    keep: bool,
    /// End a demo that was kept, or that was killed, and leave nothing of it behind
    #[arg(long, value_name = "DIR", conflicts_with_all = ["keep", "dir"])]
    stop: Option<PathBuf>,
    /// Use foreshore-hub, foreshore-agent and foreshore from this directory instead of building them
    #[arg(long, value_name = "DIR", conflicts_with = "stop")]
    programs: Option<PathBuf>,
    /// Use this empty directory [default: a fresh one in /tmp]
    #[arg(long)]
    dir: Option<PathBuf>,
}

/// One line of the summary.
struct Verdict {
    claim: &'static str,
    /// What was seen; `None` when it did not come to that.
    found: Option<Result<String, String>>,
    took: Duration,
}

/// Runs the demo, or stops one.
///
/// # Errors
///
/// When not root, when a claim does not hold, or when something is left behind.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    ensure!(
        crate::is_root(),
        "the demo starts containers, so it needs root: sudo -E env \"PATH=$PATH\" cargo xtask demo"
    );
    if let Some(dir) = &options.stop {
        let dir = dir
            .canonicalize()
            .with_context(|| format!("no demo in {}", dir.display()))?;
        sweep(&dir, Keep::Nothing)?;
        println!(
            "the demo in {} is over; nothing is left behind",
            dir.display()
        );
        return Ok(());
    }
    interrupt::listen();
    let programs = match &options.programs {
        Some(dir) => Programs::find(dir)?,
        None => Programs::build()?,
    };
    let stage = Stage::new(programs, options.dir.as_deref())?;
    let dir = stage.dir.clone();
    println!("==> demo in {}", dir.display());
    let mut story = Story::new(stage);
    let mut verdicts = tell(&mut story);
    let failed = verdicts
        .iter()
        .any(|verdict| !matches!(verdict.found, Some(Ok(_))));
    if options.keep && !failed {
        print_summary(&verdicts);
        story.stage.print_directions();
        // The supervising threads end with this process; what they started does not.
        return Ok(());
    }
    verdicts.push(clean_up(&mut story, failed && !interrupt::came()));
    print_summary(&verdicts);
    if interrupt::came() {
        bail!("interrupted");
    }
    if failed {
        print_logs(&dir.join("logs"));
    }
    let count = |wanted: fn(&Verdict) -> bool| verdicts.iter().filter(|one| wanted(one)).count();
    let broken = count(|verdict| matches!(verdict.found, Some(Err(_))));
    let unseen = count(|verdict| verdict.found.is_none());
    ensure!(
        broken == 0,
        "{broken} of {} claims do not hold, {unseen} were not reached",
        verdicts.len()
    );
    Ok(())
}

/// The last lines of every log, and where the rest is.
fn print_logs(logs: &Path) {
    let mut paths: Vec<PathBuf> = std::fs::read_dir(logs)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "log"))
        .collect();
    paths.sort();
    for path in paths {
        let text = std::fs::read(&path).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        println!("--- the end of {}", path.display());
        for line in &lines[lines.len().saturating_sub(4)..] {
            println!("    {line}");
        }
    }
    println!("the logs are in {}", logs.display());
}

/// Goes through the chapters until one fails.
fn tell(story: &mut Story) -> Vec<Verdict> {
    let mut broken = false;
    let mut verdicts = Vec::new();
    for (claim, chapter) in story::CHAPTERS {
        if broken {
            verdicts.push(Verdict {
                claim,
                found: None,
                took: Duration::ZERO,
            });
            continue;
        }
        println!("\n==> {claim}");
        let begin = Instant::now();
        let found = chapter(story).map_err(|error| format!("{error:#}"));
        match &found {
            Ok(seen) => println!("    ✔ {seen}"),
            Err(error) => println!("    ✘ {error}"),
        }
        broken = found.is_err();
        verdicts.push(Verdict {
            claim,
            found: Some(found),
            took: begin.elapsed(),
        });
    }
    verdicts
}

fn clean_up(story: &mut Story, keep_logs: bool) -> Verdict {
    let claim = "nothing is left behind";
    println!("\n==> {claim}");
    let begin = Instant::now();
    story.stage.stop();
    let keep = if keep_logs { Keep::Logs } else { Keep::Nothing };
    let found = sweep(&story.stage.dir, keep)
        .map(|()| {
            let rest = if keep_logs {
                "only the logs stay"
            } else {
                "no directory"
            };
            format!("no process, no mount, no cgroup, {rest}")
        })
        .map_err(|error| format!("{error:#}"));
    match &found {
        Ok(seen) => println!("    ✔ {seen}"),
        Err(error) => println!("    ✘ {error}"),
    }
    Verdict {
        claim,
        found: Some(found),
        took: begin.elapsed(),
    }
}

fn print_summary(verdicts: &[Verdict]) {
    let width = verdicts
        .iter()
        .map(|verdict| verdict.claim.chars().count())
        .max()
        .unwrap_or(0);
    let total: Duration = verdicts.iter().map(|verdict| verdict.took).sum();
    println!("\n   {:<width$}  {:>7}  what was seen", "claim", "time");
    for verdict in verdicts {
        let (mark, seen) = match &verdict.found {
            Some(Ok(seen)) => ('✔', seen.as_str()),
            Some(Err(error)) => ('✘', error.as_str()),
            None => ('–', "not reached"),
        };
        println!(
            "{mark}  {:<width$}  {:>5.1} s  {seen}",
            verdict.claim,
            verdict.took.as_secs_f64()
        );
    }
    println!("   {:<width$}  {:>5.1} s\n", "in all", total.as_secs_f64());
}
