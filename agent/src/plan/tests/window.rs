//! Windows: when they are open, by a reference that looks at every minute, and what a device does about that.

use std::io::Write as _;
use std::process::{Command, Stdio};

use foreshore_protocol::cron::Cron;
use foreshore_protocol::message::{MAX_WINDOW_MS, Window, Windows, Zone};
use jiff::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use proptest::prelude::*;

use super::*;

const MINUTE: u64 = 60_000;

/// Rules of every kind: north and south, half an hour and two, at midnight, negative times, without.
const ZONES: [&str; 10] = [
    "UTC0",
    "CET-1CEST,M3.5.0,M10.5.0/3",
    "EST5EDT,M3.2.0,M11.1.0",
    "<+1030>-10:30<+11>-11,M10.1.0,M4.1.0",
    "CST5CDT,M3.2.0/0,M11.1.0/1",
    "<-02>2<-01>,M3.5.0/-1,M10.5.0/0",
    "<+00>0<+02>-2,M3.5.0/1,M10.5.0/3",
    "IST-1GMT0,M10.5.0,M3.5.0/1",
    "<+1245>-12:45<+1345>,M9.5.0/2:45,M4.1.0/3:45",
    "<-04>4<-03>,M9.1.6/24,M4.1.6/24",
];

fn zone(posix: &str) -> TimeZone {
    TimeZone::posix(posix).unwrap()
}

fn at(text: &str) -> u64 {
    let at: Timestamp = text.parse().unwrap();
    u64::try_from(at.as_millisecond()).unwrap()
}

fn stamp(unix_ms: u64) -> Timestamp {
    Timestamp::from_millisecond(i64::try_from(unix_ms).unwrap()).unwrap()
}

/// A field as numbers, and as it is written.
#[derive(Debug, Clone)]
struct Field {
    spans: Vec<(u32, u32, u32)>,
    any: bool,
}

impl Field {
    fn text(&self) -> String {
        if self.any {
            return "*".to_owned();
        }
        let span = |(low, high, step): &(u32, u32, u32)| match (low == high, step) {
            (true, _) => low.to_string(),
            (false, 1) => format!("{low}-{high}"),
            (false, step) => format!("{low}-{high}/{step}"),
        };
        self.spans.iter().map(span).collect::<Vec<_>>().join(",")
    }

    fn has(&self, number: u32) -> bool {
        let within = |(low, high, step): &(u32, u32, u32)| {
            (*low..=*high).contains(&number) && (number - low).is_multiple_of(*step)
        };
        self.any || self.spans.iter().any(within)
    }
}

fn field(low: u32, high: u32, any: u32) -> impl Strategy<Value = Field> {
    let span = (low..=high, low..=high, 1..4_u32).prop_map(|(one, other, step)| {
        let (low, high) = (one.min(other), one.max(other));
        (low, high, step.min((high - low).max(1)))
    });
    prop_oneof![
        any => Just(Field { spans: Vec::new(), any: true }),
        3 => prop::collection::vec(span, 1..3).prop_map(|spans| Field { spans, any: false }),
        // One single number is what people write most.
        3 => (low..=high).prop_map(|one| Field { spans: vec![(one, one, 1)], any: false }),
    ]
}

#[derive(Debug, Clone)]
struct Written {
    minute: Field,
    hour: Field,
    day: Field,
    month: Field,
    weekday: Field,
}

impl Written {
    fn cron(&self) -> Option<Cron> {
        let fields = [
            &self.minute,
            &self.hour,
            &self.day,
            &self.month,
            &self.weekday,
        ];
        let fields: Vec<String> = fields.map(Field::text).into();
        fields.join(" ").parse().ok()
    }

