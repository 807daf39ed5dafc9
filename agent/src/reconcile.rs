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

use foreshore_protocol::message::{Event as Happening, EventKind, Head};
use foreshore_protocol::release::Release;
use foreshore_protocol::secret::{PublicKey, SealedSecrets};
use foreshore_protocol::{AppName, Digest, ServiceName, Version};
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::Instant;

use crate::causes::chain;
use crate::clock;
use crate::config::Config;
use crate::execute::Tools;
use crate::inventory;
use crate::link::{Birth, Incoming, Link, Outgoing, Receipt};
use crate::plan::{BootId, BootMs, Busy, History, HubContact, Outcome};
use crate::policy;
use crate::runtime::{ContainerState, Runtime};
use crate::state::{Loaded, Outbox, State};
use crate::status::{ContainerLine, Doing, Published};
use crate::update_lock::Locks;
use crate::vault::Vault;
use crate::wall::Wall;
use crate::watchdog::Watchdog;
use crate::zone::LocalZone;

mod disk;
mod downlink;
mod probes;
mod steps;
mod turns;
mod uplink;

use disk::{DiskWatch, Told};
use probes::Probes;
use turns::Turns;
use uplink::{Gauges, Uplink};

/// After the disk or the runtime failed, everything is tried again after this.
const RETRY: Duration = Duration::from_secs(5);

/// How often to send a beacon before the hub says otherwise.
const BEACON_INTERVAL: Duration = Duration::from_mins(15);

/// What happens at the begin of a trial is on its way to the broker within this.
const TOLD_WITHIN: Duration = Duration::from_secs(30);

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
    Disk,
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
    seen: Rc<Cell<Seen>>,
}

/// What the link's task learns of the loop's progress.
#[derive(Debug, Clone, Copy, Default)]
struct Seen {
    version: Option<Version>,
    reported_seq: u64,
    secrets_key: Option<PublicKey>,
    secrets: Option<Version>,
}

impl Memory {
    /// Takes the state over.
    #[must_use]
    pub fn new(state: State) -> Self {
        Self {
            state: Rc::new(RefCell::new(state)),
            seen: Rc::default(),
        }
    }

