//! From a real registry to a tree: the same tree that `umoci` makes.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};

use foreshore_images::registry::{Client, ClientConfig, Credentials, RegistryConfig};
use foreshore_images::store::{Store, StoreConfig, Unpacker};
use foreshore_images::{Digest, Fault, Platform, Reference};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::bed::{
    Mount, PASSWORD, Protection, Registry, TIMEOUTS, USER, client, run, text, wait_for,
};
use crate::compose::{Blobs, LAYER, Layer, digest};
use crate::tree::assert_same;

/// An image in a layout, built step by step by `umoci`, each step a layer.
struct Umoci {
    dir: TempDir,
}

impl Umoci {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let umoci = Self { dir };
        run("umoci", &["init", "--layout", text(&umoci.layout())]);
        run("umoci", &["new", "--image", &umoci.image("v1")]);
        umoci
    }

    fn layout(&self) -> PathBuf {
        self.dir.path().join("layout")
    }

    fn image(&self, tag: &str) -> String {
        format!("{}:{tag}", self.layout().display())
    }

    /// Unpacks, changes and repacks: one more layer.
    fn layer(&self, change: impl FnOnce(&Path)) {
        let bundle = tempfile::tempdir_in(self.dir.path()).unwrap();
        let path = bundle.path().join("b");
        run(
            "umoci",
            &["unpack", "--image", &self.image("v1"), text(&path)],
        );
        change(&path.join("rootfs"));
        run(
            "umoci",
            &["repack", "--image", &self.image("v1"), text(&path)],
        );
    }

    /// Adds a layer that is a given tar.
    fn raw_layer(&self, tar: &[u8]) {
        let path = self.dir.path().join("layer.tar");
        fs::write(&path, tar).unwrap();
        run(
            "umoci",
            &[
                "raw",
                "add-layer",
                "--image",
                &self.image("v1"),
                text(&path),
            ],
        );
    }

    fn unpack(&self) -> PathBuf {
        let path = self.dir.path().join("unpacked");
        run(
            "umoci",
            &["unpack", "--image", &self.image("v1"), text(&path)],
        );
        path.join("rootfs")
    }

    /// The same image with other compressions: the blobs of a layout that `umoci` itself cannot read.
    fn recompressed(&self, program: &str, args: &[&str], media_type: &str) -> (Blobs, Value) {
        let read =
            |digest: &str| fs::read(self.layout().join("blobs/sha256").join(&digest[7..])).unwrap();
        let index: Value =
            serde_json::from_slice(&fs::read(self.layout().join("index.json")).unwrap()).unwrap();
        let mut manifest: Value =
            serde_json::from_slice(&read(index["manifests"][0]["digest"].as_str().unwrap()))
                .unwrap();
        let mut blobs = Blobs::default();
        let config = read(manifest["config"]["digest"].as_str().unwrap());
        manifest["config"] = blobs.add("application/vnd.oci.image.config.v1+json", config);
        for layer in manifest["layers"].as_array_mut().unwrap() {
            let mut tar = Vec::new();
            let gzip = read(layer["digest"].as_str().unwrap());
            std::io::Read::read_to_end(&mut flate2::read::MultiGzDecoder::new(&gzip[..]), &mut tar)
                .unwrap();
            let path = self.dir.path().join("recompress");
            fs::write(&path, tar).unwrap();
            let output = std::process::Command::new(program).args(args).arg(&path).output().unwrap_or_else(|error| {
                panic!("cannot run {program}: {error}; install it, or run cargo xtask test, which does")
            });
            assert!(output.status.success());
            *layer = blobs.add(media_type, output.stdout);
        }
        let manifest = blobs.add(
            "application/vnd.oci.image.manifest.v1+json",
            manifest.to_string().into_bytes(),
        );
        (blobs, manifest)
    }
}

