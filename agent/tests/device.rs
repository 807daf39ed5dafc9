//! The agent's loop with a real broker, a real registry endpoint and the real image store; only containers
//! are fake. Needs `mosquitto`.

#![expect(
    clippy::unwrap_used,
    unreachable_pub,
    reason = "this is a test in several files"
)]

#[path = "device/bed.rs"]
mod bed;
#[path = "device/hub.rs"]
mod hub;
#[path = "device/registry.rs"]
mod registry;

use bed::{Bed, Device, shop, wait_for};
use foreshore_agent::runtime::ContainerState;
use foreshore_agent::runtime::Exit;
use foreshore_agent::runtime::fake::{Call, Fault};
use foreshore_protocol::manifest::NetworkMode;
use foreshore_protocol::message::{EventKind, Phase, ReasonCode};

/// Runs an async test on the one thread that the agent runs on.
fn run(test: impl Future<Output = ()>) {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
        .block_on(tokio::task::LocalSet::new().run_until(test));
}

#[test]
fn a_release_is_fetched_staged_started_and_reported_and_an_agent_restart_touches_nothing() {
    run(async {
        let bed = Bed::new();
        let release = bed.release(&shop("one"));
        let mut device = Device::start(&bed).await;
        bed.hub.assign(1, &release);
        let status = device.phase("shop", Phase::Succeeded).await;
        assert_eq!(status.running, Some(release.digest()));
        assert_eq!(status.last_known_good, Some(release.digest()));
        let starts = device.starts();
        assert_eq!(starts, 1);
        let boot = bed.hub.reported().unwrap().boot;

        device.kill().await;
        device.restart().await;
        wait_for("a report of the next boot", || {
            bed.hub.reported().filter(|report| report.boot > boot)
        })
        .await;
        device.phase("shop", Phase::Succeeded).await;
        wait_for("the adoption to be told", || {
            bed.hub.event(EventKind::Adopted)
        })
        .await;
        assert_eq!(device.starts(), starts);
        assert!(
            !device
                .runtime
                .calls()
                .iter()
                .any(|call| matches!(call, Call::Stop(_) | Call::Remove(_)))
        );
    });
}

#[test]
fn the_highest_head_wins_and_older_ones_are_ignored_also_after_a_restart() {
    run(async {
        let bed = Bed::new();
        let (one, two) = (bed.release(&shop("one")), bed.release(&shop("two")));
        // All this waits in the broker before the device comes.
        bed.hub.assign(7, &two);
        let mut device = Device::start(&bed).await;
        device.phase("shop", Phase::Succeeded).await;
        bed.hub.assign(3, &one);
        device.kill().await;
        device.restart().await;
        wait_for("the device to have seen the old head", || {
            bed.hub
                .presences()
                .pop()
                .filter(|presence| presence.online && presence.session > 1)
        })
        .await;
        bed.hub.resync();
        let status = device.phase("shop", Phase::Succeeded).await;
        assert_eq!(status.release, two.digest());
        assert_eq!(device.starts(), 1);
    });
}

#[test]
fn wrong_bytes_for_a_manifest_are_named_and_the_right_ones_taken_later() {
    run(async {
        let bed = Bed::new();
        let release = bed.release(&shop("one"));
        bed.hub
            .publish_release(&release.digest(), b"{\"schema\":1}");
        let device = Device::start(&bed).await;
        bed.hub.assign_only(1, &release);
        let status = device.phase("shop", Phase::Blocked).await;
        let reason = status.reason.unwrap();
        assert_eq!(reason.code, ReasonCode::BadRelease);
        assert!(
            reason.message.contains(&release.digest().short()),
            "{reason:?}"
        );
        bed.hub
            .publish_release(&release.digest(), &release.to_canonical_json());
        device.phase("shop", Phase::Succeeded).await;
    });
}

