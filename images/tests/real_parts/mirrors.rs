//! Mirrors and proxies: asked in order, believed as little as registries, given nothing that is not theirs.

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use foreshore_images::registry::{Client, ClientConfig, Credentials, RegistryConfig, Retry};
use foreshore_images::store::Store;
use foreshore_images::{Digest, Fault, Platform, Reference};

use crate::bed::TIMEOUTS;
use crate::compose::{Blobs, Layer, digest};
use crate::hostile::{chain, honest, simple};
use crate::server::{Reply, Request, Server, ok, ranged, status, with_header};

/// `upstream` as `registry.example`, which no name server knows, behind mirrors.
fn client(upstream: &Server, mirrors: Vec<String>, more: &[(String, RegistryConfig)]) -> Client {
    let registry = RegistryConfig {
        url: Some(format!("http://{}", upstream.host)),
        credentials: Some(Credentials::new("me", "upstream-password")),
        mirrors,
        ..RegistryConfig::default()
    };
    let mut registries: BTreeMap<_, _> = more.iter().cloned().collect();
    registries.insert("registry.example".to_owned(), registry);
    Client::new(ClientConfig {
        registries,
        timeouts: TIMEOUTS,
        ..ClientConfig::default()
    })
    .unwrap()
}

fn stage(client: &Client, image: Digest) -> Result<(), foreshore_images::store::StageError> {
    let root = tempfile::tempdir().unwrap();
    let reference: Reference = format!("registry.example/acme/app@{image}")
        .parse()
        .unwrap();
    let platform = Platform::linux("amd64", "");
    let store = Store::open(root.path()).unwrap();
    store
        .stage(client, &reference, &platform, &mut |_| {})
        .map(drop)
}

#[test]
fn mirrors_are_asked_in_order_and_the_registry_last() {
    let (blobs, image, layer) = simple();
    let nobody = {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap()
    };
    let served = blobs.clone();
    let upstream = Server::start("127.0.0.1", move |request| honest(&served, request));
    let empty = Server::start("127.0.0.1", |_| status(404));
    // Has the manifests under a path of its own, and a wrong layer.
    let (served, hex) = (blobs.clone(), layer.hex());
    let wrong = Server::start("127.0.0.1", move |request| {
        assert!(
            request.path.starts_with("/v2/cache/x/acme/app/"),
            "{}",
            request.path
        );
        if request.path.contains(&hex) {
            let length = match honest(&served, request) {
                Reply::Full(_, _, body) => body.len(),
                _ => 0,
            };
            return ok("application/octet-stream", vec![b'x'; length]);
        }
        honest(&served, request)
    });
    let mirrors = vec![
        format!("http://{nobody}"),
        format!("http://{}", empty.host),
        format!("http://{}/cache/x/", wrong.host),
    ];
    let behind = client(&upstream, mirrors, &[]);
    stage(&behind, image).unwrap();
    assert!(empty.count("/manifests/") == 1 && wrong.count("/manifests/") == 1);
    assert_eq!(upstream.count("/manifests/"), 0, "a mirror had it");
    assert_eq!(upstream.count(&layer.hex()), 1, "the mirror's was wrong");

    // A mirror that has all spares the registry.
    let before = upstream.requests().len();
    let served = blobs.clone();
    let good = Server::start("127.0.0.1", move |request| honest(&served, request));
    stage(
        &client(&upstream, vec![format!("http://{}", good.host)], &[]),
        image,
    )
    .unwrap();
    assert_eq!(upstream.requests().len(), before);

    // When nobody has it, the registry's own word counts.
    let gone = Server::start("127.0.0.1", |_| status(404));
    let error = stage(&client(&gone, vec![format!("http://{nobody}")], &[]), image).unwrap_err();
    assert_eq!(error.fault(), Fault::NotFound, "{}", chain(&error));
    assert!(chain(&error).contains("registry.example"));
}

