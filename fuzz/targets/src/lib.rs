//! What each fuzz target does with its bytes: it gives them to what reads them in the product, and asserts what must hold
//! whatever they are.
//!
//! libFuzzer runs these functions with coverage guidance (`cargo xtask fuzz`; the programs are in `fuzz/fuzz_targets`).
//! The test `corpora` runs them over the committed corpora on any toolchain. A target is a module with `run`; modules of
//! formats with checksums also have `repair`, which makes mutated bytes pass them.

use std::cell::Cell;

pub mod app_manifest;
pub mod compression;
pub mod delta;
pub mod docker_config;
pub mod frame;
pub mod import;
pub mod memory;
pub mod oci_config;
pub mod oci_manifest;
pub mod quantity;
pub mod reference;
pub mod release;
pub mod scratch;
pub mod signature;
pub mod tar;
pub mod unpack;
pub mod www_authenticate;

/// What a target does with one input.
pub type Run = fn(&[u8]);

/// Every target by its name, which is that of its program and of its corpus.
pub const TARGETS: &[(&str, Run)] = &[
    ("app_manifest", app_manifest::run),
    ("compression", compression::run),
    ("delta", delta::run),
    ("delta_plan", delta::run_plan),
    ("docker_config", docker_config::run),
    ("frame", frame::run),
    ("import", import::run),
    ("oci_config", oci_config::run),
    ("oci_manifest", oci_manifest::run),
    ("quantity", quantity::run),
    ("reference", reference::run),
    ("release", release::run),
    ("signature", signature::run),
    ("tar", tar::run),
    ("unpack", unpack::run),
    ("www_authenticate", www_authenticate::run),
];

thread_local! {
    /// How many inputs got past the first refusal, so that a test can tell that a corpus reaches anything.
    static ACCEPTED: Cell<u64> = const { Cell::new(0) };
}

/// Notes that an input was taken for what it should be.
pub(crate) fn accepted() {
    ACCEPTED.set(ACCEPTED.get() + 1);
}

/// How often this thread's inputs were taken for what they should be.
#[must_use]
pub fn accepted_count() -> u64 {
    ACCEPTED.get()
}

/// Replays one corpus of `fuzz/corpus`: each target's test.
///
/// # Panics
/// When an input breaks what the target asserts, and when the corpus is empty or reaches nothing.
pub fn replay(name: &str) {
    let (_, run) = TARGETS
        .iter()
        .find(|(target, _)| *target == name)
        .unwrap_or_else(|| panic!("no target is called {name}"));
    let corpus = std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../corpus")
        .join(name);
    let mut inputs: Vec<_> = std::fs::read_dir(&corpus)
        .unwrap_or_else(|error| panic!("{}: {error}", corpus.display()))
        .map(|entry| entry.expect("the corpus can be listed").path())
        .collect();
    inputs.sort();
    assert!(!inputs.is_empty(), "{} is empty", corpus.display());
    let before = accepted_count();
    for input in inputs {
        let bytes = std::fs::read(&input).expect("the corpus can be read");
        let outcome = std::panic::catch_unwind(|| run(&bytes));
        assert!(outcome.is_ok(), "{name} fails on {}", input.display());
    }
    assert!(
        accepted_count() > before,
        "no input of {name} is what it should be: the corpus reaches nothing"
    );
}
