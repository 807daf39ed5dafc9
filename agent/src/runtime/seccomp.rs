//! The system calls that containers may make: a classic BPF filter, built once per start.
//!
//! The list is that of moby's default profile (`profiles/seccomp/default.json`) for a container without added
//! capabilities. Everything else answers EPERM; `clone3` answers ENOSYS, so that libc falls back to `clone`,
//! whose flags can be looked at. A foreign architecture (32-bit programs on a 64-bit kernel) is killed.
//!
//! The filter is a binary search over ranges of numbers. The kernel runs a filter once for every system
//! call when it is installed, so its depth matters: a list of 350 comparisons takes ten times as long
//! to install. That, `clone3`, and 32-bit ARM are why no library makes it.

use std::collections::BTreeMap;
use std::io;

use libc::{c_long, sock_filter};

/// What happens to a system call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Allow,
    Errno(u16),
    /// Allowed without any of the flags that make namespaces.
    Clone,
    /// Allowed for the execution domains that change nothing dangerous.
    Personality,
    /// Allowed but for AF_VSOCK, which namespaces do not confine.
    Socket,
}

const EPERM: Verdict = Verdict::Errno(1);
const ENOSYS: Verdict = Verdict::Errno(38);

/// CLONE_NEWNS | NEWCGROUP | NEWUTS | NEWIPC | NEWUSER | NEWPID | NEWNET, clone(2).
const NAMESPACE_FLAGS: u32 = 0x7e02_0000;
/// PER_LINUX, PER_LINUX32, UNAME26 and their union, and "ask only", personality(2).
const PERSONALITIES: [u32; 5] = [0, 8, 0x2_0000, 0x2_0008, u32::MAX];
const AF_VSOCK: u32 = 40;

#[cfg(target_arch = "x86_64")]
const ARCH: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
const ARCH: u32 = 0xc000_00b7;
#[cfg(target_arch = "arm")]
const ARCH: u32 = 0x4000_0028;
#[cfg(target_arch = "riscv64")]
const ARCH: u32 = 0xc000_00f3;

/// A filter ready to be installed.
#[derive(Debug, Clone)]
pub(crate) struct Filter(Vec<sock_filter>);

impl Filter {
    /// The filter for this architecture.
    pub(crate) fn new() -> Self {
        Self(assemble(&verdicts()))
    }

    /// A filter that allows these and nothing else.
    pub(crate) fn only(numbers: &[c_long]) -> Self {
        let numbers = numbers
            .iter()
            .filter_map(|number| u32::try_from(*number).ok());
        Self(assemble(
            &numbers.map(|number| (number, Verdict::Allow)).collect(),
        ))
    }

    /// Puts the calling thread under the filter, for good.
    ///
    /// # Errors
    ///
    /// EACCES without `no_new_privs`; EINVAL on a kernel without seccomp filters.
    #[expect(unsafe_code, reason = "prctl(2) takes a pointer to the program")]
    pub(crate) fn install(&self) -> io::Result<()> {
        let program = libc::sock_fprog {
            len: u16::try_from(self.0.len()).map_err(io::Error::other)?,
            filter: self.0.as_ptr().cast_mut(),
        };
        // SAFETY: the program and its instructions live through the call; the kernel only reads them.
        let result = unsafe {
            libc::prctl(
                libc::PR_SET_SECCOMP,
                libc::SECCOMP_MODE_FILTER,
                &raw const program,
                0,
                0,
            )
        };
        if result == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }
}

fn verdicts() -> BTreeMap<u32, Verdict> {
    let mut verdicts = BTreeMap::new();
    let mut put = |number: c_long, verdict: Verdict| {
        if let Ok(number) = u32::try_from(number) {
            verdicts.insert(number, verdict);
        }
    };
    for number in COMMON.iter().chain(LEGACY) {
        put(*number, Verdict::Allow);
    }
    put(libc::SYS_clone, Verdict::Clone);
    put(libc::SYS_clone3, ENOSYS);
    put(libc::SYS_personality, Verdict::Personality);
    put(libc::SYS_socket, Verdict::Socket);
    verdicts
}

const fn statement(code: u32, k: u32) -> sock_filter {
    #[expect(clippy::cast_possible_truncation, reason = "BPF codes have 16 bits")]
    let code = code as u16;
    sock_filter {
        code,
        jt: 0,
        jf: 0,
        k,
    }
}

