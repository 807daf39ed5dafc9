//! The kernel: its version, its rights, its namespaces, its clocks.

use super::{boot, unless_failed};
use crate::doctor::facts::{Facts, InitKind, Layout, Namespace};
use crate::doctor::finding::{Check, CheckId};

/// openat2(2), without which no path inside an image can be looked up safely.
const KERNEL_MIN: (u32, u32) = (5, 6);

/// Volatile overlays: without them a container's writable layer is synced to flash for nothing.
const KERNEL_GOOD: (u32, u32) = (5, 10);

/// What the agent needs to build a container (capabilities(7)).
const CAPABILITIES: [(u32, &str); 11] = [
    (0, "CAP_CHOWN"),
    (1, "CAP_DAC_OVERRIDE"),
    (3, "CAP_FOWNER"),
    (5, "CAP_KILL"),
    (6, "CAP_SETGID"),
    (7, "CAP_SETUID"),
    (8, "CAP_SETPCAP"),
    (10, "CAP_NET_BIND_SERVICE"),
    (12, "CAP_NET_ADMIN"),
    (CAP_SYS_ADMIN, "CAP_SYS_ADMIN"),
    (27, "CAP_MKNOD"),
];

/// To make namespaces and mounts.
const CAP_SYS_ADMIN: u32 = 21;

/// To lower an OOM score.
const CAP_SYS_RESOURCE: u32 = 24;

/// After this many years the clock is wrong rather than the program old.
const YEARS_MAX: i64 = 20;

pub(super) fn kernel(facts: &Facts) -> Check {
    let id = CheckId::HostKernel;
    let release = &facts.host.kernel;
    let at_least = |(major, minor): (u32, u32)| {
        format!("use Linux {major}.{minor} or later; Debian 12 has 6.1")
    };
    match parse_version(release) {
        None => Check::warning(
            id,
            format!("a kernel that calls itself {release:?}"),
            format!("{}: uname -r", at_least(KERNEL_MIN)),
        ),
        Some(version) if version < KERNEL_MIN => Check::error(
            id,
            format!("Linux {release} lacks openat2, which containers are set up with"),
            at_least(KERNEL_MIN),
        ),
        Some(version) if version < KERNEL_GOOD => Check::warning(
            id,
            format!(
                "Linux {release} works, but writes more to flash than later ones (no volatile overlays)"
            ),
            at_least(KERNEL_GOOD),
        ),
        Some(_) => Check::ok(id, format!("Linux {release}")),
    }
}

