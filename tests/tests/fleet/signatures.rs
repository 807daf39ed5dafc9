//! Images that must be signed. They are signed here with openssl, in the form that cosign's specification gives.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use e2e::fleet::{Fleet, LONG, app_status, container, http_get, web_manifest};
use e2e::hub::HubOptions;
use e2e::image::{Builder, run};
use e2e::registry::Registry;
use e2e::{Bed, Device, Hub, wait_for};
use foreshore_protocol::Digest;
use serde_json::{Value, json};

const REPOSITORY: &str = "acme/shop";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// A key pair of the kind that cosign makes.
struct Key {
    private: PathBuf,
    public: PathBuf,
}

impl Key {
    fn new(bed: &Bed, name: &str) -> Self {
        let file = |end: &str| bed.path(&format!("{name}.{end}"));
        let (private, public) = (file("key"), file("pub"));
        let mut generate = Command::new("openssl");
        generate.args(["ecparam", "-name", "prime256v1", "-genkey", "-noout"]);
        run(generate.arg("-out").arg(&private), "openssl");
        let mut publish = Command::new("openssl");
        publish.args(["pkey", "-pubout", "-in"]).arg(&private);
        run(publish.arg("-out").arg(&public), "openssl");
        Self { private, public }
    }

    fn pem(&self) -> String {
        std::fs::read_to_string(&self.public).expect("it was just written")
    }

    fn sign(&self, payload: &Path) -> String {
        let mut sign = Command::new("openssl");
        sign.args(["dgst", "-sha256", "-sign"]).arg(&self.private);
        let output = sign.arg(payload).output().expect("openssl runs");
        assert!(output.status.success(), "{output:?}");
        STANDARD.encode(output.stdout)
    }
}

fn put(url: &str, kind: &str, bytes: &[u8]) {
    let answer = ureq::put(url).content_type(kind).send(bytes);
    let answer = answer.unwrap_or_else(|error| panic!("{url}: {error}"));
    assert_eq!(answer.status(), 201, "{url}");
}

fn put_blob(host: &str, bytes: &[u8]) {
    let begun = ureq::post(format!("http://{host}/v2/{REPOSITORY}/blobs/uploads/"))
        .send_empty()
        .expect("the registry takes uploads");
    let place = begun.headers()["location"].to_str().expect("it is text");
    let joint = if place.contains('?') { '&' } else { '?' };
    let url = format!("{place}{joint}digest={}", Digest::of(bytes));
    put(&url, "application/octet-stream", bytes);
}

/// Signs an image as `cosign sign --key` does; the payload names `vouched`. The digest of what holds the signature.
fn sign(bed: &Bed, key: &Key, host: &str, image: &str, vouched: &str) -> Digest {
    let payload = json!({
        "critical": {
            "identity": {"docker-reference": format!("{host}/{REPOSITORY}")},
            "image": {"docker-manifest-digest": vouched},
            "type": "cosign container image signature",
        },
        "optional": null,
    });
    let payload = payload.to_string().into_bytes();
    let file = bed.path("payload");
    std::fs::write(&file, &payload).expect("the bed is writable");
    let rootfs = json!({"type": "layers", "diff_ids": [Digest::of(&payload)]});
    let config = json!({"architecture": "", "os": "", "config": {}, "rootfs": rootfs});
    let config = config.to_string().into_bytes();
    put_blob(host, &payload);
    put_blob(host, &config);
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "size": config.len(),
            "digest": Digest::of(&config),
        },
        "layers": [{
            "mediaType": "application/vnd.dev.cosign.simplesigning.v1+json",
            "size": payload.len(),
            "digest": Digest::of(&payload),
            "annotations": {"dev.cosignproject.cosign/signature": key.sign(&file)},
        }],
    });
    let tag = format!("{}.sig", image.replace(':', "-"));
    let url = format!("http://{host}/v2/{REPOSITORY}/manifests/{tag}");
    let manifest = manifest.to_string().into_bytes();
    put(&url, MANIFEST, &manifest);
    Digest::of(&manifest)
}

fn set_policy(device: &Device, text: &str) {
    let new = device.config().with_file_name("policy.new");
    std::fs::write(&new, text).expect("the bed is writable");
    std::fs::set_permissions(&new, std::fs::Permissions::from_mode(0o644)).expect("it is ours");
    let path = device.config().with_file_name("policy.toml");
    std::fs::rename(new, path).expect("the bed is writable");
}

/// Waits until the device says that a signature is lacking, in words that have `has`.
fn await_unsigned(fleet: &Fleet, app: &str, has: &str) -> Value {
    wait_for(&format!("{app} to be blocked: {has}"), LONG, || {
        let status = app_status(&fleet.api().device("device-1"), app);
        let message = status["reason"]["message"].as_str().unwrap_or_default();
        let unsigned = status["reason"]["code"] == "image-unsigned";
        if unsigned && status["phase"] == "blocked" && message.contains(has) {
            Ok(status)
        } else {
            Err(status)
        }
    })
}

