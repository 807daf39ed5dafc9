//! Memory, processes and CPU are held to their limits.

use foreshore_agent::runtime::{Exit, Runtime as _};
use serde_json::json;

use crate::bed::{Bed, LONG, run, wait_for};

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
