//! `foreshore-agent unpack ROOT TARGET` unpacks one layer of an image, and `foreshore-agent inflate ROOT TARGET` inflates one,
//! confined.
//!
//! What comes in was made by somebody else, and nobody has checked it yet when it is unpacked as it comes. So this process
//! sees nothing but the image store, may write nothing but the one new directory in it, and has no network; its
//! user namespace gives it no rights over anything outside, so that it can make no device nodes; its PID namespace has no
//! process that it could signal; it may make about fifty system calls; memory, files and CPU time are bounded. What it
//! answers is believed no further than what it unpacked.
//!
//! It is three processes: the one that was started waits for the first of the PID namespace, and that for the one that
//! works. The kernel ends a namespace with its first process, and that ends with the one that was started, so nothing that
//! the last does to itself lets it live on.
//!
//! What inflates is confined in the same way, but for that it has no right at all, may write nothing, and may make no system
//! call that opens anything. What makes a layer of a delta (`foreshore-agent rebuild ROOT TARGET`) may besides open and read
//! what is in the image store.
//!
//! Where the kernel allows no user namespace it works without, with five capabilities; where it allows no PID namespace,
//! without the system calls that send signals. Both are said on standard error.

use std::ffi::OsString;
use std::io::{self, Read, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use foreshore_images::unpack::job::{Job, inflate, read_job, rebuild, serve};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::prctl::{set_dumpable, set_no_new_privs, set_pdeathsig};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{Signal, raise};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork};
use rustix::thread::{CapabilitySet, CapabilitySets};

use crate::runtime::process::Lifeline;
use crate::runtime::seccomp::Filter;
use crate::runtime::userns::UserNamespace;

/// The subcommand that unpacks.
pub const SUBCOMMAND: &str = "unpack";
/// The subcommand that inflates.
pub const INFLATE: &str = "inflate";
/// The subcommand that makes a layer of a delta and old layers.
pub const REBUILD: &str = "rebuild";

/// Address space, in bytes: the largest zstd window (128 MiB), the paths of a layer (64 MiB), and their like again.
const MEMORY_MAX: u64 = 768 << 20;
/// Seconds of CPU time: a layer of 16 GiB takes a slow device a quarter of this.
const CPU_MAX: u64 = 4 * 3600;
/// Seconds between the signal that says so (SIGXCPU) and the one that says nothing.
const CPU_GRACE: u64 = 60;
/// A descriptor for each of 512 nested directories, and 127 layers below.
const FILES_MAX: u64 = 1024;
/// The exit code of a panic, whether it unwinds or not: told apart from an abort, which is memory that is not there.
const PANICKED: i32 = 101;
/// The first process of a PID namespace cannot die by most signals: it ends with this and the signal's number instead.
const SIGNALLED: i32 = 128;

/// Runs [`SUBCOMMAND`] with the arguments after its name. Must be called before any thread exists.
#[must_use]
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let Some((root, target)) = places(arguments, SUBCOMMAND) else {
        return ExitCode::FAILURE;
    };
    confined(&root, &target, |job, stdin| {
        let mut stdout = io::stdout().lock();
        serve(job, stdin, &mut stdout)?;
        stdout.flush()
    })
}

/// Runs [`INFLATE`] with the arguments after its name. Must be called before any thread exists.
#[must_use]
pub fn run_inflate(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let Some((_, target)) = places(arguments, INFLATE) else {
        return ExitCode::FAILURE;
    };
    match prepare_inflating(&target) {
        Ok(()) => ExitCode::from(inflate(io::stdin().lock(), &mut io::stdout().lock())),
        Err(error) => {
            say(&format!("foreshore-agent inflate: {error}"));
            ExitCode::FAILURE
        }
    }
}

/// Runs [`REBUILD`] with the arguments after its name. Must be called before any thread exists.
#[must_use]
pub fn run_rebuild(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let Some((root, _)) = places(arguments, REBUILD) else {
        return ExitCode::FAILURE;
    };
    match prepare_rebuilding(&root) {
        Ok(()) => {
            let (stdin, mut stdout) = (io::stdin().lock(), io::stdout().lock());
            ExitCode::from(rebuild(Path::new("/"), stdin, &mut stdout))
        }
        Err(error) => {
            say(&format!("foreshore-agent rebuild: {error}"));
            ExitCode::FAILURE
        }
    }
}

