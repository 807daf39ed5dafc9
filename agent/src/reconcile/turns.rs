//! Asking the hub for turns to switch, at a pace that it can bear, and keeping what it grants.
//!
//! Nothing here is stored: a turn that was not used ends with the agent that asked for it. The clock of a turn begins
//! when its request is sent, so what the hub reckons with is never shorter than what we believe to have.

use std::collections::BTreeMap;
use std::time::Duration;

use foreshore_protocol::message::{Lease, LeaseRequest};
use foreshore_protocol::{AppName, Digest, Version};
use tokio::time::Instant;

use crate::plan::{BootMs, History, Turn, TurnWish};

/// The shortest time between two requests for the same app.
const PAUSE_FIRST: Duration = Duration::from_secs(15);

/// The longest, but for jitter of a quarter. The hub grants by itself when it is our turn; repeating keeps our place and
/// makes sure that little of a turn's time is over then.
const PAUSE_LAST: Duration = Duration::from_secs(45);

/// No turn is longer, whatever the hub says.
const TTL_MAX_MS: u64 = 3_600_000;

/// What was asked and granted.
#[derive(Debug)]
pub(super) struct Turns {
    boot: u64,
    nonce: u64,
    jitter: u64,
    asked: BTreeMap<AppName, Asked>,
    /// Turns that are not wanted any more and that the hub is to be told of.
    back: BTreeMap<AppName, TurnWish>,
    /// No request for these before.
    resting: BTreeMap<AppName, Instant>,
}

#[derive(Debug)]
struct Asked {
    wish: TurnWish,
    /// Of the newest request, with when it was sent.
    sent: Option<(u64, BootMs)>,
    until: Option<BootMs>,
    pause: Duration,
    next: Instant,
}

impl Turns {
    /// `boot` as in reports; `jitter` should differ between devices.
    pub(super) const fn new(boot: u64, jitter: u64) -> Self {
        Self {
            boot,
            nonce: 0,
            jitter,
            asked: BTreeMap::new(),
            back: BTreeMap::new(),
            resting: BTreeMap::new(),
        }
    }

    /// What was granted, for a plan. It says until when each counts.
    pub(super) fn granted(&self) -> BTreeMap<AppName, Turn> {
        let granted = self.asked.iter().filter_map(|(app, asked)| {
            let turn = Turn {
                since: asked.wish.since,
                release: asked.wish.release,
                until: asked.until?,
            };
            Some((app.clone(), turn))
        });
        granted.collect()
    }

    /// Takes what a plan wants, and what became of what was wanted before: a turn that was used is nobody's to give back.
    pub(super) fn follow(
        &mut self,
        wishes: &BTreeMap<AppName, TurnWish>,
        history: &History,
        now: Instant,
    ) {
        let gone: Vec<AppName> = self
            .asked
            .iter()
            .filter(|(app, asked)| wishes.get(*app) != Some(&asked.wish))
            .map(|(app, _)| app.clone())
            .collect();
        for app in gone {
            let Some(asked) = self.asked.remove(&app) else {
                continue;
            };
            if asked.sent.is_none() {
                continue;
            }
            self.resting.insert(app.clone(), now + PAUSE_FIRST);
            if !was_used(history, &app, asked.wish.since, &asked.wish.release) {
                self.back.insert(app, asked.wish);
            }
        }
        self.resting.retain(|_, until| *until > now);
        for (app, wish) in wishes {
            // The next request says as much.
            self.back.remove(app);
            let next = self.resting.get(app).copied().unwrap_or(now);
            self.asked.entry(app.clone()).or_insert(Asked {
                wish: *wish,
                sent: None,
                until: None,
                pause: PAUSE_FIRST,
                next,
            });
        }
    }

