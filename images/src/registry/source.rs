//! Where the images of a registry are fetched from: its mirrors, in order, then itself, then mirrors that did not answer a
//! short while ago.

use std::io;
use std::time::{Duration, Instant};

use ureq::Agent;
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig};

use super::config::{ClientConfig, ConfigError, Credentials, RegistryConfig, Timeouts};
use super::url::Origin;
use super::{Client, FetchError};
use crate::reference::{DEFAULT_HOST, Reference};

/// How long a mirror that did not answer is asked last: longer than the images of a release are asked for.
const REST: Duration = Duration::from_mins(2);
/// A registry that wants to be left alone for longer is left to whoever asked.
const RETRY_AFTER_MAX: Duration = Duration::from_mins(5);

/// What those said that did not serve something.
#[derive(Debug, Default)]
pub(super) struct Refused {
    /// What the registry itself says, or a mirror before it was asked.
    error: Option<FetchError>,
    /// Some of it may pass soon; after how long those want to be asked again.
    hope: Option<Duration>,
}

impl Refused {
    pub(super) fn add(&mut self, source: &Endpoint, error: FetchError) {
        let hope = hope(&error);
        self.hope = self.hope.max(hope);
        if !source.is_mirror() || self.error.is_none() {
            self.error = Some(error);
        }
    }

    /// When any of it may pass soon, after how long.
    pub(super) const fn hope(&self) -> Option<Duration> {
        self.hope
    }

    pub(super) fn into_error(self) -> FetchError {
        self.error
            .expect("the registry itself is among the sources")
    }
}

impl From<FetchError> for Refused {
    fn from(error: FetchError) -> Self {
        Self {
            hope: hope(&error),
            error: Some(error),
        }
    }
}

fn hope(error: &FetchError) -> Option<Duration> {
    let asked = match error {
        FetchError::Status { retry_after, .. } => retry_after.unwrap_or_default(),
        _ => Duration::ZERO,
    };
    (error.may_pass_soon() && asked <= RETRY_AFTER_MAX).then_some(asked)
}

/// One place, ready to be asked.
#[derive(Clone)]
pub(super) struct Endpoint {
    /// The registry as references name it, for errors; `None` for a mirror, which is named by where it is.
    host: Option<String>,
    pub(super) origin: Origin,
    /// What stands before the repository in paths: empty, or `a/b/`.
    pub(super) prefix: String,
    /// `SCHEME://HOST/PREFIX`.
    shown: String,
    pub(super) agent: Agent,
    /// The gate is not asked.
    pub(super) ungated: bool,
    pub(super) credentials: Option<Credentials>,
    pub(super) token_hosts: Vec<String>,
}

impl Endpoint {
    /// What errors call it.
    pub(super) fn name(&self) -> &str {
        self.host.as_deref().unwrap_or(&self.shown)
    }

    const fn is_mirror(&self) -> bool {
        self.host.is_none()
    }
}

/// Makes connections' settings out of a configuration.
pub(super) struct Agents<'c> {
    timeouts: Timeouts,
    config: &'c ClientConfig,
    proxy: Option<ureq::Proxy>,
}

impl<'c> Agents<'c> {
    pub(super) fn new(timeouts: Timeouts, config: &'c ClientConfig) -> Result<Self, ConfigError> {
        let proxy = match &config.proxy {
            // HTTPS_PROXY and its like.
            None => ureq::Proxy::try_from_env(),
            Some(url) => Some(proxy(url, &config.no_proxy)?),
        };
        Ok(Self {
            timeouts,
            config,
            proxy,
        })
    }

    /// For what is not configured: Mozilla's certificates, the proxy.
    pub(super) fn outside(&self) -> Agent {
        self.agent(None, true)
    }

    /// The mirrors of a registry, and it itself.
    pub(super) fn sources(
        &self,
        host: &str,
        registry: &RegistryConfig,
    ) -> Result<Vec<Endpoint>, ConfigError> {
        let mirrors = registry
            .mirrors
            .iter()
            .map(|url| self.mirror(host, registry, url));
        mirrors
            .chain([self.itself(host, registry)])
            .collect::<Result<_, _>>()
    }

