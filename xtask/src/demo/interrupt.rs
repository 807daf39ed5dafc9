//! Ctrl-C: a flag that every wait looks at, so that the demo always ends through its clean-up.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{bail, ensure};

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

extern "C" fn note(_signal: libc::c_int) {
    INTERRUPTED.store(true, Ordering::Relaxed);
}

/// From now on SIGINT, SIGTERM and SIGHUP only set the flag.
pub(crate) fn listen() {
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        let handler: extern "C" fn(libc::c_int) = note;
        #[expect(
            unsafe_code,
            reason = "the standard library cannot set a signal handler"
        )]
        // SAFETY: the handler only stores to an atomic, which signal-safety(7) allows.
        unsafe {
            libc::signal(signal, handler as libc::sighandler_t);
        }
    }
}

/// Whether one of them came.
pub(crate) fn came() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}

/// Fails once one of them came.
pub(crate) fn check() -> anyhow::Result<()> {
    ensure!(!came(), "interrupted");
    Ok(())
}

/// Asks `probe` until it answers with a value, at most `timeout`; an error of the probe ends it at once.
pub(crate) fn wait_for<T>(
    what: &str,
    timeout: Duration,
    mut probe: impl FnMut() -> anyhow::Result<Option<T>>,
) -> anyhow::Result<T> {
    let begin = Instant::now();
    loop {
        check()?;
        if let Some(value) = probe()? {
            return Ok(value);
        }
        if begin.elapsed() >= timeout {
            bail!("waited {} s for {what}", timeout.as_secs());
        }
        // The pause between two questions.
        std::thread::sleep(Duration::from_millis(50));
    }
}
