//! Import of images from files: OCI layouts (directory or tar, OCI image specification "Image Layout") and
//! docker-archives (what `docker save` and `podman save` write).
//!
//! An archive is spooled to disk first, hashed on the way, since its entries may come in any order; then what an
//! image refers to is followed, every size and digest compared, and only complete images move into the blob
//! directory. On an error nothing of the archive stays.

pub(crate) mod attached;
mod docker;
mod error;
mod spool;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;

pub use self::attached::ImportedSignature;
pub use self::error::ImportError;
use self::spool::Spool;
use crate::blobs::BlobDir;
use crate::manifest::{
    CONFIG_BYTES_MAX, ConfigDocument, Descriptor, Document, Index, MANIFEST_BYTES_MAX, Manifest,
};
use crate::{Digest, Platform};

/// How deep indexes may nest.
const DEPTH_MAX: usize = 4;
/// Manifests and indexes of one archive.
const DOCUMENTS_MAX: usize = 1000;

/// Limits of an import. `Default` suits a hub.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImportLimits {
    /// The most bytes an archive may hold, after gunzip. Default 16 GiB.
    pub bytes_max: u64,
    /// The most entries an archive may hold. Default 10,000.
    pub entries_max: usize,
    /// Bytes of the file system that are left free while an archive is read in. Default 0.
    pub reserve_bytes: u64,
}

/// One image that was imported; every blob in `blobs` is in the blob directory and verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImportedImage {
    /// The name the archive gives it, as written there: a `RepoTags` entry (`demo:v1`), or the annotation
    /// `io.containerd.image.name` or `org.opencontainers.image.ref.name` (often only a tag). An image with several
    /// names comes several times.
    pub name: Option<String>,
    /// Of its index or manifest.
    pub digest: Digest,
    /// Of its index or manifest.
    pub media_type: String,
    /// What it runs on; complete variants only.
    pub platforms: Vec<Platform>,
    /// Bytes of all `blobs` together.
    pub size_bytes: u64,
    /// The index or manifest and everything it refers to, down to the layers. Variants of an index of which the
    /// archive holds nothing are not among them.
    pub blobs: BTreeSet<Digest>,
    /// The signatures that the archive has of it or of its variants; nobody looked yet whether they are right.
    pub signatures: Vec<ImportedSignature>,
}

/// Imports every image of an archive: a tar (plain, gzip or zstd) of an OCI layout or a docker-archive. One that
/// is both, as recent Dockers write, is read as an OCI layout.
///
/// # Errors
/// [`ImportError`]; nothing of the archive is in the blob directory then.
pub fn import_archive(
    archive: &mut dyn Read,
    blobs: &BlobDir,
    limits: &ImportLimits,
) -> Result<Vec<ImportedImage>, ImportError> {
    let spool = Spool::fill(archive, blobs, limits)?;
    if let Some(index) = spool.small("index.json", MANIFEST_BYTES_MAX)? {
        return import_layout(&Source::Spool(&spool), &index, blobs);
    }
    if let Some(manifest) = spool.small("manifest.json", MANIFEST_BYTES_MAX)? {
        let index = docker::convert(&spool, &manifest, limits)?;
        return import_index(&Source::Spool(&spool), &index, blobs);
    }
    Err(ImportError::NotAnImage)
}

/// Imports every image of an OCI layout directory, or of an archive file as [`import_archive`] does.
///
/// # Errors
/// [`ImportError`].
pub fn import_path(
    path: &Path,
    blobs: &BlobDir,
    limits: &ImportLimits,
) -> Result<Vec<ImportedImage>, ImportError> {
    let open =
        |path: &Path| File::open(path).map_err(|source| ImportError::io("open", path, source));
    if !path.is_dir() {
        return import_archive(&mut open(path)?, blobs, limits);
    }
    let index_path = path.join("index.json");
    if !index_path.is_file() {
        return Err(ImportError::NotAnImage);
    }
    let mut index = Vec::new();
    open(&index_path)?
        .take(MANIFEST_BYTES_MAX)
        .read_to_end(&mut index)
        .map_err(|source| ImportError::io("read", &index_path, source))?;
    import_layout(&Source::Directory(path), &index, blobs)
}

