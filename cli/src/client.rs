//! [`Hub`]: the hub's REST API over blocking HTTP. Every answer is bounded in time and size; every error
//! becomes one [`Failure`] that says what to do.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use foreshore_images::registry::{ClientConfig, Credentials, RegistryConfig};
use foreshore_protocol::api::Problem;
use serde::de::DeserializeOwned;
use ureq::http::{Request, Response, Uri, header};
use ureq::tls::{PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::{AsSendBody, Body, SendBody};

use crate::arguments::HubArguments;
use crate::failure::{Failure, code};

/// The largest answer that is read: a fleet of 100,000 devices fits.
const MAX_ANSWER_BYTES: u64 = 256 << 20;
/// The largest error answer that is read.
const MAX_PROBLEM_BYTES: u64 = 64 << 10;
const MAX_TOKEN_BYTES: usize = 4096;
/// What the hub's registry is called in references.
pub(crate) const HUB_HOST: &str = "hub.internal";
const DEFAULT_TOKEN_FILE: &str = "/var/lib/foreshore-hub/api-token";

/// A hub that can be asked.
#[derive(Debug)]
pub(crate) struct Hub {
    agent: ureq::Agent,
    url: String,
    token: String,
    token_source: String,
    ca_file: Option<PathBuf>,
    timeout: Duration,
}

impl Hub {
    /// Checks address and token; nothing is sent yet.
    pub(crate) fn new(arguments: &HubArguments) -> Result<Self, Failure> {
        let url = arguments.hub.trim_end_matches('/').to_owned();
        let uri: Uri = url.parse().map_err(|_| bad_url(&url))?;
        if !matches!(uri.scheme_str(), Some("http" | "https"))
            || uri.host().is_none_or(str::is_empty)
            || uri.query().is_some()
        {
            return Err(bad_url(&url));
        }
        let (token, token_source) = token(arguments.token_file.as_deref())?;
        let mut tls = TlsConfig::builder();
        if let Some(file) = &arguments.ca_file {
            tls = tls.root_certs(trusted(file)?);
        }
        let mut config = ureq::Agent::config_builder()
            .tls_config(tls.build())
            .http_status_as_error(false)
            .max_redirects(0)
            .user_agent(concat!("foreshore/", env!("CARGO_PKG_VERSION")))
            .timeout_connect(Some(Duration::from_secs(10).min(arguments.request_timeout)));
        if is_loopback(&uri) {
            // A proxy for the internet is never the way to this machine.
            config = config.proxy(None);
        }
        Ok(Self {
            agent: config.build().into(),
            url,
            token,
            token_source,
            ca_file: arguments.ca_file.clone(),
            timeout: arguments.request_timeout,
        })
    }

    /// The hub's address, as the user gave it.
    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// How its registry is pulled from, as `hub.internal`.
    pub(crate) fn registry(&self) -> ClientConfig {
        let registry = RegistryConfig {
            url: Some(self.url.clone()),
            credentials: Some(Credentials::new("operator", self.token.clone())),
            ca_file: self.ca_file.clone(),
            ..RegistryConfig::default()
        };
        ClientConfig {
            registries: [(HUB_HOST.to_owned(), registry)].into(),
            ..ClientConfig::default()
        }
    }

    /// Whether something is in its registry: HEAD of a path below `/v2`.
    pub(crate) fn has(&self, path: &str) -> Result<bool, Failure> {
        let request = self.asked("HEAD", &format!("/v2{path}"));
        let request = request
            .body(SendBody::none())
            .map_err(|_| bad_url(&self.url))?;
        let request = self
            .agent
            .configure_request(request)
            .timeout_global(Some(self.timeout))
            .build();
        let answer = self.agent.run(request);
        let answer = answer.map_err(|error| self.unreachable(&error))?;
        match answer.status().as_u16() {
            404 => Ok(false),
            200 => Ok(true),
            _ => Err(self.refused(answer)),
        }
    }

    /// Sends a blob or manifest into its registry: a path below `/v2`.
    pub(crate) fn push(
        &self,
        method: &str,
        path: &str,
        content_type: &str,
        length: u64,
        body: &mut dyn Read,
    ) -> Result<(), Failure> {
        let request = self
            .asked(method, &format!("/v2{path}"))
            .header(header::CONTENT_TYPE, content_type)
            .header(header::CONTENT_LENGTH, length)
            .body(SendBody::from_reader(body))
            .map_err(|_| bad_url(&self.url))?;
        self.run_long(request).map(drop)
    }

    /// GET of a path below `/api/v1`.
    pub(crate) fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, Failure> {
        self.send("GET", path, "", SendBody::none(), Some(self.timeout))
            .and_then(|answer| self.decode(answer))
    }

    /// Any method, with a body of the given content type.
    pub(crate) fn call<T: DeserializeOwned>(
        &self,
        method: &str,
        path: &str,
        content_type: &str,
        body: &[u8],
    ) -> Result<T, Failure> {
        self.send(method, path, content_type, body, Some(self.timeout))
            .and_then(|answer| self.decode(answer))
    }

    /// A method whose answer has no body worth reading.
    pub(crate) fn order(&self, method: &str, path: &str) -> Result<(), Failure> {
        self.send(method, path, "", SendBody::none(), Some(self.timeout))
            .map(drop)
    }

    /// POST of a long stream; the hub has ten minutes to answer after the last byte.
    pub(crate) fn upload<T: DeserializeOwned>(
        &self,
        path: &str,
        length: Option<u64>,
        body: &mut dyn Read,
    ) -> Result<T, Failure> {
        let mut request = self
            .request("POST", path)
            .header(header::CONTENT_TYPE, "application/x-tar");
        if let Some(length) = length {
            request = request.header(header::CONTENT_LENGTH, length);
        }
        let request = request
            .body(SendBody::from_reader(body))
            .map_err(|_| bad_url(&self.url))?;
        self.run_long(request)
            .and_then(|answer| self.decode(answer))
    }

    fn run_long(&self, request: Request<SendBody<'_>>) -> Result<Response<Body>, Failure> {
        let request = self
            .agent
            .configure_request(request)
            .timeout_per_write(Some(Duration::from_secs(60)))
            .timeout_recv_response(Some(Duration::from_secs(600)))
            .build();
        self.check(self.agent.run(request))
    }

    /// Opens a stream of server-sent events; reading from it fails after `quiet` without a byte.
    pub(crate) fn stream(&self, path: &str, quiet: Duration) -> Result<impl Read + use<>, Failure> {
        let request = self
            .request("GET", path)
            .header(header::ACCEPT, "text/event-stream");
        let request = request
            .body(SendBody::none())
            .map_err(|_| bad_url(&self.url))?;
        let request = self
            .agent
            .configure_request(request)
            .timeout_recv_response(Some(self.timeout))
            .timeout_per_read(Some(quiet))
            .build();
        Ok(self
            .check(self.agent.run(request))?
            .into_body()
            .into_reader())
    }

    fn request(&self, method: &str, path: &str) -> ureq::http::request::Builder {
        self.asked(method, &format!("/api/v1{path}"))
    }

    fn asked(&self, method: &str, path: &str) -> ureq::http::request::Builder {
        Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.url))
            .header(header::AUTHORIZATION, format!("Bearer {}", self.token))
    }

    fn send(
        &self,
        method: &str,
        path: &str,
        content_type: &str,
        body: impl AsSendBody,
        timeout: Option<Duration>,
    ) -> Result<Response<Body>, Failure> {
        let mut request = self.request(method, path);
        if !content_type.is_empty() {
            request = request.header(header::CONTENT_TYPE, content_type);
        }
        let request = request.body(body).map_err(|_| bad_url(&self.url))?;
        let request = self
            .agent
            .configure_request(request)
            .timeout_global(timeout)
            .build();
        self.check(self.agent.run(request))
    }

    fn check(
        &self,
        result: Result<Response<Body>, ureq::Error>,
    ) -> Result<Response<Body>, Failure> {
        let answer = result.map_err(|error| self.unreachable(&error))?;
        if answer.status().is_success() {
            Ok(answer)
        } else {
            Err(self.refused(answer))
        }
    }

    fn decode<T: DeserializeOwned>(&self, answer: Response<Body>) -> Result<T, Failure> {
        let bytes = answer
            .into_body()
            .into_with_config()
            .limit(MAX_ANSWER_BYTES)
            .read_to_vec()
            .map_err(|error| self.unreachable(&error))?;
        serde_json::from_slice(&bytes).map_err(|error| {
            Failure::failed(format_args!("the answer of {} is not what this version expects: {error}", self.url))
                .hint("compare `foreshore version` with the hub's, and check that the address is a Foreshore hub")
        })
    }

    fn unreachable(&self, error: &ureq::Error) -> Failure {
        let why = match error {
            ureq::Error::Timeout(_) => format!("no answer in time ({error})"),
            ureq::Error::Io(error) => error.to_string(),
            error => error.to_string(),
        };
        Failure::new(
            code::UNREACHABLE,
            format_args!("cannot reach the hub at {}: {why}", self.url),
        )
        .hint("set the address with --hub URL or FORESHORE_HUB")
    }

    /// Turns a status that is no success into words.
    fn refused(&self, answer: Response<Body>) -> Failure {
        let status = answer.status().as_u16();
        let body = answer
            .into_body()
            .into_with_config()
            .limit(MAX_PROBLEM_BYTES)
            .read_to_vec()
            .unwrap_or_default();
        let failure = match serde_json::from_slice::<Problem>(&body) {
            Ok(problem) => {
                let place = match (problem.line, problem.column) {
                    (Some(line), Some(column)) => format!("line {line}, column {column}: "),
                    _ => String::new(),
                };
                let exit = match (status, problem.code.as_str()) {
                    (400 | 413 | 415 | 422, _) => code::INPUT,
                    // The hub is there, but not now: trying again helps.
                    (_, "stopping" | "busy" | "timeout") => code::UNREACHABLE,
                    _ => code::FAILED,
                };
                let text = if problem.detail.is_empty() {
                    problem.title
                } else {
                    problem.detail
                };
                Failure::new(exit, format_args!("{place}{text}")).problem(&problem.code)
            }
            Err(_) if registry_message(&body).is_some() => {
                let exit = if (400..500).contains(&status) && !matches!(status, 401 | 403 | 429) {
                    code::INPUT
                } else {
                    code::FAILED
                };
                Failure::new(exit, registry_message(&body).unwrap_or_default())
            }
            Err(_) => {
                // A proxy says these in place of a hub that restarts.
                let away = matches!(status, 502..=504);
                let exit = if away {
                    code::UNREACHABLE
                } else {
                    code::FAILED
                };
                Failure::new(
                    exit,
                    format_args!("{} answered with status {status}", self.url),
                )
                .hint("check that the address is a Foreshore hub")
            }
        };
        match status {
            401 | 403 => failure.hint(format_args!(
                "the token came from {}; give another with --token-file or FORESHORE_TOKEN",
                self.token_source
            )),
            _ => failure,
        }
    }
}

