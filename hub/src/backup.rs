//! A hub's data in another directory: how a backup is written while the hub runs, and how one becomes a hub again.
//!
//! A backup is a directory: the database as of one moment, the hub's secrets, and by wish its images. The database of a
//! restored hub is older than what devices have seen since, so restoring begins a new epoch; see
//! [`crate::store::desired::begin_epoch`].

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use foreshore_protocol::id::Epoch;
use rusqlite::{Connection, OpenFlags};

use crate::rollout::UnixMs;
use crate::secrets;
use crate::store::{self, StoreError};

/// The database's file in a data directory and in a backup.
pub const DATABASE: &str = "hub.db";
/// The directory of images in a data directory and in a backup.
pub const IMAGES: &str = "images";

/// Why no backup was written, or none restored.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// There is no hub's data.
    #[error("{} holds no {DATABASE}", .0.display())]
    NoDatabase(PathBuf),
    /// Something is there already, and is not written over.
    #[error("{} is not empty; give a directory that is, or that does not exist", .0.display())]
    NotEmpty(PathBuf),
    /// A hub has its data there already.
    #[error("{} holds a {DATABASE} already; move it away first", .0.display())]
    Occupied(PathBuf),
    /// The filesystem failed.
    #[error("{verb} {}", path.display())]
    Io {
        /// What was done: "failed to …".
        verb: &'static str,
        /// With which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// SQLite failed.
    #[error("failed to copy the database {}", path.display())]
    Database {
        /// Of which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: rusqlite::Error,
    },
    /// The backup's database is damaged, or of a newer hub.
    #[error("the database of the backup cannot be used")]
    Store(#[from] StoreError),
}

/// What a backup holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Contents {
    /// Devices that the database knows.
    pub devices: u64,
    /// Bytes of images that were copied.
    pub image_bytes: u64,
}

/// Writes a backup of the data directory `data` to `to`, a directory that is empty or not there (made with mode 0700). The hub
/// may run: the database is copied as of one moment (SQLite's `VACUUM INTO`), and blobs never change. What stands in `to`
/// once this returns is on the disk; when it fails, `to` is to be thrown away.
///
/// # Errors
///
/// See [`BackupError`].
pub fn write(data: &Path, to: &Path, images: bool) -> Result<Contents, BackupError> {
    let database = data.join(DATABASE);
    if !database.is_file() {
        return Err(BackupError::NoDatabase(data.to_owned()));
    }
    make(to)?;
    let copy = to.join(DATABASE);
    // Only its owner reads it: it holds secrets.
    File::options()
        .create_new(true)
        .write(true)
        .mode(0o600)
        .open(&copy)
        .map_err(|source| BackupError::Io {
            verb: "failed to make",
            path: copy.clone(),
            source,
        })?;
    let failed = |source| BackupError::Database {
        path: database.clone(),
        source,
    };
    let connection = Connection::open_with_flags(&database, OpenFlags::SQLITE_OPEN_READ_WRITE)
        .map_err(failed)?;
    connection
        .busy_timeout(std::time::Duration::from_secs(30))
        .and_then(|()| connection.execute("VACUUM INTO ?1", [copy.to_string_lossy()]))
        .map_err(failed)?;
    sync(&copy)?;
    copy_secrets(data, to)?;
    let image_bytes = if images {
        copy_tree(&data.join(IMAGES), &to.join(IMAGES))?
    } else {
        0
    };
    sync(to)?;
    let devices = connection
        .query_row("SELECT count(*) FROM device", [], |row| row.get(0))
        .map_err(failed)?;
    Ok(Contents {
        devices,
        image_bytes,
    })
}

