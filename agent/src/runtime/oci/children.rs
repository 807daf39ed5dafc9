//! The agent's own program as a child: `shim` to start a container, `exec` to run a command in one.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use foreshore_killpoint as killpoint;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::net::unix::pipe::Receiver;

use super::watch;
use crate::runtime::ExecError;
use crate::runtime::process::PidFd;
use crate::runtime::request::{ExecReport, StartReport};
use crate::runtime::seal::Program;

/// More than any report; a child that says more is not listened to.
const MAX_REPORT: u64 = 64 << 10;

/// How much longer than its timeout an `exec` child may take: starting, joining the container, killing.
const EXEC_MARGIN: Duration = Duration::from_secs(10);

/// How long a child that has said its word may take to end.
const END_TIMEOUT: Duration = Duration::from_secs(5);

/// How a start went.
pub(super) enum Outcome {
    Started,
    Refused(String),
    /// It would run without a user namespace.
    Unmappable(String),
    Denied(String),
    Missing(String),
    IoLimit(String),
    Failed(String),
}

fn command_of(program: &Program, arguments: &[&std::ffi::OsStr]) -> Command {
    let mut command = program.command();
    command
        .args(arguments)
        // LISTEN_FDS and the like would be taken for the container's.
        .env_clear()
        .envs(killpoint::passed_on())
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    command
}

fn spawn(program: &Program, arguments: &[&std::ffi::OsStr]) -> io::Result<(Child, Receiver)> {
    let mut child = command_of(program, arguments).spawn()?;
    let stdout = child
        .stdout
        .take()
        .ok_or_else(|| io::Error::other("the child has no standard output"))?;
    let receiver = Receiver::from_owned_fd(OwnedFd::from(stdout)).inspect_err(|_| {
        let _ = child.kill();
        let _ = child.wait();
    })?;
    Ok((child, receiver))
}

/// The last line a child says before it closes its output, within `limit`.
async fn last_line<T: DeserializeOwned>(
    output: impl AsyncRead + Unpin,
    limit: Duration,
) -> Result<Option<T>, String> {
    let mut bytes = Vec::new();
    let mut bounded = output.take(MAX_REPORT);
    match tokio::time::timeout(limit, bounded.read_to_end(&mut bytes)).await {
        Err(_) => return Err(format!("it did not answer within {limit:?}")),
        Ok(Err(error)) => return Err(format!("its answer could not be read: {error}")),
        Ok(Ok(_)) => {}
    }
    let line = bytes
        .split(|byte| *byte == b'\n')
        .rfind(|line| !line.is_empty());
    line.map(|line| {
        serde_json::from_slice(line).map_err(|error| format!("its answer makes no sense: {error}"))
    })
    .transpose()
}

/// Waits for a child that is about to end; kills it if it does not.
async fn finish(mut child: Child) -> Option<std::process::ExitStatus> {
    let pid = i32::try_from(child.id()).ok()?;
    if let Ok(fd) = PidFd::open(pid)
        && !watch::ended(fd.fd(), END_TIMEOUT).await.unwrap_or(false)
    {
        let _ = child.kill();
        let _ = watch::ended(fd.fd(), END_TIMEOUT).await;
    }
    child.try_wait().ok().flatten()
}

/// Starts the container of run directory `dir`. When this says `Started`, the child is foreshore-shim and goes on.
pub(super) async fn start(program: &Program, dir: &Path, limit: Duration) -> Outcome {
    let (mut child, receiver) = match spawn(program, &["shim".as_ref(), dir.as_os_str()]) {
        Ok(spawned) => spawned,
        Err(error) => {
            return Outcome::Failed(format!(
                "failed to run {}: {error}",
                program.path().display()
            ));
        }
    };
    killpoint::reached("container", "spawned");
    let failure = match last_line(receiver, limit).await {
        Ok(Some(StartReport::Started)) => return Outcome::Started,
        Ok(Some(StartReport::Refused(refusal))) => {
            finish(child).await;
            return Outcome::Refused(refusal);
        }
        Ok(Some(StartReport::Unmappable(reason))) => {
            finish(child).await;
            return Outcome::Unmappable(reason);
        }
        Ok(Some(StartReport::Denied(message))) => {
            finish(child).await;
            return Outcome::Denied(message);
        }
        Ok(Some(StartReport::Missing(message))) => {
            finish(child).await;
            return Outcome::Missing(message);
        }
        Ok(Some(StartReport::IoLimit(message))) => {
            finish(child).await;
            return Outcome::IoLimit(message);
        }
        Ok(Some(StartReport::Failed(message))) => Some(message),
        Ok(None) => None,
        Err(message) => {
            let _ = child.kill();
            Some(message)
        }
    };
    let status = finish(child).await;
    Outcome::Failed(failure.unwrap_or_else(|| match status {
        Some(status) => format!("the starting process ended early ({status})"),
        None => "the starting process ended early".to_owned(),
    }))
}

/// Runs a command in the container of run directory `dir`.
pub(super) async fn exec(
    program: &Program,
    dir: &Path,
    command: &[String],
    timeout: Duration,
) -> Result<i32, ExecError> {
    let milliseconds = timeout.as_millis().to_string();
    let mut arguments: Vec<&std::ffi::OsStr> =
        vec!["exec".as_ref(), dir.as_os_str(), milliseconds.as_ref()];
    arguments.extend(command.iter().map(AsRef::<std::ffi::OsStr>::as_ref));
    let failed = |error: io::Error| {
        ExecError::Failed(format!(
            "failed to run {}: {error}",
            program.path().display()
        ))
    };
    // If this future is dropped, the child goes on: it kills the command when its time is up, which nobody else
    // would. tokio reaps it then.
    let mut child = tokio::process::Command::from(command_of(program, &arguments))
        .spawn()
        .map_err(failed)?;
    let stdout = child.stdout.take().expect("stdout is piped");
    let report = last_line(stdout, timeout.saturating_add(EXEC_MARGIN)).await;
    if report.is_err() {
        let _ = child.start_kill();
    }
    if tokio::time::timeout(END_TIMEOUT, child.wait())
        .await
        .is_err()
    {
        let _ = child.start_kill();
    }
    match report {
        Ok(Some(ExecReport::Exited(code))) => Ok(code),
        Ok(Some(ExecReport::Timeout)) => Err(ExecError::Timeout(timeout)),
        Ok(Some(ExecReport::Failed(message))) | Err(message) => Err(ExecError::Failed(message)),
        Ok(None) => Err(ExecError::Failed("its process ended early".to_owned())),
    }
}
