//! The planner against a model device: examples first, then properties.

use foreshore_protocol::manifest::{Condition, Dependency, RestartPolicy, UpdateOrder};
use foreshore_protocol::message::{Phase, Reason, ReasonCode, ServiceState};
use foreshore_protocol::release::Release;

use super::world::{DEADLINE_MS, SOAK_MS, World, release, service};
use super::*;

const HOUR: u64 = 3_600_000;

fn always(behaviour: &str, seed: u32) -> foreshore_protocol::manifest::Service {
    service(behaviour, seed, RestartPolicy::Always)
}

fn web(behaviour: &str, seed: u32) -> Release {
    release("shop", &[("web", always(behaviour, seed))])
}

/// A world in which `release` is the last-known-good.
fn settled(release: &Release) -> World {
    let mut world = World::new();
    world.assign(release);
    world.run(HOUR);
    assert_eq!(world.phase("shop"), Phase::Succeeded);
    world
}

#[test]
fn a_first_release_is_fetched_staged_started_soaked_and_then_good() {
    let mut world = World::new();
    let v1 = web("good", 1);
    let digest = world.assign(&v1);
    assert_eq!(world.turn(0).fetch, [digest].into());
    assert_eq!(world.phase("shop"), Phase::Accepted);
    world.turn(usize::MAX);
    let staging = world.turn(usize::MAX);
    assert!(
        matches!(&staging.steps[..], [Step::Stage { .. }]),
        "{staging:?}"
    );
    assert_eq!(staging.status[0].phase, Phase::Staging);
    world.turn(usize::MAX);
    assert_eq!(world.phase("shop"), Phase::Activating);
    world.run(100);
    assert_eq!(world.phase("shop"), Phase::Soaking);
    world.run(SOAK_MS - 1);
    assert_eq!(world.phase("shop"), Phase::Soaking);
    world.run(1);
    let status = world.status("shop");
    assert_eq!(status.phase, Phase::Succeeded);
    assert_eq!(
        (status.running, status.last_known_good),
        (Some(digest), Some(digest))
    );
}

#[test]
fn at_the_desired_state_a_plan_is_empty_and_nobody_is_woken() {
    let mut world = settled(&web("good", 1));
    let plan = world.turn(usize::MAX);
    assert_eq!((plan.steps, plan.wake_at), (vec![], None));
    assert_eq!(plan.history, world.history);
    assert!(plan.fetch.is_empty() && plan.notices.is_empty());
}

#[test]
fn unchanged_services_run_on_untouched() {
    let db = always("good", 7);
    let first = release("shop", &[("db", db.clone()), ("web", always("good", 1))]);
    let second = release("shop", &[("db", db), ("web", always("good", 2))]);
    let mut world = settled(&first);
    let digest = world.assign(&second);
    world.run(HOUR);
    assert_eq!(world.status("shop").running, Some(digest));
    let touched: Vec<_> = world.stopped.iter().map(|id| id.service.as_str()).collect();
    assert_eq!(touched, ["web"]);
    assert_eq!(world.running("shop")["db"], first.digest());
}

#[test]
fn a_release_that_is_never_ready_is_given_up_once_and_for_all() {
    let good = web("good", 1);
    let mut world = settled(&good);
    let bad = world.assign(&web("never-ready", 2));
    world.run(HOUR);
    let status = world.status("shop");
    assert_eq!(status.phase, Phase::RolledBack);
    let reason = status.reason.unwrap();
    assert_eq!(reason.code, ReasonCode::DeadlineExceeded);
    assert!(
        reason.message.contains("connection refused") && reason.message.contains("30s"),
        "{reason:?}"
    );
    assert_eq!(status.running, Some(good.digest()));
    assert_eq!(world.running("shop")["web"], good.digest());
    // Another generation without a new assignment, a crash and a reboot: it is not tried again.
    world.desired.version = Version::from_numbers(1, 99).ok();
    world.crash();
    world.run(HOUR);
    world.reboot();
    world.run(HOUR);
    let tried = world.started.iter().filter(|(_, release)| *release == bad);
    assert_eq!(tried.count(), 1);
    assert_eq!(world.phase("shop"), Phase::RolledBack);
}

#[test]
fn a_service_that_dies_or_sickens_during_the_soak_fails_the_release() {
    for (behaviour, code) in [
        ("exit 7 2000", ReasonCode::Exited),
        ("unready 2000", ReasonCode::NotReady),
    ] {
        let mut world = settled(&web("good", 1));
        world.assign(&web(behaviour, 2));
        world.run(2_200);
        let status = world.status("shop");
        assert_eq!(status.phase, Phase::RolledBack, "{behaviour}");
        assert_eq!(status.reason.unwrap().code, code, "{behaviour}");
    }
}

