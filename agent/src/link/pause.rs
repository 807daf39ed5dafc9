//! [`Pause`]: how long to wait between two attempts to connect.

use std::time::Duration;

/// The first pause is up to this long.
const FIRST: Duration = Duration::from_secs(1);

/// A connection that lasts this long was no accident.
const HELD: Duration = Duration::from_secs(30);

/// Full-jitter back-off: each pause is a random part of a bound that doubles up to a maximum ("Exponential
/// Backoff And Jitter", AWS Architecture Blog, 2015). Without jitter a hub that comes back meets its whole
/// fleet in one second.
#[derive(Debug, Clone)]
pub struct Pause {
    max: Duration,
    bound: Duration,
    state: u64,
}

impl Pause {
    /// Pauses of at most `max`; `seed` should differ between devices.
    #[must_use]
    pub fn new(max: Duration, seed: u64) -> Self {
        Self {
            max: max.max(FIRST),
            bound: FIRST,
            state: seed,
        }
    }

    /// After a connection that lasted so long: short pauses again, unless it was over so soon that whatever ended it, as
    /// another device with the same name does, would be met again at once.
    pub fn held(&mut self, lasted: Duration) {
        if lasted >= HELD {
            self.bound = FIRST;
        }
    }

    /// The next pause: a random part of the bound, of `least` at least half and, for the first one after a
    /// lost connection, a random part of the hub's `spread` on top.
    pub fn next(&mut self, least: Duration, spread: Duration) -> Duration {
        let bound = self.bound.max(least).min(self.max);
        self.bound = (self.bound * 2).min(self.max);
        let floor = least.min(bound) / 2;
        floor + (bound - floor).mul_f64(self.fraction()) + spread.mul_f64(self.fraction())
    }

    /// SplitMix64 (Steele, Lea, Flood 2014): jitter needs no better.
    fn fraction(&mut self) -> f64 {
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^= mixed >> 31;
        f64::from(u32::try_from(mixed >> 32).expect("32 bits are left")) / f64::from(u32::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn pauses_stay_within_their_bounds(seed: u64, max_secs in 1_u64..3600, count in 1_usize..40) {
            let max = Duration::from_secs(max_secs);
            let mut pause = Pause::new(max, seed);
            let mut bound = FIRST;
            for _ in 0..count {
                let next = pause.next(Duration::ZERO, Duration::ZERO);
                prop_assert!(next <= bound.min(max));
                bound = (bound * 2).min(max);
            }
            let refused = pause.next(Duration::from_secs(30), Duration::ZERO);
            prop_assert!(refused >= Duration::from_secs(15).min(max / 2) && refused <= max.max(Duration::from_secs(1)));
        }
    }

    #[test]
    fn only_a_connection_that_lasted_makes_pauses_short_again() {
        let mut pause = Pause::new(Duration::from_secs(300), 1);
        for _ in 0..10 {
            pause.next(Duration::ZERO, Duration::ZERO);
            pause.held(HELD / 2);
        }
        assert_eq!(pause.bound, Duration::from_secs(300));
        pause.held(HELD);
        assert_eq!(pause.bound, FIRST);
    }

    #[test]
    fn two_devices_do_not_wait_alike() {
        let waits = |seed| -> Vec<Duration> {
            let mut pause = Pause::new(Duration::from_secs(300), seed);
            (0..8)
                .map(|_| pause.next(Duration::ZERO, Duration::ZERO))
                .collect()
        };
        assert_ne!(waits(1), waits(2));
        assert_eq!(waits(1), waits(1));
    }
}
