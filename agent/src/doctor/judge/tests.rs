//! Devices as they are found in the field, as facts, and what must be said of them.

mod cgroup;
mod host;
mod network;
mod state;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::judge;
use crate::doctor::facts::*;
use crate::doctor::finding::{Check, CheckId, Level, Report};

const GIB: u64 = 1 << 30;
const EARLIEST: i64 = 1_793_491_200;

fn set(words: &str) -> BTreeSet<String> {
    words.split_whitespace().map(str::to_owned).collect()
}

fn ext4(point: &str) -> Mount {
    mount("ext4", point, "rw,relatime")
}

fn mount(kind: &str, point: &str, options: &str) -> Mount {
    Mount {
        point: point.into(),
        kind: kind.to_owned(),
        source: "/dev/sda1".to_owned(),
        options: options.split(',').map(str::to_owned).collect(),
    }
}

fn place(path: &str, controllers: &str, enabled: &str) -> Place {
    Place {
        path: path.to_owned(),
        controllers: set(controllers),
        enabled: set(enabled),
        processes: false,
        machine_root: path.is_empty(),
    }
}

fn v1(controllers: &str) -> Layout {
    let controllers = controllers.split_whitespace().map(|name| {
        let point = PathBuf::from(format!("/sys/fs/cgroup/{name}"));
        let read_only = false;
        (name.to_owned(), V1Mount { point, read_only })
    });
    Layout::Split {
        controllers: controllers.collect(),
        hybrid: false,
    }
}

fn listed(name: &str, hierarchy: u32, enabled: bool) -> (String, Listed) {
    (name.to_owned(), Listed { hierarchy, enabled })
}

/// A Debian 12 with everything as it should be.
pub(in crate::doctor) fn debian() -> Facts {
    let all = "cpuset cpu io memory hugetlb pids rdma misc";
    Facts {
        config: ConfigFile {
            path: "/etc/foreshore/agent.toml".into(),
            read: Ok(()),
            mode: Some(0o644),
        },
        secrets: vec![SecretFile {
            key: "hub.join_token_file".to_owned(),
            path: "/etc/foreshore/join-token".into(),
            owner: Some((0o600, 0)),
            problem: None,
        }],
        host: Host {
            kernel: "6.1.0-28-amd64".to_owned(),
            command_line: "BOOT_IMAGE=/boot/vmlinuz-6.1.0-28-amd64 root=UUID=1 ro quiet".to_owned(),
            boot_files: [(
                "/etc/default/grub".to_owned(),
                "GRUB_CMDLINE_LINUX=\"\"".to_owned(),
            )]
            .into(),
            capabilities: 0x1ff_ffff_ffff,
            ..Host::default()
        },
        cgroups: Cgroups {
            parent: "foreshore".to_owned(),
            layout: Layout::Unified { read_only: false },
            listed: ["cpuset", "cpu", "blkio", "memory", "devices", "pids"]
                .map(|name| listed(name, 0, true))
                .into(),
            unified_controllers: set(all),
            chain: vec![place("", all, "cpu memory pids io")],
            cpu_quota: Some(true),
            swap_limit: Some(true),
            io_limit: Some(true),
        },
        namespaces: Namespace::ALL.map(|kind| (kind, Tried::Works)).into(),
        namespaces_max: Namespace::ALL.map(|kind| (kind, 15_000)).into(),
        unprivileged_userns: Some(true),
        seccomp: Tried::Works,
        device_filter: Tried::Works,
        shim: Tried::Works,
        state: StateDir {
            path: "/var/lib/foreshore".into(),
            looked_at: Some("/var/lib/foreshore".into()),
            mount: Some(ext4("/")),
            space: Some(Space {
                total_bytes: 30 * GIB,
                free_bytes: 20 * GIB,
                total_inodes: 2_000_000,
                free_inodes: 1_500_000,
                read_only: false,
            }),
            sync: Tried::Works,
            sync_ms: 12,
            overlay: Tried::Works,
            idmap: Tried::Works,
            lock: StateLock::Free,
        },
        disks: Ok(vec![StateDisk {
            name: "sda".to_owned(),
            weights: Err("sda is scheduled by mq-deadline, which knows no weights".to_owned()),
        }]),
        run: RunDir {
            path: "/run/foreshore".into(),
            mount: Some(mount("tmpfs", "/run", "rw,nosuid,nodev,noexec")),
        },
        swap: Swap::default(),
        clock: Clock {
            unix_s: EARLIEST + 30 * 86_400,
            earliest_s: EARLIEST,
            boot_ms: Ok(60_000),
            rtc: true,
            timesyncd: true,
        },
        hub: Hub {
            broker: Some(Broker {
                host: "hub.lan".to_owned(),
                port: 8883,
                tls: true,
            }),
            nameservers: 1,
            resolve: Tried::Works,
            addresses: vec!["192.0.2.10".to_owned()],
            connect: Connect::Connected {
                address: "192.0.2.10:8883".to_owned(),
                ms: 3,
            },
            tls: Handshake::Verified("TLS 1.3".to_owned()),
        },
        registries: [("hub.internal".to_owned(), RegistryAnswer::Answers)].into(),
        init: Init {
            kind: InitKind::Systemd,
            notify_socket: true,
            unit: Some(Unit {
                path: "/etc/systemd/system/foreshore-agent.service".to_owned(),
                service: [("KillMode", "process"), ("Delegate", "yes")]
                    .map(|(key, value)| (key.to_owned(), value.to_owned()))
                    .into(),
            }),
            watchdogs: vec!["/dev/watchdog0".to_owned()],
            runtime_watchdog: Some("30s".to_owned()),
        },
    }
}

