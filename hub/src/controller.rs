//! The controller: every change of what the hub knows, each in one transaction.
//!
//! [`Controller`] is the handle that API and link call. Each call runs synchronous code over a [`Change`] on the
//! store's writer, so that the pure [`crate::rollout`] engine, the desired states it asks for and their outbox
//! rows commit together or not at all. [`Controller::run`] is the one loop: it advances rollouts that have news
//! or are due. Deadlines are columns; a crash loses none.
//!
//! | file | what it changes |
//! |---|---|
//! | [`change`] | the transaction at hand and what follows from it |
//! | [`apps`] | apply, plan, undo, delete |
//! | [`analysis`] | what the gates of waves answer that somebody is asked for |
//! | [`rollouts`] | opening, advancing and commanding rollouts |
//! | [`lives`] | rollouts that are kept in memory |
//! | [`membership`] | which device an app selects, and what newcomers get |
//! | [`disruption_budgets`] | disruption budgets, and whom they hold for |
//! | [`leases`] | whose turn it is to switch |
//! | [`images`] | which images go |
//! | [`releases`] | which releases are forgotten |
//! | [`secrets`] | secrets, and the keys of devices |
//! | [`ingest`] | what devices say |
//! | [`preview`] | nothing: what a release would ask of each device |

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use foreshore_images::registry::LoginsError;
use foreshore_protocol::digest::DigestPrefix;
use foreshore_protocol::id::{BudgetName, SecretName};
use foreshore_protocol::message::{Lease, MAX_APPS, MAX_LABELS};
use foreshore_protocol::secret::MAX_BUNDLE_BYTES;
use foreshore_protocol::{AppName, DeviceId, ServiceName};
use rusqlite::Connection;
use tokio::sync::{Notify, watch};

use crate::clock::HubClock;
use crate::rollout::steps::Requirements;
use crate::rollout::{Refused, UnixMs};
use crate::store::{self, Store, StoreError};
use crate::zone::UnknownZone;

mod allowance;
pub mod analysis;
pub mod apps;
pub mod change;
pub mod disruption_budgets;
pub mod explain;
pub mod images;
pub mod ingest;
pub mod leases;
pub mod lives;
pub mod membership;
pub mod preview;
pub mod releases;
pub mod rollouts;
pub mod secrets;

pub use change::{Change, Effects};
use lives::Lives;

/// How often devices send a beacon: 15 minutes.
pub const BEACON_INTERVAL_MS: u32 = 15 * 60_000;

/// A device that was not heard of for so long is not connected, whatever the broker said last: its Will was lost.
const STALE_AFTER_MS: u64 = 2 * BEACON_INTERVAL_MS as u64 + 60_000;

/// How often the loop looks for what no event announces: stale devices, events beyond the bound.
const HOUSEKEEPING: Duration = Duration::from_secs(30);

/// The least time between two rounds of advancing, so that a burst of reports is taken in at once.
const ROUND_MIN: Duration = Duration::from_millis(20);

/// How often releases that nobody needs are looked for.
const RELEASES_EVERY: Duration = Duration::from_secs(3600);

/// How long after it asked a device may begin to switch, unless the hub is configured otherwise: 5 minutes.
pub const LEASE_TTL: Duration = Duration::from_secs(300);

/// How many rollouts of an app are kept, beside its newest completed one.
const KEEP_ROLLOUTS: u64 = 100;

