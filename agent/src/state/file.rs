//! One state file: framed like the wire, written temp → fsync → rename → fsync directory.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};

use foreshore_killpoint as killpoint;
use foreshore_protocol::frame::{HEADER_LEN, MAGIC};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// The largest state file that is read or written: 16 MiB. A history has a few hundred bytes for each service that
/// may run; 256 apps of 32 services, all in trouble with the longest text, stay below.
const MAX_FILE_BYTES: usize = 16 << 20;

/// How many damaged copies of one file are kept for people to look at.
const COPIES_MAX: u32 = 4;

/// What files being written are called until they are whole.
const TEMPORARY: &str = ".new";

/// A value with a file form. Ids from 0x0100 are files, below are messages; a changed shape gets a new id.
pub(super) trait Framed: Serialize + DeserializeOwned {
    /// The id of its current shape.
    const SCHEMA: u16;
}

/// What was damaged and set aside, for people.
#[derive(Debug, Default)]
pub(super) struct Damage(pub(super) Vec<String>);

/// The file system refused something.
#[derive(Debug, thiserror::Error)]
#[error("failed to {act} {}", path.display())]
pub struct FileError {
    act: &'static str,
    path: PathBuf,
    #[source]
    source: io::Error,
}

impl Damage {
    /// Goes on where a write failed only because the medium takes none; says so once per place.
    pub(super) fn bear(&mut self, written: Result<(), FileError>) -> Result<(), FileError> {
        match written {
            Err(error) if error.is_unwritable() => {
                self.0.push(format!("{error}: {}", error.source));
                Ok(())
            }
            written => written,
        }
    }
}

impl FileError {
    pub(super) fn new(act: &'static str, path: &Path, source: io::Error) -> Self {
        Self {
            act,
            path: path.to_owned(),
            source,
        }
    }

    /// Whether the disk is full or out of quota.
    #[must_use]
    pub fn is_disk_full(&self) -> bool {
        matches!(
            self.source.kind(),
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
        )
    }

    /// Whether the medium takes no writes now, whoever asks: full, read-only or failing. What is on it can
    /// still be run.
    #[must_use]
    pub fn is_unwritable(&self) -> bool {
        self.is_disk_full()
            || self.source.kind() == io::ErrorKind::ReadOnlyFilesystem
            || self.source.raw_os_error() == Some(libc::EIO)
    }
}

/// `[magic][schema u16][flags][CRC-32][postcard body]`, as in [`foreshore_protocol::frame`].
pub(super) fn encode<T: Framed>(value: &T) -> Vec<u8> {
    let body = postcard::to_allocvec(value).expect("state serializes into a growing buffer");
    let mut bytes = header_of(T::SCHEMA, &body).to_vec();
    bytes.extend_from_slice(&body);
    bytes
}

/// The value in a frame, or what is wrong with it.
pub(super) fn decode_value<T: Framed>(bytes: &[u8]) -> Result<T, String> {
    let (header, body) = bytes
        .split_at_checked(HEADER_LEN)
        .ok_or("it is cut short")?;
    if header[..2] != MAGIC {
        return Err("it does not begin like a state file".to_owned());
    }
    let schema = u16::from_le_bytes([header[2], header[3]]);
    if schema != T::SCHEMA {
        return Err(format!(
            "it has schema {schema:#06x}, not {:#06x}",
            T::SCHEMA
        ));
    }
    if header != header_of(T::SCHEMA, body) {
        return Err("its checksum is wrong".to_owned());
    }
    postcard::from_bytes(body).map_err(|_| "its content does not decode".to_owned())
}

fn header_of(schema: u16, body: &[u8]) -> [u8; HEADER_LEN] {
    let mut header = [0; HEADER_LEN];
    header[..2].copy_from_slice(&MAGIC);
    header[2..4].copy_from_slice(&schema.to_le_bytes());
    header[5..].copy_from_slice(&crc32fast::hash(body).to_le_bytes());
    header
}

/// Reads a value; a damaged file is set aside and counts as missing.
pub(super) fn read_framed<T: Framed>(
    path: &Path,
    damage: &mut Damage,
) -> Result<Option<T>, FileError> {
    match read_value(path)? {
        None => Ok(None),
        Some(Ok(value)) => Ok(Some(value)),
        Some(Err(why)) => {
            let aside = set_aside(path, &why, damage);
            damage.bear(aside).map(|()| None)
        }
    }
}

/// Reads a value and leaves a damaged file where it is.
pub(super) fn peek_framed<T: Framed>(
    path: &Path,
    damage: &mut Damage,
) -> Result<Option<T>, FileError> {
    match read_value(path)? {
        None => Ok(None),
        Some(Ok(value)) => Ok(Some(value)),
        Some(Err(why)) => {
            damage.0.push(format!("{}: {why}", path.display()));
            Ok(None)
        }
    }
}

