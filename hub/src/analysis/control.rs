//! PURE: whether devices that have a release use more of something than devices of their kind that do not have it.
//!
//! The test is the stratified Wilcoxon rank-sum test of van Elteren ("On the combination of independent two-sample tests of
//! Wilcoxon", Bulletin de l'Institut International de Statistique 37, 1960): each kind of device is ranked for itself (with
//! mid-ranks and the variance corrected for ties, as in Lehmann, "Nonparametrics", 1975, sections 1.4 and 3.3), and the
//! rank sums are added with the weights 1 / (N + 1). For one kind it is the Mann-Whitney U test. No distribution of the
//! values is assumed; kinds may differ as much as they like. As in Kayenta (Netflix's and Google's canary judge, which uses
//! Mann-Whitney at 98 % together with an effect size) a difference must be both unlikely to be chance and large.

use std::collections::BTreeMap;

use foreshore_protocol::manifest::{Control, ControlMetric};

use super::answer::Answer;
use crate::rollout::analysis::Verdict;

/// The 99 % quantile of the normal distribution: by chance alone one wave in a hundred seems to be worse.
const CRITICAL: f64 = 2.326_347_9;

/// One device's value.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sample {
    /// Its kind.
    pub stratum: u32,
    /// What it said last; finite.
    pub value: f64,
}

/// Compares the devices of a wave with those of their kinds that do not have the release. Kinds of which there are devices on
/// one side only say nothing.
#[must_use]
pub fn compare(wave: &[Sample], others: &[Sample], control: &Control) -> Answer {
    let mut kinds: BTreeMap<u32, (Vec<f64>, Vec<f64>)> = BTreeMap::new();
    for sample in wave.iter().filter(|sample| sample.value.is_finite()) {
        kinds
            .entry(sample.stratum)
            .or_default()
            .0
            .push(sample.value);
    }
    for sample in others.iter().filter(|sample| sample.value.is_finite()) {
        kinds
            .entry(sample.stratum)
            .or_default()
            .1
            .push(sample.value);
    }
    kinds.retain(|_, (with, without)| !with.is_empty() && !without.is_empty());
    let with: usize = kinds.values().map(|(with, _)| with.len()).sum();
    let without: usize = kinds.values().map(|(_, without)| without.len()).sum();
    let least = usize::try_from(control.min_sample).unwrap_or(usize::MAX);
    if with < least || without < least {
        return Answer::inconclusive(&format!(
            "{with} devices with the release and {without} of their kinds without it have said how they are since; at least \
             {least} of each are needed"
        ));
    }
    let (mut sum, mut variance) = (0.0, 0.0);
    let (mut ours, mut theirs, mut weight) = (0.0, 0.0, 0.0);
    for (with, without) in kinds.values() {
        let (excess, spread) = rank_sum(with, without);
        let share = 1.0 / (count(with) + count(without) + 1.0);
        sum += share * excess;
        variance += share * share * spread;
        ours += count(with) * median(with);
        theirs += count(with) * median(without);
        weight += count(with);
    }
    let z = if variance > 0.0 {
        sum / variance.sqrt()
    } else {
        0.0
    };
    let (ours, theirs) = (ours / weight, theirs / weight);
    let is_large = ours > theirs * (1.0 + f64::from(control.tolerance) / 100.0);
    let worse = z > CRITICAL && is_large;
    Answer {
        verdict: if worse { Verdict::Fail } else { Verdict::Pass },
        message: format!(
            "{}: {} in the middle of {with} devices with the release, {} of {without} without it; z = {z:.1}",
            name(control.metric),
            shown(control.metric, ours),
            shown(control.metric, theirs),
        ),
    }
}

const fn name(metric: ControlMetric) -> &'static str {
    match metric {
        ControlMetric::Memory => "memory",
        ControlMetric::Load => "load",
    }
}

fn shown(metric: ControlMetric, value: f64) -> String {
    match metric {
        ControlMetric::Memory => format!("{value:.1} MiB"),
        ControlMetric::Load => format!("{:.2}", value / 100.0),
    }
}

#[expect(
    clippy::cast_precision_loss,
    reason = "there are far fewer than 2^52 devices"
)]
const fn count(values: &[f64]) -> f64 {
    values.len() as f64
}

