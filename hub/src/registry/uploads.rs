//! [`Uploads`]: blobs on their way in, each a file that grows until its digest is told.
//!
//! An upload is a row and a file of the same name. What was hashed of a file is kept in memory; after a restart of the
//! hub the file is hashed again, so an upload goes on from its last byte even after SIGKILL. Bytes are hashed and
//! written on a thread of their own, which ends with whole chunks also when the caller goes away.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::body::{Body, Bytes};
use foreshore_images::room::Shortage;
use foreshore_images::{Digest, Room};
use foreshore_killpoint as killpoint;
use futures_util::StreamExt as _;
use sha2::{Digest as _, Sha256};
use tokio::sync::{OwnedMutexGuard, Semaphore, mpsc};
use tokio::time::Instant;

use crate::rollout::UnixMs;
use crate::store::{self, Store, StoreError};

/// Bodies that are taken in at once; each has a thread and a few chunks in memory.
const WRITERS: usize = 32;

/// How long a body may wait for its turn, or for another request that writes to the same upload.
const TURN_WITHIN: Duration = Duration::from_secs(10);

/// Chunks between the connection and the disk, each what one read of the connection gave: at most 64 KiB or so.
const CHUNKS: usize = 8;

/// The room on the disk is looked at again after so many bytes.
const LOOK_EVERY: u64 = 8 << 20;

/// An upload for which nothing came for so long gives up its place and its room when others need them.
const IDLE_MS: u64 = 10 * 60_000;

/// How patient an upload is with who sends it.
#[derive(Debug, Clone, Copy)]
struct Patience {
    /// Something must come within so long.
    idle: Duration,
    /// A body has so long, and what its bytes take at [`Self::pace`].
    base: Duration,
    /// In bytes a second.
    pace: u64,
}

const PATIENCE: Patience = Patience {
    idle: Duration::from_secs(30),
    base: Duration::from_secs(60),
    pace: 4 << 10,
};

/// How much is taken.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Uploads at once.
    pub open: u64,
    /// Bytes of one blob.
    pub blob_bytes: u64,
    /// An upload for which nothing came for so long is given up, in milliseconds.
    pub expires_ms: u64,
}

/// Why an upload did not go on.
#[derive(Debug, thiserror::Error)]
pub enum UploadError {
    /// No such upload in this repository.
    #[error("there is no such upload; it ended, or nothing came for too long: begin another")]
    Unknown,
    /// Somebody else writes to it, or to too many others.
    #[error("the hub is busy with this upload or with {WRITERS} others; try again")]
    Busy,
    /// As many as may be.
    #[error(
        "{0} uploads are under way already; end or cancel some of them, or raise [registry] max_uploads in hub.toml"
    )]
    TooMany(u64),
    /// A larger blob than is taken.
    #[error("a blob has at most {0} bytes here; raise [api] max_image_bytes in hub.toml")]
    TooLarge(u64),
    /// The disk's reserve would be touched.
    #[error("the hub's disk has no room for this: {0}")]
    NoRoom(Shortage),
    /// The disk is full.
    #[error("the hub's disk is full")]
    Full,
    /// The client sends nothing, or too slowly.
    #[error("the upload came too slowly and was cut off after {0} bytes; go on from there")]
    Slow(u64),
    /// The client's connection broke.
    #[error("the upload broke off after {0} bytes")]
    Broken(u64),
    /// Not the next bytes.
    #[error("the next byte is number {0}, counted from 0")]
    OutOfOrder(u64),
    /// Fewer or more bytes than were told.
    #[error("{told} bytes were announced and {came} came")]
    Length {
        /// As announced.
        told: u64,
        /// What came, at least.
        came: u64,
    },
    /// Not the bytes that the digest names.
    #[error("the bytes have the digest {0}; the upload was given up")]
    Digest(Digest),
    /// The disk failed.
    #[error("failed to write the upload")]
    Io(#[source] io::Error),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl UploadError {
    fn io(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::Full,
            io::ErrorKind::NotFound => Self::Unknown,
            _ => Self::Io(error),
        }
    }
}

