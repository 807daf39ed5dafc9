//! A hub with devices, and the questions tests ask about them.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::fd::AsRawFd as _;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;

use crate::api::Api;
use crate::image::Builder;
use crate::process::{has_executed, start_time, wait_for};
use crate::{Bed, Device, Hub};

/// How long a test waits for something that takes seconds on an idle machine.
pub const LONG: Duration = Duration::from_secs(120);

/// A hub with devices `device-1` … `device-n`, labelled `role = "web"`.
#[derive(Debug)]
pub struct Fleet {
    /// Dropped first, so that their containers are gone before the bed looks.
    pub devices: Vec<Device>,
    /// The hub.
    pub hub: Hub,
}

impl Fleet {
    /// Starts the devices and waits until the hub sees all of them.
    #[must_use]
    pub fn start(bed: &Bed, hub: Hub, count: usize) -> Self {
        let devices = (1..=count)
            .map(|number| Device::start(bed, &hub, &format!("device-{number}"), "role = \"web\""))
            .collect();
        let fleet = Self { devices, hub };
        fleet.await_online(count);
        fleet
    }

    /// Waits until the hub sees `count` devices online and knows their labels: those come a moment later, and an app
    /// that is applied before them does not select the device.
    pub fn await_online(&self, count: usize) {
        let api = self.hub.api();
        wait_for(&format!("{count} devices online"), LONG, || {
            let devices = api.get("/devices").ok();
            let online = devices["items"]
                .as_array()
                .into_iter()
                .flatten()
                .filter(|device| device["online"] == true && !device["inventory"].is_null());
            if online.count() == count {
                Ok(())
            } else {
                Err(devices)
            }
        });
    }

    /// A client of the hub's API.
    #[must_use]
    pub fn api(&self) -> Api {
        self.hub.api()
    }

    /// Waits until the newest rollout of `app` is in `state`; that rollout.
    pub fn await_rollout(&self, app: &str, state: &str) -> Value {
        await_rollout(&self.api(), app, state)
    }

    /// Waits until every device reports `app` succeeded at `release`.
    pub fn await_release(&self, app: &str, release: &Value) {
        let api = self.api();
        for device in &self.devices {
            wait_for(
                &format!("{} to run {release} of {app}", device.id),
                LONG,
                || {
                    let view = api.device(&device.id);
                    let status = app_status(&view, app);
                    let well = status["running"] == *release && status["lastKnownGood"] == *release;
                    if well { Ok(()) } else { Err(view) }
                },
            );
        }
    }
}

/// Waits until the newest rollout of `app` is in `state`; that rollout.
pub fn await_rollout(api: &Api, app: &str, state: &str) -> Value {
    wait_for(&format!("the rollout of {app} to be {state}"), LONG, || {
        let rollout = api.rollout(app);
        if rollout["state"] == state {
            Ok(rollout)
        } else {
            Err(rollout)
        }
    })
}

/// What a device view says of one app; `Null` when nothing.
#[must_use]
pub fn app_status(device: &Value, app: &str) -> Value {
    let apps = device["apps"].as_array().into_iter().flatten();
    let found = apps
        .into_iter()
        .find(|status| status["app"] == app)
        .cloned();
    // Field names on the device's own words are snake_case in some places; tests read camelCase.
    found.map_or(Value::Null, |mut status| {
        for (snake, camel) in [("last_known_good", "lastKnownGood")] {
            if let Some(value) = status.get(snake).cloned() {
                status[camel] = value;
            }
        }
        status
    })
}

/// A container seen from outside: which process it is, beyond doubt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// Its process id.
    pub pid: i32,
    /// When that process started.
    pub start_time: u64,
}

/// The process of the one running container of `app`/`service` on a device, found through its cgroup.
#[must_use]
pub fn container(bed: &Bed, device: &str, app: &str, service: &str) -> Option<Identity> {
    let mut found = containers(bed, device, &format!("{app}.{service}."));
    // While a container is made, processes of the runtime are in its cgroup, and the oldest of them goes away.
    found.retain(|identity| has_executed(identity.pid));
    // The first process is the oldest; its id is not the lowest once the kernel has come round.
    found.sort_by_key(|identity| (identity.start_time, identity.pid));
    found.first().copied()
}

/// Waits for [`container`].
#[must_use]
pub fn await_container(bed: &Bed, device: &str, app: &str, service: &str) -> Identity {
    wait_for(
        &format!("a container of {app}/{service} on {device}"),
        LONG,
        || container(bed, device, app, service).ok_or("none"),
    )
}

/// Every process of containers whose id begins with `prefix` on a device.
#[must_use]
pub fn containers(bed: &Bed, device: &str, prefix: &str) -> Vec<Identity> {
    let mut found = Vec::new();
    for hierarchy in ["/sys/fs/cgroup/pids", "/sys/fs/cgroup"] {
        let parent = PathBuf::from(hierarchy).join(bed.cgroup()).join(device);
        for entry in std::fs::read_dir(&parent).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with(prefix) {
                let procs =
                    std::fs::read_to_string(entry.path().join("cgroup.procs")).unwrap_or_default();
                found.extend(
                    procs
                        .lines()
                        .filter_map(|line| line.parse().ok())
                        .filter_map(|pid| {
                            start_time(pid).map(|start_time| Identity { pid, start_time })
                        }),
                );
            }
        }
    }
    found
}

