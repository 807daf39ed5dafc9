//! Two images in archives or layouts, and the artifact made of them.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Write as _};
use std::path::{Path, PathBuf};

use foreshore_images::blobs::BlobDir;
use foreshore_images::compression::decompress;
use foreshore_images::delta::artifact::{ARTIFACT_TYPE, Artifact, EMPTY, FROM, LayerDelta};
use foreshore_images::layout::{ImportError, ImportLimits, ImportedImage, import_path};
use foreshore_images::manifest::{
    CONFIG_BYTES_MAX, ConfigDocument, Descriptor, Document, DocumentError, MANIFEST_BYTES_MAX,
    Manifest, OCI_INDEX, OCI_MANIFEST,
};
use foreshore_images::{Digest, Platform};
use tempfile::TempDir;

use crate::layer;
use crate::old::{Old, Spooled};

/// How deep indexes may nest.
const DEPTH_MAX: usize = 4;

/// Why no delta could be made.
#[derive(Debug, thiserror::Error)]
pub enum DeltaMakeError {
    /// The archive or layout is not one, or not whole.
    #[error("cannot read the image in {}", path.display())]
    Import {
        /// The archive or layout.
        path: PathBuf,
        /// Why.
        #[source]
        source: ImportError,
    },
    /// It holds several images, or none of that name.
    #[error("{} has {found}; name one as {}:NAME", path.display(), path.display())]
    Which {
        /// The archive or layout.
        path: PathBuf,
        /// What it has.
        found: String,
    },
    /// No variant of it is for that platform.
    #[error("{} has no image for {platform}; there is {offered}", path.display())]
    Platform {
        /// The archive or layout.
        path: PathBuf,
        /// What was asked for.
        platform: Platform,
        /// What there is.
        offered: String,
    },
    /// A document of it cannot be read.
    #[error("cannot read {digest} of {}", path.display())]
    Document {
        /// The archive or layout.
        path: PathBuf,
        /// Which.
        digest: Digest,
        /// Why.
        #[source]
        source: DocumentError,
    },
    /// A layer is not what its config says.
    #[error("layer {layer} unpacks to {found}, its image's config says {expected}")]
    DiffId {
        /// The layer's blob.
        layer: Digest,
        /// What it is.
        found: Digest,
        /// What it should be.
        expected: Digest,
    },
    /// Old and new are the same.
    #[error("{0} is the old image and the new one; name two that differ")]
    Same(Digest),
    /// Where the result should go is something already.
    #[error("{} is there already; name a directory that is not", .0.display())]
    Exists(PathBuf),
    /// The local disk failed, or a layer cannot be decompressed.
    #[error("cannot {act} {what}")]
    Io {
        /// What was tried.
        act: &'static str,
        /// A path or digest.
        what: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

fn failed<T: ToString + ?Sized>(
    act: &'static str,
    what: &T,
) -> impl FnOnce(io::Error) -> DeltaMakeError + use<T> {
    let what = what.to_string();
    move |source| DeltaMakeError::Io { act, what, source }
}

/// An image on this disk.
#[derive(Debug)]
pub struct Image {
    blobs: BlobDir,
    _dir: TempDir,
    /// Its manifest.
    pub manifest: Descriptor,
    layers: Vec<(Descriptor, Digest)>,
}

/// What came of one layer of the new image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerReport {
    /// Uncompressed.
    pub diff_id: Digest,
    /// Bytes of its blob: what a pull takes.
    pub blob: u64,
    /// Bytes of its delta; `None` where that is no smaller.
    pub delta: Option<u64>,
}

/// A delta that was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// Of the old image's manifest.
    pub from: Digest,
    /// Of the artifact; `None` when no layer gains.
    pub artifact: Option<Digest>,
    /// The layers that the old image has not.
    pub layers: Vec<LayerReport>,
}

impl Image {
    /// Opens the one image in an archive or layout, or the one called `NAME` of `PATH:NAME`; of an index the variant
    /// for `platform`. Every blob is verified.
    ///
    /// # Errors
    /// [`DeltaMakeError`].
    pub fn open(spec: &str, platform: &Platform) -> Result<Self, DeltaMakeError> {
        let (path, name) = match spec.rsplit_once(':') {
            Some((path, name)) if !Path::new(spec).exists() => (Path::new(path), Some(name)),
            _ => (Path::new(spec), None),
        };
        Self::read(path, path, name, platform)
    }

