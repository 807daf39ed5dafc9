//! Manifests as users write them: what is accepted, and what is said about what is not.

use std::fmt::Write as _;
use std::path::Path;

use foreshore_protocol::manifest::{self, App, MAX_MANIFEST_BYTES, ManifestError};
use foreshore_protocol::release::{MAX_RELEASE_BYTES, Release};

/// A manifest with `service` added to its one service.
fn with(service: &str) -> String {
    format!("{}{service}", base())
}

/// A manifest with `spec` added below its services.
fn with_spec(spec: &str) -> String {
    format!("{}  {spec}\n", base())
}

fn base() -> &'static str {
    "apiVersion: foreshore/v1\nkind: App\nmetadata: {name: web}\nspec:\n  services:\n    web:\n      image: acme/web:1\n"
}

fn json() -> &'static str {
    "{\n\t\"apiVersion\": \"foreshore/v1\",\n\t\"kind\": \"App\",\n\t\"metadata\": {\"name\": \"web\"},\n\t\"spec\": {\"services\": {\"web\": {\"image\": \"acme/web:1\"}}}\n}\n"
}

fn replaced(from: &str, to: &str) -> String {
    assert!(base().contains(from), "{from}");
    base().replace(from, to)
}

fn json_with(service: &str) -> String {
    json().replace("\"acme/web:1\"", &format!("\"acme/web:1\", {service}"))
}

/// What each of `manifests` is refused with, one a line.
fn refusals(manifests: &[(&str, String)]) -> String {
    manifests
        .iter()
        .fold(String::new(), |mut out, (name, manifest)| {
            let error = manifest::parse(manifest.as_bytes())
                .expect_err(name)
                .to_string();
            assert!(!error.contains('\n'), "{name}: {error}");
            assert!(error.matches("line ").count() <= 1, "{name}: {error}");
            assert!(error.len() <= 1200, "{name}: {} bytes", error.len());
            writeln!(out, "{name}: {error}").expect("writing to a String cannot fail");
            out
        })
}

#[test]
fn what_is_not_yaml_or_not_plain_yaml() {
    let refused = refusals(&[
        ("empty", String::new()),
        ("only a comment", "# later\n".to_owned()),
        ("null", "null\n".to_owned()),
        ("scalar", "hello\n".to_owned()),
        ("list", "- a\n".to_owned()),
        ("tab", replaced("  services", "\tservices")),
        ("indentation", with("     user: root\n")),
        ("two colons", with("      user: a: b\n")),
        ("unclosed", with("      command: [\"a\"\n")),
        ("control character", replaced("acme/web:1", "\"a\u{1}\"")),
        ("two documents", format!("{}---\n{}", base(), base())),
        ("anchor", replaced("image: a", "image: &x a")),
        ("alias", replaced("image: acme/web:1", "image: *x")),
        ("merge key", with("      <<: {read_only: true}\n")),
        (
            "merge key in environment",
            with("      environment: {<<: {A: b}}\n"),
        ),
        ("tag", replaced("image: a", "image: !env a")),
        ("include", replaced("acme/web:1", "!include x")),
        ("list as key", format!("? [a]\n: b\n{}", base())),
        ("deep flow", "[".repeat(100_000)),
        ("deep maps", "{a: ".repeat(5000)),
        ("json, cut", json()[..json().len() - 6].to_owned()),
        ("json, more behind it", format!("{} x", json())),
    ]);
    insta::assert_snapshot!(refused);
}

#[test]
fn keys_that_are_given_twice() {
    let refused = refusals(&[
        ("in a service", with("      image: b\n")),
        ("services", with("    web: {image: b}\n")),
        (
            "environment",
            with("      environment:\n        A: 1\n        A: 2\n"),
        ),
        ("environment list", with("      environment: [A=1, A=2]\n")),
        ("labels", with_spec("selector: {matchLabels: {a: b, a: c}}")),
        ("json", json_with("\"user\": \"a\", \"user\": \"b\"")),
        (
            "json environment",
            json_with("\"environment\": {\"A\": 1, \"\\u0041\": 2}"),
        ),
        (
            "json top",
            json().replace("\"kind\"", "\"kind\": \"App\", \"kind\""),
        ),
    ]);
    insta::assert_snapshot!(refused);
}

