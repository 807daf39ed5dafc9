//! A link to a registry that carries so many bytes a second and counts them.

use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// What is carried at once.
const CHUNK: usize = 16 << 10;

/// Listens until the process ends.
pub(super) struct Wire {
    address: String,
    down: Arc<AtomicU64>,
}

impl Wire {
    /// To the server at `host`, for all connections together `rate` bytes a second down; up without a limit.
    ///
    /// # Errors
    ///
    /// When there is no port to listen on.
    pub(super) fn open(host: &str, rate: u64) -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?.to_string();
        let down = Arc::new(AtomicU64::new(0));
        let (host, count) = (host.to_owned(), Arc::clone(&down));
        let free = Arc::new(Mutex::new(Instant::now()));
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let Ok(server) = TcpStream::connect(&host) else {
                    continue;
                };
                let (Ok(up), Ok(to)) = (client.try_clone(), server.try_clone()) else {
                    continue;
                };
                let (count, free) = (Arc::clone(&count), Arc::clone(&free));
                thread::spawn(move || carry(up, to, |_| {}));
                thread::spawn(move || {
                    carry(server, client, |bytes| {
                        thread::sleep(turn(&free, bytes, rate));
                        count.fetch_add(bytes, Ordering::Relaxed);
                    });
                });
            }
        });
        Ok(Self { address, down })
    }

    /// Where it listens.
    pub(super) fn address(&self) -> &str {
        &self.address
    }

    /// Bytes that went down since the last call.
    pub(super) fn take(&self) -> u64 {
        self.down.swap(0, Ordering::Relaxed)
    }

    /// The same, and they stay.
    pub(super) fn down(&self) -> u64 {
        self.down.load(Ordering::Relaxed)
    }
}

/// How long to wait before these bytes are sent, so that the rate holds for all.
fn turn(free: &Mutex<Instant>, bytes: u64, rate: u64) -> Duration {
    let now = Instant::now();
    let mut free = free.lock().unwrap_or_else(PoisonError::into_inner);
    let begin = (*free).max(now);
    *free = begin + Duration::from_nanos(bytes * 1_000_000_000 / rate.max(1));
    begin - now
}

fn carry(mut from: TcpStream, mut to: TcpStream, mut before: impl FnMut(u64)) {
    let mut chunk = vec![0; CHUNK];
    while let Ok(read @ 1..) = from.read(&mut chunk) {
        before(read as u64);
        if to.write_all(&chunk[..read]).is_err() {
            break;
        }
    }
    let _closed_already = to.shutdown(Shutdown::Write);
    let _closed_already = from.shutdown(Shutdown::Read);
}
