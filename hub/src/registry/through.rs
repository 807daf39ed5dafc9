//! Pulling from other registries through the hub: `/v2/PREFIX/REPOSITORY/…`, or `/v2/REPOSITORY/…?ns=HOST`.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use foreshore_images::Reference;
use foreshore_protocol::Digest;
use futures_util::stream;
use tokio::sync::OwnedSemaphorePermit;

use super::pull::{self, Asked};
use super::refusal::Refusal;
use super::target::{ManifestReference, Target};
use crate::api::Api;
use crate::images::through::{Flight, Found, Progress, ThroughError};

/// Clients that may read blobs on their way in at once. Each holds a file and up to [`CHUNK`] bytes.
pub const READERS_AT_ONCE: usize = 128;

/// How much of a growing file is read at once.
const CHUNK: usize = 64 * 1024;

/// How long a reader waits for the next bytes of a blob on its way in, its turn to be fetched included.
const STALLED: Duration = Duration::from_secs(120);

/// How long a client may wait to become a reader.
const TURN_WITHIN: Duration = Duration::from_secs(15);

/// Answers what is asked of a repository of another registry.
pub(super) async fn pull(
    api: &Api,
    upstream: Reference,
    target: Target,
    headers: &HeaderMap,
    method: &Method,
) -> Result<Response, Refusal> {
    match target {
        Target::Manifest(_, reference) => manifest(api, &upstream, reference).await,
        Target::Blob(_, digest) => blob(api, &upstream, digest, headers, method).await,
        // Clients take this for a registry without referrers and ask for tags instead.
        Target::Referrers(..) => Err(Refusal::not_found(
            "UNSUPPORTED",
            "referrers are not looked for in other registries",
        )),
        _ => Err(Refusal::new(
            StatusCode::METHOD_NOT_ALLOWED,
            "UNSUPPORTED",
            format!("ask {} itself for this", upstream.host()),
        )),
    }
}

async fn manifest(
    api: &Api,
    upstream: &Reference,
    reference: ManifestReference,
) -> Result<Response, Refusal> {
    let full = match reference {
        ManifestReference::Digest(digest) => upstream.with_digest(digest),
        ManifestReference::Tag(tag) => Reference::parse(&format!("{}:{tag}", upstream.name()))
            .map_err(|error| Refusal::not_found("NAME_INVALID", error.to_string()))?,
    };
    let passed = api
        .images
        .through_manifest(&full, api.controller.now(), None)
        .await?;
    let mut response = pull::document(passed.digest, &passed.media_type, passed.bytes);
    if passed.stale {
        // RFC 7234, section 5.5.1: gone from newer ones, and nothing took its place.
        let warning = HeaderValue::from_static("110 foreshore \"Response is Stale\"");
        response.headers_mut().insert(header::WARNING, warning);
    }
    Ok(response)
}

