//! What the device remembers: plain files under the state directory, each replaced as a whole.
//!
//! ```text
//! STATE/                mode 0700
//!   lock                flock(2): one agent
//!   head                the newest head that was accepted; its version never goes back
//!   history             what the planner remembers
//!   counters            starts, sessions, and the version that `head` may not fall below
//!   events              events that the hub has not acknowledged
//!   secrets.key         the device's own key; whoever has it and `secrets.box` has the secrets
//!   secrets.box         the newest secrets, sealed to that key
//!   releases/HEX.json   release manifests, checked by digest whenever they are read
//!   images/             the image store (foreshore-images)
//!   volumes/            named volumes
//! ```
//!
//! No database: flash wears out by rewriting pages, and a file that is written whole cannot be half old. A
//! damaged file is set aside as `NAME.corrupt-N` and the agent goes on without it: what runs keeps running,
//! and the hub sends again what was lost.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use foreshore_killpoint as killpoint;
use foreshore_protocol::message::Head;
use foreshore_protocol::release::Release;
use foreshore_protocol::secret::{DeviceKey, SealedSecrets};
use foreshore_protocol::{Digest, Version};
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use crate::plan::History;

mod file;
mod outbox;

pub use file::FileError;
use file::{Damage, Framed, read_framed, remove, set_aside, write_atomically, write_framed};
pub use outbox::Outbox;

/// The device's memory. Holds the lock of its directory.
#[derive(Debug)]
pub struct State {
    dir: PathBuf,
    _lock: Flock<std::fs::File>,
    counters: Counters,
    /// The newest connection's number; at most the one in `counters`.
    session: u64,
    history: Vec<u8>,
}

/// How many connection numbers are reserved by one write.
const SESSION_BLOCK: u64 = 64;

/// What was found at start.
#[derive(Debug)]
pub struct Loaded {
    /// The newest accepted head.
    pub head: Option<Head>,
    /// What the planner remembers.
    pub history: History,
    /// Events that wait for the hub.
    pub outbox: Outbox,
    /// Release manifests whose digest was right.
    pub releases: BTreeMap<Digest, Release>,
    /// The device's own key, made at its first start; `None` when it could not be stored.
    pub secrets_key: Option<DeviceKey>,
    /// The newest secrets, sealed to it.
    pub secrets: Option<SealedSecrets>,
    /// What was damaged and set aside, for people.
    pub damage: Vec<String>,
}

/// Small numbers that only grow.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Counters {
    /// Starts of the agent.
    boot: u64,
    /// No connection has a higher number: they are given out in blocks, so that a device that tries to
    /// connect for weeks does not write its flash for each attempt.
    session: u64,
    /// No head below this is accepted, also when the file `head` is lost.
    floor: Option<Version>,
}

impl Framed for Counters {
    const SCHEMA: u16 = 0x0101;
}

impl Framed for History {
    const SCHEMA: u16 = 0x0104;
}

/// The secret half of the device's key.
#[derive(Serialize, Deserialize)]
struct Key([u8; 32]);

impl Framed for Key {
    const SCHEMA: u16 = 0x0105;
}

impl Framed for SealedSecrets {
    const SCHEMA: u16 = <Self as foreshore_protocol::frame::Message>::SCHEMA;
}

impl Framed for Head {
    const SCHEMA: u16 = <Self as foreshore_protocol::frame::Message>::SCHEMA;
}

/// Why the state directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another agent has it.
    #[error("{} is in use by another agent; stop that one, or give this one its own [paths] state", .0.display())]
    InUse(PathBuf),
    /// The file system refused something.
    #[error(transparent)]
    File(#[from] FileError),
}