    fn itself(&self, host: &str, registry: &RegistryConfig) -> Result<Endpoint, ConfigError> {
        let url = registry
            .url
            .clone()
            .unwrap_or_else(|| default_url(host, registry.plain_http));
        let mut endpoint = self.endpoint(host, registry, &url)?;
        if !endpoint.prefix.is_empty() {
            return Err(bad_url(host, &url));
        }
        if host == DEFAULT_HOST {
            endpoint.token_hosts.push("auth.docker.io".to_owned());
        }
        endpoint.host = Some(host.to_owned());
        Ok(endpoint)
    }

    /// A mirror is reached as the registry of its own name is configured, with its certificates and credentials; those
    /// of the registry that it mirrors are none of its business.
    fn mirror(
        &self,
        host: &str,
        mirrored: &RegistryConfig,
        url: &str,
    ) -> Result<Endpoint, ConfigError> {
        let origin = Origin::parse(url).ok_or_else(|| bad_url(host, url))?;
        let own = self.config.registries.iter().find(|(name, registry)| {
            let at = registry
                .url
                .clone()
                .unwrap_or_else(|| default_url(name, registry.plain_http));
            Origin::parse(&at).is_some_and(|at| at == origin)
        });
        let without_own = RegistryConfig {
            ca_file: mirrored.ca_file.clone(),
            ..RegistryConfig::default()
        };
        self.endpoint(host, own.map_or(&without_own, |(_, own)| own), url)
    }

    fn endpoint(
        &self,
        host: &str,
        registry: &RegistryConfig,
        url: &str,
    ) -> Result<Endpoint, ConfigError> {
        let origin = Origin::parse(url).ok_or_else(|| bad_url(host, url))?;
        let path = url.splitn(4, '/').nth(3).unwrap_or_default();
        let path = path.trim_matches('/');
        if path.contains(['?', '#', '%']) || path.split('/').any(|part| matches!(part, "." | ".."))
        {
            return Err(bad_url(host, url));
        }
        let roots = registry
            .ca_file
            .as_ref()
            .map(|path| load_ca(host, path))
            .transpose()?;
        // A proxy is for what is outside; whoever configures plain HTTP means a machine nearby.
        let agent = self.agent(roots, origin.is_https());
        Ok(Endpoint {
            host: None,
            shown: format!("{}/{path}", origin.base())
                .trim_end_matches('/')
                .to_owned(),
            prefix: if path.is_empty() {
                String::new()
            } else {
                format!("{path}/")
            },
            origin,
            agent,
            ungated: registry.ungated,
            credentials: registry.credentials.clone(),
            token_hosts: registry.token_hosts.clone(),
        })
    }

    fn agent(&self, roots: Option<RootCerts>, proxied: bool) -> Agent {
        let timeouts = &self.timeouts;
        let config = Agent::config_builder()
            .user_agent(concat!("foreshore/", env!("CARGO_PKG_VERSION")))
            .max_redirects(0)
            .max_redirects_will_error(false)
            .http_status_as_error(false)
            .timeout_resolve(Some(timeouts.connect))
            .timeout_connect(Some(timeouts.connect))
            .timeout_send_request(Some(timeouts.stall))
            .timeout_recv_response(Some(timeouts.stall))
            .timeout_per_read(Some(timeouts.stall))
            .timeout_per_write(Some(timeouts.stall))
            .tls_config(
                TlsConfig::builder()
                    .root_certs(roots.unwrap_or(RootCerts::WebPki))
                    .build(),
            )
            .proxy(self.proxy.clone().filter(|_| proxied));
        config.build().new_agent()
    }
}

impl Client {
    /// Where to ask for an image, in order.
    pub(super) fn sources(&self, reference: &Reference) -> Result<Vec<Endpoint>, FetchError> {
        let host = reference.host();
        let unlisted = |origin: Origin| Endpoint {
            host: Some(host.to_owned()),
            shown: origin.base(),
            prefix: String::new(),
            origin,
            agent: self.agent.clone(),
            ungated: false,
            credentials: None,
            token_hosts: Vec::new(),
        };
        let Some(sources) = self.registries.get(host) else {
            return Origin::parse(&default_url(host, false))
                .map(|origin| vec![unlisted(origin)])
                .ok_or_else(|| FetchError::Unreachable {
                    host: host.to_owned(),
                    what: reference.to_string(),
                    source: "the host cannot be part of a URL".into(),
                });
        };
        let now = Instant::now();
        let resting = self.lock_resting();
        let rests = |source: &Endpoint| {
            source.is_mirror() && resting.get(&source.shown).is_some_and(|until| *until > now)
        };
        let (last, first): (Vec<_>, Vec<_>) = sources.iter().cloned().partition(rests);
        Ok(first.into_iter().chain(last).collect())
    }

