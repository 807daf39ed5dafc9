//! [`Tally`]: how far the staging under way is, for the hub and for whoever looks. Nothing is decided by it.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::{Rc, Weak};
use std::time::{Duration, Instant};

use foreshore_protocol::Digest;
use foreshore_protocol::message::{ImagePull, MAX_TEXT_BYTES, PullProgress, PullState, fit};

use crate::stage::{Line, in_order};

/// The rate is that of so long.
const WINDOW: Duration = Duration::from_secs(10);

/// Samples of one window, at most: one for each line of the child.
const SAMPLES_MAX: usize = 64;

/// Where the staging under way is looked at. There is none when its task is gone.
#[derive(Debug, Clone, Default)]
pub struct Pulling(Rc<RefCell<Weak<RefCell<Tally>>>>);

impl Pulling {
    /// Shows a tally for as long as the answer is kept.
    #[must_use]
    pub fn show(&self, tally: Tally) -> Rc<RefCell<Tally>> {
        let shown = Rc::new(RefCell::new(tally));
        self.0.replace(Rc::downgrade(&shown));
        shown
    }

    /// What is to be told at `now`; `None` while nothing is staged.
    #[must_use]
    pub fn progress(&self, boot: u64, now: Instant) -> Option<PullProgress> {
        let tally = self.0.borrow().upgrade()?;
        let progress = tally.borrow().progress(boot, now);
        Some(progress)
    }
}

/// How far the images of one release are.
#[derive(Debug)]
pub struct Tally {
    release: Digest,
    images: Vec<ImagePull>,
    /// Bytes of the images before the one that is fetched.
    before: u64,
    /// Bytes of all images at some times, oldest first.
    samples: VecDeque<(Instant, u64)>,
}

impl Tally {
    /// Nothing has been fetched of `images`.
    #[must_use]
    pub fn new(release: Digest, images: &[String], now: Instant) -> Self {
        let waiting = |image: &String| ImagePull {
            image: fit(image, MAX_TEXT_BYTES).to_owned(),
            state: PullState::Waiting,
        };
        Self {
            release,
            images: in_order(images).into_iter().map(waiting).collect(),
            before: 0,
            samples: [(now, 0)].into(),
        }
    }

    /// Takes in what the child said at `now`.
    pub fn note(&mut self, line: &Line, now: Instant) {
        match line {
            Line::Planned { image, bytes } => {
                let name = fit(image, MAX_TEXT_BYTES);
                if let Some(pull) = self.images.iter_mut().find(|pull| pull.image == name) {
                    pull.state = PullState::Fetching {
                        fetched_bytes: 0,
                        total_bytes: *bytes,
                    };
                }
            }
            Line::Fetched { bytes } => {
                if let Some(PullState::Fetching { fetched_bytes, .. }) = self.current() {
                    *fetched_bytes = *bytes;
                    let sum = self.before.saturating_add(*bytes);
                    self.sample(now, sum);
                }
            }
            Line::Staged => {
                if let Some(state) = self.current() {
                    let PullState::Fetching { total_bytes, .. } = *state else {
                        return;
                    };
                    *state = PullState::Staged;
                    self.before = self.before.saturating_add(total_bytes);
                    self.sample(now, self.before);
                }
            }
            Line::Done | Line::Failed { .. } => {}
        }
    }

    /// The state of the image that is fetched.
    fn current(&mut self) -> Option<&mut PullState> {
        let mut states = self.images.iter_mut().map(|pull| &mut pull.state);
        states.find(|state| matches!(state, PullState::Fetching { .. }))
    }

    fn sample(&mut self, now: Instant, sum: u64) {
        self.samples.push_back((now, sum));
        let is_old = |(at, _): &(Instant, u64)| now.saturating_duration_since(*at) > WINDOW;
        while self.samples.len() > SAMPLES_MAX || self.samples.front().is_some_and(is_old) {
            self.samples.pop_front();
        }
    }

    fn rate_bytes(&self, now: Instant) -> u64 {
        let recent = |at: &Instant| now.saturating_duration_since(*at) <= WINDOW;
        let newest = self.samples.back();
        // After a pause longer than the window nothing came in it.
        let Some((newest, sum)) = newest.filter(|(at, _)| recent(at)) else {
            return 0;
        };
        let oldest = self.samples.iter().find(|(at, _)| recent(at));
        let (oldest, before) = oldest.map_or((*newest, *sum), |oldest| *oldest);
        let took = now.saturating_duration_since(oldest).as_millis();
        let rate = u128::from(sum.saturating_sub(before)) * 1000 / took.max(1);
        u64::try_from(rate).unwrap_or(u64::MAX)
    }