/// Why a change was refused.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// There is no such app.
    #[error("there is no app {0}")]
    UnknownApp(AppName),
    /// There is no such device.
    #[error("there is no device {0}; a device appears when it first connects")]
    UnknownDevice(DeviceId),
    /// There is no such rollout.
    #[error("there is no rollout {0}")]
    UnknownRollout(u64),
    /// The manifest names another app than the path.
    #[error("the path names app {path}, the manifest {manifest}")]
    OtherApp {
        /// In the path.
        path: AppName,
        /// In the manifest.
        manifest: AppName,
    },
    /// The rollout is in a state that does not allow it.
    #[error("{0}")]
    Refused(#[from] Refused),
    /// The rollout's devices wait for no window.
    #[error("rollout {0} has no windows that its devices could wait for")]
    NoWindows(u64),
    /// A window names a time zone that does not exist.
    #[error("the manifest's rollout cannot be carried out: {0}")]
    UnknownZone(#[from] UnknownZone),
    /// The app has no such release that another could be reached from.
    #[error(
        "requiresFrom: app {app} has no release {prefix} that this hub knows of; see `foreshore rollout history {app}`"
    )]
    UnknownRelease {
        /// Whose.
        app: AppName,
        /// As it was written.
        prefix: DigestPrefix,
    },
    /// Several releases of the app begin so.
    #[error(
        "requiresFrom: more than one release of app {app} begins with {prefix}; write more digits"
    )]
    AmbiguousRelease {
        /// Whose.
        app: AppName,
        /// As it was written.
        prefix: DigestPrefix,
    },
    /// The way to a release leads over too many others.
    #[error(
        "requiresFrom: the way to {release} of app {app} leads over more than {} releases; name a release that can be \
         reached from older ones",
        Requirements::MAX_RELEASES
    )]
    TooManySteps {
        /// Whose.
        app: AppName,
        /// Which, short.
        release: String,
    },
    /// Releases can only be reached from each other.
    #[error(
        "requiresFrom: no device could ever get there from outside: the releases on the way to {release} of app {app} can \
         only be reached from each other"
    )]
    NoWay {
        /// Whose.
        app: AppName,
        /// Which, short.
        release: String,
    },
    /// The app is being deleted.
    #[error("app {0} is being deleted; apply it again to keep it")]
    Deleting(AppName),
    /// The app has no rollout to go back from.
    #[error("app {0} has no completed release that could be undone")]
    NothingToUndo(AppName),
    /// The hub has no image of that name.
    #[error("the hub has no image {0}; see `foreshore image list`")]
    UnknownImage(String),
    /// Without the image an app could not be run, gone back to or applied again.
    #[error(
        "image {reference} is used by app {}: its manifest names it, or a release that it is at or can go back to; apply another image or delete the app, and remove it when devices have followed",
        apps.iter().map(AppName::as_str).collect::<Vec<_>>().join(", ")
    )]
    ImageInUse {
        /// `hub.internal/NAME:TAG`.
        reference: String,
        /// By which apps.
        apps: BTreeSet<AppName>,
    },
    /// A device's desired state holds only so many apps.
    #[error(
        "device {0} would be selected by more than {MAX_APPS} apps; narrow a selector, or label the device otherwise"
    )]
    TooManyApps(DeviceId),
    /// Operators give a device only so many labels.
    #[error("device {0} would have more than {MAX_LABELS} labels; remove some first")]
    TooManyLabels(DeviceId),
    /// There is no such secret.
    #[error("there is no secret {0}; see `foreshore secret list`")]
    UnknownSecret(SecretName),
    /// A release names a secret that the hub does not have.
    #[error(
        "service {service} of app {app} needs secret {secret}, which is not set; run `foreshore secret set {secret}` first"
    )]
    SecretNotSet {
        /// Which.
        secret: SecretName,
        /// Of which app.
        app: AppName,
        /// Of which service.
        service: ServiceName,
    },
    /// The value of a variable is text.
    #[error(
        "service {service} of app {app} has secret {secret} in its environment, so it must be UTF-8 without NUL characters"
    )]
    SecretNotText {
        /// Which.
        secret: SecretName,
        /// Of which app.
        app: AppName,
        /// Of which service.
        service: ServiceName,
    },
    /// An app's images are pulled with a secret that the hub does not have.
    #[error(
        "the images of app {app} are pulled with secret {secret}, which is not set; run `foreshore secret set {secret} \
         --from-file config.json` first"
    )]
    PullSecretNotSet {
        /// Which.
        secret: SecretName,
        /// Of which app.
        app: AppName,
    },
    /// A secret that images are pulled with holds logins.
    #[error(
        "the images of app {app} are pulled with secret {secret}, so it must be a docker config.json: {problem}"
    )]
    PullSecretNotLogins {
        /// Which.
        secret: SecretName,
        /// Of which app.
        app: AppName,
        /// What is wrong with it; nothing of its content.
        problem: LoginsError,
    },
    /// An analysis asks a host that the hub is not configured to ask.
    #[error(
        "analysis {analysis} of app {app} asks {host}, which the hub may not; whoever runs the hub allows it in hub.toml: \
         [analysis] hosts = [\"{host}\"]"
    )]
    AnalysisHost {
        /// Which.
        analysis: String,
        /// Of which app.
        app: AppName,
        /// `HOST:PORT`.
        host: String,
    },
    /// An analysis sends a secret that the hub does not have, or that cannot be sent.
    #[error(
        "analysis {analysis} of app {app} sends secret {secret}, which is not set or is no token; run `foreshore secret set \
         {secret}` first"
    )]
    AnalysisSecret {
        /// Which.
        secret: SecretName,
        /// Of which analysis.
        analysis: String,
        /// Of which app.
        app: AppName,
    },
    /// A device is sent only so much.
    #[error(
        "the secrets of app {0} have more than {MAX_BUNDLE_BYTES} bytes together; share fewer or smaller ones"
    )]
    SecretsTooLarge(AppName),
    /// Without the secret an app could not be run, gone back to or applied again.
    #[error(
        "secret {secret} is used by app {}: its manifest names it, or a release that it is at or can go back to; apply \
         without it or delete the app, and remove it when devices have followed",
        apps.iter().map(AppName::as_str).collect::<Vec<_>>().join(", ")
    )]
    SecretInUse {
        /// Which.
        secret: SecretName,
        /// By which apps.
        apps: BTreeSet<AppName>,
    },
    /// A device that never showed a key.
    #[error(
        "device {0} has shown no key yet; it does when it next connects with an agent that can have secrets"
    )]
    NoKey(DeviceId),
    /// There is no such disruption budget.
    #[error("there is no disruption budget {0}; see `foreshore get budgets`")]
    UnknownBudget(BudgetName),
    /// The manifest names another budget than the path.
    #[error("the path names disruption budget {path}, the manifest {manifest}")]
    OtherBudget {
        /// In the path.
        path: BudgetName,
        /// In the manifest.
        manifest: BudgetName,
    },
    /// A hub has only so many budgets.
    #[error(
        "there are {max} disruption budgets already, and a hub has no more; delete one first, or let one budget \
         group by more labels",
        max = disruption_budgets::MAX_BUDGETS
    )]
    TooManyBudgets,
    /// The device holds no slot.
    #[error("device {0} holds no place in a disruption budget; see `foreshore lease list`")]
    NoLease(DeviceId),
    /// A connected device would come back at once.
    #[error("device {0} is connected; stop its agent first, or it comes back at once")]
    Connected(DeviceId),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl From<rusqlite::Error> for ControlError {
    fn from(error: rusqlite::Error) -> Self {
        Self::Store(error.into())
    }
}

