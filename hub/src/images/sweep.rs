//! Which blobs are reached, and the end of the others: those of archives that were refused or whose import was cut
//! off, of tags that were moved or removed, and of releases that nobody asks for any more.
//!
//! A blob of an image that is only coming in is reached by nothing yet. So whoever brings one in, or is about to
//! make a release of one, holds a [`Hold`], and nothing is swept meanwhile.

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use foreshore_images::blobs::BlobDir;
use foreshore_images::manifest::{Document, MANIFEST_BYTES_MAX};
use foreshore_images::{Digest, Reference};
use tokio::sync::{Notify, OwnedRwLockReadGuard, RwLock};

use super::{HUB_HOST, Images};
use crate::store::{self, StoreError};

/// The directory is swept so often even without news: releases are forgotten meanwhile.
const EVERY: Duration = Duration::from_secs(3600);

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
    pub async fn keep_tidy(&self) {
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
            match self.sweep().await {
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

    async fn sweep(&self) -> Result<u64, SweepError> {
        // Asked of the writer, not of a snapshot: whatever was queued before by a holder that is gone is in.
        let roots = self.inner.store.write(|connection| {
            let tags = store::image::list(connection)?;
            let mut roots: BTreeSet<Digest> =
                tags.into_iter().map(|image| image.view.digest).collect();
            for release in store::release::needed(connection)? {
                roots.extend(release.images.iter().filter_map(|image| imported(image)));
            }
            Ok::<_, StoreError>(roots)
        });
        let (roots, blobs) = (roots.await?, self.inner.blobs.clone());
        tokio::task::spawn_blocking(move || {
            let keep = reached(&blobs, roots)?;
            Ok(blobs.retain(&keep)?)
        })
        .await
        .map_err(|_| StoreError::Stopped)?
    }
}

/// Why the directory was not swept, or not to its end. Nothing that is needed is gone.
#[derive(Debug, thiserror::Error)]
enum SweepError {
    #[error(transparent)]
    Store(#[from] StoreError),
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

/// `roots` and all that they refer to. An error rather than a guess when something that is there cannot be read.
fn reached(blobs: &BlobDir, roots: BTreeSet<Digest>) -> io::Result<BTreeSet<Digest>> {
    let mut waiting: Vec<Digest> = roots.into_iter().collect();
    let mut keep = BTreeSet::new();
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
    Ok(keep)
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
        image("gone");
        blobs.put(b"half an import").unwrap();

        let keep = reached(&blobs, BTreeSet::from([kept])).unwrap();
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
}
