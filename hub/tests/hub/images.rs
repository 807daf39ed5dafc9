//! Archives made by other tools come in, and other tools pull them out again.

use std::path::Path;
use std::process::Command;

use base64::Engine as _;
use serde_json::Value;

use crate::bed::{Bed, Kind, manifest, wait_for};

pub(crate) fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .unwrap_or_else(|error| {
            panic!("{program}: {error}; install {program}, or run cargo xtask test")
        });
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// An OCI archive of an image of one file that says `tag`, made by umoci and skopeo.
pub(crate) fn oci_archive(dir: &Path, tag: &str) -> Vec<u8> {
    let layout = layout(dir, tag);
    let archive = dir.join(format!("{tag}.tar"));
    _ = std::fs::remove_file(&archive);
    let target = format!("oci-archive:{}:demo:{tag}", archive.display());
    run(
        "skopeo",
        &["copy", "--quiet", &format!("oci:{layout}:{tag}"), &target],
    );
    std::fs::read(archive).unwrap()
}

pub(crate) fn layout(dir: &Path, tag: &str) -> String {
    let layout = dir.join(format!("layout-{tag}")).display().to_string();
    let image = format!("{layout}:{tag}");
    if !Path::new(&layout).exists() {
        let file = dir.join(format!("{tag}.txt"));
        std::fs::write(&file, tag).unwrap();
        run("umoci", &["init", "--layout", &layout]);
        run("umoci", &["new", "--image", &image]);
        run(
            "umoci",
            &[
                "insert",
                "--rootless",
                "--image",
                &image,
                &file.display().to_string(),
                "/hello",
            ],
        );
        run(
            "umoci",
            &["config", "--image", &image, "--config.cmd", "/hello"],
        );
    }
    layout
}

fn device_login(bed: &Bed) -> String {
    let text = format!("device-0:{}", bed.join_token());
    format!(
        "Basic {}",
        base64::engine::general_purpose::STANDARD.encode(text)
    )
}

#[test]
fn an_image_goes_in_as_an_archive_and_out_through_skopeo() {
    let bed = Bed::start(Kind::Embedded);
    let reference = bed.import("v1");
    assert_eq!(reference, "hub.internal/demo:v1");
    let listed = bed.get("/images");
    let image = &listed["items"][0];
    assert_eq!(image["platforms"][0], "linux/amd64", "{listed}");

    // A device's login.
    let credentials = format!("device-0:{}", bed.join_token());
    let source = format!("docker://{}/demo:v1", bed.api);
    let out = bed.path("pulled").display().to_string();
    run(
        "skopeo",
        &[
            "copy",
            "--quiet",
            "--src-tls-verify=false",
            "--src-creds",
            &credentials,
            &source,
            &format!("oci:{out}:v1"),
        ],
    );
    let index: Value =
        serde_json::from_slice(&std::fs::read(Path::new(&out).join("index.json")).unwrap())
            .unwrap();
    assert_eq!(
        index["manifests"][0]["digest"], image["digest"],
        "what comes out is what went in"
    );
    let tags: Value = serde_json::from_str(&run(
        "skopeo",
        &[
            "list-tags",
            "--tls-verify=false",
            "--creds",
            &credentials,
            &format!("docker://{}/demo", bed.api),
        ],
    ))
    .unwrap();
    assert_eq!(tags["Tags"], serde_json::json!(["v1"]));

    let (status, body) = bed.request("GET", "/v2/demo/manifests/v1", None, b"");
    assert_eq!(
        (status, &body["errors"][0]["code"]),
        (401, &Value::from("UNAUTHORIZED"))
    );
    let operator = format!("Bearer {}", bed.token());
    for (path, code) in [
        ("/v2/demo/manifests/v2".to_owned(), "MANIFEST_UNKNOWN"),
        ("/v2/other/tags/list".to_owned(), "NAME_UNKNOWN"),
        (
            format!("/v2/demo/blobs/sha256:{}", "0".repeat(64)),
            "BLOB_UNKNOWN",
        ),
        ("/v2/demo/blobs/../../hub.db".to_owned(), "NAME_INVALID"),
        ("/v2/nonsense".to_owned(), "NAME_INVALID"),
    ] {
        let (status, body) = bed.request("GET", &path, Some(&operator), b"");
        assert_eq!(
            (status, &body["errors"][0]["code"]),
            (404, &Value::from(code)),
            "{path}"
        );
    }
    let (status, _) = bed.request("PUT", "/v2/demo/manifests/v1", Some(&operator), b"{}");
    assert_eq!(status, 400, "an empty object is no manifest");
    let (status, body) = bed.request(
        "PUT",
        "/v2/demo/manifests/v1",
        Some(&device_login(&bed)),
        b"{}",
    );
    assert_eq!(
        (status, &body["errors"][0]["code"]),
        (403, &Value::from("DENIED")),
        "devices only pull"
    );
}

