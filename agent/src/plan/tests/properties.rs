//! What holds for every sequence of assignments, cuts, crashes, reboots and losses.

use super::*;
use crate::runtime::ContainerState;
use foreshore_protocol::quantity::Span;
use proptest::prelude::*;

#[derive(Debug, Clone)]
enum Op {
    Assign(u8, u8, u32),
    Unassign(u8),
    Run(u64),
    Cut(usize),
    Crash,
    Reboot,
    Registry(Option<ReasonCode>),
    HubReachable(bool),
    Kill(usize),
    /// Its supervisor, and so the container.
    KillSupervisor(usize),
    LoseHistory,
    Rotate(usize),
    LoseSecret(usize),
    /// Whether the device is under a disruption budget.
    Budget(bool),
    /// The hub grants what is waited for, for so long.
    Turn(u64),
    /// Whether what is assigned from now on may be switched to, and fetched, between 02:00 and 04:00 only.
    Windows(bool, bool),
    /// Somebody sets the clock to this hour, or nobody knows the time any more.
    Clock(Option<u64>),
}

const APPS: [&str; 2] = ["shop", "till"];
const BEHAVIOURS: [&str; 8] = [
    "good",
    "good",
    "never-ready",
    "exit 1 700",
    "unready 2500",
    "refuse",
    "hang 2500",
    "never-up 1500",
];

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => (0..2_u8, 0..8_u8, 0..6_u32).prop_map(|(app, what, seed)| Op::Assign(app, what, seed)),
        1 => (0..2_u8).prop_map(Op::Unassign),
        6 => (0..40_000_u64).prop_map(Op::Run),
        6 => (0..4_usize).prop_map(Op::Cut),
        3 => Just(Op::Crash),
        2 => Just(Op::Reboot),
        2 => prop_oneof![
            Just(None),
            Just(Some(ReasonCode::RegistryUnreachable)),
            Just(Some(ReasonCode::DiskFull)),
            Just(Some(ReasonCode::BadImage)),
        ].prop_map(Op::Registry),
        2 => any::<bool>().prop_map(Op::HubReachable),
        2 => (0..4_usize).prop_map(Op::Kill),
        2 => (0..4_usize).prop_map(Op::KillSupervisor),
        1 => Just(Op::LoseHistory),
        2 => (0..2_usize).prop_map(Op::Rotate),
        1 => (0..2_usize).prop_map(Op::LoseSecret),
        2 => any::<bool>().prop_map(Op::Budget),
        4 => (0..60_000_u64).prop_map(Op::Turn),
        2 => any::<(bool, bool)>().prop_map(|(switch, fetch)| Op::Windows(switch, fetch)),
        3 => prop::option::weighted(0.8, 0..6_u64).prop_map(Op::Clock),
    ]
}

const SECRETS: [&str; 2] = ["live", "pin"];

/// A secret has another value, or one again.
fn rotate(world: &mut World, name: &str) {
    world.rotations += 1;
    world.secrets.insert(name.parse().unwrap(), world.rotations);
}

fn secret(
    mut service: foreshore_protocol::manifest::Service,
    name: &str,
    on_rotate: &str,
) -> foreshore_protocol::manifest::Service {
    let mounts = format!(
        "{{\"image\": \"x\", \"secrets\": [{{\"source\": \"{name}\", \"on_rotate\": \"{on_rotate}\"}}]}}"
    );
    let mounts: foreshore_protocol::manifest::Service = serde_json::from_str(&mounts).unwrap();
    service.secrets = mounts.secrets;
    service
}

fn of(app: u8, behaviour: u8, seed: u32) -> Release {
    let mut web = always(BEHAVIOURS[usize::from(behaviour)], seed);
    if seed % 2 == 1 {
        web.deploy.update_config.order = UpdateOrder::StartFirst;
    }
    if seed % 4 == 1 {
        web.deploy.update_config.keep_old = Some(Span(1_000 * (10 + u64::from(seed))));
    }
    let needs = [
        ("steady", Condition::Healthy),
        ("job", Condition::Completed),
    ];
    let (web, other) = match seed % 3 {
        0 => (web, always("good", 50)),
        1 => (after(web, &needs), always("good", 50)),
        // The other way round: containers of two releases may wait for each other in a circle.
        _ => {
            let mut other = after(always("good", 50), &[("web", Condition::Started)]);
            other.deploy.update_config.order = UpdateOrder::StartFirst;
            other.deploy.update_config.keep_old = Some(Span(90_000));
            (web, other)
        }
    };
    release(
        APPS[usize::from(app)],
        &[
            ("job", job("exit 0 300", 200 + seed % 2)),
            ("other", secret(other, "live", "SIGHUP")),
            ("steady", always("good", 100 + seed % 2)),
            ("web", secret(web, "pin", "restart")),
        ],
    )
}

