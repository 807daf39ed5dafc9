//! Leases on their way to devices, as soon as they are granted.
//!
//! One that is lost is not missed: its device asks again before a minute is over, and gets another.

use foreshore_protocol::frame;
use foreshore_protocol::topic::{self, Leaf};
use rumqttc::{AsyncClient, ClientError, PublishOptions, PublishProperties};

use crate::controller::Controller;

/// Sends leases until the connection ends.
///
/// # Errors
///
/// When the connection ends.
pub async fn run(client: &AsyncClient, controller: &Controller) -> Result<(), ClientError> {
    loop {
        for (device, lease) in controller.take_leases() {
            // Later the device would not take it any more.
            let expiry = u32::try_from(lease.ttl_ms.div_ceil(1000)).unwrap_or(u32::MAX);
            let properties = PublishProperties {
                message_expiry_interval: Some(expiry),
                ..PublishProperties::default()
            };
            let options = PublishOptions::at_least_once().properties(properties);
            let topic = topic::device(&device, Leaf::Lease);
            client
                .publish(topic, frame::encode(&lease), options)
                .await?;
        }
        controller.lease_news().await;
    }
}
