//! Whatever happens, in whatever order: the rules hold, and it comes to an end.

use super::*;
use foreshore_protocol::manifest::Canary;

pub(super) fn targets() -> impl Strategy<Value = Vec<WaveTarget>> {
    let selector = r#"{"matchLabels": {"site": "site-1"}}"#;
    let canary = |(per_stratum, by): (u32, usize)| {
        WaveTarget::Canary(Canary {
            per_stratum,
            by: ["model", "site"][..by]
                .iter()
                .map(|key| key.parse().unwrap())
                .collect(),
        })
    };
    let wave = prop_oneof![
        4 => (1_u32..12).prop_map(WaveTarget::Count),
        4 => (1_u8..=100).prop_map(WaveTarget::Percent),
        1 => Just(WaveTarget::Selector(serde_json::from_str(selector).unwrap())),
    ];
    (
        proptest::option::of((1_u32..3, 1_usize..3).prop_map(canary)),
        proptest::collection::vec(wave, 0..5),
    )
        .prop_map(|(canary, waves)| canary.into_iter().chain(waves).collect())
}

/// Something that happens to the world.
#[derive(Debug, Clone)]
enum Happening {
    Says(usize, Phase),
    Leased(usize),
    Unleased(usize),
    Offline(usize),
    Online(usize),
    Leaves(usize),
    AllDark,
    AllBack,
    Passes(u64),
    HubRestarts,
    HubDeaf,
    Pause,
    Resume,
    Abort,
    Approve,
    Retry(Option<usize>),
    Held(usize, bool),
    Busy(usize, bool),
    Joins(usize),
}

fn phase() -> impl Strategy<Value = Phase> {
    prop_oneof![
        2 => Just(Phase::Accepted),
        1 => Just(Phase::Rejected),
        2 => Just(Phase::Staging),
        2 => Just(Phase::Blocked),
        4 => Just(Phase::Activating),
        4 => Just(Phase::Soaking),
        12 => Just(Phase::Succeeded),
        2 => Just(Phase::RolledBack),
        1 => Just(Phase::Failed),
        1 => Just(Phase::Removing),
        4 => Just(Phase::Waiting),
    ]
}

fn happening() -> impl Strategy<Value = Happening> {
    use Happening::*;
    prop_oneof![
        20 => (0_usize..12, phase()).prop_map(|(device, phase)| Says(device, phase)),
        3 => (0_usize..12).prop_map(Leased),
        1 => (0_usize..12).prop_map(Unleased),
        4 => (0_usize..12).prop_map(Offline),
        5 => (0_usize..12).prop_map(Online),
        1 => (0_usize..12).prop_map(Leaves),
        1 => Just(AllDark),
        2 => Just(AllBack),
        6 => prop_oneof![Just(1), 1_u64..5_000, Just(60_000), Just(3_600_000)].prop_map(Passes),
        1 => Just(HubRestarts),
        1 => Just(HubDeaf),
        1 => Just(Pause),
        3 => Just(Resume),
        1 => Just(Abort),
        3 => Just(Approve),
        1 => proptest::option::of(0_usize..12).prop_map(Retry),
        2 => (0_usize..12, any::<bool>()).prop_map(|(device, held)| Held(device, held)),
        2 => (0_usize..12, any::<bool>()).prop_map(|(device, busy)| Busy(device, busy)),
        1 => (12_usize..15).prop_map(Joins),
    ]
}

/// From what the release 2 and others can be reached; devices have 1.
fn requirements() -> impl Strategy<Value = Requirements> {
    let ways: [&[(u8, &[u8])]; 5] = [
        &[],
        &[(2, &[3])],
        &[(2, &[1, 3])],
        &[(2, &[3, 4]), (3, &[4]), (4, &[5, 1])],
        &[(2, &[4]), (4, &[3]), (3, &[5])],
    ];
    proptest::sample::select(ways.to_vec()).prop_map(super::requirements)
}

