//! What the guest tells about itself, and what is wrong with it.

use std::collections::BTreeSet;

use serde_json::Value;

/// A version of the desired state: epoch and generation, the order in which they were given out.
pub(super) type Version = (u64, u64);

/// The version in a JSON object, if it has one.
pub(super) fn version(value: &Value) -> Option<Version> {
    Some((value["epoch"].as_u64()?, value["generation"].as_u64()?))
}

/// One answer to the order `facts`.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Facts {
    /// Containers with a cgroup.
    cgroups: BTreeSet<String>,
    /// Processes in those: which container's, and the release in its environment.
    processes: Vec<(String, String)>,
    /// Containers with a directory in the run directory.
    run: BTreeSet<String>,
    /// Containers with a writable layer on the disk.
    writable: BTreeSet<String>,
    /// State files that were set aside as damaged, and files that were half written.
    damaged: Vec<String>,
    /// Mounts of containers that the whole device sees.
    mounts: u64,
    /// What the agent says.
    status: Value,
}

impl Facts {
    /// Reads the lines of one answer; unknown ones are ignored.
    pub(super) fn read(lines: &[String]) -> Self {
        let mut facts = Self::default();
        for line in lines {
            let (key, rest) = line.split_once(' ').unwrap_or((line, ""));
            match key {
                "cgroup" => drop(facts.cgroups.insert(rest.to_owned())),
                "process" => {
                    let (container, release) = rest.split_once(' ').unwrap_or((rest, ""));
                    facts
                        .processes
                        .push((container.to_owned(), release.to_owned()));
                }
                "run" => drop(facts.run.insert(rest.to_owned())),
                "writable" => drop(facts.writable.insert(rest.to_owned())),
                "corrupt" | "half" => facts.damaged.push(format!("{key}: {rest}")),
                "mounts" => facts.mounts = rest.parse().unwrap_or(u64::MAX),
                "status" => facts.status = serde_json::from_str(rest).unwrap_or_default(),
                _ => {}
            }
        }
        facts
    }

    /// Whether the device says that it runs `release`, at the version `desired` or a later one.
    pub(super) fn has_settled(&self, desired: Version, services: usize) -> bool {
        let app = &self.status["apps"][0];
        version(&self.status["version"]).is_some_and(|version| version >= desired)
            && app["phase"] == "succeeded"
            && self.status["containers"]
                .as_array()
                .is_some_and(|containers| containers.len() == services)
    }

    /// What is wrong with a device that has settled: every container must be accounted for everywhere, run, and
    /// be of `release`.
    pub(super) fn faults(&self, release: &str, services: &[&str]) -> Vec<String> {
        let mut faults: Vec<String> = self.damaged.clone();
        let told: BTreeSet<String> = self.status["containers"]
            .as_array()
            .into_iter()
            .flatten()
            .filter(|container| container["state"] == "running")
            .filter_map(|container| container["id"].as_str().map(str::to_owned))
            .collect();
        let wanted: BTreeSet<&str> = services.iter().copied().collect();
        let service = |id: &str| id.split('.').nth(1).unwrap_or_default().to_owned();
        let running: BTreeSet<String> = told.iter().map(|id| service(id)).collect();
        if told.len() != services.len() || !running.iter().map(String::as_str).eq(wanted) {
            faults.push(format!(
                "the agent tells of {told:?}, wanted are {services:?}"
            ));
        }
        for (what, found) in [("cgroups", &self.cgroups), ("the run directory", &self.run)] {
            if *found != told {
                faults.push(format!(
                    "in {what} are {found:?}, the agent tells of {told:?}"
                ));
            }
        }
        if !self.writable.is_subset(&told) {
            faults.push(format!(
                "writable layers are left: {:?}, the agent tells of {told:?}",
                self.writable
            ));
        }
        let alive: BTreeSet<String> = self.processes.iter().map(|(id, _)| id.clone()).collect();
        if alive != told {
            faults.push(format!(
                "processes are in {alive:?}, the agent tells of {told:?}"
            ));
        }
        for (container, of) in &self.processes {
            if of != release {
                faults.push(format!("{container} runs {of:?} and not {release:?}"));
            }
        }
        if self.mounts != 0 {
            faults.push(format!(
                "the device sees {} mounts of containers",
                self.mounts
            ));
        }
        faults
    }
}

