//! Registries that lie, hang or want too much: one clear error each, in bounded time, and nothing is left.

use std::fs;
use std::io::Write;
use std::time::{Duration, Instant};

use foreshore_images::registry::{Client, ClientConfig, RegistryConfig};
use foreshore_images::store::{StageError, StagedImage, Store, StoreConfig};
use foreshore_images::{Digest, Fault, Platform, Reference};
use serde_json::json;
use sha2::Digest as _;

use crate::bed::{Mount, TIMEOUTS};
use crate::compose::{Blobs, INDEX, LAYER, Layer, MANIFEST, digest, gzip, tar};
use crate::server::{Reply, Request, Server, ok, status, with_header};

const AMD64: (&str, &str) = ("amd64", "");

/// Serves blobs and manifests as a registry does.
pub(crate) fn honest(blobs: &Blobs, request: &Request) -> Reply {
    let name = request.path.rsplit('/').next().unwrap_or_default();
    let Some(bytes) = name
        .parse()
        .ok()
        .and_then(|digest: Digest| blobs.0.get(&digest))
    else {
        return status(404);
    };
    let media_type = if !request.path.contains("/manifests/") {
        "application/octet-stream"
    } else if String::from_utf8_lossy(bytes).contains("\"manifests\"") {
        INDEX
    } else {
        MANIFEST
    };
    ok(media_type, bytes.clone())
}

pub(crate) fn client_for(host: &str, registry: RegistryConfig) -> Client {
    let registry = RegistryConfig {
        plain_http: true,
        ..registry
    };
    Client::new(ClientConfig {
        registries: [(host.to_owned(), registry)].into(),
        timeouts: TIMEOUTS,
        ..ClientConfig::default()
    })
    .unwrap()
}

pub(crate) fn reference(server: &Server, digest: Digest) -> Reference {
    format!("{}/acme/app@{digest}", server.host)
        .parse()
        .unwrap()
}

fn stage(server: &Server, digest: Digest) -> Result<StagedImage, StageError> {
    let root = tempfile::tempdir().unwrap();
    let store = Store::open_with(
        root.path(),
        StoreConfig {
            reserve_bytes: None,
            unpacked_bytes_max: 1 << 30,
            lock_wait: Duration::from_secs(1),
            ..StoreConfig::default()
        },
    )
    .unwrap();
    let client = client_for(&server.host, RegistryConfig::default());
    let start = Instant::now();
    let result = store.stage(
        &client,
        &reference(server, digest),
        &Platform::linux("amd64", ""),
        &mut |_| {},
    );
    assert!(
        start.elapsed() < Duration::from_secs(20),
        "took {:?}",
        start.elapsed()
    );
    if result.is_err() {
        let left: Vec<_> = fs::read_dir(root.path().join("tmp")).unwrap().collect();
        assert!(left.is_empty(), "left in tmp: {left:?}");
        assert_eq!(fs::read_dir(root.path().join("images")).unwrap().count(), 0);
    }
    result
}

/// The whole chain of messages.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(error) = next {
        text += &format!(": {error}");
        next = error.source();
    }
    text
}

fn assert_fault(result: Result<StagedImage, StageError>, fault: Fault, words: &[&str], case: &str) {
    let error = result.expect_err(case);
    let text = chain(&error);
    assert_eq!(error.fault(), fault, "{case}: {text}");
    for word in words {
        assert!(text.contains(word), "{case}: \"{word}\" is not in: {text}");
    }
}

pub(crate) fn simple() -> (Blobs, Digest, Digest) {
    let mut blobs = Blobs::default();
    let layer = Layer::gzip(&[("hello", b"world")]);
    let image = blobs.image(AMD64, std::slice::from_ref(&layer));
    (blobs, digest(&image), Digest::of(&layer.blob))
}