    /// [`Self::open`] of a layout directory with one image, which errors call `called`.
    ///
    /// # Errors
    /// [`DeltaMakeError`].
    pub fn open_as(
        called: &str,
        layout: &Path,
        platform: &Platform,
    ) -> Result<Self, DeltaMakeError> {
        Self::read(layout, Path::new(called), None, platform)
    }

    /// The image at `place`, which errors call `path`.
    fn read(
        place: &Path,
        path: &Path,
        name: Option<&str>,
        platform: &Platform,
    ) -> Result<Self, DeltaMakeError> {
        let dir = tempfile::tempdir().map_err(failed("create", "a temporary directory"))?;
        let blobs = BlobDir::open(dir.path()).map_err(failed("create", &dir.path().display()))?;
        let import = |source| DeltaMakeError::Import {
            path: path.to_owned(),
            source,
        };
        let limits = ImportLimits::default();
        let images = import_path(place, &blobs, &limits).map_err(import)?;
        let root = choose(path, name, &images)?;
        let reader = Reader {
            path,
            blobs: &blobs,
        };
        let mut offered = BTreeSet::new();
        let root = Descriptor {
            media_type: root.media_type.clone(),
            digest: root.digest,
            size: 0,
            platform: None,
            annotations: [].into(),
        };
        let found = reader.find(&root, platform, DEPTH_MAX, &mut offered)?;
        let (manifest, layers) = found.ok_or_else(|| DeltaMakeError::Platform {
            path: path.to_owned(),
            platform: platform.clone(),
            offered: Vec::from_iter(offered).join(", "),
        })?;
        Ok(Self {
            blobs,
            _dir: dir,
            manifest,
            layers,
        })
    }

    fn spool(&self, blob: &Descriptor, diff_id: &Digest) -> Result<Spooled, DeltaMakeError> {
        let path = self.blobs.path(&blob.digest);
        let file = File::open(&path).map_err(failed("open", &path.display()))?;
        let spooled = decompress(BufReader::with_capacity(64 << 10, file))
            .and_then(Spooled::fill)
            .map_err(failed("decompress", &blob.digest))?;
        if spooled.diff_id == *diff_id {
            Ok(spooled)
        } else {
            Err(DeltaMakeError::DiffId {
                layer: blob.digest,
                found: spooled.diff_id,
                expected: *diff_id,
            })
        }
    }
}

fn choose<'i>(
    path: &Path,
    name: Option<&str>,
    images: &'i [ImportedImage],
) -> Result<&'i ImportedImage, DeltaMakeError> {
    let fits = |image: &&ImportedImage| name.is_none() || image.name.as_deref() == name;
    let mut fitting = images.iter().filter(fits);
    let first = fitting.next();
    let same = first.is_some_and(|first| fitting.all(|other| other.digest == first.digest));
    first.filter(|_| same).ok_or_else(|| {
        let names: Vec<&str> = images
            .iter()
            .filter_map(|image| image.name.as_deref())
            .collect();
        DeltaMakeError::Which {
            path: path.to_owned(),
            found: format!("{} images ({})", images.len(), names.join(", ")),
        }
    })
}

type Found = (Descriptor, Vec<(Descriptor, Digest)>);

struct Reader<'r> {
    path: &'r Path,
    blobs: &'r BlobDir,
}

