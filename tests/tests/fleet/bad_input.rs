//! Bad input: one clear error that names the thing and the way out, and nothing that ran is lost.

use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::process::Command;

use e2e::bed::SmallDisk;
use e2e::fleet::{
    Fleet, LONG, app_status, await_container, container, http_get, import, web_manifest,
};
use e2e::hub::HubOptions;
use e2e::image::Builder;
use e2e::process::{programs, signal};
use e2e::registry::Registry;
use e2e::{Bed, Hub, wait_for};

#[test]
fn broken_manifests_are_refused_with_their_place_by_command_line_and_hub() {
    let bed = Bed::new("manifest");
    let file = bed.path("broken.yaml");
    let text = "apiVersion: foreshore/v1\nkind: App\nmetadata: {name: shop}\nspec:\n  services:\n    web:\n      image: a:1\n      memory: 32m\n";
    std::fs::write(&file, text).expect("the bed is writable");
    let output = Command::new(programs().join("foreshore"))
        .arg("validate")
        .arg("-f")
        .arg(&file)
        .output()
        .expect("runs");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert!(
        stderr.contains("memory") && stderr.contains(":8:"),
        "{stderr}"
    );

    let hub = Hub::start(&bed);
    let answer = hub.api().apply("shop", text);
    assert_eq!(answer.status, 400, "{answer:?}");
    assert_eq!(answer.body["line"], 8, "{answer:?}");
    assert!(
        answer.body["detail"]
            .as_str()
            .is_some_and(|detail| detail.contains("memory")),
        "{answer:?}"
    );
    // Size and depth are capped before parsing.
    let deep = format!("a: {}", "[".repeat(100_000));
    assert_eq!(hub.api().apply("shop", &deep).status, 400);
    let huge = format!("# {}\n{text}", "x".repeat(1 << 20));
    assert!(matches!(hub.api().apply("shop", &huge).status, 400 | 413));
    assert_eq!(
        hub.api().get("/apps").ok()["items"]
            .as_array()
            .map(Vec::len),
        Some(0)
    );
}

#[test]
fn unknown_images_and_registries_that_hang_are_named_and_change_nothing() {
    let bed = Bed::new("unknown");
    let mut registry = Registry::start(&bed);
    let silent = TcpListener::bind("127.0.0.1:0").expect("loopback has a port");
    let silent_host = silent.local_addr().expect("bound").to_string();
    let builder = Builder::new(&bed);
    builder.web("v1", "one", true);
    builder.web("v2", "two", true);
    let image = builder.push("v1", registry.host(), "acme/shop:1");
    let next = builder.push("v2", registry.host(), "acme/shop:2");
    let hosts = vec![registry.host().to_owned(), silent_host.clone()];
    let hub = Hub::start_with(
        &bed,
        &HubOptions {
            plain_http: hosts.clone(),
            ..HubOptions::default()
        },
    );
    let plain: String = hosts
        .iter()
        .map(|host| format!("[registries.\"{host}\"]\nplain_http = true\n"))
        .collect();
    let mut device = e2e::Device::configure(
        &bed,
        hub.broker(),
        hub.url(),
        &hub.join_token_file(),
        "device-1",
        "role = \"web\"",
        &plain,
    );
    device.restart();
    let fleet = Fleet {
        devices: vec![device],
        hub,
    };
    fleet.await_online(1);
    let api = fleet.api();
    api.apply("shop", &web_manifest("shop", &image, "[{percent: 100}]"))
        .ok();
    fleet.await_rollout("shop", "completed");
    let before = await_container(&bed, "device-1", "shop", "server");

    let answer = api.apply(
        "shop",
        &web_manifest(
            "shop",
            &format!("{}/acme/nothing:1", registry.host()),
            "[{percent: 100}]",
        ),
    );
    assert_eq!(answer.code(), "unknown-image", "{answer:?}");
    assert!(
        answer.body["detail"]
            .as_str()
            .is_some_and(|detail| detail.contains("acme/nothing")),
        "{answer:?}"
    );

    let begin = std::time::Instant::now();
    let answer = api.apply(
        "shop",
        &web_manifest(
            "shop",
            &format!("{silent_host}/acme/shop:1"),
            "[{percent: 100}]",
        ),
    );
    assert_eq!(answer.code(), "registry-unreachable", "{answer:?}");
    assert!(
        begin.elapsed() < LONG / 2,
        "a registry that hangs is given up in bounded time"
    );

    // The registry dies between apply and pull: the device keeps what it has, says why, and goes on when
    // the registry is back.
    registry.program().kill9();
    let answer = api.apply("shop", &web_manifest("shop", &next, "[{percent: 100}]"));
    assert_eq!(answer.code(), "registry-unreachable", "{answer:?}");
    assert_eq!(container(&bed, "device-1", "shop", "server"), Some(before));
    assert_eq!(api.rollout("shop")["state"], "completed");
}

