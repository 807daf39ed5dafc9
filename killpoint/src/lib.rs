//! Kill points: named places, each at one step of changing what is on disk or what runs, at which a test cuts
//! the power.
//!
//! [`reached`] marks a place. In a build with debug assertions, or with the feature `failpoints`, it looks at the
//! environment of the process; in any other build it is an empty function without arguments to work out, so that
//! devices carry nothing of it.
//!
//! | variable | meaning |
//! |---|---|
//! | `FORESHORE_KILL_AT=OBJECT.STEP#N` | the process that reaches it for the `N`th time (from 1) kills itself with SIGKILL; once for each log |
//! | `FORESHORE_KILL_AT=OBJECT.STEP#N+agent` | and its parent first, if that has the same order: the agent whose child it is |
//! | `FORESHORE_KILL_LOG=FILE` | every point that is reached is appended to it, a line each; the one that kills as `!OBJECT.STEP PID` or `!OBJECT.STEP PID+PARENT` |
//! | `FORESHORE_FAULT=KIND:OBJECT` | state is written wrongly, so that a test sees its checks notice ([`fault`]) |
//! | `FORESHORE_WRITE_ERROR=FILE` | while `FILE` exists, writes of state files fail with the errno in it ([`failure`]) |
//!
//! SIGKILL keeps what was handed to the kernel, as a real power cut does not: what a medium makes of writes that
//! were not flushed is tested by damaging files.

/// Every kill point of a device, as `OBJECT.STEP`. The power-cut test fails when one of them is never reached, and a debug build
/// panics at one that is not listed.
pub const ALL: &[&str] = &[
    // State files (agent/src/state): each is written aside, flushed and renamed.
    "head.created",
    "head.torn",
    "head.written",
    "head.synced",
    "head.renamed",
    "head.durable",
    "counters.created",
    "counters.torn",
    "counters.written",
    "counters.synced",
    "counters.renamed",
    "counters.durable",
    "history.created",
    "history.torn",
    "history.written",
    "history.synced",
    "history.renamed",
    "history.durable",
    "events.created",
    "events.torn",
    "events.written",
    "events.synced",
    "events.renamed",
    "events.durable",
    "events.append-torn",
    "events.appended",
    "release.created",
    "release.torn",
    "release.written",
    "release.synced",
    "release.renamed",
    "release.durable",
    "release.removed",
    "damaged.set-aside",
    "damaged.durable",
    "unfinished.removed",
    // Between deciding and doing (agent/src/reconcile, execute).
    "accept.stored",
    "accept.acknowledged",
    "plan.stored",
    "outcome.recorded",
    "stage.begun",
    "stage.done",
    "stop.begun",
    "stop.done",
    "remove.begun",
    "remove.done",
    "start.begun",
    "start.done",
    "collect.begun",
    "collect.images-gone",
    "collect.done",
    // Containers (agent/src/runtime, shim).
    "container.created",
    "container.recorded",
    "container.described",
    "container.named",
    "container.spawned",
    "container.reported",
    "container.signalled",
    "container.killed",
    "container.cgroup-gone",
    "container.layer-gone",
    "container.moved-away",
    "container.gone",
    "shim.recorded",
    "shim.mounted",
    "shim.built",
    "shim.adoptable",
    "shim.started",
    "shim.reported",
    "shim-program.created",
    "shim-program.synced",
    "shim-program.renamed",
    // The image store (images/src).
    "blob.written",
    "blob.synced",
    "blob.renamed",
    "blob.durable",
    "blob.removed",
    "partial.appended",
    "partial.removed",
    "layer.fetched",
    "layer.unpacked",
    "layer.flushed",
    "layer.beside",
    "layer.set-aside",
    "layer.renamed",
    "layer.durable",
    "layer.moved-away",
    "layer.deleted",
    "layer.record-gone",
    "ledger.renamed",
    "layer-record.torn",
    "layer-record.written",
    "layer-record.synced",
    "layer-record.renamed",
    "layer-record.durable",
    "image-record.torn",
    "image-record.written",
    "image-record.synced",
    "image-record.renamed",
    "image-record.durable",
    "image.set-aside",
    "image.removed",
];

/// Every kill point of the hub, as `OBJECT.STEP`; its registry test goes through them.
pub const HUB: &[&str] = &[
    // Pushes to the registry (hub/src/registry).
    "upload.created",
    "upload.begun",
    "upload.received",
    "upload.leased",
    "upload.renamed",
    "upload.durable",
    "upload.finished",
    "manifest.stored",
    "manifest.recorded",
];