    /// Asks one after the other until one has it.
    ///
    /// # Errors
    /// What they said; what the registry itself says counts.
    pub(super) fn ask_any<T>(
        &self,
        reference: &Reference,
        mut ask: impl FnMut(&Endpoint) -> Result<T, FetchError>,
    ) -> Result<T, Refused> {
        let mut refused = Refused::default();
        for source in &self.sources(reference)? {
            match ask(source) {
                Ok(answer) => return Ok(answer),
                Err(error) if error.is_ours() => return Err(error.into()),
                Err(error) => {
                    self.passed_over(source, &error, false);
                    refused.add(source, error);
                }
            }
        }
        Err(refused)
    }

    /// If that was a mirror: says so, and lets it rest if it would only cost time again; not one that `brought` something.
    pub(super) fn passed_over(&self, source: &Endpoint, error: &FetchError, brought: bool) {
        if !source.is_mirror() {
            return;
        }
        tracing::info!(mirror = source.shown, %error, "a mirror does not serve this");
        let silent = matches!(
            error,
            FetchError::Unreachable { .. } | FetchError::TimedOut { .. }
        );
        if silent && !brought {
            self.lock_resting()
                .insert(source.shown.clone(), Instant::now() + REST);
        }
    }

    fn lock_resting(
        &self,
    ) -> std::sync::MutexGuard<'_, std::collections::BTreeMap<String, Instant>> {
        // A map of names and times is whole after any panic.
        self.resting
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// Where the registry that references call `host` is.
pub(super) fn default_url(host: &str, plain_http: bool) -> String {
    match (host, plain_http) {
        (DEFAULT_HOST, _) => "https://registry-1.docker.io".to_owned(),
        (host, true) => format!("http://{host}"),
        (host, false) => format!("https://{host}"),
    }
}

fn bad_url(host: &str, url: &str) -> ConfigError {
    ConfigError::Url {
        host: host.to_owned(),
        url: url.to_owned(),
    }
}

fn proxy(url: &str, no_proxy: &[String]) -> Result<ureq::Proxy, ConfigError> {
    let bad = || ConfigError::Proxy {
        // Without the credentials that may stand in it.
        url: url.rsplit('@').next().unwrap_or_default().to_owned(),
    };
    let plain = ureq::Proxy::new(url).map_err(|_| bad())?;
    if plain.protocol() != ureq::ProxyProtocol::Http {
        return Err(bad());
    }
    let mut builder = ureq::Proxy::builder(plain.protocol())
        .host(plain.host())
        .port(plain.port());
    if let Some(username) = plain.username() {
        builder = builder.username(username);
    }
    if let Some(password) = plain.password() {
        builder = builder.password(password);
    }
    for host in no_proxy {
        builder = builder.no_proxy(host);
    }
    builder.build().map_err(|_| bad())
}

fn load_ca(host: &str, path: &std::path::Path) -> Result<RootCerts, ConfigError> {
    let failed = |source: io::Error| ConfigError::CaFile {
        host: host.to_owned(),
        path: path.to_owned(),
        source,
    };
    let pem = std::fs::read(path).map_err(failed)?;
    let certificates: Vec<Certificate<'static>> = ureq::tls::parse_pem(&pem)
        .filter_map(|item| match item {
            Ok(PemItem::Certificate(certificate)) => Some(certificate),
            _ => None,
        })
        .collect();
    if certificates.is_empty() {
        return Err(ConfigError::CaContent {
            host: host.to_owned(),
            path: path.to_owned(),
        });
    }
    Ok(RootCerts::new_with_certs(&certificates))
}
