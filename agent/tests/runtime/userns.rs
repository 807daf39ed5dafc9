//! User namespaces: whose ids an app has, what is on disk, and what happens where there can be none.

use std::os::unix::fs::MetadataExt as _;

use foreshore_agent::runtime::Runtime as _;
use foreshore_agent::runtime::oci::UserNamespaces;
use serde_json::{Value, json};

use crate::bed::{Bed, LONG, exit_of, pid_of, refusal, run};

/// Root of the app on the device; `None` without a user namespace.
fn base_of(bed: &Bed, id: &foreshore_agent::runtime::ContainerId) -> Option<u64> {
    request_of(bed, id)["base"].as_u64()
}

fn request_of(bed: &Bed, id: &foreshore_agent::runtime::ContainerId) -> Value {
    let request = std::fs::read(bed.container_dir(id).join("request.json")).unwrap();
    serde_json::from_slice(&request).unwrap()
}

#[tokio::test]
async fn every_app_has_ids_of_its_own_and_keeps_them() {
    let bed = Bed::new();
    let runtime = bed.runtime();
    let mut bases = Vec::new();
    for app in ["shop", "other", "shop"] {
        let mut spec = bed.spec("web", &json!(["sleep", "1000"]), json!({"user": "app"}));
        spec.id.app = app.parse().unwrap();
        // A restarted agent among them.
        let runtime = bed.runtime();
        runtime.start(&spec).await.unwrap();
        let pid = pid_of(&runtime, &spec.id).await;
        let base = base_of(&bed, &spec.id).unwrap();
        let map = std::fs::read_to_string(format!("/proc/{pid}/uid_map")).unwrap();
        let fields: Vec<u64> = map
            .split_whitespace()
            .map(|field| field.parse().unwrap())
            .collect();
        assert_eq!(fields, [0, base, 65_536], "{app}");
        let owner = std::fs::metadata(format!("/proc/{pid}")).unwrap();
        assert_eq!(u64::from(owner.uid()), base + 1000);
        bases.push(base);
    }
    assert_ne!(bases[0], bases[1]);
    assert_eq!(bases[0], bases[2]);
    for container in runtime.list().await.unwrap() {
        runtime.remove(&container.id).await.unwrap();
    }
    bed.assert_clean();
}

#[tokio::test]
async fn volumes_are_the_same_with_and_without() {
    let bed = Bed::new();
    let more = json!({"user": "app", "volumes": ["data:/srv/data"]});
    let line = "stat -c '%u:%g' /srv/data /srv/data/* 2>/dev/null; date > /srv/data/$(ls /srv/data | wc -l)";
    let expected = ["1000:1001\n", "1000:1001\n1000:1001\n"].map(str::to_owned);
    let mut logs = Vec::new();
    for mode in [
        UserNamespaces::Off,
        UserNamespaces::Auto,
        UserNamespaces::Off,
    ] {
        let runtime = bed.runtime_in(mode);
        let spec = bed.shell(line, more.clone());
        let _ = std::fs::remove_file(bed.log_file("web"));
        runtime.start(&spec).await.unwrap();
        assert_eq!(exit_of(&runtime, &spec.id).await.code, 0);
        assert_eq!(
            base_of(&bed, &spec.id).is_some(),
            mode == UserNamespaces::Auto
        );
        runtime.remove(&spec.id).await.unwrap();
        logs.push(bed.log("web"));
    }
    assert_eq!(logs[..2], expected);
    assert_eq!(logs[2], "1000:1001\n1000:1001\n1000:1001\n");
    let volume = bed.state_dir().join("volumes/shop/data");
    for entry in std::fs::read_dir(volume).unwrap() {
        let metadata = entry.unwrap().metadata().unwrap();
        assert_eq!((metadata.uid(), metadata.gid()), (1000, 1001));
    }
}

#[tokio::test]
async fn root_inside_owns_the_image_and_what_it_makes() {
    let bed = Bed::new();
    let line = "stat -c '%n %u:%g' / /bin/busybox /etc /etc/hosts /made /srv/data /dev/null; \
                touch /etc/new && chown 1000:1001 /etc/new && stat -c '%u' /etc/new; \
                echo more >> /etc/hosts && echo written; echo out > /dev/stdout; id -u";
    let more = json!({"read_only": false, "working_dir": "/made"});
    let (exit, log) = run(&bed, &bed.shell(line, more)).await;
    let expected = "/ 0:0\n/bin/busybox 0:0\n/etc 0:0\n/etc/hosts 0:0\n/made 0:0\n/srv/data 1000:1001\n\
                    /dev/null 65534:65534\n1000\nwritten\nout\n0\n";
    assert_eq!((exit.code, log.as_str()), (0, expected));
    // Nothing of the image was changed.
    assert_eq!(bed.layer.join("srv/data").metadata().unwrap().uid(), 1000);
    assert_eq!(bed.layer.join("bin/busybox").metadata().unwrap().uid(), 0);
}

