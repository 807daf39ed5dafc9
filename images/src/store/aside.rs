//! Trees and records that were set aside because something is wrong with them, and trees that take their place.
//!
//! A container may run from a layer when that is replaced: its overlay goes on with the old tree, wherever that is moved,
//! until it is started again. So an old tree is kept, as `quarantine/layer-HEX[.N]`, while somebody has it.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use foreshore_killpoint as killpoint;
use rustix::fs::{CWD, RenameFlags};
use rustix::io::Errno;

use super::{StageError, Store, io_error, is_directory};
use crate::Digest;
use crate::blobs::{remove_tree, sync_dir};

/// Trees of one layer that are set aside at once.
const ASIDE_MAX: u32 = 1000;
/// The longest list of who has a tree.
const HOLDERS_BYTES_MAX: u64 = 1 << 20;
/// What the name of that list ends with.
const HELD: &str = ".held";

/// Who runs from layers: for each layer's directory the names of those that have it mounted, or may soon.
pub type Holders = BTreeMap<PathBuf, Vec<String>>;

impl Store {
    fn quarantine(&self) -> PathBuf {
        self.root.join("quarantine")
    }

    /// A name for a tree that is set aside.
    fn aside_path(&self, key: &Digest) -> Result<PathBuf, StageError> {
        let dir = self.quarantine();
        let names = (0..ASIDE_MAX).map(|number| match number {
            0 => format!("layer-{}", key.hex()),
            number => format!("layer-{}.{number}", key.hex()),
        });
        let free = |path: &PathBuf| path.symlink_metadata().is_err();
        names.map(|name| dir.join(name)).find(free).ok_or_else(|| {
            let full = io::Error::other("too much was set aside; remove what is there");
            io_error("set something aside in", &dir, full)
        })
    }

    /// Moves a damaged tree out of the way. A container may be running from it, which keeps working, so it is not
    /// removed.
    pub(super) fn quarantine_layer(&self, key: &Digest) -> Result<(), StageError> {
        let tree = self.layer_path(key);
        if !is_directory(&tree) {
            return Ok(());
        }
        self.forget_survey(key)?;
        let aside = self.aside_path(key)?;
        tracing::warn!(layer = %key, path = %aside.display(), "a damaged layer was set aside");
        fs::rename(&tree, &aside).map_err(|source| io_error("set aside", &tree, source))?;
        killpoint::reached("layer", "set-aside");
        Ok(())
    }

    /// Gives a new tree the name of a layer, in one step: an old one with that name is set aside and never missing in between.
    /// The caller flushes the directories.
    pub(super) fn put_in_place(&self, tree: &Path, key: &Digest) -> Result<(), StageError> {
        let path = self.layer_path(key);
        let moved = |result: io::Result<()>| {
            result.map_err(|source| io_error("move into place", &path, source))
        };
        self.forget_survey(key)?;
        if path.symlink_metadata().is_err() {
            moved(fs::rename(tree, &path))?;
        } else {
            let aside = self.aside_path(key)?;
            moved(fs::rename(tree, &aside))?;
            killpoint::reached("layer", "beside");
            let exchanged =
                rustix::fs::renameat_with(CWD, &aside, CWD, &path, RenameFlags::EXCHANGE);
            match exchanged {
                Ok(()) => {}
                // A file system that cannot do it at once.
                Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => {
                    let old = self.aside_path(key)?;
                    moved(fs::rename(&path, &old))?;
                    moved(fs::rename(&aside, &path))?;
                }
                Err(errno) => return moved(Err(errno.into())),
            }
            tracing::warn!(layer = %key, path = %aside.display(), "a damaged layer was replaced and set aside");
            killpoint::reached("layer", "set-aside");
            self.sync("quarantine")?;
        }
        killpoint::reached("layer", "renamed");
        Ok(())
    }