#[test]
fn an_honest_server_is_believed() {
    let (blobs, image, _) = simple();
    let server = Server::start("127.0.0.1", move |request| honest(&blobs, request));
    let staged = stage(&server, image).unwrap();
    assert_eq!(staged.digest, image);
    assert_eq!(staged.config.entrypoint, ["/bin/app"]);
    assert_eq!(staged.config.stop_signal.as_deref(), Some("SIGQUIT"));
}

#[test]
fn lies_about_a_layer() {
    type Lie = fn(Vec<u8>) -> Reply;
    let cases: &[(&str, Lie, Fault, &str)] = &[
        (
            "other bytes",
            |b| ok("x/y", vec![0; b.len()]),
            Fault::DigestMismatch,
            "wrong bytes",
        ),
        (
            "longer",
            |b| ok("x/y", [b, vec![0]].concat()),
            Fault::DigestMismatch,
            "were declared",
        ),
        (
            "shorter",
            |b| ok("x/y", b[1..].to_vec()),
            Fault::DigestMismatch,
            "were declared",
        ),
        (
            "endless",
            |_| Reply::Endless,
            Fault::DigestMismatch,
            "were declared",
        ),
        (
            "cut off",
            |b| Reply::Truncated(b[..9].to_vec(), b.len()),
            Fault::Unreachable,
            "cannot be reached",
        ),
        ("hangs", |_| Reply::Hang, Fault::Unreachable, "in time"),
        (
            "hangs in the body",
            |b| Reply::HangInBody(b.len()),
            Fault::Unreachable,
            "in time",
        ),
        (
            "drips",
            |b| Reply::Drip(b.len()),
            Fault::Unreachable,
            "in time",
        ),
        (
            "a login page",
            |_| ok("text/html; charset=utf-8", b"<html>".to_vec()),
            Fault::Unreachable,
            "captive portal",
        ),
        (
            "not there",
            |_| status(404),
            Fault::NotFound,
            "does not have blob acme/app@sha256:",
        ),
        ("forbidden", |_| status(403), Fault::NotFound, "refuses"),
        (
            "server error",
            |_| status(500),
            Fault::Unreachable,
            "HTTP 500",
        ),
        (
            "too many requests",
            |_| status(429),
            Fault::Unreachable,
            "try later",
        ),
        (
            "redirects in a circle",
            |_| with_header(307, "Location", "/v2/again"),
            Fault::Unreachable,
            "more than 5 times",
        ),
        (
            "redirects nowhere",
            |_| with_header(302, "Location", ""),
            Fault::Unreachable,
            "not a URL",
        ),
        (
            "redirects to plain HTTP elsewhere",
            |_| with_header(302, "Location", "http://127.0.0.2:1/x"),
            Fault::Unreachable,
            "plain HTTP",
        ),
        (
            "redirects to a file",
            |_| with_header(302, "Location", "file:///etc/passwd"),
            Fault::Unreachable,
            "not a URL",
        ),
    ];
    for (name, lie, fault, words) in cases {
        let (blobs, image, layer) = simple();
        let lie = *lie;
        let server = Server::start("127.0.0.1", move |request| {
            if request.path.contains(&layer.hex()) || request.path == "/v2/again" {
                return lie(blobs.0[&layer].clone());
            }
            honest(&blobs, request)
        });
        assert_fault(
            stage(&server, image),
            *fault,
            &[words, &server.host, "acme/app"],
            name,
        );
    }
}