pub(super) fn parse_version(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(|at: char| !at.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

pub(super) fn privileges(facts: &Facts) -> Check {
    let id = CheckId::HostPrivileges;
    let host = &facts.host;
    let has = |number: u32| host.capabilities >> number & 1 == 1;
    let missing: Vec<&str> = CAPABILITIES
        .iter()
        .filter(|(number, _)| !has(*number))
        .map(|(_, name)| *name)
        .collect();
    if host.euid != 0 && host.container.is_none() {
        return Check::error(
            id,
            format!(
                "runs as user {}; containers need root, and so do most of the checks below",
                host.euid
            ),
            "sudo foreshore-agent doctor",
        );
    }
    if !missing.is_empty() || host.euid != 0 {
        let missing = if missing.is_empty() {
            "root".to_owned()
        } else {
            missing.join(", ")
        };
        return match &host.container {
            Some(kind) => Check::error(
                id,
                format!("in a {kind} container without {missing}"),
                super::privileged(kind),
            ),
            None => Check::error(
                id,
                format!("root without {missing}"),
                "take what limits it out of the unit of the agent (CapabilityBoundingSet=, systemctl cat foreshore-agent), or start the doctor from a root shell",
            ),
        };
    }
    if host.own_users {
        return Check::error(
            id,
            "root of a user namespace only, which may neither mount what containers need nor set their limits",
            super::privileged(host.container.as_deref().unwrap_or("unprivileged")),
        );
    }
    if !has(CAP_SYS_RESOURCE) {
        return Check::warning(
            id,
            "root without CAP_SYS_RESOURCE: when memory runs out, nothing keeps the kernel from ending the agent before an app",
            "do not take CAP_SYS_RESOURCE from the agent: CapabilityBoundingSet= in its unit, or what started this system",
        );
    }
    Check::ok(id, "root with every capability that is needed")
}

/// Whether the doctor itself may too little for its tries to say anything about the kernel.
pub(super) const fn may_too_little(facts: &Facts) -> bool {
    let host = &facts.host;
    host.own_users || host.capabilities >> CAP_SYS_ADMIN & 1 == 0
}

/// Where the one cause of several findings is told.
pub(super) const SEE_PRIVILEGES: &str = "see host.privileges: the same is in the way here";

pub(super) fn seccomp(facts: &Facts) -> Check {
    let id = CheckId::HostSeccomp;
    let slow = "see why processes do not end: dmesg | tail";
    unless_failed(id, &facts.seccomp, "a filter can be installed", slow).unwrap_or_else(|why| {
        Check::error(
            id,
            format!("a filter cannot be installed, and no container starts without one: {why}"),
            "use a kernel that is built with CONFIG_SECCOMP_FILTER=y (zgrep SECCOMP /proc/config.gz)",
        )
    })
}

pub(super) fn shim(facts: &Facts) -> Check {
    let id = CheckId::HostShim;
    let slow = "see why processes do not end: dmesg | tail";
    unless_failed(id, &facts.shim, "the program that watches over each container runs", slow).unwrap_or_else(|why| {
        let fix = if may_too_little(facts) {
            SEE_PRIVILEGES.to_owned()
        } else {
            "install the foreshore-agent that is built for this processor (uname -m): x86_64 or aarch64".to_owned()
        };
        Check::error(id, format!("the program that watches over each container does not run: {why}"), fix)
    })
}

pub(super) fn namespace(id: CheckId, kind: Namespace, facts: &Facts) -> Check {
    let Some(tried) = facts.namespaces.get(&kind) else {
        return Check::info(id, "not tried");
    };
    let slow = "see why processes do not end: dmesg | tail";
    unless_failed(id, tried, "can be made", slow).unwrap_or_else(|why| {
        let found = format!("cannot be made: {why}");
        let fix = namespace_fix(kind, facts);
        // The kinds that a container can do without.
        if matches!(kind, Namespace::User | Namespace::Cgroup) {
            Check::warning(id, found, fix)
        } else {
            Check::error(id, found, fix)
        }
    })
}

fn namespace_fix(kind: Namespace, facts: &Facts) -> String {
    let name = kind.limit_file();
    if let Some(max) = facts.namespaces_max.get(&kind).filter(|max| **max < 1024) {
        return format!(
            "user.{name} is {max}: sysctl -w user.{name}=15000 && echo 'user.{name} = 15000' > /etc/sysctl.d/60-foreshore-{}.conf",
            kind.name()
        );
    }
    if kind == Namespace::User && facts.unprivileged_userns == Some(false) && facts.host.euid != 0 {
        return "sysctl -w kernel.unprivileged_userns_clone=1 && echo 'kernel.unprivileged_userns_clone = 1' > /etc/sysctl.d/60-foreshore-userns.conf"
            .to_owned();
    }
    if kind != Namespace::User && may_too_little(facts) {
        return SEE_PRIVILEGES.to_owned();
    }
    if let Some(container) = &facts.host.container {
        return super::privileged(container);
    }
    let option = kind.build_option();
    format!("use a kernel that is built with {option}=y (zgrep {option} /proc/config.gz)")
}

pub(super) fn swap(facts: &Facts) -> Check {
    let id = CheckId::MemorySwap;
    let total = super::size(facts.swap.total_bytes);
    match (facts.swap.total_bytes, facts.cgroups.swap_limit) {
        (0, _) => Check::ok(id, "off"),
        (_, Some(true)) => Check::ok(id, format!("{total}; containers are kept out of it")),
        (_, Some(false)) => {
            let fix = match &facts.cgroups.layout {
                Layout::Split { .. } => boot::add(&facts.host, "swapaccount=1"),
                Layout::Unified { .. } | Layout::Missing { .. } => {
                    "use a kernel that is built with CONFIG_SWAP=y and CONFIG_MEMCG=y, or turn swap off: swapoff -a"
                        .to_owned()
                }
            };
            Check::hint(
                id,
                format!(
                    "{total}, and the kernel cannot limit it: a container that reaches its memory limit slows the device down before it is ended"
                ),
                fix,
            )
        }
        (_, None) => Check::info(
            id,
            format!(
                "{total}; whether containers can be kept out of it shows when the first one runs"
            ),
        ),
    }
}

pub(super) fn wall_clock(facts: &Facts) -> Check {
    let id = CheckId::ClockWall;
    let clock = &facts.clock;
    let shown = date(clock.unix_s);
    if clock.unix_s < clock.earliest_s {
        return Check::error(
            id,
            format!(
                "says {shown}, before this agent was made: no certificate is valid then, and nothing that is told has its right time"
            ),
            set_clock(facts),
        );
    }
    if clock.unix_s.saturating_sub(clock.earliest_s) > YEARS_MAX * 31_556_952 {
        return Check::warning(
            id,
            format!(
                "says {shown}, more than {YEARS_MAX} years after this agent was made: certificates will seem expired"
            ),
            set_clock(facts),
        );
    }
    Check::ok(id, format!("says {shown}"))
}

fn set_clock(facts: &Facts) -> String {
    let set = match (facts.init.kind, facts.clock.timesyncd) {
        (InitKind::Systemd, true) => "timedatectl set-ntp true",
        (InitKind::Systemd, false) => {
            "apt-get install systemd-timesyncd && timedatectl set-ntp true (or chrony, or any other NTP client)"
        }
        (InitKind::OpenRc, _) => "rc-update add ntpd default && rc-service ntpd start (or chronyd)",
        (InitKind::Other, _) => {
            "start an NTP client at boot: ntpd -p pool.ntp.org (of busybox), or chronyd"
        }
    };
    let rtc = if facts.clock.rtc {
        "hwclock --systohc keeps it over a power cut"
    } else {
        "without network it takes a battery-backed clock (RTC), which this device has not"
    };
    format!("set a clock: {set}; by hand: date -s 'YYYY-MM-DD HH:MM:SS'; {rtc}")
}

pub(super) fn boot_clock(facts: &Facts) -> Check {
    let id = CheckId::ClockBoottime;
    match &facts.clock.boot_ms {
        Ok(ms) => Check::ok(
            id,
            format!("CLOCK_BOOTTIME runs, {} s since boot", ms / 1000),
        ),
        Err(why) => Check::error(
            id,
            format!("CLOCK_BOOTTIME cannot be read, and every timeout uses it: {why}"),
            "allow clock_gettime(2) in whatever sandbox this runs in, or run the agent on the device itself",
        ),
    }
}

/// A moment in UTC, as in `date -u`; the days are counted as in the proleptic Gregorian calendar.
fn date(unix_s: i64) -> String {
    let (days, second) = (unix_s.div_euclid(86_400), unix_s.rem_euclid(86_400));
    // Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms", civil_from_days.
    let shifted = days + 719_468;
    let (era, of_era) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let day_of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 {
        shifted_month + 3
    } else {
        shifted_month - 9
    };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    let (hour, minute) = (second / 3600, second / 60 % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02} UTC")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        for (unix_s, expected) in [
            (0, "1970-01-01 00:00 UTC"),
            (-1, "1969-12-31 23:59 UTC"),
            (951_782_400, "2000-02-29 00:00 UTC"),
            (1_793_491_200, "2026-11-01 00:00 UTC"),
            (4_294_967_295, "2106-02-07 06:28 UTC"),
        ] {
            assert_eq!(date(unix_s), expected);
        }
        // No moment is too far.
        let _ = (date(i64::MAX / 2), date(i64::MIN / 2));
    }

    #[test]
    fn versions() {
        assert_eq!(parse_version("6.1.0-13-amd64"), Some((6, 1)));
        assert_eq!(parse_version("5.15-rc1"), Some((5, 15)));
        assert_eq!(parse_version("6"), None);
        assert_eq!(parse_version(""), None);
        assert_eq!(parse_version("99999999999.1"), None);
    }
}