    /// The new one has not been through a power cycle.
    fn forget_survey(&self, key: &Digest) -> Result<(), StageError> {
        let mark = self.survey_mark(key);
        match fs::remove_file(&mark) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(io_error("remove", &mark, source))
            }
            _ => Ok(()),
        }
    }

    /// Sets a record that cannot be read aside; a readable one whose parts are missing is simply replaced.
    pub(super) fn quarantine_image(&self, digest: &Digest) -> Result<(), StageError> {
        let path = self.image_path(digest);
        if !path.exists() || self.record(digest).is_some() {
            return Ok(());
        }
        let aside = self
            .quarantine()
            .join(format!("image-{}.json", digest.hex()));
        tracing::warn!(%digest, path = %aside.display(), "a damaged image record was set aside; the image is staged again");
        fs::rename(&path, &aside).map_err(|source| io_error("set aside", &path, source))?;
        killpoint::reached("image", "set-aside");
        Ok(())
    }

    /// Removes the trees that were set aside and that nobody runs from any more; says who still does, by the layer. `holders`
    /// are those who run now. Who had a layer when its tree was set aside is written down, since later ones have the new tree.
    ///
    /// # Errors
    /// [`StageError::Busy`] when another process is staging; nothing was removed then. [`StageError::Io`].
    pub fn clear_aside(
        &self,
        holders: &Holders,
    ) -> Result<BTreeMap<Digest, Vec<String>>, StageError> {
        let Some(_lock) = self.try_lock()? else {
            return Err(StageError::Busy {
                path: self.root.clone(),
            });
        };
        let dir = self.quarantine();
        let entries = fs::read_dir(&dir).map_err(|source| io_error("list", &dir, source))?;
        let mut left: BTreeMap<Digest, Vec<String>> = BTreeMap::new();
        for entry in entries {
            let name = entry
                .map_err(|source| io_error("list", &dir, source))?
                .file_name();
            let Some(key) = name.to_str().and_then(aside_key) else {
                continue;
            };
            let (tree, note) = (dir.join(&name), noted(&dir.join(&name)));
            let now = |named: &String| holders.values().flatten().any(|holder| holder == named);
            let held: Vec<String> = match read_note(&note) {
                Some(noted) => noted.into_iter().filter(now).collect(),
                None => {
                    let held = holders.get(&self.layer_path(&key)).cloned();
                    let held = held.unwrap_or_default();
                    if !held.is_empty() {
                        write_note(&note, self.blobs.tmp(), &held)
                            .map_err(|source| io_error("write", &note, source))?;
                    }
                    held
                }
            };
            if held.is_empty() {
                self.remove_aside(&tree, &note)?;
            } else {
                left.entry(key).or_default().extend(held);
            }
        }
        Ok(left)
    }

    fn remove_aside(&self, tree: &Path, note: &Path) -> Result<(), StageError> {
        let removed = if is_directory(tree) {
            remove_tree(tree)
        } else {
            fs::remove_file(tree)
        };
        removed.map_err(|source| io_error("remove", tree, source))?;
        match fs::remove_file(note) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(io_error("remove", note, source))
            }
            _ => Ok(()),
        }
    }
}

/// The layer whose tree has this name in `quarantine/`.
fn aside_key(name: &str) -> Option<Digest> {
    let name = name.strip_prefix("layer-")?;
    let hex = match name.split_once('.') {
        Some((hex, number)) => number.parse::<u32>().ok().map(|_| hex)?,
        None => name,
    };
    format!("sha256:{hex}").parse().ok()
}

fn noted(tree: &Path) -> PathBuf {
    let mut name = tree.as_os_str().to_owned();
    name.push(HELD);
    PathBuf::from(name)
}

/// Whole or not at all.
fn write_note(path: &Path, tmp: &Path, held: &[String]) -> io::Result<()> {
    use std::io::Write as _;
    let mut file = tempfile::NamedTempFile::new_in(tmp)?;
    file.write_all(&serde_json::to_vec(held)?)?;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|error| error.error)?;
    path.parent().map_or(Ok(()), sync_dir)
}

fn read_note(path: &Path) -> Option<Vec<String>> {
    use std::io::Read as _;
    let mut text = Vec::new();
    let file = fs::File::open(path).ok()?;
    file.take(HOLDERS_BYTES_MAX).read_to_end(&mut text).ok()?;
    serde_json::from_slice(&text).ok()
}
