//! What `foreshore-agent status` shows: written by the running agent beside its containers' records, so that
//! it costs no flash, and read by anyone on the device.

use std::path::Path;

use foreshore_protocol::Version;
use foreshore_protocol::message::AppStatus;
use serde::{Deserialize, Serialize};

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
}

/// Writes what the agent says now. That it cannot is not worth stopping for, and is logged.
pub fn publish(run: &Path, version: Option<Version>, apps: &[AppStatus]) {
    let published = Published {
        version,
        apps: apps.to_vec(),
    };
    let bytes = serde_json::to_vec(&published).expect("string keys and plain values serialize");
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
        let version = Version::from_numbers(1, 2).ok();
        publish(dir.path(), version, &[]);
        let read = published(dir.path()).unwrap();
        assert_eq!((read.version, read.apps.len()), (version, 0));
        std::fs::write(dir.path().join(FILE), b"{").unwrap();
        assert_eq!(published(dir.path()), None);
    }
}
