//! What goes up to the hub and when: reports, events, beacons, the progress of pulls, and sending again what the hub did not
//! acknowledge.
//!
//! Owns the pace, not the content. Everything waits while there is no connection; nothing here is needed for
//! what runs on the device.

use std::time::Duration;

use foreshore_killpoint as killpoint;
use foreshore_protocol::Version;
use foreshore_protocol::frame::MAX_FRAME_BYTES;
use foreshore_protocol::message::{
    AppStatus, Beacon, Event, Events, Inventory, MAX_EVENTS, PullProgress, Reported,
};
use tokio::time::Instant;

use crate::inventory;
use crate::link::{Link, Outgoing, Receipt};
use crate::state::Outbox;

/// How long an event waits for others to travel with: one message instead of six for an update that takes a second, and
/// nothing but people's eyes waits for it.
const EVENT_LINGER: Duration = Duration::from_secs(1);

/// How long the hub has to acknowledge before everything is sent again; doubles each time.
const RESEND_FIRST: Duration = Duration::from_secs(30);

/// The longest such pause.
const RESEND_LAST: Duration = Duration::from_mins(15);

/// When the link's queue is full.
const BUSY_PAUSE: Duration = Duration::from_secs(1);

/// How often it is told how far a pull is; the first time after as long.
const PULL_INTERVAL: Duration = Duration::from_secs(2);

/// A beacon comes so long after a release has ended well or not, at the latest.
const GAUGES_AFTER: Duration = Duration::from_mins(1);

/// What a beacon says besides its numbers.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Gauges {
    pub(super) memory_mib: u32,
    pub(super) load_centi: u32,
    /// The newest secrets stored.
    pub(super) secrets: Option<Version>,
}

/// When what the hub did not acknowledge is sent again.
#[derive(Debug)]
struct Resend {
    at: Option<Instant>,
    /// The next time after so long.
    pause: Duration,
}

impl Resend {
    const NEW: Self = Self {
        at: None,
        pause: RESEND_FIRST,
    };

    /// Whether it is time, once.
    fn is_due(&mut self, now: Instant) -> bool {
        let due = self.at.is_some_and(|at| now >= at);
        if due {
            self.at = None;
            self.pause = (self.pause * 2).min(RESEND_LAST);
        }
        due
    }

    /// Something waits, or nothing.
    fn arm(&mut self, waits: bool, now: Instant) {
        self.at = waits.then(|| self.at.unwrap_or(now + self.pause));
    }
}

#[derive(Debug)]
pub(super) struct Uplink {
    link: Link,
    boot: u64,
    report_interval: Duration,
    connected: bool,
    version: Option<Version>,
    apps: Vec<AppStatus>,
    /// The newest report; its `apps` may be behind.
    seq: u64,
    report: Option<Reported>,
    reported_at: Option<Instant>,
    /// The device is no more what the newest report says of it.
    changed: bool,
    /// When the newest report was first handed to the link.
    sent_at: Option<Instant>,
    acknowledged: u64,
    /// The newest report has to be handed to the link.
    unsent: bool,
    urgent: bool,
    /// The newest event that was handed to the link in this connection.
    sent_event: u64,
    /// When those that were not are due.
    events_at: Option<Instant>,
    report_resend: Resend,
    event_resend: Resend,
    busy_until: Option<Instant>,
    beacon_interval: Duration,
    beacon_at: Option<Instant>,
    beacon_seq: u64,
    /// While images are fetched.
    pull_at: Option<Instant>,
    /// Of heads that are stored or old; each holds one of the few places that the broker has for us.
    receipts: Vec<Receipt>,
}

impl Uplink {
    pub(super) const fn new(
        link: Link,
        boot: u64,
        report_interval: Duration,
        beacon_interval: Duration,
    ) -> Self {
        Self {
            link,
            boot,
            report_interval,
            connected: false,
            version: None,
            apps: Vec::new(),
            seq: 0,
            report: None,
            reported_at: None,
            changed: false,
            sent_at: None,
            acknowledged: 0,
            unsent: false,
            urgent: false,
            sent_event: 0,
            events_at: None,
            report_resend: Resend::NEW,
            event_resend: Resend::NEW,
            busy_until: None,
            beacon_interval,
            beacon_at: None,
            beacon_seq: 0,
            pull_at: None,
            receipts: Vec::new(),
        }
    }

    /// Hands a message over that is not a report, event or beacon.
    pub(super) fn send(&self, message: Outgoing) -> bool {
        self.link.send(message)
    }

    /// Tells the broker, now or when the link has room, that a head needs not come again.
    pub(super) fn accepted(&mut self, receipt: Receipt) {
        self.receipts.push(receipt);
    }

    /// The newest report's number, for the birth.
    pub(super) const fn seq(&self) -> u64 {
        self.seq
    }

