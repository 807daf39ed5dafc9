//! [`Analysis`]: a gate of every wave that looks at more than what devices say of themselves. How it is asked is the hub's
//! business.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::parse::FieldError;
use crate::id::SecretName;
use crate::quantity::Span;

/// One gate of every wave, asked again and again while the wave bakes. Names are those of Argo Rollouts.
///
/// Exactly one of `promql`, `webhook` and `control` is given. A wave passes it when it has passed `count` times and the bake
/// is over; it fails when more than `failureLimit` answers were `fail`, and the rollout pauses when more than
/// `inconclusiveLimit` were neither.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Analysis {
    /// What it is called in messages: letters, digits, `-` and `_`; no two gates have the same.
    pub name: String,
    /// A query to something that speaks Prometheus' HTTP API.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub promql: Option<PromQl>,
    /// A program of the operator's that is asked for a verdict.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub webhook: Option<Webhook>,
    /// The wave's devices beside devices of their kind that do not have the release.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub control: Option<Control>,
    /// From the beginning of the bake to the first time, and from one time to the next; 1s to 24h. Default: 60s, and 5m
    /// for `control`, which waits for what devices send.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interval: Option<Span>,
    /// So many answers must be `pass`; 1 to 1000. Default: 1.
    #[serde(default = "defaults::one", skip_serializing_if = "defaults::is_one")]
    pub count: u32,
    /// So many answers may be `fail`; at most 1000. Default: 0.
    #[serde(default, skip_serializing_if = "defaults::is_zero")]
    pub failure_limit: u32,
    /// So many answers may be neither; at most 1000. Default: 3.
    #[serde(
        default = "defaults::three",
        skip_serializing_if = "defaults::is_three"
    )]
    pub inconclusive_limit: u32,
}

impl Analysis {
    /// From one time to the next, in milliseconds.
    #[must_use]
    pub fn interval_ms(&self) -> u64 {
        let default = if self.control.is_some() { 300 } else { 60 };
        self.interval
            .unwrap_or_else(|| Span::from_secs(default))
            .millis()
    }

    /// Where it asks, if it asks somebody.
    #[must_use]
    pub fn endpoint(&self) -> Option<(&Endpoint, Option<&SecretName>)> {
        match (&self.promql, &self.webhook) {
            (Some(promql), _) => Some((&promql.url, promql.bearer_secret.as_ref())),
            (_, Some(webhook)) => Some((&webhook.url, webhook.bearer_secret.as_ref())),
            (None, None) => None,
        }
    }
}

/// `promql:` of an [`Analysis`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PromQl {
    /// The server, for example `http://prometheus:9090`; what stands below it is asked, `/api/v1/query`.
    pub url: Endpoint,
    /// An instant query that answers with one number; at most 4096 bytes. `${app}`, `${release}` (as `sha256:HEX`),
    /// `${rollout}` and `${wave}` stand for what is asked about.
    pub query: String,
    /// When that number is good: `"< 0.01"`, with `<`, `<=`, `>`, `>=`, `==` or `!=`.
    pub pass_if: PassIf,
    /// A secret of the hub that is sent as a bearer token; only over HTTPS. Default: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bearer_secret: Option<SecretName>,
}

/// `webhook:` of an [`Analysis`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Webhook {
    /// What is sent a POST with JSON, and answers `{"verdict": "pass", "message": "…"}`: `pass`, `fail` or `inconclusive`.
    pub url: Endpoint,
    /// A secret of the hub that is sent as a bearer token; only over HTTPS. Default: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bearer_secret: Option<SecretName>,
}

/// `control:` of an [`Analysis`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Control {
    /// What is compared; less is better.
    pub metric: ControlMetric,
    /// It fails only when the wave's devices have more than so many percent more; 0 to 1000. Default: 25.
    #[serde(default = "defaults::tolerance")]
    pub tolerance: u32,
    /// With fewer devices than this on either side there is no verdict; 5 to 10000. Default: 5.
    #[serde(default = "defaults::sample")]
    pub min_sample: u32,
}

/// What a [`Control`] compares, from the beacons of devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ControlMetric {
    /// Memory that all containers of a device use.
    Memory,
    /// The one-minute load average of a device.
    Load,
}

