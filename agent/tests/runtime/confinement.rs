//! What a container may not do, and what must not leak into it.

use foreshore_agent::runtime::{ContainerState, Runtime as _};
use serde_json::json;

use crate::bed::{Bed, LONG, find, pid_of, refusal, run, shim_of, wait_for};

fn command(parts: &[&str]) -> Vec<String> {
    parts.iter().map(|part| (*part).to_owned()).collect()
}

#[tokio::test]
async fn init_and_commands_are_confined() {
    let bed = Bed::new();
    let runtime = bed.runtime();
    let status =
        "grep -E '^(Seccomp|NoNewPrivs|Cap(Inh|Prm|Eff|Bnd|Amb)):' /proc/self/status | sort";
    let spec = bed.shell(&format!("{status}; sleep 1000"), json!({"tmpfs": ["/out"]}));
    runtime.start(&spec).await.unwrap();
    // CHOWN, DAC_OVERRIDE, FOWNER, KILL, SETGID, SETUID, NET_BIND_SERVICE.
    let expected = "CapAmb:\t0000000000000000\nCapBnd:\t00000000000004eb\nCapEff:\t00000000000004eb\n\
                    CapInh:\t0000000000000000\nCapPrm:\t00000000000004eb\nNoNewPrivs:\t1\nSeccomp:\t2\n";
    wait_for("the status is logged", || async {
        bed.log("web").contains("Seccomp")
    })
    .await;
    assert_eq!(bed.log("web"), expected);
    let line = format!("{status} > /out/status");
    assert_eq!(
        runtime
            .exec(&spec.id, &command(&["sh", "-c", &line]), LONG)
            .await
            .unwrap(),
        0
    );
    let pid = pid_of(&runtime, &spec.id).await;
    assert_eq!(
        std::fs::read_to_string(format!("/proc/{pid}/root/out/status")).unwrap(),
        expected
    );

    for (what, line) in [
        ("mount", "mount -t tmpfs none /tmp"),
        ("a user namespace", "unshare -U true"),
        ("a device node", "mknod /out/disk b 254 0"),
        ("the host name", "hostname other"),
        ("sysrq", "echo h > /proc/sysrq-trigger"),
        ("a sysctl", "echo 1 > /proc/sys/kernel/panic"),
        ("sysfs", "mkdir /sys/fs/cgroup/x"),
        ("kernel memory", "head -c 1 /proc/kcore | grep -q ."),
        ("cgroups", "ls /sys/fs/cgroup/memory"),
    ] {
        let code = runtime
            .exec(&spec.id, &command(&["sh", "-c", line]), LONG)
            .await
            .unwrap();
        assert_ne!(code, 0, "{what} was allowed");
    }
    for name in [
        "null", "zero", "full", "random", "urandom", "tty", "ptmx", "pts/ptmx", "shm", "mqueue",
    ] {
        let path = format!("/dev/{name}");
        assert_eq!(
            runtime
                .exec(&spec.id, &command(&["test", "-e", &path]), LONG)
                .await
                .unwrap(),
            0,
            "{path}"
        );
    }
    let line = "echo x > /dev/null && head -c 1 /dev/urandom > /dev/null && test $(ls -d /proc/[0-9]* | wc -l) -le 5";
    assert_eq!(
        runtime
            .exec(&spec.id, &command(&["sh", "-c", line]), LONG)
            .await
            .unwrap(),
        0
    );
}

