//! Real tries, each in a short-lived process of its own: `foreshore-agent doctor-try WHAT…`.
//!
//! In a process, because namespaces and filters cannot be taken off again, because a name look-up or a dying medium
//! may hang for minutes, and because the agent never forks with threads. The child prints one JSON object
//! a line, as it gets on; what it did not come to is known from the lines that lack.

mod child;
mod hub;
mod registry;
mod shim;
mod state;

use std::ffi::OsString;
use std::io::Read as _;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};

pub use self::child::run;
use super::facts::{Connect, Handshake, Namespace, RegistryAnswer, Space, Tried};
use crate::runtime::process::PidFd;

/// The hidden subcommand.
pub const SUBCOMMAND: &str = "doctor-try";

/// How patient glibc's resolver is (resolv.conf(5)): its own default may take minutes to give up.
const RESOLVER: &str = "timeout:3 attempts:2";

/// A child that prints more than this is not ours.
const OUTPUT_MAX: usize = 64 * 1024;

/// What a child found out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "said", rename_all = "kebab-case")]
pub(super) enum Said {
    /// The one thing that was tried; `why` when it failed.
    Tried { why: Option<String> },
    /// The state directory, or the nearest one above it.
    LookedAt { dir: String, space: Option<Space> },
    /// Who has its lock.
    Lock { lock: LockSaid },
    /// A file was written and synced in `ms`.
    Synced { why: Option<String>, ms: u64 },
    /// An overlay was mounted.
    Overlay { why: Option<String> },
    /// A mount got the ids of a user namespace.
    Idmap { why: Option<String> },
    /// A name was looked up.
    Addresses {
        found: Vec<String>,
        why: Option<String>,
    },
    /// A connection was made.
    Connect { how: Connect },
    /// TLS was spoken.
    Tls { how: Handshake },
    /// A registry was asked.
    Registry { answer: RegistryAnswer },
}

/// The lock of a state directory, as a child sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum LockSaid {
    Free,
    /// With the file's inode number.
    Held(u64),
    Unknown(String),
}

/// What to try.
#[derive(Debug, Clone, Copy)]
pub(super) enum Try<'a> {
    Namespace(Namespace),
    Seccomp,
    /// A program as limits containers to their devices on cgroup v2 is given to the kernel.
    DeviceFilter,
    /// The child becomes foreshore-shim, which says nothing and ends with 0.
    Shim,
    /// Of this state directory: space, sync, overlay, lock.
    State(&'a Path),
    /// Of the broker that this configuration names: name, connection, TLS.
    Hub(&'a Path),
    /// Of this configuration, this registry.
    Registry(&'a Path, &'a str),
}

impl Try<'_> {
    fn arguments(self) -> Vec<OsString> {
        match self {
            Self::Namespace(kind) => vec!["namespace".into(), kind.name().into()],
            Self::Seccomp => vec!["seccomp".into()],
            Self::DeviceFilter => vec!["device-filter".into()],
            Self::Shim => vec!["shim".into()],
            Self::State(dir) => vec!["state".into(), dir.into()],
            Self::Hub(config) => vec!["hub".into(), config.into()],
            Self::Registry(config, host) => vec!["registry".into(), config.into(), host.into()],
        }
    }

    /// How long it may take.
    const fn seconds(self) -> u64 {
        match self {
            Self::Namespace(_) | Self::Seccomp | Self::DeviceFilter | Self::Shim => 5,
            Self::State(_) => 15,
            // Some 12 s for the name (see `RESOLVER`), then 5 s each for the connection and for TLS.
            Self::Hub(_) => 24,
            Self::Registry(..) => 12,
        }
    }
}

/// A try under way.
#[derive(Debug)]
pub(super) struct Attempt {
    started: Result<(Child, ChildStdout), String>,
    until: Instant,
    seconds: u64,
    /// It cleans up after itself, so it is left to end by itself.
    tidies: bool,
}

/// What came of it.
#[derive(Debug)]
pub(super) struct Outcome {
    pub(super) said: Vec<Said>,
    /// Why there is no more of it.
    pub(super) end: End,
}

/// How a child ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum End {
    /// With a text for people where that was not with 0.
    Ended(Option<String>),
    /// Not within so many seconds.
    TimedOut(u64),
    NotStarted(String),
}

impl Attempt {
    /// Starts `program` with the hidden subcommand.
    pub(super) fn start(program: &Path, what: Try<'_>) -> Self {
        Self::start_for(program, what, what.seconds())
    }

    fn start_for(program: &Path, what: Try<'_>, seconds: u64) -> Self {
        let child = Command::new(program)
            .arg(SUBCOMMAND)
            .args(what.arguments())
            .env("RES_OPTIONS", RESOLVER)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn();
        Self {
            started: match child {
                Ok(mut child) => {
                    let output = child.stdout.take().expect("stdout is piped");
                    Ok((child, output))
                }
                Err(error) => Err(format!("{} cannot be started: {error}", program.display())),
            },
            until: Instant::now() + Duration::from_secs(seconds),
            seconds,
            tidies: matches!(what, Try::State(_)),
        }
    }

