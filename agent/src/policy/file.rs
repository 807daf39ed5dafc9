//! The policy file: where it is, who may write it, and reading it again when it changed.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Component, Path, PathBuf};

use super::Policy;

/// The largest policy file that is read: 64 KiB.
const MAX_BYTES: u64 = 64 * 1024;

/// Where the policy is, and what of this agent no policy gives away.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// The file.
    pub path: PathBuf,
    /// Whether the configuration names it: then it must be there. Else none is needed, and nothing is allowed without.
    pub required: bool,
    /// The agent's state and run directories.
    pub own: Vec<PathBuf>,
}

/// Why a policy file cannot be used. Until it can, nothing that needs a policy is started, and no new release.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    /// It cannot be read.
    #[error("failed to read policy {}", path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Somebody else than root may change it.
    #[error("policy {file} {what}; make it root's alone: chown root:root {file} && chmod 644 {file}", file = path.display())]
    Open {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// It is not a policy.
    #[error("policy {} is not valid: {message}", path.display())]
    Parse {
        /// Which file.
        path: PathBuf,
        /// Where and what, over several lines.
        message: String,
    },
}

impl Source {
    /// Reads and checks the policy; without a file, the one that allows nothing.
    ///
    /// # Errors
    ///
    /// See [`PolicyError`].
    pub fn load(&self) -> Result<Policy, PolicyError> {
        let mut policy = match self.read()? {
            Some(text) => {
                toml::from_str(&text).map_err(|error| self.invalid(error.to_string().trim_end()))?
            }
            None => Policy::default(),
        };
        self.check(&policy)?;
        policy.own.clone_from(&self.own);
        // Who could write it could allow everything.
        policy.own.push(self.path.clone());
        policy.path.clone_from(&self.path);
        Ok(policy)
    }

    fn read(&self) -> Result<Option<String>, PolicyError> {
        let read = |source| PolicyError::Read {
            path: self.path.clone(),
            source,
        };
        // Not waiting for whoever may be at the other end of a pipe.
        let opened = File::options()
            .read(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open(&self.path);
        let file = match opened {
            Err(error) if error.kind() == io::ErrorKind::NotFound && !self.required => {
                return Ok(None);
            }
            opened => opened.map_err(read)?,
        };
        let metadata = file.metadata().map_err(read)?;
        let open = |what: String| PolicyError::Open {
            path: self.path.clone(),
            what,
        };
        if !metadata.is_file() {
            return Err(open("is not a regular file".to_owned()));
        }
        if metadata.uid() != 0 {
            return Err(open(format!("belongs to uid {}", metadata.uid())));
        }
        if metadata.mode() & 0o022 != 0 {
            return Err(open(format!(
                "has mode {:o}, so others may write it",
                metadata.mode() & 0o7777
            )));
        }
        let mut text = String::new();
        file.take(MAX_BYTES + 1)
            .read_to_string(&mut text)
            .map_err(read)?;
        if text.len() as u64 > MAX_BYTES {
            return Err(self.invalid(&format!("it has more than {MAX_BYTES} bytes")));
        }
        Ok(Some(text))
    }

    fn check(&self, policy: &Policy) -> Result<(), PolicyError> {
        let of_apps = policy.apps.values();
        let of_apps = of_apps.filter_map(|app| app.signatures.as_ref());
        for rule in of_apps.chain([&policy.signatures]).flatten() {
            rule.check().map_err(|message| self.invalid(&message))?;
        }
        let of_apps = policy.apps.values().filter_map(|app| app.binds.as_ref());
        for rule in of_apps.chain([&policy.binds]).flatten() {
            let path = &rule.path;
            let normal = path
                .components()
                .all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
            if !path.is_absolute() || !normal || path == Path::new("/") {
                return Err(self.invalid(&format!(
                    "binds: {:?} must be an absolute path below / without ..",
                    path.display().to_string()
                )));
            }
            if super::NEVER.iter().any(|never| path.starts_with(never)) {
                return Err(self.invalid(&format!(
                    "binds: {} belongs to the kernel and is never mounted; device nodes go under devices",
                    path.display()
                )));
            }
        }
        Ok(())
    }

    fn invalid(&self, message: &str) -> PolicyError {
        PolicyError::Parse {
            path: self.path.clone(),
            message: message.to_owned(),
        }
    }
}

/// What tells one version of a file from another: device, inode, size, change time.
type Stamp = Option<(u64, u64, u64, i64, i64)>;

/// A policy that is read again when its file changes.
#[derive(Debug)]
pub struct Watched {
    source: Source,
    stamp: Option<Stamp>,
    now: Result<Policy, String>,
}

impl Watched {
    /// Reads nothing yet.
    #[must_use]
    pub fn new(source: Source) -> Self {
        Self {
            source,
            stamp: None,
            now: Ok(Policy::default()),
        }
    }

    /// Reads the file if it changed since it was last read. True when it did.
    pub fn refresh(&mut self) -> bool {
        let stamp = std::fs::metadata(&self.source.path).ok().map(|metadata| {
            (
                metadata.dev(),
                metadata.ino(),
                metadata.size(),
                metadata.ctime(),
                metadata.ctime_nsec(),
            )
        });
        if self.stamp == Some(stamp) {
            return false;
        }
        self.stamp = Some(stamp);
        self.now = self
            .source
            .load()
            .map_err(|error| crate::causes::chain(&error));
        true
    }

    /// The policy, or why there is none.
    pub const fn policy(&self) -> &Result<Policy, String> {
        &self.now
    }
}
