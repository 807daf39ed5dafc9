//! `foreshore-agent unpack ROOT TARGET`: unpacks one layer of an image, confined.
//!
//! What comes in was made by somebody else, and nobody has checked it yet when it is unpacked as it comes. So this process
//! sees nothing but the image store, may write nothing but the one new directory in it, and has no network; its
//! user namespace gives it no rights over anything outside, so that it can make no device nodes; it may make about fifty
//! system calls; memory, files and CPU time are bounded. What it answers is believed no further than what it unpacked.
//!
//! Where the kernel allows no user namespace it works without, with five capabilities.

use std::ffi::OsString;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use foreshore_images::unpack::job::{Job, read_job, serve};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use rustix::thread::{CapabilitySet, CapabilitySets};

use crate::runtime::seccomp::Filter;
use crate::runtime::userns::UserNamespace;

/// The subcommand.
pub const SUBCOMMAND: &str = "unpack";

/// Address space, in bytes: the largest zstd window (128 MiB), the paths of a layer (64 MiB), and their like again.
const MEMORY_MAX: u64 = 768 << 20;
/// Seconds of CPU time: a layer of 16 GiB takes a slow device a quarter of this.
const CPU_MAX: u64 = 4 * 3600;
/// A descriptor for each of 512 nested directories, and 127 layers below.
const FILES_MAX: u64 = 1024;

/// Runs the subcommand with the arguments after its name. Must be called before any thread exists.
#[must_use]
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let mut arguments = arguments.into_iter().map(PathBuf::from);
    let (Some(root), Some(target), None) = (arguments.next(), arguments.next(), arguments.next())
    else {
        eprintln!("usage: foreshore-agent unpack ROOT TARGET < JOB");
        return ExitCode::FAILURE;
    };
    match work(&root, &target) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("foreshore-agent unpack: {error}");
            ExitCode::FAILURE
        }
    }
}

fn work(root: &Path, target: &Path) -> io::Result<()> {
    // It works for whoever started it and must not outlive that; and nobody looks into its memory.
    nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?;
    nix::sys::prctl::set_dumpable(true)?;
    let mut stdin = io::stdin().lock();
    let mut job = read_job(&mut stdin)?;
    job.target = inside(root, target)?;
    for lower in &mut job.lowers {
        lower.path = inside(root, &lower.path)?;
    }
    limit(&job)?;
    // Its files under /proc belong to root, who writes the namespace's maps.
    let namespace = UserNamespace::identity();
    confine(root, target)?;
    let mut capabilities = CapabilitySet::CHOWN
        | CapabilitySet::DAC_OVERRIDE
        | CapabilitySet::FOWNER
        | CapabilitySet::FSETID
        | CapabilitySet::SETFCAP;
    match namespace {
        Ok(namespace) => setns(namespace, CloneFlags::CLONE_NEWUSER)?,
        Err(error) => {
            eprintln!("foreshore-agent unpack: no user namespace ({error}); going on without");
            // Whiteouts are character devices.
            capabilities |= CapabilitySet::MKNOD;
        }
    }
    nix::sys::prctl::set_dumpable(false)?;
    rustix::thread::set_capabilities(
        None,
        CapabilitySets {
            effective: capabilities,
            permitted: capabilities,
            inheritable: CapabilitySet::empty(),
        },
    )?;
    nix::sys::prctl::set_no_new_privs()?;
    filter().install()?;
    let mut stdout = io::stdout().lock();
    serve(&job, stdin, &mut stdout)?;
    stdout.flush()
}

/// A path as it will be seen.
fn inside(root: &Path, path: &Path) -> io::Result<PathBuf> {
    let relative = path.strip_prefix(root).map_err(io::Error::other)?;
    Ok(Path::new("/").join(relative))
}

fn limit(job: &Job) -> io::Result<()> {
    for (resource, most) in [
        (Resource::RLIMIT_AS, MEMORY_MAX),
        (Resource::RLIMIT_CORE, 0),
        (Resource::RLIMIT_CPU, CPU_MAX),
        (Resource::RLIMIT_FSIZE, job.budget.bytes),
        (Resource::RLIMIT_NOFILE, FILES_MAX),
    ] {
        let (_, hard) = getrlimit(resource)?;
        let most = most.min(hard);
        setrlimit(resource, most, most)?;
    }
    Ok(())
}

/// Leaves this process nothing but `root` to see and `target` to write, and no network.
fn confine(root: &Path, target: &Path) -> io::Result<()> {
    const NONE: Option<&str> = None;
    unshare(
        CloneFlags::CLONE_NEWNS
            | CloneFlags::CLONE_NEWNET
            | CloneFlags::CLONE_NEWIPC
            | CloneFlags::CLONE_NEWUTS,
    )?;
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE)?;
    mount(Some(root), root, NONE, MsFlags::MS_BIND, NONE)?;
    mount(Some(target), target, NONE, MsFlags::MS_BIND, NONE)?;
    let bare = MsFlags::MS_REMOUNT
        | MsFlags::MS_BIND
        | MsFlags::MS_NOSUID
        | MsFlags::MS_NODEV
        | MsFlags::MS_NOEXEC;
    mount(NONE, target, NONE, bare, NONE)?;
    mount(NONE, root, NONE, bare | MsFlags::MS_RDONLY, NONE)?;
    nix::unistd::chdir(root)?;
    // On top of itself, so that no directory is needed for the old root, pivot_root(2).
    nix::unistd::pivot_root(".", ".")?;
    umount2(".", MntFlags::MNT_DETACH)?;
    nix::unistd::chdir("/")?;
    Ok(())
}

/// What unpacking takes. Anything else answers EPERM.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
#[rustfmt::skip]
fn filter() -> Filter {
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
        libc::SYS_symlinkat, libc::SYS_tgkill, libc::SYS_unlinkat, libc::SYS_utimensat, libc::SYS_write,
        libc::SYS_writev,
        // openat2, fchmodat2
        437, 452,
    ];
    #[cfg(target_arch = "x86_64")]
    calls.extend([libc::SYS_open, libc::SYS_stat, libc::SYS_lstat]);
    Filter::only(&calls)
}

/// What containers may make.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn filter() -> Filter {
    Filter::new()
}
