//! Devices, messages that are lost, doubled and late, and a hub: never more at once than the budget says, and
//! everybody gets a turn.

use std::collections::{BTreeMap, BTreeSet};

use foreshore_protocol::message::{AppStatus, Lease, LeaseRequest, Phase};
use foreshore_protocol::{AppName, DeviceId, Digest, Version};
use proptest::prelude::*;

use super::*;

const TTL: u64 = 60_000;
const END: u64 = 600_000;
/// No message is on its way for longer: less than [`END`].
const TRANSIT_MAX: u64 = 300_000;

fn device(number: usize) -> DeviceId {
    format!("d{number}").parse().unwrap()
}

fn app(number: usize) -> AppName {
    format!("a{number}").parse().unwrap()
}

fn version(generation: u64) -> Version {
    Version::from_numbers(1, generation).unwrap()
}

fn request(nonce: u64, since: u64) -> LeaseRequest {
    LeaseRequest {
        boot: 1,
        nonce,
        app: app(0),
        since: version(since),
        release: Digest::of(b"new"),
        wanted: true,
    }
}

fn status(since: u64, phase: Phase, running: &[u8], good: &[u8]) -> AppStatus {
    AppStatus {
        app: app(0),
        since: version(since),
        release: Digest::of(b"new"),
        phase,
        reason: None,
        running: Some(Digest::of(running)),
        last_known_good: Some(Digest::of(good)),
        services: Vec::new(),
    }
}

fn granted(nonce: u64, since: u64) -> Entry {
    let mut entry = Entry::default();
    let reply = entry.ask(&request(nonce, since), true, UnixMs(1_000));
    assert_eq!(reply, Reply::Decide);
    entry.grant(&app(0), TTL, END, UnixMs(2_000)).unwrap();
    entry
}

#[test]
fn the_same_request_gets_the_same_lease_and_an_older_one_nothing() {
    let mut entry = granted(5, 3);
    let lease = entry.lease(&app(0)).unwrap();
    assert_eq!((lease.nonce, lease.ttl_ms), (5, TTL));
    let before = entry.clone();
    assert_eq!(
        entry.ask(&request(5, 3), true, UnixMs(9_000)),
        Reply::Repeat
    );
    assert_eq!(entry.lease(&app(0)), Some(lease));
    assert_eq!(
        entry.ask(&request(4, 3), true, UnixMs(9_000)),
        Reply::Nothing
    );
    assert_eq!(entry, before);
}

#[test]
fn a_newer_request_voids_the_lease_and_keeps_the_place_in_the_queue() {
    let mut entry = granted(5, 3);
    assert_eq!(
        entry.ask(&request(6, 3), true, UnixMs(90_000)),
        Reply::Decide
    );
    assert!(!entry.holds_slot());
    let queued = entry.queued.clone().unwrap();
    assert_eq!(
        (queued.first, queued.asked),
        (UnixMs(1_000), UnixMs(90_000))
    );
    // Of another assignment: what was begun before may still go on, and the place is a new one.
    let mut entry = granted(5, 3);
    entry.ask(&request(6, 4), true, UnixMs(90_000));
    assert!(entry.holds_slot());
    assert_eq!(entry.queued.unwrap().first, UnixMs(90_000));
}

#[test]
fn what_is_given_back_or_not_wanted_by_the_hub_is_free() {
    for (wanted_there, wanted_here) in [(false, true), (true, false)] {
        let mut entry = granted(5, 3);
        let request = LeaseRequest {
            wanted: wanted_there,
            ..request(6, 3)
        };
        assert_eq!(
            entry.ask(&request, wanted_here, UnixMs(9_000)),
            Reply::Nothing
        );
        assert!(entry.is_empty());
    }
}

