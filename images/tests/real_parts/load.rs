//! Side-loading: what `skopeo` writes becomes an image that starts without any registry, and stays.

use std::fs::{self, File};
use std::io::{self, Read, Write as _};
use std::time::Duration;

use foreshore_images::registry::RegistryConfig;
use foreshore_images::store::{Archive, LoadError, LoadedImage, Store, StoreConfig};
use foreshore_images::{Digest, Fault, Platform, Reference};

use crate::bed::{Mount, run, text, unless_busy, wait_for};
use crate::compose::{Blobs, Layer, digest};
use crate::hostile::{chain, client_for, honest, reference};
use crate::server::Server;

const AMD64: (&str, &str) = ("amd64", "");

fn layers() -> [Layer; 3] {
    let shared = Layer::gzip(&[("shared", b"by both")]);
    let twice = Layer::gzip(&[("twice", b"again")]);
    [shared, twice.clone(), twice]
}

/// An OCI layout with an index for two platforms.
fn layout(dir: &std::path::Path) -> Digest {
    let mut blobs = Blobs::default();
    let variants = [
        blobs.image(AMD64, &layers()),
        blobs.image(("arm", "v7"), &layers()[..1]),
    ];
    let index = blobs.index(&variants);
    blobs.write_layout(dir, &index, "app:v1");
    digest(&index)
}

fn load(store: &Store, archive: Archive<'_>) -> Result<Vec<LoadedImage>, LoadError> {
    store.load(archive, &Platform::linux("amd64", ""), &mut |_| {})
}

/// Nobody can be asked: the reference's registry is no host.
fn assert_starts(store: &Store, image: Digest) {
    let client = client_for("registry.invalid", RegistryConfig::default());
    let reference: Reference = format!("registry.invalid/app@{image}").parse().unwrap();
    let platform = Platform::linux("amd64", "");
    let staged = store
        .stage(&client, &reference, &platform, &mut |_| {})
        .unwrap();
    let top = staged.layers.last().unwrap();
    assert_eq!(fs::read_to_string(top.join("twice")).unwrap(), "again");
}

#[test]
fn every_form_of_archive_becomes_an_image_that_needs_no_registry() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("layout");
    let index = layout(&path);
    let oci = dir.path().join("app.oci.tar");
    let docker = dir.path().join("app.docker.tar");
    for to in [
        format!("oci-archive:{}:app:v1", text(&oci)),
        format!("docker-archive:{}:app:v1", text(&docker)),
    ] {
        let from = format!("oci:{}:app:v1", text(&path));
        run("skopeo", &["--override-arch", "amd64", "copy", &from, &to]);
    }
    for (name, archive) in [("layout", &path), ("oci", &oci), ("docker", &docker)] {
        let root = tempfile::tempdir().unwrap();
        let store = Store::open(root.path()).unwrap();
        let loaded = load(&store, Archive::Path(archive)).unwrap();
        assert_eq!(loaded.len(), 1, "{name}");
        assert!(loaded[0].name.as_deref().unwrap().contains("v1"), "{name}");
        let image = loaded[0].image.digest;
        if name == "layout" {
            assert_eq!(image, index, "an index keeps its digest");
        }
        assert_starts(&store, image);
        // Loaded again: nothing to do. From a stream: the same.
        let mut file = archive.is_file().then(|| File::open(archive).unwrap());
        let again = match &mut file {
            Some(file) => load(&store, Archive::Stream(file)).unwrap(),
            None => load(&store, Archive::Path(archive)).unwrap(),
        };
        assert_eq!(again, loaded, "{name}");
        // It stays until somebody says so.
        unless_busy(|| store.remove_unused(&[].into()));
        assert_starts(&store, image);
        assert!(store.unpin(&image).unwrap());
        unless_busy(|| store.remove_unused(&[].into()));
        assert_eq!(store.staged(&image), None);
        let left = fs::read_dir(root.path().join("layers")).unwrap().count();
        assert_eq!(left, 0, "{name}");
        let left = fs::read_dir(root.path().join("tmp")).unwrap().count();
        assert_eq!(left, 0, "{name}");
    }
}

