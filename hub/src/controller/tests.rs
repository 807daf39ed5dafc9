//! The controller over a database in memory, with a clock that the test turns.

use foreshore_protocol::api::{ApplyOutcome, RolloutState};
use foreshore_protocol::id::{Labels, Version};
use foreshore_protocol::manifest;
use foreshore_protocol::message::{
    AppStatus, Beacon, Event, EventKind, Events, Inventory, Phase, Presence, Reported,
};
use foreshore_protocol::release::Release;
use foreshore_protocol::{AppName, DeviceId, Digest};
use rusqlite::Connection;

use super::apps::Resolved;
use super::ingest::{Inbound, Message, Receipt};
use super::membership::Beyond;
use super::rollouts::OFFERS_AT_ONCE;
use super::*;
use crate::store::tests::memory;

mod bounds;
mod kept;
mod restored;

struct Hub {
    connection: Connection,
    now: UnixMs,
    lives: Lives,
    /// Whether what is kept in memory is compared with what is stored, after every change.
    compare: bool,
}

fn device(name: &str) -> DeviceId {
    name.parse().unwrap()
}

fn shop() -> AppName {
    "shop".parse().unwrap()
}

/// A manifest whose release depends on `tag` alone.
fn resolved(tag: &str, policy: &str) -> Resolved {
    let text = format!(
        "apiVersion: foreshore/v1\nkind: App\nmetadata: {{name: shop}}\nspec:\n  selector: {{matchLabels: {{role: web}}}}\n  services: {{web: {{image: 'a:{tag}'}}}}\n  rollout: {{{policy}}}\n"
    );
    let app = manifest::parse(text.as_bytes()).unwrap();
    let mut services = app.spec.services.clone();
    for service in services.values_mut() {
        service.image = format!("docker.io/library/a@{}", Digest::of(tag.as_bytes()));
    }
    let release = Release {
        schema: 1,
        app: shop(),
        services,
        image_pull_secrets: app.spec.image_pull_secrets.clone(),
    };
    let bytes = release.to_canonical_json();
    Resolved {
        digest: Digest::of(&bytes),
        app,
        bytes,
        release,
    }
}

const AT_ONCE: &str = "waves: [{percent: 100}], soak: 0s, bake: 0s, maxUnavailable: 100%";

impl Hub {
    fn new() -> Self {
        Self {
            connection: memory(),
            now: UnixMs(1_000_000_000_000),
            lives: Lives::default(),
            compare: true,
        }
    }

