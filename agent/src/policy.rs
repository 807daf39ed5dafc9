//! What the owner of this device lets apps ask for: device nodes, directories of the device, its network, and how much.
//!
//! The policy is a file on the device (`policy.toml` beside `agent.toml`) that only its owner can write; nothing from
//! the hub changes it. Without one, apps get none of the three. It is looked at twice: before anything of a release is
//! staged ([`Policy::allows`], on names alone), and by the process that starts a container (`Grant`, on what the names
//! lead to at that moment).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use foreshore_protocol::AppName;
use foreshore_protocol::manifest::{NetworkMode, Service, VolumeSource};
use foreshore_protocol::quantity::{Bytes, Cpus};
use foreshore_protocol::release::Release;
use serde::{Deserialize, Serialize};

mod file;
mod pattern;
mod signature;
#[cfg(test)]
mod tests;

pub use file::{PolicyError, Source, Watched};
pub use pattern::DevicePattern;
pub use signature::{ImagePattern, SignatureRule};

/// A policy file: what every app may ask for, and tables for single apps.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Policy {
    /// Device nodes that apps may use, as patterns of absolute paths below `/dev`.
    #[serde(default)]
    pub devices: Vec<DevicePattern>,
    /// Directories and files of the device that apps may mount.
    #[serde(default)]
    pub binds: Vec<BindRule>,
    /// Whether apps may have the device's network.
    #[serde(default)]
    pub host_network: bool,
    /// What one service may have at most.
    #[serde(default)]
    pub max: Ceilings,
    /// Which images need signatures, and by whom.
    #[serde(default)]
    pub signatures: Vec<SignatureRule>,
    /// What is different for single apps: a key that is given here replaces the one above.
    #[serde(default)]
    pub apps: BTreeMap<AppName, AppPolicy>,
    /// Never to be mounted, nor what holds them or is in them: the agent's own directories.
    #[serde(skip)]
    pub(crate) own: Vec<PathBuf>,
    /// Where it came from, for messages.
    #[serde(skip)]
    pub(crate) path: PathBuf,
}

/// `[apps.NAME]`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AppPolicy {
    /// As in [`Policy`].
    pub devices: Option<Vec<DevicePattern>>,
    /// As in [`Policy`].
    pub binds: Option<Vec<BindRule>>,
    /// As in [`Policy`].
    pub host_network: Option<bool>,
    /// As in [`Policy`].
    pub max: Option<Ceilings>,
    /// As in [`Policy`].
    pub signatures: Option<Vec<SignatureRule>>,
}

/// One of `binds`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BindRule {
    /// This and everything below it; absolute.
    pub path: PathBuf,
    /// Whether it may be mounted read-only only. Default: true.
    #[serde(default = "yes")]
    pub read_only: bool,
}

const fn yes() -> bool {
    true
}

/// `[max]`: missing is no ceiling.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ceilings {
    /// For `mem_limit`.
    pub mem_limit: Option<Bytes>,
    /// For `cpus`.
    pub cpus: Option<Cpus>,
    /// For `pids_limit`.
    pub pids_limit: Option<u32>,
}

/// What one app may ask for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grant {
    devices: Vec<DevicePattern>,
    binds: Vec<BindRule>,
    host_network: bool,
    max: Ceilings,
    own: Vec<PathBuf>,
    app: String,
    path: PathBuf,
}

/// Something that the policy does not allow.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("service {service} asks for {asked}, which this device's policy does not allow; {way_out}")]
pub struct Denied {
    service: String,
    asked: String,
    way_out: String,
}

/// What is thought of a release that an app is to be switched to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PolicyVerdict {
    /// It asks for more than is allowed.
    Denied(String),
    /// Nobody knows: the policy file cannot be used.
    Unknown(String),
}

/// The kernel's own file systems; whatever the policy says, no bind mount shows them.
const NEVER: [&str; 3] = ["/proc", "/sys", "/dev"];

/// Whether `release` asks for nothing that `policy` does not allow to `app`. Looks at names only: what they lead to is
/// for the start of the container to see.
///
/// # Errors
///
/// [`Denied`], for the first thing that is not allowed.
pub fn allows(policy: &Policy, app: &AppName, release: &Release) -> Result<(), Denied> {
    let grant = policy.grant(app);
    release
        .services
        .iter()
        .try_for_each(|(name, service)| grant.allows(name.as_str(), service))
}

/// Whether a service asks for anything that needs a policy.
#[must_use]
pub fn is_privileged(service: &Service) -> bool {
    let binds = |source: &VolumeSource| matches!(source, VolumeSource::Bind(_));
    !service.devices.is_empty()
        || service.network_mode == NetworkMode::Host
        || service.volumes.iter().any(|volume| binds(&volume.source))
}

impl Policy {
    /// What `app` may ask for.
    #[must_use]
    pub fn grant(&self, app: &AppName) -> Grant {
        let own = self.apps.get(app).cloned().unwrap_or_default();
        Grant {
            devices: own.devices.unwrap_or_else(|| self.devices.clone()),
            binds: own.binds.unwrap_or_else(|| self.binds.clone()),
            host_network: own.host_network.unwrap_or(self.host_network),
            max: own.max.unwrap_or(self.max),
            own: self.own.clone(),
            app: self
                .apps
                .get_key_value(app)
                .map(|(app, _)| app.to_string())
                .unwrap_or_default(),
            path: self.path.clone(),
        }
    }
}

