//! The hub's registry, as deltas need it: images come out of it, deltas go into it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{BufWriter, Write as _};
use std::path::Path;

use foreshore_delta::image::Image;
use foreshore_images::manifest::{
    CONFIG_BYTES_MAX, ConfigDocument, Descriptor, Document, OCI_INDEX, OCI_MANIFEST,
};
use foreshore_images::registry::{Client, FetchError, RawManifest};
use foreshore_images::{Digest, Fault, Platform, Reference};
use serde_json::json;

use super::{chain, failure};
use crate::client::{HUB_HOST, Hub};
use crate::failure::{Failure, code};

/// How deep indexes may nest.
const DEPTH_MAX: usize = 4;

pub(super) struct Registry {
    hub: Hub,
    client: Client,
}

impl Registry {
    pub(super) fn new(hub: Hub) -> Result<Self, Failure> {
        let client = Client::new(hub.registry()).map_err(|error| Failure::input(chain(&error)))?;
        Ok(Self { hub, client })
    }

    /// The variant for `platform` of `hub.internal/NAME:TAG`.
    pub(super) fn image(&self, spec: &str, platform: &Platform) -> Result<Image, Failure> {
        let reference = Reference::parse(spec)
            .map_err(|error| Failure::input(format_args!("{spec}: {error}")))?;
        let place = tempfile::tempdir().map_err(|error| disk("make a directory", &error))?;
        let raw = self
            .client
            .manifest(&reference)
            .map_err(|error| self.failure(&reference, &error))?;
        let layout = Layout::new(place.path())?;
        let mut offered = BTreeSet::new();
        if !self.take(&reference, &raw, platform, DEPTH_MAX, &layout, &mut offered)? {
            let offered = Vec::from_iter(offered).join(", ");
            return Err(Failure::input(format_args!(
                "{spec} has no image for {platform}; there is {offered}"
            )));
        }
        layout.finish(&raw)?;
        Image::open_as(spec, place.path(), platform).map_err(|error| failure(&error))
    }

    /// Fetches the best manifest below a document for the platform, and all that it names; whether there is one. Notes what
    /// else there is.
    fn take(
        &self,
        reference: &Reference,
        raw: &RawManifest,
        platform: &Platform,
        depth: usize,
        layout: &Layout<'_>,
        offered: &mut BTreeSet<String>,
    ) -> Result<bool, Failure> {
        layout.put(&raw.digest, &raw.bytes)?;
        let document = Document::parse(&raw.bytes, Some(&raw.media_type))
            .map_err(|error| Failure::input(format_args!("{reference}: {}", chain(&error))))?;
        let index = match document {
            Document::Index(index) => index,
            Document::Manifest(manifest) => {
                self.blob(reference, &manifest.config, layout)?;
                let config = layout.read(&manifest.config.digest)?;
                let config = ConfigDocument::parse(&config, manifest.layers.len());
                let other = config.ok().and_then(|config| config.platform());
                if let Some(other) = other.filter(|other| platform.rank(other).is_none()) {
                    offered.insert(other.to_string());
                    return Ok(false);
                }
                for layer in &manifest.layers {
                    self.blob(reference, layer, layout)?;
                }
                return Ok(true);
            }
        };
        let mut children: Vec<(u32, &Descriptor)> = Vec::new();
        for child in &index.manifests {
            let rank =
                (child.platform.as_ref()).map_or(Some(u32::MAX), |other| platform.rank(other));
            match (rank, &child.platform) {
                (Some(rank), _) if depth > 0 && child.is_document() => children.push((rank, child)),
                (None, Some(other)) => _ = offered.insert(other.to_string()),
                _ => {}
            }
        }
        children.sort_by_key(|(rank, _)| *rank);
        for (_, child) in children {
            let at = reference.with_digest(child.digest);
            match self.client.manifest(&at) {
                Ok(raw) => {
                    if self.take(&at, &raw, platform, depth - 1, layout, offered)? {
                        return Ok(true);
                    }
                }
                // What was imported may be one variant of several.
                Err(FetchError::NotFound { .. }) => {}
                Err(error) => return Err(self.failure(&at, &error)),
            }
        }
        Ok(false)
    }

    fn blob(
        &self,
        reference: &Reference,
        blob: &Descriptor,
        layout: &Layout<'_>,
    ) -> Result<(), Failure> {
        let path = layout.path(&blob.digest);
        if path.exists() {
            return Ok(());
        }
        let file = File::create(&path).map_err(|error| disk("write a blob", &error))?;
        let mut sink = BufWriter::new(file);
        self.client
            .blob(reference, blob, &mut sink, &mut |_| {})
            .map_err(|error| self.failure(reference, &error))?;
        sink.flush().map_err(|error| disk("write a blob", &error))
    }

