//! Following a rollout: what to say of it, what changed, and progress bars on a terminal.

use foreshore_protocol::DeviceId;
use foreshore_protocol::api::{
    AssignmentState, AssignmentView, RolloutState, RolloutView, WaveState, WaveView,
};
use foreshore_protocol::message::Phase;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::output::{elapsed, printable, timestamp, word};
use crate::pulling;

/// How many devices of a wave are named while it is open.
const NAMED: usize = 6;

/// The wave that is being worked on: the last one that is not pending.
pub(crate) fn current_wave(rollout: &RolloutView) -> Option<&WaveView> {
    rollout
        .waves
        .iter()
        .rev()
        .find(|wave| wave.state != WaveState::Pending)
}

/// Whether a wave of it waits for an operator.
pub(crate) fn awaits_approval(rollout: &RolloutView) -> bool {
    rollout
        .waves
        .iter()
        .any(|wave| wave.state == WaveState::AwaitingApproval)
}

/// The state of one device's part, in one word.
fn state_word(state: AssignmentState) -> String {
    match state {
        AssignmentState::Planned => "planned".to_owned(),
        AssignmentState::Offered => "offered".to_owned(),
        AssignmentState::Device(phase) => word(&phase),
        AssignmentState::Silent => "silent".to_owned(),
        AssignmentState::Deferred => "deferred".to_owned(),
        AssignmentState::Reverted => "reverted".to_owned(),
    }
}

/// The rollout in one line.
pub(crate) fn headline(rollout: &RolloutView, now_ms: u64) -> String {
    let from = rollout
        .from
        .map_or_else(|| "nothing".to_owned(), |digest| digest.short());
    let took = elapsed(
        rollout
            .finished_ms
            .unwrap_or(now_ms)
            .saturating_sub(rollout.created_ms),
    );
    let verb = match rollout.state {
        RolloutState::Scheduled => "scheduled for",
        RolloutState::Running => "running for",
        RolloutState::Paused => "paused after",
        RolloutState::Completed => "completed in",
        RolloutState::Aborted => "aborted after",
        RolloutState::RollingBack => "rolling back after",
        RolloutState::RolledBack => "rolled back after",
        RolloutState::RollbackPaused => "rollback paused after",
        RolloutState::Superseded => "superseded after",
    };
    let took = match (rollout.state, rollout.start_at_ms) {
        (RolloutState::Scheduled, Some(at)) => timestamp(at),
        _ => took,
    };
    let message = rollout
        .message
        .as_ref()
        .map_or_else(String::new, |message| format!(": {}", printable(message)));
    format!(
        "rollout {} of {}, release {from} -> {}, {verb} {took}{message}",
        rollout.id,
        rollout.app,
        rollout.to.short()
    )
}

/// What a wave is at: its state, counts, and the devices in the middle of something.
pub(crate) fn wave_line(rollout: &RolloutView, wave: &WaveView, now_ms: u64) -> String {
    let mut text = format!("{}/{} {}", wave.succeeded, wave.devices, word(&wave.state));
    if wave.failed > 0 {
        text.push_str(&format!(", {} failed", wave.failed));
    }
    if wave.deferred > 0 {
        text.push_str(&format!(", {} deferred", wave.deferred));
    }
    if let Some(until) = wave
        .bake_until_ms
        .filter(|_| wave.state == WaveState::Baking)
    {
        text.push_str(&format!(" for {}", elapsed(until.saturating_sub(now_ms))));
    }
    if wave.state == WaveState::AwaitingApproval {
        text.push_str(&format!(
            "; `foreshore rollout approve {}` lets it go by",
            rollout.app
        ));
    } else if wave.needs_approval && wave.state != WaveState::Failed {
        text.push_str(", then approval");
    }
    let here = |part: &&AssignmentView| part.wave == wave.ordinal && !part.tail;
    text.push_str(&named(rollout.assignments.iter().filter(here)));
    text
}

/// Those that come after the last wave, if there are any.
pub(crate) fn tail_line(rollout: &RolloutView) -> Option<String> {
    let tail = rollout.tail.as_ref()?;
    let mut text = format!("{}/{} after the last wave", tail.succeeded, tail.devices);
    if tail.failed > 0 {
        text.push_str(&format!(", {} failed", tail.failed));
    }
    if tail.deferred > 0 {
        text.push_str(&format!(", {} deferred", tail.deferred));
    }
    if tail.stopped {
        text.push_str(&format!(
            ", stopped; `foreshore rollout resume {}` goes on",
            rollout.app
        ));
    }
    text.push_str(&named(rollout.assignments.iter().filter(|part| part.tail)));
    Some(text)
}