const fn jump(code: u32, k: u32, jt: u8, jf: u8) -> sock_filter {
    #[expect(clippy::cast_possible_truncation, reason = "BPF codes have 16 bits")]
    let code = (libc::BPF_JMP | code | libc::BPF_K) as u16;
    sock_filter { code, jt, jf, k }
}

const fn load(offset: u32) -> sock_filter {
    statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, offset)
}

const fn give(action: u32) -> sock_filter {
    statement(libc::BPF_RET | libc::BPF_K, action)
}

// struct seccomp_data, seccomp(2); all targets are little-endian, so the low half of an argument is first.
const OFFSET_NUMBER: u32 = 0;
const OFFSET_ARCH: u32 = 4;
const OFFSET_ARGUMENT: u32 = 16;

fn assemble(verdicts: &BTreeMap<u32, Verdict>) -> Vec<sock_filter> {
    let mut program = vec![
        load(OFFSET_ARCH),
        jump(libc::BPF_JEQ, ARCH, 1, 0),
        give(libc::SECCOMP_RET_KILL_PROCESS),
        load(OFFSET_NUMBER),
    ];
    program.extend(search(&segments(verdicts)));
    program
}

/// From which number on which verdict holds; begins at 0.
fn segments(verdicts: &BTreeMap<u32, Verdict>) -> Vec<(u32, Verdict)> {
    let mut segments = vec![(0, EPERM)];
    let mut push = |start: u32, verdict: Verdict| match segments.last_mut() {
        Some(last) if last.0 == start => last.1 = verdict,
        Some(last) if last.1 == verdict => {}
        _ => segments.push((start, verdict)),
    };
    for (number, verdict) in verdicts {
        push(*number, *verdict);
        push(number.saturating_add(1), EPERM);
    }
    // A segment that was overwritten may now equal the one before it.
    segments.dedup_by(|later, earlier| later.1 == earlier.1);
    segments
}

/// A balanced tree of comparisons with the verdicts at its leaves.
fn search(segments: &[(u32, Verdict)]) -> Vec<sock_filter> {
    if let [(_, verdict)] = segments {
        return leaf(*verdict);
    }
    let (low, high) = segments.split_at(segments.len() / 2);
    let (low, pivot) = (search(low), high.first().map_or(0, |(start, _)| *start));
    let mut out = Vec::new();
    match u8::try_from(low.len()) {
        Ok(skip) => out.push(jump(libc::BPF_JGE, pivot, skip, 0)),
        Err(_) => {
            out.push(jump(libc::BPF_JGE, pivot, 0, 1));
            let skip = u32::try_from(low.len()).unwrap_or(u32::MAX);
            out.push(statement(libc::BPF_JMP | libc::BPF_JA, skip));
        }
    }
    out.extend(low);
    out.extend(search(high));
    out
}

fn leaf(verdict: Verdict) -> Vec<sock_filter> {
    let allow = give(libc::SECCOMP_RET_ALLOW);
    let refuse = give(libc::SECCOMP_RET_ERRNO | 1);
    match verdict {
        Verdict::Allow => vec![allow],
        Verdict::Errno(errno) => vec![give(libc::SECCOMP_RET_ERRNO | u32::from(errno))],
        Verdict::Clone => {
            vec![
                load(OFFSET_ARGUMENT),
                jump(libc::BPF_JSET, NAMESPACE_FLAGS, 0, 1),
                refuse,
                allow,
            ]
        }
        Verdict::Socket => vec![
            load(OFFSET_ARGUMENT),
            jump(libc::BPF_JEQ, AF_VSOCK, 0, 1),
            refuse,
            allow,
        ],
        Verdict::Personality => {
            let mut out = vec![load(OFFSET_ARGUMENT)];
            for (index, value) in (0_u8..).zip(PERSONALITIES) {
                // Over the comparisons that are left, and over the refusal.
                out.push(jump(libc::BPF_JEQ, value, 5 - index, 0));
            }
            out.push(refuse);
            out.push(allow);
            out
        }
    }
}