/// Makes a data directory `data` of the backup `from` at `now`, and begins a new epoch. `data` must hold no database; images that are
/// there stay.
///
/// # Errors
///
/// See [`BackupError`].
pub fn restore(from: &Path, data: &Path, now: UnixMs) -> Result<(Epoch, Contents), BackupError> {
    let copy = from.join(DATABASE);
    if !copy.is_file() {
        return Err(BackupError::NoDatabase(from.to_owned()));
    }
    let database = data.join(DATABASE);
    if database.exists() {
        return Err(BackupError::Occupied(data.to_owned()));
    }
    directory(data)?;
    let image_bytes = if from.join(IMAGES).is_dir() {
        copy_tree(&from.join(IMAGES), &data.join(IMAGES))?
    } else {
        0
    };
    copy_secrets(from, data)?;
    // A write-ahead log of another database would be played into this one.
    for name in ["hub.db-wal", "hub.db-shm", "hub.db-journal"] {
        remove(&data.join(name))?;
    }
    // Under its name only once it belongs to the new epoch: a hub that starts before knows nothing rather than too much.
    let half = data.join("hub.db.restoring");
    // So would the journal of a restore that was cut off.
    for name in ["", "-wal", "-shm", "-journal"] {
        remove(&data.join(format!("hub.db.restoring{name}")))?;
    }
    copy_file(&copy, &half)?;
    let failed = |source| BackupError::Database {
        path: half.clone(),
        source,
    };
    let mut connection = Connection::open(&half).map_err(failed)?;
    store::schema::migrate(&mut connection)?;
    let (epoch, devices) = connection
        .transaction()
        .and_then(|transaction| {
            let epoch = store::desired::begin_epoch(&transaction, now)?;
            let devices =
                transaction.query_row("SELECT count(*) FROM device", [], |row| row.get(0))?;
            transaction.commit()?;
            Ok((epoch, devices))
        })
        .map_err(failed)?;
    connection.close().map_err(|(_, source)| failed(source))?;
    sync(&half)?;
    fs::rename(&half, &database).map_err(|source| BackupError::Io {
        verb: "failed to put in place",
        path: database,
        source,
    })?;
    sync(data)?;
    Ok((
        epoch,
        Contents {
            devices,
            image_bytes,
        },
    ))
}

fn make(to: &Path) -> Result<(), BackupError> {
    directory(to)?;
    let mut entries = fs::read_dir(to).map_err(|source| BackupError::Io {
        verb: "failed to look into",
        path: to.to_owned(),
        source,
    })?;
    if entries.next().is_some() {
        return Err(BackupError::NotEmpty(to.to_owned()));
    }
    Ok(())
}

fn directory(path: &Path) -> Result<(), BackupError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|source| BackupError::Io {
            verb: "failed to make",
            path: path.to_owned(),
            source,
        })
}

fn copy_secrets(from: &Path, to: &Path) -> Result<(), BackupError> {
    for name in secrets::FILES {
        let file = from.join(name);
        if file.is_file() {
            copy_file(&file, &to.join(name))?;
        }
    }
    Ok(())
}

/// Copies files and directories, and nothing else; how many bytes. Uploads that are under way are not waited for.
fn copy_tree(from: &Path, to: &Path) -> Result<u64, BackupError> {
    let failed = |source| BackupError::Io {
        verb: "failed to look into",
        path: from.to_owned(),
        source,
    };
    directory(to)?;
    let mut bytes = 0;
    for entry in fs::read_dir(from).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let kind = entry.file_type().map_err(failed)?;
        let (path, target) = (entry.path(), to.join(entry.file_name()));
        if kind.is_dir() && entry.file_name() != "uploads" {
            bytes += copy_tree(&path, &target)?;
        } else if kind.is_file() {
            bytes += copy_file(&path, &target)?;
        }
    }
    sync(to)?;
    Ok(bytes)
}

/// With its mode; on the disk once this returns.
fn copy_file(from: &Path, to: &Path) -> Result<u64, BackupError> {
    let bytes = fs::copy(from, to).map_err(|source| BackupError::Io {
        verb: "failed to copy",
        path: from.to_owned(),
        source,
    })?;
    sync(to)?;
    Ok(bytes)
}

fn sync(path: &Path) -> Result<(), BackupError> {
    File::open(path)
        .and_then(|file| file.sync_all())
        .map_err(|source| BackupError::Io {
            verb: "failed to write out",
            path: path.to_owned(),
            source,
        })
}

fn remove(path: &Path) -> Result<(), BackupError> {
    match fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(BackupError::Io {
            verb: "failed to remove",
            path: path.to_owned(),
            source,
        }),
        _ => Ok(()),
    }
}
