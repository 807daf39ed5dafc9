//! What rots on the medium after an image was unpacked: found, named, and made right.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use foreshore_images::ledger::Wrong;
use foreshore_images::registry::{Client, RegistryConfig};
use foreshore_images::store::{
    Archive, Findings, Holders, LayerState, Repair, Sources, StagedImage, Store,
};
use foreshore_images::{Digest, Fault, Platform};

use crate::bed::{Mount, run, text, unless_busy};
use crate::compose::{Blobs, LAYER, Layer, digest, gzip};
use crate::hostile::{client_for, honest};
use crate::server::status;
use crate::store::World;

const AMD64: (&str, &str) = ("amd64", "");

/// A layer with something of everything that can rot.
fn full(name: &str) -> Layer {
    let mut tar = tar::Builder::new(Vec::new());
    let header = |kind, mode, size| {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_mtime(1_000_000_000);
        header.set_size(size);
        header
    };
    let dir = format!("{name}/");
    tar.append_data(
        &mut header(tar::EntryType::Directory, 0o755, 0),
        dir,
        &b""[..],
    )
    .unwrap();
    let program: Vec<u8> = (0..200_000_u32)
        .map(|n| n.wrapping_mul(2_654_435_761).to_be_bytes()[1])
        .collect();
    let mut add = |file: &str, mode, bytes: &[u8]| {
        let mut header = header(tar::EntryType::Regular, mode, bytes.len() as u64);
        tar.append_data(&mut header, format!("{name}/{file}"), bytes)
            .unwrap();
    };
    add("program", 0o755, &program);
    add("text", 0o644, name.as_bytes());
    let pax = [("SCHILY.xattr.user.note", name.as_bytes())];
    tar.append_pax_extensions(pax).unwrap();
    let mut marked = header(tar::EntryType::Regular, 0o640, 4);
    tar.append_data(&mut marked, format!("{name}/marked"), &b"mark"[..])
        .unwrap();
    let mut link = header(tar::EntryType::Symlink, 0o777, 0);
    tar.append_link(&mut link, format!("{name}/link"), "program")
        .unwrap();
    let mut same = header(tar::EntryType::Link, 0o644, 0);
    tar.append_link(&mut same, format!("{name}/same"), format!("{name}/text"))
        .unwrap();
    // Something of the layers below is hidden, where their directories are merged.
    let mut hidden = header(tar::EntryType::Regular, 0o644, 0);
    tar.append_data(&mut hidden, ".wh.gone", &b""[..]).unwrap();
    let tar = tar.into_inner().unwrap();
    Layer {
        diff_id: Digest::of(&tar),
        blob: gzip(&tar),
        media_type: format!("{LAYER}+gzip"),
    }
}

/// Two images of three layers each, the lower two shared.
fn two_images() -> (Blobs, [Digest; 2], [Layer; 3]) {
    let layers = [full("base"), full("middle"), full("top")];
    let mut blobs = Blobs::default();
    let first = digest(&blobs.image(AMD64, &layers));
    let others = [layers[0].clone(), layers[1].clone(), full("other")];
    let second = digest(&blobs.image(AMD64, &others));
    (blobs, [first, second], layers)
}

fn examine(store: &Store) -> Findings {
    store.examine(true, &mut |_| {}).unwrap()
}

fn repair(world: &World, findings: &Findings) -> Vec<Repair> {
    repair_with(&world.store(), &world.client, findings)
}

fn repair_with(store: &Store, client: &Client, findings: &Findings) -> Vec<Repair> {
    let sources = Sources {
        client,
        references: &BTreeMap::new(),
        platform: &Platform::linux("amd64", ""),
    };
    store.repair(findings, &sources, &mut |_| {}).unwrap()
}

fn states(findings: &Findings) -> BTreeMap<Digest, LayerState> {
    let layers = findings.layers.iter();
    layers.map(|layer| (layer.layer, layer.state)).collect()
}

fn flip(path: &Path, at: u64) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
}

/// What a container would see.
fn seen(image: &StagedImage) -> BTreeMap<PathBuf, String> {
    let dir = tempfile::tempdir().unwrap();
    let mount = Mount::overlay(&image.layers, &dir.path().join("seen"));
    let mut seen = crate::tree::describe(&mount.0);
    // No layer describes the root: its time is that of the unpacking.
    seen.remove(Path::new(""));
    seen
}

