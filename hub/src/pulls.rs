//! [`Pulls`]: what devices fetch right now. In memory only: it is old after seconds, and nothing is decided by it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use foreshore_protocol::api::PullView;
use foreshore_protocol::message::PullProgress;
use foreshore_protocol::{DeviceId, Digest};
use tokio::time::Instant;

/// What was not heard of again for so long is over: devices tell every two seconds, and some of it is lost.
const FRESH: Duration = Duration::from_secs(10);

/// Devices whose pulls are known at once; those that come after are not shown.
const DEVICES_MAX: usize = 100_000;

/// The pulls of all devices. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Pulls {
    devices: Arc<Mutex<Known>>,
}

#[derive(Debug, Default)]
struct Known {
    heard: BTreeMap<DeviceId, Heard>,
    swept: Option<Instant>,
}

#[derive(Debug)]
struct Heard {
    at: Instant,
    progress: PullProgress,
}

impl Pulls {
    /// A device told how far it is.
    pub fn note(&self, device: DeviceId, progress: PullProgress, now: Instant) {
        let mut known = self.known();
        if known.swept.is_none_or(|at| now >= at + FRESH) {
            known.heard.retain(|_, heard| now < heard.at + FRESH);
            known.swept = Some(now);
        }
        if known.heard.len() < DEVICES_MAX || known.heard.contains_key(&device) {
            known.heard.insert(device, Heard { at: now, progress });
        }
    }

    /// What a device fetches; `None` when it was not heard of lately.
    #[must_use]
    pub fn of(&self, device: &DeviceId, now: Instant) -> Option<PullView> {
        let known = self.known();
        let heard = known.heard.get(device)?;
        (now < heard.at + FRESH).then(|| PullView::from(&heard.progress))
    }

    /// The same, if it is for this release.
    #[must_use]
    pub fn of_release(&self, device: &DeviceId, release: Digest, now: Instant) -> Option<PullView> {
        let view = self.of(device, now)?;
        (view.release == release).then_some(view)
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        // A map of values is whole after any panic.
        self.devices.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn progress(release: &[u8]) -> PullProgress {
        PullProgress {
            boot: 1,
            release: Digest::of(release),
            images: vec![],
            rate_bytes: 0,
        }
    }

    #[test]
    fn what_is_not_heard_of_again_is_over() {
        let pulls = Pulls::default();
        let [one, two]: [DeviceId; 2] = ["one", "two"].map(|id| id.parse().unwrap());
        let begin = Instant::now();
        let second = |count| begin + Duration::from_secs(count);
        pulls.note(one.clone(), progress(b"1"), second(0));
        assert!(pulls.of(&one, second(9)).is_some());
        assert_eq!(pulls.of(&one, second(10)), None);
        assert_eq!(pulls.of(&two, second(0)), None);
        pulls.note(two.clone(), progress(b"2"), second(11));
        assert_eq!(pulls.known().heard.len(), 1, "the other is forgotten");
        let [first, second_release] = [b"1", b"2"].map(|text| Digest::of(text));
        assert_eq!(pulls.of_release(&two, first, second(12)), None);
        assert!(pulls.of_release(&two, second_release, second(12)).is_some());
    }
}
