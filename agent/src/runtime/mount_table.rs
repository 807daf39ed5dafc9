//! Looks at a container's mounts after they were made and before its program runs.
//!
//! Mount points are looked up in file systems that others may be changing: a volume that a running container of the
//! same app has too. A link put there at the right moment can make a mount land elsewhere, or a masked path not be
//! masked (CVE-2025-31133 and its kin). Whatever the library made of it, a container starts only when the kernel
//! says that every mount is where it was asked for, as restricted as it was asked for, and that there is no other.

use serde_json::Value;

/// What may be mounted in `/dev` besides what the configuration names: the nodes every container has.
const NODES: [&str; 6] = [
    "/dev/full",
    "/dev/null",
    "/dev/random",
    "/dev/tty",
    "/dev/urandom",
    "/dev/zero",
];

#[derive(Debug)]
struct Mount {
    point: String,
    options: String,
}

impl Mount {
    /// One line of `/proc/PID/mountinfo`, proc(5).
    fn parse(line: &str) -> Option<Self> {
        let mut fields = line.split(' ');
        Some(Self {
            point: unescape(fields.nth(4)?),
            options: fields.next()?.to_owned(),
        })
    }

    fn has(&self, option: &str) -> bool {
        self.options.split(',').any(|has| has == option)
    }
}

/// The kernel writes space, tab, newline and backslash as three octal digits.
fn unescape(field: &str) -> String {
    let mut out = field.to_owned();
    for (escaped, plain) in [
        ("\\040", " "),
        ("\\011", "\t"),
        ("\\012", "\n"),
        ("\\134", "\\"),
    ] {
        out = out.replace(escaped, plain);
    }
    out
}

/// Compares the mounts of a container that has not been let run (`mountinfo` of its first process) with its
/// configuration. `exists` tells of a path whether the container has it.
///
/// # Errors
///
/// What is wrong, naming the mount.
pub(crate) fn check(
    configuration: &Value,
    mountinfo: &str,
    exists: impl Fn(&str) -> bool,
) -> Result<(), String> {
    let mut mounts: Vec<Mount> = mountinfo.lines().filter_map(Mount::parse).collect();
    // The last one of a path is the one that is seen.
    let mut take = |point: &str| {
        let index = mounts.iter().rposition(|mount| mount.point == point);
        index.map(|index| mounts.remove(index))
    };
    let mut trees: Vec<(&str, Vec<&str>)> = Vec::new();
    let linux = &configuration["linux"];
    for point in texts(&linux["maskedPaths"]).filter(|point| exists(point)) {
        take(point).ok_or_else(|| format!("{point} is not masked"))?;
    }
    for point in texts(&linux["readonlyPaths"]).filter(|point| exists(point)) {
        require(take(point).as_ref(), point, &["ro"])?;
    }
    let asked = configuration["mounts"].as_array().into_iter().flatten();
    // Made in this order, so that the last of two at one place is on top.
    for mount in asked.rev() {
        let point = mount["destination"].as_str().unwrap_or_default();
        let options: Vec<&str> = texts(&mount["options"]).collect();
        let restrictions = restrictions(&options);
        require(take(point).as_ref(), point, &restrictions)?;
        if options.contains(&"rbind") {
            trees.push((point, restrictions));
        }
    }
    let read_only = configuration["root"]["readonly"] == true;
    let root: &[&str] = if read_only {
        &["ro", "nodev"]
    } else {
        &["nodev"]
    };
    require(take("/").as_ref(), "/", root)?;
    let devices = linux["devices"].as_array().into_iter().flatten();
    let devices: Vec<&str> = devices
        .filter_map(|device| device["path"].as_str())
        .chain(NODES)
        .collect();
    for left in &mounts {
        let tree = trees.iter().find(|(point, _)| {
            left.point
                .strip_prefix(point)
                .is_some_and(|rest| rest.starts_with('/'))
        });
        match tree {
            Some((_, restrictions)) => require(Some(left), &left.point, restrictions)?,
            None if devices.contains(&left.point.as_str()) => {}
            None => return Err(format!("something else is mounted on {}", left.point)),
        }
    }
    Ok(())
}

fn texts(value: &Value) -> impl DoubleEndedIterator<Item = &str> {
    value
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
}

