//! Bombs beside a well-behaved app, and what the app's users and the device feel of them.
//!
//! Used by a test, for seconds each, and by `cargo xtask soak`, for minutes.

use std::fmt;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::bed::SmallDisk;
use crate::fleet::{
    Fleet, Identity, LONG, Requests, await_container, container, import, web_manifest,
};
use crate::image::Builder;
use crate::process::wait_until;
use crate::{Bed, Hub};

/// The device's file system.
const DISK_BYTES: u64 = 512 << 20;

/// How long the thread sleeps each time that looks at the device while a bomb goes off.
const PACE: Duration = Duration::from_millis(10);

/// A request that took this long counts as failed.
const PATIENCE: Duration = Duration::from_secs(5);

/// The phase in which all bombs go off.
pub const ALL: &str = "all at once";

/// What each bomb runs, how it shows, and more keys of its service.
const BOMBS: [(&str, &str, &str); 5] = [
    (
        "forks",
        "b() { b | b & }; while :; do b; sleep 0.1; done",
        "",
    ),
    ("memory", "while :; do tail /dev/zero; sleep 0.1; done", ""),
    // 50 MB/s, as far as its CPU limit lets it.
    (
        "logs",
        "while :; do yes 0123456789012345678901234567890123456789 | head -c 5000000; sleep 0.1; done",
        "      logging: {max_size: 1m, max_file: 2}\n",
    ),
    (
        "disk",
        "i=0; while :; do i=$((i+1)); dd if=/dev/zero of=/f$i bs=1M count=4; sleep 0.1; done 2>/dev/null",
        "      read_only: false\n      storage_opt: {size: 32m}\n",
    ),
    (
        "inodes",
        "i=0; while :; do i=$((i+1)); : > /f$i; done",
        "      read_only: false\n      storage_opt: {size: 16m}\n",
    ),
];

/// What was measured while one or all of the bombs went off.
#[derive(Debug, Clone)]
pub struct Phase {
    /// Which bombs.
    pub name: String,
    /// Answers.
    pub requests: usize,
    /// Requests without an answer.
    pub failed: usize,
    /// In milliseconds.
    pub p50: f64,
    /// In milliseconds.
    pub p99: f64,
    /// By how much a thread outside of every container, that only sleeps, woke too late: what the kernel alone is to blame
    /// for. In milliseconds.
    pub sleeper_p99: f64,
    /// The least that was free on the device's file system, in bytes.
    pub free_min: u64,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:<22} {:>7} answers {:>4} failed   p50 {:>7.2} ms   p99 {:>7.2} ms   sleeper's p99 {:>7.2} ms   {:>4} MiB free at least",
            self.name,
            self.requests,
            self.failed,
            self.p50,
            self.p99,
            self.sleeper_p99,
            self.free_min >> 20
        )
    }
}

/// Lets each bomb go off alone for `time`, then all of them, with quiet times before and after. Tells each phase as
/// it ends.
///
/// # Panics
///
/// When the agent or the neighbour does not survive it, a bomb is not met by its limit, or the device's file system
/// ends below its reserve.
pub fn run(bed: &Bed, time: Duration, tell: &mut dyn FnMut(&Phase)) -> Vec<Phase> {
    let _disk = SmallDisk::mount(bed, "device-1/state", DISK_BYTES);
    let builder = Builder::new(bed);
    builder.web("v1", "one", true);
    builder.image("plain", &[], |_root| {});
    let mut fleet = Fleet::start(bed, Hub::start(bed), 1);
    let api = fleet.api();
    let [web, plain] = ["v1", "plain"].map(|tag| import(&api, &builder, tag));
    api.apply("shop", &web_manifest("shop", &web, "[{percent: 100}]"))
        .ok();
    fleet.await_rollout("shop", "completed");
    let neighbour = await_container(bed, "device-1", "shop", "server");
    let agent = fleet.devices[0].program().pid();
    let state = fleet.devices[0].state().to_owned();

    let mut phases = Vec::new();
    let mut measure = |name: &str| {
        let phase = watch(name, neighbour, &state, time);
        tell(&phase);
        phases.push(phase);
    };
    measure("quiet, before");
    for (name, command, more) in BOMBS {
        let begin = newest_event(&api);
        api.apply(name, &manifest(name, &plain, command, more)).ok();
        let _started = await_container(bed, "device-1", name, "bomb");
        measure(name);
        let expected = match name {
            "disk" | "inodes" => Some("disk-limit"),
            _ => None,
        };
        if let Some(kind) = expected {
            wait_until(&format!("{name} to be stopped"), LONG, || {
                has_event(&api, begin, kind, name)
            });
        }
        api.send("DELETE", &format!("/apps/{name}"), b"").ok();
        wait_until(&format!("{name} to be removed"), LONG, || {
            container(bed, "device-1", name, "bomb").is_none()
        });
    }
    for (name, command, more) in BOMBS {
        api.apply(name, &manifest(name, &plain, command, more)).ok();
    }
    measure(ALL);
    for (name, ..) in BOMBS {
        api.send("DELETE", &format!("/apps/{name}"), b"").ok();
    }
    for (name, ..) in BOMBS {
        wait_until(&format!("{name} to be removed"), LONG, || {
            container(bed, "device-1", name, "bomb").is_none()
        });
    }
    measure("quiet, after");

    assert_eq!(
        container(bed, "device-1", "shop", "server"),
        Some(neighbour),
        "the neighbour was replaced"
    );
    assert_eq!(fleet.devices[0].program().pid(), agent);
    assert!(fleet.devices[0].program().runs(), "the agent died");
    let status = fleet.devices[0].status().expect("the agent answers");
    assert_eq!(status["agentRunning"], true, "{status}");
    wait_until("the reserve to be whole", LONG, || {
        free(&state) >= DISK_BYTES / 20
    });
    assert!(state.join("ballast").exists(), "the ballast is made again");
    phases
}