    fn change<T>(
        &mut self,
        work: impl FnOnce(&mut Change<'_>) -> Result<T, ControlError>,
    ) -> Result<T, ControlError> {
        self.lives.begin(0);
        let changed = self.try_change(work);
        match &changed {
            Ok(_) => self.connection.execute_batch("RELEASE change").unwrap(),
            Err(_) => {
                self.lives.fail();
                self.connection
                    .execute_batch("ROLLBACK TO change; RELEASE change")
                    .unwrap();
            }
        }
        if !self.compare {
            return changed;
        }
        let wrong = self.lives.discrepancy(&self.connection).unwrap();
        assert_eq!(wrong, None, "{}", wrong.as_deref().unwrap_or_default());
        assert_eq!(counted(&self.connection), recounted(&self.connection));
        changed
    }

    fn try_change<T>(
        &mut self,
        work: impl FnOnce(&mut Change<'_>) -> Result<T, ControlError>,
    ) -> Result<T, ControlError> {
        self.connection.execute_batch("SAVEPOINT change").unwrap();
        let mut change = Change {
            connection: &self.connection,
            now: self.now,
            listening: Listening {
                since: Some(UnixMs(0)),
                settle_ms: 0,
            },
            lives: &mut self.lives,
            effects: Effects::default(),
        };
        let value = work(&mut change)?;
        while let Some(app) = change.effects.dirty.pop_first() {
            rollouts::advance_newest(&mut change, &app)?;
        }
        Ok(value)
    }

    fn apply(&mut self, resolved: &Resolved) -> foreshore_protocol::api::ApplyAnswer {
        self.change(|change| apps::apply(change, resolved, 7))
            .unwrap()
    }

    fn hear(&mut self, name: &str, retained: bool, message: Message) -> Receipt {
        let inbound = Inbound {
            device: device(name),
            retained,
            message,
        };
        self.change(|change| ingest::ingest(change, &[inbound]))
            .unwrap()
            .remove(&device(name))
            .unwrap_or_default()
    }

    fn birth(&mut self, name: &str, session: u64, boot: u64) {
        self.hear(
            name,
            false,
            Message::Presence(presence(session, boot, true)),
        );
    }

    /// A device that is there and selected.
    fn join(&mut self, name: &str) {
        self.birth(name, 1, 1);
        let labels = Labels::from([("role".parse().unwrap(), "web".parse().unwrap())]);
        self.report_with(name, 1, labels, Vec::new());
    }

    fn report_with(
        &mut self,
        name: &str,
        seq: u64,
        labels: Labels,
        apps: Vec<AppStatus>,
    ) -> Receipt {
        let version = self.head(name).map(|head| head.version);
        self.hear(
            name,
            false,
            Message::Reported(reported(1, seq, version, labels, apps)),
        )
    }

    /// The device did what its head says, and it went well.
    fn obey(&mut self, name: &str, phase: Phase) {
        let seq = store::device::link(&self.connection, &device(name))
            .unwrap()
            .unwrap()
            .reported_seq
            + 1;
        let (_, labels) = store::device::labels(&self.connection, &device(name))
            .unwrap()
            .unwrap();
        let apps = self
            .head(name)
            .map(|head| head.apps)
            .unwrap_or_default()
            .into_iter()
            .map(|app| AppStatus {
                app: app.app,
                since: app.since,
                release: app.release,
                phase,
                reason: None,
                running: Some(app.release),
                last_known_good: Some(app.release),
                services: Vec::new(),
            });
        let apps = apps.collect();
        self.report_with(name, seq, labels, apps);
    }

    fn head(&self, name: &str) -> Option<foreshore_protocol::message::Head> {
        store::desired::head(&self.connection, &device(name)).unwrap()
    }

    fn release_of(&self, name: &str) -> Option<Digest> {
        self.head(name)?.apps.first().map(|app| app.release)
    }

    fn state(&self) -> RolloutState {
        store::rollout::newest_header(&self.connection, &shop())
            .unwrap()
            .unwrap()
            .state
    }

    /// What the loop does: everything that is due.
    fn tick(&mut self) -> Option<UnixMs> {
        let (due, _) = store::rollout::due(&self.connection, self.now).unwrap();
        self.change(|change| {
            for app in &due {
                rollouts::advance_newest(change, app)?;
            }
            Ok(())
        })
        .unwrap();
        store::rollout::due(&self.connection, self.now).unwrap().1
    }

    fn kinds(&self) -> Vec<String> {
        store::event::after(&self.connection, 0, 10_000)
            .unwrap()
            .into_iter()
            .map(|event| event.kind)
            .collect()
    }

    fn started(&self) -> usize {
        let kinds = self.kinds();
        kinds.iter().filter(|kind| *kind == "started").count()
    }
}

/// Connected devices, and others by the hour in which they were heard of, as triggers count them.
fn counted(connection: &Connection) -> Vec<(bool, u64, u64)> {
    rows(
        connection,
        "SELECT online, hour, devices FROM pulse ORDER BY 1, 2",
    )
}

/// The same, counted one by one.
fn recounted(connection: &Connection) -> Vec<(bool, u64, u64)> {
    rows(
        connection,
        "SELECT online, iif(online, 0, last_seen_ms / 3600000), count(*) FROM device
         WHERE online OR last_seen_ms IS NOT NULL GROUP BY 1, 2 ORDER BY 1, 2",
    )
}

fn rows(connection: &Connection, query: &str) -> Vec<(bool, u64, u64)> {
    let mut statement = connection.prepare(query).unwrap();
    let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)));
    rows.unwrap().collect::<rusqlite::Result<_>>().unwrap()
}

