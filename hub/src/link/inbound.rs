//! From packets to committed changes: decoded, checked, taken in as batches, then acknowledged.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use foreshore_protocol::DeviceId;
use foreshore_protocol::Version;
use foreshore_protocol::frame::{self, FrameError};
use foreshore_protocol::message::{
    Beacon, Event, Events, LeaseRequest, Presence, PullProgress, Reported,
};
use foreshore_protocol::topic::{Leaf, Topic};
use rumqttc::Publish;
use tokio::sync::mpsc;

use super::LinkCounters;
use super::commands::Commands;
use crate::controller::Controller;
use crate::controller::ingest::{self, Inbound, Message, Receipts};
use crate::pulls::Pulls;

/// The most messages that share a transaction; each event counts as one.
const BATCH_MAX: usize = 512;

/// How often the same device may make an event of not being understood.
const COMPLAIN_EVERY: Duration = Duration::from_secs(600);

/// How many devices' complaints are remembered; beyond it they are only counted.
const COMPLAINTS_MAX: usize = 1024;

/// The largest counter that a message may carry: what SQLite and JSON hold.
const COUNTER_MAX: u64 = i64::MAX as u64;

/// Why a packet is not a message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unreadable {
    /// Not a topic that devices write to.
    #[error("no device's upward topic")]
    Topic,
    /// Not the frame that belongs there.
    #[error("{1}")]
    Frame(DeviceId, FrameError),
    /// A counter that no honest device reaches.
    #[error("a counter is beyond 2^63")]
    Counter(DeviceId),
}

/// What a packet says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Heard {
    /// For the store.
    Inbound(Inbound),
    /// How far a device's pull is; not kept.
    Pull(DeviceId, PullProgress),
}

/// Takes in packets until the sender is gone.
pub async fn run(
    mut packets: mpsc::Receiver<Publish>,
    controller: &Controller,
    commands: &Commands,
    counters: &LinkCounters,
    pulls: &Pulls,
) {
    let mut complaints = Complaints::default();
    let mut buffer = Vec::with_capacity(BATCH_MAX);
    while packets.recv_many(&mut buffer, BATCH_MAX).await > 0 {
        let mut batches = Batches::default();
        for packet in buffer.drain(..) {
            counters.received.fetch_add(1, Ordering::Relaxed);
            match decode(&packet.topic, &packet.payload, packet.retain) {
                Ok(Some(Heard::Inbound(inbound))) => batches.push(inbound),
                Ok(Some(Heard::Pull(device, progress))) => {
                    pulls.note(device, progress, tokio::time::Instant::now());
                }
                Ok(None) => {}
                Err(why) => {
                    counters.refused.fetch_add(1, Ordering::Relaxed);
                    complaints.raise(controller, &why).await;
                }
            }
        }
        for batch in batches.whole {
            let receipts = take_in(controller, batch).await;
            commands.answer(receipts);
        }
    }
}

/// Messages in order, as many to a batch as may share a transaction.
#[derive(Debug, Default)]
struct Batches {
    whole: Vec<Vec<Inbound>>,
    /// Of the last one.
    rows: usize,
}

impl Batches {
    fn push(&mut self, inbound: Inbound) {
        let rows = events(&inbound).max(1);
        match self.whole.last_mut() {
            Some(batch) if self.rows + rows <= BATCH_MAX => {
                self.rows += rows;
                batch.push(inbound);
            }
            _ => {
                self.rows = rows;
                self.whole.push(vec![inbound]);
            }
        }
    }
}

/// How many events a message brings.
const fn events(inbound: &Inbound) -> usize {
    match &inbound.message {
        Message::Events(events) => events.events.len(),
        Message::Presence(_)
        | Message::Reported(_)
        | Message::Beacon(_)
        | Message::LeaseRequest(_) => 0,
    }
}