/// Where the blobs of a layout come from.
enum Source<'a> {
    Directory(&'a Path),
    Spool(&'a Spool),
}

impl Source<'_> {
    fn open(&self, digest: &Digest) -> Result<Option<(File, u64)>, ImportError> {
        match self {
            Self::Spool(spool) => spool.open(digest),
            Self::Directory(root) => {
                let path = root.join("blobs/sha256").join(digest.hex());
                match File::open(&path) {
                    Ok(file) => {
                        let size = file
                            .metadata()
                            .map_err(|source| ImportError::io("read", &path, source))?
                            .len();
                        Ok(Some((file, size)))
                    }
                    Err(source) if source.kind() == io::ErrorKind::NotFound => Ok(None),
                    Err(source) => Err(ImportError::io("open", &path, source)),
                }
            }
        }
    }

    /// A document of at most `max` bytes, its digest checked; `None` if it is not there.
    fn document(&self, blob: &Descriptor, max: u64) -> Result<Option<Vec<u8>>, ImportError> {
        let Some((file, size)) = self.open(&blob.digest)? else {
            return Ok(None);
        };
        check_size(blob, size)?;
        if size > max {
            return Err(ImportError::TooLarge { max });
        }
        let mut bytes = Vec::new();
        file.take(max)
            .read_to_end(&mut bytes)
            .map_err(|source| ImportError::Io {
                act: "read blob",
                path: blob.digest.to_string(),
                source,
            })?;
        let found = Digest::of(&bytes);
        if found == blob.digest {
            Ok(Some(bytes))
        } else {
            Err(ImportError::DigestMismatch {
                digest: blob.digest,
                found,
            })
        }
    }

    /// Puts a blob into `blobs`, verified.
    fn deliver(&self, digest: &Digest, size: u64, blobs: &BlobDir) -> Result<(), ImportError> {
        if blobs.size(digest) == Some(size) {
            return Ok(());
        }
        let io = |act| {
            move |source| ImportError::Io {
                act,
                path: digest.to_string(),
                source,
            }
        };
        if let Self::Spool(spool) = self {
            return spool.adopt(digest, blobs).map_err(io("move blob"));
        }
        let (mut file, _) = self
            .open(digest)?
            .ok_or_else(|| ImportError::MissingBlob { digest: *digest })?;
        let mut writer = blobs.writer().map_err(io("write blob"))?;
        io::copy(&mut Read::by_ref(&mut file).take(size + 1), &mut writer)
            .map_err(io("copy blob"))?;
        if writer.digest() != *digest {
            return Err(ImportError::DigestMismatch {
                digest: *digest,
                found: writer.digest(),
            });
        }
        writer
            .flush()
            .and_then(|()| writer.commit())
            .map_err(io("write blob"))?;
        Ok(())
    }
}

fn import_layout(
    source: &Source<'_>,
    index: &[u8],
    blobs: &BlobDir,
) -> Result<Vec<ImportedImage>, ImportError> {
    let index: Index =
        serde_json::from_slice(index).map_err(|source| ImportError::Index { source })?;
    import_index(source, &index, blobs)
}

fn import_index(
    source: &Source<'_>,
    index: &Index,
    blobs: &BlobDir,
) -> Result<Vec<ImportedImage>, ImportError> {
    let mut walk = Walk {
        source,
        documents: 0,
    };
    let mut found = Vec::new();
    let (images, attached) = attached::sort(source, index)?;
    for descriptor in images {
        let mut parts = Parts::default();
        if !walk.visit(descriptor, DEPTH_MAX, &mut parts)? {
            return Err(ImportError::MissingBlob {
                digest: descriptor.digest,
            });
        }
        if parts.manifests == 0 {
            return Err(ImportError::NoVariant {
                digest: descriptor.digest,
            });
        }
        found.push((descriptor, parts));
    }
    if found.is_empty() {
        return Err(ImportError::Empty);
    }
    let of = |descriptor: &Descriptor, parts: &Parts| -> Vec<&attached::Attached> {
        let all = attached.iter();
        all.filter(|attached| attached::is_about(attached, &descriptor.digest, &parts.blobs))
            .collect()
    };
    for (descriptor, parts) in &found {
        let signatures = of(descriptor, parts);
        let sizes = signatures.iter().flat_map(|attached| &attached.sizes);
        for (digest, size) in parts.blobs.iter().chain(sizes) {
            source.deliver(digest, *size, blobs)?;
        }
    }
    Ok(found
        .into_iter()
        .map(|(descriptor, parts)| ImportedImage {
            name: name(descriptor),
            signatures: of(descriptor, &parts)
                .into_iter()
                .map(|attached| attached.signature.clone())
                .collect(),
            digest: descriptor.digest,
            media_type: descriptor.media_type.clone(),
            platforms: parts.platforms,
            size_bytes: parts.blobs.values().sum(),
            blobs: parts.blobs.into_keys().collect(),
        })
        .collect())
}