/// Allowed on every architecture.
#[rustfmt::skip]
const COMMON: &[c_long] = &[
    libc::SYS_accept, libc::SYS_accept4, libc::SYS_adjtimex, libc::SYS_bind, libc::SYS_brk, libc::SYS_capget,
    libc::SYS_capset, libc::SYS_chdir, libc::SYS_clock_adjtime, libc::SYS_clock_getres, libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep, libc::SYS_close, libc::SYS_connect, libc::SYS_copy_file_range, libc::SYS_dup,
    libc::SYS_dup3, libc::SYS_epoll_create1, libc::SYS_epoll_ctl, libc::SYS_epoll_pwait, libc::SYS_eventfd2,
    libc::SYS_execve, libc::SYS_execveat, libc::SYS_exit, libc::SYS_exit_group, libc::SYS_faccessat,
    libc::SYS_fallocate, libc::SYS_fanotify_mark, libc::SYS_fchdir, libc::SYS_fchmod, libc::SYS_fchmodat,
    libc::SYS_fchown, libc::SYS_fchownat, libc::SYS_fcntl, libc::SYS_fdatasync, libc::SYS_fgetxattr,
    libc::SYS_flistxattr, libc::SYS_flock, libc::SYS_fremovexattr, libc::SYS_fsetxattr, libc::SYS_fstat,
    libc::SYS_fstatfs, libc::SYS_fsync, libc::SYS_ftruncate, libc::SYS_futex, libc::SYS_get_robust_list,
    libc::SYS_getcpu, libc::SYS_getcwd, libc::SYS_getdents64, libc::SYS_getegid, libc::SYS_geteuid,
    libc::SYS_getgid, libc::SYS_getgroups, libc::SYS_getitimer, libc::SYS_getpeername, libc::SYS_getpgid,
    libc::SYS_getpid, libc::SYS_getppid, libc::SYS_getpriority, libc::SYS_getrandom, libc::SYS_getresgid,
    libc::SYS_getresuid, libc::SYS_getrusage, libc::SYS_getsid, libc::SYS_getsockname, libc::SYS_getsockopt,
    libc::SYS_gettid, libc::SYS_gettimeofday, libc::SYS_getuid, libc::SYS_getxattr, libc::SYS_inotify_add_watch,
    libc::SYS_inotify_init1, libc::SYS_inotify_rm_watch, libc::SYS_io_cancel, libc::SYS_io_destroy,
    libc::SYS_io_getevents, libc::SYS_io_setup, libc::SYS_io_submit, libc::SYS_ioctl, libc::SYS_ioprio_get,
    libc::SYS_ioprio_set, libc::SYS_kill, libc::SYS_lgetxattr, libc::SYS_linkat, libc::SYS_listen,
    libc::SYS_listxattr, libc::SYS_llistxattr, libc::SYS_lremovexattr, libc::SYS_lseek, libc::SYS_lsetxattr,
    libc::SYS_madvise, libc::SYS_membarrier, libc::SYS_memfd_create, libc::SYS_mincore, libc::SYS_mkdirat,
    libc::SYS_mknodat, libc::SYS_mlock, libc::SYS_mlock2, libc::SYS_mlockall, libc::SYS_mprotect,
    libc::SYS_mq_getsetattr, libc::SYS_mq_notify, libc::SYS_mq_open, libc::SYS_mq_timedreceive,
    libc::SYS_mq_timedsend, libc::SYS_mq_unlink, libc::SYS_mremap, libc::SYS_msgctl, libc::SYS_msgget,
    libc::SYS_msgrcv, libc::SYS_msgsnd, libc::SYS_msync, libc::SYS_munlock, libc::SYS_munlockall,
    libc::SYS_munmap, libc::SYS_name_to_handle_at, libc::SYS_nanosleep, libc::SYS_openat, libc::SYS_pipe2,
    libc::SYS_pkey_alloc, libc::SYS_pkey_free, libc::SYS_pkey_mprotect, libc::SYS_ppoll, libc::SYS_prctl,
    libc::SYS_pread64, libc::SYS_preadv, libc::SYS_preadv2, libc::SYS_prlimit64, libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev, libc::SYS_pselect6, libc::SYS_ptrace, libc::SYS_pwrite64, libc::SYS_pwritev,
    libc::SYS_pwritev2, libc::SYS_read, libc::SYS_readahead, libc::SYS_readlinkat, libc::SYS_readv,
    libc::SYS_recvfrom, libc::SYS_recvmmsg, libc::SYS_recvmsg, libc::SYS_remap_file_pages,
    libc::SYS_removexattr, libc::SYS_renameat2, libc::SYS_restart_syscall, libc::SYS_rseq,
    libc::SYS_rt_sigaction, libc::SYS_rt_sigpending, libc::SYS_rt_sigprocmask, libc::SYS_rt_sigqueueinfo,
    libc::SYS_rt_sigreturn, libc::SYS_rt_sigsuspend, libc::SYS_rt_sigtimedwait, libc::SYS_rt_tgsigqueueinfo,
    libc::SYS_sched_get_priority_max, libc::SYS_sched_get_priority_min, libc::SYS_sched_getaffinity,
    libc::SYS_sched_getattr, libc::SYS_sched_getparam, libc::SYS_sched_getscheduler,
    libc::SYS_sched_rr_get_interval, libc::SYS_sched_setaffinity, libc::SYS_sched_setattr,
    libc::SYS_sched_setparam, libc::SYS_sched_setscheduler, libc::SYS_sched_yield, libc::SYS_seccomp,
    libc::SYS_semctl, libc::SYS_semget, libc::SYS_semop, libc::SYS_semtimedop, libc::SYS_sendfile,
    libc::SYS_sendmmsg, libc::SYS_sendmsg, libc::SYS_sendto, libc::SYS_set_robust_list,
    libc::SYS_set_tid_address, libc::SYS_setfsgid, libc::SYS_setfsuid, libc::SYS_setgid, libc::SYS_setgroups,
    libc::SYS_setitimer, libc::SYS_setpgid, libc::SYS_setpriority, libc::SYS_setregid, libc::SYS_setresgid,
    libc::SYS_setresuid, libc::SYS_setreuid, libc::SYS_setsid, libc::SYS_setsockopt, libc::SYS_setuid,
    libc::SYS_setxattr, libc::SYS_shmat, libc::SYS_shmctl, libc::SYS_shmdt, libc::SYS_shmget,
    libc::SYS_shutdown, libc::SYS_sigaltstack, libc::SYS_signalfd4, libc::SYS_socketpair, libc::SYS_splice,
    libc::SYS_statfs, libc::SYS_statx, libc::SYS_symlinkat, libc::SYS_sync, libc::SYS_syncfs, libc::SYS_sysinfo,
    libc::SYS_tee, libc::SYS_tgkill, libc::SYS_timer_create, libc::SYS_timer_delete,
    libc::SYS_timer_getoverrun, libc::SYS_timer_gettime, libc::SYS_timer_settime, libc::SYS_timerfd_create,
    libc::SYS_timerfd_gettime, libc::SYS_timerfd_settime, libc::SYS_times, libc::SYS_tkill,
    libc::SYS_truncate, libc::SYS_umask, libc::SYS_uname, libc::SYS_unlinkat, libc::SYS_utimensat,
    libc::SYS_vmsplice, libc::SYS_wait4, libc::SYS_waitid, libc::SYS_write, libc::SYS_writev,
    // From 424 on all architectures share one numbering: pidfd_send_signal, pidfd_open, close_range, openat2,
    // faccessat2, epoll_pwait2, the three landlock calls, memfd_secret, process_mrelease, futex_waitv, cachestat,
    // fchmodat2, map_shadow_stack, futex_wake, futex_wait, futex_requeue, statmount, listmount, mseal,
    // setxattrat, getxattrat, listxattrat, removexattrat.
    424, 434, 436, 437, 439, 441, 444, 445, 446, 447, 448, 449, 451, 452, 453, 454, 455, 456, 457, 458, 462, 463,
    464, 465, 466,
];

