//! Other registries through the hub: fetched once, whole or not at all, and there when the registry is not.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex};

use foreshore_protocol::Digest;
use serde_json::{Value, json};

use crate::bed::{Bed, Kind, LONG, manifest, wait_for, wait_until};
use crate::images::blobs;

const OCI: &str = "application/vnd.oci.image.manifest.v1+json";

/// A registry of the test's own, which counts what it is asked and stops where it is told.
pub(crate) struct Upstream {
    pub(crate) host: String,
    state: Arc<State>,
}

#[derive(Default)]
struct State {
    inner: Mutex<Inner>,
    news: Condvar,
}

#[derive(Default)]
pub(crate) struct Inner {
    /// By path.
    content: BTreeMap<String, (String, Vec<u8>)>,
    asked: Vec<String>,
    /// Blobs end in the middle until this is taken back.
    held: bool,
    /// Bytes are turned over from the middle on.
    wrong: bool,
    /// Every answer is this.
    status: Option<u16>,
    /// Bytes of blobs that were sent.
    sent: usize,
    /// Who may ask: the values of `Authorization`; anybody when there are none.
    pub(crate) admitted: Vec<String>,
}

impl Upstream {
    pub(crate) fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let state = Arc::new(State::default());
        let shared = Arc::clone(&state);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let state = Arc::clone(&shared);
                std::thread::spawn(move || state.serve(&stream));
            }
        });
        Self { host, state }
    }

    pub(crate) fn change(&self, change: impl FnOnce(&mut Inner)) {
        change(&mut self.state.inner.lock().unwrap());
        self.state.news.notify_all();
    }

    /// How often something was asked whose path ends so.
    fn asked(&self, end: &str) -> usize {
        let inner = self.state.inner.lock().unwrap();
        inner
            .asked
            .iter()
            .filter(|path| path.ends_with(end))
            .count()
    }

    fn sent(&self) -> usize {
        self.state.inner.lock().unwrap().sent
    }

    /// An image of one layer under `app:tag`: manifest and layer.
    pub(crate) fn image(&self, tag: &str, layer: &[u8]) -> (String, Digest) {
        let config = json!({"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": [Digest::of(layer)]}}).to_string();
        let of = |kind: &str, bytes: &[u8]| json!({"mediaType": format!("application/vnd.oci.image.{kind}"), "digest": Digest::of(bytes), "size": bytes.len()});
        let document = json!({
            "schemaVersion": 2, "mediaType": OCI,
            "config": of("config.v1+json", config.as_bytes()), "layers": [of("layer.v1.tar", layer)],
        })
        .to_string();
        self.change(|inner| {
            let digest = Digest::of(document.as_bytes());
            for reference in [tag.to_owned(), digest.to_string()] {
                let entry = (OCI.to_owned(), document.clone().into_bytes());
                inner
                    .content
                    .insert(format!("/v2/team/app/manifests/{reference}"), entry);
            }
            for blob in [config.as_bytes(), layer] {
                let entry = ("application/octet-stream".to_owned(), blob.to_vec());
                inner
                    .content
                    .insert(format!("/v2/team/app/blobs/{}", Digest::of(blob)), entry);
            }
        });
        (document, Digest::of(layer))
    }

    pub(crate) fn configuration(&self, more: &str) -> String {
        format!(
            "[registry]\n{more}\n[registry.upstreams.up]\nhost = \"{0}\"\n[registry.upstreams.\"{0}\"]\n[registries.\"{0}\"]\nplain_http = true\n",
            self.host
        )
    }
}

impl State {
    fn serve(&self, stream: &TcpStream) {
        let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
        let Some(Ok(first)) = lines.next() else {
            return;
        };
        let path = first.split(' ').nth(1).unwrap_or_default().to_owned();
        let mut from = 0;
        let mut authorization = String::new();
        for line in lines
            .map_while(Result::ok)
            .take_while(|line| !line.is_empty())
        {
            if let Some(range) = line.to_ascii_lowercase().strip_prefix("range: bytes=") {
                from = range.trim_end_matches('-').parse().unwrap();
            }
            if let Some((name, value)) = line.split_once(": ")
                && name.eq_ignore_ascii_case("authorization")
            {
                value.clone_into(&mut authorization);
            }
        }
        let admitted = self.inner.lock().unwrap().admitted.clone();
        if !admitted.is_empty() && !admitted.contains(&authorization) {
            let head = "HTTP/1.1 401 X\r\nConnection: close\r\nWWW-Authenticate: Basic realm=x\r\nContent-Length: 0\r\n\r\n";
            let mut stream = stream;
            _ = stream.write_all(head.as_bytes());
            return;
        }
        // The hub may have gone away: then nobody is interested in this answer.
        _ = self.answer(stream, &path, from);
    }