#[test]
fn lies_about_a_manifest() {
    type Lie = fn(Vec<u8>) -> Reply;
    let cases: &[(&str, Lie, Fault, &str)] = &[
        (
            "a login page",
            |_| ok("text/html", b"<html>log in</html>".to_vec()),
            Fault::Unreachable,
            "captive portal",
        ),
        (
            "other bytes",
            |b| ok(MANIFEST, [b, b" ".to_vec()].concat()),
            Fault::DigestMismatch,
            "wrong bytes",
        ),
        (
            "100 MB",
            |_| ok(MANIFEST, vec![b' '; 100 << 20]),
            Fault::BadImage,
            "larger than the limit",
        ),
        (
            "endless",
            |_| Reply::Endless,
            Fault::BadImage,
            "larger than the limit",
        ),
        ("hangs", |_| Reply::Hang, Fault::Unreachable, "in time"),
        (
            "drips",
            |_| Reply::Drip(4000),
            Fault::Unreachable,
            "in time",
        ),
        (
            "not there",
            |_| status(404),
            Fault::NotFound,
            "does not have manifest acme/app@sha256:",
        ),
        (
            "wants a password",
            |_| with_header(401, "WWW-Authenticate", "Basic realm=x"),
            Fault::NotFound,
            "configure username",
        ),
        (
            "wants who knows what",
            |_| with_header(401, "WWW-Authenticate", "Negotiate"),
            Fault::NotFound,
            "refuses",
        ),
        (
            "another media type",
            |b| ok("application/vnd.cncf.helm.config.v1+json", b),
            Fault::BadImage,
            "neither an OCI",
        ),
        (
            "an image called an index",
            |b| ok(INDEX, b),
            Fault::BadImage,
            "ambiguous",
        ),
    ];
    for (name, lie, fault, words) in cases {
        let (blobs, image, _) = simple();
        let lie = *lie;
        let server = Server::start("127.0.0.1", move |_| lie(blobs.0[&image].clone()));
        assert_fault(stage(&server, image), *fault, &[words, &server.host], name);
    }
}

#[test]
fn a_registry_that_is_not_there() {
    let (_, image, _) = simple();
    let server = Server::start("127.0.0.1", |_| status(500));
    let gone = reference(&server, image);
    let host = server.host.clone();
    drop(server);
    let error = client_for(&host, RegistryConfig::default())
        .resolve(&gone)
        .unwrap_err();
    assert_eq!(error.fault(), Fault::Unreachable);
    assert!(error.is_transient());
}

#[test]
fn broken_layers() {
    let good = tar(&[("hello", b"world")]);
    let (bomb, bomb_id) = bomb();
    let cases: Vec<(&str, Vec<u8>, Digest, Fault, &str)> = vec![
        (
            "cut gzip",
            gzip(&good)[..30].to_vec(),
            Digest::of(&good),
            Fault::BadImage,
            "layer sha256:",
        ),
        (
            "no tar",
            b"this is no archive at all".repeat(40),
            Digest::of(&good),
            Fault::BadImage,
            "not a tar archive",
        ),
        (
            "another layer",
            gzip(&good),
            Digest::of(b"x"),
            Fault::DigestMismatch,
            "as the config says",
        ),
        ("a bomb", bomb, bomb_id, Fault::BadImage, "bomb"),
        (
            "leaves its directory",
            escaping(),
            Digest::of(&escaping()),
            Fault::BadImage,
            "leaves the image's root directory",
        ),
    ];
    for (name, blob, diff_id, fault, words) in cases {
        let mut blobs = Blobs::default();
        let layer = Layer {
            blob,
            diff_id,
            media_type: format!("{LAYER}+gzip"),
        };
        let image = digest(&blobs.image(AMD64, &[layer]));
        let server = Server::start("127.0.0.1", move |request| honest(&blobs, request));
        assert_fault(stage(&server, image), fault, &[words, "acme/app"], name);
    }
}

/// A layer of 300 MiB of zeros: its blob and its diff id.
fn bomb() -> (Vec<u8>, Digest) {
    let mut header = tar::Header::new_gnu();
    header.set_path("zeros").unwrap();
    header.set_size(300 << 20);
    header.set_cksum();
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    let mut hasher = sha2::Sha256::new();
    let zeros = vec![0; 1 << 20];
    for piece in std::iter::once(&header.as_bytes()[..]).chain(std::iter::repeat_n(&zeros[..], 300))
    {
        encoder.write_all(piece).unwrap();
        hasher.update(piece);
    }
    (
        encoder.finish().unwrap(),
        Digest::from_bytes(hasher.finalize().into()),
    )
}

