//! Reads what is left of a request that was refused before its end.
//!
//! A client that is still sending when the connection closes sees only that it broke, and never the answer that
//! says why (RFC 9112, section 9.6). So the rest is read and dropped, up to a bound.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, BodyDataStream, Bytes, HttpBody as _};
use axum::extract::Request;
use axum::http::header;
use axum::middleware::Next;
use axum::response::Response;
use futures_util::{Stream, StreamExt as _};

/// The most that is read and dropped, in bytes: layers of images are pushed whole.
const DROPPED_MAX: u64 = 1 << 30;

/// How long that may take.
const DROPPED_WITHIN: Duration = Duration::from_secs(10);

/// Passes a request on, and after a refusal reads what the handler left of its body.
pub(super) async fn drain(request: Request, next: Next) -> Response {
    // Who asks before sending has nothing under way.
    if request.body().is_end_stream() || request.headers().contains_key(header::EXPECT) {
        return next.run(request).await;
    }
    let (parts, body) = request.into_parts();
    let mut rest = Shared(Arc::new(Mutex::new(Rest::Open(body.into_data_stream()))));
    let response = next
        .run(Request::from_parts(parts, Body::from_stream(rest.clone())))
        .await;
    if response.status().is_client_error() || response.status().is_server_error() {
        let mut dropped = 0;
        let read = async {
            while let Some(Ok(chunk)) = rest.next().await {
                dropped += chunk.len() as u64;
                if dropped > DROPPED_MAX {
                    break;
                }
            }
        };
        // Whoever is not done by then sees the connection close.
        _ = tokio::time::timeout(DROPPED_WITHIN, read).await;
    }
    response
}

/// A body that handler and middleware both hold; only one of them reads at a time.
#[derive(Clone)]
struct Shared(Arc<Mutex<Rest>>);

enum Rest {
    Open(BodyDataStream),
    Ended,
}

impl Stream for Shared {
    type Item = Result<Bytes, axum::Error>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let mut rest = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Rest::Open(stream) = &mut *rest else {
            return Poll::Ready(None);
        };
        let polled = stream.poll_next_unpin(context);
        if matches!(polled, Poll::Ready(None | Some(Err(_)))) {
            *rest = Rest::Ended;
        }
        polled
    }
}
