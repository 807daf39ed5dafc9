//! `foreshore-agent doctor` on the real machine: what it tries, how it ends, and that nothing is left. Needs root and
//! `openssl`.

#![expect(
    clippy::unwrap_used,
    unreachable_pub,
    reason = "this is a test in several files"
)]

#[path = "doctor/bed.rs"]
mod bed;
#[path = "doctor/hub.rs"]
mod hub;
#[path = "doctor/state.rs"]
mod state;

use std::collections::BTreeSet;

use bed::{Bed, assert_root};
use foreshore_agent::doctor::CheckId;

#[test]
fn every_check_is_reported_in_order_and_documented() {
    let bed = Bed::new();
    let report = bed.doctor();
    let ids: Vec<String> = report
        .checks()
        .iter()
        .map(|check| check.id.clone())
        .collect();
    let expected: Vec<&str> = CheckId::ALL.iter().map(|id| id.as_str()).collect();
    assert_eq!(ids, expected);
    let page = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/guide/doctor.md");
    let page = std::fs::read_to_string(page).unwrap();
    let documented: BTreeSet<&str> = page
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split_once('`'))
        .map(|(id, _)| id)
        .filter(|id| id.contains('.'))
        .collect();
    assert_eq!(documented, expected.into_iter().collect());
}

#[test]
fn a_device_that_is_well_ends_with_0_and_what_is_wrong_with_1_and_misuse_with_2() {
    assert_root();
    let bed = Bed::new();
    let report = bed.doctor();
    assert_eq!(report.errors(), Vec::<String>::new(), "{report:#?}");
    assert_eq!(report.code, Some(0));
    for id in [
        "host.seccomp",
        "host.shim",
        "namespace.mount",
        "namespace.pid",
        "namespace.network",
        "state.sync",
        "state.overlay",
        "hub.connect",
        "config.secrets",
    ] {
        assert_eq!(report.of(id).level, "ok", "{report:#?}");
    }

    std::fs::remove_file(bed.token()).unwrap();
    let report = bed.doctor();
    assert_eq!(report.code, Some(1));
    let secrets = report.of("config.secrets");
    assert_eq!(secrets.level, "error");
    assert!(secrets.fix.unwrap().contains("install -m 600"));

    assert_eq!(bed.run(&["doctor", "--nonsense"]).status.code(), Some(2));
    assert_eq!(bed.run(&["doctor", "-o", "xml"]).status.code(), Some(2));
    assert_eq!(bed.run(&["doctor-try", "nonsense"]).status.code(), Some(2));
    assert_eq!(bed.run(&["doctor-try"]).status.code(), Some(2));
}

#[test]
fn people_get_one_aligned_line_a_check_and_the_fix_below() {
    let bed = Bed::new();
    bed.open_token();
    let output = bed.run(&["doctor"]);
    let text = String::from_utf8(output.stdout).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    let at = lines
        .iter()
        .position(|line| line.contains("config.secrets"))
        .unwrap();
    assert!(
        lines[at].starts_with("warning  config.secrets       others than root"),
        "{text}"
    );
    let fix = format!(
        "         fix: chown root {0} && chmod 600 {0}",
        bed.token().display()
    );
    assert_eq!(lines[at + 1], fix);
    assert!(lines.last().unwrap().starts_with("0 errors, "), "{text}");
    // What the fix says is the fix.
    let fixed = std::process::Command::new("sh")
        .args(["-c", fix.trim().strip_prefix("fix: ").unwrap()])
        .status();
    assert!(fixed.unwrap().success());
    assert_eq!(bed.doctor().of("config.secrets").level, "ok");
}

#[test]
fn a_configuration_that_is_wrong_or_missing_is_a_finding_and_the_rest_is_looked_at() {
    let bed = Bed::new();
    bed.configure("nonsense = 1\n");
    let report = bed.doctor();
    assert_eq!(report.code, Some(1));
    let file = report.of("config.file");
    assert!(
        file.found.contains("nonsense") && file.found.contains("line"),
        "{file:?}"
    );
    assert_eq!(report.of("hub.connect").level, "info");
    assert_eq!(report.of("namespace.mount").level, "ok");

    std::fs::remove_file(bed.config()).unwrap();
    let report = bed.doctor();
    assert_eq!(report.code, Some(1));
    assert!(report.of("config.file").found.contains("there is no"));
}