#[test]
fn every_kind_of_rot_in_a_layer_is_named_and_repaired() {
    let (blobs, images, layers) = two_images();
    let world = World::new(blobs);
    let store = world.store();
    let staged = images.map(|image| world.stage(&store, image).unwrap());
    let sound = examine(&store);
    assert!(!sound.is_damaged(), "{sound:?}");
    assert_eq!(sound.layers.len(), 4);
    assert!(
        states(&sound)
            .values()
            .all(|state| *state == LayerState::Sound)
    );
    let before = staged.each_ref().map(seen);
    type Damage = fn(&Path);
    let cases: [(&str, Wrong, Damage); 9] = [
        ("middle/program", Wrong::Content, |tree| {
            flip(&tree.join("middle/program"), 150_000);
        }),
        ("middle/program", Wrong::Size, |tree| {
            let file = File::options()
                .write(true)
                .open(tree.join("middle/program"));
            file.unwrap().set_len(4096).unwrap();
        }),
        ("middle/program", Wrong::Mode, |tree| {
            let path = tree.join("middle/program");
            fs::set_permissions(path, fs::Permissions::from_mode(0o644)).unwrap();
        }),
        ("middle/program", Wrong::Missing, |tree| {
            fs::remove_file(tree.join("middle/program")).unwrap();
        }),
        ("middle/extra", Wrong::Extra, |tree| {
            fs::write(tree.join("middle/extra"), "more").unwrap();
        }),
        ("middle/link", Wrong::Target, |tree| {
            fs::remove_file(tree.join("middle/link")).unwrap();
            symlink("/etc/shadow", tree.join("middle/link")).unwrap();
        }),
        ("middle/marked", Wrong::Xattr, |tree| {
            rustix::fs::removexattr(tree.join("middle/marked"), "user.note").unwrap();
        }),
        ("middle", Wrong::Missing, |tree| {
            fs::remove_dir_all(tree.join("middle")).unwrap();
        }),
        // The whiteout: what is below would show again.
        ("gone", Wrong::Missing, |tree| {
            fs::remove_file(tree.join("gone")).unwrap();
        }),
    ];
    let middle = layers[1].diff_id;
    let tree = staged[0].layers[1].clone();
    for (path, wrong, damage) in cases {
        damage(&tree);
        let findings = examine(&store);
        let damaged: Vec<_> = findings
            .layers
            .iter()
            .filter(|layer| layer.state != LayerState::Sound)
            .collect();
        assert_eq!(damaged.len(), 1, "{path} {wrong:?}: {damaged:?}");
        assert_eq!(damaged[0].layer, middle);
        assert_eq!(
            damaged[0].images.iter().collect::<BTreeSet<_>>(),
            images.iter().collect(),
            "both images have it"
        );
        let named: Vec<(&str, Wrong)> = damaged[0]
            .flaws
            .iter()
            .map(|flaw| (&*flaw.path, flaw.wrong))
            .collect();
        assert_eq!(named, [(path, wrong)]);
        // Looking changes nothing.
        assert_eq!(examine(&store), findings);
        assert!(store.damaged().is_empty());

        let repaired = repair(&world, &findings);
        assert_eq!(repaired.len(), 1);
        assert!(repaired[0].repaired, "{repaired:?}");
        assert!(!examine(&store).is_damaged(), "{path} {wrong:?}");
        assert!(store.damaged().is_empty());
        let now = staged.each_ref().map(seen);
        assert_eq!(now, before, "{path} {wrong:?}");
        assert_eq!(
            unless_busy(|| store.clear_aside(&Holders::new())),
            BTreeMap::new()
        );
    }
    for name in ["tmp", "quarantine", "damaged"] {
        let left = fs::read_dir(world.root.path().join(name)).unwrap().count();
        assert_eq!(left, 0, "{name}");
    }
    // Only the one layer was fetched again.
    assert_eq!(world.server.count(&Digest::of(&layers[0].blob).hex()), 1);
    assert_eq!(world.server.count(&Digest::of(&layers[1].blob).hex()), 10);
}