#[test]
fn keys_that_do_not_exist_or_are_not_built() {
    let mut manifests: Vec<(&str, String)> = [
        "imag: b",
        "memory: 32m",
        "workingDir: /",
        "1: x",
        "ports: [\"80:80\"]",
        "depends_on: {db: {condition: service_started, restart: true}}",
        "lifecycle: {preStop: {}}",
        "pre_stop: [{command: [a], user: root}]",
        "deploy: {replicas: 3}",
        "deploy: {update_config: {parallelism: 2}}",
        "deploy: {update_config: {order: start-first, keepOld: 1h}}",
        "deploy: {update_config: {order: start-first, kept_old: 1h}}",
        "device_cgroup_rules: [\"c 1:3 rw\"]",
        "healthcheck: {test: [a]}",
        "build: .",
        "networks: [a]",
        "secrets: [{source: a, name: x}]",
        "configs: [{source: a, path: /x}]",
        "privileged: true",
        "cap_add: [NET_ADMIN]",
        "env_file: .env",
        "container_name: x",
        "hostname: x",
        "livenessProbe: {tcp: {port: 1}}",
        "probes: {alive: {tcp: {port: 1}}}",
        "probes: {readiness: {httpGet: {port: 1}}}",
        "probes: {readiness: {http: {port: 1, scheme: https}}}",
        "logging: {driver: json-file}",
        "\"a\\n\\e[31mb\": c",
    ]
    .into_iter()
    .map(|line| (line, with(&format!("      {line}\n"))))
    .collect();
    for line in [
        "volumes: {data: }",
        "replicas: 3",
        "selector: {devices: [gw-1]}",
        "selector: {matchFields: []}",
        "rollout: {approval: each-wave}",
        "rollout: {waves: [{canary: {by: [model]}}]}",
        "rollout: {waves: [{percent: 10, soak: 5m}]}",
        "rollout: {canary: {by: [model], count: 1}}",
        "rollout: {windows: [{cron: 0 2 * * *, for: 2h}]}",
        "rollout: {window: {schedule: 0 2 * * *, for: 2h}}",
        "rollout: {window: {cron: 0 2 * * *, duration: 2h}}",
        "rollout: {downloadWindow: {cron: 0 2 * * *, for: 2h, tz: UTC}}",
        "rollout: {window: {cron: 0 2 * * *}}",
        "rollout: {window: {for: 2h}}",
        "rollout: {max_unavailable: 1}",
        "rollout: {strategy: x}",
    ] {
        manifests.push((line, with_spec(line)));
    }
    manifests.push(("compose file", "services: {web: {image: a}}\n".to_owned()));
    manifests.push((
        "huge key",
        with(&format!("      ? {}\n      : 1\n", "k".repeat(100_000))),
    ));
    let refused = refusals(&manifests);
    insta::assert_snapshot!(refused);
}