#[test]
fn a_trial_whose_manifest_is_lost_offline_ends_at_its_deadline() {
    let good = web("good", 1);
    let mut world = settled(&good);
    let lost = world.assign(&web("never-ready", 2));
    world.run(1_000);
    assert_eq!(world.phase("shop"), Phase::Activating);
    world.releases.remove(&lost);
    world.hub_reachable = false;
    world.run(DEADLINE_MS - 1_001);
    assert_eq!(world.phase("shop"), Phase::Activating);
    world.run(10_000);
    let status = world.status("shop");
    assert_eq!(status.phase, Phase::RolledBack);
    assert_eq!(status.reason.unwrap().code, ReasonCode::DeadlineExceeded);
    assert_eq!(world.running("shop")["web"], good.digest());
}

#[test]
fn a_trial_whose_manifest_is_lost_and_has_nothing_to_go_back_to_waits_for_it() {
    let mut world = World::new();
    let only = world.assign(&web("good", 1));
    world.run(1_000);
    world.releases.remove(&only);
    world.hub_reachable = false;
    world.run(HOUR);
    assert_eq!(world.phase("shop"), Phase::Activating);
    assert_eq!(world.running("shop")["web"], only);
    world.hub_reachable = true;
    world.run(HOUR);
    assert_eq!(world.phase("shop"), Phase::Succeeded);
}

#[test]
fn services_that_no_release_has_any_more_are_forgotten_and_their_numbers_never_used_again() {
    let first = release(
        "shop",
        &[("old", always("good", 1)), ("web", always("good", 2))],
    );
    let second = release("shop", &[("web", always("good", 3))]);
    let third = release("shop", &[("web", always("good", 4))]);
    let mut world = settled(&first);
    world.assign(&second);
    world.run(HOUR);
    world.assign(&third);
    world.run(HOUR);
    let known = world.history.apps.values().next().unwrap().services.keys();
    assert_eq!(known.map(|name| name.as_str()).collect::<Vec<_>>(), ["web"]);
    // A number used twice fails in the model device.
    world.assign(&first);
    world.run(HOUR);
    assert_eq!(world.phase("shop"), Phase::Succeeded);
}

/// A service that waits for others.
fn after(
    mut service: foreshore_protocol::manifest::Service,
    others: &[(&str, Condition)],
) -> foreshore_protocol::manifest::Service {
    service.depends_on = others
        .iter()
        .map(|(name, condition)| {
            let condition = *condition;
            (name.parse().unwrap(), Dependency { condition })
        })
        .collect();
    service
}

fn started(world: &World) -> Vec<String> {
    world
        .started
        .iter()
        .map(|(id, _)| format!("{}.{}", id.service, id.instance))
        .collect()
}

fn job(behaviour: &str, seed: u32) -> foreshore_protocol::manifest::Service {
    service(behaviour, seed, RestartPolicy::No)
}

#[test]
fn services_start_after_what_they_depend_on_and_stop_before_it() {
    let shop = |seed| {
        release(
            "shop",
            &[
                (
                    "a-web",
                    after(always("good", seed), &[("db", Condition::Healthy)]),
                ),
                (
                    "db",
                    after(
                        always("good", 100 + seed),
                        &[
                            ("migrate", Condition::Completed),
                            ("z-log", Condition::Started),
                        ],
                    ),
                ),
                ("migrate", job("exit 0 500", 200 + seed)),
                ("z-log", always("good", 300 + seed)),
            ],
        )
    };
    let mut world = World::new();
    world.assign(&shop(1));
    world.run(300);
    assert_eq!(started(&world), ["migrate.1", "z-log.1"]);
    let status = world.status("shop");
    let web = status
        .services
        .iter()
        .find(|s| s.service.as_str() == "a-web");
    assert_eq!(web.unwrap().state, ServiceState::Waiting);
    world.run(HOUR);
    assert_eq!(started(&world), ["migrate.1", "z-log.1", "db.1", "a-web.1"]);
    assert_eq!(world.phase("shop"), Phase::Succeeded);
    // Everything changes: stopped from the outside in, started again from the inside out.
    world.assign(&shop(2));
    world.run(HOUR);
    assert_eq!(world.phase("shop"), Phase::Succeeded);
    let stopped: Vec<_> = world.stopped.iter().map(|id| id.service.as_str()).collect();
    assert_eq!(stopped, ["a-web", "db", "z-log"]);
    assert_eq!(
        started(&world)[4..],
        ["migrate.2", "z-log.2", "db.2", "a-web.2"]
    );
    // After a reboot the job is done and the order holds.
    world.reboot();
    world.run(HOUR);
    assert_eq!(started(&world)[8..], ["z-log.3", "db.3", "a-web.3"]);
    world.unassign(&"shop".parse().unwrap());
    world.run(HOUR);
    let stopped: Vec<_> = world.stopped[3..]
        .iter()
        .map(|id| id.service.as_str())
        .collect();
    assert_eq!(stopped, ["a-web", "db", "z-log"]);
}

