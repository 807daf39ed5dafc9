//! Signatures as registries have them: right, wrong, hostile and lost.

use std::sync::{Arc, Mutex};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use foreshore_images::registry::{Client, ClientConfig, RegistryConfig};
use foreshore_images::signature::{Demand, SignatureError, TrustedKey};
use foreshore_images::store::Store;
use foreshore_images::{Digest, Fault, Reference};
use serde_json::{Value, json};

use crate::bed::{TIMEOUTS, unless_busy};
use crate::compose::Blobs;
use crate::server::{Server, ok, status};

const KEY: &str = "-----BEGIN PUBLIC KEY-----\nMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAElSj0n6mdVUBkACLrW1OmYLkFWR3A\niECnyg+r4gCfH3EF/cHPbNgaEpGqAuQTaVy6X66YHrGitZ1e206mlb8mqg==\n-----END PUBLIC KEY-----";

/// Signed with it; names the digest of `image`.
const PAYLOAD: &str = r#"{"critical":{"identity":{"docker-reference":"registry.example/demo"},"image":{"docker-manifest-digest":"sha256:6105d6cc76af400325e94d588ce511be5bfdbb73b437dc51eca43917d7a43e3d"},"type":"cosign container image signature"},"optional":null}"#;
const SIGNED: &str = "MEYCIQDj2wNlu7woh259ncPwJOD3DKKrUQ7arnDxdZj6KorFJAIhAMGjGmYWFPO2GYOorBKcvGSGmR4OYg7W57hBMv5jxASw";

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const SIMPLE: &str = "application/vnd.dev.cosign.simplesigning.v1+json";

const BUNDLE: &str = "application/vnd.dev.sigstore.bundle.v0.3+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";

/// A statement about `image` in an envelope, signed with it.
const STATEMENT: &str = r#"{"_type":"https://in-toto.io/Statement/v1","subject":[{"digest":{"sha256":"6105d6cc76af400325e94d588ce511be5bfdbb73b437dc51eca43917d7a43e3d"}}],"predicateType":"https://sigstore.dev/cosign/sign/v1","predicate":{}}"#;
const SIGNED_STATEMENT: &str = "MEQCIHyhfqYWAau9WEvp4gICng0ZBXMra/bqu6WebArcOFl7AiBoR0a02pxGjJTXbEIm3oTwlEJra3XmgV2hyAgwJJfVUQ==";

/// What the registry answers to the manifest of signatures.
type Answer = Arc<Mutex<Option<(String, Blobs)>>>;

struct Place {
    server: Server,
    answer: Answer,
    store: Store,
    root: tempfile::TempDir,
    reference: Reference,
}

impl Place {
    fn new() -> Self {
        let answer = Answer::default();
        let shown = Arc::clone(&answer);
        let tag = format!("/manifests/sha256-{}.sig", Digest::of(b"image").hex());
        let server = Server::start("127.0.0.1", move |request| {
            let shown = shown.lock().unwrap();
            let Some((manifest, blobs)) = &*shown else {
                return status(503);
            };
            if request.path.ends_with(&tag) {
                return match &**manifest {
                    "" => status(404),
                    text => ok(MANIFEST, text.as_bytes().to_vec()),
                };
            }
            if request.path.contains("/referrers/") {
                return match blobs.0.get(&Digest::of(b"referrers")) {
                    Some(index) => ok(INDEX, index.clone()),
                    None => status(404),
                };
            }
            let blob = request
                .path
                .rsplit('/')
                .next()
                .and_then(|name| name.parse().ok());
            match blob.and_then(|digest: Digest| blobs.0.get(&digest)) {
                Some(bytes) if request.path.contains("/manifests/") => ok(MANIFEST, bytes.clone()),
                Some(bytes) => ok("application/octet-stream", bytes.clone()),
                None => status(404),
            }
        });
        let root = tempfile::tempdir().unwrap();
        Self {
            store: Store::open(root.path()).unwrap(),
            reference: format!("registry.example/acme/app@{}", Digest::of(b"image"))
                .parse()
                .unwrap(),
            server,
            answer,
            root,
        }
    }