/// Why a head was not accepted.
#[derive(Debug, thiserror::Error)]
pub enum AcceptError {
    /// It is not newer than the one we have.
    #[error("head {offered} is not newer than {stored}")]
    NotNewer {
        /// Its version.
        offered: Version,
        /// What we have.
        stored: Version,
    },
    /// It could not be stored, so it must not be acknowledged.
    #[error(transparent)]
    File(#[from] FileError),
}

impl State {
    /// Opens the directory, makes it if needed, and reads everything. `unix_ms` is the wall clock in milliseconds: where
    /// no counters are left (a new or a wiped device), they begin there, so that the hub does not take the
    /// device's reports for old ones.
    ///
    /// # Errors
    ///
    /// When another agent has the directory, or it cannot be read or written. Damaged files are no error.
    pub fn open(dir: &Path, unix_ms: u64) -> Result<(Self, Loaded), OpenError> {
        let lock = lock(dir)?.0;
        Self::load(dir, lock, unix_ms).map_err(OpenError::File)
    }

    fn load(
        dir: &Path,
        lock: Flock<std::fs::File>,
        unix_ms: u64,
    ) -> Result<(Self, Loaded), FileError> {
        // A medium that takes no writes must not keep a device from starting what is on it: what fails below
        // only for that reason is told and borne.
        let mut damage = Damage::default();
        let swept = file::sweep(dir).and_then(|()| file::sweep(&dir.join("releases")));
        damage.bear(swept)?;
        let counters: Option<Counters> = read_framed(&dir.join("counters"), &mut damage)?;
        let head: Option<Head> = read_framed(&dir.join("head"), &mut damage)?;
        let history: Option<History> = read_framed(&dir.join("history"), &mut damage)?;
        let outbox = Outbox::open(&dir.join("events"), unix_ms, &mut damage)?;
        let releases = read_releases(&dir.join("releases"), &mut damage)?;
        let secrets = read_framed(&dir.join("secrets.box"), &mut damage)?;
        let secrets_key = key(&dir.join("secrets.key"), &mut damage)?;
        let begin = Counters {
            boot: unix_ms,
            session: unix_ms,
            floor: None,
        };
        let mut counters = counters.unwrap_or(begin);
        counters.boot = counters.boot.saturating_add(1);
        counters.floor = counters.floor.max(head.as_ref().map(|head| head.version));
        let session = counters.session;
        counters.session = session.saturating_add(SESSION_BLOCK);
        let written = write_framed(&dir.join("counters"), &counters);
        if written.is_err() {
            // Numbers that could not be stored must not come back at the next start.
            counters.boot = counters.boot.max(unix_ms);
        }
        damage.bear(written)?;
        let session = session.max(if damage.0.is_empty() { 0 } else { unix_ms });
        let history = history.unwrap_or_else(|| {
            if damage.0.is_empty() {
                History::default()
            } else {
                // No instance number may be used twice, and the ones used are not known.
                History::rebuilt(unix_ms / 1000)
            }
        });
        let state = Self {
            dir: dir.to_owned(),
            _lock: lock,
            counters,
            session,
            history: file::encode(&history),
        };
        Ok((
            state,
            Loaded {
                head,
                history,
                outbox,
                releases,
                secrets_key,
                secrets,
                damage: damage.0,
            },
        ))
    }

    /// Counts the agent's starts on this device.
    #[must_use]
    pub const fn boot(&self) -> u64 {
        self.counters.boot
    }

    /// The highest version ever accepted here.
    #[must_use]
    pub const fn floor(&self) -> Option<Version> {
        self.counters.floor
    }

    /// A number for a new connection, higher than any before, also those of earlier starts.
    ///
    /// # Errors
    ///
    /// When the next block of numbers cannot be stored; the number then is still higher than any used in
    /// this boot.
    pub fn next_session(&mut self) -> (u64, Result<(), FileError>) {
        self.session = self.session.saturating_add(1);
        if self.session <= self.counters.session {
            return (self.session, Ok(()));
        }
        let reserved = self.session.saturating_add(SESSION_BLOCK);
        let before = std::mem::replace(&mut self.counters.session, reserved);
        let stored = write_framed(&self.dir.join("counters"), &self.counters);
        if stored.is_err() {
            self.counters.session = before;
        }
        (self.session, stored)
    }

