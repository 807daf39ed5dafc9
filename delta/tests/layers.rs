//! A delta made of an old tree makes the new stream byte for byte; a damaged one never panics, never makes more than
//! it may, and is told by the digest of what it makes.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::collections::BTreeMap;
use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use foreshore_delta::layer::{Made, make};
use foreshore_delta::old::{Old, Spooled};
use foreshore_images::Digest;
use foreshore_images::delta::Rebuilt;
use foreshore_images::delta::format::{self, MAGIC, Operation};
use proptest::prelude::*;

type Files = BTreeMap<String, Vec<u8>>;

fn tar(files: &Files) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (path, content) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        header.set_mtime(1_700_000_000 + content.len() as u64);
        builder
            .append_data(&mut header, path, &content[..])
            .unwrap();
    }
    builder.into_inner().unwrap()
}

fn unpack(files: &Files, tree: &Path) {
    for (path, content) in files {
        let path = tree.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }
}

/// What a device has, and the new layer it wants.
struct Case {
    _dir: tempfile::TempDir,
    trees: Vec<PathBuf>,
    new: Vec<u8>,
    made: Made,
    delta: Vec<u8>,
}

impl Case {
    fn new(old: &[Files], new: Vec<u8>) -> Self {
        Self::with_level(old, new, 3)
    }

    fn with_level(old: &[Files], new: Vec<u8>, level: i32) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut by_digest = BTreeMap::new();
        let layers = old.iter().enumerate().map(|(index, files)| {
            let tree = dir.path().join(index.to_string());
            fs::create_dir(&tree).unwrap();
            unpack(files, &tree);
            let spooled = Spooled::fill(&tar(files)[..]).unwrap();
            by_digest.insert(spooled.diff_id, tree);
            spooled
        });
        let old = Old::new(layers.collect()).unwrap();
        let mut delta = Vec::new();
        let spooled = Spooled::fill(&new[..]).unwrap();
        let made = make(&old, &spooled, level, &mut delta).unwrap();
        let trees = made
            .trees
            .iter()
            .map(|digest| by_digest[digest].clone())
            .collect();
        Self {
            _dir: dir,
            trees,
            new,
            made,
            delta,
        }
    }

    fn apply(&self, delta: &[u8]) -> std::io::Result<Vec<u8>> {
        let mut out = Vec::new();
        let most = self.new.len() as u64 * 2 + (1 << 20);
        Rebuilt::new(delta, &self.trees)?
            .take(most)
            .read_to_end(&mut out)?;
        Ok(out)
    }

    fn is_whole(&self) {
        let rebuilt = self.apply(&self.delta).unwrap();
        assert_eq!(Digest::of(&rebuilt), Digest::of(&self.new));
    }
}

fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(seed);
    (0..length).map(|_| random.u8(..)).collect()
}

/// As a linker would: addresses all over it change a little, and something is put in.
fn rebuilt(binary: &[u8], seed: u64) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut new = binary.to_vec();
    for _ in 0..binary.len() / 400 {
        let at = random.usize(..new.len());
        new[at] = new[at].wrapping_add(16);
    }
    let at = random.usize(..new.len());
    new.splice(at..at, noise(seed, 777));
    new
}

fn files<const N: usize>(files: [(&str, Vec<u8>); N]) -> Files {
    files
        .into_iter()
        .map(|(path, content)| (path.to_owned(), content))
        .collect()
}

#[test]
fn rebuilt_programs_cost_little() {
    let (small, large) = (noise(1, 300_000), noise(2, 5 << 20));
    let old = files([
        ("usr/bin/tool", small.clone()),
        ("usr/lib/libx.so.1.2", large.clone()),
        ("usr/share/same", noise(3, 2 << 20)),
        ("usr/share/moved", noise(4, 500_000)),
    ]);
    let new = files([
        ("opt/elsewhere", noise(4, 500_000)),
        ("usr/bin/tool", rebuilt(&small, 5)),
        ("usr/lib/libx.so.1.3", rebuilt(&large, 6)),
        ("usr/share/new", b"a new file\n".repeat(1000)),
        ("usr/share/same", noise(3, 2 << 20)),
    ]);
    let case = Case::with_level(&[old], tar(&new), 16);
    case.is_whole();
    assert!(
        case.delta.len() < case.new.len() / 20,
        "{} of {}",
        case.delta.len(),
        case.new.len()
    );
}

#[test]
fn only_layers_that_help_are_named() {
    let kept = noise(7, 100_000);
    let old = [
        files([("a", noise(8, 50_000))]),
        files([("b", kept.clone())]),
    ];
    let second = Spooled::fill(&tar(&old[1])[..]).unwrap().diff_id;
    let case = Case::new(&old, tar(&files([("c", kept)])));
    case.is_whole();
    assert_eq!(case.made.trees, [second]);
    assert!(case.delta.len() < 1000);
}

#[test]
fn what_is_no_archive_is_carried_as_it_is() {
    for new in [vec![], vec![0; 3 << 20], noise(9, 2_500_000)] {
        let case = Case::new(&[files([("a", noise(9, 70_000))])], new);
        case.is_whole();
    }
}

#[test]
fn an_old_file_that_changed_is_noticed() {
    let content = noise(10, 200_000);
    let case = Case::new(
        &[files([("a", content.clone())])],
        tar(&files([("a", content)])),
    );
    let path = case.trees[0].join("a");
    fs::write(&path, noise(11, 200_000)).unwrap();
    let wrong = case.apply(&case.delta).unwrap();
    assert_ne!(Digest::of(&wrong), Digest::of(&case.new));
    fs::write(&path, b"short").unwrap();
    assert!(case.apply(&case.delta).is_err());
    fs::remove_file(&path).unwrap();
    assert!(case.apply(&case.delta).is_err());
}

