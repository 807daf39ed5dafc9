//! The state directory: read-only, full, locked, on file systems that do not suit; and what is left in it.

use std::process::Command;

use nix::fcntl::{Flock, FlockArg};

use crate::bed::{AGENT, Bed, Check, Report, assert_root, names};

/// Runs the doctor in a private mount namespace, after `prepare` in a shell. `$S` is the state directory.
fn with_mounts(bed: &Bed, prepare: &str) -> Report {
    assert_root();
    let script = format!("set -e\n{prepare}\nexec \"$AGENT\" doctor -o json --config \"$CONFIG\"");
    let output = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-c", &script])
        .env("S", bed.state())
        .env("AGENT", AGENT)
        .env("CONFIG", bed.config())
        .output()
        .unwrap();
    assert!(
        !output.stdout.is_empty(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Report::read(&output)
}

/// Whether the fix is to have the state elsewhere. The tests may run in a container themselves.
fn moves(check: &Check) -> bool {
    let fix = check.fix.as_deref().unwrap_or_default();
    fix.contains("below [paths]") || fix.contains("-v foreshore-state")
}

fn mounts() -> String {
    let text = std::fs::read_to_string("/proc/self/mounts").unwrap();
    let ours = text
        .lines()
        .filter(|line| line.contains("foreshore-doctor"));
    ours.collect()
}

#[test]
fn nothing_is_left_behind_and_what_a_killed_one_left_is_swept() {
    assert_root();
    let bed = Bed::new();
    assert_eq!(bed.doctor().of("state.overlay").level, "ok");
    assert_eq!(bed.left(), Vec::<String>::new());
    assert_eq!(mounts(), "");

    // What a power cut leaves, and what is none of ours.
    let dead = bed.state().join(".foreshore-doctor-1");
    std::fs::create_dir_all(dead.join("upper/work")).unwrap();
    std::fs::write(bed.state().join(".foreshore-doctor-file"), "").unwrap();
    let alive = bed.state().join(".foreshore-doctor-2");
    std::fs::create_dir(&alive).unwrap();
    let open = std::fs::File::open(&alive).unwrap();
    let _lock = Flock::lock(open, FlockArg::LockExclusiveNonblock).unwrap();
    assert_eq!(bed.doctor().of("state.overlay").level, "ok");
    assert_eq!(
        bed.left(),
        [".foreshore-doctor-2", ".foreshore-doctor-file"]
    );
}

#[test]
fn a_doctor_that_is_killed_in_the_middle_leaves_nothing_either() {
    assert_root();
    let bed = Bed::new();
    for round in 0..20_u64 {
        let mut doctor = Command::new(AGENT)
            .args(["doctor", "-o", "json", "--config"])
            .arg(bed.config())
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        // A moment that differs from round to round; wherever it is, the same must hold.
        std::thread::sleep(std::time::Duration::from_millis(round * 2));
        doctor.kill().unwrap();
        doctor.wait().unwrap();
    }
    let end = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while !bed.left().is_empty() {
        assert!(std::time::Instant::now() < end, "left: {:?}", bed.left());
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    assert_eq!(mounts(), "");
}

#[test]
fn a_state_directory_that_does_not_exist_is_judged_by_where_it_would_be_and_not_made() {
    assert_root();
    let bed = Bed::new();
    std::fs::remove_dir(bed.state()).unwrap();
    let before = names(bed.path());
    let report = bed.doctor();
    assert_eq!(report.of("state.overlay").level, "ok");
    assert_eq!(report.of("state.lock").level, "ok");
    assert_eq!(names(bed.path()), before);
}

#[test]
fn an_agent_that_holds_the_lock_is_told_and_not_disturbed() {
    let bed = Bed::new();
    let lock = foreshore_agent::state::lock(&bed.state()).unwrap();
    let report = bed.doctor();
    let found = report.of("state.lock");
    assert_eq!(found.level, "info");
    let own = format!("(process {})", std::process::id());
    assert!(found.found.contains(&own), "{found:?}");
    // The other way round: the doctor's look leaves the lock free.
    drop(lock);
    assert_eq!(bed.doctor().of("state.lock").level, "ok");
    foreshore_agent::state::lock(&bed.state()).unwrap();
}

#[test]
fn file_systems_that_do_not_suit_are_told_with_the_fix() {
    let bed = Bed::new();
    let report = with_mounts(&bed, "mount -t tmpfs tmpfs \"$S\"");
    let found = report.of("state.filesystem");
    assert_eq!((found.level.as_str(), report.code), ("error", Some(1)));
    assert!(found.found.contains("reboot"), "{found:?}");
    assert!(moves(&found), "{found:?}");

    let report = with_mounts(
        &bed,
        "mount --bind \"$S\" \"$S\"; mount -o remount,bind,ro \"$S\"",
    );
    assert!(
        report.of("state.filesystem").found.contains("read-only"),
        "{report:#?}"
    );
    assert!(
        report.of("state.sync").found.contains("Read-only"),
        "{report:#?}"
    );

    let report = with_mounts(
        &bed,
        "mount --bind \"$S\" \"$S\"; mount -o remount,bind,noexec \"$S\"",
    );
    let found = report.of("state.filesystem");
    assert!(found.found.contains("noexec"), "{report:#?}");
    let fix = format!("mount -o remount,exec {}", bed.state().display());
    assert!(found.fix.unwrap().contains(&fix), "{report:#?}");
}

#[test]
fn an_overlay_on_an_overlay_really_fails() {
    let bed = Bed::new();
    let report = with_mounts(
        &bed,
        "mkdir \"$S/l\" \"$S/u\" \"$S/w\"; mount -t overlay o -o \"lowerdir=$S/l,upperdir=$S/u,workdir=$S/w\" \"$S\"",
    );
    assert!(
        report.of("state.filesystem").found.contains("stacked"),
        "{report:#?}"
    );
    let overlay = report.of("state.overlay");
    assert_eq!(overlay.level, "error", "{report:#?}");
    assert!(moves(&overlay), "{overlay:?}");
}

#[test]
fn a_full_file_system_is_told_by_bytes_and_by_inodes() {
    let bed = Bed::new();
    let report = with_mounts(
        &bed,
        "mount -t tmpfs -o size=1m,nr_inodes=100 tmpfs \"$S\"; dd if=/dev/zero of=\"$S/fill\" bs=64k 2>/dev/null || true",
    );
    assert_eq!(report.of("state.space").level, "error");
    assert!(
        report.of("state.space").found.starts_with("0 KiB of"),
        "{report:#?}"
    );
    assert_eq!(report.of("state.inodes").level, "error");
    assert!(
        report.of("state.sync").found.contains("No space"),
        "{report:#?}"
    );
}

#[test]
fn a_user_who_is_not_root_learns_what_can_be_learned() {
    assert_root();
    let bed = Bed::open_to_others();
    // Where the program was built may not be open to others.
    let program = bed.path().join("agent");
    std::fs::copy(AGENT, &program).unwrap();
    for path in [bed.path().to_owned(), program.clone(), bed.state()] {
        crate::bed::set_mode(&path, 0o755);
    }
    let output = Command::new("setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
        .arg(&program)
        .args(["doctor", "-o", "json", "--config"])
        .arg(bed.config())
        .output()
        .unwrap();
    let report = Report::read(&output);
    assert_eq!(report.code, Some(1));
    let found = report.of("host.privileges");
    let fix = found.fix.unwrap();
    // The tests may run in a container themselves.
    assert!(
        fix.contains("sudo foreshore-agent doctor") || fix.contains("--privileged"),
        "{fix}"
    );
    assert_eq!(
        report.of("namespace.mount").found,
        "not tried: only root may"
    );
    assert!(
        report.of("state.sync").found.contains("Permission denied"),
        "{report:#?}"
    );
    assert_eq!(report.of("hub.connect").level, "ok");
}

#[test]
fn root_that_may_too_little_is_told_the_one_cause_and_nothing_is_left() {
    assert_root();
    for (wrapper, found) in [
        (
            vec!["setpriv", "--bounding-set=-sys_admin"],
            "CAP_SYS_ADMIN",
        ),
        (
            vec!["unshare", "--user", "--map-root-user"],
            "user namespace",
        ),
    ] {
        let bed = Bed::new();
        let output = Command::new(wrapper[0])
            .args(&wrapper[1..])
            .arg(AGENT)
            .args(["doctor", "-o", "json", "--config"])
            .arg(bed.config())
            .output()
            .unwrap();
        let report = Report::read(&output);
        assert_eq!(report.code, Some(1));
        assert!(
            report.of("host.privileges").found.contains(found),
            "{report:#?}"
        );
        let overlay = report.of("state.overlay");
        assert!(
            overlay.fix.unwrap().contains("see host.privileges"),
            "{report:#?}"
        );
        assert_eq!(bed.left(), Vec::<String>::new());
    }
}