    /// Says goodbye, when the link has room for it. False when it is gone.
    pub(super) async fn close(&self) -> bool {
        self.link.close().await
    }

    /// Takes what is to be reported from now on.
    pub(super) fn set_status(&mut self, version: Option<Version>, apps: Vec<AppStatus>) {
        let ended = |app: &AppStatus| {
            app.phase.is_final()
                && !self
                    .apps
                    .iter()
                    .any(|old| (&old.app, old.since, old.phase) == (&app.app, app.since, app.phase))
        };
        if apps.iter().any(ended) {
            self.urgent = true;
            // The hub compares devices that have a release with others: it needs to hear how they are with it.
            self.beacon_at = self
                .beacon_at
                .map(|at| at.min(Instant::now() + GAUGES_AFTER));
        }
        self.version = version;
        self.apps = apps;
    }

    /// Whether images are fetched from now on.
    pub(super) fn set_pulling(&mut self, pulling: bool) {
        if pulling != self.pull_at.is_some() {
            self.pull_at = pulling.then(|| Instant::now() + PULL_INTERVAL);
        }
    }

    pub(super) fn connected(&mut self) {
        self.connected = true;
        self.resync();
        self.beacon_at = Some(Instant::now() + self.beacon_interval);
    }

    pub(super) fn disconnected(&mut self) {
        // Worth nothing on another connection; what they are of comes again.
        self.receipts.clear();
        self.connected = false;
        self.beacon_at = None;
        self.events_at = None;
        self.report_resend.at = None;
        self.event_resend.at = None;
        self.busy_until = None;
    }

    /// The hub asks for everything again.
    pub(super) const fn resync(&mut self) {
        self.unsent = true;
        self.urgent = true;
        self.sent_event = 0;
        self.report_resend.pause = RESEND_FIRST;
        self.event_resend.pause = RESEND_FIRST;
    }

    /// The hub has stored reports up to this one, and events that waited or not. What did not advance is sent again in its time.
    pub(super) fn acknowledged(&mut self, reported: u64, events: bool) {
        let reported = reported.min(self.seq);
        if reported > self.acknowledged {
            self.acknowledged = reported;
            self.report_resend = Resend::NEW;
        }
        if events {
            self.event_resend = Resend::NEW;
        }
    }

    /// How long ago, at most, the hub wrote an acknowledgement of this report: since the report was first sent. `None` for
    /// another than the newest report.
    pub(super) fn answered_within(&self, reported: u64) -> Option<Duration> {
        let sent = self.sent_at.filter(|_| reported == self.seq);
        sent.map(|at| at.elapsed())
    }

    pub(super) fn set_beacon_interval(&mut self, interval: Duration) {
        if interval != self.beacon_interval {
            self.beacon_interval = interval;
            self.beacon_at = self.connected.then(|| Instant::now() + interval);
        }
    }

    /// Sends what is due.
    pub(super) fn flush(
        &mut self,
        outbox: &Outbox,
        inventory: impl Fn() -> Inventory,
        gauges: impl FnOnce() -> Gauges,
        pull: impl FnOnce() -> Option<PullProgress>,
    ) {
        let now = Instant::now();
        if !self.connected || self.busy_until.is_some_and(|until| now < until) {
            return;
        }
        self.busy_until = None;
        self.unsent |= self.report_resend.is_due(now);
        if self.event_resend.is_due(now) {
            self.sent_event = 0;
        }
        if self.urgent && self.is_changed() {
            // Whoever sees how a release ended finds the events that led there.
            self.events_at = Some(now);
        }
        let sent = self.flush_receipts()
            && self.flush_events(now, outbox)
            && self.flush_report(now, &inventory)
            && self.flush_beacon(now, outbox, gauges, &inventory)
            && self.flush_pull(now, pull);
        if !sent {
            self.busy_until = Some(now + BUSY_PAUSE);
        }
        self.report_resend.arm(self.acknowledged < self.seq, now);
        self.event_resend.arm(outbox.events().next().is_some(), now);
    }

    fn flush_receipts(&mut self) -> bool {
        while let Some(receipt) = self.receipts.pop() {
            if let Err(receipt) = self.link.acknowledge(receipt) {
                self.receipts.push(receipt);
                return false;
            }
            killpoint::reached("accept", "acknowledged");
        }
        true
    }

    fn flush_report(&mut self, now: Instant, inventory: impl FnOnce() -> Inventory) -> bool {
        if self.is_changed() && self.report_due(now) {
            self.seq += 1;
            self.report = Some(Reported {
                boot: self.boot,
                seq: self.seq,
                version: self.version,
                inventory: inventory(),
                apps: self.apps.clone(),
            });
            self.unsent = true;
            self.urgent = false;
            self.changed = false;
            self.reported_at = Some(now);
            self.sent_at = None;
        }
        if let Some(report) = &self.report
            && self.unsent
        {
            let report = report.clone().fitted(MAX_FRAME_BYTES);
            if !self.link.send(Outgoing::Reported(report)) {
                return false;
            }
            self.unsent = false;
            self.sent_at.get_or_insert(now);
        }
        true
    }

