//! PURE: how many events the hub takes from each device, whoever its broker is.
//!
//! Events go into a log that all devices share. What is not taken is not acknowledged either, so that an honest device
//! keeps it and sends it again, later each time.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use foreshore_protocol::DeviceId;

/// One more event of a device is taken after so long: ten a second.
const EACH: Duration = Duration::from_millis(100);

/// So many are taken at once after a rest: all that an agent keeps.
const BURST: u32 = 1_000;

/// Below that many devices nobody is forgotten.
const KEEP: usize = 1_024;

/// What devices may still send: the virtual scheduling form of the generic cell rate algorithm (ITU-T I.371).
#[derive(Debug, Default)]
pub(super) struct Allowances {
    /// When all that was taken from a device would have come, had it come evenly. Who is not here is rested.
    paid: HashMap<DeviceId, Instant>,
    /// The rested are forgotten when there are so many.
    tidy_at: usize,
}

impl Allowances {
    /// Whether `count` events of `device` are taken now; a device gets none rather than some of them.
    pub(super) fn takes(&mut self, device: &DeviceId, count: u32, now: Instant) -> bool {
        let paid = self.paid.get(device).map_or(now, |paid| (*paid).max(now)) + EACH * count;
        if paid > now + EACH * BURST {
            return false;
        }
        if self.paid.len() >= self.tidy_at.max(KEEP) {
            self.paid.retain(|_, paid| *paid > now);
            self.tidy_at = 2 * self.paid.len();
        }
        self.paid.insert(device.clone(), paid);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_that_an_agent_keeps_is_taken_at_once_and_then_ten_a_second() {
        let (mut allowances, start) = (Allowances::default(), Instant::now());
        let [loud, quiet] = ["loud", "quiet"].map(|name| name.parse().unwrap());
        for _ in 0..20 {
            assert!(allowances.takes(&loud, 50, start));
        }
        assert!(!allowances.takes(&loud, 1, start));
        assert!(
            allowances.takes(&quiet, 1_000, start),
            "it is not its fault"
        );
        let mut taken = 0;
        for tenth in 0..600 {
            let now = start + EACH * tenth;
            taken += u32::from(allowances.takes(&loud, 2, now)) * 2;
        }
        assert!((598..=600).contains(&taken), "{taken}");
        let rested = start + Duration::from_secs(3600);
        assert!(!allowances.takes(&loud, 1_001, rested));
        assert!(allowances.takes(&loud, 1_000, rested));
    }

    #[test]
    fn who_rested_is_forgotten() {
        let (mut allowances, start) = (Allowances::default(), Instant::now());
        for number in 0..50_000_u32 {
            let device = format!("device-{number}").parse().unwrap();
            // Ten seconds' worth each, and a thousand new ones a second: ten thousand are not rested.
            assert!(allowances.takes(&device, 100, start + Duration::from_millis(number.into())));
            assert!(allowances.paid.len() <= 20_001, "{}", allowances.paid.len());
        }
    }
}