/// Three layers with everything a real image has.
fn rich() -> Umoci {
    let umoci = Umoci::new();
    umoci.layer(|root| {
        for dir in [
            "bin",
            "etc/deep/deeper",
            "usr/lib",
            "var/cache/old",
            "tmp",
            "home/app",
        ] {
            fs::create_dir_all(root.join(dir)).unwrap();
        }
        fs::set_permissions(root.join("tmp"), fs::Permissions::from_mode(0o1777)).unwrap();
        fs::set_permissions(root.join("home/app"), fs::Permissions::from_mode(0o700)).unwrap();
        chown(root.join("home/app"), Some(1000), Some(1000)).unwrap();
        fs::write(root.join("bin/tool"), vec![7; 300_000]).unwrap();
        fs::set_permissions(root.join("bin/tool"), fs::Permissions::from_mode(0o4755)).unwrap();
        fs::hard_link(root.join("bin/tool"), root.join("bin/alias")).unwrap();
        fs::hard_link(root.join("bin/tool"), root.join("usr/lib/tool")).unwrap();
        symlink("usr/lib", root.join("lib")).unwrap();
        symlink("/etc/nowhere", root.join("etc/dangling")).unwrap();
        for name in [
            "etc/kept",
            "etc/removed",
            "etc/deep/x",
            "etc/deep/deeper/y",
            "var/cache/old/z",
            "etc/a b\nc",
        ] {
            fs::write(root.join(name), name).unwrap();
        }
        let long = format!("etc/{}", "long-".repeat(40));
        fs::write(root.join(long), "long name").unwrap();
        run("mkfifo", &["-m", "0640", text(&root.join("var/pipe"))]);
    });
    umoci.layer(|root| {
        fs::remove_file(root.join("etc/removed")).unwrap();
        fs::remove_dir_all(root.join("etc/deep")).unwrap();
        fs::remove_dir_all(root.join("var/cache/old")).unwrap();
        fs::write(root.join("var/cache/old"), "a file where a directory was").unwrap();
        fs::remove_file(root.join("etc/kept")).unwrap();
        fs::create_dir(root.join("etc/kept")).unwrap();
        fs::write(root.join("etc/kept/inside"), "a directory where a file was").unwrap();
        fs::hard_link(root.join("bin/tool"), root.join("bin/third")).unwrap();
        fs::set_permissions(root.join("home/app"), fs::Permissions::from_mode(0o750)).unwrap();
    });
    umoci.layer(|root| {
        fs::create_dir_all(root.join("etc/deep")).unwrap();
        fs::write(
            root.join("etc/deep/new"),
            "back again, without what was in it",
        )
        .unwrap();
    });
    umoci
}

/// Stages an image of the registry, unpacked by this process and by another, which makes the same tree, and mounts it.
fn mounted(registry: &Registry, name: &str, dir: &Path) -> Mount {
    let client = client(&registry.host, None);
    let tagged: Reference = format!("{}/{name}", registry.host).parse().unwrap();
    let pinned = tagged.with_digest(client.resolve(&tagged).unwrap());
    let stage = |name: &str, unpacker| {
        let config = StoreConfig {
            keep_privileges: true,
            unpacker,
            ..StoreConfig::default()
        };
        let store = Store::open_with(&dir.join(name), config).unwrap();
        let staged = store
            .stage(&client, &pinned, &Platform::host(), &mut |_| {})
            .unwrap();
        Mount::overlay(&staged.layers, &dir.join(format!("{name}-merged")))
    };
    // Next to the test's own program: cargo builds the examples with the tests.
    let program = std::env::current_exe().unwrap();
    let other = Unpacker {
        program: program.ancestors().nth(2).unwrap().join("examples/unpack"),
        arguments: Vec::new(),
        inflate: vec!["inflate".into()],
        rebuild: vec!["rebuild".into()],
        patience: std::time::Duration::from_mins(1),
    };
    let here = stage("here", None);
    let there = stage("there", Some(other));
    assert_same(&there.0, &here.0);
    here
}

#[test]
fn the_tree_is_the_one_umoci_makes() {
    let registry = Registry::start(&Protection::None);
    let umoci = rich();
    let expected = umoci.unpack();
    registry.push(&umoci.layout(), "v1", "rich:gzip");
    let dir = tempfile::tempdir().unwrap();
    let merged = mounted(&registry, "rich:gzip", dir.path());
    assert_same(&merged.0, &expected);
}

#[test]
fn zstd_and_plain_layers_give_the_same_tree() {
    let registry = Registry::start(&Protection::None);
    let umoci = rich();
    let expected = umoci.unpack();
    let zstd = format!("{LAYER}+zstd");
    let cases: [(&str, &str, &[&str], &str); 3] = [
        ("zstd", "zstd", &["-q", "-c", "-T2", "-B1MiB"], &zstd),
        ("zstd-19", "zstd", &["-q", "-c", "-19", "--long=27"], &zstd),
        ("plain", "cat", &[], LAYER),
    ];
    for (tag, program, args, media_type) in cases {
        let (blobs, manifest) = umoci.recompressed(program, args, media_type);
        let dir = tempfile::tempdir().unwrap();
        blobs.write_layout(&dir.path().join("layout"), &manifest, tag);
        registry.push(&dir.path().join("layout"), tag, &format!("rich:{tag}"));
        let merged = mounted(&registry, &format!("rich:{tag}"), dir.path());
        assert_same(&merged.0, &expected);
    }
}