fn policies() -> impl Strategy<Value = Policy> {
    (
        targets(),
        1_u32..8,
        1_u32..5,
        0_u8..=100,
        1_u32..12,
        any::<bool>(),
        proptest::option::of((1_u32..600, proptest::option::of(1_u32..5))),
        proptest::option::of(0_u64..100_000),
        0_u32..64,
        requirements(),
    )
        .prop_map(
            |(
                waves,
                max_unavailable,
                count,
                percent,
                min_sample,
                pause,
                paced,
                start,
                gates,
                requirements,
            )| {
                let mut policy = Policy {
                    pace: paced.map(|(per_minute, double_every)| Pace {
                        per_minute,
                        double_every,
                        max_per_minute: None,
                    }),
                    start_at: start.map(|after| NOW.plus(after)),
                    max_unavailable,
                    budget: FailureBudget {
                        count,
                        percent,
                        min_sample,
                    },
                    on_failure: if pause {
                        OnFailure::Pause
                    } else {
                        OnFailure::Rollback
                    },
                    requirements,
                    ..policy(waves, 1)
                };
                for (index, wave) in policy.waves.iter_mut().enumerate() {
                    wave.approval = gates >> index & 1 == 1;
                    wave.failure_budget =
                        (gates >> (index + 2) & 1 == 1).then_some(FailureBudget {
                            count: 2,
                            percent: 100,
                            min_sample: 1,
                        });
                }
                policy
            },
        )
}

impl World {
    fn happen(&mut self, happening: &Happening) {
        let known: Vec<_> = self.devices.keys().cloned().collect();
        let pick = |number: usize| known[number % known.len()].clone();
        match happening {
            Happening::Says(number, phase) => self.say(&pick(*number), *phase),
            Happening::Leased(number) => self.lease(&pick(*number)),
            Happening::Unleased(number) => {
                self.devices.get_mut(&pick(*number)).unwrap().leased = None
            }
            Happening::Offline(number) => {
                self.devices.get_mut(&pick(*number)).unwrap().offline = true
            }
            Happening::Online(number) => {
                self.devices.get_mut(&pick(*number)).unwrap().offline = false
            }
            Happening::Leaves(number) => self.devices.get_mut(&pick(*number)).unwrap().gone = true,
            Happening::AllDark => self.devices.values_mut().for_each(|one| one.offline = true),
            Happening::AllBack => self
                .devices
                .values_mut()
                .for_each(|one| one.offline = false),
            Happening::Passes(ms) => self.pass(*ms),
            Happening::HubRestarts => {
                self.listening_since = Some(self.now);
                self.devices.values_mut().for_each(|one| one.offline = true);
            }
            Happening::HubDeaf => self.listening_since = None,
            Happening::Pause => self.command(command::pause(&self.rollout)),
            Happening::Resume => self.command(command::resume(&self.rollout)),
            Happening::Abort => self.command(command::abort(&self.rollout)),
            Happening::Approve => self.command(command::approve(&self.rollout)),
            Happening::Retry(number) => {
                let device = number.map(pick);
                self.command(command::retry(&self.rollout, device.as_ref()));
            }
            Happening::Held(number, held) => {
                self.devices.get_mut(&pick(*number)).unwrap().held = *held
            }
            Happening::Busy(number, busy) => {
                self.devices.get_mut(&pick(*number)).unwrap().busy = *busy
            }
            Happening::Joins(number) => self.join(*number),
        }
    }

