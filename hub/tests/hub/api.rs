//! Bad input gets one clear answer with a stable code, and changes nothing.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::bed::{Bed, Kind, manifest};
use crate::device::Device;

#[test]
fn calls_without_the_token_are_refused_and_health_is_open() {
    let bed = Bed::start(Kind::Embedded);
    for path in [
        "/api/v1/apps",
        "/api/v1/info",
        "/api/v1/events/stream",
        "/metrics",
        "/api/v1/nothing",
    ] {
        for authorization in [
            None,
            Some("Bearer wrong"),
            Some("Basic eDp5"),
            Some("nonsense"),
        ] {
            let (status, body) = bed.request("GET", path, authorization, b"");
            assert_eq!(
                (status, &body["code"]),
                (401, &json!("unauthorized")),
                "{path} {authorization:?}"
            );
        }
    }
    for path in ["/healthz", "/readyz"] {
        assert_eq!(bed.request("GET", path, None, b"").0, 200);
    }
    // Also to whoever is in the middle of sending something large.
    let (status, _) = bed.request("POST", "/api/v1/images", None, &vec![0; 8 << 20]);
    assert_eq!(status, 401);
    let join = format!("Bearer {}", bed.join_token());
    assert_eq!(
        bed.request("GET", "/api/v1/apps", Some(&join), b"").0,
        401,
        "a device is no operator"
    );
}

#[test]
fn every_wrong_call_has_its_own_code() {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let silent_host = silent.local_addr().unwrap().to_string();
    let closed_host = {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap().to_string()
    };
    let extra = format!(
        "[registries.\"{silent_host}\"]\nplain_http = true\n[registries.\"{closed_host}\"]\nplain_http = true\n"
    );
    let bed = Bed::start_with(Kind::Embedded, &extra);
    let app = |image: &str| manifest("shop", image, "[{percent: 100}]");
    let deep = format!("a: {}", "[".repeat(50_000));
    let huge = format!("# {}\n", "x".repeat(1 << 20));
    let large = format!("# {}\n", "x".repeat((256 << 10) + 10));
    let unknown_key = app("a:1").replace("services:", "servces:");
    for (method, path, body, status, code) in [
        ("PUT", "/secrets/pin", "", 400, "empty-secret"),
        ("PUT", "/secrets/pin", &huge, 413, "secret-too-large"),
        ("PUT", "/secrets/pin", &large, 413, "secret-too-large"),
        ("PUT", "/secrets/Pin", "x", 400, "bad-request"),
        ("GET", "/secrets/pin", "", 404, "unknown-secret"),
        ("DELETE", "/secrets/pin", "", 404, "unknown-secret"),
        ("POST", "/secrets/pin", "x", 405, "method-not-allowed"),
        ("POST", "/devices/gw-9/trust-key", "", 404, "unknown-device"),
        ("PUT", "/apps/shop", "", 400, "bad-manifest"),
        ("PUT", "/apps/shop", "\u{0}", 400, "bad-manifest"),
        (
            "PUT",
            "/apps/shop",
            unknown_key.as_str(),
            400,
            "bad-manifest",
        ),
        ("PUT", "/apps/shop", &deep, 400, "bad-manifest"),
        ("PUT", "/apps/shop", &large, 413, "manifest-too-large"),
        ("PUT", "/apps/shop", &huge, 413, "manifest-too-large"),
        (
            "PUT",
            "/apps/other",
            &app("hub.internal/demo:1"),
            400,
            "other-app",
        ),
        (
            "PUT",
            "/apps/Shop",
            &app("hub.internal/demo:1"),
            400,
            "bad-request",
        ),
        (
            "PUT",
            "/apps/shop",
            &app("ghcr.io/Acme/web:1"),
            400,
            "bad-manifest",
        ),
        (
            "PUT",
            "/apps/shop",
            &app("hub.internal/demo:1"),
            422,
            "unknown-image",
        ),
        (
            "PUT",
            "/apps/shop",
            &app(&format!("{closed_host}/a/b:1")),
            502,
            "registry-unreachable",
        ),
        (
            "PUT",
            "/apps/shop",
            &app(&format!("{silent_host}/a/b:1")),
            502,
            "registry-unreachable",
        ),
        (
            "POST",
            "/apps/shop/plan",
            &app("hub.internal/demo:1"),
            422,
            "unknown-image",
        ),
        ("GET", "/apps/shop", "", 404, "unknown-app"),
        ("DELETE", "/apps/shop", "", 404, "unknown-app"),
        ("POST", "/apps/shop/undo", "", 404, "unknown-app"),
        ("GET", "/devices/none", "", 404, "unknown-device"),
        ("DELETE", "/devices/none", "", 404, "unknown-device"),
        (
            "PATCH",
            "/devices/none/labels",
            r#"{"labels": {}}"#,
            404,
            "unknown-device",
        ),
        (
            "PATCH",
            "/devices/none/labels",
            "{}",
            400,
            "bad-label-patch",
        ),
        (
            "PATCH",
            "/devices/none/labels",
            r#"{"labels": {"a b": "c"}}"#,
            400,
            "bad-label-patch",
        ),
        ("GET", "/rollouts/1", "", 404, "unknown-rollout"),
        ("GET", "/rollouts/x", "", 400, "bad-request"),
        (
            "GET",
            "/rollouts/99999999999999999999",
            "",
            400,
            "bad-request",
        ),
        (
            "POST",
            "/rollouts/18446744073709551615/pause",
            "",
            400,
            "bad-request",
        ),
        ("GET", "/rollouts?app=Shop", "", 400, "bad-request"),
        ("GET", "/rollouts?apps=shop", "", 400, "bad-request"),
        ("GET", "/events?after=-1", "", 400, "bad-request"),
        ("GET", "/events?limit=x", "", 400, "bad-request"),
        ("GET", "/nothing", "", 404, "unknown-path"),
        ("POST", "/apps", "", 405, "method-not-allowed"),
        ("PUT", "/devices/none", "", 405, "method-not-allowed"),
    ] {
        let begun = Instant::now();
        let (found, answer) = bed.call(method, path, body.as_bytes());
        let what = format!(
            "{method} {path} {}: {answer}",
            body.chars().take(60).collect::<String>()
        );
        assert_eq!((found, &answer["code"]), (status, &json!(code)), "{what}");
        assert!(
            answer["detail"]
                .as_str()
                .is_some_and(|detail| !detail.is_empty()),
            "{what}"
        );
        if code == "registry-unreachable" {
            let host = if body.contains(&silent_host) {
                &silent_host
            } else {
                &closed_host
            };
            assert!(
                answer["detail"]
                    .as_str()
                    .is_some_and(|detail| detail.contains(host)),
                "{what}"
            );
        }
        assert!(
            begun.elapsed() < Duration::from_secs(45),
            "{what} took {:?}",
            begun.elapsed()
        );
    }
    let (_, answer) = bed.call("PUT", "/apps/shop", unknown_key.as_bytes());
    assert_eq!(
        (&answer["line"], answer["column"].as_u64().is_some()),
        (&json!(5), true),
        "{answer}"
    );
    assert_eq!(bed.get("/apps")["items"], json!([]));
    // Large numbers are only far away.
    assert_eq!(
        bed.get("/events?after=18446744073709551615")["items"],
        json!([])
    );
}