#[test]
fn what_cannot_be_loaded_is_named_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("layout");
    layout(&path);
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path()).unwrap();
    // For another machine.
    let error = store
        .load(
            Archive::Path(&path),
            &Platform::linux("riscv64", ""),
            &mut |_| {},
        )
        .unwrap_err();
    assert_eq!(
        error.fault(),
        Fault::NoMatchingPlatform,
        "{}",
        chain(&error)
    );
    assert!(chain(&error).contains("linux/arm/v7"), "{}", chain(&error));
    // No archive, half an archive, a layer that is not what its digest says.
    let whole = dir.path().join("whole.tar");
    run(
        "skopeo",
        &[
            "copy",
            &format!("oci:{}:app:v1", text(&path)),
            &format!("oci-archive:{}:app:v1", text(&whole)),
        ],
    );
    let bytes = fs::read(&whole).unwrap();
    let layer = path
        .join("blobs/sha256")
        .join(Digest::of(&layers()[0].blob).hex());
    let mut spoiled = fs::read(&layer).unwrap();
    let middle = spoiled.len() / 2;
    spoiled[middle] ^= 1;
    fs::write(&layer, spoiled).unwrap();
    for (name, mut archive) in [
        ("nothing", &b""[..]),
        ("no archive", &b"hello, world"[..]),
        ("half of one", &bytes[..bytes.len() / 2]),
    ] {
        let error = load(&store, Archive::Stream(&mut archive)).unwrap_err();
        assert_eq!(error.fault(), Fault::BadImage, "{name}: {}", chain(&error));
    }
    let error = load(&store, Archive::Path(&path)).unwrap_err();
    assert_eq!(error.fault(), Fault::DigestMismatch, "{}", chain(&error));
    let error = load(&store, Archive::Path(&dir.path().join("nothing"))).unwrap_err();
    assert!(chain(&error).contains("nothing"), "{}", chain(&error));
    for name in ["tmp", "loading", "images", "layers", "pins", "partial"] {
        let left = fs::read_dir(root.path().join(name)).unwrap().count();
        assert_eq!(left, 0, "{name}");
    }
}

/// Whoever types an archive in slowly keeps nobody waiting.
#[test]
fn a_load_from_a_silent_stream_holds_nobody_up() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("layout");
    layout(&path);
    let archive = dir.path().join("app.tar");
    let to = format!("oci-archive:{}:app:v1", text(&archive));
    let from = format!("oci:{}:app:v1", text(&path));
    run("skopeo", &["--override-arch", "amd64", "copy", &from, &to]);
    let archive = fs::read(&archive).unwrap();

    let mut blobs = Blobs::default();
    let pulled = digest(&blobs.image(AMD64, &[Layer::gzip(&[("pulled", b"meanwhile")])]));
    let server = Server::start("127.0.0.1", move |request| honest(&blobs, request));
    let client = client_for(&server.host, RegistryConfig::default());
    let root = tempfile::tempdir().unwrap();
    let open = || {
        let config = StoreConfig {
            lock_wait: Duration::from_secs(2),
            ..StoreConfig::default()
        };
        Store::open_with(root.path(), config).unwrap()
    };
    let loading = || fs::read_dir(root.path().join("loading")).map_or(0, Iterator::count);
    let (mut reader, mut writer) = io::pipe().unwrap();
    std::thread::scope(|scope| {
        let load = scope.spawn(|| load(&open(), Archive::Stream(&mut reader)));
        let (first, rest) = archive.split_at(archive.len() / 2);
        writer.write_all(first).unwrap();
        wait_for("it to begin", || loading() == 1);
        let store = open();
        let platform = Platform::linux("amd64", "");
        let reference = reference(&server, pulled);
        store
            .stage(&client, &reference, &platform, &mut |_| {})
            .unwrap();
        assert_eq!(store.list().unwrap().len(), 1);
        unless_busy(|| store.remove_unused(&[pulled].into()));
        assert_eq!(loading(), 1, "what is being read is nobody's to sweep");
        assert!(!load.is_finished());
        writer.write_all(rest).unwrap();
        drop(writer);
        assert_eq!(load.join().unwrap().unwrap().len(), 1);
    });
    assert_eq!(open().list().unwrap().len(), 2);
    assert_eq!(loading(), 0);
    // What somebody left who was killed goes with the next who comes.
    fs::create_dir_all(root.path().join("loading/load-x/tmp")).unwrap();
    // Unless a process that another test starts still has the lock.
    wait_for("the sweep", || {
        open();
        loading() == 0
    });
}

/// An archive is given up before it touches what is to stay free.
#[test]
fn an_archive_that_grows_into_the_reserve_is_given_up() {
    let dir = tempfile::tempdir().unwrap();
    let mount = Mount::new("tmpfs", "size=8m", &dir.path().join("small"));
    let config = StoreConfig {
        reserve_bytes: Some(2 << 20),
        ..StoreConfig::default()
    };
    let store = Store::open_with(&mount.0.join("store"), config).unwrap();
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(5 << 20);
    tar.append_data(&mut header, "first", &vec![1; 5 << 20][..])
        .unwrap();
    let archive = tar.into_inner().unwrap();
    // Somebody else takes room while it is read.
    struct Taking<'a>(&'a [u8], &'a std::path::Path);
    impl Read for Taking<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let count = self.0.read(buffer)?;
            if self.0.len() < 3 << 20 && !self.1.exists() {
                fs::write(self.1, vec![0; 3 << 20])?;
            }
            Ok(count)
        }
    }
    let theirs = mount.0.join("theirs");
    let error = load(&store, Archive::Stream(&mut Taking(&archive, &theirs))).unwrap_err();
    assert_eq!(error.fault(), Fault::DiskFull, "{}", chain(&error));
    let left = fs::read_dir(mount.0.join("store/loading")).unwrap().count();
    assert_eq!(left, 0);
}
