//! Which blobs are reached, and the end of the others: those of archives that were refused or whose import was cut
//! off, of tags that were moved or removed, and of releases that nobody asks for any more.
//!
//! A blob of an image that is only coming in is reached by nothing yet. So whoever brings one in, or is about to
//! make a release of one, holds a [`Hold`], and nothing is swept meanwhile. A push takes many calls and may take
//! hours: it holds nothing in between, but has a lease on each of its blobs.

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use foreshore_images::blobs::BlobDir;
use foreshore_images::manifest::{Document, MANIFEST_BYTES_MAX};
use foreshore_images::{Digest, Reference};
use tokio::sync::{Notify, OwnedRwLockReadGuard, OwnedRwLockWriteGuard, RwLock};

use super::{HUB_HOST, Images};
use crate::rollout::UnixMs;
use crate::store::cache::Blob;
use crate::store::registry::Manifest;
use crate::store::{self, StoreError};

/// The directory is swept so often even without news: releases are forgotten meanwhile.
const EVERY: Duration = Duration::from_secs(3600);

/// A blob of another registry that is not here is known for so long after its last use.
const KNOWN_DAYS: u64 = 30;

/// What came of one before its fetch broke off stays for so long.
const PARTIAL_DAYS: u64 = 1;

const DAY_MS: u64 = 24 * 3600 * 1000;

/// How long to wait before looking again whether nothing comes in.
const BUSY: Duration = Duration::from_secs(1);

/// Who keeps the directory from being swept, and that it should be.
#[derive(Debug)]
pub(super) struct Broom {
    holders: Arc<RwLock<()>>,
    wanted: Arc<Notify>,
}

impl Broom {
    /// The directory is to be swept at once: what a killed hub left is in it.
    pub(super) fn new() -> Self {
        let wanted = Arc::new(Notify::new());
        wanted.notify_one();
        Self {
            holders: Arc::default(),
            wanted,
        }
    }

    /// The directory is to be swept once nobody holds it.
    pub(super) fn want(&self) {
        self.wanted.notify_one();
    }

    /// Nothing is swept until the answer is dropped. Waits for a sweep that has begun: a moment.
    pub(super) async fn hold(&self) -> Hold {
        Hold {
            _guard: Arc::clone(&self.holders).read_owned().await,
            wanted: None,
        }
    }

    /// The same, and a sweep is wanted afterwards, whatever becomes of the holder.
    pub(super) async fn hold_then_sweep(&self) -> Hold {
        let mut hold = self.hold().await;
        hold.wanted = Some(Arc::clone(&self.wanted));
        hold
    }
}

/// Keeps every blob where it is.
#[derive(Debug)]
pub struct Hold {
    _guard: OwnedRwLockReadGuard<()>,
    wanted: Option<Arc<Notify>>,
}

impl Drop for Hold {
    fn drop(&mut self) {
        if let Some(wanted) = self.wanted.take() {
            wanted.notify_one();
        }
    }
}

