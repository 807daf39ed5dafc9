//! Sizes and order of waves.

use super::properties::targets;
use super::*;
use foreshore_protocol::manifest::Canary;

fn cut(targets: &[WaveTarget], total: usize) -> Vec<waves::Slice> {
    let specs: Vec<_> = targets.iter().cloned().map(WaveSpec::from).collect();
    let members = (0..total).map(|number| (device(number), labels(number)));
    waves::cut(&specs, 7, &members.collect())
}

fn canary(per_stratum: u32, by: &[&str]) -> WaveTarget {
    WaveTarget::Canary(Canary {
        per_stratum,
        by: by.iter().map(|key| key.parse().unwrap()).collect(),
    })
}

#[test]
fn canaries_are_of_every_kind_and_no_others() {
    let waves = cut(
        &[canary(1, &["model", "site"]), WaveTarget::Percent(50)],
        60,
    );
    let sizes: Vec<_> = waves.iter().map(|slice| slice.devices.len()).collect();
    assert_eq!(sizes, [6, 24, 30], "three models at two sites");
    let kinds: BTreeSet<_> = waves[0]
        .devices
        .iter()
        .map(|device| number_of(device) % 6)
        .collect();
    assert_eq!(kinds.len(), 6);
    assert_eq!(cut(&[canary(2, &["model"])], 60)[0].devices.len(), 6);
    assert_eq!(
        cut(&[canary(2, &["model"])], 4)[0].devices.len(),
        4,
        "one model has two, two have one"
    );
    assert_eq!(
        cut(&[canary(3, &["missing"])], 9)[0].devices.len(),
        3,
        "no label is a kind too"
    );
}

#[test]
fn a_wave_by_selector_has_all_that_match_and_are_left() {
    let selector = serde_json::from_str(r#"{"matchLabels": {"site": "site-1"}}"#).unwrap();
    let waves = cut(
        &[
            WaveTarget::Count(4),
            WaveTarget::Selector(selector),
            WaveTarget::Percent(60),
        ],
        20,
    );
    assert_eq!(waves[0].devices.len(), 4);
    let early = waves[0]
        .devices
        .iter()
        .filter(|device| number_of(device) % 2 == 1)
        .count();
    assert_eq!(waves[1].devices.len(), 10 - early);
    assert!(
        waves[1]
            .devices
            .iter()
            .all(|device| number_of(device) % 2 == 1)
    );
    assert_eq!(
        waves[2].devices.len(),
        12_usize.saturating_sub(4 + 10 - early)
    );
}

fn number_of(device: &DeviceId) -> usize {
    device
        .as_str()
        .trim_start_matches("device-")
        .parse()
        .unwrap()
}

#[test]
fn waves_are_exact_and_cumulative() {
    let sizes = |targets: &[WaveTarget], total| -> Vec<usize> {
        cut(targets, total)
            .iter()
            .map(|slice| slice.devices.len())
            .collect()
    };
    use WaveTarget::{Count, Percent};
    assert_eq!(
        sizes(&[Count(1), Percent(10), Percent(50), Percent(100)], 20),
        [1, 1, 8, 10]
    );
    assert_eq!(
        sizes(&[Count(1), Percent(10), Percent(50)], 5),
        [1, 0, 2, 2]
    );
    assert_eq!(sizes(&[Percent(5)], 20), [1, 19]);
    assert_eq!(sizes(&[Count(50)], 20), [20, 0]);
    assert_eq!(sizes(&[], 3), [3]);
    assert_eq!(sizes(&[Percent(100)], 0), [0]);
}

proptest! {
    #[test]
    fn every_device_is_in_one_wave(targets in targets(), total in 0_usize..300) {
        let cut = cut(&targets, total);
        let mut seen = BTreeSet::new();
        for slice in &cut {
            let before = seen.len();
            for device in &slice.devices {
                prop_assert!(seen.insert(device.clone()), "{} is in two waves", device);
            }
            let due = match slice.spec.target {
                WaveTarget::Count(count) => (count as usize).min(total),
                WaveTarget::Percent(percent) => (total * usize::from(percent)).div_ceil(100),
                WaveTarget::Selector(_) | WaveTarget::Canary(_) => continue,
            };
            prop_assert_eq!(seen.len(), before.max(due));
        }
        prop_assert_eq!(seen.len(), total);
    }

    #[test]
    fn same_seed_and_set_same_plan_in_any_order(seed: u64, mut numbers in proptest::collection::vec(0_usize..500, 0..60), targets in targets()) {
        let open = |numbers: &[usize]| {
            let members = numbers.iter().map(|number| Member { device: device(*number), placement: None, phase: None, labels: labels(*number) });
            Rollout::open(Opening { id: 1, app: "app".parse().unwrap(), from: None, to: release(2), seed,
                policy: policy(targets.clone(), numbers.len()), members: members.collect(), before: None, now: UnixMs(0) })
        };
        numbers.sort_unstable();
        numbers.dedup();
        let one = open(&numbers);
        prop_assert!(check(&one).is_empty());
        numbers.reverse();
        prop_assert_eq!(one, open(&numbers));
    }
}
