//! The real runtime on the real kernel: needs root and busybox.

#[path = "runtime/bed.rs"]
mod bed;

use std::os::unix::fs::MetadataExt as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use bed::{Bed, LONG, exit_of, find, kill9, pid_of, refusal, run, shim_of, wait_for};
use foreshore_agent::runtime::{ContainerState, ExecError, Exit, Runtime as _, StartError};
use foreshore_protocol::Digest;
use serde_json::json;

fn command(parts: &[&str]) -> Vec<String> {
    parts.iter().map(|part| (*part).to_owned()).collect()
}

#[tokio::test]
async fn a_container_runs_and_its_exit_code_is_kept() {
    let bed = Bed::new();
    let runtime = bed.runtime();
    let spec = bed.shell("echo hello; echo oops >&2; exit 42", json!({}));
    runtime.start(&spec).await.unwrap();
    assert_eq!(
        exit_of(&runtime, &spec.id).await,
        Exit {
            code: 42,
            oom: false
        }
    );
    let container = find(&runtime, &spec.id).await.unwrap();
    assert_eq!(
        (container.release, container.service_digest),
        (spec.release, spec.service_digest)
    );
    let raw = std::fs::read_to_string(bed.log_file("web")).unwrap();
    assert!(
        raw.contains(" stdout F hello\n") && raw.contains(" stderr F oops\n"),
        "{raw}"
    );

    runtime.remove(&spec.id).await.unwrap();
    bed.assert_clean();
    assert!(bed.log_file("web").exists(), "logs stay");
    runtime.remove(&spec.id).await.unwrap();
    runtime.stop(&spec.id, 15, LONG).await.unwrap();
}

#[tokio::test]
async fn a_signal_reads_as_128_and_its_number() {
    let bed = Bed::new();
    let (exit, _) = run(
        &bed,
        &bed.shell("sleep 60 & kill -9 $!; wait $!", json!({})),
    )
    .await;
    assert_eq!(
        exit,
        Exit {
            code: 137,
            oom: false
        }
    );
    // The first process of a PID namespace only dies of signals from outside.
    let runtime = bed.runtime();
    let spec = bed.spec("web", json!(["sleep", "1000"]), json!({}));
    runtime.start(&spec).await.unwrap();
    kill9(pid_of(&runtime, &spec.id).await);
    assert_eq!(
        exit_of(&runtime, &spec.id).await,
        Exit {
            code: 137,
            oom: false
        }
    );
}

#[tokio::test]
async fn environment_user_directory_and_host_name_are_as_asked() {
    let bed = Bed::new();
    let line =
        "id; pwd; hostname; cat /etc/hosts; env; echo umask $(umask); cat /proc/1/oom_score_adj";
    let (exit, log) = run(
        &bed,
        &bed.shell(
            line,
            json!({"user": "app", "working_dir": "/made/up", "environment": {"A": "one two", "FROM_IMAGE": "no"}}),
        ),
    )
    .await;
    assert_eq!(exit.code, 0, "{log}");
    for expected in [
        "uid=1000(app) gid=1001(app) groups=20(dialout)",
        "\n/made/up\n",
        "\nweb\n",
        "127.0.0.1 localhost web",
        "\nA=one two\n",
        "\nFROM_IMAGE=no\n",
        "\nHOME=/srv\n",
        "\nHOSTNAME=web\n",
        "\nPATH=/usr/local/sbin:",
        "umask 0022",
        "\n500\n",
    ] {
        assert!(log.contains(expected), "{expected:?} is not in {log}");
    }
}

