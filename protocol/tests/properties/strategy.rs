//! Values to draw: every message, and edits that turn a valid document into a nearly valid one.

use std::collections::BTreeMap;
use std::str::FromStr;

use foreshore_protocol::digest::Digest;
use foreshore_protocol::id::{
    AppName, BudgetName, Epoch, Generation, LabelKey, LabelValue, Labels, ServiceName, Version,
};
use foreshore_protocol::manifest;
use foreshore_protocol::message::{
    AppStatus, Beacon, BudgetGroup, Command, Event, EventKind, Head, HeadApp, HubInfo, ImagePull,
    Inventory, KeptOld, Lease, LeaseRequest, MAX_WINDOW_MS, Phase, Presence, PullProgress,
    PullState, Reason, ReasonCode, Reported, ServiceState, ServiceStatus, Window, Windows, Zone,
};
use foreshore_protocol::release::Release;
use foreshore_protocol::secret::{PublicKey, SealedSecrets};
use proptest::option;
use proptest::prelude::*;
use proptest::sample::{Index, select};

pub(crate) const YAML: &str = include_str!("../../../configs/apps/gateway.yaml");
pub(crate) const JSON: &str = include_str!("../../../configs/apps/sensors.json");

/// A change to a document.
#[derive(Debug, Clone)]
pub(crate) enum Splice {
    Byte(u8),
    Insert(&'static str),
    Remove(usize),
    Repeat(usize),
}

impl Splice {
    pub(crate) fn apply(&self, bytes: &mut Vec<u8>, at: Index) {
        if bytes.is_empty() {
            return;
        }
        let at = at.index(bytes.len());
        match *self {
            Self::Byte(byte) => bytes[at] = byte,
            Self::Insert(text) => {
                bytes.splice(at..at, text.bytes());
            }
            Self::Remove(count) => {
                let end = bytes.len().min(at + count);
                bytes.drain(at..end);
            }
            Self::Repeat(count) => {
                let piece = bytes[at..bytes.len().min(at + count)].to_vec();
                bytes.splice(at..at, piece);
            }
        }
    }
}

pub(crate) fn splice() -> impl Strategy<Value = Splice> {
    prop_oneof![
        any::<u8>().prop_map(Splice::Byte),
        select(vec![
            "0",
            "-1",
            "99999999999999999999",
            "1e999",
            "~",
            "null",
            "\"\"",
            "{",
            "}",
            "[",
            "]",
            ":",
            ",",
            "\n",
            "  ",
            "\t",
            "&a ",
            "*a",
            "!!binary ",
            "<<: ",
            "- ",
            "? ",
            "|",
            ">",
            "'",
            "\"",
            "\\u0000",
            "\u{feff}",
            "---\n",
            "#",
            "%",
            "${x}",
            "../",
            "\u{2028}",
            "é",
            ".nan",
            "0x",
            "true",
            "image: x\n",
        ])
        .prop_map(Splice::Insert),
        (1_usize..40).prop_map(Splice::Remove),
        (1_usize..40).prop_map(Splice::Repeat),
    ]
}

/// The release of the sample, pinned.
pub(crate) fn release() -> Release {
    let app = manifest::parse(YAML.as_bytes()).expect("the sample is valid");
    let image = format!("hub.internal/x@{}", Digest::of(b"x"));
    let pinned: BTreeMap<_, _> = app
        .spec
        .services
        .keys()
        .map(|name| (name.clone(), image.clone()))
        .collect();
    Release::from_app(&app, &pinned).expect("the sample makes a release")
}

pub(crate) fn name<T: FromStr<Err: std::fmt::Debug> + std::fmt::Debug>() -> impl Strategy<Value = T>
{
    "[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
        .prop_map(|text| text.parse().expect("the pattern is that of names"))
}

fn version() -> impl Strategy<Value = Version> {
    let ordinal = 1..=u64::try_from(i64::MAX).expect("positive");
    (ordinal.clone(), ordinal).prop_map(|(epoch, generation)| Version {
        epoch: Epoch::new(epoch).expect("in range"),
        generation: Generation::new(generation).expect("in range"),
    })
}

fn digest() -> impl Strategy<Value = Digest> {
    any::<[u8; 32]>().prop_map(Digest::from_bytes)
}

pub(crate) fn head() -> impl Strategy<Value = Head> {
    let app = (version(), digest(), any::<u64>(), any::<u64>());
    (
        version(),
        prop::collection::btree_map(name::<AppName>(), app, 0..8),
        prop::collection::vec((name::<BudgetName>(), labels()), 0..4),
    )
        .prop_map(|(version, apps, budgets)| Head {
            version,
            budgets: budgets
                .into_iter()
                .map(|(budget, group)| BudgetGroup { budget, group })
                .collect(),
            apps: apps
                .into_iter()
                .map(
                    |(app, (since, release, soak_ms, progress_deadline_ms))| HeadApp {
                        override_lock: soak_ms % 2 == 1,
                        app,
                        release,
                        since,
                        soak_ms,
                        progress_deadline_ms,
                        windows: windows(progress_deadline_ms),
                        max_restarts: u32::from(soak_ms % 3 == 1),
                        require_hub_ms: (soak_ms % 5 == 1).then_some(progress_deadline_ms),
                    },
                )
                .collect(),
        })
}

/// None, one or two, as `bits` has it.
fn windows(bits: u64) -> Windows {
    let window = |bits: u64| Window {
        cron: match bits % 3 {
            0 => "0 2 * * *",
            1 => "*/5 22-23 * jan mon-fri",
            _ => "0 0 29 2 *",
        }
        .parse()
        .expect("written above"),
        open_ms: bits % MAX_WINDOW_MS,
        zone: if bits % 7 < 3 {
            Zone::Device
        } else {
            Zone::Posix("CET-1CEST,M3.5.0,M10.5.0/3".to_owned())
        },
    };
    Windows {
        switch: bits.is_multiple_of(2).then(|| window(bits / 2)),
        fetch: bits.is_multiple_of(5).then(|| window(bits / 5)),
    }
}

pub(crate) fn lease_request() -> impl Strategy<Value = LeaseRequest> {
    let numbers = any::<(u64, u64, bool)>();
    (numbers, name(), version(), digest()).prop_map(
        |((boot, nonce, wanted), app, since, release)| LeaseRequest {
            boot,
            nonce,
            app,
            since,
            release,
            wanted,
        },
    )
}

pub(crate) fn lease() -> impl Strategy<Value = Lease> {
    (lease_request(), any::<u64>()).prop_map(|(request, ttl_ms)| Lease {
        boot: request.boot,
        nonce: request.nonce,
        app: request.app,
        since: request.since,
        release: request.release,
        ttl_ms,
    })
}

pub(crate) fn command() -> impl Strategy<Value = Command> {
    prop_oneof![
        any::<(u64, u64, u64)>().prop_map(|(event, reported, unix_ms)| Command::Ack {
            event,
            reported,
            unix_ms
        }),
        Just(Command::Resync),
    ]
}

fn labels() -> impl Strategy<Value = Labels> {
    let key = "[a-zA-Z0-9]([a-zA-Z0-9._-]{0,20}[a-zA-Z0-9])?".prop_map(|text| {
        text.parse::<LabelKey>()
            .expect("the pattern is that of keys")
    });
    let value = "([a-zA-Z0-9]([a-zA-Z0-9._-]{0,20}[a-zA-Z0-9])?)?".prop_map(|text| {
        text.parse::<LabelValue>()
            .expect("the pattern is that of values")
    });
    prop::collection::btree_map(key, value, 0..5)
}

fn inventory() -> impl Strategy<Value = Inventory> {
    (
        "\\PC{0,60}",
        select(vec!["amd64", "arm64", "arm/v7"]),
        "\\PC{0,60}",
        any::<[u64; 3]>(),
        labels(),
        (
            option::of(any::<u64>()),
            option::of(any::<bool>()),
            option::of(prop::collection::vec("/dev/[a-z]{1,20}", 0..4)),
        ),
    )
        .prop_map(
            |(
                agent_version,
                arch,
                kernel,
                [memory_bytes, disk_bytes, disk_free_bytes],
                labels,
                (disk_reserve_bytes, metered, dev_nodes),
            )| {
                Inventory {
                    disk_reserve_bytes,
                    metered,
                    dev_nodes,
                    agent_version,
                    arch: arch.to_owned(),
                    kernel,
                    memory_bytes,
                    disk_bytes,
                    disk_free_bytes,
                    labels,
                }
            },
        )
}

fn phase() -> impl Strategy<Value = Phase> {
    select(vec![
        Phase::Accepted,
        Phase::Rejected,
        Phase::Staging,
        Phase::Blocked,
        Phase::Activating,
        Phase::Soaking,
        Phase::Succeeded,
        Phase::RolledBack,
        Phase::Failed,
        Phase::Removing,
        Phase::Waiting,
    ])
}

fn reason() -> impl Strategy<Value = Reason> {
    let code = select(vec![
        ReasonCode::ImageNotFound,
        ReasonCode::DigestMismatch,
        ReasonCode::Exited,
        ReasonCode::Poisoned,
        ReasonCode::Internal,
        ReasonCode::Signaled,
        ReasonCode::ProbeFailed,
        ReasonCode::UpdateLocked,
        ReasonCode::DiskLimit,
        ReasonCode::Evicted,
        ReasonCode::PolicyDenied,
        ReasonCode::DeviceMissing,
        ReasonCode::PullDeferred,
        ReasonCode::SecretMissing,
        ReasonCode::IoLimit,
        ReasonCode::ImageUnsigned,
        ReasonCode::WaitsForTurn,
        ReasonCode::WaitsForWindow,
        ReasonCode::HubUnreachable,
    ]);
    (code, option::of(name::<ServiceName>()), "\\PC{0,200}")
        .prop_map(|(code, service, message)| Reason::new(code, service, message))
}

fn service() -> impl Strategy<Value = ServiceStatus> {
    let state = prop_oneof![
        Just(ServiceState::Waiting),
        Just(ServiceState::Running),
        any::<i32>().prop_map(|exit_code| ServiceState::BackOff { exit_code }),
        any::<i32>().prop_map(|exit_code| ServiceState::Exited { exit_code }),
    ];
    let kept = (any::<[u64; 2]>(), digest()).prop_map(|([instance, keep_ms], release)| KeptOld {
        instance,
        release,
        keep_ms,
    });
    (name(), state, any::<bool>(), any::<u32>(), option::of(kept)).prop_map(
        |(service, state, ready, restarts, kept)| ServiceStatus {
            service,
            state,
            ready,
            restarts,
            kept,
        },
    )
}

pub(crate) fn reported() -> impl Strategy<Value = Reported> {
    let status = (
        (version(), digest(), phase(), option::of(reason())),
        (
            option::of(digest()),
            option::of(digest()),
            prop::collection::vec(service(), 0..4),
        ),
    );
    let apps = prop::collection::btree_map(name::<AppName>(), status, 0..4).prop_map(|apps| {
        apps.into_iter()
            .map(
                |(app, ((since, release, phase, reason), (running, last_known_good, services)))| {
                    AppStatus {
                        app,
                        since,
                        release,
                        phase,
                        reason,
                        running,
                        last_known_good,
                        services,
                    }
                },
            )
            .collect()
    });
    (any::<[u64; 2]>(), option::of(version()), inventory(), apps).prop_map(
        |([boot, seq], version, inventory, apps)| Reported {
            boot,
            seq,
            version,
            inventory,
            apps,
        },
    )
}

pub(crate) fn beacon() -> impl Strategy<Value = Beacon> {
    let versions = [option::of(version()), option::of(version())];
    (any::<[u64; 4]>(), versions, any::<[u32; 2]>()).prop_map(
        |([boot, seq, reported_seq, event_seq], [version, secrets], [memory_mib, load_centi])| {
            Beacon {
                boot,
                seq,
                version,
                reported_seq,
                event_seq,
                memory_mib,
                load_centi,
                secrets,
            }
        },
    )
}

pub(crate) fn pull_progress() -> impl Strategy<Value = PullProgress> {
    let state = prop_oneof![
        Just(PullState::Waiting),
        any::<[u64; 2]>().prop_map(|[fetched_bytes, total_bytes]| PullState::Fetching {
            fetched_bytes,
            total_bytes,
        }),
        Just(PullState::Staged),
    ];
    let image = (".{0,100}", state).prop_map(|(image, state)| ImagePull { image, state });
    (
        any::<[u64; 2]>(),
        digest(),
        proptest::collection::vec(image, 0..=32),
    )
        .prop_map(|([boot, rate_bytes], release, images)| PullProgress {
            boot,
            release,
            images,
            rate_bytes,
        })
}

pub(crate) fn presence() -> impl Strategy<Value = Presence> {
    (
        any::<[u64; 3]>(),
        any::<bool>(),
        [option::of(version()), option::of(version())],
        any::<u16>(),
        "\\PC{0,60}",
        option::of(any::<[u8; 32]>().prop_map(PublicKey::from_bytes)),
    )
        .prop_map(
            |(
                [session, boot, reported_seq],
                online,
                [version, secrets],
                max_schema,
                agent_version,
                secrets_key,
            )| {
                Presence {
                    session,
                    online,
                    boot,
                    version,
                    reported_seq,
                    max_schema,
                    agent_version,
                    secrets_key,
                    secrets,
                }
            },
        )
}

pub(crate) fn event() -> impl Strategy<Value = Event> {
    let kind = select(vec![
        EventKind::AgentStarted,
        EventKind::Ready,
        EventKind::OomKilled,
        EventKind::Adopted,
        EventKind::Signaled,
        EventKind::ProbeFailed,
        EventKind::DiskLimit,
        EventKind::Evicted,
        EventKind::DiskPressure,
        EventKind::StateWritable,
        EventKind::SecretRotated,
        EventKind::Kept,
        EventKind::LetGo,
        EventKind::TakenBack,
    ]);
    let about = option::of((name::<AppName>(), option::of(name::<ServiceName>())));
    (any::<[u64; 3]>(), kind, about, "\\PC{0,200}").prop_map(
        |([seq, boot, unix_ms], kind, about, message)| {
            let event = Event::new(seq, boot, unix_ms, kind, message);
            match about {
                Some((app, service)) => event.about(app, service),
                None => event,
            }
        },
    )
}

pub(crate) fn sealed_secrets() -> impl Strategy<Value = SealedSecrets> {
    prop::collection::vec(any::<u8>(), 0..200).prop_map(|sealed| SealedSecrets { sealed })
}

pub(crate) fn hub_info() -> impl Strategy<Value = HubInfo> {
    (
        version(),
        any::<u64>(),
        any::<[u32; 2]>(),
        any::<(u16, u16)>(),
    )
        .prop_map(
            |(version, unix_ms, [beacon_interval_ms, reconnect_spread_ms], schema_range)| HubInfo {
                epoch: version.epoch,
                unix_ms,
                beacon_interval_ms,
                reconnect_spread_ms,
                schema_range,
            },
        )
}
