//! The device owner's policy file: what an app may not ask for it does not get, its operator is told, nobody else notices,
//! and what the owner allows afterwards is done.

use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::Command;

use e2e::fleet::{
    Fleet, LONG, app_status, await_container, container, http_get, import, web_manifest,
};
use e2e::image::Builder;
use e2e::process::programs;
use e2e::{Bed, Device, Hub, wait_for};

/// A fleet of one device with another app that is well, and the image that both use.
fn fleet(bed: &Bed) -> (Fleet, String) {
    let builder = Builder::new(bed);
    builder.web("v1", "one", true);
    let fleet = Fleet::start(bed, Hub::start(bed), 1);
    let image = import(&fleet.api(), &builder, "v1");
    let other = web_manifest("other", &image, "[{percent: 100}]");
    fleet.api().apply("other", &other).ok();
    fleet.await_rollout("other", "completed");
    (fleet, image)
}

/// The app `shop` that asks for something more.
fn asking(image: &str, more: &str) -> String {
    let manifest = web_manifest("shop", image, "[{percent: 100}]");
    let line = "\x20     stop_grace_period: 1s\n";
    assert!(manifest.contains(line), "{manifest}");
    // A rollout that stays where it is: going back would take the release from the device.
    manifest
        .replace(line, &format!("{line}\x20     {more}\n"))
        .replace("\x20   bake:", "\x20   onFailure: pause\n\x20   bake:")
}

fn policy_file(device: &Device) -> PathBuf {
    device.config().with_file_name("policy.toml")
}

/// As an editor does it: a new file in the old one's place.
fn allow(device: &Device, text: &str) {
    let new = device.config().with_file_name("policy.new");
    std::fs::write(&new, text).expect("the bed is writable");
    std::fs::set_permissions(&new, std::fs::Permissions::from_mode(0o644)).expect("it is ours");
    std::fs::rename(new, policy_file(device)).expect("the bed is writable");
}

fn describe(fleet: &Fleet) -> String {
    let output = Command::new(programs().join("foreshore"))
        .args(["describe", "device", "device-1"])
        .env("FORESHORE_HUB", fleet.hub.url())
        .env("FORESHORE_TOKEN_FILE", fleet.hub.data().join("api-token"))
        .output()
        .expect("it runs");
    assert!(output.status.success(), "{output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn await_phase(fleet: &Fleet, phase: &str) {
    wait_for(&format!("shop to be {phase}"), LONG, || {
        let status = app_status(&fleet.api().device("device-1"), "shop");
        if status["phase"] == phase {
            Ok(())
        } else {
            Err(status)
        }
    });
}

#[test]
fn what_the_policy_denies_is_refused_and_told_and_done_when_the_owner_allows_it() {
    let bed = Bed::new("policy");
    let shared = bed.path("shared");
    std::fs::create_dir(&shared).expect("the bed is writable");
    std::fs::write(shared.join("version"), "of the device").expect("the bed is writable");
    let (fleet, image) = fleet(&bed);
    let device = &fleet.devices[0];
    let other = await_container(&bed, "device-1", "other", "server");

    let binds = format!("volumes: ['{}:/shared:ro']", shared.display());
    for (more, named) in [
        ("network_mode: host", "network"),
        (&*binds, &*shared.display().to_string()),
        ("devices: [/dev/fuse]", "/dev/fuse"),
    ] {
        fleet.api().apply("shop", &asking(&image, more)).ok();
        await_phase(&fleet, "rejected");
        let told = wait_for("the operator to be told", LONG, || {
            let text = describe(&fleet);
            if text.contains(named) && text.contains("policy-denied") {
                Ok(text)
            } else {
                Err(text)
            }
        });
        assert!(told.contains("policy.toml"), "the file is named: {told}");
        assert_eq!(container(&bed, "device-1", "shop", "server"), None);
    }
    assert_eq!(
        container(&bed, "device-1", "other", "server"),
        Some(other),
        "another app was touched"
    );

    // A mistake in the file allows nothing and takes nothing down.
    allow(device, "devcies = ['/dev/fuse']\n");
    wait_for("the mistake to be noticed", LONG, || {
        let log = device.log();
        let noticed = log.contains("policy cannot be used");
        if noticed { Ok(()) } else { Err(log) }
    });
    assert_eq!(container(&bed, "device-1", "shop", "server"), None);

    // The owner allows it: no new release, no word from the hub, no restart.
    allow(device, "devices = ['/dev/fuse']\n");
    await_phase(&fleet, "succeeded");
    let shop = await_container(&bed, "device-1", "shop", "server");
    assert_eq!(http_get(shop, "/version"), Ok("one".to_owned()));
    assert_eq!(container(&bed, "device-1", "other", "server"), Some(other));
    assert!(!describe(&fleet).contains("policy-denied"));

    // A tighter file ends nothing that runs.
    allow(device, "");
    fleet
        .api()
        .apply("shop", &asking(&image, "network_mode: host"))
        .ok();
    await_phase(&fleet, "rejected");
    assert_eq!(container(&bed, "device-1", "shop", "server"), Some(shop));
    assert_eq!(container(&bed, "device-1", "other", "server"), Some(other));
}