#[tokio::test]
async fn what_the_image_or_device_lacks_is_refused_and_leaves_nothing() {
    let bed = Bed::new();
    for (spec, expected) in [
        (
            bed.spec("web", json!(["nonesuch"]), json!({})),
            "no command \"nonesuch\"",
        ),
        (
            bed.spec("web", json!(["/etc/passwd"]), json!({})),
            "may execute",
        ),
        (bed.spec("web", json!([]), json!({})), "no command to run"),
        (
            bed.shell("true", json!({"user": "nobody"})),
            "no user \"nobody\"",
        ),
        (
            bed.shell("true", json!({"user": "0:nogroup"})),
            "no group \"nogroup\"",
        ),
        (
            bed.shell("true", json!({"volumes": ["/no/such/dir:/data"]})),
            "/no/such/dir does not exist",
        ),
    ] {
        let refusal = refusal(&bed, &spec).await;
        assert!(refusal.contains(expected), "{refusal}");
        bed.assert_clean();
    }
    let mut spec = bed.shell("true", json!({}));
    spec.layers = vec![bed.dir.path().join("nowhere")];
    let error = bed.runtime().start(&spec).await.unwrap_err();
    assert!(
        matches!(&error, StartError::Failed { message, .. } if message.contains("nowhere")),
        "{error:?}"
    );
    bed.assert_clean();
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

#[tokio::test]
async fn higher_layers_win_and_many_layers_fit() {
    let bed = Bed::new();
    let mut spec = bed.shell("cat /etc/which; ls /layers | wc -l", json!({}));
    for number in 0..120 {
        // Long names with the characters that separate overlay options.
        let layer = bed.dir.path().join(format!(
            "a:long,name-of-a-layer-with-sixty-four-characters-or-more-{number:03}"
        ));
        std::fs::create_dir_all(layer.join("etc")).unwrap();
        std::fs::create_dir_all(layer.join("layers")).unwrap();
        std::fs::write(layer.join("etc/which"), format!("{number}\n")).unwrap();
        std::fs::write(layer.join(format!("layers/{number}")), "").unwrap();
        spec.layers.push(layer);
    }
    let (_, log) = run(&bed, &spec).await;
    assert_eq!(log, "119\n120\n");
}

#[tokio::test]
async fn too_much_memory_ends_in_an_oom_kill() {
    let bed = Bed::new();
    let line = "x=x; while true; do x=$x$x; done";
    let (exit, _) = run(&bed, &bed.shell(line, json!({"mem_limit": "16m"}))).await;
    assert_eq!(
        exit,
        Exit {
            code: 137,
            oom: true
        }
    );
    bed.assert_clean();
}

#[tokio::test]
async fn a_fork_bomb_stays_within_its_limit() {
    let bed = Bed::new();
    let runtime = bed.runtime();
    let line = "while true; do sleep 1000 & done";
    let spec = bed.shell(line, json!({"pids_limit": 20}));
    runtime.start(&spec).await.unwrap();
    wait_for("the limit is hit", || async {
        bed.cgroup_file(&spec.id, "pids.events")
            .lines()
            .any(|line| line != "max 0" && line.starts_with("max "))
    })
    .await;
    let current: u32 = bed
        .cgroup_file(&spec.id, "pids.current")
        .trim()
        .parse()
        .unwrap();
    assert!(current <= 20, "{current} processes");
    runtime.stop(&spec.id, 9, LONG).await.unwrap();
    runtime.remove(&spec.id).await.unwrap();
    bed.assert_clean();
}

#[tokio::test]
async fn a_busy_loop_is_throttled() {
    let bed = Bed::new();
    let runtime = bed.runtime();
    let spec = bed.shell("while true; do :; done", json!({"cpus": "0.1"}));
    runtime.start(&spec).await.unwrap();
    wait_for("the container is throttled", || async {
        let stat = bed.cgroup_file(&spec.id, "cpu.stat");
        stat.lines().any(|line| {
            line.strip_prefix("nr_throttled ")
                .is_some_and(|count| count != "0")
        })
    })
    .await;
    runtime.remove(&spec.id).await.unwrap();
}

#[tokio::test]
async fn the_root_is_read_only_unless_asked_and_never_outlives_the_container() {
    let bed = Bed::new();
    let line = "touch /file 2>&1; touch /etc/file 2>&1; ls /file; df / >/dev/null; exit 0";
    let (_, log) = run(&bed, &bed.shell(line, json!({}))).await;
    assert!(
        log.contains("/file: Read-only file system") && log.contains("/etc/file: Read-only"),
        "{log}"
    );

    let line = "test ! -e /kept && touch /kept && echo content > /etc/passwd && echo done";
    for _ in 0..2 {
        let (exit, log) = run(&bed, &bed.shell(line, json!({"read_only": false}))).await;
        assert_eq!((exit.code, log.as_str()), (0, "done\n"));
    }
    assert!(!bed.layer.join("kept").exists());
    assert!(
        std::fs::read_to_string(bed.layer.join("etc/passwd"))
            .unwrap()
            .contains("root:")
    );
    bed.assert_clean();
}

#[tokio::test]
async fn tmpfs_has_its_size_and_options() {
    let bed = Bed::new();
    let line = "grep ' /scratch ' /proc/mounts; dd if=/dev/zero of=/scratch/file bs=64k count=64 2>&1; \
                stat -c %s /scratch/file; grep ' /scratch/inner ' /proc/mounts";
    // The inner one is named first and must still be mounted last.
    let (_, log) = run(
        &bed,
        &bed.shell(
            line,
            json!({"tmpfs": ["/scratch/inner:size=4k", "/scratch:size=1m"]}),
        ),
    )
    .await;
    assert!(
        log.contains("No space left on device") && log.contains("\n1048576\n"),
        "{log}"
    );
    assert!(
        log.contains("nosuid,nodev") && log.contains("size=1024k") && log.contains("size=4k"),
        "{log}"
    );
}

#[tokio::test]
async fn volumes_outlive_containers_and_belong_to_who_uses_them() {
    let bed = Bed::new();
    let volumes =
        json!({"user": "app", "volumes": ["data:/srv/data", "other:/new/place", "data:/again:ro"]});
    let line = "test -e /srv/data/file && cat /srv/data/file; echo kept > /srv/data/file && touch /new/place/x; \
                touch /again/x 2>&1; grep ' /srv/data ' /proc/mounts";
    let (exit, first) = run(&bed, &bed.shell(line, volumes.clone())).await;
    assert!(
        !first.contains("kept") && first.contains("/again/x: Read-only file system"),
        "{first}"
    );
    assert!(first.contains("nosuid,nodev"), "{first}");
    assert_eq!(exit.code, 0, "{first}");
    let (_, second) = run(&bed, &bed.shell(line, volumes)).await;
    assert!(second.starts_with("kept\n"), "{second}");
    let volume = bed.state_dir().join("volumes/shop/data");
    assert_eq!(
        (
            volume.metadata().unwrap().uid(),
            volume.metadata().unwrap().gid()
        ),
        (1000, 1001)
    );
    assert_eq!(
        volume.metadata().unwrap().permissions().mode() & 0o777,
        0o755
    );
    assert_eq!(
        bed.state_dir()
            .join("volumes/shop/other")
            .metadata()
            .unwrap()
            .uid(),
        1000
    );
}

#[tokio::test]
async fn bind_mounts_show_what_the_device_has() {
    let bed = Bed::new();
    let shared = bed.dir.path().join("shared");
    std::fs::create_dir(&shared).unwrap();
    std::fs::write(shared.join("file"), "from the device\n").unwrap();
    let (dir, file) = (shared.display(), shared.join("file"));
    let line =
        "cat /in/file /one; echo x > /in/new 2>&1; echo from inside > /rw/new; touch /one 2>&1";
    let volumes = json!({"volumes": [format!("{dir}:/in:ro"), format!("{}:/one:ro", file.display()), format!("{dir}:/rw")]});
    let (_, log) = run(&bed, &bed.shell(line, volumes)).await;
    assert!(
        log.starts_with("from the device\nfrom the device\n"),
        "{log}"
    );
    assert!(
        log.contains("/in/new: Read-only file system") && log.contains("/one: Read-only"),
        "{log}"
    );
    assert_eq!(
        std::fs::read_to_string(shared.join("new")).unwrap(),
        "from inside\n"
    );
}

#[tokio::test]
async fn stop_asks_first_and_kills_after_the_grace() {
    let bed = Bed::new();
    let runtime = bed.runtime();
    let polite = bed.shell(
        "trap 'echo bye; exit 7' TERM; echo up; while true; do usleep 10000; done",
        json!({}),
    );
    runtime.start(&polite).await.unwrap();
    wait_for("the trap is set", || async {
        bed.log("web").contains("up")
    })
    .await;
    runtime.stop(&polite.id, 15, LONG).await.unwrap();
    assert_eq!(
        find(&runtime, &polite.id).await.unwrap().state,
        ContainerState::Exited(Exit {
            code: 7,
            oom: false
        })
    );
    assert!(bed.log("web").contains("bye"));

    let deaf = bed.shell("trap '' TERM; sleep 1000 & wait; sleep 1000", json!({}));
    runtime.start(&deaf).await.unwrap();
    let before = Instant::now();
    runtime
        .stop(&deaf.id, 15, Duration::from_millis(200))
        .await
        .unwrap();
    assert!(before.elapsed() >= Duration::from_millis(200));
    assert_eq!(
        find(&runtime, &deaf.id).await.unwrap().state,
        ContainerState::Exited(Exit {
            code: 137,
            oom: false
        })
    );
    runtime.stop(&deaf.id, 15, LONG).await.unwrap();
}

#[tokio::test]
async fn logs_are_rotated_and_lines_stay_whole() {
    let bed = Bed::new();
    let line = "for i in $(seq 1 600); do echo line $i of stdout; echo line $i of stderr >&2; done; printf end";
    let (_, _) = run(
        &bed,
        &bed.shell(line, json!({"logging": {"max_size": "8k", "max_file": 3}})),
    )
    .await;
    let logs = bed.state_dir().join("logs/shop");
    let mut names: Vec<String> = std::fs::read_dir(&logs)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, ["web.log", "web.log.1", "web.log.2"]);
    let mut all = String::new();
    for name in names.iter().rev() {
        let text = std::fs::read_to_string(logs.join(name)).unwrap();
        assert!(text.len() <= 8192, "{name} has {} bytes", text.len());
        all.push_str(&text);
    }
    let expected: Vec<String> = (1..=600).map(|i| format!("line {i} of stdout")).collect();
    let seen: Vec<&str> = all
        .lines()
        .filter_map(|line| line.split_once(" stdout F "))
        .map(|(_, text)| text)
        .collect();
    assert_eq!(*seen.last().unwrap(), "end");
    let seen = &seen[..seen.len() - 1];
    assert!(seen.len() > 50, "{all}");
    assert_eq!(
        seen,
        &expected[expected.len() - seen.len()..],
        "the newest lines, in order, whole"
    );
}

