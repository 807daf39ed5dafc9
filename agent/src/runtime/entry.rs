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

use std::collections::HashMap;
use std::convert::Infallible;
use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsRawFd as _, OwnedFd};

use libcontainer::capabilities;
use libcontainer::oci_spec::runtime::{LinuxNamespaceType, Process, Spec};
use libcontainer::syscall::syscall::create_syscall;
use libcontainer::workload::Executor as _;
use nix::fcntl::OFlag;
use nix::sched::{CloneFlags, setns};
use nix::sys::stat::{Mode, umask};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Gid, Pid, Uid, dup2, fork, pipe2, setsid};

use super::cgroup::Cgroups;
use super::process::PidFd;
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

/// The two ways in which children speak: a number and a text.
const PID: &str = "pid ";
const ERROR: &str = "error ";
/// More than any message.
const MAX_MESSAGES: u64 = 64 << 10;

impl Entry<'_> {
    /// Starts the command; it is a child of this process and has been executed when this returns. Only for a process with
    /// one thread.
    ///
    /// # Errors
    ///
    /// What went wrong, as text; then nothing of the command runs.
    pub(crate) fn start(self) -> Result<Pid, String> {
        let text = |error: nix::Error| error.to_string();
        // What runs in the container before the command does must be no business of the container's processes.
        nix::sys::prctl::set_dumpable(false).map_err(text)?;
        let (messages, end) = pipe2(OFlag::O_CLOEXEC).map_err(text)?;
        #[expect(unsafe_code, reason = "fork(2)")]
        // SAFETY: this process has one thread, so its child may do everything it could.
        match unsafe { fork() }.map_err(text)? {
            ForkResult::Child => {
                let mut end = File::from(end);
                if let Err(error) = self.join(&mut end) {
                    let _ = say(&mut end, ERROR, &error);
                }
                std::process::exit(0);
            }
            ForkResult::Parent { child } => {
                drop((end, self.stdio));
                let mut said = String::new();
                let read = File::from(messages)
                    .take(MAX_MESSAGES)
                    .read_to_string(&mut said);
                waitpid(child, None).map_err(text)?;
                read.map_err(|error| error.to_string())?;
                outcome(&said)
            }
        }
    }

    /// In the middle process: enters, and makes the command's process.
    fn join(self, messages: &mut File) -> Result<(), String> {
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
                let Err(error) = self.become_it();
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
    fn become_it(&self) -> Result<Infallible, String> {
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
