//! The hub as its site's registry: devices run what was pushed to it and what it fetched, and a full disk is survived.

use std::process::Command;

use e2e::bed::SmallDisk;
use e2e::fleet::{Fleet, LONG, container, http_get, web_manifest};
use e2e::hub::HubOptions;
use e2e::image::Builder;
use e2e::process::programs;
use e2e::registry::Registry;
use e2e::{Bed, Device, Hub, wait_for};

fn served(bed: &Bed, device: &str) -> String {
    wait_for("the container to answer", LONG, || {
        let found = container(bed, device, "shop", "server").ok_or("none")?;
        http_get(found, "/version")
    })
}

/// Copies a tag of the builder's layout into the hub.
fn push(hub: &Hub, builder: &Builder, tag: &str, name: &str) -> std::process::Output {
    let host = hub.url().trim_start_matches("http://");
    let token = std::fs::read_to_string(hub.data().join("api-token")).expect("the hub has a token");
    Command::new("skopeo")
        .args([
            "--insecure-policy",
            "copy",
            "--quiet",
            "--dest-tls-verify=false",
        ])
        .args(["--dest-creds", &format!("operator:{}", token.trim())])
        .arg(format!("oci:{}:{tag}", builder.layout().display()))
        .arg(format!("docker://{host}/{name}"))
        .output()
        .expect("skopeo runs; install it, or run cargo xtask test")
}

#[test]
fn what_was_pushed_to_the_hub_runs_on_its_devices() {
    let bed = Bed::new("pushed");
    let builder = Builder::new(&bed);
    builder.web("v1", "one", true);
    let fleet = Fleet::start(&bed, Hub::start(&bed), 1);
    let pushed = push(&fleet.hub, &builder, "v1", "acme/shop:1");
    assert!(pushed.status.success(), "{pushed:?}");
    let manifest = web_manifest("shop", "hub.internal/acme/shop:1", "[{percent: 100}]");
    fleet.api().apply("shop", &manifest).ok();
    fleet.await_rollout("shop", "completed");
    assert_eq!(served(&bed, "device-1"), "one");
}

#[test]
fn a_site_pulls_through_its_hub_and_newcomers_need_no_registry() {
    let bed = Bed::new("through");
    let mut registry = Registry::start(&bed);
    let builder = Builder::new(&bed);
    builder.web("v1", "one", true);
    let image = builder.push("v1", registry.host(), "acme/shop:1");
    let host = registry.host().to_owned();
    let hub = Hub::start_with(
        &bed,
        &HubOptions {
            plain_http: vec![host.clone()],
            more: format!("[registry.upstreams.\"{host}\"]\n"),
            ..HubOptions::default()
        },
    );
    // The registry itself is not reached by these devices, only the hub is.
    let mirror = format!(
        "[registries.\"{host}\"]\nmirrors = [\"{}/{host}\"]\n",
        hub.url()
    );
    let device = |id: &str| {
        let token = hub.join_token_file();
        let labels = "role = \"web\"";
        let mut device =
            Device::configure(&bed, hub.broker(), hub.url(), &token, id, labels, &mirror);
        device.restart();
        device
    };
    let first = device("device-1");
    let mut fleet = Fleet {
        devices: vec![first],
        hub,
    };
    fleet.await_online(1);
    let manifest = web_manifest("shop", &image, "[{percent: 100}]");
    let applied = fleet.api().apply("shop", &manifest).ok();
    fleet.await_rollout("shop", "completed");
    assert_eq!(served(&bed, "device-1"), "one");

    registry.program().kill9();
    let token = fleet.hub.join_token_file();
    let mut second = Device::configure(
        &bed,
        fleet.hub.broker(),
        fleet.hub.url(),
        &token,
        "device-2",
        "role = \"web\"",
        &mirror,
    );
    second.restart();
    fleet.devices.push(second);
    fleet.await_release("shop", &applied["release"]);
    assert_eq!(served(&bed, "device-2"), "one");
}

