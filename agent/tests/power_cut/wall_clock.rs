//! The wall clock of a device without a battery says 1970 until somebody sets it, and anything when somebody sets it
//! wrong.

use std::path::Path;
use std::time::{Duration, Instant};

use foreshore_protocol::message::EventKind;

use crate::device::Device;

/// 1970, 2026, and the second in which 32-bit unsigned seconds end: 2106-02-07.
const MOMENTS: [u64; 3] = [0, 1_790_000_000_000, 4_294_967_296_000];

#[test]
fn a_wall_clock_that_jumps_from_1970_to_2106_changes_nothing_that_runs() {
    let mut device = Device::new(20);
    device.set_clock(MOMENTS[0]);
    device.assign();
    device.start(None);
    device.await_settled();
    device.check_accounts();
    let (first, agent) = (device.container(), device.agent_pid());
    for moment in [MOMENTS[2], MOMENTS[0], MOMENTS[1], u64::MAX / 2, MOMENTS[0]] {
        device.set_clock(moment);
        device.assign_again();
        // That it was accepted is stamped with the new time: the agent has read this clock.
        device.await_event(EventKind::Accepted, |event| event.unix_ms == moment);
        device.await_settled();
        assert_eq!(device.container(), first, "at {moment}");
    }
    assert_eq!(device.agent_pid(), agent);
}

#[test]
fn whatever_the_wall_clock_says_containers_heal_agents_adopt_and_updates_work() {
    let mut device = Device::new(21);
    device.set_clock(MOMENTS[2]);
    device.assign();
    device.start(None);
    device.await_settled();
    device.check_accounts();
    let mut boot = 0;
    for moment in MOMENTS {
        device.set_clock(moment);
        let before = device.container();
        let killed = Instant::now();
        device.kill_container();
        device.await_other_container(&before);
        // A second of back-off, on a clock that does not jump.
        assert!(killed.elapsed() < Duration::from_secs(30), "at {moment}");

        device.kill();
        device.start(None);
        let adopted = device.container();
        device.assign();
        device.await_settled();
        device.check_accounts();
        assert_ne!(device.container(), adopted);
        let reported = device.boot();
        assert!(
            reported > boot,
            "at {moment} the hub would take reports for old ones"
        );
        boot = reported;
    }
}

/// Whoever wants the time asks the module `clock`; a timeout takes `Instant`, which does not jump.
#[test]
fn only_one_place_reads_the_wall_clock() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut found = Vec::new();
    for dir in ["agent/src", "agent/shim/src", "images/src", "protocol/src"] {
        look_for_wall_clocks(&root.join(dir), &mut found);
    }
    found.sort();
    let names: Vec<&str> = found.iter().map(String::as_str).collect();
    // The shim stamps log lines.
    assert_eq!(
        names,
        ["clock.rs", "sys.rs"],
        "files of device code that read the wall clock"
    );
}

fn look_for_wall_clocks(dir: &Path, found: &mut Vec<String>) {
    for entry in std::fs::read_dir(dir).unwrap().flatten() {
        let path = entry.path();
        if path.is_dir() {
            look_for_wall_clocks(&path, found);
            continue;
        }
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        // A file's age is measured with the wall clock, too.
        let asks = [
            "SystemTime",
            ".modified()",
            "CLOCK_REALTIME",
            "TimerfdClockid",
        ];
        // The doctor compares it with what the hub and the build say, and changes nothing.
        let own = path.ends_with("state/tests.rs")
            || dir.components().any(|part| part.as_os_str() == "doctor");
        if !own && asks.iter().any(|word| text.contains(word)) {
            found.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
}
