//! PURE: how many events the hub takes from a device, whoever its broker is.
//!
//! Events go into a log that all devices share. What is not taken is not acknowledged either, so that the device
//! keeps it, within its bounds, and sends it again.

use crate::rollout::UnixMs;

/// One more event of a device is taken after so long: ten a second.
const EACH_MS: u64 = 100;

/// What a rested device may send at once: 1,000 events, which is all that an agent keeps.
const BURST_MS: u64 = 1_000 * EACH_MS;

/// Takes one event, if it may be taken now: the virtual scheduling form of the generic cell rate algorithm (ITU-T I.371).
/// `paid` is when all that were taken would have come, had they come evenly; returned is what it is with this one.
pub(super) fn take(paid: UnixMs, now: UnixMs) -> Option<UnixMs> {
    let latest = now.0.saturating_add(BURST_MS);
    let paid = match paid.0 {
        // The clock was set back: what it was before says nothing.
        paid if paid > latest => now.0,
        paid => paid.max(now.0),
    };
    let paid = paid.saturating_add(EACH_MS);
    (paid <= latest).then_some(UnixMs(paid))
}

/// Whether a device has nothing to make up for.
pub(super) const fn is_rested(paid: UnixMs, now: UnixMs) -> bool {
    paid.0 <= now.0
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many are taken at once.
    fn taken(paid: &mut UnixMs, now: u64) -> usize {
        let mut count = 0;
        while let Some(next) = take(*paid, UnixMs(now)) {
            (*paid, count) = (next, count + 1);
        }
        count
    }

    #[test]
    fn all_that_an_agent_keeps_is_taken_at_once_and_then_ten_a_second() {
        let start = 1_790_000_000_000;
        let mut paid = UnixMs(0);
        assert_eq!(taken(&mut paid, start), 1_000);
        assert_eq!(taken(&mut paid, start), 0);
        assert_eq!(taken(&mut paid, start + 99), 0);
        assert_eq!(taken(&mut paid, start + 1_000), 10);
        assert!(!is_rested(paid, UnixMs(start + 100_000)));
        assert!(is_rested(paid, UnixMs(start + 101_000)));
        assert_eq!(taken(&mut paid, start + 3_600_000), 1_000);
        // A clock that is set back silences nobody.
        assert_eq!(taken(&mut paid, start - 3_600_000), 1_000);
    }
}
