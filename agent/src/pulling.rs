//! [`Tally`]: how far the staging under way is, for the hub and for whoever looks. Nothing is decided by it.
//!
//! For `foreshore-agent status` it is written into the run directory, with or without a hub.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::rc::{Rc, Weak};
use std::time::{Duration, Instant};

use foreshore_protocol::Digest;
use foreshore_protocol::api::PullView;
use foreshore_protocol::message::{ImagePull, MAX_TEXT_BYTES, PullProgress, PullState, fit};

use crate::clock;
use crate::stage::{Line, in_order};
use crate::status;

/// The rate is that of so long.
const WINDOW: Duration = Duration::from_secs(10);

/// Samples of one window, at most: one for each line of the child.
const SAMPLES_MAX: usize = 64;

/// How often it is written at most.
const WRITE_EVERY: Duration = Duration::from_secs(1);

/// Where the staging under way is looked at. There is none when its task is gone.
#[derive(Debug, Clone, Default)]
pub struct Pulling {
    tally: Rc<RefCell<Weak<RefCell<Tally>>>>,
    /// The run directory, if it is written there.
    run: Option<Rc<Path>>,
}

/// A tally that is shown as long as this is kept.
#[derive(Debug)]
pub struct Shown {
    tally: Rc<RefCell<Tally>>,
    pulling: Pulling,
    written: Option<Instant>,
}

impl Shown {
    /// Takes in what the child said at `now`.
    pub fn note(&mut self, line: &Line, now: Instant) {
        self.tally.borrow_mut().note(line, now);
        let is_due = !matches!(line, Line::Fetched { .. })
            || self
                .written
                .is_none_or(|written| now.saturating_duration_since(written) >= WRITE_EVERY);
        if let Some(run) = &self.pulling.run
            && is_due
        {
            self.written = Some(now);
            let view = PullView::from(&self.tally.borrow().progress(0, now));
            status::publish_pull(run, &view, clock::boot_ms());
        }
    }
}

impl Drop for Shown {
    fn drop(&mut self) {
        // Unless another is shown by now.
        let is_shown = std::ptr::eq(
            self.pulling.tally.borrow().as_ptr(),
            Rc::as_ptr(&self.tally),
        );
        if let Some(run) = &self.pulling.run
            && is_shown
        {
            status::forget_pull(run);
        }
    }
}

impl Pulling {
    /// Writes it into this run directory, too. What an agent before left there is removed.
    #[must_use]
    pub fn written_to(run: PathBuf) -> Self {
        status::forget_pull(&run);
        Self {
            tally: Rc::default(),
            run: Some(run.into()),
        }
    }

    /// Shows a tally for as long as the answer is kept.
    #[must_use]
    pub fn show(&self, tally: Tally) -> Shown {
        let tally = Rc::new(RefCell::new(tally));
        self.tally.replace(Rc::downgrade(&tally));
        Shown {
            tally,
            pulling: self.clone(),
            written: None,
        }
    }

    /// What is to be told at `now`; `None` while nothing is staged.
    #[must_use]
    pub fn progress(&self, boot: u64, now: Instant) -> Option<PullProgress> {
        let tally = self.tally.borrow().upgrade()?;
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
    fn what_is_shown_is_written_for_whoever_looks_and_goes_with_the_task() {
        let dir = tempfile::tempdir().unwrap();
        let shown = || status::pull(dir.path(), clock::boot_ms());
        std::fs::write(dir.path().join("pulling.json"), "{}").unwrap();
        let pulling = Pulling::written_to(dir.path().to_owned());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        let begin = Instant::now();
        let mut first = pulling.show(tally(begin));
        first.note(&planned("a", 4 * MB), begin);
        assert_eq!(shown().unwrap().images[0].fetched_bytes, Some(0));
        let second = |count| begin + Duration::from_secs(count);
        first.note(&Line::Fetched { bytes: 2 * MB }, second(2));
        let view = shown().unwrap();
        assert_eq!(view.images[0].fetched_bytes, Some(2 * MB));
        assert_eq!((view.rate_bytes, view.images[0].remaining_s), (MB, Some(2)));
        // Not for each line.
        let soon = second(2) + Duration::from_millis(500);
        first.note(&Line::Fetched { bytes: 3 * MB }, soon);
        assert_eq!(shown(), Some(view));
        let mut other = pulling.show(tally(begin));
        other.note(&planned("a", 7), second(3));
        drop(first);
        assert_eq!(shown().unwrap().images[0].total_bytes, Some(7));
        drop(other);
        assert_eq!(shown(), None);
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
