//! How registries are reached: hosts, credentials, certificates and times.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use super::{Gate, Retry};

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
    /// What is tried again. Default: nothing.
    pub retry: Retry,
    /// The most bytes a second that blobs take in, all together; `None` is without limit.
    pub rate_bytes: Option<u64>,
    /// Asked before and while blobs are fetched; `None` is always open.
    pub gate: Option<Gate>,
    /// An HTTP proxy for whatever is reached by HTTPS, `http://[USER:PASSWORD@]HOST[:PORT]`; `None` is what the environment
    /// says (`HTTPS_PROXY`, `ALL_PROXY`, `NO_PROXY`).
    pub proxy: Option<String>,
    /// Hosts (`h.example.com`, `.example.com`) that are reached without [`proxy`](Self::proxy).
    pub no_proxy: Vec<String>,
}

/// What is special about one registry.
#[derive(Debug, Clone, Default)]
pub struct RegistryConfig {
    /// Where the registry really is, `http://HOST[:PORT]` or `https://HOST[:PORT]`; what maps `hub.internal`.
    /// A `http://` here allows plain HTTP to that address.
    pub url: Option<String>,
    /// Speak HTTP instead of HTTPS.
    pub plain_http: bool,
    /// Sent to this registry and its token server only.
    pub credentials: Option<Credentials>,
    /// PEM file with the certificates to trust for this registry, instead of the built-in (Mozilla) ones.
    pub ca_file: Option<PathBuf>,
    /// Where its images are asked for first, in order: `http[s]://HOST[:PORT][/PATH]`, asked at `/v2/PATH/REPOSITORY/…`.
    /// A mirror has the credentials and certificates of the registry that is configured at its own address, or else
    /// this one's certificates and no credentials.
    pub mirrors: Vec<String>,
    /// Fetch from it although [`ClientConfig::gate`] is closed.
    pub ungated: bool,
    /// Hosts (`HOST` or `HOST:PORT`) of token servers that may be given the credentials, besides the registry's
    /// own host name, its parent and its child domains.
    pub token_hosts: Vec<String>,
}

/// What a registry or its token server is shown. `Debug` hides all of it but a user name.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials(pub(super) Proof);

/// How somebody shows who they are.
#[derive(Clone, PartialEq, Eq)]
pub(super) enum Proof {
    Password {
        username: String,
        password: String,
    },
    /// Stands for a password at the token server (distribution project, "Oauth2 Token Authentication").
    RefreshToken(String),
    /// Is what the token server would give.
    AccessToken(String),
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
    /// The proxy is none that can be used.
    #[error("proxy \"{url}\" is not http://[USER:PASSWORD@]HOST[:PORT]")]
    Proxy {
        /// As configured, without user name and password.
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

impl Credentials {
    /// Credentials for HTTP basic authentication or a token server.
    #[must_use]
    pub fn new(username: impl Into<String>, password: impl Into<String>) -> Self {
        Self(Proof::Password {
            username: username.into(),
            password: password.into(),
        })
    }

    /// An identity token, which stands for a password at the token server.
    #[must_use]
    pub fn refresh_token(token: impl Into<String>) -> Self {
        Self(Proof::RefreshToken(token.into()))
    }

    /// A bearer token for the registry itself; it is not renewed when it has run out.
    #[must_use]
    pub fn access_token(token: impl Into<String>) -> Self {
        Self(Proof::AccessToken(token.into()))
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("Credentials");
        match &self.0 {
            Proof::Password { username, .. } => shown.field("username", username),
            Proof::RefreshToken(_) => shown.field("kind", &"refresh token"),
            Proof::AccessToken(_) => shown.field("kind", &"access token"),
        };
        shown.finish_non_exhaustive()
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
            "http://h/a/../b",
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
        for credentials in [
            Credentials::new("user", "secret-password"),
            Credentials::refresh_token("secret-token"),
            Credentials::access_token("secret-token"),
        ] {
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
}
