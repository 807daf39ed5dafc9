//! The system calls this program makes, and the entry point.

use core::arch::{asm, global_asm};
use core::ptr;

#[cfg(target_arch = "x86_64")]
mod nr {
    pub(super) const READ: usize = 0;
    pub(super) const WRITE: usize = 1;
    pub(super) const CLOSE: usize = 3;
    pub(super) const LSEEK: usize = 8;
    pub(super) const RT_SIGPROCMASK: usize = 14;
    pub(super) const WAIT4: usize = 61;
    pub(super) const FTRUNCATE: usize = 77;
    pub(super) const CLOCK_GETTIME: usize = 228;
    pub(super) const EXIT_GROUP: usize = 231;
    pub(super) const OPENAT: usize = 257;
    pub(super) const PPOLL: usize = 271;
    pub(super) const RENAMEAT2: usize = 316;
    pub(super) const CLOSE_RANGE: usize = 436;
}

#[cfg(target_arch = "aarch64")]
mod nr {
    pub(super) const READ: usize = 63;
    pub(super) const WRITE: usize = 64;
    pub(super) const CLOSE: usize = 57;
    pub(super) const LSEEK: usize = 62;
    pub(super) const RT_SIGPROCMASK: usize = 135;
    pub(super) const WAIT4: usize = 260;
    pub(super) const FTRUNCATE: usize = 46;
    pub(super) const CLOCK_GETTIME: usize = 113;
    pub(super) const EXIT_GROUP: usize = 94;
    pub(super) const OPENAT: usize = 56;
    pub(super) const PPOLL: usize = 73;
    pub(super) const RENAMEAT2: usize = 276;
    pub(super) const CLOSE_RANGE: usize = 436;
}

#[cfg(target_arch = "x86_64")]
global_asm!(
    ".globl _start",
    "_start:",
    "xor ebp, ebp",
    "mov rdi, rsp",
    "and rsp, -16",
    "call shim_main",
    "ud2",
);

#[cfg(target_arch = "aarch64")]
global_asm!(
    ".globl _start",
    "_start:",
    "mov x29, #0",
    "mov x30, #0",
    "mov x0, sp",
    "bl shim_main",
    "brk #1",
);

/// # Safety
///
/// The arguments must be what system call `number` expects.
#[cfg(target_arch = "x86_64")]
unsafe fn call(number: usize, a: usize, b: usize, c: usize, d: usize, e: usize) -> isize {
    let result: isize;
    // SAFETY: the caller's promise; `syscall` clobbers rcx and r11 only.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") number.cast_signed() => result,
            in("rdi") a, in("rsi") b, in("rdx") c, in("r10") d, in("r8") e,
            lateout("rcx") _, lateout("r11") _,
            options(nostack),
        );
    }
    result
}

/// # Safety
///
/// The arguments must be what system call `number` expects.
#[cfg(target_arch = "aarch64")]
unsafe fn call(number: usize, a: usize, b: usize, c: usize, d: usize, e: usize) -> isize {
    let result: isize;
    // SAFETY: the caller's promise; the kernel keeps all registers but x0.
    unsafe {
        asm!(
            "svc #0",
            in("x8") number,
            inlateout("x0") a.cast_signed() => result,
            in("x1") b, in("x2") c, in("x3") d, in("x4") e,
            options(nostack),
        );
    }
    result
}

const fn fd_arg(fd: i32) -> usize {
    fd as isize as usize
}

const EINTR: isize = -4;
const AT_EMPTY: usize = 0;

/// The program's arguments.
pub(crate) struct Args {
    count: usize,
    vector: *const *const u8,
}

impl Args {
    /// # Safety
    ///
    /// `stack` must be the stack pointer at process entry.
    pub(crate) unsafe fn new(stack: *const usize) -> Self {
        // SAFETY: the caller's promise: argc is the first word, argv begins at the second.
        unsafe {
            Self {
                count: *stack,
                vector: stack.add(1).cast(),
            }
        }
    }

    /// The argument with its terminating NUL; just the NUL when there is none.
    pub(crate) fn text(&self, index: usize) -> &'static [u8] {
        if index >= self.count {
            return b"\0";
        }
        // SAFETY: argv has `count` pointers to NUL-terminated strings that live as long as the process.
        unsafe {
            let start = *self.vector.add(index);
            let mut length = 0;
            while *start.add(length) != 0 {
                length += 1;
            }
            core::slice::from_raw_parts(start, length + 1)
        }
    }

    /// The argument as a number; digits only, anything else ends it.
    pub(crate) fn number(&self, index: usize) -> u64 {
        let mut value: u64 = 0;
        for byte in self.text(index) {
            if !byte.is_ascii_digit() {
                break;
            }
            value = value
                .saturating_mul(10)
                .saturating_add(u64::from(byte - b'0'));
        }
        value
    }
}

