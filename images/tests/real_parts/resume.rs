//! Bad links: connections that end in the middle, pulls that are killed, registries that want to be left alone. What came
//! is kept, and only the rest is fetched.

use std::collections::BTreeSet;
use std::fs;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use foreshore_images::registry::{Client, ClientConfig, Gate, RegistryConfig, Retry};
use foreshore_images::store::{Progress, StageError, StagedImage, Store, StoreConfig, Unpacker};
use foreshore_images::{Digest, Fault, Platform};

use crate::bed::{TIMEOUTS, unless_busy, wait_for};
use crate::compose::{Blobs, Layer, digest};
use crate::hostile::{chain, honest, reference};
use crate::server::{Reply, Server, ranged, status, with_header};

const AMD64: (&str, &str) = ("amd64", "");
const MIB: usize = 1 << 20;
/// Quick, so that the tests are.
const RETRY: Retry = Retry {
    attempts: 4,
    least: Duration::from_millis(5),
    longest: Duration::from_millis(50),
};

/// Bytes that do not compress.
fn noise(count: usize, seed: u32) -> Vec<u8> {
    let mut state = seed * 2 + 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state.to_be_bytes()[1]
    };
    std::iter::repeat_with(next).take(count).collect()
}

/// An image of one layer of so many bytes: blobs, image, layer blob.
fn image(count: usize) -> (Blobs, Digest, Vec<u8>) {
    let layer = Layer::gzip(&[("noise", &noise(count, 7))]);
    let mut blobs = Blobs::default();
    let image = digest(&blobs.image(AMD64, std::slice::from_ref(&layer)));
    (blobs, image, layer.blob)
}

fn client(server: &Server, change: impl FnOnce(&mut ClientConfig)) -> Client {
    let plain = RegistryConfig {
        plain_http: true,
        ..RegistryConfig::default()
    };
    let mut config = ClientConfig {
        registries: [(server.host.clone(), plain)].into(),
        timeouts: TIMEOUTS,
        retry: RETRY,
        ..ClientConfig::default()
    };
    change(&mut config);
    Client::new(config).unwrap()
}

fn stage(
    store: &Store,
    client: &Client,
    server: &Server,
    image: Digest,
) -> Result<StagedImage, StageError> {
    let platform = Platform::linux("amd64", "");
    store.stage(client, &reference(server, image), &platform, &mut |_| {})
}

/// Where requests for this blob began.
fn offsets(server: &Server, blob: &[u8]) -> Vec<usize> {
    let hex = Digest::of(blob).hex();
    let requests = server.requests();
    requests
        .iter()
        .filter(|request| request.path.contains(&hex))
        .map(|request| request.from.unwrap_or(0))
        .collect()
}

#[test]
fn a_connection_that_ends_again_and_again_costs_only_what_was_lost() {
    let (blobs, image, blob) = image(5 * MIB);
    let served = blob.clone();
    let server = Server::start("127.0.0.1", move |request| {
        if request.path.contains(&Digest::of(&served).hex()) {
            // Reset every 700,000 bytes.
            ranged(&served, request, 700_000)
        } else {
            honest(&blobs, request)
        }
    });
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path()).unwrap();
    let mut told = 0;
    let staged = store
        .stage(
            &client(&server, |_| {}),
            &reference(&server, image),
            &Platform::linux("amd64", ""),
            &mut |progress| {
                if let Progress::Fetched { bytes } = progress {
                    told += bytes;
                }
            },
        )
        .unwrap();
    let found = fs::read(staged.layers[0].join("noise")).unwrap();
    assert!(found == noise(5 * MIB, 7));
    let offsets = offsets(&server, &blob);
    let expected: Vec<usize> = (0..offsets.len()).map(|n| n * 700_000).collect();
    assert_eq!(
        offsets, expected,
        "each attempt goes on where the last stopped"
    );
    assert_eq!(offsets.len(), blob.len().div_ceil(700_000));
    assert_eq!(told, blob.len() as u64, "no byte is told of twice");
    let left = fs::read_dir(root.path().join("partial")).unwrap().count();
    assert_eq!(left, 0, "what was unpacked needs no blob");
}

