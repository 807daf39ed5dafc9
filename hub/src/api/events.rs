//! `/events`: the log, and the log as it grows.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::Duration;

use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::http::HeaderMap;
use axum::response::sse::{Event, KeepAlive, Sse};
use foreshore_protocol::api::{EventView, List};
use futures_util::{Stream, stream};
use rusqlite::Connection;
use serde::Deserialize;
use tokio::sync::watch;

use super::{Api, Failure, Hub};
use crate::store::{self, StoreError};

/// Events in one answer unless asked otherwise, and at most.
const LIMIT_DEFAULT: u64 = 100;
const LIMIT_MAX: u64 = 1000;

/// Events that a stream holds at most for a reader that is slow; the rest waits in the store.
const STREAM_PAGE: u64 = 100;

/// A comment is sent so often when nothing happens, so that both sides notice a dead connection.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// The query of both.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Range {
    /// Only later ones.
    after: Option<u64>,
    /// At most so many.
    limit: Option<u64>,
}

/// `GET /events?after=&limit=`: without `after`, the newest.
///
/// # Errors
///
/// When the query is not understood, or the store fails.
pub async fn list(
    State(api): Hub,
    range: Result<Query<Range>, QueryRejection>,
) -> Result<Json<List<EventView>>, Failure> {
    let Query(range) = range?;
    let limit = range.limit.unwrap_or(LIMIT_DEFAULT).min(LIMIT_MAX);
    let read = move |connection: &Connection| {
        let after = match range.after {
            Some(after) => after.min(i64::MAX as u64),
            None => store::event::newest(connection)?.saturating_sub(limit),
        };
        Ok::<_, StoreError>(store::event::after(connection, after, limit)?)
    };
    Ok(Json(List {
        items: api.controller.store().read(read).await?,
    }))
}

/// `GET /events/stream?after=`: from there on, or from the header `Last-Event-ID`, which a browser sends when it
/// reconnects; without both, from now on.
///
/// # Errors
///
/// When the query is not understood, or the store fails.
pub async fn stream(
    State(api): Hub,
    headers: HeaderMap,
    range: Result<Query<Range>, QueryRejection>,
) -> Result<Sse<impl Stream<Item = Result<Event, Infallible>>>, Failure> {
    let Query(range) = range?;
    let last = headers
        .get("last-event-id")
        .and_then(|value| value.to_str().ok()?.trim().parse().ok());
    let news = api.controller.event_news();
    let after = match last.or(range.after) {
        Some(after) => after,
        None => {
            let newest =
                |connection: &Connection| Ok::<_, StoreError>(store::event::newest(connection)?);
            api.controller.store().read(newest).await?
        }
    };
    let stopping = api.stopping.clone();
    let reader = Reader {
        api,
        news,
        stopping,
        after: after.min(i64::MAX as u64),
        page: VecDeque::new(),
    };
    Ok(Sse::new(stream::unfold(reader, Reader::next))
        .keep_alive(KeepAlive::new().interval(KEEP_ALIVE)))
}

/// One reader's place in the log.
struct Reader {
    api: Api,
    news: watch::Receiver<()>,
    stopping: watch::Receiver<bool>,
    after: u64,
    page: VecDeque<EventView>,
}

impl Reader {
    /// The next event; ends when the hub stops or the store fails.
    async fn next(mut self) -> Option<(Result<Event, Infallible>, Self)> {
        loop {
            if let Some(view) = self.page.pop_front() {
                self.after = view.id;
                let event = Event::default()
                    .id(view.id.to_string())
                    .json_data(&view)
                    .ok()?;
                return Some((Ok(event), self));
            }
            self.news.mark_unchanged();
            let after = self.after;
            let read = move |connection: &Connection| {
                Ok::<_, StoreError>(store::event::after(connection, after, STREAM_PAGE)?)
            };
            self.page = self.api.controller.store().read(read).await.ok()?.into();
            if self.page.is_empty() {
                tokio::select! {
                    changed = self.news.changed() => changed.ok()?,
                    _ = self.stopping.wait_for(|stopping| *stopping) => return None,
                }
            }
        }
    }
}
