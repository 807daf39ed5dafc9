//! [`NoMemory`]: what lets a new process go on with the session that the broker kept.
//!
//! A client without stored state must refuse a session that the broker resumed (MQTT 5, section 3.2.2.1.1,
//! \[MQTT-3.2.2-4\]). Ours has state, and it is always the same: nothing under way. That is true: what was
//! published and not acknowledged is sent anew by the agent until the *hub* acknowledges it, and nothing is
//! received with QoS 2.

use std::pin::Pin;

use rumqttc::{
    PersistedAckMode, PersistedSession, SessionStore, SessionStoreError, SessionStoreKey,
};

type Answer<'a, T> = Pin<Box<dyn Future<Output = Result<T, SessionStoreError>> + Send + 'a>>;

/// A store of sessions in which nothing is ever under way.
#[derive(Debug, Clone, Copy)]
pub(super) struct NoMemory;

impl SessionStore for NoMemory {
    fn load<'a>(&'a self, key: &'a SessionStoreKey) -> Answer<'a, Option<PersistedSession>> {
        let nothing = PersistedSession {
            format_version: 1,
            client_id: key.client_id().to_owned(),
            clean_start: false,
            session_expiry_interval: Some(super::SESSION_EXPIRY_SECS),
            outgoing_inflight_upper_limit: Some(super::OUTGOING_MAXIMUM),
            ack_mode: PersistedAckMode::Manual,
            last_pkid: 0,
            last_puback: 0,
            replay: Vec::new(),
            incoming_qos2: Vec::new(),
        };
        Box::pin(std::future::ready(Ok(Some(nothing))))
    }

    fn save<'a>(&'a self, _: &'a SessionStoreKey, _: &'a PersistedSession) -> Answer<'a, ()> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn clear<'a>(&'a self, _: &'a SessionStoreKey) -> Answer<'a, ()> {
        Box::pin(std::future::ready(Ok(())))
    }
}