#[test]
fn attempts_in_vain_are_counted_and_what_came_is_kept() {
    let (blobs, image, blob) = image(2 * MIB);
    let (served, works) = (blob.clone(), Arc::new(AtomicBool::new(false)));
    let switch = Arc::clone(&works);
    let server = Server::start("127.0.0.1", move |request| {
        if !request.path.contains(&Digest::of(&served).hex()) {
            return honest(&blobs, request);
        }
        if switch.load(Ordering::SeqCst) {
            return ranged(&served, request, usize::MAX);
        }
        // One good MiB, and then nothing but resets.
        let most = if request.from.is_none() { MIB } else { 0 };
        ranged(&served, request, most)
    });
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path()).unwrap();
    let client = client(&server, |_| {});
    let error = stage(&store, &client, &server, image).unwrap_err();
    assert_eq!(error.fault(), Fault::Unreachable, "{}", chain(&error));
    assert!(error.is_transient());
    // The first was worth it; four in vain.
    assert_eq!(offsets(&server, &blob).len(), 5);
    // Another process goes on there.
    works.store(true, Ordering::SeqCst);
    drop(store);
    let store = Store::open(root.path()).unwrap();
    stage(&store, &client, &server, image).unwrap();
    assert_eq!(*offsets(&server, &blob).last().unwrap(), MIB);
}

#[test]
fn what_is_on_disk_is_not_believed() {
    let (blobs, image, blob) = image(3 * MIB);
    let cuts = Arc::new(AtomicBool::new(true));
    let (served, cut) = (blob.clone(), Arc::clone(&cuts));
    let server = Server::start("127.0.0.1", move |request| {
        if !request.path.contains(&Digest::of(&served).hex()) {
            return honest(&blobs, request);
        }
        let most = if cut.load(Ordering::SeqCst) {
            2 * MIB - request.from.unwrap_or(0).min(2 * MIB)
        } else {
            usize::MAX
        };
        ranged(&served, request, most)
    });
    let never = |config: &mut ClientConfig| config.retry = Retry::NEVER;
    let client = client(&server, never);
    let partial = Digest::of(&blob).hex();
    type Spoil = fn(&mut Vec<u8>, &mut Vec<u8>);
    let cases: [(&str, Spoil, usize); 3] = [
        // As a file system shows it after a power cut.
        (
            "zeros from the middle on",
            |data, _| data[MIB..].fill(0),
            MIB,
        ),
        ("no checksums", |_, sums| sums.clear(), 0),
        // As nothing but a liar with good checksums could make it: noticed at the end, and fetched from the start.
        (
            "wrong, and sealed",
            |data, sums| {
                data.fill(1);
                sums.clear();
                for piece in data.chunks(256 << 10) {
                    sums.extend(crc32fast::hash(piece).to_le_bytes());
                }
            },
            2 * MIB,
        ),
    ];
    for (name, spoil, from) in cases {
        let root = tempfile::tempdir().unwrap();
        let store = Store::open(root.path()).unwrap();
        cuts.store(true, Ordering::SeqCst);
        stage(&store, &client, &server, image).unwrap_err();
        let data_path = root.path().join("partial").join(&partial);
        let sums_path = root.path().join("partial").join(format!("{partial}.sums"));
        let mut data = fs::read(&data_path).unwrap();
        assert_eq!(data.len(), 2 * MIB);
        let mut sums = fs::read(&sums_path).unwrap();
        spoil(&mut data, &mut sums);
        fs::write(&data_path, data).unwrap();
        fs::write(&sums_path, sums).unwrap();
        cuts.store(false, Ordering::SeqCst);
        let before = offsets(&server, &blob).len();
        let staged = stage(&store, &client, &server, image).unwrap();
        assert!(
            fs::read(staged.layers[0].join("noise")).unwrap() == noise(3 * MIB, 7),
            "{name}"
        );
        let mut expected = vec![from];
        if from == 2 * MIB {
            expected.push(0);
        }
        assert_eq!(offsets(&server, &blob)[before..], expected, "{name}");
    }
}

#[test]
fn a_server_that_knows_no_ranges_is_used_all_the_same() {
    let (blobs, image, blob) = image(2 * MIB);
    let (served, count) = (blob.clone(), AtomicUsize::new(0));
    let server = Server::start("127.0.0.1", move |request| {
        if !request.path.contains(&Digest::of(&served).hex()) {
            return honest(&blobs, request);
        }
        match count.fetch_add(1, Ordering::SeqCst) {
            0 => Reply::Truncated(served[..MIB].to_vec(), served.len()),
            // A range that does not fit: some answer that, and the next is asked without one.
            1 => status(416),
            _ => Reply::Truncated(served.clone(), served.len()),
        }
    });
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path()).unwrap();
    let staged = stage(&store, &client(&server, |_| {}), &server, image).unwrap();
    assert!(fs::read(staged.layers[0].join("noise")).unwrap() == noise(2 * MIB, 7));
    assert_eq!(offsets(&server, &blob), [0, MIB, 0]);
}