/// On standard error. Where that cannot be written it is lost: a panic about it would be blamed on the layer.
fn say(text: &str) {
    let _lost = writeln!(io::stderr(), "{text}");
}

fn places(
    arguments: impl IntoIterator<Item = OsString>,
    subcommand: &str,
) -> Option<(PathBuf, PathBuf)> {
    let mut arguments = arguments.into_iter().map(PathBuf::from);
    let found = match (arguments.next(), arguments.next(), arguments.next()) {
        (Some(root), Some(target), None) => Some((root, target)),
        _ => None,
    };
    if found.is_none() {
        say(&format!(
            "usage: foreshore-agent {subcommand} ROOT TARGET < INPUT"
        ));
    }
    found
}

/// Confines this process to what unpacking into `target` takes, reads the job from standard input and does `work` with it;
/// what follows the job is still to be read. Paths of the job are as they are seen then. Must be called before any
/// thread exists.
#[must_use]
pub fn confined(
    root: &Path,
    target: &Path,
    work: impl FnOnce(&Job, &mut dyn Read) -> io::Result<()>,
) -> ExitCode {
    match prepare(root, target).and_then(|(job, mut stdin)| work(&job, &mut stdin)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&format!("foreshore-agent unpack: {error}"));
            ExitCode::FAILURE
        }
    }
}

fn prepare(root: &Path, target: &Path) -> io::Result<(Job, io::StdinLock<'static>)> {
    let apart = Apart::new()?;
    let mut stdin = io::stdin().lock();
    let mut job = read_job(&mut stdin)?;
    job.target = inside(root, target)?;
    for lower in &mut job.lowers {
        lower.path = inside(root, &lower.path)?;
    }
    limit(job.budget.bytes)?;
    confine(root, Some(target))?;
    let own = CapabilitySet::CHOWN
        | CapabilitySet::DAC_OVERRIDE
        | CapabilitySet::FOWNER
        | CapabilitySet::FSETID
        | CapabilitySet::SETFCAP;
    // Whiteouts are character devices.
    apart.drop_rights(own, CapabilitySet::MKNOD)?;
    filter(apart.alone).install()?;
    Ok((job, stdin))
}

fn prepare_inflating(target: &Path) -> io::Result<()> {
    let apart = Apart::new()?;
    limit(0)?;
    // The directory that is to be filled is not for it, and is still next to empty: all that it could see.
    confine(target, None)?;
    apart.drop_rights(CapabilitySet::empty(), CapabilitySet::empty())?;
    inflate_filter(apart.alone).install()
}

fn prepare_rebuilding(root: &Path) -> io::Result<()> {
    let apart = Apart::new()?;
    limit(0)?;
    confine(root, None)?;
    // Files of images belong to anybody and may be readable by nobody.
    apart.drop_rights(CapabilitySet::DAC_READ_SEARCH, CapabilitySet::empty())?;
    rebuild_filter(apart.alone).install()
}

/// This process, away from all others.
struct Apart {
    namespace: io::Result<UserNamespace>,
    /// In a PID namespace of its own.
    alone: bool,
}

impl Apart {
    fn new() -> io::Result<Self> {
        // It works for whoever started it and must not outlive that; and nobody looks into its memory.
        set_pdeathsig(Signal::SIGKILL)?;
        set_dumpable(true)?;
        // Its files under /proc belong to root, who writes the namespace's maps; and /proc shows the processes out here.
        let namespace = UserNamespace::identity();
        let alone = leave_processes()?;
        std::panic::set_hook(Box::new(give_up));
        Ok(Self { namespace, alone })
    }

    /// Keeps these rights, and those of the second kind only where there is no user namespace.
    fn drop_rights(&self, own: CapabilitySet, outside: CapabilitySet) -> io::Result<()> {
        let mut kept = own;
        match &self.namespace {
            Ok(namespace) => setns(namespace, CloneFlags::CLONE_NEWUSER)?,
            Err(error) => {
                say(&format!(
                    "foreshore-agent unpack: no user namespace ({error}); going on without"
                ));
                kept |= outside;
            }
        }
        set_dumpable(false)?;
        let sets = CapabilitySets {
            effective: kept,
            permitted: kept,
            inheritable: CapabilitySet::empty(),
        };
        rustix::thread::set_capabilities(None, sets)?;
        Ok(set_no_new_privs()?)
    }
}

