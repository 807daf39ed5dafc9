//! The registry endpoint, call by call: what a client of the distribution specification may do, and what it may not.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;

use foreshore_protocol::Digest;
use serde_json::{Value, json};

use crate::bed::{Answer, Bed, Kind, manifest, wait_for, wait_until};
use crate::images::{await_blobs, blobs};

pub(crate) const OCI: &str = "application/vnd.oci.image.manifest.v1+json";
pub(crate) const INDEX: &str = "application/vnd.oci.image.index.v1+json";

/// A blob in one request.
pub(crate) fn push_blob(bed: &Bed, name: &str, content: &[u8]) -> Value {
    let digest = Digest::of(content);
    let path = format!("/v2/{name}/blobs/uploads/?digest={digest}");
    let pushed = bed.answer("POST", &path, &[], content);
    assert_eq!(pushed.status, 201, "{pushed:?}");
    assert_eq!(
        pushed.header("location"),
        format!("/v2/{name}/blobs/{digest}")
    );
    json!({"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": digest, "size": content.len()})
}

/// An image of one layer; its manifest, whose blobs are there.
pub(crate) fn image(bed: &Bed, name: &str, content: &str) -> Value {
    let layer = push_blob(bed, name, content.as_bytes());
    let config = json!({"os": "linux", "architecture": "arm64", "rootfs": {"type": "layers", "diff_ids": [layer["digest"]]}});
    let mut config = push_blob(bed, name, config.to_string().as_bytes());
    config["mediaType"] = "application/vnd.oci.image.config.v1+json".into();
    json!({"schemaVersion": 2, "mediaType": OCI, "config": config, "layers": [layer]})
}

pub(crate) fn put(bed: &Bed, name: &str, reference: &str, document: &Value) -> Answer {
    let kind = document["mediaType"].as_str().unwrap().to_owned();
    let path = format!("/v2/{name}/manifests/{reference}");
    bed.answer(
        "PUT",
        &path,
        &[("content-type", &kind)],
        document.to_string().as_bytes(),
    )
}

pub(crate) fn digest_of(document: &Value) -> Digest {
    Digest::of(document.to_string().as_bytes())
}

pub(crate) fn descriptor(document: &Value) -> Value {
    json!({"mediaType": document["mediaType"], "digest": digest_of(document), "size": document.to_string().len()})
}

pub(crate) fn uploads(bed: &Bed) -> usize {
    std::fs::read_dir(bed.data().join("pushes"))
        .unwrap()
        .count()
}

