//! Removing images that were imported into the hub.

use std::collections::BTreeSet;

use foreshore_images::Reference;
use foreshore_protocol::{AppName, Digest};

use super::{Change, ControlError};
use crate::images::HUB_HOST;
use crate::images::sweep::imported;
use crate::store;

/// Forgets the image `reference`; its blobs go with the next sweep, unless another tag or a release needs them.
///
/// # Errors
///
/// When there is none, when it is in use (see [`ControlError::ImageInUse`]), or the store fails.
pub fn remove(change: &mut Change<'_>, reference: &Reference) -> Result<(), ControlError> {
    let name = reference.to_string();
    let image = store::image::by_reference(change.connection, &name)?
        .ok_or_else(|| ControlError::UnknownImage(name.clone()))?;
    let mut apps = applied_with(change, reference)?;
    let elsewhere = store::image::list(change.connection)?
        .iter()
        .any(|other| other.view.digest == image.view.digest && other.view.reference != name);
    if !elsewhere {
        for release in store::release::needed(change.connection)? {
            let pins = |pinned: &String| imported(pinned) == Some(image.view.digest);
            if release.images().any(pins) {
                apps.insert(release.app);
            }
        }
    }
    if !apps.is_empty() {
        return Err(ControlError::ImageInUse {
            reference: name,
            apps,
        });
    }
    store::image::delete(change.connection, &name)?;
    Ok(change.event("image-removed").record(name)?)
}

/// Forgets a manifest of a repository and every tag of it.
///
/// # Errors
///
/// As [`remove`].
pub fn remove_manifest(
    change: &mut Change<'_>,
    repository: &str,
    digest: &Digest,
) -> Result<(), ControlError> {
    let full = format!("{HUB_HOST}/{repository}@{digest}");
    let mut apps = BTreeSet::new();
    for release in store::release::needed(change.connection)? {
        if release.images().any(|image| *image == full) {
            apps.insert(release.app);
        }
    }
    let prefix = format!("{HUB_HOST}/{repository}:");
    let tags: Vec<String> = store::image::list(change.connection)?
        .into_iter()
        .filter(|image| image.view.digest == *digest && image.view.reference.starts_with(&prefix))
        .map(|image| image.view.reference)
        .collect();
    for tag in &tags {
        if let Ok(reference) = Reference::parse(tag) {
            apps.extend(applied_with(change, &reference)?);
        }
    }
    if !apps.is_empty() {
        return Err(ControlError::ImageInUse {
            reference: full,
            apps,
        });
    }
    if !store::registry::delete_manifest(change.connection, repository, digest)? {
        return Err(ControlError::UnknownImage(full));
    }
    for tag in tags {
        store::image::delete(change.connection, &tag)?;
        change.event("image-removed").record(tag)?;
    }
    Ok(())
}

/// The apps whose manifest names the image: applying it again would fail without.
fn applied_with(
    change: &Change<'_>,
    reference: &Reference,
) -> Result<BTreeSet<AppName>, ControlError> {
    let apps = store::app::list(change.connection)?.into_iter();
    let names = |image: &str| Reference::parse(image).is_ok_and(|named| named == *reference);
    Ok(apps
        .filter(|app| !app.deleting)
        .filter(|app| {
            let mut services = app.manifest.spec.services.values();
            services.any(|service| names(&service.image))
        })
        .map(|app| app.name().clone())
        .collect())
}
