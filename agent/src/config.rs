//! `agent.toml`: what an agent is configured with. Strict: an unknown key is an error with its line.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use foreshore_images::registry::{
    ClientConfig, Credentials, DockerConfigError, RegistryConfig, RegistryEntry,
};
use foreshore_protocol::DeviceId;
use foreshore_protocol::id::Labels;
use foreshore_protocol::quantity::{Bytes, Span};
use serde::Deserialize;

use crate::policy;
use crate::pull::PullConfig;
use crate::runtime::oci::UserNamespaces;

/// Where the configuration is unless told otherwise.
pub const DEFAULT_PATH: &str = "/etc/foreshore/agent.toml";

/// The largest configuration file that is read: 256 KiB.
const MAX_CONFIG_BYTES: u64 = 256 * 1024;

/// The longest secret file that is read: a password, not a document.
const MAX_SECRET_BYTES: u64 = 4096;

/// More ballast than any state needs.
const BALLAST_MAX: Bytes = Bytes(1 << 30);

/// The registry host under which images that were imported into the hub are known.
pub const HUB_REGISTRY: &str = "hub.internal";

/// An agent's configuration.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The device's id, unique in the fleet.
    pub device: DeviceId,
    /// How to reach the hub.
    pub hub: HubConfig,
    /// Labels that the device brings along; an operator's labels on the hub win.
    #[serde(default)]
    pub labels: Labels,
    /// Where things are kept.
    #[serde(default)]
    pub paths: Paths,
    /// Where containers are accounted.
    #[serde(default)]
    pub cgroup: Cgroup,
    /// How containers are kept apart from the device.
    #[serde(default)]
    pub isolation: Isolation,
    /// A hardware watchdog to feed; none without this table.
    pub watchdog: Option<Watchdog>,
    /// What is kept free on the file system of the state directory.
    #[serde(default)]
    pub disk: DiskConfig,
    /// What apps may ask of this device.
    #[serde(default)]
    pub policy: PolicyFile,
    /// When and how fast images are fetched.
    #[serde(default)]
    pub pull: PullConfig,
    /// What the device knows of the time of day.
    #[serde(default)]
    pub time: TimeConfig,
    /// How registries are reached, by `host` or `host:port`.
    #[serde(default)]
    pub registries: BTreeMap<String, RegistryEntry>,
}

/// `[policy]`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PolicyFile {
    /// The policy file ([`crate::policy`]). Default: `policy.toml` beside this configuration, which need not be there.
    pub file: Option<PathBuf>,
    /// What [`Self::file`] is by default.
    #[serde(skip)]
    beside: PathBuf,
}

/// `[isolation]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Isolation {
    /// `auto`: every container gets a user namespace where kernel and file systems can. `off`: none does.
    #[serde(default)]
    pub user_namespaces: UserNamespaces,
}

/// `[hub]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HubConfig {
    /// `mqtt://host[:port]` or `mqtts://host[:port]`; default ports 1883 and 8883.
    pub broker: BrokerUrl,
    /// The hub's HTTP address, from which `hub.internal` images are pulled. Without it such images cannot
    /// be pulled.
    pub registry: Option<String>,
    /// File that holds the token devices join with, on one line.
    pub join_token_file: PathBuf,
    /// For `mqtts://`: PEM file with the certificates to trust, instead of the system's.
    pub ca_file: Option<PathBuf>,
    /// MQTT keepalive. The broker notices a lost device within one and a half of it, the device a lost broker within
    /// two. 5s to 1h. Default: 5m.
    #[serde(default = "defaults::keepalive")]
    pub keepalive: Span,
    /// At most one report in this time, except for the end of an assignment. 100ms to 1h. Default: 5s.
    #[serde(default = "defaults::report_interval")]
    pub report_interval: Span,
    /// The longest pause between two attempts to connect. 1s to 1h. Default: 5m.
    #[serde(default = "defaults::reconnect_max")]
    pub reconnect_max: Span,
    /// How long after a lost connection the broker tells the hub. 0s to 30m. Default: 90s.
    #[serde(default = "defaults::will_delay")]
    pub will_delay: Span,
}

/// Where the broker is.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct BrokerUrl {
    /// Name or address, IPv6 without brackets.
    pub host: String,
    /// TCP port.
    pub port: u16,
    /// Whether to speak TLS.
    pub tls: bool,
}

/// `[paths]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Paths {
    /// What must survive a reboot. Default: `/var/lib/foreshore`.
    pub state: PathBuf,
    /// What must not. Default: `/run/foreshore`.
    pub run: PathBuf,
}

impl Default for Paths {
    fn default() -> Self {
        Self {
            state: "/var/lib/foreshore".into(),
            run: "/run/foreshore".into(),
        }
    }
}

