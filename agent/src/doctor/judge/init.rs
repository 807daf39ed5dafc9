//! What starts the agent, restarts it, and resets the device when it hangs.

use crate::doctor::facts::{Facts, InitKind};
use crate::doctor::finding::{Check, CheckId};

const SAMPLE: &str = "configs/systemd/foreshore-agent.service";

pub(super) fn unit(facts: &Facts) -> Check {
    let id = CheckId::InitUnit;
    if facts.init.kind != InitKind::Systemd {
        let found = match facts.init.kind {
            InitKind::OpenRc => "OpenRC: have it start the agent and start it again when it ends",
            InitKind::Systemd | InitKind::Other => {
                "no systemd: have the agent started at boot, and again when it ends"
            }
        };
        return Check::info(id, found);
    }
    let Some(unit) = &facts.init.unit else {
        return Check::hint(
            id,
            "no unit foreshore-agent.service: nothing starts the agent at boot",
            format!(
                "copy {SAMPLE} of Foreshore to /etc/systemd/system/, then: systemctl enable --now foreshore-agent"
            ),
        );
    };
    let value = |key: &str| unit.service.get(key).map(|value| value.to_lowercase());
    let mut missing = Vec::new();
    if !matches!(value("KillMode").as_deref(), Some("process" | "none")) {
        missing.push((
            "KillMode=process",
            "stopping the agent would end every container",
        ));
    }
    // A list of controllers delegates too.
    let delegated = value("Delegate")
        .is_some_and(|value| !matches!(value.as_str(), "" | "no" | "false" | "0" | "off"));
    if !delegated {
        missing.push((
            "Delegate=yes",
            "systemd would undo the limits of containers",
        ));
    }
    if missing.is_empty() {
        return Check::ok(id, unit.path.clone());
    }
    let why: Vec<&str> = missing.iter().map(|(_, why)| *why).collect();
    let lines: Vec<&str> = missing.iter().map(|(line, _)| *line).collect();
    Check::error(
        id,
        format!(
            "{} lacks {}: {}",
            unit.path,
            lines.join(" and "),
            why.join("; ")
        ),
        format!(
            "mkdir -p /etc/systemd/system/foreshore-agent.service.d && printf '[Service]\\n{}\\n' > /etc/systemd/system/foreshore-agent.service.d/foreshore.conf && systemctl daemon-reload",
            lines.join("\\n")
        ),
    )
}

pub(super) fn notify(facts: &Facts) -> Check {
    let id = CheckId::InitNotify;
    match (facts.init.kind, facts.init.notify_socket) {
        (_, true) => watched(id, facts),
        (InitKind::Systemd, false) => Check::warning(
            id,
            "systemd runs, but its notify socket is not there",
            "mount /run of the device where the agent runs; ls -l /run/systemd/notify",
        ),
        (InitKind::OpenRc | InitKind::Other, false) => Check::info(
            id,
            "no systemd: nobody is told whether the agent makes progress",
        ),
    }
}

/// Whether the agent's unit has systemd listen to the progress that the agent tells (`sd_notify`(3)).
fn watched(id: CheckId, facts: &Facts) -> Check {
    let Some(unit) = &facts.init.unit else {
        return Check::ok(id, "systemd's notify socket is there");
    };
    let value = |key: &str| unit.service.get(key).map(String::as_str);
    let listens = matches!(value("Type"), Some("notify" | "notify-reload"));
    let seconds = value("WatchdogSec").filter(|value| !matches!(*value, "" | "0" | "infinity"));
    if let (true, Some(seconds)) = (listens, seconds) {
        return Check::ok(
            id,
            format!(
                "systemd starts the agent anew when it makes no progress (WatchdogSec={seconds})"
            ),
        );
    }
    Check::hint(
        id,
        format!(
            "{} lacks Type=notify or WatchdogSec=: an agent that hangs stays so, while its containers run on",
            unit.path
        ),
        "mkdir -p /etc/systemd/system/foreshore-agent.service.d && printf '[Service]\\nType=notify\\nWatchdogSec=60\\n' > /etc/systemd/system/foreshore-agent.service.d/watchdog.conf && systemctl daemon-reload",
    )
}

pub(super) fn watchdog(facts: &Facts) -> Check {
    let id = CheckId::InitWatchdog;
    let init = &facts.init;
    let Some(device) = init.watchdogs.first() else {
        let fix = if facts.host.is_raspberry_pi() {
            "echo 'dtparam=watchdog=on' >> /boot/firmware/config.txt && reboot"
        } else {
            "load the driver of this board's watchdog (ls /lib/modules/$(uname -r)/kernel/drivers/watchdog), or the one in software: modprobe softdog && echo softdog > /etc/modules-load.d/watchdog.conf"
        };
        return Check::hint(
            id,
            "no watchdog device: a device that hangs stays so until somebody comes",
            fix,
        );
    };
    match (&init.runtime_watchdog, init.kind) {
        (Some(value), _) => Check::ok(
            id,
            format!("{device}, fed by systemd (RuntimeWatchdogSec={value})"),
        ),
        (None, InitKind::Systemd) => Check::hint(
            id,
            format!("{device} is there, and nothing says that systemd feeds it"),
            "mkdir -p /etc/systemd/system.conf.d && printf '[Manager]\\nRuntimeWatchdogSec=30s\\n' > /etc/systemd/system.conf.d/watchdog.conf && systemctl daemon-reexec",
        ),
        (None, InitKind::OpenRc | InitKind::Other) => Check::hint(
            id,
            format!("{device} is there; feed it, so that a device that hangs is reset"),
            "rc-update add watchdog boot && rc-service watchdog start (OpenRC), or at boot: watchdog -t 10 /dev/watchdog (busybox)",
        ),
    }
}
