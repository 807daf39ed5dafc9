//! Probes, dependencies, jobs, hooks and the order of a switch, with real containers.

use std::path::{Path, PathBuf};
use std::time::Duration;

use e2e::fleet::{
    Fleet, Identity, LONG, Requests, app_status, await_container, await_rollout, container,
    containers, http_get, import, web_manifest,
};
use e2e::image::Builder;
use e2e::{Bed, Hub, wait_for, wait_until};
use serde_json::Value;

/// An app whose services write what they do into `/data/journal`.
fn journal_app(image: &str, release: &str, migrate: &str) -> String {
    format!(
        "apiVersion: foreshore/v1
kind: App
metadata: {{name: shop}}
spec:
  selector: {{matchLabels: {{role: web}}}}
  services:
    a-web:
      image: {image}
      mem_limit: 32m
      entrypoint: [/bin/sh, -c]
      command: ['echo web {release} >> /data/journal; trap \"echo web stops >> /data/journal; exit 0\" TERM; while :; do sleep 0.1; done']
      volumes: ['data:/data']
      depends_on: {{db: {{condition: service_healthy}}}}
      pre_stop: [{{command: [/bin/sh, -c, 'echo hook >> /data/journal']}}]
      stop_grace_period: 5s
      probes: {{liveness: {{exec: {{command: [/bin/sh, -c, 'test ! -e /data/hang']}}, period: 200ms, failure_threshold: 2}}}}
    db:
      image: {image}
      mem_limit: 32m
      entrypoint: [/bin/sh, -c]
      command: ['echo db {release} >> /data/journal; trap \"echo db stops >> /data/journal; exit 0\" TERM; sleep 1; touch /tmp/up; while :; do sleep 0.1; done']
      tmpfs: [/tmp]
      volumes: ['data:/data']
      depends_on: {{migrate: {{condition: service_completed_successfully}}}}
      stop_grace_period: 5s
      probes:
        startup: {{exec: {{command: [/bin/test, -e, /tmp/up]}}, period: 100ms, failure_threshold: 100}}
        readiness: {{exec: {{command: [/bin/true]}}, period: 100ms}}
    migrate:
      image: {image}
      mem_limit: 32m
      restart: 'no'
      entrypoint: [/bin/sh, -c]
      command: ['{migrate}']
      volumes: ['data:/data']
  rollout: {{waves: [{{percent: 100}}], soak: 1s, bake: 0s, progressDeadline: 30s, maxUnavailable: 100%}}
"
    )
}

fn bed(test: &str) -> (Bed, Builder) {
    let bed = Bed::new(test);
    let builder = Builder::new(&bed);
    builder.web("v1", "one", true);
    (bed, builder)
}

fn data(fleet: &Fleet) -> PathBuf {
    fleet.devices[0].state().join("volumes/shop/data")
}

fn journal(fleet: &Fleet) -> Vec<String> {
    let text = std::fs::read_to_string(data(fleet).join("journal")).unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}

/// Copies a program of this machine and the libraries that it needs into an image.
fn copy_program(program: &str, root: &Path) {
    let needs = std::process::Command::new("ldd")
        .arg(program)
        .output()
        .expect("ldd is part of libc-bin");
    let needs = String::from_utf8_lossy(&needs.stdout).into_owned();
    let libraries = needs
        .split_ascii_whitespace()
        .filter(|word| word.starts_with('/'));
    for file in libraries.chain([program]) {
        let target = root.join(file.trim_start_matches('/'));
        std::fs::create_dir_all(target.parent().expect("a file has a parent")).expect("writable");
        std::fs::copy(file, target).expect("the file is there");
    }
}

fn status(fleet: &Fleet) -> Value {
    app_status(&fleet.api().device("device-1"), "shop")
}

/// Waits for an event with this in it; events may come a little later than what they are of shows.
fn await_told(fleet: &Fleet, what: &str) {
    wait_for("the event", LONG, || {
        let events = fleet.api().get("/events?limit=200").ok().to_string();
        if events.contains(what) {
            Ok(())
        } else {
            Err(events)
        }
    });
}

