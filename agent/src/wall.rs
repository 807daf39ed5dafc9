//! [`Wall`]: the wall clock, and whether it is to be believed. Only windows ask; everything else goes by clocks that do not
//! jump.
//!
//! In this order, what counts is
//!
//! 1. the device's own clock, while the kernel says that something keeps it synchronized (adjtimex(2), `STA_UNSYNC`), or
//!    `[time] trust_clock` says that it is kept right;
//! 2. what the hub said when it acknowledged a report of this agent, carried on by `CLOCK_BOOTTIME` for a week at most.
//!
//! A time before 2026 or after 2099 is none, nor is one of the device's that is before what the hub told everybody last.

use crate::clock;
use crate::plan::{BootMs, WallClock};

/// 2026-01-01: no agent is older.
const EARLIEST_MS: u64 = 1_767_225_600_000;

/// 2100-01-01: where counters of 32 bits end, clocks are wrong in other ways.
const LATEST_MS: u64 = 4_102_444_800_000;

/// An answer that took longer does not say what time it is now.
const ANSWER_MAX_MS: u64 = 60_000;

/// A clock that nobody corrects is off by a minute after a week or so (100 parts in a million).
const CARRIED_MAX_MS: u64 = 7 * 86_400_000;

/// How much the clocks of hub and device may differ, so that neither is called wrong.
const SLACK_MS: u64 = 10 * 60_000;

/// What is known of the time of day.
#[derive(Debug)]
pub struct Wall {
    trust_clock: bool,
    not_before: Option<u64>,
    heard: Option<(u64, BootMs)>,
}

impl Wall {
    /// Nothing is known yet. With `trust_clock` the device's clock counts whatever the kernel says.
    #[must_use]
    pub const fn new(trust_clock: bool) -> Self {
        Self {
            trust_clock,
            not_before: None,
            heard: None,
        }
    }

    /// The hub has told everybody, at some time before now, that it was `unix_ms`.
    pub const fn not_before(&mut self, unix_ms: u64) {
        if is_plausible(unix_ms) {
            self.not_before = Some(unix_ms);
        }
    }

    /// The hub answered us that it was `unix_ms`, at most `took` ago.
    pub fn hear(&mut self, unix_ms: u64, took: std::time::Duration, now: BootMs) {
        let took = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
        if is_plausible(unix_ms) && took <= ANSWER_MAX_MS {
            self.heard = Some((unix_ms.saturating_add(took / 2), now));
        }
    }

    /// What time it is. Reads the clocks.
    #[must_use]
    pub fn read(&self, now: BootMs) -> WallClock {
        self.judge(clock::unix_ms(), clock::is_synchronized(), now)
    }

    fn judge(&self, own: u64, synchronized: bool, now: BootMs) -> WallClock {
        let floor = self.not_before.unwrap_or(0).saturating_sub(SLACK_MS);
        let kept_right = synchronized || self.trust_clock;
        if kept_right && is_plausible(own) && own >= floor {
            return WallClock::Trusted(own);
        }
        let carried = |(heard, at): &(u64, BootMs)| {
            let since = now.since(*at);
            (since <= CARRIED_MAX_MS).then(|| heard.saturating_add(since))
        };
        if let Some(time) = self.heard.as_ref().and_then(carried) {
            return WallClock::Trusted(time);
        }
        let why = if !kept_right {
            "nothing keeps its clock synchronized, and the hub has not told it the time"
        } else if own < floor {
            "its clock is behind what the hub said before"
        } else {
            "its clock is not set"
        };
        WallClock::Untrusted(why.to_owned())
    }
}

const fn is_plausible(unix_ms: u64) -> bool {
    EARLIEST_MS <= unix_ms && unix_ms < LATEST_MS
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const NOW: u64 = 1_800_000_000_000;
    const SECOND: Duration = Duration::from_secs(1);

    fn trusted(clock: &WallClock) -> Option<u64> {
        match clock {
            WallClock::Trusted(time) => Some(*time),
            WallClock::Untrusted(_) => None,
        }
    }

    #[test]
    fn an_own_clock_counts_only_while_it_is_kept_right() {
        let boot = BootMs(5_000);
        let time =
            |trust, own, synchronized| trusted(&Wall::new(trust).judge(own, synchronized, boot));
        assert_eq!(time(false, NOW, true), Some(NOW));
        assert_eq!(time(false, NOW, false), None);
        assert_eq!(time(true, NOW, false), Some(NOW));
        // 1970, and 2106, where 32 bits end: never, whoever says so.
        for own in [
            0,
            12_345_000,
            EARLIEST_MS - 1,
            LATEST_MS,
            4_294_967_295_000,
            u64::MAX,
        ] {
            assert_eq!(time(true, own, true), None, "{own}");
            let mut wall = Wall::new(true);
            wall.hear(own, SECOND, boot);
            wall.not_before(own);
            assert_eq!(trusted(&wall.judge(own, true, boot)), None, "{own}");
        }
    }

    #[test]
    fn the_hubs_time_is_carried_on_for_a_week() {
        let mut wall = Wall::new(false);
        wall.hear(NOW, SECOND, BootMs(10_000));
        assert_eq!(
            trusted(&wall.judge(0, false, BootMs(70_000))),
            Some(NOW + 60_500)
        );
        // An own clock that is kept right goes before.
        let own = NOW + 7_000_000;
        assert_eq!(trusted(&wall.judge(own, true, BootMs(70_000))), Some(own));
        let week = BootMs(10_000 + CARRIED_MAX_MS);
        assert!(trusted(&wall.judge(0, false, week)).is_some());
        assert_eq!(trusted(&wall.judge(0, false, week.plus(1))), None);
        // Too long on its way.
        wall.hear(NOW, Duration::from_secs(61), week.plus(1));
        assert_eq!(trusted(&wall.judge(0, false, week.plus(1))), None);
    }

    #[test]
    fn an_own_clock_behind_what_the_hub_told_everybody_is_none() {
        let mut wall = Wall::new(true);
        wall.not_before(NOW);
        assert_eq!(
            trusted(&wall.judge(NOW - 1, true, BootMs(1))),
            Some(NOW - 1)
        );
        let behind = NOW - SLACK_MS - 1;
        let WallClock::Untrusted(why) = wall.judge(behind, true, BootMs(1)) else {
            panic!("believed");
        };
        assert_eq!(why, "its clock is behind what the hub said before");
        wall.hear(NOW + 5_000, Duration::ZERO, BootMs(1));
        assert_eq!(
            trusted(&wall.judge(behind, true, BootMs(1))),
            Some(NOW + 5_000)
        );
    }
}