#[test]
fn a_service_that_died_comes_back_although_what_it_depends_on_is_unwell() {
    let shop = release(
        "shop",
        &[
            ("db", always("unready 10000", 1)),
            (
                "web",
                after(always("good", 2), &[("db", Condition::Healthy)]),
            ),
        ],
    );
    let mut world = settled(&shop);
    let db_is_ill = world.status("shop");
    assert!(!db_is_ill.services[0].ready, "{db_is_ill:?}");
    world
        .containers
        .retain(|(container, ..)| container.id.service.as_str() != "web");
    world.run(HOUR);
    assert_eq!(started(&world), ["db.1", "web.1", "web.2"]);
}

#[test]
fn a_job_that_fails_fails_the_release_and_who_waits_for_it_never_starts() {
    let good = web("good", 1);
    let mut world = settled(&good);
    let broken = release(
        "shop",
        &[
            ("migrate", job("exit 3 100", 1)),
            (
                "web",
                after(always("good", 2), &[("migrate", Condition::Completed)]),
            ),
        ],
    );
    world.assign(&broken);
    world.run(1_000);
    let status = world.status("shop");
    assert_eq!(status.phase, Phase::RolledBack);
    let reason = status.reason.unwrap();
    assert_eq!(
        (reason.code, reason.service.unwrap().as_str()),
        (ReasonCode::Exited, "migrate")
    );
    world.run(HOUR);
    // The old one was replaced only when its turn came: it never ended.
    assert_eq!(world.running("shop")["web"], good.digest());
}

#[test]
fn going_back_keeps_the_order_too() {
    let shop = |web: &str, seed| {
        release(
            "shop",
            &[
                (
                    "a-web",
                    after(always(web, seed), &[("db", Condition::Healthy)]),
                ),
                (
                    "db",
                    after(
                        always("good", 100 + seed),
                        &[("migrate", Condition::Completed)],
                    ),
                ),
                ("migrate", job("exit 0 500", 200 + seed)),
            ],
        )
    };
    let mut world = settled(&shop("good", 1));
    world.assign(&shop("never-ready", 2));
    world.run(HOUR);
    assert_eq!(world.phase("shop"), Phase::RolledBack);
    let order: Vec<_> = world
        .started
        .iter()
        .map(|(id, _)| id.service.as_str())
        .collect();
    assert_eq!(order, ["migrate", "db", "a-web"].repeat(3));
}

#[test]
fn a_job_runs_once_for_each_release_and_not_again_after_a_restart_or_reboot() {
    let shop = |seed| {
        let web = after(always("good", seed), &[("init", Condition::Completed)]);
        release("shop", &[("init", job("exit 0 100", 1)), ("web", web)])
    };
    let mut world = settled(&shop(1));
    world.crash();
    world.run(HOUR);
    world.reboot();
    world.run(HOUR);
    assert_eq!(started(&world), ["init.1", "web.1", "web.2"]);
    world.assign(&shop(2));
    world.run(HOUR);
    assert_eq!(world.phase("shop"), Phase::Succeeded);
    assert_eq!(started(&world)[3..], ["init.2", "web.3"]);
    assert_eq!(world.status("shop").services[0].restarts, 0);
}

#[test]
fn a_container_whose_liveness_probe_fails_is_stopped_and_started_again() {
    let shop = web("hang 100000", 1);
    let mut world = settled(&shop);
    assert!(world.started.len() > 10, "{}", world.started.len());
    assert!(world.started.len() - world.stopped.len() <= 1);
    let status = world.status("shop");
    assert_eq!(status.phase, Phase::Succeeded);
    world.run(100_000);
    let reason = (0..1_000)
        .find_map(|_| {
            world.run(1_000);
            world.status("shop").reason
        })
        .unwrap();
    assert_eq!(reason.code, ReasonCode::ProbeFailed);
    assert!(reason.message.contains("liveness"), "{reason:?}");
    // During a soak it fails the release.
    let mut world = settled(&web("good", 1));
    world.assign(&web("hang 2000", 2));
    world.run(2_200);
    let status = world.status("shop");
    assert_eq!(status.phase, Phase::RolledBack);
    assert_eq!(status.reason.unwrap().code, ReasonCode::ProbeFailed);
}

