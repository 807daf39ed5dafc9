//! Looking for layers that a power cut has torn.
//!
//! A layer gets its name after its file system was flushed, so a whole one is to be expected. Not every card and
//! controller keeps that promise, though: each layer is looked at once more in the first boot after it came, when the
//! power has been off at least once since. What survived that has reached the medium.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::record::LayerRecord;
use super::{StageError, Store, digests_in, io_error};
use crate::Digest;

/// What a walk over a tree finds: enough to notice names and content that are missing, without reading content.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Extent {
    names: u64,
    /// Of regular files, each name counted.
    bytes: u64,
}

impl std::fmt::Display for Extent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} names, {} bytes", self.names, self.bytes)
    }
}

impl Extent {
    pub(super) const fn new(names: u64, bytes: u64) -> Self {
        Self { names, bytes }
    }

    pub(super) const fn names(&self) -> u64 {
        self.names
    }

    /// Walks the tree; links are counted and not followed.
    pub(super) fn of(tree: &Path) -> io::Result<Self> {
        let mut extent = Self::default();
        let mut ahead = vec![tree.to_owned()];
        while let Some(dir) = ahead.pop() {
            for entry in fs::read_dir(dir)? {
                let entry = entry?;
                let meta = entry.metadata()?;
                extent.names += 1;
                if meta.is_dir() {
                    ahead.push(entry.path());
                } else if meta.is_file() {
                    extent.bytes += meta.len();
                }
            }
        }
        Ok(extent)
    }
}

impl Store {
    /// Looks at every layer that has not been looked at before, and sets aside those of which something is missing:
    /// their images count as absent then and are staged again. To be called once in each boot of the machine, before
    /// images are used. A layer costs one walk over its tree, once in its life.
    ///
    /// # Errors
    /// [`StageError::Busy`] when another process is staging. [`StageError::Io`] when a layer cannot be set aside or
    /// marked; one that cannot be read is logged and passed over.
    pub fn survey(&self) -> Result<Vec<Digest>, StageError> {
        let _lock = self.try_lock()?.ok_or_else(|| StageError::Busy {
            path: self.root.clone(),
        })?;
        let mut torn = Vec::new();
        for key in digests_in(&self.root.join("layers"))? {
            let (tree, mark) = (self.layer_path(&key), self.survey_mark(&key));
            let record = LayerRecord::read(&self.layer_record_path(&key), &key);
            let Some(expected) = record.and_then(|record| record.extent) else {
                continue;
            };
            if mark.exists() || !tree.is_dir() {
                continue;
            }
            match Extent::of(&tree) {
                Ok(found) if found == expected => {
                    File::create(&mark).map_err(|source| io_error("create", &mark, source))?;
                }
                Ok(found) => {
                    tracing::warn!(layer = %key, ?expected, ?found, "a layer is torn");
                    self.quarantine_layer(&key)?;
                    self.remove_layer(&key)?;
                    torn.push(key);
                }
                Err(error) => tracing::warn!(layer = %key, %error, "a layer cannot be looked at"),
            }
        }
        Ok(torn)
    }

    pub(super) fn survey_mark(&self, key: &Digest) -> PathBuf {
        self.root
            .join("layers")
            .join(format!("{}.surveyed", key.hex()))
    }
}