    fn prove(&self) -> Result<(), SignatureError> {
        let registry = RegistryConfig {
            url: Some(format!("http://{}", self.server.host)),
            ..RegistryConfig::default()
        };
        let client = Client::new(ClientConfig {
            registries: [("registry.example".to_owned(), registry)].into(),
            timeouts: TIMEOUTS,
            ..ClientConfig::default()
        });
        let keys = [TrustedKey::try_from(KEY.to_owned()).unwrap()];
        let demand = Demand {
            by: "the owner",
            keys: &keys,
        };
        self.store
            .prove(&client.unwrap(), &self.reference, &[demand])
    }

    fn is_signed(&self) -> bool {
        let keys = [TrustedKey::try_from(KEY.to_owned()).unwrap()];
        let demand = Demand {
            by: "the owner",
            keys: &keys,
        };
        self.store.is_signed(&Digest::of(b"image"), &[demand])
    }

    /// The registry has these layers in the manifest of signatures.
    fn show(&self, layers: &[Value], blobs: Blobs) {
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "size": 2, "digest": Digest::of(b"{}")},
            "layers": layers,
        });
        *self.answer.lock().unwrap() = Some((manifest.to_string(), blobs));
    }

    fn say(&self, manifest: &str) {
        *self.answer.lock().unwrap() = Some((manifest.to_owned(), Blobs::default()));
    }
}

/// A layer with a payload and the signature of it.
fn signature(blobs: &mut Blobs, payload: &[u8], signed: &str) -> Value {
    let mut layer = blobs.add(SIMPLE, payload.to_vec());
    layer["annotations"] = json!({"dev.cosignproject.cosign/signature": signed});
    layer
}

#[test]
fn a_signature_is_found_believed_and_kept() {
    let place = Place::new();
    let mut blobs = Blobs::default();
    let other = PAYLOAD.replace("demo", "demp");
    let layers = [
        signature(&mut blobs, other.as_bytes(), SIGNED),
        signature(&mut blobs, b"not even text \xff", "AAAA"),
        signature(&mut blobs, PAYLOAD.as_bytes(), SIGNED),
    ];
    place.show(&layers, blobs);
    assert!(!place.is_signed());
    place.prove().unwrap();
    assert!(place.is_signed());
    let asked = place.server.requests().len();
    place.prove().unwrap();
    assert_eq!(place.server.requests().len(), asked, "it was kept");
    // Only what proves something was.
    let kept = place.root.path().join("signatures");
    let file = std::fs::read_dir(&kept).unwrap().next().unwrap().unwrap();
    let text = std::fs::read_to_string(file.path()).unwrap();
    assert_eq!(text.matches("payload").count(), 1, "{text}");
    // What was damaged or changed proves nothing, and is fetched again.
    for damaged in [
        text.replace("critical", "kritical"),
        "[".to_owned(),
        String::new(),
    ] {
        std::fs::write(file.path(), damaged).unwrap();
        assert!(!place.is_signed());
        place.prove().unwrap();
        assert!(place.is_signed());
    }
    // It goes with the image.
    unless_busy(|| place.store.remove_unused(&[Digest::of(b"image")].into()));
    assert!(place.is_signed());
    unless_busy(|| place.store.remove_unused(&[].into()));
    assert!(!place.is_signed());
}

