//! Images composed by hand: layers, configs, manifests and OCI layouts, right or wrong.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::Path;

use foreshore_images::Digest;
use serde_json::{Value, json};

pub(crate) const INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub(crate) const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub(crate) const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";

/// A layer: its blob, and the digest of what is in it.
#[derive(Clone)]
pub(crate) struct Layer {
    pub(crate) blob: Vec<u8>,
    pub(crate) diff_id: Digest,
    pub(crate) media_type: String,
}

/// A tar of files by name.
pub(crate) fn tar(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, content) in files {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        header.set_mtime(1_000_000_000);
        header.set_size(content.len() as u64);
        builder.append_data(&mut header, name, *content).unwrap();
    }
    builder.into_inner().unwrap()
}

pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

impl Layer {
    pub(crate) fn plain(files: &[(&str, &[u8])]) -> Self {
        let blob = tar(files);
        Self {
            diff_id: Digest::of(&blob),
            blob,
            media_type: LAYER.to_owned(),
        }
    }

    pub(crate) fn gzip(files: &[(&str, &[u8])]) -> Self {
        let tar = tar(files);
        Self {
            diff_id: Digest::of(&tar),
            blob: gzip(&tar),
            media_type: format!("{LAYER}+gzip"),
        }
    }
}

/// Blobs and documents by digest.
#[derive(Default, Clone)]
pub(crate) struct Blobs(pub(crate) BTreeMap<Digest, Vec<u8>>);

impl Blobs {
    /// Adds a blob; its descriptor.
    pub(crate) fn add(&mut self, media_type: &str, bytes: Vec<u8>) -> Value {
        let digest = Digest::of(&bytes);
        let descriptor = json!({"mediaType": media_type, "digest": digest, "size": bytes.len()});
        self.0.insert(digest, bytes);
        descriptor
    }

    /// Adds an image for a platform such as `("arm", "v7")`; its manifest's descriptor, platform included.
    pub(crate) fn image(
        &mut self,
        (architecture, variant): (&str, &str),
        layers: &[Layer],
    ) -> Value {
        let config = json!({
            "os": "linux", "architecture": architecture, "variant": variant,
            "config": {"Entrypoint": ["/bin/app"], "Cmd": null, "Env": ["A=1"], "User": "1000:1000",
                       "WorkingDir": "/srv", "StopSignal": "SIGQUIT", "ExposedPorts": {"80/tcp": {}}},
            "rootfs": {"type": "layers", "diff_ids": layers.iter().map(|layer| layer.diff_id).collect::<Vec<_>>()},
        });
        let config = self.add(
            "application/vnd.oci.image.config.v1+json",
            config.to_string().into_bytes(),
        );
        let layers: Vec<Value> = layers
            .iter()
            .map(|layer| self.add(&layer.media_type, layer.blob.clone()))
            .collect();
        let manifest =
            json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": layers});
        let mut descriptor = self.add(MANIFEST, manifest.to_string().into_bytes());
        descriptor["platform"] = json!({"os": "linux", "architecture": architecture});
        if !variant.is_empty() {
            descriptor["platform"]["variant"] = json!(variant);
        }
        descriptor
    }

    /// Adds an index; its descriptor.
    pub(crate) fn index(&mut self, manifests: &[Value]) -> Value {
        let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": manifests});
        self.add(INDEX, index.to_string().into_bytes())
    }

    /// Writes an OCI layout in which `image` has the tag `tag`.
    pub(crate) fn write_layout(&self, path: &Path, image: &Value, tag: &str) {
        fs::create_dir_all(path.join("blobs/sha256")).unwrap();
        for (digest, bytes) in &self.0 {
            fs::write(path.join("blobs/sha256").join(digest.hex()), bytes).unwrap();
        }
        let mut image = image.clone();
        image["annotations"] = json!({"org.opencontainers.image.ref.name": tag});
        let index = json!({"schemaVersion": 2, "manifests": [image]});
        fs::write(path.join("index.json"), index.to_string()).unwrap();
        fs::write(path.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    }
}

pub(crate) fn digest(descriptor: &Value) -> Digest {
    descriptor["digest"].as_str().unwrap().parse().unwrap()
}