    fn is_changed(&self) -> bool {
        self.changed
            || self
                .report
                .as_ref()
                .is_none_or(|report| report.version != self.version || report.apps != self.apps)
    }

    fn report_due(&self, now: Instant) -> bool {
        self.urgent
            || self
                .reported_at
                .is_none_or(|at| now >= at + self.report_interval)
    }

    /// The oldest [`MAX_EVENTS`] are on their way without the hub's acknowledgement; the rest waits for it.
    fn flush_events(&mut self, now: Instant, outbox: &Outbox) -> bool {
        let events: Vec<Event> = (outbox.events().take(MAX_EVENTS))
            .filter(|event| event.seq > self.sent_event)
            .cloned()
            .collect();
        let kept_from = outbox.events().next().map_or(0, |event| event.seq);
        let Some(newest) = events.last().map(|event| event.seq) else {
            self.events_at = None;
            return true;
        };
        let due = *self.events_at.get_or_insert(now + EVENT_LINGER);
        if now < due && events.len() < MAX_EVENTS {
            return true;
        }
        if !self
            .link
            .send(Outgoing::Events(Events { kept_from, events }))
        {
            return false;
        }
        self.sent_event = newest;
        self.events_at = None;
        true
    }

    /// Hands over what waits for others, as nothing else comes.
    pub(super) fn hurry(&mut self, outbox: &Outbox) {
        let now = Instant::now();
        self.events_at = Some(now);
        if self.connected && !self.flush_events(now, outbox) {
            tracing::debug!("the last events wait for the next start");
        }
    }

    fn flush_beacon(
        &mut self,
        now: Instant,
        outbox: &Outbox,
        gauges: impl FnOnce() -> Gauges,
        inventory: impl FnOnce() -> Inventory,
    ) -> bool {
        if self.beacon_at.is_none_or(|at| now < at) {
            return true;
        }
        if let Some(report) = &self.report {
            self.changed |= inventory::differs(&report.inventory, &inventory());
        }
        self.beacon_seq += 1;
        self.beacon_at = Some(now + self.beacon_interval);
        let gauges = gauges();
        self.link.send(Outgoing::Beacon(Beacon {
            boot: self.boot,
            seq: self.beacon_seq,
            version: self.version,
            reported_seq: self.seq,
            event_seq: outbox.newest(),
            memory_mib: gauges.memory_mib,
            load_centi: gauges.load_centi,
            secrets: gauges.secrets,
        }))
    }

    fn flush_pull(&mut self, now: Instant, pull: impl FnOnce() -> Option<PullProgress>) -> bool {
        if self.pull_at.is_none_or(|at| now < at) {
            return true;
        }
        self.pull_at = Some(now + PULL_INTERVAL);
        pull().is_none_or(|progress| self.link.send(Outgoing::Pull(progress)))
    }

    /// When [`Self::flush`] has something to do next; `None` is never.
    pub(super) fn wake_at(&self) -> Option<Instant> {
        if !self.connected {
            return None;
        }
        if self.busy_until.is_some() {
            return self.busy_until;
        }
        let report = self.is_changed().then(|| {
            self.reported_at
                .map_or_else(Instant::now, |at| at + self.report_interval)
        });
        let due = [
            report,
            self.events_at,
            self.report_resend.at,
            self.event_resend.at,
            self.beacon_at,
            self.pull_at,
        ];
        due.into_iter().flatten().min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn acknowledged_reports_do_not_keep_events_from_being_sent_again() {
        let ((link, _from_link), _ends) = crate::link::channels();
        let mut uplink = Uplink::new(link, 1, Duration::from_secs(5), Duration::from_secs(900));
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        uplink.seq = 10;
        uplink.event_resend.arm(true, start);
        for seconds in 1..10 {
            uplink.acknowledged(seconds, false);
            uplink.event_resend.arm(true, after(seconds));
            uplink.report_resend.arm(true, after(seconds));
        }
        assert_eq!(uplink.event_resend.at, Some(after(30)));
        assert_eq!(uplink.report_resend.at, Some(after(39)), "it advanced");
        assert!(!uplink.event_resend.is_due(after(29)));
        assert!(uplink.event_resend.is_due(after(30)));
        uplink.event_resend.arm(true, after(30));
        assert_eq!(uplink.event_resend.at, Some(after(90)), "later each time");
        uplink.acknowledged(9, true);
        uplink.event_resend.arm(true, after(31));
        assert_eq!(uplink.event_resend.at, Some(after(61)));
        uplink.event_resend.arm(false, after(32));
        assert_eq!(uplink.event_resend.at, None, "nothing waits");
    }
}
