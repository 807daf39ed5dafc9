//! `hub.toml`: what a hub is configured with. Strict: an unknown key is an error with its line.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use foreshore_images::Reference;
use foreshore_images::registry::{ClientConfig, RegistryEntry};
use serde::Deserialize;

use crate::analysis::Hosts;
use crate::images::HUB_HOST;
use crate::images::through::Upstreams;
use crate::registry;

/// The largest configuration file that is read: 256 KiB.
const MAX_CONFIG_BYTES: u64 = 256 * 1024;

/// The longest secret file that is read: a password, not a document.
const MAX_SECRET_BYTES: u64 = 4096;

/// A hub's configuration.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Where SQLite, images and tokens are. Made with mode 0700 when missing.
    pub data: PathBuf,
    /// The HTTP side: REST API, registry endpoint and health.
    #[serde(default)]
    pub api: ApiConfig,
    /// Where the MQTT broker is.
    #[serde(default)]
    pub broker: BrokerConfig,
    /// Turns under disruption budgets.
    #[serde(default)]
    pub leases: LeaseConfig,
    /// Whom the hub may ask whether a release is well.
    #[serde(default)]
    pub analysis: AnalysisConfig,
    /// The hub's own registry.
    #[serde(default)]
    pub registry: OwnRegistry,
    /// How registries are reached to resolve image tags, by `host` or `host:port`.
    #[serde(default)]
    pub registries: BTreeMap<String, RegistryEntry>,
}

/// `[api]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ApiConfig {
    /// Address and port; port 0 takes a free one. Default: `127.0.0.1:8480`.
    pub listen: SocketAddr,
    /// The largest image archive that is taken, in bytes. Default: 4 GiB.
    pub max_image_bytes: u64,
}

impl Default for ApiConfig {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 8480)),
            max_image_bytes: 4 << 30,
        }
    }
}

/// `[leases]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LeaseConfig {
    /// How long after it asked for its turn a device may begin to switch, in seconds; 10 to 3600. It is also how long an
    /// abort may take to reach a device that is cut off. Devices ask again at the latest every 60 s. Default: five
    /// minutes.
    pub ttl_s: u64,
}

impl Default for LeaseConfig {
    fn default() -> Self {
        Self { ttl_s: 300 }
    }
}

impl LeaseConfig {
    fn check(&self) -> Result<(), ConfigError> {
        if (10..=3600).contains(&self.ttl_s) {
            Ok(())
        } else {
            Err(ConfigError::Leases(self.ttl_s))
        }
    }
}

/// `[analysis]`: the gates of waves that ask somebody.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AnalysisConfig {
    /// Whom they may ask: `HOST:PORT`, or `HOST` for ports 80 and 443. Whoever may apply apps makes the hub ask these, and
    /// no others. Default: nobody.
    pub hosts: Vec<String>,
    /// Certificates of authorities, PEM, instead of Mozilla's.
    pub ca_file: Option<PathBuf>,
}

impl AnalysisConfig {
    /// Whom they may ask.
    ///
    /// # Errors
    ///
    /// When one is no host.
    pub fn hosts(&self) -> Result<Hosts, ConfigError> {
        Hosts::parse(&self.hosts).map_err(ConfigError::Analysis)
    }
}

/// `[registry]`: the hub's own, at `/v2/`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OwnRegistry {
    /// Uploads under way at once. Default: 256.
    pub max_uploads: u64,
    /// An upload for which nothing came for so long is given up, in seconds. Default: a day.
    pub upload_expires_s: u64,
    /// A blob or manifest that was pushed and that no tag reaches yet stays for so long, in seconds. Default: an hour.
    pub unused_expires_s: u64,
    /// Other registries that are pulled from through this one, by the name that their repositories have here:
    /// `docker.io` for `HUB/docker.io/library/busybox`. `[registries]` says how each is reached.
    pub upstreams: BTreeMap<String, Upstream>,
    /// How long a tag of another registry is believed before that is asked again, in seconds. Default: five minutes.
    pub upstream_tag_s: u64,
    /// How much of other registries is kept, in bytes; what was used last stays. Default: 10 GiB.
    pub upstream_bytes: u64,
}

