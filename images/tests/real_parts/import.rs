//! Import of what `skopeo` writes, and of archives that are not what they should be.

use std::fs;
use std::io::Read;
use std::path::Path;

use foreshore_images::blobs::BlobDir;
use foreshore_images::layout::{
    ImportError, ImportLimits, ImportedImage, import_archive, import_path,
};
use foreshore_images::manifest::{Document, Manifest};
use foreshore_images::{Digest, Fault, Platform};
use serde_json::json;
use tempfile::TempDir;

use crate::bed::{run, text};
use crate::compose::{Blobs, Layer, digest, gzip, tar};

struct World {
    dir: TempDir,
    blobs: BlobDir,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let blobs = BlobDir::open(&dir.path().join("hub")).unwrap();
        Self { dir, blobs }
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join(name)
    }

    fn archive(&self, bytes: &[u8]) -> Result<Vec<ImportedImage>, ImportError> {
        let result = import_archive(&mut &bytes[..], &self.blobs, &ImportLimits::default());
        assert_eq!(
            fs::read_dir(self.path("hub/tmp")).unwrap().count(),
            0,
            "nothing is left behind"
        );
        if result.is_err() {
            assert_eq!(
                self.blobs.list().unwrap().len(),
                0,
                "nothing of a bad archive stays"
            );
        }
        result
    }

    fn assert_whole(&self, image: &ImportedImage) {
        let mut total = 0;
        for blob in &image.blobs {
            let size = self.blobs.size(blob).unwrap();
            assert!(self.blobs.verify(blob, size).unwrap());
            total += size;
        }
        assert_eq!(image.size_bytes, total);
        assert!(image.blobs.contains(&image.digest));
    }

    fn manifest(&self, digest: &Digest) -> Manifest {
        let bytes = self.blobs.read(digest, 1 << 20).unwrap().unwrap();
        match Document::parse(&bytes, None).unwrap() {
            Document::Manifest(manifest) => manifest,
            Document::Index(_) => panic!("an index"),
        }
    }
}

fn two_platforms(dir: &Path) -> (Blobs, Digest) {
    let mut blobs = Blobs::default();
    let shared = Layer::gzip(&[("shared", b"by both")]);
    let variants = [
        blobs.image(
            ("amd64", ""),
            &[shared.clone(), Layer::plain(&[("a", b"amd64")])],
        ),
        blobs.image(("arm", "v7"), &[shared, Layer::gzip(&[("a", b"arm")])]),
    ];
    let index = blobs.index(&variants);
    blobs.write_layout(dir, &index, "demo:v1");
    (blobs, digest(&index))
}

fn tar_of(dir: &Path) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    builder.append_dir_all(".", dir).unwrap();
    builder.into_inner().unwrap()
}

#[test]
fn a_layout_comes_in_as_directory_archive_and_compressed_archive() {
    let world = World::new();
    let (_, index) = two_platforms(&world.path("layout"));
    let archive = tar_of(&world.path("layout"));
    fs::write(world.path("archive.tar"), &archive).unwrap();
    let directory = import_path(
        &world.path("layout"),
        &world.blobs,
        &ImportLimits::default(),
    )
    .unwrap();
    assert_eq!(directory.len(), 1);
    assert_eq!(directory[0].digest, index);
    assert_eq!(directory[0].name.as_deref(), Some("demo:v1"));
    assert_eq!(
        directory[0].platforms,
        [Platform::linux("amd64", ""), Platform::linux("arm", "v7")]
    );
    assert_eq!(
        directory[0].blobs.len(),
        1 + 2 * 2 + 3,
        "index, manifests, configs, layers"
    );
    world.assert_whole(&directory[0]);
    assert_eq!(
        import_path(
            &world.path("archive.tar"),
            &world.blobs,
            &ImportLimits::default()
        )
        .unwrap(),
        directory
    );
    for bytes in [archive.clone(), gzip(&archive)] {
        let fresh = World::new();
        assert_eq!(fresh.archive(&bytes).unwrap(), directory);
        fresh.assert_whole(&directory[0]);
        assert_eq!(
            fresh.archive(&bytes).unwrap(),
            directory,
            "again changes nothing"
        );
    }
}

