//! Whose turn it is: under a disruption budget, and where there is a window, a device switches to another release only
//! with a lease of the hub's.
//!
//! Staging goes on without one, what runs is healed without one, and the way back to the last-known-good never needs one.

use foreshore_protocol::message::{BudgetGroup, HeadApp, Reason, ReasonCode};
use foreshore_protocol::{AppName, Digest, Version};

use super::history::reason;
use super::{AppHistory, BootMs, Draft};

/// The right to begin to switch: of the hub, for one assignment, in the memory of one agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Turn {
    /// In which assignment.
    pub since: Version,
    /// To which release.
    pub release: Digest,
    /// It must have begun before this.
    pub until: BootMs,
}

/// What a device wants a turn for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TurnWish {
    /// In which assignment.
    pub since: Version,
    /// To which release.
    pub release: Digest,
}

/// Why an app must wait for its turn; `None`: it may switch now. What it wants is noted in both cases, so that a turn is not
/// given back before it is used.
pub(super) fn waits(
    draft: &mut Draft<'_>,
    app: &AppName,
    history: &AppHistory,
    desired: &HeadApp,
) -> Option<Reason> {
    // All whose window opens at the same moment would switch at once: then the hub says who goes first, too.
    let asks = !draft.budgets.is_empty() || desired.windows.switch.is_some();
    if !asks || goes_on(history, desired) {
        return None;
    }
    let wish = TurnWish {
        since: desired.since,
        release: desired.release,
    };
    draft.turns.insert(app.clone(), wish);
    let turn = draft
        .observed
        .turns
        .get(app)
        .filter(|turn| (turn.since, turn.release) == (wish.since, wish.release));
    match turn {
        Some(turn) if draft.is_later(turn.until) => None,
        Some(_) | None => Some(reason(ReasonCode::WaitsForTurn, None, &why(draft.budgets))),
    }
}

/// Whether nothing is disrupted: what is assigned runs already and is good, or is being switched to. One that failed is tried
/// anew like any other.
pub(super) fn goes_on(history: &AppHistory, desired: &HeadApp) -> bool {
    let good = history.last_known_good.as_ref();
    history.current == Some(desired.release)
        && (history.trial.is_some() || good.is_some_and(|good| good.release == desired.release))
}

fn why(budgets: &[BudgetGroup]) -> String {
    if budgets.is_empty() {
        return "waits for its turn (maxUnavailable of the rollout)".to_owned();
    }
    let budgets: Vec<String> = budgets.iter().map(ToString::to_string).collect();
    format!("waits for its turn ({})", budgets.join("; "))
}
