//! Pulling: manifests and blobs (distribution specification, "Pulling manifests", "Pulling blobs").
//!
//! Blobs are streamed from disk. Every blob here was verified as it came in, and whoever pulls verifies again.

use std::io::SeekFrom;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use foreshore_images::manifest::MANIFEST_BYTES_MAX;
use foreshore_protocol::Digest;
use futures_util::stream;
use tokio::io::{AsyncReadExt as _, AsyncSeekExt as _};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::refusal::Refusal;
use super::target::ManifestReference;
use super::{CONTENT_DIGEST, SUBJECT};
use crate::api::Api;
use crate::api::authority::Caller;
use crate::images::HUB_HOST;
use crate::store::{self, StoreError};

/// How much of a blob is read at once.
const CHUNK: usize = 128 * 1024;

/// Blobs that are sent at once. Each holds a file and up to [`CHUNK`] bytes, and more at once are slower for all.
pub const BLOBS_AT_ONCE: usize = 64;

/// How long a blob may wait for its turn; whoever asked for it tries again.
const TURN_WITHIN: Duration = Duration::from_secs(15);

/// A manifest of the hub's own, by tag or digest.
pub(super) async fn manifest(
    api: &Api,
    name: String,
    reference: ManifestReference,
) -> Result<Response, Refusal> {
    let full = match &reference {
        ManifestReference::Tag(tag) => format!("{HUB_HOST}/{name}:{tag}"),
        ManifestReference::Digest(digest) => format!("{HUB_HOST}/{name}@{digest}"),
    };
    let unknown = || {
        let message = format!("the hub has no image {full}; push or import it");
        Refusal::not_found("MANIFEST_UNKNOWN", message)
    };
    let asked = full.clone();
    let row = api.controller.store().read(move |connection| {
        let digest = match reference {
            ManifestReference::Digest(digest) => Some(digest),
            ManifestReference::Tag(_) => {
                store::image::by_reference(connection, &asked)?.map(|image| image.view.digest)
            }
        };
        Ok::<_, StoreError>(match digest {
            Some(digest) => store::registry::manifest(connection, &name, &digest)?,
            None => None,
        })
    });
    let row = row.await?.ok_or_else(unknown)?;
    let (blobs, digest) = (api.images.blobs().clone(), row.digest);
    let bytes = tokio::task::spawn_blocking(move || blobs.read(&digest, MANIFEST_BYTES_MAX))
        .await
        .map_err(Refusal::internal)?
        .map_err(Refusal::internal)?
        .ok_or_else(unknown)?;
    let mut response = document(digest, &row.media_type, bytes);
    if let Some(subject) = row.subject {
        let value = HeaderValue::from_str(&subject.to_string()).map_err(Refusal::internal)?;
        response.headers_mut().insert(SUBJECT, value);
    }
    Ok(response)
}

/// An index or manifest as an answer.
pub(super) fn document(digest: Digest, media_type: &str, bytes: Vec<u8>) -> Response {
    let headers = [
        (header::CONTENT_TYPE, media_type.to_owned()),
        (header::CONTENT_LENGTH, bytes.len().to_string()),
        (header::ETAG, format!("\"{digest}\"")),
        (CONTENT_DIGEST, digest.to_string()),
    ];
    (headers, bytes).into_response()
}

/// A blob of the hub's. An operator who asks whether it is there may be about to push what names it, so it stays.
pub(super) async fn own_blob(
    api: &Api,
    caller: Caller,
    name: String,
    digest: Digest,
    headers: &HeaderMap,
    method: &Method,
) -> Result<Response, Refusal> {
    if is_withdrawn(api, &name, digest).await? {
        let message = format!("blob {digest} was removed from {name}");
        return Err(Refusal::not_found("BLOB_UNKNOWN", message));
    }
    if *method == Method::HEAD && caller == Caller::Operator {
        super::push::count_on(api, name, digest).await?;
    }
    blob(api, digest, headers, method).await
}

