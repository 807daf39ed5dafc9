//! What an archive carries beside its images: cosign's signatures of them. Under the tag `sha256-HEX.sig` as registries have
//! them, as `cosign save` writes them, or as manifests that refer to the image.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;

use super::{ImportError, Source, name};
use crate::Digest;
use crate::manifest::{Descriptor, Document, Index, Manifest, OCI_CONFIG};
use crate::signature::{self, PART_BYTES_MAX};

/// The largest manifest of signatures that is read, in bytes.
const DOCUMENT_BYTES_MAX: u64 = 256 << 10;
/// Manifests of signatures in one archive; more are passed over.
const ATTACHED_MAX: usize = 256;
/// What Docker calls the config of an image.
const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";

/// A manifest with signatures of an image, whose blobs are in the blob directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImportedSignature {
    /// What is signed.
    pub subject: Digest,
    /// Of the manifest.
    pub digest: Digest,
    /// Of the manifest.
    pub media_type: String,
    /// The tag that it has in a registry; without one it says itself what it refers to.
    pub tag: Option<String>,
    /// The manifest and what it refers to, as far as that was there.
    pub blobs: BTreeSet<Digest>,
}

/// A signature that was found, with the sizes of its blobs.
pub(super) struct Attached {
    pub(super) signature: ImportedSignature,
    pub(super) sizes: BTreeMap<Digest, u64>,
}

/// What matters of a manifest that refers to something.
#[derive(Deserialize)]
struct Referring {
    #[serde(default)]
    subject: Option<Subject>,
}

#[derive(Deserialize)]
struct Subject {
    digest: Digest,
}

/// What a name in an archive says of an image of this digest.
enum About {
    Signatures(Digest),
    Referrers,
    /// Lists of contents and the like, which nobody here acts on.
    Other,
}

/// Tells the images of an archive from what is about them. What is no signature that could be of use is passed over: whether an
/// image must have one is found out later.
///
/// # Errors
/// When something is not what its digest says, or cannot be read.
pub(super) fn sort<'i>(
    source: &Source<'_>,
    index: &'i Index,
) -> Result<(Vec<&'i Descriptor>, Vec<Attached>), ImportError> {
    let mut images = Vec::new();
    let mut attached = Vec::new();
    let documents = index.manifests.iter();
    for descriptor in documents.filter(|descriptor| descriptor.is_document()) {
        let mut add = |descriptor: &Descriptor, subject: Option<Digest>| {
            if attached.len() < ATTACHED_MAX
                && let Some(found) = attachment(source, descriptor, subject)?
            {
                attached.push(found);
            }
            Ok::<_, ImportError>(())
        };
        match name(descriptor).as_deref().and_then(about) {
            Some(About::Signatures(subject)) => add(descriptor, Some(subject))?,
            Some(About::Referrers) if descriptor.is_index() => {
                for child in children(source, descriptor)? {
                    add(&child, None)?;
                }
            }
            Some(About::Other) => {}
            Some(About::Referrers) | None => match referring(source, descriptor)? {
                Some(subject) => add(descriptor, subject)?,
                None => images.push(descriptor),
            },
        }
    }
    Ok((images, attached))
}

/// The tag of a name: the whole name when it is only a tag.
fn about(name: &str) -> Option<About> {
    let tag = name.rsplit(['/', ':']).next().unwrap_or(name);
    let rest = tag.strip_prefix("sha256-")?;
    let hex = rest.get(..64)?;
    let subject = format!("sha256:{hex}").parse().ok()?;
    Some(match rest.get(64..)? {
        ".sig" => About::Signatures(subject),
        "" => About::Referrers,
        suffix if suffix.starts_with('.') => About::Other,
        _ => return None,
    })
}

fn children(source: &Source<'_>, index: &Descriptor) -> Result<Vec<Descriptor>, ImportError> {
    let Some(bytes) = document(source, index)? else {
        return Ok(Vec::new());
    };
    Ok(match Document::parse(&bytes, Some(&index.media_type)) {
        Ok(Document::Index(index)) => index
            .manifests
            .into_iter()
            .filter(|child| child.is_document() && !child.is_index())
            .take(ATTACHED_MAX)
            .collect(),
        _ => Vec::new(),
    })
}

