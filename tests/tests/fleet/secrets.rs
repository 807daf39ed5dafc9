//! Secrets: from the command line through hub and broker into containers, and nowhere else.

use std::io::Write as _;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use e2e::bed::MemoryDisk;
use e2e::fleet::{
    Identity, LONG, app_status, await_container, await_rollout, container, containers, http_get,
    import,
};
use e2e::image::Builder;
use e2e::process::{programs, signal};
use e2e::traces::holding;
use e2e::{Bed, Device, Hub, wait_for, wait_until};
use foreshore_protocol::secret::{DeviceKey, SealedSecrets};
use foreshore_protocol::topic::{self, Leaf};
use foreshore_protocol::{DeviceId, frame};
use rumqttc::{AsyncClient, Event, Incoming, MqttOptions, QoS};

/// A service that shows on port 8080 what it was given, and counts signals.
fn manifest(image: &str) -> String {
    format!(
        "apiVersion: foreshore/v1
kind: App
metadata: {{name: shop}}
spec:
  selector: {{matchLabels: {{role: web}}}}
  secrets: {{pin: {{external: true}}, live: {{external: true}}, told: {{external: true}}}}
  services:
    server:
      image: {image}
      mem_limit: 32m
      stop_grace_period: 1s
      user: app
      tmpfs: [/www]
      secrets:
        - {{source: pin, environment: PIN}}
        - {{source: pin, target: pin, mode: 0440}}
        - {{source: live, on_rotate: keep}}
        - {{source: told, on_rotate: SIGHUP}}
      entrypoint: [/bin/sh, -c]
      command:
        - 'show() {{ ls -ln /run/secrets > /www/list; env > /www/env; cat /run/secrets/told > /www/told; }};
          trap \"show\" HUP; trap \"exit 0\" TERM; show; httpd -p 8080 -h /www; touch /www/ready; while :; do sleep 0.1; done'
      probes: {{readiness: {{http: {{port: 8080, path: /ready}}, period: 200ms}}}}
    other:
      image: {image}
      mem_limit: 32m
      stop_grace_period: 1s
  rollout: {{waves: [{{percent: 100}}], soak: 1s, bake: 0s, progressDeadline: 30s, maxUnavailable: 100%}}
"
    )
}

fn foreshore(hub: &Hub, arguments: &[&str], input: &[u8]) -> Output {
    let mut child = Command::new(programs().join("foreshore"))
        .args(["--hub", hub.url(), "--token-file"])
        .arg(hub.data().join("api-token"))
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("runs");
    let mut stdin = child.stdin.take().expect("piped");
    stdin.write_all(input).expect("it reads");
    drop(stdin);
    child.wait_with_output().expect("ends")
}

fn set(hub: &Hub, name: &str, value: &str) {
    let output = foreshore(hub, &["secret", "set", name], value.as_bytes());
    assert!(output.status.success(), "{output:?}");
    assert!(!String::from_utf8_lossy(&output.stdout).contains(value));
}

/// What the container's own root sees in a file; all of the device's root may.
fn inside(of: Identity, path: &str) -> String {
    let path = format!("/proc/{}/root{path}", of.pid);
    std::fs::read_to_string(&path).unwrap_or_else(|error| format!("{path}: {error}"))
}

/// The first process of the service.
fn server(bed: &Bed) -> Identity {
    await_container(bed, "device-1", "shop", "server")
}

fn await_env(bed: &Bed, text: &str) -> Identity {
    wait_for(&format!("{text} in the environment"), LONG, || {
        let server = server(bed);
        match http_get(server, "/env") {
            Ok(env) if env.lines().any(|line| line == text) => Ok(server),
            other => Err(other),
        }
    })
}

