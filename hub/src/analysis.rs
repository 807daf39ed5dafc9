//! Asking others whether a release is well, for the gates of waves.
//!
//! | file | what it owns |
//! |---|---|
//! | this one | whom the hub may ask, and asking: bounded in size and time |
//! | [`answer`] | PURE: what an answer says |
//! | [`control`] | PURE: devices that have a release beside devices that do not |
//!
//! Only hosts that the hub is configured with are asked, redirects are not followed, and no proxy comes in between. What
//! is not an answer is never a verdict. See `docs/decisions/0046-analysis-as-a-gate.md`.

use std::collections::BTreeSet;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use foreshore_protocol::manifest::Endpoint;
use foreshore_protocol::secret::SecretValue;
use tokio::sync::Semaphore;
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig};

#[deny(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    clippy::disallowed_macros,
    clippy::wildcard_enum_match_arm
)]
pub mod answer;
#[deny(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    clippy::disallowed_macros,
    clippy::wildcard_enum_match_arm
)]
pub mod control;

/// The longest answer that is read.
pub const ANSWER_BYTES_MAX: u64 = 1 << 20;

/// How long one answer may take, from the name's resolution to its last byte.
pub const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// Pauses before what may pass is tried again.
const PAUSES: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(4)];

/// Answers that are waited for at once.
const AT_ONCE: usize = 8;

/// The hosts that may be asked.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Hosts(BTreeSet<(String, Option<u16>)>);

impl Hosts {
    /// From `HOST`, which means ports 80 and 443, or `HOST:PORT`.
    ///
    /// # Errors
    ///
    /// With the first that is neither.
    pub fn parse(hosts: &[String]) -> Result<Self, String> {
        let one = |text: &String| {
            let url: Endpoint = format!("http://{text}").parse().ok()?;
            let bare = url.as_str() == format!("http://{text}") && !text.contains('/');
            let explicit = text.rsplit_once(':').is_some_and(|(_, port)| {
                !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit())
            }) && !text.ends_with(']');
            bare.then(|| (url.host().to_owned(), explicit.then(|| url.port())))
        };
        let parsed = hosts
            .iter()
            .map(|text| one(text).ok_or_else(|| text.clone()));
        Ok(Self(parsed.collect::<Result<_, _>>()?))
    }

    /// Whether this may be asked.
    #[must_use]
    pub fn allow(&self, url: &Endpoint) -> bool {
        let host = url.host().to_owned();
        self.0.contains(&(host.clone(), Some(url.port())))
            || (matches!(url.port(), 80 | 443) && self.0.contains(&(host, None)))
    }
}

/// As it is written in a configuration: `HOST:PORT`.
#[must_use]
pub fn host_of(url: &Endpoint) -> String {
    let (host, port) = (url.host(), url.port());
    if host.contains(':') {
        format!("[{host}]:{port}")
    } else {
        format!("{host}:{port}")
    }
}

/// Why nobody can be asked.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The file with certificates cannot be read.
    #[error("failed to read {}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// There is none in it.
    #[error("{} holds no certificate; it must be PEM", path.display())]
    NoCertificate {
        /// Which.
        path: PathBuf,
    },
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// The hub is not configured to ask it.
    #[error("the hub may not ask {0}; see [analysis] in hub.toml")]
    NotAllowed(String),
    /// No answer came, or not in time.
    #[error("{host} cannot be asked: {why}")]
    Unreachable {
        /// Which.
        host: String,
        /// Why, for people.
        why: String,
    },
    /// It answers with an error.
    #[error("{host} answers HTTP {status}{said}")]
    Status {
        /// Which.
        host: String,
        /// The status.
        status: u16,
        /// What it says to that, with a colon before it.
        said: String,
    },
    /// It wants the hub to ask somebody else.
    #[error("{0} redirects, which is not followed; name where it leads to")]
    Redirect(String),
    /// More than is read.
    #[error("{0} answers more than {ANSWER_BYTES_MAX} bytes")]
    TooLarge(String),
    /// The hub is stopping.
    #[error("the hub is stopping")]
    Stopping,
}