#[test]
fn a_service_is_not_ready_before_its_startup_probe_succeeded() {
    let mut world = World::new();
    world.assign(&web("slow 4000", 1));
    world.run(3_999);
    assert_eq!(world.phase("shop"), Phase::Activating);
    world.run(SOAK_MS);
    assert_eq!(world.phase("shop"), Phase::Soaking);
    world.run(HOUR);
    assert_eq!(world.phase("shop"), Phase::Succeeded);
    assert_eq!(
        world
            .history
            .apps
            .values()
            .next()
            .unwrap()
            .services
            .values()
            .next()
            .unwrap()
            .came_up,
        1
    );
    let mut world = settled(&web("good", 1));
    world.assign(&web("never-up 1000", 2));
    world.run(HOUR);
    let status = world.status("shop");
    assert_eq!(status.phase, Phase::RolledBack);
    let why = status.reason.unwrap().message;
    assert!(why.contains("startup probe fails"), "{why}");
}

#[test]
fn an_app_that_holds_its_update_lock_is_staged_and_updated_when_it_lets_go_or_an_operator_says_so()
{
    let locking = |seed| {
        let mut web = always("good", seed);
        web.update_lock = true;
        release("shop", &[("web", web)])
    };
    let shop: AppName = "shop".parse().unwrap();
    let mut world = settled(&locking(1));
    world.busy_apps.insert(shop.clone());
    let second = world.assign(&locking(2));
    world.run(HOUR);
    let status = world.status("shop");
    assert_eq!(status.phase, Phase::Blocked);
    assert_eq!(status.reason.unwrap().code, ReasonCode::UpdateLocked);
    assert!(world.stopped.is_empty());
    // It is on the disk already.
    world.registry = Some(ReasonCode::RegistryUnreachable);
    world.busy_apps.clear();
    world.turn(0);
    let stop = world.turn(usize::MAX);
    assert!(matches!(&stop.steps[..], [Step::Stop { .. }]), "{stop:?}");
    assert_eq!(world.update_locks.held, [shop.clone()].into());
    world.run(50);
    assert_eq!(world.phase("shop"), Phase::Activating);
    assert_eq!(world.update_locks, UpdateLocks::default());
    world.run(HOUR);
    assert_eq!(world.status("shop").running, Some(second));
    assert_eq!(world.update_locks, UpdateLocks::default());
    // What goes back does not ask.
    world.registry = None;
    let mut bad = locking(3);
    bad.services.values_mut().next().unwrap().command = Some(vec!["never-ready".to_owned()]);
    world.assign(&bad);
    world.run(1_000);
    assert_eq!(world.phase("shop"), Phase::Activating);
    world.busy_apps.insert(shop.clone());
    world.run(HOUR);
    assert_eq!(world.phase("shop"), Phase::RolledBack);
    // The operator's word counts more.
    let fourth = world.assign(&locking(4));
    world.run(HOUR);
    assert_eq!(world.phase("shop"), Phase::Blocked);
    world.desired.apps.get_mut(&shop).unwrap().override_lock = true;
    world.run(HOUR);
    assert_eq!(world.status("shop").running, Some(fourth));
}

fn beside(
    mut service: foreshore_protocol::manifest::Service,
) -> foreshore_protocol::manifest::Service {
    service.deploy.update_config.order = UpdateOrder::StartFirst;
    service
}

#[test]
fn start_first_keeps_the_old_container_until_the_new_one_is_ready() {
    let shop = |behaviour: &str, seed| release("shop", &[("web", beside(always(behaviour, seed)))]);
    let mut world = settled(&shop("good", 1));
    world.assign(&shop("good", 2));
    world.run(99);
    assert_eq!((started(&world).len(), world.stopped.len()), (2, 0));
    world.run(HOUR);
    assert_eq!(world.phase("shop"), Phase::Succeeded);
    assert_eq!((world.stopped.len(), world.stopped[0].instance), (1, 1));
    // A bad one: the old one never stops.
    let good = world.running("shop");
    world.assign(&shop("never-ready", 3));
    world.run(HOUR);
    assert_eq!(world.phase("shop"), Phase::RolledBack);
    assert_eq!(world.running("shop"), good);
    let stopped: Vec<_> = world.stopped.iter().map(|id| id.instance).collect();
    assert_eq!(stopped, [1, 3]);
}

#[test]
fn with_nothing_to_go_back_to_a_failed_release_is_started_again_and_again_more_slowly() {
    let mut world = World::new();
    world.assign(&web("exit 1 10", 1));
    world.run(HOUR);
    let status = world.status("shop");
    assert_eq!(status.phase, Phase::Failed);
    assert!(matches!(
        status.services[0].state,
        ServiceState::BackOff { exit_code: 1 } | ServiceState::Running
    ));
    let starts = world.started.len();
    assert!((15..30).contains(&starts), "{starts} starts in an hour");
    assert_eq!(usize::try_from(status.services[0].restarts), Ok(starts - 1));
}

