//! Programs under test as child processes, and waiting for conditions.

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

/// Asks `probe` until it answers `Ok`, at most `timeout`; then panics with `what` and the last answer.
pub fn wait_for<T, E: Debug>(
    what: &str,
    timeout: Duration,
    mut probe: impl FnMut() -> Result<T, E>,
) -> T {
    let begin = Instant::now();
    let mut pause = Duration::from_millis(10);
    loop {
        match probe() {
            Ok(value) => return value,
            Err(last) if begin.elapsed() >= timeout => {
                panic!("waited {timeout:?} for {what}; last seen: {last:?}")
            }
            Err(_) => {
                // The pause between two questions, not a wait for something to happen.
                std::thread::sleep(pause);
                pause = (pause * 2).min(Duration::from_millis(200));
            }
        }
    }
}

/// [`wait_for`] for a condition without a value.
pub fn wait_until(what: &str, timeout: Duration, mut holds: impl FnMut() -> bool) {
    wait_for(what, timeout, || {
        if holds() {
            Ok(())
        } else {
            Err("it does not hold")
        }
    });
}

/// The directory that holds the programs of this build, built if they are missing or stale.
///
/// # Panics
///
/// When they cannot be built.
#[must_use]
pub fn programs() -> &'static Path {
    static PROGRAMS: OnceLock<PathBuf> = OnceLock::new();
    PROGRAMS.get_or_init(|| {
        let exe = std::env::current_exe().expect("a running test has a path");
        // Tests run from target/<profile>/deps, programs from target/<profile>.
        let mut dir = exe
            .parent()
            .expect("a program is in a directory")
            .to_owned();
        if dir.ends_with("deps") {
            dir.pop();
        }
        let target = dir
            .parent()
            .expect("the profile directory is in the target directory");
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let mut command = Command::new(cargo);
        // What the outer cargo says about this package would make build scripts that look at it run again and again.
        for (name, _) in std::env::vars_os() {
            let name = name.to_string_lossy();
            if name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_") {
                command.env_remove(&*name);
            }
        }
        command.args(["build", "--quiet", "--bins"]);
        command.args([
            "-p",
            "foreshore-agent",
            "-p",
            "foreshore-hub",
            "-p",
            "foreshore",
        ]);
        if dir.ends_with("release") {
            command.arg("--release");
        }
        let status = command
            .arg("--target-dir")
            .arg(target)
            .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
            .status()
            .expect("cargo runs");
        assert!(status.success(), "the programs under test did not build");
        dir
    })
}

/// One child process with its output in a file. Killed by pid when dropped.
#[derive(Debug)]
pub struct Program {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Program {
    /// Starts `command`, its stdout and stderr appended to `log`.
    ///
    /// # Panics
    ///
    /// When it cannot be started; `package` names what to install.
    pub fn start(name: &str, command: &mut Command, log: &Path, package: &str) -> Self {
        let file = std::fs::File::options()
            .create(true)
            .append(true)
            .open(log)
            .expect("log file opens");
        let child = command
            .stdin(Stdio::null())
            .stdout(file.try_clone().expect("descriptors are left"))
            .stderr(file)
            .spawn()
            .unwrap_or_else(|error| {
                panic!(
                    "failed to start {name}: {error}; install {package}, or run cargo xtask test"
                )
            });
        Self {
            name: name.to_owned(),
            child,
            log: log.to_owned(),
        }
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.child
            .id()
            .try_into()
            .expect("process ids are positive")
    }

    /// Whether it still runs.
    pub fn runs(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// SIGKILL, and waits until it is gone.
    pub fn kill9(&mut self) {
        let _gone_already = self.child.kill();
        let _reaped = self.child.wait();
    }

    /// SIGTERM, and waits until it is gone.
    ///
    /// # Panics
    ///
    /// When it is still there after `timeout`.
    pub fn terminate(&mut self, timeout: Duration) {
        signal(self.pid(), libc::SIGTERM);
        let name = self.name.clone();
        wait_until(&format!("{name} to end after SIGTERM"), timeout, || {
            !self.runs()
        });
    }

    /// Everything it wrote so far.
    #[must_use]
    pub fn output(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// The last lines it wrote, for failure messages.
    #[must_use]
    pub fn tail(&self) -> String {
        let text = self.output();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(30)..].join("\n")
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        self.kill9();
        if std::thread::panicking() {
            eprintln!(
                "--- last lines of {} ({})\n{}",
                self.name,
                self.log.display(),
                self.tail()
            );
        }
    }
}

/// Sends a signal to one process by its id.
pub fn signal(pid: i32, signal: i32) {
    assert!(pid > 1, "process id {pid} is not one of ours");
    #[expect(
        unsafe_code,
        reason = "kill(2) has no safe wrapper in the standard library"
    )]
    // SAFETY: kill takes plain integers and touches no memory.
    let _maybe_gone = unsafe { libc::kill(pid, signal) };
}

/// A free TCP port on loopback. Another process may take it before it is used; the programs under test
/// bind port 0 themselves, only foreign ones need this. No port is given out twice: another test's program could not have
/// bound it yet.
///
/// # Panics
///
/// When loopback has none left.
#[must_use]
pub fn free_port() -> u16 {
    static GIVEN: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());
    loop {
        let listener =
            std::net::TcpListener::bind("127.0.0.1:0").expect("loopback has a free port");
        let address = listener
            .local_addr()
            .expect("a bound socket has an address");
        let mut given = GIVEN.lock().expect("nothing panics here");
        if given.insert(address.port()) {
            return address.port();
        }
    }
}

/// When a process started, in clock ticks since boot: with its id, its identity (proc_pid_stat(5), field 22).
#[must_use]
pub fn start_time(pid: i32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.split(' ').nth(19)?.parse().ok()
}

/// Whether a process runs, and runs another program than the process that started it.
#[must_use]
pub fn has_executed(pid: i32) -> bool {
    let program = |pid: i32| {
        let file = std::fs::metadata(format!("/proc/{pid}/exe")).ok()?;
        Some((file.dev(), file.ino()))
    };
    let parent = || {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        program(stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse().ok()?)
    };
    program(pid).is_some_and(|own| parent().is_some_and(|parent| parent != own))
}
