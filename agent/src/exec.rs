//! `foreshore-agent exec DIR TIMEOUT_MS COMMAND…`: runs one command inside the container of run directory `DIR`, as
//! the container's user, with its environment, working directory, capabilities, limits and seccomp filter.
//!
//! How it went is one line of JSON on standard output. The command's own output is read and dropped. After the
//! timeout its whole process group is killed; when this process ends before, the command is killed. Like `shim`, this must
//! be a process without threads.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use libcontainer::oci_spec::runtime::Spec;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, killpg};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{Gid, Pid, Uid, pipe2};

use crate::runtime::cgroup::Cgroups;
use crate::runtime::entry::{Entry, Unstarted, timeout};
use crate::runtime::process::PidFd;
use crate::runtime::request::{CONFIG, ExecReport, RECORD, REQUEST, Record, Request, read_json};
use crate::runtime::seal;
use crate::runtime::workload::REFUSED;

/// Runs the subcommand with the arguments after its name. Must be called before any thread exists.
#[must_use]
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let report = match parse(arguments) {
        Some((dir, timeout, command)) => {
            exec(&dir, timeout, &command).unwrap_or_else(ExecReport::Failed)
        }
        None => {
            ExecReport::Failed("usage: foreshore-agent exec DIR TIMEOUT_MS COMMAND...".to_owned())
        }
    };
    let mut out = io::stdout().lock();
    let written = serde_json::to_vec(&report)
        .map_err(io::Error::other)
        .and_then(|mut line| {
            line.push(b'\n');
            out.write_all(&line)?;
            out.flush()
        });
    if written.is_ok() && matches!(report, ExecReport::Exited(_)) {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn parse(
    arguments: impl IntoIterator<Item = OsString>,
) -> Option<(PathBuf, Duration, Vec<String>)> {
    let mut arguments = arguments.into_iter();
    let dir = PathBuf::from(arguments.next()?);
    let timeout = Duration::from_millis(arguments.next()?.to_str()?.parse().ok()?);
    let command = arguments
        .map(OsString::into_string)
        .collect::<Result<Vec<_>, _>>()
        .ok()?;
    (!command.is_empty()).then_some((dir, timeout, command))
}

fn exec(dir: &Path, timeout: Duration, command: &[String]) -> Result<ExecReport, String> {
    seal::ensure().map_err(|error| format!("failed to seal the own program: {error}"))?;
    let deadline = Instant::now() + timeout;
    let id = dir
        .file_name()
        .and_then(|name| name.to_str())
        .ok_or("not a container directory")?;
    let here = |error: &dyn std::fmt::Display| format!("{}: {error}", dir.display());
    let mut spec = Spec::load(dir.join(CONFIG)).map_err(|error| here(&error))?;
    let request: Request = read_json(&dir.join(REQUEST)).map_err(|error| here(&error))?;
    let record: Record = read_json(&dir.join(RECORD)).map_err(|error| here(&error))?;
    let container = record.container.and_then(|init| init.open().transpose());
    let container = container.ok_or("the container does not run")?;
    let container = container.map_err(|error| here(&error))?;
    let (parent, _) = request
        .cgroup
        .rsplit_once('/')
        .ok_or("no cgroup is known")?;
    let cgroups = Cgroups::find(parent).map_err(|error| here(&error))?;
    let process = spec.process_mut().as_mut();
    let process = process.ok_or("no process is configured")?;
    process.set_args(Some(command.to_vec()));
    let id_of = |id: u32| request.base.unwrap_or(0).saturating_add(id);
    let uid = Uid::from_raw(id_of(process.user().uid()));
    let gid = Gid::from_raw(id_of(process.user().gid()));
    let system = |error: nix::Error| error.to_string();
    // Not the device's /dev/null: its inode could be changed through the descriptor.
    let (stdin, _) = pipe2(OFlag::O_CLOEXEC).map_err(system)?;
    let (output, output_end) = pipe2(OFlag::O_CLOEXEC).map_err(system)?;
    // May be opened again as /dev/stdout.
    nix::unistd::fchown(output_end.as_raw_fd(), Some(uid), Some(gid)).map_err(system)?;
    let error_end = output_end.try_clone().map_err(|error| error.to_string())?;
    let entry = Entry {
        container: &container,
        spec: &spec,
        cgroups: &cgroups,
        id,
        stdio: [stdin, output_end, error_end],
    };
    let pid = match entry.start(deadline) {
        Ok(pid) => pid,
        Err(Unstarted::Expired) => return Ok(ExecReport::Timeout),
        Err(Unstarted::Failed(error)) => return Err(explain(&error)),
    };
    wait(pid, &output, deadline).map_err(|error| format!("failed to wait for the command: {error}"))
}

/// A refusal without what it was passed through.
fn explain(text: &str) -> String {
    let (_, refusal) = text.split_once(REFUSED).unwrap_or(("", text));
    refusal.to_owned()
}

fn wait(pid: Pid, output: &OwnedFd, deadline: Instant) -> io::Result<ExecReport> {
    let ended = PidFd::open(pid.as_raw())?;
    let mut open = true;
    let mut expired = false;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() && !expired {
            expired = true;
            // It leads its own session and group; what it started dies with it.
            let _ = killpg(pid, Signal::SIGKILL);
            let _ = ended.signal(libc::SIGKILL);
        }
        let timeout = if expired {
            PollTimeout::NONE
        } else {
            timeout(left)
        };
        let mut fds = vec![PollFd::new(ended.fd().as_fd(), PollFlags::POLLIN)];
        if open {
            fds.push(PollFd::new(output.as_fd(), PollFlags::POLLIN));
        }
        match poll(&mut fds, timeout) {
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        let happened = |index: usize| fds.get(index).is_some_and(|fd| fd.any().unwrap_or(true));
        let (done, readable) = (happened(0), happened(1));
        if readable && !done {
            let mut buffer = [0; 4096];
            open = (&File::from(output.try_clone()?)).read(&mut buffer)? > 0;
        }
        if done {
            let code = match waitpid(pid, None)? {
                WaitStatus::Exited(_, code) => code,
                WaitStatus::Signaled(_, signal, _) => 128 + signal as i32,
                _ => continue,
            };
            return Ok(if expired {
                ExecReport::Timeout
            } else {
                ExecReport::Exited(code)
            });
        }
    }
}