/// What is known of the hub's own link to the broker.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Listening {
    /// Since when the hub hears the broker without a break; `None`: it does not.
    pub since: Option<UnixMs>,
    /// How long devices may need from then on to be heard again, in milliseconds.
    pub settle_ms: u64,
}

/// The handle to the controller. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Controller {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    store: Store,
    clock: HubClock,
    listening: Mutex<Listening>,
    /// Used by changes alone, and these come one after the other.
    lives: Mutex<Lives>,
    dirty: Mutex<BTreeSet<AppName>>,
    /// Leases that devices are to be sent. One that is lost is not missed: its device asks again.
    leases: Mutex<BTreeMap<(DeviceId, AppName), Lease>>,
    lease_ttl_ms: u64,
    news: Notify,
    publish: Notify,
    send_leases: Notify,
    ask: Notify,
    events: watch::Sender<()>,
}

impl Controller {
    /// A controller over a store. Nothing moves until [`Self::run`].
    #[must_use]
    pub fn new(store: Store, clock: HubClock) -> Self {
        Self::with_lease_ttl(store, clock, LEASE_TTL)
    }

    /// One that gives devices this long to begin to switch, from when they ask.
    #[must_use]
    pub fn with_lease_ttl(store: Store, clock: HubClock, lease_ttl: Duration) -> Self {
        Self {
            inner: Arc::new(Inner {
                store,
                clock,
                listening: Mutex::default(),
                lives: Mutex::default(),
                dirty: Mutex::default(),
                leases: Mutex::default(),
                lease_ttl_ms: u64::try_from(lease_ttl.as_millis()).unwrap_or(u64::MAX),
                news: Notify::new(),
                publish: Notify::new(),
                send_leases: Notify::new(),
                ask: Notify::new(),
                events: watch::Sender::new(()),
            }),
        }
    }

    /// The store, for reading.
    #[must_use]
    pub fn store(&self) -> &Store {
        &self.inner.store
    }

    /// The hub's time.
    #[must_use]
    pub fn now(&self) -> UnixMs {
        self.inner.clock.now()
    }

    /// Wakes once when something waits in the outbox.
    pub async fn outbox_news(&self) {
        self.inner.publish.notified().await;
    }

    /// Takes the leases that devices are to be sent.
    #[must_use]
    pub fn take_leases(&self) -> Vec<(DeviceId, Lease)> {
        let leases = std::mem::take(&mut *lock(&self.inner.leases)).into_iter();
        leases.map(|((device, _), lease)| (device, lease)).collect()
    }

