//! Images in layouts on disk become an artifact from which every new layer can be made.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::fs;
use std::io::{Read as _, Write as _};
use std::path::Path;

use foreshore_delta::image::{DeltaMakeError, Image, make, tag};
use foreshore_images::delta::Rebuilt;
use foreshore_images::delta::artifact::Artifact;
use foreshore_images::{Digest, Platform};
use serde_json::{Value, json};

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

type Files = Vec<(&'static str, Vec<u8>)>;

fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(seed);
    (0..length).map(|_| random.u8(..)).collect()
}

fn tar(files: &Files) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (path, content) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        builder
            .append_data(&mut header, path, &content[..])
            .unwrap();
    }
    builder.into_inner().unwrap()
}

fn put(layout: &Path, bytes: &[u8]) -> Value {
    let digest = Digest::of(bytes);
    fs::create_dir_all(layout.join("blobs/sha256")).unwrap();
    fs::write(layout.join("blobs/sha256").join(digest.hex()), bytes).unwrap();
    json!({"digest": digest.to_string(), "size": bytes.len(), "mediaType": "application/octet-stream"})
}

fn with(mut descriptor: Value, key: &str, value: Value) -> Value {
    descriptor[key] = value;
    descriptor
}

/// Adds an image to a layout; its manifest's descriptor.
fn image(layout: &Path, architecture: &str, layers: &[Files], lie: bool) -> Value {
    let mut diff_ids = Vec::new();
    let mut blobs = Vec::new();
    for files in layers {
        let tar = tar(files);
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        gzip.write_all(&tar).unwrap();
        diff_ids.push(Digest::of(if lie { b"lie" } else { &tar[..] }).to_string());
        let kind = json!("application/vnd.oci.image.layer.v1.tar+gzip");
        blobs.push(with(
            put(layout, &gzip.finish().unwrap()),
            "mediaType",
            kind,
        ));
    }
    let config = json!({
        "os": "linux", "architecture": architecture, "config": {},
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    });
    let config = put(layout, config.to_string().as_bytes());
    let kind = json!("application/vnd.oci.image.config.v1+json");
    let manifest = json!({
        "schemaVersion": 2, "mediaType": MANIFEST,
        "config": with(config, "mediaType", kind), "layers": blobs,
    });
    let manifest = put(layout, manifest.to_string().as_bytes());
    with(manifest, "mediaType", json!(MANIFEST))
}

fn index(layout: &Path, manifests: &[Value]) {
    let index = json!({"schemaVersion": 2, "manifests": manifests});
    fs::write(layout.join("index.json"), index.to_string()).unwrap();
    fs::write(
        layout.join("oci-layout"),
        r#"{"imageLayoutVersion":"1.0.0"}"#,
    )
    .unwrap();
}

fn named(manifest: Value, name: &str) -> Value {
    let name = json!({"org.opencontainers.image.ref.name": name});
    with(manifest, "annotations", name)
}

fn amd64() -> Platform {
    Platform::linux("amd64", "")
}

fn open(layout: &Path, name: &str) -> Image {
    Image::open(&format!("{}:{name}", layout.display()), &amd64()).unwrap()
}

fn blob(layout: &Path, digest: &Value) -> Vec<u8> {
    let digest: Digest = digest.as_str().unwrap().parse().unwrap();
    let bytes = fs::read(layout.join("blobs/sha256").join(digest.hex())).unwrap();
    assert_eq!(Digest::of(&bytes), digest);
    bytes
}

