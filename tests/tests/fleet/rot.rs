//! A bit that flips on a device's medium after an image was unpacked, while containers run from it.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::process::Command;

use e2e::fleet::{Fleet, LONG, await_container, http_get, import, web_manifest};
use e2e::image::Builder;
use e2e::process::{programs, signal};
use e2e::{Bed, Device, Hub, wait_for};
use serde_json::Value;

fn fsck(device: &Device, arguments: &[&str]) -> (i32, Value) {
    let output = Command::new(programs().join("foreshore-agent"))
        .args(["image", "fsck", "--deep", "-o", "json", "--config"])
        .arg(device.config())
        .args(arguments)
        .output()
        .expect("it runs");
    let report = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {output:?}"));
    (output.status.code().expect("it ends by itself"), report)
}

#[test]
fn a_flipped_bit_is_repaired_from_the_hub_and_the_next_start_sees_the_right_content() {
    let bed = Bed::new("rot");
    let builder = Builder::new(&bed);
    builder.web("v1", "one", true);
    let hub = Hub::start(&bed);
    let image = import(&hub.api(), &builder, "v1");
    let fleet = Fleet::start(&bed, hub, 1);
    fleet.await_online(1);
    let manifest = web_manifest("shop", &image, "[{percent: 100}]");
    fleet.api().apply("shop", &manifest).ok();
    fleet.await_rollout("shop", "completed");
    let device = &fleet.devices[0];
    let first = await_container(&bed, "device-1", "shop", "server");
    assert_eq!(fsck(device, &[]).1["verdict"], "sound");

    let layers = device.state().join("images/layers");
    let all = fs::read_dir(&layers).expect("it is there").flatten();
    let files: Vec<_> = all
        .map(|entry| entry.path().join("www/version"))
        .filter(|path| path.exists())
        .collect();
    let [file] = &*files else {
        panic!("{files:?}");
    };
    let opened = File::options().write(true).open(file).expect("it is there");
    opened.write_all_at(b"p", 1).expect("it is writable");
    opened.sync_all().expect("it is synced");
    drop(opened);

    let (code, report) = fsck(device, &[]);
    assert_eq!(
        (code, &report["verdict"]),
        (0, &"repaired".into()),
        "{report}"
    );
    let damaged: Vec<&Value> = report["layers"]
        .as_array()
        .expect("a list")
        .iter()
        .filter(|layer| layer["state"] == "damaged")
        .collect();
    assert_eq!(damaged.len(), 1, "{report}");
    assert_eq!(damaged[0]["flaws"][0]["path"], "www/version", "{report}");
    assert_eq!(fs::read_to_string(file).expect("it is there"), "one");
    let held = report["toRestart"][0].as_str().unwrap_or_default();
    assert!(held.starts_with("shop.server."), "{report}");
    // What runs goes on from the old files, all of which are there.
    assert_eq!(await_container(&bed, "device-1", "shop", "server"), first);
    assert_eq!(http_get(first, "/version"), Ok("ope".to_owned()));
    assert_eq!(http_get(first, "/ready"), Ok("yes".to_owned()));

    signal(first.pid, libc::SIGKILL);
    wait_for("the right content", LONG, || {
        let now = await_container(&bed, "device-1", "shop", "server");
        match http_get(now, "/version") {
            Ok(text) if now != first && text == "one" => Ok(()),
            other => Err(other),
        }
    });
    let (code, report) = fsck(device, &[]);
    assert_eq!((code, &report["verdict"]), (0, &"sound".into()), "{report}");
    assert_eq!(report["toRestart"], Value::Array(Vec::new()));
    let aside = fs::read_dir(device.state().join("images/quarantine"));
    assert_eq!(aside.expect("it is there").count(), 0);
}
