//! The publisher: what waits in the outbox goes to the broker at a set rate, and a row is cleared when the broker
//! took exactly what the row asks for.
//!
//! Releases go before heads, so that a device which reads its head finds the release. What the broker refuses
//! stays in the outbox and is tried again.

use std::sync::atomic::Ordering;
use std::time::Duration;

use foreshore_protocol::frame::{self, MAX_SCHEMA};
use foreshore_protocol::message::HubInfo;
use foreshore_protocol::topic::{self, Leaf};
use foreshore_protocol::{DeviceId, Digest, Version};
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use rumqttc::{AsyncClient, ClientError, PublishOptions};
use tokio::time::{Instant, MissedTickBehavior};

use super::{ANSWER_WITHIN, LinkCounters, reconnect_spread_ms};
use crate::clock::wall_clock;
use crate::controller::{BEACON_INTERVAL_MS, ControlError, Controller};
use crate::store::{self, StoreError};

/// Messages that are on their way to the broker at once.
const PAGE: usize = 200;

/// The set rate: a page every 50 ms, 4,000 messages a second.
const PAGE_EVERY: Duration = Duration::from_millis(50);

/// The outbox is looked at so often even without news.
const LOOK_EVERY: Duration = Duration::from_secs(30);

/// How long to wait after the broker refused something.
const AFTER_REFUSAL: Duration = Duration::from_secs(5);

/// How often the hub's own topic is renewed, for devices that take the time from it.
const HUB_INFO_EVERY: Duration = Duration::from_secs(3600);

/// Why the publisher stopped.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// The connection ended.
    #[error("the connection ended")]
    Client(#[from] ClientError),
    /// The store failed.
    #[error("the store failed")]
    Control(#[from] ControlError),
    /// The broker does not answer.
    #[error("the broker took a message and did not answer")]
    NoAnswer,
}

impl From<PublishError> for super::LinkError {
    fn from(error: PublishError) -> Self {
        match error {
            PublishError::Client(error) => Self::Client(error),
            PublishError::Control(error) => Self::Control(error),
            PublishError::NoAnswer => Self::NoAnswer,
        }
    }
}

/// One row of the outbox, as it was read.
#[derive(Debug, Clone)]
enum Item {
    Clear(String),
    Release(Digest, Vec<u8>),
    Head(DeviceId, Version, Vec<u8>),
}

/// Publishes until the connection ends.
///
/// # Errors
///
/// See [`PublishError`].
pub async fn run(
    client: &AsyncClient,
    controller: &Controller,
    counters: &LinkCounters,
) -> Result<(), PublishError> {
    let mut pace = tokio::time::interval(PAGE_EVERY);
    pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut renew_at = Instant::now();
    loop {
        if renew_at <= Instant::now() {
            publish_hub_info(client, controller).await?;
            renew_at = Instant::now() + HUB_INFO_EVERY;
        }
        let mut refused = false;
        while let Some(page) = next_page(controller).await? {
            pace.tick().await;
            if publish(client, controller, counters, page).await? > 0 {
                refused = true;
                break;
            }
        }
        if refused {
            tokio::time::sleep(AFTER_REFUSAL).await;
            continue;
        }
        tokio::select! {
            () = controller.outbox_news() => {}
            () = tokio::time::sleep(LOOK_EVERY) => {}
        }
    }
}

/// What waits longest for nothing: clears, then releases, then heads; `None` when nothing waits.
async fn next_page(controller: &Controller) -> Result<Option<Vec<Item>>, PublishError> {
    let page = controller
        .store()
        .read(|connection| {
            let clears = store::desired::waiting_clears(connection, PAGE)?
                .into_iter()
                .map(Item::Clear);
            let releases = store::desired::waiting_releases(connection, PAGE)?;
            let mut page: Vec<Item> = clears.collect();
            page.extend(
                releases
                    .into_iter()
                    .map(|(digest, bytes)| Item::Release(digest, bytes)),
            );
            // Heads only once every release is out.
            if page.is_empty() {
                for (device, head) in store::desired::waiting_heads(connection, "", PAGE)? {
                    page.push(Item::Head(device, head.version, frame::encode(&head)));
                }
            }
            Ok::<_, StoreError>(page)
        })
        .await
        .map_err(ControlError::from)?;
    Ok((!page.is_empty()).then_some(page))
}

/// Publishes a page and clears what the broker took; how many it refused.
async fn publish(
    client: &AsyncClient,
    controller: &Controller,
    counters: &LinkCounters,
    page: Vec<Item>,
) -> Result<usize, PublishError> {
    let mut answers = FuturesUnordered::new();
    for item in page {
        let (topic, payload) = match &item {
            Item::Clear(topic) => (topic.clone(), Vec::new()),
            Item::Release(digest, bytes) => (topic::release(digest), bytes.clone()),
            Item::Head(device, _, frame) => (topic::device(device, Leaf::Head), frame.clone()),
        };
        let options = PublishOptions::at_least_once().retained();
        let notice = client
            .publish_tracked(topic.clone(), payload, options)
            .await?;
        answers.push(async move { (item, topic, notice.wait_completion_async().await) });
    }
    let (mut taken, mut refused) = (Vec::new(), 0);
    loop {
        let next = tokio::time::timeout(ANSWER_WITHIN, answers.next());
        match next.await.map_err(|_| PublishError::NoAnswer)? {
            None => break,
            Some((item, _, Ok(()))) => taken.push(item),
            // The hub's right to clear a device's own topics depends on the broker's rules; not worth a retry.
            Some((Item::Clear(topic), _, Err(error))) => {
                tracing::debug!(%topic, %error, "the broker did not clear a retained message");
                taken.push(Item::Clear(topic));
            }
            Some((_, topic, Err(error))) => {
                refused += 1;
                tracing::warn!(%topic, %error, "the broker did not take a message; it is sent again");
            }
        }
    }
    counters
        .published
        .fetch_add(u64::try_from(taken.len()).unwrap_or(0), Ordering::Relaxed);
    controller
        .change(move |change| clear(change.connection, &taken).map_err(ControlError::from))
        .await?;
    Ok(refused)
}

fn clear(connection: &rusqlite::Connection, taken: &[Item]) -> rusqlite::Result<()> {
    for item in taken {
        match item {
            Item::Clear(topic) => store::desired::cleared(connection, topic)?,
            Item::Release(digest, _) => store::desired::release_published(connection, digest)?,
            Item::Head(device, version, _) => {
                store::desired::published(connection, device, *version)?
            }
        }
    }
    Ok(())
}

/// The hub's own retained topic. Its time is also the mark by which the hub recognizes, after a reconnect, that
/// the broker kept what it was given: so it is written after everything that was missing has been queued.
async fn publish_hub_info(
    client: &AsyncClient,
    controller: &Controller,
) -> Result<(), PublishError> {
    let unix_ms = wall_clock().0;
    let info = controller
        .change(move |change| {
            let (devices, _) = store::device::count(change.connection)?;
            store::desired::put_canary(change.connection, unix_ms)?;
            Ok(HubInfo {
                epoch: store::desired::epoch(change.connection)?,
                unix_ms,
                beacon_interval_ms: BEACON_INTERVAL_MS,
                reconnect_spread_ms: u32::try_from(reconnect_spread_ms(devices))
                    .unwrap_or(u32::MAX),
                schema_range: (1, MAX_SCHEMA),
            })
        })
        .await?;
    let options = PublishOptions::at_least_once().retained();
    client
        .publish(topic::HUB, frame::encode(&info), options)
        .await?;
    Ok(())
}