#[tokio::test]
async fn long_lines_prompts_and_floods_are_kept_or_dropped_but_never_block() {
    let bed = Bed::new();
    let runtime = bed.runtime();
    let spec = bed.shell("head -c 10000 /dev/zero | tr '\\0' x 2>/dev/null || yes x | head -c 9999; printf 'name? '; sleep 1000", json!({}));
    runtime.start(&spec).await.unwrap();
    // Without a newline, and while the container lives.
    wait_for("the prompt is logged", || async {
        bed.log("web").ends_with("name? ")
    })
    .await;
    runtime.remove(&spec.id).await.unwrap();

    // The log directory cannot be written: the container must not notice.
    std::fs::remove_dir_all(bed.state_dir().join("logs")).unwrap();
    std::fs::write(bed.state_dir().join("logs"), "in the way").unwrap();
    let spec = bed.shell("yes | head -c 3000000; exit 5", json!({}));
    std::fs::remove_file(bed.state_dir().join("logs")).unwrap();
    std::fs::create_dir(bed.state_dir().join("logs")).unwrap();
    std::fs::write(bed.state_dir().join("logs/shop"), "in the way").unwrap();
    runtime.start(&spec).await.unwrap();
    assert_eq!(exit_of(&runtime, &spec.id).await.code, 5);
}