    /// Stores a head that is newer than `current` and than any before. When this returns, it survives a
    /// power cut and may be acknowledged.
    ///
    /// # Errors
    ///
    /// See [`AcceptError`]. Nothing has changed then.
    pub fn accept(&mut self, head: &Head, current: Option<Version>) -> Result<(), AcceptError> {
        let offered = head.version;
        // After the file `head` was lost, the version it held is taken again; a lower one never.
        let too_old = match (current, self.counters.floor) {
            (Some(stored), _) if offered <= stored => Some(stored),
            (None, Some(floor)) if offered < floor => Some(floor),
            _ => None,
        };
        if let Some(stored) = too_old {
            return Err(AcceptError::NotNewer { offered, stored });
        }
        write_framed(&self.dir.join("head"), head)?;
        // Second, so that a cut between the two leaves a floor below the head, which is harmless.
        self.counters.floor = Some(offered);
        write_framed(&self.dir.join("counters"), &self.counters)?;
        Ok(())
    }

    /// Stores what the planner remembers, if it differs from what is stored.
    ///
    /// # Errors
    ///
    /// When it cannot be stored; no step that rests on it may be done then.
    pub fn remember(&mut self, history: &History) -> Result<(), FileError> {
        let bytes = file::encode(history);
        if bytes != self.history {
            write_atomically(&self.dir.join("history"), &bytes)?;
            self.history = bytes;
        }
        Ok(())
    }

    /// Writes a file as it is already, to learn whether the medium takes writes again.
    ///
    /// # Errors
    ///
    /// When it does not.
    pub fn try_writing(&self) -> Result<(), FileError> {
        write_framed(&self.dir.join("counters"), &self.counters)
    }

    /// Stores secrets that were opened with the device's key, sealed as they came. When this returns, they survive a power
    /// cut and may be acknowledged.
    ///
    /// # Errors
    ///
    /// When they cannot be stored.
    pub fn store_secrets(&self, sealed: &SealedSecrets) -> Result<(), FileError> {
        write_framed(&self.dir.join("secrets.box"), sealed)
    }

    /// Sets secrets aside that cannot be opened; for people, what was done.
    pub fn set_secrets_aside(&self, why: &str) -> String {
        let mut damage = Damage::default();
        match set_aside(&self.dir.join("secrets.box"), why, &mut damage) {
            Ok(()) => damage.0.join("; "),
            Err(error) => error.to_string(),
        }
    }

    /// Stores a release manifest whose bytes were checked against `digest`.
    ///
    /// # Errors
    ///
    /// When it cannot be stored.
    pub fn store_release(&self, digest: &Digest, bytes: &[u8]) -> Result<(), FileError> {
        write_atomically(&self.release_path(digest), bytes)
    }

    /// Removes the manifests of `all` that are not in `keep`.
    ///
    /// # Errors
    ///
    /// When one cannot be removed.
    pub fn remove_releases<'a>(
        &self,
        all: impl IntoIterator<Item = &'a Digest>,
        keep: &BTreeSet<Digest>,
    ) -> Result<(), FileError> {
        all.into_iter()
            .filter(|digest| !keep.contains(*digest))
            .try_for_each(|digest| {
                remove(&self.release_path(digest))?;
                killpoint::reached("release", "removed");
                Ok(())
            })
    }

    fn release_path(&self, digest: &Digest) -> PathBuf {
        self.dir
            .join("releases")
            .join(format!("{}.json", digest.hex()))
    }
}

/// The device's key; a new one when there is none. One that cannot be stored is none: the next start would have another,
/// and the hub would take the device for a stranger.
fn key(path: &Path, damage: &mut Damage) -> Result<Option<DeviceKey>, FileError> {
    let stored: Option<Key> = read_framed(path, damage)?;
    if let Some(Key(bytes)) = stored {
        return Ok(Some(DeviceKey::from_bytes(bytes)));
    }
    let key = DeviceKey::generate();
    let written = write_framed(path, &Key(key.to_bytes()));
    let kept = written.is_ok();
    damage.bear(written)?;
    Ok(kept.then_some(key))
}

/// The right to be the one agent of a state directory, until dropped.
#[derive(Debug)]
pub struct Lock(Flock<std::fs::File>);

