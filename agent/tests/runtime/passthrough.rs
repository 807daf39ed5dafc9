//! Device nodes, bind mounts and the device's network: what the policy allows and what is there.

use std::os::unix::fs::symlink;
use std::path::PathBuf;

use foreshore_agent::runtime::oci::UserNamespaces;
use foreshore_agent::runtime::{ContainerSpec, Runtime as _, StartError};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use serde_json::json;

use crate::bed::{Bed, exit_of, run};

/// A directory of our own in the device's `/dev`, gone at the end.
pub(crate) struct Nodes(PathBuf);

impl Nodes {
    pub(crate) fn new(name: &str) -> Self {
        let dir = PathBuf::from(format!("/dev/foreshore-{}-{name}", std::process::id()));
        std::fs::create_dir(&dir).unwrap();
        Self(dir)
    }

    pub(crate) fn path(&self, name: &str) -> String {
        self.0.join(name).display().to_string()
    }

    /// Numbers 60 and 77 are kept for experiments (Linux `admin-guide/devices.txt`): where opening is allowed, no driver
    /// answers (ENXIO), and where it is not, that is another error (EPERM).
    pub(crate) fn make(&self, name: &str, kind: SFlag, major: u64, minor: u64) -> String {
        let path = self.path(name);
        mknod(
            path.as_str(),
            kind,
            Mode::from_bits_truncate(0o600),
            makedev(major, minor),
        )
        .unwrap();
        path
    }
}

