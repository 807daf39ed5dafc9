//! Ways for the fuzz targets (`fuzz/`) into what is private here. Nothing else uses them, and nothing may.

use super::auth::{self, Challenge};
use super::url::{self, Origin};

/// The challenges of a `WWW-Authenticate` header that can be met: `None` is basic authentication, else realm and service.
#[must_use]
pub fn challenges(header: &str) -> Vec<Option<(String, Option<String>)>> {
    auth::parse_challenges(header)
        .into_iter()
        .map(|challenge| match challenge {
            Challenge::Basic => None,
            Challenge::Bearer { realm, service } => Some((realm, service)),
        })
        .collect()
}

/// What is asked for a token.
#[must_use]
pub fn token_url(realm: &str, service: Option<&str>, repository: &str) -> String {
    auth::token_url(realm, service, repository)
}

/// The token in an answer.
#[must_use]
pub fn token(body: &[u8]) -> Option<String> {
    auth::parse_token(body)
}

/// Scheme, host and port of a URL as `SCHEME://HOST[:PORT]`.
#[must_use]
pub fn origin(url: &str) -> Option<String> {
    Origin::parse(url).map(|origin| origin.base())
}

/// Whether credentials of the registry at one URL are given to the token server at another. `None` when one is no URL.
#[must_use]
pub fn gives_credentials(registry: &str, realm: &str) -> Option<bool> {
    let (registry, realm) = (Origin::parse(registry)?, Origin::parse(realm)?);
    Some(auth::may_have_credentials(&registry, &realm, &[]))
}

/// Where a `Location` header of the registry at `base` leads.
#[must_use]
pub fn location(base: &str, location: &str) -> Option<String> {
    url::resolve(&Origin::parse(base)?, location)
}
