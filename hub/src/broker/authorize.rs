//! PURE: who may do what at the broker. The one place that knows; brokers ask it or are generated from it.
//!
//! A device writes its own up leaves, reads its own down leaves, the hub's topic and releases by their exact
//! digest, and nothing else: no wildcard, no shared subscription, no topic that begins with `$`. The hub does
//! everything below `fs/v1`, and nothing outside it.

use std::fmt;

use foreshore_protocol::DeviceId;
use foreshore_protocol::topic::{self, Leaf, Topic};

/// The hub's client id and user name. No device can have it.
pub const HUB_NAME: &str = "foreshore-hub";

/// Who a client is, once it has proved it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Identity {
    /// One device.
    Device(DeviceId),
    /// The hub itself.
    Hub,
}

impl Identity {
    /// The client id that this identity must use, and its user name.
    #[must_use]
    pub fn name(&self) -> &str {
        match self {
            Self::Device(id) => id.as_str(),
            Self::Hub => HUB_NAME,
        }
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What a client wants. The subject given to [`authorize`] is a client id, a topic or a topic filter accordingly.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Open a session under the client id in the subject.
    Connect,
    /// Publish to the topic in the subject.
    Publish {
        /// Whether the broker is asked to keep it.
        retain: bool,
    },
    /// Have the broker publish to the topic in the subject when the connection is lost.
    PublishWill {
        /// Whether the broker is asked to keep it.
        retain: bool,
    },
    /// Subscribe to the filter in the subject.
    Subscribe,
}

/// Why something is not allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    /// A session under another name would take over that client's session.
    #[error("a client id must be the client's own name")]
    ClientId,
    /// The name of the hub, claimed by a device.
    #[error("the name {HUB_NAME} belongs to the hub")]
    Reserved,
    /// Not a topic of this system, or not the client's own, or not in this direction.
    #[error("the topic is not one that this client may use")]
    Topic,
    /// The topic is right, but only presence and reports are kept.
    #[error("this topic is not kept by the broker; publish without the retain flag")]
    Retain,
}

/// Decides whether `identity` may do `action` to `subject`. What is not allowed here is denied.
///
/// # Errors
///
/// Why not. See [`Denied`].
pub fn authorize(identity: &Identity, action: Action, subject: &str) -> Result<(), Denied> {
    match identity {
        Identity::Device(id) if id.as_str() == HUB_NAME => Err(Denied::Reserved),
        Identity::Device(id) => authorize_device(id, action, subject),
        Identity::Hub => authorize_hub(action, subject),
    }
}

fn authorize_device(id: &DeviceId, action: Action, subject: &str) -> Result<(), Denied> {
    match action {
        Action::Connect => allow(subject == id.as_str(), Denied::ClientId),
        Action::Publish { retain } | Action::PublishWill { retain } => {
            let Some(Topic::Device(owner, leaf)) = Topic::parse(subject) else {
                return Err(Denied::Topic);
            };
            allow(owner == *id && !leaf.is_down(), Denied::Topic)?;
            allow(!retain || is_kept(leaf), Denied::Retain)
        }
        // A filter without wildcards is a topic, and a topic with wildcards does not parse.
        Action::Subscribe => match Topic::parse(subject) {
            Some(Topic::Device(owner, leaf)) => {
                allow(owner == *id && leaf.is_down(), Denied::Topic)
            }
            Some(Topic::Release(_) | Topic::Hub) => Ok(()),
            None => Err(Denied::Topic),
        },
    }
}

fn authorize_hub(action: Action, subject: &str) -> Result<(), Denied> {
    let below = subject
        .strip_prefix(topic::PREFIX)
        .is_some_and(|rest| rest.starts_with('/'));
    match action {
        Action::Connect => allow(subject == HUB_NAME, Denied::ClientId),
        Action::Publish { .. } | Action::PublishWill { .. } => {
            allow(below && !subject.contains(['+', '#', '\0']), Denied::Topic)
        }
        Action::Subscribe => allow(below, Denied::Topic),
    }
}

fn allow(condition: bool, otherwise: Denied) -> Result<(), Denied> {
    if condition { Ok(()) } else { Err(otherwise) }
}

/// Whether a device may ask the broker to keep what it publishes there.
#[must_use]
pub const fn is_kept(leaf: Leaf) -> bool {
    matches!(leaf, Leaf::Reported | Leaf::Presence)
}

#[cfg(test)]
#[path = "authorize/tests.rs"]
mod tests;