#[test]
fn values_of_the_wrong_type_or_out_of_range() {
    let service = [
        "read_only: yes",
        "restart: false",
        "depends_on: db",
        "depends_on: [db]",
        "depends_on: [web]",
        "depends_on: [db, db]",
        "depends_on: {db: {condition: healthy}}",
        "depends_on: {db: }",
        "pre_stop: [{command: []}]",
        "deploy: {update_config: {order: first}}",
        "deploy: {update_config: {keep_old: 1h}}",
        "deploy: {update_config: {order: stop-first, keep_old: 1h}}",
        "deploy: {update_config: {order: start-first, keep_old: 0}}",
        "deploy: {update_config: {order: start-first, keep_old: 25h}}",
        "deploy: {update_config: {order: start-first, keep_old: yes}}",
        "update_lock: /run/lock",
        "probes: {liveness: {tcp: {port: 1}, success_threshold: 2}}",
        "probes: {startup: {tcp: {port: 1}, initial_delay: 10m}}",
        "restart: on-failure:x",
        "pids_limit: -1",
        "pids_limit: 1.5",
        "pids_limit: 0",
        "pids_limit: 32769",
        "mem_limit: 12 parsecs",
        "mem_limit: .nan",
        "mem_limit: [1]",
        "mem_limit:",
        "mem_limit: 3m",
        "cpus: \"0\"",
        "cpus: 0.001",
        "cpus: 1e-9",
        "stop_grace_period: 10",
        "stop_grace_period: 61m",
        "command: sleep 5",
        "command: []",
        "command: [\"\"]",
        "command: [\"a\\0\"]",
        "entrypoint: []",
        "environment:",
        "environment: {A: }",
        "environment: {A: {b: c}}",
        "environment: [A]",
        "environment: {\"\": a}",
        "environment: {\"A=B\": a}",
        "environment: {A: \"\\0\"}",
        "environment: {A: \"${device.labels.site}\"}",
        "command: [\"echo\", \"${HOME}\"]",
        "user: \"a b\"",
        "user: \"1:2:3\"",
        "user: 4294967295",
        "working_dir: srv",
        "working_dir: /a/../b",
        "network_mode: bridge",
        "stop_signal: SIGWINCH",
        "tmpfs: /run:size=x",
        "tmpfs: /run:size=0",
        "tmpfs: /",
        "tmpfs: [/a, /a]",
        "volumes: [data]",
        "volumes: [{type: bind}]",
        "volumes: [\"data:/proc/x\"]",
        "volumes: [\"data:/dev\"]",
        "volumes: [\"/a/../b:/c\"]",
        "volumes: [\"a:/x\", \"b:/x\"]",
        "volumes: [\"a:/x/\"]",
        "devices: [ttyUSB0]",
        "devices: [/etc/passwd]",
        "devices: [/dev/../etc/passwd]",
        "devices: [/dev/ttyUSB*]",
        "devices: [/dev/null]",
        "devices: [\"/dev/x:/dev/pts/0\"]",
        "devices: [\"/dev/x:/etc/x\"]",
        "devices: [\"/dev/x:m\"]",
        "devices: [\"/dev/x:/dev/y:rr\"]",
        "devices: [\"/dev/x:/dev/y:rw:z\"]",
        "devices: [/dev/x, \"/dev/y:/dev/x\"]",
        "devices: [/dev/x, \"/dev/y:/dev/x/y\"]",
        "probes: {readiness: {}}",
        "probes: {readiness: {tcp: {port: 1}, http: {port: 1}}}",
        "probes: {readiness: {tcp: {port: 0}}}",
        "probes: {readiness: {tcp: {port: 70000}}}",
        "probes: {readiness: {http: {port: 1, path: ready}}}",
        "probes: {readiness: {http: {port: 1, path: \"/a\\r\\nHost: b\"}}}",
        "probes: {readiness: {exec: {command: []}}}",
        "probes: {readiness: {tcp: {port: 1}, period: 99ms}}",
        "probes: {readiness: {tcp: {port: 1}, timeout: 0s}}",
        "probes: {readiness: {tcp: {port: 1}, timeout: 6m}}",
        "probes: {readiness: {tcp: {port: 1}, failure_threshold: 0}}",
        "probes: {readiness: {tcp: {port: 1}, success_threshold: 1001}}",
        "probes: {readiness: {tcp: {port: 1}, initial_delay: 5m}}",
        "logging: {max_size: 1}",
        "logging: {max_file: 101}",
    ];
    let spec = [
        "rollout: {waves: [{count: 1, percent: 5}]}",
        "rollout: {waves: [{percent: 10%}]}",
        "rollout: {waves: [10%]}",
        "rollout: {waves: [{}]}",
        "rollout: {waves: [{devices: 1}]}",
        "rollout: {waves: [{count: 0}]}",
        "rollout: {waves: [{percent: 0}]}",
        "rollout: {waves: [{percent: 101}]}",
        "rollout: {waves: [{selector: {}}]}",
        "rollout: {waves: [{count: 1, failureBudget: {count: 0}}]}",
        "rollout: {canary: {by: []}}",
        "rollout: {canary: {by: [model], perStratum: 0}}",
        "rollout: {pace: {perMinute: 0}}",
        "rollout: {pace: {perMinute: 10, maxPerMinute: 5}}",
        "rollout: {tail: {pace: {perMinute: 1, doubleEvery: 0}}}",
        "rollout: {priority: 101}",
        "rollout: {startAt: tomorrow}",
        "rollout: {startAt: 9999-12-31T23:59:59-01:00}",
        "rollout: {maxRestarts: 11}",
        "rollout: {maxRestarts: -1}",
        "rollout: {requireHub: 59s}",
        "rollout: {requireHub: 2d}",
        "rollout: {requireHub: true}",
        "rollout: {requiresFrom: 5f2c91ab03de}",
        "rollout: {requiresFrom: [5f2c91ab03d]}",
        "rollout: {requiresFrom: [v2.9]}",
        "rollout: {window: {cron: x, for: 2h}}",
        "rollout: {window: {cron: 0 26 * * *, for: 2h}}",
        "rollout: {window: {cron: 0 2 30 2 *, for: 2h}}",
        "rollout: {window: {cron: 0 2 * * *, for: 59s}}",
        "rollout: {downloadWindow: {cron: 0 2 * * *, for: 7d1ms}}",
        "rollout: {window: {cron: 0 2 * * *, for: 2h, timezone: Mars/Crater Lake}}",
        "rollout: {window: 0 2 * * *}",
        "selector: {matchExpressions: [{key: site, operator: In}]}",
        "selector: {matchExpressions: [{key: site, operator: Exists, values: [a]}]}",
        "selector: {matchExpressions: [{key: site, operator: Equals, values: [a]}]}",
        "rollout: {waves: [{count: 5}, {percent: 10}, {count: 5}]}",
        "rollout: {waves: [{percent: 10}, {percent: 5}]}",
        "rollout: {waves: [{percent: 100}, {count: 5}]}",
        "rollout: {maxUnavailable: 0}",
        "rollout: {maxUnavailable: 101%}",
        "rollout: {progressDeadline: 0s}",
        "rollout: {failureBudget: {count: 0}}",
        "rollout: {failureBudget: {percent: 101}}",
        "rollout: {failureBudget: {minSample: 0}}",
        "rollout: {onFailure: retry}",
        "selector: {matchLabels: {a: \"b c\"}}",
    ];
    let image = [
        "~",
        "\"\"",
        "\"a b\"",
        "acme//web",
        "acme/Web",
        "a:",
        "a@sha256:00",
        "a:b:c",
        "\"${IMAGE}\"",
        "host:99999/a",
        "-a",
    ];
    let mut manifests: Vec<(&str, String)> = service
        .into_iter()
        .map(|line| (line, with(&format!("      {line}\n"))))
        .collect();
    manifests.extend(spec.into_iter().map(|line| (line, with_spec(line))));
    manifests.extend(
        image
            .into_iter()
            .map(|text| (text, replaced("acme/web:1", text))),
    );
    manifests.extend([
        ("kind", replaced("App", "Pod")),
        ("apiVersion", replaced("foreshore/v1", "foreshore/v2")),
        ("app name", replaced("name: web", "name: Web_1")),
        ("service name", replaced("    web:", "    Web:")),
        ("no image", replaced("image: acme/web:1", "read_only: true")),
        (
            "no services",
            replaced("    web:\n      image: acme/web:1\n", ""),
        ),
        ("no kind", "apiVersion: foreshore/v1\n".to_owned()),
    ]);
    let refused = refusals(&manifests);
    insta::assert_snapshot!(refused);
}