/// One transaction for all; if that fails, one each, so that a message which the store cannot take does not
/// keep out the others. What was not taken in is not acknowledged, and comes again.
async fn take_in(controller: &Controller, batch: Vec<Inbound>) -> Receipts {
    let shared = std::sync::Arc::new(batch);
    let whole = std::sync::Arc::clone(&shared);
    match controller
        .change(move |change| ingest::ingest(change, &whole))
        .await
    {
        Ok(receipts) => return receipts,
        Err(error) => {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                messages = shared.len(),
                "failed to take in a batch"
            );
        }
    }
    let mut receipts = Receipts::new();
    for inbound in shared.iter().cloned() {
        let device = inbound.device.clone();
        match controller
            .change(move |change| ingest::ingest(change, &[inbound]))
            .await
        {
            Ok(one) => {
                for (device, receipt) in one {
                    receipts.entry(device).or_default().join(receipt);
                }
            }
            Err(error) => {
                tracing::error!(%device, error = &error as &dyn std::error::Error, "failed to take in a message");
            }
        }
    }
    receipts
}

/// The message in a packet; `None` for an empty payload, which only clears a retained message.
///
/// # Errors
///
/// See [`Unreadable`]. No input panics.
pub fn decode(topic: &[u8], payload: &[u8], retained: bool) -> Result<Option<Heard>, Unreadable> {
    let topic = std::str::from_utf8(topic).map_err(|_| Unreadable::Topic)?;
    let Some(Topic::Device(device, leaf)) = Topic::parse(topic) else {
        return Err(Unreadable::Topic);
    };
    if payload.is_empty() {
        return Ok(None);
    }
    let unreadable = |error| Unreadable::Frame(device.clone(), error);
    let (message, counters) = match leaf {
        Leaf::Presence => {
            let presence: Presence = frame::decode(payload).map_err(unreadable)?;
            let secrets = generation(presence.secrets);
            let counters = [
                presence.session,
                presence.boot,
                presence.reported_seq,
                secrets,
            ];
            (Message::Presence(presence), counters)
        }
        Leaf::Reported => {
            let reported: Reported = frame::decode(payload).map_err(unreadable)?;
            let counters = [reported.boot, reported.seq, 0, 0];
            (Message::Reported(reported), counters)
        }
        Leaf::Beacon => {
            let beacon: Beacon = frame::decode(payload).map_err(unreadable)?;
            let secrets = generation(beacon.secrets);
            let counters = [beacon.boot, beacon.reported_seq, beacon.event_seq, secrets];
            (Message::Beacon(beacon), counters)
        }
        Leaf::Event => {
            let events: Events = frame::decode(payload).map_err(unreadable)?;
            let greatest = |of: fn(&Event) -> u64| events.events.iter().map(of).max().unwrap_or(0);
            let counters = [
                greatest(|event| event.boot),
                greatest(|event| event.seq),
                events.kept_from,
                0,
            ];
            (Message::Events(events), counters)
        }
        Leaf::Pull => {
            let progress: PullProgress = frame::decode(payload).map_err(unreadable)?;
            // What a broker kept is over.
            return Ok((!retained).then_some(Heard::Pull(device, progress)));
        }
        Leaf::LeaseRequest => {
            let request: LeaseRequest = frame::decode(payload).map_err(unreadable)?;
            let counters = [request.boot, request.nonce, 0, 0];
            (Message::LeaseRequest(request), counters)
        }
        Leaf::Head | Leaf::Command | Leaf::Secrets | Leaf::Lease => return Err(Unreadable::Topic),
    };
    if counters.iter().any(|counter| *counter >= COUNTER_MAX) {
        return Err(Unreadable::Counter(device));
    }
    Ok(Some(Heard::Inbound(Inbound {
        device,
        retained,
        message,
    })))
}

fn generation(version: Option<Version>) -> u64 {
    version.map_or(0, |version| version.generation.get())
}

/// A device that is not understood makes an event now and then, not a flood.
#[derive(Debug, Default)]
struct Complaints {
    last: BTreeMap<DeviceId, Instant>,
}