#[test]
fn a_mirror_gets_its_own_credentials_and_nobody_else_s() {
    let (blobs, image, _) = simple();
    let challenge = |blobs: Blobs| {
        move |request: &Request| {
            if request.authorization.is_none() {
                return with_header(401, "WWW-Authenticate", "Basic realm=\"x\"");
            }
            honest(&blobs, request)
        }
    };
    let upstream = Server::start("127.0.0.1", challenge(blobs.clone()));
    let mirror = Server::start("127.0.0.1", challenge(blobs));
    let url = format!("http://{}", mirror.host);
    // Without any the mirror is passed over.
    stage(&client(&upstream, vec![url.clone()], &[]), image).unwrap();
    let said = |server: &Server| -> Vec<String> {
        let requests = server.requests();
        let mut said: Vec<String> = requests
            .into_iter()
            .filter_map(|request| request.authorization)
            .collect();
        said.dedup();
        said
    };
    assert_eq!(said(&mirror), Vec::<String>::new());
    assert_eq!(said(&upstream).len(), 1);
    let own = RegistryConfig {
        plain_http: true,
        credentials: Some(Credentials::new("me", "mirror-password")),
        ..RegistryConfig::default()
    };
    let before = upstream.requests().len();
    stage(
        &client(&upstream, vec![url], &[(mirror.host.clone(), own)]),
        image,
    )
    .unwrap();
    assert_eq!(upstream.requests().len(), before);
    assert_eq!(said(&mirror).len(), 1);
    assert_ne!(said(&mirror), said(&upstream));
}

#[test]
fn https_goes_through_the_proxy_unless_its_host_is_excepted() {
    let (_, image, _) = simple();
    let proxy = Server::start("127.0.0.1", |_| status(403));
    let try_it = |no_proxy: &[&str]| {
        let client = Client::new(ClientConfig {
            timeouts: TIMEOUTS,
            proxy: Some(format!("http://me:secret-password@{}", proxy.host)),
            no_proxy: no_proxy.iter().map(|host| (*host).to_owned()).collect(),
            ..ClientConfig::default()
        })
        .unwrap();
        let reference: Reference = format!("registry.invalid/app@{image}").parse().unwrap();
        client.resolve(&reference).unwrap_err()
    };
    let error = try_it(&[]);
    assert_eq!(error.fault(), Fault::Unreachable);
    assert!(
        !chain(&error).contains("secret-password"),
        "{}",
        chain(&error)
    );
    assert_eq!(proxy.count("registry.invalid:443"), 1);
    try_it(&[".invalid"]);
    assert_eq!(proxy.count("registry.invalid"), 1);
    for bad in ["ftp://x", "http://", "socks5://h:1"] {
        let config = ClientConfig {
            proxy: Some(bad.to_owned()),
            ..ClientConfig::default()
        };
        assert!(Client::new(config).is_err(), "{bad}");
    }
}

/// One that did not answer comes last for a while, behind the registry; but it comes.
#[test]
fn a_mirror_that_rests_is_asked_when_nobody_else_has_it() {
    let (blobs, image, layer) = simple();
    let (up, down) = (
        Arc::new(AtomicBool::new(false)),
        Arc::new(AtomicBool::new(false)),
    );
    let (is_up, served) = (Arc::clone(&up), blobs.clone());
    let mirror = Server::start("127.0.0.1", move |request| {
        if is_up.load(Ordering::SeqCst) {
            honest(&served, request)
        } else {
            // The connection breaks.
            Reply::Truncated(Vec::new(), 10)
        }
    });
    let is_down = Arc::clone(&down);
    let upstream = Server::start("127.0.0.1", move |request| {
        if is_down.load(Ordering::SeqCst) {
            status(404)
        } else {
            honest(&blobs, request)
        }
    });
    let client = client(&upstream, vec![format!("http://{}", mirror.host)], &[]);
    stage(&client, image).unwrap();
    assert_eq!(mirror.requests().len(), 1, "then it was left alone");
    up.store(true, Ordering::SeqCst);
    stage(&client, image).unwrap();
    assert_eq!(mirror.requests().len(), 1, "the registry had it all");
    down.store(true, Ordering::SeqCst);
    let before = upstream.count(&layer.hex());
    stage(&client, image).unwrap();
    assert_eq!(mirror.count(&layer.hex()), 1);
    assert_eq!(
        upstream.count(&layer.hex()),
        before + 1,
        "it was asked first"
    );
}