#[tokio::test]
async fn a_full_disk_drops_logs_and_stops_nobody() {
    let bed = Bed::new();
    let logs = bed.state_dir().join("logs/shop");
    std::fs::create_dir_all(&logs).unwrap();
    // A log that is the device which is always full.
    std::os::unix::fs::symlink("/dev/full", logs.join("web.log")).unwrap();
    let spec = bed.shell("yes | head -c 1000000; exit 6", json!({}));
    let runtime = bed.runtime();
    runtime.start(&spec).await.unwrap();
    assert_eq!(exit_of(&runtime, &spec.id).await.code, 6);
    runtime.remove(&spec.id).await.unwrap();
    // Links are not followed, so a real full file system too.
    std::fs::remove_file(logs.join("web.log")).unwrap();
    nix::mount::mount(
        Some("tmpfs"),
        &logs,
        Some("tmpfs"),
        nix::mount::MsFlags::empty(),
        Some("size=16k"),
    )
    .unwrap();
    let outcome = async {
        let spec = bed.shell("yes | head -c 1000000; exit 6", json!({}));
        runtime
            .start(&spec)
            .await
            .map_err(|error| format!("{error:?}"))?;
        let code = exit_of(&runtime, &spec.id).await.code;
        runtime
            .remove(&spec.id)
            .await
            .map_err(|error| format!("{error:?}"))?;
        Ok::<_, String>(code)
    }
    .await;
    nix::mount::umount2(&logs, nix::mount::MntFlags::MNT_DETACH).unwrap();
    assert_eq!(outcome, Ok(6));
}