/// `[cgroup]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Cgroup {
    /// The cgroup that all containers' cgroups are below, relative to the root of the hierarchy.
    /// Default: `foreshore`.
    pub parent: String,
}

impl Default for Cgroup {
    fn default() -> Self {
        Self {
            parent: "foreshore".to_owned(),
        }
    }
}

/// `[watchdog]`: a device that reboots the machine when nobody feeds it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Watchdog {
    /// For example `/dev/watchdog`. No other program may have it open: with systemd, leave its
    /// `RuntimeWatchdogSec` off.
    pub device: PathBuf,
    /// Without a sign of life for this long the machine is rebooted. 10s to 1h. Default: 1m.
    #[serde(default = "defaults::watchdog_timeout")]
    pub timeout: Span,
}

/// `[disk]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DiskConfig {
    /// Bytes that staging leaves free, and below which containers are evicted. Default: 5 % of the file system, at
    /// most 256m.
    pub reserve: Option<Bytes>,
    /// Bytes that are held back in a file and given up when a full disk keeps the agent from storing its state.
    /// At most 1g; 0 is none. Default: 16m.
    pub ballast: Bytes,
}

impl Default for DiskConfig {
    fn default() -> Self {
        Self {
            reserve: None,
            ballast: Bytes(16 << 20),
        }
    }
}

/// `[time]`: what the windows of apps go by.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TimeConfig {
    /// The device's time zone: `UTC`, a POSIX `TZ` string such as `CET-1CEST,M3.5.0,M10.5.0/3`, or a name below
    /// `/usr/share/zoneinfo`. Default: `TZ` of the agent's environment, then `/etc/localtime`, then UTC.
    pub zone: Option<String>,
    /// The device's clock is set by something that the kernel does not know of: a battery-backed clock that somebody keeps
    /// right, say. Default: false; then the clock counts when the kernel says that it is synchronized, and the hub's
    /// otherwise.
    #[serde(default)]
    pub trust_clock: bool,
}

