//! The bytes of every release stay readable, and today's encoder still writes those of the newest.
//!
//! `tests/data/VERSION/` holds one file for each message, release and manifest as that version wrote it.
//! A file is never changed after its version is out: a new shape gets a new schema id and a new file. While
//! a version is in the making, `FORESHORE_WRITE_GOLDEN=1 cargo test -p foreshore-protocol --test compat`
//! writes the files of [`CURRENT`] anew.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::path::PathBuf;

use foreshore_protocol::digest::Digest;
use foreshore_protocol::frame::{self, MAX_SCHEMA, Message};
use foreshore_protocol::id::{Epoch, Version};
use foreshore_protocol::manifest;
use foreshore_protocol::message::{
    AppStatus, Beacon, BudgetGroup, Command, Event, EventKind, Events, Head, HeadApp, HubInfo,
    ImagePull, Inventory, KeptOld, Lease, LeaseRequest, Phase, Presence, PullProgress, PullState,
    Reason, ReasonCode, Reported, ServiceState, ServiceStatus, Window, Windows, Zone,
};
use foreshore_protocol::release::{Release, service_digest};
use foreshore_protocol::secret::{
    Bundle, DeviceKey, PublicKey, SealedSecrets, Secret, SecretValue,
};

/// The version whose files may still be written.
const CURRENT: &str = "0.1.0";

fn path(version: &str, name: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "tests", "data", version, name]
        .iter()
        .collect()
}