/// Judges, and checks what holds for every report.
pub(in crate::doctor) fn report(facts: &Facts) -> Report {
    let report = judge(facts);
    let ids: Vec<CheckId> = report.checks.iter().map(|check| check.id).collect();
    assert_eq!(ids, CheckId::ALL);
    for check in &report.checks {
        assert!(!check.found.is_empty(), "{check:?}");
        if check.level >= Level::Warning {
            assert!(
                check.fix.as_ref().is_some_and(|fix| fix.len() > 10),
                "{check:?}"
            );
        }
        if check.level == Level::Ok {
            assert_eq!(check.fix, None, "{check:?}");
        }
    }
    report
}

#[track_caller]
pub(in crate::doctor) fn finding(facts: &Facts, id: CheckId, level: Level, found: &str, fix: &str) {
    let report = report(facts);
    let check = report.checks.iter().find(|check| check.id == id).unwrap();
    assert_eq!(check.level, level, "{check:?}");
    assert!(check.found.contains(found), "{found:?} is not in {check:?}");
    let said = check.fix.as_deref().unwrap_or_default();
    assert!(said.contains(fix), "{fix:?} is not in {check:?}");
}

/// Those that are not as they should be.
fn bad(facts: &Facts) -> Vec<(CheckId, Level)> {
    let checks = report(facts).checks.into_iter();
    let bad = |check: Check| (check.level >= Level::Warning).then_some((check.id, check.level));
    checks.filter_map(bad).collect()
}

#[test]
fn a_debian_12_on_cgroup_v2_has_nothing_to_complain_about() {
    assert_eq!(bad(&debian()), []);
    finding(
        &debian(),
        CheckId::CgroupMemory,
        Level::Ok,
        "enabled for foreshore",
        "",
    );
    finding(
        &debian(),
        CheckId::CgroupVersion,
        Level::Ok,
        "cgroup v2",
        "",
    );
}

#[test]
fn paths_and_sizes_are_written_for_shells_and_people() {
    assert_eq!(super::quoted(Path::new("/a/b-c_d.e")), "/a/b-c_d.e");
    assert_eq!(super::quoted(Path::new("/a $(x)")), "'/a $(x)'");
    assert_eq!(super::size(0), "0 KiB");
    assert_eq!(super::size(64 << 20), "64 MiB");
    assert_eq!(super::size(20 * GIB), "20 GiB");
}
