//! What `foreshore-agent status` shows: written by the running agent beside its containers' records, so that
//! it costs no flash, and read by anyone on the device.

use std::path::Path;

use foreshore_protocol::Version;
use foreshore_protocol::message::AppStatus;
use serde::{Deserialize, Serialize};

use crate::runtime::{Container, ContainerState};

const FILE: &str = "status.json";

/// Larger files are not ours: 4 MiB.
const BYTES_MAX: u64 = 4 << 20;

/// What the agent last said.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Published {
    /// The newest desired state that it has.
    pub version: Option<Version>,
    /// As reported to the hub.
    pub apps: Vec<AppStatus>,
    /// Every container, also of apps that are not wanted any more.
    pub containers: Vec<ContainerLine>,
}

/// One container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ContainerLine {
    /// `APP.SERVICE.INSTANCE`.
    pub id: String,
    /// What it does.
    pub state: Doing,
    /// Of its first process, if it runs.
    pub pid: Option<i32>,
    /// If it ended; 128 + signal number if a signal ended it.
    pub exit_code: Option<i32>,
}

/// What a container does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Doing {
    /// Runs.
    Running,
    /// Ended.
    Exited,
    /// Left over from something that was cut short.
    Broken,
}

impl From<&Container> for ContainerLine {
    fn from(container: &Container) -> Self {
        let (state, pid, exit_code) = match container.state {
            ContainerState::Running { pid, .. } => (Doing::Running, Some(pid), None),
            ContainerState::Exited(exit) => (Doing::Exited, None, Some(exit.code)),
            ContainerState::Broken => (Doing::Broken, None, None),
        };
        Self {
            id: container.id.to_string(),
            state,
            pid,
            exit_code,
        }
    }
}

impl std::fmt::Display for Doing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Running => "running",
            Self::Exited => "exited",
            Self::Broken => "broken",
        })
    }
}

/// Writes what the agent says now. That it cannot is not worth stopping for, and is logged.
pub fn publish(run: &Path, published: &Published) {
    let bytes = serde_json::to_vec(published).expect("string keys and plain values serialize");
    let temporary = run.join("status.json.new");
    let written = std::fs::create_dir_all(run)
        .and_then(|()| std::fs::write(&temporary, bytes))
        .and_then(|()| std::fs::rename(&temporary, run.join(FILE)));
    if let Err(error) = written {
        tracing::debug!(%error, "status.json could not be written");
    }
}

/// What the agent last said; `None` when there is nothing, or nothing that reads.
#[must_use]
pub fn published(run: &Path) -> Option<Published> {
    use std::io::Read as _;
    let mut bytes = Vec::new();
    let file = std::fs::File::open(run.join(FILE)).ok()?;
    file.take(BYTES_MAX).read_to_end(&mut bytes).ok()?;
    serde_json::from_slice(&bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_published_reads_back_and_garbage_is_nothing() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(published(dir.path()), None);
        let said = Published {
            version: Version::from_numbers(1, 2).ok(),
            apps: Vec::new(),
            containers: vec![ContainerLine {
                id: "shop.web.1".to_owned(),
                state: Doing::Running,
                pid: Some(7),
                exit_code: None,
            }],
        };
        publish(dir.path(), &said);
        assert_eq!(published(dir.path()), Some(said));
        std::fs::write(dir.path().join(FILE), b"{").unwrap();
        assert_eq!(published(dir.path()), None);
    }
}
