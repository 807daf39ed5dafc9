//! Deltas in the hub's own registry: made by the operator's command, fetched by devices, counted on the wire.

use std::path::Path;
use std::process::{Command, Output};

use e2e::fleet::{Fleet, LONG, await_container, http_get, import, web_manifest};
use e2e::image::{Builder, run};
use e2e::meter::Meter;
use e2e::process::programs;
use e2e::{Bed, Device, Hub, wait_for, wait_until};
use serde_json::Value;

/// What does not compress, and is the same each time; every 512 KiB one byte of it is `version`.
fn payload(version: u8) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes: Vec<u8> = (0..3 << 17)
        .flat_map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()
        })
        .collect();
    bytes
        .iter_mut()
        .step_by(512 << 10)
        .for_each(|byte| *byte = version);
    bytes
}

fn build(builder: &Builder, version: u8) {
    let config = [
        "--config.entrypoint",
        "/bin/httpd",
        "--config.cmd",
        "-f",
        "--config.cmd",
        "-p",
        "--config.cmd",
        "8080",
        "--config.cmd",
        "-h",
        "--config.cmd",
        "/www",
    ];
    builder.image(&format!("v{version}"), &config, |root: &Path| {
        std::fs::create_dir_all(root.join("www")).expect("writable");
        std::fs::write(root.join("www/version"), version.to_string()).expect("writable");
        std::fs::write(root.join("www/ready"), "yes").expect("writable");
        std::fs::write(root.join("model"), payload(version)).expect("writable");
    });
}

fn foreshore(hub: &Hub, arguments: &[&str]) -> Output {
    Command::new(programs().join("foreshore"))
        .args(["--hub", hub.url(), "--token-file"])
        .arg(hub.data().join("api-token"))
        .args(arguments)
        .output()
        .expect("runs")
}

/// Makes the delta in the hub; what the command says of it.
fn delta(hub: &Hub, from: &str, to: &str) -> Value {
    let arguments = [
        "image", "delta", "--from", from, "--to", to, "--level", "12", "-o", "json",
    ];
    let output = foreshore(hub, &arguments);
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).expect("json")
}

fn device(bed: &Bed, hub: &Hub, meter: &Meter, id: &str, more: &str) -> Device {
    let token = hub.join_token_file();
    let labels = "role = \"web\"";
    let mut device = Device::configure(bed, hub.broker(), meter.url(), &token, id, labels, more);
    device.restart();
    device
}

/// Applies an image, waits until both devices run it, and what each of them moved.
fn update(bed: &Bed, fleet: &Fleet, meters: &[Meter; 2], image: &str, version: &str) -> [u64; 2] {
    let manifest = web_manifest("shop", image, "[{percent: 100}]");
    let manifest = manifest.replace("progressDeadline: 15s", "progressDeadline: 60s");
    let applied = fleet.api().apply("shop", &manifest).ok();
    fleet.await_release("shop", &applied["release"]);
    for device in &fleet.devices {
        wait_until("the new version to answer", LONG, || {
            let container = await_container(bed, &device.id, "shop", "server");
            http_get(container, "/version").as_deref() == Ok(version)
        });
    }
    [meters[0].take(), meters[1].take()]
}

