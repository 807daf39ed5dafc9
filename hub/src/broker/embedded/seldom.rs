//! PURE: a line in the log that strangers can cause is written so often at most, with the number left out.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Lets one through in a while.
#[derive(Debug)]
pub(super) struct Seldom {
    every: Duration,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    last: Option<Instant>,
    left_out: u64,
}

impl Seldom {
    pub(super) fn new(every: Duration) -> Self {
        Self {
            every,
            state: Mutex::default(),
        }
    }

    /// How many were left out since the last one, if this one is due; counts it otherwise.
    pub(super) fn due(&self, now: Instant) -> Option<u64> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state
            .last
            .is_some_and(|last| now.saturating_duration_since(last) < self.every)
        {
            state.left_out += 1;
            return None;
        }
        state.last = Some(now);
        Some(std::mem::take(&mut state.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_becomes_a_line_in_a_while_with_its_number() {
        let (start, seldom) = (Instant::now(), Seldom::new(Duration::from_secs(10)));
        assert_eq!(seldom.due(start), Some(0));
        for millis in 1..=500 {
            assert_eq!(seldom.due(start + Duration::from_millis(millis)), None);
        }
        assert_eq!(seldom.due(start + Duration::from_secs(10)), Some(500));
        assert_eq!(seldom.due(start + Duration::from_secs(11)), None);
        assert_eq!(seldom.due(start + Duration::from_secs(3600)), Some(1));
    }
}