#[test]
fn a_service_that_is_never_ready_brings_the_old_release_back() {
    run(async {
        let bed = Bed::new();
        let good = bed.release(&shop("one"));
        let mut probed = shop("two");
        probed.probes = serde_json::from_value(serde_json::json!({
            "readiness": {"tcp": {"port": 80}, "period": "100ms"}
        }))
        .unwrap();
        let bad = bed.release(&probed);
        let device = Device::start(&bed).await;
        bed.hub.assign(1, &good);
        device.phase("shop", Phase::Succeeded).await;
        bed.hub
            .publish_release(&bad.digest(), &bad.to_canonical_json());
        // Long enough for a probe's first answer, also on an emulated machine.
        bed.hub.assign_within(2, &bad, 10_000);
        let status = device.phase("shop", Phase::RolledBack).await;
        let reason = status.reason.unwrap();
        assert_eq!(reason.code, ReasonCode::DeadlineExceeded);
        assert!(reason.message.contains("port 80"), "{reason:?}");
        device.running("shop", &good).await;
        wait_for("the event", || bed.hub.event(EventKind::RolledBack)).await;
    });
}

#[test]
fn a_container_that_dies_is_started_again_without_broker_and_hub() {
    run(async {
        let bed = Bed::new();
        let release = bed.release(&shop("one"));
        let device = Device::start(&bed).await;
        bed.hub.assign(1, &release);
        device.phase("shop", Phase::Succeeded).await;
        bed.hub.stop_broker();
        let first = device.runtime.containers()[0].id.clone();
        device.runtime.exit(
            &first,
            Exit {
                code: 3,
                oom: false,
                signal: None,
            },
        );
        wait_for("another instance", || {
            device.runtime.containers().into_iter().find(|container| {
                container.id.instance > first.instance
                    && matches!(container.state, ContainerState::Running { .. })
            })
        })
        .await;
        // The hub learns of it when it is back.
        bed.hub.start_broker();
        wait_for("the end to be told", || {
            bed.hub
                .event(EventKind::Exited)
                .filter(|event| event.message.contains("code 3"))
        })
        .await;
        wait_for("the restart to be reported", || {
            bed.hub
                .reported()
                .filter(|report| report.apps[0].services[0].restarts == 1)
        })
        .await;
    });
}

#[test]
fn a_stop_that_takes_long_does_not_keep_the_agent_from_a_newer_head() {
    run(async {
        let bed = Bed::new();
        let (one, two) = (bed.release(&shop("one")), bed.release(&shop("two")));
        let device = Device::start(&bed).await;
        bed.hub.assign(1, &one);
        device.phase("shop", Phase::Succeeded).await;
        let first = device.runtime.containers()[0].id.clone();
        device
            .runtime
            .inject(Call::Stop(first.clone()), Fault::Crash);
        bed.hub.assign(2, &two);
        wait_for("the stop to hang", || {
            device
                .runtime
                .calls()
                .contains(&Call::Stop(first.clone()))
                .then_some(())
        })
        .await;
        bed.hub.assign(3, &one);
        wait_for("the newer head to be reported", || {
            bed.hub.reported().filter(|report| {
                report
                    .version
                    .is_some_and(|version| version.generation.get() == 3)
            })
        })
        .await;
        // The old release is wanted again and still runs.
        device.phase("shop", Phase::Succeeded).await;
    });
}

#[test]
fn a_start_that_fails_is_tried_again_and_a_refused_one_is_not() {
    run(async {
        let bed = Bed::new();
        let (one, two) = (bed.release(&shop("one")), bed.release(&shop("two")));
        let device = Device::start(&bed).await;
        device.runtime.inject(
            Call::Start("shop.web.1".parse().unwrap()),
            Fault::Fail("no cgroup".to_owned()),
        );
        bed.hub.assign(1, &one);
        device.phase("shop", Phase::Succeeded).await;
        assert_eq!(device.starts(), 2);
        device.runtime.inject(
            Call::Start("shop.web.3".parse().unwrap()),
            Fault::Refuse("no such command".to_owned()),
        );
        bed.hub.assign(2, &two);
        let status = device.phase("shop", Phase::RolledBack).await;
        assert_eq!(status.reason.unwrap().code, ReasonCode::StartFailed);
        device.running("shop", &one).await;
    });
}