/// Connects to the hub's broker as `device` and reads a retained message; what the broker says when it refuses.
fn read_retained(hub: &Hub, device: &str, topic: &str) -> Result<Vec<u8>, String> {
    let (host, port) = hub
        .broker()
        .trim_start_matches("mqtt://")
        .rsplit_once(':')
        .expect("the broker has a port");
    let token = std::fs::read_to_string(hub.join_token_file()).expect("a hub has a token");
    let mut options = MqttOptions::new(device, (host, port.parse::<u16>().expect("a number")));
    options.set_credentials(device.to_owned(), token.trim().as_bytes().to_vec());
    options.set_clean_start(true);
    let read = async {
        let (client, mut events) = AsyncClient::builder(options).capacity(16).build();
        loop {
            match events.poll().await.map_err(|error| error.to_string())? {
                Event::Incoming(Incoming::ConnAck(_)) => client
                    .subscribe(topic.to_owned(), QoS::AtLeastOnce)
                    .await
                    .map_err(|error| error.to_string())?,
                Event::Incoming(Incoming::SubAck(answer)) => {
                    let code = format!("{:?}", answer.return_codes);
                    if !code.contains("Success") {
                        return Err(code);
                    }
                }
                Event::Incoming(Incoming::Publish(message)) => return Ok(message.payload.to_vec()),
                _ => {}
            }
        }
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let patience = tokio::time::timeout(Duration::from_secs(30), read);
        patience
            .await
            .unwrap_or_else(|_| Err("nothing came".to_owned()))
    })
}

/// The key in a device's state directory: the end of its file.
fn key(device: &Device) -> DeviceKey {
    let file = std::fs::read(device.state().join("secrets.key")).expect("a device has a key");
    let bytes = file.last_chunk::<32>().expect("a key has 32 bytes");
    DeviceKey::from_bytes(*bytes)
}

struct Place {
    /// In the order in which they must go.
    devices: Vec<Device>,
    hub: Hub,
    _memory: Vec<MemoryDisk>,
}

/// A hub and two devices, of which only the first is selected.
fn place(bed: &Bed) -> Place {
    let memory = ["device-1/run", "device-2/run"].map(|dir| MemoryDisk::mount(bed, dir));
    let hub = Hub::start(bed);
    let devices = vec![
        Device::start(bed, &hub, "device-1", "role = \"web\""),
        Device::start(bed, &hub, "device-2", "role = \"none\""),
    ];
    let api = hub.api();
    wait_until("both devices to be there", LONG, || {
        let devices = api.get("/devices").ok();
        devices["items"]
            .as_array()
            .is_some_and(|items| items.len() == 2)
    });
    Place {
        devices,
        hub,
        _memory: memory.into(),
    }
}

fn images(bed: &Bed, hub: &Hub) -> String {
    let builder = Builder::new(bed);
    builder.web("v1", "one", true);
    import(&hub.api(), &builder, "v1")
}

