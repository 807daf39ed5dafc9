//! Which cgroups there are, and whether limits can be set at the configured parent.

use super::host::{SEE_PRIVILEGES, may_too_little};
use super::{boot, unless_failed};
use crate::doctor::facts::{Cgroups, Facts, InitKind, Layout, Place};
use crate::doctor::finding::{Check, CheckId};

/// The words that a Raspberry Pi's firmware needs to leave the memory controller on.
const RASPBERRY_PI_MEMORY: &str = "cgroup_enable=memory cgroup_memory=1";

/// What cgroup v2 instead of v1 takes under systemd (systemd(1), "Kernel Command Line").
const UNIFIED: &str = "systemd.unified_cgroup_hierarchy=1";

/// Why it is no error that reading and writing cannot be limited.
const ONLY_BLKIO: &str = "only services with limits under blkio_config need it, and do not start";

pub(super) fn version(facts: &Facts) -> Check {
    let id = CheckId::CgroupVersion;
    match &facts.cgroups.layout {
        Layout::Unified { .. } => Check::ok(id, "cgroup v2"),
        Layout::Split { hybrid, .. } => {
            let found = if *hybrid {
                "cgroup v1 with controllers, v2 without (hybrid); it works, v2 is better tested"
            } else {
                "cgroup v1; it works, v2 is better tested"
            };
            Check::hint(id, found, to_unified(facts))
        }
        Layout::Missing { elsewhere: None } => Check::error(
            id,
            "no cgroups are mounted at /sys/fs/cgroup",
            mount_them(facts),
        ),
        Layout::Missing {
            elsewhere: Some(elsewhere),
        } => Check::error(
            id,
            format!(
                "cgroup v2 is mounted at {}, nothing that can be used at /sys/fs/cgroup",
                elsewhere.display()
            ),
            mount_them(facts),
        ),
    }
}

fn to_unified(facts: &Facts) -> String {
    match facts.init.kind {
        InitKind::Systemd => boot::add(&facts.host, UNIFIED),
        InitKind::OpenRc => {
            "sed -i 's/^#*rc_cgroup_mode=.*/rc_cgroup_mode=\"unified\"/' /etc/rc.conf && reboot".to_owned()
        }
        InitKind::Other => {
            "where the controllers are mounted at boot, mount cgroup2 instead: mount -t cgroup2 none /sys/fs/cgroup"
                .to_owned()
        }
    }
}

fn mount_them(facts: &Facts) -> String {
    match facts.init.kind {
        InitKind::OpenRc => "rc-update add cgroups boot && rc-service cgroups start".to_owned(),
        InitKind::Systemd | InitKind::Other => {
            "mount -t cgroup2 none /sys/fs/cgroup, and the line \"none /sys/fs/cgroup cgroup2 rw,nosuid,nodev,noexec 0 0\" in /etc/fstab"
                .to_owned()
        }
    }
}

pub(super) fn controller(id: CheckId, name: &str, facts: &Facts) -> Check {
    let checked = match &facts.cgroups.layout {
        Layout::Missing { .. } => {
            return Check::info(id, "not looked at: no cgroups are mounted");
        }
        Layout::Unified { .. } => match unified(name, facts) {
            Ok(_) if blocker(&facts.cgroups, name).is_some() => {
                let parent = &facts.cgroups.parent;
                return Check::info(
                    id,
                    format!("there, but not for {parent}: see cgroup.delegation"),
                );
            }
            other => other,
        },
        // blkio is what v1 calls it.
        Layout::Split { controllers, .. } => {
            let v1 = if name == "io" { "blkio" } else { name };
            match controllers.get(v1) {
                Some(mount) => Ok(format!("{}", mount.point.display())),
                None => Err(split_reason(v1, facts)),
            }
        }
    };
    match checked {
        Ok(found) if name == "cpu" && facts.cgroups.cpu_quota == Some(false) => Check::warning(
            id,
            format!("{found}, but without quotas: `cpus` of a service cannot be limited"),
            "use a kernel that is built with CONFIG_CFS_BANDWIDTH=y",
        ),
        Ok(found) if name == "io" => io(id, &found, facts),
        Ok(found) => Check::ok(id, found),
        Err((found, fix)) if name == "io" => Check::hint(id, format!("{found}; {ONLY_BLKIO}"), fix),
        Err((found, fix)) => Check::error(id, found, fix),
    }
}