#[tokio::test]
async fn commands_run_inside_with_the_containers_rights() {
    let bed = Bed::new();
    let runtime = bed.runtime();
    let spec = bed.shell(
        "sleep 1000",
        json!({"user": "app", "working_dir": "/srv", "environment": {"A": "b"}, "tmpfs": ["/out"]}),
    );
    runtime.start(&spec).await.unwrap();
    let exec = |parts: &[&str], timeout| {
        let (runtime, id, parts) = (&runtime, &spec.id, command(parts));
        async move { runtime.exec(id, &parts, timeout).await }
    };
    assert_eq!(exec(&["true"], LONG).await.unwrap(), 0);
    assert_eq!(exec(&["sh", "-c", "exit 42"], LONG).await.unwrap(), 42);
    assert_eq!(exec(&["sh", "-c", "kill -9 $$"], LONG).await.unwrap(), 137);
    let line = "test \"$(id -u) $(id -g) $(pwd) $A $HOME\" = '1000 1001 /srv b /srv' && id | grep -q dialout";
    assert_eq!(exec(&["sh", "-c", line], LONG).await.unwrap(), 0);
    // Same PID namespace, same root, no terminal, output that nobody reads.
    assert_eq!(
        exec(
            &["sh", "-c", "test -d /proc/1/root && yes | head -c 500000"],
            LONG
        )
        .await
        .unwrap(),
        0
    );
    let error = exec(&["nonesuch"], LONG).await.unwrap_err();
    assert!(
        matches!(&error, ExecError::Failed(message) if message.contains("no command \"nonesuch\"")),
        "{error:?}"
    );

    let before = Instant::now();
    let error = exec(
        &["sh", "-c", "sleep 1000; true"],
        Duration::from_millis(300),
    )
    .await
    .unwrap_err();
    assert!(matches!(error, ExecError::Timeout(_)), "{error:?}");
    assert!(before.elapsed() >= Duration::from_millis(300));
    wait_for("the command and its children are gone", || async {
        bed.cgroup_file(&spec.id, "cgroup.procs").lines().count() == 1
    })
    .await;
    assert!(matches!(
        find(&runtime, &spec.id).await.unwrap().state,
        ContainerState::Running { .. }
    ));

    runtime.stop(&spec.id, 9, LONG).await.unwrap();
    assert!(matches!(
        exec(&["true"], LONG).await,
        Err(ExecError::NotRunning(_))
    ));
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
    assert_eq!(
        std::fs::read_to_string(format!("/proc/{shim}/oom_score_adj"))
            .unwrap()
            .trim(),
        "0"
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
async fn two_containers_serve_the_same_port_and_are_reached_inside() {
    let bed = Bed::new();
    let runtime = bed.runtime();
    let mut specs = Vec::new();
    for name in ["one", "two"] {
        let line = format!(
            "mkdir -p /srv/www; echo I am {name} > /srv/www/index.html; exec httpd -f -p 8080 -h /srv/www"
        );
        let spec = bed.spec(
            name,
            json!(["sh", "-c", line]),
            json!({"tmpfs": ["/srv/www"]}),
        );
        runtime.start(&spec).await.unwrap();
        specs.push((name, spec));
    }
    let before = std::fs::read_link("/proc/thread-self/ns/net").unwrap();
    for (name, spec) in &specs {
        let mut answer = String::new();
        wait_for("the server answers", || async {
            runtime.connect(&spec.id, 8080, LONG).await.is_ok()
        })
        .await;
        let mut stream = runtime.connect(&spec.id, 8080, LONG).await.unwrap();
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n").await.unwrap();
        stream.read_to_string(&mut answer).await.unwrap();
        assert!(answer.contains(&format!("I am {name}")), "{answer}");
    }
    let error = runtime.connect(&specs[0].1.id, 81, LONG).await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused);
    assert_eq!(
        std::fs::read_link("/proc/thread-self/ns/net").unwrap(),
        before
    );
    // None of it is reachable from the device.
    assert!(std::net::TcpStream::connect("127.0.0.1:8080").is_err());
}

#[tokio::test]
async fn network_none_has_only_loopback_and_host_has_the_devices_network() {
    let bed = Bed::new();
    let (_, log) = run(&bed, &bed.shell("ip -o link; hostname", json!({}))).await;
    assert!(
        log.lines()
            .filter(|line| line.contains("mtu"))
            .all(|line| line.contains(" lo:") || line.contains("NOARP")),
        "{log}"
    );
    assert!(log.contains("LOOPBACK,UP"), "{log}");

    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || listener.incoming().map(drop).count());
    let line = format!("nc 127.0.0.1 {port} </dev/null && hostname && cat /etc/resolv.conf");
    let (exit, log) = run(&bed, &bed.shell(&line, json!({"network_mode": "host"}))).await;
    assert_eq!(exit.code, 0, "{log}");
    let name = nix::unistd::gethostname().unwrap();
    assert!(log.contains(name.to_str().unwrap()), "{log}");
    assert!(
        log.contains(std::fs::read_to_string("/etc/resolv.conf").unwrap().trim()),
        "{log}"
    );

    let runtime = bed.runtime();
    let spec = bed.shell("sleep 1000", json!({"network_mode": "host"}));
    runtime.start(&spec).await.unwrap();
    runtime.connect(&spec.id, port, LONG).await.unwrap();
}