/// The registry's no is final only when no mirror may have it in a moment.
#[test]
fn a_mirror_that_may_be_back_soon_is_waited_for() {
    let (blobs, image, layer) = simple();
    let upstream = Server::start("127.0.0.1", |_| status(404));
    let retry = Retry {
        attempts: 3,
        least: Duration::from_millis(5),
        longest: Duration::from_millis(20),
    };
    // Fails twice for each thing, and then has it; as for ever for those who do not ask so often.
    let asked: Mutex<BTreeMap<String, u32>> = Mutex::default();
    let mirror = Server::start("127.0.0.1", move |request| {
        let mut asked = asked.lock().unwrap();
        let times = asked.entry(request.path.clone()).or_default();
        *times += 1;
        if *times < 3 {
            status(503)
        } else {
            honest(&blobs, request)
        }
    });
    let with = |retry| {
        let registry = RegistryConfig {
            url: Some(format!("http://{}", upstream.host)),
            mirrors: vec![format!("http://{}", mirror.host)],
            ..RegistryConfig::default()
        };
        Client::new(ClientConfig {
            registries: [("registry.example".to_owned(), registry)].into(),
            timeouts: TIMEOUTS,
            retry,
            ..ClientConfig::default()
        })
        .unwrap()
    };
    // The registry's own word is what is said in the end.
    let error = stage(
        &with(Retry {
            attempts: 2,
            ..retry
        }),
        image,
    )
    .unwrap_err();
    assert_eq!(error.fault(), Fault::NotFound, "{}", chain(&error));
    assert_eq!(mirror.count("/manifests/"), 2);
    stage(&with(retry), image).unwrap();
    assert_eq!(mirror.count(&layer.hex()), 3);
    assert_eq!(upstream.count(&layer.hex()), 2, "asked each time");
}

/// What a mirror left half done and wrong is no fault of the registry.
#[test]
fn a_mirror_that_sends_wrong_bytes_and_breaks_does_not_spoil_the_registry() {
    let mut blobs = Blobs::default();
    let content: Vec<u8> = (0..900_000_u32)
        .map(|n| n.wrapping_mul(2_654_435_761).to_be_bytes()[0] | 1)
        .collect();
    let layer = Layer::plain(&[("f", &content)]);
    let image = digest(&blobs.image(("amd64", ""), std::slice::from_ref(&layer)));
    let (hex, served) = (Digest::of(&layer.blob).hex(), blobs.clone());
    let mirror = Server::start("127.0.0.1", move |request| {
        if request.path.contains(&hex) {
            let mut wrong = layer.blob.clone();
            wrong[10] ^= 1;
            return ranged(&wrong, request, 600_000);
        }
        // The config goes wrong in the middle, too.
        match honest(&served, request) {
            Reply::Full(200, _, body) if request.path.contains("/blobs/") => {
                Reply::Truncated(body[..body.len() / 2].to_vec(), body.len())
            }
            other => other,
        }
    });
    let upstream = Server::start("127.0.0.1", move |request| {
        let name = request.path.rsplit('/').next().unwrap();
        let found = name.parse().ok().and_then(|digest| blobs.0.get(&digest));
        match found {
            Some(bytes) if request.path.contains("/blobs/") => ranged(bytes, request, usize::MAX),
            _ => honest(&blobs, request),
        }
    });
    stage(
        &client(&upstream, vec![format!("http://{}", mirror.host)], &[]),
        image,
    )
    .unwrap();
}
