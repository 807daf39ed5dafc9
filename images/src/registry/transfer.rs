//! A blob on its way from a registry: paced, tried again, and gone on with where it stopped.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Read, Write};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use sha2::{Digest as _, Sha256};
use ureq::http::Response;
use ureq::{Body, BodyReader};

use super::ask::{Ask, content_length, content_range, is_web_page, media_type};
use super::source::{Endpoint, Refused};
use super::{Client, FetchError};
use crate::manifest::Descriptor;
use crate::partial::PartialBlob;
use crate::{Digest, Reference};

/// How much is read at once.
const BUFFER: usize = 64 << 10;
/// An attempt that brought so much was worth it: the count of vain ones begins anew.
const WORTH_BYTES: u64 = 64 << 10;
/// So often in a row a source may be unwell (HTTP 5xx) when asked for a part before it is asked for all: it may be ranges
/// that it cannot do.
const PLAIN_AFTER: u32 = 2;
/// How often a wait looks whether it is still wanted.
const LOOK: Duration = Duration::from_millis(100);
/// How often the gate is asked while bytes come in.
const GATE_EVERY: Duration = Duration::from_secs(5);

/// How often something is tried again that failed in a way that may pass ([`FetchError::is_transient`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retry {
    /// Attempts in vain, one after the other, before it is given up; one that brought 64 KiB was not in vain. 1 or 0 is never.
    pub attempts: u32,
    /// The least wait before the next attempt.
    pub least: Duration,
    /// The longest wait before the next attempt.
    pub longest: Duration,
}

impl Retry {
    /// None: for those who have somebody to tell at once. The default.
    pub const NEVER: Self = Self {
        attempts: 1,
        least: Duration::ZERO,
        longest: Duration::ZERO,
    };
    /// For devices on bad links: six attempts in vain, half a second to 30 seconds apart.
    pub const PATIENT: Self = Self {
        attempts: 6,
        least: Duration::from_millis(500),
        longest: Duration::from_secs(30),
    };

    /// How long to wait after a wait of `last`: at random between the least and three times the last, so that a fleet
    /// that failed together does not come back together ("decorrelated jitter", AWS Architecture Blog 2015).
    fn wait(&self, last: Duration) -> Duration {
        let most = last.saturating_mul(3).clamp(self.least, self.longest);
        let spread = most.saturating_sub(self.least);
        self.least + spread.mul_f64(fastrand::f64())
    }
}

impl Default for Retry {
    fn default() -> Self {
        Self::NEVER
    }
}

/// Says before and while blobs are fetched whether that may be now.
#[derive(Clone)]
pub struct Gate(Arc<dyn Fn() -> Result<(), String> + Send + Sync>);

impl Gate {
    /// `is_open` answers with a reason, for people, when nothing is to be fetched.
    pub fn new(is_open: impl Fn() -> Result<(), String> + Send + Sync + 'static) -> Self {
        Self(Arc::new(is_open))
    }
}

impl fmt::Debug for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Gate")
    }
}

/// A token bucket over all blobs of a client. It holds what comes in a quarter of a second.
pub(super) struct Pace {
    rate: f64,
    /// Bytes that may pass now, negative when more has passed; as of when.
    bucket: Mutex<(f64, Instant)>,
}

impl Pace {
    /// `rate` in bytes a second.
    pub(super) fn new(rate: u64) -> Self {
        Self {
            #[expect(clippy::cast_precision_loss, reason = "a rate need not be exact")]
            rate: rate.max(1) as f64,
            bucket: Mutex::new((0.0, Instant::now())),
        }
    }

    /// Takes `count` bytes out, and says how long to wait for them.
    fn take(&self, count: usize, now: Instant) -> Duration {
        let mut bucket = self.bucket.lock().unwrap_or_else(PoisonError::into_inner);
        let (level, as_of) = &mut *bucket;
        let passed = now.saturating_duration_since(*as_of).as_secs_f64();
        #[expect(clippy::cast_precision_loss, reason = "a buffer's length is exact")]
        let count = count as f64;
        *level = passed.mul_add(self.rate, *level).min(self.rate / 4.0) - count;
        *as_of = now;
        Duration::from_secs_f64((-*level / self.rate).max(0.0))
    }
}