    fn answer(&self, mut stream: &TcpStream, path: &str, from: usize) -> std::io::Result<()> {
        let mut inner = self.inner.lock().unwrap();
        inner.asked.push(path.to_owned());
        let found = inner.content.get(path).cloned();
        let usual = match &found {
            None => 404,
            Some(_) if from > 0 => 206,
            Some(_) => 200,
        };
        let status = inner.status.unwrap_or(usual);
        let (kind, mut bytes) = found.unwrap_or_default();
        let blob = path.contains("/blobs/");
        if status >= 400 {
            bytes.clear();
        } else if inner.wrong && blob {
            let half = bytes.len() / 2;
            bytes[half..].iter_mut().for_each(|byte| *byte = !*byte);
        }
        drop(inner);
        let (whole, part) = (bytes.len(), &bytes[from.min(bytes.len())..]);
        write!(
            stream,
            "HTTP/1.1 {status} X\r\nConnection: close\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nContent-Range: bytes {from}-{}/{whole}\r\n\r\n",
            part.len(),
            whole.saturating_sub(1)
        )?;
        for (at, chunk) in part.chunks(64 << 10).enumerate() {
            let mut inner = self.inner.lock().unwrap();
            while inner.held && blob && from + at * (64 << 10) >= whole / 2 {
                let (again, timeout) = self.news.wait_timeout(inner, LONG).unwrap();
                assert!(!timeout.timed_out(), "the test goes on within {LONG:?}");
                inner = again;
            }
            if blob {
                inner.sent += chunk.len();
            }
            drop(inner);
            stream.write_all(chunk)?;
        }
        Ok(())
    }
}

fn noise(count: u32) -> Vec<u8> {
    (0..count)
        .flat_map(|number| number.wrapping_mul(2_654_435_761).to_le_bytes())
        .collect()
}

/// A reader of a blob that says what it has so far.
struct Reader {
    stream: TcpStream,
    got: Vec<u8>,
}

impl Reader {
    fn begin(bed: &Bed, path: &str, range: &str) -> Self {
        let mut stream = TcpStream::connect(&bed.api).unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        let head = format!(
            "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer {}\r\n{range}\r\n",
            bed.token()
        );
        stream.write_all(head.as_bytes()).unwrap();
        Self {
            stream,
            got: Vec::new(),
        }
    }

    fn await_bytes(&mut self, count: usize) {
        let mut buffer = vec![0; 64 << 10];
        while self.got.len() < count {
            let read = self.stream.read(&mut buffer).unwrap();
            assert!(read > 0, "ended after {} bytes", self.got.len());
            self.got.extend_from_slice(&buffer[..read]);
        }
    }

    /// The body, to its end, and whether that is where the head says.
    fn finish(mut self) -> (Vec<u8>, bool) {
        // A broken body may end with a reset.
        _ = self.stream.read_to_end(&mut self.got);
        let split = self
            .got
            .windows(4)
            .position(|window| window == b"\r\n\r\n")
            .unwrap();
        let head = String::from_utf8_lossy(&self.got[..split]).to_ascii_lowercase();
        let length: usize = head
            .lines()
            .find_map(|line| line.strip_prefix("content-length: "))
            .unwrap_or_else(|| panic!("{head}"))
            .parse()
            .unwrap();
        let body = self.got.split_off(split + 4);
        let whole = body.len() == length;
        (body, whole)
    }
}

#[test]
fn a_blob_is_fetched_once_however_many_ask_and_all_read_it_as_it_comes() {
    let upstream = Upstream::start();
    let layer = noise(500_000);
    let (document, digest) = upstream.image("v1", &layer);
    let bed = Bed::start_with(Kind::Embedded, &upstream.configuration(""));
    let pulled = bed.answer("GET", "/v2/up/team/app/manifests/v1", &[], b"");
    assert_eq!((pulled.status, pulled.header("content-type")), (200, OCI));
    assert_eq!(pulled.bytes, document.as_bytes());
    assert_eq!(
        pulled.header("docker-content-digest"),
        Digest::of(document.as_bytes()).to_string()
    );

    let path = format!("/v2/up/team/app/blobs/{digest}");
    let told = bed.answer("HEAD", &path, &[], b"");
    assert_eq!(
        (told.status, told.header("content-length")),
        (200, &*layer.len().to_string())
    );
    assert_eq!(
        upstream.asked(&digest.to_string()),
        0,
        "who asks how large it is fetches nothing"
    );
    upstream.change(|inner| inner.held = true);
    let mut readers: Vec<Reader> = (0..20).map(|_| Reader::begin(&bed, &path, "")).collect();
    let quarter = layer.len() / 4;
    for reader in &mut readers {
        reader.await_bytes(quarter);
    }
    // One that goes away takes nothing from the others; one that wants the end waits for it.
    drop(readers.pop());
    let range = format!("Range: bytes={}-\r\n", layer.len() - 10);
    let tail = Reader::begin(&bed, &path, &range);
    upstream.change(|inner| inner.held = false);
    for reader in readers {
        let (body, whole) = reader.finish();
        assert!(
            whole && body == layer,
            "{} of {} bytes",
            body.len(),
            layer.len()
        );
    }
    assert_eq!(tail.finish().0, &layer[layer.len() - 10..]);
    assert_eq!(upstream.asked(&digest.to_string()), 1);

    // By its host, and as containerd asks a mirror; and when the registry is gone.
    upstream.change(|inner| inner.status = Some(500));
    for path in [
        format!("/v2/{}/team/app/blobs/{digest}", upstream.host),
        format!("/v2/team/app/blobs/{digest}?ns={}", upstream.host),
    ] {
        assert_eq!(bed.answer("GET", &path, &[], b"").bytes, layer, "{path}");
    }
    let by_digest = format!(
        "/v2/up/team/app/manifests/{}",
        Digest::of(document.as_bytes())
    );
    assert_eq!(bed.answer("GET", &by_digest, &[], b"").status, 200);
}