/// What only x86_64 has: mostly calls that newer architectures never got.
#[cfg(target_arch = "x86_64")]
#[rustfmt::skip]
const LEGACY: &[c_long] = &[
    libc::SYS_access, libc::SYS_alarm, libc::SYS_arch_prctl, libc::SYS_chmod, libc::SYS_chown, libc::SYS_creat,
    libc::SYS_dup2, libc::SYS_epoll_create, libc::SYS_epoll_ctl_old, libc::SYS_epoll_wait,
    libc::SYS_epoll_wait_old, libc::SYS_eventfd, libc::SYS_fadvise64, libc::SYS_fork, libc::SYS_futimesat,
    libc::SYS_getdents, libc::SYS_getpgrp, libc::SYS_getrlimit, libc::SYS_inotify_init, libc::SYS_lchown,
    libc::SYS_link, libc::SYS_lstat, libc::SYS_mkdir, libc::SYS_mknod, libc::SYS_mmap, libc::SYS_modify_ldt,
    libc::SYS_newfstatat, libc::SYS_open, libc::SYS_pause, libc::SYS_pipe, libc::SYS_poll, libc::SYS_readlink,
    libc::SYS_rename, libc::SYS_renameat, libc::SYS_rmdir, libc::SYS_select, libc::SYS_setrlimit,
    libc::SYS_signalfd, libc::SYS_stat, libc::SYS_symlink, libc::SYS_sync_file_range, libc::SYS_time,
    libc::SYS_unlink, libc::SYS_utime, libc::SYS_utimes, libc::SYS_vfork,
    // get_thread_area, set_thread_area, io_pgetevents, uretprobe
    211, 205, 333, 335,
];