#[test]
fn a_docker_archive_is_an_image_too_and_a_moved_tag_keeps_what_it_named() {
    let bed = Bed::start(Kind::Embedded);
    let image = bed.import("v1");
    bed.apply("shop", &manifest("shop", &image, "[{percent: 100}]"));
    let first = bed.get("/images")["items"][0]["digest"].clone();
    let docker = bed.path("docker.tar");
    let dir = bed.path("");
    let source = format!("oci:{}:v2", layout(&dir, "v2"));
    run(
        "skopeo",
        &[
            "copy",
            "--quiet",
            &source,
            &format!("docker-archive:{}:demo:v1", docker.display()),
        ],
    );
    // Without a name: the archive says what it is called.
    let (status, body) = bed.call("POST", "/images", &std::fs::read(&docker).unwrap());
    assert_eq!(
        (status, &body["reference"]),
        (201, &Value::from("hub.internal/demo:v1")),
        "{body}"
    );
    assert_ne!(body["digest"], first);
    let operator = format!("Bearer {}", bed.token());
    let old = format!("/v2/demo/manifests/{}", first.as_str().unwrap());
    assert_eq!(
        bed.request("GET", &old, Some(&operator), b"").0,
        200,
        "a device may still go back to it"
    );
}

#[test]
fn bad_archives_are_refused_by_what_is_wrong_and_leave_nothing() {
    let bed = Bed::start(Kind::Embedded);
    let good = oci_archive(&bed.path(""), "v1");
    let mut damaged = good.clone();
    let middle = damaged.len() / 2;
    damaged[middle..middle + 64].fill(0xa5);
    let huge = vec![0; 80 << 20];
    for (what, path, body, status, code) in [
        (
            "not a tar",
            "/images?name=x:1",
            &b"hello"[..],
            422,
            "bad-image",
        ),
        ("empty", "/images?name=x:1", b"", 422, "bad-image"),
        (
            "cut short",
            "/images?name=x:1",
            &good[..good.len() / 2],
            422,
            "",
        ),
        ("damaged", "/images?name=x:1", &damaged, 422, ""),
        ("bad name", "/images?name=X:1", &good, 400, "bad-image-name"),
        ("no such key", "/images?title=x", &good, 400, "bad-request"),
        (
            "too large",
            "/images?name=x:1",
            &huge,
            413,
            "image-too-large",
        ),
    ] {
        let (found, body) = bed.call("POST", path, body);
        assert_eq!(found, status, "{what}: {body}");
        assert!(code.is_empty() || body["code"] == code, "{what}: {body}");
    }
    assert_eq!(bed.get("/images")["items"], serde_json::json!([]));
    let left: Vec<_> = std::fs::read_dir(bed.data().join("images/uploads"))
        .unwrap()
        .collect();
    assert!(left.is_empty(), "{left:?}");

    let (status, body) = bed.call(
        "PUT",
        "/apps/a",
        manifest("a", "hub.internal/x:1", "[{percent: 100}]").as_bytes(),
    );
    assert_eq!(
        (status, &body["code"]),
        (422, &Value::from("unknown-image")),
        "{body}"
    );
}