fn escaping() -> Vec<u8> {
    let mut header = tar::Header::new_gnu();
    header.as_old_mut().name[..9].copy_from_slice(b"../escape");
    header.set_size(0);
    header.set_cksum();
    header.as_bytes().to_vec()
}

#[test]
fn indexes_that_never_end() {
    let mut blobs = Blobs::default();
    let mut inner = blobs.image(("riscv64", ""), &[]);
    for _ in 0..10 {
        inner = blobs.index(&[inner]);
    }
    // Without a platform each must be looked at.
    let nested = digest(&inner);
    let many: Vec<_> = (0..1000)
        .map(|number| {
            let mut image = blobs.image(
                ("riscv64", ""),
                &[Layer::plain(&[("n", number.to_string().as_bytes())])],
            );
            image.as_object_mut().unwrap().remove("platform");
            image
        })
        .collect();
    let wide = digest(&blobs.index(&many));
    let server = Server::start("127.0.0.1", move |request| honest(&blobs, request));
    assert_fault(
        stage(&server, nested),
        Fault::BadImage,
        &["nests too deep"],
        "nested",
    );
    assert_fault(
        stage(&server, wide),
        Fault::BadImage,
        &["too many candidates"],
        "wide",
    );
    assert!(
        server.requests().len() < 100,
        "{} requests",
        server.requests().len()
    );
}

#[test]
fn no_variant_names_those_there_are() {
    let mut blobs = Blobs::default();
    let image = [
        blobs.image(("arm64", "v8"), &[]),
        blobs.image(("arm", "v7"), &[]),
    ];
    let index = digest(&blobs.index(&image));
    let server = Server::start("127.0.0.1", move |request| honest(&blobs, request));
    let words = ["linux/amd64", "linux/arm/v7, linux/arm64/v8"];
    assert_fault(
        stage(&server, index),
        Fault::NoMatchingPlatform,
        &words,
        "index",
    );
    assert_fault(
        stage(&server, digest(&image[0])),
        Fault::NoMatchingPlatform,
        &["linux/arm64/v8"],
        "manifest",
    );
}

#[test]
fn a_child_of_another_size_is_refused() {
    let mut blobs = Blobs::default();
    let mut image = blobs.image(AMD64, &[]);
    image["size"] = json!(1);
    let index = digest(&blobs.index(&[image]));
    let server = Server::start("127.0.0.1", move |request| honest(&blobs, request));
    assert_fault(
        stage(&server, index),
        Fault::DigestMismatch,
        &["bytes that its index declares"],
        "size",
    );
}

#[test]
fn a_full_disk_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mount = Mount::new("tmpfs", "size=3m", &dir.path().join("store"));
    let store = Store::open(&mount.0).unwrap();

    let mut blobs = Blobs::default();
    let small = digest(&blobs.image(AMD64, &[Layer::gzip(&[("small", b"fits")])]));
    // Zeros make no blocks, so what is large must not be zeros, and compress badly enough to be plain.
    let noise: Vec<u8> = (0..2_000_000_u32)
        .map(|n| n.wrapping_mul(2_654_435_761).to_be_bytes()[0] | 1)
        .collect();
    let by_budget = digest(&blobs.image(
        AMD64,
        &[Layer::gzip(&[(
            "a",
            &[&noise[..], &noise[..1_500_000]].concat(),
        )])],
    ));
    let by_size = digest(&blobs.image(
        AMD64,
        &[Layer::plain(&[("b", &[&noise[..], &noise[..]].concat())])],
    ));
    // Many empty files: no bytes, but inodes or the memory for them.
    let server = Server::start("127.0.0.1", move |request| honest(&blobs, request));
    let client = client_for(&server.host, RegistryConfig::default());
    let stage = |digest| {
        store.stage(
            &client,
            &reference(&server, digest),
            &Platform::linux("amd64", ""),
            &mut |_| {},
        )
    };

    stage(small).unwrap();
    for (image, name) in [
        (by_budget, "what it unpacks to"),
        (by_size, "blob larger than the disk"),
    ] {
        let error = stage(image).unwrap_err();
        assert_eq!(error.fault(), Fault::DiskFull, "{name}: {}", chain(&error));
        assert!(error.is_transient());
        assert_eq!(
            fs::read_dir(mount.0.join("tmp")).unwrap().count(),
            0,
            "{name}"
        );
        assert!(store.staged(&small).is_some(), "{name}");
    }
    // Something else fills the disk while a layer comes in.
    let filler = mount.0.join("filler");
    let free = rustix::fs::statvfs(&mount.0).unwrap();
    fs::write(
        &filler,
        vec![1; usize::try_from((free.f_bavail - 3) * free.f_frsize).unwrap()],
    )
    .unwrap();
    let error = stage(by_budget).unwrap_err();
    assert_eq!(error.fault(), Fault::DiskFull, "{}", chain(&error));
    assert!(store.staged(&small).is_some());
}

