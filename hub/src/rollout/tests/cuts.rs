//! Sizes and order of waves.

use super::properties::targets;
use super::*;

#[test]
fn waves_are_exact_and_cumulative() {
    let sizes = |targets: &[WaveTarget], total| -> Vec<usize> {
        waves::cut(targets, total)
            .into_iter()
            .map(|(_, size)| size)
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
        let cut = waves::cut(&targets, total);
        prop_assert_eq!(cut.iter().map(|(_, size)| size).sum::<usize>(), total);
        let mut reached = 0;
        for (target, size) in cut {
            let before = reached;
            reached += size;
            prop_assert_eq!(reached, before.max(target.of(total)));
        }
    }

    #[test]
    fn same_seed_and_set_same_plan_in_any_order(seed: u64, mut numbers in proptest::collection::vec(0_usize..500, 0..60), targets in targets()) {
        let open = |numbers: &[usize]| {
            let members = numbers.iter().map(|number| Member { device: device(*number), placement: None, phase: None });
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
