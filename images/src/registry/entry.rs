//! `[registries."HOST[:PORT]"]`: how programs write in their configuration files what is special about a registry.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::{Credentials, RegistryConfig};

/// One table.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RegistryEntry {
    /// Whether it speaks HTTP without TLS. Default: false.
    pub plain_http: bool,
    /// Where its images are asked for first, in order, `http[s]://HOST[:PORT][/PATH]`: mirrors and pull-through caches.
    pub mirrors: Vec<String>,
    /// Whether it is reached over a link that costs nothing, whatever the device's way out is. Default: false.
    pub unmetered: bool,
    /// Certificates to trust for it instead of the built-in ones, in PEM.
    pub ca_file: Option<PathBuf>,
    /// User name, if it wants one.
    pub username: Option<String>,
    /// File that holds the password on one line.
    pub password_file: Option<PathBuf>,
}

impl RegistryEntry {
    /// Whether the keys go together.
    ///
    /// # Errors
    ///
    /// With what is missing, for people.
    pub const fn check(&self) -> Result<(), &'static str> {
        match (&self.username, &self.password_file) {
            (Some(_), None) => Err("has a username but no password_file; give both, or neither"),
            (None, Some(_)) => Err("has a password_file but no username; give both, or neither"),
            (Some(_), Some(_)) | (None, None) => Ok(()),
        }
    }

    /// What a client needs; `read` gets the password out of its file.
    ///
    /// # Errors
    ///
    /// When `read` fails.
    pub fn config<E>(
        &self,
        read: impl FnOnce(&Path) -> Result<String, E>,
    ) -> Result<RegistryConfig, E> {
        let credentials = match (&self.username, &self.password_file) {
            (Some(username), Some(file)) => Some(Credentials::new(username.clone(), read(file)?)),
            _ => None,
        };
        Ok(RegistryConfig {
            plain_http: self.plain_http,
            credentials,
            ca_file: self.ca_file.clone(),
            mirrors: self.mirrors.clone(),
            ungated: self.unmetered,
            ..RegistryConfig::default()
        })
    }
}