#[test]
fn a_refused_start_fails_the_release_without_waiting_for_the_deadline() {
    let mut world = settled(&web("good", 1));
    world.assign(&web("refuse", 2));
    world.run(1);
    let status = world.status("shop");
    assert_eq!(status.phase, Phase::RolledBack);
    assert_eq!(status.reason.unwrap().code, ReasonCode::StartFailed);
}

#[test]
fn a_newer_release_that_cannot_be_staged_does_not_keep_a_bad_one_on() {
    let good = web("good", 1);
    let mut world = settled(&good);
    world.assign(&web("never-ready", 2));
    world.run(1_000);
    assert_eq!(world.phase("shop"), Phase::Activating);
    world.registry = Some(ReasonCode::RegistryUnreachable);
    let third = web("good", 3);
    world.assign(&third);
    world.run(DEADLINE_MS);
    let status = world.status("shop");
    assert_eq!(status.phase, Phase::Blocked);
    assert_eq!(status.reason.unwrap().code, ReasonCode::RegistryUnreachable);
    assert_eq!(status.running, Some(good.digest()));
    world.registry = None;
    world.run(HOUR);
    let status = world.status("shop");
    assert_eq!(
        (status.phase, status.running),
        (Phase::Succeeded, Some(third.digest()))
    );
}

#[test]
fn while_staging_is_blocked_the_old_release_heals_itself() {
    let mut world = settled(&web("good", 1));
    world.registry = Some(ReasonCode::DiskFull);
    world.assign(&web("good", 2));
    world.run(60_000);
    world.containers.clear();
    world.run(60_000);
    assert_eq!(world.phase("shop"), Phase::Blocked);
    assert_eq!(world.running("shop").len(), 1);
    assert_eq!(world.started.len(), 2);
}

#[test]
fn a_full_disk_is_swept_and_the_staging_tried_again_at_once() {
    let mut world = settled(&web("good", 1));
    world.registry = Some(ReasonCode::DiskFull);
    world.images.insert(Digest::of(b"garbage"));
    world.assign(&web("good", 2));
    world.turn(usize::MAX);
    let failed = world.turn(usize::MAX);
    assert!(
        matches!(failed.steps[..], [Step::Stage { .. }]),
        "{failed:?}"
    );
    let swept = world.turn(usize::MAX);
    assert!(
        matches!(swept.steps[..], [Step::Collect { .. }]),
        "{swept:?}"
    );
    assert!(!world.images.contains(&Digest::of(b"garbage")));
    assert_eq!(world.phase("shop"), Phase::Blocked);
    let again = world.turn(usize::MAX);
    assert!(matches!(again.steps[..], [Step::Stage { .. }]), "{again:?}");
    // From now on with pauses that grow.
    world.turn(usize::MAX);
    let later = world.turn(usize::MAX);
    assert!(
        later.steps.is_empty() && later.wake_at.is_some(),
        "{later:?}"
    );
}

#[test]
fn an_image_that_cannot_run_here_is_rejected_and_not_asked_for_again() {
    let mut world = settled(&web("good", 1));
    world.registry = Some(ReasonCode::NoMatchingPlatform);
    world.assign(&web("good", 2));
    world.run(1_000);
    assert_eq!(world.phase("shop"), Phase::Rejected);
    world.registry = None;
    let plan = world.run(HOUR);
    assert_eq!((plan.steps, plan.wake_at), (vec![], None));
    assert_eq!(world.phase("shop"), Phase::Rejected);
    // A new assignment of the same release is tried.
    world.assign(&web("good", 2));
    world.run(HOUR);
    assert_eq!(world.phase("shop"), Phase::Succeeded);
}

#[test]
fn a_manifest_of_another_app_or_from_a_newer_hub_is_rejected() {
    let mut world = settled(&web("good", 1));
    let other = release("other", &[("web", always("good", 2))]);
    let digest = world.assign(&other);
    let mut head = world.desired.apps.remove(&other.app).unwrap();
    head.app = "shop".parse().unwrap();
    world.desired.apps.insert(head.app.clone(), head);
    world.run(1_000);
    let status = world.status("shop");
    assert_eq!(status.phase, Phase::Rejected);
    assert!(status.reason.unwrap().message.contains("other"));

    let mut world = settled(&web("good", 1));
    let newer = world.assign(&web("good", 3));
    world.hub_reachable = false;
    world.run(1);
    world.history.record(
        &Outcome::BadRelease {
            release: newer,
            message: "schema 2".to_owned(),
            schema_unknown: true,
        },
        world.now,
    );
    let plan = world.run(1);
    assert!(plan.fetch.is_empty());
    assert_eq!(world.phase("shop"), Phase::Rejected);
    assert_ne!(newer, digest);
}

