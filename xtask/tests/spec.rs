//! Every test that `docs/spec.md` names exists.

use std::path::Path;

#[test]
fn every_named_test_exists() {
    let root = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
    let spec = std::fs::read_to_string(root.join("docs/spec.md")).expect("docs/spec.md");
    let names: Vec<(&str, &str)> = spec
        .split('`')
        .filter_map(|text| text.split_once(".rs::"))
        .collect();
    assert!(
        names.len() > 50,
        "docs/spec.md names only {} tests",
        names.len()
    );
    let missing: Vec<String> = names
        .iter()
        .filter(|(file, test)| {
            let source =
                std::fs::read_to_string(root.join(format!("{file}.rs"))).unwrap_or_default();
            !source.contains(&format!("fn {test}("))
        })
        .map(|(file, test)| format!("{file}.rs::{test}"))
        .collect();
    assert!(
        missing.is_empty(),
        "docs/spec.md names tests that do not exist: {missing:#?}"
    );
}
