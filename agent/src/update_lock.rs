//! Update locks: how an app holds back its own update.
//!
//! A service with `update_lock: true` sees the directory `RUN/locks/APP` as `/run/foreshore`, read-only. While one of
//! its processes has an exclusive flock(2) on the file `update.lock` there, its app is not updated. The agent takes
//! the same lock before it switches, and keeps it until the old containers have stopped or a new one starts: what
//! comes new may wait for the lock before it serves. The kernel drops the lock of a process that dies: an app that crashed blocks nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use foreshore_protocol::AppName;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use crate::plan::UpdateLocks;

/// Where containers see the directory of their app.
pub const TARGET: &str = "/run/foreshore";

/// The directory of an app's lock, below the run directory.
#[must_use]
pub fn directory(run: &Path, app: &AppName) -> PathBuf {
    run.join("locks").join(app.as_str())
}

/// Opens an app's lock file, and makes it and its directory if needed.
///
/// # Errors
///
/// When it cannot be made or opened.
pub fn open(directory: &Path) -> io::Result<File> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(directory)?;
    File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o644)
        .open(directory.join("update.lock"))
}

/// The locks that this agent has, and those that it was refused.
#[derive(Debug)]
pub struct Locks {
    run: PathBuf,
    held: BTreeMap<AppName, Flock<File>>,
    refused: BTreeSet<AppName>,
}

impl Locks {
    /// None yet, below the run directory.
    #[must_use]
    pub const fn new(run: PathBuf) -> Self {
        Self {
            run,
            held: BTreeMap::new(),
            refused: BTreeSet::new(),
        }
    }

    /// As the planner sees them.
    #[must_use]
    pub fn observed(&self) -> UpdateLocks {
        UpdateLocks {
            held: self.held.keys().cloned().collect(),
            refused: self.refused.clone(),
        }
    }

    /// Whether an app has the lock that we want.
    #[must_use]
    pub fn is_refused(&self) -> bool {
        !self.refused.is_empty()
    }

    /// Gives back what is not wanted any more, and tries to take what is. True when something changed.
    pub fn settle(&mut self, wanted: &BTreeSet<AppName>) -> bool {
        let before = self.observed();
        self.held.retain(|app, _| wanted.contains(app));
        self.refused.clear();
        for app in wanted {
            if self.held.contains_key(app) {
                continue;
            }
            match take(&directory(&self.run, app)) {
                Ok(Some(lock)) => {
                    self.held.insert(app.clone(), lock);
                }
                Ok(None) => {
                    self.refused.insert(app.clone());
                }
                Err(error) => {
                    // A run directory that fails must not keep a device from its updates for ever, but the app may
                    // well have the lock: it is tried again.
                    tracing::warn!(%app, %error, "the update lock cannot be opened");
                    self.refused.insert(app.clone());
                }
            }
        }
        self.observed() != before
    }
}

fn take(directory: &Path) -> io::Result<Option<Flock<File>>> {
    match Flock::lock(open(directory)?, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(Some(lock)),
        Err((_, Errno::EWOULDBLOCK)) => Ok(None),
        Err((_, errno)) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_is_taken_kept_and_given_back() {
        let dir = tempfile::tempdir().unwrap();
        let app: AppName = "shop".parse().unwrap();
        let mut locks = Locks::new(dir.path().to_owned());
        let wanted = [app.clone()].into();
        let by_app = take(&directory(dir.path(), &app)).unwrap().unwrap();
        assert!(locks.settle(&wanted));
        assert!(locks.is_refused());
        assert!(!locks.settle(&wanted), "nothing has changed");
        drop(by_app);
        assert!(locks.settle(&wanted));
        assert!(!locks.is_refused());
        assert!(take(&directory(dir.path(), &app)).unwrap().is_none());
        assert!(!locks.settle(&wanted));
        assert!(locks.settle(&BTreeSet::new()));
        assert!(take(&directory(dir.path(), &app)).unwrap().is_some());
    }
}
