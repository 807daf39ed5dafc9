//! Manifests of apps and disruption budgets, YAML and JSON, and the releases that are made of apps.

use std::collections::BTreeMap;

use foreshore_protocol::manifest::{self, App, Manifest, ManifestError};
use foreshore_protocol::release::{MAX_RELEASE_BYTES, Release, ReleaseError};

use crate::{accepted, memory};

/// What an image is pinned to.
const PIN: &str =
    "docker.io/library/x@sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

/// One manifest.
///
/// # Panics
/// When it does not come back as written, no release can be made of it, an error names no place, or it takes too much memory.
pub fn run(bytes: &[u8]) {
    // Which kind it is may be looked for first, in a document that is then thrown away.
    let any = memory::within((1 << 20) + 256 * bytes.len(), || manifest::parse_any(bytes));
    let app = manifest::parse(bytes);
    let budget = manifest::parse_budget(bytes);
    match &any {
        Ok(Manifest::App(found)) => {
            accepted();
            assert_eq!(app.as_ref().ok(), Some(&**found));
            assert!(budget.is_err(), "it is of two kinds");
            taken(found);
        }
        Ok(Manifest::DisruptionBudget(found)) => {
            accepted();
            assert_eq!(budget.as_ref().ok(), Some(found));
            assert!(app.is_err(), "it is of two kinds");
            let written = serde_json::to_vec(found).expect("a budget can be written");
            assert_eq!(manifest::parse_budget(&written).ok().as_ref(), Some(found));
        }
        Err(error) => {
            assert!(
                app.is_err() && budget.is_err(),
                "it is of a kind and refused"
            );
            refused(bytes, error);
        }
    }
    for error in [app.err(), budget.err()].iter().flatten() {
        refused(bytes, error);
    }
}

fn refused(bytes: &[u8], error: &ManifestError) {
    let length = error.to_string().len();
    assert!(
        length <= 4096,
        "{length} bytes of message for {} of manifest",
        bytes.len()
    );
    match error {
        ManifestError::TooLarge { size } => assert_eq!(*size, bytes.len()),
        ManifestError::Encoding { offset } => assert!(*offset < bytes.len()),
        ManifestError::Syntax {
            line,
            column,
            message,
        } => {
            // YAML ends lines with CR as well.
            let lines = bytes
                .iter()
                .filter(|byte| matches!(byte, b'\n' | b'\r'))
                .count();
            assert!(
                (1..=lines as u64 + 2).contains(line),
                "line {line} of {lines}"
            );
            assert!(
                (1..=bytes.len() as u64 + 2).contains(column),
                "column {column}"
            );
            assert!(!message.is_empty());
        }
        ManifestError::Meaning { path, message } => {
            assert!(!path.is_empty() && !message.is_empty());
        }
    }
}

fn taken(app: &App) {
    let written = serde_json::to_vec(app).expect("an app can be written");
    if written.len() <= manifest::MAX_MANIFEST_BYTES {
        let again = manifest::parse(&written);
        let text = String::from_utf8_lossy(&written);
        assert_eq!(again.as_ref().ok(), Some(app), "{again:?} for {text}");
    }
    let policy = &app.spec.rollout;
    for pace in policy.pace.iter().chain([&policy.tail.pace]) {
        for successes in [0, 1, 7, u32::MAX] {
            assert!(pace.interval_ms(successes) <= 60_000);
        }
    }
    let names = app.spec.services.keys().cloned();
    let pinned: BTreeMap<_, _> = names.map(|name| (name, PIN.to_owned())).collect();
    match Release::from_app(app, &pinned) {
        Ok(release) => super::release::check(&release),
        Err(ReleaseError::TooLarge { size }) => assert!(size > MAX_RELEASE_BYTES),
        Err(error) => panic!("a manifest that holds makes no release: {error:?}"),
    }
}