/// Told how many bytes are there, after each piece and now and then while none comes; fewer than before when what had come
/// was wrong. An error ends the transfer.
pub type Watch<'w> = &'w mut dyn FnMut(u64) -> io::Result<()>;

impl Client {
    /// Streams a blob of `reference`'s repository into `sink` and checks its declared size and digest. Asks the
    /// mirrors first; tries nothing again. `progress` is called with the number of bytes of each piece. What was written
    /// before an error is garbage.
    ///
    /// # Errors
    /// [`FetchError`].
    pub fn blob(
        &self,
        reference: &Reference,
        blob: &Descriptor,
        sink: &mut dyn Write,
        progress: &mut dyn FnMut(u64),
    ) -> Result<(), FetchError> {
        let what = what(reference, blob);
        let found = self.ask_any(reference, |endpoint| {
            let ask = self.ask(endpoint, reference, &what, blob.size);
            self.passable(endpoint, &what)?;
            let (_, body) = self.open(&ask, endpoint, blob, 0)?;
            Ok((endpoint.clone(), body))
        });
        let (endpoint, body) = found.map_err(Refused::into_error)?;
        let ask = self.ask(&endpoint, reference, &what, blob.size);
        let mut hasher = Sha256::new();
        let mut received = 0;
        self.copy(&ask, &endpoint, body, blob.size, &mut |bytes| {
            hasher.update(bytes);
            sink.write_all(bytes)?;
            received += bytes.len() as u64;
            progress(bytes.len() as u64);
            Ok(())
        })?;
        if received != blob.size {
            return Err(ask.size_mismatch(blob.size, received));
        }
        let found = Digest::from_bytes(hasher.finalize().into());
        if found == blob.digest {
            Ok(())
        } else {
            Err(ask.digest_mismatch(found))
        }
    }

    /// A small blob in memory; tries again as [`ClientConfig::retry`](super::ClientConfig::retry) says.
    pub(crate) fn small_blob(
        &self,
        reference: &Reference,
        blob: &Descriptor,
    ) -> Result<Vec<u8>, FetchError> {
        let what = what(reference, blob);
        self.retrying(|| {
            self.ask_any(reference, |endpoint| {
                let ask = self.ask(endpoint, reference, &what, blob.size);
                self.passable(endpoint, &what)?;
                let (_, body) = self.open(&ask, endpoint, blob, 0)?;
                let mut bytes = Vec::new();
                self.copy(&ask, endpoint, body, blob.size, &mut |piece| {
                    bytes.extend_from_slice(piece);
                    Ok(())
                })?;
                if bytes.len() as u64 != blob.size {
                    return Err(ask.size_mismatch(blob.size, bytes.len() as u64));
                }
                match Digest::of(&bytes) {
                    found if found == blob.digest => Ok(bytes),
                    found => Err(ask.digest_mismatch(found)),
                }
            })
        })
    }