#[test]
fn what_the_hub_did_not_acknowledge_is_sent_again() {
    run(async {
        let bed = Bed::new();
        bed.hub.acknowledge(false);
        let release = bed.release(&shop("one"));
        let mut device = Device::start(&bed).await;
        bed.hub.assign(1, &release);
        device.phase("shop", Phase::Succeeded).await;
        let told = wait_for("the success to be told", || {
            bed.hub.event(EventKind::Succeeded)
        })
        .await;
        bed.hub.forget_events();
        device.kill().await;
        device.restart().await;
        let again = wait_for("it to be told again", || {
            bed.hub.event(EventKind::Succeeded)
        })
        .await;
        assert_eq!(told, again);
        bed.hub.acknowledge(true);
        bed.hub.resync();
        wait_for("the outbox to be empty", || {
            let newest = bed.hub.newest_event()?;
            (device.unacknowledged() == 0).then_some(newest)
        })
        .await;
    });
}

#[test]
fn events_travel_together_and_a_stop_does_not_keep_them() {
    run(async {
        let bed = Bed::new();
        let release = bed.release(&shop("one"));
        let began = std::time::Instant::now();
        let mut device = Device::start(&bed).await;
        bed.hub.assign(1, &release);
        device.phase("shop", Phase::Succeeded).await;
        // Before the success has waited its second for others.
        device.stop().await;
        wait_for("the success to be told", || {
            bed.hub.event(EventKind::Succeeded)
        })
        .await;
        let (events, messages) = bed.hub.events();
        let seconds = usize::try_from(began.elapsed().as_secs()).unwrap();
        assert!(
            messages < events && messages <= seconds + 2,
            "{events} events in {messages} messages and {seconds} s"
        );
    });
}

#[test]
fn an_unknown_image_blocks_and_the_old_release_runs_on() {
    run(async {
        let bed = Bed::new();
        let good = bed.release(&shop("one"));
        let missing = bed.release_with(&shop("two"), "hub.internal/none@sha256:0000000000000000000000000000000000000000000000000000000000000000");
        let device = Device::start(&bed).await;
        bed.hub.assign(1, &good);
        device.phase("shop", Phase::Succeeded).await;
        bed.hub.assign(2, &missing);
        let status = device.phase("shop", Phase::Blocked).await;
        assert_eq!(status.reason.unwrap().code, ReasonCode::ImageNotFound);
        assert_eq!(status.running, Some(good.digest()));
        device.running("shop", &good).await;
    });
}

#[test]
fn an_app_that_is_withdrawn_is_removed_and_its_images_collected() {
    run(async {
        let bed = Bed::new();
        let release = bed.release(&shop("one"));
        let device = Device::start(&bed).await;
        bed.hub.assign(1, &release);
        device.phase("shop", Phase::Succeeded).await;
        assert_eq!(device.images(), 1);
        bed.hub.withdraw(2);
        wait_for("an empty report", || {
            bed.hub.reported().filter(|report| {
                report.apps.is_empty()
                    && report
                        .version
                        .is_some_and(|version| version.generation.get() == 2)
            })
        })
        .await;
        assert!(device.runtime.containers().is_empty());
        wait_for("the images to go", || (device.images() == 0).then_some(())).await;
    });
}

#[test]
fn a_clean_end_says_so_at_once_and_a_dead_agent_is_told_by_its_will() {
    run(async {
        let bed = Bed::new();
        let mut device = Device::start(&bed).await;
        let birth = wait_for("the birth", || {
            bed.hub.presences().pop().filter(|presence| presence.online)
        })
        .await;
        device.stop().await;
        let end = wait_for("the goodbye", || {
            bed.hub
                .presences()
                .pop()
                .filter(|presence| !presence.online)
        })
        .await;
        assert_eq!(end.session, birth.session);

        device.restart().await;
        let birth = wait_for("the next birth", || {
            bed.hub
                .presences()
                .pop()
                .filter(|presence| presence.online && presence.session > birth.session)
        })
        .await;
        device.kill().await;
        let will = wait_for("the will", || {
            bed.hub
                .presences()
                .pop()
                .filter(|presence| !presence.online)
        })
        .await;
        assert_eq!(will.session, birth.session);
    });
}

