//! The publisher: what waits in the outbox goes to the broker at a set rate, and a row is cleared when the broker
//! took exactly what the row asks for.
//!
//! Releases and secrets go before heads, so that a device which reads its head finds what it needs. What the broker refuses
//! stays in the outbox and [rests] before it is tried again; everything else goes past it.

use std::sync::atomic::Ordering;
use std::time::Duration;

use foreshore_protocol::frame::{self, MAX_SCHEMA};
use foreshore_protocol::message::HubInfo;
use foreshore_protocol::topic::{self, Leaf};
use foreshore_protocol::{DeviceId, Digest, Version};
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use rumqttc::{AsyncClient, ClientError, PublishOptions};
use tokio::time::Instant;

use self::pace::Pace;
use self::rests::{Key, Rests};
use super::{ANSWER_WITHIN, LinkCounters, reconnect_spread_ms};
use crate::clock::wall_clock;
use crate::controller::{BEACON_INTERVAL_MS, ControlError, Controller};
use crate::store::{self, StoreError};

mod pace;
mod rests;

/// Messages that are on their way to the broker at once. The next page goes out when the broker has taken all of one and
/// that is stored, which takes some 100 ms while devices report: so small pages make a large fleet wait.
const PAGE: usize = 500;

/// The outbox is looked at so often even without news.
const LOOK_EVERY: Duration = Duration::from_secs(30);

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
    Secrets(DeviceId, Version, Vec<u8>),
}

impl Item {
    /// What rests when the broker refuses it. Topics to be cleared are given up instead.
    fn key(&self) -> Option<Key> {
        match self {
            Self::Clear(_) => None,
            Self::Release(digest, _) => Some(Key::Release(*digest)),
            Self::Head(device, version, _) => Some(Key::Head(device.clone(), *version)),
            Self::Secrets(device, version, _) => Some(Key::Secrets(device.clone(), *version)),
        }
    }
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
    let mut renew_at = Instant::now();
    let mut pace = Pace::new(renew_at);
    let mut rests = Rests::default();
    loop {
        if renew_at <= Instant::now() {
            publish_hub_info(client, controller).await?;
            renew_at = Instant::now() + HUB_INFO_EVERY;
        }
        while let Some(page) = next_page(controller, &rests).await? {
            tokio::time::sleep_until(pace.take(Instant::now(), page.len())).await;
            publish(client, controller, counters, page, &mut rests).await?;
        }
        let now = Instant::now();
        let look_at = now + LOOK_EVERY;
        let look_at = rests.next(now).map_or(look_at, |end| end.min(look_at));
        tokio::select! {
            () = controller.outbox_news() => {}
            () = tokio::time::sleep_until(look_at) => {}
        }
    }
}

/// What waits longest for nothing: clears, then releases and secrets, then heads; `None` when nothing waits.
async fn next_page(
    controller: &Controller,
    rests: &Rests,
) -> Result<Option<Vec<Item>>, PublishError> {
    let (rests, now) = (rests.clone(), Instant::now());
    let page = controller
        .store()
        .read(move |connection| Ok::<_, StoreError>(waiting(connection, &rests, now, PAGE)?))
        .await
        .map_err(ControlError::from)?;
    Ok((!page.is_empty()).then_some(page))
}

/// At most `limit` clears, as many releases and as many bundles of secrets, or as many heads; nothing that rests.
fn waiting(
    connection: &rusqlite::Connection,
    rests: &Rests,
    now: Instant,
    limit: usize,
) -> rusqlite::Result<Vec<Item>> {
    let clears = store::desired::waiting_clears(connection, limit)?
        .into_iter()
        .map(Item::Clear);
    let mut page: Vec<Item> = clears.collect();
    let resting = |digest: &Digest| rests.holds_release(digest, now);
    for (digest, bytes) in store::desired::waiting_releases(connection, limit, resting)? {
        page.push(Item::Release(digest, bytes));
    }
    let resting = |device: &DeviceId, version| rests.holds_secrets(device, version, now);
    for (device, version, sealed) in store::secret::waiting(connection, limit, resting)? {
        page.push(Item::Secrets(device, version, frame::encode(&sealed)));
    }
    // Heads only once every release is out, those apart that the broker refuses: one of them must not hold up
    // the fleet. A device that is told of such a release waits for it.
    if page.is_empty() {
        let resting = |device: &DeviceId, version| rests.holds_head(device, version, now);
        for (device, head) in store::desired::waiting_heads(connection, limit, resting)? {
            page.push(Item::Head(device, head.version, frame::encode(&head)));
        }
    }
    Ok(page)
}

