//! The images of this device as an operator sees them on the spot: loaded from files, listed, let go.

use std::fmt::Write as _;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use foreshore_images::store::{
    Archive, LoadError, Progress, StageError, StagedImage, Store, StoreConfig, Unpacker,
};
use foreshore_images::{Digest, Platform};
use serde::Serialize;

use crate::config::Config;
use crate::stage::store_path;
use crate::unpack;

/// A slow card may take this long for the end of a layer, when a hundred MiB of files are still to be written.
const UNPACK_PATIENCE: Duration = Duration::from_mins(10);

/// One image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Image {
    /// What the archive called it, if it came from one just now.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// What releases name it by.
    pub digest: Digest,
    /// Bytes on disk, shared layers included.
    pub size_bytes: u64,
    /// How many layers it has.
    pub layers: usize,
    /// Loaded from a file: it stays until `image remove`.
    pub pinned: bool,
    /// How many signatures came with it, right or wrong; only just after it was loaded.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub signatures: Option<usize>,
    /// What was left out while unpacking.
    pub notes: Vec<String>,
}

impl Image {
    fn new(name: Option<String>, image: StagedImage, pinned: bool) -> Self {
        Self {
            name,
            digest: image.digest,
            size_bytes: image.size_bytes,
            layers: image.layers.len(),
            pinned,
            signatures: None,
            notes: image.notes,
        }
    }
}

/// Opens the image store of a device with its limits.
///
/// # Errors
///
/// When its directory cannot be used.
pub fn open(config: &Config) -> Result<Store, StageError> {
    let limits = StoreConfig {
        reserve_bytes: config.disk.reserve.map(|reserve| reserve.0),
        keep_privileges: config.pull.keep_privileges,
        deltas: config.pull.deltas,
        unpacker: Some(Unpacker {
            program: PathBuf::from("/proc/self/exe"),
            arguments: vec![unpack::SUBCOMMAND.into()],
            inflate: vec![unpack::INFLATE.into()],
            rebuild: vec![unpack::REBUILD.into()],
            patience: UNPACK_PATIENCE,
        }),
        ..StoreConfig::default()
    };
    Store::open_with(&store_path(config), limits)
}

/// Loads every image of an archive, `-` for standard input, that runs on this device, and pins it.
///
/// # Errors
///
/// [`LoadError`].
pub fn load(
    store: &Store,
    path: &Path,
    stdin: &mut dyn Read,
    progress: &mut dyn FnMut(Progress),
) -> Result<Vec<Image>, LoadError> {
    let archive = if path == Path::new("-") {
        Archive::Stream(stdin)
    } else {
        Archive::Path(path)
    };
    let loaded = store.load(archive, &Platform::host(), progress)?;
    Ok(loaded
        .into_iter()
        .map(|loaded| Image {
            signatures: Some(loaded.signatures),
            ..Image::new(loaded.name, loaded.image, true)
        })
        .collect())
}

/// Every image that is wholly here.
///
/// # Errors
///
/// When the store cannot be read.
pub fn list(store: &Store) -> Result<Vec<Image>, StageError> {
    let pinned = store.pinned()?;
    let images = store.list()?;
    Ok(images
        .into_iter()
        .map(|image| {
            let pinned = pinned.contains(&image.digest);
            Image::new(None, image, pinned)
        })
        .collect())
}

/// For people.
#[must_use]
pub fn table(images: &[Image]) -> String {
    let mut text = String::new();
    let mut line = |name: &str, digest: &str, size: &str, layers: &str, pinned: &str| {
        let _infallible = writeln!(
            text,
            "{digest:<71}  {size:>10}  {layers:>6}  {pinned:<6}  {name}"
        );
    };
    line("NAME", "DIGEST", "MIB", "LAYERS", "PINNED");
    for image in images {
        let tenths = image.size_bytes * 10 / (1 << 20);
        line(
            image.name.as_deref().unwrap_or("-"),
            &image.digest.to_string(),
            &format!("{}.{}", tenths / 10, tenths % 10),
            &image.layers.to_string(),
            if image.pinned { "yes" } else { "no" },
        );
    }
    text
}