#[test]
fn size_is_looked_at_first_and_the_release_must_fit() {
    let huge = format!("# {}\n{}", "x".repeat(MAX_MANIFEST_BYTES), base());
    assert!(matches!(
        manifest::parse(huge.as_bytes()),
        Err(ManifestError::TooLarge { .. })
    ));
    assert!(matches!(
        manifest::parse(b"a: \xff"),
        Err(ManifestError::Encoding { offset: 3 })
    ));
    let long = with(&format!(
        "      environment: {{A: \"{}\"}}\n",
        "x".repeat(MAX_RELEASE_BYTES)
    ));
    let error = manifest::parse(long.as_bytes()).unwrap_err().to_string();
    assert!(
        error.starts_with("spec.services: the release would have"),
        "{error}"
    );
    let services: String = (0..33)
        .map(|i| format!("    s{i}: {{image: a}}\n"))
        .collect();
    let error = manifest::parse(with(&services).as_bytes())
        .unwrap_err()
        .to_string();
    assert_eq!(error, "spec.services: an app has 1 to 32 services, not 34");
    let waves: Vec<String> = (1..=33).map(|i| format!("{{count: {i}}}")).collect();
    let error = manifest::parse(
        with_spec(&format!("rollout: {{waves: [{}]}}", waves.join(", "))).as_bytes(),
    );
    assert_eq!(
        error.unwrap_err().to_string(),
        "spec.rollout.waves: at most 32 waves are allowed, not 33"
    );
}

#[test]
fn scalars_in_the_environment_stay_as_they_are_written() {
    let app = parse(&with(
        "      environment: {A: 1.0, B: true, C: 0x10, D: 1e400, E: 007, F: 2026-01-01, G: yes, H: \"\"}\n",
    ));
    let environment: Vec<String> = service(&app)
        .environment
        .iter()
        .map(|(key, value)| format!("{key}={value}"))
        .collect();
    assert_eq!(
        environment,
        [
            "A=1.0",
            "B=true",
            "C=0x10",
            "D=1e400",
            "E=007",
            "F=2026-01-01",
            "G=yes",
            "H="
        ]
    );
}

#[test]
fn json_is_read_like_yaml() {
    let text = json_with(
        "\"environment\": {\"A\": \"x\\/\\u00e9\\ud83d\\ude00\", \"B\": 1.0}, \"cpus\": 0.5",
    );
    let app = parse(&text);
    assert_eq!(service(&app).environment["A"], "x/é😀");
    assert_eq!(service(&app).environment["B"], "1.0");
    assert_eq!(parse(json()), parse(base()));
    // What serde_json writes is read back to an equal value.
    let written = serde_json::to_string_pretty(&app).unwrap();
    assert_eq!(parse(&written), app);
}

#[test]
fn byte_order_mark_line_ends_directives_and_document_marks_do_not_matter() {
    let plain = parse(base());
    for text in [
        format!("\u{feff}{}", base()),
        base().replace('\n', "\r\n"),
        format!("---\n{}...\n", base()),
        format!("%YAML 1.2\n---\n{}", base()),
        with("      read_only: true\n      restart: \"always\"\n"),
        with("      restart: unless-stopped\n      network_mode: none\n  rollout:\n"),
    ] {
        assert_eq!(parse(&text), plain, "{text}");
    }
    assert_eq!(
        service(&parse(&with("      restart: no\n")))
            .restart
            .to_string(),
        "no"
    );
}

#[test]
fn mixed_waves_and_the_edges_of_ranges_are_accepted() {
    for service in [
        "mem_limit: 4m",
        "mem_limit: 4194304",
        "cpus: 0.01",
        "pids_limit: 32768",
        "stop_grace_period: 1h",
        "stop_grace_period: 0s",
        "user: nobody",
        "user: 0",
        "user: \"1000:www-data\"",
        "working_dir: /",
        "tmpfs: [/tmp, /run:size=4k]",
        "volumes: [\"/proc:/host/proc:ro\", \"data:/devices\", \"/:/host:ro\"]",
        "devices: [/dev/ttyUSB0, \"/dev/i2c-1:r\", \"/dev/serial/by-id/usb-ACME_7-if00:/dev/modem\", \"/dev/x:/dev/sub/y:rwm\"]",
        "environment: [A=b=c, B=]",
        "command: [sh, -c, \"echo $HOME $$ $${HOME}\"]",
        "probes: {readiness: {http: {port: 65535}, timeout: 5m, period: 100ms, success_threshold: 1000}}",
        "logging: {max_size: 4k, max_file: 1}",
        "logging: {max_size: 1g, max_file: 100}",
    ] {
        parse(&with(&format!("      {service}\n")));
    }
    for rollout in [
        "waves: []",
        "waves: [{count: 100}, {percent: 1}, {count: 101}, {percent: 100}]",
        "failureBudget: {count: 1, percent: 0, minSample: 1}",
        "soak: 0s, bake: 0s, progressDeadline: 1ms",
        "maxUnavailable: 100%",
        "maxUnavailable: 1",
        "maxRestarts: 10, requireHub: 1d",
        "requiresFrom: [5f2c91ab03de, \"012345678901\", sha256:5f2c91ab03de]",
        "window: {cron: 0 2 * * *, for: 1m}, downloadWindow: {cron: \"*/15 22-23,0-5 * * mon-fri\", for: 7d, timezone: UTC}",
        "window: {cron: \"30 1 1,15 JAN-mar sun\", for: 2h, timezone: device}",
        "window: {cron: 0 2 29 2 *, for: 2h, timezone: America/Argentina/ComodRivadavia}",
    ] {
        parse(&with_spec(&format!("rollout: {{{rollout}}}")));
    }
    for image in [
        "alpine",
        "alpine:3.20",
        "localhost:5000/a/b_c/d-e.f:V1",
        "registry.lan:5000/x",
        "\"[::1]:5000/x:1\"",
        "ghcr.io/acme/modbus:1.4@sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        "hub.internal/demo:v1",
    ] {
        parse(&replaced("acme/web:1", image));
    }
}