impl Reader<'_> {
    fn read(&self, digest: &Digest, max: u64) -> Result<Option<Vec<u8>>, DeltaMakeError> {
        self.blobs.read(digest, max).map_err(failed("read", digest))
    }

    fn bad(&self, digest: Digest) -> impl FnOnce(DocumentError) -> DeltaMakeError + use<> {
        let path = self.path.to_owned();
        move |source| DeltaMakeError::Document {
            path,
            digest,
            source,
        }
    }

    /// The best manifest for the platform below a document; notes what else there is.
    fn find(
        &self,
        at: &Descriptor,
        platform: &Platform,
        depth: usize,
        offered: &mut BTreeSet<String>,
    ) -> Result<Option<Found>, DeltaMakeError> {
        let Some(bytes) = self.read(&at.digest, MANIFEST_BYTES_MAX)? else {
            return Ok(None);
        };
        let document =
            Document::parse(&bytes, Some(&at.media_type)).map_err(self.bad(at.digest))?;
        let index = match document {
            Document::Manifest(manifest) => {
                return self.manifest(at, bytes.len() as u64, &manifest, platform, offered);
            }
            Document::Index(index) => index,
        };
        let mut children: Vec<(u32, &Descriptor)> = index
            .manifests
            .iter()
            .filter(|child| child.is_document() && depth > 0)
            .filter_map(|child| match &child.platform {
                None => Some((u32::MAX, child)),
                Some(other) => {
                    let rank = platform.rank(other);
                    if rank.is_none() {
                        offered.insert(other.to_string());
                    }
                    Some((rank?, child))
                }
            })
            .collect();
        children.sort_by_key(|(rank, _)| *rank);
        for (_, child) in children {
            if let Some(found) = self.find(child, platform, depth - 1, offered)? {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    fn manifest(
        &self,
        at: &Descriptor,
        size: u64,
        manifest: &Manifest,
        platform: &Platform,
        offered: &mut BTreeSet<String>,
    ) -> Result<Option<Found>, DeltaMakeError> {
        let Some(config) = self.read(&manifest.config.digest, CONFIG_BYTES_MAX)? else {
            return Ok(None);
        };
        let config = ConfigDocument::parse(&config, manifest.layers.len())
            .map_err(self.bad(manifest.config.digest))?;
        if let Some(other) = config.platform()
            && platform.rank(&other).is_none()
        {
            offered.insert(other.to_string());
            return Ok(None);
        }
        let media_type = manifest.media_type.as_deref().unwrap_or(OCI_MANIFEST);
        let descriptor = Descriptor {
            media_type: media_type.to_owned(),
            digest: at.digest,
            size,
            platform: None,
            annotations: [].into(),
        };
        let layers = manifest.layers.iter().cloned();
        let layers = layers.zip(config.rootfs.diff_ids).collect();
        Ok(Some((descriptor, layers)))
    }
}

/// Makes the deltas from each of `from` to `to` and writes them into `output`, a new OCI layout.
///
/// In it the name `sha256-HEX` (the digest of the new image's manifest) stands for the index of all deltas: pushed under
/// that tag beside the image, it is also what registries without the referrers API are asked for (OCI distribution
/// specification, "Referrers Tag Schema").
///
/// # Errors
/// [`DeltaMakeError`]; what was written of `output` is to be removed then.
pub fn make(
    from: &[Image],
    to: &Image,
    level: i32,
    output: &Path,
) -> Result<Vec<Report>, DeltaMakeError> {
    if from
        .iter()
        .any(|old| old.manifest.digest == to.manifest.digest)
    {
        return Err(DeltaMakeError::Same(to.manifest.digest));
    }
    if output.exists() {
        return Err(DeltaMakeError::Exists(output.to_owned()));
    }
    let blobs = output.join("blobs/sha256");
    fs::create_dir_all(&blobs).map_err(failed("create", &blobs.display()))?;
    let layout = Layout { blobs };
    let mut reports = Vec::new();
    let mut manifests = Vec::new();
    for old in from {
        let (layers, deltas) = between(old, to, level, &layout)?;
        let mut report = Report {
            from: old.manifest.digest,
            artifact: None,
            layers,
        };
        if !deltas.is_empty() {
            let artifact = Artifact {
                subject: to.manifest.clone(),
                from: old.manifest.digest,
                layers: deltas,
            };
            let bytes = artifact.to_json();
            let digest = layout.put(&bytes)?;
            report.artifact = Some(digest);
            manifests.push(serde_json::json!({
                "mediaType": OCI_MANIFEST,
                "digest": digest.to_string(),
                "size": bytes.len(),
                "artifactType": ARTIFACT_TYPE,
                "annotations": { FROM: old.manifest.digest.to_string() },
            }));
        }
        reports.push(report);
    }
    layout.put(EMPTY)?;
    let index = |manifests| {
        serde_json::to_vec(&serde_json::json!({
            "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests,
        }))
        .expect("strings and numbers can be written")
    };
    let referrers = index(serde_json::Value::Array(manifests));
    let digest = layout.put(&referrers)?;
    let names = index(serde_json::json!([{
        "mediaType": OCI_INDEX,
        "digest": digest.to_string(),
        "size": referrers.len(),
        "annotations": { "org.opencontainers.image.ref.name": tag(&to.manifest.digest) },
    }]));
    for (name, bytes) in [
        ("index.json", &names[..]),
        ("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#),
    ] {
        let path = output.join(name);
        fs::write(&path, bytes).map_err(failed("write", &path.display()))?;
    }
    Ok(reports)
}

/// The tag under which registries without the referrers API have what refers to a manifest.
#[must_use]
pub fn tag(subject: &Digest) -> String {
    format!("sha256-{}", subject.hex())
}

/// The deltas of the layers that `old` has not.
fn between(
    old: &Image,
    new: &Image,
    level: i32,
    layout: &Layout,
) -> Result<(Vec<LayerReport>, Vec<LayerDelta>), DeltaMakeError> {
    let spooled: Vec<Spooled> = old
        .layers
        .iter()
        .map(|(blob, diff_id)| old.spool(blob, diff_id))
        .collect::<Result<_, _>>()?;
    let files = Old::new(spooled).map_err(failed("read", &old.manifest.digest))?;
    let mut known: BTreeSet<Digest> = old.layers.iter().map(|(_, diff_id)| *diff_id).collect();
    let (mut reports, mut deltas) = (Vec::new(), Vec::new());
    for (blob, diff_id) in &new.layers {
        if !known.insert(*diff_id) {
            continue;
        }
        let layer = new.spool(blob, diff_id)?;
        let temporary = tempfile::NamedTempFile::new_in(&layout.blobs)
            .map_err(failed("write in", &layout.blobs.display()))?;
        let mut out = BufWriter::new(temporary);
        let written = layer::make(&files, &layer, level, &mut out);
        let made = written.map_err(failed("make the delta of", &blob.digest))?;
        out.flush().map_err(failed("write", &blob.digest))?;
        let temporary = out.into_inner().map_err(|error| error.into_error());
        let temporary = temporary.map_err(failed("write", &blob.digest))?;
        let delta = layout.adopt(temporary, made.trees, *diff_id, blob.size)?;
        reports.push(LayerReport {
            diff_id: *diff_id,
            blob: blob.size,
            delta: delta.as_ref().map(|delta| delta.size),
        });
        deltas.extend(delta);
    }
    Ok((reports, deltas))
}

/// The layout that is written.
struct Layout {
    blobs: PathBuf,
}

impl Layout {
    fn put(&self, bytes: &[u8]) -> Result<Digest, DeltaMakeError> {
        let digest = Digest::of(bytes);
        let path = self.blobs.join(digest.hex());
        fs::write(&path, bytes).map_err(failed("write", &path.display()))?;
        Ok(digest)
    }

    /// Keeps a delta if it is smaller than the blob that it stands for.
    fn adopt(
        &self,
        temporary: tempfile::NamedTempFile,
        trees: Vec<Digest>,
        diff_id: Digest,
        blob: u64,
    ) -> Result<Option<LayerDelta>, DeltaMakeError> {
        let file = File::open(temporary.path()).map_err(failed("open", "what was written"))?;
        let written = Spooled::fill(file).map_err(failed("read", "what was written"))?;
        if written.size >= blob {
            return Ok(None);
        }
        let path = self.blobs.join(written.diff_id.hex());
        temporary
            .persist(&path)
            .map_err(|error| error.error)
            .and_then(|file| {
                use std::os::unix::fs::PermissionsExt as _;
                file.set_permissions(fs::Permissions::from_mode(0o644))
            })
            .map_err(failed("write", &path.display()))?;
        Ok(Some(LayerDelta {
            diff_id,
            trees,
            digest: written.diff_id,
            size: written.size,
        }))
    }
}
