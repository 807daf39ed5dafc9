//! What `foreshore-agent status` shows: written by the running agent beside its containers' records, so that
//! it costs no flash, and read by anyone on the device.

use std::path::Path;

use foreshore_protocol::Version;
use foreshore_protocol::api::{ImagePullState, ImagePullView, PullView};
use foreshore_protocol::message::AppStatus;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::plan::BootMs;
use crate::runtime::{Container, ContainerState};

const FILE: &str = "status.json";

/// Of its own, since it is written every second while images are fetched.
const PULL_FILE: &str = "pulling.json";

/// What was said longer ago than this of a pull says nothing of its rate.
const STALE_MS: u64 = 10_000;

/// Larger files are not ours: 4 MiB.
const BYTES_MAX: u64 = 4 << 20;

/// What the agent last said.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Published {
    /// The newest desired state that it has.
    pub version: Option<Version>,
    /// As reported to the hub.
    pub apps: Vec<AppStatus>,
    /// Every container, also of apps that are not wanted any more.
    pub containers: Vec<ContainerLine>,
}

/// One container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ContainerLine {
    /// `APP.SERVICE.INSTANCE`.
    pub id: String,
    /// What it does.
    pub state: Doing,
    /// Of its first process, if it runs.
    pub pid: Option<i32>,
    /// If it ended; 128 + signal number if a signal ended it.
    pub exit_code: Option<i32>,
}

/// What a container does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Doing {
    /// Runs.
    Running,
    /// Ended.
    Exited,
    /// Left over from something that was cut short.
    Broken,
}

impl From<&Container> for ContainerLine {
    fn from(container: &Container) -> Self {
        let (state, pid, exit_code) = match container.state {
            ContainerState::Running { pid, .. } => (Doing::Running, Some(pid), None),
            ContainerState::Exited(exit) => (Doing::Exited, None, Some(exit.code)),
            ContainerState::Broken => (Doing::Broken, None, None),
        };
        Self {
            id: container.id.to_string(),
            state,
            pid,
            exit_code,
        }
    }
}

impl std::fmt::Display for Doing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Running => "running",
            Self::Exited => "exited",
            Self::Broken => "broken",
        })
    }
}

/// How far a pull was, and when.
#[derive(Serialize, Deserialize)]
struct Pull {
    at: u64,
    pull: PullView,
}

/// Writes what the agent says now. That it cannot is not worth stopping for, and is logged.
pub fn publish(run: &Path, published: &Published) {
    write(run, FILE, published);
}

/// What the agent last said; `None` when there is nothing, or nothing that reads.
#[must_use]
pub fn published(run: &Path) -> Option<Published> {
    read(run, FILE)
}

/// Writes how far a pull is at `now`.
pub(crate) fn publish_pull(run: &Path, pull: &PullView, now: BootMs) {
    let pull = pull.clone();
    write(run, PULL_FILE, &Pull { at: now.0, pull });
}

/// There is none any more.
pub(crate) fn forget_pull(run: &Path) {
    let _none_there = std::fs::remove_file(run.join(PULL_FILE));
}

/// How far the agent is with fetching images; `None` when it fetches none. Only worth something while an agent runs. Without
/// a rate when it said nothing for 10 s before `now`, since then nothing came.
#[must_use]
pub fn pull(run: &Path, now: BootMs) -> Option<PullView> {
    let Pull { at, mut pull } = read(run, PULL_FILE)?;
    if now.0.saturating_sub(at) > STALE_MS {
        pull.rate_bytes = 0;
        for image in &mut pull.images {
            image.remaining_s = None;
        }
    }
    Some(pull)
}

/// One image of a pull for people: `45% of 12.0 MiB, 1.0 MiB/s, 7 s left`.
#[must_use]
pub fn pull_line(pull: &PullView, image: &ImagePullView) -> String {
    match image.state {
        ImagePullState::Waiting => "waiting".to_owned(),
        ImagePullState::Staged => "here".to_owned(),
        ImagePullState::Fetching => {
            let fetched = image.fetched_bytes.unwrap_or_default();
            let total = image.total_bytes.unwrap_or_default();
            // All of it was here already, or has come.
            let percent = (u128::from(fetched) * 100)
                .checked_div(u128::from(total))
                .unwrap_or(100);
            let of = format!("{} of {} ({percent}%)", mib(fetched), mib(total));
            match image.remaining_s {
                _ if fetched >= total => format!("{of}, is being unpacked"),
                Some(seconds) => format!("{of}, {}/s, {seconds} s left", mib(pull.rate_bytes)),
                None => format!("{of}, nothing comes"),
            }
        }
    }
}

