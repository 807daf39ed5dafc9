//! Services whose secrets are missing or change.

use foreshore_protocol::manifest::{OnRotate, Service, StopSignal};

use super::*;
use crate::runtime::ContainerState;

fn with(mut service: Service, secrets: &[(&str, OnRotate)]) -> Service {
    for (name, on_rotate) in secrets {
        let text = format!("{{\"source\": \"{name}\", \"on_rotate\": \"{on_rotate}\"}}");
        let app = format!("{{\"image\": \"x\", \"secrets\": [{text}]}}");
        let parsed: Service = serde_json::from_str(&app).unwrap();
        service.secrets.extend(parsed.secrets);
    }
    service
}

fn web(seed: u32, secrets: &[(&str, OnRotate)]) -> Release {
    let web = with(always("good", seed), secrets);
    release("shop", &[("other", always("good", 50)), ("web", web)])
}

fn set(world: &mut World, name: &str, revision: u64) {
    world.secrets.insert(name.parse().unwrap(), revision);
}

fn revision_of(world: &World, service: &str, name: &str) -> Option<u64> {
    let container = world.containers.iter().find(|(container, ..)| {
        container.id.service.as_str() == service
            && matches!(container.state, ContainerState::Running { .. })
    });
    let (container, ..) = container?;
    container.secrets.get(name).copied()
}

#[test]
fn a_release_whose_secret_is_missing_stops_nothing_and_says_so() {
    let mut world = settled(&web(1, &[]));
    let before = world.running("shop");
    let digest = world.assign(&web(2, &[("pin", OnRotate::Restart)]));
    world.run(24 * HOUR);
    let status = world.status("shop");
    assert_eq!(status.phase, Phase::Blocked);
    let reason = status.reason.unwrap();
    assert_eq!(reason.code, ReasonCode::SecretMissing);
    assert!(reason.message.contains("secret pin"), "{reason:?}");
    assert_eq!(world.running("shop"), before);
    set(&mut world, "pin", 1);
    world.run(HOUR);
    assert_eq!(world.phase("shop"), Phase::Succeeded);
    assert_eq!(world.status("shop").running, Some(digest));
}

#[test]
fn a_service_whose_secret_was_lost_waits_for_it_after_a_reboot() {
    let mut world = World::new();
    set(&mut world, "pin", 1);
    world.assign(&web(1, &[("pin", OnRotate::Restart)]));
    world.run(HOUR);
    world.secrets.clear();
    // What runs keeps what it has.
    world.run(HOUR);
    assert_eq!(world.started.len(), 2);
    world.reboot();
    world.run(HOUR);
    let status = world.status("shop");
    assert_eq!(status.phase, Phase::Succeeded);
    assert_eq!(status.reason.unwrap().code, ReasonCode::SecretMissing);
    assert_eq!(world.running("shop").len(), 1);
    set(&mut world, "pin", 1);
    world.run(HOUR);
    assert_eq!(world.status("shop").reason, None);
    assert_eq!(world.running("shop").len(), 2);
}

#[test]
fn a_changed_secret_restarts_who_has_it_without_a_pause_or_a_failure() {
    let mut world = World::new();
    set(&mut world, "pin", 1);
    world.assign(&web(1, &[("pin", OnRotate::Restart)]));
    world.run(HOUR);
    for revision in 2..40 {
        set(&mut world, "pin", revision);
        let plan = world.turn(usize::MAX);
        assert!(matches!(&plan.steps[..], [Step::Stop { .. }]), "{plan:?}");
        let kinds: Vec<_> = plan.notices.iter().map(|notice| notice.kind).collect();
        assert_eq!(kinds, [EventKind::SecretRotated]);
        world.run(0);
        assert_eq!(revision_of(&world, "web", "pin"), Some(revision));
        let service = &world.history.apps["shop"].services["web"];
        assert_eq!(service.failures, 0);
    }
    world.run(HOUR);
    let status = world.status("shop");
    assert_eq!((status.phase, status.reason), (Phase::Succeeded, None));
    let touched = world.stopped.iter().all(|id| id.service.as_str() == "web");
    assert!(touched && world.stopped.len() == 38);
    let plan = world.turn(usize::MAX);
    assert_eq!((plan.steps, plan.wake_at), (vec![], None));
}

#[test]
fn a_secret_that_changes_during_a_trial_does_not_fail_it() {
    for soaking in [false, true] {
        let mut world = settled(&web(1, &[]));
        set(&mut world, "pin", 1);
        let digest = world.assign(&web(2, &[("pin", OnRotate::Restart)]));
        world.run(if soaking { 1_000 } else { 0 });
        for revision in 2..20 {
            set(&mut world, "pin", revision);
            world.run(SOAK_MS / 2);
        }
        assert!(!world.phase("shop").is_final());
        world.run(HOUR);
        let status = world.status("shop");
        assert_eq!(status.phase, Phase::Succeeded, "{status:?}");
        assert_eq!(status.running, Some(digest));
    }
}

#[test]
fn who_wants_so_keeps_running_and_gets_the_new_files_and_a_signal() {
    let hup = OnRotate::Signal(StopSignal::Hup);
    let usr1 = OnRotate::Signal(StopSignal::Usr1);
    let mut world = World::new();
    for name in ["kept", "hup", "usr"] {
        set(&mut world, name, 1);
    }
    world.assign(&web(
        1,
        &[("kept", OnRotate::Keep), ("hup", hup), ("usr", usr1)],
    ));
    world.run(HOUR);
    set(&mut world, "kept", 2);
    world.run(HOUR);
    set(&mut world, "hup", 3);
    set(&mut world, "usr", 4);
    world.run(HOUR);
    let signals: Vec<Vec<i32>> = world
        .renewed
        .iter()
        .map(|(_, signals)| signals.iter().copied().collect())
        .collect();
    assert_eq!(signals, [vec![], vec![1, 10]]);
    assert_eq!(world.stopped, vec![]);
    assert_eq!(revision_of(&world, "web", "usr"), Some(4));
    // A crash before it was done does it again.
    set(&mut world, "hup", 5);
    world.turn(0);
    world.crash();
    world.run(HOUR);
    assert_eq!(world.renewed.len(), 3);
    assert_eq!(world.turn(usize::MAX).steps, vec![]);
}