/// All uploads. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Uploads {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    directory: PathBuf,
    store: Store,
    limits: Limits,
    patience: Patience,
    open: Mutex<BTreeMap<String, Arc<tokio::sync::Mutex<Upload>>>>,
    writers: Arc<Semaphore>,
}

/// One upload, while somebody has it to himself.
pub type Held = OwnedMutexGuard<Upload>;

/// What is known of one upload.
#[derive(Debug)]
pub struct Upload {
    id: String,
    repository: String,
    path: PathBuf,
    size: u64,
    /// Of the first `size` bytes of the file; `None` until it was looked at since the hub started.
    hasher: Option<Sha256>,
    ended: bool,
}

impl Upload {
    /// Names it in paths: 32 hexadecimal digits.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Bytes that are there.
    #[must_use]
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// Hashes what is on disk, once.
    fn look(&mut self) -> io::Result<()> {
        if self.hasher.is_some() {
            return Ok(());
        }
        let (mut hasher, mut size) = (Sha256::new(), 0);
        let mut file = File::open(&self.path)?;
        let mut buffer = vec![0; 128 << 10];
        loop {
            match file.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => {
                    hasher.update(&buffer[..count]);
                    size += count as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        (self.hasher, self.size) = (Some(hasher), size);
        Ok(())
    }

    fn digest(&self) -> Digest {
        let hasher = self.hasher.clone().unwrap_or_default();
        Digest::from_bytes(hasher.finalize().into())
    }

    /// Writes what comes through `chunks`, whole chunks only, and flushes it.
    fn write(&mut self, mut chunks: mpsc::Receiver<Bytes>) -> Result<(), UploadError> {
        let mut file = File::options()
            .write(true)
            .open(&self.path)
            .map_err(UploadError::io)?;
        // Half of a chunk, from a write that failed before.
        file.set_len(self.size).map_err(UploadError::io)?;
        io::Seek::seek(&mut file, io::SeekFrom::Start(self.size)).map_err(UploadError::io)?;
        let directory = self.path.parent().map_or_else(PathBuf::new, Path::to_owned);
        let mut looked = self.size;
        while let Some(chunk) = chunks.blocking_recv() {
            if self.size - looked >= LOOK_EVERY {
                room(&directory, 0)?;
                looked = self.size;
            }
            file.write_all(&chunk).map_err(UploadError::io)?;
            if let Some(hasher) = &mut self.hasher {
                hasher.update(&chunk);
            }
            self.size += chunk.len() as u64;
        }
        // What is acknowledged is there after a power cut.
        file.sync_data().map_err(UploadError::io)?;
        killpoint::reached("upload", "received");
        Ok(())
    }
}

/// Which bytes a body claims to be.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Claim {
    /// The first one's place in the blob.
    pub first: Option<u64>,
    /// How many.
    pub length: Option<u64>,
}

impl Uploads {
    /// Opens the directory, and removes files without a row in it. Blocks on the disk.
    ///
    /// # Errors
    ///
    /// When disk or store fail.
    pub async fn open(
        directory: PathBuf,
        store: Store,
        limits: Limits,
    ) -> Result<Self, UploadError> {
        let known = store
            .read(|connection| Ok::<_, StoreError>(store::registry::uploads(connection)?))
            .await?;
        let prepare = || {
            fs::create_dir_all(&directory)?;
            let mut files = BTreeSet::new();
            for entry in fs::read_dir(&directory)? {
                let entry = entry?;
                let name = entry.file_name().into_string().unwrap_or_default();
                if known.contains(&name) {
                    files.insert(name);
                } else {
                    fs::remove_file(entry.path())?;
                }
            }
            Ok(files)
        };
        let files: BTreeSet<String> = prepare().map_err(UploadError::Io)?;
        let gone: Vec<String> = known.difference(&files).cloned().collect();
        store
            .write(move |connection| {
                for id in &gone {
                    store::registry::end_upload(connection, id)?;
                }
                Ok::<_, StoreError>(())
            })
            .await?;
        Ok(Self {
            inner: Arc::new(Inner {
                directory,
                store,
                limits,
                patience: PATIENCE,
                open: Mutex::default(),
                writers: Arc::new(Semaphore::new(WRITERS)),
            }),
        })
    }

