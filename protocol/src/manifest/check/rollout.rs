//! What must hold of selectors and of a rollout's policy.

use std::fmt::Display;

use super::{Checked, MAX_WAVES, ensure};
use crate::manifest::analysis::PLACEHOLDERS;
use crate::manifest::{
    Analysis, Canary, FailureBudget, MaintenanceWindow, Pace, RolloutPolicy, Selector, WaveSpec,
    WaveTarget,
};
use crate::message::MAX_WINDOW_MS;
use crate::quantity::Span;

/// Requirements of one selector.
const MAX_REQUIREMENTS: usize = 32;
/// Values of one requirement.
const MAX_VALUES: usize = 256;
/// Labels that make a canary's kind.
const MAX_STRATUM_LABELS: usize = 8;
/// Releases of `requiresFrom`.
const MAX_REQUIRED: usize = 16;
const MAX_PER_MINUTE: u32 = 1_000_000;
const MAX_PRIORITY: u8 = 100;
const MAX_ANALYSES: usize = 8;
/// Of a gate, of each kind.
const MAX_ANSWERS: u32 = 1000;
const MAX_QUERY_BYTES: usize = 4096;
/// Percent.
const MAX_TOLERANCE: u32 = 1000;
/// Of fewer on each side the test that compares them can tell nothing.
const MIN_SAMPLE: u32 = 5;
const MAX_SAMPLE: u32 = 10_000;
/// Each one lets a device take its deadline and its soak once more.
const MAX_RESTARTS: u32 = 10;
/// A lost connection is made again within five minutes at the latest, but seldom takes one.
const MIN_REQUIRE_HUB: Span = Span::from_secs(60);
const MAX_REQUIRE_HUB: Span = Span::from_secs(24 * 3600);
/// Cron expressions have whole minutes.
const MIN_WINDOW: Span = Span::from_secs(60);
/// A window that is open for a week is one that is always open, or one that should be written otherwise.
const MAX_WINDOW: Span = Span(MAX_WINDOW_MS);

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
    analyses(path, &policy.analysis)?;
    for (key, window) in [
        ("window", policy.window.as_ref()),
        ("downloadWindow", policy.download_window.as_ref()),
    ] {
        window.map_or(Ok(()), |window| {
            self::window(&format!("{path}.{key}"), window)
        })?;
    }
    ensure(
        policy.max_restarts <= MAX_RESTARTS,
        format_args!("{path}.maxRestarts"),
        || format!("must be 0 to {MAX_RESTARTS}, not {}", policy.max_restarts),
    )?;
    if let Some(within) = policy.require_hub {
        ensure(
            (MIN_REQUIRE_HUB..=MAX_REQUIRE_HUB).contains(&within),
            format_args!("{path}.requireHub"),
            || format!("must be {MIN_REQUIRE_HUB} to {MAX_REQUIRE_HUB}, not {within}"),
        )?;
    }
    ensure(
        policy.requires_from.len() <= MAX_REQUIRED,
        format_args!("{path}.requiresFrom"),
        || {
            let count = policy.requires_from.len();
            format!("at most {MAX_REQUIRED} releases are allowed, not {count}")
        },
    )?;
    ensure(
        policy.priority <= MAX_PRIORITY,
        format_args!("{path}.priority"),
        || format!("must be 0 to {MAX_PRIORITY}, not {}", policy.priority),
    )
}

fn analyses(path: &str, gates: &[Analysis]) -> Checked {
    let path = format!("{path}.analysis");
    ensure(gates.len() <= MAX_ANALYSES, &path, || {
        format!("at most {MAX_ANALYSES} are allowed, not {}", gates.len())
    })?;
    for (index, gate) in gates.iter().enumerate() {
        let path = format!("{path}[{index}]");
        let named = |byte: u8| byte.is_ascii_alphanumeric() || b"-_".contains(&byte);
        ensure(
            (1..=63).contains(&gate.name.len()) && gate.name.bytes().all(named),
            format_args!("{path}.name"),
            || "must be 1 to 63 letters, digits, - and _".to_owned(),
        )?;
        let twice = gates
            .iter()
            .take(index)
            .any(|other| other.name == gate.name);
        ensure(!twice, format_args!("{path}.name"), || {
            format!("{} is the name of another gate already", gate.name)
        })?;
        analysis(&path, gate)?;
    }
    Ok(())
}

fn analysis(path: &str, gate: &Analysis) -> Checked {
    let kinds = [
        gate.promql.is_some(),
        gate.webhook.is_some(),
        gate.control.is_some(),
    ];
    let given = kinds.into_iter().filter(|given| *given).count();
    ensure(given == 1, path, || {
        "exactly one of promql, webhook and control must be given".to_owned()
    })?;
    for (key, number, least) in [
        ("count", gate.count, 1),
        ("failureLimit", gate.failure_limit, 0),
        ("inconclusiveLimit", gate.inconclusive_limit, 0),
    ] {
        ensure(
            (least..=MAX_ANSWERS).contains(&number),
            format_args!("{path}.{key}"),
            || format!("must be {least} to {MAX_ANSWERS}, not {number}"),
        )?;
    }
    if let Some(interval) = gate.interval {
        ensure(
            (Span::from_secs(1)..=Span::from_secs(86_400)).contains(&interval),
            format_args!("{path}.interval"),
            || format!("must be 1s to 24h, not {interval}"),
        )?;
    }
    if let Some((url, Some(_))) = gate.endpoint() {
        ensure(url.is_secure(), path, || {
            "a bearerSecret is sent over https:// only".to_owned()
        })?;
    }
    if let Some(promql) = &gate.promql {
        query(&format!("{path}.promql.query"), &promql.query)?;
    }
    if let Some(control) = &gate.control {
        ensure(
            control.tolerance <= MAX_TOLERANCE,
            format_args!("{path}.control.tolerance"),
            || format!("must be 0 to {MAX_TOLERANCE}, not {}", control.tolerance),
        )?;
        ensure(
            (MIN_SAMPLE..=MAX_SAMPLE).contains(&control.min_sample),
            format_args!("{path}.control.minSample"),
            || {
                format!(
                    "must be {MIN_SAMPLE} to {MAX_SAMPLE}, not {}",
                    control.min_sample
                )
            },
        )?;
    }
    Ok(())
}

fn query(path: &str, query: &str) -> Checked {
    ensure(
        (1..=MAX_QUERY_BYTES).contains(&query.trim().len()) && query.len() <= MAX_QUERY_BYTES,
        path,
        || format!("must have 1 to {MAX_QUERY_BYTES} bytes"),
    )?;
    for rest in query.split("${").skip(1) {
        let name = rest.split_once('}').map(|(name, _)| name);
        ensure(
            name.is_some_and(|name| PLACEHOLDERS.contains(&name)),
            path,
            || {
                format!(
                    "after ${{ comes one of {} and a }}",
                    PLACEHOLDERS.join(", ")
                )
            },
        )?;
    }
    Ok(())
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

fn window(path: &str, window: &MaintenanceWindow) -> Checked {
    let open = window.open_for;
    ensure(
        (MIN_WINDOW..=MAX_WINDOW).contains(&open),
        format_args!("{path}.for"),
        || format!("must be {MIN_WINDOW} to {MAX_WINDOW}, not {open}"),
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