/// Why a configuration is not usable.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A file cannot be read.
    #[error("failed to read {}", path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A file is too large to be what it should be.
    #[error("{} has more than {max} bytes; it is not what it should be", path.display())]
    TooLarge {
        /// Which file.
        path: PathBuf,
        /// How much is read.
        max: u64,
    },
    /// The file is not an agent configuration.
    #[error("{} is not an agent configuration: {message}", path.display())]
    Parse {
        /// Which file.
        path: PathBuf,
        /// Where and what, over several lines.
        message: String,
    },
    /// The docker configuration that [`PullConfig`] names cannot be used.
    #[error("pull.docker_config cannot be used")]
    DockerConfig(#[from] DockerConfigError),
    /// A value is out of range or contradicts another.
    #[error("{}: {message}", path.display())]
    Value {
        /// Which file.
        path: PathBuf,
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
        let mut config: Self = toml::from_str(&text).map_err(|error| ConfigError::Parse {
            path: path.to_owned(),
            message: error.to_string().trim_end().to_owned(),
        })?;
        config.check().map_err(|message| ConfigError::Value {
            path: path.to_owned(),
            message,
        })?;
        let dir = std::path::absolute(path).map_err(|source| ConfigError::Read {
            path: path.to_owned(),
            source,
        })?;
        config.policy.beside = dir.with_file_name("policy.toml");
        Ok(config)
    }

    fn check(&self) -> Result<(), String> {
        let hub = &self.hub;
        let watchdog = (self.watchdog.as_ref())
            .map_or_else(defaults::watchdog_timeout, |watchdog| watchdog.timeout);
        let ranges = [
            (
                "watchdog.timeout",
                watchdog,
                Span::from_secs(10),
                Span::from_secs(3600),
            ),
            (
                "hub.keepalive",
                hub.keepalive,
                Span::from_secs(5),
                Span::from_secs(3600),
            ),
            (
                "hub.report_interval",
                hub.report_interval,
                Span(100),
                Span::from_secs(3600),
            ),
            (
                "hub.reconnect_max",
                hub.reconnect_max,
                Span::from_secs(1),
                Span::from_secs(3600),
            ),
            (
                "hub.will_delay",
                hub.will_delay,
                Span(0),
                Span::from_secs(1800),
            ),
        ];
        for (key, value, low, high) in ranges {
            if value < low || value > high {
                return Err(format!("{key} is {value}; it must be from {low} to {high}"));
            }
        }
        let watchdog = self.watchdog.as_ref().map(|one| &one.device);
        for (key, path) in [
            ("paths.state", &self.paths.state),
            ("paths.run", &self.paths.run),
            ("watchdog.device", watchdog.unwrap_or(&self.paths.run)),
        ] {
            if !path.is_absolute() || path.parent().is_none() {
                return Err(format!(
                    "{key} is {}; it must be an absolute path below /",
                    path.display()
                ));
            }
        }
        if let Some(file) = self.policy.file.as_ref().filter(|file| !file.is_absolute()) {
            return Err(format!(
                "policy.file is {}; it must be an absolute path",
                file.display()
            ));
        }
        if self.paths.state == self.paths.run {
            return Err(
                "paths.state and paths.run must differ: one survives a reboot, the other must not"
                    .to_owned(),
            );
        }
        let parent = &self.cgroup.parent;
        let plain =
            |part: &str| !part.is_empty() && part != "." && part != ".." && !part.contains('\0');
        if !parent.split('/').all(plain) {
            return Err(format!(
                "cgroup.parent is {parent:?}; write names joined by '/', such as \"foreshore\""
            ));
        }
        if hub.ca_file.is_some() && !hub.broker.tls {
            return Err("hub.ca_file is of use with an mqtts:// broker only".to_owned());
        }
        if self.disk.ballast > BALLAST_MAX {
            return Err(format!(
                "disk.ballast is {}; it must be at most {BALLAST_MAX}",
                self.disk.ballast
            ));
        }
        self.pull.check()?;
        for (host, entry) in &self.registries {
            entry
                .check()
                .map_err(|wrong| format!("registries.\"{host}\" {wrong}"))?;
        }
        Ok(())
    }

    /// Where the policy is, and what it never gives away.
    #[must_use]
    pub fn policy_source(&self) -> policy::Source {
        policy::Source {
            path: self
                .policy
                .file
                .clone()
                .unwrap_or_else(|| self.policy.beside.clone()),
            required: self.policy.file.is_some(),
            own: vec![self.paths.state.clone(), self.paths.run.clone()],
        }
    }

    /// The token that the device joins with.
    ///
    /// # Errors
    ///
    /// When its file cannot be read.
    pub fn join_token(&self) -> Result<String, ConfigError> {
        read_secret(&self.hub.join_token_file)
    }

    /// What the registry client is built from. `hub.internal` goes to the hub, as this device.
    ///
    /// # Errors
    ///
    /// When a password file cannot be read.
    pub fn registry_client(&self) -> Result<ClientConfig, ConfigError> {
        let mut client = ClientConfig::default();
        if let Some(url) = &self.hub.registry {
            let credentials = Credentials::new(self.device.as_str(), self.join_token()?);
            let hub = RegistryConfig {
                url: Some(url.trim_end_matches('/').to_owned()),
                credentials: Some(credentials),
                ca_file: self.hub.ca_file.clone(),
                ..RegistryConfig::default()
            };
            client.registries.insert(HUB_REGISTRY.to_owned(), hub);
        }
        for (host, entry) in &self.registries {
            let registry = entry.config(read_secret)?;
            client.registries.insert(host.clone(), registry);
        }
        self.pull.apply(&mut client)?;
        Ok(client)
    }
}

impl HubConfig {
    /// [`Self::keepalive`] in whole seconds, as MQTT has it.
    #[must_use]
    pub fn keepalive_secs(&self) -> u16 {
        u16::try_from(self.keepalive.millis() / 1000).unwrap_or(u16::MAX)
    }

    /// A broker that leaves something unanswered for so long is out of reach: as long as it takes to notice by pings.
    #[must_use]
    pub fn answer_within(&self) -> Duration {
        2 * self.keepalive.duration()
    }

    /// [`Self::report_interval`].
    #[must_use]
    pub const fn report_interval(&self) -> Duration {
        self.report_interval.duration()
    }
}

impl TryFrom<String> for BrokerUrl {
    type Error = String;

    fn try_from(url: String) -> Result<Self, Self::Error> {
        let wrong = || format!("broker {url:?} is not mqtt://host:port or mqtts://host:port");
        let (tls, rest) = match (url.strip_prefix("mqtt://"), url.strip_prefix("mqtts://")) {
            (Some(rest), None) => (false, rest),
            (None, Some(rest)) => (true, rest),
            _ => return Err(wrong()),
        };
        let rest = rest.trim_end_matches('/');
        let default = if tls { 8883 } else { 1883 };
        let (host, port) = match rest.strip_prefix('[').map(|rest| rest.split_once(']')) {
            Some(Some((host, ""))) => (host, default),
            Some(Some((host, port))) => (
                host,
                port.strip_prefix(':')
                    .and_then(|port| port.parse().ok())
                    .ok_or_else(wrong)?,
            ),
            Some(None) => return Err(wrong()),
            None => match rest.split_once(':') {
                None => (rest, default),
                Some((host, port)) => (host, port.parse().map_err(|_| wrong())?),
            },
        };
        if host.is_empty() || port == 0 || host.contains(['/', '@', '?', '#', ' ', '[', ']']) {
            return Err(wrong());
        }
        Ok(Self {
            host: host.to_owned(),
            port,
            tls,
        })
    }
}