    /// The next request that is due, if one is; it must be sent at once, and `ms` be read before that.
    pub(super) fn due(&mut self, now: Instant, ms: BootMs) -> Option<LeaseRequest> {
        if let Some((app, wish)) = self.back.pop_first() {
            return Some(self.request(app, wish, false));
        }
        let fraction = self
            .jitter
            .wrapping_add(self.nonce.wrapping_mul(0x9E37_79B9))
            % 256;
        let jitter = u32::try_from(fraction).unwrap_or(0);
        let (nonce, app, wish) = {
            let (app, asked) = self.asked.iter_mut().find(|(_, asked)| {
                now >= asked.next && asked.until.is_none_or(|until| ms >= until)
            })?;
            asked.sent = Some((self.nonce + 1, ms));
            asked.until = None;
            asked.next = now + asked.pause + asked.pause * jitter / 1024;
            asked.pause = (asked.pause * 2).min(PAUSE_LAST);
            (self.nonce + 1, app.clone(), asked.wish)
        };
        debug_assert!(nonce > self.nonce);
        Some(self.request(app, wish, true))
    }

    fn request(&mut self, app: AppName, wish: TurnWish, wanted: bool) -> LeaseRequest {
        self.nonce += 1;
        LeaseRequest {
            boot: self.boot,
            nonce: self.nonce,
            app,
            since: wish.since,
            release: wish.release,
            wanted,
        }
    }

    /// Takes a lease. True when it answers the newest request for its app.
    pub(super) fn take(&mut self, lease: &Lease) -> bool {
        let Some(asked) = self.asked.get_mut(&lease.app) else {
            return false;
        };
        let Some((nonce, sent)) = asked.sent else {
            return false;
        };
        let ours = (self.boot, nonce, asked.wish.since, asked.wish.release);
        if (lease.boot, lease.nonce, lease.since, lease.release) != ours {
            return false;
        }
        asked.until = Some(sent.plus(lease.ttl_ms.min(TTL_MAX_MS)));
        true
    }

    /// After a new connection: what was asked may be lost.
    pub(super) fn connected(&mut self, now: Instant) {
        for asked in self.asked.values_mut() {
            asked.next = asked.next.min(now + PAUSE_FIRST);
        }
    }

    /// When [`Self::due`] has something next; `None` is never.
    pub(super) fn wake_at(&self, now: Instant, ms: BootMs) -> Option<Instant> {
        if !self.back.is_empty() {
            return Some(now);
        }
        let next = self.asked.values().map(|asked| {
            let over = asked
                .until
                .map(|until| now + Duration::from_millis(until.since(ms)));
            over.map_or(asked.next, |over| over.max(asked.next))
        });
        next.min()
    }
}