/// How far the rank sum of `with` is above what chance gives it, and the variance of that.
fn rank_sum(with: &[f64], without: &[f64]) -> (f64, f64) {
    let mut all: Vec<(f64, bool)> = with
        .iter()
        .map(|value| (*value, true))
        .chain(without.iter().map(|value| (*value, false)))
        .collect();
    all.sort_by(|one, other| one.0.total_cmp(&other.0));
    let (m, n) = (count(with), count(without));
    let total = m + n;
    let (mut ranks, mut ties, mut before) = (0.0, 0.0, 0.0);
    #[expect(clippy::float_cmp, reason = "ties are equal values")]
    for tied in all.chunk_by(|one, other| one.0 == other.0) {
        let mut ours = 0.0;
        let mut size = 0.0;
        for (_, is_ours) in tied {
            size += 1.0;
            ours += if *is_ours { 1.0 } else { 0.0 };
        }
        ranks += ours * (before + (size + 1.0) / 2.0);
        ties += size * size * size - size;
        before += size;
    }
    let expected = m * (total + 1.0) / 2.0;
    let spread = m * n / 12.0 * (total + 1.0 - ties / (total * (total - 1.0)));
    (ranks - expected, spread.max(0.0))
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    let upper = sorted.get(middle).copied().unwrap_or(0.0);
    if sorted.len().is_multiple_of(2) {
        let lower = middle.checked_sub(1).and_then(|index| sorted.get(index));
        f64::midpoint(lower.copied().unwrap_or(upper), upper)
    } else {
        upper
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const CONTROL: Control = Control {
        metric: ControlMetric::Memory,
        tolerance: 25,
        min_sample: 5,
    };

    fn samples(stratum: u32, values: &[f64]) -> Vec<Sample> {
        let sample = |value: &f64| Sample {
            stratum,
            value: *value,
        };
        values.iter().map(sample).collect()
    }

    fn verdict(wave: &[Sample], others: &[Sample]) -> Verdict {
        compare(wave, others, &CONTROL).verdict
    }

    #[test]
    fn rank_sums_are_those_of_the_book() {
        // Lehmann, "Nonparametrics", section 1.1: ranks 3, 4 and 5 of 5 is as far as it goes; mean 9, variance 3.
        let (excess, variance) = rank_sum(&[3.0, 4.0, 5.0], &[1.0, 2.0]);
        assert!((excess - 3.0).abs() < 1e-12 && (variance - 3.0).abs() < 1e-12);
        // R: wilcox.test(c(1, 2, 2, 5), c(2, 3, 4, 5, 6), exact = FALSE, correct = FALSE): W = 4.5, p = 0.1695.
        let (excess, variance) = rank_sum(&[1.0, 2.0, 2.0, 5.0], &[2.0, 3.0, 4.0, 5.0, 6.0]);
        let z = excess / variance.sqrt();
        assert!((excess + 5.5).abs() < 1e-12, "{excess}");
        assert!((-1.4..-1.35).contains(&z), "{z}");
    }

    #[test]
    fn a_leak_is_found_and_noise_is_not() {
        let calm: Vec<f64> = (0..20).map(|n| 100.0 + f64::from(n % 7)).collect();
        let leak: Vec<f64> = (0..6).map(|n| 160.0 + f64::from(n)).collect();
        let little: Vec<f64> = (0..6).map(|n| 108.0 + f64::from(n)).collect();
        let same: Vec<f64> = (0..6).map(|n| 100.0 + f64::from(n)).collect();
        let others = samples(0, &calm);
        assert_eq!(verdict(&samples(0, &leak), &others), Verdict::Fail);
        assert_eq!(
            verdict(&samples(0, &little), &others),
            Verdict::Pass,
            "within the tolerance"
        );
        assert_eq!(verdict(&samples(0, &same), &others), Verdict::Pass);
        assert_eq!(
            verdict(&others, &samples(0, &leak)),
            Verdict::Pass,
            "less is better"
        );
    }

    #[test]
    fn kinds_are_compared_with_their_own() {
        // The second kind always uses ten times as much; the wave has more of it than the rest.
        let wave = [
            samples(0, &[10.0, 11.0]),
            samples(1, &[100.0, 101.0, 99.0, 100.0]),
        ]
        .concat();
        let others = [
            samples(0, &[10.0, 11.0, 10.0, 9.0, 12.0]),
            samples(1, &[101.0, 100.0]),
        ]
        .concat();
        assert_eq!(verdict(&wave, &others), Verdict::Pass);
        let mixed: Vec<Sample> = wave.iter().map(|s| Sample { stratum: 0, ..*s }).collect();
        let all: Vec<Sample> = others.iter().map(|s| Sample { stratum: 0, ..*s }).collect();
        assert_ne!(
            compare(&mixed, &all, &CONTROL),
            compare(&wave, &others, &CONTROL)
        );
        // Of a kind that is on one side only nothing is learnt.
        let alone = samples(2, &[1e9; 50]);
        let with = [wave.clone(), alone].concat();
        assert_eq!(
            compare(&with, &others, &CONTROL),
            compare(&wave, &others, &CONTROL)
        );
    }

    #[test]
    fn too_few_are_no_verdict() {
        let many = samples(0, &[1.0; 50]);
        for few in [0, 1, 4] {
            assert_eq!(verdict(&many[..few], &many), Verdict::Inconclusive);
            assert_eq!(verdict(&many, &many[..few]), Verdict::Inconclusive);
        }
        assert_eq!(
            verdict(&many[..5], &many[..5]),
            Verdict::Pass,
            "all are equal"
        );
    }

    fn any_samples() -> impl Strategy<Value = Vec<Sample>> {
        let sample = (0_u32..3, 0_u32..500).prop_map(|(stratum, value)| Sample {
            stratum,
            value: f64::from(value),
        });
        prop::collection::vec(sample, 0..40)
    }

    proptest! {
        #[test]
        fn both_sides_are_never_worse_than_each_other(one in any_samples(), other in any_samples()) {
            let both = [verdict(&one, &other), verdict(&other, &one)];
            prop_assert_ne!(both, [Verdict::Fail; 2]);
            prop_assert_ne!(verdict(&one, &one), Verdict::Fail);
        }

        #[test]
        fn neither_order_nor_unit_counts(mut one in any_samples(), mut other in any_samples()) {
            let before = verdict(&one, &other);
            one.reverse();
            other.reverse();
            for sample in one.iter_mut().chain(&mut other) {
                sample.value *= 1024.0;
            }
            prop_assert_eq!(verdict(&one, &other), before);
        }

        #[test]
        fn any_numbers_are_judged(values in prop::collection::vec((0_u32..3, any::<f64>()), 0..60), at in 0_usize..60) {
            let samples: Vec<Sample> = values.into_iter().map(|(stratum, value)| Sample { stratum, value }).collect();
            let (one, other) = samples.split_at(at.min(samples.len()));
            _ = compare(one, other, &CONTROL);
        }
    }
}