#[tokio::test]
async fn any_user_may_open_its_own_output_again() {
    let bed = Bed::new();
    let line = "echo one > /dev/stdout; echo two > /dev/stderr; echo three > /proc/self/fd/1";
    let (exit, log) = run(&bed, &bed.shell(line, json!({"user": "app"}))).await;
    let mut lines: Vec<&str> = log.lines().collect();
    lines.sort_unstable();
    assert_eq!((exit.code, lines), (0, vec!["one", "three", "two"]));
}

#[tokio::test]
async fn what_cannot_be_mapped_runs_without_and_says_why() {
    let bed = Bed::new();
    let runtime = bed.runtime();
    // sysfs cannot be mounted with other ids, and this one is to be written. A bind mount of /sys itself is never allowed.
    let sysfs = Sysfs::mount(bed.dir.path().join("sysfs"));
    let class = sysfs.0.join("class").display().to_string();
    let more = json!({"volumes": [format!("{class}:/class")]});
    let spec = bed.spec("web", &json!(["sleep", "1000"]), more.clone());
    runtime.start(&spec).await.unwrap();
    let request = request_of(&bed, &spec.id);
    assert_eq!(request["base"], Value::Null);
    let reason = request["unmapped"].as_str().unwrap();
    assert!(reason.contains(&class), "{reason}");
    let pid = pid_of(&runtime, &spec.id).await;
    let same = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/user")).unwrap();
    assert_eq!(same(&pid.to_string()), same("self"));
    let told = runtime.user_namespace(&spec.id);
    assert_eq!(told, Some(Err(reason.to_owned())));
    runtime.remove(&spec.id).await.unwrap();

    // To be read it need not be mapped.
    let more = json!({"volumes": [format!("{class}:/class:ro")]});
    let spec = bed.spec("web", &json!(["sleep", "1000"]), more);
    runtime.start(&spec).await.unwrap();
    assert!(base_of(&bed, &spec.id).is_some());
    assert!(matches!(runtime.user_namespace(&spec.id), Some(Ok(_))));
    runtime.remove(&spec.id).await.unwrap();
    drop(sysfs);
    bed.assert_clean();
}

/// A mount of the kernel's sysfs that only this thread and the processes it starts see, for as long as this is there.
struct Sysfs(std::path::PathBuf);

impl Sysfs {
    fn mount(path: std::path::PathBuf) -> Self {
        use nix::mount::{MsFlags, mount};
        std::fs::create_dir(&path).unwrap();
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(None::<&str>, "/", None::<&str>, private, None::<&str>).unwrap();
        let read_only = MsFlags::MS_RDONLY;
        mount(Some("sysfs"), &path, Some("sysfs"), read_only, None::<&str>).unwrap();
        Self(path)
    }
}

impl Drop for Sysfs {
    fn drop(&mut self) {
        let _ = nix::mount::umount(&self.0);
    }
}

#[tokio::test]
async fn with_the_devices_network_too() {
    let bed = Bed::new();
    let runtime = bed.runtime();
    let spec = bed.spec(
        "web",
        &json!(["sleep", "1000"]),
        json!({"network_mode": "host", "tmpfs": ["/out"]}),
    );
    runtime.start(&spec).await.unwrap();
    assert!(base_of(&bed, &spec.id).is_some());
    for (line, expected) in [
        ("test -d /sys/class/net/lo && grep -q lo: /proc/net/dev", 0),
        ("grep -q . /etc/hosts", 0),
        ("touch /sys/class/net/lo/mtu 2>/dev/null", 1),
        // The device's low ports belong to the device's root.
        ("timeout 1 nc -l -p 81 127.0.0.1 2>/dev/null", 1),
        ("ip link set lo mtu 1400 2>/dev/null", 2),
    ] {
        let command = ["sh", "-c", line].map(str::to_owned);
        let code = runtime.exec(&spec.id, &command, LONG).await.unwrap();
        assert!(
            code == expected || expected != 0 && code != 0,
            "{line}: {code}"
        );
    }
    runtime.remove(&spec.id).await.unwrap();
}

#[tokio::test]
async fn ids_beyond_the_range_are_refused() {
    let bed = Bed::new();
    for user in ["65536", "1000:70000", "4000000000"] {
        let refused = refusal(&bed, &bed.shell("true", json!({"user": user}))).await;
        assert!(refused.contains("beyond the 65536 ids"), "{refused}");
    }
    bed.assert_clean();
}
