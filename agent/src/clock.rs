//! The clocks of the device. Pure modules are given what these read.

use std::time::{SystemTime, UNIX_EPOCH};

use nix::time::{ClockId, clock_gettime};

use crate::plan::{BootId, BootMs, Now};

/// Reads `CLOCK_BOOTTIME` (clock_gettime(2)).
#[must_use]
pub fn boot_ms() -> BootMs {
    let time =
        clock_gettime(ClockId::CLOCK_BOOTTIME).expect("Linux has had CLOCK_BOOTTIME since 2.6.39");
    let seconds = u64::try_from(time.tv_sec()).unwrap_or(0);
    let nanos = u64::try_from(time.tv_nsec()).unwrap_or(0);
    BootMs(seconds * 1000 + nanos / 1_000_000)
}

/// Reads the boot id and `CLOCK_BOOTTIME`.
#[must_use]
pub fn now(boot: BootId) -> Now {
    Now {
        boot,
        ms: boot_ms(),
    }
}

/// This life of the kernel (random(4), `boot_id`).
///
/// # Errors
///
/// When `/proc` is not mounted or does not hold a UUID.
pub fn boot_id() -> std::io::Result<BootId> {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let digits: Vec<u8> = text
        .bytes()
        .filter_map(|byte| char::from(byte).to_digit(16))
        .filter_map(|digit| u8::try_from(digit).ok())
        .collect();
    let mut id = [0; 16];
    if digits.len() != 32 {
        return Err(std::io::Error::other("boot_id is not a UUID"));
    }
    for (byte, pair) in id.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = pair[0] << 4 | pair[1];
    }
    Ok(BootId(id))
}

/// The wall clock, milliseconds since 1970; may be wrong, and jumps when it is set.
///
/// A build with kill points (crate `foreshore-killpoint`) takes the number in the file that `FORESHORE_WALL_CLOCK` names
/// instead, if there is one: the machine's clock is not a test's to set.
#[must_use]
pub fn unix_ms() -> u64 {
    #[cfg(any(debug_assertions, feature = "failpoints"))]
    if let Some(set) = set_by_test() {
        return set;
    }
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(0))
}

/// Whether the kernel says that something keeps the wall clock synchronized (adjtimex(2)). A clock that a test set
/// ([`unix_ms`]) counts as such.
#[must_use]
pub fn is_synchronized() -> bool {
    #[cfg(any(debug_assertions, feature = "failpoints"))]
    if set_by_test().is_some() {
        return true;
    }
    #[expect(unsafe_code, reason = "no crate in the tree wraps adjtimex(2)")]
    // SAFETY: all zeros are a timex: it has numbers only. With no mode set nothing is changed, and the pointer is to a
    // place that lives through the call.
    let (state, timex) = unsafe {
        let mut timex: libc::timex = std::mem::zeroed();
        (libc::adjtimex(&raw mut timex), timex)
    };
    state >= 0 && timex.status & libc::STA_UNSYNC == 0
}

#[cfg(any(debug_assertions, feature = "failpoints"))]
fn set_by_test() -> Option<u64> {
    let path = std::env::var_os("FORESHORE_WALL_CLOCK")?;
    std::fs::read_to_string(path).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_boot_id_stays_and_boot_time_does_not_go_back() {
        assert_eq!(boot_id().unwrap(), boot_id().unwrap());
        assert_ne!(boot_id().unwrap(), BootId::default());
        let first = boot_ms();
        assert!(boot_ms() >= first && first > BootMs(0));
    }
}