/// What the hub says as a registry (OCI distribution specification, "Error Codes").
fn registry_message(body: &[u8]) -> Option<String> {
    let answer: serde_json::Value = serde_json::from_slice(body).ok()?;
    let message = answer["errors"][0]["message"].as_str()?;
    (!message.is_empty()).then(|| message.to_owned())
}

fn bad_url(url: &str) -> Failure {
    Failure::input(format_args!("{url:?} is not the address of a hub"))
        .hint("write http://HOST:PORT in --hub or FORESHORE_HUB")
}

fn is_loopback(uri: &Uri) -> bool {
    let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
    host == "localhost"
        || host
            .parse::<std::net::IpAddr>()
            .is_ok_and(|address| address.is_loopback())
}

/// The token and where it came from: `--token-file`, FORESHORE_TOKEN, FORESHORE_TOKEN_FILE, the default file.
fn token(file: Option<&Path>) -> Result<(String, String), Failure> {
    let file = match (
        file,
        std::env::var_os("FORESHORE_TOKEN"),
        std::env::var_os("FORESHORE_TOKEN_FILE"),
    ) {
        (Some(file), _, _) => file.to_owned(),
        (None, Some(token), _) => {
            let token = token
                .into_string()
                .map_err(|_| Failure::input("FORESHORE_TOKEN is not UTF-8"))?;
            return Ok((
                checked_token(&token, "FORESHORE_TOKEN")?,
                "FORESHORE_TOKEN".to_owned(),
            ));
        }
        (None, None, Some(file)) => PathBuf::from(file),
        (None, None, None) => PathBuf::from(DEFAULT_TOKEN_FILE),
    };
    let text = read_bounded(&file, MAX_TOKEN_BYTES).map_err(|error| {
        Failure::failed(format_args!("cannot read the API token from {}: {error}", file.display()))
            .hint("the hub writes it to the file api-token in its data directory; copy it, then name it with --token-file, FORESHORE_TOKEN_FILE or FORESHORE_TOKEN")
    })?;
    let source = file.display().to_string();
    Ok((checked_token(&text, &source)?, source))
}

