//! File systems, full ones and dying ones.

use super::*;

#[test]
fn a_full_disk_is_told_by_bytes_and_by_inodes() {
    let mut facts = debian();
    let space = facts.state.space.as_mut().unwrap();
    space.free_bytes = 10 << 20;
    space.free_inodes = 20;
    finding(
        &facts,
        CheckId::StateSpace,
        Level::Error,
        "10 MiB of 30 GiB free",
        "du -xhd1 / | sort -h",
    );
    finding(
        &facts,
        CheckId::StateInodes,
        Level::Error,
        "20 of 2000000",
        "du -xd1 --inodes /",
    );
    facts.state.space.as_mut().unwrap().free_bytes = 300 << 20;
    facts.state.space.as_mut().unwrap().free_inodes = 5000;
    finding(
        &facts,
        CheckId::StateSpace,
        Level::Warning,
        "300 MiB",
        "journalctl",
    );
    finding(&facts, CheckId::StateInodes, Level::Warning, "5000", "");
    // btrfs has no number of inodes.
    facts.state.space.as_mut().unwrap().total_inodes = 0;
    facts.state.space.as_mut().unwrap().free_inodes = 0;
    finding(&facts, CheckId::StateInodes, Level::Ok, "as needed", "");
    facts.state.sync = Tried::Fails("No space left on device (os error 28)".to_owned());
    finding(
        &facts,
        CheckId::StateSync,
        Level::Error,
        "No space",
        "du -xhd1",
    );
}

#[test]
fn a_file_system_that_does_not_suit_is_told_with_its_reason() {
    for (kind, why) in [
        ("overlay", "stacked"),
        ("vfat", "owners"),
        ("exfat", "owners"),
        ("ntfs3", "owners"),
        ("fuseblk", "FUSE"),
        ("fuse.sshfs", "FUSE"),
        ("nfs4", "network"),
        ("tmpfs", "reboot"),
        ("squashfs", "written"),
    ] {
        let mut facts = debian();
        facts.state.mount = Some(mount(kind, "/var", "rw"));
        facts.state.overlay = Tried::Fails("mount: Invalid argument (os error 22)".to_owned());
        finding(
            &facts,
            CheckId::StateFilesystem,
            Level::Error,
            why,
            "in /etc/foreshore/agent.toml, below [paths], the line `state =",
        );
        finding(
            &facts,
            CheckId::StateOverlay,
            Level::Error,
            "",
            "below [paths], the line `state =",
        );
    }
    // One that nobody has heard of is judged by the try.
    let mut facts = debian();
    facts.state.mount = Some(mount("newfs", "/", "rw"));
    assert_eq!(bad(&facts), []);
}

#[test]
fn read_only_noexec_and_missing_modules_have_their_own_fixes() {
    let mut facts = debian();
    facts.state.mount = Some(mount("ext4", "/data disk", "ro,relatime"));
    facts.state.sync = Tried::Fails("Read-only file system (os error 30)".to_owned());
    facts.state.overlay = Tried::Skipped("see state.sync".to_owned());
    finding(
        &facts,
        CheckId::StateFilesystem,
        Level::Error,
        "read-only",
        "mount -o remount,rw '/data disk'",
    );
    finding(
        &facts,
        CheckId::StateSync,
        Level::Error,
        "Read-only",
        "see state.filesystem",
    );
    finding(
        &facts,
        CheckId::StateOverlay,
        Level::Info,
        "not tried: see state.sync",
        "",
    );
    facts.state.mount = Some(mount("ext4", "/data", "rw,noexec"));
    finding(
        &facts,
        CheckId::StateFilesystem,
        Level::Error,
        "noexec",
        "remount,exec /data",
    );

    let mut facts = debian();
    facts.state.overlay =
        Tried::Fails("mount the overlay: No such device (os error 19)".to_owned());
    finding(
        &facts,
        CheckId::StateOverlay,
        Level::Error,
        "No such device",
        "modprobe overlay",
    );
    facts.state.mount = Some(mount("xfs", "/", "rw"));
    facts.state.overlay =
        Tried::Fails("mount the overlay: Invalid argument (os error 22)".to_owned());
    finding(&facts, CheckId::StateOverlay, Level::Error, "", "ftype=1");
}

#[test]
fn a_medium_that_hangs_or_fails_is_told() {
    let mut facts = debian();
    facts.state.sync_ms = 9000;
    finding(
        &facts,
        CheckId::StateSync,
        Level::Warning,
        "9000 ms",
        "dmesg",
    );
    facts.state.sync = Tried::TimedOut(15);
    finding(
        &facts,
        CheckId::StateSync,
        Level::Error,
        "15 s",
        "replace it",
    );
    facts.state.sync = Tried::Fails("Input/output error (os error 5)".to_owned());
    finding(
        &facts,
        CheckId::StateSync,
        Level::Error,
        "Input/output",
        "fsck",
    );
    facts.state.looked_at = None;
    facts.state.mount = None;
    facts.state.space = None;
    finding(
        &facts,
        CheckId::StateFilesystem,
        Level::Error,
        "does not answer",
        "dmesg",
    );
    finding(&facts, CheckId::StateSpace, Level::Info, "not known", "");
}

#[test]
fn an_agent_that_runs_already_is_told_with_its_process() {
    let mut facts = debian();
    facts.state.lock = StateLock::Held(Some(712));
    finding(&facts, CheckId::StateLock, Level::Info, "process 712", "");
    assert_eq!(bad(&facts), []);
    facts.run.mount = Some(ext4("/"));
    finding(
        &facts,
        CheckId::RunFilesystem,
        Level::Warning,
        "ext4",
        "mount -t tmpfs tmpfs /run",
    );
    facts.run.path = "/var/foreshore".into();
    finding(
        &facts,
        CheckId::RunFilesystem,
        Level::Warning,
        "ext4",
        "`run = \"/run/foreshore\"`",
    );
}

#[test]
fn user_namespaces_take_a_kernel_and_a_file_system_that_map_ids() {
    let failed = || Tried::Fails("map the ids of the mount: Invalid argument".to_owned());
    let mut facts = debian();
    finding(
        &facts,
        CheckId::StateIdmap,
        Level::Ok,
        "user namespaces",
        "",
    );
    facts.host.kernel = "5.15.0".to_owned();
    finding(
        &facts,
        CheckId::StateIdmap,
        Level::Warning,
        "5.15.0",
        "5.19",
    );
    facts.state.idmap = failed();
    finding(
        &facts,
        CheckId::StateIdmap,
        Level::Warning,
        "Invalid",
        "5.19",
    );
    let mut facts = debian();
    facts.state.idmap = failed();
    facts.state.mount = Some(mount("zfs", "/", "rw"));
    finding(
        &facts,
        CheckId::StateIdmap,
        Level::Warning,
        "root outside",
        "zfs may not",
    );
    facts.state.idmap = Tried::Fails("no user namespace can be made: EPERM".to_owned());
    finding(
        &facts,
        CheckId::StateIdmap,
        Level::Warning,
        "",
        "namespace.user",
    );
    facts.state.idmap = Tried::Skipped("see state.sync".to_owned());
    finding(&facts, CheckId::StateIdmap, Level::Info, "not tried", "");
}
