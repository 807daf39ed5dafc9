//! DisruptionBudget manifests: what is accepted, and what is refused with which words.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use foreshore_protocol::id::Labels;
use foreshore_protocol::manifest::{
    Amount, DisruptionBudget, Manifest, ManifestError, parse, parse_any, parse_budget,
};

const FULL: &str = "\
apiVersion: foreshore/v1
kind: DisruptionBudget
metadata: {name: lines}
spec:
  selector: {matchLabels: {role: gateway}}
  groupBy: [site, line]
  maxUnavailable: 20%
  offlineCounts: true
";

fn budget(text: &str) -> DisruptionBudget {
    parse_budget(text.as_bytes()).unwrap()
}

fn labels(pairs: &[(&str, &str)]) -> Labels {
    pairs
        .iter()
        .map(|(key, value)| (key.parse().unwrap(), value.parse().unwrap()))
        .collect()
}

#[test]
fn a_budget_reads_as_written_and_defaults_are_filled_in() {
    let full = budget(FULL);
    assert_eq!(full.metadata.name.as_str(), "lines");
    assert_eq!(full.spec.max_unavailable, Amount::Percent(20));
    assert!(full.spec.offline_counts);
    let keys: Vec<_> = full.spec.group_by.iter().map(AsRef::as_ref).collect();
    assert_eq!(keys, ["site", "line"]);
    let least = "{\"apiVersion\": \"foreshore/v1\", \"kind\": \"DisruptionBudget\", \"metadata\": {\"name\": \"all\"}, \
                 \"spec\": {\"maxUnavailable\": 1}}";
    let least = budget(least);
    assert_eq!(least.spec.max_unavailable, Amount::Count(1));
    assert!(!least.spec.offline_counts && least.spec.group_by.is_empty());
    // What is stored reads back.
    let json = serde_json::to_string(&full).unwrap();
    assert_eq!(budget(&json), full);
    assert_eq!(
        serde_json::from_str::<DisruptionBudget>(&json).unwrap(),
        full
    );
}

#[test]
fn devices_are_grouped_by_label_and_a_missing_one_is_the_empty_value() {
    let budget = budget(FULL);
    let group = |pairs| budget.group_of(&labels(pairs));
    assert_eq!(group(&[("role", "camera"), ("site", "hull")]), None);
    assert_eq!(
        group(&[
            ("role", "gateway"),
            ("site", "hull"),
            ("line", "2"),
            ("x", "y")
        ]),
        Some(labels(&[("line", "2"), ("site", "hull")]))
    );
    assert_eq!(
        group(&[("role", "gateway"), ("site", "hull")]),
        Some(labels(&[("line", ""), ("site", "hull")]))
    );
}

#[test]
fn what_can_never_grant_or_is_not_there_is_refused_with_its_place() {
    let cases = [
        (
            "maxUnavailable: 20%",
            "maxUnavailable: 0",
            "line 7, column 3: expected a count from 1",
        ),
        (
            "maxUnavailable: 20%",
            "maxUnavailable: 0%",
            "line 7, column 3: expected a count from 1",
        ),
        (
            "maxUnavailable: 20%",
            "maxUnavailable: 101%",
            "line 7, column 3: expected a count from 1",
        ),
        (
            "  maxUnavailable: 20%\n",
            "",
            "missing key `maxUnavailable`",
        ),
        (
            "maxUnavailable",
            "minAvailable",
            "line 7, column 3: key `minAvailable` does not exist; use `maxUnavailable`",
        ),
        (
            "offlineCounts",
            "offlinecounts",
            "did you mean `offlineCounts`?",
        ),
        ("groupBy", "rollout", "key `rollout` belongs to `kind: App`"),
        (
            "[site, line]",
            "[site, site]",
            "spec.groupBy[1]: label site is named twice; keep one",
        ),
        (
            "[site, line]",
            "[a, b, c, d, e, f, g, h, i]",
            "spec.groupBy: at most 8 labels are allowed",
        ),
        ("[site, line]", "[\"\"]", "label key is empty"),
        ("name: lines", "name: Lines", "does not match"),
        (
            "offlineCounts: true",
            "offlineCounts: yes",
            "expected true or false",
        ),
        (
            "selector: {",
            "selector: {matchLabel: {a: b}, ",
            "did you mean `matchLabels`?",
        ),
    ];
    for (from, to, message) in cases {
        assert!(FULL.contains(from), "{from}");
        let text = FULL.replace(from, to);
        let error = parse_any(text.as_bytes()).unwrap_err().to_string();
        assert!(error.contains(message), "{text}\n{error}\nnot: {message}");
    }
}

#[test]
fn the_kind_decides_what_a_manifest_is_read_as() {
    let app = "apiVersion: foreshore/v1\nkind: App\nmetadata: {name: a}\nspec: {services: {s: {image: a}}}\n";
    assert!(matches!(parse_any(app.as_bytes()), Ok(Manifest::App(_))));
    assert!(matches!(
        parse_any(FULL.as_bytes()),
        Ok(Manifest::DisruptionBudget(_))
    ));
    let crlf = FULL.replace('\n', "\r\n");
    assert!(matches!(
        parse_any(crlf.as_bytes()),
        Ok(Manifest::DisruptionBudget(_))
    ));
    // Where the other kind belongs it is refused, whatever its keys are.
    let budget_as_app = app.replace("kind: App", "kind: DisruptionBudget");
    assert!(matches!(
        parse(budget_as_app.as_bytes()),
        Err(ManifestError::Meaning { path, .. }) if path == "kind"
    ));
    let app_as_budget = FULL.replace("kind: DisruptionBudget", "kind: App");
    assert!(matches!(
        parse_budget(app_as_budget.as_bytes()),
        Err(ManifestError::Meaning { path, .. }) if path == "kind"
    ));
    let neither = FULL.replace("DisruptionBudget", "Pod");
    let error = parse_any(neither.as_bytes()).unwrap_err().to_string();
    assert!(
        error.contains("`Pod` is not known here; use one of App, DisruptionBudget"),
        "{error}"
    );
    // One that cannot be read is still told what its own keys are.
    let broken = FULL.replace("offlineCounts: true", "offlineCount: &x true");
    let error = parse_any(broken.as_bytes()).unwrap_err().to_string();
    assert!(error.contains("did you mean `offlineCounts`?"), "{error}");
}