#[cfg(any(debug_assertions, feature = "failpoints"))]
const VARIABLES: [&str; 2] = ["FORESHORE_KILL_AT", "FORESHORE_KILL_LOG"];

/// The error of a medium that fails: that of the errno in the file that `FORESHORE_WRITE_ERROR` names, while there is
/// such a file.
///
/// # Errors
///
/// With that error.
#[cfg(any(debug_assertions, feature = "failpoints"))]
pub fn failure() -> std::io::Result<()> {
    let errno = std::env::var_os("FORESHORE_WRITE_ERROR")
        .and_then(|path| std::fs::read_to_string(path).ok())
        .and_then(|text| text.trim().parse().ok());
    errno.map_or(Ok(()), |errno| {
        Err(std::io::Error::from_raw_os_error(errno))
    })
}

/// The error of a medium that fails; none in this build.
///
/// # Errors
///
/// None.
#[cfg(not(any(debug_assertions, feature = "failpoints")))]
#[inline(always)]
pub const fn failure() -> std::io::Result<()> {
    Ok(())
}

/// Whether `FORESHORE_FAULT` asks for this fault in the writing of `object`, as `KIND:OBJECT`: a test puts it into the
/// program to see that its checks notice.
#[cfg(any(debug_assertions, feature = "failpoints"))]
#[must_use]
pub fn fault(kind: &str, object: &str) -> bool {
    let asked = std::env::var("FORESHORE_FAULT");
    asked.is_ok_and(|asked| asked.split_once(':') == Some((kind, object)))
}

/// Whether a test asks for a fault; never in this build.
#[cfg(not(any(debug_assertions, feature = "failpoints")))]
#[inline(always)]
#[must_use]
pub const fn fault(_kind: &str, _object: &str) -> bool {
    false
}

/// What a child whose environment is cleared must be given to have kill points too; nothing in a build without.
#[cfg(any(debug_assertions, feature = "failpoints"))]
pub fn passed_on() -> impl Iterator<Item = (&'static str, std::ffi::OsString)> {
    VARIABLES
        .into_iter()
        .filter_map(|name| Some((name, std::env::var_os(name)?)))
}

/// What a child whose environment is cleared must be given to have kill points too; nothing in this build.
#[cfg(not(any(debug_assertions, feature = "failpoints")))]
#[inline(always)]
pub fn passed_on() -> std::iter::Empty<(&'static str, std::ffi::OsString)> {
    std::iter::empty()
}

/// The kill point `object.step`: the caller has just done that step. Does nothing unless a test asks for it.
///
/// # Panics
///
/// In a build with kill points, when it is neither in [`ALL`] nor in [`HUB`].
#[cfg(any(debug_assertions, feature = "failpoints"))]
pub fn reached(object: &str, step: &str) {
    armed::reached(object, step);
}

/// The kill point `object.step`. Empty in this build.
#[cfg(not(any(debug_assertions, feature = "failpoints")))]
#[inline(always)]
pub const fn reached(_object: &str, _step: &str) {}

/// The kill point `object.step` in the middle of writing `bytes`: when a test asks for it, hands half of them to
/// `write` and kills the process. Otherwise does nothing.
///
/// # Panics
///
/// As [`reached`].
#[cfg(any(debug_assertions, feature = "failpoints"))]
pub fn torn(
    object: &str,
    step: &str,
    bytes: &[u8],
    write: impl FnOnce(&[u8]) -> std::io::Result<()>,
) {
    armed::torn(object, step, bytes, write);
}

/// The kill point `object.step` in the middle of a write. Empty in this build.
#[cfg(not(any(debug_assertions, feature = "failpoints")))]
#[inline(always)]
pub fn torn(
    _object: &str,
    _step: &str,
    _bytes: &[u8],
    _write: impl FnOnce(&[u8]) -> std::io::Result<()>,
) {
}

#[cfg(any(debug_assertions, feature = "failpoints"))]
mod armed {
    use std::collections::BTreeMap;
    use std::io::Write as _;
    use std::path::PathBuf;
    use std::sync::{Mutex, OnceLock, PoisonError};

    use rustix::process::{Pid, Signal, getpid, getppid, kill_process};

    use super::{ALL, HUB, VARIABLES};

