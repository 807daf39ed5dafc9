//! What a plan says of each device before anything moves, from real manifests in the hub's registry.

use serde_json::{Value, json};

use crate::bed::{Bed, Kind, manifest, wait_for};
use crate::device::Device;

fn plan(bed: &Bed, manifest: &str) -> Value {
    let (status, plan) = bed.call("POST", "/apps/shop/plan", manifest.as_bytes());
    assert_eq!(status, 200, "{plan}");
    plan["preview"].clone()
}

/// The bytes of an image's layers, as the registry serves its manifest.
fn layers(bed: &Bed, tag: &str) -> u64 {
    let accept = [("accept", "application/vnd.oci.image.manifest.v1+json")];
    let path = format!("/v2/demo/manifests/{tag}");
    let manifest = bed.answer("GET", &path, &accept, b"").json();
    let layers = manifest["layers"].as_array().unwrap().iter();
    layers.map(|layer| layer["size"].as_u64().unwrap()).sum()
}

fn codes(preview: &Value) -> Vec<String> {
    let all = preview["obstacles"].as_array().unwrap().iter();
    all.map(|obstacle| {
        let code = obstacle["code"].as_str().unwrap();
        let names = obstacle["named"].as_array().unwrap().iter();
        let names: Vec<&str> = names.map(|one| one["device"].as_str().unwrap()).collect();
        format!("{code} {}", names.join(" "))
    })
    .collect()
}

#[test]
fn a_plan_counts_bytes_by_group_and_names_what_is_in_the_way() {
    let bed = Bed::start(Kind::Embedded);
    let mut devices = Device::fleet(&bed, 3);
    wait_for("every device to say what it is", || {
        let all = bed.get("/devices");
        let known = all["items"].as_array().unwrap().iter();
        match known.filter(|device| device["inventory"].is_null()).count() {
            0 => Ok(()),
            left => Err(left),
        }
    });
    let [v1, v2] = ["v1", "v2"].map(|tag| bed.import(tag));
    let [one, two] = ["v1", "v2"].map(|tag| layers(&bed, tag));
    let first = manifest("shop", &v1, "[{count: 1}]");
    let found = plan(&bed, &first);
    assert_eq!(found["devices"], 3);
    assert_eq!(found["download"]["totalBytes"], 3 * one, "{found}");
    assert_eq!(
        found["download"]["groups"],
        json!([{"platform": "linux/amd64", "devices": 3, "bytes": one, "diskBytes": 4 * one + one}])
    );
    assert_eq!(found["obstacles"], json!([]));

    let applied = bed.apply("shop", &first);
    bed.await_rollout("shop", "completed");
    let found = plan(&bed, &first);
    assert_eq!(
        (&found["atRelease"], &found["download"]["groups"]),
        (&json!(3), &json!([]))
    );
    let next = manifest("shop", &v2, "[{count: 1}]");
    let found = plan(&bed, &next);
    assert_eq!(
        found["download"]["groups"][0]["running"],
        applied["release"]
    );
    assert_eq!(found["download"]["mostBytes"], two, "no layer is shared");

    // One goes away, one is held, and the release asks for what nobody has.
    devices[0].cut();
    wait_for("the hub to notice", || {
        match bed.get("/devices/device-0")["online"].as_bool() {
            Some(false) => Ok(()),
            other => Err(other),
        }
    });
    let held = bed.call(
        "POST",
        "/devices/device-1/hold",
        br#"{"reason": "roof work"}"#,
    );
    assert!(held.0 < 300, "{held:?}");
    let asks = next
        .replace(
            "{image:",
            "{devices: [/dev/ttyUSB0], secrets: [token], mem_limit: 4g, image:",
        )
        .replace(
            "  services:",
            "  secrets: {token: {external: true}}\n  services:",
        );
    let found = plan(&bed, &asks);
    let everyone = "device-0 device-1 device-2";
    assert_eq!(
        codes(&found),
        [
            "secret-not-set ".to_owned(),
            format!("device-missing {everyone}"),
            format!("secrets-key-missing {everyone}"),
            "offline device-0".to_owned(),
            "held device-1".to_owned(),
            format!("memory-short {everyone}"),
        ],
        "{found}"
    );
    assert_eq!(found["obstacles"][0]["effect"], "refuses");
    assert_eq!(found["obstacles"][4]["named"][0]["detail"], "roof work");
    let (status, refused) = bed.call("PUT", "/apps/shop", asks.as_bytes());
    assert_eq!(refused["code"], "secret-not-set", "{status} {refused}");
    assert_eq!(bed.get("/apps/shop")["release"], applied["release"]);
}

#[test]
fn images_that_cannot_be_looked_at_are_unknown_and_another_processor_is_told() {
    let bed = Bed::start(Kind::Embedded);
    let _devices = Device::fleet(&bed, 1);
    wait_for("the device to say what it is", || {
        let device = bed.get("/devices/device-0");
        if device["inventory"].is_null() {
            Err(device)
        } else {
            Ok(())
        }
    });
    let layout = crate::images::layout(&bed.path(""), "arm");
    let image = format!("{layout}:arm");
    crate::images::run(
        "umoci",
        &["config", "--image", &image, "--architecture", "arm64"],
    );
    let reference = bed.import("arm");
    let found = plan(&bed, &manifest("shop", &reference, "[{count: 1}]"));
    assert_eq!(codes(&found), ["no-matching-platform device-0"], "{found}");
    assert_eq!(found["download"]["unknownDevices"], 0);

    // The manifest is there; its config rots away.
    let whole = bed.import("v1");
    let accept = [("accept", "application/vnd.oci.image.manifest.v1+json")];
    let manifest_of = bed
        .answer("GET", "/v2/demo/manifests/v1", &accept, b"")
        .json();
    let config = manifest_of["config"]["digest"].as_str().unwrap();
    let blobs = bed.data().join("images/blobs/sha256");
    std::fs::remove_file(blobs.join(config.trim_start_matches("sha256:"))).unwrap();
    let found = plan(&bed, &manifest("shop", &whole, "[{count: 1}]"));
    assert_eq!(codes(&found), ["download-unknown device-0"], "{found}");
    assert_eq!(found["download"]["unknownDevices"], 1);
}
