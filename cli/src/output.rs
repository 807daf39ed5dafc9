//! How data is printed: aligned tables, JSON, times. Everything that came from a device passes
//! [`printable`], so that no message can move the cursor or change a colour.

use std::borrow::Cow;
use std::io::{self, Write};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;

/// The time, milliseconds since 1970.
pub(crate) fn now_ms() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// `text` with control characters escaped.
pub(crate) fn printable(text: &str) -> Cow<'_, str> {
    if text.chars().any(char::is_control) {
        text.chars()
            .fold(String::with_capacity(text.len()), |mut out, c| {
                if c.is_control() {
                    out.extend(c.escape_default())
                } else {
                    out.push(c)
                }
                out
            })
            .into()
    } else {
        text.into()
    }
}

/// Rows under headings, in columns as wide as their widest cell.
#[derive(Debug)]
pub(crate) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these headings.
    pub(crate) fn new(headings: &[&str]) -> Self {
        Self {
            rows: vec![
                headings
                    .iter()
                    .map(|heading| (*heading).to_owned())
                    .collect(),
            ],
        }
    }

    /// Adds a row; cells are made [`printable`], empty ones are shown as `-`.
    pub(crate) fn row<const N: usize>(&mut self, cells: [String; N]) {
        debug_assert_eq!(N, self.rows[0].len(), "as many cells as headings");
        let shown = |cell: String| {
            if cell.is_empty() {
                "-".to_owned()
            } else {
                printable(&cell).into_owned()
            }
        };
        self.rows.push(cells.map(shown).into());
    }

    /// Prints it; the last column is not padded.
    pub(crate) fn print(&self, out: &mut dyn Write) -> io::Result<()> {
        let columns = self.rows[0].len();
        let width = |column: usize| {
            self.rows
                .iter()
                .map(|row| row[column].chars().count())
                .max()
                .unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        for row in &self.rows {
            let (last, cells) = row.split_last().expect("a table has a column");
            for (cell, width) in cells.iter().zip(&widths) {
                write!(out, "{cell:<width$}  ")?;
            }
            writeln!(out, "{last}")?;
        }
        Ok(())
    }
}

/// Pretty JSON with a line end.
pub(crate) fn json<T: Serialize + ?Sized>(
    out: &mut dyn Write,
    value: &T,
) -> Result<(), serde_json::Error> {
    serde_json::to_writer_pretty(&mut *out, value)?;
    out.write_all(b"\n").map_err(serde_json::Error::io)
}

/// One object of a stream: JSON on one line, written out at once.
pub(crate) fn json_line<T: Serialize + ?Sized>(
    out: &mut dyn Write,
    value: &T,
) -> Result<(), serde_json::Error> {
    serde_json::to_writer(&mut *out, value)?;
    out.write_all(b"\n")
        .and_then(|()| out.flush())
        .map_err(serde_json::Error::io)
}

/// How long ago, in its largest unit: `now`, `42s`, `3m`, `5h`, `12d`.
pub(crate) fn age(now_ms: u64, then_ms: u64) -> String {
    match now_ms.saturating_sub(then_ms) / 1000 {
        0 => "now".to_owned(),
        seconds @ 1..120 => format!("{seconds}s"),
        seconds @ 120..7200 => format!("{}m", seconds / 60),
        seconds @ 7200..172_800 => format!("{}h", seconds / 3600),
        seconds => format!("{}d", seconds / 86_400),
    }
}

/// A duration between two times: `850ms`, `12.3s`, `4m05s`, `2h03m`.
pub(crate) fn elapsed(ms: u64) -> String {
    match ms {
        0..1000 => format!("{ms}ms"),
        1000..60_000 => format!("{}.{}s", ms / 1000, ms % 1000 / 100),
        60_000..3_600_000 => format!("{}m{:02}s", ms / 60_000, ms % 60_000 / 1000),
        _ => format!("{}h{:02}m", ms / 3_600_000, ms % 3_600_000 / 60_000),
    }
}