    /// Waits for its end, no longer than its time.
    pub(super) fn finish(self) -> Outcome {
        let (mut child, mut output) = match self.started {
            Ok(started) => started,
            Err(why) => {
                return Outcome {
                    said: Vec::new(),
                    end: End::NotStarted(why),
                };
            }
        };
        let mut text = Vec::new();
        let read = read_until(&mut output, &mut text, self.until);
        let ended = read.then(|| wait_until(&mut child, self.until)).flatten();
        let end = match ended {
            Some(status) => End::Ended((!status.success()).then(|| status.to_string())),
            None => {
                if !self.tidies {
                    // Not waited for: one that hangs in the kernel would take us along.
                    let _may_be_gone = child.kill();
                }
                End::TimedOut(self.seconds)
            }
        };
        let said = text
            .split(|byte| *byte == b'\n')
            .filter_map(|line| serde_json::from_slice(line).ok())
            .collect();
        Outcome { said, end }
    }
}

/// Reads to the end, or until `until`; whether the end was reached.
fn read_until(output: &mut ChildStdout, text: &mut Vec<u8>, until: Instant) -> bool {
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() || text.len() > OUTPUT_MAX {
            return false;
        }
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(
            &mut [PollFd::new(output.as_fd(), PollFlags::POLLIN)],
            timeout,
        ) {
            Ok(0) | Err(nix::Error::EINTR) => continue,
            Ok(_) => {}
            Err(_) => return false,
        }
        let mut buffer = [0; 4096];
        match output.read(&mut buffer) {
            Ok(0) => return true,
            Ok(count) => text.extend_from_slice(buffer.get(..count).unwrap_or_default()),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(_) => return false,
        }
    }
}

/// Waits for the end of a child whose output has ended, or until `until`.
fn wait_until(child: &mut Child, until: Instant) -> Option<ExitStatus> {
    let ended = i32::try_from(child.id()).map(PidFd::open);
    // Without pidfds (before Linux 5.3) there is only to wait.
    let Ok(Ok(ended)) = ended else {
        return child.wait().ok();
    };
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(
            &mut [PollFd::new(ended.fd().as_fd(), PollFlags::POLLIN)],
            timeout,
        ) {
            Err(nix::Error::EINTR) => {}
            _ => return child.try_wait().ok().flatten(),
        }
    }
}

impl Outcome {
    /// Whether a child that says nothing when it works has ended well.
    pub(super) fn ended_well(&self) -> Tried {
        match &self.end {
            End::Ended(None) if self.said.is_empty() => Tried::Works,
            End::Ended(Some(status)) if self.said.is_empty() => Tried::Fails(status.clone()),
            End::Ended(_) | End::TimedOut(_) | End::NotStarted(_) => self.tried(),
        }
    }

    /// The one thing that was tried.
    pub(super) fn tried(&self) -> Tried {
        self.part(|said| match said {
            Said::Tried { why } => Some(why.clone()),
            _ => None,
        })
    }

    /// One of several things that were tried.
    pub(super) fn part(&self, pick: impl Fn(&Said) -> Option<Option<String>>) -> Tried {
        match (self.said.iter().find_map(pick), &self.end) {
            (Some(None), _) => Tried::Works,
            (Some(Some(why)), _) => Tried::Fails(why),
            (None, End::TimedOut(seconds)) => Tried::TimedOut(*seconds),
            (None, End::NotStarted(why)) => Tried::Fails(why.clone()),
            (None, End::Ended(status)) => Tried::Fails(no_result(status.as_deref())),
        }
    }
}

/// A child that died.
pub(super) fn no_result(status: Option<&str>) -> String {
    match status {
        Some(status) => format!("the try ended without a result: {status}"),
        None => "the try ended without a result".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    /// What comes of a program in place of the child, within a second if it is one that hangs.
    fn outcome(script: &str) -> Outcome {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("child");
        std::fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        let what = Try::Namespace(Namespace::Uts);
        let seconds = if script.contains("exec ") { 1 } else { 30 };
        Attempt::start_for(&program, what, seconds).finish()
    }

    fn synced(outcome: &Outcome) -> Tried {
        outcome.part(|said| match said {
            Said::Synced { why, .. } => Some(why.clone()),
            _ => None,
        })
    }

    #[test]
    fn what_a_child_said_counts_and_what_it_did_not_come_to_is_known() {
        let begin = Instant::now();
        let hangs = outcome(r#"echo '{"said":"synced","why":null,"ms":3}'; exec sleep 60"#);
        assert!(begin.elapsed() < Duration::from_secs(10));
        assert_eq!(synced(&hangs), Tried::Works);
        assert_eq!(hangs.tried(), Tried::TimedOut(1));
        assert_eq!(hangs.ended_well(), Tried::TimedOut(1));

        let fails = outcome(r#"echo '{"said":"tried","why":"EPERM"}'"#);
        assert_eq!(fails.tried(), Tried::Fails("EPERM".to_owned()));
        assert_eq!(fails.ended_well(), Tried::Fails("EPERM".to_owned()));
        assert_eq!(outcome("exit 0").ended_well(), Tried::Works);
    }

    #[test]
    fn a_child_that_dies_talks_nonsense_or_does_not_start_has_failed() {
        for script in [
            "kill -9 $$",
            "exit 3",
            "echo nonsense; echo '{}'; printf '\\377'",
        ] {
            let outcome = outcome(script);
            assert!(matches!(outcome.tried(), Tried::Fails(_)), "{outcome:?}");
        }
        let died = outcome("kill -9 $$");
        assert!(matches!(died.ended_well(), Tried::Fails(why) if why.contains("signal: 9")));
        // More than any child says is read no further.
        let endless = outcome("exec cat /dev/zero");
        assert_eq!(endless.tried(), Tried::TimedOut(1));
        let missing = Attempt::start(Path::new("/nonexistent/agent"), Try::Seccomp).finish();
        assert!(matches!(missing.tried(), Tried::Fails(why) if why.contains("/nonexistent/agent")));
    }
}
