//! Arguments, users, environment, refusals, and commands run inside.

use std::time::{Duration, Instant};

use foreshore_agent::runtime::{ContainerState, ExecError, Runtime as _, StartError};
use serde_json::json;

use crate::bed::{Bed, LONG, find, kill9, pid_of, refusal, run, wait_for};

fn command(parts: &[&str]) -> Vec<String> {
    parts.iter().map(|part| (*part).to_owned()).collect()
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
            bed.spec("web", &json!(["nonesuch"]), json!({})),
            "no command \"nonesuch\"",
        ),
        (
            bed.spec("web", &json!(["/etc/passwd"]), json!({})),
            "may execute",
        ),
        (bed.spec("web", &json!([]), json!({})), "no command to run"),
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

/// Nobody else would end it when its time is up.
#[tokio::test]
async fn a_command_ends_with_the_process_that_waits_for_it() {
    let bed = Bed::new();
    let runtime = bed.runtime();
    let spec = bed.shell("exec sleep 1000", json!({}));
    runtime.start(&spec).await.unwrap();
    let container = pid_of(&runtime, &spec.id).await;
    let other = || {
        let inside = bed.cgroup_file(&spec.id, "cgroup.procs");
        let mut inside = inside.lines().filter_map(|line| line.parse::<i32>().ok());
        inside.find(|pid| *pid != container)
    };
    for round in 0..20 {
        let parts = command(&["tail", "-f", "/dev/null"]);
        let kill_who_waits = async {
            let mut parent = None;
            wait_for("the command", || {
                // Every other time on its way there, when it may be the process that makes it.
                let found = other().filter(|pid| {
                    let words = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                    round % 2 == 0 || words.starts_with(b"tail\0")
                });
                let status =
                    found.map(|pid| std::fs::read_to_string(format!("/proc/{pid}/status")));
                parent = status.and_then(Result::ok).and_then(|status| {
                    let line = status.lines().find_map(|line| line.strip_prefix("PPid:"))?;
                    line.trim().parse().ok()
                });
                let found = parent.is_some();
                async move { found }
            })
            .await;
            kill9(parent.unwrap());
        };
        let (ended, ()) = tokio::join!(runtime.exec(&spec.id, &parts, LONG), kill_who_waits);
        assert!(matches!(ended, Err(ExecError::Failed(_))), "{ended:?}");
        wait_for("the command is gone", || async { other().is_none() }).await;
    }
    runtime.remove(&spec.id).await.unwrap();
    bed.assert_clean();
}