fn presence(session: u64, boot: u64, online: bool) -> Presence {
    Presence {
        session,
        online,
        boot,
        version: None,
        reported_seq: 0,
        max_schema: 1,
        agent_version: "test".to_owned(),
        secrets_key: None,
        secrets: None,
    }
}

fn reported(
    boot: u64,
    seq: u64,
    version: Option<Version>,
    labels: Labels,
    apps: Vec<AppStatus>,
) -> Reported {
    let inventory = Inventory {
        agent_version: "test".to_owned(),
        arch: "amd64".to_owned(),
        kernel: "6".to_owned(),
        memory_bytes: 1,
        disk_bytes: 1,
        disk_free_bytes: 1,
        disk_reserve_bytes: None,
        metered: None,
        dev_nodes: None,
        labels,
    };
    Reported {
        boot,
        seq,
        version,
        inventory,
        apps,
    }
}

fn event(seq: u64) -> Message {
    events(seq, [seq])
}

/// Of a device that keeps events from `kept_from` on.
fn events(kept_from: u64, seqs: impl IntoIterator<Item = u64>) -> Message {
    let event = |seq| Event {
        seq,
        boot: 1,
        unix_ms: 0,
        app: None,
        service: None,
        kind: EventKind::Started,
        message: String::new(),
    };
    Message::Events(Events {
        kept_from,
        events: seqs.into_iter().map(event).collect(),
    })
}

#[test]
fn a_bake_ends_by_the_clock_alone_and_its_deadline_is_a_column() {
    let mut hub = Hub::new();
    hub.join("a");
    hub.join("b");
    hub.apply(&resolved(
        "1",
        "waves: [{count: 1}], soak: 0s, bake: 10s, maxUnavailable: 100%",
    ));
    let first = ["a", "b"]
        .into_iter()
        .find(|name| hub.release_of(name).is_some())
        .unwrap();
    let second = if first == "a" { "b" } else { "a" };
    hub.obey(first, Phase::Succeeded);
    assert_eq!(
        hub.release_of(second),
        None,
        "the second wave waits for the bake"
    );
    let due = hub.tick().expect("the bake has a deadline");
    assert_eq!(due, hub.now.plus(10_000));
    hub.now = UnixMs(due.0 - 1);
    hub.tick();
    assert_eq!(hub.release_of(second), None);
    hub.now = due;
    hub.tick();
    assert!(hub.release_of(second).is_some());
    hub.obey(second, Phase::Succeeded);
    hub.now = hub.now.plus(10_000);
    hub.tick();
    assert_eq!(hub.state(), RolloutState::Completed);
}

#[test]
fn applying_again_is_a_no_op_and_another_policy_alone_opens_no_rollout() {
    let mut hub = Hub::new();
    hub.join("a");
    let first = hub.apply(&resolved("1", AT_ONCE));
    assert_eq!((first.outcome, first.devices), (ApplyOutcome::Created, 1));
    assert_eq!(
        hub.apply(&resolved("1", AT_ONCE)).outcome,
        ApplyOutcome::Unchanged,
        "also while it runs"
    );
    hub.obey("a", Phase::Succeeded);
    let before = hub.head("a");
    let again = hub.apply(&resolved("1", "soak: 5s"));
    assert_eq!(
        (again.outcome, again.rollout),
        (ApplyOutcome::Reconfigured, None)
    );
    assert_eq!(hub.head("a"), before, "no new generation");
    // After an abort devices may differ: the same release is no longer a no-op.
    let second = hub.apply(&resolved("2", AT_ONCE)).rollout.unwrap();
    hub.change(|change| rollouts::command(change, second, rollouts::Command::Abort))
        .unwrap();
    assert_eq!(
        hub.apply(&resolved("1", AT_ONCE)).outcome,
        ApplyOutcome::Updated
    );
}

