//! PURE: how fast one device may publish. It is slowed down, never cut short: its next packet is read later.

use std::time::{Duration, Instant};

/// What a device may send at once after a rest, in seconds of its rate: an outbox that has filled up offline.
const BURST_SECONDS: f64 = 10.0;

/// What one device may still send.
#[derive(Debug, Clone)]
pub(super) struct Pace {
    messages: Bucket,
    bytes: Bucket,
}

impl Pace {
    pub(super) fn new(messages_per_second: u32, bytes_per_second: u32, now: Instant) -> Self {
        Self {
            messages: Bucket::new(messages_per_second, now),
            bytes: Bucket::new(bytes_per_second, now),
        }
    }

    /// Takes one message of so many bytes; how long to wait before it is passed on.
    pub(super) fn take(&mut self, bytes: usize, now: Instant) -> Duration {
        self.messages.take(1, now).max(self.bytes.take(bytes, now))
    }
}

#[derive(Debug, Clone)]
struct Bucket {
    per_second: f64,
    left: f64,
    at: Instant,
}

impl Bucket {
    fn new(per_second: u32, now: Instant) -> Self {
        let per_second = f64::from(per_second.max(1));
        Self {
            per_second,
            left: per_second * BURST_SECONDS,
            at: now,
        }
    }

    fn take(&mut self, amount: usize, now: Instant) -> Duration {
        let rested = now.saturating_duration_since(self.at).as_secs_f64();
        self.at = self.at.max(now);
        // A packet is far below 4 GiB.
        let amount = f64::from(u32::try_from(amount).unwrap_or(u32::MAX));
        self.left =
            (self.left + rested * self.per_second).min(self.per_second * BURST_SECONDS) - amount;
        if self.left >= 0.0 {
            Duration::ZERO
        } else {
            Duration::from_secs_f64(-self.left / self.per_second)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_passes_and_then_the_rate_holds() {
        let start = Instant::now();
        let mut pace = Pace::new(10, 1_000_000, start);
        for _ in 0..100 {
            assert_eq!(pace.take(1, start), Duration::ZERO);
        }
        assert_eq!(pace.take(1, start), Duration::from_millis(100));
        // Whoever waits as told pays one message at a time.
        let mut now = start + Duration::from_millis(100);
        for _ in 0..50 {
            let wait = pace.take(1, now);
            assert!(
                (Duration::from_millis(99)..Duration::from_millis(101)).contains(&wait),
                "{wait:?}"
            );
            now += wait;
        }
        assert_eq!(
            pace.take(1, now + Duration::from_secs(3600)),
            Duration::ZERO
        );
    }

    #[test]
    fn bytes_count_too_and_a_clock_that_stands_still_is_harmless() {
        let start = Instant::now();
        let mut pace = Pace::new(1_000_000, 1000, start);
        assert_eq!(pace.take(10_000, start), Duration::ZERO);
        assert_eq!(pace.take(500, start), Duration::from_millis(500));
        assert!(pace.take(0, start - Duration::from_millis(1)) <= Duration::from_millis(500));
    }
}