#[test]
fn wrong_bytes_for_a_manifest_block_and_are_asked_for_again_later() {
    let mut world = World::new();
    let digest = world.assign(&web("good", 1));
    world.hub_reachable = false;
    world.run(1);
    world.history.record(
        &Outcome::BadRelease {
            release: digest,
            message: "wrong digest".to_owned(),
            schema_unknown: false,
        },
        world.now,
    );
    let plan = world.turn(0);
    assert!(plan.fetch.is_empty());
    assert_eq!(plan.status[0].phase, Phase::Blocked);
    world.now.ms = plan.wake_at.unwrap();
    assert_eq!(world.turn(0).fetch, [digest].into());
}

#[test]
fn the_same_release_assigned_again_restarts_nothing_and_succeeds_at_once() {
    let v1 = web("good", 1);
    let mut world = settled(&v1);
    world.assign(&v1);
    let plan = world.run(0);
    assert_eq!(plan.status[0].phase, Phase::Succeeded);
    assert_eq!(plan.status[0].since, world.version());
    assert_eq!((world.started.len(), world.stopped.len()), (1, 0));
}

#[test]
fn what_failed_in_an_assignment_and_is_good_since_is_good_in_that_assignment_too() {
    let v1 = web("good", 1);
    let mut world = settled(&v1);
    let app: AppName = "shop".parse().unwrap();
    let first = world.desired.apps[&app].since;
    world.assign(&v1);
    world.run(0);
    let history = world.history.apps.get_mut(&app).unwrap();
    history.poisoned.push(Poison {
        since: first,
        release: v1.digest(),
        reason: Reason::new(ReasonCode::Exited, None, "it was not good then"),
    });
    // As a hub says that was restored from a backup of that time.
    world.desired.version = Version::from_numbers(2, 99).ok();
    world.desired.apps.get_mut(&app).unwrap().since = first;
    world.run(HOUR);
    assert_eq!(world.phase("shop"), Phase::Succeeded);
    assert_eq!((world.started.len(), world.stopped.len()), (1, 0));
}

#[test]
fn the_hub_s_rollback_after_our_own_succeeds_at_once() {
    let v1 = web("good", 1);
    let mut world = settled(&v1);
    world.assign(&web("never-ready", 2));
    world.run(HOUR);
    assert_eq!(world.phase("shop"), Phase::RolledBack);
    let starts = world.started.len();
    world.assign(&v1);
    world.run(0);
    assert_eq!(world.phase("shop"), Phase::Succeeded);
    assert_eq!(world.started.len(), starts);
}

#[test]
fn a_failed_release_may_be_assigned_and_tried_again() {
    let mut world = settled(&web("good", 1));
    let bad = web("never-ready", 2);
    let digest = world.assign(&bad);
    world.run(HOUR);
    world.assign(&bad);
    world.run(HOUR);
    assert_eq!(world.phase("shop"), Phase::RolledBack);
    let tried = world
        .started
        .iter()
        .filter(|(_, release)| *release == digest);
    assert_eq!(tried.count(), 2);
}

#[test]
fn the_hub_may_take_a_release_back_in_the_middle_of_its_activation() {
    let v1 = web("good", 1);
    let mut world = settled(&v1);
    world.assign(&web("good", 2));
    world.run(1_000);
    assert_eq!(world.phase("shop"), Phase::Soaking);
    world.assign(&v1);
    world.run(0);
    assert_eq!(world.running("shop")["web"], v1.digest());
    world.run(HOUR);
    assert_eq!(world.phase("shop"), Phase::Succeeded);
}

#[test]
fn a_job_that_fails_fails_the_release_and_retries_are_counted() {
    let mut world = settled(&web("good", 1));
    world.assign(&release(
        "shop",
        &[("web", service("exit 3 100", 2, RestartPolicy::No))],
    ));
    world.run(1_000);
    assert_eq!(world.phase("shop"), Phase::RolledBack);

    let mut world = World::new();
    let policy = RestartPolicy::OnFailure {
        max_retries: Some(2),
    };
    world.assign(&release(
        "shop",
        &[("web", service("exit 3 100", 2, policy))],
    ));
    world.run(HOUR);
    assert_eq!(world.started.len(), 3);
    let status = world.status("shop");
    assert_eq!(
        status.services[0].state,
        ServiceState::Exited { exit_code: 3 }
    );
    assert_eq!(status.phase, Phase::Failed);
}

#[test]
fn after_a_reboot_without_hub_and_network_what_is_on_disk_starts() {
    let v1 = web("good", 1);
    let mut world = settled(&v1);
    world.hub_reachable = false;
    world.registry = Some(ReasonCode::RegistryUnreachable);
    world.reboot();
    world.run(0);
    assert_eq!(world.running("shop")["web"], v1.digest());
    // The same with a newer release that was accepted and never fetched.
    world.assign(&web("good", 2));
    world.reboot();
    world.run(HOUR);
    assert_eq!(world.running("shop")["web"], v1.digest());
    assert_eq!(world.phase("shop"), Phase::Accepted);
}

