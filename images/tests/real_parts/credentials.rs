//! Whom passwords and tokens are given to, and what comes of token servers that misbehave.

use std::sync::Arc;
use std::time::{Duration, Instant};

use foreshore_images::Platform;
use foreshore_images::registry::{Client, ClientConfig, Credentials, FetchError, RegistryConfig};
use foreshore_images::store::Store;

use crate::bed::TIMEOUTS;
use crate::hostile::{chain, client_for, honest, reference, simple};
use crate::server::{Reply, Request, Server, ok, status, with_header};

fn credentials() -> RegistryConfig {
    RegistryConfig {
        credentials: Some(Credentials::new("user", "hunter2")),
        ..RegistryConfig::default()
    }
}

#[test]
fn a_password_goes_to_the_registry_only() {
    let (blobs, image, layer) = simple();
    let content = blobs.0[&layer].clone();
    let cdn = Server::start("127.0.0.2", move |_| ok("x/y", content.clone()));
    let location = format!("http://{}/somewhere", cdn.host);
    let server = Server::start("127.0.0.1", move |request| match &request.authorization {
        None => with_header(401, "WWW-Authenticate", "Basic realm=\"x\""),
        Some(_) if request.path.contains(&layer.hex()) => with_header(307, "Location", &location),
        Some(_) => honest(&blobs, request),
    });
    let plain = RegistryConfig {
        plain_http: true,
        ..RegistryConfig::default()
    };
    let registries = [
        (
            server.host.clone(),
            RegistryConfig {
                plain_http: true,
                ..credentials()
            },
        ),
        // Plain HTTP is fine there; credentials still are not.
        (cdn.host.clone(), plain),
    ];
    let client = Client::new(ClientConfig {
        registries: registries.into(),
        timeouts: TIMEOUTS,
        ..ClientConfig::default()
    })
    .unwrap();
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path()).unwrap();
    store
        .stage(
            &client,
            &reference(&server, image),
            &Platform::linux("amd64", ""),
            &mut |_| {},
        )
        .unwrap();
    assert!(
        server
            .requests()
            .iter()
            .any(|request| request.authorization.as_deref() == Some("Basic dXNlcjpodW50ZXIy"))
    );
    assert_eq!(cdn.requests().len(), 1);
    assert_eq!(cdn.requests()[0].authorization, None);
}

#[test]
fn tokens_are_fetched_used_and_fetched_again_when_they_are_old() {
    let (blobs, image, _) = simple();
    let age = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let issued = Arc::clone(&age);
    let server = Server::start("127.0.0.1", move |request| {
        if request.path.starts_with("/token") {
            let number = issued.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
            return ok(
                "application/json",
                format!(r#"{{"access_token":"t{number}"}}"#).into_bytes(),
            );
        }
        // The first token is good for one request only.
        let good = match request.authorization.as_deref() {
            Some("Bearer t0") => request.path.contains("/manifests/"),
            Some("Bearer t1") => true,
            _ => false,
        };
        if good {
            return honest(&blobs, request);
        }
        with_header(
            401,
            "WWW-Authenticate",
            "Bearer realm=\"REALM\",service=\"s\",scope=\"repository:other:push\"",
        )
    });
    // The server learns its own address only here: a proxy in front tells the realm.
    let upstream = server.host.clone();
    let realm = format!("http://{upstream}/token");
    let front = front_of(&upstream, &realm);
    let client = client_for(&front.host, credentials());
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path()).unwrap();
    store
        .stage(
            &client,
            &reference(&front, image),
            &Platform::linux("amd64", ""),
            &mut |_| {},
        )
        .unwrap();
    let tokens: Vec<Request> = server
        .requests()
        .into_iter()
        .filter(|request| request.path.starts_with("/token"))
        .collect();
    assert_eq!(tokens.len(), 2);
    for token in tokens {
        assert_eq!(
            token.path,
            "/token?service=s&scope=repository%3Aacme%2Fapp%3Apull"
        );
        assert_eq!(
            token.authorization.as_deref(),
            Some("Basic dXNlcjpodW50ZXIy")
        );
    }
}

