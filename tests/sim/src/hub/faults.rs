//! The faults that [`Mutation`] builds into what the engine decides.

use foreshore_hub::rollout::{Action, Cause, Deferral, Fleet, Rollout};
use foreshore_protocol::DeviceId;
use foreshore_protocol::api::{AssignmentState, RolloutState, WaveState};

use super::{Hub, unix};
use crate::mutation::Mutation;
use crate::scenario::Ms;

impl Hub {
    pub(super) fn mutate(
        &self,
        actions: &[Action],
        index: usize,
        fleet: &Fleet,
        now: Ms,
    ) -> Vec<Action> {
        let rollout = &self.store.rollouts[index];
        if self.mutation == Some(Mutation::ForgetFailures) && self.forgot_failures(rollout, now) {
            let brakes = |action: &Action| {
                matches!(
                    action,
                    Action::Wave {
                        state: WaveState::Failed,
                        ..
                    } | Action::Enter {
                        cause: Some(Cause::Budget),
                        ..
                    }
                )
            };
            let before = actions.iter().take_while(|action| !brakes(action));
            let on = actions.iter().any(brakes).then(|| {
                let next = rollout.assignments.iter().find(|(_, assignment)| {
                    assignment.state == AssignmentState::Planned && rollout.opened(assignment)
                });
                next.map(|(device, _)| Action::Offer {
                    device: device.clone(),
                    placement: rollout.placement(),
                    next: None,
                })
            });
            return before.cloned().chain(on.flatten()).collect();
        }
        let planned = |extra: usize| {
            let offers = rollout
                .assignments
                .iter()
                .filter(|(_, assignment)| assignment.state == AssignmentState::Planned)
                .map(|(device, _)| Action::Offer {
                    device: device.clone(),
                    placement: rollout.placement(),
                    next: None,
                });
            offers.take(extra).collect::<Vec<_>>()
        };
        let mut actions: Vec<_> = actions
            .iter()
            .cloned()
            .map(|action| match (self.mutation, action) {
                (
                    Some(Mutation::SkipBake),
                    Action::Wave {
                        ordinal,
                        state: WaveState::Baking,
                        ..
                    },
                ) => Action::Wave {
                    ordinal,
                    state: WaveState::Passed,
                    bake_until: None,
                },
                (
                    Some(Mutation::IgnoreAnalysis),
                    Action::Wave {
                        ordinal,
                        state: WaveState::Baking,
                        ..
                    },
                ) if !rollout.policy.analysis.is_empty() => Action::Wave {
                    ordinal,
                    state: WaveState::Passed,
                    bake_until: None,
                },
                (
                    Some(Mutation::RollBackTheRollback),
                    Action::Enter {
                        state: RolloutState::RollbackPaused,
                        cause,
                        message,
                    },
                ) => Action::Enter {
                    state: RolloutState::RollingBack,
                    cause,
                    message,
                },
                (
                    Some(Mutation::OfflineIsFailure),
                    Action::Assign {
                        device,
                        state: AssignmentState::Deferred,
                        message,
                        ..
                    },
                ) => Action::Assign {
                    device,
                    state: AssignmentState::Silent,
                    deferral: None,
                    deadline: None,
                    message,
                },
                (
                    Some(Mutation::IgnoreApproval),
                    Action::Wave {
                        ordinal,
                        state: WaveState::AwaitingApproval,
                        ..
                    },
                ) => Action::Wave {
                    ordinal,
                    state: WaveState::Passed,
                    bake_until: None,
                },
                (
                    Some(Mutation::IgnorePace),
                    Action::Offer {
                        device, placement, ..
                    },
                ) => Action::Offer {
                    device,
                    placement,
                    next: Some(rollout.next_offer),
                },
                (
                    Some(Mutation::IgnoreHolds),
                    Action::Assign {
                        device,
                        deferral: Some(Deferral::Held),
                        ..
                    },
                ) => Action::Offer {
                    device,
                    placement: rollout.placement(),
                    next: None,
                },
                (
                    Some(Mutation::FinishedIsGood),
                    Action::Wave {
                        ordinal,
                        state: WaveState::Failed,
                        ..
                    },
                ) => Action::Wave {
                    ordinal,
                    state: WaveState::Passed,
                    bake_until: None,
                },
                (Some(Mutation::AnyCanary), Action::Replace { out, into }) => Action::Replace {
                    into: self.of_another_kind(rollout, &out).unwrap_or(into),
                    out,
                },
                (_, action) => action,
            })
            .collect();
        if self.mutation == Some(Mutation::FinishedIsGood) {
            actions.retain(|action| {
                !matches!(
                    action,
                    Action::Enter {
                        cause: Some(Cause::WaveFailed),
                        ..
                    }
                )
            });
        }
        if self.mutation == Some(Mutation::SilenceIsFine) {
            actions.retain(|action| {
                !matches!(
                    action,
                    Action::Assign {
                        state: AssignmentState::Silent,
                        ..
                    }
                )
            });
        }
        if self.mutation == Some(Mutation::IgnoreTailBudget) {
            let stops = |action: &Action| matches!(action, Action::StopTail { .. });
            if actions.iter().any(stops) {
                actions.retain(|action| !stops(action));
                let ready =
                    |device: &DeviceId| fleet.devices.get(device).is_some_and(|facts| facts.online);
                let idle = rollout.assignments.iter().find(|(device, assignment)| {
                    assignment.tail && assignment.state == AssignmentState::Planned && ready(device)
                });
                actions.extend(idle.map(|(device, _)| Action::Offer {
                    device: device.clone(),
                    placement: rollout.placement(),
                    next: Some(rollout.next_offer),
                }));
            }
        }
        let paused = rollout.state == RolloutState::Paused;
        let by_operator = paused && rollout.cause == Some(Cause::Operator);
        if self.mutation == Some(Mutation::OfferWhilePaused) && by_operator {
            actions.extend(planned(1));
        }
        if self.mutation == Some(Mutation::StartEarly) && rollout.state == RolloutState::Scheduled {
            actions.push(Action::Enter {
                state: RolloutState::Running,
                cause: None,
                message: None,
            });
        }
        let stops = |action: &Action| {
            matches!(
                action,
                Action::Enter {
                    cause: Some(Cause::Budget | Cause::WaveFailed),
                    ..
                }
            )
        };
        if self.mutation == Some(Mutation::OfferAfterBreak) && actions.iter().any(stops) {
            actions.extend(planned(1));
        }
        if self.mutation == Some(Mutation::IgnoreSlots)
            && actions
                .iter()
                .any(|action| matches!(action, Action::Offer { .. }))
        {
            actions.retain(|action| !matches!(action, Action::Offer { .. }));
            actions.extend(planned(usize::MAX));
        }
        actions
    }

    /// Whether a hub that counts in memory would see no broken budget: too few failed since it was started.
    fn forgot_failures(&self, rollout: &Rollout, now: Ms) -> bool {
        let since = rollout.clock.tick(unix(self.started.min(now)));
        let seen = rollout
            .assignments
            .values()
            .filter(|assignment| assignment.failed && assignment.changed >= since)
            .count();
        seen < usize::try_from(rollout.policy.budget.count).unwrap_or(usize::MAX)
    }

    fn of_another_kind(&self, rollout: &Rollout, device: &DeviceId) -> Option<DeviceId> {
        let stratum = rollout.assignments.get(device)?.stratum;
        rollout
            .assignments
            .iter()
            .find(|(_, other)| other.stratum != stratum && other.state == AssignmentState::Planned)
            .map(|(device, _)| device.clone())
    }
}
