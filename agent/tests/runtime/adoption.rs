//! What a new agent finds after the old one, a shim or a start was killed.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::Duration;

use foreshore_agent::runtime::{ContainerState, Exit, Runtime as _};
use foreshore_protocol::Digest;
use serde_json::json;

use crate::bed::{self, Bed, exit_of, find, kill9, pid_of, shim_of, wait_for};

#[tokio::test]
async fn a_new_agent_finds_running_containers_and_what_ended_meanwhile() {
    let bed = Bed::new();
    let (stays, ends) = (
        bed.spec("stays", &json!(["sleep", "1000"]), json!({})),
        bed.spec(
            "ends",
            &json!([
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
            oom: false,
            signal: None,
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
    let spec = bed.spec("web", &json!(["sleep", "1000"]), json!({}));
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
            &json!(["sleep", "1000"]),
            json!({"read_only": step % 2 == 0}),
        );
        let wrapper = bed.dir.path().join("agent");
        let agent = env!("CARGO_BIN_EXE_foreshore-agent");
        // Not the library's own end of a killed parent: the whole process, by SIGKILL, from outside.
        let script = format!(
            "#!/bin/busybox sh\nexec 2>/dev/null\n\"{agent}\" \"$@\" & p=$!; /bin/busybox usleep {}; kill -9 $p; wait $p\n",
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
    let spec = bed.spec("web", &json!(["sleep", "1000"]), json!({}));
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