#[test]
fn the_sample_of_a_budget_parses() {
    let sample = include_bytes!("../../configs/budgets/sites.yaml");
    assert_eq!(
        manifest::parse_budget(sample)
            .unwrap()
            .metadata
            .name
            .as_str(),
        "sites"
    );
}

#[test]
fn every_sample_in_the_repository_parses() {
    let configs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs");
    let mut seen = 0;
    for dir in ["apps", "demo"] {
        for entry in std::fs::read_dir(configs.join(dir)).unwrap() {
            let path = entry.unwrap().path();
            if !path
                .extension()
                .is_some_and(|ext| ext == "yaml" || ext == "json")
            {
                continue;
            }
            let bytes = std::fs::read(&path).unwrap();
            let app = manifest::parse(&bytes)
                .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            let pinned = app
                .spec
                .services
                .keys()
                .map(|name| (name.clone(), pinned_image()))
                .collect();
            Release::from_app(&app, &pinned)
                .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            seen += 1;
        }
    }
    assert!(seen >= 4, "only {seen} samples found");
}

fn pinned_image() -> String {
    format!("ghcr.io/acme/web@sha256:{}", "0".repeat(64))
}

fn parse(text: &str) -> App {
    manifest::parse(text.as_bytes()).unwrap_or_else(|error| panic!("{error}\n{text}"))
}

fn service(app: &App) -> &manifest::Service {
    app.spec
        .services
        .values()
        .next()
        .expect("at least one service")
}

#[test]
fn services_that_depend_on_each_other() {
    let app = |services: &str| {
        format!(
            "apiVersion: foreshore/v1\nkind: App\nmetadata: {{name: a}}\nspec: {{services: {{{services}}}}}\n"
        )
    };
    let good = app(
        "web: {image: x, depends_on: {db: {condition: service_healthy}, migrate: {condition: service_completed_successfully}}}, \
         db: {image: x, probes: {readiness: {tcp: {port: 1}}}}, \
         migrate: {image: x, restart: on-failure:3, depends_on: [db]}",
    );
    manifest::parse(good.as_bytes()).unwrap();
    let refused = refusals(&[
        (
            "unknown",
            app("web: {image: x, depends_on: [database]}, db: {image: x}"),
        ),
        ("self", app("web: {image: x, depends_on: [web]}")),
        (
            "cycle",
            app(
                "a: {image: x, depends_on: [b, d]}, b: {image: x, depends_on: [c]}, \
                 c: {image: x, depends_on: [b]}, d: {image: x}",
            ),
        ),
        (
            "no probe",
            app("web: {image: x, depends_on: {db: {condition: service_healthy}}}, db: {image: x}"),
        ),
        (
            "never completes",
            app(
                "web: {image: x, depends_on: {db: {condition: service_completed_successfully}}}, db: {image: x}",
            ),
        ),
    ]);
    insta::assert_snapshot!(refused);
}

#[test]
fn services_without_the_later_keys_keep_their_digest() {
    let app = manifest::parse(base().as_bytes()).unwrap();
    let service = app.spec.services.values().next().unwrap();
    let text = serde_json::to_string(service).unwrap();
    let later = [
        "depends_on",
        "pre_stop",
        "deploy",
        "update_lock",
        "cpu_shares",
        "storage_opt",
        "priority",
        "devices",
        "configs",
        "secrets",
        "blkio_config",
        "liveness",
        "startup",
    ];
    assert!(later.iter().all(|key| !text.contains(key)), "{text}");
    // The digest of the first release of this program.
    assert_eq!(
        foreshore_protocol::release::service_digest(service).to_string(),
        "sha256:2fd11d4e19478cc85b00300f1335572e994addf49cc4045ef1594c3ecfff4554"
    );
}

