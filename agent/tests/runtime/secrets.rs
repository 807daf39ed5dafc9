//! Secrets of containers: who sees them, where they are, and how they change.

use std::collections::BTreeSet;

use foreshore_agent::runtime::Runtime as _;
use foreshore_agent::runtime::oci::UserNamespaces;
use foreshore_agent::runtime::secrets::Values;
use foreshore_protocol::secret::{Secret, SecretValue};
use serde_json::json;

use crate::bed::{Bed, exit_of, find, refusal, wait_for};

fn values(of: &[(&str, u64, &[u8])]) -> Values {
    let secret = |revision: u64, value: &[u8]| Secret {
        revision,
        value: SecretValue::new(value.to_vec()),
    };
    of.iter()
        .map(|(name, revision, value)| (name.parse().unwrap(), secret(*revision, value)))
        .collect()
}

#[tokio::test]
async fn secrets_are_files_in_memory_and_variables_for_whom_they_are_meant() {
    let bed = Bed::in_memory();
    let service = json!({
        "user": "app",
        "secrets": [
            "key",
            {"source": "key", "target": "open", "mode": "0444", "uid": "0", "gid": "20"},
            {"source": "roots", "uid": "0"},
            {"source": "token", "environment": "TOKEN"},
            {"source": "both", "target": "both", "environment": "BOTH"},
        ],
    });
    let line = "cd /run/secrets; ls -a | tail -n +3 | sort; stat -c '%n %a %u:%g' *; cat key; echo; cat roots 2>&1; \
                echo $TOKEN $BOTH; cat both; echo; echo x 2>&1 >key; rm -f key 2>&1; touch new 2>&1; \
                grep ' /run/secrets ' /proc/mounts";
    let line = line.replace("| sort", "");
    for user_namespaces in [UserNamespaces::Auto, UserNamespaces::Off] {
        let runtime = bed.runtime_in(user_namespaces);
        let _ = std::fs::remove_file(bed.log_file("web"));
        let mut spec = bed.shell(&line, service.clone());
        spec.secrets = values(&[
            ("key", 3, b"kkk"),
            ("roots", 4, b"rrr"),
            ("token", 5, b"t t"),
            ("both", 6, b"bbb"),
        ]);
        runtime.start(&spec).await.unwrap();
        if let UserNamespaces::Auto = user_namespaces {
            // Secrets are no reason to go without.
            assert!(matches!(runtime.user_namespace(&spec.id), Some(Ok(_))));
        }
        let found = find(&runtime, &spec.id).await.unwrap();
        let revisions: Vec<u64> = found.secrets.values().copied().collect();
        assert_eq!(revisions, [6, 3, 4, 5]);
        exit_of(&runtime, &spec.id).await;
        let log = bed.log("web");
        let expected = "both\nkey\nopen\nroots\n\
                        both 400 1000:1001\nkey 400 1000:1001\nopen 444 0:20\nroots 400 0:1001\n\
                        kkk\ncat: can't open 'roots': Permission denied\nt t bbb\nbbb\n";
        assert!(log.starts_with(expected), "{user_namespaces:?}: {log}");
        let rest = &log[expected.len()..];
        for refusal in ["key: ", "'key'", "new: Read-only file system", " ro,"] {
            assert!(rest.contains(refusal), "{refusal}: {rest}");
        }
        let mount = rest.lines().last().unwrap();
        for option in ["tmpfs", "nosuid", "nodev", "noexec"] {
            assert!(mount.contains(option), "{mount}");
        }
        for file in ["request.json", "config.json", "secrets.json"] {
            use std::os::unix::fs::PermissionsExt as _;
            let path = bed.container_dir(&spec.id).join(file);
            let mode = std::fs::metadata(path).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{file}");
        }
        runtime.remove(&spec.id).await.unwrap();
    }
    bed.assert_clean();
}

#[tokio::test]
async fn secrets_that_change_are_seen_by_what_runs_and_it_is_told() {
    let bed = Bed::in_memory();
    let service = json!({
        "user": "app",
        "stop_grace_period": "100ms",
        "secrets": [
            {"source": "live", "on_rotate": "SIGHUP"},
            {"source": "fixed"},
        ],
    });
    let line = "show() { cat /run/secrets/live /run/secrets/fixed; stat -c ' %a %u:%g' /run/secrets/live; }; \
                trap show HUP; show; while :; do usleep 10000; done";
    for user_namespaces in [UserNamespaces::Auto, UserNamespaces::Off] {
        let runtime = bed.runtime_in(user_namespaces);
        let _ = std::fs::remove_file(bed.log_file("web"));
        let mut spec = bed.shell(line, service.clone());
        spec.secrets = values(&[("live", 1, b"one"), ("fixed", 2, b"F")]);
        runtime.start(&spec).await.unwrap();
        wait_for("the first value", async || {
            bed.log("web") == "oneF 400 1000:1001\n"
        })
        .await;
        let newer = values(&[("live", 3, b"second"), ("fixed", 4, b"G")]);
        let signals = BTreeSet::from([libc::SIGHUP]);
        let renewed = runtime.renew_secrets(&spec.id, &spec.service, &newer, &signals);
        renewed.await.unwrap();
        wait_for("the second value", async || {
            bed.log("web").ends_with("secondF 400 1000:1001\n")
        })
        .await;
        // What needs a new container was left alone, also for the agent that comes after.
        let runtime = bed.runtime_in(user_namespaces);
        let found = find(&runtime, &spec.id).await.unwrap();
        let revisions: Vec<u64> = found.secrets.values().copied().collect();
        assert_eq!(revisions, [2, 3]);
        runtime.remove(&spec.id).await.unwrap();
        // One that is gone is fine.
        let renewed = runtime.renew_secrets(&spec.id, &spec.service, &newer, &signals);
        renewed.await.unwrap();
    }
    bed.assert_clean();
}

#[tokio::test]
async fn a_container_with_secrets_does_not_start_where_they_would_reach_a_disk_or_half() {
    let bed = Bed::new();
    let on_disk = nix::sys::statfs::statfs(bed.dir.path())
        .unwrap()
        .filesystem_type()
        != nix::sys::statfs::TMPFS_MAGIC;
    let mut spec = bed.shell("true", json!({"secrets": ["key"]}));
    spec.secrets = values(&[("key", 3, b"kkk")]);
    if on_disk {
        let refused = refusal(&bed, &spec).await;
        assert!(refused.contains("is not in memory"), "{refused}");
    }
    let bed = Bed::in_memory();
    spec.secrets.clear();
    let error = bed.runtime().start(&spec).await.unwrap_err().to_string();
    assert!(error.contains("secret key is not there"), "{error}");
    let mut spec = bed.shell(
        "true",
        json!({"secrets": [{"source": "key", "environment": "KEY"}]}),
    );
    spec.secrets = values(&[("key", 3, b"k\0k")]);
    let refused = refusal(&bed, &spec).await;
    assert!(refused.contains("secret key is not UTF-8"), "{refused}");
    // Opening a runtime makes the parent of all cgroups; it goes with the last container.
    bed.runtime().remove(&spec.id).await.unwrap();
    bed.assert_clean();
}
