//! What devices say, taken into the store: a batch of messages, one transaction.
//!
//! Both directions carry state, not deltas, so a message that was lost, doubled or overtaken does no harm: it is
//! recognized by its counters, and what is missing is asked for. A device keeps events and reports until the
//! [`Receipt`] of their commit reaches it.

use std::collections::{BTreeMap, BTreeSet};

use foreshore_protocol::message::{Beacon, Event, Events, LeaseRequest, Presence, Reported};
use foreshore_protocol::{DeviceId, Epoch, Version};

use super::membership::{self, Beyond};
use super::{Change, ControlError, allowance, apps, leases, secrets};
use crate::broker::HUB_NAME;
use crate::rollout::UnixMs;
use crate::store;
use crate::store::device::{LinkState, Restored};

/// Something that a device said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inbound {
    /// Who; the broker lets nobody else write to its topics.
    pub device: DeviceId,
    /// The broker kept it: it may be old, and the device may be gone.
    pub retained: bool,
    /// What.
    pub message: Message,
}

/// What a device can say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// Birth or Will.
    Presence(Presence),
    /// Its whole state.
    Reported(Reported),
    /// A sign of life.
    Beacon(Beacon),
    /// What happened.
    Events(Events),
    /// It asks for its turn to switch.
    LeaseRequest(LeaseRequest),
}

/// What a device is told once the batch is committed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Receipt {
    /// It said something that it keeps until acknowledged: `(event, reported)` are stored up to here.
    pub stored: Option<(u64, u64)>,
    /// Something is missing: it shall send all that it keeps.
    pub resync: bool,
}

impl Receipt {
    /// Adds what a later message is answered with. A newer acknowledgement takes the place of an older one.
    pub fn join(&mut self, later: Self) {
        self.stored = later.stored.or(self.stored);
        self.resync |= later.resync;
    }
}

/// What follows from a batch.
pub type Receipts = BTreeMap<DeviceId, Receipt>;

/// The first repair of a device that stays behind waits so long; doubled with each one in a row.
const REPAIR_FIRST_MS: u64 = 60_000;

/// The longest wait between repairs: six hours.
const REPAIR_MAX_MS: u64 = 6 * 3_600_000;

/// Takes in a batch, in order.
///
/// # Errors
///
/// When the store fails.
pub fn ingest(change: &mut Change<'_>, batch: &[Inbound]) -> Result<Receipts, ControlError> {
    let mut receipts = Receipts::new();
    for inbound in batch {
        let Some(mut link) = link_of(change, inbound)? else {
            continue;
        };
        let before = link.clone();
        let receipt = receipts.entry(inbound.device.clone()).or_default();
        if !inbound.retained {
            link.last_seen = Some(change.now);
        }
        let mut device = Device {
            id: &inbound.device,
            link: &mut link,
            receipt,
        };
        match &inbound.message {
            Message::Presence(presence) => device.presence(change, presence, inbound.retained)?,
            Message::Reported(reported) => device.reported(change, reported, inbound.retained)?,
            Message::Beacon(beacon) => device.beacon(change, beacon)?,
            Message::Events(events) => device.events(change, events)?,
            Message::LeaseRequest(request) if inbound.retained => {
                // Nobody asks to be kept; whoever did that is not to be believed.
                tracing::debug!(device = %inbound.device, app = %request.app, "a retained request was ignored");
            }
            Message::LeaseRequest(request) => device.lease_request(change, request)?,
        }
        if before.online != link.online {
            announce_presence(change, &inbound.device, link.online)?;
        }
        if before.accepted != link.accepted || before.online != link.online {
            change.effects.dirty.extend(store::rollout::interested(
                change.connection,
                &inbound.device,
            )?);
        }
        match link.restored {
            Some(Restored::Unheard(known)) => {
                let asked = receipts.entry(inbound.device.clone()).or_default();
                compare(change, inbound, known, asked)?;
            }
            Some(Restored::Beyond) => {}
            None => notice_ahead(change, &inbound.device, &before, &link)?,
        }
        if before != link {
            store::device::put_link(change.connection, &inbound.device, &link)?;
        }
    }
    Ok(receipts)
}