#[test]
fn a_tree_that_is_run_from_stays_until_nobody_runs_from_it() {
    let (blobs, [image, _], layers) = two_images();
    let world = World::new(blobs);
    let store = world.store();
    let staged = world.stage(&store, image).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let container = Mount::overlay(&staged.layers, &dir.path().join("root"));
    let tree = staged.layers[2].clone();
    flip(&tree.join("top/program"), 1);
    // Not opened before: what the overlay shows of it comes from the old tree still.
    let old = tree.metadata().unwrap().ino();
    let findings = examine(&store);
    assert!(repair(&world, &findings)[0].repaired);
    assert_ne!(tree.metadata().unwrap().ino(), old);
    assert_eq!(
        fs::read_to_string(container.0.join("top/text")).unwrap(),
        "top"
    );
    let running: Holders = [(tree.clone(), vec!["shop.web.1".to_owned()])].into();
    let held: BTreeMap<Digest, Vec<String>> =
        [(layers[2].diff_id, vec!["shop.web.1".to_owned()])].into();
    for _ in 0..2 {
        assert_eq!(unless_busy(|| store.clear_aside(&running)), held);
        assert_eq!(
            fs::read_to_string(container.0.join("top/text")).unwrap(),
            "top"
        );
        assert_eq!(
            fs::read_to_string(container.0.join("top/same")).unwrap(),
            "top",
            "the container's files are all there"
        );
    }
    // A second one of them, while the first is still run from.
    flip(&tree.join("top/program"), 2);
    assert!(repair(&world, &examine(&store))[0].repaired);
    let later: Holders = [(
        tree.clone(),
        vec!["shop.web.1".to_owned(), "shop.web.2".to_owned()],
    )]
    .into();
    assert_eq!(
        unless_busy(|| store.clear_aside(&later))[&layers[2].diff_id].len(),
        3
    );
    // It was started again: it has the new tree, and only who has it now is left out.
    drop(container);
    let restarted: Holders = [(tree, vec!["shop.web.3".to_owned()])].into();
    assert_eq!(
        unless_busy(|| store.clear_aside(&restarted)),
        BTreeMap::new()
    );
    let left = fs::read_dir(world.root.path().join("quarantine")).unwrap();
    assert_eq!(left.count(), 0);
}

#[test]
fn what_cannot_be_had_now_is_started_from_and_repaired_by_the_next_staging() {
    let (blobs, images, layers) = two_images();
    let away = Arc::new(AtomicBool::new(false));
    let switch = Arc::clone(&away);
    let world = World::with(move |request| {
        if switch.load(Ordering::SeqCst) {
            return status(404);
        }
        honest(&blobs, request)
    });
    let store = world.store();
    let staged = images.map(|image| world.stage(&store, image).unwrap());
    flip(&staged[0].layers[0].join("base/program"), 7);
    away.store(true, Ordering::SeqCst);
    let findings = examine(&store);
    let left = repair(&world, &findings);
    assert!(!left[0].repaired);
    let why = left[0].why.as_deref().unwrap();
    assert!(
        why.contains(&Digest::of(&layers[0].blob).hex()[..12]),
        "{why}"
    );
    // Both can be started, and both want to be staged.
    assert_eq!(store.damaged(), images.into());
    assert_eq!(store.staged(&images[0]), Some(staged[0].clone()));
    assert_eq!(store.list().unwrap().len(), 2);
    let error = world.stage(&store, images[0]).unwrap_err();
    assert_eq!(error.fault(), Fault::NotFound);
    assert_eq!(store.staged(&images[0]), Some(staged[0].clone()));
    // An image with this layer is staged, whichever.
    away.store(false, Ordering::SeqCst);
    world.stage(&store, images[1]).unwrap();
    assert!(store.damaged().is_empty());
    assert!(!examine(&store).is_damaged());
    assert_eq!(world.stage(&store, images[0]).unwrap(), staged[0]);
    assert_eq!(
        world
            .server
            .count(&format!("blobs/{}", Digest::of(&layers[1].blob))),
        1,
        "what is sound is not fetched again"
    );
}

