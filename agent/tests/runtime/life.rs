//! Start, stop, end, remove.

use std::time::{Duration, Instant};

use foreshore_agent::runtime::{ContainerState, Exit, Runtime as _, StartError};
use serde_json::json;

use crate::bed::{Bed, LONG, exit_of, find, kill9, pid_of, run, wait_for};

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
            oom: false,
            signal: None,
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
    // A shell that ends with the code of a child that was killed was not killed itself.
    assert_eq!(exit, Exit::with_code(137));
    // The first process of a PID namespace only dies of signals from outside.
    let runtime = bed.runtime();
    let spec = bed.spec("web", &json!(["sleep", "1000"]), json!({}));
    runtime.start(&spec).await.unwrap();
    kill9(pid_of(&runtime, &spec.id).await);
    assert_eq!(
        exit_of(&runtime, &spec.id).await,
        Exit {
            code: 137,
            oom: false,
            signal: Some(9),
        }
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
            oom: false,
            signal: None,
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
            oom: false,
            signal: Some(9),
        })
    );
    runtime.stop(&deaf.id, 15, LONG).await.unwrap();
}

#[tokio::test]
async fn an_id_is_started_once() {
    let bed = Bed::new();
    let runtime = bed.runtime();
    let spec = bed.spec("web", &json!(["sleep", "1000"]), json!({}));
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
            &json!(["sleep", "1000"]),
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
