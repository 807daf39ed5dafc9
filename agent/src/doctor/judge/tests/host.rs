//! Kernels, rights, namespaces, clocks, and what starts the agent.

use super::cgroup::alpine;
use super::*;

#[test]
fn a_container_without_rights_is_told_so() {
    let mut facts = debian();
    facts.host.container = Some("docker".to_owned());
    // Docker's default: no CAP_SYS_ADMIN, no CAP_NET_ADMIN.
    facts.host.capabilities = 0xa804_25fb;
    facts.cgroups.layout = Layout::Unified { read_only: true };
    let mut root = place("", "cpu io memory pids", "");
    root.machine_root = false;
    root.processes = true;
    facts.cgroups.chain = vec![root];
    facts.namespaces = Namespace::ALL
        .map(|kind| {
            (
                kind,
                Tried::Fails("EPERM: Operation not permitted".to_owned()),
            )
        })
        .into();
    facts.state.mount = Some(mount("overlay", "/", "rw,relatime"));
    facts.state.overlay =
        Tried::Fails("make a mount namespace: Operation not permitted".to_owned());
    facts.init = Init::default();
    let privileged = "start this docker container with --privileged";
    finding(
        &facts,
        CheckId::HostPrivileges,
        Level::Error,
        "CAP_NET_ADMIN, CAP_SYS_ADMIN",
        privileged,
    );
    finding(
        &facts,
        CheckId::CgroupDelegation,
        Level::Error,
        "read-only",
        privileged,
    );
    finding(
        &facts,
        CheckId::NamespaceMount,
        Level::Error,
        "EPERM",
        "see host.privileges",
    );
    finding(
        &facts,
        CheckId::NamespaceUser,
        Level::Warning,
        "EPERM",
        privileged,
    );
    finding(
        &facts,
        CheckId::StateFilesystem,
        Level::Error,
        "stacked",
        "-v foreshore-state:/var/lib/foreshore",
    );
    facts.host.container = Some("lxc".to_owned());
    let lxc = "make this lxc container a privileged one";
    finding(
        &facts,
        CheckId::HostPrivileges,
        Level::Error,
        "CAP_SYS_ADMIN",
        lxc,
    );
    // Every capability, over nothing.
    facts.host.capabilities = 0x1ff_ffff_ffff;
    facts.host.own_users = true;
    finding(
        &facts,
        CheckId::HostPrivileges,
        Level::Error,
        "user namespace",
        lxc,
    );
    facts.host.container = Some("docker".to_owned());
    // With rights, but in its own cgroup namespace.
    facts.cgroups.layout = Layout::Unified { read_only: false };
    finding(
        &facts,
        CheckId::CgroupDelegation,
        Level::Error,
        "the root cgroup",
        "--cgroupns=host",
    );
}

#[test]
fn a_user_who_is_not_root_is_told_to_become_root() {
    let mut facts = debian();
    facts.host.euid = 1000;
    facts.host.capabilities = 0;
    finding(
        &facts,
        CheckId::HostPrivileges,
        Level::Error,
        "user 1000",
        "sudo foreshore-agent doctor",
    );
    facts.host.euid = 0;
    facts.host.capabilities = 0x1ff_ffff_ffff & !(1 << 21);
    finding(
        &facts,
        CheckId::HostPrivileges,
        Level::Error,
        "CAP_SYS_ADMIN",
        "CapabilityBoundingSet=",
    );
    facts.host.capabilities = 0x1ff_ffff_ffff & !(1 << 24);
    finding(
        &facts,
        CheckId::HostPrivileges,
        Level::Warning,
        "CAP_SYS_RESOURCE",
        "Capability",
    );
}

#[test]
fn kernels_that_are_too_old_or_strange_are_told() {
    for (kernel, level) in [
        ("4.19.0-27-armmp", Level::Error),
        ("5.5.19", Level::Error),
        ("5.6.0", Level::Warning),
        ("5.9.16-v7l+", Level::Warning),
        ("5.10.0-33-arm64", Level::Ok),
        ("6.18.44-fc-v669", Level::Ok),
        ("", Level::Warning),
        ("vendor", Level::Warning),
    ] {
        let mut facts = debian();
        facts.host.kernel = kernel.to_owned();
        finding(&facts, CheckId::HostKernel, level, "", "");
    }
}

#[test]
fn namespaces_name_the_limit_that_forbids_them() {
    let mut facts = debian();
    facts.namespaces.insert(
        Namespace::User,
        Tried::Fails("ENOSPC: No space left on device".to_owned()),
    );
    facts.namespaces_max.insert(Namespace::User, 0);
    finding(
        &facts,
        CheckId::NamespaceUser,
        Level::Warning,
        "ENOSPC",
        "sysctl -w user.max_user_namespaces=15000",
    );
    facts.namespaces_max.insert(Namespace::User, 15_000);
    finding(
        &facts,
        CheckId::NamespaceUser,
        Level::Warning,
        "",
        "CONFIG_USER_NS=y",
    );
    facts.host.euid = 1000;
    facts.unprivileged_userns = Some(false);
    finding(
        &facts,
        CheckId::NamespaceUser,
        Level::Warning,
        "",
        "kernel.unprivileged_userns_clone=1",
    );
    facts.namespaces.insert(Namespace::Pid, Tried::TimedOut(5));
    finding(&facts, CheckId::NamespacePid, Level::Error, "5 s", "dmesg");
    facts.seccomp = Tried::Fails("EINVAL: Invalid argument".to_owned());
    finding(
        &facts,
        CheckId::HostSeccomp,
        Level::Error,
        "EINVAL",
        "CONFIG_SECCOMP_FILTER=y",
    );
}

