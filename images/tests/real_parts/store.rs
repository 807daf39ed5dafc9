//! The device's store: what is kept, shared, repaired and removed.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use foreshore_images::registry::{Client, RegistryConfig};
use foreshore_images::store::{Progress, StageError, Store, StoreConfig, Unpacker};
use foreshore_images::{Digest, Fault, Platform, Reference};

use crate::bed::{unless_busy, wait_for};
use crate::compose::{Blobs, Layer, digest};
use crate::hostile::{chain, client_for, honest};
use crate::server::{Server, status};

const AMD64: (&str, &str) = ("amd64", "");

pub(crate) struct World {
    pub(crate) server: Server,
    pub(crate) client: Client,
    pub(crate) root: tempfile::TempDir,
}

impl World {
    pub(crate) fn new(blobs: Blobs) -> Self {
        Self::with(move |request| honest(&blobs, request))
    }

    pub(crate) fn with(
        handler: impl Fn(&crate::server::Request) -> crate::server::Reply + Send + Sync + 'static,
    ) -> Self {
        let server = Server::start("127.0.0.1", handler);
        let client = client_for(&server.host, RegistryConfig::default());
        Self {
            server,
            client,
            root: tempfile::tempdir().unwrap(),
        }
    }

    pub(crate) fn store(&self) -> Store {
        Store::open(self.root.path()).unwrap()
    }

    pub(crate) fn reference(&self, digest: Digest) -> Reference {
        format!("{}/app@{digest}", self.server.host)
            .parse()
            .unwrap()
    }

    pub(crate) fn stage(
        &self,
        store: &Store,
        digest: Digest,
    ) -> Result<foreshore_images::store::StagedImage, StageError> {
        store.stage(
            &self.client,
            &self.reference(digest),
            &Platform::linux("amd64", ""),
            &mut |_| {},
        )
    }
}

fn three_layers() -> (Blobs, Digest, [Layer; 3]) {
    let layers = [
        Layer::gzip(&[("a", b"one")]),
        Layer::plain(&[("b", b"two")]),
        Layer::gzip(&[("c", b"three")]),
    ];
    let mut blobs = Blobs::default();
    let image = digest(&blobs.image(AMD64, &layers));
    (blobs, image, layers)
}

#[test]
fn staging_again_needs_no_network() {
    let (blobs, image, _) = three_layers();
    let world = World::new(blobs);
    let store = world.store();
    let mut progress = Vec::new();
    let staged = store
        .stage(
            &world.client,
            &world.reference(image),
            &Platform::linux("amd64", ""),
            &mut |step| progress.push(step),
        )
        .unwrap();
    assert_eq!(staged.layers.len(), 3);
    assert!(matches!(progress[0], Progress::Planned { layers: 3, bytes } if bytes > 0));
    let fetched: u64 = progress
        .iter()
        .map(|step| {
            if let Progress::Fetched { bytes } = step {
                *bytes
            } else {
                0
            }
        })
        .sum();
    assert!(
        matches!(progress[0], Progress::Planned { bytes, .. } if bytes == fetched),
        "{progress:?}"
    );
    assert_eq!(
        fs::read_to_string(staged.layers[0].join("a")).unwrap(),
        "one",
        "lowest first"
    );

    let before = world.server.requests().len();
    assert_eq!(world.stage(&store, image).unwrap(), staged);
    assert_eq!(world.store().staged(&image), Some(staged.clone()));
    assert_eq!(world.store().list().unwrap(), [staged]);
    assert_eq!(world.server.requests().len(), before);
    let blobs_left = fs::read_dir(world.root.path().join("blobs/sha256"))
        .unwrap()
        .count();
    assert_eq!(blobs_left, 2, "manifest and config; layers are unpacked");
}

