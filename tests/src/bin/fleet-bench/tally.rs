//! What passes between devices and the broker, counted at the devices.

use std::collections::BTreeMap;
use std::ops::Sub;
use std::sync::Mutex;

use foreshore_protocol::topic::Topic;
use rumqttc::Packet;

/// Packets and bytes one way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Way {
    pub(crate) packets: u64,
    pub(crate) publishes: u64,
    /// Of MQTT packets with their headers.
    pub(crate) bytes: u64,
}

/// Both ways.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Count {
    pub(crate) up: Way,
    pub(crate) down: Way,
    /// PUBLISH packets by what they are.
    pub(crate) publishes: BTreeMap<&'static str, u64>,
}

/// Counts while devices talk.
#[derive(Debug, Default)]
pub(crate) struct Tally(Mutex<Count>);

impl Tally {
    /// So far.
    pub(crate) fn count(&self) -> Count {
        self.locked().clone()
    }

    /// A packet of a device.
    pub(crate) fn up(&self, packet: &Packet, bytes: usize) {
        let mut count = self.locked();
        count.up.add(packet, bytes);
        count.kind(packet);
    }

    /// A packet to a device.
    pub(crate) fn down(&self, packet: &Packet, bytes: usize) {
        let mut count = self.locked();
        count.down.add(packet, bytes);
        count.kind(packet);
    }

    fn locked(&self) -> std::sync::MutexGuard<'_, Count> {
        self.0.lock().expect("counting does not panic")
    }
}

impl Count {
    fn kind(&mut self, packet: &Packet) {
        let Packet::Publish(publish) = packet else {
            return;
        };
        let topic = String::from_utf8_lossy(&publish.topic);
        let kind = match Topic::parse(&topic) {
            Some(Topic::Device(_, leaf)) => leaf.as_str(),
            Some(Topic::Release(_)) => "rel",
            Some(Topic::Hub) => "hub",
            None => "other",
        };
        *self.publishes.entry(kind).or_default() += 1;
    }
}

impl Way {
    const fn add(&mut self, packet: &Packet, bytes: usize) {
        self.packets += 1;
        self.bytes += bytes as u64;
        if matches!(packet, Packet::Publish(_)) {
            self.publishes += 1;
        }
    }
}

impl Sub for Way {
    type Output = Self;

    fn sub(self, before: Self) -> Self {
        Self {
            packets: self.packets - before.packets,
            publishes: self.publishes - before.publishes,
            bytes: self.bytes - before.bytes,
        }
    }
}

impl Sub for Count {
    type Output = Self;

    fn sub(self, before: Self) -> Self {
        let publishes = self.publishes.into_iter().map(|(kind, count)| {
            (
                kind,
                count - before.publishes.get(kind).copied().unwrap_or(0),
            )
        });
        Self {
            up: self.up - before.up,
            down: self.down - before.down,
            publishes: publishes.filter(|(_, count)| *count > 0).collect(),
        }
    }
}
