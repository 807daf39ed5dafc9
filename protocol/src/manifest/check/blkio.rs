//! What the types of `blkio_config` cannot say.

use std::collections::BTreeSet;

use super::{Checked, OWN_NODES, ensure, is_path};
use crate::manifest::{BlkioConfig, DiskPath};
use crate::quantity::Bytes;

/// As Compose and cgroup v1 have it.
const WEIGHT: std::ops::RangeInclusive<u16> = 10..=1000;
/// Entries of one list in `blkio_config`.
const MAX_ENTRIES: usize = 16;
/// With less than a page a second nothing that was begun ever ends, and kernels before Linux 6.6 overflow at rates that
/// no disk has.
const BPS: std::ops::RangeInclusive<Bytes> = Bytes(4 << 10)..=Bytes(1 << 40);
/// The kernel takes 0, and what it keeps these in filled with ones, for no limit.
const IOPS: std::ops::RangeInclusive<u32> = 1..=u32::MAX - 1;

/// Every rule of `blkio_config`.
pub(super) fn check(path: &str, config: &BlkioConfig) -> Checked {
    let weight = |path: &str, weight: u16| {
        ensure(WEIGHT.contains(&weight), path, || {
            let (low, high) = (WEIGHT.start(), WEIGHT.end());
            format!("must be {low} to {high}, not {weight}")
        })
    };
    if let Some(share) = config.weight {
        weight(&format!("{path}.weight"), share)?;
    }
    let list = format!("{path}.weight_device");
    disks(&list, config.weight_device.iter().map(|entry| &entry.path))?;
    for (index, entry) in config.weight_device.iter().enumerate() {
        weight(&format!("{list}[{index}].weight"), entry.weight)?;
    }
    for (name, rates) in [
        ("device_read_bps", &config.device_read_bps),
        ("device_write_bps", &config.device_write_bps),
    ] {
        let list = format!("{path}.{name}");
        disks(&list, rates.iter().map(|entry| &entry.path))?;
        for (index, entry) in rates.iter().enumerate() {
            let (low, high) = (BPS.start(), BPS.end());
            ensure(
                BPS.contains(&entry.rate),
                format_args!("{list}[{index}].rate"),
                || {
                    format!(
                        "must be {low} to {high} (bytes a second), not {}",
                        entry.rate
                    )
                },
            )?;
        }
    }
    for (name, rates) in [
        ("device_read_iops", &config.device_read_iops),
        ("device_write_iops", &config.device_write_iops),
    ] {
        let list = format!("{path}.{name}");
        disks(&list, rates.iter().map(|entry| &entry.path))?;
        for (index, entry) in rates.iter().enumerate() {
            let (low, high) = (IOPS.start(), IOPS.end());
            ensure(
                IOPS.contains(&entry.rate),
                format_args!("{list}[{index}].rate"),
                || {
                    format!(
                        "must be {low} to {high} (operations a second), not {}",
                        entry.rate
                    )
                },
            )?;
        }
    }
    Ok(())
}

/// The disks of one list in `blkio_config`.
fn disks<'a>(list: &str, paths: impl ExactSizeIterator<Item = &'a DiskPath>) -> Checked {
    ensure(paths.len() <= MAX_ENTRIES, list, || {
        format!("at most {MAX_ENTRIES} disks are allowed")
    })?;
    let mut seen = BTreeSet::new();
    for (index, disk) in paths.enumerate() {
        let path = format!("{list}[{index}].path");
        ensure(seen.insert(disk), &path, || {
            format!("{disk} is given twice; keep one")
        })?;
        let DiskPath::Node(text) = disk else {
            continue;
        };
        let node = text.strip_prefix("/dev/").filter(|_| is_path(text));
        let first = node.and_then(|node| node.split('/').next());
        ensure(
            first.is_some_and(|first| !OWN_NODES.contains(&first)),
            &path,
            || {
                format!(
                    "{text:?} must be the path of a disk below /dev without . and .., for example /dev/mmcblk0, or state"
                )
            },
        )?;
        ensure(!text.contains(['*', '?', '[']), &path, || {
            format!("{text} must name one disk; there are no patterns here")
        })?;
    }
    Ok(())
}
