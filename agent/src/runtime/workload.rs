//! What runs in the container's first process, and in every command run inside, right before it becomes the
//! user's program: the checks and the seccomp filter that libcontainer leaves to us.

use std::ffi::CString;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use libcontainer::oci_spec::runtime::{Process, Spec};
use libcontainer::workload::{Executor, ExecutorError, ExecutorValidationError};
use nix::unistd::{AccessFlags, access, execv};

use super::seccomp::Filter;
use super::spec::Refusal;

/// Marks an error as a [`Refusal`] on its way through libcontainer, which passes errors on as text.
pub(crate) const REFUSED: &str = "refused: ";

/// Exit codes of a program that could not be executed or found, as in a shell.
const NOT_EXECUTABLE: i32 = 126;

/// Checks the program, installs the filter, executes.
#[derive(Debug, Clone)]
pub(crate) struct Workload {
    filter: Filter,
}

impl Workload {
    pub(crate) fn new() -> Self {
        Self {
            filter: Filter::new(),
        }
    }
}

impl Executor for Workload {
    /// Runs inside the container's namespaces as its user, before it is let go: a mistake is still an error
    /// of the start and not an exit code.
    fn validate(&self, spec: &Spec) -> Result<(), ExecutorValidationError> {
        let process = process(spec).ok_or_else(|| invalid("the configuration has no process"))?;
        find_program(process).map(drop).map_err(|refusal| {
            ExecutorValidationError::ArgValidationError(format!("{REFUSED}{refusal}"))
        })
    }

    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        let process = process(spec).ok_or(ExecutorError::InvalidArg)?;
        let program =
            find_program(process).map_err(|refusal| ExecutorError::Other(refusal.to_string()))?;
        let arguments: Vec<CString> = process
            .args()
            .iter()
            .flatten()
            .map(|argument| CString::new(argument.as_bytes()))
            .collect::<Result<_, _>>()
            .map_err(|_| ExecutorError::InvalidArg)?;
        let path = CString::new(program.as_os_str().as_encoded_bytes())
            .map_err(|_| ExecutorError::InvalidArg)?;
        restore_signals();
        // libcontainer does not look at the result of setting this; the kernel checks it for the filter unless
        // the process is privileged, and no unfiltered process may come out of here.
        if !nix::sys::prctl::get_no_new_privs().unwrap_or(false) {
            return Err(ExecutorError::Other("no_new_privs is not set".to_owned()));
        }
        if let Err(error) = self.filter.install() {
            return Err(ExecutorError::Other(format!(
                "failed to install the seccomp filter: {error}"
            )));
        }
        let Err(error) = execv(&path, &arguments);
        // The container has been reported as started, so its own log is the only place left to say it.
        let _ = writeln!(
            std::io::stderr(),
            "foreshore: failed to execute {}: {error}",
            program.display()
        );
        // The container's first process: there is nothing to return to.
        std::process::exit(NOT_EXECUTABLE)
    }
}

/// Gives every signal its default action and blocks none: this program ignores SIGPIPE, and what the agent was
/// started with is no business of the container.
fn restore_signals() {
    for signal in 1..=libc::SIGSYS {
        #[expect(unsafe_code, reason = "signal(2)")]
        // SAFETY: setting the default action; SIGKILL and SIGSTOP merely fail.
        unsafe {
            libc::signal(signal, libc::SIG_DFL);
        }
    }
    let _ = nix::sys::signal::SigSet::empty().thread_set_mask();
}

fn process(spec: &Spec) -> Option<&Process> {
    spec.process().as_ref()
}

fn invalid(text: &str) -> ExecutorValidationError {
    ExecutorValidationError::ArgValidationError(text.to_owned())
}

/// The program that the arguments name: as it is when it holds a slash, else the first one in PATH.
fn find_program(process: &Process) -> Result<PathBuf, Refusal> {
    let name = process
        .args()
        .as_ref()
        .and_then(|args| args.first())
        .ok_or(Refusal::NoCommand)?;
    let not_executable = || Refusal::NotExecutable(name.clone(), process.user().uid());
    if name.contains('/') {
        return match (Path::new(name).exists(), runs(Path::new(name))) {
            (_, true) => Ok(PathBuf::from(name)),
            (true, false) => Err(not_executable()),
            (false, false) => Err(Refusal::NoSuchCommand(name.clone())),
        };
    }
    let path = process
        .env()
        .iter()
        .flatten()
        .find_map(|entry| entry.strip_prefix("PATH="))
        .unwrap_or("");
    let mut seen = false;
    for dir in path.split(':').filter(|dir| !dir.is_empty()) {
        let candidate = Path::new(dir).join(name);
        if runs(&candidate) {
            return Ok(candidate);
        }
        seen |= candidate.exists();
    }
    Err(if seen {
        not_executable()
    } else {
        Refusal::NoSuchCommand(name.clone())
    })
}

/// Whether this process, already the container's user, may execute it.
fn runs(path: &Path) -> bool {
    path.is_file() && access(path, AccessFlags::X_OK).is_ok()
}
