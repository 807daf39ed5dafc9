//! The client of a registry: the pull side of the OCI distribution specification over HTTP.
//!
//! Every exchange is bounded: a connection must stand within [`Timeouts::connect`], something must come within
//! [`Timeouts::stall`], the whole must be done within a time that follows from its size; documents have a cap,
//! blobs their declared size. Redirects are followed here rather than in the HTTP library, since `Authorization`
//! must reach nobody but the registry's own origin. Nothing is believed until its digest is right.

mod ask;
mod auth;
mod config;
mod entry;
mod error;
mod url;

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Read, Write};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use sha2::{Digest as _, Sha256};
use ureq::http::{HeaderMap, Response, header};
use ureq::{Agent, Body};

use self::ask::{Ask, content_length, header_text, is_vague, is_web_page, media_type};
use self::auth::{Challenge, TOKEN_BYTES_MAX};
pub use self::config::{ClientConfig, ConfigError, Credentials, RegistryConfig, Timeouts};
use self::config::{Endpoint, agent, default_url};
pub use self::entry::RegistryEntry;
pub use self::error::FetchError;
pub(crate) use self::error::is_disk_full;
use self::url::Origin;
use crate::manifest::{ACCEPT, Descriptor, Document, MANIFEST_BYTES_MAX};
use crate::{Digest, Reference};

/// Hops that are followed for one request.
const REDIRECTS_MAX: usize = 5;
/// Default of [`ClientConfig::blob_bytes_max`].
const BLOB_BYTES_MAX: u64 = 8 << 30;

/// A manifest or index whose digest was checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RawManifest {
    /// SHA-256 of `bytes`.
    pub digest: Digest,
    /// One of the four media types in [`crate::manifest`].
    pub media_type: String,
    /// As served.
    pub bytes: Vec<u8>,
}

/// A client of registries. Blocking; `Sync`, so threads may share it; keeps connections and tokens.
pub struct Client {
    /// For what is not configured.
    agent: Agent,
    registries: BTreeMap<String, Endpoint>,
    timeouts: Timeouts,
    blob_bytes_max: u64,
    /// `Authorization` by host and repository. Only in memory; `Debug` does not show it.
    authorizations: Mutex<BTreeMap<(String, String), String>>,
}

impl Client {
    /// Checks the configuration and loads the CA files. Connects to nothing.
    ///
    /// # Errors
    /// [`ConfigError`] for a bad host, URL or CA file.
    pub fn new(config: ClientConfig) -> Result<Self, ConfigError> {
        let timeouts = config.timeouts;
        let registries = config
            .registries
            .into_iter()
            .map(|(host, registry)| {
                let endpoint = Endpoint::new(&host, registry, &timeouts)?;
                Ok((host, endpoint))
            })
            .collect::<Result<_, _>>()?;
        Ok(Self {
            agent: agent(&timeouts, None, true),
            registries,
            timeouts,
            blob_bytes_max: config.blob_bytes_max.unwrap_or(BLOB_BYTES_MAX),
            authorizations: Mutex::new(BTreeMap::new()),
        })
    }

    /// The digest of the index or manifest that `reference` names. With a digest in the reference it is
    /// checked that the registry has it.
    ///
    /// # Errors
    /// [`FetchError`].
    pub fn resolve(&self, reference: &Reference) -> Result<Digest, FetchError> {
        self.manifest(reference).map(|raw| raw.digest)
    }

    /// Fetches the index or manifest that `reference` names, by its digest if it has one. At most 4 MiB.
    ///
    /// # Errors
    /// [`FetchError`].
    pub fn manifest(&self, reference: &Reference) -> Result<RawManifest, FetchError> {
        let name = match (reference.digest(), reference.tag()) {
            (Some(digest), _) => digest.to_string(),
            (None, tag) => tag.unwrap_or("latest").to_owned(),
        };
        let what = match reference.digest() {
            Some(digest) => format!("manifest {}@{digest}", reference.repository()),
            None => format!("manifest {}:{name}", reference.repository()),
        };
        let ask = self.ask(reference, &what, 0);
        let response = self.get(
            &ask,
            &format!("/v2/{}/manifests/{name}", reference.repository()),
            ACCEPT,
        )?;
        let media_type = media_type(response.headers());
        let bytes = self.read_document(&ask, response)?;
        let digest = Digest::of(&bytes);
        if let Some(expected) = reference.digest()
            && expected != digest
        {
            // A login page is the likelier reason than a lying registry; say which it is.
            return Err(match media_type {
                Some(media_type) if is_web_page(&media_type) => ask.not_a_registry(media_type),
                _ => ask.digest_mismatch(digest),
            });
        }
        let media_type = match media_type {
            Some(media_type) if is_web_page(&media_type) => {
                return Err(ask.not_a_registry(media_type));
            }
            // Static file servers do not know better; the document says itself what it is.
            Some(media_type) if is_vague(&media_type) => None,
            other => other,
        };
        let document = Document::parse(&bytes, media_type.as_deref())
            .map_err(|source| ask.document(source))?;
        let media_type = media_type.unwrap_or_else(|| document.media_type().to_owned());
        Ok(RawManifest {
            digest,
            media_type,
            bytes,
        })
    }

