//! foreshore-shim: the parent of one container's first process.
//!
//! It copies what the container writes into rotated log files, waits for the container's first process,
//! writes its exit status into the container's run directory, and ends. It knows nothing else: no agent,
//! no configuration, no socket. Without std and libc it costs a few KiB per container.
//!
//! It is entered by `execve` from `foreshore-agent shim`, whose process it becomes, with
//!
//! | fd | what |
//! |---|---|
//! | 0, 1, 2 | `/dev/null` |
//! | 3 | read end of the container's stdout, non-blocking |
//! | 4 | read end of the container's stderr, non-blocking |
//! | 5 | the log directory, or closed: then output is read and dropped |
//! | 6 | the container's run directory |
//! | 7 | pidfd of the container's first process, a child of this process |
//!
//! and `argv` = `foreshore-shim ID PID MAX_SIZE MAX_FILE LOG_NAME`.
//!
//! Log lines have the form that Kubernetes runtimes write (CRI): `TIME stdout|stderr F|P TEXT`, where `P`
//! marks a part of a line that goes on in the next entry of that stream.

#![no_std]
#![no_main]
// The memory functions below would otherwise be compiled into calls of themselves.
#![no_builtins]

mod log;
mod sys;

use log::{GATHER, Log, PIECE, Stream};

const STDOUT: i32 = 3;
const STDERR: i32 = 4;
const LOG_DIR: i32 = 5;
const RUN_DIR: i32 = 6;
const PIDFD: i32 = 7;

/// How long an unfinished line is held back, in milliseconds. A guess: long enough for a line written in
/// two calls, short enough for a person who waits for a prompt.
const HOLD_MS: i64 = 500;

/// After so many bytes of log entries in a row comes a pause of [`PAUSE_MS`]: a container that writes as fast as it
/// can must not keep a processor busy for a whole slice of the scheduler (milliseconds) at a time, which its neighbours
/// would feel. It is held to some 15 MB/s by that, and slower writers notice nothing.
const BURST: usize = 16 << 10;
const PAUSE_MS: i64 = 1;

/// How much is still read after the container has ended. Nothing in it can write any more by then; only
/// a pipe end that was passed out of the container could, and must not keep this process for ever.
const LAST_READ: usize = 1 << 20;

// In .bss, whose pages cost nothing until the container writes something.
static mut OUT: [u8; GATHER] = [0; GATHER];
static mut STDOUT_BUFFER: [u8; PIECE] = [0; PIECE];
static mut STDERR_BUFFER: [u8; PIECE] = [0; PIECE];

/// Called by `_start` with the initial stack pointer: argc, then the argv pointers.
///
/// # Safety
///
/// `stack` must be the stack pointer at process entry.
#[unsafe(no_mangle)]
unsafe extern "C" fn shim_main(stack: *const usize) -> ! {
    // SAFETY: the caller's promise; the kernel puts argc and argv there (System V ABI, process entry).
    let args = unsafe { sys::Args::new(stack) };
    sys::block_signals();
    sys::close_from(PIDFD + 1);

    let pid = i32::try_from(args.number(2)).unwrap_or(0);
    // SAFETY: this function runs once and there is one thread: each buffer is borrowed once.
    let (out, first, second) = unsafe {
        (
            &mut *(&raw mut OUT),
            &mut *(&raw mut STDOUT_BUFFER),
            &mut *(&raw mut STDERR_BUFFER),
        )
    };
    let mut log = Log::new(LOG_DIR, args.text(5), args.number(3), args.number(4), out);
    let mut stdout = Stream::new(STDOUT, b" stdout ", first);
    let mut stderr = Stream::new(STDERR, b" stderr ", second);

    let mut load = 0;
    loop {
        let mut fds = [
            sys::PollFd::read(PIDFD),
            sys::PollFd::read(stdout.poll_fd()),
            sys::PollFd::read(stderr.poll_fd()),
        ];
        let held = stdout.holds() || stderr.holds();
        let ready = sys::poll(&mut fds, if held { Some(HOLD_MS) } else { None });
        if ready == 0 {
            stdout.release(&mut log, false);
            stderr.release(&mut log, false);
        }
        if fds[1].ready() {
            stdout.pump(&mut log);
        }
        if fds[2].ready() {
            stderr.pump(&mut log);
        }
        log.flush();
        if fds[0].ready() {
            break;
        }
        load += log.take_load();
        if load >= BURST {
            load = 0;
            sys::poll(&mut fds[..1], Some(PAUSE_MS));
        }
    }

    for stream in [&mut stdout, &mut stderr] {
        let mut total = 0;
        while total < LAST_READ {
            match stream.pump(&mut log) {
                0 => break,
                count => total += count,
            }
        }
        stream.release(&mut log, true);
    }
    log.flush();
    write_exit(sys::wait(pid));
    sys::exit(0)
}

/// Writes `CODE\n`, or `CODE SIGNAL\n` if a signal ended it, to `exit` in the run directory, whole or not at all.
/// Not synced: the run directory means nothing after a reboot.
fn write_exit(status: i32) {
    let signal = status & 0x7f;
    let code = if signal == 0 {
        (status >> 8) & 0xff
    } else {
        128 + signal
    };
    let mut text = [0_u8; 24];
    let mut length = log::decimal(code.unsigned_abs().into(), &mut text);
    if signal != 0 {
        let mut digits = [0_u8; 24];
        let count = log::decimal(signal.unsigned_abs().into(), &mut digits);
        text[length] = b' ';
        text[length + 1..=length + count].copy_from_slice(&digits[..count]);
        length += 1 + count;
    }
    text[length] = b'\n';
    // A full run directory is the one thing that can stop this; whoever watches sees a shim that lives
    // until it has said its word, or gives up after a minute and leaves a broken container. Once the directory
    // is gone nobody listens any more.
    for _ in 0..60 {
        match sys::write_file(RUN_DIR, b"exit.new\0", &text[..=length]) {
            sys::Written::Whole if sys::rename(RUN_DIR, b"exit.new\0", b"exit\0") => return,
            sys::Written::Nowhere => return,
            sys::Written::Whole | sys::Written::Not => {}
        }
        sys::poll(&mut [], Some(1000));
    }
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    sys::exit(101)
}