#[test]
fn wrong_bytes_reach_nobody_whole_and_are_not_kept() {
    let upstream = Upstream::start();
    let layer = noise(300_000);
    let (_, digest) = upstream.image("v1", &layer);
    let bed = Bed::start_with(Kind::Embedded, &upstream.configuration(""));
    let path = format!("/v2/up/team/app/blobs/{digest}");
    let unnamed = bed.answer("GET", &path, &[], b"");
    assert_eq!(
        (unnamed.status, &*unnamed.code()),
        (404, "BLOB_UNKNOWN"),
        "no manifest names it yet"
    );
    assert_eq!(
        bed.answer("GET", "/v2/up/team/app/manifests/v1", &[], b"")
            .status,
        200
    );
    let before = blobs(&bed);
    upstream.change(|inner| inner.wrong = true);
    let (body, whole) = Reader::begin(&bed, &path, "").finish();
    assert!(!whole || body != layer, "{} bytes", body.len());
    assert!(body.len() < layer.len(), "the last byte is held back");
    let again = bed.ask("GET", &path, &[], b"");
    assert!(again.is_none_or(|answer| answer.bytes != layer));
    assert_eq!(blobs(&bed), before);
    upstream.change(|inner| inner.wrong = false);
    wait_for("the right bytes", || {
        match bed.ask("GET", &path, &[], b"") {
            Some(answer) if answer.status == 200 && answer.bytes == layer => Ok(()),
            other => Err(other.map(|answer| answer.status)),
        }
    });
    assert_eq!(blobs(&bed).len(), before.len() + 1);
}

#[test]
fn a_tag_is_asked_about_again_after_a_while_and_served_stale_when_nobody_answers() {
    let upstream = Upstream::start();
    let (first, _) = upstream.image("v1", b"one");
    let path = "/v2/up/team/app/manifests/v1";
    {
        let bed = Bed::start_with(
            Kind::Embedded,
            &upstream.configuration("upstream_tag_s = 3600"),
        );
        for _ in 0..5 {
            assert_eq!(bed.answer("GET", path, &[], b"").bytes, first.as_bytes());
        }
        assert_eq!(upstream.asked("/manifests/v1"), 1);
    }
    let mut bed = Bed::start_with(
        Kind::Embedded,
        &upstream.configuration("upstream_tag_s = 0"),
    );
    assert_eq!(bed.answer("GET", path, &[], b"").bytes, first.as_bytes());
    let (second, _) = upstream.image("v1", b"two");
    let moved = bed.answer("GET", path, &[], b"");
    assert_eq!(
        (moved.bytes, moved.status),
        (second.clone().into_bytes(), 200)
    );

    upstream.change(|inner| inner.status = Some(503));
    let absent = bed.answer("GET", "/v2/up/team/app/manifests/v9", &[], b"");
    assert_eq!(absent.status, 502, "nothing to serve instead");
    let begun = upstream.asked("/manifests/v1");
    for restart in [false, true] {
        if restart {
            bed.kill_hub();
            bed.start_hub();
        }
        for _ in 0..3 {
            let stale = bed.answer("GET", path, &[], b"");
            assert_eq!((&*stale.bytes, stale.status), (second.as_bytes(), 200));
            assert!(stale.header("warning").starts_with("110 "), "{stale:?}");
        }
    }
    let vain = upstream.asked("/manifests/v1") - begun;
    assert!(
        vain <= 6,
        "a registry that fails is left alone for a while: {vain}"
    );
    // A manifest that names it is applied all the same: the tag is known.
    let image = format!("{}/team/app:v1", upstream.host);
    let applied = bed.apply("shop", &manifest("shop", &image, "[{percent: 100}]"));
    assert!(applied["release"].is_string(), "{applied}");

    upstream.change(|inner| {
        inner.status = None;
        inner.content.remove("/v2/team/app/manifests/v1");
    });
    // It does not know any more that the registry failed a moment ago.
    bed.kill_hub();
    bed.start_hub();
    wait_for("the tag to be gone", || {
        let answer = bed.answer("GET", path, &[], b"");
        if answer.code() == "MANIFEST_UNKNOWN" {
            Ok(())
        } else {
            Err(answer.status)
        }
    });
}

