//! What a registry answers to the uninvited: `WWW-Authenticate`, token servers, redirects.

use foreshore_images::registry::fuzz::{
    challenges, gives_credentials, location, origin, token, token_url,
};

use crate::{accepted, memory};

/// Reached by TLS.
const REGISTRY: &str = "https://registry.example:5000";

/// One header, also taken as a token server's answer and as a redirect.
///
/// # Panics
/// When what it says is understood in two ways, or could make a request to somebody else than was judged.
pub fn run(bytes: &[u8]) {
    if let Some(token) = memory::within(64 * bytes.len() + 4096, || token(bytes)) {
        accepted();
        // It stands in a header of the next request.
        assert!(!token.is_empty() && token.bytes().all(|byte| byte.is_ascii_graphic()));
    }
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    redirect(text);
    let found = memory::within(256 * text.len() + 4096, || challenges(text));
    // A challenge has at least five letters and something after them.
    assert!(found.len() <= text.len().div_ceil(6));
    for challenge in &found {
        let Some((realm, service)) = challenge else {
            continue;
        };
        accepted();
        judge(realm, service.as_deref());
    }
    let again: Vec<String> = found.iter().map(|one| written(one.as_ref())).collect();
    let again = again.join(", ");
    if again.len() <= 8 << 10 {
        assert_eq!(challenges(&again), found, "{again}");
    }
}

/// Who is asked for a token is who was judged, and is asked for no more than pulling.
fn judge(realm: &str, service: Option<&str>) {
    let Some(asked) = origin(realm) else {
        return;
    };
    let url = token_url(realm, service, "acme/modbus");
    assert_eq!(
        origin(&url),
        Some(asked.clone()),
        "{realm:?} became {url:?}"
    );
    let added = url.strip_prefix(realm).expect("the realm stays as it is");
    let safe = |byte: u8| byte.is_ascii_alphanumeric() || b"?&=%-._~".contains(&byte);
    assert!(added.bytes().all(safe), "{added}");
    assert!(
        added.ends_with("scope=repository%3Aacme%2Fmodbus%3Apull"),
        "{added}"
    );
    if gives_credentials(REGISTRY, realm) == Some(true) {
        let host = asked
            .strip_prefix("https://")
            .expect("they never go in the clear");
        let host = host.rsplit_once(':').map_or(host, |(host, _)| host);
        let ours = ["registry.example"].contains(&host) || host.ends_with(".registry.example");
        assert!(ours, "{realm:?} is given the credentials");
    }
}

/// A redirect within the registry stays there.
fn redirect(text: &str) {
    let Some(leads) = location(REGISTRY, text) else {
        return;
    };
    assert!(!leads.contains('#'));
    if text.starts_with('/') && !text.starts_with("//") && origin(&leads).is_some() {
        assert_eq!(origin(&leads).as_deref(), Some(REGISTRY), "{text:?}");
    }
}

fn written(challenge: Option<&(String, Option<String>)>) -> String {
    let quoted = |text: &str| text.replace('\\', "\\\\").replace('"', "\\\"");
    match challenge {
        None => "Basic".to_owned(),
        Some((realm, None)) => format!("Bearer realm=\"{}\"", quoted(realm)),
        Some((realm, Some(service))) => {
            format!(
                "Bearer realm=\"{}\",service=\"{}\"",
                quoted(realm),
                quoted(service)
            )
        }
    }
}