/// `[registry.upstreams.NAME]`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Upstream {
    /// The registry's host, with a port if it has one, as image references have it. Default: the name itself.
    pub host: Option<String>,
}

impl Default for OwnRegistry {
    fn default() -> Self {
        Self {
            max_uploads: 256,
            upload_expires_s: 24 * 3600,
            unused_expires_s: 3600,
            upstreams: BTreeMap::new(),
            upstream_tag_s: 300,
            upstream_bytes: 10 << 30,
        }
    }
}

/// `[broker]`, as written.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BrokerConfig {
    /// Which broker.
    #[serde(default)]
    pub kind: BrokerKind,
    /// For `embedded`: address and port; port 0 takes a free one. Default: `127.0.0.1:1883`.
    pub listen: Option<SocketAddr>,
    /// For `external`: `mqtt://host:port`.
    pub url: Option<String>,
}

/// Which broker a hub uses.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BrokerKind {
    /// The one inside the hub's own process.
    #[default]
    Embedded,
    /// One that runs elsewhere, for example mosquitto.
    External,
}

/// `[broker]`, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Broker {
    /// Listen here.
    Embedded(SocketAddr),
    /// Connect there: host and port.
    External(String, u16),
}

/// Why a configuration is not usable.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("failed to read {}", path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file is too large to be what it should be.
    #[error("{} has more than {max} bytes; it is not what it should be", path.display())]
    TooLarge {
        /// Which file.
        path: PathBuf,
        /// How much is read.
        max: u64,
    },
    /// The file is not a hub configuration.
    #[error("{} is not a hub configuration: {message}", path.display())]
    Parse {
        /// Which file.
        path: PathBuf,
        /// Where and what, over several lines.
        message: String,
    },
    /// `[broker]` contradicts itself.
    #[error("[broker] {0}")]
    Broker(String),
    /// `[leases]` is out of range.
    #[error("[leases] ttl_s must be 10 to 3600, not {0}")]
    Leases(u64),
    /// `[analysis]` names something else than hosts.
    #[error(
        "[analysis] hosts: {0:?} is no host; write \"HOST:PORT\", or \"HOST\" for ports 80 and 443"
    )]
    Analysis(String),
    /// An upstream is not one.
    #[error("[registry.upstreams.\"{name}\"] {message}")]
    Upstream {
        /// Which.
        name: String,
        /// What is wrong.
        message: String,
    },
    /// A registry entry contradicts itself.
    #[error("[registries.\"{host}\"] {message}")]
    Registry {
        /// Which registry.
        host: String,
        /// What is wrong, and what would be right.
        message: String,
    },
}

