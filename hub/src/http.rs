//! The HTTP server: accepts connections and hands each to the router, bounded in number, time and size.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};

mod patient;

use self::patient::Patient;

/// How many clients are served, and how patiently.
#[derive(Debug, Clone, Copy)]
struct Limits {
    /// Connections at once; more wait in the kernel's queue.
    connections: usize,
    /// A client that takes nothing of its answer for so long is dropped.
    stalled: Duration,
}

const LIMITS: Limits = Limits {
    connections: 1024,
    stalled: Duration::from_secs(30),
};

/// How long a client may take to send a request's head, also the next one on a connection it keeps.
const HEAD_WITHIN: Duration = Duration::from_secs(30);

/// The most bytes of a request's head.
const HEAD_MAX: usize = 64 * 1024;

/// The most headers of a request.
const HEADERS_MAX: usize = 100;

/// How long answers that have begun may take to end once the hub stops.
const LINGER: Duration = Duration::from_secs(3);

/// Serves until `stopping` says true, then lets answers that have begun end.
pub async fn serve(listener: TcpListener, router: Router, stopping: watch::Receiver<bool>) {
    serve_within(LIMITS, listener, router, stopping).await;
}

async fn serve_within(
    limits: Limits,
    listener: TcpListener,
    router: Router,
    mut stopping: watch::Receiver<bool>,
) {
    let graceful = GracefulShutdown::new();
    let permits = Arc::new(Semaphore::new(limits.connections));
    loop {
        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else {
            break;
        };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = stopping.wait_for(|stopping| *stopping) => break,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of file descriptors, mostly: it passes as connections end.
                tracing::warn!(%error, "failed to accept a connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        // Small answers should not wait for the client's delayed acknowledgement.
        _ = stream.set_nodelay(true);
        let connection = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_WITHIN)
            .max_buf_size(HEAD_MAX)
            .max_headers(HEADERS_MAX)
            .serve_connection(
                TokioIo::new(Patient::new(stream, limits.stalled)),
                TowerToHyperService::new(router.clone()),
            );
        let connection = graceful.watch(connection);
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a connection ended early");
            }
            drop(permit);
        });
    }
    drop(listener);
    if tokio::time::timeout(LINGER, graceful.shutdown())
        .await
        .is_err()
    {
        tracing::info!("answers that took too long to end were cut off");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::body::{Body, Bytes};
    use axum::routing::get;
    use futures_util::stream;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpStream;

    async fn ask(address: std::net::SocketAddr, path: &str) -> TcpStream {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let head = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(head.as_bytes()).await.unwrap();
        stream
    }

    #[tokio::test]
    async fn who_stops_reading_is_dropped_and_who_waits_for_events_is_not() {
        let limits = Limits {
            connections: 1,
            stalled: Duration::from_millis(200),
        };
        let endless = || async {
            let chunk = Bytes::from(vec![0; 64 << 10]);
            Body::from_stream(stream::repeat_with(move || {
                Ok::<_, std::io::Error>(chunk.clone())
            }))
        };
        // Says something more seldom than stalled clients are dropped.
        let seldom = || async {
            Body::from_stream(stream::unfold(0, |number| async move {
                tokio::time::sleep(Duration::from_millis(500)).await;
                (number < 3).then(|| (Ok::<_, std::io::Error>(Bytes::from("event\n")), number + 1))
            }))
        };
        let router = Router::new()
            .route("/endless", get(endless))
            .route("/seldom", get(seldom));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (_stop, stopping) = watch::channel(false);
        tokio::spawn(serve_within(limits, listener, router, stopping));

        // It reads nothing, and keeps the only place until it is dropped.
        let stalled = ask(address, "/endless").await;
        let answer = async {
            let mut answer = String::new();
            let mut waiting = ask(address, "/seldom").await;
            waiting.read_to_string(&mut answer).await.unwrap();
            answer
        };
        let answer = tokio::time::timeout(Duration::from_secs(30), answer)
            .await
            .expect("the stalled client gives its place up");
        assert_eq!(answer.matches("event").count(), 3, "{answer}");
        drop(stalled);
    }
}
