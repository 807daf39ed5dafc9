//! The secrets of one container: files in its directory of the run directory, which must be in memory, and variables.
//!
//! ```text
//! containers/{id}/secrets/NAME    what the container sees in /run/secrets, owned by whom it is for
//! containers/{id}/secrets.json    which revisions those are; written last
//! ```
//!
//! The container has the directory mounted, so a file that is replaced in it is replaced in there.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::{
    DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _,
};
use std::path::Path;

use foreshore_protocol::id::SecretName;
use foreshore_protocol::manifest::{OnRotate, SecretMount, Service};
use foreshore_protocol::secret::{Secret, SecretValue};
use nix::sys::statfs::{FsType, TMPFS_MAGIC, statfs};

use super::request::{read_json, write_json};
use super::user::User;

/// The directory of the files, below the container's.
pub(crate) const FILES: &str = "secrets";
/// The name of the file that says which revisions they are.
const REVISIONS: &str = "secrets.json";
/// linux/magic.h; memory too.
const RAMFS_MAGIC: FsType = FsType(0x8584_58f6);

/// Values by name.
pub type Values = BTreeMap<SecretName, Secret>;

/// Whether a container has any of its secrets as a file.
pub(crate) fn has_files(service: &Service) -> bool {
    service.secrets.iter().any(|mount| mount.target.is_some())
}

/// Whether a directory is in memory: nothing of a secret may reach a disk.
pub(crate) fn is_in_memory(dir: &Path) -> io::Result<bool> {
    let kind = statfs(dir)?.filesystem_type();
    Ok(kind == TMPFS_MAGIC || kind == RAMFS_MAGIC)
}

/// Writes the files of a new container; only root can read them until [`own`] gives them away.
pub(crate) fn write(dir: &Path, service: &Service, values: &Values) -> io::Result<()> {
    if service.secrets.is_empty() {
        return Ok(());
    }
    let files = dir.join(FILES);
    fs::DirBuilder::new().mode(0o755).create(&files)?;
    fs::set_permissions(&files, fs::Permissions::from_mode(0o755))?;
    for mount in &service.secrets {
        if let (Some(target), Some(secret)) = (&mount.target, values.get(&mount.source)) {
            create(&files.join(target), &secret.value)?;
        }
    }
    let revisions = service.secrets.iter().filter_map(|mount| {
        let secret = values.get(&mount.source)?;
        Some((&mount.source, secret.revision))
    });
    write_json(dir, REVISIONS, &revisions.collect::<BTreeMap<_, _>>())
}

/// Gives the files in `files` to whom they are for; `base` is what the container's id 0 is outside.
pub(crate) fn own(files: &Path, service: &Service, user: &User, base: u32) -> io::Result<()> {
    for mount in &service.secrets {
        if let Some(target) = &mount.target {
            let path = files.join(target);
            let uid = mount.uid.map_or(user.uid, |uid| uid.0);
            let gid = mount.gid.map_or(user.gid, |gid| gid.0);
            let outside = |id: u32| Some(base.saturating_add(id));
            std::os::unix::fs::chown(&path, outside(uid), outside(gid))?;
            fs::set_permissions(&path, fs::Permissions::from_mode(mount.mode.0))?;
        }
    }
    Ok(())
}

/// Replaces the files of a container that runs, but of those secrets for which it would have to be started again. Each is
/// replaced at once, and belongs to whom the one before did. `then` is done before the revisions are written, so that it is
/// done again when it was cut.
pub(crate) fn renew(
    dir: &Path,
    service: &Service,
    values: &Values,
    then: impl FnOnce() -> io::Result<()>,
) -> io::Result<()> {
    let mut revisions = revisions(dir)?;
    let files = dir.join(FILES);
    let live = |mount: &&SecretMount| mount.on_rotate != OnRotate::Restart;
    for mount in service.secrets.iter().filter(live) {
        let Some(secret) = values.get(&mount.source) else {
            continue;
        };
        if let Some(target) = &mount.target {
            let (path, fresh) = (files.join(target), files.join(format!(".{target}.new")));
            let before = fs::metadata(&path)?;
            match fs::remove_file(&fresh) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            create(&fresh, &secret.value)?;
            std::os::unix::fs::chown(&fresh, Some(before.uid()), Some(before.gid()))?;
            fs::set_permissions(&fresh, fs::Permissions::from_mode(before.mode() & 0o777))?;
            fs::rename(&fresh, &path)?;
        }
        revisions.insert(mount.source.clone(), secret.revision);
    }
    then()?;
    write_json(dir, REVISIONS, &revisions)
}

/// Which revisions a container has.
pub(crate) fn revisions(dir: &Path) -> io::Result<BTreeMap<SecretName, u64>> {
    match read_json(&dir.join(REVISIONS)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(BTreeMap::new()),
        other => other,
    }
}

/// The variables that hold secrets; the name of one that is no text is the error.
pub(crate) fn environment(
    service: &Service,
    values: &Values,
) -> Result<BTreeMap<String, SecretValue>, SecretName> {
    let mounts = service.secrets.iter();
    let pairs = mounts.filter_map(|mount| {
        let (variable, secret) = (mount.environment.as_ref()?, values.get(&mount.source)?);
        Some(match secret.value.as_text() {
            Some(_) => Ok((variable.clone(), secret.value.clone())),
            None => Err(mount.source.clone()),
        })
    });
    pairs.collect()
}

fn create(path: &Path, value: &SecretValue) -> io::Result<()> {
    let mut file = File::options()
        .write(true)
        .create_new(true)
        .mode(0o400)
        .open(path)?;
    file.write_all(value.expose())
}
