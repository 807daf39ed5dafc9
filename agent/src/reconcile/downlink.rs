//! What comes from the hub, and what the agent takes from it.

use std::collections::BTreeMap;
use std::time::Duration;

use foreshore_killpoint as killpoint;
use foreshore_protocol::Digest;
use foreshore_protocol::message::{Command, EventKind, Head, HubInfo, Reason, ReasonCode};
use foreshore_protocol::release::{Release, ReleaseError};
use tokio::time::Instant;

use super::{Agent, Next, Offered, RETRY};
use crate::causes::chain;
use crate::clock;
use crate::link::{Incoming, Outgoing, Receipt};
use crate::plan::{BootMs, HubProof, Outcome};
use crate::runtime::Runtime;
use crate::state::{AcceptError, Outbox};
use crate::vault::Refused;

/// After connecting, heads are collected for this long and only the newest is taken: a broker may hand over
/// all that a session missed.
const SETTLE: Duration = Duration::from_millis(300);

/// How long after connecting that holds; later heads are taken at once.
const SETTLING: Duration = Duration::from_secs(2);

/// What the hub may ask for.
const BEACON_RANGE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_hours(24));

impl<R: Runtime + 'static> Agent<R> {
    pub(super) fn handle_link(&mut self, message: Incoming) -> Next {
        match message {
            Incoming::Connected => self.handle_connected(),
            Incoming::Disconnected {
                why,
                refused,
                answered,
            } => {
                self.handle_disconnected(&why, refused);
                if answered {
                    self.contact.refused = Some(clock::boot_ms());
                    if self.awaits_hub() {
                        return Next::Plan;
                    }
                }
            }
            Incoming::Head(head, receipt) => return self.handle_head(head, receipt),
            Incoming::Secrets(sealed, receipt) => {
                self.offered_secrets = Some((sealed, receipt));
                return if self.accept_secrets() {
                    Next::Plan
                } else {
                    Next::Nothing
                };
            }
            Incoming::Command(Command::Ack {
                event,
                reported,
                unix_ms,
            }) => {
                let mut news = Next::Nothing;
                if let Some(took) = self.uplink.answered_within(reported) {
                    let now = clock::boot_ms();
                    self.wall.hear(unix_ms, took, now);
                    let took = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
                    self.contact.answered = Some(BootMs(now.0.saturating_sub(took)));
                    if self.awaits_hub() {
                        news = Next::Plan;
                    }
                }
                let oldest = |outbox: &Outbox| outbox.events().next().map(|event| event.seq);
                let before = oldest(&self.outbox);
                let stored = self.outbox.acknowledge(event);
                self.note_disk(stored);
                let advanced = oldest(&self.outbox) != before;
                self.uplink.acknowledged(reported, advanced);
                return news;
            }
            Incoming::Command(Command::Resync) => self.uplink.resync(),
            Incoming::Lease(lease) => {
                if self.turns.take(&lease) {
                    return Next::Plan;
                }
                tracing::debug!(
                    app = lease.app.as_str(),
                    nonce = lease.nonce,
                    "a turn that nobody waits for"
                );
            }
            Incoming::Hub(info) => self.handle_hub(&info),
            Incoming::Release(digest, bytes) => return self.handle_release(digest, &bytes),
            Incoming::Unreadable { topic, why } => {
                tracing::warn!(topic, why, "a message from the hub was not understood");
            }
            Incoming::Closed => {}
        }
        Next::Nothing
    }

    /// Whether a release on trial must show that the way to the hub is open.
    fn awaits_hub(&self) -> bool {
        let mut trials = self
            .history
            .apps
            .values()
            .filter_map(|app| app.trial.as_ref());
        trials.any(|trial| matches!(trial.hub, HubProof::Awaited { .. }))
    }

    fn handle_connected(&mut self) {
        tracing::info!(
            host = self.config.hub.broker.host,
            port = self.config.hub.broker.port,
            "connected to the hub's broker"
        );
        self.offline = None;
        self.connected_at = Some(Instant::now());
        self.contact.connected_since = Some(clock::boot_ms());
        self.uplink.connected();
        self.turns.connected(Instant::now());
        // What was asked for on the connection before is asked for again by the next plan.
        self.fetching.clear();
        self.wake_at = Some(Instant::now());
    }

    fn handle_disconnected(&mut self, why: &str, refused: bool) {
        let was_connected = self.connected_at.take().is_some();
        self.contact.connected_since = None;
        // Receipts of a connection that is gone are worth nothing; the heads come again.
        self.uplink.disconnected();
        if let Some(offered) = &mut self.offered {
            offered.receipts.clear();
        }
        if let Some((_, receipt)) = &mut self.offered_secrets {
            *receipt = Receipt::none();
        }
        let token_file = self.config.hub.join_token_file.display();
        match self.offline.replace(refused) {
            Some(before) if before == refused && !was_connected => {
                tracing::debug!(why, "still not connected to the hub's broker");
            }
            _ if refused => tracing::error!(
                why,
                %token_file,
                "the broker refuses this device: check that the token file holds the hub's join token"
            ),
            _ => tracing::info!(
                why,
                "not connected to the hub's broker; what runs keeps running"
            ),
        }
    }

    fn handle_hub(&mut self, info: &HubInfo) {
        self.wall.not_before(info.unix_ms);
        let asked = Duration::from_millis(info.beacon_interval_ms.into());
        self.uplink
            .set_beacon_interval(asked.clamp(BEACON_RANGE.0, BEACON_RANGE.1));
    }

    fn handle_head(&mut self, head: Head, receipt: Receipt) -> Next {
        let known = self.head.as_ref().map(|head| head.version);
        if known.is_some_and(|known| head.version <= known) {
            self.uplink.accepted(receipt);
            return Next::Nothing;
        }
        let now = Instant::now();
        let settling = self.connected_at.is_some_and(|at| now < at + SETTLING);
        let due = if settling { now + SETTLE } else { now };
        match &mut self.offered {
            Some(offered) => {
                offered.receipts.push(receipt);
                if head.version > offered.head.version {
                    offered.head = head;
                }
            }
            None => {
                self.offered = Some(Offered {
                    head,
                    receipts: vec![receipt],
                    due,
                });
            }
        }
        if self.accept_offered(now) {
            Next::Plan
        } else {
            Next::Nothing
        }
    }

    /// Stores the newest head that was offered, then acknowledges it. True when there is a new one.
    pub(super) fn accept_offered(&mut self, now: Instant) -> bool {
        let Some(offered) = self.offered.take_if(|offered| now >= offered.due) else {
            return false;
        };
        let current = self.head.as_ref().map(|head| head.version);
        let stored = self
            .memory
            .state
            .borrow_mut()
            .accept(&offered.head, current);
        let accepted = match stored {
            Ok(()) => true,
            Err(AcceptError::NotNewer { offered, stored }) => {
                tracing::info!(%offered, %stored, "an old head was ignored");
                false
            }
            Err(AcceptError::File(error)) => {
                // Neither stored nor acknowledged: it is tried again, and the broker sends it again.
                let error = Err(error);
                let pause = if self.make_room(&error) {
                    Duration::ZERO
                } else {
                    RETRY
                };
                self.note_disk(error);
                self.offered = Some(Offered {
                    due: now + pause,
                    ..offered
                });
                return false;
            }
        };
        killpoint::reached("accept", "stored");
        for receipt in offered.receipts {
            self.uplink.accepted(receipt);
        }
        if accepted {
            let version = offered.head.version;
            tracing::info!(%version, apps = offered.head.apps.len(), "accepted a new desired state");
            self.head = Some(offered.head);
            self.event(
                EventKind::Accepted,
                None,
                None,
                format!("accepted {version}"),
            );
        }
        accepted
    }

    /// Stores the secrets that were offered last, then acknowledges them. True when they are new. What cannot be stored is
    /// tried again by the next plan.
    pub(super) fn accept_secrets(&mut self) -> bool {
        let Some((sealed, receipt)) = self.offered_secrets.take() else {
            return false;
        };
        let bundle = match self.vault.open(&sealed) {
            Ok(bundle) => bundle,
            Err(refused) => {
                // They would be no better when they come again; at the birth the hub learns what we have.
                match refused {
                    Refused::Old { .. } => tracing::debug!(%refused, "secrets were ignored"),
                    _ => tracing::warn!(error = chain(&refused), "secrets were refused"),
                }
                self.uplink.accepted(receipt);
                return false;
            }
        };
        let mut stored = self.memory.state.borrow().store_secrets(&sealed);
        if self.make_room(&stored) {
            stored = self.memory.state.borrow().store_secrets(&sealed);
        }
        if stored.is_err() {
            self.note_disk(stored);
            self.offered_secrets = Some((sealed, receipt));
            self.wake_by(Instant::now() + RETRY);
            return false;
        }
        self.uplink.accepted(receipt);
        let (version, count) = (bundle.version, bundle.secrets.len());
        tracing::info!(%version, count, "accepted new secrets");
        self.vault.keep(bundle);
        true
    }

    fn handle_release(&mut self, digest: Digest, bytes: &[u8]) -> Next {
        if !self.fetching.remove(&digest) {
            return Next::Nothing;
        }
        let _harmless_if_lost = self.uplink.send(Outgoing::Fetched(digest));
        match Release::from_bytes(bytes, &digest) {
            Ok(release) => {
                let mut stored = self.memory.state.borrow().store_release(&digest, bytes);
                if self.make_room(&stored) {
                    stored = self.memory.state.borrow().store_release(&digest, bytes);
                }
                match stored {
                    Ok(()) => {
                        self.releases.insert(digest, release);
                    }
                    Err(error) => {
                        // With back-off, like any staging that fails, and a full disk collects garbage.
                        let code = if error.is_disk_full() {
                            ReasonCode::DiskFull
                        } else {
                            ReasonCode::Internal
                        };
                        let reason = Reason::new(code, None, chain(&error));
                        self.note_disk(Err(error));
                        self.record(&Outcome::StagingFailed {
                            release: digest,
                            reason,
                            logins: BTreeMap::new(),
                        });
                    }
                }
            }
            Err(error) => {
                // Right bytes that do not decode come from a newer hub; wrong bytes may come right.
                let schema_unknown =
                    matches!(error, ReleaseError::Schema(_) | ReleaseError::Decode(_));
                let message = format!("manifest of release {}: {}", digest.short(), chain(&error));
                tracing::warn!(message, "a release manifest was refused");
                self.event(EventKind::StagingFailed, None, None, message.clone());
                self.record(&Outcome::BadRelease {
                    release: digest,
                    message,
                    schema_unknown,
                });
            }
        }
        Next::Plan
    }
}