/// Milliseconds since 1970 as `2026-11-21T02:25:02Z` (RFC 3339).
pub(crate) fn timestamp(ms: u64) -> String {
    let (days, seconds) = (ms / 86_400_000, ms / 1000 % 86_400);
    let (year, month, day) = civil(days);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z",
        seconds / 3600,
        seconds / 60 % 60,
        seconds % 60
    )
}

/// The date of a day counted from 1970-01-01 (Howard Hinnant, "chrono-Compatible Low-Level Date
/// Algorithms", `civil_from_days`, for days not before 1970).
const fn civil(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 {
        shifted_month + 3
    } else {
        shifted_month - 9
    };
    let year = year_of_era + era * 400 + if month <= 2 { 1 } else { 0 };
    (year, month, day)
}

/// Bytes for people: `512 B`, `3.4 MiB`.
pub(crate) fn bytes(count: u64) -> String {
    let units = [("GiB", 30), ("MiB", 20), ("KiB", 10)];
    units
        .iter()
        .find(|(_, shift)| count >> shift > 0)
        .map_or_else(
            || format!("{count} B"),
            |(unit, shift)| {
                let tenths = (u128::from(count) * 10) >> shift;
                format!("{}.{} {unit}", tenths / 10, tenths % 10)
            },
        )
}

/// How serde writes an enum, for people and for tables: `rolling-back`, `soaking`.
pub(crate) fn word<T: Serialize>(value: &T) -> String {
    let text = match serde_json::to_value(value) {
        Ok(serde_json::Value::String(text)) => text,
        Ok(other) => other.to_string(),
        Err(_) => String::new(),
    };
    // Device phases are camelCase in the API, everything else is kebab-case; tables show one spelling.
    text.chars()
        .fold(String::with_capacity(text.len()), |mut out, c| {
            if c.is_ascii_uppercase() {
                out.push('-');
            }
            out.push(c.to_ascii_lowercase());
            out
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timestamps_agree_with_date_u() {
        for (ms, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_400_000, "2000-02-29T00:00:00Z"),
            (1_795_227_902_999, "2026-11-21T02:25:02Z"),
            (4_107_542_399_000, "2100-02-28T23:59:59Z"),
            (4_107_542_400_000, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(timestamp(ms), text);
        }
        timestamp(u64::MAX);
    }

    #[test]
    fn ages_and_durations_pick_a_unit() {
        let ages = [
            0,
            999,
            1000,
            119_000,
            120_000,
            7_199_000,
            7_200_000,
            172_800_000,
        ];
        assert_eq!(
            ages.map(|ms| age(ms, 0)).join(" "),
            "now now 1s 119s 2m 119m 2h 2d"
        );
        assert_eq!(
            age(0, 5000),
            "now",
            "a clock that runs ahead is not an error"
        );
        assert_eq!(
            [7, 12_345, 245_000, 7_380_000].map(elapsed).join(" "),
            "7ms 12.3s 4m05s 2h03m"
        );
        assert_eq!(
            [12, 1024, 3_565_158, 5 << 30].map(bytes).join(" "),
            "12 B 1.0 KiB 3.3 MiB 5.0 GiB"
        );
    }

    #[test]
    fn no_text_from_a_device_reaches_the_terminal_raw() {
        assert_eq!(printable("red \u{1b}[31m\n"), "red \\u{1b}[31m\\n");
        assert!(matches!(printable("déjà vu"), Cow::Borrowed(_)));
    }

    #[test]
    fn columns_line_up() {
        let mut table = Table::new(&["NAME", "STATE", "MESSAGE"]);
        table.row(["gateway".into(), "ok".into(), String::new()]);
        table.row(["x".into(), "rolling-back".into(), "bell\u{7}".into()]);
        let mut out = Vec::new();
        table.print(&mut out).unwrap();
        insta::assert_snapshot!(String::from_utf8(out).unwrap(), @r"
        NAME     STATE         MESSAGE
        gateway  ok            -
        x        rolling-back  bell\u{7}
        ");
    }
}
