//! What a registry asks for before it answers: the `WWW-Authenticate` header, and whom credentials are given to.
//!
//! Basic authentication is RFC 7617; bearer tokens are as in the distribution project, "Token Authentication
//! Specification". Nothing here talks to the network.

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde::Deserialize;

use super::url::Origin;

/// The most bytes of a token server's answer that are read.
pub(super) const TOKEN_BYTES_MAX: u64 = 64 << 10;
/// The longest `WWW-Authenticate` header that is looked at, in bytes.
const CHALLENGE_BYTES_MAX: usize = 8 << 10;

/// One way in that a registry offers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Challenge {
    Basic,
    Bearer {
        /// URL of the token server.
        realm: String,
        /// What the token server calls the registry.
        service: Option<String>,
    },
}

/// Every challenge of a `WWW-Authenticate` header that this client can meet; the rest is passed over
/// (RFC 9110, section 11.6.1).
pub(super) fn parse_challenges(header: &str) -> Vec<Challenge> {
    let mut found = Vec::new();
    if header.len() > CHALLENGE_BYTES_MAX {
        return found;
    }
    let mut scheme = String::new();
    let mut parameters: Vec<(String, String)> = Vec::new();
    let mut rest = header;
    loop {
        // "=" is what a token68 such as Negotiate's ends in.
        rest = rest.trim_start_matches([' ', '\t', ',', '=']);
        let end = rest.find(|c: char| !is_token_char(c)).unwrap_or(rest.len());
        if end == 0 {
            break;
        }
        let word = &rest[..end];
        let after = rest[end..].trim_start_matches([' ', '\t']);
        if let Some(value) = after.strip_prefix('=').filter(|_| !scheme.is_empty()) {
            let Some((value, tail)) = parameter_value(value.trim_start_matches([' ', '\t'])) else {
                break;
            };
            parameters.push((word.to_ascii_lowercase(), value));
            rest = tail;
        } else {
            found.extend(challenge(&scheme, &parameters));
            scheme = word.to_ascii_lowercase();
            parameters.clear();
            rest = after;
        }
    }
    found.extend(challenge(&scheme, &parameters));
    found
}

fn challenge(scheme: &str, parameters: &[(String, String)]) -> Option<Challenge> {
    let value = |name: &str| {
        parameters
            .iter()
            .find(|(key, _)| key == name)
            .map(|(_, value)| value.clone())
    };
    match scheme {
        "basic" => Some(Challenge::Basic),
        "bearer" => Some(Challenge::Bearer {
            realm: value("realm")?,
            service: value("service"),
        }),
        _ => None,
    }
}

/// A token or quoted string, and what comes after it.
fn parameter_value(text: &str) -> Option<(String, &str)> {
    let Some(quoted) = text.strip_prefix('"') else {
        let end = text.find(|c: char| !is_token_char(c)).unwrap_or(text.len());
        return Some((text[..end].to_owned(), &text[end..]));
    };
    let mut value = String::new();
    let mut chars = quoted.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Some((value, &quoted[at + 1..])),
            '\\' => value.push(chars.next()?.1),
            c => value.push(c),
        }
    }
    None
}

fn is_token_char(c: char) -> bool {
    c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~/:?".contains(c)
}

/// The value of an `Authorization` header.
pub(super) fn basic(username: &str, password: &str) -> String {
    format!(
        "Basic {}",
        BASE64_STANDARD.encode(format!("{username}:{password}"))
    )
}

/// The URL that gives a token to pull from `repository`.
///
/// The scope that the registry put into its challenge is not used: it could ask for more than this client needs.
pub(super) fn token_url(realm: &str, service: Option<&str>, repository: &str) -> String {
    let mut url = realm.to_owned();
    url.push(if realm.contains('?') { '&' } else { '?' });
    if let Some(service) = service {
        url += &format!("service={}&", percent_encoded(service));
    }
    url += &format!("scope={}", percent_encoded(&scope(repository)));
    url
}

/// What is sent to have a refresh token changed for one to pull from `repository` (RFC 6749, section 6; distribution
/// project, "Oauth2 Token Authentication").
pub(super) fn token_form(
    refresh_token: &str,
    service: Option<&str>,
    repository: &str,
) -> [(&'static str, String); 5] {
    [
        ("grant_type", "refresh_token".to_owned()),
        ("service", service.unwrap_or_default().to_owned()),
        ("client_id", "foreshore".to_owned()),
        ("scope", scope(repository)),
        ("refresh_token", refresh_token.to_owned()),
    ]
}

fn scope(repository: &str) -> String {
    format!("repository:{repository}:pull")
}

fn percent_encoded(text: &str) -> String {
    text.bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                char::from(byte).to_string()
            }
            other => format!("%{other:02X}"),
        })
        .collect()
}

/// The token in a token server's answer, if there is one that can stand in a header.
pub(super) fn parse_token(body: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct Answer {
        #[serde(default)]
        token: Option<String>,
        #[serde(default)]
        access_token: Option<String>,
    }
    let answer: Answer = serde_json::from_slice(body).ok()?;
    let filled = |token: Option<String>| token.filter(|token| !token.is_empty());
    filled(answer.token)
        .or_else(|| filled(answer.access_token))
        .filter(|token| token.bytes().all(|byte| byte.is_ascii_graphic()))
}