#[test]
fn services_start_and_stop_in_the_order_of_their_dependencies_and_jobs_run_once_a_release() {
    let (bed, builder) = bed("order");
    let mut fleet = Fleet::start(&bed, Hub::start(&bed), 1);
    let image = import(&fleet.api(), &builder, "v1");
    let migrate = "echo migrate >> /data/journal";
    let apply = |fleet: &Fleet, release, migrate| {
        let manifest = journal_app(&image, release, migrate);
        fleet.api().apply("shop", &manifest).ok();
    };
    apply(&fleet, "one", migrate);
    fleet.await_rollout("shop", "completed");
    assert_eq!(journal(&fleet), ["migrate", "db one", "web one"]);

    // The next release changes everything but the job.
    apply(&fleet, "two", migrate);
    fleet.await_rollout("shop", "completed");
    let second = [
        "hook",
        "web stops",
        "db stops",
        "migrate",
        "db two",
        "web two",
    ];
    assert_eq!(journal(&fleet)[3..], second);

    // A release whose job fails goes back as a whole, and what waits for the job never starts.
    let before = journal(&fleet).len();
    apply(&fleet, "three", "echo broken >> /data/journal; exit 3");
    let rollout = fleet.await_rollout("shop", "rolled-back");
    assert!(rollout["state"] == "rolled-back", "{rollout}");
    wait_for("the release before to run", LONG, || {
        let lines = journal(&fleet);
        match lines.last().map(String::as_str) {
            Some("web two") => Ok(()),
            _ => Err(lines),
        }
    });
    let third = journal(&fleet)[before..].to_vec();
    assert!(third.contains(&"broken".to_owned()), "{third:?}");
    assert!(
        !third.iter().any(|line| line.ends_with("three")),
        "{third:?}"
    );

    // An agent that starts again leaves the job alone.
    let jobs = |fleet: &Fleet| {
        journal(fleet)
            .iter()
            .filter(|line| *line == "migrate")
            .count()
    };
    let done = jobs(&fleet);
    fleet.devices[0].kill9();
    fleet.devices[0].restart();
    fleet.await_online(1);
    let _ = await_container(&bed, "device-1", "shop", "a-web");
    assert_eq!(jobs(&fleet), done);
}

#[test]
fn a_container_whose_liveness_probe_fails_is_stopped_and_started_again_and_the_hub_learns_why() {
    let (bed, builder) = bed("liveness");
    let fleet = Fleet::start(&bed, Hub::start(&bed), 1);
    let image = import(&fleet.api(), &builder, "v1");
    let manifest = journal_app(&image, "one", "true");
    fleet.api().apply("shop", &manifest).ok();
    fleet.await_rollout("shop", "completed");
    let first = await_container(&bed, "device-1", "shop", "a-web");
    let db = await_container(&bed, "device-1", "shop", "db");
    std::fs::write(data(&fleet).join("hang"), "").expect("the volume is a directory here");
    wait_until("the container to be stopped", LONG, || {
        journal(&fleet).contains(&"web stops".to_owned())
    });
    wait_for("the hub to learn why", LONG, || {
        let status = status(&fleet);
        let told = status["reason"]["code"] == "probe-failed"
            && status["reason"]["message"]
                .as_str()
                .is_some_and(|message| message.contains("liveness"));
        if told { Ok(()) } else { Err(status) }
    });
    std::fs::remove_file(data(&fleet).join("hang")).expect("it was made above");
    let second = wait_for("another container", LONG, || {
        container(&bed, "device-1", "shop", "a-web")
            .filter(|other| *other != first)
            .ok_or("none")
    });
    wait_for("it to be well", LONG, || {
        let status = status(&fleet);
        let well = status["services"]
            .as_array()
            .is_some_and(|services| services.iter().all(|service| service["ready"] == true));
        if well { Ok(()) } else { Err(status) }
    });
    assert_eq!(container(&bed, "device-1", "shop", "a-web"), Some(second));
    assert_eq!(container(&bed, "device-1", "shop", "db"), Some(db));
    await_told(&fleet, "the liveness probe fails");
}