#[test]
fn a_release_for_everybody_is_placed_in_transactions_of_bounded_length() {
    let mut hub = Hub::new();
    hub.compare = false;
    for number in 0..3 * OFFERS_AT_ONCE + 1 {
        hub.join(&format!("d{number}"));
    }
    hub.apply(&resolved("1", AT_ONCE));
    let placed = |hub: &Hub| {
        let count = "SELECT count(*) FROM placement";
        let count = hub
            .connection
            .query_row(count, [], |row| row.get::<_, u32>(0));
        count.unwrap()
    };
    // When it is opened, and when its members are looked at.
    assert_eq!(placed(&hub), 2 * OFFERS_AT_ONCE);
    hub.tick();
    assert_eq!(placed(&hub), 3 * OFFERS_AT_ONCE);
    let next = hub.tick();
    assert_eq!(placed(&hub), 3 * OFFERS_AT_ONCE + 1);
    let (due, _) = store::rollout::due(&hub.connection, hub.now).unwrap();
    assert_eq!(due, [], "nothing more is due at once");
    assert!(next.is_some(), "but the deadlines of those that were told");
}

#[tokio::test]
async fn what_is_left_for_the_next_look_is_not_slept_over() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _writer) = Store::open(&dir.path().join("hub.db")).unwrap();
    let controller = Controller::new(store, HubClock::start(UnixMs(0)));
    let devices = 3 * OFFERS_AT_ONCE + 1;
    let births: Vec<_> = (0..devices)
        .flat_map(|number| {
            let birth = Message::Presence(presence(1, 1, true));
            let labels = Labels::from([("role".parse().unwrap(), "web".parse().unwrap())]);
            let report = Message::Reported(reported(1, 1, None, labels, Vec::new()));
            [birth, report].map(|message| Inbound {
                device: device(&format!("d{number}")),
                retained: false,
                message,
            })
        })
        .collect();
    let joined = controller.change(move |change| ingest::ingest(change, &births));
    joined.await.unwrap();
    controller.set_listening(Listening {
        since: Some(UnixMs(0)),
        settle_ms: 0,
    });
    let opened = controller.change(|change| apps::apply(change, &resolved("1", AT_ONCE), 7));
    opened.await.unwrap();
    // No device says anything.
    loop {
        let next = controller.round().await.unwrap();
        let placed = controller.change(|change| {
            let count = "SELECT count(*) FROM placement";
            let count = change
                .connection
                .query_row(count, [], |row| row.get::<_, u32>(0));
            Ok(count?)
        });
        if placed.await.unwrap() == devices {
            break;
        }
        assert!(
            next.is_some_and(|next| next <= controller.now()),
            "{next:?}"
        );
    }
}

#[test]
fn a_device_that_joins_during_a_rollout_waits_for_its_end() {
    let mut hub = Hub::new();
    hub.join("a");
    let release = hub.apply(&resolved("1", AT_ONCE)).release;
    hub.join("b");
    assert_eq!(hub.release_of("b"), None, "newcomers never skip the brakes");
    hub.obey("a", Phase::Succeeded);
    assert_eq!(
        (hub.state(), hub.release_of("b")),
        (RolloutState::Completed, Some(release))
    );
    hub.join("c");
    assert_eq!(
        hub.release_of("c"),
        None,
        "afterwards they get it at a pace"
    );
    hub.now = hub.tick().expect("the next one is due");
    hub.tick();
    assert_eq!(hub.release_of("c"), Some(release));
}

#[test]
fn a_deleted_app_is_gone_when_its_last_device_says_so_and_can_come_back() {
    let mut hub = Hub::new();
    hub.join("a");
    hub.join("b");
    hub.apply(&resolved("1", AT_ONCE));
    hub.obey("a", Phase::Succeeded);
    hub.change(|change| apps::delete(change, &shop())).unwrap();
    hub.change(|change| apps::delete(change, &shop())).unwrap();
    assert_eq!((hub.release_of("a"), hub.release_of("b")), (None, None));
    hub.obey("a", Phase::Succeeded);
    assert!(
        store::app::get(&hub.connection, &shop())
            .unwrap()
            .unwrap()
            .deleting,
        "b has not spoken"
    );
    let revived = hub.apply(&resolved("2", AT_ONCE));
    assert_eq!(revived.outcome, ApplyOutcome::Created);
    assert_eq!(hub.release_of("a"), Some(revived.release));
    hub.change(|change| apps::delete(change, &shop())).unwrap();
    for name in ["a", "b"] {
        hub.obey(name, Phase::Succeeded);
    }
    assert_eq!(store::app::get(&hub.connection, &shop()).unwrap(), None);
    assert!(hub.kinds().contains(&"app-deleted".to_owned()));
}

