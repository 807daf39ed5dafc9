//! Pushing: uploads, mounts and manifests (distribution specification, "Push").

use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use foreshore_images::manifest::MANIFEST_BYTES_MAX;
use foreshore_killpoint as killpoint;
use foreshore_protocol::Digest;
use foreshore_protocol::api::ImageView;

use super::refusal::Refusal;
use super::target::ManifestReference;
use super::uploads::{Claim, Held, UploadError};
use super::{CONTENT_DIGEST, Keys, SUBJECT};
use crate::api::Api;
use crate::images::HUB_HOST;
use crate::images::survey::{self, Demand};
use crate::store::image::Image;
use crate::store::{self, StoreError};

/// How long a manifest may take to come in: 4 MiB at most.
const MANIFEST_WITHIN: Duration = Duration::from_secs(60);

/// A lease is written again only when it is older than this part of its time.
const RENEW_PART: u64 = 4;

const UPLOAD_UUID: HeaderName = HeaderName::from_static("docker-upload-uuid");

/// `POST /v2/NAME/blobs/uploads/`, with `?mount=&from=` of a blob that is there already, or `?digest=` of the body.
pub(super) async fn begin(
    api: &Api,
    name: String,
    keys: &Keys,
    headers: &HeaderMap,
    body: Body,
) -> Result<Response, Refusal> {
    // A blob that cannot be mounted is uploaded ("Mounting a blob from another repository").
    if let Some(digest) = keys.get("mount").and_then(|text| text.parse().ok())
        && count_on(api, name.clone(), digest).await?
    {
        return Ok(created(&format!("/v2/{name}/blobs/{digest}"), digest));
    }
    let digest = digest_key(keys)?;
    let now = api.controller.now();
    let held = api.uploads.begin(&name, now).await?;
    let Some(digest) = digest else {
        return Ok(progress(StatusCode::ACCEPTED, &name, &held));
    };
    let id = held.id().to_owned();
    let claim = Claim {
        first: None,
        ..claim(headers)?
    };
    match api.uploads.append(held, body, claim, now).await {
        Ok(held) => commit(api, &name, held, digest).await,
        Err(error) => {
            // Nobody was told its name, so nobody could go on with it.
            if let Ok(held) = api.uploads.hold(&name, &id).await {
                api.uploads.cancel(held).await?;
            }
            Err(error.into())
        }
    }
}

/// `GET` of an upload.
pub(super) async fn status(api: &Api, name: String, id: String) -> Result<Response, Refusal> {
    let held = api.uploads.hold(&name, &id).await?;
    Ok(progress(StatusCode::NO_CONTENT, &name, &held))
}

/// `PATCH` of an upload: the next bytes.
pub(super) async fn append(
    api: &Api,
    name: String,
    id: String,
    headers: &HeaderMap,
    body: Body,
) -> Result<Response, Refusal> {
    let held = api.uploads.hold(&name, &id).await?;
    let (claim, now) = (claim(headers)?, api.controller.now());
    match api.uploads.append(held, body, claim, now).await {
        Ok(held) => Ok(progress(StatusCode::ACCEPTED, &name, &held)),
        Err(error) => Err(out_of_order(&name, &id, error)),
    }
}

/// `PUT` of an upload with `?digest=`: the last bytes, or none, and the end.
pub(super) async fn finish(
    api: &Api,
    name: String,
    id: String,
    keys: &Keys,
    headers: &HeaderMap,
    body: Body,
) -> Result<Response, Refusal> {
    let digest = digest_key(keys)?
        .ok_or_else(|| Refusal::bad("DIGEST_INVALID", "say ?digest=sha256:… to end an upload"))?;
    let held = api.uploads.hold(&name, &id).await?;
    let (claim, now) = (claim(headers)?, api.controller.now());
    match api.uploads.append(held, body, claim, now).await {
        Ok(held) => commit(api, &name, held, digest).await,
        Err(error) => Err(out_of_order(&name, &id, error)),
    }
}