#[test]
fn a_docker_archive_becomes_an_oci_image() {
    let world = World::new();
    let mut blobs = Blobs::default();
    let layers = [Layer::gzip(&[("one", b"1")]), Layer::gzip(&[("two", b"2")])];
    let image = blobs.image(("arm64", ""), &layers);
    blobs.write_layout(&world.path("layout"), &image, "v1");
    let source = format!("oci:{}:v1", world.path("layout").display());
    let target = format!(
        "docker-archive:{}:acme/demo:v1",
        world.path("docker.tar").display()
    );
    run(
        "skopeo",
        &[
            "--insecure-policy",
            "--override-arch",
            "arm64",
            "copy",
            "--quiet",
            &source,
            &target,
        ],
    );

    let imported = import_path(
        &world.path("docker.tar"),
        &world.blobs,
        &ImportLimits::default(),
    )
    .unwrap();
    assert_eq!(imported.len(), 1);
    assert!(
        imported[0]
            .name
            .as_deref()
            .is_some_and(|name| name.ends_with("acme/demo:v1")),
        "{imported:?}"
    );
    assert_eq!(imported[0].platforms, [Platform::linux("arm64", "")]);
    world.assert_whole(&imported[0]);
    let manifest = world.manifest(&imported[0].digest);
    for (descriptor, layer) in manifest.layers.iter().zip(&layers) {
        let (file, size) = world.blobs.open_blob(&descriptor.digest).unwrap().unwrap();
        assert_eq!(size, descriptor.size);
        let mut tar = Vec::new();
        flate2::read::MultiGzDecoder::new(file)
            .read_to_end(&mut tar)
            .unwrap();
        assert_eq!(Digest::of(&tar), layer.diff_id);
    }
    let bytes = fs::read(world.path("docker.tar")).unwrap();
    assert_eq!(
        World::new().archive(&bytes).unwrap(),
        imported,
        "the same archive gives the same image"
    );
}

/// As `docker save` of old wrote it: a directory for each layer, a link where two images share one.
#[test]
fn links_and_several_names_in_a_docker_archive() {
    let layer = tar(&[("x", b"shared")]);
    let config =
        json!({"os": "linux", "architecture": "amd64", "config": {}, "rootfs": {"type": "layers",
                        "diff_ids": [Digest::of(&layer)]}})
        .to_string();
    let manifest = json!([
        {"Config": "c.json", "RepoTags": ["demo:v1", "demo:latest"], "Layers": ["aa/layer.tar"]},
        {"Config": "c.json", "RepoTags": null, "Layers": ["bb/layer.tar"]},
    ])
    .to_string();
    let mut builder = tar::Builder::new(Vec::new());
    let mut add = |name: &str, content: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        builder.append_data(&mut header, name, content).unwrap();
    };
    add("aa/layer.tar", &layer);
    add("c.json", config.as_bytes());
    add("manifest.json", manifest.as_bytes());
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::Symlink);
    header.set_size(0);
    builder
        .append_link(&mut header, "bb/layer.tar", "../aa/layer.tar")
        .unwrap();
    let archive = builder.into_inner().unwrap();

    let imported = World::new().archive(&archive).unwrap();
    let names: Vec<Option<&str>> = imported.iter().map(|image| image.name.as_deref()).collect();
    assert_eq!(names, [Some("demo:v1"), Some("demo:latest"), None]);
    assert!(
        imported
            .iter()
            .all(|image| image.digest == imported[0].digest)
    );
}

#[test]
fn an_index_with_one_variant_saved_is_imported_as_that() {
    let world = World::new();
    let mut blobs = Blobs::default();
    let here = blobs.image(("amd64", ""), &[Layer::gzip(&[("a", b"here")])]);
    let mut elsewhere = Blobs::default();
    let gone = elsewhere.image(("arm64", ""), &[Layer::gzip(&[("a", b"gone")])]);
    let config = blobs.add("application/vnd.oci.image.config.v1+json", b"{}".to_vec());
    let attestation = json!({"schemaVersion": 2, "config": config, "layers": []});
    let mut attestation = blobs.add(
        crate::compose::MANIFEST,
        attestation.to_string().into_bytes(),
    );
    attestation["platform"] = json!({"os": "unknown", "architecture": "unknown"});
    let index = blobs.index(&[here, gone.clone(), attestation]);
    blobs.write_layout(&world.path("layout"), &index, "v1");
    let imported = world.archive(&tar_of(&world.path("layout"))).unwrap();
    assert_eq!(imported[0].platforms, [Platform::linux("amd64", "")]);
    world.assert_whole(&imported[0]);

    let only_gone = Blobs::default().index(&[gone]);
    let mut nothing = Blobs::default();
    nothing.index(&[]);
    let fresh = World::new();
    nothing.write_layout(&fresh.path("layout"), &only_gone, "v1");
    assert!(matches!(
        fresh.archive(&tar_of(&fresh.path("layout"))),
        Err(ImportError::MissingBlob { .. })
    ));
}

