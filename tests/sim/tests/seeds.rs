//! A thousand seeds hold every rule, and each fault that is built in on purpose is noticed.

use std::sync::atomic::{AtomicU64, Ordering};

use foreshore_sim::mutation::Mutation;
use foreshore_sim::simulation::run;
use foreshore_sim::try_seed;

/// Runs `seed` for each of `seeds` on every core until one says stop; what it said.
fn first<T: Send>(seeds: u64, seed: impl Fn(u64) -> Option<T> + Sync) -> Option<T> {
    let next = AtomicU64::new(0);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let work = || {
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= seeds {
                return None;
            }
            if let Some(found) = seed(number) {
                next.store(seeds, Ordering::Relaxed);
                return Some(found);
            }
        }
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        workers
            .into_iter()
            .find_map(|worker| worker.join().expect("a panic in a run is printed above"))
    })
}

#[test]
fn a_thousand_seeds_hold_every_rule() {
    if let Some(failure) = first(1_000, |seed| try_seed(seed, None, None).err()) {
        panic!("{failure}");
    }
}

#[test]
fn a_seed_means_the_same_run_every_time() {
    for seed in 0..5 {
        let (one, other) = (run(seed, None, None, true), run(seed, None, None, true));
        assert_eq!(one.log, other.log);
        assert_eq!(
            (one.events, one.virtual_ms),
            (other.events, other.virtual_ms)
        );
    }
}

#[test]
fn two_hundred_devices_converge() {
    let failure = first(6, |seed| try_seed(11 + seed, Some(200), None).err());
    if let Some(failure) = failure {
        panic!("{failure}");
    }
}

/// The first seed that notices, and the rule that it names.
fn noticed(mutation: Mutation) -> Option<String> {
    // Seldom does a device need what it went back to after it collected that: begin near a run where it does.
    let from = match mutation {
        Mutation::CollectLastKnownGood => 1_300,
        _ => 0,
    };
    first(400, |seed| {
        run(from + seed, None, Some(mutation), false)
            .violations
            .into_iter()
            .next()
    })
}

#[test]
fn every_built_in_fault_is_noticed_by_the_right_rule() {
    let mut wrong = Vec::new();
    for mutation in Mutation::ALL {
        let rules: &[&str] = match mutation {
            Mutation::SkipBake => &["Gates", "WaveOrder", "Approval"],
            Mutation::OfferAfterBreak => &["NoOfferAfterBreak"],
            Mutation::IgnoreSlots => &["MaxUnavailable", "NotBeforeItsTurn", "OfferOnce"],
            Mutation::BlameDarkness => &["while most of the fleet is dark"],
            Mutation::OfflineIsFailure => &["SilentOnlyAfterSwitching"],
            Mutation::ForgetOutbox => &["never came to rest"],
            Mutation::IgnoreApproval => &["Approval"],
            Mutation::IgnorePace => &["Pace"],
            Mutation::IgnoreHolds => &["HeldOrBusy"],
            Mutation::AnyCanary => &["Strata"],
            Mutation::IgnoreTailBudget => &["TailBrakes"],
            Mutation::StartEarly => &["NotBeforeStart"],
            Mutation::MissNews => &["never came to rest"],
            Mutation::AcceptOldHeads => &["went from version"],
            Mutation::ForgetPoison => &["was given up"],
            Mutation::CollectLastKnownGood => &["was collected"],
            Mutation::RestartUnchanged => &["NeedlessStop", "unchanged container", "KeptStopped"],
            Mutation::IgnoreJobs => &["before its job"],
            Mutation::IgnoreWindows => &["window is closed"],
            Mutation::KeepEpoch => &["given out twice"],
            Mutation::CountEpochs => &["given out twice", "never came to rest"],
            Mutation::TellAtOnce => &["went on without the backup"],
            Mutation::LeaversKeepApps => &["which does not select it"],
            Mutation::IgnoreAnalysis => &["Gates"],
            Mutation::DoubtIsPass => &["passed although analysis"],
            Mutation::OfferWhilePaused => &["NothingWhileStopped"],
            Mutation::GrantWhilePaused => &["stands still"],
            Mutation::RollBackTheRollback => &["RollbackCause"],
            Mutation::BelieveOldWills => &["overrides the birth"],
            Mutation::StartAnother => &["NotCurrent", "UnknownService"],
            Mutation::ShuffleWaves => &["mean another plan"],
            Mutation::RefuseNewer => &["was on the wire, and was read as None"],
            Mutation::BelieveDamage => &["a damaged copy"],
            Mutation::StopBeforeStaged => &["NeedlessStop", "unchanged container", "KeptStopped"],
            // Random runs seldom meet what these need; `known_defects.rs` and `invariants.rs` have a run for each.
            Mutation::FreeWhenDark
            | Mutation::ForgetFailures
            | Mutation::FinishedIsGood
            | Mutation::SilenceIsFine
            | Mutation::AbortKeepsIntent
            | Mutation::CompareOnce
            | Mutation::LateTurns
            | Mutation::PlanOldHeads => continue,
        };
        match noticed(mutation) {
            Some(violation) if rules.iter().any(|rule| violation.contains(rule)) => {}
            other => wrong.push(format!("{mutation:?} was noticed as {other:?}")),
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