    fn means(&self, local: DateTime) -> bool {
        let number = |number: i8| u32::try_from(number).unwrap();
        let weekday = number(local.weekday().to_sunday_zero_offset());
        let of_week = self.weekday.has(weekday) || weekday == 0 && self.weekday.has(7);
        let of_month = self.day.has(number(local.day()));
        let day = if self.day.any || self.weekday.any {
            of_month && of_week
        } else {
            of_month || of_week
        };
        day && self.month.has(number(local.month()))
            && self.hour.has(number(local.hour()))
            && self.minute.has(number(local.minute()))
    }

    /// Whether a window opens at a whole minute: it is meant, or one of those that are left out just before it is.
    fn opens(&self, zone: &TimeZone, unix_ms: u64) -> bool {
        let local = zone.to_datetime(stamp(unix_ms));
        let mut skipped = zone.to_datetime(stamp(unix_ms - MINUTE));
        let mut meant = self.means(local);
        loop {
            skipped = skipped.saturating_add(jiff::Span::new().minutes(1));
            if skipped >= local {
                return meant;
            }
            meant |= self.means(skipped);
        }
    }
}

fn written() -> impl Strategy<Value = Written> {
    // 7 is Sunday, and so is 0.
    let days = (field(1, 31, 4), field(1, 12, 6), field(0, 7, 4));
    (field(0, 59, 1), field(0, 23, 1), days).prop_map(|(minute, hour, (day, month, weekday))| {
        Written {
            minute,
            hour,
            day,
            month,
            weekday,
        }
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Near changes of the clock, where it is hard, and anywhere else.
    #[test]
    fn a_window_is_open_when_every_minute_says_so(
        written in written(),
        zone_number in 0..ZONES.len(),
        base in at("2026-01-01T00:00:00Z")..at("2032-01-01T00:00:00Z"),
        near in any::<bool>(),
        offset_ms in 0..4 * 3_600_000_u64,
        open_minutes in prop_oneof![1..200_u64, 1..2_880_u64],
    ) {
        let Some(cron) = written.cron() else {
            return Ok(());
        };
        let zone = zone(ZONES[zone_number]);
        let change = zone.following(stamp(base)).next().filter(|_| near);
        let change = change.map(|change| u64::try_from(change.timestamp().as_millisecond()).unwrap());
        let now = change.map_or(base, |change| change - 2 * 3_600_000) + offset_ms;
        let open_ms = open_minutes * MINUTE;
        let this_minute = now / MINUTE * MINUTE;
        let last = (0..open_minutes + 1)
            .map(|back| this_minute - back * MINUTE)
            .find(|minute| written.opens(&zone, *minute))
            .filter(|minute| now < minute + open_ms);
        match (look(&cron, open_ms, &zone, now), last) {
            (Look::Open { until }, Some(last)) => prop_assert_eq!(until, last + open_ms),
            (Look::Closed { opens }, None) => {
                let within = 3 * 24 * 60;
                let first = (1..=within)
                    .map(|ahead| this_minute + ahead * MINUTE)
                    .find(|minute| written.opens(&zone, *minute));
                let end = this_minute + within * MINUTE;
                prop_assert_eq!(first, opens.filter(|opens| *opens <= end), "{}", cron);
            }
            (look, last) => prop_assert!(false, "{cron} in {zone:?}: {look:?}, but {last:?}"),
        }
    }

    #[test]
    fn no_time_panics(
        written in written(),
        zone_number in 0..ZONES.len(),
        now in prop_oneof![any::<u64>(), 0..10_u64, Just(253_402_207_200_000_u64)],
        open_ms in prop_oneof![any::<u64>(), 0..MAX_WINDOW_MS],
    ) {
        if let Some(cron) = written.cron() {
            let look = look(&cron, open_ms, &zone(ZONES[zone_number]), now);
            if let Look::Closed { opens: Some(opens) } = look {
                prop_assert!(opens > now);
            }
        }
    }
}

/// The rules of another implementation: those of the C library, through date(1).
#[test]
#[expect(
    clippy::disallowed_methods,
    reason = "the C library is asked by a program of its own"
)]
fn local_time_is_what_the_c_library_says() {
    let begin = at("2026-01-01T00:00:00Z") / 1000;
    let times: Vec<u64> = (0..2 * 366 * 48).map(|half| begin + half * 1800).collect();
    for posix in ZONES {
        let mut date = Command::new("date")
            .args(["-f", "-", "+%Y-%m-%dT%H:%M:%S"])
            .env("TZ", posix)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("date(1) of the coreutils is installed");
        let mut stdin = date.stdin.take().unwrap();
        let lines: String = times.iter().map(|time| format!("@{time}\n")).collect();
        let feed = std::thread::spawn(move || stdin.write_all(lines.as_bytes()));
        let output = date.wait_with_output().unwrap();
        feed.join().unwrap().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let zone = zone(posix);
        let mut count = 0;
        for (time, line) in times.iter().zip(text.lines()) {
            let local = zone.to_datetime(stamp(time * 1000));
            assert_eq!(local.to_string(), line, "{posix} at {time}");
            count += 1;
        }
        assert_eq!(count, times.len(), "{posix}");
    }
}

