//! `config.json` of the docker command line, and of others that write it: who logs in where.
//!
//! Only what is in the file itself is used. Programs that it may name for keeping passwords (`credsStore`,
//! `credHelpers`) are not run: a device would run whatever is on its path.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde::Deserialize;

use super::Credentials;
use crate::reference::DEFAULT_HOST;

/// The longest file that is read, in bytes.
const BYTES_MAX: u64 = 1 << 20;

/// What such a file says.
#[derive(Debug, Clone, Default)]
pub struct DockerConfig {
    credentials: BTreeMap<String, Credentials>,
}

/// Why one cannot be used. No message holds anything of its content but host names.
#[derive(Debug, thiserror::Error)]
pub enum DockerConfigError {
    /// It cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// As configured.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// It is not of this form.
    #[error("{} is not a docker config.json: {problem}", path.display())]
    Content {
        /// As configured.
        path: PathBuf,
        /// What is wrong, for people.
        problem: String,
    },
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Document {
    #[serde(default)]
    auths: BTreeMap<String, Entry>,
}

#[derive(Deserialize)]
struct Entry {
    #[serde(default)]
    auth: String,
    #[serde(default)]
    username: String,
    #[serde(default)]
    password: String,
    #[serde(default)]
    identitytoken: String,
}

impl DockerConfig {
    /// Reads the file; at most 1 MiB.
    ///
    /// # Errors
    /// [`DockerConfigError`].
    pub fn read(path: &Path) -> Result<Self, DockerConfigError> {
        let mut bytes = Vec::new();
        File::open(path)
            .and_then(|file| file.take(BYTES_MAX + 1).read_to_end(&mut bytes))
            .map_err(|source| DockerConfigError::Read {
                path: path.to_owned(),
                source,
            })?;
        Self::parse(&bytes).map_err(|problem| DockerConfigError::Content {
            path: path.to_owned(),
            problem,
        })
    }

    fn parse(bytes: &[u8]) -> Result<Self, String> {
        if bytes.len() as u64 > BYTES_MAX {
            return Err(format!("it is longer than {BYTES_MAX} bytes"));
        }
        // serde_json's own message may quote what it found.
        let document: Document = serde_json::from_slice(bytes)
            .map_err(|error| format!("line {}, column {}", error.line(), error.column()))?;
        let mut credentials = BTreeMap::new();
        for (name, entry) in document.auths {
            let Some(host) = host_of(&name) else {
                tracing::debug!(
                    name,
                    "a login that is not for a whole registry is passed over"
                );
                continue;
            };
            if !entry.identitytoken.is_empty() {
                return Err(format!(
                    "the login at \"{host}\" is an identity token, which only docker can use; log in with a password or an \
                     access token"
                ));
            }
            let found = if entry.auth.is_empty() {
                (!entry.username.is_empty())
                    .then(|| Credentials::new(entry.username, entry.password))
            } else {
                Some(decode(&entry.auth).ok_or_else(|| {
                    format!("\"auth\" of \"{host}\" is not USERNAME:PASSWORD in base64")
                })?)
            };
            // Without either the password is in a keeper that the file names; others may still be right here.
            if let Some(found) = found {
                credentials.insert(host, found);
            }
        }
        Ok(Self { credentials })
    }

    /// User name and password for a registry, by its name in references.
    #[must_use]
    pub fn credentials(&self, host: &str) -> Option<&Credentials> {
        self.credentials.get(host)
    }

    /// Every registry that it has a login for.
    pub fn hosts(&self) -> impl Iterator<Item = &str> {
        self.credentials.keys().map(String::as_str)
    }
}

fn decode(auth: &str) -> Option<Credentials> {
    let text = String::from_utf8(BASE64_STANDARD.decode(auth.trim()).ok()?).ok()?;
    let (username, password) = text.split_once(':')?;
    Some(Credentials::new(username, password.trim_end_matches('\0')))
}

/// `https://index.docker.io/v1/` is docker's own name for its registry; others may have a scheme as well. `None` for logins
/// that are for something below a registry (containers-auth.json(5)) or no passwords (`…/v1/refresh-token`).
fn host_of(name: &str) -> Option<String> {
    let name = name
        .strip_prefix("https://")
        .or_else(|| name.strip_prefix("http://"))
        .unwrap_or(name);
    let (host, path) = name.split_once('/').unwrap_or((name, ""));
    let whole = matches!(path.trim_end_matches('/'), "" | "v1" | "v2");
    whole.then(|| match host {
        "index.docker.io" | "registry-1.docker.io" => DEFAULT_HOST.to_owned(),
        host => host.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logins_as_docker_and_podman_write_them() {
        let encoded = BASE64_STANDARD.encode("me:pass:word");
        let text = format!(
            r#"{{"auths": {{
                "https://index.docker.io/v1/": {{"auth": "{encoded}"}},
                "ghcr.io": {{"username": "u", "password": "p"}},
                "registry.lan:5000": {{"auth": "{encoded}"}},
                "https://index.docker.io/v1/refresh-token": {{"username": "u", "password": "token"}},
                "ghcr.io/org": {{"username": "org", "password": "other"}},
                "kept.elsewhere": {{}}
            }}, "credsStore": "desktop", "HttpHeaders": {{"a": "b"}}}}"#
        );
        let config = DockerConfig::parse(text.as_bytes()).unwrap();
        let me = Credentials::new("me", "pass:word");
        assert_eq!(config.credentials("docker.io"), Some(&me));
        assert_eq!(config.credentials("registry.lan:5000"), Some(&me));
        assert_eq!(
            config.credentials("ghcr.io"),
            Some(&Credentials::new("u", "p"))
        );
        assert_eq!(config.credentials("kept.elsewhere"), None);
        assert_eq!(config.hosts().count(), 3);
        assert_eq!(DockerConfig::parse(b"{}").unwrap().hosts().count(), 0);
    }

    #[test]
    fn what_cannot_be_used_is_named_without_its_secrets() {
        for (text, named) in [
            ("", "line 1"),
            ("7", "line 1"),
            (
                r#"{"auths": {"h": {"auth": "c2VjcmV0"}}}"#,
                "\"auth\" of \"h\"",
            ),
            (
                r#"{"auths": {"h": {"auth": "secret!"}}}"#,
                "\"auth\" of \"h\"",
            ),
            (
                r#"{"auths": {"h": {"identitytoken": "secret"}}}"#,
                "identity token",
            ),
            (r#"{"auths": {"h": {"auth": {"secret": 1}}}}"#, "line 1"),
        ] {
            let problem = DockerConfig::parse(text.as_bytes()).unwrap_err();
            assert!(problem.contains(named), "{text}: {problem}");
            assert!(!problem.contains("secret"), "{problem}");
        }
        let missing = DockerConfig::read(Path::new("/nonexistent/config.json")).unwrap_err();
        assert!(missing.to_string().contains("/nonexistent/config.json"));
    }
}