#[test]
fn an_old_will_never_overrides_a_newer_birth() {
    let mut hub = Hub::new();
    hub.birth("a", 5, 1);
    hub.hear("a", true, Message::Presence(presence(4, 1, false)));
    let online = |hub: &Hub| {
        store::device::link(&hub.connection, &device("a"))
            .unwrap()
            .unwrap()
            .online
    };
    assert!(online(&hub));
    hub.hear("a", true, Message::Presence(presence(5, 1, false)));
    assert!(!online(&hub));
    hub.hear("a", true, Message::Presence(presence(4, 1, true)));
    assert!(
        !online(&hub),
        "nor does a retained birth that is older still"
    );
    hub.birth("a", 6, 1);
    assert!(online(&hub));
    // The device lost its state and counts from 1 again; the Will of its life before comes late.
    hub.birth("a", 1, 2);
    hub.hear("a", false, Message::Presence(presence(6, 1, false)));
    assert!(online(&hub));
    hub.hear("a", false, Message::Presence(presence(1, 2, false)));
    assert!(!online(&hub), "its own Will ends it");
    hub.birth("a", 2, 2);
    // What is only retained makes no device.
    hub.hear("ghost", true, Message::Presence(presence(9, 1, false)));
    hub.hear(
        "ghost",
        true,
        Message::Reported(reported(1, 1, None, Labels::new(), Vec::new())),
    );
    assert_eq!(
        store::device::link(&hub.connection, &device("ghost")).unwrap(),
        None
    );
}

#[test]
fn reports_are_taken_once_in_order_and_acknowledged_also_the_second_time() {
    let mut hub = Hub::new();
    hub.birth("a", 1, 1);
    let report = |seq, label: &str| {
        let labels = Labels::from([("n".parse().unwrap(), label.parse().unwrap())]);
        Message::Reported(reported(1, seq, None, labels, Vec::new()))
    };
    assert_eq!(hub.hear("a", false, report(2, "two")).stored, Some((0, 2)));
    assert_eq!(hub.hear("a", false, report(1, "one")).stored, Some((0, 2)));
    let (_, own) = store::device::labels(&hub.connection, &device("a"))
        .unwrap()
        .unwrap();
    assert_eq!(own["n"].as_str(), "two");
    // After a reset its counters begin anew, and it is believed again.
    hub.birth("a", 1, 0);
    let lost = Message::Reported(reported(0, 1, None, Labels::new(), Vec::new()));
    assert_eq!(hub.hear("a", false, lost).stored, Some((0, 1)));
    assert!(hub.kinds().contains(&"device-reset".to_owned()));
}

#[test]
fn a_gap_between_events_is_asked_about_unless_the_device_does_not_keep_them() {
    let mut hub = Hub::new();
    hub.birth("a", 1, 1);
    for seq in [1, 2, 2] {
        hub.hear("a", false, event(seq));
    }
    let missed = Receipt {
        stored: Some((2, 0)),
        resync: true,
    };
    assert_eq!(hub.hear("a", false, events(3, [5])), missed);
    assert_eq!(hub.hear("a", false, events(3, [5, 6])), missed);
    assert_eq!(hub.hear("a", false, events(3, 3..=6)).stored, Some((6, 0)));
    // It dropped 7 and 8, and keeps dropping.
    assert_eq!(hub.hear("a", false, events(9, [9])).stored, Some((9, 0)));
    assert!(hub.hear("a", false, events(10, [12])).resync);
    assert!(hub.hear("a", false, events(11, [13])).resync);
    let told = hub.hear("a", false, events(14, 14..=15));
    assert_eq!((told.stored, told.resync), (Some((15, 0)), false));
    assert_eq!(hub.started(), 9);
}