/// An HTTP URL: `http://HOST[:PORT][/PATH]` or `https://…`, without login, query and fragment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    text: String,
    secure: bool,
    host: String,
    port: u16,
}

/// Bytes of a URL.
const MAX_URL_BYTES: usize = 1024;

impl Endpoint {
    /// As written, without a slash at the end.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Whether it is HTTPS.
    #[must_use]
    pub const fn is_secure(&self) -> bool {
        self.secure
    }

    /// In lower case; an IPv6 address without its brackets.
    #[must_use]
    pub fn host(&self) -> &str {
        &self.host
    }

    /// As written, or 80 or 443.
    #[must_use]
    pub const fn port(&self) -> u16 {
        self.port
    }
}

impl FromStr for Endpoint {
    type Err = FieldError;

    fn from_str(text: &str) -> Result<Self, FieldError> {
        let parse = || {
            let (secure, rest) = match text.strip_prefix("https://") {
                Some(rest) => (true, rest),
                None => (false, text.strip_prefix("http://")?),
            };
            let plain = |byte: u8| byte.is_ascii_graphic() && !b"?#@\\\"<>^`{|}".contains(&byte);
            if text.len() > MAX_URL_BYTES || !text.bytes().all(plain) {
                return None;
            }
            let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
            let climbs = |part: &str| matches!(part, "." | "..");
            if path.split('/').any(climbs) {
                return None;
            }
            let (host, port) = match authority.strip_prefix('[') {
                Some(v6) => {
                    let (host, port) = v6.split_once(']')?;
                    let _is_one: std::net::Ipv6Addr = host.parse().ok()?;
                    (host, port)
                }
                None => {
                    let (host, port) =
                        authority.split_at(authority.find(':').unwrap_or(authority.len()));
                    let named = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
                    if host.is_empty() || !host.bytes().all(named) {
                        return None;
                    }
                    (host, port)
                }
            };
            let port = match port.strip_prefix(':') {
                Some(port) if port.bytes().all(|byte| byte.is_ascii_digit()) => {
                    port.parse().ok().filter(|port| *port > 0)?
                }
                None if port.is_empty() => {
                    if secure {
                        443
                    } else {
                        80
                    }
                }
                Some(_) | None => return None,
            };
            Some(Self {
                text: text.trim_end_matches('/').to_owned(),
                secure,
                host: host.to_ascii_lowercase(),
                port,
            })
        };
        parse().ok_or_else(|| FieldError::Url(text.chars().take(120).collect()))
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// When a number is good: a comparison and a number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PassIf {
    comparison: Comparison,
    /// A finite number as it was written.
    limit: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Comparison {
    Less,
    AtMost,
    More,
    AtLeast,
    Equal,
    Unequal,
}

impl Comparison {
    /// Those that begin with another come first.
    const ALL: [(&'static str, Self); 6] = [
        ("<=", Self::AtMost),
        (">=", Self::AtLeast),
        ("==", Self::Equal),
        ("!=", Self::Unequal),
        ("<", Self::Less),
        (">", Self::More),
    ];
}

impl PassIf {
    /// Whether `value` is good; `None` when it is not a number.
    #[must_use]
    #[expect(clippy::float_cmp, reason = "whoever writes == means it")]
    pub fn holds(&self, value: f64) -> Option<bool> {
        let limit: f64 = self.limit.parse().ok()?;
        let holds = match self.comparison {
            Comparison::Less => value < limit,
            Comparison::AtMost => value <= limit,
            Comparison::More => value > limit,
            Comparison::AtLeast => value >= limit,
            Comparison::Equal => value == limit,
            Comparison::Unequal => value != limit,
        };
        (!value.is_nan()).then_some(holds)
    }
}

impl FromStr for PassIf {
    type Err = FieldError;

    fn from_str(text: &str) -> Result<Self, FieldError> {
        let wrong = || FieldError::PassIf(text.chars().take(60).collect());
        let trimmed = text.trim();
        let (sign, comparison) = Comparison::ALL
            .into_iter()
            .find(|(sign, _)| trimmed.starts_with(sign))
            .ok_or_else(wrong)?;
        let limit = trimmed[sign.len()..].trim();
        let plain = |byte: u8| byte.is_ascii_digit() || b"+-.eE".contains(&byte);
        let is_number = limit.len() <= 40
            && limit.bytes().all(plain)
            && limit.parse().is_ok_and(|limit: f64| limit.is_finite());
        if !is_number {
            return Err(wrong());
        }
        Ok(Self {
            comparison,
            limit: limit.to_owned(),
        })
    }
}

impl fmt::Display for PassIf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sign = Comparison::ALL
            .into_iter()
            .find(|(_, comparison)| *comparison == self.comparison)
            .map_or("", |(sign, _)| sign);
        write!(f, "{sign} {}", self.limit)
    }
}

/// What a query may ask about.
pub(super) const PLACEHOLDERS: [&str; 4] = ["app", "release", "rollout", "wave"];

impl PromQl {
    /// The query with its placeholders filled in; `value` is asked for each of them by name.
    #[must_use]
    pub fn filled(&self, value: impl Fn(&str) -> String) -> String {
        PLACEHOLDERS.iter().fold(self.query.clone(), |query, name| {
            query.replace(&format!("${{{name}}}"), &value(name))
        })
    }
}

mod defaults {
    //! What a missing key means. Changing one changes what new manifests mean; say so in the change log.

