//! What was measured, for people and for programs.

use std::fmt;
use std::time::Duration;

use serde_json::{Value, json};

use crate::device::{KEEPALIVE, WORK};
use crate::tally::{Count, Way};

/// Beacons a day at the hub's interval of 15 minutes.
const BEACONS_A_DAY: f64 = 96.0;

/// Some of a number of times.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Spread {
    p50: Duration,
    p99: Duration,
    max: Duration,
}

impl Spread {
    /// Of at least one.
    pub(crate) fn of(mut times: Vec<Duration>) -> Self {
        times.sort_unstable();
        let at = |percent: usize| times[(times.len() - 1) * percent / 100];
        Self {
            p50: at(50),
            p99: at(99),
            max: at(100),
        }
    }

    fn json(self) -> Value {
        let seconds = |time: Duration| (time.as_secs_f64() * 1000.0).round() / 1000.0;
        json!({"p50": seconds(self.p50), "p99": seconds(self.p99), "max": seconds(self.max)})
    }
}

impl fmt::Display for Spread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = |time: Duration| time.as_secs_f64();
        write!(
            f,
            "{:.2} / {:.2} / {:.2} s",
            seconds(self.p50),
            seconds(self.p99),
            seconds(self.max)
        )
    }
}

/// One change of every device.
#[derive(Debug)]
pub(crate) struct Update {
    pub(crate) name: &'static str,
    pub(crate) devices: usize,
    /// From here on all times are since the change was sent to the hub's API: until it answered,
    pub(crate) applied: Duration,
    /// until a device had its head,
    pub(crate) head: Spread,
    /// until it had the hub's acknowledgement of the report that it succeeded,
    pub(crate) acknowledged: Spread,
    /// and this without the time until it had its head;
    pub(crate) own: Spread,
    /// until the rollout was completed.
    pub(crate) completed: Duration,
    /// Of all devices.
    pub(crate) count: Count,
    /// Of a session.
    pub(crate) ip_bytes: Option<f64>,
    pub(crate) segments: Option<f64>,
    pub(crate) hub_cpu: f64,
    pub(crate) commits: u64,
}

/// One number of devices.
#[derive(Debug)]
pub(crate) struct Figures {
    pub(crate) devices: usize,
    pub(crate) carrier: &'static str,
    pub(crate) joined: Duration,
    pub(crate) join_cpu: f64,
    pub(crate) updates: Vec<Update>,
    /// IP bytes of a session for one, with what the broker answers.
    pub(crate) beacon_bytes: f64,
    pub(crate) ping_bytes: f64,
    pub(crate) bare_kib: u64,
    pub(crate) joined_kib: u64,
    pub(crate) end_kib: u64,
    pub(crate) peak_kib: u64,
    pub(crate) database_mib: f64,
    pub(crate) descriptors: usize,
    pub(crate) lost: Vec<String>,
}

impl Update {
    fn each(&self, count: u64) -> f64 {
        let each = count as f64 / self.devices as f64;
        (each * 100.0).round() / 100.0
    }

    fn kinds(&self) -> Vec<(&'static str, f64)> {
        let kinds = self.count.publishes.iter();
        kinds
            .map(|(kind, count)| (*kind, self.each(*count)))
            .collect()
    }

    fn json(&self) -> Value {
        let way = |way: Way| json!({"packets": self.each(way.packets), "publishes": self.each(way.publishes), "bytes": self.each(way.bytes)});
        let kinds: serde_json::Map<_, _> = (self.kinds().into_iter())
            .map(|(kind, each)| (kind.to_owned(), each.into()))
            .collect();
        json!({
            "name": self.name,
            "appliedSeconds": self.applied.as_secs_f64(),
            "headSeconds": self.head.json(),
            "acknowledgedSeconds": self.acknowledged.json(),
            "headToAcknowledgedSeconds": self.own.json(),
            "completedSeconds": self.completed.as_secs_f64(),
            "each": {"up": way(self.count.up), "down": way(self.count.down), "publishes": kinds,
                "ipBytes": self.ip_bytes, "segments": self.segments},
            "hubCpuSeconds": self.hub_cpu,
            "hubCommits": self.commits,
        })
    }
}