impl Images {
    /// Removes blobs that nothing reaches, whenever some may have become so, until the future is dropped.
    pub async fn keep_tidy(&self, now: impl Fn() -> UnixMs) {
        let broom = &self.inner.broom;
        loop {
            _ = tokio::time::timeout(EVERY, broom.wanted.notified()).await;
            // Not queued for: who waits for a lock to write makes every later reader wait as well, and an import
            // may take minutes.
            let alone = loop {
                match Arc::clone(&broom.holders).try_write_owned() {
                    Ok(alone) => break alone,
                    Err(_) => tokio::time::sleep(BUSY).await,
                }
            };
            match self.sweep(now()).await {
                Ok(0) => {}
                Ok(bytes) => tracing::info!(bytes, "removed blobs that no image or release needs"),
                Err(error) => tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "failed to sweep the image directory"
                ),
            }
            drop(alone);
        }
    }

    /// Nothing is swept until the answer is dropped: for who makes a release of images that are there now.
    pub async fn hold(&self) -> Hold {
        self.inner.broom.hold().await
    }

    /// Has the image directory swept soon.
    pub fn want_sweep(&self) {
        self.inner.broom.want();
    }

    /// The directory for who needs it as it is, without anybody who brings something in; `None` when somebody still
    /// does so after `within`.
    pub(crate) async fn alone(&self, within: Duration) -> Option<OwnedRwLockWriteGuard<()>> {
        let end = tokio::time::Instant::now() + within;
        loop {
            if let Ok(alone) = Arc::clone(&self.inner.broom.holders).try_write_owned() {
                return Some(alone);
            }
            if tokio::time::Instant::now() >= end {
                return None;
            }
            tokio::time::sleep(BUSY / 20).await;
        }
    }

    /// All that is needed now, and by whom; the caller sees to it that nothing comes in meanwhile.
    ///
    /// # Errors
    ///
    /// When the store or the disk fails.
    pub(crate) async fn needed(&self, now: UnixMs) -> Result<Needed, SweepError> {
        // Asked of the writer, not of a snapshot: whatever was queued before by a holder that is gone is in.
        let read = self.inner.store.write(move |connection| {
            let tags = store::image::list(connection)?;
            let mut roots: BTreeSet<Digest> =
                tags.into_iter().map(|image| image.view.digest).collect();
            let mut foreign = Vec::new();
            for image in store::release::needed(connection)?
                .into_iter()
                .flat_map(|release| release.services.into_values())
                .map(|service| service.image)
            {
                match Reference::parse(&image) {
                    Ok(image) if image.host() == HUB_HOST => roots.extend(image.digest()),
                    Ok(image) => foreign.extend(image.digest()),
                    Err(_) => {}
                }
            }
            let manifests = store::registry::manifests(connection, None)?;
            let waiting = manifests.iter().filter(|row| row.keep_until_ms > now.0);
            roots.extend(waiting.map(|row| row.digest));
            let leased = store::registry::leased(connection)?;
            Ok::<_, StoreError>((roots, foreign, manifests, leased))
        });
        let ((roots, foreign, manifests, leased), blobs) = (read.await?, self.inner.blobs.clone());
        tokio::task::spawn_blocking(move || {
            let mut fetched = BTreeSet::new();
            follow(&blobs, foreign, &mut fetched)?;
            Ok(Needed {
                fetched,
                reached: reached(&blobs, roots, &manifests)?,
                leased,
                manifests,
            })
        })
        .await
        .map_err(|_| StoreError::Stopped)?
    }

    async fn sweep(&self, now: UnixMs) -> Result<u64, SweepError> {
        let before = now.0.saturating_sub(self.inner.leases_ms);
        let expire = move |connection: &rusqlite::Connection| {
            Ok::<_, StoreError>(store::registry::expire_leases(connection, before)?)
        };
        self.inner.store.write(expire).await?;
        let cached = self
            .inner
            .store
            .read(|connection| Ok::<_, StoreError>(store::cache::blobs(connection)?));
        let Needed {
            mut reached,
            fetched,
            leased,
            manifests,
        } = self.needed(now).await?;
        let kept = self.trim(cached.await?, &reached, &fetched, now).await?;
        let gone: Vec<Manifest> = manifests
            .into_iter()
            .filter(|row| !reached.contains(&row.digest))
            .collect();
        if !gone.is_empty() {
            // The rows first: a row without its blob would promise what is not there.
            let forget = move |connection: &rusqlite::Connection| {
                for row in &gone {
                    store::registry::delete_manifest(connection, &row.repository, &row.digest)?;
                }
                Ok::<_, StoreError>(())
            };
            self.inner.store.write(forget).await?;
        }
        reached.extend(leased);
        reached.extend(kept);
        let blobs = self.inner.blobs.clone();
        let freed = tokio::task::spawn_blocking(move || blobs.retain(&reached))
            .await
            .map_err(|_| StoreError::Stopped)??;
        self.forget_withdrawn().await?;
        Ok(freed)
    }

    /// That a blob was removed from a repository need not be known once it is gone for all.
    async fn forget_withdrawn(&self) -> Result<(), SweepError> {
        let read = self
            .inner
            .store
            .read(|connection| Ok::<_, StoreError>(store::registry::withdrawn(connection)?));
        let mut gone = read.await?;
        gone.retain(|(_, digest)| self.inner.blobs.size(digest).is_none());
        if gone.is_empty() {
            return Ok(());
        }
        let forget = move |connection: &rusqlite::Connection| {
            for (repository, digest) in &gone {
                store::registry::restore(connection, repository, digest)?;
            }
            Ok::<_, StoreError>(())
        };
        Ok(self.inner.store.write(forget).await?)
    }
}

