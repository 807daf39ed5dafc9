//! The device's tests inside the guest, and what became of them.

use std::fmt;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context as _, ensure};

use super::archive::Archive;
use super::contents::{Programs, add_program, base};
use super::kernel::{Kernel, text};
use super::machine::{Boot, Machine, fresh_disk};
use super::{Place, SUITE_LIMIT};
use crate::step;

/// Swap of the guest, so that there is something that containers may not use.
const SWAP_BYTES: u64 = 256 << 20;

/// The disk that tests work on; only what they write takes place.
const SCRATCH_BYTES: u64 = 2 << 30;

/// Races that a guest without hardware help runs for minutes, and that no kind of cgroup has a part in. They run on the
/// machine itself, and with `--only` in the guest.
const SLOW: [&str; 5] = [
    "escapes::a_volume_that_changes",
    "escapes::commands_on_their_way",
    "escapes::images_cannot_take",
    "escapes::links_where_mounts",
    "escapes::no_working_directory",
];

/// What one test program in the guest did.
#[derive(Debug, PartialEq, Eq)]
struct Ended {
    name: String,
    status: i32,
}

/// What the guest said, and what the tests printed.
#[derive(Debug)]
pub(crate) struct Outcome {
    kernel: String,
    ended: Vec<Ended>,
    expected: usize,
    done: bool,
    /// The lines `test result: …` of the test programs, in order.
    results: Vec<String>,
    seconds: u64,
    /// Where the failures are explained; empty when there are none.
    console: String,
}

impl Outcome {
    /// Whether every program ran to its end and succeeded.
    pub(crate) fn passed(&self) -> bool {
        self.done
            && self.ended.len() == self.expected
            && self.ended.iter().all(|ended| ended.status == 0)
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.console)?;
        writeln!(
            f,
            "==> guest with Linux {}, cgroup v2 only: {} of {} test programs succeeded, {} s",
            self.kernel,
            self.ended.iter().filter(|ended| ended.status == 0).count(),
            self.expected,
            self.seconds
        )?;
        for (ended, result) in self.ended.iter().zip(&self.results) {
            writeln!(f, "    {}: {result}", ended.name)?;
        }
        for ended in self.ended.iter().filter(|ended| ended.status != 0) {
            writeln!(f, "    {} ended with {}", ended.name, ended.status)?;
        }
        if !self.done {
            writeln!(f, "    the guest stopped before the end")?;
        }
        Ok(())
    }
}

/// Boots the guest with the test programs and lets each run.
///
/// # Errors
///
/// When the guest cannot be made or takes too long; failing tests are in the outcome.
pub(super) fn run(
    place: &Place,
    kernel: &Kernel,
    programs: &Programs,
    only: Option<&str>,
) -> anyhow::Result<Outcome> {
    let mut archive = base(kernel)?;
    let agent = programs
        .agent
        .to_str()
        .context("the target directory's path is not UTF-8")?;
    add_program(&mut archive, &programs.agent, agent)?;
    let filter = match only {
        Some(only) => only.to_owned(),
        None => SLOW.map(|name| format!("--skip {name}")).join(" "),
    };
    let mut tests = String::new();
    let suite = [
        ("units", &programs.units, "runtime::"),
        ("runtime", &programs.runtime, ""),
        ("device", &programs.device, ""),
    ];
    for (name, program, subset) in suite {
        let path = format!("/guest/{name}");
        add_program(&mut archive, program, &path)?;
        tests.push_str(&format!(
            "{name} {} {path} --test-threads=2 --color=never {subset} {filter}\n",
            SUITE_LIMIT.as_secs()
        ));
    }
    let mosquitto = Path::new("/usr/sbin/mosquitto");
    add_program(&mut archive, mosquitto, "/usr/sbin/mosquitto")?;
    add_compiled(&mut archive)?;
    archive.file("/guest/tests", 0o644, tests.as_bytes());
    archive.file("/guest/suite.sh", 0o644, include_bytes!("suite.sh"));
    let initrd = place.file("suite.cpio");
    fs::write(&initrd, archive.finish())
        .with_context(|| format!("failed to write {}", initrd.display()))?;

    let begin = Instant::now();
    let console = place.cache.join("suite-console.log");
    let mut machine = Machine::start(&Boot {
        kernel: &kernel.image,
        initrd: &initrd,
        devices: &[
            fresh_disk(&place.file("swap"), SWAP_BYTES, false)?,
            fresh_disk(&place.file("scratch"), SCRATCH_BYTES, true)?,
        ]
        .concat(),
        task: "suite",
        console: &console,
        limit: SUITE_LIMIT,
    })?;
    let mut words = Vec::new();
    while let Some(line) = machine.next()? {
        words.push(line);
    }
    let printed = fs::read(&console).unwrap_or_default();
    let printed = String::from_utf8_lossy(&printed);
    let mut outcome = judge(&words, &printed, suite.len());
    outcome.seconds = begin.elapsed().as_secs();
    ensure!(
        !outcome.kernel.is_empty(),
        "the guest did not come up\n{}",
        machine.console()
    );
    if !outcome.passed() {
        outcome.console = machine.console();
    }
    Ok(outcome)
}