/// Whether a blob was removed from this repository, though others may have it.
pub(super) async fn is_withdrawn(api: &Api, name: &str, digest: Digest) -> Result<bool, Refusal> {
    let name = name.to_owned();
    let read = api.controller.store().read(move |connection| {
        let leased = store::registry::leased_ms(connection, &name, &digest)?;
        Ok::<_, StoreError>(leased)
    });
    Ok(read.await? == Some(0))
}

/// A blob that is there, or a part of it.
pub(super) async fn blob(
    api: &Api,
    digest: Digest,
    headers: &HeaderMap,
    method: &Method,
) -> Result<Response, Refusal> {
    // Before the file is opened, so that who waits holds none; asking for the head alone takes no turn.
    let turn = if *method == Method::HEAD {
        None
    } else {
        Some(turn(&api.blob_turns, TURN_WITHIN).await?)
    };
    let blobs = api.images.blobs().clone();
    let (file, size) = tokio::task::spawn_blocking(move || blobs.open_blob(&digest))
        .await
        .map_err(Refusal::internal)?
        .map_err(Refusal::internal)?
        .ok_or_else(|| {
            Refusal::not_found("BLOB_UNKNOWN", format!("the hub has no blob {digest}"))
        })?;
    let range = match headers
        .get(header::RANGE)
        .map(|value| byte_range(value, size))
    {
        None | Some(Asked::Whole) => None,
        Some(Asked::Part(first, last)) => Some((first, last)),
        Some(Asked::Beyond) => return Ok(beyond(size)),
    };
    let (first, length) = range.map_or((0, size), |(first, last)| (first, last - first + 1));
    let body = if let Some(turn) = turn {
        let mut file = tokio::fs::File::from_std(file);
        file.seek(SeekFrom::Start(first))
            .await
            .map_err(Refusal::internal)?;
        stream_file(file, length, turn)
    } else {
        Body::empty()
    };
    let fixed = blob_headers(digest, length);
    Ok(match range {
        None => (fixed, body).into_response(),
        Some((first, last)) => {
            let content_range = [(
                header::CONTENT_RANGE,
                format!("bytes {first}-{last}/{size}"),
            )];
            (StatusCode::PARTIAL_CONTENT, fixed, content_range, body).into_response()
        }
    })
}

/// What every answer with a blob, or `length` bytes of it, says.
pub(super) fn blob_headers(digest: Digest, length: u64) -> [(HeaderName, String); 5] {
    [
        (header::CONTENT_TYPE, "application/octet-stream".to_owned()),
        (header::CONTENT_LENGTH, length.to_string()),
        (header::ACCEPT_RANGES, "bytes".to_owned()),
        (header::ETAG, format!("\"{digest}\"")),
        (CONTENT_DIGEST, digest.to_string()),
    ]
}

/// The answer to who asks for bytes behind the last one.
pub(super) fn beyond(size: u64) -> Response {
    let mut response = StatusCode::RANGE_NOT_SATISFIABLE.into_response();
    if let Ok(value) = HeaderValue::from_str(&format!("bytes */{size}")) {
        response.headers_mut().insert(header::CONTENT_RANGE, value);
    }
    response
}

/// A place among the blobs that are sent.
async fn turn(turns: &Arc<Semaphore>, within: Duration) -> Result<OwnedSemaphorePermit, Refusal> {
    let turn = tokio::time::timeout(within, Arc::clone(turns).acquire_owned());
    match turn.await {
        Ok(turn) => turn.map_err(Refusal::internal),
        Err(_) => Err(Refusal::busy(format!(
            "the hub sends {BLOBS_AT_ONCE} blobs already; try again"
        ))),
    }
}

