//! Acknowledgements and requests to devices: coalesced per device, sent as fast as the broker takes them.
//!
//! A command that is lost is not missed: the device sends again what was not acknowledged, and the hub asks
//! again for what it lacks.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use foreshore_protocol::message::Command;
use foreshore_protocol::topic::{self, Leaf};
use foreshore_protocol::{DeviceId, frame};
use rumqttc::{AsyncClient, ClientError, PublishOptions, PublishProperties};
use tokio::sync::Notify;

use crate::clock::wall_clock;
use crate::controller::Controller;
use crate::controller::ingest::{Receipt, Receipts};
use crate::store::{self, StoreError};

/// A command that no device took for so long is worth nothing any more, in seconds.
const EXPIRY_S: u32 = 300;

/// How long acknowledgements wait for others to the same device: an update brings several events within a second, and what
/// is not acknowledged is sent again after half a minute at the earliest.
const LINGER: Duration = Duration::from_millis(300);

/// How often a device is asked to send everything at most: it may be answering.
const ASK_EVERY: Duration = Duration::from_secs(10);

/// How many devices are asked in one go, and how long between, after the hub was away: 250 a second.
const ASK_PAGE: usize = 50;
const ASK_PAUSE: Duration = Duration::from_millis(200);

/// Commands that wait to be sent.
#[derive(Debug, Default)]
pub struct Commands {
    waiting: Mutex<BTreeMap<DeviceId, Receipt>>,
    news: Notify,
}

impl Commands {
    /// Adds what a committed batch asks for. A newer acknowledgement takes the place of an older one.
    pub fn answer(&self, receipts: Receipts) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        for (device, receipt) in receipts {
            if receipt == Receipt::default() {
                continue;
            }
            waiting.entry(device).or_default().join(receipt);
        }
        if !waiting.is_empty() {
            self.news.notify_one();
        }
    }

    fn take(&self) -> BTreeMap<DeviceId, Receipt> {
        std::mem::take(&mut *self.waiting.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Sends commands until the connection ends.
///
/// # Errors
///
/// When the connection ends.
pub async fn run(client: &AsyncClient, commands: &Commands) -> Result<(), ClientError> {
    let mut asked: BTreeMap<DeviceId, Instant> = BTreeMap::new();
    loop {
        for (device, receipt) in commands.take() {
            if let Some((event, reported)) = receipt.stored {
                let unix_ms = wall_clock().0;
                let ack = Command::Ack {
                    event,
                    reported,
                    unix_ms,
                };
                send(client, &device, &ack).await?;
            }
            let lately = asked
                .get(&device)
                .is_some_and(|at| at.elapsed() < ASK_EVERY);
            if receipt.resync && !lately {
                send(client, &device, &Command::Resync).await?;
                asked.insert(device, Instant::now());
            }
        }
        asked.retain(|_, at| at.elapsed() < ASK_EVERY);
        commands.news.notified().await;
        tokio::time::sleep(LINGER).await;
    }
}

async fn send(
    client: &AsyncClient,
    device: &DeviceId,
    command: &Command,
) -> Result<(), ClientError> {
    let properties = PublishProperties {
        message_expiry_interval: Some(EXPIRY_S),
        ..PublishProperties::default()
    };
    let options = PublishOptions::at_least_once().properties(properties);
    client
        .publish(
            topic::device(device, Leaf::Command),
            frame::encode(command),
            options,
        )
        .await
}

/// Asks every connected device for what it could not deliver while the hub was away.
pub async fn ask_all(controller: &Controller, commands: &Commands) {
    let mut after = String::new();
    loop {
        let from = after.clone();
        let page = controller
            .store()
            .read(move |connection| {
                Ok::<_, StoreError>(store::device::online_after(connection, &from, ASK_PAGE)?)
            })
            .await;
        let devices = match page {
            Ok(devices) => devices,
            Err(error) => {
                tracing::warn!(%error, "failed to list the connected devices");
                return;
            }
        };
        let Some(last) = devices.last() else { return };
        last.as_str().clone_into(&mut after);
        let ask = Receipt {
            stored: None,
            resync: true,
        };
        commands.answer(devices.into_iter().map(|device| (device, ask)).collect());
        tokio::time::sleep(ASK_PAUSE).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_to_one_device_are_coalesced() {
        let device: DeviceId = "d".parse().unwrap();
        let commands = Commands::default();
        let one = |stored, resync| Receipts::from([(device.clone(), Receipt { stored, resync })]);
        commands.answer(one(Some((1, 1)), false));
        commands.answer(one(None, true));
        commands.answer(one(Some((2, 1)), false));
        assert_eq!(commands.take(), one(Some((2, 1)), true));
        commands.answer(one(None, false));
        assert!(commands.take().is_empty());
    }
}