    /// Fetches what `partial` lacks of a blob, from wherever it can be had, until it is whole and has the right digest.
    /// Whatever came stays in `partial` when it cannot be finished.
    ///
    /// # Errors
    /// [`FetchError`]; [`FetchError::Sink`] for an error of `watch`.
    pub fn resume(
        &self,
        reference: &Reference,
        blob: &Descriptor,
        partial: &mut PartialBlob,
        watch: Watch<'_>,
    ) -> Result<(), FetchError> {
        let what = what(reference, blob);
        let mut tries = Tries::new(self.retry);
        // As the slowest pace has it, over all attempts.
        let budget = self.timeouts.exchange.saturating_add(Duration::from_secs(
            blob.size.min(self.blob_bytes_max) / self.timeouts.pace_bytes.max(1),
        ));
        let until = Instant::now() + budget;
        // How often in a row a source said that it is not well when it was asked for a part.
        let mut unwell: BTreeMap<String, u32> = BTreeMap::new();
        loop {
            let before = partial.size();
            let mut refused = Refused::default();
            for source in &self.sources(reference)? {
                let had = partial.size();
                let unwell = unwell.entry(source.name().to_owned()).or_default();
                let plain = *unwell >= PLAIN_AFTER;
                let mut attempt = |partial: &mut PartialBlob| {
                    let ask = self.ask(source, reference, &what, blob.size);
                    self.attempt(&ask, source, blob, partial, plain, watch)
                };
                let mut result = attempt(partial);
                // What was there before, of an earlier time or from a mirror, may have been wrong, which is no fault of this
                // source: once more, all of it.
                if let Err(FetchError::DigestMismatch { .. }) = result
                    && had > 0
                {
                    result = attempt(partial);
                }
                match result {
                    Ok(()) => return Ok(()),
                    Err(error) if error.is_ours() => return Err(error),
                    Err(error) => {
                        let is_unwell =
                            matches!(&error, FetchError::Status { status, .. } if *status >= 500);
                        *unwell = if is_unwell && had > 0 { *unwell + 1 } else { 0 };
                        self.passed_over(source, &error, partial.size() > had);
                        refused.add(source, error);
                    }
                }
            }
            let worth_it = partial.size() >= before.saturating_add(WORTH_BYTES);
            let wait = tries.next(refused, worth_it)?;
            if Instant::now() + wait >= until {
                return Err(FetchError::TimedOut {
                    host: reference.host().to_owned(),
                    what,
                });
            }
            sleep(wait, &mut || watch(partial.size())).map_err(|source| FetchError::Sink {
                what: what.clone(),
                source,
            })?;
        }
    }

    /// One go at the rest of a blob; `plain` is without a range.
    fn attempt(
        &self,
        ask: &Ask<'_>,
        endpoint: &Endpoint,
        blob: &Descriptor,
        partial: &mut PartialBlob,
        plain: bool,
        watch: Watch<'_>,
    ) -> Result<(), FetchError> {
        let sink = |source| FetchError::Sink {
            what: ask.what.to_owned(),
            source,
        };
        while partial.size() < blob.size || blob.size == 0 {
            self.passable(endpoint, ask.what)?;
            let had = partial.size();
            let (range, body) = self.open(ask, endpoint, blob, if plain { 0 } else { had })?;
            // A server that knows no ranges sends all of it: what is there is passed over.
            let mut skip = usize::try_from(had - range.start).unwrap_or(usize::MAX);
            let length = range.end - range.start;
            self.copy(ask, endpoint, body, length, &mut |bytes| {
                let new = &bytes[skip.min(bytes.len())..];
                skip -= bytes.len() - new.len();
                partial.append(new)?;
                watch(partial.size())
            })?;
            // A piece, and all of it: the next is asked for. Anything else is an end that came too early, or the end.
            if range.end == blob.size || partial.size() != range.end {
                break;
            }
        }
        if partial.size() != blob.size {
            return Err(ask.size_mismatch(blob.size, partial.size()));
        }
        let found = partial.digest();
        if found == blob.digest {
            return partial.finish().map_err(sink);
        }
        partial.reset().and_then(|()| watch(0)).map_err(sink)?;
        Err(ask.digest_mismatch(found))
    }