#[test]
fn a_blob_comes_in_chunks_and_a_wrong_chunk_changes_nothing() {
    let bed = Bed::start(Kind::Embedded);
    let content: Vec<u8> = (0..200_000_u32).flat_map(u32::to_le_bytes).collect();
    let digest = Digest::of(&content);
    let begun = bed.answer("POST", "/v2/acme/demo/blobs/uploads/", &[], b"");
    assert_eq!(begun.status, 202);
    let place = begun.header("location").to_owned();
    assert!(place.starts_with("/v2/acme/demo/blobs/uploads/"), "{place}");
    let half = content.len() / 2;
    let first = format!("0-{}", half - 1);
    let sent = bed.answer(
        "PATCH",
        &place,
        &[("content-range", &first)],
        &content[..half],
    );
    assert_eq!(
        (sent.status, sent.header("range")),
        (202, &*first),
        "{sent:?}"
    );

    for (range, bytes, status, code) in [
        (first.as_str(), &content[..half], 416, "BLOB_UPLOAD_INVALID"),
        ("800001-800002", b"xx", 416, "BLOB_UPLOAD_INVALID"),
        ("9-1", b"x", 400, "SIZE_INVALID"),
        ("-1-0", b"x", 400, "SIZE_INVALID"),
        ("0-18446744073709551615", b"x", 400, "SIZE_INVALID"),
        ("400000-400009", b"x", 400, "SIZE_INVALID"),
        ("nonsense", b"x", 400, "SIZE_INVALID"),
    ] {
        let refused = bed.answer("PATCH", &place, &[("content-range", range)], bytes);
        assert_eq!(
            (refused.status, &*refused.code()),
            (status, code),
            "{range}: {refused:?}"
        );
        if status == 416 {
            assert_eq!(
                (refused.header("range"), refused.header("location")),
                (&*first, &*place)
            );
        }
    }
    let told = bed.answer("GET", &place, &[], b"");
    assert_eq!((told.status, told.header("range")), (204, &*first));
    let elsewhere = place.replace("acme/demo", "acme/other");
    let refused = bed.answer("GET", &elsewhere, &[], b"");
    assert_eq!(
        (refused.status, &*refused.code()),
        (404, "BLOB_UPLOAD_UNKNOWN")
    );

    let rest = format!("{half}-{}", content.len() - 1);
    let end = format!("{place}?digest={}", digest.to_string().replace(':', "%3A"));
    let done = bed.answer("PUT", &end, &[("content-range", &rest)], &content[half..]);
    assert_eq!(done.status, 201, "{done:?}");
    assert_eq!(done.header("docker-content-digest"), digest.to_string());
    assert_eq!(
        bed.answer("GET", done.header("location"), &[], b"").bytes,
        content
    );
    assert_eq!(
        bed.answer("GET", &place, &[], b"").code(),
        "BLOB_UPLOAD_UNKNOWN"
    );
    assert_eq!(uploads(&bed), 0);

    // Another repository takes it over; of what is not there, an upload is begun.
    let mount = |digest: &str| {
        let path = format!("/v2/acme/third/blobs/uploads/?mount={digest}&from=acme/demo");
        bed.answer("POST", &path, &[], b"")
    };
    let mounted = mount(&digest.to_string());
    assert_eq!(mounted.status, 201);
    assert_eq!(
        mounted.header("location"),
        format!("/v2/acme/third/blobs/{digest}")
    );
    for absent in [Digest::of(b"absent").to_string(), "nonsense".to_owned()] {
        let begun = mount(&absent);
        assert_eq!(begun.status, 202, "{absent}");
        let cancelled = bed.answer("DELETE", begun.header("location"), &[], b"");
        assert_eq!(cancelled.status, 204);
    }
    assert_eq!(uploads(&bed), 0);
}