/// The device's link; makes the device when it is new and really there.
fn link_of(change: &mut Change<'_>, inbound: &Inbound) -> Result<Option<LinkState>, ControlError> {
    if let Some(link) = store::device::link(change.connection, &inbound.device)? {
        return Ok(Some(link));
    }
    let born = matches!(&inbound.message, Message::Presence(presence) if presence.online);
    let will = matches!(&inbound.message, Message::Presence(presence) if !presence.online);
    // A broker that the hub did not configure may let anybody take the hub's name; no device can have it.
    if will || (inbound.retained && !born) || inbound.device.as_str() == HUB_NAME {
        return Ok(None);
    }
    store::device::insert(change.connection, &inbound.device, change.now)?;
    if may_be_of_a_later_life(change, inbound)? {
        store::device::await_word(change.connection, &inbound.device)?;
    }
    change
        .event("device-joined")
        .device(&inbound.device)
        .record("it connected for the first time")?;
    membership::refresh_device(change, &inbound.device, Beyond::Skipped)?;
    Ok(store::device::link(change.connection, &inbound.device)?)
}

/// Whether a device that this database does not know may have been told things by a life of it that came after the backup
/// which it was restored from. What the broker retained does not say what it has now.
fn may_be_of_a_later_life(change: &Change<'_>, inbound: &Inbound) -> rusqlite::Result<bool> {
    let epoch = store::desired::epoch(change.connection)?;
    let has = match &inbound.message {
        _ if inbound.retained => return Ok(epoch > Epoch::FIRST),
        Message::Presence(presence) => presence.version,
        Message::Reported(reported) => reported.version,
        Message::Beacon(beacon) => beacon.version,
        Message::LeaseRequest(request) => Some(request.since),
        Message::Events(_) => return Ok(epoch > Epoch::FIRST),
    };
    Ok(has.is_some_and(|has| has.epoch < epoch))
}

fn announce_presence(
    change: &mut Change<'_>,
    device: &DeviceId,
    online: bool,
) -> rusqlite::Result<()> {
    // Most of the fleet going dark concerns every live rollout, not only those with this device.
    change.touch_live()?;
    leases::look_again(change)?;
    let (kind, message) = if online {
        ("device-online", "it is connected")
    } else {
        ("device-offline", "it lost its connection")
    };
    change.event(kind).device(device).record(message)
}

/// A device that stored a newer desired state than there is: this database is an older copy of itself. What the
/// device runs stays. If the epoch has grown since, it took what a broker had kept for it and is held like those that say
/// at once that they went on; if not, what is applied here is refused by it until the epoch grows.
fn notice_ahead(
    change: &mut Change<'_>,
    device: &DeviceId,
    before: &LinkState,
    after: &LinkState,
) -> Result<(), ControlError> {
    let ahead = |link: &LinkState| {
        link.accepted
            .filter(|accepted| Some(*accepted) > link.desired)
    };
    let Some(accepted) = ahead(after).filter(|_| ahead(before).is_none()) else {
        return Ok(());
    };
    if accepted.epoch < store::desired::epoch(change.connection)? {
        return hold_beyond(change, device, accepted, after.desired);
    }
    let desired = after
        .desired
        .map_or_else(|| "none".to_owned(), |version| version.to_string());
    tracing::warn!(%device, %accepted, %desired, "a device is ahead of the hub");
    Ok(change.event("device-ahead").device(device).record(format!(
        "it has stored {accepted}, and the hub's newest for it is {desired}: this database is older than the \
         device has seen; stop the hub and run `foreshore-hub new-epoch`, so that devices obey it again"
    ))?)
}

/// A device of a restored backup speaks. If it has no more than the backup knows of, it goes on as if nothing had
/// happened. If it has, it keeps what it runs, and an operator decides.
fn compare(
    change: &mut Change<'_>,
    inbound: &Inbound,
    known: Option<Version>,
    receipt: &mut Receipt,
) -> Result<(), ControlError> {
    let device = &inbound.device;
    let has = match &inbound.message {
        // What the broker kept may be older than what the device has stored since.
        _ if inbound.retained => None,
        Message::Presence(presence) => presence.online.then_some(presence.version),
        Message::Reported(reported) => Some(reported.version),
        Message::Beacon(beacon) => Some(beacon.version),
        Message::Events(_) | Message::LeaseRequest(_) => None,
    };
    let Some(has) = has else {
        receipt.resync |= inbound.retained;
        return Ok(());
    };
    let Some(beyond) = has.filter(|has| Some(*has) > known) else {
        store::device::confirm(change.connection, device)?;
        if let Some(link) = store::device::link(change.connection, device)?
            && let Some(desired) = link.desired.filter(|desired| Some(*desired) > has)
        {
            store::desired::enqueue(change.connection, device, desired)?;
        }
        change.effects.publish = true;
        return Ok(());
    };
    hold_beyond(change, device, beyond, known)
}

