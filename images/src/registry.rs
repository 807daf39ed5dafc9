//! The client of a registry: the pull side of the OCI distribution specification over HTTP.
//!
//! Every exchange is bounded: a connection must stand within [`Timeouts::connect`], something must come within
//! [`Timeouts::stall`], the whole must be done within a time that follows from its size; documents have a cap,
//! blobs their declared size. Redirects are followed here rather than in the HTTP library, since `Authorization`
//! must reach nobody but the registry's own origin. Nothing is believed until its digest is right.

mod ask;
mod auth;
mod config;
mod docker;
mod entry;
mod error;
#[doc(hidden)]
pub mod fuzz;
mod referrers;
mod source;
mod transfer;
mod url;

use std::collections::BTreeMap;
use std::fmt;
use std::io::Read;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use ureq::http::{HeaderMap, Response, header};
use ureq::{Agent, Body};

use self::ask::{Ask, Question, content_length, header_text, is_vague, is_web_page, media_type};
use self::auth::{Challenge, TOKEN_BYTES_MAX};
use self::config::Proof;
pub use self::config::{ClientConfig, ConfigError, Credentials, RegistryConfig, Timeouts};
pub use self::docker::{DockerConfig, DockerConfigError, LoginProblem, LoginsError};
pub use self::entry::RegistryEntry;
pub use self::error::FetchError;
pub(crate) use self::error::is_disk_full;
pub use self::referrers::Referrer;
use self::source::{Agents, Endpoint};
use self::transfer::Pace;
pub use self::transfer::{Gate, Retry, Watch};
use self::url::Origin;
use crate::manifest::{ACCEPT, Document, MANIFEST_BYTES_MAX};
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
    /// Where what references call so is fetched from: mirrors, in order, and then the registry itself.
    registries: BTreeMap<String, Vec<Endpoint>>,
    timeouts: Timeouts,
    blob_bytes_max: u64,
    retry: Retry,
    pace: Option<Pace>,
    gate: Option<Gate>,
    /// `Authorization` by origin and repository. Only in memory; `Debug` does not show it.
    authorizations: Mutex<BTreeMap<(String, String), String>>,
    /// Mirrors that did not answer, and until when they are asked last.
    resting: Mutex<BTreeMap<String, Instant>>,
}

impl Client {
    /// Checks the configuration and loads the CA files. Connects to nothing.
    ///
    /// # Errors
    /// [`ConfigError`] for a bad host, URL or CA file.
    pub fn new(config: ClientConfig) -> Result<Self, ConfigError> {
        let timeouts = config.timeouts;
        let agents = Agents::new(timeouts, &config)?;
        let registries = config
            .registries
            .iter()
            .map(|(host, registry)| Ok((host.clone(), agents.sources(host, registry)?)))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            agent: agents.outside(),
            registries,
            timeouts,
            blob_bytes_max: config.blob_bytes_max.unwrap_or(BLOB_BYTES_MAX),
            retry: config.retry,
            pace: config.rate_bytes.map(Pace::new),
            gate: config.gate,
            authorizations: Mutex::new(BTreeMap::new()),
            resting: Mutex::new(BTreeMap::new()),
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

    /// Fetches the index or manifest that `reference` names, by its digest if it has one. At most 4 MiB. Asks the
    /// mirrors first and tries again as [`ClientConfig::retry`] says.
    ///
    /// # Errors
    /// [`FetchError`].
    pub fn manifest(&self, reference: &Reference) -> Result<RawManifest, FetchError> {
        self.retrying(|| self.ask_any(reference, |endpoint| self.manifest_at(endpoint, reference)))
    }

    fn manifest_at(
        &self,
        endpoint: &Endpoint,
        reference: &Reference,
    ) -> Result<RawManifest, FetchError> {
        let name = match (reference.digest(), reference.tag()) {
            (Some(digest), _) => digest.to_string(),
            (None, tag) => tag.unwrap_or("latest").to_owned(),
        };
        let what = match reference.digest() {
            Some(digest) => format!("manifest {}@{digest}", reference.repository()),
            None => format!("manifest {}:{name}", reference.repository()),
        };
        let ask = self.ask(endpoint, reference, &what, 0);
        let response = self.get(&ask, endpoint, &format!("manifests/{name}"), ACCEPT, 0)?;
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

    /// What `endpoint` is asked for `reference`, with the time that so many bytes may take.
    fn ask<'a>(
        &self,
        endpoint: &'a Endpoint,
        reference: &'a Reference,
        what: &'a str,
        bytes: u64,
    ) -> Ask<'a> {
        // What declares more than is fetched at all gets no more time for it either.
        let seconds = bytes.min(self.blob_bytes_max) / self.timeouts.pace_bytes.max(1);
        let time = self
            .timeouts
            .exchange
            .saturating_add(Duration::from_secs(seconds));
        Ask {
            host: endpoint.name(),
            repository: reference.repository(),
            what,
            until: Instant::now() + time,
        }
    }