impl Images {
    /// Which of `cached` blobs of other registries stay, and those partly there with them. What nobody asked for in a
    /// long time and is not there is forgotten.
    async fn trim(
        &self,
        cached: Vec<Blob>,
        reached: &BTreeSet<Digest>,
        fetched: &BTreeSet<Digest>,
        now: UnixMs,
    ) -> Result<BTreeSet<Digest>, SweepError> {
        let (blobs, through) = (&self.inner.blobs, &self.inner.through);
        // What the hub's own images share with them is no part of the cache.
        let size = |digest: &Digest| blobs.size(digest).filter(|_| !reached.contains(digest));
        let gone = evicted(&cached, through.bytes(), size, |digest| {
            fetched.contains(digest)
        });
        if !gone.is_empty() {
            tracing::info!(
                count = gone.len(),
                "the cache of other registries is full; removing what was used longest ago"
            );
        }
        let unused = |row: &Blob, days: u64| row.used_ms + days * DAY_MS < now.0;
        let (forgotten, known): (Vec<Blob>, Vec<Blob>) = cached
            .into_iter()
            .partition(|row| unused(row, KNOWN_DAYS) && blobs.size(&row.digest).is_none());
        let recent: BTreeSet<Digest> = known
            .iter()
            .filter(|row| !unused(row, PARTIAL_DAYS))
            .map(|row| row.digest)
            .collect();
        through.sweep(|digest| recent.contains(digest))?;
        if !forgotten.is_empty() {
            let forget = move |connection: &rusqlite::Connection| {
                for row in &forgotten {
                    store::cache::forget_blob(connection, &row.digest)?;
                }
                Ok::<_, StoreError>(())
            };
            self.inner.store.write(forget).await?;
        }
        let stay = known.into_iter().map(|row| row.digest);
        Ok(stay.filter(|digest| !gone.contains(digest)).collect())
    }
}

/// What must stay in the image directory.
#[derive(Debug)]
pub(crate) struct Needed {
    /// Blobs of tags, releases and manifests that wait for their tag.
    pub(crate) reached: BTreeSet<Digest>,
    /// Blobs of other registries' images that releases name.
    fetched: BTreeSet<Digest>,
    /// Blobs that pushes count on.
    leased: BTreeSet<Digest>,
    /// Every manifest row.
    manifests: Vec<Manifest>,
}

/// Why the directory was not swept, or not to its end. Nothing that is needed is gone.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SweepError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The disk failed.
    #[error("failed to read or remove a blob")]
    Disk(#[from] io::Error),
}

/// The digest of an image as a release names it, if it is one of the hub's own.
pub fn imported(image: &str) -> Option<Digest> {
    let reference = Reference::parse(image).ok()?;
    (reference.host() == HUB_HOST)
        .then(|| reference.digest())
        .flatten()
}

/// `roots`, all that they refer to, and the manifests about any of it, such as signatures, with what those refer to.
fn reached(
    blobs: &BlobDir,
    roots: BTreeSet<Digest>,
    manifests: &[Manifest],
) -> io::Result<BTreeSet<Digest>> {
    let mut waiting: Vec<Digest> = roots.into_iter().collect();
    let mut keep = BTreeSet::new();
    while !waiting.is_empty() {
        follow(blobs, waiting, &mut keep)?;
        let about = |row: &&Manifest| row.subject.is_some_and(|subject| keep.contains(&subject));
        waiting = manifests
            .iter()
            .filter(about)
            .map(|row| row.digest)
            .filter(|digest| !keep.contains(digest))
            .collect();
    }
    Ok(keep)
}

/// Adds `waiting` and all that it refers to. An error rather than a guess when something that is there cannot be read.
fn follow(
    blobs: &BlobDir,
    mut waiting: Vec<Digest>,
    keep: &mut BTreeSet<Digest>,
) -> io::Result<()> {
    while let Some(digest) = waiting.pop() {
        if !keep.insert(digest) {
            continue;
        }
        let Some(bytes) = blobs.read(&digest, MANIFEST_BYTES_MAX)? else {
            continue;
        };
        match Document::parse(&bytes, None) {
            Ok(Document::Index(index)) => {
                waiting.extend(index.manifests.iter().map(|child| child.digest));
            }
            Ok(Document::Manifest(manifest)) => {
                keep.insert(manifest.config.digest);
                keep.extend(manifest.layers.iter().map(|layer| layer.digest));
            }
            Err(_) => {}
        }
    }
    Ok(())
}

