//! What images are made of, for a preview: manifests and configs, of a bounded number and in a bounded time.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use foreshore_images::delta::artifact::{ARTIFACT_TYPE, Artifact};
use foreshore_images::manifest::MANIFEST_BYTES_MAX;
use foreshore_images::registry::DockerConfig;
use foreshore_images::store::{self as device, DELTAS_LOOKED_AT, StageError};
use foreshore_images::{Digest, Fault, Platform, Reference};
use tokio::task::JoinSet;

use super::{Guest, HUB_HOST, Images, ResolveError};
use crate::preview::{DeltaLayer, Image};
use crate::store::{self, StoreError};

/// How long all of them may take; what was not looked at by then is unknown.
const LOOK_WITHIN: Duration = Duration::from_secs(20);

/// How many pairs of image and platform are looked at.
pub const LOOKS_MAX: usize = 256;

/// An image, and the platform it is looked at for.
pub type Asked = (String, String);

impl Images {
    /// Looks at images that are pinned by their digests; those that count most come first, and no more than
    /// [`LOOKS_MAX`]. What is not answered, or not in time, is left out. `logins` as for [`Images::resolve`].
    ///
    /// # Errors
    ///
    /// When the store fails, or the logins make no client.
    pub async fn look(
        &self,
        asked: Vec<Asked>,
        logins: Vec<DockerConfig>,
    ) -> Result<BTreeMap<Asked, Image>, ResolveError> {
        let guest = self.guest(logins).await?.map(Arc::new);
        let mut looks = JoinSet::new();
        for (image, platform) in asked.into_iter().take(LOOKS_MAX) {
            let (images, guest) = (self.clone(), guest.clone());
            looks.spawn(async move {
                let found = images.look_at(&image, &platform, guest.as_deref()).await;
                ((image, platform), found)
            });
        }
        let mut found = BTreeMap::new();
        let all = async {
            while let Some(joined) = looks.join_next().await {
                if let Ok((asked, Ok(Some(image)))) = joined {
                    found.insert(asked, image);
                }
            }
        };
        // Threads that still wait for a registry end by their own timeouts.
        if tokio::time::timeout(LOOK_WITHIN, all).await.is_err() {
            tracing::warn!("some images could not be looked at in time");
        }
        Ok(found)
    }

    /// `None` when it cannot be looked at.
    async fn look_at(
        &self,
        image: &str,
        platform: &str,
        guest: Option<&Guest>,
    ) -> Result<Option<Image>, StoreError> {
        let (Ok(reference), Ok(platform)) = (Reference::parse(image), platform.parse::<Platform>())
        else {
            return Ok(None);
        };
        let ours = reference.host() == HUB_HOST;
        let client = guest
            .filter(|guest| guest.hosts.contains(reference.host()))
            .map_or(&self.inner.client, |guest| &guest.client);
        let client = (!ours).then(|| Arc::clone(client));
        let permit = Arc::clone(&self.inner.asks)
            .acquire_owned()
            .await
            .map_err(|_| StoreError::Stopped)?;
        let (blobs, asked) = (self.inner.blobs.clone(), reference.clone());
        let look = move || {
            let _held = permit;
            device::look(client.as_deref(), &blobs, &asked, &platform)
        };
        let found = tokio::task::spawn_blocking(look)
            .await
            .map_err(|_| StoreError::Stopped)?;
        match found {
            Ok(look) => {
                let deltas = if ours {
                    self.deltas(&reference, look.manifest).await?
                } else {
                    Vec::new()
                };
                Ok(Some(Image::Known {
                    layers: look.layers,
                    deltas,
                }))
            }
            Err(StageError::NoPlatform { .. }) => Ok(Some(Image::NoPlatform)),
            Err(error) => {
                tracing::debug!(
                    image,
                    error = &error as &dyn std::error::Error,
                    unreachable = error.fault() == Fault::Unreachable,
                    "an image could not be looked at"
                );
                Ok(None)
            }
        }
    }

    /// The deltas that a device would be shown for a manifest in the hub's registry.
    async fn deltas(
        &self,
        reference: &Reference,
        manifest: Digest,
    ) -> Result<Vec<Vec<DeltaLayer>>, StoreError> {
        let (repository, blobs) = (reference.repository().to_owned(), self.inner.blobs.clone());
        let limit = u64::try_from(DELTAS_LOOKED_AT).unwrap_or(u64::MAX);
        let read = move |connection: &rusqlite::Connection| {
            let kind = Some(ARTIFACT_TYPE);
            let rows =
                store::registry::referrers(connection, &repository, &manifest, kind, "", limit)?;
            Ok::<_, StoreError>(rows.into_iter().map(|row| row.digest).collect::<Vec<_>>())
        };
        let artifacts = self.inner.store.read(read).await?;
        let parse = move || {
            let layers = |digest: &Digest| {
                let bytes = blobs.read(digest, MANIFEST_BYTES_MAX).ok()??;
                let artifact = Artifact::parse(&bytes).ok()?;
                (artifact.subject.digest == manifest).then(|| layers(artifact))
            };
            artifacts.iter().filter_map(layers).collect()
        };
        tokio::task::spawn_blocking(parse)
            .await
            .map_err(|_| StoreError::Stopped)
    }
}

fn layers(artifact: Artifact) -> Vec<DeltaLayer> {
    let layers = artifact.layers.into_iter();
    layers
        .map(|layer| DeltaLayer {
            diff_id: layer.diff_id,
            leans_on: layer.trees,
            bytes: layer.size,
        })
        .collect()
}

/// What must be looked at: first the new images, then those of releases that devices have, on every platform.
#[must_use]
pub fn questions<'i>(
    platforms: &BTreeSet<String>,
    new: impl IntoIterator<Item = &'i String>,
    old: impl IntoIterator<Item = &'i String>,
) -> Vec<Asked> {
    let mut seen = BTreeSet::new();
    new.into_iter()
        .chain(old)
        .flat_map(|image| {
            platforms
                .iter()
                .map(|platform| (image.clone(), platform.clone()))
        })
        .filter(|asked| seen.insert(asked.clone()))
        .collect()
}