#[test]
fn wrong_digests_sizes_and_names_are_refused_and_leave_nothing() {
    let bed = Bed::start(Kind::Embedded);
    let other = Digest::of(b"other");
    let begin = || {
        let begun = bed.answer("POST", "/v2/demo/blobs/uploads/", &[], b"");
        begun.header("location").to_owned()
    };
    let place = begin();
    let wrong = bed.answer("PUT", &format!("{place}?digest={other}"), &[], b"content");
    assert_eq!(
        (wrong.status, &*wrong.code()),
        (400, "DIGEST_INVALID"),
        "{wrong:?}"
    );
    assert_eq!(
        bed.answer("GET", &place, &[], b"").status,
        404,
        "it is over"
    );
    let wrong = bed.answer(
        "POST",
        &format!("/v2/demo/blobs/uploads/?digest={other}"),
        &[],
        b"content",
    );
    assert_eq!(
        (wrong.status, &*wrong.code()),
        (400, "DIGEST_INVALID"),
        "{wrong:?}"
    );
    for bad in ["sha512:00", "sha256:xyz", "../../../etc/passwd", ""] {
        let wrong = bed.answer(
            "POST",
            &format!("/v2/demo/blobs/uploads/?digest={bad}"),
            &[],
            b"content",
        );
        assert_eq!(
            (wrong.status, &*wrong.code()),
            (400, "DIGEST_INVALID"),
            "{bad}: {wrong:?}"
        );
    }
    let place = begin();
    let wrong = bed.answer("PUT", &place, &[], b"content");
    assert_eq!(
        (wrong.status, &*wrong.code()),
        (400, "DIGEST_INVALID"),
        "none at all"
    );
    assert_eq!(bed.answer("DELETE", &place, &[], b"").status, 204);

    // [api] max_image_bytes is 64 MiB in these tests.
    let place = begin();
    let mut stream = TcpStream::connect(&bed.api).unwrap();
    let head = format!(
        "PATCH {place} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {}\r\nContent-Length: 68719476736\r\nExpect: 100-continue\r\n\r\n",
        bed.token()
    );
    stream.write_all(head.as_bytes()).unwrap();
    let mut answer = [0; 12];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(String::from_utf8_lossy(&answer), "HTTP/1.1 413");
    drop(stream);
    let huge = bed.answer("PATCH", &place, &[], &vec![0; (64 << 20) + 1]);
    assert_eq!((huge.status, &*huge.code()), (413, "SIZE_INVALID"));
    assert_eq!(bed.answer("DELETE", &place, &[], b"").status, 204);

    for path in [
        "/v2/Demo/blobs/uploads/",
        "/v2/../x/blobs/uploads/",
        "/v2/%2e%2e/x/blobs/uploads/",
        "/v2/a/..%2fb/blobs/uploads/",
        "/v2/blobs/uploads/",
        "/v2/a%00b/blobs/uploads/",
    ] {
        let refused = bed.answer("POST", path, &[], b"");
        assert_eq!(
            (refused.status, &*refused.code()),
            (404, "NAME_INVALID"),
            "{path}"
        );
    }
    for id in [
        "..%2f..%2fhub.db",
        "0",
        &"0".repeat(32),
        &"g".repeat(32),
        "%00",
    ] {
        let refused = bed.answer("PATCH", &format!("/v2/demo/blobs/uploads/{id}"), &[], b"x");
        assert_eq!(refused.status, 404, "{id}: {refused:?}");
    }
    let (status, _) = bed.request("POST", "/v2/demo/blobs/uploads/", None, b"");
    assert_eq!(status, 401);
    let (status, _) = bed.request("POST", "/v2/demo/blobs/uploads/", Some("Bearer wrong"), b"");
    assert_eq!(status, 401);
    assert_eq!(uploads(&bed), 0);
    assert_eq!(blobs(&bed), Vec::<String>::new());
}