/// Which of `rows` go, so that no more than `limit` bytes stay of those that `size` finds here; those first that no
/// release needs, the longest unused first.
fn evicted(
    rows: &[Blob],
    limit: u64,
    size: impl Fn(&Digest) -> Option<u64>,
    needed: impl Fn(&Digest) -> bool,
) -> BTreeSet<Digest> {
    let mut here: Vec<(bool, u64, Digest, u64)> = rows
        .iter()
        .filter_map(|row| {
            Some((
                needed(&row.digest),
                row.used_ms,
                row.digest,
                size(&row.digest)?,
            ))
        })
        .collect();
    here.sort_unstable();
    let mut total: u64 = here.iter().map(|(.., bytes)| bytes).sum();
    let mut gone = BTreeSet::new();
    for (_, _, digest, bytes) in here {
        if total <= limit {
            break;
        }
        total -= bytes;
        gone.insert(digest);
    }
    gone
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_the_roots_reach_is_kept() {
        let root = tempfile::tempdir().unwrap();
        let blobs = BlobDir::open(root.path()).unwrap();
        let descriptor = |kind: &str, content: &[u8]| {
            let digest = blobs.put(content).unwrap();
            serde_json::json!({"mediaType": format!("application/vnd.oci.image.{kind}"), "digest": digest, "size": content.len()})
        };
        let image = |name: &str| {
            let manifest = serde_json::json!({
                "schemaVersion": 2,
                "config": descriptor("config.v1+json", format!("{{\"c\": \"{name}\"}}").as_bytes()),
                "layers": [descriptor("layer.v1.tar", b"shared"), descriptor("layer.v1.tar", name.as_bytes())],
            });
            descriptor("manifest.v1+json", manifest.to_string().as_bytes())
        };
        let index = serde_json::json!({"schemaVersion": 2, "manifests": [image("kept")]});
        let kept = blobs.put(index.to_string().as_bytes()).unwrap();
        let before = blobs.list().unwrap();
        let about = |subject| {
            let gone = image("gone");
            Manifest {
                repository: "a".to_owned(),
                digest: gone["digest"].as_str().unwrap().parse().unwrap(),
                media_type: String::new(),
                size_bytes: 0,
                subject: Some(subject),
                artifact_type: None,
                annotations: std::collections::BTreeMap::new(),
                keep_until_ms: 0,
            }
        };
        blobs.put(b"half an import").unwrap();
        // What is about something that is kept is kept, and what is about that; it is not about itself.
        let signature = about(kept);
        let roots = || BTreeSet::from([kept]);
        let keep = reached(&blobs, roots(), std::slice::from_ref(&signature)).unwrap();
        assert!(keep.contains(&signature.digest));
        let circle = about(signature.digest);
        let keep = reached(&blobs, roots(), &[circle]).unwrap();
        assert!(blobs.retain(&keep).unwrap() > 0);
        assert_eq!(blobs.list().unwrap(), before);
    }

    #[tokio::test]
    async fn nothing_is_swept_while_somebody_holds_the_directory() {
        let broom = Broom::new();
        let free = || Arc::clone(&broom.holders).try_write_owned().is_ok();
        assert!(free());
        let (import, apply) = (broom.hold_then_sweep().await, broom.hold().await);
        broom.wanted.notified().await;
        drop(import);
        assert!(!free());
        // The end of an import is news, however it ended.
        broom.wanted.notified().await;
        drop(apply);
        assert!(free());
    }

    #[test]
    fn what_was_used_longest_ago_goes_first_and_what_a_release_needs_last() {
        let row = |name: &str, used_ms| Blob {
            digest: Digest::of(name.as_bytes()),
            media_type: String::new(),
            size_bytes: 10,
            used_ms,
        };
        let rows = [
            row("needed", 1),
            row("old", 2),
            row("absent", 2),
            row("new", 3),
        ];
        let of = |name: &str| Digest::of(name.as_bytes());
        let gone = |limit| {
            let size = |digest: &Digest| (*digest != of("absent")).then_some(10);
            evicted(&rows, limit, size, |digest| *digest == of("needed"))
        };
        assert!(gone(30).is_empty());
        assert_eq!(gone(29), [of("old")].into());
        assert_eq!(gone(10), [of("old"), of("new")].into());
        assert_eq!(gone(9).len(), 3);
    }
}
