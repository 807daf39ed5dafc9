//! Image indexes and manifests, and the artifacts that refer to them.

use foreshore_images::Platform;
use foreshore_images::delta::artifact::Artifact;
use foreshore_images::manifest::{
    DOCKER_INDEX, DOCKER_MANIFEST, Document, LAYERS_MAX, OCI_INDEX, OCI_MANIFEST,
};

use crate::{accepted, memory};

/// One document, read as each of the media types that a registry may give it.
///
/// # Panics
/// When it could be read in two ways, does not come back as written, or takes too much memory.
pub fn run(bytes: &[u8]) {
    // The least descriptor has some 110 bytes; one with an annotation takes some 900 in memory.
    let limit = (256 << 10) + 64 * bytes.len();
    let plain = memory::within(limit, || Document::parse(bytes, None).ok());
    for (media_type, index) in [
        (OCI_INDEX, true),
        (DOCKER_INDEX, true),
        (OCI_MANIFEST, false),
        (DOCKER_MANIFEST, false),
    ] {
        let told = Document::parse(bytes, Some(media_type)).ok();
        let expected = plain.clone().filter(|document| is_index(document) == index);
        assert_eq!(told, expected, "read as {media_type}");
    }
    if let Some(document) = &plain {
        accepted();
        check(bytes, document);
    }
    if let Ok(artifact) = memory::within(limit, || Artifact::parse(bytes)) {
        accepted();
        assert!(artifact.layers.len() <= LAYERS_MAX);
        assert!(
            artifact
                .layers
                .iter()
                .all(|layer| layer.trees.len() <= LAYERS_MAX)
        );
        let again = Artifact::parse(&artifact.to_json()).expect("what was written is read");
        assert_eq!(again, artifact);
    }
}

const fn is_index(document: &Document) -> bool {
    matches!(document, Document::Index(_))
}

fn check(bytes: &[u8], document: &Document) {
    assert_eq!(
        matches!(document.media_type(), OCI_INDEX | DOCKER_INDEX),
        is_index(document)
    );
    let (written, descriptors) = match document {
        Document::Index(index) => (serde_json::to_vec(index), index.manifests.clone()),
        Document::Manifest(manifest) => {
            assert!(manifest.layers.len() <= LAYERS_MAX);
            let config = std::iter::once(&manifest.config);
            let all = config.chain(&manifest.layers).cloned().collect();
            (serde_json::to_vec(manifest), all)
        }
    };
    let written = written.expect("a document can be written");
    let again = Document::parse(&written, Some(document.media_type()));
    assert_eq!(again.ok().as_ref(), Some(document));
    // No other program can see a list in an image, or an image in a list (CVE-2021-41190).
    // Texts that nobody reads need not be Unicode, so this may fail where reading does not.
    let value = serde_json::from_slice::<serde_json::Value>(bytes).unwrap_or_default();
    if value.is_object() {
        let has = |key: &str| value.get(key).is_some_and(|value| !value.is_null());
        assert_eq!(has("manifests"), is_index(document));
        assert_eq!(has("layers") || has("config"), !is_index(document));
    }
    for descriptor in descriptors {
        assert!(!descriptor.is_index() || descriptor.is_document());
        if let Some(platform) = &descriptor.platform {
            for host in ["linux/amd64", "linux/arm/v7", "linux/arm64/v8"] {
                let host: Platform = host.parse().expect("these are platforms");
                let rank = host.rank(platform);
                assert!(rank.is_none() || (platform.os == "linux" && rank <= Some(64)));
            }
            let one = [&platform.os, &platform.architecture, &platform.variant];
            if one.iter().all(|part| !part.contains('/'))
                && let Ok(parsed) = platform.to_string().parse::<Platform>()
            {
                assert_eq!(&parsed, platform);
            }
        }
    }
}
