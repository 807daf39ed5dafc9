//! A device that has an old image fetches deltas of the new one where there are any, and whole layers where they are of no
//! use.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use foreshore_delta::image::{Image, make, tag};
use foreshore_images::delta::artifact::Artifact;
use foreshore_images::registry::RegistryConfig;
use foreshore_images::store::{StageError, StagedImage, Store, StoreConfig, Unpacker};
use foreshore_images::{Digest, Platform};
use serde_json::{Value, json};

use crate::compose::{Blobs, INDEX, Layer, digest};
use crate::hostile::{client_for, honest, reference};
use crate::server::{Reply, Request, Server, ok, status};

/// A registry with two versions of an image and the delta between them, and a device with the old one.
struct World {
    server: Server,
    served: Arc<Mutex<Served>>,
    store: Store,
    root: tempfile::TempDir,
    new: Digest,
    /// The blob that differs, and the delta for it.
    layer: Digest,
    delta: Digest,
}

struct Served {
    blobs: Blobs,
    subject: Digest,
    artifact: Digest,
    /// There is a referrers API; otherwise only the tag.
    api: bool,
    /// What is not served.
    gone: Option<Digest>,
}

impl Served {
    fn reply(&self, request: &Request) -> Reply {
        let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": [{
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": self.artifact, "size": self.blobs.0[&self.artifact].len(),
            "artifactType": "application/vnd.foreshore.delta.v1",
        }]});
        let listing = || ok(INDEX, index.to_string().into_bytes());
        let path = &request.path;
        if path.contains("/referrers/") {
            let asked = path.contains(&format!("/referrers/{}", self.subject));
            return if self.api && asked {
                listing()
            } else {
                status(404)
            };
        }
        if path.ends_with(&format!("/manifests/{}", tag(&self.subject))) {
            return if self.api { status(404) } else { listing() };
        }
        match self.gone {
            Some(gone) if path.ends_with(&gone.to_string()) => status(404),
            _ => honest(&self.blobs, request),
        }
    }

    /// Puts another delta in the place of the right one; its digest.
    fn replace(&mut self, bytes: Vec<u8>) -> Digest {
        let mut artifact = Artifact::parse(&self.blobs.0[&self.artifact]).unwrap();
        artifact.layers[0].digest = Digest::of(&bytes);
        artifact.layers[0].size = bytes.len() as u64;
        digest(&self.blobs.add("delta", bytes));
        self.artifact = digest(&self.blobs.add("artifact", artifact.to_json()));
        artifact.layers[0].digest
    }
}

fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(seed);
    (0..length).map(|_| random.u8(..)).collect()
}

impl World {
    fn new(unpacker: Option<Unpacker>) -> Self {
        let (base, program) = (noise(1, 50_000), noise(2, 700_000));
        let mut rebuilt = program.clone();
        rebuilt[300_000] ^= 1;
        rebuilt.splice(500_000..500_000, noise(3, 100));
        let base = Layer::gzip(&[("usr/lib/base.so", &base)]);
        let old = Layer::gzip(&[("bin/app", &program), ("etc/app.conf", b"a = 1\n")]);
        let new = Layer::gzip(&[("bin/app", &rebuilt), ("etc/app.conf", b"a = 2\n")]);
        let dir = tempfile::tempdir().unwrap();
        let mut blobs = Blobs::default();
        let mut image = |layer: &Layer, name: &str| {
            let image = blobs.image(("amd64", ""), &[base.clone(), layer.clone()]);
            blobs.write_layout(&dir.path().join(name), &image, name);
            let path = dir.path().join(name).display().to_string();
            let opened = Image::open(&path, &Platform::linux("amd64", "")).unwrap();
            (digest(&image), opened)
        };
        let (old_digest, old_image) = image(&old, "old");
        let (new_digest, new_image) = image(&new, "new");
        let layout = dir.path().join("deltas");
        let reports = make(&[old_image], &new_image, 12, &layout).unwrap();
        for entry in fs::read_dir(layout.join("blobs/sha256")).unwrap() {
            blobs.add("any", fs::read(entry.unwrap().path()).unwrap());
        }
        let artifact = reports[0].artifact.unwrap();
        let delta = Artifact::parse(&blobs.0[&artifact]).unwrap().layers[0].digest;
        let served = Arc::new(Mutex::new(Served {
            blobs,
            subject: new_digest,
            artifact,
            api: true,
            gone: None,
        }));
        let serving = Arc::clone(&served);
        let server = Server::start("127.0.0.1", move |request| {
            serving.lock().unwrap().reply(request)
        });
        let config = StoreConfig {
            keep_privileges: true,
            unpacker,
            ..StoreConfig::default()
        };
        let store = Store::open_with(&dir.path().join("store"), config).unwrap();
        let world = Self {
            server,
            served,
            store,
            root: dir,
            new: new_digest,
            layer: Digest::of(&new.blob),
            delta,
        };
        let staged = world.stage(&world.store, old_digest).unwrap();
        assert_eq!(staged.layers.len(), 2);
        assert_eq!(world.server.count("referrers"), 0, "nothing to lean on");
        world
    }

    fn stage(&self, store: &Store, image: Digest) -> Result<StagedImage, StageError> {
        let client = client_for(&self.server.host, RegistryConfig::default());
        let platform = Platform::linux("amd64", "");
        let reference = reference(&self.server, image);
        store.stage(&client, &reference, &platform, &mut |_| {})
    }

