//! Stands in for the embedded broker in a hub that was built without it, and says so.

use std::net::SocketAddr;

use super::{EmbeddedConfig, StartError};

/// Cannot be made: this hub was built without the embedded broker.
#[derive(Debug)]
pub enum Embedded {}

impl Embedded {
    /// Says that there is none.
    ///
    /// # Errors
    ///
    /// Always [`StartError::NotBuilt`].
    pub fn start(_config: EmbeddedConfig) -> Result<Self, StartError> {
        Err(StartError::NotBuilt)
    }

    /// Where devices connect.
    #[must_use]
    pub fn device_address(&self) -> SocketAddr {
        match *self {}
    }

    /// Where the hub connects.
    #[must_use]
    pub fn hub_address(&self) -> SocketAddr {
        match *self {}
    }

    /// Waits until the broker has ended by itself.
    #[expect(clippy::unused_async, reason = "the same shape as the real one")]
    pub async fn ended(&mut self) {
        match *self {}
    }

    /// Stops the broker.
    pub fn shutdown(self) {
        match self {}
    }
}
