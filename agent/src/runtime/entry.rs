//! Runs a command inside a running container: in its cgroups and namespaces, with its user, capabilities, limits,
//! environment and seccomp filter.
//!
//! libcontainer 0.7 can do that too, but leaves the container's user namespace out: the command would be the device's
//! root in all the other namespaces.
//!
//! ```text
//! foreshore-agent exec ── forks ──> joins cgroups and namespaces ── clones ──> the command
//!          └───────────────────────── its parent, who waits ──────────────────────┘
//! ```
//!
//! The process in the middle is there because a process does not enter a PID namespace itself, only its children do.
//!
//! Whoever waits knows when the time is up, so the command does not outlive it.

use std::collections::HashMap;
use std::convert::Infallible;
use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::time::{Duration, Instant};

use libcontainer::capabilities;
use libcontainer::oci_spec::runtime::{LinuxNamespaceType, Process, Spec};
use libcontainer::syscall::syscall::create_syscall;
use libcontainer::workload::Executor as _;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::{Mode, umask};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Gid, Pid, Uid, dup2, fork, pipe2, setsid};

use super::cgroup::Cgroups;
use super::process::{Lifeline, PidFd};
use super::workload::Workload;

/// What is entered.
#[derive(Debug)]
pub(crate) struct Entry<'a> {
    /// The container's first process.
    pub(crate) container: &'a PidFd,
    /// The container's configuration, with the command as its arguments.
    pub(crate) spec: &'a Spec,
    pub(crate) cgroups: &'a Cgroups,
    pub(crate) id: &'a str,
    /// Standard input, output and error.
    pub(crate) stdio: [OwnedFd; 3],
}

/// Why a command was not started.
#[derive(Debug)]
pub(crate) enum Unstarted {
    /// Its time was up before, as where the container is out of CPU time or memory.
    Expired,
    /// As text.
    Failed(String),
}

/// The two ways in which children speak: a number and a text.
const PID: &str = "pid ";
const ERROR: &str = "error ";
/// More than any message.
const MAX_MESSAGES: u64 = 64 << 10;

impl Entry<'_> {
    /// Starts the command; it is a child of this process, has been executed when this returns, and ends with this process.
    /// Only for a process with one thread.
    ///
    /// # Errors
    ///
    /// Why it was not started. What is left of the attempt ends with this process.
    pub(crate) fn start(self, deadline: Instant) -> Result<Pid, Unstarted> {
        let text = |error: nix::Error| Unstarted::Failed(error.to_string());
        // What runs in the container before the command does must be no business of the container's processes.
        nix::sys::prctl::set_dumpable(false).map_err(text)?;
        let (messages, end) = pipe2(OFlag::O_CLOEXEC).map_err(text)?;
        let parent =
            Lifeline::of_this_process().map_err(|error| Unstarted::Failed(error.to_string()))?;
        #[expect(unsafe_code, reason = "fork(2)")]
        // SAFETY: this process has one thread, so its child may do everything it could.
        match unsafe { fork() }.map_err(text)? {
            ForkResult::Child => {
                let mut end = File::from(end);
                if let Err(error) = self.join(&parent, &mut end) {
                    let _ = say(&mut end, ERROR, &error);
                }
                std::process::exit(0);
            }
            ForkResult::Parent { child } => {
                drop((end, self.stdio));
                let read = read_until(messages, deadline);
                if matches!(read, Ok(None)) {
                    kill(child, Signal::SIGKILL).map_err(text)?;
                }
                waitpid(child, None).map_err(text)?;
                match read.map_err(|error| Unstarted::Failed(error.to_string()))? {
                    Some(said) => outcome(&said).map_err(Unstarted::Failed),
                    None => Err(Unstarted::Expired),
                }
            }
        }
    }

    /// In the middle process: enters, and makes the command's process.
    fn join(self, parent: &Lifeline, messages: &mut File) -> Result<(), String> {
        self.cgroups
            .join(self.id)
            .map_err(|error| format!("failed to join the container's cgroups: {error}"))?;
        let process = self
            .spec
            .process()
            .as_ref()
            .ok_or("no process is configured")?;
        if let Some(score) = process.oom_score_adj() {
            fs::write("/proc/self/oom_score_adj", score.to_string())
                .map_err(|error| format!("failed to set the OOM score: {error}"))?;
        }
        setns(self.container.fd(), self.namespaces())
            .map_err(|error| format!("failed to join the container's namespaces: {error}"))?;
        let flags = libc::CLONE_PARENT | libc::SIGCHLD;
        #[expect(
            unsafe_code,
            reason = "clone(2) without a stack, as fork(2) with another parent"
        )]
        // SAFETY: this process has one thread, so its child may do everything it could.
        let pid = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
        match pid {
            0 => {
                let Err(error) = self.become_it(parent);
                let _ = say(messages, ERROR, &error);
                std::process::exit(1);
            }
            pid if pid < 0 => Err(io::Error::last_os_error().to_string()),
            pid => say(messages, PID, &pid.to_string()).map_err(|error| error.to_string()),
        }
    }

    fn namespaces(&self) -> CloneFlags {
        let linux = self.spec.linux().as_ref();
        let namespaces = linux.and_then(|linux| linux.namespaces().as_ref());
        let flags = namespaces.into_iter().flatten().map(|one| match one.typ() {
            LinuxNamespaceType::Mount => CloneFlags::CLONE_NEWNS,
            LinuxNamespaceType::Cgroup => CloneFlags::CLONE_NEWCGROUP,
            LinuxNamespaceType::Uts => CloneFlags::CLONE_NEWUTS,
            LinuxNamespaceType::Ipc => CloneFlags::CLONE_NEWIPC,
            LinuxNamespaceType::User => CloneFlags::CLONE_NEWUSER,
            LinuxNamespaceType::Pid => CloneFlags::CLONE_NEWPID,
            LinuxNamespaceType::Network => CloneFlags::CLONE_NEWNET,
            LinuxNamespaceType::Time => CloneFlags::empty(),
        });
        flags.collect()
    }

    /// In the command's process, in the order that libcontainer has for a container's first one.
    fn become_it(&self, parent: &Lifeline) -> Result<Infallible, String> {
        let process = self
            .spec
            .process()
            .as_ref()
            .ok_or("no process is configured")?;
        let text = |error: nix::Error| error.to_string();
        let system = create_syscall();
        setsid().map_err(text)?;
        for (fd, to) in self.stdio.iter().zip(0..) {
            dup2(fd.as_raw_fd(), to).map_err(text)?;
        }
        for limit in process.rlimits().iter().flatten() {
            let set = system.set_rlimit(limit);
            set.map_err(|error| format!("failed to set {}: {error}", limit.typ()))?;
        }
        let user = process.user();
        umask(Mode::from_bits_truncate(user.umask().unwrap_or(0o022)));
        nix::sys::prctl::set_no_new_privs().map_err(text)?;
        // Where it may look as root of the container first, as for the first process.
        let entered = std::env::set_current_dir(process.cwd());
        let groups: Vec<Gid> = user
            .additional_gids()
            .iter()
            .flatten()
            .map(|gid| Gid::from_raw(*gid))
            .collect();
        nix::unistd::setgroups(&groups).map_err(text)?;
        system
            .set_id(Uid::from_raw(user.uid()), Gid::from_raw(user.gid()))
            .map_err(|error| format!("failed to become user {}: {error}", user.uid()))?;
        let confined = capabilities::reset_effective(system.as_ref()).and_then(|()| {
            let wanted = process.capabilities().as_ref();
            wanted.map_or(Ok(()), |wanted| {
                capabilities::drop_privileges(wanted, system.as_ref())
            })
        });
        confined.map_err(|error| format!("failed to drop capabilities: {error}"))?;
        entered
            .or_else(|_| std::env::set_current_dir(process.cwd()))
            .and_then(|()| std::env::current_dir())
            .map_err(|error| format!("failed to change to {}: {error}", process.cwd().display()))
            .and_then(|dir| {
                // What the kernel says of a directory outside of the root.
                let inside = dir.is_absolute();
                inside
                    .then_some(())
                    .ok_or_else(|| "the working directory is outside".to_owned())
            })?;
        let workload = Workload::new();
        let environment = environment(process);
        workload
            .validate(self.spec)
            .map_err(|error| error.to_string())?;
        workload
            .setup_envs(environment)
            .map_err(|error| error.to_string())?;
        // Nobody else knows when its time is up. Now that it has its credentials, which do not grow by what it executes.
        parent.hold().map_err(|error| error.to_string())?;
        // Everything above standard error goes with the execution.
        system.close_range(0).map_err(|error| error.to_string())?;
        match workload.exec(self.spec) {
            Err(error) => Err(error.to_string()),
            Ok(()) => Err("it was not executed".to_owned()),
        }
    }
}