#[test]
fn every_new_layer_can_be_made_of_either_old_image() {
    let dir = tempfile::tempdir().unwrap();
    let layout = dir.path().join("images");
    let base: Files = vec![("usr/lib/base.so", noise(1, 90_000))];
    let app = |seed: u64| -> Files {
        let mut program = noise(2, 400_000);
        program[usize::try_from(seed).unwrap() * 1000] ^= 1;
        vec![("usr/bin/app", program), ("etc/app.conf", noise(3, 5_000))]
    };
    let versions: Vec<Value> = (1..=3)
        .map(|version| {
            let manifest = image(&layout, "amd64", &[base.clone(), app(version)], false);
            named(manifest, &format!("v{version}"))
        })
        .collect();
    index(&layout, &versions);
    let deltas = dir.path().join("deltas");
    let to = open(&layout, "v3");
    let from = [open(&layout, "v1"), open(&layout, "v2")];
    let reports = make(&from, &to, 19, &deltas).unwrap();

    let names: Value =
        serde_json::from_slice(&fs::read(deltas.join("index.json")).unwrap()).unwrap();
    let name = &names["manifests"][0]["annotations"]["org.opencontainers.image.ref.name"];
    assert_eq!(name.as_str().unwrap(), tag(&to.manifest.digest));
    let referrers: Value =
        serde_json::from_slice(&blob(&deltas, &names["manifests"][0]["digest"])).unwrap();
    assert_eq!(referrers["manifests"].as_array().unwrap().len(), 2);
    for ((version, report), listed) in (1..=2).zip(&reports).zip(0..) {
        let artifact =
            Artifact::parse(&blob(&deltas, &referrers["manifests"][listed]["digest"])).unwrap();
        assert_eq!(artifact.subject.digest, to.manifest.digest);
        assert_eq!(artifact.from, from[listed].manifest.digest);
        // The base is the same and takes nothing.
        let [layer] = &artifact.layers[..] else {
            panic!("{:?}", artifact.layers);
        };
        assert!(layer.size * 100 < report.layers[0].blob, "{layer:?}");
        let tree = dir.path().join(format!("tree{version}"));
        for (path, content) in app(version) {
            let path = tree.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        assert_eq!(layer.trees, [Digest::of(&tar(&app(version)))]);
        let delta = blob(&deltas, &json!(layer.digest.to_string()));
        let mut made = Vec::new();
        Rebuilt::new(&delta[..], &[tree])
            .unwrap()
            .read_to_end(&mut made)
            .unwrap();
        assert_eq!(Digest::of(&made), layer.diff_id);
        assert_eq!(layer.diff_id, Digest::of(&tar(&app(3))));
    }
}

#[test]
fn what_cannot_be_used_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let layout = dir.path().join("images");
    let files = |seed| -> Vec<Files> { vec![vec![("app", noise(seed, 1000))]] };
    let good = image(&layout, "amd64", &files(1), false);
    let other = image(&layout, "arm64", &files(2), false);
    let liar = image(&layout, "amd64", &files(3), true);
    index(
        &layout,
        &[
            named(good, "good"),
            named(other, "other"),
            named(liar, "liar"),
        ],
    );
    let path = layout.display().to_string();
    let open_error = |spec: &str| Image::open(spec, &amd64()).unwrap_err();
    assert!(matches!(open_error(&path), DeltaMakeError::Which { .. }));
    let nobody = open_error(&format!("{path}:nobody"));
    assert!(nobody.to_string().contains("good, other, liar"), "{nobody}");
    let arm = open_error(&format!("{path}:other"));
    assert!(arm.to_string().contains("linux/arm64"), "{arm}");
    assert!(matches!(
        open_error("/nonexistent/image.tar"),
        DeltaMakeError::Import { .. }
    ));
    let (good, liar) = (open(&layout, "good"), open(&layout, "liar"));
    let into = dir.path().join("deltas");
    let lie = make(&[liar], &good, 3, &into).unwrap_err();
    assert!(matches!(lie, DeltaMakeError::DiffId { .. }), "{lie}");
    let again = make(&[], &good, 3, &into).unwrap_err();
    assert!(matches!(again, DeltaMakeError::Exists(_)), "{again}");
}

#[test]
fn equal_images_need_no_delta() {
    let dir = tempfile::tempdir().unwrap();
    let layout = dir.path().join("images");
    let files = || -> Files { vec![("app", noise(1, 1000))] };
    let one = image(&layout, "amd64", &[files()], false);
    let twice = image(&layout, "amd64", &[files(), files()], false);
    index(&layout, &[named(one, "v1"), named(twice, "v2")]);
    let [old, new] = ["v1", "v2"].map(|name| open(&layout, name));
    let into = dir.path().join("deltas");
    let reports = make(&[open(&layout, "v1")], &new, 3, &into).unwrap();
    assert_eq!(
        (reports[0].artifact, &reports[0].layers[..]),
        (None, &[][..])
    );
    let place = dir.path().join("none");
    let same = make(&[open(&layout, "v1")], &old, 3, &place).unwrap_err();
    assert!(matches!(same, DeltaMakeError::Same(_)), "{same}");
    assert!(!place.exists());
}