/// A delta of one plan.
fn handmade(operations: &[Operation<'_>]) -> Vec<u8> {
    let mut plan = Vec::new();
    for operation in operations {
        format::write(&mut plan, operation);
    }
    // One raw last block.
    let block = u32::try_from(plan.len() << 3 | 1).unwrap().to_le_bytes();
    let mut delta = MAGIC.to_vec();
    for length in [plan.len(), plan.len() + 3] {
        delta.extend(u32::try_from(length).unwrap().to_le_bytes());
    }
    delta.extend(&block[..3]);
    delta.extend(plan);
    delta
}

#[test]
fn old_files_are_looked_for_in_the_old_trees_only() {
    let dir = tempfile::tempdir().unwrap();
    let (tree, outside) = (dir.path().join("tree"), dir.path().join("outside"));
    fs::create_dir_all(tree.join("dir")).unwrap();
    fs::create_dir(&outside).unwrap();
    fs::write(tree.join("dir/file"), b"inside").unwrap();
    fs::write(outside.join("secret"), b"secret").unwrap();
    std::os::unix::fs::symlink("../outside/secret", tree.join("link")).unwrap();
    std::os::unix::fs::symlink(&outside, tree.join("dirlink")).unwrap();
    std::os::unix::fs::symlink("dir", tree.join("inner")).unwrap();
    let pipe = std::process::Command::new("mkfifo")
        .arg(tree.join("pipe"))
        .status()
        .unwrap();
    assert!(pipe.success());
    let absolute = outside.join("secret");
    let read = |tree_number: usize, path: &[u8], offset: u64, length: u64| {
        let old = format::Old {
            tree: tree_number,
            path,
            offset,
            length,
        };
        let mut out = Vec::new();
        let result = Rebuilt::new(
            &handmade(&[Operation::Copy(old)])[..],
            std::slice::from_ref(&tree),
        )
        .unwrap()
        .read_to_end(&mut out);
        result.map(|_| out)
    };
    assert_eq!(read(0, b"dir/file", 1, 3).unwrap(), b"nsi");
    for (number, path, offset, length) in [
        (0, &b"../outside/secret"[..], 0, 6),
        (0, absolute.as_os_str().as_encoded_bytes(), 0, 6),
        (0, b"link", 0, 6),
        (0, b"dirlink/secret", 0, 6),
        (0, b"inner/file", 0, 6),
        (0, b"pipe", 0, 0),
        (0, b"dir", 0, 0),
        (0, b"", 0, 0),
        (0, b"a\0b", 0, 0),
        (0, b"dir/file", 1, 6),
        (0, b"dir/file", u64::MAX, 2),
        (1, b"dir/file", 0, 6),
    ] {
        let error = read(number, path, offset, length).unwrap_err();
        // As for any bad data: the disk is well.
        assert_eq!(error.raw_os_error(), None, "{path:?}");
    }
}

#[test]
fn making_much_of_nothing_is_refused() {
    let endless = handmade(&[Operation::Zeros(u64::MAX)]);
    let error = std::io::copy(
        &mut Rebuilt::new(&endless[..], &[]).unwrap(),
        &mut std::io::sink(),
    );
    assert!(error.is_err());
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("a"), b"a").unwrap();
    let old = format::Old {
        tree: 0,
        path: b"a",
        offset: 0,
        length: 1,
    };
    let busy = handmade(&vec![Operation::Copy(old); 5000]);
    let error = std::io::copy(
        &mut Rebuilt::new(&busy[..], &[dir.path().to_owned()]).unwrap(),
        &mut std::io::sink(),
    );
    assert!(error.is_err());
}

fn content() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        (any::<u64>(), 0..20_000_usize).prop_map(|(seed, length)| noise(seed % 8, length)),
        (0..20_000_usize).prop_map(|length| vec![0; length]),
        prop::collection::vec(any::<u8>(), 0..300),
        (0..4_u64, any::<u64>()).prop_map(|(old, seed)| rebuilt(&noise(old, 15_000), seed)),
    ]
}

fn tree() -> impl Strategy<Value = Files> {
    prop::collection::btree_map("[a-c](/[a-c]{1,2}[0-9]{0,2}){1,2}\\.f", content(), 0..8)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_stream_is_made_again(old in prop::collection::vec(tree(), 0..3), new in tree(), cut in 0..2000_usize) {
        let mut new = tar(&new);
        new.truncate(new.len() - cut.min(new.len()));
        Case::new(&old, new).is_whole();
    }

    #[test]
    fn damaged_deltas_are_noticed_and_harm_nothing(
        old in tree(),
        new in tree(),
        faults in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0..4_u8), 1..6),
    ) {
        let case = Case::with_level(&[old], tar(&new), 16);
        let mut damaged = case.delta.clone();
        for (at, value, kind) in faults {
            let at = at.index(damaged.len());
            match kind {
                0 => damaged[at] = value,
                1 => damaged.truncate(at.max(1)),
                2 => { damaged.insert(at, value); }
                _ => damaged[at] ^= 1 << (value % 8),
            }
        }
        if let Ok(made) = case.apply(&damaged) && damaged != case.delta {
            // Whether it happens to be the same is for the digest to say; that it ends is for the limit.
            prop_assert!(made.len() as u64 <= case.new.len() as u64 * 2 + (1 << 20));
        }
    }
}