/// Layers as other builders write them: no entries for directories they pass through, opaque directories, hard
/// links to files of a layer below, entries behind links of a layer below.
#[test]
fn layers_that_lean_on_others_give_umoci_s_tree() {
    fn entry(kind: tar::EntryType, path: &str, link: &str, mode: u32, body: &str) -> Vec<u8> {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(5);
        header.set_gid(6);
        header.set_mtime(1_234_567_890);
        header.set_size(body.len() as u64);
        header.set_path(path).unwrap();
        if !link.is_empty() {
            header.set_link_name(link).unwrap();
        }
        header.set_cksum();
        let mut out = header.as_bytes().to_vec();
        out.extend_from_slice(body.as_bytes());
        out.resize(out.len().next_multiple_of(512), 0);
        out
    }
    use tar::EntryType::{Directory, Link, Regular, Symlink};
    let end = vec![0; 1024];
    let umoci = Umoci::new();
    umoci.raw_layer(
        &[
            entry(Directory, "./", "", 0o751, ""),
            entry(Directory, "private", "", 0o700, ""),
            entry(Regular, "private/old", "", 0o600, "old"),
            entry(Directory, "opaque", "", 0o755, ""),
            entry(Regular, "opaque/hidden", "", 0o600, "x"),
            entry(Directory, "usr", "", 0o755, ""),
            entry(Directory, "usr/lib", "", 0o711, ""),
            entry(Regular, "usr/lib/real", "", 0o4711, "real"),
            entry(Symlink, "lib", "usr/lib", 0o777, ""),
            end.clone(),
        ]
        .concat(),
    );
    umoci.raw_layer(
        &[
            entry(Regular, "private/new", "", 0o640, "new"),
            entry(Regular, "lib/through-link", "", 0o644, "through"),
            entry(Regular, "opaque/.wh..wh..opq", "", 0o644, ""),
            entry(Regular, "opaque/shown", "", 0o644, "shown"),
            entry(Link, "usr/lib/linked", "usr/lib/real", 0o644, ""),
            end,
        ]
        .concat(),
    );
    let expected = umoci.unpack();
    let registry = Registry::start(&Protection::None);
    registry.push(&umoci.layout(), "v1", "lean:v1");
    let dir = tempfile::tempdir().unwrap();
    let merged = mounted(&registry, "lean:v1", dir.path());
    assert_same(&merged.0, &expected);
}

#[test]
fn an_index_gives_each_platform_its_own() {
    let registry = Registry::start(&Protection::None);
    let dir = tempfile::tempdir().unwrap();
    let mut blobs = Blobs::default();
    let variants: Vec<Value> = [("amd64", ""), ("arm64", "v8"), ("arm", "v6"), ("arm", "v7")]
        .into_iter()
        .map(|(architecture, variant)| {
            let who = format!("{architecture}{variant}");
            blobs.image(
                (architecture, variant),
                &[Layer::gzip(&[("who", who.as_bytes())])],
            )
        })
        .collect();
    let index = blobs.index(&variants);
    blobs.write_layout(&dir.path().join("layout"), &index, "v1");
    registry.push(&dir.path().join("layout"), "v1", "multi:v1");

    let client = client(&registry.host, None);
    let tagged: Reference = format!("{}/multi:v1", registry.host).parse().unwrap();
    let resolved = client.resolve(&tagged).unwrap();
    assert_eq!(resolved, digest(&index), "the index, not a variant");
    let pinned = tagged.with_digest(resolved);
    for (platform, who) in [
        ("linux/amd64", "amd64"),
        ("linux/arm64", "arm64v8"),
        ("linux/arm64/v8", "arm64v8"),
        ("linux/arm/v7", "armv7"),
        ("linux/arm/v6", "armv6"),
    ] {
        let store = Store::open(&dir.path().join(who)).unwrap();
        let staged = store
            .stage(&client, &pinned, &platform.parse().unwrap(), &mut |_| {})
            .unwrap();
        assert_eq!(
            fs::read_to_string(staged.layers[0].join("who")).unwrap(),
            who,
            "{platform}"
        );
        assert_eq!(staged.digest, resolved);
    }
    let store = Store::open(&dir.path().join("none")).unwrap();
    let error = store
        .stage(
            &client,
            &pinned,
            &Platform::linux("riscv64", ""),
            &mut |_| {},
        )
        .unwrap_err();
    assert_eq!(error.fault(), Fault::NoMatchingPlatform);
}

