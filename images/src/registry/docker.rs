//! `config.json` of the docker command line, and of others that write it: who logs in where.
//!
//! Only what is in the file itself is used. Programs that it may name for keeping passwords (`credsStore`,
//! `credHelpers`) are not run: a device would run whatever is on its path.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};

use super::source::default_url;
use super::url::Origin;
use super::{ClientConfig, Credentials};
use crate::reference::{DEFAULT_HOST, Reference};

/// The longest file that is read, in bytes.
const BYTES_MAX: u64 = 1 << 20;

/// What such a file says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
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

/// Why a text that should hold logins and nothing else cannot be used. No message holds anything of the text: what was
/// taken for logins may be a password.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LoginsError {
    /// More than is read.
    #[error("it is longer than {BYTES_MAX} bytes")]
    TooLong,
    /// Not JSON of that shape.
    #[error("line {line}, column {column} is not what stands there in a docker config.json")]
    Json {
        /// From 1; 0 when it is of another kind as a whole.
        line: usize,
        /// From 1; 0 when it is of another kind as a whole.
        column: usize,
    },
    /// The passwords are not in it.
    #[error(
        "it names programs that keep the passwords (credsStore, credHelpers), and those are not run; write each login into \
         \"auths\""
    )]
    Helpers,
    /// Nobody logs in with it.
    #[error("it has no login under \"auths\"")]
    Empty,
    /// One login cannot be used.
    #[error("login {number} under \"auths\" {problem}")]
    Login {
        /// Which, from 1, in the order in which they stand there.
        number: usize,
        /// What is wrong with it.
        problem: LoginProblem,
    },
}

/// What is wrong with one login. Completes "login 1 …".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LoginProblem {
    /// Its name is not that of a registry.
    Host,
    /// It is for something below a registry (containers-auth.json(5)).
    Part,
    /// Its registry is named before.
    Twice,
    /// Its `auth` does not decode.
    Auth,
    /// Its token has characters that cannot stand in a request.
    Token,
    /// It holds nothing to log in with.
    Nothing,
}

impl fmt::Display for LoginProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Host => "is not for a registry: write it as HOST or HOST:PORT",
            Self::Part => "is for a part of a registry; write it for the whole of one, as HOST or HOST:PORT",
            Self::Twice => "is for a registry that has one already; keep one",
            Self::Auth => "has an \"auth\" that is not USERNAME:PASSWORD in base64",
            Self::Token => "has a token with spaces or other characters that no token has; log in again",
            Self::Nothing => {
                "has neither \"auth\" nor \"username\" and \"password\", nor an \"identitytoken\" or a \"registrytoken\""
            }
        })
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Document {
    #[serde(default)]
    auths: Entries,
    #[serde(default)]
    creds_store: Option<String>,
    #[serde(default)]
    cred_helpers: BTreeMap<String, IgnoredAny>,
}

/// In the order of the text, each as often as it stands there.
#[derive(Default)]
struct Entries(Vec<(String, Entry)>);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visit;
        impl<'de> Visitor<'de> for Visit {
            type Value = Entries;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("logins by registry")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Entries(entries))
            }
        }
        deserializer.deserialize_map(Visit)
    }
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
    #[serde(default)]
    registrytoken: String,
}

impl Entry {
    /// What to log in with; `None` when there is nothing.
    fn credentials(self) -> Result<Option<Credentials>, LoginProblem> {
        // As docker has them: the password beside an identity token is empty or that of a login before.
        for (token, as_credentials) in [
            (
                self.registrytoken,
                Credentials::access_token as fn(String) -> Credentials,
            ),
            (self.identitytoken, Credentials::refresh_token),
        ] {
            if !token.is_empty() {
                let sound = token.bytes().all(|byte| byte.is_ascii_graphic());
                return if sound {
                    Ok(Some(as_credentials(token)))
                } else {
                    Err(LoginProblem::Token)
                };
            }
        }
        if self.auth.is_empty() {
            let named = !self.username.is_empty();
            return Ok(named.then(|| Credentials::new(self.username, self.password)));
        }
        decode(&self.auth).map(Some).ok_or(LoginProblem::Auth)
    }
}