#[test]
fn a_clock_from_1970_is_set_first_and_blamed_for_certificates() {
    let mut facts = debian();
    facts.clock.unix_s = 40;
    facts.clock.rtc = false;
    facts.hub.tls = Handshake::NotYetValid;
    finding(
        &facts,
        CheckId::ClockWall,
        Level::Error,
        "1970-01-01",
        "timedatectl set-ntp true",
    );
    finding(&facts, CheckId::ClockWall, Level::Error, "", "RTC");
    finding(
        &facts,
        CheckId::HubTls,
        Level::Error,
        "clock is wrong",
        "see clock.wall",
    );
    facts.clock.timesyncd = false;
    finding(
        &facts,
        CheckId::ClockWall,
        Level::Error,
        "",
        "apt-get install systemd-timesyncd",
    );
    facts.init.kind = InitKind::OpenRc;
    finding(
        &facts,
        CheckId::ClockWall,
        Level::Error,
        "",
        "rc-update add ntpd",
    );
    for (unix_s, level) in [
        (i64::MIN, Level::Error),
        (-1, Level::Error),
        (EARLIEST - 1, Level::Error),
        (EARLIEST, Level::Ok),
        (4_294_967_295, Level::Warning),
        (i64::MAX, Level::Warning),
    ] {
        facts.clock.unix_s = unix_s;
        finding(&facts, CheckId::ClockWall, level, "", "");
    }
    facts.clock.boot_ms = Err("EPERM".to_owned());
    finding(
        &facts,
        CheckId::ClockBoottime,
        Level::Error,
        "EPERM",
        "clock_gettime",
    );
}

#[test]
fn swap_that_cannot_be_limited_is_worth_knowing() {
    let mut facts = debian();
    facts.swap.total_bytes = 2 * GIB;
    finding(&facts, CheckId::MemorySwap, Level::Ok, "2048 MiB", "");
    facts.cgroups.swap_limit = None;
    finding(&facts, CheckId::MemorySwap, Level::Info, "", "");
    facts.cgroups.swap_limit = Some(false);
    finding(
        &facts,
        CheckId::MemorySwap,
        Level::Info,
        "cannot limit it",
        "swapoff -a",
    );
    facts.cgroups.layout = alpine().cgroups.layout;
    finding(
        &facts,
        CheckId::MemorySwap,
        Level::Info,
        "cannot limit it",
        "swapaccount=1",
    );
}

#[test]
fn a_unit_that_would_take_the_containers_along_is_told() {
    let mut facts = debian();
    facts.init.unit.as_mut().unwrap().service.clear();
    finding(
        &facts,
        CheckId::InitUnit,
        Level::Error,
        "lacks KillMode=process and Delegate=yes",
        "printf '[Service]\\nKillMode=process\\nDelegate=yes\\n'",
    );
    let service = &mut facts.init.unit.as_mut().unwrap().service;
    service.insert("KillMode".to_owned(), "process".to_owned());
    service.insert("Delegate".to_owned(), "cpu memory pids".to_owned());
    assert_eq!(bad(&facts), []);
    facts.init.unit = None;
    finding(
        &facts,
        CheckId::InitUnit,
        Level::Info,
        "no unit",
        "systemctl enable",
    );
    let service = &mut debian().init.unit.expect("it has one").service;
    service.insert("Type".to_owned(), "notify".to_owned());
    let mut watched = debian();
    let unit = watched.init.unit.as_mut().expect("it has one");
    unit.service = service.clone();
    unit.service.remove("WatchdogSec");
    finding(
        &watched,
        CheckId::InitNotify,
        Level::Info,
        "WatchdogSec=",
        "WatchdogSec=60",
    );
    let unit = watched.init.unit.as_mut().expect("it has one");
    unit.service
        .insert("WatchdogSec".to_owned(), "60".to_owned());
    finding(
        &watched,
        CheckId::InitNotify,
        Level::Ok,
        "WatchdogSec=60",
        "",
    );
    facts.init.notify_socket = false;
    finding(
        &facts,
        CheckId::InitNotify,
        Level::Warning,
        "notify socket",
        "/run/systemd/notify",
    );
    facts.init.runtime_watchdog = None;
    finding(
        &facts,
        CheckId::InitWatchdog,
        Level::Info,
        "/dev/watchdog0",
        "RuntimeWatchdogSec=30s",
    );
    facts.init.watchdogs.clear();
    finding(
        &facts,
        CheckId::InitWatchdog,
        Level::Info,
        "no watchdog",
        "softdog",
    );
    facts.host.model = Some("Raspberry Pi 3".to_owned());
    finding(
        &facts,
        CheckId::InitWatchdog,
        Level::Info,
        "",
        "dtparam=watchdog=on",
    );
}

#[test]
fn a_shim_that_does_not_run_is_explained_by_the_processor() {
    let mut facts = debian();
    facts.shim = Tried::Fails("it is not built for arm".to_owned());
    finding(
        &facts,
        CheckId::HostShim,
        Level::Error,
        "not built for arm",
        "x86_64 or aarch64",
    );
}
