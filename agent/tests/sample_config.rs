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
fn the_sample_policy_is_valid_and_allows_what_the_sample_app_asks_for() {
    use foreshore_agent::policy;
    let text =
        fs::read_to_string(SAMPLE.replace("agent.toml", "policy.toml")).expect("it is there");
    let policy: policy::Policy = toml::from_str(&text).expect("configs/policy.toml is valid");
    let app = fs::read(SAMPLE.replace("agent.toml", "apps/gateway.yaml")).expect("it is there");
    let app = foreshore_protocol::manifest::parse(&app).expect("the sample app is valid");
    let grant = policy.grant(&app.metadata.name);
    for (name, service) in &app.spec.services {
        grant
            .allows(name.as_str(), service)
            .expect("the samples go together");
    }
    let other = policy.grant(&"other".parse().expect("a name"));
    let asks = |service| other.allows("modbus", service).is_err();
    assert!(app.spec.services.values().any(asks));
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