/// The devices among these that are in the middle of something.
fn named<'a>(parts: impl Iterator<Item = &'a AssignmentView>) -> String {
    let mut text = String::new();
    let busy: Vec<&AssignmentView> = parts.filter(|part| is_notable(part.state)).collect();
    let named: Vec<String> = busy
        .iter()
        .take(NAMED)
        .map(|part| {
            let pull = part.pull.as_ref().map(pulling::brief);
            let pull = pull.filter(|text| !text.is_empty());
            let pull = pull.map_or_else(String::new, |text| format!(" {text}"));
            format!("{} {}{pull}", part.device, stage(part))
        })
        .collect();
    if !named.is_empty() {
        text.push_str("  ");
        text.push_str(&named.join(" · "));
    }
    if busy.len() > NAMED {
        text.push_str(&format!(" · and {} more", busy.len() - NAMED));
    }
    text
}

/// How far a device is, and with which release if that is only a step on its way.
pub(crate) fn stage(part: &AssignmentView) -> String {
    let state = state_word(part.state);
    part.via.map_or_else(
        || state.to_owned(),
        |via| format!("{state} (via {})", via.short()),
    )
}

/// Whether a device is worth a word: neither waiting for its wave nor done and well.
const fn is_notable(state: AssignmentState) -> bool {
    !matches!(
        state,
        AssignmentState::Planned | AssignmentState::Device(Phase::Succeeded)
    )
}

/// What changed from `old` to `new`, one line each; everything worth knowing when there is no `old`.
pub(crate) fn changes(old: Option<&RolloutView>, new: &RolloutView) -> Vec<String> {
    let mut lines = Vec::new();
    if old.is_none() {
        let from = new
            .from
            .map_or_else(|| "nothing".to_owned(), |digest| digest.short());
        let devices: u64 = new.waves.iter().map(|wave| wave.devices).sum();
        lines.push(format!(
            "rollout {} of {}: release {from} -> {}, {devices} devices in {} waves",
            new.id,
            new.app,
            new.to.short(),
            new.waves.len()
        ));
    }
    for part in &new.assignments {
        let before = old
            .and_then(|old| assignment(old, &part.device))
            .map_or((AssignmentState::Planned, None), |part| {
                (part.state, part.via)
            });
        if before != (part.state, part.via) {
            let message = part
                .message
                .as_ref()
                .map_or_else(String::new, |message| format!(": {message}"));
            let place = if part.tail {
                "tail".to_owned()
            } else {
                format!("wave {}", part.wave)
            };
            lines.push(format!(
                "  {place} {}: {}{message}",
                part.device,
                stage(part)
            ));
        }
    }
    for wave in &new.waves {
        let before = old
            .and_then(|old| old.waves.iter().find(|other| other.ordinal == wave.ordinal))
            .map_or(WaveState::Pending, |wave| wave.state);
        if before != wave.state {
            lines.push(format!(
                "wave {}: {}, {}/{} succeeded, {} failed",
                wave.ordinal,
                word(&wave.state),
                wave.succeeded,
                wave.devices,
                wave.failed
            ));
        }
    }
    let before = old.map_or(RolloutState::Running, |old| old.state);
    if before != new.state {
        let message = new
            .message
            .as_ref()
            .map_or_else(String::new, |message| format!(": {message}"));
        lines.push(format!("rollout {}: {}{message}", new.id, word(&new.state)));
    }
    lines
}

fn assignment<'a>(rollout: &'a RolloutView, device: &DeviceId) -> Option<&'a AssignmentView> {
    rollout
        .assignments
        .iter()
        .find(|part| part.device == *device)
}

/// One bar per wave, on stderr.
#[derive(Debug)]
pub(crate) struct Bars {
    all: MultiProgress,
    head: ProgressBar,
    waves: Vec<ProgressBar>,
}

impl Bars {
    /// Nothing is drawn before the first [`Self::show`].
    pub(crate) fn new() -> Self {
        let all = MultiProgress::new();
        let head = all.add(ProgressBar::new_spinner());
        head.set_style(style("{spinner:.cyan} {wide_msg}"));
        head.enable_steady_tick(std::time::Duration::from_millis(120));
        Self {
            all,
            head,
            waves: Vec::new(),
        }
    }

    /// Draws the rollout as it is now.
    pub(crate) fn show(&mut self, rollout: &RolloutView, now_ms: u64) {
        self.head.set_message(headline(rollout, now_ms));
        for wave in rollout.waves.iter().skip(self.waves.len()) {
            let bar = self.all.add(ProgressBar::new(wave.devices));
            bar.set_prefix(format!("wave {}", wave.ordinal));
            self.waves.push(bar);
        }
        for (wave, bar) in rollout.waves.iter().zip(&self.waves) {
            let colour = match wave.state {
                WaveState::Pending | WaveState::Skipped => "dim",
                WaveState::Open => "cyan",
                WaveState::Baking | WaveState::AwaitingApproval => "yellow",
                WaveState::Passed => "green",
                WaveState::Failed => "red",
            };
            bar.set_style(
                style(&format!("  {{prefix}} {{bar:20.{colour}}} {{wide_msg}}"))
                    .progress_chars("━╸─"),
            );
            bar.set_position(wave.succeeded);
            bar.set_message(wave_line(rollout, wave, now_ms));
        }
    }

