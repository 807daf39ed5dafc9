//! `config.json` of the docker command line.

use std::fs::File;
use std::io::{Seek as _, Write as _};
use std::os::fd::AsRawFd as _;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use foreshore_images::registry::{Credentials, DockerConfig};
use serde_json::Value;

use crate::{accepted, memory};

/// One file.
///
/// # Panics
/// When a login is not what the file says, an error holds a secret, or it takes too much memory.
pub fn run(bytes: &[u8]) {
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    let file =
        rustix::fs::memfd_create("config.json", flags).expect("a file in memory can be made");
    let mut file = File::from(file);
    file.write_all(bytes)
        .and_then(|()| file.rewind())
        .expect("it can be written");
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let read = memory::within((64 << 10) + 128 * bytes.len(), || {
        DockerConfig::read(path.as_ref())
    });
    // Texts that nobody reads need not be Unicode, so this may fail where reading does not.
    let value = serde_json::from_slice::<Value>(bytes).unwrap_or_default();
    as_secret(bytes, &value, read.as_ref().ok());
    match read {
        Ok(config) => {
            accepted();
            if value.is_object() {
                kept(bytes, &value, &config);
            }
        }
        Err(error) => {
            let mut text = error.to_string();
            let mut next = std::error::Error::source(&error);
            while let Some(error) = next {
                text += &error.to_string();
                next = error.source();
            }
            secrets(&value, &mut |secret| {
                assert!(!text.contains(secret), "a secret stands in \"{text}\"");
            });
        }
    }
}

/// Every login that the file has in plain words is there, and nothing else is.
fn kept(bytes: &[u8], value: &Value, config: &DockerConfig) {
    let empty = serde_json::Map::new();
    let auths = value
        .get("auths")
        .and_then(Value::as_object)
        .unwrap_or(&empty);
    let mut known: Vec<&str> = config.hosts().collect();
    assert!(known.len() <= auths.len());
    known.sort_unstable();
    known.dedup();
    assert_eq!(known.len(), config.hosts().count(), "a host twice");
    for (host, entry) in auths {
        // Another name may mean the same registry; then it is not known which of them counts.
        let alone = auths
            .keys()
            .filter(|other| other.contains(host.as_str()))
            .count()
            == 1;
        let plain = !host.contains('/') && !host.ends_with("docker.io");
        let once = count(bytes, host.as_bytes()) == 1;
        let text = |key: &str| entry.get(key).and_then(Value::as_str).unwrap_or_default();
        let (auth, username) = (text("auth"), text("username"));
        let (registry, identity) = (text("registrytoken"), text("identitytoken"));
        if !alone || !plain || !once {
            continue;
        }
        let expected = if !registry.is_empty() {
            Some(Credentials::access_token(registry))
        } else if !identity.is_empty() {
            Some(Credentials::refresh_token(identity))
        } else if !auth.is_empty() {
            let decoded = BASE64_STANDARD
                .decode(auth.trim())
                .expect("it was accepted");
            let decoded = String::from_utf8(decoded).expect("it was accepted");
            let (username, password) = decoded.split_once(':').expect("it was accepted");
            Some(Credentials::new(username, password.trim_end_matches('\0')))
        } else if !username.is_empty() {
            Some(Credentials::new(username, text("password")))
        } else {
            None
        };
        assert_eq!(config.credentials(host), expected.as_ref(), "{host:?}");
    }
    for host in config.hosts() {
        assert!(config.credentials(host).is_some());
    }
}

fn count(bytes: &[u8], part: &[u8]) -> usize {
    match part.len() {
        0 => 0,
        length => bytes.windows(length).filter(|at| *at == part).count(),
    }
}

/// The same text as a hub's secret, where every login has to be of use: what is taken there means the same.
fn as_secret(bytes: &[u8], value: &Value, config: Option<&DockerConfig>) {
    let limit = (64 << 10) + 128 * bytes.len();
    match memory::within(limit, || DockerConfig::logins(bytes)) {
        Ok(logins) => {
            let config = config.expect("what is taken strictly is taken");
            assert!(logins.hosts().next().is_some());
            assert!(logins.hosts().eq(config.hosts()));
            for host in logins.hosts() {
                assert_eq!(
                    logins.credentials(host),
                    config.credentials(host),
                    "{host:?}"
                );
            }
        }
        Err(error) => {
            let text = error.to_string();
            secrets(value, &mut |secret| {
                assert!(!text.contains(secret), "{text}")
            });
            let auths = value.get("auths").and_then(Value::as_object);
            for name in auths.into_iter().flat_map(serde_json::Map::keys) {
                let by_accident = name.len() < 12 || name.contains(' ');
                assert!(by_accident || !text.contains(name.as_str()), "{text}");
            }
        }
    }
}

/// Every text that may be a password, long enough not to be found by accident.
fn secrets(value: &Value, see: &mut dyn FnMut(&str)) {
    let auths = value.get("auths").and_then(Value::as_object);
    for (host, entry) in auths.into_iter().flatten() {
        for key in ["auth", "password", "identitytoken"] {
            let secret = entry.get(key).and_then(Value::as_str).unwrap_or_default();
            let by_accident = secret.len() < 12 || host.contains(secret) || secret.contains(' ');
            if !by_accident {
                see(secret);
            }
        }
    }
}
