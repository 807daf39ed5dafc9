//! What rmqtt asks us: who somebody is, and whether they may.
//!
//! | trap in rmqtt 0.24 | answer here |
//! |---|---|
//! | a Will does not pass the publish hook | judged with the CONNECT that carries it |
//! | a client id is not tied to the user name | part of authentication |
//! | the Will of a session that was taken over may come after the birth of its successor | no longer retained |
//! | a publisher is read as fast as it sends | the publish hook waits |

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use foreshore_protocol::DeviceId;
use rmqtt::codec::v5::SubscribeAckReason;
use rmqtt::hook::{Handler, HookResult, Parameter, ReturnType};
use rmqtt::session::Session;
use rmqtt::types::{
    AuthResult, ConnectInfo, From, FromType, Id, LastWill, Publish, PublishAclResult,
    SubscribeAclResult,
};

use super::pace::Pace;
use super::{DEVICES, HUB, Limits};
use crate::broker::authenticate::{Authenticator, Credentials};
use crate::broker::authorize::{Action, Denied, HUB_NAME, Identity, authorize};

/// Our side of all hooks; clones share their state.
#[derive(Clone)]
pub(super) struct Hooks(Arc<Shared>);

struct Shared {
    authenticator: Arc<dyn Authenticator>,
    messages_per_second: u32,
    bytes_per_second: u32,
    /// The newest connection of each client id. As many entries as there are sessions.
    clients: Mutex<HashMap<String, Client>>,
}

struct Client {
    connection: Connection,
    pace: Pace,
}

/// One connection of a client id, as opposed to the next one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Connection {
    from: Option<SocketAddr>,
    at_ms: i64,
}

impl Connection {
    fn of(id: &Id) -> Self {
        Self {
            from: id.remote_addr,
            at_ms: id.create_time,
        }
    }
}

impl Hooks {
    pub(super) fn new(authenticator: Arc<dyn Authenticator>, limits: &Limits) -> Self {
        Self(Arc::new(Shared {
            authenticator,
            messages_per_second: limits.device_messages_per_second,
            bytes_per_second: limits.device_bytes_per_second,
            clients: Mutex::default(),
        }))
    }

    fn authenticate(&self, info: &ConnectInfo) -> AuthResult {
        let id = info.id();
        let credentials = Credentials {
            client_id: &id.client_id,
            user: info.username().map(|user| &**user),
            password: info.password().map(|password| &**password),
        };
        let identity = match self.0.authenticator.authenticate(credentials) {
            Ok(identity) => identity,
            Err(reason) => {
                tracing::info!(client_id = %shown(&id.client_id), %reason, "a client was refused");
                return AuthResult::BadUsernameOrPassword;
            }
        };
        let door = match identity {
            Identity::Device(_) => DEVICES,
            Identity::Hub => HUB,
        };
        if id.lid != door {
            tracing::warn!(client = %identity, "a client came to the wrong listener and was refused");
            return AuthResult::NotAuthorized;
        }
        if let Some((topic, retain)) = info.last_will().as_ref().map(will)
            && let Err(reason) = authorize(&identity, Action::PublishWill { retain }, topic)
        {
            tracing::warn!(client = %identity, topic = %shown(topic), %reason, "a Will was refused");
            return AuthResult::NotAuthorized;
        }
        // Not a superuser: that would skip the hooks below.
        AuthResult::Allow(false, None)
    }

    fn connected(&self, id: &Id) {
        let shared = &*self.0;
        let (connection, now) = (Connection::of(id), Instant::now());
        let mut clients = self.clients();
        let client = clients
            .entry(id.client_id.to_string())
            .or_insert_with(|| Client {
                connection,
                pace: Pace::new(shared.messages_per_second, shared.bytes_per_second, now),
            });
        client.connection = connection;
    }

    fn terminated(&self, id: &Id) {
        let mut clients = self.clients();
        if clients
            .get(&*id.client_id)
            .is_some_and(|client| client.connection == Connection::of(id))
        {
            clients.remove(&*id.client_id);
        }
    }