#[expect(
    clippy::exit,
    reason = "an abort would look like memory that is not there"
)]
fn give_up(panic: &std::panic::PanicHookInfo<'_>) {
    say(&format!("foreshore-agent unpack: {panic}"));
    std::process::exit(PANICKED);
}

/// Goes on in a PID namespace of its own, as its second process; whether there is one. This process and the namespace's
/// first stay behind and end as that one does.
fn leave_processes() -> io::Result<bool> {
    // For children only, unshare(2).
    if let Err(error) = unshare(CloneFlags::CLONE_NEWPID) {
        say(&format!(
            "foreshore-agent unpack: no PID namespace ({error}); going on without"
        ));
        return Ok(false);
    }
    go_on_in_child()?;
    go_on_in_child()?;
    Ok(true)
}

fn go_on_in_child() -> io::Result<()> {
    let parent = Lifeline::of_this_process()?;
    #[expect(unsafe_code, reason = "fork(2)")]
    // SAFETY: this process has one thread, so the child's memory is whole.
    match unsafe { fork() }? {
        ForkResult::Parent { child } => end_as(child),
        ForkResult::Child => parent.hold(),
    }
}

/// Waits for a child and ends in the same way.
#[expect(clippy::exit, reason = "it is all that is left to do here")]
fn end_as(child: Pid) -> ! {
    let (code, signal) = loop {
        match waitpid(child, None) {
            Ok(WaitStatus::Exited(_, code)) => {
                break (code, Signal::try_from(code - SIGNALLED).ok());
            }
            Ok(WaitStatus::Signaled(_, signal, _)) => {
                break (SIGNALLED + signal as i32, Some(signal));
            }
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(_) => break (1, None),
        }
    };
    // What took the worker over must not say that this process is to stop, and then goes on with its output open.
    const STOPPING: [Signal; 4] = [
        Signal::SIGSTOP,
        Signal::SIGTSTP,
        Signal::SIGTTIN,
        Signal::SIGTTOU,
    ];
    if let Some(signal) = signal.filter(|signal| !STOPPING.contains(signal)) {
        let _only_a_core_dump_more = set_dumpable(false);
        // The first of a namespace lives on.
        let _it_may_not_end = raise(signal);
    }
    std::process::exit(code)
}

/// A path as it will be seen.
fn inside(root: &Path, path: &Path) -> io::Result<PathBuf> {
    let relative = path.strip_prefix(root).map_err(io::Error::other)?;
    Ok(Path::new("/").join(relative))
}

/// `file_bytes` is the most that a file may have.
fn limit(file_bytes: u64) -> io::Result<()> {
    for (resource, most, grace) in [
        (Resource::RLIMIT_AS, MEMORY_MAX, 0),
        (Resource::RLIMIT_CORE, 0, 0),
        (Resource::RLIMIT_CPU, CPU_MAX, CPU_GRACE),
        (Resource::RLIMIT_FSIZE, file_bytes, 0),
        (Resource::RLIMIT_NOFILE, FILES_MAX, 0),
    ] {
        let (_, hard) = getrlimit(resource)?;
        setrlimit(resource, most.min(hard), (most + grace).min(hard))?;
    }
    Ok(())
}

/// Leaves this process nothing but `root` to see and `target` to write, and no network.
fn confine(root: &Path, target: Option<&Path>) -> io::Result<()> {
    const NONE: Option<&str> = None;
    unshare(
        CloneFlags::CLONE_NEWNS
            | CloneFlags::CLONE_NEWNET
            | CloneFlags::CLONE_NEWIPC
            | CloneFlags::CLONE_NEWUTS,
    )?;
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE)?;
    mount(Some(root), root, NONE, MsFlags::MS_BIND, NONE)?;
    let bare = MsFlags::MS_REMOUNT
        | MsFlags::MS_BIND
        | MsFlags::MS_NOSUID
        | MsFlags::MS_NODEV
        | MsFlags::MS_NOEXEC;
    if let Some(target) = target {
        mount(Some(target), target, NONE, MsFlags::MS_BIND, NONE)?;
        mount(NONE, target, NONE, bare, NONE)?;
    }
    mount(NONE, root, NONE, bare | MsFlags::MS_RDONLY, NONE)?;
    nix::unistd::chdir(root)?;
    // On top of itself, so that no directory is needed for the old root, pivot_root(2).
    nix::unistd::pivot_root(".", ".")?;
    umount2(".", MntFlags::MNT_DETACH)?;
    nix::unistd::chdir("/")?;
    Ok(())
}

