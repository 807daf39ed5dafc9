//! The small files that say what is in the store. One that cannot be read counts as absent.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::survey::Extent;
use crate::Digest;
use crate::blobs::write_atomic;
use crate::ledger::Seal;
use crate::unpack::Unpacked;

/// No record of ours is longer, in bytes: 127 layers, 1024 paths.
const RECORD_BYTES_MAX: u64 = 8 << 20;

/// What a record's file holds: the record as text and the digest of that text, since a bit that flips inside a
/// number is still JSON.
#[derive(Serialize, Deserialize)]
struct Sealed {
    sha256: Digest,
    record: String,
}

/// An image by the digest that it was asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ImageRecord {
    pub(super) digest: Digest,
    pub(super) manifest: Digest,
    pub(super) config: Digest,
    /// For people.
    pub(super) reference: String,
    /// Lowest first.
    pub(super) layers: Vec<PlacedLayer>,
}

/// Where a layer of an image stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct PlacedLayer {
    pub(super) diff_id: Digest,
    pub(super) chain_id: Digest,
    /// The name of its directory: one of the two above.
    pub(super) key: Digest,
}

/// What came of unpacking a layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct LayerRecord {
    pub(super) diff_id: Digest,
    /// Above which layers it was unpacked.
    pub(super) chain_id: Digest,
    pub(super) unpacked: Unpacked,
    /// Of the tree as it was unpacked; `None` when it was not measured.
    #[serde(default)]
    pub(super) extent: Option<Extent>,
    /// The list of what its files are; `None` from before there were any, or for a tree too large for one.
    #[serde(default)]
    pub(super) ledger: Option<Seal>,
}

impl ImageRecord {
    pub(super) fn read(path: &Path, digest: &Digest) -> Option<Self> {
        read::<Self>(path).filter(|record| record.digest == *digest)
    }

    pub(super) fn write(&self, path: &Path, tmp: &Path) -> io::Result<()> {
        write(self, path, tmp, "image-record")
    }
}

impl LayerRecord {
    pub(super) fn read(path: &Path, key: &Digest) -> Option<Self> {
        read::<Self>(path).filter(|record| [record.diff_id, record.chain_id].contains(key))
    }

    pub(super) fn write(&self, path: &Path, tmp: &Path) -> io::Result<()> {
        write(self, path, tmp, "layer-record")
    }
}

fn read<T: DeserializeOwned>(path: &Path) -> Option<T> {
    let mut bytes = Vec::new();
    File::open(path)
        .ok()?
        .take(RECORD_BYTES_MAX)
        .read_to_end(&mut bytes)
        .ok()?;
    let sealed: Sealed = serde_json::from_slice(&bytes).ok()?;
    if Digest::of(sealed.record.as_bytes()) != sealed.sha256 {
        return None;
    }
    serde_json::from_str(&sealed.record).ok()
}

fn write<T: Serialize>(record: &T, path: &Path, tmp: &Path, object: &str) -> io::Result<()> {
    let record = serde_json::to_string(record)?;
    let sealed = Sealed {
        sha256: Digest::of(record.as_bytes()),
        record,
    };
    write_atomic(path, tmp, object, &serde_json::to_vec(&sealed)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_flipped_byte_makes_a_record_absent() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("record");
        let digest = Digest::of(b"image");
        let record = ImageRecord {
            digest,
            manifest: digest,
            config: digest,
            reference: "h/r".to_owned(),
            layers: vec![PlacedLayer {
                diff_id: digest,
                chain_id: digest,
                key: digest,
            }],
        };
        record.write(&path, dir.path()).unwrap();
        assert_eq!(ImageRecord::read(&path, &digest), Some(record.clone()));
        assert_eq!(ImageRecord::read(&path, &Digest::of(b"other")), None);
        let whole = std::fs::read(&path).unwrap();
        for at in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[at] ^= 1;
            std::fs::write(&path, &damaged).unwrap();
            let read = ImageRecord::read(&path, &digest);
            assert!(
                read.is_none() || read.as_ref() == Some(&record),
                "byte {at}"
            );
        }
        std::fs::write(&path, &whole[..whole.len() / 2]).unwrap();
        assert_eq!(ImageRecord::read(&path, &digest), None);
    }
}