/// Takes the lock of a state directory, and makes the directory if needed.
///
/// # Errors
///
/// When an agent has it, or it cannot be made.
pub fn lock(dir: &Path) -> Result<Lock, OpenError> {
    use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
    for path in [dir.to_owned(), dir.join("releases")] {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&path)
            .map_err(|source| FileError::new("create", &path, source))?;
    }
    let path = dir.join("lock");
    let open = std::fs::File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(&path);
    // flock(2) takes any descriptor: on a medium that takes no writes, one to read.
    let lock = open
        .or_else(|error| std::fs::File::open(&path).map_err(|_| error))
        .map_err(|source| FileError::new("open", &path, source))?;
    let lock =
        Flock::lock(lock, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
            nix::errno::Errno::EWOULDBLOCK => OpenError::InUse(dir.to_owned()),
            errno => OpenError::File(FileError::new("lock", &path, errno.into())),
        })?;
    Ok(Lock(lock))
}

/// Reads what a stopped or running agent has stored, without taking part: for `status`.
///
/// # Errors
///
/// When a file cannot be read. Damaged ones count as missing.
pub fn peek(dir: &Path) -> Result<Peeked, FileError> {
    let mut damage = Damage::default();
    let head = file::peek_framed(&dir.join("head"), &mut damage)?;
    let history: Option<History> = file::peek_framed(&dir.join("history"), &mut damage)?;
    let releases = peek_releases(&dir.join("releases"))?;
    Ok(Peeked {
        head,
        history: history.unwrap_or_default(),
        releases,
        secrets_key: peek_key(dir)?,
        secrets: file::peek_framed(&dir.join("secrets.box"), &mut damage)?,
    })
}

/// The device's key, if it has one that can be read.
///
/// # Errors
///
/// When the file cannot be read.
pub fn peek_key(dir: &Path) -> Result<Option<DeviceKey>, FileError> {
    let key: Option<Key> = file::peek_framed(&dir.join("secrets.key"), &mut Damage::default())?;
    Ok(key.map(|Key(bytes)| DeviceKey::from_bytes(bytes)))
}

/// What [`peek`] finds.
#[derive(Debug, Default)]
pub struct Peeked {
    /// The newest accepted head.
    pub head: Option<Head>,
    /// What the planner remembers.
    pub history: History,
    /// Release manifests whose digest was right.
    pub releases: BTreeMap<Digest, Release>,
    /// The device's key.
    pub secrets_key: Option<DeviceKey>,
    /// The newest secrets, sealed to it.
    pub secrets: Option<SealedSecrets>,
}

/// As [`read_releases`], leaving damaged files where they are.
fn peek_releases(dir: &Path) -> Result<BTreeMap<Digest, Release>, FileError> {
    let mut releases = BTreeMap::new();
    for (digest, path) in release_files(dir)? {
        let bytes = file::read_bounded(&path, foreshore_protocol::release::MAX_RELEASE_BYTES)?;
        if let Ok(release) = Release::from_bytes(&bytes.unwrap_or_default(), &digest) {
            releases.insert(digest, release);
        }
    }
    Ok(releases)
}

fn read_releases(dir: &Path, damage: &mut Damage) -> Result<BTreeMap<Digest, Release>, FileError> {
    let mut releases = BTreeMap::new();
    for (digest, path) in release_files(dir)? {
        let bytes = file::read_bounded(&path, foreshore_protocol::release::MAX_RELEASE_BYTES)?;
        match Release::from_bytes(&bytes.unwrap_or_default(), &digest) {
            Ok(release) => {
                releases.insert(digest, release);
            }
            Err(error) => {
                let aside = set_aside(&path, &error.to_string(), damage);
                damage.bear(aside)?;
            }
        }
    }
    Ok(releases)
}

/// The files of a directory that are named like release manifests; a missing directory has none.
fn release_files(dir: &Path) -> Result<Vec<(Digest, PathBuf)>, FileError> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(FileError::new("read", dir, error)),
    };
    Ok(entries
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name();
            let hex = name.to_str()?.strip_suffix(".json")?;
            Some((format!("sha256:{hex}").parse().ok()?, entry.path()))
        })
        .collect())
}

#[cfg(test)]
mod tests;
