//! The state directory and what it is on, and the run directory.

use super::host::{SEE_PRIVILEGES, may_too_little, parse_version};
use super::{quoted, size, unless_failed};
use crate::doctor::facts::{Facts, InitKind, Mount, Space, StateLock};
use crate::doctor::finding::{Check, CheckId, Level};

/// Below this nothing can be staged, and state files may not find room.
const BYTES_MIN: u64 = 64 << 20;
/// Below this the next image may not fit.
const BYTES_LOW: u64 = 512 << 20;
/// Below this nothing can be unpacked.
const INODES_MIN: u64 = 1024;
/// Below this the next image may not fit: one of a language runtime has some 20,000 files.
const INODES_LOW: u64 = 20_000;
/// A medium that takes longer than this for a few bytes is busy or dying.
const SYNC_SLOW_MS: u64 = 2000;

/// What a file system is like for images.
enum Suits {
    /// Overlays can be mounted on it and it outlives a power cut.
    Yes,
    /// With the reason why not.
    No(&'static str),
    /// The try will show.
    Unknown,
}

fn suits(kind: &str) -> Suits {
    match kind {
        "ext4" | "xfs" | "btrfs" | "f2fs" | "bcachefs" | "zfs" | "ubifs" => Suits::Yes,
        "ext2" | "ext3" => Suits::Yes,
        "overlay" | "aufs" => Suits::No("overlays cannot be stacked on an overlay"),
        "tmpfs" | "ramfs" | "rootfs" => Suits::No("it is empty after a reboot"),
        "vfat" | "exfat" | "msdos" | "ntfs" | "ntfs3" | "hfsplus" => {
            Suits::No("it has neither owners nor extended attributes as Linux needs them")
        }
        "squashfs" | "iso9660" | "erofs" | "cramfs" | "romfs" => Suits::No("it cannot be written"),
        "nfs" | "nfs4" | "cifs" | "smb3" | "smbfs" | "9p" | "virtiofs" | "afs" | "ceph" => {
            Suits::No("it is over a network, and overlays cannot be written on it")
        }
        kind if kind == "fuse" || kind.starts_with("fuse") => {
            Suits::No("a program (FUSE) is behind it, and overlays cannot be written on it")
        }
        _ => Suits::Unknown,
    }
}

pub(super) fn filesystem(facts: &Facts) -> Check {
    let id = CheckId::StateFilesystem;
    let state = &facts.state;
    let path = state.path.display();
    let Some(mount) = &state.mount else {
        return match &state.looked_at {
            Some(dir) => Check::info(
                id,
                format!("{} is on no mount that is known", dir.display()),
            ),
            None => Check::error(
                id,
                format!("{path} could not be looked at in time: its medium does not answer"),
                "see what the kernel says of it: dmesg | tail -50; replace the medium, or mount it again",
            ),
        };
    };
    let described = format!("{path}: {} on {}", mount.kind, mount.point.display());
    if let Suits::No(why) = suits(&mount.kind) {
        return Check::error(id, format!("{described}; {why}"), elsewhere(facts));
    }
    let point = quoted(&mount.point);
    if mount.has("ro") || state.space.is_some_and(|space| space.read_only) {
        return Check::error(
            id,
            format!("{described}, read-only"),
            format!(
                "mount -o remount,rw {point}; if the kernel made it so after errors (dmesg | grep -i error), check it first: umount {point} && fsck {}",
                mount.source
            ),
        );
    }
    if mount.has("noexec") {
        return Check::error(
            id,
            format!(
                "{described}, noexec; the program that watches over each container is started from there"
            ),
            format!("mount -o remount,exec {point}, and take noexec out of its line in /etc/fstab"),
        );
    }
    Check::ok(id, described)
}

/// Where state should be instead.
fn elsewhere(facts: &Facts) -> String {
    let config = quoted(&facts.config.path);
    match &facts.host.container {
        Some(kind) => format!(
            "give this {kind} container a volume there: -v foreshore-state:{}",
            quoted(&facts.state.path)
        ),
        None => format!(
            "in {config}, below [paths], the line `state = \"/DIR/foreshore\"` with a directory on ext4, xfs, btrfs or f2fs (findmnt -t ext4,xfs,btrfs,f2fs lists them)"
        ),
    }
}

pub(super) fn space(facts: &Facts) -> Check {
    let id = CheckId::StateSpace;
    let Some(space) = facts.state.space else {
        return Check::info(id, "not known: the file system could not be asked");
    };
    let Space {
        total_bytes,
        free_bytes,
        ..
    } = space;
    let found = format!("{} of {} free", size(free_bytes), size(total_bytes));
    let fix = make_room(facts, "du -xhd1");
    match free_bytes {
        0..BYTES_MIN => Check::error(id, format!("{found}; no image can be staged"), fix),
        BYTES_MIN..BYTES_LOW => {
            Check::warning(id, format!("{found}; the next image may not fit"), fix)
        }
        _ => Check::ok(id, found),
    }
}

pub(super) fn inodes(facts: &Facts) -> Check {
    let id = CheckId::StateInodes;
    let Some(space) = facts.state.space else {
        return Check::info(id, "not known: the file system could not be asked");
    };
    if space.total_inodes == 0 {
        return Check::ok(id, "made as needed");
    }
    let found = format!("{} of {} free", space.free_inodes, space.total_inodes);
    let fix = make_room(facts, "du -xd1 --inodes");
    match space.free_inodes {
        0..INODES_MIN => Check::error(id, format!("{found}; no image can be unpacked"), fix),
        INODES_MIN..INODES_LOW => {
            Check::warning(id, format!("{found}; the next image may not fit"), fix)
        }
        _ => Check::ok(id, found),
    }
}

fn make_room(facts: &Facts, count: &str) -> String {
    let mount = facts.state.mount.as_ref();
    let point = mount.map_or("/", |mount| mount.point.to_str().unwrap_or("/"));
    let journal = match facts.init.kind {
        InitKind::Systemd => "journalctl --vacuum-size=50M and apt-get clean help often; ",
        InitKind::OpenRc | InitKind::Other => "",
    };
    format!(
        "delete what is not needed: {journal}{count} {} | sort -h shows what takes most; or a larger medium",
        quoted(point.as_ref())
    )
}

pub(super) fn sync(facts: &Facts) -> Check {
    let id = CheckId::StateSync;
    let state = &facts.state;
    let works = format!("a file is on the medium after {} ms", state.sync_ms);
    let slow = "see what the kernel says of it: dmesg | tail -50; a card that hangs is about to fail: replace it";
    match unless_failed(id, &state.sync, &works, slow) {
        Ok(check) if check.level == Level::Ok && state.sync_ms > SYNC_SLOW_MS => Check::warning(
            id,
            format!("{works}: the medium is busy or about to fail"),
            "see what writes to it (pidstat -d 5) and what the kernel says of it (dmesg | tail -50); replace a card that is slow when idle",
        ),
        Ok(check) => check,
        Err(why) => Check::error(
            id,
            format!("nothing can be stored: {why}"),
            sync_fix(facts, &why),
        ),
    }
}

fn sync_fix(facts: &Facts, why: &str) -> String {
    let why = why.to_lowercase();
    if why.contains("no space") || why.contains("quota") {
        return make_room(facts, "du -xhd1");
    }
    if why.contains("read-only") {
        return "see state.filesystem".to_owned();
    }
    if why.contains("permission") || why.contains("not permitted") {
        return "run it as root: sudo foreshore-agent doctor".to_owned();
    }
    "see what the kernel says of the medium (dmesg | tail -50), check it (fsck) and replace it if errors come back"
        .to_owned()
}

pub(super) fn overlay(facts: &Facts) -> Check {
    let id = CheckId::StateOverlay;
    let slow = "see what the kernel says of it: dmesg | tail -50";
    unless_failed(
        id,
        &facts.state.overlay,
        "overlays can be mounted on it",
        slow,
    )
    .unwrap_or_else(|why| {
        Check::error(
            id,
            format!("overlays cannot be mounted on it: {why}"),
            overlay_fix(facts, &why),
        )
    })
}

/// The first Linux whose overlays take layers that are mounted with mapped ids.
const KERNEL_IDMAP: (u32, u32) = (5, 19);

pub(super) fn idmap(facts: &Facts) -> Check {
    let id = CheckId::StateIdmap;
    let slow = "see what the kernel says of it: dmesg | tail -50";
    let kernel = &facts.host.kernel;
    let old = parse_version(kernel).is_some_and(|version| version < KERNEL_IDMAP);
    let works = "containers can have user namespaces on it";
    let why = match unless_failed(id, &facts.state.idmap, works, slow) {
        Ok(check) if old && check.level == Level::Ok => {
            format!("Linux {kernel} cannot mount overlays of layers with mapped ids")
        }
        Ok(check) => return check,
        Err(why) => why,
    };
    let mount = facts.state.mount.as_ref();
    let fix = if may_too_little(facts) {
        SEE_PRIVILEGES.to_owned()
    } else if why.contains("no user namespace") {
        "see namespace.user: the same is in the way here".to_owned()
    } else if old {
        "use Linux 5.19 or later; Debian 12 has 6.1".to_owned()
    } else if let Some(kind) = &facts.host.container {
        super::privileged(kind)
    } else if let Some(Mount { kind, .. }) = mount {
        format!("{kind} may not be able to; {}", elsewhere(facts))
    } else {
        elsewhere(facts)
    };
    Check::warning(
        id,
        format!("containers run without user namespaces, root inside is root outside: {why}"),
        fix,
    )
}

fn overlay_fix(facts: &Facts, why: &str) -> String {
    let why = why.to_lowercase();
    if why.contains("no such device") || why.contains("enodev") {
        return "modprobe overlay && echo overlay > /etc/modules-load.d/foreshore.conf; if there is no such module, use a kernel that is built with CONFIG_OVERLAY_FS"
            .to_owned();
    }
    if may_too_little(facts) {
        return SEE_PRIVILEGES.to_owned();
    }
    if why.contains("no space") {
        return make_room(facts, "du -xhd1");
    }
    if why.contains("read-only") {
        return "see state.filesystem".to_owned();
    }
    let mount = facts.state.mount.as_ref();
    if mount.is_some_and(|mount| matches!(suits(&mount.kind), Suits::No(_))) {
        return elsewhere(facts);
    }
    if why.contains("not permitted") || why.contains("permission") {
        return match &facts.host.container {
            Some(kind) => super::privileged(kind),
            None => "see whether a security module refuses it: dmesg | grep -i -e apparmor -e selinux | tail".to_owned(),
        };
    }
    match mount {
        Some(Mount { kind, point, .. }) if kind == "xfs" => format!(
            "xfs_info {} must say ftype=1; if it says ftype=0, make the file system anew: mkfs.xfs -n ftype=1",
            quoted(point)
        ),
        _ => format!(
            "see what the kernel says (dmesg | grep -i overlay | tail); {}",
            elsewhere(facts)
        ),
    }
}

pub(super) fn lock(facts: &Facts) -> Check {
    let id = CheckId::StateLock;
    match &facts.state.lock {
        StateLock::Free => Check::ok(id, "no agent runs with this state directory"),
        StateLock::Held(pid) => {
            let who = pid.map_or_else(String::new, |pid| format!(" (process {pid})"));
            Check::info(
                id,
                format!(
                    "an agent runs with this state directory{who}; a second one would not start"
                ),
            )
        }
        StateLock::Unknown(why) => Check::info(id, format!("not known: {why}")),
    }
}

pub(super) fn run(facts: &Facts) -> Check {
    let id = CheckId::RunFilesystem;
    let run = &facts.run;
    let path = run.path.display();
    let config = quoted(&facts.config.path);
    let fix = if run.path.starts_with("/run") {
        "mount -t tmpfs tmpfs /run early at boot, before anything is started; in /etc/fstab: tmpfs /run tmpfs nosuid,nodev,mode=755 0 0".to_owned()
    } else {
        format!("in {config}, below [paths], the line `run = \"/run/foreshore\"`")
    };
    match &run.mount {
        None => Check::info(id, format!("{path} is on no mount that is known")),
        Some(Mount { kind, .. }) if kind != "tmpfs" && kind != "ramfs" => Check::warning(
            id,
            format!(
                "{path} is on {kind} and survives a reboot: what it says of containers is wrong then, and flash wears"
            ),
            fix,
        ),
        Some(mount) if mount.has("ro") => Check::error(
            id,
            format!("{path} is read-only"),
            format!("mount -o remount,rw {}", quoted(&mount.point)),
        ),
        Some(mount) => Check::ok(id, format!("{path}: {}", mount.kind)),
    }
}
