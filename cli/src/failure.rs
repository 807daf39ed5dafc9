//! [`Failure`]: why a command did not do what was asked, and the exit code that says so.

use std::fmt::{self, Display};
use std::io;
use std::process::ExitCode;

use crate::output::printable;

/// Exit codes. Part of the interface: scripts rely on them, `--help` lists them.
pub(crate) mod code {
    /// Done, or nothing to do.
    pub(crate) const OK: u8 = 0;
    /// The hub refused or failed, or this machine did.
    pub(crate) const FAILED: u8 = 1;
    /// Wrong usage or a wrong manifest; clap ends with the same code.
    pub(crate) const INPUT: u8 = 2;
    /// The answer is "no": a rollout ended badly, or `plan --exit-code` found changes.
    pub(crate) const NEGATIVE: u8 = 3;
    /// A rollout is paused and waits for an operator.
    pub(crate) const PAUSED: u8 = 4;
    /// The hub could not be reached, or did not answer in time.
    pub(crate) const UNREACHABLE: u8 = 5;
    /// `--timeout` passed before the end.
    pub(crate) const TIMEOUT: u8 = 6;
}

/// A failed command: one line of what, lines of what to do about it, and the exit code.
#[derive(Debug)]
pub(crate) struct Failure {
    exit: u8,
    /// The hub's stable error code, if the hub said it.
    problem: Option<String>,
    message: String,
    hint: Option<String>,
    quiet: bool,
}

/// What every command returns: its exit code, or why it failed.
pub(crate) type Outcome = Result<u8, Failure>;

impl Failure {
    /// Failed for a reason that is not the user's input.
    pub(crate) fn failed(message: impl Display) -> Self {
        Self::new(code::FAILED, message)
    }

    /// The input or usage is wrong.
    pub(crate) fn input(message: impl Display) -> Self {
        Self::new(code::INPUT, message)
    }

    /// With any exit code of [`code`].
    pub(crate) fn new(exit: u8, message: impl Display) -> Self {
        Self {
            exit,
            problem: None,
            message: message.to_string(),
            hint: None,
            quiet: false,
        }
    }

    /// Everything was printed already; only the exit code is left to give.
    pub(crate) const fn reported(exit: u8) -> Self {
        Self {
            exit,
            problem: None,
            message: String::new(),
            hint: None,
            quiet: true,
        }
    }

    /// Adds what to do about it.
    #[must_use]
    pub(crate) fn hint(mut self, hint: impl Display) -> Self {
        self.hint = Some(hint.to_string());
        self
    }

    /// Adds the hub's stable error code.
    #[must_use]
    pub(crate) fn problem(mut self, code: &str) -> Self {
        self.problem = Some(code.to_owned());
        self
    }

    /// Whether the hub could not be reached, so that trying again may help.
    pub(crate) const fn is_unreachable(&self) -> bool {
        self.exit == code::UNREACHABLE
    }

    /// Prints it to stderr; the exit code.
    pub(crate) fn report(&self) -> ExitCode {
        if !self.quiet {
            eprintln!("{self}");
        }
        ExitCode::from(self.exit)
    }
}

impl Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.problem {
            Some(code) => write!(
                f,
                "error[{}]: {}",
                printable(code),
                printable(&self.message)
            )?,
            None => write!(f, "error: {}", printable(&self.message))?,
        }
        match &self.hint {
            Some(hint) => write!(f, "\n  hint: {hint}"),
            None => Ok(()),
        }
    }
}

/// Writing to stdout failed. A closed pipe (`foreshore get devices | head -1`) is no failure.
impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::BrokenPipe {
            Self::reported(code::OK)
        } else {
            Self::failed(format_args!("failed to write to standard output: {error}"))
        }
    }
}

impl From<serde_json::Error> for Failure {
    fn from(error: serde_json::Error) -> Self {
        if error.is_io() {
            io::Error::from(error).into()
        } else {
            Self::failed(format_args!("failed to write JSON: {error}"))
        }
    }
}
