//! The one loop of the agent: an event comes, it is taken note of, a plan is made, its steps are begun.
//!
//! ```text
//!   link ───────Incoming──┐
//!   steps that ended ─────┤
//!   probes ───────────────┼─> Event ─> handle ─> turn: list, plan, store, begin steps ─> report
//!   containers that ended ┤
//!   timers, signals ──────┘
//! ```
//!
//! Steps run beside the loop, at most one for each service, so a slow stop or pull never keeps it from a
//! newer head. What the planner decided is on disk before a step of that plan begins. Losing the hub changes
//! nothing here: the link is one of the sources of events.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::Duration;

use foreshore_protocol::message::{
    AppStatus, Command, Event as Happening, EventKind, Head, HubInfo, ServiceState,
};
use foreshore_protocol::release::{Release, ReleaseError};
use foreshore_protocol::{AppName, Digest, ServiceName, Version};
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::Instant;

use crate::clock;
use crate::config::Config;
use crate::execute::{Task, Tools, chain, execute};
use crate::inventory;
use crate::link::{Birth, Incoming, Link, Outgoing, Receipt};
use crate::plan::{
    self, BootId, BootMs, Busy, Desired, History, Notice, Observed, ObservedContainer, Outcome,
    Plan, Step,
};
use crate::runtime::{Container, ContainerId, ContainerState, Runtime};
use crate::state::{AcceptError, Loaded, Outbox, State};
use crate::status::{self, ContainerLine, Published};

mod probes;
mod uplink;

use probes::Probes;
use uplink::{Gauges, Uplink};

/// After connecting, heads are collected for this long and only the newest is taken: a broker may hand over
/// all that a session missed.
const SETTLE: Duration = Duration::from_millis(300);

/// How long after connecting that holds; later heads are taken at once.
const SETTLING: Duration = Duration::from_secs(2);

/// After the disk or the runtime failed, everything is tried again after this.
const RETRY: Duration = Duration::from_secs(5);

/// How often to send a beacon before the hub says otherwise.
const BEACON_INTERVAL: Duration = Duration::from_mins(15);

/// What the hub may ask for.
const BEACON_RANGE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_hours(24));

/// How long a goodbye to the broker may take.
const GOODBYE: Duration = Duration::from_secs(3);

/// The text of an event has at most this many bytes.
const MESSAGE_BYTES_MAX: usize = 512;

/// What wakes the loop.
#[derive(Debug)]
enum Event {
    Link(Incoming),
    LinkGone,
    Done(Ended),
    Probe,
    Containers,
    Timer,
    Stop,
}

/// A step that came to its end.
#[derive(Debug)]
struct Ended {
    work: Work,
    outcome: Outcome,
}

/// What a step under way keeps busy.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Work {
    Service(AppName, ServiceName),
    Staging(Digest),
    Collecting,
}

/// Heads that arrived and are not accepted yet.
#[derive(Debug)]
struct Offered {
    head: Head,
    receipts: Vec<Receipt>,
    due: Instant,
}

/// What the birth says, shared with the link's task.
#[derive(Debug, Clone)]
pub struct Memory {
    state: Rc<RefCell<State>>,
    seen: Rc<Cell<(Option<Version>, u64)>>,
}

impl Memory {
    /// Takes the state over.
    #[must_use]
    pub fn new(state: State) -> Self {
        Self {
            state: Rc::new(RefCell::new(state)),
            seen: Rc::new(Cell::new((None, 0))),
        }
    }

    /// What to say at the birth of a new connection.
    #[must_use]
    pub fn birth(&self) -> Birth {
        let (session, stored) = self.state.borrow_mut().next_session();
        if let Err(error) = stored {
            tracing::warn!(error = chain(&error), "the session's number was not stored");
        }
        let (version, reported_seq) = self.seen.get();
        Birth {
            session,
            boot: self.state.borrow().boot(),
            version,
            reported_seq,
        }
    }
}

/// What an [`Agent`] is made of.
#[derive(Debug)]
pub struct Parts<R> {
    /// The configuration.
    pub config: Config,
    /// What steps are done with.
    pub tools: Tools<R>,
    /// The state directory, and what was found in it.
    pub memory: Memory,
    /// As found by [`State::open`].
    pub loaded: Loaded,
    /// The way to the hub.
    pub link: Link,
    /// This life of the kernel.
    pub boot: BootId,
}

