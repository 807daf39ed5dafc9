//! Processes that are surely the ones meant: pid and start time, then a pidfd.

use std::ffi::CStr;
use std::fs;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};

/// Which process: pids are used again, start times with the same pid are not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Identity {
    /// In the agent's PID namespace.
    pub(crate) pid: i32,
    /// Clock ticks since boot (proc_pid_stat(5), field 22).
    pub(crate) start_ticks: u64,
}

impl Identity {
    /// The process that has this pid now.
    pub(crate) fn of(pid: i32) -> io::Result<Self> {
        Ok(Self {
            pid,
            start_ticks: stat(pid)?.start_ticks,
        })
    }

    /// Whether it runs: a zombie does not.
    ///
    /// # Errors
    ///
    /// When that cannot be told (out of descriptors, say). That must not be taken for an end: whoever believes a
    /// container gone starts another.
    pub(crate) fn runs(&self) -> io::Result<bool> {
        let stat = absent_as_none(stat(self.pid))?;
        Ok(stat.is_some_and(|stat| stat.start_ticks == self.start_ticks && !stat.ended()))
    }

    /// A pidfd, if it has not been reaped yet. Checked after opening, so it is this process's for certain.
    ///
    /// # Errors
    ///
    /// When that cannot be told.
    pub(crate) fn open(&self) -> io::Result<Option<PidFd>> {
        let Some(fd) = absent_as_none(PidFd::open(self.pid))? else {
            return Ok(None);
        };
        let stat = absent_as_none(stat(self.pid))?;
        Ok(stat
            .is_some_and(|stat| stat.start_ticks == self.start_ticks)
            .then_some(fd))
    }

    /// When it started, milliseconds of `CLOCK_BOOTTIME`.
    pub(crate) fn started_ms(&self) -> u64 {
        // Linux has shown 100 ticks a second to programs on every architecture Foreshore runs on since 2.6.
        self.start_ticks.saturating_mul(1000 / TICKS_PER_SECOND)
    }

    /// Reaps it if it is a zombie child of this process; otherwise it is somebody else's to reap.
    pub(crate) fn reap(&self) {
        let Ok(stat) = stat(self.pid) else { return };
        if stat.start_ticks == self.start_ticks
            && stat.ended()
            && u32::try_from(stat.parent).is_ok_and(|parent| parent == std::process::id())
        {
            let _ = nix::sys::wait::waitpid(
                nix::unistd::Pid::from_raw(self.pid),
                Some(nix::sys::wait::WaitPidFlag::WNOHANG),
            );
        }
    }
}

/// A process that is gone is an answer; any other error is none.
fn absent_as_none<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        // ESRCH: it went between opening and reading its file. EINVAL: the pid of a thread that is no process.
        Err(error)
            if error.kind() == io::ErrorKind::NotFound
                || matches!(error.raw_os_error(), Some(libc::ESRCH | libc::EINVAL)) =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// The processes that libcontainer forked from `parent`, which leads a session of its own and had [`FORKING`] for a name,
/// and that are on their way to becoming a container's first process. When the parent is killed they go on for a moment.
///
/// # Errors
///
/// When that cannot be told.
pub(crate) fn half_made(parent: Identity) -> io::Result<Vec<PidFd>> {
    // The number of a session that still has members is given to nobody else; a stranger who has it proves that
    // none are left.
    if absent_as_none(stat(parent.pid))?.is_some_and(|stat| stat.start_ticks != parent.start_ticks)
    {
        return Ok(Vec::new());
    }
    let belongs = |stat: &Stat| {
        stat.session == parent.pid
            && stat.start_ticks >= parent.start_ticks
            && stat.command.starts_with(FORK_NAME)
    };
    let is_one = |pid| -> io::Result<bool> {
        Ok(absent_as_none(stat(pid))?.is_some_and(|stat| belongs(&stat)))
    };
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let Some(pid) = entry?
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        if is_one(pid)?
            && let Some(fd) = absent_as_none(PidFd::open(pid))?
            // Checked after opening, so it is this process's for certain.
            && is_one(pid)?
        {
            found.push(fd);
        }
    }
    Ok(found)
}

/// How libcontainer names the processes it forks.
const FORK_NAME: &str = "youki:[";

/// What the process that libcontainer works in is to be called before it forks: so a fork has such a name from its first
/// moment, not only once it gave itself one.
pub(crate) const FORKING: &CStr = c"youki:[start]";

/// A process that its forks are not to outlive.
#[derive(Debug)]
pub(crate) struct Lifeline(PidFd);

impl Lifeline {
    /// Of this process, which has one thread.
    pub(crate) fn of_this_process() -> io::Result<Self> {
        let own = nix::unistd::Pid::this().as_raw();
        Ok(Self(PidFd::open(own)?))
    }

    /// From here on this process, a child of that one, is killed when that ends. Credentials that change undo it, prctl(2),
    /// `PR_SET_PDEATHSIG`.
    ///
    /// # Errors
    ///
    /// When that has ended already: then this process must.
    pub(crate) fn hold(&self) -> io::Result<()> {
        set_pdeathsig(Signal::SIGKILL)?;
        // Not by the parent's number: seen from another PID namespace that is 0 at any time.
        let mut asked = [PollFd::new(self.0.fd().as_fd(), PollFlags::POLLIN)];
        match poll(&mut asked, PollTimeout::ZERO)? {
            0 => Ok(()),
            _ => Err(io::Error::other("the process that wanted this is gone")),
        }
    }
}

