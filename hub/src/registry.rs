//! `/v2/`: the pull side of the OCI distribution specification over imported images, so that a site without
//! internet works. Read-only; images come in through the API.
//!
//! Blobs are streamed from disk. Every blob here was verified as it was imported, and whoever pulls verifies
//! again. Errors have the specification's own shape, since clients know no other.

use std::io::SeekFrom;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use axum::routing::any;
use foreshore_images::manifest::{Document, MANIFEST_BYTES_MAX};
use foreshore_images::reference::Reference;
use foreshore_protocol::Digest;
use futures_util::stream;
use tokio::io::{AsyncReadExt as _, AsyncSeekExt as _};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::api::{Api, authority};
use crate::images::HUB_HOST;
use crate::store::{self, StoreError};

/// How much of a blob is read at once.
const CHUNK: usize = 128 * 1024;

/// Blobs that are sent at once. Each holds a file and up to [`CHUNK`] bytes, and more at once are slower for all.
pub const BLOBS_AT_ONCE: usize = 64;

/// How long a blob may wait for its turn; whoever asked for it tries again.
const TURN_WITHIN: Duration = Duration::from_secs(15);

/// The most tags in one answer.
const TAGS_MAX: usize = 10_000;

/// The paths of the endpoint.
pub fn router(api: Api) -> Router<Api> {
    Router::new()
        .route("/v2", any(root))
        .route("/v2/", any(root))
        .route("/v2/{*path}", any(fetch))
        .layer(axum::middleware::from_fn_with_state(api, guard))
}

/// An error as the distribution specification has it ("Error Codes").
#[derive(Debug)]
struct Refusal {
    status: StatusCode,
    code: &'static str,
    message: String,
}

impl Refusal {
    fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self {
            status,
            code,
            message: message.into(),
        }
    }

    fn internal(error: impl std::fmt::Display) -> Self {
        tracing::warn!(%error, "the registry endpoint failed");
        Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "UNKNOWN",
            "the hub failed; see its log",
        )
    }

    fn into_response(self) -> Response {
        let body = serde_json::json!({"errors": [{"code": self.code, "message": self.message}]});
        let mut response = (self.status, body.to_string()).into_response();
        let headers = response.headers_mut();
        headers.insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/json"),
        );
        if self.status == StatusCode::UNAUTHORIZED {
            let challenge =
                HeaderValue::from_static("Basic realm=\"foreshore\", charset=\"UTF-8\"");
            headers.insert(header::WWW_AUTHENTICATE, challenge);
        }
        response
    }
}

impl From<StoreError> for Refusal {
    fn from(error: StoreError) -> Self {
        Self::internal(error)
    }
}

async fn guard(State(api): State<Api>, request: Request, next: axum::middleware::Next) -> Response {
    let mut response = if !authority::may_pull(&api.secrets, request.headers()) {
        let message = "log in with a device's id and the join token, or any user and the API token";
        Refusal::new(StatusCode::UNAUTHORIZED, "UNAUTHORIZED", message).into_response()
    } else if matches!(*request.method(), Method::GET | Method::HEAD) {
        next.run(request).await
    } else {
        let message = "this endpoint is read-only; import images with `foreshore image import`";
        Refusal::new(StatusCode::METHOD_NOT_ALLOWED, "UNSUPPORTED", message).into_response()
    };
    let version = HeaderValue::from_static("registry/2.0");
    response
        .headers_mut()
        .insert("docker-distribution-api-version", version);
    response
}

async fn root() -> Response {
    ([(header::CONTENT_TYPE, "application/json")], "{}").into_response()
}

async fn fetch(
    State(api): State<Api>,
    path: Result<Path<String>, PathRejection>,
    method: Method,
    headers: HeaderMap,
) -> Response {
    // What cannot be decoded names nothing either.
    let target = path.ok().and_then(|Path(path)| parse(&path));
    let found = match target {
        Some(Target::Manifest(name, reference)) => manifest(&api, name, reference).await,
        Some(Target::Blob(digest)) => blob(&api, digest, &headers, &method).await,
        Some(Target::Tags(name)) => tags(&api, name).await,
        None => Err(Refusal::new(
            StatusCode::NOT_FOUND,
            "NAME_INVALID",
            "write /v2/NAME/manifests/REFERENCE, /v2/NAME/blobs/DIGEST or /v2/NAME/tags/list",
        )),
    };
    found.unwrap_or_else(Refusal::into_response)
}

/// What a path below `/v2/` asks for. A name may hold slashes, so it is read from its end.
#[derive(Debug, PartialEq, Eq)]
enum Target {
    Manifest(String, ManifestReference),
    Blob(Digest),
    Tags(String),
}

#[derive(Debug, PartialEq, Eq)]
enum ManifestReference {
    Tag(String),
    Digest(Digest),
}

fn parse(path: &str) -> Option<Target> {
    let (rest, last) = path.rsplit_once('/')?;
    let (name, kind) = rest.rsplit_once('/')?;
    // Checks the name, too.
    let named = Reference::parse(&format!("{HUB_HOST}/{name}")).ok()?;
    match kind {
        "manifests" if last.contains(':') => Some(Target::Manifest(
            named.repository().to_owned(),
            ManifestReference::Digest(last.parse().ok()?),
        )),
        "manifests" => {
            let tagged = Reference::parse(&format!("{HUB_HOST}/{name}:{last}")).ok()?;
            let tag = tagged.tag()?.to_owned();
            Some(Target::Manifest(
                tagged.repository().to_owned(),
                ManifestReference::Tag(tag),
            ))
        }
        "blobs" => Some(Target::Blob(last.parse().ok()?)),
        "tags" if last == "list" => Some(Target::Tags(named.repository().to_owned())),
        _ => None,
    }
}