#[test]
fn only_an_end_frees_the_slot() {
    let now = UnixMs(3_000);
    let late = UnixMs(2_000 + TTL + END);
    let frees = |status: AppStatus, now| {
        let mut entry = granted(1, 3);
        entry.hear(Some(&status), Some(version(9)), now);
        !entry.holds_slot()
    };
    assert!(frees(status(3, Phase::Succeeded, b"new", b"new"), now));
    assert!(frees(status(3, Phase::Failed, b"new", b"old"), now));
    assert!(frees(status(3, Phase::RolledBack, b"old", b"old"), now));
    assert!(
        !frees(status(3, Phase::RolledBack, b"new", b"old"), now),
        "it is not back yet"
    );
    for phase in [Phase::Activating, Phase::Soaking] {
        assert!(!frees(status(3, phase, b"new", b"old"), late));
    }
    // These may be older than the lease, unless they come very late.
    for phase in [
        Phase::Waiting,
        Phase::Staging,
        Phase::Blocked,
        Phase::Rejected,
    ] {
        assert!(!frees(status(3, phase, b"old", b"old"), now));
        assert!(frees(status(3, phase, b"old", b"old"), late));
    }
    assert!(
        !frees(status(2, Phase::Succeeded, b"old", b"old"), late),
        "of before"
    );
    // Told something else meanwhile.
    assert!(frees(status(4, Phase::Waiting, b"old", b"old"), now));
    assert!(
        !frees(status(4, Phase::Waiting, b"new", b"old"), late),
        "still on trial"
    );
    let mut entry = granted(1, 3);
    entry.hear(None, Some(version(2)), late);
    assert!(entry.holds_slot());
    entry.hear(None, Some(version(3)), now);
    assert!(entry.is_empty(), "the app was removed");
}

#[test]
fn a_device_that_is_written_off_holds_no_slot_until_it_speaks() {
    let mut entry = granted(1, 3);
    if let Some(held) = &mut entry.held {
        held.written_off = true;
    }
    assert!(!entry.holds_slot());
    assert_eq!(entry.lease(&app(0)), None);
    let activating = status(3, Phase::Activating, b"new", b"old");
    assert!(entry.hear(Some(&activating), Some(version(3)), UnixMs(3_000)));
    assert!(entry.is_empty(), "from here on its report counts");
}

fn asking(number: usize, first: u64, bounds: &[&str]) -> Asking {
    Asking {
        device: device(number),
        app: app(0),
        first: UnixMs(first),
        bounds: bounds.iter().map(|name| bound(name)).collect(),
    }
}

fn bound(group: &str) -> Bound {
    Bound::Group("b".parse().unwrap(), group.to_owned())
}

fn limit(max: usize, unavailable: &[usize], lost: &[usize]) -> Limit {
    Limit {
        max,
        unavailable: unavailable.iter().copied().map(device).collect(),
        lost: lost.iter().copied().map(device).collect(),
    }
}

#[test]
fn who_waits_longest_goes_first_and_nobody_passes_it() {
    let limits = BTreeMap::from([
        (bound("x"), limit(1, &[9], &[])),
        (bound("y"), limit(1, &[], &[])),
    ]);
    // 0 waits for x, and a place in y is kept for it.
    let queue = [asking(0, 1, &["x", "y"]), asking(1, 2, &["y"])];
    assert_eq!(choose(&queue, &limits), Vec::<usize>::new());
    // Unless nobody knows when x is free again.
    let limits = BTreeMap::from([
        (bound("x"), limit(1, &[9], &[9])),
        (bound("y"), limit(1, &[], &[])),
    ]);
    assert_eq!(choose(&queue, &limits), [1]);
}