    /// The body of a blob, and which bytes it brings: from `offset` on or from before, perhaps not up to the end. Asks for all of
    /// it when the answer to the rest is none.
    fn open(
        &self,
        ask: &Ask<'_>,
        endpoint: &Endpoint,
        blob: &Descriptor,
        offset: u64,
    ) -> Result<(Range<u64>, Response<Body>), FetchError> {
        if blob.size > self.blob_bytes_max {
            return Err(ask.too_large(self.blob_bytes_max));
        }
        let path = format!("blobs/{}", blob.digest);
        if offset > 0 {
            match self.get(ask, endpoint, &path, "*/*", offset) {
                Ok(response) => {
                    if let Some(range) = self.brought(ask, blob, offset, &response)? {
                        return Ok((range, response));
                    }
                }
                Err(error) if says_nothing_without_range(&error) => {}
                Err(error) => return Err(error),
            }
            tracing::debug!(
                what = ask.what,
                "all of it is asked for, since a range is not served"
            );
        }
        let response = self.get(ask, endpoint, &path, "*/*", 0)?;
        match self.brought(ask, blob, 0, &response)? {
            Some(range) => Ok((range, response)),
            None => Err(ask.unreachable("it sent another range than was asked for".into())),
        }
    }

    /// Which bytes of a blob a response brings; `None` when not those from `offset` on.
    fn brought(
        &self,
        ask: &Ask<'_>,
        blob: &Descriptor,
        offset: u64,
        response: &Response<Body>,
    ) -> Result<Option<Range<u64>>, FetchError> {
        let headers = response.headers();
        if let Some(media_type) = media_type(headers).filter(|found| is_web_page(found)) {
            return Err(ask.not_a_registry(media_type));
        }
        let announced = content_length(headers);
        if response.status().as_u16() == 206 {
            let range = content_range(headers, blob.size)
                .filter(|range| range.contains(&offset))
                .filter(|range| announced.is_none_or(|length| length == range.end - range.start));
            return Ok(range);
        }
        match announced {
            Some(announced) if announced != blob.size => {
                Err(ask.size_mismatch(blob.size, announced))
            }
            _ => Ok(Some(0..blob.size)),
        }
    }

    /// Hands the pieces of a body of `length` bytes on. Ends early when the body does.
    fn copy(
        &self,
        ask: &Ask<'_>,
        endpoint: &Endpoint,
        body: Response<Body>,
        length: u64,
        sink: &mut dyn FnMut(&[u8]) -> io::Result<()>,
    ) -> Result<(), FetchError> {
        // One byte more than declared is enough to know.
        let mut body: io::Take<BodyReader<'static>> = body
            .into_body()
            .into_reader()
            .take(length.saturating_add(1));
        let mut buffer = vec![0; BUFFER];
        let mut received = 0;
        let mut asked = Instant::now();
        loop {
            let count = match body.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(ask.body(error)),
            };
            received += count as u64;
            if received > length {
                return Err(ask.size_mismatch(length, received));
            }
            sink(&buffer[..count]).map_err(|source| FetchError::Sink {
                what: ask.what.to_owned(),
                source,
            })?;
            if let Some(pace) = &self.pace {
                std::thread::sleep(pace.take(count, Instant::now()));
            }
            if asked.elapsed() >= GATE_EVERY {
                self.passable(endpoint, ask.what)?;
                asked = Instant::now();
            }
        }
    }

    fn passable(&self, endpoint: &Endpoint, what: &str) -> Result<(), FetchError> {
        let Some(gate) = self.gate.as_ref().filter(|_| !endpoint.ungated) else {
            return Ok(());
        };
        gate.0().map_err(|reason| FetchError::Deferred {
            what: what.to_owned(),
            reason,
        })
    }

    /// Tries again as the configuration says.
    pub(super) fn retrying<T>(
        &self,
        mut attempt: impl FnMut() -> Result<T, Refused>,
    ) -> Result<T, FetchError> {
        let mut tries = Tries::new(self.retry);
        loop {
            match attempt() {
                Ok(done) => return Ok(done),
                Err(refused) => std::thread::sleep(tries.next(refused, false)?),
            }
        }
    }
}

