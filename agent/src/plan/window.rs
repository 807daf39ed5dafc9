//! Whether an app's windows are open: pure functions of a cron expression, a time zone and a time.
//!
//! A window opens at each minute of local time that its cron expression means, and stays open for so long from then, in
//! time that passes. Where clocks go forward, minutes that are left out count as the moment of the change, so no night is
//! missed; where they go back, minutes that come twice open it twice. While it does not know the time, a device takes
//! every window for closed.

use foreshore_protocol::AppName;
use foreshore_protocol::cron::Cron;
use foreshore_protocol::message::{HeadApp, MAX_WINDOW_MS, Reason, ReasonCode, Window, Zone};
use foreshore_protocol::quantity::Span;
use jiff::civil::Date;
use jiff::tz::{AmbiguousOffset, TimeZone};
use jiff::{Timestamp, ToSpan as _};

use super::history::reason;
use super::turn::goes_on;
use super::{AppHistory, Draft};

/// While a window is closed its device looks again after so long, in milliseconds: somebody may set its clock.
const LOOK_AGAIN_MS: u64 = 30_000;

/// How many days ahead is looked for a day that a cron expression means. 29 February on a given weekday is at most 40
/// years away, over a century year that is no leap year.
const DAYS_AHEAD: i32 = 41 * 366;

/// The wall clock, as far as it is to be trusted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WallClock {
    /// Milliseconds since 1970.
    Trusted(u64),
    /// Nobody knows what time it is; why, for people.
    Untrusted(String),
}

impl Default for WallClock {
    fn default() -> Self {
        Self::Untrusted("nothing has set its clock".to_owned())
    }
}

/// The device's own time zone, or why it is not known, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceZone(pub Result<TimeZone, String>);

impl Default for DeviceZone {
    fn default() -> Self {
        Self(Ok(TimeZone::UTC))
    }
}

/// How a window is at one moment. Times are milliseconds since 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Look {
    /// It is open, at least until then.
    Open {
        /// Exclusive.
        until: u64,
    },
    /// It is closed.
    Closed {
        /// When it opens next; `None`: not within some forty years.
        opens: Option<u64>,
    },
}

/// How a window that opens when `cron` says, for `open_ms` each time (at most [`MAX_WINDOW_MS`]), is at `unix_ms` in a time
/// zone. Times beyond the year 9999 are in no window.
#[must_use]
pub fn look(cron: &Cron, open_ms: u64, zone: &TimeZone, unix_ms: u64) -> Look {
    let never = Look::Closed { opens: None };
    let Some(now) = timestamp(unix_ms) else {
        return never;
    };
    let today = zone.to_datetime(now).date();
    if let Some(last) = last_opening(cron, open_ms, zone, now, today) {
        let until = last.saturating_add(open_ms);
        if unix_ms < until {
            return Look::Open { until };
        }
    }
    next_opening(cron, zone, now, today).map_or(never, |opens| Look::Closed { opens: Some(opens) })
}

/// The last opening at or before `now`, if it is not longer ago than `open_ms`.
fn last_opening(
    cron: &Cron,
    open_ms: u64,
    zone: &TimeZone,
    now: Timestamp,
    today: Date,
) -> Option<u64> {
    // Where clocks go back over midnight, tomorrow's minutes may come before today's.
    let back = i32::try_from(open_ms.min(MAX_WINDOW_MS) / 86_400_000).unwrap_or(7) + 2;
    let mut found: Option<Timestamp> = None;
    let mut more = 2;
    for days in -1..=back {
        let Some(date) = shifted(today, -days) else {
            continue;
        };
        let latest = openings(cron, zone, date).filter(|at| *at <= now).max();
        found = found.max(latest);
        // The day before one that has some may reach past it, for the same reason.
        if found.is_some() {
            more -= 1;
            if more == 0 {
                break;
            }
        }
    }
    found.and_then(unix_ms_of)
}

/// The first opening after `now`.
fn next_opening(cron: &Cron, zone: &TimeZone, now: Timestamp, today: Date) -> Option<u64> {
    let mut found: Option<Timestamp> = None;
    let mut more = 2;
    for days in -1..=DAYS_AHEAD {
        let Some(date) = shifted(today, days) else {
            continue;
        };
        let first = openings(cron, zone, date).filter(|at| *at > now).min();
        found = [found, first].into_iter().flatten().min();
        if found.is_some() {
            more -= 1;
            if more == 0 {
                break;
            }
        }
    }
    found.and_then(unix_ms_of)
}

