//! MQTT topic names: `fs/v1/{shard}/{device}/{leaf}`, `fs/v1/rel/{digest}` and `fs/v1/hub`.
//!
//! The shard is the first two hexadecimal digits of SHA-256(device id): brokers lose part of a large
//! retained snapshot behind one wildcard, so the hub reads it in 256 parts.

use std::fmt;

use crate::{DeviceId, Digest};

/// What all topics begin with; the number is the version of the topic layout.
pub const PREFIX: &str = "fs/v1";

/// The retained topic that tells every device about the hub ([`crate::message::HubInfo`]).
pub const HUB: &str = "fs/v1/hub";

/// The last part of a device's topic. Which way it goes is fixed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Leaf {
    /// Down, QoS 1, retained: [`crate::message::Head`].
    Head,
    /// Down, QoS 1: [`crate::message::Command`].
    Command,
    /// Down, QoS 1, retained: [`crate::secret::SealedSecrets`].
    Secrets,
    /// Up, QoS 1, retained: [`crate::message::Reported`].
    Reported,
    /// Up, QoS 0: [`crate::message::Beacon`].
    Beacon,
    /// Up, QoS 0: [`crate::message::PullProgress`].
    Pull,
    /// Up, QoS 1: [`crate::message::Events`].
    Event,
    /// Up, QoS 1, retained, birth and Will: [`crate::message::Presence`].
    Presence,
    /// Up, QoS 1, expires: [`crate::message::LeaseRequest`].
    LeaseRequest,
    /// Down, QoS 1, expires: [`crate::message::Lease`].
    Lease,
}

impl Leaf {
    /// Every leaf.
    pub const ALL: [Self; 10] = [
        Self::Head,
        Self::Command,
        Self::Secrets,
        Self::Reported,
        Self::Beacon,
        Self::Pull,
        Self::Event,
        Self::Presence,
        Self::LeaseRequest,
        Self::Lease,
    ];

    /// The text in the topic.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Head => "head",
            Self::Command => "cmd",
            Self::Secrets => "secrets",
            Self::Reported => "reported",
            Self::Beacon => "beacon",
            Self::Pull => "pull",
            Self::Event => "event",
            Self::Presence => "presence",
            Self::LeaseRequest => "lease_req",
            Self::Lease => "lease",
        }
    }

    /// Whether the hub writes it and the device reads it.
    #[must_use]
    pub const fn is_down(self) -> bool {
        matches!(
            self,
            Self::Head | Self::Command | Self::Secrets | Self::Lease
        )
    }

    fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|leaf| leaf.as_str() == text)
    }
}

/// The two hexadecimal digits that a device's topics are sharded by.
#[must_use]
pub fn shard(device: &DeviceId) -> String {
    format!(
        "{:02x}",
        Digest::of(device.as_str().as_bytes()).as_bytes()[0]
    )
}

/// The topic of one device's leaf.
#[must_use]
pub fn device(device: &DeviceId, leaf: Leaf) -> String {
    format!("{PREFIX}/{}/{device}/{}", shard(device), leaf.as_str())
}

/// The filter that reads one leaf of every device in one shard (0 to 255).
#[must_use]
pub fn shard_filter(shard: u8, leaf: Leaf) -> String {
    format!("{PREFIX}/{shard:02x}/+/{}", leaf.as_str())
}

/// The retained topic of a release manifest. The digest goes without its algorithm: `fs/v1/rel/{hex}`.
#[must_use]
pub fn release(digest: &Digest) -> String {
    format!("{PREFIX}/rel/{}", digest.hex())
}

/// A topic of this layout, taken apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Topic {
    /// One device's leaf; the shard was checked.
    Device(DeviceId, Leaf),
    /// A release manifest.
    Release(Digest),
    /// What the hub tells everybody.
    Hub,
}

impl Topic {
    /// Takes a topic name apart; `None` for anything that is not exactly of this layout, a wrong shard
    /// included.
    #[must_use]
    pub fn parse(topic: &str) -> Option<Self> {
        let mut parts = topic.strip_prefix(PREFIX)?.strip_prefix('/')?.split('/');
        let parsed = match (parts.next()?, parts.next(), parts.next()) {
            ("hub", None, None) => Self::Hub,
            ("rel", Some(hex), None) => Self::Release(format!("sha256:{hex}").parse().ok()?),
            (in_shard, Some(id), Some(leaf)) => {
                let id: DeviceId = id.parse().ok()?;
                if shard(&id) != in_shard {
                    return None;
                }
                Self::Device(id, Leaf::parse(leaf)?)
            }
            _ => return None,
        };
        parts.next().is_none().then_some(parsed)
    }
}

impl fmt::Display for Topic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Device(id, leaf) => f.write_str(&device(id, *leaf)),
            Self::Release(digest) => f.write_str(&release(digest)),
            Self::Hub => f.write_str(HUB),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn topics_parse_back() {
        let id: DeviceId = "gateway-1".parse().unwrap();
        for topic in Leaf::ALL
            .map(|leaf| Topic::Device(id.clone(), leaf))
            .into_iter()
            .chain([Topic::Release(Digest::of(b"x")), Topic::Hub])
        {
            assert_eq!(Topic::parse(&topic.to_string()), Some(topic));
        }
    }

    #[test]
    fn other_shards_leaves_and_depths_are_no_topics() {
        let good = device(&"gateway-1".parse().unwrap(), Leaf::Head);
        for bad in [
            good.replace(&shard(&"gateway-1".parse().unwrap()), "zz"),
            good.replace("head", "heads"),
            format!("{good}/x"),
            format!("/{good}"),
            "fs/v1".to_owned(),
            "fs/v1/".to_owned(),
            "fs/v1/hub/x".to_owned(),
            "fs/v2/hub".to_owned(),
        ] {
            assert_eq!(Topic::parse(&bad), None, "{bad}");
        }
    }
}