    pub(super) const fn one() -> u32 {
        1
    }
    pub(super) const fn three() -> u32 {
        3
    }
    pub(super) const fn tolerance() -> u32 {
        25
    }
    pub(super) const fn sample() -> u32 {
        5
    }
    #[expect(
        clippy::trivially_copy_pass_by_ref,
        reason = "serde asks with a reference"
    )]
    pub(super) const fn is_zero(number: &u32) -> bool {
        *number == 0
    }
    #[expect(
        clippy::trivially_copy_pass_by_ref,
        reason = "serde asks with a reference"
    )]
    pub(super) const fn is_one(number: &u32) -> bool {
        *number == one()
    }
    #[expect(
        clippy::trivially_copy_pass_by_ref,
        reason = "serde asks with a reference"
    )]
    pub(super) const fn is_three(number: &u32) -> bool {
        *number == three()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_plain() {
        for (text, host, port) in [
            ("http://prom:9090", "prom", 9090),
            (
                "https://Metrics.example.com/mimir/",
                "metrics.example.com",
                443,
            ),
            ("http://[::1]:1/x", "::1", 1),
            ("http://10.0.0.1", "10.0.0.1", 80),
        ] {
            let url: Endpoint = text.parse().unwrap();
            assert_eq!((url.host(), url.port()), (host, port), "{text}");
            assert!(!url.as_str().ends_with('/'));
        }
        for bad in [
            "",
            "prom:9090",
            "ftp://prom",
            "http://",
            "http:///x",
            "http://user@prom",
            "http://prom:0",
            "http://prom:99999",
            "http://prom:+1",
            "http://prom:",
            "http://prom/?q",
            "http://prom/#f",
            "http://prom/../x",
            "http://pr om",
            "http://[::1",
            "http://[prom]",
            "http://prom\\@evil",
            "http://prom\n",
        ] {
            assert!(bad.parse::<Endpoint>().is_err(), "{bad}");
        }
    }

    #[test]
    fn conditions_compare_and_nan_is_nothing() {
        for (text, value, holds) in [
            ("< 0.01", 0.009, true),
            ("<0.01", 0.01, false),
            ("<= 1e-2", 0.01, true),
            ("> -1", 0.0, true),
            (">= 5", 5.0, true),
            ("== 0", 0.0, true),
            ("!= 0", 0.0, false),
            ("< 1", f64::INFINITY, false),
        ] {
            let condition: PassIf = text.parse().unwrap();
            assert_eq!(condition.holds(value), Some(holds), "{text} {value}");
            assert_eq!(condition.holds(f64::NAN), None);
            let again: PassIf = condition.to_string().parse().unwrap();
            assert_eq!(again, condition);
        }
        for bad in [
            "", "1", "<", "< x", "< inf", "< nan", "=< 1", "< 1 2", "~ 1",
        ] {
            assert!(bad.parse::<PassIf>().is_err(), "{bad}");
        }
    }
}
