//! When the power is cut: a pure function of the seed.

use std::time::Duration;

/// One cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Moment {
    /// This long after an update was applied, as a fraction of what one takes undisturbed, in thousandths.
    Update(u64),
    /// The same, and once more while the machine comes back: after this fraction of what that takes.
    UpdateAndRecovery(u64, u64),
}

/// Updates are cut up to a quarter later than they usually take, so that quiet devices are hit too.
const LATEST: u64 = 1250;

/// The moments of a whole run. They are spread over the update, one in each part of it, in mixed order: few cuts
/// see as much of it as they can.
pub(super) fn moments(seed: u64, cuts: u32) -> Vec<Moment> {
    let mut random = Random(seed);
    let parts = u64::from(cuts.max(1));
    let mut order: Vec<u64> = (0..u64::from(cuts)).collect();
    for last in (1..order.len()).rev() {
        let other = random.below(last as u64 + 1);
        order.swap(last, usize::try_from(other).unwrap_or(last));
    }
    order
        .into_iter()
        .map(|part| {
            let begin = part * LATEST / parts;
            let moment = begin + random.below(LATEST / parts + 1);
            // Every third recovery is cut as well.
            if random.below(3) == 0 {
                Moment::UpdateAndRecovery(moment, random.below(1000))
            } else {
                Moment::Update(moment)
            }
        })
        .collect()
}

/// A fraction, in thousandths, of a duration.
pub(super) fn fraction(of: Duration, thousandths: u64) -> Duration {
    let milliseconds = u64::try_from(of.as_millis()).unwrap_or(u64::MAX);
    Duration::from_millis(milliseconds.saturating_mul(thousandths) / 1000)
}

/// SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators").
#[derive(Debug)]
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Below `limit`, which is not 0; the little unevenness does not matter here.
    const fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn first(moment: Moment) -> u64 {
        match moment {
            Moment::Update(at) | Moment::UpdateAndRecovery(at, _) => at,
        }
    }

    #[test]
    fn a_seed_gives_the_same_moments_and_another_one_others() {
        assert_eq!(moments(7, 20), moments(7, 20));
        assert_ne!(moments(7, 20), moments(8, 20));
        assert!(moments(7, 0).is_empty());
    }

    #[test]
    fn moments_are_spread_over_the_whole_update() {
        for seed in 0..50 {
            let mut times: Vec<u64> = moments(seed, 10).into_iter().map(first).collect();
            times.sort_unstable();
            for (part, time) in times.iter().enumerate() {
                let begin = part as u64 * LATEST / 10;
                assert!((begin..=begin + LATEST / 10).contains(time), "{times:?}");
            }
        }
    }

    #[test]
    fn recoveries_are_cut_too() {
        let both = moments(1, 60)
            .into_iter()
            .filter(|moment| matches!(moment, Moment::UpdateAndRecovery(..)))
            .count();
        assert!((8..32).contains(&both), "{both} of 60");
    }
}