#[test]
fn a_stage_that_failed_goes_on_where_it_was() {
    let (blobs, image, layers) = three_layers();
    let last = Digest::of(&layers[2].blob).hex();
    let broken = Arc::new(AtomicBool::new(true));
    let (switch, hidden) = (Arc::clone(&broken), last.clone());
    let world = World::with(move |request| {
        if switch.load(Ordering::SeqCst) && request.path.contains(&hidden) {
            return status(503);
        }
        honest(&blobs, request)
    });
    let store = world.store();
    let error = world.stage(&store, image).unwrap_err();
    assert!(error.is_transient());
    assert_eq!(store.staged(&image), None);
    broken.store(false, Ordering::SeqCst);
    world.stage(&store, image).unwrap();
    assert_eq!(
        world.server.count(&Digest::of(&layers[0].blob).hex()),
        1,
        "fetched once"
    );
    assert_eq!(
        world.server.count(&Digest::of(&layers[1].blob).hex()),
        1,
        "fetched once"
    );
    assert_eq!(world.server.count(&last), 2);
}

#[test]
fn leftovers_of_a_power_loss_are_swept() {
    let (blobs, image, layers) = three_layers();
    let world = World::new(blobs);
    let root = world.root.path();
    let store = world.store();
    // As if power had gone while a layer was unpacked, and between its record and its rename.
    fs::create_dir_all(root.join("tmp/layer-abc/tree/deep")).unwrap();
    fs::write(root.join("tmp/.tmpblob"), "half").unwrap();
    fs::write(
        root.join("layers")
            .join(format!("{}.json", layers[0].diff_id.hex())),
        "{}",
    )
    .unwrap();
    drop(store);
    // Whoever opens it sweeps, unless a process that another test starts still has the lock.
    wait_for("the sweep", || {
        let _swept = world.store();
        let left = |name| fs::read_dir(root.join(name)).unwrap().count();
        left("tmp") + left("layers") == 0
    });
    let store = world.store();
    world.stage(&store, image).unwrap();
    // A directory that vanished under a whole image: it is staged again.
    fs::remove_dir_all(root.join("layers").join(layers[1].diff_id.hex())).unwrap();
    assert_eq!(store.staged(&image), None);
    let staged = world.stage(&store, image).unwrap();
    assert_eq!(
        fs::read_to_string(staged.layers[1].join("b")).unwrap(),
        "two"
    );
}

/// What a survey finds. A process that another test forks shares the lock of the staging before until it executes its own
/// program, which is waited for.
fn surveyed(world: &World) -> Vec<Digest> {
    let until = Instant::now() + Duration::from_secs(20);
    loop {
        match world.store().survey() {
            Err(StageError::Busy { .. }) if Instant::now() < until => {
                std::thread::sleep(Duration::from_millis(5));
            }
            found => return found.unwrap(),
        }
    }
}

#[test]
fn a_layer_that_a_power_cut_has_torn_is_found_and_fetched_again() {
    let (blobs, image, layers) = three_layers();
    let world = World::new(blobs);
    let staged = world.stage(&world.store(), image).unwrap();
    let tree = &staged.layers[1];
    let tears: [(&str, &dyn Fn()); 3] = [
        ("a file lost its content", &|| {
            fs::write(tree.join("b"), "").unwrap();
        }),
        ("a file is not there", &|| {
            fs::remove_file(tree.join("b")).unwrap();
        }),
        ("nothing is there", &|| {
            fs::remove_dir_all(tree).unwrap();
            fs::create_dir(tree).unwrap();
        }),
    ];
    for (what, tear) in tears {
        // As the agent does at the first start after the power came back.
        tear();
        assert_eq!(surveyed(&world), [layers[1].diff_id], "{what}");
        assert_eq!(world.store().staged(&image), None, "{what}");
        let again = world.stage(&world.store(), image).unwrap();
        assert_eq!(again, staged);
        assert_eq!(fs::read_to_string(tree.join("b")).unwrap(), "two", "{what}");
    }
    // What has outlived one power cycle is not walked over again.
    assert!(surveyed(&world).is_empty());
    fs::write(tree.join("b"), "").unwrap();
    assert!(surveyed(&world).is_empty());
    unless_busy(|| world.store().remove_unused(&BTreeSet::new()));
    let left = fs::read_dir(world.root.path().join("layers")).unwrap();
    assert_eq!(left.count(), 0, "marks go with their layers");
}