    /// Wakes once when there are leases to send.
    pub async fn lease_news(&self) {
        self.inner.send_leases.notified().await;
    }

    /// Wakes once when it may be time to ask an analysis.
    pub async fn analysis_news(&self) {
        self.inner.ask.notified().await;
    }

    /// Changes whenever an event was recorded.
    #[must_use]
    pub fn event_news(&self) -> watch::Receiver<()> {
        self.inner.events.subscribe()
    }

    /// Whether the hub hears the broker.
    #[must_use]
    pub fn listening(&self) -> Listening {
        *lock(&self.inner.listening)
    }

    /// Tells whether the hub hears the broker; live rollouts look again.
    pub fn set_listening(&self, listening: Listening) {
        *lock(&self.inner.listening) = listening;
        self.touch_live();
    }

    fn touch_live(&self) {
        let controller = self.clone();
        tokio::spawn(async move {
            let live = controller
                .inner
                .store
                .read(|connection| Ok::<_, StoreError>(store::rollout::live_apps(connection)?));
            match live.await {
                Ok(apps) => controller.touch(apps),
                Err(error) => tracing::warn!(%error, "failed to list the live rollouts"),
            }
        });
    }

    fn touch(&self, apps: impl IntoIterator<Item = AppName>) {
        let mut dirty = lock(&self.inner.dirty);
        dirty.extend(apps);
        if !dirty.is_empty() {
            self.inner.news.notify_one();
        }
    }

