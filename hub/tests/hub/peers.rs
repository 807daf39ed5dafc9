//! The clients that people have: what they push to the hub, they and devices pull from it.

use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use serde_json::Value;

use crate::bed::{Bed, Kind, wait_until};
use crate::images::{blobs, layout, oci_archive, run};

/// An image of `bytes` bytes that do not compress, beside a small one of another architecture, in one index.
fn multi_arch(dir: &Path, bytes: usize) -> String {
    let layout = dir.join("multi").display().to_string();
    run("umoci", &["init", "--layout", &layout]);
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let noise: Vec<u8> = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    })
    .flatten()
    .take(bytes)
    .collect();
    for (architecture, content) in [("amd64", &noise[..]), ("arm64", b"small")] {
        let (image, file) = (format!("{layout}:{architecture}"), dir.join(architecture));
        std::fs::write(&file, content).unwrap();
        run("umoci", &["new", "--image", &image]);
        run(
            "umoci",
            &["config", "--image", &image, "--architecture", architecture],
        );
        let file = file.display().to_string();
        run(
            "umoci",
            &["insert", "--rootless", "--image", &image, &file, "/content"],
        );
    }
    let path = Path::new(&layout).join("index.json");
    let mut index: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    for (entry, architecture) in index["manifests"]
        .as_array_mut()
        .unwrap()
        .iter_mut()
        .zip(["amd64", "arm64"])
    {
        entry["platform"] = serde_json::json!({"os": "linux", "architecture": architecture});
        entry.as_object_mut().unwrap().remove("annotations");
    }
    let (text, blobs) = (index.to_string(), Path::new(&layout).join("blobs/sha256"));
    let digest = foreshore_protocol::Digest::of(text.as_bytes());
    std::fs::write(blobs.join(digest.hex()), &text).unwrap();
    let top = serde_json::json!({"schemaVersion": 2, "manifests": [{
        "mediaType": "application/vnd.oci.image.index.v1+json", "digest": digest, "size": text.len(),
        "annotations": {"org.opencontainers.image.ref.name": "all"},
    }]});
    std::fs::write(path, top.to_string()).unwrap();
    layout
}

/// `skopeo` with the operator's login, on plain HTTP.
fn skopeo(bed: &Bed, arguments: &[&str]) -> Command {
    let mut command = Command::new("skopeo");
    command
        .args(["--insecure-policy", "--command-timeout", "50s"])
        .args(arguments)
        .args(["--dest-tls-verify=false", "--dest-creds"])
        .arg(format!("anybody:{}", bed.token()));
    command
}

/// What a command that must succeed says.
fn succeeds(command: &mut Command) -> String {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}; run cargo xtask test"));
    assert!(
        output.status.success(),
        "{command:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn skopeo_pushes_an_index_whole_and_a_second_repository_takes_its_blobs_over() {
    let bed = Bed::start(Kind::Embedded);
    let source = format!("oci:{}:all", multi_arch(&bed.path(""), 3 << 20));
    let target = |name: &str| format!("docker://{}/{name}", bed.api);
    succeeds(&mut skopeo(
        &bed,
        &[
            "copy",
            "--all",
            "--quiet",
            &source,
            &target("acme/multi:v1"),
        ],
    ));
    let listed = bed.get("/images");
    let image = &listed["items"][0];
    assert_eq!(
        image["platforms"],
        serde_json::json!(["linux/amd64", "linux/arm64"]),
        "{listed}"
    );
    assert!(image["sizeBytes"].as_u64().unwrap() > 3 << 20, "{listed}");

    let before = blobs(&bed);
    succeeds(&mut skopeo(
        &bed,
        &[
            "copy",
            "--all",
            "--quiet",
            &source,
            &target("other/multi:v2"),
        ],
    ));
    assert_eq!(blobs(&bed), before, "shared by both");

    // Out again by a device's login, byte for byte.
    let out = bed.path("out").display().to_string();
    let credentials = format!("device-0:{}", bed.join_token());
    let mut pull = Command::new("skopeo");
    pull.args([
        "--insecure-policy",
        "copy",
        "--all",
        "--quiet",
        "--src-tls-verify=false",
    ])
    .args(["--src-creds", &credentials, &target("other/multi:v2")])
    .arg(format!("oci:{out}:v2"));
    succeeds(&mut pull);
    let index: Value =
        serde_json::from_slice(&std::fs::read(Path::new(&out).join("index.json")).unwrap())
            .unwrap();
    assert_eq!(index["manifests"][0]["digest"], image["digest"]);

    // As Docker's own manifests, too; then it is removed.
    let docker = ["copy", "--quiet", "--format", "v2s2"];
    let small = format!("oci:{}:v1", layout(&bed.path(""), "v1"));
    let mut arguments = docker.to_vec();
    let demo = target("demo:v1");
    arguments.extend([&*small, &*demo]);
    succeeds(&mut skopeo(&bed, &arguments));
    let pushed = bed.answer("GET", "/v2/demo/manifests/v1", &[], b"");
    assert_eq!(
        pushed.header("content-type"),
        "application/vnd.docker.distribution.manifest.v2+json"
    );
    let creds = format!("anybody:{}", bed.token());
    run(
        "skopeo",
        &["delete", "--tls-verify=false", "--creds", &creds, &demo],
    );
    assert_eq!(
        bed.answer("GET", "/v2/demo/manifests/v1", &[], b"").code(),
        "MANIFEST_UNKNOWN"
    );
    let mut wrong = Command::new("skopeo");
    wrong.args([
        "copy",
        "--dest-tls-verify=false",
        "--dest-creds",
        "anybody:wrong",
        &small,
        &demo,
    ]);
    let refused = wrong.output().unwrap();
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(
        !refused.status.success() && said.contains("unauthorized"),
        "{said}"
    );
}