#[test]
fn who_waits_lets_those_pass_for_whom_it_waits() {
    // 1 has to wait until the rollout has room, which 2 takes until it has had its turn in the group that both are in.
    let queue = [
        asking(1, 0, &["rollout", "group"]),
        asking(2, 1, &["rollout", "group"]),
        asking(3, 2, &["group"]),
    ];
    let limits = |max, down: &[usize]| {
        BTreeMap::from([
            (bound("rollout"), limit(1, down, &[])),
            (bound("group"), limit(max, &[], &[])),
        ])
    };
    assert_eq!(choose(&queue, &limits(1, &[2])), [1]);
    assert_eq!(choose(&queue, &limits(2, &[2])), [1]);
    // Nobody else passes: neither who fills nothing, nor one of a rollout that 1 does not wait for.
    assert_eq!(choose(&queue, &limits(1, &[9])), [] as [usize; 0]);
    assert_eq!(choose(&queue, &limits(1, &[])), [0]);
    // Nor does it matter how many wait in between.
    let chain = [
        asking(1, 0, &["rollout", "group"]),
        asking(2, 1, &["other", "group"]),
        asking(3, 2, &["rollout", "group"]),
    ];
    let mut full = limits(1, &[3]);
    full.insert(bound("other"), limit(1, &[2], &[]));
    assert_eq!(choose(&chain, &full), [2]);
}

#[test]
fn a_device_that_is_unavailable_already_costs_nothing_more() {
    let limits = BTreeMap::from([(bound("x"), limit(1, &[0], &[]))]);
    let queue = [asking(1, 1, &["x"]), asking(0, 2, &["x"])];
    assert_eq!(choose(&queue, &limits), [1]);
    // A place that is kept is not one that is had.
    let queue = [asking(1, 1, &["x"]), asking(1, 2, &["x"])];
    assert_eq!(choose(&queue, &limits), Vec::<usize>::new());
    // Two apps of one device take one place.
    let limits = BTreeMap::from([(bound("x"), limit(1, &[], &[]))]);
    assert_eq!(choose(&queue, &limits), [0, 1]);
}

/// A device as it must behave: `agent/src/reconcile/leases.rs` and the gate in `agent/src/plan/app.rs`.
#[derive(Debug, Clone, Default)]
struct Device {
    boot: u64,
    nonce: u64,
    seq: u64,
    parts: BTreeMap<usize, Part>,
}

#[derive(Debug, Clone)]
struct Part {
    phase: Phase,
    /// What it asked last, and when.
    asked: Option<(u64, UnixMs)>,
    until: Option<UnixMs>,
}

impl Device {
    fn is_switching(&self) -> bool {
        self.parts.values().any(|part| part.phase.is_switching())
    }
}

#[derive(Debug, Clone)]
enum Message {
    Up(usize, LeaseRequest),
    Report(usize, u64, u64, BTreeMap<usize, Phase>),
    Down(usize, Lease),
}

#[derive(Debug, Clone)]
enum Happening {
    /// A message arrives; any of those on their way.
    Arrives(usize),
    /// It arrives, and again later.
    Doubles(usize),
    Lost(usize),
    Asks(usize, usize),
    Begins(usize, usize),
    Ends(usize, usize, bool),
    Reports(usize),
    Restarts(usize),
    Decides,
    Passes(u64),
}

fn happening(devices: usize, apps: usize) -> impl Strategy<Value = Happening> {
    use Happening::*;
    prop_oneof![
        12 => any::<usize>().prop_map(Arrives),
        2 => any::<usize>().prop_map(Doubles),
        1 => any::<usize>().prop_map(Lost),
        8 => (0..devices, 0..apps).prop_map(|(device, app)| Asks(device, app)),
        8 => (0..devices, 0..apps).prop_map(|(device, app)| Begins(device, app)),
        6 => (0..devices, 0..apps, any::<bool>()).prop_map(|(device, app, well)| Ends(device, app, well)),
        4 => (0..devices).prop_map(Reports),
        1 => (0..devices).prop_map(Restarts),
        6 => Just(Decides),
        4 => prop_oneof![0_u64..2_000, 0_u64..TTL * 2].prop_map(Passes),
    ]
}

struct World {
    now: UnixMs,
    max: usize,
    groups: usize,
    devices: Vec<Device>,
    entries: BTreeMap<(usize, usize), Entry>,
    heard: Vec<(u64, u64)>,
    reported: Vec<BTreeMap<usize, Phase>>,
    air: Vec<(UnixMs, Message)>,
}

