//! `foreshore-agent image`: the commands as an operator on the spot has them.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use foreshore_images::Platform;
use foreshore_protocol::Digest;
use serde_json::{Value, json};

/// An OCI layout of one image with one file, for this machine.
fn layout(dir: &Path) -> Digest {
    let blobs = dir.join("blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    let put = |bytes: &[u8], media_type: &str| {
        let digest = Digest::of(bytes);
        fs::write(blobs.join(digest.hex()), bytes).unwrap();
        json!({"mediaType": media_type, "digest": digest, "size": bytes.len()})
    };
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_mode(0o644);
    header.set_size(5);
    tar.append_data(&mut header, "hello", &b"world"[..])
        .unwrap();
    let layer = tar.into_inner().unwrap();
    let config = json!({
        "os": "linux", "architecture": Platform::host().architecture, "config": {},
        "rootfs": {"type": "layers", "diff_ids": [Digest::of(&layer)]},
    });
    let config = put(
        config.to_string().as_bytes(),
        "application/vnd.oci.image.config.v1+json",
    );
    let layer = put(&layer, "application/vnd.oci.image.layer.v1.tar");
    let media_type = "application/vnd.oci.image.manifest.v1+json";
    let manifest =
        json!({"schemaVersion": 2, "mediaType": media_type, "config": config, "layers": [layer]});
    let mut image = put(manifest.to_string().as_bytes(), media_type);
    let digest = image["digest"].as_str().unwrap().parse().unwrap();
    image["annotations"] = json!({"org.opencontainers.image.ref.name": "hello:v1"});
    let index = json!({"schemaVersion": 2, "manifests": [image]});
    fs::write(dir.join("index.json"), index.to_string()).unwrap();
    fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    digest
}

fn image(config: &Path, arguments: &[&str], stdin: &[u8]) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_foreshore-agent"))
        .arg("image")
        .args(arguments)
        .arg("--config")
        .arg(config)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A program that has seen enough closes it.
    let _ = child.stdin.take().unwrap().write_all(stdin);
    child.wait_with_output().unwrap()
}

#[test]
fn images_are_loaded_listed_and_let_go_without_hub_and_registry() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("agent.toml");
    fs::write(dir.path().join("token"), "t").unwrap();
    let text = format!(
        "device = \"d\"\n[hub]\nbroker = \"mqtt://127.0.0.1:1\"\njoin_token_file = \"{0}/token\"\n[paths]\n\
         state = \"{0}/state\"\nrun = \"{0}/run\"\n",
        dir.path().display()
    );
    fs::write(&config, text).unwrap();
    let archive = dir.path().join("layout");
    let digest = layout(&archive).to_string();
    let archive = archive.to_str().unwrap();
    let json = |output: &Output| -> Value { serde_json::from_slice(&output.stdout).unwrap() };

    let loaded = image(&config, &["load", archive, "-o", "json"], b"");
    assert!(loaded.status.success(), "{loaded:?}");
    let loaded = &json(&loaded)[0];
    assert_eq!(loaded["digest"], *digest);
    assert_eq!(
        (&loaded["name"], &loaded["pinned"]),
        (&json!("hello:v1"), &json!(true))
    );
    assert_eq!(loaded["signatures"], json!(0));
    let file = dir.path().join("state/images/layers");
    assert_eq!(
        fs::read_dir(file).unwrap().count(),
        3,
        "a layer, its record and the list of its files"
    );

    let listed = image(&config, &["list"], b"");
    let text = String::from_utf8_lossy(&listed.stdout).into_owned();
    assert!(text.contains(&digest) && text.contains("yes"), "{text}");
    let removed = image(&config, &["remove", &digest], b"");
    assert!(removed.status.success(), "{removed:?}");
    let listed = json(&image(&config, &["list", "-o", "json"], b""));
    assert_eq!(listed[0]["pinned"], json!(false));

    for (arguments, stdin, named) in [
        (&["remove", &digest][..], &b""[..], "was not loaded"),
        (&["load", "-"], b"no archive", "failed to load -"),
        (&["load", "/nonexistent.tar"], b"", "/nonexistent.tar"),
    ] {
        let output = image(&config, arguments, stdin);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {output:?}");
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(text.contains(named), "{arguments:?}: {text}");
        assert_eq!(text.trim().lines().count(), 1, "one clear error: {text}");
    }
}

