//! Other registries, seen through the hub: what one device asked for is here for all others.
//!
//! Each blob is fetched once, however many ask for it at once: they read the file that grows. A blob gets its name
//! when its digest is right, and its last byte is passed on only then. What an interrupted fetch left is gone on with.
//! A tag is asked about again after a while; when its registry cannot be reached, what it named last is served.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use foreshore_images::blobs::BlobDir;
use foreshore_images::manifest::{Descriptor, Document, MANIFEST_BYTES_MAX};
use foreshore_images::partial::PartialDir;
use foreshore_images::registry::{Client, ClientConfig, FetchError, Retry};
use foreshore_images::{Digest, Fault, Reference, Room};
use tokio::sync::{Semaphore, watch};

use super::{Images, OpenError};
use crate::rollout::UnixMs;
use crate::store::cache::{Blob, Tag};
use crate::store::{self, StoreError};

/// Blobs that are fetched at once, from all registries together.
const FETCHES: usize = 4;

/// Blobs that may wait for their turn to be fetched.
const WAITING_MAX: usize = 256;

/// How long a question for a manifest may take before what is known is served, or the client told to come again.
const MANIFEST_WITHIN: Duration = Duration::from_secs(15);

/// A registry that could not be reached is asked for no manifest for so long.
const REST: Duration = Duration::from_secs(15);

/// Questions for manifests at once: those about one name wait for each other.
const STRIPES: usize = 16;

/// The use of a blob is noted again after so long.
const NOTE_EVERY_MS: u64 = 5 * 60_000;

/// The most blobs of one manifest that are known by it.
const CHILDREN_MAX: usize = 2000;

/// The free room on the disk is looked at again after so many bytes.
const LOOK_EVERY: u64 = 8 << 20;

/// What the hub's cache is set up with.
#[derive(Debug, Clone, Default)]
pub struct Upstreams {
    /// Host by the name that its repositories have here: `docker.io` for `docker.io/library/busybox`.
    pub hosts: BTreeMap<String, String>,
    /// How long a tag is believed, in milliseconds.
    pub tag_ttl_ms: u64,
    /// How much is kept, in bytes; what was used last stays.
    pub bytes: u64,
}

/// Why something did not come through.
#[derive(Debug, thiserror::Error)]
pub enum ThroughError {
    /// What its registry said.
    #[error(transparent)]
    Fetch(Arc<FetchError>),
    /// No manifest that came through names it.
    #[error("no manifest that was pulled through the hub names blob {0}; pull its manifest first")]
    Unnamed(Digest),
    /// The registry takes its time.
    #[error("registry {0} does not answer; try again in a moment")]
    Slow(String),
    /// Too many wait already.
    #[error("the hub fetches as many blobs as it can; try again")]
    Busy,
    /// The disk's reserve would be touched.
    #[error("the hub's disk has no room: {0}")]
    NoRoom(String),
    /// The disk failed.
    #[error("failed to keep what was fetched")]
    Disk(#[source] Arc<io::Error>),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl ThroughError {
    /// Which class it falls into.
    #[must_use]
    pub fn fault(&self) -> Fault {
        match self {
            Self::Fetch(error) => error.fault(),
            Self::Unnamed(_) => Fault::NotFound,
            Self::Slow(_) => Fault::Unreachable,
            Self::Busy => Fault::Busy,
            Self::NoRoom(_) => Fault::DiskFull,
            Self::Disk(_) | Self::Store(_) => Fault::Internal,
        }
    }
}

/// An index or manifest that came through, now or before.
#[derive(Debug)]
pub struct Passed {
    /// Of its bytes.
    pub digest: Digest,
    /// As its registry has it.
    pub media_type: String,
    /// As its registry has it.
    pub bytes: Vec<u8>,
    /// The registry could not be asked whether its tag still names this.
    pub stale: bool,
}

/// Where a blob is.
#[derive(Debug)]
pub enum Found {
    /// In the image directory.
    Here,
    /// On its way into it.
    Coming(Flight),
    /// Not here; nobody fetches it yet.
    Away {
        /// In bytes.
        size: u64,
    },
}

/// A blob on its way in. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Flight {
    /// In bytes.
    pub size: u64,
    /// How far it is.
    pub progress: watch::Receiver<Progress>,
    /// Where it grows.
    pub growing: PathBuf,
    /// Where it is at the end.
    pub landed: PathBuf,
}