#[tokio::test]
async fn a_new_agent_finds_running_containers_and_what_ended_meanwhile() {
    let bed = Bed::new();
    let (stays, ends) = (
        bed.spec("stays", json!(["sleep", "1000"]), json!({})),
        bed.spec(
            "ends",
            json!([
                "sh",
                "-c",
                "while test ! -e /gate/go; do usleep 1000; done; exit 3"
            ]),
            json!({"volumes": ["gate:/gate"]}),
        ),
    );
    let (pid, shim);
    {
        let first = bed.runtime();
        first.start(&stays).await.unwrap();
        first.start(&ends).await.unwrap();
        pid = pid_of(&first, &stays.id).await;
        shim = shim_of(&bed, &ends.id);
    }
    // While no agent is there.
    std::fs::write(bed.state_dir().join("volumes/shop/gate/go"), "").unwrap();
    wait_for("the exit is recorded", || async {
        bed.container_dir(&ends.id).join("exit").exists()
    })
    .await;
    assert!(shim > 0);

    let second = bed.runtime();
    assert_eq!(
        pid_of(&second, &stays.id).await,
        pid,
        "the container was not touched"
    );
    assert_eq!(
        find(&second, &ends.id).await.unwrap().state,
        ContainerState::Exited(Exit {
            code: 3,
            oom: false
        })
    );
    assert_eq!(
        find(&second, &stays.id).await.unwrap().release,
        stays.release
    );
    // The new one is woken by the old one's container.
    kill9(pid);
    assert_eq!(exit_of(&second, &stays.id).await.code, 137);
    for spec in [&stays, &ends] {
        second.remove(&spec.id).await.unwrap();
    }
    bed.assert_clean();
}

#[tokio::test]
async fn a_lost_shim_leaves_a_broken_container_that_can_be_removed() {
    let bed = Bed::new();
    let runtime = bed.runtime();
    let spec = bed.spec("web", json!(["sleep", "1000"]), json!({}));
    runtime.start(&spec).await.unwrap();
    let pid = pid_of(&runtime, &spec.id).await;
    kill9(shim_of(&bed, &spec.id));
    tokio::time::timeout(bed::PATIENCE, runtime.changed())
        .await
        .unwrap();
    assert_eq!(
        find(&runtime, &spec.id).await.unwrap().state,
        ContainerState::Broken
    );
    runtime.remove(&spec.id).await.unwrap();
    assert!(!Path::new(&format!("/proc/{pid}/root/bin")).exists());
    bed.assert_clean();
}