/// `DELETE` of an upload.
pub(super) async fn cancel(api: &Api, name: String, id: String) -> Result<Response, Refusal> {
    let held = api.uploads.hold(&name, &id).await?;
    api.uploads.cancel(held).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

async fn commit(api: &Api, name: &str, held: Held, digest: Digest) -> Result<Response, Refusal> {
    let _hold = api.images.hold().await;
    let target = api.images.blobs().path(&digest);
    let now = api.controller.now();
    api.uploads.finish(held, digest, target, now).await?;
    Ok(created(&format!("/v2/{name}/blobs/{digest}"), digest))
}

/// Has a blob stay for a push into `name`; whether it is there.
pub(super) async fn count_on(api: &Api, name: String, digest: Digest) -> Result<bool, Refusal> {
    let _hold = api.images.hold().await;
    if api.images.blobs().size(&digest).is_none() {
        return Ok(false);
    }
    let (now, repository) = (api.controller.now(), name.clone());
    let read = api.controller.store().read(move |connection| {
        let leased = store::registry::leased_ms(connection, &repository, &digest)?;
        Ok::<_, StoreError>(leased)
    });
    let fresh_ms = api.images.leases_ms() / RENEW_PART;
    if read.await?.is_none_or(|then| then + fresh_ms <= now.0) {
        api.controller
            .store()
            .write(move |connection| {
                store::registry::lease(connection, &name, &digest, now.0)?;
                Ok::<_, StoreError>(())
            })
            .await?;
    }
    Ok(true)
}

/// `PUT /v2/NAME/manifests/REFERENCE`. All that it names must be there; then tag and manifest are, or neither.
pub(super) async fn manifest(
    api: &Api,
    name: String,
    reference: ManifestReference,
    headers: &HeaderMap,
    body: Body,
) -> Result<Response, Refusal> {
    let max = usize::try_from(MANIFEST_BYTES_MAX).unwrap_or(usize::MAX);
    let read = tokio::time::timeout(MANIFEST_WITHIN, axum::body::to_bytes(body, max));
    let bytes = match read.await {
        Ok(Ok(bytes)) => bytes,
        Ok(Err(_)) => {
            let message = format!("the manifest broke off, or has more than {max} bytes");
            let status = StatusCode::PAYLOAD_TOO_LARGE;
            return Err(Refusal::new(status, "MANIFEST_INVALID", message));
        }
        Err(_) => {
            let status = StatusCode::REQUEST_TIMEOUT;
            let message = "the manifest came too slowly; send it again";
            return Err(Refusal::new(status, "MANIFEST_INVALID", message));
        }
    };
    let digest = Digest::of(&bytes);
    if let ManifestReference::Digest(wanted) = reference
        && wanted != digest
    {
        let message = format!("the manifest has the digest {digest}");
        return Err(Refusal::bad("DIGEST_INVALID", message));
    }
    let kind = match headers.get(header::CONTENT_TYPE).map(HeaderValue::to_str) {
        None => None,
        Some(Ok(text)) => Some(text.split(';').next().unwrap_or(text).trim().to_owned()),
        Some(Err(_)) => return Err(Refusal::bad("MANIFEST_INVALID", "Content-Type is no text")),
    };
    let _hold = api.images.hold().await;
    let now = api.controller.now();
    let keep_until_ms = now.0.saturating_add(api.images.leases_ms());
    let (blobs, repository) = (api.images.blobs().clone(), name.clone());
    let store = move || {
        let kind = kind.as_deref();
        let found = survey::survey(
            &blobs,
            &repository,
            &bytes,
            kind,
            keep_until_ms,
            Demand::Whole,
        )?;
        blobs.put(&bytes).map_err(disk)?;
        killpoint::reached("manifest", "stored");
        Ok::<_, Refusal>(found)
    };
    let found = tokio::task::spawn_blocking(store)
        .await
        .map_err(Refusal::internal)??;
    let subject = found.manifests.first().and_then(|row| row.subject);
    let place = match &reference {
        ManifestReference::Tag(tag) => tag.clone(),
        ManifestReference::Digest(digest) => digest.to_string(),
    };
    record(api, &name, reference, found).await?;
    killpoint::reached("manifest", "recorded");
    let mut response = created(&format!("/v2/{name}/manifests/{place}"), digest);
    if let Some(subject) = subject.and_then(|digest| digest.to_string().parse().ok()) {
        response.headers_mut().insert(SUBJECT, subject);
    }
    Ok(response)
}

/// Writes the rows of a manifest, and moves its tag.
async fn record(
    api: &Api,
    name: &str,
    reference: ManifestReference,
    found: survey::Survey,
) -> Result<(), Refusal> {
    let name = name.to_owned();
    let change = move |change: &mut crate::controller::Change<'_>| {
        found.record(change.connection)?;
        let (ManifestReference::Tag(tag), Some(top)) = (reference, found.manifests.first()) else {
            return Ok(None);
        };
        store::registry::settle(change.connection, &name, &top.digest)?;
        let image = Image {
            view: ImageView {
                reference: format!("{HUB_HOST}/{name}:{tag}"),
                digest: top.digest,
                size_bytes: found.size_bytes,
                platforms: found.platforms,
                imported_ms: change.now.0,
            },
            media_type: top.media_type.clone(),
        };
        store::image::put(change.connection, &image)?;
        change
            .event("image-pushed")
            .record(image.view.reference.clone())?;
        Ok(Some(image.view))
    };
    if let Some(view) = api.controller.change(change).await? {
        // What the tag named before may be needed by nobody now.
        api.images.want_sweep();
        tracing::info!(image = %view.reference, digest = %view.digest.short(), bytes = view.size_bytes, "an image was pushed");
    }
    Ok(())
}

