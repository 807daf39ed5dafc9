//! Memory, processes and CPU are held to their limits.

use foreshore_agent::runtime::{Exit, Runtime as _};
use serde_json::json;

use crate::bed::{self, Bed, LONG, pid_of, run, shim_of, wait_for};

#[tokio::test]
async fn too_much_memory_ends_in_an_oom_kill() {
    let bed = Bed::new();
    let line = "x=x; while true; do x=$x$x; done";
    let (exit, _) = run(&bed, &bed.shell(line, json!({"mem_limit": "16m"}))).await;
    assert_eq!(
        exit,
        Exit {
            code: 137,
            oom: true,
            signal: Some(9),
        }
    );
    bed.assert_clean();
}

#[tokio::test]
async fn memory_beyond_the_limit_is_not_swapped_out() {
    let bed = Bed::new();
    // Files in a tmpfs are the container's memory and, where there is swap, the first to go there.
    let line = "head -c 40000000 /dev/zero > /scratch/file && echo kept || exit 7";
    let more = json!({"mem_limit": "16m", "tmpfs": ["/scratch:size=64m"]});
    let (exit, log) = run(&bed, &bed.shell(line, more)).await;
    assert!(exit.oom && !log.contains("kept"), "{exit:?} {log}");
    bed.assert_clean();
}

#[tokio::test]
async fn the_kernel_is_told_every_limit() {
    let bed = Bed::new();
    let runtime = bed.runtime();
    let more = json!({"mem_limit": "24m", "cpus": "0.25", "pids_limit": 33});
    let spec = bed.shell("sleep 1000", more);
    runtime.start(&spec).await.unwrap();
    // cgroup v1 and v2 have other files for the same limits.
    let unified = bed::hierarchies() == [std::path::Path::new("/sys/fs/cgroup")];
    let memory = (24 << 20).to_string();
    let expected: &[(&str, &str)] = if unified {
        &[
            ("memory.max", &memory),
            ("memory.swap.max", "0"),
            ("cpu.max", "25000 100000"),
            ("pids.max", "33"),
        ]
    } else {
        &[
            ("memory.limit_in_bytes", &memory),
            ("cpu.cfs_quota_us", "25000"),
            ("cpu.cfs_period_us", "100000"),
            ("pids.max", "33"),
        ]
    };
    for (file, value) in expected {
        assert_eq!(bed.cgroup_file(&spec.id, file).trim(), *value, "{file}");
    }
    runtime.remove(&spec.id).await.unwrap();
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

/// The agent's is set when it runs; here this process stands for it.
#[tokio::test]
async fn the_container_goes_before_the_agent_and_the_agent_before_the_shim() {
    let bed = Bed::new();
    let runtime = bed.runtime();
    let spec = bed.shell("sleep 1000 & exec sleep 1000", json!({}));
    runtime.start(&spec).await.unwrap();
    let score = |pid: i32| -> i32 {
        let text = std::fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap();
        text.trim().parse().unwrap()
    };
    let own = score(std::process::id().cast_signed());
    let container = score(pid_of(&runtime, &spec.id).await);
    let shim = score(shim_of(&bed, &spec.id));
    assert_eq!(container, 500);
    // Below the agent where the device allows that (CAP_SYS_RESOURCE), never above it.
    assert!(shim == -999 || shim == own.max(0), "{shim}, own {own}");
    // A command in it goes as the container does, whoever ran it.
    let line = "read x < /proc/self/oom_score_adj; test $x = 500";
    let command = ["/bin/sh", "-c", line].map(str::to_owned);
    assert_eq!(runtime.exec(&spec.id, &command, LONG).await.unwrap(), 0);
    runtime.remove(&spec.id).await.unwrap();
    bed.assert_clean();
}

#[tokio::test]
async fn cpu_time_is_shared_by_weight() {
    let bed = Bed::new();
    let runtime = bed.runtime();
    for (more, shares, weight) in [
        (json!({"cpus": "0.5"}), "512", 20),
        (json!({"cpus": "0.5", "cpu_shares": 2048}), "2048", 79),
    ] {
        let spec = bed.shell("exec sleep 1000", more);
        runtime.start(&spec).await.unwrap();
        let found = |name: &str| {
            let dirs = bed.cgroups(&spec.id.to_string()).into_iter();
            dirs.filter_map(|dir| std::fs::read_to_string(dir.join(name)).ok())
                .next()
        };
        match (found("cpu.shares"), found("cpu.weight")) {
            (Some(found), _) => assert_eq!(found.trim(), shares),
            // The conversion is the runtime specification's, or the newer one of the kernel's documentation.
            (None, Some(found)) => {
                let found: u32 = found.trim().parse().unwrap();
                assert!(
                    found >= weight && found <= 200,
                    "{found}, at least {weight}"
                );
            }
            (None, None) => panic!("no CPU controller"),
        }
        runtime.remove(&spec.id).await.unwrap();
    }
    bed.assert_clean();
}