/// Whether an answer to a range may be about the range alone, so that all may be had. Not those that ask for time, or say
/// that somebody else is in charge.
fn says_nothing_without_range(error: &FetchError) -> bool {
    match error {
        FetchError::Denied { status, .. } => *status == 403,
        FetchError::Status { status, .. } => {
            !matches!(status, 408 | 425 | 429 | 500 | 502 | 503 | 504)
        }
        _ => false,
    }
}

fn what(reference: &Reference, blob: &Descriptor) -> String {
    format!("blob {}@{}", reference.repository(), blob.digest)
}

/// Sleeps, and looks now and then whether it is still wanted.
fn sleep(wait: Duration, wanted: &mut dyn FnMut() -> io::Result<()>) -> io::Result<()> {
    let until = Instant::now() + wait;
    loop {
        wanted()?;
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(());
        }
        std::thread::sleep(left.min(LOOK));
    }
}

/// Counts attempts.
struct Tries {
    retry: Retry,
    vain: u32,
    wait: Duration,
}

impl Tries {
    const fn new(retry: Retry) -> Self {
        Self {
            retry,
            vain: 0,
            wait: retry.least,
        }
    }

    /// How long to wait before trying again.
    ///
    /// # Errors
    /// What is to be said of it, when there is no use in that.
    fn next(&mut self, refused: Refused, worth_it: bool) -> Result<Duration, FetchError> {
        if worth_it {
            *self = Self::new(self.retry);
        } else {
            self.vain += 1;
        }
        let spent = self.retry.attempts <= 1 || self.vain >= self.retry.attempts;
        let Some(asked) = refused.hope().filter(|_| !spent) else {
            return Err(refused.into_error());
        };
        self.wait = self.retry.wait(self.wait);
        let wait = self.wait.max(asked);
        tracing::info!(error = %refused.into_error(), ?wait, "trying again");
        Ok(wait)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pace_is_kept_and_bursts_are_short() {
        let begin = Instant::now();
        let pace = Pace {
            rate: 1000.0,
            bucket: Mutex::new((0.0, begin)),
        };
        let at = |milliseconds| begin + Duration::from_millis(milliseconds);
        assert_eq!(pace.take(100, at(0)), Duration::from_millis(100));
        assert_eq!(pace.take(100, at(100)), Duration::from_millis(100));
        // However long nothing came, only a quarter of a second's worth is there at once.
        assert_eq!(pace.take(250, at(60_000)), Duration::ZERO);
        assert_eq!(pace.take(250, at(60_000)), Duration::from_millis(250));
    }

    #[test]
    fn waits_are_spread_and_bounded() {
        let retry = Retry::PATIENT;
        let mut wait = retry.least;
        for _ in 0..100 {
            let next = retry.wait(wait);
            assert!(next >= retry.least && next <= retry.longest);
            assert!(next <= (wait * 3).max(retry.least));
            wait = next;
        }
        assert_eq!(Retry::NEVER.wait(Duration::ZERO), Duration::ZERO);
    }

    #[test]
    fn what_a_registry_asks_for_is_kept_unless_it_is_too_long() {
        let refused = |error: FetchError| Refused::from(error);
        let status = |seconds| FetchError::Status {
            host: "h".into(),
            what: "w".into(),
            status: 429,
            retry_after: Some(Duration::from_secs(seconds)),
        };
        let mut tries = Tries::new(Retry::PATIENT);
        assert_eq!(
            tries.next(refused(status(77)), false).unwrap(),
            Duration::from_secs(77)
        );
        assert!(tries.next(refused(status(301)), false).is_err());
        let mut tries = Tries::new(Retry::PATIENT);
        for _ in 1..6 {
            tries.next(refused(status(0)), false).unwrap();
        }
        assert!(
            tries.next(refused(status(0)), false).is_err(),
            "the sixth in vain"
        );
        let gone = FetchError::NotFound {
            host: "h".into(),
            what: "w".into(),
        };
        assert!(
            Tries::new(Retry::PATIENT)
                .next(refused(gone), true)
                .is_err()
        );
    }
}
