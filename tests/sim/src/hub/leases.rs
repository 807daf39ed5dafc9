//! Turns under a disruption budget, over the real `lease::Entry` and `lease::choose`. What the hub does around them
//! in its database is said once more here.

use std::collections::{BTreeMap, BTreeSet};

use foreshore_hub::lease::{Asking, Bound, FRESH_MS, Limit, Reply, choose};
use foreshore_hub::rollout::{Policy, Rollout};
use foreshore_protocol::api::{AssignmentState, RolloutState};
use foreshore_protocol::id::Labels;
use foreshore_protocol::message::{BudgetGroup, LeaseRequest, Phase, Reported};
use foreshore_protocol::{AppName, DeviceId};

use super::{Hub, unix};
use crate::mutation::Mutation;
use crate::scenario::{Budget, Ms, SECOND};

/// How long after it was asked for a turn may be used: short, so that messages outlast it now and then.
pub const TTL: Ms = 40 * SECOND;

impl Hub {
    /// What the head of a device says of the budget.
    pub(super) fn budgets(&self, device: &DeviceId) -> Vec<BudgetGroup> {
        let group = self.budget.map(|budget| {
            let value = budget.group_of(self.number(device)).to_string();
            let pair = ("site".parse(), value.parse());
            let (Ok(key), Ok(value)) = pair else {
                return Labels::new();
            };
            [(key, value)].into()
        });
        let budget = group.map(|group| BudgetGroup {
            budget: "sites".parse().expect("it is a name"),
            group,
        });
        budget.into_iter().collect()
    }

    fn number(&self, device: &DeviceId) -> usize {
        self.numbers.get(device).copied().unwrap_or(0)
    }

    /// A request arrives.
    pub fn receive_request(&mut self, device: &DeviceId, request: &LeaseRequest, now: Ms) {
        self.meet(device, true, Some(request.since), false, now);
        let Some(row) = self.store.devices.get_mut(device) else {
            return;
        };
        row.online = true;
        row.last_seen = Some(unix(now));
        let wanted = row
            .desired
            .get(&request.app)
            .is_some_and(|(placement, since)| {
                (placement.release, *since) == (request.release, request.since)
            });
        let key = (device.clone(), request.app.clone());
        let entry = self.store.leases.entry(key).or_default();
        if entry.ask(request, wanted, unix(now)) == Reply::Repeat {
            let lease = entry.lease(&request.app);
            self.leases
                .extend(lease.map(|lease| (device.clone(), lease)));
        }
        self.advance(now);
    }

    /// A report says how turns ended.
    pub(super) fn hear_leases(&mut self, device: &DeviceId, reported: &Reported, now: Ms) {
        for ((holder, app), entry) in &mut self.store.leases {
            if holder == device {
                let status = reported.apps.iter().find(|status| status.app == *app);
                entry.hear(status, reported.version, unix(now));
            }
        }
        self.store.leases.retain(|_, entry| !entry.is_empty());
    }

    /// Grants what may be granted.
    pub(super) fn decide(&mut self, now: Ms) {
        if !self.hears_the_fleet(now) {
            return;
        }
        let careless = self.mutation == Some(Mutation::GrantWhilePaused);
        let mut queue: Vec<_> = self
            .store
            .leases
            .iter()
            .filter_map(|((device, app), entry)| Some((device, app, entry.queued.as_ref()?)))
            .filter(|(device, app, queued)| {
                let Some(row) = self.store.devices.get(*device) else {
                    return false;
                };
                let placed = row.desired.get(*app);
                let wanted = placed.is_some_and(|(placement, since)| {
                    (placement.release, *since) == (queued.release, queued.since)
                });
                let fresh = unix(now).since(queued.asked) < FRESH_MS;
                let stands = self.is_paused(app) && !careless;
                wanted && fresh && row.online && !stands
            })
            .map(|(device, app, queued)| Asking {
                device: device.clone(),
                app: app.clone(),
                first: queued.first,
                bounds: self.bounds(device, app),
            })
            .collect();
        queue.sort_by(|one, other| {
            (one.first, &one.device, &one.app).cmp(&(other.first, &other.device, &other.app))
        });
        let limits = self.limits(now);
        for place in choose(&queue, &limits) {
            let asking = &queue[place];
            if self.is_paused(&asking.app) {
                let (device, app) = (&asking.device, &asking.app);
                self.violations.push(format!(
                    "it is the turn of {device} while the rollout of {app} stands still"
                ));
            }
            let row = &self.store.devices[&asking.device];
            let placement = row.desired[&asking.app].0;
            let (deadline, soak) = (placement.progress_deadline_ms, placement.soak_ms);
            let terms = row.terms.get(&asking.app).cloned().unwrap_or_default();
            let more = terms.more_ms(deadline, soak);
            let end_within = deadline + soak + more + Policy::SILENT_MARGIN_MS;
            let key = (asking.device.clone(), asking.app.clone());
            let entry = self.store.leases.entry(key).or_default();
            if let Some(lease) = entry.grant(&asking.app, TTL, end_within, unix(now)) {
                if self.verbose {
                    let (device, app) = (&asking.device, &asking.app);
                    self.log
                        .push(format!("hub: it is the turn of {app} on {device}"));
                }
                self.leases.push((asking.device.clone(), lease));
            }
        }
    }