    /// Stages the new image, which then is as on a device that has nothing else.
    fn is_right(&self) {
        let staged = self.stage(&self.store, self.new).unwrap();
        let clean = Store::open_with(
            &self.root.path().join("clean"),
            StoreConfig {
                keep_privileges: true,
                ..StoreConfig::default()
            },
        )
        .unwrap();
        let served = self.fetched();
        let whole = self.stage(&clean, self.new).unwrap();
        // Directories that are in no layer have the time at which they were made.
        for part in ["bin/app", "etc/app.conf"] {
            let describe = |image: &StagedImage| {
                let path = image.layers[1].join(part);
                let meta = fs::symlink_metadata(&path).unwrap();
                let times = (meta.mtime(), meta.mtime_nsec());
                (fs::read(&path).unwrap(), meta.mode(), meta.uid(), times)
            };
            assert!(describe(&staged) == describe(&whole), "{part}");
        }
        // Nothing of what was begun stays.
        let left = fs::read_dir(self.root.path().join("store/partial"));
        assert_eq!(left.unwrap().count(), 0, "{served:?}");
    }

    /// How often the whole layer and the delta were asked for.
    fn fetched(&self) -> (usize, usize) {
        let count = |digest: &Digest| self.server.count(&format!("/blobs/{digest}"));
        (count(&self.layer), count(&self.delta))
    }
}

/// The example of this crate, which cargo builds with the tests.
fn other_process() -> Unpacker {
    let program = std::env::current_exe().unwrap();
    Unpacker {
        program: program.ancestors().nth(2).unwrap().join("examples/unpack"),
        arguments: Vec::new(),
        inflate: vec!["inflate".into()],
        rebuild: vec!["rebuild".into()],
        patience: Duration::from_mins(1),
    }
}

#[test]
fn a_device_with_the_old_image_fetches_the_delta() {
    for (api, unpacker) in [(true, None), (false, None), (true, Some(other_process()))] {
        let world = World::new(unpacker);
        world.served.lock().unwrap().api = api;
        let staged = world.stage(&world.store, world.new).unwrap();
        assert_eq!(staged.layers.len(), 2);
        assert_eq!(world.fetched(), (0, 1));
        world.is_right();
    }
}

#[test]
fn deltas_of_no_use_cost_their_size_once_and_the_layer_comes_whole() {
    for unpacker in [None, Some(other_process())] {
        let mut world = World::new(unpacker);
        let mut wrong = world.served.lock().unwrap().blobs.0[&world.delta].clone();
        let middle = wrong.len() / 2;
        wrong[middle] ^= 0x55;
        world.delta = world.served.lock().unwrap().replace(wrong);
        // The layer cannot be had either, for now.
        world.served.lock().unwrap().gone = Some(world.layer);
        let error = world.stage(&world.store, world.new).unwrap_err();
        assert!(matches!(error, StageError::Fetch(_)), "{error:?}");
        assert_eq!(world.fetched(), (1, 1));
        world.served.lock().unwrap().gone = None;
        world.stage(&world.store, world.new).unwrap();
        assert_eq!(world.fetched(), (2, 1));
        world.is_right();
    }
}

#[test]
fn a_delta_that_makes_another_layer_is_not_believed() {
    let mut world = World::new(None);
    let other = {
        let mut plan = Vec::new();
        let literal = foreshore_images::delta::format::Operation::Literal(&[0; 1024]);
        foreshore_images::delta::format::write(&mut plan, &literal);
        let block = u32::try_from(plan.len() << 3 | 1).unwrap().to_le_bytes();
        let length = |length: usize| u32::try_from(length).unwrap().to_le_bytes();
        let head = [length(plan.len()), length(plan.len() + 3)].concat();
        [
            &foreshore_images::delta::format::MAGIC[..],
            &head,
            &block[..3],
            &plan,
        ]
        .concat()
    };
    world.delta = world.served.lock().unwrap().replace(other);
    world.stage(&world.store, world.new).unwrap();
    assert_eq!(world.fetched(), (1, 1));
    world.is_right();
}

#[test]
fn a_device_that_is_told_not_to_asks_for_no_deltas() {
    let world = World::new(None);
    let config = StoreConfig {
        deltas: false,
        ..StoreConfig::default()
    };
    let store = Store::open_with(&world.root.path().join("store"), config).unwrap();
    world.stage(&store, world.new).unwrap();
    assert_eq!(world.fetched(), (1, 0));
    assert_eq!(world.server.count("referrers"), 0);
}

#[test]
fn an_old_file_that_is_damaged_here_costs_a_whole_layer() {
    let world = World::new(None);
    for entry in fs::read_dir(world.root.path().join("store/layers")).unwrap() {
        let app = entry.unwrap().path().join("bin/app");
        if app.exists() {
            let mut damaged = fs::read(&app).unwrap();
            damaged[1000] ^= 1;
            fs::write(&app, damaged).unwrap();
        }
    }
    world.stage(&world.store, world.new).unwrap();
    assert_eq!(world.fetched(), (1, 1));
    world.is_right();
}

#[test]
fn registries_that_lie_about_referrers_do_no_harm() {
    let lies: [Value; 4] = [
        json!([]),
        json!({"manifests": "none"}),
        json!({"manifests": [{"mediaType": 5}]}),
        json!({"manifests": vec![json!({
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": Digest::of(b"nowhere"), "size": 1,
            "artifactType": "application/vnd.foreshore.delta.v1",
        }); 200]}),
    ];
    for lie in lies {
        let world = World::new(None);
        let served = Arc::clone(&world.served);
        let server = Server::start("127.0.0.1", move |request| {
            if request.path.contains("/referrers/") {
                return ok(INDEX, lie.to_string().into_bytes());
            }
            served.lock().unwrap().reply(request)
        });
        let world = World { server, ..world };
        world.stage(&world.store, world.new).unwrap();
        assert_eq!(world.fetched(), (1, 0));
        assert!(world.server.count("manifests") < 10);
    }
}
