//! What the registry endpoint removes, what it does not, and what must stay.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;

use serde_json::{Value, json};

use crate::bed::{Bed, Kind, manifest, wait_for, wait_until};
use crate::images::{await_blobs, blobs};
use crate::push::{INDEX, OCI, descriptor, digest_of, image, push_blob, put, uploads};

#[test]
fn what_is_needed_is_not_removed_and_what_is_not_goes() {
    let bed = Bed::start(Kind::Embedded);
    let document = image(&bed, "demo", "one");
    let index =
        json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": [descriptor(&document)]});
    let (child, digest) = (digest_of(&document), digest_of(&index));
    assert_eq!(put(&bed, "demo", &child.to_string(), &document).status, 201);
    assert_eq!(put(&bed, "demo", "v1", &index).status, 201);
    bed.apply(
        "shop",
        &manifest("shop", "hub.internal/demo:v1", "[{percent: 100}]"),
    );
    let layer = document["layers"][0]["digest"].as_str().unwrap().to_owned();
    for (path, says) in [
        ("manifests/v1".to_owned(), "app shop"),
        (format!("manifests/{digest}"), "app shop"),
        (format!("manifests/{child}"), "index"),
        (format!("blobs/{layer}"), "needs blob"),
    ] {
        let refused = bed.answer("DELETE", &format!("/v2/demo/{path}"), &[], b"");
        assert_eq!(
            (refused.status, &*refused.code()),
            (409, "DENIED"),
            "{path}"
        );
        let message = refused.json()["errors"][0]["message"].to_string();
        assert!(message.contains(says), "{path}: {message}");
    }
    assert_eq!(bed.call("DELETE", "/apps/shop", b"").0, 202);
    wait_until("the app to be gone", || {
        bed.get("/apps")["items"] == json!([])
    });
    // Another repository still counts on the layer: its own push is under way.
    let mount = format!("/v2/other/blobs/uploads/?mount={layer}");
    assert_eq!(bed.answer("POST", &mount, &[], b"").status, 201);
    wait_for("the release to be forgotten", || {
        let gone = bed.answer("DELETE", &format!("/v2/demo/manifests/{digest}"), &[], b"");
        if gone.status == 202 {
            Ok(())
        } else {
            Err(gone.json())
        }
    });
    assert_eq!(
        bed.answer("GET", "/v2/demo/manifests/v1", &[], b"").code(),
        "MANIFEST_UNKNOWN"
    );
    assert_eq!(
        bed.answer("DELETE", &format!("/v2/demo/manifests/{child}"), &[], b"")
            .status,
        202
    );
    for path in ["manifests/v1".to_owned(), format!("manifests/{digest}")] {
        let again = bed.answer("DELETE", &format!("/v2/demo/{path}"), &[], b"");
        assert_eq!(
            (again.status, &*again.code()),
            (404, "MANIFEST_UNKNOWN"),
            "{path}"
        );
    }
    let blob = |name: &str| bed.answer("DELETE", &format!("/v2/{name}/blobs/{layer}"), &[], b"");
    assert_eq!(blob("demo").status, 202);
    let there = |name: &str| {
        bed.answer("HEAD", &format!("/v2/{name}/blobs/{layer}"), &[], b"")
            .status
    };
    assert_eq!((there("demo"), there("other")), (404, 200));
    assert_eq!(blob("demo").code(), "BLOB_UNKNOWN", "once is enough");
    // A manifest that names it has it there again.
    assert_eq!(put(&bed, "demo", "again", &document).status, 201);
    assert_eq!(there("demo"), 200);
    let again = bed.answer("DELETE", "/v2/demo/manifests/again", &[], b"");
    assert_eq!(again.status, 202);
    assert_eq!(blob("demo").status, 202);
    assert_eq!(blob("other").status, 202);
    assert_eq!(blob("other").code(), "BLOB_UNKNOWN");
}

#[test]
fn who_pulls_what_is_removed_meanwhile_gets_it_whole() {
    let bed = Bed::start_with(Kind::Embedded, "[registry]\nunused_expires_s = 0\n");
    let content = "layer ".repeat(4_000_000);
    let document = image(&bed, "demo", &content);
    assert_eq!(put(&bed, "demo", "v1", &document).status, 201);
    let layer = document["layers"][0]["digest"].as_str().unwrap();
    let mut stream = TcpStream::connect(&bed.api).unwrap();
    let head = format!(
        "GET /v2/demo/blobs/{layer} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer {}\r\n\r\n",
        bed.token()
    );
    stream.write_all(head.as_bytes()).unwrap();
    let mut got = vec![0; 1 << 16];
    stream.read_exact(&mut got).unwrap();
    let removed = bed.answer("DELETE", "/v2/demo/manifests/v1", &[], b"");
    assert_eq!(removed.status, 202);
    await_blobs(&bed, &[]);
    stream.read_to_end(&mut got).unwrap();
    assert!(got.ends_with(content.as_bytes()), "{} bytes", got.len());
}