    /// Begins an upload into a repository.
    ///
    /// # Errors
    ///
    /// [`UploadError::TooMany`], or when disk or store fail.
    pub async fn begin(&self, repository: &str, now: UnixMs) -> Result<Held, UploadError> {
        let id = format!("{:032x}", random()?);
        let path = self.inner.directory.join(&id);
        self.make_room(0, now).await?;
        File::create_new(&path).map_err(UploadError::io)?;
        killpoint::reached("upload", "created");
        let max = self.inner.limits.open;
        let mut begun = self.enter(&id, repository, now).await;
        // Those that were left alone make room for who comes now.
        if matches!(begun, Ok(false)) && self.expire_idle(now).await? > 0 {
            begun = self.enter(&id, repository, now).await;
        }
        match begun {
            Ok(true) => {}
            refused => {
                fs::remove_file(&path).map_err(UploadError::io)?;
                refused?;
                return Err(UploadError::TooMany(max));
            }
        }
        killpoint::reached("upload", "begun");
        let mut upload = self.cold(&id, repository.to_owned());
        upload.hasher = Some(Sha256::new());
        let upload = Arc::new(tokio::sync::Mutex::new(upload));
        self.table().insert(id, Arc::clone(&upload));
        Ok(upload.lock_owned().await)
    }

    async fn enter(&self, id: &str, repository: &str, now: UnixMs) -> Result<bool, StoreError> {
        let (id, name, max) = (id.to_owned(), repository.to_owned(), self.inner.limits.open);
        let write = move |connection: &rusqlite::Connection| {
            let begun = store::registry::begin_upload(connection, &id, &name, now.0, max)?;
            Ok::<_, StoreError>(begun)
        };
        self.inner.store.write(write).await
    }

    /// An upload of a repository, for the caller alone. After a restart of the hub reads the whole file.
    ///
    /// # Errors
    ///
    /// [`UploadError::Unknown`], [`UploadError::Busy`], or when disk or store fail.
    pub async fn hold(&self, repository: &str, id: &str) -> Result<Held, UploadError> {
        let is_id = id.len() == 32 && id.bytes().all(|byte| byte.is_ascii_hexdigit());
        let row = id.to_owned();
        let known = self.inner.store.read(move |connection| {
            Ok::<_, StoreError>(store::registry::upload(connection, &row)?)
        });
        if !is_id || known.await?.as_deref() != Some(repository) {
            return Err(UploadError::Unknown);
        }
        let cold = || {
            Arc::new(tokio::sync::Mutex::new(
                self.cold(id, repository.to_owned()),
            ))
        };
        let upload = Arc::clone(self.table().entry(id.to_owned()).or_insert_with(cold));
        let mut held = tokio::time::timeout(TURN_WITHIN, upload.lock_owned())
            .await
            .map_err(|_| UploadError::Busy)?;
        if held.ended {
            return Err(UploadError::Unknown);
        }
        let looked = tokio::task::spawn_blocking(move || held.look().map(|()| held));
        looked
            .await
            .map_err(|_| StoreError::Stopped)?
            .map_err(UploadError::io)
    }