#[test]
fn an_app_that_holds_its_update_lock_is_not_updated_until_it_lets_go_or_the_operator_says_so() {
    let bed = Bed::new("lock");
    let builder = Builder::new(&bed);
    // Debian's static busybox has no flock.
    builder.image("v1", &[], |root| copy_program("/usr/bin/flock", root));
    let fleet = Fleet::start(&bed, Hub::start(&bed), 1);
    let image = import(&fleet.api(), &builder, "v1");
    // Holds the lock while /data/busy is there, and says when it has it.
    let apply = |release: &str| {
        let manifest = format!(
            "apiVersion: foreshore/v1
kind: App
metadata: {{name: shop}}
spec:
  services:
    web:
      image: {image}
      mem_limit: 32m
      environment: {{RELEASE: {release}}}
      entrypoint: [/bin/sh, -c]
      command: ['flock /run/foreshore/update.lock sh -c \"echo $RELEASE > /data/has; while test -e /data/busy; do sleep 0.1; done\"; exec sleep 1000']
      volumes: ['data:/data']
      update_lock: true
      stop_grace_period: 1s
  rollout: {{waves: [{{percent: 100}}], soak: 500ms, bake: 0s, progressDeadline: 30s, maxUnavailable: 100%}}
"
        );
        fleet.api().apply("shop", &manifest).ok();
    };
    let has = || std::fs::read_to_string(data(&fleet).join("has")).unwrap_or_default();
    let busy = || std::fs::write(data(&fleet).join("busy"), "").expect("writable");
    std::fs::create_dir_all(data(&fleet)).expect("writable");
    busy();
    apply("one");
    fleet.await_rollout("shop", "completed");
    wait_until("the lock to be taken", LONG, || has() == "one\n");
    let first = await_container(&bed, "device-1", "shop", "web");

    let blocked = || {
        wait_for("the update to be held back", LONG, || {
            let status = status(&fleet);
            if status["reason"]["code"] == "update-locked" {
                Ok(())
            } else {
                Err(status)
            }
        });
    };
    apply("two");
    blocked();
    assert_eq!(container(&bed, "device-1", "shop", "web"), Some(first));
    // An app that dies lets go of it: nothing stays locked by accident.
    std::fs::remove_file(data(&fleet).join("busy")).expect("it was made above");
    fleet.await_rollout("shop", "completed");
    wait_until("the lock to be taken over", LONG, || has() == "two\n");

    // The second release does not hold it any more; the third takes it again.
    busy();
    apply("three");
    fleet.await_rollout("shop", "completed");
    wait_until("the lock to be taken again", LONG, || has() == "three\n");
    apply("four");
    blocked();
    let rollout = fleet.api().rollout("shop");
    let path = format!("/rollouts/{}/override-locks", rollout["id"]);
    fleet.api().send("POST", &path, b"").ok();
    fleet.await_rollout("shop", "completed");
    let again = fleet.api().send("POST", &path, b"");
    assert_eq!(again.code(), "rollout-is-final");
}

#[test]
fn start_first_serves_without_a_break_through_a_good_and_a_bad_update() {
    let (bed, builder) = bed("beside");
    builder.web("v2", "two", true);
    builder.web("v3", "three", false);
    let fleet = Fleet::start(&bed, Hub::start(&bed), 1);
    let apply = |tag: &str| {
        let image = import(&fleet.api(), &builder, tag);
        let manifest = web_manifest("shop", &image, "[{percent: 100}]").replace(
            "stop_grace_period: 1s\n",
            // For so long both serve, as the old one does not heed that it is to end.
            "stop_grace_period: 5s\n      deploy: {update_config: {order: start-first}}\n",
        );
        fleet.api().apply("shop", &manifest).ok();
    };
    // Who answers, if anybody does.
    let versions = || {
        let mut versions: Vec<_> = containers(&bed, "device-1", "shop.server.")
            .into_iter()
            .filter_map(|identity| http_get(identity, "/version").ok())
            .collect();
        versions.sort();
        // Each has processes that it starts to answer.
        versions.dedup();
        versions
    };
    apply("v1");
    fleet.await_rollout("shop", "completed");
    assert_eq!(versions(), ["one"]);
    for (tag, end) in [("v2", "completed"), ("v3", "rolled-back")] {
        apply(tag);
        let api = fleet.api();
        let mut together = false;
        wait_for(&format!("the rollout of {tag} to end"), LONG, || {
            let versions = versions();
            assert!(!versions.is_empty(), "nobody serves");
            together |= versions.len() > 1;
            let rollout = api.rollout("shop");
            if rollout["state"] == end {
                Ok(())
            } else {
                Err(rollout)
            }
        });
        assert!(together, "never side by side in the update to {tag}");
    }
    wait_until("only the good one to be left", LONG, || {
        versions() == ["two"]
    });
    let _ = await_rollout(&fleet.api(), "shop", "rolled-back");
}