#[test]
fn a_secret_reaches_who_needs_it_and_nobody_else_and_changes_as_asked() {
    let bed = Bed::new("secrets");
    let mut place = place(&bed);
    let api = place.hub.api();
    let manifest = manifest(&images(&bed, &place.hub));
    let values = [
        "pin-of-1f3870be",
        "live-of-274ad47f",
        "told-of-1c6bb5a2",
        "pin-of-9d4e1e23",
        "live-of-e1faffb3",
        "told-of-b3cddf0f",
        "pin-of-c51ce410",
    ];

    // Unknown secrets are named before anything happens.
    set(&place.hub, "live", values[1]);
    set(&place.hub, "told", values[2]);
    let refused = api.apply("shop", &manifest);
    assert_eq!((refused.status, refused.code()), (422, "secret-not-set"));
    let detail = refused.body["detail"].as_str().expect("a text").to_owned();
    assert!(detail.contains("secret pin") && detail.contains("service server"));
    assert_eq!(api.get("/apps/shop").status, 404);

    set(&place.hub, "pin", values[0]);
    let release = api.apply("shop", &manifest).ok()["release"].clone();
    await_rollout(&api, "shop", "completed");
    let first = await_env(&bed, &format!("PIN={}", values[0]));
    for (file, value) in [("pin", 0), ("live", 1), ("told", 2)] {
        assert_eq!(
            inside(first, &format!("/run/secrets/{file}")),
            values[value]
        );
    }
    // Inside they belong to the user it runs as.
    let list = http_get(first, "/list").expect("it serves");
    for (mode, file) in [
        ("-r--------", "live"),
        ("-r--r-----", "pin"),
        ("-r--------", "told"),
    ] {
        let line = list
            .lines()
            .find(|line| line.ends_with(&format!(" {file}")));
        let words: Vec<&str> = line.unwrap_or_default().split_whitespace().collect();
        assert_eq!(
            words.get(..4),
            Some(&[mode, "1", "1000", "1000"][..]),
            "{list}"
        );
    }

    // `keep`: the file changes and nothing else does.
    let other = await_container(&bed, "device-1", "shop", "other");
    set(&place.hub, "live", values[4]);
    wait_until("the new file", LONG, || {
        inside(first, "/run/secrets/live") == values[4]
    });
    assert_eq!(server(&bed), first);
    // A signal: the process reads it again.
    set(&place.hub, "told", values[5]);
    wait_until("the signal", LONG, || {
        http_get(first, "/told").is_ok_and(|told| told == values[5])
    });
    assert_eq!(server(&bed), first);
    // `restart`: a new container, with the new value in both places.
    set(&place.hub, "pin", values[3]);
    let second = await_env(&bed, &format!("PIN={}", values[3]));
    assert_ne!(second, first);
    assert_eq!(inside(second, "/run/secrets/pin"), values[3]);
    assert_eq!(inside(second, "/run/secrets/live"), values[4]);
    assert_eq!(container(&bed, "device-1", "shop", "other"), Some(other));
    // It was no failure: the release is what it was.
    wait_for("the device to be well", LONG, || {
        let status = app_status(&api.device("device-1"), "shop");
        let well = status["phase"] == "succeeded"
            && status["reason"].is_null()
            && status["lastKnownGood"] == release;
        if well { Ok(()) } else { Err(status) }
    });
    wait_until("the event", LONG, || {
        let events = api.get("/events?limit=1000").ok();
        let mut items = events["items"].as_array().into_iter().flatten();
        items.any(|event| event["kind"] == "secret-rotated")
    });

    // As after a power cut without a hub: everything that was in memory is gone.
    place.hub.kill9();
    place.devices[0].kill9();
    for process in containers(&bed, "device-1", "") {
        signal(process.pid, libc::SIGKILL);
    }
    wait_until("the containers to be gone", LONG, || {
        container(&bed, "device-1", "shop", "server").is_none()
    });
    let run = place.devices[0].run_dir().to_owned();
    for entry in std::fs::read_dir(run.join("containers"))
        .expect("it is there")
        .flatten()
    {
        std::fs::remove_dir_all(entry.path()).expect("nobody uses it");
    }
    place.devices[0].restart();
    let third = await_env(&bed, &format!("PIN={}", values[3]));
    assert_eq!(inside(third, "/run/secrets/told"), values[5]);
    // And what changes while the device is off reaches it when it is back.
    place.devices[0].terminate();
    place.hub.restart();
    set(&place.hub, "pin", values[6]);
    place.devices[0].restart();
    await_env(&bed, &format!("PIN={}", values[6]));

    // Nobody else can know: not on a disk of the device, in a log, an answer or on the wire.
    let mut found = Vec::new();
    for device in &place.devices {
        holding(device.state(), &values, &mut found);
        for value in values {
            assert!(
                !device.log().contains(value),
                "{value} in the log of {}",
                device.id
            );
        }
    }
    holding(place.devices[1].run_dir(), &values, &mut found);
    assert_eq!(found, Vec::<String>::new());
    let hub_log = std::fs::read_to_string(bed.path("hub.log")).expect("a hub has a log");
    let paths = [
        "/apps/shop",
        "/devices/device-1",
        "/events?limit=1000",
        "/secrets",
        "/secrets/pin",
        "/rollouts?app=shop",
    ];
    let answers: String = paths
        .iter()
        .map(|path| api.get(path).ok().to_string())
        .collect();
    let described = foreshore(&place.hub, &["describe", "device", "device-1"], b"");
    let listed = foreshore(&place.hub, &["secret", "list"], b"");
    for (where_, text) in [
        ("the hub's log", hub_log.as_str()),
        ("answers", &answers),
        ("describe", &String::from_utf8_lossy(&described.stdout)),
        ("list", &String::from_utf8_lossy(&listed.stdout)),
    ] {
        assert!(!text.is_empty());
        for value in values {
            assert!(!text.contains(value), "{value} in {where_}");
        }
    }
    let [one, two] = ["device-1", "device-2"].map(|id| id.parse::<DeviceId>().expect("a name"));
    let topics = [&one, &two].map(|id| topic::device(id, Leaf::Secrets));
    let [key_one, key_two] = [0, 1].map(|index: usize| key(&place.devices[index]));
    for device in &mut place.devices {
        device.terminate();
    }
    let bytes = read_retained(&place.hub, "device-1", &topics[0]).expect("its own secrets");
    for value in values {
        assert!(!bytes.windows(value.len()).any(|w| w == value.as_bytes()));
    }
    let sealed: SealedSecrets = frame::decode(&bytes).expect("a frame");
    assert!(key_two.open(&sealed).is_err());
    let bundle = key_one.open(&sealed).expect("its own");
    assert_eq!(bundle.secrets["pin"].value.as_text(), Some(values[6]));
    let refused = read_retained(&place.hub, "device-2", &topics[0]);
    assert!(
        refused
            .as_ref()
            .is_err_and(|why| why.contains("NotAuthorized")),
        "{refused:?}"
    );

    // What is used cannot be removed; what is not, can.
    place.devices[0].restart();
    let output = foreshore(&place.hub, &["secret", "remove", "pin"], b"");
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let refused = api.send("DELETE", "/secrets/pin", b"");
    assert_eq!((refused.status, refused.code()), (409, "secret-in-use"));
    assert!(api.send("DELETE", "/apps/shop", b"").status < 300);
    wait_until("the app to be gone", LONG, || {
        api.get("/apps/shop").status == 404
    });
    wait_for("the secret to be removed", LONG, || {
        let answer = api.send("DELETE", "/secrets/pin", b"");
        if answer.status == 204 {
            Ok(())
        } else {
            Err(answer)
        }
    });
    assert_eq!(api.get("/secrets/pin").code(), "unknown-secret");
}

