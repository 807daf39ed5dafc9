//! The device's tests inside the guest, and what became of them.

use std::fmt;
use std::fs::{self, File};
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context as _, ensure};

use super::contents::{Programs, add_program, base};
use super::kernel::Kernel;
use super::machine::{Boot, Machine};
use super::{Place, SUITE_LIMIT};
use crate::step;

/// Of the disk that containers are on; what is not written takes no room here.
const DISK_BYTES: u64 = 1 << 30;

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
    let filter = only.unwrap_or_default();
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
            "{name} 200 {path} --test-threads=2 --color=never {subset} {filter}\n"
        ));
    }
    let mosquitto = Path::new("/usr/sbin/mosquitto");
    add_program(&mut archive, mosquitto, "/usr/sbin/mosquitto")?;
    // There is no compiler in the guest.
    for (source, name, options) in [
        ("attempts.c", "escape", ["-static", "-O1"]),
        ("preload.c", "evil.so", ["-shared", "-fPIC"]),
    ] {
        let source = format!("agent/tests/runtime/escapes/{source}");
        let program = place.file(name);
        let mut compiler = Command::new("cc");
        compiler.args(options).arg("-o").arg(&program).arg(&source);
        step::run(&format!("compile {source}"), &mut compiler)?;
        let bytes =
            fs::read(&program).with_context(|| format!("failed to read {}", program.display()))?;
        archive.file(&format!("/guest/attempts/{name}"), 0o755, &bytes);
    }
    archive.file("/guest/tests", 0o644, tests.as_bytes());
    archive.file("/guest/suite.sh", 0o644, include_bytes!("suite.sh"));
    let initrd = place.file("suite.cpio");
    fs::write(&initrd, archive.finish())
        .with_context(|| format!("failed to write {}", initrd.display()))?;

    // The kernel's tmpfs cannot be mounted with mapped ids before Linux 6.3, so containers are on a real file system.
    let disk = place.file("suite.ext4");
    File::create(&disk)
        .and_then(|file| file.set_len(DISK_BYTES))
        .with_context(|| format!("failed to make {}", disk.display()))?;
    let mut format = Command::new("/sbin/mkfs.ext4");
    step::run("make the guest's file system", format.arg("-qF").arg(&disk))?;
    let drive = format!("file={},format=raw,if=virtio", disk.display());

    let begin = Instant::now();
    let console = place.cache.join("suite-console.log");
    let mut machine = Machine::start(&Boot {
        kernel: &kernel.image,
        initrd: &initrd,
        devices: &["-drive".to_owned(), drive],
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