#[test]
fn a_registry_with_passwords() {
    let registry = Registry::start(&Protection::Password);
    let dir = tempfile::tempdir().unwrap();
    let mut blobs = Blobs::default();
    let image = blobs.image(("amd64", ""), &[Layer::gzip(&[("private", b"yes")])]);
    blobs.write_layout(&dir.path().join("layout"), &image, "v1");
    registry.push(&dir.path().join("layout"), "v1", "private/app:v1");

    let reference: Reference = format!("{}/private/app:v1", registry.host).parse().unwrap();
    let with = |credentials| client(&registry.host, credentials).resolve(&reference);
    assert_eq!(
        with(Some(Credentials::new(USER, PASSWORD))).unwrap(),
        digest(&image)
    );
    for wrong in [None, Some(Credentials::new(USER, "wrong-password"))] {
        let error = with(wrong).unwrap_err();
        assert_eq!(error.fault(), Fault::NotFound);
        let text = error.to_string();
        assert!(
            text.contains(&registry.host) && text.contains("private/app:v1"),
            "{text}"
        );
        assert!(!text.contains("wrong-password"), "{text}");
    }
    let client = client(&registry.host, Some(Credentials::new(USER, PASSWORD)));
    let store = Store::open(&dir.path().join("store")).unwrap();
    let pinned = reference.with_digest(digest(&image));
    store
        .stage(&client, &pinned, &Platform::linux("amd64", ""), &mut |_| {})
        .unwrap();
}

#[test]
fn what_the_registry_does_not_have() {
    let registry = Registry::start(&Protection::None);
    let client = client(&registry.host, None);
    let tag: Reference = format!("{}/nobody/here:v9", registry.host).parse().unwrap();
    for reference in [tag.clone(), tag.with_digest(Digest::of(b"nothing"))] {
        let error = client.resolve(&reference).unwrap_err();
        assert_eq!(error.fault(), Fault::NotFound);
        assert!(!error.is_transient());
        assert!(error.to_string().contains("nobody/here"), "{error}");
    }
}

#[test]
fn docker_s_own_media_types() {
    let registry = Registry::start(&Protection::None);
    let dir = tempfile::tempdir().unwrap();
    let mut blobs = Blobs::default();
    let layer = Layer::gzip(&[("docker", b"schema 2")]);
    let config = json!({"os": "linux", "architecture": "amd64", "config": {"Cmd": ["/x"]},
                        "rootfs": {"type": "layers", "diff_ids": [layer.diff_id]}});
    let config = blobs.add(
        "application/vnd.oci.image.config.v1+json",
        config.to_string().into_bytes(),
    );
    let layers = [blobs.add(&layer.media_type, layer.blob.clone())];
    let manifest = json!({"schemaVersion": 2, "mediaType": crate::compose::MANIFEST, "config": config, "layers": layers});
    let manifest = blobs.add(crate::compose::MANIFEST, manifest.to_string().into_bytes());
    blobs.write_layout(&dir.path().join("layout"), &manifest, "v1");
    let source = format!("oci:{}:v1", dir.path().join("layout").display());
    let target = format!("docker://{}/docker:v1", registry.host);
    run(
        "skopeo",
        &[
            "--insecure-policy",
            "copy",
            "--quiet",
            "--format",
            "v2s2",
            "--dest-tls-verify=false",
            &source,
            &target,
        ],
    );
    let client = client(&registry.host, None);
    let tagged: Reference = format!("{}/docker:v1", registry.host).parse().unwrap();
    let raw = client.manifest(&tagged).unwrap();
    assert_eq!(
        raw.media_type,
        "application/vnd.docker.distribution.manifest.v2+json"
    );
    let store = Store::open(&dir.path().join("store")).unwrap();
    let staged = store
        .stage(
            &client,
            &tagged.with_digest(raw.digest),
            &Platform::linux("amd64", ""),
            &mut |_| {},
        )
        .unwrap();
    assert_eq!(staged.config.cmd, ["/x"]);
}