impl World {
    fn new(devices: usize, apps: usize, groups: usize, max: usize) -> Self {
        let part = Part {
            phase: Phase::Waiting,
            asked: None,
            until: None,
        };
        let one = Device {
            boot: 1,
            parts: (0..apps).map(|app| (app, part.clone())).collect(),
            ..Device::default()
        };
        Self {
            now: UnixMs(1_000_000),
            max,
            groups,
            devices: vec![one; devices],
            entries: BTreeMap::new(),
            heard: vec![(0, 0); devices],
            reported: vec![BTreeMap::new(); devices],
            air: Vec::new(),
        }
    }

    fn send(&mut self, message: Message) {
        self.air.push((self.now, message));
    }

    fn happen(&mut self, happening: &Happening) {
        match *happening {
            Happening::Arrives(which) => {
                if !self.air.is_empty() {
                    let message = self.air.swap_remove(which % self.air.len());
                    self.arrive(message);
                }
            }
            Happening::Doubles(which) => {
                if !self.air.is_empty() {
                    let message = self.air[which % self.air.len()].clone();
                    self.arrive(message);
                }
            }
            Happening::Lost(which) => {
                if !self.air.is_empty() {
                    self.air.swap_remove(which % self.air.len());
                }
            }
            Happening::Asks(device, app) => self.ask(device, app),
            Happening::Begins(device, app) => {
                let now = self.now;
                let part = self.devices[device].parts.get_mut(&app).unwrap();
                if part.phase == Phase::Waiting && part.until.is_some_and(|until| now < until) {
                    part.phase = Phase::Activating;
                }
            }
            Happening::Ends(device, app, well) => {
                let part = self.devices[device].parts.get_mut(&app).unwrap();
                if part.phase.is_switching() {
                    part.phase = if well {
                        Phase::Succeeded
                    } else {
                        Phase::Failed
                    };
                    self.report(device);
                }
            }
            Happening::Reports(device) => self.report(device),
            Happening::Restarts(device) => {
                let device = &mut self.devices[device];
                device.boot += 1;
                (device.nonce, device.seq) = (0, 0);
                for part in device.parts.values_mut() {
                    (part.asked, part.until) = (None, None);
                }
            }
            Happening::Decides => self.decide(),
            Happening::Passes(ms) => self.now = self.now.plus(ms),
        }
        self.check();
    }

    fn ask(&mut self, number: usize, app_number: usize) {
        let now = self.now;
        let device = &mut self.devices[number];
        let part = device.parts.get_mut(&app_number).unwrap();
        if part.phase != Phase::Waiting {
            return;
        }
        device.nonce += 1;
        part.asked = Some((device.nonce, now));
        part.until = None;
        let request = LeaseRequest {
            boot: device.boot,
            app: app(app_number),
            ..request(device.nonce, 1)
        };
        self.send(Message::Up(number, request));
    }

    fn report(&mut self, number: usize) {
        let device = &mut self.devices[number];
        device.seq += 1;
        let phases = device.parts.iter().map(|(app, part)| (*app, part.phase));
        let message = Message::Report(number, device.boot, device.seq, phases.collect());
        self.send(message);
    }