/// Publishes a page and clears what the broker took; what it refused rests.
async fn publish(
    client: &AsyncClient,
    controller: &Controller,
    counters: &LinkCounters,
    page: Vec<Item>,
    rests: &mut Rests,
) -> Result<(), PublishError> {
    let mut answers = FuturesUnordered::new();
    for item in page {
        let (topic, payload) = match &item {
            Item::Clear(topic) => (topic.clone(), Vec::new()),
            Item::Release(digest, bytes) => (topic::release(digest), bytes.clone()),
            Item::Head(device, _, frame) => (topic::device(device, Leaf::Head), frame.clone()),
            Item::Secrets(device, _, frame) => {
                (topic::device(device, Leaf::Secrets), frame.clone())
            }
        };
        let options = PublishOptions::at_least_once().retained();
        let notice = client
            .publish_tracked(topic.clone(), payload, options)
            .await?;
        answers.push(async move { (item, topic, notice.wait_completion_async().await) });
    }
    let mut taken = Vec::new();
    loop {
        let next = tokio::time::timeout(ANSWER_WITHIN, answers.next());
        match next.await.map_err(|_| PublishError::NoAnswer)? {
            None => break,
            Some((item, _, Ok(()))) => {
                if let Some(key) = item.key() {
                    rests.taken(&key);
                }
                taken.push(item);
            }
            // The hub's right to clear a device's own topics depends on the broker's rules; not worth a retry.
            Some((Item::Clear(topic), _, Err(error))) => {
                tracing::debug!(%topic, %error, "the broker did not clear a retained message");
                taken.push(Item::Clear(topic));
            }
            Some((item, topic, Err(error))) => {
                let first = item
                    .key()
                    .is_some_and(|key| rests.refused(key, Instant::now()));
                if first {
                    tracing::warn!(%topic, %error, "the broker did not take a message; it is sent again, less and less often");
                } else {
                    tracing::debug!(%topic, %error, "the broker did not take a message again");
                }
            }
        }
    }
    counters
        .published
        .fetch_add(u64::try_from(taken.len()).unwrap_or(0), Ordering::Relaxed);
    controller
        .change(move |change| clear(change.connection, &taken).map_err(ControlError::from))
        .await?;
    Ok(())
}