async fn blob(
    api: &Api,
    upstream: &Reference,
    digest: Digest,
    headers: &HeaderMap,
    method: &Method,
) -> Result<Response, Refusal> {
    let fetch = *method != Method::HEAD;
    let found = api
        .images
        .through_blob(upstream, digest, fetch, api.controller.now())
        .await?;
    let flight = match found {
        Found::Here => return pull::blob(api, digest, headers, method).await,
        Found::Away { size } => {
            let fixed = pull::blob_headers(digest, size);
            return Ok((fixed, Body::empty()).into_response());
        }
        Found::Coming(flight) => flight,
    };
    let turn = tokio::time::timeout(TURN_WITHIN, Arc::clone(&api.readers).acquire_owned());
    let turn = match turn.await {
        Ok(turn) => turn.map_err(Refusal::internal)?,
        Err(_) => {
            let message = format!("{READERS_AT_ONCE} clients wait for blobs already; try again");
            return Err(Refusal::busy(message));
        }
    };
    let range = match headers
        .get(header::RANGE)
        .map(|value| pull::byte_range(value, flight.size))
    {
        None | Some(Asked::Whole) => None,
        Some(Asked::Part(first, last)) => Some((first, last)),
        Some(Asked::Beyond) => return Ok(pull::beyond(flight.size)),
    };
    let (first, end) = range.map_or((0, flight.size), |(first, last)| (first, last + 1));
    let mut reader = Reader {
        at: first,
        end,
        file: None,
        flight,
        _turn: turn,
    };
    // An answer that has begun cannot say any more what went wrong.
    let begin = reader.next().await;
    let begin = match begin {
        Ok(begin) => begin,
        Err(Stopped::Failed(Some(error))) => return Err(Refusal::from(&*error)),
        Err(Stopped::Failed(None)) => {
            return Err(Refusal::internal("a fetch ended without a reason"));
        }
        Err(Stopped::Stalled) => {
            let message = format!("blob {digest} did not come in time; try again");
            return Err(Refusal::new(
                StatusCode::GATEWAY_TIMEOUT,
                "UNKNOWN",
                message,
            ));
        }
        Err(Stopped::Disk(error)) => return Err(Refusal::internal(error)),
    };
    let size = reader.flight.size;
    let rest = stream::try_unfold((reader, begin), |(mut reader, ready)| async move {
        let Some(chunk) = ready else { return Ok(None) };
        // Read ahead, so that an end is known with the last chunk.
        let next = reader.next().await.map_err(Stopped::into_io)?;
        Ok::<_, io::Error>(Some((chunk, (reader, next))))
    });
    let fixed = pull::blob_headers(digest, end - first);
    let body = Body::from_stream(rest);
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

/// Reads a file while it grows. The last byte comes once the whole is known to be right.
struct Reader {
    at: u64,
    end: u64,
    file: Option<File>,
    flight: Flight,
    _turn: OwnedSemaphorePermit,
}

/// Why a reader got no further.
enum Stopped {
    /// The fetch, and why if that is known.
    Failed(Option<Arc<ThroughError>>),
    Stalled,
    Disk(io::Error),
}

impl Stopped {
    fn into_io(self) -> io::Error {
        match self {
            Self::Failed(_) => io::Error::other("the blob does not come"),
            Self::Stalled => io::Error::from(io::ErrorKind::TimedOut),
            Self::Disk(error) => error,
        }
    }
}

impl Reader {
    /// The next bytes; `None` at the end.
    async fn next(&mut self) -> Result<Option<Bytes>, Stopped> {
        // Of an empty blob, too, its end is believed only when it is there.
        if self.at == self.end && self.end > 0 {
            return Ok(None);
        }
        let there = self.there().await?;
        if self.at == self.end {
            return Ok(None);
        }
        let want = there.min(self.end) - self.at;
        let want = usize::try_from(want).unwrap_or(CHUNK).min(CHUNK);
        let (file, at) = (self.file.take(), self.at);
        let (growing, landed) = (self.flight.growing.clone(), self.flight.landed.clone());
        let read = tokio::task::spawn_blocking(move || {
            let mut file = match file {
                Some(file) => file,
                // It is renamed when it is whole.
                None => File::open(growing).or_else(|_| File::open(landed))?,
            };
            file.seek(SeekFrom::Start(at))?;
            let mut chunk = vec![0; want];
            file.read_exact(&mut chunk)?;
            Ok((file, chunk))
        });
        let (file, chunk) = read
            .await
            .map_err(|error| Stopped::Disk(io::Error::other(error)))?
            .map_err(Stopped::Disk)?;
        self.file = Some(file);
        self.at += chunk.len() as u64;
        Ok(Some(Bytes::from(chunk)))
    }

    /// How many bytes may be read, once that is more than were, or the blob has landed.
    async fn there(&mut self) -> Result<u64, Stopped> {
        let last = self.flight.size.saturating_sub(1);
        let at = self.at;
        let has_read = self.file.is_some();
        let news = |progress: &Progress| match progress {
            // Fewer than were read: those were wrong.
            Progress::Bytes(bytes) => (*bytes).min(last) > at || (has_read && *bytes < at),
            Progress::Landed | Progress::Failed(_) => true,
        };
        let size = self.flight.size;
        let ready = self.flight.progress.wait_for(news);
        let progress = tokio::time::timeout(STALLED, ready)
            .await
            .map_err(|_| Stopped::Stalled)?
            .map_err(|_| Stopped::Failed(None))?;
        match &*progress {
            Progress::Landed => Ok(size),
            Progress::Bytes(bytes) if (*bytes).min(last) > at => Ok((*bytes).min(last)),
            Progress::Bytes(_) => Err(Stopped::Failed(None)),
            Progress::Failed(error) => Err(Stopped::Failed(Some(Arc::clone(error)))),
        }
    }
}