fn name(descriptor: &Descriptor) -> Option<String> {
    [
        "io.containerd.image.name",
        "org.opencontainers.image.ref.name",
    ]
    .iter()
    .find_map(|key| descriptor.annotations.get(*key))
    .cloned()
}

/// What an image consists of.
#[derive(Default)]
struct Parts {
    blobs: BTreeMap<Digest, u64>,
    platforms: Vec<Platform>,
    /// Complete ones.
    manifests: usize,
}

struct Walk<'a> {
    source: &'a Source<'a>,
    documents: usize,
}

impl Walk<'_> {
    /// Adds a document and what it refers to; false if it is not there.
    fn visit(
        &mut self,
        descriptor: &Descriptor,
        depth: usize,
        parts: &mut Parts,
    ) -> Result<bool, ImportError> {
        let digest = descriptor.digest;
        self.documents += 1;
        if self.documents > DOCUMENTS_MAX {
            return Err(ImportError::TooDeep { digest });
        }
        let Some(bytes) = self.source.document(descriptor, MANIFEST_BYTES_MAX)? else {
            return Ok(false);
        };
        let document = Document::parse(&bytes, Some(&descriptor.media_type))
            .map_err(|source| ImportError::Document { digest, source })?;
        parts.blobs.insert(digest, descriptor.size);
        match document {
            Document::Manifest(manifest) => self.manifest(descriptor, &manifest, parts)?,
            Document::Index(_) if depth == 0 => return Err(ImportError::TooDeep { digest }),
            // `docker save` and `skopeo copy` write one variant and the index of all of them.
            Document::Index(index) => {
                for child in index.manifests.iter().filter(|child| child.is_document()) {
                    self.visit(child, depth - 1, parts)?;
                }
            }
        }
        Ok(true)
    }

    fn manifest(
        &self,
        descriptor: &Descriptor,
        manifest: &Manifest,
        parts: &mut Parts,
    ) -> Result<(), ImportError> {
        let missing = |digest: Digest| ImportError::MissingBlob { digest };
        let config_bytes = self
            .source
            .document(&manifest.config, CONFIG_BYTES_MAX)?
            .ok_or_else(|| missing(manifest.config.digest))?;
        for blob in &manifest.layers {
            let (_, size) = self
                .source
                .open(&blob.digest)?
                .ok_or_else(|| missing(blob.digest))?;
            check_size(blob, size)?;
        }
        for blob in manifest.layers.iter().chain([&manifest.config]) {
            parts.blobs.insert(blob.digest, blob.size);
        }
        // Attestations ride along as manifests for unknown/unknown; their config is none.
        let unknown =
            |platform: &Platform| platform.os == "unknown" || platform.architecture == "unknown";
        if descriptor.platform.as_ref().is_some_and(unknown) {
            return Ok(());
        }
        let config =
            ConfigDocument::parse(&config_bytes, manifest.layers.len()).map_err(|source| {
                ImportError::Document {
                    digest: manifest.config.digest,
                    source,
                }
            })?;
        parts.manifests += 1;
        let platform = descriptor.platform.clone().or_else(|| config.platform());
        if let Some(platform) = platform.filter(|platform| !parts.platforms.contains(platform)) {
            parts.platforms.push(platform);
        }
        Ok(())
    }
}

fn check_size(blob: &Descriptor, found: u64) -> Result<(), ImportError> {
    if blob.size == found {
        return Ok(());
    }
    Err(ImportError::SizeMismatch {
        digest: blob.digest,
        declared: blob.size,
        found,
    })
}

impl Default for ImportLimits {
    fn default() -> Self {
        Self {
            bytes_max: 16 << 30,
            entries_max: 10_000,
            reserve_bytes: 0,
        }
    }
}
