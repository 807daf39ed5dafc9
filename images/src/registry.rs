//! The client of a registry: the pull side of the OCI distribution specification over HTTP.
//!
//! skeleton

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Write};
use std::path::PathBuf;
use std::time::Duration;

use crate::manifest::Descriptor;
use crate::{Digest, Fault, Reference};

/// How to reach registries. `Default` is: everything over HTTPS, anonymously.
#[derive(Debug, Clone, Default)]
pub struct ClientConfig {
    /// What is special about a registry, by the host as image references write it
    /// (`docker.io`, `registry.lan:5000`, `hub.internal`). A host that is not listed is reached anonymously by HTTPS.
    pub registries: BTreeMap<String, RegistryConfig>,
    /// How long anything may take.
    pub timeouts: Timeouts,
    /// The largest blob that is fetched, in bytes; `None` is 8 GiB.
    pub blob_bytes_max: Option<u64>,
}

/// What is special about one registry.
#[derive(Debug, Clone, Default)]
pub struct RegistryConfig {
    /// Where the registry really is, `http://HOST:PORT` or `https://HOST:PORT`; what maps `hub.internal`.
    /// A `http://` here allows plain HTTP to that address.
    pub url: Option<String>,
    /// Speak HTTP instead of HTTPS.
    pub plain_http: bool,
    /// User name and password; sent to this registry and its token server only.
    pub credentials: Option<Credentials>,
    /// PEM file with the certificates to trust for this registry, instead of the built-in (Mozilla) ones.
    pub ca_file: Option<PathBuf>,
    /// Hosts of token servers that may be given the credentials, besides the registry's own host name.
    pub token_hosts: Vec<String>,
}

/// A user name and a password. `Debug` hides the password.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    username: String,
    password: String,
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
    /// The slowest pace at which a blob may come in, in bytes a second, after [`exchange`](Self::exchange) has
    /// passed; a blob has `exchange + size / pace`. Default 4 KiB/s.
    pub pace_bytes: u64,
}

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

/// Why a registry was not asked at all.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// skeleton
    #[error("registry \"{host}\": url \"{url}\" is not http://HOST[:PORT] or https://HOST[:PORT]")]
    Url {
        /// As configured.
        host: String,
        /// As configured.
        url: String,
    },
}

/// Why something was not fetched. Every message names the registry and the repository.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// skeleton
    #[error("skeleton")]
    Sink(#[source] io::Error),
}

/// A client of registries. Blocking; `Sync`, so threads may share it; keeps connections and tokens.
#[derive(Debug)]
pub struct Client {
    config: ClientConfig,
}

impl Client {
    /// Checks the configuration and loads the CA files. Connects to nothing.
    ///
    /// # Errors
    /// [`ConfigError`] for a bad host, URL or CA file.
    pub fn new(config: ClientConfig) -> Result<Self, ConfigError> {
        Ok(Self { config })
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
        todo!("{reference} {:?}", self.config)
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
        todo!("{reference} {blob:?} {} {}", sink.flush().is_ok(), {
            progress(1);
            1
        })
    }
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
            .field("password", &"…")
            .finish()
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

impl FetchError {
    /// Which class it falls into.
    #[must_use]
    pub const fn fault(&self) -> Fault {
        Fault::Internal
    }

    /// Whether trying again later, with nothing changed, may help.
    #[must_use]
    pub const fn is_transient(&self) -> bool {
        false
    }
}
