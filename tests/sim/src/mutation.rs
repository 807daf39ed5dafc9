//! Deliberate faults in the simulated hub and devices. Each breaks one promise; a test shows that the simulator
//! notices, or its silence about the real code would mean nothing.

/// What is wrong on purpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mutation {
    /// The hub opens the next wave without waiting for the bake.
    SkipBake,
    /// The hub offers the release to one more device after the brakes.
    OfferAfterBreak,
    /// The hub offers to as many devices as it likes.
    IgnoreSlots,
    /// The hub believes that darkness is never its own.
    BlameDarkness,
    /// The hub counts devices that were put off as silent.
    OfflineIsFailure,
    /// The hub keeps its outbox in memory only and repairs nothing.
    ForgetOutbox,
    /// The hub lets waves pass that nobody approved.
    IgnoreApproval,
    /// The hub forgets when the next device is due.
    IgnorePace,
    /// The hub offers releases to devices that an operator holds.
    IgnoreHolds,
    /// The hub replaces a canary by a device of another kind.
    AnyCanary,
    /// The hub goes on after failures of devices that come after the last wave.
    IgnoreTailBudget,
    /// The hub does not wait for a rollout's time.
    StartEarly,
    /// The hub does not tell its engine which devices spoke.
    MissNews,
    /// A device takes any head as the newest.
    AcceptOldHeads,
    /// A device forgets at a reboot what failed.
    ForgetPoison,
    /// A device collects whatever does not run now.
    CollectLastKnownGood,
    /// A device restarts all services of an app when one changes.
    RestartUnchanged,
    /// A device takes jobs for done.
    IgnoreJobs,
    /// A device begins whether its windows are open or not.
    IgnoreWindows,
    /// The hub gives the turn of a device that is dark to another.
    FreeWhenDark,
    /// The hub counts failures in memory only.
    ForgetFailures,
    /// The hub takes a wave that is over for one that went well.
    FinishedIsGood,
    /// The hub waits for ever for devices that went dark while switching.
    SilenceIsFine,
    /// The hub leaves what it has offered in place when a rollout is aborted.
    AbortKeepsIntent,
    /// A restored hub goes on in the epoch of its backup.
    KeepEpoch,
    /// A restored hub begins the epoch after that of its backup, whoever else was restored from it.
    CountEpochs,
    /// A restored hub tells all devices at once what its backup says.
    TellAtOnce,
    /// A restored hub asks each device once what it has, and never again.
    CompareOnce,
    /// The hub leaves apps on devices that they no longer select.
    LeaversKeepApps,
    /// The hub lets waves pass whose gates were not asked.
    IgnoreAnalysis,
    /// The hub takes a gate that cannot tell for one that is content.
    DoubtIsPass,
    /// The hub goes on offering while an operator has paused the rollout.
    OfferWhilePaused,
    /// The hub gives turns to devices of a rollout that stands still.
    GrantWhilePaused,
    /// The hub answers a way back that fails with another way back.
    RollBackTheRollback,
    /// The hub takes any Will for the newest word of a device.
    BelieveOldWills,
    /// A device stops what runs while it still fetches what comes next.
    StopBeforeStaged,
    /// A device goes on with the head before the newest.
    PlanOldHeads,
    /// A device takes a turn for its own whatever it answers and however late it comes.
    LateTurns,
    /// A device starts another release than the one it is at.
    StartAnother,
    /// The hub cuts waves by another seed than it says.
    ShuffleWaves,
    /// Receivers refuse messages into which a newer sender wrote more than they know of.
    RefuseNewer,
    /// Receivers do not look at checksums.
    BelieveDamage,
}

impl Mutation {
    /// All of them.
    pub const ALL: [Self; 42] = [
        Self::SkipBake,
        Self::OfferAfterBreak,
        Self::IgnoreSlots,
        Self::BlameDarkness,
        Self::OfflineIsFailure,
        Self::ForgetOutbox,
        Self::IgnoreApproval,
        Self::IgnorePace,
        Self::IgnoreHolds,
        Self::AnyCanary,
        Self::IgnoreTailBudget,
        Self::StartEarly,
        Self::MissNews,
        Self::AcceptOldHeads,
        Self::ForgetPoison,
        Self::CollectLastKnownGood,
        Self::RestartUnchanged,
        Self::IgnoreJobs,
        Self::IgnoreWindows,
        Self::FreeWhenDark,
        Self::ForgetFailures,
        Self::FinishedIsGood,
        Self::SilenceIsFine,
        Self::AbortKeepsIntent,
        Self::KeepEpoch,
        Self::CountEpochs,
        Self::TellAtOnce,
        Self::CompareOnce,
        Self::LeaversKeepApps,
        Self::IgnoreAnalysis,
        Self::DoubtIsPass,
        Self::OfferWhilePaused,
        Self::GrantWhilePaused,
        Self::RollBackTheRollback,
        Self::BelieveOldWills,
        Self::StopBeforeStaged,
        Self::PlanOldHeads,
        Self::LateTurns,
        Self::StartAnother,
        Self::ShuffleWaves,
        Self::RefuseNewer,
        Self::BelieveDamage,
    ];
}
