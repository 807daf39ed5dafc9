//! `foreshore` as a process: exit codes, what goes where, and what it asks the hub.

#![expect(clippy::unwrap_used, reason = "a test fails where it stands")]

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::Stdio;

#[path = "support/hub.rs"]
mod hub;

use hub::{Answer, FakeHub, foreshore, stderr, stdout};

const MANIFEST: &str = "apiVersion: foreshore/v1\nkind: App\nmetadata: {name: web}\nspec:\n  services:\n    web: {image: 'hub.internal/demo:v1'}\n";
const DIGEST: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

fn rollout(state: &str, wave: &str, device: &str) -> Answer {
    Answer::json(format!(
        r#"{{"id":4,"app":"web","from":null,"to":"{DIGEST}","state":"{state}","message":null,
        "waves":[{{"ordinal":1,"target":{{"count":1}},"state":"{wave}","devices":1,"succeeded":0,"failed":0,"deferred":0,"bakeUntilMs":null}}],
        "assignments":[{{"device":"gw-1","wave":1,"state":{device},"message":null}}],"createdMs":1,"finishedMs":null}}"#
    ))
}

fn listed(answer: &Answer) -> Answer {
    Answer::json(format!(r#"{{"items":[{}]}}"#, answer.2))
}

fn manifest_file(text: &str) -> (tempfile::TempDir, String) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("app.yaml");
    std::fs::write(&path, text).unwrap();
    let path = path.display().to_string();
    (dir, path)
}

#[test]
fn validate_needs_no_hub() {
    let (_dir, file) = manifest_file(MANIFEST);
    let output = foreshore(&format!("validate -f {file}")).output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(
        stdout(&output),
        format!("{file}: app web, 1 service: valid\n")
    );
}

#[test]
fn every_sample_manifest_is_valid() {
    let configs = concat!(env!("CARGO_MANIFEST_DIR"), "/../configs");
    let mut dirs = vec![std::path::PathBuf::from(configs)];
    let mut checked = 0;
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                dirs.push(path);
            } else if path
                .extension()
                .is_some_and(|extension| extension == "yaml")
            {
                let output = foreshore("validate").arg("-f").arg(&path).output().unwrap();
                assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
                checked += 1;
            }
        }
    }
    assert!(checked >= 2, "the samples are not where this test looks");
}

#[test]
fn the_app_of_the_readme_is_valid() {
    let readme = include_str!("../../README.md");
    let manifest = readme
        .split("```yaml\n")
        .nth(1)
        .unwrap()
        .split("```")
        .next()
        .unwrap();
    let (_dir, file) = manifest_file(manifest);
    let output = foreshore(&format!("validate -f {file}")).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
}

#[test]
fn validate_says_where_it_is_wrong_and_goes_on_to_the_next_file() {
    let (_dir, file) = manifest_file(&MANIFEST.replace("services", "servces"));
    let (_dir, good) = manifest_file(MANIFEST);
    let output = foreshore(&format!("validate -f {file} -f {good} -f /does/not/exist"))
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    let errors = stderr(&output);
    assert!(
        errors.starts_with(&format!("{file}:5:3: ")) && errors.contains("servces"),
        "{errors}"
    );
    assert!(
        errors.contains("/does/not/exist: cannot be read"),
        "{errors}"
    );
    assert!(stdout(&output).contains("valid"));
}

#[test]
fn validate_reads_standard_input_and_speaks_json() {
    let mut child = foreshore("validate -f - -o json")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(b"{\"kind\": \"App\", \"kind\": \"App\"}")
        .unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    let text = stdout(&output);
    assert!(
        text.contains("\"valid\": false") && text.contains("\"line\": 1"),
        "{text}"
    );
}

#[test]
fn apply_sends_the_manifest_as_written() {
    let (_dir, file) = manifest_file(MANIFEST);
    let answer = format!(
        r#"{{"app":"web","release":"{DIGEST}","rollout":4,"outcome":"created","devices":5}}"#
    );
    let hub = FakeHub::start(vec![Answer::json(answer)]);
    let output = hub.run(&format!("apply -f {file}"));
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert_eq!(
        stdout(&output),
        "app/web created at release e3b0c44298fc; rollout 4 over 5 devices\n"
    );
    assert!(stderr(&output).contains("foreshore rollout status -w web"));
    let asked = &hub.asked()[0];
    assert_eq!(asked.line, "PUT /api/v1/apps/web");
    assert_eq!(asked.body, MANIFEST.as_bytes());
    assert!(
        asked
            .headers
            .contains(&"authorization: bearer secret-1".to_owned())
    );
}

