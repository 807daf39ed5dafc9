//! A registry endpoint over HTTP with images of one empty layer.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use foreshore_protocol::Digest;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

type Blobs = Rc<RefCell<BTreeMap<String, (String, Vec<u8>)>>>;

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

#[derive(Debug)]
pub struct Registry {
    blobs: Blobs,
    pub url: String,
}

impl Registry {
    pub fn start() -> Self {
        let blobs = Blobs::default();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let listener = TcpListener::from_std(listener).unwrap();
        let served = Rc::clone(&blobs);
        tokio::task::spawn_local(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                tokio::task::spawn_local(answer(stream, Rc::clone(&served)));
            }
        });
        Self { blobs, url }
    }

    fn put(&self, media_type: &str, bytes: Vec<u8>) -> serde_json::Value {
        let digest = Digest::of(&bytes).to_string();
        let descriptor =
            serde_json::json!({"mediaType": media_type, "digest": digest, "size": bytes.len()});
        self.blobs
            .borrow_mut()
            .insert(digest, (media_type.to_owned(), bytes));
        descriptor
    }

    /// An image that differs by `name`; its reference.
    pub fn image(&self, name: &str) -> String {
        // An archive of no files: two zero blocks (POSIX ustar).
        let layer = vec![0; 1024];
        let diff_id = Digest::of(&layer).to_string();
        let layer = self.put("application/vnd.oci.image.layer.v1.tar", layer);
        let config = serde_json::json!({
            "os": "linux",
            "architecture": foreshore_images::Platform::host().architecture,
            "config": {"Cmd": ["/server"], "Env": [format!("NAME={name}")]},
            "rootfs": {"type": "layers", "diff_ids": [diff_id]},
        });
        let config = self.put(
            "application/vnd.oci.image.config.v1+json",
            serde_json::to_vec(&config).unwrap(),
        );
        let manifest = serde_json::json!({
            "schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": [layer],
        });
        let manifest = self.put(MANIFEST, serde_json::to_vec(&manifest).unwrap());
        format!(
            "hub.internal/{name}@{}",
            manifest["digest"].as_str().unwrap()
        )
    }
}

async fn answer(mut stream: TcpStream, blobs: Blobs) {
    let mut request = Vec::new();
    while !request.ends_with(b"\r\n\r\n") {
        let mut byte = [0; 1];
        match stream.read(&mut byte).await {
            Ok(1) => request.push(byte[0]),
            _ => return,
        }
    }
    let text = String::from_utf8_lossy(&request).into_owned();
    let path = text.split(' ').nth(1).unwrap_or_default();
    let name = path.rsplit('/').next().unwrap_or_default();
    let found = blobs.borrow().get(name).cloned();
    let (head, body) = match found {
        Some((media_type, bytes)) => (
            format!(
                "HTTP/1.1 200 OK\r\nContent-Type: {media_type}\r\nContent-Length: {}",
                bytes.len()
            ),
            bytes,
        ),
        None if path == "/v2/" => (
            "HTTP/1.1 200 OK\r\nContent-Length: 0".to_owned(),
            Vec::new(),
        ),
        None => (
            "HTTP/1.1 404 Not Found\r\nContent-Length: 0".to_owned(),
            Vec::new(),
        ),
    };
    let body = if text.starts_with("HEAD") {
        Vec::new()
    } else {
        body
    };
    let _gone = stream
        .write_all(format!("{head}\r\nConnection: close\r\n\r\n").as_bytes())
        .await;
    let _gone = stream.write_all(&body).await;
}