/// Tells a device nothing more until an operator releases it; what it says from now on does not change that.
fn hold_beyond(
    change: &mut Change<'_>,
    device: &DeviceId,
    beyond: Version,
    known: Option<Version>,
) -> Result<(), ControlError> {
    let known = known.map_or_else(|| "none".to_owned(), |version| version.to_string());
    let reason = format!(
        "it has {beyond}, and the backup that this hub was restored from knows {known}: it keeps what it runs until it is \
         released"
    );
    store::device::await_release(change.connection, device)?;
    if store::device::held(change.connection, device)?.is_none() {
        store::device::put_held(change.connection, device, Some(&reason))?;
    }
    tracing::warn!(%device, has = %beyond, %known, "a device went on without the restored backup");
    Ok(change.event("device-ahead").device(device).record(format!(
        "{reason}; `foreshore device release {device}` gives it what the hub has for it"
    ))?)
}

struct Device<'a> {
    id: &'a DeviceId,
    link: &'a mut LinkState,
    receipt: &'a mut Receipt,
}

impl Device<'_> {
    fn presence(
        &mut self,
        change: &mut Change<'_>,
        presence: &Presence,
        retained: bool,
    ) -> Result<(), ControlError> {
        let stale = presence.session < self.link.session;
        if !presence.online {
            // A Will ends the connection it belongs to. One of another connection is late, or of a life of
            // the device whose counters are gone; only a retained one can be news of a connection that
            // began and ended while the hub was away.
            if presence.session == self.link.session || (retained && !stale) {
                self.link.session = presence.session;
                self.link.online = false;
            }
            return Ok(());
        }
        if stale && retained {
            return Ok(());
        }
        let began_anew = stale
            || presence.boot < self.link.boot
            || (presence.boot == self.link.boot
                && presence.reported_seq < self.link.reported_seq
                && !retained);
        if began_anew {
            self.reset(change, presence)?;
        }
        // The hub was not there when this connection began, and may have missed what came first.
        self.receipt.resync |= retained && presence.session != self.link.session;
        self.link.session = presence.session;
        self.link.online = true;
        if presence.boot > self.link.boot {
            self.link.boot = presence.boot;
            self.link.reported_seq = 0;
        }
        self.link.accepted = presence.version;
        self.link.repair_at = UnixMs(0);
        let key = presence.secrets_key.as_ref();
        secrets::noted(change, self.id, key, presence.secrets)?;
        self.repair(change, presence.version)
    }

    /// The device lost its state: its counters began anew, so ours must.
    fn reset(&mut self, change: &mut Change<'_>, presence: &Presence) -> rusqlite::Result<()> {
        self.link.boot = presence.boot;
        self.link.reported_seq = 0;
        self.link.event_seq = 0;
        store::lease::forget_turns(change.connection, self.id)?;
        change
            .event("device-reset")
            .device(self.id)
            .record("its counters began anew: it lost its state")
    }

    fn reported(
        &mut self,
        change: &mut Change<'_>,
        reported: &Reported,
        retained: bool,
    ) -> Result<(), ControlError> {
        let newer = (reported.boot, reported.seq) > (self.link.boot, self.link.reported_seq);
        if newer {
            self.link.boot = reported.boot;
            self.link.reported_seq = reported.seq;
            self.link.accepted = reported.version;
            if store::device::put_inventory(change.connection, self.id, &reported.inventory)? {
                membership::refresh_device(change, self.id, Beyond::Skipped)?;
                // The refresh may have given the device a new desired state.
                if let Some(link) = store::device::link(change.connection, self.id)? {
                    self.link.desired = link.desired;
                }
            }
            store::device::put_reports(change.connection, self.id, &reported.apps)?;
            leases::hear(change, self.id, reported)?;
            // What it runs and can go back to decides which secrets it gets.
            secrets::refresh(change, self.id)?;
            change
                .effects
                .dirty
                .extend(store::rollout::interested(change.connection, self.id)?);
            self.end_removals(change, reported)?;
            self.caught_up(reported.version);
        }
        if !retained {
            self.link.online = true;
        }
        if newer || !retained {
            self.acknowledge();
        }
        Ok(())
    }

    fn end_removals(
        &self,
        change: &mut Change<'_>,
        reported: &Reported,
    ) -> Result<(), ControlError> {
        let Some(version) = reported.version else {
            return Ok(());
        };
        let apps = reported.apps.iter().map(|status| &status.app);
        for app in store::app::end_removals(change.connection, self.id, version, apps)? {
            apps::finish_deleting(change, &app)?;
        }
        Ok(())
    }

    fn beacon(&mut self, change: &mut Change<'_>, beacon: &Beacon) -> Result<(), ControlError> {
        if beacon.boot < self.link.boot {
            return Ok(());
        }
        self.link.online = true;
        let gauges = store::device::Gauges {
            memory_mib: beacon.memory_mib,
            load_centi: beacon.load_centi,
            at: change.now,
        };
        store::device::put_gauges(change.connection, self.id, gauges)?;
        let report_missing = (beacon.boot, beacon.reported_seq)
            > (self.link.boot, self.link.reported_seq)
            && beacon.reported_seq > 0;
        if report_missing || beacon.event_seq > self.link.event_seq {
            self.receipt.resync = true;
        }
        secrets::noted(change, self.id, None, beacon.secrets)?;
        if beacon.version.is_some() {
            self.link.accepted = beacon.version;
        }
        self.repair(change, beacon.version)
    }

    /// Sends the newest head and its releases again to a device that is behind, less and less often.
    fn repair(
        &mut self,
        change: &mut Change<'_>,
        seen: Option<Version>,
    ) -> Result<(), ControlError> {
        let Some(desired) = self.link.desired.filter(|desired| Some(*desired) > seen) else {
            self.caught_up(seen);
            return Ok(());
        };
        if change.now < self.link.repair_at {
            return Ok(());
        }
        let wait = REPAIR_FIRST_MS
            .saturating_mul(1 << self.link.repair_tries.min(20))
            .min(REPAIR_MAX_MS);
        self.link.repair_at = change.now.plus(wait);
        self.link.repair_tries = self.link.repair_tries.saturating_add(1);
        store::desired::enqueue(change.connection, self.id, desired)?;
        for release in store::desired::releases_of(change.connection, self.id)? {
            store::desired::enqueue_release(change.connection, &release)?;
        }
        change.effects.publish = true;
        Ok(())
    }

    fn caught_up(&mut self, seen: Option<Version>) {
        if seen >= self.link.desired {
            self.link.repair_tries = 0;
            self.link.repair_at = UnixMs(0);
        }
    }

    /// Takes in what is new, oldest first, as far as events are taken from the device now; the rest comes again.
    fn events(&mut self, change: &mut Change<'_>, events: &Events) -> Result<(), ControlError> {
        self.link.online = true;
        // What the device does not keep any more will not come.
        let gone = events.kept_from.saturating_sub(1);
        self.link.event_seq = self.link.event_seq.max(gone);
        for event in &events.events {
            if event.seq <= self.link.event_seq {
                continue;
            }
            if event.seq > self.link.event_seq + 1 {
                self.receipt.resync = true;
                break;
            }
            if !self.may_bring_one(change)? {
                break;
            }
            self.link.event_seq = event.seq;
            self.event(change, event)?;
        }
        self.acknowledge();
        Ok(())
    }

    fn may_bring_one(&mut self, change: &mut Change<'_>) -> rusqlite::Result<bool> {
        let rested = allowance::is_rested(self.link.events_paid, change.now);
        let taken = allowance::take(self.link.events_paid, change.now);
        if let Some(paid) = taken {
            self.link.events_paid = paid;
            self.link.events_throttled &= !rested;
        } else if !self.link.events_throttled {
            self.link.events_throttled = true;
            tracing::warn!(device = %self.id, "a device sends more events than are taken in");
            change.event("events-throttled").device(self.id).record(
                "it sends more than ten events a second: it keeps the rest for later, and drops the oldest when it has \
                 too many",
            )?;
        }
        Ok(taken.is_some())
    }

    fn event(&self, change: &mut Change<'_>, event: &Event) -> Result<(), ControlError> {
        let kind = store::column::to_word(&event.kind)?;
        let mut draft = change
            .event(&kind)
            .device(self.id)
            .service(event.service.as_ref());
        if let Some(app) = &event.app {
            draft = draft.app(app);
        }
        draft.record(event.message.clone())?;
        Ok(())
    }

    fn lease_request(
        &mut self,
        change: &mut Change<'_>,
        request: &LeaseRequest,
    ) -> rusqlite::Result<()> {
        if request.boot < self.link.boot {
            return Ok(());
        }
        self.link.online = true;
        leases::ask(change, self.id, request)
    }

    const fn acknowledge(&mut self) {
        self.receipt.stored = Some((self.link.event_seq, self.link.reported_seq));
    }
}

/// The devices that a batch speaks of, for logs.
#[must_use]
pub fn speakers(batch: &[Inbound]) -> BTreeSet<&DeviceId> {
    batch.iter().map(|inbound| &inbound.device).collect()
}