/// Answers to the rest of a blob as servers, caches and proxies give them: each ends in the right bytes.
#[test]
fn whatever_is_said_to_a_range_the_blob_comes() {
    let (blobs, image, blob) = image(2 * MIB);
    type Answer = fn(&[u8], usize) -> Reply;
    // What is asked for first is cut after a MiB; then each of these, until it asks without a range.
    let cases: [(&str, Answer, &[usize]); 17] = [
        (
            "pieces",
            |blob, from| {
                let end = blob.len().min(from + 300_000);
                partial(blob, from, end, &blob.len().to_string())
            },
            &[MIB, MIB + 300_000, MIB + 600_000, MIB + 900_000],
        ),
        (
            "pieces of it knows not what",
            |blob, from| partial(blob, from, blob.len().min(from + 600_000), "*"),
            &[MIB, MIB + 600_000],
        ),
        (
            "a length it does not know",
            |blob, from| partial(blob, from, blob.len(), "*"),
            &[MIB],
        ),
        (
            "more than asked for, from before",
            |blob, from| partial(blob, from - 1000, blob.len(), "*"),
            &[MIB],
        ),
        (
            "a 200",
            |blob, _| Reply::Full(200, Vec::new(), blob.to_vec()),
            &[MIB],
        ),
        (
            "from after",
            |blob, from| partial(blob, from + 5, blob.len(), &blob.len().to_string()),
            &[MIB, 0],
        ),
        (
            "another length",
            |blob, from| partial(blob, from, blob.len(), &(blob.len() + 1).to_string()),
            &[MIB, 0],
        ),
        (
            "ends before it begins",
            |blob, from| with_range(&blob[from..], &format!("bytes {from}-{}/*", from - 1)),
            &[MIB, 0],
        ),
        (
            "beyond the end",
            |blob, from| with_range(&blob[from..], &format!("bytes {from}-{}/*", u64::MAX)),
            &[MIB, 0],
        ),
        (
            "no range",
            |blob, from| Reply::Full(206, Vec::new(), blob[from..].to_vec()),
            &[MIB, 0],
        ),
        (
            "nonsense for a range",
            |blob, from| with_range(&blob[from..], "lines 1-2/3"),
            &[MIB, 0],
        ),
        (
            "all of it as a part",
            |blob, from| with_range(blob, &format!("bytes {from}-{}/*", blob.len() - 1)),
            &[MIB, 0],
        ),
        ("416", |_, _| status(416), &[MIB, 0]),
        ("400", |_, _| status(400), &[MIB, 0]),
        ("403", |_, _| status(403), &[MIB, 0]),
        ("501", |_, _| status(501), &[MIB, 0]),
        // A gateway that breaks of ranges only, as far as can be told.
        ("502", |_, _| status(502), &[MIB, MIB, 0]),
    ];
    for (name, answer, expected) in cases {
        let (served, blobs) = (blob.clone(), blobs.clone());
        let begun = AtomicBool::new(false);
        let server = Server::start("127.0.0.1", move |request| {
            if !request.path.contains(&Digest::of(&served).hex()) {
                return honest(&blobs, request);
            }
            match request.from {
                None if begun.swap(true, Ordering::SeqCst) => ranged(&served, request, usize::MAX),
                None => ranged(&served, request, MIB),
                Some(from) => answer(&served, from),
            }
        });
        let root = tempfile::tempdir().unwrap();
        let store = Store::open(root.path()).unwrap();
        let staged = stage(&store, &client(&server, |_| {}), &server, image)
            .unwrap_or_else(|error| panic!("{name}: {}", chain(&error)));
        assert!(
            fs::read(staged.layers[0].join("noise")).unwrap() == noise(2 * MIB, 7),
            "{name}"
        );
        assert_eq!(offsets(&server, &blob)[1..], *expected, "{name}");
    }
}

/// A 206 that says its bytes truly; `end` is the first that does not come.
fn partial(blob: &[u8], from: usize, end: usize, length: &str) -> Reply {
    let range = format!("bytes {from}-{}/{length}", end - 1);
    with_range(&blob[from..end], &range)
}

fn with_range(body: &[u8], range: &str) -> Reply {
    let headers = vec![("Content-Range".to_owned(), range.to_owned())];
    Reply::Full(206, headers, body.to_vec())
}

