//! What the hub said of a rollout while it went, and whether the waves kept their order.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, bail, ensure};
use foreshore_protocol::api::{AssignmentState, RolloutState, RolloutView, WaveState};

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

    /// Fails unless the first wave failed, later waves never opened and the rollout was rolled back. The
    /// devices of the first wave.
    pub(super) fn check_failure(&self) -> anyhow::Result<Vec<String>> {
        let last = self.last();
        ensure!(
            last.state == RolloutState::RolledBack,
            "the rollout ended as {:?}",
            last.state
        );
        for view in &self.seen {
            for part in view.assignments.iter().filter(|part| part.wave > 1) {
                ensure!(
                    part.state == AssignmentState::Planned,
                    "{} of wave {} was {:?}",
                    part.device,
                    part.wave,
                    part.state
                );
            }
        }
        let first = last.assignments.iter().filter(|part| part.wave == 1);
        let first: Vec<String> = first.map(|part| part.device.to_string()).collect();
        ensure!(!first.is_empty(), "wave 1 has no device");
        let failed = last
            .waves
            .iter()
            .any(|wave| wave.ordinal == 1 && wave.state == WaveState::Failed);
        ensure!(failed, "wave 1 did not fail");
        Ok(first)
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

#[cfg(test)]
mod tests {
    use super::*;

    /// One line of a record: two waves with a device each.
    fn line(state: &str, waves: [&str; 2], parts: [&str; 2]) -> String {
        let wave = |ordinal: u32, state: &str| {
            let succeeded = u32::from(state == "passed");
            format!(
                r#"{{"ordinal":{ordinal},"target":{{"count":{ordinal}}},"state":"{state}","devices":1,"succeeded":{succeeded},"failed":0,"deferred":0,"bakeUntilMs":null}}"#
            )
        };
        let part = |wave: u32, state: &str| {
            format!(r#"{{"device":"device-{wave}","wave":{wave},"state":{state},"message":null}}"#)
        };
        let digest = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        format!(
            r#"{{"id":1,"app":"web","from":null,"to":"{digest}","state":"{state}","message":null,"waves":[{},{}],"assignments":[{},{}],"createdMs":1,"finishedMs":null}}"#,
            wave(1, waves[0]),
            wave(2, waves[1]),
            part(1, parts[0]),
            part(2, parts[1])
        )
    }

    fn record(lines: &[String]) -> Record {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), lines.join("\n")).unwrap();
        Record::read(file.path()).unwrap()
    }

    const WELL: &str = r#"{"device":"succeeded"}"#;
    const PLANNED: &str = r#""planned""#;

    #[test]
    fn waves_in_order_are_accepted() {
        let good = record(&[
            line("running", ["open", "pending"], [r#""offered""#, PLANNED]),
            line("running", ["passed", "open"], [WELL, r#""offered""#]),
            line("completed", ["passed", "passed"], [WELL, WELL]),
        ]);
        assert_eq!(good.check_waves().unwrap(), [1, 1]);
        assert!(good.check_failure().is_err());
    }

    #[test]
    fn a_device_that_is_offered_the_release_too_early_is_noticed() {
        let early = record(&[
            line("running", ["baking", "pending"], [WELL, r#""offered""#]),
            line("completed", ["passed", "passed"], [WELL, WELL]),
        ]);
        assert!(early.check_waves().is_err());
    }

    #[test]
    fn a_failure_stops_at_the_first_wave() {
        let end = line(
            "rolled-back",
            ["failed", "pending"],
            [r#""reverted""#, PLANNED],
        );
        let begin = line("running", ["open", "pending"], [r#""offered""#, PLANNED]);
        let good = record(&[begin, end.clone()]);
        assert_eq!(good.check_failure().unwrap(), ["device-1"]);
        assert!(good.check_waves().is_err());
        let spread = line(
            "running",
            ["open", "open"],
            [r#""offered""#, r#""offered""#],
        );
        assert!(
            record(&[spread, end]).check_failure().is_err(),
            "the second wave was touched"
        );
        let late = line("rolled-back", ["passed", "failed"], [WELL, PLANNED]);
        assert!(
            record(&[late]).check_failure().is_err(),
            "wave 1 had passed"
        );
    }
}
