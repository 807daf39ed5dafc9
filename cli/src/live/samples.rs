//! One of each API object, for snapshot tests.

use foreshore_protocol::api::{
    AppView, AssignmentState, AssignmentView, DeviceView, EventView, ImagePullState, ImagePullView,
    ImageView, PullView, RolloutState, RolloutSummary, RolloutView, WaveState, WaveView,
};
use foreshore_protocol::manifest::{self, WaveTarget};
use foreshore_protocol::message::{
    AppStatus, Inventory, KeptOld, Phase, Reason, ReasonCode, ServiceState, ServiceStatus,
};
use foreshore_protocol::{Digest, Version};

/// 2026-11-21T02:25:02Z.
pub(crate) const NOW_MS: u64 = 1_795_227_902_000;

/// In its second of three waves, with one failure.
pub(crate) fn rollout() -> RolloutView {
    let wave = |ordinal, target, state, devices, succeeded, failed| WaveView {
        ordinal,
        target,
        state,
        devices,
        succeeded,
        failed,
        deferred: 0,
        bake_until_ms: None,
        needs_approval: false,
        analysis: Vec::new(),
    };
    let part = |device: &str, wave, state, message: Option<&str>| AssignmentView {
        device: device.parse().unwrap(),
        wave,
        tail: false,
        state,
        via: None,
        message: message.map(str::to_owned),
        pull: None,
    };
    RolloutView {
        id: 7,
        app: "gateway".parse().unwrap(),
        from: Some(Digest::of(b"v1")),
        to: Digest::of(b"v2"),
        state: RolloutState::Running,
        message: None,
        start_at_ms: None,
        tail: None,
        waves: vec![
            wave(1, WaveTarget::Count(1), WaveState::Passed, 1, 1, 0),
            wave(2, WaveTarget::Percent(60), WaveState::Open, 2, 0, 1),
            wave(3, WaveTarget::Percent(100), WaveState::Pending, 2, 0, 0),
        ],
        assignments: vec![
            part("gw-3", 1, AssignmentState::Device(Phase::Succeeded), None),
            part("gw-1", 2, AssignmentState::Device(Phase::Soaking), None),
            part(
                "gw-5",
                2,
                AssignmentState::Device(Phase::RolledBack),
                Some("web: not ready in time"),
            ),
            part("gw-2", 3, AssignmentState::Planned, None),
            part("gw-4", 3, AssignmentState::Planned, None),
        ],
        created_ms: NOW_MS - 95_000,
        finished_ms: None,
    }
}

/// Online, went back from a bad release.
pub(crate) fn device() -> DeviceView {
    DeviceView {
        id: "gw-3".parse().unwrap(),
        online: true,
        last_seen_ms: Some(NOW_MS - 4000),
        held: None,
        labels: [("role".parse().unwrap(), "gateway".parse().unwrap())].into(),
        desired: Some(Version::from_numbers(1, 12).unwrap()),
        reported: Some(Version::from_numbers(1, 11).unwrap()),
        inventory: Some(Inventory {
            agent_version: "0.1.0".to_owned(),
            arch: "arm64".to_owned(),
            kernel: "6.1.0-56".to_owned(),
            memory_bytes: 1 << 30,
            disk_bytes: 16 << 30,
            disk_free_bytes: 9 << 30,
            disk_reserve_bytes: None,
            metered: None,
            dev_nodes: None,
            labels: [].into(),
        }),
        apps: vec![AppStatus {
            app: "gateway".parse().unwrap(),
            since: Version::from_numbers(1, 11).unwrap(),
            release: Digest::of(b"v3"),
            phase: Phase::RolledBack,
            reason: Some(Reason {
                code: ReasonCode::NotReady,
                service: Some("web".parse().unwrap()),
                message: "GET /ready answered 500".to_owned(),
            }),
            running: Some(Digest::of(b"v2")),
            last_known_good: Some(Digest::of(b"v2")),
            services: vec![ServiceStatus {
                service: "web".parse().unwrap(),
                state: ServiceState::BackOff { exit_code: 137 },
                ready: false,
                restarts: 2,
                kept: Some(KeptOld {
                    instance: 7,
                    release: Digest::of(b"v2"),
                    keep_ms: 3_600_000,
                }),
            }],
        }],
        pull: None,
        secrets_key: Some("0123456789abcdef".to_owned()),
        untrusted_key: None,
    }
}

/// In the middle of the second of three images.
pub(crate) fn pull() -> PullView {
    let image = |name: &str, state, bytes: Option<(u64, u64)>| ImagePullView {
        image: format!("registry.example/{name}"),
        state,
        fetched_bytes: bytes.map(|(fetched, _)| fetched),
        total_bytes: bytes.map(|(_, total)| total),
        remaining_s: bytes.map(|_| 70),
    };
    PullView {
        release: Digest::of(b"v2"),
        rate_bytes: 512 << 10,
        images: vec![
            image("db:1", ImagePullState::Staged, None),
            image(
                "web:2",
                ImagePullState::Fetching,
                Some((29 << 20, 64 << 20)),
            ),
            image("x:3", ImagePullState::Waiting, None),
        ],
    }
}

/// Of a container that ended.
pub(crate) fn event() -> EventView {
    EventView {
        id: 42,
        received_ms: NOW_MS - 1000,
        device: Some("gw-3".parse().unwrap()),
        app: Some("gateway".parse().unwrap()),
        service: Some("web".parse().unwrap()),
        rollout: None,
        kind: "exited".to_owned(),
        message: "ended with 137".to_owned(),
    }
}

/// For two platforms.
pub(crate) fn image() -> ImageView {
    ImageView {
        reference: "hub.internal/demo:v2".to_owned(),
        digest: Digest::of(b"image"),
        size_bytes: 1_234_567,
        platforms: vec!["linux/amd64".to_owned(), "linux/arm64".to_owned()],
        imported_ms: NOW_MS - 7_200_000,
    }
}

/// With one service and defaults.
pub(crate) fn app() -> AppView {
    let manifest = manifest::parse(
        b"apiVersion: foreshore/v1\nkind: App\nmetadata: {name: gateway}\n\
          spec:\n  selector: {matchLabels: {role: gateway}}\n  services:\n    web: {image: 'hub.internal/demo:v2', mem_limit: 32m}\n",
    )
    .unwrap();
    AppView {
        name: "gateway".parse().unwrap(),
        release: Digest::of(b"v2"),
        manifest,
        devices: 5,
        up_to_date: 3,
        rollout: Some(RolloutSummary {
            id: 7,
            state: RolloutState::Running,
            message: None,
        }),
        created_ms: NOW_MS - 86_400_000,
        updated_ms: NOW_MS - 95_000,
        deleting: false,
    }
}