#[test]
fn a_reboot_or_an_agent_crash_begins_the_soak_again() {
    for reboot in [false, true] {
        let mut world = settled(&web("good", 1));
        world.assign(&web("good", 2));
        world.run(SOAK_MS - 500);
        assert_eq!(world.phase("shop"), Phase::Soaking);
        if reboot {
            world.reboot();
        } else {
            world.crash();
        }
        world.run(SOAK_MS);
        assert_eq!(world.phase("shop"), Phase::Soaking, "reboot: {reboot}");
        world.run(200);
        assert_eq!(world.phase("shop"), Phase::Succeeded, "reboot: {reboot}");
    }
}

#[test]
fn a_release_that_takes_the_device_down_is_given_up() {
    let v1 = web("good", 1);
    let mut world = settled(&v1);
    world.assign(&web("good", 2));
    for _ in 0..3 {
        world.run(1_000);
        assert_eq!(world.phase("shop"), Phase::Soaking);
        world.reboot();
    }
    world.run(1_000);
    assert_eq!(world.phase("shop"), Phase::RolledBack);
    assert_eq!(world.running("shop")["web"], v1.digest());
}

#[test]
fn an_agent_crash_touches_no_container() {
    let mut world = settled(&web("good", 1));
    world.crash();
    world.run(HOUR);
    assert_eq!((world.started.len(), world.stopped.len()), (1, 0));
}

#[test]
fn lost_history_and_head_leave_containers_alone_until_the_hub_speaks() {
    let v1 = web("good", 1);
    let mut world = settled(&v1);
    let desired = std::mem::take(&mut world.desired);
    world.lose_history();
    let plan = world.run(HOUR);
    assert!(plan.status.is_empty());
    assert_eq!((world.started.len(), world.stopped.len()), (1, 0));
    // Nor is it lost when it dies: its manifest and image are still there.
    world.containers.clear();
    world.run(HOUR);
    assert_eq!(world.running("shop")["web"], v1.digest());
    world.desired = desired;
    world.run(HOUR);
    let status = world.status("shop");
    assert_eq!(
        (status.phase, status.running),
        (Phase::Succeeded, Some(v1.digest()))
    );
    assert_eq!((world.started.len(), world.stopped.len()), (2, 0));
}

#[test]
fn with_history_lost_after_a_rollback_what_runs_counts_as_good() {
    let v1 = web("good", 1);
    let mut world = settled(&v1);
    world.assign(&web("never-ready", 2));
    world.run(HOUR);
    world.lose_history();
    world.run(HOUR);
    let status = world.status("shop");
    assert_eq!(
        (status.phase, status.running),
        (Phase::RolledBack, Some(v1.digest()))
    );
}

#[test]
fn an_app_that_is_not_wanted_is_removed_and_comes_back_with_new_instances() {
    let mut world = settled(&web("good", 1));
    world.unassign(&"shop".parse().unwrap());
    let plan = world.turn(0);
    assert_eq!(plan.status[0].phase, Phase::Removing);
    let plan = world.run(1_000);
    assert!(plan.status.is_empty() && world.containers.is_empty());
    assert!(world.images.is_empty() && world.releases.is_empty());
    world.assign(&web("good", 1));
    world.run(HOUR);
    assert_eq!(world.phase("shop"), Phase::Succeeded);
}

#[test]
fn garbage_is_collected_after_a_success_and_the_live_kept() {
    let mut world = settled(&web("good", 1));
    let second = web("good", 2);
    world.assign(&second);
    world.run(HOUR);
    assert_eq!(
        world.releases.keys().collect::<Vec<_>>(),
        [&second.digest()]
    );
    assert_eq!(world.images.len(), 1);
    let third = web("never-ready", 3);
    world.assign(&third);
    world.run(HOUR);
    assert_eq!(world.phase("shop"), Phase::RolledBack);
    assert_eq!(world.images.len(), 2);
    assert_eq!(world.status("shop").last_known_good, Some(second.digest()));
}

#[test]
fn one_app_s_change_does_not_touch_another() {
    let mut world = settled(&web("good", 1));
    let other = release("other", &[("web", always("good", 9))]);
    world.assign(&other);
    world.run(HOUR);
    world.unassign(&other.app);
    world.run(HOUR);
    assert!(world.stopped.iter().all(|id| id.app == other.app));
    assert_eq!(world.running("shop").len(), 1);
}