#[tokio::test]
async fn a_start_killed_half_way_is_broken_and_leaves_nothing_after_remove() {
    let bed = Bed::new();
    // An agent that is killed after some time of its start: later and later, through all of its steps.
    let mut states = std::collections::BTreeMap::new();
    for step in 0..40_u64 {
        let spec = bed.spec(
            "web",
            json!(["sleep", "1000"]),
            json!({"read_only": step % 2 == 0}),
        );
        let wrapper = bed.dir.path().join("agent");
        let agent = env!("CARGO_BIN_EXE_foreshore-agent");
        // Not the library's own end of a killed parent: the whole process, by SIGKILL, from outside.
        let script = format!(
            "#!/bin/busybox sh\n\"{agent}\" \"$@\" & p=$!; /bin/busybox usleep {}; kill -9 $p; wait $p\n",
            step * 1500
        );
        std::fs::write(&wrapper, script).unwrap();
        std::fs::set_permissions(&wrapper, std::fs::Permissions::from_mode(0o755)).unwrap();
        let id = spec.id.clone();
        {
            // The agent dies with it: whatever start would clean up stays.
            let dying = bed.runtime_with(&wrapper);
            let start = dying.start(&spec);
            tokio::select! {
                _ = start => {}
                () = async {
                    wait_for("the container's directory", || async { bed.container_dir(&id).exists() }).await;
                    tokio::time::sleep(Duration::from_millis(step * 3 / 2 + 2)).await;
                } => {}
            }
        }
        let runtime = bed.runtime();
        let state = find(&runtime, &id)
            .await
            .map(|container| format!("{:?}", container.state));
        let state = state.map(|state| state.chars().take(7).collect::<String>());
        *states.entry(state).or_insert(0) += 1;
        runtime.remove(&id).await.unwrap();
        assert_eq!(find(&runtime, &id).await, None);
    }
    println!("states after the kill: {states:?}");
    wait_for("the last processes are gone", || async {
        bed::processes_naming(bed.dir.path().to_str().unwrap()).is_empty()
    })
    .await;
    bed.assert_clean();
}

#[tokio::test]
async fn records_of_another_boot_and_unreadable_ones_are_broken() {
    let bed = Bed::new();
    let runtime = bed.runtime();
    let spec = bed.spec("web", json!(["sleep", "1000"]), json!({}));
    runtime.start(&spec).await.unwrap();
    let path = bed.container_dir(&spec.id).join("record.json");
    let good = std::fs::read_to_string(&path).unwrap();
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    let other = good.replace(boot.trim(), "00000000-0000-0000-0000-000000000000");
    assert_ne!(other, good);
    for bad in [other.as_str(), "", "{", "null"] {
        std::fs::write(&path, bad).unwrap();
        let container = find(&bed.runtime(), &spec.id).await.unwrap();
        assert_eq!(container.state, ContainerState::Broken, "{bad:?}");
    }
    assert_eq!(
        find(&runtime, &spec.id).await.unwrap().release,
        Digest::from_bytes([0; 32])
    );
    // Even without its record nothing of it survives.
    runtime.remove(&spec.id).await.unwrap();
    bed.assert_clean();
}

#[tokio::test]
async fn an_id_is_started_once() {
    let bed = Bed::new();
    let runtime = bed.runtime();
    let spec = bed.spec("web", json!(["sleep", "1000"]), json!({}));
    runtime.start(&spec).await.unwrap();
    let pid = pid_of(&runtime, &spec.id).await;
    assert!(matches!(
        runtime.start(&spec).await,
        Err(StartError::Failed { .. })
    ));
    assert_eq!(pid_of(&runtime, &spec.id).await, pid);
}

#[tokio::test]
async fn many_lives_leave_nothing_behind() {
    let bed = Bed::new();
    let runtime = bed.runtime();
    let descriptors = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let mut before = 0;
    for round in 0..30 {
        let spec = bed.spec(
            "web",
            json!(["sleep", "1000"]),
            json!({"read_only": round % 2 == 0}),
        );
        runtime.start(&spec).await.unwrap();
        if round % 3 == 0 {
            runtime.stop(&spec.id, 9, LONG).await.unwrap();
        }
        runtime.remove(&spec.id).await.unwrap();
        bed.assert_clean();
        if round == 0 {
            before = descriptors();
        }
    }
    // Other tests of this process open some at the same time.
    assert!(
        descriptors() < before + 60,
        "{} descriptors, {before} before",
        descriptors()
    );
}