/// USER_HZ.
const TICKS_PER_SECOND: u64 = 100;

struct Stat {
    state: u8,
    parent: i32,
    session: i32,
    start_ticks: u64,
    command: String,
}

impl Stat {
    const fn ended(&self) -> bool {
        matches!(self.state, b'Z' | b'X' | b'x')
    }
}

fn stat(pid: i32) -> io::Result<Stat> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    parse_stat(&text).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "unreadable stat"))
}

fn parse_stat(text: &str) -> Option<Stat> {
    // The second field is the command in brackets and may hold anything, brackets too.
    let (front, rest) = text.rsplit_once(')')?;
    let command = front.split_once('(')?.1.to_owned();
    let mut fields = rest.split_ascii_whitespace();
    let state = *fields.next()?.as_bytes().first()?;
    let parent = fields.next()?.parse().ok()?;
    // State is field 3, the parent field 4, the session field 6, the start time field 22.
    let session = fields.nth(1)?.parse().ok()?;
    let start_ticks = fields.nth(15)?.parse().ok()?;
    Some(Stat {
        state,
        parent,
        session,
        start_ticks,
        command,
    })
}

/// A pidfd (pidfd_open(2)): readable once the process has ended.
#[derive(Debug)]
pub(crate) struct PidFd(OwnedFd);

impl PidFd {
    /// Opens whatever process has this pid; see [`Identity::open`] for the sure way.
    #[expect(
        unsafe_code,
        reason = "pidfd_open(2) has no wrapper in the libraries used"
    )]
    pub(crate) fn open(pid: i32) -> io::Result<Self> {
        // SAFETY: plain integers; the result is a new descriptor or an error.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        let fd = i32::try_from(fd).map_err(|_| io::Error::other("descriptor out of range"))?;
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel just gave us this descriptor (pidfds are close-on-exec).
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Sends a signal; a process that has ended already is fine.
    #[expect(
        unsafe_code,
        reason = "pidfd_send_signal(2) has no wrapper in the libraries used"
    )]
    pub(crate) fn signal(&self, signal: i32) -> io::Result<()> {
        // SAFETY: an owned descriptor, no siginfo, no flags.
        let result = unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.0.as_raw_fd(),
                signal,
                std::ptr::null::<libc::siginfo_t>(),
                0,
            )
        };
        match result {
            0 => Ok(()),
            _ => match io::Error::last_os_error() {
                error if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
                error => Err(error),
            },
        }
    }

    /// The descriptor, to wait on.
    pub(crate) fn into_fd(self) -> OwnedFd {
        self.0
    }

    /// The descriptor.
    pub(crate) const fn fd(&self) -> &OwnedFd {
        &self.0
    }
}

/// The kernel's id of this boot.
pub(crate) fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?
        .trim()
        .to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_with_brackets_and_blanks_is_read() {
        let text = "7 (a) Z 1 (b) S 42 7 8 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 987654 1 1 1";
        let stat = parse_stat(text).unwrap();
        assert_eq!(
            (stat.state, stat.parent, stat.session, stat.start_ticks),
            (b'S', 42, 8, 987_654)
        );
        assert_eq!(stat.command, "a) Z 1 (b");
        assert!(parse_stat("").is_none());
        assert!(parse_stat("7 (a) S 1 2").is_none());
    }

    #[test]
    fn this_process_runs_and_another_start_time_does_not() {
        let pid = i32::try_from(std::process::id()).unwrap();
        let me = Identity::of(pid).unwrap();
        assert!(me.runs().unwrap());
        assert!(me.open().unwrap().is_some());
        let other = Identity {
            start_ticks: me.start_ticks + 1,
            ..me
        };
        assert!(!other.runs().unwrap());
        assert!(other.open().unwrap().is_none());
    }

    #[test]
    fn forks_are_known_by_the_name_that_the_one_they_come_from_was_given() {
        assert!(FORKING.to_str().unwrap().starts_with(FORK_NAME));
        // TASK_COMM_LEN, prctl(2).
        assert!(FORKING.to_bytes_with_nul().len() <= 16);
    }

    #[test]
    fn being_out_of_descriptors_is_no_answer() {
        let failed = |errno| absent_as_none::<()>(Err(io::Error::from_raw_os_error(errno)));
        for errno in [libc::ENOENT, libc::ESRCH] {
            assert!(failed(errno).unwrap().is_none());
        }
        for errno in [
            libc::EMFILE,
            libc::ENFILE,
            libc::ENOMEM,
            libc::EIO,
            libc::EACCES,
        ] {
            assert!(failed(errno).is_err());
        }
    }

    #[test]
    #[expect(
        clippy::zombie_processes,
        reason = "the zombie is what is tested; it is reaped by pid"
    )]
    fn a_zombie_does_not_run_and_is_reaped() {
        let child = std::process::Command::new("/bin/true").spawn().unwrap();
        let identity = Identity::of(i32::try_from(child.id()).unwrap()).unwrap();
        let fd = identity.open().unwrap().unwrap();
        let mut poll = [libc::pollfd {
            fd: fd.fd().as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        }];
        #[expect(unsafe_code, reason = "poll(2) on one descriptor")]
        // SAFETY: one pollfd that lives through the call.
        let ready = unsafe { libc::poll(poll.as_mut_ptr(), 1, 10_000) };
        assert_eq!(ready, 1);
        assert!(!identity.runs().unwrap());
        identity.reap();
        assert!(identity.open().unwrap().is_none());
    }
}