#[test]
fn paths_and_queries_that_are_no_text_are_refused_like_all_else() {
    let bed = Bed::start(Kind::Embedded);
    let ask = |method: &str, path: &str| {
        let mut stream = TcpStream::connect(&bed.api).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(30)))
            .unwrap();
        write!(stream, "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 0\r\nAuthorization: Bearer {}\r\n\r\n", bed.token()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        let body: Value =
            serde_json::from_str(body).unwrap_or_else(|_| panic!("{method} {path}: {answer}"));
        (head.to_lowercase(), body)
    };
    for (method, path) in [
        ("GET", "/apps/%ff"),
        ("PUT", "/apps/%ff"),
        ("DELETE", "/apps/%ff"),
        ("POST", "/apps/%ff/plan"),
        ("POST", "/apps/%ff/undo"),
        ("GET", "/devices/%ff"),
        ("DELETE", "/devices/%ff"),
        ("PATCH", "/devices/%c3%28/labels"),
        ("GET", "/rollouts/%ff"),
        ("POST", "/rollouts/%ff/pause"),
        ("POST", "/rollouts/%ff/resume"),
        ("POST", "/rollouts/%ff/abort"),
        ("GET", "/rollouts?limit=%ff"),
        ("GET", "/events?after=%ff"),
        ("GET", "/events/stream?after=%ff"),
        ("POST", "/images?title=%ff"),
    ] {
        let (head, body) = ask(method, &format!("/api/v1{path}"));
        assert!(head.starts_with("http/1.1 400 "), "{method} {path}: {head}");
        assert!(
            head.contains("content-type: application/problem+json"),
            "{method} {path}: {head}"
        );
        assert_eq!(body["code"], "bad-request", "{method} {path}");
    }
    for path in ["/v2/%ff", "/v2/%ff/manifests/v1", "/v2/demo/blobs/%ff"] {
        let (head, body) = ask("GET", path);
        assert!(head.starts_with("http/1.1 404 "), "{path}: {head}");
        assert!(
            head.contains("content-type: application/json"),
            "{path}: {head}"
        );
        assert_eq!(body["errors"][0]["code"], "NAME_INVALID", "{path}");
    }
}

#[test]
fn a_device_with_too_many_labels_is_left_as_it_was() {
    let bed = Bed::start(Kind::Embedded);
    let _devices = Device::fleet(&bed, 1);
    bed.await_online(1);
    let labels: serde_json::Map<String, Value> = (0..65)
        .map(|number| (format!("l{number}"), json!("x")))
        .collect();
    let before = bed.get("/devices/device-0")["labels"].clone();
    let body = json!({"labels": labels}).to_string();
    let (status, answer) = bed.call("PATCH", "/devices/device-0/labels", body.as_bytes());
    assert_eq!(
        (status, &answer["code"]),
        (422, &json!("too-many-labels")),
        "{answer}"
    );
    assert!(
        answer["detail"].as_str().unwrap().contains("device-0"),
        "{answer}"
    );
    assert_eq!(bed.get("/devices/device-0")["labels"], before);
}

