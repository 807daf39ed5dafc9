//! A registry over HTTP on a thread, with images of two layers: busybox, which all share, and a file of their own.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use foreshore_protocol::Digest;

type Blobs = Arc<Mutex<BTreeMap<String, (String, Vec<u8>)>>>;

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";

/// Ends at SIGTERM, as a first process must say that it wants to.
const SCRIPT: &str = "trap 'exit 0' TERM; while :; do /bin/busybox sleep 3600 & wait $!; done";

#[derive(Debug)]
pub struct Registry {
    blobs: Blobs,
    pub url: String,
    base: Vec<u8>,
}

impl Registry {
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let blobs = Blobs::default();
        let served = Arc::clone(&blobs);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (Ok(stream), blobs) = (stream, Arc::clone(&served)) else {
                    return;
                };
                std::thread::spawn(move || {
                    let _gone = answer(stream, &blobs);
                });
            }
        });
        let busybox =
            std::fs::read("/bin/busybox").expect("install busybox-static, or run cargo xtask test");
        let base = layer("bin/busybox", &busybox, 0o755);
        Self { blobs, url, base }
    }

    fn put(&self, media_type: &str, bytes: Vec<u8>) -> serde_json::Value {
        let digest = Digest::of(&bytes).to_string();
        let descriptor =
            serde_json::json!({"mediaType": media_type, "digest": digest, "size": bytes.len()});
        let blob = (media_type.to_owned(), bytes);
        self.blobs.lock().unwrap().insert(digest, blob);
        descriptor
    }

    /// An image that differs by `name`; its digest.
    pub fn image(&self, name: &str) -> Digest {
        let layers = [self.base.clone(), layer("name", name.as_bytes(), 0o644)];
        let diff_ids: Vec<String> = layers
            .iter()
            .map(|layer| Digest::of(layer).to_string())
            .collect();
        let layers = layers.map(|layer| self.put(LAYER, layer));
        let config = serde_json::json!({
            "os": "linux",
            "architecture": foreshore_images::Platform::host().architecture,
            "config": {"Cmd": ["/bin/busybox", "sh", "-c", SCRIPT]},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        let config = self.put(
            "application/vnd.oci.image.config.v1+json",
            serde_json::to_vec(&config).unwrap(),
        );
        let manifest = serde_json::json!({
            "schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": layers,
        });
        let manifest = self.put(MANIFEST, serde_json::to_vec(&manifest).unwrap());
        manifest["digest"].as_str().unwrap().parse().unwrap()
    }
}

fn layer(path: &str, content: &[u8], mode: u32) -> Vec<u8> {
    let mut archive = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(content.len() as u64);
    header.set_mode(mode);
    archive.append_data(&mut header, path, content).unwrap();
    archive.into_inner().unwrap()
}

fn answer(mut stream: TcpStream, blobs: &Blobs) -> std::io::Result<()> {
    let mut request = Vec::new();
    while !request.ends_with(b"\r\n\r\n") {
        let mut byte = [0; 1];
        stream.read_exact(&mut byte)?;
        request.push(byte[0]);
    }
    let text = String::from_utf8_lossy(&request).into_owned();
    let path = text.split(' ').nth(1).unwrap_or_default();
    let name = path.rsplit('/').next().unwrap_or_default();
    let found = blobs.lock().unwrap().get(name).cloned();
    let (head, body) = match found {
        Some((media_type, bytes)) => (format!("200 OK\r\nContent-Type: {media_type}"), bytes),
        None if path == "/v2/" => ("200 OK".to_owned(), Vec::new()),
        None => ("404 Not Found".to_owned(), Vec::new()),
    };
    let length = body.len();
    stream.write_all(
        format!("HTTP/1.1 {head}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n")
            .as_bytes(),
    )?;
    if !text.starts_with("HEAD") {
        stream.write_all(&body)?;
    }
    Ok(())
}
