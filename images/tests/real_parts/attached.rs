//! Signatures that come in an archive with the image: believed without any registry, and no more than one from there.

use std::fs;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use foreshore_images::registry::RegistryConfig;
use foreshore_images::signature::{Demand, TrustedKey};
use foreshore_images::store::{Archive, LoadError, LoadedImage, Store};
use foreshore_images::{Digest, Fault, Platform};
use serde_json::{Value, json};

use crate::bed::{run, text, unless_busy};
use crate::compose::{Blobs, Layer, MANIFEST, digest};
use crate::hostile::{chain, client_for};

const SIMPLE: &str = "application/vnd.dev.cosign.simplesigning.v1+json";
const BUNDLE: &str = "application/vnd.dev.sigstore.bundle.v0.3+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const NAME: &str = "org.opencontainers.image.ref.name";

/// A key pair, made with openssl.
struct Key {
    dir: tempfile::TempDir,
}

impl Key {
    fn new() -> Self {
        let key = Self {
            dir: tempfile::tempdir().unwrap(),
        };
        let (private, public) = (key.path("key"), key.path("pub"));
        let generate = [
            "ecparam",
            "-name",
            "prime256v1",
            "-genkey",
            "-noout",
            "-out",
        ];
        run("openssl", &[&generate[..], &[text(&private)]].concat());
        let publish = [
            "pkey",
            "-pubout",
            "-in",
            text(&private),
            "-out",
            text(&public),
        ];
        run("openssl", &publish);
        key
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn trusted(&self) -> TrustedKey {
        TrustedKey::try_from(fs::read_to_string(self.path("pub")).unwrap()).unwrap()
    }

    fn sign(&self, message: &[u8]) -> String {
        let (message_path, signature) = (self.path("message"), self.path("signature"));
        fs::write(&message_path, message).unwrap();
        let key = self.path("key");
        run(
            "openssl",
            &[
                "dgst",
                "-sha256",
                "-sign",
                text(&key),
                "-out",
                text(&signature),
                text(&message_path),
            ],
        );
        STANDARD.encode(fs::read(signature).unwrap())
    }

    /// A layer as `cosign sign --key` makes it.
    fn simple(&self, blobs: &mut Blobs, image: &Digest) -> Value {
        let payload = json!({
            "critical": {
                "identity": {"docker-reference": "registry.example/app"},
                "image": {"docker-manifest-digest": image},
                "type": "cosign container image signature",
            },
            "optional": null,
        });
        let payload = payload.to_string().into_bytes();
        let signed = self.sign(&payload);
        let mut layer = blobs.add(SIMPLE, payload);
        layer["annotations"] = json!({"dev.cosignproject.cosign/signature": signed});
        layer
    }

    /// A manifest as `cosign sign --key` makes it since version 3.
    fn bundle(&self, blobs: &mut Blobs, image: &Digest) -> Value {
        let statement = json!({
            "_type": "https://in-toto.io/Statement/v1",
            "subject": [{"digest": {"sha256": image.hex()}}],
            "predicateType": "https://sigstore.dev/cosign/sign/v1",
            "predicate": {},
        })
        .to_string();
        let kind = "application/vnd.in-toto+json";
        let message = format!(
            "DSSEv1 {} {kind} {} {statement}",
            kind.len(),
            statement.len()
        );
        let bundle = json!({"mediaType": BUNDLE, "verificationMaterial": {}, "dsseEnvelope": {
            "payload": STANDARD.encode(&statement),
            "payloadType": kind,
            "signatures": [{"sig": self.sign(message.as_bytes())}],
        }});
        let layer = blobs.add(BUNDLE, bundle.to_string().into_bytes());
        let config = blobs.add("application/vnd.oci.empty.v1+json", b"{}".to_vec());
        let manifest = json!({
            "schemaVersion": 2, "mediaType": MANIFEST, "artifactType": BUNDLE,
            "config": config, "layers": [layer],
            "subject": {"mediaType": MANIFEST, "size": 5, "digest": image},
        });
        let mut descriptor = blobs.add(MANIFEST, manifest.to_string().into_bytes());
        descriptor["artifactType"] = BUNDLE.into();
        descriptor
    }
}

fn simple_manifest(blobs: &mut Blobs, layers: &[Value]) -> Value {
    let ids: Vec<&Value> = layers.iter().map(|layer| &layer["digest"]).collect();
    let config = json!({"architecture": "", "os": "", "config": {}, "rootfs": {"type": "layers", "diff_ids": ids}});
    let config = blobs.add(CONFIG, config.to_string().into_bytes());
    let manifest =
        json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": layers});
    blobs.add(MANIFEST, manifest.to_string().into_bytes())
}

fn named(descriptor: &Value, name: &str) -> Value {
    let mut descriptor = descriptor.clone();
    descriptor["annotations"] = json!({NAME: name});
    descriptor
}

/// Writes a layout with these entries in its index.
fn write(path: &Path, blobs: &Blobs, entries: &[Value]) {
    blobs.write_layout(path, &entries[0], "unused");
    let index = json!({"schemaVersion": 2, "manifests": entries});
    fs::write(path.join("index.json"), index.to_string()).unwrap();
}

fn image(blobs: &mut Blobs) -> Value {
    blobs.image(("amd64", ""), &[Layer::gzip(&[("shared", b"by both")])])
}

fn load(store: &Store, path: &Path) -> Result<Vec<LoadedImage>, LoadError> {
    let platform = Platform::linux("amd64", "");
    store.load(Archive::Path(path), &platform, &mut |_| {})
}

fn is_signed(store: &Store, image: &Digest, key: &Key) -> bool {
    let keys = [key.trusted()];
    let demand = Demand {
        by: "the owner",
        keys: &keys,
    };
    store.is_signed(image, &[demand])
}

#[test]
fn a_signature_in_an_archive_is_believed_without_a_registry() {
    let (key, other) = (Key::new(), Key::new());
    type Attach = fn(&Key, &mut Blobs, &Digest) -> Vec<Value>;
    let forms: [(&str, Attach); 5] = [
        ("the tag of registries", |key, blobs, image| {
            let layer = key.simple(blobs, image);
            let tag = format!("sha256-{}.sig", image.hex());
            vec![named(&simple_manifest(blobs, &[layer]), &tag)]
        }),
        ("the tag with a name before it", |key, blobs, image| {
            let layer = key.simple(blobs, image);
            let tag = format!("registry.example/acme/app:sha256-{}.sig", image.hex());
            vec![named(&simple_manifest(blobs, &[layer]), &tag)]
        }),
        ("as cosign save writes it", |key, blobs, image| {
            let layer = key.simple(blobs, image);
            let mut manifest = simple_manifest(blobs, &[layer]);
            manifest["annotations"] = json!({"kind": "dev.cosignproject.cosign/sigs"});
            vec![manifest]
        }),
        ("a bundle that refers to it", |key, blobs, image| {
            vec![key.bundle(blobs, image)]
        }),
        (
            "a bundle under the tag for referrers",
            |key, blobs, image| {
                let bundle = key.bundle(blobs, image);
                let index = blobs.index(&[bundle]);
                vec![named(&index, &format!("sha256-{}", image.hex()))]
            },
        ),
    ];
    for (form, attach) in forms {
        let dir = tempfile::tempdir().unwrap();
        let mut blobs = Blobs::default();
        let descriptor = image(&mut blobs);
        let image = digest(&descriptor);
        let mut entries = vec![named(&descriptor, "app:v1")];
        entries.extend(attach(&key, &mut blobs, &image));
        let layout = dir.path().join("layout");
        write(&layout, &blobs, &entries);
        let archive = dir.path().join("archive.tar");
        run("tar", &["-C", text(&layout), "-cf", text(&archive), "."]);
        for path in [&layout, &archive] {
            let root = tempfile::tempdir().unwrap();
            let store = Store::open(root.path()).unwrap();
            let loaded = load(&store, path).unwrap();
            assert_eq!(loaded.len(), 1, "{form}: the signature is no image");
            assert_eq!(
                (loaded[0].image.digest, loaded[0].signatures),
                (image, 1),
                "{form}"
            );
            assert!(is_signed(&store, &image, &key), "{form}");
            assert!(!is_signed(&store, &image, &other), "{form}");
            // No registry is asked, and none is there.
            let client = client_for("registry.invalid", RegistryConfig::default());
            let keys = [key.trusted()];
            let demand = Demand {
                by: "the owner",
                keys: &keys,
            };
            let reference = format!("registry.invalid/app@{image}").parse().unwrap();
            store.prove(&client, &reference, &[demand]).unwrap();
            // Twice changes nothing; it stays as long as the image.
            assert_eq!(load(&store, path).unwrap(), loaded);
            unless_busy(|| store.remove_unused(&[].into()));
            assert!(is_signed(&Store::open(root.path()).unwrap(), &image, &key));
            store.unpin(&image).unwrap();
            unless_busy(|| store.remove_unused(&[].into()));
            assert!(!is_signed(&store, &image, &key), "{form}");
        }
    }
}

#[test]
fn what_is_no_signature_of_the_image_proves_nothing_and_keeps_it_from_nobody() {
    let key = Key::new();
    let mut blobs = Blobs::default();
    let descriptor = image(&mut blobs);
    let image = digest(&descriptor);
    let tag = format!("sha256-{}.sig", image.hex());
    let elsewhere = Digest::of(b"another image");
    let stranger = key.simple(&mut blobs, &elsewhere);
    let mut large = blobs.add(SIMPLE, vec![b' '; 70 << 10]);
    large["annotations"] = json!({"dev.cosignproject.cosign/signature": "AAAA"});
    let mut nonsense = blobs.add(SIMPLE, b"{\"critical\": 7}".to_vec());
    nonsense["annotations"] = json!({"dev.cosignproject.cosign/signature": "AAAA"});
    let mut absent = key.simple(&mut Blobs::default(), &image);
    absent["digest"] = json!(Digest::of(b"absent"));
    let layers = [stranger, large, nonsense, absent];
    let mut entries = vec![named(&descriptor, "app:v1")];
    entries.push(named(&simple_manifest(&mut blobs, &layers), &tag));
    // Of another image that is not in the archive; lists of contents; a manifest that is not there; one far too long.
    entries.push(key.bundle(&mut blobs, &elsewhere));
    let other = simple_manifest(&mut blobs, &layers[..1]);
    entries.push(named(&other, &format!("sha256-{}.att", image.hex())));
    entries.push(named(
        &json!({"mediaType": MANIFEST, "digest": Digest::of(b"gone"), "size": 4}),
        &tag,
    ));
    let long = vec![b' '; 300 << 10];
    entries.push(named(&blobs.add(MANIFEST, long), &tag));
    let dir = tempfile::tempdir().unwrap();
    write(&dir.path().join("layout"), &blobs, &entries);
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path()).unwrap();
    let loaded = load(&store, &dir.path().join("layout")).unwrap();
    assert_eq!((loaded.len(), loaded[0].image.digest), (1, image));
    // They were kept, as nobody looked whether they are right; what they say is another thing.
    assert_eq!(loaded[0].signatures, 2);
    assert!(!is_signed(&store, &image, &key));
    assert!(!is_signed(&store, &elsewhere, &key), "it is not here");
    let kept = fs::read_dir(root.path().join("signatures"))
        .unwrap()
        .count();
    assert_eq!(kept, 1);

