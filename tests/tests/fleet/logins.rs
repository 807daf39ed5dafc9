//! Private images, pulled with a secret of the hub's: from apply to a password that changes in the middle of a pull.

use std::process::{Command, Output, Stdio};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use e2e::fleet::{Fleet, LONG, app_status, await_container, container, http_get};
use e2e::hub::HubOptions;
use e2e::image::Builder;
use e2e::process::programs;
use e2e::registry::{FIRST, Login, ROTATED, Registry};
use e2e::traces::holding;
use e2e::{Bed, Device, Hub, wait_for};

/// An app with two services, of which the second never changes.
fn manifest(app: &str, image: &str, steady: &str, secrets: &str) -> String {
    format!(
        "apiVersion: foreshore/v1
kind: App
metadata: {{name: {app}}}
spec:
  selector: {{matchLabels: {{role: web}}}}
  imagePullSecrets: {secrets}
  services:
    server:
      image: {image}
      mem_limit: 32m
      stop_grace_period: 1s
      probes: {{readiness: {{http: {{port: 8080, path: /ready}}, period: 200ms}}}}
    steady: {{image: {steady}, mem_limit: 32m, stop_grace_period: 1s}}
  rollout: {{waves: [{{percent: 100}}], soak: 1s, bake: 0s, progressDeadline: 30s, maxUnavailable: 100%}}
"
    )
}

fn set(hub: &Hub, name: &str, value: &str) -> Output {
    let mut child = Command::new(programs().join("foreshore"))
        .args(["--hub", hub.url(), "--token-file"])
        .arg(hub.data().join("api-token"))
        .args(["secret", "set", name])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("runs");
    let mut stdin = child.stdin.take().expect("piped");
    std::io::Write::write_all(&mut stdin, value.as_bytes()).expect("it reads");
    drop(stdin);
    child.wait_with_output().expect("ends")
}

fn in_base64(login: Login) -> String {
    BASE64_STANDARD.encode(format!("{}:{}", login.user, login.password))
}

/// What `docker login` writes.
fn docker_config(host: &str, login: Login) -> String {
    format!(
        "{{\"auths\": {{\"{host}\": {{\"auth\": \"{}\"}}}}}}",
        in_base64(login)
    )
}