    /// Appends a body to an upload. Whatever came before an error stays; but when it is the disk that is full, the upload is
    /// over.
    ///
    /// # Errors
    ///
    /// See [`UploadError`].
    ///
    /// # Cancel safety
    ///
    /// Chunks that were taken are written; the upload stays held until they are.
    pub async fn append(
        &self,
        held: Held,
        body: Body,
        claim: Claim,
        now: UnixMs,
    ) -> Result<Held, UploadError> {
        if claim.first.is_some_and(|first| first != held.size) {
            return Err(UploadError::OutOfOrder(held.size));
        }
        let max = self.inner.limits.blob_bytes;
        if claim
            .length
            .is_some_and(|length| held.size.saturating_add(length) > max)
        {
            return Err(UploadError::TooLarge(max));
        }
        self.make_room(claim.length.unwrap_or(0), now).await?;
        let turn =
            tokio::time::timeout(TURN_WITHIN, Arc::clone(&self.inner.writers).acquire_owned());
        let turn = turn
            .await
            .map_err(|_| UploadError::Busy)?
            .map_err(|_| StoreError::Stopped)?;
        let (id, before) = (held.id.clone(), held.size);
        let (sender, chunks) = mpsc::channel(CHUNKS);
        let writer = tokio::task::spawn_blocking(move || {
            let (mut held, _turn) = (held, turn);
            let written = held.write(chunks);
            (held, written)
        });
        let bound = claim.length.unwrap_or(u64::MAX).min(max - before);
        let fed = self.feed(body, sender, bound, before).await;
        let (held, written) = writer.await.map_err(|_| StoreError::Stopped)?;
        if let Err(error) = written {
            if matches!(error, UploadError::NoRoom(_) | UploadError::Full) {
                // What came of it takes the room that others need.
                self.cancel(held).await?;
            }
            return Err(error);
        }
        let touch = move |connection: &rusqlite::Connection| {
            Ok::<_, StoreError>(store::registry::touch_upload(connection, &id, now.0)?)
        };
        self.inner.store.write(touch).await?;
        let came = fed?;
        match claim.length {
            Some(told) if told != came => Err(UploadError::Length { told, came }),
            _ => Ok(held),
        }
    }

    /// Passes a body on, at most `bound` bytes; how many. `before` is what there was already.
    async fn feed(
        &self,
        body: Body,
        sender: mpsc::Sender<Bytes>,
        bound: u64,
        before: u64,
    ) -> Result<u64, UploadError> {
        let Patience { idle, base, pace } = self.inner.patience;
        let (begun, mut came) = (Instant::now(), 0_u64);
        let mut stream = body.into_data_stream();
        loop {
            let allowed = base + Duration::from_secs(came / pace);
            let until = (begun + allowed).min(Instant::now() + idle);
            let chunk = tokio::time::timeout_at(until, stream.next())
                .await
                .map_err(|_| UploadError::Slow(before + came))?;
            let Some(chunk) = chunk else { return Ok(came) };
            let chunk = chunk.map_err(|_| UploadError::Broken(before + came))?;
            let left = bound - came;
            if chunk.len() as u64 > left {
                let max = self.inner.limits.blob_bytes;
                return Err(if bound == max - before {
                    UploadError::TooLarge(max)
                } else {
                    UploadError::Length {
                        told: bound,
                        came: came + chunk.len() as u64,
                    }
                });
            }
            came += chunk.len() as u64;
            if sender.send(chunk).await.is_err() {
                // The writer gave up and knows why.
                return Ok(came);
            }
        }
    }

    /// Ends an upload: its bytes become the blob at `target`, which its repository has a lease on. Whoever calls
    /// keeps the image directory from being swept meanwhile.
    ///
    /// # Errors
    ///
    /// [`UploadError::Digest`], after which the upload is gone, or when disk or store fail.
    pub async fn finish(
        &self,
        mut held: Held,
        digest: Digest,
        target: PathBuf,
        now: UnixMs,
    ) -> Result<(), UploadError> {
        let found = held.digest();
        if found != digest {
            self.cancel(held).await?;
            return Err(UploadError::Digest(found));
        }
        let repository = held.repository.clone();
        // First the lease: a blob without one is swept when the hub is killed and starts again.
        self.inner
            .store
            .write(move |connection| {
                store::registry::renew_leases(connection, &repository, now.0)?;
                store::registry::lease(connection, &repository, &digest, now.0)?;
                Ok::<_, StoreError>(())
            })
            .await?;
        killpoint::reached("upload", "leased");
        let moved = tokio::task::spawn_blocking(move || {
            File::open(&held.path)?.sync_all()?;
            fs::rename(&held.path, &target)?;
            held.ended = true;
            killpoint::reached("upload", "renamed");
            target
                .parent()
                .map_or(Ok(()), |directory| File::open(directory)?.sync_all())?;
            killpoint::reached("upload", "durable");
            Ok(held)
        });
        let held = moved
            .await
            .map_err(|_| StoreError::Stopped)?
            .map_err(UploadError::io)?;
        self.forget(&held.id).await?;
        killpoint::reached("upload", "finished");
        Ok(())
    }

