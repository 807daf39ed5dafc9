//! What operators ask of the simulated hub.

use foreshore_hub::rollout::command;
use foreshore_hub::rollout::{Action, Member, Opening, Policy, Refused, Rollout};
use foreshore_protocol::api::RolloutState;
use foreshore_protocol::{AppName, DeviceId, Digest};

use super::{Hub, unix};
use crate::mutation::Mutation;
use crate::random::hash;
use crate::scenario::{self, Ms, Scenario};

impl Hub {
    /// An operator gives a command. What the hub refuses is no fault.
    pub fn command(&mut self, scenario: &Scenario, app: usize, given: scenario::Command, now: Ms) {
        let name = &scenario.apps[app].name;
        let newest = self.newest(name);
        let asked = |decide: fn(&Rollout) -> Result<Vec<Action>, Refused>, hub: &Self| {
            newest.and_then(|index| decide(&hub.store.rollouts[index]).ok())
        };
        let actions = match given {
            scenario::Command::Apply(release) => {
                let digest = scenario.apps[app].releases[release].digest();
                self.open(scenario, app, digest, now);
                None
            }
            scenario::Command::Undo => {
                let target =
                    newest.and_then(|index| command::undo_target(&self.store.rollouts[index]).ok());
                if let Some(target) = target {
                    self.open(scenario, app, target, now);
                }
                None
            }
            scenario::Command::Join(number) => {
                self.label(name, &scenario.devices[number], true, now);
                None
            }
            scenario::Command::Leave(number) => {
                self.label(name, &scenario.devices[number], false, now);
                None
            }
            scenario::Command::Forget(number) => {
                self.forget(&scenario.devices[number], now);
                None
            }
            scenario::Command::Hold(number, held) => {
                self.hold(&scenario.devices[number], held);
                None
            }
            scenario::Command::Approve => asked(command::approve, self),
            scenario::Command::Retry => asked(|rollout| command::retry(rollout, None), self),
            scenario::Command::Pause => asked(command::pause, self),
            scenario::Command::Resume => asked(command::resume, self),
            scenario::Command::Abort => asked(command::abort, self),
        };
        let forgets = self.mutation == Some(Mutation::AbortKeepsIntent);
        let actions = actions.map(|mut actions: Vec<Action>| {
            actions.retain(|action| !forgets || !matches!(action, Action::Restore { .. }));
            actions
        });
        if let (Some(index), Some(actions)) = (newest, actions) {
            let ended = self.store.rollouts[index].state.is_final();
            for action in actions {
                self.act(index, &action, None, now);
            }
            if self.store.rollouts[index].state.is_final() && !ended {
                self.settle(index, now);
            }
            self.check_rollout(index);
        }
        self.advance(now);
    }

    fn open(&mut self, scenario: &Scenario, app: usize, to: Digest, now: Ms) {
        let described = &scenario.apps[app];
        let newest = self.newest(&described.name);
        let stands = newest.is_some_and(|index| {
            let rollout = &self.store.rollouts[index];
            rollout.to == to
                && matches!(
                    rollout.state,
                    RolloutState::Running | RolloutState::Completed
                )
        });
        if stands {
            return;
        }
        let id = self.store.rollouts.len() as u64 + 1;
        if let Some(index) = newest
            && let Ok(actions) = command::supersede(&self.store.rollouts[index], id)
        {
            for action in actions {
                self.act(index, &action, None, now);
            }
            self.check_rollout(index);
        }
        let members: Vec<_> = self.store.members[&described.name]
            .iter()
            .map(|device| self.member(device, &described.name))
            .collect();
        let open = |seed, members: Vec<Member>| {
            Rollout::open(Opening {
                id,
                app: described.name.clone(),
                from: self.completed(&described.name).map(|rollout| rollout.to),
                to,
                seed,
                policy: Policy {
                    requirements: scenario.requirements(app, to, id),
                    ..scenario.policy(id, members.len(), unix(now))
                },
                members,
                before: newest.map(|index| &self.store.rollouts[index]),
                now: unix(now),
            })
        };
        let seed = hash(&[scenario.seed, id]);
        let again = open(seed, members.iter().rev().cloned().collect());
        let shuffled = u64::from(self.mutation == Some(Mutation::ShuffleWaves));
        let rollout = Rollout {
            seed,
            ..open(seed ^ shuffled, members)
        };
        if rollout != again {
            self.violations.push(format!(
                "rollout {id}: its seed and its devices mean another plan"
            ));
        }
        if self.verbose {
            self.log.push(format!(
                "hub: rollout {id} of {} opens to {to}",
                rollout.app
            ));
        }
        self.store.rollouts.push(rollout);
    }

    fn member(&self, device: &DeviceId, app: &AppName) -> Member {
        let row = &self.store.devices[device];
        let placed = row.desired.get(app);
        let status = row
            .reported
            .as_ref()
            .and_then(|reported| reported.apps.iter().find(|status| status.app == *app));
        Member {
            device: device.clone(),
            placement: placed.map(|(placement, _)| *placement),
            phase: placed
                .zip(status)
                .filter(|((_, since), status)| status.since == *since)
                .map(|(_, status)| status.phase),
            labels: Scenario::labels(row.number),
        }
    }
}
