//! What the hub said of a rollout while it went, and whether the waves kept their order.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, bail, ensure};
use foreshore_protocol::api::{AssignmentState, RolloutState, RolloutView, WaveState};
use foreshore_protocol::message::Phase;

/// Every state of one rollout that was seen, oldest first.
#[derive(Debug)]
pub(super) struct Record {
    seen: Vec<RolloutView>,
}

impl Record {
    /// Reads what `foreshore rollout status -w -o json` wrote.
    pub(super) fn read(path: &Path) -> anyhow::Result<Self> {
        let text = fs::read_to_string(path)?;
        let seen = text
            .lines()
            .map(serde_json::from_str)
            .collect::<Result<Vec<RolloutView>, _>>()
            .with_context(|| format!("failed to decode {}", path.display()))?;
        ensure!(!seen.is_empty(), "{} is empty", path.display());
        Ok(Self { seen })
    }

    /// The last state seen.
    pub(super) fn last(&self) -> &RolloutView {
        self.seen.last().expect("checked when it was read")
    }

    /// Fails unless every wave passed, and no device was offered the release before all earlier waves
    /// had passed. The sizes of the waves.
    pub(super) fn check_waves(&self) -> anyhow::Result<Vec<u64>> {
        let last = self.last();
        ensure!(
            last.state == RolloutState::Completed,
            "the rollout ended as {:?}",
            last.state
        );
        for view in &self.seen {
            check_order(view)?;
        }
        for wave in &last.waves {
            let done = wave.state == WaveState::Passed && wave.succeeded == wave.devices;
            ensure!(
                done,
                "wave {} is {:?} with {}/{}",
                wave.ordinal,
                wave.state,
                wave.succeeded,
                wave.devices
            );
        }
        Ok(last.waves.iter().map(|wave| wave.devices).collect())
    }

    /// Fails unless the first wave failed, its devices went back by themselves, later waves never opened
    /// and the rollout was rolled back. The devices of the first wave.
    pub(super) fn check_failure(&self) -> anyhow::Result<Vec<String>> {
        let last = self.last();
        ensure!(
            last.state == RolloutState::RolledBack,
            "the rollout ended as {:?}",
            last.state
        );
        for view in &self.seen {
            for part in view.assignments.iter().filter(|part| part.wave > 1) {
                let untouched = part.state == AssignmentState::Planned;
                ensure!(
                    untouched,
                    "{} of wave {} was {:?}",
                    part.device,
                    part.wave,
                    part.state
                );
            }
        }
        let first: Vec<_> = last
            .assignments
            .iter()
            .filter(|part| part.wave == 1)
            .collect();
        ensure!(!first.is_empty(), "wave 1 has no device");
        for part in &first {
            let went_back = self
                .seen
                .iter()
                .flat_map(|view| &view.assignments)
                .any(|seen| {
                    seen.device == part.device
                        && seen.state == AssignmentState::Device(Phase::RolledBack)
                });
            ensure!(went_back, "{} never said that it went back", part.device);
        }
        Ok(first.iter().map(|part| part.device.to_string()).collect())
    }
}

fn check_order(view: &RolloutView) -> anyhow::Result<()> {
    for part in view
        .assignments
        .iter()
        .filter(|part| part.state != AssignmentState::Planned)
    {
        let earlier = view.waves.iter().filter(|wave| wave.ordinal < part.wave);
        for wave in earlier {
            if !matches!(wave.state, WaveState::Passed | WaveState::Skipped) {
                bail!(
                    "{} of wave {} was {:?} while wave {} was {:?}",
                    part.device,
                    part.wave,
                    part.state,
                    wave.ordinal,
                    wave.state
                );
            }
        }
    }
    Ok(())
}
