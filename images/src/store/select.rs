//! From a reference to the one manifest that runs on a platform, through image indexes.

use crate::manifest::{CONFIG_BYTES_MAX, ConfigDocument, Descriptor, Document, Index, Manifest};
use crate::registry::RawManifest;
use crate::{Digest, Platform, Reference};

use super::StageError;
use super::origin::Origin;

/// How deep indexes may nest. One level is usual, two happen.
const DEPTH_MAX: usize = 4;
/// Documents fetched for one image, so that an index of indexes cannot keep us busy.
const DOCUMENTS_MAX: usize = 16;

/// An image that was found for a platform; all of it checked against the digests above it.
pub(super) struct Selected {
    /// What the reference names.
    pub(super) root: RawManifest,
    /// The manifest chosen; its bytes are `root`'s when that is not an index.
    pub(super) raw: RawManifest,
    pub(super) manifest: Manifest,
    pub(super) config: ConfigDocument,
    pub(super) config_bytes: Vec<u8>,
}

/// Fetches index, manifest and config.
///
/// Entries of an index are tried best first (see [`Platform::rank`]), those that do not say their platform
/// last; these, and images without an index, are asked in their config.
pub(super) fn select(
    origin: Origin<'_>,
    reference: &Reference,
    platform: &Platform,
) -> Result<Selected, StageError> {
    let root = origin.manifest(reference)?.ok_or_else(|| {
        let image = reference.to_string();
        StageError::Missing { image }
    })?;
    let mut search = Search {
        origin,
        reference,
        platform,
        fetched: 1,
        offered: Vec::new(),
    };
    match search.descend(root.clone(), false, DEPTH_MAX)? {
        Some((raw, manifest, config, config_bytes)) => Ok(Selected {
            root,
            raw,
            manifest,
            config,
            config_bytes,
        }),
        None => {
            let mut offered: Vec<String> = search.offered.iter().map(ToString::to_string).collect();
            offered.sort();
            offered.dedup();
            offered.truncate(16);
            let offered = if offered.is_empty() {
                "nothing known".to_owned()
            } else {
                offered.join(", ")
            };
            Err(StageError::NoPlatform {
                image: reference.to_string(),
                platform: Box::new(platform.clone()),
                offered,
            })
        }
    }
}

struct Search<'a> {
    origin: Origin<'a>,
    reference: &'a Reference,
    platform: &'a Platform,
    fetched: usize,
    /// What the image is there for, to say so when nothing fits.
    offered: Vec<Platform>,
}

type Found = (RawManifest, Manifest, ConfigDocument, Vec<u8>);

impl Search<'_> {
    /// `trusted` is whether an index said that this runs here.
    fn descend(
        &mut self,
        raw: RawManifest,
        trusted: bool,
        depth: usize,
    ) -> Result<Option<Found>, StageError> {
        let bad = |source| StageError::Document {
            image: self.reference.to_string(),
            digest: raw.digest,
            source,
        };
        match Document::parse(&raw.bytes, Some(&raw.media_type)).map_err(bad)? {
            Document::Manifest(manifest) => self.check(raw, manifest, trusted),
            Document::Index(index) => {
                for (descriptor, trusted) in ranked(&index, self.platform) {
                    self.fetched += 1;
                    if depth == 0 || self.fetched > DOCUMENTS_MAX {
                        return Err(StageError::IndexTooDeep {
                            image: self.reference.to_string(),
                            digest: raw.digest,
                        });
                    }
                    let child = self.reference.with_digest(descriptor.digest);
                    let Some(child) = self.origin.manifest(&child)? else {
                        continue;
                    };
                    if child.bytes.len() as u64 != descriptor.size {
                        return Err(StageError::SizeLie {
                            image: self.reference.to_string(),
                            digest: descriptor.digest,
                            declared: descriptor.size,
                        });
                    }
                    if let Some(found) = self.descend(child, trusted, depth - 1)? {
                        return Ok(Some(found));
                    }
                }
                self.offered.extend(
                    index
                        .manifests
                        .into_iter()
                        .filter_map(|entry| entry.platform),
                );
                Ok(None)
            }
        }
    }

    fn check(
        &mut self,
        raw: RawManifest,
        manifest: Manifest,
        trusted: bool,
    ) -> Result<Option<Found>, StageError> {
        let config_bytes = self.config(&raw.digest, &manifest.config)?;
        let config =
            ConfigDocument::parse(&config_bytes, manifest.layers.len()).map_err(|source| {
                StageError::Document {
                    image: self.reference.to_string(),
                    digest: manifest.config.digest,
                    source,
                }
            })?;
        // Cross builds often carry the builder's platform in the config: what an index says is better.
        if !trusted
            && let Some(offered) = config.platform()
            && self.platform.rank(&offered).is_none()
        {
            self.offered.push(offered);
            return Ok(None);
        }
        Ok(Some((raw, manifest, config, config_bytes)))
    }

    fn config(&self, manifest: &Digest, config: &Descriptor) -> Result<Vec<u8>, StageError> {
        if config.size > CONFIG_BYTES_MAX {
            return Err(StageError::ConfigTooLarge {
                image: self.reference.to_string(),
                digest: *manifest,
                max: CONFIG_BYTES_MAX,
            });
        }
        self.origin.config(self.reference, config)
    }
}

/// The entries worth trying, best first, and whether the index vouches for their platform.
fn ranked<'i>(index: &'i Index, platform: &Platform) -> Vec<(&'i Descriptor, bool)> {
    let mut ranked: Vec<(u32, &Descriptor, bool)> = index
        .manifests
        .iter()
        .filter(|entry| entry.is_document())
        .filter_map(|entry| match &entry.platform {
            Some(offered) => platform
                .rank(offered)
                .map(|rank| (rank, entry, !entry.is_index())),
            None => Some((u32::MAX, entry, false)),
        })
        .collect();
    // Stable: among equals the first wins, as in containerd and Docker.
    ranked.sort_by_key(|(rank, ..)| *rank);
    ranked
        .into_iter()
        .map(|(_, entry, trusted)| (entry, trusted))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::OCI_MANIFEST;

    #[test]
    fn best_first_and_the_silent_last() {
        let entry = |name: &str, platform: Option<&str>| Descriptor {
            media_type: if name == "artifact" {
                "application/spdx+json"
            } else {
                OCI_MANIFEST
            }
            .to_owned(),
            digest: Digest::of(name.as_bytes()),
            size: 1,
            platform: platform.map(|text| text.parse().unwrap()),
            annotations: [("name".to_owned(), name.to_owned())].into(),
        };
        let index = Index {
            schema_version: 2,
            media_type: None,
            manifests: vec![
                entry("silent", None),
                entry("artifact", None),
                entry("v5", Some("linux/arm/v5")),
                entry("amd64", Some("linux/amd64")),
                entry("attestation", Some("unknown/unknown")),
                entry("v7", Some("linux/arm/v7")),
                entry("v7-again", Some("linux/arm/v7")),
                entry("v6", Some("linux/arm/v6")),
            ],
        };
        let names = |platform: Platform| -> Vec<&str> {
            ranked(&index, &platform)
                .into_iter()
                .map(|(entry, _)| entry.annotations["name"].as_str())
                .collect()
        };
        assert_eq!(
            names(Platform::linux("arm", "v7")),
            ["v7", "v7-again", "v6", "v5", "silent"]
        );
        assert_eq!(names(Platform::linux("amd64", "")), ["amd64", "silent"]);
        assert_eq!(names(Platform::linux("arm64", "v8")), ["silent"]);
    }
}