#[test]
fn identity_tokens_are_changed_for_others_and_registry_tokens_used_as_they_are() {
    let (blobs, image, _) = simple();
    let tokens = Server::start("127.0.0.1", |request| {
        let form = "grant_type=refresh_token&service=s&client_id=foreshore&scope=repository%3Aacme%2Fapp%3Apull&refresh_token=re%2Ffresh";
        if request.path == "/token" && request.body == form {
            ok("application/json", br#"{"access_token":"t"}"#.to_vec())
        } else {
            status(400)
        }
    });
    let challenge = format!(
        "Bearer realm=\"http://{}/token\",service=\"s\"",
        tokens.host
    );
    let server = Server::start("127.0.0.1", move |request| {
        if request.authorization.as_deref() == Some("Bearer t") {
            honest(&blobs, request)
        } else {
            with_header(401, "WWW-Authenticate", &challenge)
        }
    });
    let with = |credentials| {
        let client = client_for(
            &server.host,
            RegistryConfig {
                credentials: Some(credentials),
                ..RegistryConfig::default()
            },
        );
        client.resolve(&reference(&server, image))
    };

    with(Credentials::refresh_token("re/fresh")).unwrap();
    assert_eq!(tokens.requests().len(), 1);
    assert_eq!(tokens.requests()[0].authorization, None);

    let error = with(Credentials::refresh_token("stale")).unwrap_err();
    assert!(chain(&error).contains("HTTP 400"), "{}", chain(&error));
    assert!(!chain(&error).contains("stale"));

    with(Credentials::access_token("t")).unwrap();
    assert_eq!(tokens.requests().len(), 2, "nobody was asked for it");
    let error = with(Credentials::access_token("old")).unwrap_err();
    assert!(
        matches!(error, FetchError::Denied { .. }),
        "{}",
        chain(&error)
    );
}

/// Passes requests on and writes the realm into challenges.
fn front_of(upstream: &str, realm: &str) -> Server {
    let (upstream, realm) = (upstream.to_owned(), realm.to_owned());
    Server::start("127.0.0.1", move |request| {
        let agent: ureq::Agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .proxy(None)
            .build()
            .into();
        let mut call = agent.get(format!("http://{upstream}{}", request.path));
        if let Some(authorization) = &request.authorization {
            call = call.header("Authorization", authorization);
        }
        let mut response = call.call().unwrap();
        let headers = ["content-type", "www-authenticate"]
            .iter()
            .filter_map(|name| {
                let value = response
                    .headers()
                    .get(*name)?
                    .to_str()
                    .ok()?
                    .replace("REALM", &realm);
                Some(((*name).to_owned(), value))
            })
            .collect();
        let status = response.status().as_u16();
        Reply::Full(status, headers, response.body_mut().read_to_vec().unwrap())
    })
}

#[test]
fn a_realm_that_fishes_for_passwords_gets_none() {
    let thief = Server::start("127.0.0.2", |_| {
        ok("application/json", br#"{"token":"t"}"#.to_vec())
    });
    let cases = [
        (format!("http://{}/token", thief.host), "plain HTTP"),
        (format!("https://{}/token", thief.host), "token_hosts"),
        ("file:///etc/passwd".to_owned(), "not a URL"),
        (format!("http://user:pass@{}/", thief.host), "not a URL"),
    ];
    for (realm, words) in cases {
        let (_, image, _) = simple();
        let challenge = format!("Bearer realm=\"{realm}\"");
        let server = Server::start("127.0.0.1", move |_| {
            with_header(401, "WWW-Authenticate", &challenge)
        });
        let client = client_for(&server.host, credentials());
        let error = client.resolve(&reference(&server, image)).unwrap_err();
        let text = chain(&error);
        assert!(matches!(error, FetchError::Token { .. }), "{realm}: {text}");
        assert!(text.contains(words), "{realm}: {text}");
        assert!(!text.contains("hunter2"), "{text}");
    }
    assert!(thief.requests().is_empty());
}

#[test]
fn token_servers_that_misbehave() {
    type Answer = fn() -> Reply;
    let cases: &[(&str, Answer, &str)] = &[
        (
            "no token",
            || ok("application/json", b"{}".to_vec()),
            "without a token",
        ),
        (
            "a page",
            || ok("text/html", b"<html>".to_vec()),
            "without a token",
        ),
        (
            "a book",
            || ok("application/json", vec![b' '; 1 << 20]),
            "more than 65536 bytes",
        ),
        ("endless", || Reply::Endless, "more than 65536 bytes"),
        (
            "header injection",
            || ok("application/json", br#"{"token":"a\r\nX: y"}"#.to_vec()),
            "without a token",
        ),
        ("refuses", || status(401), "refuses"),
        ("broken", || status(503), "HTTP 503"),
        ("hangs", || Reply::Hang, "in time"),
        (
            "redirects",
            || with_header(302, "Location", "http://127.0.0.2/"),
            "HTTP 302",
        ),
    ];
    for (name, answer, words) in cases {
        let (_, image, _) = simple();
        let answer = *answer;
        let tokens = Server::start("127.0.0.1", move |_| answer());
        let challenge = format!(
            "Bearer realm=\"http://{}/token\",service=\"s\"",
            tokens.host
        );
        let server = Server::start("127.0.0.1", move |_| {
            with_header(401, "WWW-Authenticate", &challenge)
        });
        let start = Instant::now();
        let error = client_for(&server.host, RegistryConfig::default())
            .resolve(&reference(&server, image))
            .unwrap_err();
        assert!(chain(&error).contains(words), "{name}: {}", chain(&error));
        assert!(start.elapsed() < Duration::from_secs(20), "{name}");
    }
}
