//! One question to a registry: sent, timed, and turned into an answer or an error that names it.

use std::io;
use std::time::{Duration, Instant};

use ureq::http::{HeaderMap, Response, header};
use ureq::{Agent, Body};

use super::FetchError;
use crate::Digest;

/// What a request says besides where it goes.
pub(super) struct Question<'a> {
    /// At the registry; not used for token servers.
    pub(super) path: &'a str,
    pub(super) accept: &'a str,
    /// From which byte on (RFC 9110, section 14.2); 0 for all.
    pub(super) offset: u64,
}

/// One thing that is asked for: what errors are about.
#[derive(Clone, Copy)]
pub(super) struct Ask<'a> {
    pub(super) host: &'a str,
    pub(super) repository: &'a str,
    pub(super) what: &'a str,
    pub(super) until: Instant,
}

impl Ask<'_> {
    /// One request, one answer, whatever it says.
    pub(super) fn call(
        &self,
        agent: &Agent,
        url: &str,
        question: &Question<'_>,
        authorization: Option<&str>,
    ) -> Result<Response<Body>, FetchError> {
        let left = self.left()?;
        let mut request = agent
            .get(url)
            .header(header::ACCEPT, question.accept)
            // The digest is of the bytes as stored, so nobody may compress them on the way.
            .header(header::ACCEPT_ENCODING, "identity");
        if question.offset > 0 {
            request = request.header(header::RANGE, format!("bytes={}-", question.offset));
        }
        if let Some(authorization) = authorization {
            request = request.header(header::AUTHORIZATION, authorization);
        }
        request
            .config()
            .timeout_global(Some(left))
            .build()
            .call()
            .map_err(|error| self.unanswered(error))
    }

    /// One form sent, one answer, whatever it says.
    pub(super) fn send(
        &self,
        agent: &Agent,
        url: &str,
        form: impl IntoIterator<Item = (&'static str, String)>,
    ) -> Result<Response<Body>, FetchError> {
        let left = self.left()?;
        agent
            .post(url)
            .header(header::ACCEPT, "application/json")
            .config()
            .timeout_global(Some(left))
            .build()
            .send_form(form)
            .map_err(|error| self.unanswered(error))
    }

    fn left(&self) -> Result<Duration, FetchError> {
        let left = self.until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(self.timed_out());
        }
        Ok(left)
    }

    fn unanswered(&self, error: ureq::Error) -> FetchError {
        if is_timeout(&error) {
            self.timed_out()
        } else {
            self.unreachable(error.into())
        }
    }

    pub(super) fn checked(&self, response: Response<Body>) -> Result<Response<Body>, FetchError> {
        match response.status().as_u16() {
            200 | 206 => Ok(response),
            404 => Err(self.not_found()),
            status @ (401 | 403) => Err(self.denied(status)),
            status => Err(FetchError::Status {
                host: self.host(),
                what: self.what(),
                status,
                retry_after: retry_after(response.headers()),
            }),
        }
    }

    pub(super) fn not_found(&self) -> FetchError {
        FetchError::NotFound {
            host: self.host(),
            what: self.what(),
        }
    }

    fn host(&self) -> String {
        self.host.to_owned()
    }

    fn what(&self) -> String {
        self.what.to_owned()
    }

    pub(super) fn denied(&self, status: u16) -> FetchError {
        FetchError::Denied {
            host: self.host(),
            what: self.what(),
            status,
        }
    }

    pub(super) fn unreachable(
        &self,
        source: Box<dyn std::error::Error + Send + Sync>,
    ) -> FetchError {
        FetchError::Unreachable {
            host: self.host(),
            what: self.what(),
            source,
        }
    }

    pub(super) fn timed_out(&self) -> FetchError {
        FetchError::TimedOut {
            host: self.host(),
            what: self.what(),
        }
    }

    pub(super) fn body(&self, error: io::Error) -> FetchError {
        if is_timeout(&error) {
            return self.timed_out();
        }
        self.unreachable(error.into())
    }

    pub(super) fn not_a_registry(&self, media_type: String) -> FetchError {
        FetchError::NotARegistry {
            host: self.host(),
            what: self.what(),
            media_type,
        }
    }

    pub(super) fn too_large(&self, max: u64) -> FetchError {
        FetchError::TooLarge {
            host: self.host(),
            what: self.what(),
            max,
        }
    }

    pub(super) fn digest_mismatch(&self, found: Digest) -> FetchError {
        FetchError::DigestMismatch {
            host: self.host(),
            what: self.what(),
            found,
        }
    }

    pub(super) fn size_mismatch(&self, declared: u64, found: u64) -> FetchError {
        FetchError::SizeMismatch {
            host: self.host(),
            what: self.what(),
            declared,
            found,
        }
    }

    pub(super) fn redirect(&self, problem: String) -> FetchError {
        FetchError::Redirect {
            host: self.host(),
            what: self.what(),
            problem,
        }
    }

    pub(super) fn document(&self, source: crate::manifest::DocumentError) -> FetchError {
        FetchError::Document {
            host: self.host(),
            what: self.what(),
            source,
        }
    }

    pub(super) fn token(&self, realm: &str, problem: String, transient: bool) -> FetchError {
        let realm = realm
            .split('?')
            .next()
            .unwrap_or_default()
            .chars()
            .take(256)
            .collect();
        FetchError::Token {
            host: self.host(),
            what: self.what(),
            realm,
            problem,
            transient,
        }
    }
}