/// The worse 99th percentile of the two quiet phases.
///
/// # Panics
///
/// When there are none.
#[must_use]
pub fn quiet_p99(phases: &[Phase]) -> f64 {
    phases
        .iter()
        .filter(|phase| phase.name.starts_with("quiet"))
        .map(|phase| phase.p99)
        .max_by(f64::total_cmp)
        .expect("there are quiet phases")
}

fn watch(name: &str, neighbour: Identity, state: &Path, time: Duration) -> Phase {
    let mut requests = Requests::begin(neighbour, PATIENCE);
    let begin = Instant::now();
    let mut free_min = free(state);
    let mut late = Vec::new();
    while begin.elapsed() < time {
        let asleep = Instant::now();
        std::thread::sleep(PACE);
        late.push(asleep.elapsed().saturating_sub(PACE));
        free_min = free_min.min(free(state));
    }
    let (answered, failed) = requests.end();
    let (requests, answered, late) = (answered.len(), percentiles(answered), percentiles(late));
    Phase {
        name: name.to_owned(),
        requests,
        failed,
        p50: answered(50),
        p99: answered(99),
        sleeper_p99: late(99),
        free_min,
    }
}

/// Which time so many of a hundred do not exceed, in milliseconds; infinite if there are none.
fn percentiles(mut times: Vec<Duration>) -> impl Fn(usize) -> f64 {
    times.sort_unstable();
    move |part| {
        let index = (times.len() * part / 100).min(times.len().saturating_sub(1));
        times
            .get(index)
            .map_or(f64::INFINITY, |time| time.as_secs_f64() * 1000.0)
    }
}

fn free(path: &Path) -> u64 {
    let path = std::ffi::CString::new(path.as_os_str().as_encoded_bytes()).expect("no NUL inside");
    #[expect(
        unsafe_code,
        reason = "statvfs(3) has no safe wrapper in the standard library"
    )]
    // SAFETY: the path ends with a NUL, and all zeroes is a valid statvfs, which the call fills.
    let found = unsafe {
        let mut found: libc::statvfs = std::mem::zeroed();
        assert_eq!(libc::statvfs(path.as_ptr(), &raw mut found), 0);
        found
    };
    found.f_bavail * found.f_frsize
}

fn newest_event(api: &crate::api::Api) -> u64 {
    let events = api.get("/events?limit=1000").ok();
    let items = events["items"].as_array().into_iter().flatten();
    items
        .filter_map(|event| event["id"].as_u64())
        .max()
        .unwrap_or(0)
}

fn has_event(api: &crate::api::Api, after: u64, kind: &str, app: &str) -> bool {
    let events = api.get("/events?limit=1000").ok();
    let mut items = events["items"].as_array().into_iter().flatten();
    items.any(|event| {
        event["kind"] == kind && event["app"] == app && event["id"].as_u64().unwrap_or(0) >= after
    })
}

/// One service `bomb` that runs a shell line, with little of everything; `more` lines go below it.
#[must_use]
pub fn manifest(app: &str, image: &str, command: &str, more: &str) -> String {
    format!(
        "apiVersion: foreshore/v1\nkind: App\nmetadata: {{name: {app}}}\nspec:\n\
         \x20 services:\n    bomb:\n      image: {image}\n      command: [\"/bin/sh\", \"-c\", \"{command}\"]\n\
         \x20     mem_limit: 16m\n      cpus: \"0.2\"\n      pids_limit: 20\n      stop_grace_period: 1s\n{more}\
         \x20 rollout: {{waves: [{{percent: 100}}], soak: 1s, bake: 0s, progressDeadline: 60s, onFailure: pause}}\n"
    )
}
