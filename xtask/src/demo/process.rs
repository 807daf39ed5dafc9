//! Processes of the demo: named by pid and start time, so that a recycled pid is never taken for one.

use std::fs::{self, File, OpenOptions};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Context as _;

/// One process in the whole life of this boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Process {
    pub(crate) pid: i32,
    /// Clock ticks since boot (proc_pid_stat(5), field 22).
    pub(crate) start: u64,
}

impl Process {
    /// The process that has this pid now; `None` when there is none, or only a zombie.
    pub(crate) fn of(pid: i32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let fields: Vec<&str> = stat.rsplit_once(") ")?.1.split(' ').collect();
        let running = !matches!(*fields.first()?, "Z" | "X");
        running.then_some(Self {
            pid,
            start: fields.get(19)?.parse().ok()?,
        })
    }

    /// Whether it still runs.
    pub(crate) fn runs(self) -> bool {
        Self::of(self.pid) == Some(self)
    }

    /// Sends a signal, if it still runs.
    pub(crate) fn signal(self, signal: i32) {
        if self.pid > 1 && self.runs() {
            #[expect(
                unsafe_code,
                reason = "kill(2) has no safe wrapper in the standard library"
            )]
            // SAFETY: kill takes plain integers and touches no memory.
            let _gone_meanwhile = unsafe { libc::kill(self.pid, signal) };
        }
    }

    /// Waits until it is gone; false when it is still there after `timeout`.
    pub(crate) fn gone_within(self, timeout: Duration) -> bool {
        let begin = Instant::now();
        while self.runs() {
            if begin.elapsed() >= timeout {
                return false;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        true
    }
}

/// How a program is started, each time.
#[derive(Debug, Clone)]
pub(crate) struct Recipe {
    pub(crate) name: String,
    pub(crate) program: PathBuf,
    pub(crate) arguments: Vec<String>,
    pub(crate) environment: Vec<(String, String)>,
    pub(crate) log: PathBuf,
}

impl Recipe {
    /// Starts it with its output appended to its log, in a process group of its own: Ctrl-C reaches the
    /// demo, which then stops its programs in order.
    fn start(&self) -> anyhow::Result<Child> {
        let log = append(&self.log)?;
        let mut command = Command::new(&self.program);
        command
            .args(&self.arguments)
            .envs(self.environment.iter().cloned())
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .process_group(0);
        if std::env::var_os("RUST_LOG").is_none() {
            command.env("RUST_LOG", "info");
        }
        command
            .spawn()
            .with_context(|| format!("failed to start {}", self.program.display()))
    }
}

fn append(path: &Path) -> anyhow::Result<File> {
    OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)
        .with_context(|| format!("failed to open {}", path.display()))
}

/// A program that is started again when it ends, as systemd would with `Restart=always`.
#[derive(Debug)]
pub(crate) struct Supervised {
    shared: Arc<Mutex<Shared>>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    now: Option<Process>,
    stopping: bool,
}

impl Supervised {
    /// Starts it; `restart_after` is how long it stays away after it ended (`RestartSec=`), `None` for a
    /// program that must not end.
    pub(crate) fn start(recipe: Recipe, restart_after: Option<Duration>) -> anyhow::Result<Self> {
        let child = recipe.start()?;
        let shared = Arc::new(Mutex::new(Shared {
            now: running(&child),
            stopping: false,
        }));
        let theirs = Arc::clone(&shared);
        let thread = std::thread::spawn(move || supervise(&recipe, child, restart_after, &theirs));
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// Its process, if it runs at the moment.
    pub(crate) fn process(&self) -> Option<Process> {
        self.shared
            .lock()
            .ok()?
            .now
            .filter(|process| process.runs())
    }

    /// SIGTERM, after `grace` SIGKILL; waits for its end.
    pub(crate) fn stop(&mut self, grace: Duration) {
        let process = match self.shared.lock() {
            Ok(mut shared) => {
                shared.stopping = true;
                shared.now
            }
            Err(_) => None,
        };
        if let Some(process) = process {
            process.signal(libc::SIGTERM);
            if !process.gone_within(grace) {
                process.signal(libc::SIGKILL);
            }
        }
        if let Some(thread) = self.thread.take() {
            let _ended = thread.join();
        }
    }
}

fn running(child: &Child) -> Option<Process> {
    i32::try_from(child.id()).ok().and_then(Process::of)
}

fn supervise(
    recipe: &Recipe,
    mut child: Child,
    restart_after: Option<Duration>,
    shared: &Mutex<Shared>,
) {
    loop {
        let end = child.wait();
        let stopping = shared.lock().map_or(true, |mut shared| {
            shared.now = None;
            shared.stopping
        });
        let Some(pause) = restart_after.filter(|_| !stopping) else {
            return;
        };
        if let (Ok(mut log), Ok(end)) = (append(&recipe.log), end) {
            use std::io::Write as _;
            let how = end.signal().map_or_else(
                || end.to_string(),
                |signal| format!("ended by signal {signal}"),
            );
            let _only_for_people = writeln!(log, "--- {}: {how}; started again", recipe.name);
        }
        std::thread::sleep(pause);
        // Started under the lock: `stop` either sees the new process or prevents it.
        let Ok(mut shared) = shared.lock() else {
            return;
        };
        if shared.stopping {
            return;
        }
        match recipe.start() {
            Ok(started) => child = started,
            Err(_) => return,
        }
        shared.now = running(&child);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sleeper(log: &Path) -> Recipe {
        Recipe {
            name: "sleeper".to_owned(),
            program: "/bin/sleep".into(),
            arguments: vec!["1000".to_owned()],
            environment: Vec::new(),
            log: log.to_owned(),
        }
    }

    fn wait_until(mut holds: impl FnMut() -> bool) {
        let begin = Instant::now();
        while !holds() {
            assert!(
                begin.elapsed() < Duration::from_secs(10),
                "it does not come true"
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn a_killed_program_is_started_again_and_a_stopped_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let mut program = Supervised::start(sleeper(&log), Some(Duration::ZERO)).unwrap();
        let first = program.process().unwrap();
        first.signal(libc::SIGKILL);
        wait_until(|| program.process().is_some_and(|process| process != first));
        let second = program.process().unwrap();
        program.stop(Duration::from_secs(5));
        assert!(!second.runs() && program.process().is_none());
        assert!(
            fs::read_to_string(&log)
                .unwrap()
                .contains("ended by signal 9")
        );
    }

    #[test]
    fn a_pid_alone_is_not_a_process() {
        let own = i32::try_from(std::process::id()).unwrap();
        let real = Process::of(own).unwrap();
        assert!(real.runs());
        assert!(
            !Process {
                start: real.start + 1,
                ..real
            }
            .runs()
        );
    }
}
