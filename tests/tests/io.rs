//! `blkio_config` from the manifest to the disk.

use std::path::Path;

use e2e::bed::SmallDisk;
use e2e::fleet::{Fleet, LONG, app_status, await_container, container, import};
use e2e::image::Builder;
use e2e::{Bed, Hub, noise, wait_for, wait_until};

/// Writes 4 MiB past the page cache into a volume, with the times before and after, in seconds since the boot.
const WRITES: &str = "cat /proc/uptime > /data/begin; dd if=/dev/zero of=/data/f bs=64k count=64 oflag=direct && \
                      cat /proc/uptime > /data/end; exec sleep 1000";

fn limited(app: &str, image: &str, blkio: &str) -> String {
    let more = format!("      volumes: [\"data:/data\"]\n{blkio}");
    noise::manifest(app, image, WRITES, &more)
}

fn uptime(file: &Path) -> Option<f64> {
    let text = std::fs::read_to_string(file).ok()?;
    text.split_whitespace().next()?.parse().ok()
}

#[test]
fn a_service_is_held_to_its_rate_on_the_disk_of_the_state() {
    let bed = Bed::new("io");
    // A loop device: another disk than that of the machine, and another on every device.
    let _disk = SmallDisk::mount(&bed, "device-1/state", 160 << 20);
    let builder = Builder::new(&bed);
    builder.image("plain", &[], |_root| {});
    let fleet = Fleet::start(&bed, Hub::start(&bed), 1);
    let api = fleet.api();
    let plain = import(&api, &builder, "plain");
    let rate = "      blkio_config: {device_write_bps: [{path: state, rate: 1m}]}\n";
    api.apply("slow", &limited("slow", &plain, rate)).ok();
    api.apply("quick", &limited("quick", &plain, "")).ok();
    let volumes = fleet.devices[0].state().join("volumes");
    let took = |app: &str| {
        let data = volumes.join(app).join("data");
        wait_for(&format!("{app} to have written"), LONG, || {
            let times = (uptime(&data.join("begin")), uptime(&data.join("end")));
            let (Some(begin), Some(end)) = times else {
                return Err(times);
            };
            Ok(end - begin)
        })
    };
    let (slow, quick) = (took("slow"), took("quick"));
    assert!(
        slow > 4.0 * 0.8 && slow < 4.0 * 2.5,
        "{slow} s, quick {quick} s"
    );
    assert!(quick < 2.0, "{quick} s, slow {slow} s");
    fleet.await_rollout("slow", "completed");

    // Another limit is another container, as with every limit; the neighbour is not touched.
    let (before, neighbour) = ["slow", "quick"]
        .map(|app| await_container(&bed, "device-1", app, "bomb"))
        .into();
    std::fs::remove_file(volumes.join("slow/data/end")).expect("it was just read");
    let rate = "      blkio_config: {device_write_bps: [{path: state, rate: 1g}]}\n";
    api.apply("slow", &limited("slow", &plain, rate)).ok();
    wait_until("the new limit", LONG, || {
        container(&bed, "device-1", "slow", "bomb").is_some_and(|new| new != before)
    });
    let raised = took("slow");
    assert!(raised < 2.0, "{raised} s");
    assert_eq!(
        container(&bed, "device-1", "quick", "bomb"),
        Some(neighbour)
    );
}

#[test]
fn a_limit_that_cannot_be_set_brings_the_release_before_back_and_is_told() {
    let bed = Bed::new("io-limit");
    let builder = Builder::new(&bed);
    builder.image("plain", &[], |_root| {});
    let fleet = Fleet::start(&bed, Hub::start(&bed), 1);
    let api = fleet.api();
    let plain = import(&api, &builder, "plain");
    let applied = api.apply("app", &limited("app", &plain, "")).ok();
    let first = applied["release"].clone();
    fleet.await_rollout("app", "completed");
    let rate = "      blkio_config: {device_read_bps: [{path: /dev/loop-control, rate: 1m}]}\n";
    api.apply("app", &limited("app", &plain, rate)).ok();
    wait_for("the device to say why it does not run", LONG, || {
        let view = api.device("device-1");
        let status = app_status(&view, "app");
        let message = status["reason"]["message"].as_str().unwrap_or_default();
        let told = status["phase"] == "rolledBack"
            && status["reason"]["code"] == "io-limit"
            && message.contains("/dev/loop-control is no disk");
        if told { Ok(()) } else { Err(view) }
    });
    wait_for("the release before to run again", LONG, || {
        let view = api.device("device-1");
        let runs = app_status(&view, "app")["running"] == first;
        if runs {
            Ok(())
        } else {
            Err((view, first.clone()))
        }
    });
    let _runs = await_container(&bed, "device-1", "app", "bomb");
}
