//! What a container does, read from its directory and the kernel.
//!
//! Not being able to tell is an error and never an answer: taking a healthy container for a broken one would get it
//! removed.

use std::collections::BTreeMap;
use std::fs;
use std::io;

use foreshore_protocol::Digest;

use super::OciRuntime;
use crate::runtime::request::{EXIT, RECORD, Record, read_json};
use crate::runtime::{Container, ContainerId, ContainerState, Exit, secrets};

impl OciRuntime {
    /// The container's record; `None` when there is none or it makes no sense.
    pub(super) fn record(&self, id: &ContainerId) -> io::Result<Option<Record>> {
        match read_json(&self.dir(id).join(RECORD)) {
            Ok(record) => Ok(Some(record)),
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::InvalidData
                ) =>
            {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// The record, if it was made since the last boot; otherwise its pids mean nothing.
    pub(super) fn current_record(&self, id: &ContainerId) -> io::Result<Option<Record>> {
        let record = self.record(id)?;
        Ok(record.filter(|record| record.boot_id == self.boot_id))
    }

    /// How it ended, if it has and its shim has said so.
    pub(super) fn exit(&self, id: &ContainerId) -> io::Result<Option<Exit>> {
        let text = match fs::read_to_string(self.dir(id).join(EXIT)) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let oom = || self.cgroups.oom_kills(&id.to_string()) > 0;
        let mut words = text.split_ascii_whitespace();
        let Some(code) = words.next().and_then(|code| code.parse().ok()) else {
            return Ok(None);
        };
        Ok(Some(Exit {
            code,
            oom: code != 0 && oom(),
            signal: words.next().and_then(|signal| signal.parse().ok()),
        }))
    }

    /// Whether its first process runs.
    pub(super) fn runs(&self, id: &ContainerId) -> io::Result<bool> {
        if self.exit(id)?.is_some() {
            return Ok(false);
        }
        let record = self.current_record(id)?;
        record
            .and_then(|record| record.container)
            .map_or(Ok(false), |init| init.runs())
    }

    /// The container as [`list`](crate::runtime::Runtime::list) shows it; `None` when it has just been removed.
    pub(super) fn observe(&self, id: ContainerId) -> io::Result<Option<Container>> {
        // A record that cannot be read belongs to no release that anyone wants.
        let nothing = Digest::from_bytes([0; 32]);
        let Some(record) = self.record(&id)? else {
            let broken = |id| Container {
                id,
                release: nothing,
                service_digest: nothing,
                state: ContainerState::Broken,
                secrets: BTreeMap::new(),
            };
            return Ok(self.dir(&id).exists().then_some(id).map(broken));
        };
        let state = self.state(&id, &record)?;
        let secrets = secrets::revisions(&self.dir(&id))?;
        Ok(Some(Container {
            secrets,
            id,
            release: record.release,
            service_digest: record.service_digest,
            state,
        }))
    }

    fn state(&self, id: &ContainerId, record: &Record) -> io::Result<ContainerState> {
        if record.boot_id != self.boot_id {
            return Ok(ContainerState::Broken);
        }
        if let Some(exit) = self.exit(id)? {
            return Ok(ContainerState::Exited(exit));
        }
        if let (Some(shim), Some(container)) = (record.shim, record.container) {
            // First watched, then looked at: an end in between wakes whoever waits for a change.
            self.watch.add(shim);
            if shim.runs()? {
                return Ok(ContainerState::Running {
                    pid: container.pid,
                    started_ms: container.started_ms(),
                });
            }
        }
        if let Some(shim) = record.shim {
            shim.reap();
        }
        // It may have ended between the two looks.
        let exit = self.exit(id)?;
        Ok(exit.map_or(ContainerState::Broken, ContainerState::Exited))
    }
}
