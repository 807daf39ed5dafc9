//! What must hold of selectors and of a rollout's policy.

use std::fmt::Display;

use super::{Checked, MAX_WAVES, ensure};
use crate::manifest::{Canary, FailureBudget, Pace, RolloutPolicy, Selector, WaveSpec, WaveTarget};
use crate::quantity::Span;

/// Requirements of one selector.
const MAX_REQUIREMENTS: usize = 32;
/// Values of one requirement.
const MAX_VALUES: usize = 256;
/// Labels that make a canary's kind.
const MAX_STRATUM_LABELS: usize = 8;
const MAX_PER_MINUTE: u32 = 1_000_000;
const MAX_PRIORITY: u8 = 100;

pub(in crate::manifest) fn selector(path: impl Display, selector: &Selector) -> Checked {
    ensure(selector.requirements() <= MAX_REQUIREMENTS, &path, || {
        format!("at most {MAX_REQUIREMENTS} requirements are allowed")
    })?;
    for (index, expression) in selector.match_expressions.iter().enumerate() {
        let values = expression.values.len();
        let at = format!("{path}.matchExpressions[{index}].values");
        if expression.operator.takes_values() {
            ensure((1..=MAX_VALUES).contains(&values), at, || {
                format!(
                    "operator {:?} needs 1 to {MAX_VALUES} values",
                    expression.operator
                )
            })?;
        } else {
            ensure(values == 0, at, || {
                format!("operator {:?} takes no values", expression.operator)
            })?;
        }
    }
    Ok(())
}

pub(super) fn policy(path: &str, policy: &RolloutPolicy) -> Checked {
    if let Some(canary) = &policy.canary {
        self::canary(path, canary)?;
    }
    waves(path, &policy.waves)?;
    ensure(
        policy.progress_deadline > Span(0),
        format_args!("{path}.progressDeadline"),
        || "must be above 0".to_owned(),
    )?;
    budget(format_args!("{path}.failureBudget"), &policy.failure_budget)?;
    for (key, speed) in [
        ("pace", policy.pace.as_ref()),
        ("tail.pace", Some(&policy.tail.pace)),
    ] {
        speed.map_or(Ok(()), |speed| pace(&format!("{path}.{key}"), speed))?;
    }
    budget(
        format_args!("{path}.tail.failureBudget"),
        &policy.tail.failure_budget,
    )?;
    ensure(
        policy.priority <= MAX_PRIORITY,
        format_args!("{path}.priority"),
        || format!("must be 0 to {MAX_PRIORITY}, not {}", policy.priority),
    )
}

fn canary(path: &str, canary: &Canary) -> Checked {
    ensure(
        canary.per_stratum >= 1,
        format_args!("{path}.canary.perStratum"),
        || "must be at least 1".to_owned(),
    )?;
    ensure(
        (1..=MAX_STRATUM_LABELS).contains(&canary.by.len()),
        format_args!("{path}.canary.by"),
        || format!("must have 1 to {MAX_STRATUM_LABELS} labels, for example [model, site]"),
    )
}

fn budget(path: impl Display, budget: &FailureBudget) -> Checked {
    ensure(budget.count >= 1, format_args!("{path}.count"), || {
        "must be at least 1".to_owned()
    })?;
    ensure(
        budget.percent <= 100,
        format_args!("{path}.percent"),
        || format!("must be 0 to 100, not {}", budget.percent),
    )?;
    ensure(
        budget.min_sample >= 1,
        format_args!("{path}.minSample"),
        || "must be at least 1".to_owned(),
    )
}

fn pace(path: &str, pace: &Pace) -> Checked {
    ensure(
        (1..=MAX_PER_MINUTE).contains(&pace.per_minute),
        format_args!("{path}.perMinute"),
        || format!("must be 1 to {MAX_PER_MINUTE}, not {}", pace.per_minute),
    )?;
    ensure(
        pace.double_every != Some(0),
        format_args!("{path}.doubleEvery"),
        || "must be at least 1".to_owned(),
    )?;
    ensure(
        pace.max_per_minute
            .is_none_or(|most| (pace.per_minute..=MAX_PER_MINUTE).contains(&most)),
        format_args!("{path}.maxPerMinute"),
        || {
            format!(
                "must be perMinute ({}) to {MAX_PER_MINUTE}",
                pace.per_minute
            )
        },
    )
}

/// Counts must grow, and percentages must grow. Whether 3 devices are more than 10 % is known only for a
/// fleet: a wave that turns out to add no device is skipped there.
fn waves(path: &str, waves: &[WaveSpec]) -> Checked {
    ensure(
        waves.len() <= MAX_WAVES,
        format_args!("{path}.waves"),
        || format!("at most {MAX_WAVES} waves are allowed, not {}", waves.len()),
    )?;
    let (mut count, mut percent) = (0, 0);
    for (index, wave) in waves.iter().enumerate() {
        let path = format!("{path}.waves[{index}]");
        ensure(percent < 100, &path, || {
            "comes after 100 percent, which is every device; remove it".to_owned()
        })?;
        match &wave.target {
            WaveTarget::Count(new) => {
                ensure(*new >= 1, &path, || "count must be at least 1".to_owned())?;
                ensure(*new > count, &path, || grow(new, count, "devices"))?;
                count = *new;
            }
            WaveTarget::Percent(new) => {
                ensure((1..=100).contains(new), &path, || {
                    format!("percent must be 1 to 100, not {new}")
                })?;
                ensure(*new > percent, &path, || grow(new, percent, "percent"))?;
                percent = *new;
            }
            WaveTarget::Selector(selector) => {
                self::selector(format_args!("{path}.selector"), selector)?;
                ensure(
                    selector.requirements() > 0,
                    format_args!("{path}.selector"),
                    || "selects every device; write {percent: 100}".to_owned(),
                )?;
            }
            WaveTarget::Canary(_) => {
                ensure(false, &path, || {
                    "canary belongs beside `waves`, not among them".to_owned()
                })?;
            }
        }
        if let Some(budget) = &wave.failure_budget {
            self::budget(format_args!("{path}.failureBudget"), budget)?;
        }
    }
    Ok(())
}

fn grow(new: impl Display, before: impl Display, unit: &str) -> String {
    format!("targets are cumulative and must grow: {new} {unit} come after {before}")
}