/// Whether `blkio_config` of a service can be had.
fn io(id: CheckId, found: &str, facts: &Facts) -> Check {
    if facts.cgroups.io_limit == Some(false) {
        return Check::hint(
            id,
            format!("{found}, but without limits on reading and writing; {ONLY_BLKIO}"),
            "use a kernel that is built with CONFIG_BLK_DEV_THROTTLING=y",
        );
    }
    let disks = match &facts.disks {
        Ok(disks) => disks,
        Err(why) => {
            let found = format!("{found}; `state` means no disk in blkio_config here: {why}");
            return Check::ok(id, found);
        }
    };
    let names: Vec<&str> = disks.iter().map(|disk| disk.name.as_str()).collect();
    let without: Vec<&str> = disks
        .iter()
        .filter_map(|disk| disk.weights.as_ref().err().map(String::as_str))
        .collect();
    let weights = if without.is_empty() {
        "weights have an effect".to_owned()
    } else {
        format!("weights have no effect: {}", without.join("; "))
    };
    let names = names.join(", ");
    Check::ok(
        id,
        format!("{found}; `state` in blkio_config is {names}, where {weights}"),
    )
}

/// On v1 a controller, on v2 a program that the kernel runs at every open.
pub(super) fn devices(facts: &Facts) -> Check {
    let id = CheckId::CgroupDevices;
    if !matches!(facts.cgroups.layout, Layout::Unified { .. }) {
        return controller(id, "devices", facts);
    }
    let works = "a BPF program limits containers to their devices, as cgroup v2 has it";
    let slow = "see why processes do not end: dmesg | tail";
    unless_failed(id, &facts.device_filter, works, slow).unwrap_or_else(|why| {
        let fix = if may_too_little(facts) {
            SEE_PRIVILEGES.to_owned()
        } else {
            match &facts.host.container {
                Some(kind) => super::privileged(kind),
                None => "use a kernel that is built with CONFIG_CGROUP_BPF=y (zgrep CGROUP_BPF /proc/config.gz), and forbid the agent's unit no bpf(2) (SystemCallFilter=)".to_owned(),
            }
        };
        let found = format!("the kernel takes no BPF program for devices, and no container starts on cgroup v2 without one: {why}");
        Check::error(id, found, fix)
    })
}

/// Whether a controller of cgroup v2 is at hand for the parent, else what is in the way and how to be rid of it.
fn unified(name: &str, facts: &Facts) -> Result<String, (String, String)> {
    let cgroups = &facts.cgroups;
    let has = |place: &Place| place.controllers.contains(name);
    let Some(root) = cgroups.chain.first() else {
        return Err((
            "the cgroups at /sys/fs/cgroup cannot be read".to_owned(),
            "run it as root: sudo foreshore-agent doctor".to_owned(),
        ));
    };
    if !has(root) {
        return Err(unified_reason(name, root, facts));
    }
    let lacking = cgroups
        .chain
        .iter()
        .find(|place| !place.enabled.contains(name));
    Ok(match lacking {
        None => format!("enabled for {}", cgroups.parent),
        Some(place) => format!("there; the agent enables it in {}", shown(place)),
    })
}

fn unified_reason(name: &str, root: &Place, facts: &Facts) -> (String, String) {
    let bound = facts
        .cgroups
        .listed
        .get(name)
        .map_or(0, |listed| listed.hierarchy);
    if disabled(name, facts) {
        return disabled_reason(name, facts);
    }
    if !root.machine_root {
        return (
            format!("not delegated to the cgroup that {} runs in", here(facts)),
            outside(facts, "--cgroupns=host"),
        );
    }
    if bound != 0 {
        return (
            "bound to a cgroup v1 hierarchy that is mounted elsewhere".to_owned(),
            boot::add(&facts.host, "cgroup_no_v1=all"),
        );
    }
    if name == "memory" && facts.host.is_raspberry_pi() {
        return disabled_reason(name, facts);
    }
    (
        format!("the kernel has no {name} controller"),
        rebuild(name),
    )
}

/// Why a controller is in none of the v1 hierarchies.
fn split_reason(name: &str, facts: &Facts) -> (String, String) {
    if disabled(name, facts) {
        return disabled_reason(name, facts);
    }
    let v2 = if name == "blkio" { "io" } else { name };
    if facts.cgroups.unified_controllers.contains(v2) {
        return (
            "bound to the v2 part of a hybrid set-up, where it is not used".to_owned(),
            to_unified(facts),
        );
    }
    if facts.cgroups.listed.contains_key(name) {
        let point = format!("/sys/fs/cgroup/{name}");
        let mount = format!("mkdir -p {point} && mount -t cgroup -o {name} {name} {point}");
        let fix = match facts.init.kind {
            InitKind::OpenRc => mount_them(facts),
            InitKind::Systemd | InitKind::Other => mount,
        };
        return ("not mounted".to_owned(), fix);
    }
    (
        format!("the kernel has no {name} controller"),
        rebuild(name),
    )
}

fn disabled(name: &str, facts: &Facts) -> bool {
    facts
        .cgroups
        .listed
        .get(name)
        .is_some_and(|listed| !listed.enabled)
        || (facts.host.booted_with(&format!("cgroup_disable={name}"))
            && !facts.host.booted_with(&format!("cgroup_enable={name}")))
}