/// A certificate authority and a certificate for 127.0.0.1, as files.
fn certificates(dir: &Path) {
    let at = |name: &str| dir.join(name).to_str().unwrap().to_owned();
    let key = [
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-days",
        "2",
    ];
    let (ca, ca_key, cert, cert_key) = (at("ca.pem"), at("ca.key"), at("cert.pem"), at("key.pem"));
    let (request, extensions) = (at("request"), at("extensions"));
    fs::write(
        &extensions,
        "subjectAltName=IP:127.0.0.1\nbasicConstraints=CA:FALSE\n",
    )
    .unwrap();
    run(
        "openssl",
        &[
            &["req", "-x509"][..],
            &key,
            &["-subj", "/CN=test CA", "-keyout", &ca_key, "-out", &ca],
        ]
        .concat(),
    );
    run(
        "openssl",
        &[
            &["req"][..],
            &key[..5],
            &[
                "-subj",
                "/CN=registry",
                "-keyout",
                &cert_key,
                "-out",
                &request,
            ],
        ]
        .concat(),
    );
    run(
        "openssl",
        &[
            "x509",
            "-req",
            "-in",
            &request,
            "-CA",
            &ca,
            "-CAkey",
            &ca_key,
            "-CAcreateserial",
            "-days",
            "2",
            "-extfile",
            &extensions,
            "-out",
            &cert,
        ],
    );
}

#[test]
fn a_registry_with_a_certificate_of_our_own() {
    let dir = tempfile::tempdir().unwrap();
    certificates(dir.path());
    let registry = Registry::start(&Protection::Tls(dir.path()));
    let mut blobs = Blobs::default();
    let image = blobs.image(("amd64", ""), &[Layer::gzip(&[("tls", b"yes")])]);
    blobs.write_layout(&dir.path().join("layout"), &image, "v1");
    registry.push(&dir.path().join("layout"), "v1", "app:v1");
    let reference: Reference = format!("{}/app:v1", registry.host).parse().unwrap();
    let with = |config: RegistryConfig| {
        let registries = [(registry.host.clone(), config)].into();
        Client::new(ClientConfig {
            registries,
            timeouts: TIMEOUTS,
            ..ClientConfig::default()
        })
        .unwrap()
    };
    let trusting = RegistryConfig {
        ca_file: Some(dir.path().join("ca.pem")),
        ..RegistryConfig::default()
    };
    let client = with(trusting);
    let pinned = reference.with_digest(client.resolve(&reference).unwrap());
    let store = Store::open(&dir.path().join("store")).unwrap();
    store
        .stage(&client, &pinned, &Platform::linux("amd64", ""), &mut |_| {})
        .unwrap();

    let error = with(RegistryConfig::default())
        .resolve(&reference)
        .unwrap_err();
    assert_eq!(error.fault(), Fault::Unreachable);
    assert!(error.to_string().contains("certificate"), "{error}");
    let plain = with(RegistryConfig {
        plain_http: true,
        ..RegistryConfig::default()
    });
    assert!(plain.resolve(&reference).is_err(), "HTTP to an HTTPS port");
}

/// Kills a staging at many moments; the store is always whole, and the next staging finishes the job.
#[test]
fn a_staging_may_be_killed_at_any_moment() {
    let registry = Registry::start(&Protection::None);
    let umoci = rich();
    let expected = umoci.unpack();
    registry.push(&umoci.layout(), "v1", "rich:v1");
    let tagged: Reference = format!("{}/rich:v1", registry.host).parse().unwrap();
    let client = client(&registry.host, None);
    let pinned = tagged.with_digest(client.resolve(&tagged).unwrap());
    // Next to the test's own program: cargo builds the examples with the tests.
    let program = std::env::current_exe().unwrap();
    let program = program
        .parent()
        .and_then(Path::parent)
        .unwrap()
        .join("examples/stage");
    let dir = tempfile::tempdir().unwrap();
    let mut killed = 0;
    for milliseconds in (2..60).step_by(2) {
        let root = dir.path().join(format!("store-{milliseconds}"));
        let start = || {
            std::process::Command::new(&program)
                .args([text(&root), &pinned.to_string()])
                .stdout(std::process::Stdio::null())
                .stderr(std::process::Stdio::null())
                .spawn()
                .unwrap()
        };
        let mut child = start();
        // Not a wait for a condition: it is the moment that is tried.
        std::thread::sleep(std::time::Duration::from_millis(milliseconds));
        child.kill().unwrap();
        let finished = child.wait().unwrap().success();
        killed += usize::from(!finished);
        let store = Store::open(&root).unwrap();
        assert_eq!(fs::read_dir(root.join("tmp")).unwrap().count(), 0, "swept");
        let staged = match store.staged(&pinned.digest().unwrap()) {
            Some(staged) => staged,
            None => {
                let mut child = start();
                wait_for("the second staging", || child.try_wait().unwrap().is_some());
                store.staged(&pinned.digest().unwrap()).unwrap()
            }
        };
        let merged = Mount::overlay(
            &staged.layers,
            &dir.path().join(format!("merged-{milliseconds}")),
        );
        assert_same(&merged.0, &expected);
    }
    assert!(killed > 0, "no kill came in time; the moments are wrong");
}
