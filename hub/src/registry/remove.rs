//! Removing: tags, manifests and blobs (distribution specification, "Deleting"). What an app or a kept index needs
//! is not removed.

use std::time::Duration;

use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use foreshore_images::Reference;
use foreshore_images::manifest::{Document, MANIFEST_BYTES_MAX};
use foreshore_protocol::Digest;

use super::refusal::Refusal;
use super::target::ManifestReference;
use crate::api::Api;
use crate::controller;
use crate::images::HUB_HOST;
use crate::store::{self, StoreError};

/// How long to wait for whoever brings a blob in. Later the blob goes with the next sweep.
const ALONE_WITHIN: Duration = Duration::from_secs(2);

/// `DELETE /v2/NAME/manifests/REFERENCE`: a tag alone, or a manifest with every tag of it.
pub(super) async fn manifest(
    api: &Api,
    name: String,
    reference: ManifestReference,
) -> Result<Response, Refusal> {
    match reference {
        ManifestReference::Tag(tag) => {
            let reference = Reference::parse(&format!("{HUB_HOST}/{name}:{tag}"))
                .map_err(|error| Refusal::not_found("NAME_INVALID", error.to_string()))?;
            api.controller
                .change(move |change| controller::images::remove(change, &reference))
                .await?;
        }
        ManifestReference::Digest(digest) => {
            if let Some(index) = index_of(api, &name, digest).await? {
                let message = format!("index {index} names manifest {digest}; remove that first");
                return Err(Refusal::new(StatusCode::CONFLICT, "DENIED", message));
            }
            api.controller
                .change(move |change| controller::images::remove_manifest(change, &name, &digest))
                .await?;
        }
    }
    api.images.want_sweep();
    Ok(StatusCode::ACCEPTED.into_response())
}

/// An index of the repository that names the manifest.
async fn index_of(api: &Api, name: &str, digest: Digest) -> Result<Option<Digest>, Refusal> {
    let repository = name.to_owned();
    let rows = api.controller.store().read(move |connection| {
        let rows = store::registry::manifests(connection, Some(&repository))?;
        Ok::<_, StoreError>(rows)
    });
    let (rows, blobs) = (rows.await?, api.images.blobs().clone());
    let look = move || {
        let names = |index: &Digest| {
            let bytes = blobs.read(index, MANIFEST_BYTES_MAX).ok().flatten();
            match bytes.map(|bytes| Document::parse(&bytes, None)) {
                Some(Ok(Document::Index(index))) => {
                    index.manifests.iter().any(|child| child.digest == digest)
                }
                _ => false,
            }
        };
        rows.iter().map(|row| row.digest).find(names)
    };
    tokio::task::spawn_blocking(look)
        .await
        .map_err(Refusal::internal)
}

/// `DELETE /v2/NAME/blobs/DIGEST`: the blob is not there for this repository any more. It is gone for all when nothing
/// else needs it.
pub(super) async fn blob(api: &Api, name: String, digest: Digest) -> Result<Response, Refusal> {
    let unknown = || Refusal::not_found("BLOB_UNKNOWN", format!("the hub has no blob {digest}"));
    let blobs = api.images.blobs().clone();
    blobs.size(&digest).ok_or_else(unknown)?;
    if super::pull::is_withdrawn(api, &name, digest).await? {
        return Err(unknown());
    }
    let alone = api.images.alone(ALONE_WITHIN).await;
    let needed = api
        .images
        .needed(api.controller.now())
        .await
        .map_err(Refusal::internal)?;
    if needed.reached.contains(&digest) {
        let message = format!("an image in the hub needs blob {digest}; remove the image");
        return Err(Refusal::new(StatusCode::CONFLICT, "DENIED", message));
    }
    let ended = api.controller.store().write(move |connection| {
        let elsewhere = store::registry::withdraw(connection, &name, &digest)?;
        Ok::<_, StoreError>(elsewhere)
    });
    let counted_on = ended.await?;
    if alone.is_some() && !counted_on {
        tokio::task::spawn_blocking(move || blobs.remove(&digest))
            .await
            .map_err(Refusal::internal)?
            .map_err(Refusal::internal)?;
    } else {
        api.images.want_sweep();
    }
    Ok(StatusCode::ACCEPTED.into_response())
}