#[test]
fn nights_on_which_clocks_change_are_not_missed() {
    let berlin = zone("CET-1CEST,M3.5.0,M10.5.0/3");
    let half_past_two: Cron = "30 2 * * *".parse().unwrap();
    let look = |text: &str| look(&half_past_two, 3_600_000, &berlin, at(text));
    // 02:30 does not come on 29 March 2026: it is 03:00 of summer time.
    let opens = at("2026-03-29T01:00:00Z");
    assert_eq!(
        look("2026-03-29T00:59:59Z"),
        Look::Closed { opens: Some(opens) }
    );
    let until = opens + 3_600_000;
    assert_eq!(look("2026-03-29T01:00:00Z"), Look::Open { until });
    // 02:30 comes twice on 25 October 2026.
    let first = at("2026-10-25T00:30:00Z");
    assert_eq!(
        look("2026-10-25T00:00:00Z"),
        Look::Closed { opens: Some(first) }
    );
    let until = at("2026-10-25T02:30:00Z");
    assert_eq!(look("2026-10-25T01:30:00Z"), Look::Open { until });
    assert!(matches!(look("2026-10-25T02:30:00Z"), Look::Closed { .. }));
}

#[test]
fn seldom_days_are_found() {
    let utc = TimeZone::UTC;
    let opens = |cron: &str, now: &str| look(&cron.parse().unwrap(), MINUTE, &utc, at(now));
    for (cron, now, next) in [
        ("0 0 29 2 *", "2026-01-01T00:00:00Z", "2028-02-29T00:00:00Z"),
        // A Sunday.
        (
            "0 0 29 2 */7",
            "2026-01-01T00:00:00Z",
            "2032-02-29T00:00:00Z",
        ),
        // Over the year 2100, which is no leap year.
        (
            "0 0 29 2 */7",
            "2088-03-01T00:00:00Z",
            "2128-02-29T00:00:00Z",
        ),
        (
            "0 0 31 12 *",
            "2026-12-31T00:01:00Z",
            "2027-12-31T00:00:00Z",
        ),
    ] {
        let next = Some(at(next));
        assert_eq!(opens(cron, now), Look::Closed { opens: next }, "{cron}");
    }
}

fn shop() -> AppName {
    "shop".parse().unwrap()
}

/// From 02:00 to 04:00 UTC.
fn nightly() -> Window {
    Window {
        cron: "0 2 * * *".parse().unwrap(),
        open_ms: 2 * HOUR,
        zone: Zone::Posix("UTC0".to_owned()),
    }
}

/// A world that runs `before`, where it is that time.
fn world_at(before: &Release, time: &str) -> World {
    let mut world = settled(before);
    set_clock(&mut world, time);
    world
}

fn set_clock(world: &mut World, time: &str) {
    world.wall_at_boot = Some(at(time) - world.now.ms.0);
}