#[test]
fn damaged_records_lose_nothing() {
    let (blobs, image, layers) = three_layers();
    let world = World::new(blobs);
    let store = world.store();
    let staged = world.stage(&store, image).unwrap();
    let requests = world.server.requests().len();
    let root = world.root.path().to_owned();
    let image_record = root.join("images").join(format!("{}.json", image.hex()));
    for garbage in [
        &b""[..],
        b"{",
        b"\0\0\0\0",
        br#"{"sha256":"sha256:00","record":""}"#,
    ] {
        fs::write(&image_record, garbage).unwrap();
        assert_eq!(
            world.store().staged(&image).as_ref(),
            Some(&staged),
            "made again from the blobs"
        );
    }
    fs::write(
        root.join("layers")
            .join(format!("{}.json", layers[0].diff_id.hex())),
        "rot",
    )
    .unwrap();
    assert_eq!(
        world.store().staged(&image),
        None,
        "both records of a layer are damaged"
    );
    assert!(staged.layers[0].is_dir(), "but a container may run from it");
    assert_eq!(
        world.server.requests().len(),
        requests,
        "nothing of this needed the network"
    );

    let again = world.stage(&world.store(), image).unwrap();
    assert_eq!(again.layers, staged.layers);
    let aside: Vec<String> = fs::read_dir(root.join("quarantine"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert_eq!(aside.len(), 2, "the record and the layer: {aside:?}");

    // Now only the layer's record is damaged: the image's own is enough to start it.
    fs::write(
        root.join("layers")
            .join(format!("{}.json", layers[0].diff_id.hex())),
        "rot",
    )
    .unwrap();
    assert_eq!(
        world.store().staged(&image).map(|image| image.layers),
        Some(staged.layers)
    );
}

#[test]
fn what_is_kept_is_kept_and_the_rest_goes() {
    let shared = Layer::gzip(&[("shared", b"s")]);
    let mut blobs = Blobs::default();
    let keep = digest(&blobs.image(AMD64, &[shared.clone(), Layer::gzip(&[("mine", b"m")])]));
    let go = digest(&blobs.image(AMD64, &[shared.clone(), Layer::gzip(&[("theirs", b"t")])]));
    let index_of = blobs.image(AMD64, &[Layer::gzip(&[("indexed", b"i")])]);
    let index = digest(&blobs.index(&[index_of]));
    let world = World::new(blobs);
    let store = world.store();
    let kept = world.stage(&store, keep).unwrap();
    let gone = world.stage(&store, go).unwrap();
    let indexed = world.stage(&store, index).unwrap();
    assert_ne!(indexed.digest, indexed.manifest);
    assert_eq!(kept.layers[0], gone.layers[0], "one directory for both");

    let everything = unless_busy(|| store.remove_unused(&BTreeSet::from([keep, go, index])));
    assert_eq!(everything.images, []);
    assert_eq!(everything.layers, 0);
    let removed = unless_busy(|| store.remove_unused(&BTreeSet::from([keep, index])));
    assert_eq!(removed.images, [go]);
    assert_eq!(removed.layers, 1);
    assert_eq!(store.staged(&keep), Some(kept.clone()));
    assert_eq!(store.staged(&index), Some(indexed));
    assert_eq!(store.staged(&go), None);
    assert!(kept.layers.iter().all(|layer| layer.is_dir()));

    // A pinned image stays although nobody names it, also when the store is opened again.
    store.pin(&index).unwrap();
    store.pin(&index).unwrap();
    let removed = unless_busy(|| world.store().remove_unused(&BTreeSet::from([keep])));
    assert_eq!(removed, foreshore_images::store::Removed::default());
    assert_eq!(world.store().pinned().unwrap(), BTreeSet::from([index]));
    assert!(store.unpin(&index).unwrap() && !store.unpin(&index).unwrap());

    // A kept image whose record is damaged is still kept.
    fs::write(
        world
            .root
            .path()
            .join("images")
            .join(format!("{}.json", keep.hex())),
        "rot",
    )
    .unwrap();
    unless_busy(|| store.remove_unused(&BTreeSet::from([keep])));
    assert_eq!(store.staged(&keep), Some(kept));
    assert_eq!(store.staged(&index), None);
    let none = unless_busy(|| store.remove_unused(&BTreeSet::new()));
    assert_eq!(none.images, [keep]);
    for name in ["layers", "blobs/sha256", "images"] {
        assert_eq!(
            fs::read_dir(world.root.path().join(name)).unwrap().count(),
            0,
            "{name}"
        );
    }
}

#[test]
fn two_processes_do_not_fight() {
    let (blobs, image, _) = three_layers();
    let world = World::new(blobs);
    let config = StoreConfig {
        lock_wait: Duration::from_millis(200),
        ..StoreConfig::default()
    };
    let store = Store::open_with(world.root.path(), config).unwrap();
    let other = fs::File::options()
        .write(true)
        .open(world.root.path().join("lock"));
    let other = other.unwrap();
    other.lock().unwrap();
    fs::write(world.root.path().join("tmp/theirs"), "x").unwrap();
    drop(world.store());
    assert!(
        world.root.path().join("tmp/theirs").exists(),
        "open does not sweep what another works on"
    );
    assert_eq!(
        store.remove_unused(&BTreeSet::new()).unwrap_err().fault(),
        Fault::Busy
    );
    let error = world.stage(&store, image).unwrap_err();
    assert_eq!(error.fault(), Fault::Busy);
    assert!(error.is_transient());
    other.unlock().unwrap();
    world.stage(&store, image).unwrap();
    assert!(!world.root.path().join("tmp/theirs").exists());
}

#[test]
fn threads_that_stage_the_same_image_fetch_it_once() {
    let (blobs, image, layers) = three_layers();
    let world = World::new(blobs);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| world.stage(&world.store(), image).unwrap());
        }
    });
    assert_eq!(world.server.count(&Digest::of(&layers[0].blob).hex()), 1);
}