    /// Runs `work` in one transaction, and after its commit tells everybody concerned.
    ///
    /// # Errors
    ///
    /// What `work` returns; then nothing of it happened.
    ///
    /// # Cancel safety
    ///
    /// The change happens or not regardless of whether the future is dropped; the loop and the publisher
    /// learn of it at the latest by their own clocks.
    pub async fn change<T, F>(&self, work: F) -> Result<T, ControlError>
    where
        F: FnOnce(&mut Change<'_>) -> Result<T, ControlError> + Send + 'static,
        T: Send + 'static,
    {
        let (now, listening) = (self.now(), self.listening());
        let controller = self.clone();
        let run = move |connection: &Connection| {
            let inner = &controller.inner;
            let mut lives = lock(&inner.lives);
            lives.begin(inner.store.undone());
            let mut change = Change {
                connection,
                now,
                listening,
                lives: &mut lives,
                effects: Effects::default(),
            };
            let done = work(&mut change).map(|value| (value, change.effects));
            let done = done.and_then(|done| {
                check_kept(&mut lives, connection)?;
                Ok(done)
            });
            if done.is_err() {
                lives.fail();
            }
            done
        };
        let (value, effects) = self.inner.store.write::<_, ControlError, _>(run).await?;
        self.follow(effects);
        Ok(value)
    }

    fn follow(&self, effects: Effects) {
        if effects.publish {
            self.inner.publish.notify_one();
        }
        if effects.events {
            self.inner.events.send_replace(());
        }
        if !effects.leases.is_empty() {
            let leases = effects.leases.into_iter();
            let keyed = leases.map(|(device, lease)| ((device, lease.app.clone()), lease));
            lock(&self.inner.leases).extend(keyed);
            self.inner.send_leases.notify_one();
        }
        if effects.analysis {
            self.inner.ask.notify_one();
        }
        if effects.turns {
            self.inner.news.notify_one();
        }
        self.touch(effects.dirty);
    }

    /// Advances rollouts that have news or are due, until the future is dropped.
    pub async fn run(&self) {
        self.touch_live();
        let mut housekeeping = Instant::now();
        let mut releases = None;
        loop {
            let begun = Instant::now();
            let next = match self.round().await {
                Ok(next) => next,
                Err(error) => {
                    tracing::error!(
                        error = &error as &dyn std::error::Error,
                        "failed to advance the rollouts"
                    );
                    None
                }
            };
            if housekeeping.elapsed() >= HOUSEKEEPING {
                housekeeping = Instant::now();
                self.keep_house().await;
                if releases.is_none_or(|last: Instant| last.elapsed() >= RELEASES_EVERY) {
                    releases = Some(Instant::now());
                    self.forget_releases().await;
                }
            }
            // Half of the writer's time at most goes into advancing, however large the fleet.
            tokio::time::sleep(begun.elapsed().max(ROUND_MIN)).await;
            let due = next.map_or(HOUSEKEEPING, |next| {
                Duration::from_millis(next.since(self.now()))
            });
            tokio::select! {
                () = self.inner.news.notified() => {}
                () = tokio::time::sleep(due.min(HOUSEKEEPING)) => {}
            }
        }
    }

    /// Advances what is dirty or due now; when the next rollout is due.
    ///
    /// # Errors
    ///
    /// When the store fails; what was dirty stays so.
    pub async fn round(&self) -> Result<Option<UnixMs>, ControlError> {
        let dirty = std::mem::take(&mut *lock(&self.inner.dirty));
        let again = dirty.clone();
        let apps = self.change(move |change| {
            // Also if no rollout is looked at: notes must not pile up.
            change.lives.sync(change.connection)?;
            let (due, _) = store::rollout::due(change.connection, change.now)?;
            let apps: BTreeSet<AppName> = dirty.into_iter().chain(due).collect();
            Ok(store::rollout::by_precedence(change.connection, apps)?)
        });
        let apps = apps
            .await
            .inspect_err(|_| lock(&self.inner.dirty).extend(again))?;
        let mut failed = false;
        for app in apps {
            // Each in its own transaction: one that cannot be advanced stops no other app.
            let name = app.clone();
            let advanced = self.change(move |change| rollouts::advance_newest(change, &name));
            if let Err(error) = advanced.await {
                tracing::error!(
                    app = app.as_str(),
                    error = &error as &dyn std::error::Error,
                    "failed to advance the rollout"
                );
                lock(&self.inner.dirty).insert(app);
                failed = true;
            }
        }
        let ttl_ms = self.inner.lease_ttl_ms;
        let decided = self.change(move |change| Ok(leases::decide(change, ttl_ms)?));
        if let Err(error) = decided.await {
            tracing::error!(
                error = &error as &dyn std::error::Error,
                "failed to decide whose turn it is to switch"
            );
        }
        if failed {
            // Not at once: what failed is likely to fail again.
            return Ok(None);
        }
        // What became due meanwhile, or left something for the next look, is not to be slept over.
        let next = self.change(|change| {
            let (due, next) = store::rollout::due(change.connection, change.now)?;
            Ok(if due.is_empty() {
                next
            } else {
                Some(change.now)
            })
        });
        next.await
    }

    async fn forget_releases(&self) {
        let find =
            |connection: &Connection| Ok::<_, ControlError>(releases::Expired::find(connection)?);
        let forgotten = async {
            let expired = self.inner.store.read(find).await?;
            if expired.is_empty() {
                return Ok(0);
            }
            self.change(move |change| releases::forget(change, &expired))
                .await
        };
        match forgotten.await {
            Ok(0) => {}
            Ok(releases) => tracing::info!(releases, "forgot releases that nobody needs"),
            Err(error) => tracing::warn!(
                error = &error as &dyn std::error::Error,
                "failed to forget releases"
            ),
        }
    }

    async fn keep_house(&self) {
        let kept = self.change(|change| {
            let before = UnixMs(change.now.0.saturating_sub(STALE_AFTER_MS));
            let listened = change.listening.since.is_some_and(|since| since <= before);
            let stale = if listened {
                store::device::mark_stale(change.connection, before)?
            } else {
                Vec::new()
            };
            for device in &stale {
                change
                    .event("device-offline")
                    .device(device)
                    .record("it was not heard of for half an hour")?;
            }
            if !stale.is_empty() {
                change.touch_live()?;
            }
            leases::keep_house(change)?;
            change.lives.tidy();
            let since = UnixMs(change.now.0.saturating_sub(store::event::KEEP_MS));
            store::event::prune(change.connection, store::event::KEEP, since)?;
            for app in store::app::list(change.connection)? {
                store::rollout::prune(change.connection, app.name(), KEEP_ROLLOUTS)?;
            }
            change.connection.execute(
                "UPDATE meta SET value = max(value, ?1) WHERE key = 'latest_ms'",
                [change.now.0],
            )?;
            Ok(())
        });
        if let Err(error) = kept.await {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "failed to tidy up the store"
            );
        }
    }
}

/// In debug builds, what is kept of small fleets in memory is compared with what is stored, after every change.
fn check_kept(lives: &mut Lives, connection: &Connection) -> rusqlite::Result<()> {
    const SMALL: usize = 50;
    if cfg!(debug_assertions) && lives.devices() <= SMALL {
        let wrong = lives.discrepancy(connection)?;
        assert!(wrong.is_none(), "{}", wrong.unwrap_or_default());
    }
    Ok(())
}

/// A panic while one of these small locks is held leaves nothing half-done in it.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