#[test]
fn an_app_waits_for_its_window_says_so_and_then_switches() {
    let (v1, v2) = (web("good", 1), web("good", 2));
    let mut world = world_at(&v1, "2026-06-01T20:00:00Z");
    world.windows.switch = Some(nightly());
    world.assign(&v2);
    world.run(5 * HOUR);
    let status = world.status("shop");
    assert_eq!(status.phase, Phase::Waiting);
    let reason = status.reason.unwrap();
    assert_eq!(reason.code, ReasonCode::WaitsForWindow);
    assert_eq!(
        reason.message,
        "waits for the window of app shop (\"0 2 * * *\" for 2h): opens at 2026-06-02T02:00:00+00:00"
    );
    assert_eq!(world.running("shop")["web"], v1.digest());
    let image = service_image(&v2);
    assert!(world.images.contains(&image), "it is staged meanwhile");
    // A turn is asked for when the window opens, not before.
    assert!(world.turn(usize::MAX).turns.is_empty());
    world.containers.clear();
    world.run(1_000);
    assert_eq!(
        world.running("shop")["web"],
        v1.digest(),
        "what runs is healed"
    );

    world.run(HOUR);
    let plan = world.turn(usize::MAX);
    assert!(plan.turns.contains_key(&shop()), "{plan:?}");
    assert_eq!(
        world.status("shop").reason.unwrap().code,
        ReasonCode::WaitsForTurn
    );
    world.grant(&shop(), MINUTE);
    world.run(HOUR);
    assert_eq!(world.phase("shop"), Phase::Succeeded);
    assert_eq!(world.running("shop")["web"], v2.digest());
}

fn service_image(release: &Release) -> Digest {
    let (_, service) = release.services.iter().next().unwrap();
    service::image_digest(service).unwrap()
}

#[test]
fn a_turn_that_comes_after_the_window_closed_is_given_back() {
    let (v1, v2) = (web("good", 1), web("good", 2));
    let mut world = world_at(&v1, "2026-06-01T03:59:00Z");
    world.windows.switch = Some(nightly());
    world.assign(&v2);
    world.run(30_000);
    assert_eq!(
        world.status("shop").reason.unwrap().code,
        ReasonCode::WaitsForTurn
    );
    world.run(MINUTE);
    let plan = world.turn(usize::MAX);
    assert_eq!(
        world.status("shop").reason.unwrap().code,
        ReasonCode::WaitsForWindow
    );
    assert!(plan.turns.is_empty());
    world.grant(&shop(), HOUR);
    world.run(HOUR);
    assert_eq!(world.phase("shop"), Phase::Waiting);
}

#[test]
fn what_has_begun_is_finished_and_the_way_back_waits_for_nothing() {
    let (good, slow, bad) = (web("good", 1), web("slow 3000", 2), web("never-ready", 3));
    for (next, phase, runs) in [
        (&slow, Phase::Succeeded, &slow),
        (&bad, Phase::RolledBack, &good),
    ] {
        let mut world = world_at(&good, "2026-06-01T03:59:59.500Z");
        world.windows.switch = Some(nightly());
        world.assign(next);
        world.grant(&shop(), HOUR);
        world.run(400);
        assert_eq!(world.phase("shop"), Phase::Activating);
        // Half an hour after it closed.
        world.run(HOUR / 2);
        assert_eq!(world.phase("shop"), phase);
        assert_eq!(world.running("shop")["web"], runs.digest());
    }
}

