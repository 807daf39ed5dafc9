//! PURE: what the broker refused, and how long each of it rests before it is tried again. All else goes past it.

use std::collections::BTreeMap;
use std::time::Duration;

use foreshore_protocol::{DeviceId, Digest, Version};
use tokio::time::Instant;

/// The first rest; doubled with each refusal in a row.
const FIRST: Duration = Duration::from_secs(5);

/// The longest rest.
const LONGEST: Duration = Duration::from_secs(600);

/// What can be refused.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Key {
    /// A release.
    Release(Digest),
    /// A device's head of that version. The next one may be another matter, and does not rest.
    Head(DeviceId, Version),
    /// A device's bundle of secrets of that version.
    Secrets(DeviceId, Version),
}

#[derive(Debug, Clone, Copy)]
struct Rest {
    until: Instant,
    tries: u32,
}

/// What rests. It begins empty with each connection: another broker may have other rules.
#[derive(Debug, Clone, Default)]
pub(super) struct Rests {
    rests: BTreeMap<Key, Rest>,
}

impl Rests {
    /// Whether it is not the time of a release yet.
    pub(super) fn holds_release(&self, digest: &Digest, now: Instant) -> bool {
        let rest = self.rests.get(&Key::Release(*digest));
        rest.is_some_and(|rest| rest.until > now)
    }

    /// Whether it is not the time of a device's head yet, which is of `version` or a later one.
    pub(super) fn holds_head(&self, device: &DeviceId, version: Version, now: Instant) -> bool {
        self.rests
            .range(Key::Head(device.clone(), version)..)
            .take_while(|(key, _)| matches!(key, Key::Head(of, _) if of == device))
            .any(|(_, rest)| rest.until > now)
    }

    /// The same for its bundle of secrets.
    pub(super) fn holds_secrets(&self, device: &DeviceId, version: Version, now: Instant) -> bool {
        let rest = self.rests.get(&Key::Secrets(device.clone(), version));
        rest.is_some_and(|rest| rest.until > now)
    }

    /// Takes note of a refusal; true if it is the first one in a row.
    pub(super) fn refused(&mut self, key: Key, now: Instant) -> bool {
        let rest = self.rests.entry(key).or_insert(Rest {
            until: now,
            tries: 0,
        });
        rest.until = now + FIRST.saturating_mul(1 << rest.tries.min(16)).min(LONGEST);
        rest.tries += 1;
        rest.tries == 1
    }

    /// Takes note that the broker took it.
    pub(super) fn taken(&mut self, key: &Key) {
        self.rests.remove(key);
    }

    /// When the next rest ends; drops what ended long ago, as it waits for nothing any more.
    pub(super) fn next(&mut self, now: Instant) -> Option<Instant> {
        self.rests.retain(|_, rest| rest.until + LONGEST > now);
        let coming = self.rests.values().map(|rest| rest.until);
        coming.filter(|until| *until > now).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_newer_head_does_not_rest() {
        let version = |generation| Version::from_numbers(1, generation).unwrap();
        let device = |name: &str| name.parse::<DeviceId>().unwrap();
        let (mut rests, now) = (Rests::default(), Instant::now());
        rests.refused(Key::Head(device("b"), version(7)), now);
        assert!(rests.holds_head(&device("b"), version(7), now));
        assert!(
            rests.holds_head(&device("b"), version(6), now),
            "a row may ask for less than is sent"
        );
        assert!(!rests.holds_head(&device("b"), version(8), now));
        assert!(!rests.holds_head(&device("a"), version(1), now));
    }

    #[test]
    fn rests_grow_and_end_and_only_the_first_refusal_is_news() {
        let (bad, other) = (Digest::of(b"1"), Digest::of(b"2"));
        let key = Key::Release(bad);
        let (mut rests, mut now) = (Rests::default(), Instant::now());
        for (tries, seconds) in [5, 10, 20, 40, 80, 160, 320, 600, 600]
            .into_iter()
            .enumerate()
        {
            assert_eq!(rests.refused(key.clone(), now), tries == 0);
            let end = now + Duration::from_secs(seconds);
            assert_eq!(rests.next(now), Some(end));
            assert!(rests.holds_release(&bad, now) && !rests.holds_release(&other, now));
            now = end;
            assert!(!rests.holds_release(&bad, now), "try {tries}");
        }
        rests.taken(&key);
        assert!(rests.refused(key.clone(), now));
        assert_eq!(rests.next(now + 3 * LONGEST), None);
        assert!(
            rests.rests.is_empty(),
            "what nobody tried again is forgotten"
        );
    }
}
