//! Archives made by other tools come in, and other tools pull them out again.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::bed::{Bed, Kind, manifest};

fn run(program: &str, arguments: &[&str]) -> String {
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

fn layout(dir: &Path, tag: &str) -> String {
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
    assert_eq!(status, 405);
}

#[test]
fn a_docker_archive_is_an_image_too_and_a_moved_tag_keeps_what_it_named() {
    let bed = Bed::start(Kind::Embedded);
    bed.import("v1");
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