#[test]
fn a_job_is_not_done_twice_because_a_secret_changed() {
    let mut world = World::new();
    set(&mut world, "pin", 1);
    let mut migrate = with(
        service("exit 0 5000", 1, RestartPolicy::No),
        &[("pin", OnRotate::Restart)],
    );
    migrate.restart = RestartPolicy::No;
    world.assign(&release("shop", &[("migrate", migrate)]));
    world.run(1_000);
    set(&mut world, "pin", 2);
    world.run(HOUR);
    set(&mut world, "pin", 3);
    world.run(HOUR);
    assert_eq!((world.started.len(), world.stopped.len()), (1, 0));
    assert_eq!(world.phase("shop"), Phase::Succeeded);
}

#[test]
fn services_that_depend_on_each_other_are_restarted_in_order() {
    let pin = [("pin", OnRotate::Restart)];
    let db = with(always("good", 1), &pin);
    let web = after(with(always("good", 2), &pin), &[("db", Condition::Healthy)]);
    let mut world = World::new();
    set(&mut world, "pin", 1);
    world.assign(&release("shop", &[("db", db), ("web", web)]));
    world.run(HOUR);
    set(&mut world, "pin", 2);
    world.run(HOUR);
    let stopped: Vec<_> = world.stopped.iter().map(|id| id.service.as_str()).collect();
    assert_eq!(stopped, ["web", "db"]);
    for service in ["db", "web"] {
        assert_eq!(revision_of(&world, service, "pin"), Some(2));
    }
}

/// A release of `web` whose images are pulled with `login`.
fn private(seed: u32) -> Release {
    let mut release = web(seed, &[]);
    release.image_pull_secrets = vec!["login".parse().unwrap()];
    release
}

fn is_staging(plan: &Plan) -> bool {
    matches!(plan.steps[..], [Step::Stage { .. }])
}

#[test]
fn a_refused_pull_goes_on_at_once_when_its_secret_changes() {
    let mut world = settled(&web(1, &[]));
    world.registry = Some(ReasonCode::ImageNotFound);
    set(&mut world, "login", 1);
    set(&mut world, "other", 1);
    let digest = world.assign(&private(2));
    world.run(HOUR);
    assert_eq!(world.phase("shop"), Phase::Blocked);
    let failures = |world: &World| world.history.staging[&digest].failures;
    let before = failures(&world);
    assert!(before > 2);
    // Another secret is none of its business.
    world.now.ms = world.now.ms.plus(1);
    set(&mut world, "other", 2);
    assert!(!is_staging(&world.turn(0)));
    set(&mut world, "login", 2);
    assert!(is_staging(&world.turn(1)));
    // Once: the new value was of no use either.
    assert_eq!(failures(&world), before + 1);
    assert!(!is_staging(&world.turn(0)));
    world.registry = None;
    set(&mut world, "login", 3);
    world.run(HOUR);
    assert_eq!(world.phase("shop"), Phase::Succeeded);
    assert_eq!(world.status("shop").running, Some(digest));
    // From now on it is nothing to what runs.
    let (started, stopped) = (world.started.len(), world.stopped.len());
    set(&mut world, "login", 4);
    let plan = world.run(HOUR);
    assert_eq!((plan.steps, plan.wake_at), (vec![], None));
    assert_eq!(
        (world.started.len(), world.stopped.len()),
        (started, stopped)
    );
    assert_eq!(world.renewed, vec![]);
}

#[test]
fn a_pull_under_way_with_an_old_secret_is_tried_again_with_the_new_one() {
    let mut world = settled(&web(1, &[]));
    set(&mut world, "login", 1);
    let release = world.assign(&private(2));
    world.turn(usize::MAX);
    assert!(is_staging(&world.turn(0)));
    // It began with 1, and ends when 2 is there already.
    set(&mut world, "login", 2);
    let failed = Outcome::StagingFailed {
        release,
        reason: Reason::new(ReasonCode::ImageNotFound, None, "no"),
        logins: [("login".parse().unwrap(), 1)].into(),
    };
    world.history.record(&failed, world.now);
    assert!(is_staging(&world.turn(0)));
}

#[test]
fn images_wait_for_the_secret_they_are_pulled_with_and_those_that_are_here_do_not() {
    let mut world = settled(&web(1, &[]));
    let digest = world.assign(&private(2));
    world.run(HOUR);
    let status = world.status("shop");
    assert_eq!(status.phase, Phase::Blocked);
    let why = status.reason.unwrap();
    assert_eq!(why.code, ReasonCode::SecretMissing);
    assert!(why.message.contains("secret login"), "{why:?}");
    set(&mut world, "login", 1);
    world.run(HOUR);
    assert_eq!(world.status("shop").running, Some(digest));

    let mut world = settled(&web(1, &[]));
    // Of the same images.
    let mut release = web(1, &[]);
    release.image_pull_secrets = vec!["login".parse().unwrap()];
    let digest = world.assign(&release);
    let (started, stopped) = (world.started.len(), world.stopped.len());
    world.run(HOUR);
    assert_eq!(world.phase("shop"), Phase::Succeeded);
    assert_eq!(world.status("shop").running, Some(digest));
    assert_eq!(
        (world.started.len(), world.stopped.len()),
        (started, stopped)
    );
}