    // As many as somebody likes to write: so many are kept, and a good one that was there stays.
    let mut blobs = Blobs::default();
    let descriptor = self::image(&mut blobs);
    let good = key.simple(&mut blobs, &image);
    let mut entries = vec![named(&descriptor, "app:v1")];
    entries.push(named(&simple_manifest(&mut blobs, &[good]), &tag));
    write(&dir.path().join("good"), &blobs, &entries);
    load(&store, &dir.path().join("good")).unwrap();
    assert!(is_signed(&store, &image, &key));
    for round in 0..300 {
        let mut layer = blobs.add(SIMPLE, round.to_string().into_bytes());
        layer["annotations"] = json!({"dev.cosignproject.cosign/signature": "AAAA"});
        entries.push(named(&simple_manifest(&mut blobs, &[layer]), &tag));
    }
    write(&dir.path().join("many"), &blobs, &entries);
    let loaded = load(&store, &dir.path().join("many")).unwrap();
    assert_eq!((loaded.len(), loaded[0].signatures), (1, 64));
    assert!(is_signed(&store, &image, &key));

    // One that is not what its digest says is a damaged archive, as ever.
    let path = dir.path().join("good");
    let payload = entries[1]["digest"]
        .as_str()
        .unwrap()
        .parse::<Digest>()
        .unwrap();
    let file = path.join("blobs/sha256").join(payload.hex());
    let mut bytes = fs::read(&file).unwrap();
    bytes[10] ^= 1;
    fs::write(file, bytes).unwrap();
    let fresh = tempfile::tempdir().unwrap();
    let error = load(&Store::open(fresh.path()).unwrap(), &path).unwrap_err();
    assert_eq!(error.fault(), Fault::DigestMismatch, "{}", chain(&error));

    // Signatures alone are no image.
    write(&dir.path().join("alone"), &blobs, &entries[1..2]);
    let error = load(&store, &dir.path().join("alone")).unwrap_err();
    assert!(chain(&error).contains("no image"), "{}", chain(&error));
}