impl DockerConfig {
    /// Reads the file; at most 1 MiB. What in it is for others than this program is passed over: keepers of passwords, and
    /// logins that are not for a whole registry.
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
        let document = document(bytes).map_err(|error| error.to_string())?;
        let mut credentials = BTreeMap::new();
        for (name, entry) in document.auths.0 {
            let Some(host) = host_of(&name) else {
                tracing::debug!(
                    name,
                    "a login that is not for a whole registry is passed over"
                );
                continue;
            };
            let found = entry
                .credentials()
                .map_err(|problem| format!("the login at \"{host}\" {problem}"))?;
            // Without either the password is in a keeper that the file names; others may still be right here.
            if let Some(found) = found {
                credentials.insert(host, found);
            }
        }
        Ok(Self { credentials })
    }

    /// Reads a text that was written to hold logins: every one of them has to be of use here.
    ///
    /// # Errors
    /// [`LoginsError`].
    pub fn logins(bytes: &[u8]) -> Result<Self, LoginsError> {
        let document = document(bytes)?;
        let keeps = document.creds_store.is_some_and(|store| !store.is_empty());
        if keeps || !document.cred_helpers.is_empty() {
            return Err(LoginsError::Helpers);
        }
        let mut credentials = BTreeMap::new();
        for (number, (name, entry)) in (1..).zip(document.auths.0) {
            let wrong = |problem| LoginsError::Login { number, problem };
            let Some(host) = host_of(&name) else {
                if is_docker_s_own(&name) {
                    continue;
                }
                return Err(wrong(LoginProblem::Part));
            };
            if !is_host(&host) {
                return Err(wrong(LoginProblem::Host));
            }
            let found = entry.credentials().map_err(wrong)?;
            let found = found.ok_or_else(|| wrong(LoginProblem::Nothing))?;
            if credentials.insert(host, found).is_some() {
                return Err(wrong(LoginProblem::Twice));
            }
        }
        if credentials.is_empty() {
            return Err(LoginsError::Empty);
        }
        Ok(Self { credentials })
    }

    /// How to log in at a registry, by its name in references.
    #[must_use]
    pub fn credentials(&self, host: &str) -> Option<&Credentials> {
        self.credentials.get(host)
    }

    /// Every registry that it has a login for.
    pub fn hosts(&self) -> impl Iterator<Item = &str> {
        self.credentials.keys().map(String::as_str)
    }

    /// Gives its logins to the registries that have none in `client`.
    pub fn fill(&self, client: &mut ClientConfig) {
        for (host, credentials) in &self.credentials {
            let registry = client.registries.entry(host.clone()).or_default();
            registry
                .credentials
                .get_or_insert_with(|| credentials.clone());
        }
    }
}

fn document(bytes: &[u8]) -> Result<Document, LoginsError> {
    if bytes.len() as u64 > BYTES_MAX {
        return Err(LoginsError::TooLong);
    }
    // serde_json's own message may quote what it found.
    serde_json::from_slice(bytes).map_err(|error| LoginsError::Json {
        line: error.line(),
        column: error.column(),
    })
}

fn decode(auth: &str) -> Option<Credentials> {
    let text = String::from_utf8(BASE64_STANDARD.decode(auth.trim()).ok()?).ok()?;
    let (username, password) = text.split_once(':')?;
    Some(Credentials::new(username, password.trim_end_matches('\0')))
}

/// Host and path of a login's name; others than docker may write a scheme as well.
fn place_of(name: &str) -> (&str, &str) {
    let name = name
        .strip_prefix("https://")
        .or_else(|| name.strip_prefix("http://"))
        .unwrap_or(name);
    let (host, path) = name.split_once('/').unwrap_or((name, ""));
    (host, path.trim_end_matches('/'))
}