fn checked_token(text: &str, source: &str) -> Result<String, Failure> {
    let token = text.trim();
    if token.is_empty() || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(Failure::failed(format_args!(
            "{source} does not hold an API token: one line of visible ASCII is expected"
        )));
    }
    Ok(token.to_owned())
}

fn read_bounded(file: &Path, max: usize) -> std::io::Result<String> {
    let mut text = String::new();
    let limit = u64::try_from(max).unwrap_or(u64::MAX);
    std::fs::File::open(file)?
        .take(limit)
        .read_to_string(&mut text)?;
    Ok(text)
}

fn trusted(file: &Path) -> Result<RootCerts, Failure> {
    let wrong = |why: String| {
        Failure::failed(format_args!(
            "cannot read certificates from {}: {why}",
            file.display()
        ))
    };
    let text = read_bounded(file, 4 << 20).map_err(|error| wrong(error.to_string()))?;
    let mut certificates = Vec::new();
    for item in parse_pem(text.as_bytes()) {
        if let PemItem::Certificate(certificate) = item.map_err(|error| wrong(error.to_string()))? {
            certificates.push(certificate);
        }
    }
    if certificates.is_empty() {
        return Err(wrong("it holds no PEM certificate".to_owned()));
    }
    Ok(RootCerts::Specific(Arc::new(certificates)))
}