#[test]
fn a_layer_twice_in_an_image_is_one_directory() {
    let twice = Layer::gzip(&[("x", b"again")]);
    let mut blobs = Blobs::default();
    let image = digest(&blobs.image(AMD64, &[twice.clone(), Layer::gzip(&[("y", b"")]), twice]));
    let world = World::new(blobs);
    let staged = world.stage(&world.store(), image).unwrap();
    assert_eq!(
        staged.layers.len(),
        2,
        "overlayfs refuses one directory twice"
    );
    assert!(staged.layers[1].join("x").is_file(), "the upper one counts");
}

#[test]
fn a_tag_alone_is_not_staged_and_resolves_to_its_digest() {
    let (blobs, image, _) = three_layers();
    let manifest = blobs.0[&image].clone();
    let world = World::with(move |request| {
        if request.path.ends_with("/manifests/v1") {
            return crate::server::ok(crate::compose::MANIFEST, manifest.clone());
        }
        honest(&blobs, request)
    });
    let tagged: Reference = format!("{}/app:v1", world.server.host).parse().unwrap();
    let refused = world
        .store()
        .stage(&world.client, &tagged, &Platform::host(), &mut |_| {});
    assert!(matches!(refused, Err(StageError::NotPinned { .. })));
    assert_eq!(world.client.resolve(&tagged).unwrap(), image);
}

#[test]
fn the_store_is_nobody_else_s() {
    use std::os::unix::fs::PermissionsExt;
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("new/store");
    Store::open(&path).unwrap();
    assert_eq!(
        Path::new(&path).metadata().unwrap().permissions().mode() & 0o7777,
        0o700
    );
}

fn unpacker(arguments: [&str; 2], inflate: &str, patience: Duration) -> Unpacker {
    Unpacker {
        program: "/bin/sh".into(),
        arguments: arguments.map(Into::into).into(),
        inflate: vec!["-c".into(), inflate.into()],
        rebuild: Vec::new(),
        patience,
    }
}

