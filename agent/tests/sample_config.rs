//! The sample configuration is one that this program takes, with and without what is commented out.

use std::fs;
use std::path::Path;

use foreshore_agent::config::Config;

const SAMPLE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../configs/agent.toml");

#[test]
fn the_sample_is_valid_as_it_stands() {
    Config::load(Path::new(SAMPLE)).expect("configs/agent.toml is valid");
}

#[test]
fn every_registry_key_of_the_sample_exists() {
    let text = fs::read_to_string(SAMPLE).expect("the sample is there");
    let (before, commented) = text
        .split_once("# [registries")
        .expect("the sample shows a registry");
    let keys = commented.replace("\n# ", "\n");
    let dir = tempfile::tempdir().expect("a temporary directory can be made");
    let path = dir.path().join("agent.toml");
    fs::write(&path, format!("{before}[registries{keys}")).expect("it is writable");
    let config = Config::load(&path).expect("what is commented out is valid too");
    assert_eq!(config.registries.len(), 1);
}

#[test]
fn every_watchdog_key_of_the_sample_exists() {
    let text = fs::read_to_string(SAMPLE).expect("the sample is there");
    let (before, commented) = text
        .split_once("# [watchdog]")
        .expect("the sample shows a watchdog");
    let (keys, after) = commented
        .split_once("\n\n")
        .expect("registries come after it");
    let keys = keys.replace("\n# ", "\n");
    let dir = tempfile::tempdir().expect("a temporary directory can be made");
    let path = dir.path().join("agent.toml");
    fs::write(&path, format!("{before}[watchdog]{keys}\n\n{after}")).expect("it is writable");
    let config = Config::load(&path).expect("what is commented out is valid too");
    let watchdog = config.watchdog.expect("it is not commented out any more");
    assert_eq!(watchdog.timeout.millis(), 60_000);
}