#[test]
fn lost_lists_records_and_documents_are_told_and_repaired_and_old_layers_are_not_called_sound() {
    let (blobs, [image, _], layers) = two_images();
    let world = World::new(blobs);
    let store = world.store();
    let staged = world.stage(&store, image).unwrap();
    let before = seen(&staged);
    let root = world.root.path();
    let layer = |number: usize, suffix: &str| {
        root.join("layers")
            .join(format!("{}{suffix}", layers[number].diff_id.hex()))
    };
    let state = |findings: &Findings, number: usize| states(findings)[&layers[number].diff_id];
    // A rotten list says nothing any more.
    flip(&layer(0, ".ledger"), 100);
    let findings = examine(&store);
    assert_eq!(state(&findings, 0), LayerState::Damaged);
    assert!(repair(&world, &findings)[0].repaired);
    fs::remove_file(layer(0, ".ledger")).unwrap();
    assert!(repair(&world, &examine(&store))[0].repaired);
    // A rotten record, and a tree that is gone.
    fs::write(layer(1, ".json"), "rot").unwrap();
    fs::remove_dir_all(layer(2, "")).unwrap();
    let findings = examine(&store);
    assert_eq!(state(&findings, 1), LayerState::Damaged);
    assert_eq!(state(&findings, 2), LayerState::Damaged);
    assert!(
        repair(&world, &findings)
            .iter()
            .all(|repair| repair.repaired)
    );
    assert!(!examine(&store).is_damaged());
    // The manifest, and the image's own record.
    flip(&root.join("blobs/sha256").join(image.hex()), 20);
    let findings = examine(&store);
    assert_eq!(findings.images[0].damaged, ["manifest"]);
    assert!(repair(&world, &findings)[0].repaired);
    fs::write(
        root.join("images").join(format!("{}.json", image.hex())),
        "{}",
    )
    .unwrap();
    let findings = examine(&store);
    assert_eq!(findings.images[0].damaged, ["record"]);
    let asked = world.server.requests().len();
    assert!(repair(&world, &findings)[0].repaired);
    assert_eq!(
        world.server.requests().len(),
        asked,
        "it was made again here"
    );
    assert!(!examine(&store).is_damaged());
    assert_eq!(seen(&store.staged(&image).unwrap()), before);

    // As an older agent left it: nobody knows what its files were.
    forget_ledger(&layer(1, ".json"));
    fs::remove_file(layer(1, ".ledger")).unwrap();
    let findings = examine(&store);
    assert_eq!(state(&findings, 1), LayerState::NoLedger);
    assert!(!findings.is_damaged());
    // What can be told without is.
    fs::remove_file(layer(1, "").join("middle/text")).unwrap();
    let findings = examine(&store);
    assert_eq!(state(&findings, 1), LayerState::Damaged);
    let shallow = store.examine(false, &mut |_| {}).unwrap();
    assert_eq!(state(&shallow, 1), LayerState::Damaged);
    // Its name went with its record: a release says it.
    let left = repair(&world, &findings);
    assert!(
        left[0].why.as_deref().unwrap().contains("no release"),
        "{left:?}"
    );
    let sources = Sources {
        client: &world.client,
        references: &[(image, world.reference(image))].into(),
        platform: &Platform::linux("amd64", ""),
    };
    let repaired = store.repair(&findings, &sources, &mut |_| {}).unwrap();
    assert!(repaired[0].repaired, "{repaired:?}");
    assert_eq!(
        states(&examine(&store)).values().max(),
        Some(&LayerState::Sound)
    );
}

/// Makes a layer's record one of before there were ledgers.
fn forget_ledger(path: &Path) {
    let sealed: serde_json::Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    let mut record: serde_json::Value =
        serde_json::from_str(sealed["record"].as_str().unwrap()).unwrap();
    assert!(record.as_object_mut().unwrap().remove("ledger").is_some());
    let record = record.to_string();
    let sealed = serde_json::json!({"sha256": Digest::of(record.as_bytes()), "record": record});
    fs::write(path, sealed.to_string()).unwrap();
}

#[test]
fn an_image_from_an_archive_is_repaired_by_loading_it_again() {
    let (blobs, _, layers) = two_images();
    let mut blobs = Blobs(blobs.0);
    let descriptor = blobs.image(AMD64, &layers);
    let dir = tempfile::tempdir().unwrap();
    let archive = dir.path().join("layout");
    blobs.write_layout(&archive, &descriptor, "app:v1");
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path()).unwrap();
    let load = || {
        let platform = Platform::linux("amd64", "");
        store.load(Archive::Path(&archive), &platform, &mut |_| {})
    };
    let staged = load().unwrap().remove(0).image;
    let before = seen(&staged);
    assert_eq!(
        states(&examine(&store)).values().max(),
        Some(&LayerState::Sound)
    );
    flip(&staged.layers[1].join("middle/program"), 0);
    // Nobody is asked for it: what it is called names no registry.
    let client = client_for("registry.invalid", RegistryConfig::default());
    let left = repair_with(&store, &client, &examine(&store));
    let why = left[0].why.as_deref().unwrap();
    assert!(why.contains("image load"), "{why}");
    assert_eq!(load().unwrap()[0].image, staged);
    assert!(!examine(&store).is_damaged());
    assert_eq!(seen(&staged), before);
}