/// A layer that takes its unpacker over cannot put its tree in the place of another's: what the digest of its content is nobody
/// asks who unpacked it.
#[test]
fn who_unpacks_cannot_pass_a_tree_off_as_another_layer() {
    let good = Layer::gzip(&[("f", b"good")]);
    let evil = Layer::gzip(&[("f", b"evil")]);
    let mut blobs = Blobs::default();
    let honest_image = digest(&blobs.image(AMD64, std::slice::from_ref(&good)));
    // The blob of one, the diff id of the other.
    let mixed = Layer {
        diff_id: good.diff_id,
        ..evil.clone()
    };
    let evil_image = digest(&blobs.image(AMD64, &[mixed]));
    let world = World::new(blobs);
    let root = world.root.path().join("store");
    let config = |script: &str| StoreConfig {
        unpacker: Some(unpacker(
            ["-c", script],
            "exec gzip -dc",
            Duration::from_secs(20),
        )),
        ..StoreConfig::default()
    };
    let trees = || fs::read_dir(root.join("layers")).unwrap().count();
    let done = r#"{"Done":{"bytes":4,"entries":1,"leans":LEANS,"notes":[],"opaque":[]}}"#;
    let leans = serde_json::to_string(&foreshore_images::unpack::Leaning::default()).unwrap();
    let done = done.replace("LEANS", &leans);
    // It takes all, or stops in the middle, and says that all is well.
    for take in ["cat > /dev/null", "head -c 600 > /dev/null", ":"] {
        let script = format!("{take}; echo evil > $1/f; echo '{done}'");
        let store = Store::open_with(&root, config(&script)).unwrap();
        let error = world.stage(&store, evil_image).unwrap_err();
        let faults = [Fault::DigestMismatch, Fault::BadImage];
        assert!(faults.contains(&error.fault()), "{take}: {}", chain(&error));
        assert!(!error.is_transient(), "{take}");
        assert_eq!(trees(), 0, "{take}");
        // The process may write what it likes for a layer that it was given; that is not shown to others.
    }
    let example = std::env::current_exe().unwrap();
    let example = example.ancestors().nth(2).unwrap().join("examples/unpack");
    let script = format!("exec {}", example.display());
    let store = Store::open_with(&root, config(&script)).unwrap();
    let staged = world.stage(&store, honest_image).unwrap();
    assert_eq!(fs::read(staged.layers[0].join("f")).unwrap(), b"good");
    // Nor can who inflates: what comes out of it has that digest or is thrown away.
    unless_busy(|| store.remove_unused(&BTreeSet::new()));
    let lying = StoreConfig {
        unpacker: Some(unpacker(
            ["-c", &script],
            "cat > /dev/null; head -c 10240 /dev/zero",
            Duration::from_secs(20),
        )),
        ..StoreConfig::default()
    };
    let store = Store::open_with(&root, lying).unwrap();
    let error = world.stage(&store, evil_image).unwrap_err();
    assert_eq!(error.fault(), Fault::DigestMismatch, "{}", chain(&error));
    assert_eq!(trees(), 0);
}

#[test]
fn an_inflater_that_hangs_dies_or_is_no_match_is_an_error_and_leaves_nothing() {
    let content: Vec<u8> = (0..400_000_u32)
        .map(|n| n.wrapping_mul(2_654_435_761).to_be_bytes()[0])
        .collect();
    let mut blobs = Blobs::default();
    let image = digest(&blobs.image(AMD64, &[Layer::gzip(&[("f", &content)])]));
    let world = World::new(blobs);
    let example = std::env::current_exe().unwrap();
    let example = example.ancestors().nth(2).unwrap().join("examples/unpack");
    let script = format!("exec {}", example.display());
    for (inflate, named, fault) in [
        ("exec sleep 1000", "was ended", Fault::Internal),
        (
            "cat > /dev/null; exec sleep 1000",
            "was ended",
            Fault::Internal,
        ),
        ("kill -9 $$", "out of memory", Fault::Internal),
        ("exit 1", "exit status: 1", Fault::Internal),
        (
            "gzip -dc | head -c 100000; kill -11 $$",
            "crashed",
            Fault::BadImage,
        ),
        (
            "cat > /dev/null; exit 3",
            "compression is damaged",
            Fault::BadImage,
        ),
        (
            "gzip -dc | head -c 100000; exit 3",
            "compression is damaged",
            Fault::BadImage,
        ),
        // It says that all is well, and it is not all.
        ("gzip -dc | head -c 100000", "tar archive", Fault::BadImage),
        // Without an end: as much as the image may have, and no more; the archive ends at its beginning.
        ("exec cat /dev/zero", "decompression bomb", Fault::BadImage),
    ] {
        let config = StoreConfig {
            unpacked_bytes_max: 64 << 20,
            unpacker: Some(unpacker(["-c", &script], inflate, patience(inflate))),
            ..StoreConfig::default()
        };
        let store = Store::open_with(world.root.path(), config).unwrap();
        let begin = Instant::now();
        let error = world.stage(&store, image).unwrap_err();
        let text = chain(&error);
        assert!(begin.elapsed() < Duration::from_secs(20), "{inflate}");
        assert_eq!(error.fault(), fault, "{inflate}: {text}");
        assert!(text.contains(named), "{inflate}: {text}");
        for name in ["tmp", "layers", "images"] {
            let left = fs::read_dir(world.root.path().join(name)).unwrap().count();
            assert_eq!(left, 0, "{inflate}: {name}");
        }
    }
}