impl Config {
    /// Reads and checks a configuration file.
    ///
    /// # Errors
    ///
    /// See [`ConfigError`].
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = read_bounded(path, MAX_CONFIG_BYTES)?;
        let config: Self = toml::from_str(&text).map_err(|error| ConfigError::Parse {
            path: path.to_owned(),
            message: error.to_string().trim_end().to_owned(),
        })?;
        config.broker.check()?;
        config.leases.check()?;
        config.analysis.hosts()?;
        Ok(config)
    }

    /// The defaults over a data directory.
    #[must_use]
    pub fn with_data(data: PathBuf) -> Self {
        Self {
            data,
            api: ApiConfig::default(),
            broker: BrokerConfig::default(),
            leases: LeaseConfig::default(),
            analysis: AnalysisConfig::default(),
            registry: OwnRegistry::default(),
            registries: BTreeMap::new(),
        }
    }

    /// What is pulled through the hub.
    ///
    /// # Errors
    ///
    /// When a name cannot be part of a repository's name, or a host is none.
    pub fn upstreams(&self) -> Result<Upstreams, ConfigError> {
        let mut hosts = BTreeMap::new();
        for (name, upstream) in &self.registry.upstreams {
            let host = upstream.host.as_ref().unwrap_or(name);
            let wrong = |message: &str| ConfigError::Upstream {
                name: name.clone(),
                message: message.to_owned(),
            };
            if !registry::is_prefix(name) {
                return Err(wrong("is no part of a repository's name"));
            }
            let parsed = Reference::parse(&format!("{host}/x"));
            if !parsed.is_ok_and(|reference| reference.host() == *host && host != HUB_HOST) {
                return Err(wrong("names no registry; say host = \"HOST[:PORT]\""));
            }
            hosts.insert(name.clone(), host.clone());
        }
        Ok(Upstreams {
            hosts,
            tag_ttl_ms: self.registry.upstream_tag_s.saturating_mul(1000),
            bytes: self.registry.upstream_bytes,
        })
    }

    /// What the registry client is built from; reads the password files.
    ///
    /// # Errors
    ///
    /// When a password file cannot be read, or a user name has no password.
    pub fn registry_client(&self) -> Result<ClientConfig, ConfigError> {
        let mut client = ClientConfig::default();
        for (host, entry) in &self.registries {
            entry.check().map_err(|message| ConfigError::Registry {
                host: host.clone(),
                message: message.to_owned(),
            })?;
            let registry = entry.config(|file| {
                let password = read_bounded(file, MAX_SECRET_BYTES)?;
                Ok::<_, ConfigError>(password.trim_end_matches(['\r', '\n']).to_owned())
            })?;
            client.registries.insert(host.clone(), registry);
        }
        Ok(client)
    }
}

impl BrokerConfig {
    /// The broker that is meant.
    ///
    /// # Errors
    ///
    /// When keys of the other kind are given, or the URL is not `mqtt://host[:port]`.
    pub fn check(&self) -> Result<Broker, ConfigError> {
        let wrong = |message: &str| Err(ConfigError::Broker(message.to_owned()));
        match (self.kind, &self.listen, &self.url) {
            (BrokerKind::Embedded, _, Some(_)) => {
                wrong("url belongs to kind = \"external\"; an embedded broker has listen")
            }
            (BrokerKind::Embedded, listen, None) => {
                Ok(Broker::Embedded(listen.unwrap_or_else(|| {
                    SocketAddr::from(([127, 0, 0, 1], 1883))
                })))
            }
            (BrokerKind::External, Some(_), _) => {
                wrong("listen belongs to kind = \"embedded\"; an external broker has url")
            }
            (BrokerKind::External, None, None) => {
                wrong("kind = \"external\" needs url = \"mqtt://host:port\"")
            }
            (BrokerKind::External, None, Some(url)) => broker_url(url),
        }
    }
}

fn broker_url(url: &str) -> Result<Broker, ConfigError> {
    let wrong = || ConfigError::Broker(format!("url {url:?} is not mqtt://host:port"));
    let authority = url
        .strip_prefix("mqtt://")
        .ok_or_else(wrong)?
        .trim_end_matches('/');
    let (host, port) = match authority.rsplit_once(':') {
        Some((host, port))
            if !host.ends_with(':') && (!host.contains(':') || host.ends_with(']')) =>
        {
            (host, port.parse().map_err(|_| wrong())?)
        }
        _ => (authority, 1883),
    };
    let host = host
        .strip_prefix('[')
        .and_then(|host| host.strip_suffix(']'))
        .unwrap_or(host);
    if host.is_empty() || host.contains(['/', '@', '?', '#', ' ']) {
        return Err(wrong());
    }
    Ok(Broker::External(host.to_owned(), port))
}