#[test]
fn a_registry_that_serves_wrong_bytes_is_caught_and_the_old_release_keeps_running() {
    let bed = Bed::new("digest");
    let registry = Registry::start(&bed);
    let builder = Builder::new(&bed);
    builder.web("v1", "one", true);
    builder.web("v2", "two", true);
    let first = builder.push("v1", registry.host(), "acme/shop:1");
    let host = registry.host().to_owned();
    let hub = Hub::start_with(
        &bed,
        &HubOptions {
            plain_http: vec![host.clone()],
            ..HubOptions::default()
        },
    );
    let plain = format!("[registries.\"{host}\"]\nplain_http = true\n");
    let mut device = e2e::Device::configure(
        &bed,
        hub.broker(),
        hub.url(),
        &hub.join_token_file(),
        "device-1",
        "role = \"web\"",
        &plain,
    );
    device.restart();
    let fleet = Fleet {
        devices: vec![device],
        hub,
    };
    fleet.await_online(1);
    let api = fleet.api();
    api.apply("shop", &web_manifest("shop", &first, "[{percent: 100}]"))
        .ok();
    fleet.await_rollout("shop", "completed");
    let before = await_container(&bed, "device-1", "shop", "server");

    let second = builder.push("v2", registry.host(), "acme/shop:2");
    corrupt_largest_new_blob(&bed.path("registry"));
    api.apply("shop", &web_manifest("shop", &second, "[{percent: 100}]"))
        .ok();
    wait_for("the device to name the wrong digest", LONG, || {
        let view = api.device("device-1");
        let status = app_status(&view, "shop");
        if status["reason"]["code"] == "digest-mismatch" {
            Ok(())
        } else {
            Err(view)
        }
    });
    assert_eq!(container(&bed, "device-1", "shop", "server"), Some(before));
}

/// Flips a byte in the middle of the newest blob that is a layer.
fn corrupt_largest_new_blob(registry: &std::path::Path) {
    let mut blobs = Vec::new();
    let mut stack = vec![registry.to_owned()];
    while let Some(dir) = stack.pop() {
        for entry in std::fs::read_dir(dir).expect("registry storage").flatten() {
            let meta = entry.metadata().expect("registry storage");
            if meta.is_dir() {
                stack.push(entry.path());
            } else if entry.file_name() == "data" && meta.len() > 10_000 {
                blobs.push((meta.modified().expect("mtime"), entry.path()));
            }
        }
    }
    let (_, newest) = blobs.into_iter().max().expect("the registry holds layers");
    let mut bytes = std::fs::read(&newest).expect("blob reads");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0xff;
    std::fs::write(&newest, bytes).expect("blob writes");
}

#[test]
fn a_full_disk_blocks_the_update_with_a_reason_and_heals() {
    let bed = Bed::new("full");
    let _disk = SmallDisk::mount(&bed, "device-1", 64 << 20);
    let builder = Builder::new(&bed);
    builder.web("v1", "one", true);
    builder.image(
        "big",
        &["--config.cmd", "/bin/sleep", "--config.cmd", "1000"],
        |root| {
            let mut file = std::fs::File::create(root.join("ballast")).expect("writable");
            let mut random = std::fs::File::open("/dev/urandom")
                .expect("there")
                .take(80 << 20);
            std::io::copy(&mut random, &mut file).expect("writable");
            file.flush().expect("writable");
        },
    );
    let fleet = Fleet::start(&bed, Hub::start(&bed), 1);
    let api = fleet.api();
    let [web, big] = ["v1", "big"].map(|tag| import(&api, &builder, tag));
    api.apply("shop", &web_manifest("shop", &web, "[{percent: 100}]"))
        .ok();
    fleet.await_rollout("shop", "completed");
    let before = await_container(&bed, "device-1", "shop", "server");

    let manifest = web_manifest("shop", &big, "[{percent: 100}]");
    api.apply("shop", &manifest).ok();
    wait_for("the device to say that its disk is full", LONG, || {
        let view = api.device("device-1");
        let status = app_status(&view, "shop");
        if status["reason"]["code"] == "disk-full" {
            Ok(())
        } else {
            Err(view)
        }
    });
    assert_eq!(container(&bed, "device-1", "shop", "server"), Some(before));
    // What was unpacked half-way is gone again: the next, smaller release fits.
    builder.web("v2", "two", true);
    let v2 = import(&api, &builder, "v2");
    let applied = api
        .apply("shop", &web_manifest("shop", &v2, "[{percent: 100}]"))
        .ok();
    fleet.await_release("shop", &applied["release"]);
}

#[test]
fn an_agent_that_starts_on_a_full_disk_runs_what_is_on_it() {
    let bed = Bed::new("fullstart");
    let _disk = SmallDisk::mount(&bed, "device-1/state", 64 << 20);
    let builder = Builder::new(&bed);
    builder.web("v1", "one", true);
    let mut fleet = Fleet::start(&bed, Hub::start(&bed), 1);
    let api = fleet.api();
    let web = import(&api, &builder, "v1");
    api.apply("shop", &web_manifest("shop", &web, "[{percent: 100}]"))
        .ok();
    let rollout = fleet.await_rollout("shop", "completed");
    fleet.await_release("shop", &rollout["to"]);

    fleet.devices[0].kill9();
    for process in e2e::fleet::containers(&bed, "device-1", "") {
        signal(process.pid, libc::SIGKILL);
    }
    let filler = fleet.devices[0].state().join("filler");
    let mut file = std::fs::File::create(&filler).expect("the disk has room yet");
    let mut zeros = std::io::repeat(0);
    std::io::copy(&mut zeros, &mut file).expect_err("the disk fills up");
    drop(file);
    fleet.devices[0].restart();
    wait_for("the container to serve from a full disk", LONG, || {
        let found = container(&bed, "device-1", "shop", "server").ok_or("none")?;
        http_get(found, "/version").map_err(|_| "no answer")
    });
    std::fs::remove_file(&filler).expect("the filler is ours");
    fleet.await_online(1);
}
