//! Unpacking of layers above another and beside a canary. Takes root, as on a device.

use std::cell::OnceCell;
use std::fs;
use std::io::Read as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, symlink};
use std::path::Path;

use foreshore_images::Digest;
use foreshore_images::compression::decompress;
use foreshore_images::unpack::job::{Job, LowerLayer, Paths, perform};
use foreshore_images::unpack::{Budget, Unpacked};

use crate::accepted;
use crate::scratch::{self, Scratch};

/// What a layer may take here.
const BUDGET: Budget = Budget {
    bytes: 1 << 20,
    entries: 256,
};

/// The longest uncompressed stream.
const STREAM_MAX: u64 = 4 << 20;

thread_local! {
    static BED: OnceCell<Scratch> = const { OnceCell::new() };
}

/// One layer, compressed or not.
///
/// # Panics
/// When anything outside of its directory is changed, it takes more than it may, or leaves what no layer may leave.
pub fn run(bytes: &[u8]) {
    BED.with(|bed| within(bed.get_or_init(bed_of_lies), bytes));
}

/// A layer below whose links lead out of it.
fn bed_of_lies() -> Scratch {
    let scratch = Scratch::new();
    let lower = scratch.path().join("lower");
    fs::create_dir_all(lower.join("dir/deep")).expect("a directory can be made");
    fs::create_dir(lower.join("hidden")).expect("a directory can be made");
    for name in ["file", "dir/file", "hidden/file"] {
        fs::write(lower.join(name), "of the layer below").expect("a file can be written");
    }
    for (name, target) in [
        ("out", "../canary"),
        ("abs", "/proc/self/cwd/../canary"),
        ("dir/up", "../../canary/inner"),
        ("loop", "loop"),
        ("in", "dir"),
    ] {
        symlink(target, lower.join(name)).expect("a link can be made");
    }
    scratch
}

fn within(scratch: &Scratch, bytes: &[u8]) {
    let target = scratch.path().join("target");
    let lower = scratch.path().join("lower");
    let before = scratch::snapshot(&lower);
    fs::create_dir(&target).expect("a directory can be made");
    let job = Job {
        target: target.clone(),
        lowers: vec![LowerLayer {
            path: lower.clone(),
            opaque: Some(Paths([b"hidden".to_vec()].into())),
        }],
        budget: BUDGET,
        stream_bytes_max: STREAM_MAX,
        reserve_bytes: None,
        keep_privileges: false,
        opaque_later: true,
    };
    let outcome = perform(&job, bytes);
    scratch.check(&["lower", "target"]);
    assert!(
        scratch::snapshot(&lower) == before,
        "the layer below was changed"
    );
    let tree = Tree::of(&target);
    assert!(
        tree.bytes <= BUDGET.bytes,
        "{} bytes came of it",
        tree.bytes
    );
    let mut stream = Vec::new();
    let inflated = decompress(bytes).and_then(|inflated| {
        let mut inflated = inflated.take(STREAM_MAX);
        inflated.read_to_end(&mut stream)
    });
    assert!(
        !tree.sings || scratch::sings(&stream),
        "it holds a file of the canary"
    );
    if let Ok((unpacked, diff_id)) = outcome {
        accepted();
        inflated.expect("it was inflated before");
        assert_eq!(diff_id, Digest::of(&stream), "it was called what it is not");
        check(&unpacked, &lower);
    }
    fs::remove_dir_all(&target).expect("it can be removed");
}

fn check(unpacked: &Unpacked, lower: &Path) {
    assert!(unpacked.bytes <= BUDGET.bytes && unpacked.entries <= BUDGET.entries);
    assert!(unpacked.notes.len() <= 17);
    // Above the same layers it would be the same, unless it leans on them in a way that cannot be compared.
    let holds = unpacked.leans.holds_above(&[lower.to_owned()]);
    let hidden = |path: &String| path.starts_with("hidden/");
    if !unpacked.leans.directories.keys().any(hidden) {
        assert_eq!(
            holds.expect("the layer can be read"),
            !unpacked.leans.wholly
        );
    }
}

/// What a tree has.
#[derive(Default)]
struct Tree {
    /// Of files, those with several names once.
    bytes: u64,
    /// A file holds something of the canary.
    sings: bool,
}

impl Tree {
    /// Looks at everything below `root`.
    fn of(root: &Path) -> Self {
        let mut tree = Self::default();
        let mut inodes = std::collections::BTreeSet::new();
        let mut ahead = vec![root.to_owned()];
        while let Some(path) = ahead.pop() {
            let meta = fs::symlink_metadata(&path).expect("it is there");
            let kind = meta.file_type();
            assert!(
                !kind.is_block_device() && !kind.is_socket(),
                "{}",
                path.display()
            );
            if kind.is_char_device() {
                assert_eq!(meta.rdev(), 0, "{} is a device", path.display());
            }
            let lends = kind.is_file() && meta.mode() & 0o6000 != 0;
            assert!(!lends, "{} lends rights", path.display());
            if kind.is_file() && inodes.insert(meta.ino()) {
                tree.bytes += meta.size();
                let content = fs::read(&path).expect("it can be read");
                tree.sings |= scratch::sings(&content);
            }
            if kind.is_dir() {
                let below = fs::read_dir(&path).expect("it can be listed");
                ahead.extend(below.map(|entry| entry.expect("it can be listed").path()));
            }
            if !kind.is_symlink() {
                attributes(&path);
            }
        }
        tree
    }
}

/// Nothing that speaks to overlayfs or lends rights.
fn attributes(path: &Path) {
    let mut names = vec![0; 64 << 10];
    let length = rustix::fs::llistxattr(path, &mut names[..]).unwrap_or(0);
    for name in names[..length].split(|byte| *byte == 0) {
        let bad = name.starts_with(b"trusted.")
            || name == b"security.capability"
            || name.starts_with(b"user.overlay.");
        assert!(!bad, "{} of {}", name.escape_ascii(), path.display());
    }
}