/// Wrong bytes that go on from right ones are noticed, and so is that they are wrong again when all comes anew.
#[test]
fn lies_about_a_range_are_noticed() {
    let (blobs, image, blob) = image(2 * MIB);
    let (served, begun) = (blob.clone(), AtomicBool::new(false));
    let server = Server::start("127.0.0.1", move |request| {
        if !request.path.contains(&Digest::of(&served).hex()) {
            return honest(&blobs, request);
        }
        let mut wrong = served.clone();
        wrong[served.len() - 1] ^= 1;
        let first = !begun.swap(true, Ordering::SeqCst);
        let most = if first { MIB } else { usize::MAX };
        ranged(&wrong, request, most)
    });
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path()).unwrap();
    let begin = Instant::now();
    let error = stage(&store, &client(&server, |_| {}), &server, image).unwrap_err();
    assert_eq!(error.fault(), Fault::DigestMismatch, "{}", chain(&error));
    assert!(begin.elapsed() < Duration::from_secs(10));
    assert_eq!(store.staged(&image), None);
}

/// A range of next to nothing, for ever: given up within the time that the blob may take.
#[test]
fn ranges_that_bring_next_to_nothing_end_in_time() {
    let (blobs, image, blob) = image(2 * MIB);
    let served = blob.clone();
    let server = Server::start("127.0.0.1", move |request| {
        if !request.path.contains(&Digest::of(&served).hex()) {
            return honest(&blobs, request);
        }
        match request.from {
            None => ranged(&served, request, MIB),
            Some(from) => partial(&served, from, from + 1, "*"),
        }
    });
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path()).unwrap();
    let begin = Instant::now();
    let error = stage(&store, &client(&server, |_| {}), &server, image).unwrap_err();
    assert_eq!(error.fault(), Fault::Unreachable, "{}", chain(&error));
    assert!(
        begin.elapsed() < Duration::from_secs(30),
        "{:?}",
        begin.elapsed()
    );
}

/// An unpacker that dies of what it is given says nothing about the disk, and when that was wrong, nothing about the image.
#[test]
fn an_unpacker_that_dies_of_wrong_bytes_gets_the_right_ones() {
    let (blobs, image, blob) = image(2 * MIB);
    let (served, first) = (blob.clone(), AtomicBool::new(true));
    let server = Server::start("127.0.0.1", move |request| {
        if !request.path.contains(&Digest::of(&served).hex()) {
            honest(&blobs, request)
        } else if first.swap(false, Ordering::SeqCst) {
            Reply::Truncated(vec![b'X'; MIB], served.len())
        } else {
            ranged(&served, request, usize::MAX)
        }
    });
    let example = std::env::current_exe().unwrap();
    let example = example.ancestors().nth(2).unwrap().join("examples/unpack");
    let root = tempfile::tempdir().unwrap();
    let seen = root.path().join("seen");
    let script = format!(
        "head -c 65536 > {0}; if grep -q XXXXXXXXXXXXXXXX {0}; then touch {0}.died; kill -11 $$; fi; cat {0} - | {1}",
        seen.display(),
        example.display()
    );
    let inflate = format!("exec {} inflate", example.display());
    let config = StoreConfig {
        unpacker: Some(Unpacker {
            program: "/bin/sh".into(),
            arguments: vec!["-c".into(), script.into()],
            inflate: vec!["-c".into(), inflate.into()],
            rebuild: Vec::new(),
            patience: Duration::from_secs(20),
        }),
        ..StoreConfig::default()
    };
    let store = Store::open_with(&root.path().join("store"), config).unwrap();
    let staged = stage(&store, &client(&server, |_| {}), &server, image).unwrap();
    assert!(fs::read(staged.layers[0].join("noise")).unwrap() == noise(2 * MIB, 7));
    assert_eq!(offsets(&server, &blob), [0, MIB, 0]);
    assert!(root.path().join("seen.died").exists());
}