#[test]
fn the_reserve_is_kept_before_and_during_the_fetch() {
    let dir = tempfile::tempdir().unwrap();
    let mount = Mount::new("tmpfs", "size=8m", &dir.path().join("store"));
    let reserve = 3 << 20;
    let config = StoreConfig {
        reserve_bytes: Some(reserve),
        ..StoreConfig::default()
    };
    let store = Store::open_with(&mount.0, config.clone()).unwrap();
    let noise: Vec<u8> = (0..6_000_000_u32)
        .map(|n| n.wrapping_mul(2_654_435_761).to_be_bytes()[0] | 1)
        .collect();
    let mut blobs = Blobs::default();
    // Its manifest tells that it will not fit.
    let plain = digest(&blobs.image(AMD64, &[Layer::plain(&[("a", &noise[..4_000_000])])]));
    // This one shrinks so well that only unpacking shows it.
    let small_blob = digest(&blobs.image(AMD64, &[Layer::gzip(&[("b", &noise)])]));
    let empty: Vec<String> = (0..9000).map(|n| format!("f{n}")).collect();
    let files: Vec<(&str, &[u8])> = empty.iter().map(|name| (name.as_str(), &[][..])).collect();
    let inodes = digest(&blobs.image(AMD64, &[Layer::gzip(&files)]));
    let asked = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let counter = std::sync::Arc::clone(&asked);
    let server = Server::start("127.0.0.1", move |request| {
        counter.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        honest(&blobs, request)
    });
    let client = client_for(&server.host, RegistryConfig::default());
    let stage = |digest| {
        let reference = reference(&server, digest);
        let platform = Platform::linux("amd64", "");
        store.stage(&client, &reference, &platform, &mut |_| {})
    };
    let error = stage(plain).unwrap_err();
    assert_eq!(error.fault(), Fault::DiskFull, "{}", chain(&error));
    let text = error.to_string();
    let free = rustix::fs::statvfs(&mount.0).unwrap();
    let free = free.f_bavail * free.f_frsize;
    assert!(
        text.contains(" bytes are needed") && text.contains(&reserve.to_string()),
        "{text}"
    );
    assert!(
        text.contains(&format!("{free} bytes are free")),
        "{free}: {text}"
    );
    let requests = asked.load(std::sync::atomic::Ordering::Relaxed);
    assert_eq!(requests, 2, "manifest and config, no layer");

    let error = stage(small_blob).unwrap_err();
    assert_eq!(error.fault(), Fault::DiskFull, "{}", chain(&error));
    drop(mount);
    let mount = Mount::new("tmpfs", "size=8m,nr_inodes=4000", &dir.path().join("store"));
    let store = Store::open_with(&mount.0, config).unwrap();
    let reference = reference(&server, inodes);
    let platform = Platform::linux("amd64", "");
    let error = store
        .stage(&client, &reference, &platform, &mut |_| {})
        .unwrap_err();
    assert_eq!(error.fault(), Fault::DiskFull, "{}", chain(&error));
    assert!(error.to_string().contains("inodes"), "{error}");
}
