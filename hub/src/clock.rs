//! [`HubClock`]: the hub's time, which never jumps while it runs.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use crate::rollout::UnixMs;

/// Milliseconds since 1970, taken from the wall clock once and carried on by the monotonic clock.
///
/// A wall clock that NTP sets right an hour after boot would otherwise end every deadline at once.
#[derive(Debug, Clone, Copy)]
pub struct HubClock {
    base: UnixMs,
    started: Instant,
}

impl HubClock {
    /// A clock that begins at the wall clock's time, but not before `earliest` (the latest time that the store
    /// holds): a machine without a battery-backed clock must not go back before what it did yesterday.
    #[must_use]
    pub fn start(earliest: UnixMs) -> Self {
        Self {
            base: wall_clock().max(earliest),
            started: Instant::now(),
        }
    }

    /// What it shows now.
    #[must_use]
    pub fn now(&self) -> UnixMs {
        let elapsed = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.base.plus(elapsed)
    }
}

/// The wall clock; 1970 for a clock that stands before it.
#[must_use]
pub fn wall_clock() -> UnixMs {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    UnixMs(since.map_or(0, |since| {
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_never_begins_before_what_the_store_holds() {
        let future = wall_clock().plus(1_000_000);
        let clock = HubClock::start(future);
        assert!(clock.now() >= future);
        assert!(HubClock::start(UnixMs(0)).now() >= UnixMs(1_600_000_000_000));
    }
}