/// What tests have compiled from C: source, name of the program, options. There is no compiler in the guest.
const COMPILED: [(&str, &str, &[&str]); 2] = [
    ("attempts.c", "escape", &["-static"]),
    ("preload.c", "evil.so", &["-shared", "-fPIC"]),
];

fn add_compiled(archive: &mut Archive) -> anyhow::Result<()> {
    for (source, name, options) in COMPILED {
        let program = tempfile::NamedTempFile::new().context("failed to make a temporary file")?;
        text(
            Command::new("cc")
                .arg("-O1")
                .args(options)
                .arg("-o")
                .arg(program.path())
                .arg(
                    step::root()
                        .join("agent/tests/runtime/escapes")
                        .join(source),
                ),
        )?;
        archive.file(
            &format!("/guest/attempts/{name}"),
            0o755,
            &fs::read(program.path())?,
        );
    }
    Ok(())
}

/// Reads the guest's words and its console.
fn judge(words: &[String], printed: &str, expected: usize) -> Outcome {
    let mut outcome = Outcome {
        kernel: String::new(),
        ended: Vec::new(),
        expected,
        done: false,
        results: printed
            .lines()
            .filter_map(|line| line.trim().strip_prefix("test result: "))
            .map(str::to_owned)
            .collect(),
        seconds: 0,
        console: String::new(),
    };
    for word in words {
        let mut parts = word.split_whitespace();
        match (parts.next(), parts.next(), parts.next()) {
            (Some("up"), Some(kernel), _) => outcome.kernel = kernel.to_owned(),
            (Some("end"), Some(name), Some(status)) => outcome.ended.push(Ended {
                name: name.to_owned(),
                status: status.parse().unwrap_or(-1),
            }),
            (Some("done"), None, None) => outcome.done = true,
            _ => {}
        }
    }
    outcome
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(lines: &[&str]) -> Vec<String> {
        lines.iter().map(|line| (*line).to_owned()).collect()
    }

    #[test]
    fn only_a_guest_that_ran_everything_to_a_good_end_passes() {
        let good = ["up 6.1", "begin a", "end a 0", "begin b", "end b 0", "done"];
        assert!(judge(&words(&good), "", 2).passed());
        assert!(!judge(&words(&good), "", 3).passed(), "one never ran");
        assert!(!judge(&words(&good[..5]), "", 2).passed(), "no end");
        let bad = ["up 6.1", "end a 0", "end b 137", "done"];
        let outcome = judge(&words(&bad), "x\ntest result: ok. 1 passed\r\n", 2);
        assert!(!outcome.passed());
        let text = outcome.to_string();
        assert!(text.contains("b ended with 137"), "{text}");
        assert!(text.contains("a: ok. 1 passed"), "{text}");
        assert!(!judge(&words(&["end a garbage", "done"]), "", 1).passed());
    }
}
