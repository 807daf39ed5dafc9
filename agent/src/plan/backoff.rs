//! How long to wait before trying again: doubling, capped, and spread by a hash instead of randomness.

use foreshore_protocol::Digest;

use super::BootId;

/// A container that ran this long was stable: its next end counts as the first. Docker uses 10 s and
/// Kubernetes 10 min; a service that dies every minute is not stable.
pub(super) const STABLE_MS: u64 = 600_000;

const RESTART_FIRST_MS: u64 = 1_000;
const RESTART_LAST_MS: u64 = 300_000;
const STAGING_FIRST_MS: u64 = 2_000;
const STAGING_LAST_MS: u64 = 600_000;

/// How long a stop or remove that failed is left alone.
pub(super) const STUCK_MS: u64 = 10_000;

/// How long after the `failures`th end or failed start in a row until the next start: 1 s, doubling to
/// 5 min, shortened by up to a quarter.
pub(super) fn restart_delay_ms(boot: BootId, name: &str, failures: u32) -> u64 {
    spread(
        boot,
        name,
        failures,
        doubled(RESTART_FIRST_MS, RESTART_LAST_MS, failures),
    )
}

/// How long after the `failures`th failed staging in a row until the next: 2 s, doubling to 10 min,
/// shortened by up to a quarter.
pub(super) fn staging_delay_ms(boot: BootId, release: &Digest, failures: u32) -> u64 {
    let delay = doubled(STAGING_FIRST_MS, STAGING_LAST_MS, failures);
    spread(boot, &release.hex(), failures, delay)
}

fn doubled(first_ms: u64, last_ms: u64, failures: u32) -> u64 {
    let doublings = failures.saturating_sub(1).min(32);
    (first_ms << doublings).min(last_ms)
}

/// The boot id is random for each device and boot, so a fleet does not try again in step.
fn spread(boot: BootId, name: &str, failures: u32, delay_ms: u64) -> u64 {
    let mut seed = boot.0.to_vec();
    seed.extend_from_slice(&failures.to_le_bytes());
    seed.extend_from_slice(name.as_bytes());
    let hash = u64::from(Digest::of(&seed).as_bytes()[0]);
    delay_ms - delay_ms / 4 * hash / 255
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_double_to_their_cap_and_are_shortened_by_a_quarter_at_most() {
        for (failures, full) in [
            (0, 1_000),
            (1, 1_000),
            (2, 2_000),
            (5, 16_000),
            (9, 256_000),
            (10, 300_000),
            (u32::MAX, 300_000),
        ] {
            let delay = restart_delay_ms(BootId([7; 16]), "shop.web", failures);
            assert!(
                delay <= full && delay >= full - full / 4,
                "{failures}: {delay}"
            );
        }
    }

    #[test]
    fn two_devices_do_not_try_again_in_step() {
        let release = Digest::of(b"release");
        let delays: Vec<u64> = (0..16)
            .map(|device| staging_delay_ms(BootId([device; 16]), &release, 8))
            .collect();
        assert!(delays.iter().any(|delay| *delay != delays[0]), "{delays:?}");
    }
}
