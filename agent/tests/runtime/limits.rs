//! Memory, processes and CPU are held to their limits.

use foreshore_agent::runtime::{Exit, Runtime as _};
use serde_json::json;

use crate::bed::{self, Bed, LONG, run, wait_for};

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