/// struct pollfd, poll(2).
#[repr(C)]
pub(crate) struct PollFd {
    fd: i32,
    events: i16,
    returned: i16,
}

impl PollFd {
    /// Waits for input; a negative descriptor waits for nothing.
    pub(crate) const fn read(fd: i32) -> Self {
        Self {
            fd,
            events: 1,
            returned: 0,
        }
    }

    pub(crate) const fn ready(&self) -> bool {
        self.returned != 0
    }
}

/// Waits for one of `fds`; how many are ready, 0 after `timeout_ms`.
pub(crate) fn poll(fds: &mut [PollFd], timeout_ms: Option<i64>) -> isize {
    let timeout = [
        timeout_ms.unwrap_or(0) / 1000,
        timeout_ms.unwrap_or(0) % 1000 * 1_000_000,
    ];
    let timeout = if timeout_ms.is_some() {
        timeout.as_ptr() as usize
    } else {
        0
    };
    // SAFETY: `fds` and the timespec live through the call; no signal mask is given.
    let ready = unsafe {
        call(
            nr::PPOLL,
            fds.as_mut_ptr() as usize,
            fds.len(),
            timeout,
            0,
            8,
        )
    };
    if ready < 0 {
        for fd in fds {
            fd.returned = 0;
        }
    }
    ready
}

/// Blocks every signal that can be blocked: nobody may end this process but with SIGKILL.
pub(crate) fn block_signals() {
    let all = u64::MAX;
    // SAFETY: SIG_SETMASK (2) with a set of eight bytes.
    unsafe { call(nr::RT_SIGPROCMASK, 2, (&raw const all) as usize, 0, 8, 0) };
}

/// Closes every descriptor from `first` on.
pub(crate) fn close_from(first: i32) {
    // SAFETY: no descriptor from `first` on is used by this program.
    unsafe { call(nr::CLOSE_RANGE, fd_arg(first), u32::MAX as usize, 0, 0, 0) };
}

pub(crate) fn close(fd: i32) {
    // SAFETY: the caller does not use `fd` again.
    unsafe { call(nr::CLOSE, fd_arg(fd), 0, 0, 0, 0) };
}

/// How many bytes were read; 0 at the end, negative errno on failure.
pub(crate) fn read(fd: i32, buffer: &mut [u8]) -> isize {
    loop {
        // SAFETY: the buffer lives through the call.
        let count = unsafe {
            call(
                nr::READ,
                fd_arg(fd),
                buffer.as_mut_ptr() as usize,
                buffer.len(),
                0,
                0,
            )
        };
        if count != EINTR {
            return count;
        }
    }
}

/// Writes as much as possible; how much that was.
pub(crate) fn write(fd: i32, bytes: &[u8]) -> usize {
    let mut done = 0;
    while done < bytes.len() {
        let rest = &bytes[done..];
        // SAFETY: the bytes live through the call.
        let count = unsafe {
            call(
                nr::WRITE,
                fd_arg(fd),
                rest.as_ptr() as usize,
                rest.len(),
                0,
                0,
            )
        };
        match count {
            EINTR => {}
            1.. => done += count.unsigned_abs(),
            _ => break,
        }
    }
    done
}

const O_WRONLY: usize = 0o1;
const O_CREAT: usize = 0o100;
const O_TRUNC: usize = 0o1000;
const O_APPEND: usize = 0o2000;
const O_CLOEXEC: usize = 0o2_000_000;
#[cfg(target_arch = "x86_64")]
const O_NOFOLLOW: usize = 0o400_000;
#[cfg(target_arch = "aarch64")]
const O_NOFOLLOW: usize = 0o100_000;

/// errno(3), as a call returns it.
const ENOENT: i32 = -2;

/// The new descriptor, or a negative error number.
fn open(dir: i32, name: &[u8], flags: usize, mode: usize) -> i32 {
    // SAFETY: `name` ends with NUL (every caller's names do) and lives through the call.
    let fd = unsafe {
        call(
            nr::OPENAT,
            fd_arg(dir),
            name.as_ptr() as usize,
            flags | O_CLOEXEC | O_NOFOLLOW,
            mode,
            0,
        )
    };
    i32::try_from(fd).unwrap_or(-1)
}