    /// The network is whole again, every device does as it is told, and an operator resumes what paused.
    fn settle(&mut self) {
        self.listening_since.get_or_insert(self.now);
        for _ in 0..400 {
            for one in self.devices.values_mut() {
                one.offline = false;
                one.held = false;
                one.busy = false;
            }
            self.pass(10_000);
            self.step();
            self.consistent();
            let open = |one: &Assignment| one.tail && !one.has_ended() && one.revert.is_none();
            let tail = self.rollout.state == RolloutState::Completed
                && self.rollout.assignments.values().any(open);
            if self.rollout.state.is_final() && !tail {
                return;
            }
            self.command(command::resume(&self.rollout));
            self.command(command::approve(&self.rollout));
            for (number, one) in self.devices.clone() {
                let told = one.desired.map(|(version, _)| version);
                let ended = one
                    .report
                    .as_ref()
                    .is_some_and(|report| Some(report.since) == told && report.phase.is_final());
                if !ended {
                    self.say(&number, Phase::Succeeded);
                }
            }
        }
        panic!("it never ends: {:#?}", self.rollout);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, ..ProptestConfig::default() })]

    /// `ARCHITECTURE.md`, "What must always hold", points 5 to 9, through [`check`] and [`check_action`]; and it always comes to an end.
    #[test]
    fn whatever_happens_the_rules_hold_and_it_ends(
        devices in 1_usize..12,
        seed: u64,
        policy in policies(),
        first in any::<bool>(),
        happenings in proptest::collection::vec(happening(), 0..120),
    ) {
        let previous = (!first).then(|| placement(1));
        let mut world = World::with_previous(devices, seed, policy, previous);
        for happening in &happenings {
            world.happen(happening);
            world.step();
            world.consistent();
        }
        world.settle();
    }

    /// A device that never began to switch costs no budget, however long it is away.
    #[test]
    fn devices_that_never_began_cost_nothing(
        devices in 1_usize..12,
        seed: u64,
        policy in policies(),
        happenings in proptest::collection::vec(happening(), 0..80),
    ) {
        let harmless = |happening: &&Happening| {
            // Once it has its turn it may have begun.
            if let Happening::Leased(_) = happening {
                return false;
            }
            let Happening::Says(_, phase) = happening else { return true };
            matches!(phase, Phase::Accepted | Phase::Staging | Phase::Blocked | Phase::Waiting | Phase::Succeeded)
        };
        let mut world = World::new(devices, seed, policy);
        for happening in happenings.iter().filter(harmless) {
            world.happen(happening);
            world.step();
            prop_assert_eq!(budget::Tally::of(&world.rollout).failed, 0);
            prop_assert!(!matches!(world.rollout.state, RolloutState::RollingBack | RolloutState::RolledBack));
        }
    }

    /// Darkness of the whole fleet, in whatever state it strikes and however long it lasts, fails nobody.
    #[test]
    fn fleet_wide_darkness_fails_nobody(
        devices in 1_usize..12,
        seed: u64,
        policy in policies(),
        happenings in proptest::collection::vec(happening(), 0..60),
        hours in 1_u64..10_000,
    ) {
        let mut world = World::new(devices, seed, policy);
        for happening in &happenings {
            world.happen(happening);
            world.step();
        }
        let before = (world.rollout.state, budget::Tally::of(&world.rollout).failed);
        world.happen(&Happening::AllDark);
        // What was said before is heard before; only darkness follows.
        for _ in 0..4 {
            world.pass(hours * 900_000);
            world.step();
        }
        let after = (world.rollout.state, budget::Tally::of(&world.rollout).failed);
        prop_assert_eq!(before.1, after.1);
        let caused = after.0 == RolloutState::RollingBack && before.0 != RolloutState::RollingBack;
        prop_assert!(!caused, "{:?} became {:?}", before, after);
    }

    /// Writing any record through JSON, as the store does, and going on from it decides the same.
    #[test]
    fn what_is_stored_is_all_there_is(
        devices in 1_usize..8,
        seed: u64,
        policy in policies(),
        happenings in proptest::collection::vec(happening(), 0..40),
    ) {
        let mut world = World::new(devices, seed, policy);
        for happening in &happenings {
            world.happen(happening);
            let text = serde_json::to_string(&world.rollout).unwrap();
            let stored: Rollout = serde_json::from_str(&text).unwrap();
            prop_assert_eq!(&stored, &world.rollout);
            world.rollout = stored;
            world.step();
        }
    }
}
