//! A whole fleet speaks at once, and the hub's connection breaks in the middle of it.
//!
//! Brokers acknowledge what they then drop, so a device sends again until the *hub* has acknowledged. What must
//! hold: nothing that the hub acknowledged is missing at the hub, and everything gets there in the end.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use foreshore_hub::broker::HUB_NAME;
use foreshore_protocol::topic::{Leaf, Topic};
use rumqttc::{AsyncClient, Event, MqttOptions, Packet, PublishOptions, QoS, SessionMode};
use tokio::time::Instant;

use crate::bed::{Bed, HUB, JOIN, own};

const DEVICES: usize = 200;
const EACH: u8 = 25;

/// The hub breaks its connection after so many messages.
const BREAK_AFTER: usize = 1500;

/// A device that hears nothing for so long sends again, then after twice as long: a fleet that insists at a
/// fixed rate keeps a busy broker busy.
const AGAIN_AFTER: Duration = Duration::from_secs(3);

/// Between two attempts to connect.
const PAUSE: Duration = Duration::from_millis(100);

const ENOUGH: Duration = Duration::from_secs(150);

type Committed = Arc<Mutex<BTreeSet<(String, u8)>>>;

fn options(bed: &Bed, name: &str, password: &str) -> MqttOptions {
    let address = if name == HUB_NAME {
        bed.hub
    } else {
        bed.devices
    };
    let mut options = MqttOptions::new(name, (address.ip().to_string(), address.port()));
    options
        .set_credentials(name, password.to_owned())
        .set_keep_alive(60)
        .set_connect_timeout(Duration::from_secs(20))
        .set_session_mode(SessionMode::Clean);
    options
}

/// One session of the hub: takes in, then acknowledges. Ends after `most` messages, without a goodbye.
async fn hub(mut options: MqttOptions, committed: Committed, most: usize) {
    options
        .set_receive_maximum(Some(1000))
        .set_outgoing_inflight_upper_limit(500);
    let (client, mut eventloop) = AsyncClient::builder(options).capacity(20_000).build();
    let mut taken = 0;
    while taken < most {
        let publish = match eventloop.poll().await {
            Ok(Event::Incoming(Packet::Publish(publish))) => publish,
            Ok(Event::Incoming(Packet::ConnAck(_))) => {
                client
                    .try_subscribe("fs/v1/+/+/event", QoS::AtLeastOnce)
                    .expect("room");
                continue;
            }
            Ok(_) => continue,
            Err(_) => {
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        let topic = std::str::from_utf8(&publish.topic).expect("a topic");
        let Some(Topic::Device(device, Leaf::Event)) = Topic::parse(topic) else {
            panic!("{topic} reached the hub")
        };
        let number = publish.payload[0];
        committed
            .lock()
            .expect("no panic")
            .insert((device.to_string(), number));
        let ack = own(device.as_str(), Leaf::Command);
        // No room for an answer is an answer that was lost.
        let _ = client.try_publish(ack, vec![number], PublishOptions::at_least_once());
        taken += 1;
    }
}

/// Sends until every message is acknowledged by the hub; what was acknowledged, and how many were sent again.
async fn device(options: MqttOptions, name: String) -> (BTreeSet<u8>, usize) {
    let (client, mut eventloop) = AsyncClient::builder(options).capacity(200).build();
    let (mut acknowledged, mut sent, mut subscribed) = (BTreeSet::new(), 0, false);
    let (mut patience, mut again_at) = (AGAIN_AFTER, Instant::now());
    while acknowledged.len() < usize::from(EACH) {
        tokio::select! {
            event = eventloop.poll() => match event {
                Ok(Event::Incoming(Packet::ConnAck(_))) => {
                    client.try_subscribe(own(&name, Leaf::Command), QoS::AtLeastOnce).expect("room");
                }
                Ok(Event::Incoming(Packet::SubAck(_))) => {
                    subscribed = true;
                    again_at = Instant::now();
                }
                Ok(Event::Incoming(Packet::Publish(publish))) => {
                    acknowledged.insert(publish.payload[0]);
                    // Sending again makes no sense while answers come.
                    (patience, again_at) = (AGAIN_AFTER, Instant::now() + AGAIN_AFTER);
                }
                Ok(_) => {}
                Err(_) => {
                    subscribed = false;
                    tokio::time::sleep(PAUSE).await;
                }
            },
            () = tokio::time::sleep_until(again_at), if subscribed => {
                again_at = Instant::now() + patience;
                patience = (patience * 2).min(AGAIN_AFTER * 2);
                for number in (0..EACH).filter(|number| !acknowledged.contains(number)) {
                    let event = own(&name, Leaf::Event);
                    if client.try_publish(event, vec![number], PublishOptions::at_least_once()).is_ok() {
                        sent += 1;
                    }
                }
            }
        }
    }
    (acknowledged, sent - usize::from(EACH))
}

pub(crate) fn nothing_that_the_hub_acknowledged_is_lost(bed: &Bed) {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("threads");
    let begun = Instant::now();
    let committed = Committed::default();
    let results = runtime.block_on(async {
        let broken = tokio::spawn(hub(
            options(bed, HUB_NAME, HUB),
            committed.clone(),
            BREAK_AFTER,
        ));
        let devices: Vec<_> = (0..DEVICES)
            .map(|number| {
                let name = format!("dev{number}");
                (
                    name.clone(),
                    tokio::spawn(device(options(bed, &name, JOIN), name)),
                )
            })
            .collect();
        tokio::time::timeout(ENOUGH, broken)
            .await
            .expect("the hub hears the first")
            .expect("no panic");
        println!(
            "{:?}: the connection broke after {:?}",
            bed.kind,
            begun.elapsed()
        );
        let whole = tokio::spawn(hub(
            options(bed, HUB_NAME, HUB),
            committed.clone(),
            usize::MAX,
        ));
        let mut results = Vec::new();
        for (name, device) in devices {
            let done = tokio::time::timeout(ENOUGH, device).await;
            results.push((
                name.clone(),
                done.unwrap_or_else(|_| panic!("{name} did not get through"))
                    .expect("no panic"),
            ));
        }
        whole.abort();
        results
    });
    let committed = committed.lock().expect("no panic");
    let mut again = 0;
    for (name, (acknowledged, repeated)) in &results {
        again += repeated;
        assert_eq!(acknowledged.len(), usize::from(EACH));
        for number in acknowledged {
            assert!(
                committed.contains(&(name.clone(), *number)),
                "{name} {number} was acknowledged and is lost"
            );
        }
    }
    println!(
        "{:?}: {} messages in {:?}, {again} sent again",
        bed.kind,
        committed.len(),
        begun.elapsed()
    );
}
