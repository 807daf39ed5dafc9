//! `cargo xtask guest`: the device's tests on a kernel with nothing but cgroup v2, in a virtual machine.
//!
//! | module | what it holds |
//! |---|---|
//! | `kernel` | Debian's cloud kernel, fetched once |
//! | `archive` | the file system it boots from |
//! | `contents` | what is in there: programs under test, their libraries, busybox |
//! | `machine` | qemu, and its end |
//! | `power` | a device whose machine is killed while it works on its disk |
//! | `suite` | the tests that run inside, and what they said |

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use clap::Args;

mod archive;
mod contents;
mod kernel;
mod machine;
mod power;
mod suite;

use crate::packages;
use kernel::Kernel;

/// Options of `guest`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Do not install packages and download no kernel; fail if one is missing
    #[arg(long)]
    no_install: bool,
    /// Run only tests whose name contains this
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// How often to cut the power of a device that works; 0 for never
    #[arg(long, default_value_t = 4, value_name = "N")]
    cuts: u32,
    /// What the moments of the cuts are drawn from; a failure names it
    #[arg(long, default_value_t = 1, value_name = "S")]
    seed: u64,
    /// Only cut the power
    #[arg(long, conflicts_with = "only")]
    no_suite: bool,
}

/// The longest that the tests inside may take: five times what they take on an idle machine of two cores.
const SUITE_LIMIT: Duration = Duration::from_secs(480);

/// Why the guest cannot run on this machine, after installing what can be installed; `None` when it can.
pub(crate) fn missing(install: bool) -> Option<String> {
    if std::env::consts::ARCH != "x86_64" {
        return Some(format!(
            "the guest is x86_64, this machine {}",
            std::env::consts::ARCH
        ));
    }
    let here = || {
        if install {
            packages::install(packages::FOR_GUEST)?;
        } else {
            packages::check(packages::FOR_GUEST)?;
        }
        Kernel::find(&cache()?, install)
    };
    here().err().map(|error| format!("{error:#}"))
}

/// Builds what is to be tested, boots it, and judges what it says.
///
/// # Errors
///
/// When something is missing, a test fails, or the guest does not end in time.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    if let Some(missing) = missing(!options.no_install) {
        bail!("{missing}");
    }
    let place = Place::new()?;
    let kernel = Kernel::find(&place.cache, false)?;
    let begin = Instant::now();
    let mut passed = true;
    if !options.no_suite {
        let programs = contents::Programs::build()?;
        let outcome = suite::run(&place, &kernel, &programs, options.only.as_deref())?;
        eprintln!("{outcome}");
        passed = outcome.passed();
    }
    if options.only.is_none() && options.cuts > 0 {
        let survived = power::run(&place, &kernel, options.seed, options.cuts)?;
        eprintln!("{survived}");
    }
    eprintln!("==> guest: {} s", begin.elapsed().as_secs());
    ensure!(passed, "tests failed in the guest");
    Ok(())
}

/// Where the guest's files are: the kernel stays, everything else is of one run.
#[derive(Debug)]
pub(crate) struct Place {
    cache: PathBuf,
    run: tempfile::TempDir,
}

impl Place {
    fn new() -> anyhow::Result<Self> {
        let cache = cache()?;
        let run = tempfile::Builder::new()
            .prefix("run-")
            .tempdir_in(&cache)
            .with_context(|| format!("failed to make a directory in {}", cache.display()))?;
        Ok(Self { cache, run })
    }

    fn file(&self, name: &str) -> PathBuf {
        self.run.path().join(name)
    }
}

fn cache() -> anyhow::Result<PathBuf> {
    // target/debug/xtask
    let program = std::env::current_exe().context("failed to find this program")?;
    let Some(target) = program.ancestors().nth(2) else {
        bail!("{} is not in a target directory", program.display())
    };
    let cache = target.join("guest");
    fs::create_dir_all(&cache).with_context(|| format!("failed to make {}", cache.display()))?;
    Ok(cache)
}