fn read_bounded(path: &Path, max: u64) -> Result<String, ConfigError> {
    use std::io::Read as _;
    let read = |source| ConfigError::Read {
        path: path.to_owned(),
        source,
    };
    let mut text = String::new();
    let file = std::fs::File::open(path).map_err(read)?;
    file.take(max + 1).read_to_string(&mut text).map_err(read)?;
    if text.len() as u64 > max {
        return Err(ConfigError::TooLarge {
            path: path.to_owned(),
            max,
        });
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &str) -> Result<Config, ConfigError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("hub.toml");
        std::fs::write(&path, text).unwrap();
        Config::load(&path)
    }

    #[test]
    fn the_smallest_configuration_has_the_documented_defaults() {
        let config = load("data = \"/var/lib/foreshore-hub\"").unwrap();
        assert_eq!(config.api.listen.to_string(), "127.0.0.1:8480");
        assert_eq!(
            config.broker.check().unwrap(),
            Broker::Embedded("127.0.0.1:1883".parse().unwrap())
        );
    }

    #[test]
    fn unknown_keys_are_named_with_their_line() {
        let error = load("data = \"/x\"\n[api]\nlisten = \"127.0.0.1:0\"\nport = 1\n")
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("port") && error.contains("line 4"),
            "{error}"
        );
    }

    #[test]
    fn brokers_say_one_thing() {
        for (text, expected) in [
            (
                "kind = \"external\"\nurl = \"mqtt://h:1\"",
                Some(Broker::External("h".into(), 1)),
            ),
            (
                "kind = \"external\"\nurl = \"mqtt://h\"",
                Some(Broker::External("h".into(), 1883)),
            ),
            (
                "kind = \"external\"\nurl = \"mqtt://[::1]:5\"",
                Some(Broker::External("::1".into(), 5)),
            ),
            ("kind = \"external\"", None),
            ("kind = \"external\"\nurl = \"http://h:1\"", None),
            ("kind = \"external\"\nurl = \"mqtt://:1\"", None),
            ("kind = \"external\"\nurl = \"mqtt://h:x\"", None),
            (
                "kind = \"external\"\nurl = \"mqtt://h:1\"\nlisten = \"127.0.0.1:1\"",
                None,
            ),
            ("kind = \"embedded\"\nurl = \"mqtt://h:1\"", None),
        ] {
            let loaded = load(&format!("data = \"/x\"\n[broker]\n{text}\n"));
            assert_eq!(
                loaded.ok().map(|config| config.broker.check().unwrap()),
                expected,
                "{text}"
            );
        }
    }

    #[test]
    fn upstreams_are_names_and_hosts() {
        let hosts = |text: &str| {
            let config = load(&format!("data = \"/x\"\n[registry.upstreams]\n{text}\n")).unwrap();
            config.upstreams().map(|upstreams| upstreams.hosts)
        };
        let found = hosts("\"docker.io\" = {}\nlan = {host = \"r.lan:5000\"}\n\"r.lan:5000\" = {}")
            .unwrap();
        assert_eq!(found["lan"], "r.lan:5000");
        assert_eq!((found.len(), &*found["docker.io"]), (3, "docker.io"));
        for bad in [
            "\"../x\" = {host = \"r.lan\"}",
            "\"Upper\" = {host = \"r.lan\"}",
            "\"\" = {host = \"r.lan\"}",
            "plain = {}",
            "a = {host = \"http://r.lan\"}",
            "a = {host = \"r.lan/x\"}",
            "a = {host = \"hub.internal\"}",
            "a = {host = \"\"}",
        ] {
            let error = hosts(bad).unwrap_err().to_string();
            assert!(error.contains("registry.upstreams"), "{bad}: {error}");
        }
    }

    #[test]
    fn half_a_credential_is_refused() {
        let config = load("data = \"/x\"\n[registries.\"r:5000\"]\nusername = \"u\"\n").unwrap();
        let error = config.registry_client().unwrap_err().to_string();
        assert!(
            error.contains("r:5000") && error.contains("password_file"),
            "{error}"
        );
    }
}
