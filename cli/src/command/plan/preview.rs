//! What a release would ask of each device, in words: first the sums, then groups, then what stands in the way.

use std::io::{self, Write};

use foreshore_protocol::api::{DownloadGroup, Downloads, Effect, Obstacle, Preview};

use crate::command::counted;
use crate::output::{bytes, printable, word};

/// Groups and devices that are shown; `-o json` has more.
const SHOWN: usize = 8;

pub(super) fn print(preview: &Preview, out: &mut dyn Write) -> io::Result<()> {
    if preview.devices == 0 {
        return Ok(());
    }
    let rest = preview.devices.saturating_sub(preview.at_release);
    write!(out, "  {}", counted(preview.devices, "device"))?;
    if preview.at_release > 0 {
        let have = if preview.at_release == 1 {
            "has"
        } else {
            "have"
        };
        write!(
            out,
            "; {} of them {have} the release already",
            preview.at_release
        )?;
    }
    writeln!(out)?;
    if rest > 0 {
        download(&preview.download, out)?;
    }
    for obstacle in &preview.obstacles {
        self::obstacle(obstacle, out)?;
    }
    Ok(())
}

fn download(download: &Downloads, out: &mut dyn Write) -> io::Result<()> {
    if download.known_devices > 0 {
        write!(
            out,
            "  download: at most {} in all, {} for a device",
            bytes(download.total_bytes),
            bytes(download.most_bytes)
        )?;
        if download.total_delta_bytes < download.total_bytes {
            let less = bytes(download.total_delta_bytes);
            write!(out, "; {less} in all with the deltas in the hub")?;
        }
        writeln!(out)?;
    }
    for group in download.groups.iter().take(SHOWN) {
        writeln!(out, "    {}", self::group(group))?;
    }
    let shown = u64::try_from(download.groups.len().min(SHOWN)).unwrap_or(u64::MAX);
    let all = u64::try_from(download.groups.len()).unwrap_or(u64::MAX) + download.more_groups;
    if all > shown {
        writeln!(out, "    and {} more", counted(all - shown, "group"))?;
    }
    Ok(())
}

fn group(group: &DownloadGroup) -> String {
    let platform = group.platform.as_deref().unwrap_or("unknown platform");
    let running = group.running.map_or_else(
        || "without the app".to_owned(),
        |release| format!("at {}", release.short()),
    );
    let each = match (group.bytes, group.delta_bytes) {
        (None, _) => "unknown".to_owned(),
        (Some(0), _) => "nothing to fetch".to_owned(),
        (Some(whole), None) => format!("{} each", bytes(whole)),
        (Some(whole), Some(delta)) => {
            format!("{} each, {} with a delta", bytes(whole), bytes(delta))
        }
    };
    let incomplete = if group.incomplete {
        "; not all that they have is known"
    } else {
        ""
    };
    format!(
        "{} on {}, {running}: {each}{incomplete}",
        counted(group.devices, "device"),
        printable(platform)
    )
}

fn obstacle(obstacle: &Obstacle, out: &mut dyn Write) -> io::Result<()> {
    let sign = match obstacle.effect {
        Effect::Refuses | Effect::Blocks => '!',
        Effect::Delays => '~',
        Effect::Risks => '?',
        Effect::Informs => 'i',
    };
    writeln!(
        out,
        "  {sign} {}, {}: {}",
        word(&obstacle.code),
        counted(obstacle.devices, "device"),
        printable(&obstacle.message)
    )?;
    let named = || obstacle.named.iter().take(SHOWN);
    let with_details = named().any(|device| device.detail.is_some());
    let left = obstacle
        .devices
        .saturating_sub(u64::try_from(named().count()).unwrap_or(u64::MAX));
    let more = format!("and {left} more");
    if with_details {
        for device in named() {
            let detail = device.detail.as_deref().unwrap_or_default();
            writeln!(out, "      {}: {}", device.device, printable(detail))?;
        }
        if left > 0 {
            writeln!(out, "      {more}")?;
        }
    } else if named().count() > 0 {
        let mut names: Vec<&str> = named().map(|device| device.device.as_str()).collect();
        if left > 0 {
            names.push(&more);
        }
        writeln!(out, "      {}", names.join(" "))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use foreshore_protocol::Digest;
    use foreshore_protocol::api::{NamedDevice, ObstacleCode};

    use super::*;

    fn concerns(code: ObstacleCode, devices: u64, detail: Option<&str>) -> Obstacle {
        let named = (0..devices.min(10)).map(|number| NamedDevice {
            device: format!("gw-{number}").parse().unwrap(),
            detail: detail.map(str::to_owned),
        });
        Obstacle {
            code,
            effect: code.effect(),
            devices,
            message: code.message().to_owned(),
            named: named.collect(),
            more: devices.saturating_sub(10),
        }
    }

    #[test]
    fn sums_come_first_then_groups_then_obstacles_that_teach() {
        let group = |devices, bytes, delta_bytes| DownloadGroup {
            platform: Some("linux/arm64".to_owned()),
            running: Some(Digest::of(b"old")),
            devices,
            bytes,
            delta_bytes,
            disk_bytes: bytes,
            incomplete: false,
        };
        let mut groups = vec![
            group(60, Some(120 << 20), Some(9 << 20)),
            group(20, Some(0), None),
            DownloadGroup {
                platform: None,
                running: None,
                incomplete: true,
                ..group(9, None, None)
            },
        ];
        groups.extend((0..8).map(|_| group(1, Some(1 << 10), None)));
        let preview = Preview {
            devices: 100,
            at_release: 3,
            download: Downloads {
                known_devices: 88,
                unknown_devices: 9,
                total_bytes: 7 << 30,
                total_delta_bytes: 540 << 20,
                most_bytes: 120 << 20,
                groups,
                more_groups: 2,
            },
            obstacles: vec![
                concerns(ObstacleCode::DiskShort, 2, Some("about 5 bytes are needed")),
                concerns(ObstacleCode::Offline, 12, None),
                concerns(ObstacleCode::MemoryShort, 9, Some("5 bytes of \u{1b}[2J4")),
                concerns(ObstacleCode::FactsUnknown, 1, None),
            ],
        };
        let mut out = Vec::new();
        print(&preview, &mut out).unwrap();
        insta::assert_snapshot!(String::from_utf8(out).unwrap());
    }

    #[test]
    fn a_fleet_of_none_asks_for_nothing() {
        let mut out = Vec::new();
        print(&Preview::default(), &mut out).unwrap();
        assert!(out.is_empty());
    }
}
