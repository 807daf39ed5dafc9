//! Limits that bite: memory bomb, fork bomb and CPU hog beside a well-behaved neighbour.

use e2e::fleet::{Fleet, LONG, await_container, container, http_get, import, web_manifest};
use e2e::image::Builder;
use e2e::{Bed, Hub, wait_for, wait_until};

fn bomb_manifest(app: &str, image: &str, command: &str) -> String {
    format!(
        "apiVersion: foreshore/v1\nkind: App\nmetadata: {{name: {app}}}\nspec:\n\
         \x20 services:\n    bomb:\n      image: {image}\n      command: [\"/bin/sh\", \"-c\", \"{command}\"]\n\
         \x20     mem_limit: 16m\n      cpus: \"0.2\"\n      pids_limit: 20\n      stop_grace_period: 1s\n\
         \x20 rollout: {{waves: [{{percent: 100}}], soak: 1s, bake: 0s, progressDeadline: 60s, onFailure: pause}}\n"
    )
}

#[test]
fn bombs_are_contained_and_the_neighbour_keeps_serving() {
    let bed = Bed::new("bombs");
    let builder = Builder::new(&bed);
    builder.web("v1", "one", true);
    builder.image("plain", &[], |_root| {});
    let fleet = Fleet::start(&bed, Hub::start(&bed), 1);
    let api = fleet.api();
    let [web, plain] = ["v1", "plain"].map(|tag| import(&api, &builder, tag));
    api.apply("shop", &web_manifest("shop", &web, "[{percent: 100}]"))
        .ok();
    fleet.await_rollout("shop", "completed");
    let neighbour = await_container(&bed, "device-1", "shop", "server");

    api.apply(
        "memory",
        &bomb_manifest("memory", &plain, "exec tail /dev/zero"),
    )
    .ok();
    wait_for("the hub to hear of the memory kill", LONG, || {
        let events = api.get("/events?limit=1000").ok();
        let killed = events["items"]
            .as_array()
            .into_iter()
            .flatten()
            .any(|e| e["kind"] == "oom-killed" && e["app"] == "memory");
        if killed { Ok(()) } else { Err(events) }
    });

    api.apply(
        "forks",
        &bomb_manifest("forks", &plain, "b() { b | b & }; b; exec sleep 1000"),
    )
    .ok();
    let bomb = await_container(&bed, "device-1", "forks", "bomb");
    wait_until("the fork bomb to meet its limit", LONG, || {
        count(bomb.pid, "pids", "pids.events", "max ") > 0
    });
    assert!(e2e::fleet::containers(&bed, "device-1", "forks.bomb.").len() <= 20);

    api.apply("hog", &bomb_manifest("hog", &plain, "while :; do :; done"))
        .ok();
    let hog = await_container(&bed, "device-1", "hog", "bomb");
    wait_until("the hog to be throttled", LONG, || {
        count(hog.pid, "cpu", "cpu.stat", "nr_throttled ") > 5
    });

    assert_eq!(
        container(&bed, "device-1", "shop", "server"),
        Some(neighbour)
    );
    assert_eq!(http_get(neighbour, "/version").as_deref(), Ok("one"));
}

/// A counter in a file of a process's cgroup, on cgroup v1 (where `controller` has its own hierarchy) or v2.
fn count(pid: i32, controller: &str, file: &str, key: &str) -> u64 {
    let cgroups = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    let stats = cgroups.lines().filter_map(|line| {
        let mut parts = line.splitn(3, ':');
        let (_, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
        let mount = match controllers {
            "" => "/sys/fs/cgroup".to_owned(),
            names if names.split(',').any(|name| name == controller) => {
                format!("/sys/fs/cgroup/{names}")
            }
            _ => return None,
        };
        std::fs::read_to_string(format!("{mount}{path}/{file}")).ok()
    });
    let counts = stats.filter_map(|stat| {
        stat.lines()
            .find_map(|line| line.strip_prefix(key)?.parse().ok())
    });
    counts.max().unwrap_or(0)
}
