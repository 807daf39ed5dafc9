//! The service of `cargo xtask demo`: a web server of one file, standard library only, that
//! `xtask` compiles to a static program with plain `rustc`.
//!
//! | path | answer |
//! |---|---|
//! | `/version` | 200 and what the image's `VERSION` says |
//! | `/ready` | 200, or 500 when the image says `READY=no`: the broken version of the demo |

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

unsafe extern "C" {
    fn signal(number: i32, handler: usize) -> usize;
    fn _exit(status: i32) -> !;
}

const SIGTERM: i32 = 15;

/// The first process of a container gets no signal it has not asked for (pid_namespaces(7)); without
/// this, stopping would have to wait for SIGKILL.
extern "C" fn leave(_signal: i32) {
    // SAFETY: _exit may be called from a signal handler (signal-safety(7)).
    unsafe { _exit(0) }
}

fn main() {
    if std::env::args().len() > 1 {
        // Run as a probe's command: it does nothing, and that well.
        return;
    }
    // SAFETY: `leave` is a handler of the type signal(2) wants.
    unsafe { signal(SIGTERM, leave as *const () as usize) };
    let version = std::env::var("VERSION").unwrap_or_else(|_| "unknown".to_owned());
    let ready = std::env::var("READY").map_or(true, |value| value != "no");
    let listener = TcpListener::bind("0.0.0.0:8080").expect("port 8080 is free in this network");
    println!("web {version} listens on port 8080");
    for stream in listener.incoming().flatten() {
        // One client that goes away or dawdles is not the next one's trouble.
        if let Err(error) = answer(stream, &version, ready) {
            eprintln!("web {version}: {error}");
        }
    }
}

fn answer(mut stream: TcpStream, version: &str, ready: bool) -> std::io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(1)))?;
    stream.set_write_timeout(Some(Duration::from_secs(1)))?;
    let mut request = [0; 1024];
    let length = stream.read(&mut request)?;
    let line = String::from_utf8_lossy(&request[..length]);
    let path = line.split(' ').nth(1).unwrap_or_default();
    let (status, body) = match path {
        "/version" => ("200 OK", version),
        "/ready" if ready => ("200 OK", "ready"),
        "/ready" => (
            "500 Internal Server Error",
            "this version is broken on purpose",
        ),
        _ => ("404 Not Found", "there is /version and /ready"),
    };
    let head = "content-type: text/plain\r\nconnection: close\r\n";
    let length = body.len();
    write!(
        stream,
        "HTTP/1.1 {status}\r\n{head}content-length: {length}\r\n\r\n{body}"
    )
}