    /// What to say at the birth of a new connection.
    #[must_use]
    pub fn birth(&self) -> Birth {
        let (session, stored) = self.state.borrow_mut().next_session();
        if let Err(error) = stored {
            tracing::warn!(error = chain(&error), "the session's number was not stored");
        }
        let seen = self.seen.get();
        Birth {
            session,
            boot: self.state.borrow().boot(),
            version: seen.version,
            reported_seq: seen.reported_seq,
            secrets_key: seen.secrets_key,
            secrets: seen.secrets,
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
    /// Whom to tell that the loop goes round.
    pub watchdog: Watchdog,
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
    pinned: BTreeSet<Digest>,
    busy: Busy,
    tasks: JoinSet<Ended>,
    staging: Option<(Digest, AbortHandle)>,
    probes: Probes,
    update_locks: Locks,
    policy: policy::Watched,
    fetching: BTreeSet<Digest>,
    turns: Turns,
    wall: Wall,
    zone: LocalZone,
    offered: Option<Offered>,
    vault: Vault,
    /// Secrets that arrived and are not stored yet.
    offered_secrets: Option<(SealedSecrets, Receipt)>,
    connected_at: Option<Instant>,
    contact: HubContact,
    /// Why there is no connection, once that was told: whether the broker refused us.
    offline: Option<bool>,
    wake_at: Option<Instant>,
    said: Option<Published>,
    /// When the state directory was last seen to take no writes; `None` when it does.
    disk_trouble: Option<Instant>,
    list_trouble: bool,
    disk: DiskWatch,
    watchdog: Watchdog,
}

impl<R: Runtime + 'static> Agent<R> {
    /// An agent that has not begun.
    #[must_use]
    pub fn new(parts: Parts<R>) -> Self {
        let boot_count = parts.memory.state.borrow().boot();
        let interval = parts.config.hub.report_interval();
        let run = parts.config.paths.run.clone();
        let policy = parts.config.policy_source();
        // From when a trial begins; what happens then is told within a moment, and is to be answered.
        let noticed = parts.config.hub.answer_within() + TOLD_WITHIN;
        let contact = HubContact {
            noticed_after_ms: u64::try_from(noticed.as_millis()).unwrap_or(u64::MAX),
            ..HubContact::default()
        };
        let wall = Wall::new(parts.config.time.trust_clock);
        let zone = LocalZone::new(parts.config.time.zone.clone());
        let mut damage = parts.loaded.damage;
        let mut vault = Vault::new(parts.config.device.clone(), parts.loaded.secrets_key);
        match parts.loaded.secrets.map(|sealed| vault.open(&sealed)) {
            None => {}
            Some(Ok(bundle)) => vault.keep(bundle),
            Some(Err(refused)) => {
                let state = parts.memory.state.borrow();
                damage.push(state.set_secrets_aside(&chain(&refused)));
            }
        }
        parts.memory.seen.set(Seen {
            secrets_key: vault.public_key(),
            secrets: vault.version(),
            ..Seen::default()
        });
        Self {
            uplink: Uplink::new(parts.link, boot_count, interval, BEACON_INTERVAL),
            disk: DiskWatch::new(&parts.config),
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
            pinned: BTreeSet::new(),
            busy: Busy::default(),
            tasks: JoinSet::new(),
            staging: None,
            probes: Probes::new(),
            update_locks: Locks::new(run),
            policy: policy::Watched::new(policy),
            fetching: BTreeSet::new(),
            turns: Turns::new(boot_count, jitter(&parts.boot)),
            wall,
            zone,
            offered: None,
            vault,
            offered_secrets: None,
            connected_at: None,
            contact,
            offline: None,
            wake_at: None,
            said: None,
            disk_trouble: None,
            list_trouble: false,
            watchdog: parts.watchdog,
        }
        .noting(damage)
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
            self.show_life();
            let event = self.next(&mut incoming, &mut stop).await;
            let mut plan = self.handle(event);
            // What else is there already is one plan's worth.
            while let Ok(message) = incoming.try_recv() {
                plan |= self.handle(Event::Link(message));
            }
            while let Some(ended) = self.tasks.try_join_next() {
                match ended {
                    Ok(ended) => plan |= self.handle(Event::Done(ended)),
                    // Swallowed, it would leave its service busy for ever.
                    Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
                    Err(_abandoned) => {}
                }
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
        let watchdog = self.watchdog.wake_at();
        let wake_at = [
            self.wake_at,
            offered,
            self.uplink.wake_at(),
            watchdog,
            self.disk.wake_at(),
            self.turn_due_at(),
        ]
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
            () = self.disk.changed() => Event::Disk,
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
            Event::Probe | Event::Disk | Event::Containers => Next::Plan,
            Event::Timer => {
                let now = Instant::now();
                let accepted = self.accept_offered(now);
                let pressed = self.disk.is_due(now) && self.look_at_disk();
                let due = self.wake_at.is_some_and(|at| now >= at);
                if due || accepted || pressed {
                    Next::Plan
                } else {
                    Next::Nothing
                }
            }
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
        // What says so writes this one too.
        if !self.make_room(&stored) {
            self.note_disk(stored);
        }
    }

    /// Looks at the disk, and tells when it became short, or is not any more. True when it did.
    fn look_at_disk(&mut self) -> bool {
        match self.disk.look() {
            Told::Nothing => false,
            Told::Changed(message) => {
                self.event(EventKind::DiskPressure, None, None, message);
                true
            }
        }
    }

    /// After a write that failed for want of space: gives the ballast up. True when the write may be tried again.
    fn make_room(&mut self, written: &Result<(), crate::state::FileError>) -> bool {
        if !matches!(written, Err(error) if error.is_disk_full()) {
            return false;
        }
        let Some(bytes) = self.disk.release_ballast() else {
            return false;
        };
        let message = format!(
            "the disk is full: {} MiB that were held back were given up, so that the agent can store its state",
            bytes >> 20
        );
        self.event(EventKind::DiskPressure, None, None, message);
        true
    }

    /// Tells disk trouble when it begins and when it ends. True when there was none this time.
    fn note_disk(&mut self, result: Result<(), crate::state::FileError>) -> bool {
        let now = Instant::now();
        match (result, self.disk_trouble) {
            (Ok(()), Some(asked)) if now >= asked + RETRY => {
                // That nothing failed proves nothing: there may have been nothing to write.
                let written = self.memory.state.borrow().try_writing();
                self.disk_trouble = written.is_err().then_some(now);
                if written.is_ok() {
                    let message = "state can be written again".to_owned();
                    self.event(EventKind::StateWritable, None, None, message);
                }
                true
            }
            (Ok(()), _) => true,
            (Err(error), None) => {
                // Before the event, which cannot be written either; it is kept in memory and sent.
                self.disk_trouble = Some(now);
                let message = format!(
                    "state cannot be written; what runs keeps running: {}",
                    chain(&error)
                );
                tracing::error!("{message}");
                self.event(EventKind::StateUnwritable, None, None, message);
                false
            }
            (Err(_), Some(_)) => {
                self.disk_trouble = Some(now);
                false
            }
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

    fn flush(&mut self) {
        let config = &self.config;
        let secrets = self.vault.version();
        let (pulling, boot) = (&self.tools.pulling, self.memory.state.borrow().boot());
        self.uplink.set_pulling(self.staging.is_some());
        self.uplink.flush(
            &self.outbox,
            || inventory::inventory(config),
            || Gauges {
                memory_mib: inventory::containers_memory_mib(&config.cgroup.parent),
                load_centi: inventory::load_centi(),
                secrets,
            },
            || pulling.progress(boot, std::time::Instant::now()),
        );
        self.ask_for_turns();
        let version = self.head.as_ref().map(|head| head.version);
        self.memory.seen.set(Seen {
            version,
            reported_seq: self.uplink.seq(),
            secrets_key: self.vault.public_key(),
            secrets,
        });
    }

    /// Sends the requests for turns that are due.
    fn ask_for_turns(&mut self) {
        if self.connected_at.is_none() {
            return;
        }
        // What could not be sent is asked again in its time, like what was lost.
        while let Some(request) = self.turns.due(Instant::now(), clock::boot_ms()) {
            tracing::debug!(
                app = request.app.as_str(),
                nonce = request.nonce,
                wanted = request.wanted,
                "asks for a turn"
            );
            if !self.uplink.send(Outgoing::LeaseRequest(request)) {
                break;
            }
        }
    }

    fn turn_due_at(&self) -> Option<Instant> {
        self.connected_at?;
        self.turns.wake_at(Instant::now(), clock::boot_ms())
    }

    /// Only from the loop itself, so that a loop that stands still is noticed.
    fn show_life(&mut self) {
        self.watchdog.progress(Instant::now());
        let (version, containers) = self.said.as_ref().map_or((None, 0), |said| {
            let running = |line: &&ContainerLine| line.state == Doing::Running;
            (said.version, said.containers.iter().filter(running).count())
        });
        let version = version.map_or_else(|| "none yet".to_owned(), |version| version.to_string());
        let hub = match (self.connected_at, self.disk_trouble) {
            (_, Some(_)) => "the state directory cannot be written",
            (Some(_), None) => "connected to the hub",
            (None, None) => "without the hub",
        };
        self.watchdog.status(&format!(
            "{containers} containers run, desired state {version}, {hub}"
        ));
    }

    /// Ends the session, so that the hub learns at once that we are off. Steps under way are cut.
    async fn say_goodbye(&mut self, incoming: &mut mpsc::Receiver<Incoming>) {
        tracing::info!("stopping; containers keep running");
        self.watchdog.stop();
        self.tasks.abort_all();
        self.uplink.hurry(&self.outbox);
        let closed = async {
            if !self.uplink.close().await {
                return;
            }
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

/// A number that differs between devices, and between boots of one.
fn jitter(boot: &BootId) -> u64 {
    let (first, _) = boot.0.split_first_chunk::<8>().expect("it has 16 bytes");
    u64::from_le_bytes(*first)
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
