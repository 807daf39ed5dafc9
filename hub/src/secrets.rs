//! The hub's secrets: made on the first start, kept in files that only their owner reads.
//!
//! Each is one line of 256 random bits in base64url. Losing one means making a new one: remove the file and
//! start the hub again.

use std::io::{Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use base64::Engine as _;
use foreshore_protocol::Digest;

/// The longest secret that is read, in bytes; what people paste into a file is shorter.
const MAX_SECRET_BYTES: u64 = 4096;

/// A text that authenticates somebody. Never printed.
#[derive(Clone)]
pub struct Secret {
    text: String,
    digest: Digest,
}

impl Secret {
    /// Wraps a text that is known already.
    #[must_use]
    pub fn new(text: String) -> Self {
        let digest = Digest::of(text.as_bytes());
        Self { text, digest }
    }

    /// Whether `candidate` is this secret. How long that takes does not depend on how much of it is right:
    /// digests are compared, and those cannot be approached step by step.
    #[must_use]
    pub fn matches(&self, candidate: &str) -> bool {
        Digest::of(candidate.as_bytes()) == self.digest
    }

    /// The text itself, to be sent to the broker.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.text
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// Their files in the data directory.
pub const FILES: [&str; 3] = [API, JOIN, HUB];
const API: &str = "api-token";
const JOIN: &str = "join-token";
const HUB: &str = "hub-secret";

/// The three secrets of a hub.
#[derive(Debug, Clone)]
pub struct Secrets {
    /// What operators send as a bearer token: `api-token`.
    pub api: Secret,
    /// What devices join with: `join-token`.
    pub join: Secret,
    /// What the hub's own MQTT client logs in with: `hub-secret`.
    pub hub: Secret,
}

/// Why the secrets are not there.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// The directory could not be made.
    #[error("failed to make the data directory {}", path.display())]
    Directory {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A file could not be read.
    #[error("failed to read {}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A file could not be written.
    #[error("failed to write {}", path.display())]
    Write {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A file holds something else.
    #[error("{} is not one line of 16 to 4096 visible characters; remove it to get a new one", path.display())]
    Malformed {
        /// Which.
        path: PathBuf,
    },
    /// The kernel gave no random bytes.
    #[error("failed to draw random bytes: {0}")]
    Random(getrandom::Error),
}

impl Secrets {
    /// Reads the secrets in `data`, and makes those that are missing; makes `data` too (mode 0700).
    ///
    /// # Errors
    ///
    /// See [`SecretError`].
    pub fn load_or_create(data: &Path) -> Result<Self, SecretError> {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(data)
            .map_err(|source| SecretError::Directory {
                path: data.to_owned(),
                source,
            })?;
        Ok(Self {
            api: load_or_create(&data.join(API))?,
            join: load_or_create(&data.join(JOIN))?,
            hub: load_or_create(&data.join(HUB))?,
        })
    }
}

fn load_or_create(path: &Path) -> Result<Secret, SecretError> {
    let mut text = String::new();
    match std::fs::File::open(path) {
        Ok(file) => {
            file.take(MAX_SECRET_BYTES + 1)
                .read_to_string(&mut text)
                .map_err(|source| SecretError::Read {
                    path: path.to_owned(),
                    source,
                })?;
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            text = random_text()?;
            write_new(path, &text).map_err(|source| SecretError::Write {
                path: path.to_owned(),
                source,
            })?;
        }
        Err(source) => {
            return Err(SecretError::Read {
                path: path.to_owned(),
                source,
            });
        }
    }
    let line = text.trim_end_matches(['\r', '\n']);
    if !(16..=4096).contains(&line.len()) || !line.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(SecretError::Malformed {
            path: path.to_owned(),
        });
    }
    Ok(Secret::new(line.to_owned()))
}

fn random_text() -> Result<String, SecretError> {
    let mut bytes = [0; 32];
    getrandom::fill(&mut bytes).map_err(SecretError::Random)?;
    Ok(base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(bytes))
}

/// Whole or not at all: a hub that is killed here must not find half a secret next time.
fn write_new(path: &Path, text: &str) -> std::io::Result<()> {
    let temporary = path.with_extension("new");
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&temporary)?;
    writeln!(file, "{text}")?;
    file.sync_all()?;
    std::fs::rename(&temporary, path)?;
    path.parent()
        .map_or(Ok(()), |dir| std::fs::File::open(dir)?.sync_all())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn secrets_are_made_once_and_only_their_owner_reads_them() {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("hub");
        let first = Secrets::load_or_create(&data).unwrap();
        let again = Secrets::load_or_create(&data).unwrap();
        for (name, made, read) in [
            ("api-token", &first.api, &again.api),
            ("join-token", &first.join, &again.join),
            ("hub-secret", &first.hub, &again.hub),
        ] {
            assert_eq!(made.expose(), read.expose());
            assert!(made.expose().len() >= 43, "256 bits in base64url");
            let mode = std::fs::metadata(data.join(name))
                .unwrap()
                .permissions()
                .mode();
            assert_eq!(mode & 0o777, 0o600, "{name}");
        }
        assert_ne!(first.api.expose(), first.join.expose());
    }

    #[test]
    fn an_empty_or_broken_file_is_named_and_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        for broken in ["", "short", "has a space in the middle", &"x".repeat(5000)] {
            std::fs::write(dir.path().join("api-token"), broken).unwrap();
            let error = Secrets::load_or_create(dir.path()).unwrap_err().to_string();
            assert!(error.contains("api-token"), "{error}");
            assert_eq!(
                std::fs::read_to_string(dir.path().join("api-token")).unwrap(),
                broken
            );
        }
    }

    #[test]
    fn a_secret_matches_only_itself_and_is_never_printed() {
        let secret = Secret::new("correct horse".to_owned());
        assert!(secret.matches("correct horse"));
        assert!(!secret.matches("correct hors") && !secret.matches(""));
        assert!(!format!("{secret:?}").contains("horse"));
    }
}