fn clear(connection: &rusqlite::Connection, taken: &[Item]) -> rusqlite::Result<()> {
    for item in taken {
        match item {
            Item::Clear(topic) => store::desired::cleared(connection, topic)?,
            Item::Release(digest, _) => store::desired::release_published(connection, digest)?,
            Item::Head(device, version, _) => {
                store::desired::published(connection, device, *version)?
            }
            Item::Secrets(device, version, _) => {
                store::secret::published(connection, device, *version)?
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicU64;

    use foreshore_protocol::secret::PublicKey;

    use super::*;
    use crate::rollout::{Placement, UnixMs};
    use crate::store::tests::memory;

    /// How many instructions SQLite executes to find the one head, and then the one bundle of secrets, that wait in a fleet
    /// of so many devices.
    fn instructions(devices: usize) -> u64 {
        let mut connection = memory();
        let (app, release) = ("shop".parse().unwrap(), Digest::of(b"release"));
        store::app::put_release(&connection, &release, &app, b"release", UnixMs(1)).unwrap();
        let placement = Placement {
            release,
            soak_ms: 1,
            progress_deadline_ms: 2,
        };
        for number in 0..devices {
            let id: DeviceId = format!("d-{number}").parse().unwrap();
            store::device::insert(&connection, &id, UnixMs(1)).unwrap();
            let key = PublicKey::from_bytes([7; 32]);
            store::secret::show_key(&connection, &id, &key).unwrap();
            store::desired::place(&connection, &id, &app, &placement).unwrap();
        }
        connection
            .execute_batch(
                "UPDATE device_secrets SET epoch = 1, generation = 1;
                 DELETE FROM outbox WHERE device != 'd-1'; DELETE FROM outbox_secrets;",
            )
            .unwrap();
        let executed = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&executed);
        let count = move || {
            counter.fetch_add(1, Ordering::Relaxed);
            false
        };
        connection.progress_handler(1, Some(count)).unwrap();
        let look = || waiting(&connection, &Rests::default(), Instant::now(), PAGE).unwrap();
        assert!(matches!(&look()[..], [Item::Head(..)]));
        connection
            .execute("INSERT INTO outbox_secrets VALUES ('d-1', 1, 1)", [])
            .unwrap();
        assert!(matches!(&look()[..], [Item::Secrets(..)]));
        executed.load(Ordering::Relaxed)
    }

    #[test]
    fn what_waits_is_found_in_a_large_fleet_as_in_a_small_one() {
        let (small, large) = (instructions(10), instructions(1000));
        assert!(large < 2 * small, "{small} and {large} instructions");
    }

    #[test]
    fn what_the_broker_refuses_for_good_holds_nobody_else_up() {
        let connection = memory();
        let app = "shop".parse().unwrap();
        let place = |device: &str, content: &[u8]| {
            let (id, release) = (device.parse().unwrap(), Digest::of(content));
            _ = store::device::insert(&connection, &id, UnixMs(1));
            store::app::put_release(&connection, &release, &app, content, UnixMs(1)).unwrap();
            store::desired::enqueue_release(&connection, &release).unwrap();
            let placement = Placement {
                release,
                soak_ms: 1,
                progress_deadline_ms: 2,
            };
            store::desired::place(&connection, &id, &app, &placement).unwrap();
        };
        // More that are refused than a page holds, and in front of the others.
        for device in ["a-1", "a-2", "a-3", "b-1", "b-2"] {
            place(device, if device < "b" { b"bad" } else { b"good" });
        }
        let (mut rests, now) = (Rests::default(), Instant::now());
        let mut asked = 0;
        let mut all_pages = |rests: &mut Rests, now| loop {
            let page = waiting(&connection, rests, now, 2).unwrap();
            if page.is_empty() {
                break;
            }
            for item in page {
                asked += 1;
                assert!(asked < 100, "{item:?} is asked for ever");
                let refused = match &item {
                    Item::Clear(_) => false,
                    Item::Release(digest, _) => *digest == Digest::of(b"bad"),
                    Item::Head(device, ..) | Item::Secrets(device, ..) => device.as_str() < "b",
                };
                match item.key().filter(|_| refused) {
                    Some(key) => _ = rests.refused(key, now),
                    None => clear(&connection, &[item]).unwrap(),
                }
            }
        };
        all_pages(&mut rests, now);
        let left = store::desired::waiting_heads(&connection, 10, |_, _| false).unwrap();
        let left: Vec<_> = left.iter().map(|(device, _)| device.as_str()).collect();
        assert_eq!(left, ["a-1", "a-2", "a-3"]);

        // What rests is tried again in its time, a newer head at once.
        assert!(waiting(&connection, &rests, now, 2).unwrap().is_empty());
        place("a-2", b"good");
        let page = waiting(&connection, &rests, now, 2).unwrap();
        assert!(matches!(&page[..], [Item::Release(..)]), "{page:?}");
        clear(&connection, &page).unwrap();
        let page = waiting(&connection, &rests, now, 2).unwrap();
        assert!(
            matches!(&page[..], [Item::Head(device, ..)] if device.as_str() == "a-2"),
            "{page:?}"
        );
        let later = rests.next(now).unwrap();
        assert!(matches!(
            &waiting(&connection, &rests, later, 2).unwrap()[..],
            [Item::Release(..)]
        ));
    }
}
