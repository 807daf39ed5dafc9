//! Retained messages, in memory and within bounds. rmqtt's own store keeps nothing without a plugin.
//!
//! Nothing here outlives the process: the hub publishes everything again from SQLite after a start, and devices
//! publish their own state on connecting. So whatever does not fit is dropped, with a warning, and not an error:
//! rmqtt would close the publisher's connection.

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::ops::Bound;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use rmqtt::retain::RetainStorage;
use rmqtt::types::{Retain, TopicFilter, TopicName};

use super::Limits;
use super::seldom::Seldom;

/// What a kept message takes beside topic and payload: the packet, who sent it, its place in the map. A guess on the
/// safe side.
const OVERHEAD_BYTES: usize = 512;

/// A warning about a full store is written at most so often.
const WARN_EVERY: Duration = Duration::from_secs(60);

/// The store.
pub(super) struct Retained {
    messages_max: usize,
    bytes_max: usize,
    kept: Mutex<Kept>,
    full: Seldom,
}

#[derive(Default)]
struct Kept {
    by_topic: BTreeMap<String, Message>,
    bytes: usize,
    most: usize,
}

struct Message {
    retain: Retain,
    bytes: usize,
    expires: Option<Instant>,
}

impl Retained {
    pub(super) fn new(limits: &Limits) -> Self {
        Self {
            messages_max: limits.retained_messages,
            bytes_max: limits.retained_bytes,
            kept: Mutex::default(),
            full: Seldom::new(WARN_EVERY),
        }
    }

    fn kept(&self) -> std::sync::MutexGuard<'_, Kept> {
        // Every change below leaves the counts right before anything can panic.
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, topic: &str, retain: Retain, now: Instant) {
        let mut kept = self.kept();
        if let Some(old) = kept.by_topic.remove(topic) {
            kept.bytes -= old.bytes;
        }
        if retain.publish.payload.is_empty() {
            return;
        }
        let message = Message::new(topic, retain, now);
        if kept.by_topic.len() >= self.messages_max || kept.bytes + message.bytes > self.bytes_max {
            if let Some(left_out) = self.full.due(now) {
                tracing::warn!(
                    topic,
                    messages = kept.by_topic.len(),
                    bytes = kept.bytes,
                    left_out,
                    "the broker's store of retained messages is full; a message was not kept"
                );
            }
            return;
        }
        kept.bytes += message.bytes;
        kept.by_topic.insert(topic.to_owned(), message);
        kept.most = kept.most.max(kept.by_topic.len());
    }

    fn matching(&self, filter: &str, now: Instant) -> Vec<(TopicName, Retain)> {
        let kept = self.kept();
        let found = |(topic, message): (&String, &Message)| message.deliver(topic, now);
        if !filter.contains(['+', '#']) {
            return kept
                .by_topic
                .get_key_value(filter)
                .and_then(found)
                .into_iter()
                .collect();
        }
        // Everything that matches begins with what stands before the first wildcard.
        let prefix = &filter[..filter.find(['+', '#']).unwrap_or(0)];
        // "a/#" matches "a" too, which sorts before "a/".
        let first = prefix.strip_suffix('/').unwrap_or(prefix);
        kept.by_topic
            .range::<str, _>((Bound::Included(first), Bound::Unbounded))
            .take_while(|(topic, _)| topic.starts_with(first))
            .filter(|(topic, _)| matches(filter, topic))
            .filter_map(found)
            .collect()
    }
}

impl Message {
    /// Payload and topic are copied: as they come, they keep the whole read buffer of a connection alive.
    fn new(topic: &str, mut retain: Retain, now: Instant) -> Self {
        let bytes = topic.len() + retain.publish.payload.len() + OVERHEAD_BYTES;
        retain.publish.payload = Bytes::copy_from_slice(&retain.publish.payload);
        retain.publish.topic = TopicName::from(topic);
        // The interval that rmqtt hands over is the listener's default; only the sender's own counts.
        let seconds = retain
            .publish
            .properties
            .as_ref()
            .and_then(|properties| properties.message_expiry_interval);
        let expires =
            seconds.and_then(|seconds| now.checked_add(Duration::from_secs(seconds.get().into())));
        Self {
            retain,
            bytes,
            expires,
        }
    }

    /// The message with what is left of its life; `None` when that is nothing.
    fn deliver(&self, topic: &str, now: Instant) -> Option<(TopicName, Retain)> {
        let mut retain = self.retain.clone();
        if let Some(expires) = self.expires {
            let left = expires.checked_duration_since(now)?.as_secs();
            let left = NonZeroU32::new(u32::try_from(left).unwrap_or(u32::MAX))?;
            if let Some(properties) = &mut retain.publish.properties {
                properties.message_expiry_interval = Some(left);
            }
        }
        Some((TopicName::from(topic), retain))
    }
}

#[async_trait]
impl RetainStorage for Retained {
    fn enable(&self) -> bool {
        true
    }

    fn need_sync(&self) -> bool {
        false
    }

    async fn set(
        &self,
        topic: &TopicName,
        retain: Retain,
        _: Option<Duration>,
    ) -> rmqtt::Result<()> {
        self.put(topic, retain, Instant::now());
        Ok(())
    }

    async fn get(&self, filter: &TopicFilter) -> rmqtt::Result<Vec<(TopicName, Retain)>> {
        Ok(self.matching(filter, Instant::now()))
    }

    async fn count(&self) -> isize {
        isize::try_from(self.kept().by_topic.len()).unwrap_or(isize::MAX)
    }

    async fn max(&self) -> isize {
        isize::try_from(self.kept().most).unwrap_or(isize::MAX)
    }
}

/// Whether a filter matches a topic (MQTT 5, section 4.7).
fn matches(filter: &str, topic: &str) -> bool {
    if topic.starts_with('$') && filter.starts_with(['+', '#']) {
        return false;
    }
    let mut topic = topic.split('/');
    for level in filter.split('/') {
        match (level, topic.next()) {
            ("#", _) => return true,
            ("+", Some(_)) => {}
            (level, Some(part)) if level == part => {}
            _ => return false,
        }
    }
    topic.next().is_none()
}

#[cfg(test)]
#[path = "retained/tests.rs"]
mod tests;
