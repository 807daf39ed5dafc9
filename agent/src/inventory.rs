//! What the device is and how loaded it is, read from the kernel.

use std::collections::BTreeMap;
use std::path::Path;

use foreshore_images::{Platform, Room};
use foreshore_protocol::message::Inventory;

use crate::config::Config;

mod nodes;

/// Free disk space is rounded down to this, so that it does not change all the time: 16 MiB.
const DISK_STEP_BYTES: u64 = 16 << 20;

/// What the device is. A number that cannot be read is 0.
#[must_use]
pub fn inventory(config: &Config) -> Inventory {
    let reserve = config.disk.reserve.map(|reserve| reserve.0);
    let room = Room::of(&config.paths.state, reserve);
    Inventory {
        labels: config.labels.clone(),
        disk_reserve_bytes: room.ok().map(|room| room.reserve_bytes),
        metered: Some(config.pull.metered.is_now()),
        dev_nodes: nodes::list(Path::new("/dev")),
        ..machine(&config.paths.state)
    }
}

/// Whether what an app may need is no more as it was: another node, another link, or much more or less room.
#[must_use]
pub fn differs(before: &Inventory, now: &Inventory) -> bool {
    let room = before.disk_free_bytes.abs_diff(now.disk_free_bytes);
    before.dev_nodes != now.dev_nodes || before.metered != now.metered || room > now.disk_bytes / 16
}

/// What the kernel says of the machine.
fn machine(state: &Path) -> Inventory {
    let platform = Platform::host();
    let arch = match (platform.architecture.as_str(), platform.variant.as_str()) {
        ("arm64", _) => "arm64".to_owned(),
        (architecture, "") => architecture.to_owned(),
        (architecture, variant) => format!("{architecture}/{variant}"),
    };
    let (disk_bytes, free_bytes) = disk(state);
    Inventory {
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        arch,
        kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
        memory_bytes: memory_total_bytes(&read("/proc/meminfo")),
        disk_bytes,
        disk_free_bytes: free_bytes / DISK_STEP_BYTES * DISK_STEP_BYTES,
        labels: BTreeMap::new(),
        disk_reserve_bytes: None,
        metered: None,
        dev_nodes: None,
    }
}

/// The one-minute load average in hundredths.
#[must_use]
pub fn load_centi() -> u32 {
    parse_load(&read("/proc/loadavg"))
}

/// Memory charged to the cgroup that all containers are below, in MiB; 0 when it cannot be read.
#[must_use]
pub fn containers_memory_mib(cgroup_parent: &str) -> u32 {
    let read = |path: String| {
        std::fs::read_to_string(path)
            .ok()?
            .trim()
            .parse::<u64>()
            .ok()
    };
    let bytes = read(format!(
        "/sys/fs/cgroup/memory/{cgroup_parent}/memory.usage_in_bytes"
    ))
    .or_else(|| read(format!("/sys/fs/cgroup/{cgroup_parent}/memory.current")))
    .unwrap_or(0);
    u32::try_from(bytes >> 20).unwrap_or(u32::MAX)
}

fn disk(path: &Path) -> (u64, u64) {
    nix::sys::statvfs::statvfs(path).map_or((0, 0), |stat| {
        let block = stat.fragment_size();
        (
            stat.blocks().saturating_mul(block),
            stat.blocks_available().saturating_mul(block),
        )
    })
}

fn memory_total_bytes(meminfo: &str) -> u64 {
    meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))
        .and_then(|rest| rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok())
        .map_or(0, |kib| kib.saturating_mul(1024))
}

fn parse_load(loadavg: &str) -> u32 {
    let number = loadavg.split(' ').next().unwrap_or_default();
    let (whole, part) = number.split_once('.').unwrap_or((number, "0"));
    let whole: u32 = whole.parse().unwrap_or(0);
    let part: u32 = part.get(..2).unwrap_or("0").parse().unwrap_or(0);
    whole.saturating_mul(100).saturating_add(part)
}

fn read(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_texts_are_read() {
        assert_eq!(
            memory_total_bytes("MemTotal:       2048 kB\nMemFree: 1 kB\n"),
            2 << 20
        );
        assert_eq!(memory_total_bytes("nonsense"), 0);
        assert_eq!(parse_load("1.25 0.50 0.10 1/100 42\n"), 125);
        assert_eq!(parse_load(""), 0);
    }

    #[test]
    fn this_machine_has_memory_and_a_disk() {
        let inventory = machine(Path::new("/"));
        assert!(inventory.memory_bytes > 0 && inventory.disk_bytes > 0);
        assert_eq!(inventory.disk_free_bytes % DISK_STEP_BYTES, 0);
        assert!(!inventory.kernel.is_empty() && !inventory.arch.is_empty());
        assert!(!differs(&inventory, &inventory));
        let plugged = Inventory {
            dev_nodes: Some(vec!["/dev/ttyUSB0".to_owned()]),
            ..inventory.clone()
        };
        assert!(differs(&inventory, &plugged));
        let fuller = Inventory {
            disk_free_bytes: inventory.disk_free_bytes.abs_diff(inventory.disk_bytes / 8),
            ..inventory.clone()
        };
        assert!(differs(&inventory, &fuller));
    }
}