impl Grant {
    /// Whether a service asks for nothing that is not allowed, by the names it uses.
    ///
    /// # Errors
    ///
    /// [`Denied`], for the first thing that is not.
    pub fn allows(&self, name: &str, service: &Service) -> Result<(), Denied> {
        for device in &service.devices {
            if !self.allows_device(&device.source) {
                let line = format!("devices = [{:?}]", device.source);
                return Err(self.denied(
                    name,
                    &format!("device {}", device.source),
                    "devices",
                    &line,
                ));
            }
        }
        for volume in &service.volumes {
            if let VolumeSource::Bind(source) = &volume.source {
                self.allows_bind(name, source, Path::new(source), volume.read_only)?;
            }
        }
        if service.network_mode == NetworkMode::Host && !self.host_network {
            let asked = "the device's network (network_mode: host)";
            return Err(self.denied(name, asked, "host_network", "host_network = true"));
        }
        self.allows_amounts(name, service)
    }

    fn allows_amounts(&self, name: &str, service: &Service) -> Result<(), Denied> {
        let max = &self.max;
        let memory = max.mem_limit.filter(|max| service.mem_limit > *max);
        let cpus = max.cpus.filter(|max| service.cpus > *max);
        let pids = max.pids_limit.filter(|max| service.pids_limit > *max);
        let (key, asked, max) = if let Some(max) = memory {
            ("mem_limit", service.mem_limit.to_string(), max.to_string())
        } else if let Some(max) = cpus {
            ("cpus", service.cpus.to_string(), max.to_string())
        } else if let Some(max) = pids {
            (
                "pids_limit",
                service.pids_limit.to_string(),
                max.to_string(),
            )
        } else {
            return Ok(());
        };
        Err(Denied {
            service: name.to_owned(),
            asked: format!("{key} {asked}"),
            way_out: format!(
                "the most is {max}; ask for less, or raise {key} under {} in {}",
                if self.app.is_empty() {
                    "[max]".to_owned()
                } else {
                    format!("[max] or [apps.{}.max]", self.app)
                },
                self.path.display()
            ),
        })
    }

    /// Whether this name of a device node matches one of the patterns.
    #[must_use]
    pub fn allows_device(&self, path: &str) -> bool {
        self.devices.iter().any(|pattern| pattern.matches(path))
    }

    /// Whether `real`, which is what `source` leads to, may be mounted.
    ///
    /// # Errors
    ///
    /// [`Denied`].
    pub fn allows_bind(
        &self,
        name: &str,
        source: &str,
        real: &Path,
        read_only: bool,
    ) -> Result<(), Denied> {
        let mode = if read_only { "" } else { " for writing" };
        let led = if Path::new(source) == real {
            String::new()
        } else {
            format!(" (which is {} here)", real.display())
        };
        let asked = format!("{source}{led}{mode}");
        let kernel = NEVER.iter().map(Path::new);
        let own = self.own.iter().map(PathBuf::as_path);
        if let Some(never) = kernel
            .chain(own)
            .find(|never| real.starts_with(never) || never.starts_with(real))
        {
            return Err(Denied {
                service: name.to_owned(),
                asked,
                way_out: format!(
                    "nothing allows a mount of {} or of what holds it; mount another directory",
                    never.display()
                ),
            });
        }
        let rules = || {
            self.binds
                .iter()
                .filter(|rule| real.starts_with(&rule.path))
        };
        if rules().any(|rule| read_only || !rule.read_only) {
            return Ok(());
        }
        if rules().next().is_some() {
            let denied = self.denied(
                name,
                &asked,
                "binds",
                &format!("binds = [{{path = {source:?}, read_only = false}}]"),
            );
            return Err(Denied {
                way_out: format!("add :ro to the volume, or {}", denied.way_out),
                ..denied
            });
        }
        let writable = if read_only { "" } else { ", read_only = false" };
        let line = format!(
            "binds = [{{path = {:?}{writable}}}]",
            real.display().to_string()
        );
        Err(self.denied(name, &asked, "binds", &line))
    }

    /// With every path of `binds` as it is on this device now, links followed. Those that are not there are left as they
    /// are.
    #[must_use]
    pub(crate) fn resolved(mut self) -> Self {
        let followed: Vec<BindRule> = self
            .binds
            .iter()
            .filter_map(|rule| {
                Some(BindRule {
                    path: rule.path.canonicalize().ok()?,
                    read_only: rule.read_only,
                })
            })
            .collect();
        self.binds.extend(followed);
        let own: Vec<PathBuf> = self
            .own
            .iter()
            .filter_map(|path| path.canonicalize().ok())
            .collect();
        self.own.extend(own);
        self
    }

    /// That a device which was asked for by an allowed name may not be used.
    #[must_use]
    pub(crate) fn denied_device(&self, name: &str, source: &str, real: &Path) -> Denied {
        Denied {
            service: name.to_owned(),
            asked: format!("device {source}, which leads to {} here", real.display()),
            way_out: "a device node is below /dev and not in /dev/shm, /dev/mqueue or /dev/pts; name another one"
                .to_owned(),
        }
    }

    fn denied(&self, name: &str, asked: &str, key: &str, line: &str) -> Denied {
        let place = if self.app.is_empty() {
            String::new()
        } else {
            format!(" (or in its table [apps.{}])", self.app)
        };
        let file = self.path.display();
        Denied {
            service: name.to_owned(),
            asked: asked.to_owned(),
            way_out: format!(
                "if it should, the device's owner writes {line} in {file}{place}; {key} may be there already"
            ),
        }
    }
}