    fn failure(&self, reference: &Reference, error: &FetchError) -> Failure {
        match (error, error.fault()) {
            (FetchError::NotFound { .. }, _) => {
                Failure::failed(format_args!("the hub has no image {reference}"))
                    .hint("see `foreshore image list`")
            }
            (FetchError::Denied { .. }, _) => Failure::failed(format_args!(
                "the hub refuses image {reference}: is the token an operator's?"
            ))
            .hint("give the hub's API token with --token-file or FORESHORE_TOKEN"),
            (_, Fault::Unreachable) => Failure::new(
                code::UNREACHABLE,
                format_args!(
                    "cannot reach the hub at {}: {}",
                    self.hub.url(),
                    chain(error)
                ),
            )
            .hint("set the address with --hub URL or FORESHORE_HUB"),
            _ => Failure::failed(chain(error)),
        }
    }

    /// Whether a manifest is in a repository: elsewhere no device would find what is about it.
    pub(super) fn expect(&self, repository: &str, digest: &Digest) -> Result<(), Failure> {
        if self.hub.has(&format!("/{repository}/manifests/{digest}"))? {
            return Ok(());
        }
        Err(Failure::failed(format_args!(
            "{HUB_HOST}/{repository} does not have the new image, {digest}"
        ))
        .hint("push or import it there first; deltas go beside the image that they make"))
    }

    /// Pushes an artifact of a layout, blobs first.
    pub(super) fn push(
        &self,
        repository: &str,
        layout: &Path,
        artifact: &Digest,
    ) -> Result<(), Failure> {
        let layout = Layout { root: layout };
        let bytes = layout.read(artifact)?;
        let document = Document::parse(&bytes, Some(OCI_MANIFEST));
        let Ok(Document::Manifest(manifest)) = document else {
            return Err(Failure::failed(format_args!(
                "{artifact} was not written whole"
            )));
        };
        for blob in manifest.layers.iter().chain([&manifest.config]) {
            if self
                .hub
                .has(&format!("/{repository}/blobs/{}", blob.digest))?
            {
                continue;
            }
            let mut file = File::open(layout.path(&blob.digest))
                .map_err(|error| disk("read a delta", &error))?;
            let path = format!("/{repository}/blobs/uploads/?digest={}", blob.digest);
            let kind = "application/octet-stream";
            self.hub.push("POST", &path, kind, blob.size, &mut file)?;
        }
        let path = format!("/{repository}/manifests/{artifact}");
        let size = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        self.hub
            .push("PUT", &path, OCI_MANIFEST, size, &mut bytes.as_slice())
    }
}

/// An OCI image layout.
struct Layout<'a> {
    root: &'a Path,
}

impl<'a> Layout<'a> {
    fn new(root: &'a Path) -> Result<Self, Failure> {
        fs::create_dir_all(root.join("blobs/sha256"))
            .map_err(|error| disk("make a directory", &error))?;
        Ok(Self { root })
    }

    fn path(&self, digest: &Digest) -> std::path::PathBuf {
        self.root.join("blobs/sha256").join(digest.hex())
    }

    fn put(&self, digest: &Digest, bytes: &[u8]) -> Result<(), Failure> {
        fs::write(self.path(digest), bytes).map_err(|error| disk("write a manifest", &error))
    }

    /// A document; what was fetched is no larger than that.
    fn read(&self, digest: &Digest) -> Result<Vec<u8>, Failure> {
        let path = self.path(digest);
        let size = fs::metadata(&path).map_or(0, |file| file.len());
        if size > CONFIG_BYTES_MAX {
            return Err(Failure::input(format_args!(
                "{digest} is no document: it has {size} bytes"
            )));
        }
        fs::read(&path).map_err(|error| disk("read a document", &error))
    }

    fn finish(&self, top: &RawManifest) -> Result<(), Failure> {
        let index = json!({
            "schemaVersion": 2, "mediaType": OCI_INDEX,
            "manifests": [{
                "mediaType": top.media_type, "digest": top.digest, "size": top.bytes.len(),
                "annotations": BTreeMap::<String, String>::new(),
            }],
        });
        for (name, text) in [
            ("index.json", index.to_string()),
            (
                "oci-layout",
                json!({"imageLayoutVersion": "1.0.0"}).to_string(),
            ),
        ] {
            fs::write(self.root.join(name), text)
                .map_err(|error| disk("write a layout", &error))?;
        }
        Ok(())
    }
}

fn disk(act: &str, error: &std::io::Error) -> Failure {
    Failure::failed(format_args!("cannot {act}: {error}"))
}