/// All moments of a local day at which a window opens, in no order.
fn openings(cron: &Cron, zone: &TimeZone, date: Date) -> impl Iterator<Item = Timestamp> {
    let number = |number: i8| u32::try_from(number).unwrap_or(0);
    let weekday = number(date.weekday().to_sunday_zero_offset());
    let meant = cron.matches_day(number(date.month()), number(date.day()), weekday);
    let times = cron.times().take_while(move |_| meant);
    times.flat_map(move |(hour, minute)| {
        let (hour, minute) = (hour.cast_signed(), minute.cast_signed());
        let local = date.at(hour, minute, 0, 0);
        let moments = match zone.to_ambiguous_timestamp(local).offset() {
            AmbiguousOffset::Unambiguous { offset } => [offset.to_timestamp(local).ok(), None],
            AmbiguousOffset::Fold { before, after } => [
                before.to_timestamp(local).ok(),
                after.to_timestamp(local).ok(),
            ],
            // The new offset makes it a moment before the change; so the next change is the one.
            AmbiguousOffset::Gap { after, .. } => {
                let before_it = after.to_timestamp(local).ok();
                let change = before_it.and_then(|at| zone.following(at).next());
                [change.map(|change| change.timestamp()), None]
            }
        };
        moments.into_iter().flatten()
    })
}

fn shifted(date: Date, days: i32) -> Option<Date> {
    date.checked_add(days.days()).ok()
}

fn timestamp(unix_ms: u64) -> Option<Timestamp> {
    Timestamp::from_millisecond(i64::try_from(unix_ms).ok()?).ok()
}

fn unix_ms_of(at: Timestamp) -> Option<u64> {
    u64::try_from(at.as_millisecond()).ok()
}

/// Why an app must not switch to what is assigned now; `None`: its window is open, or it has none, or nothing is
/// disrupted.
pub(super) fn keeps_from_switching(
    draft: &mut Draft<'_>,
    history: &AppHistory,
    desired: &HeadApp,
) -> Option<Reason> {
    let window = desired.windows.switch.as_ref()?;
    if goes_on(history, desired) {
        return None;
    }
    waits(draft, &desired.app, window, "window")
}

/// Why images of what is assigned must not be fetched now. What is being fetched already is.
pub(super) fn keeps_from_fetching(draft: &mut Draft<'_>, desired: &HeadApp) -> Option<Reason> {
    let window = desired.windows.fetch.as_ref()?;
    if draft.observed.busy.staging == Some(desired.release) {
        return None;
    }
    waits(draft, &desired.app, window, "download window")
}

fn waits(
    draft: &mut Draft<'_>,
    app: &AppName,
    window: &Window,
    what: &'static str,
) -> Option<Reason> {
    let now = draft.now.ms;
    let closed = |why: &str| {
        let open_for = Span(window.open_ms);
        let message = format!(
            "waits for the {what} of app {app} (\"{}\" for {open_for}): {why}",
            window.cron
        );
        Some(reason(ReasonCode::WaitsForWindow, None, &message))
    };
    let zone = match &window.zone {
        Zone::Device => match &draft.observed.zone.0 {
            Ok(zone) => zone.clone(),
            Err(why) => {
                draft.is_later(now.plus(LOOK_AGAIN_MS));
                return closed(&format!("the device's time zone is not known: {why}"));
            }
        },
        Zone::Posix(text) => match TimeZone::posix(text) {
            Ok(zone) => zone,
            Err(_) => return closed(&format!("its time zone {text:?} is not understood")),
        },
    };
    let unix_ms = match &draft.observed.wall {
        WallClock::Trusted(unix_ms) => *unix_ms,
        WallClock::Untrusted(why) => {
            let why = format!("the device does not know what time it is: {why}");
            draft.is_later(now.plus(LOOK_AGAIN_MS));
            return closed(&why);
        }
    };
    match look(&window.cron, window.open_ms, &zone, unix_ms) {
        Look::Open { until } => {
            draft.is_later(now.plus(until - unix_ms));
            None
        }
        Look::Closed { opens } => {
            let left = opens.map_or(LOOK_AGAIN_MS, |opens| opens - unix_ms);
            draft.is_later(now.plus(left.min(LOOK_AGAIN_MS)));
            let when = opens.and_then(timestamp).map_or_else(
                || "it never opens".to_owned(),
                |at| format!("opens at {}", at.display_with_offset(zone.to_offset(at))),
            );
            closed(&when)
        }
    }
}