#[test]
fn whatever_is_removed_meanwhile_a_manifest_that_was_taken_is_whole() {
    let bed = Bed::start(Kind::Embedded);
    // Layers are shared, so that what one removes another counts on.
    let bed = &bed;
    let push = &|name: &str, round: usize| -> Result<Value, String> {
        let document = image(bed, name, &format!("layer {}", round % 3));
        let pushed = put(bed, name, &format!("v{round}"), &document);
        match (pushed.status, &*pushed.code()) {
            (201, _) => Ok(document),
            // Removed by another between its push and this.
            (400, "MANIFEST_BLOB_UNKNOWN") => Err(pushed.code()),
            _ => panic!("{pushed:?}"),
        }
    };
    std::thread::scope(|scope| {
        for name in ["a", "b", "c"] {
            scope.spawn(move || {
                for round in 0..25 {
                    let Ok(document) = push(name, round) else {
                        continue;
                    };
                    for part in [&document["config"], &document["layers"][0]] {
                        let digest = part["digest"].as_str().unwrap();
                        let path = format!("/v2/{name}/blobs/{digest}");
                        assert_eq!(bed.answer("GET", &path, &[], b"").status, 200, "{path}");
                        let removed = bed.answer("DELETE", &path, &[], b"");
                        assert_eq!(removed.status, 409, "{path} is needed");
                    }
                    let digest = digest_of(&document);
                    let path = format!("/v2/{name}/manifests/{digest}");
                    assert_eq!(bed.answer("DELETE", &path, &[], b"").status, 202);
                    let layer = document["layers"][0]["digest"].as_str().unwrap();
                    let gone = bed.answer("DELETE", &format!("/v2/{name}/blobs/{layer}"), &[], b"");
                    assert!(matches!(gone.status, 202 | 404 | 409), "{gone:?}");
                }
            });
        }
    });
    assert_eq!(uploads(bed), 0);
}

#[test]
fn signatures_are_found_by_what_they_are_about_and_stay_as_long_as_that() {
    let bed = Bed::start_with(Kind::Embedded, "[registry]\nunused_expires_s = 0\n");
    let document = image(&bed, "demo", "one");
    assert_eq!(put(&bed, "demo", "v1", &document).status, 201);
    let subject = digest_of(&document);
    let empty = push_blob(&bed, "demo", b"{}");
    let about = |kind: &str| {
        json!({
            "schemaVersion": 2, "mediaType": OCI, "artifactType": kind, "config": empty, "layers": [empty],
            "subject": descriptor(&document), "annotations": {"made": kind},
        })
    };
    let list = |query: &str| {
        bed.answer(
            "GET",
            &format!("/v2/demo/referrers/{subject}{query}"),
            &[],
            b"",
        )
    };
    assert_eq!(
        list("").json()["manifests"],
        json!([]),
        "an empty index, not an error"
    );
    for kind in ["x/signature", "x/sbom"] {
        let signature = about(kind);
        let pushed = put(&bed, "demo", &digest_of(&signature).to_string(), &signature);
        assert_eq!(
            (pushed.status, pushed.header("oci-subject")),
            (201, &*subject.to_string()),
            "{pushed:?}"
        );
    }
    let all = list("");
    assert_eq!(
        (
            all.header("content-type"),
            all.json()["manifests"].as_array().unwrap().len()
        ),
        (INDEX, 2)
    );
    let signatures = list("?artifactType=x/signature");
    assert_eq!(signatures.header("oci-filters-applied"), "artifactType");
    let found = &signatures.json()["manifests"];
    assert_eq!(
        found[0]["digest"],
        digest_of(&about("x/signature")).to_string(),
        "{found}"
    );
    assert_eq!(
        (
            &found[0]["annotations"]["made"],
            found.as_array().unwrap().len()
        ),
        (&"x/signature".into(), 1)
    );
    let page = list("?n=1");
    let next = page
        .header("link")
        .strip_prefix('<')
        .unwrap()
        .split_once('>')
        .unwrap()
        .0
        .to_owned();
    let second = bed.answer("GET", &next, &[], b"");
    assert_ne!(
        second.json()["manifests"][0]["digest"],
        page.json()["manifests"][0]["digest"]
    );
    assert_eq!(second.header("link"), "");

    // Nothing else names them, and nothing waits for them; a sweep leaves them until the image goes.
    let kept = blobs(&bed);
    assert_eq!(
        put(&bed, "demo", "gone", &image(&bed, "demo", "two")).status,
        201
    );
    assert_eq!(
        bed.answer("DELETE", "/v2/demo/manifests/gone", &[], b"")
            .status,
        202
    );
    await_blobs(&bed, &kept);
    assert_eq!(list("").json()["manifests"].as_array().unwrap().len(), 2);
    assert_eq!(
        bed.answer("DELETE", "/v2/demo/manifests/v1", &[], b"")
            .status,
        202
    );
    await_blobs(&bed, &[]);
    assert_eq!(list("").json()["manifests"], json!([]));
}
