//! [`Unpacker`]: layers are unpacked by another process, which may be confined.

use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant};

use crate::unpack::UnpackError;
use crate::unpack::job::{ANSWER_BYTES_MAX, Answer, Job, Outcome, set_opaque, write_job};

/// More notes than the unpacker of this crate makes.
const NOTES_MAX: usize = 32;
/// The exit code of a panic of Rust.
const PANICKED: i32 = 101;
/// Signals that a fault in the program raises: SIGILL, SIGTRAP, SIGFPE, SIGSEGV, SIGSYS. Not SIGBUS, which is a program that
/// cannot be read, and not SIGABRT, which is memory that is not there.
const FAULTS: [i32; 5] = [4, 5, 8, 11, 31];
const SIGABRT: i32 = 6;
const SIGKILL: i32 = 9;
/// Beyond `RLIMIT_CPU` and `RLIMIT_FSIZE`.
const LIMITS: [i32; 2] = [24, 25];

/// A program that does one [`Job`] and ends: it is given `arguments` and the store's root, reads
/// [the job](crate::unpack::job::read_job) and the blob from standard input, and
/// [answers](crate::unpack::job::serve) on standard output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unpacker {
    /// Its path.
    pub program: PathBuf,
    /// What stands before the store's root and the job's target.
    pub arguments: Vec<OsString>,
    /// How long it may take for one piece of the blob, or for the end of the layer, before it is killed as hung.
    pub patience: Duration,
}

/// Ends the process when it takes no bytes and gives no answer for long: hung, or taken over by what it unpacks.
struct Patience {
    /// Since when it has been waited for.
    waiting: Arc<Mutex<Option<Instant>>>,
    /// It was ended.
    lost: Arc<AtomicBool>,
    _until_dropped: mpsc::Sender<()>,
}

impl Patience {
    fn with(child: &Child, patience: Duration) -> Self {
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

    /// Counts the time that `wait` takes.
    fn while_it<T>(&self, wait: impl FnOnce() -> T) -> T {
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

impl Unpacker {
    pub(super) fn perform(&self, root: &Path, mut job: Job, mut blob: impl Read) -> Outcome {
        job.opaque_later = true;
        let failed = |act: &'static str, source: io::Error| UnpackError::Io {
            act: act.into(),
            path: self.program.display().to_string(),
            source,
        };
        let child = Command::new(&self.program)
            .args(&self.arguments)
            .arg(root)
            .arg(&job.target)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn();
        let mut running = Running(child.map_err(|source| failed("start", source))?);
        let mut input = running.0.stdin.take().expect("it is piped");
        let output = running.0.stdout.take().expect("it is piped");
        let patience = Patience::with(&running.0, self.patience);
        // It may have had enough before the end; what it says counts then.
        let fed = match patience.while_it(|| write_job(&job, &mut input)) {
            Ok(()) => feed(&mut blob, &mut input, &patience),
            Err(_) => Ok(()),
        };
        drop(input);
        if let Err(source) = fed {
            return Err(match source.raw_os_error() {
                Some(_) => failed("read a layer for", source),
                None => UnpackError::Archive(Box::new(source)),
            });
        }
        let answer = patience.while_it(|| read_answer(output));
        let status = running
            .0
            .wait()
            .map_err(|source| failed("wait for", source))?;
        match answer {
            Some(Answer::Done(unpacked, _))
                if unpacked.bytes > job.budget.bytes || unpacked.entries > job.budget.entries =>
            {
                let more = "says that it unpacked more than it may";
                Err(UnpackError::Crashed(more.to_owned()))
            }
            Some(Answer::Done(mut unpacked, diff_id)) => {
                unpacked.notes.truncate(NOTES_MAX);
                let opaque = unpacked.opaque.get_or_insert_default();
                set_opaque(&job.target, opaque)
                    .map_err(|source| failed("make directories opaque for", source))?;
                Ok((*unpacked, diff_id))
            }
            Some(Answer::Failed(failure)) => Err(failure.into()),
            None if patience.lost.load(Ordering::SeqCst) => Err(UnpackError::Ended(format!(
                "took no bytes and gave no answer for {} s and was ended",
                self.patience.as_secs()
            ))),
            None => Err(without_answer(status).unwrap_or_else(|| {
                let ended = format!("it ended with {status} and without an answer");
                failed("have a layer unpacked by", io::Error::other(ended))
            })),
        }
    }
}

/// What is to blame when a process ended so and said nothing that is an answer; `None` when that says nothing about the
/// layer, as when the confinement could not be made.
fn without_answer(status: ExitStatus) -> Option<UnpackError> {
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

/// Hands the blob on.
///
/// # Errors
/// Those of the blob; that nobody reads any more is none.
fn feed(blob: &mut dyn Read, input: &mut dyn Write, patience: &Patience) -> io::Result<()> {
    let mut buffer = vec![0; 64 << 10];
    loop {
        match blob.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => {
                if patience
                    .while_it(|| input.write_all(&buffer[..count]))
                    .is_err()
                {
                    return Ok(());
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

fn read_answer(output: ChildStdout) -> Option<Answer> {
    let mut text = Vec::new();
    output.take(ANSWER_BYTES_MAX).read_to_end(&mut text).ok()?;
    serde_json::from_slice(&text).ok()
}