fn disabled_reason(name: &str, facts: &Facts) -> (String, String) {
    let host = &facts.host;
    let word = format!("cgroup_disable={name}");
    if name == "memory" && host.is_raspberry_pi() {
        let model = host.model.as_deref().unwrap_or_default();
        return (
            format!("off on the kernel's command line, as the firmware of a {model} has it"),
            boot::add(host, RASPBERRY_PI_MEMORY),
        );
    }
    if host.booted_with(&word) {
        return (
            format!("off on the kernel's command line ({word})"),
            boot::remove(host, &word),
        );
    }
    (
        "off in the kernel".to_owned(),
        boot::add(host, &format!("cgroup_enable={name}")),
    )
}

fn rebuild(name: &str) -> String {
    let option = match name {
        "memory" => "CONFIG_MEMCG",
        "cpu" => "CONFIG_CGROUP_SCHED",
        "pids" => "CONFIG_CGROUP_PIDS",
        "devices" => "CONFIG_CGROUP_DEVICE",
        _ => "CONFIG_BLK_CGROUP",
    };
    format!("use a kernel that is built with {option}=y (zgrep {option} /proc/config.gz)")
}

pub(super) fn delegation(facts: &Facts) -> Check {
    let id = CheckId::CgroupDelegation;
    let cgroups = &facts.cgroups;
    match &cgroups.layout {
        Layout::Missing { .. } => Check::info(id, "not looked at: no cgroups are mounted"),
        Layout::Split { controllers, .. } => {
            match controllers.values().find(|mount| mount.read_only) {
                Some(mount) => {
                    let point = mount.point.display().to_string();
                    let fix = match &facts.host.container {
                        Some(_) => outside(facts, "-v /sys/fs/cgroup:/sys/fs/cgroup:rw"),
                        None => format!("mount -o remount,rw {point}"),
                    };
                    Check::error(id, format!("{point} is mounted read-only"), fix)
                }
                None => Check::ok(id, format!("{} in every v1 hierarchy", cgroups.parent)),
            }
        }
        Layout::Unified { read_only: true } => {
            let fix = match &facts.host.container {
                Some(_) => outside(facts, "--cgroupns=host"),
                None => "mount -o remount,rw /sys/fs/cgroup".to_owned(),
            };
            Check::error(id, "/sys/fs/cgroup is mounted read-only", fix)
        }
        Layout::Unified { read_only: false } => {
            let blocked = ["memory", "cpu", "pids"]
                .into_iter()
                .filter(|name| {
                    cgroups
                        .chain
                        .first()
                        .is_some_and(|root| root.controllers.contains(*name))
                })
                .filter_map(|name| Some((name, blocker(cgroups, name)?)))
                .collect::<Vec<_>>();
            match blocked.first() {
                None => Check::ok(id, format!("limits can be set below {}", cgroups.parent)),
                Some((_, place)) => {
                    let names: Vec<&str> = blocked.iter().map(|(name, _)| *name).collect();
                    let found = format!(
                        "{} cannot be enabled in {}: processes are in it, and cgroup v2 allows limits below it only when none are",
                        names.join(", "),
                        shown(place)
                    );
                    Check::error(id, found, delegation_fix(facts, place))
                }
            }
        }
    }
}

/// The first cgroup on the way to the parent where a controller is neither enabled nor can be. The agent moves what is
/// in the parent itself out of the way.
fn blocker<'a>(cgroups: &'a Cgroups, name: &str) -> Option<&'a Place> {
    let parent = cgroups.parent.trim_matches('/');
    cgroups.chain.iter().find(|place| {
        place.processes
            && !place.machine_root
            && place.path.trim_matches('/') != parent
            && !place.enabled.contains(name)
    })
}

fn delegation_fix(facts: &Facts, place: &Place) -> String {
    let config = facts.config.path.display();
    if facts.host.container.is_some() && place.path.is_empty() {
        return outside(facts, "--cgroupns=host");
    }
    if place.path.ends_with(".service") || place.path.ends_with(".scope") {
        let unit = place.path.rsplit('/').next().unwrap_or(&place.path);
        return format!(
            "the line `Delegate=yes` below [Service] of {unit} (systemctl edit {unit}), or in {config} below [cgroup] the line `parent = \"foreshore\"`"
        );
    }
    format!(
        "in {config}, below [cgroup], the line `parent = \"foreshore\"`: a cgroup of its own without processes"
    )
}

fn shown(place: &Place) -> String {
    if place.path.is_empty() {
        "the root cgroup".to_owned()
    } else {
        place.path.clone()
    }
}

fn here(facts: &Facts) -> String {
    match &facts.host.container {
        Some(kind) => format!("this {kind} container"),
        None => "this shell".to_owned(),
    }
}

/// What helps when the doctor is in a container itself.
fn outside(facts: &Facts, option: &str) -> String {
    match &facts.host.container {
        Some(kind) => format!("{}, and with {option}", super::privileged(kind)),
        None => "run it in the machine's own cgroup namespace: nsenter --target 1 --cgroup --mount foreshore-agent doctor"
            .to_owned(),
    }
}