/// The options of a mount that take something away, as mountinfo names them.
fn restrictions<'a>(options: &[&'a str]) -> Vec<&'a str> {
    let names = ["ro", "nosuid", "nodev", "noexec"];
    let plain = options.iter().filter_map(|option| {
        names
            .into_iter()
            .find(|name| option == name || option.strip_prefix('r') == Some(*name))
    });
    plain.collect()
}

fn require(mount: Option<&Mount>, point: &str, restrictions: &[&str]) -> Result<(), String> {
    let mount = mount.ok_or_else(|| format!("nothing is mounted on {point}"))?;
    match restrictions.iter().find(|option| !mount.has(option)) {
        None => Ok(()),
        Some(option) => Err(format!("the mount on {point} is not {option}")),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const GOOD: &str = "\
1 0 0:1 / / ro,nodev - overlay overlay rw
2 1 0:2 / /proc rw,nosuid,nodev,noexec - proc proc rw
3 1 0:3 / /dev rw,nosuid - tmpfs tmpfs rw
4 3 0:4 /null /dev/null rw - devtmpfs dev rw
5 1 8:1 /vol /data\\040dir rw,nosuid,nodev - ext4 /dev/sda rw
6 1 8:1 /srv /tree ro,nosuid,nodev - ext4 /dev/sda rw
7 6 8:2 / /tree/below ro,nosuid,nodev - ext4 /dev/sdb rw
8 2 0:2 /sys /proc/sys ro,nosuid - proc proc rw
9 2 0:4 /null /proc/kcore rw - tmpfs tmpfs rw";

    fn configuration() -> Value {
        json!({
            "root": {"readonly": true},
            "mounts": [
                {"destination": "/proc", "options": ["nosuid", "noexec", "nodev"]},
                {"destination": "/dev", "options": ["nosuid", "mode=755"]},
                {"destination": "/data dir", "options": ["bind", "nosuid", "nodev", "rw"]},
                {"destination": "/tree", "options": ["rbind", "rnosuid", "rnodev", "rro"]},
            ],
            "linux": {"maskedPaths": ["/proc/kcore", "/proc/missing"], "readonlyPaths": ["/proc/sys"]},
        })
    }

    fn checked(mountinfo: &str) -> Result<(), String> {
        check(&configuration(), mountinfo, |path| path != "/proc/missing")
    }

    #[test]
    fn mounts_as_asked_pass() {
        assert_eq!(checked(GOOD), Ok(()));
    }

    #[test]
    fn whatever_is_missing_or_elsewhere_or_less_restricted_is_noticed() {
        for (change, to, complaint) in [
            (
                " /proc/kcore ",
                " /proc/kcare ",
                "/proc/kcore is not masked",
            ),
            (" /proc/sys ro,", " /proc/sys rw,", "/proc/sys is not ro"),
            (
                " /proc/sys ",
                " /proc/sus ",
                "nothing is mounted on /proc/sys",
            ),
            (" / ro,", " / rw,", "the mount on / is not ro"),
            ("/data\\040dir ", "/etc ", "nothing is mounted on /data dir"),
            (
                "/data\\040dir rw,nosuid,",
                "/data\\040dir rw,",
                "is not nosuid",
            ),
            (
                "/tree/below ro,",
                "/tree/below rw,",
                "/tree/below is not ro",
            ),
            (
                "/tree/below ",
                "/treetop ",
                "something else is mounted on /treetop",
            ),
            (
                "/dev/null ",
                "/dev/sda ",
                "something else is mounted on /dev/sda",
            ),
        ] {
            let bad = GOOD.replacen(change, to, 1);
            assert_ne!(bad, GOOD, "{change}");
            let found = checked(&bad).unwrap_err();
            assert!(found.contains(complaint), "{change} gave {found}");
        }
        // A volume that landed on /proc, because its mount point was turned into a link in time.
        let over = GOOD.replacen("/data\\040dir ", "/proc ", 1);
        assert!(checked(&over).is_err());
        let twice =
            format!("{GOOD}\n10 2 8:1 /vol /proc rw,nosuid,nodev,noexec - ext4 /dev/sda rw");
        assert_eq!(
            checked(&twice).unwrap_err(),
            "something else is mounted on /proc"
        );
    }
}