/// GET of a path on port 8080 inside a container's network namespace; the body.
///
/// # Errors
///
/// With what went wrong, or the answer when it is no success.
///
/// # Panics
///
/// When no thread can be started.
pub fn http_get(identity: Identity, path: &str) -> Result<String, String> {
    let path = path.to_owned();
    // setns(2) moves one thread; this one ends with the question.
    let asked = std::thread::spawn(move || {
        enter_network(identity.pid).map_err(|error| error.to_string())?;
        ask(&path, Duration::from_secs(5))
    });
    asked.join().expect("asking does not panic")
}

/// Requests for `/version` to a container, one after the other on a thread of its own, some 100 a second.
#[derive(Debug)]
pub struct Requests {
    stop: std::sync::Arc<std::sync::atomic::AtomicBool>,
    asking: Option<std::thread::JoinHandle<(Vec<Duration>, usize)>>,
}

impl Requests {
    /// Begins to ask; a request without a right answer after `patience` has failed.
    #[must_use]
    pub fn begin(identity: Identity, patience: Duration) -> Self {
        let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        let stopped = std::sync::Arc::clone(&stop);
        let asking = std::thread::spawn(move || {
            enter_network(identity.pid).expect("the container runs");
            let (mut answered, mut failed) = (Vec::new(), 0);
            while !stopped.load(std::sync::atomic::Ordering::Relaxed) {
                let begin = std::time::Instant::now();
                match ask("/version", patience) {
                    Ok(_) => answered.push(begin.elapsed()),
                    Err(_) => failed += 1,
                }
                // The pace of the questions.
                std::thread::sleep(Duration::from_millis(10).saturating_sub(begin.elapsed()));
            }
            (answered, failed)
        });
        Self {
            stop,
            asking: Some(asking),
        }
    }

    /// How long each answer took, and how many requests had none.
    ///
    /// # Panics
    ///
    /// When the container was gone before it began.
    pub fn end(&mut self) -> (Vec<Duration>, usize) {
        self.stop.store(true, std::sync::atomic::Ordering::Relaxed);
        let asking = self.asking.take().expect("it ends once");
        asking.join().expect("asking does not panic")
    }
}

/// GET of a path on port 8080 of this thread's loopback; the body.
fn ask(path: &str, patience: Duration) -> Result<String, String> {
    let address = std::net::SocketAddr::from(([127, 0, 0, 1], 8080));
    let text = |error: std::io::Error| error.to_string();
    let mut stream = TcpStream::connect_timeout(&address, patience).map_err(text)?;
    stream.set_read_timeout(Some(patience)).map_err(text)?;
    let request = format!("GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n");
    stream.write_all(request.as_bytes()).map_err(text)?;
    let mut answer = String::new();
    stream
        .take(64 * 1024)
        .read_to_string(&mut answer)
        .map_err(text)?;
    match answer.split_once("\r\n\r\n") {
        Some((head, body)) if head.contains(" 200 ") => Ok(body.trim().to_owned()),
        _ => Err(answer),
    }
}

fn enter_network(pid: i32) -> std::io::Result<()> {
    let namespace = std::fs::File::open(format!("/proc/{pid}/ns/net"))?;
    #[expect(
        unsafe_code,
        reason = "setns(2) has no safe wrapper in the standard library"
    )]
    // SAFETY: setns takes a descriptor that is open and touches no memory of ours.
    let entered = unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) };
    if entered == 0 {
        Ok(())
    } else {
        Err(std::io::Error::last_os_error())
    }
}

/// The manifest of an app `web` with one service of [`Builder::web`]'s images.
#[must_use]
pub fn web_manifest(app: &str, image: &str, waves: &str) -> String {
    format!(
        "apiVersion: foreshore/v1\n\
         kind: App\n\
         metadata: {{name: {app}}}\n\
         spec:\n\
         \x20 selector: {{matchLabels: {{role: web}}}}\n\
         \x20 services:\n\
         \x20   server:\n\
         \x20     image: {image}\n\
         \x20     mem_limit: 32m\n\
         \x20     stop_grace_period: 1s\n\
         \x20     probes: {{readiness: {{http: {{port: 8080, path: /ready}}, period: 200ms, failure_threshold: 3}}}}\n\
         \x20 rollout:\n\
         \x20   waves: {waves}\n\
         \x20   soak: 1s\n\
         \x20   bake: 500ms\n\
         \x20   progressDeadline: 15s\n\
         \x20   maxUnavailable: 100%\n"
    )
}

/// Imports an image of `builder` into the hub; its name there.
pub fn import(api: &Api, builder: &Builder, tag: &str) -> String {
    let archive = std::fs::read(builder.archive(tag)).expect("the archive was just written");
    let view = api
        .send("POST", &format!("/images?name=demo:{tag}"), &archive)
        .ok();
    view["reference"]
        .as_str()
        .unwrap_or_else(|| panic!("no reference in {view}"))
        .to_owned()
}