impl AskError {
    /// Whether it may be gone in a moment.
    const fn may_pass(&self) -> bool {
        match self {
            Self::Unreachable { .. } => true,
            Self::Status { status, .. } => *status >= 500 || *status == 429,
            Self::NotAllowed(_) | Self::Redirect(_) | Self::TooLarge(_) | Self::Stopping => false,
        }
    }
}

/// What is asked.
#[derive(Debug, Clone)]
pub struct Ask {
    /// Whom; decides whether it is allowed.
    pub endpoint: Endpoint,
    /// What stands behind the endpoint's path.
    pub below: String,
    /// JSON that is sent with a POST; `None`: a GET.
    pub body: Option<Vec<u8>>,
    /// Sent as a bearer token, over HTTPS only.
    pub bearer: Option<Bearer>,
}

/// A token. Its `Debug` shows nothing of it.
#[derive(Clone)]
pub struct Bearer(String);

impl Bearer {
    /// A secret that can stand in a header (RFC 6750, `b64token`, and whatever else is visible); a line's end behind it is
    /// left out.
    #[must_use]
    pub fn of(secret: &SecretValue) -> Option<Self> {
        let text = std::str::from_utf8(secret.expose()).ok()?;
        let text = text.trim_end_matches(['\r', '\n']);
        let visible = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_graphic());
        visible.then(|| Self(text.to_owned()))
    }
}

impl std::fmt::Debug for Bearer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Bearer(…)")
    }
}

/// Asks. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Asker {
    agent: ureq::Agent,
    hosts: Hosts,
    turns: Arc<Semaphore>,
}

impl Asker {
    /// One that asks these hosts, and believes the certificates of `ca_file` or else Mozilla's. Reads the file.
    ///
    /// # Errors
    ///
    /// See [`OpenError`].
    pub fn open(hosts: Hosts, ca_file: Option<&Path>) -> Result<Self, OpenError> {
        let roots = ca_file.map(certificates).transpose()?;
        let config = ureq::Agent::config_builder()
            .user_agent(concat!("foreshore-hub/", env!("CARGO_PKG_VERSION")))
            .max_redirects(0)
            .max_redirects_will_error(false)
            .http_status_as_error(false)
            .timeout_global(Some(ANSWER_WITHIN))
            .proxy(None)
            .tls_config(
                TlsConfig::builder()
                    .root_certs(roots.unwrap_or(RootCerts::WebPki))
                    .build(),
            );
        Ok(Self {
            agent: config.build().new_agent(),
            hosts,
            turns: Arc::new(Semaphore::new(AT_ONCE)),
        })
    }

    /// Whom it may ask.
    #[must_use]
    pub const fn hosts(&self) -> &Hosts {
        &self.hosts
    }

    /// Asks; what may pass is tried again, three times in all. At most 1 MiB of an answer and 10 s for each try.
    ///
    /// # Errors
    ///
    /// See [`AskError`].
    pub async fn ask(&self, ask: &Ask) -> Result<Vec<u8>, AskError> {
        if !self.hosts.allow(&ask.endpoint) {
            return Err(AskError::NotAllowed(host_of(&ask.endpoint)));
        }
        let mut pauses = PAUSES.into_iter();
        loop {
            let turn = Arc::clone(&self.turns)
                .acquire_owned()
                .await
                .map_err(|_| AskError::Stopping)?;
            let (agent, asked) = (self.agent.clone(), ask.clone());
            let once = tokio::task::spawn_blocking(move || {
                let _held = turn;
                once(&agent, &asked)
            });
            let error = match once.await.map_err(|_| AskError::Stopping)? {
                Ok(bytes) => return Ok(bytes),
                Err(error) => error,
            };
            match pauses.next() {
                Some(pause) if error.may_pass() => tokio::time::sleep(pause).await,
                _ => return Err(error),
            }
        }
    }
}