#[test]
fn a_repair_may_be_killed_at_any_moment() {
    let (blobs, [image, _], _) = two_images();
    let world = World::new(blobs);
    let store = world.store();
    let staged = world.stage(&store, image).unwrap();
    let before = seen(&staged);
    let example = std::env::current_exe().unwrap();
    let example = example.ancestors().nth(2).unwrap().join("examples/fsck");
    let reference = world.reference(image).to_string();
    let mut killed = 0;
    for point in [
        "layer.unpacked",
        "layer.flushed",
        "ledger.renamed",
        "layer-record.torn",
        "layer-record.renamed",
        "layer.beside",
        "layer.set-aside",
        "layer.renamed",
        "layer.durable",
        "blob.written",
        "image-record.torn",
        "image-record.renamed",
    ] {
        flip(&staged.layers[0].join("base/program"), 11);
        flip(&staged.layers[2].join("top/text"), 0);
        let fsck = || {
            let mut command = Command::new(&example);
            command
                .args([text(world.root.path()), &reference])
                .stdout(Stdio::null());
            command
        };
        let status = fsck()
            .env("FORESHORE_KILL_AT", format!("{point}#1"))
            .status()
            .unwrap_or_else(|error| panic!("{}: {error}", example.display()));
        killed += usize::from(status.code().is_none());
        // What there is can be started all the time, and is what it was or damaged in the places that were.
        let store = world.store();
        let now = store
            .staged(&image)
            .unwrap_or_else(|| panic!("{point}: it cannot be started"));
        for (path, was) in &before {
            let is = &seen(&now)[path];
            let may = ["base/program", "top/text", "top/same"].map(Path::new);
            assert!(is == was || may.contains(&&**path), "{point}: {path:?}");
        }
        assert!(fsck().status().unwrap().success(), "{point}");
        assert!(!examine(&store).is_damaged(), "{point}");
        assert!(store.damaged().is_empty(), "{point}");
        assert_eq!(seen(&store.staged(&image).unwrap()), before, "{point}");
        unless_busy(|| store.clear_aside(&Holders::new()));
        for name in ["tmp", "quarantine", "damaged"] {
            let left = fs::read_dir(world.root.path().join(name)).unwrap().count();
            assert_eq!(left, 0, "{point}: {name}");
        }
    }
    assert_eq!(killed, 12, "every point was passed");
}

/// A medium that gives an error instead of a file says so, and nobody takes it for an empty one.
#[test]
fn a_file_that_the_medium_does_not_give_back_is_damaged() {
    let (blobs, [image, _], layers) = two_images();
    let world = World::new(blobs);
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk");
    run("truncate", &["-s", "64M", text(&disk)]);
    run(
        "mkfs.ext4",
        &["-q", "-F", "-O", "^has_journal,metadata_csum", text(&disk)],
    );
    let place = dir.path().join("place");
    fs::create_dir(&place).unwrap();
    let mount = Loop::new(&disk, &place);
    let store = Store::open(&place.join("store")).unwrap();
    let staged = world.stage(&store, image).unwrap();
    let inode = staged.layers[1]
        .join("middle/program")
        .metadata()
        .unwrap()
        .ino();
    let root = place.join("store");
    drop(mount);
    // The inode's checksum is wrong afterwards.
    run(
        "debugfs",
        &[
            "-w",
            "-R",
            &format!("set_inode_field <{inode}> checksum 0"),
            text(&disk),
        ],
    );
    let _mount = Loop::new(&disk, &place);
    let store = Store::open(&root).unwrap();
    let findings = examine(&store);
    let finding = findings
        .layers
        .iter()
        .find(|layer| layer.layer == layers[1].diff_id)
        .unwrap();
    assert_eq!(finding.state, LayerState::Damaged);
    let named: Vec<(&str, Wrong)> = finding
        .flaws
        .iter()
        .map(|flaw| (&*flaw.path, flaw.wrong))
        .collect();
    assert_eq!(named, [("middle/program", Wrong::Unreadable)]);
    assert!(repair_with(&store, &world.client, &findings)[0].repaired);
    assert!(!examine(&store).is_damaged());
}

/// A file system in a file, mounted until dropped.
struct Loop(PathBuf);

impl Loop {
    fn new(disk: &Path, place: &Path) -> Self {
        run("mount", &["-o", "loop", text(disk), text(place)]);
        Self(place.to_owned())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}