    /// The answer to a GET of what stands at `path` of the repository, from byte `offset` on: 200, or 206 to an offset.
    /// Asks for a token or sends credentials when told to.
    fn get(
        &self,
        ask: &Ask<'_>,
        endpoint: &Endpoint,
        path: &str,
        accept: &str,
        offset: u64,
    ) -> Result<Response<Body>, FetchError> {
        let question = Question {
            path: &format!(
                "/v2/{}{}/{path}",
                endpoint.prefix,
                ask.repository.trim_start_matches('/')
            ),
            accept,
            offset,
        };
        let key = (endpoint.origin.base(), ask.repository.to_owned());
        let known = self.lock_authorizations().get(&key).cloned();
        let response = self.follow(ask, endpoint, &question, known.as_deref())?;
        if response.status().as_u16() != 401 {
            return ask.checked(response);
        }
        let Some(authorization) = self.authorize(ask, endpoint, response.headers())? else {
            return ask.checked(response);
        };
        drop(response);
        self.lock_authorizations()
            .insert(key.clone(), authorization.clone());
        let response = self.follow(ask, endpoint, &question, Some(&authorization))?;
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

    /// GETs it, following redirects; `Authorization` goes to the registry's own origin only.
    fn follow(
        &self,
        ask: &Ask<'_>,
        endpoint: &Endpoint,
        question: &Question<'_>,
        authorization: Option<&str>,
    ) -> Result<Response<Body>, FetchError> {
        let mut origin = endpoint.origin.clone();
        let mut url = format!("{}{}", origin.base(), question.path);
        for _ in 0..=REDIRECTS_MAX {
            let at_home = origin == endpoint.origin;
            let agent = if at_home {
                &endpoint.agent
            } else {
                self.agent_for(&origin)
            };
            let response = ask.call(agent, &url, question, authorization.filter(|_| at_home))?;
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
            .flatten()
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
                .flatten()
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
                if let Some(Credentials(Proof::AccessToken(token))) = &endpoint.credentials {
                    return Ok(Some(format!("Bearer {token}")));
                }
                return self
                    .token(ask, endpoint, realm, service.as_deref())
                    .map(Some);
            }
        }
        if !challenges.contains(&Challenge::Basic) {
            return Ok(None);
        }
        Ok(match &endpoint.credentials {
            Some(Credentials(Proof::Password { username, password })) => {
                Some(auth::basic(username, password))
            }
            // A token is no password.
            Some(Credentials(Proof::RefreshToken(_) | Proof::AccessToken(_))) | None => None,
        })
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
        let proof = endpoint.credentials.as_ref().map(|it| &it.0);
        let trusted = auth::may_have_credentials(&endpoint.origin, &origin, &endpoint.token_hosts);
        if proof.is_some() && !trusted {
            let problem = format!(
                "which is another host: the credentials are not sent there; if that is right, add \"{}\" to \
                 token_hosts of this registry",
                origin.hostname()
            );
            return Err(ask.token(realm, problem, false));
        }
        let same_machine = origin.hostname() == endpoint.origin.hostname();
        let agent = if same_machine {
            &endpoint.agent
        } else {
            self.agent_for(&origin)
        };
        let response = if let Some(Proof::RefreshToken(token)) = proof {
            let form = auth::token_form(token, service, ask.repository);
            ask.send(agent, realm, form)?
        } else {
            let basic = match proof {
                Some(Proof::Password { username, password }) => {
                    Some(auth::basic(username, password))
                }
                Some(Proof::RefreshToken(_) | Proof::AccessToken(_)) | None => None,
            };
            let url = auth::token_url(realm, service, ask.repository);
            let question = Question {
                path: "",
                accept: "application/json",
                offset: 0,
            };
            ask.call(agent, &url, &question, basic.as_deref())?
        };
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
