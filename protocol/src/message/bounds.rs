//! How much a message may hold, so that a receiver knows what it stores and shows.
//!
//! A frame is small, but numbers of things and lengths of texts end up in tables, logs and pages.

use super::{
    AppStatus, Beacon, Command, Event, Events, Head, HubInfo, Inventory, Lease, LeaseRequest,
    Presence, PullProgress, Reported, Windows, Zone,
};
use crate::id::AppName;
use crate::manifest::MAX_SERVICES;

/// Apps in a [`Head`] or [`Reported`].
pub const MAX_APPS: usize = 256;

/// Disruption budgets in a [`Head`].
pub const MAX_BUDGETS: usize = 16;

/// Labels that the devices of a disruption budget's group have in common.
pub const MAX_GROUP_LABELS: usize = 8;

/// Bytes of a POSIX `TZ` string ([`Zone::Posix`]); the longest of today's zones has 33.
pub const MAX_ZONE_BYTES: usize = 64;

/// How long a window may stay open, in milliseconds: 7 days.
pub const MAX_WINDOW_MS: u64 = 7 * 24 * 3_600_000;

/// Bytes of a text for people: [`super::Reason::message`] and [`Event::message`].
pub const MAX_TEXT_BYTES: usize = 512;

/// Bytes of a text about a device, such as its kernel's version.
pub const MAX_FACT_BYTES: usize = 256;

/// Nodes in an [`Inventory`].
pub const MAX_DEV_NODES: usize = 128;

/// Events in [`Events`]: so many of the longest fit into a frame.
pub const MAX_EVENTS: usize = 64;

/// Labels in an [`Inventory`].
pub const MAX_LABELS: usize = 64;

/// Services in an [`AppStatus`]: those of the release that runs and of the one that comes.
pub const MAX_SERVICE_STATES: usize = 2 * MAX_SERVICES;

/// The beginning of `text` that fits into `max_bytes`, cut between characters.
#[must_use]
pub fn fit(text: &str, max_bytes: usize) -> &str {
    &text[..text.floor_char_boundary(max_bytes)]
}

/// `text`, cut to [`MAX_TEXT_BYTES`] between characters.
pub(super) fn text(text: impl Into<String>) -> String {
    let mut text = text.into();
    text.truncate(text.floor_char_boundary(MAX_TEXT_BYTES));
    text
}

type Bounds = Result<(), &'static str>;

const fn ensure(holds: bool, what: &'static str) -> Bounds {
    if holds { Ok(()) } else { Err(what) }
}

fn apps<'a>(count: usize, names: impl Iterator<Item = &'a AppName>) -> Bounds {
    ensure(count <= MAX_APPS, "more than 256 apps")?;
    let mut names: Vec<_> = names.collect();
    names.sort_unstable();
    ensure(
        names.windows(2).all(|pair| pair[0] != pair[1]),
        "an app twice",
    )
}

impl Head {
    pub(crate) fn bounds(&self) -> Bounds {
        apps(self.apps.len(), self.apps.iter().map(|app| &app.app))?;
        ensure(
            self.apps.iter().all(|app| are_bounded(&app.windows)),
            "a time zone of more than 64 bytes, or a window of more than 7 days",
        )?;
        ensure(
            self.budgets.len() <= MAX_BUDGETS,
            "more than 16 disruption budgets",
        )?;
        ensure(
            self.budgets
                .iter()
                .all(|budget| budget.group.len() <= MAX_GROUP_LABELS),
            "a group of more than 8 labels",
        )
    }
}

fn are_bounded(windows: &Windows) -> bool {
    let mut all = [&windows.switch, &windows.fetch].into_iter().flatten();
    all.all(|window| {
        let zone = match &window.zone {
            Zone::Device => true,
            Zone::Posix(text) => text.len() <= MAX_ZONE_BYTES,
        };
        zone && window.open_ms <= MAX_WINDOW_MS
    })
}