/// Opens a log file for appending, making it if need be; negative on failure.
pub(crate) fn open_append(dir: i32, name: &[u8]) -> i32 {
    open(dir, name, O_WRONLY | O_CREAT | O_APPEND, 0o640)
}

/// The size of an open file; 0 when it cannot be told.
pub(crate) fn size(fd: i32) -> u64 {
    // SAFETY: SEEK_END (2) by 0 on a descriptor of ours.
    let end = unsafe { call(nr::LSEEK, fd_arg(fd), 0, 2, 0, 0) };
    u64::try_from(end).unwrap_or(0)
}

/// Cuts an open file to nothing.
pub(crate) fn truncate(fd: i32) {
    // SAFETY: a descriptor of ours.
    unsafe { call(nr::FTRUNCATE, fd_arg(fd), 0, 0, 0, 0) };
}

/// What came of [`write_file`].
pub(crate) enum Written {
    Whole,
    /// In part or not at all; another try may do better.
    Not,
    /// The directory was deleted.
    Nowhere,
}

/// Makes a file with these contents.
pub(crate) fn write_file(dir: i32, name: &[u8], contents: &[u8]) -> Written {
    let fd = open(dir, name, O_WRONLY | O_CREAT | O_TRUNC, 0o644);
    if fd == ENOENT {
        return Written::Nowhere;
    }
    if fd < 0 {
        return Written::Not;
    }
    let done = write(fd, contents) == contents.len();
    close(fd);
    if done { Written::Whole } else { Written::Not }
}

/// Renames within a directory, replacing what is there; whether it worked. Both names end with NUL.
pub(crate) fn rename(dir: i32, from: &[u8], to: &[u8]) -> bool {
    // SAFETY: both names end with NUL and live through the call.
    unsafe {
        call(
            nr::RENAMEAT2,
            fd_arg(dir),
            from.as_ptr() as usize,
            fd_arg(dir),
            to.as_ptr() as usize,
            AT_EMPTY,
        ) == 0
    }
}

/// Waits for child `pid`; its wait status as of waitpid(2). Without such a child: as if it had been killed.
pub(crate) fn wait(pid: i32) -> i32 {
    let mut status: i32 = 0;
    loop {
        // SAFETY: the status lives through the call.
        let result = unsafe { call(nr::WAIT4, fd_arg(pid), (&raw mut status) as usize, 0, 0, 0) };
        match result {
            EINTR => {}
            ..0 => return 9,
            _ => return status,
        }
    }
}

/// Seconds and nanoseconds since 1970.
pub(crate) fn now() -> (i64, i64) {
    let mut time = [0_i64; 2];
    // SAFETY: CLOCK_REALTIME (0) into a timespec of two 64-bit words.
    unsafe { call(nr::CLOCK_GETTIME, 0, time.as_mut_ptr() as usize, 0, 0, 0) };
    (time[0], time[1])
}

pub(crate) fn exit(code: i32) -> ! {
    loop {
        // SAFETY: ends the process.
        unsafe { call(nr::EXIT_GROUP, fd_arg(code), 0, 0, 0, 0) };
    }
}

/// memcpy(3), for the compiler.
///
/// # Safety
///
/// As of C.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
    for index in 0..count {
        // SAFETY: the caller's promise.
        unsafe { *to.add(index) = *from.add(index) };
    }
    to
}

/// memmove(3), for the compiler.
///
/// # Safety
///
/// As of C.
#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
    if to.cast_const() <= from {
        // SAFETY: the caller's promise; forwards is right when the target comes first.
        return unsafe { memcpy(to, from, count) };
    }
    for index in (0..count).rev() {
        // SAFETY: the caller's promise.
        unsafe { *to.add(index) = *from.add(index) };
    }
    to
}

/// memset(3), for the compiler.
///
/// # Safety
///
/// As of C.
#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, byte: i32, count: usize) -> *mut u8 {
    for index in 0..count {
        // SAFETY: the caller's promise.
        unsafe { *to.add(index) = byte as u8 };
    }
    to
}

/// memcmp(3), for the compiler.
///
/// # Safety
///
/// As of C.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, count: usize) -> i32 {
    for index in 0..count {
        // SAFETY: the caller's promise.
        let (a, b) = unsafe { (ptr::read(a.add(index)), ptr::read(b.add(index))) };
        if a != b {
            return i32::from(a) - i32::from(b);
        }
    }
    0
}

/// bcmp(3), for the compiler.
///
/// # Safety
///
/// As of C.
#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, count: usize) -> i32 {
    // SAFETY: the caller's promise.
    unsafe { memcmp(a, b, count) }
}
