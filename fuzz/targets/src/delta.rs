//! Deltas: what a hostile one makes of old trees, and what that costs.

use std::cell::OnceCell;
use std::fs;
use std::io::Read;
use std::os::unix::fs::symlink;
use std::path::PathBuf;

use foreshore_images::delta::Rebuilt;
use foreshore_images::delta::format::{self, MAGIC, PLAN_MAX};

use crate::scratch::{self, Scratch};
use crate::{accepted, memory};

/// What is read of what it makes.
const READ_MAX: u64 = 1 << 20;

/// What the blocks, the plan and the window of old and new bytes together may take, whatever the delta says.
const MEMORY_MAX: usize = 24 << 20;

thread_local! {
    static BED: OnceCell<(Scratch, Vec<PathBuf>)> = const { OnceCell::new() };
}

/// One delta.
///
/// # Panics
/// When it depends on how it is read, shows what is in no old tree, goes on after a fault or takes too much memory.
pub fn run(bytes: &[u8]) {
    BED.with(|bed| {
        let (scratch, trees) = bed.get_or_init(old_trees);
        apply(bytes, trees);
        scratch.check(&["old"]);
    });
}

/// The plan of a delta, its length in front in two bytes, and what stands behind it. So mutations reach the operations
/// without having to make zstd blocks.
///
/// # Panics
/// As [`run`] does, and when an operation does not come back as written.
pub fn run_plan(bytes: &[u8]) {
    let Some((length, rest)) = bytes.split_first_chunk() else {
        return;
    };
    let length = usize::from(u16::from_le_bytes(*length));
    let (plan, patches) = rest.split_at(length.min(rest.len()));
    let mut again = Vec::new();
    let mut at = 0;
    let mut operations = 0;
    while let Ok(Some(operation)) = format::read(plan, &mut at) {
        format::write(&mut again, &operation);
        operations += 1;
    }
    let (mut first, mut second) = (0, 0);
    for _ in 0..operations {
        let operation = format::read(plan, &mut first).expect("it was read before");
        assert_eq!(
            format::read(&again, &mut second).expect("it was written"),
            operation
        );
    }
    if !plan.is_empty() {
        run(&around(plan, patches));
    }
}

/// The delta of one group: the plan as it stands, in one raw block.
#[must_use]
pub fn around(plan: &[u8], patches: &[u8]) -> Vec<u8> {
    assert!(plan.len() <= PLAN_MAX.min(128 << 10), "it fits a block");
    let length = u32::try_from(plan.len()).expect("it is short");
    // Raw, and the last block (RFC 8878, section 3.1.1.2).
    let head = (length << 3 | 1).to_le_bytes();
    let mut delta = MAGIC.to_vec();
    delta.extend_from_slice(&length.to_le_bytes());
    delta.extend_from_slice(&(length + 3).to_le_bytes());
    delta.extend_from_slice(&head[..3]);
    delta.extend_from_slice(plan);
    delta.extend_from_slice(patches);
    delta
}

/// Two trees of a few files, links that lead out of them, and a pipe.
fn old_trees() -> (Scratch, Vec<PathBuf>) {
    let scratch = Scratch::new();
    let old = scratch.path().join("old");
    let trees = vec![old.join("0"), old.join("1")];
    for tree in &trees {
        fs::create_dir_all(tree.join("dir")).expect("a directory can be made");
    }
    let numbers = |count: u32| -> Vec<u8> {
        let squares = (0..count).flat_map(|n| n.wrapping_mul(n).to_le_bytes());
        squares.collect()
    };
    for (path, content) in [
        ("0/a", b"a short file of the first tree".to_vec()),
        ("0/dir/b", numbers(5000)),
        ("0/empty", Vec::new()),
        ("1/a", numbers(64)),
        ("1/large", vec![7; 300_000]),
    ] {
        fs::write(old.join(path), content).expect("a file can be written");
    }
    for (path, target) in [
        ("0/out", "../../canary/file"),
        ("0/canary", "../../canary"),
        ("1/abs", "/proc/self/cwd/../canary/file"),
        ("1/dir/up", "../a"),
    ] {
        symlink(target, old.join(path)).expect("a link can be made");
    }
    rustix::fs::mknodat(
        rustix::fs::CWD,
        old.join("1/pipe"),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::from_raw_mode(0o600),
        0,
    )
    .expect("a pipe can be made");
    (scratch, trees)
}

fn apply(bytes: &[u8], trees: &[PathBuf]) {
    let (made, fault) = memory::within(MEMORY_MAX, || rebuilt(bytes, trees, 64 << 10));
    if fault.is_none() && !made.is_empty() {
        accepted();
    }
    let shown = scratch::sings(&made) && !scratch::sings(bytes);
    assert!(!shown, "it shows a file outside of the old trees");
    if made.len() <= 8 << 10 {
        let again = rebuilt(bytes, trees, 7);
        assert_eq!((made, fault), again, "it depends on how it is read");
    }
}

fn rebuilt(bytes: &[u8], trees: &[PathBuf], piece: usize) -> (Vec<u8>, Option<String>) {
    let mut rebuilt = Rebuilt::new(bytes, trees).expect("the trees can be opened");
    let mut made = Vec::new();
    let mut buffer = vec![0; piece];
    while (made.len() as u64) < READ_MAX {
        match rebuilt.read(&mut buffer) {
            Ok(0) => return (made, None),
            Ok(count) => made.extend_from_slice(&buffer[..count]),
            Err(error) => {
                assert!(
                    error.raw_os_error().is_none(),
                    "a bad delta looks like a bad disk"
                );
                assert!(
                    rebuilt.read(&mut buffer).is_err(),
                    "it goes on after a fault"
                );
                return (made, Some(error.to_string()));
            }
        }
    }
    (made, None)
}