/// Whether the token server may be given the credentials of the registry.
///
/// The realm is the registry's own word, so a hostile or hijacked one could name any host. Given: the registry's
/// own host name on any port, its parent or child domain (`gitlab.com` for `registry.gitlab.com`), and the hosts
/// that are configured; and never in the clear if the registry itself is reached by TLS.
pub(super) fn may_have_credentials(
    registry: &Origin,
    realm: &Origin,
    token_hosts: &[String],
) -> bool {
    if registry.is_https() && !realm.is_https() {
        return false;
    }
    let (ours, theirs) = (registry.hostname(), realm.hostname());
    let below = |child: &str, parent: &str| {
        parent.contains('.')
            && !parent.ends_with(|c: char| c.is_ascii_digit())
            && child
                .strip_suffix(parent)
                .is_some_and(|rest| rest.ends_with('.'))
    };
    ours == theirs
        || below(&ours, &theirs)
        || below(&theirs, &ours)
        || token_hosts.iter().any(|host| {
            let host = host.to_ascii_lowercase();
            host == theirs || host == realm.authority()
        })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bearer(realm: &str, service: Option<&str>) -> Challenge {
        Challenge::Bearer {
            realm: realm.to_owned(),
            service: service.map(str::to_owned),
        }
    }

    #[test]
    fn challenges() {
        let docker = r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:a/b:pull,push""#;
        assert_eq!(
            parse_challenges(docker),
            [bearer(
                "https://auth.docker.io/token",
                Some("registry.docker.io")
            )]
        );
        assert_eq!(
            parse_challenges("Basic realm=\"x, Bearer y\""),
            [Challenge::Basic]
        );
        assert_eq!(parse_challenges("BASIC"), [Challenge::Basic]);
        assert_eq!(
            parse_challenges("Negotiate abc==, bearer Realm = \"https://t/\\\"q\", Basic realm=x"),
            [bearer("https://t/\"q", None), Challenge::Basic]
        );
        assert_eq!(
            parse_challenges("Bearer realm=https://t/x?y"),
            [bearer("https://t/x?y", None)]
        );
        for nothing in [
            "",
            ",,",
            "Bearer",
            "Bearer service=\"x\"",
            "Digest realm=\"x\"",
            "Bearer realm=\"open",
            "=",
        ] {
            assert_eq!(parse_challenges(nothing), [], "{nothing}");
        }
        assert_eq!(parse_challenges(&"Basic, ".repeat(10_000)), [], "too long");
    }

    #[test]
    fn token_urls_and_answers() {
        assert_eq!(
            token_url("https://t/token", Some("my registry"), "a/b"),
            "https://t/token?service=my%20registry&scope=repository%3Aa%2Fb%3Apull"
        );
        assert_eq!(
            token_url("https://t/?x=1", None, "a"),
            "https://t/?x=1&scope=repository%3Aa%3Apull"
        );
        assert_eq!(
            parse_token(br#"{"token":"t1","access_token":"t2","expires_in":60}"#).as_deref(),
            Some("t1")
        );
        assert_eq!(
            parse_token(br#"{"access_token":"t2"}"#).as_deref(),
            Some("t2")
        );
        for bad in [
            &b"{}"[..],
            b"<html>",
            br#"{"token":""}"#,
            br#"{"token":"a\nb"}"#,
            br#"{"token":"a b"}"#,
        ] {
            assert_eq!(parse_token(bad), None);
        }
    }

    #[test]
    fn whom_credentials_are_given_to() {
        let origin = |url: &str| Origin::parse(url).unwrap();
        for (registry, realm, given) in [
            ("https://ghcr.io", "https://ghcr.io", true),
            ("https://registry.gitlab.com", "https://gitlab.com", true),
            ("https://acme.lan:5000", "https://acme.lan:5001", true),
            ("https://acme.lan", "https://auth.acme.lan", true),
            ("https://acme.lan", "http://acme.lan", false),
            ("http://127.0.0.1:5000", "http://127.0.0.1:5001", true),
            ("http://127.0.0.1:5000", "http://1.0.0.1:5001", false),
            ("http://0.0.1", "http://127.0.0.1", false),
            ("https://ghcr.io", "https://evil.io", false),
            ("https://ghcr.io", "https://notghcr.io", false),
            ("https://ghcr.io", "https://io", false),
            ("https://acme.lan", "https://tokens.example", true),
        ] {
            let hosts = ["tokens.example".to_owned()];
            assert_eq!(
                may_have_credentials(&origin(registry), &origin(realm), &hosts),
                given,
                "{registry} {realm}"
            );
        }
    }

    proptest! {
        #[test]
        fn no_header_panics(text in "\\PC{0,200}") {
            let _ = parse_challenges(&text);
            let _ = parse_token(text.as_bytes());
        }

        #[test]
        fn no_nearly_good_header_panics(text in "(Bearer|Basic|realm|service|=|\"|,| |\\\\|é|x){0,30}") {
            let _ = parse_challenges(&text);
        }
    }
}