/// Whether the device began to switch in this assignment.
fn was_used(history: &History, app: &AppName, since: Version, release: &Digest) -> bool {
    let Some(app) = history.apps.get(app) else {
        return false;
    };
    let trial = app.trial.as_ref().map(|trial| (trial.since, trial.release));
    let good = app
        .last_known_good
        .as_ref()
        .map(|good| (good.since, good.release));
    [trial, good].contains(&Some((since, *release))) || app.poison(since, release).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wishes(generation: u64) -> BTreeMap<AppName, TurnWish> {
        let wish = TurnWish {
            since: Version::from_numbers(1, generation).unwrap(),
            release: Digest::of(b"new"),
        };
        [("shop".parse().unwrap(), wish)].into()
    }

    fn lease_for(request: &LeaseRequest, ttl_ms: u64) -> Lease {
        Lease {
            boot: request.boot,
            nonce: request.nonce,
            app: request.app.clone(),
            since: request.since,
            release: request.release,
            ttl_ms,
        }
    }

    #[test]
    fn a_turn_counts_from_when_it_was_asked_for_and_only_the_newest_answer_does() {
        let (mut turns, begin) = (Turns::new(4, 7), Instant::now());
        let history = History::default();
        turns.follow(&wishes(1), &history, begin);
        let first = turns.due(begin, BootMs(1_000)).unwrap();
        assert_eq!((first.boot, first.nonce, first.wanted), (4, 1, true));
        assert_eq!(turns.due(begin, BootMs(1_000)), None, "not twice");
        let later = turns.wake_at(begin, BootMs(1_000)).unwrap();
        assert!((15..=19).contains(&(later - begin).as_secs()));
        let second = turns.due(later, BootMs(17_000)).unwrap();
        assert!(
            !turns.take(&lease_for(&first, 60_000)),
            "void since the second"
        );
        assert!(turns.take(&lease_for(&second, 60_000)));
        let until = turns.granted().into_values().next().unwrap().until;
        assert_eq!(until, BootMs(77_000), "from when the second was sent");
        // While it holds nothing is asked; when its time is over, again.
        let never = later + Duration::from_secs(3600);
        assert_eq!(turns.due(never, BootMs(76_999)), None);
        assert_eq!(turns.due(never, BootMs(77_000)).unwrap().nonce, 3);
        assert_eq!(turns.granted(), BTreeMap::new());
        // Another agent's.
        let mut after = Turns::new(5, 7);
        after.follow(&wishes(1), &history, begin);
        after.due(begin, BootMs(1_000));
        assert!(!after.take(&lease_for(&first, 60_000)));
    }

    #[test]
    fn what_is_not_wanted_any_more_is_given_back_unless_it_was_used() {
        let begin = Instant::now();
        let app: AppName = "shop".parse().unwrap();
        for used in [false, true] {
            let mut turns = Turns::new(1, 0);
            let mut history = History::default();
            turns.follow(&wishes(1), &history, begin);
            let request = turns.due(begin, BootMs(0)).unwrap();
            turns.take(&lease_for(&request, 60_000));
            if used {
                let good = crate::plan::LastKnownGood {
                    release: request.release,
                    since: request.since,
                };
                history.apps.entry(app.clone()).or_default().last_known_good = Some(good);
            }
            turns.follow(&BTreeMap::new(), &history, begin);
            assert_eq!(turns.granted(), BTreeMap::new());
            let back = turns.due(begin, BootMs(1));
            assert_eq!(back.map(|back| back.wanted), (!used).then_some(false));
            // Wanted again, it is not asked for at once.
            turns.follow(&wishes(1), &history, begin);
            assert_eq!(turns.due(begin, BootMs(2)), None);
            let later = begin + PAUSE_FIRST;
            assert!(
                turns
                    .due(later, BootMs(3))
                    .is_some_and(|request| request.wanted)
            );
        }
    }

    #[test]
    fn another_assignment_is_another_wish() {
        let (mut turns, begin) = (Turns::new(1, 0), Instant::now());
        let history = History::default();
        turns.follow(&wishes(1), &history, begin);
        let request = turns.due(begin, BootMs(0)).unwrap();
        turns.follow(&wishes(2), &history, begin);
        assert!(!turns.take(&lease_for(&request, 60_000)));
        let later = begin + PAUSE_FIRST;
        let next = turns.due(later, BootMs(1)).unwrap();
        assert_eq!(next.since, Version::from_numbers(1, 2).unwrap());
        assert!(next.nonce > request.nonce, "and the one before is void");
    }

    #[test]
    fn requests_come_less_and_less_often_and_never_faster_than_every_15_s() {
        let (mut turns, mut now) = (Turns::new(1, 123_456), Instant::now());
        turns.follow(&wishes(1), &History::default(), now);
        let mut pauses = Vec::new();
        for _ in 0..20 {
            assert!(turns.due(now, BootMs(0)).is_some());
            let next = turns.wake_at(now, BootMs(0)).unwrap();
            pauses.push(next - now);
            now = next;
        }
        assert!(pauses.iter().all(|pause| *pause >= PAUSE_FIRST));
        assert!(pauses.iter().all(|pause| *pause <= PAUSE_LAST * 5 / 4));
        assert!(pauses.last() >= pauses.first());
    }
}