mod disk;
mod kept;
mod properties;
mod secret;
mod setbacks;
mod signature;
mod trial;
mod turn;
mod window;

#[test]
fn a_release_that_the_devices_policy_denies_is_rejected_before_anything_is_staged() {
    let good = web("good", 1);
    let mut world = settled(&good);
    let bad = web("good", 2);
    let why = "service web asks for the device's network".to_owned();
    world
        .verdicts
        .insert(bad.digest(), PolicyVerdict::Denied(why.clone()));
    world.assign(&bad);
    world.run(HOUR);
    let status = world.status("shop");
    assert_eq!(status.phase, Phase::Rejected);
    let reason = status.reason.unwrap();
    assert_eq!(
        (reason.code, reason.message),
        (ReasonCode::PolicyDenied, why)
    );
    assert_eq!(status.running, Some(good.digest()));
    assert!(world.stopped.is_empty() && world.started.len() == 1 && world.images.len() == 1);
    // A mistake in the file allows nothing.
    let unknown = PolicyVerdict::Unknown("policy /p is not valid".to_owned());
    world.verdicts.insert(bad.digest(), unknown);
    world.run(HOUR);
    assert_eq!(world.phase("shop"), Phase::Rejected);
    // The owner allows it: it goes on, without a word of the hub.
    world.hub_reachable = false;
    world.verdicts.clear();
    world.run(HOUR);
    let status = world.status("shop");
    assert_eq!(status.phase, Phase::Succeeded);
    assert_eq!(status.running, Some(bad.digest()));
}

#[test]
fn a_release_that_failed_is_not_tried_again_because_the_policy_changed() {
    let good = web("good", 1);
    let mut world = settled(&good);
    let bad = web("never-ready", 2);
    let denied = PolicyVerdict::Denied("it asks for the device's network".to_owned());
    world.verdicts.insert(bad.digest(), denied.clone());
    world.assign(&bad);
    world.run(HOUR);
    assert_eq!(world.phase("shop"), Phase::Rejected);
    world.verdicts.clear();
    world.run(HOUR);
    assert_eq!(world.phase("shop"), Phase::RolledBack);
    let starts = world.started.len();
    world.verdicts.insert(bad.digest(), denied);
    world.run(HOUR);
    world.verdicts.clear();
    world.run(HOUR);
    assert_eq!(world.phase("shop"), Phase::RolledBack);
    assert_eq!(world.started.len(), starts);
    // Nor is one that can never run here.
    world.registry = Some(ReasonCode::NoMatchingPlatform);
    world.assign(&web("good", 3));
    world.run(HOUR);
    assert_eq!(world.phase("shop"), Phase::Rejected);
    world.registry = None;
    world.run(HOUR);
    assert_eq!(world.phase("shop"), Phase::Rejected);
}

#[test]
fn while_the_policy_cannot_be_used_new_releases_wait_and_the_old_ones_run_on() {
    let mut world = settled(&web("good", 1));
    let next = web("good", 2);
    for release in [&web("good", 1), &next] {
        let why = "policy /etc/foreshore/policy.toml is not valid".to_owned();
        world
            .verdicts
            .insert(release.digest(), PolicyVerdict::Unknown(why));
    }
    world.assign(&next);
    world.containers.clear();
    world.run(HOUR);
    let status = world.status("shop");
    assert_eq!(status.phase, Phase::Blocked);
    assert_eq!(status.reason.unwrap().code, ReasonCode::PolicyDenied);
    assert_eq!(world.running("shop")["web"], web("good", 1).digest());
    world.verdicts.clear();
    world.run(HOUR);
    assert_eq!(world.status("shop").running, Some(next.digest()));
}

#[test]
fn a_service_whose_device_is_not_plugged_in_waits_for_it_and_says_so() {
    let first = web("needs-device", 1);
    let mut world = settled(&first);
    world.unplugged = true;
    world.reboot();
    world.run(HOUR);
    let status = world.status("shop");
    assert_eq!(status.phase, Phase::Succeeded);
    assert_eq!(status.reason.unwrap().code, ReasonCode::DeviceMissing);
    assert!(world.running("shop").is_empty());
    world.unplugged = false;
    world.run(HOUR);
    let status = world.status("shop");
    assert_eq!((status.reason, world.running("shop").len()), (None, 1));
    // A release on trial has until its deadline, as for anything else that is not ready.
    world.unplugged = true;
    world.assign(&web("needs-device", 2));
    world.run(DEADLINE_MS - 1_000);
    assert_eq!(world.phase("shop"), Phase::Activating);
    world.run(2_000);
    let reason = world.status("shop").reason.unwrap();
    assert_eq!(reason.code, ReasonCode::DeadlineExceeded);
    assert!(reason.message.contains("/dev/ttyUSB0"), "{reason:?}");
}