    fn hears_the_fleet(&self, now: Ms) -> bool {
        let settled = self
            .listening_since
            .is_some_and(|since| unix(now) >= since.plus(10 * SECOND));
        let recent = |row: &&super::Row| {
            row.online
                || row
                    .last_seen
                    .is_some_and(|seen| unix(now).since(seen) < 3_600_000)
        };
        let rows: Vec<_> = self.store.devices.values().filter(recent).collect();
        let dark = rows.iter().filter(|row| !row.online).count();
        settled && dark * 2 <= rows.len()
    }

    fn live(&self, app: &AppName) -> Option<&Rollout> {
        let newest = self
            .store
            .rollouts
            .iter()
            .rfind(|rollout| rollout.app == *app);
        newest.filter(|rollout| !rollout.state.is_final())
    }

    /// Whether an app's newest rollout stands still, so that nobody gets a turn.
    #[must_use]
    pub fn is_paused(&self, app: &AppName) -> bool {
        self.live(app).is_some_and(|rollout| {
            rollout.frozen
                || matches!(
                    rollout.state,
                    RolloutState::Paused | RolloutState::RollbackPaused
                )
        })
    }

    fn bounds(&self, device: &DeviceId, app: &AppName) -> Vec<Bound> {
        let takes_part = self
            .live(app)
            .is_some_and(|rollout| rollout.assignments.contains_key(device));
        let rollout = takes_part.then(|| Bound::Rollout(app.clone()));
        let group = self
            .budget
            .map(|budget| bound(budget.group_of(self.number(device))));
        rollout.into_iter().chain(group).collect()
    }

    fn limits(&self, now: Ms) -> BTreeMap<Bound, Limit> {
        let mut limits = BTreeMap::new();
        if let Some(budget) = self.budget {
            self.limit_groups(budget, now, &mut limits);
        }
        self.limit_rollouts(&mut limits);
        limits
    }

    fn limit_groups(&self, budget: Budget, now: Ms, limits: &mut BTreeMap<Bound, Limit>) {
        for (device, row) in &self.store.devices {
            let group = bound(budget.group_of(self.number(device)));
            let group: &mut Limit = limits.entry(group).or_default();
            group.max = budget.max;
            let mut entries = self.store.leases.iter();
            let held = entries.find_map(|((holder, _), entry)| {
                let held = entry.held.as_ref().filter(|_| holder == device)?;
                Some(held.expires <= unix(now))
            });
            let reported = row.reported.as_ref();
            let switching = reported
                .is_some_and(|said| said.apps.iter().any(|status| status.phase.is_switching()));
            let forgets = self.mutation == Some(Mutation::FreeWhenDark) && !row.online;
            if (held.is_some() || switching) && !forgets {
                group.unavailable.insert(device.clone());
                if held.unwrap_or(!row.online) {
                    group.lost.insert(device.clone());
                }
            }
        }
    }

    fn limit_rollouts(&self, limits: &mut BTreeMap<Bound, Limit>) {
        let apps: BTreeSet<&AppName> = self.store.rollouts.iter().map(|one| &one.app).collect();
        for rollout in apps.into_iter().filter_map(|app| self.live(app)) {
            let holds = |device: &DeviceId| {
                let key = (device.clone(), rollout.app.clone());
                self.store
                    .leases
                    .get(&key)
                    .is_some_and(|entry| entry.holds_slot())
            };
            // Where there is a window, devices ask first whether they are under a budget or not.
            let all_ask = self.budget.is_some() || rollout.policy.terms.windows.switch.is_some();
            let busy = rollout.assignments.iter().filter(|(device, assignment)| {
                let asks_first = match assignment.state {
                    AssignmentState::Offered => true,
                    AssignmentState::Device(phase) => matches!(
                        phase,
                        Phase::Accepted | Phase::Staging | Phase::Blocked | Phase::Waiting
                    ),
                    _ => false,
                };
                (assignment.holds_slot() && !(asks_first && all_ask))
                    || (holds(device) && !assignment.has_ended())
            });
            let limit = Limit {
                max: usize::try_from(rollout.policy.max_unavailable).unwrap_or(usize::MAX),
                unavailable: busy.map(|(device, _)| device.clone()).collect(),
                lost: BTreeSet::new(),
            };
            limits.insert(Bound::Rollout(rollout.app.clone()), limit);
        }
    }
}

fn bound(group: usize) -> Bound {
    Bound::Group("sites".parse().expect("it is a name"), group.to_string())
}