impl Drop for Nodes {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

async fn denied(bed: &Bed, spec: &ContainerSpec) -> String {
    let error = bed.runtime().start(spec).await.unwrap_err();
    assert!(matches!(error, StartError::Denied(_)), "{error:?}");
    error.to_string()
}

#[tokio::test]
async fn a_container_gets_the_device_nodes_it_asked_for_and_may_do_with_them_what_it_asked_for() {
    let bed = Bed::new();
    let nodes = Nodes::new("given");
    let free = nodes.make("free", SFlag::S_IFCHR, 60, 77);
    let read = nodes.make("read", SFlag::S_IFCHR, 60, 78);
    let block = nodes.make("block", SFlag::S_IFBLK, 60, 79);
    nodes.make("zero", SFlag::S_IFCHR, 1, 5);
    std::fs::create_dir(nodes.0.join("by-id")).unwrap();
    let link = nodes.path("by-id/usb-ACME_7");
    symlink("../zero", &link).unwrap();
    bed.policy(&format!(
        "devices = [\"{0}/*\", \"{0}/by-id/usb-ACME_*\"]\n",
        nodes.0.display()
    ));
    let devices = json!({
        "user": "app",
        "devices": [&free, format!("{read}:/dev/only-read:r"), format!("{block}:/dev/sub/block:rw"), format!("{link}:/dev/zeros")],
    });
    let line = format!(
        "try() {{ echo \"$1: $( {{ $2; }} 2>&1)\"; }}
         r() {{ head -c 1 <\"$1\"; }}; w() {{ : >\"$1\"; }}
         try free-r \"r {free}\"; try free-w \"w {free}\"
         try read-r 'r /dev/only-read'; try read-w 'w /dev/only-read'
         try block-r 'r /dev/sub/block'
         head -c 4 /dev/zeros | wc -c
         stat -c '%a %F' /dev/zeros /dev/sub/block; ls {read} 2>&1"
    );
    for user_namespaces in [UserNamespaces::Auto, UserNamespaces::Off] {
        let runtime = bed.runtime_in(user_namespaces);
        let _ = std::fs::remove_file(bed.log_file("web"));
        let spec = bed.shell(&line, devices.clone());
        runtime.start(&spec).await.unwrap();
        exit_of(&runtime, &spec.id).await;
        let log = bed.log("web");
        runtime.remove(&spec.id).await.unwrap();
        for (what, says) in [
            ("free-r", "No such device or address"),
            ("free-w", "No such device or address"),
            ("read-r", "No such device or address"),
            ("read-w", "Operation not permitted"),
            ("block-r", "No such device or address"),
        ] {
            let told = log.lines().find(|line| line.starts_with(what));
            assert!(
                told.is_some_and(|told| told.contains(says)),
                "{user_namespaces:?} {what}: {log}"
            );
        }
        assert!(log.contains("\n4\n"), "{log}");
        assert!(
            log.contains("666 character special file\n666 block special file"),
            "{log}"
        );
        assert!(log.contains("No such file or directory"), "{log}");
    }
    // Without asking there is no node, and with a node there is no access.
    let (_, log) = run(&bed, &bed.shell(&format!("ls {free} 2>&1"), json!({}))).await;
    assert!(log.contains("No such file or directory"), "{log}");
    bed.assert_clean();
}

#[tokio::test]
async fn a_device_that_is_not_plugged_in_is_told_as_such_and_found_when_it_is() {
    let bed = Bed::new();
    let nodes = Nodes::new("late");
    let link = nodes.path("adapter");
    bed.policy(&format!("devices = [\"{}/*\"]\n", nodes.0.display()));
    let runtime = bed.runtime();
    let spec = || {
        bed.shell(
            &format!("head -c 3 {link} | wc -c"),
            json!({"devices": [&link]}),
        )
    };
    let error = runtime.start(&spec()).await.unwrap_err();
    assert!(
        matches!(&error, StartError::DeviceMissing(why) if why.contains(&link)),
        "{error:?}"
    );
    // A link to nothing is as good as nothing.
    symlink("zero", &link).unwrap();
    let error = runtime.start(&spec()).await.unwrap_err();
    assert!(matches!(error, StartError::DeviceMissing(_)), "{error:?}");
    let node = nodes.make("zero", SFlag::S_IFCHR, 1, 5);
    let (exit, log) = run(&bed, &spec()).await;
    assert_eq!((exit.code, log.as_str()), (0, "3\n"));
    // What is no device is none, and will not become one.
    std::fs::remove_file(&node).unwrap();
    std::fs::write(&node, "").unwrap();
    let error = runtime.start(&spec()).await.unwrap_err();
    assert!(
        matches!(&error, StartError::Refused(why) if why.contains("not a device node")),
        "{error:?}"
    );
    bed.assert_clean();
}

#[tokio::test]
async fn a_link_that_leads_out_of_dev_or_past_the_policy_is_denied() {
    let bed = Bed::new();
    let nodes = Nodes::new("astray");
    let outside = bed.dir.path().join("node");
    mknod(
        &outside,
        SFlag::S_IFCHR,
        Mode::from_bits_truncate(0o600),
        makedev(1, 5),
    )
    .unwrap();
    symlink(&outside, nodes.0.join("link")).unwrap();
    let shared = bed.dir.path().join("shared");
    std::fs::create_dir(&shared).unwrap();
    std::fs::create_dir(bed.dir.path().join("private")).unwrap();
    symlink("../private", shared.join("link")).unwrap();
    symlink("/proc", shared.join("kernel")).unwrap();
    symlink(bed.state_dir(), shared.join("agent")).unwrap();
    bed.policy(&format!(
        "devices = [\"{}/*\"]\nbinds = [{{path = \"{}\", read_only = false}}]\n",
        nodes.0.display(),
        shared.display()
    ));
    let asks = bed.shell("true", json!({"devices": [nodes.path("link")]}));
    let why = denied(&bed, &asks).await;
    assert!(why.contains(&outside.display().to_string()), "{why}");
    for link in ["link", "kernel", "agent"] {
        let source = shared.join(link).display().to_string();
        for mode in ["", ":ro"] {
            let asks = bed.shell(
                "true",
                json!({"volumes": [format!("{source}:/data{mode}")]}),
            );
            let why = denied(&bed, &asks).await;
            assert!(why.contains(&source) && why.contains("which is"), "{why}");
        }
    }
    // The same directory twice, and through a link that stays inside.
    std::fs::write(shared.join("file"), "inside\n").unwrap();
    symlink(".", shared.join("self")).unwrap();
    let dir = shared.display();
    let volumes = json!({"volumes": [format!("{dir}:/a:ro"), format!("{dir}:/b"), format!("{dir}/self:/c:ro")]});
    let line = "cat /a/file /c/file; echo more >> /b/file; touch /a/x 2>&1; touch /c/x 2>&1";
    let (_, log) = run(&bed, &bed.shell(line, volumes)).await;
    assert!(
        log.starts_with("inside\ninside\n") && log.matches("Read-only").count() == 2,
        "{log}"
    );
    assert_eq!(
        std::fs::read_to_string(shared.join("file")).unwrap(),
        "inside\nmore\n"
    );
    bed.assert_clean();
}

#[tokio::test]
async fn a_tightened_or_broken_policy_counts_at_the_next_start_and_not_before() {
    let bed = Bed::new();
    let runtime = bed.runtime();
    let asks = |line: &str| bed.shell(line, json!({"network_mode": "host"}));
    let first = asks("sleep 1000");
    runtime.start(&first).await.unwrap();
    bed.policy("host_network = false\n");
    let why = denied(&bed, &asks("true")).await;
    assert!(
        why.contains("host_network = true") && why.contains("policy.toml"),
        "{why}"
    );
    bed.policy("host_network = maybe\n");
    let why = denied(&bed, &asks("true")).await;
    assert!(why.contains("policy.toml"), "{why}");
    // What needs no policy is not touched by a mistake in it.
    let (exit, _) = run(&bed, &bed.shell("true", json!({}))).await;
    assert_eq!(exit.code, 0);
    assert_eq!(
        runtime
            .exec(&first.id, &["true".to_owned()], crate::bed::LONG)
            .await
            .unwrap(),
        0
    );
    runtime.remove(&first.id).await.unwrap();
    bed.assert_clean();
}