async fn manifest(
    api: &Api,
    name: String,
    reference: ManifestReference,
) -> Result<Response, Refusal> {
    let unknown = |what: &str| {
        Refusal::new(
            StatusCode::NOT_FOUND,
            "MANIFEST_UNKNOWN",
            format!("{what} was not imported into the hub"),
        )
    };
    let digest = match reference {
        ManifestReference::Digest(digest) => digest,
        ManifestReference::Tag(tag) => {
            let full = format!("{HUB_HOST}/{name}:{tag}");
            let asked = full.clone();
            let image = api
                .controller
                .store()
                .read(move |connection| {
                    Ok::<_, StoreError>(store::image::by_reference(connection, &asked)?)
                })
                .await?;
            image.ok_or_else(|| unknown(&full))?.view.digest
        }
    };
    let blobs = api.images.blobs().clone();
    let bytes = tokio::task::spawn_blocking(move || blobs.read(&digest, MANIFEST_BYTES_MAX))
        .await
        .map_err(Refusal::internal)?
        .map_err(Refusal::internal)?
        .ok_or_else(|| unknown(&digest.to_string()))?;
    // A layer must not be served as a manifest, whatever somebody put into it.
    let document = Document::parse(&bytes, None).map_err(|_| unknown(&digest.to_string()))?;
    let headers = [
        (header::CONTENT_TYPE, document.media_type().to_owned()),
        (header::CONTENT_LENGTH, bytes.len().to_string()),
        (header::ETAG, format!("\"{digest}\"")),
        (
            header::HeaderName::from_static("docker-content-digest"),
            digest.to_string(),
        ),
    ];
    Ok((headers, bytes).into_response())
}

async fn tags(api: &Api, name: String) -> Result<Response, Refusal> {
    let images = api
        .controller
        .store()
        .read(|connection| Ok::<_, StoreError>(store::image::list(connection)?))
        .await?;
    let prefix = format!("{HUB_HOST}/{name}:");
    let tags: Vec<_> = images
        .iter()
        .filter_map(|image| image.view.reference.strip_prefix(&prefix))
        .take(TAGS_MAX)
        .collect();
    if tags.is_empty() {
        return Err(Refusal::new(
            StatusCode::NOT_FOUND,
            "NAME_UNKNOWN",
            format!("no image {name} was imported"),
        ));
    }
    let body = serde_json::json!({"name": name, "tags": tags});
    Ok((
        [(header::CONTENT_TYPE, "application/json")],
        body.to_string(),
    )
        .into_response())
}

async fn blob(
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
            Refusal::new(
                StatusCode::NOT_FOUND,
                "BLOB_UNKNOWN",
                format!("the hub has no blob {digest}"),
            )
        })?;
    let range = match headers
        .get(header::RANGE)
        .map(|value| byte_range(value, size))
    {
        None | Some(Asked::Whole) => None,
        Some(Asked::Part(first, last)) => Some((first, last)),
        Some(Asked::Beyond) => {
            let mut response = StatusCode::RANGE_NOT_SATISFIABLE.into_response();
            if let Ok(value) = HeaderValue::from_str(&format!("bytes */{size}")) {
                response.headers_mut().insert(header::CONTENT_RANGE, value);
            }
            return Ok(response);
        }
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
    let fixed = [
        (header::CONTENT_TYPE, "application/octet-stream".to_owned()),
        (header::CONTENT_LENGTH, length.to_string()),
        (header::ACCEPT_RANGES, "bytes".to_owned()),
        (header::ETAG, format!("\"{digest}\"")),
        (
            header::HeaderName::from_static("docker-content-digest"),
            digest.to_string(),
        ),
    ];
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

/// A place among the blobs that are sent.
async fn turn(turns: &Arc<Semaphore>, within: Duration) -> Result<OwnedSemaphorePermit, Refusal> {
    let turn = tokio::time::timeout(within, Arc::clone(turns).acquire_owned());
    match turn.await {
        Ok(turn) => turn.map_err(Refusal::internal),
        Err(_) => Err(Refusal::new(
            StatusCode::TOO_MANY_REQUESTS,
            "TOOMANYREQUESTS",
            format!("the hub sends {BLOBS_AT_ONCE} blobs already; try again"),
        )),
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
enum Asked {
    /// All of it: no range that is understood, or several.
    Whole,
    /// First and last byte.
    Part(u64, u64),
    /// Nothing that is there.
    Beyond,
}

fn byte_range(value: &HeaderValue, size: u64) -> Asked {
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

    #[test]
    fn names_with_slashes_are_read_from_their_end() {
        let digest = Digest::of(b"");
        let manifest = |name: &str, reference| Some(Target::Manifest(name.to_owned(), reference));
        assert_eq!(
            parse("demo/manifests/v1"),
            manifest("demo", ManifestReference::Tag("v1".to_owned()))
        );
        assert_eq!(
            parse(&format!("acme/manifests/demo/manifests/{digest}")),
            manifest("acme/manifests/demo", ManifestReference::Digest(digest))
        );
        assert_eq!(
            parse(&format!("demo/blobs/{digest}")),
            Some(Target::Blob(digest))
        );
        assert_eq!(parse("a/b/tags/list"), Some(Target::Tags("a/b".to_owned())));
        for bad in [
            "",
            "demo",
            "manifests/v1",
            "/manifests/v1",
            "../x/manifests/v1",
            "demo/blobs/v1",
            "Demo/manifests/v1",
            "demo/manifests/sha256:00",
            "demo/tags/other",
            "demo/manifests/.x",
        ] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }

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