/// What is wrong with the state that was on the disk when the power came back: the version must be one that was
/// assigned, and none that the hub had been told of may be lost.
pub(super) fn disk_faults(
    disk: &Value,
    acknowledged: Option<Version>,
    assigned: &BTreeSet<Version>,
) -> Vec<String> {
    let found = version(&disk["version"]);
    let mut faults = Vec::new();
    if found < acknowledged {
        faults.push(format!(
            "the disk has version {found:?}, the hub was told of {acknowledged:?}"
        ));
    }
    if let Some(found) = found.filter(|found| !assigned.contains(found)) {
        faults.push(format!(
            "the disk has version {found:?}, which nobody assigned"
        ));
    }
    faults
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn healthy() -> Vec<String> {
        let status = json!({
            "version": {"epoch": 1, "generation": 2},
            "apps": [{"phase": "succeeded"}],
            "containers": [
                {"id": "cut.one.3", "state": "running"},
                {"id": "cut.two.4", "state": "running"},
            ],
        });
        [
            "process cut.one.3 v2",
            "process cut.two.4 v2",
            "cgroup cut.one.3",
            "cgroup cut.two.4",
            "run cut.one.3",
            "run cut.two.4",
            "writable cut.two.4",
            "mounts 0",
            &format!("status {status}"),
        ]
        .map(str::to_owned)
        .to_vec()
    }

    const SERVICES: [&str; 2] = ["one", "two"];

    #[test]
    fn a_healthy_device_has_no_faults_and_has_settled() {
        let facts = Facts::read(&healthy());
        assert_eq!(facts.faults("v2", &SERVICES), Vec::<String>::new());
        assert!(facts.has_settled((1, 2), 2));
        assert!(!facts.has_settled((1, 3), 2));
        assert!(!facts.has_settled((2, 0), 2));
        assert!(!facts.has_settled((1, 2), 3));
    }

    #[test]
    fn everything_that_is_left_over_lost_or_damaged_is_a_fault() {
        for (line, other) in [
            ("run cut.one.3", "run cut.one.2"),
            ("run cut.one.3", ""),
            ("mounts 0", "mounts 1"),
            ("mounts 0", "mounts"),
            ("cgroup cut.two.4", ""),
            ("process cut.two.4 v2", ""),
            ("process cut.two.4 v2", "process cut.two.4 v1"),
            ("writable cut.two.4", "writable cut.two.1"),
            ("writable cut.two.4", "corrupt /data/state/head.corrupt-0"),
            ("writable cut.two.4", "half /data/state/head.new"),
        ] {
            let lines: Vec<String> = healthy()
                .into_iter()
                .map(|each| if each == line { other.to_owned() } else { each })
                .collect();
            let faults = Facts::read(&lines).faults("v2", &SERVICES);
            assert_eq!(faults.len(), 1, "{line} -> {other}: {faults:?}");
        }
        assert!(!Facts::read(&healthy()).faults("v2", &["one"]).is_empty());
        assert!(
            !Facts::read(&healthy())
                .faults("v2", &["one", "three"])
                .is_empty()
        );
        assert!(!Facts::read(&[]).faults("v2", &SERVICES).is_empty());
    }

    #[test]
    fn a_version_that_was_acknowledged_may_not_be_lost_nor_one_invented() {
        let assigned = BTreeSet::from([(1, 1), (1, 2)]);
        let disk = |generation: u64| json!({"version": {"epoch": 1, "generation": generation}});
        let none = json!({"version": null});
        assert!(disk_faults(&disk(2), Some((1, 1)), &assigned).is_empty());
        assert!(disk_faults(&disk(1), Some((1, 1)), &assigned).is_empty());
        assert!(disk_faults(&none, None, &assigned).is_empty());
        assert_eq!(disk_faults(&disk(1), Some((1, 2)), &assigned).len(), 1);
        assert_eq!(disk_faults(&none, Some((1, 1)), &assigned).len(), 1);
        assert_eq!(disk_faults(&disk(3), Some((1, 1)), &assigned).len(), 1);
    }
}