/// What unpacking takes; to signal itself only in a PID namespace where there is nobody else. Anything else answers EPERM.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
#[rustfmt::skip]
fn filter(alone: bool) -> Filter {
    let mut calls = vec![
        libc::SYS_brk, libc::SYS_clock_gettime, libc::SYS_close, libc::SYS_copy_file_range, libc::SYS_dup,
        libc::SYS_exit, libc::SYS_exit_group, libc::SYS_fchmod, libc::SYS_fchmodat, libc::SYS_fchown,
        libc::SYS_fchownat, libc::SYS_fcntl, libc::SYS_fgetxattr, libc::SYS_flistxattr, libc::SYS_fsetxattr,
        libc::SYS_fstat, libc::SYS_fstatfs, libc::SYS_ftruncate, libc::SYS_futex, libc::SYS_getdents64,
        libc::SYS_getpid, libc::SYS_getrandom, libc::SYS_gettid, libc::SYS_linkat, libc::SYS_lseek,
        libc::SYS_madvise, libc::SYS_mkdirat, libc::SYS_mknodat, libc::SYS_mmap, libc::SYS_mprotect,
        libc::SYS_mremap, libc::SYS_munmap, libc::SYS_newfstatat, libc::SYS_openat, libc::SYS_ppoll,
        libc::SYS_pread64, libc::SYS_read, libc::SYS_readlinkat, libc::SYS_readv, libc::SYS_renameat2,
        libc::SYS_rt_sigaction, libc::SYS_rt_sigprocmask, libc::SYS_rt_sigreturn, libc::SYS_sched_yield,
        libc::SYS_sendfile, libc::SYS_sigaltstack, libc::SYS_splice, libc::SYS_statfs, libc::SYS_statx,
        libc::SYS_symlinkat, libc::SYS_unlinkat, libc::SYS_utimensat, libc::SYS_write,
        libc::SYS_writev,
        // openat2, fchmodat2
        437, 452,
    ];
    if alone {
        calls.extend([libc::SYS_tgkill, libc::SYS_tkill]);
    }
    #[cfg(target_arch = "x86_64")]
    calls.extend([libc::SYS_open, libc::SYS_stat, libc::SYS_lstat]);
    Filter::only(&calls)
}

/// What inflating takes: memory, and reading and writing what is open. Anything else answers EPERM.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
fn inflate_filter(alone: bool) -> Filter {
    Filter::only(&inflate_calls(alone))
}

/// What making a layer of old files takes: besides, to open and read what can be seen.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
fn rebuild_filter(alone: bool) -> Filter {
    let mut calls = inflate_calls(alone);
    calls.extend([
        libc::SYS_close,
        libc::SYS_fcntl,
        libc::SYS_fstat,
        libc::SYS_newfstatat,
        libc::SYS_openat,
        libc::SYS_pread64,
        libc::SYS_statx,
        // openat2
        437,
    ]);
    #[cfg(target_arch = "x86_64")]
    calls.push(libc::SYS_open);
    Filter::only(&calls)
}

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
fn inflate_calls(alone: bool) -> Vec<libc::c_long> {
    let mut calls = vec![
        libc::SYS_brk,
        libc::SYS_clock_gettime,
        libc::SYS_exit,
        libc::SYS_exit_group,
        libc::SYS_futex,
        libc::SYS_getpid,
        libc::SYS_getrandom,
        libc::SYS_gettid,
        libc::SYS_madvise,
        libc::SYS_mmap,
        libc::SYS_mprotect,
        libc::SYS_mremap,
        libc::SYS_munmap,
        libc::SYS_read,
        libc::SYS_rt_sigaction,
        libc::SYS_rt_sigprocmask,
        libc::SYS_rt_sigreturn,
        libc::SYS_sigaltstack,
        libc::SYS_write,
        libc::SYS_writev,
    ];
    if alone {
        calls.extend([libc::SYS_tgkill, libc::SYS_tkill]);
    }
    calls
}

/// What containers may make.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn inflate_filter(_alone: bool) -> Filter {
    Filter::new()
}

/// What containers may make.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn rebuild_filter(_alone: bool) -> Filter {
    Filter::new()
}

/// What containers may make.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn filter(_alone: bool) -> Filter {
    Filter::new()
}
