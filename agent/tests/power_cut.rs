//! The agent is killed at every kill point, with real containers, and what comes after is checked: every state file is
//! the old or the new one, nothing that was acknowledged is lost, every container is accounted for, and the
//! release that is wanted runs. Needs root and Debian's busybox-static.
//!
//! `FORESHORE_CUTS` is how often at each point (default 2; `cargo xtask cuts` has 20), `FORESHORE_CUT_SEED` the seed
//! of order and moments, `FORESHORE_CUT_POINT` one point to look at alone.

#![expect(
    clippy::unwrap_used,
    unreachable_pub,
    reason = "this is a test in several files"
)]

#[path = "power_cut/device.rs"]
mod device;
#[path = "power_cut/hub.rs"]
mod hub;
#[path = "power_cut/medium.rs"]
mod medium;
#[path = "power_cut/registry.rs"]
mod registry;
#[path = "power_cut/wall_clock.rs"]
mod wall_clock;

use std::collections::BTreeMap;
use std::sync::Mutex;

use device::{Device, Life};

/// How many devices live side by side; most of their time they wait.
const DEVICES: usize = 4;

/// A cut to be made.
#[derive(Debug, Clone)]
struct Cut {
    point: &'static str,
    /// Which one at this point, from 0.
    round: u64,
    /// Decides the moment.
    random: u64,
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| {
        text.parse()
            .unwrap_or_else(|_| panic!("{name}={text} is not a number"))
    })
}

/// Small, seeded, and good enough to choose moments: splitmix64 (Steele, Lea, Flood 2014).
fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn cuts(rounds: u64, seed: u64) -> Vec<Cut> {
    let only = std::env::var("FORESHORE_CUT_POINT").ok();
    let mut state = seed;
    let mut cuts: Vec<Cut> = (0..rounds)
        .flat_map(|round| {
            foreshore_killpoint::ALL
                .iter()
                .map(move |point| (round, point))
        })
        .filter(|(_, point)| only.as_ref().is_none_or(|only| only == *point))
        .map(|(round, point)| Cut {
            point,
            round,
            random: random(&mut state),
        })
        .collect();
    for at in (1..cuts.len()).rev() {
        let other = random(&mut state) % (at as u64 + 1);
        cuts.swap(at, usize::try_from(other).unwrap());
    }
    cuts
}

/// One life with a cut, and the life after it.
fn live(device: &mut Device, cut: &Cut, time: u32) -> Life {
    device.kill();
    device.assign();
    device.prepare(cut.point);
    // A child dies alone or takes the agent along, in turn; the agent itself always dies.
    let along = if cut.round.is_multiple_of(2) {
        "+agent"
    } else {
        ""
    };
    device.start(Some(&format!("{}#{time}{along}", cut.point)));
    let (life, agent_died) = device.await_cut();
    if agent_died {
        device.check_disk(cut.point.starts_with("damaged."));
        device.start(None);
    }
    device.await_settled();
    device.check_accounts();
    life
}

#[test]
fn the_power_may_be_cut_at_every_kill_point() {
    let (rounds, seed) = (number("FORESHORE_CUTS", 2), number("FORESHORE_CUT_SEED", 1));
    let queue = Mutex::new(cuts(rounds, seed));
    let made: Mutex<BTreeMap<&str, u64>> = Mutex::default();
    std::thread::scope(|scope| {
        for number in 0..DEVICES {
            let (queue, made) = (&queue, &made);
            scope.spawn(move || {
                let mut device = Device::new(number);
                // Every other keeps old containers for a moment.
                device.beside = number % 2 == 1;
                // The first life has no cut and shows how often each point is passed.
                device.assign();
                device.start(None);
                device.await_settled();
                device.check_accounts();
                device.kill();
                device.assign();
                device.start(None);
                device.await_settled();
                device.count_passes();
                device.check_accounts();
                loop {
                    let Some(cut) = queue.lock().unwrap().pop() else {
                        break;
                    };
                    eprintln!("seed {seed}: {} round {}", cut.point, cut.round);
                    let passes = device.passes.get(cut.point).copied().unwrap_or(1).max(1);
                    let time = match cut.round {
                        0 => 1,
                        _ => 1 + u32::try_from(cut.random % u64::from(passes)).unwrap(),
                    };
                    let mut life = live(&mut device, &cut, time);
                    if life == Life::Whole && time > 1 {
                        // This life was shorter than the one that was counted.
                        life = live(&mut device, &cut, 1);
                    }
                    assert_eq!(
                        life,
                        Life::Cut,
                        "kill point {} was not reached (does the agent have kill points? see crate foreshore-killpoint)",
                        cut.point
                    );
                    *made.lock().unwrap().entry(cut.point).or_default() += 1;
                }
                device.finish();
            });
        }
    });
    let made = made.into_inner().unwrap();
    if std::env::var_os("FORESHORE_CUT_POINT").is_none() {
        for point in foreshore_killpoint::ALL {
            assert_eq!(made.get(point), Some(&rounds), "cuts at {point}");
        }
    }
    eprintln!(
        "{} kill points, {} cuts, seed {seed}",
        made.len(),
        made.values().sum::<u64>()
    );
}

/// The checks are only worth what they notice: with each fault in the way state is written, a cut at the right moment must
/// make one of them fail, and without it the same cut must not.
#[test]
fn each_fault_in_writing_state_is_noticed_by_the_checks_after_a_cut() {
    for (number, (fault, point, said)) in [
        // Half a file under the name that counts.
        ("in-place:head", "head.torn", "neither old nor new"),
        ("in-place:history", "history.torn", "neither old nor new"),
        // Acknowledged, and never on the disk. Long after, so that the hub has heard of it for sure.
        ("lost:head", "collect.begun", "was acknowledged"),
        // A container before its number.
        ("lost:history", "start.done", "its number is not remembered"),
    ]
    .into_iter()
    .enumerate()
    {
        for fault in [None, Some(fault)] {
            let mut device = Device::new(100 + number);
            device.assign();
            device.start(None);
            device.await_settled();
            device.kill();
            device.assign();
            device.fault = fault;
            device.start(Some(&format!("{point}#1")));
            assert_eq!(device.await_cut(), (Life::Cut, true), "{point}");
            let checked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                device.check_disk(false);
            }));
            let complaint = checked.err().map(|panic| {
                let text = panic.downcast_ref::<String>().cloned();
                text.or_else(|| panic.downcast_ref::<&str>().map(|&text| text.to_owned()))
                    .unwrap()
            });
            match (fault, complaint) {
                (None, None) => {}
                (Some(_), Some(complaint)) if complaint.contains(said) => {}
                (fault, complaint) => panic!("{point} with {fault:?}: {complaint:?}"),
            }
        }
    }
}