#[test]
fn private_images_are_pulled_with_a_secret_and_a_refused_pull_goes_on_when_it_changes() {
    let bed = Bed::new("logins");
    let mut registry = Registry::protected(&bed, FIRST);
    let host = registry.host().to_owned();
    let builder = Builder::new(&bed);
    let [one, two] = [("v1", "one"), ("v2", "two")].map(|(tag, version)| {
        builder.web(tag, version, true);
        builder.push_as(FIRST, tag, &host, &format!("acme/shop:{tag}"))
    });
    let hub = Hub::start_with(
        &bed,
        &HubOptions {
            plain_http: vec![host.clone()],
            ..HubOptions::default()
        },
    );
    let plain = format!("[registries.\"{host}\"]\nplain_http = true\n");
    let token = hub.join_token_file();
    let labels = "role = \"web\"";
    let mut device = Device::configure(
        &bed,
        hub.broker(),
        hub.url(),
        &token,
        "device-1",
        labels,
        &plain,
    );
    device.restart();
    let mut fleet = Fleet {
        devices: vec![device],
        hub,
    };
    fleet.await_online(1);
    let api = fleet.api();
    let first = manifest("shop", &one, &one, "[registry-login]");

    // One clear error each, and nothing of a value in any.
    let refused = |code: &str| {
        let answer = api.apply("shop", &first);
        assert_eq!((answer.status, answer.code()), (422, code));
        assert_eq!(api.get("/apps/shop").status, 404);
        answer.body["detail"].as_str().expect("a text").to_owned()
    };
    assert!(refused("secret-not-set").contains("registry-login"));
    let is_set = |value: &str| {
        let output = set(&fleet.hub, "registry-login", value);
        assert!(output.status.success(), "{output:?}");
    };
    is_set(FIRST.password);
    let told = refused("secret-not-docker-config");
    assert!(told.contains("registry-login") && !told.contains(FIRST.password));
    is_set(&docker_config(&host, ROTATED));
    let told = refused("unknown-image");
    assert!(
        told.contains(&host) && !told.contains(ROTATED.password),
        "{told}"
    );

    is_set(&docker_config(&host, FIRST));
    api.apply("shop", &first).ok();
    fleet.await_rollout("shop", "completed");
    let server = await_container(&bed, "device-1", "shop", "server");
    let steady = await_container(&bed, "device-1", "shop", "steady");
    let version = wait_for("the container to answer", LONG, || {
        http_get(server, "/version")
    });
    assert_eq!(version, "one");
    // An app that does not name the secret does not have its login.
    let other = manifest("other", &two, &two, "[]");
    assert_eq!(api.apply("other", &other).code(), "unknown-image");

    // The password changes after the hub has resolved the image and before the device pulls it.
    fleet.devices[0].terminate();
    let second = manifest("shop", &two, &one, "[{name: registry-login}]");
    api.apply("shop", &second).ok();
    registry.admit_only(ROTATED);
    fleet.devices[0].restart();
    wait_for("the pull to be refused", LONG, || {
        let status = app_status(&api.device("device-1"), "shop");
        let reason = &status["reason"];
        let why = reason["message"].as_str().unwrap_or_default();
        if reason["code"] == "image-not-found" && why.contains("401") {
            Ok(())
        } else {
            Err(status)
        }
    });
    assert_eq!(container(&bed, "device-1", "shop", "server"), Some(server));
    // A value that is of no use is not taken while it is used.
    let output = set(&fleet.hub, "registry-login", ROTATED.password);
    let told = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{told}");
    assert!(
        told.contains("docker config.json") && !told.contains(ROTATED.password),
        "{told}"
    );
    assert_eq!(
        api.send("DELETE", "/secrets/registry-login", b"").code(),
        "secret-in-use"
    );
    let output = set(&fleet.hub, "registry-login", &docker_config(&host, ROTATED));
    assert!(output.status.success(), "{output:?}");
    fleet.await_rollout("shop", "completed");
    let server = await_container(&bed, "device-1", "shop", "server");
    assert_eq!(http_get(server, "/version").as_deref(), Ok("two"));
    // What did not change was not touched, and a new value alone touches nothing.
    assert_eq!(container(&bed, "device-1", "shop", "steady"), Some(steady));
    let both = docker_config("elsewhere.example", FIRST);
    assert!(set(&fleet.hub, "registry-login", &both).status.success());
    wait_for("the device to have the new value", LONG, || {
        let log = fleet.devices[0].log();
        let count = log.matches("accepted new secrets").count();
        if count == 3 { Ok(()) } else { Err(count) }
    });
    assert_eq!(container(&bed, "device-1", "shop", "server"), Some(server));
    assert_eq!(container(&bed, "device-1", "shop", "steady"), Some(steady));

    // Nowhere: not on a disk of the device, in a log or in an answer.
    let encoded = [FIRST, ROTATED].map(in_base64);
    let needles = [FIRST.password, ROTATED.password, &encoded[0], &encoded[1]];
    let mut found = Vec::new();
    for dir in [fleet.devices[0].state(), fleet.devices[0].run_dir()] {
        holding(dir, &needles, &mut found);
    }
    assert_eq!(found, Vec::<String>::new());
    let hub_log = std::fs::read_to_string(bed.path("hub.log")).expect("a hub has a log");
    let paths = [
        "/apps/shop",
        "/devices/device-1",
        "/events?limit=1000",
        "/secrets",
        "/rollouts?app=shop",
    ];
    let answers = paths.map(|path| api.get(path).ok().to_string()).concat();
    assert!(answers.contains("registry-login"));
    for needle in needles {
        assert!(
            !fleet.devices[0].log().contains(needle),
            "{needle} in the device's log"
        );
        assert!(!hub_log.contains(needle), "{needle} in the hub's log");
        assert!(!answers.contains(needle), "{needle} in answers");
    }
}