pub(crate) fn blobs(bed: &Bed) -> Vec<String> {
    let entries = std::fs::read_dir(bed.data().join("images/blobs/sha256")).unwrap();
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

pub(crate) fn await_blobs(bed: &Bed, expected: &[String]) {
    wait_for("the image directory to be swept", || {
        let found = blobs(bed);
        if found == expected {
            Ok(())
        } else {
            Err(found)
        }
    });
}

#[test]
fn what_a_refused_or_killed_import_left_is_swept_and_what_is_used_stays() {
    let mut bed = Bed::start(Kind::Embedded);
    bed.import("v1");
    let used = blobs(&bed);
    assert!(!used.is_empty());

    // Two images in one archive: taken apart whole before the hub can say that it does not know which is meant.
    let dir = bed.path("");
    let both = dir.join("both").display().to_string();
    for tag in ["v2", "v3"] {
        let source = format!("oci:{}:{tag}", layout(&dir, tag));
        run(
            "skopeo",
            &["copy", "--quiet", &source, &format!("oci:{both}:{tag}")],
        );
    }
    let archive = dir.join("both.tar").display().to_string();
    run("tar", &["-C", &both, "-cf", &archive, "."]);
    let (status, body) = bed.call("POST", "/images", &std::fs::read(&archive).unwrap());
    assert_eq!(
        (status, &body["code"]),
        (400, &Value::from("several-images")),
        "{body}"
    );
    await_blobs(&bed, &used);

    // A hub that was killed after an import's blobs were in place and before its name was.
    bed.kill_hub();
    let orphan = bed.data().join("images/blobs/sha256").join("0".repeat(64));
    std::fs::write(&orphan, "orphan").unwrap();
    bed.start_hub();
    await_blobs(&bed, &used);
    let operator = format!("Bearer {}", bed.token());
    assert_eq!(
        bed.request("GET", "/v2/demo/manifests/v1", Some(&operator), b"")
            .0,
        200
    );
}

#[test]
fn an_image_is_removed_once_no_app_needs_it() {
    let bed = Bed::start(Kind::Embedded);
    let first = bed.import("v1");
    let (status, body) = bed.call(
        "POST",
        "/images?name=acme/demo:v1",
        &oci_archive(&bed.path(""), "v1"),
    );
    assert_eq!(status, 201, "{body}");
    bed.apply("shop", &manifest("shop", &first, "[{percent: 100}]"));
    bed.await_rollout("shop", "completed");
    let used = blobs(&bed);

    // The same image under another name: nothing breaks without that.
    assert_eq!(bed.call("DELETE", "/images/acme/demo:v1", b"").0, 204);
    let (status, body) = bed.call("DELETE", "/images/acme/demo:v1", b"");
    assert_eq!(
        (status, &body["code"]),
        (404, &Value::from("unknown-image")),
        "{body}"
    );
    let (status, body) = bed.call("DELETE", "/images/Demo:v1", b"");
    assert_eq!(
        (status, &body["code"]),
        (400, &Value::from("bad-image-name")),
        "{body}"
    );

    let refused = |why: &str| {
        let (status, body) = bed.call("DELETE", "/images/demo:v1", b"");
        assert_eq!(
            (status, &body["code"]),
            (409, &Value::from("image-in-use")),
            "{why}: {body}"
        );
        assert!(
            body["detail"].as_str().unwrap().contains("app shop"),
            "{why}: {body}"
        );
    };
    refused("the app is at it");
    let second = bed.import("v2");
    bed.apply("shop", &manifest("shop", &second, "[{percent: 100}]"));
    bed.await_rollout("shop", "completed");
    refused("the app can go back to it");
    let third = bed.import("v3");
    bed.apply("shop", &manifest("shop", &third, "[{percent: 100}]"));
    bed.await_rollout("shop", "completed");
    let all = blobs(&bed);
    assert_eq!(
        bed.call("DELETE", "/images/demo:v1", b"").0,
        204,
        "two releases back"
    );
    let left: Vec<String> = all
        .into_iter()
        .filter(|blob| !used.contains(blob))
        .collect();
    await_blobs(&bed, &left);
    assert!(bed.event_kinds().contains(&"image-removed".to_owned()));
    let operator = format!("Bearer {}", bed.token());
    for tag in ["v2", "v3"] {
        assert_eq!(
            bed.request(
                "GET",
                &format!("/v2/demo/manifests/{tag}"),
                Some(&operator),
                b""
            )
            .0,
            200
        );
    }
}

#[test]
fn images_that_an_older_hub_imported_are_pulled_and_kept() {
    let mut bed = Bed::start(Kind::Embedded);
    bed.import("v1");
    let used = blobs(&bed);
    let digest = bed.get("/images")["items"][0]["digest"]
        .as_str()
        .unwrap()
        .to_owned();
    bed.stop_hub();
    let database = rusqlite::Connection::open(bed.data().join("hub.db")).unwrap();
    assert!(database.execute("DELETE FROM manifest", []).unwrap() > 0);
    drop(database);
    bed.start_hub();
    let operator = format!("Bearer {}", bed.token());
    for reference in ["v1", &digest] {
        let path = format!("/v2/demo/manifests/{reference}");
        assert_eq!(bed.request("GET", &path, Some(&operator), b"").0, 200);
    }
    assert_eq!(blobs(&bed), used);
}

/// What cosign attaches comes along, and devices find it where they would find what was pushed.
#[test]
fn signatures_in_an_archive_are_found_by_tag_and_by_what_they_are_about() {
    let bed = Bed::start(Kind::Embedded);
    let dir = tempfile::tempdir().unwrap();
    let layout = layout(dir.path(), "v1");
    let blobs = Path::new(&layout).join("blobs/sha256");
    let put = |kind: &str, bytes: &[u8]| {
        let digest = foreshore_protocol::Digest::of(bytes);
        std::fs::write(blobs.join(digest.hex()), bytes).unwrap();
        serde_json::json!({"mediaType": kind, "digest": digest, "size": bytes.len()})
    };
    let index_path = Path::new(&layout).join("index.json");
    let mut index: Value = serde_json::from_slice(&std::fs::read(&index_path).unwrap()).unwrap();
    let image = index["manifests"][0].clone();
    let digest = image["digest"].as_str().unwrap().to_owned();
    let manifest = "application/vnd.oci.image.manifest.v1+json";
    let payload = serde_json::json!({"critical": {
        "image": {"docker-manifest-digest": digest}, "type": "cosign container image signature",
    }});
    let simple = "application/vnd.dev.cosign.simplesigning.v1+json";
    let mut layer = put(simple, payload.to_string().as_bytes());
    layer["annotations"] = serde_json::json!({"dev.cosignproject.cosign/signature": "AAAA"});
    let config = put(
        "application/vnd.oci.image.config.v1+json",
        b"{\"rootfs\":{\"diff_ids\":[]}}",
    );
    let signatures = serde_json::json!({"schemaVersion": 2, "mediaType": manifest, "config": config, "layers": [layer]});
    let mut signatures = put(manifest, signatures.to_string().as_bytes());
    let tag = digest.replace(':', "-") + ".sig";
    signatures["annotations"] = serde_json::json!({"org.opencontainers.image.ref.name": tag});
    let bundle = "application/vnd.dev.sigstore.bundle.v0.3+json";
    let statement = base64::engine::general_purpose::STANDARD.encode("{}");
    let envelope = serde_json::json!({"dsseEnvelope": {
        "payload": statement, "payloadType": "application/vnd.in-toto+json", "signatures": [{"sig": "AAAA"}],
    }});
    let layer = put(bundle, envelope.to_string().as_bytes());
    let config = put("application/vnd.oci.empty.v1+json", b"{}");
    let referrer = serde_json::json!({
        "schemaVersion": 2, "mediaType": manifest, "artifactType": bundle, "config": config,
        "layers": [layer], "subject": image,
    });
    let referrer = put(manifest, referrer.to_string().as_bytes());
    index["manifests"] = serde_json::json!([image, signatures, referrer]);
    std::fs::write(&index_path, index.to_string()).unwrap();
    let archive = dir.path().join("signed.tar");
    let archive_path = archive.display().to_string();
    run("tar", &["-C", &layout, "-cf", &archive_path, "."]);

    let archive = std::fs::read(archive).unwrap();
    let (status, view) = bed.call("POST", "/images?name=demo:v1", &archive);
    assert_eq!(status, 201, "{view}");
    assert_eq!(view["digest"], *digest);
    let operator = format!("Bearer {}", bed.token());
    let get = |path: &str| bed.request("GET", path, Some(&operator), b"");
    let found = || {
        let (status, listed) = get(&format!("/v2/demo/referrers/{digest}"));
        assert_eq!(
            (status, &listed["manifests"][0]["digest"]),
            (200, &referrer["digest"])
        );
        for reference in [&*tag, referrer["digest"].as_str().unwrap()] {
            let (status, manifest) = get(&format!("/v2/demo/manifests/{reference}"));
            assert_eq!(status, 200, "{reference}: {manifest}");
            for part in [&manifest["config"], &manifest["layers"][0]] {
                let blob = part["digest"].as_str().unwrap();
                let (status, _) = get(&format!("/v2/demo/blobs/{blob}"));
                assert_eq!(status, 200, "{reference}: {part}");
            }
        }
    };
    found();
    // Another import sweeps what nobody needs; this is needed.
    bed.import("v2");
    found();
}