/// Exactly `length` bytes of `file`; an error, and so a broken connection, if it holds fewer. The turn ends with the
/// body, however that ends.
fn stream_file(file: tokio::fs::File, length: u64, turn: OwnedSemaphorePermit) -> Body {
    let chunks = stream::try_unfold((file, length, turn), |(mut file, left, turn)| async move {
        if left == 0 {
            return Ok(None);
        }
        let want = usize::try_from(left).unwrap_or(CHUNK).min(CHUNK);
        let mut chunk = vec![0; want];
        let count = file.read(&mut chunk).await?;
        if count == 0 {
            return Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof));
        }
        chunk.truncate(count);
        Ok(Some((
            Bytes::from(chunk),
            (file, left - count as u64, turn),
        )))
    });
    Body::from_stream(chunks)
}

/// What a `Range` header asks of `size` bytes (RFC 9110, section 14).
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Asked {
    /// All of it: no range that is understood, or several.
    Whole,
    /// First and last byte.
    Part(u64, u64),
    /// Nothing that is there.
    Beyond,
}

/// Reads a `Range` header.
pub(super) fn byte_range(value: &HeaderValue, size: u64) -> Asked {
    let parsed = (|| {
        let (first, last) = value
            .to_str()
            .ok()?
            .trim()
            .strip_prefix("bytes=")?
            .split_once('-')?;
        let number = |text: &str| {
            (!text.is_empty())
                .then(|| text.parse::<u64>())
                .transpose()
                .ok()
        };
        Some((number(first)?, number(last)?))
    })();
    match parsed {
        None | Some((None, None)) => Asked::Whole,
        Some((None, Some(0))) => Asked::Beyond,
        Some((None, Some(_))) if size == 0 => Asked::Beyond,
        Some((None, Some(suffix))) => Asked::Part(size.saturating_sub(suffix), size - 1),
        Some((Some(first), Some(last))) if last < first => Asked::Whole,
        Some((Some(first), _)) if first >= size => Asked::Beyond,
        Some((Some(first), last)) => Asked::Part(first, last.unwrap_or(u64::MAX).min(size - 1)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_blob_keeps_its_turn_until_it_was_sent_or_given_up() {
        let turns = Arc::new(Semaphore::new(1));
        let moment = Duration::from_millis(10);
        let body = async || {
            let file = tokio::fs::File::from_std(tempfile::tempfile().unwrap());
            stream_file(file, 1, turn(&turns, moment).await.unwrap())
        };
        let sending = body().await;
        let refused = turn(&turns, moment).await.unwrap_err();
        assert_eq!(
            (refused.status, refused.code),
            (StatusCode::TOO_MANY_REQUESTS, "TOOMANYREQUESTS")
        );
        drop(sending);
        let sent = body().await;
        // The file is shorter than it was: the body ends with an error.
        axum::body::to_bytes(sent, 100).await.unwrap_err();
        assert!(turn(&turns, moment).await.is_ok());
    }

    #[test]
    fn ranges_follow_rfc_9110() {
        for (text, size, expected) in [
            ("bytes=0-4", 10, Asked::Part(0, 4)),
            ("bytes=5-", 10, Asked::Part(5, 9)),
            ("bytes=0-99", 10, Asked::Part(0, 9)),
            ("bytes=-3", 10, Asked::Part(7, 9)),
            ("bytes=-99", 10, Asked::Part(0, 9)),
            ("bytes=-0", 10, Asked::Beyond),
            ("bytes=10-", 10, Asked::Beyond),
            ("bytes=0-", 0, Asked::Beyond),
            ("bytes=-1", 0, Asked::Beyond),
            ("bytes=4-2", 10, Asked::Whole),
            ("bytes=0-1,3-4", 10, Asked::Whole),
            ("bytes=-", 10, Asked::Whole),
            ("lines=0-1", 10, Asked::Whole),
            ("bytes=99999999999999999999-", 10, Asked::Whole),
        ] {
            assert_eq!(
                byte_range(&HeaderValue::from_static(text), size),
                expected,
                "{text} of {size}"
            );
        }
    }
}