#[test]
fn a_push_whose_hub_is_killed_under_it_is_repeated() {
    let mut bed = Bed::start(Kind::Embedded);
    let source = format!("oci:{}:all", multi_arch(&bed.path(""), 24 << 20));
    let target = format!("docker://{}/multi:v1", bed.api);
    let arguments = [
        "copy",
        "--all",
        "--quiet",
        "--retry-times",
        "0",
        &source,
        &target,
    ];
    let mut client = skopeo(&bed, &arguments)
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    wait_until("bytes to come in", || {
        let entries = std::fs::read_dir(bed.data().join("pushes"))
            .unwrap()
            .flatten();
        entries
            .flat_map(|entry| entry.metadata())
            .any(|file| file.len() > 1 << 20)
    });
    bed.kill_hub();
    let status = client.wait().unwrap();
    assert!(!status.success(), "the hub was gone: {status}");
    bed.start_hub();
    succeeds(&mut skopeo(&bed, &arguments));
    assert_eq!(
        bed.get("/images")["items"][0]["reference"],
        "hub.internal/multi:v1"
    );
}

/// Storage of its own for a program of the containers family, with the configuration this needs in a container.
fn storage(bed: &Bed) -> Vec<String> {
    ["--root", "--runroot"]
        .into_iter()
        .flat_map(|key| {
            let path = bed.path(key.trim_start_matches('-')).display().to_string();
            [key.to_owned(), path]
        })
        .chain(["--storage-driver".to_owned(), "vfs".to_owned()])
        .collect()
}

#[test]
fn podman_and_buildah_push_and_pull() {
    let bed = Bed::start(Kind::Embedded);
    let credentials = format!("anybody:{}", bed.token());
    // On a machine without a user session for it, podman wants to be told.
    let configuration = bed.path("containers.conf");
    let text =
        "[engine]\ncgroup_manager = \"cgroupfs\"\nevents_logger = \"none\"\nruntime = \"runc\"\n";
    std::fs::write(&configuration, text).unwrap();
    let call = |program: &str, arguments: &[&str]| {
        let mut command = Command::new(program);
        command
            .env("CONTAINERS_CONF", &configuration)
            .args(storage(&bed))
            .args(arguments);
        succeeds(&mut command)
    };
    oci_archive(&bed.path(""), "v1");
    let source = format!("oci-archive:{}", bed.path("v1.tar").display());
    let login = ["--tls-verify=false", "--creds", &credentials];
    for program in ["buildah", "podman"] {
        let image = format!("{}/by/{program}:v1", bed.api);
        call(program, &["pull", "--quiet", &source]);
        let listed = call(program, &["images", "--quiet", "--no-trunc"]);
        let id = listed.lines().next().expect("what was pulled is there");
        let target = format!("docker://{image}");
        call(program, &[&["push"], &login[..], &[id, &target]].concat());
        call(program, &["rmi", "--all", "--force"]);
        call(
            program,
            &[&["pull", "--quiet"], &login[..], &[&image]].concat(),
        );
        call(program, &["rmi", "--all", "--force"]);
    }
    let listed = bed.get("/images");
    let names: Vec<&Value> = listed["items"]
        .as_array()
        .unwrap()
        .iter()
        .map(|image| &image["reference"])
        .collect();
    assert_eq!(
        names,
        ["hub.internal/by/buildah:v1", "hub.internal/by/podman:v1"],
        "{listed}"
    );
}