impl fmt::Display for Update {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "  {}: apply answered in {:.2} s; p50 / p99 / max to the head {}, to the hub's acknowledgement {}, of it on \
             the device and back {}; completed in {:.2} s; hub CPU {:.2} s, {} transactions",
            self.name,
            self.applied.as_secs_f64(),
            self.head,
            self.acknowledged,
            self.own,
            self.completed.as_secs_f64(),
            self.hub_cpu,
            self.commits,
        )?;
        let (up, down) = (self.count.up, self.count.down);
        write!(
            f,
            "    each device: packets {} up, {} down; PUBLISH {} up, {} down; MQTT bytes {} up, {} down",
            self.each(up.packets),
            self.each(down.packets),
            self.each(up.publishes),
            self.each(down.publishes),
            self.each(up.bytes),
            self.each(down.bytes),
        )?;
        if let (Some(bytes), Some(segments)) = (self.ip_bytes, self.segments) {
            write!(f, "; IP {bytes:.0} bytes in {segments:.1} segments")?;
        }
        let kinds: Vec<String> = (self.kinds().iter())
            .map(|(kind, each)| format!("{kind} {each}"))
            .collect();
        writeln!(f, "\n    PUBLISH by topic: {}", kinds.join(", "))
    }
}

impl Figures {
    fn kib_each(&self) -> f64 {
        self.joined_kib.saturating_sub(self.bare_kib) as f64 / self.devices as f64
    }

    fn idle_a_day(&self) -> f64 {
        let pings = 86_400.0 / KEEPALIVE.as_secs_f64();
        BEACONS_A_DAY * self.beacon_bytes + pings * self.ping_bytes
    }

    /// For programs.
    pub(crate) fn json(&self) -> Value {
        let updates: Vec<Value> = self.updates.iter().map(Update::json).collect();
        json!({
            "devices": self.devices,
            "broker": self.carrier,
            "joinedSeconds": self.joined.as_secs_f64(),
            "joinHubCpuSeconds": self.join_cpu,
            "deviceWorkSeconds": WORK.as_secs_f64(),
            "updates": updates,
            "idle": {"beaconIpBytes": self.beacon_bytes, "pingIpBytes": self.ping_bytes, "ipBytesADay": self.idle_a_day()},
            "hub": {"bareKib": self.bare_kib, "joinedKib": self.joined_kib, "endKib": self.end_kib, "peakKib": self.peak_kib,
                "kibEach": self.kib_each(), "databaseMib": self.database_mib, "descriptors": self.descriptors},
            "lostConnections": self.lost.len(),
        })
    }
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} devices, {}: joined in {:.1} s, hub CPU {:.1} s; hub {} MiB before, {} joined, {} at the end, {} at most, \
             {:.1} KiB a device; database {:.1} MiB; {} descriptors; {} connections lost",
            self.devices,
            self.carrier,
            self.joined.as_secs_f64(),
            self.join_cpu,
            self.bare_kib / 1024,
            self.joined_kib / 1024,
            self.end_kib / 1024,
            self.peak_kib / 1024,
            self.kib_each(),
            self.database_mib,
            self.descriptors,
            self.lost.len(),
        )?;
        for lost in self.lost.iter().take(3) {
            writeln!(f, "  lost: {lost}")?;
        }
        for update in &self.updates {
            update.fmt(f)?;
        }
        if self.ping_bytes > 0.0 {
            writeln!(
                f,
                "  idle: a beacon {:.0} bytes IP, a ping {:.0}: {:.1} KB a day with {} s keepalive",
                self.beacon_bytes,
                self.ping_bytes,
                self.idle_a_day() / 1000.0,
                KEEPALIVE.as_secs(),
            )?;
        }
        writeln!(
            f,
            "  (each device takes {} ms for staging, starting and its first probe)",
            WORK.as_millis()
        )
    }
}
