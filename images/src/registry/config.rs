//! How registries are reached: hosts, credentials, certificates and times.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ureq::Agent;
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig};

use super::url::Origin;
use crate::reference::DEFAULT_HOST;

/// How to reach registries. `Default` is: everything over HTTPS, anonymously.
#[derive(Debug, Clone, Default)]
pub struct ClientConfig {
    /// What is special about a registry, by the host as image references write it (`docker.io`,
    /// `registry.lan:5000`, `hub.internal`). A host that is not listed is reached anonymously by HTTPS.
    pub registries: BTreeMap<String, RegistryConfig>,
    /// How long anything may take.
    pub timeouts: Timeouts,
    /// The largest blob that is fetched, in bytes; `None` is 8 GiB.
    pub blob_bytes_max: Option<u64>,
}

/// What is special about one registry.
#[derive(Debug, Clone, Default)]
pub struct RegistryConfig {
    /// Where the registry really is, `http://HOST[:PORT]` or `https://HOST[:PORT]`; what maps `hub.internal`.
    /// A `http://` here allows plain HTTP to that address.
    pub url: Option<String>,
    /// Speak HTTP instead of HTTPS.
    pub plain_http: bool,
    /// User name and password; sent to this registry and its token server only.
    pub credentials: Option<Credentials>,
    /// PEM file with the certificates to trust for this registry, instead of the built-in (Mozilla) ones.
    pub ca_file: Option<PathBuf>,
    /// Hosts (`HOST` or `HOST:PORT`) of token servers that may be given the credentials, besides the registry's
    /// own host name, its parent and its child domains.
    pub token_hosts: Vec<String>,
}

/// A user name and a password. `Debug` hides the password.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    pub(super) username: String,
    pub(super) password: String,
}

/// How long anything may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    /// Name resolution, TCP and TLS. Default 15 s.
    pub connect: Duration,
    /// Until the response's header is there, and between two pieces of a body. Default 30 s.
    pub stall: Duration,
    /// One manifest or token exchange as a whole. Default 60 s.
    pub exchange: Duration,
    /// The slowest pace at which a blob may come in, in bytes a second: a blob has `exchange + size / pace`.
    /// Default 4 KiB/s.
    pub pace_bytes: u64,
}

/// Why a client cannot be made from a [`ClientConfig`].
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The URL, or the host as a URL, is none.
    #[error("registry \"{host}\": \"{url}\" is not http://HOST[:PORT] or https://HOST[:PORT]")]
    Url {
        /// As configured.
        host: String,
        /// As configured, or made from the host.
        url: String,
    },
    /// The CA file cannot be read.
    #[error("registry \"{host}\": cannot read the CA file {}", path.display())]
    CaFile {
        /// As configured.
        host: String,
        /// As configured.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The CA file holds no certificate.
    #[error("registry \"{host}\": the CA file {} holds no PEM certificate", path.display())]
    CaContent {
        /// As configured.
        host: String,
        /// As configured.
        path: PathBuf,
    },
}

/// One registry, ready to be asked.
#[derive(Clone)]
pub(super) struct Endpoint {
    pub(super) origin: Origin,
    pub(super) agent: Agent,
    pub(super) credentials: Option<Credentials>,
    pub(super) token_hosts: Vec<String>,
}

impl Credentials {
    /// Credentials for HTTP basic authentication or a token server.
    #[must_use]
    pub fn new(username: impl Into<String>, password: impl Into<String>) -> Self {
        Self {
            username: username.into(),
            password: password.into(),
        }
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials")
            .field("username", &self.username)
            .finish_non_exhaustive()
    }
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(15),
            stall: Duration::from_secs(30),
            exchange: Duration::from_mins(1),
            pace_bytes: 4 << 10,
        }
    }
}

impl Endpoint {
    pub(super) fn new(
        host: &str,
        config: RegistryConfig,
        timeouts: &Timeouts,
    ) -> Result<Self, ConfigError> {
        let url = config
            .url
            .unwrap_or_else(|| default_url(host, config.plain_http));
        let bad_url = || ConfigError::Url {
            host: host.to_owned(),
            url: url.clone(),
        };
        let origin = Origin::parse(&url).ok_or_else(bad_url)?;
        let after_host = url.splitn(4, '/').nth(3).unwrap_or_default();
        if !after_host.is_empty() {
            return Err(bad_url());
        }
        let roots = config
            .ca_file
            .map(|path| load_ca(host, &path))
            .transpose()?;
        let mut token_hosts = config.token_hosts;
        if host == DEFAULT_HOST {
            token_hosts.push("auth.docker.io".to_owned());
        }
        // A proxy is for what is outside; whoever configures plain HTTP means a machine nearby.
        let agent = agent(timeouts, roots, origin.is_https());
        Ok(Self {
            origin,
            agent,
            credentials: config.credentials,
            token_hosts,
        })
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

pub(super) fn agent(timeouts: &Timeouts, roots: Option<RootCerts>, proxied: bool) -> Agent {
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
        );
    let config = if proxied { config } else { config.proxy(None) };
    config.build().new_agent()
}

fn load_ca(host: &str, path: &Path) -> Result<RootCerts, ConfigError> {
    let pem = fs::read(path).map_err(|source| ConfigError::CaFile {
        host: host.to_owned(),
        path: path.to_owned(),
        source,
    })?;
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::Client;

    fn with(host: &str, registry: RegistryConfig) -> Result<Client, ConfigError> {
        Client::new(ClientConfig {
            registries: [(host.to_owned(), registry)].into(),
            ..ClientConfig::default()
        })
    }

    #[test]
    fn bad_configurations_are_told_apart() {
        for url in [
            "registry.lan",
            "ftp://x",
            "http://",
            "http://u:p@h",
            "http://h/path",
            "http://h/?q",
        ] {
            let registry = RegistryConfig {
                url: Some(url.to_owned()),
                ..RegistryConfig::default()
            };
            assert!(
                matches!(with("x", registry), Err(ConfigError::Url { .. })),
                "{url}"
            );
        }
        let missing = RegistryConfig {
            ca_file: Some("/nonexistent/ca.pem".into()),
            ..RegistryConfig::default()
        };
        assert!(matches!(
            with("x", missing),
            Err(ConfigError::CaFile { .. })
        ));
        let file = tempfile::NamedTempFile::new().unwrap();
        let empty = RegistryConfig {
            ca_file: Some(file.path().to_owned()),
            ..RegistryConfig::default()
        };
        assert!(matches!(
            with("x", empty),
            Err(ConfigError::CaContent { .. })
        ));
        let good = RegistryConfig {
            url: Some("http://127.0.0.1:8480/".to_owned()),
            ..RegistryConfig::default()
        };
        assert!(with("hub.internal", good).is_ok());
    }

    #[test]
    fn debug_shows_no_password() {
        let credentials = Credentials::new("user", "secret-password");
        let registry = RegistryConfig {
            credentials: Some(credentials),
            ..RegistryConfig::default()
        };
        let config = ClientConfig {
            registries: [("h".to_owned(), registry)].into(),
            ..ClientConfig::default()
        };
        assert!(!format!("{config:?}").contains("secret"));
        assert!(!format!("{:?}", Client::new(config).unwrap()).contains("secret"));
    }
}