#[test]
fn one_wrong_manifest_stops_all_before_the_first_is_sent() {
    let (_dir, good) = manifest_file(MANIFEST);
    let (_dir, bad) = manifest_file("kind: Ap");
    let hub = FakeHub::start(vec![]);
    let output = hub.run(&format!("apply -f {good} -f {bad}"));
    assert_eq!(output.status.code(), Some(2));
    assert!(hub.asked().is_empty());
}

#[test]
fn a_problem_is_told_with_its_code() {
    let (_dir, file) = manifest_file(MANIFEST);
    let hub = FakeHub::start(vec![Answer::problem(
        422,
        "unknown-image",
        "image hub.internal/demo:v1 is not here; import it",
    )]);
    let output = hub.run(&format!("apply -f {file}"));
    assert_eq!(output.status.code(), Some(2));
    assert_eq!(
        stderr(&output),
        "error[unknown-image]: image hub.internal/demo:v1 is not here; import it\n"
    );
    assert_eq!(stdout(&output), "");
}

#[test]
fn a_refused_token_says_which_one() {
    let hub = FakeHub::start(vec![Answer::problem(401, "unauthorized", "no")]);
    let output = hub.run("get devices");
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("came from FORESHORE_TOKEN"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn a_missing_token_names_the_file() {
    let output = foreshore("get devices --token-file /does/not/exist")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("/does/not/exist") && stderr(&output).contains("--token-file")
    );
}

#[test]
fn an_unreachable_hub_is_one_clear_error() {
    // Bound and never listened on again: nothing answers there.
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let output = foreshore(&format!("get devices --hub http://127.0.0.1:{port}"))
        .env("FORESHORE_TOKEN", "x")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(5));
    let text = stderr(&output);
    assert!(
        text.contains(&format!("cannot reach the hub at http://127.0.0.1:{port}"))
            && text.contains("FORESHORE_HUB"),
        "{text}"
    );
}

#[test]
fn a_hub_that_hangs_is_given_up() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let output = foreshore(&format!("get devices --hub {url} --request-timeout 300ms"))
        .env("FORESHORE_TOKEN", "x")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(5), "{}", stderr(&output));
    assert!(stderr(&output).contains("no answer in time"));
}

#[test]
fn what_is_no_hub_and_no_url_is_said() {
    let hub = FakeHub::start(vec![
        Answer(404, "text/html", "<html>".into()),
        Answer(200, "text/html", "<html>".into()),
    ]);
    let output = hub.run("get devices");
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("status 404"));
    let output = hub.run("get devices");
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("is not what this version expects"));
    let output = hub.run("get devices --hub localhost:1");
    assert_eq!(output.status.code(), Some(2));
}

#[test]
fn plan_can_tell_a_script_whether_something_would_change() {
    let (_dir, file) = manifest_file(MANIFEST);
    let plan = |outcome: &str| {
        Answer::json(format!(
            r#"{{"app":"web","current":null,"release":"{DIGEST}","outcome":"{outcome}","services":[],"waves":[],"warnings":[]}}"#
        ))
    };
    let hub = FakeHub::start(vec![plan("updated"), plan("unchanged"), plan("updated")]);
    let run = |options: &str| hub.run(&format!("plan -f {file} {options}")).status.code();
    assert_eq!(run("--exit-code"), Some(3));
    assert_eq!(run("--exit-code"), Some(0));
    assert_eq!(run(""), Some(0));
    assert_eq!(hub.asked()[0].line, "POST /api/v1/apps/web/plan");
}