    fn arrive(&mut self, (sent, message): (UnixMs, Message)) {
        // Connections break, and messages expire.
        if self.now.since(sent) > TRANSIT_MAX {
            return;
        }
        match message {
            Message::Up(number, request) => {
                let app_number = (0..8).find(|number| app(*number) == request.app).unwrap();
                let entry = self.entries.entry((number, app_number)).or_default();
                match entry.ask(&request, true, self.now) {
                    Reply::Repeat => {
                        let lease = entry.lease(&request.app).unwrap();
                        self.send(Message::Down(number, lease));
                    }
                    Reply::Decide => self.decide(),
                    Reply::Nothing => {}
                }
            }
            Message::Report(number, boot, seq, phases) => {
                if (boot, seq) <= self.heard[number] {
                    return;
                }
                self.heard[number] = (boot, seq);
                for (app_number, phase) in &phases {
                    let good: &[u8] = if phase.is_final() { b"new" } else { b"old" };
                    let said = AppStatus {
                        app: app(*app_number),
                        ..status(1, *phase, b"new", good)
                    };
                    if let Some(entry) = self.entries.get_mut(&(number, *app_number)) {
                        entry.hear(Some(&said), Some(version(1)), self.now);
                    }
                }
                self.reported[number] = phases;
            }
            Message::Down(number, lease) => {
                let device = &mut self.devices[number];
                let app_number = (0..8).find(|number| app(*number) == lease.app).unwrap();
                let part = device.parts.get_mut(&app_number).unwrap();
                if let Some((nonce, at)) = part.asked
                    && (lease.boot, lease.nonce) == (device.boot, nonce)
                {
                    part.until = Some(at.plus(lease.ttl_ms));
                }
            }
        }
    }

    fn group(&self, number: usize) -> Bound {
        bound(&format!("g{}", number % self.groups))
    }

    fn decide(&mut self) {
        let mut limits: BTreeMap<Bound, Limit> = (0..self.groups)
            .map(|group| (bound(&format!("g{group}")), limit(self.max, &[], &[])))
            .collect();
        for number in 0..self.devices.len() {
            let holds = self
                .entries
                .iter()
                .any(|((device, _), entry)| *device == number && entry.holds_slot());
            let switches = self.reported[number]
                .values()
                .any(|phase| phase.is_switching());
            if holds || switches {
                let limit = limits.get_mut(&self.group(number)).unwrap();
                limit.unavailable.insert(device(number));
            }
        }
        let mut queue: Vec<(usize, usize, Asking)> = Vec::new();
        for ((number, app_number), entry) in &self.entries {
            let Some(queued) = &entry.queued else {
                continue;
            };
            if self.now.since(queued.asked) < FRESH_MS {
                let asking = Asking {
                    device: device(*number),
                    app: app(*app_number),
                    first: queued.first,
                    bounds: vec![self.group(*number)],
                };
                queue.push((*number, *app_number, asking));
            }
        }
        queue.sort_by_key(|(_, _, asking)| asking.first);
        let asking: Vec<_> = queue.iter().map(|(_, _, asking)| asking.clone()).collect();
        for place in choose(&asking, &limits) {
            let (number, app_number, asking) = &queue[place];
            let entry = self.entries.get_mut(&(*number, *app_number)).unwrap();
            let lease = entry.grant(&asking.app, TTL, END, self.now).unwrap();
            self.send(Message::Down(*number, lease));
        }
    }

    /// Never more of a group switch than the budget says, whatever was lost, doubled or late.
    fn check(&self) {
        for group in 0..self.groups {
            let switching: BTreeSet<usize> = (0..self.devices.len())
                .filter(|number| number % self.groups == group)
                .filter(|number| self.devices[*number].is_switching())
                .collect();
            assert!(
                switching.len() <= self.max,
                "{switching:?} of group {group} switch at {:?}: {:#?}",
                self.now,
                self.entries
            );
        }
    }