/// How far a blob is.
#[derive(Debug, Clone)]
pub enum Progress {
    /// So many bytes are there. Fewer than before when they were wrong.
    Bytes(u64),
    /// All of it, and it is the right one.
    Landed,
    /// It does not come.
    Failed(Arc<ThroughError>),
}

pub(super) struct Through {
    upstreams: Upstreams,
    client: Arc<Client>,
    partial: PartialDir,
    flights: Mutex<BTreeMap<Digest, Flight>>,
    turns: Arc<Semaphore>,
    asking: Vec<tokio::sync::Mutex<()>>,
    resting: Mutex<BTreeMap<String, Instant>>,
}

impl Through {
    pub(super) fn open(
        directory: &Path,
        registries: ClientConfig,
        upstreams: Upstreams,
    ) -> Result<Self, OpenError> {
        let partial = PartialDir::open(directory).map_err(|source| OpenError::Directory {
            path: directory.to_owned(),
            source,
        })?;
        let config = ClientConfig {
            retry: Retry {
                attempts: 3,
                ..Retry::PATIENT
            },
            ..registries
        };
        Ok(Self {
            upstreams,
            client: Arc::new(Client::new(config)?),
            partial,
            flights: Mutex::default(),
            turns: Arc::new(Semaphore::new(FETCHES)),
            asking: (0..STRIPES)
                .map(|_| tokio::sync::Mutex::default())
                .collect(),
            resting: Mutex::default(),
        })
    }

    pub(super) const fn bytes(&self) -> u64 {
        self.upstreams.bytes
    }

    /// Removes what came of blobs that nobody knows any more.
    pub(super) fn sweep(&self, keep: impl Fn(&Digest) -> bool) -> io::Result<u64> {
        let flights = lock(&self.flights);
        self.partial
            .retain(|digest| flights.contains_key(digest) || keep(digest))
    }