#[test]
fn rot_is_found_named_and_repaired_beside_others_at_work() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("agent.toml");
    fs::write(dir.path().join("token"), "t").unwrap();
    let text = format!(
        "device = \"d\"\n[hub]\nbroker = \"mqtt://127.0.0.1:1\"\njoin_token_file = \"{0}/token\"\n[paths]\n\
         state = \"{0}/state\"\nrun = \"{0}/run\"\n",
        dir.path().display()
    );
    fs::write(&config, text).unwrap();
    let archive = dir.path().join("layout");
    let digest = layout(&archive).to_string();
    let load = || {
        let loaded = image(&config, &["load", archive.to_str().unwrap()], b"");
        assert!(loaded.status.success(), "{loaded:?}");
    };
    load();
    let fsck = |arguments: &[&str]| {
        let arguments: Vec<&str> = ["fsck", "--deep"]
            .iter()
            .chain(arguments)
            .copied()
            .collect();
        image(&config, &arguments, b"")
    };
    let json = |output: &Output| -> Value { serde_json::from_slice(&output.stdout).unwrap() };
    let sound = fsck(&["-o", "json"]);
    assert_eq!(sound.status.code(), Some(0), "{sound:?}");
    let sound = json(&sound);
    assert_eq!(sound["verdict"], "sound");
    assert_eq!(
        (&sound["deep"], &sound["layers"][0]["bytes"]),
        (&json!(true), &json!(5))
    );

    let store = dir.path().join("state/images");
    let layer = sound["layers"][0]["layer"].as_str().unwrap();
    let file = store
        .join("layers")
        .join(layer.strip_prefix("sha256:").unwrap())
        .join("hello");
    fs::write(&file, "worle").unwrap();
    // Without reading what files hold nothing is seen, and that is said.
    let shallow = image(&config, &["fsck"], b"");
    assert_eq!(shallow.status.code(), Some(0), "{shallow:?}");
    assert!(String::from_utf8_lossy(&shallow.stdout).contains("--deep"));
    // Who only looks is held up by nobody.
    let lock = fs::File::options()
        .write(true)
        .open(store.join("lock"))
        .unwrap();
    lock.lock().unwrap();
    let looked = fsck(&["--check", "-o", "json"]);
    drop(lock);
    assert_eq!(looked.status.code(), Some(1), "{looked:?}");
    let looked = json(&looked);
    assert_eq!(
        (&looked["verdict"], &looked["repairs"]),
        (&json!("damaged"), &json!([]))
    );
    let found = &looked["layers"][0];
    assert_eq!(
        (&found["state"], &found["images"]),
        (&json!("damaged"), &json!([digest]))
    );
    let flaw = &found["flaws"][0];
    assert_eq!(
        (&flaw["path"], &flaw["wrong"]),
        (&json!("hello"), &json!("content"))
    );
    assert_eq!(
        fs::read_to_string(&file).unwrap(),
        "worle",
        "it only looked"
    );

    // It came from an archive, so that is where it comes from again.
    let left = fsck(&[]);
    assert_eq!(left.status.code(), Some(1), "{left:?}");
    let text = String::from_utf8_lossy(&left.stdout).into_owned();
    for said in [
        "library/hello@",
        "  hello: content: ",
        "image load",
        "1 layers damaged",
    ] {
        assert!(text.contains(said), "{said}: {text}");
    }
    load();
    assert_eq!(fs::read_to_string(&file).unwrap(), "world");
    let well = fsck(&[]);
    assert_eq!(well.status.code(), Some(0), "{well:?}");
    for name in ["damaged", "quarantine", "tmp"] {
        let left = fs::read_dir(store.join(name)).unwrap().count();
        assert_eq!(left, 0, "{name}: nobody ran from it");
    }
}

/// Killed while it reads: nothing is left once the store is opened again, and nobody was held up meanwhile.
#[test]
fn a_load_that_is_killed_while_it_reads_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("agent.toml");
    fs::write(dir.path().join("token"), "t").unwrap();
    let text = format!(
        "device = \"d\"\n[hub]\nbroker = \"mqtt://127.0.0.1:1\"\njoin_token_file = \"{0}/token\"\n[paths]\n\
         state = \"{0}/state\"\nrun = \"{0}/run\"\n",
        dir.path().display()
    );
    fs::write(&config, text).unwrap();
    let archive = dir.path().join("layout");
    layout(&archive);
    let mut child = Command::new(env!("CARGO_BIN_EXE_foreshore-agent"))
        .args(["image", "load", "-", "--config"])
        .arg(&config)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    // The header of a file of 10,000 bytes, and some of them.
    let mut header = tar::Header::new_gnu();
    header.set_path("blobs/sha256/x").unwrap();
    header.set_size(10_000);
    header.set_cksum();
    let mut input = child.stdin.take().unwrap();
    input.write_all(header.as_bytes()).unwrap();
    input.write_all(&[1; 5000]).unwrap();
    let loading = dir.path().join("state/images/loading");
    let left = || fs::read_dir(&loading).map_or(0, Iterator::count);
    let until = Instant::now() + Duration::from_secs(20);
    while left() == 0 {
        assert!(Instant::now() < until, "it never began");
        std::thread::sleep(Duration::from_millis(5));
    }
    // Another goes by it.
    let other = image(&config, &["load", archive.to_str().unwrap()], b"");
    assert!(other.status.success(), "{other:?}");
    assert_eq!(left(), 1, "the one that still reads");
    assert!(child.try_wait().unwrap().is_none());
    child.kill().unwrap();
    child.wait().unwrap();
    let listed = image(&config, &["list"], b"");
    assert!(listed.status.success(), "{listed:?}");
    assert_eq!(left(), 0);
}