#[test]
fn a_device_with_another_key_gets_no_secrets_until_it_is_trusted() {
    let bed = Bed::new("keys");
    let mut place = place(&bed);
    let api = place.hub.api();
    let manifest = manifest(&images(&bed, &place.hub));
    for name in ["pin", "live", "told"] {
        set(&place.hub, name, "one");
    }
    api.apply("shop", &manifest).ok();
    await_rollout(&api, "shop", "completed");
    await_env(&bed, "PIN=one");
    let trusted = api.device("device-1")["secretsKey"].clone();

    // A device that lost its key, or another one under its name.
    place.devices[0].terminate();
    for file in ["secrets.key", "secrets.box"] {
        std::fs::remove_file(place.devices[0].state().join(file)).expect("it is there");
    }
    set(&place.hub, "pin", "two");
    place.devices[0].restart();
    wait_until("the hub to notice", LONG, || {
        let events = api.get("/events?limit=1000").ok();
        let mut items = events["items"].as_array().into_iter().flatten();
        items.any(|event| event["kind"] == "device-key-changed")
    });
    let device = api.device("device-1");
    assert_eq!(device["secretsKey"], trusted);
    assert!(device["untrustedKey"].is_string(), "{device}");
    // What runs, runs on with what it has; what must start, waits and says why.
    let server = server(&bed);
    assert_eq!(inside(server, "/run/secrets/pin"), "one");
    signal(server.pid, libc::SIGKILL);
    wait_for("the device to say what is missing", LONG, || {
        let status = app_status(&api.device("device-1"), "shop");
        if status["reason"]["code"] == "secret-missing" {
            Ok(())
        } else {
            Err(status)
        }
    });
    assert!(container(&bed, "device-1", "shop", "server").is_none());

    let output = foreshore(&place.hub, &["device", "trust-key", "device-1"], b"");
    assert!(output.status.success(), "{output:?}");
    await_env(&bed, "PIN=two");
    let device = api.device("device-1");
    assert!(device["untrustedKey"].is_null() && device["secretsKey"] != trusted);
}