mod defaults {
    use foreshore_protocol::quantity::Span;

    pub(super) const fn keepalive() -> Span {
        Span::from_secs(300)
    }
    pub(super) const fn report_interval() -> Span {
        Span::from_secs(5)
    }
    pub(super) const fn reconnect_max() -> Span {
        Span::from_secs(300)
    }
    pub(super) const fn watchdog_timeout() -> Span {
        Span::from_secs(60)
    }
    pub(super) const fn will_delay() -> Span {
        Span::from_secs(90)
    }
}

/// The one line of a file that holds a token or a password.
pub(crate) fn read_secret(path: &Path) -> Result<String, ConfigError> {
    let text = read_bounded(path, MAX_SECRET_BYTES)?;
    let secret = text.trim_end_matches(['\r', '\n']);
    if secret.is_empty() || secret.contains('\n') {
        let message = "must hold one line that is not empty".to_owned();
        return Err(ConfigError::Value {
            path: path.to_owned(),
            message,
        });
    }
    Ok(secret.to_owned())
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

    const SMALLEST: &str =
        "device = \"a\"\n[hub]\nbroker = \"mqtt://hub\"\njoin_token_file = \"/token\"\n";

    fn load(text: &str) -> Result<Config, ConfigError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.toml");
        std::fs::write(&path, text).unwrap();
        Config::load(&path)
    }

    #[test]
    fn the_smallest_configuration_has_the_documented_defaults() {
        let config = load(SMALLEST).unwrap();
        assert_eq!(config.paths.state, Path::new("/var/lib/foreshore"));
        assert_eq!(config.cgroup.parent, "foreshore");
        assert_eq!(config.hub.keepalive_secs(), 300);
        assert_eq!(config.hub.broker.port, 1883);
    }

    #[test]
    fn mistakes_are_named_with_their_place() {
        let unknown = load(&format!("{SMALLEST}keepalives = \"5s\"\n"))
            .unwrap_err()
            .to_string();
        assert!(
            unknown.contains("keepalives") && unknown.contains("line 5"),
            "{unknown}"
        );
        for (more, named) in [
            ("keepalive = \"1s\"\n", "hub.keepalive"),
            ("[paths]\nrun = \"run\"\n", "paths.run"),
            ("[watchdog]\ndevice = \"watchdog\"\n", "watchdog.device"),
            (
                "[watchdog]\ndevice = \"/w\"\ntimeout = \"1s\"\n",
                "watchdog.timeout",
            ),
            ("[cgroup]\nparent = \"../x\"\n", "cgroup.parent"),
            ("[disk]\nballast = \"2g\"\n", "disk.ballast"),
            ("[disk]\nballast = \"x\"\n", "line 6"),
            ("ca_file = \"/ca.pem\"\n", "mqtts"),
            ("[registries.\"r:1\"]\nusername = \"x\"\n", "password_file"),
            ("[labels]\n\"-x\" = \"y\"\n", "-x"),
        ] {
            let error = load(&format!("{SMALLEST}{more}")).unwrap_err().to_string();
            assert!(error.contains(named), "{more}: {error}");
        }
    }

    #[test]
    fn broker_urls() {
        let parse = |url: &str| {
            BrokerUrl::try_from(url.to_owned()).map(|url| (url.host, url.port, url.tls))
        };
        assert_eq!(parse("mqtt://hub"), Ok(("hub".to_owned(), 1883, false)));
        assert_eq!(parse("mqtts://hub:99/"), Ok(("hub".to_owned(), 99, true)));
        assert_eq!(parse("mqtt://[::1]:5"), Ok(("::1".to_owned(), 5, false)));
        for bad in [
            "hub:1883",
            "mqtt://",
            "mqtt://a b",
            "mqtt://hub:0",
            "mqtt://hub:x",
            "http://hub",
            "mqtt://[::1",
            "mqtt://u@h",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_hub_s_images_are_pulled_as_this_device() {
        let dir = tempfile::tempdir().unwrap();
        let token = dir.path().join("token");
        std::fs::write(&token, "secret\n").unwrap();
        let text = SMALLEST.replace("/token", &token.to_string_lossy());
        let config = load(&format!("{text}registry = \"http://hub:8480/\"\n")).unwrap();
        let client = config.registry_client().unwrap();
        let hub = &client.registries[HUB_REGISTRY];
        assert_eq!(hub.url.as_deref(), Some("http://hub:8480"));
        assert_eq!(hub.credentials, Some(Credentials::new("a", "secret")));
        assert!(!format!("{client:?}").contains("secret"));
    }
}
