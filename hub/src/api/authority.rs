//! Who may call: operators by bearer token; at the registry also by basic authentication, as devices do there.

use axum::extract::{Request, State};
use axum::http::{HeaderMap, header};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use base64::Engine as _;
use foreshore_protocol::DeviceId;

use super::{Api, problem};
use crate::broker::HUB_NAME;
use crate::secrets::Secrets;

/// Lets only callers with the API token through.
pub async fn operators_only(State(api): State<Api>, request: Request, next: Next) -> Response {
    match bearer(request.headers()) {
        Some(token) if api.secrets.api.matches(token) => next.run(request).await,
        Some(_) => problem::unauthorized("the bearer token is not this hub's; it is in the file api-token of its data directory")
            .into_response(),
        None => problem::unauthorized("send Authorization: Bearer TOKEN; the token is in the file api-token of the hub's data directory")
            .into_response(),
    }
}

fn bearer(headers: &HeaderMap) -> Option<&str> {
    scheme(headers, "bearer")
}

fn scheme<'a>(headers: &'a HeaderMap, wanted: &str) -> Option<&'a str> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, rest) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case(wanted).then(|| rest.trim())
}

/// Who asks the registry endpoint for something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Caller {
    /// Somebody with the API token.
    Operator,
    /// A device with the join token.
    Device,
}

/// Who fetches images: an operator by bearer token, or with it as the password of any user (`docker login` knows no
/// other way); a device by its id and the join token. `None` is nobody who may.
#[must_use]
pub fn puller(secrets: &Secrets, headers: &HeaderMap) -> Option<Caller> {
    let operator = |token: &str| secrets.api.matches(token).then_some(Caller::Operator);
    if let Some(token) = bearer(headers) {
        return operator(token);
    }
    let encoded = scheme(headers, "basic").filter(|text| text.len() <= 8192)?;
    let decoded = base64::engine::general_purpose::STANDARD
        .decode(encoded)
        .ok()?;
    let text = String::from_utf8(decoded).ok()?;
    let (user, password) = text.split_once(':')?;
    operator(password).or_else(|| {
        // The hub's own name is no device's, wherever it is used.
        let device = user.parse::<DeviceId>().is_ok() && user != HUB_NAME;
        (device && secrets.join.matches(password)).then_some(Caller::Device)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secrets::Secret;

    fn secrets() -> Secrets {
        let secret = |text: &str| Secret::new(text.to_owned());
        Secrets {
            api: secret("operator"),
            join: secret("join"),
            hub: secret("hub"),
        }
    }

    fn pulls(value: &str) -> Option<Caller> {
        let mut headers = HeaderMap::new();
        headers.insert(header::AUTHORIZATION, value.parse().unwrap());
        puller(&secrets(), &headers)
    }

    #[test]
    fn devices_and_operators_pull_and_nobody_else() {
        let basic = |text: &str| {
            format!(
                "Basic {}",
                base64::engine::general_purpose::STANDARD.encode(text)
            )
        };
        assert_eq!(pulls(&basic("gateway-1:join")), Some(Caller::Device));
        for operator in [
            basic("anybody:operator"),
            basic(":operator"),
            "Bearer operator".to_owned(),
            "bearer operator".to_owned(),
        ] {
            assert_eq!(pulls(&operator), Some(Caller::Operator), "{operator}");
        }
        for bad in [
            basic("gateway-1:hub"),
            basic("foreshore-hub:join"),
            basic("Not A Device:join"),
            basic("gateway-1"),
            basic(":join"),
            "Bearer join".to_owned(),
            "Basic !!!".to_owned(),
            "Basic".to_owned(),
            "operator".to_owned(),
        ] {
            assert_eq!(pulls(&bad), None, "{bad}");
        }
        assert_eq!(puller(&secrets(), &HeaderMap::new()), None);
    }
}
