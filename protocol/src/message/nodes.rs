//! Which nodes below `/dev` a device tells the hub of.

/// Directories deeper than this below `/dev` are not looked into; `/dev/bus/usb/001/002` is as deep.
pub const DEV_NODE_DEPTH: usize = 4;

/// Directories that hold no devices of the machine, or only other names of its disks.
const PLACES: [&str; 9] = [
    "block",
    "char",
    "disk",
    "fd",
    "hugepages",
    "mapper",
    "mqueue",
    "pts",
    "shm",
];

/// Nodes that every kernel has, whatever is plugged in.
const ALWAYS: [&str; 14] = [
    "console", "core", "full", "kmsg", "mem", "null", "port", "ptmx", "random", "stderr", "stdin",
    "stdout", "urandom", "zero",
];

/// Nodes of which there are many whatever is plugged in: these, with a number.
const NUMBERED: [&str; 6] = ["loop", "nbd", "ram", "tty", "vcs", "vcsa"];

/// Whether an inventory names this node when it is there. Of others nothing can be said.
#[must_use]
pub fn tells_of(node: &str) -> bool {
    let Some(below) = node.strip_prefix("/dev/") else {
        return false;
    };
    let parts: Vec<&str> = below.split('/').collect();
    let plain = parts.iter().all(|part| !matches!(*part, "" | "." | ".."));
    let numbered = |name: &str| {
        NUMBERED.iter().any(|stem| {
            name.strip_prefix(stem)
                .is_some_and(|rest| rest.bytes().all(|byte| byte.is_ascii_digit()))
        })
    };
    plain
        && parts.len() <= DEV_NODE_DEPTH
        && !PLACES.contains(&parts[0])
        && (parts.len() > 1 || (!ALWAYS.contains(&parts[0]) && !numbered(parts[0])))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_can_be_plugged_in_is_told_and_what_is_always_there_is_not() {
        for told in [
            "/dev/ttyUSB0",
            "/dev/ttyS0",
            "/dev/i2c-1",
            "/dev/dri/renderD128",
            "/dev/bus/usb/001/002",
            "/dev/serial/by-id/usb-1a86-if00",
            "/dev/net/tun",
            "/dev/mmcblk0",
            "/dev/loop-control",
        ] {
            assert!(tells_of(told), "{told}");
        }
        for untold in [
            "/dev/tty",
            "/dev/tty1",
            "/dev/loop0",
            "/dev/vcsa12",
            "/dev/null",
            "/dev/pts/0",
            "/dev/disk/by-id/x",
            "/dev/a/b/c/d/e",
            "/dev/../etc/passwd",
            "/dev//x",
            "/dev/",
            "/dev",
            "/sys/x",
            "",
        ] {
            assert!(!tells_of(untold), "{untold}");
        }
    }
}