#[test]
fn a_pull_that_is_killed_in_the_middle_fetches_only_the_rest() {
    let layers: Vec<Layer> = (0..4)
        .map(|n| Layer::gzip(&[(&format!("f{n}"), &noise(8 * MIB, n))]))
        .collect();
    let mut blobs = Blobs::default();
    let image = digest(&blobs.image(AMD64, &layers));
    let total: usize = layers.iter().map(|layer| layer.blob.len()).sum();
    // What each request got, by what it asked for; slow enough to be killed in the middle.
    let sent = Arc::new(Mutex::new(0_usize));
    let (served, counted) = (blobs.clone(), Arc::clone(&sent));
    let server = Server::start("127.0.0.1", move |request| {
        let name = request.path.rsplit('/').next().unwrap();
        let found = name.parse().ok().and_then(|digest| served.0.get(&digest));
        match found {
            Some(bytes) if request.path.contains("/blobs/") => {
                *counted.lock().unwrap() += bytes.len() - request.from.unwrap_or(0);
                ranged(bytes, request, usize::MAX)
            }
            _ => honest(&served, request),
        }
    });
    let program = std::env::current_exe().unwrap();
    let program = program.ancestors().nth(2).unwrap().join("examples/stage");
    let root = tempfile::tempdir().unwrap();
    let start = |rate: usize| {
        std::process::Command::new(&program)
            .arg(root.path())
            .arg(reference(&server, image).to_string())
            .env("STAGE_RATE", rate.to_string())
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap()
    };
    let on_disk = || -> usize {
        // What is finished goes at any moment.
        let size = |entry: std::io::Result<fs::DirEntry>| {
            entry
                .and_then(|entry| entry.metadata())
                .map_or(0, |file| file.len())
        };
        let partial = fs::read_dir(root.path().join("partial"));
        let partial: u64 = partial.map_or(0, |entries| entries.map(size).sum());
        usize::try_from(partial).unwrap()
    };
    let mut child = start(16 * MIB);
    wait_for("half of it", || {
        let done = fs::read_dir(root.path().join("layers")).map_or(0, |entries| {
            entries
                .filter(|entry| entry.as_ref().unwrap().path().is_dir())
                .count()
        });
        on_disk() + done * 8 * MIB >= total / 2
    });
    child.kill().unwrap();
    child.wait().unwrap();
    let unpacked: usize = {
        let store = Store::open(root.path()).unwrap();
        assert_eq!(store.staged(&image), None, "it was killed in time");
        let gone = |layer: &&Layer| {
            root.path()
                .join("layers")
                .join(layer.diff_id.hex())
                .is_dir()
        };
        layers
            .iter()
            .filter(gone)
            .map(|layer| layer.blob.len())
            .sum()
    };
    let kept = on_disk() + unpacked;
    *sent.lock().unwrap() = 0;
    assert!(start(0).wait().unwrap().success());
    let fetched = *sent.lock().unwrap();
    // Up to three layers were under way, each of which loses what is behind its last checksum.
    assert!(
        fetched + kept <= total + MIB,
        "{fetched} bytes were fetched with {kept} of {total} there"
    );
    let store = Store::open(root.path()).unwrap();
    assert!(store.staged(&image).is_some());
}

#[test]
fn layers_are_fetched_at_once_and_unpacked_in_order() {
    let layers: Vec<Layer> = (0..6)
        .map(|n| Layer::gzip(&[("same", &noise(100_000, n)), (&format!("f{n}"), b"x")]))
        .collect();
    let mut blobs = Blobs::default();
    let image = digest(&blobs.image(AMD64, &layers));
    let at_once = Arc::new((AtomicUsize::new(0), AtomicUsize::new(0)));
    let counted = Arc::clone(&at_once);
    let fetched: BTreeSet<String> = layers
        .iter()
        .map(|layer| Digest::of(&layer.blob).hex())
        .collect();
    let server = Server::start("127.0.0.1", move |request| {
        if fetched.contains(request.path.rsplit(':').next().unwrap_or_default()) {
            let now = counted.0.fetch_add(1, Ordering::SeqCst) + 1;
            counted.1.fetch_max(now, Ordering::SeqCst);
            // The first waits until there are as many as there should be; then for more, as a server far away.
            let until = Instant::now() + Duration::from_secs(20);
            while counted.1.load(Ordering::SeqCst) < 3 && Instant::now() < until {
                std::thread::sleep(Duration::from_millis(5));
            }
            std::thread::sleep(Duration::from_millis(50));
            counted.0.fetch_sub(1, Ordering::SeqCst);
        }
        honest(&blobs, request)
    });
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path()).unwrap();
    let staged = stage(&store, &client(&server, |_| {}), &server, image).unwrap();
    assert_eq!(staged.layers.len(), 6);
    for (n, layer) in (0..).zip(&staged.layers) {
        assert!(fs::read(layer.join("same")).unwrap() == noise(100_000, n));
    }
    assert_eq!(at_once.1.load(Ordering::SeqCst), 3);
}