#[test]
fn a_manifest_stands_only_with_all_that_it_names() {
    let bed = Bed::start(Kind::Embedded);
    let document = image(&bed, "demo", "one");
    let mut lacks = document.clone();
    lacks["layers"][0]["digest"] = Digest::of(b"not there").to_string().into();
    let mut sized = document.clone();
    sized["layers"][0]["size"] = json!(4);
    let mut typed = document.clone();
    typed["mediaType"] = "text/html".into();
    let sparse =
        json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": [descriptor(&document)]});
    let old = json!({"schemaVersion": 1, "mediaType": OCI, "fsLayers": []});
    for (what, document, code) in [
        ("a layer that is not there", &lacks, "MANIFEST_BLOB_UNKNOWN"),
        ("a layer of another size", &sized, "MANIFEST_INVALID"),
        ("not an image", &typed, "MANIFEST_INVALID"),
        (
            "an index of what is not there",
            &sparse,
            "MANIFEST_BLOB_UNKNOWN",
        ),
        ("schema 1", &old, "MANIFEST_INVALID"),
    ] {
        let refused = put(&bed, "demo", "v1", document);
        assert_eq!(
            (refused.status, &*refused.code()),
            (400, code),
            "{what}: {refused:?}"
        );
    }
    let refused = put(&bed, "demo", &Digest::of(b"other").to_string(), &document);
    assert_eq!(refused.code(), "DIGEST_INVALID");
    let lied = bed.answer(
        "PUT",
        "/v2/demo/manifests/v1",
        &[("content-type", INDEX)],
        document.to_string().as_bytes(),
    );
    assert_eq!(lied.code(), "MANIFEST_INVALID", "declared as an index");
    let huge = vec![b' '; (4 << 20) + 1];
    let refused = bed.answer(
        "PUT",
        "/v2/demo/manifests/v1",
        &[("content-type", OCI)],
        &huge,
    );
    assert_eq!(
        (refused.status, &*refused.code()),
        (413, "MANIFEST_INVALID")
    );
    assert_eq!(bed.get("/images")["items"], json!([]));
    assert_eq!(
        bed.answer("GET", "/v2/demo/tags/list", &[], b"").code(),
        "NAME_UNKNOWN"
    );

    let pushed = put(&bed, "demo", "v1", &document);
    assert_eq!(pushed.status, 201, "{pushed:?}");
    let digest = digest_of(&document).to_string();
    assert_eq!(pushed.header("docker-content-digest"), digest);
    let index = put(&bed, "demo", "many", &sparse);
    assert_eq!(index.status, 201, "{index:?}");

    // It is an image like an imported one.
    let listed = bed.get("/images");
    let item = &listed["items"][1];
    assert_eq!(
        (&item["reference"], &item["digest"]),
        (&"hub.internal/demo:v1".into(), &digest.clone().into()),
        "{listed}"
    );
    assert_eq!(
        (&item["platforms"], &listed["items"][0]["platforms"]),
        (&json!(["linux/arm64"]), &json!(["linux/arm64"]))
    );
    assert!(bed.event_kinds().contains(&"image-pushed".to_owned()));
    bed.apply(
        "shop",
        &manifest("shop", "hub.internal/demo:v1", "[{percent: 100}]"),
    );
    for reference in ["v1", &digest] {
        let pulled = bed.answer("GET", &format!("/v2/demo/manifests/{reference}"), &[], b"");
        assert_eq!(
            (pulled.json(), pulled.header("content-type")),
            (document.clone(), OCI)
        );
        let head = bed.answer("HEAD", &format!("/v2/demo/manifests/{reference}"), &[], b"");
        assert_eq!(
            (head.status, head.header("docker-content-digest")),
            (200, &*digest)
        );
    }
    // A repository has its own manifests, whatever blobs it shares.
    let elsewhere = bed.answer("GET", &format!("/v2/other/manifests/{digest}"), &[], b"");
    assert_eq!(elsewhere.code(), "MANIFEST_UNKNOWN");
    let layer = document["layers"][0]["digest"].as_str().unwrap();
    let as_manifest = bed.answer("GET", &format!("/v2/demo/manifests/{layer}"), &[], b"");
    assert_eq!(
        as_manifest.code(),
        "MANIFEST_UNKNOWN",
        "a layer is no manifest"
    );
}

#[test]
fn lists_come_in_pages() {
    let bed = Bed::start(Kind::Embedded);
    for name in ["b/x", "a", "c"] {
        let document = image(&bed, name, name);
        for tag in ["v2", "v10", "V1", "_x"] {
            assert_eq!(put(&bed, name, tag, &document).status, 201);
        }
    }
    let follow = |path: &str, key: &str| {
        let (mut path, mut found, mut pages) = (path.to_owned(), Vec::new(), 0);
        loop {
            let page = bed.answer("GET", &path, &[], b"");
            assert_eq!(page.status, 200, "{page:?}");
            found.extend(page.json()[key].as_array().unwrap().clone());
            pages += 1;
            let link = page.header("link");
            let Some(next) = link.strip_prefix('<') else {
                return (found, pages);
            };
            path = next.split_once('>').unwrap().0.to_owned();
            assert!(pages < 20, "pages end");
        }
    };
    assert_eq!(
        follow("/v2/b/x/tags/list?n=3", "tags"),
        (vec!["V1".into(), "_x".into(), "v10".into(), "v2".into()], 2)
    );
    assert_eq!(
        follow("/v2/_catalog?n=1", "repositories"),
        (vec!["a".into(), "b/x".into(), "c".into()], 3)
    );
    assert_eq!(follow("/v2/a/tags/list?last=v10", "tags").0, ["v2"]);
    assert_eq!(follow("/v2/a/tags/list?n=0", "tags").0, Vec::<Value>::new());
    for n in ["-1", "x", "99999999999999999999"] {
        assert_eq!(
            bed.answer("GET", &format!("/v2/a/tags/list?n={n}"), &[], b"")
                .status,
            400,
            "{n}"
        );
    }
}