#[test]
fn following_a_rollout_prints_changes_and_ends_with_its_outcome() {
    for (end, code) in [
        ("completed", 0),
        ("rolled-back", 3),
        ("aborted", 3),
        ("paused", 4),
    ] {
        let running = rollout("running", "open", r#""offered""#);
        let hub = FakeHub::start(vec![
            listed(&running),
            running,
            rollout("running", "open", r#"{"device":"soaking"}"#),
            rollout(end, "passed", r#"{"device":"succeeded"}"#),
        ]);
        let output = hub.run("rollout status -w web");
        assert_eq!(
            output.status.code(),
            Some(code),
            "{end}: {}",
            stderr(&output)
        );
        let text = stdout(&output);
        assert_eq!(text.matches("wave 1 gw-1: offered").count(), 1, "{text}");
        assert_eq!(text.matches("wave 1 gw-1: soaking").count(), 1, "{text}");
        assert!(text.contains(&format!("rollout 4: {end}")), "{text}");
    }
}

#[test]
fn following_survives_a_hub_restart_and_ends_at_its_timeout() {
    let running = rollout("running", "open", r#""offered""#);
    let hub = FakeHub::start(vec![
        listed(&running),
        Answer::hang_up(),
        Answer(503, "text/plain", "starting".into()),
        rollout("completed", "passed", r#"{"device":"succeeded"}"#),
        listed(&running),
    ]);
    let output = hub.run("rollout status -w web");
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(stderr(&output).contains("trying again"));
    // From here on every answer is 500, but the time is over before the next question.
    let output = hub.run("rollout status -w web --timeout 1ms");
    assert_eq!(output.status.code(), Some(6), "{}", stderr(&output));
    assert!(stderr(&output).contains("rollout 4 is still running after"));
}

#[test]
fn pausing_goes_to_the_newest_rollout() {
    let hub = FakeHub::start(vec![
        listed(&rollout("running", "open", r#""offered""#)),
        rollout("paused", "open", r#""offered""#),
    ]);
    let output = hub.run("rollout pause web");
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert_eq!(hub.asked()[1].line, "POST /api/v1/rollouts/4/pause");
    assert!(stdout(&output).contains("paused after"));
}

#[test]
fn an_image_is_removed_by_its_name_and_kept_while_it_is_used() {
    let hub = FakeHub::start(vec![
        Answer(204, "application/json", String::new()),
        Answer::problem(
            409,
            "image-in-use",
            "image hub.internal/web:1 is used by app shop",
        ),
    ]);
    let output = hub.run("image remove hub.internal/acme/web:1.3");
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert_eq!(stdout(&output), "hub.internal/acme/web:1.3 removed\n");
    assert_eq!(
        hub.asked()[0].line,
        "DELETE /api/v1/images/hub.internal%2Facme%2Fweb%3A1.3"
    );
    let output = hub.run("image remove web:1");
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("is used by app shop"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn a_registry_that_is_away_is_not_a_hub_that_is_away() {
    let hub = FakeHub::start(vec![
        Answer::problem(502, "registry-unreachable", "no"),
        Answer::problem(503, "stopping", "the hub is stopping"),
    ]);
    assert_eq!(hub.run("get apps").status.code(), Some(1));
    assert_eq!(hub.run("get apps").status.code(), Some(5));
}

#[test]
fn events_are_filtered_and_paged() {
    let items = |ids: std::ops::RangeInclusive<u64>| {
        let events: Vec<String> = ids
            .map(|id| {
                let device = if id % 2 == 0 { "gw-2" } else { "gw-1" };
                event(id).replace("gw-1", device)
            })
            .collect();
        Answer::json(format!(r#"{{"items":[{}]}}"#, events.join(",")))
    };
    let ids = |output: &std::process::Output| {
        let text = stdout(output);
        text.lines()
            .map(str::to_owned)
            .collect::<Vec<_>>()
            .join(" ")
    };
    let hub = FakeHub::start(vec![
        items(1..=6),
        items(4..=5),
        items(6..=9),
        Answer::json(r#"{"items":[]}"#),
        items(4..=9),
    ]);
    let output = hub.run("events -o name --device gw-2 --limit 2");
    assert_eq!(ids(&output), "event/4 event/6");
    let output = hub.run("events -o name --device gw-2 --after 3");
    assert_eq!(ids(&output), "event/4 event/6 event/8");
    let output = hub.run("events -o name --after 3 --limit 2");
    assert_eq!(ids(&output), "event/4 event/5");
    assert_eq!(hub.asked()[2].line, "GET /api/v1/events?after=5&limit=1000");
}

fn event(id: u64) -> String {
    format!(
        r#"{{"id":{id},"receivedMs":0,"device":"gw-1","app":"web","service":null,"rollout":null,"kind":"started","message":"m{id}"}}"#
    )
}

#[test]
fn following_events_resumes_after_the_last_one_without_repeating_any() {
    let stream = |ids: &[u64]| {
        let text: String = ids
            .iter()
            .map(|id| format!("id: {id}\ndata: {}\n\n", event(*id)))
            .collect();
        Answer(200, "text/event-stream", text)
    };
    let hub = FakeHub::start(vec![
        Answer::json(format!(r#"{{"items":[{}]}}"#, event(7))),
        stream(&[8, 9]),
        stream(&[9, 10]),
    ]);
    let mut child = hub
        .command("events -w -o json")
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let ids: Vec<String> = lines
        .take(4)
        .map(|line| line.unwrap()[..8].to_owned())
        .collect();
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(
        ids,
        ["{\"id\":7,", "{\"id\":8,", "{\"id\":9,", "{\"id\":10"]
    );
    assert_eq!(hub.asked()[1].line, "GET /api/v1/events/stream?after=7");
    assert_eq!(hub.asked()[2].line, "GET /api/v1/events/stream?after=9");
}

#[test]
fn a_layout_directory_is_sent_as_tar() {
    let dir = tempfile::tempdir().unwrap();
    let blobs = dir.path().join("blobs/sha256");
    std::fs::create_dir_all(&blobs).unwrap();
    std::fs::write(blobs.join("aa"), vec![7; 300_000]).unwrap();
    std::fs::write(dir.path().join("oci-layout"), "{}").unwrap();
    std::fs::write(dir.path().join("index.json"), "{}").unwrap();
    std::fs::write(dir.path().join("not-part-of-it"), "x").unwrap();
    let view = format!(
        r#"{{"reference":"hub.internal/web:1","digest":"{DIGEST}","sizeBytes":5,"platforms":["linux/amd64"],"importedMs":0}}"#
    );
    let hub = FakeHub::start(vec![Answer::json(view)]);
    let line = format!(
        "image import {} --name registry/web:1",
        dir.path().display()
    );
    let output = hub.run(&line);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let asked = &hub.asked()[0];
    assert_eq!(asked.line, "POST /api/v1/images?name=registry%2Fweb%3A1");
    let mut archive = tar::Archive::new(asked.body.as_slice());
    let mut names: Vec<String> = archive
        .entries()
        .unwrap()
        .map(|entry| entry.unwrap().path().unwrap().display().to_string())
        .collect();
    names.sort();
    assert_eq!(
        names,
        [
            "blobs/",
            "blobs/sha256",
            "blobs/sha256/aa",
            "index.json",
            "oci-layout"
        ]
    );
}

#[test]
fn what_is_no_image_is_refused_before_anything_is_sent() {
    let dir = tempfile::tempdir().unwrap();
    let hub = FakeHub::start(vec![]);
    let output = hub.run(&format!("image import {}", dir.path().display()));
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("is not an OCI layout"));
    let output = hub.run("image import /does/not/exist");
    assert_eq!(output.status.code(), Some(2));
    assert!(hub.asked().is_empty());
}

#[test]
fn a_delta_that_cannot_be_made_is_refused_before_anything_is_asked() {
    let hub = FakeHub::start(vec![]);
    for (line, said) in [
        ("--to b.tar --into d", "--from"),
        ("--from a.tar --into d", "--to"),
        ("--from a.tar --to b.tar", "--into"),
        (
            "--from a.tar --to /does/not/exist --into d",
            "/does/not/exist",
        ),
        ("--from a.tar --to b.tar --into d --level 99", "99"),
        ("--from a.tar --to b.tar --into d --platform x", "'x'"),
        (
            "--from a.tar --to hub.internal/UP:1 --into d",
            "hub.internal/UP:1",
        ),
        (
            "--from hub.internal/web --to hub.internal/web:2 --into hub.internal/web:2",
            "hub.internal/web",
        ),
    ] {
        let output = hub.run(&format!("image delta {line}"));
        assert_eq!(output.status.code(), Some(2), "{line}: {}", stderr(&output));
        assert!(
            stderr(&output).contains(said),
            "{line}: {}",
            stderr(&output)
        );
        assert!(output.stdout.is_empty());
    }
    assert!(hub.asked().is_empty());
    // Who does not answer is no image that is not there.
    let line = "image delta --from hub.internal/web:1 --to hub.internal/web:2";
    let output = foreshore(line)
        .env("FORESHORE_HUB", "http://127.0.0.1:1")
        .env("FORESHORE_TOKEN", "secret-1")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(5), "{}", stderr(&output));
    let hub = FakeHub::start(vec![Answer(401, "application/json", String::new())]);
    let output = hub.run(line);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert!(stderr(&output).contains("token"));
}

#[test]
fn deleting_without_a_terminal_needs_a_yes() {
    let hub = FakeHub::start(vec![Answer(202, "application/json", String::new())]);
    let output = hub.run("delete app web");
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("--yes") && hub.asked().is_empty());
    let output = hub.run("delete app web --yes");
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert_eq!(hub.asked()[0].line, "DELETE /api/v1/apps/web");
}

#[test]
fn a_closed_pipe_is_no_error() {
    let mut child = foreshore("completions bash")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(stderr(&output), "");
}

#[test]
fn completions_are_made_for_each_shell() {
    for shell in ["bash", "zsh", "fish"] {
        let output = foreshore(&format!("completions {shell}")).output().unwrap();
        assert!(output.status.success() && stdout(&output).contains("rollout"));
    }
}