#[test]
fn a_registry_that_wants_to_be_left_alone_is() {
    let (blobs, image, blob) = image(1000);
    let refused = AtomicBool::new(false);
    let (hex, all) = (Digest::of(&blob).hex(), blobs);
    let server = Server::start("127.0.0.1", move |request| {
        if request.path.contains(&hex) && !refused.swap(true, Ordering::SeqCst) {
            return with_header(429, "Retry-After", "1");
        }
        honest(&all, request)
    });
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path()).unwrap();
    let begin = Instant::now();
    stage(&store, &client(&server, |_| {}), &server, image).unwrap();
    assert!(begin.elapsed() >= Duration::from_secs(1));
    assert_eq!(offsets(&server, &blob).len(), 2);
}

#[test]
fn the_rate_is_kept_over_all_layers() {
    let layers: Vec<Layer> = (0..3)
        .map(|n| Layer::gzip(&[("f", &noise(300_000, n))]))
        .collect();
    let mut blobs = Blobs::default();
    let image = digest(&blobs.image(AMD64, &layers));
    let server = Server::start("127.0.0.1", move |request| honest(&blobs, request));
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path()).unwrap();
    let paced = client(&server, |config| config.rate_bytes = Some(600_000));
    let begin = Instant::now();
    stage(&store, &paced, &server, image).unwrap();
    // 900,000 bytes, of which a quarter of a second's worth may pass at once.
    let least = Duration::from_millis(1200);
    assert!(begin.elapsed() >= least, "{:?}", begin.elapsed());
}

#[test]
fn a_closed_gate_defers_and_what_is_there_needs_none() {
    let (blobs, image, blob) = image(1000);
    let server = Server::start("127.0.0.1", move |request| honest(&blobs, request));
    let open = Arc::new(AtomicBool::new(true));
    let asked = Arc::clone(&open);
    let gate = Gate::new(move || {
        if asked.load(Ordering::SeqCst) {
            Ok(())
        } else {
            Err("the link wwan0 is metered".to_owned())
        }
    });
    let gated = client(&server, |config| config.gate = Some(gate));
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path()).unwrap();
    open.store(false, Ordering::SeqCst);
    let error = stage(&store, &gated, &server, image).unwrap_err();
    assert_eq!(error.fault(), Fault::Deferred, "{}", chain(&error));
    assert!(error.is_transient());
    assert!(
        chain(&error).contains("wwan0 is metered"),
        "{}",
        chain(&error)
    );
    assert_eq!(offsets(&server, &blob).len(), 0);
    open.store(true, Ordering::SeqCst);
    stage(&store, &gated, &server, image).unwrap();
    open.store(false, Ordering::SeqCst);
    stage(&store, &gated, &server, image).unwrap();
}

#[test]
fn what_was_begun_stays_as_long_as_its_image_is_wanted() {
    let (blobs, wanted, blob) = image(2 * MIB);
    let other = {
        let mut other = Blobs::default();
        let layer = Layer::gzip(&[("other", &noise(MIB, 9))]);
        let image = digest(&other.image(AMD64, std::slice::from_ref(&layer)));
        (other, image, layer.blob)
    };
    let (first, second) = (blob.clone(), other.2.clone());
    let server = Server::start("127.0.0.1", move |request| {
        for blob in [&first, &second] {
            if request.path.contains(&Digest::of(blob).hex()) {
                return ranged(blob, request, 600_000);
            }
        }
        match honest(&blobs, request) {
            Reply::Full(404, ..) => honest(&other.0, request),
            found => found,
        }
    });
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path()).unwrap();
    let client = client(&server, |config| config.retry = Retry::NEVER);
    for image in [wanted, other.1] {
        stage(&store, &client, &server, image).unwrap_err();
    }
    let partial = |blob: &[u8]| root.path().join("partial").join(Digest::of(blob).hex());
    assert!(partial(&blob).exists() && partial(&other.2).exists());
    let removed = unless_busy(|| store.remove_unused(&[wanted].into()));
    assert!(removed.bytes >= 600_000);
    assert!(partial(&blob).exists() && !partial(&other.2).exists());
    unless_busy(|| store.remove_unused(&[].into()));
    assert_eq!(
        fs::read_dir(root.path().join("partial")).unwrap().count(),
        0
    );
    assert_eq!(
        fs::read_dir(root.path().join("pulling")).unwrap().count(),
        0
    );
}