#[test]
fn uploads_are_bounded_and_given_up_ones_go() {
    let bed = Bed::start_with(Kind::Embedded, "[registry]\nmax_uploads = 5\n");
    let begin = || bed.answer("POST", "/v2/demo/blobs/uploads/", &[], b"");
    for _ in 0..5 {
        assert_eq!(begin().status, 202);
    }
    for _ in 0..50 {
        let refused = begin();
        assert_eq!((refused.status, &*refused.code()), (429, "TOOMANYREQUESTS"));
        assert_eq!(refused.header("retry-after"), "2");
    }
    assert_eq!(uploads(&bed), 5);
}

#[test]
fn two_at_once_push_one_blob_and_who_writes_to_the_others_upload_waits() {
    let bed = Bed::start(Kind::Embedded);
    let content: Vec<u8> = (0..4_000_000_u32)
        .map(|number| number.to_le_bytes()[1])
        .collect();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| push_blob(&bed, "demo", &content));
        }
    });
    assert_eq!((blobs(&bed).len(), uploads(&bed)), (1, 0));

    // One who sends half of what it announced and waits; another goes on in its place once it is gone.
    let begun = bed.answer("POST", "/v2/demo/blobs/uploads/", &[], b"");
    let place = begun.header("location").to_owned();
    let mut slow = TcpStream::connect(&bed.api).unwrap();
    let head = format!(
        "PATCH {place} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {}\r\nContent-Length: 10\r\n\r\nfirst",
        bed.token()
    );
    slow.write_all(head.as_bytes()).unwrap();
    wait_until("the half to arrive", || {
        let entry = std::fs::read_dir(bed.data().join("pushes")).unwrap().next();
        entry.is_some_and(|entry| entry.unwrap().metadata().unwrap().len() == 5)
    });
    let other = || bed.answer("PATCH", &place, &[("content-range", "5-9")], b" half");
    assert_eq!(other().status, 429, "not both at once");
    drop(slow);
    assert_eq!(other().status, 202);
    let digest = Digest::of(b"first half");
    assert_eq!(
        bed.answer("PUT", &format!("{place}?digest={digest}"), &[], b"")
            .status,
        201
    );
}

#[test]
fn who_is_refused_reads_why_whatever_it_still_sends() {
    let bed = Bed::start(Kind::Embedded);
    let gone = format!("/v2/demo/blobs/uploads/{}", "0".repeat(32));
    // More than all buffers on the way hold.
    let content = vec![7; 96 << 20];
    let refused = [
        (format!("PATCH {gone}"), "HTTP/1.1 404"),
        (
            "POST /v2/demo/blobs/uploads/?digest=none".to_owned(),
            "HTTP/1.1 400",
        ),
    ];
    for (request, answer) in refused {
        let mut stream = TcpStream::connect(&bed.api).unwrap();
        let head = format!(
            "{request} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {}\r\nContent-Length: {}\r\n\r\n",
            bed.token(),
            content.len()
        );
        stream.write_all(head.as_bytes()).unwrap();
        stream.write_all(&content).unwrap();
        let line = status_line(&mut stream);
        assert!(line.starts_with(answer), "{request}: {line}");
    }

    // Who asks before it sends is answered before it sends.
    let mut stream = TcpStream::connect(&bed.api).unwrap();
    let head = format!(
        "PATCH {gone} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {}\r\nExpect: 100-continue\r\nContent-Length: 10\r\n\r\n",
        bed.token()
    );
    stream.write_all(head.as_bytes()).unwrap();
    let waited = std::time::Duration::from_secs(8);
    stream.set_read_timeout(Some(waited)).unwrap();
    assert!(status_line(&mut stream).starts_with("HTTP/1.1 404"));
}

fn status_line(stream: &mut TcpStream) -> String {
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        line.push(byte[0]);
    }
    String::from_utf8(line).unwrap()
}