impl Reported {
    pub(crate) fn bounds(&self) -> Bounds {
        self.inventory.bounds()?;
        apps(self.apps.len(), self.apps.iter().map(|app| &app.app))?;
        self.apps.iter().try_for_each(AppStatus::bounds)
    }
}

impl Reported {
    /// The same report, with less detail where it would not fit into a frame of `max_bytes`: first the device's nodes are
    /// not told, then all texts are cut to 64 bytes, then services are left out, well ones before others, and at last all that
    /// reasons say besides their code. The phase of every app and what runs is never left out.
    #[must_use]
    pub fn fitted(mut self, max_bytes: usize) -> Self {
        let fits = |report: &Self| crate::frame::encode(report).len() <= max_bytes;
        if fits(&self) {
            return self;
        }
        self.inventory.dev_nodes = None;
        if fits(&self) {
            return self;
        }
        for reason in self.apps.iter_mut().filter_map(|app| app.reason.as_mut()) {
            reason
                .message
                .truncate(reason.message.floor_char_boundary(64));
        }
        let leave_out: [fn(&mut AppStatus); 3] = [
            |app| app.services.retain(|service| !service.ready),
            |app| app.services.clear(),
            |app| {
                if let Some(reason) = &mut app.reason {
                    reason.message.clear();
                    reason.service = None;
                }
            },
        ];
        for leave_out in leave_out {
            if fits(&self) {
                break;
            }
            self.apps.iter_mut().for_each(leave_out);
        }
        self
    }
}

impl Inventory {
    fn bounds(&self) -> Bounds {
        let facts = [&self.agent_version, &self.arch, &self.kernel];
        ensure(
            facts.into_iter().all(|fact| fact.len() <= MAX_FACT_BYTES),
            "a fact about the device of more than 256 bytes",
        )?;
        ensure(self.labels.len() <= MAX_LABELS, "more than 64 labels")?;
        let nodes = self.dev_nodes.as_deref().unwrap_or_default();
        ensure(nodes.len() <= MAX_DEV_NODES, "more than 128 device nodes")?;
        ensure(
            nodes.iter().all(|node| node.len() <= MAX_FACT_BYTES),
            "the name of a device node of more than 256 bytes",
        )
    }
}

impl AppStatus {
    fn bounds(&self) -> Bounds {
        ensure(
            self.services.len() <= MAX_SERVICE_STATES,
            "more than 64 services of an app",
        )?;
        let long = self
            .reason
            .as_ref()
            .is_some_and(|reason| reason.message.len() > MAX_TEXT_BYTES);
        ensure(!long, "a reason of more than 512 bytes")
    }
}

impl Event {
    pub(crate) fn bounds(&self) -> Bounds {
        ensure(
            self.message.len() <= MAX_TEXT_BYTES,
            "a text of more than 512 bytes",
        )
    }
}

impl Events {
    pub(crate) fn bounds(&self) -> Bounds {
        ensure(self.events.len() <= MAX_EVENTS, "more than 64 events")?;
        self.events.iter().try_for_each(Event::bounds)
    }
}

impl PullProgress {
    pub(crate) fn bounds(&self) -> Bounds {
        ensure(self.images.len() <= MAX_SERVICES, "more than 32 images")?;
        ensure(
            self.images
                .iter()
                .all(|pull| pull.image.len() <= MAX_TEXT_BYTES),
            "the name of an image of more than 512 bytes",
        )
    }
}

impl Presence {
    pub(crate) fn bounds(&self) -> Bounds {
        ensure(
            self.agent_version.len() <= MAX_FACT_BYTES,
            "a fact about the device of more than 256 bytes",
        )
    }
}

macro_rules! unbounded {
    ($($message:ty),*) => {
        $(impl $message {
            pub(crate) const fn bounds(&self) -> Bounds {
                Ok(())
            }
        })*
    };
}
unbounded!(
    Beacon,
    Command,
    HubInfo,
    LeaseRequest,
    Lease,
    crate::secret::SealedSecrets
);

#[cfg(test)]
mod tests {
    use super::*;

