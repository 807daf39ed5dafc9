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
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use foreshore_protocol::DeviceId;
use rmqtt::codec::v5::SubscribeAckReason;
use rmqtt::context::ServerContext;
use rmqtt::hook::{Handler, HookResult, Parameter, ReturnType};
use rmqtt::session::Session;
use rmqtt::types::{
    AuthResult, ConnectInfo, From, FromType, Id, LastWill, Publish, PublishAclResult,
    SubscribeAclResult,
};

use super::descriptors::SESSIONS_EACH;
use super::pace::Pace;
use super::seldom::Seldom;
use super::{DEVICES, HUB, Limits};
use crate::broker::authenticate::{Authenticator, Credentials, Refused};
use crate::broker::authorize::{Action, Denied, HUB_NAME, Identity, authorize};

/// Refusals are logged so often at most: a client decides how many there are.
const LOG_EVERY: Duration = Duration::from_secs(1);

/// Our side of all hooks; clones share their state.
#[derive(Clone)]
pub(super) struct Hooks(Arc<Shared>);

struct Shared {
    authenticator: Arc<dyn Authenticator>,
    messages_per_second: u32,
    bytes_per_second: u32,
    sessions_max: isize,
    /// rmqtt itself, once it is made.
    context: OnceLock<ServerContext>,
    /// The newest connection of each client id. As many entries as there are sessions.
    clients: Mutex<HashMap<String, Client>>,
    refused: Seldom,
    denied: Seldom,
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
            sessions_max: isize::try_from(limits.connections.saturating_mul(SESSIONS_EACH))
                .unwrap_or(isize::MAX),
            context: OnceLock::new(),
            clients: Mutex::default(),
            refused: Seldom::new(LOG_EVERY),
            denied: Seldom::new(LOG_EVERY),
        }))
    }

    /// Tells the hooks whose hooks they are. Each holds the other from here on, for the life of the process: so do
    /// other parts of rmqtt.
    pub(super) fn attach(&self, context: &ServerContext) {
        // Only the first call counts, and there is only one.
        let _ = self.0.context.set(context.clone());
    }

    async fn authenticate(&self, info: &ConnectInfo) -> AuthResult {
        let id = info.id();
        match self.admit(info).await {
            // Not a superuser: that would skip the hooks below.
            Ok(_) => AuthResult::Allow(false, None),
            Err(refusal) => {
                if let Some(left_out) = self.0.refused.due(Instant::now()) {
                    let client_id = shown(&id.client_id);
                    tracing::info!(%client_id, reason = %refusal, left_out, "the broker refused a client");
                }
                match refusal {
                    Refusal::Nobody(_) => AuthResult::BadUsernameOrPassword,
                    Refusal::Door | Refusal::Will(_) | Refusal::Full => AuthResult::NotAuthorized,
                }
            }
        }
    }

    async fn admit(&self, info: &ConnectInfo) -> Result<Identity, Refusal> {
        let identity = self.identify(info)?;
        // rmqtt's own limit would shut out the hub too.
        if matches!(identity, Identity::Device(_))
            && let Some(context) = self.0.context.get()
            && context.sessions.count() >= self.0.sessions_max
            && !context.extends.shared().await.exist(&info.id().client_id)
        {
            return Err(Refusal::Full);
        }
        Ok(identity)
    }

    fn identify(&self, info: &ConnectInfo) -> Result<Identity, Refusal> {
        let id = info.id();
        let credentials = Credentials {
            client_id: &id.client_id,
            user: info.username().map(|user| &**user),
            password: info.password().map(|password| &**password),
        };
        let identity = self.0.authenticator.authenticate(credentials)?;
        let door = match identity {
            Identity::Device(_) => DEVICES,
            Identity::Hub => HUB,
        };
        if id.lid != door {
            return Err(Refusal::Door);
        }
        if let Some((topic, retain)) = info.last_will().as_ref().map(will) {
            authorize(&identity, Action::PublishWill { retain }, topic).map_err(Refusal::Will)?;
        }
        Ok(identity)
    }

    /// Whether the client of this session may do that. Its client id is its proven name since it was authenticated.
    fn check(&self, session: &Session, action: Action, subject: &str) -> Result<(), Denied> {
        let identity = match &*session.id.client_id {
            HUB_NAME if session.id.lid == HUB => Identity::Hub,
            device => Identity::Device(device.parse::<DeviceId>().map_err(|_| Denied::ClientId)?),
        };
        authorize(&identity, action, subject).inspect_err(|reason| {
            if let Some(left_out) = self.0.denied.due(Instant::now()) {
                let subject = shown(subject);
                tracing::warn!(
                    client = %identity, ?action, %subject, %reason, left_out,
                    "the broker denied a client something"
                );
            }
        })
    }

    /// Slows down a client that does too much. Before the answer, so that it holds for what is denied too.
    async fn slow_down(&self, id: &Id, bytes: usize) {
        let wait = self.wait(id, bytes);
        if !wait.is_zero() {
            tokio::time::sleep(wait).await;
        }
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

    /// How long a message of this client, of so many bytes, must wait.
    fn wait(&self, id: &Id, bytes: usize) -> Duration {
        if id.lid == HUB {
            return Duration::ZERO;
        }
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
            Parameter::ClientAuthenticate(info) => (
                false,
                Some(HookResult::AuthResult(self.authenticate(info).await)),
            ),
            Parameter::ClientConnected(session) => {
                self.connected(&session.id);
                (true, acc)
            }
            Parameter::SessionTerminated(session, _) => {
                self.terminated(&session.id);
                (true, acc)
            }
            Parameter::ClientSubscribeCheckAcl(session, subscribe) => {
                self.slow_down(&session.id, subscribe.topic_filter.len())
                    .await;
                let result = self
                    .check(session, Action::Subscribe, &subscribe.topic_filter)
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
                self.slow_down(&session.id, publish.topic.len() + publish.payload.len())
                    .await;
                let action = Action::Publish {
                    retain: publish.retain,
                };
                let result = self.check(session, action, &publish.topic).map_or_else(
                    |reason| PublishAclResult::rejected(false, Some(reason.to_string().into())),
                    |()| PublishAclResult::allow(),
                );
                (false, Some(HookResult::PublishAclResult(result)))
            }
            _ => (true, acc),
        }
    }
}

/// Why a client was not let in.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error("{0}")]
    Nobody(#[from] Refused),
    #[error("devices and the hub have a listener each, and this was the other's")]
    Door,
    #[error("its Will: {0}")]
    Will(Denied),
    #[error("the broker keeps as many sessions as it may")]
    Full,
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
