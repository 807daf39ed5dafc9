//! A user namespace for a container: root inside is nobody in particular outside.
//!
//! Every app has a range of 65,536 ids of its own (see `ids`), and every container a namespace of its own that
//! maps them. Nothing on disk is changed for it: layers, volumes and bind mounts are mounted with their ids mapped
//! (mount_setattr(2), MOUNT_ATTR_IDMAP), so that what is uid 1000 on disk is uid 1000 inside, and volumes are the same
//! with and without.
//!
//! libcontainer is given the namespace to join instead of mappings to make one: mounts need it before there is a
//! container, and with mappings it would ask systemd for the cgroup.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd};

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;

/// How many ids an app has.
pub(crate) const IDS: u32 = 1 << 16;

/// A user namespace without processes.
#[derive(Debug)]
pub(crate) struct UserNamespace {
    base: u32,
    file: File,
}

impl UserNamespace {
    /// Makes a namespace whose ids 0 to 65,535 are `base` and the ones after it. Only for a process with one thread.
    pub(crate) fn create(base: u32) -> io::Result<Self> {
        Self::with_map(base, &format!("0 {base} {IDS}\n"))
    }

    fn with_map(base: u32, map: &str) -> io::Result<Self> {
        let child = hold()?;
        let open = || {
            fs::write(format!("/proc/{child}/uid_map"), map)?;
            fs::write(format!("/proc/{child}/gid_map"), map)?;
            File::open(format!("/proc/{child}/ns/user"))
        };
        let file = open();
        let _ = kill(child, Signal::SIGKILL);
        let _ = waitpid(child, None);
        Ok(Self { base, file: file? })
    }

    /// Makes a namespace in which every id is itself, and nobody has rights over anything outside of it. Only for a process
    /// with one thread.
    pub(crate) fn identity() -> io::Result<Self> {
        Self::with_map(0, "0 0 4294967295\n")
    }

    /// What id 0 inside is outside.
    pub(crate) const fn base(&self) -> u32 {
        self.base
    }

    /// Where this process and its forks find it.
    pub(crate) fn path(&self) -> String {
        format!("/proc/self/fd/{}", self.file.as_raw_fd())
    }
}

impl AsFd for UserNamespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Forks a process into a new user namespace, which does nothing there until it is killed.
fn hold() -> io::Result<Pid> {
    let parent = libc::c_long::from(std::process::id().cast_signed());
    let flags = libc::CLONE_NEWUSER | libc::SIGCHLD;
    #[expect(unsafe_code, reason = "clone(2) without a stack, as fork(2)")]
    // SAFETY: this process has one thread, and the child makes nothing but system calls that take numbers.
    let pid = unsafe {
        let pid = libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0);
        if pid == 0 {
            libc::syscall(
                libc::SYS_prctl,
                libc::PR_SET_PDEATHSIG,
                libc::SIGKILL,
                0,
                0,
                0,
            );
            // One that was gone before takes nobody along.
            if libc::syscall(libc::SYS_getppid) != parent {
                libc::syscall(libc::SYS_exit_group, 1);
            }
            loop {
                libc::syscall(libc::SYS_ppoll, 0, 0, 0, 0, 0);
            }
        }
        pid
    };
    if pid < 0 {
        return Err(io::Error::last_os_error());
    }
    i32::try_from(pid)
        .map(Pid::from_raw)
        .map_err(io::Error::other)
}

/// Whether the kernel would let a user namespace mount a file system of its own of `kind` (`proc` or `sysfs`): only
/// when one is mounted on `point` that hides nothing (`mount_too_revealing` in the kernel's fs/namespace.c). Inside other
/// containers it often does.
pub(crate) fn is_bare(mountinfo: &str, kind: &str, point: &str) -> bool {
    // Directories that the kernel makes for nothing but to be mounted on.
    const EMPTY: [&str; 4] = [
        "/proc/sys/fs/binfmt_misc",
        "/proc/fs/nfsd",
        "/sys/fs/",
        "/sys/kernel/",
    ];
    let fields = |line: &str| -> Option<(String, String, String)> {
        let (own, device) = line.split_once(" - ")?;
        let mut own = own.split(' ').skip(3);
        let (root, point) = (own.next()?, own.next()?);
        Some((
            root.to_owned(),
            point.to_owned(),
            device.split(' ').next()?.to_owned(),
        ))
    };
    let mounts: Vec<_> = mountinfo.lines().filter_map(fields).collect();
    let whole = mounts
        .iter()
        .rfind(|(_, at, _)| at == point)
        .is_some_and(|(root, _, is)| root == "/" && is == kind);
    let below = |at: &str| {
        at.strip_prefix(point)
            .is_some_and(|rest| rest.starts_with('/'))
    };
    whole
        && mounts
            .iter()
            .filter(|(_, at, _)| below(at))
            .all(|(_, at, _)| EMPTY.iter().any(|empty| at.starts_with(empty)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proc_that_hides_something_is_not_bare() {
        let plain = "20 1 0:20 / /proc rw,relatime - proc proc rw\n\
                     21 20 0:21 / /proc/sys/fs/binfmt_misc rw - autofs systemd-1 rw\n\
                     22 1 0:22 / /sys rw - sysfs sysfs rw\n\
                     23 22 0:23 / /sys/fs/cgroup ro - tmpfs tmpfs rw";
        assert!(is_bare(plain, "proc", "/proc") && is_bare(plain, "sysfs", "/sys"));
        let masked = format!("{plain}\n24 20 0:24 /null /proc/kcore rw - tmpfs tmpfs rw");
        assert!(!is_bare(&masked, "proc", "/proc") && is_bare(&masked, "sysfs", "/sys"));
        let part = plain.replace("0:20 / /proc ", "0:20 /sys /proc ");
        assert!(!is_bare(&part, "proc", "/proc"));
        assert!(!is_bare("", "proc", "/proc"));
        let covered = format!("{plain}\n25 1 0:25 / /sys rw - tmpfs tmpfs rw");
        assert!(!is_bare(&covered, "sysfs", "/sys"));
    }
}
