//! A wire that counts what passes.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Passes connections on to an HTTP server and counts the bytes of its answers.
#[derive(Debug)]
pub struct Meter {
    url: String,
    bytes: Arc<AtomicU64>,
}

impl Meter {
    /// One before `url`, `http://HOST:PORT`. It ends with the test.
    ///
    /// # Panics
    ///
    /// When it cannot listen, or `url` is not of that form.
    #[must_use]
    pub fn before(url: &str) -> Self {
        let authority = url.trim_start_matches("http://").trim_end_matches('/');
        let server: SocketAddr = authority.parse().expect("an address and a port");
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
        let here = listener.local_addr().expect("it listens");
        let bytes = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&bytes);
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let Ok(up) = TcpStream::connect(server) else {
                    continue;
                };
                let ends = || Some((client.try_clone().ok()?, up.try_clone().ok()?));
                let Some((from, to)) = ends() else { continue };
                let nobody = Arc::new(AtomicU64::new(0));
                std::thread::spawn(move || pass(from, to, &nobody));
                let counted = Arc::clone(&counted);
                std::thread::spawn(move || pass(up, client, &counted));
            }
        });
        Self {
            url: format!("http://{here}"),
            bytes,
        }
    }

    /// Where it is.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// How many bytes came since the last time this was asked.
    #[must_use]
    pub fn take(&self) -> u64 {
        self.bytes.swap(0, Ordering::SeqCst)
    }
}

fn pass(mut from: TcpStream, mut to: TcpStream, count: &AtomicU64) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(read @ 1..) = from.read(&mut buffer) {
        count.fetch_add(read as u64, Ordering::SeqCst);
        if to.write_all(&buffer[..read]).is_err() {
            break;
        }
    }
    // Either end may be gone already.
    _ = to.shutdown(Shutdown::Write);
    _ = from.shutdown(Shutdown::Read);
}