/// The golden bytes, after writing `bytes` there if that was asked for.
fn golden(version: &str, name: &str, bytes: &[u8]) -> Vec<u8> {
    let path = path(version, name);
    if version == CURRENT && std::env::var_os("FORESHORE_WRITE_GOLDEN").is_some() {
        let dir = path.parent().expect("it was joined from parts");
        std::fs::create_dir_all(dir).expect("the data directory can be made");
        std::fs::write(&path, bytes).expect("golden bytes can be written");
    }
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[track_caller]
fn message<M: Message + PartialEq + Debug>(name: &str, message: &M) {
    let bytes = frame::encode(message);
    let golden = golden(CURRENT, name, &bytes);
    assert_eq!(
        frame::decode::<M>(&golden).as_ref(),
        Ok(message),
        "{name} reads as another value"
    );
    assert_eq!(
        bytes, golden,
        "{name} is written differently; a new shape needs a new schema id"
    );
}

fn version(generation: u64) -> Version {
    Version::from_numbers(1, generation).expect("test generations are in range")
}

fn digest(text: &str) -> Digest {
    Digest::of(text.as_bytes())
}

#[test]
fn downlinks() {
    let app = |name: &str, since| HeadApp {
        app: name.parse().unwrap(),
        release: digest(name),
        since: version(since),
        soak_ms: 60_000,
        progress_deadline_ms: 300_000,
        override_lock: name == "web",
        windows: if name == "web" {
            Windows {
                switch: Some(Window {
                    cron: "0 2 * * *".parse().unwrap(),
                    open_ms: 7_200_000,
                    zone: Zone::Posix("CET-1CEST,M3.5.0,M10.5.0/3".to_owned()),
                }),
                fetch: Some(Window {
                    cron: "*/10 22-23 * * mon-fri".parse().unwrap(),
                    open_ms: 600_000,
                    zone: Zone::Device,
                }),
            }
        } else {
            Windows::default()
        },
        max_restarts: u32::from(name == "web"),
        require_hub_ms: (name == "web").then_some(900_000),
    };
    message(
        "head.bin",
        &Head {
            version: version(7),
            apps: vec![app("gateway", 3), app("web", 7)],
            budgets: vec![BudgetGroup {
                budget: "lines".parse().unwrap(),
                group: [
                    ("line".parse().unwrap(), "".parse().unwrap()),
                    ("site".parse().unwrap(), "hull".parse().unwrap()),
                ]
                .into(),
            }],
        },
    );
    message(
        "head-empty.bin",
        &Head {
            version: version(u64::from(u32::MAX)),
            apps: vec![],
            budgets: vec![],
        },
    );
    message(
        "command-ack.bin",
        &Command::Ack {
            event: 300,
            reported: 70_000,
            unix_ms: 1_790_000_000_000,
        },
    );
    message("command-resync.bin", &Command::Resync);
    let info = HubInfo {
        epoch: Epoch::FIRST,
        unix_ms: 1_790_000_000_000,
        beacon_interval_ms: 900_000,
        reconnect_spread_ms: 30_000,
        schema_range: (1, MAX_SCHEMA),
    };
    message("hub-info.bin", &info);
    // The frame; what is in the box is not the same twice, see the test below.
    let sealed = SealedSecrets {
        sealed: vec![1, 2, 3],
    };
    message("secrets.bin", &sealed);
    let lease = Lease {
        boot: 3,
        nonce: 300,
        app: "web".parse().unwrap(),
        since: version(7),
        release: digest("web"),
        ttl_ms: 300_000,
    };
    message("lease.bin", &lease);
}

#[test]
fn uplinks() {
    let beacon = Beacon {
        boot: 3,
        seq: 129,
        version: Some(version(7)),
        reported_seq: 12,
        event_seq: 400,
        memory_mib: 96,
        load_centi: 150,
        secrets: Some(version(5)),
    };
    message("beacon.bin", &beacon);
    let presence = Presence {
        session: 9,
        online: true,
        boot: 3,
        version: None,
        reported_seq: 0,
        max_schema: MAX_SCHEMA,
        agent_version: "0.1.0".to_owned(),
        secrets_key: Some(PublicKey::from_bytes([7; 32])),
        secrets: Some(version(5)),
    };
    message("presence.bin", &presence);
    let pull = |image: &str, state| ImagePull {
        image: image.to_owned(),
        state,
    };
    let progress = PullProgress {
        boot: 3,
        release: digest("web"),
        images: vec![
            pull("registry.example/a:1", PullState::Staged),
            pull(
                "registry.example/b:2",
                PullState::Fetching {
                    fetched_bytes: 1 << 20,
                    total_bytes: 1 << 33,
                },
            ),
            pull("registry.example/c:3", PullState::Waiting),
        ],
        rate_bytes: 300_000,
    };
    message("pull.bin", &progress);
    let request = LeaseRequest {
        boot: 3,
        nonce: 300,
        app: "web".parse().unwrap(),
        since: version(7),
        release: digest("web"),
        wanted: true,
    };
    message("lease-request.bin", &request);
}

/// Every phase, reason code, service state and event kind, so that none can be reordered.
#[test]
fn reports_with_every_phase_and_reason() {
    use {Phase as P, ReasonCode as R};
    let phases = [
        P::Accepted,
        P::Rejected,
        P::Staging,
        P::Blocked,
        P::Activating,
        P::Soaking,
        P::Succeeded,
        P::RolledBack,
        P::Failed,
        P::Removing,
        P::Waiting,
    ];
    let codes = [
        R::ImageNotFound,
        R::DigestMismatch,
        R::RegistryUnreachable,
        R::NoMatchingPlatform,
        R::BadImage,
        R::DiskFull,
        R::BadRelease,
        R::StartFailed,
        R::Exited,
        R::OomKilled,
        R::NotReady,
        R::DeadlineExceeded,
        R::Poisoned,
        R::StateCorrupt,
        R::Internal,
        R::Signaled,
        R::ProbeFailed,
        R::UpdateLocked,
        R::DiskLimit,
        R::Evicted,
        R::PolicyDenied,
        R::DeviceMissing,
        R::PullDeferred,
        R::SecretMissing,
        R::IoLimit,
        R::ImageUnsigned,
        R::WaitsForTurn,
        R::WaitsForWindow,
        R::HubUnreachable,
    ];
    let states = [
        ServiceState::Waiting,
        ServiceState::Running,
        ServiceState::BackOff { exit_code: 137 },
        ServiceState::Exited { exit_code: -1 },
    ];
    let services = |ready| {
        states
            .iter()
            .enumerate()
            .map(|(index, state)| ServiceStatus {
                service: format!("s{index}").parse().unwrap(),
                state: state.clone(),
                ready,
                restarts: 5,
                kept: (index == 1).then(|| KeptOld {
                    instance: 70_000,
                    release: digest("old"),
                    keep_ms: 3_600_000,
                }),
            })
            .collect()
    };
    let apps = codes
        .into_iter()
        .enumerate()
        .map(|(index, code)| AppStatus {
            app: format!("app-{index:02}").parse().unwrap(),
            since: version(5),
            release: digest("new"),
            phase: phases[index % phases.len()],
            reason: Some(Reason::new(
                code,
                Some("s2".parse().unwrap()),
                "exit code 137 — killed",
            )),
            running: (index % 2 == 0).then(|| digest("old")),
            last_known_good: (index % 3 == 0).then(|| digest("old")),
            services: if index == 0 { services(true) } else { vec![] },
        })
        .collect();
    let inventory = Inventory {
        agent_version: "0.1.0".to_owned(),
        arch: "arm/v7".to_owned(),
        kernel: "6.12.30".to_owned(),
        memory_bytes: 1 << 30,
        disk_bytes: 16 << 30,
        disk_free_bytes: 7 << 30,
        disk_reserve_bytes: Some(256 << 20),
        metered: Some(false),
        dev_nodes: Some(vec!["/dev/ttyUSB0".to_owned()]),
        labels: [("role".parse().unwrap(), "gateway".parse().unwrap())].into(),
    };
    message(
        "reported.bin",
        &Reported {
            boot: 3,
            seq: 12,
            version: Some(version(7)),
            inventory,
            apps,
        },
    );
}

#[test]
fn events_of_every_kind() {
    use EventKind as K;
    let kinds = [
        K::AgentStarted,
        K::Accepted,
        K::ImageStaged,
        K::StagingFailed,
        K::Started,
        K::Exited,
        K::OomKilled,
        K::Ready,
        K::NotReady,
        K::Succeeded,
        K::RolledBack,
        K::Failed,
        K::Removed,
        K::StateCorrupt,
        K::EventsDropped,
        K::Adopted,
        K::Signaled,
        K::ProbeFailed,
        K::DiskLimit,
        K::Evicted,
        K::DiskPressure,
        K::StateUnwritable,
        K::StateWritable,
        K::SecretRotated,
        K::Kept,
        K::LetGo,
        K::TakenBack,
    ];
    let mut events = Vec::new();
    for (seq, kind) in (1..).zip(kinds) {
        let event = Event::new(seq, 3, 1_790_000_000_000, kind, "what happened");
        let event = if seq % 2 == 0 {
            event.about("web".parse().unwrap(), Some("nginx".parse().unwrap()))
        } else {
            event
        };
        message(&format!("event-{seq:02}.bin"), &event);
        events.push(event);
    }
    let kept_from = 1;
    message("events.bin", &Events { kept_from, events });
}

/// A release that stands on devices must keep its digest: it is compared with what the hub assigned.
#[test]
fn manifests_and_releases() {
    let manifest = std::fs::read(path(CURRENT, "app.yaml")).unwrap();
    let app = manifest::parse(&manifest).unwrap();
    let json = serde_json::to_vec_pretty(&app).unwrap();
    let stored = golden(CURRENT, "app.json", &json);
    assert_eq!(manifest::parse(&stored).unwrap(), app);
    assert_eq!(
        serde_json::from_slice::<manifest::App>(&stored).unwrap(),
        app
    );

    let image = format!("hub.internal/web@{}", digest("image"));
    let pinned: BTreeMap<_, _> = app
        .spec
        .services
        .keys()
        .map(|name| (name.clone(), image.clone()))
        .collect();
    let release = Release::from_app(&app, &pinned).unwrap();
    let bytes = golden(CURRENT, "release.json", &release.to_canonical_json());
    let expected = "sha256:dd75a427b5864f250d976d56b52292f54c65a51d378ffae738845bc995ad9f8b"
        .parse()
        .unwrap();
    assert_eq!(Release::from_bytes(&bytes, &expected).unwrap(), release);
    assert_eq!(
        release.to_canonical_json(),
        bytes,
        "the release is written differently"
    );
    assert_eq!(release.digest(), expected);
    // Running containers are matched by this.
    let service = release.services.values().next().unwrap();
    assert_eq!(
        service_digest(service).to_string(),
        "sha256:8970cdf6e74eca1fef2c0c008bcda2e4dada75370918fbfbc6cae8decc8ed733"
    );
}

/// A box that was sealed once must be opened by every later agent: devices keep it on disk.
#[test]
fn sealed_bundles() {
    let key = DeviceKey::from_bytes([9; 32]);
    let value = |text: &str| Secret {
        revision: 3,
        value: SecretValue::new(text.into()),
    };
    let bundle = Bundle {
        device: "gw-1".parse().unwrap(),
        version: version(5),
        secrets: [
            ("db-password".parse().unwrap(), value("correct horse")),
            ("empty".parse().unwrap(), value("")),
        ]
        .into(),
    };
    let file = path(CURRENT, "secrets.box");
    if std::env::var_os("FORESHORE_WRITE_GOLDEN").is_some() && !file.exists() {
        std::fs::write(&file, key.public().seal(&bundle).sealed).unwrap();
    }
    let sealed = std::fs::read(&file).unwrap();
    assert_eq!(key.open(&SealedSecrets { sealed }).unwrap(), bundle);
}

#[test]
fn every_schema_has_its_bytes() {
    let mut schemas: Vec<u16> = std::fs::read_dir(path(CURRENT, ""))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|ext| ext == "bin"))
        .map(|path| {
            let bytes = std::fs::read(path).unwrap();
            u16::from_le_bytes([bytes[2], bytes[3]])
        })
        .collect();
    schemas.sort_unstable();
    schemas.dedup();
    assert_eq!(schemas, (1..=MAX_SCHEMA).collect::<Vec<_>>());
}