impl Complaints {
    async fn raise(&mut self, controller: &Controller, why: &Unreadable) {
        let (Unreadable::Frame(device, _) | Unreadable::Counter(device)) = why else {
            return;
        };
        self.last.retain(|_, at| at.elapsed() < COMPLAIN_EVERY);
        if self.last.contains_key(device) || self.last.len() >= COMPLAINTS_MAX {
            return;
        }
        self.last.insert(device.clone(), Instant::now());
        tracing::warn!(%device, %why, "a device's message is not understood");
        let (device, message) = (
            device.clone(),
            format!("its message is not understood: {why}"),
        );
        let recorded = controller.change(move |change| {
            Ok(change
                .event("message-refused")
                .device(&device)
                .record(message)?)
        });
        if let Err(error) = recorded.await {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "failed to record an event"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use foreshore_protocol::message::EventKind;
    use foreshore_protocol::topic;

    fn beacon(boot: u64) -> Beacon {
        Beacon {
            boot,
            seq: 1,
            version: None,
            reported_seq: 0,
            event_seq: 0,
            memory_mib: 0,
            load_centi: 0,
            secrets: None,
        }
    }

    #[test]
    fn a_transaction_takes_only_so_many_events() {
        let bringing = |count: usize| {
            let event = Event::new(1, 1, 0, EventKind::Ready, "");
            let events = Events {
                kept_from: 1,
                events: vec![event; count],
            };
            let topic = topic::device(&"d".parse().unwrap(), Leaf::Event);
            match decode(topic.as_bytes(), &frame::encode(&events), false) {
                Ok(Some(Heard::Inbound(inbound))) => inbound,
                other => panic!("{other:?}"),
            }
        };
        let mut batches = Batches::default();
        for count in [0, 64, 64, 64, 64, 64, 64, 64, 64, 1, 0] {
            batches.push(bringing(count));
        }
        let counts: Vec<usize> = batches.whole.iter().map(Vec::len).collect();
        assert_eq!(counts, [8, 3]);
    }

    #[test]
    fn only_the_right_frame_on_a_devices_own_upward_topic_is_a_message() {
        let device: DeviceId = "d".parse().unwrap();
        let up = topic::device(&device, Leaf::Beacon);
        let frame = frame::encode(&beacon(1));
        assert!(decode(up.as_bytes(), &frame, false).unwrap().is_some());
        assert_eq!(decode(up.as_bytes(), b"", true), Ok(None));
        assert!(matches!(
            decode(up.as_bytes(), b"FSnonsense", false),
            Err(Unreadable::Frame(..))
        ));
        assert!(matches!(
            decode(up.as_bytes(), &vec![0; 1 << 20], false),
            Err(Unreadable::Frame(..))
        ));
        let presence = topic::device(&device, Leaf::Presence);
        assert!(matches!(
            decode(presence.as_bytes(), &frame, false),
            Err(Unreadable::Frame(..))
        ));
        for other in ["fs/v1/hub", "fs/v1/00/d/beacon", "x", "fs/v1/rel/00"] {
            assert_eq!(
                decode(other.as_bytes(), &frame, false),
                Err(Unreadable::Topic),
                "{other}"
            );
        }
        let down = topic::device(&device, Leaf::Head);
        assert_eq!(
            decode(down.as_bytes(), &frame, false),
            Err(Unreadable::Topic)
        );
        assert_eq!(decode(b"\xff", &frame, false), Err(Unreadable::Topic));
        for kept_from in [COUNTER_MAX, u64::MAX] {
            let events = vec![];
            let huge = frame::encode(&Events { kept_from, events });
            let up = topic::device(&device, Leaf::Event);
            assert!(matches!(
                decode(up.as_bytes(), &huge, false),
                Err(Unreadable::Counter(_))
            ));
        }
        let huge = frame::encode(&beacon(u64::MAX));
        assert!(matches!(
            decode(up.as_bytes(), &huge, false),
            Err(Unreadable::Counter(_))
        ));
    }
}