    fn report(services: usize, labels: u32) -> Reported {
        use crate::message::{Phase, Reason, ReasonCode, ServiceState, ServiceStatus};
        let version = crate::Version::from_numbers(1 << 52, 1 << 52).unwrap();
        let name = |number: usize| format!("{number:0>63}");
        let label = |number: u32| {
            let key = format!("{number:0>63}");
            (key.parse().unwrap(), "v".repeat(63).parse().unwrap())
        };
        let app = |number: usize| AppStatus {
            app: name(number).parse().unwrap(),
            since: version,
            release: crate::Digest::of(b"1"),
            phase: Phase::RolledBack,
            reason: Some(Reason::new(
                ReasonCode::Exited,
                Some(name(0).parse().unwrap()),
                "é".repeat(300),
            )),
            running: Some(crate::Digest::of(b"2")),
            last_known_good: Some(crate::Digest::of(b"2")),
            services: (0..services)
                .map(|service| ServiceStatus {
                    service: name(service).parse().unwrap(),
                    state: ServiceState::BackOff { exit_code: -1 },
                    ready: number.is_multiple_of(2),
                    restarts: u32::MAX,
                    kept: Some(crate::message::KeptOld {
                        instance: u64::MAX,
                        release: crate::Digest::of(b"3"),
                        keep_ms: u64::MAX,
                    }),
                })
                .collect(),
        };
        Reported {
            boot: u64::MAX,
            seq: u64::MAX,
            version: Some(version),
            inventory: Inventory {
                agent_version: "0.1.0".to_owned(),
                arch: "amd64".to_owned(),
                kernel: "6.1".to_owned(),
                memory_bytes: u64::MAX,
                disk_bytes: u64::MAX,
                disk_free_bytes: u64::MAX,
                labels: (0..labels).map(label).collect(),
                disk_reserve_bytes: Some(u64::MAX),
                metered: Some(true),
                dev_nodes: Some(vec!["n".repeat(64); MAX_DEV_NODES]),
            },
            apps: (0..MAX_APPS).map(app).collect(),
        }
    }

    #[test]
    fn the_largest_report_is_fitted_into_a_frame_and_names_every_app() {
        use crate::frame::{MAX_FRAME_BYTES, decode, encode};
        for (services, labels) in [(1, 0), (4, 64), (MAX_SERVICE_STATES, 64)] {
            let large = report(services, labels);
            let fitted = large.clone().fitted(MAX_FRAME_BYTES);
            let frame = encode(&fitted);
            assert!(frame.len() <= MAX_FRAME_BYTES, "{}", frame.len());
            assert_eq!(decode::<Reported>(&frame).unwrap().apps.len(), MAX_APPS);
        }
        let mut small = report(4, 2);
        small.apps.truncate(3);
        assert_eq!(small.clone().fitted(MAX_FRAME_BYTES), small);
    }

    #[test]
    fn as_many_events_as_there_may_be_fit_into_a_frame() {
        use crate::frame::{MAX_FRAME_BYTES, encode};
        use crate::message::EventKind;
        let text = "x".repeat(MAX_TEXT_BYTES);
        let longest = Event::new(u64::MAX, u64::MAX, u64::MAX, EventKind::TakenBack, text).about(
            "a".repeat(63).parse().unwrap(),
            Some("s".repeat(63).parse().unwrap()),
        );
        let events = vec![longest; MAX_EVENTS];
        // What is left is for the topic and the rest of the packet.
        assert!(
            encode(&Events {
                kept_from: u64::MAX,
                events,
            })
            .len()
                < MAX_FRAME_BYTES - 1024
        );
    }

    #[test]
    fn texts_are_cut_between_characters() {
        assert_eq!(fit("aé", 2), "a");
        assert_eq!(fit("aé", 3), "aé");
        let long = text("é".repeat(400));
        assert_eq!(long.len(), MAX_TEXT_BYTES);
        assert_eq!(
            text("a".to_owned() + &"é".repeat(400)).len(),
            MAX_TEXT_BYTES - 1
        );
    }
}