/// `https://index.docker.io/v1/` is docker's own name for its registry. `None` for logins that are for something below a
/// registry (containers-auth.json(5)) or no passwords (`…/v1/refresh-token`).
fn host_of(name: &str) -> Option<String> {
    let (host, path) = place_of(name);
    matches!(path, "" | "v1" | "v2").then(|| match host {
        "index.docker.io" | "registry-1.docker.io" => DEFAULT_HOST.to_owned(),
        host => host.to_owned(),
    })
}

/// What docker keeps beside the login of its own registry.
fn is_docker_s_own(name: &str) -> bool {
    let (host, path) = place_of(name);
    host == "index.docker.io" && matches!(path, "v1/access-token" | "v1/refresh-token")
}

/// Whether references can name a registry so, and it can be reached.
fn is_host(host: &str) -> bool {
    let named = Reference::parse(&format!("{host}/a")).is_ok_and(|it| it.host() == host);
    named && Origin::parse(&default_url(host, false)).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::Client;

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
                "cloud.lan": {{"auth": "MDAwMDAwMDA6", "identitytoken": "refresh.me"}},
                "ci.lan": {{"registrytoken": "bear.me"}},
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
        assert_eq!(
            config.credentials("cloud.lan"),
            Some(&Credentials::refresh_token("refresh.me"))
        );
        assert_eq!(
            config.credentials("ci.lan"),
            Some(&Credentials::access_token("bear.me"))
        );
        assert_eq!(config.credentials("kept.elsewhere"), None);
        assert_eq!(config.hosts().count(), 5);
        assert_eq!(DockerConfig::parse(b"{}").unwrap().hosts().count(), 0);
    }

    #[test]
    fn what_cannot_be_used_is_named_without_its_secrets() {
        for (text, named) in [
            ("", "line 1"),
            ("7", "line 1"),
            (
                r#"{"auths": {"h": {"auth": "c2VjcmV0"}}}"#,
                "at \"h\" has an \"auth\"",
            ),
            (
                r#"{"auths": {"h": {"auth": "secret!"}}}"#,
                "at \"h\" has an \"auth\"",
            ),
            (
                r#"{"auths": {"h": {"identitytoken": "secret\n"}}}"#,
                "at \"h\" has a token",
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

    #[test]
    fn a_text_of_logins_is_strict_and_never_quoted() {
        let encoded = BASE64_STANDARD.encode("me:pass");
        let text = format!(
            r#"{{"auths": {{"https://index.docker.io/v1/": {{"auth": "{encoded}", "email": "a@b"}},
                "[::1]:5000": {{"username": "u", "password": "p"}},
                "https://index.docker.io/v1/access-token": {{"auth": "{encoded}"}}}},
              "credsStore": "", "credHelpers": {{}}, "HttpHeaders": {{"User-Agent": "docker"}}}}"#
        );
        let logins = DockerConfig::logins(text.as_bytes()).unwrap();
        assert_eq!(
            logins.hosts().collect::<Vec<_>>(),
            ["[::1]:5000", "docker.io"]
        );

        let login = |number, problem| LoginsError::Login { number, problem };
        let json = |column| LoginsError::Json { line: 1, column };
        for (text, expected) in [
            ("hunter2", json(1)),
            ("\"hunter2\"", json(9)),
            ("", LoginsError::Json { line: 1, column: 0 }),
            ("{}", LoginsError::Empty),
            (r#"{"auths": {}}"#, LoginsError::Empty),
            (
                r#"{"auths": {"a.b": {}}, "credsStore": "hunter2"}"#,
                LoginsError::Helpers,
            ),
            (
                r#"{"credHelpers": {"hunter2": "ecr-login"}}"#,
                LoginsError::Helpers,
            ),
            (
                r#"{"auths": {"a.b/hunter2": {"auth": "YTpi"}}}"#,
                login(1, LoginProblem::Part),
            ),
            (
                r#"{"auths": {"a.b": {"auth": "YTpi"}, "hunter2": {"auth": "YTpi"}}}"#,
                login(2, LoginProblem::Host),
            ),
            (
                r#"{"auths": {"hunter2!": {"auth": "YTpi"}}}"#,
                login(1, LoginProblem::Host),
            ),
            (
                r#"{"auths": {"a b.c": {"auth": "YTpi"}}}"#,
                login(1, LoginProblem::Host),
            ),
            (
                r#"{"auths": {"a.b:99999": {"auth": "YTpi"}}}"#,
                login(1, LoginProblem::Host),
            ),
            (
                r#"{"auths": {"": {"auth": "YTpi"}}}"#,
                login(1, LoginProblem::Host),
            ),
            (
                r#"{"auths": {"a.b": {"auth": "YTpi"}, "https://a.b/": {"auth": "YTpi"}}}"#,
                login(2, LoginProblem::Twice),
            ),
            (
                r#"{"auths": {"a.b": {"auth": "hunter2"}}}"#,
                login(1, LoginProblem::Auth),
            ),
            (
                r#"{"auths": {"a.b": {"auth": "aHVudGVyMg=="}}}"#,
                login(1, LoginProblem::Auth),
            ),
            (
                r#"{"auths": {"a.b": {"auth": "YTpi", "identitytoken": "hunter 2"}}}"#,
                login(1, LoginProblem::Token),
            ),
            (
                r#"{"auths": {"a.b": {"registrytoken": "hünter2"}}}"#,
                login(1, LoginProblem::Token),
            ),
            (
                r#"{"auths": {"a.b": {"password": "hunter2"}}}"#,
                login(1, LoginProblem::Nothing),
            ),
        ] {
            let error = DockerConfig::logins(text.as_bytes()).unwrap_err();
            assert_eq!(error, expected, "{text}");
            let shown = format!("{error} {error:?}");
            assert!(
                !shown.contains("hunter2") && !shown.contains("a.b"),
                "{shown}"
            );
        }
        let long = vec![b' '; usize::try_from(BYTES_MAX).unwrap() + 1];
        assert_eq!(DockerConfig::logins(&long), Err(LoginsError::TooLong));
        assert!(!format!("{logins:?}").contains("pass"));
    }

    #[test]
    fn logins_fill_what_has_none() {
        let one = DockerConfig::logins(
            br#"{"auths": {"a.b": {"username": "1", "password": "x"}, "c.d": {"username": "1", "password": "x"}}}"#,
        );
        let two = DockerConfig::logins(
            br#"{"auths": {"a.b": {"username": "2", "password": "x"}, "e.f": {"username": "2", "password": "x"}}}"#,
        );
        let mut client = ClientConfig::default();
        client
            .registries
            .entry("c.d".to_owned())
            .or_default()
            .credentials = Some(Credentials::new("own", "x"));
        client
            .registries
            .entry("e.f".to_owned())
            .or_default()
            .plain_http = true;
        for logins in [one, two] {
            logins.unwrap().fill(&mut client);
        }
        let login = |host: &str| client.registries[host].credentials.clone().unwrap();
        let expected = ["1", "own", "2"].map(|name| Credentials::new(name, "x"));
        assert_eq!(["a.b", "c.d", "e.f"].map(login), expected);
        assert!(client.registries["e.f"].plain_http);
        assert!(Client::new(client).is_ok());
    }

    proptest::proptest! {
        #[test]
        fn whatever_is_taken_makes_a_client(host in "[a-z0-9.:/@\\[\\]%?# é-]{0,20}", auth in "YTpi|[a-zA-Z0-9=]{0,8}") {
            let text = serde_json::json!({"auths": {host: {"auth": auth}}}).to_string();
            if let Ok(logins) = DockerConfig::logins(text.as_bytes()) {
                let mut client = ClientConfig::default();
                logins.fill(&mut client);
                proptest::prop_assert!(Client::new(client).is_ok());
            }
        }
    }
}