/// Docker's daemon with everything it has in one directory. Ends with SIGTERM, so that it takes its own children down.
struct Docker {
    daemon: Child,
    dir: PathBuf,
}

impl Docker {
    fn start(dir: PathBuf) -> Self {
        std::fs::create_dir_all(&dir).unwrap();
        let log = std::fs::File::create(dir.join("log")).unwrap();
        let mut command = Command::new("dockerd");
        for (key, name) in [
            ("--data-root", "data"),
            ("--exec-root", "exec"),
            ("--pidfile", "pid"),
        ] {
            command.arg(key).arg(dir.join(name));
        }
        let daemon = command
            .arg(format!("--host=unix://{}/socket", dir.display()))
            .args([
                "--iptables=false",
                "--ip6tables=false",
                "--bridge=none",
                "--storage-driver=vfs",
            ])
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap_or_else(|error| {
                panic!("dockerd: {error}; install docker.io, or run cargo xtask test")
            });
        let mut docker = Self { daemon, dir };
        wait_until("dockerd to answer", || {
            assert!(
                docker.daemon.try_wait().unwrap().is_none(),
                "{}",
                docker.log()
            );
            docker
                .command(&["version"])
                .output()
                .unwrap()
                .status
                .success()
        });
        docker
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.dir.join("log")).unwrap()
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("docker");
        command
            .arg(format!("--host=unix://{}/socket", self.dir.display()))
            .env("DOCKER_CONFIG", &self.dir)
            .args(arguments);
        command
    }
}

impl Drop for Docker {
    fn drop(&mut self) {
        _ = Command::new("kill")
            .arg(self.daemon.id().to_string())
            .status();
        _ = self.daemon.wait();
    }
}

#[test]
fn docker_logs_in_pushes_and_pulls() {
    let bed = Bed::start(Kind::Embedded);
    let docker = Docker::start(bed.path("docker"));
    let call = |arguments: &[&str]| succeeds(&mut docker.command(arguments));
    let archive = bed.path("docker.tar").display().to_string();
    let source = format!("oci:{}:v1", layout(&bed.path(""), "v1"));
    let image = format!("{}/team/demo:v1", bed.api);
    let target = format!("docker-archive:{archive}:{image}");
    run("skopeo", &["copy", "--quiet", &source, &target]);
    call(&["load", "--quiet", "--input", &archive]);

    let refused = docker.command(&["push", &image]).output().unwrap();
    assert!(!refused.status.success(), "not logged in");
    let wrong = ["login", "--username", "me", "--password", "wrong", &bed.api];
    assert!(!docker.command(&wrong).output().unwrap().status.success());
    call(&[
        "login",
        "--username",
        "me",
        "--password",
        &bed.token(),
        &bed.api,
    ]);
    call(&["push", &image]);
    let other = format!("{}/other/demo:v2", bed.api);
    call(&["tag", &image, &other]);
    let said = call(&["push", &other]);
    assert!(
        said.contains("Mounted from") || said.contains("already exists"),
        "{said}"
    );
    call(&["rmi", &image, &other]);
    call(&["pull", "--quiet", &other]);
    let listed = bed.get("/images");
    let names: Vec<&Value> = listed["items"]
        .as_array()
        .unwrap()
        .iter()
        .map(|image| &image["reference"])
        .collect();
    assert_eq!(
        names,
        ["hub.internal/other/demo:v2", "hub.internal/team/demo:v1"],
        "{listed}"
    );
}