#[tokio::test]
async fn nothing_of_the_agent_leaks_into_containers_or_shims() {
    let bed = Bed::new();
    let runtime = bed.runtime();
    // Descriptors without close-on-exec, as a careless program around the agent might hold.
    let (_leak, _other) = nix::unistd::pipe().unwrap();
    let spec = bed.shell(
        "ls /proc/self/fd | wc -l; grep -E 'Sig(Ign|Blk)' /proc/self/status; sleep 1000",
        json!({}),
    );
    runtime.start(&spec).await.unwrap();
    wait_for("the status is logged", || async {
        bed.log("web").contains("SigIgn")
    })
    .await;
    // stdin, stdout, stderr and the directory that ls reads.
    assert!(bed.log("web").starts_with("4\n"), "{}", bed.log("web"));
    // But for the two real-time signals that glibc keeps for itself.
    let log = bed.log("web");
    let masks = log.lines().filter_map(|line| line.split_once('\t'));
    for (name, mask) in masks {
        assert_eq!(
            u64::from_str_radix(mask, 16).unwrap() & !(3 << 31),
            0,
            "{name} {mask}"
        );
    }
    let shim = shim_of(&bed, &spec.id);
    let count = std::fs::read_dir(format!("/proc/{shim}/fd"))
        .unwrap()
        .count();
    assert!(count <= 9, "the shim holds {count} descriptors");
    let exe = std::fs::read_link(format!("/proc/{shim}/exe")).unwrap();
    assert!(
        exe.file_name()
            .unwrap()
            .to_str()
            .unwrap()
            .starts_with("foreshore-shim-"),
        "{}",
        exe.display()
    );
    // Lowering it needs CAP_SYS_RESOURCE (bit 24), which root may lack.
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let capabilities = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let capabilities = u64::from_str_radix(capabilities.unwrap().trim(), 16).unwrap();
    let expected = if capabilities & 1 << 24 == 0 {
        "0"
    } else {
        "-999"
    };
    assert_eq!(
        std::fs::read_to_string(format!("/proc/{shim}/oom_score_adj"))
            .unwrap()
            .trim(),
        expected
    );
    let cgroups = std::fs::read_to_string(format!("/proc/{shim}/cgroup")).unwrap();
    assert!(!cgroups.contains(&spec.id.to_string()), "{cgroups}");
    // Nobody but root may end it, and a polite signal does nothing.
    for signal in [15, 2, 1] {
        nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(shim),
            nix::sys::signal::Signal::try_from(signal).unwrap(),
        )
        .unwrap();
    }
    assert!(matches!(
        find(&runtime, &spec.id).await.unwrap().state,
        ContainerState::Running { .. }
    ));
    let rollup = std::fs::read_to_string(format!("/proc/{shim}/smaps_rollup")).unwrap();
    let kilobytes: u64 = rollup
        .lines()
        .filter_map(|line| line.strip_prefix("Private_Dirty:"))
        .map(|rest| rest.trim().trim_end_matches(" kB").parse::<u64>().unwrap())
        .sum();
    assert!(
        kilobytes <= 32,
        "the shim has {kilobytes} kB of its own: {rollup}"
    );
}

#[tokio::test]
async fn a_link_in_the_place_of_dev_is_refused_and_links_in_etc_stay_inside() {
    let bed = Bed::new();
    let evil = bed.dir.path().join("evil");
    let outside = bed.dir.path().join("outside");
    std::fs::create_dir_all(evil.join("etc")).unwrap();
    std::fs::write(&outside, "untouched").unwrap();
    std::os::unix::fs::symlink(&outside, evil.join("etc/hosts")).unwrap();
    std::os::unix::fs::symlink("/etc/shadow", evil.join("etc/group")).unwrap();
    let mut spec = bed.shell("cat /etc/hosts", json!({}));
    spec.layers.push(evil.clone());
    let (exit, log) = run(&bed, &spec).await;
    assert!(exit.code == 0 && log.contains("localhost web"), "{log}");
    assert_eq!(std::fs::read_to_string(&outside).unwrap(), "untouched");

    std::os::unix::fs::symlink("/tmp", evil.join("dev")).unwrap();
    let mut spec = bed.shell("true", json!({}));
    spec.layers.push(evil);
    assert!(
        refusal(&bed, &spec)
            .await
            .contains("/dev is not a directory")
    );
    bed.assert_clean();
}