fn environment(process: &Process) -> HashMap<String, String> {
    let entries = process.env().iter().flatten();
    entries
        .filter_map(|entry| entry.split_once('='))
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect()
}

/// Writes a line in one piece: two processes speak at a time, and pipe(7) keeps apart only what comes in one write.
fn say(messages: &mut File, kind: &str, what: &str) -> io::Result<()> {
    messages.write_all(format!("{kind}{what}\n").as_bytes())
}

/// Reads until all ends are closed; `None` when they are not in time.
fn read_until(messages: OwnedFd, deadline: Instant) -> io::Result<Option<String>> {
    let mut messages = File::from(messages).take(MAX_MESSAGES);
    let mut said = Vec::new();
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let mut asked = [PollFd::new(messages.get_ref().as_fd(), PollFlags::POLLIN)];
        match poll(&mut asked, timeout(left)) {
            Ok(0) if left.is_zero() => return Ok(None),
            Ok(0) | Err(nix::Error::EINTR) => continue,
            Ok(_) => {}
            Err(error) => return Err(error.into()),
        }
        let mut buffer = [0; 4096];
        match messages.read(&mut buffer)? {
            0 => return Ok(Some(String::from_utf8_lossy(&said).into_owned())),
            count => said.extend_from_slice(&buffer[..count]),
        }
    }
}

/// Rounded up, so that the deadline has passed when it is over.
pub(crate) fn timeout(left: Duration) -> PollTimeout {
    let milliseconds = match left.is_zero() {
        true => 0,
        false => left.as_millis().saturating_add(1),
    };
    i32::try_from(milliseconds).map_or(PollTimeout::MAX, |ms| {
        PollTimeout::try_from(ms).unwrap_or(PollTimeout::MAX)
    })
}

fn outcome(said: &str) -> Result<Pid, String> {
    let line = |start: &str| said.lines().find_map(|line| line.strip_prefix(start));
    let pid = line(PID)
        .and_then(|pid| pid.parse().ok())
        .map(Pid::from_raw);
    match (line(ERROR), pid) {
        (Some(error), pid) => {
            if let Some(pid) = pid {
                let _ = waitpid(pid, None);
            }
            Err(error.to_owned())
        }
        (None, Some(pid)) => Ok(pid),
        (None, None) => Err("its process ended early".to_owned()),
    }
}