/// Builds and pushes an image that answers with `version`; its name and digest.
fn push(builder: &Builder, host: &str, version: &str) -> (String, String) {
    builder.web(version, version, true);
    let image = builder.push(version, host, &format!("{REPOSITORY}:{version}"));
    let manifest = format!("http://{host}/v2/{REPOSITORY}/manifests/{version}");
    let answer = ureq::head(manifest).header("accept", MANIFEST).call();
    let answer = answer.expect("it was just pushed");
    let digest = answer.headers()["docker-content-digest"].to_str();
    (image, digest.expect("it is text").to_owned())
}

fn device(bed: &Bed, hub: &Hub, host: &str) -> Device {
    Device::configure(
        bed,
        hub.broker(),
        hub.url(),
        &hub.join_token_file(),
        "device-1",
        "role = \"web\"",
        &format!("[registries.\"{host}\"]\nplain_http = true\n"),
    )
}

#[test]
fn only_what_the_owners_key_signed_is_run() {
    let bed = Bed::new("signatures");
    let registry = Registry::start(&bed);
    let host = registry.host().to_owned();
    let builder = Builder::new(&bed);
    let [right, wrong] = ["right", "wrong"].map(|name| Key::new(&bed, name));
    let ((one, first), (two, second)) =
        (push(&builder, &host, "one"), push(&builder, &host, "two"));
    let hub = Hub::start_with(
        &bed,
        &HubOptions {
            plain_http: vec![host.clone()],
            ..HubOptions::default()
        },
    );
    let rule = format!(
        "[[signatures]]\nimages = [\"{host}/acme/*\"]\nkeys = ['''{}''']\n",
        right.pem()
    );
    let mut device = device(&bed, &hub, &host);
    set_policy(&device, &rule);
    device.restart();
    let fleet = Fleet {
        devices: vec![device],
        hub,
    };
    fleet.await_online(1);
    let manifest = |image: &str| web_manifest("shop", image, "[{percent: 100}]");
    let served = || {
        let found = container(&bed, "device-1", "shop", "server").ok_or("none")?;
        http_get(found, "/version")
    };
    let await_served = |version: &str| {
        wait_for(&format!("{version} to run"), LONG, || match served() {
            Ok(found) if found == version => Ok(()),
            found => Err(found),
        });
    };

    // Not signed: nothing of it comes to this disk.
    fleet.api().apply("shop", &manifest(&one)).ok();
    let status = await_unsigned(&fleet, "shop", "is not signed, and");
    let policy = fleet.devices[0].config().with_file_name("policy.toml");
    let message = status["reason"]["message"].as_str().expect("it is text");
    assert!(message.contains(&policy.display().to_string()), "{message}");
    let layers = fleet.devices[0].state().join("images/layers");
    assert_eq!(std::fs::read_dir(&layers).expect("it is there").count(), 0);
    // Signed by somebody else; and by the right one, but another image.
    for (key, vouched) in [(&wrong, &first), (&right, &second)] {
        sign(&bed, key, &host, &first, vouched);
        await_unsigned(&fleet, "shop", "none by a key");
    }
    assert_eq!(std::fs::read_dir(&layers).expect("it is there").count(), 0);
    // As it should be: the device goes on by itself.
    sign(&bed, &right, &host, &first, &first);
    await_served("one");
    fleet.await_rollout("shop", "completed");

    // What is on disk for an app that may have it unsigned is not there for the others.
    let free = format!("{rule}[apps.free]\nsignatures = []\n");
    set_policy(&fleet.devices[0], &free);
    let unsigned = web_manifest("free", &two, "[{percent: 100}]");
    fleet.api().apply("free", &unsigned).ok();
    fleet.await_rollout("free", "completed");
    fleet.api().apply("shop", &manifest(&two)).ok();
    await_unsigned(&fleet, "shop", "is not signed, and");
    assert_eq!(served().as_deref(), Ok("one"));
    let signature = sign(&bed, &right, &host, &second, &second);
    await_served("two");
    fleet.await_rollout("shop", "completed");

    // What was believed once is kept: without the registry's copy the same image is still known to be signed.
    let answer = ureq::delete(format!(
        "http://{host}/v2/{REPOSITORY}/manifests/{signature}"
    ))
    .call();
    assert_eq!(answer.expect("the registry removes").status(), 202);
    let more = manifest(&two).replace(
        "\x20     stop_grace_period: 1s\n",
        "\x20     stop_grace_period: 1s\n\x20     environment: {MORE: \"1\"}\n",
    );
    let applied = fleet.api().apply("shop", &more).ok();
    assert_eq!(applied["outcome"], "updated");
    fleet.await_release("shop", &applied["release"]);
}