fn digest_key(keys: &Keys) -> Result<Option<Digest>, Refusal> {
    let parsed = keys.get("digest").map(|text| text.parse());
    parsed
        .transpose()
        .map_err(|error: foreshore_protocol::digest::ParseDigestError| {
            Refusal::bad(
                "DIGEST_INVALID",
                format!("digest is not sha256:HEX: {error}"),
            )
        })
}

/// What `Content-Range: FIRST-LAST` and `Content-Length` say ("Pushing a blob in chunks").
fn claim(headers: &HeaderMap) -> Result<Claim, Refusal> {
    let bad = |message: &str| Refusal::bad("SIZE_INVALID", message);
    let length = match headers.get(header::CONTENT_LENGTH) {
        None => None,
        Some(value) => {
            let number = value.to_str().ok().and_then(|text| text.parse().ok());
            Some(number.ok_or_else(|| bad("Content-Length is not a number"))?)
        }
    };
    let Some(range) = headers.get(header::CONTENT_RANGE) else {
        return Ok(Claim {
            first: None,
            length,
        });
    };
    let parsed = (|| {
        let text = range.to_str().ok()?;
        // Some clients write it as HTTP does elsewhere.
        let text = text.strip_prefix("bytes ").unwrap_or(text);
        let (text, _whole) = text.split_once('/').unwrap_or((text, ""));
        let (first, last) = text.split_once('-')?;
        let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
        (digits(first) && digits(last)).then_some(())?;
        Some((first.parse::<u64>().ok()?, last.parse::<u64>().ok()?))
    })();
    let (first, last) = parsed.ok_or_else(|| bad("Content-Range is not FIRST-LAST"))?;
    let told = last
        .checked_sub(first)
        .and_then(|span| span.checked_add(1))
        .ok_or_else(|| bad("Content-Range ends before it begins"))?;
    if length.is_some_and(|length| length != told) {
        return Err(bad("Content-Range and Content-Length disagree"));
    }
    Ok(Claim {
        first: Some(first),
        length: Some(told),
    })
}

/// The answer to bytes that are not the next ones says which would be.
fn out_of_order(name: &str, id: &str, error: UploadError) -> Refusal {
    let size = match error {
        UploadError::OutOfOrder(size) => size,
        error => return error.into(),
    };
    let mut refusal = Refusal::from(UploadError::OutOfOrder(size));
    refusal.headers = vec![
        (header::LOCATION, location(name, id)),
        (header::RANGE, range(size)),
    ];
    refusal
}

fn location(name: &str, id: &str) -> String {
    format!("/v2/{name}/blobs/uploads/{id}")
}

/// The bytes that are there. Nothing cannot be said this way; clients take `0-0` for it.
fn range(size: u64) -> String {
    format!("0-{}", size.saturating_sub(1))
}

fn progress(status: StatusCode, name: &str, held: &Held) -> Response {
    let headers = [
        (header::LOCATION, location(name, held.id())),
        (header::RANGE, range(held.size())),
        (UPLOAD_UUID, held.id().to_owned()),
    ];
    (status, headers).into_response()
}

fn created(location: &str, digest: Digest) -> Response {
    let headers = [
        (header::LOCATION, location.to_owned()),
        (CONTENT_DIGEST, digest.to_string()),
    ];
    (StatusCode::CREATED, headers).into_response()
}

fn disk(error: std::io::Error) -> Refusal {
    match error.kind() {
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
            UploadError::Full.into()
        }
        _ => Refusal::internal(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_and_lengths_are_read_strictly() {
        let read = |range: &str, length: &str| {
            let mut headers = HeaderMap::new();
            for (name, text) in [
                (header::CONTENT_RANGE, range),
                (header::CONTENT_LENGTH, length),
            ] {
                if !text.is_empty() {
                    headers.insert(name, text.parse().unwrap());
                }
            }
            claim(&headers).map_err(|refusal| refusal.code)
        };
        let claimed = |first, length| Ok(Claim { first, length });
        assert_eq!(read("", ""), claimed(None, None));
        assert_eq!(read("", "7"), claimed(None, Some(7)));
        assert_eq!(read("0-9", "10"), claimed(Some(0), Some(10)));
        assert_eq!(read("5-9", ""), claimed(Some(5), Some(5)));
        assert_eq!(read("bytes 5-9/*", "5"), claimed(Some(5), Some(5)));
        for (range, length) in [
            ("0-9", "9"),
            ("9-0", ""),
            ("-1-5", ""),
            ("+0-5", ""),
            ("0-18446744073709551615", ""),
            ("0-99999999999999999999", ""),
            ("0", ""),
            ("a-b", ""),
            ("-", ""),
            ("", "-1"),
            ("", "99999999999999999999"),
        ] {
            assert_eq!(read(range, length), Err("SIZE_INVALID"), "{range} {length}");
        }
    }
}