#[test]
fn images_are_fetched_in_the_download_window_only() {
    let (v1, v2) = (web("good", 1), web("good", 2));
    let mut world = world_at(&v1, "2026-06-01T20:00:00Z");
    world.windows.fetch = Some(nightly());
    world.assign(&v2);
    world.run(5 * HOUR);
    let status = world.status("shop");
    assert_eq!(status.phase, Phase::Waiting);
    let reason = status.reason.unwrap();
    assert_eq!(reason.code, ReasonCode::WaitsForWindow);
    assert!(
        reason
            .message
            .starts_with("waits for the download window of app shop")
    );
    assert!(!world.images.contains(&service_image(&v2)));
    // One that is being fetched when it closes is fetched on.
    set_clock(&mut world, "2026-06-02T03:59:59Z");
    let plan = world.turn(0);
    assert!(
        matches!(&plan.steps[..], [Step::Stage { .. }]),
        "{:?}",
        plan.steps
    );
    world.busy.staging = Some(v2.digest());
    set_clock(&mut world, "2026-06-02T05:00:00Z");
    let plan = world.turn(0);
    assert!(plan.steps.is_empty(), "{:?}", plan.steps);
    assert_eq!(world.phase("shop"), Phase::Staging);
    world.busy.staging = None;
    world.turn(0);
    assert_eq!(world.phase("shop"), Phase::Waiting);
    // Without a window for it, it switches as soon as it can.
    set_clock(&mut world, "2026-06-03T02:00:00Z");
    world.run(HOUR);
    assert_eq!(world.phase("shop"), Phase::Succeeded);
}

#[test]
fn a_device_that_does_not_know_the_time_takes_windows_for_closed_and_says_why() {
    let (v1, v2) = (web("good", 1), web("good", 2));
    let mut world = settled(&v1);
    world.windows.switch = Some(nightly());
    world.assign(&v2);
    world.grant(&shop(), 100 * HOUR);
    world.run(48 * HOUR);
    let reason = world.status("shop").reason.unwrap();
    assert_eq!(
        reason.message,
        "waits for the window of app shop (\"0 2 * * *\" for 2h): the device does not know what time it is: nothing has \
         set its clock"
    );
    // Somebody sets it.
    set_clock(&mut world, "2026-06-02T02:00:00Z");
    world.run(HOUR);
    assert_eq!(world.phase("shop"), Phase::Succeeded);
}

#[test]
fn the_devices_own_zone_counts_where_no_other_is_named() {
    let (v1, v2) = (web("good", 1), web("good", 2));
    let mut world = world_at(&v1, "2026-06-01T00:30:00Z");
    world.windows.switch = Some(Window {
        zone: Zone::Device,
        ..nightly()
    });
    world.zone = DeviceZone(Err("/etc/localtime: it is no time zone file".to_owned()));
    world.assign(&v2);
    world.grant(&shop(), HOUR);
    world.run(MINUTE);
    let message = world.status("shop").reason.unwrap().message;
    assert!(message.ends_with("no time zone file"), "{message}");
    world.zone = DeviceZone(Ok(zone("CET-1CEST,M3.5.0,M10.5.0/3")));
    world.run(MINUTE);
    assert_eq!(world.phase("shop"), Phase::Succeeded);
}

#[test]
fn new_terms_without_a_window_let_it_go_at_once() {
    let (v1, v2) = (web("good", 1), web("good", 2));
    let mut world = world_at(&v1, "2026-06-01T20:00:00Z");
    world.windows.switch = Some(nightly());
    world.windows.fetch = Some(nightly());
    world.assign(&v2);
    world.run(HOUR);
    assert_eq!(world.phase("shop"), Phase::Waiting);
    world.desired.apps.get_mut(&shop()).unwrap().windows = Windows::default();
    world.run(HOUR);
    assert_eq!(world.phase("shop"), Phase::Succeeded);
}

#[test]
fn what_runs_already_and_a_removal_wait_for_no_window() {
    let v1 = web("good", 1);
    let mut world = world_at(&v1, "2026-06-01T20:00:00Z");
    world.windows.switch = Some(nightly());
    world.windows.fetch = Some(nightly());
    world.assign(&v1);
    world.run(MINUTE);
    assert_eq!(world.phase("shop"), Phase::Succeeded);
    let plan = world.turn(usize::MAX);
    assert_eq!(
        (plan.steps, plan.wake_at),
        (vec![], None),
        "nobody is woken"
    );
    world.unassign(&shop());
    world.run(MINUTE);
    assert!(world.containers.is_empty());
}
