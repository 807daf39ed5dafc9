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
}

impl Mutation {
    /// All of them.
    pub const ALL: [Self; 24] = [
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
    ];
}