fn certificates(path: &Path) -> Result<RootCerts, OpenError> {
    let pem = std::fs::read(path).map_err(|source| OpenError::Read {
        path: path.to_owned(),
        source,
    })?;
    let certificates: Vec<Certificate<'static>> = ureq::tls::parse_pem(&pem)
        .filter_map(|item| match item {
            Ok(PemItem::Certificate(certificate)) => Some(certificate),
            _ => None,
        })
        .collect();
    if certificates.is_empty() {
        return Err(OpenError::NoCertificate {
            path: path.to_owned(),
        });
    }
    Ok(RootCerts::new_with_certs(&certificates))
}

fn once(agent: &ureq::Agent, ask: &Ask) -> Result<Vec<u8>, AskError> {
    let host = host_of(&ask.endpoint);
    let unreachable = |error: &dyn std::error::Error| AskError::Unreachable {
        host: host.clone(),
        why: answer::plain(&error.to_string()),
    };
    let url = format!("{}{}", ask.endpoint, ask.below);
    let mut request = ureq::http::Request::builder()
        .method(if ask.body.is_some() { "POST" } else { "GET" })
        .uri(&url)
        .header("accept", "application/json");
    if ask.body.is_some() {
        request = request.header("content-type", "application/json");
    }
    if let Some(Bearer(token)) = ask.bearer.as_ref().filter(|_| ask.endpoint.is_secure()) {
        request = request.header("authorization", format!("Bearer {token}"));
    }
    let request = request
        .body(ask.body.clone().unwrap_or_default())
        .map_err(|error| unreachable(&error))?;
    let response = agent.run(request).map_err(|error| unreachable(&error))?;
    let status = response.status().as_u16();
    if (300..400).contains(&status) {
        return Err(AskError::Redirect(host));
    }
    let mut bytes = Vec::new();
    response
        .into_body()
        .into_reader()
        .take(ANSWER_BYTES_MAX + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| unreachable(&error))?;
    if bytes.len() as u64 > ANSWER_BYTES_MAX {
        return Err(AskError::TooLarge(host));
    }
    if !(200..300).contains(&status) {
        let said = answer::error_of(&bytes).map_or_else(String::new, |said| format!(": {said}"));
        return Err(AskError::Status { host, status, said });
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_hosts_that_are_named_may_be_asked() {
        let named = [
            "prom:9090",
            "metrics.example.com",
            "[::1]",
            "[fd00::1]:9090",
        ];
        let hosts = Hosts::parse(&named.map(str::to_owned)).unwrap();
        for (url, allowed) in [
            ("http://prom:9090/x", true),
            ("https://PROM:9090", true),
            ("http://prom", false),
            ("http://prom:9091", false),
            ("http://prom.evil:9090", false),
            ("https://metrics.example.com", true),
            ("http://metrics.example.com", true),
            ("http://metrics.example.com:8080", false),
            ("http://[::1]", true),
            ("http://[::1]:9090", false),
            ("http://[fd00::1]:9090", true),
            ("http://169.254.169.254", false),
        ] {
            let url: Endpoint = url.parse().unwrap();
            assert_eq!(hosts.allow(&url), allowed, "{url}");
            assert!(!Hosts::default().allow(&url));
        }
        for bad in ["http://prom", "prom/x", "", "prom:", "a b", "prom:9090/"] {
            assert!(Hosts::parse(&[bad.to_owned()]).is_err(), "{bad}");
        }
    }

    #[test]
    fn tokens_are_shown_to_nobody() {
        let bearer = Bearer::of(&SecretValue::new(b"hush\n".to_vec())).unwrap();
        assert_eq!(bearer.0, "hush");
        assert!(!format!("{bearer:?}").contains("hush"));
        for bad in [&b""[..], b"two words", b"line\nline", b"\xff", b"\n"] {
            assert!(Bearer::of(&SecretValue::new(bad.to_vec())).is_none());
        }
    }
}