/// What aarch64 has beyond the common list.
#[cfg(target_arch = "aarch64")]
#[rustfmt::skip]
const LEGACY: &[c_long] = &[
    libc::SYS_fadvise64, libc::SYS_getrlimit, libc::SYS_mmap, libc::SYS_newfstatat, libc::SYS_renameat,
    libc::SYS_setrlimit, libc::SYS_sync_file_range,
    // io_pgetevents
    292,
];

/// What 32-bit ARM (EABI) has beyond the common list: old calls, 32-bit ids, 64-bit offsets and times.
#[cfg(target_arch = "arm")]
#[rustfmt::skip]
const LEGACY: &[c_long] = &[
    libc::SYS_access, libc::SYS_chmod, libc::SYS_chown, libc::SYS_creat, libc::SYS_dup2, libc::SYS_epoll_create,
    libc::SYS_epoll_wait, libc::SYS_eventfd, libc::SYS_fork, libc::SYS_futimesat, libc::SYS_getdents,
    libc::SYS_getpgrp, libc::SYS_inotify_init, libc::SYS_lchown, libc::SYS_link, libc::SYS_lstat,
    libc::SYS_mkdir, libc::SYS_mknod, libc::SYS_open, libc::SYS_pause, libc::SYS_pipe, libc::SYS_poll,
    libc::SYS_readlink, libc::SYS_rename, libc::SYS_renameat, libc::SYS_rmdir, libc::SYS_setrlimit,
    libc::SYS_signalfd, libc::SYS_stat, libc::SYS_symlink, libc::SYS_unlink, libc::SYS_utimes, libc::SYS_vfork,
    // sigreturn, sigprocmask, _llseek, _newselect, ugetrlimit, mmap2, truncate64 … lchown32 … fcntl64,
    // fadvise64_64, statfs64, fstatfs64, send, recv, fstatat64, sync_file_range2, io_pgetevents
    119, 126, 140, 142, 191, 192, 193, 194, 195, 196, 197, 198, 199, 200, 201, 202, 203, 204, 205, 206, 207, 208,
    209, 210, 211, 212, 213, 214, 215, 216, 221, 239, 266, 267, 270, 289, 291, 327, 341, 399,
    // The calls with 64-bit times.
    403, 404, 405, 406, 407, 408, 409, 410, 411, 412, 413, 414, 416, 417, 418, 419, 420, 421, 422, 423,
    // The private ones: breakpoint, cacheflush, set_tls, get_tls.
    0xf_0001, 0xf_0002, 0xf_0005, 0xf_0006,
];

#[cfg(target_arch = "riscv64")]
#[rustfmt::skip]
const LEGACY: &[c_long] = &[
    libc::SYS_fadvise64, libc::SYS_getrlimit, libc::SYS_mmap, libc::SYS_newfstatat, libc::SYS_setrlimit,
    libc::SYS_sync_file_range,
    // riscv_hwprobe, riscv_flush_icache, io_pgetevents
    258, 259, 292,
];

#[cfg(test)]
mod tests {
    use super::*;

