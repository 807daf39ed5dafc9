//! Waiting for processes to end, without polling: pidfds in one epoll instance.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::runtime::process::{Identity, PidFd};

/// The shims being watched. However many there are, an idle agent is woken by none of them.
#[derive(Debug)]
pub(super) struct Watch {
    epoll: Epoll,
    watched: Mutex<BTreeMap<u64, (Identity, PidFd)>>,
}

impl Watch {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?,
            watched: Mutex::default(),
        })
    }

    fn watched(&self) -> MutexGuard<'_, BTreeMap<u64, (Identity, PidFd)>> {
        // Each change is one call, so the map is right whatever a panicking holder did.
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Watches a process, once. Without descriptors to spare its end goes unnoticed until the next look.
    pub(super) fn add(&self, identity: Identity) {
        let mut watched = self.watched();
        if watched.values().any(|(known, _)| *known == identity) {
            return;
        }
        let Ok(Some(fd)) = identity.open() else {
            return;
        };
        let key = watched.last_key_value().map_or(0, |(key, _)| key + 1);
        match self
            .epoll
            .add(fd.fd(), EpollEvent::new(EpollFlags::EPOLLIN, key))
        {
            Ok(()) => drop(watched.insert(key, (identity, fd))),
            Err(error) => tracing::warn!(pid = identity.pid, %error, "failed to watch a container"),
        }
    }

    /// Waits until one of the watched processes has ended, and reaps it if it is this process's child. Cancel safe.
    pub(super) async fn changed(&self) {
        loop {
            // A descriptor of its own, so that two waiting callers do not get into each other's way.
            let waiting = self.epoll.0.try_clone().and_then(register);
            match waiting {
                Ok(waiting) => {
                    let _ = waiting.readable().await;
                }
                // Out of descriptors: better to be asked to look again than to miss an end.
                Err(_) => {
                    tokio::time::sleep(Duration::from_secs(1)).await;
                    return;
                }
            }
            if self.take_ended() {
                return;
            }
        }
    }

    fn take_ended(&self) -> bool {
        let mut events = [EpollEvent::empty(); 16];
        let count = self
            .epoll
            .wait(&mut events, EpollTimeout::ZERO)
            .unwrap_or(0);
        let mut watched = self.watched();
        for event in events.iter().take(count) {
            if let Some((identity, fd)) = watched.remove(&event.data()) {
                let _ = self.epoll.delete(fd.fd());
                identity.reap();
            }
        }
        count > 0
    }
}

#[expect(unsafe_code, reason = "tokio asks for a promise about the descriptor")]
fn register(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` is an open descriptor, stays the same one, and is closed only by being dropped.
    Ok(unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }?)
}

/// Waits until the process of a pidfd has ended; whether it did within `limit`.
pub(super) async fn ended(pidfd: &OwnedFd, limit: Duration) -> io::Result<bool> {
    let fd = register(pidfd.try_clone()?)?;
    match tokio::time::timeout(limit, fd.readable()).await {
        Ok(ready) => ready.map(|_| true),
        Err(_) => Ok(false),
    }
}
