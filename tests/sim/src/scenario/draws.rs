//! What operators do and what goes wrong in a run, drawn from its seed.

use super::{App, Command, Commands, Fault, Faults, HOUR, LARGE, MINUTE, Ms, SECOND};
use crate::random::{Random, hash};

pub(super) fn commands(
    random: &mut Random,
    apps: &[App],
    heals_at: Ms,
    devices: usize,
) -> Commands {
    let mut commands = Vec::new();
    for (app, one) in apps.iter().enumerate() {
        commands.push((random.below(10 * MINUTE), app, Command::Apply(0)));
        let applies = if devices > LARGE {
            2
        } else {
            random.between(1, 4)
        };
        for _ in 0..applies {
            let release = usize::try_from(random.below(one.releases.len() as u64)).unwrap_or(0);
            commands.push((
                random.between(10 * MINUTE, heals_at),
                app,
                Command::Apply(release),
            ));
        }
        for _ in 0..random.below(5) {
            let command = *random.pick(&[
                Command::Pause,
                Command::Resume,
                Command::Resume,
                Command::Abort,
                Command::Undo,
                Command::Approve,
                Command::Retry,
            ]);
            commands.push((random.between(5 * MINUTE, heals_at), app, command));
        }
        if one.joiners_from < devices {
            for device in one.joiners_from..devices.min(one.joiners_from + 8) {
                commands.push((random.below(heals_at), app, Command::Join(device)));
            }
        }
        for _ in 0..random.below(3) {
            let device = usize::try_from(random.below(devices as u64)).unwrap_or(0);
            let (from, span) = (random.below(heals_at), random.between(MINUTE, HOUR));
            commands.push((from, app, Command::Hold(device, true)));
            commands.push((from + span, app, Command::Hold(device, false)));
        }
    }
    commands
}

pub(super) fn faults(random: &mut Random, devices: usize, heals_at: Ms) -> Faults {
    let calm = random.chance(15);
    let count = if calm {
        0
    } else {
        random.below(12) + random.below(1 + 2 * devices.min(30) as u64)
    };
    let mut faults: Vec<_> = (0..count)
        .map(|_| {
            let device = usize::try_from(random.below(devices as u64)).unwrap_or(0);
            let span = *random.pick(&[5 * SECOND, MINUTE, 5 * MINUTE, 40 * MINUTE, 2 * HOUR]);
            let fault = match random.below(20) {
                0..3 => Fault::HubCrash(span.min(40 * MINUTE)),
                3 => Fault::BrokerOutage(span),
                4 => Fault::WipeRetained,
                5..7 => Fault::RegistryOutage(span),
                7..11 => Fault::LinkLoss(device, span),
                11..15 => Fault::PowerCut(device, span),
                15..18 => Fault::AgentCrash(device),
                _ => Fault::ContainerDies(device),
            };
            (random.below(heals_at), fault)
        })
        .collect();
    if random.chance(10) {
        // A device that dies in the middle of switching and stays dead until the end.
        let device = usize::try_from(random.below(devices as u64)).unwrap_or(0);
        faults.push((random.below(heals_at), Fault::PowerCut(device, 24 * HOUR)));
    }
    faults
}

/// In one run of five backups are made, and one is restored later, or the same twice.
pub(super) fn restores(seed: u64, heals_at: Ms) -> Faults {
    let mut random = Random::new(hash(&[seed, 43]));
    if !random.chance(20) {
        return Vec::new();
    }
    let mut faults = Vec::new();
    for _ in 0..random.between(1, 2) {
        faults.push((random.between(10 * MINUTE, heals_at), Fault::Backup));
    }
    for _ in 0..random.between(1, 2) {
        let which = usize::from(random.chance(50));
        // Long enough that nothing that was on its way before arrives after it.
        let away = random.between(MINUTE, 40 * MINUTE);
        let at = random.between(20 * MINUTE, heals_at);
        faults.push((at, Fault::Restore(which, away)));
    }
    faults
}

/// In one run of three devices leave an app's selector and mostly come back, and some are given up for good and come back.
pub(super) fn moves(seed: u64, apps: usize, heals_at: Ms, devices: usize) -> (Commands, Faults) {
    let mut random = Random::new(hash(&[seed, 44]));
    let (mut commands, mut faults) = (Vec::new(), Vec::new());
    if !random.chance(33) {
        return (commands, faults);
    }
    let device = |random: &mut Random| usize::try_from(random.below(devices as u64)).unwrap_or(0);
    for app in 0..apps {
        for _ in 0..random.between(1, 3) {
            let (device, at) = (device(&mut random), random.below(heals_at));
            commands.push((at, app, Command::Leave(device)));
            if random.chance(70) {
                let away = *random.pick(&[1, SECOND, MINUTE, 5 * MINUTE, HOUR]);
                commands.push((at + away, app, Command::Join(device)));
            }
        }
    }
    if random.chance(40) {
        let (device, at) = (device(&mut random), random.below(heals_at));
        faults.push((at, Fault::LinkLoss(device, 2 * HOUR)));
        commands.push((at + 30 * MINUTE, 0, Command::Forget(device)));
    }
    (commands, faults)
}

/// In one run of three operators resume oftener what stands still.
pub(super) fn resumes(seed: u64, apps: usize, heals_at: Ms) -> Commands {
    let mut random = Random::new(hash(&[seed, 45]));
    if !random.chance(33) {
        return Vec::new();
    }
    (0..apps * 4)
        .map(|number| (random.below(heals_at), number % apps, Command::Resume))
        .collect()
}