#[test]
fn heads_that_are_too_long_or_never_end_do_not_hold_the_hub_up() {
    let bed = Bed::start(Kind::Embedded);
    let mut endless = TcpStream::connect(&bed.api).unwrap();
    endless
        .write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Slow: ")
        .unwrap();
    let mut long = TcpStream::connect(&bed.api).unwrap();
    long.write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Long: ")
        .unwrap();
    // The hub may stop reading in the middle.
    let _refused = long.write_all(&vec![b'a'; 200_000]);
    let _refused = long.write_all(b"\r\n\r\n");
    let mut answer = String::new();
    _ = long.take(100).read_to_string(&mut answer);
    assert!(
        answer.is_empty() || answer.starts_with("HTTP/1.1 4"),
        "{answer}"
    );
    assert_eq!(bed.request("GET", "/healthz", None, b"").0, 200);
}

#[test]
fn events_are_streamed_from_where_a_reader_left_off() {
    let mut bed = Bed::start(Kind::Embedded);
    let open = |bed: &Bed, header: &str| {
        let mut stream = TcpStream::connect(&bed.api).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(30)))
            .unwrap();
        write!(stream, "GET /api/v1/events/stream?after=0 HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {}\r\n{header}\r\n", bed.token()).unwrap();
        BufReader::new(stream)
    };
    let next = |reader: &mut BufReader<TcpStream>| -> Option<(u64, Value)> {
        let mut id = 0;
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line).unwrap() == 0 {
                return None;
            }
            if let Some(text) = line.strip_prefix("id: ") {
                id = text.trim().parse().unwrap();
            }
            if let Some(text) = line.strip_prefix("data: ") {
                return Some((id, serde_json::from_str(text).unwrap()));
            }
        }
    };
    let mut reader = open(&bed, "");
    bed.import("v1");
    bed.import("v2");
    let (first, event) = next(&mut reader).unwrap();
    assert_eq!(
        (event["kind"].as_str(), event["message"].as_str()),
        (Some("image-imported"), Some("hub.internal/demo:v1"))
    );
    assert_eq!(event["id"], first);
    let mut again = open(&bed, &format!("Last-Event-ID: {first}\r\n"));
    let (second, event) = next(&mut again).unwrap();
    assert_eq!(
        (second, event["message"].as_str()),
        (first + 1, Some("hub.internal/demo:v2"))
    );
    // An open stream does not keep the hub from stopping.
    assert!(bed.stop_hub() < Duration::from_secs(5));
    assert_eq!(next(&mut again), None);
}

#[test]
fn only_one_hub_uses_a_data_directory() {
    let bed = Bed::start(Kind::Embedded);
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_foreshore-hub"))
        .args(["run", "--listen", "127.0.0.1:0", "--data"])
        .arg(bed.data())
        .output()
        .unwrap();
    assert!(!output.status.success());
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(stderr.contains("another hub is using"), "{stderr}");
}

#[test]
fn secrets_go_in_and_never_come_out() {
    let bed = Bed::start(Kind::Embedded);
    let value = "correct-horse-battery";
    let set = |value: &[u8]| {
        let (status, view) = bed.call("PUT", "/secrets/pin", value);
        assert_eq!(status, 200, "{view}");
        view
    };
    // The same again is no change; another value is.
    let (first, again) = (set(value.as_bytes()), set(value.as_bytes()));
    assert_eq!(again["revision"], first["revision"]);
    let other = set(b"another-value");
    assert!(other["revision"].as_u64() > first["revision"].as_u64());
    assert_eq!((&other["size"], &other["apps"]), (&json!(13), &json!([])));
    // Any bytes will do; they are taken as they are.
    assert_eq!(bed.call("PUT", "/secrets/key", b"\x00\xff\n").1["size"], 3);
    let list = bed.get("/secrets");
    let names: Vec<_> = list["items"].as_array().unwrap().iter().collect();
    assert_eq!(
        (&names[0]["name"], &names[1]["name"]),
        (&json!("key"), &json!("pin"))
    );
    for answer in [
        first,
        again,
        other,
        list,
        bed.get("/secrets/pin"),
        bed.get("/events"),
    ] {
        let text = answer.to_string();
        assert!(
            !text.contains(value) && !text.contains("another-value"),
            "{text}"
        );
    }
    assert_eq!(bed.call("DELETE", "/secrets/pin", b"").0, 204);
    assert_eq!(bed.call("GET", "/secrets/pin", b"").0, 404);
    let kinds = bed.event_kinds();
    let of = |kind: &str| kinds.iter().filter(|found| *found == kind).count();
    assert_eq!(
        (of("secret-set"), of("secret-removed")),
        (3, 1),
        "{kinds:?}"
    );
}
