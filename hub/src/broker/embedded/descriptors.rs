//! How many devices the process has file descriptors for.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// File descriptors for everything but devices: SQLite, HTTP, images.
const KEPT: u64 = 512;

/// For one connected device: the gate's two, rmqtt's one, and two for sessions of devices that are away. rmqtt holds
/// the socket of a lost connection until its session ends.
const EACH: u64 = 3 + SESSIONS_EACH as u64;

/// Sessions that may be kept for each connection that may be open.
pub(super) const SESSIONS_EACH: usize = 2;

/// Raises the soft limit of open files to the hard one; as many connections of `wanted` as then fit.
pub(super) fn connections(wanted: usize) -> usize {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    let current = match setrlimit(Resource::Nofile, raised) {
        Ok(()) => limit.maximum,
        Err(_) => limit.current,
    };
    let fit = current.map_or(usize::MAX, fit);
    if fit < wanted {
        tracing::info!(descriptors = ?current, connections = fit, "the limit of open files (ulimit -n) bounds the devices");
    }
    fit.min(wanted)
}

fn fit(descriptors: u64) -> usize {
    let fit = descriptors.saturating_sub(KEPT) / EACH;
    usize::try_from(fit).unwrap_or(usize::MAX).max(16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_leave_descriptors_for_the_rest() {
        assert_eq!(fit(0), 16);
        assert_eq!(fit(1024), 102);
        assert_eq!(fit(20_000), 3897);
        assert_eq!(fit(524_288), 104_755);
    }
}