    #[derive(Debug)]
    struct Order {
        /// Where to die, and at which time of passing.
        at: Option<(String, u32)>,
        parent: bool,
        log: Option<PathBuf>,
        passed: Mutex<BTreeMap<String, u32>>,
    }

    fn order() -> Option<&'static Order> {
        static ORDER: OnceLock<Option<Order>> = OnceLock::new();
        ORDER
            .get_or_init(|| {
                let [at, log] = VARIABLES.map(std::env::var);
                if at.is_err() && log.is_err() {
                    return None;
                }
                let at = at.unwrap_or_default();
                let (at, parent) = at
                    .strip_suffix("+agent")
                    .map_or((&*at, false), |at| (at, true));
                let at = at
                    .split_once('#')
                    .and_then(|(name, times)| Some((name.to_owned(), times.parse().ok()?)));
                Some(Order {
                    at,
                    parent,
                    log: log.ok().map(PathBuf::from),
                    passed: Mutex::default(),
                })
            })
            .as_ref()
    }

    impl Order {
        /// Notes that a point was reached; whether this is where to die.
        fn pass(&self, name: &str) -> bool {
            let mut passed = self.passed.lock().unwrap_or_else(PoisonError::into_inner);
            let times = passed.entry(name.to_owned()).or_default();
            *times += 1;
            let here = self
                .at
                .as_ref()
                .is_some_and(|(at, when)| at == name && when == times)
                && !self.is_done();
            if let Some(log) = &self.log {
                let line = if here {
                    format!("!{name} {}\n", self.victims())
                } else {
                    format!("{name}\n")
                };
                let file = std::fs::File::options().create(true).append(true).open(log);
                // One write, so that lines of several processes do not mix.
                let written = file.and_then(|mut file| file.write_all(line.as_bytes()));
                if let Err(error) = written {
                    eprintln!("kill point {name}: {}: {error}", log.display());
                }
            }
            here
        }

        /// Whether another process has carried the order out; children are started again.
        fn is_done(&self) -> bool {
            let log = self.log.as_ref().map(std::fs::read_to_string);
            log.is_some_and(|text| text.is_ok_and(|text| text.contains('!')))
        }

        /// The parent, when it is to die too and was given the order as well.
        fn parent(&self) -> Option<Pid> {
            // Not by its program: children run a sealed copy of the agent's.
            let ordered = |parent: &Pid| {
                let environment = std::fs::read(format!("/proc/{parent}/environ"));
                let order = format!("{}=", VARIABLES[0]);
                environment.is_ok_and(|bytes| {
                    bytes
                        .split(|byte| *byte == 0)
                        .any(|entry| entry.starts_with(order.as_bytes()))
                })
            };
            getppid().filter(|parent| self.parent && ordered(parent))
        }

        /// Who dies, as `PID` or `PID+PID`.
        fn victims(&self) -> String {
            let own = getpid();
            self.parent()
                .map_or_else(|| own.to_string(), |parent| format!("{own}+{parent}"))
        }

        fn die(&self) -> ! {
            if let Some(parent) = self.parent() {
                let _gone_already = kill_process(parent, Signal::KILL);
            }
            let _never_returns = kill_process(getpid(), Signal::KILL);
            unreachable!("SIGKILL cannot be survived")
        }
    }

    fn name(object: &str, step: &str) -> String {
        let name = format!("{object}.{step}");
        assert!(
            ALL.contains(&&*name) || HUB.contains(&&*name),
            "kill point {name} is not listed"
        );
        name
    }

    pub(super) fn reached(object: &str, step: &str) {
        if let Some(order) = order()
            && order.pass(&name(object, step))
        {
            order.die();
        }
    }

    pub(super) fn torn(
        object: &str,
        step: &str,
        bytes: &[u8],
        write: impl FnOnce(&[u8]) -> std::io::Result<()>,
    ) {
        if let Some(order) = order()
            && order.pass(&name(object, step))
        {
            let _dies_either_way = write(&bytes[..bytes.len() / 2]);
            order.die();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_point_is_listed_once_and_has_an_object_and_a_step() {
        let all: Vec<&str> = ALL.iter().chain(HUB).copied().collect();
        for (place, name) in all.iter().enumerate() {
            assert!(!all[..place].contains(name), "{name} is listed twice");
            assert_eq!(name.split('.').count(), 2, "{name}");
        }
    }

    #[test]
    fn nothing_happens_unless_asked_for() {
        reached("head", "created");
        torn("head", "torn", b"bytes", |_| unreachable!("nobody asked"));
    }
}