    /// How long this message of this client must wait.
    fn wait(&self, id: &Id, publish: &Publish) -> Duration {
        if id.lid == HUB {
            return Duration::ZERO;
        }
        let bytes = publish.topic.len() + publish.payload.len();
        self.clients()
            .get_mut(&*id.client_id)
            .map_or(Duration::ZERO, |client| {
                client.pace.take(bytes, Instant::now())
            })
    }

    /// The Will of a connection that has a successor, so changed that it does not replace the successor's birth.
    fn outdated_will(&self, id: &Id, from: &From, publish: &Publish) -> Option<Publish> {
        if !matches!(from.typ(), FromType::LastWill) || !publish.retain {
            return None;
        }
        let superseded = self
            .clients()
            .get(&*id.client_id)
            .is_some_and(|client| client.connection != Connection::of(id));
        superseded.then(|| {
            let mut publish = publish.clone();
            publish.retain = false;
            publish
        })
    }

    fn clients(&self) -> std::sync::MutexGuard<'_, HashMap<String, Client>> {
        // No operation on the map leaves it half done.
        self.0
            .clients
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl Handler for Hooks {
    #[expect(
        elided_lifetimes_in_paths,
        reason = "rmqtt's trait elides it, and async_trait needs the same shape"
    )]
    async fn hook(&self, parameter: &Parameter, acc: Option<HookResult>) -> ReturnType {
        match parameter {
            Parameter::ClientAuthenticate(info) => {
                (false, Some(HookResult::AuthResult(self.authenticate(info))))
            }
            Parameter::ClientConnected(session) => {
                self.connected(&session.id);
                (true, acc)
            }
            Parameter::SessionTerminated(session, _) => {
                self.terminated(&session.id);
                (true, acc)
            }
            Parameter::ClientSubscribeCheckAcl(session, subscribe) => {
                let result = check(session, Action::Subscribe, &subscribe.topic_filter)
                    .map_or_else(
                        |_| SubscribeAclResult::new_failure(SubscribeAckReason::NotAuthorized),
                        |()| SubscribeAclResult::new_success(subscribe.opts.qos(), None),
                    );
                (false, Some(HookResult::SubscribeAclResult(result)))
            }
            Parameter::MessagePublish(Some(session), from, publish) => (
                true,
                self.outdated_will(&session.id, from, publish)
                    .map(HookResult::Publish),
            ),
            Parameter::MessagePublishCheckAcl(session, publish) => {
                // Before the answer, so that a stream of denied messages is slowed down too.
                let wait = self.wait(&session.id, publish);
                if !wait.is_zero() {
                    tokio::time::sleep(wait).await;
                }
                let action = Action::Publish {
                    retain: publish.retain,
                };
                let result = check(session, action, &publish.topic).map_or_else(
                    |reason| PublishAclResult::rejected(false, Some(reason.to_string().into())),
                    |()| PublishAclResult::allow(),
                );
                (false, Some(HookResult::PublishAclResult(result)))
            }
            _ => (true, acc),
        }
    }
}

/// Whether the client of this session may do that. Its client id is its proven name since it was authenticated.
fn check(session: &Session, action: Action, subject: &str) -> Result<(), Denied> {
    let identity = match &*session.id.client_id {
        HUB_NAME if session.id.lid == HUB => Identity::Hub,
        device => Identity::Device(device.parse::<DeviceId>().map_err(|_| Denied::ClientId)?),
    };
    authorize(&identity, action, subject).inspect_err(|reason| {
        tracing::warn!(client = %identity, ?action, subject = %shown(subject), %reason, "a client was denied something");
    })
}

fn will<'a>(will: &LastWill<'a>) -> (&'a str, bool) {
    match will {
        LastWill::V3(will) => (&*will.topic, will.retain),
        LastWill::V5(will) => (&*will.topic, will.retain),
    }
}

/// A text from a stranger, as far as it is fit for a log.
fn shown(text: &str) -> String {
    text.chars().take(80).flat_map(char::escape_debug).collect()
}