    fn rests(&self, host: &str) -> bool {
        let until = lock(&self.resting).get(host).copied();
        until.is_some_and(|until| until > Instant::now())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // Maps are whole after any panic.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Images {
    /// What a repository of the hub's registry is elsewhere: without tag or digest. `namespace` is the host that the client
    /// says it means (`?ns=`, as containerd asks its mirrors).
    #[must_use]
    pub fn upstream(&self, repository: &str, namespace: Option<&str>) -> Option<Reference> {
        let hosts = &self.inner.through.upstreams.hosts;
        if let Some(host) = namespace
            && hosts.values().any(|known| known == host)
        {
            return Reference::parse(&format!("{host}/{repository}")).ok();
        }
        hosts.iter().find_map(|(prefix, host)| {
            let rest = repository.strip_prefix(prefix)?.strip_prefix('/')?;
            Reference::parse(&format!("{host}/{rest}")).ok()
        })
    }

    /// Whether images of this registry come through the hub.
    #[must_use]
    pub fn is_upstream(&self, host: &str) -> bool {
        let hosts = &self.inner.through.upstreams.hosts;
        hosts.values().any(|known| known == host)
    }

    /// The index or manifest that `reference` names: from here when it is known by digest, or by a tag that is young
    /// enough; else from its registry.
    ///
    /// # Errors
    ///
    /// See [`ThroughError`].
    pub async fn through_manifest(
        &self,
        reference: &Reference,
        now: UnixMs,
        ttl_ms: Option<u64>,
    ) -> Result<Passed, ThroughError> {
        let through = &self.inner.through;
        let ttl_ms = ttl_ms.unwrap_or(through.upstreams.tag_ttl_ms);
        // One question for one name, however many ask it.
        let stripe = usize::from(Digest::of(reference.to_string().as_bytes()).as_bytes()[0]);
        let _alone = through.asking[stripe % STRIPES].lock().await;
        let known = self.known(reference).await?;
        let known = match known {
            Some((digest, checked_ms)) => self
                .passed(digest, now)
                .await?
                .map(|passed| (passed, checked_ms)),
            None => None,
        };
        let host = reference.host();
        let known = match known {
            Some((passed, None)) => return Ok(passed),
            Some((passed, Some(then))) if then.saturating_add(ttl_ms) > now.0 => return Ok(passed),
            Some((mut passed, Some(_))) => {
                passed.stale = true;
                Some(passed)
            }
            None => None,
        };
        // Others just waited in vain for it; all who come now would, one after the other.
        if through.rests(host) {
            return known.ok_or_else(|| ThroughError::Slow(host.to_owned()));
        }
        let (client, asked) = (Arc::clone(&through.client), reference.clone());
        let answer = tokio::task::spawn_blocking(move || client.manifest(&asked));
        let error = match tokio::time::timeout(MANIFEST_WITHIN, answer).await {
            Ok(answer) => match answer.map_err(|_| StoreError::Stopped)? {
                Ok(raw) => {
                    lock(&through.resting).remove(host);
                    let passed = Passed {
                        digest: raw.digest,
                        media_type: raw.media_type,
                        bytes: raw.bytes,
                        stale: false,
                    };
                    return self.keep(reference, passed, now).await;
                }
                Err(error) if error.fault() == Fault::Unreachable => {
                    ThroughError::Fetch(Arc::new(error))
                }
                Err(error) => {
                    if let (FetchError::NotFound { .. }, Some(tag)) = (&error, reference.tag()) {
                        let (name, tag) = (reference.name(), tag.to_owned());
                        let forget = move |connection: &rusqlite::Connection| {
                            Ok::<_, StoreError>(store::cache::delete_tag(connection, &name, &tag)?)
                        };
                        self.inner.store.write(forget).await?;
                    }
                    return Err(ThroughError::Fetch(Arc::new(error)));
                }
            },
            Err(_) => ThroughError::Slow(host.to_owned()),
        };
        lock(&through.resting).insert(host.to_owned(), Instant::now() + REST);
        let stale = known.ok_or(error)?;
        tracing::warn!(image = %reference, "its registry does not answer; the hub serves what the tag named before");
        Ok(stale)
    }

    /// What a reference named, and when that was last asked; a digest names itself for ever.
    async fn known(
        &self,
        reference: &Reference,
    ) -> Result<Option<(Digest, Option<u64>)>, ThroughError> {
        if let Some(digest) = reference.digest() {
            return Ok(Some((digest, None)));
        }
        let (name, tag) = (
            reference.name(),
            reference.tag().unwrap_or("latest").to_owned(),
        );
        let read = self.inner.store.read(move |connection| {
            Ok::<_, StoreError>(store::cache::tag(connection, &name, &tag)?)
        });
        Ok(read.await?.map(|tag| (tag.digest, Some(tag.checked_ms))))
    }

    /// An index or manifest that is here.
    async fn passed(&self, digest: Digest, now: UnixMs) -> Result<Option<Passed>, ThroughError> {
        let Some(row) = self.row(digest).await? else {
            return Ok(None);
        };
        let blobs = self.inner.blobs.clone();
        let read = move || blobs.read(&digest, MANIFEST_BYTES_MAX);
        let bytes = tokio::task::spawn_blocking(read)
            .await
            .map_err(|_| StoreError::Stopped)?
            .map_err(disk)?;
        let Some(bytes) = bytes else { return Ok(None) };
        // A layer must not be served as a manifest, whatever somebody put into it.
        let Ok(document) = Document::parse(&bytes, Some(&row.media_type)) else {
            return Ok(None);
        };
        if row.used_ms.saturating_add(NOTE_EVERY_MS) <= now.0 {
            self.note(digest, children(&document, now), now).await?;
        }
        Ok(Some(Passed {
            digest,
            media_type: row.media_type,
            bytes,
            stale: false,
        }))
    }

    async fn row(&self, digest: Digest) -> Result<Option<Blob>, ThroughError> {
        let read = self
            .inner
            .store
            .read(move |connection| Ok::<_, StoreError>(store::cache::blob(connection, &digest)?));
        Ok(read.await?)
    }

    async fn note(
        &self,
        digest: Digest,
        children: Vec<Blob>,
        now: UnixMs,
    ) -> Result<(), ThroughError> {
        let write = move |connection: &rusqlite::Connection| {
            for child in &children {
                store::cache::note_blob(connection, child)?;
            }
            Ok::<_, StoreError>(store::cache::use_blob(connection, &digest, now.0)?)
        };
        Ok(self.inner.store.write(write).await?)
    }

    /// Keeps what came, and notes what it names.
    async fn keep(
        &self,
        reference: &Reference,
        passed: Passed,
        now: UnixMs,
    ) -> Result<Passed, ThroughError> {
        // The rows are there before a sweep may look at the file.
        let _hold = self.hold().await;
        let blobs = self.inner.blobs.clone();
        let store = move || {
            room(&blobs, passed.bytes.len() as u64)?;
            blobs.put(&passed.bytes).map_err(disk)?;
            Ok::<_, ThroughError>(passed)
        };
        let passed = tokio::task::spawn_blocking(store)
            .await
            .map_err(|_| StoreError::Stopped)??;
        let document = Document::parse(&passed.bytes, Some(&passed.media_type));
        let mut rows = document.map_or_else(|_| Vec::new(), |document| children(&document, now));
        rows.push(Blob {
            digest: passed.digest,
            media_type: passed.media_type.clone(),
            size_bytes: passed.bytes.len() as u64,
            used_ms: now.0,
        });
        let (name, tag, digest) = (
            reference.name(),
            reference.tag().map(str::to_owned),
            passed.digest,
        );
        let write = move |connection: &rusqlite::Connection| {
            for row in &rows {
                store::cache::note_blob(connection, row)?;
            }
            store::cache::use_blob(connection, &digest, now.0)?;
            if let Some(tag) = tag {
                let value = Tag {
                    digest,
                    checked_ms: now.0,
                };
                store::cache::put_tag(connection, &name, &tag, value)?;
            }
            Ok::<_, StoreError>(())
        };
        self.inner.store.write(write).await?;
        Ok(passed)
    }

    /// Where a blob is; fetches it when it is nowhere and `fetch` says so. Any number may ask for one at once.
    ///
    /// # Errors
    ///
    /// See [`ThroughError`].
    pub async fn through_blob(
        &self,
        reference: &Reference,
        digest: Digest,
        fetch: bool,
        now: UnixMs,
    ) -> Result<Found, ThroughError> {
        let row = self.row(digest).await?;
        if let Some(row) = &row
            && row.used_ms.saturating_add(NOTE_EVERY_MS) <= now.0
        {
            self.note(digest, Vec::new(), now).await?;
        }
        let here = || self.inner.blobs.size(&digest).is_some();
        if here() {
            return Ok(Found::Here);
        }
        let row = row.ok_or(ThroughError::Unnamed(digest))?;
        if !fetch {
            return Ok(Found::Away {
                size: row.size_bytes,
            });
        }
        let mut flights = lock(&self.inner.through.flights);
        if let Some(flight) = flights.get(&digest) {
            return Ok(Found::Coming(flight.clone()));
        }
        // It may have landed meanwhile: flights end only afterwards.
        if here() {
            return Ok(Found::Here);
        }
        if flights.len() >= WAITING_MAX {
            return Err(ThroughError::Busy);
        }
        let (sender, progress) = watch::channel(Progress::Bytes(0));
        let flight = Flight {
            size: row.size_bytes,
            progress,
            growing: self.inner.through.partial.path(&digest),
            landed: self.inner.blobs.path(&digest),
        };
        flights.insert(digest, flight.clone());
        drop(flights);
        let blob = Descriptor {
            media_type: row.media_type,
            digest,
            size: row.size_bytes,
            platform: None,
            annotations: BTreeMap::new(),
        };
        let (images, reference) = (self.clone(), reference.clone());
        // For all who wait, so it goes on when the first of them goes away.
        tokio::spawn(async move { images.fly(reference, blob, sender).await });
        Ok(Found::Coming(flight))
    }

    async fn fly(&self, reference: Reference, blob: Descriptor, sender: watch::Sender<Progress>) {
        let through = &self.inner.through;
        let digest = blob.digest;
        let (sender, told) = (Arc::new(sender), &reference.name());
        let result = match Arc::clone(&through.turns).acquire_owned().await {
            Err(_) => Err(StoreError::Stopped.into()),
            Ok(turn) => {
                let (images, sender) = (self.clone(), Arc::clone(&sender));
                let reference = reference.clone();
                let fetch = tokio::task::spawn_blocking(move || {
                    let _turn = turn;
                    images.fetch(&reference, &blob, &sender)
                });
                fetch
                    .await
                    .unwrap_or_else(|_| Err(StoreError::Stopped.into()))
            }
        };
        lock(&through.flights).remove(&digest);
        match result {
            Ok(()) => {
                tracing::info!(blob = %digest.short(), from = %told, "fetched a blob for the site");
                sender.send_replace(Progress::Landed);
                // There may be more now than is kept.
                self.want_sweep();
            }
            Err(error) => {
                tracing::warn!(blob = %digest, from = %told, error = &error as &dyn std::error::Error, "failed to fetch a blob");
                sender.send_replace(Progress::Failed(Arc::new(error)));
            }
        }
    }

    /// Fetches a blob into the image directory. Blocks.
    fn fetch(
        &self,
        reference: &Reference,
        blob: &Descriptor,
        sender: &watch::Sender<Progress>,
    ) -> Result<(), ThroughError> {
        let (through, blobs) = (&self.inner.through, &self.inner.blobs);
        let mut partial = through
            .partial
            .blob(&blob.digest, blob.size)
            .map_err(disk)?;
        room(blobs, blob.size.saturating_sub(partial.size()))?;
        let mut looked = partial.size();
        let mut short = None;
        let mut progress = |bytes: u64| {
            if bytes.saturating_sub(looked) >= LOOK_EVERY {
                looked = bytes;
                if let Err(error) = room(blobs, 0) {
                    let full = io::Error::from(io::ErrorKind::StorageFull);
                    short = Some(error);
                    return Err(full);
                }
            }
            sender.send_replace(Progress::Bytes(bytes));
            Ok(())
        };
        let fetched = through
            .client
            .resume(reference, blob, &mut partial, &mut progress);
        if let Some(short) = short {
            return Err(short);
        }
        fetched.map_err(|error| ThroughError::Fetch(Arc::new(error)))?;
        drop(partial);
        let (growing, landed) = (through.partial.path(&blob.digest), blobs.path(&blob.digest));
        let land = || {
            File::open(&growing)?.sync_all()?;
            fs::rename(&growing, &landed)?;
            through.partial.remove(&blob.digest)?;
            landed
                .parent()
                .map_or(Ok(()), |directory| File::open(directory)?.sync_all())
        };
        land().map_err(disk)
    }
}

/// What a document names.
fn children(document: &Document, now: UnixMs) -> Vec<Blob> {
    let named: Vec<&Descriptor> = match document {
        Document::Index(index) => index.manifests.iter().collect(),
        Document::Manifest(manifest) => manifest.layers.iter().chain([&manifest.config]).collect(),
    };
    named
        .into_iter()
        .take(CHILDREN_MAX)
        .map(|child| Blob {
            digest: child.digest,
            media_type: child.media_type.chars().take(128).collect(),
            size_bytes: child.size.min(i64::MAX.unsigned_abs()),
            used_ms: now.0,
        })
        .collect()
}

fn disk(error: io::Error) -> ThroughError {
    ThroughError::Disk(Arc::new(error))
}

fn room(blobs: &BlobDir, bytes: u64) -> Result<(), ThroughError> {
    let directory = blobs.path(&Digest::of(b""));
    let directory = directory.parent().unwrap_or(&directory);
    let room = Room::of(directory, None).map_err(disk)?;
    room.shortage(bytes, 2).map_or(Ok(()), |shortage| {
        Err(ThroughError::NoRoom(shortage.to_string()))
    })
}