/// Whether an error, however it was wrapped on its way up, says that nothing came in time.
fn is_timeout(error: &(dyn std::error::Error + 'static)) -> bool {
    if let Some(error) = error.downcast_ref::<ureq::Error>() {
        return match error {
            ureq::Error::Timeout(_) | ureq::Error::BodyStalled => true,
            ureq::Error::Io(inner) => is_timeout(inner),
            _ => false,
        };
    }
    if let Some(error) = error.downcast_ref::<io::Error>() {
        return matches!(
            error.kind(),
            io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock
        ) || error.get_ref().is_some_and(|inner| is_timeout(inner));
    }
    error.source().is_some_and(is_timeout)
}

pub(super) fn header_text(headers: &HeaderMap, name: &header::HeaderName) -> Option<String> {
    headers
        .get(name)
        .and_then(|value| value.to_str().ok())
        .map(str::to_owned)
}

/// Seconds of `Retry-After`; its other form, a date, would need a clock that is right.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let seconds = header_text(headers, &header::RETRY_AFTER)?;
    seconds.trim().parse().ok().map(Duration::from_secs)
}

/// What a 206 brings, as bytes of the whole: `bytes 7-8/10` and `bytes 7-8/*` are `7..9` (RFC 9110, section 14.4). `None` when
/// it does not say so, or says that the whole has not `size` bytes.
pub(super) fn content_range(headers: &HeaderMap, size: u64) -> Option<std::ops::Range<u64>> {
    let text = header_text(headers, &header::CONTENT_RANGE)?;
    let (range, length) = text.trim().strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.trim().split_once('-')?;
    let (first, last): (u64, u64) = (first.parse().ok()?, last.parse().ok()?);
    let known = length.trim() == "*" || length.trim().parse() == Ok(size);
    (known && first <= last && last < size).then(|| first..last + 1)
}

pub(super) fn content_length(headers: &HeaderMap) -> Option<u64> {
    header_text(headers, &header::CONTENT_LENGTH)?
        .trim()
        .parse()
        .ok()
}

/// Lower-case, without parameters.
pub(super) fn media_type(headers: &HeaderMap) -> Option<String> {
    let text = header_text(headers, &header::CONTENT_TYPE)?;
    let media_type: String = text
        .split(';')
        .next()
        .unwrap_or_default()
        .trim()
        .chars()
        .take(128)
        .collect();
    (!media_type.is_empty()).then(|| media_type.to_ascii_lowercase())
}

pub(super) fn is_web_page(media_type: &str) -> bool {
    matches!(media_type, "text/html" | "application/xhtml+xml")
}

pub(super) fn is_vague(media_type: &str) -> bool {
    matches!(
        media_type,
        "application/json" | "application/octet-stream" | "text/plain"
    )
}