    /// Streams a blob of `reference`'s repository into `sink` and checks its declared size and digest.
    /// `progress` is called with the number of bytes of each piece. What was written before an error is garbage.
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
        let what = format!("blob {}@{}", reference.repository(), blob.digest);
        let ask = self.ask(reference, &what, blob.size);
        if blob.size > self.blob_bytes_max {
            return Err(ask.too_large(self.blob_bytes_max));
        }
        let path = format!("/v2/{}/blobs/{}", reference.repository(), blob.digest);
        let response = self.get(&ask, &path, "*/*")?;
        if let Some(media_type) = media_type(response.headers()).filter(|found| is_web_page(found))
        {
            return Err(ask.not_a_registry(media_type));
        }
        let mismatch = |found| ask.size_mismatch(blob.size, found);
        if let Some(announced) =
            content_length(response.headers()).filter(|length| *length != blob.size)
        {
            return Err(mismatch(announced));
        }
        // One byte more than declared is enough to know.
        let mut body = response
            .into_body()
            .into_reader()
            .take(blob.size.saturating_add(1));
        let mut hasher = Sha256::new();
        let mut received = 0;
        let mut buffer = vec![0; 64 << 10];
        loop {
            let count = match body.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(ask.body(error)),
            };
            received += count as u64;
            if received > blob.size {
                return Err(mismatch(received));
            }
            hasher.update(&buffer[..count]);
            sink.write_all(&buffer[..count])
                .map_err(|source| FetchError::Sink {
                    what: what.clone(),
                    source,
                })?;
            progress(count as u64);
        }
        if received != blob.size {
            return Err(mismatch(received));
        }
        let found = Digest::from_bytes(hasher.finalize().into());
        if found == blob.digest {
            Ok(())
        } else {
            Err(ask.digest_mismatch(found))
        }
    }

    fn ask<'a>(&self, reference: &'a Reference, what: &'a str, bytes: u64) -> Ask<'a> {
        // What declares more than is fetched at all gets no more time for it either.
        let seconds = bytes.min(self.blob_bytes_max) / self.timeouts.pace_bytes.max(1);
        let time = self
            .timeouts
            .exchange
            .saturating_add(Duration::from_secs(seconds));
        Ask {
            host: reference.host(),
            repository: reference.repository(),
            what,
            until: Instant::now() + time,
        }
    }

    /// The answer to a GET of `path`, 200 only; asks for a token or sends credentials when told to.
    fn get(&self, ask: &Ask<'_>, path: &str, accept: &str) -> Result<Response<Body>, FetchError> {
        let endpoint = self.endpoint(ask)?;
        let key = (ask.host.to_owned(), ask.repository.to_owned());
        let known = self.lock_authorizations().get(&key).cloned();
        let response = self.follow(ask, &endpoint, path, accept, known.as_deref())?;
        if response.status().as_u16() != 401 {
            return ask.checked(response);
        }
        let Some(authorization) = self.authorize(ask, &endpoint, response.headers())? else {
            return ask.checked(response);
        };
        drop(response);
        self.lock_authorizations()
            .insert(key.clone(), authorization.clone());
        let response = self.follow(ask, &endpoint, path, accept, Some(&authorization))?;
        if response.status().as_u16() == 401 {
            self.lock_authorizations().remove(&key);
        }
        ask.checked(response)
    }

    fn lock_authorizations(&self) -> std::sync::MutexGuard<'_, BTreeMap<(String, String), String>> {
        // A map of strings is whole after any panic.
        self.authorizations
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn endpoint(&self, ask: &Ask<'_>) -> Result<Endpoint, FetchError> {
        if let Some(endpoint) = self.registries.get(ask.host) {
            return Ok(endpoint.clone());
        }
        let origin = Origin::parse(&default_url(ask.host, false))
            .ok_or_else(|| ask.unreachable("the host cannot be part of a URL".into()))?;
        Ok(Endpoint {
            origin,
            agent: self.agent.clone(),
            credentials: None,
            token_hosts: Vec::new(),
        })
    }

    /// GETs `path`, following redirects; `Authorization` goes to the registry's own origin only.
    fn follow(
        &self,
        ask: &Ask<'_>,
        endpoint: &Endpoint,
        path: &str,
        accept: &str,
        authorization: Option<&str>,
    ) -> Result<Response<Body>, FetchError> {
        let mut origin = endpoint.origin.clone();
        let mut url = format!("{}{path}", origin.base());
        for _ in 0..=REDIRECTS_MAX {
            let at_home = origin == endpoint.origin;
            let agent = if at_home {
                &endpoint.agent
            } else {
                self.agent_for(&origin)
            };
            let response = ask.call(agent, &url, accept, authorization.filter(|_| at_home))?;
            if !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
                return Ok(response);
            }
            let location = header_text(response.headers(), &header::LOCATION).unwrap_or_default();
            let next = url::resolve(&origin, &location)
                .and_then(|next| Some((Origin::parse(&next)?, next)));
            let Some((next_origin, next_url)) = next else {
                return Err(ask.redirect("to something that is not a URL".to_owned()));
            };
            if !next_origin.is_https() && !self.plain_is_allowed(&endpoint.origin, &next_origin) {
                return Err(ask.redirect(format!(
                    "to plain HTTP at {}; set plain_http for that host if this is right",
                    next_origin.authority()
                )));
            }
            (origin, url) = (next_origin, next_url);
        }
        Err(ask.redirect(format!("more than {REDIRECTS_MAX} times")))
    }

    /// The agent with the CA that is configured for wherever a redirect leads.
    fn agent_for(&self, origin: &Origin) -> &Agent {
        self.registries
            .values()
            .find(|endpoint| endpoint.origin == *origin)
            .map_or(&self.agent, |found| &found.agent)
    }

    /// A registry that is reached in the clear may send us elsewhere on its machine; others only to hosts that
    /// are configured so.
    fn plain_is_allowed(&self, registry: &Origin, target: &Origin) -> bool {
        (!registry.is_https() && registry.hostname() == target.hostname())
            || self
                .registries
                .values()
                .any(|endpoint| endpoint.origin == *target)
    }

    /// Meets a challenge: the value for `Authorization`, or `None` if there is nothing that could be sent.
    fn authorize(
        &self,
        ask: &Ask<'_>,
        endpoint: &Endpoint,
        headers: &HeaderMap,
    ) -> Result<Option<String>, FetchError> {
        let challenges: Vec<Challenge> = headers
            .get_all(header::WWW_AUTHENTICATE)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .flat_map(auth::parse_challenges)
            .collect();
        for challenge in &challenges {
            if let Challenge::Bearer { realm, service } = challenge {
                return self
                    .token(ask, endpoint, realm, service.as_deref())
                    .map(Some);
            }
        }
        let basic = challenges
            .contains(&Challenge::Basic)
            .then_some(endpoint.credentials.as_ref())
            .flatten();
        Ok(basic.map(|credentials| auth::basic(&credentials.username, &credentials.password)))
    }

    fn token(
        &self,
        ask: &Ask<'_>,
        endpoint: &Endpoint,
        realm: &str,
        service: Option<&str>,
    ) -> Result<String, FetchError> {
        let Some(origin) = Origin::parse(realm) else {
            return Err(ask.token(realm, "which is not a URL".to_owned(), false));
        };
        if !origin.is_https() && !self.plain_is_allowed(&endpoint.origin, &origin) {
            return Err(ask.token(
                realm,
                "which is plain HTTP: that is refused".to_owned(),
                false,
            ));
        }
        let basic = match &endpoint.credentials {
            Some(_)
                if !auth::may_have_credentials(
                    &endpoint.origin,
                    &origin,
                    &endpoint.token_hosts,
                ) =>
            {
                let problem = format!(
                    "which is another host: the credentials are not sent there; if that is right, add \"{}\" to \
                     token_hosts of this registry",
                    origin.hostname()
                );
                return Err(ask.token(realm, problem, false));
            }
            Some(credentials) => Some(auth::basic(&credentials.username, &credentials.password)),
            None => None,
        };
        let same_machine = origin.hostname() == endpoint.origin.hostname();
        let agent = if same_machine {
            &endpoint.agent
        } else {
            self.agent_for(&origin)
        };
        let url = auth::token_url(realm, service, ask.repository);
        let response = ask.call(agent, &url, "application/json", basic.as_deref())?;
        let status = response.status().as_u16();
        match status {
            200 => {}
            401 | 403 => return Err(ask.denied(status)),
            _ => {
                let transient = status >= 500 || status == 429;
                return Err(ask.token(realm, format!("which answers HTTP {status}"), transient));
            }
        }
        let mut body = Vec::new();
        let mut reader = response.into_body().into_reader().take(TOKEN_BYTES_MAX + 1);
        reader
            .read_to_end(&mut body)
            .map_err(|error| ask.body(error))?;
        if body.len() as u64 > TOKEN_BYTES_MAX {
            return Err(ask.token(
                realm,
                format!("which answers more than {TOKEN_BYTES_MAX} bytes"),
                true,
            ));
        }
        let token = auth::parse_token(&body)
            .ok_or_else(|| ask.token(realm, "which answers without a token".to_owned(), true))?;
        Ok(format!("Bearer {token}"))
    }

    fn read_document(
        &self,
        ask: &Ask<'_>,
        response: Response<Body>,
    ) -> Result<Vec<u8>, FetchError> {
        if content_length(response.headers()).is_some_and(|length| length > MANIFEST_BYTES_MAX) {
            return Err(ask.too_large(MANIFEST_BYTES_MAX));
        }
        let mut bytes = Vec::new();
        let mut reader = response
            .into_body()
            .into_reader()
            .take(MANIFEST_BYTES_MAX + 1);
        reader
            .read_to_end(&mut bytes)
            .map_err(|error| ask.body(error))?;
        if bytes.len() as u64 > MANIFEST_BYTES_MAX {
            Err(ask.too_large(MANIFEST_BYTES_MAX))
        } else {
            Ok(bytes)
        }
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client")
            .field("registries", &self.registries.keys())
            .finish_non_exhaustive()
    }
}
