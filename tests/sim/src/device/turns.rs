//! A device's requests for turns, as `agent/src/reconcile/turns.rs` makes them, on virtual time.

use std::collections::BTreeMap;

use foreshore_agent::plan::{BootMs, History, Turn, TurnWish};
use foreshore_protocol::message::{Lease, LeaseRequest};
use foreshore_protocol::{AppName, Version};

use super::Device;
use crate::mutation::Mutation;
use crate::random::Random;
use crate::scenario::{HOUR, Ms, SECOND};

/// What was asked for one app, in the memory of one agent.
#[derive(Debug, Clone)]
pub(super) struct Asked {
    wish: TurnWish,
    sent: Option<(u64, Ms)>,
    until: Option<Ms>,
    next: Ms,
}

impl Device {
    pub(super) fn granted(&self) -> BTreeMap<AppName, Turn> {
        let turns = self.asked.iter().filter_map(|(app, asked)| {
            let turn = Turn {
                since: asked.wish.since,
                release: asked.wish.release,
                until: BootMs(asked.until?.saturating_sub(self.booted_at)),
            };
            Some((app.clone(), turn))
        });
        turns.collect()
    }

    /// Takes what a plan wants: the requests that follow, and when there is another.
    pub(super) fn follow(
        &mut self,
        wishes: &BTreeMap<AppName, TurnWish>,
        now: Ms,
        random: &mut Random,
    ) -> (Vec<LeaseRequest>, Option<Ms>) {
        let mut requests = Vec::new();
        let gone: Vec<AppName> = self
            .asked
            .iter()
            .filter(|(app, asked)| wishes.get(*app) != Some(&asked.wish))
            .map(|(app, _)| app.clone())
            .collect();
        for app in gone {
            if let Some(asked) = self.asked.remove(&app)
                && asked.sent.is_some()
                && !was_used(&self.disk.history, &app, &asked.wish)
            {
                requests.push(self.request(app, asked.wish, false));
            }
        }
        for (app, wish) in wishes {
            self.asked.entry(app.clone()).or_insert(Asked {
                wish: *wish,
                sent: None,
                until: None,
                next: now,
            });
        }
        let apps: Vec<AppName> = self.asked.keys().cloned().collect();
        for app in apps {
            let nonce = self.nonce + 1;
            let Some(asked) = self.asked.get_mut(&app) else {
                continue;
            };
            let due = now >= asked.next && asked.until.is_none_or(|until| now >= until);
            if self.session.is_some() && due {
                asked.sent = Some((nonce, now));
                asked.until = None;
                asked.next = now + random.between(15 * SECOND, 60 * SECOND);
                let wish = asked.wish;
                requests.push(self.request(app, wish, true));
            }
        }
        let next = self.asked.values().map(|asked| {
            asked
                .until
                .map_or(asked.next, |until| until.max(asked.next))
        });
        (requests, next.min())
    }

    fn request(&mut self, app: AppName, wish: TurnWish, wanted: bool) -> LeaseRequest {
        self.nonce += 1;
        LeaseRequest {
            boot: self.disk.starts,
            nonce: self.nonce,
            app,
            since: wish.since,
            release: wish.release,
            wanted,
        }
    }

    /// A lease arrives. True if it answers the newest request.
    pub fn receive_lease(&mut self, lease: &Lease, mutation: Option<Mutation>) -> bool {
        let boot = self.disk.starts;
        let Some(asked) = self.asked.get_mut(&lease.app) else {
            return false;
        };
        let Some((nonce, sent)) = asked.sent else {
            return false;
        };
        if mutation == Some(Mutation::LateTurns) && lease.since == asked.wish.since {
            asked.until = Some(sent + 24 * HOUR);
            return true;
        }
        if (lease.boot, lease.nonce, lease.since) != (boot, nonce, asked.wish.since) {
            return false;
        }
        asked.until = Some(sent + lease.ttl_ms);
        true
    }

    pub(super) fn forget_turns(&mut self) {
        self.asked.clear();
        self.nonce = 0;
    }

    /// For the rules: the assignments that it is switching in, which it began with a turn. What only has to be
    /// confirmed is none; nor is the way back of one that was told something else meanwhile, once it runs its
    /// last-known-good: it is as available as one that nobody told anything.
    #[must_use]
    pub fn switching(&self) -> BTreeMap<&AppName, Version> {
        let is_back = |app: &AppName, since: Version| {
            let reported = self.reported.iter().flat_map(|reported| &reported.apps);
            let mut status = reported.filter(|status| status.app == *app);
            status.any(|status| {
                let runs = status.running.is_some() && status.running == status.last_known_good;
                status.since > since && runs
            })
        };
        let trials = self.disk.history.apps.iter().filter_map(|(app, history)| {
            let trial = history.trial.as_ref().filter(|trial| trial.soak_ms > 0)?;
            (!is_back(app, trial.since)).then_some((app, trial.since))
        });
        trials.collect()
    }
}

fn was_used(history: &History, app: &AppName, wish: &TurnWish) -> bool {
    history.apps.get(app).is_some_and(|app| {
        let trial = app.trial.as_ref().map(|trial| (trial.since, trial.release));
        let good = app.last_known_good.as_ref();
        let good = good.map(|good| (good.since, good.release));
        [trial, good].contains(&Some((wish.since, wish.release)))
            || app.poison(wish.since, &wish.release).is_some()
    })
}
