//! What a plan says is what happens: bytes that devices are told to fetch, and bytes on the wire.

use std::path::Path;
use std::process::Command;

use e2e::fleet::{Fleet, LONG, import, web_manifest};
use e2e::image::{Builder, run};
use e2e::meter::Meter;
use e2e::{Bed, Device, Hub, wait_for};
use serde_json::{Value, json};

/// Bytes besides layers: manifests, configs, headers.
const BESIDES: u64 = 64 << 10;

/// What does not compress, and differs with `seed`.
fn payload(seed: u64) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64 ^ seed;
    (0..3 << 17)
        .flat_map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()
        })
        .collect()
}

/// An image with everything, and one that is that and a layer more.
fn build(builder: &Builder, bed: &Bed) {
    let mut config = vec!["--config.entrypoint", "/bin/httpd"];
    for argument in ["-f", "-p", "8080", "-h", "/www"] {
        config.extend(["--config.cmd", argument]);
    }
    builder.image("v1", &config, |root: &Path| {
        std::fs::create_dir_all(root.join("www")).expect("writable");
        std::fs::write(root.join("www/ready"), "yes").expect("writable");
        std::fs::write(root.join("model"), payload(1)).expect("writable");
    });
    let layout = builder.layout().display();
    let bundle = bed.path("on-top");
    let mut unpack = Command::new("umoci");
    unpack.args(["unpack", "--image", &format!("{layout}:v1")]);
    run(unpack.arg(&bundle), "umoci");
    std::fs::write(bundle.join("rootfs/more"), payload(2)).expect("writable");
    let mut repack = Command::new("umoci");
    repack.args(["repack", "--image", &format!("{layout}:v2")]);
    run(repack.arg(&bundle), "umoci");
    let foreign = ["tag", "--image", &format!("{layout}:v1"), "foreign"];
    run(Command::new("umoci").args(foreign), "umoci");
    let other = if cfg!(target_arch = "x86_64") {
        "arm64"
    } else {
        "amd64"
    };
    let image = format!("{layout}:foreign");
    let config = ["config", "--image", &image, "--architecture", other];
    run(Command::new("umoci").args(config), "umoci");
}

fn plan(fleet: &Fleet, manifest: &str) -> Value {
    let answer = fleet
        .api()
        .send("POST", "/apps/shop/plan", manifest.as_bytes());
    answer.ok()["preview"].clone()
}

fn of(image: &str) -> String {
    web_manifest("shop", image, "[{percent: 100}]")
        .replace("progressDeadline: 15s", "progressDeadline: 60s")
}

/// Applies, and how many bytes the device says it has to fetch while it does.
fn fetched(fleet: &Fleet, manifest: &str) -> u64 {
    let applied = fleet.api().apply("shop", manifest).ok();
    let told = wait_for("the device to tell how much it fetches", LONG, || {
        let view = fleet.api().device("device-1");
        // What was told of the release before is known for a moment longer.
        let pull = Some(&view["pull"]).filter(|pull| pull["release"] == applied["release"]);
        let total = pull.and_then(|pull| pull["images"][0]["totalBytes"].as_u64());
        total.ok_or(view)
    });
    fleet.await_release("shop", &applied["release"]);
    told
}

#[test]
fn the_bytes_that_a_plan_predicts_are_those_that_come() {
    let bed = Bed::new("preview");
    let builder = Builder::new(&bed);
    build(&builder, &bed);
    let hub = Hub::start(&bed);
    let [one, two, foreign] = ["v1", "v2", "foreign"].map(|tag| import(&hub.api(), &builder, tag));
    let meter = Meter::before(hub.url());
    // Slow enough to be watched.
    let more = "[pull]\nrate_limit = \"512k\"\n";
    let (token, labels) = (hub.join_token_file(), "role = \"web\"");
    let mut device = Device::configure(
        &bed,
        hub.broker(),
        meter.url(),
        &token,
        "device-1",
        labels,
        more,
    );
    device.restart();
    let fleet = Fleet {
        devices: vec![device],
        hub,
    };
    fleet.await_online(1);

    let mut fetched_before = 0;
    for image in [&one, &two] {
        let predicted = plan(&fleet, &of(image));
        let group = &predicted["download"]["groups"][0];
        let bytes = group["bytes"].as_u64().expect("it is known");
        assert!(bytes > 3 << 20, "{predicted}");
        assert_eq!(predicted["download"]["totalBytes"], bytes);
        assert_eq!(predicted["obstacles"], json!([]), "{predicted}");
        let _before = meter.take();
        assert_eq!(fetched(&fleet, &of(image)), bytes, "{predicted}");
        let moved = meter.take();
        assert!(
            (bytes..bytes + BESIDES).contains(&moved),
            "{moved} of {predicted}"
        );
        let again = plan(&fleet, &of(image));
        assert_eq!(
            (&again["atRelease"], &again["devices"]),
            (&json!(1), &json!(1))
        );
        fetched_before += bytes;
    }
    // The second image is the first and a layer: all of it was fetched once.
    let device = &fleet.devices[0];
    let other = of(&two).replace("name: shop", "name: other");
    let all = fleet
        .api()
        .send("POST", "/apps/other/plan", other.as_bytes());
    let all = all.ok()["preview"].clone();
    assert_eq!(
        all["download"]["totalBytes"], 0,
        "{} has it: {all}",
        device.id
    );
    assert!(fetched_before > 6 << 20);

    // What the machine does not have is told, and nothing moves.
    let asks = of(&foreign)
        .replace("mem_limit: 32m", "mem_limit: 900g")
        .replace(
            "      probes:",
            "      devices: [/dev/ttyNONE0]\n      probes:",
        );
    let refused = plan(&fleet, &asks);
    let codes = refused["obstacles"].as_array().expect("a list").iter();
    let codes: Vec<&str> = codes
        .map(|one| one["code"].as_str().expect("a code"))
        .collect();
    assert_eq!(
        codes,
        ["no-matching-platform", "device-missing", "memory-short"],
        "{refused}"
    );
    assert!(meter.take() < BESIDES);
}