    /// The network is whole: everybody asks, begins, ends and says so.
    fn settle(&mut self, apps: usize) {
        for _ in 0..(self.devices.len() * apps + 4) * 2 {
            for device in 0..self.devices.len() {
                for app in 0..apps {
                    self.happen(&Happening::Asks(device, app));
                }
                self.happen(&Happening::Reports(device));
            }
            self.decide();
            while !self.air.is_empty() {
                self.happen(&Happening::Arrives(0));
            }
            for device in 0..self.devices.len() {
                for app in 0..apps {
                    self.happen(&Happening::Begins(device, app));
                }
            }
            for device in 0..self.devices.len() {
                for app in 0..apps {
                    self.happen(&Happening::Ends(device, app, true));
                }
            }
            self.happen(&Happening::Passes(15_000));
        }
        let ended = |device: &Device| device.parts.values().all(|part| part.phase.is_final());
        assert!(
            self.devices.iter().all(ended),
            "somebody never got a turn: {:#?} {:#?}",
            self.devices,
            self.entries
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn never_more_at_once_than_the_budget_says_and_nobody_is_forgotten(
        devices in 1_usize..7,
        apps in 1_usize..3,
        groups in 1_usize..3,
        max in 1_usize..3,
        happenings in proptest::collection::vec(happening(6, 2), 0..250),
    ) {
        let mut world = World::new(devices, apps, groups, max);
        for happening in &happenings {
            let known = match happening {
                Happening::Asks(device, app) | Happening::Begins(device, app) | Happening::Ends(device, app, _) => {
                    *device < devices && *app < apps
                }
                Happening::Reports(device) | Happening::Restarts(device) => *device < devices,
                Happening::Arrives(_)
                | Happening::Doubles(_)
                | Happening::Lost(_)
                | Happening::Decides
                | Happening::Passes(_) => true,
            };
            if known {
                world.happen(happening);
            }
        }
        world.settle(apps);
    }

    /// Where everybody that fills a rollout waits for a turn in it, somebody gets one.
    #[test]
    fn nobody_waits_in_a_circle(
        max in 1_usize..3,
        down in proptest::collection::vec((0_usize..8, 0_usize..3), 0..8),
        others in proptest::collection::vec((0_usize..8, 0_usize..3), 1..8),
        order in any::<u64>(),
    ) {
        let rollout = |number: usize| ["x", "y", "z"][number];
        let mut limits = BTreeMap::from([(bound("group"), limit(max, &[], &[]))]);
        for number in 0..3 {
            let filling: Vec<_> = down.iter().filter(|(_, of)| *of == number).map(|(device, _)| *device).collect();
            limits.insert(bound(rollout(number)), limit(filling.len().max(1), &filling, &[]));
        }
        let mut asked: Vec<_> = down.iter().chain(&others).collect();
        let places = asked.len();
        asked.rotate_left(usize::try_from(order % places as u64).unwrap());
        let queue: Vec<Asking> = asked
            .into_iter()
            .zip(0_u64..)
            .map(|((device, of), first)| asking(*device, first, &[rollout(*of), "group"]))
            .collect();
        let chosen = choose(&queue, &limits);
        prop_assert!(!chosen.is_empty(), "{queue:?} {limits:?}");
        let went: BTreeSet<_> = chosen.iter().map(|place| &queue[*place].device).collect();
        prop_assert!(went.len() <= max);
    }

    /// Whoever is at the head of the queue goes as soon as its own bounds have room, whatever the others do.
    #[test]
    fn the_first_in_the_queue_is_never_passed_over(
        limits in proptest::collection::btree_map("[xyz]", (1_usize..3, 0_usize..3), 0..3),
        queue in proptest::collection::vec((0_usize..6, proptest::collection::btree_set("[xyz]", 0..3)), 1..8),
    ) {
        let limits: BTreeMap<Bound, Limit> = limits
            .iter()
            .map(|(name, (max, down))| (bound(name), limit(*max, &(10..10 + down).collect::<Vec<_>>(), &[])))
            .collect();
        let queue: Vec<Asking> = queue
            .iter()
            .zip(0_u64..)
            .map(|((number, names), first)| asking(*number, first, &names.iter().map(String::as_str).collect::<Vec<_>>()))
            .collect();
        let chosen = choose(&queue, &limits);
        let room = |asking: &Asking| asking.bounds.iter().all(|bound| {
            limits.get(bound).is_none_or(|limit| limit.unavailable.len() < limit.max)
        });
        prop_assert_eq!(chosen.contains(&0), room(&queue[0]));
        for (bound, limit) in &limits {
            let went: BTreeSet<_> = chosen
                .iter()
                .filter(|place| queue[**place].bounds.contains(bound))
                .map(|place| &queue[*place].device)
                .collect();
            prop_assert!(went.is_empty() || limit.unavailable.len() + went.len() <= limit.max);
        }
    }
}