/// Whether a document is one that refers to an image and is none itself, and to which, if it says so.
fn referring(
    source: &Source<'_>,
    descriptor: &Descriptor,
) -> Result<Option<Option<Digest>>, ImportError> {
    if descriptor.is_index() {
        return Ok(None);
    }
    let Some(bytes) = document(source, descriptor)? else {
        return Ok(None);
    };
    let Ok(Document::Manifest(manifest)) = Document::parse(&bytes, Some(&descriptor.media_type))
    else {
        return Ok(None);
    };
    let subject = subject(&bytes);
    let is_image = [OCI_CONFIG, DOCKER_CONFIG].contains(&&*manifest.config.media_type);
    let refers = subject.is_some() && !is_image;
    Ok((refers || signature::is_simple(&manifest)).then_some(subject))
}

fn subject(bytes: &[u8]) -> Option<Digest> {
    let referring: Referring = serde_json::from_slice(bytes).ok()?;
    referring.subject.map(|subject| subject.digest)
}

/// The signatures in a manifest; `subject` is what it is about, if that is known.
fn attachment(
    source: &Source<'_>,
    descriptor: &Descriptor,
    subject_said: Option<Digest>,
) -> Result<Option<Attached>, ImportError> {
    let Some(bytes) = document(source, descriptor)? else {
        return Ok(None);
    };
    let Ok(Document::Manifest(manifest)) = Document::parse(&bytes, Some(&descriptor.media_type))
    else {
        return Ok(None);
    };
    let refers = subject(&bytes);
    let mut sizes = BTreeMap::from([(descriptor.digest, descriptor.size)]);
    let found = signature::in_manifest(&manifest, |layer| {
        let bytes = small(source, layer)?;
        if bytes.is_some() {
            sizes.insert(layer.digest, layer.size);
        }
        Ok::<_, ImportError>(bytes)
    })?;
    let named = || found.iter().find_map(signature::Signature::claims);
    let Some(subject) = subject_said.or(refers).or_else(named) else {
        return Ok(None);
    };
    if found.is_empty() {
        return Ok(None);
    }
    if small(source, &manifest.config)?.is_some() {
        sizes.insert(manifest.config.digest, manifest.config.size);
    }
    let tag = refers
        .is_none()
        .then(|| format!("sha256-{}.sig", subject.hex()));
    let signature = ImportedSignature {
        subject,
        digest: descriptor.digest,
        media_type: descriptor.media_type.clone(),
        tag,
        blobs: sizes.keys().copied().collect(),
    };
    Ok(Some(Attached { signature, sizes }))
}

/// A manifest, if it is there and small enough to be one of signatures.
fn document(source: &Source<'_>, descriptor: &Descriptor) -> Result<Option<Vec<u8>>, ImportError> {
    if descriptor.size > DOCUMENT_BYTES_MAX {
        return Ok(None);
    }
    source.document(descriptor, DOCUMENT_BYTES_MAX)
}

fn small(source: &Source<'_>, part: &Descriptor) -> Result<Option<Vec<u8>>, ImportError> {
    if part.size > PART_BYTES_MAX {
        return Ok(None);
    }
    source.document(part, PART_BYTES_MAX)
}

/// Whether a manifest that was parsed is of use for an image with these documents.
pub(super) fn is_about(attached: &Attached, image: &Digest, parts: &BTreeMap<Digest, u64>) -> bool {
    let subject = &attached.signature.subject;
    subject == image || parts.contains_key(subject)
}

/// The manifest of signatures of an import, read back.
pub(crate) fn manifest_of(bytes: &[u8], media_type: &str) -> Option<Manifest> {
    match Document::parse(bytes, Some(media_type)) {
        Ok(Document::Manifest(manifest)) => Some(manifest),
        _ => None,
    }
}
