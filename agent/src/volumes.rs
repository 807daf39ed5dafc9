//! The named volumes of this device: they outlive releases, apps and the agent, and go only when an operator says so.
//!
//! `volumes/{app}/{name}` below the state directory. What is being removed is `volumes/{app}/.gone-{name}`: no name of a
//! volume begins with a dot, so it is none any more, whatever becomes of the removal.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use foreshore_protocol::AppName;
use foreshore_protocol::id::VolumeName;
use foreshore_protocol::manifest::VolumeSource;
use rustix::fs::{CWD, RenameFlags, renameat_with};
use serde::Serialize;

use crate::runtime::ContainerId;
use crate::runtime::request::{REQUEST, Request, read_json};

/// `APP/NAME`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeId {
    /// Which app's.
    pub app: AppName,
    /// Which.
    pub name: VolumeName,
}

impl FromStr for VolumeId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            let text: String = text.chars().take(140).collect();
            format!("{text:?} is not a volume; write APP/NAME, as `volume list` shows them")
        };
        let (app, name) = text.split_once('/').ok_or_else(wrong)?;
        Ok(Self {
            app: app.parse().map_err(|_| wrong())?,
            name: name.parse().map_err(|_| wrong())?,
        })
    }
}

/// One volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Volume {
    /// Of which app.
    pub app: String,
    /// Its name in the app.
    pub volume: String,
    /// Where its files are.
    pub path: PathBuf,
    /// Containers that have it, running or ended; it cannot be removed before they are.
    pub used_by: Vec<String>,
}

/// Why volumes could not be listed, or one not removed.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// There is none of that name.
    #[error("there is no volume {0}; `foreshore-agent volume list` shows those that there are")]
    Unknown(String),
    /// A container has it.
    #[error(
        "volume {volume} is used by container {container}; remove its app from this device first"
    )]
    InUse {
        /// Which volume.
        volume: String,
        /// By whom.
        container: String,
    },
    /// The operating system refused something.
    #[error("failed to {act}")]
    Io {
        /// What was tried, naming the path.
        act: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

fn failed(act: &str, path: &Path) -> impl FnOnce(io::Error) -> VolumeError {
    let act = format!("{act} {}", path.display());
    move |source| VolumeError::Io { act, source }
}

/// Every volume, by app and name. Needs no agent, and may run beside one.
///
/// # Errors
///
/// [`VolumeError::Io`].
pub fn list(state: &Path, run: &Path) -> Result<Vec<Volume>, VolumeError> {
    let users = users(run)?;
    let root = state.join("volumes");
    let mut volumes = Vec::new();
    for app in names::<AppName>(&root)? {
        for name in names::<VolumeName>(&root.join(app.as_str()))? {
            volumes.push(Volume {
                path: root.join(app.as_str()).join(name.as_str()),
                used_by: used_by(&users, &app, &name),
                app: app.to_string(),
                volume: name.to_string(),
            });
        }
    }
    Ok(volumes)
}

/// Deletes a volume with all that is in it. It is gone in one step: cut by a power loss, it is there whole or not at all.
/// A container that is started meanwhile has it whole, and then it stays, or gets a new one.
///
/// # Errors
///
/// See [`VolumeError`].
pub fn remove(state: &Path, run: &Path, id: &VolumeId) -> Result<(), VolumeError> {
    let dir = state.join("volumes").join(id.app.as_str());
    let path = dir.join(id.name.as_str());
    let gone = dir.join(format!(".gone-{}", id.name));
    let in_use = || -> Result<(), VolumeError> {
        match used_by(&users(run)?, &id.app, &id.name).pop() {
            None => Ok(()),
            Some(container) => Err(VolumeError::InUse {
                volume: format!("{}/{}", id.app, id.name),
                container,
            }),
        }
    };
    in_use()?;
    // Of a removal that was cut.
    remove_tree(&gone)?;
    match fs::rename(&path, &gone) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(VolumeError::Unknown(format!("{}/{}", id.app, id.name)));
        }
        renamed => renamed.map_err(failed("remove", &path))?,
    }
    if let Err(error) = in_use()
        && renameat_with(CWD, &gone, CWD, &path, RenameFlags::NOREPLACE).is_ok()
    {
        return Err(error);
    }
    remove_tree(&gone)?;
    // Of an app without volumes nothing stays.
    let _ = fs::remove_dir(&dir);
    Ok(())
}

fn remove_tree(path: &Path) -> Result<(), VolumeError> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed.map_err(failed("delete", path)),
    }
}

/// The entries of a directory that are names of this kind, sorted; none when there is no directory.
fn names<T: FromStr + Ord>(dir: &Path) -> Result<Vec<T>, VolumeError> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(failed("read", dir))?,
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.map_err(failed("read", dir))?;
        let is_dir = entry.file_type().is_ok_and(|kind| kind.is_dir());
        let name = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok());
        names.extend(name.filter(|_| is_dir));
    }
    names.sort();
    Ok(names)
}

/// A container that may have volumes.
#[derive(Debug)]
struct User {
    id: ContainerId,
    /// Missing when it cannot be read: then it might have any of its app's.
    volumes: Option<Vec<VolumeName>>,
}

/// Every container.
fn users(run: &Path) -> Result<Vec<User>, VolumeError> {
    let containers = run.join("containers");
    let volumes_of = |id: &ContainerId| {
        let request = containers.join(id.to_string()).join(REQUEST);
        let service = read_json::<Request>(&request).ok()?.service;
        let sources = service.volumes.into_iter().map(|volume| volume.source);
        let named = sources.filter_map(|source| match source {
            VolumeSource::Named(name) => Some(name),
            VolumeSource::Bind(_) => None,
        });
        Some(named.collect())
    };
    let user = |id| User {
        volumes: volumes_of(&id),
        id,
    };
    let ids = names::<ContainerId>(&containers)?;
    Ok(ids.into_iter().map(user).collect())
}

fn used_by(users: &[User], app: &AppName, name: &VolumeName) -> Vec<String> {
    let has = |user: &&User| {
        let volumes = user.volumes.as_ref();
        user.id.app == *app && volumes.is_none_or(|volumes| volumes.contains(name))
    };
    users
        .iter()
        .filter(has)
        .map(|user| user.id.to_string())
        .collect()
}

/// Volumes as `volume list` shows them to people.
#[must_use]
pub fn table(volumes: &[Volume]) -> String {
    if volumes.is_empty() {
        return "no volumes\n".to_owned();
    }
    let mut text = format!("{:<40} {}\n", "VOLUME", "USED BY");
    for volume in volumes {
        let users = match volume.used_by.as_slice() {
            [] => "nobody".to_owned(),
            users => users.join(", "),
        };
        let name = format!("{}/{}", volume.app, volume.volume);
        text.push_str(&format!("{name:<40} {users}\n"));
    }
    text
}