fn apply(world: &mut World, op: &Op) {
    match op {
        Op::Assign(app, behaviour, seed) => {
            world.assign(&of(*app, *behaviour, *seed));
        }
        Op::Unassign(app) => {
            let app = APPS[usize::from(*app)].parse().unwrap();
            if world.desired.apps.contains_key(&app) {
                world.unassign(&app);
            }
        }
        Op::Run(ms) => {
            world.run(*ms);
        }
        Op::Cut(steps) => {
            world.turn(*steps);
        }
        Op::Crash => world.crash(),
        Op::Reboot => world.reboot(),
        Op::Registry(state) => world.registry = *state,
        Op::HubReachable(state) => world.hub_reachable = *state,
        Op::Kill(which) => {
            if *which < world.containers.len() {
                world.containers.remove(*which);
            }
        }
        Op::KillSupervisor(which) => {
            if let Some((container, ..)) = world.containers.get_mut(*which) {
                container.state = ContainerState::Broken;
            }
        }
        Op::LoseHistory => world.lose_history(),
        Op::Rotate(which) => rotate(world, SECRETS[*which]),
        Op::Budget(holds) => world.set_budget(*holds),
        Op::Turn(ttl_ms) => {
            let apps: Vec<AppName> = world.turn(0).turns.into_keys().collect();
            for app in apps {
                world.grant(&app, *ttl_ms);
            }
        }
        Op::Windows(switch, fetch) => {
            let nightly = || foreshore_protocol::message::Window {
                cron: "0 2 * * *".parse().unwrap(),
                open_ms: 2 * HOUR,
                zone: foreshore_protocol::message::Zone::Device,
            };
            world.windows.switch = switch.then(nightly);
            world.windows.fetch = fetch.then(nightly);
        }
        Op::Clock(hour) => {
            // 2026-06-01, at midnight.
            let wall = hour.map(|hour| 1_780_272_000_000 + hour * HOUR);
            world.wall_at_boot = wall.map(|wall| wall - world.now.ms.0);
        }
        Op::LoseSecret(which) => _ = world.secrets.remove(SECRETS[*which]),
    }
}

/// Everything heals, and what is wanted is assigned once more, so that no trial was spoiled by it.
fn heal(world: &mut World) {
    world.registry = None;
    world.hub_reachable = true;
    world.set_budget(false);
    world.windows = foreshore_protocol::message::Windows::default();
    for name in SECRETS {
        rotate(world, name);
    }
    world.run(HOUR);
    let wanted: Vec<Release> = world
        .desired
        .apps
        .values()
        .map(|app| world.hub[&app.release].clone())
        .collect();
    for release in wanted {
        world.assign(&release);
    }
    world.run(HOUR);
}