    /// A word in place of the headline, until the next [`Self::show`].
    pub(crate) fn say(&self, message: &str) {
        self.head.set_message(message.to_owned());
    }

    /// Leaves the last state on the terminal.
    pub(crate) fn finish(&mut self, rollout: &RolloutView, now_ms: u64) {
        self.show(rollout, now_ms);
        let mark = match rollout.state {
            RolloutState::Completed => "✔",
            RolloutState::Scheduled | RolloutState::Running | RolloutState::RollingBack => "…",
            RolloutState::Paused | RolloutState::RollbackPaused => "‖",
            RolloutState::Aborted | RolloutState::RolledBack | RolloutState::Superseded => "✘",
        };
        self.head.set_style(style(&format!("{mark} {{wide_msg}}")));
        for bar in &self.waves {
            bar.abandon();
        }
        self.head.abandon();
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).expect("the template is well-formed")
}

#[cfg(test)]
pub(crate) mod samples;

#[cfg(test)]
mod tests {
    use foreshore_protocol::api::TailView;

    use super::*;

    #[test]
    fn headline_and_waves() {
        let rollout = samples::rollout();
        let lines: Vec<String> = rollout
            .waves
            .iter()
            .map(|wave| wave_line(&rollout, wave, samples::NOW_MS))
            .collect();
        insta::assert_snapshot!(headline(&rollout, samples::NOW_MS));
        insta::assert_snapshot!(lines.join("\n"));
    }

    #[test]
    fn a_baking_wave_says_how_long() {
        let mut rollout = samples::rollout();
        rollout.waves[1].state = WaveState::Baking;
        rollout.waves[1].bake_until_ms = Some(samples::NOW_MS + 2500);
        insta::assert_snapshot!(wave_line(&rollout, &rollout.waves[1], samples::NOW_MS));
    }

    #[test]
    fn a_wave_that_waits_for_approval_says_how_to_give_it() {
        let mut rollout = samples::rollout();
        rollout.waves[1].needs_approval = true;
        let line = |rollout: &RolloutView| wave_line(rollout, &rollout.waves[1], samples::NOW_MS);
        assert!(
            line(&rollout).contains(", then approval"),
            "{}",
            line(&rollout)
        );
        assert!(!awaits_approval(&rollout));
        rollout.waves[1].state = WaveState::AwaitingApproval;
        let said = line(&rollout);
        assert!(
            said.contains("`foreshore rollout approve gateway`"),
            "{said}"
        );
        assert!(awaits_approval(&rollout));
    }

    #[test]
    fn those_after_the_last_wave_are_told_apart() {
        let mut rollout = samples::rollout();
        assert_eq!(tail_line(&rollout), None);
        rollout.assignments[4].tail = true;
        rollout.assignments[4].state = AssignmentState::Offered;
        rollout.tail = Some(TailView {
            devices: 3,
            succeeded: 1,
            failed: 1,
            deferred: 0,
            stopped: true,
        });
        assert_eq!(
            tail_line(&rollout).unwrap(),
            "1/3 after the last wave, 1 failed, stopped; `foreshore rollout resume gateway` goes on  gw-4 offered"
        );
    }

    #[test]
    fn a_device_that_fetches_says_how_far_it_is() {
        let mut rollout = samples::rollout();
        rollout.assignments[1].state = AssignmentState::Device(Phase::Staging);
        rollout.assignments[1].pull = Some(samples::pull());
        let line = wave_line(&rollout, &rollout.waves[1], samples::NOW_MS);
        assert!(line.contains("gw-1 staging 45%, 1m10s left"), "{line}");
    }

    #[test]
    fn only_changes_are_told() {
        let old = samples::rollout();
        insta::assert_snapshot!(changes(None, &old).join("\n"));
        assert!(changes(Some(&old), &old).is_empty());
        let mut new = old.clone();
        new.assignments[1].state = AssignmentState::Device(Phase::Succeeded);
        new.waves[1].succeeded = 1;
        new.waves[1].state = WaveState::Failed;
        new.state = RolloutState::RollingBack;
        new.message = Some("2 of 3 devices failed".to_owned());
        insta::assert_snapshot!(changes(Some(&old), &new).join("\n"));
    }

    #[test]
    fn many_busy_devices_are_counted() {
        let mut rollout = samples::rollout();
        for number in 10..20 {
            rollout.assignments.push(AssignmentView {
                device: format!("gw-{number}").parse().unwrap(),
                wave: 2,
                tail: false,
                state: AssignmentState::Offered,
                via: None,
                message: None,
                pull: None,
            });
        }
        let line = wave_line(&rollout, &rollout.waves[1], samples::NOW_MS);
        assert!(line.ends_with("gw-13 offered · and 6 more"), "{line}");
    }
}