#[test]
fn events_that_travel_together_are_each_taken_once() {
    let mut hub = Hub::new();
    hub.birth("a", 1, 1);
    assert_eq!(hub.hear("a", false, events(1, 1..=3)).stored, Some((3, 0)));
    // Some of them were on their way twice.
    assert_eq!(hub.hear("a", false, events(2, 2..=5)).stored, Some((5, 0)));
    assert_eq!(hub.hear("a", false, events(2, 2..=5)).stored, Some((5, 0)));
    assert_eq!(hub.hear("a", false, events(6, [])).stored, Some((5, 0)));
    assert_eq!(hub.started(), 5);
}

#[test]
fn who_floods_the_log_has_the_rest_taken_in_later() {
    let mut hub = Hub::new();
    hub.birth("a", 1, 1);
    hub.birth("b", 1, 1);
    let throttled = |hub: &Hub| {
        let kinds = hub.kinds();
        kinds
            .iter()
            .filter(|kind| *kind == "events-throttled")
            .count()
    };
    for batch in 0..15 {
        let from = batch * 64 + 1;
        hub.hear("a", false, events(from, from..from + 64));
    }
    assert_eq!(throttled(&hub), 0);
    // What comes twice, and what comes after a gap, costs nothing.
    hub.hear("a", false, events(897, 897..961));
    assert!(hub.hear("a", false, events(961, 970..1_000)).resync);
    let last = || events(961, 961..1_025);
    for _ in 0..2 {
        let told = hub.hear("a", false, last());
        assert_eq!((told.stored, told.resync), (Some((1_000, 0)), false));
    }
    assert_eq!(throttled(&hub), 1, "it is said once");
    hub.now = hub.now.plus(1_000);
    assert_eq!(hub.hear("a", false, last()).stored, Some((1_010, 0)));
    hub.hear("b", false, event(1));
    assert_eq!(hub.started(), 1_011);
    hub.now = hub.now.plus(3_600_000);
    assert_eq!(hub.hear("a", false, last()).stored, Some((1_024, 0)));
    assert_eq!(throttled(&hub), 1);
}

#[test]
fn a_device_behind_is_repaired_less_and_less_often() {
    let mut hub = Hub::new();
    hub.join("a");
    hub.apply(&resolved("1", AT_ONCE));
    let beacon = || {
        Message::Beacon(Beacon {
            boot: 1,
            seq: 1,
            version: None,
            reported_seq: 1,
            event_seq: 0,
            memory_mib: 0,
            load_centi: 0,
            secrets: None,
        })
    };
    let mut sent = Vec::new();
    for minute in 0..60_u64 {
        hub.connection.execute("DELETE FROM outbox", []).unwrap();
        hub.hear("a", false, beacon());
        if store::desired::outbox_depth(&hub.connection).unwrap() > 0
            && !store::desired::waiting_heads(&hub.connection, 1, |_, _| false)
                .unwrap()
                .is_empty()
        {
            sent.push(minute);
        }
        hub.now = hub.now.plus(60_000);
    }
    assert_eq!(sent, [0, 1, 3, 7, 15, 31]);
}

#[test]
fn a_device_ahead_of_a_restored_database_is_named_once_and_not_overwritten() {
    let mut hub = Hub::new();
    hub.join("a");
    hub.apply(&resolved("1", AT_ONCE));
    let ahead = Version::from_numbers(1, 500).unwrap();
    for seq in [10, 11] {
        let report = reported(1, seq, Some(ahead), Labels::new(), Vec::new());
        hub.hear("a", false, Message::Reported(report));
    }
    assert_eq!(
        hub.kinds()
            .iter()
            .filter(|kind| *kind == "device-ahead")
            .count(),
        1
    );
    // From a new epoch on it is held, and told nothing before it is let go.
    let before = hub.head("a").unwrap().version;
    store::desired::begin_epoch(&hub.connection, UnixMs(0)).unwrap();
    for seq in [12, 13] {
        let report = reported(1, seq, Some(ahead), Labels::new(), Vec::new());
        hub.hear("a", false, Message::Reported(report));
    }
    assert_eq!(hub.head("a").unwrap().version, before);
    let waiting =
        |hub: &Hub| store::desired::waiting_heads(&hub.connection, 10, |_, _| false).unwrap();
    assert_eq!(waiting(&hub), []);
    let held = |hub: &Hub| store::device::held(&hub.connection, &device("a")).unwrap();
    assert!(held(&hub).unwrap().contains("1.500"));
    let told = hub
        .kinds()
        .iter()
        .filter(|kind| *kind == "device-ahead")
        .count();
    assert_eq!(told, 2, "once in each epoch");
    hub.change(|change| apps::hold(change, &device("a"), None))
        .unwrap();
    assert_eq!(held(&hub), None);
    assert!(waiting(&hub)[0].1.version > ahead);
}