    fn progress(&self, boot: u64, now: Instant) -> PullProgress {
        PullProgress {
            boot,
            release: self.release,
            images: self.images.clone(),
            rate_bytes: self.rate_bytes(now),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MB: u64 = 1_000_000;

    fn tally(now: Instant) -> Tally {
        // Twice the same, as two services may have one image.
        let images = ["b", "a", "b"].map(str::to_owned);
        Tally::new(Digest::of(b"release"), &images, now)
    }

    fn planned(image: &str, bytes: u64) -> Line {
        Line::Planned {
            image: image.to_owned(),
            bytes,
        }
    }

    fn states(tally: &Tally) -> Vec<(&str, PullState)> {
        let pulls = tally.images.iter();
        pulls.map(|pull| (&*pull.image, pull.state)).collect()
    }

    #[test]
    fn images_follow_one_another() {
        let begin = Instant::now();
        let second = |count| begin + Duration::from_secs(count);
        let mut tally = tally(begin);
        assert_eq!(
            states(&tally),
            [("a", PullState::Waiting), ("b", PullState::Waiting)]
        );
        tally.note(&planned("a", 4 * MB), second(0));
        tally.note(&Line::Fetched { bytes: 2 * MB }, second(2));
        let fetching = |fetched_bytes, total_bytes| PullState::Fetching {
            fetched_bytes,
            total_bytes,
        };
        assert_eq!(
            states(&tally),
            [("a", fetching(2 * MB, 4 * MB)), ("b", PullState::Waiting)]
        );
        assert_eq!(tally.rate_bytes(second(2)), MB);
        tally.note(&Line::Staged, second(4));
        tally.note(&planned("b", 6 * MB), second(4));
        tally.note(&Line::Fetched { bytes: 2 * MB }, second(6));
        assert_eq!(
            states(&tally),
            [("a", PullState::Staged), ("b", fetching(2 * MB, 6 * MB))]
        );
        assert_eq!(tally.rate_bytes(second(6)), MB);
    }

    #[test]
    fn the_rate_is_that_of_the_last_ten_seconds() {
        let begin = Instant::now();
        let mut tally = tally(begin);
        tally.note(&planned("a", 1000 * MB), begin);
        let mut fetched = 0;
        // Fast for 20 s, then slow for 20 s.
        for half in 1..=80_u32 {
            fetched += if half <= 40 { MB } else { MB / 10 };
            let now = begin + Duration::from_millis(500) * half;
            tally.note(&Line::Fetched { bytes: fetched }, now);
            assert!(tally.samples.len() <= SAMPLES_MAX);
        }
        let end = begin + Duration::from_secs(40);
        assert_eq!(tally.rate_bytes(end), MB / 5);
        // It falls when nothing comes, until nothing came for the whole window.
        let later = tally.rate_bytes(end + Duration::from_secs(5));
        assert!(later > 0 && later < MB / 5, "{later}");
        assert_eq!(tally.rate_bytes(end + Duration::from_secs(11)), 0);
    }

    #[test]
    fn nothing_is_shown_once_the_task_is_gone() {
        let now = Instant::now();
        let pulling = Pulling::default();
        assert_eq!(pulling.progress(1, now), None);
        let first = pulling.show(tally(now));
        let second = pulling.show(tally(now));
        drop(first);
        assert!(pulling.progress(1, now).is_some());
        drop(second);
        assert_eq!(pulling.progress(1, now), None);
    }

    #[test]
    fn lines_that_make_no_sense_change_nothing() {
        let now = Instant::now();
        let mut tally = tally(now);
        for line in [
            Line::Fetched { bytes: 5 },
            Line::Staged,
            planned("nobody asked for this", 1),
            Line::Done,
        ] {
            tally.note(&line, now);
        }
        assert_eq!(
            states(&tally),
            [("a", PullState::Waiting), ("b", PullState::Waiting)]
        );
        assert_eq!(tally.rate_bytes(now), 0);
    }
}