/// The agent: owner of everything that the loop needs.
#[derive(Debug)]
pub struct Agent<R> {
    config: Config,
    tools: Tools<R>,
    memory: Memory,
    uplink: Uplink,
    boot: BootId,
    watching_since: BootMs,
    head: Option<Head>,
    history: History,
    /// The history as it is on disk.
    stored: History,
    outbox: Outbox,
    releases: BTreeMap<Digest, Release>,
    images: BTreeSet<Digest>,
    busy: Busy,
    tasks: JoinSet<Ended>,
    staging: Option<(Digest, AbortHandle)>,
    probes: Probes,
    fetching: BTreeSet<Digest>,
    offered: Option<Offered>,
    connected_at: Option<Instant>,
    /// Why there is no connection, once that was told: whether the broker refused us.
    offline: Option<bool>,
    wake_at: Option<Instant>,
    said: Option<Published>,
    disk_trouble: bool,
    list_trouble: bool,
}

impl<R: Runtime + 'static> Agent<R> {
    /// An agent that has not begun.
    #[must_use]
    pub fn new(parts: Parts<R>) -> Self {
        let boot_count = parts.memory.state.borrow().boot();
        let interval = parts.config.hub.report_interval();
        Self {
            uplink: Uplink::new(parts.link, boot_count, interval, BEACON_INTERVAL),
            config: parts.config,
            tools: parts.tools,
            memory: parts.memory,
            boot: parts.boot,
            watching_since: clock::boot_ms(),
            head: parts.loaded.head,
            stored: parts.loaded.history.clone(),
            history: parts.loaded.history,
            outbox: parts.loaded.outbox,
            releases: parts.loaded.releases,
            images: BTreeSet::new(),
            busy: Busy::default(),
            tasks: JoinSet::new(),
            staging: None,
            probes: Probes::new(),
            fetching: BTreeSet::new(),
            offered: None,
            connected_at: None,
            offline: None,
            wake_at: None,
            said: None,
            disk_trouble: false,
            list_trouble: false,
        }
        .noting(parts.loaded.damage)
    }

    fn noting(mut self, damage: Vec<String>) -> Self {
        self.event(
            EventKind::AgentStarted,
            None,
            None,
            format!("agent {} started", env!("CARGO_PKG_VERSION")),
        );
        for what in damage {
            tracing::warn!(what, "damaged state was set aside");
            self.event(EventKind::StateCorrupt, None, None, what);
        }
        self
    }

    /// Runs until `stop` is ready, then says goodbye to the broker. Containers keep running. Must be called
    /// on a [`tokio::task::LocalSet`].
    pub async fn run(
        mut self,
        mut incoming: mpsc::Receiver<Incoming>,
        stop: impl Future<Output = ()>,
    ) {
        let mut stop = std::pin::pin!(stop);
        self.look_at_images();
        self.greet_containers().await;
        self.turn().await;
        loop {
            self.flush();
            let event = self.next(&mut incoming, &mut stop).await;
            let mut plan = self.handle(event);
            // What else is there already is one plan's worth.
            while let Ok(message) = incoming.try_recv() {
                plan |= self.handle(Event::Link(message));
            }
            while let Some(Ok(ended)) = self.tasks.try_join_next() {
                plan |= self.handle(Event::Done(ended));
            }
            match plan {
                Next::Plan => self.turn().await,
                Next::Nothing => {}
                Next::Stop => break,
            }
        }
        self.say_goodbye(&mut incoming).await;
    }

    /// Waits for the next event.
    async fn next(
        &mut self,
        incoming: &mut mpsc::Receiver<Incoming>,
        stop: &mut (impl Future<Output = ()> + Unpin),
    ) -> Event {
        let offered = self.offered.as_ref().map(|offered| offered.due);
        let wake_at = [self.wake_at, offered, self.uplink.wake_at()]
            .into_iter()
            .flatten()
            .min();
        let timer = async {
            match wake_at {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        // Cancel safe, all: channels and the join set lose nothing, `changed` promises it, the timer and
        // `stop` are asked again.
        tokio::select! {
            biased;
            () = stop => Event::Stop,
            message = incoming.recv() => message.map_or(Event::LinkGone, Event::Link),
            Some(ended) = self.tasks.join_next(), if !self.tasks.is_empty() => match ended {
                Ok(ended) => Event::Done(ended),
                // Abandoned.
                Err(error) if error.is_cancelled() => Event::Timer,
                // What is left of it is found again by the agent that comes after.
                Err(error) => std::panic::resume_unwind(error.into_panic()),
            },
            () = self.probes.changed() => Event::Probe,
            () = self.tools.runtime.changed() => Event::Containers,
            () = timer => Event::Timer,
        }
    }

    fn handle(&mut self, event: Event) -> Next {
        match event {
            Event::Link(message) => self.handle_link(message),
            Event::LinkGone | Event::Stop => Next::Stop,
            Event::Done(ended) => {
                self.handle_end(&ended);
                Next::Plan
            }
            Event::Probe | Event::Containers => Next::Plan,
            Event::Timer => {
                let now = Instant::now();
                let accepted = self.accept_offered(now);
                let due = self.wake_at.is_some_and(|at| now >= at);
                if due || accepted {
                    Next::Plan
                } else {
                    Next::Nothing
                }
            }
        }
    }

    fn handle_link(&mut self, message: Incoming) -> Next {
        match message {
            Incoming::Connected => self.handle_connected(),
            Incoming::Disconnected { why, refused } => self.handle_disconnected(&why, refused),
            Incoming::Head(head, receipt) => return self.handle_head(head, receipt),
            Incoming::Command(Command::Ack { event, reported }) => {
                let stored = self.outbox.acknowledge(event);
                self.note_disk(stored);
                self.uplink.acknowledged(reported);
            }
            Incoming::Command(Command::Resync) => self.uplink.resync(),
            Incoming::Hub(info) => self.handle_hub(&info),
            Incoming::Release(digest, bytes) => return self.handle_release(digest, &bytes),
            Incoming::Unreadable { topic, why } => {
                tracing::warn!(topic, why, "a message from the hub was not understood");
            }
            Incoming::Closed => {}
        }
        Next::Nothing
    }

    fn handle_connected(&mut self) {
        tracing::info!(
            host = self.config.hub.broker.host,
            port = self.config.hub.broker.port,
            "connected to the hub's broker"
        );
        self.offline = None;
        self.connected_at = Some(Instant::now());
        self.uplink.connected();
        for release in &self.fetching {
            let _asked_again_after_reconnecting = self.uplink.send(Outgoing::Fetch(*release));
        }
    }

    fn handle_disconnected(&mut self, why: &str, refused: bool) {
        let was_connected = self.connected_at.take().is_some();
        // Receipts of a connection that is gone are worth nothing; the heads come again.
        self.uplink.disconnected();
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
        let asked = Duration::from_millis(info.beacon_interval_ms.into());
        self.uplink
            .set_beacon_interval(asked.clamp(BEACON_RANGE.0, BEACON_RANGE.1));
    }

    fn handle_head(&mut self, head: Head, receipt: Receipt) -> Next {
        let known = self.head.as_ref().map(|head| head.version);
        if known.is_some_and(|known| head.version <= known) {
            let _sent_again_if_lost = self.uplink.send(Outgoing::Accepted(receipt));
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
    fn accept_offered(&mut self, now: Instant) -> bool {
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
                self.note_disk(Err(error));
                self.offered = Some(Offered {
                    due: now + RETRY,
                    ..offered
                });
                return false;
            }
        };
        for receipt in offered.receipts {
            let _sent_again_if_lost = self.uplink.send(Outgoing::Accepted(receipt));
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

    fn handle_release(&mut self, digest: Digest, bytes: &[u8]) -> Next {
        if !self.fetching.remove(&digest) {
            return Next::Nothing;
        }
        let _harmless_if_lost = self.uplink.send(Outgoing::Fetched(digest));
        match Release::from_bytes(bytes, &digest) {
            Ok(release) => {
                let stored = self.memory.state.borrow().store_release(&digest, bytes);
                if self.note_disk(stored) {
                    self.releases.insert(digest, release);
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

    fn handle_end(&mut self, ended: &Ended) {
        match &ended.work {
            Work::Service(app, service) => {
                self.busy.services.remove(&(app.clone(), service.clone()));
            }
            Work::Staging(release) => {
                if self.busy.staging == Some(*release) {
                    self.busy.staging = None;
                    self.staging = None;
                }
                self.look_at_images();
            }
            Work::Collecting => {
                self.busy.collecting = false;
                self.look_at_images();
            }
        }
        self.tell(&ended.outcome);
        self.record(&ended.outcome);
    }

    fn record(&mut self, outcome: &Outcome) {
        self.history.record(outcome, clock::now(self.boot));
    }

    /// Logs an outcome and makes it an event.
    fn tell(&mut self, outcome: &Outcome) {
        let of = |id: &ContainerId| (Some(id.app.clone()), Some(id.service.clone()));
        match outcome {
            Outcome::Staged { release } => {
                let message = format!("all images of release {} are here", release.short());
                self.event(EventKind::ImageStaged, None, None, message);
            }
            Outcome::StagingFailed { release, reason } => {
                let message = format!("release {}: {}", release.short(), reason.message);
                self.event(EventKind::StagingFailed, None, None, message);
            }
            Outcome::Started { id } => {
                let (app, service) = of(id);
                self.event(
                    EventKind::Started,
                    app,
                    service,
                    format!("container {id} started"),
                );
            }
            Outcome::StartFailed { id, message, .. } => {
                let (app, service) = of(id);
                let message = format!("container {id} did not start: {message}");
                self.event(EventKind::Exited, app, service, message);
            }
            Outcome::Removed { id } => {
                let (app, service) = of(id);
                self.event(
                    EventKind::Removed,
                    app,
                    service,
                    format!("container {id} removed"),
                );
            }
            Outcome::Stuck { id, message } => {
                tracing::error!(container = %id, message, "a container could not be stopped or removed");
            }
            Outcome::Stopped { .. } | Outcome::Collected | Outcome::BadRelease { .. } => {}
        }
    }

    fn event(
        &mut self,
        kind: EventKind,
        app: Option<AppName>,
        service: Option<ServiceName>,
        mut message: String,
    ) {
        message.truncate(message.floor_char_boundary(MESSAGE_BYTES_MAX));
        tracing::info!(
            kind = ?kind,
            app = app.as_ref().map(AppName::as_str),
            service = service.as_ref().map(ServiceName::as_str),
            "{message}"
        );
        let boot = self.memory.state.borrow().boot();
        let stored = self.outbox.push(Happening {
            seq: 0,
            boot,
            unix_ms: clock::unix_ms(),
            app,
            service,
            kind,
            message,
        });
        self.note_disk(stored);
    }

    /// Logs disk trouble when it begins and when it ends. True when there was none.
    fn note_disk(&mut self, result: Result<(), crate::state::FileError>) -> bool {
        match result {
            Ok(()) => {
                if std::mem::take(&mut self.disk_trouble) {
                    tracing::info!("state can be written again");
                }
                true
            }
            Err(error) => {
                if !std::mem::replace(&mut self.disk_trouble, true) {
                    tracing::error!(
                        error = chain(&error),
                        "state cannot be written; what runs keeps running"
                    );
                }
                false
            }
        }
    }

    fn look_at_images(&mut self) {
        match self.tools.images.list() {
            Ok(images) => self.images = images.into_iter().map(|image| image.digest).collect(),
            Err(error) => tracing::error!(error = chain(&error), "images cannot be listed"),
        }
    }

    /// Takes over the containers that outlived the agent before.
    async fn greet_containers(&mut self) {
        let Ok(containers) = self.tools.runtime.list().await else {
            return;
        };
        for container in containers {
            if let ContainerState::Running { .. } = container.state {
                let id = &container.id;
                let message = format!("container {id} was running and is taken over");
                let (app, service) = (id.app.clone(), id.service.clone());
                self.event(EventKind::Adopted, Some(app), Some(service), message);
            }
        }
    }

    /// Looks, plans, stores and begins the steps.
    async fn turn(&mut self) {
        let containers = match self.tools.runtime.list().await {
            Ok(containers) => {
                self.list_trouble = false;
                containers
            }
            Err(error) => {
                if !std::mem::replace(&mut self.list_trouble, true) {
                    tracing::error!(error = chain(&error), "containers cannot be listed");
                }
                self.wake_at = Some(Instant::now() + RETRY);
                return;
            }
        };
        self.probes
            .follow(&self.tools.runtime, &containers, &self.releases);
        let lines = containers.iter().map(ContainerLine::from).collect();
        let observed = self.observe(containers);
        let desired = self.head.as_ref().map(Desired::from).unwrap_or_default();
        let now = clock::now(self.boot);
        let plan = plan::plan(&desired, &observed, &self.history, now);
        debug_assert_eq!(plan::check::check(&observed, &self.history, &plan), vec![]);
        self.carry_out(plan, lines, now.ms);
    }

    fn observe(&self, containers: Vec<Container>) -> Observed {
        Observed {
            watching_since: self.watching_since,
            containers: containers
                .into_iter()
                .map(|container| ObservedContainer {
                    probe: self.probes.state(&container.id),
                    container,
                })
                .collect(),
            releases: self.releases.clone(),
            images: self.images.clone(),
            busy: self.busy.clone(),
        }
    }

    fn carry_out(&mut self, plan: Plan, containers: Vec<ContainerLine>, now: BootMs) {
        self.wake_at = plan
            .wake_at
            .map(|at| Instant::now() + Duration::from_millis(at.since(now)));
        self.history = plan.history;
        let stored = self.memory.state.borrow_mut().remember(&self.history);
        let may = if self.note_disk(stored) {
            self.stored.clone_from(&self.history);
            May::All
        } else {
            let retry = Instant::now() + RETRY;
            self.wake_at = Some(self.wake_at.map_or(retry, |at| at.min(retry)));
            May::Heal
        };
        for Notice {
            kind,
            app,
            service,
            message,
        } in plan.notices
        {
            self.event(kind, app, service, message);
        }
        self.fetch(plan.fetch);
        self.tell_status(plan.status, containers);
        for step in plan.steps {
            if may == May::All || self.is_healing(&step) {
                self.begin(step);
            }
        }
    }

    /// Whether a step rests on no decision that is not on disk yet: a full disk must not keep a service down.
    fn is_healing(&self, step: &Step) -> bool {
        let app = match step {
            Step::Stage { .. } => return false,
            Step::AbandonStaging { .. } | Step::Collect { .. } => return true,
            Step::Stop { id, .. } | Step::Remove { id } | Step::Start { id, .. } => &id.app,
        };
        let decided = |history: &History| {
            history.apps.get(app).map(|app| {
                (
                    app.current,
                    app.trial.as_ref().map(|trial| (trial.since, trial.release)),
                    app.poisoned.clone(),
                )
            })
        };
        decided(&self.stored) == decided(&self.history)
    }

    fn begin(&mut self, step: Step) {
        tracing::debug!(?step, "begin");
        let service = |id: &ContainerId| Work::Service(id.app.clone(), id.service.clone());
        let (work, task) = match step {
            Step::Stage {
                release, images, ..
            } => (Work::Staging(release), Task::Stage { release, images }),
            Step::AbandonStaging { release } => return self.abandon_staging(release),
            Step::Stop {
                id,
                signal,
                grace_ms,
            } => {
                let grace = Duration::from_millis(grace_ms);
                (service(&id), Task::Stop { id, signal, grace })
            }
            Step::Remove { id } => (service(&id), Task::Remove { id }),
            Step::Start { id, release } => {
                let wanted = self
                    .releases
                    .get(&release)
                    .and_then(|release| release.services.get(&id.service))
                    .cloned()
                    .expect("a plan starts services of releases on disk only");
                let task = Task::Start {
                    release,
                    service: Box::new(wanted),
                    id: id.clone(),
                };
                (service(&id), task)
            }
            Step::Collect {
                keep_images,
                keep_releases,
            } => {
                self.collect_releases(&keep_releases);
                (Work::Collecting, Task::Collect { keep: keep_images })
            }
        };
        match &work {
            Work::Service(app, service) => {
                self.busy.services.insert((app.clone(), service.clone()));
            }
            Work::Staging(release) => self.busy.staging = Some(*release),
            Work::Collecting => self.busy.collecting = true,
        }
        let tools = self.tools.clone();
        let handle = self.tasks.spawn_local({
            let work = work.clone();
            async move {
                let outcome = execute(&tools, task).await;
                Ended { work, outcome }
            }
        });
        if let Work::Staging(release) = work {
            self.staging = Some((release, handle));
        }
    }

    /// The child is killed when its task is dropped.
    fn abandon_staging(&mut self, release: Digest) {
        if let Some((_, handle)) = self.staging.take_if(|(staging, _)| *staging == release) {
            handle.abort();
        }
        self.busy.staging = None;
        self.wake_at = Some(Instant::now());
    }

    fn collect_releases(&mut self, keep: &BTreeSet<Digest>) {
        let removed = self
            .memory
            .state
            .borrow()
            .remove_releases(self.releases.keys(), keep);
        if self.note_disk(removed) {
            self.releases.retain(|release, _| keep.contains(release));
        }
    }

    fn fetch(&mut self, wanted: BTreeSet<Digest>) {
        for release in self.fetching.difference(&wanted) {
            let _harmless_if_lost = self.uplink.send(Outgoing::Fetched(*release));
        }
        for release in wanted.difference(&self.fetching) {
            let _asked_again_after_reconnecting = self.uplink.send(Outgoing::Fetch(*release));
        }
        self.fetching = wanted;
    }

    fn tell_status(&mut self, status: Vec<AppStatus>, containers: Vec<ContainerLine>) {
        let version = self.head.as_ref().map(|head| head.version);
        let before = self.said.as_ref().map_or(&[][..], |said| &said.apps);
        for (app, service, ready) in readiness_changes(before, &status) {
            let (kind, word) = if ready {
                (EventKind::Ready, "is ready")
            } else {
                (EventKind::NotReady, "is not ready any more")
            };
            let message = format!("service {service} of app {app} {word}");
            self.event(kind, Some(app), Some(service), message);
        }
        let said = Published {
            version,
            apps: status.clone(),
            containers,
        };
        if self.said.as_ref() != Some(&said) {
            status::publish(&self.config.paths.run, &said);
            self.said = Some(said);
        }
        self.uplink.set_status(version, status);
    }

    fn flush(&mut self) {
        let config = &self.config;
        self.uplink.flush(
            &self.outbox,
            || inventory::inventory(&config.paths.state, &config.labels),
            || Gauges {
                memory_mib: inventory::containers_memory_mib(&config.cgroup.parent),
                load_centi: inventory::load_centi(),
            },
        );
        let version = self.head.as_ref().map(|head| head.version);
        self.memory.seen.set((version, self.uplink.seq()));
    }

    /// Ends the session, so that the hub learns at once that we are off. Steps under way are cut.
    async fn say_goodbye(&mut self, incoming: &mut mpsc::Receiver<Incoming>) {
        tracing::info!("stopping; containers keep running");
        self.tasks.abort_all();
        if !self.uplink.send(Outgoing::Close) {
            return;
        }
        let closed = async {
            while let Some(message) = incoming.recv().await {
                if matches!(message, Incoming::Closed) {
                    return;
                }
            }
        };
        if tokio::time::timeout(GOODBYE, closed).await.is_err() {
            tracing::info!("the broker did not hear our goodbye; it will notice by itself");
        }
    }
}

/// What an event asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Next {
    Nothing,
    Plan,
    Stop,
}

impl std::ops::BitOrAssign for Next {
    fn bitor_assign(&mut self, other: Self) {
        *self = (*self).max(other);
    }
}

/// Which steps may begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum May {
    All,
    Heal,
}

/// Services that became ready or ceased to be.
fn readiness_changes(
    before: &[AppStatus],
    after: &[AppStatus],
) -> Vec<(AppName, ServiceName, bool)> {
    let ready: BTreeMap<(&AppName, &ServiceName), bool> = before
        .iter()
        .flat_map(|app| {
            app.services
                .iter()
                .map(|service| ((&app.app, &service.service), service.ready))
        })
        .collect();
    after
        .iter()
        .flat_map(|app| app.services.iter().map(move |service| (&app.app, service)))
        .filter(|(app, service)| {
            let was = ready.get(&(*app, &service.service)).copied();
            // A service that waits for its first start was not ready before either: its spec is a new one.
            was.unwrap_or(false) != service.ready
                && (service.ready || service.state != ServiceState::Waiting)
        })
        .map(|(app, service)| (app.clone(), service.service.clone(), service.ready))
        .collect()
}