#[test]
fn shares_layer_sizes_and_priorities() {
    let app = |service: &str| {
        format!(
            "{}
      {service}
",
            base().trim_end()
        )
    };
    let read = |service: &str| {
        let parsed = manifest::parse(app(service).as_bytes()).unwrap();
        parsed.spec.services.into_values().next().unwrap()
    };
    let plain = read("read_only: false");
    assert_eq!(plain.layer_limit(), Some(256 << 20));
    assert_eq!((plain.priority, plain.cpu_shares), (50, None));
    assert_eq!(read("read_only: true").layer_limit(), None);
    let sized = read("read_only: false\n      storage_opt: {size: 100m}");
    assert_eq!(sized.layer_limit(), Some(100 << 20));
    assert_eq!(read("priority: 0").priority, 0);
    assert_eq!(read("cpu_shares: 512").cpu_shares, Some(512));
    let refused = refusals(&[
        (
            "layer too small",
            app("read_only: false\n      storage_opt: {size: 4k}"),
        ),
        ("layer read-only", app("storage_opt: {size: 100m}")),
        (
            "other option",
            app("read_only: false\n      storage_opt: {inodes: 1}"),
        ),
        ("priority", app("priority: 101")),
        ("shares", app("cpu_shares: 1")),
    ]);
    insta::assert_snapshot!(refused);
}

#[test]
fn devices_are_written_as_compose_has_them() {
    use foreshore_protocol::manifest::{DeviceAccess, DeviceMapping};
    for (text, source, target, access) in [
        ("/dev/ttyUSB0", "/dev/ttyUSB0", "/dev/ttyUSB0", "rwm"),
        ("/dev/ttyUSB0:r", "/dev/ttyUSB0", "/dev/ttyUSB0", "r"),
        ("/dev/a:/dev/b", "/dev/a", "/dev/b", "rwm"),
        ("/dev/a:/dev/b:wr", "/dev/a", "/dev/b", "rw"),
    ] {
        let device: DeviceMapping = text.parse().unwrap();
        assert_eq!(
            (device.source.as_str(), device.target.as_str()),
            (source, target)
        );
        assert_eq!(device.access.to_string(), access);
        assert_eq!(device.to_string().parse::<DeviceMapping>().unwrap(), device);
    }
    assert_eq!("rwm".parse(), Ok(DeviceAccess::ALL));
}