    /// What the kernel would do: interprets the few instructions the filter uses.
    fn run(program: &[sock_filter], arch: u32, number: u32, argument: u32) -> u32 {
        let (mut at, mut accumulator) = (0, 0);
        loop {
            let instruction = program[at];
            at += 1;
            let class = u32::from(instruction.code);
            if class == libc::BPF_LD | libc::BPF_W | libc::BPF_ABS {
                accumulator = match instruction.k {
                    OFFSET_NUMBER => number,
                    OFFSET_ARCH => arch,
                    OFFSET_ARGUMENT => argument,
                    other => panic!("load from {other}"),
                };
            } else if class == libc::BPF_RET | libc::BPF_K {
                return instruction.k;
            } else if class == libc::BPF_JMP | libc::BPF_JA {
                at += instruction.k as usize;
            } else {
                let taken = match class & 0xf0 {
                    libc::BPF_JEQ => accumulator == instruction.k,
                    libc::BPF_JGE => accumulator >= instruction.k,
                    libc::BPF_JSET => accumulator & instruction.k != 0,
                    other => panic!("jump {other}"),
                };
                at += usize::from(if taken {
                    instruction.jt
                } else {
                    instruction.jf
                });
            }
        }
    }

    fn number(call: c_long) -> u32 {
        u32::try_from(call).unwrap()
    }

    const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
    const REFUSE: u32 = libc::SECCOMP_RET_ERRNO | 1;

    #[test]
    fn every_number_gets_exactly_its_verdict() {
        let (filter, verdicts) = (Filter::new(), verdicts());
        for call in (0..2000).chain([0xf_0005, 0x4000_0000, 0x4000_0001, u32::MAX]) {
            let expected = match verdicts.get(&call) {
                Some(Verdict::Allow | Verdict::Clone | Verdict::Personality | Verdict::Socket) => {
                    ALLOW
                }
                Some(Verdict::Errno(errno)) => libc::SECCOMP_RET_ERRNO | u32::from(*errno),
                None => REFUSE,
            };
            assert_eq!(
                run(&filter.0, ARCH, call, 0),
                expected,
                "system call {call}"
            );
        }
    }

    #[test]
    fn dangerous_calls_are_refused() {
        let filter = Filter::new();
        for call in [
            libc::SYS_mount,
            libc::SYS_umount2,
            libc::SYS_unshare,
            libc::SYS_setns,
            libc::SYS_bpf,
            libc::SYS_init_module,
            libc::SYS_finit_module,
            libc::SYS_kexec_load,
            libc::SYS_reboot,
            libc::SYS_swapon,
            libc::SYS_add_key,
            libc::SYS_keyctl,
            libc::SYS_perf_event_open,
            libc::SYS_userfaultfd,
            libc::SYS_open_by_handle_at,
            libc::SYS_pivot_root,
            libc::SYS_settimeofday,
            libc::SYS_io_uring_setup,
            libc::SYS_open_tree,
            libc::SYS_move_mount,
            libc::SYS_fsopen,
        ] {
            assert_eq!(
                run(&filter.0, ARCH, number(call), 0),
                REFUSE,
                "system call {call}"
            );
        }
        assert_eq!(
            run(&filter.0, ARCH, number(libc::SYS_clone3), 0),
            libc::SECCOMP_RET_ERRNO | 38
        );
    }

    #[test]
    fn arguments_are_looked_at() {
        let filter = Filter::new();
        let verdict = |call, argument| run(&filter.0, ARCH, number(call), argument);
        assert_eq!(verdict(libc::SYS_clone, 0x11), ALLOW);
        assert_eq!(verdict(libc::SYS_clone, 0x1000_0011), REFUSE);
        assert_eq!(verdict(libc::SYS_clone, 0x2_0000), REFUSE);
        assert_eq!(verdict(libc::SYS_socket, 2), ALLOW);
        assert_eq!(verdict(libc::SYS_socket, AF_VSOCK), REFUSE);
        for value in PERSONALITIES {
            assert_eq!(verdict(libc::SYS_personality, value), ALLOW, "{value:#x}");
        }
        assert_eq!(verdict(libc::SYS_personality, 0x40_0000), REFUSE);
    }

    #[test]
    fn another_architecture_is_killed() {
        let filter = Filter::new();
        assert_eq!(
            run(&filter.0, 0x4000_0003, 4, 0),
            libc::SECCOMP_RET_KILL_PROCESS
        );
    }

    #[test]
    fn the_search_is_shallow_and_the_program_fits() {
        let filter = Filter::new();
        assert!(filter.0.len() < 1000, "{} instructions", filter.0.len());
    }
}
