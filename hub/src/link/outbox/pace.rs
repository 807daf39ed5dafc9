//! The set rate at which the hub publishes, so that a change for a large fleet drowns neither the broker nor the answers
//! that it causes.

use std::time::Duration;

use tokio::time::Instant;

/// The set rate: 4,000 messages a second.
const MESSAGE_EVERY: Duration = Duration::from_micros(250);

/// When the next page may go out. What was not used is not made up for.
#[derive(Debug)]
pub(super) struct Pace {
    next: Instant,
}

impl Pace {
    /// One by which nothing went out before `now`.
    pub(super) const fn new(now: Instant) -> Self {
        Self { next: now }
    }

    /// When so many messages may go out that are there at `now`. They are taken for sent then.
    pub(super) fn take(&mut self, now: Instant, messages: usize) -> Instant {
        let at = self.next.max(now);
        let messages = u32::try_from(messages).unwrap_or(u32::MAX);
        self.next = at + MESSAGE_EVERY.saturating_mul(messages);
        at
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn over_any_time_no_more_goes_out_than_a_page_and_the_set_rate() {
        let begin = Instant::now();
        let mut pace = Pace::new(begin);
        // Full pages without a pause, then seldom a few, then full ones again.
        let pages = [(0, 500), (1, 500), (2, 500), (400, 1), (2_000, 20)];
        let late = (0..10).map(|_| (2_001, 500));
        let sent: Vec<(Instant, u32)> = pages
            .into_iter()
            .chain(late)
            .map(|(ms, messages)| {
                let now = begin + Duration::from_millis(ms);
                let at = pace.take(now, usize::try_from(messages).unwrap());
                assert!(at >= now);
                (at, messages)
            })
            .collect();
        assert_eq!(sent[0].0, begin, "nothing waits without a reason");
        assert_eq!(sent[3].0, begin + Duration::from_millis(400));
        for first in 0..sent.len() {
            let mut messages = 0;
            for last in first..sent.len() {
                let allowed = MESSAGE_EVERY * messages;
                assert!(sent[last].0 - sent[first].0 >= allowed, "{first} to {last}");
                messages += sent[last].1;
            }
        }
    }
}