#[test]
fn an_upload_goes_on_after_the_hub_was_killed_in_the_middle_of_it() {
    let mut bed = Bed::start(Kind::Embedded);
    let content: Vec<u8> = (0..3_000_000_u32).flat_map(u32::to_le_bytes).collect();
    let begun = bed.answer("POST", "/v2/demo/blobs/uploads/", &[], b"");
    let place = begun.header("location").to_owned();
    let mut stream = TcpStream::connect(&bed.api).unwrap();
    let head = format!(
        "PATCH {place} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {}\r\nContent-Length: {}\r\n\r\n",
        bed.token(),
        content.len()
    );
    stream.write_all(head.as_bytes()).unwrap();
    stream.write_all(&content[..8_000_000]).unwrap();
    wait_until("some of it to be on disk", || {
        let entry = std::fs::read_dir(bed.data().join("pushes")).unwrap().next();
        entry.is_some_and(|entry| entry.unwrap().metadata().unwrap().len() > 4_000_000)
    });
    bed.kill_hub();
    bed.start_hub();
    let told = bed.answer("GET", &place, &[], b"");
    assert_eq!(told.status, 204, "{told:?}");
    let last: usize = told
        .header("range")
        .split_once('-')
        .unwrap()
        .1
        .parse()
        .unwrap();
    assert!((4_000_000..8_000_000).contains(&last), "{last}");
    let digest = Digest::of(&content);
    let done = bed.answer(
        "PUT",
        &format!("{place}?digest={digest}"),
        &[],
        &content[last + 1..],
    );
    assert_eq!(done.status, 201, "{done:?}");
    assert_eq!(
        bed.answer("GET", &format!("/v2/demo/blobs/{digest}"), &[], b"")
            .bytes,
        content
    );
}

/// What a client does, until the hub dies over it: begin, send, end, manifest.
fn push(bed: &Bed) -> Option<()> {
    let layer = b"layer".as_slice();
    let digest = Digest::of(layer);
    if bed
        .ask("HEAD", &format!("/v2/demo/blobs/{digest}"), &[], b"")?
        .status
        == 404
    {
        let begun = bed.ask("POST", "/v2/demo/blobs/uploads/", &[], b"")?;
        let place = begun.header("location").to_owned();
        assert_eq!(bed.ask("PATCH", &place, &[], layer)?.status, 202);
        let done = bed.ask("PUT", &format!("{place}?digest={digest}"), &[], b"")?;
        assert_eq!(done.status, 201);
    }
    let layer = json!({"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": digest, "size": layer.len()});
    let document =
        json!({"schemaVersion": 2, "mediaType": OCI, "config": layer, "layers": [layer]})
            .to_string();
    let pushed = bed.ask(
        "PUT",
        "/v2/demo/manifests/v1",
        &[("content-type", OCI)],
        document.as_bytes(),
    )?;
    assert_eq!(pushed.status, 201);
    Some(())
}

#[test]
fn a_push_that_is_killed_at_any_step_is_repeated_and_leaves_nothing_else() {
    let mut bed = Bed::start_with(
        Kind::Embedded,
        "[registry]\nupload_expires_s = 0\nunused_expires_s = 3600\n",
    );
    for point in foreshore_killpoint::HUB {
        if !point.starts_with("upload.") && !point.starts_with("manifest.") {
            continue;
        }
        bed.stop_hub();
        bed.kill_at = Some((*point).to_owned());
        bed.start_hub();
        assert_eq!(push(&bed), None, "{point} is reached");
        bed.await_death();
        bed.kill_at = None;
        bed.start_hub();
        push(&bed).unwrap_or_else(|| panic!("the hub serves after {point}"));
        wait_for("nothing but the image to be left", || {
            match (blobs(&bed).len(), uploads(&bed)) {
                (2, 0) => Ok(()),
                other => Err((point, other)),
            }
        });
        let pulled = bed.answer("GET", "/v2/demo/manifests/v1", &[], b"");
        assert_eq!(pulled.status, 200, "{point}");
        assert_eq!(
            bed.answer("DELETE", "/v2/demo/manifests/v1", &[], b"")
                .status,
            202
        );
        wait_until("the manifest to go", || blobs(&bed).len() == 1);
        let layer = Digest::of(b"layer");
        let gone = bed.answer("DELETE", &format!("/v2/demo/blobs/{layer}"), &[], b"");
        assert_eq!(gone.status, 202, "{point}");
        await_blobs(&bed, &[]);
    }
}
