//! Who may call: operators by bearer token, devices by basic authentication where they fetch images.

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

/// Whether a caller may fetch images: an operator by bearer token, or as the password of any user; a device by its
/// id and the join token.
#[must_use]
pub fn may_pull(secrets: &Secrets, headers: &HeaderMap) -> bool {
    if let Some(token) = bearer(headers) {
        return secrets.api.matches(token);
    }
    let Some(encoded) = scheme(headers, "basic").filter(|text| text.len() <= 8192) else {
        return false;
    };
    let Ok(decoded) = base64::engine::general_purpose::STANDARD.decode(encoded) else {
        return false;
    };
    let Ok(text) = String::from_utf8(decoded) else {
        return false;
    };
    let Some((user, password)) = text.split_once(':') else {
        return false;
    };
    // The hub's own name is no device's, wherever it is used.
    let device = user.parse::<DeviceId>().is_ok() && user != HUB_NAME;
    let device = device && secrets.join.matches(password);
    device || secrets.api.matches(password)
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

    fn pulls(value: &str) -> bool {
        let mut headers = HeaderMap::new();
        headers.insert(header::AUTHORIZATION, value.parse().unwrap());
        may_pull(&secrets(), &headers)
    }

    #[test]
    fn devices_and_operators_pull_and_nobody_else() {
        let basic = |text: &str| {
            format!(
                "Basic {}",
                base64::engine::general_purpose::STANDARD.encode(text)
            )
        };
        assert!(pulls(&basic("gateway-1:join")) && pulls(&basic("anybody:operator")));
        assert!(pulls("Bearer operator") && pulls("bearer operator"));
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
            assert!(!pulls(&bad), "{bad}");
        }
        assert!(!may_pull(&secrets(), &HeaderMap::new()));
    }
}