/// Little for what hangs, and more for the rest than a slow machine takes to start a program.
fn patience(script: &str) -> Duration {
    match script.contains("sleep") {
        true => Duration::from_millis(500),
        false => Duration::from_secs(30),
    }
}

#[test]
fn an_unpacker_that_hangs_dies_or_talks_nonsense_is_an_error_and_leaves_nothing() {
    let (blobs, image, _) = three_layers();
    let world = World::new(blobs);
    for (script, named, fault) in [
        // Neither reads nor answers.
        ("exec sleep 1000", "was ended", Fault::Internal),
        // Reads all, then hangs.
        (
            "cat > /dev/null; exec sleep 1000",
            "was ended",
            Fault::Internal,
        ),
        // As the kernel does when memory is short.
        ("kill -9 $$", "out of memory", Fault::Internal),
        (
            "cat > /dev/null; kill -9 $$",
            "out of memory",
            Fault::Internal,
        ),
        // Memory that could not be had, and a program that could not be read.
        ("cat > /dev/null; kill -6 $$", "memory", Fault::Internal),
        ("cat > /dev/null; kill -7 $$", "was ended", Fault::Internal),
        // The confinement could not be made.
        ("exit 1", "exit status: 1", Fault::Internal),
        // Its fault is one of the layer that it was given.
        ("kill -11 $$", "crashed", Fault::BadImage),
        ("cat > /dev/null; kill -11 $$", "crashed", Fault::BadImage),
        (
            "cat > /dev/null; kill -24 $$",
            "more than any layer",
            Fault::BadImage,
        ),
        (
            "cat > /dev/null; kill -25 $$",
            "more than any layer",
            Fault::BadImage,
        ),
        ("cat > /dev/null; exit 101", "gave up", Fault::BadImage),
        (
            "cat > /dev/null; echo nonsense",
            "without an answer",
            Fault::BadImage,
        ),
        ("exit 0", "without an answer", Fault::BadImage),
    ] {
        let config = StoreConfig {
            unpacker: Some(unpacker(["-c", script], "exec gzip -dc", patience(script))),
            ..StoreConfig::default()
        };
        let store = Store::open_with(world.root.path(), config).unwrap();
        let begin = Instant::now();
        let error = world.stage(&store, image).unwrap_err();
        let text = chain(&error);
        assert!(begin.elapsed() < Duration::from_secs(10), "{script}");
        assert_eq!(error.fault(), fault, "{script}: {text}");
        assert_eq!(error.is_transient(), fault == Fault::Internal, "{script}");
        assert!(text.contains(named), "{script}: {text}");
        for name in ["tmp", "layers", "images"] {
            let left = fs::read_dir(world.root.path().join(name)).unwrap().count();
            assert_eq!(left, 0, "{script}: {name}");
        }
    }
    // What was fetched is still there.
    world.stage(&world.store(), image).unwrap();
}
