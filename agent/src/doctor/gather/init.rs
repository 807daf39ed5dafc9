//! What starts the agent: systemd with its units, OpenRC, or something else.

use std::collections::BTreeMap;

use super::files::Tree;
use crate::doctor::facts::{Init, InitKind, Unit};

const UNIT: &str = "foreshore-agent.service";

/// Where units are, the first one wins (systemd.unit(5), "Unit File Load Path").
const UNIT_DIRS: [&str; 5] = [
    "etc/systemd/system",
    "run/systemd/system",
    "usr/local/lib/systemd/system",
    "usr/lib/systemd/system",
    "lib/systemd/system",
];

/// Drop-ins that are read of one kind.
const DROP_INS_MAX: usize = 32;

pub(super) fn init(tree: &Tree) -> Init {
    let kind = if tree.exists("run/systemd/system") {
        InitKind::Systemd
    } else if tree.exists("run/openrc") || tree.exists("sbin/openrc-run") {
        InitKind::OpenRc
    } else {
        InitKind::Other
    };
    let watchdogs = tree.names("dev").into_iter().filter(|name| {
        let number = name.strip_prefix("watchdog");
        number.is_some_and(|number| number.bytes().all(|byte| byte.is_ascii_digit()))
    });
    Init {
        kind,
        notify_socket: tree.exists("run/systemd/notify"),
        unit: unit(tree),
        watchdogs: watchdogs.map(|name| format!("/dev/{name}")).collect(),
        runtime_watchdog: runtime_watchdog(tree),
    }
}

fn unit(tree: &Tree) -> Option<Unit> {
    let found = UNIT_DIRS.iter().find_map(|dir| {
        let path = format!("{dir}/{UNIT}");
        Some((tree.text(&path)?, path))
    });
    let (text, path) = found?;
    let mut service = BTreeMap::new();
    section(&text, "[Service]", &mut service);
    // Later directories are of lower rank, and files of one rank go by name; the last value counts.
    for dir in UNIT_DIRS.iter().rev() {
        drop_ins(tree, &format!("{dir}/{UNIT}.d"), "[Service]", &mut service);
    }
    Some(Unit {
        path: format!("/{path}"),
        service,
    })
}

fn runtime_watchdog(tree: &Tree) -> Option<String> {
    let mut manager = BTreeMap::new();
    for dir in ["usr/lib/systemd", "lib/systemd", "etc/systemd"] {
        let text = tree.text(format!("{dir}/system.conf")).unwrap_or_default();
        section(&text, "[Manager]", &mut manager);
        drop_ins(
            tree,
            &format!("{dir}/system.conf.d"),
            "[Manager]",
            &mut manager,
        );
    }
    let value = manager.remove("RuntimeWatchdogSec")?;
    (!matches!(value.as_str(), "" | "0" | "off")).then_some(value)
}

fn drop_ins(tree: &Tree, dir: &str, name: &str, values: &mut BTreeMap<String, String>) {
    let names = tree.names(dir).into_iter();
    for file in names
        .filter(|name| name.ends_with(".conf"))
        .take(DROP_INS_MAX)
    {
        let text = tree.text(format!("{dir}/{file}")).unwrap_or_default();
        section(&text, name, values);
    }
}

/// The assignments of one section (systemd.syntax(7)); a later one replaces an earlier one.
fn section(text: &str, name: &str, values: &mut BTreeMap<String, String>) {
    let mut inside = false;
    for line in text.lines().map(str::trim) {
        if line.starts_with('[') {
            inside = line == name;
        } else if inside
            && !line.starts_with(['#', ';'])
            && let Some((key, value)) = line.split_once('=')
        {
            values.insert(key.trim().to_owned(), value.trim().to_owned());
        }
    }
}
