//! Layers, read-only roots, tmpfs, volumes and bind mounts.

use std::os::unix::fs::MetadataExt as _;
use std::os::unix::fs::PermissionsExt as _;

use serde_json::json;

use crate::bed::{Bed, run};

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
async fn volumes_are_removed_only_when_an_operator_says_so_and_nobody_uses_them() {
    use foreshore_agent::runtime::Runtime as _;
    use foreshore_agent::volumes::{self, VolumeError};
    let bed = Bed::new();
    let runtime = bed.runtime();
    let (state, run) = (bed.state_dir(), bed.run_dir());
    let spec = bed.shell(
        "echo kept > /data/file; sleep 1000",
        json!({"volumes": ["data:/data", "other:/other"]}),
    );
    runtime.start(&spec).await.unwrap();
    let data = "shop/data".parse().unwrap();
    let in_use = volumes::remove(&state, &run, &data).unwrap_err();
    assert!(
        matches!(&in_use, VolumeError::InUse { container, .. } if *container == spec.id.to_string()),
        "{in_use:?}"
    );
    assert!(state.join("volumes/shop/data").is_dir());
    runtime.remove(&spec.id).await.unwrap();
    let listed = |names: &[&str]| {
        let there = volumes::list(&state, &run).unwrap();
        let there: Vec<_> = there
            .iter()
            .map(|volume| format!("{}/{}", volume.app, volume.volume))
            .collect();
        assert_eq!(there, names);
    };
    listed(&["shop/data", "shop/other"]);
    // What a removal that was cut has left is no volume.
    std::fs::create_dir(state.join("volumes/shop/.gone-data")).unwrap();
    std::fs::write(state.join("volumes/shop/.gone-data/file"), "").unwrap();
    volumes::remove(&state, &run, &data).unwrap();
    listed(&["shop/other"]);
    assert!(!state.join("volumes/shop/.gone-data").exists());
    let again = volumes::remove(&state, &run, &data).unwrap_err();
    assert!(matches!(again, VolumeError::Unknown(_)), "{again:?}");
    // The command says the same.
    let config = bed.dir.path().join("agent.toml");
    let text = format!(
        "device = \"a\"\n[hub]\nbroker = \"mqtt://hub\"\njoin_token_file = \"/token\"\n[paths]\nstate = {state:?}\nrun = {run:?}\n"
    );
    std::fs::write(&config, text).unwrap();
    let command = |arguments: &[&str]| {
        let program = env!("CARGO_BIN_EXE_foreshore-agent");
        let mut command = std::process::Command::new(program);
        command.args(arguments).arg("--config").arg(&config);
        command.output().unwrap()
    };
    let output = command(&["volume", "list", "-o", "json"]);
    let list: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(list[0]["volume"], "other");
    assert_eq!(list[0]["usedBy"], json!([]));
    for wrong in ["shop/none", "shop/../x", "shop"] {
        let output = command(&["volume", "remove", wrong]);
        assert!(
            !output.status.success() && !output.stderr.is_empty(),
            "{wrong}"
        );
    }
    assert!(
        command(&["volume", "remove", "shop/other"])
            .status
            .success()
    );
    listed(&[]);
    assert!(!state.join("volumes/shop").exists());
}

#[tokio::test]
async fn configs_are_files_that_nobody_in_the_container_can_change() {
    use foreshore_agent::runtime::Runtime as _;
    use foreshore_agent::runtime::oci::UserNamespaces;
    let bed = Bed::new();
    let service = json!({
        "user": "app",
        "volumes": ["data:/etc/app"],
        "configs": [
            {"source": "plain", "target": "/plain", "content": "a = 1\n"},
            {"source": "own", "target": "/etc/app/own.toml", "mode": "0400", "uid": "1000", "gid": "1001", "content": "b = 2\n"},
            {"source": "closed", "target": "/closed", "mode": "0400", "content": "c = 3\n"},
            {"source": "run", "target": "/run.sh", "mode": "0555", "content": "#!/bin/sh\necho ran\n"},
        ],
    });
    let line = "cat /plain /etc/app/own.toml; /run.sh; stat -c '%a %u:%g' /plain /etc/app/own.toml /closed; \
                cat /closed 2>&1; echo x 2>&1 >/plain; rm -f /etc/app/own.toml 2>&1";
    for user_namespaces in [UserNamespaces::Auto, UserNamespaces::Off] {
        let runtime = bed.runtime_in(user_namespaces);
        let _ = std::fs::remove_file(bed.log_file("web"));
        let spec = bed.shell(line, service.clone());
        runtime.start(&spec).await.unwrap();
        if let UserNamespaces::Auto = user_namespaces {
            // Configs are no reason to go without.
            assert!(matches!(runtime.user_namespace(&spec.id), Some(Ok(_))));
        }
        crate::bed::exit_of(&runtime, &spec.id).await;
        let log = bed.log("web");
        runtime.remove(&spec.id).await.unwrap();
        assert!(
            log.starts_with("a = 1\nb = 2\nran\n444 0:0\n400 1000:1001\n400 0:0\n"),
            "{user_namespaces:?}: {log}"
        );
        for refusal in ["/closed': Permission denied", "/plain: ", "own.toml"] {
            assert!(log.contains(refusal), "{refusal}: {log}");
        }
    }
    bed.assert_clean();
}
