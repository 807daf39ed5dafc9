//! [`Worker`]: a process that does part of the unpacking, how long it is waited for, and what its end says.

use std::io;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant};

use crate::unpack::UnpackError;

/// The exit code of a panic of Rust.
const PANICKED: i32 = 101;
/// Signals that a fault in the program raises: SIGILL, SIGTRAP, SIGFPE, SIGSEGV, SIGSYS. Not SIGBUS, which is a program that
/// cannot be read, and not SIGABRT, which is memory that is not there.
const FAULTS: [i32; 5] = [4, 5, 8, 11, 31];
const SIGABRT: i32 = 6;
const SIGKILL: i32 = 9;
/// Beyond `RLIMIT_CPU` and `RLIMIT_FSIZE`.
const LIMITS: [i32; 2] = [24, 25];

/// A process under way. Dropping it ends it.
pub(super) struct Worker {
    running: Running,
    /// Its standard input; dropping it is the end of what it reads.
    pub(super) input: Option<ChildStdin>,
    /// Its standard output.
    pub(super) output: Option<ChildStdout>,
    pub(super) patience: Patience,
}

impl Worker {
    pub(super) fn start(mut command: Command, patience: Duration) -> io::Result<Self> {
        let child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut running = Running(child);
        Ok(Self {
            input: running.0.stdin.take(),
            output: running.0.stdout.take(),
            patience: Patience::with(&running.0, patience),
            running,
        })
    }

    pub(super) fn kill(&mut self) {
        let _it_may_have_ended = self.running.0.kill();
    }

    /// Waits for its end, with patience.
    pub(super) fn wait(&mut self) -> io::Result<ExitStatus> {
        let child = &mut self.running.0;
        self.patience.while_it(|| child.wait())
    }
}

/// Ends the process when it takes no bytes and gives no answer for long: hung, or taken over by what it unpacks.
pub(super) struct Patience {
    /// Since when it has been waited for.
    waiting: Arc<Mutex<Option<Instant>>>,
    /// It was ended.
    lost: Arc<AtomicBool>,
    _until_dropped: mpsc::Sender<()>,
}

impl Patience {
    pub(super) fn with(child: &Child, patience: Duration) -> Self {
        let (until_dropped, dropped) = mpsc::channel();
        let waiting = Arc::new(Mutex::new(None));
        let watched = Arc::clone(&waiting);
        let lost = Arc::new(AtomicBool::new(false));
        let ended = Arc::clone(&lost);
        // Not by its number: that may be another's by then.
        let process = rustix::process::pidfd_open(
            rustix::process::Pid::from_child(child),
            rustix::process::PidfdFlags::empty(),
        );
        std::thread::spawn(move || {
            while dropped.recv_timeout(patience / 8) == Err(mpsc::RecvTimeoutError::Timeout) {
                let since: Option<Instant> = *lock(&watched);
                if since.is_some_and(|since| since.elapsed() > patience)
                    && let Ok(process) = &process
                {
                    ended.store(true, Ordering::SeqCst);
                    let _it_may_have_ended =
                        rustix::process::pidfd_send_signal(process, rustix::process::Signal::KILL);
                }
            }
        });
        Self {
            waiting,
            lost,
            _until_dropped: until_dropped,
        }
    }

    /// Whether it was ended.
    pub(super) fn is_lost(&self) -> bool {
        self.lost.load(Ordering::SeqCst)
    }

    /// Counts the time that `wait` takes.
    pub(super) fn while_it<T>(&self, wait: impl FnOnce() -> T) -> T {
        *lock(&self.waiting) = Some(Instant::now());
        let done = wait();
        *lock(&self.waiting) = None;
        done
    }
}

fn lock(waiting: &Mutex<Option<Instant>>) -> MutexGuard<'_, Option<Instant>> {
    waiting.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Ends the process if nobody has waited for it.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _it_may_have_ended = self.0.kill();
        let _reaped = self.0.wait();
    }
}

/// What is to blame when a process ended so and said nothing that is an answer; `None` when that says nothing about the
/// layer, as when the confinement could not be made.
pub(super) fn blame(status: ExitStatus) -> Option<UnpackError> {
    let crashed = |how: String| Some(UnpackError::Crashed(how));
    let ended = |how: String| Some(UnpackError::Ended(how));
    match (status.signal(), status.code()) {
        (Some(signal), _) if FAULTS.contains(&signal) => {
            crashed(format!("crashed on it ({status})"))
        }
        (Some(signal), _) if LIMITS.contains(&signal) => {
            crashed(format!("took more than any layer needs ({status})"))
        }
        (Some(SIGABRT), _) => ended(format!(
            "could not have the memory that it wanted ({status})"
        )),
        (Some(SIGKILL), _) => ended("was killed, as when the device runs out of memory".to_owned()),
        (Some(_), _) => ended(format!("was ended ({status})")),
        (None, Some(PANICKED)) => crashed(format!("gave up on it ({status})")),
        (None, Some(0)) => crashed("ended without an answer".to_owned()),
        (None, _) => None,
    }
}