#[test]
fn what_is_no_signature_is_told_from_a_registry_that_is_away() {
    let place = Place::new();
    let away = place.prove().unwrap_err();
    assert_eq!(away.fault(), Fault::Unreachable, "{away}");
    place.say("");
    let unsigned = place.prove().unwrap_err();
    assert!(
        matches!(unsigned, SignatureError::Unsigned { .. }),
        "{unsigned}"
    );
    assert!(unsigned.to_string().contains("the owner"));
    place.say(&json!({"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": []}).to_string());
    assert!(place.prove().is_err());

    let right = |blobs: &mut Blobs| signature(blobs, PAYLOAD.as_bytes(), SIGNED);
    let mut blobs = Blobs::default();
    // As large as a layer; it is not even asked for.
    let large = signature(&mut blobs, &[b' '; 20 << 10], SIGNED);
    let mut unannotated = right(&mut blobs);
    unannotated["annotations"] = Value::Null;
    let mut renamed = right(&mut blobs);
    renamed["mediaType"] = "application/vnd.oci.image.layer.v1.tar".into();
    let long = signature(&mut blobs, PAYLOAD.as_bytes(), &"A".repeat(4 << 10));
    let asked = place.server.count("/blobs/");
    place.show(&[large, unannotated, renamed, long], blobs);
    let unsigned = place.prove().unwrap_err();
    assert!(
        matches!(unsigned, SignatureError::Unsigned { .. }),
        "{unsigned}"
    );
    assert_eq!(place.server.count("/blobs/"), asked);

    // A hundred wrong ones: only so many are looked at.
    let mut blobs = Blobs::default();
    let mut layers: Vec<Value> = (0..100)
        .map(|number| signature(&mut blobs, format!("{number}").as_bytes(), "AAAA"))
        .collect();
    layers.push(right(&mut blobs));
    place.show(&layers, blobs);
    let untrusted = place.prove().unwrap_err();
    assert!(
        matches!(untrusted, SignatureError::Untrusted { found: 32, .. }),
        "{untrusted}"
    );
    assert_eq!(untrusted.fault(), Fault::Unsigned);
    // A payload that is not what the manifest names.
    let mut blobs = Blobs::default();
    let layer = right(&mut blobs);
    for bytes in blobs.0.values_mut() {
        bytes[0] = b'[';
    }
    place.show(&[layer], blobs);
    assert_eq!(place.prove().unwrap_err().fault(), Fault::DigestMismatch);
    assert!(!place.is_signed());
}

#[test]
fn a_bundle_that_refers_to_the_image_is_found_too() {
    let place = Place::new();
    let mut blobs = Blobs::default();
    let mut referrer = |payload: &str, annotations: Value| {
        let bundle = json!({"mediaType": BUNDLE, "verificationMaterial": {}, "dsseEnvelope": {
            "payload": STANDARD.encode(payload),
            "payloadType": "application/vnd.in-toto+json",
            "signatures": [{"sig": SIGNED_STATEMENT}],
        }});
        let layer = blobs.add(BUNDLE, bundle.to_string().into_bytes());
        let empty = "application/vnd.oci.empty.v1+json";
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "artifactType": BUNDLE,
            "config": {"mediaType": empty, "size": 2, "digest": Digest::of(b"{}")},
            "layers": [layer],
            "subject": {"mediaType": MANIFEST, "size": 5, "digest": Digest::of(b"image")},
        });
        let mut descriptor = blobs.add(MANIFEST, manifest.to_string().into_bytes());
        descriptor["artifactType"] = BUNDLE.into();
        descriptor["annotations"] = annotations;
        descriptor
    };
    let predicate = |kind: &str| json!({"dev.sigstore.bundle.predicateType": kind});
    let contents = referrer("{}", predicate("https://cyclonedx.org/bom"));
    let wrong = referrer("not a statement", Value::Null);
    let right = referrer(STATEMENT, predicate("https://sigstore.dev/cosign/sign/v1"));
    let show = |manifests: &[&Value]| {
        let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": manifests});
        let mut blobs = Blobs(blobs.0.clone());
        let index = index.to_string().into_bytes();
        blobs.0.insert(Digest::of(b"referrers"), index);
        *place.answer.lock().unwrap() = Some((String::new(), blobs));
    };
    show(&[&contents]);
    let unsigned = place.prove().unwrap_err();
    assert!(
        matches!(unsigned, SignatureError::Unsigned { .. }),
        "{unsigned}"
    );
    show(&[&contents, &wrong]);
    let untrusted = place.prove().unwrap_err();
    let one = matches!(untrusted, SignatureError::Untrusted { found: 1, .. });
    assert!(one, "{untrusted}");
    show(&[&contents, &wrong, &right]);
    place.prove().unwrap();
    assert!(place.is_signed());
    let asked = place.server.requests().len();
    place.prove().unwrap();
    assert_eq!(place.server.requests().len(), asked, "it was kept");
}
