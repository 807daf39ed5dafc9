//! How containers end when they are made to: every process of theirs killed, their cgroups emptied and removed.

use std::fs::{self, File};
use std::io;
use std::time::Duration;

use super::{OciRuntime, io_stop, open, watch};
use crate::runtime::process::half_made;
use crate::runtime::{ContainerId, StopError};

/// How long SIGKILL may take. The kernel needs that long only when a process hangs in a driver.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);

impl OciRuntime {
    /// Kills everything of a container and waits until it is gone.
    pub(super) async fn kill(&self, id: &ContainerId) -> Result<(), StopError> {
        let name = id.to_string();
        let looked = |source| io_stop("look at", &name, source);
        let record = self.current_record(id).map_err(looked)?;
        let (shim, init) = record.map_or((None, None), |record| (record.shim, record.container));
        let unfinished = init.is_none();
        let init = open(init).map_err(looked)?;
        if let Some(init) = &init {
            self.cgroups.lift_io(&name);
            // The first process takes its whole PID namespace with it.
            init.signal(libc::SIGKILL)
                .map_err(|source| io_stop("kill", &name, source))?;
        }
        if let (Some(identity), Some(fd)) = (shim, open(shim).map_err(looked)?) {
            // With a container to wait for, the shim ends by itself; without one it still is the starting process.
            let patience = if init.is_some() {
                KILL_TIMEOUT
            } else {
                Duration::ZERO
            };
            if !watch::ended(fd.fd(), patience)
                .await
                .map_err(|source| io_stop("wait for", &name, source))?
            {
                fd.signal(libc::SIGKILL)
                    .map_err(|source| io_stop("kill the shim of", &name, source))?;
                let _ = watch::ended(fd.fd(), KILL_TIMEOUT).await;
            }
            identity.reap();
        }
        if let Some(init) = init
            && !watch::ended(init.fd(), KILL_TIMEOUT)
                .await
                .map_err(|source| io_stop("wait for", &name, source))?
        {
            return Err(StopError::Survived(name));
        }
        if let (Some(shim), true) = (shim, unfinished) {
            for fork in half_made(shim).map_err(looked)? {
                fork.signal(libc::SIGKILL)
                    .map_err(|source| io_stop("kill", &name, source))?;
                let _ = watch::ended(fork.fd(), KILL_TIMEOUT).await;
            }
        }
        // What was in the middle of becoming a container, or of joining one.
        self.empty_cgroup(&name).await?;
        if shim.is_none() {
            self.await_unknown_shim(id).await;
        }
        Ok(())
    }

    /// Waits for a shim whose record is lost: it ends by itself when its container has, and holds a lock on the
    /// directory until then. One that does not end is left alone, since nothing tells which process it is.
    async fn await_unknown_shim(&self, id: &ContainerId) {
        let mut pause = Duration::from_millis(1);
        while let Ok(dir) = File::open(self.dir(id))
            && matches!(dir.try_lock(), Err(fs::TryLockError::WouldBlock))
        {
            if pause > KILL_TIMEOUT / 2 {
                tracing::warn!(container = %id, "its record is lost and its shim goes on");
                return;
            }
            // A lock has no event.
            tokio::time::sleep(pause).await;
            pause *= 2;
        }
    }

    async fn empty_cgroup(&self, name: &str) -> Result<(), StopError> {
        let mut pause = Duration::from_millis(1);
        let populated = || {
            self.cgroups
                .populated(name)
                .map_err(|source| io_stop("look at", name, source))
        };
        while populated()? {
            self.cgroups.lift_io(name);
            self.cgroups.kill(name);
            if pause > KILL_TIMEOUT / 2 {
                return Err(StopError::Survived(name.to_owned()));
            }
            // The kernel has no event for this on cgroup v1.
            tokio::time::sleep(pause).await;
            pause *= 2;
        }
        Ok(())
    }

    pub(super) async fn remove_cgroup(&self, name: &str) -> io::Result<()> {
        let mut pause = Duration::from_millis(1);
        loop {
            match self.cgroups.remove(name) {
                // Killed processes leave it a moment after they have ended.
                Err(error)
                    if error.raw_os_error() == Some(libc::EBUSY) && pause < KILL_TIMEOUT / 2 =>
                {
                    self.cgroups.kill(name);
                    tokio::time::sleep(pause).await;
                    pause *= 2;
                }
                other => return other,
            }
        }
    }
}