#[test]
fn deltas_go_through_the_hub_s_own_registry_and_a_corrupt_one_costs_a_whole_pull() {
    let bed = Bed::new("hubdeltas");
    let builder = Builder::new(&bed);
    for version in [1, 2, 3] {
        build(&builder, version);
    }
    let hub = Hub::start(&bed);
    // One was pushed, the others imported.
    let token = std::fs::read_to_string(hub.data().join("api-token")).expect("it has a token");
    let pushed = "demo:v1";
    let host = hub.url().trim_start_matches("http://");
    let mut push = Command::new("skopeo");
    push.args([
        "--insecure-policy",
        "copy",
        "--quiet",
        "--dest-tls-verify=false",
    ])
    .args(["--dest-creds", &format!("operator:{}", token.trim())])
    .arg(format!("oci:{}:v1", builder.layout().display()))
    .arg(format!("docker://{host}/{pushed}"));
    run(&mut push, "skopeo");
    let one = format!("hub.internal/{pushed}");
    let [two, three] = ["v2", "v3"].map(|tag| import(&hub.api(), &builder, tag));

    let made = delta(&hub, &one, &two);
    let layer = &made["deltas"][0]["layers"][0];
    let [blob, small] =
        ["blobBytes", "deltaBytes"].map(|key| layer[key].as_u64().expect("a number"));
    assert!(small * 20 < blob, "{made}");
    // Again is no other.
    assert_eq!(delta(&hub, &one, &two), made);

    let meters = [Meter::before(hub.url()), Meter::before(hub.url())];
    let devices = vec![
        device(&bed, &hub, &meters[0], "device-1", ""),
        device(
            &bed,
            &hub,
            &meters[1],
            "device-2",
            "[pull]\ndeltas = false\n",
        ),
    ];
    let mut fleet = Fleet { devices, hub };
    fleet.await_online(2);
    let first = update(&bed, &fleet, &meters, &one, "1");
    assert!(first.iter().all(|bytes| *bytes > blob), "{first:?}");
    let second = update(&bed, &fleet, &meters, &two, "2");
    assert!(
        second[0] < small + (64 << 10),
        "{second:?} for a delta of {small}"
    );
    assert!(second[0] * 10 < second[1] && second[1] > blob, "{second:?}");

    // Bytes in the middle of a delta rot on the hub's disk.
    let made = delta(&fleet.hub, &two, &three);
    let artifact = made["deltas"][0]["artifact"].as_str().expect("a digest");
    let blobs = fleet.hub.data().join("images/blobs/sha256");
    let path = |digest: &str| blobs.join(digest.trim_start_matches("sha256:"));
    let manifest: Value =
        serde_json::from_slice(&std::fs::read(path(artifact)).expect("the artifact is in the hub"))
            .expect("json");
    let rotten = path(manifest["layers"][0]["digest"].as_str().expect("a digest"));
    let mut bytes = std::fs::read(&rotten).expect("the delta is in the hub");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x55;
    std::fs::write(&rotten, &bytes).expect("the hub's directory is ours");
    let third = update(&bed, &fleet, &meters, &three, "3");
    assert!(third.iter().all(|moved| *moved > blob), "{third:?}");
    assert!(
        third[0] < third[1] + bytes.len() as u64 + (64 << 10),
        "{third:?}"
    );
    wait_for("the device to say so", LONG, || {
        let log = fleet.devices[0].log();
        let said = log.matches("cannot be made of old ones").count();
        if said == 1 { Ok(()) } else { Err(said) }
    });
    assert!(
        !fleet.devices[1]
            .log()
            .contains("cannot be made of old ones")
    );
    // They stay as long as the image that they make.
    let about = |fleet: &Fleet, digest: &str| {
        let url = format!("{}/v2/demo/referrers/{digest}", fleet.hub.url());
        let answer = ureq::get(&url)
            .header("Authorization", format!("Bearer {}", token.trim()))
            .call()
            .and_then(|mut answer| answer.body_mut().read_to_string());
        let index: Value = serde_json::from_str(&answer.unwrap_or_default()).unwrap_or_default();
        index["manifests"].as_array().map(Vec::len)
    };
    assert_eq!(
        about(&fleet, made["to"].as_str().expect("a digest")),
        Some(1)
    );
    fleet.hub.terminate();
    fleet.hub.restart();
    assert_eq!(
        about(&fleet, made["to"].as_str().expect("a digest")),
        Some(1)
    );
}

#[test]
fn deltas_that_cannot_be_made_are_one_clear_error_and_leave_nothing_in_the_hub() {
    let bed = Bed::new("nodeltas");
    let builder = Builder::new(&bed);
    builder.web("v1", "1", true);
    builder.web("v2", "2", true);
    let hub = Hub::start(&bed);
    let [one, two] = ["v1", "v2"].map(|tag| import(&hub.api(), &builder, tag));
    let archive = builder.archive("v2").display().to_string();
    let dir = bed.path("out").display().to_string();
    let other = if cfg!(target_arch = "x86_64") {
        "linux/arm64"
    } else {
        "linux/amd64"
    };
    let elsewhere = "hub.internal/elsewhere";
    for (arguments, exit, said) in [
        (
            vec!["--from", &one, "--to", "hub.internal/demo:none"],
            1,
            "no image hub.internal/demo:none",
        ),
        (
            vec!["--from", "hub.internal/demo:none", "--to", &two],
            1,
            "no image hub.internal/demo:none",
        ),
        (
            vec!["--from", &one, "--to", &one],
            2,
            "is the old image and the new one",
        ),
        (
            vec!["--from", &one, "--to", &two, "--platform", other],
            2,
            other,
        ),
        (
            vec!["--from", &one, "--to", "hub.internal/Demo:v2"],
            2,
            "Demo",
        ),
        (vec!["--from", &one, "--to", &archive], 2, "--into"),
        (
            vec!["--from", &one, "--to", &archive, "--into", elsewhere],
            1,
            "does not have the new image",
        ),
        (
            vec![
                "--from",
                &one,
                "--to",
                &two,
                "--into",
                "hub.internal/demo:v2",
            ],
            2,
            "hub.internal/demo",
        ),
        (
            vec!["--from", "/nonexistent", "--to", &two],
            2,
            "/nonexistent",
        ),
    ] {
        let line = [&["image", "delta"][..], &arguments].concat();
        let output = foreshore(&hub, &line);
        let told = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(exit), "{arguments:?}: {told}");
        assert!(told.contains(said), "{arguments:?}: {told}");
        assert_eq!(told.matches("error: ").count(), 1, "{told}");
        assert!(output.stdout.is_empty());
    }
    // Files in and out need no hub, and a file's delta may go into the hub where its image is.
    let output = foreshore(
        &hub,
        &[
            "image", "delta", "--from", &one, "--to", &archive, "--into", &dir,
        ],
    );
    assert!(output.status.success(), "{output:?}");
    assert!(Path::new(&dir).join("index.json").exists());
    let output = foreshore(
        &hub,
        &[
            "image",
            "delta",
            "--from",
            &one,
            "--to",
            &archive,
            "--into",
            "hub.internal/demo",
        ],
    );
    assert!(output.status.success(), "{output:?}");
}