/// Containers that were kept are found again by who they are: the very processes that ran before.
#[test]
fn what_is_kept_is_taken_back_without_a_start_and_serves_without_a_break_until_its_time_is_over() {
    let (bed, builder) = bed("kept");
    for (tag, version) in [("v2", "two"), ("v3", "three"), ("v4", "four")] {
        builder.web(tag, version, true);
    }
    let mut fleet = Fleet::start(&bed, Hub::start(&bed), 1);
    let apply = |fleet: &Fleet, tag: &str, keep: &str, more: &str| {
        let image = import(&fleet.api(), &builder, tag);
        let update = format!("{{order: start-first, keep_old: {keep}}}");
        let manifest = web_manifest("shop", &image, "[{percent: 100}]")
            .replace(
                "stop_grace_period: 1s\n",
                &format!(
                    "stop_grace_period: 1s\n      deploy: {{update_config: {update}}}\n{more}"
                ),
            )
            .replace(
                "soak: 1s",
                if more.is_empty() {
                    "soak: 3s"
                } else {
                    "soak: 20s"
                },
            )
            .replace("progressDeadline: 15s", "progressDeadline: 60s");
        fleet.api().apply("shop", &manifest).ok();
    };
    let version = |identity: Identity| http_get(identity, "/version");
    // Also, for a moment each, those that the server starts to answer.
    let servers = || containers(&bed, "device-1", "shop.server.");
    let kept = |fleet: &Fleet| status(fleet)["services"][0]["kept"].clone();
    let await_kept = |fleet: &Fleet, instance: u64| {
        wait_for(
            "the old container to be told as kept",
            LONG,
            || match kept(fleet) {
                kept if kept["instance"] == instance => Ok(()),
                kept => Err(kept),
            },
        );
    };
    apply(&fleet, "v1", "10m", "");
    fleet.await_rollout("shop", "completed");
    let first = await_container(&bed, "device-1", "shop", "server");
    let mut client = Requests::begin(first, Duration::from_secs(5));

    // It serves for a while, and then ends: in the middle of its trial.
    let dies = "      entrypoint: [/bin/sh, -c]\n      command: ['httpd -p 8080 -h /www; sleep 8; exit 1']\n";
    apply(&fleet, "v2", "10m", dies);
    await_kept(&fleet, 1);
    let rollout = fleet.await_rollout("shop", "rolled-back");
    wait_until("only the first to be left", LONG, || servers() == [first]);
    assert_eq!(status(&fleet)["running"], rollout["from"]);
    await_told(&fleet, "is the service's own again; it never stopped");

    // A good one, an agent that ends and starts again meanwhile, and an operator who wants the first back.
    apply(&fleet, "v3", "10m", "");
    fleet.await_rollout("shop", "completed");
    await_kept(&fleet, 1);
    assert_eq!(version(first).as_deref(), Ok("one"));
    wait_until("both to run", LONG, || servers().len() == 2);
    fleet.devices[0].kill9();
    fleet.devices[0].restart();
    fleet.await_online(1);
    await_kept(&fleet, 1);
    fleet.api().send("POST", "/apps/shop/undo", b"").ok();
    wait_until("only the first to be left", LONG, || servers() == [first]);
    fleet.await_rollout("shop", "completed");
    wait_until("only the first to be left", LONG, || servers() == [first]);
    assert!(kept(&fleet).is_null());

    // Through all of that it answered every question.
    let (answered, failed) = client.end();
    assert!(answered.len() > 100, "{} answers", answered.len());
    assert_eq!(failed, 0, "questions without an answer");

    // In the end its time is over.
    apply(&fleet, "v4", "15s", "");
    await_kept(&fleet, 1);
    fleet.await_rollout("shop", "completed");
    wait_until("the old container to go", LONG, || {
        let servers = servers();
        servers.len() == 1 && servers != [first]
    });
    let last = await_container(&bed, "device-1", "shop", "server");
    assert_eq!(version(last).as_deref(), Ok("four"));
    wait_until("the device to say so", LONG, || kept(&fleet).is_null());
}
