//! Replays the committed corpora: what fuzzing found interesting once holds on every toolchain.

use std::path::Path;

use foreshore_fuzz::{TARGETS, replay};

/// They have a directory and the process's working directory, so they run one after the other.
const THAT_WRITE: &[&str] = &["delta", "delta_plan", "import", "unpack"];

#[test]
fn the_corpora_of_targets_that_only_read_hold() {
    for (target, _) in TARGETS {
        if !THAT_WRITE.contains(target) {
            replay(target);
        }
    }
}

#[test]
fn the_corpora_of_targets_that_write_hold() {
    for target in THAT_WRITE {
        replay(target);
    }
}

#[test]
fn every_target_has_a_program_and_a_corpus_and_nothing_else_has() {
    let fuzz = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
    let names = |dir: &str| {
        let entries = std::fs::read_dir(fuzz.join(dir)).expect("it can be listed");
        let mut names: Vec<String> = entries
            .map(|entry| entry.expect("it can be listed").path())
            .filter_map(|path| Some(path.file_stem()?.to_string_lossy().into_owned()))
            .collect();
        names.sort();
        names
    };
    let known: Vec<&str> = TARGETS.iter().map(|(name, _)| *name).collect();
    assert!(known.is_sorted(), "the list is in order");
    assert!(THAT_WRITE.iter().all(|name| known.contains(name)));
    assert_eq!(names("fuzz_targets"), known);
    assert_eq!(names("corpus"), known);
    assert!(
        names("dict")
            .iter()
            .all(|name| known.contains(&name.as_str()))
    );
    let manifest = std::fs::read_to_string(fuzz.join("Cargo.toml")).expect("it is there");
    for name in known {
        let program = format!("name = \"{name}\"");
        assert!(manifest.contains(&program), "fuzz/Cargo.toml has no {name}");
    }
}