fn is_good(release: &Release) -> bool {
    release.services.values().all(|service| {
        ["good", "exit 0 300"].contains(&service.command.as_ref().unwrap()[0].as_str())
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    /// Whatever was cut, crashed, rebooted or lost: in the end every good release runs and every bad one
    /// is given up. Each plan on the way passes `check` (no poisoned start, no live image collected, one
    /// instance at a time, the last-known-good kept).
    #[test]
    fn settles_from_anywhere(ops in prop::collection::vec(op(), 0..40)) {
        let mut world = World::new();
        SECRETS.iter().for_each(|name| rotate(&mut world, name));
        for op in &ops {
            apply(&mut world, op);
        }
        heal(&mut world);
        for app in world.desired.apps.clone().into_values() {
            let release = world.hub[&app.release].clone();
            let status = world.status(app.app.as_str());
            prop_assert_eq!(status.since, app.since);
            prop_assert!(status.phase.is_final(), "{:?}", status);
            if is_good(&release) {
                prop_assert_eq!(status.phase, Phase::Succeeded, "{:?}", status);
                prop_assert_eq!(status.running, Some(app.release));
                prop_assert!(status.services.iter().all(|service| service.ready));
            } else {
                prop_assert!(matches!(status.phase, Phase::RolledBack | Phase::Failed), "{:?}", status);
            }
            // After the history was lost, what ran is taken for good, and may never start in whole.
            let good = status.last_known_good.and_then(|good| world.releases.get(&good));
            if status.phase == Phase::RolledBack && good.is_some_and(is_good) {
                prop_assert_eq!(status.running, status.last_known_good);
            }
        }
        // Who runs has the newest values.
        for (container, _, service) in &world.containers {
            for mount in &service.secrets {
                prop_assert_eq!(container.secrets.get(&mount.source), world.secrets.get(&mount.source));
            }
        }
        // What was kept is gone in the end: one container of a service at most.
        let services: BTreeSet<_> = world
            .containers
            .iter()
            .map(|(container, ..)| (&container.id.app, &container.id.service))
            .collect();
        prop_assert_eq!(services.len(), world.containers.len());
        let known: Vec<_> = world.desired.apps.keys().collect();
        prop_assert!(world.containers.iter().all(|(container, ..)| known.contains(&&container.id.app)));
    }

    /// At the desired state planning changes nothing, and neither does an agent crash.
    #[test]
    fn quiet_when_settled(ops in prop::collection::vec(op(), 0..30)) {
        let mut world = World::new();
        SECRETS.iter().for_each(|name| rotate(&mut world, name));
        for op in &ops {
            apply(&mut world, op);
        }
        for app in 0..2 {
            world.assign(&of(app, 0, u32::from(app)));
        }
        heal(&mut world);
        world.run(HOUR);
        let (starts, stops) = (world.started.len(), world.stopped.len());
        let plan = world.turn(usize::MAX);
        prop_assert_eq!(plan.steps, vec![]);
        prop_assert_eq!(plan.wake_at, None);
        world.crash();
        world.run(24 * HOUR);
        prop_assert_eq!((world.started.len(), world.stopped.len()), (starts, stops));
    }

    /// Stopping after any number of steps of each plan, with an agent crash or a reboot there, settles
    /// just the same.
    #[test]
    fn prefix_safe(cuts in prop::collection::vec((0..3_usize, 0..3_u8), 1..25), behaviour in 0..8_u8) {
        let mut world = settled(&release("shop", &[("steady", always("good", 100)), ("web", always("good", 1))]));
        SECRETS.iter().for_each(|name| rotate(&mut world, name));
        world.assign(&of(0, behaviour, 2));
        for (cut, then) in &cuts {
            world.turn(*cut);
            match then {
                0 => {}
                1 => world.crash(),
                _ => world.reboot(),
            }
        }
        heal(&mut world);
        let expected = if behaviour < 2 { Phase::Succeeded } else { Phase::RolledBack };
        prop_assert_eq!(world.phase("shop"), expected);
    }

    /// A release that failed in an assignment is never started again in it.
    #[test]
    fn poisoned_is_never_tried_again(events in prop::collection::vec(0..4_u8, 0..20), behaviour in 2..8_u8) {
        let mut world = settled(&web("good", 1));
        let bad = world.assign(&web(BEHAVIOURS[usize::from(behaviour)], 2));
        world.run(HOUR);
        prop_assert_eq!(world.phase("shop"), Phase::RolledBack);
        let tried = |world: &World| world.started.iter().filter(|(_, release)| *release == bad).count();
        let before = tried(&world);
        for event in events {
            match event {
                0 => world.crash(),
                1 => world.reboot(),
                2 => { world.assign(&release("till", &[("web", always("good", 5))])); }
                _ => world.containers.clear(),
            }
            world.run(HOUR);
        }
        prop_assert_eq!(tried(&world), before);
        prop_assert_eq!(world.phase("shop"), Phase::RolledBack);
    }

    /// A device whose hub is gone keeps a release running over any number of crashes and reboots.
    #[test]
    fn something_always_runs_offline(events in prop::collection::vec(0..3_u8, 1..20), behaviour in 0..8_u8) {
        let mut world = settled(&web("good", 1));
        world.assign(&web(BEHAVIOURS[usize::from(behaviour)], 2));
        world.run(2_000);
        world.hub_reachable = false;
        world.registry = Some(ReasonCode::RegistryUnreachable);
        for event in events {
            match event {
                0 => world.crash(),
                1 => world.reboot(),
                _ => world.containers.clear(),
            }
            world.run(HOUR);
            let status = world.status("shop");
            prop_assert!(status.services.iter().all(|service| service.ready), "{:?}", status);
        }
    }

    /// A release is judged by ends of its own making: whatever the agent ends, or leaves half made when it ends itself,
    /// a good release is not given up for it.
    #[test]
    fn ends_that_the_agent_caused_are_held_against_nobody(
        cuts in prop::collection::vec((any::<bool>(), 0..3_u8, 0..1_000_u64), 1..16),
        order in 0..3_u8,
        restart in 0..3_u8,
    ) {
        let web = |seed| {
            let mut web = always("good", seed);
            web.restart = match restart {
                0 => RestartPolicy::Always,
                1 => RestartPolicy::No,
                _ => RestartPolicy::OnFailure { max_retries: Some(1) },
            };
            if order > 0 {
                web.deploy.update_config.order = UpdateOrder::StartFirst;
            }
            if order > 1 {
                web.deploy.update_config.keep_old = Some(Span(20_000));
            }
            release("shop", &[("steady", always("good", 100)), ("web", web)])
        };
        let mut world = settled(&web(1));
        let wanted = world.assign(&web(2));
        // Fetched and staged.
        world.turn(usize::MAX);
        world.turn(usize::MAX);
        let mut crashes = 0;
        for (lives, then, ms) in cuts {
            let lives = lives || crashes == 3;
            if world.cut_inside(lives).is_some() && !lives {
                crashes += 1;
            }
            match then {
                0 => {}
                1 => drop(world.turn(1)),
                _ => drop(world.run(ms)),
            }
        }
        world.run(HOUR);
        let status = world.status("shop");
        prop_assert_eq!(status.phase, Phase::Succeeded, "{:?}", status);
        prop_assert_eq!(status.running, Some(wanted));
        prop_assert!(status.services.iter().all(|service| service.ready), "{:?}", status);
    }
}