#[test]
fn damaged_state_is_set_aside_told_and_rebuilt_around_what_runs() {
    run(async {
        let bed = Bed::new();
        let release = bed.release(&shop("one"));
        let mut device = Device::start(&bed).await;
        bed.hub.assign(1, &release);
        device.phase("shop", Phase::Succeeded).await;
        let report = bed.hub.reported().unwrap();
        for damage in [&b""[..], &[0; 4096], b"not a frame"] {
            device.kill().await;
            for name in ["head", "history", "counters", "events"] {
                std::fs::write(device.state_dir().join(name), damage).unwrap();
            }
            bed.hub.forget_events();
            device.restart().await;
            wait_for("the damage to be told", || {
                bed.hub.event(EventKind::StateCorrupt)
            })
            .await;
            wait_for("a newer report", || {
                bed.hub
                    .reported()
                    .filter(|newer| newer.boot > report.boot && newer.version.is_some())
            })
            .await;
            device.phase("shop", Phase::Succeeded).await;
        }
        assert_eq!(device.starts(), 1);
    });
}

#[test]
fn a_release_that_the_policy_denies_is_rejected_until_the_owner_allows_it() {
    run(async {
        let bed = Bed::new();
        let one = bed.release(&shop("one"));
        let mut host = shop("two");
        host.network_mode = NetworkMode::Host;
        let two = bed.release(&host);
        let device = Device::start(&bed).await;
        bed.hub.assign(1, &one);
        device.phase("shop", Phase::Succeeded).await;
        bed.hub.assign(2, &two);
        let reason = device.phase("shop", Phase::Rejected).await.reason.unwrap();
        assert_eq!(reason.code, ReasonCode::PolicyDenied);
        let file = bed.policy_file();
        assert!(
            reason.message.contains("host_network = true")
                && reason.message.contains(&file.display().to_string()),
            "{reason:?}"
        );
        device.running("shop", &one).await;
        // No signal, no restart: the file is read again when it changed.
        std::fs::write(&file, "[apps.shop]\nhost_network = true\n").unwrap();
        bed.hub.assign(3, &two);
        device.phase("shop", Phase::Succeeded).await;
        device.running("shop", &two).await;
    });
}

#[test]
fn a_release_that_cuts_its_device_off_is_taken_back_by_the_device_if_it_must_reach_the_hub() {
    run(async {
        let bed = Bed::new();
        let (one, two) = (bed.release(&shop("one")), bed.release(&shop("two")));
        let device = Device::start(&bed).await;
        bed.hub.assign(1, &one);
        device.phase("shop", Phase::Succeeded).await;
        // Nothing is heard of the hub, but the session is there; then the network swallows everything.
        bed.hub.acknowledge(false);
        bed.hub.assign_requiring_hub(2, &two, 8_000);
        device.phase("shop", Phase::Soaking).await;
        bed.hub.freeze_broker(true);
        wait_for("the release of before to be started again", || {
            (device.starts() == 3).then_some(())
        })
        .await;
        bed.hub.freeze_broker(false);
        let status = device.phase("shop", Phase::RolledBack).await;
        assert_eq!(status.reason.unwrap().code, ReasonCode::HubUnreachable);
        device.running("shop", &one).await;
    });
}

#[test]
fn a_broker_that_is_away_takes_no_release_back() {
    run(async {
        let bed = Bed::new();
        let (one, two) = (bed.release(&shop("one")), bed.release(&shop("two")));
        let device = Device::start(&bed).await;
        bed.hub.assign(1, &one);
        device.phase("shop", Phase::Succeeded).await;
        bed.hub.acknowledge(false);
        bed.hub.assign_requiring_hub(2, &two, 8_000);
        device.phase("shop", Phase::Soaking).await;
        bed.hub.stop_broker();
        // Longer than it may wait for the hub.
        tokio::time::sleep(std::time::Duration::from_secs(10)).await;
        assert_eq!(device.starts(), 2, "nothing was taken back");
        bed.hub.start_broker();
        let status = device.phase("shop", Phase::Succeeded).await;
        assert_eq!(status.running, Some(two.digest()));
        assert_eq!(status.last_known_good, Some(two.digest()));
    });
}