#[test]
fn configs_become_part_of_the_services_that_see_them() {
    let text = "apiVersion: foreshore/v1
kind: App
metadata: {name: shop}
spec:
  configs:
    settings: {content: \"site = $${SITE}\\n\"}
  services:
    web:
      image: x
      configs: [settings]
    db:
      image: x
      configs: [{source: settings, target: /etc/db.toml, mode: 0440, uid: 5, gid: \"6\"}]
    log: {image: x}
";
    let app = parse(text);
    let image = format!("hub.internal/x@{}", foreshore_protocol::Digest::of(b"x"));
    let release = |app: &App| {
        let pins = app
            .spec
            .services
            .keys()
            .map(|name| (name.clone(), image.clone()));
        Release::from_app(app, &pins.collect()).unwrap()
    };
    let first = release(&app);
    let web = &first.services["web"].configs[0];
    assert_eq!(
        (web.target.as_str(), web.mode.to_string().as_str()),
        ("/settings", "0444")
    );
    assert_eq!(web.content.as_deref(), Some("site = ${SITE}\n"));
    let db = &first.services["db"].configs[0];
    assert_eq!((db.mode.0, db.uid.0, db.gid.0), (0o440, 5, 6));
    // Devices match running containers by the digest of these bytes.
    let log = foreshore_protocol::release::service_digest(&first.services["log"]);
    let db_bytes = serde_json::to_string(&db).unwrap();
    assert_eq!(
        db_bytes,
        r#"{"source":"settings","target":"/etc/db.toml","mode":"0440","uid":"5","gid":"6","content":"site = ${SITE}\n"}"#
    );
    let mut with_db = first.services["log"].clone();
    with_db.configs.push(db.clone());
    assert_ne!(foreshore_protocol::release::service_digest(&with_db), log);
    let again = Release::from_bytes(&first.to_canonical_json(), &first.digest());
    assert_eq!(again.unwrap(), first);
    // Another text replaces those who see it, and nobody else.
    let second = release(&parse(&text.replace("site =", "place =")));
    for (name, changes) in [("web", true), ("db", true), ("log", false)] {
        let digest = |release: &Release| {
            foreshore_protocol::release::service_digest(&release.services[name])
        };
        assert_eq!(digest(&first) != digest(&second), changes, "{name}");
    }
    // A release without a text, or a manifest that has one in the wrong place, is none.
    let mut empty = first;
    empty.services.values_mut().next().unwrap().configs[0].content = None;
    assert!(empty.check().is_err());
    let refused = refusals(&[
        ("no such config", text.replace("[settings]", "[other]")),
        (
            "nobody has it",
            text.replace("[settings]", "[]")
                .replace("source: settings", "source: other"),
        ),
        (
            "text in the service",
            text.replace("{source: settings,", "{source: settings, content: x,"),
        ),
        ("a file", text.replace("{content:", "{file: x, content:")),
        ("substitution", text.replace("$${", "${")),
        (
            "same place twice",
            text.replace("[settings]", "[settings, settings]"),
        ),
        ("in proc", text.replace("/etc/db.toml", "/proc/db")),
        ("mode", text.replace("0440", "0880")),
        ("setuid", text.replace("0440", "4555")),
        ("owner", text.replace("uid: 5", "uid: root")),
        ("name", text.replace("settings", "settings.toml")),
        ("too large", text.replace("site =", &"x".repeat(20_000))),
    ]);
    insta::assert_snapshot!(refused);
}

#[test]
fn secrets_are_named_in_a_release_and_have_no_values() {
    let text = "apiVersion: foreshore/v1
kind: App
metadata: {name: shop}
spec:
  secrets:
    db-password: {external: true}
    token: {external: true}
  services:
    web:
      image: x
      secrets:
        - db-password
        - {source: token, environment: TOKEN, on_rotate: keep}
    db:
      image: x
      secrets:
        - {source: db-password, target: /run/secrets/pw, mode: 0440, uid: 5, gid: \"6\", environment: PW, on_rotate: SIGHUP}
";
    let app = parse(text);
    let image = format!("hub.internal/x@{}", foreshore_protocol::Digest::of(b"x"));
    let pins = app.spec.services.keys();
    let pins = pins.map(|name| (name.clone(), image.clone())).collect();
    let release = Release::from_app(&app, &pins).unwrap();
    let bytes = release.to_canonical_json();
    assert_eq!(
        Release::from_bytes(&bytes, &release.digest()).unwrap(),
        release
    );
    // Devices match running containers by the digest of these bytes.
    let mounts = |name: &str| serde_json::to_string(&release.services[name].secrets).unwrap();
    assert_eq!(
        mounts("web"),
        r#"[{"source":"db-password","target":"db-password","mode":"0400","on_rotate":"restart"},{"source":"token","mode":"0400","environment":"TOKEN","on_rotate":"keep"}]"#
    );
    assert_eq!(
        mounts("db"),
        r#"[{"source":"db-password","target":"pw","mode":"0440","uid":"5","gid":"6","environment":"PW","on_rotate":"SIGHUP"}]"#
    );
    let refused = refusals(&[
        ("no such secret", text.replace("- db-password", "- other")),
        (
            "nobody has it",
            text.replace(
                "  token: {ext",
                "  third: {external: true}\n    token: {ext",
            ),
        ),
        (
            "a value",
            text.replace("token: {external: true}", "token: {value: hunter2}"),
        ),
        (
            "a file",
            text.replace("token: {external: true}", "token: {file: ./x}"),
        ),
        (
            "not external",
            text.replace("token: {external: true}", "token: {external: false}"),
        ),
        ("elsewhere", text.replace("/run/secrets/pw", "/etc/pw")),
        ("above", text.replace("/run/secrets/pw", "..")),
        ("hidden", text.replace("/run/secrets/pw", ".pw")),
        ("mode", text.replace("0440", "04440")),
        ("owner", text.replace("uid: 5", "uid: 70000")),
        ("rotate", text.replace("SIGHUP", "SIGKILL")),
        ("rotate", text.replace("SIGHUP", "reload")),
        (
            "variable",
            text.replace("environment: PW", "environment: A=B"),
        ),
        (
            "variable twice",
            text.replace(
                "environment: TOKEN",
                "environment: TOKEN}, {source: token, environment: TOKEN",
            )
            .replace(
                "        - db-password\n        - {source: token",
                "        [{source: token",
            )
            .replace("keep}", "keep}]"),
        ),
        (
            "file twice",
            text.replace("- db-password", "- db-password\n        - db-password"),
        ),
        (
            "mounted over",
            text.replace(
                "      secrets:\n        - {",
                "      tmpfs: /run/secrets\n      secrets:\n        - {",
            ),
        ),
        ("short", text.replace("- db-password", "- 5")),
        ("a map", text.replace("- db-password", "- [a]")),
    ]);
    insta::assert_snapshot!(refused);
}

#[test]
fn io_limits_are_written_as_compose_has_them() {
    use foreshore_protocol::manifest::DiskPath;
    let read = |blkio: &str| {
        let app = parse(&with(&format!("      blkio_config: {blkio}\n")));
        app.spec.services.into_values().next().unwrap()
    };
    let compose = "
        weight: 300
        weight_device: [{path: /dev/sda, weight: 400}]
        device_read_bps: [{path: /dev/sdb, rate: '12mb'}]
        device_read_iops: [{path: /dev/sdb, rate: 120}]
        device_write_bps: [{path: state, rate: 1024k}, {path: /dev/disk/by-id/usb-ACME_1-part1, rate: 4096}]
        device_write_iops: [{path: state, rate: 30}]";
    let service = read(compose);
    let config = &service.blkio_config;
    assert_eq!(
        (config.weight, config.weight_device[0].weight),
        (Some(300), 400)
    );
    assert_eq!(config.device_read_bps[0].rate.0, 12 << 20);
    assert_eq!(config.device_write_bps[0].path, DiskPath::State);
    assert_eq!(config.device_write_bps[1].rate.0, 4096);
    assert_eq!(
        (
            config.device_read_iops[0].rate,
            config.device_write_iops[0].rate
        ),
        (120, 30)
    );
    // Devices match running containers by the digest of these bytes.
    let bytes = serde_json::to_string(config).unwrap();
    assert_eq!(
        bytes,
        r#"{"weight":300,"weight_device":[{"path":"/dev/sda","weight":400}],"device_read_bps":[{"path":"/dev/sdb","rate":"12m"}],"device_write_bps":[{"path":"state","rate":"1m"},{"path":"/dev/disk/by-id/usb-ACME_1-part1","rate":"4k"}],"device_read_iops":[{"path":"/dev/sdb","rate":120}],"device_write_iops":[{"path":"state","rate":30}]}"#
    );
    assert_eq!(
        serde_json::from_str::<manifest::BlkioConfig>(&bytes).unwrap(),
        *config
    );
    // Asking for nothing is not asking; asking for anything makes another container.
    let digest = foreshore_protocol::release::service_digest;
    let plain = parse(base()).spec.services.into_values().next().unwrap();
    assert_eq!(digest(&read("{}")), digest(&plain));
    assert_ne!(digest(&service), digest(&plain));
    assert_ne!(
        digest(&read("{weight: 300}")),
        digest(&read("{weight: 301}"))
    );

    let app = |blkio: &str| with(&format!("      blkio_config: {blkio}\n"));
    let bps = |path: &str, rate: &str| {
        app(&format!(
            "{{device_read_bps: [{{path: {path}, rate: {rate}}}]}}"
        ))
    };
    let iops = |rate: &str| {
        app(&format!(
            "{{device_write_iops: [{{path: state, rate: {rate}}}]}}"
        ))
    };
    let many = "{path: state, rate: 1}, ".repeat(17);
    let refused = refusals(&[
        ("weight too small", app("{weight: 9}")),
        ("weight too large", app("{weight: 1001}")),
        (
            "weight of a disk",
            app("{weight_device: [{path: state, weight: 0}]}"),
        ),
        ("weight missing", app("{weight_device: [{path: state}]}")),
        (
            "rate for weight",
            app("{weight_device: [{path: state, rate: 10}]}"),
        ),
        (
            "not a list",
            app("{device_read_bps: {path: state, rate: 1m}}"),
        ),
        ("rate too small", bps("state", "1k")),
        ("rate too large", bps("state", "2000g")),
        ("rate no size", bps("state", "fast")),
        ("rate negative", bps("state", "-1")),
        ("directory", bps("/var/lib/foreshore", "1m")),
        ("relative", bps("sda", "1m")),
        ("out of dev", bps("/dev/../etc", "1m")),
        ("dev itself", bps("/dev/", "1m")),
        ("descriptors", bps("/dev/fd/7/x", "1m")),
        ("shared memory", bps("/dev/shm/x", "1m")),
        ("pattern", bps("\"/dev/sd?\"", "1m")),
        ("path no string", bps("[state]", "1m")),
        ("none a second", iops("0")),
        ("all a second", iops("4294967295")),
        ("bytes for operations", iops("1m")),
        (
            "twice",
            app("{device_write_iops: [{path: state, rate: 1}, {path: state, rate: 2}]}"),
        ),
        ("too many", app(&format!("{{device_write_iops: [{many}]}}"))),
        ("other spelling", app("{device_read_bytes: []}")),
        ("of Docker", app("{read_bps: []}")),
        (
            "entry",
            app("{device_read_bps: [{device: state, rate: 1m}]}"),
        ),
        (
            "entry",
            app("{device_read_bps: [{path: state, limit: 1m}]}"),
        ),
        ("in the service", with("      device_read_bps: []\n")),
    ]);
    insta::assert_snapshot!(refused);
}

#[test]
fn pull_secrets_are_named_in_the_release_and_change_no_service() {
    let release = |spec: &str| {
        let app = parse(&with_spec(spec));
        let images = [("web".parse().unwrap(), pinned_image())].into();
        Release::from_app(&app, &images).unwrap()
    };
    let without = release("rollout: {}");
    let named = release("imagePullSecrets: [b, {name: a}]");
    let names: Vec<&str> = (named.image_pull_secrets.iter())
        .map(|name| name.as_str())
        .collect();
    assert_eq!(names, ["b", "a"]);
    assert_eq!(named.services, without.services);
    assert_ne!(named.digest(), without.digest());
    // A release that names none is the one it was before there were any.
    let text = String::from_utf8(without.to_canonical_json()).unwrap();
    assert!(!text.contains("image_pull_secrets"), "{text}");
    let bytes = named.to_canonical_json();
    assert_eq!(Release::from_bytes(&bytes, &named.digest()).unwrap(), named);
    let app = parse(&with_spec("imagePullSecrets: [b, {name: a}]"));
    let again = serde_json::to_vec(&app).unwrap();
    assert_eq!(manifest::parse(&again).unwrap(), app);

    let nine: Vec<String> = (0..9).map(|number| format!("s{number}")).collect();
    insta::assert_snapshot!(refusals(&[
        ("twice", with_spec("imagePullSecrets: [a, {name: a}]")),
        (
            "nine",
            with_spec(&format!("imagePullSecrets: [{}]", nine.join(", ")))
        ),
        ("no name", with_spec("imagePullSecrets: [A]")),
        ("text", with_spec("imagePullSecrets: a")),
        ("source", with_spec("imagePullSecrets: [{source: a}]")),
        ("in a service", with("      imagePullSecrets: [a]\n")),
        ("at the top", format!("{}imagePullSecrets: [a]\n", base())),
        ("misspelt", with_spec("imagePullSecret: [a]")),
    ]));
}
