//! What a refused request still sends is taken and thrown away, so that its client reads why.
//!
//! Clients look for an answer when they have sent all. When nobody takes what they send, they find a broken pipe, call
//! it a bad network and try again, and the operator never learns that the disk is full.

use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, BodyDataStream, Bytes};
use axum::extract::Request;
use axum::http::header;
use axum::middleware::Next;
use axum::response::Response;
use futures_util::{Stream as _, StreamExt as _, stream};

/// How long what a refused request still sends is taken, and how much of it in bytes.
const WITHIN: Duration = Duration::from_secs(10);
const BYTES: u64 = 1 << 30;

/// The body of a request, which its handler reads first.
#[derive(Clone)]
struct Shared(Arc<Mutex<Source>>);

struct Source {
    stream: BodyDataStream,
    /// The handler asked for it, so a client that waits for `100 Continue` was told to send.
    begun: bool,
    /// Nothing more comes.
    ended: bool,
}

impl Shared {
    fn poll(&self, context: &mut Context<'_>) -> Poll<Option<Result<Bytes, axum::Error>>> {
        let mut source = self.source();
        source.begun = true;
        if source.ended {
            return Poll::Ready(None);
        }
        let polled = std::pin::Pin::new(&mut source.stream).poll_next(context);
        source.ended = matches!(polled, Poll::Ready(None | Some(Err(_))));
        polled
    }

    fn source(&self) -> std::sync::MutexGuard<'_, Source> {
        // A stream that panicked is asked at most once more, by the drain.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn into_stream(self) -> impl futures_util::Stream<Item = Result<Bytes, axum::Error>> + Unpin {
        stream::poll_fn(move |context| self.poll(context))
    }
}

/// Answers as `next` does. If that is a refusal, the rest of the request is taken before, for at most ten seconds and
/// 1 GiB; whoever sends more than that finds the connection closed.
pub(super) async fn take(request: Request, next: Next) -> Response {
    let waits = request.headers().contains_key(header::EXPECT);
    let (parts, body) = request.into_parts();
    let shared = Shared(Arc::new(Mutex::new(Source {
        stream: body.into_data_stream(),
        begun: false,
        ended: false,
    })));
    let body = Body::from_stream(shared.clone().into_stream());
    let response = next.run(Request::from_parts(parts, body)).await;
    let refused = response.status().is_client_error() || response.status().is_server_error();
    // A client that was never told to go on sends nothing before it has read the answer.
    if refused && (!waits || shared.source().begun) {
        let mut rest = shared.into_stream();
        let take = async {
            let mut left = BYTES;
            while let Some(Ok(chunk)) = rest.next().await {
                left = left.saturating_sub(chunk.len() as u64);
                if left == 0 {
                    break;
                }
            }
        };
        let _refused_in_any_case = tokio::time::timeout(WITHIN, take).await;
    }
    response
}