#[test]
fn a_fetch_goes_on_after_the_hub_was_killed_in_the_middle_of_it() {
    let upstream = Upstream::start();
    let layer = noise(2_000_000);
    let (_, digest) = upstream.image("v1", &layer);
    let mut bed = Bed::start_with(Kind::Embedded, &upstream.configuration(""));
    assert_eq!(
        bed.answer("GET", "/v2/up/team/app/manifests/v1", &[], b"")
            .status,
        200
    );
    upstream.change(|inner| inner.held = true);
    let path = format!("/v2/up/team/app/blobs/{digest}");
    let mut reader = Reader::begin(&bed, &path, "");
    reader.await_bytes(layer.len() / 4);
    bed.kill_hub();
    upstream.change(|inner| inner.held = false);
    bed.start_hub();
    assert_eq!(bed.answer("GET", &path, &[], b"").bytes, layer);
    wait_until("the counters to settle", || {
        upstream.asked(&digest.to_string()) == 2
    });
    assert!(
        upstream.sent() < layer.len() * 2,
        "{} of {}",
        upstream.sent(),
        layer.len()
    );
}

#[test]
fn the_cache_keeps_what_was_used_last_and_what_a_release_needs() {
    let upstream = Upstream::start();
    let more = "upstream_bytes = 2600000\nunused_expires_s = 0";
    let bed = Bed::start_with(Kind::Embedded, &upstream.configuration(more));
    let pull = |tag: &str| {
        let layer = [noise(250_000), tag.into()].concat();
        let (_, digest) = upstream.image(tag, &layer);
        assert_eq!(
            bed.answer("GET", &format!("/v2/up/team/app/manifests/{tag}"), &[], b"")
                .status,
            200
        );
        let pulled = bed.answer("GET", &format!("/v2/up/team/app/blobs/{digest}"), &[], b"");
        assert_eq!((pulled.status, pulled.bytes == layer), (200, true));
        digest
    };
    let first = pull("v1");
    let image = format!("{}/team/app:v1", upstream.host);
    bed.apply("shop", &manifest("shop", &image, "[{percent: 100}]"));
    let second = pull("v2");
    let third = pull("v3");
    let here = |digest: &Digest| {
        bed.data()
            .join("images/blobs/sha256")
            .join(digest.hex())
            .exists()
    };
    wait_until("the oldest that nobody needs to go", || !here(&second));
    assert!(here(&first) && here(&third));
    assert_eq!(pull("v2"), second, "it comes again");
}

#[test]
fn what_is_elsewhere_is_not_pushed_here_and_unknown_registries_are_named() {
    let upstream = Upstream::start();
    let bed = Bed::start_with(Kind::Embedded, &upstream.configuration(""));
    let pushed = bed.answer("POST", "/v2/up/team/app/blobs/uploads/", &[], b"");
    assert_eq!((pushed.status, &*pushed.code()), (403, "DENIED"));
    let pushed = bed.answer(
        "PUT",
        "/v2/up/team/app/manifests/v1",
        &[("content-type", OCI)],
        b"{}",
    );
    assert_eq!((pushed.status, &*pushed.code()), (403, "DENIED"));
    let unknown = bed.answer("GET", "/v2/other.lan:5000/app/manifests/v1", &[], b"");
    assert_eq!((unknown.status, &*unknown.code()), (404, "NAME_UNKNOWN"));
    let absent = bed.answer("GET", "/v2/up/team/app/manifests/v1", &[], b"");
    assert_eq!((absent.status, &*absent.code()), (404, "MANIFEST_UNKNOWN"));
    for path in [
        "/v2/up/../team/manifests/v1",
        "/v2/up/Team/manifests/v1",
        "/v2/up/team/app/manifests/..%2fx",
    ] {
        assert_eq!(
            bed.answer("GET", path, &[], b"").code(),
            "NAME_INVALID",
            "{path}"
        );
    }
    let tags = bed.answer("GET", "/v2/up/team/app/tags/list", &[], b"");
    assert_eq!((tags.status, &*tags.code()), (405, "UNSUPPORTED"));
    let catalog: Value = bed.answer("GET", "/v2/_catalog", &[], b"").json();
    assert_eq!(catalog["repositories"], json!([]));
}
