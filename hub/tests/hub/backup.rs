//! A backup that is restored: nobody goes back to it without an operator's word.

use std::path::Path;
use std::process::Output;

use serde_json::Value;

use crate::bed::{Bed, Kind, manifest, wait_for, wait_until};
use crate::device::Device;

fn hub(arguments: &[&str], more: &[(&str, &Path)]) -> Output {
    let mut command = Bed::program();
    command.args(arguments);
    for (key, path) in more {
        command.arg(key).arg(path);
    }
    command.output().unwrap()
}

fn told(output: &Output) -> String {
    let [out, error] = [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text));
    assert!(output.status.success(), "{out}{error}");
    out.into_owned()
}

fn device(bed: &Bed, name: &str) -> Value {
    bed.get(&format!("/devices/{name}"))
}

fn remove_database(bed: &Bed) {
    for file in ["hub.db", "hub.db-wal", "hub.db-shm"] {
        _ = std::fs::remove_file(bed.data().join(file));
    }
}

fn await_running(devices: &[Device], number: usize, release: &Value) {
    wait_until(&format!("device-{number} to run {release}"), || {
        let running = devices[number].running("shop");
        running.is_some_and(|running| running.to_string() == *release)
    });
}

#[test]
fn a_restored_backup_rolls_no_device_back_before_an_operator_says_so() {
    let mut bed = Bed::start(Kind::Embedded);
    let mut devices = Device::fleet(&bed, 4);
    let [v1, v2, v3] = ["v1", "v2", "v3"].map(|tag| bed.import(tag));
    let apply = |bed: &Bed, image: &str| {
        let applied = bed.apply("shop", &manifest("shop", image, "[{percent: 100}]"));
        applied["release"].clone()
    };
    let first = apply(&bed, &v1);
    bed.await_rollout("shop", "completed");
    // While it runs.
    let backup = bed.path("backup");
    let places = |from: &str| {
        [
            (from.to_owned(), backup.clone()),
            ("--data".to_owned(), bed.data()),
        ]
    };
    let [to, data] = places("--to");
    let said = told(&hub(&["backup"], &[(&to.0, &to.1), (&data.0, &data.1)]));
    assert!(said.contains("4 devices"), "{said}");
    let again = hub(&["backup"], &[(&to.0, &to.1), (&data.0, &data.1)]);
    assert!(!again.status.success(), "it would be written over");

    // Two go on without it, one misses that, and one is away for long.
    devices[2].cut();
    devices[3].cut();
    bed.await_online(2);
    let second = apply(&bed, &v2);
    bed.await_rollout("shop", "completed");
    devices[1].cut();
    bed.await_online(1);
    let [from, data] = places("--from");
    let over = hub(&["restore"], &[(&from.0, &from.1), (&data.0, &data.1)]);
    assert!(!over.status.success(), "a hub runs there");
    bed.kill_hub();
    let over = hub(&["restore"], &[(&from.0, &from.1), (&data.0, &data.1)]);
    assert!(
        String::from_utf8_lossy(&over.stderr).contains("holds a hub.db already"),
        "{over:?}"
    );
    remove_database(&bed);
    let said = told(&hub(
        &["restore"],
        &[(&from.0, &from.1), (&data.0, &data.1)],
    ));
    assert!(said.ends_with(", 4 devices\n"), "{said}");
    let epoch: u64 = said["epoch ".len()..said.find(',').unwrap()]
        .parse()
        .unwrap();
    assert!(epoch > 1_700_000_000, "the time: {epoch}");
    bed.start_hub();

    // One that has more is held and keeps it; one that has not goes on.
    let held = wait_for("device-0 to be held", || {
        let view = device(&bed, "device-0");
        view["held"].as_str().map(str::to_owned).ok_or(view)
    });
    assert!(
        held.contains("the backup that this hub was restored from"),
        "{held}"
    );
    devices[2].connect(&bed);
    bed.await_online(2);
    assert_eq!(device(&bed, "device-2")["held"], Value::Null);

    // A change meanwhile reaches those, and not one that was away when it was made and is beyond the backup.
    let third = apply(&bed, &v3);
    await_running(&devices, 2, &third);
    devices[1].connect(&bed);
    wait_until("device-1 to be held", || {
        device(&bed, "device-1")["held"].is_string()
    });
    bed.await_rollout("shop", "completed");
    for number in [0, 1] {
        let running = devices[number].running("shop").unwrap().to_string();
        assert_eq!(running, second, "device-{number}");
        let newest = devices[number].state().heads.last().copied();
        assert!(
            newest.is_none_or(|newest| newest.epoch.get() == 1),
            "{newest:?}"
        );
    }
    let kinds = bed.event_kinds();
    assert_eq!(
        kinds.iter().filter(|kind| *kind == "device-ahead").count(),
        2
    );

    // Again: what was held is held still, and who has not been heard of since the backup is compared with that.
    bed.kill_hub();
    told(&hub(&["new-epoch"], &[("--data", &bed.data())]));
    bed.start_hub();
    devices[3].connect(&bed);
    await_running(&devices, 3, &third);
    bed.await_online(4);
    assert_eq!(device(&bed, "device-3")["held"], Value::Null);
    assert!(device(&bed, "device-0")["held"].is_string());

    // An operator decides.
    for number in [0, 1] {
        let (status, view) = bed.call("POST", &format!("/devices/device-{number}/release"), b"");
        assert_eq!((status, &view["held"]), (200, &Value::Null), "{view}");
        await_running(&devices, number, &third);
    }
    assert_ne!(first, third);
}