fn read_value<T: Framed>(path: &Path) -> Result<Option<Result<T, String>>, FileError> {
    Ok(read_bounded(path, MAX_FILE_BYTES)?.map(|bytes| {
        if bytes.len() > MAX_FILE_BYTES {
            Err("it is too large".to_owned())
        } else {
            decode_value(&bytes)
        }
    }))
}

/// At most `max + 1` bytes of a file; `None` when there is none. A medium that cannot read it any more (EIO)
/// gives an empty file, so that it is set aside like any damaged one.
pub(super) fn read_bounded(path: &Path, max: usize) -> Result<Option<Vec<u8>>, FileError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(FileError::new("open", path, error)),
    };
    let mut bytes = Vec::new();
    match file.take(max as u64 + 1).read_to_end(&mut bytes) {
        Ok(_) => Ok(Some(bytes)),
        Err(error) if error.raw_os_error() == Some(libc::EIO) => Ok(Some(Vec::new())),
        Err(error) => Err(FileError::new("read", path, error)),
    }
}

/// Writes a value so that after a crash at any point the file is the old or the new one.
pub(super) fn write_framed<T: Framed>(path: &Path, value: &T) -> Result<(), FileError> {
    write_atomically(path, &encode(value))
}

/// As [`write_framed`], for bytes.
pub(super) fn write_atomically(path: &Path, bytes: &[u8]) -> Result<(), FileError> {
    use std::os::unix::fs::OpenOptionsExt as _;
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(TEMPORARY);
    let mut temporary = PathBuf::from(temporary);
    let object = object(path);
    if killpoint::fault("lost", object) {
        return Ok(());
    }
    if killpoint::fault("in-place", object) {
        path.clone_into(&mut temporary);
    }
    let unsynced = killpoint::fault("unsynced", "state");
    let write = || -> io::Result<()> {
        if bytes.len() > MAX_FILE_BYTES {
            // What cannot be read back must not replace what can.
            let message = format!("{} bytes are more than is ever read", bytes.len());
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, message));
        }
        killpoint::failure()?;
        let mut file = File::options()
            .create(true)
            .truncate(true)
            .write(true)
            .mode(0o600)
            .open(&temporary)?;
        killpoint::reached(object, "created");
        killpoint::torn(object, "torn", bytes, |half| file.write_all(half));
        file.write_all(bytes)?;
        killpoint::reached(object, "written");
        if !unsynced {
            file.sync_all()?;
        }
        killpoint::reached(object, "synced");
        std::fs::rename(&temporary, path)?;
        killpoint::reached(object, "renamed");
        if !unsynced {
            sync_parent(path)?;
        }
        killpoint::reached(object, "durable");
        Ok(())
    };
    write().map_err(|source| {
        // On a full disk the half-written file takes what little there is.
        let _swept_at_the_next_start = std::fs::remove_file(&temporary);
        FileError::new("write", path, source)
    })
}

/// What kill points call a state file: its name, or `release` for any of those.
fn object(path: &Path) -> &str {
    let name = path.file_name().and_then(|name| name.to_str());
    match name {
        Some(name) if !name.contains('.') => name,
        _ => "release",
    }
}

/// Removes a file; that there is none is fine.
pub(super) fn remove(path: &Path) -> Result<(), FileError> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(FileError::new("remove", path, error))
        }
        _ => Ok(()),
    }
}

/// Renames a damaged file out of the way; the oldest copy goes when there are too many.
pub(super) fn set_aside(path: &Path, why: &str, damage: &mut Damage) -> Result<(), FileError> {
    let copy = |number: u32| {
        let mut name = path.as_os_str().to_owned();
        name.push(format!(".corrupt-{number}"));
        PathBuf::from(name)
    };
    let number = (0..COPIES_MAX)
        .find(|number| !copy(*number).exists())
        .unwrap_or_else(|| {
            for number in 1..COPIES_MAX {
                let _one_copy_less = std::fs::rename(copy(number), copy(number - 1));
            }
            COPIES_MAX - 1
        });
    let target = copy(number);
    std::fs::rename(path, &target).map_err(|source| FileError::new("set aside", path, source))?;
    killpoint::reached("damaged", "set-aside");
    sync_parent(path).map_err(|source| FileError::new("sync the directory of", path, source))?;
    killpoint::reached("damaged", "durable");
    damage.0.push(format!(
        "{} is damaged ({why}); kept as {}",
        path.display(),
        target.display()
    ));
    Ok(())
}

/// Removes what was being written when the power went.
pub(super) fn sweep(dir: &Path) -> Result<(), FileError> {
    let entries = std::fs::read_dir(dir).map_err(|source| FileError::new("read", dir, source))?;
    for entry in entries.flatten() {
        if entry.file_name().to_string_lossy().ends_with(TEMPORARY) {
            remove(&entry.path())?;
            killpoint::reached("unfinished", "removed");
        }
    }
    Ok(())
}

fn sync_parent(path: &Path) -> io::Result<()> {
    path.parent()
        .map_or(Ok(()), |parent| File::open(parent)?.sync_all())
}
