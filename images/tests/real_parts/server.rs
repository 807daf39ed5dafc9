//! A small HTTP server that says whatever a test wants it to.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

/// One request that came in.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    /// With the query.
    pub(crate) path: String,
    pub(crate) authorization: Option<String>,
    /// The first byte that is asked for.
    pub(crate) from: Option<usize>,
    /// What was sent with it.
    pub(crate) body: String,
}

/// What is answered.
#[derive(Clone)]
pub(crate) enum Reply {
    /// Status, further headers, body; with the right length.
    Full(u16, Vec<(String, String)>, Vec<u8>),
    /// A header that announces more than comes; then the connection ends.
    Truncated(Vec<u8>, usize),
    /// Status, further headers, and less of a body than the length that is announced; then the connection ends.
    Cut(u16, Vec<(String, String)>, Vec<u8>, usize),
    /// A 200 whose body goes on and on.
    Endless,
    /// A 200 of so many bytes that come one by one.
    Drip(usize),
    /// Nothing.
    Hang,
    /// A header, and then nothing.
    HangInBody(usize),
}

type Handler = dyn Fn(&Request) -> Reply + Send + Sync;

pub(crate) struct Server {
    /// `127.0.0.1:PORT`.
    pub(crate) host: String,
    log: Arc<Mutex<Vec<Request>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Serves on `address`, for example `127.0.0.1`, on a free port.
    pub(crate) fn start(
        address: &str,
        handler: impl Fn(&Request) -> Reply + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind((address, 0)).unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let (log, stop) = (
            Arc::new(Mutex::new(Vec::new())),
            Arc::new(AtomicBool::new(false)),
        );
        let (handler, shared_log, stopped): (Arc<Handler>, _, _) =
            (Arc::new(handler), Arc::clone(&log), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if stopped.load(Ordering::SeqCst) {
                    return;
                }
                let (handler, log, stop) = (
                    Arc::clone(&handler),
                    Arc::clone(&shared_log),
                    Arc::clone(&stopped),
                );
                std::thread::spawn(move || answer(&stream, &*handler, &log, &stop));
            }
        });
        Self {
            host,
            log,
            stop,
            thread: Some(thread),
        }
    }

    pub(crate) fn requests(&self) -> Vec<Request> {
        self.log.lock().unwrap().clone()
    }

    /// How many requests had this in their path.
    pub(crate) fn count(&self, part: &str) -> usize {
        self.requests()
            .iter()
            .filter(|request| request.path.contains(part))
            .count()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(&self.host);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

pub(crate) fn ok(media_type: &str, body: Vec<u8>) -> Reply {
    Reply::Full(
        200,
        vec![("Content-Type".to_owned(), media_type.to_owned())],
        body,
    )
}

pub(crate) fn status(status: u16) -> Reply {
    Reply::Full(status, Vec::new(), Vec::new())
}

pub(crate) fn with_header(status: u16, name: &str, value: &str) -> Reply {
    Reply::Full(
        status,
        vec![(name.to_owned(), value.to_owned())],
        Vec::new(),
    )
}

/// What a server that knows ranges says: 206 when it is asked for the rest, and at most `most` bytes before the connection
/// ends.
pub(crate) fn ranged(bytes: &[u8], request: &Request, most: usize) -> Reply {
    let from = request.from.unwrap_or(0).min(bytes.len());
    let rest = &bytes[from..];
    let (status, headers) = match request.from {
        Some(_) => (
            206,
            vec![(
                "Content-Range".to_owned(),
                format!("bytes {from}-{}/{}", bytes.len() - 1, bytes.len()),
            )],
        ),
        None => (200, Vec::new()),
    };
    Reply::Cut(
        status,
        headers,
        rest[..rest.len().min(most)].to_vec(),
        rest.len(),
    )
}

fn answer(stream: &TcpStream, handler: &Handler, log: &Mutex<Vec<Request>>, stop: &AtomicBool) {
    let mut reader = BufReader::new(stream);
    let mut lines = reader.by_ref().lines();
    let Some(Ok(first)) = lines.next() else {
        return;
    };
    let path = first.split(' ').nth(1).unwrap_or_default().to_owned();
    let mut authorization = None;
    let mut from = None;
    let mut length = 0;
    for line in lines {
        let Ok(line) = line else { return };
        if line.is_empty() {
            break;
        }
        if let Some((name, value)) = line.split_once(": ")
            && name.eq_ignore_ascii_case("authorization")
        {
            authorization = Some(value.to_owned());
        }
        if let Some(range) = line.to_ascii_lowercase().strip_prefix("range: bytes=") {
            from = range.trim_end_matches('-').parse().ok();
        }
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length: ") {
            length = value.parse().unwrap_or(0);
        }
    }
    let mut body = String::new();
    if reader.take(length).read_to_string(&mut body).is_err() {
        return;
    }
    let request = Request {
        path,
        authorization,
        from,
        body,
    };
    log.lock().unwrap().push(request.clone());
    // The client may hang up at any point; that is its right.
    let _ = write_reply(stream, handler(&request), stop);
}

fn write_reply(mut stream: &TcpStream, reply: Reply, stop: &AtomicBool) -> std::io::Result<()> {
    let hang = || {
        while !stop.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(20));
        }
    };
    match reply {
        Reply::Full(status, headers, body) => {
            write!(
                stream,
                "HTTP/1.1 {status} X\r\nConnection: close\r\nContent-Length: {}\r\n",
                body.len()
            )?;
            for (name, value) in headers {
                write!(stream, "{name}: {value}\r\n")?;
            }
            stream.write_all(b"\r\n")?;
            stream.write_all(&body)
        }
        Reply::Cut(status, headers, body, announced) => {
            write!(
                stream,
                "HTTP/1.1 {status} X\r\nConnection: close\r\nContent-Length: {announced}\r\n"
            )?;
            for (name, value) in headers {
                write!(stream, "{name}: {value}\r\n")?;
            }
            stream.write_all(b"\r\n")?;
            stream.write_all(&body)
        }
        Reply::Truncated(body, announced) => {
            write!(
                stream,
                "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {announced}\r\n\r\n"
            )?;
            stream.write_all(&body)
        }
        Reply::Endless => {
            stream.write_all(
                b"HTTP/1.1 200 OK\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n",
            )?;
            let chunk = [&b"10000\r\n"[..], &[b'x'; 0x10000], b"\r\n"].concat();
            while !stop.load(Ordering::SeqCst) {
                stream.write_all(&chunk)?;
            }
            Ok(())
        }
        Reply::Drip(count) => {
            write!(
                stream,
                "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {count}\r\n\r\n"
            )?;
            for _ in 0..count {
                if stop.load(Ordering::SeqCst) {
                    break;
                }
                stream.write_all(b" ")?;
                std::thread::sleep(Duration::from_millis(100));
            }
            Ok(())
        }
        Reply::Hang => {
            hang();
            Ok(())
        }
        Reply::HangInBody(count) => {
            write!(
                stream,
                "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {count}\r\n\r\nxx"
            )?;
            hang();
            Ok(())
        }
    }
}