fn mib(bytes: u64) -> String {
    let tenths = u128::from(bytes) * 10 / (1 << 20);
    format!("{}.{} MiB", tenths / 10, tenths % 10)
}

fn write(run: &Path, name: &str, what: &impl Serialize) {
    let bytes = serde_json::to_vec(what).expect("string keys and plain values serialize");
    let temporary = run.join(format!("{name}.new"));
    let written = std::fs::create_dir_all(run)
        .and_then(|()| std::fs::write(&temporary, bytes))
        .and_then(|()| std::fs::rename(&temporary, run.join(name)));
    if let Err(error) = written {
        tracing::debug!(%error, name, "what is told to people on the device could not be written");
    }
}

fn read<T: DeserializeOwned>(run: &Path, name: &str) -> Option<T> {
    use std::io::Read as _;
    let mut bytes = Vec::new();
    let file = std::fs::File::open(run.join(name)).ok()?;
    file.take(BYTES_MAX).read_to_end(&mut bytes).ok()?;
    serde_json::from_slice(&bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_published_reads_back_and_garbage_is_nothing() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(published(dir.path()), None);
        let said = Published {
            version: Version::from_numbers(1, 2).ok(),
            apps: Vec::new(),
            containers: vec![ContainerLine {
                id: "shop.web.1".to_owned(),
                state: Doing::Running,
                pid: Some(7),
                exit_code: None,
            }],
        };
        publish(dir.path(), &said);
        assert_eq!(published(dir.path()), Some(said));
        std::fs::write(dir.path().join(FILE), b"{").unwrap();
        assert_eq!(published(dir.path()), None);
    }

    #[test]
    fn a_pull_reads_back_has_no_rate_when_it_is_old_and_is_told_in_words() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(pull(dir.path(), BootMs(0)), None);
        let image = |state, bytes: Option<(u64, u64)>, remaining_s| ImagePullView {
            image: "h/r@sha256:00".to_owned(),
            state,
            fetched_bytes: bytes.map(|(fetched, _)| fetched),
            total_bytes: bytes.map(|(_, total)| total),
            remaining_s,
        };
        const MIB: u64 = 1 << 20;
        let some = Some((9 * MIB, 20 * MIB));
        let view = PullView {
            release: foreshore_protocol::Digest::of(b"release"),
            rate_bytes: 3 * MIB / 2,
            images: vec![
                image(ImagePullState::Staged, None, None),
                image(ImagePullState::Fetching, some, Some(8)),
                image(ImagePullState::Fetching, Some((MIB, MIB)), Some(0)),
                image(ImagePullState::Fetching, Some((0, 0)), None),
                image(ImagePullState::Waiting, None, None),
            ],
        };
        publish_pull(dir.path(), &view, BootMs(1000));
        assert_eq!(pull(dir.path(), BootMs(11_000)), Some(view.clone()));
        let told = |view: &PullView| -> Vec<String> {
            let images = view.images.iter();
            images.map(|image| pull_line(view, image)).collect()
        };
        let lines = [
            "here",
            "9.0 MiB of 20.0 MiB (45%), 1.5 MiB/s, 8 s left",
            "1.0 MiB of 1.0 MiB (100%), is being unpacked",
            "0.0 MiB of 0.0 MiB (100%), is being unpacked",
            "waiting",
        ];
        assert_eq!(told(&view), lines);
        let old = pull(dir.path(), BootMs(11_001)).unwrap();
        assert_eq!(old.rate_bytes, 0);
        assert_eq!(told(&old)[1], "9.0 MiB of 20.0 MiB (45%), nothing comes");
        std::fs::write(dir.path().join(PULL_FILE), b"{").unwrap();
        assert_eq!(pull(dir.path(), BootMs(0)), None);
    }
}