#[test]
fn a_device_that_leaves_a_rollout_and_comes_back_in_one_breath_is_out_of_it() {
    let mut hub = Hub::new();
    let role = |hub: &Hub, name: &str, value: &str| {
        let labels = Labels::from([("role".parse().unwrap(), value.parse().unwrap())]);
        store::device::put_operator_labels(&hub.connection, &device(name), &labels).unwrap();
    };
    for name in ["a", "b"] {
        hub.join(name);
    }
    hub.apply(&resolved("1", AT_ONCE));
    for name in ["a", "b"] {
        hub.obey(name, Phase::Succeeded);
    }
    let second = hub.apply(&resolved("2", AT_ONCE)).release;
    hub.obey("b", Phase::Activating);
    // Out and in again before the rollout is looked at.
    role(&hub, "b", "other");
    let mut lives = std::mem::take(&mut hub.lives);
    let connection = &hub.connection;
    let mut change = Change {
        connection,
        now: hub.now,
        listening: Listening {
            since: Some(UnixMs(0)),
            settle_ms: 0,
        },
        lives: &mut lives,
        effects: Effects::default(),
    };
    membership::refresh_device(&mut change, &device("b"), Beyond::Refused).unwrap();
    role(&hub, "b", "web");
    membership::refresh_device(&mut change, &device("b"), Beyond::Refused).unwrap();
    hub.lives = lives;
    hub.change(|change| {
        change.effects.dirty.insert(shop());
        Ok(())
    })
    .unwrap();
    hub.obey("a", Phase::Succeeded);
    assert_eq!(hub.state(), RolloutState::Completed);
    assert_eq!(
        hub.release_of("b"),
        Some(second),
        "it gets what newcomers get"
    );
}

#[test]
fn a_narrower_selector_in_mid_rollout_leaves_nothing_on_the_excluded() {
    let mut hub = Hub::new();
    for name in ["a", "b"] {
        hub.join(name);
    }
    let labels = Labels::from([("site".parse().unwrap(), "one".parse().unwrap())]);
    store::device::put_operator_labels(&hub.connection, &device("a"), &labels).unwrap();
    hub.apply(&resolved("1", AT_ONCE));
    for name in ["a", "b"] {
        hub.obey(name, Phase::Succeeded);
    }
    hub.apply(&resolved("2", AT_ONCE));
    let mut narrow = resolved("3", AT_ONCE);
    narrow
        .app
        .spec
        .selector
        .match_labels
        .insert("site".parse().unwrap(), "one".parse().unwrap());
    let third = hub.apply(&narrow).release;
    assert_eq!(
        (hub.release_of("a"), hub.release_of("b")),
        (Some(third), None)
    );
}

#[test]
fn a_forgotten_device_that_comes_back_is_told_above_what_it_has_stored() {
    let mut hub = Hub::new();
    hub.join("a");
    for tag in ["1", "2", "3"] {
        hub.apply(&resolved(tag, AT_ONCE));
        hub.obey("a", Phase::Succeeded);
    }
    let stored = hub.head("a").unwrap().version;
    hub.hear("a", false, Message::Presence(presence(1, 1, false)));
    hub.change(|change| apps::forget(change, &device("a")))
        .unwrap();
    hub.join("a");
    assert!(hub.head("a").unwrap().version > stored);
}
