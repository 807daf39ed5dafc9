//! From a docker-archive to OCI: its layers are plain tars, and it has no manifest with digests.
//!
//! The result is the same for the same archive: gzip without a time, JSON in a fixed order.

use std::collections::BTreeMap;
use std::io::{self, BufReader, Read, Write};

use flate2::{Compression, write::GzEncoder};
use serde::Deserialize;
use sha2::{Digest as _, Sha256};

use super::spool::Spool;
use super::{ImportError, ImportLimits};
use crate::Digest;
use crate::compression::decompress;
use crate::manifest::{
    CONFIG_BYTES_MAX, ConfigDocument, Descriptor, Index, Manifest, OCI_CONFIG, OCI_LAYER_GZIP,
    OCI_MANIFEST,
};

/// An entry of `manifest.json`.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Item {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    #[serde(default)]
    layers: Option<Vec<String>>,
}

/// Puts manifests, configs and compressed layers into the spool and returns an index of the images by name.
pub(super) fn convert(
    spool: &Spool,
    manifest: &[u8],
    limits: &ImportLimits,
) -> Result<Index, ImportError> {
    let items: Vec<Item> =
        serde_json::from_slice(manifest).map_err(|source| ImportError::Index { source })?;
    let mut converted = BTreeMap::new();
    let mut manifests = Vec::new();
    for item in items {
        let descriptor = convert_item(spool, &item, limits, &mut converted)?;
        let names = item.repo_tags.unwrap_or_default();
        if names.is_empty() {
            manifests.push(descriptor.clone());
        }
        manifests.extend(names.into_iter().map(|name| Descriptor {
            annotations: [("org.opencontainers.image.ref.name".to_owned(), name)].into(),
            ..descriptor.clone()
        }));
    }
    Ok(Index {
        schema_version: 2,
        media_type: None,
        manifests,
    })
}

fn convert_item(
    spool: &Spool,
    item: &Item,
    limits: &ImportLimits,
    converted: &mut BTreeMap<Digest, (Digest, Descriptor)>,
) -> Result<Descriptor, ImportError> {
    let missing = |path: &str| ImportError::MissingFile {
        path: path.chars().take(256).collect(),
    };
    let config_bytes = spool
        .small(&item.config, CONFIG_BYTES_MAX)?
        .ok_or_else(|| missing(&item.config))?;
    let config = descriptor(
        OCI_CONFIG,
        Digest::of(&config_bytes),
        config_bytes.len() as u64,
    );
    let paths = item.layers.as_deref().unwrap_or_default();
    let document = ConfigDocument::parse(&config_bytes, paths.len()).map_err(|source| {
        ImportError::Document {
            digest: config.digest,
            source,
        }
    })?;
    let mut layers = Vec::new();
    for (path, expected) in paths.iter().zip(&document.rootfs.diff_ids) {
        let file = spool.digest_of(path).ok_or_else(|| missing(path))?;
        // The same layer, in many images of one archive, is compressed once.
        let (found, layer) = match converted.get(&file) {
            Some(known) => known.clone(),
            None => {
                let fresh = compress(spool, &file, limits)?;
                converted.insert(file, fresh.clone());
                fresh
            }
        };
        if found != *expected {
            return Err(ImportError::DiffId {
                path: path.chars().take(256).collect(),
                expected: *expected,
                found,
            });
        }
        layers.push(layer);
    }
    let manifest = Manifest {
        schema_version: 2,
        media_type: Some(OCI_MANIFEST.to_owned()),
        config,
        layers,
    };
    let bytes = serde_json::to_vec(&manifest).map_err(|source| ImportError::Index { source })?;
    let digest = spool.put(&bytes)?;
    Ok(descriptor(OCI_MANIFEST, digest, bytes.len() as u64))
}

/// The diff id of a layer and its compressed blob.
fn compress(
    spool: &Spool,
    file: &Digest,
    limits: &ImportLimits,
) -> Result<(Digest, Descriptor), ImportError> {
    let bad =
        |source| ImportError::Archive(Box::<dyn std::error::Error + Send + Sync>::from(source));
    let (file, _) = spool
        .open(file)?
        .ok_or(ImportError::MissingBlob { digest: *file })?;
    let mut tar = decompress(BufReader::with_capacity(64 << 10, file))
        .map_err(bad)?
        .take(limits.bytes_max + 1);
    let mut hasher = Sha256::new();
    let mut encoder = GzEncoder::new(spool.writer()?, Compression::default());
    let mut buffer = vec![0; 64 << 10];
    loop {
        match tar.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => {
                hasher.update(&buffer[..count]);
                encoder
                    .write_all(&buffer[..count])
                    .map_err(|source| spool.write_error(source))?;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(bad(error)),
        }
    }
    if tar.limit() == 0 {
        return Err(ImportError::TooLarge {
            max: limits.bytes_max,
        });
    }
    let writer = encoder
        .finish()
        .map_err(|source| spool.write_error(source))?;
    let size = writer.size();
    let digest = spool.commit(writer)?;
    Ok((
        Digest::from_bytes(hasher.finalize().into()),
        descriptor(OCI_LAYER_GZIP, digest, size),
    ))
}

fn descriptor(media_type: &str, digest: Digest, size: u64) -> Descriptor {
    Descriptor {
        media_type: media_type.to_owned(),
        digest,
        size,
        platform: None,
        annotations: BTreeMap::new(),
    }
}