#[test]
fn a_push_onto_a_full_disk_is_refused_and_the_hub_goes_on() {
    let bed = Bed::new("fullpush");
    let _disk = SmallDisk::mount(&bed, "hub", 96 << 20);
    let builder = Builder::new(&bed);
    builder.web("small", "one", true);
    builder.image("big", &[], |root| {
        let mut random = std::io::Read::take(
            std::fs::File::open("/dev/urandom").expect("every system has it"),
            120 << 20,
        );
        let mut file = std::fs::File::create(root.join("big")).expect("writable");
        std::io::copy(&mut random, &mut file).expect("writable");
    });
    let hub = Hub::start(&bed);
    for _ in 0..2 {
        let refused = push(&hub, &builder, "big", "acme/big:1");
        let said = String::from_utf8_lossy(&refused.stderr);
        assert!(!refused.status.success(), "{said}");
        assert!(said.contains("no room"), "{said}");
    }
    // What came of it takes no room from others.
    wait_for("the refused uploads to be gone", LONG, || {
        let left = std::fs::read_dir(hub.data().join("pushes")).expect("it is there");
        let bytes: u64 = left
            .flatten()
            .flat_map(|entry| entry.metadata())
            .map(|file| file.len())
            .sum();
        if bytes < 1 << 20 { Ok(()) } else { Err(bytes) }
    });
    let pushed = push(&hub, &builder, "small", "acme/small:1");
    assert!(pushed.status.success(), "{pushed:?}");
    assert_eq!(
        hub.api().get("/images").ok()["items"][0]["reference"],
        "hub.internal/acme/small:1"
    );
}

#[test]
fn images_come_in_from_files_standard_input_and_layouts() {
    let bed = Bed::new("import");
    let builder = Builder::new(&bed);
    builder.web("v1", "one", true);
    let hub = Hub::start(&bed);
    let copy = |target: &str| {
        let source = format!("oci:{}:v1", builder.layout().display());
        let mut command = Command::new("skopeo");
        command.args(["--insecure-policy", "copy", "--quiet", &source, target]);
        e2e::image::run(&mut command, "skopeo");
    };
    let place = |name: &str| bed.path(name).display().to_string();
    let [oci, docker, layout] = ["oci.tar", "docker.tar", "single"].map(place);
    copy(&format!("oci-archive:{oci}:v1"));
    copy(&format!("docker-archive:{docker}:demo:v1"));
    copy(&format!("oci:{layout}:v1"));
    let mut gzip = Command::new("gzip");
    e2e::image::run(gzip.args(["--keep", &docker]), "gzip");

    let import = |arguments: &[&str], input: Option<&str>| {
        let mut command = Command::new(programs().join("foreshore"));
        command
            .args(["--hub", hub.url(), "--token-file"])
            .arg(hub.data().join("api-token"))
            .args(["image", "import"])
            .args(arguments)
            .args(["-o", "json"]);
        if let Some(path) = input {
            command.stdin(std::fs::File::open(path).expect("it was just written"));
        }
        let output = command.output().expect("runs");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {stderr}");
        let view: serde_json::Value = serde_json::from_slice(&output.stdout).expect("json");
        view["digest"].clone()
    };
    let first = import(&[&oci, "--name", "demo:oci"], None);
    for (arguments, input) in [
        ([&*layout, "--name", "demo:layout"], None),
        (["-", "--name", "demo:stdin"], Some(&*oci)),
    ] {
        assert_eq!(import(&arguments, input), first, "{arguments:?}");
    }
    // Docker's archives hold no manifest: the hub makes one, the same from the same.
    let docker_digest = import(&[&docker, "--name", "demo:docker"], None);
    let piped = format!("{docker}.gz");
    assert_eq!(
        import(&["-", "--name", "demo:gz"], Some(&piped)),
        docker_digest
    );

    let host = hub.url().trim_start_matches("http://");
    let token = std::fs::read_to_string(hub.data().join("api-token")).expect("it has a token");
    for tag in ["oci", "layout", "stdin", "docker", "gz"] {
        let mut pull = Command::new("skopeo");
        pull.args([
            "--insecure-policy",
            "copy",
            "--quiet",
            "--src-tls-verify=false",
        ])
        .args(["--src-creds", &format!("operator:{}", token.trim())])
        .arg(format!("docker://{host}/demo:{tag}"))
        .arg(format!("oci:{}:{tag}", place("out")));
        e2e::image::run(&mut pull, "skopeo");
    }
}