    /// Ends an upload without a blob.
    ///
    /// # Errors
    ///
    /// When disk or store fail.
    pub async fn cancel(&self, mut held: Held) -> Result<(), UploadError> {
        held.ended = true;
        match fs::remove_file(&held.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(UploadError::Io(error));
            }
            _ => {}
        }
        self.forget(&held.id).await
    }

    async fn forget(&self, id: &str) -> Result<(), UploadError> {
        self.table().remove(id);
        let row = id.to_owned();
        let end = move |connection: &rusqlite::Connection| {
            Ok::<_, StoreError>(store::registry::end_upload(connection, &row)?)
        };
        self.inner.store.write(end).await?;
        Ok(())
    }

    /// Ends uploads for which nothing came for too long; how many.
    ///
    /// # Errors
    ///
    /// When disk or store fail.
    pub async fn expire(&self, now: UnixMs) -> Result<usize, UploadError> {
        self.expire_before(now.0.saturating_sub(self.inner.limits.expires_ms))
            .await
    }

    /// Room for `bytes` more, if need be that of uploads for which nothing came in a while.
    async fn make_room(&self, bytes: u64, now: UnixMs) -> Result<(), UploadError> {
        let Err(short) = room(&self.inner.directory, bytes) else {
            return Ok(());
        };
        if self.expire_idle(now).await? == 0 {
            return Err(short);
        }
        room(&self.inner.directory, bytes)
    }

    async fn expire_idle(&self, now: UnixMs) -> Result<usize, UploadError> {
        self.expire_before(now.0.saturating_sub(IDLE_MS)).await
    }

    async fn expire_before(&self, before: u64) -> Result<usize, UploadError> {
        let expired = self.inner.store.read(move |connection| {
            Ok::<_, StoreError>(store::registry::expired_uploads(connection, before)?)
        });
        let mut count = 0;
        for id in expired.await? {
            let known = self.table().get(&id).map(Arc::clone);
            let unknown = || Arc::new(tokio::sync::Mutex::new(self.cold(&id, String::new())));
            // Somebody still writes to it.
            let Ok(held) = known.unwrap_or_else(unknown).try_lock_owned() else {
                continue;
            };
            self.cancel(held).await?;
            count += 1;
        }
        Ok(count)
    }

    /// An upload that was not looked at yet.
    fn cold(&self, id: &str, repository: String) -> Upload {
        Upload {
            id: id.to_owned(),
            repository,
            path: self.inner.directory.join(id),
            size: 0,
            hasher: None,
            ended: false,
        }
    }

    fn table(
        &self,
    ) -> std::sync::MutexGuard<'_, BTreeMap<String, Arc<tokio::sync::Mutex<Upload>>>> {
        // A map of handles is whole after any panic.
        self.inner
            .open
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

fn random() -> Result<u128, UploadError> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(|error| UploadError::Io(io::Error::other(error)))?;
    Ok(u128::from_be_bytes(bytes))
}

/// Whether `bytes` more leave the disk's reserve alone.
fn room(directory: &Path, bytes: u64) -> Result<(), UploadError> {
    let room = Room::of(directory, None).map_err(UploadError::Io)?;
    room.shortage(bytes, 1)
        .map_or(Ok(()), |shortage| Err(UploadError::NoRoom(shortage)))
}

#[cfg(test)]
mod tests;