#[test]
fn archives_that_are_not_what_they_should_be() {
    let world = World::new();
    let (blobs, index) = two_platforms(&world.path("layout"));
    let blob_path = |digest: &Digest| world.path("layout/blobs/sha256").join(digest.hex());
    let good = tar_of(&world.path("layout"));
    let layer = blobs
        .0
        .iter()
        .find(|(_, bytes)| bytes.starts_with(&[0x1f, 0x8b]))
        .unwrap();

    fs::write(blob_path(layer.0), vec![0; layer.1.len()]).unwrap();
    let damaged = tar_of(&world.path("layout"));
    fs::remove_file(blob_path(layer.0)).unwrap();
    let missing = tar_of(&world.path("layout"));
    fs::write(blob_path(layer.0), layer.1).unwrap();
    fs::write(world.path("layout/index.json"), "{\"manifests\": 7}").unwrap();
    let no_index = tar_of(&world.path("layout"));
    fs::write(
        world.path("layout/index.json"),
        "{\"schemaVersion\": 2, \"manifests\": []}",
    )
    .unwrap();
    let empty = tar_of(&world.path("layout"));
    fs::write(
        world.path("layout/index.json"),
        json!({"schemaVersion": 2, "manifests": [{"mediaType": crate::compose::INDEX, "digest": index, "size": 7}]})
            .to_string(),
    )
    .unwrap();
    let wrong_size = tar_of(&world.path("layout"));

    type Check = fn(&ImportError) -> bool;
    let cases: Vec<(&str, Vec<u8>, Check)> = vec![
        ("damaged", damaged, |e| {
            matches!(e, ImportError::DigestMismatch { .. })
        }),
        ("missing", missing, |e| {
            matches!(e, ImportError::MissingBlob { .. })
        }),
        ("no index", no_index, |e| {
            matches!(e, ImportError::Index { .. })
        }),
        ("empty", empty, |e| matches!(e, ImportError::Empty)),
        ("wrong size", wrong_size, |e| {
            matches!(e, ImportError::SizeMismatch { .. })
        }),
        ("cut off", good[..good.len() / 2].to_vec(), |e| {
            matches!(
                e,
                ImportError::Archive(_) | ImportError::MissingBlob { .. } | ImportError::NotAnImage
            )
        }),
        ("cut gzip", gzip(&good)[..200].to_vec(), |e| {
            matches!(e, ImportError::Archive(_))
        }),
        ("a file system", tar(&[("etc/passwd", b"root")]), |e| {
            matches!(e, ImportError::NotAnImage)
        }),
        ("nothing", Vec::new(), |e| {
            matches!(e, ImportError::NotAnImage)
        }),
        ("noise", vec![7; 5000], |e| {
            matches!(e, ImportError::Archive(_))
        }),
        ("docker: bad JSON", tar(&[("manifest.json", b"{}")]), |e| {
            matches!(e, ImportError::Index { .. })
        }),
        (
            "docker: no config",
            tar(&[(
                "manifest.json",
                br#"[{"Config":"../../etc/passwd","Layers":[]}]"#,
            )]),
            |e| matches!(e, ImportError::MissingFile { .. }),
        ),
        (
            "docker: another layer",
            tar(&[
                ("manifest.json", br#"[{"Config":"c","Layers":["l"]}]"#),
                (
                    "c",
                    json!({"rootfs": {"diff_ids": [Digest::of(b"other")]}})
                        .to_string()
                        .as_bytes(),
                ),
                ("l", &tar(&[("x", b"y")])),
            ]),
            |e| matches!(e, ImportError::DiffId { .. }),
        ),
    ];
    for (name, bytes, check) in cases {
        let error = World::new().archive(&bytes).expect_err(name);
        assert!(check(&error), "{name}: {error:?}");
        assert!(
            matches!(error.fault(), Fault::BadImage | Fault::DigestMismatch),
            "{name}"
        );
    }
}

#[test]
fn limits_of_an_import() {
    let world = World::new();
    two_platforms(&world.path("layout"));
    let archive = tar_of(&world.path("layout"));
    let import = |bytes: &[u8], limits| import_archive(&mut &bytes[..], &world.blobs, &limits);
    let few = ImportLimits {
        entries_max: 3,
        ..ImportLimits::default()
    };
    assert!(matches!(
        import(&archive, few),
        Err(ImportError::TooManyEntries { max: 3 })
    ));
    let small = ImportLimits {
        bytes_max: 4000,
        ..ImportLimits::default()
    };
    assert!(matches!(
        import(&archive, small),
        Err(ImportError::TooLarge { max: 4000 })
    ));
    let bomb = gzip(&tar(&[("zeros", &vec![0; 50 << 20])]));
    let limits = ImportLimits {
        bytes_max: 10 << 20,
        ..ImportLimits::default()
    };
    assert!(matches!(
        import(&bomb, limits),
        Err(ImportError::TooLarge { .. })
    ));
    assert_eq!(world.blobs.list().unwrap().len(), 0);
    assert_eq!(fs::read_dir(world.path("hub/tmp")).unwrap().count(), 0);
    let huge = tar(&[("index.json", &vec![b' '; 5 << 20])]);
    assert!(matches!(
        import(&huge, ImportLimits::default()),
        Err(ImportError::TooLarge { .. })
    ));
    assert!(
        import_path(
            &world.path("absent"),
            &world.blobs,
            &ImportLimits::default()
        )
        .is_err()
    );
    let path = world.path("hub");
    assert!(matches!(
        import_path(&path, &world.blobs, &ImportLimits::default()),
        Err(ImportError::NotAnImage)
    ));
    assert!(text(&path).ends_with("hub"));
}
